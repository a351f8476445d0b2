"""`tdabench leaderboard`: the table computed from the records of one or several runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tdabench.cli.common import say_run, words

if TYPE_CHECKING:
    from tdabench.report.board import Board

FORMATS = ("table", "json", "csv", "md", "latex")


@click.command("leaderboard")
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path), metavar="[DIR]...")
@click.option("--format", "form", type=click.Choice(FORMATS), default="table", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option(
    "--sort",
    default="rank",
    show_default=True,
    metavar="KEY",
    help="rank, method, family, share, build, query, bytes, prepare or a benchmark; "
    "--sort=-KEY reverses.",
)
@click.option("--columns", metavar="A,B", help="Show these columns at any width.")
@click.option("--benchmark", metavar="NAME", help="Rank by this benchmark, or by `overall`.")
@click.option(
    "--overall",
    metavar="A,B",
    help="Benchmarks whose ranks the overall rank averages.  [default: all but cost]",
)
@click.option("--intervals", is_flag=True, help="Show the interval of every benchmark.")
@click.option(
    "--transfer",
    metavar="METHOD",
    help="Show a method's source x target matrix instead of the board (benchmark transfer).",
)
@click.option("--target", metavar="NAME", help="Only this target.")
@click.option("--wide", is_flag=True, help="Show every column at any width.")
@click.option("--no-cache", is_flag=True, help="Compare the methods again, without the cache.")
def command(
    folders: tuple[Path, ...],
    form: str,
    as_json: bool,
    sort: str,
    columns: str | None,
    benchmark: str | None,
    overall: str | None,
    intervals: bool,
    transfer: str | None,
    target: str | None,
    wide: bool,
    no_cache: bool,
) -> None:
    """Print the leaderboard of a run, or of several runs merged.

    DIR is a run folder or a folder of runs (default: the newest run under runs/). In a pipe the
    table is printed in full and without colour.

    \b
    Examples:
      tdabench leaderboard
      tdabench leaderboard runs/mine runs/theirs --benchmark selection
      tdabench leaderboard --overall lds,transfer,tracing --benchmark overall --intervals
      tdabench leaderboard --format latex > table.tex
    """
    from tdabench.report.board import Board
    from tdabench.report.records import no_collection

    click.get_current_context().with_resource(no_collection())
    say_run(folders)
    board = Board.from_runs(folders, cache=not no_cache)
    if transfer is not None:
        show_transfer(board, transfer, as_json or form == "json")
        return
    chosen = words(columns)
    counted = words(overall)
    form = "json" if as_json else form
    if form == "table":
        from rich.console import Console

        from tdabench.report.published import print_published
        from tdabench.report.terminal import print_board
        from tdabench.report.trust import print_left_out

        console = Console()
        print_board(
            board,
            console,
            sort=sort,
            columns=chosen,
            benchmark=benchmark,
            target=target,
            wide=wide,
            intervals=intervals,
            overall=counted,
        )
        print_left_out(board, console)
        print_published(board, console)
        return
    from tdabench.report.export import export

    click.echo(
        export(
            board,
            form,
            sort=sort,
            columns=chosen,
            benchmark=benchmark,
            target=target,
            overall=counted,
        ),
        nl=False,
    )


def show_transfer(board: Board, method: str, as_json: bool) -> None:
    from tdabench.report.transfer import print_transfer, transfer_matrix

    found = transfer_matrix(board, method)
    if not as_json:
        from rich.console import Console

        print_transfer(found, Console())
        return
    import json

    nested = {s: {t: found.lds.get((s, t)) for t in found.targets} for s in found.sources}
    bounds = {k: getattr(found, k) for k in ("ceiling", "truth", "agnostic")}
    click.echo(json.dumps({"method": method, "lds": nested, **bounds}, indent=2))
