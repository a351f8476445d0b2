"""Fine-tuning: the loop that implements a recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tdabench.errors import TdabenchError
from tdabench.seeds import named_seed
from tdabench.targets.batches import Tokens, out_of_memory, pad
from tdabench.targets.decoder import Decoder, States, cut
from tdabench.targets.lora import LoRA
from tdabench.targets.products import fast_products
from tdabench.targets.recipe import Recipe
from tdabench.targets.target import example_losses

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

OnCheckpoint = Callable[[int, "PreTrainedModel"], None]  # (steps done, the model at that step)


def batch_order(n: int, recipe: Recipe, seed: int) -> Iterator[np.ndarray]:
    """Draws the positions of `recipe.steps(n)` batches, with a new permutation per epoch."""
    left, epoch = recipe.steps(n), 0
    while left:
        order = np.random.default_rng(named_seed(seed, f"order-{epoch}")).permutation(n)
        for a in range(0, n, recipe.batch_size)[:left]:
            yield order[a : a + recipe.batch_size]
            left -= 1
        epoch += 1


def micro_batches(tokens: Sequence[Tokens], batch: np.ndarray, most: int = 0) -> list[np.ndarray]:
    """Splits a batch by length if that saves padding, and into parts of at most `most`.

    The summed gradient does not change.
    """
    lengths = np.array([len(tokens[i]) for i in batch])
    order = np.argsort(lengths, kind="stable")
    n = len(order)
    if most and n > most:
        return [batch[order[a : a + most]] for a in range(0, n, most)]
    best, cut = n * lengths[order[-1]] * 0.9, 0  # a second pass must save a tenth to be worthwhile
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
    weights: np.ndarray | None = None,
    on_backoff: Callable[[int], None] | None = None,
    below: States | None = None,
) -> PreTrainedModel:
    """Trains `model` in place on `tokens` by `recipe` and returns it in eval mode.

    `on_step(done, total, loss)` is called after each step. `on_checkpoint(step, model)` is called
    after each step in `keep` or `recipe.keep` (0: before the first) with the model at that step,
    adapters merged; it must copy or write what it keeps, and must not change the model.

    `weights` [token] multiply the loss of each example. Batches are drawn over all of `tokens`, and
    a batch's loss is divided by its size: an example of weight 0 is left out and moves no other.

    When memory runs out, the step is repeated in parts of half as many examples, as are all later
    steps: the gradient is the same up to rounding. `on_backoff(examples)` is called.

    `below` are states of `tokens` that `states_below` computed with the same base and recipe: the
    frozen layers are then passed over. The result is the same up to rounding.

    An empty sequence trains nothing. Raises TdabenchError if the loss becomes non-finite.
    """
    import torch

    total, most = recipe.steps(len(tokens)), recipe.micro_batch
    wanted = {*keep, *recipe.keep}
    model.eval()  # gradients are the same, and no layer draws a dropout mask
    lora = _adapters(model, recipe, seed) if recipe.lora_rank else None
    with contextlib.ExitStack() as stack:
        params = lora.parameters() if lora else _trainable(model)
        written = _written_out(model, tokens, recipe)
        if below and (lora is None or lora.first < below.first):
            raise ValueError(f"the states enter layer {below.first}, and lower ones are trained")
        if lora:
            stack.enter_context(lora.attached(merged=written is not None))
        stack.enter_context(_recomputed(model, recipe))
        if written and lora:
            stack.enter_context(written.adapting(lora))
        elif written:
            stack.enter_context(written.training())
            params = [written.weights]
        optimizer = make_optimizer(params, recipe)
        scaler = torch.amp.GradScaler(model.device.type, enabled=recipe.precision == "float16")

        def checkpoint(step: int) -> None:
            if on_checkpoint and step in wanted:
                with lora.merged() if lora else contextlib.nullcontext():
                    on_checkpoint(step, model)

        def parts(kept: np.ndarray) -> list[np.ndarray]:
            if written is None:
                return micro_batches(tokens, kept, most)
            return [kept[i] for i in cut([len(tokens[i]) for i in kept], most)]

        def clear() -> None:
            if written:
                written.clear()
            else:
                optimizer.zero_grad(set_to_none=True)

        def gradient(kept: np.ndarray, n: int) -> tuple[float, int]:
            """Accumulates a gradient; returns the loss, and the size of a part too large, or 0."""
            value = 0.0
            for part in parts(kept):
                try:
                    inputs = pad(tokens, part, pad_id).to(str(model.device))
                    if written:
                        each = inputs.loss_mask.new_ones(len(part), dtype=torch.float32)
                        if weights is not None:
                            each = torch.from_numpy(weights[part]).to(each)
                        found = written.gradient(inputs, each / n, below)
                        value += float((found * each).sum()) / n
                        continue
                    with _products(model, recipe, inputs.input_ids.shape[1]):
                        with _autocast(model, recipe):
                            losses = example_losses(model, inputs)
                            if weights is not None:
                                losses = losses * torch.from_numpy(weights[part]).to(losses)
                            loss = losses.sum()
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
            kept = batch if weights is None else batch[weights[batch] != 0]
            if not len(kept):
                checkpoint(step + 1)
                continue
            value, failed = gradient(kept, len(batch))
            while failed:
                clear()
                most = failed // 2
                if on_backoff:
                    on_backoff(most)
                value, failed = gradient(kept, len(batch))
            if not np.isfinite(value):
                raise TdabenchError(
                    f"the training loss became {value} at step {step} of {total}",
                    f"The recipe diverges: lower lr (it is {recipe.lr:g})",
                )
            if recipe.clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, recipe.clip, foreach=True)
            scaler.step(optimizer)
            scaler.update()
            if written and lora:
                lora.merge()
            clear()
            if on_step:
                on_step(step + 1, total, value)
            checkpoint(step + 1)
    return model.eval()


def _adapters(model: PreTrainedModel, recipe: Recipe, seed: int) -> LoRA:
    r = recipe
    return LoRA(model, r.lora_rank, r.lora_alpha, r.lora_targets, seed, r.layers_to_transform)


def _written_out(
    model: PreTrainedModel, tokens: Sequence[Tokens], recipe: Recipe
) -> Decoder | None:
    """Returns the written-out passes if they are the model's and serve the recipe."""
    if recipe.precision != "float32" or recipe.checkpointing or not len(tokens):
        return None
    if not recipe.lora_rank and not all(p.requires_grad for p in model.parameters()):
        return None
    return Decoder.of(model, max(map(len, tokens)), gradients=True)


def states_below(
    model: PreTrainedModel, tokens: Sequence[Tokens], recipe: Recipe, pad_id: int
) -> States | None:
    """Computes the states of `tokens` that enter the first layer which `recipe` adapts.

    `model` is the base. None if no layer lies below, or the written-out passes do not serve the
    model or recipe: nothing is then to be saved.
    """
    written = _written_out(model, tokens, recipe) if recipe.lora_rank else None
    first = _adapters(model, recipe, 0).first if written else 0
    if written is None or first <= 0:
        return None
    of: list[torch.Tensor] = [None] * len(tokens)  # type: ignore[list-item]
    for index in cut([len(t) for t in tokens]):
        for i, state in zip(index, written.states(pad(tokens, index, pad_id), first)):
            of[i] = state
    return States(first, of)


def _trainable(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Returns the parameters that require gradients, or all if none does."""
    params = [p for p in model.parameters() if p.requires_grad]
    return params or list(model.requires_grad_(True).parameters())


def make_optimizer(params: list[torch.nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """Makes the recipe's optimizer over `params`; the caller sets its learning rate per step."""
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


def _products(
    model: PreTrainedModel, recipe: Recipe, length: int
) -> contextlib.AbstractContextManager:
    if recipe.precision != "float32":
        return contextlib.nullcontext()
    return fast_products(model, length)


def _autocast(model: PreTrainedModel, recipe: Recipe) -> contextlib.AbstractContextManager:
    import torch

    if recipe.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, dtype=getattr(torch, recipe.precision))


@contextlib.contextmanager
def _recomputed(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """Makes layers recompute activations in the backward pass within the context, if requested."""
    if not recipe.checkpointing:
        yield
        return
    new = hasattr(model, "activation_checkpointing_enable")  # transformers renames it
    (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)(
        {"use_reentrant": False}
    )
    recomputing = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    for module in recomputing:
        module.training = True  # the flag that recomputing reads; inner layers stay in eval mode
    try:
        yield
    finally:
        (model.activation_checkpointing_disable if new else model.gradient_checkpointing_disable)()
        model.eval()
