"""DataInf: the inverse of each example's rank-one curvature, averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tdabench.api import Context, Example, UsageError
from tdabench_influence.streaming import (
    Gradients,
    State,
    StreamingIndex,
    StreamingMethod,
    squared_norms,
)

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch, GradientEngine, Layer


@dataclass(frozen=True, kw_only=True)
class DataInf(StreamingMethod):
    """H^-1 v ~ mean_i (g_i g_i^T + lambda I)^-1 v per layer (arXiv 2310.00902, eq. 5).

        = (v - mean_i g_i (g_i . v) / (lambda + |g_i|^2)) / lambda,

    The paper applies it to LoRA weights;
    here it is applied to the selected layers. Exact for one example, accurate in few dimensions.

    damping  lambda as a multiple of mean_i |g_i|^2 / dim of the layer
    """

    name = "datainf"
    version = 2
    copies = 2
    source = "Kwon et al. 2024, arXiv 2310.00902"
    summary = "closed-form influence by averaging rank-one inverses"
    grid = {"damping": (0.01, 0.1, 1.0), "checkpoint": ("base", "warm")}
    query_time = ("damping",)

    damping: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damping > 0:
            raise UsageError(f"{self.name}: damping must be positive, not {self.damping}")

    def fit(self, context: Context, engine: GradientEngine, train: Sequence[Example]) -> State:
        norms = squared_norms(context, engine, train)  # [n, layer]
        return {"mean": np.array(_mean_eigenvalues(engine, norms))}

    def precondition(self, index: StreamingIndex, gradients: Gradients) -> Gradients:
        import torch

        from tdabench.api import Workspace, map_batches, per_example

        lam = dict(zip(gradients, (self.damping * index.state["mean"]).tolist()))
        total = {name: torch.zeros_like(g) for name, g in gradients.items()}
        # A batch that runs out of memory midway is halved and retried: the part that a layer has
        # already added must count once.
        added = {name: np.zeros(index.n_train, dtype=bool) for name in gradients}
        workspace = Workspace()

        def compute(batch: Batch) -> None:
            def visit(layer: Layer, x: torch.Tensor, delta: torch.Tensor) -> None:
                g = per_example(layer, x, delta, workspace).flatten(1)  # [b, d]
                v = gradients[layer.name].flatten(1)  # [query, d]
                weight = 1 / (lam[layer.name] + g.square().sum(1)).clamp_min(1e-30)  # [b]
                weight[torch.from_numpy(added[layer.name][batch.index])] = 0
                total[layer.name].flatten(1).addmm_(v @ g.T * weight, g)
                added[layer.name][batch.index] = True

            index.engine.backward(batch, visit)

        for _ in map_batches(index.context, index.tokens, compute, what="rank-one inverses"):
            pass
        out = {}
        for name, g in gradients.items():
            # A layer without gradients has no inverse and no scores.
            out[name] = (g - total[name] / index.n_train) / lam[name] if lam[name] else g
        return out


def _mean_eigenvalues(engine: GradientEngine, norms: np.ndarray) -> list[float]:
    return [
        float(norms[:, i].mean() / layer.dim) if len(norms) else 0.0
        for i, layer in enumerate(engine.layers)
    ]
