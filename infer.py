"""Ask the frozen chat model a question with [BE] in the prompt's place, or chat with it.

    fed     <sys> [BE] </sys> <user> q </user> <assistant>      (paper, inference; [AE] is needed in training alone)

    python infer.py --query "How do I cook rice?"               # out/be.pt answers
    python infer.py --query "How do I cook rice?" --compare     # full prompt, [BE] and no prompt, each with its time
    python infer.py                                             # a chat; ctrl-D ends it
    python infer.py --be artifacts/roles/Walt_Kowalski.pt --temperature 0.7 --seed 1

The loop that says one token after the other is transformers' own: it takes embeddings as it takes ids.
"""
import argparse, hashlib, sys, time, zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers


def settings():
    formats = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formats, {}))
    add = p.add_argument
    add("--be", default="out/be.pt", help="the artifact of stage 2, or of stage 1")
    add("--model", help="hub name or folder; None is the model that the artifact was made for")
    add("--query", nargs="+", default=[], help="a question, or several, each on its own; without it, a chat")
    add("--compare", action="store_true", help="full prompt, [BE], no prompt; a chat goes on from [BE]'s answers")
    add("--max-new-tokens", type=int, default=128, help="an answer is cut here")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token; 0.7 varies")
    add("--seed", type=int, default=0, help="of what a temperature draws")
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


def main():
    args = settings()
    if not all(query.strip() for query in args.query):
        fail("--query: expected a question, found an empty one")
    if args.max_new_tokens < 1 or not args.temperature >= 0:
        fail(f"expected --max-new-tokens of at least 1, a --temperature of at least 0, found {args.max_new_tokens}, "
             f"{args.temperature}")
    maker = "python stage1_recon.py --prompt p.txt, then python stage2_kd.py --prompt p.txt"
    artifact = load(args.be, "be", maker)
    model, tokenizer = load_frozen(args.model or artifact["model"]["name"], args.device)
    load(args.be, "be", maker, model)                   # made for these weights?
    model.set_attn_implementation(model.long_rows)
    be = artifact["vector"].to(model.device)                                                        # (k, d) fp32
    slot = [-1 - i for i in range(len(be))]

    # these alone: a folder's own generation config may bring a repetition penalty, and training had none
    ends = model.generation_config.eos_token_id
    sample = {"do_sample": True, "temperature": args.temperature, "top_k": 0} if args.temperature > 0 else {}
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=ends, pad_token_id=ends[0], max_new_tokens=args.max_new_tokens, **sample)
    if args.max_new_tokens >= tokenizer.model_max_length:
        fail(f"--max-new-tokens {args.max_new_tokens}: the model's context is {tokenizer.model_max_length} in all")
    tokenizer.model_max_length -= args.max_new_tokens       # so that chat_ids leaves room for the answer
    model.generate(inputs_embeds=be[None].to(model.dtype), max_new_tokens=1)        # a GPU's first call is its slowest
    streamer = transformers.TextStreamer(tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    chat = []
    for query in args.query or iter(lambda: input("\nyou> "), None):
        query = query.encode(errors="replace").decode().strip()
        if not query:
            continue

        # what is fed: all that was said in the chat, anew at each turn
        turns = chat + [{"role": "user", "content": query}]
        systems = {"[BE]": [{"role": "system", "content": slot}]}
        if args.compare:
            systems = {"full prompt": artifact["messages"], **systems, "no prompt": [{"role": "system", "content": []}]}
        try:
            rows = {name: chat_ids(tokenizer, system + turns) for name, system in systems.items()}
        except SystemExit:                                  # too long, and that was said; a chat goes on without it
            if args.query:
                raise
            continue
        if not chat:
            ids, at = rows["[BE]"], rows["[BE]"].index(-1)
            shown = tokenizer.decode(ids[:at]) + "[BE]" * len(be) + tokenizer.decode(ids[at + len(be):])
            print(shown.replace("\n", "\\n"))
            print(f"the prompt's {artifact['tokens']} tokens became {len(be)}; {len(ids)} are fed in all\n")

        for name, ids in rows.items():
            if args.compare:
                print(f"--- {name}")
            torch.manual_seed(args.seed)
            began = time.perf_counter()
            embeds = embed(model, torch.tensor([ids], device=model.device), be)                     # (1, T, d)
            said = model.generate(inputs_embeds=embeds, streamer=streamer)[0]                       # (tokens,)
            print(f"    [{len(ids)} tokens fed, {len(said)} answered in {time.perf_counter() - began:.1f} s]\n")
            if name == "[BE]" and not args.query:           # each --query stands on its own; a chat goes on
                answer = tokenizer.decode(said, skip_special_tokens=True)
                chat = turns + [{"role": "assistant", "content": answer}]


if __name__ == "__main__":
    for terminal in filter(None, (sys.stdin, sys.stdout)):
        terminal.reconfigure(errors="replace")              # a ? for what its encoding does not have
    try:
        main()
    except (EOFError, KeyboardInterrupt):                   # ctrl-D and ctrl-C end a chat
        print()
