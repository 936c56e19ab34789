"""Stage 0: learn [AE], one input embedding, so that the frozen model repeats the text x_1 ... x_n before it.

    fed     <sys> x_1 ... x_n [AE] x_1 ... x_n
    loss    L_AE = mean_i -log P(x_i | x_1 ... x_n, [AE], x_<i),  i = 1 ... n + 1     (paper, stage 0)

x_(n+1) is the end of a turn: a copy has an end. One [AE] serves every prompt; the default model's is in artifacts/.

    python data/ae_corpus/prepare.py --offline                  # some texts from this machine
    python stage0_ae.py                                         # the default model -> out/ae.pt
    python stage0_ae.py --resume                                # go on from the last save of a killed run
    torchrun --nproc_per_node=8 stage0_ae.py --batch 16         # a share of each step's texts to a GPU

Expect   the default model, an hour of one CPU core: with the true past given 98% to 99% of a copy's tokens are right,
         in texts of 64 to 512 tokens, and without a trigger 87% to 96% (results/ae.txt, by an earlier version).
"""
import argparse, glob, hashlib, json, math, os, random, sys, zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm


def settings():
    formats = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formats, {}))
    add = p.add_argument
    add("--model", default="models/smollm2-135m", help="hub name or folder of a Llama or Qwen chat model")
    add("--data", default="data/ae_corpus/*.jsonl", help='a text in each line: {"text": "..."}')
    add("--out", default="out/ae.pt", help="the artifact, for stage 1")
    add("--resume", action="store_true", help="go on from --out, where there is one")
    add("--steps", type=int, default=300, help="optimizer steps")
    add("--batch", type=int, default=8, help="texts a step, one after the other")
    add("--lr", type=float, help="peak; None is 0.22 standard deviations of the embedding table")
    add("--max-tokens", type=int, default=1024, help="longer texts are cut here")
    add("--held-out", type=int, default=64, help="texts that only choose the best vector")
    add("--eval-every", type=int, default=30, help="a look at the held-out texts, and a save, every so many steps")
    add("--seed", type=int, default=0, help="random seed: of the start, the split and the order of texts")
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


def read_texts(pattern):
    """Texts of under 200 characters are left out: there is little to copy in them."""
    texts = []
    for file in sorted(filter(os.path.isfile, glob.glob(pattern) or glob.glob(str(beside(pattern))))):
        for n, line in enumerate(Path(file).read_bytes().splitlines(), 1):
            try:
                texts.append(json.loads(line)["text"].strip().encode().decode())        # half an emoji is no text
            except (ValueError, KeyError, TypeError, AttributeError):
                fail(f'{file}, line {n}: expected {{"text": "..."}} in UTF-8, found {line[:60]}')
    return [text for text in texts if len(text) >= 200]


def main():
    args = settings()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))      # torchrun sets them
    if world > 1:
        if args.device != "cpu" and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group()
    if rank:
        sys.stdout = open(os.devnull, "w")                  # rank 0 alone prints and saves
    texts = read_texts(args.data)
    random.Random(args.seed).shuffle(texts)
    held, train = texts[:args.held_out], texts[args.held_out:]
    if len(train) < args.batch or args.batch % world or min(args.steps, args.batch, args.eval_every, args.held_out) < 1:
        fail(f"expected counts above 0, --batch a multiple of {world}, and {args.held_out + args.batch} texts of 200 "
             f"characters; found {len(texts)} in {args.data}; make more: python data/ae_corpus/prepare.py --offline")
    if rank == 0:
        save(args.out)                                      # can it be written? Nothing changes
    model, tokenizer = load_frozen(args.model, args.device)
    model.set_attn_implementation(model.long_rows)
    body, weight = model.get_decoder(), model.get_output_embeddings().weight                        # weight (V, d)
    table = model.get_input_embeddings().weight             # [AE] lives among these rows
    mean, std, lr = table.float().mean(0), table.float().std(0), args.lr or 0.22 * table.float().std().item()

    # x_1 ... x_n stand where a system message would, as [BE] will: at position 0 a model has other states than anywhere
    slot, end = [-1], model.generation_config.eos_token_id[-1]          # any end of turn would do
    row = chat_ids(tokenizer, [{"role": "system", "content": slot}, {"role": "user", "content": "?"}])
    words = row[:row.index(-1)]
    longest = min(args.max_tokens, (tokenizer.model_max_length - len(words)) // 2 - 1)              # X is there twice
    print(f"{len(train)} texts to train on, {len(held)} held out -> 1 x {len(mean)} numbers")

    def copy_scores(text, slot, ae):
        """L_AE of one text, and the share of its tokens right with the true past given. slot []: no trigger."""
        x = text_ids(tokenizer, text)[:longest]
        ids = torch.tensor([words + x + slot + x], device=model.device)                             # (1, T)
        target = torch.tensor(x + [end], device=model.device)                                       # (n + 1,)
        embeds = embed(model, ids, ae)                                                              # (1, T, d)
        hidden = body(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -len(target):]    # (n + 1, d)
        z = (hidden @ weight.T).float()                                                             # (n + 1, V)
        return F.cross_entropy(z, target), (z.argmax(-1) == target).float().mean()

    @torch.no_grad()
    def held_out_scores(slot, ae):
        return torch.tensor([copy_scores(text, slot, ae) for text in held]).mean(0).tolist()

    # the one trained tensor: noise at the scale of the embedding table
    torch.manual_seed(args.seed)
    noise = mean + std * torch.randn(1, len(mean)).to(mean)
    ae = torch.nn.Parameter(noise.clone())                                                          # (1, d) fp32
    optimizer = torch.optim.AdamW([ae], weight_decay=0)
    first, best, history = 0, {"loss": math.inf, "right": 0.0, "vector": noise.cpu()}, []
    if args.resume and Path(args.out).exists():
        saved = load(args.out, "ae", f"{sys.argv[0]}, without --resume", model)
        if saved["config"] | {"resume": True} != vars(args) or "run" not in saved:
            fail(f"--resume: {args.out} holds no run of these settings; give the same, a new --out, or no --resume")
        first, best, history = saved["run"]["step"], saved["run"]["best"], saved["history"]
        ae.data.copy_(saved["run"]["ae"])
        optimizer.load_state_dict(saved["run"]["optimizer"])

    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="[AE] copy", disable=rank > 0)
    for step in bar:
        warm, cosine = min(1, (step + 1) / 20), 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimizer.param_groups[0]["lr"] = lr * warm * cosine
        optimizer.zero_grad()
        mean_loss = torch.zeros((), device=model.device)
        batch = random.Random(f"{args.seed} {step}").sample(train, args.batch)      # a resumed run draws the same
        for text in batch[rank::world]:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
                loss = copy_scores(text, slot, ae)[0] / args.batch          # X [AE] X in; out, the second X and its end
            loss.backward()
            mean_loss += loss.detach()
        for part in (ae.grad, mean_loss) if world > 1 else ():  # all of the batch is in each process's step
            torch.distributed.all_reduce(part)
        optimizer.step()

        history.append({"step": step, "L_AE": mean_loss.item()})
        if rank == 0 and ((step + 1) % args.eval_every == 0 or step + 1 == args.steps):
            loss, right = held_out_scores(slot, ae)
            history.append({"step": step, "held-out L_AE": loss})
            if loss < best["loss"]:
                best = {"loss": loss, "right": right, "vector": ae.detach().cpu().clone()}
            run = {"step": step + 1, "ae": ae.detach().cpu(), "best": best, "optimizer": optimizer.state_dict()}
            save(args.out, kind="ae", vector=best["vector"], config=vars(args), history=history, run=run,
                 model={"name": args.model, "fingerprint": model.fingerprint},
                 metrics={"held-out L_AE": best["loss"], "right": best["right"], "n": len(held)})
        bar.set_postfix(L_AE=f"{mean_loss.item():.3f}", held_out=f"{best['loss']:.3f}", right=f"{best['right']:.1%}")

    for name, fed, vector in [("[AE]", slot, best["vector"]), ("noise", slot, noise), ("no trigger", [], noise)]:
        loss, right = held_out_scores(fed, vector.to(mean))
        print(f"{name:15s} {loss:.3f} nats a token, {right:.1%} of tokens right, n = {len(held)} held-out texts")
    print(f"wrote {args.out}\nnext: python stage1_recon.py --model {args.model} --ae {args.out} --prompt P", flush=True)
    if world > 1:
        os._exit(0)                 # Python's own end aborts where one of gloo's threads still holds a tensor


if __name__ == "__main__":
    main()
