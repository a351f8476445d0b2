"""LoGra: influence functions on gradients projected layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tdabench.api import Context, Example, Role, Rows, UsageError
from tdabench_gradients.base import (
    GradientMethod,
    State,
    block_starts,
    curvature_blocks,
    damped_cholesky,
    normalised,
    whiten,
)

if TYPE_CHECKING:
    from tdabench.api import GradientEngine


@dataclass(frozen=True, kw_only=True)
class LoGra(GradientMethod):
    """score(q, z) = sum over layers of ĝ_q^T (C + lambda I)^-1 ĝ_z (arXiv 2405.13954, eq. 3-6).

    ĝ = P_out^T (sum_t delta_t x_t^T) P_in per linear layer, C is the mean outer product of ĝ over
    the training corpus (the empirical Fisher of the projected layer), lambda = damping * tr(C)/dim.

    projection  "random" (Gaussian), or "pca": the leading eigenvectors of the second moments of
                x and delta over the training corpus
    damping     multiple of the layer's mean eigenvalue that is added to C
    normalise   score by the cosine of (C + lambda I)^-1/2 ĝ over all layers instead, so that
                large unrelated gradients do not dominate
    """

    name = "logra"
    source = "Choe et al. 2024, arXiv 2405.13954"
    summary = "influence on layer-wise projected gradients"
    grid = {"damping": (0.01, 0.1, 1.0, 10.0), "checkpoint": ("base", "warm")}

    projection: Literal["random", "pca"] = "random"
    damping: float = 0.1
    normalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping < 0:
            raise UsageError(f"{self.name}: damping must not be negative, but is {self.damping}")
        if self.projection not in ("random", "pca"):
            raise UsageError(
                f"{self.name}: unknown projection {self.projection!r}", "One of: random, pca"
            )

    # ------------------------------------------------------------------ PCA projections

    def learn(self, context: Context, train: Sequence[Example]) -> State:
        if self.projection != "pca" or self.rank is None:
            return {}
        engine = self.engine(context, {}, rank=None)
        state = {}
        for name, (a, s) in second_moments(context, engine, train).items():
            for side, c in (("in", a), ("out", s)):
                if len(c) > self.rank:
                    _, vectors = np.linalg.eigh(c)  # ascending
                    state[f"pca.{side}.{name}"] = vectors[:, ::-1][:, : self.rank].astype("f4")
        return state

    def engine(self, context: Context, state: State, **changes: Any) -> GradientEngine:
        engine = super().engine(context, state, **changes)
        if self.projection == "random" or self.rank is None or "rank" in changes:
            return engine
        given = {
            layer.name: (state.get(f"pca.in.{layer.name}"), state.get(f"pca.out.{layer.name}"))
            for layer in engine.layers
        }
        return super().engine(context, state, rank=None, projection=given, **changes)

    # ------------------------------------------------------------------ curvature

    def dims(self, context: Context) -> dict[str, int]:
        """Returns the features per layer, which do not depend on the data of the projection."""
        return GradientMethod.engine(self, context, {}).dims

    def fit(self, context: Context, features: Rows) -> State:
        dims = self.dims(context)
        starts = block_starts(dims)
        state: State = {"starts": starts}
        for i, c in enumerate(curvature_blocks(features, starts)):
            what = f"{self.name} at {list(dims)[i]}"
            state[f"low.{i}"] = damped_cholesky(c, self.damping, what, features.shape[0])
        return state

    def transform(self, features: Any, state: Mapping[str, np.ndarray], role: Role) -> Any:
        starts = state["starts"]
        out = np.empty(features.shape, dtype=np.float32)
        for i, (a, b) in enumerate(itertools.pairwise(starts)):
            out[:, a:b] = whiten(features[:, a:b], state[f"low.{i}"])
        return normalised(out) if self.normalise else out


def second_moments(
    context: Context, engine: GradientEngine, examples: Sequence[Example]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Computes each layer's mean x x^T [d_in, d_in] and delta delta^T [d_out, d_out] by token."""
    from tdabench.api import layer_sums, second_moment

    tokens = context.target.tokenize(examples)
    sums = layer_sums(
        context,
        engine,
        tokens,
        lambda layer, x, delta, batch: (second_moment(x, batch), second_moment(delta, batch)),
        what="second moments",
    )
    n = max(1, sum(len(t) for t in tokens))
    return {name: ((a / n).cpu().numpy(), (s / n).cpu().numpy()) for name, (a, s) in sums.items()}
