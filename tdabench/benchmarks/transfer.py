"""Transfer: whether scores computed on one target predict retraining of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tdabench.benchmark import Benchmark, BenchmarkContext, Metric, Outcome, Stored
from tdabench.benchmarks.common import (
    ceiling_of,
    checked_scores,
    group_scores,
    metric,
    scores_of_all,
)
from tdabench.benchmarks.lds import usable
from tdabench.errors import DataError, TdabenchError, UsageError, unknown
from tdabench.seeds import named_seed
from tdabench.truth.store import Truth


@dataclass(frozen=True)
class Transfer(Benchmark):
    """Cross-model generalisation (AirRep, arXiv 2505.18513).

    The index is built on the cell's target, the source. Its group scores are compared with the
    truth of every other target of the suite on the same corpus; the value is the mean of their
    LDS. `lds[label]` and `ceiling[label]` belong to each target; `lds[source]` is the in-model
    diagonal, if the source has that truth. `targets` selects some of the others.
    """

    name: ClassVar[str] = "transfer"
    version: ClassVar[int] = 2
    summary: ClassVar[str] = "LDS of one target's scores on the truths of other targets"
    source: ClassVar[str] = "Sun et al. 2025, arXiv 2505.18513"

    truth: str = "lds"
    targets: tuple[str, ...] = ()
    replicates: int = 1000

    def run(self, context: BenchmarkContext) -> Outcome:
        strange = [t for t in self.targets if t not in context.other_truths]
        if strange:
            raise unknown("other target", strange[0], context.other_truths)
        labels = self.targets or tuple(context.other_truths)
        truths, notes = {}, []
        for label in labels:
            try:
                truth = context.other_truths[label](self.truth)
            except UsageError as e:
                if self.targets:
                    raise
                notes.append(f"not compared: {e.message}")
                continue
            truths[label], more = usable(truth, context.queries)
            notes += [f"{label}: {n}" for n in more]
        try:
            truths["source"], _ = usable(context.truth(self.truth), context.queries)
        except TdabenchError as e:
            notes.append(f"no in-model diagonal: {e.message}")

        scored = scores_of_all(  # by groups: targets may share them
            lambda groups: group_scores(context.index, context.queries, groups),
            {t.groups.fingerprint: t.groups for t in truths.values()},
        )
        scores = {label: scored[t.groups.fingerprint] for label, t in truths.items()}
        return self._outcome(truths, scores, tuple(context.queries.ids), notes, context)

    def recompute(self, stored: Stored) -> Outcome:
        truths, scores = {}, {}
        for name, array in stored.arrays.items():
            if not name.startswith("group_scores["):
                continue
            label = name[len("group_scores[") : -1]
            other = stored.truth(self.truth) if label == "source" else None
            truth, _ = usable(other or stored.other_truth(label, self.truth), stored.query_ids)
            shape = (len(truth.query_ids), len(truth.groups))
            truths[label], scores[label] = truth, checked_scores(array, shape, "group scores")
        return self._outcome(truths, scores, stored.query_ids)

    def _outcome(
        self,
        truths: Mapping[str, Truth],
        scores: Mapping[str, np.ndarray],  # for each truth's groups: [query, group]
        query_ids: tuple[str, ...],
        notes: Sequence[str] = (),
        context: BenchmarkContext | None = None,
    ) -> Outcome:
        from tdabench import stats

        metrics: dict[str, Metric] = {}
        rows, boots, ceilings = [], [], []
        for label, truth in sorted(truths.items()):
            # Truths over the same groups share the draws of groups; others must not.
            seed = named_seed(0, truth.groups.fingerprint)
            boot = stats.bootstrap_lds(
                scores[label], truth.values, self.replicates, groups_seed=seed
            )
            metrics[f"lds[{label}]"] = metric(boot, clip=(-1.0, 1.0))
            ceiling = ceiling_of(truth, self.replicates, context)
            if ceiling is not None:
                low, high = ceiling.interval() or (None, None)
                metrics[f"ceiling[{label}]"] = Metric(ceiling.value, low, high)
            if label != "source":
                rows.append(stats.spearman_rows(scores[label], truth.values))
                boots.append(boot)
                ceilings += [ceiling.value] if ceiling is not None else []
        if not boots:
            raise DataError(
                f"the suite has no other target with a truth {self.truth!r}",
                "Transfer needs at least two targets with truths on the same corpus",
            )
        mean = stats.Bootstrap.mean(boots)
        metrics = {self.name: metric(mean, clip=(-1.0, 1.0)), **metrics}
        if len(ceilings) == len(boots):
            metrics["ceiling"] = Metric(float(np.mean(ceilings)))
        return Outcome(
            primary=self.name,
            metrics=metrics,
            per_query=np.mean(rows, axis=0),
            query_ids=query_ids,
            replicates=mean.both,
            arrays={**{f"group_scores[{k}]": s for k, s in scores.items()}, **mean.arrays()},
            notes=tuple(notes),
        )
