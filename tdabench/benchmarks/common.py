"""Helpers shared by benchmarks: scores from an index, and metrics."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from tdabench.benchmark import Benchmark, BenchmarkContext, Metric, Outcome, Stored
from tdabench.data.behaviours import Behaviour
from tdabench.data.examples import Corpus
from tdabench.errors import DataError, MethodError
from tdabench.groups import Groups
from tdabench.io import fingerprint, keep_arrays, kept_arrays, sha256_bytes
from tdabench.method import Index

if TYPE_CHECKING:
    from tdabench.stats import Bootstrap, Ceiling, Scope
    from tdabench.truth.store import Truth

Arrays = Mapping[str, np.ndarray]  # by name
Texts = tuple[str, ...]

BLOCK = 16 << 20  # number of scores held at a time


class FromArrays(Benchmark):
    """A benchmark whose outcome follows from arrays that its record stores.

    `run` measures the arrays and passes them to `outcome`. `kept` matches their names from the
    beginning; other arrays of a record are computed from these.
    """

    kept: ClassVar[str]

    @abstractmethod
    def outcome(self, arrays: Arrays, query_ids: Texts, notes: Texts = ()) -> Outcome:
        """Computes metrics and per-query values from the measured arrays."""

    def recompute(self, stored: Stored) -> Outcome:
        arrays = {k: v for k, v in stored.arrays.items() if re.match(self.kept, k)}
        return self.outcome(arrays, stored.query_ids)


def outcome_of(
    metrics: Mapping[str, Metric],
    per_query: np.ndarray,
    boot: Bootstrap,
    arrays: Mapping[str, np.ndarray],
    query_ids: tuple[str, ...],
    notes: Sequence[str],
) -> Outcome:
    """Makes an Outcome: the first metric is primary, and `boot` has its replicates."""
    return Outcome(
        primary=next(iter(metrics)),
        metrics=metrics,
        per_query=per_query,
        query_ids=query_ids,
        replicates=boot.both,
        arrays={**arrays, **boot.arrays()},
        notes=tuple(notes),
    )


def score_blocks(index: Index, queries: Corpus, n_train: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields checked blocks of `index.score`: (slice of the queries, [block, train])."""
    step = max(1, BLOCK // max(1, n_train))
    for a in range(0, len(queries), step):
        part = queries[a : a + step]
        scores = np.asarray(index.score(part), dtype=np.float32)
        yield slice(a, a + len(part)), checked_scores(scores, (len(part), n_train))


def blocks_of(
    index: Index, sets: Sequence[Behaviour], queries: Corpus, n_train: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (slice, checked scores [block, train]) of behaviours, or of queries if there are none.

    Behaviours are scored one at a time: each may hold many examples.
    """
    if not sets:
        yield from score_blocks(index, queries, n_train)
    for i, b in enumerate(sets):
        scores = np.asarray(index.score_behaviours([b]), dtype=np.float32)
        yield slice(i, i + 1), checked_scores(scores, (1, n_train), "scores of behaviours")


def group_scores(index: Index, queries: Corpus, groups: Groups) -> np.ndarray:
    """Returns checked `index.score_groups`: float32 [query, group], finite."""
    scores = np.asarray(index.score_groups(queries, groups), dtype=np.float32)
    return checked_scores(scores, (len(queries), len(groups)), "group scores")


def scores_of_all(
    score: Callable[[Groups], np.ndarray], groups: Mapping[str, Groups]
) -> dict[str, np.ndarray]:
    """Returns scores [query, group] of several sets of groups, by name, from one call.

    A group's score does not depend on other requested groups, and queries are encoded once.
    """
    if not groups:
        return {}
    together = score(Groups.joined(list(groups.values())))
    ends = np.cumsum([len(g) for g in groups.values()])[:-1]
    return dict(zip(groups, np.split(together, ends, axis=1)))


def checked_scores(scores: np.ndarray, shape: tuple[int, ...], what: str = "scores") -> np.ndarray:
    """Returns `scores` if they have `shape` and are finite; raises MethodError otherwise."""
    if scores.shape != shape:
        raise MethodError(f"the method returned {what} of shape {scores.shape}, expected {shape}")
    bad = ~np.isfinite(scores).all(axis=tuple(range(1, scores.ndim)))
    if bad.any():
        raise MethodError(f"the method returned NaN or infinite {what} for {bad.sum()} queries")
    return scores


def ceiling_of(
    truth: Truth,
    replicates: int,
    context: BenchmarkContext | None,
    tasks: np.ndarray | None = None,
) -> Ceiling | None:
    """Returns `stats.noise_ceiling` of a truth, from the run's cache if it is there.

    It depends on the truth alone and takes longer than the LDS itself.
    """
    from tdabench import stats

    if context is None or context.cache is None or truth.n_seeds < 2:
        return stats.noise_ceiling(truth.by_seed(), replicates, tasks=tasks)
    held = np.ascontiguousarray(truth.losses)
    of = [] if tasks is None else tasks.tolist()
    content = sha256_bytes(held.tobytes())
    key = fingerprint([stats.CEILING_VERSION, content, held.shape, replicates, of])
    path = context.cache / f"ceiling-{key}.safetensors"
    if path.exists():
        try:
            arrays, meta = kept_arrays(path)
            return stats.Ceiling.of_arrays(arrays, meta) if arrays else None
        except (DataError, KeyError, TypeError):
            path.unlink(missing_ok=True)  # a damaged cache is ignored
    ceiling = stats.noise_ceiling(truth.by_seed(), replicates, tasks=tasks)
    keep_arrays(path, *(ceiling.as_arrays() if ceiling is not None else ({}, {})))
    return ceiling


def pack(name: str, rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Packs arrays [n, 4] of different lengths (`stats.tie_blocks`) into two, under `name`."""
    ends = np.cumsum([len(r) for r in rows], dtype=np.int64)
    return {name: np.concatenate(rows).astype(np.int32), f"{name}_end": ends}


def unpack(name: str, arrays: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Returns the arrays that `pack` stored."""
    return np.split(arrays[name].astype(np.int64), arrays[f"{name}_end"][:-1])


def tasks_of(queries: Corpus) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the tasks of queries as an array to store, `task` [query], and a note on them.

    Empty where they carry none. The note says when there are too few tasks for an interval that
    holds for new ones.
    """
    from tdabench import stats

    codes = stats.task_codes(queries.tasks)
    if codes is None:
        return {}, []
    few = stats.effective_tasks(codes) < stats.MIN_TASKS
    n = len(np.unique(codes))
    note = (
        f"too few tasks ({n}, effectively fewer than {stats.MIN_TASKS}) for claims on new tasks: "
        "intervals and tests hold for other queries of these tasks"
    )
    return {"task": codes}, [note] if few else []


def metric(
    boot: Bootstrap,
    clip: tuple[float, float] | None = None,
    higher_is_better: bool = True,
    unit: str = "",
    share: bool = False,
) -> Metric:
    """Makes a Metric from a statistic's replicates, with its interval clipped to its range.

    `clip` is the range that its values can take. A `share` is a mean of values that are 0 or 1
    and has Wilson's interval.
    """

    def ends(scope: Scope | None = None) -> tuple[float | None, float | None]:
        if share:
            return boot.share_interval(scope=scope) or (None, None)
        return boot.interval(scope=scope, within=clip) or (None, None)

    low, high = ends()
    out = Metric(boot.value, low, high, higher_is_better, unit)
    if boot.tasks is None:
        return out
    # The queries behind tasks that are the unit of all draws have no interval of their own.
    these = ends("these tasks") if boot.tasks is not boot.both else (None, None)
    return replace(out, tasks=boot.n_tasks, low_these_tasks=these[0], high_these_tasks=these[1])
