"""Low-rank adapters (LoRA, arXiv 2106.09685), trained with frozen weights and then merged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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

    Raises UsageError if no layer matches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rank: int,
        alpha: float,
        targets: Sequence[str],
        seed: int,
    ) -> None:
        import torch
        from transformers.pytorch_utils import Conv1D

        model.requires_grad_(False)
        self.scale = alpha / rank
        self.layers: list[tuple[Any, torch.nn.Parameter, torch.nn.Parameter]] = []
        self.hooks = []
        self.active = True
        head = model.get_output_embeddings()
        linear: dict[str, Any] = {
            name: m
            for name, m in model.named_modules()
            if isinstance(m, torch.nn.Linear | Conv1D) and m is not head
        }
        chosen = {
            name: m
            for name, m in linear.items()
            if not targets or any(f".{name}".endswith(f".{t}") for t in targets)
        }
        if not chosen:
            names = sorted({n.rsplit(".", 1)[-1] for n in linear})
            raise UsageError(
                f"no linear layer is named {', '.join(targets) or 'anything'}",
                f"The model has the layers: {', '.join(names)}",
            )
        generator = torch.Generator().manual_seed(named_seed(seed, "lora"))
        for m in chosen.values():
            d_out, d_in = m.weight.shape if isinstance(m, torch.nn.Linear) else m.weight.T.shape
            first = torch.empty(rank, d_in).uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator)
            a = torch.nn.Parameter(first.to(m.weight.device))
            b = torch.nn.Parameter(torch.zeros(d_out, rank, device=m.weight.device))
            self.layers.append((m, a, b))
            self.hooks.append(m.register_forward_hook(self._hook(a, b)))

    def _hook(self, a: torch.Tensor, b: torch.Tensor) -> Callable[..., Any]:
        def add(
            _module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
        ) -> torch.Tensor | None:
            return output + self.scale * ((inputs[0] @ a.T) @ b.T) if self.active else None

        return add

    def parameters(self) -> list[torch.nn.Parameter]:
        """Returns A and B of each layer in turn."""
        return [p for _, a, b in self.layers for p in (a, b)]

    def _add(self) -> None:
        import torch

        for m, a, b in self.layers:
            delta = self.scale * (b.detach() @ a.detach())  # [d_out, d_in]
            m.weight.data.add_(delta if isinstance(m, torch.nn.Linear) else delta.T)

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """Merges the adapters into the model within the context."""
        before = [m.weight.data.clone() for m, _, _ in self.layers]  # undoing is inexact
        self._add()
        self.active = False
        try:
            yield
        finally:
            for (m, _, _), weight in zip(self.layers, before):
                m.weight.data.copy_(weight)
            self.active = True

    def __enter__(self) -> LoRA:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Removes the adapters from the model; merges them unless there was an error."""
        if kind is None:
            self._add()
        for hook in self.hooks:
            hook.remove()
