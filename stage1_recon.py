"""Stage 1: learn [BE], one input embedding, so that the frozen model gives the whole prompt P = (s_1, ..., s_m) back.

    input   [BE] [AE] s_1 ... s_m        loss   L_recon = mean_j -log P(s_j | [BE], [AE], s_<j)        (paper, stage 1)

[AE] is the trigger of stage 0 and is not trained here: repeating is its work, so [BE] is free to hold the content.

    python stage1_recon.py --prompt prompts/pirate.txt            # any text file; the default model -> out/be.pt
    python stage1_recon.py --prompt p.txt --k 4                   # four vectors instead of one
    python stage1_recon.py --prompt prompts/gsm8k_8shot.json      # a dialogue: {"messages": [...]}
    python stage1_recon.py --prompt p.txt --steps 2000            # longer; with --resume it goes on where a killed run stopped
    python stage1_recon.py --prompt p.txt --model meta-llama/Llama-3.2-1B-Instruct

Reads   the prompt; [AE] from out/ae.pt, or from artifacts/ for the default model.
Writes  out/be.pt, for stage 2, and out/be.recon.png, the loss curve.
Expect  60 steps on prompts/pirate.txt (357 tokens) take 70 s on 2 cores and end at 3.8 nats a token: one vector of this 135M model does not hold a prompt of that length
"""
import argparse
import contextlib
import glob
import hashlib
import io
import json
import math
import os
import shlex
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
    add("--prompt",      required=True,                 help="the system prompt: a text file, or a .json with a \"messages\" list")
    add("--model",       default="models/smollm2-135m", help="hub name or local folder of a Llama or Qwen chat model")
    add("--ae",          default="",                    help="the [AE] artifact; without it out/ae.pt, else artifacts/, whichever fits the model. none: [BE] alone, a memory token")
    add("--out",         default="out/be.pt",           help="the artifact")
    add("--resume",      action="store_true",           help="go on from --out")
    add("--layout",      default="chat", choices=["chat", "block"], help="[BE] replaces the system message, or the whole system block")
    add("--k",           type=number(int, 1), default=1,         help="vectors to learn; 1 is the paper's")
    add("--steps",       type=number(int, 1), default=60,       help="at most; it stops when every token of P is right. Thousands, to get a prompt of 100 tokens back in full")
    add("--lr",          type=number(float, 0), default=None,      help="peak; default: 0.22 standard deviations of the embedding table, 3e-2 on the default model; AdamW, warm-up over 10 steps, cosine to zero")
    add("--save-every",  type=number(int, 1), default=50,        help="steps between two saves")
    add("--seed",        type=int,   default=0,         help="of the start vector")
    add("--device",      default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: CUDA, then MPS, then CPU")
    add("--device-map",  default=None, choices=["auto"], help="auto: the layers of a model larger than one GPU over all of them")
    add("--dtype",       default="auto", choices=["auto", "bf16", "fp32"],       help="of the frozen weights; [BE] itself is always fp32")
    add("--checkpointing", action="store_true",         help="keep no activations for the backward pass, compute them again: for prompts of thousands of tokens")
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


@torch.no_grad()
def give_back(model, ids, learned, m):
    """m tokens by greedy decoding after ids (1, T), slots and all -> list of token ids."""
    body, weight, said = model.get_decoder(), model.get_output_embeddings().weight, []
    out = body(inputs_embeds=embed(model, ids, learned), use_cache=True)
    while len(said) < m:
        said.append((out.last_hidden_state[0, -1] @ weight.T).argmax().item())
        out = body(input_ids=ids.new_tensor([[said[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    return said


def main():
    args = settings()
    on_stop()
    messages = read_prompt(args.prompt)
    _lock = claim(args.out)                                                                          # held until the end of the run
    device, dtype, attention = pick_device(args.device, args.dtype)
    model, tokenizer = load_frozen(args.model, device, dtype, attention, args.trust_remote_code, args.device_map)
    device = model.device                                                                           # with --device-map the first layer may lie on another GPU than the first
    body, weight = model.get_decoder(), model.get_output_embeddings().weight                        # weight (V, d)
    before, d = fingerprint(model), weight.shape[1]
    ae = find_ae(args.ae, before, d, args.model).to(device)                                         # (1, d) fp32, not trained here; (0, d) for none

    # the sequence: what stands before the slot in the layout, [BE], [AE], P. Attention looks back only, so with the same words before it
    # [BE] has the very keys and values here that it will have in a chat.
    s = prompt_ids(tokenizer, messages, args.layout, model.config.max_position_embeddings)
    slot = [-1 - i for i in range(args.k)]
    words = layout_ids(tokenizer, args.layout, slot, [{"role": "user", "content": "?"}])
    words = words[:words.index(-1)]
    opening = torch.tensor([words + slot + [-1 - args.k] * len(ae)], device=device)                 # (1, s + k + 1): ... [BE] [AE]
    target = torch.tensor(s, device=device)                                                         # (m,)
    ids = torch.cat([opening, target[None, :-1]], 1)                                                # (1, s + k + m): s_m is predicted, never read
    m = len(s)
    if device.type == "cpu" and m > 1024:
        model.set_attn_implementation("sdpa")               # eager keeps (heads, T, T) a layer for the backward pass: 20 GB at 3,000 tokens
    print(f"prompt: {args.prompt}, {m} tokens -> {args.k} vector{'s' * (args.k > 1)} of {d} numbers; layout {args.layout}")

    # the one trainable tensor: noise around the mean of the embedding table, at its scale
    torch.manual_seed(args.seed)
    table = model.get_input_embeddings().weight.detach().float().cpu()
    be = torch.nn.Parameter((table.mean(0) + table.std(0) * torch.randn(args.k, d)).to(device))     # (k, d) fp32
    args.lr = float(f"{0.22 * table.std():.2g}") if args.lr is None else args.lr
    del table
    optimizer = torch.optim.AdamW([be], weight_decay=0)
    first, best, history, skipped = 0, {"loss": math.inf, "right": 0, "step": 0, "vector": be.detach().cpu().clone()}, [], 0
    prompt = {"sha256": hashlib.sha256(json.dumps(messages).encode()).hexdigest(), "tokens": m, "messages": messages}
    if args.resume:
        artifact = load_artifact(args.out, "be", before, d, f"python stage1_recon.py --prompt {args.prompt}")
        if artifact["stage"] != "recon" or artifact["prompt"]["sha256"] != prompt["sha256"]:
            fail(f"--resume: {args.out} is of stage {artifact['stage']} or of another prompt; run without --resume to start anew")
        check_resume(args.out, artifact, vars(args))
        if not torch.equal(artifact["ae"], ae.cpu()):
            fail(f"--resume: {args.out} began with another [AE]; give that one with --ae, or run without --resume to start anew")
        be.data.copy_(artifact["last"])
        optimizer.load_state_dict(artifact["optimizer"])
        best, history, skipped = artifact["best"], artifact["history"], artifact["skipped"]
        first = args.steps if best["right"] == m else artifact["step"]

    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()                                       # transformers checkpoints a model in training only; these have no dropout
    asked, bad, step = [], 0, first - 1
    on_stop(asked.append)
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="[BE] recon", dynamic_ncols=True)
    for step in bar:
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        # all of stage 1: ... [BE] [AE] s_1 ... s_(m-1) in, s_1 ... s_m out
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and dtype == torch.bfloat16):
            hidden = body(inputs_embeds=embed(model, ids, torch.cat([be, ae])), use_cache=False).last_hidden_state[0, -m:]      # (m, d)
            loss = token_loss(hidden, weight, target).mean()
        optimizer.zero_grad()
        loss.backward()
        recon = loss.item()
        finite = math.isfinite(recon) and bool(be.grad.isfinite().all())
        bad, skipped = (0, skipped) if finite else (bad + 1, skipped + 1)
        history.append({"step": step, "recon": recon})
        right = sum(((h @ weight.T).argmax(-1) == t).sum().item() for h, t in zip(hidden.detach().split(128), target.split(128)))
        done = right == m
        if recon < best["loss"] or done:                    # each step sees all of P: these are the exact scores of the vector as it stood before the step
            best = {"loss": recon, "right": right, "step": step, "vector": be.detach().cpu().clone()}
        bar.set_postfix(recon=f"{recon:.3f}", right=f"{right}/{m}")
        if done:
            tqdm.write(f"step {step + 1}: every token of P is right, stopping")
        if finite:
            optimizer.step()
        else:
            tqdm.write(f"step {step}: the loss or its gradient is not finite; skipped")

        halt = done or bool(asked) or bad == 3
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps or halt:
            save_artifact(args.out, {
                "kind": "be", "stage": "recon", "vector": best["vector"], "layout": args.layout, "prompt": prompt, "step": step + 1, "config": vars(args),
                "model": {"name": args.model, "revision": getattr(model.config, "_commit_hash", None), "fingerprint": before, "d": d},
                "metrics": {"recon": best["loss"], "right": best["right"], "n": m}, "history": history, "skipped": skipped, "best": best, "last": be.detach().cpu(), "ae": ae.cpu(),
                "optimizer": optimizer.state_dict(), "versions": {"nanobe": VERSION, "torch": str(torch.__version__), "transformers": transformers.__version__}})
        if halt:
            break
    bar.close()
    model.eval()
    on_stop()
    if bad == 3:
        fail(f"steps {step - 2} to {step}: the loss or its gradient was not finite three times in a row; the last good vector is in {args.out}; start anew with a --lr below {args.lr}", code=1)
    if asked:
        print(f"stopped after step {step + 1}; go on with --resume")
        sys.exit(128 + asked[0])

    said = give_back(model, opening, torch.cat([best["vector"].to(device), ae]), m)
    led = len(os.path.commonprefix([said, s]))
    plot(Path(args.out).with_suffix(".recon.png"), history, f"stage 1: giving back {m} tokens of {Path(args.prompt).name}")
    assert fingerprint(model) == before, "the frozen model has changed"
    print(f"loss {best['loss']:.3f} nats a token (perplexity {math.exp(best['loss']):.1f}); with the true past given {best['right']} of {m} tokens are right;"
          f" greedy decoding gives back the first {led}, and {sum(a == b for a, b in zip(said, s))} in their places")
    print(f"wrote {args.out}: {be.numel()} trained numbers; every weight of the model is as it was\nnext: "
          + shlex.join(["python", "stage2_kd.py", "--prompt", args.prompt, "--be", args.out] + ["--model", args.model] * (args.model != "models/smollm2-135m") + ["--ae", args.ae] * bool(args.ae)))


if __name__ == "__main__":
    main()
