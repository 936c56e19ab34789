"""Stage 0: learn [AE], one input embedding that makes a frozen chat model repeat the text that stands before it.

    input   x_1 ... x_n [AE] x_1 ... x_n        loss   L_AE = mean_i -log P(x_i | x_1..n, [AE], x_<i)   over the copy (paper, stage 0), and over the end token after it

Only the d numbers of [AE] are trained. It is universal: one [AE] a model, made once, used by stage 1 for every prompt.

    python data/ae_corpus/prepare.py --offline                                   # some text (without --offline: the paper's 1 GB mix, from the hub)
    python stage0_ae.py                                                          # the default model  -> out/ae.pt
    python stage0_ae.py --resume                                                 # go on where a killed run stopped
    python stage0_ae.py --model meta-llama/Llama-3.2-1B-Instruct --batch 16      # on a GPU
    torchrun --nproc_per_node=8 stage0_ae.py --model meta-llama/Llama-3.2-1B-Instruct --accumulate 8      # the passes of each step over eight GPUs

Reads   jsonl files with a "text" in each line.
Writes  out/ae.pt and out/ae.png, the loss curve.
Expect  the default model on a 2-core laptop: 300 steps, an hour of one core, 98.8% of held-out tokens copied. The vector is in artifacts/: stage 1 needs no such run.
"""
import argparse
import contextlib
import datetime
import functools
import glob
import hashlib
import io
import json
import math
import os
import random
import signal
import sys
from pathlib import Path

import filelock
import jinja2
import safetensors
import torch
import transformers
from tqdm import tqdm

VERSION = "0.1"


def settings():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--model",       default="models/smollm2-135m", help="hub name or local folder of a Llama or Qwen chat model")
    add("--data",        default=["data/ae_corpus/*.jsonl"], nargs="+", help="jsonl files or globs, a \"text\" in each line")
    add("--out",         default="out/ae.pt",                                    help="the artifact")
    add("--resume",      action="store_true",                                    help="go on from --out")
    add("--steps",       type=number(int, 1), default=300,    help="optimizer steps")
    add("--batch",       type=number(int, 1), default=4,      help="texts a forward pass, of like length")
    add("--accumulate",  type=number(int, 1), default=2,      help="forward passes a step; under torchrun they are shared out")
    add("--lr",          type=number(float, 0), default=None,   help="peak; default: 0.22 standard deviations of the embedding table, 3e-2 on the default model, where 1e-2 ends higher; AdamW, warm-up over 20 steps, cosine to zero")
    add("--min-tokens",  type=number(int, 1), default=64,     help="shorter texts are left out")
    add("--max-tokens",  type=number(int, 64), default=1024,   help="longer texts are cut here")
    add("--held-out",    type=number(int, 1), default=16,     help="texts kept from training, for each of the four lengths in the report")
    add("--eval-every",  type=number(int, 1), default=30,     help="steps between two looks at the held-out texts; the artifact is saved then")
    add("--seed",        type=int,   default=0,      help="of the start vector and of the order of texts")
    add("--device",      default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: CUDA, then MPS, then CPU")
    add("--device-map",  default=None, choices=["auto"], help="auto: the layers of a model larger than one GPU over all of them")
    add("--dtype",       default="auto", choices=["auto", "bf16", "fp32"],       help="of the frozen weights; [AE] itself is always fp32")
    add("--trust-remote-code", action="store_true", help="run the model code that a hub repository ships; off: none but that of transformers")
    p.error = lambda message: fail(f"{message}; see --help")
    return p.parse_args()


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


def read_texts(patterns, tokenizer, shortest, longest):
    """All texts of the jsonl files, as lists of token ids of shortest to longest tokens."""
    files = sorted({f for pattern in patterns for f in glob.glob(pattern)})
    if not files:
        fail(f"--data {' '.join(patterns)}: no such file; make some with: python data/ae_corpus/prepare.py --offline")
    texts = []
    for file in files:
        for n, line in enumerate(open(file, encoding="utf-8", errors="surrogateescape"), 1):
            try:
                text = json.loads(line)["text"].encode("utf-8").decode()
            except (ValueError, KeyError, TypeError, AttributeError):
                fail(f'{file}, line {n}: expected a json object with a "text" in UTF-8, found {line[:60]!r}')
            texts.append(text[:longest * 12].strip())                                               # texts of over 12 characters a token are not text
    ids = []
    for i in tqdm(range(0, len(texts), 1000), desc="tokenising", dynamic_ncols=True, leave=False):  # by the thousand: the tokenizer runs on all cores
        ids += tokenizer(texts[i:i + 1000], add_special_tokens=False, split_special_tokens=True, truncation=True, max_length=longest)["input_ids"]
    return [t for t in ids if len(t) >= shortest]


def copy_hidden(model, ids, ae, words):
    """The last hidden states that predict the copy and its end token. ids (B, n); ae (1, d), or None for no trigger; words: the template's ids before the slot -> (B, n + 1, d).

    The first x_1 ... x_n does not depend on [AE]: it runs without a graph and leaves its keys and values, so that the backward pass covers the copy only.
    """
    body = model.get_decoder()
    with torch.no_grad():
        first = body(input_ids=torch.cat([ids.new_tensor(words).expand(len(ids), -1), ids], 1), use_cache=True)                 # (B, s + n, d)
    if ae is None:
        copy = body(input_ids=ids, past_key_values=first.past_key_values, use_cache=True).last_hidden_state                     # (B, n, d)
        return torch.cat([first.last_hidden_state[:, -1:], copy], 1)
    slot_and_copy = torch.cat([torch.full_like(ids[:, :1], -1), ids], 1)                                                        # (B, 1 + n): [AE] x_1 ... x_n
    return body(inputs_embeds=embed(model, slot_and_copy, ae), past_key_values=first.past_key_values, use_cache=True).last_hidden_state


@torch.no_grad()
def copy_scores(model, ids, ae, words, end, greedy):
    """How well ids (B, n) come back -> (mean loss in nats, share of right tokens with the true past given, share given back by greedy decoding or None)."""
    body, weight = model.get_decoder(), model.get_output_embeddings().weight
    hidden = torch.cat([copy_hidden(model, row[None], ae, words) for row in ids])                                               # one text at a time: little memory
    target = torch.cat([ids, torch.full_like(ids[:, :1], end)], 1)                                                              # (B, n + 1)
    loss = token_loss(hidden.flatten(0, 1), weight, target.flatten()).mean().item()
    right = torch.cat([(h @ weight.T).argmax(-1) == t for h, t in zip(hidden, target)]).float().mean().item()
    if not greedy:
        return loss, right, None
    out = body(input_ids=torch.cat([ids.new_tensor(words).expand(len(ids), -1), ids], 1), use_cache=True)
    if ae is not None:
        out = body(inputs_embeds=embed(model, torch.full_like(ids[:, :1], -1), ae), past_key_values=out.past_key_values, use_cache=True)
    said = []
    for _ in range(ids.shape[1]):
        said.append((out.last_hidden_state[:, -1] @ weight.T).argmax(-1, keepdim=True))                                         # (B, 1)
        out = body(input_ids=said[-1], past_key_values=out.past_key_values, use_cache=True)
    return loss, right, (torch.cat(said, 1) == ids).float().mean().item()                                                       # position by position: a lost or doubled token costs all that follows


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


def main():
    args = settings()
    on_stop()
    rank, world = ranks()
    if args.device_map and world > 1:
        fail("--device-map: spreads one process over all GPUs; run it without torchrun")
    _lock = claim(args.out) if rank == 0 else None                                                   # held until the end of the run
    if args.accumulate % world:
        fail(f"--accumulate: expected a multiple of the {world} processes, found {args.accumulate}; each takes its share of a step's passes")
    device, dtype, attention = pick_device(args.device, args.dtype)
    if device.type == "mps" and world > 1:
        fail("--device mps: one GPU is one process; run it without torchrun, or with --device cpu")
    model, tokenizer = load_frozen(args.model, device, dtype, attention, args.trust_remote_code, args.device_map)
    device = model.device                                                                           # with --device-map the first layer may lie on another GPU than the first
    weight = model.get_output_embeddings().weight                                                   # (V, d), tied to the input table or not
    before, d, end = fingerprint(model), weight.shape[1], tokenizer.eos_token_id
    # X stands where a system message would, as [BE] will: the ids that open the template come first. At position 0 it would sit on the attention sink.
    words = chat_ids(tokenizer, [{"role": "system", "content": [-1]}], generate=False)
    words = words[:words.index(-1)]

    # the texts: for each length of the report, some are kept from training
    texts = read_texts(args.data, tokenizer, args.min_tokens, args.max_tokens)
    corpus = hashlib.sha256()                                                                       # what a resumed run must find again
    for ids in texts:
        corpus.update(torch.tensor(ids, dtype=torch.int32).numpy())
    corpus = corpus.hexdigest()
    random.Random(args.seed).shuffle(texts)
    held = {n: [i for i, t in enumerate(texts) if len(t) >= n][:args.held_out] for n in (64, 128, 256, 512)}
    kept = {i for rows in held.values() for i in rows}
    train = [t for i, t in enumerate(texts) if i not in kept]
    held = {n: torch.tensor([texts[i][:n] for i in rows], device=device) for n, rows in held.items() if rows}
    if len(train) < args.batch or not held:
        fail(f"--data: expected at least --batch = {args.batch} texts to train on and some of 64 tokens or more to hold out, found {len(texts)} texts of --min-tokens or more in all")
    print(f"texts: {len(train)} to train on, {sum(map(len, train)) / len(train):.0f} tokens on average; {args.held_out} kept for each length of {list(held)}")

    # the one trainable tensor: noise around the mean of the embedding table, at its scale
    torch.manual_seed(args.seed)
    table = model.get_input_embeddings().weight.detach().float().cpu()
    noise = table.mean(0) + table.std(0) * torch.randn(1, d)
    args.lr = float(f"{0.22 * table.std():.2g}") if args.lr is None else args.lr
    del table
    ae = torch.nn.Parameter(noise.clone().to(device))                                               # (1, d) fp32
    optimizer = torch.optim.AdamW([ae], weight_decay=0)
    first, best, history, running, skipped = 0, {"loss": math.inf, "vector": noise}, [], [], 0
    if args.resume:
        artifact = load_artifact(args.out, "ae", before, d, f"python stage0_ae.py --model {args.model}")
        check_resume(args.out, artifact, vars(args))
        if artifact.get("texts", corpus) != corpus:
            fail(f"--resume: the texts of --data have changed since {args.out} began; put them back, or run without --resume to start anew")
        ae.data.copy_(artifact["last"])
        optimizer.load_state_dict(artifact["optimizer"])
        first, best, history, skipped, running = (artifact[key] for key in ("step", "best", "history", "skipped", "running"))

    @functools.lru_cache(maxsize=1)
    def epoch(number):
        """The batches of an epoch: texts of like length together. It depends on its number and the seed alone, so a resumed run sees the same."""
        rng, window = random.Random(f"{args.seed} {number}"), 16 * args.batch                       # sorted by length within 16 batches, so that the order stays random
        order = rng.sample(range(len(train)), len(train))
        order = [i for w in range(0, len(order), window) for i in sorted(order[w:w + window], key=lambda i: len(train[i]))]
        batches = [order[i:i + args.batch] for i in range(0, len(order) - args.batch + 1, args.batch)]
        return rng.sample(batches, len(batches))

    per_epoch = len(train) // args.batch
    asked, bad, halt, step = [], 0, False, first - 1
    on_stop(asked.append)
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="[AE]", dynamic_ncols=True, disable=rank > 0)
    for step in bar:
        lr = args.lr * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        sums = torch.zeros(2, device=device)                                                        # the loss, and whether the run is told to stop
        for micro in range(step * args.accumulate + rank, (step + 1) * args.accumulate, world):
            rows = [train[i] for i in epoch(micro // per_epoch)[micro % per_epoch]]
            ids = torch.tensor([r[:min(map(len, rows))] for r in rows], device=device)              # (B, n), cut to the shortest text, so there is no padding
            target = torch.cat([ids, torch.full_like(ids[:, :1], end)], 1)                          # (B, n + 1)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and dtype == torch.bfloat16):
                hidden = copy_hidden(model, ids, ae, words)                                         # (B, n + 1, d): X [AE] X, the gradient reaches [AE] alone
                loss = token_loss(hidden.flatten(0, 1), weight, target.flatten()).mean() / args.accumulate
            loss.backward()
            sums[0] += loss.detach()
        sums[1] = bool(asked)
        if world > 1:
            torch.distributed.all_reduce(ae.grad)
            torch.distributed.all_reduce(sums)
        finite = bool(sums.isfinite().all() and ae.grad.isfinite().all())
        bad, skipped = (0, skipped) if finite else (bad + 1, skipped + 1)
        if finite:
            optimizer.step()
            running.append(sums[0].item())
        else:
            tqdm.write(f"step {step}: the loss or its gradient is not finite; skipped")

        due, halt = (step + 1) % args.eval_every == 0 or step + 1 == args.steps, sums[1] > 0 or bad == 3
        if due and rank == 0:
            scores = [copy_scores(model, ids, ae.detach(), words, end, greedy=False) for n, ids in held.items() if n < 512]
            loss, right = (sum(s[i] for s in scores) / len(scores) for i in (0, 1))
            history.append({"step": step + 1, "train": sum(running) / max(1, len(running)), "held-out": loss})
            tqdm.write(f"step {step + 1}: train {history[-1]['train']:.4f}, held-out {loss:.4f}, copied with the true past given {right:.2%}, lr {lr:.1e}")
            running = []
            if loss < best["loss"]:
                best = {"loss": loss, "right": right, "step": step + 1, "vector": ae.detach().cpu().clone()}
        if (due or halt) and rank == 0:
            save_artifact(args.out, artifact := {
                "kind": "ae", "vector": best["vector"], "layout": "chat", "step": step + 1, "config": vars(args), "history": history, "best": best, "skipped": skipped, "running": running, "texts": corpus,
                "model": {"name": args.model, "revision": getattr(model.config, "_commit_hash", None), "fingerprint": before, "d": d},
                "metrics": {"held_out_loss": best["loss"], "held_out_right": best.get("right"), "n": sum(len(ids) for n, ids in held.items() if n < 512)},
                "last": ae.detach().cpu(), "optimizer": optimizer.state_dict(), "versions": {"nanobe": VERSION, "torch": str(torch.__version__), "transformers": transformers.__version__}})
        if halt:
            break
        bar.set_postfix(held_out=f"{best['loss']:.3f}")
    bar.close()
    barrier()                                               # torchrun ends the others as soon as one process leaves: not before rank 0 has saved
    if world > 1:
        torch.distributed.destroy_process_group()
    on_stop()
    if bad == 3:
        fail(f"steps {step - 2} to {step}: the loss or its gradient was not finite three times in a row; the last good vector is in {args.out}; start anew with a --lr below {args.lr}", code=1)
    if halt or asked:
        print(f"stopped after step {step + 1}; go on with --resume")
        sys.exit(128 + (asked or [signal.SIGTERM])[0])
    if rank > 0:
        return

    # what the trigger is worth, against a random vector and none
    vectors = {"[AE]": best["vector"].to(device), "random": noise.to(device), "none": None}
    report = {}
    for n, ids in held.items():
        for name, vector in vectors.items():
            loss, right, back = copy_scores(model, ids, vector, words, end, greedy=True)
            report[f"{n} {name}"] = {"loss": loss, "right": right, "greedy": back, "n": len(ids)}
            print(f"{n:4d} tokens, {name:7s} n = {len(ids):3d}   loss {loss:.4f}   right with the true past given {right:7.2%}   given back by greedy decoding {back:7.2%}", flush=True)
    if artifact.get("report") != report:
        save_artifact(args.out, artifact | {"report": report})
    plot(Path(args.out).with_suffix(".png"), history, "[AE]: copy loss")
    assert fingerprint(model) == before, "the frozen model has changed"
    print(f"wrote {args.out}: {d} trained numbers; every weight of the model is as it was\nnext: python stage1_recon.py --model {args.model} --ae {args.out} --prompt prompts/pirate.txt")


if __name__ == "__main__":
    main()
