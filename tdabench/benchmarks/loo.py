"""LOO: do scores rank what leaving examples out does?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tdabench.benchmarks.base import Benchmark, BenchmarkContext, Outcome, Stored
from tdabench.benchmarks.common import checked, group_scores
from tdabench.benchmarks.lds import rank_outcome, usable
from tdabench.errors import UsageError
from tdabench.groups import Groups


@dataclass(frozen=True)
class LOO(Benchmark):
    """Leave-one-out and leave-k-out: as LDS, with groups that are the pool less k examples.

    The truth's groups name what was *kept*. With `score = "removed"` a method is asked for the
    group score of what was left out, which counts negatively: leaving out what helps raises the
    loss. With `"kept"` it is asked for the score of what was kept. For additive methods the two
    rank alike, but a removal of one in thousands is lost in the rounding of the kept sum.
    The loss of the whole pool is a constant of the query and changes no rank.
    """

    name: ClassVar[str] = "loo"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "rank correlation of scores with retraining without k examples"
    source: ClassVar[str] = "Koh and Liang 2017, arXiv 1703.04730"
    truth_kind: ClassVar[str | None] = "loo"

    truth: str = "loo"
    score: str = "removed"
    replicates: int = 1000

    def __post_init__(self) -> None:
        if self.score not in ("removed", "kept"):
            raise UsageError(f"loo.score = {self.score!r}", "One of: removed, kept")

    def run(self, context: BenchmarkContext) -> Outcome:
        truth, notes = usable(context.truth(self.truth), context.queries)
        if self.score == "kept":
            scores = group_scores(context.index, context.queries, truth.groups)
        else:
            removed = complement(truth.groups)
            scores = -group_scores(context.index, context.queries, removed)
            sizes = np.unique(removed.sizes)
            notes.append(f"left out at a time: {', '.join(map(str, sizes))}")
        return rank_outcome(self.name, scores, truth, self.replicates, notes)

    def recompute(self, stored: Stored) -> Outcome:
        truth, notes = usable(stored.truth(self.truth), stored.query_ids)
        shape = (len(truth.query_ids), len(truth.groups))
        scores = checked(np.asarray(stored.arrays["group_scores"]), shape, "group scores")
        return rank_outcome(self.name, scores, truth, self.replicates, notes)


def complement(groups: Groups) -> Groups:
    """What each group leaves out."""
    everything = np.arange(groups.n_train)
    return Groups.of(
        (np.setdiff1d(everything, g, assume_unique=True) for g in groups), groups.n_train
    )
