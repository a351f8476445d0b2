"""`tdabench trace`: finds the training examples behind a model output."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tdabench.cli.common import (
    chosen_device,
    complete_methods,
    complete_suites,
    console,
    discovered,
    emit_json,
    json_option,
    own_data_options,
    plugin_options,
    warn,
    words,
)
from tdabench.errors import UsageError, notice, unknown

if TYPE_CHECKING:
    from tdabench.data import Example
    from tdabench.report.trust import Trust
    from tdabench.run.suite import Suite, SuiteTarget
    from tdabench.run.trace import Traced

DEFAULT = "airrep,trak"
SIDES = (
    ("most helpful: the highest scores (above 0)", "green"),
    ("most harmful: the lowest scores (below 0)", "red"),
)
NONE = ("no score above 0", "no score below 0")


@click.command(
    epilog="""\b
Examples:
  tdabench trace "What is the capital of France?"
  tdabench trace "What is the capital of France?" --retrain
  tdabench trace "What is the capital of France?" --response Paris --methods airrep,bm25,trak
  tdabench trace --queries questions.jsonl --methods tfidf --json
  tdabench trace "Who wrote it?" --model ./my-model --train train.jsonl --methods tfidf,trak
Indices come from a run of the suite, or are built once and cached.
"""
)
@click.argument("prompt", required=False)
@click.option("--response", help="The output to explain.  [default: the target's greedy answer]")
@click.option(
    "--queries",
    "queries_file",
    type=click.Path(path_type=Path),
    help="File of prompts and responses, instead of a prompt.",
)
@click.option(
    "--suite",
    metavar="NAME|FILE",
    shell_complete=complete_suites,
    help="Suite with training corpus and target.  [default: pocket]",
)
@click.option("--target", metavar="LABEL", help="Target.  [default: the suite's main one]")
@click.option(
    "--methods",
    metavar="A,B",
    shell_complete=complete_methods,
    help=f"Methods to show side by side.  [default: {DEFAULT}]",
)
@click.option("--set", "sets", multiple=True, metavar="METHOD.PARAM=VALUE", help="Set a parameter.")
@click.option(
    "-k", "k", type=click.IntRange(1, 1000), default=5, show_default=True,
    help="Examples to show per side.",
)  # fmt: skip
@click.option(
    "--checkpoint",
    help="Checkpoint of the target that answers.  [default: the one trained on the corpus, or the "
    "last]",
)
@click.option(
    "--retrain",
    is_flag=True,
    help="Let the target answer after training its base on the whole corpus by its recipe (once; "
    "kept in the cache).",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1 …")
@own_data_options
@plugin_options
@json_option
def command(
    prompt: str | None,
    response: str | None,
    queries_file: Path | None,
    suite: str | None,
    target: str | None,
    methods: str | None,
    sets: tuple[str, ...],
    k: int,
    checkpoint: str | None,
    retrain: bool,
    device: str,
    own: dict[str, Any],
    as_json: bool,
) -> int:
    """Show the most helpful and most harmful training examples for a model output.

    Several methods are shown side by side. Positive scores help: training on the example lowers
    the loss of the response. Each method has its own scale.
    """
    from tdabench.run.plan import Request, plan_indices
    from tdabench.run.trace import trace

    if (prompt is None) == (queries_file is None):
        raise UsageError(
            "trace takes a prompt, or a file of them with --queries",
            'For example: tdabench trace "What is the capital of France?"',
        )
    device = chosen_device(device)
    discovered()
    if own["model"] or own["train"]:
        from tdabench.run.own import own_suite

        suite = str(own_suite(own, queries=None).path)
    request = Request(
        suite=suite or "pocket",
        methods=words(methods or DEFAULT),
        targets=words(target),
        sets=sets,
        device=device,
    )
    plan = plan_indices(request, data_dir=own["data_dir"])
    for line in plan.suite.missing:
        warn(line)
    if len(plan.targets) > 1:
        labels = [t.label for t in plan.targets]
        raise UsageError(
            f"the suite has the targets {', '.join(labels)}", f"Name one: --target {labels[0]}"
        )
    if retrain and (checkpoint or response is not None or queries_file is not None):
        raise UsageError(
            "--retrain chooses the model that answers", "Leave out --checkpoint, or the response"
        )
    queries = asked(plan.suite, plan.targets[0], prompt, response, queries_file, own,
                    checkpoint, retrain, device)  # fmt: skip
    from tdabench.report.records import runs_in
    from tdabench.report.trust import sentences, trust

    runs = runs_in(Path("runs"))
    indices = [f for f in runs if (f / "indices").is_dir()]
    found = list(trace(plan, queries, k, indices, say=notice, progress=_silent))
    known = trust(plan, plan.builds, runs)
    if as_json:
        emit_json(_as_json(plan.suite, queries, found, known))
        return 1 if all(f.reason for f in found) else 0
    if sys.stdout.isatty():
        _print(plan.suite, queries, found)
    else:
        _print_lines(plan.suite, queries, found)
    for line in sentences(known, [f.label for f in found if not f.reason]):
        notice(line)
    return 1 if all(f.reason for f in found) else 0


def _silent(what: str, done: int, total: int) -> None:
    """Discards progress."""


def asked(
    suite: Suite,
    declared: SuiteTarget,
    prompt: str | None,
    response: str | None,
    file: Path | None,
    own: Mapping[str, Any],
    checkpoint: str | None,
    retrain: bool | None,
    device: str,
) -> Sequence[Example]:
    """Returns the queries that a command was asked: a prompt with its response, or a file.

    Says on stderr which model answers, and whether it was trained on the suite's corpus. `retrain`
    is None for a command without that option.
    """
    from tdabench.data import Example, read_corpus
    from tdabench.run.own import reading_of

    if file is not None:
        if response is not None:
            raise UsageError("--response belongs to a prompt", "The file has its own responses")
        return read_corpus(file, reading_of(own), stream=False)
    assert prompt is not None
    if response is None:
        from tdabench.run.trace import answer, retrained

        target = declared.target
        if retrain:
            target = retrained(declared, suite.train, device, notice)
        name = checkpoint or ("" if retrain else declared.trained) or list(target.checkpoints)[-1]
        if name not in target.checkpoints:
            raise unknown(f"checkpoint of {target.name}", name, target.checkpoints)
        response = answer(target, prompt, name, device)
        if not response:
            raise UsageError(
                f"{target.name} (checkpoint {name}) gives no answer to this prompt",
                "Give the output to explain with --response",
            )
        notice(f"{target.name} (checkpoint {name}) answers: {_clean(response, 300)}")
        if not retrain and name != declared.trained:
            examples = f"the {len(suite.train):,} examples"
            notice(
                f"scores explain this answer only if {target.name} was trained on {examples} of "
                f"{own['train']}, which tdabench cannot check"
                if own.get("train")
                else f"suite {suite.name} does not declare this checkpoint as trained on "
                f"{examples} below: they are examples that would help or harm, not those behind "
                "this answer" + ("" if retrain is None else " (a model trained on them: --retrain)")
            )
    if not response.strip():
        raise UsageError("the response is empty", "There is nothing to explain")
    return [Example("query", prompt, response)]


def _clean(text: str, limit: int) -> str:
    from tdabench.report.text import clean

    return clean(text, limit)


def _sides(found: Traced, q: int) -> list[tuple[str, list[tuple[float, int]]]]:
    assert found.top is not None
    assert found.top_score is not None
    assert found.bottom is not None
    assert found.bottom_score is not None
    top = zip(found.top_score[q].tolist(), found.top[q].tolist())
    bottom = zip(found.bottom_score[q].tolist(), found.bottom[q].tolist())
    # Among few examples the lowest scores are also the highest: only the sign tells the sides.
    return [
        ("helpful", [(s, i) for s, i in top if s > 0]),
        ("harmful", [(s, i) for s, i in bottom if s < 0]),
    ]


def _as_json(
    suite: Suite, queries: Sequence[Example], found: list[Traced], known: Mapping[str, Trust]
) -> dict[str, Any]:
    def shown(e: Example) -> dict[str, str]:
        return {"id": e.id, "prompt": e.prompt, "response": e.response, "task": e.task}

    rows: list[dict[str, Any]] = []
    for q, query in enumerate(queries):
        methods: dict[str, Any] = {}
        for f in found:
            if f.reason:
                methods[f.label] = {"error": f.reason}
                continue
            methods[f.label] = {
                side: [{"score": s, "index": i, **shown(suite.train[i])} for s, i in items]
                for side, items in _sides(f, q)
            }
        rows.append({**shown(query), "methods": methods})
    return {
        "suite": suite.name,
        "n_train": len(suite.train),
        "queries": rows,
        "trust": {
            label: {"lds": t.lds, "share_of_ceiling": t.share, "where": t.where, "here": t.here}
            for label, t in known.items()
        },
        "seconds": {
            f.label: {"index": round(f.index_seconds, 3), "query": round(f.query_seconds, 4)}
            for f in found
        },
    }


def _print_lines(suite: Suite, queries: Sequence[Example], found: list[Traced]) -> None:
    """Prints one tab-separated line per example, for grep and cut."""
    print("query", "method", "side", "rank", "score", "id", "prompt", "response", sep="\t")
    for q, query in enumerate(queries):
        for f in found:
            if f.reason:
                continue
            for side, items in _sides(f, q):
                for rank, (score, i) in enumerate(items, start=1):
                    e = suite.train[i]
                    texts = [_clean(t, 1000) for t in (e.id, e.prompt, e.response)]
                    line = [_clean(query.id, 100), f.label, side, rank, f"{score:.6g}", *texts]
                    print(*line, sep="\t")
    _print_failures(found)


def _print(suite: Suite, queries: Sequence[Example], found: list[Traced]) -> None:
    """Prints a table per side and a column per method, stacked if the terminal is narrow."""
    from rich.table import Table
    from rich.text import Text

    out = console()
    working = [f for f in found if not f.reason]
    per_row = max(1, out.width // 36)
    for q, query in enumerate(queries):
        head = Text(_clean(query.prompt, 400), "bold")
        head.append("\n→ ", "dim")
        head.append(_clean(query.response, 400), "bold cyan")
        out.print(head)
        for a in range(0, len(working), per_row):
            part = working[a : a + per_row]
            for n, (side, style) in enumerate(SIDES):
                table = Table(box=None, pad_edge=False, expand=True, title_justify="left",
                              title=Text(side, f"bold {style}"))  # fmt: skip
                table.add_column("", width=3, justify="right", style="dim")
                for f in part:
                    table.add_column(Text(f.label), ratio=1, overflow="fold")
                columns = [_sides(f, q)[n][1] for f in part]
                if not any(columns):
                    names = ", ".join(f.label for f in part)
                    out.print()
                    out.print(Text(f"{side.partition(':')[0]}: {NONE[n]} ({names})", "dim"))
                    continue
                for rank in range(max(len(c) for c in columns)):
                    cells = [_example(suite, *c[rank], style) if rank < len(c)
                             else Text("" if c or rank else NONE[n], "dim")
                             for c in columns]  # fmt: skip
                    table.add_row(Text(str(rank + 1)), *cells)
                out.print()
                out.print(table)
        out.print()
    times = ", ".join(
        f"{f.label} {f.query_seconds:.2f} s" + (f" (index {f.index_seconds:.1f} s)"
                                                if f.index_seconds else "")
        for f in working
    )  # fmt: skip
    if times:
        out.print(Text(f"{len(suite.train):,} training examples of {suite.name}; {times}. "
                       "Each method has its own scale.", "dim"))  # fmt: skip
    _print_failures(found)


def _example(suite: Suite, score: float, i: int, style: str) -> Any:
    from rich.text import Text

    e = suite.train[i]
    text = Text(f"{score:+.3g} ", style)
    text.append(_clean(e.prompt, 160))
    text.append(" → ", "dim")
    text.append(_clean(e.response, 80), "bold")
    text.append(f"  {_clean(e.id, 40)}" + (f" · {_clean(e.task, 40)}" if e.task else ""), "dim")
    return text


def _print_failures(found: list[Traced]) -> None:
    for f in found:
        if f.reason:
            warn(f"{f.label}: {f.reason}")
