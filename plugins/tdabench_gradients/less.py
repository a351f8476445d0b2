"""LESS: LoRA gradients along an Adam warm-up run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.api import Context, Example, MethodError, Role, Rows, UsageError
from tdabench_gradients.base import GradientMethod, State

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch, GradientEngine, Layer


@dataclass(frozen=True, kw_only=True)
class LESS(GradientMethod):
    """score(q, z) = sum_e eta_e cos(P g_q(theta_e), P Gamma_z(theta_e)) (arXiv 2402.04333, eq. 3).

    LoRA weights (B A, scaled by alpha / r) are trained by Adam from `checkpoint` on a random
    share of the training corpus. theta_e is their state after epoch e, and eta_e is the epoch's
    mean learning rate divided by the sum over epochs. g is the gradient with respect to the LoRA
    weights, and Gamma is the update that Adam would compute from it with its moments at theta_e:
    m / (sqrt(v) + eps) with m = b1 m_e + (1 - b1) g, v = b2 v_e + (1 - b2) g^2. P is a sparse
    sketch. For a subtask of several queries LESS takes the mean of their g, and the maximum over
    subtasks; this is a selection rule based on these scores.

    checkpoint  where the warm-up starts: "base"
    lora_rank   r
    alpha       scale of the LoRA weights
    warmup      share of the training corpus to train on
    epochs      of the warm-up, which has few examples; lr decays linearly to 0
    batch_size  of the warm-up
    lr          of the warm-up; None takes it from the target's recipe, like Adam's b1, b2 and eps
    dim         sketch dimension (LoRA gradients of at most this size are kept whole)
    """

    name = "less"
    version = 3
    source = "Xia et al. 2024, arXiv 2402.04333"
    summary = "cosine of LoRA gradients and Adam updates along a warm-up"

    checkpoint: str = "base"
    rank: int | None = None
    lora_rank: int = 8
    alpha: float = 16.0
    warmup: float = 0.05
    epochs: int = 4
    lr: float | None = None
    batch_size: int = 16
    dim: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.warmup <= 1 or self.epochs < 1 or self.dim < 1:
            raise UsageError(f"{self.name}: warmup must be in (0, 1], and epochs and dim positive")
        if self.lr is not None and not self.lr > 0:
            raise UsageError(f"{self.name}: lr must be positive, not {self.lr}")
        if self.lora_rank < 1 or self.batch_size < 1:
            raise UsageError(f"{self.name}: lora_rank and batch_size must be at least 1")
        if self.rank is not None or self.bias:
            raise UsageError(
                f"{self.name}: rank and bias do not apply to gradients of LoRA weights",
                "Set lora_rank and dim instead",
            )

    def engine(self, context: Context, state: State, **changes: Any) -> GradientEngine:
        # Adapters are added to the output of modules; experts in one tensor are not modules.
        return super().engine(context, state, **{"experts": False, **changes})

    # ------------------------------------------------------------------ warm-up

    def learn(self, context: Context, train: Sequence[Example]) -> State:
        """Trains the LoRA weights; returns them and Adam's moments after each epoch."""
        import torch

        from tdabench.api import example_losses

        engine, recipe = self.engine(context, {}), context.target.recipe
        peak = recipe.lr if self.lr is None else self.lr
        n = max(1, round(self.warmup * len(train)))
        rng = context.rng("less/warmup")
        # By id, so that the order of the corpus does not matter.
        by_id = sorted(train, key=lambda example: example.id)
        chosen = rng.choice(len(train), n, replace=False)
        tokens = context.target.tokenize([by_id[int(i)] for i in chosen])
        lora = self._initial(context, engine)
        weights = [w.requires_grad_() for w in lora.values()]
        adam = torch.optim.Adam(
            weights, lr=peak, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps
        )
        total = self.epochs * -(-n // self.batch_size)
        step, state, rates = 0, {}, []
        with self._attached(engine, lora):
            for epoch in range(self.epochs):
                order, rates_now = rng.permutation(n), []
                for a in range(0, n, self.batch_size):
                    part = [tokens[int(i)] for i in order[a : a + self.batch_size]]
                    adam.param_groups[0]["lr"] = peak * (total - step) / total
                    rates_now.append(adam.param_groups[0]["lr"])
                    for batch in context.target.batches(part):
                        losses = example_losses(engine.model, batch.to(context.device))
                        (losses.sum() / len(part)).backward()
                        if not bool(torch.isfinite(losses).all()):
                            raise MethodError(f"{self.name}: the warm-up diverged", "Lower lr")
                    adam.step()
                    adam.zero_grad()
                    step += 1
                    context.progress("LoRA warm-up", step, total)
                rates.append(float(np.mean(rates_now)))
                for key, w in lora.items():
                    kept = adam.state[w]
                    for what, v in (("w", w), ("m", kept["exp_avg"]), ("v", kept["exp_avg_sq"])):
                        state[f"{what}.{epoch}.{key}"] = v.detach().cpu().numpy().copy()
        state["rates"] = np.asarray(rates) / np.sum(rates)
        return state

    def _initial(self, context: Context, engine: GradientEngine) -> dict[str, torch.Tensor]:
        """Initialises A [r, d_in] uniformly and B [d_out, r] to zero: the update starts at 0."""
        import torch

        lora = {}
        for layer in engine.layers:
            generator = context.torch_generator(f"less/{layer.name}")
            a = (torch.rand(self.lora_rank, layer.d_in, generator=generator) * 2 - 1) * (
                layer.d_in**-0.5
            )
            lora[f"a.{layer.name}"] = a.to(context.device)
            lora[f"b.{layer.name}"] = torch.zeros(
                layer.d_out, self.lora_rank, device=context.device
            )
        return lora

    @contextmanager
    def _attached(self, engine: GradientEngine, lora: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Adds alpha / r B A x to each layer's output within the context."""

        def hook(a: torch.Tensor, b: torch.Tensor) -> Any:
            scale = self.alpha / self.lora_rank
            return lambda _module, inputs, out: out + scale * (inputs[0] @ a.T) @ b.T

        handles = [
            layer.module.register_forward_hook(
                hook(lora[f"a.{layer.name}"], lora[f"b.{layer.name}"])
            )
            for layer in engine.layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # ------------------------------------------------------------------ features

    def features(
        self, context: Context, examples: Sequence[Example], role: Role, state: State
    ) -> Rows:
        """Returns [example, epochs * dim']: unit rows per epoch; training rows times eta_e."""
        import torch

        from tdabench_gradients.sketch import SparseSketch

        engine = self.engine(context, state)
        sizes = [self.lora_rank * (layer.d_in + layer.d_out) for layer in engine.layers]
        total = sum(sizes)
        dim = min(self.dim, total)
        sketch = None
        if total > dim:
            generator = context.torch_generator("less/sketch")
            sketch = SparseSketch(total, dim, generator, context.device)
        epochs = [
            {
                key: torch.from_numpy(v).to(context.device)
                for key, v in state.items()
                if key.split(".")[1:2] == [str(e)]
            }
            for e in range(self.epochs)
        ]
        rates, recipe = state["rates"], context.target.recipe

        def compute(batch: Batch) -> torch.Tensor:
            parts = []
            for e, kept in enumerate(epochs):
                g = self.lora_gradients(engine, batch, kept, e)
                if role == "train":
                    m, v = (self._flat(engine, kept, what, e) for what in ("m", "v"))
                    m = recipe.beta1 * m + (1 - recipe.beta1) * g
                    v = recipe.beta2 * v + (1 - recipe.beta2) * g.square()
                    g = m / (v.sqrt() + recipe.eps)
                if sketch is not None:
                    whole, g = g, torch.zeros(len(g), dim, device=g.device)
                    sketch.add(whole, g)
                g = g / g.norm(dim=1, keepdim=True).clamp_min(1e-30)
                parts.append(g * float(rates[e]) if role == "train" else g)
            return torch.cat(parts, dim=1)

        return self.stream(context, examples, role, compute, self.epochs * dim)

    def lora_gradients(
        self, engine: GradientEngine, batch: Batch, kept: Mapping[str, torch.Tensor], epoch: int
    ) -> torch.Tensor:
        """Computes gradients of the LoRA weights at an epoch: [b, sum r (d_in + d_out)].

        Per layer, A comes first, then B.

        With y = W x + s B A x: dA = s sum_t (B^T delta_t) x_t^T, dB = s sum_t delta_t (A x_t)^T.
        """
        import torch

        scale = self.alpha / self.lora_rank
        found: dict[str, torch.Tensor] = {}
        lora = {k: kept[f"w.{epoch}.{k}"] for layer in engine.layers for k in _keys(layer)}

        def visit(layer: Layer, x: torch.Tensor, delta: torch.Tensor) -> None:
            a, b = (lora[k] for k in _keys(layer))
            x, delta = x.float(), delta.float()
            d_a = torch.bmm((delta @ b).transpose(1, 2), x)  # [b, r, d_in]
            d_b = torch.bmm(delta.transpose(1, 2), x @ a.T)  # [b, d_out, r]
            found[layer.name] = scale * torch.cat([d_a.flatten(1), d_b.flatten(1)], dim=1)

        with self._attached(engine, lora):
            engine.backward(batch, visit)
        return torch.cat([found[layer.name] for layer in engine.layers], dim=1)

    def _flat(
        self, engine: GradientEngine, kept: Mapping[str, torch.Tensor], what: str, epoch: int
    ) -> torch.Tensor:
        import torch

        return torch.cat(
            [kept[f"{what}.{epoch}.{k}"].flatten() for layer in engine.layers for k in _keys(layer)]
        )

    def encode(self, context: Context, examples: Sequence[Example], role: Role) -> Rows:
        raise UsageError(f"{self.name} encodes relative to a warm-up run", "Call build instead")


def _keys(layer: Layer) -> tuple[str, str]:
    return f"a.{layer.name}", f"b.{layer.name}"
