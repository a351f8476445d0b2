"""TrackStar: cosine of preconditioned gradients, normalised by the optimizer's second moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tdabench.api import Context, Example, UsageError
from tdabench_gradients.base import State
from tdabench_gradients.logra import LoGra

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch, GradientEngine, Layer


@dataclass(frozen=True, kw_only=True)
class TrackStar(LoGra):
    """phi(z) = norm[(C + lambda I)^-1/2 P (g / sqrt(V))], score the cosine (arXiv 2410.17413).

    V [d_out, d_in] is Adafactor's estimate of the second moment of each layer's gradient,
    row means times column means over the overall mean; since 1 / sqrt(V) is a product, it folds
    into the projections. A target has no optimizer state, so V is computed from per-example
    gradients over the training corpus. C comes from the training corpus alone: the paper's mixture
    with the queries' curvature would make an index depend on its queries.

    moments  "adafactor", or "none" to leave gradients unchanged
    """

    name = "trackstar"
    source = "Chang et al. 2024, arXiv 2410.17413"
    summary = "cosine of whitened, moment-normalised projected gradients"

    normalise: bool = True
    moments: Literal["adafactor", "none"] = "adafactor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moments not in ("adafactor", "none"):
            raise UsageError(
                f"{self.name}: unknown moments {self.moments!r}", "One of: adafactor, none"
            )
        if self.projection != "random":
            raise UsageError(f"{self.name}: its projection is random, not {self.projection!r}")

    def learn(self, context: Context, train: Sequence[Example]) -> State:
        """Computes row and column means of each layer's squared gradient over the corpus."""
        from tdabench.api import Workspace, map_batches, per_example

        if self.moments == "none":
            return {}
        engine = super().engine(context, {}, rank=None)
        sums: dict[str, list[np.ndarray]] = {}
        workspace = Workspace()

        def compute(batch: Batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
            found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

            def visit(layer: Layer, x: torch.Tensor, delta: torch.Tensor) -> None:
                square = per_example(layer, x, delta, workspace).square_().sum(0)  # [d_out, d_in]
                found[layer.name] = (square.mean(1), square.mean(0))

            engine.backward(batch, visit)
            return found

        tokens = context.target.tokenize(train)
        for _, found in map_batches(context, tokens, compute, what="gradient moments"):
            for name, parts in found.items():
                values = [p.double().cpu().numpy() / len(train) for p in parts]
                sums[name] = [a + b for a, b in zip(sums.get(name, (0.0, 0.0)), values)]
        return {
            f"moment.{side}.{name}": part
            for name, parts in sums.items()
            for side, part in zip(("out", "in"), parts)
        }

    def engine(self, context: Context, state: State, **changes: Any) -> GradientEngine:
        engine = super().engine(context, state, **changes)
        if not any(key.startswith("moment.") for key in state):
            return engine
        given = {}
        for layer in engine.layers:
            rows, cols = (state[f"moment.{side}.{layer.name}"] for side in ("out", "in"))
            overall = max(float(rows.mean()), np.finfo(np.float64).tiny)
            sides = []
            for p, v in ((layer.p_in, cols / overall), (layer.p_out, rows)):
                scale = 1 / np.sqrt(np.maximum(v, v.max() * 1e-8 + np.finfo(np.float64).tiny))
                whole = np.eye(len(v)) if p is None else p.cpu().numpy()
                sides.append((scale[:, None] * whole).astype(np.float32))
            given[layer.name] = (sides[0], sides[1])
        return super().engine(context, state, rank=None, projection=given, **changes)
