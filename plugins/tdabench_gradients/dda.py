"""DDA: the influence at the tuned model less that at the model before tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.api import Context, Example, Role, Rows, UsageError
from tdabench_gradients.base import GradientMethod, State, normalised

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch


@dataclass(frozen=True, kw_only=True)
class DDA(GradientMethod):
    """score(q, z) = mean_t g_t(q) . g_t(z) - debias * g_0(q) . g_0(z)     (arXiv 2410.01285)

    g_t are gradients of the loss at tuned checkpoints t, g_0 those at the base. Subtracting the
    base's influence removes what the model knew before tuning ("debias"); the mean over checkpoints
    evens out how far each example has been fitted ("denoise"). The formula follows the paper's
    abstract and summaries of it; the authors' code was not compared.

    tuned      checkpoints after tuning, averaged over
    checkpoint the checkpoint before it
    debias     weight of the base's influence; 0 leaves it out
    normalise  cosines in place of inner products
    rank       dimensions to which each side of each layer is projected
    """

    name = "dda"
    source = "Wu et al. 2024 (DDA), arXiv 2410.01285"
    summary = "gradient inner products of the tuned model less the base's"
    grid = {"debias": (0.5, 1.0), "normalise": (False, True)}
    expected_failures = {
        "a-copy-outranks-others": "a copy's score is a difference of squared norms, not their sum"
    }

    tuned: tuple[str, ...] = ("warm",)
    debias: float = 1.0
    normalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tuned:
            raise UsageError(f"{self.name}: name at least one tuned checkpoint")
        if self.debias < 0:
            raise UsageError(f"{self.name}: debias must not be negative, but is {self.debias}")

    def features(
        self, context: Context, examples: Sequence[Example], role: Role, state: State
    ) -> Rows:
        """Returns [example, (tuned + 1) * dim]: gradients at the tuned checkpoints and the base."""
        import torch

        engines = [
            self.engine(context, state, checkpoint=c) for c in (*self.tuned, self.checkpoint)
        ]

        def compute(batch: Batch) -> torch.Tensor:
            return torch.cat([engine.gradients(batch) for engine in engines], dim=1)

        dim = sum(engine.dim for engine in engines)
        return self.stream(context, examples, role, compute, dim)

    def transform(self, features: Any, state: Any, role: Role) -> Any:
        parts = np.split(np.asarray(features), len(self.tuned) + 1, axis=1)
        if self.normalise:
            parts = [normalised(p) for p in parts]
        if role == "query":
            n = len(self.tuned)
            parts = [*(p / n for p in parts[:-1]), -self.debias * parts[-1]]
        return np.concatenate(parts, axis=1).astype(np.float32)
