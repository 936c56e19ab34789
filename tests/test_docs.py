"""What the documents name is there: files, links, headings, commands and their options."""
import re
import shlex

import pytest

from conftest import ROOT

PAGES = {p.name: p.read_text(encoding="utf-8") for p in sorted(ROOT.glob("*.md"))}
SCRIPTS = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for pattern in ("*.py", "data/*/*.py", "models/*.py", "results/*.py") for p in sorted(ROOT.glob(pattern))}
OWN = re.compile(r"^(out/|data/\w+/[^/]*\.(jsonl|txt)$|models/[^/]+/|\.venv/|be\.json|[a-z]\d?\.)")   # what a reader has or makes: out/be.pt, p.txt, q.jsonl, a model
HOUSE = [".github/workflows/ci.yml", ".pre-commit-config.yaml", "ruff.toml", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"]


def anchor(heading):
    """A heading's link on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def settings(source):
    """Option -> how its line goes on, from a script's table of settings."""
    return dict(re.findall(r'\b(?:add|add_argument)\(\s*"(--[\w-]+)"(.*)', source)) | {"--help": 'action="store_true"'}


def commands(text):
    """The commands `python X.py ...` of a text, out of code blocks and code spans, without their comments -> (script, words)."""
    text = text.replace("\\\n", " ")
    for command in re.findall(r"(?:^|[`\s;])(?:\.venv/bin/)?python3? ((?:[\w/]+/)?\w+\.py\b[^`\n]*)", text):
        command = re.split(r"\s#|\s{3,}->|, then python |;| \(| && |\.$|\.\s", command)[0]
        try:
            yield command.split()[0], shlex.split(command)[1:]
        except ValueError:
            pytest.fail(f"a quote is left open: {command}")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", PAGES[page]):
        if "://" not in link:
            file, _, part = link.partition("#")
            target = ROOT / file if file else ROOT / page
            assert target.exists(), f"{page} links to {file}, which is not there"
            if part:
                headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.M)
                assert part in map(anchor, headings), f"{page} links to #{part}; the headings are {headings}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page):
    text = re.sub(r"https?://\S+", "", PAGES[page])
    named = set(re.findall(r"(?<![\w./*<{-])((?:[\w.-]+/)*[\w.-]+\.(?:py|md|txt|jsonl?|pt|png|toml|cff|ya?ml))\b(?![/*])", text))
    missing = [name for name in named if not OWN.match(name) and not (ROOT / name).exists() and not list(ROOT.glob(f"*/{name}"))]
    assert len(named) > (page == "README.md") * 10 and not missing, f"{page} names {sorted(missing)}"


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_are_there(page):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    named = re.findall(r"(?:^|`)\s*make ([a-z][\w-]*)", PAGES[page], re.M)
    assert set(named) <= set(targets) and (named or page != "README.md")


@pytest.mark.parametrize("where", [*PAGES, *SCRIPTS])
def test_commands_use_options_that_the_script_has(where):
    """In the pages, and in the docstrings, which are the manuals."""
    text = PAGES.get(where) or SCRIPTS[where].split('"""')[1]
    found = list(commands(text))
    assert found or where not in ("README.md", "stage0_ae.py", "stage1_recon.py", "stage2_kd.py", "infer.py")
    for script, words in found:
        assert script in SCRIPTS, f"{where}: there is no {script}"
        known = settings(SCRIPTS[script])
        for i, word in enumerate(words):
            option, equals, value = word.partition("=")
            if option.startswith("--") and " " not in option:
                assert option in known, f"{where}: {script} has no {option}; it has {sorted(known)}"
                following = value or (words[i + 1] if i + 1 < len(words) else "")
                flag = "store_true" in known[option]
                many = 'nargs="*"' in known[option]                            # an option that may stand without a value
                assert many or flag == (not following or following.startswith("--") and " " not in following), f"{where}: {script} {option} {following!r}"
                if choices := re.search(r"choices=\[(\"[^\]]+)\]", known[option]):
                    assert following in re.findall(r'"([^"]*)"', choices[1]), f"{where}: {script} {option} {following!r}"


def test_the_options_of_this_check_are_those_of_help(scripts, command):
    """The regular expression above finds every option that argparse knows, and no other."""
    for module in vars(scripts).values():
        listed = set(re.findall(r"^  (?:-h, )?(--[\w-]+)", command(module, "--help").out, re.M))
        assert listed == set(settings(SCRIPTS[f"{module.__name__}.py"]))


def test_a_wrong_option_would_be_found():
    """This file's own parsing, on commands as the pages have them."""
    text = "Run\n```\npython stage0_ae.py --model $M --batch 16    # python x.py --no\n.venv/bin/python infer.py --query \"a --b\" --compare\n```\nor `python models/prepare.py --gguf FILE --out models/NAME`, and `python a.py`."
    assert list(commands(text)) == [("stage0_ae.py", ["--model", "$M", "--batch", "16"]), ("infer.py", ["--query", "a --b", "--compare"]),
                                    ("models/prepare.py", ["--gguf", "FILE", "--out", "models/NAME"]), ("a.py", [])]


def test_the_citation_names_the_paper_and_its_authors():
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    names = re.findall(r"family-names: (\w+)", text)
    listed = re.search(r"The method is the work of ([^\[]+), \[arXiv 2511\.23271\]", PAGES["README.md"])[1]
    assert names == re.split(r", | and ", listed) and "arXiv:2511.23271" in text and text.startswith("cff-version: 1.2.0\n")


def test_versions_agree():
    versions = {re.search(r'^VERSION = "(.+)"', source, re.M)[1] for source in SCRIPTS.values() if re.search(r'^VERSION = "', source, re.M)}
    cited, logged = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1], re.search(r"^## (\d[\d.]*)", PAGES["CHANGELOG.md"], re.M)[1]
    assert cited == logged and versions == {".".join(cited.split(".")[:2])}


def test_what_a_fresh_checkout_needs_is_there():
    assert not [name for name in HOUSE if not (ROOT / name).exists()]
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = {re.split(r"[><=;]", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")}
    assert wanted <= pinned


def test_the_readme_says_of_the_ablations_what_their_table_says():
    claims, table = PAGES["README.md"].split("| the paper says |")[1].split("\n\n")[0], (ROOT / "results/README.md").read_text(encoding="utf-8")
    figures = re.findall(r"[+-]\d\.\d{3} \([^)]+\)", claims)
    assert len(figures) > 20 and not [x for x in figures if x not in table]
