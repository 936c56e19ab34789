"""eval_rolellm.py: whole runs on a RoleBench of two roles, its scores, and the judge's client against servers on loopback. data/rolellm/prepare.py, without the network."""
import contextlib
import http.server
import importlib.util
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, SENTENCES, load_script

TINY = ["--data", "bench", "--dtype", "fp32", "--device", "cpu", "--max-new-tokens", 6]
STAGES = ["--stage1", "--steps 3 --ae ae.pt", "--stage2", "--steps 2 --batch 4 --answer-tokens 4 --ae ae.pt"]
KEY = "sk-a-secret-0123456789"
ROLES = {"Old Captain": "A captain of few words, who lost his ship to the reef. He says {aye} to everything.", "Dr. T. Baker": "A baker who sells loaves.\nHe writes no price down."}


@pytest.fixture(scope="session")
def role():
    return load_script("eval_rolellm")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working folder with a RoleBench in its own layout, and without a key in the environment."""
    bench = tmp_path / "bench"
    for folder in ("profiles-eng", "instructions-eng", "rolebench-eng/instruction-generalization/role_specific"):
        (bench / folder).mkdir(parents=True)
    (bench / "profiles-eng/desc.json").write_text(json.dumps(ROLES | {"Nobody": "A role without questions."}))
    test = [{"role": r, "question": f" {r}, what is  {n}? ", "generated": [f"It is {n}, friend.", f"{n}"]} for n in ("the reef", "a price", "3") for r in ROLES]
    (bench / "rolebench-eng/instruction-generalization/role_specific/test.jsonl").write_text("".join(json.dumps(t) + "\n" for t in test))
    for r in ROLES:
        (bench / f"instructions-eng/role-specific-{r}.jsonl").write_text("".join(json.dumps({"instruction": f"{r}, {s}?", "answer": "Aye."}) + "\n" for s in SENTENCES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    for name in ("NANOBE_JUDGE_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def in_process(scripts, role, monkeypatch):
    """The stage scripts' command lines, run by their main() in this process, which spares each its imports -> the list of commands run so far."""
    modules, commands = {"stage1_recon.py": scripts.recon, "stage2_kd.py": scripts.kd}, []

    def ended(code):
        return contextlib.nullcontext(SimpleNamespace(wait=lambda: code, terminate=lambda: None))

    def run(command):
        assert command[0] == sys.executable and Path(command[1]).parent == ROOT
        commands.append(command[1:])
        argv, sys.argv = sys.argv, command[1:]
        try:
            modules[Path(command[1]).name].main()
        except SystemExit as e:
            return ended(e.code)
        finally:
            sys.argv = argv
        return ended(0)
    monkeypatch.setattr(role, "subprocess", SimpleNamespace(Popen=run))
    return commands


def save(scripts, path, owner, prompt=None, **more):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    scripts.kd.save_artifact(path, {"kind": "be" if prompt else "ae", "vector": torch.randn(1, 64, generator=torch.Generator().manual_seed(len(str(prompt)))), "layout": "chat", "model": owner,
                                    "stage": "kd", "prompt": {"messages": [{"role": "system", "content": prompt}], "tokens": 99}, "metrics": {}} | more)


@pytest.fixture
def artifacts(scripts, role, work, owner):
    """Artifacts of both roles, from noise: one with stage 2's measures, one without."""
    prompts = {r: role.TEMPLATE.format(role=r, description=" ".join(d.split())) for r, d in ROLES.items()}
    save(scripts, "mine/Old_Captain.pt", owner, prompts["Old Captain"], metrics={"held_out_gap_closed": 0.3, "controls": {
        "full prompt": {"kl": 0.0, "gap_closed": 1.0}, "[BE], 1 vector": {"kl": 0.125, "gap_closed": 0.25}, "no prompt (empty slot)": {"kl": 0.5, "gap_closed": 0.0}}})
    save(scripts, "mine/Dr._T._Baker.pt", owner, prompts["Dr. T. Baker"])
    return ["--artifacts", "mine"]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def result(path="out/rolellm.json"):
    return json.loads(Path(path).read_text())


# --- whole runs

def test_a_whole_run_trains_answers_and_goes_on_where_it_stopped(role, scripts, checkpoints, work, owner, command, in_process, monkeypatch):
    save(scripts, "ae.pt", owner)
    arguments = ["--model", checkpoints["smol"], *TINY, *STAGES]
    r = command(role, *arguments)
    assert r.code == 0, r.err
    assert [Path(c[0]).name for c in in_process] == ["stage1_recon.py", "stage2_kd.py"] * 2
    assert r.out.count("answers: 0 found, 18 made") == 1
    for name in ("Old_Captain", "Dr._T._Baker"):
        be = torch.load(f"out/roles/{name}.pt", weights_only=True)
        assert be["stage"] == "kd" and be["step"] == 2 and be["config"]["answer_tokens"] == 4 and be["metrics"]["controls"]["full prompt"]["n"] == 3     # on the test questions
        assert torch.load(f"out/roles/{name}.recon.pt", weights_only=True)["step"] == 3
        assert Path(f"out/roles/{name}.sh").read_text().count("python stage") == 2
    data = result()
    assert [x["role"] for x in data["roles"]] == list(ROLES) and all(x["n"] == 3 and x["kl"] > 0 and x["win_rate"] is None for x in data["roles"])
    controls = torch.load("out/roles/Old_Captain.pt", weights_only=True)["metrics"]["controls"]
    assert data["roles"][0]["gap_closed"] == controls["[BE], 1 vector"]["gap_closed"]
    answers, table = lines("out/rolellm.answers.jsonl"), Path("out/rolellm.md").read_text()
    assert len(answers) == len({a["key"] for a in answers}) == 18 and {a["condition"] for a in answers} == {"full", "be", "none"}
    assert table in r.out and "| Old Captain | 3 |" in table and "**mean of 2**" in table

    # killed in its 14th answer
    whole = Path("out/rolellm.answers.jsonl").read_bytes()
    Path("out/rolellm.answers.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:13]) + whole.splitlines()[13][:20])
    os.remove("out/rolellm.md")
    r = command(role, *arguments)
    assert "answers: 13 found, 5 made" in r.out and len(in_process) == 4                             # nothing is trained again
    assert sorted(map(str, lines("out/rolellm.answers.jsonl"))) == sorted(map(str, answers))
    assert Path("out/rolellm.md").read_text() == table and result() == data

    # a changed setting is never answered from the file
    monkeypatch.setattr(role, "generate", lambda model, rows, *a: ((i, [5]) for i in range(len(rows))))
    assert "answers: 0 found, 18 made" in command(role, *arguments, "--max-new-tokens", 5).out
    assert "answers: 0 found, 18 made" in command(role, *arguments, "--temperature", 0.7).out
    assert "answers: 18 found, 0 made" in command(role, *arguments).out

    # other stage options are not served by the old artifact
    before = Path("out/roles/Old_Captain.pt").read_bytes()
    r = command(role, "--model", checkpoints["smol"], *TINY, "--stage2", "--steps 9")
    assert r.code == 2 and r.err.count("\n") == 1 and "other commands" in r.err and "--artifacts out/roles" in r.err
    assert Path("out/roles/Old_Captain.pt").read_bytes() == before and len(in_process) == 4


def test_training_that_was_killed_is_resumed(role, scripts, checkpoints, work, owner, command, in_process, monkeypatch):
    arguments = ["--model", checkpoints["smol"], *TINY, "--roles", "Old Captain", "--stage2", "--steps 4 --eval-every 2 --batch 4 --answer-tokens 4 --init=random --lam 1"]
    real, saves = scripts.kd.save_artifact, []
    monkeypatch.setattr(scripts.kd, "save_artifact", lambda path, a: (real(path, a), saves.append(a["step"]), len(saves) == 1 and sys.exit(9)))
    r = command(role, *arguments)
    assert r.code == 2 and "stage2_kd.py ended with exit code 9" in r.err and not Path("out/rolellm.json").exists()
    r = command(role, *arguments)
    assert r.code == 0, r.err
    assert [Path(c[0]).name for c in in_process] == ["stage2_kd.py"] * 2                             # from noise: no stage 1
    assert "--resume" not in in_process[0] and in_process[1][-1] == "--resume" and saves == [2, 4, 4]
    assert result()["roles"][0]["kl"] == torch.load("out/roles/Old_Captain.pt", weights_only=True)["metrics"]["controls"]["[BE], 1 vector"]["kl"]


def test_a_stage_is_told_to_stop_and_not_killed(role, checkpoints, work, command, monkeypatch):
    told = []

    def stop():
        raise SystemExit(130)                                                                        # what ctrl-C does
    monkeypatch.setattr(role, "subprocess", SimpleNamespace(Popen=lambda command: contextlib.nullcontext(SimpleNamespace(wait=stop, terminate=lambda: told.append("SIGTERM")))))
    r = command(role, "--model", checkpoints["smol"], *TINY, "--roles", "Old Captain", "--stage2", "--steps 4 --init=random --lam 1")
    assert r.code == 130 and told == ["SIGTERM"]


def test_the_stages_run_as_processes(role, checkpoints, work, command):
    """The same, with a real child process; and a child that fails is reported by its exit code."""
    arguments = ["--model", checkpoints["smol"], *TINY, "--roles", "Old Captain", "--num-questions", 1, "--stage2"]
    r = command(role, *arguments, "--init random --lam 1 --steps 1 --batch 4 --answer-tokens 2")
    assert r.code == 0, r.err
    data = result()
    assert len(data["roles"]) == 1 and data["roles"][0]["n"] == 1 and data["mean"]["be"]["interval_95"] is None
    assert torch.load("out/roles/Old_Captain.pt", weights_only=True)["metrics"]["controls"]["full prompt"]["n"] == 3         # KL is over all test questions


def test_finished_artifacts_need_no_training(role, checkpoints, artifacts, command, in_process):
    r = command(role, "--model", checkpoints["smol"], *TINY, *artifacts, "--out", "new/x")
    captain, baker = result("new/x.json")["roles"]
    assert r.code == 0 and not in_process and not Path("new/roles").exists()
    assert (captain["kl"], captain["gap_closed"], captain["held_out_gap_closed"]) == (0.125, 0.25, 0.3) and baker["kl"] is None
    assert re.search(r"\| Dr. T. Baker \|.*\| - \| - \| - \| - \| - \|\n", r.out) and "| 0.125 | 0.250 | - |" in r.out
    assert result("new/x.json")["mean"]["kl"] == {"mean": 0.125, "interval_95": None}                # over the roles that have it


# --- the answers

def test_answers_equal_the_plain_forward(role, loaded):
    """Batched over a shared prefix with left padding, and with learned vectors in the prefix: as row by row, without a cache."""
    _, model, tokenizer = loaded
    learned = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)) * 0.1
    turns = [[{"role": "user", "content": q}] for q in ("Why?", "How many apples are left, and what is the capital of France?", "Who sells 120 loaves a day?")]
    stop = torch.tensor([tokenizer.eos_token_id])
    for rows in ([role.layout_ids(tokenizer, "chat", [-1, -2], t) for t in turns], [role.chat_ids(tokenizer, [{"role": "system", "content": SENTENCES[0]}] + t) for t in turns], [[5, 6, 7]], [[5], [9, 8]]):
        said = dict(role.generate(model, rows, learned, stop, 7, 0.0, 1.0, [0] * len(rows)))
        assert sorted(said) == list(range(len(rows)))
        for i, row in enumerate(rows):
            want = []
            for _ in range(7):
                with torch.no_grad():
                    want.append(model(inputs_embeds=role.embed(model, torch.tensor([row + want]), learned)).logits[0, -1].argmax().item())
                if want[-1] == stop:
                    want.pop()
                    break
            assert said[i] == want


def test_an_answer_ends_before_the_stop_token(role, smol):
    model, _ = smol
    free = dict(role.generate(model, [[5, 6, 7], [9]], torch.zeros(1, 64), torch.tensor([-1]), 8, 0.0, 1.0, [0, 0]))
    end = free[0][3]
    cut = dict(role.generate(model, [[5, 6, 7], [9]], torch.zeros(1, 64), torch.tensor([end]), 8, 0.0, 1.0, [0, 0]))
    assert cut[0] == free[0][:free[0].index(end)]
    assert cut[1] == (free[1][:free[1].index(end)] if end in free[1] else free[1])


def test_sampling_draws_from_the_nucleus(role, smol):
    """First tokens of many seeds: their shares are the model's, those outside the nucleus never come, and a row's seed alone decides its sample."""
    model, _ = smol
    row, n = [5, 6, 7], 600
    with torch.no_grad():
        chance = torch.softmax(model(input_ids=torch.tensor([row])).logits[0, -1].float() / 0.5, -1)
    order = chance.argsort(descending=True)
    top_p = (chance[order[:2]].sum() + chance[order[2]] / 2).item()                                  # reached by the third token
    drawn = [said[0] for _, said in role.generate(model, [row] * n, torch.zeros(1, 64), torch.tensor([-1]), 1, 0.5, top_p, list(range(n)))]
    assert set(drawn) == set(order[:3].tolist())
    for token in order[:3]:
        p = (chance[token] / chance[order[:3]].sum()).item()
        assert abs(drawn.count(token) / n - p) < 4 * (p * (1 - p) / n) ** 0.5
    again = dict(role.generate(model, [row, row + [8]], torch.zeros(1, 64), torch.tensor([-1]), 4, 0.5, 0.9, [7, 3]))
    alone = dict(role.generate(model, [row], torch.zeros(1, 64), torch.tensor([-1]), 4, 0.5, 0.9, [7]))
    assert again[0] == alone[0]


# --- the scores

def test_rouge_is_the_longest_common_subsequence(role, checkpoints, artifacts, command, monkeypatch):
    """By hand. References "It is the reef, friend." and "the reef"; the answer "the old reef is it" has "the reef" in common with both: against the second, precision 2/5,
    recall 2/2, F = 4/7, which is the best. Against the full prompt's "the reef is here": "the reef is", precision 3/5, recall 3/4, F = 2/3. Stems are not taken: "reefs" is no "reef"."""
    said = {"full": "the reef is here", "be": "the old reef is it", "none": "reefs"}
    conditions = iter(["full", "be", "none"])
    monkeypatch.setattr(role, "generate", lambda model, rows, *a: [(0, [next(conditions)])])
    real = role.load_frozen

    def load(*a):
        model, tokenizer = real(*a)
        tokenizer.decode = lambda ids, **k: said[ids[0]]
        return model, tokenizer
    monkeypatch.setattr(role, "load_frozen", load)
    r = command(role, "--model", checkpoints["smol"], *TINY, *artifacts, "--num-roles", 1, "--num-questions", 1)
    assert r.code == 0, r.err
    row = result()["roles"][0]
    assert row["role"] == "Old Captain" and row["be"] == pytest.approx(4 / 7) and row["be_teacher"] == pytest.approx(2 / 3)
    assert row["full"] == pytest.approx(2 / 3) and row["full_teacher"] == 1 and row["none"] == row["none_teacher"] == 0
    assert row["retention"] == pytest.approx(6 / 7) == result()["mean"]["retention"]["mean"] and "| 85.7% |" in r.out


def test_the_interval_is_over_roles(role):
    assert role.interval([0.4]) is None and role.interval([0.4] * 5) == pytest.approx([0.4, 0.4])
    low, high = role.interval([0.0, 1.0] * 50)                                                       # a mean of 100 coins: 0.5, give or take 0.098
    assert low == pytest.approx(0.402, abs=0.015) and high == pytest.approx(0.598, abs=0.015)
    rows = [{"full": a, "be": b, "none": 0.0, "be_teacher": 0.0, "none_teacher": 0.0, "kl": None, "gap_closed": None, "win_rate": None} for a, b in [(0.2, 0.1), (0.4, 0.4)]]
    means = role.summarize(rows)
    assert means["retention"][0] == pytest.approx(0.5 / 0.6) and means["retention"][1] == pytest.approx([0.5, 1.0]) and "kl" not in means


@pytest.mark.parametrize("reply, verdict", [
    ("A", "A"), ("b", "B"), (" TIE\n", "TIE"), ("A.", "A"), ("**B**", "B"), ("(A)", "A"), ("[[B]]", "B"), ("\"A\"", "A"), ("`tie`", "TIE"), ("A tie.", "TIE"), ("__TIE__", "TIE"),
    ("Answer: B", "B"), ("**Verdict:** A", "A"), ("My final verdict is: TIE", "TIE"), ("The winner is Actor A!", "A"), ("Option B", "B"), ("Answer A", "A"),
    ("A\n\nIt sounds like the captain.", "A"), ("The first is a pirate.\nB has no voice.\n\nFinal answer: **A**", "A"),
    ("A (the first is better)", "A"), ("B (the second).\n\nThe better answer is: Jack Spar", "B"),
    ("<think>B? No: A is the one. TIE?</think>\nB", "B"), ("it may be A</think>B", "B"),
    ("", None), ("\n", None), ("C", None), ("AB", None), ("A or B", None), ("A, B", None), ("Neither is better.", None), ("Both are equal", None), ("A good question!", None),
    ("Better", None), ("Aye", None), ("A\nB", None), ("A: A\n\nA: B\n\nB: C\n\nC", None), ("<think>A, since", None), ("I think that A is better than B", None), ("Reply: A, B or TIE", None),
    ("untie", None), ("A (or B)", None), ("A, though B is close", None)])
def test_a_verdict_is_read_only_where_it_is_clear(role, reply, verdict):
    assert role.read_verdict(reply) == verdict


# --- the judge

@pytest.fixture
def server():
    """A judge on loopback. server.reply(body) -> (status, text of the reply, or None to hang up); server.seen: (path, Authorization, body, status)."""
    state = SimpleNamespace(seen=[], reply=None)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, text = state.reply(body)
            state.seen.append((self.path, self.headers.get("Authorization"), body, status))
            if text is None:
                return self.connection.shutdown(socket.SHUT_RDWR)
            data = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]} if status == 200 else {"error": text}).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            state.seen.append((self.path, self.headers.get("Authorization"), None, 404))
            self.send_error(404)

        def log_message(self, *a):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    state.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    yield state
    httpd.shutdown()
    httpd.server_close()


def opinion(body):
    """What the judge says of a pair, by its question, which it knows from the answers' file, as a cheat."""
    text = body["messages"][0]["content"]
    a, b = (re.search(f"<{x}>\n(.*)\n</{x}>", text, re.S)[1] for x in "AB")
    said = {x["condition"]: x["answer"] for x in lines("out/rolellm.answers.jsonl") if x["question"] in text}
    assert {a, b} == {said["be"], said["full"]} and a != b
    mine, other = ("A", "B") if a == said["be"] else ("B", "A")
    return {"Old Captain, what is the reef?": f"**{mine}**",                                         # both orders: a win
            "Old Captain, what is a price?": "A",                                                    # whatever stands first: a tie
            "Old Captain, what is 3?": "Hard to say." if mine == "A" else "B",                       # one verdict cannot be read: counted apart
            "Dr. T. Baker, what is the reef?": "TIE", "Dr. T. Baker, what is a price?": f"Verdict: {other}",
            "Dr. T. Baker, what is 3?": "A" if mine == "A" else "tie"}[next(x["question"] for x in lines("out/rolellm.answers.jsonl") if x["question"] in text)]


def everything(folder):
    return b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_the_judge_hears_both_orders_and_is_asked_again(role, checkpoints, artifacts, work, command, server, monkeypatch):
    monkeypatch.setattr(role, "BACKOFF", (0, 0))
    monkeypatch.setenv("NANOBE_JUDGE_KEY", KEY)
    trouble = iter([(429, f"slow down, {KEY}"), (503, "busy")])                                      # the first request; then one connection is lost
    server.reply = lambda body: next(trouble, None) or ((200, None) if len(server.seen) == 4 else (200, opinion(body)))
    arguments = ["--model", checkpoints["smol"], *TINY, *artifacts, "--judge-url", server.url, "--judge-model", "wise-1", "--judge-at-once", 1]
    r = command(role, *arguments)
    assert r.code == 0, r.err
    assert [status for *_, status in server.seen] == [429, 503] + [200] * 13 and r.out.count("again in 0 s") == 3 and "429" in r.out
    assert {(path, auth) for path, auth, *_ in server.seen} == {("/v1/chat/completions", f"Bearer {KEY}")}
    body = server.seen[-1][2]
    assert body["model"] == "wise-1" and body["temperature"] == 0 and body["max_tokens"] == 16 and [m["role"] for m in body["messages"]] == ["user"]
    captain, baker = result()["roles"]
    assert [captain[x] for x in ("W", "T", "L", "unparsable", "win_rate")] == [1, 1, 0, 1, 0.75]
    assert [baker[x] for x in ("W", "T", "L", "unparsable", "win_rate")] == [1, 1, 1, 0, 0.5]
    assert result()["mean"]["win_rate"]["mean"] == 0.625 and "| 2 / 2 / 1 | 1 |" in r.out and "2 of the 3 pairs won or lost are so in both orders" in r.out and "judge: 0 verdicts found, 12 to ask" in r.out
    assert len(lines("out/rolellm.verdicts.jsonl")) == 12 and KEY.encode() not in everything(work) and KEY not in r.out + r.err

    # verdicts are kept: by the judge's name, what it is told and in which order
    seen, table = len(server.seen), Path("out/rolellm.md").read_text()
    r = command(role, *arguments)
    assert "judge: 12 verdicts found, 0 to ask" in r.out and len(server.seen) == seen and Path("out/rolellm.md").read_text() == table
    Path("out/rolellm.verdicts.jsonl").write_bytes(Path("out/rolellm.verdicts.jsonl").read_bytes()[:-9])
    assert "judge: 11 verdicts found, 1 to ask" in command(role, *arguments).out and len(server.seen) == seen + 1
    assert "judge: 0 verdicts found, 12 to ask" in command(role, *arguments, "--judge-model", "wise-2").out

    # without a judge there is no win rate, and no request
    seen = len(server.seen)
    assert command(role, "--model", checkpoints["smol"], *TINY, *artifacts).code == 0
    assert len(server.seen) == seen and result()["roles"][0]["win_rate"] is None and "Judge" not in Path("out/rolellm.md").read_text()


def test_a_judge_that_stays_away_ends_the_run_in_one_line(role, checkpoints, artifacts, work, command, server, monkeypatch):
    monkeypatch.setattr(role, "BACKOFF", (0, 0))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    arguments = ["--model", checkpoints["smol"], *TINY, *artifacts, "--judge-url", f"{server.url}/chat/completions", "--judge-model", "wise-1", "--judge-at-once", 1]
    server.reply = lambda body: (200, "A") if len(server.seen) < 3 else (401, f"wrong key {KEY}")
    r = command(role, *arguments)
    assert r.code == 2 and len(server.seen) == 4 and "401" in r.err and "wrong key (key)" in r.err     # not asked again: it would not help
    assert r.err.splitlines()[-1].startswith("eval_rolellm.py: --judge-url") and "Traceback" not in r.err
    assert len(lines("out/rolellm.verdicts.jsonl")) == 3 and not Path("out/rolellm.md").exists() and KEY.encode() not in everything(work) and KEY not in r.out + r.err
    server.reply = lambda body: (500, "ill")
    r = command(role, *arguments)
    assert r.code == 2 and len(server.seen) == 4 + 3 and "500" in r.err and "3 verdicts found, 9 to ask" in r.out
    server.reply = lambda body: (200, "B")
    assert command(role, *arguments).code == 0 and len(server.seen) == 7 + 9
    assert server.seen[-1][:2] == ("/v1/chat/completions", f"Bearer {KEY}")


def test_the_judges_client(role, server, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    waits = []
    monkeypatch.setattr(role.time, "sleep", waits.append)
    url = f"{server.url}/chat/completions"
    server.reply = lambda body: (200, "TIE") if len(server.seen) == 3 else (502, "")
    assert role.ask_judge(url, {"model": "m"}, "") == "TIE" and waits == [1, 2, 4]
    assert server.seen[0][1] is None                                                                 # no key, no header
    with socket.create_server(("127.0.0.1", 0)) as s:
        free = s.getsockname()[1]
    waits.clear()
    with pytest.raises(RuntimeError, match="no connection"):
        role.ask_judge(f"http://127.0.0.1:{free}/v1", {}, "")
    assert waits == list(role.BACKOFF) == sorted(waits) and len(waits) >= 5
    server.reply = lambda body: (404, "no such model")
    with pytest.raises(RuntimeError, match="404.*no such model"):
        role.ask_judge(url, {}, "")
    server.reply = lambda body: (200, {"not": "a text"})
    with pytest.raises(RuntimeError, match="no chat completion"):
        role.ask_judge(url, {}, "")
    server.reply = lambda body: (200, "")                                                            # a refusal: no text, and no verdict
    assert role.read_verdict(role.ask_judge(url, {}, "")) is None
    server.reply = lambda body: (302, f"{server.url}/elsewhere")
    with pytest.raises(RuntimeError, match="404"):
        role.ask_judge(url, {}, KEY)
    assert server.seen[-2][1] == f"Bearer {KEY}" and server.seen[-1][:2] == ("/v1/elsewhere", None)  # a redirect does not get the key


def test_equal_texts_are_a_tie_and_are_not_sent(role, work, server):
    args = SimpleNamespace(judge_model="m", judge_at_once=1, out="out/x", judge_url=server.url)
    (work / "out").mkdir()
    server.reply = lambda body: pytest.fail("asked")
    roles = {"R": {"description": "d", "test": [("q", ["ref"])]}}
    assert role.judge(args, roles, {("R", c, "q"): "same" for c in ("be", "full")}, server.url, {}, "") == {"R": {"W": 0, "T": 1, "L": 0, "unparsable": 0, "both_orders": 0}}
    assert not server.seen


@pytest.mark.slow
def test_the_judge_on_a_real_server(role, checkpoints, artifacts, work, command):
    """transformers serve with the default model on loopback: real replies, most of which are no clear verdict; then the same from the file, with the server gone."""
    if absent := [m for m in ("fastapi", "uvicorn", "openai", "accelerate") if not importlib.util.find_spec(m)]:
        pytest.skip(f'transformers serve needs {", ".join(absent)}: pip install "transformers[serving]"')
    model = ROOT / "models/smollm2-135m"
    if not (model / "config.json").exists():
        pytest.skip("needs the default model: python models/prepare.py")
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    main = "import sys; from transformers.cli.transformers import main; sys.argv = ['transformers', *sys.argv[1:]]; main()"
    child = subprocess.Popen([sys.executable, "-c", main, "serve", str(model), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert any("Uvicorn running" in line for line in child.stdout), "the server ended before it was up"
        arguments = ["--model", checkpoints["smol"], *TINY, *artifacts, "--num-questions", 1, "--judge-url", f"http://127.0.0.1:{port}/v1", "--judge-model", model]
        r = command(role, *arguments)
        assert r.code == 0, r.err
        data, verdicts = result(), lines("out/rolellm.verdicts.jsonl")
        assert len(verdicts) == 4 and all(isinstance(v["reply"], str) and v["reply"] for v in verdicts)
        for row in data["roles"]:
            assert row["W"] + row["T"] + row["L"] + row["unparsable"] == 1
        r = command(role, *arguments, "--judge-model", "another")                                    # this server serves one model, and says so
        assert r.code == 2 and "400" in r.err
    finally:
        child.terminate()
        child.communicate(timeout=60)
    r = command(role, *arguments)
    assert r.code == 0 and result() == data and "4 verdicts found, 0 to ask" in r.out


# --- a user's mistakes

BAD = {
    "no such folder": (["--data", "nowhere"], ["nowhere", "python data/rolellm/prepare.py"]),
    "no such role": (["--roles", "Jack Sparrow"], ["'Jack Sparrow'", "Old Captain"]),
    "a role without questions": (["--roles", "Nobody"], ["'Nobody'"]),
    "no artifact": (["--artifacts", "none"], ["none/Old_Captain.pt: not there", "--roles 'Old Captain'"]),
    "a judge without a name": (["--judge-url", "http://localhost:1/v1"], ["--judge-model"]),
    "a judge without an address": (["--judge-model", "m"], ["--judge-url"]),
    "no address": (["--judge-url", "file:///etc/passwd", "--judge-model", "m"], ["file:///etc/passwd", "http://"]),
    "no JSON": (["--judge-options", "[1"], ["--judge-options"]),
    "half a quotation": (["--stage2", "--prompt 'x"], ["--stage2"]),
    "more tokens than fit": (["--max-new-tokens", 1000, "--artifacts", "mine"], ["expected at most 24 tokens"]),
    "another model": (["--model", "QWEN", "--artifacts", "mine"], ["another model"]),
    "no top-p": (["--top-p", "1.5"], ["--top-p"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_told_in_one_line(case, role, checkpoints, artifacts, command, in_process):
    extra, words = BAD[case]
    r = command(role, "--model", checkpoints["smol"], *TINY, *[checkpoints["qwen"] if x == "QWEN" else x for x in extra])
    told = [line for line in r.err.replace("\r", "\n").splitlines() if line.strip() and "it/s" not in line and "?it/s" not in line and "answers:" not in line]
    assert r.code == 2 and len(told) == 1 and told[0].startswith("eval_rolellm.py: "), r.err
    assert all(word in told[0] for word in words) and not in_process and not Path("out/rolellm.md").exists()


def test_an_artifact_of_another_prompt_is_refused(role, scripts, checkpoints, artifacts, owner, command):
    save(scripts, "mine/Old_Captain.pt", owner, "You are a parrot.")
    r = command(role, "--model", checkpoints["smol"], *TINY, *artifacts)
    assert r.code == 2 and r.err.count("\n") == 1 and "another prompt" in r.err


def test_a_damaged_results_file_is_refused(role, checkpoints, artifacts, command):
    Path("out").mkdir()
    Path("out/rolellm.answers.jsonl").write_text("no json\n")
    r = command(role, "--model", checkpoints["smol"], *TINY, *artifacts)
    assert r.code == 2 and "out/rolellm.answers.jsonl" in r.err and Path("out/rolellm.answers.jsonl").read_text() == "no json\n"


# --- data/rolellm/prepare.py

def prepare(work, monkeypatch, *arguments):
    """The script itself, in a folder of its own -> exit code."""
    (work / "data/rolellm").mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "data/rolellm/prepare.py", "data/rolellm/prepare.py")
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
    try:
        runpy.run_path("data/rolellm/prepare.py", run_name="__main__")
    except SystemExit as e:
        return e.code
    return 0


def test_prepare_reads_a_folder_or_fetches_one(role, work, monkeypatch, capsys):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    assert prepare(work, monkeypatch, "--from", "bench", "--roles", "Old Captain") == 0
    prompt = (work / "data/rolellm/Old_Captain.txt").read_text()
    assert prompt == role.TEMPLATE.format(role="Old Captain", description=ROLES["Old Captain"]) + "\n"           # the evaluation's prompt is this one
    assert (work / "data/rolellm/Old_Captain.test.txt").read_text().splitlines()[0] == "Old Captain, what is the reef?"
    assert not (work / "data/rolellm/Dr._T._Baker.txt").exists()

    def hub(repo, repo_type, allow_patterns, local_dir):
        assert (repo, repo_type) == ("ZenMoore/RoleBench", "dataset")
        for path in (work / "bench").rglob("*.json*"):
            assert any(path.relative_to(work / "bench").match(pattern) for pattern in allow_patterns)
            (local_dir / path.relative_to(work / "bench")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, local_dir / path.relative_to(work / "bench"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert prepare(work, monkeypatch) == 0
    assert (work / "data/rolellm/Dr._T._Baker.queries.txt").read_text().count("\n") == len(SENTENCES)
    assert list(role.read_roles("data/rolellm/rolebench", [], None)) == list(ROLES)              # where the evaluation looks by default

    def gone(*a, **k):
        raise huggingface_hub.errors.OfflineModeIsEnabled("no network")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
    capsys.readouterr()
    assert prepare(work, monkeypatch) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "no network" in err and "--from" in err
