"""Inverse-Hessian-vector products: explicit, conjugate gradient, LiSSA and Arnoldi."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from tdabench.api import Context, Example, MethodError, UsageError
from tdabench_influence.curvature import KINDS, product
from tdabench_influence.streaming import (
    Gradients,
    State,
    StreamingIndex,
    StreamingMethod,
    squared_norms,
)

if TYPE_CHECKING:
    import torch

    from tdabench.api import GradientEngine

_LARGEST_EXPLICIT = 20_000


@dataclass(frozen=True, kw_only=True)
class InverseMethod(StreamingMethod):
    """score(q, z) = g_q^T (C + lambda I)^-1 g_z with one curvature C over all layers.

    curvature  "fisher" (mean of g g^T, the training labels'), "gauss-newton" or "hessian" of the
               mean training loss; the last two cost a pass per query and product
    damping    lambda as a multiple of the mean eigenvalue of the Fisher, whatever the curvature
    """

    copies = 12  # query-sized float32 vectors that a solver holds

    curvature: Literal["fisher", "gauss-newton", "hessian"] = "fisher"
    damping: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.curvature not in KINDS:
            raise UsageError(
                f"{self.name}: unknown curvature {self.curvature!r}", f"One of: {', '.join(KINDS)}"
            )
        if self.damping < 0:
            raise UsageError(f"{self.name}: damping must not be negative, but is {self.damping}")

    def fit(self, context: Context, engine: GradientEngine, train: Sequence[Example]) -> State:
        norms = squared_norms(context, engine, train).sum(1)  # [n]
        mean = norms.mean() / engine.dim if len(norms) else 0.0
        return {"lambda": np.array([self.damping * mean])}

    def precondition(self, index: StreamingIndex, gradients: Gradients) -> Gradients:
        import torch

        v = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)  # [query, dim]
        solved = self.solve(index, v, float(index.state["lambda"][0]))
        return {
            layer.name: solved[:, layer.columns].reshape(-1, layer.d_out, layer.d_in)
            for layer in index.engine.layers
        }

    @abstractmethod
    def solve(self, index: StreamingIndex, v: torch.Tensor, lam: float) -> torch.Tensor:
        """(C + lam I)^-1 v of each row of v [query, dim]."""


@dataclass(frozen=True, kw_only=True)
class Explicit(InverseMethod):
    """The curvature as a matrix, solved in float64: the oracle for models of few weights."""

    name = "explicit"
    source = "Koh & Liang 2017, arXiv 1703.04730"
    summary = "influence with the explicit curvature matrix (tiny models)"

    def solve(self, index: StreamingIndex, v: torch.Tensor, lam: float) -> torch.Tensor:
        import torch

        d = index.engine.dim
        if d > _LARGEST_EXPLICIT:
            raise MethodError(
                f"{self.name}: {d} weights make a matrix of {8 * d * d >> 30} GiB",
                "Choose fewer layers by `layers`, or use cg",
            )
        if self.damping == 0 and self.curvature == "fisher" and index.n_train < d:
            raise MethodError(
                f"{self.name}: the Fisher of {index.n_train} examples in {d} dimensions is "
                "singular",
                "Set damping above 0",
            )
        c = product(index, torch.eye(d, device=v.device, dtype=torch.float64), self.curvature)
        c = (c + c.T) / 2
        c.diagonal().add_(lam)
        try:
            return torch.linalg.solve(c, v.double().T).T.to(v.dtype)
        except torch.linalg.LinAlgError as e:
            raise MethodError(
                f"{self.name}: the curvature is singular at damping {self.damping}",
                "Raise the damping",
            ) from e


@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(InverseMethod):
    """Conjugate gradient for all queries of a block at once, one curvature product an iteration.

    iterations  at most
    tolerance   stop where every residual has fallen to this share of its right side
    """

    name = "cg"
    source = "Koh & Liang 2017, arXiv 1703.04730; Martens 2010"
    summary = "influence by conjugate gradient"

    iterations: int = 100
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1 or not self.tolerance > 0:
            raise UsageError(f"{self.name}: iterations and tolerance must be positive")

    def solve(self, index: StreamingIndex, v: torch.Tensor, lam: float) -> torch.Tensor:
        import torch

        # In float64: the directions lose their conjugacy to float32 rounding within a few steps.
        v = v.double()
        x, r, p = torch.zeros_like(v), v.clone(), v.clone()
        rr = r.square().sum(1)  # [query]
        goal = rr * self.tolerance**2
        for _ in range(self.iterations):
            left = rr > goal
            if not bool(left.any()):
                break
            cp = product(index, p, self.curvature) + lam * p
            curve = (p * cp).sum(1)  # p^T (C + lam I) p
            if bool((curve[left] <= 0).any()):
                raise MethodError(
                    f"{self.name}: the {self.curvature} is not positive at damping {self.damping}",
                    "Raise the damping, or use curvature=fisher or gauss-newton",
                )
            step = torch.where(left, rr / curve.clamp_min(1e-300), 0.0)[:, None]
            x += step * p
            r -= step * cp
            before, rr = rr, r.square().sum(1)
            p = r + (rr / before.clamp_min(1e-300))[:, None] * p
        return x.float()


@dataclass(frozen=True, kw_only=True)
class LiSSA(InverseMethod):
    """The truncated Neumann series h <- v + h - (C_k + lambda I) h / s, returned as h / s.

    C_k is the curvature of a fresh random batch in each of `depth` steps (arXiv 1602.03943), s
    `scale` times its largest eigenvalue over the corpus, found by power iteration: smaller values
    converge faster until they diverge.

    batch  examples a step; all of them, if None
    """

    name = "lissa"
    source = "Agarwal et al. 2017, arXiv 1602.03943; Koh & Liang 2017, arXiv 1703.04730"
    summary = "influence by a truncated Neumann series"

    depth: int = 100
    batch: int | None = 64
    scale: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1 or (self.batch is not None and self.batch < 1) or not self.scale > 0:
            raise UsageError(f"{self.name}: depth, batch and scale must be positive")

    def solve(self, index: StreamingIndex, v: torch.Tensor, lam: float) -> torch.Tensor:
        import torch

        generator = index.context.torch_generator("lissa/power")
        u = torch.randn(1, v.shape[1], generator=generator).to(v)
        top = 0.0
        for _ in range(8):
            u = product(index, u / u.norm().clamp_min(1e-30), self.curvature)
            top = float(u.norm())
        s = self.scale * (top + lam) or 1.0
        rng = index.context.rng("lissa/batches")
        # By id, so that the order of the corpus carries no meaning.
        by_id = np.argsort([e.id for e in index.train], kind="stable")
        h = v.clone()
        for _ in range(self.depth):
            chosen = None
            if self.batch is not None and self.batch < index.n_train:
                chosen = by_id[rng.choice(index.n_train, self.batch, replace=False)]
            h = v + h - (product(index, h, self.curvature, chosen) + lam * h) / s
        if not bool(torch.isfinite(h).all()):
            raise MethodError(f"{self.name}: the series diverged", "Raise the scale or the batch")
        return h / s


@dataclass(frozen=True, kw_only=True)
class Arnoldi(InverseMethod):
    """H^-1 restricted to the leading `directions` of a Krylov space (arXiv 2112.03052).

    Lanczos from a random vector with full reorthogonalisation, `iterations` products; the Ritz
    pairs largest in magnitude are kept, and scores are taken within their span only.
    """

    name = "arnoldi"
    source = "Schioppa et al. 2022, arXiv 2112.03052"
    summary = "influence within the leading eigenvectors of the curvature"

    iterations: int = 60
    directions: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.directions <= self.iterations:
            raise UsageError(f"{self.name}: directions must lie between 1 and iterations")

    def build(self, context: Context, train: Sequence[Example]) -> StreamingIndex:
        index = super().build(context, train)
        index.state |= self._leading(index)
        return index

    def _leading(self, index: StreamingIndex) -> State:
        import torch

        d = index.engine.dim
        steps = min(self.iterations, d)
        basis = torch.zeros(steps, d, device=index.context.device)
        w = torch.randn(d, generator=index.context.torch_generator("arnoldi")).to(basis)
        basis[0] = w / w.norm()
        tri = np.zeros((steps, steps))
        used = steps
        for j in range(steps):
            w = product(index, basis[j : j + 1], self.curvature)[0]
            tri[j, j] = float(w.double() @ basis[j].double())
            for _ in range(2):  # twice is enough to keep the basis orthogonal
                w = w - basis[: j + 1].T @ (basis[: j + 1] @ w)
            beta = float(w.norm())
            if j + 1 == steps or beta <= 1e-6 * max(1e-30, np.abs(tri).max()):
                used = j + 1  # the Krylov space is invariant: nothing more to find
                break
            tri[j, j + 1] = tri[j + 1, j] = beta
            basis[j + 1] = w / beta
        values, vectors = np.linalg.eigh(tri[:used, :used])
        order = np.argsort(-np.abs(values), kind="stable")[: self.directions]
        chosen = torch.from_numpy(vectors[:, order]).to(basis)
        kept = (chosen.T @ basis[:used]).cpu().numpy()  # [directions, dim]
        return {"values": values[order], "vectors": kept}

    def solve(self, index: StreamingIndex, v: torch.Tensor, lam: float) -> torch.Tensor:
        import torch

        vectors = torch.from_numpy(index.state["vectors"]).to(v)
        values = torch.from_numpy(index.state["values"] + lam).to(v)
        return ((v @ vectors.T) / values) @ vectors
