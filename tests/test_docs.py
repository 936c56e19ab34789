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
    text, table = PAGES["README.md"].split("**Ablations**")[1].split("**The roles' answers**")[0], (ROOT / "results/README.md").read_text(encoding="utf-8")
    figures = re.findall(r"[+-]\d\.\d{3} \([^)]+\)", text)
    assert len(figures) > 20 and not [x for x in figures if x not in table]
    for line in text.split("| the paper says |")[1].split("\n\n")[0].splitlines()[2:]:
        verdicts = re.findall(r"(holds|cannot be told|does not hold|the prompts disagree): (?:mean|Jack Sparrow) ([+-]\d\.\d{3} \([^)]+\))", line)
        found = [next(x for x in table.splitlines() if f"| {figure} |" in x and x.count("|") == 6) for _, figure in verdicts]
        assert found and not [x for x in re.findall(r"[+-]\d\.\d{3} \([^)]+\)", line) if x not in " ".join(found)]
        assert [{"holds": "holds here", "cannot be told": "cannot tell: the interval holds 0", "does not hold": "does not hold here", "the prompts disagree": "cannot tell: the prompts disagree"}[said]
                for said, _ in verdicts] == [x.split(" | ")[-1].removesuffix(" |") for x in found]

    # the figures of two decimals: gap closed of a prompt's row, with its interval
    rows, lengths = {}, {}
    for section in table.split("\n## ")[1:]:
        prompt, tokens = section.split("\n")[0].partition(",")[::2]
        found = {m[1]: [float(x) for x in m.groups()[1:]] for m in re.finditer(r"^\| ([\w-]+) \| \d+ \+ \d+ \| (\d+) \| (-?[\d.]+) \((-?[\d.]+) to (-?[\d.]+)\)", section, re.M)}
        rows |= {(prompt, row): x for row, x in found.items()}
        lengths |= {tokens.split()[0]: (found.get("length") or found["full"])[1]} if {"length", "full"} & found.keys() else {}
    prompts = {"Jack Sparrow": "Jack_Sparrow", "GSM8K": "gsm8k_8shot", "the support policy": "support"}
    for start, names in [("\nMore vectors", "full k-2 k-4 k-8"), ("\n| most of the weight", "lam-0 lam-10 lam-50 full lam-100")]:
        line = text.split(start)[1].split("\n")[0]
        for prompt, key in prompts.items():
            said = re.findall(r"\d\.\d\d", re.search(rf"([\d., and]+) of {prompt}'s gap", line)[1])
            assert [*map(float, said)] == pytest.approx([rows[key, name][1] for name in names.split()], abs=0.0051)
    texts = [line.split(" | ")[1:] for line in text.split("What else a user might do")[1].splitlines() if re.match(r"\| (?!gap)[^-]", line)]
    for cells, row in zip(texts, ["full", "cut-2", "cut-4", "summary-2", "summary-4", "llmlingua-2", "llmlingua-4"], strict=True):
        for cell, key in zip(cells, prompts.values(), strict=True):
            *said, k = map(float, re.findall(r"-?[\d.]+", cell))
            assert said == pytest.approx(rows[key, row][1:], abs=0.0051) and k == rows[key, row][0]
    said = re.findall(r"([\d,]+) tokens (\d\.\d\d)", text.split("\nBy length")[1].split("\n")[0])
    assert {tokens.replace(",", ""): float(x) for tokens, x in said} == pytest.approx(lengths, abs=0.0051)
