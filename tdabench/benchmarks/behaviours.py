"""Behaviours: LDS of sets of queries and of contrasts, which is what people ask about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tdabench.benchmark import Benchmark, BenchmarkContext, Metric, Outcome, Stored
from tdabench.benchmarks.common import checked_scores, metric
from tdabench.benchmarks.lds import rank_outcome, usable
from tdabench.data.behaviours import Behaviour, behaviours_of, contrast
from tdabench.data.examples import Corpus, Example
from tdabench.errors import DataError
from tdabench.truth.store import Truth


@dataclass(frozen=True)
class Behaviours(Benchmark):
    """LDS with behaviours in place of queries (`tdabench.data.behaviours`).

    Queries with the same value of the field `by` are one behaviour, whose loss is their mean loss;
    those with the field `side` = "against" count negatively (answers that do not match, rejected
    responses). The truth of `lds` is summed over the queries of a behaviour, and the method is
    asked for scores of behaviours. Further rows are contrasts of each set with the next in the
    order of names: the loss of one minus the loss of the other, without the effects of groups on
    both.

    truth       name of the suite's truth
    by          field whose values name the behaviours: task, or a further field of the queries
    replicates  bootstrap replicates behind each interval
    """

    name: ClassVar[str] = "behaviours"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "LDS of sets of queries, and of one set against another"
    source: ClassVar[str] = "Park et al. 2023, arXiv 2303.14186, for sums of losses"
    truth_kind: ClassVar[str | None] = "lds"

    truth: str = "lds"
    by: str = "task"
    replicates: int = 1000

    def run(self, context: BenchmarkContext) -> Outcome:
        truth, notes = usable(context.truth(self.truth), context.queries)
        sets = sided(context.queries, self.by)
        pairs = contrasts_of(sets)
        place = {q: i for i, q in enumerate(sorted(context.queries.ids))}
        weights = np.zeros((len(sets) + len(pairs), len(place)), dtype=np.float32)
        for i, b in enumerate([*sets, *pairs]):
            for e, w in zip(b.examples, b.weights):
                weights[i, place[e.id]] += w
        scores = np.asarray(
            context.index.score_behaviours([*sets, *pairs], truth.groups), dtype=np.float32
        )
        checked_scores(scores, (len(weights), len(truth.groups)), "scores of behaviours")
        arrays = {"behaviour_scores": scores, "weights": weights}
        notes.insert(0, f"{len(sets)} behaviours of {sum(len(b.examples) for b in sets)} queries")
        return self._outcome(truth, arrays, [b.id for b in sets], notes, context)

    def recompute(self, stored: Stored) -> Outcome | None:
        truth = stored.truth(self.truth)
        if len(truth.query_ids) != stored.arrays["weights"].shape[1]:
            return None  # the truth has further queries: which were asked is not stored
        truth, _ = usable(truth, truth.query_ids)
        kept = {k: stored.arrays[k] for k in ("behaviour_scores", "weights")}
        return self._outcome(truth, kept, stored.query_ids)

    def _outcome(
        self,
        truth: Truth,
        arrays: Mapping[str, np.ndarray],
        ids: Sequence[str],
        notes: Sequence[str] = (),
        context: BenchmarkContext | None = None,
    ) -> Outcome:
        from tdabench import stats

        scores, weights, n = arrays["behaviour_scores"], arrays["weights"], len(ids)
        of_sets = added_up(truth, weights[:n], ids)
        out = rank_outcome(self.name, scores[:n], of_sets, self.replicates, context=context)
        metrics = dict(out.metrics)
        if len(scores) > n:
            names = [f"contrast {i}" for i in range(len(scores) - n)]
            other = added_up(truth, weights[n:], names)
            boot = stats.bootstrap_lds(scores[n:], other.values, self.replicates)
            metrics["contrast"] = metric(boot, clip=(-1.0, 1.0))
            ceiling = stats.noise_ceiling(other.by_seed(), self.replicates)
            if truth.n_seeds > 1 and ceiling is not None:
                metrics["contrast_ceiling"] = Metric(ceiling.value)
        kept = {k: v for k, v in out.arrays.items() if k != "group_scores"}
        return replace(out, metrics=metrics, arrays={**kept, **arrays}, notes=(*notes, *out.notes))


def sided(queries: Corpus | Sequence[Example], by: str) -> list[Behaviour]:
    """Groups queries into behaviours by a field; queries of the side "against" count negatively."""
    out = []
    for b in behaviours_of([replace_meta(q) for q in queries], by):
        own = [e for e in b.examples if e.meta.get("side") != "against"]
        against = [e for e in b.examples if e.meta.get("side") == "against"]
        if not own:
            raise DataError(f"the behaviour {b.id!r} has only queries of the side 'against'")
        made = Behaviour.of(b.id, own)
        out.append(contrast(b.id, made, Behaviour.of(b.id, against)) if against else made)
    return out


def replace_meta(e: Example) -> Example:
    """Returns a query without the field `against`: a truth has no losses of other responses."""
    if not e.meta.get("against"):
        return e
    meta = {k: v for k, v in e.meta.items() if k != "against"}
    return Example(e.id, e.prompt, e.response, e.task, meta)


def contrasts_of(sets: Sequence[Behaviour]) -> list[Behaviour]:
    """Returns the contrast of each set with the next, the last with the first; none of one set."""
    if len(sets) < 2:
        return []
    after = [*sets[1:], sets[0]] if len(sets) > 2 else sets[1:]
    return [contrast(f"{a.id} - {b.id}", a, b) for a, b in zip(sets, after)]


def added_up(truth: Truth, weights: np.ndarray, ids: Sequence[str]) -> Truth:
    """Returns the truth of behaviours: losses [group, seed, behaviour].

    weights [behaviour, query], with the queries in the order of their ids.
    """
    ordered = truth.for_queries(sorted(truth.query_ids))
    losses = ordered.losses.astype(np.float64) @ weights.T.astype(np.float64)
    return Truth(losses.astype(np.float32), truth.groups, tuple(ids), truth.plan)
