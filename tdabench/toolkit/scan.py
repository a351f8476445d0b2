"""One pass over the rows of an index: top-k, the whole corpus as a group, and its sum.

Rows are read in blocks that fit in a CPU's cache, multiplied with the queries and discarded:
neither the rows nor a [query, train] matrix is ever held. `stream_groups` pools groups the same
way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tdabench.errors import UsageError
from tdabench.groups import POOLINGS, Groups, OnlineSoftmax, check_pooling, logits_of
from tdabench.rows import Rows, dots, is_sparse, row_blocks, top_k_of

BLOCK_BYTES = 8 << 20  # of float32 rows at a time


@dataclass(frozen=True, eq=False)
class ScanResult:
    """The results of a scan for each query.

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
    def merge(cls, parts: Sequence[ScanResult], starts: Sequence[int], k: int) -> ScanResult:
        """Merges the results of scans of consecutive parts of a corpus that begin at `starts`.

        Raises UsageError without parts.
        """
        if not parts:
            raise UsageError("there is nothing to merge")
        values = np.hstack([p.values for p in parts])
        ids = np.hstack([p.ids + a for p, a in zip(parts, starts)])
        # Ids increase from part to part and ties in a part are in order, so position breaks ties.
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
) -> ScanResult:
    """Scores q . z of all queries with all rows in one pass over `rows`.

    pooling     also pool the whole corpus this way ("softmax-abs", ...); None leaves zeros in
                `pooled` and `sums`, at no cost
    device      multiply on this torch device ("cuda"); None multiplies with numpy
    candidates  of a store with two planes (`int8x2`) the first is read for all rows, and the
                second for this many best rows per query, to put them in their final order; default
                2 k + 50. Sums and pooled scores come from the first plane.

    Raises UsageError for a negative k or an unknown pooling.
    """
    if k < 0:
        raise UsageError(f"cannot return the best {k} examples")
    if pooling is not None and pooling not in POOLINGS:
        raise UsageError(f"unknown pooling {pooling!r}", f"One of: {', '.join(POOLINGS)}")
    if hasattr(rows, "scan"):  # rows in shards, which may be on other machines
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
    return ScanResult(values, ids, whole)


def blocks(rows: Rows) -> Iterator[tuple[int, Any, np.ndarray | None]]:
    """Yields (first row, block [b, d], scales [b] or None); scores are to be multiplied by scales.

    A block is valid until the next one is read.
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
    """Returns a function from a block [b, d] to scores, float32 [query, b]."""
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
    """Finds the best k of the candidates `ids` [query, m] by their full rows."""
    ids = np.sort(ids, axis=1)  # equal scores are ordered by index
    scores = np.empty(ids.shape, dtype=np.float32)
    step = max(1, 4 * BLOCK_BYTES // (4 * max(1, ids.shape[1]) * rows.shape[1]))  # queries
    for a in range(0, len(ids), step):
        some, place = np.unique(ids[a : a + step], return_inverse=True)
        full = rows[some]  # each candidate is read once, in file order
        place = place.reshape(-1, ids.shape[1])
        for i in range(len(place)):
            scores[a + i] = full[place[i]] @ np.asarray(queries[a + i], dtype=np.float32)
    values, order = top_k_of(scores, k)
    return values, np.take_along_axis(ids, order, axis=1)


class _Best:
    """The best k so far of each query.

    Once k scores are known, only scores above a query's k-th can enter: one comparison per score.
    These are few, and sorted once many have accumulated.
    """

    def __init__(self, q: int, k: int) -> None:
        self.k = k
        self.values = np.empty((q, 0), dtype=np.float32)
        self.ids = np.empty((q, 0), dtype=np.int64)
        self.waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # query, value, id
        self.n_waiting = 0

    def add(self, dots: np.ndarray, first: int) -> None:
        """Adds `dots` [query, b], the scores of rows `first`, `first` + 1, ..."""
        q, have = self.values.shape
        if self.k == 0:
            return
        if have < self.k:
            self._merge(*top_k_of(dots, self.k, offset=first))
            return
        # A later row that equals the k-th does not replace it: equal scores are ordered by index.
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
        """Merges scores of later rows, [query, m] each."""
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
    """The whole corpus as one group, pooled block by block."""

    def __init__(self, q: int, pooling: str | None, temperature: float) -> None:
        self.pooling, self.t, self.n = pooling, np.float32(temperature), 0
        self.sums = np.zeros(q)
        self.softmax = OnlineSoftmax(q, 1, np.float32)

    def add(self, dots: np.ndarray) -> None:
        """Adds scores [query, b] of more rows."""
        self.n += dots.shape[1]
        self.sums += dots.sum(axis=1)
        if self.pooling in ("sum", "mean"):
            return
        e = self.softmax.weights(logits_of(dots, self.pooling == "softmax-abs", self.t))
        self.softmax.norm[:, 0] += e.sum(axis=1)
        self.softmax.total[:, 0] += np.einsum("qb,qb->q", e, dots)

    def merged(self, other: Whole) -> Whole:
        """Returns this part of the corpus merged with another."""
        both = Whole(len(self.sums), self.pooling, float(self.t))
        both.softmax.top = np.maximum(self.softmax.top, other.softmax.top)
        for part in (self, other):
            both.n += part.n
            both.sums += part.sums
            if np.isfinite(part.softmax.top).all():
                shrink = np.exp(part.softmax.top - both.softmax.top)[:, None]
                both.softmax.norm += part.softmax.norm * shrink
                both.softmax.total += part.softmax.total * shrink
        return both

    def pooled(self) -> np.ndarray:
        """Returns pooled scores float32 [query]; zero for an empty corpus, or without a pooling."""
        if self.pooling is None or self.n == 0:
            return np.zeros(len(self.sums), dtype=np.float32)
        if self.pooling == "sum":
            return self.sums.astype(np.float32)
        if self.pooling == "mean":
            return (self.sums / self.n).astype(np.float32)
        return (self.softmax.total / self.softmax.norm)[:, 0].astype(np.float32)


# --------------------------------------------------------------------------- groups

_LEAST_NORM = 1e-250  # float64 sums of weights below this have lost members to underflow


def stream_groups(
    queries: Any,  # [query, d] dense or sparse
    rows: Rows,  # [train, d]
    groups: Groups,
    pooling: str = "sum",
    temperature: float = 1.0,
    bytes_a_block: int = 16 << 20,
) -> np.ndarray:
    """Computes pooled scores float32 [query, group], as `pool_scores`, in one pass over `rows`.

    Holds [query, block] and [query, group], never [query, train]. A softmax shares one
    exponential per score among all groups: weights are relative to the largest logit of the query
    so far, and are rescaled when it rises. Groups that underflow on this scale are recomputed
    on their own scale in a second pass.

    Raises UsageError for an unknown pooling or a temperature that is not positive.
    """
    from scipy.sparse import csr_matrix

    check_pooling("stream_groups", pooling, temperature)
    q = queries.shape[0]
    softmax = OnlineSoftmax(q, len(groups))
    sums = np.zeros((q, len(groups)))
    order = np.argsort(groups.indices, kind="stable")
    at, whose = groups.indices[order], np.repeat(np.arange(len(groups)), groups.sizes)[order]
    for first, scores in _score_blocks(queries, rows, bytes_a_block):
        a, b = np.searchsorted(at, [first, first + scores.shape[1]])
        some, group = np.unique(whose[a:b], return_inverse=True)  # groups with a member here
        shape = (len(some), scores.shape[1])
        part: Any = csr_matrix((np.ones(b - a), (group, at[a:b] - first)), shape)
        if part.nnz > 0.02 * np.prod(shape) and part.nnz < bytes_a_block:
            part = part.toarray()
        if pooling in ("sum", "mean"):
            sums[:, some] += (part @ scores.T).T
            continue
        weights = softmax.weights(logits_of(scores, pooling == "softmax-abs", temperature))
        softmax.norm[:, some] += (part @ weights.T).T
        softmax.total[:, some] += (part @ np.multiply(weights, scores, out=weights).T).T
    if pooling == "sum":
        return sums.astype(np.float32)
    if pooling == "mean":
        return (sums / np.maximum(groups.sizes, 1)).astype(np.float32)
    norm = softmax.norm
    total = softmax.total / np.where(norm > 0, norm, 1.0)  # an empty group scores 0
    small = ~(norm > _LEAST_NORM) & (groups.sizes > 0)
    if small.any():
        again = np.flatnonzero(small.any(axis=0))
        own = _on_their_own_scale(
            queries, rows, [groups[int(g)] for g in again], pooling, temperature, bytes_a_block
        )
        total[:, again] = np.where(small[:, again], own, total[:, again])
    return total.astype(np.float32)


def _on_their_own_scale(
    queries: Any,
    rows: Rows,
    groups: Sequence[np.ndarray],
    pooling: str,
    temperature: float,
    bytes_a_block: int,
) -> np.ndarray:
    """Computes softmax-pooled scores float64 [query, group], each relative to its own maximum."""
    shape = (queries.shape[0], len(groups))
    top, norm, total = np.full(shape, -np.inf), np.zeros(shape), np.zeros(shape)
    for first, scores in _score_blocks(queries, rows, bytes_a_block):
        logits = logits_of(scores, pooling == "softmax-abs", temperature)
        for g, members in enumerate(groups):
            a, b = np.searchsorted(members, [first, first + scores.shape[1]])
            if a == b:
                continue
            at = members[a:b] - first
            high = np.maximum(top[:, g], logits[:, at].max(axis=1))
            shrink, e = np.exp(top[:, g] - high), np.exp(logits[:, at] - high[:, None])
            norm[:, g] = norm[:, g] * shrink + e.sum(axis=1)
            total[:, g] = total[:, g] * shrink + (e * scores[:, at]).sum(axis=1)
            top[:, g] = high
    return total / norm


def _score_blocks(queries: Any, rows: Rows, bytes_a_block: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, scores float64 [query, block]) in order, about `bytes_a_block` each."""
    step = max(1, bytes_a_block // (8 * max(1, queries.shape[0])))
    for a, block in row_blocks(rows, bytes_a_block):
        for b in range(0, block.shape[0], step):
            yield a + b, dots(queries, block[b : b + step]).astype(np.float64)
