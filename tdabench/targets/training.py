"""Fine-tuning: the recipe that a truth names, and the loop that follows it exactly."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.errors import TdabenchError, UsageError, unknown
from tdabench.seeds import named_seed
from tdabench.targets.batches import Tokens, out_of_memory, pad
from tdabench.targets.lora import LoRA
from tdabench.targets.target import example_losses

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("float32", "bfloat16", "float16")

OnCheckpoint = Callable[[int, "PreTrainedModel"], None]  # (steps done, the model as it is then)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a target is fine-tuned on a group.

    A step minimises the mean over the batch of per-example losses (each the mean over response
    tokens), so that every example weighs the same whatever its length. The seed of a run decides
    the order of examples, and with `lora_rank` the adapters' first values. Dropout is off,
    whatever the model's configuration says: it would be noise that no seed of ours rules.

    Raises UsageError for a value that means nothing.
    """

    lr: float = 1e-3
    epochs: int = 2
    batch_size: int = 32
    schedule: str = "linear"  # decay to 0; "cosine" decays to 0 too; or "constant"
    warmup: float = 0.0  # share of steps
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0  # gradient norm; 0 leaves it
    # Recorded only where they differ from the default: truths made before them keep their keys.
    optimizer: str = "adamw"  # or "sgd"
    momentum: float = 0.0  # of sgd
    max_steps: int = 0  # optimizer steps instead of epochs; 0: by epochs
    lora_rank: int = 0  # train adapters of this rank and merge them; 0: every weight
    lora_alpha: float = 16.0  # an adapter adds alpha / rank * B A
    lora_targets: tuple[str, ...] = ()  # last parts of layer names; (): all linear but the output
    micro_batch: int = 0  # most examples a forward pass (gradient accumulation); 0: the batch
    checkpointing: bool = False  # recompute activations in the backward pass: less memory
    precision: str = "float32"  # of the forward pass (autocast); weights stay float32
    keep: tuple[int, ...] = ()  # after which steps to keep a checkpoint; 0: before the first

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        object.__setattr__(self, "keep", tuple(sorted({int(k) for k in self.keep})))
        for what, value, known in (
            ("schedule", self.schedule, SCHEDULES),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise unknown(what, value, known)
        for name, least in (
            ("epochs", 1), ("batch_size", 1), ("max_steps", 0), ("micro_batch", 0),
            ("lora_rank", 0), ("warmup", 0), ("weight_decay", 0), ("momentum", 0), ("clip", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise UsageError(f"recipe: {name} = {getattr(self, name)}", f"At least {least}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise UsageError(f"recipe: lr = {self.lr}", "A positive number")
        if self.warmup > 1:
            raise UsageError(f"recipe: warmup = {self.warmup}", "It is a share of all steps")
        if self.momentum and self.optimizer != "sgd":
            raise UsageError("recipe: momentum belongs to sgd", "AdamW has beta1")
        if self.keep and self.keep[0] < 0:
            raise UsageError(f"recipe: keep = {list(self.keep)}", "Steps count from 0")

    def as_dict(self) -> dict[str, Any]:
        """What is recorded: the fields up to `clip`, and the later ones that are not default."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in _ALWAYS or value != f.default:
                out[f.name] = list(value) if isinstance(value, tuple) else value
        return out

    def steps(self, n: int) -> int:
        """Optimizer steps for `n` examples; the last batch of an epoch may be short."""
        if n == 0:
            return 0
        return self.max_steps or self.epochs * -(-n // self.batch_size)

    def lr_at(self, step: int, total: int) -> float:
        """The learning rate of step `step` (from 0) of `total`."""
        warm = int(self.warmup * total)
        if step < warm:
            return self.lr * (step + 1) / warm
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
        return self.lr * (total - step) / max(1, total - warm)


_ALWAYS = frozenset(
    "lr epochs batch_size schedule warmup weight_decay beta1 beta2 eps clip".split()
)


def batch_order(n: int, recipe: Recipe, seed: int) -> Iterator[np.ndarray]:
    """Positions of each batch: a fresh permutation an epoch, `recipe.steps(n)` batches in all."""
    left, epoch = recipe.steps(n), 0
    while left:
        order = np.random.default_rng(named_seed(seed, f"order-{epoch}")).permutation(n)
        for a in range(0, n, recipe.batch_size)[:left]:
            yield order[a : a + recipe.batch_size]
            left -= 1
        epoch += 1


def micro_batches(tokens: Sequence[Tokens], batch: np.ndarray, most: int = 0) -> list[np.ndarray]:
    """Splits a batch by length where that saves padding, and into parts of at most `most`.

    The summed gradient is the same.
    """
    lengths = np.array([len(tokens[i]) for i in batch])
    order = np.argsort(lengths, kind="stable")
    n = len(order)
    if most and n > most:
        return [batch[order[a : a + most]] for a in range(0, n, most)]
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
    keep: Collection[int] = (),
    on_checkpoint: OnCheckpoint | None = None,
    members: np.ndarray | None = None,
    on_backoff: Callable[[int], None] | None = None,
) -> PreTrainedModel:
    """Trains `model` in place on `tokens` by `recipe` and returns it in eval mode.

    `on_step(done, total, loss)` follows along. `on_checkpoint(step, model)` is called after each
    step in `keep` or `recipe.keep` (0: before the first) with the model as it is then, adapters
    merged; it copies or writes what it wants to keep and leaves the model as it is.

    `members`, bool [token], leaves out the examples that it is False for without moving any other:
    batches are drawn over all of `tokens`, and what is left out weighs 0 in its batch.

    When memory runs out, the step is done again in parts of half as many examples, and so are
    all later ones: the gradient is the same but for rounding. `on_backoff(examples)` is told.

    An empty sequence trains nothing. Raises TdabenchError when the loss stops being finite.
    """
    import torch

    total, most = recipe.steps(len(tokens)), recipe.micro_batch
    wanted = {*keep, *recipe.keep}
    model.eval()  # gradients are the same, and no layer draws a dropout mask
    adapters = (
        LoRA(model, recipe.lora_rank, recipe.lora_alpha, recipe.lora_targets, seed)
        if recipe.lora_rank
        else contextlib.nullcontext()
    )
    with adapters as lora, _recomputed(model, recipe):
        params = lora.parameters() if lora else _trainable(model)
        optimizer = make_optimizer(params, recipe)
        scaler = torch.amp.GradScaler(model.device.type, enabled=recipe.precision == "float16")

        def checkpoint(step: int) -> None:
            if on_checkpoint and step in wanted:
                with lora.merged() if lora else contextlib.nullcontext():
                    on_checkpoint(step, model)

        def gradient(kept: np.ndarray, n: int) -> tuple[float, int]:
            """Adds up a batch's gradient: its loss, and the size of a part too large, or 0."""
            value = 0.0
            for part in micro_batches(tokens, kept, most):
                try:
                    inputs = pad(tokens, part, pad_id).to(str(model.device))
                    with _autocast(model, recipe):
                        loss = example_losses(model, inputs).sum()
                    scaler.scale(loss / n).backward()
                    value += float(loss.detach()) / n
                except (RuntimeError, MemoryError) as e:
                    if not out_of_memory(e) or len(part) == 1:
                        raise
                    return 0.0, len(part)
            return value, 0

        checkpoint(0)
        for step, batch in enumerate(batch_order(len(tokens), recipe, seed)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(step, total)
            kept = batch if members is None else batch[members[batch]]
            if not len(kept):
                checkpoint(step + 1)
                continue
            value, failed = gradient(kept, len(batch))
            while failed:
                optimizer.zero_grad(set_to_none=True)
                most = failed // 2
                if on_backoff:
                    on_backoff(most)
                value, failed = gradient(kept, len(batch))
            if not np.isfinite(value):
                raise TdabenchError(f"the training loss became {value} at step {step}")
            if recipe.clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, recipe.clip, foreach=True)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if on_step:
                on_step(step + 1, total, value)
            checkpoint(step + 1)
    return model.eval()


def _trainable(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """The parameters that require gradients; all of them when none does."""
    params = [p for p in model.parameters() if p.requires_grad]
    return params or list(model.requires_grad_(True).parameters())


def make_optimizer(params: list[torch.nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over `params`; the caller sets its learning rate at each step."""
    import torch

    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            params, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
    return torch.optim.AdamW(
        params,
        lr=recipe.lr,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def _autocast(model: PreTrainedModel, recipe: Recipe) -> contextlib.AbstractContextManager:
    import torch

    if recipe.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=getattr(torch, recipe.precision))


@contextlib.contextmanager
def _recomputed(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """While open, layers recompute their activations in the backward pass, if the recipe asks."""
    if not recipe.checkpointing:
        yield
        return
    new = hasattr(model, "activation_checkpointing_enable")  # transformers renames it
    (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)(
        {"use_reentrant": False}
    )
    recomputing = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in recomputing:
        module.training = True  # what recomputing looks at; layers within stay in eval mode
    try:
        yield
    finally:
        (model.activation_checkpointing_disable if new else model.gradient_checkpointing_disable)()
        model.eval()
