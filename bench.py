"""Speed and memory: training against a naive recipe, and serving with [BE] against the full prompt. Every pair alternates in one run on one machine.

    1  time to quality: seconds until 0.5 of the held-out gap is closed, stage2_kd.py against the naive recipe            19 minutes
    2  tokens a second of a stage-2 step, against a bare forward and input-gradient pass of the same frozen body           2
    3  peak memory of a stage-2 step, loss in chunks against full logits                                                   2
    4  tokens a second of the teacher's answers, prompt encoded once against once a query                                  4
    5  time to first token, throughput and KV memory, full prompt against [BE]                                             4
    6  many prompts trained together, against a run for each                                                              11
    7  stage 0 with two processes against one, a thread each                                                               3

    python bench.py                          # all of it, about 45 minutes on two slow cores -> results/bench.json, bench-quality.png, bench-ttft.png
    python bench.py --only 2 3               # these alone; what the file has is not measured again unless --again is given
    python bench.py --quick --out /tmp/b.json                                     # does it run? its numbers are too few to mean anything
    python bench.py --model Qwen/Qwen3-4B-Instruct-2507 --out results/bench-gpu.json

Reads   the prompts, and NAME.queries.txt beside --prompt. Runs the stage scripts beside this file by their own command lines, in a temporary folder.
Writes  --out, after each item: its settings, the machine, and for each figure the median, the range and n. Figures of different runs are never averaged.
"""
import argparse
import contextlib
import copy
import functools
import importlib.util
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import jinja2
import safetensors
import torch
import transformers

HERE = Path(__file__).resolve().parent
PROMPTS = ["prompts/pirate.txt", "prompts/gsm8k_8shot.json", "prompts/styleguide.txt"]


def settings():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--only",          default=[*ITEMS], nargs="+", type=int, choices=[*ITEMS], help="the items to measure")
    add("--out",           default="results/bench.json",  help="figures; items that are there, with the same settings, are not measured again")
    add("--again",         action="store_true",           help="measure them again")
    add("--quick",         action="store_true",           help="one small measurement of each, to see that it runs")
    add("--model",         default="models/smollm2-135m", help="hub name or local folder of a Llama or Qwen chat model")
    add("--prompt",        default=PROMPTS[0],            help="of items 1 to 3: a role, with its questions in NAME.queries.txt")
    add("--prompts",       default=PROMPTS, nargs="+",    help="of item 4 (the first two), 5 (all), 6 and 7 (pieces of the last): from short to long")
    add("--repeats",       default=3,    type=number(int, 1),      help="alternating pairs for each figure of items 3, 4, 5 and 7; item 2 takes four times as many")
    add("--batch",         default=16,   type=number(int, 1),      help="of items 2 and 3: queries a step")
    add("--answer-tokens", default=32,   type=number(int, 1),      help="of items 1, 2 and 4: the teacher's answers are cut here")
    add("--steps",         default=300,  type=number(int, 1),      help="of item 1: stage 2's --steps, which set its schedule; it is stopped at --target")
    add("--target",        default=0.5,  type=number(float, 0, 1), help="of item 1: the held-out gap to close")
    add("--naive-lr",      default=[0.01, 0.03, 0.1], nargs="+", type=number(float, 0), help="of item 1: learning rates to try; the best after --naive-tune steps goes on")
    add("--naive-tune",    default=30,   type=number(int, 1),      help="of item 1: see --naive-lr; the steps of the best rate count as its own")
    add("--naive-minutes", default=11.0, type=number(float, 0),    help="of item 1: the naive recipe stops here if it has not reached --target")
    add("--seed",          default=0,    type=int,                 help="of start vectors and the order of queries")
    add("--device",        default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: CUDA, then MPS, then CPU")
    add("--dtype",         default="auto", choices=["auto", "bf16", "fp32"],       help="of the frozen weights")
    add("--trust-remote-code", action="store_true", help="run the model code that a hub repository ships; off: none but that of transformers")
    add("--memory-of",     default="", choices=["", "chunks", "full"], help="item 3's own child process: one step of this kind, its memory on the last line")
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
def load_frozen(name, device, dtype, attention, trust=False):
    """The frozen chat model and its tokenizer. name: hub name or folder; trust: run the code that it ships. Exits with one line if there is no such model or it is no chat model."""
    if name == "models/smollm2-135m" and not Path(name, "config.json").exists():
        fail(f"the default model is not at {name} yet; fetch it once with: python models/prepare.py")
    try:
        transformers.utils.logging.disable_progress_bar()
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attention, trust_remote_code=trust)
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
    """tau^2 KL(target || softmax(h W^T / tau)) of each token, in chunks: no (T, V) tensor outlives its chunk.

    The head is frozen, so the gradient with respect to h is all that the backward pass needs: (T, d) numbers, made in the forward pass while the chunk's
    logits are still there. d/dh of tau^2 KL is tau (softmax(z/tau) - target) W.
    """
    @staticmethod
    def forward(ctx, hidden, weight, target, tau, chunk):
        losses, grad = [], torch.empty_like(hidden)
        for i in range(0, len(hidden), chunk):
            logp = torch.log_softmax((hidden[i:i + chunk] @ weight.T).float() / tau, -1)            # (c, V)
            t = target[i:i + chunk]
            if t.dtype == torch.int64:                                      # a token id: its one-hot distribution, KL is the negative log-likelihood
                losses.append(-logp.gather(1, t[:, None])[:, 0])
                delta = logp.exp_().scatter_add_(1, t[:, None], -torch.ones_like(t[:, None], dtype=logp.dtype))
            else:                                                           # the teacher's last hidden state: its logits are one product away
                logq = torch.log_softmax((t @ weight.T).float() / tau, -1)
                q = logq.exp()
                losses.append(tau ** 2 * (q * (logq - logp)).sum(-1))
                delta = logp.exp_().sub_(q).mul_(tau)
            grad[i:i + chunk] = delta.to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, outer):
        return ctx.saved_tensors[0] * outer[:, None].to(ctx.saved_tensors[0].dtype), None, None, None, None


def token_loss(hidden, weight, target, tau=1.0, chunk=128):
    """The loss of each token. hidden (T, d); weight (V, d), the head; target (T,) token ids, or (T, d) teacher hidden states -> (T,) fp32, in nats."""
    return TokenLoss.apply(hidden, weight, target, tau, chunk)
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
        json.dumps(messages, ensure_ascii=False).encode()                   # a lone surrogate is no text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
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
    if not ids:
        fail("--prompt: this model has no token for any of its characters; give a prompt of plain text")
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
# --- end shared ----------------------------------------------------------


# --- shared: answer_hidden -----------------------------------------------
def answer_hidden(model, rows, answers, learned):
    """The last hidden states that predict the answers' tokens. rows: lists of ids with slots; learned (n, d) -> (sum of T, d).

    Padded on the right: attention looks back only, so no token of a row sees a pad; no mask is needed, and positions are right as they come.
    """
    full = [row + answer[:-1] for row, answer in zip(rows, answers)]
    width = max(map(len, full))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in full], device=model.device)             # (B, w)
    hidden = model.get_decoder()(inputs_embeds=embed(model, ids, learned), use_cache=False).last_hidden_state                # (B, w, d)
    return torch.cat([h[len(r) - 1:len(r) - 1 + len(a)] for h, r, a in zip(hidden, rows, answers)])
# --- end shared ----------------------------------------------------------


# --- shared: evaluate ----------------------------------------------------
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
# --- end shared ----------------------------------------------------------


# --- what they are measured against

@torch.no_grad()
def plain(model, rows, learned, limit):
    """Greedy decoding with nothing shared: every row encodes all of its own ids. rows may hold slots. Yields (ids (B, 1), logits (B, V)) for each new token."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=model.device)             # (B, w)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=model.device)
    embeds, cache = embed(model, ids, learned), None
    for _ in range(limit):
        position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -embeds.shape[1]:]
        out = model(inputs_embeds=embeds, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        ids = logits.argmax(-1, keepdim=True)
        yield ids, logits
        embeds, mask = model.get_input_embeddings()(ids), torch.cat([mask, torch.ones_like(ids)], 1)


def full_loss(z, z_teacher, tau):
    """tau^2 KL of each token, the plain way: all logits at once. z, z_teacher (T, V) -> (T,)"""
    logp, logq = torch.log_softmax(z.float() / tau, -1), torch.log_softmax(z_teacher.float() / tau, -1)
    return tau ** 2 * (logq.exp() * (logq - logp)).sum(-1)


def naive(model, full, rows, stop, limit, start, lr, seed, every, tau=2.0):
    """The naive recipe. At each visit one query: the teacher answers it again with the whole prompt, the student reads the answer, logits of every position are made.

    full, rows: what teacher and student read before the answer; start (1, d). The vector is bf16. Yields (seconds of training so far, step, vector) every so many steps.
    """
    be = torch.nn.Parameter(start.to(model.device, torch.bfloat16))
    optimizer, rng = torch.optim.AdamW([be], lr=lr, weight_decay=0), random.Random(seed)
    seconds, step, stop = 0.0, 0, set(stop.tolist())
    while True:
        began = clock(model.device)
        for _ in range(every):
            i, answer, z_teacher = rng.randrange(len(rows)), [], []
            for token, z in plain(model, [full[i]], start.to(model.device), limit):
                answer.append(token.item())
                z_teacher.append(z)
                if answer[-1] in stop:
                    break
            ids = torch.tensor([rows[i] + answer[:-1]], device=model.device)                        # (1, T)
            with autocast(model):
                z = model(inputs_embeds=embed(model, ids, be), use_cache=False).logits[0, len(rows[i]) - 1:]
                loss = full_loss(z, torch.cat(z_teacher), tau).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds, step = seconds + clock(model.device) - began, step + every
        yield seconds, step, be.detach().float()


def kd_step(model, rows, answers, target, be, optimizer, full=False, tau=2.0):
    """One step of stage 2's loop: every row in one pass, L_KD, the gradient of be, the optimizer. full=True makes the logits of all tokens at once."""
    weight, learned = model.get_output_embeddings().weight, be.detach().requires_grad_()
    with autocast(model):
        hidden = answer_hidden(model, rows, answers, learned)                                       # (sum T, d)
        target = target.to(hidden)
        losses = full_loss(hidden @ weight.T, target @ weight.T, tau) if full else token_loss(hidden, weight, target, tau)
    losses.mean().backward()
    be.grad = learned.grad
    optimizer.step()
    return losses.mean().item()


# --- measuring

def clock(device):
    """Seconds, when all that was asked of the device is done."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def autocast(model):
    return torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda" and model.dtype == torch.bfloat16)


def resident(device, reset=False):
    """(bytes held now, the most that was held since the last reset): of the allocator on CUDA, else of this process. getrusage's peak would be the parent's where that is larger."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak, peak
    if reset:
        with contextlib.suppress(OSError):                                                           # not allowed in every container; then loading may hide a small step
            Path("/proc/self/clear_refs").write_text("5")
    kilobytes = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+)", status.read_text(), re.M))
    return 1024 * int(kilobytes["VmRSS"]), 1024 * int(kilobytes["VmHWM"])


def stats(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def pair(what, unit, values, better):
    """A figure measured in alternating pairs. values: {name: its values, in the order of the pairs}, two of them. ratio: by how much the first is better."""
    (_, a), (_, b) = values.items()
    ratio = [x / y if better == "high" else y / x for x, y in zip(a, b)]
    return {"what": what, "unit": unit, "better": better, **{name: stats(v) for name, v in values.items()}, "ratio": stats(ratio)}


def alternate(device, runs, repeats, warm=1):
    """runs: {name: function of the pair's number}. All in turn, the order turned round each time, `warm` times unmeasured -> {name: [(seconds, what the function returned), ...]}"""
    found = {name: [] for name in runs}
    for n in range(warm):
        for run in runs.values():
            run(n)
    for n in range(repeats):
        for name in list(runs)[::1 if n % 2 == 0 else -1]:
            began = clock(device)
            result = runs[name](n)
            found[name].append((clock(device) - began, result))
    return found


def watch(command, threads=0):
    """Run a command line from this folder; yields (seconds since its start, a line or one state of a progress bar). Left early, it is stopped by SIGTERM."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads or torch.get_num_threads()), "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "0"}
    began, tail = time.perf_counter(), b""
    child = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    last, done = [], False
    try:
        while chunk := os.read(child.stdout.fileno(), 65536):
            *whole, tail = re.split(rb"[\r\n]+", tail + chunk)
            for text in [*whole, tail]:                                                              # a bar's state ends with the next one's start: the tail is yielded as it stands
                yield time.perf_counter() - began, text.decode(errors="replace")
            last = [*last, *(x.decode(errors="replace") for x in whole if x)][-3:]
        done = True
        if child.wait() != 0:
            fail(f"{Path(command[0]).name} failed ({child.returncode}); its last lines: {' | '.join(last)}", code=1)
        yield time.perf_counter() - began, ""
    finally:
        if not done:
            child.terminate()
            try:
                child.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                child.kill()
                child.communicate()


def bar_stamps(pieces, name):
    """{steps done: seconds at which the progress bar of this name first showed them}"""
    stamps = {}
    for seconds, text in pieces:
        if found := re.match(re.escape(name) + r": +\d+%.*?\| (\d+)/\d+ \[", text):
            stamps.setdefault(int(found[1]), seconds)
    return stamps


def teacher_seconds(pieces):
    """The seconds between the teacher's progress bar and its line of result, summed over prompts."""
    total, began = 0.0, None
    for seconds, text in pieces:
        if text.startswith("teacher:") and "answers found" in text:
            total, began = total + (seconds - began if began is not None else 0), None
        elif text.startswith("teacher:") and "%|" in text and began is None:
            began = seconds
    return total


def reached(curve, target):
    """The first point of [(seconds, step, gap closed), ...] at which the gap closed is at least the target, or None."""
    return next((point for point in curve if point[2] >= target), None)


def kv_bytes(config, tokens, size):
    """Bytes of keys and values that one sequence keeps: two of (kv heads, tokens, head size) a layer, `size` bytes a number."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * tokens * size


def cut(messages, pieces):
    """The words of a prompt in so many pieces of like size, each at least a word."""
    words = " ".join(m["content"] for m in messages).split()
    words *= math.ceil(pieces / len(words))
    return [" ".join(words[i * len(words) // pieces:(i + 1) * len(words) // pieces]) for i in range(pieces)]


def machine(device, dtype, attention):
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M) if Path("/proc/cpuinfo").exists() else None
    return {"cpu": cpu[1] if cpu else platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type, "dtype": str(dtype)[6:], "attention": attention,
            "python": platform.python_version(), "torch": str(torch.__version__), "transformers": transformers.__version__}


# --- the items; each returns its rows

def examples(c, path, count):
    """A prompt and the first `count` questions (from the start again where they are fewer) -> what is fed before the answer: full rows, rows with [BE]."""
    tokenizer, messages = c.load()[1], read_prompt(path)
    turns = [[{"role": "user", "content": c.queries[i % len(c.queries)]}] for i in range(count)]
    return [chat_ids(tokenizer, messages + t) for t in turns], [layout_ids(tokenizer, "chat", [-1], t) for t in turns]


def noise(model, seed):
    """Stage 2's random start: at the mean of the embedding table, at its scale -> (1, d) fp32."""
    table = model.get_input_embeddings().weight.detach().float().cpu()
    return table.mean(0) + table.std(0) * torch.randn(1, table.shape[1], generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def attention_for(c, tokens):
    """Eager attention over more than 1,024 tokens is slow on a CPU and keeps (heads, T, T): SDPA there, as in stage 2. Yields the name of what is used."""
    model = c.load()[0]
    name = "sdpa" if c.device.type == "cpu" and tokens > 1024 else c.attention
    model.set_attn_implementation(name)
    yield name
    model.set_attn_implementation(c.attention)


def time_to_quality(c):
    """Item 1. Looking at the held-out queries is counted for neither; starting, loading the model and answering the held-out queries is counted for ours only."""
    args, (model, tokenizer), every, rows = c.args, c.load(), 10, []
    (c.folder / "p.json").write_text(json.dumps({"messages": read_prompt(args.prompt)}))             # alone: no test questions, they are no part of training
    (c.folder / "p.queries.txt").write_text("\n".join(c.queries))
    out, ours, seen = c.folder / "be.pt", [], None
    pieces = watch([HERE / "stage2_kd.py", "--prompt", c.folder / "p.json", "--out", out, "--init", "random", "--lam", 1, "--held-out", 0.15, "--answer-tokens", args.answer_tokens,
                    "--eval-every", every, "--steps", args.steps, *c.common])
    heard = []
    for seconds, text in pieces:
        heard.append((seconds, text))
        if out.exists() and out.stat().st_mtime_ns != seen:                                          # saved right after each look at the held-out queries
            seen, a = out.stat().st_mtime_ns, torch.load(out, weights_only=True)
            step = max(row["step"] + 1 for row in a["history"] if "held-out KL" in row)
            if not ours or step > ours[-1][1]:
                ours.append((seconds, step, a["metrics"]["held_out_gap_closed"]))
        if reached(ours, args.target):
            break
    pieces.close()
    if not ours:
        fail("item 1: stage2_kd.py ended without a look at the held-out queries; expected one every 10 steps, so --steps must be at least 10", code=1)

    # the same held-out queries, and the teacher's answers to them; not counted for the naive recipe
    order = list(c.queries)
    random.Random(args.seed).shuffle(order)
    turns = [[{"role": "user", "content": q}] for q in order]
    full, be_rows = [chat_ids(tokenizer, read_prompt(args.prompt) + t) for t in turns], [layout_ids(tokenizer, "chat", [-1], t) for t in turns]
    n = min(32, max(1, round(len(order) * 0.15)))
    held = {i: (answer, hidden) for i, answer, hidden in generate(model, full[:n], c.stop, args.answer_tokens)}
    answers, hidden, looking = [held[i][0] for i in range(n)], [held[i][1] for i in range(n)], []

    def kl(fed, vector):
        began = clock(c.device)
        total, _, tokens = evaluate(model, fed, answers, hidden, vector.to(c.device)).sum(0).tolist()
        looking.append(clock(c.device) - began)
        return total / tokens

    none = kl([layout_ids(tokenizer, "chat", [], t) for t in turns[:n]], noise(model, 0))
    check = 1 - kl(be_rows[:n], a["vector"]) / none                                                  # the two sides must mean the same by gap closed
    runs = {lr: naive(model, full[n:], be_rows[n:], c.stop, args.answer_tokens, noise(model, args.seed), lr, args.seed, every) for lr in args.naive_lr}
    curves = {lr: [] for lr in runs}

    def go_on(lr, steps):
        curve = curves[lr]
        while not reached(curve, args.target) and (not curve or curve[-1][1] < steps and curve[-1][0] < 60 * args.naive_minutes):
            seconds, step, vector = next(runs[lr])
            gap = 1 - kl(be_rows[:n], vector) / none
            curve.append((seconds, step, max([gap if math.isfinite(gap) else -math.inf, *(p[2] for p in curve[-1:])])))      # the best so far, as stage 2 keeps it
            print(f"naive, lr {lr}: step {step}, {seconds:.0f} s, gap closed {curve[-1][2]:.3f}", flush=True)

    for lr in runs:
        go_on(lr, args.naive_tune)
    best = max(curves, key=lambda lr: curves[lr][-1][2])
    go_on(best, math.inf)
    look = statistics.median(looking)
    ours = [(seconds - (i + 2) * look, step, gap) for i, (seconds, step, gap) in enumerate(ours)]    # one look before the first step, one at each point
    own = {"held_out_gap_closed_here": check, "teacher_seconds": teacher_seconds(heard), "batch": a["config"]["batch"], "lr": a["config"]["lr"]}
    for name, curve, more in [("ours", ours, own),
                              *((f"naive, lr {lr}", curves[lr], {"batch": 1, "lr": lr, "chosen": lr == best}) for lr in curves)]:
        end = reached(curve, args.target) or curve[-1]
        rows.append({"what": name, "reached": end[2] >= args.target, "seconds": end[0], "step": end[1], "gap_closed": end[2], **more, "n": 1, "curve": curve})
    by = (reached(curves[best], args.target) or curves[best][-1])[0] / (reached(ours, args.target) or ours[-1])[0]
    rows.append({"what": "all", "target": args.target, "naive_seconds_by_ours": by,
                 "ours_reached": bool(reached(ours, args.target)), "naive_reached": bool(reached(curves[best], args.target)),
                 "evaluation_seconds_each_not_counted": stats(looking), "held_out_queries": n, "kl_no_prompt": none})
    return rows


def step_throughput(c):
    """Item 2. Tokens are those that the rows hold, pads not counted: the bound runs the same number, in as many rows of one length."""
    args, (model, _), sizes = c.args, c.load(), 1 if c.args.quick else 2
    full, be_rows = examples(c, args.prompt, sizes * args.batch)
    said = {i: (answer, hidden) for i, answer, hidden in generate(model, full, c.stop, args.answer_tokens)}
    be = torch.nn.Parameter(noise(model, args.seed).to(c.device))
    optimizer = torch.optim.AdamW([be], lr=1e-3, weight_decay=0)
    body, batches = model.get_decoder(), []
    for n in range(sizes):
        part = range(n * args.batch, (n + 1) * args.batch)
        rows, answers = [be_rows[i] for i in part], [said[i][0] for i in part]
        tokens = sum(len(r) + len(a) - 1 for r, a in zip(rows, answers))
        ids = torch.randint(model.config.vocab_size, (args.batch, math.ceil(tokens / args.batch)), generator=torch.Generator().manual_seed(n)).to(c.device)
        batches.append((rows, answers, torch.cat([said[i][1] for i in part]), tokens, model.get_input_embeddings()(ids)))

    def step(n):
        rows, answers, target, tokens, _ = batches[n % sizes]
        kd_step(model, rows, answers, target, be, optimizer)
        return tokens

    def bound(n):
        *_, tokens, embeds = batches[n % sizes]
        with autocast(model):
            hidden = body(inputs_embeds=embeds.requires_grad_(), use_cache=False).last_hidden_state
        torch.autograd.grad(hidden, embeds, torch.ones_like(hidden))
        return tokens

    found = alternate(c.device, {"stage 2 step": step, "bare body": bound}, 4 * args.repeats, warm=sizes)
    row = pair("training step", "tokens a second", {name: [tokens / s for s, tokens in v] for name, v in found.items()}, "high")
    return [row | {"batch": args.batch, "tokens": [b[3] for b in batches], "padded_tokens": [len(b[0]) * max(len(r) + len(x) - 1 for r, x in zip(b[0], b[1])) for b in batches],
                   "answer_tokens": [sum(map(len, b[1])) for b in batches]}]


def memory_child(args):
    """One step of stage 2 with answers of 128 tokens in this fresh process, and what memory it took; the answers are random, which takes as much."""
    c = context(args, None)
    model, _ = c.load()
    _, be_rows = examples(c, args.prompt, args.batch)
    rng, d = torch.Generator().manual_seed(args.seed), model.get_input_embeddings().weight.shape[1]
    length = 16 if args.quick else 128
    answers = torch.randint(model.config.vocab_size, (args.batch, length), generator=rng).tolist()
    target = torch.randn(args.batch * length, d, generator=rng).to(c.device, model.dtype)
    be = torch.nn.Parameter(noise(model, args.seed).to(c.device))
    optimizer = torch.optim.AdamW([be], lr=1e-3, weight_decay=0)
    kd_step(model, be_rows[:1], [answers[0][:1]], target[:1], be, optimizer)                         # the weights are mapped from their file: now they are all in memory
    before, started_at = resident(c.device, reset=True)
    kd_step(model, be_rows, answers, target, be, optimizer, full=args.memory_of == "full")
    print(json.dumps({"before": before, "peak_before": started_at, "peak": resident(c.device)[1], "answer_tokens": length}))


def memory(c):
    """Item 3. Peak memory of the process (CPU) or of the allocator (CUDA), less what was there before the step, in a fresh process each."""
    def child(kind):
        return lambda n: json.loads([text for _, text in watch([HERE / "bench.py", "--memory-of", kind, "--prompt", c.args.prompt, "--batch", c.args.batch, *c.common,
                                                                *["--quick"] * c.args.quick]) if text.startswith('{"before"')][-1])
    found = {name: [x for _, x in v] for name, v in alternate(c.device, {"chunks": child("chunks"), "full logits": child("full")}, c.args.repeats, warm=0).items()}
    more = {"batch": c.args.batch, "answer_tokens": found["chunks"][0]["answer_tokens"]}
    return [pair("memory of a training step", "bytes", {name: [max(4096, x["peak"] - x["before"]) for x in v] for name, v in found.items()}, "low") | more,
            pair("peak memory of the process", "bytes", {name: [x["peak"] for x in v] for name, v in found.items()}, "low") | more
            | {"peak_before_the_step": max(x["peak_before"] for v in found.values() for x in v)}]


def teacher_pass(c):
    """Item 4. Nobody stops early, so both make as many tokens a query. The rate without a cache does not depend on the number of queries: one batch of them is timed."""
    args, (model, _), rows = c.args, c.load(), []
    count, limit = (4, 4) if args.quick else (16, args.answer_tokens)
    for path in args.prompts[:2]:
        full, _ = examples(c, path, count)
        n = min(len(os.path.commonprefix(full)), min(map(len, full)) - 1)
        size = max(1, min(32, count, 16000 // (n + limit)))                                          # as in generate
        empty, prefix = torch.tensor([], dtype=torch.int64), torch.tensor([full[0][:n]], device=c.device)

        def cached(_):
            return sum(len(answer) for _, answer, _ in generate(model, full, empty, limit))

        def uncached(_):
            return sum(ids.numel() for ids, _ in plain(model, full[:size], noise(model, 0).to(c.device), limit))

        def once(_):
            with torch.no_grad():
                model.get_decoder()(input_ids=prefix, use_cache=True)

        with attention_for(c, n) as attention:
            found = alternate(c.device, {"prefix cache": cached, "no cache": uncached, "prefix": once}, args.repeats if n <= 1024 else max(1, args.repeats - 1), warm=0)
        seconds = found.pop("prefix")
        rows.append(pair("teacher's answers", "tokens a second", {name: [tokens / s for s, tokens in v] for name, v in found.items()}, "high")
                    | {"prompt_tokens": n, "queries": count, "batch": size, "answer_tokens": limit, "attention": attention, "seconds_for_the_prefix": stats([s for s, _ in seconds])})
    return rows


def serving(c):
    """Item 5. Nothing is shared between the sequences of a batch, as in a server without a prefix cache."""
    args, (model, _), rows = c.args, c.load(), []
    new, vector = 4 if args.quick else 16, noise(model, args.seed).to(c.device)

    def serve(fed):
        def run(_):
            began, first = clock(c.device), None
            for _ in plain(model, fed, vector, new):
                first = first or clock(c.device) - began
            return first
        return run

    def held(row):
        with torch.no_grad():
            cache = model.get_decoder()(inputs_embeds=embed(model, torch.tensor([row], device=c.device), vector), use_cache=True).past_key_values
        return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))

    for path in args.prompts:
        for batch in (1, 2) if args.quick else (1, 8):
            full, be_rows = examples(c, path, batch)
            more = {"prompt_tokens": len(full[0]) - len(be_rows[0]) + 1, "batch": batch, "new_tokens": new}
            with attention_for(c, len(full[0])) as attention:
                found = alternate(c.device, {"[BE]": serve(be_rows), "full prompt": serve(full)},
                                  args.repeats if batch == 1 else max(1, args.repeats - 1), warm=batch == 1 and not args.quick)
                if batch == 1:
                    saved = held(full[0]) - held(be_rows[0])
                    computed = kv_bytes(model.config, len(full[0]) - len(be_rows[0]), model.dtype.itemsize)
                    rows.append({"what": "KV memory saved a sequence", "unit": "bytes", "computed": computed, "in the cache": saved, "prompt_tokens": more["prompt_tokens"], "n": 1})
            rows.append(pair("time to first token", "seconds", {name: [first for _, first in v] for name, v in found.items()}, "low") | more | {"attention": attention})
            rows.append(pair("throughput", "new tokens a second", {name: [batch * new / s for s, _ in v] for name, v in found.items()}, "high") | more | {"attention": attention})
    return rows


def many_prompts(c):
    """Item 6. Runs of stage 2 alone and together, in turn. Alone, b prompts take the sum of their runs."""
    args, rows, alone = c.args, [], []
    count, steps, limit, queries = (4, 4, 4, 8) if args.quick else (16, 12, 16, 16)
    (c.folder / "q.txt").write_text("\n".join(c.queries[:queries]))
    for i, text in enumerate(cut(read_prompt(args.prompts[-1]), count)):
        (c.folder / f"{i}.txt").write_text(text)

    def run(numbers):
        out = Path(tempfile.mkdtemp(dir=c.folder))                                                   # an empty folder: no teacher's answers yet
        pieces = list(watch([HERE / "stage2_kd.py", "--init", "random", "--lam", 1, "--queries", c.folder / "q.txt", "--held-out", 0.25, "--answer-tokens", limit,
                             "--steps", steps, "--eval-every", steps, "--prompt", *(c.folder / f"{i}.txt" for i in numbers), "--out", *(out / f"{i}.pt" for i in numbers), *c.common]))
        stamps = bar_stamps(pieces, "[BE] distil")
        last = max((n for n in stamps if 0 < n < steps), default=steps)                              # before the look at the held-out queries in the last step
        shutil.rmtree(out)
        return {"total": pieces[-1][0], "teacher": teacher_seconds(pieces), "step": (stamps[last] - stamps[0]) / last}

    for b in (1, 4) if args.quick else (1, 4, 16):
        alone += [run([i]) for i in range(len(alone), b)]
        together, apart = run(range(b)), {key: sum(x[key] for x in alone) for key in ("total", "teacher", "step")}
        rows.append({"what": f"{b} prompts", "unit": "seconds", "together": together, "one after the other": apart,
                     "ratio": {key: apart[key] / together[key] for key in apart}, "n": 1, "b": b, "steps": steps, "queries": queries, "answer_tokens": limit})
        print(f"{b} prompts: together {together}, one after the other {apart}", flush=True)
    return rows


def processes(c):
    """Item 7. Stage 0 on texts of 64 tokens, 4 in a pass, 2 passes a step; the first step is left out, and the run is stopped when enough steps are timed."""
    if c.device.type == "cuda" and torch.cuda.device_count() < 2:
        return [{"what": "stage 0", "skipped": "two processes need two GPUs"}]
    words = cut([m for path in c.args.prompts for m in read_prompt(path)], 1)[0].split()
    (c.folder / "texts.jsonl").write_text("".join(json.dumps({"text": " ".join(words[(7 * i + j) % len(words)] for j in range(80))}) + "\n" for i in range(60)))
    steps = 2 if c.args.quick else 4

    def texts(launcher):
        def run(_):
            pieces, out = [], Path(tempfile.mkdtemp(dir=c.folder)) / "ae.pt"
            running = watch([*launcher, HERE / "stage0_ae.py", "--data", c.folder / "texts.jsonl", "--out", out, "--min-tokens", 64, "--max-tokens", 64, "--held-out", 1,
                             "--batch", 4, "--accumulate", 2, "--steps", steps + 3, "--eval-every", steps + 3, *c.common], threads=1)
            for piece in running:
                pieces.append(piece)
                stamps = {n: s for n, s in bar_stamps(pieces, "[AE]").items() if n > 0}
                if stamps and max(stamps) - min(stamps) >= steps:
                    break
            running.close()
            if len(stamps) < 2:
                fail("item 7: stage0_ae.py showed no progress; run it by hand to see why", code=1)
            return 8 * (max(stamps) - min(stamps)) / (stamps[max(stamps)] - stamps[min(stamps)])
        return run

    found = alternate(c.device, {"2 processes": texts(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]), "1 process": texts([])}, c.args.repeats, warm=0)
    return [pair("stage 0", "texts a second", {name: [x for _, x in v] for name, v in found.items()}, "high") | {"tokens a text": 64, "steps": steps, "threads a process": 1}]


# item: function, name, minutes on two slow cores, the settings that its figures depend on
ITEMS = {
    1: (time_to_quality, "time to quality", 19, ["prompt", "answer_tokens", "steps", "target", "naive_lr", "naive_tune", "naive_minutes"]),
    2: (step_throughput, "step throughput", 2, ["prompt", "repeats", "batch", "answer_tokens"]),
    3: (memory, "peak memory", 2, ["prompt", "repeats", "batch"]),
    4: (teacher_pass, "teacher pass", 4, ["prompt", "prompts", "repeats", "answer_tokens"]),
    5: (serving, "serving", 4, ["prompt", "prompts", "repeats"]),
    6: (many_prompts, "many prompts", 11, ["prompt", "prompts"]),
    7: (processes, "two processes", 3, ["prompts", "repeats"]),
}


def show(row):
    """A row of results as a line of text."""
    if "ratio" in row and "median" in row["ratio"]:
        names = [name for name, v in row.items() if isinstance(v, dict) and "median" in v and name not in ("ratio", "seconds_for_the_prefix")]
        where = ", ".join(f"{row[key]} {word}" for key, word in (("prompt_tokens", "tokens of prompt"), ("batch", "a batch"), ("answer_tokens", "answer tokens")) if key in row)
        return (f"{row['what']}" + f" ({where})" * bool(where) + f", {row['unit']}: "
                + ", ".join("{} {:.4g} ({:.4g} to {:.4g})".format(name, row[name]["median"], row[name]["min"], row[name]["max"]) for name in names)
                + "; {:.2f} times as good ({:.2f} to {:.2f}), n = {}".format(*(row["ratio"][key] for key in ("median", "min", "max", "n"))))
    return json.dumps({key: v for key, v in row.items() if key != "curve"})


def save(path, results):
    """Written beside its place and renamed: a run killed here leaves the old file whole."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.tmp").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        os.replace(f"{path}.tmp", path)
    except OSError as e:
        fail(f"--out {path}: cannot be written ({e.strerror}); give another --out")


def plots(path, items):
    """The curves of item 1 and the times to first token of item 5, beside the figures."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    stem = str(Path(path).with_suffix(""))
    if "1" in items:
        fig, ax = pyplot.subplots(figsize=(7, 4))
        for row in items["1"]["rows"][:-1]:
            ax.plot([p[0] for p in row["curve"]], [p[2] for p in row["curve"]], marker=".", label=row["what"])
        ax.axhline(items["1"]["rows"][-1]["target"], color="gray", linewidth=0.5)
        ax.set(xlabel="seconds", ylabel="held-out gap closed", title="time to quality", xscale="log")
        ax.legend()
        fig.savefig(f"{stem}-quality.png", dpi=100, bbox_inches="tight")
        pyplot.close(fig)
    if "5" in items:
        fig, ax = pyplot.subplots(figsize=(7, 4))
        rows = [row for row in items["5"]["rows"] if row["what"] == "time to first token"]
        for batch in dict.fromkeys(row["batch"] for row in rows):
            for name, style in (("full prompt", "-o"), ("[BE]", "--o")):
                part = sorted((row["prompt_tokens"], *(row[name][key] for key in ("median", "min", "max"))) for row in rows if row["batch"] == batch)
                x, y, low, high = zip(*part)
                ax.errorbar(x, y, [[a - b for a, b in zip(y, low)], [b - a for a, b in zip(y, high)]], fmt=style, capsize=3, label=f"{name}, batch {batch}")
        ax.set(xlabel="tokens of prompt", ylabel="seconds to the first token", title="time to first token", yscale="log")
        ax.legend()
        fig.savefig(f"{stem}-ttft.png", dpi=100, bbox_inches="tight")
        pyplot.close(fig)


def context(args, folder):
    """What the items share: settings, device, a folder for what the scripts write, the model once it is asked for, the questions."""
    questions = Path(str(Path(args.prompt).with_suffix("")) + ".queries.txt")
    if not questions.exists():
        fail(f"--prompt {args.prompt}: expected its questions, one a line, in {questions}; write some there")
    device, dtype, attention = pick_device(args.device, args.dtype)
    model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    c = SimpleNamespace(args=args, folder=folder, device=device, dtype=dtype, attention=attention)
    c.common = ["--model", model, "--seed", args.seed, "--device", args.device, "--dtype", args.dtype]              # of the command lines that it runs
    c.queries = list(dict.fromkeys(q.strip() for q in questions.read_text(encoding="utf-8-sig").splitlines() if q.strip()))
    if not c.queries:
        fail(f"{questions}: expected questions, one a line, found none; write some there")

    @functools.cache
    def load():
        model, tokenizer = load_frozen(args.model, device, dtype, attention, args.trust_remote_code)
        ends = model.generation_config.eos_token_id
        c.stop = torch.tensor(ends if isinstance(ends, list) else [ends if ends is not None else tokenizer.eos_token_id])
        return model, tokenizer
    c.load = load
    return c


def main():
    args = settings()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))                          # what it runs is stopped on the way out
    if args.memory_of:
        return memory_child(args)
    if args.quick:
        args.repeats, args.steps, args.naive_tune, args.naive_minutes = 1, min(args.steps, 20), 10, min(args.naive_minutes, 1)
    for path in [args.prompt, *args.prompts]:
        read_prompt(path)
    results = {"items": {}}
    if Path(args.out).exists():
        try:
            results = json.loads(Path(args.out).read_text(encoding="utf-8"))
            old = [x["machine"] for x in results["items"].values() if x["rows"] and x["settings"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            fail(f"--out {args.out}: expected figures of an earlier run, found something else; give another --out")
    with tempfile.TemporaryDirectory() as folder:
        c = context(args, Path(folder))
        here = machine(c.device, c.dtype, c.attention)
        if results["items"] and any(x != here for x in old):
            fail(f"--out {args.out}: its figures come from another machine or other versions ({next(x for x in old if x != here)}); give another --out")
        todo = []
        for item in sorted(set(args.only)):
            _, name, minutes, uses = ITEMS[item]
            wanted = {key: getattr(args, key) for key in ["model", "seed", "quick", *uses]}
            if not args.again and results["items"].get(str(item), {}).get("settings") == wanted:
                print(f"item {item}, {name}: in {args.out} already; --again measures it anew")
            else:
                todo.append((item, name, minutes, wanted))
        if todo and not args.quick:
            print(f"on two slow cores about: {', '.join(f'{name} {minutes} minutes' for _, name, minutes, _ in todo)}; in all {sum(x[2] for x in todo)}", flush=True)
        for item, name, _, wanted in todo:
            print(f"\nitem {item}, {name}", flush=True)
            began, busy = time.perf_counter(), os.getloadavg()[0]
            torch.manual_seed(args.seed)
            rows = ITEMS[item][0](c)
            results["items"][str(item)] = {"name": name, "settings": wanted, "machine": here, "load_before": busy, "seconds": time.perf_counter() - began, "rows": rows}
            results["items"] = dict(sorted(results["items"].items()))
            save(args.out, results)
            plots(args.out, results["items"])
            print("\n".join(map(show, rows)), flush=True)
    print(f"\n{args.out}: items {', '.join(results['items'])}")


if __name__ == "__main__":
    main()
