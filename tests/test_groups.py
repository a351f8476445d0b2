"""Groups and pooling against direct per-group formulas."""

import numpy as np
import pytest

from tdabench.errors import DataError, UsageError
from tdabench.groups import POOLINGS, Groups, pool_scores


def direct(scores, groups, pooling, t):
    """The definition, one query and one group at a time, in float64."""
    out = np.zeros((len(scores), len(groups)))
    for q, row in enumerate(scores.astype(np.float64)):
        for g, ids in enumerate(groups):
            s = row[ids]
            if len(s) == 0:
                continue
            if pooling == "sum":
                out[q, g] = s.sum()
            elif pooling == "mean":
                out[q, g] = s.mean()
            else:
                logit = (np.abs(s) if pooling == "softmax-abs" else s) / t
                w = np.exp(logit - logit.max())
                out[q, g] = (w * s).sum() / w.sum()
    return out


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("t", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_pooling_equals_its_definition(pooling, t, scale):
    rng = np.random.default_rng(0)
    scores = (scale * rng.standard_normal((7, 50))).astype(np.float32)
    members = [rng.choice(50, size, replace=False) for size in (1, 2, 12, 50, 25)] + [[]]
    groups = Groups.of(members, 50)
    got = pool_scores(scores, groups, pooling, t)
    assert got.dtype == np.float32
    np.testing.assert_allclose(
        got, direct(scores, groups, pooling, t), rtol=2e-4, atol=1e-4 * scale
    )


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_group_of_one_is_the_score(pooling):
    scores = np.random.default_rng(1).standard_normal((3, 9)).astype(np.float32)
    got = pool_scores(scores, Groups.singletons(9), pooling, 0.1)
    np.testing.assert_allclose(got, scores, rtol=1e-6)


def test_softmax_survives_a_group_far_below_the_maximum():
    scores = np.array([[1000.0, 1.0, 2.0]], dtype=np.float32)
    groups = Groups.of([[1, 2], [0, 1]], 3)
    got = pool_scores(scores, groups, "softmax", 1.0)
    expected = (np.exp(-1) * 1 + 2) / (np.exp(-1) + 1)
    np.testing.assert_allclose(got, [[expected, 1000.0]], rtol=1e-6)


def test_sparse_and_dense_membership_agree():
    rng = np.random.default_rng(2)
    scores = rng.standard_normal((4, 2000)).astype(np.float32)
    few = Groups.of([rng.choice(2000, 5, replace=False) for _ in range(6)], 2000)  # sparse path
    np.testing.assert_allclose(
        pool_scores(scores, few), direct(scores, few, "sum", 1), rtol=1e-5, atol=1e-5
    )


def test_order_within_a_group_is_irrelevant():
    a, b = Groups.of([[3, 1, 2]], 5), Groups.of([[1, 2, 3]], 5)
    assert a.fingerprint == b.fingerprint


def test_no_groups_and_no_queries():
    assert pool_scores(np.zeros((3, 4)), Groups.of([], 4)).shape == (3, 0)
    assert pool_scores(np.zeros((0, 4)), Groups.of([[1]], 4), "softmax").shape == (0, 1)


def test_random_groups_have_the_size_and_depend_on_the_seed_only():
    draw = lambda s: Groups.random(5, 40, 0.25, np.random.default_rng(s))  # noqa: E731
    assert (draw(1).sizes == 10).all()
    assert draw(1).fingerprint == draw(1).fingerprint != draw(2).fingerprint


@pytest.mark.parametrize(
    ("indptr", "indices", "what"),
    [
        ([0, 2], [1, 1], "twice"),
        ([0, 1], [7], "outside"),
        ([0, 1], [-1], "outside"),
        ([0, 3], [1], "span"),
        ([0, 2, 1, 2], [0, 1], "decreases"),
    ],
)
def test_damaged_groups_are_refused(indptr, indices, what):
    with pytest.raises(DataError, match=what):
        Groups(np.array(indptr), np.array(indices), 5)


def test_bad_pooling_requests():
    groups = Groups.of([[0]], 2)
    with pytest.raises(UsageError, match="unknown pooling"):
        pool_scores(np.zeros((1, 2)), groups, "median")
    with pytest.raises(UsageError, match="temperature"):
        pool_scores(np.zeros((1, 2)), groups, "softmax", 0.0)
    with pytest.raises(UsageError, match="cover"):
        pool_scores(np.zeros((1, 3)), groups)


@pytest.mark.parametrize("pooling", ["softmax", "softmax-abs"])
@pytest.mark.parametrize("t", [0.7, 1.0])
@pytest.mark.parametrize("threads", ["1", "3", "none"])
def test_blocks_and_threads_do_not_show(monkeypatch, pooling, t, threads):
    rng = np.random.default_rng(5)
    scores = rng.standard_normal((23, 40)).astype(np.float32)
    scores[17, :3] = 900.0  # one query whose last group underflows, in a late block
    groups = Groups.of([rng.choice(40, 9, replace=False), range(40), [], [7, 9]], 40)
    before = scores.copy()
    whole = pool_scores(scores, groups, pooling, t)
    np.testing.assert_allclose(whole, direct(scores, groups, pooling, t), rtol=1e-5, atol=1e-5)
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr("tdabench.groups._BLOCK_BYTES", 4 * 40 * 5)
    monkeypatch.setattr("tdabench.groups._CACHE_BYTES", 4 * 40 * 2)
    np.testing.assert_allclose(pool_scores(scores, groups, pooling, t), whole, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(scores, before)


def test_attention_on_several_threads_leaves_the_library_its_threads(monkeypatch):
    from threadpoolctl import threadpool_info

    def blas() -> list[int]:
        return [x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"]

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    scores = np.random.default_rng(0).standard_normal((300, 4000), dtype=np.float32)
    groups = Groups.random(5, 4000, 0.25, np.random.default_rng(1))
    before = blas()
    pooled = pool_scores(scores, groups, "softmax")
    assert blas() == before
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    np.testing.assert_allclose(pool_scores(scores, groups, "softmax"), pooled, rtol=1e-5)


def test_logits_that_would_underflow_weigh_nothing():
    scores = np.array([[300.0, 100.0, -300.0, 0.0]], dtype=np.float32)
    got = pool_scores(scores, Groups.of([[0, 1, 3], [1, 3], [2, 3]], 4), "softmax")
    np.testing.assert_allclose(got, [[300.0, 100.0, 0.0]], atol=1e-6)


def test_joined_groups_keep_their_members_and_scores() -> None:
    rng = np.random.default_rng(0)
    parts = [Groups.random(3, 20, 0.2, rng), Groups.of([[], [4]], 20), Groups.of([], 20)]
    joined = Groups.joined(parts)
    assert [g.tolist() for g in joined] == [g.tolist() for p in parts for g in p]
    scores = rng.normal(size=(5, 20))
    for pooling in ("sum", "softmax"):
        apart = [pool_scores(scores, p, pooling) for p in parts]
        np.testing.assert_allclose(
            pool_scores(scores, joined, pooling), np.concatenate(apart, axis=1), rtol=1e-5
        )
    with pytest.raises(DataError, match="cannot be joined"):
        Groups.joined([parts[0], Groups.of([[0]], 3)])
