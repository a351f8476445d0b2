"""bergson: its gradient collector's features, on the target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tdabench.api import Context, Example, RepresentationMethod, Role, Rows, UsageError
from tdabench_adapters.common import contained, package

REMEDY = (
    "Install it with: pip install --no-deps bergson datasets dill xxhash multiprocess pandas "
    "pyarrow peft natsort jaxtyping wadler-lindig ml_dtypes petname simple-parsing "
    "docstring-parser torchopt optree accelerate psutil (it declares torchvision, torchaudio and "
    "bitsandbytes, which it does not import here)"
)


@dataclass(frozen=True, kw_only=True)
class BergsonGradDot(RepresentationMethod):
    """Inner products of gradients collected by bergson, with its hooks and projection per layer.

    rank  bergson's projection_dim: each side of each layer is projected by its own Rademacher
          matrix; None keeps whole gradients and equals `graddot` with rank=none
    unit_norm  cosines instead
    checkpoint  checkpoint of the target at which gradients are computed
    layers  regular expression searched in layer names; None is all but the output head
    """

    name = "bergson-graddot"
    family = "package"
    source = "package bergson 2.5"
    summary = "gradient inner products by the package bergson (extra)"
    grid = {"unit_norm": (False, True), "checkpoint": ("base", "warm")}

    checkpoint: str = "base"
    layers: str | None = None
    rank: int | None = 16
    unit_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"{self.name}: rank must be at least 1, not {self.rank}")

    def encode(self, context: Context, examples: Sequence[Example], role: Role) -> Rows:
        bergson = package("bergson", "bergson", REMEDY)
        import torch

        from tdabench.api import example_losses, map_batches, select_layers

        model = context.target.fresh_model(self.checkpoint).to(context.device)  # type: ignore[arg-type]
        # Gradients reach the hooks only if something below them requires a gradient.
        model.get_input_embeddings().requires_grad_(True)
        tokens = context.target.tokenize(examples)
        with contained():
            collector = bergson.GradientCollector(
                model=model,
                data=range(len(tokens)),  # only its length is used
                cfg=bergson.IndexConfig(run_path=str(context.scratch / "bergson")),
                processor=bergson.GradientProcessor(
                    projection_dim=self.rank, projection_seed=context.seed
                ),
                target_modules={name for name, _ in select_layers(model, self.layers)},
                skip_index=True,
            )

        def compute(batch: object) -> torch.Tensor:
            collector.mod_grads.clear()
            with torch.enable_grad():
                example_losses(model, batch).sum().backward()  # type: ignore[arg-type]
            model.zero_grad(set_to_none=True)
            parts = [collector.mod_grads[name].flatten(1) for name in sorted(collector.mod_grads)]
            return torch.cat(parts, dim=1).float()

        dim = sum(math.prod(shape) for shape in collector.shapes().values())
        out = np.empty((len(tokens), dim), dtype=np.float32)
        with contained(), collector:
            for index, block in map_batches(context, tokens, compute, what="bergson gradients"):
                out[index] = block.cpu().numpy()
        if self.unit_norm:
            norms = np.linalg.norm(out, axis=1, keepdims=True)
            out /= np.where(norms > 0, norms, 1.0)
        return out
