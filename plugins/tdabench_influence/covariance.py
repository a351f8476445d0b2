"""Scores that are covariances of losses over models near the target's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.api import Context, Example, Index, MethodError, losses_of, read_arrays, write_arrays


class CovarianceIndex(Index):
    """score(q, z) = Cov(loss_q, loss_z) over models, within chains of equally many.

    `models` [model, parameter] are weights, and `losses` [model, train] the corpus's losses under
    each; a query takes one forward pass per model.
    """

    def __init__(
        self, method: Any, context: Context, models: np.ndarray, losses: np.ndarray, chains: int = 1
    ) -> None:
        self.method, self.context, self.models, self.losses = method, context, models, losses
        self.chains, self.n_train = chains, losses.shape[1]
        self.pooling, self.temperature = method.pooling, method.temperature

    @classmethod
    def load(cls, method: Any, context: Context, path: Path, chains: int = 1) -> CovarianceIndex:
        arrays, meta = read_arrays(path / "samples.safetensors")
        method.check_saved(path, meta)
        return cls(method, context, arrays["models"], arrays["losses"], chains)

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        found = losses_of(self.context, self.models, queries)
        if not np.isfinite(found).all():
            raise MethodError(
                f"{self.method.name}: the loss of a query is not finite", "Lower the step size"
            )
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
