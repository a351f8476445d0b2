"""`tdabench verify`: compute every metric again from what a run stores."""

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
    help="A truth that records name, where the suite's own is not installed. May be repeated.",
)
@click.option("--suite", metavar="NAME|FILE", help="Suite whose truths to use.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    folders: tuple[Path, ...], truths: tuple[Path, ...], suite: str | None, as_json: bool
) -> None:
    """Recompute every metric of a run from its stored scores and the truth.

    Needs neither the methods nor a model: a board sent in by someone else can be checked. Exits
    with 1 and names what does not match; results that store too little are named as unchecked.

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
        rest = f", {unchecked} could not be computed again" if unchecked else ""
        click.echo(f"{agreed} of {len(checks)} results agree, {len(bad)} differ{rest}.")
    if bad:
        sys.exit(1)
