"""Cost: growth laws on exact data, and the benchmark on a method of known growth."""

from __future__ import annotations

import numpy as np
import pytest
from constructed import FixedIndex, corpus

from tdabench.benchmark import Built
from tdabench.benchmarks.cost import Cost, Growth, crossover, crossover_interval
from tdabench.errors import DataError, UsageError

N = np.array([500.0, 1000.0, 2000.0])


def test_a_line_is_found_and_extrapolated() -> None:
    g = Growth.of(N, 3 + 0.01 * N)
    assert g.fixed == pytest.approx(3)
    assert g.per_example == pytest.approx(0.01)
    assert g.at(1e6) == pytest.approx(3 + 0.01 * 1e6)


def test_a_fixed_cost_is_not_multiplied() -> None:
    g = Growth.of(N, np.full(3, 7.0))
    assert g.exponent == pytest.approx(0, abs=1e-12)
    assert g.at(1e9) == pytest.approx(7)


def test_steeper_than_linear_growth_goes_on_as_it_is() -> None:
    g = Growth.of(N, 1e-6 * N**2)
    assert g.exponent == pytest.approx(2)
    assert g.at(1e6) == pytest.approx(1e-6 * 1e12, rel=1e-6)


def test_no_cost_at_all() -> None:
    g = Growth.of(N, np.zeros(3))
    assert g.exponent is None
    assert g.at(1e9) == 0


def test_crossover_is_where_preparing_has_paid() -> None:
    assert crossover(100, 0.1, 0, 0.3) == pytest.approx(500)
    assert crossover(0, 0.1, 100, 0.3) == 0
    assert crossover(100, 0.3, 0, 0.1) is None
    assert crossover(100, 0.3, 0, 0.3) is None


def test_the_interval_of_a_crossover_is_where_the_totals_do_not_differ() -> None:
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(0)
    a = np.column_stack([100 + rng.standard_normal(4), 0.1 + 0.005 * rng.standard_normal(4)])
    b = np.column_stack([np.zeros(3), 0.3 + 0.01 * rng.standard_normal(3)])
    low, high = crossover_interval(a, b)
    at = crossover(*a.mean(0), *b.mean(0))
    assert low < at < high
    # At either end Welch's test of the two totals gives p = 0.05, but for its degrees of freedom,
    # which are those at the crossover.
    for n, sign in ((low, 1), (high, -1)):
        total_a, total_b = (x[:, 0] + x[:, 1] * n for x in (a, b))
        found = ttest_ind(total_a, total_b, equal_var=False)
        assert np.sign(found.statistic) == sign
        assert found.pvalue == pytest.approx(0.05, abs=0.02)


def test_an_interval_of_a_crossover_covers_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(1), 0
    for _ in range(400):
        a = np.column_stack([np.full(3, 100.0), 0.1 + 0.01 * rng.standard_normal(3)])
        b = np.column_stack([np.zeros(3), 0.3 + 0.02 * rng.standard_normal(3)])
        low, high = crossover_interval(a, b)
        covered += low <= 500 and (high is None or 500 <= high)
    assert 0.92 <= covered / 400 <= 0.98


def test_an_interval_of_a_crossover_says_what_it_does_not_know() -> None:
    one = np.array([[100.0, 0.1]])
    two = np.array([[0.0, 0.3], [0.0, 0.31]])
    assert crossover_interval(one, two) is None
    same = np.repeat(one, 2, axis=0), np.repeat(two[:1], 2, axis=0)
    assert crossover_interval(*same) == pytest.approx((500, 500))
    vague = np.array([[100.0, 0.1], [100.0, 0.45]])  # may never be cheaper
    low, high = crossover_interval(vague, two)
    assert high is None
    assert 0 <= low < 1000


def test_cost_of_a_method_that_grows_linearly(make_context) -> None:
    train, queries = corpus(40, "t"), corpus(6, "q")
    sizes = []

    def build(part):
        sizes.append(len(part))
        index = FixedIndex(np.zeros((6, len(part))), queries.ids)
        return Built(index, seconds=1 + 0.5 * len(part), peak_bytes=7, index_bytes=100 * len(part))

    context = make_context(FixedIndex(np.zeros((6, 40)), queries.ids), train, queries, build=build)
    out = Cost(queries=4).run(context)
    m = out.metrics
    assert sizes == [10, 20, 40]
    assert m["examples_per_second"].value == pytest.approx(40 / 21)
    assert m["bytes_per_example"].value == pytest.approx(100)
    assert m["index_exponent"].value == pytest.approx(1)
    assert m["build_at_1e6"].value == pytest.approx(1 + 0.5e6)
    assert m["index_at_1e9"].value == pytest.approx(1e11)
    assert "extrapolated" in m["build_at_1e6"].unit
    assert any("extrapolated" in n for n in out.notes)
    assert len(out.per_query) == len(out.query_ids) == 4


def test_cost_edges(make_context) -> None:
    queries = corpus(6, "q")
    one = make_context(FixedIndex(np.zeros((6, 1)), queries.ids), corpus(1, "t"), queries)
    with pytest.raises(DataError, match="too few to measure growth"):
        Cost().run(one)
    context = make_context(FixedIndex(np.zeros((6, 9)), queries.ids), corpus(9, "t"), queries)
    with pytest.raises(UsageError, match="not available here"):
        Cost().run(context)
    with pytest.raises(UsageError, match="at least two sizes"):
        Cost(fractions=(1.0,))
