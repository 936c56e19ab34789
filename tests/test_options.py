"""Options that change what is learned (gold answers, hard labels, no [AE]) or how much memory it takes, against the plain computation they stand for."""
import json

import pytest
import torch
import torch.nn.functional as F

from conftest import CPU, SENTENCES
from test_cli import fill
from test_scale import CLOSE, KD, TINY, assert_close, load, losses, prepared, start  # noqa: F401 (a fixture)

GOLD = [{"question": f"{s}?", "answer": "No" if i % 2 else " ".join(s.split()[::-1])} for i, s in enumerate(SENTENCES)]      # short ones that end, long ones that are cut


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(fill(tmp_path / "work"))
    (tmp_path / "work/a.txt").write_text("You are the old captain. Answer in two short sentences: 1, 2, 37! Never name your ship.")
    (tmp_path / "work/gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOLD))
    return tmp_path / "work"


def first_loss(scripts, folder, artifact, targets):
    """The loss of a run's first step in plain PyTorch. targets: query -> (answer ids, teacher's logits (T, V) or None for hard labels), tau 2."""
    model, tokenizer = scripts.kd.load_frozen(str(folder), CPU, torch.float32, "eager")
    total, count = 0.0, 0
    for query, (answer, teacher) in targets.items():
        row = scripts.kd.layout_ids(tokenizer, "chat", [-1], [{"role": "user", "content": query}])
        with torch.no_grad():
            z = model(inputs_embeds=scripts.kd.embed(model, torch.tensor([row + answer[:-1]]), artifact["start"])).logits[0, len(row) - 1:]
        total += F.cross_entropy(z, torch.tensor(answer), reduction="sum").item() if teacher is None else 4 * F.kl_div(
            (z / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), log_target=True, reduction="sum").item()
        count += len(answer)
    return total / count


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("answers", ["gold", "teacher"])
def test_what_stage_2_learns_from(answers, hard, scripts, checkpoints, work, command, monkeypatch):
    """Prompt tuning and distillation, along gold answers and the teacher's own: the first step's loss, recomputed. All training queries are in one batch."""
    seen, make_examples = [], scripts.kd.make_examples
    monkeypatch.setattr(scripts.kd, "make_examples", lambda args, t, *rest: (make_examples(args, t, *rest), seen.append(t)))
    n = len(SENTENCES) - 3
    r = command(scripts.kd, "--model", checkpoints["smol"], *TINY, "--prompt", "a.txt", "--queries", "gold.jsonl", "--init", "random", "--lam", 1, "--steps", 2, "--batch", n,
                "--answer-tokens", 6, "--answers", answers, *["--hard"] * hard)
    assert r.code == 0, r.err
    t, artifact = seen[0], load("out/be.pt")
    model, tokenizer = scripts.kd.load_frozen(str(checkpoints["smol"]), CPU, torch.float32, "eager")
    gold, targets = {row["question"]: row["answer"] for row in GOLD}, {}
    for i in t.train:
        query, answer = t.queries[i], t.answers[i]
        if answers == "gold":
            words = tokenizer(gold[query], add_special_tokens=False)["input_ids"]
            assert answer == (words + [model.generation_config.eos_token_id])[:6]
        full = scripts.kd.chat_ids(tokenizer, [{"role": "system", "content": (work / "a.txt").read_text()}, {"role": "user", "content": query}])
        with torch.no_grad():
            z = model(torch.tensor([full + answer[:-1]])).logits[0, len(full) - 1:]
        targets[query] = answer, None if hard else z
    assert len(targets) == n
    assert answers == "teacher" or len({a[-1] == model.generation_config.eos_token_id for a, _ in targets.values()}) == 2
    assert losses(artifact, "L_CE" if hard else "L_KD")[0].item() == pytest.approx(first_loss(scripts, checkpoints["smol"], artifact, targets), rel=2e-2 if not hard else 1e-4)     # the teacher's states are kept in bf16
    assert len({len(t.answers[i]) for i in t.held}) >= 1 and all(t.answers[i][:2] != tokenizer(gold[t.queries[i]], add_special_tokens=False)["input_ids"][:2] for i in t.held)


def test_gold_answers_that_are_not_there(scripts, checkpoints, work, command):
    (work / "some.jsonl").write_text("".join(json.dumps(row if i else {"question": "Why?"}) + "\n" for i, row in enumerate(GOLD)))
    for queries in ("some.jsonl", "p.queries.txt", "self"):
        r = command(scripts.kd, "--model", checkpoints["smol"], *TINY, "--prompt", "a.txt", "--queries", queries, "--init", "random", "--lam", 1, "--answers", "gold")
        assert r.code == 2 and queries in r.err and '"answer"' in r.err and len(r.err.splitlines()) == 1, r.err


def test_a_memory_token_has_no_trigger(scripts, checkpoints, work, command):
    """Stage 1 with --ae none: the loss of [BE] s_1 ... s_m, recomputed; stage 2 goes on from it with the same L_recon."""
    r = command(scripts.recon, "--model", checkpoints["smol"], *TINY, "--prompt", "a.txt", "--steps", 20, "--lr", 0.5, "--ae", "none")
    assert r.code == 0 and "[AE]:" not in r.out and r.out.rstrip().endswith(" --ae none"), r.err              # the next command
    artifact = load("out/be.pt")
    model, tokenizer = scripts.recon.load_frozen(str(checkpoints["smol"]), CPU, torch.float32, "eager")
    s = scripts.recon.prompt_ids(tokenizer, artifact["prompt"]["messages"], "chat", 1024)
    opening = scripts.recon.layout_ids(tokenizer, "chat", [-1], [{"role": "user", "content": "?"}])
    opening = opening[:opening.index(-1) + 1]
    with torch.no_grad():
        z = model(inputs_embeds=scripts.recon.embed(model, torch.tensor([opening + s]), artifact["vector"])).logits[0, len(opening) - 1:-1]
    assert F.cross_entropy(z, torch.tensor(s)).item() == pytest.approx(artifact["metrics"]["recon"], abs=1e-4)
    r = command(scripts.kd, "--model", checkpoints["smol"], *TINY, *KD, "--prompt", "a.txt", "--queries", "p.queries.txt", "--ae", "none", "--out", "out/kd.pt", "--be", "out/be.pt")
    assert r.code == 0 and losses(load("out/kd.pt"), "L_recon")[0].item() == pytest.approx(artifact["metrics"]["recon"], abs=1e-4)
    assert load("out/kd.pt")["ae"].shape == (0, 64)


def test_both_stages_have_one_trigger(scripts, checkpoints, prepared, work, command):  # noqa: F811
    r = command(scripts.recon, "--model", checkpoints["smol"], *TINY, "--prompt", "a.txt", "--steps", 2, "--ae", "none")
    assert r.code == 0, r.err
    before = load("out/be.pt")
    stage2 = ["--model", checkpoints["smol"], *TINY, *KD, "--prompt", "a.txt", "--queries", "p.queries.txt"]
    r = command(scripts.kd, *stage2, "--ae", prepared / "ae.pt")
    assert r.code == 2 and "another [AE]" in r.err and len(r.err.splitlines()) == 1, r.err
    assert torch.equal(load("out/be.pt")["last"], before["last"])
    assert command(scripts.kd, *stage2, "--ae", "none", "--out", "out/kd.pt", "--be", "out/be.pt").code == 0
    r = command(scripts.kd, *stage2, "--ae", prepared / "ae.pt", "--out", "out/more.pt", "--be", "out/kd.pt")   # stage 2 hands it on
    assert r.code == 2 and "another [AE]" in r.err, r.err
    assert command(scripts.kd, *stage2, "--ae", prepared / "ae.pt", "--be", "out/kd.pt", "--steps", 0).code == 0
    assert command(scripts.kd, *stage2, "--ae", prepared / "ae.pt", "--lam", 1).code == 0                       # no L_recon, so no trigger


def test_a_vector_that_training_makes_worse_is_kept_as_it_started(scripts, checkpoints, work, command, monkeypatch):
    evaluate, calls = scripts.kd.evaluate, []
    monkeypatch.setattr(scripts.kd, "evaluate", lambda *a: (calls.append(1), evaluate(*a) + torch.tensor([100.0 * len(calls), 0, 0]))[1])
    r = command(scripts.kd, "--model", checkpoints["smol"], *TINY, *KD, "--prompt", "a.txt", "--queries", "p.queries.txt", "--init", "random", "--lam", 1)
    artifact = load("out/be.pt")
    assert r.code == 0 and artifact["best"]["step"] == 0 and torch.equal(artifact["vector"], artifact["start"]) and not torch.equal(artifact["last"], artifact["start"]), r.err


def test_a_glob_takes_no_question_file_for_a_prompt(scripts, checkpoints, work, command):
    for name in "ab":
        (work / f"{name}.txt").write_text(f"You are captain {name}. Answer briefly.")
        (work / f"{name}.queries.txt").write_text((work / "p.queries.txt").read_text())
    (work / "a.test.txt").write_text("Where is the harbour?")
    found = ["a.queries.txt", "a.test.txt", "a.txt", "b.queries.txt", "b.txt"]
    r = command(scripts.kd, "--model", checkpoints["smol"], *TINY, *KD, "--prompt", *found, "--init", "random", "--lam", 1)
    assert r.code == 0 and sorted(p.name for p in (work / "out").glob("*.be.pt")) == ["a.be.pt", "b.be.pt"], r.err
    (work / "x").mkdir()
    (work / "x/a.txt").write_text("You are another.")
    r = command(scripts.kd, "--model", checkpoints["smol"], *TINY, *KD, "--prompt", "a.txt", "x/a.txt", "--init", "random", "--lam", 1)
    assert r.code == 2 and "x/a.txt" in r.err and "--out" in r.err and len(r.err.splitlines()) == 1, r.err


def test_a_gold_answer_ends_the_turn_not_the_text(scripts, checkpoints, work, command, monkeypatch):
    """Of several stop tokens (Llama 3 names the end of the text first), a whole gold answer ends with the tokenizer's own."""
    seen, make_examples, load_frozen = [], scripts.kd.make_examples, scripts.kd.load_frozen

    def two_ends(*arguments):
        model, tokenizer = load_frozen(*arguments)
        model.generation_config.eos_token_id = [3, tokenizer.eos_token_id]
        return model, tokenizer
    monkeypatch.setattr(scripts.kd, "load_frozen", two_ends)
    monkeypatch.setattr(scripts.kd, "make_examples", lambda args, t, model, tokenizer, *rest: (make_examples(args, t, model, tokenizer, *rest), seen.append((t, tokenizer.eos_token_id))))
    r = command(scripts.kd, "--model", checkpoints["smol"], *TINY, *KD, "--prompt", "a.txt", "--queries", "gold.jsonl", "--init", "random", "--lam", 1, "--answers", "gold", "--hard", "--answer-tokens", 6)
    assert r.code == 0, r.err
    (t, end), = seen
    assert end != 3 and {t.answers[i][-1] for i in t.train if t.gold[t.queries[i]] == "No"} == {end}


def test_checkpointing_changes_memory_only(scripts, checkpoints, prepared, work, command, monkeypatch):  # noqa: F811
    """The same vectors; and the layers did run again in the backward pass."""
    counts = {}
    for name, more in {"plain": [], "again": ["--checkpointing"]}.items():
        load_frozen = scripts.kd.load_frozen

        def counted(*arguments):
            model, tokenizer = load_frozen(*arguments)
            model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *a: counts.__setitem__(name, counts.get(name, 0) + 1))
            return model, tokenizer
        with monkeypatch.context() as m:
            m.setattr(scripts.kd, "load_frozen", counted)
            r = command(scripts.kd, "--model", checkpoints["smol"], *TINY, *KD, *start("with L_recon", prepared), "--prompt", "a.txt", "--queries", "p.queries.txt", "--out", f"{name}/a.pt", *more)
            assert r.code == 0, r.err
        r = command(scripts.recon, "--model", checkpoints["smol"], *TINY, "--ae", prepared / "ae.pt", "--prompt", "a.txt", "--steps", 5, "--out", f"{name}/r.pt", *more)
        assert r.code == 0, r.err
    assert counts["again"] > counts["plain"] + 6
    assert_close(load("again/a.pt"), load("plain/a.pt"))
    assert torch.allclose(load("again/r.pt")["vector"], load("plain/r.pt")["vector"], **CLOSE)


def test_a_device_map_on_one_device_changes_nothing(scripts, checkpoints, work, command):
    """All there is to see without two GPUs: the model that accelerate places gives the same vector, to the last bit."""
    for name, more in {"plain": [], "map": ["--device-map", "auto"]}.items():
        r = command(scripts.kd, "--model", checkpoints["smol"], *TINY, *KD, "--prompt", "a.txt", "--queries", "p.queries.txt", "--init", "random", "--lam", 1, "--out", f"{name}/a.pt", *more)
        assert r.code == 0, r.err
    assert torch.equal(load("map/a.pt")["vector"], load("plain/a.pt")["vector"])


def test_the_learning_rate_follows_the_scale_of_the_embedding_table(scripts, checkpoints, work, command, tmp_path):
    """The first step of AdamW is as long as its rate: in a model with a table of an eighth, [BE] moves an eighth as far in it."""
    model, tokenizer = scripts.kd.load_frozen(str(checkpoints["qwen"]), CPU, torch.float32, "eager")
    rates = {}
    for name, scale in {"plain": 1, "small": 1 / 8}.items():
        model.get_input_embeddings().weight *= scale
        model.save_pretrained(tmp_path / name), tokenizer.save_pretrained(tmp_path / name)
        for module, more in {scripts.recon: ["--ae", "none"], scripts.kd: [*KD[-2:], "--queries", "p.queries.txt", "--init", "random", "--lam", 1]}.items():
            r = command(module, "--model", tmp_path / name, *TINY, "--prompt", "a.txt", "--steps", 1, "--out", f"{name}/{module.__name__}.pt", *more)
            assert r.code == 0, r.err
            a = load(f"{name}/{module.__name__}.pt")
            assert a["step"] == 1 and (module is scripts.recon or (a["last"] - a["start"]).abs().max().item() == pytest.approx(a["config"]["lr"] / 10, rel=1e-2))     # warm-up: a tenth
            rates[module.__name__, name] = a["config"]["lr"]
        model.get_input_embeddings().weight /= scale
    std = model.get_input_embeddings().weight.std().item()
    assert {key: rate / std for key, rate in rates.items()} == pytest.approx({("stage1_recon", "plain"): 0.22, ("stage1_recon", "small"): 0.22 / 8, ("stage2_kd", "plain"): 0.9, ("stage2_kd", "small"): 0.9 / 8}, rel=0.06)


def test_targets_come_back_from_disk_as_they_were_made(scripts, checkpoints, work, command, monkeypatch):
    """A query a step, two epochs: each target is used twice, the second time read back, and is the teacher's."""
    kd, used, seen, token_loss, make_examples = scripts.kd, [], [], scripts.kd.token_loss, scripts.kd.make_examples
    monkeypatch.setattr(kd, "token_loss", lambda hidden, weight, target, tau: (used.append((target, weight)), token_loss(hidden, weight, target, tau))[1])
    monkeypatch.setattr(kd, "make_examples", lambda args, t, *rest: (make_examples(args, t, *rest), seen.append(t)))
    n = len((work / "p.queries.txt").read_text().splitlines())
    n -= max(1, round(0.15 * n))
    r = command(kd, "--model", checkpoints["smol"], *TINY, *KD, "--prompt", "a.txt", "--queries", "p.queries.txt", "--init", "random", "--lam", 1, "--batch", 1, "--steps", 2 * n)
    assert r.code == 0 and len(used) == 2 * n and len(seen[0].train) == n, r.err
    expected = [kd.soft_target(used[0][1], seen[0].teacher_hidden[i].to(torch.float32), 2.0)[0] for i in seen[0].train]
    for epoch in (used[:n], used[n:]):
        assert sorted(next(i for i, e in enumerate(expected) if e.shape == t.shape and torch.equal(e, t)) for t, _ in epoch) == list(range(n))
    assert not [p for p in (work / "out").iterdir() if not p.name.startswith(("be.", "teacher-"))]
