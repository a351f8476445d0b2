"""An AdamW training run as a function that can be replayed and differentiated backwards.

Weights and moments are flat vectors [dim], so the formulas are those of one long vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tdabench.api import (
    Context,
    Example,
    MethodError,
    batch_order,
    example_losses,
    fast_products,
    map_batches,
    named_seed,
)

if TYPE_CHECKING:
    from tdabench.api import Batch, Recipe, Tokens


@dataclass(frozen=True)
class State:
    """Weights and Adam's moments before a step: [dim] each."""

    names: ClassVar[tuple[str, ...]] = ("theta", "m", "v")

    theta: Tensor
    m: Tensor
    v: Tensor


class Run:
    """AdamW on a corpus whose example i has the weight w_i, as `tdabench` fine-tunes:

        g     = sum over the batch of w_i grad loss_i / (share b)
        g'    = g min(1, clip / (|g| + 1e-6))
        m     = b1 m + (1 - b1) g',     v = b2 v + (1 - b2) g'^2
        theta = theta (1 - lr decay) - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

    `orders` are the corpus positions [b] of each batch. `weights` [train] are w; by default all
    equal `share`.
    """

    def __init__(
        self,
        context: Context,
        model: Any,
        tokens: Sequence[Tokens],
        orders: Sequence[np.ndarray],
        recipe: Recipe,
        share: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        # Fused attention and grouped products of experts cannot be differentiated twice.
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")
        self.context, self.tokens, self.orders, self.recipe = context, tokens, orders, recipe
        self.share, self.module = share, _Losses(model.to(dtype))
        self.weights = torch.full((len(tokens),), share, dtype=dtype, device=context.device)
        named = dict(self.module.named_parameters())
        self.shapes = {name: p.shape for name, p in named.items()}
        self.sizes = [p.numel() for p in named.values()]
        flat = torch.cat([p.detach().flatten() for p in named.values()])
        self.start = State(flat, torch.zeros_like(flat), torch.zeros_like(flat))
        self.dim = len(flat)

    def __len__(self) -> int:
        return len(self.orders)

    # ------------------------------------------------------------------ forwards

    def forwards(self, state: State, first: int, last: int) -> Iterator[State]:
        """Yields the states before steps first + 1 … last, from the state before step `first`."""
        for k in range(first, last):
            state = self._updated(state, self.clipped(self.gradient(state.theta, k))[0], k)
            self.context.progress("training steps", k + 1, len(self))
            yield state

    def gradient(self, theta: Tensor, k: int) -> Tensor:
        """Computes g of step k at `theta` [dim]."""
        named = self._named(theta)

        def compute(batch: Batch) -> Tensor:
            loss = self._loss(named, k, batch, self._weights_of(k, batch))
            return self._flat(torch.autograd.grad(loss, list(named.values())))

        total = torch.zeros_like(theta)
        for _, part in self._batches(k, compute):
            total += part
        if not bool(torch.isfinite(total).all()):
            raise MethodError(f"the training run diverged at step {k}", "Lower lr")
        return total

    def clipped(self, g: Tensor) -> tuple[Tensor, float, float]:
        """Returns (g', the factor applied, |g|); the factor is 1 if g is not clipped."""
        norm = float(torch.linalg.vector_norm(g))
        limit = self.recipe.clip
        factor = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
        return g * factor, factor, norm

    def _rates(self, k: int) -> tuple[float, float, float]:
        """Returns (lr, lr / (1 - b1^t), sqrt(1 - b2^t)) of step k, where t = k + 1."""
        r = self.recipe
        lr = r.lr_at(k, len(self))
        return lr, lr / (1 - r.beta1 ** (k + 1)), (1 - r.beta2 ** (k + 1)) ** 0.5

    def _updated(self, state: State, g: Tensor, k: int) -> State:
        r = self.recipe
        lr, rate, root = self._rates(k)
        m = r.beta1 * state.m + (1 - r.beta1) * g
        v = r.beta2 * state.v + (1 - r.beta2) * g.square()
        theta = state.theta * (1 - lr * r.weight_decay) - rate * m / (v.sqrt() / root + r.eps)
        return State(theta, m, v)

    # ------------------------------------------------------------------ backwards

    def backwards(self, state: State, k: int, later: State) -> tuple[State, np.ndarray, Tensor]:
        """Applies one backward step of the chain rule for all queries at once.

        `state` is the state before step k; `later` holds d loss_q / d (theta, m, v) after it,
        [query, dim] each. Returns the same derivatives before the step, the corpus positions [b]
        of the batch, and d loss_q / d w [query, b].
        """
        r = self.recipe
        lr, rate, root = self._rates(k)
        g = self.gradient(state.theta, k)
        cut, factor, norm = self.clipped(g)
        after = self._updated(state, cut, k)
        s = after.v.sqrt()
        low = s / root + r.eps  # the divisor of m

        by_m = later.m - rate * later.theta / low
        # sqrt has no derivative at 0, where g' and every earlier gradient are 0: v does not change.
        slope = torch.where(s > 0, rate * after.m / (low.square() * 2 * root * s), 0.0)
        by_v = later.v + later.theta * slope
        by_g = (1 - r.beta1) * by_m + 2 * (1 - r.beta2) * cut * by_v  # [query, dim]
        if factor < 1:  # g' = clip g / (|g| + 1e-6): reduces the part along g
            along = (by_g @ g) / (norm * (norm + 1e-6))
            by_g = factor * (by_g - along[:, None] * g)
        by_m, by_v = r.beta1 * by_m, r.beta2 * by_v
        by_theta = later.theta * (1 - lr * r.weight_decay)

        named = self._named(state.theta)
        sides = [self._split(row) for row in by_g]

        def compute(batch: Batch) -> tuple[Tensor, Tensor]:
            """Differentiates g: by_g . dg/dtheta [query, dim] and by_g . dg/dw [query, b]."""
            w = self._weights_of(k, batch).requires_grad_()
            over = list(named.values())
            loss = self._loss(named, k, batch, w)
            grads = torch.autograd.grad(loss, over, create_graph=True)
            found = [
                torch.autograd.grad(grads, [*over, w], side, retain_graph=True) for side in sides
            ]
            return (
                torch.stack([self._flat(f[:-1]) for f in found]),
                torch.stack([f[-1] for f in found]),
            )

        places, dots = [], []
        for index, (curved, dot) in self._batches(k, compute):
            by_theta += curved
            places.append(self.orders[k][index])
            dots.append(dot)
        return State(by_theta, by_m, by_v), np.concatenate(places), torch.cat(dots, dim=1)

    # ------------------------------------------------------------------ flat vectors

    def _batches(self, k: int, compute: Any) -> Iterator[tuple[np.ndarray, Any]]:
        part = [self.tokens[int(i)] for i in self.orders[k]]

        def fast(batch: Batch) -> Any:
            with fast_products():
                return compute(batch)

        return map_batches(self.context, part, fast, what="a training step", max_examples=64)

    def _weights_of(self, k: int, batch: Batch) -> Tensor:
        """Returns w of the examples of a batch of step k: [b]."""
        return self.weights[torch.from_numpy(self.orders[k][batch.index])]

    def _loss(self, named: dict[str, Tensor], k: int, batch: Batch, w: Tensor) -> Tensor:
        """Computes the part of the loss of step k that `batch` contributes."""
        return (w * self._losses(named, batch)).sum() / (self.share * len(self.orders[k]))

    def _named(self, theta: Tensor) -> dict[str, Tensor]:
        parts = self._split(theta.detach())
        return {name: p.requires_grad_() for name, p in zip(self.shapes, parts)}

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Splits a vector [dim] by parameter name, with tied parameters under each name."""
        parts = dict(zip(map(id, self.module.parameters()), self._split(flat)))
        named = self.module.model.named_parameters(remove_duplicate=False)
        return {name: parts[id(p)] for name, p in named}

    def _split(self, flat: Tensor) -> list[Tensor]:
        return [p.view(s) for p, s in zip(flat.split(self.sizes), self.shapes.values())]

    @staticmethod
    def _flat(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([p.flatten() for p in parts])

    def _losses(self, named: dict[str, Tensor], batch: Batch) -> Tensor:
        return torch.func.functional_call(self.module, named, (batch,))

    def query_losses(self, theta: Tensor, queries: Sequence[Tokens]) -> np.ndarray:
        """Computes each query's loss at `theta` in the precision of the run: float64 [query]."""
        out = np.empty(len(queries))
        named = {name: p.detach() for name, p in self._named(theta).items()}
        with torch.no_grad():
            for index, losses in map_batches(
                self.context, queries, lambda b: self._losses(named, b), what="query losses"
            ):
                out[index] = losses.double().cpu().numpy()
        return out

    def query_gradients(self, theta: Tensor, queries: Sequence[Tokens]) -> Tensor:
        """Computes the gradients of each query's loss: [query, dim]."""
        out = theta.new_empty(len(queries), self.dim)
        named = self._named(theta)

        def compute(batch: Batch) -> list[Tensor]:
            over = list(named.values())
            losses = self._losses(named, batch)
            return [self._flat(torch.autograd.grad(x, over, retain_graph=True)) for x in losses]

        for index, found in map_batches(
            self.context, queries, compute, what="query gradients", max_examples=16
        ):
            for i, g in zip(index, found):
                out[int(i)] = g
        return out


class _Losses(torch.nn.Module):
    """Losses [b] of a batch as the output of a module, as `functional_call` requires."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        return example_losses(self.model, batch)


def batch_orders(
    context: Context, train: Sequence[Example], recipe: Recipe, share: float, run: str = ""
) -> list[np.ndarray]:
    """Draws the corpus positions of each batch of batch_size / share examples, epoch by epoch.

    They are drawn by id, so that the order of the corpus does not matter; with `run`, as that run
    of a truth drew them from the corpus.
    """
    if run:
        own = replace(recipe, batch_size=max(1, round(recipe.batch_size / share)))
        return list(batch_order(len(train), own, named_seed(0, run)))
    by_id = np.argsort([e.id for e in train], kind="stable")
    size = max(1, round(recipe.batch_size / share))
    orders = []
    for epoch in range(recipe.epochs):
        order = by_id[context.rng(f"run/order-{epoch}").permutation(len(train))]
        orders += [order[a : a + size] for a in range(0, len(order), size)]
    return orders
