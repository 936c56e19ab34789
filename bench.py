"""Speed and memory: training against a naive recipe, and serving with [BE] against the full prompt. Every pair alternates in one run on one machine.

    1  time to quality: seconds until 0.5 of the held-out gap is closed, stage2_kd.py against the naive recipe
    2  tokens a second of a stage-2 step, against a bare forward and input-gradient pass of the same frozen body
    3  peak memory of a stage-2 step, small passes and the loss in chunks against one pass with full logits
    4  tokens a second of the teacher's answers, prompt encoded once against once a query
    5  time to first token, throughput and KV memory, full prompt against [BE]
    6  many prompts trained together, against a run for each
    7  stage 0 with two processes against one, a thread each

    python bench.py                          # all of it, about an hour on two slow cores -> results/bench.json, bench-quality.png, bench-ttft.png
    python bench.py --only 2 3               # these alone; what the file has is not measured again unless --again is given
    python bench.py --quick --out /tmp/b.json                                     # does it run? its numbers are too few to mean anything
    python bench.py --model Qwen/Qwen3-4B-Instruct-2507 --out results/bench-gpu.json

Reads   the prompts, and NAME.queries.txt beside --prompt. Runs the stage scripts beside this file by their own command lines, in a temporary folder.
Writes  --out, after each item: its settings, the machine, and for each figure the median, the range and n. Figures of different runs are never averaged.
"""
import argparse
import contextlib
import copy
import ctypes
import io
import json
import math
import operator
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
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
    add("--micro-batch",   default=8,    type=number(int, 1),      help="of items 2 and 3: queries in one pass of ours: the option of stage2_kd.py")
    add("--answer-tokens", default=32,   type=number(int, 1),      help="of items 1, 2 and 4: the teacher's answers are cut here")
    add("--teacher-queries", default=64, type=number(int, 2),      help="of item 4: queries that share one encoded prompt")
    add("--steps",         default=300,  type=number(int, 1),      help="of item 1: stage 2's --steps, which set its schedule; it is stopped at --target")
    add("--target",        default=0.5,  type=number(float, 0, 1), help="of item 1: the held-out gap to close")
    add("--tau",           default=2.0,  type=number(float, 0.01), help="of item 1: the temperature of both recipes' loss")
    add("--naive-lr",      default=[0.01, 0.03, 0.1], nargs="+", type=number(float, 0), help="of item 1: learning rates to try; the first to reach --target counts, or the best after --naive-tune steps goes on")
    add("--naive-tune",    default=40,   type=number(int, 1),      help="of item 1: see --naive-lr; the steps of the best rate count as its own")
    add("--naive-minutes", default=22.0, type=number(float, 0),    help="of item 1: the naive recipe stops here if it has not reached --target")
    add("--seed",          default=0,    type=int,                 help="of start vectors and the order of queries")
    add("--device",        default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: CUDA, then MPS, then CPU")
    add("--dtype",         default="auto", choices=["auto", "bf16", "fp32"],       help="of the frozen weights")
    add("--trust-remote-code", action="store_true", help="run the model code that a hub repository ships; off: none but that of transformers")
    p.error = lambda message: fail(f"{message}; see --help")
    args = p.parse_args()
    if args.quick:
        vars(args).update(repeats=1, batch=4, micro_batch=2, answer_tokens=6, teacher_queries=6, steps=20, naive_tune=5, naive_minutes=0.0)
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


def naive(model, full, rows, stop, limit, start, lr, seed, tau):
    """The naive recipe. At each visit one query: the teacher answers it again with the whole prompt, the student reads the answer, logits of every position are made.

    full, rows: what teacher and student read before the answer; start (1, d). The vector is bf16. Yields it after each step.
    """
    be = torch.nn.Parameter(start.to(model.device, torch.bfloat16))
    optimizer, rng = torch.optim.AdamW([be], lr=lr, weight_decay=0), random.Random(seed)
    while True:
        i, answer, z_teacher = rng.randrange(len(rows)), [], []
        for token, z in plain(model, [full[i]], be.detach(), limit):
            answer.append(token.item())
            z_teacher.append(z)
            if answer[-1] in stop:
                break
        ids = torch.tensor([rows[i] + answer[:-1]], device=model.device)                            # (1, T)
        z = model(inputs_embeds=embed(model, ids, be), use_cache=False).logits[0, len(rows[i]) - 1:]                         # (t, V)
        optimizer.zero_grad()
        full_loss(z, torch.cat(z_teacher), tau).mean().backward()
        optimizer.step()
        yield be.detach().float()


def kd_step(model, rows, answers, targets, be, optimizer, micro, full=False):
    """One step of stage 2's loop in passes of `micro` rows, whose gradients add up: L_KD at tau 2. targets: of soft_target, a pair a row; or full, the teacher's hidden states, and the logits of a pass at once."""
    weight, tokens = model.get_output_embeddings().weight, sum(map(len, answers))
    optimizer.zero_grad()
    for i in range(0, len(rows), micro):
        student = answer_hidden(model, rows[i:i + micro], answers[i:i + micro], be)                 # (sum T, d)
        if full:
            losses = full_loss(student @ weight.T, torch.cat(targets[i:i + micro]).to(student) @ weight.T, 2.0)
        else:
            means, entropies = zip(*targets[i:i + micro])
            losses = token_loss(student, weight, torch.cat(means), 2.0) - torch.cat(entropies)
        (losses.sum() / tokens).backward()
    optimizer.step()


# --- measuring

def clock(device):
    """Seconds, when all that was asked of the device is done."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def rate(device, run):
    """Run it -> (what it returned, a second,)"""
    began = clock(device)
    return (run() / (clock(device) - began),)


def peak_bytes(device, run):
    """Run it -> (the bytes it needed at most beyond those held before, the most bytes held): of the allocator on CUDA, else of this process, as Linux counts it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peak = torch.cuda.max_memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)                                                             # what earlier runs have freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")                                                # the peak counts from here
        before = int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        run()
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    return max(4096, peak - before), peak                                                            # a page at least, for the ratio's sake


def pairs(figures, runs, repeats, warm=0, **more):
    """Measure two runs in alternating pairs -> a row for each figure. runs: {name: function}; each returns a number for each of figures: (what, unit, "high" or "low" is better).

    The order turns round each time; `warm` pairs come before, unmeasured. ratio: by how much the first run is better, pair by pair. more: what else a row is to say.
    """
    found, rows = {name: [] for name in runs}, []
    for n in range(-warm, repeats):
        for name in list(runs)[::1 if n % 2 == 0 else -1]:
            numbers = runs[name]()
            found[name] += [numbers] * (n >= 0)
    for i, (what, unit, better) in enumerate(figures):
        values = {name: [numbers[i] for numbers in v] for name, v in found.items()}
        values["ratio"] = [a / b if better == "high" else b / a for a, b in zip(*values.values())]
        row = {name: {"median": statistics.median(v), "min": min(v), "max": max(v), "n": len(v)} for name, v in values.items()}
        print(f"{what}, {unit}:", "; ".join("{} {median:.4g} ({min:.4g} to {max:.4g}), n = {n}".format(name, **v) for name, v in row.items()), more, flush=True)
        rows.append({"what": what, "unit": unit, "better": better, **row, **more})
    return rows


def saves(command, out, threads=0):
    """Run a script; yields the seconds from its start to each time that it has saved `out`, a new file. Left early (close), the script is stopped."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads or torch.get_num_threads())}
    log, began, seen = Path(f"{out}.log"), time.time(), 0.0
    with log.open("w") as f:
        child = subprocess.Popen([sys.executable, *map(str, command)], stdout=f, stderr=subprocess.STDOUT, env=environment)
    try:
        while True:
            running = child.poll() is None                                                           # asked first: a save after this one is not missed
            if out.exists() and out.stat().st_mtime != seen:
                seen = out.stat().st_mtime
                yield seen - began
            elif running:
                time.sleep(0.005)
            else:
                break
        if child.returncode:
            fail(f"{Path(command[0]).name} failed ({child.returncode}); its last words: {log.read_text()[-300:]}", code=1)
    finally:
        child.terminate()
        child.wait()


def machine(device, dtype, attention):
    """Where the figures come from; those of two machines, or of two versions, do not stand in one file."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text())[:1] if cpuinfo.exists() else []
    return {"cpu": (cpu or [platform.processor()])[0], "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": f"{platform.system()} {platform.machine()}",
            "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type, "dtype": str(dtype)[6:], "attention": attention,
            "python": platform.python_version(), "torch": str(torch.__version__), "transformers": transformers.__version__}


def cut(messages, pieces):
    """The words of a prompt in so many pieces of like size, each at least a word."""
    words = " ".join(m["content"] for m in messages).split()
    words *= math.ceil(pieces / len(words))
    return [" ".join(words[i * len(words) // pieces:(i + 1) * len(words) // pieces]) for i in range(pieces)]


def examples(c, path, count):
    """A prompt and the first `count` questions (from the start again where they are fewer) -> what is fed before the answer: full rows, rows with [BE]."""
    messages, turns = read_prompt(path), [[{"role": "user", "content": c.queries[i % len(c.queries)]}] for i in range(count)]
    return [chat_ids(c.tokenizer, messages + t) for t in turns], [layout_ids(c.tokenizer, "chat", [-1], t) for t in turns]


def teacher(c, full):
    """The teacher's answers to full rows, and the hidden states they came from."""
    said = sorted(generate(c.model, full, c.stop, c.args.answer_tokens), key=lambda x: x[0])
    return [answer for _, answer, _ in said], [hidden for _, _, hidden in said]


def noise(model, seed):
    """Stage 2's random start: at the mean of the embedding table, at its scale -> (1, d) fp32."""
    table = model.get_input_embeddings().weight.detach().float().cpu()
    return (table.mean(0) + table.std(0) * torch.randn(1, table.shape[1], generator=torch.Generator().manual_seed(seed))).to(model.device)


def attend(c, tokens):
    """Eager attention over more than 1,024 tokens is slow on a CPU and keeps (heads, T, T): SDPA there, as in stage 2 -> the name of what is used."""
    name = "sdpa" if c.device.type == "cpu" and tokens > 1024 else c.attention
    c.model.set_attn_implementation(name)
    return name


# --- the items; each returns its rows

def time_to_quality(c):
    """Item 1. Ours pays for all of it: its start, the model, the teacher's answers and the looks at the held-out queries; the naive recipe for its training steps alone."""
    args, every, ours, out = c.args, 5 if c.args.quick else 20, [], c.folder / "be.pt"
    (c.folder / "p.json").write_text(json.dumps({"messages": read_prompt(args.prompt)}))             # alone: no test questions, they are no part of training
    running = saves([HERE / "stage2_kd.py", "--prompt", c.folder / "p.json", "--queries", c.questions, "--out", out, "--init", "random", "--lam", 1, "--held-out", 0.15,
                     "--answer-tokens", args.answer_tokens, "--tau", args.tau, "--eval-every", every, "--steps", args.steps, *c.common], out)
    for seconds in running:
        a = torch.load(out, weights_only=True)
        if not ours or a["step"] > ours[-1][1]:                                                      # the last save, after the table of controls, adds no step
            ours.append((seconds, a["step"], a["metrics"]["held_out_gap_closed"]))
        if ours[-1][2] >= args.target:
            break
    running.close()
    print(f"ours, seconds, steps and gap closed: {ours[-1]}", flush=True)

    # the same held-out queries, and the teacher's answers to them
    random.Random(args.seed).shuffle(c.queries)
    n = min(32, max(1, round(len(c.queries) * 0.15)))
    full, be_rows = examples(c, args.prompt, len(c.queries))
    attend(c, len(full[0]))                                                                          # as stage 2 does
    empty = [[x for x in row if x >= 0] for row in be_rows[:n]]
    answers, hidden = teacher(c, full[:n])

    def kl(rows, vector):
        total, _, tokens = evaluate(c.model, rows, answers, hidden, vector.to(c.device)).sum(0).tolist()
        return total / tokens

    none, start = kl(empty, a["vector"]), noise(c.model, args.seed)
    runs = {lr: naive(c.model, full[n:], be_rows[n:], c.stop.tolist(), args.answer_tokens, start, lr, args.seed, args.tau) for lr in args.naive_lr}
    curves = {lr: [(0.0, 0, 0.0)] for lr in runs}

    def go_on(lr):
        began, (seconds, step, gap) = clock(c.device), curves[lr][-1]
        for _ in range(every):
            vector = next(runs[lr])
        seconds += clock(c.device) - began
        curves[lr].append((seconds, step + every, max(gap, 1 - kl(be_rows[:n], vector) / none)))     # the best so far, as stage 2 keeps it
        print(f"naive, lr {lr}, seconds, steps and gap closed: {curves[lr][-1]}", flush=True)

    for lr in runs:
        while curves[lr][-1][1] < args.naive_tune and curves[lr][-1][2] < args.target:
            go_on(lr)
    best = min(curves, key=lambda lr: (0, curves[lr][-1][0]) if curves[lr][-1][2] >= args.target else (1, -curves[lr][-1][2]))      # the first to get there, else the nearest
    while curves[best][-1][2] < args.target and curves[best][-1][0] < 60 * args.naive_minutes:
        go_on(best)

    rows = [{"what": "ours", "curve": ours, "batch": a["config"]["batch"], "lr": a["config"]["lr"], "held_out_gap_closed_here": 1 - kl(be_rows[:n], a["vector"]) / none}]
    rows += [{"what": f"naive, lr {lr}", "curve": curve, "batch": 1, "lr": lr, "chosen": lr == best} for lr, curve in curves.items()]
    for row in rows:
        row["seconds"], row["step"], row["gap_closed"] = row["curve"][-1]
        row |= {"reached": row["gap_closed"] >= args.target, "n": 1}
    return rows + [{"what": "time to quality", "target": args.target, "naive_seconds_by_ours": curves[best][-1][0] / ours[-1][0], "held_out_queries": n, "kl_no_prompt": none}]


def step_throughput(c):
    """Item 2. Tokens are those that the rows hold, pads not counted: the bound runs as many, rounded up to rows of one length and credited with all, in one pass. The targets are at hand, as from a query's second visit on."""
    args, body, be = c.args, c.model.get_decoder(), torch.nn.Parameter(noise(c.model, c.args.seed))
    full, be_rows = examples(c, args.prompt, args.batch)
    rows, answers, hidden = zip(*sorted(zip(be_rows, *teacher(c, full)), key=lambda x: len(x[0]) + len(x[1])))              # like lengths together, as in stage 2
    tokens = sum(len(r) + len(a) - 1 for r, a in zip(rows, answers))
    ids = torch.randint(c.model.config.vocab_size, (args.batch, math.ceil(tokens / args.batch))).to(c.device)
    embeds = c.model.get_input_embeddings()(ids).requires_grad_()
    optimizer, weight = torch.optim.AdamW([be], lr=1e-3, weight_decay=0), c.model.get_output_embeddings().weight
    targets = [soft_target(weight, h.to(weight), 2.0) for h in hidden]

    def step():
        kd_step(c.model, rows, answers, targets, be, optimizer, args.micro_batch)
        return tokens

    def bound():
        h = body(inputs_embeds=embeds, use_cache=False).last_hidden_state
        torch.autograd.grad(h, embeds, torch.ones_like(h))
        return ids.numel()

    return pairs([("training step", "tokens a second", "high")], {"stage 2 step": lambda: rate(c.device, step), "bare body": lambda: rate(c.device, bound)}, 4 * args.repeats, warm=1,
                 batch=args.batch, micro_batch=args.micro_batch, tokens=tokens, answer_tokens=sum(map(len, answers)))


def memory(c):
    """Item 3. Ours as stage2_kd.py runs with the same --micro-batch; the other as one would write it first, the whole batch in one pass. Random answers take as much."""
    args, length, be = c.args, 16 if c.args.quick else 128, torch.nn.Parameter(noise(c.model, c.args.seed))
    if c.device.type != "cuda" and not os.access("/proc/self/clear_refs", os.W_OK):
        return [{"what": "memory of a training step", "skipped": "needs CUDA, or Linux with /proc/self/clear_refs"}]
    _, rows = examples(c, args.prompt, args.batch)
    answers = torch.randint(c.model.config.vocab_size, (args.batch, length)).tolist()
    hidden, optimizer = [torch.randn(length, be.shape[1]) for _ in rows], torch.optim.AdamW([be], lr=1e-3, weight_decay=0)
    weight = c.model.get_output_embeddings().weight
    targets = [soft_target(weight, h.to(weight), 2.0) for h in hidden]
    kd_step(c.model, rows[:1], answers[:1], targets[:1], be, optimizer, 1)                           # the weights are mapped from their file: now they are all in memory

    def step(micro, full):
        return lambda: peak_bytes(c.device, lambda: kd_step(c.model, rows, answers, hidden if full else targets, be, optimizer, micro, full))

    return pairs([("memory of a training step", "bytes", "low"), ("peak memory, weights and all", "bytes", "low")],
                 {f"passes of {args.micro_batch}, loss in chunks": step(args.micro_batch, False), f"one pass of {args.batch}, full logits": step(args.batch, True)}, args.repeats,
                 batch=args.batch, micro_batch=args.micro_batch, answer_tokens=length)


def teacher_pass(c):
    """Item 4. Ours over all queries, which share the prompt; the other over one batch of them, each with the prompt to encode: more would not change its rate. Nobody stops early."""
    args, rows, nowhere = c.args, [], torch.tensor([], dtype=torch.int64)
    for path in args.prompts[:2]:
        full, _ = examples(c, path, args.teacher_queries)
        n = len(os.path.commonprefix(full))
        sample, attention = full[:max(1, min(32, 16000 // (n + args.answer_tokens)))], attend(c, n)   # as large a batch as ours has in generate

        def cached():
            return sum(len(answer) for _, answer, _ in generate(c.model, full, nowhere, args.answer_tokens))

        def uncached():
            return sum(len(ids) for ids, _ in plain(c.model, sample, noise(c.model, 0), args.answer_tokens))

        runs = {f"prefix cache, {len(full)} queries": lambda: rate(c.device, cached), f"no cache, {len(sample)} queries": lambda: rate(c.device, uncached)}
        rows += pairs([("teacher's answers", "tokens a second", "high")], runs, args.repeats,
                      prompt_tokens=n, batch=len(sample), answer_tokens=args.answer_tokens, attention=attention)
    return rows


def serving(c):
    """Item 5. Nothing is shared between the sequences of a batch, as in a server without a prefix cache."""
    args, rows, vector = c.args, [], noise(c.model, c.args.seed)
    new, batches = (4, (1, 2)) if args.quick else (16, (1, 8))
    figures = [("time to first token", "seconds", "low"), ("throughput", "new tokens a second", "high")]

    def serve(fed):
        began, stamps = clock(c.device), [clock(c.device) for _ in plain(c.model, fed, vector, new)]
        return stamps[0] - began, len(fed) * new / (stamps[-1] - began)

    for path in args.prompts:
        for batch in batches:
            full, be_rows = examples(c, path, batch)
            saved, attention = len(full[0]) - len(be_rows[0]), attend(c, len(full[0]))
            rows += pairs(figures, {"[BE]": lambda: serve(be_rows), "full prompt": lambda: serve(full)}, args.repeats, warm=int(batch == 1),
                          prompt_tokens=saved + 1, batch=batch, new_tokens=new, attention=attention)
        with torch.no_grad():
            cache = c.model.get_decoder()(input_ids=torch.tensor([full[0][:saved]], device=c.device), use_cache=True).past_key_values
        kept = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        rows.append({"what": "KV memory saved a sequence", "unit": "bytes", "in the cache": kept, "prompt_tokens": saved + 1})
    return rows


def many_prompts(c):
    """Item 6. Runs of stage 2 alone and together, in turn. Alone, b prompts take the sum of their runs. Training: the second half of the steps, with one look at the held-out queries."""
    rows, alone = [], []
    counts, steps, limit, queries = ((1, 4), 4, 4, 8) if c.args.quick else ((1, 4, 16), 12, 16, 16)
    (c.folder / "few.txt").write_text("\n".join(c.queries[:queries]))
    for i, text in enumerate(cut(read_prompt(c.args.prompts[-1]), counts[-1])):
        (c.folder / f"{i}.txt").write_text(text)

    def run(numbers):
        folder, began = Path(tempfile.mkdtemp(dir=c.folder)), time.time()                            # an empty folder: no teacher's answers yet
        outs = [folder / f"{i}.pt" for i in numbers]
        stamps = [*saves([HERE / "stage2_kd.py", "--init", "random", "--lam", 1, "--queries", c.folder / "few.txt", "--held-out", 0.25, "--answer-tokens", limit, "--steps", steps,
                          "--eval-every", steps // 2, "--prompt", *(c.folder / f"{i}.txt" for i in numbers), "--out", *outs, *c.common], outs[0])]
        return {"whole run": time.time() - began, "training": stamps[1] - stamps[0]}

    for b in counts:
        alone += [run([i]) for i in range(len(alone), b)]
        together, apart = run(range(b)), {key: sum(x[key] for x in alone) for key in alone[0]}
        rows.append({"what": f"{b} prompts", "unit": "seconds", "together": together, "one after the other": apart, "ratio": {key: apart[key] / together[key] for key in apart},
                     "n": 1, "b": b, "steps": steps, "queries": queries, "answer_tokens": limit})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def processes(c):
    """Item 7. Stage 0 on texts of 64 tokens, 4 in a pass, 2 passes a step, between its first two saves, which lie `steps` steps and one look at the held-out text apart."""
    if c.device.type == "mps" or c.device.type == "cuda" and torch.cuda.device_count() < 2:
        return [{"what": "stage 0", "skipped": "two processes need two GPUs"}]
    data, steps = c.folder / "texts.jsonl", 2 if c.args.quick else 4
    words = cut([m for path in c.args.prompts for m in read_prompt(path)], 1)[0].split() * 100       # over and over, where the prompts are short
    data.write_text("".join(json.dumps({"text": " ".join(words[80 * i:80 * i + 80])}) + "\n" for i in range(60)))

    def speed(*launcher):
        out = Path(tempfile.mkdtemp(dir=c.folder)) / "ae.pt"
        running = saves([*launcher, HERE / "stage0_ae.py", "--data", data, "--out", out, "--min-tokens", 64, "--max-tokens", 64, "--held-out", 1, "--batch", 4, "--accumulate", 2,
                         "--steps", 3 * steps, "--eval-every", steps, *c.common], out, threads=1)
        first, second = next(running), next(running)
        running.close()
        return (8 * steps / (second - first),)

    return pairs([("stage 0", "texts a second", "high")], {"2 processes": lambda: speed("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"), "1 process": speed},
                 c.args.repeats, text_tokens=64, steps=steps, threads_a_process=1)


# item: function, name, the settings that its figures depend on
ITEMS = {
    1: (time_to_quality, "time to quality", ["prompt", "answer_tokens", "steps", "target", "tau", "naive_lr", "naive_tune", "naive_minutes"]),
    2: (step_throughput, "step throughput", ["prompt", "repeats", "batch", "micro_batch", "answer_tokens"]),
    3: (memory, "peak memory", ["prompt", "repeats", "batch", "micro_batch"]),
    4: (teacher_pass, "teacher pass", ["prompt", "prompts", "repeats", "answer_tokens", "teacher_queries"]),
    5: (serving, "serving", ["prompt", "prompts", "repeats"]),
    6: (many_prompts, "many prompts", ["prompt", "prompts"]),
    7: (processes, "two processes", ["prompts", "repeats"]),
}


def save(path, data):
    """Written beside its place and renamed: a run killed here, or a full disk, leaves the old file whole. data: bytes."""
    try:
        Path(f"{path}.tmp").write_bytes(data)
        os.replace(f"{path}.tmp", path)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        fail(f"--out {path}: cannot be written ({e.strerror}); what was there before is still whole. Make room, or give another --out")


def claim(path):
    """The lock of --out -> to be kept for as long as the run goes. A second run on the same output is told and stops."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{path}.lock")
        lock.acquire(timeout=0)
        return lock
    except filelock.Timeout:
        fail(f"--out {path}: another run is writing it; wait for it, or give another --out")
    except OSError as e:
        fail(f"--out {path}: cannot be written ({e.strerror}); give another --out")


def plots(path, items):
    """The curves of item 1 and the times to first token of item 5, beside the figures."""
    from matplotlib.figure import Figure
    for item, name in (("1", "quality"), ("5", "ttft")):
        if item not in items:
            continue
        figure, image, rows = Figure(figsize=(7, 4)), io.BytesIO(), items[item]["rows"]
        ax = figure.subplots()
        if item == "1":
            ax.set(title="time to quality", xlabel="seconds", ylabel="held-out gap closed")
            for row in rows[:-1]:
                ax.plot([p[0] for p in row["curve"]], [p[2] for p in row["curve"]], marker=".", label=row["what"])
            ax.axhline(rows[-1]["target"], color="gray", linewidth=0.5)
        else:
            ax.set(title="time to first token", xlabel="tokens of prompt", ylabel="seconds, median and range", yscale="log")
            rows = [row for row in rows if row["what"] == "time to first token"]
            for batch, who in sorted({(row["batch"], who) for row in rows for who in ("full prompt", "[BE]")}):
                x, y, low, high = zip(*((row["prompt_tokens"], row[who]["median"], row[who]["min"], row[who]["max"]) for row in rows if row["batch"] == batch))
                ax.plot(x, y, marker="o", label=f"{who}, batch {batch}")
                ax.fill_between(x, low, high, alpha=0.3)
        ax.legend()
        figure.savefig(image, dpi=100, bbox_inches="tight")
        save(Path(path).with_name(f"{Path(path).stem}-{name}.png"), image.getvalue())


def main():
    args = settings()
    for n in (signal.SIGINT, signal.SIGTERM):
        signal.signal(n, lambda n, frame: sys.exit(128 + n))                                         # what it runs is stopped on the way out
    for path in [args.prompt, *args.prompts]:
        read_prompt(path)
    questions = Path(args.prompt).with_suffix(".queries.txt")
    queries = list(dict.fromkeys(filter(None, map(str.strip, questions.read_text(encoding="utf-8-sig").splitlines())))) if questions.exists() else []
    if not queries:
        fail(f"--prompt {args.prompt}: expected its questions, one a line, in {questions}; write some there")
    lock, results, old = claim(args.out), {"items": {}}, []
    if Path(args.out).exists():
        try:
            results = json.loads(Path(args.out).read_text(encoding="utf-8"))
            old = [dict(machine) for machine, _, _ in map(operator.itemgetter("machine", "settings", "rows"), results["items"].values())]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            fail(f"--out {args.out}: expected figures of an earlier run, found something else; give another --out")
    device, dtype, attention = pick_device(args.device, args.dtype)
    here = machine(device, dtype, attention)
    for there in old:
        if there != here:
            differ = ", ".join(f"{key} {there.get(key)}, here {value}" for key, value in here.items() if there.get(key) != value)
            fail(f"--out {args.out}: its figures come from another machine or other versions ({differ}); give another --out")
    model, tokenizer = load_frozen(args.model, device, dtype, attention, args.trust_remote_code)
    ends = model.generation_config.eos_token_id
    stop = torch.tensor(tokenizer.eos_token_id if ends is None else ends).view(-1)
    common = ["--model", args.model, "--seed", args.seed, "--device", args.device, "--dtype", args.dtype, *["--trust-remote-code"] * args.trust_remote_code]
    for item in sorted(set(args.only)):
        function, name, uses = ITEMS[item]
        wanted = {key: getattr(args, key) for key in ["model", "seed", "quick", *uses]}
        if not args.again and results["items"].get(str(item), {}).get("settings") == wanted:
            print(f"item {item}, {name}: in {args.out} already; --again measures it anew")
            continue
        print(f"\nitem {item}, {name}", flush=True)
        began, busy = time.perf_counter(), os.getloadavg()[0]
        torch.manual_seed(args.seed)
        model.set_attn_implementation(attention)
        try:
            with tempfile.TemporaryDirectory() as folder:
                c = SimpleNamespace(args=args, folder=Path(folder), device=device, attention=attention, model=model, tokenizer=tokenizer, stop=stop, common=common,
                                    queries=list(queries), questions=Path(folder) / "questions.txt")
                c.questions.write_text("\n".join(queries), encoding="utf-8")
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and dtype == torch.bfloat16):     # as in stage 2
                    rows = function(c)
        except OSError as e:
            fail(f"--out {args.out}: item {item} could not write its temporary files ({e.strerror}); make room in {tempfile.gettempdir()}. The items measured before are safe")
        results["items"][str(item)] = {"name": name, "settings": wanted, "machine": here, "load_before": busy, "seconds": time.perf_counter() - began, "rows": rows}
        results["items"] = dict(sorted(results["items"].items()))
        save(args.out, (json.dumps(results, indent=1) + "\n").encode())
        plots(args.out, results["items"])
    lock.release()
    print(f"\n{args.out}: items {', '.join(results['items'])}")


if __name__ == "__main__":
    main()
