"""The feature store: rows on disk, so that an index is limited by disk and not by memory.

A store is a folder:

    rows.bin     [n, dim] float32, float16 or int8, little-endian, row after row
    rest.bin     [n, dim] int8: the rounding error of rows.bin, in 254ths (int8x2)
    scales.bin   [n] float32; a stored row times its scale is the feature (not for float32)
    written.bin  [n] uint8, 1 if a row is safely on disk; only while the store is unfinished
    store.json   shape, dtype, key, checksums; written last, so a store without it is unfinished
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.errors import DataError, MethodError, UsageError
from tdabench.groups import threads
from tdabench.io import read_json, sha256_file, write_bytes, write_json

SCHEMA = 1
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
    "int8x2": np.dtype("i1"),
}
# The largest value in a stored row: float16 rows are scaled, too, since gradients of a well
# trained model are below the smallest float16.
_TOP = {"float16": np.float32(1.0), "int8": np.float32(127.0), "int8x2": np.float32(127.0)}
_REST = np.float32(1 / 254)  # the unit of rest.bin: half a step of rows.bin is 127 of it
_FILES = ("rows.bin", "rest.bin", "scales.bin")
_SECONDS_BETWEEN_FLUSHES = 20.0


class FeatureStore:
    """Feature rows [n, dim] on disk, returned as float32 blocks: `store[a:b]`.

    Written once by `create`, `write`, `close`, with rows in any order; `create` with the key of an
    unfinished store resumes it (`missing` lists the rows to write). `float16` halves and `int8`
    quarters the size, with a scale per row; the error of an element is at most 2^-11 (float16) or
    1/254 (int8) of the largest element of its row. `int8x2` takes the space of float16 with an
    error of at most 2^-15, and stores its coarse half in its own file: a search scans that file at
    the cost of int8, and reads the other half for its best candidates.

    Maps are opened for one read or write and closed, so that resident memory stays at one block.
    """

    def __init__(self, path: Path, meta: dict[str, Any], written: np.ndarray | None) -> None:
        self.path, self.meta = Path(path), meta
        self.shape: tuple[int, int] = (int(meta["n"]), int(meta["dim"]))
        self.dtype_name: str = meta["dtype"]
        self._written = written  # bool [n] while open for writing, None once finished
        self._flushed = time.monotonic()

    # ------------------------------------------------------------------ life

    @classmethod
    def create(
        cls, path: Path, n: int, dim: int, dtype: str = "float32", key: str = ""
    ) -> FeatureStore:
        """Creates a store of `n` rows, open for writing, in the folder `path`.

        With a `key` (a fingerprint of everything that determines the rows), an unfinished store
        with the same key, shape and dtype is continued. Anything else in its place is replaced.
        """
        if dtype not in DTYPES:
            raise UsageError(f"unknown feature dtype {dtype!r}", f"One of: {', '.join(DTYPES)}")
        if n < 0 or dim < 1:
            raise UsageError(f"a feature store cannot have the shape [{n}, {dim}]")
        path = Path(path)
        meta = {"schema": SCHEMA, "n": int(n), "dim": int(dim), "dtype": dtype, "key": key}
        plan, done = path / "plan.json", path / "written.bin"
        if key and done.exists() and plan.exists() and not (path / "store.json").exists():
            mask = np.frombuffer(done.read_bytes(), dtype=np.uint8).astype(bool)
            if _read_plan(plan) == meta and len(mask) == n:
                return cls(path, meta, mask)
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        try:
            with open(path / "rows.bin", "wb") as f:
                f.truncate(n * dim * DTYPES[dtype].itemsize)
            if dtype == "int8x2":
                with open(path / "rest.bin", "wb") as f:
                    f.truncate(n * dim)
            if dtype in _TOP:
                with open(path / "scales.bin", "wb") as f:
                    f.truncate(4 * n)
        except OSError as e:
            raise DataError(f"cannot write {path}: {e.strerror}", "Free some space") from e
        write_json(plan, meta)
        store = cls(path, meta, np.zeros(n, dtype=bool))
        store.flush()
        return store

    @classmethod
    def of(
        cls,
        path: Path,
        n: int,
        blocks: Iterable[np.ndarray],
        dtype: str = "float32",
        key: str = "",
    ) -> FeatureStore:
        """Writes a finished store of the rows of `blocks` [block, dim], `n` in all, in order.

        Raises MethodError when they are not `n` rows, or none: a store has to know its dim.
        """
        store, a = None, 0
        for block in blocks:
            rows = np.asarray(block, dtype=np.float32)
            if store is None:
                store = cls.create(path, n, rows.shape[1], dtype, key)
            if a + len(rows) > n:
                raise MethodError(f"more than the {n} rows of the store {path}")
            store.write(np.arange(a, a + len(rows)), rows)
            a += len(rows)
        if store is None or a < n:
            raise MethodError(f"{a} rows for the store {path}, expected {n}")
        store.close()
        return store

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> FeatureStore:
        """Opens a finished store for reading. Raises DataError if unfinished, truncated or altered.

        `verify` reads every byte once to check the recorded sha256; sizes are always checked.
        """
        path = Path(path)
        if not (path / "store.json").exists():
            if (path / "plan.json").exists():
                raise DataError(f"the feature store {path} was not finished", "Build it again")
            raise DataError(f"{path} is not a feature store: store.json is missing")
        meta = read_json(path / "store.json")
        if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
            raise DataError(f"{path} is a feature store of another version", "Build it again")
        for name, (size, digest) in meta["files"].items():
            file = path / name
            if not file.exists() or file.stat().st_size != size:
                raise DataError(f"{file} is missing or truncated", "Build the store again")
            if verify and sha256_file(file) != digest:
                raise DataError(f"{file} is corrupt: it does not match its hash in store.json")
        return cls(path, meta, None)

    def close(self) -> None:
        """Finishes the store: checks that every row was written, then makes it readable.

        Raises MethodError if rows are missing; closing twice has no effect.
        """
        if self._written is None:
            return
        if len(self.missing):
            raise MethodError(
                f"the feature store {self.path} lacks {len(self.missing)} of {self.shape[0]} rows"
            )
        self.flush()
        files = [p for p in _FILES if (self.path / p).exists()]
        self.meta = dict(self.meta)
        self.meta["files"] = {
            p: [(self.path / p).stat().st_size, sha256_file(self.path / p)] for p in files
        }
        write_json(self.path / "store.json", self.meta)
        self._written = None
        for left in ("plan.json", "written.bin"):
            (self.path / left).unlink(missing_ok=True)

    def copy_to(self, path: Path) -> None:
        """Copies the finished store to the folder `path`."""
        if self._written is not None:
            raise MethodError(f"the feature store {self.path} is not finished", "Close it first")
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        for name in self.meta["files"]:
            shutil.copyfile(self.path / name, path / name)
        write_json(path / "store.json", self.meta)

    # ------------------------------------------------------------------ rows

    @property
    def missing(self) -> np.ndarray:
        """Indices of rows not yet written: int64 [m]."""
        if self._written is None:
            return np.empty(0, dtype=np.int64)
        return np.flatnonzero(~self._written)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(f.stat().st_size for f in self.path.iterdir() if f.suffix == ".bin")

    def write(self, row_indices: np.ndarray, block: np.ndarray) -> None:
        """Writes `block` [b, dim] at `row_indices` [b]. Raises MethodError for NaN or infinity."""
        if self._written is None:
            raise MethodError(f"the feature store {self.path} is finished and cannot be written")
        rows = np.asarray(row_indices, dtype=np.int64)
        block = np.asarray(block, dtype=np.float32)
        if block.shape != (len(rows), self.shape[1]):
            raise MethodError(
                f"a block of shape {block.shape} does not fit {len(rows)} rows of {self.shape[1]}"
            )
        if not len(rows):
            return
        if not np.isfinite(block).all():
            bad = rows[~np.isfinite(block).all(axis=1)]
            raise MethodError(f"NaN or infinite features in {len(bad)} rows, first {bad[0]}")
        if self.dtype_name in _TOP:
            scale = np.abs(block).max(axis=1) / _TOP[self.dtype_name]  # [b]
            scale[scale == 0] = 1.0
            # Dividing by a subnormal scale gives infinity.
            scale = np.maximum(scale, np.finfo(np.float32).tiny)
            block = block / scale[:, None]
            if self.dtype_name != "float16":
                exact, block = block, np.rint(block)
            if self.dtype_name == "int8x2":
                rest = np.rint((exact - block) / _REST)  # [-127, 127]
                self._map("rest.bin", "r+")[rows] = rest.astype(np.int8)
            self._map("scales.bin", "r+")[rows] = scale
        self._map("rows.bin", "r+")[rows] = block.astype(DTYPES[self.dtype_name])
        self._written[rows] = True
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def flush(self) -> None:
        """Makes written rows survive a crash: syncs the rows first, then their flags.

        `write` calls this from time to time; a resumed store repeats only the rows since then.
        """
        if self._written is None:
            return
        for name in _FILES:
            if self.shape[0] and (self.path / name).exists():
                self._map(name, "r+").flush()
        write_bytes(self.path / "written.bin", self._written.astype(np.uint8).tobytes())
        self._flushed = time.monotonic()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        """Rows of a slice or an index array, as a new float32 array [rows, dim]."""
        if self._written is not None:
            raise MethodError(f"the feature store {self.path} is not finished", "Close it first")
        if not self.shape[0]:
            return np.empty((0, self.shape[1]), dtype=np.float32)
        rows = np.array(self._map("rows.bin", "r")[key], dtype=np.float32)
        if self.dtype_name == "int8x2":
            rows += self._map("rest.bin", "r")[key] * _REST
        if self.dtype_name in _TOP:
            rows *= self._map("scales.bin", "r")[key][..., None]
        return rows

    def planes(self, step: int) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """Yields stored rows, `step` at a time: (first row, float32 [b, dim], scales [b] or None).

        Rows times scales are features; for `int8x2`, only the coarse half. The file is read once,
        sequentially, into buffers that the next block overwrites.
        """
        if self._written is not None:
            raise MethodError(f"the feature store {self.path} is not finished", "Close it first")
        n, dim = self.shape
        scales = self._map("scales.bin", "r") if n and self.dtype_name in _TOP else None
        step = max(1, min(step, n))
        raw = np.empty((step, dim), dtype=DTYPES[self.dtype_name])
        block = raw if self.dtype_name == "float32" else np.empty((step, dim), dtype=np.float32)
        # Casting float16 takes about as long as multiplying, so all threads share it.
        part = -(-step // (count := threads()))
        with (
            open(self.path / "rows.bin", "rb", buffering=0) as f,
            ThreadPoolExecutor(count) as pool,
        ):
            for a in range(0, n, step):
                b = min(step, n - a)
                _read_into(f, raw[:b])
                if block is not raw:
                    spans = [slice(i, min(b, i + part)) for i in range(0, b, part)]
                    list(pool.map(lambda s: np.copyto(block[s], raw[s]), spans))
                yield a, block[:b], None if scales is None else np.array(scales[a : a + b])

    def _map(self, name: str, mode: Any) -> np.memmap:
        if name == "scales.bin":
            return np.memmap(self.path / name, dtype="<f4", mode=mode, shape=(self.shape[0],))
        return np.memmap(
            self.path / name, dtype=DTYPES[self.dtype_name], mode=mode, shape=self.shape
        )


def _read_into(f: Any, block: np.ndarray) -> None:
    view = block.reshape(-1).view(np.uint8).data
    while len(view):
        got = f.readinto(view)
        if not got:
            raise DataError(f"{f.name} is truncated", "Build the store again")
        view = view[got:]


def _read_plan(path: Path) -> Any:
    try:
        return read_json(path)
    except DataError:
        return None
