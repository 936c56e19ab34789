"""Ask the frozen model itself, holding the prompt, what its users would ask: the queries of stage 2.

    fed     <sys> a description: s_1 ... s_m </sys> <user> List ten questions of users. </user> <assistant>
    kept    the questions in many sampled answers, each once

    python queries.py --prompt p.txt                # -> p.queries.txt beside it: read it, mend it, then train on it
    python queries.py --prompt p.txt --count 400 --out more.txt

There is no [BE] in this, so it is plain transformers. A small model asks poor questions: mend them.
"""
import argparse, json, os, re, sys
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

ASKS = ["List ten different questions that users would ask this assistant, one a line.",
        "List ten questions about everyday things that a user might ask this assistant, one a line.",
        "List ten short questions that only this assistant can answer, one a line."]


def settings():
    formats = argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=type("Help", formats, {}))
    add = p.add_argument
    add("--prompt", required=True, help="the system prompt: a text file, or a .json with a messages list")
    add("--model", default="models/smollm2-135m", help="hub name or folder of a Llama or Qwen chat model")
    add("--out", help="the file of queries; None is NAME.queries.txt beside the prompt")
    add("--count", type=int, default=200, help="how many; 200 are a start, stage 2 holds some of them out")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--device", default="auto", choices=["auto", "cuda", "mps", "cpu"], help="auto: the first that is there")
    return p.parse_args()


def fail(message):
    """A user's mistake: one line that says what was expected, what came and what to do; exit code 2."""
    print(f"queries.py: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def clean(line):
    """A line of a model's list -> the question in it, in any language, without number, bullet, bold, backticks or
    quotes around it; "" where there is none, or what could not stand in a file of queries."""
    text = re.sub(r"(?<!\w)\*\*(\S.*?)\*\*|`(.+?)`", r"\1\2", " ".join(line.split()), flags=re.A)
    text = re.sub(r"^(([-–—*+•·●▪‣#>]+ )+|#(?=\d))", "", text)
    number = r"[(（[【]?((q|question|第|问题|質問) ?)?\d+ ?[題题]?[]).:：、．）】](?!\d)"
    text = re.sub(f"^({number}|q[:：])", "", text, flags=re.I).strip("*_, ")
    quote = "[\"'“”„‘’«»‹›「」『』]"
    text = re.sub(f"^{quote}(.*){quote}$", r"\1", text).strip("*_ ")
    # the last one, Armenian's, stands in the word
    asks = re.search(r"([?？؟⸮፧⁇⁈⁉‽\u037e]|[Ͱ-Ͽ];|か。)[!！]*$|՞", text)
    return text if asks and 4 <= len(text) <= 300 and text[0] not in "[{" and "\ufffd" not in text else ""


def main():
    args = settings()
    here = Path(__file__).resolve().parent                      # models/ and prompts/ lie beside this script
    path, name = (p if Path(p).exists() else here / p for p in (args.prompt, args.model))
    out = Path(args.out or re.sub(r"\.(txt|json|md)$", "", str(path)) + ".queries.txt")
    if args.count < 1:
        fail(f"--count: expected at least 1, found {args.count}")
    if out.suffix != ".txt" or out.exists() or not os.access(f"{out.parent}/", os.W_OK):
        fail(f"{out}: expected a new name in .txt, in a folder that can be written to; give another --out")
    try:
        prompt = Path(path).read_text(encoding="utf-8-sig").strip()
        if str(path).lower().endswith(".json"):
            prompt = "\n\n".join(m["content"] for m in json.loads(prompt)["messages"])
        if not prompt:
            raise ValueError("it is empty")
    except Exception as e:                                      # each of many types means the same
        fail(f'--prompt {args.prompt}: expected a text in UTF-8, or a .json {{"messages": [...]}}: {e}')
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = best if args.device == "auto" else args.device
    try:
        transformers.utils.logging.disable_progress_bar()
        local = Path(name).is_dir() or args.model.startswith(("models/", ".", "/"))     # else the hub is asked for it
        source = name if local else args.model
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device).eval()
        about = f"Below is the description of a chat assistant.\n\n{prompt}"
        rows = [tokenizer.apply_chat_template(
            [{"role": "system", "content": about}, {"role": "user", "content": ask}], add_generation_prompt=True,
            enable_thinking=False, return_dict=False) for ask in ASKS]
    except Exception as e:
        fail(f"--model {args.model}: no chat model: {e}; the default one comes with: python models/prepare.py")
    if max(map(len, rows)) + 200 > model.config.max_position_embeddings:
        fail(f"--prompt {args.prompt}: {max(map(len, rows))} tokens, and 200 of an answer, are more than the context")

    ends = model.generation_config.eos_token_id                 # folders disagree on what ends a turn: all of them do
    ends = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
    torch.manual_seed(args.seed)
    found, bar = {}, tqdm(total=args.count, desc="queries")
    for i in range(10 + args.count // 10):                      # a model that asks little comes to an end, too
        ids = torch.tensor([rows[i % len(rows)]], device=device)                                    # (1, T)
        said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, num_return_sequences=8,
                              do_sample=True, temperature=0.9, top_p=0.95, top_k=0, eos_token_id=ends,
                              pad_token_id=ends[0])[:, ids.shape[1]:]
        for query in map(clean, "\n".join(tokenizer.batch_decode(said, skip_special_tokens=True)).splitlines()):
            found.setdefault(query.casefold(), query)
        found.pop("", None)
        bar.update(min(len(found), args.count) - bar.n)
        if len(found) >= args.count:
            break
    bar.close()

    queries = list(found.values())[:args.count]
    if not queries:
        fail(f"{args.model} asked nothing that ends in a question mark; use a larger model, or write {out} yourself")
    Path(f"{out}.tmp").write_text("\n".join(queries) + "\n", encoding="utf-8")
    os.replace(f"{out}.tmp", out)
    print("\n".join(queries[::len(queries) // 8 + 1]))
    print(f"wrote {out}: {len(queries)} of {args.count} queries; read it and mend it")
    print(f"next, to learn from it: python stage2_kd.py --prompt {args.prompt} --model {args.model} --queries {out}")
    print(f"or, to test with it: python eval_kl.py --queries {out}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")                    # a ? for what the terminal's encoding does not have
    main()
