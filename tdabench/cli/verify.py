"""`tdabench verify`: recomputes every metric from the stored scores of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from tdabench.cli import elsewhere
from tdabench.cli.common import plugin_options, print_lines


@click.command("verify")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[DIR]...")
@click.option(
    "--truth",
    "truths",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Truth file that records name, if the suite's is not installed. Repeatable.",
)
@click.option("--suite", metavar="NAME|FILE", help="Suite whose truths to use.")
@plugin_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    folders: tuple[Path, ...], truths: tuple[Path, ...], suite: str | None, as_json: bool
) -> None:
    """Recompute every metric of a run from its stored scores and the truth.

    Needs neither the methods nor a model, so a board from someone else can be checked. Names what
    does not match. Exits with 1 if anything differs, a truth is not available, or nothing could be
    verified; results that store too little to recompute are counted.

    Truths come from --suite, --truth, an installed suite or your own run, never from a run folder
    that someone else made.

    \b
    Examples:
      tdabench verify
      tdabench verify runs/theirs --truth lds.safetensors
    """
    from tdabench.report.records import find_runs, read_run
    from tdabench.report.text import clean
    from tdabench.report.verify import verify_runs

    runs = [read_run(f) for f in find_runs(folders)]
    benchmarks = {str(r.benchmark.get("name")) for run in runs for r in run.records}
    code = elsewhere.carried_out(benchmarks=benchmarks, what="the verification", imports=True)
    if code is not None:
        sys.exit(code)
    checks = verify_runs(runs, truths, suite)
    bad = [c for c in checks if c.status == "differs"]
    if as_json:
        import json
        from dataclasses import asdict

        click.echo(json.dumps([asdict(c) for c in checks], indent=2))
    else:
        for check in sorted(checks, key=lambda c: c.status != "differs"):
            for problem in check.problems:
                print_lines(f"{check.status}: {check.name}: {clean(problem, 500)}")
            for mark in check.marks:
                print_lines(f"note: {check.name}: {clean(mark, 500)}")
        count = {k: sum(c.status == k for c in checks) for k in ("agrees", "missing", "unchecked")}
        rest = f", {count['unchecked']} cannot be recomputed" if count["unchecked"] else ""
        rest += f", {count['missing']} lack their truth" if count["missing"] else ""
        print_lines(f"{count['agrees']} of {len(checks)} results agree, {len(bad)} differ{rest}.")
    verified = any(c.status == "agrees" for c in checks)
    if bad or not verified or any(c.status == "missing" for c in checks):
        sys.exit(1)
