"""Rows of features [n, d]: arrays, sparse matrices and stores on disk, read in blocks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from tdabench.errors import MethodError


class Rows(Protocol):
    """Anything [n, d] that returns float32 blocks of rows: arrays, sparse, a feature store."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, key: slice) -> Any: ...


def is_sparse(x: Any) -> bool:
    """Tells whether `x` is a scipy.sparse matrix, without importing scipy."""
    sparse = sys.modules.get("scipy.sparse")
    return sparse is not None and bool(sparse.issparse(x))


def row_blocks(rows: Rows, bytes_a_block: int = 64 << 20) -> Iterator[tuple[int, Any]]:
    """Yields (first row, block) over `rows`, each block of about `bytes_a_block` as float32."""
    n, d = rows.shape[0], max(1, rows.shape[1])
    step = n if is_sparse(rows) else max(1, bytes_a_block // (4 * d))
    for a in range(0, n, max(1, step)):
        yield a, rows[a : a + step]


def dots(q: Any, rows: Any) -> np.ndarray:
    """Multiplies q [query, d] . rows [block, d] -> float32 [query, block]; dense or sparse."""
    product = q @ rows.T
    return np.asarray(product.todense() if is_sparse(product) else product, dtype=np.float32)


def check_rows(name: str, features: Any, n: int) -> None:
    """Raises MethodError unless `features` is [n, d] and, if in memory, finite."""
    shape = getattr(features, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != n:
        raise MethodError(f"{name} encoded {n} examples into shape {shape}, expected [{n}, dim]")
    values = features.data if is_sparse(features) else features
    if isinstance(values, np.ndarray):
        bad = ~np.isfinite(values)
        if bad.any():
            where = np.flatnonzero(bad.reshape(len(values), -1).any(axis=1))
            raise MethodError(f"{name} returned NaN or infinite features for {len(where)} rows")


def top_k_of(scores: np.ndarray, k: int, offset: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Finds the top k per row by (score descending, index ascending): values, indices."""
    k = min(k, scores.shape[1])
    if k < scores.shape[1]:
        # The k-th value may be tied: take everything at or above it, then sort and cut.
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
