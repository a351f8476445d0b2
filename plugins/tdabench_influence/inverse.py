"""Inverse-Hessian-vector products: explicit, conjugate gradient, LiSSA and Arnoldi."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

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
_LARGEST_GRAM = 8_192  # examples: a matrix of 256 MiB


class InverseIndex(StreamingIndex):
    """Vectors to solve in, their products with the curvature C, and scores of solutions.

    In general the vectors hold all weights, and a product is a pass over the corpus. With the
    Fisher C = G^T G / n of fewer examples than weights, every solver's result for a query's
    gradient v has the form a v + G^T b. In an orthonormal basis of the span of the training
    gradients, example i is row i of R [n, r], R R^T = G G^T, and the query is (v's part in the
    span, the length of the rest): r + 1 numbers that preserve every inner product. One pass for
    the Gram matrix G G^T therefore replaces all passes of all queries, without approximation.
    """

    method: InverseMethod

    @cached_property
    def rows(self) -> torch.Tensor | None:
        """R, and zeros for the part outside the span: float64 [n, r + 1]; None if in weights."""
        import torch

        if "rows" not in self.state:
            return None
        r = torch.from_numpy(self.state["rows"]).to(self.context.device)
        return torch.nn.functional.pad(r, (0, 1))

    @cached_property
    def eigenvalues(self) -> torch.Tensor:
        """The diagonal [r + 1] of the Fisher in the basis of `rows`, where it is diagonal."""
        assert self.rows is not None
        return self.rows.square().sum(0) / self.n_train

    @property
    def dim(self) -> int:
        return self.state["rows"].shape[1] + 1 if "rows" in self.state else self.engine.dim

    @property
    def lam(self) -> float:
        """Damping added to every eigenvalue of the curvature."""
        return self.method.damping * float(self.state["mean"][0])

    def product(self, v: torch.Tensor, chosen: np.ndarray | None = None) -> torch.Tensor:
        """Computes C v for each row of v [k, dim]; C is over the examples `chosen` (None: all)."""
        rows = self.rows
        if rows is None:
            return product(self, v, self.method.curvature, chosen)
        if chosen is None:
            return v * self.eigenvalues
        return (v @ rows[chosen].T) @ rows[chosen] / len(chosen)

    def start(self, name: str) -> torch.Tensor:
        """Returns a random vector [dim], the same for every order of the corpus."""
        import torch

        rows = self.rows
        if rows is None:
            generator = self.context.torch_generator(name)
            return torch.randn(self.dim, generator=generator).to(self.context.device)
        weights = np.empty(self.n_train)
        weights[self.by_id()] = self.context.rng(name).standard_normal(self.n_train)
        return torch.from_numpy(weights).to(rows) @ rows

    def by_id(self) -> np.ndarray:
        """Returns the positions of the training examples sorted by id."""
        return np.argsort([e.id for e in self.train], kind="stable")

    def compress(self) -> State:
        """Computes R from the Gram matrix of training gradients, and the mean Fisher eigenvalue."""
        import torch

        n, step = self.n_train, self.block()
        gram = torch.empty(n, n, dtype=torch.float64, device=self.context.device)
        for a in range(0, n, step):
            b = min(a + step, n)
            for index, part in self.products(self.gradients(self.train[a:b]), range(a, n)):
                values, at = torch.from_numpy(part).to(gram), a + index
                gram[a:b, at], gram[at, a:b] = values, values.T
        if not bool(gram.isfinite().all()):
            bad = self.train[int((~gram.diagonal().isfinite()).nonzero()[0])].id
            raise MethodError(
                f"{self.method.name}: the gradient of {bad!r} is not finite",
                "Check that example's loss under the target, or choose another checkpoint",
            )
        mean = float(gram.trace()) / n / self.engine.dim
        values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        # Smaller eigenvalues are float32 rounding errors.
        kept = values > 1e-7 * values.max().clamp_min(1e-300)
        rows = vectors[:, kept] * values[kept].sqrt()  # [n, r]
        return {"rows": rows.cpu().numpy(), "mean": np.array([mean])}

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        import torch

        rows = self.rows
        if rows is None:
            return super().score(queries)
        out = np.empty((len(queries), self.n_train), dtype=np.float32)
        values = self.eigenvalues * self.n_train  # of the Gram matrix, 0 last
        for at, part in self.blocks(queries):
            gradients = self.gradients(part)
            squares = rows.new_zeros(len(part))
            for g in gradients.values():  # without a copy of it
                squares += torch.linalg.vector_norm(g.flatten(1), dim=1).double().square()
            s = rows.new_empty(len(part), self.n_train)  # g_q . g_i
            for index, products in self.products(gradients):
                s[:, index] = torch.from_numpy(products).to(s)
            v = s @ rows / values.clamp_min(1e-300)  # [query, r + 1]
            v[:, -1] = (squares - v.square().sum(1)).clamp_min(0).sqrt()
            solved = self.method.solve(self, v, self.lam)
            out[at] = (solved @ rows.T).cpu().numpy()
        return self.finite(out)

    def warm_up(self, queries: Sequence[Example]) -> None:
        """Does every step of a score but for the pass over the corpus, of which it does a part."""
        if self.rows is None:
            return super().warm_up(queries)
        for _ in self.products(self.gradients(queries), self.few()):
            pass
        self.method.solve(self, self.rows.new_ones(len(queries), self.dim), self.lam)


@dataclass(frozen=True, kw_only=True)
class InverseMethod(StreamingMethod):
    """score(q, z) = g_q^T (C + lambda I)^-1 g_z with one curvature C over all layers.

    curvature  "fisher" (mean of g g^T with the training labels), "gauss-newton" or "hessian" of the
               mean training loss; the last two cost one pass per query and product
    damping    lambda as a multiple of the mean eigenvalue of the Fisher, for every curvature
    """

    copies = 12  # query-sized float32 vectors that a solver holds
    version = 2
    index_type = InverseIndex
    grid = {"damping": (1.0, 10.0, 100.0, 1e3, 1e4), "checkpoint": ("base", "warm")}
    query_time: ClassVar[tuple[str, ...]] = ("damping",)

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

    def build(self, context: Context, train: Sequence[Example]) -> InverseIndex:
        index = InverseIndex(self, context, list(train), {})
        if self.curvature == "fisher" and 0 < index.n_train <= min(_LARGEST_GRAM, index.dim):
            index.state = index.compress()
        else:
            index.state = self.fit(context, index.engine, train)
        return index

    def fit(self, context: Context, engine: GradientEngine, train: Sequence[Example]) -> State:
        norms = squared_norms(context, engine, train).sum(1)  # [n]
        return {"mean": np.array([norms.mean() / engine.dim if len(norms) else 0.0])}

    def precondition(self, index: StreamingIndex, gradients: Gradients) -> Gradients:
        import torch

        assert isinstance(index, InverseIndex)
        v = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)  # [query, dim]
        solved = self.solve(index, v, index.lam)
        return {
            layer.name: solved[:, layer.columns].reshape(-1, layer.d_out, layer.d_in)
            for layer in index.engine.layers
        }

    @property
    def what(self) -> str:
        """The matrix to invert, for messages."""
        return f"{self.name}: the {self.curvature} at damping {self.damping}"

    @abstractmethod
    def solve(self, index: InverseIndex, v: torch.Tensor, lam: float) -> torch.Tensor:
        """Solves (C + lam I) x = v for each row of v [query, dim], with C from `index.product`."""


@dataclass(frozen=True, kw_only=True)
class Explicit(InverseMethod):
    """The curvature as a matrix, solved in float64: the reference for the other solvers.

    The Fisher of up to 8,192 examples for any number of weights, other curvatures for up to 20,000
    weights.
    """

    name = "explicit"
    source = "Koh & Liang 2017, arXiv 1703.04730"
    summary = "influence with the exact inverse of the Fisher (or of a tiny model's Hessian)"

    def solve(self, index: InverseIndex, v: torch.Tensor, lam: float) -> torch.Tensor:
        import torch

        d = index.dim
        if d > _LARGEST_EXPLICIT:
            raise MethodError(
                f"{self.name}: {d} weights make a matrix of {8 * d * d >> 30} GiB",
                "Choose fewer layers with `layers`, or use cg",
            )
        if self.damping == 0 and self.curvature == "fisher" and index.n_train < index.engine.dim:
            raise MethodError(
                f"{self.name}: the Fisher of {index.n_train} examples in {index.engine.dim} "
                "dimensions is singular",
                "Set damping above 0",
            )
        if index.rows is not None:  # a diagonal matrix
            c = index.eigenvalues + lam
            if not bool((c > 0).all()):
                raise self._singular()
            return v / c
        c = index.product(torch.eye(d, device=v.device, dtype=torch.float64))
        c = (c + c.T) / 2
        c.diagonal().add_(lam)
        try:
            return torch.linalg.solve(c, v.double().T).T.to(v.dtype)
        except torch.linalg.LinAlgError as e:
            raise self._singular() from e

    def _singular(self) -> MethodError:
        return MethodError(
            f"{self.name}: the curvature is singular at damping {self.damping}", "Raise the damping"
        )


@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(InverseMethod):
    """Conjugate gradient for all queries of a block at once, one curvature product per iteration.

    iterations  maximum number of iterations
    tolerance   stop when every residual is below this share of its right-hand side
    """

    name = "cg"
    source = "Koh & Liang 2017, arXiv 1703.04730; Martens 2010"
    summary = "influence by conjugate gradient"
    query_time = ("damping", "iterations", "tolerance")

    iterations: int = 100
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1 or not self.tolerance > 0:
            raise UsageError(f"{self.name}: iterations and tolerance must be positive")

    def solve(self, index: InverseIndex, v: torch.Tensor, lam: float) -> torch.Tensor:
        return conjugate_gradient(
            lambda p: index.product(p) + lam * p, v, self.iterations, self.tolerance, self.what
        )


def conjugate_gradient(
    apply: Callable[[torch.Tensor], torch.Tensor],
    b: torch.Tensor,
    iterations: int,
    tolerance: float,
    what: str,
    precondition: Callable[[torch.Tensor], torch.Tensor] = lambda r: r,
    start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Solves A x = b for each row of b [query, dim] by preconditioned conjugate gradient.

    `apply` computes A x and `precondition` M^-1 x of each row; the iteration begins at `start`
    (None: zero). A row stops once its residual r has r^T M^-1 r <= tolerance^2 b^T M^-1 b. Raises
    MethodError naming `what` if A is not positive.
    """
    import torch

    # In float64: with float32 rounding the directions lose conjugacy within a few steps.
    right = b.to(torch.float64, copy=True)
    if start is None:
        x, r = torch.zeros_like(right), right.clone()
    elif iterations:
        x, r = start.clone(), right - apply(start)
    else:
        return start.to(b.dtype)
    z = precondition(r)
    p, rz = z.clone(), (r * z).sum(1)  # [query]
    goal = (right * precondition(right)).sum(1) * tolerance**2
    for _ in range(iterations):
        left = rz > goal
        if not bool(left.any()):
            break
        ap = apply(p)
        curve = (p * ap).sum(1)  # p^T A p
        if bool((curve[left] <= 0).any()):
            raise MethodError(
                f"{what} is not positive",
                "Raise the damping, or use another curvature: gauss-newton is never negative",
            )
        step = torch.where(left, rz / curve.clamp_min(1e-300), 0.0)[:, None]
        x += step * p
        r -= step * ap
        z = precondition(r)
        before, rz = rz, (r * z).sum(1)
        p = z + (rz / before.clamp_min(1e-300))[:, None] * p
    return x.to(b.dtype)


@dataclass(frozen=True, kw_only=True)
class LiSSA(InverseMethod):
    """The truncated Neumann series h <- v + h - (C_k + lambda I) h / s, returned as h / s.

    C_k is the curvature of a fresh random batch in each step (arXiv 1602.03943). Smaller values of
    s converge faster, until they diverge.

    depth  number of steps
    scale  s as a multiple of the curvature's largest eigenvalue over the corpus, found by power
           iteration
    batch  examples per step; None is all of them
    """

    name = "lissa"
    source = "Agarwal et al. 2017, arXiv 1602.03943; Koh & Liang 2017, arXiv 1703.04730"
    summary = "influence by a truncated Neumann series"
    grid = {"depth": (100, 1000), **InverseMethod.grid}
    query_time = ("damping", "depth", "batch", "scale")

    depth: int = 100
    batch: int | None = 64
    scale: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth < 1 or (self.batch is not None and self.batch < 1) or not self.scale > 0:
            raise UsageError(f"{self.name}: depth, batch and scale must be positive")

    def solve(self, index: InverseIndex, v: torch.Tensor, lam: float) -> torch.Tensor:
        import torch

        s = self.scale * (self._largest(index) + lam) or 1.0
        rng = index.context.rng("lissa/batches")
        by_id = index.by_id()  # the order of the corpus does not matter
        h = v.clone()
        for _ in range(self.depth):
            chosen = None
            if self.batch is not None and self.batch < index.n_train:
                chosen = by_id[rng.choice(index.n_train, self.batch, replace=False)]
            h = v + h - (index.product(h, chosen) + lam * h) / s
        if not bool(torch.isfinite(h.float()).all()):
            raise MethodError(f"{self.name}: the series diverged", "Raise the scale or the batch")
        return h / s

    def _largest(self, index: InverseIndex) -> float:
        """Estimates the curvature's largest eigenvalue from below."""
        u, top = index.start("lissa/power")[None], 0.0
        for _ in range(8):
            u = index.product(u / u.norm().clamp_min(1e-30))
            top = float(u.norm())
        return top


@dataclass(frozen=True, kw_only=True)
class Arnoldi(InverseMethod):
    """H^-1 restricted to the leading `directions` of a Krylov space (arXiv 2112.03052).

    Lanczos from a random vector with full reorthogonalisation. The Ritz pairs largest in magnitude
    are kept, and scores are computed within their span only.

    iterations  products with the curvature; None is twice the directions
    directions  Ritz pairs kept
    """

    name = "arnoldi"
    source = "Schioppa et al. 2022, arXiv 2112.03052"
    summary = "influence within the leading eigenvectors of the curvature"

    grid = {"directions": (30, 300), **InverseMethod.grid}

    iterations: int | None = None
    directions: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.directions <= (self.iterations or 2 * self.directions):
            raise UsageError(f"{self.name}: directions must be between 1 and iterations")

    def build(self, context: Context, train: Sequence[Example]) -> InverseIndex:
        index = super().build(context, train)
        index.state |= self._leading(index)
        return index

    def _leading(self, index: InverseIndex) -> State:
        import torch

        steps = min(self.iterations or 2 * self.directions, index.dim)
        w = index.start("arnoldi")
        basis = torch.zeros(steps, index.dim).to(w)
        basis[0] = w / w.norm().clamp_min(1e-30)
        tri = np.zeros((steps, steps))
        used = steps
        for j in range(steps):
            w = index.product(basis[j : j + 1])[0]
            tri[j, j] = float(w.double() @ basis[j].double())
            for _ in range(2):  # twice is enough to keep the basis orthogonal
                w = w - basis[: j + 1].T @ (basis[: j + 1] @ w)
            beta = float(w.norm())
            if j + 1 == steps or beta <= 1e-6 * max(1e-30, np.abs(tri).max()):
                used = j + 1  # the Krylov space is invariant: no more directions
                break
            tri[j, j + 1] = tri[j + 1, j] = beta
            basis[j + 1] = w / beta
        values, vectors = np.linalg.eigh(tri[:used, :used])
        order = np.argsort(-np.abs(values), kind="stable")[: self.directions]
        chosen = torch.from_numpy(vectors[:, order]).to(basis)
        kept = (chosen.T @ basis[:used]).cpu().numpy()  # [directions, dim]
        return {"values": values[order], "vectors": kept}

    def solve(self, index: InverseIndex, v: torch.Tensor, lam: float) -> torch.Tensor:
        import torch

        vectors = torch.from_numpy(index.state["vectors"]).to(v)
        values = torch.from_numpy(index.state["values"] + lam).to(v)
        return ((v @ vectors.T) / values) @ vectors
