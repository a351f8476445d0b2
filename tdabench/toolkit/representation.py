"""Methods that map an example to a vector and score by dot product, and their index.

Most methods subclass `RepresentationMethod` and write `encode`. See docs/plugins.md.
"""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tdabench.data.behaviours import Behaviour, parts_of
from tdabench.data.examples import Corpus, Example
from tdabench.errors import UsageError
from tdabench.groups import Groups, check_pooling
from tdabench.io import fingerprint, read_arrays, write_arrays, write_json
from tdabench.method import Context, Index, TDAMethod, no_progress
from tdabench.rows import Rows, check_rows, dots, is_sparse, row_blocks
from tdabench.toolkit.scan import ScanResult, scan, stream_groups
from tdabench.toolkit.sharded import SCHEMA, Run, Shards, build_shards, in_turn
from tdabench.toolkit.store import FeatureStore
from tdabench.toolkit.words import query_word_scores, word_scores

Role = Literal["train", "query"]
SCORES_BYTES = 256 << 20  # of example scores held to pool groups


@dataclass(frozen=True, kw_only=True)
class RepresentationMethod(TDAMethod):
    """score(q, z) = phi(q) . phi(z). Subclasses write `encode`, and little else.

    Pooling and its temperature are parameters of every such method, because they change group
    scores considerably: both are recorded, and can be tuned on held-out queries and groups.

    pooling      how example scores become a group's: sum, mean, softmax or softmax-abs
    temperature  of softmax pooling; unused by sum and mean
    """

    pooling: str = "sum"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_pooling(self.name, self.pooling, self.temperature)

    @abstractmethod
    def encode(self, context: Context, examples: Sequence[Example], role: Role) -> Rows:
        """Returns features [example, dim]: a float array, a scipy CSR matrix or a feature store."""

    def fit(self, context: Context, features: Rows) -> dict[str, np.ndarray]:
        """Computes state from all training features (a curvature, document frequencies)."""
        return {}

    def transform(self, features: Any, state: Mapping[str, np.ndarray], role: Role) -> Any:
        """Transforms features [example, dim] -> [example, dim'] with the state of `fit`.

        Called on blocks of rows, so each row's result must depend only on that row and `state`.
        """
        return features

    def learn(self, context: Context, train: Sequence[Example]) -> dict[str, np.ndarray]:
        """Computes state that `features` needs, from the training examples (none by default)."""
        return {}

    def features(
        self,
        context: Context,
        examples: Sequence[Example],
        role: Role,
        state: dict[str, np.ndarray],
    ) -> Rows:
        """Returns features [example, dim] given what `learn` returned: by default, `encode`."""
        return self.encode(context, examples, role)

    @property
    def rows_dtype(self) -> str:
        """The dtype of a store for transformed rows; "" to keep them as `transform` leaves them."""
        return ""

    def build(self, context: Context, train: Sequence[Example]) -> RepresentationIndex:
        state = self.learn(context, train)
        features = self.features(context, train, "train", state)
        check_rows(self.name, features, len(train))
        state = {**state, **self.fit(context, features)}
        rows = transform_rows(self, context, features, state, self.rows_dtype)
        return RepresentationIndex(self, context, rows, state)

    def load(self, context: Context, path: Path) -> RepresentationIndex:
        return open_index(self, context, path)


def transform_rows(
    method: RepresentationMethod,
    context: Context,
    features: Rows,
    state: Mapping[str, np.ndarray],
    dtype: str = "",
) -> Rows:
    """Computes `method.transform` of all training features, [example, dim'].

    Features in a store, which may exceed memory, are streamed block by block into another store of
    the same dtype; with a `dtype`, transformed features always go into a store of that dtype.
    """
    if type(method).transform is RepresentationMethod.transform:
        return features
    held = isinstance(features, np.ndarray) or is_sparse(features)
    if features.shape[0] == 0 or (held and not dtype):
        return method.transform(features[:], state, "train")
    blocks = (method.transform(block, state, "train") for _, block in row_blocks(features))
    dtype = dtype or getattr(features, "dtype_name", "float32")
    return FeatureStore.of(context.scratch / "transformed", features.shape[0], blocks, dtype)


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
        """Returns transformed query features [query, dim']."""
        features = self.method.features(self.context, queries, "query", self.state)
        check_rows(self.method.name, features, len(queries))
        return self.method.transform(features[:], self.state, "query")

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        q = self.query_features(queries)
        out = np.empty((len(queries), self.n_train), dtype=np.float32)
        for a, block in row_blocks(self.rows):
            out[:, a : a + block.shape[0]] = dots(q, block)
        return out

    def score_some(self, queries: Sequence[Example], candidates: np.ndarray) -> np.ndarray:
        """Multiplies each query with its own candidates' rows; reads no others from memory.

        Rows in a store are read once, in blocks, as far as some query asks for them.
        """
        if type(self).score is not RepresentationIndex.score:
            return super().score_some(queries, candidates)  # its scores are not plain products
        q = self.query_features(queries)
        if isinstance(self.rows, np.ndarray) or is_sparse(self.rows):
            out = np.empty(candidates.shape, dtype=np.float32)
            for i, chosen in enumerate(candidates):
                out[i] = dots(q[i : i + 1], self.rows[chosen])[0]
            return out
        return pairs_in_blocks(q, self.rows, candidates)

    def score_words(
        self, behaviour: Behaviour, examples: Sequence[Example]
    ) -> list[np.ndarray] | None:
        """Encodes each example without each of its words: what its score loses, [word] each."""
        if (
            type(self).score is not RepresentationIndex.score
            or type(self).score_behaviours is not Index.score_behaviours
        ):
            return None
        asked, weights = parts_of([behaviour])
        q = self.query_features(asked)

        def score(variants: list[Example]) -> np.ndarray:
            rows = self.method.features(self.context, Corpus(variants), "train", self.state)
            check_rows(self.method.name, rows, len(variants))
            rows = self.method.transform(rows[:], self.state, "train")
            return (weights @ dots(q, rows))[0]

        return word_scores(examples, score)

    def score_query_words(self, behaviour: Behaviour, indices: Sequence[int]) -> np.ndarray | None:
        """Encodes the query without each of its words: what the scores lose, [word]."""
        if type(self).score is not RepresentationIndex.score:
            return None
        return query_word_scores(self, behaviour, indices)

    def top_k(self, queries: Sequence[Example], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Streams over the rows: holds [query, block], never [query, train]."""
        found = self.scan(queries, k, pooling=None)
        return found.values, found.ids

    def scan(self, queries: Sequence[Example], k: int, pooling: str | None = "own") -> ScanResult:
        """Finds the best k and pools the whole corpus as one group, in one pass (`toolkit.scan`).

        `pooling` is the index's own by default; None skips the corpus.
        """
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
        """Scores groups like `Index.score_groups`; streams beyond SCORES_BYTES of scores."""
        if 4 * len(queries) * self.n_train <= SCORES_BYTES:
            return super().score_groups(queries, groups)
        if type(self).score is RepresentationIndex.score:
            q = self.query_features(queries)
            return stream_groups(q, self.rows, groups, self.pooling, self.temperature)
        step = max(1, SCORES_BYTES // (4 * self.n_train))  # its scores are not plain products
        parts = [queries[a : a + step] for a in range(0, len(queries), step)]
        pooled = [super(RepresentationIndex, self).score_groups(part, groups) for part in parts]
        return np.concatenate(pooled)

    def save(self, path: Path) -> None:
        if isinstance(self.rows, np.ndarray) or is_sparse(self.rows):
            return self._write(path)
        self.rows.copy_to(path / "rows")  # type: ignore[attr-defined]
        self._write(path)

    def _write(self, path: Path, **more: Any) -> None:
        """Writes everything but rows in a store, which lie in `path`/rows already."""
        arrays = {f"state.{k}": np.asarray(v) for k, v in self.state.items()}
        meta: dict[str, Any] = {
            "method": self.method.name,
            "version": self.method.version,
            "shape": list(self.rows.shape),
            **more,
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
        write_arrays(path / "state.safetensors", arrays, meta)


def pairs_in_blocks(q: Any, rows: Rows, candidates: np.ndarray) -> np.ndarray:
    """Computes q[i] . rows[candidates[i, j]] -> float32 [query, k], reading rows in blocks.

    A block that no query asks for is not read.
    """
    out = np.empty(candidates.shape, dtype=np.float32)
    step = max(1, (16 << 20) // (4 * max(1, rows.shape[1])))
    for a in range(0, rows.shape[0], step):
        wanted = (candidates >= a) & (candidates < a + step)  # [query, k]
        if not wanted.any():
            continue
        block = rows[a : a + step]
        for i in np.flatnonzero(wanted.any(axis=1)):
            out[i, wanted[i]] = dots(q[i : i + 1], block[candidates[i, wanted[i]] - a])[0]
    return out


def open_index(
    method: RepresentationMethod,
    context: Context,
    path: Path,
    run: Run = in_turn,
    verify: bool = True,
) -> RepresentationIndex:
    """Opens the index that `RepresentationIndex.save` or `build_index` wrote to the folder `path`.

    `run` says where an index in shards is read and searched; `verify` reads every byte of a store
    once. Raises DataError for an index of another method or version, or a damaged one.
    """
    arrays, meta = read_arrays(path / "state.safetensors")
    method.check_saved(path, meta)
    state = {k.removeprefix("state."): v for k, v in arrays.items() if k.startswith("state.")}
    rows: Any
    if meta["rows"] == "sparse":
        from scipy.sparse import csr_matrix

        parts = (arrays["rows.data"], arrays["rows.indices"], arrays["rows.indptr"])
        rows = csr_matrix(parts, shape=tuple(meta["shape"]))
    elif meta["rows"] == "store" and (path / "rows" / "shards.json").exists():
        rows = Shards.open(path / "rows", run, verify)
    elif meta["rows"] == "store":
        rows = FeatureStore.open(path / "rows", verify=verify)
    else:
        rows = arrays["rows"]
    return RepresentationIndex(method, context, rows, state)


# --------------------------------------------------------------------------- an index in shards


def build_index(
    method: RepresentationMethod,
    context: Context,
    train: Corpus,
    folder: Path,
    rows_a_shard: int,
    *,
    dtype: str = "float32",
    run: Run = in_turn,
) -> RepresentationIndex:
    """Builds the saved index of a method in shards of `rows_a_shard` rows, of `dtype`, in `folder`.

    `run` encodes and transforms each shard; `learn` and `fit` run here, and `fit` reads the
    features of all shards in blocks. Finished shards are kept, so that an interrupted build
    resumes, and a finished index of the same method, target, corpus and dtype is opened. Scores
    equal those of `method.build`, up to the rounding of `dtype`, if the features of an example do
    not depend on others in the corpus (only `learn` and `fit` may).

    Raises UsageError for a method that builds its index in one piece, or encodes sparse rows.
    """
    if type(method).build is not RepresentationMethod.build:
        raise UsageError(
            f"{method.name} builds its index in one piece, not in shards",
            "Use tdabench run or tdabench trace, or another method",
        )
    folder = Path(folder)
    context = replace(context, progress=no_progress)
    key = fingerprint(
        [method.name, method.version, repr(method), context.target.fingerprint, context.seed,
         train.fingerprint, context.device.partition(":")[0], dtype]
    )  # fmt: skip
    if (folder / "state.safetensors").exists():
        if read_arrays(folder / "state.safetensors")[1].get("key") == key:
            return open_index(method, context, folder, run)
        (folder / "state.safetensors").unlink()  # an index without it is unfinished
    plain = type(method).transform is RepresentationMethod.transform
    learned = method.learn(context, train)
    features = build_shards(
        folder / ("rows" if plain else "features"),
        train,
        partial(_encode, method, context, learned),
        rows_a_shard,
        dtype=dtype if plain else "float32",  # rounding comes last
        key=key,
        run=run,
    )
    state = {**learned, **method.fit(context, features)}
    rows = features
    if not plain:
        places = [(features.path(i), method, state) for i in range(len(features.starts) - 1)]
        rows = _transformed(folder / "rows", features, places, dtype, run)
        shutil.rmtree(folder / "features")
    index = RepresentationIndex(method, context, rows, state)
    index._write(folder, key=key)
    return index


def _transformed(folder: Path, features: Shards, places: list[Any], dtype: str, run: Run) -> Shards:
    folder.mkdir(parents=True, exist_ok=True)
    dims = run(partial(_transform_shard, folder=folder, dtype=dtype), places)
    starts = features.starts.tolist()
    dim = dims[0] if dims else features.shape[1]
    write_json(folder / "shards.json", {"schema": SCHEMA, "starts": starts, "dim": dim})
    return Shards(folder, features.starts, dim, run)


def _transform_shard(
    place: tuple[Path, RepresentationMethod, Any], folder: Path, dtype: str
) -> int:
    path, method, state = place
    source = FeatureStore.open(path, verify=False)
    blocks = (method.transform(block, state, "train") for _, block in row_blocks(source))
    return FeatureStore.of(folder / path.name, len(source), blocks, dtype).shape[1]


def _encode(
    method: RepresentationMethod,
    context: Context,
    state: dict[str, np.ndarray],
    examples: Sequence[Example],
) -> Rows:
    own = fingerprint([e.id for e in examples])
    scratch = context.scratch / f"shard-{own}"
    scratch.mkdir(parents=True, exist_ok=True)
    rows = method.features(replace(context, scratch=scratch), examples, "train", state)
    check_rows(method.name, rows, len(examples))
    if is_sparse(rows):
        raise UsageError(
            f"{method.name} encodes sparse rows, which shards do not hold",
            "Use tdabench run or tdabench trace, or another method",
        )
    return rows
