"""Statistics against scipy, dattri, brute force and simulation."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from tdabench import stats
from tdabench.errors import MethodError, UsageError

RNG = np.random.default_rng(0)


def tied(shape: tuple[int, ...], levels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, levels, size=shape).astype(np.float64)


# ------------------------------------------------------------------ ranks and Spearman


@pytest.mark.parametrize("levels", [1, 2, 5, 10**6])
def test_average_ranks_equal_scipy(levels: int) -> None:
    a = tied((7, 23), levels)
    np.testing.assert_array_equal(stats.average_ranks(a), rankdata(a, axis=1))


@pytest.mark.parametrize(("n", "levels"), [(2, 10**6), (3, 2), (25, 4), (100, 10**6), (100, 7)])
def test_spearman_equals_scipy_with_and_without_ties(n: int, levels: int) -> None:
    a, b = tied((30, n), levels, 1), tied((30, n), levels, 2)
    b = b + a  # so that correlations are not all near 0
    ours = stats.spearman_rows(a, b)
    for i in range(30):
        flat = np.ptp(a[i]) == 0 or np.ptp(b[i]) == 0
        expected = 0.0 if flat else spearmanr(a[i], b[i])[0]
        assert ours[i] == pytest.approx(expected, abs=1e-12)


def test_spearman_of_float32_scores_equals_scipy() -> None:
    a = RNG.normal(size=(50, 40)).astype(np.float32)
    b = a + RNG.normal(size=(50, 40))
    expected = [spearmanr(x, y)[0] for x, y in zip(a, b)]
    np.testing.assert_allclose(stats.spearman_rows(a, b), expected, atol=1e-12)


def test_infinite_scores_rank_and_nan_is_refused_with_a_count() -> None:
    a = np.array([[-np.inf, 0.0, np.inf], [1.0, 2.0, 3.0]])
    np.testing.assert_allclose(stats.spearman_rows(a, np.tile([1.0, 2.0, 3.0], (2, 1))), 1)
    a[1, 0] = np.nan
    with pytest.raises(MethodError, match="scores hold NaN in 1 of 2 rows"):
        stats.spearman_rows(a, a)
    with pytest.raises(UsageError, match=r"\(2, 3\) and truth \(2, 2\)"):
        stats.spearman_rows(a, a[:, :2])


def test_lds_equals_dattri_on_tie_free_input() -> None:
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("dattri.metric")
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(9, 40)).astype(np.float32)  # [query, train]
    members = np.stack([rng.choice(40, 12, replace=False) for _ in range(15)])
    truth = rng.normal(size=(9, 15))
    from tdabench.groups import Groups, pool_scores

    ours = stats.spearman_rows(pool_scores(scores, Groups.of(members, 40)), truth)
    theirs, _ = peer.lds(
        torch.from_numpy(scores.T.copy()),
        (torch.from_numpy(truth.T.copy()), torch.from_numpy(members)),
    )
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


# ------------------------------------------------------------------ bootstrap


@pytest.mark.parametrize("levels", [10**6, 6])
def test_replicates_equal_spearman_of_repeated_groups(levels: int) -> None:
    """Reweighting without sorting gives what drawing, sorting and ranking again gives."""
    a, b = tied((6, 20), levels, 1), tied((6, 20), levels, 2) + 0.3 * tied((6, 20), levels, 1)
    a[2] = 1.0
    weights = stats.resampling_weights(20, 50, 0, "groups")
    fast = stats.spearman_replicates(a, b, weights)
    for r in range(50):
        draw = np.repeat(np.arange(20), weights[:, r].astype(int))
        np.testing.assert_allclose(
            fast[:, r], stats.spearman_rows(a[:, draw], b[:, draw]), atol=2e-6
        )


def test_replicates_do_not_depend_on_how_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = RNG.normal(size=(2, 4, 5000))  # wide enough for several cuts
    weights = stats.resampling_weights(5000, 100, 0, "groups")
    whole = stats.spearman_replicates(a, b, weights)
    part = stats.spearman_replicates(a, b, np.ascontiguousarray(weights[:, 64:96]))
    np.testing.assert_allclose(part, whole[:, 64:96], atol=1e-6)


def test_draws_depend_on_shape_and_seed_only() -> None:
    first = stats.resampling_weights(30, 10, 0, "groups")
    np.testing.assert_array_equal(first, stats.resampling_weights(30, 10, 0, "groups"))
    assert (first.sum(axis=0) == 29).all()
    assert (first != stats.resampling_weights(30, 10, 1, "groups")).any()
    assert (first != stats.resampling_weights(30, 10, 0, "queries")).any()


def test_perfect_scores_are_not_certain() -> None:
    """Twenty of twenty is [0.83, 1]: what did not vary in a sample may vary beyond it."""
    a = RNG.normal(size=(10, 20))
    boot = stats.bootstrap_lds(a, a, 100)
    assert boot.interval() is None  # nothing moved, and the range is not known
    low, high = boot.interval(within=(-1.0, 1.0)) or (0, 0)
    assert 0 < low < 0.6
    assert high == 1
    right = stats.bootstrap_queries(np.ones(20), 100)
    low, high = right.share_interval() or (0, 0)
    # Student's t in place of the normal quantile widens Wilson's [0.839, 1] a little.
    assert low == pytest.approx(0.82, abs=0.01)
    assert high == 1
    assert right.interval(within=(0.0, 1.0)) == pytest.approx((low, high))
    half = stats.bootstrap_queries(np.full(20, 0.5), 100)
    assert half.share_interval() is None
    assert half.interval(within=(0.0, 1.0)) is None


def test_wilson_equals_statsmodels_formula() -> None:
    low, high = stats.wilson(0.9, 50)
    assert (low, high) == pytest.approx((0.7864, 0.9565), abs=1e-4)  # Wilson 1927, by hand
    assert stats.wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert stats.wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert stats.wilson(0.5, 10, df=9)[0] < stats.wilson(0.5, 10)[0]


def test_a_share_has_wilsons_interval_and_clusters_widen_it() -> None:
    rng = np.random.default_rng(4)
    rate = np.repeat(rng.beta(2, 2, size=30), 10)
    values = (rng.random(300) < rate).astype(float)
    tasks = np.repeat(np.arange(30), 10)
    alone = stats.bootstrap_queries(values, 2000).share_interval() or (0, 0)
    assert alone == pytest.approx(stats.wilson(values.mean(), 300), abs=0.01)
    boot = stats.bootstrap_queries(values, 2000, tasks=tasks)
    wide = boot.share_interval() or (0, 0)
    these = boot.share_interval(scope="these tasks")
    assert these == pytest.approx(alone)
    assert wide[1] - wide[0] > 1.3 * (alone[1] - alone[0])


@pytest.mark.parametrize(("n", "p"), [(2, 1 / 2), (5, 1 / 16), (20, 2.0**-19)])
def test_differences_that_do_not_vary_get_the_exact_sign_flip_test(n: int, p: float) -> None:
    """A is right and B wrong every time: 2 of the 2^n sign assignments are as extreme."""
    a, b = np.ones(n), np.zeros(n)
    found = stats.compare(stats.bootstrap_queries(a), stats.bootstrap_queries(b))
    assert found.p == p
    assert found.low is None
    assert stats.compare(stats.bootstrap_queries(a), stats.bootstrap_queries(a)).p == 1.0
    nearly = 1 + 1e-9 * RNG.normal(size=n)
    assert stats.bootstrap_queries(nearly).p_value() == p


def test_one_query_or_one_group_has_no_interval_and_no_significance() -> None:
    a = RNG.normal(size=(1, 20))
    alone = stats.bootstrap_lds(a, a, 50)
    assert alone.value == 1
    assert alone.interval() is None
    assert alone.p_value() == 1.0
    assert stats.bootstrap_lds(np.ones((5, 1)), np.ones((5, 1)), 50).interval() is None


def test_query_bootstrap_matches_the_standard_error() -> None:
    values = RNG.normal(size=500)
    boot = stats.bootstrap_queries(values, 4000)
    assert boot.value == pytest.approx(values.mean())
    assert np.sqrt(boot.variance) == pytest.approx(values.std() / np.sqrt(500), rel=0.05)
    low, high = boot.interval() or (0, 0)
    assert low < boot.value < high
    assert boot.variance == pytest.approx(values.var(ddof=1) / 500, rel=0.08)


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_bootstrap_variance_of_a_mean_is_unbiased(n: int) -> None:
    """s^2 / n with n - 1 in s^2: n draws of n would give (n - 1) / n of it."""
    values = RNG.normal(size=n)
    boot = stats.bootstrap_queries(values, 40_000)
    assert boot.variance == pytest.approx(values.var(ddof=1) / n, rel=0.05)
    task = np.repeat(np.arange(n), 4)  # the same by whole tasks, whatever their queries
    many = np.repeat(values, 4) + np.tile([-1.0, 1.0, -2.0, 2.0], n)
    if n >= stats.MIN_TASKS:
        drawn = stats.bootstrap_queries(many, 40_000, tasks=task)
        assert drawn.variance_of("new tasks") == pytest.approx(boot.variance, rel=0.05)
        assert drawn.n_tasks == n


def test_a_record_gives_the_same_comparison_as_the_run() -> None:
    truth = RNG.normal(size=(20, 30))
    a, b = (stats.bootstrap_lds(truth + s * RNG.normal(size=truth.shape), truth) for s in (1, 2))
    again = [
        stats.Bootstrap.of_record(
            x.value, np.zeros(20), {"replicates": x.both, **x.arrays()}
        )
        for x in (a, b)
    ]  # fmt: skip
    assert stats.compare(*again) == stats.compare(a, b)
    with pytest.raises(UsageError, match="not paired"):
        stats.compare(a, stats.bootstrap_lds(truth, truth, 10))


def _simulate(rng: np.random.Generator, n_queries: int, n_groups: int, shared: float):
    """Truth and two methods of equal merit; rows share noise as retrained models would."""

    def noise() -> np.ndarray:
        own = rng.normal(size=(n_queries, n_groups))
        return np.sqrt(1 - shared) * own + np.sqrt(shared) * rng.normal(size=n_groups)

    truth = noise()
    skill = np.clip(rng.normal(0.3, 0.2, size=n_queries), -0.9, 0.9)
    methods = []
    for _ in range(2):
        r = np.clip(skill + rng.normal(0, 0.1, size=n_queries), -0.95, 0.95)[:, None]
        methods.append(r * truth + np.sqrt(1 - r * r) * noise())
    return truth, methods


def _simulate_tasks(rng, n_tasks: int, per_task: int, n_groups: int):
    """Truth, two methods of equal merit, tasks: skill differs between tasks more than within,
    and each method's own skill differs by task, as on real data."""
    n = n_tasks * per_task
    tasks = np.repeat(np.arange(n_tasks), per_task)
    truth = rng.normal(size=(n, n_groups)) + 0.3 * rng.normal(size=n_groups)
    common = rng.normal(0.3, 0.15, size=n_tasks)
    methods = []
    for _ in range(2):
        skill = common + rng.normal(0, 0.1, size=n_tasks)
        r = np.clip(skill[tasks] + rng.normal(0, 0.1, size=n), -0.95, 0.95)[:, None]
        methods.append(r * truth + np.sqrt(1 - r * r) * rng.normal(size=truth.shape))
    return truth, methods, tasks


def test_intervals_for_new_tasks_cover_and_those_for_these_tasks_do_not() -> None:
    """At 30 tasks: new ones are drawn for each of 200 simulated benchmarks."""
    rng = np.random.default_rng(12)
    n, shape = 200, (30, 4, 20)
    expected = np.mean(
        [stats.lds(m, t) for t, ms, _ in (_simulate_tasks(rng, *shape) for _ in range(1500))
         for m in ms]
    )  # fmt: skip
    covered = narrow = rejected = rejected_narrow = 0
    for i in range(n):
        truth, methods, tasks = _simulate_tasks(rng, *shape)
        a, b = (stats.bootstrap_lds(m, truth, 200, seed=i, tasks=tasks) for m in methods)
        low, high = a.interval() or (np.nan, np.nan)
        covered += low <= expected <= high
        low, high = a.interval(scope="these tasks") or (np.nan, np.nan)
        narrow += low <= expected <= high
        rejected += (a - b).p_value() < 0.05
        rejected_narrow += (a - b).p_value("these tasks") < 0.05
    assert 0.92 <= covered / n
    assert narrow < covered
    assert rejected / n <= 0.085
    assert rejected_narrow > rejected


@pytest.mark.parametrize("n", [3, 5, 10])
def test_few_queries_keep_the_size_of_the_test(n: int) -> None:
    rng = np.random.default_rng(n)
    hits = sum(
        stats.bootstrap_queries(rng.normal(size=n), 200, seed=i).p_value() < 0.05
        for i in range(1500)
    )
    assert hits / 1500 <= 0.065


def test_tasks_that_are_too_few_or_all_alike_are_no_clusters() -> None:
    values = RNG.normal(size=40)
    few = stats.bootstrap_queries(values, 50, tasks=np.arange(40) % 5)
    assert few.scopes == ("these tasks",)
    lopsided = np.zeros(40, dtype=int)
    lopsided[:9] = np.arange(1, 10)
    assert stats.effective_tasks(lopsided) < 2
    assert stats.bootstrap_queries(values, 50, tasks=lopsided).tasks is None
    singles = stats.bootstrap_queries(values, 50, tasks=np.arange(40))
    assert singles.interval() == stats.bootstrap_queries(values, 50).interval()
    assert stats.task_codes(["", ""]) is None
    codes = stats.task_codes(["b", "", "a", "b", ""])
    assert codes is not None
    assert codes[0] == codes[3]
    assert len(set(codes.tolist())) == 4


def test_the_wider_scope_is_what_is_shown() -> None:
    """Tasks that resemble each other more than chance would: the other interval is the wider."""
    tasks = np.repeat(np.arange(10), 10)
    values = np.tile(np.linspace(-1, 1, 10), 10) + 0.01 * RNG.normal(size=100)
    boot = stats.bootstrap_queries(values, 500, tasks=tasks)
    assert boot.variance_of("new tasks") < boot.variance_of("these tasks") == boot.variance
    assert boot.interval() == boot.interval(scope="these tasks")
    assert boot.p_value() == boot.p_value("these tasks")


@pytest.mark.parametrize("shared", [0.0, 0.3])
def test_intervals_cover_and_the_paired_test_keeps_its_error_rate(shared: float) -> None:
    """300 simulated benchmarks: 95% intervals hold the true LDS, equal methods are told apart
    in 5% of cases at most. Bounds are three standard errors of 300 repeats wide."""
    rng = np.random.default_rng(11)
    n, shape = 300, (40, 30)
    # What an LDS of this design comes to on average: the quantity that the interval is for.
    expected = np.mean(
        [stats.lds(m, t) for t, ms in (_simulate(rng, *shape, shared) for _ in range(2000))
         for m in ms]
    )  # fmt: skip
    covered = rejected = 0
    for i in range(n):
        truth, methods = _simulate(rng, *shape, shared)
        a, b = (stats.bootstrap_lds(m, truth, 200, seed=i) for m in methods)
        low, high = a.interval() or (np.nan, np.nan)
        covered += low <= expected <= high
        rejected += stats.compare(a, b).p < 0.05
    assert 0.91 <= covered / n <= 0.99
    assert rejected / n <= 0.09


def test_the_paired_test_finds_a_real_difference() -> None:
    rng = np.random.default_rng(2)
    truth = rng.normal(size=(100, 50))
    shared = rng.normal(size=truth.shape)
    a, b = (stats.bootstrap_lds(truth + s * shared, truth) for s in (2.0, 3.0))
    found = stats.compare(a, b)
    assert found.p < 1e-6
    assert found.low is not None
    assert found.low > 0
    assert found.verdict() == "better"
    assert stats.compare(b, a).verdict() == "worse"
    assert stats.compare(b, a).verdict(higher_is_better=False) == "better"
    # Unpaired, the two intervals would be far wider than the difference's.
    width = (found.high or 0) - found.low
    assert width < 0.7 * np.subtract(*(a.interval() or (0, 0))[::-1])


# ------------------------------------------------------------------ ceiling


@pytest.mark.parametrize("n_seeds", [2, 3, 4, 8])
@pytest.mark.parametrize("spread", [0.0, 1.2])
def test_ceiling_is_what_knowing_the_expected_loss_would_reach(n_seeds: int, spread: float) -> None:
    """Signal-to-noise ratios alike over queries, or spread over orders of magnitude."""
    rng = np.random.default_rng(4)
    found, oracle = [], []
    for i in range(4):
        snr = np.exp(rng.normal(-0.5, spread, size=(200, 1)))
        expected = np.sqrt(snr) * rng.normal(size=(200, 60))
        truth = expected + rng.normal(size=(n_seeds, 200, 60))
        ceiling = stats.noise_ceiling(truth, 20, seed=i)
        assert ceiling is not None
        found.append(ceiling.value)
        oracle.append(stats.lds(expected, truth.mean(axis=0)))
    assert np.mean(found) == pytest.approx(np.mean(oracle), abs=0.015)


def test_ceiling_interval_covers() -> None:
    rng = np.random.default_rng(5)

    def truth() -> np.ndarray:
        return rng.normal(size=(50, 40)) + rng.normal(size=(4, 50, 40))

    found = [stats.noise_ceiling(truth(), 2) for _ in range(100)]
    target = np.mean([c.value for c in found if c])
    inside = 0
    for i in range(60):
        ceiling = stats.noise_ceiling(truth(), 100, seed=i)
        low, high = (ceiling and ceiling.interval()) or (0, 0)
        inside += low <= target <= high
    assert inside / 60 >= 0.85


def test_no_ceiling_below_a_reliability_of_three_tenths() -> None:
    rng = np.random.default_rng(3)
    weak = 0.3 * rng.normal(size=(1, 200, 60)) + rng.normal(size=(2, 200, 60))
    found = stats.reliability(weak)
    assert found is not None
    assert 0.1 < found < 0.3
    assert stats.noise_ceiling(weak, 10) is None
    strong = rng.normal(size=(1, 200, 60)) + rng.normal(size=(2, 200, 60))
    ceiling = stats.noise_ceiling(strong, 10)
    assert ceiling is not None
    assert ceiling.reliability == pytest.approx(stats.reliability(strong))
    assert stats.reliability(strong[:1]) is None


def test_groups_that_truths_share_are_drawn_alike() -> None:
    names = [f"g{i}" for i in range(30)]
    drawn = stats.identity_weights({"all": names, "some": names[10:20][::-1]}, 400)
    np.testing.assert_array_equal(drawn["some"], drawn["all"][10:20][::-1])
    assert (drawn["all"].sum(axis=0) == 29).all()
    truth = RNG.normal(size=(20, 30))
    scores = truth + RNG.normal(size=truth.shape)
    part = slice(10, 20)
    own = stats.bootstrap_lds(scores[:, part], truth[:, part], 4000)
    shared = stats.bootstrap_lds(
        scores[:, part], truth[:, part], 4000,
        weights=stats.identity_weights({"all": names, "some": names[part]}, 4000)["some"],
    )  # fmt: skip
    assert shared.variance == pytest.approx(own.variance, rel=0.25)


def test_no_ceiling_from_one_seed_or_from_pure_noise() -> None:
    assert stats.noise_ceiling(RNG.normal(size=(1, 5, 20))) is None
    flat = np.zeros((4, 5, 20))
    assert stats.noise_ceiling(flat) is None
    opposed = np.stack([np.arange(20.0), -np.arange(20.0)])[:, None].repeat(5, axis=1)
    assert stats.noise_ceiling(opposed) is None


def test_noiseless_truth_has_a_ceiling_of_one() -> None:
    truth = np.repeat(RNG.normal(size=(1, 6, 20)), 4, axis=0)
    ceiling = stats.noise_ceiling(truth, 50)
    assert ceiling is not None
    assert ceiling.value == pytest.approx(1)
    lds = stats.bootstrap_lds(RNG.normal(size=(6, 20)), truth[0], 50)
    assert ceiling.share(lds).value == pytest.approx(lds.value)


def test_spearman_brown_doubles_a_test() -> None:
    assert stats.spearman_brown(0.5, 2) == pytest.approx(2 / 3)
    assert stats.spearman_brown(0.0, 4) == 0
    assert stats.spearman_brown(1.0, 4) == 1


@pytest.mark.parametrize(("n", "expected"), [(2, 1), (3, 3), (4, 3), (5, 15), (6, 10), (8, 35)])
def test_halvings_are_every_pair_of_disjoint_halves(n: int, expected: int) -> None:
    found = stats._halvings(n, 0)
    assert len(found) == expected
    for a, b in found:
        assert len(a) == len(b) == n // 2
        assert not set(a) & set(b)
    assert len(stats._halvings(9, 0)) == stats.MAX_SPLITS


# ------------------------------------------------------------------ additive ceiling


def additive_world(shares: tuple[float, float, float], m: int, q: int, seed: int):
    """Outcomes [query, group] whose variance is of effects, pairs of examples and noise."""
    rng = np.random.default_rng(seed)
    n = 200
    member = np.zeros((m, n))
    for row in member:
        row[rng.choice(n, n // 4, replace=False)] = 1
    centred = member - member.mean(0)
    parts = [centred @ rng.standard_t(3, size=(n, q)), np.zeros((m, q)), rng.normal(size=(m, q))]
    for _ in range(400):  # products of two centred memberships: nothing for a sum to explain
        a, b = rng.choice(n, 2, replace=False)
        parts[1] += np.outer(centred[:, a] * centred[:, b], rng.normal(size=q))
    return sum((v**0.5) * p / p.std(0) for v, p in zip(shares, parts)).T, member


@pytest.mark.parametrize("shares", [(1, 0, 0), (0.6, 0.2, 0.2), (0.3, 0.5, 0.2), (0, 0.5, 0.5)])
def test_additive_ceiling_is_the_share_of_sums(shares: tuple[float, float, float]) -> None:
    found = []
    for seed in range(12):
        got = stats.additive_ceiling(*additive_world(shares, 160, 100, seed))
        assert got is not None
        found.append((got.share, got.error, got.low <= shares[0] ** 0.5 <= got.high))
    share, error, covered = np.mean(found, axis=0)
    spread = np.std([f[0] for f in found], ddof=1)
    assert share == pytest.approx(shares[0], abs=3 * spread / 12**0.5 + 0.025)
    assert 0.5 * spread < error < 3 * spread + 0.01
    assert covered > 0.8


def test_additive_ceiling_needs_groups_that_vary() -> None:
    y, member = additive_world((1, 0, 0), 9, 20, 0)
    assert stats.additive_ceiling(y, member) is None
    y, member = additive_world((0.5, 0, 0.5), 20, 4, 0)
    assert stats.additive_ceiling(y, member) is None  # too uncertain
    y, member = additive_world((1, 0, 0), 160, 100, 0)
    assert stats.additive_ceiling(np.ones_like(y), member) is None
    assert stats.additive_ceiling(y, np.ones_like(member)) is None
    whole = stats.additive_ceiling(y, member)
    assert whole is not None
    more = stats.additive_ceiling(np.concatenate([y, np.zeros((5, 160))]), member)
    assert more is not None
    assert more.share == pytest.approx(whole.share)  # queries that never vary do not count
    again = stats.additive_ceiling(7 * y + 3, member)
    assert again is not None
    assert again.value == pytest.approx(whole.value)
    with pytest.raises(MethodError, match="NaN"):
        stats.additive_ceiling(np.where(y > 1, np.nan, y), member)
    with pytest.raises(UsageError, match="160 groups"):
        stats.additive_ceiling(y, member[1:])


# ------------------------------------------------------------------ many methods


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(stats.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(stats.holm([0.5, 0.6]), [1.0, 1.0])
    assert stats.holm([]).shape == (0,)


def _made(value: float, sd: float, seed: int) -> stats.Bootstrap:
    noise = np.random.default_rng(seed).normal(0, sd, size=1000)
    return stats.Bootstrap(value, value + noise, value + noise, None, df=1000)


@pytest.mark.parametrize("kind", ["plain", "groups", "tasks", "tasks and groups", "few"])
def test_all_pairs_at_once_are_the_tests_of_one_pair_at_a_time(kind: str) -> None:
    rng = np.random.default_rng(5)
    boots = {}
    for i in range(6):
        both, queries, groups, tasks, tasks_both = rng.normal(0.3, 0.02, (5, 200))
        boots[f"m{i}"] = stats.Bootstrap(
            0.3 + 0.01 * i,
            both,
            queries,
            groups if "groups" in kind else None,
            df=0 if kind == "few" else 20 + i,
            tasks=tasks if "tasks" in kind else None,
            tasks_both=tasks_both if "tasks" in kind else None,
            df_tasks=9 - i if "tasks" in kind else 0,
            n_tasks=10,
        )
    boots["again"] = boots["m2"]  # no difference at all
    moved = {k: v + 0.125 for k, v in boots["m3"].replicates().items()}
    boots["moved"] = replace(boots["m3"], value=boots["m3"].value + 0.125, **moved)  # no variance
    ranking = stats.rank_methods(boots)
    pairs = list(itertools.combinations(ranking.labels, 2))
    expected = stats.holm([stats.compare(boots[a], boots[b]).p for a, b in pairs])
    np.testing.assert_allclose([ranking.p[pair] for pair in pairs], expected, rtol=1e-9)
    with pytest.raises(UsageError, match="not paired"):
        stats.rank_methods({**boots, "other": _made(0.1, 0.1, 1)})


def test_methods_are_ordered_and_lettered_by_what_tells_them_apart() -> None:
    results = {
        "worst": _made(0.1, 0.01, 1),
        "tie-b": _made(0.299, 0.01, 2),
        "best": _made(0.5, 0.01, 3),
        "tie-a": _made(0.3, 0.01, 4),
    }
    ranking = stats.rank_methods(results)
    assert ranking.labels == ("best", "tie-a", "tie-b", "worst")
    assert ranking.places == (1, 2, 3, 4)
    assert ranking.spans == ((1, 1), (2, 3), (2, 3), (4, 4))
    assert ranking.letters == ("a", "b", "b", "c")
    assert ranking.p["best", "worst"] == ranking.p["worst", "best"] < 0.05
    lower = stats.rank_methods(results, higher_is_better=False)
    assert lower.labels[0] == "worst"
    assert stats.rank_methods({}).places == ()
    same = stats.rank_methods({"x": _made(0.2, 0.1, 1), "y": _made(0.2, 0.1, 1)})
    assert same.places == (1, 1)


@given(st.integers(0, 9).flatmap(
    lambda n: st.tuples(st.just(n), st.sets(st.sampled_from([(i, j) for i in range(n)
        for j in range(i)] or [(0, 0)]))))
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_letters_and_ranks_never_contradict_a_pairwise_test(drawn) -> None:
    """Whatever the tests say of pairs, contradictory-looking sets included: two methods share a
    letter if and only if they are not told apart, each place lies in its own span, and spans
    overlap where methods are not told apart."""
    n, pairs = drawn
    apart = np.zeros((n, n), dtype=bool)
    for i, j in pairs:
        if i != j:
            apart[i, j] = apart[j, i] = True
    letters = stats.letter_display(apart)
    spans = stats.rank_spans(range(1, n + 1), apart)
    assert len(letters) == len(spans) == n
    for i in range(n):
        low, high = spans[i]
        assert low <= i + 1 <= high
        assert letters[i]
        for j in range(n):
            assert bool(set(letters[i]) & set(letters[j])) != apart[i, j]
            if not apart[i, j]:
                assert low <= spans[j][1]
                assert spans[j][0] <= high
                assert low <= j + 1 <= high
    if n and not apart.any():
        assert set(letters) == {"a"}


def test_letters_by_hand() -> None:
    """Piepho's case of overlapping groups: a and c differ, b is like both."""
    apart = np.zeros((3, 3), dtype=bool)
    apart[0, 2] = apart[2, 0] = True
    assert stats.letter_display(apart) == ("a", "ab", "b")
    apart[:] = ~np.eye(3, dtype=bool)
    assert stats.letter_display(apart) == ("a", "b", "c")
    many = ~np.eye(60, dtype=bool)
    assert len(set(stats.letter_display(many))) == 60


def test_family_wise_error_of_ranking_equal_methods() -> None:
    """Six equal methods: in 95% of repeats none is separated from another."""
    rng = np.random.default_rng(8)
    split = 0
    for i in range(100):
        values = rng.normal(size=(6, 200))
        results = {str(m): stats.bootstrap_queries(v, 200, seed=i) for m, v in enumerate(values)}
        split += len(set(stats.rank_methods(results).letters)) > 1
    assert split / 100 <= 0.12


def test_variance_is_laid_at_the_right_door() -> None:
    rng = np.random.default_rng(6)
    signal = rng.normal(size=(200, 40))
    skill = np.clip(rng.normal(0.4, 0.3, size=(200, 1)), -0.9, 0.9)
    scores = skill * signal + np.sqrt(1 - skill**2) * rng.normal(size=signal.shape)
    noisy = signal + 1.0 * rng.normal(size=(4, *signal.shape))
    boot = stats.bootstrap_lds(scores, noisy.mean(axis=0))
    found = stats.variance_sources(boot, scores, noisy, method_values=[0.2, 0.3])
    assert found.queries > 2 * found.groups  # queries differ in skill; no group is special
    assert found.truth_seeds is not None
    assert 0 < found.truth_seeds < found.cells
    assert found.method_seeds == pytest.approx(0.005)
    total = found.queries + found.groups + found.cells
    assert total == pytest.approx(boot.variance, rel=0.25)
    alone = stats.variance_sources(boot, scores, noisy[:1])
    assert alone.truth_seeds is None
    assert alone.method_seeds is None


# ------------------------------------------------------------------ retrieval with ties


def _orders(scores: np.ndarray):
    """Every order of the items that sorts by score, ties in all their permutations."""
    for p in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(p)):
            yield list(p)


@pytest.mark.parametrize("seed", range(6))
def test_retrieval_metrics_are_expectations_over_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, size=6).astype(float)
    relevant = rng.random(6) < 0.5
    relevant[rng.integers(6)] = True
    ap, rr, recall = [], [], []
    for order in _orders(scores):
        hits = relevant[order]
        precision = np.cumsum(hits) / np.arange(1, 7)
        ap.append(precision[hits].mean())
        rr.append(1 / (1 + np.argmax(hits)))
        recall.append(hits[:2].sum() / hits.sum())
    assert stats.average_precision(scores, relevant) == pytest.approx(np.mean(ap))
    assert stats.reciprocal_of(stats.tie_blocks(scores, relevant)) == pytest.approx(np.mean(rr))
    assert stats.recall_of(stats.tie_blocks(scores, relevant), 2) == pytest.approx(np.mean(recall))


def test_average_precision_without_ties_equals_the_usual_one() -> None:
    scores, relevant = RNG.normal(size=200), RNG.random(200) < 0.1
    order = np.argsort(-scores)
    hits = relevant[order]
    usual = (np.cumsum(hits) / np.arange(1, 201))[hits].mean()
    assert stats.average_precision(scores, relevant) == pytest.approx(usual)


def test_retrieval_edges() -> None:
    scores = np.array([3.0, 2.0, 1.0])
    assert stats.average_precision(scores, [True, False, False]) == 1
    assert stats.average_precision(scores, [False, False, True]) == pytest.approx(1 / 3)
    assert np.isnan(stats.average_precision(scores, [False] * 3))
    assert np.isnan(stats.recall_of(stats.tie_blocks(scores, [False] * 3), 2))
    assert stats.reciprocal_of(stats.tie_blocks(scores, [False] * 3)) == 0
    assert stats.recall_of(stats.tie_blocks(scores, [True] * 3), 10) == 1
    with pytest.raises(MethodError, match="NaN"):
        stats.average_precision([np.nan, 1.0], [True, False])
