"""An index in shards, built and searched part by part, in this process or on a Ray cluster.

A folder has feature stores (`shard-00000`, `shard-00001`, ...) and `shards.json`. Shards are built
independently, each resumable by its key, so that a lost node costs one shard. A search scans every
shard with the given runner and merges the results. Every node must see the folder under the same
path. Scores of a shard equal those of one index over all rows: products of the same vectors.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.errors import DataError, MissingExtra, TdabenchError, UsageError
from tdabench.groups import threads
from tdabench.io import fingerprint, read_json, write_json
from tdabench.rows import Rows, row_blocks
from tdabench.toolkit.scan import ScanResult, scan
from tdabench.toolkit.store import FeatureStore

SCHEMA = 1
Run = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]  # (task, items) -> results


def in_turn(task: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """Runs tasks here, one after another."""
    return [task(item) for item in items]


def in_processes(
    workers: int,
    prepare: Callable[[], None] | None = None,
    done: Callable[[int, int], None] = lambda finished, total: None,
) -> Run:
    """Runs tasks in `workers` processes of this machine, which share its cores evenly.

    `prepare` runs once in each; `done` hears of each finished task (how many, of how many). With
    one worker, tasks run here.
    """

    def run(task: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        results: list[Any] = [None] * len(items)
        if workers == 1:
            for i in range(len(items)):
                results[i] = task(items[i])
                done(i + 1, len(items))
            return results
        from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
        from concurrent.futures.process import BrokenProcessPool
        from multiprocessing import get_context

        waiting: dict[Future, int] = {}
        begun = finished = 0
        with (
            _threads_for(workers),
            ProcessPoolExecutor(workers, get_context("spawn"), initializer=prepare) as pool,
        ):
            try:
                while begun < len(items) or waiting:
                    while begun < len(items) and len(waiting) < 2 * workers:
                        waiting[pool.submit(task, items[begun])] = begun
                        begun += 1
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        results[waiting.pop(future)] = future.result()
                        finished += 1
                        done(finished, len(items))
            except BrokenProcessPool as e:
                raise TdabenchError(
                    "a worker process died, most likely for its memory",
                    "Use fewer workers or smaller shards; the same command resumes",
                ) from e
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return results

    return run


@contextlib.contextmanager
def _threads_for(workers: int) -> Iterator[None]:
    """Processes that are started meanwhile use their share of this process's threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(max(1, threads() // workers))))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def on_ray(
    address: str | None = None,
    cpus: float = 1,
    gpus: float = 0,
    prepare: Callable[[], None] | None = None,
    done: Callable[[int, int], None] = lambda finished, total: None,
) -> Run:
    """Runs tasks on a Ray cluster (extra `ray`), spread over its nodes.

    `address` is the address of a running cluster ("auto" finds it); None uses the existing
    connection, or starts a cluster on this machine. A task takes `cpus` cores and `gpus`
    accelerators. Each process of the cluster calls `prepare` first; `done` receives the numbers of
    finished and of all tasks.
    """
    try:
        import ray
    except ImportError as e:
        raise MissingExtra("Ray", "ray") from e
    if not ray.is_initialized():
        try:
            ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
            )
        except (ConnectionError, RuntimeError) as e:
            raise TdabenchError(
                f"no Ray cluster at {address}: {e}", "Start one with: ray start --head"
            ) from e

    def run(task: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        remote = ray.remote(_one).options(
            num_cpus=cpus, num_gpus=gpus, scheduling_strategy="SPREAD", max_retries=2
        )
        # Methods and queries are sent once per node, not per task.
        shared = ray.put((_First(prepare), task))
        try:
            refs = left = [remote.remote(shared, item) for item in items]
            while left:
                ready, left = ray.wait(left)
                ray.get(ready)  # an error ends the run, the first one of all
                done(len(refs) - len(left), len(refs))
            return ray.get(refs)
        except ray.exceptions.RayTaskError as e:
            # A user error in a task is reported as it would be in this process.
            if isinstance(e.cause, TdabenchError):
                raise e.cause from e
            raise

    return run


class _First:
    """Calls `prepare` in a process of the cluster that receives it, once.

    In a tuple it comes first: by the time that Ray restores what follows, modules that this process
    found by itself, such as a plugin's file, can be imported there.
    """

    def __init__(self, prepare: Callable[[], None] | None) -> None:
        self.prepare = prepare

    def __reduce__(self) -> Any:
        return _prepared, (self.prepare,)


_done: set[str] = set()


def _prepared(prepare: Callable[[], None] | None) -> _First:
    if prepare is not None and repr(prepare) not in _done:
        prepare()
        _done.add(repr(prepare))
    return _First(prepare)


def _one(shared: tuple[_First, Callable[[Any], Any]], item: Any) -> Any:
    return shared[1](item)


# --------------------------------------------------------------------------- rows in shards


class Shards:
    """Rows [n, d] in feature stores; `starts` [shard + 1] are their first rows.

    Returns float32 rows like one store, so that readers of blocks of rows can use it; `run`
    decides where a search scans its shards.
    """

    def __init__(self, folder: Path, starts: np.ndarray, dim: int, run: Run = in_turn) -> None:
        self.folder, self.starts, self.run = Path(folder), np.asarray(starts, np.int64), run
        self.shape: tuple[int, int] = (int(self.starts[-1]), dim)

    @classmethod
    def open(cls, folder: Path, run: Run = in_turn, verify: bool = True) -> Shards:
        """Opens the finished shards in `folder`. Raises DataError for a missing or damaged shard.

        `verify` reads every byte once, with each shard where `run` runs it.
        """
        meta = read_json(Path(folder) / "shards.json")
        if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
            raise DataError(f"{folder} is not a sharded index, or of another version")
        starts = np.asarray(meta["starts"], dtype=np.int64)
        self = cls(folder, starts, int(meta["dim"]), run)
        paths = [self.path(i) for i in range(len(starts) - 1)]
        shapes = run(partial(_shape, verify=verify), paths)
        for i, shape in enumerate(shapes):
            if shape != (starts[i + 1] - starts[i], self.shape[1]):
                raise DataError(f"{paths[i]} holds {shape}", "Build the index again")
        return self

    @property
    def dtype_name(self) -> str:
        return self.store(0).dtype_name if len(self.starts) > 1 else "float32"

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(self.store(i).nbytes for i in range(len(self.starts) - 1))

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}"

    def store(self, shard: int) -> FeatureStore:
        return FeatureStore.open(self.path(shard), verify=False)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        """Returns rows of a slice or an index array as a new float32 array [rows, dim]."""
        if isinstance(key, slice):
            a, b, step = key.indices(self.shape[0])
            at = np.arange(a, b, step)
        else:
            at = np.asarray(key)
            at = np.flatnonzero(at) if at.dtype == bool else np.where(at < 0, at + len(self), at)
        out = np.empty((len(at), self.shape[1]), dtype=np.float32)
        shard = np.searchsorted(self.starts, at, side="right") - 1
        for s in np.unique(shard):
            mine = shard == s
            out[mine] = self.store(int(s))[at[mine] - self.starts[s]]
        return out

    def scan(self, queries: Any, k: int, **settings: Any) -> ScanResult:
        """Scans all rows like `toolkit.scan.scan`, with the same settings."""
        task = partial(_scan_shard, queries=queries, k=k, settings=settings)
        shards = range(len(self.starts) - 1)
        parts = self.run(task, [self.path(s) for s in shards])
        if not parts:
            return scan(queries, np.empty(self.shape, dtype=np.float32), k, **settings)
        return ScanResult.merge(parts, [int(a) for a in self.starts[:-1]], k)

    def copy_to(self, folder: Path) -> None:
        """Copies all shards to `folder`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for s in range(len(self.starts) - 1):
            self.store(s).copy_to(Path(folder) / self.path(s).name)
        shutil.copyfile(self.folder / "shards.json", Path(folder) / "shards.json")


def build_shards(
    folder: Path,
    items: Sequence[Any],
    encode: Callable[[Sequence[Any]], Rows],
    rows_a_shard: int,
    *,
    dtype: str = "float32",
    key: str = "",
    run: Run = in_turn,
) -> Shards:
    """Builds shards of `encode(items[a:b])` -> [b - a, dim], `rows_a_shard` rows each, with `run`.

    With a `key` (a fingerprint of everything that determines the rows), finished shards with that
    key are kept, so that an interrupted build resumes. `encode` must give the same row in any
    shard. On a cluster, `encode` and the items are sent to the nodes.
    """
    if rows_a_shard < 1:
        raise UsageError(f"a shard holds at least 1 row, not {rows_a_shard}")
    folder, n = Path(folder), len(items)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shards.json").unlink(missing_ok=True)
    starts = [*range(0, n, rows_a_shard), n]
    tasks = _Tasks(folder, items, starts, [key, dtype] if key else [])
    dims = run(partial(_build_shard, encode=encode, dtype=dtype), tasks)
    if len(set(dims)) > 1:
        raise DataError(f"the shards have rows of different lengths: {sorted(set(dims))}")
    dim = dims[0] if dims else 1
    for old in folder.glob("shard-*"):
        if int(old.name.removeprefix("shard-")) >= len(tasks):
            shutil.rmtree(old)
    write_json(folder / "shards.json", {"schema": SCHEMA, "starts": starts, "dim": dim})
    return Shards(folder, np.array(starts), dim, run)


class _Tasks(Sequence[tuple[Path, Sequence[Any], str]]):
    """What each shard is built from, taken from the corpus only when it is asked for."""

    def __init__(self, folder: Path, items: Sequence[Any], starts: list[int], key: list) -> None:
        self.folder, self.items, self.starts, self.key = folder, items, starts, key

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        a, b = self.starts[i : i + 2]
        key = fingerprint([*self.key, a, b]) if self.key else ""
        return self.folder / f"shard-{i:05d}", self.items[a:b], key


def _build_shard(
    task: tuple[Path, Sequence[Any], str], encode: Callable[[Sequence[Any]], Rows], dtype: str
) -> int:
    path, items, key = task
    if key and (path / "store.json").exists():
        there = FeatureStore.open(path)
        if there.meta["key"] == key:
            return there.shape[1]
    rows = encode(items)
    blocks = (block for _, block in row_blocks(rows))
    return FeatureStore.of(path, len(items), blocks, dtype, key).shape[1]


def _scan_shard(path: Path, queries: Any, k: int, settings: dict[str, Any]) -> ScanResult:
    return scan(queries, FeatureStore.open(path, verify=False), k, **settings)


def _shape(path: Path, verify: bool) -> tuple[int, int]:
    return FeatureStore.open(path, verify=verify).shape
