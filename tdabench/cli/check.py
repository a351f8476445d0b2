"""`tdabench check`: tests whether a method keeps the laws of the interface."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from tdabench.cli import elsewhere
from tdabench.cli.common import (
    complete_methods,
    console,
    discovered,
    emit_json,
    json_option,
    plugin_options,
    print_lines,
)
from tdabench.errors import UsageError

MARKS = {
    "passed": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "expected": ("~", "yellow"),
    "unexpected": ("✗", "bold red"),
    "skipped": ("-", "dim"),
}


@click.command(
    epilog="""\b
Examples:
  tdabench check mymethod
  tdabench check --plugin ./my_method.py mymethod      a file that is not installed
  tdabench check airrep --asset airrep=encoder/        a method that needs a file
  tdabench check mymethod --law batches-do-not-matter
  tdabench check --laws                                list the laws
"""
)
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete_methods)
@click.option("--set", "settings", multiple=True, metavar="[NAME.]KEY=VALUE", help="A parameter.")
@click.option(
    "--asset", "assets", multiple=True, metavar="NAME=PATH", help="A file that the method requests."
)
@click.option("--law", "laws", multiple=True, metavar="LAW", help="Only this law; repeatable.")
@click.option(
    "--architecture",
    default="qwen2",
    show_default=True,
    help="Architecture of the tiny target: qwen2, llama, gpt2 or gpt_neox.",
)
@click.option("--laws", "list_laws", is_flag=True, help="List the laws and stop.")
@click.option("--traceback", is_flag=True, help="Show the tracebacks of methods.")
@plugin_options
@json_option
def command(
    names: tuple[str, ...],
    settings: tuple[str, ...],
    assets: tuple[str, ...],
    laws: tuple[str, ...],
    architecture: str,
    list_laws: bool,
    traceback: bool,
    as_json: bool,
) -> None:
    """Check that methods meet the interface's contract, on a tiny model generated on the fly.

    Methods whose defaults would take minutes are checked in lighter settings, which are printed;
    --set overrides them. The exit code is 1 if a law is broken, and 2 if a method could not be
    checked.
    """
    if list_laws:
        return print_laws(as_json)
    if not names:
        raise click.UsageError("name a method, or 'all'")
    registry = discovered()
    if names == ("all",):
        names = tuple(registry.methods)
    code = elsewhere.carried_out(
        names, what="the check", imports=True, rules=lambda: readable(assets, settings)
    )
    if code is not None:
        sys.exit(code)
    classes = {n: registry.method(n).cls for n in names}
    asked = {n: given(n, names, settings) for n in names}
    lighter = {
        n: {k: v for k, v in c.check_settings.items() if k not in asked[n]}
        for n, c in classes.items()
    }
    methods = {n: c.from_params(lighter[n] | asked[n]) for n, c in classes.items()}
    provided = {k: Path(v).resolve() for k, v in (pair(a, "--asset NAME=PATH") for a in assets)}

    from tdabench.testing import check_method, find_law

    for name in laws:
        find_law(name)
    found: list[Any] = []
    for name, method in methods.items():
        results = []
        for result in check_method(method, laws or None, provided, architecture):
            results.append(result)
            elsewhere.step()
            if not as_json:
                first = _words(name, lighter[name]) if len(results) == 1 else ""
                print_result(result, first, traceback=traceback)
        found += results
        if not as_json:
            print_summary(name, results)
    if as_json:
        emit_json(
            [
                {**r.__dict__, "seconds": round(r.seconds, 4), "settings": lighter[r.method]}
                for r in found
            ]
        )
    if not all(r.ok for r in found):
        sys.exit(1)
    missing = next((r for r in found if r.missing), None)
    if missing is not None and len(names) == 1:
        raise UsageError(f"{missing.method} was not checked: {missing.detail}")


def readable(assets: tuple[str, ...], settings: tuple[str, ...]) -> list[tuple[str, str]]:
    """Returns what third-party methods may read in a check: what they may read in a run."""
    from tdabench.io import cache_folder
    from tdabench.registry import __file__ as package
    from tdabench.registry import configuration
    from tdabench.run import sandbox

    suites = Path(package).parent / "suites"
    hidden = [str(p) for p in (Path.cwd() / "runs", cache_folder(), suites) if p.exists()]
    rules = sandbox.libraries(hidden, sys.path)
    named = [pair(text, "NAME=PATH")[1] for text in (*assets, *settings) if "=" in text]
    for place in (*named, *configuration()["modules"]):
        real = Path(place).resolve()
        if place and real.exists() and not any(Path(h).is_relative_to(real) for h in hidden):
            rules += sandbox.with_links(real, hidden)
    # /proc shows it its own processes; it confines methods itself, for which it lists /dev.
    return [*rules, ("/proc", "read"), ("/dev", "list")]


def given(name: str, names: tuple[str, ...], settings: tuple[str, ...]) -> dict[str, str]:
    """Returns the parameters for `name` among `KEY=VALUE` and `NAME.KEY=VALUE`."""
    params = {}
    for text in settings:
        key, value = pair(text, "--set KEY=VALUE")
        owner, dot, rest = key.partition(".")
        if not dot:
            params[key] = value
        elif owner == name:
            params[rest] = value
        elif owner not in names:
            raise UsageError(f"--set {text}: {owner!r} is not one of the checked methods")
    return params


def pair(text: str, form: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UsageError(f"{text!r} does not have the form {form}")
    return key, value


def _words(name: str, lighter: Mapping[str, Any]) -> str:
    """Returns a method's name, with the settings in which it is checked if not its defaults."""
    told = ", ".join(f"{k}={v}" for k, v in lighter.items())
    return f"{name} ({told})" if told else name


def print_result(result: Any, first: str, traceback: bool) -> None:
    """Prints one line per result, under the heading `first` if there is one."""
    from rich.text import Text

    out = console()
    if first:
        out.print(Text(first, style="bold"))
    sign, style = MARKS[result.status]
    line = Text.assemble((f"  {sign} ", style), f"{result.law:<36}")
    if result.status != "passed":
        line.append(f" {result.status}", style=style)
    out.print(line)
    if result.detail:
        print_lines(f"      {result.detail}")
    if traceback and result.where:
        print(result.where, file=sys.stderr)


def print_summary(name: str, results: list[Any]) -> None:
    from rich.text import Text

    counts = {s: sum(r.status == s for r in results) for s in MARKS}
    seconds = sum(r.seconds for r in results)
    parts = [f"{n} {s}" for s, n in counts.items() if n]
    console().print(Text(f"  {', '.join(parts)} in {seconds:.1f} s\n"))


def print_laws(as_json: bool) -> None:
    from tdabench.testing import LAWS

    if as_json:
        return emit_json({law.name: law.doc for law in LAWS.values()})
    from rich.text import Text

    out = console()
    for law in LAWS.values():
        out.print(Text(law.name, style="bold"))
        print_lines(f"  {law.doc}")
