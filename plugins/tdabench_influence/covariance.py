"""Scores that are covariances of losses over models near the target's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from tdabench.api import (
    Context,
    Example,
    Index,
    MethodError,
    TDAMethod,
    check_pooling,
    losses_of,
    read_arrays,
    write_arrays,
)


@dataclass(frozen=True, kw_only=True)
class CovarianceMethod(TDAMethod):
    """score(q, z) = Cov(loss_q(theta), loss_z(theta)) over models theta near the checkpoint.

    A subclass says in `models_near` which models.

    pooling       how example scores become a group's: sum, mean, softmax or softmax-abs
    temperature   of softmax pooling; unused by sum and mean
    checkpoint    checkpoint of the target near which the models are
    """

    remedy: ClassVar[str] = "Lower the step size"  # where a model's losses are not finite

    pooling: str = "sum"
    temperature: float = 1.0
    checkpoint: str = "base"

    def __post_init__(self) -> None:
        check_pooling(self.name, self.pooling, self.temperature)

    @abstractmethod
    def models_near(self, context: Context, train: Sequence[Example]) -> np.ndarray:
        """Returns the weights of the models: [model, parameter], chain by chain."""

    @property
    def n_chains(self) -> int:
        """Returns the number of chains that the models are from, which covariances stay within."""
        return 1

    def build(self, context: Context, train: Sequence[Example]) -> CovarianceIndex:
        models = self.models_near(context, train)
        return CovarianceIndex(self, context, models, self.finite_losses(context, models, train))

    def load(self, context: Context, path: Path) -> CovarianceIndex:
        arrays, meta = read_arrays(path / "samples.safetensors")
        self.check_saved(path, meta)
        return CovarianceIndex(self, context, arrays["models"], arrays["losses"])

    def finite_losses(
        self, context: Context, models: np.ndarray, examples: Sequence[Example]
    ) -> np.ndarray:
        """Returns every model's loss of every example: [model, example]."""
        losses = losses_of(context, models, examples)
        if not np.isfinite(losses).all():
            raise MethodError(
                f"{self.name}: a model diverged (its loss is not finite)", self.remedy
            )
        return losses


class CovarianceIndex(Index):
    """score(q, z) = Cov(loss_q, loss_z) over models, within chains of equally many.

    `models` [model, parameter] are weights, and `losses` [model, train] the corpus's losses under
    each; a query takes one forward pass per model.
    """

    def __init__(
        self, method: CovarianceMethod, context: Context, models: np.ndarray, losses: np.ndarray
    ) -> None:
        self.method, self.context, self.models, self.losses = method, context, models, losses
        self.chains, self.n_train = method.n_chains, losses.shape[1]
        self.pooling, self.temperature = method.pooling, method.temperature

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        found = self.method.finite_losses(self.context, self.models, queries)
        a, b = self._centred(found), self._centred(self.losses)
        return (a.T @ b / (len(a) - self.chains or 1)).astype(np.float32)

    def _centred(self, losses: np.ndarray) -> np.ndarray:
        """Subtracts each chain's mean: chains may sit in different places."""
        chains, n = self.chains, losses.shape[1]
        per_chain = losses.astype(np.float64).reshape(chains, len(losses) // chains, n)
        if per_chain.shape[1] == 1:  # one sample per chain: their common mean
            return (per_chain - per_chain.mean(0))[:, 0]
        return (per_chain - per_chain.mean(1, keepdims=True)).reshape(losses.shape)

    def save(self, path: Path) -> None:
        write_arrays(
            path / "samples.safetensors",
            {"models": self.models, "losses": self.losses},
            {"method": self.method.name, "version": self.method.version},
        )
