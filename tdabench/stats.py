"""Statistics of a benchmark: Spearman LDS, its uncertainty, its ceiling, and who beats whom.

Pure numpy on flat arrays (scipy only for the Student tail, imported when asked for). Shapes:
scores and truth are [query, group]; a truth by seed is [seed, query, group]; bootstrap replicates
are [replicate]. docs/statistics.md derives what is here and shows how well it holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tdabench.errors import DataError, MethodError, UsageError
from tdabench.seeds import named_seed

LEVEL = 0.95

# --------------------------------------------------------------------------- ranks


@dataclass(frozen=True)
class _Order:
    """Where each item's tie block begins and ends in its sorted row: [row, item] each.

    With weights summed up along the sorted row, an item's average rank is read off at these
    two places; a row is sorted once, however often it is re-weighted.
    """

    order: np.ndarray  # item at each sorted place
    low: np.ndarray  # first sorted place of the item's tie block
    high: np.ndarray  # one past its last

    @classmethod
    def of(cls, a: np.ndarray) -> _Order:
        rows, n = a.shape
        order = np.argsort(a, axis=1)  # within a tie block any order will do
        s = np.take_along_axis(a, order, axis=1)
        new = np.ones((rows, n), dtype=bool)  # a tie block begins here
        new[:, 1:] = s[:, 1:] != s[:, :-1]
        place = np.arange(n)
        item_low = np.empty_like(order)
        if new.all():  # no ties, as nearly always: a block is a place
            np.put_along_axis(item_low, order, place[None], axis=1)
            return cls(order, item_low, item_low + 1)
        low = np.maximum.accumulate(np.where(new, place, 0), axis=1)
        ends = np.roll(new, -1, axis=1)  # a tie block ends here
        if n:
            ends[:, -1] = True
        high = np.where(ends, place + 1, n)[:, ::-1]
        high = np.minimum.accumulate(high, axis=1)[:, ::-1]
        item_high = np.empty_like(order)
        np.put_along_axis(item_low, order, low, axis=1)
        np.put_along_axis(item_high, order, high, axis=1)
        return cls(order, item_low, item_high)


def average_ranks(a: np.ndarray) -> np.ndarray:
    """Ranks from 1 along the last axis, equal values sharing their mean rank: float64, a's shape.

    Raises MethodError for NaN.
    """
    a = np.asarray(a)
    flat = a.reshape(-1, a.shape[-1])
    _refuse_nan(flat, "values to rank")
    o = _Order.of(flat)
    return ((o.low + o.high + 1) / 2).reshape(a.shape)


def constant_rows(a: np.ndarray) -> np.ndarray:
    """Which rows of [query, group] hold one value only, and so rank nothing: bool [query]."""
    a = np.asarray(a)
    if a.shape[1] == 0:
        return np.ones(len(a), dtype=bool)
    return a.max(axis=1) == a.min(axis=1)


def spearman_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each row of a [query, group] with that of b: float64 [query].

    Pearson's correlation of average ranks, which is what scipy.stats.spearmanr gives. A row that
    is constant in either argument counts as 0: it ranks nothing, which is what chance would do.

    Raises UsageError when shapes differ and MethodError for NaN.
    """
    a, b = _pair(a, b)
    x = average_ranks(a) - (a.shape[1] + 1) / 2
    y = average_ranks(b) - (b.shape[1] + 1) / 2
    cov = (x * y).sum(axis=1)
    return _ratio(cov, (x * x).sum(axis=1), (y * y).sum(axis=1))


def lds(scores: np.ndarray, truth: np.ndarray) -> float:
    """Linear datamodelling score: the mean over queries of `spearman_rows` (arXiv 2303.14186)."""
    return float(spearman_rows(scores, truth).mean())


def _ratio(cov: np.ndarray, va: np.ndarray, vb: np.ndarray) -> np.ndarray:
    """cov / sqrt(va vb) in [-1, 1], and 0 where either variance is 0."""
    norm = np.sqrt(va.astype(np.float64) * vb.astype(np.float64))
    out = np.divide(cov, norm, out=np.zeros_like(norm), where=norm > 0)
    return np.clip(out, -1.0, 1.0)


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 2 or a.shape != b.shape:
        raise UsageError(f"scores {a.shape} and truth {b.shape} are not both [query, group]")
    _refuse_nan(a, "scores")
    _refuse_nan(b, "truth")
    return a, b


def _refuse_nan(a: np.ndarray, what: str) -> None:
    bad = np.isnan(a).any(axis=1).sum()
    if bad:
        raise MethodError(f"the {what} hold NaN in {bad} of {len(a)} rows")


# --------------------------------------------------------------------------- bootstrap


def resampling_weights(n: int, replicates: int, seed: int, name: str) -> np.ndarray:
    """How often each of n items is drawn in each replicate, with replacement: [n, replicate].

    Depends on n, `replicates`, `seed` and `name` only, so that any two methods scored on the
    same queries and groups meet the same draws: that is what pairs their replicates.
    """
    rng = np.random.default_rng(named_seed(seed, f"bootstrap-{name}"))
    return rng.multinomial(n, np.full(n, 1.0 / n), size=replicates).T.astype(np.float32)


@dataclass(frozen=True)
class Bootstrap:
    """A statistic, and its replicates when queries, groups or both are drawn again.

    `value` is the statistic itself; `both`, `queries` and `groups` are [replicate]. `groups` is
    None when the statistic has no groups: then `both` and `queries` are the same. Two Bootstraps
    on the same data are paired: their difference is again one.
    """

    value: float
    both: np.ndarray
    queries: np.ndarray
    groups: np.ndarray | None = None
    df: int = 1  # min(queries, groups) - 1

    def __sub__(self, other: Bootstrap) -> Bootstrap:
        return self.combine(other, np.subtract)

    def combine(self, other: Bootstrap, f: np.ufunc) -> Bootstrap:
        """f of two paired statistics: np.subtract for an effect, np.divide for a share.

        Raises UsageError when the replicates cannot be paired.
        """
        if self.both.shape != other.both.shape or (self.groups is None) != (other.groups is None):
            raise UsageError(
                "these replicates are not paired: their number or kind differs",
                "Score both methods with the same benchmark settings",
            )
        groups = None
        if self.groups is not None and other.groups is not None:
            groups = f(self.groups, other.groups)
        return Bootstrap(
            float(f(self.value, other.value)),
            f(self.both, other.both),
            f(self.queries, other.queries),
            groups,
            min(self.df, other.df),
        )

    @classmethod
    def mean(cls, parts: Sequence[Bootstrap]) -> Bootstrap:
        """The mean of statistics on the same queries, with paired replicates."""
        groups = [b.groups for b in parts if b.groups is not None]
        if {len(b.both) for b in parts} != {len(parts[0].both)} or len(groups) % len(parts):
            raise UsageError("these replicates are not paired: their number or kind differs")
        return cls(
            float(np.mean([b.value for b in parts])),
            np.mean([b.both for b in parts], axis=0),
            np.mean([b.queries for b in parts], axis=0),
            np.mean(groups, axis=0) if groups else None,
            min(b.df for b in parts),
        )

    @property
    def variance(self) -> float:
        """Variance of the statistic over fresh queries and groups; NaN for fewer than two.

        Drawing queries and groups again at once counts the query-by-group part three times
        (Owen 2007, "The pigeonhole bootstrap"). Drawing them one at a time counts it once each,
        so that adding the two and taking it off once leaves every part counted once: the
        two-way cluster variance of Cameron, Gelbach and Miller (2011).
        """
        if self.df < 1:
            return float("nan")
        v_queries = float(self.queries.var())
        if self.groups is None:
            return v_queries
        v_groups = float(self.groups.var())
        v_cells = float((self.both - self.queries - self.groups).var())
        return max(v_queries + v_groups - v_cells, v_queries, v_groups)

    def interval(self, level: float = LEVEL) -> tuple[float, float] | None:
        """The replicates' percentiles, centred on the value and scaled to `variance`.

        The scale also carries Student's factor for few queries or groups. None when there are
        fewer than two of either.
        """
        if self.df < 1:
            return None
        spread = float(self.both.std())
        if spread == 0:
            return self.value, self.value
        scale = np.sqrt(self.variance) / spread * _student_factor(level, self.df)
        tails = np.quantile(self.both - self.both.mean(), [(1 - level) / 2, (1 + level) / 2])
        low, high = self.value + scale * tails
        return float(low), float(high)

    def p_value(self) -> float:
        """Two-sided p-value for "the statistic is 0": Student's t on the bootstrap variance.

        The tail is taken from Student's t and not by counting replicates, whose smallest
        p-value of 1/replicates would never survive Holm's correction over many methods.
        """
        from scipy.special import stdtr

        if self.value == 0:
            return 1.0
        variance = self.variance
        if not np.isfinite(variance):
            return 1.0
        if variance == 0:
            return 0.0
        return float(2 * stdtr(self.df, -abs(self.value) / np.sqrt(variance)))

    def arrays(self) -> dict[str, np.ndarray]:
        """What a record stores beside `replicates` so that comparisons can be recomputed."""
        out = {
            "replicates_queries": self.queries.astype(np.float64),
            "replicates_df": np.array([self.df]),
        }
        if self.groups is not None:
            out["replicates_groups"] = self.groups.astype(np.float64)
        return out

    @classmethod
    def of_record(
        cls, value: float, per_query: np.ndarray, arrays: Mapping[str, np.ndarray]
    ) -> Bootstrap:
        """From a record's arrays: `replicates`, and those that `arrays` wrote, where present.

        A record that stores `replicates` alone drew queries only.
        """
        both = np.asarray(arrays["replicates"], dtype=np.float64)
        queries = np.asarray(arrays.get("replicates_queries", both), dtype=np.float64)
        groups = arrays.get("replicates_groups")
        df = len(per_query) - 1
        if "replicates_df" in arrays:
            df = int(arrays["replicates_df"][0])
        return cls(value, both, queries, groups, df)


def _student_factor(level: float, df: int) -> float:
    from scipy.special import ndtri, stdtrit

    return float(stdtrit(df, (1 + level) / 2) / ndtri((1 + level) / 2))


def bootstrap_queries(values: np.ndarray, replicates: int = 1000, seed: int = 0) -> Bootstrap:
    """The mean of `values` [query] when queries are drawn again."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        raise DataError("no queries to average over")
    # Centred first: identical values must have identical means, whatever is drawn.
    mean = float(values.mean())
    means = mean + (values - mean) @ resampling_weights(n, replicates, seed, "queries") / n
    return Bootstrap(mean, means, means, None, n - 1)


def bootstrap_clusters(
    values: np.ndarray, clusters: Sequence[str], replicates: int = 1000, seed: int = 0
) -> Bootstrap:
    """The mean over clusters of their mean `values` [query], when clusters are drawn again.

    For queries that share a retraining, or a task: those of one cluster are not independent.
    """
    values, names = np.asarray(values, dtype=np.float64), sorted(set(clusters))
    member = np.array([names.index(c) for c in clusters])
    means = [values[member == i].mean() for i in range(len(names))]
    return bootstrap_queries(np.array(means), replicates, seed)


def bootstrap_lds(
    scores: np.ndarray,
    truth: np.ndarray,
    replicates: int = 1000,
    seed: int = 0,
    groups_seed: int | None = None,
) -> Bootstrap:
    """LDS when queries and groups are drawn again, queries sharing the groups drawn.

    A retrained model's loss enters every query, so that queries are not independent: drawing
    queries alone would understate the uncertainty. scores, truth: [query, group]. `groups_seed`
    draws the groups apart, for statistics over truths with different groups.

    Raises UsageError for shapes that differ and MethodError for NaN.
    """
    a, b = _pair(scores, truth)
    per_query = spearman_rows(a, b)
    groups_seed = seed if groups_seed is None else groups_seed
    weights = resampling_weights(a.shape[1], replicates, groups_seed, "groups")
    return _two_way(per_query, spearman_replicates(a, b, weights), a.shape[1], seed)


def _two_way(
    per_query: np.ndarray,  # [query]
    again: np.ndarray,  # [query, replicate]: the same with groups drawn again
    n_groups: int,
    seed: int,
) -> Bootstrap:
    n, replicates = again.shape
    if n == 0:
        raise DataError("no queries to average over")
    w = resampling_weights(n, replicates, seed, "queries").astype(np.float64)
    mean = float(per_query.mean())
    return Bootstrap(
        mean,
        np.einsum("qr,qr->r", w, again) / n,
        mean + (per_query - mean) @ w / n,
        again.mean(axis=0, dtype=np.float64),
        min(n, n_groups) - 1,
    )


def spearman_replicates(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`spearman_rows` with group g counted weights[g, r] times: float32 [query, replicate].

    Rows are sorted once. Summing weights along the sorted row gives every replicate's average
    ranks at once, by whole rows of replicates, which is what makes this fast.
    """
    order_a, order_b = _Order.of(a), _Order.of(b)
    n_groups, replicates = weights.shape
    out = np.empty((len(a), replicates), dtype=np.float32)
    step = max(32, (1 << 17) // max(1, n_groups))  # temporaries stay in the processor's cache
    for r in range(0, replicates, step):
        w = np.ascontiguousarray(weights[:, r : r + step], dtype=np.float32)
        middle = w.sum(axis=0) / 2  # [replicate]: the weighted mean of ranks (less one half)
        sums_a, sums_b = np.zeros((2, n_groups + 1, w.shape[1]), dtype=np.float32)
        for q in range(len(a)):
            x = _weighted_ranks(order_a, q, w, middle, sums_a)  # [group, replicate]
            y = _weighted_ranks(order_b, q, w, middle, sums_b)
            wx = w * x
            wx_x, wx_y = np.einsum("gr,gr->r", wx, x), np.einsum("gr,gr->r", wx, y)
            wy_y = np.einsum("gr,gr->r", w * y, y)
            out[q, r : r + step] = _ratio(wx_y, wx_x, wy_y)
    return out


def _weighted_ranks(
    o: _Order, q: int, w: np.ndarray, middle: np.ndarray, sums: np.ndarray
) -> np.ndarray:
    """Centred average ranks of row q under weights w [group, replicate]: [group, replicate]."""
    np.cumsum(w[o.order[q]], axis=0, out=sums[1:])
    ranks = sums[o.low[q]]
    ranks += sums[o.high[q]]
    ranks *= 0.5
    ranks -= middle
    return ranks


# --------------------------------------------------------------------------- ceiling


@dataclass(frozen=True)
class Ceiling:
    """How well a predictor could do at best against a truth that is itself noisy.

    `value` estimates the LDS of a predictor that knows each group's *expected* loss (over
    training seeds) exactly. `split_half` is the mean Spearman of disjoint halves of the seeds,
    `reliability` its Spearman-Brown correction to all seeds, `bootstrap` the ceiling's
    replicates, paired with those of `bootstrap_lds`.
    """

    value: float
    split_half: float
    reliability: float
    per_query: np.ndarray  # [query]
    n_seeds: int
    bootstrap: Bootstrap

    def interval(self, level: float = LEVEL) -> tuple[float, float] | None:
        found = self.bootstrap.interval(level)
        return None if found is None else (max(0.0, found[0]), min(1.0, found[1]))

    def share(self, lds: Bootstrap) -> Bootstrap:
        """LDS as a share of the ceiling, with paired replicates."""
        return lds.combine(self.bootstrap, np.divide)

    def as_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Arrays and numbers from which `of_arrays` makes it again."""
        b = self.bootstrap
        assert b.groups is not None
        numbers = {"value": self.value, "split_half": self.split_half, "n_seeds": self.n_seeds}
        return (
            {"per_query": self.per_query, "both": b.both, "queries": b.queries, "groups": b.groups},
            {**numbers, "reliability": self.reliability, "df": b.df},
        )

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> Ceiling:
        value = float(numbers["value"])
        parts = (arrays["both"], arrays["queries"], arrays["groups"])
        return cls(
            value,
            float(numbers["split_half"]),
            float(numbers["reliability"]),
            arrays["per_query"],
            int(numbers["n_seeds"]),
            Bootstrap(value, *parts, int(numbers["df"])),
        )


CEILING_VERSION = 1  # raise it when `noise_ceiling` gives other numbers
MAX_SPLITS = 35  # all halvings of 8 seeds
BOOTSTRAP_SPLITS = 3  # all halvings of 4 seeds


def noise_ceiling(truth: np.ndarray, replicates: int = 1000, seed: int = 0) -> Ceiling | None:
    """The ceiling of LDS against the seed-mean of truth [seed, query, group]; None for one seed.

    With y = mu + noise a seed, mu the expected value, the correlation of mu with the mean of S
    seeds is sqrt(reliability), and the reliability is the correlation that two such means would
    have. It is estimated by halving the seeds: r between means of h = S // 2 seeds each, then
    Spearman and Brown's k r / (1 + (k - 1) r), k = S / h, averaged over halvings and queries.
    Queries differ in reliability and the root is concave, so it is the mean of roots that bounds
    a mean over queries: each query's r is first shrunk towards the mean until their variance
    is the part that disjoint halves of the groups agree on; the rest is sampling error.

    None as well when the halves do not agree at all (mean r not above 0): no predictor can be
    told from chance against such a truth.
    """
    truth = np.asarray(truth, dtype=np.float64)
    if truth.ndim != 3:
        raise UsageError(f"a truth by seed is [seed, query, group], not {truth.shape}")
    n_seeds, n_queries, n_groups = truth.shape
    if n_seeds < 2 or n_queries < 1 or n_groups < 2:
        return None
    _refuse_nan(truth.reshape(-1, n_groups), "truth")
    halves = _halvings(n_seeds, seed)
    k = n_seeds / (n_seeds // 2)

    r = np.mean([spearman_rows(*_half_means(truth, h)) for h in halves], axis=0)  # [query]
    mean = float(r.mean())
    if mean <= 0:
        return None
    agreed = _variance_between_queries(truth, halves, seed)
    spread = r.var()
    shrink = np.sqrt(min(1.0, max(0.0, agreed) / spread)) if spread > 0 else 0.0
    shrunk = np.clip(mean + shrink * (r - mean), 0.0, 1.0)
    per_query = np.sqrt(spearman_brown(shrunk, k))
    value = float(per_query.mean())

    # A replicate moves the mean r; the spread between queries, a second-order matter, stays.
    w = resampling_weights(n_groups, replicates, seed, "groups")
    again = np.mean(
        [spearman_replicates(*_half_means(truth, h), w) for h in halves[:BOOTSTRAP_SPLITS]], axis=0
    )
    first = np.mean(
        [spearman_rows(*_half_means(truth, h)) for h in halves[:BOOTSTRAP_SPLITS]], axis=0
    )
    moved = _two_way(first, again, n_groups, seed)
    at_mean = float(np.sqrt(spearman_brown(mean, k)))

    def ceiling_at(x: np.ndarray) -> np.ndarray:
        # A resample of groups lowers r slightly on average; only its movement is wanted.
        r = np.clip(mean + (x - x.mean()), 1e-3, 1.0)
        return value / at_mean * np.sqrt(spearman_brown(r, k))

    assert moved.groups is not None
    boot = Bootstrap(
        value,
        ceiling_at(moved.both),
        ceiling_at(moved.queries),
        ceiling_at(moved.groups),
        moved.df,
    )
    reliability = float(spearman_brown(mean, k))
    return Ceiling(value, mean, reliability, per_query, n_seeds, boot)


def spearman_brown(r: np.ndarray | float, k: float) -> np.ndarray:
    """Reliability of a mean over k times as many seeds as r's, r in [0, 1]."""
    r = np.asarray(r, dtype=np.float64)
    return k * r / (1 + (k - 1) * r)


Halving = tuple[tuple[int, ...], tuple[int, ...]]


def _halvings(n: int, seed: int) -> list[Halving]:
    """Disjoint pairs of n // 2 seeds: every one, or `MAX_SPLITS` drawn by a named seed."""
    h = n // 2
    if n <= 8:
        firsts = itertools.combinations(range(n), h)
        pairs = [
            (a, b)
            for a in firsts
            for b in itertools.combinations([i for i in range(n) if i not in a], h)
            if a < b
        ]
    else:
        pairs = []
    rng = np.random.default_rng(named_seed(seed, "seed-halvings"))
    if pairs and len(pairs) <= MAX_SPLITS:
        return [pairs[i] for i in rng.permutation(len(pairs))]
    drawn = (rng.permutation(n) for _ in range(MAX_SPLITS))
    return [(tuple(p[:h].tolist()), tuple(p[h : 2 * h].tolist())) for p in drawn]


def _half_means(truth: np.ndarray, halving: Halving) -> tuple[np.ndarray, np.ndarray]:
    a, b = halving
    return truth[list(a)].mean(axis=0), truth[list(b)].mean(axis=0)


def _variance_between_queries(truth: np.ndarray, halves: list[Halving], seed: int) -> float:
    """Variance of the true split-half r between queries.

    Two disjoint halves of the groups err independently, so that the covariance over queries of
    what they show is the variance of what is true.
    """
    n_groups = truth.shape[2]
    if n_groups < 8 or truth.shape[1] < 2:
        return 0.0
    rng = np.random.default_rng(named_seed(seed, "group-halvings"))
    covariances = []
    for _ in range(10):
        p = rng.permutation(n_groups)
        parts = p[: n_groups // 2], p[n_groups // 2 :]
        r1, r2 = (
            np.mean(
                [
                    spearman_rows(*_half_means(truth[:, :, part], h))
                    for h in halves[:BOOTSTRAP_SPLITS]
                ],
                axis=0,
            )
            for part in parts
        )
        covariances.append(float(np.cov(r1, r2)[0, 1]))
    return float(np.mean(covariances))


# --------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Comparison:
    """Effect of one method over another, with its interval and two-sided p-value."""

    effect: float
    low: float | None
    high: float | None
    p: float

    def verdict(self, alpha: float = 0.05, higher_is_better: bool = True) -> str:
        """`better`, `worse` or `tied` (not told apart at `alpha`)."""
        if self.p >= alpha:
            return "tied"
        return "better" if (self.effect > 0) == higher_is_better else "worse"


def compare(a: Bootstrap, b: Bootstrap, level: float = LEVEL) -> Comparison:
    """a - b from paired replicates. Raises UsageError when they are not paired."""
    d = a - b
    low, high = d.interval(level) or (None, None)
    return Comparison(d.value, low, high, d.p_value())


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979)."""
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * np.arange(len(p), 0, -1)
    out = np.empty_like(p)
    out[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return out


@dataclass(frozen=True)
class Ranking:
    """Methods, best first, with ranks that admit ties.

    `ranks[i]` is the place of `labels[i]`; `shared[i]` says whether others hold it as well;
    `p` maps (label, label) to the Holm-adjusted p-value of the pair.
    """

    labels: tuple[str, ...]
    ranks: tuple[int, ...]
    shared: tuple[bool, ...]
    p: Mapping[tuple[str, str], float]

    def text(self, label: str) -> str:
        """`1`, or `2=` for a shared rank."""
        i = self.labels.index(label)
        return f"{self.ranks[i]}{'=' if self.shared[i] else ''}"


def rank_groups(
    results: Mapping[str, Bootstrap], alpha: float = 0.05, higher_is_better: bool = True
) -> Ranking:
    """Ranks methods; those that cannot be told from the best of their group share its rank.

    The rule: sort by value. The best opens a group; each next method joins it unless the paired
    test tells the two apart at `alpha` (Holm-corrected over all pairs), in which case it opens
    the next group. A group's rank is one more than the number of methods above it.
    """
    sign = -1 if higher_is_better else 1
    labels = sorted(results, key=lambda m: (sign * results[m].value, m))
    pairs = list(itertools.combinations(labels, 2))
    adjusted = holm([compare(results[a], results[b]).p for a, b in pairs])
    p = {pair: float(v) for pair, v in zip(pairs, adjusted)}
    ranks: list[int] = []
    leader = ""
    for i, label in enumerate(labels):
        if not leader or p[leader, label] < alpha:
            leader = label
            ranks.append(i + 1)
        else:
            ranks.append(ranks[-1])
    shared = tuple(ranks.count(r) > 1 for r in ranks)
    return Ranking(tuple(labels), tuple(ranks), shared, p | {(b, a): v for (a, b), v in p.items()})


# --------------------------------------------------------------------------- sources of variance


@dataclass(frozen=True)
class VarianceSources:
    """Variance of an LDS by where it comes from, each the part it adds to the LDS's variance.

    `queries` and `groups` are main effects, `cells` the query-by-group part, which includes the
    noise of finitely many truth seeds; `truth_seeds` estimates that noise alone (None for one
    seed). `method_seeds` is the variance between builds of the method (None for one build).
    """

    queries: float
    groups: float
    cells: float
    truth_seeds: float | None
    method_seeds: float | None


def variance_sources(
    lds: Bootstrap,
    scores: np.ndarray,
    truth: np.ndarray,
    method_values: Sequence[float] = (),
) -> VarianceSources:
    """Splits the variance of `lds`. scores [query, group], truth [seed, query, group].

    `method_values` are the LDS of builds that differ in the method's seed only. The part of the
    truth's seeds is the jackknife over seeds.
    """
    if lds.groups is None:
        raise UsageError("this statistic has no groups to split the variance by")
    cells = float((lds.both - lds.queries - lds.groups).var())
    n = len(truth)
    seeds = None
    if n > 1:
        total = truth.sum(axis=0)
        left_out = [spearman_rows(scores, (total - t) / (n - 1)).mean() for t in truth]
        seeds = float((n - 1) * np.var(left_out))
    method = float(np.var(method_values, ddof=1)) if len(method_values) > 1 else None
    return VarianceSources(
        max(0.0, float(lds.queries.var()) - cells),
        max(0.0, float(lds.groups.var()) - cells),
        cells,
        seeds,
        method,
    )


# --------------------------------------------------------------------------- retrieval


def tie_blocks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Where the relevant ones of `scores` [item] stand, best first: int64 [block, 4].

    One row a block of equal scores with something relevant in it: items above it, relevant
    items above it, its size, relevant items in it. Every measure of retrieval follows from them.
    """
    scores, relevant = np.asarray(scores), np.asarray(relevant, dtype=bool)
    if scores.ndim != 1 or scores.shape != relevant.shape:
        raise UsageError(f"scores {scores.shape} and labels {relevant.shape} do not match")
    _refuse_nan(scores[None], "scores")
    order = np.argsort(-scores, kind="stable")
    s, hits = scores[order], np.concatenate([[0], np.cumsum(relevant[order])])
    edges = np.concatenate([[0], np.flatnonzero(s[1:] != s[:-1]) + 1, [len(s)]])
    a, b = edges[:-1], edges[1:]
    blocks = np.stack([a, hits[a], b - a, hits[b] - hits[a]], axis=1)
    return blocks[blocks[:, 3] > 0].astype(np.int64)


def average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Average precision of `scores` [item], its expectation over orders of tied items.

    Constant scores give what a random order gives on average. NaN when nothing is relevant.
    McSherry and Najork, "Computing information retrieval performance measures efficiently in the
    presence of tied scores" (ECIR 2008).
    """
    return precision_of(tie_blocks(scores, relevant))


def precision_of(blocks: np.ndarray) -> float:
    """Average precision from `tie_blocks`."""
    if len(blocks) == 0:
        return float("nan")
    gained = 0.0
    for above, hits, size, in_block in blocks.tolist():
        i = np.arange(size)  # place within the block
        others = i * (in_block - 1) / max(1, size - 1)  # relevant before it, given it is
        gained += float((in_block / size * (hits + 1 + others) / (above + 1 + i)).sum())
    return gained / float(blocks[:, 3].sum())


def reciprocal_of(blocks: np.ndarray) -> float:
    """1 / rank of the first relevant item, from `tie_blocks`: its expectation over orders of ties.

    0 when nothing is relevant.
    """
    if len(blocks) == 0:
        return 0.0
    above, _, size, in_block = blocks[0].tolist()
    # P(the first relevant one of the block stands at i) by successive draws.
    expected, none_yet = 0.0, 1.0
    for i in range(size - in_block + 1):
        here = in_block / (size - i)
        expected += none_yet * here / (above + 1 + i)
        none_yet *= 1 - here
    return expected


def recall_of(blocks: np.ndarray, k: int) -> float:
    """Share of the relevant items among the k best, from `tie_blocks`: its expectation over ties.

    NaN when nothing is relevant.
    """
    if len(blocks) == 0:
        return float("nan")
    above, _, size, in_block = blocks.T
    found = in_block * np.clip(k - above, 0, size) / size
    return float(found.sum() / in_block.sum())
