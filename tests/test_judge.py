"""results/judge.py, against a client that is none."""
from types import SimpleNamespace

import pytest

from conftest import script

# what the judge says of a pair, by whether [BE]'s answer stands first
SAYS = {"won": lambda first: "A" if first else "B", "lost": lambda first: "B." if first else "**A**",
        "first": lambda first: "A", "half": lambda first: "TIE" if first else "B.",
        "thinks": lambda first: "<think>B?</think>\nA" if first else "b", "mute": lambda first: "Hard to say."}


def test_the_judge_hears_both_orders_and_its_verdicts_are_kept(work, monkeypatch):
    """Two equal answers are never sent; a verdict that is no A, B or TIE counts for neither."""
    openai, heard = pytest.importorskip("openai"), []

    def create(model, messages, **settings):
        text = messages[0]["content"]
        key = next(key for key in SAYS if f"question: {key}?" in text)
        heard.append(SAYS[key](text.index("mine") < text.index("theirs")))
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=heard[-1]))])
    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    monkeypatch.setattr(openai, "OpenAI", lambda **settings: client)
    args = SimpleNamespace(judge_url="http://x/v1", judge_model="m", judge_options={"temperature": 0}, answers="out/r")
    triples = [(f"{key}?", "mine", "theirs") for key in SAYS] + [("same?", "equal", "equal")]
    for calls in (12, 0):
        heard.clear()
        counts = script("results.judge").judged(args, "Old Captain", "d", triples)
        assert counts == {"W": 3, "T": 2, "L": 1, "unparsable": 1, "both_orders": 3, "win_rate": (3 + 2 / 2) / 6}
        assert len(heard) == calls
