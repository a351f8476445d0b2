"""SOURCE: differentiation through training, with one curvature per segment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.api import Context, Example, UsageError
from tdabench_influence.ekfac import EKFAC, _drawn_losses
from tdabench_influence.recipe import Followed
from tdabench_influence.streaming import Gradients, State, StreamingIndex, StreamingMethod

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch, GradientEngine, Layer
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
            # D^1/2: scales gradients where the weights move by D times the gradient.
            root = self._root(i, layer)
            g = q_s.T @ (gradients[layer.name] * root) @ q_a  # [query, d_out, d_in], eigenbasis
            f, s = responses(values.double(), float(t))
            pushed[layer.name] = (q_s @ (g * f.to(g)) @ q_a.T) * root
            carried[layer.name] = (q_s @ (g * s.to(g)) @ q_a.T) / root
        return pushed, carried

    def _root(self, i: int, layer: Layer) -> torch.Tensor | float:
        """Returns D^1/2 [d_out, d_in] of a layer in segment i; 1 if one number stands for D."""
        import torch

        if f"{i}.out.{layer.name}" not in self.state:
            return 1.0
        sides = (self.state[f"{i}.{side}.{layer.name}"] for side in ("out", "in"))
        return torch.outer(*(torch.from_numpy(s).to(self.context.device) for s in sides))


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
                state |= {
                    f"{i}.{key}": part
                    for key, part in self.pace(run, at, after, k, ends[i], ends[i + 1]).items()
                }
            at = after
        state["end.theta"] = at.theta.cpu().numpy()
        for i in range(self.segments):
            if f"{i}.theta" not in state:  # more segments than steps: this one is empty
                state[f"{i}.theta"] = state["end.theta"]
                state[f"{i}.t"] = np.zeros(len(self.engine(context).layers))
            engine = self.engine_at(context, state[f"{i}.theta"])
            scales = {
                layer.name: (state[f"{i}.out.{layer.name}"], state[f"{i}.in.{layer.name}"])
                for layer in engine.layers
                if f"{i}.out.{layer.name}" in state
            }
            curvature = _GaussNewton(layers=self.layers, bias=self.bias, scales=scales)
            found = curvature.fit(context, engine, train)
            state |= {f"{i}.{k}": v for k, v in found.items()}
        return SourceIndex(self, context, list(train), state)

    def pace(
        self, run: Run, before: Any, after: Any, k: int, first: int, last: int
    ) -> dict[str, np.ndarray]:
        """Computes how fast weights move in a segment of the steps first … last - 1, k among them.

        Returns "t" [layer], the training time of each layer.
        """
        r = run.recipe
        times = []
        time = self._time(run, before, k, first, last)
        for _, v in self._second_moments(run, after, k):
            mean = float(v.mean())
            # The p for which p m is nearest to m / (sqrt(v) + eps), where m^2 is about v.
            p = float((v / (v.sqrt() + r.eps)).mean()) / mean if mean > 0 else 0.0
            times.append(time * p)
        return {"t": np.array(times)}

    def _time(self, run: Run, before: Any, k: int, first: int, last: int) -> float:
        """Computes the sum of learning rates of a segment, times `time` and step k's clipping.

        v comes from clipped gradients and H from unclipped ones: the factor undoes the clipping.
        """
        rates = sum(run.recipe.lr_at(step, len(run)) for step in range(first, last))
        _, factor, _ = run.clipped(run.gradient(before.theta, k))
        return self.time * rates * factor

    def _second_moments(self, run: Run, after: Any, k: int) -> Iterator[tuple[Layer, torch.Tensor]]:
        """Yields each layer and Adam's bias-corrected v of its weights after step k: [out, in]."""
        import torch

        parts = run.by_name(after.v / (1 - run.recipe.beta2 ** (k + 1)))
        for layer in self.engine(run.context).layers:
            v = parts[f"{layer.name}.weight"]
            v = v.T if layer.conv1d else v
            if layer.bias:
                v = torch.cat([v, parts[f"{layer.name}.bias"][:, None]], dim=1)
            yield layer, v

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


@dataclass(frozen=True, kw_only=True)
class AdamSOURCE(SOURCE):
    """SOURCE in the geometry of AdamW: every weight moves at its own speed.

    AdamW moves weight j by lr D_j times its (averaged) gradient, D_j = 1 / (sqrt(v_j) + eps). With
    D and H fixed in a segment,

        d(theta)' = -lr D (H d(theta) + g_z / n),
        S_l = D^1/2 exp(-t_l H~) D^-1/2,    F_l = D^1/2 (1 - exp(-t_l H~)) / H~ D^1/2,

    where H~ = D^1/2 H D^1/2 and t_l is the sum of the learning rates. H~ is the EK-FAC curvature of
    gradients scaled by D^1/2. A Kronecker factorisation of it needs a D^1/2 of rank one in each
    layer: outer(out, in), the best fit to log D^1/2 over the layer's weights (exact where eps
    outweighs gradients). `source` has one number per layer in its place.

    Parameters: those of `source`. `time` remains at 1.
    """

    name = "source-adam"
    version = 1
    source = "tdabench; SOURCE is arXiv 2405.12186, the mismatch with AdamW arXiv 2605.18814"
    summary = "SOURCE with AdamW's speed of each weight in place of one number per layer"

    def pace(
        self, run: Run, before: Any, after: Any, k: int, first: int, last: int
    ) -> dict[str, np.ndarray]:
        found = {}
        for layer, v in self._second_moments(run, after, k):
            logs = -(v.sqrt() + run.recipe.eps).clamp_min(1e-30).log().double() / 2  # of D^1/2
            rows, columns = logs.mean(1), logs.mean(0) - logs.mean()
            found[f"out.{layer.name}"] = rows.exp().float().cpu().numpy()
            found[f"in.{layer.name}"] = columns.exp().float().cpu().numpy()
        time = self._time(run, before, k, first, last)
        return {"t": np.full(len(found) // 2, time), **found}


def responses(values: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns F = (1 - exp(-t v)) / v and S = exp(-t v) of eigenvalues v; F is t where v is 0."""
    import torch

    small = t * values < 1e-12
    f = -torch.expm1(-t * values) / torch.where(small, 1.0, values)
    return torch.where(small, t, f), torch.exp(-t * values)


@dataclass(frozen=True, kw_only=True)
class _GaussNewton(EKFAC):
    """EK-FAC of the Gauss-Newton matrix of the mean loss, at its correct scale.

    Drawn labels are independent, so the square of a mean over T tokens is 1/T of the mean of
    squares over tokens, which is the Gauss-Newton matrix. Relative damping hides this factor;
    t H does not. `scales` are the `sides` of layers by name.
    """

    scales: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def sides(self, layer: Layer) -> tuple[np.ndarray, np.ndarray] | None:
        return self.scales.get(layer.name)

    def drawn_losses(self, model: Any, batch: Batch, uniform: np.ndarray) -> torch.Tensor:
        return _drawn_losses(model, batch, uniform) * batch.loss_mask.sum(1).sqrt()
