"""SOURCE: differentiation through training, with one curvature per segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.api import Context, Example, UsageError
from tdabench_influence.ekfac import EKFAC, _drawn_losses
from tdabench_influence.recipe import Followed
from tdabench_influence.streaming import Gradients, State, StreamingIndex, StreamingMethod

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch, GradientEngine
    from tdabench_influence.training import Run


class SourceIndex(StreamingIndex):
    """Weights in the middle of each segment and at the end, and each segment's curvature."""

    method: SOURCE

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        out = np.zeros((len(queries), self.n_train), dtype=np.float32)
        engines = [
            self.method.engine_at(self.context, self.state[f"{i}.theta"])
            for i in range(self.method.segments)
        ]
        end = self.method.engine_at(self.context, self.state["end.theta"])
        step = self.block(copies=2)
        for a in range(0, len(queries), step):
            self.engine = end
            carried = self.gradients(queries[a : a + step])
            for i in reversed(range(self.method.segments)):
                self.engine = engines[i]
                pushed, carried = self._segment(i, carried)
                for index, block in self.products(pushed):
                    out[a : a + step, index] += block
        return self.finite(out / max(1.0, self.method.share_of(self.context) * self.n_train))

    def _segment(self, i: int, gradients: Gradients) -> tuple[Gradients, Gradients]:
        """Computes (F g, S g) of each layer in segment i."""
        import torch

        pushed, carried = {}, {}
        for layer, t in zip(self.engine.layers, self.state[f"{i}.t"]):
            parts = (self.state[f"{i}.{k}.{layer.name}"] for k in ("q_a", "q_s", "lambda"))
            q_a, q_s, values = (torch.from_numpy(p).to(self.context.device) for p in parts)
            g = q_s.T @ gradients[layer.name] @ q_a  # [query, d_out, d_in] in the eigenbasis
            f, s = responses(values.double(), float(t))
            pushed[layer.name] = q_s @ (g * f.to(g)) @ q_a.T
            carried[layer.name] = q_s @ (g * s.to(g)) @ q_a.T
        return pushed, carried


@dataclass(frozen=True, kw_only=True)
class SOURCE(Followed, StreamingMethod):
    """score(q, z) = sum_l g_q(theta_T)^T S_L ... S_(l+1) F_l g_z(theta_l) / n (arXiv 2405.12186).

    The run of the target's recipe on the whole corpus is divided into `segments` with equal numbers
    of steps. In segment l the curvature H_l and the gradients are held fixed at theta_l, in the
    middle of the segment; the weights then follow d(theta) = -lr p (H d(theta) + g_z / n), so that

        S_l = exp(-t_l H_l),    F_l = (1 - exp(-t_l H_l)) / H_l,    t_l = p_l sum of lr in it.

    S_l propagates a change from the segment's start to its end, and F_l is the effect of a
    constant gradient over the segment. No damping is needed: small t_l H_l gives TracIn, large
    t_l H_l gives influence functions. H_l is the Gauss-Newton matrix by EK-FAC (labels drawn from
    the model), and p_l represents Adam's preconditioner: one number per layer, the best fit to
    m / (sqrt(v) + eps).

    Parameters: those of `ekfac` except damping and fisher, recipe and share (see `Followed`), and

    segments  number of segments with equal numbers of steps
    time  multiplies every t_l, since that one number makes t_l too small where gradients are
          small and Adam moves faster. 1 is the paper's value
    """

    name = "source"
    version = 2
    family = "trajectory"
    source = "Bae et al. 2024, arXiv 2405.12186"
    summary = "unrolled differentiation in segments, with EK-FAC curvature"
    grid = {"share": (1.0, None)}  # not `time`, which is not in the paper: fitting it is a variant
    index_type = SourceIndex

    segments: int = 3
    time: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_followed()
        if self.segments < 1:
            raise UsageError(f"{self.name}: segments must be at least 1, not {self.segments}")
        if not self.time > 0:
            raise UsageError(f"{self.name}: time must be positive, not {self.time}")

    # ------------------------------------------------------------------ training

    def build(self, context: Context, train: Sequence[Example]) -> SourceIndex:
        from tdabench_influence.training import Run, batch_orders

        recipe, share = self.recipe_of(context), self.share_of(context)
        orders = batch_orders(context, train, recipe, share, self.follow)
        model = context.target.fresh_model(self.checkpoint).to(context.device)  # type: ignore[arg-type]
        tokens = context.target.tokenize(train)
        run = Run(context, model, tokens, orders, recipe, share)
        ends = np.linspace(0, len(run), self.segments + 1).round().astype(int)
        middles = (ends[:-1] + ends[1:]) // 2
        state: State = {}
        at = run.start
        for k, after in enumerate(run.forwards(run.start, 0, len(run))):
            for i in np.flatnonzero(middles == k).tolist():
                state[f"{i}.theta"] = at.theta.cpu().numpy()
                state[f"{i}.t"] = self._times(run, at, after, k, ends[i], ends[i + 1])
            at = after
        state["end.theta"] = at.theta.cpu().numpy()
        for i in range(self.segments):
            if f"{i}.theta" not in state:  # more segments than steps: this one is empty
                state[f"{i}.theta"] = state["end.theta"]
                state[f"{i}.t"] = np.zeros(len(self.engine(context).layers))
            engine = self.engine_at(context, state[f"{i}.theta"])
            found = _GaussNewton(layers=self.layers, bias=self.bias).fit(context, engine, train)
            state |= {f"{i}.{k}": v for k, v in found.items()}
        return SourceIndex(self, context, list(train), state)

    def _times(
        self, run: Run, before: Any, after: Any, k: int, first: int, last: int
    ) -> np.ndarray:
        """Computes t of each layer in a segment of the steps first … last - 1, which include k."""
        import torch

        r = run.recipe
        rates = sum(r.lr_at(step, len(run)) for step in range(first, last))
        second = after.v / (1 - r.beta2 ** (k + 1))
        # v comes from clipped gradients and H from unclipped ones: undo the clipping.
        _, factor, _ = run.clipped(run.gradient(before.theta, k))
        parts = run.by_name(second)
        times = []
        for layer in self.engine(run.context).layers:
            names = [f"{layer.name}.weight"] + [f"{layer.name}.bias"] * layer.bias
            v = torch.cat([parts[name].flatten() for name in names])
            mean = float(v.mean())
            # The p for which p m is nearest to m / (sqrt(v) + eps), where m^2 is about v.
            p = float((v / (v.sqrt() + r.eps)).mean()) / mean if mean > 0 else 0.0
            times.append(self.time * rates * p * factor)
        return np.array(times)

    def engine_at(self, context: Context, theta: np.ndarray) -> GradientEngine:
        """Returns the engine at the weights `theta` [dim] of the run."""
        import torch

        from tdabench.api import GradientEngine

        model = context.target.fresh_model(self.checkpoint).to(context.device)  # type: ignore[arg-type]
        flat = torch.from_numpy(theta).to(context.device)
        with torch.no_grad():
            for p, part in zip(
                model.parameters(), flat.split([p.numel() for p in model.parameters()])
            ):
                p.copy_(part.view(p.shape))
        return GradientEngine(model, layers=self.layers, bias=self.bias)

    def fit(self, context: Context, engine: GradientEngine, train: Sequence[Example]) -> State:
        raise UsageError(f"{self.name} has one curvature per segment", "Call build instead")

    def precondition(self, index: StreamingIndex, gradients: Gradients) -> Gradients:
        raise UsageError(f"{self.name} has one curvature per segment", "Call score instead")


def responses(values: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns F = (1 - exp(-t v)) / v and S = exp(-t v) of eigenvalues v; F is t where v is 0."""
    import torch

    small = t * values < 1e-12
    f = -torch.expm1(-t * values) / torch.where(small, 1.0, values)
    return torch.where(small, t, f), torch.exp(-t * values)


class _GaussNewton(EKFAC):
    """EK-FAC of the Gauss-Newton matrix of the mean loss, at its correct scale.

    Drawn labels are independent, so the square of a mean over T tokens is 1/T of the mean of
    squares over tokens, which is the Gauss-Newton matrix. Relative damping hides this factor;
    t H does not.
    """

    def drawn_losses(self, model: Any, batch: Batch, uniform: np.ndarray) -> torch.Tensor:
        return _drawn_losses(model, batch, uniform) * batch.loss_mask.sum(1).sqrt()
