"""TRAK: attribution by a linearised model on sketched gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tdabench.api import Context, Example, Role, Rows, UsageError
from tdabench_gradients.base import GradientMethod, State, damped_cholesky

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch, GradientEngine


@dataclass(frozen=True, kw_only=True)
class TRAK(GradientMethod):
    """score(q, z) = mean_m [phi_m(q)^T (F_m + lambda I)^-1 phi_m(z)] * mean_m [1 - p_m(z)]

    phi_m = P^T grad f at checkpoint m, and F_m is the mean of phi_m phi_m^T over the training
    corpus (arXiv 2303.14186, eq. 17), averaged over `checkpoints` (if empty, only `checkpoint`).
    f is the log-odds log(p_t / (1 - p_t)) of each response token, and 1 - p_t is the token's
    weight; `reduction` reduces both over the response, since the paper does not define the
    reduction for language models.

    checkpoints  checkpoints to average over; if empty, only `checkpoint`
    ensemble   average instead over this many models that the method trains while building, as the
               paper does: by the target's recipe, each on a random `share` of the corpus, by seeds
               of its own. They are kept in the index (float16) and counted as retrainings
    share      share of the corpus that each of them is trained on
    proj_dim   sketch dimension
    sketch     "sparse" (one signed entry per parameter), "rademacher" or "normal" (dense, as in
               the paper; much slower)
    damping    lambda as a multiple of the mean eigenvalue; must be positive if there are at most
               `proj_dim` examples
    rank       project each layer's sides first: a Kronecker sketch, cheaper and coarser
    reduction  "mean" or "sum" of the token log-odds over the response
    """

    name = "trak"
    version = 2
    source = "Park et al. 2023, arXiv 2303.14186"
    summary = "linearised-model attribution on sketched gradients"
    grid = {"damping": (0.01, 0.1, 1.0, 10.0), "checkpoint": ("base", "warm")}

    checkpoints: tuple[str, ...] = ()
    ensemble: int = 0
    share: float = 0.5
    rank: int | None = None
    proj_dim: int = 2048
    sketch: Literal["sparse", "rademacher", "normal"] = "sparse"
    damping: float = 0.1
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damping < 0 or self.proj_dim < 1:
            raise UsageError(f"{self.name}: damping must be >= 0 and proj_dim >= 1")
        if self.ensemble < 0 or not 0 < self.share <= 1:
            raise UsageError(f"{self.name}: ensemble must be >= 0 and share in (0, 1]")
        if self.ensemble and self.checkpoints:
            raise UsageError(f"{self.name}: give an ensemble or checkpoints, not both")
        if self.reduction not in ("mean", "sum"):
            raise UsageError(
                f"{self.name}: unknown reduction {self.reduction!r}", "One of: mean, sum"
            )

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models to average over."""
        trained = tuple(f"trained model {k}" for k in range(self.ensemble))
        return trained or self.checkpoints or (self.checkpoint,)

    def learn(self, context: Context, train: Sequence[Example]) -> State:
        """Trains the ensemble: weights, float16 [model, parameter]."""
        if not self.ensemble:
            return {}
        from tdabench.api import random_groups, retrained

        groups = random_groups(context, train, self.ensemble, self.share, "trak/groups")
        return {"ensemble": retrained(context, train, groups, "trak")}

    def prepare_cost(self, context: Context) -> Mapping[str, float] | None:
        return {"retrainings": float(self.ensemble)} if self.ensemble else None

    def features(
        self, context: Context, examples: Sequence[Example], role: Role, state: State
    ) -> Rows:
        """Returns [example, models * dim + models]: the sketches, then 1 - p of each model."""
        import torch

        if self.ensemble:
            parts = [self._sketched(context, self._of(context, w)) for w in state["ensemble"]]
        else:
            engines = (self.engine(context, {}, checkpoint=m) for m in self.models)
            parts = [self._sketched(context, engine) for engine in engines]

        def compute(batch: Batch) -> torch.Tensor:
            phis, weights = zip(*(part(batch) for part in parts))
            return torch.cat([*phis, torch.stack(weights, dim=1)], dim=1)

        dim = len(self.models) * (self.proj_dim + 1)
        return self.stream(context, examples, role, compute, dim)

    def _of(self, context: Context, weights: np.ndarray) -> GradientEngine:
        """Returns the engine of a trained model; each has its own module."""
        from tdabench.api import GradientEngine, models_of

        (model,) = models_of(context, weights[None])
        return GradientEngine(
            model,
            layers=self.layers,
            rank=self.rank,
            bias=self.bias,
            random=context.torch_generator,
        )

    def _sketched(self, context: Context, engine: GradientEngine) -> Any:
        """Returns a function from a batch to (phi [b, dim], 1 - p [b]) of one model."""
        import torch

        from tdabench.api import Layer, Workspace, example_blocks
        from tdabench_gradients.sketch import Sketch

        sketch = Sketch(context, engine, self.proj_dim, self.sketch)
        workspace = Workspace()

        def compute(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            b = len(batch.input_ids)
            phi = torch.zeros(b, self.proj_dim, device=batch.input_ids.device)
            weight: list[torch.Tensor] = []

            def measured(model: Any, batch: Batch) -> torch.Tensor:
                margin, w = self.measure(model, batch)
                weight.append(w)
                return margin

            def visit(layer: Layer, x: torch.Tensor, delta: torch.Tensor) -> None:
                for part, g in example_blocks(layer, x, delta, workspace):
                    sketch.add(layer, g.flatten(1), phi[part])

            engine.backward(batch, visit, measured)
            return phi, weight[0]

        return compute

    def measure(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (f [b], differentiable; mean token 1 - p [b], detached)."""
        import torch

        from tdabench.api import token_losses

        losses = token_losses(model, batch)  # -log p of the response tokens
        # log(p / (1 - p)); 1 - p = -expm1(-loss), kept above 0 where p rounds to 1.
        rest = (-torch.expm1(-losses)).clamp_min(torch.finfo(losses.dtype).tiny)
        margins = -losses - rest.log()
        f = batch.means(margins)
        if self.reduction == "sum":
            f = f * batch.loss_mask.sum(1)
        return f, batch.means(rest.detach())

    # ------------------------------------------------------------------ curvature

    def fit(self, context: Context, features: Rows) -> State:
        from tdabench_gradients.base import curvature_blocks

        m = len(self.models)
        starts = np.arange(m + 1) * self.proj_dim
        return {
            f"low.{i}": damped_cholesky(c, self.damping, f"{self.name} ({name})", features.shape[0])
            for i, (c, name) in enumerate(zip(curvature_blocks(features, starts), self.models))
        }

    def transform(self, features: Any, state: Any, role: Role) -> Any:
        """Whitens phi_m; training rows are also multiplied by mean(1 - p) / models."""
        from tdabench_gradients.base import whiten

        m, d = len(self.models), self.proj_dim
        features = np.asarray(features)
        out = np.empty((len(features), m * d), dtype=np.float32)
        for i in range(m):
            out[:, i * d : (i + 1) * d] = whiten(
                features[:, i * d : (i + 1) * d], state[f"low.{i}"]
            )
        if role == "train":
            out *= self.train_weight(features[:, m * d :]) / m
        return out

    def train_weight(self, missing: np.ndarray) -> np.ndarray:
        """Returns each training example's factor [n, 1] from 1 - p of each model [n, models]."""
        return missing.mean(axis=1, keepdims=True)
