"""RoleBench: does [BE] play the part as well as the prompt that it stands for? Four answers to each test question.

    full   <sys> prompt </sys> <user> q </user> <assistant>      be, none: the same with [BE], or nothing, in its place
    default: no system message at all, for which many templates have words of their own
    of each: ROUGE-L F against RoleBench's references, as ..._teacher against full's own answers, and ..._kl from full
    retention = be / full        gap closed = 1 - be_kl / none_kl, over the first 32 tokens of full's answers

    python data/rolellm/prepare.py              # once: RoleBench, and each role's prompt for stages 1 and 2
    python eval_rolellm.py                      # the six of artifacts/roles -> out/rolellm.md, out/rolellm.json
    python eval_rolellm.py --artifacts mine --roles "Jack Sparrow" Coriolanus       # mine/Jack_Sparrow.pt, ...

Answers are kept beside --out, under a hash of all that decides each: a killed run goes on. results/judge.py reads them.
"""
import argparse, hashlib, itertools, json, math, os, re, sys, types, zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from rouge_score.rouge_scorer import RougeScorer
from tqdm import tqdm

# Thai, kana and Han put no blanks between words, so there a character is one. In English these are the words of
# rouge-score's own tokenizer, which knows a to z and 0 to 9 alone
ALONE = "\u0e00-\u0eff\u3041-\u30fa\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(f"[{ALONE}]|[^\\W_{ALONE}]+")
COLUMNS = ["full", "be", "none", "default", "retention", "be_teacher", "none_teacher", "default_teacher",
           "be_kl", "none_kl", "default_kl", "gap_closed"]


def settings():
    formats = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formats, {}))
    add = p.add_argument
    add("--data", default="data/rolellm/rolebench", help="a folder in RoleBench's own layout")
    add("--artifacts", default="artifacts/roles", help="a folder with NAME.pt for each role, blanks in NAME as _")
    add("--roles", nargs="+", help="names as in RoleBench; None is all that have an artifact")
    add("--num-questions", type=int, help="the first so many test questions of each role; None is all")
    add("--model", default="models/smollm2-135m", help="hub name or folder of a Llama or Qwen chat model")
    add("--max-new-tokens", type=int, default=256, help="an answer is cut here")
    add("--out", default="out/rolellm", help="the results: this with .md, .json and .answers.jsonl")
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


def read_roles(args):
    """RoleBench -> {role: (its artifact, description, {question: references})}; a question of several rows has the
    references of all."""
    test, path = {}, f"{args.data}/rolebench-eng/instruction-generalization/role_specific/test.jsonl"
    try:
        about = json.loads(beside(f"{args.data}/profiles-eng/desc.json").read_text(encoding="utf-8"))
        for row in map(json.loads, beside(path).read_text(encoding="utf-8").strip().split("\n")):
            references = test.setdefault(row["role"], {}).setdefault(" ".join(row["question"].split()), [])
            references += [row["generated"]] if isinstance(row["generated"], str) else row["generated"] or []
        files = {role: Path(args.artifacts, role.replace(" ", "_") + ".pt") for role in about if role in test}
        names = args.roles or [role for role in files if beside(files[role]).exists()]
        roles = {r: (files[r], about[r], dict([*test[r].items()][:args.num_questions or None])) for r in names}
        bare = [(r, q) for r in names for q, references in roles[r][2].items() if not "".join(references).strip()]
    except Exception as e:
        fail(f"--data {args.data}: expected RoleBench's layout with these roles in it: {type(e).__name__}: {e}; "
             "fetch it with: python data/rolellm/prepare.py")
    if bare:
        fail(f"{path}: nothing in generated for {bare[0]}; give it a reference, or remove the row")
    if not names:
        fail(f"--artifacts {args.artifacts}: expected NAME.pt for a role of {args.data}, found none")
    return roles


def interval(top, bottom):
    """95% bootstrap interval, over roles, of sum(top) / sum(bottom); None for one role."""
    top, bottom = torch.tensor([top, bottom], dtype=torch.float64)
    draws = torch.randint(len(top), (10_000, len(top)), generator=torch.Generator().manual_seed(0))
    ratios = (top[draws].sum(1) / bottom[draws].sum(1)).nan_to_num(0, 0, 0)
    return ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist() if len(top) > 1 else None


@torch.no_grad()
def main():
    args = settings()
    roles = read_roles(args)
    kept = Path(f"{args.out}.answers.jsonl")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.open("a+", encoding="utf-8") as file:     # the place is tried before the work, not after it
            file.seek(0)
            answers = {row["key"]: row for row in map(json.loads, file)}
    except (OSError, ValueError, KeyError, TypeError) as e:
        fail(f"{kept}: expected the answers of an earlier run, or a place for new ones: {e}; give another --out")
    model, tokenizer = load_frozen(args.model, args.device)
    weight, ends = model.get_output_embeddings().weight, model.generation_config.eos_token_id
    maker = f"python stage2_kd.py --model {args.model}, with the role's --prompt and --out; or give its --model"
    tokenizer.model_max_length -= args.max_new_tokens       # so that chat_ids leaves room for the answer
    artifacts = {role: load(path, "be", maker, model) for role, (path, _, _) in roles.items()}
    scorer = RougeScorer(["rougeL"], tokenizer=types.SimpleNamespace(tokenize=lambda text: WORD.findall(text.lower())))

    table = []
    for role, (_, _, questions) in roles.items():
        be, chats = artifacts[role], [[{"role": "user", "content": question}] for question in questions]
        vector, slot = be["vector"].to(model.device), [-1 - i for i in range(len(be["vector"]))]        # (k, d)
        fed = {"full": [chat_ids(tokenizer, be["messages"] + chat) for chat in chats],
               "be": [chat_ids(tokenizer, [{"role": "system", "content": slot}] + chat) for chat in chats],
               "none": [chat_ids(tokenizer, [{"role": "system", "content": []}] + chat) for chat in chats],
               "default": [chat_ids(tokenizer, chat) for chat in chats]}
        r = {"role": role, "n": len(chats), "prompt_tokens": be["tokens"], "k": len(slot)}

        # the answers, those that are not there yet
        said = {}
        for condition, rows in fed.items():
            decides = [model.fingerprint, vector.tolist() if condition == "be" else [], ends, args.max_new_tokens]
            keys = [hashlib.sha256(json.dumps([row, *decides]).encode()).hexdigest() for row in rows]
            missing = [i for i, key in enumerate(keys) if key not in answers]
            for part in [missing[i:i + 32] for i in range(0, len(missing), 32)]:
                for i, ids in zip(part, answer(model, [rows[i] for i in part], vector, args.max_new_tokens)[0]):
                    answers[keys[i]] = {
                        "key": keys[i], "role": role, "condition": condition, "question": chats[i][0]["content"],
                        "answer": tokenizer.decode(ids, skip_special_tokens=True).strip(),
                        "tokens": len(ids) - (ids[-1] in ends)}
                Path(f"{kept}.tmp").write_text("".join(json.dumps(row) + "\n" for row in answers.values()))
                os.replace(f"{kept}.tmp", kept)             # whole or not at all
            said[condition] = [answers[key] for key in keys]
        texts = {condition: [row["answer"] for row in said[condition]] for condition in fed}

        # ROUGE-L F, the best of a question's references
        for condition in fed:
            for name, golds in [("", questions.values()), ("_teacher", [[text] for text in texts["full"]])]:
                scores = [scorer.score_multi(gold, x)["rougeL"].fmeasure for gold, x in zip(golds, texts[condition])]
                r[condition + name] = sum(scores) / len(scores)
        r["retention"] = r["be"] / (r["full"] or math.nan)

        # KL from the full prompt, in nats a token of its answers
        first = [text_ids(tokenizer, text)[:32] or ends[:1] for text in texts["full"]]          # it may say nothing
        kl = dict.fromkeys(fed, 0.0)
        for i in range(0, len(chats), 8):
            hidden = {c: answer_hidden(model, rows[i:i + 8], first[i:i + 8], vector) for c, rows in fed.items()}
            logp = {c: F.log_softmax((h @ weight.T).float(), -1) for c, h in hidden.items()}        # (sum T, V) each
            for c in fed:
                kl[c] += F.kl_div(logp[c], logp["full"], reduction="sum", log_target=True).item()
        r |= {c + "_kl": nats / sum(map(len, first)) for c, nats in kl.items()}
        table.append(r | {"gap_closed": 1 - kl["be"] / kl["none"]})

    # means over roles; retention's is the ratio of two means
    means = {}
    for key in COLUMNS:
        top = [r["be" if key == "retention" else key] for r in table]
        bottom = [r["full"] if key == "retention" else 1.0 for r in table]
        means[key] = {"mean": sum(top) / (sum(bottom) or math.nan), "interval_95": interval(top, bottom)}
    last = {"role": f"mean of {len(table)}", "n": sum(r["n"] for r in table)}
    for key, m in means.items():
        last[key] = f"{m['mean']:.3f}" + (" ({:.3f} to {:.3f})".format(*m["interval_95"]) if m["interval_95"] else "")
    heads = ["role", "n", *COLUMNS]
    cells = [[f"{r[h]:.3f}" if type(r[h]) is float else str(r[h]) for h in heads] for r in [*table, last]]
    text = "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *cells])
    text += f"\n\n{args.model}, greedy, {args.max_new_tokens} new tokens; 95% intervals by a bootstrap over roles.\n"
    results = {"config": vars(args), "fingerprint": model.fingerprint, "roles": table, "mean": means}
    for kind, content in {"md": text, "json": json.dumps(results, indent=1) + "\n"}.items():
        Path(f"{args.out}.{kind}.tmp").write_text(content, encoding="utf-8")
        os.replace(f"{args.out}.{kind}.tmp", f"{args.out}.{kind}")
    print(f"\n{text}\nwrote {args.out}.md and {args.out}.json")


if __name__ == "__main__":
    main()
