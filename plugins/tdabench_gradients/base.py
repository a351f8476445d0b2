"""Base of the gradient methods: settings, engines and block curvature."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.api import (
    Context,
    Example,
    MethodError,
    RepresentationMethod,
    Role,
    Rows,
    UsageError,
    row_blocks,
)

if TYPE_CHECKING:
    from tdabench.api import GradientEngine

State = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class GradientMethod(RepresentationMethod):
    """Features are gradients of each example's loss with respect to linear layers' weights.

    checkpoint  checkpoint of the target at which gradients are computed
    layers      regular expression searched in layer names; None is all but the output head
    rank        dimensions to which each side of each layer is randomly projected; None keeps
                whole gradients
    bias        include the gradients of biases
    dtype       dtype of the stored training rows: float32, float16 or int8 (with a scale per row)
    """

    family = "gradient"

    checkpoint: str = "base"
    layers: str | None = None
    rank: int | None = 16
    bias: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in ("float32", "float16", "int8"):
            raise UsageError(
                f"{self.name}: unknown dtype {self.dtype!r}", "One of: float32, float16, int8"
            )
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"{self.name}: rank must be at least 1, not {self.rank}")

    # ------------------------------------------------------------------ what a subclass changes

    def engine(self, context: Context, state: State, **changes: Any) -> GradientEngine:
        """Returns the engine at the method's checkpoint; `state` is the result of `learn`."""
        from tdabench.api import GradientEngine

        settings = {"layers": self.layers, "rank": self.rank, "bias": self.bias}
        model = context.target.model(changes.pop("checkpoint", self.checkpoint), context.device)
        return GradientEngine(
            model,
            random=context.torch_generator,
            **(settings | changes),
        )

    def learn(self, context: Context, train: Sequence[Example]) -> State:
        """Computes state for encoding from the training corpus (projections, moments)."""
        return {}

    def features(
        self, context: Context, examples: Sequence[Example], role: Role, state: State
    ) -> Rows:
        """Returns features [example, dim] before `transform`."""
        engine = self.engine(context, state)
        return self.stream(context, examples, role, engine.gradients, engine.dim)

    # ------------------------------------------------------------------ the rest

    def stream(
        self, context: Context, examples: Sequence[Example], role: Role, compute: Any, dim: int
    ) -> Rows:
        from tdabench.api import stream_features

        return stream_features(
            context,
            examples,
            compute,
            dim,
            name=f"{self.name}-{role}",
            # Features of queries depend on state learned from the training corpus: never resumed.
            key=None if role == "query" else [self.name, self.version, str(self.params)],
            # If rows are transformed (such as whitened), they are rounded afterwards.
            dtype="float32" if role == "query" or self._transforms else self.dtype,
        )

    def encode(self, context: Context, examples: Sequence[Example], role: Role) -> Rows:
        return self.features(context, examples, role, {})

    @property
    def rows_dtype(self) -> str:
        return self.dtype if self.dtype != "float32" else ""

    @property
    def _transforms(self) -> bool:
        return type(self).transform is not RepresentationMethod.transform


# --------------------------------------------------------------------------- curvature


def block_starts(dims: Mapping[str, int]) -> np.ndarray:
    """Returns the boundaries of the layers' features: [layer + 1]."""
    return np.concatenate([[0], np.cumsum(list(dims.values()))]).astype(np.int64)


def curvature_blocks(rows: Rows, starts: np.ndarray) -> list[np.ndarray]:
    """Computes the mean outer product of the features of each block: float64 [d, d] each.

    Streams over the rows. Sums within a block of rows are float32, across blocks float64.
    """
    sums = [np.zeros((b - a, b - a)) for a, b in itertools.pairwise(starts)]
    for _, block in row_blocks(rows):
        for c, a, b in zip(sums, starts[:-1], starts[1:]):
            g = np.ascontiguousarray(block[:, a:b], dtype=np.float64)
            c += g.T @ g
    return [c / max(1, rows.shape[0]) for c in sums]


def damped_cholesky(c: np.ndarray, damping: float, what: str, n: int) -> np.ndarray:
    """Returns lower L with L L^T = C + lambda I, lambda = damping * tr(C) / dim: float64 [d, d].

    C was computed from `n` examples. Raises MethodError if the sum is singular: with fewer
    examples than dimensions and no damping, scores along the missing directions are noise.
    """
    d = len(c)
    mean = np.trace(c) / d
    if mean == 0:  # the block has no gradients and contributes no score
        return np.eye(d)
    if damping <= 0 and n <= d:
        raise MethodError(
            f"the curvature of {what} is singular: {n} examples, {d} dimensions, no damping",
            "Set damping above 0, or lower the rank",
        )
    try:
        low = np.linalg.cholesky(c + damping * mean * np.eye(d))
    except np.linalg.LinAlgError as e:
        raise MethodError(
            f"the curvature of {what} is singular at damping {damping}", "Raise the damping"
        ) from e
    return low


def whiten(features: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Computes L^-1 g of each row [n, d]: inner products become g^T (C + lambda I)^-1 g'."""
    from scipy.linalg import solve_triangular

    return solve_triangular(low, np.asarray(features, dtype=np.float64).T, lower=True).T


def normalised(rows: np.ndarray) -> np.ndarray:
    """Scales rows to unit length; a zero row stays zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)
