"""Stage 2: distil the prompt's behaviour into [BE], so that [BE] + query answers as prompt + query does.

    teacher   <sys> s_1 ... s_m </sys> <user> q </user> <assistant> a_1 ... a_T     the frozen model, with the prompt
    student   <sys>    [BE]     </sys> <user> q </user> <assistant> a_1 ... a_T     the same, one vector in its place
    loss      L = (1 - lambda) L_recon + lambda L_KD     L_KD = tau^2 mean_t KL(softmax(z_T/tau) || softmax(z_S/tau))

The teacher answers each query once, before training; the last hidden state h that gives each token is kept: z = W h.
(Paper, stage 2 and combined objective; the factor tau^2, which keeps the gradient's scale, is not in its formula.)

    python stage2_kd.py --prompt prompts/pirate.txt                  # out/recon.pt, pirate.queries.txt -> out/be.pt
    python stage2_kd.py --prompt p.txt --init noise --k 4 --lam 1   # distillation alone, four vectors, no stage 1
    python stage2_kd.py --prompt p.txt --resume                      # the same command again: a killed run goes on
    torchrun --nproc_per_node=8 stage2_kd.py --prompt p.txt --batch 64      # a share of each batch to a GPU

Expect   prompts/pirate.txt, two AVX2 cores: 11 minutes, 0.77 of the held-out gap closed, 0.63 on test queries.
"""
import argparse, datetime, hashlib, itertools, json, math, os, random, re, sys, zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm


def settings():
    formats = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formats, {}))
    add = p.add_argument
    add("--prompt", required=True, help="the system prompt: a text file, or a .json with a messages list")
    add("--model", default="models/smollm2-135m", help="hub name or folder of a Llama or Qwen chat model")
    add("--queries", help="what to train on; None is NAME.queries.txt beside the prompt")
    add("--init", default="out/recon.pt", help="stage 1's artifact; or noise, of --k vectors")
    add("--out", default="out/be.pt", help="the artifact")
    add("--resume", action="store_true", help="go on from --out, where there is one")
    add("--k", type=int, default=1, help="vectors to learn, with --init noise; else stage 1 has decided")
    add("--lam", type=float, default=0.9, help="lambda, the weight of L_KD; at 1 there is no L_recon")
    add("--tau", type=float, default=2.0, help="temperature of L_KD")
    add("--recon-every", type=int, default=4, help="L_recon once in so many steps, and so many times as heavy")
    add("--steps", type=int, default=300, help="optimizer steps")
    add("--batch", type=int, default=4, help="queries a step; many small steps beat few large ones")
    add("--lr", type=float, help="peak; None is 0.9 standard deviations of the embedding table")
    add("--answer-tokens", type=int, default=32, help="the teacher's answers are cut here")
    add("--held-out", type=float, default=0.15, help="share of the queries that choose the best vector, at most 32")
    add("--eval-every", type=int, default=50, help="a look at the held-out queries, and a save, every so many steps")
    add("--seed", type=int, default=0, help="random seed: of the start, the split and the order of queries")
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

# --- shared: read_prompt ----------------------------------------------------------------------
def read_prompt(path):
    """The prompt file -> messages: a text is one system message, a .json file holds a dialogue."""
    try:
        text = beside(path).read_text(encoding="utf-8-sig")
        prompt = [{"role": "system", "content": text}] if path[-5:].lower() != ".json" else json.loads(text)["messages"]
        messages = [{"role": m["role"], "content": m["content"].strip().encode().decode()} for m in prompt]
        if not any(m["content"] for m in messages) or messages[-1]["role"] == "user":
            raise ValueError("it is empty, or ends with the user's turn")
    except Exception as e:                                  # each of many types means the same
        fail(f'--prompt {path}: expected a text in UTF-8, or a .json {{"messages": [...]}}: {type(e).__name__}: {e}')
    return messages


def prompt_ids(tokenizer, messages):
    """s_1 ... s_m, what [BE] stands for: a system message's text, or a whole dialogue in the template's words."""
    if [m["role"] for m in messages] == ["system"]:
        return text_ids(tokenizer, messages[0]["content"])
    ids = chat_ids(tokenizer, messages, generate=False)
    return ids[1:] if ids.count(tokenizer.bos_token_id) == 1 else ids       # ChatML's BOS opens every turn
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

# --- shared: save -----------------------------------------------------------------------------
def save(path, **artifact):
    """Written beside its place and renamed: a kill or a full disk leaves the old one whole. No artifact: just a try."""
    try:
        if Path(path).exists() and b"fingerprint" not in Path(path).read_bytes():
            raise OSError("something else is there, no artifact")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(artifact, f"{path}.tmp")
        os.replace(f"{path}.tmp", path) if artifact else os.remove(f"{path}.tmp")
    except (OSError, RuntimeError) as e:                    # torch tells of a full disk by the second
        fail(f"{path}: cannot be written: {e}; what was there before is whole; mend that, or give another --out")
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


class HeadKL(torch.autograd.Function):
    """tau^2 KL(softmax(z_T / tau) || softmax(z_S / tau)) of each token, z = h W^T. W is frozen, so dL/dh_S, which is
    tau (softmax(z_S / tau) - softmax(z_T / tau)) W, is made here, a chunk at a time: no (T, V) tensor is kept."""

    @staticmethod
    def forward(ctx, student, teacher, weight, tau):
        loss, grad = [], []
        for s, t in zip(student.split(128), teacher.split(128)):
            log_s, log_t = (F.log_softmax((h @ weight.T).float() / tau, -1) for h in (s, t))                  # (c, V)
            loss.append(tau ** 2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1))
            grad.append(tau * (log_s.exp() - log_t.exp()).to(weight.dtype) @ weight)
        ctx.save_for_backward(torch.cat(grad))
        return torch.cat(loss)

    @staticmethod
    def backward(ctx, outer):
        return ctx.saved_tensors[0] * outer[:, None], None, None, None


def main():
    args = settings()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # torchrun sets them
    if world > 1:
        if args.device != "cpu" and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group(timeout=datetime.timedelta(hours=12))          # the teacher may take long
    if rank:
        sys.stdout = open(os.devnull, "w")                  # rank 0 alone answers, prints and saves
    messages = read_prompt(args.prompt)
    chats = read_queries(args.queries or re.sub(r"\.(txt|json|md)$", "", args.prompt) + ".queries.txt")
    random.Random(args.seed).shuffle(chats)
    held = range(min(32, max(1, round(args.held_out * len(chats)))))                # the first ones are held out
    train = range(len(held), len(chats))
    counts = args.k, args.steps, args.batch, args.recon_every, args.eval_every, args.answer_tokens
    if min(counts) < 1 or not args.tau > 0 or not 0 <= args.lam <= 1 or len(train) < args.batch or args.batch % world:
        fail(f"{len(train)} queries to train on, {len(held)} held out: expected at least --batch {args.batch}, a "
             f"multiple of {world}; --lam 0 to 1; --tau and all counts above 0; mend that, or add queries")
    if Path(args.init) == Path(args.out) or args.init == "noise" and args.lam < 1:
        fail(f"--init {args.init}: expected another file than --out; with noise, which has no [AE], --lam 1")
    if rank == 0:
        save(args.out)                                      # can it be written? Nothing changes
    model, tokenizer = load_frozen(args.model, args.device)
    body, weight = model.get_decoder(), model.get_output_embeddings().weight                            # weight (V, d)
    table = model.get_input_embeddings().weight             # [BE] lives among these rows
    mean, std, lr = table.float().mean(0), table.float().std(0), args.lr or 0.9 * table.float().std().item()

    # the one trained tensor: it starts from stage 1, or from noise at the scale of the embedding table
    torch.manual_seed(args.seed)
    start, ae, stage1 = mean + std * torch.randn(args.k, len(mean)).to(mean), mean.new_zeros(0, len(mean)), {}  # (k, d)
    if args.init != "noise":
        stage1 = load(args.init, "be", f"python stage1_recon.py --prompt {args.prompt} --model {args.model}", model)
        if stage1["messages"] != messages or args.k not in (1, len(stage1["vector"])):
            fail(f"{args.init}: of another prompt or k; stage1_recon.py --prompt {args.prompt} --k {args.k} makes this")
        start, ae = stage1["vector"].to(mean), stage1["ae"].to(mean)
    be = torch.nn.Parameter(start.clone())                                                              # (k, d) fp32
    optimizer = torch.optim.AdamW([be], betas=(0.9, 0.95), weight_decay=0)
    first, best, history = 0, None, []
    if args.resume and Path(args.out).exists():
        saved = load(args.out, "be", f"{sys.argv[0]}, without --resume", model)
        asked = saved["messages"], saved.get("trained_on"), saved.get("stage1"), saved["config"] | {"resume": True}
        if asked != (messages, chats, stage1.get("metrics"), vars(args)) or "run" not in saved:
            fail(f"--resume: {args.out} holds no run of these settings; give the same, a new --out, or no --resume")
        first, best, history = saved["run"]["step"], saved["run"]["best"], saved["history"]
        be.data.copy_(saved["run"]["be"])
        optimizer.load_state_dict(saved["run"]["optimizer"])

    # the data: what the teacher reads and answers, and what the student reads in its place
    s, slot = prompt_ids(tokenizer, messages), [-1 - i for i in range(len(start))]
    tokenizer.model_max_length -= args.answer_tokens        # so that chat_ids leaves room for the answer
    full = [chat_ids(tokenizer, messages + chat) for chat in chats]
    rows = [chat_ids(tokenizer, [{"role": "system", "content": slot}] + chat) for chat in chats]
    empty = [chat_ids(tokenizer, [{"role": "system", "content": []}] + chats[i]) for i in held]
    print(f"{args.prompt}: {len(s)} tokens -> k = {len(slot)}; {len(train)} queries to train on, {len(held)} held out")
    key = str([model.fingerprint, model.dtype, full, model.generation_config.eos_token_id, args.answer_tokens])
    teacher_file = Path(args.out).with_name(f"teacher-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt")
    if rank == 0 and not teacher_file.exists():
        answers, hidden = answer(model, full, start, args.answer_tokens)            # no slot in full, so no start
        save(teacher_file, answers=answers, hidden=hidden)
    if world > 1:
        torch.distributed.barrier()
    answers, taught = torch.load(teacher_file, mmap=True, weights_only=True).values()           # taught: (T, d) each

    @torch.no_grad()
    def held_out_kl(fed, vector):                                               # at tau 1, in nats a token
        student = answer_hidden(model, [fed[i] for i in held], [answers[i] for i in held], vector)      # (sum T, d)
        return HeadKL.apply(student, torch.cat([taught[i] for i in held]).to(student), weight, 1.0).mean().item()

    no_prompt, best = held_out_kl(empty, be), best or {"kl": held_out_kl(rows, be), "vector": start}
    words = rows[0][:rows[0].index(-1)]                 # L_recon as in stage 1: ... [BE] [AE] s_1 ... s_m
    recon_ids = torch.tensor([words + slot + [-1 - len(start)] * len(ae) + s], device=model.device)     # (1, T)

    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="[BE] distil", disable=rank > 0)
    for step in bar:
        warm, cosine = min(1, (step + 1) / 10), 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimizer.param_groups[0]["lr"] = lr * warm * cosine
        optimizer.zero_grad()
        epoch, at = divmod(step, len(train) // args.batch)      # of seed and step alone: a resumed run sees the same
        order = random.Random(f"{args.seed} {epoch}").sample(train, len(train))
        batch = order[at * args.batch:][:args.batch]
        tokens = sum(len(answers[i]) for i in batch)
        batch = batch[rank::world]
        with autocast:                                          # [BE] and query in; out, what prompt and query give
            hidden = answer_hidden(model, [rows[i] for i in batch], [answers[i] for i in batch], be)    # (sum T, d)
            kd = HeadKL.apply(hidden, torch.cat([taught[i] for i in batch]).to(hidden), weight, args.tau).sum() / tokens
        (args.lam * kd).backward()
        if rank == 0 and args.lam < 1 and step % args.recon_every == 0:
            model.set_attn_implementation(model.long_rows)      # one row, no mask; a pack has one
            with autocast:                                      # [BE] [AE] in; out, the prompt
                embeds = embed(model, recon_ids[:, :-1], torch.cat([be, ae]))                       # s_m is not read
                hidden = body(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -len(s):]     # (m, d)
                z = (hidden @ weight.T).float()                                                         # (m, V)
                recon = (z.logsumexp(-1) - z.gather(-1, recon_ids[0, -len(s):, None])[:, 0]).mean()
            ((1 - args.lam) * args.recon_every * recon).backward()
            model.set_attn_implementation("sdpa")
            history.append({"step": step, "L_recon": recon.item()})
        for part in (be.grad, kd.detach()) if world > 1 else ():    # in place: both are the whole batch's
            torch.distributed.all_reduce(part)
        optimizer.step()

        history.append({"step": step, "L_KD": kd.item()})
        if rank == 0 and ((step + 1) % args.eval_every == 0 or step + 1 == args.steps):
            kl = held_out_kl(rows, be)
            history.append({"step": step, "held-out KL": kl})
            if kl < best["kl"]:
                best = {"kl": kl, "vector": be.detach().clone()}
            run = {"step": step + 1, "be": be.detach().cpu(), "best": best, "optimizer": optimizer.state_dict()}
            save(args.out, kind="be", stage="kd", vector=best["vector"].cpu(), messages=messages, tokens=len(s),
                 ae=ae.cpu(), model={"name": args.model, "fingerprint": model.fingerprint},
                 metrics={"held-out KL": best["kl"], "no prompt": no_prompt, "n": len(held)},
                 config=vars(args), history=history, trained_on=chats, stage1=stage1.get("metrics"), run=run)
        bar.set_postfix(L_KD=f"{kd.item():.3f}", held_out_gap_closed=f"{1 - best['kl'] / no_prompt:.3f}")
    print(f"{1 - best['kl'] / no_prompt:.3f} of the held-out gap closed, n = {len(held)}, which chose the vector")
    print(f"wrote {args.out}\nnext: python eval_kl.py --be {args.out}", flush=True)
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        os._exit(0)                 # Python's own end aborts where one of gloo's threads still holds a tensor


if __name__ == "__main__":
    main()
