"""Many small retrainings at once, with stacked parameters and one pass for all of them.

A small target leaves an accelerator idle between kernels: a stack of k targets does k times the
work in as many kernels. Sums are rounded in another order than in a single retraining, and training
amplifies the difference, so stacked losses agree with others within a tolerance (docs/truth.md)
and not to the bit; such rows are marked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tdabench.errors import UsageError, first_line
from tdabench.targets.batches import Tokens, out_of_memory
from tdabench.targets.forward import logits_at, probe_ids, way_of
from tdabench.targets.recipe import Recipe
from tdabench.targets.target import SCRATCH, Target
from tdabench.targets.training import batch_order, make_optimizer
from tdabench.truth.engines import Outcomes, Take, UnitResult, UnitTrainer, one_thread
from tdabench.truth.plan import TruthPlan, Unit

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Stacked:
    """Trains up to `size` units at once in this process. Groups of one stack have one size.

    Raises UsageError for unsupported recipes: adapters, lower precision, recomputed activations,
    kept checkpoints.
    """

    size: int
    device: str = "cpu"

    def run(self, trainer: UnitTrainer, take: Take, note: Callable[[str], None]) -> Outcomes:
        check(trainer.plan)
        while units := self._next(trainer.plan, take):
            by_size: dict[int, list[Unit]] = {}
            for unit in units:
                by_size.setdefault(len(trainer.plan.groups[unit.group]), []).append(unit)
            for alike in by_size.values():
                yield from self._attempt(trainer, alike)

    def _next(self, plan: TruthPlan, take: Take) -> list[Unit]:
        units: list[Unit] = []
        while len(units) < self.size and (unit := take()) is not None:
            units.append(unit)
        return units

    def _attempt(self, trainer: UnitTrainer, units: list[Unit]) -> Outcomes:
        try:
            with one_thread():
                rows = losses(trainer, units, self.device)
        except (RuntimeError, MemoryError) as e:
            rows = [f"{type(e).__name__}: {e}"] * len(units)
        for unit, row in zip(units, rows):
            yield (
                unit,
                row if isinstance(row, str) else UnitResult(row, made_by=f"stack of {len(units)}"),
            )


def check(plan: TruthPlan) -> None:
    """Raises UsageError if a stack does not support the plan's recipe."""
    r = plan.recipe
    for is_set, what in (
        (r.lora_rank, "LoRA"),
        (r.precision != "float32", f"precision {r.precision}"),
        (r.checkpointing, "recomputed activations"),
        (r.keep, "kept checkpoints"),
        (plan.order != "own", "the order of the pool"),
    ):
        if is_set:
            raise UsageError(f"stacked training does not support {what}", "Leave out --stack")


def losses(
    trainer: UnitTrainer, units: Sequence[Unit], device: str = "cpu"
) -> list[np.ndarray | str]:
    """Retrains on the group of each unit: float32 [query] each, or the reason it failed."""
    import torch

    target, plan = trainer.target, trainer.plan
    seeds = [plan.run_seed(u) for u in units]
    drawn = plan.start == SCRATCH  # every unit begins with other weights
    models = [target.fresh_model(plan.start, s) for s in (seeds if drawn else seeds[:1])]
    stack = _Stack(models, len(units), device)
    tokens = [[trainer.train[i] for i in plan.groups[u.group]] for u in units]
    failed = stack.train(tokens, plan.recipe, seeds, target.pad_id)
    with torch.inference_mode():
        found = stack.losses(target, trainer.queries)
    for row, reason in enumerate(failed):
        if not reason and not np.isfinite(found[row]).all():
            failed[row] = f"{int((~np.isfinite(found[row])).sum())} of its losses are not finite"
    return [reason or found[row] for row, reason in enumerate(failed)]


class _Stack:
    """k copies of a model: each parameter as one tensor [k, ...]."""

    def __init__(self, models: Sequence[PreTrainedModel], k: int, device: str) -> None:
        import torch

        self.k, self.model = k, models[0].to(device)  # type: ignore[arg-type]
        if device == "cpu":  # torch has no batching rule for its fused attention there
            self.model.set_attn_implementation("eager")
        way_of(self.model)  # measured now, because it cannot be measured under vmap
        self.module = _as_module(self.model)
        named = [dict(m.named_parameters()) for m in models]
        self.params = {
            name: torch.nn.Parameter(
                torch.stack([ps[name].detach().to(device) for ps in named])
                if len(named) == k
                else p.detach().expand(k, *p.shape).clone()
            )
            for name, p in named[0].items()
        }
        self._try()

    def _try(self) -> None:
        """Raises UsageError for a model that cannot be run in a stack."""
        import torch

        ids = probe_ids(self.model)
        at = torch.zeros(self.k, 1, dtype=torch.long, device=ids.device)
        try:
            with torch.no_grad():
                self.token_losses(ids, at, at)
        except RuntimeError as e:
            if out_of_memory(e):
                raise
            raise UsageError(
                f"stacked training does not support {type(self.model).__name__}: {first_line(e)}",
                "Leave out --stack",
            ) from e

    def token_losses(self, ids: torch.Tensor, at: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
        """Computes losses [k, r] of tokens gold [k, r], predicted at flat positions at [k, r].

        ids are [k, b, t], or [b, t] shared by all. Padding is on the right, where no real token
        attends to it, so no mask is needed.
        """
        import torch

        def one(
            params: dict[str, torch.Tensor], ids: torch.Tensor, at: torch.Tensor
        ) -> torch.Tensor:
            return torch.func.functional_call(self.module, params, (ids, at))  # [r, vocabulary]

        params: dict[str, torch.Tensor] = {f"model.{n}": p for n, p in self.params.items()}
        dims = (0, 0 if ids.dim() == 3 else None, 0)
        logits = torch.func.vmap(one, in_dims=dims)(params, ids, at)
        flat = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), gold.flatten(), reduction="none"
        )
        return flat.view(gold.shape)

    def train(
        self, tokens: Sequence[Sequence[Tokens]], recipe: Recipe, seeds: Sequence[int], pad_id: int
    ) -> list[str]:
        """Trains by the recipe on each unit's examples; returns why a unit failed, or ""."""

        params, n = list(self.params.values()), len(tokens[0])
        optimizer, total = make_optimizer(params, recipe), recipe.steps(n)
        failed = [""] * self.k
        orders = zip(*(batch_order(n, recipe, s) for s in seeds))
        for step, batches in enumerate(orders):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(step, total)
            value = np.zeros(self.k)
            for chosen in _parts(tokens, batches, recipe.micro_batch):
                ids, at, gold, weight = _padded(chosen, pad_id, str(params[0].device))
                found = self.token_losses(ids, at, gold) * weight / len(batches[0])
                found.sum().backward()
                value += found.detach().sum(1).cpu().numpy()
            for row in np.flatnonzero(~np.isfinite(value)):
                failed[row] = failed[row] or (
                    f"TdabenchError: the training loss became {value[row]} at step {step}"
                )
            if recipe.clip:
                _clip(params, recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return failed

    def losses(self, target: Target, tokens: Sequence[Tokens]) -> np.ndarray:
        """Computes each example's mean response-token loss under each model: float32 [k, n]."""
        out = np.empty((self.k, len(tokens)), dtype=np.float32)
        for batch in target.batches(tokens, max(512, 8192 // self.k)):
            b = batch.to(str(self.model.device))
            at, gold = (v.expand(self.k, -1) for v in (b.places, b.gold))
            found = self.token_losses(b.input_ids, at, gold)
            out[:, batch.index] = b.means(found).cpu().numpy()
        return out


def _as_module(model: PreTrainedModel) -> torch.nn.Module:
    """Returns a module whose output is the logits [r, vocabulary] of ids [b, t] at positions [r].

    `functional_call` accepts modules only."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            return logits_at(self.model, ids, None, at)

    return Logits()


def _parts(
    tokens: Sequence[Sequence[Tokens]], batches: Sequence[np.ndarray], most: int
) -> list[list[list[Tokens]]]:
    """Splits each unit's batch by length into parts of at most `most` examples (0: one part)."""
    sorted_ = [sorted((ts[i] for i in batch), key=len) for ts, batch in zip(tokens, batches)]
    size = most or len(batches[0])
    return [[s[a : a + size] for s in sorted_] for a in range(0, len(batches[0]), size)]


def _padded(
    chosen: Sequence[Sequence[Tokens]], pad_id: int, device: str
) -> tuple[torch.Tensor, ...]:
    """Pads ids [k, b, t] and response tokens of each unit.

    Returns ids, and for each unit's response tokens, padded to the largest number of a unit: flat
    positions that predict them, the tokens, and weights (1 / tokens of the example; 0 on padding),
    all [k, r]."""
    import torch

    k, b = len(chosen), len(chosen[0])
    t = max(len(x) for unit in chosen for x in unit)
    r = max(sum(len(x) - x.start for x in unit) for unit in chosen)
    ids = np.full((k, b, t), pad_id, dtype=np.int64)
    at, gold = np.zeros((k, r), dtype=np.int64), np.zeros((k, r), dtype=np.int64)
    weight = np.zeros((k, r), dtype=np.float32)
    for u, unit in enumerate(chosen):
        c = 0
        for row, x in enumerate(unit):
            ids[u, row, : len(x)] = x.ids
            m = len(x) - x.start
            at[u, c : c + m] = row * t + np.arange(x.start - 1, len(x) - 1)
            gold[u, c : c + m] = x.ids[x.start :]
            weight[u, c : c + m] = 1 / m
            c += m
    return tuple(torch.from_numpy(a).to(device) for a in (ids, at, gold, weight))


def _clip(params: Sequence[torch.nn.Parameter], most: float) -> None:
    """Scales each unit's gradient to a norm of at most `most`, like clip_grad_norm_."""
    import torch

    grads = [p.grad for p in params if p.grad is not None]
    squares = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0)  # [k]
    scale = (most / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(scale.view(-1, *[1] * (g.dim() - 1)))
