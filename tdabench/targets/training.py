"""Fine-tuning: the recipe that a truth names, and the loop that follows it exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.errors import TdabenchError
from tdabench.method import named_seed
from tdabench.targets.target import Tokens, example_losses, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a target is fine-tuned on a group.

    A step minimises the mean over the batch of per-example losses (each the mean over response
    tokens), so that every example weighs the same whatever its length. `seed` of a run decides
    the order of examples and nothing else: there is no dropout.
    """

    lr: float = 1e-3
    epochs: int = 2
    batch_size: int = 32
    schedule: str = "linear"  # decay to 0, or "constant"
    warmup: float = 0.0  # share of steps
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0  # gradient norm; 0 leaves it

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def steps(self, n: int) -> int:
        """Optimizer steps for `n` examples; the last batch of an epoch may be short."""
        return self.epochs * -(-n // self.batch_size)

    def lr_at(self, step: int, total: int) -> float:
        warm = int(self.warmup * total)
        if step < warm:
            return self.lr * (step + 1) / warm
        if self.schedule == "constant":
            return self.lr
        return self.lr * (total - step) / max(1, total - warm)


def batch_order(n: int, recipe: Recipe, seed: int) -> Iterator[np.ndarray]:
    """Positions of each batch, epoch after epoch: a fresh permutation an epoch."""
    for epoch in range(recipe.epochs):
        order = np.random.default_rng(named_seed(seed, f"order-{epoch}")).permutation(n)
        for a in range(0, n, recipe.batch_size):
            yield order[a : a + recipe.batch_size]


def micro_batches(tokens: Sequence[Tokens], batch: np.ndarray) -> list[np.ndarray]:
    """Splits a batch by length where that saves padding. The summed gradient is the same."""
    lengths = np.array([len(tokens[i]) for i in batch])
    order = np.argsort(lengths, kind="stable")
    n = len(order)
    best, cut = n * lengths[order[-1]] * 0.9, 0  # a second pass must save a tenth to pay
    for c in range(4, n - 3):
        cost = c * lengths[order[c - 1]] + (n - c) * lengths[order[-1]]
        if cost < best:
            best, cut = cost, c
    return [batch[order[:cut]], batch[order[cut:]]] if cut else [batch]


def finetune(
    model: PreTrainedModel,
    tokens: Sequence[Tokens],
    recipe: Recipe,
    seed: int,
    pad_id: int,
    on_step: Callable[[int, int, float], None] | None = None,
) -> PreTrainedModel:
    """Trains `model` in place on `tokens` by `recipe` and returns it in eval mode.

    An empty sequence trains nothing. Raises TdabenchError when the loss stops being finite.
    """
    import torch

    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        params = list(model.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(
        params,
        lr=recipe.lr,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    total = recipe.steps(len(tokens))
    model.train()
    for step, batch in enumerate(batch_order(len(tokens), recipe, seed)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step, total)
        value = 0.0
        for part in micro_batches(tokens, batch):
            loss = example_losses(model, pad(tokens, part, pad_id).to(str(model.device))).sum()
            (loss / len(batch)).backward()
            value += float(loss.detach()) / len(batch)
        if not np.isfinite(value):
            raise TdabenchError(f"the training loss became {value} at step {step}")
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(params, recipe.clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_step:
            on_step(step + 1, total, value)
    return model.eval()
