"""Does [BE] do what its prompt does? Measured on test queries, beside all else that could stand in the prompt's place.

    teacher      the frozen model with the full prompt answers each query greedily: a_1 ... a_T
    KL           mean_t KL(P(. | prompt, query, a_<t) || P(. | [BE], query, a_<t)) over all answers, nats a token
    gap closed   1 - KL / KL(no prompt): 0 is no better than no prompt, 1 is as good as the prompt

    python eval_kl.py                                               # out/be.pt, NAME.test.txt beside its prompt
    python eval_kl.py --queries q.jsonl --out out/q.kl.json         # other queries

Expect   prompts/pirate.txt, 40 test queries, two CPU cores: a minute, 0.63 of the gap closed.
The full prompt's own row is 0.0000 in fp32 and about 0.001 in bf16: that much is rounding.
"""
import argparse, hashlib, itertools, json, os, re, sys, zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm


def settings():
    formats = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formats, {}))
    add = p.add_argument
    add("--be", default="out/be.pt", help="the artifact, of stage 2 or of stage 1")
    add("--queries", help="test queries; None is NAME.test.txt beside the prompt it was trained on")
    add("--model", help="hub name or folder; None is the one that the artifact names")
    add("--answer-tokens", type=int, help="the teacher's answers are cut here; None is where training cut them")
    add("--out", help="every number, as json; None is NAME.kl.json beside the artifact")
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

# --- shared: answer_hidden --------------------------------------------------------------------
def answer_hidden(model, rows, answers, learned):
    """The last hidden states that predict the tokens of the answers, row after row -> (sum of T, d)."""
    n = min(len(os.path.commonprefix(rows)), min(map(len, rows)) - 1)
    ids, positions, owners = pack([row + a[:-1] for row, a in zip(rows, answers)], n)
    if len(rows) > 1 and len(ids) - n > 4096:                               # attention costs the square of a pack
        halves = slice(None, len(rows) // 2), slice(len(rows) // 2, None)
        return torch.cat([answer_hidden(model, rows[half], answers[half], learned) for half in halves])
    last = torch.tensor([len(row) - 1 for row in rows])     # a row's last id predicts its answer's first token
    predicts = (owners >= 0) & (positions >= last[owners])                                                  # (T,)
    return read(model, learned, ids, positions, owners)[predicts]
# --- end shared -------------------------------------------------------------------------------

# --- shared: read_queries ---------------------------------------------------------------------
def read_queries(path):
    """A query a line: in a .txt a text; in all other files, as .jsonl, an object with a question, query or instruction
    (and its input), or with messages, the last one the user's -> chats, lists of messages, each once."""
    where, chats = path, {}
    try:
        for number, line in enumerate(beside(path).read_text(encoding="utf-8-sig").split("\n"), 1):
            where = f"{path}, line {number}, {line[:60]!r}"
            if not line.strip():
                continue
            is_json = Path(path).suffix.lower() != ".txt" or re.match(r'\s*[\[{]\s*([\[{"]|$)', line)
            row = json.loads(line) if is_json else {"query": line}
            texts = [row[key] for key in ("question", "query", "instruction", "input") if row.get(key)]
            turns = row.get("messages") or [{"role": "user", "content": "\n\n".join(texts)}]
            turns = [{"role": m["role"], "content": m["content"].strip().encode().decode()} for m in turns]
            roles = [m["role"] for m in turns]
            if roles[-1] != "user" or not turns[-1]["content"] or {*roles} - {"user", "assistant"}:
                raise ValueError(f"no text, or turns of {roles}")
            chats[json.dumps(turns)] = turns
    except Exception as e:                                  # each of many types means the same
        fail(f"{where}: expected in a .txt a text in UTF-8, else JSON rows: a question, query, instruction or messages "
             f"ending with the user's; found {e!r:.150}; for some: python queries.py --prompt P --seed N --out {path}")
    return list(chats.values())
# --- end shared -------------------------------------------------------------------------------


@torch.no_grad()
def main():
    args = settings()
    artifact = load(args.be, "be", "python stage2_kd.py --prompt PROMPT")
    args.model = args.model or artifact["model"]["name"]
    args.answer_tokens = args.answer_tokens or artifact["config"].get("answer_tokens", 32)  # stage 1 has no answers
    args.out = args.out or str(beside(args.be).with_suffix(".kl.json"))
    args.queries = args.queries or re.sub(r"\.(txt|json|md)$", "", artifact["config"]["prompt"]) + ".test.txt"
    asked = read_queries(args.queries)
    chats = [chat for chat in asked if chat not in artifact.get("trained_on", [])]
    print(f"{args.queries}: {len(chats)} test queries; {len(asked) - len(chats)} left out, listed in it as trained on")
    if len(chats) < 2 or args.answer_tokens < 1:
        fail(f"--queries {args.queries}: expected 2 not in its training, found {len(chats)}; --answer-tokens above 0")
    ours = not Path(args.out).is_file() or b'"controls"' in Path(args.out).read_bytes()
    if not ours or not args.out.endswith(".json") or not os.access(f"{Path(args.out).parent}/", os.W_OK):
        fail(f"--out {args.out}: expected a new .json, or an earlier table, in a folder to write to; give another")
    model, tokenizer = load_frozen(args.model, args.device)
    load(args.be, "be", "python stage2_kd.py --prompt PROMPT", model)                       # made for these weights?
    tokenizer.model_max_length -= args.answer_tokens        # so that chat_ids leaves room for the answer

    # what is fed: the prompt or, in its place, [BE], nothing, noise as a [BE] begins, or the prompt's first k tokens
    table, weight = model.get_input_embeddings().weight.float(), model.get_output_embeddings().weight   # (V, d) both
    k, generator = len(artifact["vector"]), torch.Generator().manual_seed(1)
    noise = table.mean(0) + table.std(0) * torch.randn(k, table.shape[1], generator=generator).to(table)
    learned = torch.cat([artifact["vector"].to(table), noise])                                          # (2k, d)
    slots = {"[BE]": [-1 - i for i in range(k)], "no prompt": [], "random vector": [-1 - i for i in range(k, 2 * k)],
             "prompt cut to k tokens": text_ids(tokenizer, artifact["messages"][0]["content"])[:k]}
    fed = {"full prompt": [chat_ids(tokenizer, artifact["messages"] + chat) for chat in chats]}
    for name, slot in slots.items():
        fed[name] = [chat_ids(tokenizer, [{"role": "system", "content": slot}] + chat) for chat in chats]
    fed["default system prompt"] = [chat_ids(tokenizer, chat) for chat in chats]

    # the teacher answers; whatever stands in the prompt's place, the model then reads these answers
    answers, target = answer(model, fed["full prompt"], learned, args.answer_tokens)                    # (T, d) each
    scores = {}                                             # (2, n): KL at tau 1 and same top-1, summed over an answer
    for name, rows in tqdm(fed.items(), leave=False):
        scores[name] = torch.zeros(2, len(chats))
        hidden = answer_hidden(model, rows, answers, learned).split([len(a) for a in answers])          # (T, d) each
        for i, states in enumerate(zip(target, hidden)):    # one by one, as (T, V) may be 100 MB
            logp, logq = (F.log_softmax((h.to(weight) @ weight.T).float(), -1) for h in states)
            scores[name][0, i] = F.kl_div(logq, logp, reduction="sum", log_target=True).clamp(min=0)
            scores[name][1, i] = (logp.argmax(-1) == logq.argmax(-1)).sum()

    n, tokens, (none, _) = len(chats), sum(map(len, answers)), scores["no prompt"]
    controls, draws = {}, torch.randint(n, (1000, n), generator=torch.Generator().manual_seed(0))
    print(f"\n{n} test queries, {tokens} answer tokens, k = {k}; KL in nats a token, 95% interval over queries\n")
    print(f"{'':24s}{'KL':>8s}{'top-1':>8s}{'gap closed':>12s}{'95%':>18s}{'tokens fed':>12s}")
    for name, (kl, same) in scores.items():
        gaps = 1 - kl[draws].sum(1) / none[draws].sum(1)                                                # (1000,)
        low, high = (gaps.quantile(q).item() for q in (0.025, 0.975))
        controls[name] = r = {
            "kl": kl.sum().item() / tokens, "top1": same.sum().item() / tokens,
            "gap_closed": 1 - (kl.sum() / none.sum()).item(), "gap_closed_95": [low, high],
            "tokens": sum(map(len, fed[name])) / n, "kl_by_query": kl.tolist()}
        print("{:24}{kl:8.4f}{top1:8.1%}{gap_closed:12.3f}{:9.3f} to {:.3f}{tokens:12.0f}".format(name, low, high, **r))
    found = {"settings": vars(args), "n": n, "answer_tokens": tokens, "queries": chats, "controls": controls}
    Path(f"{args.out}.tmp").write_text(json.dumps(found, indent=1), encoding="utf-8")
    os.replace(f"{args.out}.tmp", args.out)
    print(f"\nwrote {args.out}\nnext: python infer.py --be {args.be} --compare --query \"...\"")


if __name__ == "__main__":
    main()
