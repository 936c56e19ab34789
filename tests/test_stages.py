"""Stages 0, 1 and 2 from arguments to file, on tiny models: what they learn, how they go on after a kill, and that two
processes do the work of one."""
import json, random, re, shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from conftest import (
    PROMPT, SENTENCES, TINY, before, fill, load_tiny, main, opened, plain_greedy, plain_logits, plain_measure, run,
    script)

STAGE0 = ["--data", "corpus.jsonl", "--steps", 12, "--eval-every", 4, "--held-out", 4, "--batch", 2, "--max-tokens", 48,
          "--lr", 0.3]
STAGE1 = ["--ae", "out/ae.pt", "--steps", 40, "--lr", 0.3]
STAGE2 = ["--steps", 12, "--eval-every", 4, "--batch", 4, "--answer-tokens", 6, "--lr", 0.1]


@pytest.fixture(scope="module", params=[("llama3", 3, "p.txt"), ("qwen3", 1, "p.txt"), ("qwen2", 2, "p.json")],
                ids=lambda p: p[0])
def chain(request, checkpoints, tmp_path_factory):
    """[AE], then [BE] of stage 1, then [BE] of stage 2, by their default names; of a dialogue, without [AE]."""
    kind, k, prompt = request.param
    folder, messages = fill(tmp_path_factory.mktemp("chain") / "work"), [{"role": "system", "content": PROMPT}]
    stage1 = ["--prompt", prompt, *STAGE1, "--k", k]
    if prompt == "p.json":
        messages += [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Aye."}]
        (folder / prompt).write_text(json.dumps({"messages": messages}))
        stage1 += ["--ae", "none"]
    model, tokenizer = load_tiny(checkpoints, kind)
    untouched = load_tiny(checkpoints, kind)[0].state_dict()
    jobs, outs = [("stage0_ae", STAGE0), ("stage1_recon", stage1), ("stage2_kd", [*STAGE2, "--prompt", prompt])], []
    for name, arguments in jobs:
        with pytest.MonkeyPatch.context() as m:             # the same model in all stages, so that a change is seen
            m.setattr(script(name), "load_frozen", lambda *_: (model, tokenizer))
            r = main(name, "--model", checkpoints[kind], *arguments, *TINY, cwd=folder)
        assert r.code == 0, r.err
        outs.append(r.out)
    ae, recon, be = (opened(folder / f"out/{name}.pt") for name in ("ae", "recon", "be"))
    return SimpleNamespace(slot=[-1 - i for i in range(k)], messages=messages, ae=ae, recon=recon, be=be, folder=folder,
                           outs=outs, model=model, tokenizer=tokenizer, untouched=untouched)


def test_each_stage_writes_its_artifact_and_names_the_next_command(chain):
    n = len(chain.slot)
    for found, kind, k in [(chain.ae, "ae", 1), (chain.recon, "be", n), (chain.be, "be", n)]:
        assert found["kind"] == kind and found["vector"].shape == (k, 64) and found["vector"].dtype == torch.float32
        assert found["metrics"]["n"] > 0 and found["history"]
        assert found["model"]["fingerprint"] == chain.model.fingerprint
    s = script("stage2_kd").prompt_ids(chain.tokenizer, chain.messages)
    ae = chain.ae["vector"][len(chain.messages) > 1:]       # none for the dialogue
    for found in (chain.recon, chain.be):
        assert found["messages"] == chain.messages
        assert found["tokens"] == len(s) and torch.equal(found["ae"], ae)
    nexts = ["stage1_recon.py .*--ae out/ae.pt", "stage2_kd.py .*--init out/recon.pt", "eval_kl.py --be out/be.pt"]
    for out, command in zip(chain.outs, nexts):
        assert re.search(f"^next: python {command}", out, re.M)
    assert not list(chain.folder.glob("out/*.tmp"))
    for name, w in chain.model.state_dict().items():        # every weight is as it was, to the last bit
        assert torch.equal(w, chain.untouched[name]), name
    assert all(w.grad is None for w in chain.model.parameters())


def test_stage_0_learns_and_reports_the_loss_of_the_vector_it_saved(chain):
    losses = [row["held-out L_AE"] for row in chain.ae["history"] if "held-out L_AE" in row]
    assert len(losses) == 3 and min(losses) < losses[0] and chain.ae["metrics"]["held-out L_AE"] == min(losses)
    ae, tokenizer = script("stage0_ae"), chain.tokenizer
    texts = ae.read_texts(str(chain.folder / "corpus.jsonl"))
    random.Random(0).shuffle(texts)
    words = ae.chat_ids(tokenizer, [{"role": "system", "content": [-1]}, {"role": "user", "content": "?"}])
    end, plain = chain.model.generation_config.eos_token_id[-1], []
    for text in texts[:4]:
        x = ae.text_ids(tokenizer, text)[:48]
        logits = plain_logits(chain.model, words[:words.index(-1)] + x + [-1] + x, chain.ae["vector"])
        plain.append(F.cross_entropy(logits[-len(x) - 1:], torch.tensor(x + [end])).item())
    assert sum(plain) / 4 == pytest.approx(min(losses), abs=1e-4)


def test_stage_1_learns_and_reports_the_loss_of_the_vector_it_saved(chain):
    losses = [row["L_recon"] for row in chain.recon["history"]]
    assert len(losses) == 40 and losses[-1] < losses[0] - 0.2 and chain.recon["metrics"]["L_recon"] == min(losses)
    recon, trigger = script("stage1_recon"), [chain.slot[-1] - 1] * len(chain.recon["ae"])
    s = recon.prompt_ids(chain.tokenizer, chain.recon["messages"])
    words = before(chain.tokenizer, chain.slot, [{"role": "user", "content": "?"}])
    logits = plain_logits(chain.model, words[:words.index(-1)] + chain.slot + trigger + s,
                          torch.cat([chain.recon["vector"], chain.recon["ae"]]))[-len(s) - 1:-1]
    assert F.cross_entropy(logits, torch.tensor(s)).item() == pytest.approx(min(losses), abs=1e-4)
    assert (logits.argmax(-1) == torch.tensor(s)).sum() == chain.recon["metrics"]["right"]


def test_stage_2_reports_the_divergence_of_the_vector_it_saved(chain):
    """On queries that it did not train on: plain greedy teacher, plain student, KL over full logits at tau 1."""
    history, metrics, kd = chain.be["history"], chain.be["metrics"], script("stage2_kd")
    losses = [row["held-out KL"] for row in history if "held-out KL" in row]
    assert len(losses) == 3 and 0 < metrics["held-out KL"] <= min(losses)
    assert [row["step"] for row in history if "L_recon" in row] == [0, 4, 8]
    assert history[0]["L_recon"] == pytest.approx(chain.recon["metrics"]["L_recon"], abs=1e-4)
    chats = chain.be["trained_on"]                          # the held-out ones, which choose the vector, come first
    assert sorted(chat[0]["content"] for chat in chats) == sorted(f"{s}?" for s in SENTENCES)
    held = chats[:metrics["n"]]
    assert len(held) == round(0.15 * len(chats))
    full = [kd.chat_ids(chain.tokenizer, chain.be["messages"] + chat) for chat in held]
    for name, slot in [("held-out KL", chain.slot), ("no prompt", [])]:
        rows = [before(chain.tokenizer, slot, chat) for chat in held]
        kl, _ = plain_measure(chain.model, full, rows, chain.be["vector"], 6)
        assert metrics[name] == pytest.approx(kl, abs=1e-5)


def same(a, b):
    """Two artifacts, or parts of them: every tensor and number is the same, to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "config")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


P = ["--prompt", "p.txt"]
RESUMED = {"stage 0": ("stage0_ae", STAGE0),
           # uphill: the best vector is that of the first step, which only the file has
           "stage 1": ("stage1_recon", [*P, *STAGE1, "--steps", 25, "--k", 2, "--lr", -0.3]),
           "stage 2": ("stage2_kd", [*P, *STAGE2]),
           "stage 2, noise": ("stage2_kd", [*P, *STAGE2, "--init", "noise", "--lam", 1, "--k", 3])}


@pytest.fixture
def whole(case, checkpoints, vectors, work):
    """The script of a case, its arguments, and what a run writes that nothing disturbs."""
    name, arguments = RESUMED[case]
    shutil.copytree(vectors, "out")
    arguments = ["--model", checkpoints["smol"], *TINY, *arguments]
    assert main(name, *arguments, "--out", "whole/x.pt").code == 0
    return name, arguments, opened("whole/x.pt")


@pytest.mark.parametrize("case", RESUMED)
def test_a_killed_run_goes_on_bit_for_bit(case, whole, monkeypatch):
    """Broken off right after its first and, resumed, again after its second save of three."""
    name, arguments, expected = whole
    arguments, module, steps = [*arguments, "--out", "killed/x.pt"], script(name), []
    save = module.save

    def save_and_die(path, **artifact):
        save(path, **artifact)
        if "run" in artifact:
            steps.append(artifact["run"]["step"])
            raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(module, "save", save_and_die)
        for resume in ([], ["--resume"]):
            with pytest.raises(KeyboardInterrupt):
                main(name, *arguments, *resume)
    assert 0 < steps[0] < steps[1] < expected["run"]["step"]
    for _ in range(2):                                      # the second time there is nothing left to do
        assert main(name, *arguments, "--resume").code == 0
        assert same(opened("killed/x.pt"), expected)


def test_stage_2_does_not_go_on_from_another_stage_1(checkpoints, vectors, work):
    shutil.copytree(vectors, "out")
    model = ["--model", checkpoints["smol"], *TINY]
    assert main("stage2_kd", *P, *STAGE2, *model).code == 0
    assert main("stage1_recon", *P, *STAGE1, *model, "--steps", 2, "--out", "out/recon.pt").code == 0
    r = main("stage2_kd", *P, *STAGE2, *model, "--resume")
    assert r.code == 2 and "or no --resume" in r.err, r.err


def test_a_step_of_stage_2_has_the_gradient_of_the_whole_loss(checkpoints, vectors, work, smol, monkeypatch):
    """L = (1 - lambda) L_recon + lambda L_KD, by autograd over plain logits. One step of plain gradient descent shows
    it; as it goes uphill, the vector kept is the one before it."""
    shutil.copytree(vectors, "out")
    monkeypatch.setattr(torch.optim, "AdamW", lambda params, **settings: torch.optim.SGD(params))
    (work / "q.txt").write_text("Why?\nWho are you?\nHow is it made?\nWhere?\n")         # one is held out
    step = ["--queries", "q.txt", "--batch", 3, "--steps", 1, "--lr", -1, "--lam", 0.7, "--tau", 1.5]
    r = main("stage2_kd", *P, *STAGE2, *step, "--model", checkpoints["smol"], *TINY)
    assert r.code == 0, r.err
    (model, tokenizer), start, be = smol, opened("out/recon.pt"), opened("out/be.pt")
    vector, kl, tokens = start["vector"].clone().requires_grad_(), 0, 0
    for chat in be["trained_on"][1:]:
        full, fed = script("infer").chat_ids(tokenizer, start["messages"] + chat), before(tokenizer, [-1], chat)
        said = plain_greedy(model, full, vector, 6)
        teacher, student = (F.log_softmax(plain_logits(model, ids + said, vector)[-len(said) - 1:-1] / 1.5, -1)
                            for ids in (full, fed))
        kl += F.kl_div(student, teacher, log_target=True, reduction="sum")
        tokens += len(said)
    s = script("infer").text_ids(tokenizer, PROMPT)
    logits = plain_logits(model, fed[:fed.index(-1)] + [-1, -2] + s, torch.cat([vector, start["ae"]]))
    recon = F.cross_entropy(logits[-len(s) - 1:-1], torch.tensor(s))
    (0.3 * 4 * recon + 0.7 * 1.5 ** 2 * kl / tokens).backward()         # L_recon every fourth step, so four times
    assert vector.grad.norm() > 0.1 and torch.equal(be["vector"], start["vector"])
    torch.testing.assert_close(be["run"]["be"], start["vector"] + 0.1 * vector.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["stage 0", "stage 2"])
def test_two_processes_equal_one(case, whole, work):
    (work / "fp32.py").write_text(
        "import runpy, sys, torch\n"
        "torch.cpu._is_avx512_bf16_supported = torch.cpu._is_amx_tile_supported = lambda: False\n"
        "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    name, arguments, one = whole
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "fp32.py"]
    out, two = run(name, *arguments, "--out", "two/x.pt", cwd=work, launcher=launcher), opened("two/x.pt")
    torch.testing.assert_close(two["vector"], one["vector"], atol=1e-4, rtol=1e-4)
    assert out.count("wrote two/x.pt") == 1                 # rank 0 alone speaks
    assert [row.keys() for row in two["history"]] == [row.keys() for row in one["history"]]
    for a, b in zip(one["history"], two["history"]):        # the whole batch's loss, not a share of it
        assert all(b[key] == pytest.approx(a[key], abs=1e-4) for key in a)
