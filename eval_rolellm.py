"""Role play: does [BE] act the part as well as the prompt that it stands for? RoleBench's roles, with the prompt, [BE] and none.

    ROUGE-L F of an answer against RoleBench's references, and against the full prompt's answer        retention = ROUGE-L of [BE] / of the full prompt
    win rate = (W + T / 2) / (W + T + L), from a judge that sees each pair ([BE], full prompt) in both orders; 50% is parity with the prompt

    python data/rolellm/prepare.py                                                  # RoleBench, from the hub
    python eval_rolellm.py                                                          # every role: its prompt, stages 1 and 2, three answers a question
    python eval_rolellm.py --data rolebench --roles "Jack Sparrow" Coriolanus --stage2 "--answer-tokens 32 --steps 300"
    python eval_rolellm.py --stage2 "--init random --lam 1"                         # distillation alone: stage 1 is left out
    python eval_rolellm.py --artifacts mine --num-roles 10                          # finished mine/Jack_Sparrow.pt, ...: nothing is trained
    python eval_rolellm.py --temperature 0.7 --top-p 0.9                            # the paper's decoding; greedy is repeatable
    NANOBE_JUDGE_KEY=... python eval_rolellm.py --judge-url https://api.openai.com/v1 --judge-model gpt-4o

Reads   a folder in RoleBench's layout. The judge is any server with an OpenAI-compatible /chat/completions; its key is in NANOBE_JUDGE_KEY or OPENAI_API_KEY.
Writes  out/rolellm.md and .json, the table; out/rolellm.answers.jsonl and .verdicts.jsonl, so that a killed run goes on where it stopped; and in out/roles
        each role's prompt, questions and artifact, with the commands that made it in NAME.sh
Expect  SmolLM2-135M-Instruct on one core of two, beside another job: 46 s for 12 questions, three answers of 16 tokens each; a role's training is stage 2's (see there)
"""
import argparse
import concurrent.futures
import copy
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import filelock
import jinja2
import safetensors
import torch
import transformers
from rouge_score import rouge_scorer
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
BACKOFF = (1, 2, 4, 8, 16, 32)      # seconds before the judge is asked again
# RoleLLM's prompt, as in data/rolellm/prepare.py
TEMPLATE = ("You are {role}, your description is: {description} Now please answer some questions to accurately show your personality traits! Your speaking style should fully "
            "imitate the personality role assigned to you! Please do not expose that you are an artificial intelligence model or a language model, you must always remember that "
            "you are only assigned one personality role. Don't be verbose or too formal or polite when speaking.")
JUDGE = """Two actors were given the same part and the same question. Decide who plays the part better.

The part: {role}. {description}

The question: {question}

<A>
{a}
</A>

<B>
{b}
</B>

The better answer sounds like this character, fits the character's personality and story, and answers the question. Length and order count for nothing.
Reply A if the first is better, B if the second is better, TIE if neither is. Reply with that alone: A, B or TIE."""


def settings():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--data",           default="data/rolellm/rolebench", help="a folder in RoleBench's own layout; python data/rolellm/prepare.py fetches it here")
    add("--roles",          nargs="+", default=[],   help="names as in desc.json; default: all that have test questions")
    add("--num-roles",      type=number(int, 1), default=None, help="the first so many of them")
    add("--num-questions",  type=number(int, 1), default=None, help="the first so many test questions of each role; default: all")
    add("--model",          default="models/smollm2-135m", help="hub name or local folder of a Llama or Qwen chat model")
    add("--artifacts",      default="",          help="a folder of finished artifacts NAME.pt (spaces are _); without it they are trained into roles/ beside --out")
    add("--stage1",         type=shlex.split, default="", help="more options for stage1_recon.py, in one string")
    add("--stage2",         type=shlex.split, default="", help="more options for stage2_kd.py, in one string; with --init random there is no stage 1")
    add("--max-new-tokens", type=number(int, 1), default=256, help="an answer is cut here")
    add("--temperature",    type=number(float, 0), default=0.0, help="0 is greedy; the paper's is 0.7")
    add("--top-p",          type=number(float, 0.01, 1), default=1.0, help="with a temperature: sample from the likeliest tokens of this much mass; the paper's is 0.9")
    add("--judge-url",      default="",          help="base address of the judge, such as http://localhost:8000/v1; without it there is no win rate")
    add("--judge-model",    default="",          help="the name that the judge's server knows it by")
    add("--judge-options",  type=json.loads, default='{"temperature": 0, "max_tokens": 16}', help="JSON, sent along with each request; a judge that thinks first needs more tokens")
    add("--judge-at-once",  type=number(int, 1), default=8, help="requests under way at a time")
    add("--out",            default="out/rolellm", help="where the results go: this, with .md, .json, .answers.jsonl and .verdicts.jsonl")
    add("--seed",           type=int,   default=0,      help="of the training and the sampling")
    add("--device",         default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: CUDA, then MPS, then CPU")
    add("--dtype",          default="auto", choices=["auto", "bf16", "fp32"],       help="of the frozen weights; [BE] itself is always fp32")
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


def read_roles(folder, names, count):
    """RoleBench -> {role: {"description", "train": questions, "test": [(question, references)]}}. Exits with one line where it is not as expected."""
    def rows(path):
        return [json.loads(line) for line in Path(folder, path).read_text(encoding="utf-8").split("\n") if line.strip()]

    def line(text):
        return " ".join(text.split())

    try:
        descriptions = json.loads(Path(folder, "profiles-eng/desc.json").read_text(encoding="utf-8"))
        test = {}
        for r in rows("rolebench-eng/instruction-generalization/role_specific/test.jsonl"):
            test.setdefault(r["role"], {}).setdefault(line(r["question"]), [r["generated"]] if isinstance(r["generated"], str) else r["generated"])
        for name in names:
            if name not in descriptions or name not in test:
                there = ", ".join([r for r in descriptions if r in test][:8])
                fail(f"--roles {name!r}: expected a role with a description and test questions in {folder}, such as: {there}")
        names = (list(dict.fromkeys(names)) or [r for r in descriptions if r in test])[:count]
        return {r: {"description": line(descriptions[r]), "test": list(test[r].items()),
                    "train": [line(x["instruction"]) for x in rows(f"instructions-eng/role-specific-{r}.jsonl")]} for r in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        fail(f"--data {folder}: expected RoleBench's layout ({type(e).__name__}: {e}); fetch it with: python data/rolellm/prepare.py")


def read_rows(path):
    """The rows of earlier runs by their key. A half-written last line, of a killed run, is cut off; a file of another kind is left as it is."""
    whole, newline, half = Path(path).read_bytes().rpartition(b"\n")
    try:
        rows = {row["key"]: row for row in map(json.loads, whole.splitlines())}
        if not half.startswith(b'{"key"'[:len(half)]):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        fail(f"{path}: expected the rows of an earlier run, found something else, which is left as it is; give another --out, or move it away")
    os.truncate(path, len(whole + newline))
    return rows


def write(path, text):
    """Whole or not at all."""
    Path(f"{path}.tmp").write_text(text, encoding="utf-8")
    os.replace(f"{path}.tmp", path)


def digest(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def train(args, role):
    """A role's [BE] at its path, by the stage scripts' own command lines; what is done is skipped, what was begun is resumed."""
    path, base = role["path"], role["path"].with_suffix("")
    common = ["--prompt", f"{base}.txt", "--model", args.model, "--seed", str(args.seed)]
    stages = {f"{base}.recon.pt": ["stage1_recon.py", *common, "--out", f"{base}.recon.pt", *args.stage1],
              f"{base}.pt": ["stage2_kd.py", *common, "--be", f"{base}.recon.pt", "--out", f"{base}.pt", *args.stage2]}
    if "--init random" in " ".join(args.stage2).replace("=", " "):
        del stages[f"{base}.recon.pt"]
    recipe = "".join(shlex.join(["python", *command]) + "\n" for command in stages.values())
    if any(map(os.path.exists, stages)) and (not os.path.exists(f"{base}.sh") or Path(f"{base}.sh").read_text() != recipe):
        fail(f"{base}.pt was made, or begun, by other commands than these options ask for ({base}.sh); "
             f"remove both, choose another --out, or take it as it is with --artifacts {base.parent}")
    if path.exists():                                                                               # stage 1 is done
        if "controls" in load_artifact(path, "be", None, None, f"rm {shlex.quote(str(path))}; python eval_rolellm.py")["metrics"]:
            return
        stages.pop(f"{base}.recon.pt", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, lines in [(".txt", [role["prompt"]]), (".queries.txt", role["train"]), (".test.txt", [q for q, _ in role["test"]])]:
        write(f"{base}{name}", "".join(line + "\n" for line in lines))
    write(f"{base}.sh", recipe)
    for out, (script, *options) in stages.items():
        options += ["--device", args.device, "--dtype", args.dtype] + ["--trust-remote-code"] * args.trust_remote_code + ["--resume"] * os.path.exists(out)
        command = [sys.executable, str(HERE / script), *options]
        print("$", shlex.join(command), flush=True)
        with subprocess.Popen(command) as child:
            try:
                code = child.wait()
            finally:
                child.terminate()                       # told to stop: the stage finishes its step and saves; run() would kill it
        if code:
            fail(f"{script} ended with exit code {code} for {base}.txt; what it said stands above. The same command again goes on from there")


@torch.no_grad()
def generate(model, rows, learned, stop, limit, temperature, top_p, seeds):
    """Continue rows of ids with slots, which share a long beginning: the prompt, or [BE]. Yields (row number, answer ids without the stop token), batch by batch.

    The shared prefix runs once; its keys and values are repeated over a batch. The rest of each row is padded on the left. seeds: one a row, so that a sample
    does not depend on its neighbours.
    """
    body, weight = model.get_decoder(), model.get_output_embeddings().weight
    if not rows:
        return
    n = min(len(os.path.commonprefix(rows)), min(map(len, rows)) - 1)                               # each row keeps a token of its own
    prefix = body(inputs_embeds=embed(model, torch.tensor([rows[0][:n]], device=model.device), learned), use_cache=True).past_key_values if n else None
    batch = max(1, min(32, 16000 // (n + limit)))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))                                    # like lengths together: little padding
    for part in [order[i:i + batch] for i in range(0, len(order), batch)]:
        rngs = [torch.Generator().manual_seed(seeds[i]) for i in part]
        width = max(len(rows[i]) for i in part) - n
        pads = [width - len(rows[i]) + n for i in part]
        ids = torch.tensor([[0] * p + rows[i][n:] for i, p in zip(part, pads)], device=model.device)                        # (B, w)
        mask = torch.tensor([[1] * n + [0] * p + [1] * (width - p) for p in pads], device=model.device)                     # (B, n + w)
        cache = copy.deepcopy(prefix)
        if n:
            cache.batch_repeat_interleave(len(part))
        said = ids[:, :0]
        while said.shape[1] < limit:
            position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]                        # pads do not count
            out = body(inputs_embeds=embed(model, ids, learned), attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, (out.last_hidden_state[:, -1] @ weight.T).float()  # (B, V)
            if temperature > 0:
                chance, token = torch.softmax(logits / temperature, -1).sort(-1, descending=True)
                mass = (chance * (chance.cumsum(-1) - chance < top_p)).cumsum(-1)                   # the likeliest tokens, up to and with the one that reaches top_p
                draw = torch.tensor([[torch.rand((), generator=r)] for r in rngs], device=mass.device) * mass[:, -1:]
                ids = token.gather(-1, (mass < draw).sum(-1, keepdim=True))
            else:
                ids = logits.argmax(-1, keepdim=True)                                               # (B, 1)
            said, mask = torch.cat([said, ids], 1), torch.cat([mask, torch.ones_like(ids)], 1)
            ended = torch.isin(said, stop.to(said.device))                                          # (B, t)
            if ended.any(1).all():
                break
        for row, i in enumerate(part):
            yield i, list(itertools.takewhile(lambda x: x not in stop, said[row].tolist()))


def read_verdict(reply):
    """What the judge said -> "A", "B", "TIE", or None where that is not clear: it must be all of the first or of the last line, give or take
    "Verdict:" before it, a remark in brackets behind it, and punctuation. What a thinking model thinks is left out."""
    lines = [x for x in re.sub(r"^.*</think>|<think>.*", "", reply, flags=re.S).splitlines() if re.search(r"\w", x)]
    before = r"[\W_]*(?:(?:(?:my|the)\s+)?(?:final\s+)?(?:verdict|answer|choice|winner|result)(?:\s+is)?[\W_]+)?(?:(?:answer|option|actor)\s+)?"
    form = before + r"(A|B|(?:a\s+)?TIE)[\W_]*(?:\((?:(?!\b(?:A|B|TIE)\b).)*\)[\W_]*)?"
    found = {m[1].split()[-1].upper() for x in lines[:1] + lines[-1:] if (m := re.fullmatch(form, x, re.I))}
    return found.pop() if len(found) == 1 else None


def ask_judge(url, body, key):
    """One request to an OpenAI-compatible server -> the reply's text. 429, 5xx and connection errors are tried again after the waits of BACKOFF;
    a RuntimeError then says what was wrong, without the key."""
    for wait in (*BACKOFF, None):
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json", "User-Agent": "nanobe"})
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")                       # never to the place that a redirect names
        try:
            try:
                response = urllib.request.urlopen(request, timeout=300)
            except urllib.error.HTTPError as e:
                response = e                                                                        # a response too, with a status of its own
            with response:
                status, text = response.status, response.read().decode(errors="replace")
            if status == 200:
                return (json.loads(text)["choices"][0]["message"]["content"] or "").strip()
            again, reason = status == 429 or status >= 500, f"{status} {text}"
        except (OSError, http.client.HTTPException) as e:                                           # refused, reset, timed out, cut short
            again, reason = True, f"no connection: {type(e).__name__}: {e}"
        except (json.JSONDecodeError, LookupError, TypeError, AttributeError):
            again, reason = False, f"no chat completion in the reply: {text}"
        reason = " ".join(reason.replace(key or "\0", "(key)").split())[:300]                       # some servers repeat the key
        if wait is None or not again:
            raise RuntimeError(reason)
        tqdm.write(f"judge: {reason}; again in {wait} s")
        time.sleep(wait)


def judge(args, roles, texts, url, options, key):
    """Each pair ([BE], full prompt) in both orders -> {role: W, T, L, how many of W and L are so in both orders, and the pairs without two clear verdicts}. Equal texts are a tie and are not sent.

    Verdicts are kept by a hash of all that is sent: model, options, both texts, their order. Judges lean to one side, so a pair counts by the sum of its two
    verdicts: A twice is one vote for each, a tie. A vote beside a TIE may be the lean alone, so the pairs with both votes are counted too.
    """
    pairs, bodies = {}, {}
    for name, role in roles.items():
        for question, _ in role["test"]:
            be, full, keys = texts[name, "be", question], texts[name, "full", question], []
            for a, b in [(be, full), (full, be)] if be != full else []:
                ask = JUDGE.format(role=name, description=role["description"], question=question, a=a, b=b)
                body = {"model": args.judge_model, "messages": [{"role": "user", "content": ask}], **options}
                keys.append(digest(body))
                bodies[keys[-1]] = body
            pairs[name, question] = keys
    path = f"{args.out}.verdicts.jsonl"
    Path(path).touch()
    found = read_rows(path)
    missing = [k for k in bodies if k not in found]
    print(f"judge: {len(bodies) - len(missing)} verdicts found, {len(missing)} to ask {args.judge_model} for, {path}")
    try:
        pool, bar = concurrent.futures.ThreadPoolExecutor(args.judge_at_once), tqdm(total=len(missing), desc="verdicts", dynamic_ncols=True)
        with open(path, "a", encoding="utf-8") as f, pool, bar:
            for part in [missing[i:i + args.judge_at_once] for i in range(0, len(missing), args.judge_at_once)]:
                for k, reply in zip(part, pool.map(lambda k: ask_judge(url, bodies[k], key), part)):
                    found[k] = {"key": k, "judge": args.judge_model, "reply": reply}
                    f.write(json.dumps(found[k]) + "\n")
                    f.flush()
                    bar.update()
    except RuntimeError as e:
        fail(f"--judge-url {args.judge_url}: {e}. The verdicts so far are in {path}; the same command again goes on from there")
    counts = {name: {"W": 0, "T": 0, "L": 0, "unparsable": 0, "both_orders": 0} for name in roles}
    for (name, _), keys in pairs.items():
        votes = [{"A": 1, "B": -1, "TIE": 0, None: math.nan}[read_verdict(found[k]["reply"])] for k in keys]
        total = votes[0] - votes[1] if votes else 0                                                 # [BE] is A in the first order, B in the second
        counts[name]["unparsable" if math.isnan(total) else "W" if total > 0 else "L" if total < 0 else "T"] += 1
        counts[name]["both_orders"] += abs(total) == 2
    return counts


def interval(top, bottom=None):
    """95% bootstrap interval over roles of the mean of top, or of sum(top) / sum(bottom); None for one role."""
    if len(top) < 2:
        return None
    top, bottom = torch.tensor(top, dtype=torch.float64), torch.tensor(bottom or [1.0] * len(top), dtype=torch.float64)
    draws = torch.randint(len(top), (10_000, len(top)), generator=torch.Generator().manual_seed(0))
    return (top[draws].sum(1) / bottom[draws].sum(1)).nan_to_num(0, 0, 0).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


# the table: key of a role's row, head, format
COLUMNS = [("n", "n", "d"), ("full", "full prompt", ".3f"), ("be", "[BE]", ".3f"), ("none", "none", ".3f"), ("retention", "[BE] / full", ".1%"),
           ("be_teacher", "[BE] ~ full", ".3f"), ("none_teacher", "none ~ full", ".3f"), ("kl", "KL", ".3f"), ("gap_closed", "gap closed", ".3f"),
           ("win_rate", "win rate", ".1%"), ("wtl", "W / T / L", "s"), ("unparsable", "unparsable", "d")]


def summarize(rows):
    """Means over roles, each over the roles that have the number, with an interval -> {key: (mean, interval or None)}."""
    means = {}
    for key in ("full", "be", "none", "be_teacher", "none_teacher", "kl", "gap_closed", "win_rate"):
        if values := [r[key] for r in rows if r[key] is not None]:
            means[key] = statistics.fmean(values), interval(values)
    if means["full"][0] > 0:
        be, full = [r["be"] for r in rows], [r["full"] for r in rows]
        means["retention"] = sum(be) / sum(full), interval(be, full)
    return means


def report(rows, means, notes):
    """The rows as a markdown table, a dash where there is no number, and the notes under it."""
    lines = ["| role | " + " | ".join(head for _, head, _ in COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    for r in rows:
        lines.append(f"| {r['role']} | " + " | ".join("-" if r[key] is None else format(r[key], form) for key, _, form in COLUMNS) + " |")
    cells = {"n": str(sum(r["n"] for r in rows))}
    for key, _, form in COLUMNS:
        if key in means:
            mean, ends = means[key]
            cells[key] = f"**{mean:{form}}**" + (f" ({ends[0]:{form}} to {ends[1]:{form}})" if ends else "")
    if "win_rate" in means:
        cells["wtl"] = " / ".join(str(sum(r[x] for r in rows)) for x in "WTL")
        cells["unparsable"] = str(sum(r["unparsable"] for r in rows))
    lines.append(f"| **mean of {len(rows)}** | " + " | ".join(cells.get(key, "-") for key, _, _ in COLUMNS) + " |")
    return "\n".join([*lines, "", *notes]) + "\n"


def main():
    args = settings()
    if bool(args.judge_url) != bool(args.judge_model) or args.judge_url and not re.match(r"https?://[^\s/]", args.judge_url):
        fail(f"--judge-url {args.judge_url!r}, --judge-model {args.judge_model!r}: expected both or neither, and an address such as http://localhost:8000/v1")
    if not isinstance(args.judge_options, dict):
        fail(f"--judge-options: expected a JSON object, found {args.judge_options!r}")
    url = args.judge_url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    key = (os.environ.get("NANOBE_JUDGE_KEY") or os.environ.get("OPENAI_API_KEY") or "").strip()    # stays in memory: never printed, never written
    roles, path = read_roles(args.data, args.roles, args.num_roles), Path(f"{args.out}.answers.jsonl")
    lock = filelock.FileLock(f"{args.out}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        lock.acquire(timeout=0)
    except filelock.Timeout:
        fail(f"--out {args.out}: another run is writing it; wait for it, or give another --out")
    except OSError as e:
        fail(f"--out {args.out}: cannot be written: {e.strerror}")
    folder = Path(args.artifacts or path.parent / "roles")
    for name, role in roles.items():
        role |= {"prompt": TEMPLATE.format(role=name, description=role["description"]), "path": folder / f"{name.replace(' ', '_')}.pt"}
        if not args.artifacts:
            train(args, role)                                                   # stage 2 measures KL on all of the test questions
        role["test"] = role["test"][:args.num_questions]

    device, dtype, attention = pick_device(args.device, args.dtype)
    model, tokenizer = load_frozen(args.model, device, dtype, attention, args.trust_remote_code)
    before, d = fingerprint(model), model.get_input_embeddings().weight.shape[1]
    ends = model.generation_config.eos_token_id
    stop = torch.tensor(tokenizer.eos_token_id if ends is None else ends).view(-1)
    room = model.config.max_position_embeddings - args.max_new_tokens
    sampling = [args.temperature, args.top_p, args.seed] if args.temperature > 0 else []

    # what is fed for each answer; its key is a hash of all that the answer depends on
    plan = {}                                                                                       # (role, condition) -> {key: (question, ids)}
    for name, role in roles.items():
        maker = f"python eval_rolellm.py --roles {shlex.quote(name)} --model {args.model}, without --artifacts"
        be = role["be"] = load_artifact(role["path"], "be", before, d, maker)
        slot, prompt = [-1 - i for i in range(len(be["vector"]))], be["prompt"]["messages"]
        if [m["content"] for m in prompt] != [role["prompt"]]:
            fail(f"{role['path']}: its vector was made for another prompt than RoleLLM's for {name}; make one with: {maker}")
        for condition, (question, _) in itertools.product(("full", "be", "none"), role["test"]):
            turns = [{"role": "user", "content": question}]
            ids = chat_ids(tokenizer, prompt + turns) if condition == "full" else layout_ids(tokenizer, be["layout"], slot if condition == "be" else [], turns)
            if len(ids) > room:
                fail(f"{name}: expected at most {room} tokens of context (the model's {room + args.max_new_tokens} less --max-new-tokens), found {len(ids)}")
            vector = be["vector"].tolist() if condition == "be" else []
            plan.setdefault((name, condition), {})[digest(before, ids, vector, stop.tolist(), args.max_new_tokens, sampling, str(dtype))] = question, ids

    # the answers
    found, made = read_rows(path), 0
    with open(path, "a", encoding="utf-8") as f, tqdm(total=sum(k not in found for rows in plan.values() for k in rows), desc="answers", dynamic_ncols=True) as bar:
        for (name, condition), rows in plan.items():
            vector, missing = roles[name]["be"]["vector"].to(device), [k for k in rows if k not in found]
            ids, seeds = [rows[k][1] for k in missing], [int(k[:15], 16) for k in missing]
            for i, said in generate(model, ids, vector, stop, args.max_new_tokens, args.temperature, args.top_p, seeds):
                row = {"key": missing[i], "role": name, "condition": condition, "question": rows[missing[i]][0],
                       "answer": tokenizer.decode(said, skip_special_tokens=True).strip(), "tokens": len(said)}
                f.write(json.dumps(row) + "\n")
                f.flush()
                found[row["key"]], made = row, made + 1
                bar.update()
    texts = {(name, condition, question): found[k]["answer"] for (name, condition), rows in plan.items() for k, (question, _) in rows.items()}
    print(f"answers: {len(texts) - made} found, {made} made, {path}")
    verdicts = judge(args, roles, texts, url, args.judge_options, key) if args.judge_url else {}

    # the scores. RoleLLM names ROUGE-L and published no scorer; without a stemmer is the package's default
    scorer, rows = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False), []
    for name, role in roles.items():
        be, r = role["be"], {"role": name, "n": len(role["test"])}
        for condition in ("full", "be", "none"):
            answers = [(texts[name, condition, q], texts[name, "full", q], references) for q, references in role["test"]]
            r[condition] = statistics.fmean(scorer.score_multi(references, a)["rougeL"].fmeasure for a, _, references in answers)   # the best of several references
            r[f"{condition}_teacher"] = statistics.fmean(scorer.score(teacher, a)["rougeL"].fmeasure for a, teacher, _ in answers)
        r["retention"] = r["be"] / r["full"] if r["full"] > 0 else None
        control = next((row for what, row in be["metrics"].get("controls", {}).items() if what.startswith("[BE]")), {})            # stage 2's own table
        r |= {"prompt_tokens": be["prompt"]["tokens"], "k": len(be["vector"]), "layout": be["layout"],
              "kl": control.get("kl"), "gap_closed": control.get("gap_closed"), "held_out_gap_closed": be["metrics"].get("held_out_gap_closed"),
              **verdicts.get(name, dict.fromkeys(["W", "T", "L", "unparsable", "both_orders"]))}
        judged = sum(r[x] for x in "WTL") if verdicts else 0
        r |= {"win_rate": (r["W"] + r["T"] / 2) / judged if judged else None, "wtl": f"{r['W']} / {r['T']} / {r['L']}" if verdicts else None}
        rows.append(r)
    means = summarize(rows)
    decoding = f"temperature {args.temperature}, top-p {args.top_p}, seed {args.seed}" if sampling else "greedy"
    notes = [f"{args.model}; {decoding}, {args.max_new_tokens} new tokens. ROUGE-L F, without a stemmer, the best of a question's references; *~ full*: against the full prompt's answer; "
             "*none*: the template's words around an empty slot. KL and gap closed: stage 2's own table, over all of its test questions. Means over roles, with a 95% bootstrap interval over roles"
             + f", which for {len(rows)} roles is little more than their range" * (1 < len(rows) < 6) + "."]
    if verdicts:
        decided, alike = sum(r["W"] + r["L"] for r in rows), sum(r["both_orders"] for r in rows)
        notes += ["", f"Judge {args.judge_model}: [BE] against the full prompt, each pair in both orders; win rate = (W + T / 2) / (W + T + L); equal answers are a tie; "
                      f"pairs without two clear verdicts are counted apart. {alike} of the {decided} pairs won or lost are so in both orders, the others in one, with TIE in the other."]
    text = report(rows, means, notes)
    write(f"{args.out}.md", text)
    config = {k: v for k, v in vars(args).items() if k != "judge_url"}
    over = {k: {"mean": mean, "interval_95": ends} for k, (mean, ends) in means.items()}
    write(f"{args.out}.json", json.dumps({"config": config, "fingerprint": before, "roles": rows, "mean": over}, indent=1) + "\n")
    lock.release()
    print(f"\n{text}\nwrote {args.out}.md and {args.out}.json")


if __name__ == "__main__":
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, lambda stop, frame: sys.exit(128 + stop))           # the rows that were written stay
    try:
        main()
    except OSError as e:
        fail(f"{e.filename or 'the output'}: could not be read or written ({e.strerror}); the rows so far are kept, and the same command goes on from there")
