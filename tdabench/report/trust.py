"""How far to trust a method's scores: its LDS as a share of the noise ceiling, where measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdabench.errors import DataError
from tdabench.registry import registry
from tdabench.report.board import Board
from tdabench.report.records import Run, read_run
from tdabench.report.terminal import hang
from tdabench.run.plan import Job, MethodSpec, Plan, jsonable
from tdabench.run.record import Record, finite

if TYPE_CHECKING:
    from rich.console import Console

FIGURES = Path(__file__).parent / "assets" / "figures.json"


@dataclass(frozen=True)
class Trust:
    """A method's LDS, its share of the noise ceiling (None if unknown), and where it was measured.

    `here`: measured on this corpus and target with these parameters; otherwise the figure is one
    of those shipped with tdabench, of the suite and target that `where` names. `of` names the last
    stage of a pipeline that was never measured itself: the figure is of this stage alone.
    """

    lds: float
    share: float | None
    where: str
    here: bool
    of: str = ""


def trust(plan: Plan, jobs: Iterable[Job], runs: Iterable[Path]) -> dict[str, Trust]:
    """Returns what is known of each job's method, by label; nothing for methods never measured.

    `runs` are run folders, newest first. Without a record of the same corpus, target and
    parameters, the shipped figure of the same suite and target is used, or else of the first
    shipped target, pocket's main one.
    """
    records = list(_records(plan, runs))
    shipped: Mapping[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))
    out: dict[str, Trust] = {}
    for job in jobs:
        method = job.method
        last = method.stages[-1] if method.stages else method
        if known := _known(method, job, plan, records, shipped):
            out[method.label] = known
        elif method.stages and (known := _known(last, job, plan, records, shipped)):
            out[method.label] = replace(known, of=last.label)
    return out


def _known(
    method: MethodSpec,
    job: Job,
    plan: Plan,
    records: Iterable[Record],
    shipped: Mapping[str, Any],
) -> Trust | None:
    """Returns what is known of a method, or of a stage of a pipeline, on the target of `job`."""
    label = job.target.label
    params = jsonable(method.params)
    for r in records:
        same = r.method.get("name") == method.name and r.method.get("params") == params
        if same and r.target.get("fingerprint") == plan.fingerprints[label]:
            lds = finite(r.metric("lds").get("value"))
            share = finite(r.metric("share_of_ceiling").get("value"))
            if lds is not None:
                return Trust(lds, share, f"run {r.run}", True)
            break
    where = label if plan.suite.name == "pocket" and label in shipped else next(iter(shipped))
    figure = shipped[where].get(method.name)
    return Trust(figure["lds"], figure["share"], f"pocket {where}", False) if figure else None


def left_out(board: Board) -> list[str]:
    """Names the best method that a run of the default methods left out although it reaches more.

    It takes long: one line per table tells its shipped figures, and how to get the row.
    """
    if any(_chosen(run) for run in board.runs):
        return []
    shipped: Mapping[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))
    out = []
    for table in board.tables:
        figures = shipped.get(table.target, {}) if table.suite == "pocket" else {}
        there = {row.name for row in table.rows}
        best = max((figures[n]["lds"] for n in there if n in figures), default=None)
        if table.primary != "lds" or best is None:
            continue
        better = [n for n in figures if n in registry().methods and figures[n]["lds"] > best]
        if better:
            name = max(better, key=lambda n: figures[n]["lds"])
            f = figures[name]
            out.append(
                f"not run by default, as it takes minutes: {name}, {f['share']:.0%} of the "
                f"ceiling in docs/methods/fidelity.md ({f['build']} to build, {f['query']} per "
                f"query): tdabench run --target {table.target} --methods {name}"
            )
    return out


def _chosen(run: Run) -> bool:
    request = run.manifest.get("request")
    return not isinstance(request, Mapping) or request.get("methods") is not None


def print_left_out(board: Board, console: Console) -> None:
    """Prints these lines below a board."""
    from rich.text import Text

    for line in left_out(board):
        hang(console, Text(), Text(line, "dim"))


def _records(plan: Plan, runs: Iterable[Path]) -> Iterable[Record]:
    for folder in runs:
        try:
            records = read_run(folder).records
        except DataError:
            continue
        yield from (
            r for r in records
            if r.ok and r.benchmark.get("name") == "lds"
            and r.corpus.get("train") == plan.corpora["train"]
        )  # fmt: skip


def sentences(found: Mapping[str, Trust], labels: Iterable[str]) -> list[str]:
    """Returns one line per source: which share of the ceiling the methods `labels` reach."""
    labels = list(labels)
    by_source: dict[tuple[bool, str], list[str]] = {}
    for label in labels:
        if t := found.get(label):
            value = f"{t.share:.0%}" if t.share is not None else f"LDS {t.lds:.2f}"
            alone = f" ({t.of} alone)" if t.of else ""
            by_source.setdefault((not t.here, t.where), []).append(f"{label} {value}{alone}")
    lines = []
    for (shipped, where), values in sorted(by_source.items()):
        of = f"figures shipped for {where}; measure yours: tdabench run" if shipped else where
        lines.append(f"how far to trust (LDS as a share of the noise ceiling): "
                     f"{', '.join(values)} ({of})")  # fmt: skip
    if unknown := [x for x in labels if x not in found]:
        lines.append(f"never measured: {', '.join(unknown)} (tdabench run)")
    return lines
