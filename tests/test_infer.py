"""infer.py: the plain greedy answer; a chat goes on."""
import json, os, re, shutil, subprocess, sys

from conftest import PROMPT, ROOT, TINY, before, main, opened, plain_greedy, script

def test_compare_feeds_the_prompt_the_slot_and_nothing(smol, checkpoints, vectors, work):
    """And answers greedily, whatever the folder's own generation config says."""
    model, tokenizer = smol
    turns = [{"role": "user", "content": "How many apples are left?"}]
    fed = {"full prompt": script("infer").chat_ids(tokenizer, [{"role": "system", "content": PROMPT}] + turns),
           "[BE]": before(tokenizer, [-1, -2], turns),
           "no prompt": before(tokenizer, [], turns)}
    folder = shutil.copytree(checkpoints["smol"], work / "model")
    config = json.loads((folder / "generation_config.json").read_text())
    own = {"repetition_penalty": 9.0, "do_sample": True, "temperature": 5.0}
    (folder / "generation_config.json").write_text(json.dumps(config | own))
    r = main("infer", "--be", vectors / "two.pt", "--query", "How many apples are left?", "--compare",
             "--max-new-tokens", 8, "--model", folder, *TINY)
    assert r.code == 0, r.err
    parts = re.split(r"^--- (.+)\n", r.out, flags=re.M)
    answers = dict(zip(parts[1::2], parts[2::2]))
    assert list(answers) == list(fed)
    for condition, ids in fed.items():
        said = plain_greedy(model, ids, opened(vectors / "two.pt")["vector"], 8)
        text = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert answers[condition].startswith(f"{text}\n"), condition
        assert f"{len(ids)} tokens fed, {len(said)} answered" in answers[condition]
    assert "[BE][BE]" in parts[0]                           # what is fed, shown


def test_a_chat_keeps_its_turns_on_any_terminal_until_it_is_too_long(vectors, work):
    """A real process with real bytes: a query that is no UTF-8, one that is too long, and an output of ASCII alone."""
    command = [sys.executable, ROOT / "infer.py", "--be", vectors / "be.pt", "--max-new-tokens", "9", *TINY]
    typed = "Who are you?\n\nWho are you?\n日本?\n".encode() + b"caf\xe9?\n"
    for last, code, words in ((b"", 0, ""), (b"x" * 3000 + b"\n", 2, "shorten it")):
        r = subprocess.run(command, input=typed + last, capture_output=True, cwd=work, timeout=300,
                           env=os.environ | {"PYTHONIOENCODING": "ascii"})
        out, err = r.stdout.decode("ascii"), r.stderr.decode()
        assert r.returncode == code and "Traceback" not in err and words in err, err
        fed = [int(n) for n in re.findall(r"(\d+) tokens fed", out)]
        assert len(fed) == 4 and fed == sorted({*fed})
