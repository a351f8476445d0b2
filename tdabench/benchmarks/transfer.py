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
    tasks_of,
)
from tdabench.benchmarks.lds import usable
from tdabench.errors import NotApplicable, TdabenchError, UsageError, unknown
from tdabench.io import sha256_bytes
from tdabench.truth.store import Truth

SHARED = 10  # groups that two truths must have in common to be compared


@dataclass(frozen=True)
class Transfer(Benchmark):
    """Cross-model generalisation (AirRep, arXiv 2505.18513).

    The index is built on the cell's target, the source. Its group scores are compared with the
    truth of every other target of the suite on the same corpus; the value is the mean of their
    LDS. `lds[label]` and `ceiling[label]` belong to each target; `lds[source]` is the in-model
    diagonal, if the source has that truth. `targets` selects some of the others.

    A ceiling bounds a method that knows the target. A method that knows only what the targets have
    in common is bounded lower, which shows if truths of several targets share groups:
    `truth[label]` is the mean LDS of the other targets' truths, taken as scores, on this target's
    truth. `agnostic[label]` estimates the LDS of their common part by the formula for one common
    factor: the square root of r(T, A) r(T, B) / r(A, B), numerator and denominator summed over
    pairs A, B of other targets (Spearman 1904); with one other target, the square root of r(T, A).

    truth       name of the suite's truth
    targets     labels of the targets to compare with; if empty, all
    replicates  bootstrap replicates behind each interval
    """

    name: ClassVar[str] = "transfer"
    version: ClassVar[int] = 3
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
        tasks, few = tasks_of(context.queries)
        ids = tuple(context.queries.ids)
        return self._outcome(truths, scores, ids, tasks.get("task"), notes + few, context)

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
        return self._outcome(truths, scores, stored.query_ids, stored.arrays.get("task"))

    def _outcome(
        self,
        truths: Mapping[str, Truth],
        scores: Mapping[str, np.ndarray],  # for each truth's groups: [query, group]
        query_ids: tuple[str, ...],
        tasks: np.ndarray | None = None,
        notes: Sequence[str] = (),
        context: BenchmarkContext | None = None,
    ) -> Outcome:
        from tdabench import stats

        metrics: dict[str, Metric] = {}
        rows, boots, ceilings = [], [], []
        # A group that several truths hold is drawn alike in all of them.
        identities = {label: identities_of(truth) for label, truth in truths.items()}
        weights = stats.identity_weights(identities, self.replicates)
        for label, truth in sorted(truths.items()):
            boot = stats.bootstrap_lds(
                scores[label], truth.values, self.replicates, tasks=tasks, weights=weights[label]
            )
            metrics[f"lds[{label}]"] = metric(boot, clip=(-1.0, 1.0))
            ceiling = ceiling_of(truth, self.replicates, context, tasks)
            if ceiling is not None:
                metrics[f"ceiling[{label}]"] = metric(ceiling.bootstrap, clip=(0.0, 1.0))
            if label != "source":
                rows.append(stats.spearman_rows(scores[label], truth.values))
                boots.append(boot)
                ceilings += [ceiling.value] if ceiling is not None else []
        if not boots:
            raise NotApplicable(
                f"the suite has no other target with a truth {self.truth!r}",
                "Transfer needs at least two targets with truths on the same corpus",
            )
        mean = stats.Bootstrap.mean(boots)
        metrics = {self.name: metric(mean, clip=(-1.0, 1.0)), **metrics}
        metrics |= agreement(truths, identities)
        if len(ceilings) == len(boots):
            metrics["ceiling"] = Metric(float(np.mean(ceilings)))
        return Outcome(
            primary=self.name,
            metrics=metrics,
            per_query=np.mean(rows, axis=0),
            query_ids=query_ids,
            replicates=mean.both,
            arrays={
                **{f"group_scores[{k}]": s for k, s in scores.items()},
                **mean.arrays(),
                **({} if tasks is None else {"task": tasks}),
            },
            notes=tuple(notes),
        )


def identities_of(truth: Truth) -> list[str]:
    """Returns a name for each group of a truth, made from its members."""
    return [sha256_bytes(np.sort(g).astype(np.int64).tobytes()) for g in truth.groups]


def agreement(
    truths: Mapping[str, Truth], identities: Mapping[str, Sequence[str]]
) -> dict[str, Metric]:
    """Computes `truth[label]` and `agnostic[label]` over the groups that two truths share.

    Pairs of truths with fewer than `SHARED` groups in common say nothing.
    """
    from tdabench import stats

    labels = sorted(truths)
    r: dict[tuple[str, str], float] = {}
    for i, a in enumerate(labels):
        for b in labels[i + 1 :]:
            place = {g: n for n, g in enumerate(identities[b])}
            shared = [(n, place[g]) for n, g in enumerate(identities[a]) if g in place]
            if len(shared) >= SHARED:
                of_a, of_b = np.array(shared).T
                values = truths[a].values[:, of_a], truths[b].values[:, of_b]
                r[a, b] = r[b, a] = stats.lds(*values)
    out: dict[str, Metric] = {}
    for t in labels:
        others = [a for a in labels if (t, a) in r]
        if not others:
            continue
        out[f"truth[{t}]"] = Metric(float(np.mean([r[t, a] for a in others])))
        pairs = [(a, b) for i, a in enumerate(others) for b in others[i + 1 :] if (a, b) in r]
        square = r[t, others[0]] if len(others) == 1 else 0.0
        if pairs and (between := sum(r[a, b] for a, b in pairs)) > 0:
            square = sum(r[t, a] * r[t, b] for a, b in pairs) / between
        if square > 0:
            out[f"agnostic[{t}]"] = Metric(min(1.0, float(np.sqrt(square))))
    return out
