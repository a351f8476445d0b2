"""Hooks for mixture-of-experts layers that keep their weights in one tensor [expert, d_out, d_in].

Such experts are not modules, so module hooks do not see them. Within `watched` the experts of a
model run one by one, through the interface of transformers for expert implementations, and a
callback receives every product with an expert's weight and the tokens routed to that expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# (module, weight name, expert, tokens that the module sees, routed rows [n], x, y) -> y
Product = Callable[[torch.nn.Module, str, int, int, Tensor, Tensor, Tensor], Tensor]

_NAME = "tdabench"
_watching: dict[int, Product] = {}


def expert_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Returns the modules of `model` that keep several experts in one tensor, by name."""
    return {
        name: m
        for name, m in model.named_modules()
        if hasattr(m, "_apply_gate") and hasattr(m, "is_transposed") and _weights(m)
    }


def expert_shapes(module: Any) -> dict[str, tuple[int, int, int]]:
    """Returns (experts, d_out, d_in) of each weight of such a module, by the weight's name."""
    found = {}
    for name in _weights(module):
        n, a, b = getattr(module, name).shape
        found[name] = (n, b, a) if module.is_transposed else (n, a, b)
    return found


def _weights(module: Any) -> list[str]:
    names = ["gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj"]
    there = [getattr(module, n, None) for n in names]
    good = all(isinstance(w, torch.nn.Parameter) and w.dim() == 3 for w in there)
    return names if good else []


@contextmanager
def watched(modules: Mapping[str, torch.nn.Module], product: Product) -> Iterator[None]:
    """Calls `product(module, weight, expert, tokens, rows, x, y)` on each y = W_e x + b_e within.

    `rows` [n] are the indices of the routed tokens among the `tokens` that the module sees, x is
    [n, d_in], y [n, d_out]. The returned tensor replaces y.
    """
    if not modules:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_NAME, _forward)
    configs: dict[int, tuple[Any, Any]] = {}
    for m in modules.values():
        config: Any = m.config
        configs.setdefault(id(config), (config, config._experts_implementation))
        _watching[id(m)] = product
    try:
        for config, _ in configs.values():
            config._experts_implementation = _NAME
        yield
    finally:
        for config, before in configs.values():
            config._experts_implementation = before
        for m in modules.values():
            _watching.pop(id(m), None)


def _forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Computes the output [tokens, d] of transformers' own implementations, expert by expert."""
    product = _watching.get(id(self), lambda _m, _w, _e, _t, _r, _x, y: y)
    first = _weights(self)[0]
    tokens = len(hidden_states)
    out = torch.zeros_like(hidden_states)

    def through(weight: str, e: int, rows: Tensor, x: Tensor) -> Tensor:
        w = getattr(self, weight)[e]
        y = x @ w if self.is_transposed else x @ w.T
        if self.has_bias:
            y = y + getattr(self, f"{weight}_bias")[e]
        return product(self, weight, e, tokens, rows, x, y)

    for e in top_k_index.unique().tolist():
        if not 0 <= e < self.num_experts:
            continue
        rows, place = torch.where(top_k_index == e)
        y = through(first, e, rows, hidden_states[rows])
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = through("down_proj", e, rows, y)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        y = y * top_k_weights[rows, place, None]
        out = out.index_add(0, rows, y.to(out.dtype))
    return out
