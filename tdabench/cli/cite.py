"""`tdabench cite`: citations of a suite and of methods, and results for a model's card."""

from __future__ import annotations

from pathlib import Path

import click

from tdabench.errors import UsageError


@click.command("cite")
@click.argument("suite", required=False)
@click.option("--methods", metavar="A,B", help="Methods to cite.")
@click.option("--benchmarks", metavar="A,B", help="Benchmarks to cite.")
@click.option(
    "--from",
    "path",
    type=click.Path(path_type=Path),
    metavar="RUN|RESULTS",
    help="Cite the suites, methods and benchmarks of a run or a results repository.",
)
@click.option(
    "--format",
    "form",
    default="bibtex",
    show_default=True,
    type=click.Choice(["bibtex", "cff", "model-index", "eval-results"]),
    help="BibTeX, CITATION.cff, or the results of one method for a model's card.",
)
@click.option("--model", default="", metavar="NAME", help="Name of the model on the card.")
@click.option("--url", default="", help="Address of the results, for the card.")
def command(
    suite: str | None,
    methods: str | None,
    benchmarks: str | None,
    path: Path | None,
    form: str,
    model: str,
    url: str,
) -> None:
    """Print citations, or the results of a method for the card of its model on the hub.

    Without options it cites tdabench. `model-index` is metadata for a card's README.md, and
    `eval-results` a file for its folder .eval_results.

    \b
    Examples:
      tdabench cite pocket --methods airrep,trak
      tdabench cite --from runs/pocket --format cff
      tdabench cite --from runs/pocket --methods airrep --format model-index --model my-encoder
    """
    from tdabench.results import cite
    from tdabench.results.table import load_results

    names = [w for w in (methods or "").split(",") if w]
    if form in cite.CARDS:
        if path is None or len(names) != 1:
            raise UsageError(f"{form} needs results and one method", "Give --from and --methods")
        table = load_results(path).select(label=names[0])
        records = [table.record(row) for row in table]
        if not records:
            raise UsageError(f"{path} has no results of {names[0]}", "See: tdabench leaderboard")
        click.echo(cite.card(records, form, model or names[0], url), nl=False)
        return
    suites = [suite] if suite else []
    asked = [w for w in (benchmarks or "").split(",") if w]
    if path is not None:
        from tdabench.registry import registry

        known = registry()
        table = load_results(path)
        suites += [str(r["suite"]) for r in table if r["suite"] in known.suites]
        names += [str(r["method"]) for r in table if r["method"] in known.methods]
        asked += [str(r["benchmark"]) for r in table if r["benchmark"] in known.benchmarks]
    found = cite.sources_of(suites, names, asked)
    click.echo((cite.bibtex if form == "bibtex" else cite.cff)(found), nl=False)
