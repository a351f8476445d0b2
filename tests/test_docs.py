"""Documentation that drifts fails here: commands, hooks, methods and links are checked."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from tdabench import hookspecs, plugins
from tdabench.cli import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[str]:
    """Every `tdabench …` in a code block or in backticks."""
    text = page.read_text()
    blocks = re.findall(r"^(?:    |\t)(?:\$ )?(tdabench .*)$", text, re.M)
    for fenced in re.findall(r"^```.*?$(.*?)^```", text, re.M | re.S):
        blocks += re.findall(r"^\s*(?:\$ )?(tdabench .*)$", fenced, re.M)
    spans = re.findall(r"`(tdabench [^`\n]*)`", text)
    lines = [re.split(r"\s+#|\s*[|>]", b)[0] for b in blocks]
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


def test_there_are_commands_to_check():
    assert len(ALL) > 30


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_links_between_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in link and not link.startswith("mailto:"):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_hook_is_documented():
    text = (ROOT / "docs" / "plugins.md").read_text()
    hooks = [n for n in vars(hookspecs) if n.startswith("tdabench_")]
    assert len(hooks) == 5
    for hook in hooks:
        assert hook in text


@pytest.mark.parametrize("name", sorted(plugins.registry().methods))
def test_every_bundled_method_has_its_place_in_the_docs(name):
    pages = [p.read_text() for p in (ROOT / "docs" / "methods").glob("*.md")]
    mine = [text for text in pages if f"`{name}`" in text]
    assert mine, f"no page under docs/methods mentions `{name}`"


@pytest.mark.parametrize("name", sorted(plugins.registry().benchmarks))
def test_every_benchmark_has_a_page(name):
    assert (ROOT / "docs" / "benchmarks" / f"{name}.md").exists()
