"""`tdabench verify`: recomputes every metric from the stored scores of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import click


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
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    folders: tuple[Path, ...], truths: tuple[Path, ...], suite: str | None, as_json: bool
) -> None:
    """Recompute every metric of a run from its stored scores and the truth.

    Needs neither the methods nor a model, so a board from someone else can be checked. Names what
    does not match and exits with 1; results that store too little are reported as unchecked.

    \b
    Examples:
      tdabench verify
      tdabench verify runs/theirs --truth lds.safetensors
    """
    from tdabench.report.records import find_runs, read_run
    from tdabench.report.text import clean
    from tdabench.report.verify import verify_runs

    runs = [read_run(f) for f in find_runs(folders)]
    checks = verify_runs(runs, truths, suite)
    bad = [c for c in checks if c.status == "differs"]
    if as_json:
        import json
        from dataclasses import asdict

        click.echo(json.dumps([asdict(c) for c in checks], indent=2))
    else:
        for check in sorted(checks, key=lambda c: c.status != "differs"):
            for problem in check.problems:
                click.echo(f"{check.status}: {check.name}: {clean(problem, 500)}")
        agreed = sum(c.status == "agrees" for c in checks)
        unchecked = sum(c.status == "unchecked" for c in checks)
        rest = f", {unchecked} could not be recomputed" if unchecked else ""
        click.echo(f"{agreed} of {len(checks)} results agree, {len(bad)} differ{rest}.")
    if bad:
        sys.exit(1)
