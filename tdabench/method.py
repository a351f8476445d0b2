"""The interface a method implements: `TDAMethod`, `Index` and `RepresentationMethod`.

A method is a frozen dataclass: its fields are its parameters, and constructing it does no work.
`build` turns a training corpus into an `Index`; the index answers queries. Most methods map an
example to a vector and score by dot product: they subclass `RepresentationMethod` and write
`encode`. See docs/plugins.md.

Scores are float32 `[query, train]`; positive means helpful: training on the example lowers the
query's loss.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from tdabench.data.examples import Example
from tdabench.errors import DataError, MethodError, MissingAsset, UsageError, unknown
from tdabench.groups import Groups, check_pooling, is_sparse, pool_scores
from tdabench.io import fingerprint, read_arrays, write_arrays

if TYPE_CHECKING:
    import torch

    from tdabench.targets.target import Target
    from tdabench.toolkit.scan import Found

Role = Literal["train", "query"]
Progress = Callable[[str, int, int], None]


def _no_progress(what: str, done: int, total: int) -> None:
    """Progress nobody watches."""


@dataclass(frozen=True)
class Context:
    """What the harness lends to a method: the target, named randomness, a folder, files.

    A method may write in `scratch` only, never prints, reads no environment variable, seeds
    nothing globally and leaves the target's models as it found them.
    """

    target: Target
    scratch: Path
    seed: int = 0
    device: str = "cpu"
    assets: Mapping[str, Path] = field(default_factory=dict)
    progress: Progress = _no_progress

    def rng(self, name: str) -> np.random.Generator:
        """A numpy generator that depends on the seed and on `name`, and on nothing else."""
        return np.random.default_rng(named_seed(self.seed, name))

    def torch_generator(self, name: str) -> torch.Generator:
        """The same as a CPU `torch.Generator`."""
        import torch

        return torch.Generator().manual_seed(named_seed(self.seed, name))

    def asset(self, name: str) -> Path:
        """The file or folder that the suite provides under `name` (an encoder, say)."""
        if name not in self.assets:
            raise MissingAsset(name, self.assets)
        return self.assets[name]


def named_seed(seed: int, name: str) -> int:
    """A 63-bit seed from a number and a name, the same on every machine."""
    return int(fingerprint([seed, name]), 16) >> 1


class TDAMethod(ABC):
    """A training-data-attribution method: subclass it as a frozen, keyword-only dataclass.

    Class variables: `name` (what users type), `version` (raise it whenever scores change),
    `family` (for grouping in tables), `source` (paper), `summary` (one line). For `tdabench tune`:
    `grid` (values worth trying, by parameter) and `query_time` (parameters that no part of an index
    depends on: they are tried on one that was built once).
    `expected_failures` maps a law of the conformance kit that the method breaks to the reason.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    family: ClassVar[str] = "other"
    source: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    expected_failures: ClassVar[Mapping[str, str]] = {}
    grid: ClassVar[Mapping[str, tuple]] = {}
    query_time: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def build(self, context: Context, train: Sequence[Example]) -> Index:
        """Does all work that needs no query. Timed as the build phase."""

    @abstractmethod
    def load(self, context: Context, path: Path) -> Index:
        """The index that `Index.save` wrote to the folder `path`."""

    def prepare_cost(self, context: Context) -> Mapping[str, float] | None:
        """Work done once before any corpus is seen (labels, encoder training), if any.

        Keys: `seconds`, `retrainings`; read from the asset's own record, never typed in.
        """
        return None

    @property
    def params(self) -> dict[str, Any]:
        """Parameters as resolved: every field with its value."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Self:
        """Constructs the method from parameters by name, checking names and types.

        Strings are converted to the field's type (`"512"` to an int). Raises UsageError for an
        unknown name or a value that does not fit.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        hints = typing.get_type_hints(cls)
        values = {}
        for key, value in params.items():
            if key not in known:
                raise unknown(f"parameter of {cls.name}", key, known)
            values[key] = _convert(f"{cls.name}.{key}", value, hints[key])
        try:
            return cls(**values)
        except (ValueError, TypeError) as e:
            raise UsageError(f"{cls.name}: {e}") from e


class Index(ABC):
    """What a method built on a training corpus; answers queries.

    `n_train` examples; `pooling` and `temperature` say how group scores come from example
    scores. An index whose group scores are no pooling of its example scores overrides
    `score_groups` and sets `pooling = "own"`.
    """

    n_train: int
    pooling: str = "sum"
    temperature: float = 1.0

    @abstractmethod
    def score(self, queries: Sequence[Example]) -> np.ndarray:
        """Attribution scores, float32 [query, train]."""

    def score_groups(self, queries: Sequence[Example], groups: Groups) -> np.ndarray:
        """Group scores, float32 [query, group]. A group of one equals `score`."""
        return pool_scores(self.score(queries), groups, self.pooling, self.temperature)

    def top_k(self, queries: Sequence[Example], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k highest scores, float32 [query, k], and their training indices, best first.

        Equal scores are ordered by training index.
        """
        return top_k_of(self.score(queries), k)

    @abstractmethod
    def save(self, path: Path) -> None:
        """Writes the index into the folder `path`, which exists and is empty."""


def top_k_of(scores: np.ndarray, k: int, offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Top k of each row by (score descending, index ascending): values and indices [query, k]."""
    k = min(k, scores.shape[1])
    if k < scores.shape[1]:
        # The k-th value may be tied: take everything at or above it, then order and cut.
        kth = np.partition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k]
    else:
        kth = scores.min(axis=1, initial=np.inf)
    values = np.empty((len(scores), k), dtype=np.float32)
    ids = np.empty((len(scores), k), dtype=np.int64)
    for q, row in enumerate(scores):
        candidates = np.flatnonzero(row >= kth[q])
        best = candidates[np.argsort(-row[candidates], kind="stable")[:k]]
        values[q], ids[q] = row[best], best + offset
    return values, ids


# --------------------------------------------------------------------------- representations


class Rows(typing.Protocol):
    """Anything [n, d] that hands out float32 blocks of rows: arrays, sparse, a feature store."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, key: slice) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class RepresentationMethod(TDAMethod):
    """score(q, z) = phi(q) . phi(z). Subclasses write `encode`, and little else.

    Pooling and its temperature are parameters of every such method, because they change group
    scores a great deal: both are recorded, and may be tuned on held-out queries and groups.
    """

    pooling: str = "sum"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_pooling(self.name, self.pooling, self.temperature)

    @abstractmethod
    def encode(self, context: Context, examples: Sequence[Example], role: Role) -> Rows:
        """Features [example, dim]: a float array, a scipy CSR matrix or a feature store."""

    def fit(self, context: Context, features: Rows) -> dict[str, np.ndarray]:
        """What must be learnt from all training features (a curvature, document frequencies)."""
        return {}

    def transform(self, features: Any, state: Mapping[str, np.ndarray], role: Role) -> Any:
        """Features as scored, [example, dim] -> [example, dim'], given what `fit` returned.

        Called on blocks of rows, so each row's result must depend on that row and `state` only.
        """
        return features

    def build(self, context: Context, train: Sequence[Example]) -> RepresentationIndex:
        features = self.encode(context, train, "train")
        check_rows(self.name, features, len(train))
        state = self.fit(context, features)
        rows = transform_rows(self, context, features, state)
        return RepresentationIndex(self, context, rows, state)

    def load(self, context: Context, path: Path) -> RepresentationIndex:
        arrays, meta = read_arrays(path / "state.safetensors")
        if meta.get("method") != self.name or meta.get("version") != self.version:
            raise DataError(f"{path} is an index of {meta.get('method')}, not of {self.name}")
        state = {k.removeprefix("state."): v for k, v in arrays.items() if k.startswith("state.")}
        if meta["rows"] == "sparse":
            from scipy.sparse import csr_matrix

            parts = (arrays["rows.data"], arrays["rows.indices"], arrays["rows.indptr"])
            rows: Any = csr_matrix(parts, shape=tuple(meta["shape"]))
        elif meta["rows"] == "store":
            from tdabench.toolkit.sharded import Shards
            from tdabench.toolkit.store import FeatureStore

            kind: Any = Shards if (path / "rows" / "shards.json").exists() else FeatureStore
            rows = kind.open(path / "rows")
        else:
            rows = arrays["rows"]
        return RepresentationIndex(self, context, rows, state)


def transform_rows(
    method: RepresentationMethod, context: Context, features: Rows, state: Mapping[str, np.ndarray]
) -> Rows:
    """`method.transform` of all training features; what is in a store streams into another."""
    if type(method).transform is RepresentationMethod.transform:
        return features
    if isinstance(features, np.ndarray) or is_sparse(features):
        return method.transform(features, state, "train")
    # A feature store may exceed memory: stream it through, block by block, into another.
    from tdabench.toolkit.store import FeatureStore

    n, out = features.shape[0], None
    for a, block in row_blocks(features):
        done = np.asarray(method.transform(block, state, "train"), dtype=np.float32)
        if out is None:
            dtype = getattr(features, "dtype_name", "float32")
            out = FeatureStore.create(context.scratch / "transformed", n, done.shape[1], dtype)
        out.write(np.arange(a, a + len(done)), done)
    if out is None:
        return features
    out.close()
    return out


def row_blocks(rows: Rows, bytes_a_block: int = 64 << 20) -> typing.Iterator[tuple[int, Any]]:
    """(first row, block) over `rows`, each block of about `bytes_a_block` as float32."""
    n, d = rows.shape[0], max(1, rows.shape[1])
    step = n if is_sparse(rows) else max(1, bytes_a_block // (4 * d))
    for a in range(0, n, max(1, step)):
        yield a, rows[a : a + step]


SCORES_BYTES = 256 << 20  # of example scores held to pool groups from


class RepresentationIndex(Index):
    """Transformed training features and the state to transform queries with."""

    def __init__(
        self,
        method: RepresentationMethod,
        context: Context,
        rows: Rows,
        state: dict[str, np.ndarray],
    ) -> None:
        self.method, self.context, self.rows, self.state = method, context, rows, state
        self.n_train = rows.shape[0]
        self.pooling, self.temperature = method.pooling, method.temperature

    def query_features(self, queries: Sequence[Example]) -> Any:
        """[query, dim'], as `transform` leaves them."""
        features = self.method.encode(self.context, queries, "query")
        check_rows(self.method.name, features, len(queries))
        return self.method.transform(features[:], self.state, "query")

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        q = self.query_features(queries)
        out = np.empty((len(queries), self.n_train), dtype=np.float32)
        for a, block in row_blocks(self.rows):
            out[:, a : a + block.shape[0]] = _dots(q, block)
        return out

    def top_k(self, queries: Sequence[Example], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Streams over the rows: holds [query, block], never [query, train]."""
        found = self.scan(queries, k, pooling=None)
        return found.values, found.ids

    def scan(self, queries: Sequence[Example], k: int, pooling: str | None = "own") -> Found:
        """The best k, and the whole corpus as one group, in one pass (`toolkit.scan.Found`).

        `pooling` is the index's own by default; None leaves the corpus out.
        """
        from tdabench.toolkit.scan import scan

        device = self.context.device
        return scan(
            self.query_features(queries),
            self.rows,
            k,
            pooling=self.pooling if pooling == "own" else pooling,
            temperature=self.temperature,
            device=None if device == "cpu" or is_sparse(self.rows) else device,
        )

    def score_groups(self, queries: Sequence[Example], groups: Groups) -> np.ndarray:
        """As `Index.score_groups`, so many queries at a time as keep scores under 256 MB."""
        step = max(1, SCORES_BYTES // (4 * max(1, self.n_train)))
        if len(queries) <= step:
            return super().score_groups(queries, groups)
        return np.concatenate(
            [
                super(RepresentationIndex, self).score_groups(queries[a : a + step], groups)
                for a in range(0, len(queries), step)
            ]
        )

    def save(self, path: Path) -> None:
        arrays = {f"state.{k}": np.asarray(v) for k, v in self.state.items()}
        meta: dict[str, Any] = {
            "method": self.method.name,
            "version": self.method.version,
            "shape": list(self.rows.shape),
        }
        if is_sparse(self.rows):
            m = self.rows.tocsr()  # type: ignore[attr-defined]
            meta["rows"] = "sparse"
            arrays |= {"rows.data": m.data, "rows.indices": m.indices, "rows.indptr": m.indptr}
        elif isinstance(self.rows, np.ndarray):
            meta["rows"] = "dense"
            arrays["rows"] = self.rows
        else:
            meta["rows"] = "store"
            self.rows.copy_to(path / "rows")  # type: ignore[attr-defined]
        write_arrays(path / "state.safetensors", arrays, meta)


def _dots(q: Any, rows: Any) -> np.ndarray:
    """q [query, d] . rows [block, d] -> float32 [query, block]; dense or sparse on either side."""
    product = q @ rows.T
    return np.asarray(product.todense() if is_sparse(product) else product, dtype=np.float32)


def check_rows(name: str, features: Any, n: int) -> None:
    """Raises MethodError unless `features` is [n, d] and, when in memory, finite."""
    shape = getattr(features, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != n:
        raise MethodError(f"{name} encoded {n} examples into shape {shape}, expected [{n}, dim]")
    values = features.data if is_sparse(features) else features
    if isinstance(values, np.ndarray):
        bad = ~np.isfinite(values)
        if bad.any():
            where = np.flatnonzero(bad.reshape(len(values), -1).any(axis=1))
            raise MethodError(f"{name} returned NaN or infinite features for {len(where)} rows")


# --------------------------------------------------------------------------- parameters


def _convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`, or a UsageError that names what was expected."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            if type(None) in args:
                return None
        for arm in (a for a in args if a is not type(None)):
            try:
                return _convert(name, value, arm)
            except UsageError:
                continue
    elif origin is Literal:
        if value in args:
            return value
        raise UsageError(f"{name} = {value!r}", f"One of: {', '.join(map(str, args))}")
    elif origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if isinstance(items, (list, tuple)):
            return tuple(_convert(name, i, args[0]) for i in items)
    elif hint is bool:
        spelled = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in spelled:
            return spelled[value.lower()]
    elif hint in (int, float):
        integral = hint is int and isinstance(value, float) and not value.is_integer()
        if not isinstance(value, bool) and not integral:
            try:
                return hint(value)
            except (TypeError, ValueError):
                pass
    elif hint is str and isinstance(value, str):
        return value
    elif hint is Any:
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise UsageError(f"{name} = {value!r} is not of the type {wanted}")
