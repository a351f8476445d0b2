"""The streaming scan against the whole score matrix: order, ties, pooling, planes, blocks."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from tdabench.errors import DataError, MissingExtra, UsageError
from tdabench.groups import POOLINGS, Groups, pool_scores
from tdabench.method import Context
from tdabench.rows import top_k_of
from tdabench.toolkit import scan as module
from tdabench.toolkit.approximate import FaissIndex
from tdabench.toolkit.representation import RepresentationIndex, RepresentationMethod
from tdabench.toolkit.scan import scan, stream_groups
from tdabench.toolkit.store import FeatureStore


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 6 * 11)  # 11 rows of 6


def data(n: int = 200, d: int = 6, q: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Small whole numbers: products are exact, and full of ties."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-2, 3, (n, d)).astype(np.float32)
    return rng.integers(-2, 3, (q, d)).astype(np.float32), rows


def stored(path: Path, x: np.ndarray, dtype: str) -> FeatureStore:
    store = FeatureStore.create(path, *x.shape, dtype)
    store.write(np.arange(len(x)), x)
    store.close()
    return store


def by_definition(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.stack([np.lexsort((np.arange(len(s)), -s))[:k] for s in scores])
    return np.take_along_axis(scores, ids, axis=1), ids


@pytest.mark.parametrize("k", [0, 1, 3, 11, 60, 199, 200, 500])
@pytest.mark.parametrize("order", ["mixed", "rising", "falling"])
def test_top_k_is_that_of_all_scores(small_blocks, k, order):
    queries, rows = data()
    if order != "mixed":  # the worst and the best order for a running threshold
        rows = rows[np.argsort(rows @ queries[0], kind="stable")]
        rows = rows if order == "rising" else rows[::-1].copy()
    found = scan(queries, rows, k)
    values, ids = by_definition(queries @ rows.T, min(k, 200))
    np.testing.assert_array_equal(found.ids, ids)
    np.testing.assert_array_equal(found.values, values)
    assert (found.values.dtype, found.ids.dtype) == (np.float32, np.int64)


def test_many_rows_above_the_threshold_at_once(small_blocks):
    """Far more candidates than are wanted, in one block: they are cut before they are kept."""
    rows = np.repeat(np.arange(200, dtype=np.float32)[:, None], 6, axis=1)
    found = scan(np.ones((3, 6), np.float32), rows, 1)
    np.testing.assert_array_equal(found.ids, np.full((3, 1), 199))


def test_all_rows_equal(small_blocks):
    found = scan(np.ones((2, 6), np.float32), np.ones((50, 6), np.float32), 7)
    np.testing.assert_array_equal(found.ids, np.tile(np.arange(7), (2, 1)))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("t", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("order", [1, -1])
def test_the_corpus_as_a_group(small_blocks, pooling, t, order):
    rng = np.random.default_rng(1)
    queries, rows = rng.standard_normal((4, 6)), rng.standard_normal((90, 6))
    queries, rows = queries.astype(np.float32), rows.astype(np.float32)
    rows[50:] *= 30  # the maximum rises late
    rows = rows[::order].copy()
    scores = queries @ rows.T
    found = scan(queries, rows, 3, pooling=pooling, temperature=t)
    whole = pool_scores(scores, Groups.of([range(90)], 90), pooling, t)[:, 0]
    np.testing.assert_allclose(found.pooled, whole, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.sums, scores.sum(axis=1), rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(found.ids, by_definition(scores, 3)[1])


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int8x2"])
def test_a_store_scans_as_what_it_holds(small_blocks, tmp_path, dtype):
    rng = np.random.default_rng(2)
    queries = rng.standard_normal((4, 6)).astype(np.float32)
    store = stored(tmp_path / "s", rng.standard_normal((150, 6)).astype(np.float32), dtype)
    values, _ = by_definition(queries @ store[:].T, 10)
    found = scan(queries, store, 10, candidates=40)
    np.testing.assert_allclose(found.values, values, rtol=1e-5, atol=1e-6)
    every = scan(queries, store, 500)
    np.testing.assert_allclose(
        every.values, -np.sort(-queries @ store[:].T, axis=1), rtol=0, atol=0.05
    )


def test_int8_keeps_the_best_and_two_planes_keep_them_nearly_all(tmp_path):
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((20_000, 96)).astype(np.float32)
    queries = rng.standard_normal((10, 96)).astype(np.float32)
    _, best = top_k_of(queries @ rows.T, 100)
    recall = {}
    for dtype in ("int8", "int8x2"):
        ids = scan(queries, stored(tmp_path / dtype, rows, dtype), 100).ids
        recall[dtype] = np.mean([len(set(a) & set(b)) / 100 for a, b in zip(ids, best)])
    assert recall["int8"] > 0.97
    assert recall["int8x2"] > 0.995


def test_sparse_rows_and_queries(small_blocks):
    queries, rows = data()
    found = scan(sp.csr_matrix(queries), sp.csr_matrix(rows), 9, pooling="softmax-abs")
    dense = scan(queries, rows, 9, pooling="softmax-abs")
    np.testing.assert_array_equal(found.ids, dense.ids)
    np.testing.assert_allclose(found.pooled, dense.pooled, rtol=1e-5)


def test_torch_multiplies_the_same(small_blocks):
    queries, rows = data()
    found, other = scan(queries, rows, 9), scan(queries, rows, 9, device="cpu")
    np.testing.assert_array_equal(found.ids, other.ids)
    np.testing.assert_array_equal(found.values, other.values)


@pytest.mark.parametrize("dtype", ["", "float16", "int8x2"])
def test_nothing_to_scan_and_nobody_asking(tmp_path, dtype):
    empty = np.empty((0, 6), np.float32)
    rows = stored(tmp_path / "s", empty, dtype) if dtype else empty
    found = scan(np.ones((2, 6), np.float32), rows, 5, pooling="softmax")
    assert found.values.shape == found.ids.shape == (2, 0)
    assert not found.pooled.any()
    found = scan(empty, np.ones((4, 6), np.float32), 2, pooling="mean")
    assert found.values.shape == (0, 2)
    assert found.pooled.shape == (0,)


def test_bad_requests():
    queries, rows = data()
    with pytest.raises(UsageError, match="best -1"):
        scan(queries, rows, -1)
    with pytest.raises(UsageError, match="unknown pooling"):
        scan(queries, rows, 1, pooling="median")


# --------------------------------------------------------------------------- FAISS

needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="faiss is not installed"
)


@needs_faiss
def test_faiss_flat_is_the_scan(tmp_path):
    rng = np.random.default_rng(4)
    queries = rng.standard_normal((5, 8)).astype(np.float32)
    store = stored(tmp_path / "s", rng.standard_normal((300, 8)).astype(np.float32), "float16")
    index = FaissIndex(store, "Flat")
    values, ids = index.top_k(queries, 10)
    found = scan(queries, store, 10)
    np.testing.assert_array_equal(ids, found.ids)
    np.testing.assert_allclose(values, found.values, rtol=1e-5, atol=1e-6)
    assert index.top_k(queries, 999)[1].shape == (5, 300)

    index.save(tmp_path / "index.faiss")
    again = FaissIndex.open(tmp_path / "index.faiss")
    np.testing.assert_array_equal(again.top_k(queries, 10)[1], ids)
    (tmp_path / "index.faiss").write_bytes(b"not an index")
    with pytest.raises(DataError, match="not a FAISS index"):
        FaissIndex.open(tmp_path / "index.faiss")


@needs_faiss
def test_faiss_cells_find_most_of_the_best():
    rng = np.random.default_rng(5)
    centres = rng.standard_normal((20, 16))
    rows = (centres[rng.integers(0, 20, 4000)] + 0.3 * rng.standard_normal((4000, 16))).astype("f4")
    queries = rows[:10]
    _, best = top_k_of(queries @ rows.T, 20)
    few, many = (
        np.mean(
            [
                len(set(a) & set(b)) / 20
                for a, b in zip(FaissIndex(rows, "IVF16,Flat", probes).top_k(queries, 20)[1], best)
            ]
        )
        for probes in (1, 16)
    )
    assert few <= many
    assert many > 0.99


@needs_faiss
def test_faiss_says_what_it_cannot_build():
    with pytest.raises(UsageError, match="does not know"):
        FaissIndex(np.ones((5, 4), np.float32), "Nonsense")
    with pytest.raises(UsageError, match="cannot train"):
        FaissIndex(np.ones((5, 4), np.float32), "IVF64,Flat")


def test_without_faiss_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(MissingExtra, match="FAISS is not installed"):
        FaissIndex(np.ones((5, 4), np.float32))


@pytest.mark.parametrize("pooling", ["sum", "mean", "softmax", "softmax-abs"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 40.0])
def test_streamed_group_scores(pooling: str, scale: float) -> None:
    rng = np.random.default_rng(0)
    q = (scale * rng.standard_normal((5, 6))).astype(np.float32)
    z = rng.standard_normal((97, 6)).astype(np.float32)
    z[3] = z[4]  # a tie
    groups = Groups.of([[], [3], [3, 4], range(97), rng.choice(97, 30, replace=False)], 97)
    want = pool_scores(q @ z.T, groups, pooling, 0.7)
    for block in (1, 300, 1 << 20):
        got = stream_groups(q, z, groups, pooling, 0.7, bytes_a_block=block)
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-4 * scale)
    assert got[:, 0].tolist() == [0.0] * 5


def test_streaming_a_corpus_takes_constant_memory() -> None:
    """Four times the corpus, the same peak."""
    import tracemalloc

    class Endless:
        """Rows made when asked for, so that only what the pass holds is measured."""

        def __init__(self, n: int) -> None:
            self.shape = (n, 32)

        def __getitem__(self, key: slice) -> np.ndarray:
            n = len(range(*key.indices(self.shape[0])))
            return np.random.default_rng(key.start or 0).standard_normal((n, 32), dtype=np.float32)

    q = np.random.default_rng(1).standard_normal((4, 32)).astype(np.float32)
    peaks = []
    for n in (50_000, 200_000):
        tracemalloc.start()
        stream_groups(
            q, Endless(n), Groups.of([[0, 1, n - 1]], n), "softmax-abs", bytes_a_block=1 << 18
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= 1.01 * peaks[0]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_index_of_any_size_pools_as_a_small_one_does(
    monkeypatch, tmp_path, pooling, tiny_corpus
):
    """Beyond SCORES_BYTES an index streams; one whose scores are its own goes query by query."""

    @dataclass(frozen=True, kw_only=True)
    class Lengths(RepresentationMethod):
        name = "lengths"

        def encode(self, context, examples, role):
            return np.array([[len(e.prompt), len(e.response) % 3] for e in examples], np.float32)

    class Shifted(RepresentationIndex):
        def score(self, queries):
            return super().score(queries) + 1

    method, n = Lengths(pooling=pooling, temperature=50.0), len(tiny_corpus)
    groups = Groups.of([[], [0], [0, 1, 2], range(n)], n)
    plain = method.build(Context(None, tmp_path), tiny_corpus)
    shifted = Shifted(method, plain.context, plain.rows, plain.state)
    want = [index.score_groups(tiny_corpus, groups) for index in (plain, shifted)]
    singles = pool_scores(plain.score(tiny_corpus), Groups.singletons(n), pooling, 50.0)
    monkeypatch.setattr("tdabench.toolkit.representation.SCORES_BYTES", 4 * n * 2)
    got = [index.score_groups(tiny_corpus, groups) for index in (plain, shifted)]
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
    one = plain.score_groups(tiny_corpus, Groups.singletons(n))
    np.testing.assert_allclose(one, singles, rtol=1e-6)
    assert plain.score_groups(tiny_corpus, Groups.of([], n)).shape == (n, 0)
