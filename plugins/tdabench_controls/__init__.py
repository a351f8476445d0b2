"""Controls: baselines that a method must beat before its score means anything.

`random`, `length` and `gradnorm` ignore the query; `sametask` is an oracle that reads the labels.
Each is scored, pooled and timed like any other method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from tdabench.api import (
    Context,
    Example,
    Index,
    MethodError,
    RepresentationMethod,
    Role,
    TDAMethod,
    UsageError,
    hookimpl,
    named_seed,
    read_arrays,
    write_arrays,
)

if TYPE_CHECKING:
    import scipy.sparse as sp
    from torch import Tensor

    from tdabench.api import Batch


@dataclass(frozen=True, kw_only=True)
class Random(TDAMethod):
    """Independent standard normal scores, one per (seed, query id, training id).

    A score depends on nothing else, so order and batches do not matter. Another seed of the run
    gives other scores: run several seeds to see the spread due to chance.
    """

    name = "random"
    family = "control"
    summary = "independent normal scores, by seed"
    expected_failures: ClassVar[Mapping[str, str]] = {
        "a-copy-outranks-others": "scores are noise by design"
    }

    def build(self, context: Context, train: Sequence[Example]) -> Index:
        return RandomIndex(context, id_hashes(train))

    def load(self, context: Context, path: Path) -> Index:
        return RandomIndex(context, read_arrays(path / "ids.safetensors")[0]["ids"])


class RandomIndex(Index):
    """Hashes of the training ids, uint64 [train]."""

    def __init__(self, context: Context, ids: np.ndarray) -> None:
        self.seed, self.ids, self.n_train = context.seed, ids, len(ids)

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        from scipy.special import ndtri

        start = mix(id_hashes(queries) + np.uint64(named_seed(self.seed, "random")))
        bits = mix(start[:, None] ^ self.ids[None, :])  # [query, train]
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / (1 << 53)
        return ndtri(uniform).astype(np.float32)

    def save(self, path: Path) -> None:
        write_arrays(path / "ids.safetensors", {"ids": self.ids})


def id_hashes(examples: Sequence[Example]) -> np.ndarray:
    """Returns 64 bits of blake2b of each id, uint64 [example]."""
    digests = (blake2b(e.id.encode("utf-8", "surrogatepass"), digest_size=8) for e in examples)
    return np.frombuffer(b"".join(d.digest() for d in digests), dtype=np.uint64)


def mix(x: np.ndarray) -> np.ndarray:
    """Applies the splitmix64 finaliser (Steele et al. 2014), which mixes all bits of a uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, kw_only=True)
class _QueryFree(RepresentationMethod):
    """Base of the controls with one number per training example, for every query: phi(q) = 1."""

    family = "control"
    expected_failures: ClassVar[Mapping[str, str]] = {
        "a-copy-outranks-others": "the score does not depend on the query"
    }

    def encode(self, context: Context, examples: Sequence[Example], role: Role) -> np.ndarray:
        if role == "query":
            return np.ones((len(examples), 1), dtype=np.float32)
        return self._values(context, examples).reshape(-1, 1)

    def _values(self, context: Context, train: Sequence[Example]) -> np.ndarray:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Length(_QueryFree):
    """Scores longer examples higher.

    unit  what is counted
    part  of the response alone, or of the whole text"""

    name = "length"
    summary = "length of the training example"

    unit: Literal["tokens", "words", "characters"] = "tokens"
    part: Literal["response", "full"] = "response"

    def _values(self, context: Context, train: Sequence[Example]) -> np.ndarray:
        if self.unit == "tokens":
            tokens = context.target.tokenize(train)
            counts = [len(t) - (t.start if self.part == "response" else 0) for t in tokens]
        else:
            texts = [e.response if self.part == "response" else e.text for e in train]
            counts = [len(t.split() if self.unit == "words" else t) for t in texts]
        return np.array(counts, dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class GradNorm(_QueryFree):
    """Norm of the gradient of the training example's loss over the linear layers.

    The norm is exact and unprojected, and no gradient is formed: for G = sum_t delta_t x_t^T,
    |G|^2 = sum over t, u of (delta_t . delta_u)(x_t . x_u).

    checkpoint  checkpoint of the target at which gradients are computed
    layers      regular expression searched in layer names; None is all but the output head
    """

    name = "gradnorm"
    summary = "gradient norm of the training example"

    checkpoint: str = "base"
    layers: str | None = None

    def _values(self, context: Context, train: Sequence[Example]) -> np.ndarray:
        from tdabench.api import GradientEngine, stream_features  # loads torch

        model = context.target.model(self.checkpoint, context.device)
        engine = GradientEngine(model, layers=self.layers)

        def norms(batch: Batch) -> Tensor:
            squares: dict[str, Tensor] = {}  # layer -> [b]

            def visit(layer: Any, x: Tensor, delta: Tensor) -> None:
                if layer.name in squares:
                    raise MethodError(
                        f"gradnorm: {layer.name} is used twice in a pass",
                        "Exclude it with the parameter 'layers'",
                    )
                x, delta = x.float(), delta.float()
                grams = (x @ x.mT) * (delta @ delta.mT)  # [b, t, t]
                squares[layer.name] = grams.double().sum((1, 2))

            engine.backward(batch, visit)
            total = sum(squares.values())
            return total.clamp_min(0).sqrt().float()[:, None]  # type: ignore[union-attr]

        rows = stream_features(context, train, norms, 1, name="gradient norms")
        return np.asarray(rows[:])


@dataclass(frozen=True, kw_only=True)
class SameTask(RepresentationMethod):
    """An oracle: 1 if query and training example have the same task label, else 0.

    It reads labels that no other method is given, so it is a reference and does not compete. An
    example without a label matches nothing.
    """

    name = "sametask"
    family = "control"
    summary = "oracle, reads labels: 1 if the tasks agree"
    reads_labels = True

    def encode(self, context: Context, examples: Sequence[Example], role: Role) -> sp.csr_matrix:
        import scipy.sparse as sp

        if examples and not any(e.task for e in examples):
            raise UsageError(
                f"sametask: none of the {len(examples)} {role} examples has a task label",
                "Leave this control out, or give the corpus a 'task' field",
            )
        labelled = [bool(e.task) for e in examples]
        digests = [blake2b(e.task.encode("utf-8"), digest_size=8).digest() for e in examples]
        columns = np.array([int.from_bytes(d, "little") >> 2 for d in digests], dtype=np.int64)
        parts = (
            np.ones(sum(labelled), dtype=np.float32),
            columns[labelled],
            np.concatenate([[0], np.cumsum(labelled)]),
        )
        return sp.csr_matrix(parts, shape=(len(examples), 1 << 62))

    def fit(self, context: Context, features: Any) -> dict[str, np.ndarray]:
        return {"tasks": np.unique(features.indices).astype(np.int64)}

    def transform(
        self, features: Any, state: Mapping[str, np.ndarray], role: Role
    ) -> sp.csr_matrix:
        import scipy.sparse as sp

        tasks = state["tasks"]
        row = np.repeat(np.arange(features.shape[0]), np.diff(features.indptr))
        known = np.isin(features.indices, tasks)
        column = np.searchsorted(tasks, features.indices[known])
        shape = (features.shape[0], len(tasks))
        return sp.csr_matrix((features.data[known], (row[known], column)), shape=shape)


@hookimpl
def tdabench_methods():
    return [Random, Length, GradNorm, SameTask]
