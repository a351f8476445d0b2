"""Statistics against scipy, dattri, brute force and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
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
    assert (first.sum(axis=0) == 30).all()
    assert (first != stats.resampling_weights(30, 10, 1, "groups")).any()
    assert (first != stats.resampling_weights(30, 10, 0, "queries")).any()


def test_perfect_scores_have_an_interval_of_no_width() -> None:
    a = RNG.normal(size=(10, 20))
    low, high = stats.bootstrap_lds(a, a, 100).interval() or (0, 0)
    assert low == pytest.approx(1, abs=1e-6)
    assert high == pytest.approx(1, abs=1e-6)


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
    assert stats.bootstrap_queries(np.ones(7), 50).interval() == (1.0, 1.0)


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


# ------------------------------------------------------------------ many methods


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(stats.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(stats.holm([0.5, 0.6]), [1.0, 1.0])
    assert stats.holm([]).shape == (0,)


def _made(value: float, sd: float, seed: int) -> stats.Bootstrap:
    noise = np.random.default_rng(seed).normal(0, sd, size=1000)
    return stats.Bootstrap(value, value + noise, value + noise, None, df=1000)


def test_rank_groups_share_a_rank_until_told_from_the_best_of_the_group() -> None:
    results = {
        "worst": _made(0.1, 0.01, 1),
        "tie-b": _made(0.299, 0.01, 2),
        "best": _made(0.5, 0.01, 3),
        "tie-a": _made(0.3, 0.01, 4),
    }
    ranking = stats.rank_groups(results)
    assert ranking.labels == ("best", "tie-a", "tie-b", "worst")
    assert ranking.ranks == (1, 2, 2, 4)
    assert [ranking.text(m) for m in ranking.labels] == ["1", "2=", "2=", "4"]
    assert ranking.p["best", "worst"] == ranking.p["worst", "best"] < 0.05
    lower = stats.rank_groups(results, higher_is_better=False)
    assert lower.labels[0] == "worst"
    assert stats.rank_groups({}).ranks == ()


def test_family_wise_error_of_ranking_equal_methods() -> None:
    """Six equal methods: in 95% of repeats none is separated from another."""
    rng = np.random.default_rng(8)
    split = 0
    for i in range(100):
        values = rng.normal(size=(6, 200))
        results = {str(m): stats.bootstrap_queries(v, 200, seed=i) for m, v in enumerate(values)}
        split += len(set(stats.rank_groups(results).ranks)) > 1
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
