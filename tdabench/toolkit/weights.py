"""Models that a method trains for itself: kept as rows of weights, and evaluated one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.data.examples import Example
from tdabench.errors import MethodError
from tdabench.groups import Groups
from tdabench.method import Context
from tdabench.seeds import named_seed
from tdabench.targets.training import finetune

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST = 8 << 30  # bytes of models that an index may hold


def random_groups(
    context: Context, train: Sequence[Example], n_groups: int, fraction: float, name: str
) -> Groups:
    """Draws groups of round(fraction * n) examples by id: the corpus's order does not matter."""
    n = len(train)
    if not n:
        return Groups.of([], 0)
    by_id = np.argsort([e.id for e in train], kind="stable")
    size = min(n, max(1, round(fraction * n)))
    rng = context.rng(name)
    return Groups.of((by_id[rng.choice(n, size, replace=False)] for _ in range(n_groups)), n)


def retrained(context: Context, train: Sequence[Example], groups: Groups, name: str) -> np.ndarray:
    """Trains the target from its base on each group: weights, float16 [group, parameter].

    By the target's recipe; group g has the seed `named_seed(context.seed, f"{name}/{g}")`. Members
    are trained on in the order of their ids. Raises MethodError if the models would take more than
    `LARGEST` bytes.
    """
    target, recipe = context.target, context.target.recipe
    model = target.fresh_model("base").to(context.device)  # type: ignore[arg-type]
    names = [name for name, _ in model.named_parameters()]
    size = sum(p.numel() for p in model.parameters())
    check_room(len(groups), size)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = target.tokenize(train)
    ids = np.array([e.id for e in train])
    out = np.empty((len(groups), size), dtype=np.float16)
    for g, members in enumerate(groups):
        _copy(model, start)
        members = members[np.argsort(ids[members], kind="stable")]
        part = [tokens[int(i)] for i in members]
        end = recipe.steps(len(part))

        def keep(step: int, trained: Any, g: int = g, end: int = end) -> None:
            if step == end:
                out[g] = weights_of(trained, names)

        seed = named_seed(context.seed, f"{name}/{g}")
        finetune(model, part, recipe, seed, target.pad_id, keep={end}, on_checkpoint=keep)
        context.progress("retrainings", g + 1, len(groups))
    return out


def weights_of(model: PreTrainedModel, names: Sequence[str] | None = None) -> np.ndarray:
    """Returns a model's parameters (those of `names`, by default all), float16 [parameter]."""
    found = dict(model.named_parameters())
    return np.concatenate(
        [found[n].detach().flatten().half().cpu().numpy() for n in names or found]
    )


def check_room(n_models: int, size: int) -> None:
    """Raises MethodError if `n_models` of `size` weights are more than an index may hold."""
    if 2 * size * n_models > LARGEST:
        raise MethodError(
            f"{n_models} models of {size:,} weights would be kept",
            f"Ask for fewer: at most {LARGEST >> 30} GiB are",
        )


def models_of(context: Context, rows: np.ndarray) -> Iterator[PreTrainedModel]:
    """Yields the target with each row of weights [k, parameter]; the models share one module."""
    import torch

    model = context.target.fresh_model("base").to(context.device)  # type: ignore[arg-type]
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]
    for row in rows:
        parts = torch.from_numpy(row).float().split(sizes)
        _copy(model, {n: v.view(p.shape) for (n, p), v in zip(named.items(), parts)})
        yield model


def losses_of(context: Context, rows: np.ndarray, examples: Sequence[Example]) -> np.ndarray:
    """Computes each example's loss with each row of weights: float32 [k, example]."""
    tokens = context.target.tokenize(examples)
    out = np.empty((len(rows), len(examples)), dtype=np.float32)
    for k, model in enumerate(models_of(context, rows)):
        out[k] = context.target.losses(model, tokens)
        context.progress("models evaluated", k + 1, len(out))
    return out


def _copy(model: PreTrainedModel, weights: Mapping[str, Any]) -> None:
    import torch

    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
