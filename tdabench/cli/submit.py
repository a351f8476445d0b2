"""`tdabench submit`: packs results of a run into a results repository."""

from __future__ import annotations

from pathlib import Path

import click

from tdabench.errors import UsageError


@click.command("submit")
@click.argument("run", required=False, type=click.Path(path_type=Path), metavar="[RUN]")
@click.option("--to", required=True, type=click.Path(path_type=Path), metavar="FOLDER",
              help="Results repository: a git checkout or a folder, or a new one.")  # fmt: skip
@click.option("--methods", metavar="A,B", help="Method labels (default: all).")
@click.option("--target", "targets", multiple=True, help="Target label (default: all). Repeatable.")
@click.option("--benchmarks", metavar="A,B", help="Benchmarks (default: all).")
@click.option("--by", default="", metavar="NAME", help="Who measured, as shown on the board.")
@click.option("--suite", metavar="NAME|FILE", help="Suite whose truths to verify with.")
@click.option("--truth", "truths", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Truth file that records name. Repeatable.")  # fmt: skip
@click.option("--text", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
              help="Also write the pull request's text to this file.")  # fmt: skip
def command(
    run: Path | None,
    to: Path,
    methods: str | None,
    targets: tuple[str, ...],
    benchmarks: str | None,
    by: str,
    suite: str | None,
    truths: tuple[Path, ...],
    text: Path | None,
) -> None:
    """Pack results of a run for a results repository, and print the pull request's text.

    Every result is verified first, by recomputing it from its stored scores. The submission holds
    records, scores and what they were measured on, and no path, user or host of this machine; a
    result that would reveal one is refused. Submitting the same results again changes nothing.

    \b
    Examples:
      tdabench submit --to ../tda-results
      tdabench submit runs/pocket --methods airrep,trak --by "A. Author" --to ../tda-results
    """
    from tdabench.io import write_text
    from tdabench.report.records import find_runs, read_run
    from tdabench.results.pack import pack

    folders = find_runs([run] if run else [])
    if len(folders) != 1:
        raise UsageError(f"{run} contains {len(folders)} runs", "Name one of them")
    packed = pack(
        read_run(folders[0]), to, methods=_words(methods), targets=targets,
        benchmarks=_words(benchmarks), by=by, truths=truths, suite=suite,
    )  # fmt: skip
    for line in packed.left_out:
        click.echo(f"left out: {line}", err=True)
    for place in packed.there:
        click.echo(f"already there: {place}", err=True)
    for place in packed.new:
        click.echo(f"written: {to / place}", err=True)
    click.echo(packed.text)
    if text:
        write_text(text, packed.text + "\n")
    if packed.new and (to / ".git").exists():
        git = f"git -C {to}"
        click.echo(
            f"Next: {git} checkout -b results && {git} add results && {git} commit, then open a "
            "pull request with this text",
            err=True,
        )


def _words(text: str | None) -> list[str]:
    return [w for w in (text or "").split(",") if w]
