"""Export [BE] as a special token of an ordinary checkpoint, which any engine serves: the client sends <|be:NAME|> as the system message.

    input table    row of <|be:NAME|> = [BE]                      every other row as it was
    head           row of <|be:NAME|> = the mean of the rows      so its logit is the mean logit: at most 1/V of the probability after any text (Jensen), and never the largest

    python export.py out/be.pt --out served                                  # <|be:pirate|>, after the prompt's file; prints how to serve it
    python export.py out/a.pt out/b.pt --out served --names pirate support   # several artifacts of one model go in together
    python export.py out/be.pt --out served --dtype fp32                     # for comparing engines token by token: they round bf16 in different places
    python export.py out/be.pt --prompt-embeds be.json                       # no export: the message that sends [BE] itself to vLLM --enable-prompt-embeds

Reads   the artifacts, and the model that they name. The prompt's text does not go into the export.
Writes  --out, a folder of safetensors, tokenizer, chat template and configs, with nanobe.json, which lists its learned tokens. It is written beside its place,
        checked against the base bit by bit, and renamed.
Expect  the default model: 20 s on one core, 330 MB: a tied head is untied, so the table is there twice. The largest probability that the token has anywhere in
        --text is printed, and one above --bound refused.

Layout chat keeps the stock chat template. Layout block ships a frame around it: a system message that is the token alone takes the place of the whole system block.
k > 1 vectors are k tokens, <|be:NAME:0|> and so on; the template writes them out where the system message has <|be:NAME|>.
"""
import argparse
import base64
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import pydoc_data.topics
import re
import shutil
import sys
from pathlib import Path

import filelock
import huggingface_hub
import jinja2
import safetensors
import torch
import transformers

VERSION = "0.1"


def settings():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("be",               nargs="+",                help="artifacts of stage 1 or 2, all of one model")
    add("--out",            default="",               help="the folder to write; or --prompt-embeds")
    add("--prompt-embeds",  default="",               help="instead: a .json file with one system message that holds [BE] itself, for the untouched base model")
    add("--names",          default=None, nargs="+",  help="a name for each artifact, of a-z 0-9 _ -. Default: the file name of its prompt")
    add("--model",          default="",               help="hub name or folder; default: the one that the artifact names")
    add("--dtype",          default="base", choices=["base", "bf16", "fp32"], help="of the written weights; base: as the model's folder has them")
    add("--trust-remote-code", action="store_true", help="run the model code that a hub repository ships; off: none but that of transformers")
    add("--text",           default=None, nargs="+",  help="text files over which the tokens' probability is measured. Default: the reference pages that come with Python")
    add("--pieces",         type=number(int, 1), default=32,       help="how many pieces of 120 words to measure it on")
    add("--bound",          type=number(float, 0, 1), default=1e-3, help="a larger probability of a learned token, anywhere in that text, is an error")
    add("--overwrite",      action="store_true",      help="replace --out, if it is an export of this script, or the .json")
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


def token_names(paths, artifacts, names):
    """The short name of each artifact's token(s), from --names or its prompt's file -> list such as ["<|be:pirate|>"]."""
    if names and len(names) != len(paths):
        fail(f"--names: expected one for each of {len(paths)} artifacts, found {len(names)}")
    found = []
    for i, (path, be) in enumerate(zip(paths, artifacts)):
        prompt = be["prompt"].get("path") or be.get("config", {}).get("prompt") or path
        prompt = prompt if not isinstance(prompt, list) else prompt[0] if len(prompt) == 1 else path
        stem = names[i] if names else Path(prompt).stem
        safe = re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-") or "be"
        if names and safe != stem:
            fail(f"--names {stem!r}: expected letters a-z, digits, _ and -; try {safe}")
        if f"<|be:{safe}|>" in found:
            fail(f"{path}: the name {safe} is taken by {paths[found.index(f'<|be:{safe}|>')]}; give each its own with --names")
        found.append(f"<|be:{safe}|>")
    return found


def frame(stock, words, blocks, bos, after):
    """A chat template around the stock one, which it leaves as it is for dialogues without a learned token.

    words: {short name: the token(s) it stands for}, written out in the system message. blocks: the short names which, alone in the system message, take the place
    of the system block, whose text ends with `after` once the message is said; bos is what stays before it.
    """
    template = """{%- set be = namespace(text="", found=false, block=false) %}
{%- if messages and messages[0]["role"] == "system" %}
    {%- set be.text = messages[0]["content"] if messages[0]["content"] is string else messages[0]["content"] | map(attribute="text") | join %}
    {%- for name, tokens in WORDS.items() if name in be.text %}
        {%- set be.found = true %}
        {%- set be.block = be.text | trim == name and name in BLOCKS %}
        {%- set be.text = (be.text | trim).replace(name, tokens) %}
    {%- endfor %}
{%- endif %}
{%- if be.found %}{%- set messages = [{"role": "system", "content": be.text}] + messages[1:] %}{%- endif %}
{%- set be_after = AFTER %}
{%- set be_chat %}
STOCK{% endset %}
{%- set be_rest = be_chat.split(be.text, 1)[1] if be.block else "" %}
{%- if be.block and be_rest.startswith(be_after) %}{{- BOS ~ be.text ~ be_rest[be_after | length:] }}{%- else %}{{- be_chat }}{%- endif %}"""
    for mark, value in {"WORDS": json.dumps(words), "BLOCKS": json.dumps(blocks), "AFTER": json.dumps(after), "BOS": json.dumps(bos), "STOCK": stock.removesuffix("\n")}.items():
        template = template.replace(mark, value)
    return template


def text_pieces(paths, count):
    """`count` pieces of 120 words, evenly spread over the text of these files, or over Python's reference pages."""
    try:
        text = "\n".join(Path(p).read_text(encoding="utf-8-sig") for p in paths) if paths else "\n".join(pydoc_data.topics.topics.values())
    except (OSError, UnicodeDecodeError) as e:
        fail(f"--text: expected text files in UTF-8, but one cannot be read: {e}")
    words = text.split()
    pieces = [words[i:i + 120] for i in range(0, len(words) - 119, 120)]
    if not pieces:
        fail(f"--text: expected at least 120 words, found {len(words)}; give more, or leave the option out")
    return [pieces[i * len(pieces) // count] for i in range(count)] if count < len(pieces) else pieces


def write_message(out, tmp, be, name):
    """--prompt-embeds: the system message that holds [BE] itself, as a .json file. name: of the base model, for the hint."""
    file = io.BytesIO()
    torch.save(be["vector"].clone(), file)                                                          # (k, d) fp32; the server casts it
    message = {"role": "system", "content": [{"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}]}
    if out.is_dir():
        fail(f"--prompt-embeds {out}: expected a file to write, found a folder")
    try:
        tmp.write_text(json.dumps(message) + "\n", encoding="utf-8")
        os.replace(tmp, out)
    except OSError as e:
        with contextlib.suppress(OSError):
            tmp.unlink()
        fail(f"{out}: cannot be written: {e.strerror or e}; nothing there has changed")
    print(f"wrote {out}: a system message of {len(be['vector'])} vector(s) of {be['model']['d']} numbers, for {be['model']['name']}\n"
          f"serve:  python -m vllm.entrypoints.openai.api_server --model {name} --enable-prompt-embeds")


def check_weights(folder, base, learned, ids):
    """What is on disk, against the base, bit by bit: the rows `ids` of table and head are the learned ones, every other weight is the base's -> how many old rows a table has."""
    old_rows, whole = 0, 0
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as f:
            for key in f.keys():
                old, new = base[key], f.get_tensor(key)
                if key in learned:
                    kept = ~torch.isin(torch.arange(len(new)), torch.tensor(ids))
                    assert torch.equal(new[ids], learned[key].to(new.dtype)), f"{key}: not the rows that were learned"
                    old, new, old_rows = old[kept[:len(old)]], new[kept], int(kept.sum())
                assert old.dtype == new.dtype and torch.equal(old.view(torch.uint8), new.view(torch.uint8)), f"{key} differs from the base"
                whole += 1
    assert whole == len(base), "a weight is missing"
    return old_rows


def main():
    args = settings()
    out = Path(args.prompt_embeds or args.out)
    maker = "python stage1_recon.py --prompt p.txt, then python stage2_kd.py --prompt p.txt, p.txt being your prompt"
    if bool(args.out) == bool(args.prompt_embeds):
        fail("expected one of --out FOLDER (a checkpoint) and --prompt-embeds FILE (a message)")
    artifacts = [load_artifact(path, "be", None, None, maker) for path in args.be]
    names, source = token_names(args.be, artifacts, args.names), args.model or artifacts[0]["model"]["name"]
    tmp, aside, lock = Path(f"{out}.tmp"), Path(f"{out}.tmp.old"), filelock.FileLock(f"{out}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        Path(lock.lock_file).touch()                    # says why nothing can be written there; FileLock would take it for another run
        lock.acquire(timeout=0)
        if aside.exists() and not out.exists():         # a run was killed between the two renames at the end
            os.replace(aside, out)
    except filelock.Timeout:
        fail(f"{out}: another run is writing it; wait for it, or give another name")
    except OSError as e:
        fail(f"{out}: cannot be written: {e.strerror}")
    if out.exists() and not args.overwrite:
        fail(f"{out}: already there; give another name, or --overwrite")

    if args.prompt_embeds:                              # the server puts its chat template around the message: layout chat, and no other
        if len(artifacts) > 1 or artifacts[0]["layout"] != "chat":
            fail(f"--prompt-embeds: expected one artifact of layout chat, found {len(artifacts)}, the first of layout {artifacts[0]['layout']}; block needs --out")
        write_message(out, tmp, artifacts[0], source)
        lock.release()
        return

    if out.exists() and not (out / "nanobe.json").exists():
        fail(f"--overwrite: {out} is no export of this script (it has no nanobe.json), so it stays; give another name")
    model, tokenizer = load_frozen(source, torch.device("cpu"), "auto", "sdpa", args.trust_remote_code)
    for path in args.be:
        load_artifact(path, "be", fingerprint(model), model.get_input_embeddings().weight.shape[1], maker)      # now that the model is known
    stored = model.dtype
    model.to({"base": stored, "bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype])
    base, rows, d = model.state_dict(), *model.get_input_embeddings().weight.shape
    print(f"base: {source}, {rows} rows of {d}, {str(stored)[6:]}, written as {str(model.dtype)[6:]}")

    # what the layouts feed, with the tokenizer and template as they are
    vectors, slots, probes = torch.cat([be["vector"] for be in artifacts]), [], []                   # (n, d) fp32
    chats = [[{"role": "user", "content": "How do I cook rice?"}]]
    chats.append(chats[0] + [{"role": "assistant", "content": "In water."}, {"role": "user", "content": "And 2 eggs?"}])
    plain = chats + [[{"role": "system", "content": "Be kind."}] + turns for turns in chats]
    for be in artifacts:
        slots.append([-1 - sum(map(len, slots)) - i for i in range(len(be["vector"]))])
        probes.append([layout_ids(tokenizer, be["layout"], slots[-1], turns) for turns in chats])
    render = dict(tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024")
    as_stock = [tokenizer.apply_chat_template(turns, **render) for turns in plain]

    # the tokens: they take the next ids, which are unused rows in a model that has some (Qwen), and new ones else
    taken = tokenizer.get_vocab()
    words = [[name] if len(slot) == 1 else [f"{name[:-2]}:{i}|>" for i in range(len(slot))] for name, slot in zip(names, slots)]
    for token in [*names, *sum(words, [])]:
        if token in taken:
            fail(f"{token} is a token of this model already; give another name with --names")
    tokenizer.add_tokens([transformers.AddedToken(token, special=True, normalized=False) for token in sum(words, [])], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(sum(words, []))                                            # slot -1 - i is token ids[i]
    total = max(rows, max(ids) + 1)                                                                  # no padding: an all-zero row has logit 0, which may be the largest
    if set(range(rows, total)) - set(ids) or min(ids) <= max(taken.values()):
        fail(f"the tokenizer has {max(taken.values()) + 1} ids and the table {rows} rows, so the learned token cannot have a row of its own; use --prompt-embeds")
    blocks = [name for name, be in zip(names, artifacts) if be["layout"] == "block"]
    if blocks or len(ids) > len(names):
        mark = chr(0xE000)
        after = tokenizer.apply_chat_template([{"role": "system", "content": mark}], **render | {"add_generation_prompt": False}).split(mark)[1]
        bos = next((tokenizer.bos_token for be, p in zip(artifacts, probes) if be["layout"] == "block" and p[0][0] >= 0), "")
        tokenizer.chat_template = frame(tokenizer.get_chat_template(), {name: "".join(w) for name, w in zip(names, words)}, blocks, bos, after)

    def grown(old, new):
        grown = torch.cat([old, old.new_zeros(total - rows, d)])                                     # (V', d)
        grown[ids] = new.to(old.dtype)
        return grown

    weight = model.get_output_embeddings().weight
    others = weight[sorted(set(range(rows)) - set(ids))]                                             # a row that is reused is none of them
    head = grown(weight, others.float().mean(0))
    pieces, found, seen = text_pieces(args.text, max(args.pieces, len(artifacts))), [], 0
    for i, piece in enumerate(pieces):                                                               # the first 30 words are the question, the rest is the answer
        be, slot, ask = artifacts[i % len(slots)], slots[i % len(slots)], {"role": "user", "content": " ".join(piece[:30])}
        row = layout_ids(tokenizer, be["layout"], slot, [ask]) + text_ids(tokenizer, " ".join(piece[30:]))
        hidden = model.get_decoder()(inputs_embeds=embed(model, torch.tensor([row]), vectors), use_cache=False).last_hidden_state[0]       # (T, d)
        found.append(torch.softmax((hidden @ head.T).float(), -1)[:, ids].sum(-1).max())
        seen += len(row)
    largest = torch.stack(found).max().item()                                                        # NaN if one of them is
    print(f"the learned token{'s' * (len(ids) > 1)} at {seen} positions of {len(pieces)} chats: probability at most {largest:.1e}")
    if not largest <= args.bound:
        fail(f"a learned token has a probability of {largest:.1e} in --text, above --bound {args.bound:g}, so the model would say it; nothing was written; use --prompt-embeds")

    state = base | {"model.embed_tokens.weight": grown(model.get_input_embeddings().weight, vectors), "lm_head.weight": head}
    config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    config.update({"vocab_size": total, "tie_word_embeddings": False, "architectures": [type(model).__name__], "dtype": model.dtype})
    generation.suppress_tokens, generation._from_model_config = ids, False                           # transformers honours it; vLLM does not, hence the head's rows
    about = {"base": artifacts[0]["model"], "export": VERSION, "largest_probability": largest, "positions": seen, "tokens": {
        name: {"ids": [ids[-1 - i] for i in slot], "layout": be["layout"], "stands_for_tokens": be["prompt"]["tokens"], "prompt_sha256": be["prompt"].get("sha256")}
        for name, slot, be in zip(names, slots, artifacts)}}
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        try:
            huggingface_hub.save_torch_state_dict(state, tmp, metadata={"format": "pt"})
            for part in (config, generation, tokenizer):
                part.save_pretrained(tmp)
        except Exception as e:      # safetensors and tokenizers write in Rust: a full disk is a type of their own, or plain Exception
            raise OSError(getattr(e, "strerror", None) or e)
        (tmp / "nanobe.json").write_text(json.dumps(about, indent=2) + "\n")

        old_rows = check_weights(tmp, base, {"model.embed_tokens.weight": vectors, "lm_head.weight": head[ids]}, ids)
        read = transformers.AutoTokenizer.from_pretrained(tmp)
        for name, probe in zip(names, probes):
            for turns, want in zip(chats, probe):
                got = read.apply_chat_template([{"role": "system", "content": name}] + turns, **render | {"tokenize": True, "return_dict": False})
                if got != [ids[-1 - t] if t < 0 else t for t in want]:
                    fail(f"this model's tokenizer does not keep {name} apart from the text around it, so the export would not be what was trained; use --prompt-embeds")
        if [read.apply_chat_template(turns, **render) for turns in plain] != as_stock:
            fail("this model's chat template does not work inside the one that the export needs; use --layout chat and --k 1, or --prompt-embeds")
        if out.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(out, aside)
        os.replace(tmp, out)
        if aside.exists():
            os.replace(aside, tmp)                      # so that what stands aside is whole, always
    except OSError as e:
        with contextlib.suppress(OSError):
            if aside.exists() and not out.exists():
                os.replace(aside, out)
        fail(f"{out}: cannot be written: {e.strerror or e}; " + ("nothing there has changed" if out.exists() or not aside.exists() else f"what was there is whole, as {aside}"))
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        lock.release()
    exact = "" if model.dtype in (stored, torch.float32) else f", rounded to {str(model.dtype)[6:]}"
    print(f"{out}: {len(base) - 2} tensors of the body and {old_rows} old rows of both table and head are bit-identical to the base{exact}; new: rows {ids}\n")
    for name, be, path in zip(names, artifacts, args.be):
        print(f"{name}  in place of {be['prompt']['tokens']} tokens, layout {be['layout']}, from {path}")
    question = [{"role": "system", "content": names[0]}, {"role": "user", "content": "How do I cook rice?"}]
    body = json.dumps({"model": str(out), "messages": question, "temperature": 0, "max_tokens": 60})
    print(f"\nserve:  python -m vllm.entrypoints.openai.api_server --model {out} --port 8000\n"
          f"   or:  transformers serve {out} --port 8000\n"
          f"  ask:  curl -s http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")


if __name__ == "__main__":
    main()
