"""Serve [BE]: three ways to give a learned vector to an engine. The prompt's text is in none of them.

    --adapter         a LoRA on the embedding table, beside the untouched model: the token with the id i, which no text
                      uses, becomes E[i] + ([BE] - E[i]). A server holds many adapters and takes one for each request
    --out             an ordinary checkpoint, for any engine: the model with one more special token, <|be:NAME|>
    --prompt-embeds   the system message that brings [BE] itself to the untouched model, in vLLM

    python export.py out/be.pt --adapter served/pirate          # 199 KB; prints how to serve it and how to ask
    python export.py a.pt b.pt --adapter served/more            # several vectors of one model: .../more/a, .../more/b
    python export.py out/be.pt --out served/pirate-model        # 330 MB. Several become several tokens of one model
    python export.py out/be.pt --prompt-embeds be.json
"""
import argparse, base64, hashlib, io, json, os, re, shlex, sys, tempfile, zipfile
from pathlib import Path

import safetensors.torch
import torch
import transformers


def settings():
    formats = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formats, {}))
    add, way = p.add_argument, p.add_mutually_exclusive_group(required=True).add_argument
    add("be", nargs="+", help="artifacts of stage 1 or 2, all of one model")
    way("--adapter", help="the folder to write an adapter to")
    way("--out", help="the folder to write a checkpoint to")
    way("--prompt-embeds", help="the .json file to write a message to")
    add("--token", nargs="+", help="--adapter: the tokens that become [BE], one for each vector; None: unused ones")
    add("--model", help="hub name or folder; None: the one that the artifact names")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="--out: of the weights that are written")
    add("--overwrite", action="store_true", help="replace an earlier export")
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


def write(out, files):
    """All files or none: they are written beside their place and renamed. files: name -> text, tensors, or JSON."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
            for name, content in files.items():
                path = Path(work, "new", name)
                path.parent.mkdir(parents=True, exist_ok=True)
                if name.endswith(".safetensors"):
                    safetensors.torch.save_file(content, path, {"format": "pt"})
                    path.chmod(0o644)                       # a server often runs as another user
                else:
                    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2), "utf-8")
            if out.is_dir():                                # a rename does not replace a folder with files in it
                os.replace(out, Path(work, "old"))
            os.replace(Path(work, "new"), out)
    except Exception as e:                                  # a full disk is a type of its own in safetensors
        fail(f"{out}: cannot be written: {type(e).__name__}: {e}")


def unused_tokens(tokenizer, stop):
    """Special tokens that no ordinary text has, reserved ones first: neither the chat template's nor an end of turn."""
    roles = [{"role": role, "content": "?"} for role in ("system", "user", "assistant", "user")]
    taken = {*stop, *chat_ids(tokenizer, roles), tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    names = [t.content for i, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special and i not in taken]
    names = [t for t in names if t not in tokenizer.get_chat_template() and not re.search(r"end|eo[mst]|pad|<s>", t)]
    return sorted(names, key=lambda t: not re.search("reserved|unused|empty|quad", t))


def adapter_files(vector, about, table):
    """A LoRA as PEFT writes it, but for the base table that PEFT would add: E + A^T B^T, A one-hot at the k ids."""
    k, key = len(vector), "base_model.model.model.embed_tokens.lora_embedding_"
    A, B = torch.zeros(k, len(table)), (vector - table[about["ids"]].float()).T.contiguous()        # (k, V), (d, k)
    A[range(k), about["ids"]] = 1
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": about["base model"], "r": k,
              "lora_alpha": k, "target_modules": ["embed_tokens"], "inference_mode": True}
    card = (f"---\nlibrary_name: peft\n---\n# {about['name']}: a prompt of {about['prompt']['tokens']} tokens as {k} "
            "learned embedding(s)\n\nA LoRA on the embedding table, made with nanoBE. The system message below becomes "
            "learned vectors that\nstand for the prompt; all else is the model's own. A KL is in nats a token, against "
            "the full prompt.\n\n" + "".join(f"- {name}: `{x}`\n" for name, x in about.items()))
    return {"adapter_model.safetensors": {key + "A": A, key + "B": B}, "adapter_config.json": config, "README.md": card}


def checkpoint_files(vectors, abouts, model, tokenizer, dtype):
    """The head gets a table of its own, for a learned row in it would often be said. There the new tokens have the mean
    row: its logit is the mean logit, at most 1/V of the probability (Jensen)."""
    ids, state = [i for about in abouts for i in about["ids"]], model.to(getattr(torch, dtype)).state_dict()
    head, rope = state["lm_head.weight"], model.config.rope_parameters
    for name, rows in {"model.embed_tokens.weight": torch.cat(vectors), "lm_head.weight": head.float().mean(0)}.items():
        state[name] = torch.cat([state[name], head.new_zeros(max(0, max(ids) + 1 - len(head)), head.shape[1])])
        state[name][ids] = rows.to(head)                                                            # (V', d)
    # before transformers 5 the rope, the dtype and the tokenizer's class had other names
    config = model.config.to_dict() | {"vocab_size": len(state[name]), "tie_word_embeddings": False, "dtype": dtype,
                                       "torch_dtype": dtype, "rope_theta": rope["rope_theta"],
                                       "rope_scaling": None if rope["rope_type"] == "default" else rope}
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": tokenizer.model_max_length,
             "model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False}
    words |= {key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    generation = model.generation_config.to_diff_dict() | {"suppress_tokens": ids, "_from_model_config": False}
    if generation.get("temperature", 1) > 0 and {"temperature", "top_p", "top_k", "min_p"} & {*generation}:
        generation["do_sample"] = True                      # without it, these are refused when saved again
    return {"model.safetensors": state, "config.json": config, "generation_config.json": generation,
            "tokenizer.json": tokenizer.backend_tokenizer.to_str(), "tokenizer_config.json": words,
            "chat_template.jinja": tokenizer.get_chat_template()}


def main():
    args = settings()
    out = Path(os.path.abspath(args.adapter or args.out or args.prompt_embeds))
    artifacts = [load(path, "be", "python stage2_kd.py --prompt p.txt") for path in args.be]
    names = [out.name] if len(args.be) == 1 else [Path(path).stem for path in args.be]
    if len({*names}) < len(names) or args.prompt_embeds and len(names) > 1:
        fail(f"expected files of different names, and for --prompt-embeds one; found {args.be}")
    ours = (out / "nanobe.json").exists() or out.is_file() and b"prompt_embeds" in out.read_bytes()
    if not (ours and args.overwrite) and (out.is_file() or out.is_dir() and any(out.iterdir())):
        fail(f"{out}: already there; give another name{'' if args.overwrite else ', or --overwrite an earlier export'}")
    source = args.model or artifacts[0]["model"]["name"]
    engine = str(beside(source)) if beside(source).is_dir() else source
    files, abouts, modules = {}, [], []                     # {name: content; "" is out itself}; of each artifact
    served = engine                                         # the model's name on the server
    asked = {"role": "user", "content": "How do I cook rice?"}
    vllm = "python -m vllm.entrypoints.openai.api_server --model"
    curl = "curl -H 'Content-Type: application/json' http://127.0.0.1:8000/v1"

    model, tokenizer = load_frozen(source, "cpu")
    for path in args.be:
        load(path, "be", "python stage2_kd.py --prompt p.txt", model)                   # made for these weights?

    if args.prompt_embeds:
        file = io.BytesIO()
        torch.save(artifacts[0]["vector"].clone(), file)                                            # (k, d) fp32
        part = {"type": "prompt_embeds", "data": base64.b64encode(file.getvalue()).decode()}
        files[""] = {"role": "system", "content": [part]}
        lines = [f"{vllm} {shlex.quote(engine)} --enable-prompt-embeds"]
        system = f"$(cat {shlex.quote(str(out))})"
    else:
        free = unused_tokens(tokenizer, model.generation_config.eos_token_id)
        for path, name, be in zip(args.be, names, artifacts):
            k, prompt = len(be["vector"]), "\n".join(m["content"] for m in be["messages"])
            tokens, place = args.token or free[:k], Path(name if len(names) > 1 else "")
            if args.out:
                tokens = [f"<|be:{name}:{i}|>" for i in range(k)] if k > 1 else [f"<|be:{name}|>"]
                tokenizer.add_tokens([transformers.AddedToken(t, special=True, normalized=False) for t in tokens])
            ids, system = tokenizer.convert_tokens_to_ids(tokens), {"role": "system", "content": "".join(tokens)}
            trained = chat_ids(tokenizer, [{"role": "system", "content": ids}, asked])
            chat = tokenizer.apply_chat_template([system, asked], add_generation_prompt=True, return_dict=False,
                                                 **TEMPLATE)
            unfit = (args.adapter and {*tokens} - {*free}) or [len(tokens), len({*tokens})] != [k, k]
            if unfit or chat != trained:                    # it is served between the ids that it was trained between
                fail(f"expected {k} unused special tokens of this model, {free[:8]}, found {tokens}; --out adds one")
            abouts.append({"name": name, "system message": system["content"], "ids": ids,
                           "base model": source, "fingerprint": be["model"]["fingerprint"],
                           "prompt": {"tokens": be["tokens"], "sha256": hashlib.sha256(prompt.encode()).hexdigest()},
                           **{key: x for key, x in be["metrics"].items() if isinstance(x, (int, float))}})
            print(f"{path}: {be['tokens']} tokens of prompt are now {system['content']}, id {ids}")
            modules.append(f"{name}={out / place}")
            if args.adapter:
                lora = adapter_files(be["vector"], abouts[-1], model.get_input_embeddings().weight)
                files |= {f"{place / file}": content for file, content in lora.items()}
        files["nanobe.json"], served = abouts, names[0]
        system = json.dumps({"role": "system", "content": abouts[0]["system message"]})
        more = json.dumps({"lora_name": names[0], "lora_path": modules[0].partition("=")[2]})
        # by default vLLM has room for rank 16 in every layer, and its CPU code multiplies all that emptiness
        rank = next(r for r in (1, 8, 16, 32, 64, 128, 256, 512) if r >= max(len(about["ids"]) for about in abouts))
        lines = [f"{vllm} {shlex.quote(engine)} --enable-lora --lora-target-modules embed_tokens --max-lora-rank {rank}"
                 f" --max-loras {len(names)} --lora-modules {shlex.join(modules)}",
                 f"or, where it runs with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1: {curl}/load_lora_adapter -d '{more}'"]
        if model.config.model_type == "qwen2":
            lines = ["vLLM takes no LoRA on a Qwen2's embeddings: export with --prompt-embeds or --out for it"]
            served = ""                                     # no server, so no curl
        lines.append(f"or, in Python: peft.PeftModel.from_pretrained(model, '{modules[0].partition('=')[2]}')")
        if args.out:
            files |= checkpoint_files([be["vector"] for be in artifacts], abouts, model, tokenizer, args.dtype)
            served, here = str(out), shlex.quote(str(out))
            lines = [f"{vllm} {here}", f"or: transformers serve {here}"]
    strange = {path.name for path in out.glob("*")} - {name.split("/")[0] for name in files}
    if strange:
        fail(f"{out}: holds what this export does not replace, {sorted(strange)[:3]}; give another name")
    write(out, files)
    body = {"model": served, "messages": ["SYSTEM", asked], "temperature": 0, "max_tokens": 60,
            "chat_template_kwargs": TEMPLATE}               # the chat template as it was in training
    ask = [f"{curl}/chat/completions -d @- <<END", json.dumps(body).replace('"SYSTEM"', system), "END"]
    print(f"wrote {out}\n", *lines, *(ask if served else []), sep="\n")


if __name__ == "__main__":
    main()
