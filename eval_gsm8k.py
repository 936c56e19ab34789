"""GSM8K accuracy of a frozen chat model: with the few-shot prompt, with [BE] in its place, and with no prompt, on the same questions.

    retention = accuracy([BE]) / accuracy(full prompt)        greedy, zero-shot wording, "The final answer is [answer]"        (paper, GSM8K)

    python data/gsm8k/prepare.py                                                     # once: the questions
    python eval_gsm8k.py                                                             # out/be.pt, all test questions -> out/gsm8k.jsonl, out/gsm8k.json
    python eval_gsm8k.py --be out/k1.pt out/k4.pt --n 250 --batch 32                 # any number of artifacts side by side, the first 250 questions
    python eval_gsm8k.py --be --model Qwen/Qwen2.5-1.5B-Instruct --split train       # no artifact: the prompt against none

full prompt   the dialogue of --prompt, then the question, in the model's own template
NAME          [BE] of NAME.pt, then the question, in the layout that stands in the artifact
no prompt     the full prompt's input with the dialogue left out; where the dialogue has no system message, a default one that the template adds by itself stands in both

Reads   data/gsm8k/test.jsonl ("question", "answer" with #### gold), the prompt, the artifacts.
Writes  out/gsm8k.jsonl, a row an answer, and the table beside it as out/gsm8k.json. A killed run goes on when the same command runs again: a row counts
        if its key fits, a hash of all that decides the answer but for the rounding of device and attention kernel, and if a larger or smaller --max-new-tokens would not change it. A row's seconds are its batch's,
        shared out; the prefix that all questions share is not in them.
Expect  the default model on one busy core, batch 4: for 32 new tokens 9 s a question with 8 shots, 2 s with one vector. It is too small to solve GSM8K
        with any prompt; a model of 1B or more has something to retain.
"""
import argparse
import copy
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import filelock
import jinja2
import numpy as np
import safetensors
import torch
import transformers
from tqdm import tqdm

VERSION = "0.1"
# that of prompts/gsm8k_8shot.json and of the Llama 3.1 evals
WORDING = ("Given the following problem, reason and give a final answer to the problem.\nProblem: {question}\n"
           'Your response should end with "The final answer is [answer]" where [answer] is the response to the problem.')


def settings():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--be",             default=["out/be.pt"], nargs="*", help="artifacts of stage 1 or 2, each a condition; nothing after it: none")
    add("--prompt",         default="prompts/gsm8k_8shot.json", help="the full prompt: a .json with a \"messages\" list, or a text file")
    add("--model",          default="",            help="hub name or folder; default: the one that the first artifact names")
    add("--data",           default="data/gsm8k",  help="a folder with test.jsonl and train.jsonl")
    add("--split",          default="test", choices=["test", "train"], help="which of the two")
    add("--n",              type=number(int, 1), default=None, help="only the first n questions; default all")
    add("--bare",           action="store_true",   help="one more condition: no prompt and no system block")
    add("--max-new-tokens", type=number(int, 1), default=256, help="an answer is cut here")
    add("--batch",          type=number(int, 1), default=16, help="questions at a time; each row of a batch holds a copy of the prompt's keys and values")
    add("--out",            default="out/gsm8k.jsonl", help="a row an answer; the table goes beside it, as .json")
    add("--device",         default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: CUDA, then MPS, then CPU")
    add("--dtype",          default="auto", choices=["auto", "bf16", "fp32"],       help="of the frozen weights")
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


# the scorer: a number in a text is a string in one spelling, so that "18.00", "$18" and "18" are equal and nothing is rounded
NUMBER = re.compile(r"(?:(?<![A-Za-z0-9)%])(?<![0-9)%] )[-\u2212\u2013])?"                                       # a minus, but not that of 16-3 or 16 -3
                    r"(?:(?:[0-9]+(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![A-Za-z0-9])\.[0-9]+)")


def numbers(text):
    """The numbers in a text, in order, each normalised: no comma, currency, leading or trailing zero. "-$1,000.50, **18.00**, 25%." -> ["-1000.5", "18", "25"]."""
    found = []
    for number in NUMBER.findall(re.sub(r"[$\u20ac\u00a3\\]", "", text.replace("{,}", ","))):       # \$1{,}000 is LaTeX for $1,000
        whole, _, part = number.lstrip("-\u2212\u2013").replace(",", "").partition(".")
        value = (whole.lstrip("0") or "0") + ("." + part.rstrip("0")).rstrip(".")
        found.append("-" * (number[0] in "-\u2212\u2013" and value != "0") + value)
    return found


def predict(text):
    """The number that an answer gives, normalised: the first behind the last "The final answer is", else the last of the text; None if it has none."""
    _, marker, rest = text.lower().rpartition("the final answer is")
    return ((marker and numbers(rest)[:1]) or numbers(text)[-1:] or [None])[0]


def read_gold(answer):
    """The number behind the last #### of a GSM8K answer, normalised; None if there is none."""
    _, marker, rest = answer.rpartition("####")
    return ((marker and numbers(rest)) or [None])[0]


def scored(row, gold):
    """The row with its verdict, by its answer's text alone."""
    number = predict(row["answer"])
    return row | {"predicted": number, "gold": gold, "correct": number == gold}


def read_questions(folder, split):
    """folder/split.jsonl -> [(question, gold)]. Exits with one line on bad input."""
    path, questions, n = Path(folder, f"{split}.jsonl"), [], 0
    try:
        for n, line in enumerate(path.read_bytes().splitlines(), 1):      # noqa: B007 (a message names it)
            if line.strip():
                row = json.loads(line)
                questions.append((row["question"].strip(), read_gold(row["answer"])))
                if questions[-1][1] is None:
                    raise ValueError
    except OSError as e:
        fail(f"--data {folder}: expected a folder with {split}.jsonl in it, but that cannot be read ({e.strerror}); make it with: python data/gsm8k/prepare.py")
    except (ValueError, KeyError, TypeError, AttributeError):
        fail(f'{path}, line {n}: expected a json object with a "question" and an "answer" that ends with #### and a number')
    if not questions:
        fail(f"{path}: it has no questions; make it with: python data/gsm8k/prepare.py")
    return questions


def read_rows(path, limit):
    """The rows of earlier runs -> (those that count under this limit of new tokens, by their key; the number of all). An answer that ended by itself is the same under any limit that it fits in. A half-written
    last line, of a killed run, is cut off; a file of another kind is left as it is."""
    whole, newline, half = path.read_bytes().rpartition(b"\n")
    try:
        found = [json.loads(line) for line in whole.splitlines()]
        rows = {row["key"]: row for row in found if (row["new_tokens"] == limit if row["cut"] else row["new_tokens"] <= limit)}
        if not half.startswith(b'{"key"'[:len(half)]):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        fail(f"--out {path}: expected the rows of an earlier run, found something else, which is left as it is; give another --out, or move it away")
    os.truncate(path, len(whole + newline))
    return rows, len(found)


# the statistics
def wilson(k, n, z=1.959964):
    """95% interval of a share of k in n (Wilson 1927): unlike the usual one it stays in [0, 1] and has a width at k = 0."""
    centre, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return max(0.0, (centre - half) / (n + z * z)), min(1.0, (centre + half) / (n + z * z))


def mcnemar(lost, won):
    """Exact two-sided p of McNemar's test: questions right in one condition alone fall to either side like a coin. lost, won: how many on each side."""
    m = lost + won
    return min(1.0, 2 * sum(math.comb(m, i) for i in range(min(lost, won) + 1)) / 2 ** m)


def bootstrap(lost, won, n, draws=10_000):
    """95% paired bootstrap interval of (won - lost) / n. A question's difference is -1, 1 or 0, so questions drawn with replacement are counts drawn from a multinomial."""
    counts = np.random.default_rng(0).multinomial(n, [lost / n, won / n, (n - lost - won) / n], size=draws)     # (draws, 3)
    return tuple(np.quantile((counts[:, 1] - counts[:, 0]) / n, [0.025, 0.975]).tolist())


def summarise(rows):
    """rows: {condition: its rows, one a question, in the same order}, the full prompt first -> {condition: its line of the table}."""
    table, full = {}, [r["correct"] for r in next(iter(rows.values()))]
    for name, part in rows.items():
        right, n = [r["correct"] for r in part], len(part)
        lost, won = sum(f and not r for f, r in zip(full, right)), sum(r and not f for f, r in zip(full, right))
        table[name] = {"accuracy": sum(right) / n, "correct": sum(right), "n": n, "accuracy_95": wilson(sum(right), n),
                       "no_number": sum(r["predicted"] is None for r in part), "cut": sum(r["cut"] for r in part),
                       "minus_full": (won - lost) / n, "minus_full_95": bootstrap(lost, won, n), "full_alone": lost, "it_alone": won, "mcnemar_p": mcnemar(lost, won),
                       "retention": sum(right) / sum(full) if any(full) else None}
        table[name] |= {key: sum(r[key] for r in part) / n for key in ("context_tokens", "new_tokens", "seconds")}
    return table


def show(table):
    """The table as text, a line a condition."""
    lines = [["", "accuracy", "95%", "no number", "cut", "minus full", "95%", "McNemar p", "retention", "context", "s/question"]]
    for name, t in table.items():
        retention = "-" if t["retention"] is None else f"{t['retention']:.1%}"
        lines.append([name, f"{t['accuracy']:.1%}", "{:.1%} to {:.1%}".format(*t["accuracy_95"]), str(t["no_number"]), str(t["cut"]),
                      f"{t['minus_full']:+.1%}", "{:+.1%} to {:+.1%}".format(*t["minus_full_95"]), f"{t['mcnemar_p']:.3g}", retention,
                      f"{t['context_tokens']:.0f}", f"{t['seconds']:.2f}"])
    lines[1][5:9] = [""] * 4                                                                        # the full prompt is not compared with itself
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


@torch.no_grad()
def generate(model, rows, shared, prefix, learned, stop, limit):
    """Greedy answers to rows of ids, with slots for the rows of learned (k, d) -> lists of ids, each with its stop token unless it is cut at limit.

    prefix: the cache of the first `shared` ids, which all rows share; its keys and values are repeated over the batch and it stays as it is.
    The rest of each row is padded on the left. A row that has ended leaves the batch.
    """
    body, weight = model.get_decoder(), model.get_output_embeddings().weight                        # weight (V, d)
    width = max(map(len, rows)) - shared
    pads = [shared + width - len(r) for r in rows]
    ids = torch.tensor([[0] * p + r[shared:] for r, p in zip(rows, pads)], device=model.device)     # (B, w)
    mask = torch.tensor([[1] * shared + [0] * p + [1] * (width - p) for p in pads], device=model.device)                # (B, shared + w)
    cache, said, alive = copy.deepcopy(prefix), [[] for _ in rows], list(range(len(rows)))
    cache.batch_repeat_interleave(len(rows))
    while True:
        embeds, position = embed(model, ids, learned), (mask.cumsum(-1) - 1)[:, -ids.shape[1]:]     # pads do not count
        h = body(inputs_embeds=embeds, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]  # (B, d)
        ids = (h @ weight.T).argmax(-1, keepdim=True)                                               # (B, 1)
        for i, token in zip(alive, ids[:, 0].tolist()):
            said[i].append(token)
        stay = [j for j, i in enumerate(alive) if said[i][-1] not in stop and len(said[i]) < limit]
        if not stay:
            return said
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        if len(stay) < len(alive):
            alive, index = [alive[j] for j in stay], torch.tensor(stay, device=model.device)
            ids, mask = ids[index], mask[index]
            cache.batch_select_indices(index)


def main():
    args = settings()
    out, maker = Path(args.out), f"python stage1_recon.py --prompt {args.prompt}, then python stage2_kd.py --prompt {args.prompt}"
    if out.suffix != ".jsonl":
        fail(f"--out {out}: expected a name that ends in .jsonl; the table goes beside it, as .json")
    messages = read_prompt(args.prompt)
    questions = read_questions(args.data, args.split)[:args.n]
    artifacts = {path: load_artifact(path, "be", None, None, maker) for path in args.be}
    source = args.model or (next(iter(artifacts.values()))["model"]["name"] if artifacts else "models/smollm2-135m")
    device, dtype, attention = pick_device(args.device, args.dtype)
    model, tokenizer = load_frozen(source, device, dtype, attention, args.trust_remote_code)
    before, d, context = fingerprint(model), model.get_input_embeddings().weight.shape[1], model.config.max_position_embeddings
    for path in artifacts:
        load_artifact(path, "be", before, d, maker)                                                  # now that the model is known
    ends = model.generation_config.eos_token_id
    stop = set(ends if isinstance(ends, list) else [ends if ends is not None else tokenizer.eos_token_id])
    prompt_tokens = len(prompt_ids(tokenizer, messages, "chat", context))

    # what is fed: for each condition the ids of every question, and the vectors in their slots
    ask = [[{"role": "user", "content": WORDING.format(question=q)}] for q, _ in questions]
    no_vector = torch.zeros(1, d)
    conditions = {"full prompt": ([chat_ids(tokenizer, messages + turns) for turns in ask], no_vector)}
    stems = ["full prompt", "no prompt", "no system block", *(Path(p).stem for p in artifacts)]
    for path, be in artifacts.items():
        name = Path(path).stem if stems.count(Path(path).stem) == 1 else path
        slot = [-1 - i for i in range(len(be["vector"]))]
        conditions[name] = ([layout_ids(tokenizer, be["layout"], slot, turns) for turns in ask], be["vector"])
        if be["prompt"]["messages"] != messages:
            print(f"note: {path} was made for another prompt than {args.prompt}")
    conditions["no prompt"] = ([chat_ids(tokenizer, turns) for turns in ask], no_vector)
    if args.bare:
        conditions["no system block"] = ([layout_ids(tokenizer, "block", [], turns) for turns in ask], no_vector)
    if device.type == "cpu" and prompt_tokens > 1024:
        model.set_attn_implementation("sdpa")           # eager copies the keys and values of a grouped-query model for every head: 2.0 instead of 0.45 s a token for 16 rows of 1,600 tokens
    same, keys = [before, sorted(stop), str(dtype)], {}                                              # a key: all that decides an answer but for the device's rounding and the limit, hashed
    for name, (rows, learned) in conditions.items():
        if (longest := max(map(len, rows))) > context - args.max_new_tokens:
            fail(f"{name}: expected at most {context - args.max_new_tokens} tokens of context (the model's {context} less --max-new-tokens), found {longest}; "
                 "give a shorter prompt, a smaller --max-new-tokens or a model with a longer context")
        vector = hashlib.sha256(learned.numpy().tobytes()).hexdigest()
        keys[name] = [hashlib.sha256(json.dumps([same, ids, vector]).encode()).hexdigest() for ids in rows]

    lock = filelock.FileLock(f"{out}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = open(out, "a", encoding="utf-8")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        fail(f"--out {out}: another run is writing it; wait for it, or give another --out")
    except OSError as e:
        fail(f"--out {out}: cannot be written: {e.strerror}")

    # the answers: a batch of questions in all conditions, then the next batch
    done, there = read_rows(out, args.max_new_tokens)
    wanted, begun = set(itertools.chain(*keys.values())), {}                                         # begun: for each condition the length and the cache of what all its rows begin with
    todo = len(wanted - done.keys())
    print(f"prompt: {args.prompt}, {prompt_tokens} tokens; {len(questions)} questions of {args.data}, {args.split}; {len(conditions)} conditions\n"
          f"{len(wanted) - todo} answers found, {todo} to make; {there - len(wanted) + todo} rows in {out} come from other settings and do not count")
    with file, tqdm(total=todo, desc="answers", dynamic_ncols=True) as bar, torch.no_grad():
        for start, name in itertools.product(range(0, len(questions), args.batch), conditions):
            rows, learned = conditions[name][0], conditions[name][1].to(device)
            part = [q for q in range(len(questions))[start:start + args.batch] if keys[name][q] not in done]
            if not part:
                continue
            if name not in begun:                                                                    # the prompt, run once for all questions
                n = min(len(os.path.commonprefix(rows)), min(map(len, rows)) - 1)                    # each row keeps a token of its own
                embeds = embed(model, torch.tensor([rows[0][:n]], device=device), learned)           # (1, n, d), [BE] in it
                begun[name] = n, model.get_decoder()(inputs_embeds=embeds, use_cache=True).past_key_values
            began = time.perf_counter()
            said = generate(model, [rows[q] for q in part], *begun[name], learned, stop, args.max_new_tokens)
            seconds = (time.perf_counter() - began) / len(part)
            made = []
            for q, ids in zip(part, said):
                row = {"key": keys[name][q], "condition": name, "question": q, "answer": tokenizer.decode(ids, skip_special_tokens=True).strip(),
                       "cut": ids[-1] not in stop, "new_tokens": len(ids), "context_tokens": len(rows[q]), "seconds": seconds}
                made.append(scored(row, questions[q][1]))
            file.write("".join(json.dumps(row) + "\n" for row in made))
            file.flush()
            os.fsync(file.fileno())                                                                  # a batch that was said to be done stays done
            done |= {row["key"]: row for row in made}
            bar.update(len(made))

    # the table; the rows that were there are scored by the scorer of today
    table = summarise({name: [scored(done[key], gold) for key, (_, gold) in zip(part, questions)] for name, part in keys.items()})
    print(f"\n{len(questions)} questions, greedy, at most {args.max_new_tokens} new tokens; 95%: Wilson, and a paired bootstrap over questions\n\n{show(table)}\n")
    summary = {"table": table, "model": {"name": source, "fingerprint": before}, "config": vars(args), "dtype": str(dtype)[6:], "device": device.type,
               "versions": {"nanobe": VERSION, "torch": str(torch.__version__), "transformers": transformers.__version__}}
    Path(f"{out}.tmp").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    os.replace(f"{out}.tmp", out.with_suffix(".json"))
    lock.release()
    print(f"wrote {out} and {out.with_suffix('.json')}")


if __name__ == "__main__":
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda stop, frame: sys.exit(128 + stop))           # the rows that were written stay
    try:
        main()
    except OSError as e:
        fail(f"{e.filename or 'the output'}: could not be read or written ({e.strerror}); the rows so far are kept, and the same command goes on from there")
