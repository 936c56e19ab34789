"""Many prompts in one run, several processes, small passes, chats of several turns, measuring only; runs that are told to stop, and steps that are skipped.

What a run is compared with is always the plainer run that it stands for, on the tiny models. Where sums are made in another order the floats differ in
their last bits, and each test says how far; where nothing but the moment of stopping differs, they must not differ at all.
"""
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch

from conftest import CPU, ROOT, SENTENCES
from test_cli import TINY, same

KD = ["--steps", 6, "--eval-every", 2, "--lr", 0.1, "--answer-tokens", 6]
PROMPTS = {"a": "You are the old captain. Answer in two short sentences: 1, 2, 37! Never name your ship.", "b": "Be kind.",
           "c": "You sell bread at the fish market, 120 loaves a day. Write no price down, and ask each one who comes about the harbour, the rice and the rain."}
SLOTS = {"a": (1, "chat"), "b": (3, "chat"), "c": (2, "block")}              # k and layout of their stage-1 artifacts
CLOSE = dict(rtol=1e-5, atol=1e-6)                                            # ten times what was seen: a bit or two of fp32


@pytest.fixture(autouse=True)
def handlers():
    """The scripts set their own for SIGINT and SIGTERM; pytest needs its own back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a corpus of few words and three prompts, of other lengths, with other questions and other numbers of them."""
    words, rng = "the harbour of Grimmel Bay wakes before the sun does".split(), random.Random(0)
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": " ".join(rng.choices(words, k=50))}) + "\n" for _ in range(60)))
    for name, skip in zip("abc", (0, 3, 5)):
        (tmp_path / f"{name}.txt").write_text(PROMPTS[name])
        (tmp_path / f"{name}.queries.txt").write_text("".join(f"{s}?\n" for s in SENTENCES[skip:]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def prepared(owner, scripts, tmp_path_factory):
    """[AE] and a stage-1 [BE] of each prompt for the tied Llama, from noise: enough to start from."""
    folder = tmp_path_factory.mktemp("prepared")
    g = torch.Generator().manual_seed(0)
    scripts.kd.save_artifact(folder / "ae.pt", {"kind": "ae", "vector": torch.randn(1, 64, generator=g) / 10, "model": owner, "layout": "chat"})
    for name, (k, layout) in SLOTS.items():
        messages = [{"role": "system", "content": PROMPTS[name]}]
        prompt = {"sha256": hashlib.sha256(json.dumps(messages).encode()).hexdigest(), "messages": messages, "tokens": 30}
        scripts.kd.save_artifact(folder / f"{name}.pt", {"kind": "be", "stage": "recon", "vector": torch.randn(k, 64, generator=g) / 10, "model": owner, "layout": layout, "prompt": prompt})
    return folder


def load(path):
    return torch.load(path, weights_only=True)


def losses(artifact, name):
    return torch.tensor([row[name] for row in artifact["history"] if name in row], dtype=torch.float64)


def assert_close(a, b, **close):
    """Two artifacts of stage 2: the same run but for the order of its sums."""
    close = close or CLOSE
    assert a["step"] == b["step"] and a["best"]["step"] == b["best"]["step"] and a["prompt"] == b["prompt"] and a["layout"] == b["layout"] and a["vector"].shape == b["vector"].shape
    assert [set(row) for row in a["history"]] == [set(row) for row in b["history"]]
    assert not torch.equal(a["last"], a["start"])                           # it has moved
    for name in ("L_KD", "L_recon", "held-out KL"):
        assert torch.allclose(losses(a, name), losses(b, name), **close), (name, losses(a, name) - losses(b, name))
    for name in ("vector", "last"):
        assert torch.allclose(a[name], b[name], **close), (name, (a[name] - b[name]).abs().max())


# --- many prompts in one run

STARTS = {"distillation alone": ["--init", "random", "--lam", 1, "--k", 2], "with L_recon": ["--init", "random", "--lam", 0.9, "--recon-every", 2],
          "from stage 1": ["--lam", 0.9, "--recon-every", 3, "--micro-batch", 5]}


def start(name, prepared, prompts="abc"):
    """The arguments that begin a run of these prompts in one of the three ways."""
    return ["--ae", prepared / "ae.pt", *STARTS[name], *(["--be", *(prepared / f"{p}.pt" for p in prompts)] if name == "from stage 1" else [])]


@pytest.mark.parametrize("name", STARTS)
def test_prompts_trained_together_are_as_trained_alone(name, scripts, checkpoints, prepared, work, command):
    common = ["--model", checkpoints["smol"], *TINY, *KD]
    r = command(scripts.kd, *common, *start(name, prepared), "--prompt", "a.txt", "b.txt", "c.txt", "--out", "all/a.pt", "all/b.pt", "all/c.pt")
    assert r.code == 0 and r.out.count("no prompt (empty slot)") == 3 and [f"wrote all/{p}.pt" in r.out for p in "abc"] == [True] * 3
    for p in "abc":
        assert command(scripts.kd, *common, *start(name, prepared, p), "--prompt", f"{p}.txt", "--out", f"one/{p}.pt").code == 0
        together, alone = load(f"all/{p}.pt"), load(f"one/{p}.pt")
        assert_close(together, alone)
        assert together["last"].untyped_storage().nbytes() == alone["last"].untyped_storage().nbytes() == 4 * alone["last"].numel()       # no other prompt's vectors in the file
        assert (alone["vector"].shape[0], alone["layout"]) == {"distillation alone": (2, "chat"), "with L_recon": (1, "chat"), "from stage 1": SLOTS[p]}[name]
        assert len(losses(alone, "L_KD")) == 6 and len(losses(alone, "L_recon")) == {"distillation alone": 0, "with L_recon": 3, "from stage 1": 2}[name]


def test_a_run_of_many_prompts_that_is_killed_between_two_saves_is_resumed(scripts, checkpoints, prepared, work, command, monkeypatch):
    """Three prompts are saved one after the other, at steps 2, 4 and 6; the run breaks off when some have been and some have not, also before the first save of the last."""
    common = ["--model", checkpoints["smol"], *TINY, *KD, *start("from stage 1", prepared), "--prompt", "a.txt", "b.txt", "c.txt", "--out"]
    assert command(scripts.kd, *common, *(f"whole/{p}.pt" for p in "abc")).code == 0
    save = scripts.kd.save_artifact
    for saves, steps in {1: [2, 0, 0], 5: [4, 4, 2], 8: [6, 6, 4]}.items():
        broken, left = [f"{saves}/{p}.pt" for p in "abc"], [saves]

        def save_and_die(path, artifact):
            save(path, artifact)
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        with monkeypatch.context() as m:
            m.setattr(scripts.kd, "save_artifact", save_and_die)
            with pytest.raises(KeyboardInterrupt):
                command(scripts.kd, *common, *broken)
        assert [load(path)["step"] if os.path.exists(path) else 0 for path in broken] == steps
        r = command(scripts.kd, *common, *broken, "--resume")
        assert r.code == 0, r.err
        for p in "abc":
            assert_close(load(f"{saves}/{p}.pt"), load(f"whole/{p}.pt"))
            assert scripts.infer.load_artifact(f"{saves}/{p}.pt", "be", None, None, "")["step"] == 6     # whole: its checksum is right


def test_stage_1s_vectors_in_the_places_of_a_killed_run_are_where_it_starts_again(scripts, checkpoints, prepared, work, command, monkeypatch):
    """--be and --out are the same files, as by default: before its first save, a prompt's file is still stage 1's."""
    save, common = scripts.kd.save_artifact, ["--model", checkpoints["smol"], *TINY, *KD, "--lam", 1, "--prompt", "a.txt", "b.txt"]
    for folder in ("whole", "broken"):
        (work / folder).mkdir()
        for p in "ab":
            (work / folder / f"{p}.pt").write_bytes((prepared / f"{p}.pt").read_bytes())
    assert command(scripts.kd, *common, "--out", "whole/a.pt", "whole/b.pt").code == 0

    def save_and_die(path, artifact):
        save(path, artifact)
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(scripts.kd, "save_artifact", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            command(scripts.kd, *common, "--out", "broken/a.pt", "broken/b.pt")
    assert [load(f"broken/{p}.pt")["stage"] for p in "ab"] == ["kd", "recon"]
    assert command(scripts.kd, *common, "--out", "broken/a.pt", "broken/b.pt", "--resume").code == 0
    for p in "ab":
        assert_close(load(f"broken/{p}.pt"), load(f"whole/{p}.pt"))


# --- several processes

RUNS = """
import json, os, runpy, sys, torch
# a start of torchrun costs ten seconds, so it makes several runs, each with a process group and a port of its own
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
rank, stdout = int(os.environ["RANK"]), sys.stdout
if rank > 0:
    sys.stdout = open("rank1.txt", "w")                                     # what a rank above 0 prints must not reach anyone
for port, nan, *arguments in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"], saved, code = str(port), sys.stdout, 0
    script = runpy.run_path(arguments[0])
    main = script["main"]
    token_loss = main.__globals__["token_loss"]
    if nan:                                                                 # the loss of rank 1 is not finite; rank 0 takes long to measure before it saves
        evaluate = main.__globals__["evaluate"]
        main.__globals__["token_loss"] = lambda *a: token_loss(*a) * (float("nan") if rank == 1 else 1)
        main.__globals__["evaluate"] = lambda *a: [evaluate(*a) for _ in range(50 if rank == 0 else 1)][-1]
    sys.argv[:] = arguments
    try:
        main()
    except SystemExit as e:
        code = e.code
    sys.stdout = saved
    there = os.path.exists(arguments[arguments.index("--out") + 1])
    with open(f"rank{rank}.jsonl", "a") as f:
        f.write(json.dumps({"code": code, "there": there}) + "\\n")
    print("----", flush=True)
    if torch.distributed.is_initialized():                                  # a run that ends early, by a mistake
        torch.distributed.destroy_process_group()
"""


def free_ports(n):
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def test_two_processes_are_as_one(scripts, checkpoints, prepared, work, command):
    """Under torchrun (gloo): stage 0, stage 2 with and without L_recon, three prompts, and a run in which one process alone finds its loss not finite."""
    common = ["--model", checkpoints["smol"], *TINY]
    stage0 = ["--data", "corpus.jsonl", "--steps", 6, "--eval-every", 3, "--held-out", 2, "--lr", 0.1, "--accumulate", 4, "--batch", 3]
    runs = {"ae": ("ae", 0, [*stage0]), "kd": ("kd", 0, [*KD, "--lr", 0.02, "--batch", 4, *start("distillation alone", prepared), "--prompt", "a.txt"]),
            "recon": ("kd", 0, [*KD, "--lr", 0.02, "--batch", 4, *start("with L_recon", prepared), "--prompt", "a.txt"]),
            "a": ("kd", 0, [*KD, "--lr", 0.02, *start("from stage 1", prepared), "--prompt", "a.txt", "b.txt", "c.txt"]),
            "bad": ("kd", 1, [*KD, "--eval-every", 3, *start("distillation alone", prepared), "--prompt", "a.txt"])}
    names = {name: ["a", "b", "c"] if name == "a" else [name] for name in runs}
    port, *ports = free_ports(1 + len(runs))
    (work / "runs.py").write_text(RUNS)
    lines = [[p, nan, str(ROOT / f"{getattr(scripts, script).__name__}.py"), *map(str, [*common, *arguments, "--out", *(f"two/{n}.pt" for n in names[name])])]
             for p, (name, (script, nan, arguments)) in zip(ports, runs.items())]
    with subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", "runs.py", json.dumps(lines)],
                          cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        try:
            out, err = p.communicate(timeout=300)
        finally:
            p.terminate()                                                   # after a timeout: killed, it would leave its processes behind; told to stop, it ends them
    assert p.returncode == 0, err
    ends = [[json.loads(line) for line in (work / f"rank{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)]
    assert [e["code"] for e in ends[0]] == [e["code"] for e in ends[1]] == [0, 0, 0, 0, 1]
    assert ends[1][-1]["there"]                                             # no process leaves before the artifact is written: torchrun would end the others
    printed = out.split("----\n")
    assert (work / "rank1.txt").read_text() == "----\n" * len(runs) and len(printed) == len(runs) + 1
    assert printed[0].count("64 tokens, [AE]") == 1 and [text.count("no prompt (empty slot)") for text in printed[1:]] == [1, 1, 3, 0, 0]
    assert sorted(p.name for p in (work / "two").glob("*.pt")) == ["a.pt", "ae.pt", "b.pt", "bad.pt", "c.pt", "kd.pt", "recon.pt"]
    assert load("two/bad.pt")["skipped"] == load("two/bad.pt")["step"] == 3
    for name, (script, nan, arguments) in runs.items():
        if not nan:
            assert command(getattr(scripts, script), *common, *arguments, "--out", *(f"one/{n}.pt" for n in names[name])).code == 0
    for name in ["kd", "recon", "a", "b", "c"]:
        assert_close(load(f"two/{name}.pt"), load(f"one/{name}.pt"))
    bars = re.findall(r"distil: 100%[^\r\n]*L_KD=([\d.]+)", err)
    assert bars[0] == f"{losses(load('two/kd.pt'), 'L_KD')[-1]:.3f}"         # the bar shows the sum over both
    two, one = load("two/ae.pt"), load("one/ae.pt")
    assert [row["step"] for row in two["history"]] == [3, 6] and len(two["report"]) == len(one["report"]) == 3
    for name in ("vector", "last"):
        assert torch.allclose(two[name], one[name], **CLOSE)
    for name in ("train", "held-out"):
        assert torch.allclose(losses(two, name), losses(one, name), **CLOSE)


def test_processes_share_the_passes_of_stage_0_evenly(scripts, work, command, monkeypatch):
    monkeypatch.setattr(scripts.ae, "ranks", lambda: (0, 2))
    r = command(scripts.ae, *TINY, "--accumulate", 3)
    assert r.code == 2 and "--accumulate: expected a multiple of the 2 processes, found 3" in r.err and len(r.err.splitlines()) == 1


# --- small passes

def test_a_step_in_small_passes_is_the_same_step(scripts, checkpoints, prepared, work, command, monkeypatch):
    """--micro-batch 1, 2 and 16; the number of passes is counted, so that the option is not idle."""
    passes, answer_hidden = [], scripts.kd.answer_hidden
    monkeypatch.setattr(scripts.kd, "answer_hidden", lambda model, rows, answers, learned, cache=None: (passes.append(len(rows)) if learned.requires_grad else None, answer_hidden(model, rows, answers, learned, cache))[1])
    for size in (1, 2, 16):
        passes.clear()
        r = command(scripts.kd, "--model", checkpoints["smol"], *TINY, *KD, *start("with L_recon", prepared), "--prompt", "a.txt", "--batch", 8, "--micro-batch", size, "--out", f"{size}/a.pt")
        assert r.code == 0 and passes == [min(size, 8)] * (6 * 8 // min(size, 8))
    for size in (1, 2):
        assert_close(load(f"{size}/a.pt"), load("16/a.pt"))


# --- chats of several turns

@pytest.mark.parametrize("name", ["smol", "llama3"])
def test_later_turns_follow_the_teachers_own_answers(name, scripts, checkpoints, work, command, monkeypatch):
    """Rows of each turn against the whole dialogue written out by hand in the template's words. A token that the teacher likes is made a stop token, so that some answers end with one and some do not."""
    kd, seen, load_frozen, make_examples = scripts.kd, [], scripts.kd.load_frozen, scripts.kd.make_examples
    model, tokenizer = load_frozen(str(checkpoints[name]), CPU, torch.float32, "eager")
    system = {"role": "system", "content": PROMPTS["a"]}
    said = [a for _, a, _ in kd.generate(model, [kd.chat_ids(tokenizer, [system, {"role": "user", "content": f"{s}?"}]) for s in SENTENCES], torch.tensor([-1]), 6)]
    end = max((x for a in said for x in a[1:]), key=lambda x: sum(x in a for a in said if a[0] != x) % len(said))

    def with_stop(*arguments):
        model, tokenizer = load_frozen(*arguments)
        model.generation_config.eos_token_id = [model.generation_config.eos_token_id, end]
        return model, tokenizer
    monkeypatch.setattr(kd, "load_frozen", with_stop)
    monkeypatch.setattr(kd, "make_examples", lambda args, t, *rest: (make_examples(args, t, *rest), seen.append(t)))
    (work / "t.txt").write_text("Where is the light?\nWho has the key to the boat?\n")
    r = command(kd, "--model", checkpoints[name], *TINY, *KD, "--prompt", "a.txt", "--init", "random", "--lam", 1, "--k", 2, "--turns", 3, "--test-queries", "t.txt")
    assert r.code == 0, r.err
    t, n = seen[0], len(SENTENCES) + 2
    user, assistant, over = {"smol": ("<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
                             "llama3": ("<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>")}[name]

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(t.rows) == len(t.full) == len(t.answers) == 3 * n
    stopped = [a[-1] == end for a in t.answers[:2 * n]]
    assert any(stopped) and not all(stopped)
    for i in range(n):
        query = (t.queries + t.test_queries)[i]
        dialogue = [{"role": "user", "content": query}]
        assert t.rows[i] == kd.layout_ids(tokenizer, "chat", [-1, -2], dialogue) and t.full[i] == kd.chat_ids(tokenizer, [system] + dialogue)
        for turn in (1, 2):
            answer, now, before = t.answers[(turn - 1) * n + i], turn * n + i, (turn - 1) * n + i
            answer = answer[:-1] if answer[-1] == end else answer
            assert end not in answer
            follow = kd.FOLLOW_UPS[(i + turn) % len(kd.FOLLOW_UPS)]
            for rows in (t.rows, t.full, t.none):
                assert rows[now] == rows[before] + answer + ids(over + user) + ids(follow) + ids(over + assistant)
            dialogue += [{"role": "assistant", "content": answer}, {"role": "user", "content": follow}]
            assert t.full[now] == kd.chat_ids(tokenizer, [system] + dialogue) and t.rows[now] == kd.layout_ids(tokenizer, "chat", [-1, -2], dialogue)
    # the held-out, training and test queries of a later turn are those of the first
    parts = {"held": [i % n for i in t.held], "train": [i % n for i in t.train], "test": [i % n for part in t.test for i in part]}
    assert all(sorted(part) == sorted(3 * sorted(set(part))) for part in parts.values())
    assert [set(part) for part in parts.values()] == [set(range(3)), set(range(3, n - 2)), {n - 2, n - 1}] and t.n_held == 3
    assert [{i // n for i in part} for part in t.test] == [{0}, {1}, {2}]
    tables = load("out/be.pt")["metrics"]["turns"]
    assert len(tables) == 3 and tables[0] == load("out/be.pt")["metrics"]["controls"] and len({table["full prompt"]["tokens"] for table in tables}) == 3
    for turn, table in enumerate(tables, 1):
        tokens = sum(len(t.answers[i]) for i in t.test[turn - 1])
        assert f"2 test queries, {tokens} answer tokens, turn {turn} of the chat;" in r.out and table["[BE], 2 vectors"]["answer_tokens"] == tokens


# --- measuring only

def rows_of_tables(out):
    """Every number of the printed tables."""
    return re.findall(r"^(full prompt|\[BE\], .*?|no .*?|default .*?|random .*?|prompt cut .*?)  +(-?\d.*)$", out, re.M)


def test_steps_0_measures_a_vector_and_writes_nothing(scripts, checkpoints, prepared, work, command):
    """The trained vector in its own place, and given from elsewhere; two prompts; every number that the training run printed, and no byte of the artifact changed."""
    common = ["--model", checkpoints["smol"], *TINY, "--answer-tokens", 6, "--turns", 2, "--prompt", "a.txt", "c.txt"]
    trained = command(scripts.kd, *common, *KD, "--be", prepared / "a.pt", prepared / "c.pt", "--out", "x/a.pt", "x/c.pt", "--lam", 1)
    tables = rows_of_tables(trained.out)
    assert trained.code == 0 and len(tables) == 4 * 7
    bytes_of = {p: (work / f"x/{p}.pt").read_bytes() for p in "ac"}
    in_place = command(scripts.kd, *common, "--steps", 0, "--be", "x/a.pt", "x/c.pt", "--out", "x/a.pt", "x/c.pt", "--lam", 1)
    assert in_place.code == 0 and rows_of_tables(in_place.out) == tables and "wrote" not in in_place.out
    assert {p: (work / f"x/{p}.pt").read_bytes() for p in "ac"} == bytes_of
    elsewhere = command(scripts.kd, *common, "--steps", 0, "--be", "x/a.pt", "x/c.pt", "--out", "y/a.pt", "y/c.pt", "--lam", 1)
    assert elsewhere.code == 0 and rows_of_tables(elsewhere.out) == tables
    assert {p.name.split("-")[0] for p in (work / "y").iterdir()} == {"teacher", "a.pt.lock", "c.pt.lock"}
    stage_1 = command(scripts.kd, *common, "--steps", 0, "--be", prepared / "a.pt", prepared / "c.pt", "--out", "y/a.pt", "y/c.pt", "--lam", 1)
    changed = [x[0] for x, y in zip(rows_of_tables(stage_1.out), tables) if x != y]
    assert changed == ["[BE], 1 vector"] * 2 + ["[BE], 2 vectors"] * 2      # another vector: another row, and that one only


# --- steps that are not finite, and runs that are told to stop

def stage(scripts, name, prepared):
    """A stage's module, the arguments of a run of 6 steps, the option that says how often it saves, and its calls of token_loss in a step."""
    return {"ae": (scripts.ae, ["--data", "corpus.jsonl", "--steps", 6, "--held-out", 2, "--lr", 0.1, "--accumulate", 2], "--eval-every", 2),
            "recon": (scripts.recon, ["--prompt", "a.txt", "--steps", 6, "--ae", prepared / "ae.pt", "--lr", 0.1], "--save-every", 1),
            "kd": (scripts.kd, [*KD, "--prompt", "a.txt", "--ae", prepared / "ae.pt", "--be", prepared / "a.pt", "--recon-every", 1], "--eval-every", 2)}[name]


def disturb(monkeypatch, module, calls, action):
    """action(hidden, losses) -> losses in the calls of token_loss with these numbers; those that only measure are not counted."""
    token_loss, count = module.token_loss, [0]

    def disturbed(hidden, *rest):
        count[0] += hidden.requires_grad
        losses = token_loss(hidden, *rest)
        return action(hidden, losses) if hidden.requires_grad and count[0] - 1 in calls else losses
    monkeypatch.setattr(module, "token_loss", disturbed)


def bad_loss(hidden, losses):
    return losses * float("nan")


def bad_gradient(hidden, losses):
    """The loss is right; its gradient is not a number."""
    hidden.register_hook(lambda g: g * float("nan"))
    return losses


@pytest.mark.parametrize("name", ["ae", "recon", "kd"])
def test_a_step_that_is_not_finite_is_skipped_and_three_in_a_row_end_the_run(name, scripts, checkpoints, prepared, work, command, monkeypatch):
    module, arguments, every, per = stage(scripts, name, prepared)
    save, saved = module.save_artifact, []

    def run(bad, action, out):
        """Steps `bad` are spoilt in their last call of token_loss -> the outcome, the artifact, and the vector after each step."""
        saved.clear()
        with monkeypatch.context() as m:
            m.setattr(module, "save_artifact", lambda path, a: (save(path, a), saved.append((a["step"], a["last"].clone()))))
            disturb(m, module, {step * per + per - 1 for step in bad}, action)
            r = command(module, "--model", checkpoints["smol"], *TINY, *arguments, every, 1, "--out", out)
        return r, load(out), dict(saved)

    for action in (bad_loss, bad_gradient):
        r, artifact, last = run({1, 3, 4}, action, "some/x.pt")
        assert r.code == 0 and artifact["skipped"] == 3 and artifact["step"] == 6
        assert [step for step in range(2, 7) if torch.equal(last[step], last[step - 1])] == [2, 4, 5]  # step number 1 ends as 2
        assert artifact["vector"].isfinite().all() and artifact["last"].isfinite().all()
        assert (r.out + r.err).count("is not finite; skipped") == 3 and (name != "kd" or "3 steps skipped" in r.out)

        r, artifact, last = run({2, 3, 4}, action, "three/x.pt")
        assert r.code == 1 and artifact["step"] == 5 and artifact["skipped"] == 3
        assert torch.equal(artifact["last"], last[2]) and artifact["vector"].isfinite().all()
        line = r.err.split("\n")[-2]                                       # on a line of its own, behind the bar
        assert line.startswith(f"{module.__name__}.py: steps 2 to 4: ") and "three/x.pt" in line and "--lr" in line and "Traceback" not in r.err
        assert scripts.infer.load_artifact("three/x.pt", artifact["kind"], None, None, "")["step"] == 5
    r, artifact, last = run({0, 1, 2}, bad_loss, "first/x.pt")              # from the very start: the vector is the start vector
    assert r.code == 1 and artifact["step"] == 3 and torch.equal(artifact["vector"], artifact["last"]) and torch.equal(last[1], last[3])


@pytest.mark.parametrize("name", ["ae", "recon", "kd"])
def test_a_run_that_is_told_to_stop_finishes_its_step_and_goes_on_later(name, scripts, checkpoints, prepared, work, command, monkeypatch):
    """SIGTERM in the middle of a step, between two saves; SIGINT in the last step of all. What was stopped and resumed is what was never stopped, to the last bit."""
    module, arguments, every, per = stage(scripts, name, prepared)
    arguments = ["--model", checkpoints["smol"], *TINY, *arguments, every, 3]
    assert command(module, *arguments, "--out", "whole/x.pt").code == 0
    whole = load("whole/x.pt")
    for step, number, code in [(3, signal.SIGTERM, 143), (5, signal.SIGINT, 130)]:
        with monkeypatch.context() as m:
            disturb(m, module, {step * per}, lambda hidden, losses: (os.kill(os.getpid(), number), losses)[1])
            r = command(module, *arguments, "--out", f"{code}/x.pt")
        assert r.code == code and f"stopped after step {step + 1}; go on with --resume" in r.out and "Traceback" not in r.err
        assert load(f"{code}/x.pt")["step"] == step + 1
        assert command(module, *arguments, "--out", f"{code}/x.pt", "--resume").code == 0
        assert same(load(f"{code}/x.pt"), whole)
        assert scripts.infer.load_artifact(f"{code}/x.pt", whole["kind"], None, None, "")["step"] == 6


@pytest.mark.parametrize("name", ["ae", "recon", "kd"])
def test_a_signal_after_the_last_step_leaves_the_report_to_resume(name, scripts, checkpoints, prepared, work, command, monkeypatch):
    """It comes while the last step is being saved: the run ends with its code and without its report, and --resume makes that."""
    module, arguments, every, _ = stage(scripts, name, prepared)
    arguments, save = ["--model", checkpoints["smol"], *TINY, *arguments, every, 3, "--out", "x/x.pt"], module.save_artifact

    def save_and_stop(path, artifact):
        save(path, artifact)
        if artifact.get("step") == 6:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as m:
        m.setattr(module, "save_artifact", save_and_stop)
        r = command(module, *arguments)
    assert r.code == 143 and "--resume" in r.out and "wrote x/x.pt" not in r.out and load("x/x.pt")["step"] == 6
    r = command(module, *arguments, "--resume")
    assert r.code == 0 and "wrote x/x.pt" in r.out, r.err


# --- what does not fit

MANY = ["--prompt", "a.txt", "b.txt", "c.txt"]
BAD = {                                                                     # case: (arguments, words of the message)
    "query too long": (["--prompt", "a.txt", "--queries", "long.txt", "--init", "random", "--lam", 1], ["a.txt", "at most 1018 tokens", "--answer-tokens"]),
    "turns too long": (["--prompt", "a.txt", "--queries", "long.txt", "--init", "random", "--lam", 1, "--turns", 2, "--answer-tokens", 500], ["a.txt", "at most 524 tokens"]),
    "other k": (["--prompt", "a.txt", "--be", "A", "--k", 2], ["--k", "k = 1", "--init random"]),
    "other layout": (["--prompt", "c.txt", "--be", "C", "--layout", "chat"], ["--layout", "layout block", "--init random"]),
    "other k of one of many": ([*MANY, "--be", "A", "B", "C", "--k", 3], ["--k", "a.pt", "k = 1"]),
    "two --out for three": ([*MANY, "--init", "random", "--out", "x.pt", "y.pt"], ["--be, --out", "3 prompts", "0 and 2"]),
    "one --be for three": ([*MANY, "--be", "A"], ["--be, --out", "3 prompts", "1 and 0"]),
    "--be of another of the prompts": ([*MANY, "--be", "A", "C", "B"], ["c.pt", "another prompt", "b.txt"]),
    "one --out for two": (["--prompt", "a.txt", "b.txt", "--init", "random", "--out", "x.pt", "x.pt"], ["--out x.pt"]),
    "nothing to resume": ([*MANY, "--init", "random", "--lam", 1, "--resume"], ["--resume"]),
    "no passes": (["--prompt", "a.txt", "--micro-batch", 0], ["--micro-batch", "from 1"]),
    "no turns": (["--prompt", "a.txt", "--turns", 0], ["--turns", "from 1"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_line_and_exit_code_2(case, scripts, checkpoints, prepared, work, command):
    arguments, words = BAD[case]
    (work / "long.txt").write_text("".join(f"{s}?\n" for s in SENTENCES) + " ".join(SENTENCES * 3) + "?\n")
    names = {p.upper(): prepared / f"{p}.pt" for p in "abc"}
    r = command(scripts.kd, "--model", checkpoints["smol"], *TINY, "--answer-tokens", 6, "--ae", prepared / "ae.pt", *(names.get(a, a) for a in arguments))
    assert r.code == 2 and "Traceback" not in r.err
    lines = [line for line in r.err.replace("\r", "\n").split("\n") if line.strip() and "it/s" not in line and "/s]" not in line]
    assert len(lines) == 1 and lines[0].startswith("stage2_kd.py: ") and all(word in lines[0] for word in words), lines
    assert not list(work.rglob("*.pt")) and not list(work.rglob("*.tmp"))
