"""`tdabench plot`: draws the board's numbers as PNG, SVG or PDF."""

from __future__ import annotations

from pathlib import Path

import click

from tdabench.errors import notice


@click.command("plot")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[DIR]...")
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    metavar="KIND",
    help="fidelity-build, fidelity-query, fidelity-total, fidelity-storage, tasks, transfer, "
    "curves, scaling or budget; may be repeated. Default: all that the records allow.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("plots"),
    show_default=True,
    help="Folder to write to.",
)
@click.option(
    "--format", "form", type=click.Choice(["png", "svg", "pdf"]), default="png", show_default=True
)
@click.option("--benchmark", metavar="NAME", help="Plot this benchmark's value.")
@click.option("--target", metavar="NAME", help="Only this target.")
@click.option("--methods", metavar="A,B", help="Draw only these methods.")
@click.option("--suite", metavar="NAME|FILE", help="Suite to read task labels from.")
def command(
    folders: tuple[Path, ...],
    kinds: tuple[str, ...],
    out: Path,
    form: str,
    benchmark: str | None,
    target: str | None,
    methods: str | None,
    suite: str | None,
) -> None:
    """Draw fidelity against cost with the Pareto front, LDS by task, transfer, selection and
    removal curves, growth of cost, and value against label budget.

    Needs the extra `plots`. With many methods, line plots show the ten that rank first. Prints the
    files that it wrote, and names on stderr the plots that the records do not allow.

    \b
    Examples:
      tdabench plot
      tdabench plot --kind fidelity-query --format pdf --out figures
      tdabench plot --kind curves --methods airrep,trak,bm25
    """
    from tdabench.report.board import Board
    from tdabench.report.examples import load_texts
    from tdabench.report.plots import draw

    chosen = [m.strip() for m in methods.split(",") if m.strip()] if methods else None
    board = Board.from_runs(folders, methods=chosen)
    tasks: dict[str, str] = {}
    if not kinds or "tasks" in kinds:
        for run in board.runs:
            tasks.update(load_texts(run, suite).tasks)
    written, missing = draw(
        board, kinds, out, form=form, benchmark=benchmark, target=target, tasks=tasks
    )
    for line in missing:
        notice(f"not drawn: {line}", "")
    for path in written:
        click.echo(str(path))
