"""The artifacts, the teacher's cache, and the marked blocks that the scripts share by copy."""
import ast
import os
import pickle
import re
from collections import defaultdict

import filelock
import pytest
import torch

from conftest import CPU, ROOT, build_checkpoint, load_script

BLOCK = re.compile(r"^# --- shared: ([\w ,-]+?) -+\n(.*?)^# --- end shared", re.S | re.M)
SOURCES = {p.name: p.read_text(encoding="utf-8") for p in sorted(ROOT.glob("*.py"))}


# --- the scripts

def test_every_copy_of_a_shared_block_is_the_same():
    copies = defaultdict(dict)
    for file, source in (SOURCES | {"results/baselines.py": (ROOT / "results/baselines.py").read_text(encoding="utf-8")}).items():
        assert source.count("# --- shared:") == source.count("# --- end shared") == len(BLOCK.findall(source)), f"{file}: a mark without its other half"
        for name, body in BLOCK.findall(source):
            assert file not in copies[name], f"{file} has the block {name} twice"
            copies[name][file] = body
    assert {"fail", "device", "load_frozen", "hook", "token_loss", "load_artifact", "save_artifact", "chat_ids"} <= set(copies)
    for name, bodies in copies.items():
        assert len(set(bodies.values())) == 1, f"the shared block {name} differs between {', '.join(bodies)}"
        assert len(bodies) > 1, f"the shared block {name} stands in {', '.join(bodies)} only"


def test_no_script_imports_another():
    names = {file[:-3] for file in SOURCES} | {"tests", "models", "nanobe"}
    for file, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not names & {i.split(".")[0] for i in imported}, f"{file} imports {imported}"


# --- artifacts

def artifact(**changes):
    return {"kind": "be", "vector": torch.ones(2, 64), "model": {"name": "tiny", "fingerprint": "abc", "d": 64}, "layout": "chat", "stage": "kd", "prompt": {"messages": [{"role": "system", "content": "x"}], "tokens": 1}} | changes


def test_an_artifact_comes_back_as_it_was_saved(scripts, tmp_path):
    path = tmp_path / "folder" / "be.pt"
    path.parent.mkdir()
    scripts.kd.save_artifact(path, artifact())
    back = scripts.infer.load_artifact(path, "be", "abc", 64, "MAKER")
    assert torch.equal(back["vector"], torch.ones(2, 64)) and back["layout"] == "chat"
    assert os.listdir(path.parent) == ["be.pt"]
    assert scripts.infer.load_artifact(path, "be", None, None, "MAKER")["kind"] == "be"
    assert scripts.infer.load_artifact(path, "be", "xyz", 64, "MAKER", strict=False) is None


def test_a_save_that_breaks_off_leaves_the_old_artifact_whole(scripts, tmp_path, monkeypatch):
    path = tmp_path / "be.pt"
    scripts.kd.save_artifact(path, artifact())
    whole = path.read_bytes()

    def broken(obj, f):
        f.write(b"half a file")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(KeyboardInterrupt):
        scripts.kd.save_artifact(path, artifact(vector=torch.zeros(2, 64)))
    assert path.read_bytes() == whole


class Evil:
    """A pickle that makes a folder when it is opened by someone who trusts it."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def saved(tmp_path, obj):
    """With a right checksum, so that it is not this which gives the content away."""
    load_script("stage2_kd").save_artifact(tmp_path / "be.pt", obj)


def cut(tmp_path, share):
    saved(tmp_path, artifact())
    data = (tmp_path / "be.pt").read_bytes()
    (tmp_path / "be.pt").write_bytes(data[:int(len(data) * share)])


BAD = {                                                                     # case: (how the file comes to be, a word of the message)
    "missing": (lambda p: None, "not there"),
    "empty": (lambda p: cut(p, 0), "not a whole artifact"),
    "truncated at 10%": (lambda p: cut(p, 0.1), "not a whole artifact"),
    "truncated at 50%": (lambda p: cut(p, 0.5), "not a whole artifact"),
    "truncated at 99%": (lambda p: cut(p, 0.99), "not a whole artifact"),
    "text": (lambda p: (p / "be.pt").write_text("no artifact\n" * 50), "not a whole artifact"),
    "folder": (lambda p: (p / "be.pt").mkdir(), "not a whole artifact"),
    "no dict": (lambda p: saved(p, torch.ones(2, 64)), "not a whole artifact"),
    "wrong kind": (lambda p: saved(p, artifact(kind="ae")), "found 'ae'"),
    "no vector": (lambda p: saved(p, {k: v for k, v in artifact().items() if k != "vector"}), "not a whole artifact"),
    "another model": (lambda p: saved(p, artifact(vector=torch.ones(2, 48), model={"name": "other", "fingerprint": "xyz", "d": 48})), "another model (other, d = 48)"),
    "wrong width": (lambda p: saved(p, artifact(vector=torch.ones(2, 48))), "not a whole artifact"),
    "wrong rank": (lambda p: saved(p, artifact(vector=torch.ones(64))), "not a whole artifact"),
    "no tensor": (lambda p: saved(p, artifact(vector=[1.0] * 64)), "not a whole artifact"),
    "fp64": (lambda p: saved(p, artifact(vector=torch.ones(2, 64, dtype=torch.float64))), "not a whole artifact"),
    "no checksum": (lambda p: torch.save(artifact(), p / "be.pt"), "not a whole artifact"),
    "another checksum": (lambda p: (saved(p, artifact()), (p / "be.pt").write_bytes((p / "be.pt").read_bytes()[:-64] + b"0" * 64)), "not a whole artifact"),
    "NaN": (lambda p: saved(p, artifact(vector=torch.full((2, 64), float("nan")))), "not a whole artifact"),
    "torch pickle with code": (lambda p: saved(p, artifact(layout=Evil(p / "ran"))), "not a whole artifact"),
    "plain pickle with code": (lambda p: (p / "be.pt").write_bytes(pickle.dumps(Evil(p / "ran"))), "not a whole artifact"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_artifact_is_refused_in_one_line(case, scripts, tmp_path, capsys):
    make, word = BAD[case]
    make(tmp_path)
    with pytest.raises(SystemExit) as e:
        scripts.kd.load_artifact(tmp_path / "be.pt", "be", "abc", 64, "python MAKER.py")
    out, err = capsys.readouterr()
    assert e.value.code == 2 and err.count("\n") == 1 and err.endswith("\n") and "be.pt" in err
    assert word in err and "python MAKER.py" in err                         # what came, and what to do
    assert not (tmp_path / "ran").exists()


def test_find_ae_takes_the_one_of_this_model(scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path, fingerprint, value in [("out/ae.pt", "xyz", 1.0), ("artifacts/ae-a.pt", "xyz", 2.0), ("artifacts/ae-b.pt", "abc", 3.0)]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        scripts.ae.save_artifact(path, artifact(kind="ae", vector=torch.full((1, 64), value), model={"name": "tiny", "fingerprint": fingerprint, "d": 64}))
    assert scripts.recon.find_ae("", "abc", 64, "tiny").tolist() == [[3.0] * 64]
    assert scripts.recon.find_ae("", "xyz", 64, "tiny").tolist() == [[1.0] * 64]       # out/ before artifacts/
    for path, fingerprint in [("", "new"), ("out/ae.pt", "abc")]:           # none there; and the named one, of another model
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            scripts.recon.find_ae(path, fingerprint, 64, "tiny")
        assert e.value.code == 2 and "python stage0_ae.py --model tiny" in capsys.readouterr().err


# --- the fingerprint

def test_the_fingerprint_does_not_depend_on_the_dtype_it_was_opened_in(scripts, checkpoints):
    prints = [scripts.kd.fingerprint(scripts.kd.load_frozen(str(checkpoints["qwen"]), CPU, dtype, "eager")[0]) for dtype in (torch.bfloat16, torch.float32)]
    assert prints[0] == prints[1]


def test_the_fingerprint_changes_with_one_weight(scripts, checkpoints, tmp_path):
    model, _ = scripts.kd.load_frozen(str(checkpoints["llama3"]), CPU, torch.float32, "eager")
    before = scripts.kd.fingerprint(model)
    for w in (model.model.layers[1].mlp.down_proj.weight, model.lm_head.weight, model.model.norm.weight):
        old = w.view(-1)[-1].item()
        w.view(-1)[-1] = old * 1.02 + 0.01
        assert scripts.kd.fingerprint(model) != before
        w.view(-1)[-1] = old
    assert scripts.kd.fingerprint(model) == before
    other, _ = scripts.kd.load_frozen(str(build_checkpoint(tmp_path / "other", "llama3", seed=1)), CPU, torch.float32, "eager")
    assert scripts.kd.fingerprint(other) != before


# --- the teacher's cache

STOP = torch.tensor([-1])


@pytest.fixture
def asked(smol, scripts, tmp_path, monkeypatch, capsys):
    """asked(limit) -> (answers, hidden, rows generated this time): teacher() over nine rows, in tmp_path."""
    model, tokenizer = smol
    rows = [[5, 6, 7, 8] + list(range(40, 41 + i)) for i in range(9)]
    made, generate = [], scripts.kd.generate

    def counted(*a, **k):
        for row in generate(*a, **k):
            made.append(row[0])
            yield row
    monkeypatch.setattr(scripts.kd, "generate", counted)

    def ask(limit=6, seed=0, temperature=0.0, rows=rows, key="model"):
        made.clear()
        answers, hidden = scripts.kd.teacher(model, rows, STOP, limit, temperature, seed, key, tmp_path)
        return answers, [h.float() for h in hidden], list(made)
    return ask


def same(a, b):
    """The same answers; states to a bf16 rounding, which an answer made anew in a smaller batch may cross."""
    assert a[0] == b[0] and len(a[1]) == len(b[1])
    for x, y in zip(a[1], b[1]):
        torch.testing.assert_close(x, y, rtol=2 ** -7, atol=1e-4)


def test_the_teacher_is_asked_once(asked, smol, scripts):
    first = asked()
    assert first[2] == list(range(9)) and [len(a) for a in first[0]] == [6] * 9
    again = asked()
    assert again[2] == [] and again[0] == first[0] and all(torch.equal(x, y) for x, y in zip(first[1], again[1]))
    z = smol[0].get_output_embeddings().weight
    assert all((z @ h[t]).argmax() == a[t] for a, h in zip(*first[:2]) for t in (0, 5) if (z @ h[t]).topk(2).values.diff().abs() > 0.1)     # row i's states belong to row i's answer


@pytest.mark.parametrize("damage", ["cut", "emptied", "text", "other json", "states cut", "states gone"])
def test_a_damaged_cache_is_made_again(asked, tmp_path, damage):
    """As a whole, but where the file of answers ends early: then what stands before its end is kept."""
    first = asked()
    path = next(tmp_path.glob(f"teacher-*.{'bin' if 'states' in damage else 'jsonl'}"))
    half = path.read_bytes()[:path.stat().st_size // 2]
    path.write_bytes({"cut": half, "states cut": half, "text": b"no answers\n" * 200, "other json": b'{"row": 0}\n'}.get(damage, b""))
    if damage == "states gone":
        path.unlink()
    kept = half.count(b"\n") if damage == "cut" else 0
    again = asked()
    assert len(again[2]) == 9 and 0 < kept < 9 or kept == 0                 # one batch of nine: made as a whole
    third = asked()                                                         # and what it wrote is whole
    assert third[2] == []
    same(first, again)
    same(first, third)


@pytest.mark.parametrize("line", ["whole", "half", "none"])
def test_a_killed_teacher_goes_on_and_gives_the_same_states(asked, tmp_path, line):
    """Killed after five answers and in the sixth: its states are there in part, or as a whole with its line in part. Batches are the same whatever is done already, so the answers and states are too, to the last bit."""
    whole = asked()
    path, states = (next(tmp_path.glob(f"teacher-*.{end}")) for end in ("jsonl", "bin"))
    bytes_of = [path.read_bytes(), states.read_bytes()]
    lines, d = bytes_of[0].splitlines(keepends=True), len(bytes_of[1]) // 9 // 6
    path.write_bytes(b"".join(lines[:5]) + {"whole": b"", "half": lines[5][:7], "none": b""}[line])
    states.write_bytes(bytes_of[1][:{"whole": 30, "half": 36, "none": 33}[line] * d])
    again = asked()
    assert len(again[2]) == 9 and again[0] == whole[0] and all(torch.equal(x, y) for x, y in zip(again[1], whole[1]))
    assert [path.read_bytes(), states.read_bytes()] == bytes_of


def test_no_other_run_writes_the_same_answers_meanwhile(asked, tmp_path, scripts, monkeypatch):
    """A second run asks for the same answers while the first one writes them: it holds the lock, so nothing is written twice."""
    held, generate = [], scripts.kd.generate

    def look(*a, **k):
        lock = filelock.FileLock(f"{next(tmp_path.glob('teacher-*.bin'))}.lock")
        with pytest.raises(filelock.Timeout):
            lock.acquire(timeout=0)
        held.append(True)
        yield from generate(*a, **k)
    monkeypatch.setattr(scripts.kd, "generate", look)
    asked()
    assert held == [True]


def test_whatever_the_answers_depend_on_makes_another_cache(asked, tmp_path):
    first = asked()
    longer = asked(limit=7)
    assert len(longer[2]) == 9 and [a[:6] for a in longer[0]] == first[0]
    for change in ({"seed": 1}, {"temperature": 0.5}, {"key": "another model"}, {"rows": [[5, 6, 7, 9, 40 + i] for i in range(9)]}):
        assert len(asked(**change)[2]) == 9, change
    assert len(list(tmp_path.glob("teacher-*.jsonl"))) == len(list(tmp_path.glob("teacher-*.bin"))) == 6
    assert asked()[2] == []                                                 # the first is still there
