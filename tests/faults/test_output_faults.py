"""The fault harness over eval_gsm8k.py, eval_rolellm.py and export.py, at every write, in the way of test_faults.py. What they make is there as it was, or as an undisturbed run makes it, or not at all.

A file of rows keeps every whole row that was in it, and a torn last one is cut off by the next run. The stages that eval_rolellm.py starts are harnessed by themselves; here their artifact
is linked into its place. Its judge is a server on loopback.
"""
import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import threading
from types import SimpleNamespace

import pytest
import torch

from conftest import SENTENCES, load_script
from test_cli import TINY
from test_eval_faults import QUESTIONS
from test_export import confident
from test_faults import COUNT, Fault, Gate, finish, launch

pytestmark = pytest.mark.slow
ROLE, DESCRIPTION = "Old Captain", "A captain of few words."
# case: (script, its arguments, more of them for an older run, what it renames onto last)
CASES = {
    "gsm8k": ("eval_gsm8k.py", [*TINY, "--data", ".", "--prompt", "p.json", "--be", "be.pt", "--batch", "2", "--max-new-tokens", "4", "--out", "out/g.jsonl"], ["--max-new-tokens", "3"], "out/g.json"),
    "rolellm": ("eval_rolellm.py", [*TINY, "--data", "bench", "--max-new-tokens", "4", "--stage2", "--init random --lam 1", "--judge-model", "m", "--out", "out/r"], ["--max-new-tokens", "3"], "out/r.json"),
    "export": ("export.py", ["be.pt", "--out", "out/served", "--pieces", "2", "--overwrite"], ["--names", "older"], "out/served"),
    "message": ("export.py", ["be.pt", "--prompt-embeds", "out/be.json", "--overwrite"], [], "out/be.json"),
}


class Judge(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        data = json.dumps({"choices": [{"message": {"content": "A"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *a):
        pass


def shown(folder):
    """What a run made, but for how long it took, the locks and what a killed run left half done: {name: its bytes, the rows of a .jsonl, or the files of a folder}."""
    found = {}
    for path in (folder / "out").iterdir():
        if path.is_dir() and path.name == "roles":
            found |= {f"roles/{p.name}": p.read_bytes() for p in path.iterdir() if p.suffix != ".tmp"}
        elif path.is_dir():
            found[path.name] = frozenset((str(p.relative_to(path)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in path.rglob("*") if p.is_file())
        else:
            data = re.sub(rb'"seconds": [0-9.e-]+', b"", path.read_bytes())
            found[path.name] = frozenset(data.split(b"\n")[:-1]) if path.suffix == ".jsonl" else data
    return {name: value for name, value in found.items() if not name.endswith((".tmp", ".lock"))}


def damage(now, old, new):
    """What is neither as it was nor as an undisturbed run makes it."""
    aside = now.pop("served.tmp.old", None)
    if aside and "served" not in now:
        now["served"] = aside                                               # between the two renames: the next run puts it back
    wrong = []
    for name in {*now, *old}:
        if name.endswith(".jsonl"):
            whole = old.get(name, frozenset()) <= now.get(name, frozenset()) <= new[name]
        else:
            whole = now.get(name) in (old.get(name), new.get(name))
        wrong += [] if whole else [f"{name} is lost"]
    return wrong


@pytest.fixture(scope="module")
def material(checkpoints, scripts, tmp_path_factory):
    """A folder that every run begins in a copy of; and for each case, over nothing and over an older run: the folder as it was, what stands in it, the writes, and what they make."""
    folder = tmp_path_factory.mktemp("outputs")
    (folder / "out").mkdir()
    base = confident(checkpoints["smol"], folder.with_name("confident"), True, 0)
    model, _ = scripts.kd.load_frozen(str(base), torch.device("cpu"), torch.float32, "eager")
    prompts = {"be.pt": "Count the apples.", "role.pt": load_script("eval_rolellm").TEMPLATE.format(role=ROLE, description=DESCRIPTION)}
    table = model.get_input_embeddings().weight
    for name, prompt in prompts.items():
        scripts.kd.save_artifact(folder / name, {
            "kind": "be", "stage": "kd", "vector": table.mean(0) + 5 * table.std(0) * torch.randn(1, 64, generator=torch.Generator().manual_seed(0)), "layout": "chat",
            "model": {"name": str(base), "fingerprint": scripts.kd.fingerprint(model), "d": 64},
            "prompt": {"messages": [{"role": "system", "content": prompt}], "tokens": 8}, "metrics": {"controls": {"[BE], 1 vector": {"kl": 0.1, "gap_closed": 0.9}}}})
    (folder / "p.json").write_text(json.dumps({"messages": [{"role": "system", "content": prompts["be.pt"]}]}))
    (folder / "test.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS[:3]))
    rows = {"profiles-eng/desc.json": {ROLE: DESCRIPTION}, f"instructions-eng/role-specific-{ROLE}.jsonl": {"instruction": SENTENCES[0]},
            "rolebench-eng/instruction-generalization/role_specific/test.jsonl": {"role": ROLE, "question": "What is the reef?", "generated": ["It is the reef."]}}
    for path, row in rows.items():
        (folder / "bench" / path).parent.mkdir(parents=True)
        (folder / "bench" / path).write_text(json.dumps(row) + "\n")

    def stage(command):                                                     # in the fork: the stage's own writes are no concern here
        if not os.path.exists(out := command[command.index("--out") + 1]):
            os.link("role.pt", out)
        return contextlib.nullcontext(SimpleNamespace(wait=lambda: 0, terminate=lambda: None))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made = {}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(subprocess, "Popen", stage)
        m.setenv("NO_PROXY", "*")
        for case, (script, arguments, older, _) in CASES.items():
            arguments = [*arguments, "--model", base, *(["--judge-url", f"http://127.0.0.1:{server.server_port}/v1"] if case == "rolellm" else [])]
            for before in ("nothing there", "an older run there"):
                start = shutil.copytree(folder, folder.with_name(f"{case} {before}"))
                if before == "an older run there":
                    code, _, err = finish(*launch(script, [*arguments, *older], start))
                    assert code == 0, err
                work = shutil.copytree(start, start.with_name(f"{start.name}, done"))
                read, write = os.pipe()                                     # the list of writes, out of the fork
                code, _, err = finish(*launch(script, arguments, work, lambda event, path: os.write(write, f"{event} {path}\n".encode())))
                assert code == 0, err
                os.close(write)
                with open(read) as f:
                    writes = f.read().splitlines()
                made[case, before] = start, arguments, writes, shown(start), shown(work)
        assert made["rolellm", "nothing there"][4]["r.verdicts.jsonl"], "equal answers: the judge was not asked"
        yield made
    server.shutdown()
    server.server_close()


def complaint(script, code, err):
    lines = re.findall(rf"{script}: [^\r\n]+", err)
    if code != 2 or "Traceback" in err or len(lines) != 1 or "could not be" not in lines[0] and "cannot be" not in lines[0]:
        return f"exit code {code}, {len(lines)} lines of its own, the end is: {err.strip()[-160:]}"


@pytest.mark.parametrize("before", ["nothing there", "an older run there"])
@pytest.mark.parametrize("fault", ["kill", "full", "half", "read-only"])
@pytest.mark.parametrize("case", CASES)
def test_at_every_write(material, tmp_path, case, fault, before):
    script, wrong = CASES[case][0], []
    start, arguments, writes, old, new = material[case, before]
    assert any("os.rename" in w and w.endswith(CASES[case][3]) for w in writes)
    for n, write in enumerate(writes):
        if fault in ("full", "half") and not write.startswith("open "):
            continue
        folder, bring = shutil.copytree(start, tmp_path / str(n)), Fault(fault, n)
        code, _, err = finish(*launch(script, arguments, folder, bring))
        assert bring.came[0], f"{write}: this run did not come to it"
        now = shown(folder)
        lost = damage(dict(now), old, new)
        COUNT["faults"] += 1
        COUNT["lost"] += bool(lost)
        wrong += [f"{write}: {x}" for x in lost]
        if fault == "kill":
            assert code == -signal.SIGKILL
            code, _, err = finish(*launch(script, arguments, folder))
            if code or shown(folder) != new:
                wrong.append(f"{write}: killed there, the same command ends with exit code {code} or makes something else: {err[-160:]}")
        elif not (code == 0 and now == new) and (said := complaint(script, code, err)):
            wrong.append(f"{write}: {said}")
        shutil.rmtree(folder)
    assert not wrong, f"{len(wrong)} of {len(writes)} writes\n" + "\n".join(wrong)


class GateAt(Gate):
    def __init__(self, path):
        super().__init__()
        self.path = path

    def __call__(self, event, path):
        super().__call__(event, "out/x.pt" if path == self.path else path)


@pytest.mark.parametrize("case", CASES)
def test_two_runs_on_one_output(material, tmp_path, case):
    """The second is told and stops; the first ends as if it had been alone; and its lock, left behind, holds no one up."""
    script, _, _, last = CASES[case]
    start, arguments, _, old, new = material[case, "an older run there"]
    folder, gate = shutil.copytree(start, tmp_path / "work"), GateAt(last)
    first = launch(script, arguments, folder, gate)
    os.close(gate.reached[1])
    assert os.read(gate.reached[0], 1) == b"!", "the first run did not come to its save"
    before = shown(folder)
    code, _, err = finish(*launch(script, arguments, folder))
    between = shown(folder)
    os.write(gate.open[1], b"!")
    first_code, _, first_err = finish(*first)
    for end in (gate.reached[0], *gate.open):
        os.close(end)
    lost = damage(dict(between), old, new) + damage(shown(folder), old, new)
    COUNT["faults"] += 1
    COUNT["lost"] += bool(lost)
    lines = re.findall(rf"{script}: [^\r\n]+", err)
    assert code == 2 and len(lines) == 1 and "another run" in lines[0] and "Traceback" not in err, (code, err[-300:])
    assert between == before and not lost, "the second run wrote, too"
    assert first_code == 0 and shown(folder) == new, first_err
    code, _, err = finish(*launch(script, arguments, folder))
    assert code == 0 and shown(folder) == new, err


def test_nothing_was_lost():
    print(f"\nfaults tried: {COUNT['faults']}; artifacts lost: {COUNT['lost']}")
    assert COUNT["faults"] and COUNT["lost"] == 0
