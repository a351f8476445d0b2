"""HiddenGrad: the gradient of the loss at the target's last hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.api import (
    Context,
    Example,
    RepresentationMethod,
    Role,
    Rows,
    UsageError,
    row_blocks,
)
from tdabench_gradients.base import normalised

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch


@dataclass(frozen=True, kw_only=True)
class HiddenGrad(RepresentationMethod):
    """score(q, z) = phi(q) . phi(z), phi the negative gradient of the loss at the last states.

    The loss is the mean response-token loss. Its gradient at the states that the output head reads
    (after the final norm), summed over positions, is float32 [width]:

        -dL/dh = 1/T sum_t (W[y_t] - sum_v p_t(v) W[v])

    which is the mean over response tokens of the token's output embedding minus the mean output
    embedding under the target's prediction. It takes one forward pass; only the head is
    differentiated.

    checkpoint  checkpoint of the target at which the gradient is computed
    whiten      centre by the training mean and multiply by (C + damping * tr(C) / width)^-1/2, C
                the covariance over training examples
    damping     share of the mean eigenvalue of C that is added to it
    normalise   scale phi to length 1, so that the score is a cosine
    dtype       of the stored training rows: float32, float16 or int8 (with a scale per row)

    The nearest published method is Representation Gradient Tracing (arXiv 2510.02334), which joins
    the state of the last prompt token and the gradient at the first response token, both at a
    middle layer that it selects, and therefore needs a backward pass through later layers.
    """

    name = "hiddengrad"
    family = "gradient"
    summary = "gradient of the loss at the target's last hidden states: one forward pass"
    source = "tdabench; compare arXiv 2510.02334"
    grid = {"checkpoint": ("base", "warm"), "whiten": (True, False), "normalise": (True, False)}

    checkpoint: str = "base"
    whiten: bool = True
    damping: float = 0.1
    normalise: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damping >= 0:
            raise UsageError(f"hiddengrad: damping must not be negative, not {self.damping}")
        if self.dtype not in ("float32", "float16", "int8"):
            raise UsageError(
                f"hiddengrad: unknown dtype {self.dtype!r}", "One of: float32, float16, int8"
            )

    def encode(self, context: Context, examples: Sequence[Example], role: Role) -> Rows:
        from tdabench.api import stream_features

        model = context.target.model(self.checkpoint, context.device)
        return stream_features(
            context,
            examples,
            lambda batch: hidden_gradients(model, batch),
            int(model.get_output_embeddings().weight.shape[1]),
            name=f"{self.name}-{role}",
            key=None if role == "query" else [self.name, self.version, self.checkpoint],
            dtype="float32" if role == "query" else self.dtype,
        )

    def fit(self, context: Context, features: Rows) -> dict[str, np.ndarray]:
        """Computes the mean [width] and inverse root of the damped covariance [width, width]."""
        if not self.whiten:
            return {}
        n, d = features.shape
        total, square = np.zeros(d), np.zeros((d, d))
        for _, block in row_blocks(features):
            x = np.asarray(block, dtype=np.float64)
            total += x.sum(0)
            square += x.T @ x
        mean = total / max(1, n)
        values, vectors = np.linalg.eigh(square / max(1, n) - np.outer(mean, mean))
        values = values.clip(0)
        # A direction without spread carries no information, and dividing by it is undefined.
        damped = values + self.damping * values.mean()
        least = 1e-12 * max(float(damped.max()), 1e-30)
        scale = np.where(damped > least, 1 / np.sqrt(np.maximum(damped, least)), 0.0)
        return {"mean": mean, "root": (vectors * scale) @ vectors.T}

    def transform(self, features: Any, state: Mapping[str, np.ndarray], role: Role) -> Any:
        x = np.asarray(features, dtype=np.float64)
        if self.whiten:
            x = (x - state["mean"]) @ state["root"]
        return (normalised(x) if self.normalise else x).astype(np.float32)


def hidden_gradients(model: Any, batch: Batch) -> torch.Tensor:
    """Computes -d loss / d (input of the output head), summed over positions: [b, width].

    The loss of each example is its mean response-token loss. The graph begins at the head's input,
    so the body only runs forward.
    """
    import torch

    from tdabench.api import token_losses

    states: list[torch.Tensor] = []

    def cut(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states.append(args[0].detach().requires_grad_(True))
        return (states[-1], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        with torch.enable_grad():
            losses = batch.means(token_losses(model, batch))  # [b]
            # The head's last call made the losses: a model that is new is probed before.
            (gradient,) = torch.autograd.grad(losses.sum(), states[-1])
    finally:
        handle.remove()
    if gradient.dim() == 3:  # the head read every position: [b, t, width]
        return -gradient.sum(1)
    sums = gradient.new_zeros(len(batch.input_ids), gradient.shape[1])
    return -sums.index_add(0, batch.rows, gradient)
