"""The training recipe of a target: every number that determines a fine-tuning."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from tdabench.errors import UsageError, unknown
from tdabench.params import convert, read_settings

SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings for fine-tuning a target on a group.

    A step minimises the mean over the batch of per-example losses (each the mean over response
    tokens), so that every example has the same weight at any length. The seed of a run determines
    the order of examples, and with `lora_rank` the adapters' initial values. Dropout is off for
    every model configuration, since no seed of ours would control it.

    Raises UsageError for an invalid value.
    """

    lr: float = 1e-3
    epochs: int = 2
    batch_size: int = 32
    schedule: str = "linear"  # decays to 0, as does "cosine"; or "constant"
    warmup: float = 0.0  # share of steps
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0  # maximum gradient norm; 0: no clipping
    # Recorded only if they differ from the default, so that older truths keep their keys.
    optimizer: str = "adamw"  # or "sgd"
    momentum: float = 0.0  # for sgd
    max_steps: int = 0  # optimizer steps instead of epochs; 0: by epochs
    lora_rank: int = 0  # train adapters of this rank and merge them; 0: every weight
    lora_alpha: float = 16.0  # an adapter adds alpha / rank * B A
    lora_targets: tuple[str, ...] = ()  # ends of layer names; (): all linear but the output
    layers_to_transform: tuple[int, ...] = ()  # blocks with adapters, as in peft; (): all
    micro_batch: int = 0  # maximum per forward pass (gradient accumulation); 0: the batch
    checkpointing: bool = False  # recompute activations in the backward pass: less memory
    precision: str = "float32"  # of the forward pass (autocast); weights stay float32
    keep: tuple[int, ...] = ()  # steps after which to keep a checkpoint; 0: before the first

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        for name in ("keep", "layers_to_transform"):
            object.__setattr__(self, name, tuple(sorted({int(k) for k in getattr(self, name)})))
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
            raise UsageError(f"recipe: warmup = {self.warmup}", "It is a fraction of all steps")
        if self.momentum and self.optimizer != "sgd":
            raise UsageError("recipe: momentum belongs to sgd", "AdamW has beta1")
        if self.layers_to_transform and not self.lora_rank:
            raise UsageError("recipe: layers_to_transform belongs to LoRA", "Set lora_rank")
        if self.layers_to_transform and self.layers_to_transform[0] < 0:
            raise UsageError(
                f"recipe: layers_to_transform = {list(self.layers_to_transform)}",
                "Layers count from 0",
            )
        if self.keep and self.keep[0] < 0:
            raise UsageError(f"recipe: keep = {list(self.keep)}", "Steps count from 0")

    @classmethod
    def of(cls, values: Mapping[str, Any], base: Recipe | None = None) -> Self:
        """Returns `base` (or the default recipe) with the fields in `values` changed.

        Strings are converted to the field's type. Raises UsageError for an unknown field, a value
        of the wrong type or an invalid value.
        """
        known = typing.get_type_hints(cls)
        start = {f.name: getattr(base, f.name) for f in fields(base)} if base else {}
        for name, value in values.items():
            if name not in known:
                raise unknown("field of the recipe", name, known)
            start[name] = convert(f"recipe.{name}", value, known[name])
        return cls(**start)

    def changed(self, text: str | Iterable[str]) -> Recipe:
        """Returns this recipe with fields from `"lr=1e-4,epochs=1"`, or a list of `"lr=1e-4"`.

        Raises UsageError like `of`, and for a part that is not `NAME=VALUE`.
        """
        return Recipe.of(read_settings(text, "recipe", "lr=1e-4"), self)

    def differs_from(self, other: Recipe) -> str:
        """Lists the fields in which two recipes differ, `"lr 0.001 (0.002), …"`; "" if none does.

        `keep` is excluded, since it changes no number.
        """
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return ", ".join(f"{n} {a} ({b})" for n, a, b in pairs if a != b and n != "keep")

    def __str__(self) -> str:
        """Formats the fields that are not default for `changed`; "the default recipe" if none."""
        mine = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "keep"]
        default = {f.name: f.default for f in fields(self)}
        return ", ".join(f"{k}={v}" for k, v in mine if v != default[k]) or "the default recipe"

    def as_dict(self) -> dict[str, Any]:
        """Returns the recorded fields: those up to `clip`, and later ones that are not default."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in _ALWAYS or value != f.default:
                out[f.name] = list(value) if isinstance(value, tuple) else value
        return out

    def steps(self, n: int) -> int:
        """Returns the optimizer steps for `n` examples; the last batch of an epoch may be short."""
        if n == 0:
            return 0
        return self.max_steps or self.epochs * -(-n // self.batch_size)

    def lr_at(self, step: int, total: int) -> float:
        """Returns the learning rate of step `step` (from 0) of `total`."""
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
