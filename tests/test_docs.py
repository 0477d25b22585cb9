"""What pages, docstrings and comments name is there: files, modules, links and their anchors."""

import ast
import functools
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("lamp_fast", "csrc", "kernels", "benchmarks", "tests", "docs")
SOURCES = (".py", ".md", ".cpp", ".h", ".cu", ".cuh")
FILES = sorted(
    path
    for path in [
        *ROOT.iterdir(),
        *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*")),
    ]
    if path.is_file() and "__pycache__" not in path.parts
)
PAGES = [path for path in FILES if path.suffix == ".md"]
CODE = [path for path in FILES if path.suffix in SOURCES and path not in PAGES]

# What a run, a report or a saved classifier writes; no files of the repository.
WRITTEN = {"table.md", "report.md", "TABLE.md"}

FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
CODE_SPAN = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.M)
ANCHOR = re.compile(r'<a id="([^"]+)">')
# A path that begins in one of our folders, or a source file by its name.
OUR_PATH = re.compile(rf"(?<![\w./~$-])((?:{'|'.join(FOLDERS)})/[\w./*-]*)")
SOURCE_NAME = re.compile(
    r"(?<![\w./*{}<>-])((?:[\w-]+/)*[\w-]+(?:\.py|\.md|\.cpp|\.h|\.cuh?))(?![\w/*-])"
)
DOTTED = re.compile(r"(?<![\w./~-])((?:lamp_fast|benchmarks)(?:\.\w+)+)")


@functools.cache
def words_of(path):
    """What a person wrote to people: a page, or the docstrings and comments of a source file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    if path.suffix != ".py":
        return "\n".join(re.findall(r"//[^\n]*|/\*.*?\*/", text, re.S))
    # A string that is a statement of its own documents what stands around it.
    prose = [
        node.value.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join([*prose, *(each.string for each in tokens if each.type == tokenize.COMMENT)])


def missing_files(words, folder):
    """The files that ``words`` name, from the root, a folder of ours or ``folder``, and are not."""
    ours = {name.rstrip(".") for name in OUR_PATH.findall(words)}
    named = {name for name in SOURCE_NAME.findall(words) if Path(name).name not in WRITTEN}
    names = {path.name for path in FILES}
    starts = {ROOT, ROOT / "lamp_fast", folder}
    return {name for name in ours if not any(ROOT.glob(name))} | {
        name
        for name in named - ours
        if not any((start / name).exists() for start in starts)
        and ("/" in name or name not in names)
    }


def module_file(dotted):
    """The source of a module of ours; None where there is none."""
    parts = dotted.split(".")
    if parts[:2] == ["lamp_fast", "kernels"]:  # lies beside the package, is installed in it
        parts = parts[1:]
    path = ROOT.joinpath(*parts)
    return next(
        (file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None
    )


def missing_names(words):
    """Dotted names that are neither a module nor a word of the module that they begin with."""
    missing = set()
    for dotted in DOTTED.findall(words):
        parts = dotted.split(".")
        if parts[1] in ("_C", "NAME"):  # compiled, and a placeholder
            continue
        length = next(
            n for n in range(len(parts), 0, -1) if n == 1 or module_file(".".join(parts[:n]))
        )
        if length == len(parts):
            continue
        file = module_file(".".join(parts[:length]))
        if file is None or not re.search(rf"\b{parts[length]}\b", file.read_text(encoding="utf-8")):
            missing.add(dotted)
    return missing


def anchors_of(page):
    """The anchors of a Markdown page as GitHub makes them, and its own."""
    text = FENCE.sub("", page)
    anchors = set(ANCHOR.findall(text))
    for heading in HEADING.findall(text):
        kept = re.sub(r"[^\w\- ]", "", LINK.sub(r"\1", heading).lower())
        anchors.add(kept.replace(" ", "-"))
    return anchors


def broken_links(page, folder):
    """Relative links of a Markdown page that lead nowhere; ``folder`` is where it lies."""
    broken = set()
    for target in LINK.findall(CODE_SPAN.sub("", FENCE.sub("", page))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = folder / file if file else None
        if path is not None and not path.exists():
            broken.add(target)
        elif anchor:
            there = page if path is None else path.read_text(encoding="utf-8")
            if anchor not in anchors_of(there):
                broken.add(target)
    return broken


def fenced_block_after(mark, page):
    """The fenced block on the lines right after ``mark``; None where there is none."""
    found = re.search(rf"^{re.escape(mark)}\n```\w*\n(.+?)^```$", page, re.M | re.S)
    return found and found[1]


@pytest.mark.parametrize("path", PAGES + CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_and_modules_exist(path):
    words = words_of(path)
    assert not missing_files(words, path.parent)
    assert not missing_names(words)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert not broken_links(path.read_text(encoding="utf-8"), path.parent)


def test_readme_is_short_and_ci_finds_its_commands():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 150
    for name in ("install", "train", "lint", "test"):
        assert fenced_block_after(f"<!-- ci: {name} -->", page)


def test_readme_shows_the_speeds_of_the_page():
    """A figure that stands in two places is the same in both."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    speed = page.partition("\n## Speed\n")[2].partition("\n## ")[0]
    rows = [line for line in speed.splitlines() if line.startswith("|")]
    assert len(rows) > 2
    assert set(rows) <= set((ROOT / "docs/performance.md").read_text(encoding="utf-8").splitlines())


def test_every_page_is_found_from_readme():
    """A page is one click from README, or two by way of another page."""
    seen, following = set(), {ROOT / "README.md"}
    for _ in range(3):
        seen |= following
        targets = {
            (page.parent / target.partition("#")[0]).resolve()
            for page in following
            for target in LINK.findall(page.read_text(encoding="utf-8"))
        }
        following = {path for path in targets if path.suffix == ".md"} - seen
    assert {path for path in PAGES if path.parent == ROOT / "docs"} <= seen


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("see benchmarks/NOTES.md.", set()),
        ("see benchmarks/NOTE.md.", {"benchmarks/NOTE.md"}),
        ("`csrc/*.cu` and csrc/", set()),
        ("`csrc/*.rs`", {"csrc/*.rs"}),
        ("test_docs.py, data/resample.py", set()),
        ("test_doc.py, data/resampling.py", {"test_doc.py", "data/resampling.py"}),
        ("tests/cuda_on_cpu stands in", set()),
        ("tests/cuda_on_gpu stands in", {"tests/cuda_on_gpu"}),
        ("writes table.md, config.json and ~/.cache/lamp_fast/x", set()),
    ],
)
def test_the_search_for_files_itself(words, missing):
    assert missing_files(words, ROOT / "docs") == missing


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ("python -m lamp_fast.train", set()),
        ("python -m lamp_fast.trains", {"lamp_fast.trains"}),
        (":func:`lamp_fast.ops.retrieve`, lamp_fast.kernels.retrieve", set()),
        (":func:`lamp_fast.ops.retrieves`", {"lamp_fast.ops.retrieves"}),
        ("python -m benchmarks.gpu_report", set()),
        ("python -m benchmarks.gpu_reports", {"benchmarks.gpu_reports"}),
    ],
)
def test_the_search_for_names_itself(words, missing):
    assert missing_names(words) == missing


@pytest.mark.parametrize(
    ("page", "broken"),
    [
        ("[a](mathematics.md#fact-4) ![b](curves.png) [c](https://x.y/z)", set()),
        ("[a](mathematics.md#fact-10)", {"mathematics.md#fact-10"}),
        ("[a](mathematic.md) ![b](curve.png)", {"mathematic.md", "curve.png"}),
        ("# A `b`, c!\n[a](#a-b-c)", set()),
        ("# A\n[a](#b)\n```\n# b\n```", {"#b"}),
        ("`[a](b.md)`", set()),
    ],
)
def test_the_search_for_links_itself(page, broken):
    assert broken_links(page, ROOT / "docs") == broken


def test_the_search_for_ci_blocks_itself():
    assert fenced_block_after("<!-- ci: a -->", "<!-- ci: a -->\n```bash\nx\n```\n") == "x\n"
    assert fenced_block_after("<!-- ci: a -->", "<!-- ci: a -->\n\ntext\n```bash\nx\n```\n") is None
    assert fenced_block_after("<!-- ci: a -->", "<!-- ci: a -->\n") is None


def cites_a_specification(words):
    """Lines that point to a specification instead of a page of this repository."""
    return [line.strip() for line in words.splitlines() if re.search(r"\bSPEC(?:\.md)?\b", line)]


@pytest.mark.parametrize("path", PAGES + CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_mathematics_is_cited_from_our_own_page(path):
    if path != Path(__file__):
        assert not cites_a_specification(words_of(path))


CITATION = re.compile(r"docs/mathematics\.md, (?:fact (\d+)|([A-Z][\w ]+\w))")


def unknown_citations(words):
    """Sections and facts of docs/mathematics.md that ``words`` cite and the page does not have."""
    anchors = anchors_of((ROOT / "docs/mathematics.md").read_text(encoding="utf-8"))
    cited = CITATION.findall(" ".join(words.split()).replace('"', ""))
    wanted = {
        f"fact-{fact}" if fact else section.lower().replace(" ", "-") for fact, section in cited
    }
    return {
        anchor
        for anchor in wanted
        # A section's name may be followed by more words of the sentence.
        if not any(anchor == known or anchor.startswith(f"{known}-") for known in anchors)
    }


@pytest.mark.parametrize("path", PAGES + CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_cited_sections_and_facts_exist(path):
    if path != Path(__file__):
        assert not unknown_citations(words_of(path))


@pytest.mark.parametrize(
    ("words", "cites"),
    [
        ('moves b (SPEC, "New classes")', True),
        ("see SPEC.md", True),
        ("UNSPECIALIZED, SPECIES, ASPECT_RATIO", False),
        ("docs/mathematics.md, Retrieval", False),
    ],
)
def test_the_search_for_a_specification_itself(words, cites):
    assert bool(cites_a_specification(words)) == cites


@pytest.mark.parametrize(
    ("words", "unknown"),
    [
        ("docs/mathematics.md, Load balancing; docs/mathematics.md, fact 9", set()),
        ("docs/mathematics.md,\n    New classes)", set()),
        ("docs/mathematics.md, fact 10", {"fact-10"}),
        ("docs/mathematics.md, Old classes.", {"old-classes"}),
    ],
)
def test_the_search_for_citations_itself(words, unknown):
    assert unknown_citations(words) == unknown
