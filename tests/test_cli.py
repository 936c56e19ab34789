"""The command lines: whole runs as processes, with numbers; killed and resumed runs; and what is said to a user who gave the wrong thing.

A process costs five seconds of imports, so the whole runs are shared by the tests, and the rest calls main() in this process, with its own arguments and folder.
"""
import hashlib
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import CPU, ROOT, SENTENCES

PROMPT = "You are the old captain. Answer in two short sentences: 1, 2, 37! Never name your ship."
TINY = ["--dtype", "fp32", "--device", "cpu"]
STAGE0 = ["--data", "corpus.jsonl", "--steps", 24, "--eval-every", 8, "--held-out", 4, "--min-tokens", 64, "--max-tokens", 64, "--lr", 0.5]
STAGE1 = ["--prompt", "p.txt", "--steps", 40, "--lr", 0.5, "--k", 2]
STAGE2 = ["--prompt", "p.txt", "--steps", 20, "--lr", 0.5, "--eval-every", 5, "--batch", 4, "--answer-tokens", 8]
RANDOM = ["--prompt", "p.txt", "--init", "random", "--lr", 0.1, "--batch", 4, "--answer-tokens", 6]      # stage 2 without stage 1


def fill(folder):
    """A working folder: a corpus of few words, a prompt and its questions."""
    folder.mkdir(parents=True, exist_ok=True)
    words, rng = "the harbour of Grimmel Bay wakes before the sun does".split(), random.Random(0)
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": " ".join(rng.choices(words, k=50))}) + "\n" for _ in range(60)))
    (folder / "p.txt").write_text(PROMPT)
    (folder / "p.queries.txt").write_text("".join(f"{s}?\n" for s in SENTENCES))
    return folder


def process(script, *arguments, cwd, ok=True, wrapper=None):
    """A script as a user runs it; wrapper: Python source that runs it instead."""
    r = subprocess.run([sys.executable, *(["-c", wrapper] if wrapper else [str(ROOT / script)]), *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert not ok or r.returncode == 0, r.stderr
    return r


def said(err):
    """The lines of stderr, without progress bars."""
    return [line for line in err.replace("\r", "\n").split("\n") if line.strip() and "it/s" not in line and "/s]" not in line]


def control(artifact, word):
    return next(row for name, row in artifact["metrics"]["controls"].items() if name.startswith(word))


# --- whole runs, by subprocess

@pytest.fixture(scope="module", params=[("smol", "chat"), ("llama3", "block")], ids=lambda p: f"{p[0]}-{p[1]}")
def start(request, checkpoints, tmp_path_factory):
    """Stage 0 -> 1 -> 2 -> infer run in one folder, with the default file names; each fixture adds its stage's artifact, as it stood then."""
    name, layout = request.param
    weights = hashlib.sha256((checkpoints[name] / "model.safetensors").read_bytes()).hexdigest()
    return SimpleNamespace(name=name, layout=layout, model=str(checkpoints[name]), weights=weights, folder=fill(tmp_path_factory.mktemp("pipeline")))


@pytest.fixture(scope="module")
def after_0(start):
    process("stage0_ae.py", "--model", start.model, *TINY, *STAGE0, cwd=start.folder)
    start.ae = torch.load(start.folder / "out/ae.pt", weights_only=True)
    return start


@pytest.fixture(scope="module")
def after_1(after_0):
    process("stage1_recon.py", "--model", after_0.model, *TINY, *STAGE1, "--layout", after_0.layout, cwd=after_0.folder)
    after_0.recon = torch.load(after_0.folder / "out/be.pt", weights_only=True)
    return after_0


@pytest.fixture(scope="module")
def after_2(after_1):
    after_1.kd_out = process("stage2_kd.py", "--model", after_1.model, *TINY, *STAGE2, cwd=after_1.folder).stdout
    after_1.kd = torch.load(after_1.folder / "out/be.pt", weights_only=True)
    return after_1


def test_every_stage_writes_its_artifact(after_2, scripts, checkpoints):
    model, tokenizer = scripts.kd.load_frozen(after_2.model, CPU, torch.float32, "eager")
    for artifact, kind, shape in [(after_2.ae, "ae", (1, 64)), (after_2.recon, "be", (2, 64)), (after_2.kd, "be", (2, 64))]:
        assert artifact["kind"] == kind and artifact["vector"].shape == shape and artifact["vector"].dtype == torch.float32
        assert {"vector", "model", "layout", "step", "config", "metrics", "history", "versions"} <= set(artifact)
        assert artifact["model"]["name"] == after_2.model and artifact["model"]["d"] == 64
        assert artifact["model"]["fingerprint"] == scripts.kd.fingerprint(model)
    assert [a["step"] for a in (after_2.ae, after_2.recon, after_2.kd)] == [24, 40, 20]
    for artifact in (after_2.recon, after_2.kd):
        assert artifact["layout"] == after_2.layout and artifact["prompt"]["messages"] == [{"role": "system", "content": PROMPT}]
        assert artifact["prompt"]["tokens"] == len(scripts.kd.prompt_ids(tokenizer, [{"role": "system", "content": PROMPT}], after_2.layout, 1024))
    for png in ("ae.png", "be.recon.png", "be.kd.png"):
        assert (after_2.folder / "out" / png).read_bytes()[:4] == b"\x89PNG"
    assert not list((after_2.folder / "out").glob("*.tmp"))


def test_the_frozen_weights_on_disk_are_as_they_were(after_2, checkpoints):
    assert hashlib.sha256((checkpoints[after_2.name] / "model.safetensors").read_bytes()).hexdigest() == after_2.weights


def test_stage_0_lowers_the_held_out_copy_loss(after_0):
    losses = [row["held-out"] for row in after_0.ae["history"]]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.01
    assert after_0.ae["metrics"]["held_out_loss"] == min(losses)
    report = after_0.ae["report"]
    assert report["64 [AE]"]["loss"] < report["64 none"]["loss"] - 0.03
    assert report["64 [AE]"]["loss"] == pytest.approx(min(losses), abs=1e-4)


def test_stage_0_compares_with_a_vector_that_was_not_trained(after_0):
    report = after_0.ae["report"]
    assert report["64 [AE]"]["loss"] < report["64 random"]["loss"] - 0.01


def test_stage_1_lowers_the_reconstruction_loss(after_1):
    losses = [row["recon"] for row in after_1.recon["history"]]
    assert len(losses) == 40 and losses[-1] < losses[0] - 0.3
    assert after_1.recon["metrics"]["recon"] == min(losses)


def test_stage_1_reports_the_loss_of_the_vector_it_saved(after_1, scripts):
    """Recomputed here from the artifact alone, by plain cross-entropy."""
    model, tokenizer = scripts.recon.load_frozen(after_1.model, CPU, torch.float32, "eager")
    s = scripts.recon.prompt_ids(tokenizer, after_1.recon["prompt"]["messages"], after_1.layout, 1024)
    before = scripts.recon.layout_ids(tokenizer, after_1.layout, [-1, -2], [{"role": "user", "content": "?"}])
    before = before[:before.index(-1)]
    ids = torch.tensor([before + [-1, -2, -3] + s])
    with torch.no_grad():
        logits = model(inputs_embeds=scripts.recon.embed(model, ids, torch.cat([after_1.recon["vector"], after_1.ae["vector"]]))).logits[0, -len(s) - 1:-1]
    assert torch.nn.functional.cross_entropy(logits, torch.tensor(s)).item() == pytest.approx(after_1.recon["metrics"]["recon"], abs=1e-4)


def test_stage_2_lowers_the_held_out_divergence(after_2):
    kl = [row["held-out KL"] for row in after_2.kd["history"] if "held-out KL" in row]
    assert len(kl) == 4 and min(kl) < kl[0] - 0.005
    best = control(after_2.kd, "[BE]")
    assert best["kl"] == pytest.approx(min(kl), abs=1e-5) == pytest.approx(after_2.kd["metrics"]["held_out_kl"], abs=1e-5)
    assert best["kl"] < 0.9 * control(after_2.kd, "random vector")["kl"]


def test_stage_2_prints_its_controls(after_2):
    full, none = control(after_2.kd, "full prompt"), control(after_2.kd, "no prompt")
    assert abs(full["kl"]) < 1e-4 and full["top1"] == 1 and none["kl"] > 0.01       # 1e-4: the teacher's states are kept in bf16
    for name, row in after_2.kd["metrics"]["controls"].items():
        assert re.search(rf"^{re.escape(name)} +-?{abs(row['kl']):.4f} ", after_2.kd_out, re.M), name
        assert row["n"] == 3 and math.isfinite(row["gap_closed"]) and row["gap_closed_95"][0] <= row["gap_closed_95"][1]
    assert none["gap_closed"] == 0


def test_stage_2_goes_on_from_stage_1(after_2, scripts):
    """It starts from stage 1's vector, where L_recon is the very loss that stage 1 saved it for; and its student's rows are shorter by what [BE] replaces."""
    assert torch.equal(after_2.kd["start"], after_2.recon["vector"]) and not torch.equal(after_2.kd["vector"], after_2.recon["vector"])
    assert after_2.kd["history"][0]["L_recon"] == pytest.approx(after_2.recon["metrics"]["recon"], abs=1e-4)
    _, tokenizer = scripts.kd.load_frozen(after_2.model, CPU, torch.float32, "eager")
    turns = [{"role": "user", "content": "?"}]
    saving = len(scripts.kd.chat_ids(tokenizer, after_2.kd["prompt"]["messages"] + turns)) - len(scripts.kd.layout_ids(tokenizer, after_2.layout, [-1, -2], turns))
    assert control(after_2.kd, "full prompt")["tokens"] - control(after_2.kd, "[BE]")["tokens"] == pytest.approx(saving)


def test_infer_answers_with_the_artifact_in_its_own_layout(after_2, scripts):
    """The [BE] answer of infer.py, against a plain greedy loop over the layout that stands in the artifact."""
    model, tokenizer = scripts.infer.load_frozen(after_2.model, CPU, torch.float32, "eager")
    turns = [{"role": "user", "content": "How many apples are left?"}]
    full = scripts.infer.chat_ids(tokenizer, [{"role": "system", "content": PROMPT}] + turns)
    ids, answer = scripts.infer.layout_ids(tokenizer, after_2.layout, [-1, -2], turns), []
    with torch.no_grad():
        for _ in range(8):
            answer.append(model(inputs_embeds=scripts.infer.embed(model, torch.tensor([ids + answer]), after_2.kd["vector"])).logits[0, -1].argmax().item())
    out = process("infer.py", *TINY, "--query", "How many apples are left?", "--compare", "--max-new-tokens", 8, cwd=after_2.folder).stdout
    parts = re.split(r"^--- (.+)\n", out, flags=re.M)
    answers = dict(zip(parts[1::2], parts[2::2]))
    assert list(answers)[:2] == ["full prompt", "[BE]"] and len(answers) == 3
    assert answers["[BE]"].startswith(tokenizer.decode(answer, skip_special_tokens=True))
    fed = [int(re.search(r"(\d+) tokens fed", text)[1]) for text in answers.values()]
    assert fed[:2] == [len(full), len(ids)] and fed[2] < fed[1] < fed[0]


# --- the same, in this process

@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(fill(tmp_path / "work"))
    return tmp_path / "work"


@pytest.fixture(scope="module")
def prepared(owner, scripts, tmp_path_factory):
    """[AE] and a stage-1 [BE] for the tied Llama, from noise: enough to start from."""
    folder = tmp_path_factory.mktemp("prepared")
    messages = [{"role": "system", "content": PROMPT}]
    prompt = {"sha256": hashlib.sha256(json.dumps(messages).encode()).hexdigest(), "messages": messages, "tokens": 30}
    g = torch.Generator().manual_seed(0)
    scripts.ae.save_artifact(folder / "ae.pt", {"kind": "ae", "vector": torch.randn(1, 64, generator=g) / 10, "model": owner, "layout": "chat"})
    be = {"kind": "be", "stage": "recon", "vector": torch.randn(1, 64, generator=g) / 10, "last": torch.zeros(1, 64), "model": owner, "layout": "chat", "prompt": prompt}
    scripts.ae.save_artifact(folder / "be.pt", be)
    scripts.ae.save_artifact(folder / "other.pt", be | {"vector": torch.zeros(1, 48), "model": owner | {"name": "other", "fingerprint": "xyz", "d": 48}})
    (folder / "cut.pt").write_bytes((folder / "be.pt").read_bytes()[:1500])
    return folder


def stage(scripts, name, prepared):
    """A stage's module and the arguments of a short run that saves three times."""
    return {"ae": (scripts.ae, ["--data", "corpus.jsonl", "--steps", 6, "--eval-every", 2, "--held-out", 2, "--lr", 0.1]),
            "recon": (scripts.recon, ["--prompt", "p.txt", "--steps", 30, "--save-every", 10, "--ae", prepared / "ae.pt", "--lr", 0.1]),
            "kd": (scripts.kd, ["--prompt", "p.txt", "--steps", 6, "--eval-every", 2, "--batch", 4, "--answer-tokens", 6, "--ae", prepared / "ae.pt", "--be", prepared / "be.pt", "--lr", 0.1]),
            "kd random": (scripts.kd, [*RANDOM, "--steps", 6, "--eval-every", 2, "--lam", 1, "--k", 3, "--layout", "block"])}[name]


def same(a, b):
    """Two artifacts, or parts of them: every tensor and number is the same, to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "config")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("saves", [1, 2])
@pytest.mark.parametrize("name", ["ae", "recon", "kd", "kd random", "kd, best first"])
def test_a_resumed_run_equals_the_uninterrupted_one(name, saves, scripts, checkpoints, prepared, work, command, monkeypatch):
    """The run is broken off right after its first or second save, then resumed with the same --steps."""
    module, arguments = stage(scripts, name.split(",")[0], prepared)
    arguments = ["--model", checkpoints["smol"], *TINY, *arguments]
    if name == "kd, best first":                                            # the further from the start, the worse, but for the start itself: the first save has the best vector, and it is not the last one
        evaluate, first = module.evaluate, torch.load(prepared / "be.pt", weights_only=True)["vector"]
        monkeypatch.setattr(module, "evaluate", lambda *a: evaluate(*a) + torch.tensor([100.0, 0, 0]) * ((a[-1] - first).norm() or 1e6))
    assert command(module, *arguments, "--out", "whole/x.pt").code == 0
    whole, save, left = torch.load("whole/x.pt", weights_only=True), module.save_artifact, [saves]

    def save_and_die(path, artifact):
        save(path, artifact)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(module, "save_artifact", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            command(module, *arguments, "--out", "broken/x.pt")
    assert torch.load("broken/x.pt", weights_only=True)["step"] == saves * whole["step"] // 3
    assert name != "kd, best first" or whole["best"]["step"] == 2
    assert command(module, *arguments, "--out", "broken/x.pt", "--resume").code == 0
    resumed = torch.load("broken/x.pt", weights_only=True)
    assert torch.equal(resumed["vector"], whole["vector"]) and torch.equal(resumed["last"], whole["last"])
    assert resumed["history"] == whole["history"] and resumed["step"] == whole["step"]
    assert same(resumed, whole)


def test_stage_0_is_not_resumed_over_other_texts(scripts, checkpoints, prepared, work, command):
    module, arguments = stage(scripts, "ae", prepared)
    arguments = ["--model", checkpoints["smol"], *TINY, *arguments, "--out", "x.pt"]
    assert command(module, *arguments).code == 0
    whole = (work / "x.pt").read_bytes()
    first, second, *rest = (work / "corpus.jsonl").read_text().splitlines(keepends=True)
    (work / "corpus.jsonl").write_text("".join([second, first, *rest]))                                  # as many, in another order: other batches, and other texts held out
    r = command(module, *arguments, "--resume")
    assert r.code == 2 and "texts of --data have changed" in r.err and len(said(r.err)) == 1 and (work / "x.pt").read_bytes() == whole


@pytest.mark.parametrize("name", ["ae", "recon", "kd"])
def test_resuming_a_finished_run_changes_nothing(name, scripts, checkpoints, prepared, work, command):
    module, arguments = stage(scripts, name, prepared)
    arguments = ["--model", checkpoints["smol"], *TINY, *arguments, "--out", "x.pt"]
    assert command(module, *arguments).code == 0
    whole = (work / "x.pt").read_bytes()
    assert command(module, *arguments, "--resume").code == 0
    assert (work / "x.pt").read_bytes() == whole


KILLED = """
import os, runpy, signal, sys
replace = os.replace
def replace_and_die(a, b):
    replace(a, b)
    if str(b).endswith("be.pt"):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_and_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_killed_process_is_resumed_to_the_same_vector(scripts, checkpoints, prepared, work, command):
    """SIGKILL as the artifact first appears; then --resume, against one run in one go."""
    module, arguments = stage(scripts, "kd", prepared)
    arguments = ["--model", checkpoints["smol"], *TINY, *arguments]
    r = process(None, ROOT / "stage2_kd.py", *arguments, "--out", "killed/be.pt", cwd=work, ok=False, wrapper=KILLED)
    assert r.returncode == -signal.SIGKILL and torch.load("killed/be.pt", weights_only=True)["step"] == 2
    resumed = command(module, *arguments, "--out", "killed/be.pt", "--resume")
    assert resumed.code == 0 and f"teacher: {len(SENTENCES)} answers found, 0 made" in resumed.out
    assert command(module, *arguments, "--out", "whole/be.pt").code == 0
    assert torch.equal(torch.load("killed/be.pt", weights_only=True)["vector"], torch.load("whole/be.pt", weights_only=True)["vector"])


def test_stage_2_is_deterministic(scripts, checkpoints, prepared, work, command):
    """Twice with a new teacher, and once more over its own output and cache: the same vector. Another seed: another vector."""
    module, arguments = stage(scripts, "kd random", prepared)
    arguments = ["--model", checkpoints["smol"], *TINY, *arguments]
    vectors = []
    for out, seed in [("a/be.pt", 0), ("b/be.pt", 0), ("a/be.pt", 0), ("c/be.pt", 1)]:
        assert command(module, *arguments, "--out", out, "--seed", seed).code == 0
        vectors.append(torch.load(out, weights_only=True)["vector"])
    assert vectors[0].shape == (3, 64)
    assert torch.equal(vectors[0], vectors[1]) and torch.equal(vectors[0], vectors[2]) and not torch.equal(vectors[0], vectors[3])


def test_lambda_weighs_the_two_losses(scripts, checkpoints, prepared, work, command):
    """At 0 only L_recon is trained, at 1 only L_KD, and then no [AE] is needed."""
    recon, kl = {}, {}
    for lam in (0, 0.9, 1):
        ae = ["--ae", prepared / "ae.pt"] if lam < 1 else []
        assert command(scripts.kd, "--model", checkpoints["smol"], *TINY, *RANDOM, "--steps", 30, "--lam", lam, *ae).code == 0
        history = torch.load("out/be.pt", weights_only=True)["history"]
        recon[lam], kl[lam] = [row["L_recon"] for row in history if "L_recon" in row], history[-1]["held-out KL"]
    assert recon[0][-1] < recon[0.9][-1] - 0.01 and recon[1] == []
    assert max(kl[0.9], kl[1]) < kl[0] - 0.01


def test_the_models_own_queries_are_asked_once(scripts, checkpoints, work, command, monkeypatch):
    arguments = ["--model", checkpoints["smol"], *TINY, *RANDOM, "--steps", 2, "--lam", 1, "--queries", "self"]
    monkeypatch.setattr(scripts.kd, "self_queries", lambda *a: [f"{s}?" for s in SENTENCES])
    assert command(scripts.kd, *arguments).code == 0
    first = torch.load("out/be.pt", weights_only=True)["vector"]
    monkeypatch.setattr(scripts.kd, "self_queries", lambda *a: pytest.fail("asked again"))
    assert command(scripts.kd, *arguments).code == 0 and torch.equal(torch.load("out/be.pt", weights_only=True)["vector"], first)


def test_stage_2_over_its_own_output_starts_where_it_started(scripts, checkpoints, prepared, work, command):
    shutil.copy(prepared / "be.pt", "be.pt")
    arguments = ["--model", checkpoints["smol"], *TINY, "--prompt", "p.txt", "--steps", 3, "--batch", 4, "--answer-tokens", 4, "--lam", 1, "--be", "be.pt", "--out", "be.pt"]
    runs = []
    for _ in range(2):
        assert command(scripts.kd, *arguments).code == 0
        runs.append(torch.load("be.pt", weights_only=True))
    assert torch.equal(runs[0]["start"], torch.load(prepared / "be.pt", weights_only=True)["vector"]) and same(*runs)


@pytest.mark.parametrize("every", [1, 4, 15])
def test_stage_1_saves_as_often_as_it_is_told(every, scripts, checkpoints, prepared, work, command, monkeypatch):
    steps, save = [], scripts.recon.save_artifact
    monkeypatch.setattr(scripts.recon, "save_artifact", lambda path, a: (steps.append((a["step"], a["metrics"]["right"])), save(path, a)))
    command(scripts.recon, "--model", checkpoints["smol"], *TINY, "--prompt", "p.txt", "--steps", 6 if every < 10 else 16, "--save-every", every, "--ae", prepared / "ae.pt")
    assert [s for s, _ in steps] == {1: [1, 2, 3, 4, 5, 6], 4: [4, 6], 15: [15, 16]}[every]
    assert all(0 <= right <= 30 for _, right in steps)


def test_a_dialogue_in_bf16_on_the_untied_qwen(scripts, checkpoints, work, command):
    """A .json prompt: all of its turns become [BE]. bf16 weights, an fp32 vector; the losses fall."""
    turns = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "The capital of France?"}, {"role": "assistant", "content": "Paris."}]
    (work / "d.json").write_text(json.dumps({"messages": turns}))
    model, common = checkpoints["qwen"], ["--model", checkpoints["qwen"], "--dtype", "bf16", "--device", "cpu"]
    assert command(scripts.ae, *common, "--data", "corpus.jsonl", "--steps", 2, "--held-out", 2).code == 0
    assert command(scripts.recon, *common, "--prompt", "d.json", "--steps", 30, "--lr", 0.5).code == 0
    recon = torch.load("out/be.pt", weights_only=True)
    assert recon["history"][-1]["recon"] < recon["history"][0]["recon"] - 0.3 and recon["vector"].dtype == torch.float32
    r = command(scripts.kd, *common, "--prompt", "d.json", "--queries", "p.queries.txt", "--steps", 20, "--eval-every", 5, "--lr", 0.5, "--batch", 4, "--answer-tokens", 6)
    kd = torch.load("out/be.pt", weights_only=True)
    assert r.code == 0 and kd["prompt"]["messages"] == turns
    assert control(kd, "[BE]")["kl"] < control(kd, "random vector")["kl"]
    assert control(kd, "full prompt")["tokens"] - control(kd, "[BE]")["tokens"] > 20
    r = command(scripts.infer, "--dtype", "bf16", "--device", "cpu", "--query", "The capital of Spain?", "--compare", "--max-new-tokens", 4)
    assert r.code == 0 and r.out.count("4 answered") == 3 and str(model) == kd["model"]["name"]


def test_test_queries_are_not_trained_or_chosen_on(scripts, checkpoints, prepared, work, command):
    """A second set of questions changes the last table and nothing else; a question that stands in both counts as a training one."""
    (work / "t.txt").write_text("Where is the light?\nWho has the key to the boat?\n" + (work / "p.queries.txt").read_text().splitlines()[0] + "\n")
    module, arguments = stage(scripts, "kd random", prepared)
    arguments = ["--model", checkpoints["smol"], *TINY, *arguments]
    assert command(module, *arguments, "--out", "a/be.pt").code == 0
    assert command(module, *arguments, "--out", "b/be.pt", "--test-queries", "t.txt").code == 0
    a, b = (torch.load(f"{x}/be.pt", weights_only=True) for x in "ab")
    assert torch.equal(a["vector"], b["vector"]) and a["history"] == b["history"]
    assert control(a, "[BE]")["n"] == 3 and control(b, "[BE]")["n"] == 2 and control(a, "[BE]")["kl"] != control(b, "[BE]")["kl"]


def test_queries_in_each_format(scripts, work):
    (work / "q.txt").write_text("\ufeffWhy?\n\n  How? \nWhy?\n", encoding="utf-8")
    (work / "q.jsonl").write_text('{"question": "Why?", "answer": "x"}\n\n{"query": " How? "}\n{"instruction": "Why?"}\n')
    assert scripts.kd.read_queries("q.txt") == {"Why?": "", "How?": ""}
    assert scripts.kd.read_queries("q.jsonl") == {"Why?": "x", "How?": ""}


def test_the_model_asks_its_own_queries(scripts, smol, work, monkeypatch):
    """The lines of its answers, without numbering, each once; what is no question is left out."""
    model, tokenizer = smol
    text = "1. What is the name of your ship?\n2) How old are you, captain?\n- what is the name of your SHIP?\nI cannot say.\nWhy?\n\"Where did you learn to sail?\""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(scripts.kd, "generate", lambda model, rows, *a, **k: ((i, ids, None) for i in range(len(rows))))
    asked = scripts.kd.self_queries(model, tokenizer, [{"role": "system", "content": PROMPT}], torch.tensor([2]), 3, 0)
    assert asked == ["What is the name of your ship?", "How old are you, captain?", "Where did you learn to sail?"]


def test_a_chat_keeps_its_turns_until_reset(scripts, prepared, work, command, monkeypatch):
    lines = iter(["Who are you?", "", "Who are you?", "/reset", "Who are you?"])

    def typed(prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError
    monkeypatch.setattr("builtins.input", typed)
    r = command(scripts.infer, "--be", prepared / "be.pt", *TINY, "--max-new-tokens", 5)
    context = [int(n) for n in re.findall(r"(\d+) tokens were in context", r.out)]
    assert r.code == 0 and len(context) == 3 and context[0] == context[2] < context[1]


def test_a_chat_takes_bytes_that_are_not_utf_8(prepared, work):
    r = subprocess.run([sys.executable, ROOT / "infer.py", "--be", prepared / "be.pt", *map(str, TINY), "--max-new-tokens", "2"], input=b"caf\xe9?\n", cwd=work, capture_output=True, timeout=300)
    assert r.returncode == 0 and b"tokens were in context" in r.stdout and b"Traceback" not in r.stderr


# --- bad input: exit code 2, one line that says what came and what to do, the old artifact whole

def many_words(n):
    return " ".join(SENTENCES * 40)[:n]


BAD = {                                                                     # case: (script, arguments, files to write, words of the message)
    "prompt missing": ("recon", ["--prompt", "nope.txt"], {}, ["nope.txt", "cannot be read"]),
    "prompt a folder": ("recon", ["--prompt", "out"], {}, ["--prompt out", "text file"]),
    "prompt empty": ("recon", ["--prompt", "e.txt"], {"e.txt": b" \n\n"}, ["e.txt", "empty"]),
    "prompt binary": ("recon", ["--prompt", "b.txt"], {"b.txt": b"abc\0def"}, ["b.txt", "binary"]),
    "prompt not UTF-8": ("kd", ["--prompt", "l.txt"], {"l.txt": "été".encode("latin-1")}, ["l.txt", "UTF-8"]),
    "prompt too long": ("recon", ["--prompt", "long.txt", "--ae", "AE"], {"long.txt": many_words(9000).encode()}, ["at most 960 tokens", "shorten"]),
    "json broken": ("recon", ["--prompt", "j.json"], {"j.json": b"{"}, ["j.json", '"messages"']),
    "json without messages": ("kd", ["--prompt", "j.json"], {"j.json": b'[{"role": "user"}]'}, ["j.json", '"messages"']),
    "json without content": ("kd", ["--prompt", "j.json"], {"j.json": b'{"messages": [{"role": "user"}]}'}, ["j.json", '"content"']),
    "json of no messages": ("kd", ["--prompt", "j.json"], {"j.json": b'{"messages": []}'}, ["j.json", "empty"]),
    "too few queries": ("kd", [*RANDOM, "--queries", "few.txt"], {"few.txt": b"Why?\nHow?\nWho?\n"}, ["found 3", "few.txt", "--batch"]),
    "queries missing": ("kd", [*RANDOM, "--queries", "nope.txt"], {}, ["nope.txt", "cannot be read"]),
    "queries binary": ("kd", [*RANDOM, "--queries", "q.txt"], {"q.txt": b"\xff\xfe\xff"}, ["q.txt", "UTF-8"]),
    "a query row broken": ("kd", [*RANDOM, "--queries", "q.jsonl"], {"q.jsonl": b'{"query": "Why?"}\n\n{"query": "Ho'}, ["q.jsonl, line 3", '"question"']),
    "a query row of numbers": ("kd", [*RANDOM, "--queries", "q.jsonl"], {"q.jsonl": b'{"query": "Why?"}\n{"query": 7}\n'}, ["q.jsonl, line 2"]),
    "corpus missing": ("ae", ["--data", "nope/*.jsonl"], {}, ["nope/*.jsonl", "python data/ae_corpus/prepare.py"]),
    "a corpus row broken": ("ae", ["--data", "c.jsonl"], {"c.jsonl": b'{"text": "one"}\n{"text": "two"}\n{"tex'}, ["c.jsonl, line 3", '"text"']),
    "a corpus row without text": ("ae", ["--data", "c.jsonl"], {"c.jsonl": b'{"text": "one"}\n{"body": "two"}\n'}, ["c.jsonl, line 2", '"text"']),
    "a corpus row with a list": ("ae", ["--data", "c.jsonl"], {"c.jsonl": b'{"text": "one"}\n{"text": ["two"]}\n'}, ["c.jsonl, line 2", '"text"']),
    "corpus not UTF-8": ("ae", ["--data", "c.jsonl"], {"c.jsonl": b'{"text": "one"}\n{"text": "\xe9t\xe9"}\n'}, ["c.jsonl", "UTF-8"]),
    "corpus of short texts": ("ae", ["--data", "c.jsonl"], {"c.jsonl": b'{"text": "one two"}\n' * 50}, ["64 tokens"]),
    "corpus of texts too short to report on": ("ae", ["--data", "c.jsonl", "--min-tokens", "8", "--steps", "1"], {"c.jsonl": b'{"text": "the harbour of Grimmel Bay wakes before the sun does"}\n' * 50}, ["64"]),
    "[BE] missing": ("kd", ["--prompt", "p.txt", "--be", "nope.pt"], {}, ["nope.pt", "python stage1_recon.py --prompt p.txt"]),
    "[BE] truncated": ("kd", ["--prompt", "p.txt", "--be", "CUT"], {}, ["cut.pt", "truncated", "python stage1_recon.py"]),
    "[BE] of another model": ("kd", ["--prompt", "p.txt", "--be", "OTHER"], {}, ["other, d = 48", "python stage1_recon.py"]),
    "[BE] is an [AE]": ("kd", ["--prompt", "p.txt", "--be", "AE"], {}, ["'be'", "'ae'", "python stage1_recon.py"]),
    "[BE] of another prompt": ("kd", ["--prompt", "p2.txt", "--be", "BE"], {"p2.txt": b"You are a cook.", "p2.queries.txt": "\n".join(SENTENCES).encode()}, ["another prompt", "python stage1_recon.py --prompt p2.txt"]),
    "[AE] is a [BE]": ("recon", ["--prompt", "p.txt", "--ae", "BE"], {}, ["'ae'", "'be'", "python stage0_ae.py"]),
    "[AE] missing": ("recon", ["--prompt", "p.txt"], {}, ["no [AE]", "python stage0_ae.py"]),
    "stage 2 resumed from stage 1": ("kd", ["--prompt", "p.txt", "--resume", "--out", "out/be.pt"], {}, ["out/be.pt", "without --resume"]),
    "stage 1 resumed with another k": ("recon", ["--prompt", "p.txt", "--ae", "AE", "--resume", "--k", "2"], {}, ["out/be.pt", "without --resume"]),
    "infer without [BE]": ("infer", ["--query", "Why?", "--be", "nope.pt"], {}, ["nope.pt", "python stage1_recon.py"]),
    "infer with an [AE]": ("infer", ["--query", "Why?", "--be", "AE"], {}, ["'be'", "'ae'"]),
    "infer with another model": ("infer", ["--query", "Why?", "--be", "OTHER", "--model", "MODEL"], {}, ["other, d = 48"]),
    "infer, compare nothing": ("infer", ["--compare"], {}, ["--compare", "--query"]),
    "infer, empty query": ("infer", ["--query", "  "], {}, ["--query is empty"]),
    "infer, no tokens": ("infer", ["--query", "Why?", "--max-new-tokens", "0"], {}, ["--max-new-tokens"]),
    "infer, endless query": ("infer", ["--query", many_words(9000)], {}, ["shorten the question"]),
    "model without a chat template": ("recon", ["--prompt", "p.txt", "--model", "BASE"], {}, ["base", "no chat template"]),
    "no such model": ("recon", ["--prompt", "p.txt", "--model", "./nope"], {}, ["no model in that folder", "./nope", "Llama or Qwen"]),
    "a folder that is no model": ("recon", ["--prompt", "p.txt", "--model", "out"], {}, ["--model out", "Llama or Qwen"]),
    "no default model": ("recon", ["--prompt", "p.txt", "--model", "models/smollm2-135m"], {}, ["python models/prepare.py"]),
}


@pytest.fixture(scope="module")
def base(checkpoints, tmp_path_factory):
    """A copy of the tied Llama whose tokenizer has no chat template."""
    folder = shutil.copytree(checkpoints["smol"], tmp_path_factory.mktemp("base") / "base")
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, scripts, checkpoints, prepared, base, work, command):
    script, arguments, files, words = BAD[case]
    for name, content in files.items():
        (work / name).write_bytes(content)
    (work / "out").mkdir()
    shutil.copy(prepared / "be.pt", work / "out/be.pt")                     # the artifact that must survive
    names = {"AE": prepared / "ae.pt", "BE": prepared / "be.pt", "CUT": prepared / "cut.pt", "OTHER": prepared / "other.pt", "MODEL": checkpoints["smol"], "BASE": base}
    arguments = [names.get(a, a) for a in arguments]
    if "--model" not in arguments and script != "infer":
        arguments += ["--model", checkpoints["smol"]]
    r = command(getattr(scripts, script), *arguments, *TINY)
    assert r.code == 2 and "Traceback" not in r.err
    assert len(said(r.err)) == 1 and said(r.err)[0].startswith(f"{getattr(scripts, script).__name__}.py: ")
    assert all(word in said(r.err)[0] for word in words), said(r.err)
    assert (work / "out/be.pt").read_bytes() == (prepared / "be.pt").read_bytes() and not list(work.glob("out/*.tmp"))


@pytest.mark.parametrize("trust", [False, True])
def test_code_that_a_model_ships_runs_only_if_it_is_trusted(trust, scripts, checkpoints, prepared, work, command, monkeypatch):
    folder = shutil.copytree(checkpoints["smol"], work / "shipped")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(work / 'ran')!r}, 'w').close()\nimport transformers\nclass OwnConfig(transformers.LlamaConfig):\n    model_type = 'own'\n"
                                   "class Own(transformers.LlamaForCausalLM):\n    config_class = OwnConfig\n")
    monkeypatch.setenv("HF_MODULES_CACHE", str(work / "modules"))
    r = command(scripts.recon, "--model", folder, *TINY, "--prompt", "p.txt", "--steps", 1, "--ae", prepared / "ae.pt", *["--trust-remote-code"] * trust)
    assert (work / "ran").exists() == trust
    assert trust or r.code == 2 and len(said(r.err)) == 1 and "shipped" in r.err


@pytest.mark.parametrize("arguments", [["--promt", "p.txt"], ["--steps", "ten"], ["--layout", "inline"], ["--init", "zero"]])
def test_an_unknown_or_ill_typed_option_is_an_error(arguments, scripts, work, command):
    r = command(scripts.kd, "--prompt", "p.txt", *arguments)
    assert r.code == 2 and arguments[0] in said(r.err)[-1] and "Traceback" not in r.err


def test_help_prints_the_docstring_and_every_setting(scripts, command):
    for module in vars(scripts).values():
        r = command(module, "--help")
        assert r.code == 0 and module.__doc__.strip().splitlines()[0] in r.out
        options = re.findall(r'^    add\("(--[\w-]+)"', (ROOT / f"{module.__name__}.py").read_text(), re.M)
        assert len(options) > 5 and all(o in r.out for o in options)


def test_bad_input_as_a_user_sees_it(prepared, tmp_path):
    """The same through real processes: no default model; a truncated artifact; an unknown option."""
    folder = fill(tmp_path / "work")
    for script, arguments, word in [("stage1_recon.py", ["--prompt", "p.txt"], "python models/prepare.py"), ("infer.py", ["--be", prepared / "cut.pt", "--query", "Why?"], "cut.pt"),
                                    ("stage2_kd.py", ["--prompt", "p.txt", "--speed", 3], "--speed")]:
        r = process(script, *arguments, cwd=folder, ok=False)
        assert r.returncode == 2 and "Traceback" not in r.stderr and word in said(r.stderr)[-1] and said(r.stderr)[-1].startswith(script)
        assert len(said(r.stderr)) == 1 or script == "stage2_kd.py"         # argparse prints its usage first


# --- the real default model

@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "models/smollm2-135m/config.json").exists(), reason="no default model here; fetch it with: python models/prepare.py")
def test_the_default_model_learns(tmp_path):
    folder = fill(tmp_path / "work")
    (folder / "q.txt").write_text("How do I cook rice?\nWhat is the capital of France?\nWhy is the sky blue?\nName three fruits.\nWho wrote Hamlet?\nWhat is 7 times 8?\nTell me a joke.\nHow far is the moon?\n")
    p = "You are a pirate. Speak always as a pirate. Say \"ye\" for you and \"aye\" for yes, and end every answer with \"Arrr!\". Never use more than two sentences."
    (folder / "p.txt").write_text(p)
    ae, common = ROOT / "artifacts/ae-smollm2-135m.pt", ["--prompt", folder / "p.txt", "--steps", 12]
    process("stage1_recon.py", *common, "--ae", ae, "--out", folder / "be.pt", cwd=ROOT)
    losses = [row["recon"] for row in torch.load(folder / "be.pt", weights_only=True)["history"]]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.1
    process("stage2_kd.py", *common, "--ae", ae, "--be", folder / "be.pt", "--out", folder / "be.pt", "--queries", folder / "q.txt", "--held-out", 0.5, "--batch", 4,
            "--answer-tokens", 8, "--eval-every", 6, cwd=ROOT)
    kd = torch.load(folder / "be.pt", weights_only=True)
    assert kd["vector"].shape == (1, 576)
    assert control(kd, "[BE]")["kl"] < control(kd, "random vector")["kl"]
