"""Stage 2: distil the prompt's behaviour into [BE]: [BE] + query answers as prompt + query does.

    L = (1 - lambda) L_recon + lambda L_KD        L_KD = tau^2 mean_t KL( softmax(z_T / tau) || softmax(z_S / tau) )        (paper, combined objective; the tau^2 is not in it)

The teacher is the same frozen model with the full prompt; z_T are its logits along its own answer. The student reads [BE] in the prompt's place and the same answer.
The teacher answers every query once, before training, and its last hidden states stay on disk: 1/50 to 1/250 of the size of the logits, and z = W h gives those back. All that the
loss needs of them is softmax(z_T / tau) W and an entropy for each token, made at a query's first visit.
The idea is in two places: make_examples (what teacher and student are fed) and the loop of main.

    python stage2_kd.py --prompt prompts/pirate.txt                          # from stage 1's out/be.pt, questions from prompts/pirate.queries.txt -> out/be.pt
    python stage2_kd.py --prompt p.txt                                       # no question file: the model itself is asked what its users would ask
    python stage2_kd.py --prompt p.txt --queries q.jsonl --test-queries t.jsonl --answer-tokens 128
    python stage2_kd.py --prompt p.txt --init random --k 4 --lam 1           # distillation alone, four vectors, no stage 1
    python stage2_kd.py --prompt roles/*.txt --init random --lam 1           # many prompts in one run, a [BE] each -> out/NAME.be.pt
    torchrun --nproc_per_node=8 stage2_kd.py --prompt p.txt --batch 64       # the queries of each step over eight GPUs; --resume goes on where a killed run stopped

Reads   the prompt, queries, out/be.pt of stage 1, [AE].
Writes  out/be.pt, out/be.kd.png, the teacher's answers in out/teacher-*, and with self the questions in out/queries-*.txt.
Expect  prompts/pirate.txt, --answer-tokens 32 --steps 300, on 2 cores: 6 minutes, 2 GB, and 0.64 of the gap between no prompt and the full one closed on test questions
"""
import argparse
import contextlib
import copy
import datetime
import glob
import hashlib
import io
import json
import math
import os
import random
import re
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import filelock
import jinja2
import safetensors
import torch
import transformers
from tqdm import tqdm

VERSION = "0.1"
FOLLOW_UPS = ["Can you say more about that?", "Why is that?", "Can you give me an example?", "Are you sure?", "And what would you do in my place?", "Say that again in one sentence."]


def settings():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--prompt",        required=True, nargs="+",      help="the system prompt: a text file, or a .json with a \"messages\" list; several files train together, each its own [BE]")
    add("--model",         default="models/smollm2-135m", help="hub name or local folder of a Llama or Qwen chat model")
    add("--queries",       default="",                    help=".txt, a query a line; .jsonl with question, query or instruction; or self. Default: NAME.queries.txt beside the prompt, else self")
    add("--test-queries",  default="",                    help="for the last table only, never trained or chosen on. Default: NAME.test.txt beside the prompt, else the held-out queries")
    add("--be",            default=[], nargs="+",         help="stage 1's artifact for each prompt, where training starts. Default: as --out")
    add("--ae",            default="",                    help="the [AE] artifact, or none; by default out/ae.pt, else artifacts/, whichever fits the model")
    add("--out",           default=[], nargs="+",         help="the artifact for each prompt. Default: out/be.pt, or out/NAME.be.pt for several")
    add("--resume",        action="store_true",           help="go on from --out")
    add("--init",          default="be", choices=["be", "random"], help="start from --be, or from noise (then --layout and --k count)")
    add("--layout",        default="", choices=["chat", "block"], help="[BE] replaces the system message (chat, the default), or the whole system block; with --init be it is the artifact's")
    add("--k",             default=0,    type=number(int, 1),      help="vectors to learn, 1 by default; with --init be as many as the artifact has")
    add("--lam",           default=0.9,  type=number(float, 0, 1), help="lambda, the weight of L_KD (with --hard of L_CE); at 1 there is no L_recon")
    add("--tau",           default=2.0,  type=number(float, 0.01), help="the temperature of L_KD")
    add("--answers",       default="teacher", choices=["teacher", "gold"], help="train along the teacher's own answers, or along the \"answer\" of each row of --queries")
    add("--hard",          action="store_true",           help="prompt tuning: L_CE, cross-entropy with the tokens of those answers, in the place of L_KD")
    add("--recon-every",   default=4,    type=number(int, 1),      help="L_recon enters every so many steps, that much heavier: the same gradient on average, at 1/4 of its cost")
    add("--steps",         default=600,  type=number(int, 0),      help="optimizer steps; 0 only measures the vector of --be")
    add("--batch",         default=4,    type=number(int, 1),      help="queries a step for each prompt; many small steps beat few large ones (results/LOG.md)")
    add("--micro-batch",   default=4,    type=number(int, 1),      help="queries in one pass; the gradients of a step's passes add up. Larger on a GPU")
    add("--lr",            default=None, type=number(float, 0),    help="peak; default: 0.9 standard deviations of the embedding table, 0.12 on the default model; AdamW with beta2 0.95, warm-up over 10 steps, cosine to zero")
    add("--answer-tokens", default=64,   type=number(int, 1),      help="the teacher's answers are cut here")
    add("--turns",         default=1,    type=number(int, 1),      help="turns of a chat to train and test on: follow-up questions after the teacher's own answers")
    add("--held-out",      default=0.15, type=number(float, 0.01, 0.9), help="share of the queries kept from training; the best vector is chosen on them (at most 32)")
    add("--self-queries",  default=200,  type=number(int, 8),      help="how many, with --queries self")
    add("--temperature",   default=0.0,  type=number(float, 0),    help="of the teacher's answers; 0 is greedy")
    add("--eval-every",    default=50,   type=number(int, 1),      help="steps between two looks at the held-out queries; the artifact is saved then")
    add("--seed",          default=0,    type=int,                 help="of the start vector, the split and the order of queries")
    add("--device",        default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: CUDA, then MPS, then CPU")
    add("--device-map",    default=None, choices=["auto"],         help="auto: the layers of a model larger than one GPU over all of them")
    add("--dtype",         default="auto", choices=["auto", "bf16", "fp32"], help="of the frozen weights; [BE] itself is always fp32")
    add("--compile",       action="store_true",           help="torch.compile; on a CPU it pays back its 80 s of compiling after some 700 steps")
    add("--checkpointing", action="store_true",           help="keep no activations for the backward pass, compute them again: for L_recon of prompts of thousands of tokens")
    add("--trust-remote-code", action="store_true", help="run the model code that a hub repository ships; off: none but that of transformers")
    p.error = lambda message: fail(f"{message}; see --help")
    args = p.parse_args()
    args.prompt = [x for x in args.prompt if not x.endswith((".queries.txt", ".test.txt"))] or args.prompt       # a glob takes in the questions beside the prompts
    if any(x and len(x) != len(args.prompt) for x in (args.be, args.out)):
        fail(f"--be, --out: expected one for each of the {len(args.prompt)} prompts, found {len(args.be)} and {len(args.out)}")
    if not args.out and len({Path(x).stem for x in args.prompt}) < len(args.prompt):
        fail(f"--prompt: expected a name of its own for each prompt, found {' '.join(args.prompt)}; give --out, a file for each")
    if args.answers == "gold" and args.turns > 1:
        fail("--answers gold: the answers of later turns are the teacher's; give --turns 1")
    return args


# --- shared: fail --------------------------------------------------------
def fail(message, code=2):
    """A user's mistake: one line on stderr that says what was expected, what came and what to do; exit code 2."""
    message = " ".join("".join(c if c.isprintable() else " " for c in message).split())          # names out of files are in it
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


def number(kind, low, high=math.inf):
    """An argparse type: an int or float from low to high."""
    def parse(text):
        if not low <= (value := kind(text)) <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"expected {'a number' if kind is float else 'a whole number'} from {low} to {high}, found {text}")
        return value
    parse.__name__ = "number" if kind is float else "whole number"
    return parse
# --- end shared ----------------------------------------------------------


# --- shared: device ------------------------------------------------------
def pick_device(device, dtype):
    """Where and how to run -> (torch.device, dtype of the frozen weights, attention implementation); prints the reason."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(name for name in there if there[name]) if device == "auto" else device
    if not there[device]:
        fail(f"--device {device}: this PyTorch sees no {device} device; use --device auto or cpu")
    fast, why, attention = torch.float32, "the safe choice on MPS", "sdpa"
    if device == "cuda":        # bf16 weights too: autocast would cast frozen fp32 weights anew in every step
        flash = dtype != "fp32" and transformers.utils.is_flash_attn_2_available() and torch.cuda.get_device_capability()[0] >= 8
        fast, why, attention = torch.bfloat16, "autocast", "flash_attention_2" if flash else "sdpa"
    elif device == "cpu":       # AMX or AVX512-BF16: a step in bf16 takes 0.6 of fp32's time (results/LOG.md); other CPUs emulate it, slower than fp32
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        fast, why = (torch.bfloat16, "this CPU multiplies bf16 natively") if native else (torch.float32, "this CPU has no native bf16")
        attention = "eager"     # as fast as SDPA at chat lengths, twice as fast on CPUs with AMX
    dtype = {"auto": fast, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads" if device == "cpu" else "Apple GPU"
    print(f"device: {device} ({name}), weights {str(dtype)[6:]} ({why if dtype == fast else 'as asked'}), attention {attention}")
    return torch.device(device), dtype, attention
# --- end shared ----------------------------------------------------------


# --- shared: load_frozen -------------------------------------------------
def load_frozen(name, device, dtype, attention, trust=False, device_map=None):
    """The frozen chat model and its tokenizer. name: hub name or folder; trust: run the code that it ships; device_map: "auto" spreads its layers over all
    GPUs. Exits with one line if there is no such model or it is no chat model."""
    if name == "models/smollm2-135m" and not Path(name, "config.json").exists():
        fail(f"the default model is not at {name} yet; fetch it once with: python models/prepare.py")
    if name.startswith(("models/", ".", "/")) and not Path(name, "config.json").exists():          # else the hub would be asked for it
        fail(f"--model {name}: there is no model in that folder; expected a Llama or Qwen chat model there, or a hub name; of a .gguf file make one with: python models/prepare.py --gguf FILE --out {name}")
    try:
        transformers.utils.logging.disable_progress_bar()
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attention, trust_remote_code=trust, device_map=device_map)
    except (OSError, ValueError, ImportError, safetensors.SafetensorError) as e:
        fail(f"--model {name}: expected a hub name or a folder with a Llama or Qwen chat model; transformers says: {str(e).strip().splitlines()[0]}")
    if not tokenizer.chat_template:
        fail(f"--model {name}: its tokenizer has no chat template, so it is a base model; use the -Instruct or -Chat one")
    model.requires_grad_(False).eval()          # frozen: no row is added, no head untied, no weight moved
    if not device_map:
        return model.to(device), tokenizer
    if {"disk", "cpu"} & set(map(str, getattr(model, "hf_device_map", {}).values())) and device.type == "cuda":
        fail(f"--device-map: {name} does not fit on the GPUs, expected all of its layers there; use more GPUs, or a smaller model")
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    add_hook_to_module(model.get_decoder(), AlignDevicesHook(execution_device=model.device, io_same_device=True), append=True)
    model.get_output_embeddings().to(model.device)          # only the layers are spread: last hidden states and the head meet on the first GPU
    return model, tokenizer
# --- end shared ----------------------------------------------------------


# --- shared: hook --------------------------------------------------------
def embed(model, ids, learned):
    """The hook: token ids to input embeddings, with learned vectors in the slots.

    ids (B, T) int64: id >= 0 is a token, looked up in the frozen table; -1 - i is a slot for row i of `learned`.
    learned (n, d) fp32, the master: cast to the model's dtype here, so that a small step of the optimizer is not rounded away (bf16 spacing at 0.5 is 0.004).
    -> (B, T, d) in the model's dtype. The gradient reaches `learned` and nothing else.
    """
    embeds = model.get_input_embeddings()(ids.clamp(min=0))                                         # (B, T, d) frozen
    rows = torch.nn.functional.embedding((-1 - ids).clamp(min=0), learned.to(embeds.dtype))         # (B, T, d) learned
    return torch.where((ids < 0)[..., None], rows, embeds)
# --- end shared ----------------------------------------------------------


# --- shared: token_loss --------------------------------------------------
class TokenLoss(torch.autograd.Function):
    """tau^2 times the cross-entropy of a distribution q with softmax(z / tau), z = h W^T, for each token, in chunks: no (T, V) tensor outlives its chunk.

    The head is frozen, so the gradient with respect to h is all that the backward pass needs: (T, d) numbers, made in the forward pass while the chunk's
    logits are still there. It is tau (softmax(z / tau) - q) W. In place where it can be: memory, not arithmetic, is what this costs.
    """
    @staticmethod
    def forward(ctx, hidden, weight, target, tau, chunk):
        losses, grad = [], torch.empty_like(hidden)
        for i in range(0, len(hidden), chunk):
            z, t = (hidden[i:i + chunk] @ weight.T).float().div_(tau), target[i:i + chunk]          # (c, V)
            norm = z.logsumexp(-1, keepdim=True)                                                    # (c, 1)
            if t.dtype == torch.int64:                                      # a token id: q is one-hot, the negative log-likelihood
                losses.append(tau ** 2 * (norm - z.gather(1, t[:, None]))[:, 0])
                delta = z.sub_(norm).exp_().scatter_add_(1, t[:, None], -torch.ones_like(norm))
                grad[i:i + chunk] = (delta.to(weight.dtype) @ weight).mul_(tau)
            else:                                                           # the head's mean row under q: sum_v q_v z_v is one dot product, and sum_v q_v W_v is t itself
                losses.append(tau ** 2 * (norm[:, 0] - (hidden[i:i + chunk].float() * t.float()).sum(-1) / tau))
                grad[i:i + chunk] = (z.sub_(norm).exp_().to(weight.dtype) @ weight).float().sub_(t).mul_(tau)
        ctx.save_for_backward(grad)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, outer):
        grad, = ctx.saved_tensors
        return grad * outer[:, None].to(grad.dtype), None, None, None, None


def token_loss(hidden, weight, target, tau=1.0, chunk=128):
    """The loss of each token. hidden (T, d); weight (V, d), the head; target (T,) token ids, or (T, d) the head's mean rows under the teacher -> (T,) fp32, in nats."""
    return TokenLoss.apply(hidden, weight, target, tau, chunk)
# --- end shared ----------------------------------------------------------


# --- shared: soft_target -------------------------------------------------
@torch.no_grad()
def soft_target(weight, hidden, tau):
    """All that L_KD needs to know of the teacher's q = softmax(z_T / tau), z_T = h W^T: KL(q || p) is token_loss less the entropy, with no logits of the teacher in it.

    weight (V, d); hidden (T, d), the teacher's -> (the head's mean row under q (T, d), tau^2 times the entropy of q (T,) fp32).
    """
    rows, entropy = [], []
    for h in hidden.split(128):
        logq = (h @ weight.T).float().div_(tau).log_softmax(-1)                                     # (c, V)
        q = logq.exp()
        rows.append(q.to(weight.dtype) @ weight)
        entropy.append(-tau ** 2 * (q * logq).sum(-1))
    return torch.cat(rows), torch.cat(entropy)
# --- end shared ----------------------------------------------------------


# --- shared: fingerprint -------------------------------------------------
def fingerprint(model):
    """sha256 over the names, shapes and bf16 bits of all weights: the same for a model opened in bf16 or in fp32."""
    h = hashlib.sha256()
    for name, w in model.named_parameters():
        h.update(f"{name} {tuple(w.shape)}".encode())
        h.update(w.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
    return h.hexdigest()
# --- end shared ----------------------------------------------------------


# --- shared: load_artifact -----------------------------------------------
def load_artifact(path, kind, model_print, d, maker, strict=True):
    """The artifact at `path`, whole, of this kind ("ae" or "be"), for this model. Exits with one line that names `maker`, the command that makes the
    right one; strict=False returns None for another model's artifact; model_print None takes any model's."""
    try:
        data = Path(path).read_bytes()
        whole = data[-64:] == hashlib.sha256(data[:-64]).hexdigest().encode()
        a = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True) if whole else {}    # a file that was cut or changed is not even opened
        v, m, p = a["vector"], a["model"], a.get("prompt")
        whole = (v.dtype == torch.float32 and v.dim() == 2 and len(v) and v.shape[1] == m["d"] and v.is_contiguous() and v.isfinite().all()
                 and {"name", "fingerprint"} <= set(m) and a["layout"] in ("chat", "block") and (a["kind"] == "ae" or a["kind"] == "be"
                 and a["stage"] in ("recon", "kd") and p["tokens"] and all(isinstance(x["role"] + x["content"], str) for x in p["messages"])))
    except FileNotFoundError:
        fail(f"{path}: not there; make it with: {maker}")
    except Exception:           # a file of other content raises many types, in torch.load and here; each means the same
        whole = False
    if not whole:
        fail(f"{path}: not a whole artifact (truncated, changed, or another kind of file); make it again with: {maker}")
    if a["kind"] != kind:
        fail(f"{path}: expected an artifact of kind '{kind}', found '{a['kind']}'; make one with: {maker}")
    if model_print in (None, a["model"]["fingerprint"]) and d in (None, a["model"]["d"]):
        return a
    if strict:
        fail(f"{path}: its vector belongs to another model ({a['model']['name']}, d = {a['model']['d']}), not to this one (d = {d}); make one with: {maker}")
# --- end shared ----------------------------------------------------------


# --- shared: save_artifact -----------------------------------------------
def write(path, data):
    """Written beside its place and renamed: a run killed here, or a full disk, leaves the old file whole. data: bytes."""
    try:
        with open(f"{path}.tmp", "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        fail(f"{path}: could not be written ({e.strerror}); what was there before is still whole. Make room and run again with --resume")


def save_artifact(path, artifact):
    """The zip file that torch writes ends in a comment: its own sha256."""
    data = io.BytesIO()
    torch.save(artifact, data)
    data = data.getvalue()[:-2] + (64).to_bytes(2, "little")                # the comment's length, which was 0
    write(path, data + hashlib.sha256(data).hexdigest().encode())
# --- end shared ----------------------------------------------------------


# --- shared: run ---------------------------------------------------------
def check_resume(path, saved, config):
    """--resume goes on with the settings that the run began with: exits with one line where one of them has changed."""
    if missing := {"config", "step", "best", "last", "history", "skipped"} - set(saved):
        fail(f"--resume: {path} holds no run to go on with (no {', '.join(sorted(missing))}); run without --resume to start anew")
    for name, value in saved["config"].items():
        if name not in ("resume", "out", "device", "device_map", "dtype", "micro_batch", "compile", "checkpointing") and config.get(name, value) != value:
            fail(f"--resume: {path} began with --{name.replace('_', '-')} {value}, now it is {config[name]}; give the same, or run without --resume to start anew")


def claim(path):
    """The lock of an output -> to be kept for as long as the run goes. A second run on the same output is told and stops; the lock goes with the process."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_dir():
            fail(f"--out {path}: expected a file to write, found a folder; give a name in it")
        lock = filelock.FileLock(f"{path}.lock")
        lock.acquire(timeout=0)
        return lock
    except filelock.Timeout:
        fail(f"--out {path}: another run is writing it; wait for it, or give another --out")
    except OSError as e:
        fail(f"--out {path}: cannot be written ({e.strerror}); give another --out")


def on_stop(action=lambda n: sys.exit(128 + n)):
    """SIGINT and SIGTERM call action(signal number): by default the run ends at once; the loop finishes its step and saves. The exit code is 128 + the number."""
    for n in (signal.SIGINT, signal.SIGTERM):
        signal.signal(n, lambda n, frame: action(n))
# --- end shared ----------------------------------------------------------


# --- shared: ranks -------------------------------------------------------
def ranks():
    """Under torchrun: this process's rank and their number; else 0, 1. Ranks above 0 compute and keep quiet."""
    if "RANK" not in os.environ:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=datetime.timedelta(hours=12))      # rank 0 may be busy as the teacher
    if torch.distributed.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def barrier():
    """Wait for the other ranks, if there are any."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
# --- end shared ----------------------------------------------------------


# --- shared: chat_ids ----------------------------------------------------
def text_ids(tokenizer, text):
    """Token ids of plain text: no BOS, and the name of a special token inside it is text, not the token."""
    return tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def chat_ids(tokenizer, messages, generate=True):
    """Token ids of a dialogue in the model's own chat template; generate=True ends where the assistant begins to speak.

    messages: [{"role": ..., "content": text, or a list of ids such as the slot [-1]}]. The template is rendered with a mark in place of each content and cut
    at the marks, so its words tokenise as they would alone, a BOS stands where the template puts one and nowhere else, and no content leaves its place.
    """
    marks = [chr(0xE000 + i) for i in range(len(messages))]                  # private-use characters: no template has them
    turns = [{"role": m["role"], "content": mark} for m, mark in zip(messages, marks)]
    try:                                                                     # Llama 3 templates print today's date unless they are given one
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate, date_string="26 Jul 2024")
    except jinja2.TemplateError as e:
        fail(f"this model's chat template refuses the roles {[m['role'] for m in messages]}: {e}; use a model with a system role")
    ids = []
    for m, mark in zip(messages, marks):
        if text.count(mark) != 1:
            fail(f"this model's chat template does not put the {m['role']} message in one place; use a Llama or Qwen chat model")
        before, text = text.split(mark)
        ids += tokenizer(before, add_special_tokens=False)["input_ids"]
        ids += text_ids(tokenizer, m["content"]) if isinstance(m["content"], str) else m["content"]
    return ids + tokenizer(text, add_special_tokens=False)["input_ids"]
# --- end shared ----------------------------------------------------------


# --- shared: read_prompt -------------------------------------------------
def read_prompt(path):
    """The prompt file -> the messages it stands for. A text file is one system message; a .json file holds a "messages" list, a dialogue. Exits with one line on bad input."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n").strip()
    except OSError as e:
        fail(f"--prompt {path}: expected a text file, but it cannot be read: {e.strerror}")
    except UnicodeDecodeError:
        fail(f"--prompt {path}: expected UTF-8 text, found bytes that are not; save the prompt as plain UTF-8 text")
    if "\0" in text:
        fail(f"--prompt {path}: expected text, found NUL bytes, so this is a binary file")
    messages = [{"role": "system", "content": text}]
    if text and str(path).endswith(".json"):
        try:
            messages = [{"role": str(m["role"]), "content": m["content"].strip()} for m in json.loads(text)["messages"]]
            json.dumps(messages, ensure_ascii=False).encode()               # a lone surrogate is no text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            fail(f'--prompt {path}: expected {{"messages": [{{"role": ..., "content": ...}}, ...]}}')
    if not any(m["content"] for m in messages):
        fail(f"--prompt {path}: it is empty; write the system prompt into it")
    return messages
# --- end shared ----------------------------------------------------------


# --- shared: prompt_ids --------------------------------------------------
def prompt_ids(tokenizer, messages, layout, limit):
    """The tokens (s_1, ..., s_m) that the slot stands for: the text of one system message in the chat layout, else the messages with the template's words."""
    text_only = layout == "chat" and [m["role"] for m in messages] == ["system"]
    ids = text_ids(tokenizer, messages[0]["content"]) if text_only else chat_ids(tokenizer, messages, generate=False)
    if not ids:
        fail("--prompt: this model has no token for any of its characters; give a prompt of plain text")
    words = chat_ids(tokenizer, [{"role": "system", "content": []}, {"role": "user", "content": []}])
    if not text_only and ids[0] == tokenizer.bos_token_id and words.count(ids[0]) == 1:
        ids = ids[1:]                           # a BOS stays before the slot; ChatML opens every turn with its "BOS": that one is a header
    if len(ids) > limit - 64:
        fail(f"--prompt: expected at most {limit - 64} tokens (the model's context of {limit} less 64 for a question), found {len(ids)}; shorten the prompt")
    return ids
# --- end shared ----------------------------------------------------------


# --- shared: layout ------------------------------------------------------
def layout_ids(tokenizer, layout, slot, turns):
    """What is fed to the model in place of the prompt -> token ids, ready for the assistant to speak.

    slot: the ids [-1, -2, ...] of the learned vectors, or [] for none. turns: messages from the first user message on.
    chat:   the system MESSAGE is the slot, the template's words stay around it       <sys> [BE] </sys> <user> q </user> <assistant>
    block:  the system BLOCK, headers and all, is the slot (the paper's [BE], q)      [BE] <user> q </user> <assistant>
    """
    ids = chat_ids(tokenizer, [{"role": "system", "content": slot}] + turns)
    if layout == "chat":
        return ids
    block = chat_ids(tokenizer, [{"role": "system", "content": slot}], generate=False)
    if not block or ids[:len(block)] != block:
        fail("--layout block: this model's chat template has no system block of its own; use --layout chat")
    bos = block[:1] if block[0] == tokenizer.bos_token_id and ids.count(block[0]) == 1 else []       # ChatML opens every turn with its "BOS": that one is a header
    return bos + slot + ids[len(block):]
# --- end shared ----------------------------------------------------------


# --- shared: find_ae -----------------------------------------------------
def find_ae(path, model_print, d, model_name):
    """The [AE] artifact of this model -> (1, d): the one named, else out/ae.pt, else one of artifacts/ae-*.pt, whichever was made for these weights; "none" -> (0, d)."""
    maker = f"python stage0_ae.py --model {model_name}"
    if path == "none":
        return torch.zeros(0, d)
    for candidate in [path] if path else ["out/ae.pt", *sorted(glob.glob("artifacts/ae-*.pt"))]:
        if (path or Path(candidate).exists()) and (a := load_artifact(candidate, "ae", model_print, d, maker, strict=bool(path))):
            print(f"[AE]: {candidate}")
            return a["vector"]
    fail(f"no [AE] of this model in out/ae.pt or artifacts/; make one with: {maker}")
# --- end shared ----------------------------------------------------------


# --- shared: plot --------------------------------------------------------
def plot(path, history, title):
    """The loss curves as a PNG beside the artifact. history: list of {"step": ..., name: value}; values of one name make one line."""
    from matplotlib.figure import Figure
    figure, image = Figure(figsize=(7, 4)), io.BytesIO()
    axes = figure.subplots()
    for name in dict.fromkeys(k for row in history for k in row if k != "step"):
        axes.plot(*zip(*[(row["step"], row[name]) for row in history if name in row]), label=name)
    axes.set(xlabel="step", ylabel="nats a token", title=title)
    axes.legend()
    figure.savefig(image, dpi=100, bbox_inches="tight")
    write(path, image.getvalue())
# --- end shared ----------------------------------------------------------


def read_queries(path):
    """A .txt (one a line) or .jsonl file ("question", "query" or "instruction") -> {query: the row's "answer" or ""}, without empty and repeated queries."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        fail(f"{path}: expected a .txt or .jsonl file of queries in UTF-8, but it cannot be read: {getattr(e, 'strerror', None) or 'not UTF-8'}")
    queries = {}
    for n, line in enumerate(map(str.strip, lines), 1):
        query, gold = line, ""
        if str(path).endswith(".jsonl") and line:
            try:
                row = json.loads(line)
                query, gold = next(row[key] for key in ("question", "query", "instruction") if key in row).strip(), str(row.get("answer", "")).strip()
                (query + gold).encode()                                     # a lone surrogate is no text
            except (ValueError, StopIteration, TypeError, AttributeError, RecursionError):
                fail(f'{path}, line {n}: expected a json object with a "question", "query" or "instruction" that is a text, found {line[:60]!r}')
        if query:
            queries.setdefault(query, gold)
    return queries


# --- shared: generate ----------------------------------------------------
@torch.no_grad()
def generate(model, rows, stop, limit, temperature=0.0, seed=0, skip=()):
    """Continue rows of token ids, which may share a long beginning: the prompt. Yields (row number, answer ids with the stop token, hidden (T, d)), batch by batch.

    The shared prefix runs once, for all batches; its keys and values are repeated over a batch. The rest of each row is padded on the left. hidden[t] is the last
    hidden state that answer[t] was chosen from. temperature 0 is greedy; a batch whose row numbers are all in skip is left out.
    """
    body, weight = model.get_decoder(), model.get_output_embeddings().weight
    n = min(len(os.path.commonprefix(rows)), min(map(len, rows)) - 1)                               # each row keeps a token of its own
    prefix = body(input_ids=torch.tensor([rows[0][:n]], device=model.device), use_cache=True).past_key_values if n else None
    size = max(1, min(32, 16000 // (n + limit)))                                                    # the cache grows with batch x prefix: 16,000 tokens are 370 MB on the default model
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))                               # like lengths together: little padding
    for part in [order[i:i + size] for i in range(0, len(order), size)]:
        if all(i in skip for i in part):
            continue
        rngs = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in part]                  # a row's sample does not depend on its neighbours
        width = max(len(rows[i]) for i in part) - n
        pads = [width - len(rows[i]) + n for i in part]
        ids = torch.tensor([[0] * p + rows[i][n:] for i, p in zip(part, pads)], device=model.device)                        # (B, w)
        mask = torch.tensor([[1] * n + [0] * p + [1] * (width - p) for p in pads], device=model.device)                     # (B, n + w)
        cache = copy.deepcopy(prefix)
        if n:
            cache.batch_repeat_interleave(len(part))
        said, hidden = [], []
        while len(said) < limit:
            position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]                        # pads do not count
            out = body(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
            cache, h = out.past_key_values, out.last_hidden_state[:, -1]                            # (B, d)
            logits = (h @ weight.T).float()                                                         # (B, V)
            ids = logits.argmax(-1, keepdim=True)                                                   # (B, 1)
            if temperature > 0:
                chance = torch.tensor([[torch.rand((), generator=r)] for r in rngs], device=logits.device)
                ids = (torch.softmax(logits / temperature, -1).cumsum(-1) < chance).sum(-1, keepdim=True).clamp(max=logits.shape[1] - 1)
            said.append(ids)
            hidden.append(h)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            ended = torch.isin(torch.cat(said, 1), stop.to(ids.device))                             # (B, t)
            if ended.any(1).all():
                break
        said, hidden = torch.cat(said, 1), torch.stack(hidden, 1)                                   # (B, t), (B, t, d)
        for row, i in enumerate(part):
            length = int(ended[row].float().argmax()) + 1 if ended[row].any() else said.shape[1]
            yield i, said[row, :length].tolist(), hidden[row, :length]
# --- end shared ----------------------------------------------------------


def teacher(model, rows, stop, limit, temperature, seed, model_print, folder, rank=0):
    """The frozen model's answers to rows (prompt and query, as ids) -> (answers: lists of ids, hidden: (T, d) bf16 tensors, memory-mapped).

    Two files grow answer by answer: .jsonl has the ids, .bin the hidden states. So a killed run goes on, and the states of many queries need no memory.
    Their name is a hash of all that the answers depend on: stale ones are never read. Rank 0 writes them; another run that wants the same ones waits.
    """
    key = hashlib.sha256(json.dumps([model_print, rows, stop.tolist(), limit, temperature, seed, str(model.dtype)]).encode()).hexdigest()[:16]
    path, states, d = Path(folder, f"teacher-{key}.jsonl"), Path(folder, f"teacher-{key}.bin"), model.get_input_embeddings().weight.shape[1]

    def read():
        """What is whole -> ({row: (ids, hidden)}, its bytes in the one file and in the other): a killed run may have left half an answer behind it."""
        try:
            text = path.read_bytes()
            kept = [json.loads(line) for line in text[:text.rfind(b"\n") + 1].splitlines()]
            lengths = [len(x["ids"]) for x in kept]
            if sum(lengths) * d * 2 > states.stat().st_size or not {x["row"] for x in kept} <= set(range(len(rows))):
                raise ValueError
        except FileNotFoundError:
            kept = []
        except (ValueError, KeyError, TypeError):
            print(f"teacher: {path} is damaged; the answers are made again")
            path.unlink(), states.unlink(missing_ok=True)                                            # not emptied: another run may have it mapped
            kept = []
        if not kept:
            return {}, 0, 0
        hidden = torch.from_file(str(states), shared=True, size=sum(lengths) * d, dtype=torch.bfloat16).view(-1, d).split(lengths)       # shared: a private mapping counts as memory
        return {x["row"]: (x["ids"], h) for x, h in zip(kept, hidden)}, text.rfind(b"\n") + 1, sum(lengths) * d * 2

    if rank == 0:
        lock = filelock.FileLock(f"{states}.lock")
        try:
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                print("teacher: another run is making these answers; waiting for it")
                lock.acquire()
            done, *sizes = read()
            with open(path, "ab") as f, open(states, "ab") as g, tqdm(total=len(rows), initial=len(done), desc="teacher", dynamic_ncols=True, disable=len(done) == len(rows)) as bar:
                f.truncate(sizes[0])
                g.truncate(sizes[1])
                for i, ids, h in generate(model, rows, stop, limit, temperature, seed, skip=done):
                    if i not in done:
                        g.write(h.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
                        g.flush()                                                                    # the states first: a line never names states that are not there
                        f.write(json.dumps({"row": i, "ids": ids}).encode() + b"\n")
                        f.flush()
                        bar.update()
            lock.release()
        except OSError as e:
            fail(f"{path}: could not be written ({e.strerror}); make room and run again: it goes on with the answers that are there")
        print(f"teacher: {len(done)} answers found, {len(rows) - len(done)} made, {states} ({states.stat().st_size / 1e6:.1f} MB)")
    barrier()
    done, *_ = read()
    return [done[i][0] for i in range(len(rows))], [done[i][1] for i in range(len(rows))]


def self_queries(model, tokenizer, messages, stop, count, seed):
    """Ask the frozen model, holding the prompt, for questions that its users would ask -> at most `count` different ones."""
    ask = [{"role": "user", "content": "List ten different questions that users would ask this assistant, one a line."}]
    about = "Below is the description of a chat assistant.\n\n" + "\n\n".join(m["content"] for m in messages)
    row, found = chat_ids(tokenizer, [{"role": "system", "content": about}] + ask), {}
    with tqdm(total=count, desc="asking for queries", dynamic_ncols=True) as bar:
        for attempt in range(20):
            for _, said, _ in generate(model, [row] * 16, stop, 160, temperature=0.8, seed=seed + 1000 * attempt):
                for line in tokenizer.decode(said, skip_special_tokens=True).splitlines():
                    q = re.sub(r"^\s*(?:\d+[.)]|[-*])\s*", "", line).strip(' "')
                    if q.endswith("?") and 4 <= len(q.split()) <= 40:
                        found.setdefault(q.casefold(), q)
            bar.update(min(len(found), count) - bar.n)
            if len(found) >= count:
                break
    return list(found.values())[:count]


# --- shared: answer_hidden -----------------------------------------------
def answer_hidden(model, rows, answers, learned, cache=None):
    """The last hidden states that predict the answers' tokens. rows: lists of ids with slots; learned (n, d); cache: of a beginning that rows go on from -> (sum of T, d).

    Padded on the right: attention looks back only, so no token of a row sees a pad; no mask is needed, and positions are right as they come.
    """
    full = [row + answer[:-1] for row, answer in zip(rows, answers)]
    width = max(map(len, full))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in full], device=model.device)             # (B, w)
    hidden = model.get_decoder()(inputs_embeds=embed(model, ids, learned), past_key_values=cache, use_cache=cache is not None).last_hidden_state          # (B, w, d)
    return torch.cat([h[len(r) - 1:len(r) - 1 + len(a)] for h, r, a in zip(hidden, rows, answers)])
# --- end shared ----------------------------------------------------------


# --- shared: evaluate ----------------------------------------------------
@torch.no_grad()
def evaluate(model, rows, answers, hidden, learned):
    """Against the teacher, at tau 1 -> (Q, 3): for each query the sum over its answer tokens of KL in nats, the tokens with the same top-1, the tokens."""
    weight, scores, longest = model.get_output_embeddings().weight, [], max(map(len, rows))
    n = min(len(os.path.commonprefix(rows)), min(map(len, rows)) - 1)                               # what all rows begin with, the full prompt for one, runs once
    begun = torch.tensor([rows[0][:n]], device=model.device)                                        # (1, n)
    prefix = model.get_decoder()(inputs_embeds=embed(model, begun, learned), use_cache=True).past_key_values if n else None
    batch = max(1, min(16, 4000 // (longest - n), 16000 // longest))
    for i in range(0, len(rows), batch):
        part, cache = answers[i:i + batch], copy.deepcopy(prefix)
        if n:
            cache.batch_repeat_interleave(len(part))
        h = answer_hidden(model, [row[n:] for row in rows[i:i + batch]], part, learned, cache)      # (sum T, d)
        for s, t in zip(h.split([len(a) for a in part]), hidden[i:i + batch]):
            logp, logq = (torch.log_softmax((x.to(weight) @ weight.T).float(), -1) for x in (s, t)) # (T, V)
            scores.append([(logq.exp() * (logq - logp)).sum().item(), (logp.argmax(-1) == logq.argmax(-1)).sum().item(), len(s)])
    return torch.tensor(scores)
# --- end shared ----------------------------------------------------------


def measure(model, t, part, rows, learned):
    """`evaluate` over the examples `part`, with rows[i] fed for example i -> (len(part), 3)."""
    model.eval()                                            # --checkpointing: a layer in training keeps no cache, and evaluate would lose what all rows begin with
    return evaluate(model, [rows[i] for i in part], [t.answers[i] for i in part], [t.teacher_hidden[i] for i in part], learned.to(model.device))


def controls(t, model, tokenizer, best, other):
    """What can stand in the prompt's place, for each turn of a chat -> [name -> KL, top-1, gap closed and its bootstrap interval over queries, tokens fed, n, and the KL of each
    query summed over its answer, for paired comparisons of two runs]. best, other (slots, d): the trained vectors of all prompts, and random ones."""
    plural = "s" * (t.k > 1)
    block = chat_ids(tokenizer, [{"role": "system", "content": []}], generate=False)
    own = block and t.none[0][:len(block)] == block                                                  # Llama 2 writes the system message into the first user turn
    fed = {
        "full prompt": t.full,
        f"[BE], {t.k} vector{plural}": t.rows,
        "no prompt (empty slot)": t.none,
        "no system block at all": [layout_ids(tokenizer, "block", [], c) for c in t.chats] if own else t.none,
        "default system prompt": [chat_ids(tokenizer, c) for c in t.chats],
        f"random vector{plural}": t.rows,
        f"prompt cut to {t.k} token{plural}": [layout_ids(tokenizer, t.layout, t.s[:t.k], c) for c in t.chats],
    }
    tables = []
    for part in t.test:
        scores = {name: measure(model, t, part, rows, other if name.startswith("random") else best) for name, rows in fed.items()}
        none = scores["no prompt (empty slot)"]
        draws = torch.randint(len(none), (1000, len(none)), generator=torch.Generator().manual_seed(0))
        tables.append({name: {
            "kl": (x[:, 0].sum() / x[:, 2].sum()).item(), "top1": (x[:, 1].sum() / x[:, 2].sum()).item(), "gap_closed": 1 - (x[:, 0].sum() / none[:, 0].sum()).item(),
            "gap_closed_95": (1 - x[draws, 0].sum(1) / none[draws, 0].sum(1)).quantile(torch.tensor([0.025, 0.975])).tolist(),
            "tokens": sum(len(fed[name][i]) for i in part) / len(x), "n": len(x), "answer_tokens": int(x[:, 2].sum()), "kl_by_query": x[:, 0].tolist()} for name, x in scores.items()})
    return tables


def report(args, t, tables, skipped):
    """Prints the tables of one prompt; of a run that trained, its curve and what comes next, too."""
    for turn, table in enumerate(tables, 1):
        n, tokens = (table["full prompt"][key] for key in ("n", "answer_tokens"))
        print(f"\n{t.path}" * (len(args.prompt) > 1) + f"\n{n} {'test' if t.test_queries else 'held-out'} queries, {tokens} answer tokens" + f", turn {turn} of the chat" * (args.turns > 1)
              + ("; 95% interval over queries\n" if n > 1 else "; one query gives no interval\n"))
        print(f"{'':24s}{'KL':>8s}{'top-1':>8s}{'gap closed':>12s}{'95%':>18s}{'tokens fed':>12s}")
        for name, row in table.items():
            print("{:24s}{kl:8.4f}{top1:8.1%}{gap_closed:12.3f}{:>18s}{tokens:12.0f}".format(name, "{:.3f} to {:.3f}".format(*row["gap_closed_95"]) if n > 1 else "-", **row))
    if args.steps > 0:
        plot(Path(t.out).with_suffix(".kd.png"), t.history, f"stage 2: {Path(t.path).name}")
        print(f"\nwrote {t.out}: {t.start.numel()} trained numbers, the best on held-out queries, of step {t.best['step']}; {skipped} steps skipped")
        print("next: " + shlex.join(["python", "infer.py", "--be", t.out, "--query", (t.test_queries or t.queries)[0], "--compare"]))


def read_inputs(args, n, rank):
    """The files of prompt number n of the run, before the model is loaded: a mistake in them costs no wait -> a namespace that grows to all that belongs to this [BE]."""
    path, several = args.prompt[n], len(args.prompt) > 1
    t = SimpleNamespace(path=path, messages=read_prompt(path), ae=None, out=args.out[n] if args.out else f"out/{Path(path).stem}.be.pt" if several else "out/be.pt")
    t.lock = claim(t.out) if rank == 0 else None                                                     # held until the end of the run
    t.be_path, beside = args.be[n] if args.be else t.out, str(Path(path).with_suffix(""))
    t.source = args.queries or (f"{beside}.queries.txt" if Path(f"{beside}.queries.txt").exists() else "self")
    t.gold = read_queries(t.source) if t.source != "self" else {}
    test = args.test_queries or (f"{beside}.test.txt" if Path(f"{beside}.test.txt").exists() else "")
    t.test_queries = list(read_queries(test)) if test else []
    if args.answers == "gold" and not (t.gold and all(t.gold.values())):
        fail(f"--answers gold: expected an \"answer\" in each row of --queries, found one without in {t.source}; give a .jsonl file that has them")
    if t.source != "self":
        split_queries(args, t)
    return t


def split_queries(args, t):
    """The queries in their random order; the first t.n_held of them are held out. A question that is among the test queries, too, is no test."""
    t.queries, t.test_queries = list(t.gold), [q for q in t.test_queries if q not in t.gold]
    random.Random(args.seed).shuffle(t.queries)
    t.n_held = min(32, max(1, round(len(t.queries) * args.held_out)))
    if len(t.queries) - t.n_held < args.batch:
        fail(f"queries: expected at least --batch = {args.batch} to train on after {t.n_held} held out, found {len(t.queries)} in all ({t.source}); give more, or a smaller --batch")


def read_start(args, t, model_print, d):
    """Stage 1's vector and its layout, from --be."""
    maker = f"python stage1_recon.py --prompt {t.path} --model {args.model} --out {t.be_path}"
    saved = load_artifact(t.be_path, "be", model_print, d, maker)
    if saved["prompt"]["messages"] != t.messages:
        fail(f"{t.be_path}: its vector was made for another prompt than {t.path}; make one with: {maker}")
    again = saved["stage"] == "kd" and Path(t.be_path) == Path(t.out) and args.steps > 0             # a second run over its own output starts where the first one did
    t.layout, t.start, t.ae = saved["layout"], saved["start" if again else "vector"], saved.get("ae")
    if args.k not in (0, len(t.start)) or args.layout not in ("", t.layout):
        fail(f"--k, --layout: {t.be_path} has k = {len(t.start)}, layout {t.layout}; another k or layout needs a new stage 1, or --init random")


def read_run(args, tasks, model_print, d):
    """--resume -> the state of the whole run, out of the first prompt's artifact; each prompt gets its layout, start, history and best back. Exits with one line if it is not whole."""
    path = tasks[0].out
    saved = load_artifact(path, "be", model_print, d, f"python stage2_kd.py --prompt {' '.join(args.prompt)}, without --resume")
    try:
        run = saved["run"]
        for n, t in enumerate(tasks):
            t.layout, t.start, t.history, t.best = (run[key][n] for key in ("layouts", "starts", "histories", "bests"))
        whole = run["step"] >= 0 and {"inputs", "skipped", "tables"} <= set(run) and run["last"].shape == (sum(len(t.start) for t in tasks), d) and run["last"].isfinite().all() and all(
            isinstance(t.history, list) and t.best["vector"].shape == t.start.shape == (len(t.start), d) for t in tasks)
        if run["optimizer"] is not None:                                                             # a finished run has none
            torch.optim.AdamW([torch.nn.Parameter(run["last"])]).load_state_dict(run["optimizer"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        whole = False
    if not whole:
        fail(f"--resume: {path} holds no run of stage 2 to go on with; run without --resume")
    check_resume(path, saved, vars(args))
    return run


def make_examples(args, t, model, tokenizer, model_print, stop, rank):
    """What the teacher reads and answers and what the student reads: an example for each query and turn of the chat, all queries of turn 1 first."""
    if t.source == "self":                                                                           # asked once, then read from a file
        t.source = Path(t.out).with_name(f"queries-{hashlib.sha256(json.dumps([model_print, t.messages, args.self_queries, args.seed]).encode()).hexdigest()[:16]}.txt")
        if not t.source.exists() and rank == 0:
            asked = self_queries(model, tokenizer, t.messages, stop, args.self_queries, args.seed)
            write(t.source, "".join(q + "\n" for q in asked).encode())
            print("queries: the model itself asked " + "\n   ".join(["", *asked[:5]]))
        barrier()
        t.gold = read_queries(t.source)
        split_queries(args, t)
    n, room = len(t.queries) + len(t.test_queries), model.config.max_position_embeddings - args.answer_tokens
    chats, t.chats, t.full, t.answers, t.teacher_hidden = [[{"role": "user", "content": q}] for q in t.queries + t.test_queries], [], [], [], []
    for turn in range(args.turns):
        if turn:                                                                                     # the teacher's own answer of the turn before, then a follow-up question
            said = [{"role": "assistant", "content": [x for x in a if x not in stop]} for a in t.answers[-n:]]
            chats = [c + [a, {"role": "user", "content": FOLLOW_UPS[(i + turn) % len(FOLLOW_UPS)]}] for i, (c, a) in enumerate(zip(chats, said))]
        full = [chat_ids(tokenizer, t.messages + c) for c in chats]
        if (longest := max(map(len, full))) > room:
            fail(f"{t.path}: expected prompt and query to take at most {room} tokens (the model's context less --answer-tokens), found {longest}; shorten them, or --answer-tokens")
        answers, hidden = teacher(model, full, stop, args.answer_tokens, args.temperature, args.seed, model_print, Path(t.out).parent, rank)
        t.chats, t.full, t.answers, t.teacher_hidden = t.chats + chats, t.full + full, t.answers + answers, t.teacher_hidden + hidden
    t.rows = [layout_ids(tokenizer, t.layout, t.slot, c) for c in t.chats]
    t.none = [layout_ids(tokenizer, t.layout, [], c) for c in t.chats]                               # no prompt: the same words around an empty slot
    t.held, t.train = ([turn * n + i for turn in range(args.turns) for i in part] for part in (range(t.n_held), range(t.n_held, len(t.queries))))
    t.test = [[turn * n + i for i in (range(len(t.queries), n) if t.test_queries else range(t.n_held))] for turn in range(args.turns)]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in stop else stop[0].item()               # of a turn: Llama 3 names several
    for i in t.train if args.answers == "gold" else []:                                              # held-out and test queries keep the teacher's own answers: they are the measure
        t.answers[i] = (text_ids(tokenizer, t.gold[t.queries[i]]) + [end])[:args.answer_tokens]          # cut as the teacher's are: only a whole one ends with the stop token
        if not args.hard:                                                                                # which needs no states
            t.teacher_hidden[i] = answer_hidden(model, [t.full[i]], [t.answers[i]], t.start.to(model.device)).to("cpu", torch.bfloat16)


def soft(t, i, weight, tau):
    """The target of L_KD for example i, made at its first visit and kept on disk: from then on a step has two products with the head instead of three."""
    try:
        t.file = t.file or tempfile.TemporaryFile(dir=Path(t.out).parent)                            # without a name: it goes with the run, however that ends
        if i not in t.soft:
            rows, entropy = soft_target(weight, t.teacher_hidden[i].to(weight), tau)
            t.soft[i] = t.file.seek(0, 2), entropy.cpu()
            t.file.write(rows.cpu().view(torch.uint8).numpy().tobytes())
        at, entropy = t.soft[i]
        t.file.seek(at)
        return torch.frombuffer(bytearray(t.file.read(len(entropy) * weight.shape[1] * weight.itemsize)), dtype=weight.dtype).view(-1, weight.shape[1]), entropy
    except OSError as e:
        fail(f"{t.out}: the targets beside it could not be written ({e.strerror}); make room and run again, with --resume if the run has saved")


def main():
    args = settings()
    on_stop()
    rank, world = ranks()
    tasks = [read_inputs(args, n, rank) for n in range(len(args.prompt))]
    if args.device_map and world > 1:
        fail("--device-map: spreads one process over all GPUs; run it without torchrun")
    device, dtype, attention = pick_device(args.device, args.dtype)
    if device.type == "mps" and world > 1:
        fail("--device mps: one GPU is one process; run it without torchrun, or with --device cpu")
    model, tokenizer = load_frozen(args.model, device, dtype, attention, args.trust_remote_code, args.device_map)
    device = model.device                                                                           # with --device-map the first layer may lie on another GPU than the first
    body, weight = model.get_decoder(), model.get_output_embeddings().weight                        # weight (V, d)
    before, d = fingerprint(model), weight.shape[1]
    ends = model.generation_config.eos_token_id
    stop = torch.tensor(tokenizer.eos_token_id if ends is None else ends).view(-1)
    table = model.get_input_embeddings().weight.detach().float().cpu()                              # (V, d)
    args.lr = float(f"{0.9 * table.std():.2g}") if args.lr is None else args.lr                     # tables differ in scale, and [BE] lives among their rows (results/LOG.md)
    mean, std = table.mean(0), table.std(0)                                                         # (d,)
    del table

    def noise(k, seed):
        return mean + std * torch.randn(k, d, generator=torch.Generator().manual_seed(seed))      # (k, d), at the table's scale

    # the start: stage 1's vector, or noise. With --resume the first prompt's artifact holds the state of the whole run
    run, slots = (read_run(args, tasks, before, d) if args.resume else None), 0
    for t in tasks:
        if args.init == "be" and not run:
            read_start(args, t, before, d)
        elif not run:
            t.layout, t.start = args.layout or "chat", noise(args.k or 1, args.seed)
        t.k = len(t.start)
        t.own, t.slot = slice(slots, slots + t.k), [-1 - i for i in range(slots, slots + t.k)]       # this prompt's rows of the one trained tensor, and the ids that stand for them
        slots += t.k
        t.s = prompt_ids(tokenizer, t.messages, t.layout, model.config.max_position_embeddings)
    if device.type == "cpu" and max(len(t.s) for t in tasks) > 1024:
        model.set_attn_implementation("sdpa")               # eager makes (heads, T, T) a layer: 20 GB for the backward pass of L_recon at 3,000 tokens, and slow as the teacher

    # the data
    ae = find_ae("none" if args.lam == 1 or args.steps == 0 else args.ae, before, d, args.model).to(device)            # (1, d) fp32, not trained; (0, d) without
    if args.lam < 1 and args.steps > 0 and any(t.ae is not None and not torch.equal(t.ae, ae.cpu()) for t in tasks):
        fail("--ae: the vector of --be was made with another [AE]; name the same one for both stages")
    for t in tasks:
        make_examples(args, t, model, tokenizer, before, stop, rank)
        print(f"prompt: {t.path}, {len(t.s)} tokens -> {t.k} vector{'s' * (t.k > 1)}; layout {t.layout}; "
              f"queries: {len(t.queries) - t.n_held} to train on, {t.n_held} held out, {len(t.test_queries)} for test")
        words = t.rows[0][:t.rows[0].index(t.slot[0])]                                               # L_recon as in stage 1: ... [BE] [AE] s_1 ... s_m
        t.recon_ids = torch.tensor([words + t.slot + [-1 - slots] * len(ae) + t.s[:-1]], device=device)      # (1, s + k + m)

    # the one trained tensor: the vectors of all prompts. AdamW works number by number, so each of them learns as it would alone
    be = torch.nn.Parameter(torch.cat([t.start for t in tasks]).to(device))                         # (slots, d) fp32
    optimizer = torch.optim.AdamW([be], betas=(0.9, 0.95), weight_decay=0)
    first, skipped, tables = (run["step"], run["skipped"], run["tables"]) if run else (0, 0, None)

    def held_out_kl(t, rows):
        """In nats a token: what the best vector is chosen by."""
        kl, _, tokens = measure(model, t, t.held, rows, be.detach()).sum(0).tolist()
        return kl / tokens

    for t in tasks:
        t.soft, t.file, t.none_kl = {}, None, held_out_kl(t, t.none)
        if not run:
            t.history, t.best = [], {"kl": held_out_kl(t, t.rows), "step": 0, "vector": t.start}
    inputs = hashlib.sha256(json.dumps([[t.messages, t.rows, t.answers] for t in tasks] + ae.tolist()).encode()).hexdigest()       # what a resumed run must find again
    if run:
        if run["inputs"] != inputs:
            fail(f"--resume: the prompt, the queries, the [AE], the template or the --dtype of the teacher have changed since {tasks[0].out} began; put them back, or run without --resume to start anew")
        be.data.copy_(run["last"])
        if run["optimizer"]:                                                                         # a finished run has none
            optimizer.load_state_dict(run["optimizer"])

    def save(step, tables=None):
        """An artifact for each prompt; the first one also holds the state of the run, for --resume."""
        last = be.detach().cpu()
        state = {"inputs": inputs, "step": step, "skipped": skipped, "last": last, "optimizer": None if tables else optimizer.state_dict(), "tables": tables, "layouts": [t.layout for t in tasks],
                 "starts": [t.start for t in tasks], "bests": [t.best for t in tasks], "histories": [t.history for t in tasks]}
        for n, t in enumerate(tasks):
            metrics = {"held_out_kl": t.best["kl"], "held_out_gap_closed": 1 - t.best["kl"] / t.none_kl, "n": len(t.held)}
            save_artifact(t.out, {
                "kind": "be", "stage": "kd", "vector": t.best["vector"], "layout": t.layout, "step": step, "skipped": skipped, "config": vars(args),
                "prompt": {"sha256": hashlib.sha256(json.dumps(t.messages).encode()).hexdigest(), "messages": t.messages, "tokens": len(t.s), "path": t.path},
                "model": {"name": args.model, "revision": getattr(model.config, "_commit_hash", None), "fingerprint": before, "d": d},
                "metrics": metrics | ({"controls": tables[n][0], "turns": tables[n]} if tables else {}), "history": t.history, "best": t.best, "last": last[t.own].clone(), "start": t.start,
                "versions": {"nanobe": VERSION, "torch": str(torch.__version__), "transformers": transformers.__version__}} | ({"ae": ae.cpu()} if args.lam < 1 else {}) | ({"run": state} if n == 0 else {}))

    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.compile:
        body.compile(dynamic=True)

    # the loop. Student: [BE] + query + answer -> its hidden states; teacher: what was kept of prompt + query + answer; the loss: their KL under the same head
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and dtype == torch.bfloat16)
    main_loss = "L_CE" if args.hard else "L_KD"
    asked, bad, halt, step = [], 0, False, first - 1
    on_stop(asked.append)
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="[BE] distil", dynamic_ncols=True, disable=rank > 0)
    for step in bar:
        model.train(args.checkpointing)                     # transformers checkpoints a model in training only; these have no dropout
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        batch = []
        for t in tasks:
            per_epoch = len(t.train) // args.batch                                                   # the order depends on seed and step alone: a resumed run sees the same
            order = random.Random(f"{args.seed} {step // per_epoch}").sample(t.train, len(t.train))
            part = order[step % per_epoch * args.batch:][:args.batch]
            t.kd, t.recon, t.tokens = 0.0, 0.0, sum(len(t.answers[i]) for i in part)
            batch += [(t, i) for i in part]
        batch.sort(key=lambda x: len(x[0].rows[x[1]]) + len(x[0].answers[x[1]]))                     # like lengths together, then every world-th to each rank
        be.grad = torch.zeros_like(be)
        for j in range(rank, len(batch), world * args.micro_batch):
            micro = batch[j:j + world * args.micro_batch:world]
            answers = [t.answers[i] for t, i in micro]
            with autocast:                                                                           # all of stage 2: [BE], query and answer in; out, at each answer token, what prompt, query and answer give
                hidden = answer_hidden(model, [t.rows[i] for t, i in micro], answers, be)            # (sum T, d), the student's
                if args.hard:
                    losses = token_loss(hidden, weight, torch.tensor(sum(answers, []), device=device))
                else:                                                                                # tau^2 KL(teacher || student): cross-entropy less the teacher's entropy
                    rows, entropies = zip(*[soft(t, i, weight, args.tau) for t, i in micro])
                    losses = token_loss(hidden, weight, torch.cat(rows).to(device), args.tau) - torch.cat(entropies).to(device)
            shares = [loss.sum() / t.tokens for (t, _), loss in zip(micro, losses.split([len(a) for a in answers]))]     # each prompt's mean over its own tokens of the step
            (args.lam * sum(shares)).backward()
            for (t, _), share in zip(micro, shares):
                t.kd += share.item()
        with_recon = args.lam < 1 and step % args.recon_every == 0
        for t in tasks[rank::world] if with_recon else []:
            with autocast:
                hidden = body(inputs_embeds=embed(model, t.recon_ids, torch.cat([be, ae])), use_cache=False).last_hidden_state[0, -len(t.s):]
                recon = token_loss(hidden, weight, torch.tensor(t.s, device=device)).mean()
            ((1 - args.lam) * args.recon_every * recon).backward()
            t.recon = recon.item()
        sums = torch.tensor([*(t.kd for t in tasks), *(t.recon for t in tasks), bool(asked)], device=device)
        if world > 1:
            torch.distributed.all_reduce(be.grad)
            torch.distributed.all_reduce(sums)
        if finite := bool(sums.isfinite().all() and be.grad.isfinite().all()):
            optimizer.step()
        else:
            tqdm.write(f"step {step}: the loss or its gradient is not finite; skipped")
        bad, skipped = (0, skipped) if finite else (bad + 1, skipped + 1)
        for t, kd, recon in zip(tasks, sums.tolist(), sums[len(tasks):].tolist()):
            t.history += [{"step": step, "L_recon": recon}] * with_recon + [{"step": step, main_loss: kd}]

        due, halt = (step + 1) % args.eval_every == 0 or step + 1 == args.steps, sums[-1] > 0 or bad == 3
        for t in tasks if rank == 0 and due else []:
            kl = held_out_kl(t, t.rows)
            t.history.append({"step": step, "held-out KL": kl})                                           # after the update of this step
            if kl < t.best["kl"]:
                t.best = {"kl": kl, "step": step + 1, "vector": be.detach()[t.own].cpu().clone()}
        if rank == 0 and (due or halt):
            save(step + 1)
        if halt:
            break
        gap = sum(1 - t.best["kl"] / t.none_kl for t in tasks) / len(tasks)
        bar.set_postfix({main_loss: f"{sums[:len(tasks)].mean():.3f}", "held_out_gap_closed": f"{gap:.3f}"})
    bar.close()
    barrier()                                               # torchrun ends the others as soon as one process leaves: not before rank 0 has saved
    if world > 1:
        torch.distributed.destroy_process_group()
    on_stop()
    if bad == 3:
        fail(f"steps {step - 2} to {step}: the loss or its gradient was not finite three times in a row; the last good vector is in {tasks[0].out}; start anew with a --lr below {args.lr}", code=1)
    if halt or asked:
        print(f"stopped after step {step + 1}; go on with --resume")
        sys.exit(128 + (asked or [signal.SIGTERM])[0])
    assert fingerprint(model) == before, "the frozen model has changed"
    if rank > 0:
        return

    # the table of controls, for each turn of a chat
    if tables is None:
        best = torch.cat([t.best["vector"] for t in tasks])
        tables = [controls(t, model, tokenizer, best, noise(slots, args.seed + 1)) for t in tasks]
        if args.steps > 0:
            save(args.steps, tables)                                                                 # the run is done
    for t, found in zip(tasks, tables):
        report(args, t, found, skipped)
    print("every weight of the model is as it was")


if __name__ == "__main__":
    main()
