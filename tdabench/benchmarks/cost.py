"""Cost: how time, memory and storage grow with the corpus, and estimates for larger ones."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tdabench.benchmark import Benchmark, BenchmarkContext, Metric, Outcome, Stored
from tdabench.errors import NotApplicable, UsageError
from tdabench.seeds import named_seed

EXTRAPOLATED = (10**6, 10**9)
# Arrays of a record, all [size] except the last, [query]; seconds are per query.
STORED = (
    "sizes", "build_seconds", "query_seconds", "index_bytes", "peak_bytes", "single_query_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Cost(Benchmark):
    """Builds the method on growing parts of the corpus and queries each.

    The parts are nested and drawn by a named seed. The harness measures build seconds and index
    bytes. Query seconds are the fastest of `repeats` calls for `queries` queries at once;
    `single_query_seconds` are for queries one at a time, on the whole corpus. `*_exponent` is the
    slope of log cost over log size: 1 is linear. `*_at_1e6` and `*_at_1e9` are extrapolations, not
    measurements (see `Growth.at`), for this machine and this target. The work that a method does
    before any corpus is in each record's cost, not here.

    fractions  parts of the corpus to build on, as shares
    queries    number of queries of a timed call
    repeats    calls of which the fastest counts
    """

    name: ClassVar[str] = "cost"
    version: ClassVar[int] = 2
    title: ClassVar[str] = "cost (examples/s)"
    summary: ClassVar[str] = "build and query time, memory and bytes over corpus sizes"
    source: ClassVar[str] = "tdabench"
    slow: ClassVar[bool] = True

    fractions: tuple[float, ...] = (0.25, 0.5, 1.0)
    queries: int = 20
    repeats: int = 2

    def __post_init__(self) -> None:
        if len(self.fractions) < 2 or not all(0 < f <= 1 for f in self.fractions):
            raise UsageError("cost.fractions needs at least two sizes in (0, 1]")
        if self.queries < 1 or self.repeats < 1:
            raise UsageError("cost: queries and repeats must be at least 1")

    def run(self, context: BenchmarkContext) -> Outcome:
        n = len(context.train)
        sizes = sorted({max(1, round(f * n)) for f in self.fractions})
        if len(sizes) < 2:
            raise NotApplicable(f"{n} training examples are too few to measure growth")
        order = np.random.default_rng(named_seed(0, "cost")).permutation(n)
        queries = context.queries[: self.queries]

        build, query, size, peak = np.empty((4, len(sizes)))
        single = np.empty(len(queries))
        for i, m in enumerate(sizes):
            context.progress("building on growing parts", i, len(sizes))
            built = context.built_on(context.train.subset(np.sort(order[:m])))
            build[i], size[i], peak[i] = built.seconds, built.index_bytes, built.peak_bytes
            times = []
            for _ in range(self.repeats):
                start = time.perf_counter()
                built.index.score(queries)
                times.append(time.perf_counter() - start)
            query[i] = min(times)
            if m == sizes[-1]:
                for q in range(len(queries)):
                    start = time.perf_counter()
                    built.index.score(queries[q : q + 1])
                    single[q] = time.perf_counter() - start
        context.progress("building on growing parts", len(sizes), len(sizes))

        arrays = {
            "sizes": np.array(sizes, dtype=np.float64),
            "build_seconds": build,
            "query_seconds": query / len(queries),
            "index_bytes": size,
            "peak_bytes": peak,
            "single_query_seconds": single,
        }
        return self._outcome(arrays, tuple(queries.ids))

    def recompute(self, stored: Stored) -> Outcome:
        return self._outcome({k: stored.arrays[k] for k in STORED}, stored.query_ids)

    def _outcome(self, arrays: Mapping[str, np.ndarray], query_ids: tuple[str, ...]) -> Outcome:
        x, build, query, size, peak, single = (arrays[k] for k in STORED)
        metrics = {
            "examples_per_second": Metric(float(x[-1] / max(build[-1], 1e-9)), unit="1/s"),
            "query_seconds": _lower(query[-1], "s"),
            "single_query_seconds": _lower(np.median(single), "s"),
            "peak_bytes": _lower(peak[-1], "B"),
            "bytes_per_example": _lower(size[-1] / x[-1], "B"),
        }
        notes = [f"sizes measured: {', '.join(f'{n:.0f}' for n in x)}"]
        for name, y, unit in (
            ("build", build, "s"),
            ("query", query, "s"),
            ("index", size, "B"),
        ):
            growth = Growth.of(x, y)
            if growth.exponent is not None:
                metrics[f"{name}_exponent"] = _lower(growth.exponent, "")
            for big, label in zip(EXTRAPOLATED, ("1e6", "1e9")):
                metrics[f"{name}_at_{label}"] = _lower(growth.at(big), f"{unit} extrapolated")
        notes.append("values at 1e6 and 1e9 examples are extrapolated, not measured")
        return Outcome(
            primary="examples_per_second",
            metrics=metrics,
            per_query=single,
            query_ids=query_ids,
            arrays=arrays,
            notes=tuple(notes),
        )


def _lower(value: float, unit: str) -> Metric:
    return Metric(float(value), higher_is_better=False, unit=unit)


@dataclass(frozen=True)
class Growth:
    """cost = fixed + per_example * n, and the exponent of a power law, fitted to measurements."""

    fixed: float
    per_example: float
    exponent: float | None  # None if a measurement is 0
    largest: tuple[float, float]  # (n, cost)

    STEEP: ClassVar[float] = 1.15

    @classmethod
    def of(cls, n: np.ndarray, cost: np.ndarray) -> Growth:
        """Fits both laws to cost [size] at n [size]; neither term of the line may be negative."""
        from scipy.optimize import nnls

        # Relative errors have equal weight: small sizes are measured as well as large ones.
        scale = 1 / np.maximum(cost, 1e-12)
        design = np.stack([np.ones_like(n), n], axis=1)
        if cost.max() > 0:
            (fixed, slope), _ = nnls(design * scale[:, None], cost * scale)
        else:
            fixed, slope = 0.0, 0.0
        exponent = None
        if (cost > 0).all():
            exponent = float(np.polyfit(np.log(n), np.log(cost), 1)[0])
        return cls(float(fixed), float(slope), exponent, (float(n[-1]), float(cost[-1])))

    def at(self, n: float) -> float:
        """Estimates the cost at a size beyond the measured ones.

        Follows the line, or the power law from the largest size if growth is steeper than linear
        (exponent above `STEEP`), which a line would underestimate.
        """
        if self.exponent is not None and self.exponent > self.STEEP:
            return self.largest[1] * (n / self.largest[0]) ** self.exponent
        return self.fixed + self.per_example * n


def crossover(
    prepare_a: float, per_example_a: float, prepare_b: float, per_example_b: float
) -> float | None:
    """Returns the size from which a's total cost is below b's; 0 if always, None if never.

    Totals are prepare + per_example * n, in the same unit. From this size on, a method with a long
    preparation (such as AirRep's retrainings) is cheaper than one without.
    """
    if prepare_a <= prepare_b and per_example_a <= per_example_b:
        return 0.0
    if per_example_a >= per_example_b:
        return None
    return (prepare_a - prepare_b) / (per_example_b - per_example_a)


def crossover_interval(
    a: np.ndarray, b: np.ndarray, level: float = 0.95
) -> tuple[float, float | None] | None:
    """Computes a confidence interval of the size from which a's total cost is below b's.

    a [measurement, 2] and b [measurement, 2] hold (prepare, per_example) of repeated measurements;
    `a` has the smaller mean per_example. Returns (low, high) in examples, with high None if the
    measurements do not bound it, and None with fewer than two measurements of either. The interval
    is Fieller's: the sizes at which Welch's t-test finds no significant difference between the two
    totals, so it holds for two or three measurements, too. It covers the uncertainty of the
    measurements and assumes that growth continues along the line.
    """
    from scipy import stats

    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(a) < 2 or len(b) < 2:
        return None
    d0, d1 = b.mean(0) - a.mean(0)  # b's total minus a's is d0 + d1 * n
    at = -d0 / d1
    parts = [np.cov(x.T) / len(x) for x in (a, b)]  # covariance [2, 2] of each mean
    point = np.array([1.0, at])
    each = [float(point @ c @ point) for c in parts]
    if not sum(each) > 0:
        return float(at), float(at)
    df = sum(each) ** 2 / sum(v**2 / (len(x) - 1) for v, x in zip(each, (a, b)))
    t2 = float(stats.t.ppf((1 + level) / 2, df)) ** 2
    c = parts[0] + parts[1]
    # (d0 + d1 n)^2 <= t2 var(n): a quadratic in n that holds at `at`.
    square, linear, constant = d1**2 - t2 * c[1, 1], d0 * d1 - t2 * c[0, 1], d0**2 - t2 * c[0, 0]
    inside = linear**2 - square * constant
    if square > 0:
        spread = np.sqrt(max(0.0, inside))
        return max(0.0, float((-linear - spread) / square)), float((-linear + spread) / square)
    if inside < 0 or square == 0:
        return 0.0, None
    upper = float((-linear - np.sqrt(inside)) / square)  # the larger root, as square < 0
    return (max(0.0, upper) if at >= upper else 0.0), None
