"""LDS on constructed cases whose value is known."""

from __future__ import annotations

import numpy as np
import pytest
from constructed import FixedIndex, corpus, truth_of

from tdabench import stats
from tdabench.benchmark import Stored
from tdabench.benchmarks.beyond import trigram_overlap
from tdabench.benchmarks.lds import LDS, spread
from tdabench.data.examples import Corpus, Example
from tdabench.errors import DataError, MethodError, UsageError
from tdabench.groups import Groups
from tdabench.io import read_arrays, write_arrays
from tdabench.truth.store import Truth

RNG = np.random.default_rng(0)
N_TRAIN, N_QUERIES, N_GROUPS = 30, 8, 12
GROUPS = Groups.random(N_GROUPS, N_TRAIN, 0.3, np.random.default_rng(1))
TRAIN, QUERIES = corpus(N_TRAIN, "t"), corpus(N_QUERIES, "q")
SCORES = RNG.normal(size=(N_QUERIES, N_TRAIN))
GROUP_SCORES = SCORES @ GROUPS.membership(np.float64).toarray().T  # [query, group]


def run(make_context, scores, values, groups=GROUPS, queries=QUERIES, ids=None, **params):
    ids = ids or QUERIES.ids
    context = make_context(
        FixedIndex(scores, QUERIES.ids), TRAIN, queries, {"lds": truth_of(values, groups, ids)}
    )
    return LDS(replicates=200, **params).run(context)


def test_perfect_is_one_and_reversed_minus_one(make_context) -> None:
    for sign in (1, -1):
        out = run(make_context, sign * SCORES, GROUP_SCORES[None])
        assert out.metrics["lds"].value == pytest.approx(sign, abs=1e-12)
        # All queries alike tell no width by themselves: Wilson's interval on [-1, 1], as for a
        # share of 1 or 0 in as many trials as there are queries.
        n = min(len(QUERIES), len(GROUPS))
        low, high = stats.wilson((sign + 1) / 2, n, df=n - 1)
        assert out.metrics["lds"].low == pytest.approx(2 * low - 1)
        assert out.metrics["lds"].high == pytest.approx(2 * high - 1)


def test_constant_scores_count_as_zero_and_are_reported(make_context) -> None:
    scores = SCORES.copy()
    scores[[1, 4]] = 0.0
    out = run(make_context, scores, GROUP_SCORES[None])
    assert out.metrics["lds"].value == pytest.approx(6 / 8)
    assert out.metrics["constant_queries"].value == 2
    assert any("2 of 8 queries have constant scores" in n for n in out.notes)


def test_a_truth_that_is_constant_for_a_query_gives_zero(make_context) -> None:
    values = GROUP_SCORES.copy()
    values[3] = 7.0
    out = run(make_context, SCORES, values[None])
    assert out.per_query[3] == 0
    assert out.metrics["lds"].value == pytest.approx(7 / 8)


def test_queries_in_another_order_keep_their_own_values(make_context) -> None:
    values = RNG.normal(size=(1, N_QUERIES, N_GROUPS))
    straight = run(make_context, SCORES, values)
    order = RNG.permutation(N_QUERIES)
    permuted = run(make_context, SCORES, values, queries=QUERIES.subset(order))
    np.testing.assert_array_equal(permuted.per_query, straight.per_query[order])
    assert permuted.query_ids == tuple(QUERIES.ids[i] for i in order)


def test_groups_in_another_order_change_nothing(make_context) -> None:
    values = RNG.normal(size=(3, N_QUERIES, N_GROUPS))
    order = RNG.permutation(N_GROUPS)
    shuffled = Groups.of([GROUPS[int(g)] for g in order], N_TRAIN)
    a = run(make_context, SCORES, values)
    b = run(make_context, SCORES, values[:, :, order], groups=shuffled)
    np.testing.assert_allclose(a.per_query, b.per_query, atol=1e-12)


def test_one_query_has_a_value_and_no_interval(make_context) -> None:
    out = run(make_context, SCORES, GROUP_SCORES[None], queries=QUERIES.subset([2]))
    assert out.metrics["lds"].value == pytest.approx(1)
    assert out.metrics["lds"].low is None
    assert out.metrics["lds"].high is None


def test_one_group_is_refused(make_context) -> None:
    with pytest.raises(DataError, match="1 groups"):
        run(make_context, SCORES, GROUP_SCORES[None, :, :1], groups=GROUPS[:1])


def test_an_empty_group_scores_zero_and_is_ranked(make_context) -> None:
    groups = Groups.of([[], *GROUPS], N_TRAIN)
    values = np.concatenate([np.zeros((N_QUERIES, 1)), GROUP_SCORES], axis=1)
    out = run(make_context, SCORES, values[None], groups=groups)
    assert out.metrics["lds"].value == pytest.approx(1)


def test_groups_that_failed_are_left_out_and_said(make_context) -> None:
    values = np.stack([GROUP_SCORES, GROUP_SCORES])
    values[1, :, 5] = np.nan
    out = run(make_context, SCORES, values)
    assert out.metrics["lds"].value == pytest.approx(1)
    assert out.arrays["group_scores"].shape == (N_QUERIES, N_GROUPS - 1)
    assert "1 groups whose retraining failed are left out" in out.notes


def test_missing_truth_and_missing_queries_are_named(make_context) -> None:
    with pytest.raises(UsageError, match="no truth 'other'"):
        run(make_context, SCORES, GROUP_SCORES[None], truth="other")
    ids = [f"x{i}" for i in range(N_QUERIES)]
    with pytest.raises(DataError, match="no losses for 8 of 8 queries"):
        run(make_context, SCORES, GROUP_SCORES[None], ids=ids)


def test_nan_scores_are_refused_with_a_count(make_context) -> None:
    scores = SCORES.copy()
    scores[[0, 5], 3] = np.nan
    with pytest.raises(MethodError, match="for 2 queries"):
        run(make_context, scores, GROUP_SCORES[None])


def test_ceiling_and_share_with_several_seeds_and_a_note_with_one(make_context) -> None:
    noisy = GROUP_SCORES + 0.5 * GROUP_SCORES.std() * RNG.normal(size=(4, N_QUERIES, N_GROUPS))
    out = run(make_context, SCORES, noisy)
    m = out.metrics
    assert 0.8 < m["ceiling"].value < 1
    expected = m["lds"].value / m["ceiling"].value
    assert m["share_of_ceiling"].value == pytest.approx(expected)
    alone = run(make_context, SCORES, noisy[:1])
    assert "ceiling" not in alone.metrics
    assert any("one seed" in n for n in alone.notes)


def test_truth_of_single_runs_beside_the_expected_one(make_context) -> None:
    """With one order per seed, each seed is a single run; one run alone shows no ceiling."""
    noise = 2 * GROUP_SCORES.std() * np.random.default_rng(3).normal(size=(2, N_QUERIES, N_GROUPS))
    plan = {"order": "pool", "metasmoothness": {"value": 0.75, "step": 0.1}}

    def scored(values):
        truth = truth_of(values, GROUPS, QUERIES.ids)
        truth = Truth(truth.losses, truth.groups, truth.query_ids, {**truth.plan, **plan})
        index = FixedIndex(SCORES, QUERIES.ids)
        return LDS(replicates=50).run(make_context(index, TRAIN, QUERIES, {"lds": truth}))

    both = scored(GROUP_SCORES + np.stack([np.zeros_like(noise[0]), noise[1]]))
    assert both.metrics["lds[run]"].value == pytest.approx(1, abs=1e-12)  # the first seed alone
    assert both.metrics["lds"].value < 0.9
    assert both.metrics["seed_agreement"].value < 0.9
    assert both.metrics["metasmoothness"].value == 0.75
    assert any("the first seed alone" in n for n in both.notes)
    alone = scored(GROUP_SCORES[None] + noise[:1])
    assert not {"ceiling", "share_of_ceiling"} & set(alone.metrics)
    assert "lds[run]" not in alone.metrics
    assert "seed_agreement" not in alone.metrics
    (said,) = (n for n in alone.notes if "single runs" in n)
    assert "a noise ceiling, is unknown" in said


def test_the_same_run_twice_is_the_same_and_methods_are_paired(make_context) -> None:
    values = RNG.normal(size=(2, N_QUERIES, N_GROUPS))
    a, b = (run(make_context, SCORES, values) for _ in range(2))
    np.testing.assert_array_equal(a.replicates, b.replicates)
    # A monotone change of scores ranks alike: with paired draws every replicate agrees.
    c = run(make_context, 3 * SCORES, values)
    np.testing.assert_array_equal(a.replicates, c.replicates)


def test_parameters_by_name() -> None:
    assert LDS.from_params({"replicates": "50"}).params == {
        "truth": "lds", "also": (), "replicates": 50,
    }  # fmt: skip
    with pytest.raises(UsageError, match="unknown parameter of lds 'replicate'"):
        LDS.from_params({"replicate": 5})


def test_further_truths_are_shown_beside_and_do_not_enter_the_headline(make_context) -> None:
    other = Groups.random(9, N_TRAIN, 0.6, np.random.default_rng(5))
    values = SCORES @ other.membership(np.float64).toarray().T
    truths = {
        "lds": truth_of(GROUP_SCORES[None], GROUPS, QUERIES.ids),
        "half": truth_of(-values[None], other, QUERIES.ids),
    }
    context = make_context(FixedIndex(SCORES, QUERIES.ids), TRAIN, QUERIES, truths)
    out = LDS(also=("half", "absent"), replicates=50).run(context)
    alone = LDS(replicates=50).run(context)
    assert out.metrics["lds"] == alone.metrics["lds"]
    assert out.metrics["lds"].value == pytest.approx(1)
    assert out.metrics["lds[half]"].value == pytest.approx(-1)
    assert "absent: not measured (the suite declares no truth 'absent')" in out.notes
    np.testing.assert_array_equal(out.per_query, alone.per_query)

    stored = Stored(out.arrays, out.query_ids, lambda name: truths[name], lambda *a: None)
    again = LDS(also=("half", "absent"), replicates=50).recompute(stored)
    assert again.metrics == out.metrics


def test_truth_seeds_are_a_source_of_variance_of_their_own(make_context) -> None:
    scores = SCORES + RNG.normal(size=SCORES.shape)
    clean = run(make_context, scores, np.stack([GROUP_SCORES] * 4))
    noise = RNG.normal(size=(4, *GROUP_SCORES.shape)) * GROUP_SCORES.std()
    noisy = run(make_context, scores, GROUP_SCORES + noise)
    assert clean.metrics["sd_truth_seeds"].value == 0
    assert clean.metrics["sd_groups"].value > 0
    assert noisy.metrics["sd_truth_seeds"].value > 0.01
    assert "sd_truth_seeds" not in run(make_context, scores, GROUP_SCORES[None]).metrics


def test_beyond_is_the_partial_rank_correlation_by_hand(make_context) -> None:
    """One feature: (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2)), over ranks."""
    rng = np.random.default_rng(9)
    x, y, z = rng.normal(size=(3, 6, 40)) + 0.7 * rng.normal(size=(1, 6, 40))
    xy, xz, yz = (stats.spearman_rows(a, b) for a, b in ((x, y), (x, z), (y, z)))
    boot = stats.bootstrap_partial(x, y, z[None], 200)
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert boot.value == pytest.approx(expected.mean())
    assert 0 < boot.value < xy.mean()
    flat = stats.bootstrap_partial(x, y, np.zeros((1, 6, 40)), 10)  # a constant explains nothing
    assert flat.value == pytest.approx(xy.mean())
    assert stats.bootstrap_partial(z**3, y, z[None], 10).value == 0  # the feature itself
    with pytest.raises(UsageError, match="features"):
        stats.bootstrap_partial(x, y, z, 10)
    # Noise only: the interval covers 0, and is as wide as that of an LDS of noise.
    noise = stats.bootstrap_partial(*rng.normal(size=(2, 200, 40)), z[None, :1].repeat(200, 1), 300)
    plain = stats.bootstrap_lds(*rng.normal(size=(2, 200, 40)), 300)
    assert abs(noise.value) < 3 * np.sqrt(noise.variance)
    assert noise.variance == pytest.approx(plain.variance, rel=0.5)


def test_what_the_task_and_common_strings_explain_counts_for_nothing_beyond(make_context) -> None:
    """Scores that are the own-task count or the trigram overlap have no lds_beyond; the record
    holds what it takes to compute it again."""
    same = np.array([[float(a == b) for b in TRAIN.tasks] for a in QUERIES.tasks])
    signal = RNG.normal(size=SCORES.shape)
    values = (same + signal) @ GROUPS.membership(np.float64).toarray().T
    by_task = run(make_context, same, values[None]).metrics
    assert by_task["lds"].value > 0.2
    assert by_task["lds_beyond"].value == 0
    out = run(make_context, signal, values[None])
    assert out.metrics["lds_beyond"].value > out.metrics["lds"].value > 0.5
    assert out.arrays["known_ranks"].shape == (2, N_QUERIES, N_GROUPS)
    overlap = trigram_overlap(TRAIN, QUERIES, GROUPS.membership(np.float64))
    grams = [
        [{e.response[i : i + 3] for i in range(len(e.response) - 2)} for e in part]
        for part in (QUERIES, TRAIN)
    ]
    by_hand = [
        [sum(len(q & grams[1][i]) / np.sqrt(len(q) * len(grams[1][i])) for i in g) for g in GROUPS]
        for q in grams[0]
    ]
    np.testing.assert_allclose(overlap, by_hand)


def test_a_ceiling_is_computed_once_a_run(make_context, tmp_path, monkeypatch) -> None:
    values = GROUP_SCORES + RNG.normal(size=(4, *GROUP_SCORES.shape))
    truths = {"lds": truth_of(values, GROUPS, QUERIES.ids)}
    index = FixedIndex(SCORES, QUERIES.ids)
    plain = LDS(replicates=50).run(make_context(index, TRAIN, QUERIES, truths))
    context = make_context(index, TRAIN, QUERIES, truths, cache=tmp_path / "cache")
    first = LDS(replicates=50).run(context)
    (kept,) = (tmp_path / "cache").glob("ceiling-*")
    with monkeypatch.context() as m:
        m.setattr(stats, "noise_ceiling", None)
        second = LDS(replicates=50).run(context)
    assert plain.metrics == first.metrics == second.metrics
    np.testing.assert_array_equal(
        second.arrays["ceiling_per_query"], plain.arrays["ceiling_per_query"]
    )
    kept.write_bytes(kept.read_bytes()[:50])  # a cache that is damaged is computed again
    assert LDS(replicates=50).run(context).metrics == plain.metrics
    arrays, meta = read_arrays(kept)  # and one that someone altered
    write_arrays(kept, arrays, {**meta, "value": 0.1})
    assert LDS(replicates=50).run(context).metrics == plain.metrics

    # A truth without any agreement has no ceiling, and that is remembered, too.
    x = RNG.normal(size=GROUP_SCORES.shape)
    none = {"lds": truth_of(np.stack([x, -x]), GROUPS, QUERIES.ids)}
    context = make_context(index, TRAIN, QUERIES, none, cache=tmp_path / "cache")
    for _ in range(2):
        out = LDS(replicates=50).run(context)
        assert "ceiling" not in out.metrics
        assert any("reliability is 0.00" in n for n in out.notes)


def test_fewer_queries_are_spread_over_tasks_and_nested() -> None:
    queries = Corpus(
        [Example(f"q{i}", "p", "r", task=t) for i, t in enumerate("aaaaabbbcc")], "queries"
    )
    for n in range(len(queries) + 1):
        places = spread(queries, n)
        assert places == sorted(set(places))
        assert len(places) == n
        assert set(places) <= set(spread(queries, n + 1))
        if n >= 3:
            assert {queries[i].task for i in places} == set("abc")
    # By ids: the order of the suite's queries changes nothing.
    turned = queries.subset(range(len(queries))[::-1])
    assert {queries[i].id for i in spread(queries, 4)} == {turned[i].id for i in spread(turned, 4)}
    assert spread(queries, 99) == list(range(10))
    assert spread(queries.subset([]), 3) == []


def test_all_queries_are_not_part_of_a_cells_name() -> None:
    assert "queries" not in LDS().params
    assert LDS(queries=4).params["queries"] == 4
    assert LDS.from_params(LDS().params) == LDS()
    assert LDS().asked(QUERIES) is QUERIES
    assert len(LDS(queries=4).asked(QUERIES)) == 4
    with pytest.raises(UsageError, match=r"lds\.queries must be at least 0"):
        LDS(queries=-1)
