"""Groups of training examples, and how example scores become group scores.

A group is the training set of a retraining, the result of a selection or the set of a removal.
Groups are in CSR form so that additive group scores are one sparse product.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from tdabench.errors import DataError, UsageError
from tdabench.io import fingerprint

if TYPE_CHECKING:
    import scipy.sparse as sp

Pooling = Literal["sum", "mean", "softmax", "softmax-abs"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


class Groups(Sequence[np.ndarray]):
    """`indptr` [group + 1] and sorted `indices` [member], each below `n_train`.

    Order within a group does not matter, so members are sorted; a repeated member is an error,
    since a truth never trains twice on one example.
    """

    def __init__(self, indptr: np.ndarray, indices: np.ndarray, n_train: int) -> None:
        self.indptr = np.asarray(indptr, dtype=np.int64)
        self.indices = np.asarray(indices, dtype=np.int64).copy()
        self.n_train = int(n_train)
        if len(self.indptr) == 0 or self.indptr[0] != 0 or self.indptr[-1] != len(self.indices):
            raise DataError("groups are damaged: indptr does not span the indices")
        if (np.diff(self.indptr) < 0).any():
            raise DataError("groups are damaged: indptr decreases")
        if len(self.indices) and not (0 <= self.indices.min() and self.indices.max() < n_train):
            raise DataError(f"a group names an example outside the corpus of {n_train}")
        for a, b in zip(self.indptr[:-1], self.indptr[1:]):
            self.indices[a:b].sort()
            if (np.diff(self.indices[a:b]) == 0).any():
                raise DataError("a group names the same example twice")

    @classmethod
    def of(cls, members: Iterable[Iterable[int]], n_train: int) -> Groups:
        """Makes groups from lists of training indices. Raises DataError for an invalid index."""
        lists = [_members(m) for m in members]
        indptr = np.concatenate([[0], np.cumsum([len(m) for m in lists])])
        indices = np.concatenate(lists) if lists else np.empty(0, dtype=np.int64)
        return cls(indptr, indices, n_train)

    @classmethod
    def singletons(cls, n_train: int) -> Groups:
        """Makes one group per example: `score_groups` of them equals `score`."""
        return cls(np.arange(n_train + 1), np.arange(n_train), n_train)

    @classmethod
    def random(
        cls, n_groups: int, n_train: int, fraction: float, rng: np.random.Generator
    ) -> Groups:
        """Draws `n_groups` uniform subsets of round(fraction * n_train) distinct examples."""
        size = round(fraction * n_train)
        if not 0 < size <= n_train:
            raise UsageError(f"a group fraction of {fraction} of {n_train} examples is {size}")
        return cls.of((rng.choice(n_train, size, replace=False) for _ in range(n_groups)), n_train)

    @classmethod
    def joined(cls, parts: Sequence[Groups]) -> Groups:
        """Joins the groups of all parts, in order. Raises DataError if their corpora differ."""
        sizes = {p.n_train for p in parts}
        if len(sizes) != 1:
            raise DataError(f"groups over corpora of {sorted(sizes)} examples cannot be joined")
        starts = np.cumsum([0, *(len(p.indices) for p in parts)])
        indptr = [p.indptr[:-1] + a for p, a in zip(parts, starts)]
        indices = np.concatenate([p.indices for p in parts])
        return cls(np.concatenate([*indptr, starts[-1:]]), indices, sizes.pop())

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, g):
        if isinstance(g, slice):
            return Groups.of([self[i] for i in range(*g.indices(len(self)))], self.n_train)
        if not -len(self) <= g < len(self):
            raise IndexError(g)
        g = g % len(self)
        return self.indices[self.indptr[g] : self.indptr[g + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[g] for g in range(len(self)))

    @property
    def sizes(self) -> np.ndarray:
        """Number of members per group: [group]."""
        return np.diff(self.indptr)

    def membership(self, dtype: type = np.float32) -> sp.csr_matrix:
        """Returns the 0/1 matrix [group, train]."""
        import scipy.sparse as sp

        ones: np.ndarray = np.ones(len(self.indices), dtype=dtype)
        return sp.csr_matrix((ones, self.indices, self.indptr), (len(self), self.n_train))

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.n_train, self.indptr.tolist(), self.indices.tolist()])


def _members(members: Iterable[int]) -> np.ndarray:
    """Converts to int64 [member]; refuses fractions, strings and booleans, unlike numpy."""
    try:
        array = np.asarray(list(members))
    except (TypeError, ValueError, OverflowError) as e:
        raise DataError(f"a group must be a list of training indices: {e}") from e
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise DataError("a group must be a list of training indices")
    return array.astype(np.int64)


def check_pooling(who: str, pooling: str, temperature: float) -> None:
    """Raises UsageError naming `who` for an unknown pooling or a non-positive temperature."""
    if pooling not in POOLINGS:
        raise UsageError(f"{who}: unknown pooling {pooling!r}", f"One of: {', '.join(POOLINGS)}")
    if not temperature > 0:
        raise UsageError(f"{who}: temperature must be positive, not {temperature}")


def pool_scores(
    scores: np.ndarray,  # [query, train]
    groups: Groups,
    pooling: str = "sum",
    temperature: float = 1.0,
) -> np.ndarray:
    """Pools example scores into group scores [query, group], float32.

    `sum` and `mean` add; `softmax` weights each member by exp(s / T) and `softmax-abs` by
    exp(|s| / T), normalised within the group (AirRep, arXiv 2505.18513, eq. 5). An empty group
    scores 0.

    Raises UsageError for an unknown pooling or a temperature that is not positive.
    """
    scores = np.asarray(scores, dtype=np.float32)
    if scores.ndim != 2 or scores.shape[1] != groups.n_train:
        raise UsageError(f"scores {scores.shape} do not cover {groups.n_train} training examples")
    if pooling not in POOLINGS:
        raise UsageError(f"unknown pooling {pooling!r}", f"One of: {', '.join(POOLINGS)}")
    if not temperature > 0:
        raise UsageError(f"pooling temperature must be positive, not {temperature}")
    if len(groups) == 0 or groups.n_train == 0:
        return np.zeros((len(scores), len(groups)), dtype=np.float32)
    member = _member_matrix(groups)
    if pooling in ("sum", "mean"):
        pooled = _times(scores, member)
        if pooling == "mean":
            pooled = pooled / np.maximum(groups.sizes, 1).astype(np.float32)
        return pooled

    return _softmax_pool(scores, groups, member, pooling == "softmax-abs", np.float32(temperature))


LEAST_LOGIT = np.float32(-80)  # below the largest; lower ones give slow subnormals
_BLOCK_BYTES = 16 << 20  # of scores per thread at a time: products of this size run at full speed
_ALL_BYTES = 64 << 20  # of scores of all threads at a time
_CACHE_BYTES = 1 << 19  # of scores per thread within a block: fits in a core's own cache


def _softmax_pool(
    scores: np.ndarray,
    groups: Groups,
    member: sp.csr_matrix | np.ndarray,
    absolute: bool,
    t: np.float32,
) -> np.ndarray:
    """Pools by attention, in blocks of queries: [query, train] -> [query, group].

    All groups share one exponential per example: a softmax within a group only needs the same
    shift in numerator and denominator, and one product with the membership gives both. If a whole
    group is so far below the row's maximum that it underflows, its entry is recomputed with the
    group's own shift.

    Each thread computes whole blocks, product included, since a product on all threads would wait
    for them after every block.
    """
    q, n = scores.shape
    out = np.empty((q, len(groups)), dtype=np.float32)
    most = threads()
    step = max(1, min(-(-q // most), min(_BLOCK_BYTES, _ALL_BYTES // most) // (4 * n)))
    few = max(1, _CACHE_BYTES // (4 * n))
    own = threading.local()

    def exponentials(s: np.ndarray, e: np.ndarray, weighted: np.ndarray) -> None:
        """Computes exp(logit - largest) and that times the scores, [few, train] each."""
        logits = s if t == 1 and not absolute else logits_of(s, absolute, t, out=e)
        top = logits.max(axis=1, keepdims=True)
        lowest = 0 if absolute else logits.min(axis=1, keepdims=True)
        subnormal = bool((lowest - top < LEAST_LOGIT).any())
        np.subtract(logits, top, out=e)
        if subnormal:
            np.maximum(e, LEAST_LOGIT, out=e)
        np.multiply(np.exp(e, out=e), s, out=weighted)

    def block(a: int) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = np.empty((2 * step, n), dtype=np.float32)
        b = min(step, q - a)
        e, weighted = own.buffer[:b], own.buffer[b : 2 * b]
        for c in range(0, b, few):
            rows = slice(c, min(c + few, b))
            exponentials(scores[a : a + b][rows], e[rows], weighted[rows])
        both = _times(own.buffer[: 2 * b], member)
        norm = both[:b]
        with np.errstate(divide="ignore", invalid="ignore"):
            np.divide(both[b:], norm, out=out[a : a + b])
        for i, g in zip(*np.nonzero(~(norm > 1e-25))):
            members = scores[a + i, groups[int(g)]]
            out[a + i, g] = _softmax_sum(members, absolute, t) if len(members) else 0.0

    if most == 1 or 16 * scores.size <= _BLOCK_BYTES:  # a few milliseconds
        for a in range(0, q, step):
            block(a)
        return out
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(most) as pool:
        list(pool.map(block, range(0, q, step)))
    return out


def _softmax_sum(s: np.ndarray, absolute: bool, t: np.float32) -> np.floating:
    """Pools the members' scores [member] by attention."""
    logits = logits_of(s, absolute, t, out=np.empty_like(s))
    w = np.exp(logits - logits.max())
    return (w * s).sum() / w.sum()


def logits_of(
    s: np.ndarray, absolute: bool, t: float | np.floating, out: np.ndarray | None = None
) -> np.ndarray:
    """Returns the logits of a softmax, s / T or |s| / T, in a new array or `out`."""
    if absolute:
        s = np.abs(s, out=out)
    return s if absolute and t == 1 else np.divide(s, t, out=out)


class OnlineSoftmax:
    """Sums with weights exp(logit - top) over blocks, `top` being a query's largest logit so far.

    `norm` [query, group] sums weights and `total` [query, group] weighted scores; the caller adds
    to both what `weights` gives. Both are rescaled when a block raises `top` [query].
    """

    def __init__(self, q: int, n_groups: int, dtype: type = np.float64) -> None:
        self.top: np.ndarray = np.full(q, -np.inf, dtype=dtype)
        self.norm, self.total = np.zeros((q, n_groups)), np.zeros((q, n_groups))

    def weights(self, logits: np.ndarray) -> np.ndarray:
        """Converts `logits` [query, block] in place to weights relative to the new `top`."""
        high = np.maximum(self.top, logits.max(axis=1))
        rises = np.flatnonzero(~(high <= self.top))
        if len(rises):
            shrink = np.exp(self.top[rises] - high[rises])[:, None]
            self.norm[rises] *= shrink
            self.total[rises] *= shrink
            self.top = high
        logits -= self.top[:, None]
        if logits.dtype == np.float32:
            np.maximum(logits, LEAST_LOGIT, out=logits)
        return np.exp(logits, out=logits)


def threads() -> int:
    """Returns the number of threads to use: as many as the numerical libraries may use."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    if allowed.isdigit() and int(allowed):
        return int(allowed)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _member_matrix(groups: Groups) -> sp.csr_matrix | np.ndarray:
    """Returns dense [train, group] if that product is faster, else sparse [group, train]."""
    density = len(groups.indices) / max(1, len(groups) * groups.n_train)
    member = groups.membership()
    small = len(groups) * groups.n_train <= 64 << 20
    return member.T.toarray(order="C") if density > 0.02 and small else member


def _times(a: np.ndarray, member: sp.csr_matrix | np.ndarray) -> np.ndarray:
    """Multiplies a [query, train] by the membership -> [query, group]."""
    if isinstance(member, np.ndarray):
        return a @ member
    return np.ascontiguousarray((member @ a.T).T)
