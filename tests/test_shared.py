"""The house: a paragraph that scripts share is the same in each, none imports another, and none is over its size."""
import ast, re
from collections import defaultdict

import pytest

from conftest import ROOT, main, script

BLOCK = re.compile(r"^# --- shared: ([\w ,-]+?) -+\n(.*?)^# --- end shared -+\n", re.S | re.M)
# a script that wants more lines gives some back elsewhere
LINES = {"stage0_ae": 260, "stage1_recon": 240, "stage2_kd": 410, "queries": 130, "infer": 230, "eval_kl": 280,
         "eval_gsm8k": 320, "eval_rolellm": 320, "export": 300}
SCRIPTS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
PYTHON = [p for p in ROOT.rglob("*.py") if not {"results", "tests"} & {*p.relative_to(ROOT).parts[:1]}
          and not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]


def test_every_copy_of_a_shared_block_is_the_same():
    copies = defaultdict(dict)
    for name, source in SCRIPTS.items():
        found = BLOCK.findall(source)
        assert source.count("# --- shared: ") == source.count("# --- end shared") == len(found), name
        for block, body in found:
            assert name not in copies[block], f"{name} has the block {block} twice"
            copies[block][name] = body
    assert {"load_frozen", "embed", "chat_ids", "artifact", "pack"} <= set(copies)
    for block, bodies in copies.items():
        assert len(set(bodies.values())) == 1, f"the shared block {block} differs between {', '.join(bodies)}"
    assert sum(len([*bodies.values()][0].splitlines()) for bodies in copies.values()) <= 190


def test_no_script_imports_another():
    for name, source in SCRIPTS.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not {i.split(".")[0] for i in imported} & (SCRIPTS.keys() | {"tests", "results"}), name


def test_no_script_is_larger_than_its_idea():
    sizes = {name: source.count("\n") for name, source in SCRIPTS.items()}
    assert sizes.keys() == LINES.keys() and not [name for name in LINES if sizes[name] > LINES[name]], sizes
    assert sum(path.read_text(encoding="utf-8").count("\n") for path in PYTHON) <= 3100
    for path in [*PYTHON, *ROOT.glob("tests/**/*.py"), *ROOT.glob("results/*.py"), *ROOT.glob("*.md")]:
        wide = [n for n, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1) if len(line) > 120]
        assert not wide, f"{path}: wider than 120 columns: lines {wide}"


@pytest.mark.parametrize("name", LINES)
def test_help_is_the_docstring_and_every_default(name):
    r = main(name, "--help")
    assert r.code == 0 and script(name).__doc__.strip().splitlines()[0] in r.out
    options = re.findall(r'^    add\("(--[\w-]+)"', SCRIPTS[name], re.M)
    assert len(options) > 3 and all(option in r.out for option in options) and "(default: " in r.out
