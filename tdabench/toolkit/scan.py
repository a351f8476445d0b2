"""One pass over the rows of an index: top-k, the whole corpus as a group, and its sum, together.

Rows are read in blocks that fit a processor's cache, multiplied with the queries and forgotten:
neither the rows nor a [query, train] matrix is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tdabench.errors import UsageError
from tdabench.groups import LEAST_LOGIT, POOLINGS, is_sparse
from tdabench.method import Rows, top_k_of

BLOCK_BYTES = 8 << 20  # of float32 rows at a time


@dataclass(frozen=True, eq=False)
class Found:
    """What a scan says of each query.

    `values` float32 and `ids` int64 [query, min(k, n)], best first, equal scores by index.
    """

    values: np.ndarray
    ids: np.ndarray
    whole: Whole

    @property
    def pooled(self) -> np.ndarray:
        """The score of the whole corpus as one group, float32 [query]."""
        return self.whole.pooled()

    @property
    def sums(self) -> np.ndarray:
        """The sum of all scores, float64 [query]."""
        return self.whole.sums

    @classmethod
    def merge(cls, parts: Sequence[Found], starts: Sequence[int], k: int) -> Found:
        """What one scan would have found of parts of a corpus, in order, that begin at `starts`.

        Raises UsageError for no parts.
        """
        if not parts:
            raise UsageError("there is nothing to merge")
        values = np.hstack([p.values for p in parts])
        ids = np.hstack([p.ids + a for p, a in zip(parts, starts)])
        # Ids rise from part to part and ties within one are in order, so place breaks ties.
        values, order = top_k_of(values, k)
        whole = parts[0].whole
        for p in parts[1:]:
            whole = whole.merged(p.whole)
        return cls(values, np.take_along_axis(ids, order, axis=1), whole)


def scan(
    queries: Any,  # [query, d] dense or sparse
    rows: Rows,  # [n, d]
    k: int,
    *,
    pooling: str | None = None,
    temperature: float = 1.0,
    device: str | None = None,
    candidates: int | None = None,
) -> Found:
    """Scores q . z of all queries with all rows in one pass over `rows`.

    pooling     also pool the whole corpus this way ("softmax-abs", ...); None leaves zeros in
                `pooled` and `sums` and costs nothing
    device      multiply there by torch ("cuda"); None multiplies by numpy
    candidates  of a store with two planes (`int8x2`) the first is read for all rows, and the
                second for so many best rows a query, which it puts in their final order; default
                2 k + 50. Sums and pooled scores are those of the first plane.

    Raises UsageError for a negative k or an unknown pooling.
    """
    if k < 0:
        raise UsageError(f"cannot return the best {k} examples")
    if pooling is not None and pooling not in POOLINGS:
        raise UsageError(f"unknown pooling {pooling!r}", f"One of: {', '.join(POOLINGS)}")
    if hasattr(rows, "scan"):  # rows in shards, which may lie on other machines
        return rows.scan(
            queries, k, pooling=pooling, temperature=temperature, device=device,
            candidates=candidates,
        )  # fmt: skip
    n, q = rows.shape[0], queries.shape[0]
    refined = getattr(rows, "dtype_name", "") == "int8x2" and 0 < k < n
    keep = min(n, candidates or 2 * k + 50) if refined else min(n, k)
    best, whole = _Best(q, keep), Whole(q, pooling, temperature)
    multiply = _multiplier(queries, device)
    for a, block, scales in blocks(rows):
        dots = multiply(block)  # [query, b]
        if scales is not None:
            dots *= scales
        best.add(dots, a)
        if pooling is not None:
            whole.add(dots)
    values, ids = best.result()
    if refined:
        values, ids = _rescore(queries, rows, ids, k)
    return Found(values, ids, whole)


def blocks(rows: Rows) -> Iterator[tuple[int, Any, np.ndarray | None]]:
    """(first row, block [b, d], scales [b] or None): scores of the block are to be scaled.

    A block is valid until the next is asked for.
    """
    n, d = rows.shape[0], max(1, rows.shape[1])
    step = max(1, BLOCK_BYTES // (4 * d))
    if hasattr(rows, "planes"):
        yield from rows.planes(step)
        return
    if is_sparse(rows):
        step = max(step, 1 << 14)
    for a in range(0, n, step):
        block = rows[a : a + step]
        yield a, block if is_sparse(block) else np.asarray(block, dtype=np.float32), None


def _multiplier(queries: Any, device: str | None) -> Any:
    """A function from a block [b, d] to scores, float32 [query, b]."""
    if device is not None:
        import torch

        q = torch.from_numpy(np.asarray(queries, dtype=np.float32)).to(device)

        def on_device(block: np.ndarray) -> np.ndarray:
            return (q @ torch.from_numpy(block).to(device).T).cpu().numpy()

        return on_device

    def product(block: Any) -> np.ndarray:
        dots = queries @ block.T
        return np.asarray(dots.todense() if is_sparse(dots) else dots, dtype=np.float32)

    return product


def _rescore(
    queries: np.ndarray, rows: Any, ids: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of the candidates `ids` [query, m], by the full rows."""
    ids = np.sort(ids, axis=1)  # equal scores go by index
    scores = np.empty(ids.shape, dtype=np.float32)
    step = max(1, 4 * BLOCK_BYTES // (4 * max(1, ids.shape[1]) * rows.shape[1]))  # queries
    for a in range(0, len(ids), step):
        some, place = np.unique(ids[a : a + step], return_inverse=True)
        full = rows[some]  # each candidate read once, front to back
        place = place.reshape(-1, ids.shape[1])
        for i in range(len(place)):
            scores[a + i] = full[place[i]] @ np.asarray(queries[a + i], dtype=np.float32)
    values, order = top_k_of(scores, k)
    return values, np.take_along_axis(ids, order, axis=1)


class _Best:
    """The best k so far of each query.

    Once k are known, only scores above a query's k-th can enter: one comparison a score. Those
    are few, and put in order when many have come together.
    """

    def __init__(self, q: int, k: int) -> None:
        self.k = k
        self.values = np.empty((q, 0), dtype=np.float32)
        self.ids = np.empty((q, 0), dtype=np.int64)
        self.waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # query, value, id
        self.n_waiting = 0

    def add(self, dots: np.ndarray, first: int) -> None:
        """`dots` [query, b] are the scores of rows `first`, `first` + 1, ..."""
        q, have = self.values.shape
        if self.k == 0:
            return
        if have < self.k:
            self._merge(*top_k_of(dots, self.k, offset=first))
            return
        # A later row that equals the k-th does not displace it: equal scores go by index.
        at = np.flatnonzero(dots > self.values[:, -1:])
        if len(at) > 4 * q * self.k:
            self._settle()
            self._merge(*top_k_of(dots, self.k, offset=first))
            return
        query, column = np.divmod(at, dots.shape[1])
        self.waiting.append((query, dots.ravel()[at], column + first))
        self.n_waiting += len(at)
        if self.n_waiting > q * self.k:
            self._settle()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        self._settle()
        return self.values, self.ids

    def _merge(self, values: np.ndarray, ids: np.ndarray) -> None:
        """Scores of later rows, [query, m] each."""
        values, ids = np.hstack([self.values, values]), np.hstack([self.ids, ids])
        self.values, order = top_k_of(values, self.k)
        self.ids = np.take_along_axis(ids, order, axis=1)

    def _settle(self) -> None:
        if not self.n_waiting:
            return
        q, k = self.values.shape
        query, value, id = (np.concatenate(x) for x in zip(*self.waiting))
        query = np.concatenate([np.repeat(np.arange(q), k), query])
        value = np.concatenate([self.values.ravel(), value])
        id = np.concatenate([self.ids.ravel(), id])
        order = np.lexsort((id, -value, query))
        starts = np.searchsorted(query[order], np.arange(q))
        chosen = order[starts[:, None] + np.arange(k)]  # [query, k]
        self.values, self.ids = value[chosen], id[chosen]
        self.waiting, self.n_waiting = [], 0


class Whole:
    """The whole corpus as one group, pooled as scores go by: a softmax with a running maximum."""

    def __init__(self, q: int, pooling: str | None, temperature: float) -> None:
        self.pooling, self.t, self.n = pooling, np.float32(temperature), 0
        self.sums = np.zeros(q)
        self.top = np.full(q, -np.inf, dtype=np.float32)  # largest logit so far
        self.norm, self.weighed = np.zeros(q), np.zeros(q)  # with weights exp(logit - top)

    def add(self, dots: np.ndarray) -> None:
        """Scores [query, b] of more rows."""
        self.n += dots.shape[1]
        self.sums += dots.sum(axis=1)
        if self.pooling in ("sum", "mean"):
            return
        e = np.abs(dots) if self.pooling == "softmax-abs" else dots.copy()
        if self.t != 1:
            e /= self.t
        top = np.maximum(self.top, e.max(axis=1))
        e -= top[:, None]
        np.exp(np.maximum(e, LEAST_LOGIT, out=e), out=e)
        self._raise(top)
        self.norm += e.sum(axis=1)
        self.weighed += np.einsum("qb,qb->q", e, dots)

    def merged(self, other: Whole) -> Whole:
        """This and another part of the corpus together."""
        both = Whole(len(self.sums), self.pooling, float(self.t))
        both.top = np.maximum(self.top, other.top)
        for part in (self, other):
            both.n += part.n
            both.sums += part.sums
            if np.isfinite(part.top).all():
                shrink = np.exp(part.top - both.top)
                both.norm += part.norm * shrink
                both.weighed += part.weighed * shrink
        return both

    def _raise(self, top: np.ndarray) -> None:
        shrink = np.exp(self.top - top)
        self.norm *= shrink
        self.weighed *= shrink
        self.top = top

    def pooled(self) -> np.ndarray:
        """float32 [query]; zero for an empty corpus, or without a pooling."""
        if self.pooling is None or self.n == 0:
            return np.zeros(len(self.sums), dtype=np.float32)
        if self.pooling == "sum":
            return self.sums.astype(np.float32)
        if self.pooling == "mean":
            return (self.sums / self.n).astype(np.float32)
        return (self.weighed / self.norm).astype(np.float32)
