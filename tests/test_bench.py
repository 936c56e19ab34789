"""bench.py: the figures' own arithmetic, what it measures against, and a whole run on a tiny model.

The whole run calls the stage scripts' main() in this process, by the very command lines that bench.py would start; the slow test starts them.
"""
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import CPU, ROOT, SENTENCES, load_script

NONE = torch.zeros(1, 64)
ITEMS = {"1", "2", "3", "4", "5", "6", "7"}
QUICK = ["--quick", "--prompt", "p.txt", "--prompts", "p.txt", "turns.json", "--out", "r/b.json", "--naive-lr", "0.03", "0.1", "--dtype", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def bench():
    return load_script("bench")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a prompt, its questions and a prompt of several turns."""
    (tmp_path / "p.txt").write_text("You are the old captain. Answer in two short sentences: 1, 2, 37! Never name your ship.")
    (tmp_path / "p.queries.txt").write_text("".join(f"{s}?\n" for s in SENTENCES))
    (tmp_path / "turns.json").write_text(json.dumps({"messages": [{"role": r, "content": s} for r, s in zip(["user", "assistant"] * 2, SENTENCES)]}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- the arithmetic

def test_pairs_alternate_and_a_row_holds_medians_ranges_n_and_the_ratio_pair_by_pair(bench, capsys):
    calls, speed, memory = [], {"a": [99.0, 10.0, 30.0, 20.0], "b": [1.0, 5.0, 10.0, 20.0]}, {"a": [9.0, 1.0, 2.0, 4.0], "b": [9.0, 4.0, 4.0, 4.0]}

    def run(name):
        calls.append(name)
        n = calls.count(name) - 1
        return speed[name][n], memory[name][n]
    high, low = bench.pairs([("x", "tokens a second", "high"), ("y", "bytes", "low")], {"a": lambda: run("a"), "b": lambda: run("b")}, 3, warm=1, batch=7)
    assert "".join(calls) == "baabbaab"
    assert high["what"] == "x" and high["a"] == {"median": 20, "min": 10, "max": 30, "n": 3} and high["b"]["median"] == 10
    assert high["ratio"] == {"median": 2, "min": 1, "max": 3, "n": 3} and high["batch"] == low["batch"] == 7
    assert low["unit"] == "bytes" and low["ratio"] == {"median": 2, "min": 1, "max": 4, "n": 3}
    assert "ratio 2 (1 to 3), n = 3" in capsys.readouterr().out


def test_pieces_of_a_prompt_are_its_words_in_order(bench):
    words = [f"w{i}" for i in range(50)]
    pieces = bench.cut([{"content": " ".join(words[:20])}, {"content": " ".join(words[20:])}], 16)
    assert len(pieces) == 16 and " ".join(pieces).split() == words and {len(p.split()) for p in pieces} == {3, 4}
    assert all(p.split() for p in bench.cut([{"content": "two words"}], 4))


def test_figures_are_written_whole_or_not_at_all(bench, tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    bench.save(path, b'{"items": {"1": 2}}')
    before = path.read_bytes()
    monkeypatch.setattr(bench.os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SystemExit):
        bench.save(path, b'{"items": {}}')
    assert path.read_bytes() == before and json.loads(before) == {"items": {"1": 2}} and list(tmp_path.iterdir()) == [path]


# --- what is measured against

def test_full_logits_and_chunks_are_the_same_loss_and_gradient(bench):
    rng = torch.Generator().manual_seed(0)
    hidden, target, weight = (torch.randn(n, 16, generator=rng) for n in (200, 200, 90))
    a, b = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    row, entropy = bench.soft_target(weight, target, 2.0)
    chunks, full = bench.token_loss(a, weight, row, 2.0) - entropy, bench.full_loss(b @ weight.T, target @ weight.T, 2.0)
    chunks.mean().backward()
    full.mean().backward()
    assert torch.allclose(chunks, full, atol=1e-4, rtol=1e-4) and torch.allclose(a.grad, b.grad, atol=1e-6, rtol=1e-4) and full.mean() > 0.1


def test_a_step_in_passes_has_the_gradient_of_one_pass_with_full_logits(bench, smol):
    model, tokenizer = smol
    rows = [bench.layout_ids(tokenizer, "chat", [-1], [{"role": "user", "content": s}]) for s in SENTENCES[:5]]
    rng = torch.Generator().manual_seed(0)
    answers = [torch.randint(400, (n,), generator=rng).tolist() for n in (3, 9, 5, 1, 7)]
    hidden, grads = [torch.randn(len(a), 64, generator=rng) for a in answers], []
    for micro, full in ((2, False), (5, True)):
        be = torch.nn.Parameter(bench.noise(model, 0))
        targets = hidden if full else [bench.soft_target(model.get_output_embeddings().weight, h, 2.0) for h in hidden]
        bench.kd_step(model, rows, answers, targets, be, torch.optim.SGD([be], lr=1.0), micro, full)
        grads.append(be.grad)
        assert torch.allclose(bench.noise(model, 0) - be.detach(), be.grad, atol=1e-5) and be.grad.norm() > 1e-3
    assert torch.allclose(*grads, atol=1e-5 * grads[0].abs().max())


def test_plain_decoding_in_a_batch_is_what_the_shared_prefix_gives(bench, loaded):
    _, model, tokenizer = loaded
    rows = [bench.chat_ids(tokenizer, [{"role": "system", "content": SENTENCES[0]}, {"role": "user", "content": s}]) for s in SENTENCES[1:5]]
    assert len({len(r) for r in rows}) > 1
    said = torch.cat([ids for ids, _ in bench.plain(model, rows, NONE, 6)], 1).tolist()
    shared = {i: answer for i, answer, _ in bench.generate(model, rows, torch.tensor([], dtype=torch.int64), 6)}
    assert said == [shared[i] for i in range(4)]


def test_the_naive_recipe_trains_a_bf16_vector_and_nothing_else(bench, smol):
    model, tokenizer = smol
    turns = [[{"role": "user", "content": s}] for s in SENTENCES[1:4]]
    full, rows = [bench.chat_ids(tokenizer, [{"role": "system", "content": SENTENCES[0]}] + t) for t in turns], [bench.layout_ids(tokenizer, "chat", [-1], t) for t in turns]
    stop, start = torch.tensor([tokenizer.eos_token_id]), bench.noise(model, 0)
    held = {i: (answer, hidden) for i, answer, hidden in bench.generate(model, full, stop, 6)}
    answers, hidden = [held[i][0] for i in range(3)], [held[i][1] for i in range(3)]

    def kl(vector):
        total, _, tokens = bench.evaluate(model, rows, answers, hidden, vector).sum(0).tolist()
        return total / tokens
    steps = bench.naive(model, full, rows, stop, 6, start, 0.1, 0, 2.0)
    vector = [next(steps) for _ in range(20)][-1]
    assert torch.equal(vector, vector.bfloat16().float()) and kl(vector) < 0.9 * kl(start)
    assert not any(w.requires_grad or w.grad is not None for w in model.parameters())


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux counts the peak of a process there")
def test_peak_memory_is_what_a_run_held_at_once(bench):
    def run(pieces, _kept=()):
        for _ in range(pieces):
            _kept = torch.ones(2 ** 24)                                                              # 64 MB; at most two live at once
    (one, peak), (four, _) = bench.peak_bytes(CPU, lambda: run(1)), bench.peak_bytes(CPU, lambda: run(4))
    assert 60e6 < one < 90e6 < peak and 120e6 < four < 160e6


# --- command lines

def test_every_save_is_seen_and_a_run_that_is_left_ends(bench, tmp_path):
    out = tmp_path / "x.pt"
    code = f"import os, pathlib, signal; p = pathlib.Path({str(out)!r}); (p.parent / 'pid').write_text(str(os.getpid())); p.write_text('a'); signal.pause()"
    running = bench.saves(["-c", code], out)
    assert next(running) > 0
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, 0)
    running.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert len(list(bench.saves(["-c", f"open({str(tmp_path / 'y.pt')!r}, 'w')"], tmp_path / "y.pt"))) == 1      # that of a run which ends at once


def test_a_run_that_fails_is_told_with_its_last_words(bench, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        list(bench.saves(["-c", "import sys; print('about to go'); sys.exit('no such prompt')"], tmp_path / "x.pt"))
    assert e.value.code == 1 and "no such prompt" in capsys.readouterr().err


@pytest.fixture
def in_process(bench, scripts, monkeypatch):
    """bench.saves without processes: the script's main() in this one, which stops for a moment at each save, as it seems from outside."""
    modules = {"stage0_ae.py": scripts.ae, "stage2_kd.py": scripts.kd}
    commands = []

    def saves(command, out, threads=0):
        command = [str(x) for x in command]
        commands.append(command)
        at = next(i for i, x in enumerate(command) if Path(x).name in modules)
        module, seen = modules[Path(command[at]).name], []
        write = module.save_artifact

        def save_artifact(path, artifact):
            write(path, artifact)
            if str(path) == str(out):
                seen.append((time.perf_counter(), Path(path).read_bytes()))
        began = time.perf_counter()
        with monkeypatch.context() as m, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            m.setattr(sys, "argv", command[at:])
            m.setattr(module, "save_artifact", save_artifact)
            module.main()
        for stamp, data in seen:
            Path(out).write_bytes(data)
            yield stamp - began
    monkeypatch.setattr(bench, "saves", saves)
    return commands


def check(results):
    """Every item, well formed: machine, settings, and rows with n, a median within its range and finite ratios."""
    assert set(results["items"]) == ITEMS
    for item in results["items"].values():
        assert {"cpu", "threads", "torch", "dtype", "device"} <= set(item["machine"]) and item["settings"]["quick"] and item["rows"]
        for row in item["rows"]:
            if "ratio" in row and "better" in row:
                for figure in (v for v in row.values() if isinstance(v, dict) and "median" in v):
                    assert 0 < figure["min"] <= figure["median"] <= figure["max"] < float("inf") and figure["n"] >= 1
    *curves, last = results["items"]["1"]["rows"]
    assert [r["what"] for r in curves] == ["ours", "naive, lr 0.03", "naive, lr 0.1"] and sum(r.get("chosen", False) for r in curves) == 1
    for r in curves:
        gaps = [p[2] for p in r["curve"]]
        assert gaps == sorted(gaps) and r["reached"] == (gaps[-1] >= last["target"]) and r["step"] % 5 == 0
    assert curves[0]["held_out_gap_closed_here"] == pytest.approx(curves[0]["gap_closed"], abs=0.02)      # the two sides measure the same thing
    kv = [r for r in results["items"]["5"]["rows"] if "in the cache" in r]
    assert len(kv) == 2
    assert [r["in the cache"] for r in kv] == [2 * 2 * 2 * 16 * 4 * (r["prompt_tokens"] - 1) for r in kv]      # K and V, layers, heads, head size, fp32
    assert [r["b"] for r in results["items"]["6"]["rows"]] == [1, 4]
    step, peak = results["items"]["3"]["rows"]
    assert all(step[name]["max"] < peak[name]["min"] for name in ("passes of 2, loss in chunks", "one pass of 4, full logits"))
    assert [r["prompt_tokens"] for r in results["items"]["4"]["rows"]] == sorted(r["prompt_tokens"] for r in results["items"]["4"]["rows"])


def test_a_whole_run_writes_every_item_and_a_second_one_measures_nothing(bench, in_process, command, checkpoints, folder):
    line = [*QUICK, "--model", checkpoints["smol"]]
    first = command(bench, *line, "--only", 2, 4, 5)
    assert first.code == 0, first.err
    assert set(json.loads(Path("r/b.json").read_text())["items"]) == {"2", "4", "5"} and not in_process
    second = command(bench, *line)
    assert second.code == 0, second.err
    assert second.out.count("in r/b.json already") == 3 and "item 2, step throughput\n" not in second.out and "item 1, time to quality\n" in second.out
    text = Path("r/b.json").read_text()
    check(json.loads(text))
    assert {p.name for p in Path("r").iterdir()} == {"b.json", "b.json.lock", "b-quality.png", "b-ttft.png"}
    assert all(Path("r", name).read_bytes()[:4] == b"\x89PNG" for name in ("b-quality.png", "b-ttft.png"))
    assert sum("torch.distributed.run" in c for c in in_process) == 1
    many = [c for c in in_process if any(x.endswith("few.txt") for x in c)]
    assert [c.index("--out") - c.index("--prompt") - 1 for c in many] == [1, 1, 1, 1, 1, 4]

    ran = len(in_process)
    third = command(bench, *line)
    assert third.code == 0 and len(in_process) == ran and Path("r/b.json").read_text() == text
    assert command(bench, *line, "--only", 2, "--again").code == 0 and Path("r/b.json").read_text() != text

    changed = json.loads(text)
    changed["items"]["2"]["machine"]["cpu"] = "another"
    Path("r/b.json").write_text(json.dumps(changed))
    other = command(bench, *line)
    assert other.code == 2 and "another machine" in other.err and json.loads(Path("r/b.json").read_text()) == changed


def test_a_rate_counts_the_tokens_that_ran(bench, folder, command, checkpoints, monkeypatch):
    """The bare body's rows are rounded up to one length: it is credited with all that it read."""
    ran, load = {}, bench.load_frozen
    Path("p.queries.txt").write_text("Why so?\n" + Path("p.queries.txt").read_text())                # rows of several lengths

    def counted(*a):
        model, tokenizer = load(*a)
        model.get_decoder().register_forward_pre_hook(lambda module, args, kwargs: ran.update(fed=next(iter(kwargs.values())).shape[:2].numel()), with_kwargs=True)
        return model, tokenizer
    monkeypatch.setattr(bench, "load_frozen", counted)
    monkeypatch.setattr(bench, "rate", lambda device, one: (one(), ran["fed"]))
    monkeypatch.setattr(bench, "pairs", lambda heads, arms, *a, tokens, **k: [{name: [*arm(), tokens] for name, arm in arms.items()}])
    assert command(bench, *QUICK, "--model", checkpoints["smol"], "--only", 2).code == 0
    row, = json.loads(Path("r/b.json").read_text())["items"]["2"]["rows"]
    (said, fed, tokens), (ours, _, same) = row["bare body"], row["stage 2 step"]
    assert said == fed > tokens == same == ours


@pytest.mark.parametrize("arguments, file, word", [
    (["--only", "9"], None, "--only"),
    (["--repeats", "0"], None, "--repeats"),
    (["--prompt", "none.txt"], None, "none.txt"),
    (["--prompt", "turns.json"], None, "turns.queries.txt"),
    ([], "not json", "figures of an earlier run"),
    ([], '{"items": {"1": 5}}', "figures of an earlier run"),
    (["--model", "nowhere"], None, "--model nowhere"),
])
def test_mistakes_are_told_in_one_line(bench, command, checkpoints, folder, arguments, file, word):
    if file:
        Path("r").mkdir()
        Path("r/b.json").write_text(file)
    r = command(bench, *QUICK, "--model", checkpoints["smol"], *([] if "--only" in arguments else ["--only", 2]), *arguments)
    assert r.code == 2 and word in r.err and len(r.err.strip().splitlines()) == 1
    assert (Path("r/b.json").read_text() if Path("r/b.json").exists() else None) == file


@pytest.mark.slow
def test_the_command_line_itself_with_its_processes(checkpoints, folder):
    r = subprocess.run([sys.executable, str(ROOT / "bench.py"), *QUICK, "--model", str(checkpoints["smol"])], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    check(json.loads(Path("r/b.json").read_text()))
