"""LOO: whether scores predict the effect of leaving examples out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tdabench.benchmark import BenchmarkContext, Outcome
from tdabench.benchmarks.common import group_scores
from tdabench.benchmarks.lds import RanksGroups
from tdabench.errors import UsageError
from tdabench.groups import Groups


@dataclass(frozen=True)
class LOO(RanksGroups):
    """Leave-one-out and leave-k-out: like LDS, with groups that are the pool minus k examples.

    The truth's groups name the *kept* examples. With `score = "removed"` a method is asked for the
    group score of the removed examples, which counts negatively: leaving out helpful examples
    raises the loss. With `"kept"` it is asked for the score of the kept examples. For additive
    methods the two rank alike, but a removal of one in thousands is lost in the rounding of the
    kept sum. The loss of the whole pool is a constant per query and changes no rank. `also` names
    further truths (another k), as in LDS.

    score  group whose score is compared: "removed" or "kept"
    """

    name: ClassVar[str] = "loo"
    version: ClassVar[int] = 3
    summary: ClassVar[str] = "rank correlation of scores with retraining without k examples"
    source: ClassVar[str] = "Koh and Liang 2017, arXiv 1703.04730"
    truth_kind: ClassVar[str | None] = "loo"

    truth: str = "loo"
    score: str = "removed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in ("removed", "kept"):
            raise UsageError(f"loo.score = {self.score!r}", "One of: removed, kept")

    def group_scores(self, context: BenchmarkContext, groups: Groups) -> np.ndarray:
        if self.score == "kept":
            return group_scores(context.index, context.queries, groups)
        return -group_scores(context.index, context.queries, complement(groups))

    def run(self, context: BenchmarkContext) -> Outcome:
        out = super().run(context)
        groups = context.truth(self.truth).groups
        sizes = ", ".join(map(str, np.unique(groups.n_train - groups.sizes)))
        return replace(out, notes=(f"examples left out at a time: {sizes}", *out.notes))


def complement(groups: Groups) -> Groups:
    """Returns the examples that each group leaves out."""
    everything = np.arange(groups.n_train)
    return Groups.of(
        (np.setdiff1d(everything, g, assume_unique=True) for g in groups), groups.n_train
    )
