"""DsDm: TRAK on the loss itself, with the plain Fisher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench_gradients.trak import TRAK

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch


@dataclass(frozen=True, kw_only=True)
class DsDm(TRAK):
    """score(q, z) = mean_m phi_m(q)^T (F_m + lambda I)^-1 phi_m(z), phi = P^T grad loss.

    Like `trak`, with the response loss as the measurement and without the weight 1 - p: the
    estimator that DsDm (arXiv 2401.12926, appendix) uses to select data for language models.
    Parameters as for `trak`; `reduction` is over token losses.
    """

    name = "dsdm"
    version = 2
    source = "Engstrom et al. 2024, arXiv 2401.12926"
    summary = "TRAK on token losses with the raw Fisher"

    def measure(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        from tdabench.api import example_losses

        losses = example_losses(model, batch)
        if self.reduction == "sum":
            losses = losses * batch.loss_mask.sum(1)
        return losses, torch.ones_like(losses, requires_grad=False)

    def train_weight(self, missing: np.ndarray) -> np.ndarray:
        return np.ones((len(missing), 1), dtype=np.float32)
