"""LoRIF: projected gradients stored as low-rank factors, curvature in a truncated eigenbasis."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.api import (
    Context,
    Example,
    RepresentationIndex,
    Role,
    Rows,
    UsageError,
    row_blocks,
)
from tdabench_gradients.base import GradientMethod, State, block_starts

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch

_POWER_ITERATIONS = 6
_OVERSAMPLING = 8


@dataclass(frozen=True, kw_only=True)
class LoRIF(GradientMethod):
    """`logra` with rank-c factors of ĝ in the index and a rank-k curvature (arXiv 2601.21929).

    Each layer's projected gradient ĝ [r, r] is stored as U V^T with c columns, which takes
    2 r c numbers instead of r^2, and multiplied out while scoring. C is replaced by its k
    leading eigenpairs, so that by Woodbury's identity

        (C + lambda I)^-1 g = g / lambda - V (1 / lambda - 1 / (s + lambda)) V^T g.

    factors         c, columns of the stored factors
    curvature_rank  k, eigenpairs of the curvature that are kept
    damping  lambda as a multiple of the layer's mean eigenvalue; must be positive
    """

    name = "lorif"
    source = "arXiv 2601.21929"
    summary = "influence on low-rank factors of projected gradients"
    grid = {"damping": (0.01, 0.1, 1.0, 10.0), "checkpoint": ("base", "warm")}

    factors: int = 1
    curvature_rank: int = 64
    damping: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factors < 1 or self.curvature_rank < 1:
            raise UsageError(f"{self.name}: factors and curvature_rank must be at least 1")
        if not self.damping > 0:
            raise UsageError(
                f"{self.name}: damping must be positive, not {self.damping}",
                "A truncated curvature is singular without it",
            )

    # ------------------------------------------------------------------ rows

    def layout(self, context: Context) -> np.ndarray:
        """Returns (rows, cols, factors) of each layer: int [layer, 3]."""
        return np.array(
            [
                (layer.rows, layer.cols, min(self.factors, layer.rows, layer.cols))
                for layer in self.engine(context, {}).layers
            ]
        )

    def features(
        self, context: Context, examples: Sequence[Example], role: Role, state: State
    ) -> Rows:
        import torch

        engine = self.engine(context, state)
        if role == "query":
            return self.stream(context, examples, role, engine.gradients, engine.dim)
        layout = self.layout(context)
        starts = [
            torch.randn(int(cols), int(c), generator=context.torch_generator(f"lorif/{i}"))
            for i, (_, cols, c) in enumerate(layout)
        ]

        def compute(batch: Batch) -> torch.Tensor:
            g = engine.gradients(batch)
            parts = []
            for layer, v in zip(engine.layers, starts):
                u, w = _factors(g[:, layer.columns].view(-1, layer.rows, layer.cols), v.to(g))
                parts += [u.flatten(1), w.flatten(1)]
            return torch.cat(parts, dim=1)

        dim = int(((layout[:, 0] + layout[:, 1]) * layout[:, 2]).sum())
        return FactoredRows(self.stream(context, examples, role, compute, dim), layout)

    def load(self, context: Context, path: Path) -> RepresentationIndex:
        index = super().load(context, path)
        index.rows = FactoredRows(index.rows, self.layout(context))
        return index

    # ------------------------------------------------------------------ curvature

    def fit(self, context: Context, features: Rows) -> State:
        """Computes each layer's leading eigenpairs of C by subspace iteration over the rows."""
        layout = self.layout(context)
        starts = block_starts({str(i): int(r * c) for i, (r, c, _) in enumerate(layout)})
        bases = []
        for i, (a, b) in enumerate(itertools.pairwise(starts)):
            k = min(self.curvature_rank + _OVERSAMPLING, int(b - a))
            bases.append(np.linalg.qr(context.rng(f"lorif/{i}").normal(size=(b - a, k)))[0])
        traces = np.zeros(len(bases))
        for power in range(4):
            products = [np.zeros_like(q) for q in bases]
            traces[:] = 0
            for _, block in row_blocks(features):
                for i, (a, b) in enumerate(itertools.pairwise(starts)):
                    g = np.asarray(block[:, a:b], dtype=np.float64)
                    products[i] += g.T @ (g @ bases[i])
                    traces[i] += np.square(g).sum()
            if power < 3:
                bases = [np.linalg.qr(p)[0] for p in products]
        n = max(1, features.shape[0])
        state: State = {"starts": starts}
        for i, (q, p) in enumerate(zip(bases, products)):
            values, vectors = np.linalg.eigh(q.T @ p / n)  # Rayleigh-Ritz, ascending
            keep = min(self.curvature_rank, len(values))
            state[f"vectors.{i}"] = (q @ vectors)[:, ::-1][:, :keep]
            state[f"values.{i}"] = values[::-1][:keep].clip(0)
            state[f"mean.{i}"] = np.array([traces[i] / n / len(q)])
        return state

    def transform(self, features: Any, state: Mapping[str, np.ndarray], role: Role) -> Any:
        """Computes (C + lambda I)^-1 g of queries. Training rows stay factors."""
        if role == "train":
            return features
        out = np.empty(features.shape, dtype=np.float32)
        for i, (a, b) in enumerate(itertools.pairwise(state["starts"])):
            g = np.asarray(features[:, a:b], dtype=np.float64)
            lam = self.damping * float(state[f"mean.{i}"][0])
            if lam == 0:  # the layer has no gradients
                out[:, a:b] = g
                continue
            v, s = state[f"vectors.{i}"], state[f"values.{i}"]
            out[:, a:b] = g / lam - (g @ v) * (1 / lam - 1 / (s + lam)) @ v.T
        return out

    def build(self, context: Context, train: Sequence[Example]) -> RepresentationIndex:
        features = self.features(context, train, "train", {})
        return RepresentationIndex(self, context, features, self.fit(context, features))

    @property
    def _transforms(self) -> bool:
        return False


class FactoredRows:
    """Rows [n, sum r_out r_in], multiplied out from factors [n, sum (r_out + r_in) c]."""

    def __init__(self, factors: Rows, layout: np.ndarray) -> None:
        self.factors, self.layout = factors, layout
        self.shape = (factors.shape[0], int((layout[:, 0] * layout[:, 1]).sum()))

    def __getitem__(self, key: slice) -> np.ndarray:
        f = np.asarray(self.factors[key], dtype=np.float32)
        parts, at = [], 0
        for r, k, c in self.layout:
            u = f[:, at : at + r * c].reshape(-1, r, c)
            v = f[:, at + r * c : at + (r + k) * c].reshape(-1, k, c)
            parts.append((u @ v.transpose(0, 2, 1)).reshape(len(f), -1))
            at += (r + k) * c
        return np.concatenate(parts, axis=1)

    def copy_to(self, path: Path) -> None:
        from tdabench.api import FeatureStore

        if isinstance(self.factors, np.ndarray):
            FeatureStore.of(path, len(self.factors), [self.factors])
        else:
            self.factors.copy_to(path)  # type: ignore[attr-defined]


def _factors(g: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns U [b, r, c], V [b, k, c]: U V^T is the best rank-c approximation of g [b, r, k].

    Uses power iteration: most of a full SVD of many small matrices would be discarded.
    """
    import torch

    v = v.expand(len(g), -1, -1)
    for _ in range(_POWER_ITERATIONS):
        u = torch.linalg.qr(g @ v)[0]
        v = g.transpose(1, 2) @ u
        v = v / v.norm(dim=1, keepdim=True).clamp_min(1e-30)  # rows may be far below 1
    u = torch.linalg.qr(g @ v)[0]
    return u, g.transpose(1, 2) @ u
