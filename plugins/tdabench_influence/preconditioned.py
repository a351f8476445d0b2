"""EK-FAC as the preconditioner of an iterative solution with the exact Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from tdabench.api import Context, Example, UsageError
from tdabench_influence.inverse import InverseIndex, InverseMethod, conjugate_gradient
from tdabench_influence.source import _GaussNewton
from tdabench_influence.streaming import State

if TYPE_CHECKING:
    import torch

    from tdabench.api import GradientEngine


@dataclass(frozen=True, kw_only=True)
class EKFACCG(InverseMethod):
    """Solves (C + lambda I) x = g_q by conjugate gradient, preconditioned by EK-FAC.

    C is the Gauss-Newton matrix (or the Hessian) of the mean training loss over all layers, without
    approximation; EK-FAC, which approximates it layer by layer, with the same lambda, is where the
    iteration begins and its preconditioner. After 0 iterations the scores are those of EK-FAC. This
    is ASTRA (arXiv 2507.14740) with conjugate gradient in place of its stochastic Neumann series

        x <- x - a M^-1 ((C_batch + lambda I) x - g_q),   M = EK-FAC + lambda I,

    which needs no step size and, with a fixed C, fewer products. Every product costs a pass over
    the examples *per query*.

    damping     lambda as a multiple of the mean eigenvalue of EK-FAC over all weights
    iterations  maximum number of iterations
    tolerance   stop when every residual is below this share of its right-hand side, in the norm of
                M^-1
    examples    number of training examples, drawn by a seed, over which C is taken; None: all
    """

    name = "ekfac-cg"
    version = 1
    source = "Wang et al. 2025 (ASTRA), arXiv 2507.14740"
    summary = "influence by conjugate gradient with EK-FAC as preconditioner (slow: per query)"
    grid = {"damping": (0.001, 0.01, 0.1), "iterations": (0, 5)}
    query_time = ("damping", "iterations", "tolerance", "examples")
    check_settings = {"iterations": 1, "examples": 4}

    curvature: Literal["gauss-newton", "hessian"] = "gauss-newton"
    damping: float = 0.01
    iterations: int = 10
    tolerance: float = 1e-2
    examples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.curvature not in ("gauss-newton", "hessian"):
            raise UsageError(
                f"{self.name}: unknown curvature {self.curvature!r}",
                "One of: gauss-newton, hessian",
            )
        if self.iterations < 0 or not self.tolerance > 0:
            raise UsageError(f"{self.name}: iterations >= 0 and tolerance > 0")
        if self.examples is not None and self.examples < 1:
            raise UsageError(f"{self.name}: examples must be at least 1, not {self.examples}")
        if not self.damping > 0:
            raise UsageError(f"{self.name}: damping must be positive, not {self.damping}")

    def fit(self, context: Context, engine: GradientEngine, train: Sequence[Example]) -> State:
        curvature = _GaussNewton(checkpoint=self.checkpoint, layers=self.layers, bias=self.bias)
        state = curvature.fit(context, engine, train)
        values = [state[f"lambda.{layer.name}"] for layer in engine.layers]
        total = sum(float(v.sum(dtype=np.float64)) for v in values)
        return state | {"mean": np.array([total / engine.dim])}

    def solve(self, index: InverseIndex, v: torch.Tensor, lam: float) -> torch.Tensor:
        import torch

        if lam == 0:  # no gradients: no scores
            return torch.zeros_like(v)
        chosen, v64 = self._chosen(index), v.double()
        return conjugate_gradient(
            lambda p: index.product(p, chosen) + lam * p,
            v64,
            self.iterations,
            self.tolerance,
            self.what,
            precondition=lambda r: self._inverse(index, r, lam),
            start=self._inverse(index, v64, lam),
        ).to(v.dtype)

    def _chosen(self, index: InverseIndex) -> np.ndarray | None:
        """Draws the examples of C by id, so that the order of the corpus does not matter."""
        if self.examples is None or self.examples >= index.n_train:
            return None
        rng = index.context.rng("ekfac-cg/examples")
        return index.by_id()[rng.choice(index.n_train, self.examples, replace=False)]

    def _inverse(self, index: InverseIndex, v: torch.Tensor, lam: float) -> torch.Tensor:
        """Computes (EK-FAC + lam I)^-1 v of each row [query, dim], in float64."""
        import torch

        out = torch.empty_like(v)
        for layer in index.engine.layers:
            parts = (index.state[f"{k}.{layer.name}"] for k in ("q_a", "q_s", "lambda"))
            q_a, q_s, values = (torch.from_numpy(p).to(v) for p in parts)
            g = v[:, layer.columns].view(-1, layer.d_out, layer.d_in)
            g = q_s @ ((q_s.T @ g @ q_a) / (values + lam)) @ q_a.T
            out[:, layer.columns] = g.flatten(1)
        return out
