"""Methods that keep a curvature and the training corpus, and stream over whole gradients.

Whole gradients of a corpus do not fit on a disk, so they are not stored. The gradients of a block
of queries are preconditioned, and one pass over the training corpus computes their inner products
with each example's gradient, layer by layer.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tdabench.api import (
    Behaviour,
    Context,
    Example,
    Index,
    MethodError,
    TDAMethod,
    check_pooling,
    query_word_scores,
    read_arrays,
    read_jsonl,
    word_scores,
    write_arrays,
    write_jsonl,
)

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch, GradientEngine, Layer

WARM_UP_EXAMPLES = 32

State = dict[str, np.ndarray]
Gradients = dict[str, "torch.Tensor"]  # layer name -> [query, d_out, d_in]


class StreamingIndex(Index):
    """The training corpus, the curvature, and passes over the corpus."""

    # Whole gradients of a block of queries; each further block takes another pass over the corpus.
    query_bytes = 3 << 30

    def __init__(
        self, method: StreamingMethod, context: Context, train: list[Example], state: State
    ) -> None:
        self.method, self.context, self.train, self.state = method, context, train, state
        self.n_train = len(train)
        self.pooling, self.temperature = method.pooling, method.temperature
        self.engine = method.engine(context)
        self.tokens = context.target.tokenize(train)

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        out = np.empty((len(queries), self.n_train), dtype=np.float32)
        for at, part in self.blocks(queries, self.method.copies):
            gradients = self.preconditioned(part)
            for index, block in self.products(gradients):
                out[np.ix_(at, index)] = block
        return self.finite(out)

    def blocks(
        self, queries: Sequence[Example], copies: int = 1
    ) -> Iterator[tuple[np.ndarray, list[Example]]]:
        """Yields (positions, queries) of each block of which whole gradients are held at once.

        The longest come first, as in batches, so that a batch's gradients lie side by side.
        """
        lengths = np.array([len(t) for t in self.context.target.tokenize(queries)])
        order, step = np.argsort(-lengths, kind="stable"), self.block(copies)
        for a in range(0, len(order), step):
            at = order[a : a + step]
            yield at, [queries[i] for i in at]

    def warm_up(self, queries: Sequence[Example]) -> None:
        """Scores a few examples from all over the corpus: a score of all is a pass over it."""
        part, few = copy.copy(self), self.few()
        part.train, part.tokens = [self.train[i] for i in few], [self.tokens[i] for i in few]
        part.n_train = len(few)
        part.score(queries)

    def few(self) -> np.ndarray:
        """Returns the places of the examples that warm the index up, spread over the corpus."""
        n = min(WARM_UP_EXAMPLES, self.n_train)
        return np.linspace(0, self.n_train - 1, n).astype(np.int64)

    def score_some(self, queries: Sequence[Example], candidates: np.ndarray) -> np.ndarray:
        """Computes gradients of candidates only, each once per block of queries: [query, k]."""
        if type(self).score is not StreamingIndex.score or candidates.size == 0:
            return super().score_some(queries, candidates)  # its scores are other products
        out = np.empty(candidates.shape, dtype=np.float32)
        for at, part in self.blocks(queries, self.method.copies):
            out[at] = self.pairs(self.preconditioned(part), candidates[at])
        return self.finite(out)

    def score_words(
        self, behaviour: Behaviour, examples: Sequence[Example]
    ) -> list[np.ndarray] | None:
        """Computes gradients of each example without each of its words: [word] each."""
        if type(self).score is not StreamingIndex.score:
            return None  # its scores depend on the rest of the corpus

        def score(variants: list[Example]) -> np.ndarray:
            other = type(self)(self.method, self.context, variants, self.state)
            return other.score_behaviours([behaviour])[0]

        return word_scores(examples, score)

    def score_query_words(self, behaviour: Behaviour, indices: Sequence[int]) -> np.ndarray | None:
        """Computes gradients of the query without each of its words: [word]."""
        if type(self).score is not StreamingIndex.score:
            return None
        return query_word_scores(self, behaviour, indices)

    def pairs(self, gradients: Gradients, candidates: np.ndarray) -> np.ndarray:
        """Computes inner products of each query with its own candidates: float32 [query, k].

        All queries are multiplied with every candidate of any of them: one product costs less than
        picking the queries of each example.
        """
        union, at = np.unique(candidates, return_inverse=True)
        found = np.empty((len(candidates), len(union)), dtype=np.float32)
        for index, block in self.products(gradients, union):
            found[:, index] = block
        return np.take_along_axis(found, at.reshape(candidates.shape), axis=1)

    def block(self, copies: int = 1) -> int:
        """Returns how many examples' whole gradients to hold at once, with `copies` of each."""
        return max(1, self.query_bytes // (4 * self.engine.dim * copies))

    def finite(self, scores: np.ndarray) -> np.ndarray:
        if not np.isfinite(scores).all():
            raise MethodError(f"{self.method.name} returned NaN or infinite scores")
        return scores

    def preconditioned(self, queries: Sequence[Example]) -> Gradients:
        """Computes H^-1 g of each query: {layer: [query, d_out, d_in]}."""
        gradients = self.gradients(queries, self.method.query_engine(self))
        return self.method.precondition(self, gradients)

    def gradients(
        self, queries: Sequence[Example], engine: GradientEngine | None = None
    ) -> Gradients:
        """Computes whole gradients of `queries`: {layer: [query, rows, cols]} of the engine."""
        import torch

        from tdabench.api import Workspace, map_batches, per_example

        engine, device = engine or self.engine, self.context.device
        out = {
            layer.name: torch.empty(len(queries), layer.rows, layer.cols, device=device)
            for layer in engine.layers
        }
        workspace = Workspace()

        def compute(batch: Batch) -> None:
            seen: set[str] = set()
            first, b = int(batch.index[0]), len(batch.index)
            side_by_side = bool((batch.index == np.arange(first, first + b)).all())
            index = torch.from_numpy(batch.index).to(device)

            def visit(layer: Layer, x: torch.Tensor, delta: torch.Tensor) -> None:
                whole = out[layer.name]
                if layer.name in seen:  # the gradients of a module used twice add up
                    whole.index_add_(0, index, per_example(layer, x, delta, workspace))
                elif side_by_side:
                    per_example(layer, x, delta, whole[first : first + b])
                else:
                    whole.index_copy_(0, index, per_example(layer, x, delta, workspace))
                seen.add(layer.name)

            engine.backward(batch, visit)

        tokens = self.context.target.tokenize(queries)
        for _ in map_batches(self.context, tokens, compute, what="query gradients"):
            pass
        return out

    def products(
        self, gradients: Gradients, examples: Sequence[int] | np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (positions [b], inner products [query, b]) in one pass over training examples.

        Positions are among `examples`, which are places in the corpus, or in the whole corpus.
        """
        import torch

        from tdabench.api import Workspace, map_batches, per_example

        workspace = Workspace()
        flat = {name: g.flatten(1) for name, g in gradients.items()}  # [query, d_out * d_in]
        n = len(next(iter(flat.values())))

        def compute(batch: Batch) -> torch.Tensor:
            # A CPU is faster with the smaller factor first.
            total = torch.zeros(len(batch.input_ids), n, device=batch.input_ids.device)

            def visit(layer: Layer, x: torch.Tensor, delta: torch.Tensor) -> None:
                g = per_example(layer, x, delta, workspace).flatten(1)  # [b, d]
                total.addmm_(g, flat[layer.name].T)

            self.engine.backward(batch, visit)
            return total

        tokens = self.tokens if examples is None else [self.tokens[i] for i in examples]
        for index, total in map_batches(self.context, tokens, compute, what="scores"):
            yield index, total.T.cpu().numpy()

    def save(self, path: Path) -> None:
        meta: dict[str, Any] = {"method": self.method.name, "version": self.method.version}
        write_arrays(path / "state.safetensors", self.state, meta | {"n_train": self.n_train})
        write_jsonl(path / "train.jsonl", self.train)


@dataclass(frozen=True, kw_only=True)
class StreamingMethod(TDAMethod):
    """score(q, z) = g_q^T H^-1 g_z with whole gradients g of the linear layers.

    checkpoint  checkpoint of the target at which gradients and curvature are computed
    layers      regular expression searched in layer names; None is all but the output head
    bias        include the gradients of biases
    pooling      how example scores become a group's: sum, mean, softmax or softmax-abs
    temperature  of softmax pooling; unused by sum and mean
    """

    family = "influence"
    copies: ClassVar[int] = 1  # query-sized vectors held while preconditioning
    index_type: ClassVar[type[StreamingIndex]] = StreamingIndex
    grid = {"checkpoint": ("base", "warm")}

    pooling: str = "sum"
    temperature: float = 1.0
    checkpoint: str = "base"
    layers: str | None = None
    bias: bool = True

    def __post_init__(self) -> None:
        check_pooling(self.name, self.pooling, self.temperature)

    @abstractmethod
    def fit(self, context: Context, engine: GradientEngine, train: Sequence[Example]) -> State:
        """Computes the curvature of the training corpus."""

    def query_engine(self, index: StreamingIndex) -> GradientEngine:
        """Returns the engine of the gradients that `precondition` receives."""
        return index.engine

    @abstractmethod
    def precondition(self, index: StreamingIndex, gradients: Gradients) -> Gradients:
        """Computes H^-1 g of each query, [query, d_out, d_in]; may overwrite `gradients`."""

    # ------------------------------------------------------------------ the rest

    def engine(self, context: Context) -> GradientEngine:
        from tdabench.api import GradientEngine

        model = context.target.model(self.checkpoint, context.device)
        return GradientEngine(model, layers=self.layers, bias=self.bias)

    def build(self, context: Context, train: Sequence[Example]) -> StreamingIndex:
        state = self.fit(context, self.engine(context), train)
        return self.index_type(self, context, list(train), state)

    def load(self, context: Context, path: Path) -> StreamingIndex:
        state, meta = read_arrays(path / "state.safetensors")
        self.check_saved(path, meta)
        train = list(read_jsonl(path / "train.jsonl")) if meta["n_train"] else []
        return self.index_type(self, context, train, state)


def squared_norms(
    context: Context, engine: GradientEngine, examples: Sequence[Example]
) -> np.ndarray:
    """Computes |g|^2 of each example in each layer: float64 [n, layer]."""
    import torch

    from tdabench.api import Workspace, map_batches, per_example

    workspace = Workspace()
    place = {layer.name: i for i, layer in enumerate(engine.layers)}

    def compute(batch: Batch) -> torch.Tensor:
        out = torch.zeros(len(batch.input_ids), len(place), device=batch.input_ids.device)

        def visit(layer: Layer, x: torch.Tensor, delta: torch.Tensor) -> None:
            g = per_example(layer, x, delta, workspace)
            out[:, place[layer.name]] = g.square_().sum((1, 2))

        engine.backward(batch, visit)
        return out

    norms = np.zeros((len(examples), len(place)))
    tokens = context.target.tokenize(examples)
    for index, block in map_batches(context, tokens, compute, what="gradient norms"):
        norms[index] = block.cpu().numpy()
    return norms
