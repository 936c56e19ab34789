"""Ask a frozen chat model a question with [BE] in the prompt's place; or chat with it.

    input   <sys> [BE] </sys> <user> q </user> <assistant>        [AE] is a tool of training and is not used here        (paper, inference)

    python infer.py --query "How do I cook rice?"                  # out/be.pt
    python infer.py --query "How do I cook rice?" --compare        # full prompt, [BE] and no prompt, side by side, with speed
    python infer.py                                                # a chat; /reset forgets it, ctrl-D ends it
    python infer.py --be out/be.pt --temperature 0.7 --seed 1 --max-new-tokens 200

Reads   out/be.pt: the vector, the layout it was trained in, the model it belongs to, and the prompt it stands for (only --compare reads that).
"""
import argparse
import hashlib
import io
import math
import signal
import sys
import time
from pathlib import Path

import jinja2
import safetensors
import torch
import transformers


def settings():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--query",          default=[],   nargs="+", help="a question, or several, each on its own; without it, a chat")
    add("--be",             default="out/be.pt", help="the artifact of stage 1 or 2")
    add("--model",          default="",          help="hub name or folder; default: the one that the artifact names")
    add("--compare",        action="store_true", help="answer with the full prompt, [BE] and no prompt; needs --query")
    add("--max-new-tokens", type=number(int, 1), default=128, help="an answer is cut here")
    add("--temperature",    type=number(float, 0), default=0.0, help="0 is greedy")
    add("--seed",           type=int,   default=0,   help="of the sampling")
    add("--device",         default="auto", choices=["auto", "cpu", "cuda", "mps"], help="auto: CUDA, then MPS, then CPU")
    add("--device-map",     default=None, choices=["auto"], help="auto: the layers of a model larger than one GPU over all of them")
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


@torch.no_grad()
def answer(model, ids, learned, stop, limit, temperature, rng):
    """Yield the answer to ids, a list with slots (rows of learned (n, d)), token by token; the stop token is not yielded."""
    body, weight = model.get_decoder(), model.get_output_embeddings().weight                        # weight (V, d)
    out = body(inputs_embeds=embed(model, torch.tensor([ids], device=model.device), learned), use_cache=True)
    for _ in range(limit):
        logits = (out.last_hidden_state[0, -1] @ weight.T).float()                                  # (V,)
        token = logits.argmax() if temperature == 0 else torch.multinomial(torch.softmax(logits / temperature, -1).cpu(), 1, generator=rng)[0]
        if token.item() in stop:
            return
        yield token.item()
        out = body(input_ids=token.to(model.device).view(1, 1), past_key_values=out.past_key_values, use_cache=True)


def stream(tokenizer, tokens):
    """Print tokens as they come, in whole characters -> (text, how many, seconds to the first, seconds to the last)."""
    started, first, total, said, shown = time.perf_counter(), 0.0, 0.0, [], ""
    for token in tokens:
        total = time.perf_counter() - started                                                       # at the last token, not after the pass that follows it
        first = first or total
        said.append(token)
        text = tokenizer.decode(said, skip_special_tokens=True)
        if not text.endswith("\ufffd"):                                                             # a character may take more than one token
            print(text[len(shown):], end="", flush=True)
            shown = text
    text = tokenizer.decode(said, skip_special_tokens=True)
    print(text[len(shown):])
    return text.strip(), len(said), first, total


def main():
    args = settings()
    if args.compare and not args.query:
        fail("--compare needs --query \"...\"")
    if not all(q.strip() for q in args.query):
        fail("--query is empty; expected a question")
    if any("\ud800" <= c <= "\udfff" for q in args.query for c in q):
        fail("--query: expected UTF-8 text, found bytes that are not")
    maker = "python stage1_recon.py --prompt p.txt, then python stage2_kd.py --prompt p.txt, p.txt being your prompt"
    be = load_artifact(args.be, "be", None, None, maker)
    device, dtype, attention = pick_device(args.device, args.dtype)
    model, tokenizer = load_frozen(args.model or be["model"]["name"], device, dtype, attention, args.trust_remote_code, args.device_map)
    device = model.device                                                                           # with --device-map the first layer may lie on another GPU than the first
    load_artifact(args.be, "be", fingerprint(model), model.get_input_embeddings().weight.shape[1], maker)      # now that the model is known
    vector, layout, prompt = be["vector"].to(device), be["layout"], be["prompt"]
    slot = [-1 - i for i in range(len(vector))]
    ends = model.generation_config.eos_token_id
    stop = set(ends if isinstance(ends, list) else [ends if ends is not None else tokenizer.eos_token_id])
    rng = torch.Generator().manual_seed(args.seed)
    room = model.config.max_position_embeddings - args.max_new_tokens
    if room < 64:
        fail(f"--max-new-tokens: expected at most {room + args.max_new_tokens - 64} (the model's context less 64 for a question), found {args.max_new_tokens}")

    def check(ids):
        if len(ids) > room:
            fail(f"expected at most {room} tokens of context (the model's {room + args.max_new_tokens} less --max-new-tokens), found {len(ids)}; shorten the question")
        return ids

    for query in args.query:
        turns = [{"role": "user", "content": query}]
        ids = check(layout_ids(tokenizer, layout, slot, turns))
        columns = {"[BE]": ids}
        shown = "".join(tokenizer.decode([i]) if i >= 0 else f"[BE{'' if len(slot) == 1 else -i}]" for i in ids)     # the layout that is really fed, the slot as it is
        print(f"{shown!r}\n[BE] stands for {prompt['tokens']} tokens; {len(ids)} tokens are in context\n")
        if args.compare:
            columns = {"full prompt": check(chat_ids(tokenizer, prompt["messages"] + turns)), "[BE]": ids, "no prompt": layout_ids(tokenizer, layout, [], turns)}
            for row in columns.values():                                                            # the first pass of a shape is slow; it is not what is compared
                list(answer(model, row, vector, stop, 2, 0, rng))
        for name, row in columns.items():
            if args.compare:
                print(f"--- {name}")
            _, n, first, total = stream(tokenizer, answer(model, row, vector, stop, args.max_new_tokens, args.temperature, rng.manual_seed(args.seed)))
            speed = f"; first after {1000 * first:.0f} ms" * (n > 0) + (f", then {(n - 1) / (total - first):.1f} tokens a second" if n > 1 else "")
            print(f"    [{len(row)} tokens fed, {n} answered{speed}]\n")
    if args.query:
        return

    turns = []
    print(f"{be['model']['name']} with [BE] for {prompt['tokens']} tokens of prompt. /reset forgets the chat, ctrl-D ends it.")
    while True:
        try:
            query = input("\nyou> ").strip()
        except EOFError:
            print()
            return
        if query == "/reset":
            turns = []
            print("(forgotten)")
        elif query:
            ids = layout_ids(tokenizer, layout, slot, turns + [{"role": "user", "content": query}])
            if len(ids) > room:
                print(f"(the chat has {len(ids)} tokens, more than the {room} that fit; /reset to start anew)")
                continue
            text, *_ = stream(tokenizer, answer(model, ids, vector, stop, args.max_new_tokens, args.temperature, rng))
            turns += [{"role": "user", "content": query}, {"role": "assistant", "content": text}]
            print(f"    [[BE] stands for {prompt['tokens']} tokens; {len(ids)} tokens were in context]")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda number, frame: sys.exit(128 + number))
    if hasattr(sys.stdin, "reconfigure"):                   # not where there is no input at all
        sys.stdin.reconfigure(errors="replace")             # in a chat, bytes that are not UTF-8
    main()
