"""Stage 1: learn [BE], one input embedding, so that the frozen model gives the whole prompt P = (s_1, ..., s_m) back.

    fed     <sys> [BE] [AE] s_1 ... s_(m-1)
    loss    L_recon = mean_j -log P(s_j | [BE], [AE], s_<j)     (paper, stage 1)

[AE] is stage 0's trigger, not trained here: repeating is its work, so [BE] is free to hold the content.

    python stage1_recon.py --prompt prompts/pirate.txt          # any text file, the default model -> out/recon.pt
    python stage1_recon.py --prompt p.txt --k 4 --steps 2000    # four vectors, longer
    python stage1_recon.py --prompt prompts/gsm8k_8shot.json    # a dialogue: {"messages": [...]}

Expect   prompts/pirate.txt, 357 tokens, two CPU cores: 165 s, 3.80 nats a token, 119 of them right.
"""
import argparse, hashlib, json, math, os, sys, zipfile
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
    add("--ae", default="artifacts/ae-smollm2-135m.pt", help="stage 0's artifact; none: [BE] alone gives P back")
    add("--out", default="out/recon.pt", help="the artifact, for stage 2")
    add("--resume", action="store_true", help="go on from --out, where there is one")
    add("--k", type=int, default=1, help="vectors to learn; the paper's is 1")
    add("--steps", type=int, default=60, help="optimizer steps; four vectors and more want thousands")
    add("--lr", type=float, help="peak; None is 0.22 standard deviations of the embedding table")
    add("--seed", type=int, default=0, help="random seed of the start")
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


def main():
    args = settings()
    messages = read_prompt(args.prompt)
    if min(args.k, args.steps) < 1:
        fail(f"expected --k and --steps above 0, found {args.k} and {args.steps}")
    save(args.out)                                          # can it be written? Nothing changes
    model, tokenizer = load_frozen(args.model, args.device)
    model.set_attn_implementation(model.long_rows)
    body, weight = model.get_decoder(), model.get_output_embeddings().weight                        # weight (V, d)
    table = model.get_input_embeddings().weight             # [BE] lives among these rows
    mean, std, lr = table.float().mean(0), table.float().std(0), args.lr or 0.22 * table.float().std().item()
    ae = mean.new_zeros(0, len(mean))                       # (0, d): no trigger; else (1, d)
    if args.ae != "none":
        ae = load(args.ae, "ae", f"python stage0_ae.py --model {args.model}, and give --ae", model)["vector"].to(mean)

    # what stands before a system message in a chat, then [BE] [AE] P: attention looks back only, so with the same words
    # before it [BE] has the very keys and values here that it will have there. s_m is predicted and never read
    s, slot = prompt_ids(tokenizer, messages), [-1 - i for i in range(args.k)]
    row = chat_ids(tokenizer, [{"role": "system", "content": slot + s}, {"role": "user", "content": "?"}])   # too long?
    ids = row[:row.index(-1)] + slot + [-1 - args.k] * len(ae) + s[:-1]
    ids, target = (torch.tensor(x, device=model.device) for x in ([ids], s))                        # (1, T), (m,)
    print(f"{args.prompt}: {len(s)} tokens -> {args.k} x {len(mean)} numbers")

    # the one trained tensor: noise at the scale of the embedding table
    torch.manual_seed(args.seed)
    be = torch.nn.Parameter(mean + std * torch.randn(args.k, len(mean)).to(mean))                   # (k, d) fp32
    optimizer = torch.optim.AdamW([be], weight_decay=0)
    first, best, history = 0, {"loss": math.inf, "right": 0, "vector": be.detach().cpu().clone()}, []
    if args.resume and Path(args.out).exists():
        saved = load(args.out, "be", f"{sys.argv[0]}, without --resume", model)
        if saved["messages"] != messages or saved["config"] | {"resume": True} != vars(args) or "run" not in saved:
            fail(f"--resume: {args.out} holds no run of these settings; give the same, a new --out, or no --resume")
        first, best, history = saved["run"]["step"], saved["run"]["best"], saved["history"]
        be.data.copy_(saved["run"]["be"])
        optimizer.load_state_dict(saved["run"]["optimizer"])

    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="[BE] recon")
    for step in bar:
        warm, cosine = min(1, (step + 1) / 10), 0.5 * (1 + math.cos(math.pi * step / args.steps))
        optimizer.param_groups[0]["lr"] = lr * warm * cosine
        with autocast:                                      # [BE] [AE] s_1 ... s_(m-1) in, s_1 ... s_m out
            embeds = embed(model, ids, torch.cat([be, ae]))                                         # (1, T, d)
            hidden = body(inputs_embeds=embeds, use_cache=False).last_hidden_state[0, -len(s):]     # (m, d)
            z = (hidden @ weight.T).float()                                                         # (m, V)
            # F.cross_entropy would do, but adds up V words less exactly on a CPU: 2e-4 of the gradient
            loss = (z.logsumexp(-1) - z.gather(-1, target[:, None])[:, 0]).mean()
        optimizer.zero_grad()
        loss.backward()
        right = (z.argmax(-1) == target).sum().item()
        if loss.item() < best["loss"]:                      # all of P is in each step: the exact scores of this vector
            best = {"loss": loss.item(), "right": right, "vector": be.detach().cpu().clone()}
        optimizer.step()

        history.append({"step": step, "L_recon": loss.item()})
        bar.set_postfix(L_recon=f"{loss.item():.3f}", right=f"{right}/{len(s)}")
        if (step + 1) % 10 == 0 or step + 1 == args.steps:
            run = {"step": step + 1, "be": be.detach().cpu(), "best": best, "optimizer": optimizer.state_dict()}
            save(args.out, kind="be", stage="recon", vector=best["vector"], messages=messages, tokens=len(s),
                 ae=ae.cpu(), model={"name": args.model, "fingerprint": model.fingerprint},
                 metrics={"L_recon": best["loss"], "right": best["right"], "n": len(s)},
                 config=vars(args), history=history, run=run)

    print(f"{best['loss']:.3f} nats a token; with the true past given {best['right']} of {len(s)} tokens are right")
    print(f"wrote {args.out}\nnext: python stage2_kd.py --prompt {args.prompt} --model {args.model} --init {args.out} "
          f"--out {Path(args.out).with_name('be.' + Path(args.out).name.removeprefix('recon.'))}")


if __name__ == "__main__":
    main()
