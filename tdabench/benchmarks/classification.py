"""Classification: whether the highest-scoring training examples come from the query's task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tdabench.benchmark import BenchmarkContext, Metric, Outcome
from tdabench.benchmarks.common import (
    Arrays,
    FromArrays,
    Texts,
    metric,
    outcome_of,
    score_blocks,
    tasks_of,
)
from tdabench.data.examples import Example
from tdabench.errors import NotApplicable, UsageError


@dataclass(frozen=True)
class Classification(FromArrays):
    """Source classification (AirRep, arXiv 2505.18513).

    The query's predicted task is the task of its highest-scoring training example (`accuracy`), or
    the majority task of its `k` highest-scoring ones (`accuracy_knn`). Tied scores count by
    expectation: items tied at the edge of the top k share the remaining places, and tasks with
    equal votes share the prediction. `chance` is the value of constant scores. Where examples have
    a field `source` (a country, a document), the same is measured for it: `accuracy_source`,
    `accuracy_source_knn` and `chance_source`. Labels describe what a query is about, not what its
    loss depends on: a faithful method may score low here.

    k           number of highest-scoring examples that vote (`accuracy_knn`)
    replicates  bootstrap replicates behind each interval
    """

    name: ClassVar[str] = "classification"
    version: ClassVar[int] = 2
    summary: ClassVar[str] = "whether the highest-scoring training examples have the query's task"
    source: ClassVar[str] = "Sun et al. 2025, arXiv 2505.18513"
    kept: ClassVar[str] = "wanted|votes|task$"

    k: int = 10
    replicates: int = 1000

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UsageError(f"classification.k must be at least 1, not {self.k}")

    def run(self, context: BenchmarkContext) -> Outcome:
        labelled = [i for i, task in enumerate(context.queries.tasks) if task]
        tasks = sorted(set(context.train.tasks) - {""})
        sources = _sources(context.train)
        if not labelled or not tasks:
            what = "queries" if tasks else "training examples"
            raise NotApplicable(f"the {what} have no task labels", "Classification needs them")
        queries = context.queries.subset(labelled)
        # By what examples are labelled: the end of array names, labels of train and of queries.
        labels = {"": _numbered(context.train.tasks, queries.tasks)}
        asked = _sources(queries)
        if set(sources) & set(asked) - {""}:
            labels["_source"] = _numbered(sources, asked)
        arrays: dict[str, np.ndarray] = {}
        for end, (label, wanted, n) in labels.items():
            arrays |= {
                f"wanted{end}": wanted,
                f"votes{end}": np.empty((len(queries), n)),
                f"votes{end}_knn": np.empty((len(queries), n)),
                f"votes{end}_chance": votes(np.zeros((1, len(label))), label, 1, n),
            }
        for rows, scores in score_blocks(context.index, queries, len(context.train)):
            for end, (label, _, n) in labels.items():
                arrays[f"votes{end}"][rows] = votes(scores, label, 1, n)
                arrays[f"votes{end}_knn"][rows] = votes(scores, label, self.k, n)
        wanted = arrays["wanted"]

        notes = []
        if len(labelled) < len(context.queries):
            notes.append(f"{len(context.queries) - len(labelled)} queries have no task label")
        strange = int((wanted < 0).sum())
        if strange:
            notes.append(f"{strange} queries have a task without training examples: wrong")
        clusters, few = tasks_of(queries)
        return self.outcome({**arrays, **clusters}, tuple(queries.ids), (*notes, *few))

    def outcome(self, arrays: Arrays, query_ids: Texts, notes: Texts = ()) -> Outcome:
        from tdabench import stats

        wanted = arrays["wanted"]
        top1 = share_of(arrays["votes"], wanted)
        knn = elected(arrays["votes_knn"], wanted)
        chance = share_of(np.repeat(arrays["votes_chance"], len(wanted), axis=0), wanted)
        tasks = arrays.get("task")
        boot = stats.bootstrap_queries(top1, self.replicates, tasks=tasks)
        neighbours = stats.bootstrap_queries(knn, self.replicates, tasks=tasks)
        metrics = {
            "accuracy": metric(boot, share=True),
            "accuracy_knn": metric(neighbours, share=True),
            "chance": Metric(float(np.mean(chance))),
        }
        if "wanted_source" in arrays:
            of = arrays["wanted_source"]
            for name, values in (
                ("accuracy_source", share_of(arrays["votes_source"], of)),
                ("accuracy_source_knn", elected(arrays["votes_source_knn"], of)),
            ):
                again = stats.bootstrap_queries(values, self.replicates, tasks=tasks)
                metrics[name] = metric(again, share=True)
            guess = np.repeat(arrays["votes_source_chance"], len(of), axis=0)
            metrics["chance_source"] = Metric(float(np.mean(share_of(guess, of))))
        return outcome_of(metrics, top1, boot, {**arrays, "per_query_knn": knn}, query_ids, notes)


def _sources(examples: Sequence[Example]) -> list[str]:
    """Returns each example's field `source`, "" where it has none."""
    return [str(e.meta.get("source", "")) for e in examples]


def _numbered(train: Sequence[str], asked: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
    """Numbers the names in `train`: labels [train], labels [query] and how many there are.

    -1 for an empty name, and for one that no training example has.
    """
    place = {name: i for i, name in enumerate(sorted(set(train) - {""}))}
    return (
        np.array([place.get(t, -1) for t in train]),
        np.array([place.get(t, -1) for t in asked]),
        len(place),
    )


def votes(scores: np.ndarray, label: np.ndarray, k: int, n_labels: int) -> np.ndarray:
    """Counts labels among the k best items, by expectation: float64 [query, label].

    scores [query, train]; label [train], -1 for no label. Items tied at the edge of the k best
    share the remaining places.
    """
    k = min(k, scores.shape[1])
    kth = -np.partition(-scores, k - 1, axis=1)[:, k - 1 : k]
    above, at = scores > kth, scores == kth
    # Weight of an item: 1 above the k-th score; items tied with it share the remaining places.
    share = (k - above.sum(axis=1)) / at.sum(axis=1)
    weight = above + at * share[:, None]  # [query, train]
    member = label[:, None] == np.arange(n_labels)  # [train, label]
    return weight @ member.astype(np.float64)


def share_of(votes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the share of votes [query, label] for the label `wanted` [query] (-1: no label).

    float64 [query]. With one vote, this is the probability that the best item, with ties broken at
    random, has the label.
    """
    mine = votes[np.arange(len(votes)), np.maximum(wanted, 0)]
    return np.where(wanted >= 0, mine, 0.0)


def elected(votes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Returns the probability that `wanted` [query] wins the vote, shared between equal votes."""
    close = np.isclose(votes, votes.max(axis=1, keepdims=True), rtol=0, atol=1e-9)
    best = (wanted >= 0) & close[np.arange(len(votes)), np.maximum(wanted, 0)]
    return best / close.sum(axis=1)
