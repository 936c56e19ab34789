"""What is fed, position by position, in the default model's own tokens. An arrow stands where a loss is taken, and
points at the token to be predicted.

    python results/fed.py > results/fed.txt
"""
import sys
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the stages' own functions: what they feed is shown
from stage1_recon import beside, chat_ids, text_ids

TEXT, PROMPT, QUERY, ANSWER = "Tea is hot.", "Talk like a pirate.", "How are you?", "Aye, well!"
BE, AE = -1, -2

tokenizer = transformers.AutoTokenizer.from_pretrained(beside("models/smollm2-135m"))
end, turns = tokenizer.eos_token_id, [{"role": "user", "content": QUERY}]
x, s, a = (text_ids(tokenizer, text) for text in (TEXT, PROMPT, ANSWER))
student = chat_ids(tokenizer, [{"role": "system", "content": [BE]}] + turns)
teacher = chat_ids(tokenizer, [{"role": "system", "content": PROMPT}] + turns)
words = student[:student.index(BE)]

# column: what is fed, and the tokens that its last positions predict
columns = {
    "stage 0": (words + x + [AE] + x, x + [end]),
    "stage 1": (words + [BE, AE] + s[:-1], s),
    "stage 2, student": (student + a, a + [end]),
    "teacher": (teacher + a, a + [end]),
    "inference": (student, [])}


def name(i):
    return {BE: "[BE]", AE: "[AE]"}.get(i) or repr(tokenizer.decode([i]))[1:-1]


def cell(ids, targets, position):
    if position >= len(ids):
        return ""
    t = position - (len(ids) - len(targets))                # which target this position predicts; below 0 it is none
    return name(ids[position]) + (f" -> {name(targets[t])}" if t >= 0 and targets else "")


print("      " + "".join(f"{c:30}" for c in columns).rstrip())
for position in range(max(len(ids) for ids, _ in columns.values())):
    print(f"{position:4}  " + "".join(f"{cell(*column, position):30}" for column in columns.values()).rstrip())
