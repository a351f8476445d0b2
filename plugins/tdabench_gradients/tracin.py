"""TracIn: GradDot summed over checkpoints of the training run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tdabench.api import Context, Example, Role, Rows, UsageError
from tdabench_gradients.base import GradientMethod, State

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch


@dataclass(frozen=True, kw_only=True)
class TracIn(GradientMethod):
    """score(q, z) = sum_c eta_c g_q(theta_c) . g_z(theta_c) (arXiv 2002.08484, TracInCP).

    checkpoints  checkpoints c of the target; if empty, all of them (`checkpoint` is not used)
    rates        learning rate eta of each checkpoint; if empty, 1 for all
    """

    name = "tracin"
    source = "Pruthi et al. 2020, arXiv 2002.08484"
    summary = "inner product of gradients summed over checkpoints"

    checkpoints: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rates and len(self.rates) != len(self.checkpoints):
            raise UsageError(
                f"{self.name}: {len(self.rates)} rates for {len(self.checkpoints)} checkpoints",
                "Give one learning rate per checkpoint",
            )
        if any(rate < 0 for rate in self.rates):
            raise UsageError(f"{self.name}: a learning rate is negative: {self.rates}")

    def features(
        self, context: Context, examples: Sequence[Example], role: Role, state: State
    ) -> Rows:
        import torch

        names = self.checkpoints or tuple(context.target.checkpoints)
        rates = self.rates or (1.0,) * len(names)
        engines = [self.engine(context, state, checkpoint=name) for name in names]

        def compute(batch: Batch) -> torch.Tensor:
            parts = [e.gradients(batch) * rate**0.5 for e, rate in zip(engines, rates)]
            return torch.cat(parts, dim=1)

        return self.stream(context, examples, role, compute, sum(e.dim for e in engines))
