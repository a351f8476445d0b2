"""`tdabench compare`: the difference between A and B, its interval and a verdict."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command("compare")
@click.argument("a")
@click.argument("b")
@click.option(
    "--run",
    "runs",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Run that contains the methods (default: the newest under runs/). Repeatable.",
)
@click.option("--benchmark", metavar="NAME", help="Only this benchmark.")
@click.option("--target", metavar="NAME", help="Only this target.")
@click.option(
    "--fail-on",
    type=click.Choice(["regression"]),
    help="Exit with 1 if B is worse than A on any benchmark, or fails where A has a value.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    a: str,
    b: str,
    runs: tuple[Path, ...],
    benchmark: str | None,
    target: str | None,
    fail_on: str | None,
    as_json: bool,
) -> None:
    """Compare B with A: difference, 95% interval, p-value and verdict.

    A and B are two method labels of a run, or two run folders (which compares every method that
    both contain). Methods are compared on paired bootstrap replicates.

    \b
    Examples:
      tdabench compare trak airrep
      tdabench compare trak airrep --benchmark lds --run runs/mine
      tdabench compare runs/main runs/change --fail-on regression
    """
    from tdabench.cli.common import say_run
    from tdabench.report.compare import compare, print_comparison, two_folders

    if not two_folders(a, b, runs):
        say_run(runs)
    found = compare(a, b, runs, benchmark, target)
    if as_json:
        from dataclasses import asdict

        from tdabench.cli.common import emit_json

        rows = [asdict(d) | {"regressed": d.regressed, "words": d.words()} for d in found]
        emit_json(rows)
    else:
        from rich.console import Console

        print_comparison(found, Console())
    if fail_on == "regression" and any(d.regressed for d in found):
        sys.exit(1)
