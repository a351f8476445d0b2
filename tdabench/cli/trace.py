"""`tdabench trace`: finds the training examples behind a model output."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tdabench.cli import elsewhere
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
    from tdabench.groups import Groups
    from tdabench.report.trust import Trust
    from tdabench.run.suite import Suite, SuiteTarget
    from tdabench.run.trace import Query, Traced

DEFAULT = "airrep,trak"
# Of different kinds, with an answer within a minute on 10,000 examples: neither needs gradients of
# the whole corpus, nor an encoder that was trained for the model.
DEFAULT_OWN = "bm25,bm25>identity@200"
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
  tdabench trace "What is the capital of France?" --response Paris --against Lyon
  tdabench trace --behaviour rude-answers.jsonl --by source --html why.html
  tdabench trace "What is 7 + 5?" --methods 'bm25,bm25>ekfac@200'
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
    "--against",
    metavar="TEXT",
    help="Another response: explain why the model gives the first and not this one.",
)
@click.option(
    "--behaviour",
    "behaviour_file",
    type=click.Path(path_type=Path),
    help="File of examples of one behaviour (or several, by a field `behaviour`), explained "
    "together.",
)
@click.option(
    "--by",
    metavar="FIELD",
    help="Sum up by source as well: `source`, `task`, or another field of the training examples.",
)
@click.option(
    "--words",
    "with_words",
    is_flag=True,
    help="Mark the words of helpful examples, and of the query, that carry their scores: what the "
    "scores lose without each.",
)
@click.option(
    "--html", "html_file", type=click.Path(path_type=Path), help="Write the answer as a page."
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
    help=f"Methods to show side by side.  [default: {DEFAULT}; with --train {DEFAULT_OWN}]",
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
    against: str | None,
    behaviour_file: Path | None,
    by: str | None,
    with_words: bool,
    html_file: Path | None,
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
    the loss of the response. Each method has its own scale. Near-duplicates are shown once.
    """
    from tdabench.report.traced import SPARE
    from tdabench.run.plan import Request, plan_indices
    from tdabench.run.trace import trace

    if sum(x is not None for x in (prompt, queries_file, behaviour_file)) != 1:
        raise UsageError(
            "trace takes a prompt, or a file of them with --queries, or --behaviour",
            'For example: tdabench trace "What is the capital of France?"',
        )
    if against is not None and prompt is None:
        raise UsageError("--against belongs to a prompt", "In a file it is the field `against`")
    device = chosen_device(device)
    discovered()
    if html_file is not None:
        from tdabench.report.html import check_place

        check_place(html_file, "trace")
    code = elsewhere.carried_out(
        words(methods or DEFAULT) or (),
        foreign=bool(own["model"] or own["train"]) or elsewhere.is_foreign(suite),
        what="the trace",
    )
    if code is not None:
        return code
    if own["model"] or own["train"]:
        from tdabench.run.own import own_suite

        suite = str(own_suite(own, queries=None).path)
    request = Request(
        suite=suite or "pocket",
        methods=words(methods or (DEFAULT_OWN if own["model"] or own["train"] else DEFAULT)),
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
    file = queries_file or behaviour_file
    if retrain and (checkpoint or response is not None or file is not None):
        raise UsageError(
            "--retrain chooses the model that answers", "Leave out --checkpoint, or the response"
        )
    from tdabench.report.records import runs_in
    from tdabench.report.trust import sentences, trust
    from tdabench.run.contestants import Contestants

    stages = [s.name for job in plan.builds for s in job.method.stages or (job.method,)]
    with Contestants(stages) as contestants:  # before a model answers
        queries = asked(plan.suite, plan.targets[0], prompt, response, file, own,
                        checkpoint, retrain, device)  # fmt: skip
        runs = runs_in(Path("runs"))
        indices = [f for f in runs if (f / "indices").is_dir()]
        asked_for = queries_to_explain(queries, against, behaviour_file)
        sources, groups = _sources(plan.suite.train, by)
        most = min(len(plan.suite.train), SPARE * k)
        found = []
        words_of = 2 * k if with_words else 0
        for one in trace(plan, asked_for, most, indices, notice, _silent, groups, words_of,
                         contestants):  # fmt: skip
            found.append(one)
            elsewhere.step()
    known = trust(plan, plan.builds, runs)
    answer = _answer(plan.suite, asked_for, found, known, k, sources, groups)
    told = sentences(known, [f.label for f in found if not f.reason])
    if html_file is not None:
        from tdabench.io import write_text
        from tdabench.report.traced import page

        write_text(html_file, page({**answer, "notes": [*answer["notes"], *told]}))
        notice(f"written to {html_file}")
    if as_json:
        emit_json(answer)
        return 1 if all(f.reason for f in found) else 0
    if sys.stdout.isatty():
        _print(answer)
    elif html_file is None:
        _print_lines(answer)
    _print_failures(found)
    for line in told:
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


def queries_to_explain(
    queries: Sequence[Example], against: str | None = None, behaviour: Path | None = None
) -> list[Query]:
    """Returns what is explained: queries one by one, as contrasts, or the behaviours of a file."""
    from dataclasses import replace

    from tdabench.data.behaviours import Behaviour, behaviours_of

    if against is not None:
        if not against.strip():
            raise UsageError("--against is empty", "Give the other response")
        queries = [replace(q, meta={**q.meta, "against": against}) for q in queries]
    if behaviour is not None:
        if any(q.meta.get("behaviour") for q in queries):
            return list(behaviours_of(queries, "behaviour"))
        return [Behaviour.of(behaviour.name.partition(".")[0], queries)]
    return [Behaviour.of(q.id, [q]) if q.meta.get("against") else q for q in queries]


def _sources(train: Sequence[Example], by: str | None) -> tuple[list[str], Groups | None]:
    """Returns names of sources and their groups of training examples; none without `by`."""
    if by is None:
        return [], None
    from tdabench.data.origins import members_by_origin
    from tdabench.groups import Groups

    members = members_by_origin(train, by)
    return list(members), Groups.of(members.values(), len(train))


def _answer(
    suite: Suite,
    queries: Sequence[Query],
    found: list[Traced],
    known: Mapping[str, Trust],
    k: int,
    sources: Sequence[str] = (),
    groups: Groups | None = None,
) -> dict[str, Any]:
    """Returns all that is shown, as JSON; see docs/trace.md."""
    from tdabench.report import traced
    from tdabench.run.trace import as_behaviour

    def shown(e: Query) -> dict[str, str]:
        return {"id": e.id, "prompt": e.prompt, "response": e.response, "task": e.task}

    rows: list[dict[str, Any]] = []
    for q, query in enumerate(queries):
        methods: dict[str, Any] = {}
        for f in found:
            if f.reason:
                methods[f.label] = {"error": f.reason}
                continue
            told: dict[str, Any] = {"share": {}, "kinds": {}}
            for n, (side, items) in enumerate(zip(("helpful", "harmful"), traced.sides(f, q))):
                chosen = traced.folded(suite.train, items, k)
                told[side] = [
                    {
                        "score": s.score,
                        "index": s.index,
                        **shown(suite.train[s.index]),
                        "copies": [suite.train[i].id for i in s.copies],
                        **traced.words(suite.train[s.index], f.words.get((q, s.index))),
                    }
                    for s in chosen
                ]
                told["share"][side] = traced.share(f, q, chosen, n)
                told["kinds"][side] = traced.kinds(suite.train, chosen)
            if groups is not None and f.by_source is not None:
                told["sources"] = traced.source_rows(sources, groups.sizes.tolist(),
                                                     f.by_source[q], k)  # fmt: skip
            if q in f.query_words:
                (own, *_), _ = as_behaviour(query).sides
                told["query_words"] = traced.words(own, f.query_words[q])["words"]
            methods[f.label] = told
        pairs = traced.agreements(found, q, traced.SPARE * k, len(suite.train))
        rows.append(
            {
                **shown(query),
                "methods": methods,
                "agreement": pairs,
                "notes": [traced.agreement_line(p) for p in pairs],
            }
        )
    times = ", ".join(
        f"{f.label} {f.query_seconds:.2f} s"
        + (f" (index {f.index_seconds:.1f} s)" if f.index_seconds else "")
        for f in found
        if not f.reason
    )
    return {
        "suite": suite.name,
        "n_train": len(suite.train),
        "queries": rows,
        "trust": {
            label: {
                "lds": t.lds,
                "share_of_ceiling": t.share,
                "where": t.where,
                "here": t.here,
                "of": t.of or label,
            }
            for label, t in known.items()
        },
        "seconds": {
            f.label: {"index": round(f.index_seconds, 3), "query": round(f.query_seconds, 4)}
            for f in found
        },
        "notes": [
            f"{len(suite.train):,} training examples of {suite.name}; {times}. Each method has its "
            "own scale."
        ]
        if times
        else [],
    }


def _print_lines(answer: dict[str, Any]) -> None:
    """Prints one tab-separated line per example or source, for grep and cut."""
    print("query", "method", "side", "rank", "score", "id", "prompt", "response", sep="\t")
    for query in answer["queries"]:
        for label, told in query["methods"].items():
            if "error" in told:
                continue
            first = [_clean(query["id"], 100), label]
            for side in ("helpful", "harmful"):
                for rank, e in enumerate(told[side], start=1):
                    texts = [_clean(e[t], 1000) for t in ("id", "prompt", "response")]
                    print(*first, side, rank, f"{e['score']:.6g}", *texts, sep="\t")
            for rank, r in enumerate(told.get("sources", ()), start=1):
                texts = [_clean(r["source"], 1000), f"{r['examples']} examples", ""]
                print(*first, "source", rank, f"{r['score']:.6g}", *texts, sep="\t")


def _print(answer: dict[str, Any]) -> None:
    """Prints a table per side and a column per method, stacked if the terminal is narrow."""
    from rich.table import Table
    from rich.text import Text

    out = console()
    per_row = max(1, out.width // 36)
    for query in answer["queries"]:
        head = Text(_clean(query["prompt"], 400), "bold")
        head.append("\n→ ", "dim")
        head.append(_clean(query["response"], 400), "bold cyan")
        out.print(head)
        working = [(m, told) for m, told in query["methods"].items() if "error" not in told]
        for label, told in working:
            if told.get("query_words"):
                line = Text(f"{_clean(label, 60)}, words of the query: ", "dim")
                out.print(_marked(line, told["query_words"]))
        for a in range(0, len(working), per_row):
            part = working[a : a + per_row]
            for n, (side, (title, style)) in enumerate(zip(("helpful", "harmful"), SIDES)):
                table = Table(box=None, pad_edge=False, expand=True, title_justify="left",
                              title=Text(title, f"bold {style}"))  # fmt: skip
                table.add_column("", width=3, justify="right", style="dim")
                for label, _ in part:
                    table.add_column(Text(label), ratio=1, overflow="fold")
                columns = [told[side] for _, told in part]
                if not any(columns):
                    names = ", ".join(label for label, _ in part)
                    out.print()
                    out.print(Text(f"{title.partition(':')[0]}: {NONE[n]} ({names})", "dim"))
                    continue
                for rank in range(max(len(c) for c in columns)):
                    cells = [_example(c[rank], style) if rank < len(c)
                             else Text("" if c or rank else NONE[n], "dim")
                             for c in columns]  # fmt: skip
                    table.add_row(Text(str(rank + 1)), *cells)
                if columns:
                    table.add_row(Text(), *[Text(_summary(told, side), "dim") for _, told in part])
                out.print()
                out.print(table)
            if any(told.get("sources") for _, told in part):
                table = Table(box=None, pad_edge=False, expand=True, title_justify="left",
                              title=Text("by source: score of all its examples (per example)",
                                         "bold"))  # fmt: skip
                for label, _ in part:
                    table.add_column(Text(label), ratio=1, overflow="fold")
                rows = [told.get("sources", []) for _, told in part]
                for rank in range(max(len(r) for r in rows)):
                    table.add_row(*[_source(r[rank]) if rank < len(r) else Text() for r in rows])
                out.print()
                out.print(table)
        for line in query["notes"]:
            out.print(Text(line, "dim"))
        out.print()
    for line in answer["notes"]:
        out.print(Text(line, "dim"))


def _summary(told: dict[str, Any], side: str) -> str:
    """Returns what the shown examples hold of all such scores, and where they come from."""
    held = told["share"].get(side)
    parts = [f"{held:.0%} of all such scores"] if held is not None else []
    if kinds := told["kinds"].get(side):
        named = ", ".join(f"{_clean(name, 30)} {n}" for name, n in kinds[:4])
        parts.append(f"from {named}")
    return "; ".join(parts)


def _source(row: dict[str, Any]) -> Any:
    from rich.text import Text

    text = Text(f"{row['score']:+.3g} ", "green" if row["score"] > 0 else "red")
    text.append(_clean(row["source"], 60))
    return text.append(f"  {row['examples']:,} examples, {row['each']:+.2g} each", "dim")


def _example(e: dict[str, Any], style: str) -> Any:
    from rich.text import Text

    text = Text(f"{e['score']:+.3g} ", style)
    if "words" in e:
        _marked(text, e["words"])
    else:
        text.append(_clean(e["prompt"], 160))
        text.append(" → ", "dim")
        text.append(_clean(e["response"], 80), "bold")
    text.append(f"  {_clean(e['id'], 40)}" + (f" · {_clean(e['task'], 40)}" if e["task"] else ""),
                "dim")  # fmt: skip
    if e["copies"]:
        text.append(f" · and {len(e['copies'])} nearly the same", "dim")
    return text


def _marked(text: Any, words: Sequence[Mapping[str, Any]]) -> Any:
    """Appends words to a text, those with at least half of the highest score reversed."""
    strong = max((w["score"] for w in words), default=0.0) / 2
    for w in words:
        style = "reverse" if w["score"] >= strong > 0 else ""
        text.append("→ " if w.get("first") else "", "dim")
        text.append(_clean(w["word"], 40), f"bold {style}" if w["side"] == "response" else style)
        text.append(" ")
    return text


def _print_failures(found: list[Traced]) -> None:
    for f in found:
        if f.reason:
            warn(f"{f.label}: {f.reason}")
