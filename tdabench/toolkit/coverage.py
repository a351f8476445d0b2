"""Measures which weights a model's losses depend on and what share of them gradients cover.

Measured on a few tokens, once per configuration: which linear layers see every token in its place
(experts that are modules see only the tokens routed to them, in an order that hooks do not know),
and which parameters the logits depend on (a decoder without an encoder does not use its
cross-attention).
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdabench.targets.forward import configuration_key, probe_ids, way_of
from tdabench.toolkit.experts import expert_modules, watched

ENOUGH = 0.9  # the board shows a warning below this share


@dataclass(frozen=True)
class Use:
    """The layers and parameters that a forward pass uses.

    `placed`: names of linear layers and of modules of experts in which every row is a known token.
    `used`: names of the parameters that the logits depend on.
    """

    placed: frozenset[str]
    used: frozenset[str]


@dataclass(frozen=True)
class Coverage:
    """The share of a model's weights that gradients cover, without embeddings and output matrix.

    `left_out`: the shares that are not covered, by class of module, largest first. `chosen`: the
    user selected the layers.
    """

    share: float
    left_out: tuple[tuple[str, float], ...] = ()
    chosen: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {"share": self.share, "left_out": dict(self.left_out), "chosen": self.chosen}

    @property
    def warning(self) -> str:
        """A sentence if the default layers cover less than `ENOUGH`, else ""."""
        if self.chosen or self.share >= ENOUGH:
            return ""
        what = ", ".join(f"{name} ({_percent(share)})" for name, share in self.left_out[:3])
        return f"gradients cover {_percent(self.share)} of the weights; left out: {what}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.01 else "<1%"


covered: deque[Coverage] = deque(maxlen=256)  # of the engines of this process, for its records

_of_models: weakref.WeakKeyDictionary[Any, Use] = weakref.WeakKeyDictionary()
_of_configs: dict[str, Use] = {}


def in_use(model: Any) -> Use:
    """Returns the layers and parameters in use. Raises DataError for a model that is not causal."""
    if model not in _of_models:
        key = configuration_key(model)
        if key not in _of_configs:
            way_of(model)
            _of_configs[key] = _measured(model)
        _of_models[model] = _of_configs[key]
    return _of_models[model]


def coverage(model: Any, parameters: Collection[str], chosen: bool) -> Coverage:
    """Computes the share of the named parameters among those that the losses depend on."""
    use = in_use(model)
    aside = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding)
             for p in m.parameters()}  # fmt: skip
    head = model.get_output_embeddings()
    aside |= {id(p) for p in head.parameters()} if head is not None else set()
    total = left = 0
    by_class: dict[str, int] = {}
    modules = dict(model.named_modules())
    for name, p in model.named_parameters():
        if id(p) in aside or name not in use.used:
            continue
        total += p.numel()
        if name not in parameters:
            left += p.numel()
            kind = "biases" if name.endswith("bias") else type(modules[name.rpartition(".")[0]])
            kind = kind if isinstance(kind, str) else kind.__name__
            by_class[kind] = by_class.get(kind, 0) + p.numel()
    shares = [(k, n / total) for k, n in sorted(by_class.items(), key=lambda x: -x[1])]
    return Coverage(1 - left / total if total else 1.0, tuple(shares), chosen)


def _measured(model: Any) -> Use:
    from transformers.pytorch_utils import Conv1D

    ids = probe_ids(model)
    b, t = ids.shape
    placed: dict[str, bool] = {}

    def place(name: str, good: bool) -> None:
        if torch.is_grad_enabled():  # calls without gradients do not contribute
            placed[name] = placed.get(name, True) and good

    def hook(name: str) -> Any:
        def see(module: Any, inputs: tuple, y: Any) -> None:
            plain = bool(inputs) and isinstance(y, Tensor) and _plain(module, inputs[0], y)
            place(name, plain and in_place(inputs[0].shape, b, t))

        return see

    experts = expert_modules(model)
    names = {id(m): name for name, m in experts.items()}

    def product(
        module: Any, _w: str, _e: int, tokens: int, _r: Tensor, _x: Tensor, y: Tensor
    ) -> Tensor:
        place(names[id(module)], tokens == b * t)
        return y

    hooks = [
        m.register_forward_hook(hook(name))
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear | Conv1D)
    ]
    training = [m for m in model.modules() if m.training]
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    model.eval()
    try:
        for p in frozen:
            p.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad(), watched(experts, product):
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
            logits = getattr(output, "logits", None)
            reached = _reached(output[0] if logits is None else logits)
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for h in hooks:
            h.remove()
        for m in training:
            m.training = True
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    return Use(
        frozenset(
            name
            for name, good in placed.items()
            if good and any(id(p) in reached for p in modules[name].parameters(recurse=False))
        ),
        frozenset(name for name, p in parameters.items() if id(p) in reached),
    )


def _plain(module: Any, x: Tensor, y: Tensor) -> bool:
    """Returns whether a linear layer maps [..., d_in] to [..., d_out]; some subclasses do not."""
    return x.shape[:-1] == y.shape[:-1] and {x.shape[-1], y.shape[-1]} == set(module.weight.shape)


def in_place(shape: Any, b: int, t: int) -> bool:
    """Returns whether inputs are [b, …, d] or [b * t, d], so that the example of a row is known."""
    return (len(shape) >= 3 and shape[0] == b) or (len(shape) == 2 and shape[0] == b * t)


def _reached(value: Tensor) -> set[int]:
    """Returns the ids of all leaves that a tensor was computed from."""
    found, seen, left = set(), set(), [value.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        left += [n for n, _ in node.next_functions]
    return found
