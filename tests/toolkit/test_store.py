"""The feature store: what goes in comes out, and half-written or altered files are noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tdabench.errors import DataError, MethodError, UsageError
from tdabench.toolkit.store import FeatureStore


def rows(n: int, dim: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x * np.logspace(-12, 3, n, dtype=np.float32)[:, None]  # far beyond float16's range


def filled(path: Path, x: np.ndarray, dtype: str = "float32", key: str = "") -> FeatureStore:
    store = FeatureStore.create(path, *x.shape, dtype, key)
    order = np.random.default_rng(1).permutation(len(x))
    for part in np.array_split(order, 3):
        store.write(part, x[part])
    store.close()
    return store


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 0), ("float16", 2**-11), ("int8", 1 / 253), ("int8x2", 2**-15)]
)
def test_round_trip_within_the_stated_error(tmp_path: Path, dtype: str, error: float) -> None:
    x = rows(23, 17)
    x[3] = 0
    store = filled(tmp_path / "s", x, dtype)
    for s in (store, FeatureStore.open(tmp_path / "s")):
        assert (s.shape, s.dtype_name, len(s)) == ((23, 17), dtype, 23)
        got = s[:]
        assert got.dtype == np.float32
        assert (np.abs(got - x) <= error * np.abs(x).max(axis=1, keepdims=True)).all()
        np.testing.assert_array_equal(got[5:9], s[5:9])
        np.testing.assert_array_equal(got[[8, 2]], s[np.array([8, 2])])
        assert not s[3:4].any()


@pytest.mark.parametrize("dtype", ["int8", "int8x2"])
def test_copy_is_the_same_store(tmp_path: Path, dtype: str) -> None:
    x = rows(5, 4)
    filled(tmp_path / "a", x, dtype).copy_to(tmp_path / "b")
    np.testing.assert_array_equal(
        FeatureStore.open(tmp_path / "a")[:], FeatureStore.open(tmp_path / "b")[:]
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int8x2"])
@pytest.mark.parametrize("step", [1, 7, 23, 100])
def test_planes_are_the_rows_unscaled(tmp_path: Path, dtype: str, step: int) -> None:
    store = filled(tmp_path / "s", rows(23, 17), dtype)
    found, at = [], []
    for a, block, scales in store.planes(step):
        at += list(range(a, a + len(block)))
        found.append(block * (1 if scales is None else scales[:, None]))
    assert at == list(range(23))
    top = np.abs(store[:]).max(axis=1, keepdims=True)
    coarse = 1 / 253 if dtype == "int8x2" else 0
    assert (np.abs(np.concatenate(found) - store[:]) <= coarse * top).all()


def test_a_plane_cut_short_is_noticed(tmp_path: Path) -> None:
    store = filled(tmp_path / "s", rows(23, 17), "int8")
    with open(tmp_path / "s" / "rows.bin", "r+b") as f:
        f.truncate(100)
    with pytest.raises(DataError, match="truncated"):
        list(store.planes(10))


def test_unfinished_store_is_refused_and_resumed_by_its_key(tmp_path: Path) -> None:
    x, path = rows(10, 3), tmp_path / "s"
    store = FeatureStore.create(path, 10, 3, "float16", key="k1")
    store.write(np.arange(4), x[:4])
    with pytest.raises(MethodError, match="not finished"):
        store[:]
    with pytest.raises(MethodError, match="lacks 6 of 10 rows"):
        store.close()
    store.flush()
    with pytest.raises(DataError, match="was not finished"):
        FeatureStore.open(path)

    again = FeatureStore.create(path, 10, 3, "float16", key="k1")
    np.testing.assert_array_equal(again.missing, np.arange(4, 10))
    again.write(again.missing, x[4:])
    again.close()
    assert len(again.missing) == 0
    np.testing.assert_allclose(again[:], x, rtol=0, atol=1e-3 * np.abs(x).max())
    np.testing.assert_array_equal(FeatureStore.open(path)[:], again[:])


@pytest.mark.parametrize(
    ("key", "dim", "dtype"), [("k2", 3, "int8"), ("k1", 4, "int8"), ("", 3, "int8")]
)
def test_a_store_of_other_contents_is_never_resumed(
    tmp_path: Path, key: str, dim: int, dtype: str
) -> None:
    store = FeatureStore.create(tmp_path / "s", 6, 3, "int8", key="k1")
    store.write(np.arange(3), rows(3, 3))
    store.flush()
    assert len(FeatureStore.create(tmp_path / "s", 6, dim, dtype, key=key).missing) == 6


def test_rows_lost_before_a_flush_are_written_again(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "s", 4, 2, key="k")
    store.write(np.arange(4), rows(4, 2))  # the process dies here, nothing recorded
    assert len(FeatureStore.create(tmp_path / "s", 4, 2, key="k").missing) == 4


def test_altered_and_truncated_files_are_noticed(tmp_path: Path) -> None:
    filled(tmp_path / "s", rows(8, 5))
    file = tmp_path / "s" / "rows.bin"
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="corrupt"):
        FeatureStore.open(tmp_path / "s")
    file.write_bytes(data[:-4])
    with pytest.raises(DataError, match="truncated"):
        FeatureStore.open(tmp_path / "s", verify=False)
    with pytest.raises(DataError, match="not a feature store"):
        FeatureStore.open(tmp_path / "nowhere")


def test_bad_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="float8"):
        FeatureStore.create(tmp_path / "x", 2, 2, "float8")
    store = FeatureStore.create(tmp_path / "s", 3, 2)
    with pytest.raises(MethodError, match="does not fit"):
        store.write(np.arange(2), np.zeros((2, 3)))
    with pytest.raises(MethodError, match="NaN or infinite features in 1 rows, first 2"):
        store.write(np.array([1, 2]), np.array([[0, 1], [np.nan, 0]]))
    store.write(np.arange(3), np.zeros((3, 2)))
    store.close()
    store.close()
    with pytest.raises(MethodError, match="finished"):
        store.write(np.arange(1), np.zeros((1, 2)))


def test_empty_store(tmp_path: Path) -> None:
    store = FeatureStore.create(tmp_path / "s", 0, 4)
    store.close()
    assert FeatureStore.open(tmp_path / "s")[:].shape == (0, 4)


def test_a_store_of_blocks(tmp_path: Path):
    x = np.random.default_rng(0).standard_normal((7, 3), dtype=np.float32)
    store = FeatureStore.of(tmp_path / "a", 7, [x[:2], x[2:2], x[2:].tolist()], "float32", "key")
    np.testing.assert_array_equal(store[:], x)
    assert FeatureStore.open(tmp_path / "a").meta["key"] == "key"
    with pytest.raises(MethodError, match=r"6 rows for the store .*, expected 7"):
        FeatureStore.of(tmp_path / "b", 7, [x[:6]])
    with pytest.raises(MethodError, match="more than the 6 rows"):
        FeatureStore.of(tmp_path / "c", 6, [x])
    with pytest.raises(MethodError, match="0 rows for the store"):
        FeatureStore.of(tmp_path / "d", 0, [])
