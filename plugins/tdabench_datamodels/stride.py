"""STRIDE: steering operators that simulate training on subsets, and sparse recovery from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.api import (
    Context,
    Example,
    Index,
    MethodError,
    TDAMethod,
    Tokens,
    UsageError,
    check_pooling,
    last_states,
    pad,
    read_arrays,
    response_logits,
    write_arrays,
)

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch

_CACHE = 1 << 30  # bytes of frozen states and logits that a build holds
_LOGITS = 1 << 26  # steered logits (numbers) that are held at once when queries are measured


@dataclass(frozen=True, kw_only=True)
class STRIDE(TDAMethod):
    """w_q = argmin_w |y_q - M w|^2 / 2 + lambda |w|_1, y_qk = loss_q - loss_q(steered by k).

    M [subset, example] says which examples each of K random subsets holds (every example is in
    `per_example` of them), and operator k imitates training on subset k: it adds B(h_t) a_k to
    the logits of the frozen model, where h_t is the state of a layer, B a linear map to `rank`
    dimensions that all operators share, and a_k [rank, vocabulary] (arXiv 2606.05165). B and all
    a_k are learned together by Adam on

        fidelity    mean loss of the steered model on examples of the subset
        stability   mean KL divergence of the frozen from the steered model on other examples
        linearity   for a reference example, the squared residual of its measurements y [K] after a
                    ridge regression on M R, R a Gaussian sketch

    The model is never trained, so no retraining is counted; queries take forward passes only. The
    weights of the three losses and the optimiser's settings are not in the description that this
    follows; those here are ours.

    subsets      K
    per_example  number of subsets that hold an example
    rank         dimensions of B
    depth        depth of the layer as a share of all layers; 1 is the state that the head reads
    epochs       passes over the members of all subsets
    batch        examples per subset and step
    at_once      subsets per step
    lr           Adam's step size
    stability    weight of the stability loss
    linearity    weight of the linearity loss
    penalty      lambda as a share of the smallest lambda at which all weights of a query are 0
    checkpoint   checkpoint of the frozen model

    pooling      how example scores become a group's: sum, mean, softmax or softmax-abs
    temperature  of softmax pooling; unused by sum and mean
    """

    name = "stride"
    family = "learned"
    source = "Dagli et al. 2026 (STRIDE), arXiv 2606.05165"
    summary = "sparse recovery from operators that imitate training on subsets"
    grid = {"penalty": (0.003, 0.03), "stability": (0.0, 0.1, 1.0)}
    query_time = ("penalty",)
    expected_failures = {
        "a-copy-outranks-others": "a copy is in its own random subsets, like every example"
    }
    check_settings = {"subsets": 20, "per_example": 3}

    pooling: str = "sum"
    temperature: float = 1.0
    subsets: int = 200
    per_example: int = 10
    rank: int = 16
    depth: float = 0.67
    epochs: int = 3
    batch: int = 16
    at_once: int = 8
    lr: float = 0.01
    stability: float = 0.1
    linearity: float = 0.1
    penalty: float = 0.01
    checkpoint: str = "base"

    def __post_init__(self) -> None:
        check_pooling(self.name, self.pooling, self.temperature)
        for key in ("subsets", "per_example", "rank", "epochs", "batch", "at_once"):
            if getattr(self, key) < 1:
                raise UsageError(f"{self.name}: {key} must be at least 1")
        if self.per_example > self.subsets:
            raise UsageError(f"{self.name}: per_example must be at most subsets ({self.subsets})")
        if not 0 < self.depth <= 1:
            raise UsageError(f"{self.name}: depth must be in (0, 1], not {self.depth}")
        if not self.lr > 0 or self.stability < 0 or self.linearity < 0:
            raise UsageError(f"{self.name}: lr > 0, stability and linearity >= 0")
        if not 0 < self.penalty <= 1:
            raise UsageError(f"{self.name}: penalty must be in (0, 1], not {self.penalty}")

    # ------------------------------------------------------------------ building

    def build(self, context: Context, train: Sequence[Example]) -> STRIDEIndex:
        member = self.membership(context, train)
        basis, steering = self.learn(context, train, member)
        if not (np.isfinite(basis).all() and np.isfinite(steering).all()):
            raise MethodError(f"{self.name}: the operators diverged", "Lower lr")
        arrays = {"member": member, "basis": basis, "steering": steering}
        return STRIDEIndex(self, context, arrays)

    def load(self, context: Context, path: Path) -> STRIDEIndex:
        arrays, meta = read_arrays(path / "operators.safetensors")
        self.check_saved(path, meta)
        return STRIDEIndex(self, context, dict(arrays))

    def prepare_cost(self, context: Context) -> Mapping[str, float] | None:
        return {"retrainings": 0.0}

    def membership(self, context: Context, train: Sequence[Example]) -> np.ndarray:
        """Draws `per_example` subsets for each example, by id: bool [subset, example]."""
        rng = context.rng("stride/subsets")
        member = np.zeros((self.subsets, len(train)), dtype=bool)
        for i in np.argsort([e.id for e in train], kind="stable"):
            member[rng.choice(self.subsets, self.per_example, replace=False), i] = True
        return member

    def learn(
        self, context: Context, train: Sequence[Example], member: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Trains B [width, rank] and a [subset, rank, vocabulary]: float32."""
        import torch

        frozen = _Frozen(self, context, train)
        k = self.subsets
        random = context.torch_generator("stride/basis")
        basis = torch.randn(frozen.width, self.rank, generator=random) / frozen.width**0.5
        basis = basis.to(context.device).requires_grad_(True)
        steering = torch.zeros(k, self.rank, frozen.vocabulary, device=context.device)
        steering.requires_grad_(True)
        if not len(train):
            return basis.detach().cpu().numpy(), steering.detach().cpu().numpy()
        by_id = np.argsort([e.id for e in train], kind="stable")
        inside = [by_id[row[by_id]] for row in member]  # members of each subset, by id
        outside = [by_id[~row[by_id]] for row in member]
        rng = context.rng("stride/batches")
        sketch = rng.standard_normal((len(train), min(64, max(1, k // 2))))
        sketched = np.zeros((k, sketch.shape[1]))
        sketched += member[:, by_id].astype(float) @ sketch / sketch.shape[1] ** 0.5
        optimiser = torch.optim.Adam([basis, steering], lr=self.lr)
        per_epoch = max(1, round(member.sum() / (self.batch * self.at_once)))
        order: list[int] = []
        for step in range(self.epochs * per_epoch):
            while len(order) < self.at_once:
                order += rng.permutation(k).tolist()
            chosen, order = order[: self.at_once], order[self.at_once :]
            loss = torch.zeros((), device=context.device)
            for s in chosen:
                if not len(inside[s]):
                    continue
                loss = loss + self._fidelity(frozen, basis, steering[s], inside[s], rng)
                if self.stability and len(outside[s]):
                    loss = loss + self.stability * self._stability(
                        frozen, basis, steering[s], outside[s], rng
                    )
            loss = loss / len(chosen)
            if self.linearity:
                some = rng.choice(k, min(k, 32), replace=False)
                example = by_id[rng.integers(len(by_id), size=1)]
                y = measured(frozen.of(example), basis, steering[some])[:, 0]
                loss = loss + self.linearity * residual(y, sketched[some])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            context.progress("operators", step + 1, self.epochs * per_epoch)
        return basis.detach().cpu().numpy(), steering.detach().cpu().numpy()

    def _fidelity(
        self, frozen: _Frozen, basis: Any, a: Any, inside: np.ndarray, rng: np.random.Generator
    ) -> torch.Tensor:
        import torch

        part = frozen.of(rng.choice(inside, min(self.batch, len(inside)), replace=False))
        logits = part.logits + part.states @ basis @ a
        losses = torch.nn.functional.cross_entropy(logits, part.batch.gold, reduction="none")
        return part.batch.means(losses).mean()

    def _stability(
        self, frozen: _Frozen, basis: Any, a: Any, outside: np.ndarray, rng: np.random.Generator
    ) -> torch.Tensor:
        part = frozen.of(rng.choice(outside, min(self.batch, len(outside)), replace=False))
        before = part.logits.log_softmax(1)
        after = (part.logits + part.states @ basis @ a).log_softmax(1)
        return part.batch.means((before.exp() * (before - after)).sum(1)).mean()


@dataclass(frozen=True)
class _Part:
    """Examples, with states [token, width] and logits [token, vocabulary] of response tokens."""

    batch: Batch
    states: torch.Tensor
    logits: torch.Tensor


class _Frozen:
    """States and logits of the frozen model at the response tokens of a corpus.

    They are computed once where they fit into `_CACHE`, and again for every batch otherwise.
    """

    def __init__(self, method: STRIDE, context: Context, examples: Sequence[Example]) -> None:
        target = context.target
        self.context, self.pad_id = context, target.pad_id
        self.model = target.model(method.checkpoint, context.device)
        self.vocabulary, self.width = map(int, self.model.get_output_embeddings().weight.shape)
        layers = int(self.model.config.num_hidden_layers)
        depth = max(1, round(method.depth * layers))
        self.layer = -1 if depth == layers else depth
        self.tokens: list[Tokens] = target.tokenize(examples)
        counts = np.array([len(t) - t.start for t in self.tokens], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None
        if 4 * int(self.starts[-1]) * (self.width + self.vocabulary) <= _CACHE:
            self.kept = self._all()

    def of(self, index: np.ndarray) -> _Part:
        """Returns the examples at `index`."""
        import torch

        batch = pad(self.tokens, index, self.pad_id).to(self.context.device)
        if self.kept is None:
            return self.read(batch)
        spans = [np.arange(self.starts[i], self.starts[i + 1]) for i in index]
        places = torch.from_numpy(np.concatenate(spans))
        return _Part(batch, *(x[places].to(self.context.device) for x in self.kept))

    def read(self, batch: Batch) -> _Part:
        """Runs the model on a batch."""
        import torch

        with torch.no_grad():
            states = last_states(self.model, batch.input_ids, batch.attention_mask, self.layer)
            states = states.flatten(0, 1)[batch.places].float()
            return _Part(batch, states, response_logits(self.model, batch).float())

    def _all(self) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        from tdabench.api import map_batches

        n = int(self.starts[-1])
        states, logits = torch.empty(n, self.width), torch.empty(n, self.vocabulary)
        for index, part in map_batches(self.context, self.tokens, self.read, what="frozen states"):
            spans = [np.arange(self.starts[i], self.starts[i + 1]) for i in index]
            places = torch.from_numpy(np.concatenate(spans))
            states[places], logits[places] = part.states.cpu(), part.logits.cpu()
        return states, logits


def measured(part: _Part, basis: torch.Tensor, steering: torch.Tensor) -> torch.Tensor:
    """Computes y = loss - steered loss of each example under each operator: [subset, example].

    `steering` is [subset, rank, vocabulary].
    """
    import torch

    at = torch.arange(len(part.logits), device=part.logits.device)
    gold = part.batch.gold
    steered = part.logits + (part.states @ basis) @ steering  # [subset, token, vocabulary]
    after = steered.logsumexp(2) - steered[:, at, gold]
    before = part.logits.logsumexp(1) - part.logits[at, gold]
    return part.batch.means(before - after)


def residual(y: torch.Tensor, sketched: np.ndarray, ridge: float = 1.0) -> torch.Tensor:
    """Returns |N (N^T N + ridge I)^-1 N^T y - y|^2 / K of y [K] and N = `sketched` [K, q]."""
    import torch

    inner = sketched.T @ sketched + ridge * np.eye(sketched.shape[1])
    away = sketched @ np.linalg.solve(inner, sketched.T) - np.eye(len(sketched))
    return (torch.from_numpy(away).to(y) @ y).square().mean()


class STRIDEIndex(Index):
    """`member` [subset, train], `basis` [width, rank] and `steering` [subset, rank, vocabulary]."""

    def __init__(self, method: STRIDE, context: Context, arrays: dict[str, np.ndarray]) -> None:
        self.method, self.context, self.arrays = method, context, arrays
        self.n_train = arrays["member"].shape[1]
        self.pooling, self.temperature = method.pooling, method.temperature

    def measurements(self, queries: Sequence[Example]) -> np.ndarray:
        """Returns the decrease of each query's loss under each operator: y [query, subset]."""
        import torch

        from tdabench.api import map_batches

        frozen = _Frozen(self.method, self.context, [])
        device = self.context.device
        basis, steering = (
            torch.from_numpy(self.arrays[k]).to(device) for k in ("basis", "steering")
        )
        out = np.empty((len(queries), len(steering)), dtype=np.float64)

        def compute(batch: Batch) -> torch.Tensor:
            part = frozen.read(batch)
            step = max(1, _LOGITS // max(1, part.logits.numel()))
            with torch.no_grad():
                parts = [
                    measured(part, basis, steering[a : a + step])
                    for a in range(0, len(steering), step)
                ]
            return torch.cat(parts).T

        tokens = self.context.target.tokenize(queries)
        for index, y in map_batches(self.context, tokens, compute, what="steered losses"):
            out[index] = y.double().cpu().numpy()
        return out

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        from tdabench_datamodels.regression import sparse

        if not len(queries) or not self.n_train:
            return np.zeros((len(queries), self.n_train), dtype=np.float32)
        y = self.measurements(queries).T  # [subset, query]
        x = self.arrays["member"].astype(np.float64)
        return sparse(x, y, self.method.penalty).astype(np.float32)

    def save(self, path: Path) -> None:
        meta = {"method": self.method.name, "version": self.method.version}
        write_arrays(path / "operators.safetensors", self.arrays, meta)
