"""What exactly is fed, position by position, with the default model's own tokenizer; an arrow stands where a loss is taken, and points at the token that is to be predicted.

    python results/fed.py > results/fed.txt
"""
import os
import sys
from pathlib import Path

import transformers

os.chdir(Path(__file__).resolve().parent.parent)
sys.path.insert(0, ".")
from stage2_kd import chat_ids, layout_ids, text_ids  # noqa: E402 (the stage's own functions: what they feed is what is shown)

TEXT, PROMPT, QUERY, ANSWER = "Tea is hot.", "Talk like a pirate.", "How are you?", "Aye, well!"
tokenizer = transformers.AutoTokenizer.from_pretrained("models/smollm2-135m")
turns, end = [{"role": "user", "content": QUERY}], tokenizer.eos_token_id
x, s, a = text_ids(tokenizer, TEXT), text_ids(tokenizer, PROMPT), text_ids(tokenizer, ANSWER) + [end]
student, teacher = layout_ids(tokenizer, "chat", [-1], turns), chat_ids(tokenizer, [{"role": "system", "content": PROMPT}] + turns)
opening = student[:student.index(-1)]


def name(i):
    return {-1: "[BE]", -2: "[AE]"}.get(i) or repr(tokenizer.decode([i]))[1:-1]


# column: (what is fed, the tokens to be predicted from its last positions on)
columns = {"stage 0": (opening + x + [-2] + x, x + [end]), "stage 1": (opening + [-1, -2] + s[:-1], s), "stage 2, student": (student + a[:-1], a), "teacher": (teacher + a[:-1], a),
           "inference": (student, [])}
print("{:>4}  ".format("") + "".join(f"{c:30}" for c in columns).rstrip())
for n in range(max(len(ids) for ids, _ in columns.values())):
    cells = []
    for ids, targets in columns.values():
        t = n - (len(ids) - len(targets))
        cells.append("" if n >= len(ids) else name(ids[n]) + (f" -> {name(targets[t])}" if 0 <= t < len(targets) else ""))
    print(f"{n:4}  " + "".join(f"{c:30}" for c in cells).rstrip())
