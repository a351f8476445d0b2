"""MAGIC: the exact derivative of a query's loss after training by each example's weight."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tdabench.api import (
    Context,
    Example,
    Index,
    MethodError,
    TDAMethod,
    UsageError,
    check_pooling,
    read_arrays,
    read_jsonl,
    write_arrays,
    write_jsonl,
)
from tdabench_influence.recipe import Followed

if TYPE_CHECKING:
    from tdabench_influence.training import Run, State

QUERY_BYTES = 512 << 20  # of vectors [dim] held for a block of queries


@dataclass(frozen=True, kw_only=True)
class MAGIC(Followed, TDAMethod):
    """score(q, z) = -d loss_q(theta_T) / d w_z: the metagradient (arXiv 2503.13751).

    theta_T are the weights after training with the target's recipe from `checkpoint` on the whole
    corpus, with each example's loss weighted by w_z. The derivative is exact up to rounding, by
    the chain rule backwards through every step of AdamW and its clipping. It takes one backward
    run *per query*, about 2.5 times as expensive as training. There is no dropout, as in the
    recipe.

    checkpoint   where training starts
    precision    of the arithmetic: float32 or float64
    pooling      how example scores become a group's: sum, mean, softmax or softmax-abs
    temperature  of softmax pooling; unused by sum and mean

    `recipe` and `share` define the run (see `Followed`). States are kept every sqrt(steps) steps;
    the segment between two states is trained again for each block of queries.
    """

    name = "magic"
    version = 2
    family = "trajectory"
    source = "Ilyas & Engstrom 2025, arXiv 2504.16430; Engstrom et al. 2025, arXiv 2503.13751"
    summary = "exact metagradient through the training run (slow: one backward run per query)"
    grid = {"share": (1.0, None)}

    pooling: str = "sum"
    temperature: float = 1.0
    checkpoint: str = "base"
    precision: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        check_pooling(self.name, self.pooling, self.temperature)
        self.check_followed()
        if self.precision not in ("float32", "float64"):
            raise UsageError(
                f"{self.name}: unknown precision {self.precision!r}", "One of: float32, float64"
            )

    def run(self, context: Context, train: Sequence[Example], orders: list[np.ndarray]) -> Run:
        import torch

        from tdabench_influence.training import Run

        model = context.target.fresh_model(self.checkpoint).to(context.device)  # type: ignore[arg-type]
        dtype = {"float32": torch.float32, "float64": torch.float64}[self.precision]
        tokens = context.target.tokenize(train)
        recipe, share = self.recipe_of(context), self.share_of(context)
        return Run(context, model, tokens, orders, recipe, share, dtype)

    def build(self, context: Context, train: Sequence[Example]) -> MagicIndex:
        from tdabench_influence.training import batch_orders

        recipe, share = self.recipe_of(context), self.share_of(context)
        orders = batch_orders(context, train, recipe, share, self.follow)
        run = self.run(context, train, orders)
        every = max(1, math.isqrt(len(run)))
        kept = {0: run.start}
        for k, state in enumerate(run.forwards(run.start, 0, len(run)), start=1):
            if k % every == 0 or k == len(run):
                kept[k] = state
        return MagicIndex(self, context, list(train), run, kept)

    def load(self, context: Context, path: Path) -> MagicIndex:
        import torch

        from tdabench_influence.training import State

        arrays, meta = read_arrays(path / "run.safetensors")
        self.check_saved(path, meta)
        train = list(read_jsonl(path / "train.jsonl")) if meta["n_train"] else []
        ends = arrays["ends"]
        orders = np.split(arrays["orders"], ends[:-1]) if len(ends) else []
        run = self.run(context, train, orders)
        kept = {
            k: State(
                *(torch.from_numpy(arrays[f"{k}.{v}"]).to(context.device) for v in State.names)
            )
            for k in meta["kept"]
        }
        return MagicIndex(self, context, train, run, kept)


class MagicIndex(Index):
    """The run: its batches, and its state at selected steps, including the first and the last."""

    def __init__(
        self,
        method: MAGIC,
        context: Context,
        train: list[Example],
        run: Run,
        kept: dict[int, State],
    ) -> None:
        self.method, self.context, self.train, self.run, self.kept = (
            method, context, train, run, kept,
        )  # fmt: skip
        self.n_train = len(train)
        self.pooling, self.temperature = method.pooling, method.temperature

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        out = np.zeros((len(queries), self.n_train), dtype=np.float32)
        tokens = self.context.target.tokenize(queries)
        # Three vectors before a step, three after it, and two for its gradient.
        step = max(1, QUERY_BYTES // (8 * self.run.dim * self.run.start.theta.element_size()))
        for a in range(0, len(queries), step):
            out[a : a + step] = -self._metagradients(tokens[a : a + step], a, len(queries))
        if not np.isfinite(out).all():
            raise MethodError(
                f"{self.method.name} returned NaN or infinite scores",
                "The run is too rough to differentiate: lower lr, or raise eps",
            )
        return out

    def warm_up(self, queries: Sequence[Example]) -> None:
        """Takes the derivative of the last step: a score goes back through the whole run."""
        import torch

        from tdabench_influence.training import State

        last = len(self.run)
        by_theta = self.run.query_gradients(
            self.kept[last].theta, self.context.target.tokenize(queries)
        )
        later = State(by_theta, torch.zeros_like(by_theta), torch.zeros_like(by_theta))
        for k, state in self._states_backwards():
            self.run.backwards(state, k, later)
            break

    def _metagradients(self, queries: Sequence[Any], first: int, total: int) -> np.ndarray:
        """Computes d loss_q / d w [query, train] for a block of queries."""
        import torch

        from tdabench_influence.training import State

        end = self.kept[len(self.run)]
        by_theta = self.run.query_gradients(end.theta, queries)
        later = State(by_theta, torch.zeros_like(by_theta), torch.zeros_like(by_theta))
        out = np.zeros((len(queries), self.n_train))
        for k, state in self._states_backwards():
            later, places, by_weight = self.run.backwards(state, k, later)
            out[:, places] += by_weight.double().cpu().numpy()
            done = first * len(self.run) + (len(self.run) - k) * len(queries)
            self.context.progress("steps backwards", done, total * len(self.run))
        return out

    def _states_backwards(self) -> Iterator[tuple[int, State]]:
        """Yields (k, state before step k) from the last step, retraining segment by segment."""
        marks = sorted(self.kept)
        for a, b in reversed(list(itertools.pairwise(marks))):
            states = [self.kept[a], *self.run.forwards(self.kept[a], a, b - 1)]
            for k in range(b - 1, a - 1, -1):
                yield k, states.pop()

    def save(self, path: Path) -> None:
        arrays = {
            f"{k}.{name}": getattr(state, name).cpu().numpy()
            for k, state in self.kept.items()
            for name in state.names
        }
        orders = self.run.orders
        arrays["orders"] = np.concatenate([*orders, np.zeros(0)]).astype(np.int64)
        arrays["ends"] = np.cumsum([len(o) for o in orders], dtype=np.int64)
        meta: dict[str, Any] = {"method": self.method.name, "version": self.method.version}
        meta |= {"n_train": self.n_train, "kept": sorted(self.kept)}
        write_arrays(path / "run.safetensors", arrays, meta)
        write_jsonl(path / "train.jsonl", self.train)
