"""Statistics of a benchmark: Spearman LDS, its uncertainty, its ceiling, and comparisons.

Pure numpy on flat arrays (scipy only for the Student tail, imported when asked for). Shapes:
scores and truth are [query, group]; a truth by seed is [seed, query, group]; bootstrap replicates
are [replicate]; the task of each query is an integer code [query]. docs/statistics.md derives what
is here and shows how well it holds.

Every statistic answers two questions. How would it come out with other queries of *these tasks*?
And with queries of *new tasks*, drawn as these tasks were? Queries of one task resemble each other,
so the second interval is the wider one; it is what is shown and tested wherever there are tasks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from tdabench.errors import DataError, MethodError, UsageError
from tdabench.seeds import named_seed

LEVEL = 0.95
MIN_TASKS = 6  # with fewer not even a unanimous sign test reaches 5%: nothing is said of new tasks
Scope = Literal["new tasks", "these tasks"]

# --------------------------------------------------------------------------- ranks


@dataclass(frozen=True)
class _Order:
    """Start and end of each item's tie block in its sorted row: [row, item] each.

    With weights summed along the sorted row, an item's average rank depends on these two positions;
    a row is sorted once for any number of weightings.
    """

    order: np.ndarray  # item at each sorted position
    low: np.ndarray  # first sorted position of the item's tie block
    high: np.ndarray  # one past its last

    @classmethod
    def of(cls, a: np.ndarray) -> _Order:
        rows, n = a.shape
        order = np.argsort(a, axis=1)  # the order within a tie block is arbitrary
        s = np.take_along_axis(a, order, axis=1)
        new = np.ones((rows, n), dtype=bool)  # a tie block begins here
        new[:, 1:] = s[:, 1:] != s[:, :-1]
        place = np.arange(n)
        item_low = np.empty_like(order)
        if new.all():  # usually there are no ties: each block is one position
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
    """Ranks from 1 along the last axis; equal values share their mean rank: float64, a's shape.

    Raises MethodError for NaN.
    """
    a = np.asarray(a)
    flat = a.reshape(-1, a.shape[-1])
    _refuse_nan(flat, "values to rank")
    o = _Order.of(flat)
    return ((o.low + o.high + 1) / 2).reshape(a.shape)


def constant_rows(a: np.ndarray) -> np.ndarray:
    """Finds rows of [query, group] with a single value, which rank nothing: bool [query]."""
    a = np.asarray(a)
    if a.shape[1] == 0:
        return np.ones(len(a), dtype=bool)
    return a.max(axis=1) == a.min(axis=1)


def spearman_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Computes Spearman's correlation of each row of a [query, group] with b's: float64 [query].

    This is Pearson's correlation of average ranks, as in scipy.stats.spearmanr. A row that is
    constant in either argument counts as 0, the value of chance, since it ranks nothing.

    Raises UsageError if shapes differ and MethodError for NaN.
    """
    a, b = _pair(a, b)
    x = average_ranks(a) - (a.shape[1] + 1) / 2
    y = average_ranks(b) - (b.shape[1] + 1) / 2
    cov = (x * y).sum(axis=1)
    return _ratio(cov, (x * x).sum(axis=1), (y * y).sum(axis=1))


def lds(scores: np.ndarray, truth: np.ndarray) -> float:
    """Computes the linear datamodelling score: the mean of `spearman_rows` (arXiv 2303.14186)."""
    return float(spearman_rows(scores, truth).mean())


def _ratio(cov: np.ndarray, va: np.ndarray, vb: np.ndarray) -> np.ndarray:
    """Computes cov / sqrt(va vb) in [-1, 1], and 0 where either variance is 0."""
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
    """Draws, with replacement, how often each of n items occurs in each replicate: [n, replicate].

    n - 1 draws are made, which makes the variance of a mean s^2 / n with the unbiased s^2, where
    n draws give (n - 1) / n of it (McCarthy and Snowden 1985, "The bootstrap and finite population
    sampling").

    Depends on n, `replicates`, `seed` and `name` only, so that any two methods scored on the
    same queries and groups meet the same draws: that is what pairs their replicates.
    """
    rng = np.random.default_rng(named_seed(seed, f"bootstrap-{name}"))
    if n == 0:
        return np.zeros((0, replicates), dtype=np.float32)
    draws = max(1, n - 1)
    return rng.multinomial(draws, np.full(n, 1.0 / n), size=replicates).T.astype(np.float32)


def task_codes(tasks: Sequence[str]) -> np.ndarray | None:
    """Returns the task of each query as a number, int64 [query]; None if no query has a label.

    A query without a label counts as a separate task.
    """
    if not any(tasks):
        return None
    names = [t or f"\0{i}" for i, t in enumerate(tasks)]
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def effective_tasks(tasks: np.ndarray) -> float:
    """Counts equally large tasks of the same weight, (sum n)^2 / sum n^2 (Kish 1965)."""
    sizes = np.unique(tasks, return_counts=True)[1].astype(np.float64)
    return float(sizes.sum() ** 2 / (sizes**2).sum()) if len(sizes) else 0.0


@dataclass(frozen=True)
class Bootstrap:
    """A statistic, and its replicates when queries, tasks or groups are drawn again.

    `value` is the statistic itself; replicates are [replicate]. `queries` draws queries, `groups`
    groups, `both` the two at once. `tasks` draws whole tasks, each with all its queries, and
    `tasks_both` tasks and groups at once. `groups` is None for a statistic without groups: `both`
    is `queries` then, and `tasks_both` is `tasks`. `tasks` is None where queries have no tasks, or
    too few of them. Two Bootstraps on the same data are paired: their difference is again one.
    """

    value: float
    both: np.ndarray
    queries: np.ndarray
    groups: np.ndarray | None = None
    df: int = 1  # min(queries, groups) - 1
    tasks: np.ndarray | None = None
    tasks_both: np.ndarray | None = None
    df_tasks: int = 0  # min(tasks, groups) - 1
    n_tasks: int = 0

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """The populations of queries that intervals can be given for."""
        return ("these tasks",) if self.tasks is None else ("new tasks", "these tasks")

    def replicates(self) -> dict[str, np.ndarray]:
        """Returns its arrays of replicates by name, those that it has."""
        names = ("both", "queries", "groups", "tasks", "tasks_both")
        return {k: v for k in names if (v := getattr(self, k)) is not None}

    def __sub__(self, other: Bootstrap) -> Bootstrap:
        return self.combine(other, np.subtract)

    def combine(self, other: Bootstrap, f: np.ufunc) -> Bootstrap:
        """Applies f to two paired statistics: np.subtract for an effect, np.divide for a share.

        Raises UsageError if the replicates cannot be paired.
        """
        mine, theirs = self.replicates(), other.replicates()
        if mine.keys() != theirs.keys() or any(mine[k].shape != theirs[k].shape for k in mine):
            raise UsageError(
                "these replicates are not paired: their number or kind differs",
                "Score both methods with the same benchmark settings",
            )
        return Bootstrap(
            float(f(self.value, other.value)),
            **{k: f(v, theirs[k]) for k, v in mine.items()},
            df=min(self.df, other.df),
            df_tasks=min(self.df_tasks, other.df_tasks),
            n_tasks=self.n_tasks,
        )

    @classmethod
    def mean(cls, parts: Sequence[Bootstrap]) -> Bootstrap:
        """Averages statistics on the same queries, with paired replicates."""
        found = [b.replicates() for b in parts]
        if len({(*r, *(len(v) for v in r.values())) for r in found}) > 1:
            raise UsageError("these replicates are not paired: their number or kind differs")
        return cls(
            float(np.mean([b.value for b in parts])),
            **{k: np.mean([r[k] for r in found], axis=0) for k in found[0]},
            df=min(b.df for b in parts),
            df_tasks=min(b.df_tasks for b in parts),
            n_tasks=parts[0].n_tasks,
        )

    def _drawn(self, scope: Scope) -> tuple[np.ndarray, float, int]:
        """Replicates with all drawn at once, variance and degrees of freedom in one scope.

        Drawing queries and groups again at once counts the query-by-group part three times
        (Owen 2007, "The pigeonhole bootstrap"). Drawing them one at a time counts it once each,
        so that adding the two and taking it off once leaves every part counted once: the
        two-way cluster variance of Cameron, Gelbach and Miller (2011). Tasks take the place of
        queries where they are the clusters: a task is drawn with its queries, so that what
        queries add of their own is counted with it.
        """
        new = scope == "new tasks" and self.tasks is not None
        units, both, df = (
            (self.tasks, self.tasks_both, self.df_tasks)
            if new
            else (self.queries, self.both, self.df)
        )
        assert units is not None
        assert both is not None
        if df < 1:
            return both, float("nan"), df
        return both, float(_drawn_variance(both, units, self.groups)), df

    def variance_of(self, scope: Scope) -> float:
        """Returns the variance over fresh queries of a scope and groups; NaN for fewer than two."""
        return self._drawn(scope)[1]

    @property
    def variance(self) -> float:
        """Returns the larger of its scopes' variances; NaN for fewer than two of a kind."""
        return float(np.max([self.variance_of(s) for s in self.scopes]))

    def _still(self, variance: float) -> bool:
        """Whether nothing moved but rounding: then the bootstrap knows no variance."""
        return bool(variance <= (1e-6 * self.value) ** 2)

    def interval(
        self,
        level: float = LEVEL,
        scope: Scope | None = None,
        within: tuple[float, float] | None = None,
    ) -> tuple[float, float] | None:
        """Returns the replicates' percentiles, centred on the value and scaled to the variance.

        The scale also carries Student's factor for few queries, tasks or groups. Without a
        `scope`, the wider of the intervals. `within` is the range that values can take: the
        interval is cut to it, and where all values lie at one of its ends it is Wilson's, for as
        many trials as there are queries (tasks, groups). None when there are fewer than two of a
        kind, or when all values are the same otherwise, from which no width can be told.
        """
        found: list[tuple[float, float]] = []
        for s in (scope,) if scope else self.scopes:
            both, variance, df = self._drawn(s)
            spread = float(both.std())
            if df < 1:
                return None
            if self._still(variance) or spread == 0:
                share = (self.value - within[0]) / (within[1] - within[0]) if within else 0.5
                if within is None or min(abs(share), abs(1 - share)) > 1e-6:
                    return None
                ends = wilson(float(round(share)), df + 1, level, df)
                found.append(tuple(within[0] + e * (within[1] - within[0]) for e in ends))  # type: ignore[arg-type]
                continue
            scale = np.sqrt(variance) / spread * _student_factor(level, df)
            tails = np.quantile(both - both.mean(), [(1 - level) / 2, (1 + level) / 2])
            low, high = (self.value + scale * tails).tolist()
            found.append(
                (low, high) if within is None else (max(within[0], low), min(within[1], high))
            )
        return max(found, key=lambda x: x[1] - x[0])

    def half_width_over_groups(self, n_groups: int, level: float = LEVEL) -> float:
        """Returns half the interval over fresh groups for exactly these queries.

        This is the part of `interval` that more groups make narrower: Student's quantile for
        `n_groups` - 1 degrees of freedom times the standard deviation when groups alone are drawn
        again. Infinite for fewer than two groups, and where all draws give the same value, from
        which no width can be told.
        """
        from scipy.special import stdtrit

        if self.groups is None or n_groups < 2 or self._still(float(self.groups.var())):
            return math.inf
        return float(stdtrit(n_groups - 1, (1 + level) / 2) * self.groups.std())

    def share_interval(
        self, level: float = LEVEL, scope: Scope | None = None
    ) -> tuple[float, float] | None:
        """Returns Wilson's score interval, for a mean of values in [0, 1]: a proportion.

        The number of trials is the one that a plain proportion would need for the variance found
        (the design effect of clustered queries), or the number of queries or tasks where all
        are 0 or all are 1. Wilson 1927; Korn and Graubard 1998 for the effective number.
        None as in `interval`, and where all values are the same without being 0 or 1.
        """
        found = []
        for s in (scope,) if scope else self.scopes:
            _, variance, df = self._drawn(s)
            if df < 1:
                return None
            p = min(1.0, max(0.0, self.value))
            if self._still(variance) or p in (0.0, 1.0):
                if 1e-6 < p < 1 - 1e-6:
                    return None
                n, p = df + 1.0, float(round(p))
            else:
                n = p * (1 - p) / variance
            found.append(wilson(p, n, level, df))
        low, high = max(found, key=lambda x: x[1] - x[0])
        return low, high

    def p_value(self, scope: Scope | None = None) -> float:
        """Tests "the statistic is 0", two-sided: Student's t on the bootstrap variance.

        Without a `scope`, the larger of the p-values. The tail is taken from Student's t and not
        by counting replicates, whose smallest p-value of 1/replicates would never survive Holm's
        correction over many methods. Where all differences are the same the variance is 0 and t
        says nothing: there it is the exact sign-flip test of n equal differences, 2 / 2^n.
        """
        from scipy.special import stdtr

        if self.value == 0:
            return 1.0
        found = []
        for s in (scope,) if scope else self.scopes:
            _, variance, df = self._drawn(s)
            if not np.isfinite(variance):
                return 1.0
            if self._still(variance):
                found.append(2.0**-df)
            else:
                found.append(float(2 * stdtr(df, -abs(self.value) / np.sqrt(variance))))
        return max(found)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns what a record stores, beside `replicates`, to recompute comparisons."""
        stored = {_STORED[k]: v for k, v in self.replicates().items() if k != "both"}
        return {
            **{k: v.astype(np.float64) for k, v in stored.items()},
            "replicates_df": np.array([self.df, self.df_tasks, self.n_tasks]),
        }

    @classmethod
    def of_record(
        cls, value: float, per_query: np.ndarray, arrays: Mapping[str, np.ndarray]
    ) -> Bootstrap:
        """Restores a Bootstrap from a record's arrays: `replicates`, and those of `arrays`.

        A record with only `replicates` resampled queries only.
        """
        both = np.asarray(arrays["replicates"], dtype=np.float64)
        found = {k: np.asarray(arrays[n], np.float64) for k, n in _STORED.items() if n in arrays}
        numbers = [int(n) for n in arrays.get("replicates_df", [len(per_query) - 1])]
        df, df_tasks, n_tasks = (*numbers, 0, 0)[:3]
        parts = {"both": both, "queries": both, **found}
        return cls(value, **parts, df=df, df_tasks=df_tasks, n_tasks=n_tasks)


def _drawn_variance(both: np.ndarray, units: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Computes the variance [...] of replicates [..., replicate]; two-way if there are groups."""
    v_units = units.var(axis=-1)
    if groups is None:
        return np.asarray(v_units)
    v_groups, v_cells = groups.var(axis=-1), (both - units - groups).var(axis=-1)
    return np.maximum.reduce([v_units + v_groups - v_cells, v_units, v_groups])


_STORED = {
    "queries": "replicates_queries",
    "groups": "replicates_groups",
    "tasks": "replicates_tasks",
    "tasks_both": "replicates_tasks_groups",
}


def wilson(p: float, n: float, level: float = LEVEL, df: int | None = None) -> tuple[float, float]:
    """Returns Wilson's score interval of a share p in n trials; with df, by Student's quantile.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    from scipy.special import ndtri, stdtrit

    tail = (1 + level) / 2
    z2 = float(ndtri(tail) if df is None else stdtrit(df, tail)) ** 2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 / n * (p * (1 - p) + z2 / (4 * n))) / (1 + z2 / n)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def _student_factor(level: float, df: int) -> float:
    from scipy.special import ndtri, stdtrit

    return float(stdtrit(df, (1 + level) / 2) / ndtri((1 + level) / 2))


def bootstrap_queries(
    values: np.ndarray,
    replicates: int = 1000,
    seed: int = 0,
    tasks: np.ndarray | None = None,
) -> Bootstrap:
    """Bootstraps the mean of `values` [query] over queries, or over whole `tasks` [query]."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        raise DataError("no queries to average over")
    return _drawn_again(values, None, None, replicates, seed, tasks)


def bootstrap_clusters(
    values: np.ndarray, clusters: Sequence[str], replicates: int = 1000, seed: int = 0
) -> Bootstrap:
    """Bootstraps the mean over clusters of their mean `values` [query] over clusters.

    For queries that share a retraining: queries of one cluster are not independent, so a cluster is
    always the unit.
    """
    values, names = np.asarray(values, dtype=np.float64), sorted(set(clusters))
    member = np.array([names.index(c) for c in clusters])
    means = np.array([values[member == i].mean() for i in range(len(names))])
    b = bootstrap_queries(means, replicates, seed)
    return replace(b, tasks=b.both, tasks_both=b.both, df_tasks=b.df, n_tasks=len(names))


def bootstrap_lds(
    scores: np.ndarray,
    truth: np.ndarray,
    replicates: int = 1000,
    seed: int = 0,
    tasks: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> Bootstrap:
    """Bootstraps LDS over queries and groups; all queries share the groups drawn.

    A retrained model's loss enters every query, so that queries are not independent: drawing
    queries alone would understate the uncertainty. scores, truth: [query, group]. `tasks`
    [query] are drawn whole, too. `weights` [group, replicate] are other draws of the groups, for
    statistics over truths that share some of them (`identity_weights`).

    Raises UsageError if shapes differ and MethodError for NaN.
    """
    a, b = _pair(scores, truth)
    per_query = spearman_rows(a, b)
    if weights is None:
        weights = resampling_weights(a.shape[1], replicates, seed, "groups")
    again = spearman_replicates(a, b, weights)
    return _drawn_again(per_query, again, a.shape[1], replicates, seed, tasks)


def bootstrap_partial(
    scores: np.ndarray,
    truth: np.ndarray,
    known: np.ndarray,
    replicates: int = 1000,
    seed: int = 0,
    tasks: np.ndarray | None = None,
) -> Bootstrap:
    """Averages the partial rank correlation of scores and truth [query, group], given `known`.

    `known` is [feature, query, group], of which ranks over groups are used. A row's ranks are
    regressed on the features' ranks (with intercept) and the residuals are correlated; a row
    that the features explain wholly counts as 0. Replicates re-weight the residuals.

    Raises UsageError for shapes that differ and MethodError for NaN.
    """
    a, b = _pair(scores, truth)
    if known.ndim != 3 or known.shape[1:] != a.shape:
        raise UsageError(f"features {known.shape} are not [feature, *{a.shape}]")
    ranks = average_ranks(
        np.stack([a, b, *known.astype(np.float64)])
    )  # [2 + feature, query, group]
    ranks -= ranks.mean(axis=2, keepdims=True)
    x, y, f = ranks[0], ranks[1], ranks[2:].transpose(1, 0, 2)  # f [query, feature, group]
    basis = np.linalg.pinv(f, rcond=1e-9)  # [query, group, feature]

    def residual(rows: np.ndarray) -> np.ndarray:
        left = rows - np.einsum("qg,qgf,qfh->qh", rows, basis, f)
        little = (left**2).sum(axis=1) <= 1e-12 * np.maximum((rows**2).sum(axis=1), 1e-300)
        return np.where(little[:, None], 0.0, left)

    x, y = residual(x), residual(y)
    per_query = _ratio((x * y).sum(axis=1), (x * x).sum(axis=1), (y * y).sum(axis=1))
    w = resampling_weights(a.shape[1], replicates, seed, "groups").astype(np.float64)
    w /= w.sum(axis=0)
    mean_x, mean_y = x @ w, y @ w  # [query, replicate]
    again = _ratio(
        (x * y) @ w - mean_x * mean_y,
        np.maximum((x * x) @ w - mean_x**2, 0.0),
        np.maximum((y * y) @ w - mean_y**2, 0.0),
    )
    return _drawn_again(per_query, again, a.shape[1], replicates, seed, tasks)


def identity_weights(
    identities: Mapping[str, Sequence[str]], replicates: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Draws of groups by who they are, for truths that share some: name -> [group, replicate].

    `identities[name]` names each group of a truth by its content. All distinct groups are drawn
    together, so that a group counts as often in every truth that holds it.
    """
    everyone = sorted({i for of in identities.values() for i in of})
    place = {i: n for n, i in enumerate(everyone)}
    drawn = resampling_weights(len(everyone), replicates, seed, "groups")
    return {name: drawn[[place[i] for i in of]] for name, of in identities.items()}


def _drawn_again(
    per_query: np.ndarray,  # [query]
    again: np.ndarray | None,  # [query, replicate]: the same with groups drawn again
    n_groups: int | None,
    replicates: int,
    seed: int,
    tasks: np.ndarray | None,
) -> Bootstrap:
    n = len(per_query)
    if n == 0:
        raise DataError("no queries to average over")
    mean = float(per_query.mean())
    # Centred first: identical values must have identical means in every draw.
    apart = per_query - mean
    groups = None if again is None else again.mean(axis=0, dtype=np.float64)
    limit = n if n_groups is None else min(n, n_groups)

    w = resampling_weights(n, replicates, seed, "queries").astype(np.float64)
    drawn = w.sum(axis=0)
    queries = mean + apart @ w / drawn
    both = queries if again is None else np.einsum("qr,qr->r", w, again) / drawn
    alone = Bootstrap(mean, both, queries, groups, limit - 1)
    effective = 0.0 if tasks is None else effective_tasks(tasks)
    if tasks is None or effective < MIN_TASKS or effective == n:
        return alone

    _, task = np.unique(tasks, return_inverse=True)
    n_tasks = int(task.max()) + 1
    member = np.zeros((n_tasks, n))  # [task, query]
    member[task, np.arange(n)] = 1.0
    w = resampling_weights(n_tasks, replicates, seed, "tasks").astype(np.float64)
    drawn = member.sum(axis=1) @ w  # queries drawn: tasks differ in size
    by_task = mean + (member @ apart) @ w / drawn
    by_both = by_task
    if again is not None:
        by_both = np.einsum("tr,tr->r", w, member @ again) / drawn
    df = int(min(effective, np.inf if n_groups is None else n_groups)) - 1
    return replace(alone, tasks=by_task, tasks_both=by_both, df_tasks=df, n_tasks=n_tasks)


def spearman_replicates(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Computes `spearman_rows` with weights [group, replicate]: float32 [query, replicate].

    Rows are sorted once. Sums of weights along the sorted row give the average ranks of all
    replicates at once, by whole rows of replicates, which makes this fast.
    """
    order_a, order_b = _Order.of(a), _Order.of(b)
    n_groups, replicates = weights.shape
    out = np.empty((len(a), replicates), dtype=np.float32)
    step = max(32, (1 << 17) // max(1, n_groups))  # temporaries fit in the CPU's cache
    for r in range(0, replicates, step):
        w = np.ascontiguousarray(weights[:, r : r + step], dtype=np.float32)
        middle = w.sum(axis=0) / 2  # [replicate]: the weighted mean of ranks (minus one half)
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
    """Computes centred average ranks of row q with weights w [group, replicate]: w's shape."""
    np.cumsum(w[o.order[q]], axis=0, out=sums[1:])
    ranks = sums[o.low[q]]
    ranks += sums[o.high[q]]
    ranks *= 0.5
    ranks -= middle
    return ranks


# --------------------------------------------------------------------------- ceiling


@dataclass(frozen=True)
class Ceiling:
    """The best possible LDS on a truth that is itself noisy.

    `value` estimates the LDS of a predictor that knows each group's *expected* loss (over
    training seeds) exactly. `split_half` is the mean Spearman of disjoint halves of the seeds,
    `reliability` its Spearman-Brown correction to all seeds, `bootstrap` the ceiling's replicates,
    paired with the replicates of `bootstrap_lds`.
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
        """Divides LDS by the ceiling, with paired replicates."""
        return lds.combine(self.bootstrap, np.divide)

    def as_arrays(self) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Returns arrays and numbers from which `of_arrays` restores it."""
        b = self.bootstrap
        numbers = {"value": self.value, "split_half": self.split_half, "n_seeds": self.n_seeds}
        return (
            {"per_query": self.per_query, **b.replicates()},
            {
                **numbers,
                "reliability": self.reliability,
                "df": b.df,
                "df_tasks": b.df_tasks,
                "n_tasks": b.n_tasks,
            },
        )

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> Ceiling:
        value = float(numbers["value"])
        df, df_tasks, n_tasks = (int(numbers[k]) for k in ("df", "df_tasks", "n_tasks"))
        parts = {k: v for k, v in arrays.items() if k != "per_query"}
        return cls(
            value,
            float(numbers["split_half"]),
            float(numbers["reliability"]),
            arrays["per_query"],
            int(numbers["n_seeds"]),
            Bootstrap(value, **parts, df=df, df_tasks=df_tasks, n_tasks=n_tasks),
        )


CEILING_VERSION = 2  # raise it when `noise_ceiling` gives other numbers
MAX_SPLITS = 35  # all halvings of 8 seeds
BOOTSTRAP_SPLITS = 3  # all halvings of 4 seeds
MIN_RELIABILITY = 0.3  # below it the spread between queries is lost in sampling error


def reliability(truth: np.ndarray, seed: int = 0) -> float | None:
    """Estimates the agreement of two means over as many seeds as truth [seed, query, group].

    The mean over queries and halvings of Spearman's r between halves of the seeds, stepped up by
    Spearman and Brown's formula; 0 where the halves do not agree. None for one seed.
    """
    n_seeds, n_queries, n_groups = np.shape(truth)
    if n_seeds < 2 or n_queries < 1 or n_groups < 2:
        return None
    halves = _halvings(n_seeds, seed)
    r = float(np.mean([spearman_rows(*_half_means(np.asarray(truth), h)) for h in halves]))
    return float(spearman_brown(max(0.0, r), n_seeds / (n_seeds // 2)))


def noise_ceiling(
    truth: np.ndarray,
    replicates: int = 1000,
    seed: int = 0,
    tasks: np.ndarray | None = None,
) -> Ceiling | None:
    """Estimates LDS's ceiling against the seed-mean of truth [seed, query, group]; None: one seed.

    With y = mu + noise a seed, mu the expected value, the correlation of mu with the mean of S
    seeds is sqrt(reliability), and the reliability is the correlation that two such means would
    have. It is estimated by halving the seeds: r between means of h = S // 2 seeds each, then
    Spearman and Brown's k r / (1 + (k - 1) r), k = S / h, averaged over halvings and queries.
    Queries differ in reliability and the root is concave, so it is the mean of roots that bounds
    a mean over queries: each query's r is first shrunk towards the mean until their variance
    is the part that disjoint halves of the groups agree on; the rest is sampling error.

    None as well below a reliability of `MIN_RELIABILITY`, where the estimate cannot be trusted:
    the spread of the queries' reliability is then lost in its sampling error.
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
    if mean <= 0 or spearman_brown(mean, k) < MIN_RELIABILITY:
        return None
    agreed = _variance_between_queries(truth, halves, seed)
    spread = r.var()
    shrink = np.sqrt(min(1.0, max(0.0, agreed) / spread)) if spread > 0 else 0.0
    shrunk = np.clip(mean + shrink * (r - mean), 0.0, 1.0)
    per_query = np.sqrt(spearman_brown(shrunk, k))
    value = float(per_query.mean())

    # A replicate changes the mean r; the spread between queries, of second order, is kept.
    w = resampling_weights(n_groups, replicates, seed, "groups")
    again = np.mean(
        [spearman_replicates(*_half_means(truth, h), w) for h in halves[:BOOTSTRAP_SPLITS]], axis=0
    )
    first = np.mean(
        [spearman_rows(*_half_means(truth, h)) for h in halves[:BOOTSTRAP_SPLITS]], axis=0
    )
    moved = _drawn_again(first, again, n_groups, replicates, seed, tasks)
    at_mean = float(np.sqrt(spearman_brown(mean, k)))

    def ceiling_at(x: np.ndarray) -> np.ndarray:
        # Resampling groups lowers r slightly on average; only its variation is used.
        r = np.clip(mean + (x - x.mean()), 1e-3, 1.0)
        return value / at_mean * np.sqrt(spearman_brown(r, k))

    boot = Bootstrap(
        value,
        **{k: ceiling_at(v) for k, v in moved.replicates().items()},
        df=moved.df,
        df_tasks=moved.df_tasks,
        n_tasks=moved.n_tasks,
    )
    return Ceiling(value, mean, float(spearman_brown(mean, k)), per_query, n_seeds, boot)


@dataclass(frozen=True)
class AdditiveCeiling:
    """The best possible correlation of sums over a group's members with a truth.

    `share` is the part of a truth's variance over groups that such sums explain, mean over queries,
    `error` its standard error, and `value` = sqrt(share), with the ends of its 95% interval.
    """

    value: float
    low: float
    high: float
    share: float
    error: float


MIN_ADDITIVE_GROUPS = 10
MAX_ADDITIVE_ERROR = 0.1  # of the share: beyond it the estimate says little


def additive_ceiling(truth: np.ndarray, member: np.ndarray) -> AdditiveCeiling | None:
    """Estimates how well any additive predictor can do on truth [query, group].

    `member` [group, train] holds 1 for the members of a group. If y = sum over the members of w_z,
    plus interactions and noise that differ between groups, then two groups' outcomes agree in
    proportion to their overlap. So the regression of y_S y_S' on the overlap of S and S' (both
    centred, diagonals scaled to 1 on average), over pairs of different groups, has as its slope the
    additive variance: Haseman & Elston's regression, as used for heritability (Yang et al. 2010).
    No weights are fitted, so there may be far fewer groups than examples, where even the best of
    fitted predictors knows little. The root of the mean share over queries bounds Pearson's
    correlation, and Spearman's nearly. Dividing by each query's own variance costs some 2 in 100
    of the share at 160 groups. The error is from leaving out each group in turn, and from
    the spread over queries; the two are added.

    None with fewer than `MIN_ADDITIVE_GROUPS` groups, or if the error exceeds `MAX_ADDITIVE_ERROR`.
    """
    y = np.asarray(truth, dtype=np.float64)
    x = np.asarray(member, dtype=np.float64)
    m = y.shape[1]
    if len(x) != m:
        raise UsageError(f"a truth of {m} groups with the members of {len(x)}")
    _refuse_nan(y, "truth")
    y = y - y.mean(1, keepdims=True)
    variance = np.square(y).sum(1) / max(1, m - 1)  # [query]
    varies = variance > 1e-12 * max(1e-300, float(variance.max(initial=0.0)))
    if m < MIN_ADDITIVE_GROUPS or not varies.any():
        return None
    y = y[varies] / np.sqrt(variance[varies])[:, None]
    xc = x - x.mean(0)
    overlap = xc @ xc.T
    if not np.trace(overlap) > 0:
        return None
    overlap *= (m - 1) / np.trace(overlap)
    apart = ~np.eye(m, dtype=bool)
    overlap = np.where(apart, overlap - overlap[apart].mean(), 0.0)
    size = float(np.square(overlap).sum())
    if not size > 1e-12:
        return None
    # Centring subtracts from every product the same for all overlaps: the slope stays.
    each = ((y @ overlap) * y).sum(1) / size  # [query]: the slopes, the shares of variance
    products = overlap * (y.T @ y) / len(y)
    share = float(products.sum()) / size
    rest = size - 2 * np.square(overlap).sum(1)
    without = (products.sum() - 2 * products.sum(1)) / rest  # [group]
    by_groups = (m - 1) / m * float(np.square(without - without.mean()).sum())
    by_queries = float(each.var(ddof=1)) / len(each) if len(each) > 1 else 0.0
    error = math.sqrt(by_groups + by_queries)
    if error > MAX_ADDITIVE_ERROR:
        return None
    ends = (share - 1.96 * error, share, share + 1.96 * error)
    low, value, high = (math.sqrt(min(1.0, max(0.0, v))) for v in ends)
    return AdditiveCeiling(value, low, high, share, error)


def spearman_brown(r: np.ndarray | float, k: float) -> np.ndarray:
    """Computes the reliability of a mean over k times as many seeds as for r, r in [0, 1]."""
    r = np.asarray(r, dtype=np.float64)
    return k * r / (1 + (k - 1) * r)


Halving = tuple[tuple[int, ...], tuple[int, ...]]


def _halvings(n: int, seed: int) -> list[Halving]:
    """Returns disjoint pairs of n // 2 seeds: all, or `MAX_SPLITS` drawn by a named seed."""
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
    """Estimates the variance of the true split-half r between queries.

    Two disjoint halves of the groups have independent errors, so the covariance of their r over
    queries is the variance of the true r.
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
        """Returns `better`, `worse` or `tied` (no significant difference at `alpha`)."""
        if self.p >= alpha:
            return "tied"
        return "better" if (self.effect > 0) == higher_is_better else "worse"


def compare(a: Bootstrap, b: Bootstrap, level: float = LEVEL) -> Comparison:
    """Computes a - b from paired replicates. Raises UsageError if they are not paired."""
    d = a - b
    low, high = d.interval(level) or (None, None)
    return Comparison(d.value, low, high, d.p_value())


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Adjusts p-values by Holm's step-down procedure, in the given order (Holm 1979)."""
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * np.arange(len(p), 0, -1)
    out = np.empty_like(p)
    out[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return out


@dataclass(frozen=True)
class Ranking:
    """Methods, best first, and which of them differ significantly by the pairwise tests.

    `places[i]` is one more than the number of methods with a better value than `labels[i]`.
    `spans[i]` are the best and the worst place among the methods that do not differ significantly
    from it, itself included: its rank as an interval. `letters[i]` is its compact letter display:
    two methods share a letter if and only if they do not differ significantly. `p` maps (label,
    label) to the Holm-adjusted p-value of the pair.
    """

    labels: tuple[str, ...]
    places: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    letters: tuple[str, ...]
    p: Mapping[tuple[str, str], float]


def rank_methods(
    results: Mapping[str, Bootstrap], alpha: float = 0.05, higher_is_better: bool = True
) -> Ranking:
    """Orders methods by value and tests all pairs at `alpha`, Holm-adjusted."""
    sign = -1 if higher_is_better else 1
    labels = sorted(results, key=lambda m: (sign * results[m].value, m))
    pairs = list(itertools.combinations(labels, 2))
    adjusted = holm(_pair_p_values([results[m] for m in labels]))
    p = {pair: float(v) for pair, v in zip(pairs, adjusted)}
    n = len(labels)
    apart = np.zeros((n, n), dtype=bool)
    for i, j in itertools.combinations(range(n), 2):
        apart[i, j] = apart[j, i] = p[labels[i], labels[j]] < alpha
    values = [results[m].value for m in labels]
    places = tuple(1 + sum(sign * w < sign * v for w in values) for v in values)
    p |= {(b, a): v for (a, b), v in p.items()}
    return Ranking(tuple(labels), places, rank_spans(places, apart), letter_display(apart), p)


def _pair_p_values(found: Sequence[Bootstrap]) -> np.ndarray:
    """Returns the p-value of `compare` for every pair [pair], in the order of combinations.

    The same tests as one pair at a time, one method against all later ones at once, without their
    intervals. Raises UsageError if the replicates of two cannot be paired.
    """
    from scipy.special import stdtr

    for later in found[1:]:
        found[0].combine(later, np.subtract)
    arrays = (
        {k: np.stack([b.replicates()[k] for b in found]) for k in found[0].replicates()}
        if found
        else {}
    )
    out = []
    for i in range(len(found) - 1):
        d = {k: a[i] - a[i + 1 :] for k, a in arrays.items()}  # each [later, replicate]
        value = found[i].value - np.array([b.value for b in found[i + 1 :]])  # [later]
        p = np.zeros(len(value))
        for scope in found[i].scopes:
            new = scope == "new tasks"
            units, both = (d["tasks"], d["tasks_both"]) if new else (d["queries"], d["both"])
            mine, others = (
                (found[i].df_tasks, [b.df_tasks for b in found[i + 1 :]])
                if new
                else (found[i].df, [b.df for b in found[i + 1 :]])
            )
            df = np.minimum(mine, others)  # [later]
            variance = _drawn_variance(both, units, d.get("groups"))
            still = variance <= (1e-6 * value) ** 2
            with np.errstate(divide="ignore", invalid="ignore"):
                t = 2 * stdtr(df, -np.abs(value) / np.sqrt(variance))
            found_p = np.where(still, 2.0**-df, t)
            p = np.maximum(p, np.where((df < 1) | ~np.isfinite(variance), 1.0, found_p))
        out.append(np.where(value == 0, 1.0, p))
    return np.concatenate(out) if out else np.empty(0)


def rank_spans(places: Sequence[int], apart: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Returns best and worst place among those not `apart` [method, method] from each method."""
    at = np.asarray(places)
    return tuple((int(at[~row].min()), int(at[~row].max())) for row in np.asarray(apart))


def letter_display(apart: np.ndarray) -> tuple[str, ...]:
    """Assigns letters such that two methods share one if and only if they are not `apart`.

    `apart` [method, method] is symmetric with a False diagonal. Insert and absorb: a set that
    holds two methods that differ is split in two, and sets within others are dropped (Piepho 2004,
    "An algorithm for a letter-based representation of all-pairwise comparisons"); then letters
    that are not needed are taken away. Letters go by the best method that holds them.
    """
    n = len(apart)
    columns: list[frozenset[int]] = [frozenset(range(n))] if n else []
    for i, j in itertools.combinations(range(n), 2):
        if not apart[i][j]:
            continue
        split: set[frozenset[int]] = set()
        for c in columns:
            split |= {c - {i}, c - {j}} if i in c and j in c else {c}
        columns = [c for c in split if not any(c < other for other in split)]
    columns.sort(key=sorted)
    # A letter is needed when some method, or some pair, would share no letter without it.
    for c in sorted(columns, key=lambda c: (len(c), sorted(c))):
        rest = [other for other in columns if other != c]
        pairs = itertools.combinations_with_replacement(sorted(c), 2)
        if all(any(i in other and j in other for other in rest) for i, j in pairs):
            columns = rest
    return tuple("".join(_letter(k) for k, c in enumerate(columns) if i in c) for i in range(n))


def _letter(k: int) -> str:
    """a to z, then A to Z, then what Unicode has after Greek alpha: one character each."""
    if k < 26:
        return chr(ord("a") + k)
    return chr(ord("A") + k - 26) if k < 52 else chr(ord("α") + k - 52)


# --------------------------------------------------------------------------- sources of variance


@dataclass(frozen=True)
class VarianceSources:
    """Components of the variance of an LDS, by source.

    `queries` and `groups` are main effects, `cells` the query-by-group part, which includes the
    noise of finitely many truth seeds; `truth_seeds` estimates that noise alone (None for one
    seed). `method_seeds` is the variance between builds of the method (None for one build).
    `tasks` is what drawing whole tasks adds, their queries' part included (None without tasks).
    """

    queries: float
    groups: float
    cells: float
    truth_seeds: float | None
    method_seeds: float | None
    tasks: float | None = None


def variance_sources(
    lds: Bootstrap,
    scores: np.ndarray,
    truth: np.ndarray,
    method_values: Sequence[float] = (),
) -> VarianceSources:
    """Splits the variance of `lds`. scores [query, group], truth [seed, query, group].

    `method_values` are the LDS of builds that differ only in the method's seed. The part of the
    truth's seeds is the jackknife over seeds.
    """
    if lds.groups is None:
        raise UsageError("this statistic has no groups by which to split the variance")
    cells = float((lds.both - lds.queries - lds.groups).var())
    n = len(truth)
    seeds = None
    if n > 1:
        total = truth.sum(axis=0)
        left_out = [spearman_rows(scores, (total - t) / (n - 1)).mean() for t in truth]
        seeds = float((n - 1) * np.var(left_out))
    method = float(np.var(method_values, ddof=1)) if len(method_values) > 1 else None
    tasks = None
    if lds.tasks is not None and lds.tasks_both is not None:
        shared = float((lds.tasks_both - lds.tasks - lds.groups).var())
        tasks = max(0.0, float(lds.tasks.var()) - shared)
    return VarianceSources(
        max(0.0, float(lds.queries.var()) - cells),
        max(0.0, float(lds.groups.var()) - cells),
        cells,
        seeds,
        method,
        tasks,
    )


# --------------------------------------------------------------------------- retrieval


def tie_blocks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Returns the ranks of the relevant items of `scores` [item], best first: int64 [block, 4].

    There is one row per block of equal scores with relevant items: items above it, relevant items
    above it, its size, relevant items in it. Every retrieval measure follows from these.
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
    """Computes the average precision of `scores` [item], in expectation over orders of ties.

    Constant scores give the mean of a random order. NaN if no item is relevant.
    McSherry and Najork, "Computing information retrieval performance measures efficiently in the
    presence of tied scores" (ECIR 2008).
    """
    return precision_of(tie_blocks(scores, relevant))


def precision_of(blocks: np.ndarray) -> float:
    """Computes average precision from `tie_blocks`."""
    if len(blocks) == 0:
        return float("nan")
    gained = 0.0
    for above, hits, size, in_block in blocks.tolist():
        i = np.arange(size)  # position within the block
        others = i * (in_block - 1) / max(1, size - 1)  # relevant before it, given it is
        gained += float((in_block / size * (hits + 1 + others) / (above + 1 + i)).sum())
    return gained / float(blocks[:, 3].sum())


def reciprocal_of(blocks: np.ndarray) -> float:
    """Computes the expected 1 / rank of the first relevant item over orders of ties.

    Takes `tie_blocks`; 0 if no item is relevant.
    """
    if len(blocks) == 0:
        return 0.0
    above, _, size, in_block = blocks[0].tolist()
    # P(the first relevant item of the block is at i) by successive draws.
    expected, none_yet = 0.0, 1.0
    for i in range(size - in_block + 1):
        here = in_block / (size - i)
        expected += none_yet * here / (above + 1 + i)
        none_yet *= 1 - here
    return expected


def recall_of(blocks: np.ndarray, k: int) -> float:
    """Computes the expected share of the relevant items among the k best, from `tie_blocks`.

    NaN if no item is relevant.
    """
    if len(blocks) == 0:
        return float("nan")
    above, _, size, in_block = blocks.T
    found = in_block * np.clip(k - above, 0, size) / size
    return float(found.sum() / in_block.sum())
