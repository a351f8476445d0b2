"""`tdabench index`: indexes a corpus of millions once, and searches it for the best examples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tdabench.cli import elsewhere
from tdabench.cli.common import (
    chosen_device,
    complete_suites,
    console,
    data_dir_option,
    discovered,
    emit_json,
    json_option,
    own_data_options,
    plugin_options,
    words,
)
from tdabench.errors import UsageError, clean
from tdabench.io import read_json

if TYPE_CHECKING:
    from tdabench.data import Example
    from tdabench.run.corpus_index import CorpusIndex, Hits

WORKERS = (
    click.option("--workers", type=click.IntRange(1), default=1, show_default=True,
                 help="Processes on this machine that share the shards."),
    click.option("--ray", metavar="ADDRESS",
                 help="A Ray cluster instead (extra ray): auto finds a running one, \"\" starts "
                      "one here."),
    click.option("--gpus", type=click.FloatRange(0), default=0.0, show_default=True,
                 help="Ray: GPUs per shard; with 0.25 four share one."),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …"),
)  # fmt: skip


def worker_options(function: Any) -> Any:
    for option in reversed(WORKERS):
        function = option(function)
    return function


@click.group(name="index")
def command() -> None:
    """Build an index of a corpus of any size in shards, and search it.

    For methods that score by products of representations. The index is a folder; it is built by
    several processes or a Ray cluster, and an interrupted build resumes.

    \b
    Examples:
      tdabench index build idx --method hidden --model ./my-model --train corpus.jsonl --workers 8
      tdabench index search idx "What is the capital of France?" -k 10
    """


@command.command(
    epilog="""\b
Examples:
  tdabench index build idx --method logra --suite mine.toml --shard-rows 1000000 --ray auto --gpus 1
  tdabench index build idx --method hidden --store int8x2 --approximate IVF1024,SQ8
"""
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--method", required=True, metavar="NAME", help="A method or variant of the suite.")
@click.option("--set", "sets", multiple=True, metavar="METHOD.PARAM=VALUE", help="Set a parameter.")
@click.option("--suite", metavar="NAME|FILE", shell_complete=complete_suites,
              help="Suite with training corpus and target.  [default: pocket]")  # fmt: skip
@click.option("--target", metavar="LABEL", help="Target.  [default: the suite's main one]")
@click.option("--shard-rows", type=click.IntRange(1), default=100_000, show_default=True,
              help="Training examples per shard, the loss if a worker dies.")  # fmt: skip
@click.option("--store", type=click.Choice(["float32", "float16", "int8", "int8x2"]),
              help="How rows are stored; int8x2 searches one byte per value and reads a second "
              "for the best candidates only.  [default: the method's own, or float32]")  # fmt: skip
@click.option(
    "--approximate",
    metavar="SPEC",
    default="",
    help="Also build an approximate index (extra faiss), such as IVF1024,SQ8.",
)
@worker_options
@own_data_options
@plugin_options
@json_option
def build(
    folder: Path,
    method: str,
    sets: tuple[str, ...],
    suite: str | None,
    target: str | None,
    shard_rows: int,
    store: str | None,
    approximate: str,
    workers: int,
    ray: str | None,
    gpus: float,
    device: str,
    own: dict[str, Any],
    as_json: bool,
) -> None:
    """Encode the training corpus into FOLDER.

    Prints a summary. The same command resumes an interrupted build and does not change a finished
    one.
    """
    from tdabench.run import corpus_index
    from tdabench.run.plan import Request, plan_indices

    device = chosen_device(device)
    discovered()
    code = elsewhere.carried_out(
        [method], what="the index build", imports=True,
        foreign=bool(own["model"] or own["train"]) or elsewhere.is_foreign(suite),
    )  # fmt: skip
    if code is not None:
        sys.exit(code)
    if own["model"] or own["train"]:
        if suite:
            raise UsageError("--suite excludes --model and --train", "Give one of them")
        from tdabench.run.own import own_suite

        suite = str(own_suite(own, None, folder).path)
    request = Request(suite or "pocket", (method,), words(target), sets=sets, device=device)
    plan = plan_indices(request, own["data_dir"])
    name = suite or "pocket"
    if name.endswith(".toml"):
        name = str(plan.suite.path)
    about = corpus_index.build(
        plan, name, folder, shard=shard_rows, dtype=store or "", approximate=approximate,
        run=corpus_index.runner(workers, ray, gpus, _shards_done),
    )  # fmt: skip
    if as_json:
        emit_json(about)
    else:
        click.echo(
            f"{folder}: {about['n_train']:,} examples x {about['dim']} ({about['dtype']}) by "
            f"{about['method']['label']}, {about['shards']} shards, {about['bytes']:,} bytes"
        )


@command.command(
    epilog="""\b
Examples:
  tdabench index search idx "What is the capital of France?" --response Paris -k 20
  tdabench index search idx --queries questions.jsonl --json
  tdabench index search idx --queries questions.jsonl --approximate --probes 64
"""
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--response", help="The output to explain.  [default: the target's own answer]")
@click.option("--queries", "queries_file", type=click.Path(path_type=Path),
              help="File of prompts and responses, instead of a prompt.")  # fmt: skip
@click.option("--layout", default="auto", show_default=True, metavar="NAME",
              help="Its layout: native, flan, alpaca, chat, ultrachat, qa, text.")  # fmt: skip
@click.option("-k", "k", type=click.IntRange(1), default=10, show_default=True,
              help="Examples per query.")  # fmt: skip
@click.option("--approximate", is_flag=True, help="Use the approximate index (extra faiss).")
@click.option("--probes", type=click.IntRange(1), default=32, show_default=True,
              help="Cells of an IVF index that a query reads.")  # fmt: skip
@click.option("--no-verify", is_flag=True, help="Do not check the hashes of the index.")
@worker_options
@data_dir_option
@plugin_options
@json_option
def search(
    folder: Path,
    prompt: str | None,
    response: str | None,
    queries_file: Path | None,
    layout: str,
    k: int,
    approximate: bool,
    probes: int,
    no_verify: bool,
    workers: int,
    ray: str | None,
    gpus: float,
    device: str,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Find the examples in FOLDER with the highest scores for a prompt.

    Or for every row of a file. Exact by default: every row is read once for all queries, and the
    score of the whole corpus as one group comes with the JSON. In a pipe there is one
    tab-separated line per example.
    """
    from tdabench.cli.trace import asked
    from tdabench.run.corpus_index import CorpusIndex, runner

    if (prompt is None) == (queries_file is None):
        raise UsageError(
            "search takes a prompt, or a file of them with --queries",
            'For example: tdabench index search idx "What is the capital of France?"',
        )
    device = chosen_device(device)
    discovered()
    about = read_json(folder / "index.json") if (folder / "index.json").is_file() else {}
    named = about if isinstance(about, dict) else {}
    method: Any = named.get("method")
    name = method.get("name") if isinstance(method, dict) else ""
    code = elsewhere.carried_out(
        [str(name)], foreign=elsewhere.is_foreign(str(named.get("suite"))),
        what="the index search", imports=True,
    )  # fmt: skip
    if code is not None:
        sys.exit(code)
    run = runner(workers, ray, gpus)
    index = CorpusIndex(folder, run, not (no_verify or approximate), device, data_dir)
    try:
        own = {"layout": layout, "fields": (), "empty": "error"}
        queries = asked(index.suite, index.declared, prompt, response, queries_file, own,
                        None, None, device)  # fmt: skip
        if approximate:
            found = index.approximate(queries, k, probes)
        else:
            found = index.search(queries, k)
    finally:
        index.close()
    if as_json:
        emit_json(_as_json(index, queries, found, approximate))
    elif sys.stdout.isatty():
        _print(index, queries, found)
    else:
        _print_lines(index, queries, found)


def _shards_done(done: int, total: int) -> None:
    elsewhere.step()
    print(f"tdabench: {done} of {total} shards", file=sys.stderr, flush=True)


def _examples(index: CorpusIndex, found: Hits, q: int) -> list[tuple[float, int, Example]]:
    """Yields (score, position, example) of each example found for query `q`."""
    pairs = zip(found.scores[q].tolist(), found.places[q].tolist())
    return [(s, i, index.train[i]) for s, i in pairs if i >= 0]


def _as_json(index: CorpusIndex, queries: Any, found: Hits, approximate: bool) -> dict[str, Any]:
    def shown(e: Example) -> dict[str, str]:
        return {"id": e.id, "prompt": e.prompt, "response": e.response, "task": e.task}

    rows = []
    for q, query in enumerate(queries):
        row: dict[str, Any] = {
            **shown(query),
            "examples": [
                {"score": s, "index": i, **shown(e)} for s, i, e in _examples(index, found, q)
            ],
        }
        if found.whole is not None and found.sums is not None:
            row |= {"corpus_score": float(found.whole[q]), "sum_of_scores": float(found.sums[q])}
        rows.append(row)
    return {
        "index": str(index.folder),
        "suite": index.suite.name,
        "method": index.about["method"]["label"],
        "n_train": index.index.n_train,
        "approximate": approximate,
        "seconds": round(found.seconds, 4),
        "queries": rows,
    }


def _print_lines(index: CorpusIndex, queries: Any, found: Hits) -> None:
    print("query", "rank", "score", "id", "prompt", "response", sep="\t")
    for q, query in enumerate(queries):
        for rank, (score, _, e) in enumerate(_examples(index, found, q), start=1):
            texts = [clean(t, 1000) for t in (e.id, e.prompt, e.response)]
            print(clean(query.id, 100), rank, f"{score:.6g}", *texts, sep="\t")


def _print(index: CorpusIndex, queries: Any, found: Hits) -> None:
    from rich.text import Text

    out = console()
    for q, query in enumerate(queries):
        out.print(Text(clean(query.prompt, 400), "bold"), Text(clean(query.response, 400), "cyan"))
        for rank, (score, _, e) in enumerate(_examples(index, found, q), start=1):
            line = Text(f"{rank:>4} {score:+.3g}  ")
            line.append(clean(e.prompt, 160)).append(" → ", "dim").append(clean(e.response, 80))
            line.append(f"  {clean(e.id, 40)}", "dim")
            out.print(line, soft_wrap=True)
    out.print(Text(f"{index.index.n_train:,} examples in {found.seconds:.2f} s", "dim"))
