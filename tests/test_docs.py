"""Documentation that drifts fails here: commands, hooks, methods and links are checked."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
from dataclasses import fields
from pathlib import Path

import click
import pytest

from tdabench import hookspecs
from tdabench.cli import COMMANDS, cli
from tdabench.registry import registry
from tdabench.run.sources import load_suite
from tdabench.toolkit.pipeline import PipelineName

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[str]:
    """Every `tdabench …` in a code block or in backticks."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())  # continued lines
    blocks = re.findall(r"^(?:    |\t)(?:\$ )?(tdabench .*)$", text, re.M)
    for fenced in re.findall(r"^```.*?$(.*?)^```", text, re.M | re.S):
        blocks += re.findall(r"^\s*(?:\$ )?(tdabench .*)$", fenced, re.M)
    spans = re.findall(r"`(tdabench [^`\n]*)`", text)
    lines = [re.split(r"\s+#|\s+[|>]", b)[0] for b in blocks]
    return [c.rstrip("\\ ") for c in [*lines, *spans] if "…" not in c and "..." not in c]


ALL = [(page, c) for page in PAGES for c in commands(page)]


@pytest.mark.parametrize(("page", "line"), ALL, ids=[f"{p.name}: {c}" for p, c in ALL])
def test_a_documented_command_exists_with_its_options(page, line):
    args = shlex.split(line)[1:]
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        words = [a for a in args if not a.startswith("-")]
        if not words:
            break
        found = command.get_command(context, words[0])
        assert found is not None, f"{page.name}: no command {words[0]!r}"
        args.remove(words[0])
        command, context = found, click.Context(found, parent=context)
    command.make_parser(context).parse_args(list(args))  # NoSuchOption if an option is gone


# Names that stand for the reader's own in examples.
YOURS = {
    "demo",
    "FOLDER",
    "LABEL",
    "my-method",
    "mymethod",
    "mine",
    "METHOD",
    "BENCHMARK",
    "NAME",
    "$m",
    "all",
    "main",
}


def values(line: str, option: str) -> list[str]:
    """What a command line gives to an option, lists taken apart."""
    words = shlex.split(line)
    found = [b for a, b in itertools.pairwise(words) if a == option]
    return [v for text in found for v in text.split(",") if v not in YOURS]


def parameters(name: str) -> set[str]:
    """Parameters of a method or a benchmark."""
    known = registry().benchmarks if name in registry().benchmarks else registry().methods
    return {f.name for f in fields(known[name].cls)}


SET = re.compile(r"`--set ([\w-]+)\.(\w+)=")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_setting_in_the_text_names_a_parameter(page):
    for name, parameter in SET.findall(page.read_text()):
        if name in YOURS:
            continue
        assert parameter in parameters(name), f"{page.name}: --set {name}.{parameter}"


@pytest.mark.parametrize(("page", "line"), ALL, ids=[f"{p.name}: {c}" for p, c in ALL])
def test_what_a_documented_command_names_is_there(page, line):
    from tdabench.report.plots import KINDS
    from tdabench.testing import LAWS

    suite = load_suite("pocket")
    own_suite = "--suite" in line or "mine.toml" in line or "factbook" in line
    for name in values(line, "--methods"):
        pipeline = PipelineName.parse(name)
        for stage in pipeline.stages if pipeline else [name]:
            assert stage in {*registry().methods, *suite.variants}
    for name in [*values(line, "--benchmarks"), *values(line, "--benchmark")]:
        assert name in {*registry().benchmarks, "overall", "shortcuts"}
    for name in values(line, "--kind"):
        assert name in KINDS
    for name in values(line, "--law"):
        assert name in LAWS
    for name in [] if own_suite else values(line, "--target"):
        assert name in {t.label for t in suite.targets}
    for setting in values(line, "--set"):
        name, _, parameter = setting.partition("=")[0].rpartition(".")
        if PipelineName.parse(name) is not None:
            assert parameter == "rest"
        elif name and name not in YOURS:
            assert parameter in parameters(name)
    words = [w for w in shlex.split(line)[1:] if not w.startswith("-")]
    if (
        len(words) == 2
        and words[0] in ("methods", "benchmarks", "suites")
        and words[1] not in YOURS
        and not words[1].endswith(".toml")
    ):
        assert words[1] in getattr(registry(), words[0])


def test_there_are_commands_to_check():
    assert len(ALL) > 30


def test_every_command_is_documented():
    shown = {shlex.split(line)[1] for _, line in ALL if len(shlex.split(line)) > 1}
    assert set(COMMANDS) <= shown


CODE = [
    (page, block)
    for page in PAGES
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
]


@pytest.mark.parametrize(
    ("page", "block"), CODE, ids=[f"{p.name}-{i}" for i, (p, _) in enumerate(CODE)]
)
def test_python_in_the_pages_uses_what_is_public(page, block):
    from tdabench import api, testing

    listed = ast.walk(ast.parse(Path(api.__file__).read_text()))
    names = {a.asname for n in listed if isinstance(n, ast.ImportFrom) for a in n.names}
    public = {"tdabench.api": names, "tdabench.testing": set(testing.__all__)}
    try:
        tree = ast.parse(block)
    except SyntaxError:  # a signature
        tree = ast.parse(block.rstrip() + ": ...")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("tdabench."):
            assert {a.name for a in node.names} <= public[str(node.module)]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as mkdocs and git hosts make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    heads = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads}


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_links_between_pages_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        if "://" not in link and not link.startswith("mailto:"):
            target = page.parent / link if link else page
            assert target.exists(), f"{page.name} links to {link}"
            if anchor:
                assert anchor in anchors(target), f"{page.name} links to {link}#{anchor}"


def test_every_page_has_its_place_in_the_documentation():
    nav = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2].partition("markdown_extensions")[0]
    listed = re.findall(r": (\S+\.md)$", nav, re.M)
    pages = [p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)


def test_the_citation_is_of_this_version():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{version}}}" in (ROOT / "docs" / "papers.md").read_text()


def test_every_hook_is_documented():
    text = (ROOT / "docs" / "plugins.md").read_text()
    hooks = [n for n in vars(hookspecs) if n.startswith("tdabench_")]
    assert len(hooks) == 5
    for hook in hooks:
        assert hook in text


@pytest.mark.parametrize("name", sorted(registry().methods))
def test_every_bundled_method_has_its_place_in_the_docs(name):
    pages = [p.read_text() for p in (ROOT / "docs" / "methods").glob("*.md")]
    mine = [text for text in pages if f"`{name}`" in text]
    assert mine, f"no page under docs/methods mentions `{name}`"


@pytest.mark.parametrize("name", sorted(registry().benchmarks))
def test_every_benchmark_has_a_page(name):
    assert (ROOT / "docs" / "benchmarks" / f"{name}.md").exists()
