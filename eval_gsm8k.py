"""GSM8K: how many questions the frozen model answers right with the full prompt, with [BE] in its place, with neither.

    full prompt   the artifact's messages, then the question
    FILE.pt       [BE] of this artifact as the system message, then the question
    no prompt     the question alone; a system message that the template adds by itself stands here and in full prompt

    python data/gsm8k/prepare.py                        # once: the questions
    python eval_gsm8k.py                                # out/be.pt, every test question -> out/gsm8k.jsonl and .json
    python eval_gsm8k.py --be a.pt b.pt --n 250         # two vectors of one prompt, the first 250 questions

Greedy. Answers are saved as they come, and the same command goes on after a kill. The model is loaded only where one is
missing: --be artifacts/be-gsm8k-8shot-*.pt --n 250 --out results/gsm8k.jsonl gives the committed table in a second.
"""
import argparse, hashlib, itertools, json, math, os, re, sys, time, unicodedata, zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm

# as in prompts/gsm8k_8shot.json
WORDING = """Given the following problem, reason and give a final answer to the problem.
Problem: {question}
Your response should end with "The final answer is [answer]" where [answer] is the response to the problem."""


def settings():
    formats = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formats, {}))
    add = p.add_argument
    add("--be", default=["out/be.pt"], nargs="+", help="artifacts of one prompt and one model, each a condition")
    add("--model", help="hub name or folder; None is the one that the artifact names")
    add("--data", default="data/gsm8k/test.jsonl", help="rows with a question, and an answer that ends with #### gold")
    add("--n", type=int, help="the first n questions; None is all")
    add("--max-new-tokens", type=int, default=256, help="an answer is cut here")
    add("--batch", type=int, default=32, help="questions between two saves; each batch reads the prompt anew")
    add("--out", default="out/gsm8k.jsonl", help="a row an answer; the table goes beside it, as .json")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"], help="auto: the first that is there")
    return p.parse_args()


# --- shared: load_frozen ----------------------------------------------------------------------
def fail(message):
    """A user's mistake: one line that says what was expected, what came and what to do; exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def beside(path):
    """What the project ships and is not in the current folder is looked for beside this script. out/ stays here."""
    return Path(path) if Path(path).exists() or str(path)[:4] == "out/" else Path(__file__).resolve().parent / path


def load_frozen(name, device="auto"):
    """The frozen chat model, bf16 on CUDA and on CPUs that multiply it, and its tokenizer. name: hub name or folder.
    Exits with one line unless it is a whole Llama, Qwen2 or Qwen3 chat model with full attention in every layer."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    native = device == "cuda" or device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    chat = [{"role": role, "content": f"Be a {role}."} for role in ("system", "user", "assistant", "user")]
    try:
        source = beside(name).resolve(strict=True) if name.startswith(("models/", ".", "/")) else name
        config = transformers.AutoConfig.from_pretrained(source)
        kinds = {config.model_type, *(getattr(config, "layer_types", None) or [])}
        if kinds - {"llama", "qwen2", "qwen3", "full_attention"}:
            raise ValueError(f"expected llama, qwen2 or qwen3, full attention in every layer; found {sorted(kinds)}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        joint = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, **TEMPLATE)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype="bfloat16" if native else "float32", attn_implementation="sdpa", output_loading_info=True)
        model = model.to(device).requires_grad_(False).eval()
        ends = model.generation_config.eos_token_id         # folders disagree on what ends a turn: each of these does
        ends = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
        whole = chat_ids(tokenizer, chat) == joint          # no message is left out, moved, or joined to other words
        if info["missing_keys"] or not ends or not whole:
            raise ValueError(f"expected every weight, found {len(info['missing_keys'])} missing; an end of turn, found "
                             f"{ends}; messages left as they are by template and tokenizer, found {whole}")
    except Exception as e:                                  # broken folders raise many types; each means the same
        fail(f"--model {name} on {device}: no Llama or Qwen chat model: {e}; for the default: python models/prepare.py")
    flash = device == "cuda" and torch.cuda.is_bf16_supported(False) and transformers.utils.is_flash_attn_2_available()
    model.long_rows = "flash_attention_2" if flash else "sdpa"          # flash-attn takes no mask, and no older card
    model.generation_config.eos_token_id, rope, longest = ends, config.rope_parameters, config.max_position_embeddings
    factor = rope["factor"] if rope["rope_type"] in ("linear", "dynamic", "yarn") else 1    # llama3's is in longest
    tokenizer.model_max_length = max(longest, int(factor * (rope.get("original_max_position_embeddings") or longest)))
    sample = [key.encode() + w.flatten()[::997].bfloat16().view(torch.int16).cpu().numpy().tobytes()
              for key, w in model.named_parameters()]
    model.fingerprint = hashlib.sha256(b"".join(sample)).hexdigest()        # a vector fits these weights and no others
    print(f"{name} on {device}, {str(model.dtype)[6:]}, long rows with {model.long_rows}")
    return model, tokenizer
# --- end shared -------------------------------------------------------------------------------

# --- shared: embed ----------------------------------------------------------------------------
def embed(model, ids, learned):
    """The hook: ids (B, T) to input embeddings (B, T, d). id >= 0 is a token of the frozen table; -1 - i is row i of
    learned (n, d), an fp32 master, cast here: bf16 numbers near 0.5 are 0.004 apart, too coarse for a small step."""
    tokens = model.get_input_embeddings()(ids.clamp(min=0))
    rows = F.embedding((-1 - ids).clamp(min=0), learned.to(tokens.dtype))
    return torch.where((ids < 0)[..., None], rows, tokens)
# --- end shared -------------------------------------------------------------------------------

# --- shared: chat_ids -------------------------------------------------------------------------
TEMPLATE = {"date_string": "26 Jul 2024", "enable_thinking": False}     # else Llama 3 says today's, Qwen3 thinks aloud


def text_ids(tokenizer, text):
    """Plain text: no BOS, and the name of a special token inside it is text."""
    return tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def chat_ids(tokenizer, messages, generate=True):
    """A dialogue in the model's own template, up to where the assistant speaks. A content is text, or ids such as the
    slot [-1]: the template is rendered with a mark in the place of each, and cut at the marks."""
    contents = [m["content"] for m in messages]
    turns = [m | {"content": "\ue000"} for m in messages]                            # a character that no template has
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate, **TEMPLATE)
    ids, *between = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split("\ue000")]
    for content, after in zip(contents, between):
        ids = ids + (text_ids(tokenizer, content) if isinstance(content, str) else content) + after
    if len(ids) > tokenizer.model_max_length:
        fail(f"at most {tokenizer.model_max_length} tokens fit, not {len(ids)}; shorten {max(contents, key=len)!r:.40}")
    return ids
# --- end shared -------------------------------------------------------------------------------

# --- shared: artifact -------------------------------------------------------------------------
def load(path, kind, maker, model=None):
    """A whole artifact of this kind, made for this model; else one line that names the command that makes it."""
    try:
        whole = zipfile.ZipFile(beside(path)).testzip() is None                 # the zip's own checksums
        artifact = torch.load(beside(path), map_location="cpu", weights_only=True)
        if not whole or artifact["kind"] != kind or model and artifact["model"]["fingerprint"] != model.fingerprint:
            raise ValueError(f"{artifact['kind']} of {artifact['model']['name']}, or a wrong checksum")
    except Exception as e:                                  # a damaged file raises many types; each means the same
        fail(f"{path}: expected a whole [{kind.upper()}] for this model, found {e!r:.150}; make it with: {maker}")
    return artifact
# --- end shared -------------------------------------------------------------------------------

# --- shared: pack -----------------------------------------------------------------------------
def pack(rows, n):
    """Rows of ids as ONE sequence: the n ids that all begin with stand once, owned by -1, then the rest of row b, owned
    by b. No padding, and a prompt of thousands of tokens is read once -> ids, positions, owners, each (T,).
    [7 8 1 2], [7 8 3]:     ids 7 8 1 2 3     positions 0 1 2 3 2     owners -1 -1 0 0 1"""
    shared = [(rows[0][p], p, -1) for p in range(n)]
    own = [(row[p], p, b) for b, row in enumerate(rows) for p in range(n, len(row))]
    return torch.tensor(shared + own).T


def read(model, learned, ids, positions, owners, cache=None):
    """The last t ids of a pack with owners (T,); those before are in the cache, which these join. Each sees the shared
    beginning and its own row, up to itself -> their last hidden states (t, d). By place: transformers renames these."""
    see = ((owners == -1) | (owners == owners[-len(ids):, None])).tril(len(owners) - len(ids))          # (t, T)
    mask = torch.where(see, 0.0, torch.finfo(model.dtype).min).to(model.device, model.dtype)[None, None]
    embeds, positions = embed(model, ids[None].to(model.device), learned), positions[None].to(model.device)
    return model.get_decoder()(None, mask, positions, cache, embeds, use_cache=cache is not None).last_hidden_state[0]


@torch.no_grad()
def answer(model, rows, learned, limit, pack_tokens=4096):
    """The model's own greedy answers to rows of ids, each up to an end of turn or limit tokens -> lists of ids, and the
    hidden states (T, d) they were chosen from. As an answer ends, its row leaves the pack and the next one joins."""
    weight, stop = model.get_output_embeddings().weight, model.generation_config.eos_token_id
    n = min(len(os.path.commonprefix(rows)), min(map(len, rows)) - 1)       # each row keeps an id of its own
    size = max(1, pack_tokens // (max(map(len, rows)) - n + limit))         # attention costs the square of a pack
    texts, hidden, speaking = [row[:] for row in rows], [[] for _ in rows], []      # B rows speak at a time
    cache, owners = transformers.DynamicCache(), torch.full((n,), -1)
    if n:
        read(model, learned, *pack([rows[0][:n]], n), cache)                # what all begin with, once
    waiting = iter(tqdm(range(len(rows)), desc="answers", leave=False))
    while speaking := speaking + list(itertools.islice(waiting, size - len(speaking))):     # free places are taken
        joining = [(texts[b][p], p, b) for b in speaking if not hidden[b] for p in range(n, len(texts[b]) - 1)]
        last = [(texts[b][-1], len(texts[b]) - 1, b) for b in speaking]
        ids, positions, new = torch.tensor(joining + last).T
        owners = torch.cat([owners, new])
        h = read(model, learned, ids, positions, owners, cache)[-len(last):].clone()               # (B, d), of the last
        for b, token, state in zip(speaking, (h @ weight.T).argmax(-1).cpu().tolist(), h.cpu()):
            texts[b].append(token)
            hidden[b].append(state)
        speaking = [b for b in speaking if texts[b][-1] not in stop and len(hidden[b]) < limit]
        if len(speaking) < len(last):                       # who has ended leaves, with its keys and values
            stay = torch.isin(owners, torch.tensor([-1] + speaking))
            owners = owners[stay]
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[:, :, stay], layer.values[:, :, stay]
    return [text[len(row):] for text, row in zip(texts, rows)], [torch.stack(states) for states in hidden]
# --- end shared -------------------------------------------------------------------------------


# a minus, but not that of 16-3; thousands in groups of three behind one kind of mark; decimals or a fraction
NUMBER = (r"(?P<number>(?:(?<![\w)%])(?<![\d)%] )-)?"
          r"(?:\d{1,3}(?P<mark>[,' ])\d{3}(?:(?P=mark)\d{3})*(?!\d)|\d+|(?<!\w)(?=\.\d))"
          r"(?:\.\d+|/[1-9]\d*(?![,.]?\d))?)")
# of an equation what it comes to: "The final answer is 9 eggs * $2.00 = $18.00"
CLOSING = r"the\s+final\s+answer\s+is(?::?(?:[^.!?,;:\n]|[.,](?=\d))*=)?[^a-z0-9.!?]*?" + NUMBER
sys.set_int_max_str_digits(0)                               # a model may repeat a digit until it is cut


def numbers(text, pattern=NUMBER):
    """The numbers in a text, exact: "-$1,000.50, 1 000, 25%" -> [-2001/2, 1000, 25]."""
    text = re.sub("[\u00b2\u00b3\u00b9\u2070-\u2079]", "", text)                    # the 2 of a square metre
    text = unicodedata.normalize("NFKC", text).translate({0x2212: "-", 0x2013: "-", 0x2019: "'"})
    text = re.sub(r"\\[A-Za-z]+", "*", text.replace("{,}", ",")).replace("\\", "")  # LaTeX: \boxed{\$1{,}000}
    text = re.sub("-[$\u20ac\u00a3]", "-", text)
    found = re.finditer(pattern, text, re.ASCII | re.IGNORECASE)
    return [Fraction(re.sub("[,' ]", "", match["number"])) for match in found]


def predicted_number(text):
    """The number that an answer gives, or None: the last one directly behind "The final answer is", else the last of
    all. Thoughts do not count, and "the final answer is what step 3 gave" moves nothing."""
    said = re.sub("<think>.*?(</think>|$)", "", text, flags=re.DOTALL).rpartition("</think>")[2]
    found = numbers(said, CLOSING) or numbers(said) or [None]
    return found[-1]


def summarise(rows, right, full):
    """A condition's line of the table: its rows, their verdicts, and those of the full prompt on the same questions."""
    n, k, z = len(rows), sum(right), 1.959964
    lost = sum(a and not b for a, b in zip(full, right))
    won = sum(b and not a for a, b in zip(full, right))
    # Wilson (1927): inside [0, 1], and with a width even where no answer is right
    centre, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    # a question's difference is -1, 1 or 0, so questions drawn anew are counts drawn from a multinomial
    drawn = np.random.default_rng(0).multinomial(n, [lost / n, won / n, (n - lost - won) / n], size=10_000)
    line = {"accuracy": k / n, "correct": k, "n": n,
            "accuracy_95": [max(0.0, (centre - half) / (n + z * z)), min(1.0, (centre + half) / (n + z * z))],
            "no_number": sum(r["predicted"] is None for r in rows), "cut": sum(r["cut"] for r in rows),
            "minus_full": (won - lost) / n,
            "minus_full_95": np.quantile((drawn[:, 1] - drawn[:, 0]) / n, [0.025, 0.975]).tolist(),
            "full_alone": lost, "it_alone": won, "retention": k / sum(full) if any(full) else None}
    return line | {key: sum(r[key] for r in rows) / n for key in ("context_tokens", "new_tokens", "seconds")}


def main():
    args = settings()
    out, limit, maker = Path(args.out.removesuffix(".jsonl") + ".jsonl"), args.max_new_tokens, "python stage2_kd.py"
    artifacts = {path: load(path, "be", maker) for path in args.be}
    first, *others = artifacts.values()
    messages, made_for = first["messages"], first["model"]
    if any(a["messages"] != messages or a["model"]["fingerprint"] != made_for["fingerprint"] for a in others):
        fail("--be: expected artifacts of one prompt and one model; give those of others to a run of their own")
    try:
        rows = [json.loads(line) for line in beside(args.data).open(encoding="utf-8")][:args.n]
        asked = [[{"role": "user", "content": WORDING.format(question=r["question"].strip())}] for r in rows]
        gold = [numbers(r["answer"].split("####")[1])[0] for r in rows]
        if not rows or min(args.batch, args.n or 1) < 1:
            raise ValueError("no question, or a --n or --batch of less than one")
    except Exception as e:                                  # each of many types means the same
        fail(f"--data {args.data}: expected rows with a question, and an answer that ends with #### and a number; "
             f"found {type(e).__name__}: {e}; make it with: python data/gsm8k/prepare.py")

    # what stands before the question in each condition; and each answer's key, a hash of the weights, of prompt or
    # vector, and of the question: an answer that ended by itself is the same under any limit that it fits in
    starts, decides, keys = {"full prompt": messages}, {"full prompt": messages, "no prompt": []}, {}
    for path, be in artifacts.items():
        starts[path] = [{"role": "system", "content": [-1 - i for i in range(len(be["vector"]))]}]
        decides[path] = hashlib.sha256(be["vector"].numpy().tobytes()).hexdigest()
    starts["no prompt"] = []
    for name in starts:
        parts = [json.dumps([made_for["fingerprint"], decides[name], turns]) for turns in asked]
        keys[name] = [hashlib.sha256(part.encode()).hexdigest() for part in parts]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a+", encoding="utf-8") as file:      # the place is tried before the work, not after it
            file.seek(0)
            kept = [json.loads(line) for line in file]
        done = {r["key"]: r for r in kept if r["new_tokens"] == limit or r["new_tokens"] < limit and not r["cut"]}
    except (OSError, ValueError, KeyError, TypeError) as e:
        fail(f"--out {out}: expected a place to write to, or the answers of an earlier run: {e}; give another --out")
    missing = sum(key not in done for name in keys for key in keys[name])
    print(f"{len(asked)} questions, {len(starts)} conditions, {missing} answers to make")

    if missing:
        model, tokenizer = load_frozen(args.model or made_for["name"], args.device)
        load(args.be[0], "be", maker, model)                # made for these weights?
        tokenizer.model_max_length -= limit                 # so that chat_ids leaves room for the answer
        fed = {name: [chat_ids(tokenizer, start + turns) for turns in asked] for name, start in starts.items()}

        # a few questions in all conditions, then the next few
        steps = [(at, name) for at in range(0, len(asked), args.batch) for name in starts]
        for at, name in tqdm(steps, desc="GSM8K"):
            part = [i for i in range(len(asked))[at:at + args.batch] if keys[name][i] not in done]
            if not part:
                continue
            be = artifacts.get(name, first)["vector"].to(model.device)
            began = time.perf_counter()                     # reading the prompt is part of it
            answers, _ = answer(model, [fed[name][i] for i in part], be, limit)
            seconds = (time.perf_counter() - began) / len(part)
            for i, ids in zip(part, answers):
                row = {"key": keys[name][i], "condition": name, "question": i,
                       "answer": tokenizer.decode(ids, skip_special_tokens=True).strip(),
                       "cut": ids[-1] not in model.generation_config.eos_token_id, "new_tokens": len(ids),
                       "context_tokens": len(fed[name][i]), "seconds": seconds}
                done[row["key"]] = row
                kept.append(row)
            Path(f"{out}.tmp").write_text("".join(json.dumps(row) + "\n" for row in kept))  # a kill leaves no half row
            os.replace(f"{out}.tmp", out)

    table, full = {}, None
    print("accuracy  95%           no number  cut  minus full  95%            retention  context  new     s")
    for name in starts:
        rows = [done[key] | {"predicted": predicted_number(done[key]["answer"])} for key in keys[name]]
        right = [row["predicted"] == number for row, number in zip(rows, gold)]
        full = full or right                                # the full prompt comes first
        table[name] = t = summarise(rows, right, full)
        low, high, less, more = (f"{100 * x:.1f}" for x in t["accuracy_95"] + t["minus_full_95"])
        retention = math.nan if t["retention"] is None else t["retention"]
        print(f"{t['accuracy']:8.1%}  {low} to {high:5}  {t['no_number']:9}  {t['cut']:3}  {t['minus_full']:+10.1%}  "
              f"{less:>5} to {more:5} {retention:10.1%}  {t['context_tokens']:7.0f}  "
              f"{t['new_tokens']:3.0f}  {t['seconds']:4.1f}  {name}")
    Path(f"{out}.tmp").write_text(json.dumps({"table": table, "model": made_for, "config": vars(args)}, indent=1))
    os.replace(f"{out}.tmp", out.with_suffix(".json"))
    print(f"wrote {out.with_suffix('.json')}; every answer is in {out}")


if __name__ == "__main__":
    main()
