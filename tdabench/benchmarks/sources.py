"""Sources: whether scores of whole sources predict the effect of leaving them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tdabench.benchmark import Benchmark, BenchmarkContext, Metric, Outcome, Stored
from tdabench.benchmarks.common import group_scores, metric, tasks_of
from tdabench.benchmarks.lds import rank_outcome, usable
from tdabench.data.origins import (
    copied_groups,
    members_by_origin,
    origins,
    with_copies,
)
from tdabench.errors import DataError
from tdabench.groups import Groups
from tdabench.seeds import named_seed
from tdabench.truth.store import Truth

COPIED = 5  # sources that the redundancy test duplicates


@dataclass(frozen=True)
class Sources(Benchmark):
    """Leave-one-source-out: group scores of whole sources against retraining without each.

    The truth retrains on the corpus without each source in turn, or without each of some, and on
    all of it (`leave_out` in the suite's plan; docs/benchmarks/sources.md). For each query, the
    value is Spearman's correlation over sources between the scores of the sources and the rise of
    the query's loss without them; then the mean over queries. Sources are the unit that was left
    out: intervals draw sources and queries.

    - `strongest`: the share of queries whose highest-scoring source is the one whose absence hurts
      most; `strongest_chance` is 1 / number of sources.
    - `elsewhere`: the value over sources other than the query's own, where the topic does not
      answer the question.
    - `behaviour`: the value for sets of queries: the mean loss over the queries of each source.
    - `copies_worth`: the method's score of a source after each of its examples has been duplicated,
      relative to its score without duplicates, for queries of that source: 2 if copies are counted
      twice, 1 if they are recognised. `copies_worth_true` is the same for retraining, if the suite
      has the asset (with intervals over the sources that were duplicated).

    `by` names the field with an example's source ("task", or a further field; by default `source`
    if examples have it, otherwise the task). `copies` is the number of sources to duplicate, drawn
    by a named seed; 0 skips this test, which builds a second index.

    truth       name of the suite's truth
    by          field with the source of an example; if empty, `source`, or the task without it
    copies      sources to duplicate; 0: none
    asset       name of the suite's asset with the retrainings of duplicated sources
    replicates  bootstrap replicates behind each interval
    """

    name: ClassVar[str] = "sources"
    version: ClassVar[int] = 2
    summary: ClassVar[str] = "rank correlation of source scores with retraining without sources"
    source: ClassVar[str] = "Koh et al. 2019, arXiv 1905.13289 (group effects)"
    truth_kind: ClassVar[str | None] = "sources"

    truth: str = "sources"
    by: str = ""
    copies: int = COPIED
    asset: str = "copies"
    replicates: int = 1000

    def run(self, context: BenchmarkContext) -> Outcome:
        truth, notes = usable(context.truth(self.truth), context.queries)
        members = members_by_origin(context.train, self.by)
        names = self._left_out(truth, members)
        scores = group_scores(
            context.index,
            context.queries,
            Groups.of([members[n] for n in names], len(context.train)),
        )
        place = {n: i for i, n in enumerate(names)}
        own = np.array([place.get(o, -1) for o in origins(context.queries, self._by(context))])
        arrays = {"source_scores": scores, "own": own}
        if self.copies:
            more, said = self._copies(context, members, scores, place, own)
            arrays |= more
            notes += said
        tasks, few = tasks_of(context.queries)
        notes = [f"{len(names)} sources, each left out in turn", *notes, *few]
        return self._outcome(truth, {**arrays, **tasks}, notes, context)

    def recompute(self, stored: Stored) -> Outcome:
        truth, _ = usable(stored.truth(self.truth), stored.query_ids)
        kept = ("source_scores", "own", "task", "worth", "worth_true")
        arrays = {k: stored.arrays[k] for k in kept if k in stored.arrays}
        return self._outcome(truth, arrays)

    def _by(self, context: BenchmarkContext) -> str:
        """The field of sources, decided by the training examples."""
        if self.by:
            return self.by
        return "source" if any(e.meta.get("source") for e in context.train) else "task"

    def _left_out(self, truth: Truth, members: Mapping[str, np.ndarray]) -> list[str]:
        """Returns the source that each group but the whole corpus leaves out.

        Raises DataError for a truth of other groups.
        """
        everything = np.arange(truth.groups.n_train)
        names = {m.tobytes(): name for name, m in members.items()}
        found = []
        for g in truth.groups:
            if len(g) < len(everything):
                left = np.setdiff1d(everything, g, assume_unique=True)
                found.append(names.get(left.tobytes(), ""))
        if "" in found or len(found) != len(truth.groups) - 1:
            raise DataError(
                f"the truth {self.truth!r} does not leave out one source at a time, and none once",
                f'Plan it with leave_out = "{self.by or "source"}" (docs/benchmarks/sources.md)',
            )
        return found

    def _copies(
        self,
        context: BenchmarkContext,
        members: Mapping[str, np.ndarray],
        alone: np.ndarray,  # [query, source]
        place: Mapping[str, int],
        own: np.ndarray,
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        """Measures `worth` [copied, 2]: scores of a source alone and of it with its copy, for
        queries of the source, and the same of retraining."""
        asked = {n: np.flatnonzero(own == i) for n, i in place.items()}
        copied = [n for n in drawn_sources(list(place), self.copies) if len(asked[n])]
        if not copied:
            return {}, ["no query belongs to a source that could be duplicated: copies not tested"]
        doubled = with_copies(context.train, copied, self.by)
        index = context.built_on(doubled).index
        groups, at = [], len(context.train)
        for name in place:
            mine = members[name]
            if name in copied:
                mine = np.concatenate([mine, np.arange(at, at + len(mine))])
                at += len(members[name])
            groups.append(mine)
        both = group_scores(index, context.queries, Groups.of(groups, len(doubled)))

        def worth(scores: np.ndarray, name: str) -> float:
            return float(scores[asked[name], place[name]].mean())

        # A larger corpus may change the scale of all scores: sources without a copy tell it.
        single = [n for n in place if n not in copied and len(asked[n]) and worth(alone, n) > 0]
        scale = np.median([worth(both, n) / worth(alone, n) for n in single]) if single else 1.0
        scale = float(scale) if scale > 0 else 1.0
        arrays = {"worth": np.array([[worth(alone, n), worth(both, n) / scale] for n in copied])}
        if self.asset not in context.assets:
            return arrays, [f"no asset {self.asset!r}: what copies are truly worth is unknown"]
        truth = Truth.load(context.assets[self.asset]).for_queries(context.queries.ids)
        planned = copied_groups(context.train, copied, self.by)
        if truth.groups.fingerprint != planned.fingerprint:
            return arrays, [f"the asset {self.asset!r} duplicates other sources: what copies are "
                            "truly worth is unknown"]  # fmt: skip
        truth.check(doubled, context.target)
        loss = truth.losses.astype(np.float64).mean(axis=1)  # [group, query]: see copied_groups
        arrays["worth_true"] = np.array([
            [(loss[2 + 2 * i] - loss[0])[asked[n]].mean(),
             (loss[2 + 2 * i] - loss[1 + 2 * i])[asked[n]].mean()]
            for i, n in enumerate(copied)
        ])  # fmt: skip
        return arrays, []

    def _outcome(
        self,
        truth: Truth,
        arrays: Mapping[str, np.ndarray],
        notes: list[str] | None = None,
        context: BenchmarkContext | None = None,
    ) -> Outcome:
        from tdabench import stats

        scores, own, tasks = arrays["source_scores"], arrays["own"], arrays.get("task")
        whole = int(np.argmax(truth.groups.sizes))
        without = [g for g in range(len(truth.groups)) if g != whole]
        left = Truth(
            truth.losses[without],
            Groups.of([truth.groups[g] for g in without], truth.groups.n_train),
            truth.query_ids,
            truth.plan,
        )
        # Helpful sources raise the loss when they are left out: the truth's value is -loss.
        out = rank_outcome(self.name, -scores, left, self.replicates, tasks, context)
        metrics = dict(out.metrics)
        rise = truth.values[:, [whole]] - left.values  # [query, source]: of the loss without it
        first = rise == rise.max(axis=1, keepdims=True)
        best = scores == scores.max(axis=1, keepdims=True)
        hit = (first & best).sum(axis=1) / best.sum(axis=1)  # ties by expectation
        boot = stats.bootstrap_queries(hit, self.replicates, tasks=tasks)
        metrics["strongest"] = metric(boot, clip=(0.0, 1.0))
        metrics["strongest_chance"] = Metric(1 / scores.shape[1])
        if (own >= 0).any() and scores.shape[1] > 2:
            owned = np.flatnonzero(own >= 0)
            others = np.arange(scores.shape[1]) != own[owned, None]  # [query, source]
            shape = (len(owned), -1)
            pair = [a[owned][others].reshape(shape) for a in (scores, rise)]
            of = None if tasks is None else tasks[owned]
            boot = stats.bootstrap_queries(stats.spearman_rows(*pair), self.replicates, tasks=of)
            metrics["elsewhere"] = metric(boot, clip=(-1.0, 1.0))
            sets = [own == s for s in np.unique(own[owned])]
            if len(sets) > 1:
                pair = [np.stack([a[m].mean(axis=0) for m in sets]) for a in (scores, rise)]
                of_sets = stats.bootstrap_lds(pair[0], pair[1], self.replicates)
                metrics["behaviour"] = metric(of_sets, clip=(-1.0, 1.0))
        for name in ("worth", "worth_true"):
            if name in arrays and arrays[name][:, 0].sum() > 0:
                metrics[f"copies_{name}"] = self._ratio(arrays[name])
        said = list(notes or ())
        if "worth" in arrays and "copies_worth" not in metrics:
            said.append("the duplicated sources score below 0 for their own queries: what copies "
                        "are worth is undefined")  # fmt: skip
        return replace(
            out,
            metrics=metrics,
            arrays={**{k: v for k, v in out.arrays.items() if k != "group_scores"}, **arrays},
            notes=(*said, *out.notes),
        )

    def _ratio(self, worth: np.ndarray) -> Metric:
        """Returns the worth of sources with copies relative to that without: [copied, 2]."""
        from tdabench import stats

        alone, both = np.asarray(worth, dtype=np.float64).T
        draws = stats.resampling_weights(len(alone), self.replicates, 0, "sources-copies").T
        drawn = draws @ alone
        ratios = (draws @ both)[drawn > 0] / drawn[drawn > 0]
        low, high = np.quantile(ratios, [0.025, 0.975]) if len(ratios) else (None, None)
        value = float(both.sum() / alone.sum())
        return Metric(
            value,
            None if low is None else min(value, float(low)),
            None if high is None else max(value, float(high)),
            higher_is_better=False,
        )


def drawn_sources(names: Sequence[str], n: int = COPIED) -> list[str]:
    """Draws the sources that are duplicated, the same for every method, in the order of `names`."""
    rng = np.random.default_rng(named_seed(0, "sources-copied"))
    return [names[i] for i in sorted(rng.permutation(len(names))[:n])]
