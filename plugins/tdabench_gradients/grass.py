"""FactGraSS: sparse masks on both sides of a layer, then a sparse sketch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tdabench.api import Context, Example, Role, Rows, UsageError
from tdabench_gradients.base import State
from tdabench_gradients.logra import LoGra

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch, Layer


@dataclass(frozen=True, kw_only=True)
class FactGraSS(LoGra):
    """Influence as in `logra`, on gradients compressed without a dense projection.

    Per layer, `mask` random coordinates of x and of delta are kept, the gradient of that
    sub-matrix is formed, and a sparse Johnson-Lindenstrauss transform reduces it to `dim` numbers
    (arXiv 2505.18976, FactGraSS with random masks). The cost of compression is linear in `mask`^2.

    mask  coordinates kept per side
    dim   features per layer
    """

    name = "factgrass"
    source = "Hu et al. 2025, arXiv 2505.18976"
    summary = "influence on masked and sparsely sketched gradients"

    rank: int | None = None
    mask: int = 32
    dim: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask < 1 or self.dim < 1:
            raise UsageError(f"{self.name}: mask and dim must be at least 1")
        if self.rank is not None or self.projection != "random":
            raise UsageError(
                f"{self.name}: rank and projection do not apply", "Set mask and dim instead"
            )

    def dims(self, context: Context) -> dict[str, int]:
        layers = self.engine(context, {}).layers
        size = {
            layer.name: min(self.mask, layer.d_in) * min(self.mask, layer.d_out) for layer in layers
        }
        return {name: min(self.dim, n) for name, n in size.items()}

    def features(
        self, context: Context, examples: Sequence[Example], role: Role, state: State
    ) -> Rows:
        import torch

        engine = self.engine(context, state)
        dims = self.dims(context)
        starts = dict(zip(dims, [0, *torch.tensor(list(dims.values())).cumsum(0).tolist()]))
        plans = {
            layer.name: self._plan(context, layer, dims[layer.name]) for layer in engine.layers
        }

        def compute(batch: Batch) -> torch.Tensor:
            out = torch.zeros(len(batch.input_ids), sum(dims.values()), device=context.device)

            def visit(layer: Layer, x: torch.Tensor, delta: torch.Tensor) -> None:
                i, o, scale, place, sign = plans[layer.name]
                kept = torch.bmm(delta[..., o].float().transpose(1, 2), x[..., i].float())
                part = out[:, starts[layer.name] : starts[layer.name] + dims[layer.name]]
                if place is None:
                    part += kept.flatten(1) * scale
                else:
                    part.index_add_(1, place, kept.flatten(1) * (sign * scale))

            engine.backward(batch, visit)
            return out

        return self.stream(context, examples, role, compute, sum(dims.values()))

    def _plan(self, context: Context, layer: Layer, dim: int) -> tuple[Any, ...]:
        """Returns (kept inputs, kept outputs, scale, sketch place, sketch sign) of a layer."""
        import torch

        generator = context.torch_generator(f"grass/{layer.name}")
        i, o = (
            torch.randperm(d, generator=generator)[: self.mask].sort().values.to(context.device)
            for d in (layer.d_in, layer.d_out)
        )
        scale = (layer.d_in / len(i) * layer.d_out / len(o)) ** 0.5  # keeps expected norms
        n = len(i) * len(o)
        if n <= dim:
            return i, o, scale, None, None
        place = torch.randint(dim, (n,), generator=generator).to(context.device)
        sign = (torch.randint(2, (n,), generator=generator).float() * 2 - 1).to(context.device)
        return i, o, scale, place, sign
