"""Ranks and significant differences, from the bootstrap replicates in records.

`tdabench.stats` compares methods; this module reads its inputs from the records and caches the
result in the user's cache, under a key derived from the inputs, so that later boards print
immediately and load no statistics package. The cache is not in the run folder, which may be
untrusted, while cached results are trusted.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.errors import DataError, TdabenchError
from tdabench.io import fingerprint, read_json, write_json
from tdabench.run.record import Record, finite

if TYPE_CHECKING:
    from tdabench.stats import Bootstrap

ALPHA = 0.05
_VERSION = 2


@dataclass(frozen=True)
class Entry:
    """One method in one column: its value and its records, one per seed."""

    label: str
    value: float
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Ranks:
    """Places, ranks as intervals, letters, and the Holm-adjusted p of each pair of `labels`.

    `place` orders all methods by value, from 1. `span` is a method's rank as an interval: the
    best and the worst place among the methods that do not differ significantly from it. Two methods
    share one of `letters` if and only if they do not differ significantly. `labels` are the tested
    methods, best first; `p[i][j - i - 1]` is the pair (i, j), i < j. `interval` is the interval of
    a value averaged over several seeds. `untested` methods have no replicates (or unpaired ones):
    they have a place by their value and no letter.
    """

    place: Mapping[str, int]
    span: Mapping[str, tuple[int, int]]
    letters: Mapping[str, str]
    labels: tuple[str, ...]
    p: tuple[tuple[float, ...], ...]
    interval: Mapping[str, tuple[float, float]]
    untested: tuple[str, ...] = ()


def rank_column(entries: Sequence[Entry], higher: bool, cache: Path | None = None) -> Ranks:
    """Ranks the methods of one column, using the folder `cache` if it has the result."""
    entries = sorted(entries, key=lambda e: e.label)
    stored = [[e.label, e.value, [r.arrays_hash() for r in e.records]] for e in entries]
    key = fingerprint([_VERSION, ALPHA, higher, stored])
    path = cache / f"ranks-{key}.json" if cache else None
    if path and path.is_file() and (kept := _read(path, {e.label for e in entries})):
        return kept
    ranks = _compute(entries, higher)
    if path and entries:
        with contextlib.suppress(TdabenchError):  # in a read-only folder there is no cache
            write_json(path, asdict(ranks))
    return ranks


def _read(path: Path, labels: set[str]) -> Ranks | None:
    try:
        data = read_json(path)
        ranks = Ranks(
            {str(k): int(v) for k, v in data["place"].items()},
            {str(k): (int(v[0]), int(v[1])) for k, v in data["span"].items()},
            {str(k): str(v) for k, v in data["letters"].items()},
            tuple(str(v) for v in data["labels"]),
            tuple(tuple(float(v) for v in row) for row in data["p"]),
            {str(k): (float(v[0]), float(v[1])) for k, v in data["interval"].items()},
            tuple(str(v) for v in data["untested"]),
        )
    except (TdabenchError, AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None
    shape = [len(ranks.labels) - i - 1 for i in range(len(ranks.labels))]
    fits = labels == {*ranks.labels, *ranks.untested}
    fits = fits and all(set(m) == labels for m in (ranks.place, ranks.span, ranks.letters))
    return ranks if fits and [len(row) for row in ranks.p] == shape else None


def bootstrap_of(records: Sequence[Record], value: float) -> Bootstrap | None:
    """Returns a method's replicates, averaged over seeds; None if they are not stored."""
    from tdabench.stats import Bootstrap

    found = []
    for record in records:
        try:
            arrays = record.arrays()[0]
            b = Bootstrap.of_record(value, arrays["per_query"], arrays)
        except (TdabenchError, KeyError, IndexError, TypeError, ValueError):
            return None
        for a in b.replicates().values():
            if a.ndim != 1 or len(a) < 2 or len(a) != len(b.both) or not np.isfinite(a).all():
                return None
        found.append(b)
    try:
        return replace(Bootstrap.mean(found), value=value)
    except TdabenchError:
        return None


def _kind(b: Bootstrap) -> tuple[int, ...]:
    """What two statistics must share to be paired."""
    return (len(b.both), b.groups is None, b.tasks is None)


def _compute(entries: Sequence[Entry], higher: bool) -> Ranks:
    if not entries:
        return Ranks({}, {}, {}, (), (), {})
    from tdabench.stats import rank_methods, rank_spans

    drawn = {e.label: b for e in entries if (b := bootstrap_of(e.records, e.value)) is not None}
    kinds = [_kind(b) for b in drawn.values()]
    usual = max(set(kinds), key=lambda k: (kinds.count(k), k)) if kinds else None
    drawn = {k: b for k, b in drawn.items() if _kind(b) == usual}
    ranking = rank_methods(drawn, ALPHA, higher)
    labels, p = ranking.labels, ranking.p

    sign = 1.0 if higher else -1.0
    value = {e.label: sign * e.value for e in entries}
    place = {label: 1 + sum(v > mine for v in value.values()) for label, mine in value.items()}
    apart = np.array([[a != b and p[a, b] < ALPHA for b in labels] for a in labels], dtype=bool)
    spans = rank_spans([place[label] for label in labels], apart)
    untested = tuple(e.label for e in entries if e.label not in drawn)
    interval = {}
    for e in entries:
        if len(e.records) > 1 and e.label in drawn and (found := drawn[e.label].interval()):
            interval[e.label] = found
    return Ranks(
        place,
        {**{label: (place[label], place[label]) for label in untested}, **dict(zip(labels, spans))},
        {**dict.fromkeys(untested, ""), **dict(zip(labels, ranking.letters))},
        labels,
        tuple(tuple(round(p[a, b], 12) for b in labels[i + 1 :]) for i, a in enumerate(labels)),
        interval,
        untested,
    )


def pooled(records: Sequence[Record], metric: str) -> dict[str, Any]:
    """Averages a metric over seeds; returns the mean, and the interval if there is one seed.

    The result is empty if any record lacks the metric.
    """
    found = [r.metric(metric) for r in records]
    values = [v for m in found if (v := finite(m.get("value"))) is not None]
    if not values or len(values) < len(records):
        return {}
    one = found[0] if len(found) == 1 else {}
    return {
        "value": math.fsum(values) / len(values),
        "low": finite(one.get("low")),
        "high": finite(one.get("high")),
        "low_these_tasks": finite(one.get("low_these_tasks")),
        "high_these_tasks": finite(one.get("high_these_tasks")),
        "tasks": finite(found[0].get("tasks")),
        "higher": bool(found[0].get("higher_is_better", True)),
        "unit": str(found[0].get("unit") or ""),
        "spread": float(np.std(values, ddof=1)) if len(values) > 1 else None,
    }


def comparable(a: Sequence[Record], b: Sequence[Record]) -> None:
    """Raises DataError unless two cells measured the same quantity."""
    if a[0].what != b[0].what:
        raise DataError(
            f"{a[0].label} and {b[0].label} were measured differently on {a[0].benchmark_name}: "
            "version, parameters or truth differ",
            "Rerun both with: tdabench run",
        )
