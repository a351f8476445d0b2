"""Shipped text is plain technical English (docs/style.md): the commonest lapses are errors here."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("tdabench", "plugins", "docs")
LOOSE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
# Notes are diaries; the style guide and this list quote what they forbid.
NOT_SHIPPED = ("docs/notes/", "docs/style.md")

RATES = (
    "example|query|method|layer|batch|unit|group|seed|row|line|task|retraining|step|token|target|"
    "benchmark|number|score|text|corpus|worker|checkpoint|side|block|parameter|node|core|event|"
    "plan|model|shard|cell|segment|phase|call|process|record|pass|second|thread|round|term"
)
PATTERNS = {  # what is wrong: (pattern, examples that it must find, examples that it must not)
    "write 'per', not 'a' ('bytes per example')": (
        r"\b(?:(?:bytes|seconds|ms|milliseconds|retrainings|dimensions|floats|megabytes|MB|GB|kB)"
        r"|(?:[Oo]ne|[Aa]n?|two|three|four|\d+) (?:line|row|column|table|file|number|seed|pass|task"
        r"|record|folder|vector|step|part|entry|value|byte|bit|example|thread)s?)"
        rf" an? (?:{RATES})\b(?! (?:at|that|which|has|is|takes|needs)\b)",
        ["64 bytes an example", "one row a method", "ms a query", "a line an event"],
        ["one line at a time", "bytes of a query", "40 bytes per example", "a row that a method"],
    ),
    "write 'is not a', not 'is no'": (
        r"(?<!there )(?<!There )(?<!, )\b(?:is|are|was) no "
        r"(?!longer|more|less|fewer|better|worse|larger|smaller|higher|lower|other|one\b|need\b)[a-z]",
        ["it is no manifest", "that is no method"],
        ["there is no run", "it is no longer read", "no method is left"],
    ),
    "name the standard term: significant difference": (
        r"\b(?:told|tells?|telling) (?:\w+ ){0,2}apart\b",
        ["not told apart at 5%", "does not tell them apart"],
        ["apart from that", "taken apart"],
    ),
    "write 'predict'": (r"\b[Ff]oret(?:ell|old)", ["the change foretold"], ["folder"]),
    "write 'in case' or 'so that ... not'": (r"\b[Ll]est\b", ["lest it fail"], ["latest"]),
    "write 'any', 'every' or 'for every'": (r"\b[Ww]hatever\b", ["whatever the width"], ["what"]),
    "write 'expensive'": (r"\b(?:dear|dearer|dearest)\b", ["as dear as"], ["endear"]),
    "write 'learned'": (r"\b[Ll]earnt\b", ["what it learnt"], ["learned"]),
    "write 'while' or 'among'": (r"\b(?:whilst|amongst)\b", ["whilst it runs"], ["while"]),
    "write 'is the basis of'": (r"\bunderl(?:ie|ies|ay)\b", ["they underlie it"], ["underline"]),
    "name the noun instead of 'that of'": (
        r"\b(?:that|those) of (?:the|an?|its|his|their|each|every|another)\b",
        ["equal to that of the target", "those of its layers"],
        ["all of the", "so that of two runs"],
    ),
    "write 'its own process', not 'a process of its own'": (
        r"\b[Aa]n? [\w-]+ of (?:its|their|his|one's|your) own\b",
        ["runs in a process of its own"],
        ["its own process", "a model of your hub"],
    ),
    "write 'resumes'": (
        r"\b(?:go|goes|went|going) on (?:where|from where|after)\b",
        ["the same command goes on where it stopped"],
        ["based on where"],
    ),
    "write 'available'": (r"\bat hand\b", ["its text is not at hand"], ["at handover"]),
    "write 'untrusted' or 'third party'": (r"\b[Ss]tranger", ["a stranger's file"], ["strange"]),
    "write 'fix'": (r"\b[Mm]end(?:s|ed|ing)?\b", ["mend the line"], ["amend", "recommend"]),
    "write 'is not set' or 'is missing', not 'is none'": (
        r"(?<!there )\b(?:is|are) none\b",
        ["the manifest's request is none"],
        ["none is", "rank=none", "if there are none"],
    ),
    "write 'such as', not ', say'": (
        r"\w, say[,)]",
        ["(experts, say)"],
        ["they say, rightly"],
    ),
    "write 'because of missing'": (r"\bfor want of\b", ["for want of memory"], ["want"]),
    "write 'anyone who'": (r"\b[Ww]hoever\b", ["whoever reads it"], ["however"]),
}


# First words of docstrings of public functions ("Return", "Returns"). New verbs may be added.
VERBS = frozenset(
    """
    add adjust allow annotate answer append apply ask assign average benchmark blend bootstrap break
    build calibrate call cast check choose claim clear collect compare compute configure confine
    construct contain convert copy count create decorate derive describe detect discard divide do
    draw drop embed emit encode end estimate evaluate exit expand explain export fill find finish
    fit flush fold follow format generate give group handle hash hold ignore implement import index
    initialise inspect join keep kill label let list load lock look make mark mask measure merge
    minimise move multiply name notify open order pack pad parse permute perturb plan plot pool
    predict prepare print propagate protect pull put raise rank read rebuild receive recompute
    record refuse register remove render repeat replace replay report reset resolve restore resume
    retrain return run sample save scale scan score seal search seed select send serve set shorten
    show skip solve sort split start step stop store stream strip subtract sum supply suppress
    survey sync take tell test time tokenise track train transform try tune undo unpack update use
    validate verify wait walk watch weight whiten wrap write yield
    """.split()
)


def shipped() -> Iterator[Path]:
    """Every file of text that a user or a reader of the code sees."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            kinds = (".py", ".md", ".toml", ".js", ".html")
            if path.suffix in kinds and not name.startswith(NOT_SHIPPED):
                yield path
    yield from (ROOT / name for name in LOOSE)


FILES = list(shipped())


def prose(path: Path) -> list[tuple[int, str]]:
    """(line, text) of what a file says: strings and comments of Python, all of anything else."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return list(enumerate(source.split("\n"), 1))
    found = [
        (node.lineno, " ".join(node.value.split()))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return found + [(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT]


@pytest.mark.parametrize("advice", PATTERNS)
def test_a_pattern_finds_what_it_forbids_and_nothing_else(advice):
    pattern, wrong, right = PATTERNS[advice]
    assert all(re.search(pattern, text) for text in wrong)
    assert not any(re.search(pattern, text) for text in right)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_shipped_text_is_plain_english(path):
    lines = prose(path)
    found = [
        f"{path.relative_to(ROOT)}:{line}: {advice}: …{text[max(0, m.start() - 40) : m.end()]}…"
        for advice, (pattern, _, _) in PATTERNS.items()
        for line, text in lines
        for m in re.finditer(pattern, text)
    ]
    assert not found, "\n".join(found)


def is_verb(word: str) -> bool:
    """Whether a docstring's first word is a verb, imperative or third person."""
    word = word.lower().rstrip(",:")
    forms = {word, word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("ies") + "y"}
    return bool(forms & VERBS)


def test_verbs_are_told_from_nouns_and_articles():
    assert all(map(is_verb, ("Return", "Returns", "Hashes", "Copies", "Does")))
    assert not any(map(is_verb, ("The", "A", "Whether", "What", "Spearman", "Rows", "`value`")))


def documented(path: Path) -> Iterator[tuple[ast.AST, str, str]]:
    """(node, qualified name, docstring) of public functions, methods and classes of a module."""

    def inside(body: list[ast.stmt], prefix: str) -> Iterator[tuple[ast.AST, str, str]]:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            doc = ast.get_docstring(node)
            if doc:
                yield node, f"{prefix}{node.name}", doc
            if isinstance(node, ast.ClassDef):
                yield from inside(node.body, f"{prefix}{node.name}.")

    yield from inside(ast.parse(path.read_text(encoding="utf-8")).body, "")


def decorators(node: ast.AST) -> set[str]:
    return {ast.unparse(d) for d in getattr(node, "decorator_list", ())}


PYTHON = [p for p in FILES if p.suffix == ".py" and "docs" not in p.parts]


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_docstrings_begin_as_they_should(path):
    """A function's with a verb; a class's and a property's with what it is. Laws are statements."""
    for node, name, doc in documented(path):
        first = doc.split()[0]
        what = f"{path.relative_to(ROOT)}: {name}: {doc.splitlines()[0]}"
        if isinstance(node, ast.ClassDef):
            assert first not in ("What", "Where", "How", "Who", "Whether"), what
        elif not any("property" in d or d in ("law", "law()") for d in decorators(node)):
            assert is_verb(first), f"begins with no verb (see VERBS): {what}"
