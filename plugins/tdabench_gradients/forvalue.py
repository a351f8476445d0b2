"""For-Value: alignment of hidden states and prediction errors at the output head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.api import Context, Example, RepresentationMethod, Role, Rows, UsageError
from tdabench_gradients.base import normalised

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch


@dataclass(frozen=True, kw_only=True)
class ForValue(RepresentationMethod):
    """score(q, z) = mean over tokens s of q and t of z of (e_s . e_t) (h_s . h_t).

    h are the states that the output head reads at the positions which predict response tokens, and
    e = onehot(token) - p are the prediction errors [vocabulary] (arXiv 2508.10180). It takes one
    forward pass and no derivative, and is the inner product of the loss's gradients with respect to
    the head's weights. The feature of an example is mean_t (P_e^T e_t) (P_h^T h_t)^T, random
    projections of either side; the inner product is preserved in expectation.

    checkpoint  checkpoint of the target
    errors      dimensions of the projected errors; None: the whole vocabulary
    states      dimensions of the projected states; None: all of them
    normalise   scale features to length 1, so that the score is a cosine
    """

    name = "forvalue"
    family = "gradient"
    source = "Deng et al. 2025 (For-Value), arXiv 2508.10180"
    summary = "alignment of last states and prediction errors: forward passes only"
    grid = {"checkpoint": ("base", "warm"), "normalise": (False, True)}

    checkpoint: str = "base"
    errors: int | None = 64
    states: int | None = 64
    normalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(d is not None and d < 1 for d in (self.errors, self.states)):
            raise UsageError(f"{self.name}: errors and states must be at least 1")

    def encode(self, context: Context, examples: Sequence[Example], role: Role) -> Rows:
        from tdabench.api import stream_features

        model = context.target.model(self.checkpoint, context.device)
        vocabulary, width = model.get_output_embeddings().weight.shape
        p_e = self._draw(context, "errors", int(vocabulary), self.errors)
        p_h = self._draw(context, "states", int(width), self.states)
        dims = [d if p is None else p.shape[1] for p, d in ((p_e, vocabulary), (p_h, width))]

        def compute(batch: Batch) -> torch.Tensor:
            errors, states = errors_and_states(model, batch)
            if p_e is not None:
                errors = errors @ p_e
            if p_h is not None:
                states = states @ p_h
            return _mean_outer(errors, states, batch)

        return stream_features(
            context,
            examples,
            compute,
            dims[0] * dims[1],
            name=f"{self.name}-{role}",
            key=None if role == "query" else [self.name, self.version, str(self.params)],
        )

    def _draw(self, context: Context, what: str, d: int, rank: int | None) -> torch.Tensor | None:
        """Draws a Gaussian projection [d, rank] of variance 1/rank; None if it would not shrink."""
        import torch

        if rank is None or rank >= d:
            return None
        drawn = torch.randn(d, rank, generator=context.torch_generator(f"forvalue/{what}"))
        return (drawn / rank**0.5).to(context.device)

    def transform(self, features: Any, state: Any, role: Role) -> Any:
        x = np.asarray(features)
        return normalised(x).astype(np.float32) if self.normalise else x


def errors_and_states(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes e [tokens, vocabulary] and h [tokens, width] of the response tokens, row by row."""
    import torch

    from tdabench.api import response_logits

    seen: list[torch.Tensor] = []

    def keep(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(args[0].detach())

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            logits = response_logits(model, batch).float()
    finally:
        handle.remove()
    states = seen[-1].float()
    if states.dim() == 3:  # the head read every position: [b, t, width]
        states = states.flatten(0, 1)[batch.places]
    errors = -torch.softmax(logits, dim=1)
    errors[torch.arange(len(errors), device=errors.device), batch.gold] += 1
    return errors, states


def _mean_outer(errors: torch.Tensor, states: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Computes mean_t e_t h_t^T of each example, flattened: [b, errors * states]."""
    import torch

    b = len(batch.input_ids)
    out = errors.new_zeros(b, errors.shape[1], states.shape[1])
    rows = batch.rows
    for i in range(b):  # tokens of an example are adjacent
        own = rows == i
        out[i] = errors[own].T @ states[own] / max(1, int(own.sum()))
    return torch.flatten(out, 1)
