"""`tdabench report`: writes a run as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from tdabench.errors import notice


@click.command("report")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[DIR]...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to write (default: report.html in the run folder).",
)
@click.option("--suite", metavar="NAME|FILE", help="Suite to read the examples' texts from.")
@click.option(
    "--words",
    type=click.IntRange(0, 1000),
    default=0,
    metavar="N",
    help="For the first N queries, shade the words of queries and helpful examples that carry the "
    "scores, with the indices that the run kept (minutes for methods with gradients).",
)
@click.option("--open", "open_it", is_flag=True, help="Open it in the browser.")
@click.option(
    "--max-mb",
    type=float,
    default=18.0,
    show_default=True,
    help="Largest size; contents are reduced to fit.",
)
def command(
    folders: tuple[Path, ...],
    out: Path | None,
    suite: str | None,
    words: int,
    open_it: bool,
    max_mb: float,
) -> None:
    """Write a report: one HTML file that needs no network and no server.

    The page has a sortable board, interactive plots, scores by task, the run's manifest, and for
    every query the training examples that methods score as most helpful and most harmful.

    \b
    Examples:
      tdabench report
      tdabench report --words 20
      tdabench report runs/mine runs/theirs --out both.html
    """
    from tdabench.report.board import Board
    from tdabench.report.html import write_report
    from tdabench.report.words import merged, words_of_run

    board = Board.from_runs(folders)
    path = out or board.runs[-1].folder / "report.html"
    shading = []
    for run in board.runs if words else ():
        found, why = words_of_run(run, words, notice)
        shading.append(found)
        for line in why:
            notice(line, "")
    most = int(max_mb * (1 << 20))
    for note in write_report(board, path, suite=suite, max_bytes=most, words=merged(shading)):
        notice(f"left out: {note}", "")
    click.echo(str(path))
    if open_it:
        click.launch(str(path))
