"""Stage 2: distil the prompt's behaviour into [BE]: [BE] + query answers as prompt + query does.

    L = (1 - lambda) L_recon + lambda L_KD        L_KD = tau^2 mean_t KL( softmax(z_T / tau) || softmax(z_S / tau) )        (paper, combined objective)

The teacher is the same frozen model with the full prompt; z_T are its logits along its own answer. The student reads [BE] in the prompt's place and the same answer.
The teacher answers every query once, before training, and its last hidden states stay on disk: z = W h gives the logits back at 1/50 to 1/250 of their size.
The optimizer is Adam with the gradient's whole second moment in place of its diagonal: for one vector that is only a (d, d) matrix (results/LOG.md).

    python stage2_kd.py --prompt prompts/pirate.txt                          # from stage 1's out/be.pt, questions from prompts/pirate.queries.txt -> out/be.pt
    python stage2_kd.py --prompt p.txt                                       # no question file: the model itself is asked what its users would ask
    python stage2_kd.py --prompt p.txt --queries q.jsonl --test-queries t.jsonl --answer-tokens 128
    python stage2_kd.py --prompt p.txt --init random --k 4 --lam 1           # distillation alone, four vectors, no stage 1
    python stage2_kd.py --prompt p.txt --resume                              # go on where a killed run stopped

Reads   the prompt, queries, out/be.pt of stage 1, [AE].
Writes  out/be.pt, out/be.kd.png, the teacher's answers in out/teacher-*, and with self the questions in out/queries-*.txt.
Expect  prompts/pirate.txt, --answer-tokens 32 --steps 300, on 2 cores: 7 minutes, 2 GB, and 0.61 of the gap between no prompt and the full one closed on test questions
"""
import argparse
import copy
import glob
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import sys
from pathlib import Path

import jinja2
import safetensors
import torch
import transformers
from tqdm import tqdm

VERSION = "0.1"


def settings():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--prompt",        required=True,                 help="the system prompt: a text file, or a .json with a \"messages\" list")
    add("--model",         default="models/smollm2-135m", help="hub name or local folder of a Llama or Qwen chat model")
    add("--queries",       default="",                    help=".txt, a query a line; .jsonl with question, query or instruction; or self. Default: NAME.queries.txt beside the prompt, else self")
    add("--test-queries",  default="",                    help="for the last table only, never trained or chosen on. Default: NAME.test.txt beside the prompt, else the held-out queries")
    add("--be",            default="out/be.pt",           help="the artifact of stage 1, where training starts")
    add("--ae",            default="",                    help="the [AE] artifact; without it out/ae.pt, else artifacts/, whichever fits the model")
    add("--out",           default="out/be.pt",           help="the artifact")
    add("--resume",        action="store_true",           help="go on from --out")
    add("--init",          default="be", choices=["be", "random"], help="start from --be, or from noise (then --layout and --k count)")
    add("--layout",        default="chat", choices=["chat", "block"], help="with --init random: [BE] replaces the system message, or the whole system block")
    add("--k",             type=number(int, 1), default=1,         help="with --init random: vectors to learn")
    add("--lam",           type=number(float, 0, 1), default=0.9,       help="lambda, the weight of L_KD; at 1 there is no L_recon")
    add("--tau",           type=number(float, 0.01), default=2.0,       help="the temperature of L_KD")
    add("--recon-every",   type=number(int, 1), default=4,         help="L_recon enters every so many steps, that much heavier: the same gradient on average, at 1/4 of its cost")
    add("--steps",         type=number(int, 1), default=600,       help="optimizer steps")
    add("--batch",         type=number(int, 1), default=4,         help="queries a step; many small steps beat few large ones (results/LOG.md)")
    add("--lr",            type=number(float, 0), default=3e-2,      help="peak; linear warm-up over 10 steps, then a cosine to zero")
    add("--answer-tokens", type=number(int, 1), default=64,        help="the teacher's answers are cut here")
    add("--held-out",      type=number(float, 0.01, 0.9), default=0.15,      help="share of the queries kept from training; the best vector is chosen on them (at most 32)")
    add("--self-queries",  type=number(int, 8), default=200,       help="how many, with --queries self")
    add("--temperature",   type=number(float, 0), default=0.0,       help="of the teacher's answers; 0 is greedy")
    add("--eval-every",    type=number(int, 1), default=50,        help="steps between two looks at the held-out queries; the artifact is saved then")
    add("--seed",          type=int,   default=0,         help="of the start vector, the split and the order of queries")
    add("--device",        default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: CUDA, then MPS, then CPU")
    add("--dtype",         default="auto", choices=["auto", "bf16", "fp32"],       help="of the frozen weights; [BE] itself is always fp32")
    p.error = lambda message: fail(f"{message}; see --help")
    return p.parse_args()


# --- shared: fail --------------------------------------------------------
def fail(message):
    """A user's mistake: one line on stderr that says what was expected, what came and what to do; exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def number(kind, low, high=math.inf):
    """An argparse type: an int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"expected {'a number' if kind is float else 'a whole number'} from {low} to {high}, found {text}")
        return value
    parse.__name__ = "number" if kind is float else "whole number"
    return parse
# --- end shared ----------------------------------------------------------


# --- shared: device ------------------------------------------------------
def pick_device(device, dtype):
    """Where and how to run -> (torch.device, dtype of the frozen weights, attention implementation); prints the reason."""
    mps = torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if (device == "cuda" and not torch.cuda.is_available()) or (device == "mps" and not mps):
        fail(f"--device {device}: this PyTorch sees no {device} device; use --device auto or cpu")
    if device == "cuda":        # bf16 weights too: autocast would cast frozen fp32 weights anew in every step
        fast, why = torch.bfloat16, "autocast"
        flash = importlib.util.find_spec("flash_attn") and dtype != "fp32" and torch.cuda.get_device_capability()[0] >= 8
        attention = "flash_attention_2" if flash else "sdpa"
    elif device == "mps":
        fast, why, attention = torch.float32, "the safe choice on MPS", "sdpa"
    else:                       # AMX or AVX512-BF16: a step in bf16 takes 0.6 of fp32's time (results/LOG.md); other CPUs emulate it, slower than fp32
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        fast, why = (torch.bfloat16, "this CPU multiplies bf16 natively") if native else (torch.float32, "this CPU has no native bf16")
        attention = "eager"     # as fast as SDPA at chat lengths, twice as fast on CPUs with AMX
    dtype = {"auto": fast, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads" if device == "cpu" else "Apple GPU"
    print(f"device: {device} ({name}), weights {str(dtype)[6:]} ({why if dtype == fast else 'as asked'}), attention {attention}")
    return torch.device(device), dtype, attention
# --- end shared ----------------------------------------------------------


# --- shared: load_frozen -------------------------------------------------
def load_frozen(name, device, dtype, attention):
    """The frozen chat model and its tokenizer. name: hub name or folder. Exits with one line if there is no such model or it is no chat model."""
    if name == "models/smollm2-135m" and not Path(name, "config.json").exists():
        fail(f"the default model is not at {name} yet; fetch it once with: python models/prepare.py")
    try:
        transformers.utils.logging.disable_progress_bar()
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attention)
    except (OSError, ValueError, ImportError, safetensors.SafetensorError) as e:
        fail(f"--model {name}: expected a hub name or a folder with a Llama or Qwen chat model; transformers says: {str(e).strip().splitlines()[0]}")
    if not tokenizer.chat_template:
        fail(f"--model {name}: its tokenizer has no chat template, so it is a base model; use the -Instruct or -Chat one")
    model.requires_grad_(False)         # frozen: no row is added, no head untied, no weight moved
    return model.eval().to(device), tokenizer
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
    """Sum over tokens of tau^2 KL(target || softmax(h W^T / tau)), in chunks: no (T, V) tensor outlives its chunk.

    The head is frozen, so the gradient with respect to h is all that the backward pass needs: (T, d) numbers, made in the forward pass while the chunk's
    logits are still there. d/dh of tau^2 KL is tau (softmax(z/tau) - target) W.
    """
    @staticmethod
    def forward(ctx, hidden, weight, target, tau, chunk):
        total, grad = hidden.new_zeros((), dtype=torch.float32), torch.empty_like(hidden)
        for i in range(0, len(hidden), chunk):
            logp = torch.log_softmax((hidden[i:i + chunk] @ weight.T).float() / tau, -1)            # (c, V)
            t = target[i:i + chunk]
            if t.dtype == torch.int64:                                      # a token id: its one-hot distribution, KL is the negative log-likelihood
                total += -logp.gather(1, t[:, None]).sum()
                delta = logp.exp_().scatter_add_(1, t[:, None], -torch.ones_like(t[:, None], dtype=logp.dtype))
            else:                                                           # the teacher's last hidden state: its logits are one product away
                logq = torch.log_softmax((t @ weight.T).float() / tau, -1)
                q = logq.exp()
                total += tau ** 2 * (q * (logq - logp)).sum()
                delta = logp.exp_().sub_(q).mul_(tau)
            grad[i:i + chunk] = delta.to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        return ctx.saved_tensors[0] * grad_total, None, None, None, None


def token_loss(hidden, weight, target, tau=1.0, chunk=128):
    """Mean loss a token. hidden (T, d); weight (V, d), the head; target (T,) token ids, or (T, d) teacher hidden states -> scalar, in nats."""
    return TokenLoss.apply(hidden, weight, target, tau, chunk) / len(hidden)
# --- end shared ----------------------------------------------------------


# --- shared: load_artifact ----------------------------------------------
def fingerprint(model):
    """sha256 over the names, shapes and bf16 bits of all weights: the same for a model opened in bf16 or in fp32."""
    h = hashlib.sha256()
    for name, w in model.named_parameters():
        h.update(f"{name} {tuple(w.shape)}".encode())
        h.update(w.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
    return h.hexdigest()


def load_artifact(path, kind, model_print, d, maker, strict=True):
    """The artifact at `path`, checked: its kind ("ae" or "be"), model and size. Exits with one line, naming `maker`, the command that makes
    the right one; strict=False returns None for another model's artifact; model_print None takes any model's."""
    try:
        a = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path}: not there; make it with: {maker}")
    except Exception as e:      # torch.load raises many types on a damaged file; each means the same here
        fail(f"{path}: not a readable artifact ({type(e).__name__}: truncated, or another kind of file); make it again with: {maker}")
    if not isinstance(a, dict) or a.get("kind") != kind:
        fail(f"{path}: expected an artifact of kind '{kind}', found {a.get('kind', 'none') if isinstance(a, dict) else type(a).__name__!r}; make one with: {maker}")
    v, m = a.get("vector"), a.get("model")
    if not isinstance(m, dict) or a.get("layout") not in ("chat", "block") or (kind == "be" and not {"stage", "prompt"} <= set(a)):
        fail(f"{path}: an artifact that lacks its model, layout, stage or prompt; make it again with: {maker}")
    if model_print and m.get("fingerprint") != model_print:
        if not strict:
            return None
        fail(f"{path}: its vector belongs to another model ({m.get('name')}, d = {m.get('d')}), not to this one (d = {d}); make one with: {maker}")
    if not torch.is_tensor(v) or v.dim() != 2 or v.shape[1] != m.get("d") or not v.isfinite().all():
        fail(f"{path}: expected a finite vector of shape (k, {m.get('d')}), found {tuple(v.shape) if torch.is_tensor(v) else type(v).__name__}; make one with: {maker}")
    return a
# --- end shared ----------------------------------------------------------


# --- shared: save_artifact ----------------------------------------------
def save_artifact(path, artifact):
    """Written beside its place and renamed: a killed run leaves the old file whole."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.tmp", "wb") as f:
        torch.save(artifact, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.tmp", path)


def check_resume(saved, args):
    """--resume goes on with the settings that the run began with: exits with one line where one of them has changed."""
    if missing := {"config", "step", "best", "last", "history"} - set(saved):
        fail(f"--resume: {args.out} holds no run to go on with (no {', '.join(sorted(missing))}); run without --resume to start anew")
    for name, value in saved["config"].items():
        if name not in ("resume", "out", "device", "dtype") and getattr(args, name, value) != value:
            fail(f"--resume: {args.out} began with --{name.replace('_', '-')} {value}, now it is {getattr(args, name)}; give the same, or run without --resume to start anew")
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
    try:                                                                      # Llama 3 templates print today's date unless they are given one
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


# --- shared: prompt ------------------------------------------------------
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
    if not text:
        fail(f"--prompt {path}: the file is empty; write the system prompt into it")
    if not str(path).endswith(".json"):
        return [{"role": "system", "content": text}]
    try:
        messages = [{"role": str(m["role"]), "content": m["content"].strip()} for m in json.loads(text)["messages"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        fail(f'--prompt {path}: expected {{"messages": [{{"role": ..., "content": ...}}, ...]}}')
    if not any(m["content"] for m in messages):
        fail(f"--prompt {path}: its messages are empty")
    return messages


def prompt_ids(tokenizer, messages, layout, limit):
    """The tokens (s_1, ..., s_m) that the slot stands for: the text of one system message in the chat layout, else the messages with the template's words."""
    if layout == "chat" and [m["role"] for m in messages] == ["system"]:
        ids = text_ids(tokenizer, messages[0]["content"])
    else:
        ids = chat_ids(tokenizer, messages, generate=False)
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
    if ids[:len(block)] != block:
        fail("--layout block: this model's chat template has no system block of its own; use --layout chat")
    bos = block[:1] if block[0] == tokenizer.bos_token_id and ids.count(block[0]) == 1 else []       # ChatML opens every turn with its "BOS": that one is a header
    return bos + slot + ids[len(block):]
# --- end shared ----------------------------------------------------------


# --- shared: find_ae -----------------------------------------------------
def find_ae(path, model_print, d, model_name):
    """The [AE] artifact of this model: the one named, else out/ae.pt, else one of artifacts/*.pt, whichever was made for these weights -> (1, d)."""
    maker = f"python stage0_ae.py --model {model_name}"
    for candidate in [path] if path else ["out/ae.pt", *sorted(glob.glob("artifacts/ae-*.pt"))]:
        if path or Path(candidate).exists():
            a = load_artifact(candidate, "ae", model_print, d, maker, strict=bool(path))
            if a:
                print(f"[AE]: {candidate}")
                return a["vector"]
    fail(f"no [AE] of this model in out/ae.pt or artifacts/; make one with: {maker}")
# --- end shared ----------------------------------------------------------


# --- shared: plot --------------------------------------------------------
def plot(path, history, title):
    """The loss curves as a PNG beside the artifact. history: list of {"step": ..., name: value}; values of one name make one line."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    fig, ax = pyplot.subplots(figsize=(7, 4))
    for name in dict.fromkeys(k for row in history for k in row if k != "step"):
        ax.plot(*zip(*[(row["step"], row[name]) for row in history if name in row]), label=name)
    ax.set(xlabel="step", ylabel="nats a token", title=title)
    ax.legend()
    fig.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(fig)
# --- end shared ----------------------------------------------------------


def read_queries(path):
    """The queries of a .txt (one a line) or .jsonl file ("question", "query" or "instruction") -> list of texts, without empty and repeated ones."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        fail(f"{path}: expected a .txt or .jsonl file of queries in UTF-8, but it cannot be read: {getattr(e, 'strerror', None) or 'not UTF-8'}")
    queries = []
    for n, line in enumerate(lines, 1):
        if str(path).endswith(".jsonl") and line.strip():
            try:
                row = json.loads(line)
                queries.append(next(row[key] for key in ("question", "query", "instruction") if key in row).strip())
            except (ValueError, StopIteration, TypeError, AttributeError):
                fail(f'{path}, line {n}: expected a json object with a "question", "query" or "instruction" that is a text, found {line[:60]!r}')
        else:
            queries.append(line.strip())
    return list(dict.fromkeys(q for q in queries if q))


@torch.no_grad()
def generate(model, rows, stop, limit, temperature=0.0, seed=0, skip=()):
    """Continue rows of token ids, which may share a long beginning: the prompt. Yields (row number, answer ids with the stop token, hidden (T, d)), batch by batch.

    The shared prefix runs once, for all batches; its keys and values are repeated over a batch. The rest of each row is padded on the left. hidden[t] is the last
    hidden state that answer[t] was chosen from. temperature 0 is greedy; row numbers in skip are left out.
    """
    body, weight = model.get_decoder(), model.get_output_embeddings().weight
    n = min(len(os.path.commonprefix(rows)), min(map(len, rows)) - 1)                               # each row keeps a token of its own
    prefix = body(input_ids=torch.tensor([rows[0][:n]], device=model.device), use_cache=True).past_key_values if n else None
    batch = max(1, min(32, 16000 // (n + limit)))                                                   # the cache grows with batch x prefix: 16,000 tokens are 370 MB here
    order = sorted(set(range(len(rows))) - set(skip), key=lambda i: (len(rows[i]), i))              # like lengths together: little padding
    for part in [order[i:i + batch] for i in range(0, len(order), batch)]:
        rngs = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in part]                  # a row's sample does not depend on its neighbours
        width = max(len(rows[i]) for i in part) - n
        pads = [width - len(rows[i]) + n for i in part]
        ids = torch.tensor([[0] * p + rows[i][n:] for i, p in zip(part, pads)], device=model.device)                        # (B, w)
        mask = torch.tensor([[1] * n + [0] * p + [1] * (width - p) for p in pads], device=model.device)                     # (B, n + w)
        cache = copy.deepcopy(prefix) if n else None
        if n:
            cache.batch_repeat_interleave(len(part))
        said, hidden = [], []
        while len(said) < limit:
            position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]                        # pads do not count
            out = body(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
            cache, h = out.past_key_values, out.last_hidden_state[:, -1]                            # (B, d)
            logits = (h @ weight.T).float()                                                         # (B, V)
            if temperature > 0:
                chance = torch.tensor([[torch.rand((), generator=r)] for r in rngs], device=logits.device)
                ids = (torch.softmax(logits / temperature, -1).cumsum(-1) < chance).sum(-1, keepdim=True).clamp(max=logits.shape[1] - 1)
            else:
                ids = logits.argmax(-1, keepdim=True)                                               # (B, 1)
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


def teacher(model, rows, stop, limit, temperature, seed, key, folder):
    """The frozen model's answers to rows (prompt and query, as ids), from disk where they are there -> (answers: lists of ids, hidden: (T, d) bf16 tensors on a memory map).

    Two files a key: .bin has the hidden states, .jsonl a row an answer. Both grow batch by batch, so a killed run goes on; what a half-written last row
    left in either is cut off. The key is a hash of all that the answers depend on, so a stale file is never read.
    """
    key = hashlib.sha256(json.dumps([key, rows, stop.tolist(), limit, temperature, seed, str(model.dtype)]).encode()).hexdigest()[:16]
    index, store, d = Path(folder, f"teacher-{key}.jsonl"), Path(folder, f"teacher-{key}.bin"), model.config.hidden_size
    index.parent.mkdir(parents=True, exist_ok=True)
    index.touch(), store.touch()
    done = [json.loads(line) for line in index.read_text().split("\n")[:-1]]                         # a line without its end was cut short
    while sum(len(answer) for _, answer in done) * d * 2 > store.stat().st_size:
        done.pop()
    os.truncate(store, sum(len(answer) for _, answer in done) * d * 2)
    Path(f"{index}.tmp").write_text("".join(json.dumps(row) + "\n" for row in done))
    os.replace(f"{index}.tmp", index)
    found = len(done)
    if found < len(rows):
        with open(index, "a") as f, open(store, "ab") as g, tqdm(total=len(rows), initial=found, desc="teacher", dynamic_ncols=True) as bar:
            for i, answer, h in generate(model, rows, stop, limit, temperature, seed, skip=[i for i, _ in done]):
                g.write(h.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
                g.flush()
                f.write(json.dumps([i, answer]) + "\n")
                f.flush()
                done.append([i, answer])
                bar.update()
    print(f"teacher: {found} answers found, {len(rows) - found} made, {store} ({store.stat().st_size / 1e6:.1f} MB)")
    flat = torch.from_file(str(store), size=sum(len(a) for _, a in done) * d, dtype=torch.bfloat16).view(-1, d)
    answers, hidden, at = [None] * len(rows), [None] * len(rows), 0
    for i, answer in done:
        answers[i], hidden[i], at = answer, flat[at:at + len(answer)], at + len(answer)
    return answers, hidden


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


def answer_hidden(model, rows, answers, learned):
    """The last hidden states that predict the answers' tokens. rows: lists of ids with slots; learned (n, d) -> (sum of T, d).

    Padded on the right: attention looks back only, so no token of a row sees a pad; no mask is needed, and positions are right as they come.
    """
    full = [row + answer[:-1] for row, answer in zip(rows, answers)]
    width = max(map(len, full))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in full], device=model.device)             # (B, w)
    hidden = model.get_decoder()(inputs_embeds=embed(model, ids, learned), use_cache=False).last_hidden_state                # (B, w, d)
    return torch.cat([h[len(r) - 1:len(r) - 1 + len(a)] for h, r, a in zip(hidden, rows, answers)])


def inverse_root(moment, damping=0.03):
    """Second moments (k, d, d) -> their inverse square roots, the eigenvalues lifted by `damping` times the largest: few gradients have been seen, many directions never."""
    value, vector = (x.to(moment.device) for x in torch.linalg.eigh(moment.cpu() if moment.is_mps else moment))      # MPS has no eigh
    return (vector * (value.clamp(min=0) + damping * value[..., -1:] + 1e-30).rsqrt()[..., None, :]) @ vector.mT


@torch.no_grad()
def evaluate(model, rows, answers, hidden, learned):
    """Against the teacher, at tau 1 -> (Q, 3): for each query the sum over its answer tokens of KL in nats, the tokens with the same top-1, the tokens."""
    weight, scores = model.get_output_embeddings().weight, []
    batch = max(1, min(16, 4000 // max(map(len, rows))))
    for i in range(0, len(rows), batch):
        part = answers[i:i + batch]
        h = answer_hidden(model, rows[i:i + batch], part, learned)                                  # (sum T, d)
        for s, t in zip(h.split([len(a) for a in part]), hidden[i:i + batch]):
            logp, logq = (torch.log_softmax((x.to(weight) @ weight.T).float(), -1) for x in (s, t)) # (T, V)
            scores.append([(logq.exp() * (logq - logp)).sum().item(), (logp.argmax(-1) == logq.argmax(-1)).sum().item(), len(s)])
    return torch.tensor(scores)


def main():
    args = settings()
    messages = read_prompt(args.prompt)
    beside = str(Path(args.prompt).with_suffix(""))
    source = args.queries or (f"{beside}.queries.txt" if Path(f"{beside}.queries.txt").exists() else "self")
    test_source = args.test_queries or (f"{beside}.test.txt" if Path(f"{beside}.test.txt").exists() else "")
    queries = read_queries(source) if source != "self" else []
    test_queries = read_queries(test_source) if test_source else []
    device, dtype, attention = pick_device(args.device, args.dtype)
    model, tokenizer = load_frozen(args.model, device, dtype, attention)
    body, weight = model.get_decoder(), model.get_output_embeddings().weight                        # weight (V, d)
    before, d = fingerprint(model), weight.shape[1]
    ends = model.generation_config.eos_token_id
    stop = torch.tensor(ends if isinstance(ends, list) else [ends if ends is not None else tokenizer.eos_token_id])

    # the start: stage 1's vector, or noise around the mean of the embedding table, at its scale
    torch.manual_seed(args.seed)
    table = model.get_input_embeddings().weight.detach().float().cpu()
    prompt = {"sha256": hashlib.sha256(json.dumps(messages).encode()).hexdigest(), "messages": messages}
    maker = f"python stage1_recon.py --prompt {args.prompt} --model {args.model}"
    layout, start, saved = args.layout, table.mean(0) + table.std(0) * torch.randn(args.k, d), None
    if args.resume or args.init == "be":
        saved = load_artifact(args.out if args.resume else args.be, "be", before, d, maker)
        if saved["prompt"]["sha256"] != prompt["sha256"]:
            fail(f"{args.out if args.resume else args.be}: its vector was made for another prompt than {args.prompt}; make one with: {maker}")
        if args.resume and saved["stage"] != "kd":
            fail(f"--resume: {args.out} comes from stage 1, so there is no run of stage 2 to go on with; run without --resume")
        if args.resume:
            check_resume(saved, args)
        layout, start = saved["layout"], saved["start"] if saved["stage"] == "kd" else saved["vector"]    # run again over its own output, it starts where it started before
    k = len(start)
    slot = [-1 - i for i in range(k)]
    s = prompt_ids(tokenizer, messages, layout, model.config.max_position_embeddings)
    prompt["tokens"] = len(s)

    # the queries, their split, and the teacher's answers
    if source == "self":                                                                             # asked once, then read from the file
        kept = Path(args.out).with_name(f"queries-{hashlib.sha256(json.dumps([before, messages, args.self_queries, args.seed]).encode()).hexdigest()[:16]}.txt")
        if not kept.exists():
            asked = self_queries(model, tokenizer, messages, stop, args.self_queries, args.seed)
            kept.parent.mkdir(parents=True, exist_ok=True)
            Path(f"{kept}.tmp").write_text("".join(q + "\n" for q in asked), encoding="utf-8")
            os.replace(f"{kept}.tmp", kept)
        queries = read_queries(kept)
        print(f"queries: {len(queries)} that the model itself asked, in {kept}, such as:\n   " + "\n   ".join(queries[:5]))
    n_held = min(32, max(1, round(len(queries) * args.held_out)))
    if len(queries) - n_held < args.batch:
        fail(f"queries: expected at least --batch = {args.batch} to train on after {n_held} held out, found {len(queries)} in all ({source}); give more, or a smaller --batch")
    random.Random(args.seed).shuffle(queries)
    test_queries = [q for q in test_queries if q not in set(queries)]
    everything = queries + test_queries
    ask = [[{"role": "user", "content": q}] for q in everything]
    full = [chat_ids(tokenizer, messages + turns) for turns in ask]                                  # what the teacher reads
    rows = [layout_ids(tokenizer, layout, slot, turns) for turns in ask]                             # what the student reads
    answers, teacher_hidden = teacher(model, full, stop, args.answer_tokens, args.temperature, args.seed, before, Path(args.out).parent)
    held, train, test = range(n_held), range(n_held, len(queries)), range(len(queries), len(everything))
    test = test or held
    print(f"prompt: {args.prompt}, {len(s)} tokens -> {k} vector{'s' * (k > 1)}; layout {layout}; queries: {len(train)} to train on, {n_held} held out, {len(test_queries)} for test")

    def measure(part, inputs, learned):
        return evaluate(model, [inputs[i] for i in part], [answers[i] for i in part], [teacher_hidden[i].to(device) for i in part], learned)

    none = [layout_ids(tokenizer, layout, [], turns) for turns in ask]                               # no prompt: the same words around an empty slot
    no_vector = torch.zeros(1, d, device=device)
    base = measure(held, none, no_vector).sum(0)

    # the one trainable tensor; L_recon as in stage 1
    be = start.clone().to(device)                                                                    # (k, d) fp32
    first, best, history, artifact = 0, {"kl": math.inf, "step": 0, "vector": start}, [], saved
    # Adam's moments, and the whole second moment of which Adam keeps the diagonal: for one vector that is a (d, d) matrix, so it can be had
    zeros = torch.zeros(k, d, device=device)
    optimizer = {"first": zeros, "second": zeros.clone(), "whole": zeros[..., None] * zeros[:, None], "root": zeros[..., None] * zeros[:, None]}
    if args.resume:
        first, best, history = saved["step"], saved["best"], saved["history"]
        be.copy_(saved["last"])
        optimizer = {name: moment.to(device) for name, moment in saved.get("optimizer", {}).items()}
    if device.type == "cpu" and len(s) > 1024:
        model.set_attn_implementation("sdpa")               # eager keeps (heads, T, T) a layer for L_recon's backward pass: 20 GB at 3,000 tokens
    if args.lam < 1:
        ae = find_ae(args.ae, before, d, args.model).to(device)                                      # (1, d) fp32, not trained
        opening = rows[0][:rows[0].index(-1)] + slot + [-1 - k]                                      # ... [BE] [AE]
        recon_ids, recon_target = torch.tensor([opening + s[:-1]], device=device), torch.tensor(s, device=device)

    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="[BE] distil", dynamic_ncols=True)
    for step in bar:
        per_epoch = len(train) // args.batch                                                         # the order depends on seed and step alone: a resumed run sees the same
        order = random.Random(f"{args.seed} {step // per_epoch}").sample(train, len(train))
        part = order[step % per_epoch * args.batch:][:args.batch]
        lr = args.lr * min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        # a copy of [BE] for each query, and one for L_recon, so that the backward pass leaves each one's own gradient
        n = args.batch + 1
        copies = be.repeat(n, 1).requires_grad_()                                                    # (n k, d)
        inputs = [[t - k * j if t < 0 else t for t in rows[i]] for j, i in enumerate(part)]          # query j reads copy j
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and dtype == torch.bfloat16):
            hidden = answer_hidden(model, inputs, [answers[i] for i in part], copies)                # (sum T, d)
            target = torch.cat([teacher_hidden[i] for i in part]).to(hidden)                         # (sum T, d)
            kd = token_loss(hidden, weight, target, args.tau)
            loss = args.lam * kd
            history.append({"step": step, "L_KD": kd.item()})
            if args.lam < 1 and step % args.recon_every == 0:
                hidden = body(inputs_embeds=embed(model, recon_ids, torch.cat([copies[-k:], ae])), use_cache=False).last_hidden_state[0, -len(s):]
                recon = token_loss(hidden, weight, recon_target)
                loss = loss + (1 - args.lam) * args.recon_every * recon
                history[-1]["L_recon"] = recon.item()
        if not math.isfinite(loss.item()):
            fail(f"the loss is {loss.item()} in step {step}; the last good vector, if any, is in {args.out}; use a smaller --lr")
        loss.backward()
        grads = copies.grad.view(n, k, d)
        o, own = optimizer, grads[:-1]                                                               # own (B, k, d): L_recon is no sample of the queries' spread
        o["first"].lerp_(grads.sum(0), 0.1)
        o["second"].lerp_(grads.sum(0) ** 2, 0.001)
        o["whole"].lerp_(torch.einsum("bki,bkj->kij", own, own), 0.01)
        if step < 10 or step % 10 == 0:
            o["root"] = inverse_root(o["whole"] / (1 - 0.99 ** (step + 1)))                          # (k, d, d)
        mean = o["first"] / (1 - 0.9 ** (step + 1))                                                  # (k, d)
        adam = mean / ((o["second"] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        move = (o["root"] @ mean[..., None])[..., 0]
        be -= lr * move * adam.norm() / (move.norm() + 1e-12)                                   # the whole matrix gives the direction, Adam the length

        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            kl, _, tokens = measure(held, rows, be).sum(0).tolist()
            history[-1]["held-out KL"] = kl / tokens
            if kl / tokens < best["kl"]:
                best = {"kl": kl / tokens, "step": step + 1, "vector": be.cpu().clone()}
            save_artifact(args.out, artifact := {
                "kind": "be", "stage": "kd", "vector": best["vector"], "layout": layout, "prompt": prompt, "step": step + 1, "config": vars(args),
                "model": {"name": args.model, "revision": getattr(model.config, "_commit_hash", None), "fingerprint": before, "d": d},
                "metrics": {"held_out_kl": best["kl"], "held_out_gap_closed": 1 - best["kl"] * tokens / base[0].item(), "n": n_held}, "history": history, "start": start,
                "best": best, "last": be.cpu(), "optimizer": optimizer,
                "versions": {"nanobe": VERSION, "torch": str(torch.__version__), "transformers": transformers.__version__}})
        bar.set_postfix(L_KD=f"{kd.item():.3f}", **({"held_out_KL": f"{best['kl']:.4f}", "gap_closed": f"{1 - best['kl'] * base[2].item() / base[0].item():.3f}"} if best["step"] else {}))
    bar.close()

    # the table of controls
    vector = best["vector"].to(device)
    noise = (table.mean(0) + table.std(0) * torch.randn(k, d)).to(device)
    plural = "s" * (k > 1)
    controls = {"full prompt": (full, no_vector), f"[BE], {k} vector{plural}": (rows, vector), "no prompt (empty slot)": (none, no_vector),
                "no system block at all": ([layout_ids(tokenizer, "block", [], t) for t in ask], no_vector), "default system prompt": ([chat_ids(tokenizer, t) for t in ask], no_vector),
                f"random vector{plural}": (rows, noise), f"prompt cut to {k} token{plural}": ([layout_ids(tokenizer, layout, s[:k], t) for t in ask], no_vector)}
    scores = {name: measure(test, inputs, learned) for name, (inputs, learned) in controls.items()}
    draws = torch.randint(len(test), (1000, len(test)), generator=torch.Generator().manual_seed(0)) # bootstrap over queries
    table = {}
    print(f"\n{len(test)} {'test' if test_queries else 'held-out'} queries, {int(scores['no prompt (empty slot)'][:, 2].sum())} answer tokens; 95% interval over queries\n")
    print(f"{'':24s}{'KL':>8s}{'top-1':>8s}{'gap closed':>12s}{'95%':>18s}{'tokens fed':>12s}")
    for name, x in scores.items():
        inputs = controls[name][0]
        gap = 1 - x[draws, 0].sum(1) / scores["no prompt (empty slot)"][draws, 0].sum(1)
        table[name] = {"kl": (x[:, 0].sum() / x[:, 2].sum()).item(), "top1": (x[:, 1].sum() / x[:, 2].sum()).item(),
                       "gap_closed": 1 - (x[:, 0].sum() / scores["no prompt (empty slot)"][:, 0].sum()).item(), "gap_closed_95": gap.quantile(torch.tensor([0.025, 0.975])).tolist(),
                       "tokens": sum(len(inputs[i]) for i in test) / len(test), "n": len(test)}
        print("{:24s}{kl:8.4f}{top1:8.1%}{gap_closed:12.3f}{:>18s}{tokens:12.0f}".format(name, "{:.3f} to {:.3f}".format(*table[name]["gap_closed_95"]), **table[name]))
    if "optimizer" in artifact:
        artifact["metrics"]["controls"] = table
        del artifact["optimizer"]                                                                    # megabytes, and the run is done
        save_artifact(args.out, artifact)
        plot(Path(args.out).with_suffix(".kd.png"), history, f"stage 2: {Path(args.prompt).name}")
    assert fingerprint(model) == before, "the frozen model has changed"
    print(f"\nwrote {args.out}: {be.numel()} trained numbers, the best on held-out queries, of step {best['step']}; every weight of the model is as it was\n"
          f'next: python infer.py --be {args.out} --query "{test_queries[0] if test_queries else queries[0]}" --compare')


if __name__ == "__main__":
    main()
