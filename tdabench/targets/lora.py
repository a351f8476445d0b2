"""Low-rank adapters (LoRA, arXiv 2106.09685), trained with frozen weights and then merged."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tdabench.errors import UsageError
from tdabench.seeds import named_seed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class LoRA:
    """Adapters of a model's linear layers: y = W x + alpha / rank * B A x.

    A [rank, d_in] is initialised uniformly within 1 / sqrt(d_in) (as in peft) from the named stream
    "lora" of `seed`, B [d_out, rank] at zero. Only A and B are trained. `targets` are the last
    parts of layer names (`q_proj`, `mlp.up_proj`); if empty, all linear layers except the output.
    `blocks` are the numbers of the blocks that have adapters (peft's `layers_to_transform`); if
    empty, all. `first` is the lowest of them, below which every state is the base model's.

    `attached` adds them to the model. Raises UsageError if no layer matches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rank: int,
        alpha: float,
        targets: Sequence[str],
        seed: int,
        blocks: Sequence[int] = (),
    ) -> None:
        import torch
        from transformers.pytorch_utils import Conv1D

        model.requires_grad_(False)
        self.scale = alpha / rank
        self.layers: list[tuple[Any, torch.nn.Parameter, torch.nn.Parameter]] = []
        self.active = True
        self.before: list[torch.Tensor] | None = None  # weights of the base, if merged throughout
        head = model.get_output_embeddings()
        linear: dict[str, Any] = {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, torch.nn.Linear | Conv1D) and m is not head
        }
        _check_blocks(linear, blocks)
        chosen = {
            name: m
            for name, m in linear.items()
            if (not targets or any(f".{name}".endswith(f".{t}") for t in targets))
            and (not blocks or block_of(name) in blocks)
        }
        if not chosen:
            names = sorted({n.rsplit(".", 1)[-1] for n in linear})
            raise UsageError(
                f"no linear layer is named {', '.join(targets) or 'anything'}",
                f"The model has the layers: {', '.join(names)}",
            )
        self.first = min(-1 if (i := block_of(name)) is None else i for name in chosen)
        generator = torch.Generator().manual_seed(named_seed(seed, "lora"))
        for m in chosen.values():
            d_out, d_in = m.weight.shape if isinstance(m, torch.nn.Linear) else m.weight.T.shape
            first = torch.empty(rank, d_in).uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator)
            a = torch.nn.Parameter(first.to(m.weight.device))
            b = torch.nn.Parameter(torch.zeros(d_out, rank, device=m.weight.device))
            self.layers.append((m, a, b))

    def _hook(self, a: torch.Tensor, b: torch.Tensor) -> Callable[..., Any]:
        def add(
            _module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
        ) -> torch.Tensor | None:
            return output + self.scale * ((inputs[0] @ a.T) @ b.T) if self.active else None

        return add

    def parameters(self) -> list[torch.nn.Parameter]:
        """Returns A and B of each layer in turn."""
        return [p for _, a, b in self.layers for p in (a, b)]

    def merge(self) -> None:
        """Sets the weights to the base's with the adapters merged."""
        import torch

        before = self.before or [m.weight.data for m, _, _ in self.layers]
        for (m, a, b), weight in zip(self.layers, before):
            delta = self.scale * (b.detach() @ a.detach())  # [d_out, d_in]
            torch.add(
                weight, delta if isinstance(m, torch.nn.Linear) else delta.T, out=m.weight.data
            )

    def _restore(self, before: Sequence[torch.Tensor]) -> None:
        for (m, _, _), weight in zip(self.layers, before):
            m.weight.data.copy_(weight)

    def _weights(self) -> list[torch.Tensor]:
        """Returns copies: undoing a merge by subtraction is inexact."""
        return [m.weight.data.clone() for m, _, _ in self.layers]

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """Merges the adapters into the model within the context."""
        if self.before is not None:
            yield
            return
        before = self._weights()
        self.merge()
        self.active = False
        try:
            yield
        finally:
            self._restore(before)
            self.active = True

    @contextlib.contextmanager
    def attached(self, merged: bool = False) -> Iterator[LoRA]:
        """Adds the adapters to the model; merges them at the end unless there is an error.

        Within the context they are hooks on their layers, or with `merged` part of the weights:
        a change of A and B then takes effect by `merge`.
        """
        if merged:
            self.before = self._weights()
            try:
                yield self
                self.merge()
            except BaseException:
                self._restore(self.before)
                raise
            finally:
                self.before = None
            return
        hooks = [m.register_forward_hook(self._hook(a, b)) for m, a, b in self.layers]
        try:
            yield self
            self.merge()
        finally:
            for hook in hooks:
                hook.remove()


def block_of(name: str) -> int | None:
    """Returns the number of the block that a module named `name` is part of; None outside."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found[1]) if found else None


def _check_blocks(names: Iterable[str], blocks: Sequence[int]) -> None:
    """Raises UsageError if none of the layers `names` is in one of the `blocks`."""
    there = sorted({i for name in names if (i := block_of(name)) is not None})
    lacking = sorted(set(blocks) - set(there))
    if lacking:
        raise UsageError(
            f"layers_to_transform: the model has no layer {lacking[0]}",
            f"Its layers are {there[0]} to {there[-1]}" if there else "It has no numbered layers",
        )
