"""Ask the frozen chat model a question with [BE] in the prompt's place, or chat with it.

    fed     <sys> [BE] </sys> <user> q </user> <assistant>      (paper, inference; [AE] is needed in training alone)

    python infer.py --query "How do I cook rice?"               # out/be.pt answers
    python infer.py --query "How do I cook rice?" --compare     # full prompt, [BE] and no prompt, each with its speed
    python infer.py                                             # a chat; /reset forgets it, ctrl-D ends it
    python infer.py --be artifacts/roles/Walt_Kowalski.pt --temperature 0.7 --seed 1

Expect   the demo's vector, 357 tokens of prompt, two CPU cores: the first token after 0.2 s, with the prompt 1 s.
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
    add("--compare", action="store_true", help="answer with the full prompt, with [BE] and with no prompt")
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
    """What is not in the current folder is looked for beside this script: models/, artifacts/, prompts/."""
    return Path(path) if Path(path).exists() else Path(__file__).resolve().parent / path


def load_frozen(name, device="auto"):
    """The frozen chat model, bf16 where the hardware multiplies it, and its tokenizer. name: hub name or folder. Exits
    with one line unless it is a whole Llama, Qwen2 or Qwen3 chat model with full attention in every layer."""
    transformers.utils.logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    dtype = torch.bfloat16 if device == "cuda" or device == "cpu" and native else torch.float32
    local = name.startswith(("models/", ".", "/")) or Path(name).is_dir()           # else the hub is asked for it
    source = beside(name) if local else name
    chat = [{"role": role, "content": "Be kind."} for role in ("system", "user", "assistant", "user")]
    try:
        if local and not source.is_dir():
            raise ValueError("there is no such folder")
        config = transformers.AutoConfig.from_pretrained(source)
        kinds = {config.model_type, *(getattr(config, "layer_types", None) or [])}
        if kinds - {"llama", "qwen2", "qwen3", "full_attention"}:
            raise ValueError(f"expected llama, qwen2 or qwen3, full attention in every layer; found {sorted(kinds)}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        joint = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, **TEMPLATE)
        split = chat_ids(tokenizer, chat)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
        model = model.to(device).requires_grad_(False).eval()
    except Exception as e:                                  # broken folders raise many types; each means the same
        fail(f"--model {name}: no Llama or Qwen chat model: {e}; the default one comes with: python models/prepare.py")
    ends = torch.tensor(model.generation_config.eos_token_id or []).view(-1).tolist() + [tokenizer.eos_token_id]
    ends = sorted({*ends} - {None})                         # folders disagree on what ends a turn: each of these does
    if info["missing_keys"] or split != joint or not ends:
        fail(f"--model {name}: expected every weight, found {len(info['missing_keys'])} missing; an end of turn, found "
             f"{ends}; and a tokenizer that joins no word of template and message: {split == joint}; use another")
    flash = device == "cuda" and transformers.utils.is_flash_attn_2_available()
    model.long_rows = "flash_attention_2" if flash else "sdpa"          # flash takes no mask, and a pack needs one
    model.generation_config.eos_token_id, rope, longest = ends, config.rope_parameters, config.max_position_embeddings
    factor = rope["factor"] if rope["rope_type"] in ("linear", "dynamic", "yarn") else 1    # llama3's longest counts it
    tokenizer.model_max_length = max(longest, int(factor * (rope.get("original_max_position_embeddings") or longest)))
    print(f"{name} on {device}, {str(dtype)[6:]}, long rows with {model.long_rows}")
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
# Llama 3 would print today's date, and Qwen3 would think aloud
TEMPLATE = {"date_string": "26 Jul 2024", "enable_thinking": False}


def text_ids(tokenizer, text):
    """Plain text: no BOS, and the name of a special token inside it is text."""
    return tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def chat_ids(tokenizer, messages, generate=True):
    """A dialogue in the model's own template, up to where the assistant speaks. A content is text, or ids such as the
    slot [-1]: the template is rendered with a mark for each and cut at the marks, so no content leaves its place."""
    marks = [chr(0xE000 + i) for i in range(len(messages))]
    turns = [{"role": m["role"], "content": mark} for m, mark in zip(messages, marks)]
    text, ids = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate, **TEMPLATE), []
    for m, mark in zip(messages, marks):
        before, _, text = text.partition(mark)
        ids += tokenizer(before, add_special_tokens=False)["input_ids"]
        ids += text_ids(tokenizer, m["content"]) if isinstance(m["content"], str) else m["content"]
    ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > tokenizer.model_max_length:
        fail(f"expected at most {tokenizer.model_max_length} tokens, the model's context, found {len(ids)}; shorten it")
    return ids


def later_turns(tokenizer, turns):
    """turns as they follow an answer: BOS or [], and the rest. So no system message is rendered alone: some templates
    refuse that, others move it."""
    end = 1 << 40                                           # the answer: an id of no vocabulary, to cut after
    said = [{"role": r, "content": c} for r, c in (("system", []), ("user", []), ("assistant", [end]))]
    ids, closed = chat_ids(tokenizer, said + turns), chat_ids(tokenizer, said, generate=False)
    bos = ids[:1] if ids[0] == tokenizer.bos_token_id and ids.count(ids[0]) == 1 else []    # ChatML's opens every turn
    return bos, ids[ids.index(end) + len(closed) - closed.index(end):]


def layout_ids(tokenizer, layout, slot, turns):
    """What is fed in the prompt's place. slot: ids [-1, -2, ...], or [] for no prompt at all.
    chat:   the system MESSAGE is the slot                 <sys> [BE] </sys> <user> q </user> <assistant>
    block:  the system BLOCK is the slot (the paper's)                [BE] <user> q </user> <assistant>"""
    if layout == "chat":
        return chat_ids(tokenizer, [{"role": "system", "content": slot}] + turns)
    bos, rest = later_turns(tokenizer, turns)
    return bos + slot + rest
# --- end shared -------------------------------------------------------------------------------


# --- shared: artifact -------------------------------------------------------------------------
def fingerprint(model):
    """A vector fits the weights it was trained on and no others: a hash over a sample of each of them."""
    h = hashlib.sha256()
    for name, w in model.named_parameters():
        h.update(name.encode() + w.flatten()[::997].bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return h.hexdigest()


def load(path, kind, maker, model=None):
    """A whole artifact of this kind, made for this model; else one line that names the command that makes it."""
    try:
        if zipfile.ZipFile(beside(path)).testzip():         # the zip's own checksums
            raise ValueError("a checksum in it is wrong")
        artifact = torch.load(beside(path), map_location="cpu", weights_only=True)
        found, made_for = artifact["kind"], artifact["model"]
    except Exception as e:                                  # a damaged file raises many types; each means the same
        fail(f"{path}: expected a whole artifact, found: {type(e).__name__}: {e}; make it with: {maker}")
    if found != kind or model and made_for["fingerprint"] != fingerprint(model):
        fail(f"{path}: expected {kind} for this model, found {found} for {made_for['name']}; make it with: {maker}")
    return artifact
# --- end shared -------------------------------------------------------------------------------


@torch.no_grad()
def speak(model, ids, learned, limit, temperature=0.0):
    """Yield the answer to one row of ids, token by token, without the id that ends the turn."""
    body, weight, cache = model.get_decoder(), model.get_output_embeddings().weight, transformers.DynamicCache()
    for _ in range(limit):
        embeds = embed(model, torch.tensor([ids], device=model.device), learned)                    # (1, T, d)
        hidden = body(None, None, None, cache, embeds).last_hidden_state[0, -1]                     # (d,)
        z = (hidden @ weight.T).float()                                                             # (V,)
        token = torch.multinomial(F.softmax(z / temperature, -1), 1) if temperature > 0 else z.argmax()
        if token.item() in model.generation_config.eos_token_id:
            return
        yield token.item()
        ids = [token.item()]                                # all before it is in the cache


def stream(tokenizer, tokens):
    """Print an answer as it comes, in whole characters: one may take several tokens -> its text, and when each came."""
    said, times, text, new = [], [time.perf_counter()], "", ""
    for token in tokens:
        times.append(time.perf_counter())
        said.append(token)
        new = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not new.endswith("\ufffd"):                      # it stands for a character that is not whole yet
            print(new[len(text):], end="", flush=True)
            text = new
    print(new[len(text):])
    return new, times


def main():
    args = settings()
    if not all(query.strip() for query in args.query):
        fail("--query: expected a question, found an empty one")
    maker = "python stage1_recon.py --prompt p.txt, then python stage2_kd.py --prompt p.txt"
    artifact = load(args.be, "be", maker)
    model, tokenizer = load_frozen(args.model or artifact["model"]["name"], args.device)
    load(args.be, "be", maker, model)
    model.set_attn_implementation(model.long_rows)
    be, layout = artifact["vector"].to(model.device), artifact["layout"]                            # (k, d) fp32
    slot = [-1 - i for i in range(len(be))]
    room = tokenizer.model_max_length - args.max_new_tokens
    tokenizer.model_max_length = sys.maxsize                # a row too long is told of below: a chat goes on after it

    if not args.query:
        print("/reset forgets the chat, ctrl-D ends it")
    chat = []
    for query in args.query or iter(lambda: input("\nyou> "), None):
        query = query.encode(errors="replace").decode().strip()
        if args.query or query == "/reset":
            chat = []
        if query in ("", "/reset"):
            continue

        # what is fed: all that was said in the chat, anew at each turn
        turns = chat + [{"role": "user", "content": query}]
        rows = {"[BE]": layout_ids(tokenizer, layout, slot, turns)}
        if args.compare:
            rows = {"full prompt": chat_ids(tokenizer, artifact["messages"] + turns), **rows,
                    "no prompt": layout_ids(tokenizer, layout, [], turns)}
        longest = max(map(len, rows.values()))
        if longest > room:
            told = fail if args.query else print
            told(f"expected at most {room} tokens, the context less --max-new-tokens, found {longest}; "
                 "shorten the question, or /reset the chat")
            continue
        if not chat:
            ids, at = rows["[BE]"], rows["[BE]"].index(-1)
            shown = tokenizer.decode(ids[:at]) + "[BE]" * len(be) + tokenizer.decode(ids[at + len(be):])
            print(shown.replace("\n", "\\n"))
            print(f"[BE] stands for {artifact['tokens']} tokens; {len(ids)} are in context\n")

        answers = {}
        for name, ids in rows.items():
            if args.compare:
                list(speak(model, ids, be, 2))              # the first pass of a length is slow; it is not compared
                print(f"--- {name}")
            torch.manual_seed(args.seed)
            said = speak(model, ids, be, args.max_new_tokens, args.temperature)
            answers[name], times = stream(tokenizer, said)
            speed = f"{len(ids)} tokens fed, {len(times) - 1} answered"
            if len(times) > 2:
                speed += (f"; first after {1000 * (times[1] - times[0]):.0f} ms, "
                          f"then {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens a second")
            print(f"    [{speed}]\n")
        chat = turns + [{"role": "assistant", "content": answers["[BE]"]}]


if __name__ == "__main__":
    for terminal in filter(None, (sys.stdin, sys.stdout)):
        terminal.reconfigure(errors="replace")              # a ? for what its encoding does not have
    try:
        main()
    except (EOFError, KeyboardInterrupt):                   # ctrl-D and ctrl-C end a chat
        print()
