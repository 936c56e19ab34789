"""What a user would pick instead of [BE]: a shorter text in the prompt's place. The prompt cut off, a summary by the model itself, LLMLingua; each at 1/2 and 1/4 of the length.

    python results/baselines.py --prompt prompts/support.txt                                      # -> out/ablations/support.cut-2.s0.pt, ..., a .txt beside each
    python results/baselines.py --prompt prompts/support.txt --methods llmlingua --ratios 2 4     # needs: pip install llmlingua
    python results/table.py --out out/ablations/README.md              # these alone; results/ablations.sh makes them with the settings of results/README.md

A text is measured as [BE] is: its k tokens' own embeddings are written as an artifact of k vectors, and stage2_kd.py measures that by its own command line, against the same teacher answers, with the same
table of controls. What is finished is skipped. The summary is greedy, asked for as so many words and cut at the ratio's tokens. LLMLingua (Jiang et al. 2023) runs over the same model with the defaults of its
package but for the rate, which is searched: asked for a half of 251 tokens it keeps 148. For these two a dialogue becomes the texts of its messages, a blank line between them; the cut one keeps the template's
words between its turns. All stand in the system message's place.
"""
import argparse
import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jinja2
import safetensors
import torch
import transformers

HERE = Path(__file__).resolve().parent
STAGE2 = HERE.parent / "stage2_kd.py"


def settings():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--prompt",       required=True,                 help="the system prompt: a text file, or a .json with a \"messages\" list")
    add("--methods",      default=["cut", "summary", "llmlingua"], nargs="+", choices=["cut", "summary", "llmlingua"], help="which of the three")
    add("--ratios",       default=[2, 4], nargs="+", type=number(int, 2), help="how many times shorter the text is made")
    add("--model",        default="models/smollm2-135m", help="hub name or local folder of a Llama or Qwen chat model")
    add("--queries",      default="",                    help="as for stage 2, and the same file as in the runs that this is compared with: then the teacher's answers are found")
    add("--test-queries", default="",                    help="as for stage 2")
    add("--out",          default="out/ablations",       help="the folder of the runs")
    add("--seed",         default=0, type=int,           help="of the runs whose teacher answers are read; nothing here is random")
    add("--stage2",       default="--answer-tokens 32",  help="more options for stage2_kd.py")
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


# --- shared: fingerprint -------------------------------------------------
def fingerprint(model):
    """sha256 over the names, shapes and bf16 bits of all weights: the same for a model opened in bf16 or in fp32."""
    h = hashlib.sha256()
    for name, w in model.named_parameters():
        h.update(f"{name} {tuple(w.shape)}".encode())
        h.update(w.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
    return h.hexdigest()
# --- end shared ----------------------------------------------------------


# --- shared: save_artifact -----------------------------------------------
def write(path, data):
    """Written beside its place and renamed: a run killed here, or a full disk, leaves the old file whole. data: bytes."""
    try:
        with open(f"{path}.tmp", "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.tmp", path)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        fail(f"{path}: could not be written ({e.strerror}); what was there before is still whole. Make room and run again with --resume")


def save_artifact(path, artifact):
    """The zip file that torch writes ends in a comment: its own sha256."""
    data = io.BytesIO()
    torch.save(artifact, data)
    data = data.getvalue()[:-2] + (64).to_bytes(2, "little")                # the comment's length, which was 0
    write(path, data + hashlib.sha256(data).hexdigest().encode())
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


# --- shared: read_prompt -------------------------------------------------
def read_prompt(path):
    """The prompt file -> the messages it stands for. A text file is one system message; a .json file holds a "messages" list, a dialogue. Exits with one line on bad input."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n").strip()
    except OSError as e:
        fail(f"--prompt {path}: expected a text file, but it cannot be read: {e.strerror}")
    except UnicodeDecodeError:
        fail(f"--prompt {path}: expected UTF-8 text, found bytes that are not; save the prompt as plain UTF-8 text")
    if "\0" in text:
        fail(f"--prompt {path}: expected text, found NUL bytes, so this is a binary file")
    messages = [{"role": "system", "content": text}]
    if text and str(path).endswith(".json"):
        try:
            messages = [{"role": str(m["role"]), "content": m["content"].strip()} for m in json.loads(text)["messages"]]
            json.dumps(messages, ensure_ascii=False).encode()               # a lone surrogate is no text
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            fail(f'--prompt {path}: expected {{"messages": [{{"role": ..., "content": ...}}, ...]}}')
    if not any(m["content"] for m in messages):
        fail(f"--prompt {path}: it is empty; write the system prompt into it")
    return messages
# --- end shared ----------------------------------------------------------


# --- shared: prompt_ids --------------------------------------------------
def prompt_ids(tokenizer, messages, layout, limit):
    """The tokens (s_1, ..., s_m) that the slot stands for: the text of one system message in the chat layout, else the messages with the template's words."""
    text_only = layout == "chat" and [m["role"] for m in messages] == ["system"]
    ids = text_ids(tokenizer, messages[0]["content"]) if text_only else chat_ids(tokenizer, messages, generate=False)
    if not ids:
        fail("--prompt: this model has no token for any of its characters; give a prompt of plain text")
    words = chat_ids(tokenizer, [{"role": "system", "content": []}, {"role": "user", "content": []}])
    if not text_only and ids[0] == tokenizer.bos_token_id and words.count(ids[0]) == 1:
        ids = ids[1:]                           # a BOS stays before the slot; ChatML opens every turn with its "BOS": that one is a header
    if len(ids) > limit - 64:
        fail(f"--prompt: expected at most {limit - 64} tokens (the model's context of {limit} less 64 for a question), found {len(ids)}; shorten the prompt")
    return ids
# --- end shared ----------------------------------------------------------


# --- shared: generate ----------------------------------------------------
@torch.no_grad()
def generate(model, rows, stop, limit, temperature=0.0, seed=0, skip=()):
    """Continue rows of token ids, which may share a long beginning: the prompt. Yields (row number, answer ids with the stop token, hidden (T, d)), batch by batch.

    The shared prefix runs once, for all batches; its keys and values are repeated over a batch. The rest of each row is padded on the left. hidden[t] is the last
    hidden state that answer[t] was chosen from. temperature 0 is greedy; a batch whose row numbers are all in skip is left out.
    """
    body, weight = model.get_decoder(), model.get_output_embeddings().weight
    n = min(len(os.path.commonprefix(rows)), min(map(len, rows)) - 1)                               # each row keeps a token of its own
    prefix = body(input_ids=torch.tensor([rows[0][:n]], device=model.device), use_cache=True).past_key_values if n else None
    size = max(1, min(32, 16000 // (n + limit)))                                                    # the cache grows with batch x prefix: 16,000 tokens are 370 MB on the default model
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))                               # like lengths together: little padding
    for part in [order[i:i + size] for i in range(0, len(order), size)]:
        if all(i in skip for i in part):
            continue
        rngs = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in part]                  # a row's sample does not depend on its neighbours
        width = max(len(rows[i]) for i in part) - n
        pads = [width - len(rows[i]) + n for i in part]
        ids = torch.tensor([[0] * p + rows[i][n:] for i, p in zip(part, pads)], device=model.device)                        # (B, w)
        mask = torch.tensor([[1] * n + [0] * p + [1] * (width - p) for p in pads], device=model.device)                     # (B, n + w)
        cache = copy.deepcopy(prefix)
        if n:
            cache.batch_repeat_interleave(len(part))
        said, hidden = [], []
        while len(said) < limit:
            position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]                        # pads do not count
            out = body(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
            cache, h = out.past_key_values, out.last_hidden_state[:, -1]                            # (B, d)
            logits = (h @ weight.T).float()                                                         # (B, V)
            ids = logits.argmax(-1, keepdim=True)                                                   # (B, 1)
            if temperature > 0:
                chance = torch.tensor([[torch.rand((), generator=r)] for r in rngs], device=logits.device)
                ids = (torch.softmax(logits / temperature, -1).cumsum(-1) < chance).sum(-1, keepdim=True).clamp(max=logits.shape[1] - 1)
            said.append(ids)
            hidden.append(h)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            ended = torch.isin(torch.cat(said, 1), stop.to(ids.device))                             # (B, t)
            if ended.any(1).all():
                break
        said, hidden = torch.cat(said, 1), torch.stack(hidden, 1)                                   # (B, t), (B, t, d)
        for row, i in enumerate(part):
            length = int(ended[row].float().argmax()) + 1 if ended[row].any() else said.shape[1]
            yield i, said[row, :length].tolist(), hidden[row, :length]
# --- end shared ----------------------------------------------------------


def summary(model, tokenizer, text, size):
    """The model's own summary of the text, in at most `size` tokens -> text."""
    words = round(len(text.split()) * size / len(text_ids(tokenizer, text)))
    ask = f"Shorten these instructions for an assistant to about {words} words. Keep every rule, name and number. Write only the shortened instructions.\n\n{text}"
    row = chat_ids(tokenizer, [{"role": "user", "content": ask}])
    if len(row) + size > model.config.max_position_embeddings:
        fail(f"--prompt: its summary takes {len(row) + size} tokens of context, the model has {model.config.max_position_embeddings}; shorten the prompt, or leave summary out of --methods")
    ends = model.generation_config.eos_token_id
    stop = torch.tensor(tokenizer.eos_token_id if ends is None else ends).view(-1)
    (_, said, _), = generate(model, [row], stop, size)
    return tokenizer.decode(said, skip_special_tokens=True)


def llmlingua(name, device, text, size):
    """LLMLingua's compression of the text, at a rate found by bisection, to 1/64, that leaves at most `size` tokens -> text; empty if none does."""
    import tiktoken
    counter = transformers.AutoTokenizer.from_pretrained(name)
    tiktoken.encoding_for_model = lambda _: counter           # it only counts tokens for the report; GPT's own would be fetched from the network
    from llmlingua import PromptCompressor
    compressor = PromptCompressor(name, device_map=str(device), model_config={"trust_remote_code": False})
    forward = compressor.model.forward

    def lists(*args, past_key_values=None, **more):           # llmlingua 0.2.2 keeps the cache as a list of (keys, values), as transformers did before 4.36
        out = forward(*args, past_key_values=transformers.DynamicCache(past_key_values) if past_key_values else None, **more)
        out.past_key_values = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
        return out
    compressor.model.forward = lists
    low, high, best = 0, 1, ""
    for _ in range(6):
        rate = (low + high) / 2
        short = compressor.compress_prompt(text.split("\n\n"), rate=rate)["compressed_prompt"]
        if len(text_ids(counter, short)) <= size:
            low, best = rate, short
        else:
            high = rate
    return best


def main():
    args = settings()
    messages = read_prompt(args.prompt)
    runs = [(m, r, Path(args.out, f"{Path(args.prompt).stem}.{m}-{r}.s{args.seed}")) for m in args.methods for r in args.ratios]
    wanted = [(method, ratio, name) for method, ratio, name in runs if not Path(f"{name}.pt").exists()]
    if "llmlingua" in [method for method, *_ in wanted] and not importlib.util.find_spec("llmlingua"):
        fail("--methods llmlingua: the package is not there; pip install llmlingua, or give --methods cut summary")
    if not wanted:
        return print(f"{args.prompt}: all measured, in {args.out}")
    device, dtype, attention = pick_device("auto", "auto")
    model, tokenizer = load_frozen(args.model, device, dtype, attention)
    ids = prompt_ids(tokenizer, messages, "chat", model.config.max_position_embeddings)
    text = "\n\n".join(m["content"] for m in messages)
    if device.type == "cpu" and len(ids) > 1024:
        model.set_attn_implementation("sdpa")
    table, before = model.get_input_embeddings().weight, fingerprint(model)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for method, ratio, name in wanted:
        size = len(ids) // ratio
        if Path(f"{name}.txt").exists():
            short = Path(f"{name}.txt").read_text(encoding="utf-8")
        elif method == "cut":
            short = tokenizer.decode(ids[:size])
        else:
            short = summary(model, tokenizer, text, size) if method == "summary" else llmlingua(args.model, device, text, size)
        write(f"{name}.txt", short.encode())
        slot = ids[:size] if method == "cut" else text_ids(tokenizer, short)[:size if method == "summary" else None]       # a text may take more tokens than it was said in
        if not slot:
            fail(f"{name}.txt: {method} gave no text at 1/{ratio} of {len(ids)} tokens; leave it out of --methods or --ratios", code=1)
        print(f"{name}.txt: {len(ids)} tokens -> {len(slot)}")
        save_artifact(f"{name}.text.pt", {
            "kind": "be", "stage": "recon", "layout": "chat", "vector": table[torch.tensor(slot, device=table.device)].float().cpu(), "model": {"name": args.model, "fingerprint": before, "d": table.shape[1]},
            "prompt": {"sha256": hashlib.sha256(json.dumps(messages).encode()).hexdigest(), "tokens": len(ids), "messages": messages}})
        command = [sys.executable, str(STAGE2), "--prompt", args.prompt, "--model", args.model, "--be", f"{name}.text.pt", "--out", f"{name}.part.pt", "--seed", str(args.seed), *shlex.split(args.stage2),
                   "--steps", "1", "--lr", "0", "--lam", "1", "--batch", "1"]             # a step of length 0 moves nothing, and the artifact gets its table of controls (--steps 0 only prints it)
        command += [x for option, file in (("--queries", args.queries), ("--test-queries", args.test_queries)) if file for x in (option, file)]
        print("$", shlex.join(command), flush=True)
        with open(f"{name}.log", "a") as log:
            code = subprocess.run(command, stdout=log, stderr=log).returncode
        if code:
            fail(f"that command ended with code {code}: {Path(f'{name}.log').read_text(encoding='utf-8').splitlines()[-1]}", code=code)
        os.replace(f"{name}.part.pt", f"{name}.pt")
        for left in (f"{name}.text.pt", f"{name}.part.pt.lock", f"{name}.part.kd.png"):
            with contextlib.suppress(OSError):
                os.remove(left)


if __name__ == "__main__":
    main()
