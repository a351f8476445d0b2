"""Products of vectors with the curvature of the mean training loss, over all layers at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.api import Tokens

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch
    from tdabench_influence.streaming import StreamingIndex

KINDS = ("fisher", "gauss-newton", "hessian")
_ROWS_AT_ONCE = 16  # each holds its own activations


def product(
    index: StreamingIndex, v: torch.Tensor, kind: str, chosen: np.ndarray | None = None
) -> torch.Tensor:
    """Computes C v for each row of v [k, dim]; C is over the examples `chosen` (all if None).

    fisher         C = mean_i g_i g_i^T, from per-example gradients: one pass for all k rows
    gauss-newton   C = mean_i of J^T H J over response tokens, H of the softmax loss
    hessian        the second derivative of the mean loss
    """
    tokens = index.tokens if chosen is None else [index.tokens[int(i)] for i in chosen]
    if kind == "fisher":
        return _fisher(index, v, tokens)
    return _autograd(index, v, tokens, kind)


def _fisher(index: StreamingIndex, v: torch.Tensor, tokens: list[Tokens]) -> torch.Tensor:
    import torch

    from tdabench.api import map_batches

    def compute(batch: Batch) -> torch.Tensor:
        g = index.engine.gradients(batch).to(v)  # [b, dim], in the precision of v
        return (v @ g.T) @ g

    out = torch.zeros_like(v)
    most = max(1, min(256, (256 << 20) // (4 * index.engine.dim)))
    for _, part in map_batches(
        index.context, tokens, compute, what="curvature products", max_examples=most
    ):
        out += part
    return out / max(1, len(tokens))


def _autograd(
    index: StreamingIndex, v: torch.Tensor, tokens: list[Tokens], kind: str
) -> torch.Tensor:
    """Computes exact products by forward-over-reverse derivatives."""
    import torch

    from tdabench.api import map_batches, response_logits

    model = index.context.target.fresh_model(index.method.checkpoint).to(index.context.device)  # type: ignore[arg-type]
    # Fused attention and grouped products of experts have no forward-mode derivative.
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Batch) -> torch.Tensor:
            return response_logits(self.model, batch).float()

    wrapped = Logits()
    weights = {
        f"model.{name}": p.detach() for name, p in model.named_parameters() if name in _names(index)
    }

    def compute(batch: Batch) -> torch.Tensor:
        gold, rows = batch.gold, batch.rows
        share = 1 / batch.loss_mask.sum(1)[rows]  # weight of a token in its example's mean loss

        def logits(w: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(wrapped, w, (batch,))

        def loss(w: dict[str, torch.Tensor]) -> torch.Tensor:
            losses = torch.nn.functional.cross_entropy(logits(w), gold, reduction="none")
            return (losses * share).sum()

        def one(row: torch.Tensor) -> torch.Tensor:
            tangent = _to_weights(index, row)
            if kind == "hessian":
                _, found = torch.func.jvp(torch.func.grad(loss), (weights,), (tangent,))  # type: ignore[misc]
            else:
                z, jv = torch.func.jvp(logits, (weights,), (tangent,))  # type: ignore[misc]
                p = torch.softmax(z, dim=1)
                hjv = p * (jv - (p * jv).sum(1, keepdim=True)) * share[:, None]
                (found,) = torch.func.vjp(logits, weights)[1](hjv)
            return _from_weights(index, found)

        return torch.func.vmap(one, chunk_size=_ROWS_AT_ONCE)(v.float()).to(v)

    total = torch.zeros_like(v)
    for _, part in map_batches(index.context, tokens, compute, what="curvature products"):
        total += part.detach()
    return total / max(1, len(tokens))


def _names(index: StreamingIndex) -> set[str]:
    layers = index.engine.layers
    return {f"{a.name}.weight" for a in layers} | {f"{a.name}.bias" for a in layers if a.bias}


def _to_weights(index: StreamingIndex, row: torch.Tensor) -> dict[str, torch.Tensor]:
    """Splits a vector [dim] into tangents of the layers' weights and biases."""
    out: dict[str, Any] = {}
    for layer in index.engine.layers:
        g = row[layer.columns].view(layer.d_out, layer.d_in)
        w = g[:, :-1] if layer.bias else g
        out[f"model.{layer.name}.weight"] = (w.T if layer.conv1d else w).contiguous()
        if layer.bias:
            out[f"model.{layer.name}.bias"] = g[:, -1].contiguous()
    return out


def _from_weights(index: StreamingIndex, found: dict[str, torch.Tensor]) -> torch.Tensor:
    import torch

    def parts() -> Iterator[torch.Tensor]:
        for layer in index.engine.layers:
            w = found[f"model.{layer.name}.weight"]
            w = w.T if layer.conv1d else w
            if layer.bias:
                w = torch.cat([w, found[f"model.{layer.name}.bias"][:, None]], dim=1)
            yield w.reshape(-1)

    return torch.cat(list(parts()))
