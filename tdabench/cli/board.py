"""`tdabench board`: builds and checks the leaderboard of a results repository."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tdabench.errors import UsageError

if TYPE_CHECKING:
    from tdabench.run.record import Record


@click.group("board")
def command() -> None:
    """Build a static leaderboard from a results repository, and check submissions.

    \b
    Examples:
      tdabench board build ../tda-results --out site
      tdabench board check ../tda-results --remeasure 3
      tdabench board badge runs/pocket --method airrep --out badge.svg
    """


@command.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FOLDER",
              help="Where to write index.html, results.csv and results.json.")  # fmt: skip
@click.option("--name", default="tdabench results", show_default=True, help="Title of the page.")
@click.option("--open", "open_it", is_flag=True, help="Open it in the browser.")
def build(results: Path, out: Path, name: str, open_it: bool) -> None:
    """Write the leaderboard of RESULTS as a page that needs no server.

    Invalid submissions are left out, listed on the page and on stderr; the others are shown.

    \b
    Example:
      tdabench board build ../tda-results --out site
    """
    from tdabench.results.layout import read_results
    from tdabench.results.site import build_site

    found = read_results(results)
    for bad in found.refused:
        click.echo(f"refused: {bad.place}: {bad.reason}", err=True)
    files = build_site(found, out, name)
    refused = f", {len(found.refused)} refused" if found.refused else ""
    click.echo(f"{len(found.submissions)} submissions{refused}", err=True)
    click.echo(str(files[0]))
    if open_it:
        click.launch(str(files[0]))


@command.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--truth", "truths", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Truth file that records name. Repeatable.")  # fmt: skip
@click.option("--suite", metavar="FILE", help="A suite that is not installed.")
@click.option("--remeasure", type=click.IntRange(0), default=0, show_default=True, metavar="N",
              help="Measure N random records again, where their method is installed.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="Seed for the choice of records.")
@click.option("--strict", is_flag=True, help="Fail also if a truth is not available here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(
    results: Path,
    truths: tuple[Path, ...],
    suite: str | None,
    remeasure: int,
    seed: int,
    strict: bool,
    as_json: bool,
) -> None:
    """Recompute every metric of RESULTS, and refuse what does not agree.

    Exits with 1 if a submission is refused, a metric does not follow from its stored scores, or a
    record measured again does not agree.

    \b
    Examples:
      tdabench board check ../tda-results
      tdabench board check ../tda-results --remeasure 3 --json
    """
    from tdabench.results.check import check_results
    from tdabench.results.layout import read_results

    found = check_results(
        read_results(results), truths=truths, suite=suite, remeasure=remeasure, seed=seed
    )
    bad = [f for f in found if f.status in ("refused", "differs")]
    missing = [f for f in found if f.status == "missing"]
    if as_json:
        import json
        from dataclasses import asdict

        click.echo(json.dumps([asdict(f) for f in found], indent=2))
    else:
        for f in sorted(found, key=lambda f: f.status not in ("refused", "differs")):
            if f.status != "agrees" or f.reason:
                name = f"{f.place}: {f.name}".rstrip(": ")
                click.echo(f"{f.status}: {name}" + (f": {f.reason}" if f.reason else ""))
        agreed = sum(f.status == "agrees" for f in found)
        again = sum(f.status == "again" for f in found)
        rest = f", {again} measured again and agree" if again else ""
        rest += f", {len(missing)} lack their truth here" if missing else ""
        click.echo(f"{agreed} results agree, {len(bad)} do not{rest}.")
    if bad or (strict and missing):
        sys.exit(1)


@command.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--method", required=True, help="Method label.")
@click.option("--benchmark", default="lds", show_default=True)
@click.option("--target", help="Target label (default: the only one).")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True)
def badge(run: Path, method: str, benchmark: str, target: str | None, out: Path) -> None:
    """Draw a method's value with its interval as an SVG.

    For the README of the method's repository. Exits with 1 if the method failed, with a badge that
    says so.

    \b
    Example:
      tdabench board badge runs/pocket --method airrep --out badge.svg
    """
    from tdabench.io import write_text
    from tdabench.results.cite import badge as draw

    record = one_record(run, method, benchmark, target)
    if out.exists() and not out.read_text("utf-8", "replace").startswith("<svg"):
        raise UsageError(f"{out} exists and is not a badge", "Choose another file with --out")
    write_text(out, draw(record))
    click.echo(str(out))
    if not record.ok:
        sys.exit(1)


def one_record(run: Path, method: str, benchmark: str, target: str | None) -> Record:
    """Returns the record of a method on a benchmark and target. Raises UsageError if not one."""
    from tdabench.errors import unknown
    from tdabench.report.records import find_runs, read_run

    records = [r for f in find_runs([run]) for r in read_run(f).records]
    mine = [r for r in records if r.label == method]
    if not mine:
        raise unknown("method", method, {r.label for r in records}, f"in {run}")
    mine = [r for r in mine if r.benchmark_name == benchmark]
    if not mine:
        raise UsageError(f"{run} has no result of {method} on {benchmark}")
    labels = {str(r.target.get("label") or r.target.get("name")) for r in mine}
    if target is None and len(labels) > 1:
        raise UsageError(f"{run} has {len(labels)} targets", f"Name one: --target {min(labels)}")
    mine = [r for r in mine if target in (None, str(r.target.get("label") or ""))]
    if not mine:
        raise unknown("target", str(target), labels)
    return min(mine, key=lambda r: r.seed)
