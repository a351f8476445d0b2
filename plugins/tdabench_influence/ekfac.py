"""EK-FAC and K-FAC: Kronecker-factored curvature of each linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tdabench.api import Context, Example, MethodError, UsageError
from tdabench_influence.streaming import Gradients, State, StreamingIndex, StreamingMethod

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch, GradientEngine, Layer

Moments = tuple["torch.Tensor", ...]


@dataclass(frozen=True, kw_only=True)
class KFAC(StreamingMethod):
    """score(q, z) = g_q^T (F + lambda I)^-1 g_z, F block-diagonal over layers (arXiv 1503.05671).

    With A the second moment of a layer's inputs and S the second moment of its output gradients,
    over tokens, F is T S (x) A, where T is the mean number of tokens per example. This is exact if
    tokens are independent. Per layer

        H^-1 G = Q_S [(Q_S^T G Q_A) / (Lambda + lambda)] Q_A^T,    Lambda = T s a^T,

    with eigenvectors Q and eigenvalues s, a, and lambda = damping * mean(Lambda).

    fisher   "true": gradients of labels drawn from the model; "empirical": of the training labels
    damping  lambda as a multiple of the layer's mean eigenvalue
    """

    name = "kfac"
    source = "Martens & Grosse 2015, arXiv 1503.05671"
    summary = "influence with Kronecker-factored curvature"
    grid = {"damping": (1e-4, 0.001, 0.01, 0.1), "checkpoint": ("base", "warm")}
    query_time = ("damping",)

    fisher: Literal["true", "empirical"] = "true"
    damping: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fisher not in ("true", "empirical"):
            raise UsageError(
                f"{self.name}: unknown fisher {self.fisher!r}", "One of: true, empirical"
            )
        if self.damping < 0:
            raise UsageError(f"{self.name}: damping must not be negative, but is {self.damping}")

    # ------------------------------------------------------------------ curvature

    def fit(self, context: Context, engine: GradientEngine, train: Sequence[Example]) -> State:
        import torch

        from tdabench.api import second_moment

        tokens = context.target.tokenize(train)
        per_example = sum(len(t) for t in tokens) / max(1, len(tokens))

        def moment(_: Layer, x: torch.Tensor, delta: torch.Tensor, batch: Batch) -> Moments:
            return second_moment(x, batch), second_moment(delta, batch)

        moments = self._pass(context, engine, train, moment, "factors")
        state: State = {}
        for layer in engine.layers:
            a, s = (m / (max(1, len(tokens)) * per_example) for m in moments[layer.name])
            if sides := self.sides(layer):
                out, into = (torch.from_numpy(side).to(a) for side in sides)
                a, s = a * torch.outer(into, into), s * torch.outer(out, out)
            a_values, q_a = torch.linalg.eigh(a)
            s_values, q_s = torch.linalg.eigh(s)
            values = per_example * torch.outer(s_values.clamp_min(0), a_values.clamp_min(0))
            for key, part in (("q_a", q_a), ("q_s", q_s), ("lambda", values)):
                state[f"{key}.{layer.name}"] = part.float().cpu().numpy()
        return state

    def _pass(
        self,
        context: Context,
        engine: GradientEngine,
        train: Sequence[Example],
        moment: Callable[[Layer, torch.Tensor, torch.Tensor, Batch], Moments],
        what: str,
    ) -> dict[str, Moments]:
        """Runs `layer_sums` with the gradients of the Fisher."""
        from tdabench.api import layer_sums

        tokens = context.target.tokenize(train)
        # One uniform number per response token, drawn by example id: the label drawn for a
        # token then does not depend on batch, padding or position in the corpus.
        uniform = [
            context.rng(f"fisher/{e.id}").random(len(t) - t.start) for e, t in zip(train, tokens)
        ]

        def drawn(model: Any, batch: Batch) -> torch.Tensor:
            u = np.concatenate([uniform[i] for i in batch.index])
            return self.drawn_losses(model, batch, u)

        loss = drawn if self.fisher == "true" else None
        sums = layer_sums(context, engine, tokens, moment, loss=loss, what=what)
        bad = [name for name, parts in sums.items() if not all(p.isfinite().all() for p in parts)]
        if bad:
            raise MethodError(
                f"{self.name}: the curvature of {bad[0]} is not finite",
                "The loss of an example overflows under this checkpoint",
            )
        return sums

    def sides(self, layer: Layer) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns factors (out [d_out], in [d_in]) of the gradients whose curvature is computed.

        G is replaced by G * outer(out, in), elementwise. None leaves it as it is.
        """
        return None

    def drawn_losses(self, model: Any, batch: Batch, uniform: np.ndarray) -> torch.Tensor:
        """Computes the mean response loss of drawn labels, [b], whose gradients make the Fisher."""
        return _drawn_losses(model, batch, uniform)

    def query_engine(self, index: StreamingIndex) -> GradientEngine:
        """Returns an engine of gradients in the eigenbasis, Q_S^T G Q_A.

        It rotates the tokens' inputs and output gradients, which are fewer than weights.
        """
        from tdabench.api import GradientEngine

        bases = {
            layer.name: (index.state[f"q_a.{layer.name}"], index.state[f"q_s.{layer.name}"])
            for layer in index.engine.layers
        }
        model = index.engine.model
        return GradientEngine(model, layers=self.layers, bias=self.bias, projection=bases)

    def precondition(self, index: StreamingIndex, gradients: Gradients) -> Gradients:
        """Computes Q_S [(Q_S^T G Q_A) / (Lambda + lambda)] Q_A^T of gradients in the eigenbasis."""
        import torch

        from tdabench.api import fast_products

        for layer in index.engine.layers:
            parts = (index.state[f"{k}.{layer.name}"] for k in ("q_a", "q_s", "lambda"))
            g = gradients[layer.name]  # [query, d_out, d_in]
            q_a, q_s, values = (torch.from_numpy(p).to(g.device) for p in parts)
            mean = float(values.double().mean())
            if mean == 0:  # the layer has no gradients to scale and no scores
                continue
            damped = values + self.damping * mean
            if float(damped.min()) <= 1e-7 * mean and self.damping < 1e-7:
                raise MethodError(
                    f"{self.name}: the curvature of {layer.name} is singular",
                    "Set damping above 0",
                )
            inverse = 1 / damped
            if g.is_cuda:
                gradients[layer.name] = q_s @ (g * inverse) @ q_a.T
                continue
            with fast_products():
                for one in g:  # query by query, in the cache
                    torch.mm(q_s, (one * inverse) @ q_a.T, out=one)
        return gradients


@dataclass(frozen=True, kw_only=True)
class EKFAC(KFAC):
    """Like K-FAC, with Lambda the mean square of per-example gradients in the eigenbasis.

    Lambda = mean_i (Q_S^T G_i Q_A)^2, the best diagonal in that basis (arXiv 1806.03884; for
    language models arXiv 2308.03296). Parameters as for `kfac`.
    """

    name = "ekfac"
    source = "Grosse et al. 2023, arXiv 2308.03296; George et al. 2018, arXiv 1806.03884"
    summary = "influence with eigenvalue-corrected Kronecker-factored curvature"

    def fit(self, context: Context, engine: GradientEngine, train: Sequence[Example]) -> State:
        return self.corrected(context, engine, train, super().fit(context, engine, train))

    def corrected(
        self, context: Context, engine: GradientEngine, train: Sequence[Example], state: State
    ) -> State:
        """Returns `state` with Lambda as the mean square of gradients in its eigenbases."""
        import torch

        from tdabench.api import Workspace, example_blocks

        workspace = Workspace()
        bases = {
            key: torch.from_numpy(part).to(context.device, copy=True)
            for key, part in state.items()
            if key.startswith("q_")
        }
        for layer in engine.layers:
            if sides := self.sides(layer):
                for key, side in zip(("q_s", "q_a"), sides):
                    bases[f"{key}.{layer.name}"] *= torch.from_numpy(side).to(context.device)[
                        :, None
                    ]

        def squares(layer: Layer, x: torch.Tensor, delta: torch.Tensor, _: Batch) -> Moments:
            # Into the eigenbasis, in the precision of the eigenvectors.
            x = x.float() @ bases[f"q_a.{layer.name}"]
            delta = delta.float() @ bases[f"q_s.{layer.name}"]
            total = x.new_zeros(layer.d_out, layer.d_in)
            for _part, g in example_blocks(layer, x, delta, workspace):  # [., d_out, d_in]
                total += g.square_().sum(0)
            return (total,)

        sums = self._pass(context, engine, train, squares, "eigenvalues")
        for layer in engine.layers:
            (total,) = sums.get(layer.name, (torch.zeros(layer.d_out, layer.d_in),))
            values = total / max(1, len(train))
            state[f"lambda.{layer.name}"] = values.float().cpu().numpy()
        return state


@dataclass(frozen=True, kw_only=True)
class EShampoo(EKFAC):
    """EK-FAC's correction in the eigenbasis of Shampoo (arXiv 1802.09568).

    The eigenvectors are those of L = mean_i G_i G_i^T [out, out] and R = mean_i G_i^T G_i [in, in],
    second moments of whole example gradients, where K-FAC takes second moments of their two factors
    by token. Lambda = mean_i (Q_L^T G_i Q_R)^2, as for `ekfac`; this is the basis of SOAP (arXiv
    2409.11321). Parameters as for `kfac`.
    """

    name = "eshampoo"
    source = "Gupta et al. 2018, arXiv 1802.09568; George et al. 2018, arXiv 1806.03884"
    summary = "influence with an eigenvalue correction in Shampoo's basis"

    def fit(self, context: Context, engine: GradientEngine, train: Sequence[Example]) -> State:
        import torch

        from tdabench.api import Workspace, example_blocks

        workspace = Workspace()

        def sides(layer: Layer, x: torch.Tensor, delta: torch.Tensor, _: Batch) -> Moments:
            left, right = (x.new_zeros(d, d, dtype=torch.float32)
                           for d in (layer.d_out, layer.d_in))  # fmt: skip
            for _part, g in example_blocks(layer, x.float(), delta.float(), workspace):
                rows = g.reshape(-1, layer.d_in)  # [. * d_out, d_in]
                right += rows.T @ rows
                columns = g.transpose(1, 2).reshape(-1, layer.d_out)
                left += columns.T @ columns
            return left, right

        sums = self._pass(context, engine, train, sides, "sides")
        state: State = {}
        for layer in engine.layers:
            for key, moment in zip(("q_s", "q_a"), sums[layer.name]):
                _, vectors = torch.linalg.eigh(moment / max(1, len(train)))
                state[f"{key}.{layer.name}"] = vectors.float().cpu().numpy()
        return self.corrected(context, engine, train, state)


def _drawn_losses(model: Any, batch: Batch, uniform: np.ndarray) -> torch.Tensor:
    """Computes the mean loss [b] of labels drawn from the model with uniform numbers [tokens]."""
    import torch

    from tdabench.api import response_logits

    logits = response_logits(model, batch).float()  # [tokens, vocabulary]
    with torch.no_grad():
        below = torch.softmax(logits, dim=1).cumsum(1)
        u = torch.from_numpy(uniform).to(below).unsqueeze(1) * below[:, -1:]
        labels = torch.searchsorted(below, u).squeeze(1).clamp_max(logits.shape[1] - 1)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return batch.means(losses)
