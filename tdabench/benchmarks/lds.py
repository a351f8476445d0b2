"""LDS: whether group scores rank groups in the same order as retraining on them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from tdabench.benchmark import Benchmark, BenchmarkContext, Metric, Outcome, Stored
from tdabench.benchmarks.beyond import known_ranks, with_beyond
from tdabench.benchmarks.common import (
    ceiling_of,
    checked_scores,
    group_scores,
    metric,
    scores_of_all,
    tasks_of,
)
from tdabench.data.examples import Corpus
from tdabench.errors import DataError, UsageError
from tdabench.groups import Groups
from tdabench.seeds import named_seed
from tdabench.truth.smoothness import seed_agreement
from tdabench.truth.store import Truth
from tdabench.truth.until import stopped_in_words


@dataclass(frozen=True)
class RanksGroups(Benchmark):
    """A benchmark that ranks the groups of one truth, and of further truths that `also` names.

    A further truth (such as groups of another size) adds `name[truth]` and its own ceiling without
    changing the headline value; one that the target lacks is noted.

    With `queries`, only so many of the suite's queries are asked, for methods that take a minute
    per query. They are drawn by their ids alone and spread over tasks, and each larger number
    includes the smaller ones. Values on other queries have their own column.

    truth       name of the suite's truth
    also        names of further truths, such as groups of another size
    replicates  bootstrap replicates behind each interval
    queries     number of queries; 0: all
    """

    truth: str = ""
    also: tuple[str, ...] = ()
    replicates: int = 1000
    queries: int = 0

    def __post_init__(self) -> None:
        if self.queries < 0:
            raise UsageError(f"{self.name}.queries must be at least 0, not {self.queries}")

    @property
    def params(self) -> dict[str, Any]:
        # "All" is not part of a cell's name: which queries there are, its queries say.
        return {k: v for k, v in super().params.items() if k != "queries" or v}

    def asked(self, queries: Corpus) -> Corpus:
        return queries.subset(spread(queries, self.queries)) if self.queries else queries

    @abstractmethod
    def group_scores(self, context: BenchmarkContext, groups: Groups) -> np.ndarray:
        """Computes the scores to compare with the truth of `groups`: float32 [query, group]."""

    def run(self, context: BenchmarkContext) -> Outcome:
        truth, notes = usable(context.truth(self.truth), context.queries)
        truths = {self.truth: truth}
        for name in self.also:
            try:
                truths[name], more = usable(context.truth(name), context.queries)
                notes += [f"{name}: {n}" for n in more]
            except UsageError as e:
                notes.append(f"{name}: not measured ({e.message})")
        scores = scores_of_all(
            lambda groups: self.group_scores(context, groups),
            {name: t.groups for name, t in truths.items()},
        )
        tasks, few = tasks_of(context.queries)
        return self._outcome(truths, scores, notes + few, tasks.get("task"), context)

    def recompute(self, stored: Stored) -> Outcome:
        truths, scores, notes = {}, {}, []
        for name in (self.truth, *self.also):
            key = "group_scores" if name == self.truth else f"group_scores[{name}]"
            if key in stored.arrays:
                truths[name], more = usable(stored.truth(name), stored.query_ids)
                notes += more
                shape = (len(truths[name].query_ids), len(truths[name].groups))
                scores[name] = checked_scores(np.asarray(stored.arrays[key]), shape, "group scores")
        return self._outcome(truths, scores, notes, stored.arrays.get("task"))

    def _outcome(
        self,
        truths: Mapping[str, Truth],
        scores: Mapping[str, np.ndarray],
        notes: list[str],
        tasks: np.ndarray | None = None,
        context: BenchmarkContext | None = None,
    ) -> Outcome:
        found = {
            name: rank_outcome(self.name, scores[name], truth, self.replicates, tasks, context)
            for name, truth in truths.items()
        }
        main = found.pop(self.truth)
        metrics, arrays, notes = dict(main.metrics), dict(main.arrays), [*notes, *main.notes]
        for name, other in found.items():
            for kept in (self.name, "ceiling", "share_of_ceiling", "additive_ceiling"):
                if kept in other.metrics:
                    metrics[f"{kept}[{name}]"] = other.metrics[kept]
            arrays[f"group_scores[{name}]"] = scores[name]
            notes += [f"{name}: {n}" for n in other.notes]
        return replace(main, metrics=metrics, arrays=arrays, notes=tuple(notes))


@dataclass(frozen=True)
class LDS(RanksGroups):
    """Linear datamodelling score (arXiv 2303.14186).

    For each query, Spearman's correlation over groups between the method's group scores and
    minus the query's loss after retraining on the group, averaged over training seeds; then the
    mean over queries. `truth` names the suite's truth, `replicates` is the number of bootstrap
    replicates, and `also` names further truths to report, such as groups of other sizes.
    """

    name: ClassVar[str] = "lds"
    title: ClassVar[str] = "LDS"
    headline: ClassVar[bool] = True
    version: ClassVar[int] = 2
    summary: ClassVar[str] = "rank correlation of group scores with retraining, over random groups"
    source: ClassVar[str] = "Park et al. 2023, arXiv 2303.14186"
    truth_kind: ClassVar[str | None] = "lds"

    truth: str = "lds"

    def group_scores(self, context: BenchmarkContext, groups: Groups) -> np.ndarray:
        return group_scores(context.index, context.queries, groups)

    def run(self, context: BenchmarkContext) -> Outcome:
        out = super().run(context)
        truth, _ = usable(context.truth(self.truth), context.queries)
        return with_beyond(out, truth, known_ranks(context, truth.groups), self.replicates)

    def recompute(self, stored: Stored) -> Outcome:
        out = super().recompute(stored)
        if "known_ranks" not in stored.arrays:
            return out
        truth, _ = usable(stored.truth(self.truth), stored.query_ids)
        return with_beyond(out, truth, stored.arrays["known_ranks"], self.replicates)


def spread(queries: Corpus, n: int) -> list[int]:
    """Returns the places of n queries: the first of every task, then the second, by hashed ids."""
    order = sorted(range(len(queries)), key=lambda i: named_seed(0, f"asked-{queries[i].id}"))
    turn: dict[str | None, int] = {}
    turns = {}
    for i in order:
        turns[i] = turn[queries[i].task] = turn.get(queries[i].task, -1) + 1
    return sorted(sorted(order, key=lambda i: turns[i])[:n])  # stable: hashed within a turn


def usable(truth: Truth, queries: Corpus | Sequence[str]) -> tuple[Truth, list[str]]:
    """Returns a truth for these queries (or query ids) without failed groups, and notes on both.

    Raises DataError if it lacks a query, or if fewer than two groups are left to rank.
    """
    ids = queries.ids if isinstance(queries, Corpus) else list(queries)
    truth = truth.for_queries(ids)
    failed = ~np.isfinite(truth.losses).all(axis=(1, 2))
    keep = np.flatnonzero(~failed)
    notes = []
    if failed.any():
        notes.append(f"{failed.sum()} groups whose retraining failed are left out")
        groups = Groups.of((truth.groups[int(g)] for g in keep), truth.groups.n_train)
        truth = Truth(truth.losses[keep], groups, truth.query_ids, truth.plan)
    if len(truth.groups) < 2 or not len(queries):
        raise DataError(
            f"the truth {truth.plan.get('name', '')!r} leaves {len(truth.groups)} groups and "
            f"{len(queries)} queries, and ranking needs two groups and a query",
        )
    return truth, notes


def rank_outcome(
    name: str,
    scores: np.ndarray,
    truth: Truth,
    replicates: int,
    tasks: np.ndarray | None = None,
    context: BenchmarkContext | None = None,
) -> Outcome:
    """Compares scores [query, group] with a truth; the Outcome's primary metric is `name`.

    `tasks` [query] are the clusters of intervals and tests that hold for new tasks.
    """
    from tdabench import stats

    notes = []
    values = truth.values
    per_query = stats.spearman_rows(scores, values)
    boot = stats.bootstrap_lds(scores, values, replicates, tasks=tasks)
    flat = int(stats.constant_rows(scores).sum())
    if flat:
        notes.append(f"{flat} of {len(scores)} queries have constant scores and count as 0")
    metrics = {
        name: metric(boot, clip=(-1.0, 1.0)),
        "constant_queries": Metric(float(flat), higher_is_better=False),
        "truth_seeds": Metric(float(truth.n_seeds)),
    }
    # Chance components of the value by source. The method's own seeds are not included: they
    # show in the spread between cells.
    found = stats.variance_sources(boot, scores, truth.by_seed())
    parts = {
        "tasks": found.tasks,
        "queries": found.queries,
        "groups": found.groups,
        "truth_seeds": found.truth_seeds,
    }
    metrics |= {
        f"sd_{k}": Metric(float(np.sqrt(v)), higher_is_better=False)
        for k, v in parts.items()
        if v is not None
    }
    arrays = {"group_scores": scores, **boot.arrays()}
    if tasks is not None:
        arrays["task"] = tasks
    agreed = seed_agreement(truth)
    if agreed is not None:
        metrics["seed_agreement"] = Metric(agreed)
    if stopped := truth.plan.get("stopped"):
        notes.append(f"the truth was {stopped_in_words(stopped)}")
    smooth = truth.plan.get("metasmoothness")
    if isinstance(smooth, Mapping) and isinstance(smooth.get("value"), float):
        metrics["metasmoothness"] = Metric(smooth["value"])
    single = truth.plan.get("order") == "pool"
    if single and truth.n_seeds > 1:
        run = stats.bootstrap_lds(scores, truth.by_seed()[0], replicates, tasks=tasks)
        metrics[f"{name}[run]"] = metric(run, clip=(-1.0, 1.0))
        notes.append(
            f"{name} is of the expected loss over {truth.n_seeds} seeds; {name}[run] of the run of "
            "the first seed alone, in its order, which methods that follow that run predict"
        )
    elif single:
        notes.append(
            "the truth is of single runs (one seed and one order): how far runs differ, and "
            "therefore a noise ceiling, is unknown; only a method that follows that run "
            "(magic.follow) can predict it in full"
        )

    additive = stats.additive_ceiling(values, truth.groups.membership(np.float64).toarray())
    if additive is not None:
        metrics["additive_ceiling"] = Metric(additive.value, additive.low, additive.high)
    ceiling = ceiling_of(truth, replicates, context, tasks)
    reliability = stats.reliability(truth.by_seed())
    if reliability is not None:
        metrics["reliability"] = Metric(reliability)
    if ceiling is not None:
        metrics["ceiling"] = metric(ceiling.bootstrap, clip=(0.0, 1.0))
        metrics["share_of_ceiling"] = metric(ceiling.share(boot))
        arrays["ceiling_per_query"] = ceiling.per_query.astype(np.float32)
    elif truth.n_seeds < 2 and not single:
        notes.append("one seed per group: the truth's noise, and therefore a ceiling, is unknown")
    elif truth.n_seeds > 1:
        notes.append(
            f"the truth's reliability is {reliability:.2f}: below {stats.MIN_RELIABILITY} no "
            "ceiling can be estimated"
        )
    return Outcome(
        primary=name,
        metrics=metrics,
        per_query=per_query,
        query_ids=truth.query_ids,
        replicates=boot.both,
        arrays=arrays,
        notes=tuple(notes),
    )
