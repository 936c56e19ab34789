"""LLMLingua's compression of a prompt to a share of its tokens: a text, for the control in results/rules.py.

    pip install llmlingua                               # into a venv of its own: it pins nothing, but it brings NLTK
    python results/compress.py prompts/desk.txt --share 0.25 --out results/desk.llmlingua.txt

The package does not keep to the rate it is asked for, so the rate is searched by bisection, to 1/64: the most that
leaves at most so many tokens. The tokens dropped are those that the small model of --model finds likely.
"""
import argparse
from pathlib import Path

import tiktoken
import transformers

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("prompt", help="a text file")
p.add_argument("--share", type=float, default=0.25, help="of the prompt's tokens that may stay")
p.add_argument("--model", default="models/smollm2-135m", help="the small model that weighs the tokens")
p.add_argument("--out", required=True, help="the compressed text")
args = p.parse_args()

tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
tiktoken.encoding_for_model = lambda _: tokenizer       # only for the package's own report; GPT's would be fetched
from llmlingua import PromptCompressor  # noqa: E402

compressor = PromptCompressor(args.model, device_map="cpu", model_config={"trust_remote_code": False})
forward = compressor.model.forward


def lists(*inputs, past_key_values=None, **more):
    """llmlingua 0.2.2 keeps a cache as a list of keys and values; today's transformers has a class for it."""
    cache = transformers.DynamicCache(past_key_values) if past_key_values else None
    out = forward(*inputs, past_key_values=cache, **more)
    out.past_key_values = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
    return out


compressor.model.forward = lists
text = Path(args.prompt).read_text(encoding="utf-8").strip()
tokens = len(tokenizer(text)["input_ids"])
low, high, best = 0.0, 1.0, ""
for _ in range(6):
    rate = (low + high) / 2
    short = compressor.compress_prompt(text.split("\n\n"), rate=rate)["compressed_prompt"]
    if len(tokenizer(short)["input_ids"]) <= args.share * tokens:
        low, best = rate, short
    else:
        high = rate
Path(args.out).write_text(best + "\n", encoding="utf-8")
print(f"{tokens} tokens -> {len(tokenizer(best)['input_ids'])}, by {args.model}'s tokenizer; wrote {args.out}")
