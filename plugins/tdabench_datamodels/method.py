"""The method `datamodels`, fitted on retrainings that the suite provides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from tdabench.api import (
    Context,
    Corpus,
    Example,
    Index,
    MethodError,
    TDAMethod,
    UsageError,
    check_pooling,
    read_arrays,
    write_arrays,
)

if TYPE_CHECKING:
    from tdabench.api import Truth


@dataclass(frozen=True, kw_only=True)
class Datamodels(TDAMethod):
    """score(q, z) = w_qz of the regression -loss_q(S) ~ b_q + sum_(z in S) w_qz (arXiv 2202.00622).

    Fitted on the retrainings in the suite's asset `asset`, a truth file whose groups must differ
    from the groups of the scored truth; the harness refuses it otherwise. Only the queries of the
    asset can be scored. The scores are the best that an additive predictor can reach with these
    retrainings, which are the method's cost.

    asset      name of the truth file among the suite's assets
    estimator  "ridge" (penalty by leave-one-out per query) or "lasso" (penalty by 5 folds, as in
               the paper)
    pooling      how example scores become a group's: sum, mean, softmax or softmax-abs
    temperature  of softmax pooling; unused by sum and mean
    """

    name = "datamodels"
    family = "retraining"
    source = "Ilyas et al. 2022, arXiv 2202.00622"
    summary = "regression of retraining outcomes on membership (its cost is the retrainings)"

    pooling: str = "sum"
    temperature: float = 1.0
    asset: str = "datamodels"
    estimator: Literal["ridge", "lasso"] = "ridge"

    def __post_init__(self) -> None:
        check_pooling(self.name, self.pooling, self.temperature)
        if self.estimator not in ("ridge", "lasso"):
            raise UsageError(
                f"{self.name}: unknown estimator {self.estimator!r}", "One of: ridge, lasso"
            )

    def truth(self, context: Context) -> Truth:
        from tdabench.api import Truth

        return Truth.load(context.asset(self.asset))

    def build(self, context: Context, train: Sequence[Example]) -> DatamodelsIndex:
        from tdabench_datamodels.regression import lasso, ridge

        truth = self.truth(context)
        truth.check(train if isinstance(train, Corpus) else Corpus(train), context.target)
        with np.errstate(invalid="ignore"):
            y = truth.values.T  # [group, query]: -loss, averaged over seeds
        known = np.isfinite(y).all(axis=1)
        if known.sum() < 3:
            raise MethodError(
                f"{self.name}: the asset {self.asset!r} holds {known.sum()} finished retrainings",
                "A regression needs at least three, and hundreds to be useful",
            )
        x, y = truth.groups.membership(np.float64).toarray()[known], y[known]
        if self.estimator == "ridge":
            weights, explained = ridge(x, y)
        else:
            weights, explained = lasso(x, y, rng=context.rng("datamodels/folds"))
        return DatamodelsIndex(
            self, truth.query_ids, weights.astype(np.float32), explained.astype(np.float32)
        )

    def load(self, context: Context, path: Path) -> DatamodelsIndex:
        arrays, meta = read_arrays(path / "weights.safetensors")
        self.check_saved(path, meta)
        return DatamodelsIndex(
            self, tuple(meta["query_ids"]), arrays["weights"], arrays["explained"]
        )

    def prepare_cost(self, context: Context) -> Mapping[str, float] | None:
        truth = self.truth(context)
        cost = {"retrainings": float(len(truth.groups) * truth.n_seeds)}
        if "seconds" in truth.plan:
            cost["seconds"] = float(truth.plan["seconds"])
        return cost


class DatamodelsIndex(Index):
    """Weights [query, train] of the queries whose losses the retrainings recorded.

    `explained` [query] is the share of the variance of -loss that was predicted in
    cross-validation.
    """

    def __init__(
        self,
        method: Datamodels,
        query_ids: Sequence[str],
        weights: np.ndarray,
        explained: np.ndarray,
    ) -> None:
        self.method, self.weights, self.explained = method, weights, explained
        self.query_ids = tuple(query_ids)
        self.place = {q: i for i, q in enumerate(self.query_ids)}
        self.n_train = weights.shape[1]
        self.pooling, self.temperature = method.pooling, method.temperature

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        missing = [q.id for q in queries if q.id not in self.place]
        if missing:
            raise MethodError(
                f"{self.method.name}: no retraining was evaluated on {len(missing)} of "
                f"{len(queries)} queries, first {missing[0]!r}",
                "It can only score the queries of its asset",
            )
        return self.weights[[self.place[q.id] for q in queries]].astype(np.float32, copy=True)

    def save(self, path: Path) -> None:
        write_arrays(
            path / "weights.safetensors",
            {"weights": self.weights, "explained": self.explained},
            {
                "method": self.method.name,
                "version": self.method.version,
                "query_ids": list(self.query_ids),
            },
        )
