"""A saved index of a corpus that is too large for a run: built in shards and searched.

The folder:

    .tdabench-index     marks the folder: what it holds under these names is the index's
    index.json          the corpus and the method: enough to open the index again
    state.safetensors   what the method learned from the corpus
    rows/               the training rows, in shards
    approximate.faiss   an approximate index of the same rows, if requested
    suite/              the suite of the user's own model and files, if no suite was named
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.data.examples import Corpus, Example
from tdabench.errors import DataError, UsageError
from tdabench.io import read_json, remove, write_bytes, write_json
from tdabench.method import Context
from tdabench.registry import configuration, configure, registry
from tdabench.run.plan import Plan, jsonable
from tdabench.run.sources import load_suite
from tdabench.run.suite import Suite, SuiteTarget
from tdabench.targets.target import Target
from tdabench.toolkit.approximate import FaissIndex
from tdabench.toolkit.representation import (
    RepresentationIndex,
    RepresentationMethod,
    build_index,
    open_index,
)
from tdabench.toolkit.sharded import Run, in_processes, in_turn, on_ray

SCHEMA = 1
MARK = ".tdabench-index"  # in the folder, from the beginning of its build: its files are ours
_SCRATCH = re.compile(r"\.work-[A-Za-z0-9_]{8}")
APPROXIMATE = "approximate.faiss"
WRITTEN = ("index.json", "state.safetensors", "rows", "features", APPROXIMATE)
Done = Callable[[int, int], None]  # (finished shards, all shards)


def _silent(finished: int, total: int) -> None:
    """Discards progress."""


def runner(workers: int, ray: str | None = None, gpus: float = 0, done: Done = _silent) -> Run:
    """Returns the runner of shards: this process, `workers` processes, or Ray.

    `ray` is the address of a cluster ("auto" finds it, "" starts one on this machine); `gpus` is
    the number per task. Each process finds the plugins of this one.
    """
    prepare = partial(_find_plugins, configuration())
    if ray is not None:
        return on_ray(ray or None, gpus=gpus, prepare=prepare, done=done)
    return in_processes(workers, prepare, done)


def _find_plugins(configured: Mapping[str, Any]) -> None:
    configure(**configured)
    registry()


def build(
    plan: Plan,
    suite: str,
    folder: Path,
    *,
    shard: int,
    dtype: str = "",
    approximate: str = "",
    run: Run = in_turn,
) -> dict[str, Any]:
    """Indexes the training corpus of a plan with one index; returns the contents of index.json.

    `suite` is the name or file of the index's suite, `shard` the number of rows per shard, `dtype`
    the dtype of the stored rows ("": the method's own), `approximate` a FAISS factory string. An
    interrupted build resumes; a finished one is opened.

    Raises UsageError for several methods or targets, for a folder with other contents, and
    for a method without representations.
    """
    labels = [f"{b.method.label} on {b.target.label}" for b in plan.builds]
    if len(labels) != 1:
        raise UsageError(f"an index has one method and target, not {', '.join(labels)}")
    (job,) = plan.builds
    method, folder = _representation(job.method.name, job.method.params), Path(folder)
    known = {*WRITTEN, "suite"}
    strange = (
        {p.name for p in folder.iterdir() if p.name[0] != "."} - known if folder.is_dir() else set()
    )
    if strange:
        raise UsageError(f"{folder} holds {sorted(strange)[0]!r}", "Give an empty or new folder")
    start, train = time.perf_counter(), plan.suite.train
    if len(train) == 0:
        raise UsageError(f"suite {plan.suite.name} has no training examples to index")
    _claim(folder)
    scratch = Path(tempfile.mkdtemp(prefix=".work-", dir=folder)).absolute()
    context = _context(plan.suite, job.target, job.seed, plan.request.device, scratch)
    dtype = dtype or method.rows_dtype or "float32"
    index = build_index(method, context, train, folder, shard, dtype=dtype, run=run)
    shutil.rmtree(context.scratch, ignore_errors=True)
    (folder / APPROXIMATE).unlink(missing_ok=True)
    if approximate:
        FaissIndex(index.rows, approximate).save(folder / APPROXIMATE)
    about = {
        "schema": SCHEMA,
        "suite": suite,
        "target": job.target.label,
        "target_fingerprint": plan.fingerprints[job.target.label],
        "corpus": plan.corpora["train"],
        "method": {
            "name": job.method.name,
            "label": job.method.label,
            "params": jsonable(method.params),
        },
        "seed": job.seed,
        "device": plan.request.device.partition(":")[0],
        "n_train": index.n_train,
        "dim": index.rows.shape[1],
        "dtype": dtype,
        "shards": -(-index.n_train // shard),
        "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
        "approximate": approximate,
        "seconds": round(time.perf_counter() - start, 3),
    }
    write_json(folder / "index.json", about)
    return about


def _claim(folder: Path) -> None:
    """Marks a folder as an index's, and removes what a killed build left.

    Raises UsageError if it has files under the names of an index that no build wrote.
    """
    mark = folder / MARK
    ours = mark.is_file() and not mark.is_symlink()
    there = [
        n for n in WRITTEN if (folder / n).is_symlink() or (not ours and (folder / n).exists())
    ]
    if there:
        raise UsageError(
            f"{folder} holds {there[0]!r}, which an index would overwrite and no build made",
            "Give an empty or new folder",
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(mark, b"")
    for left in folder.iterdir():
        if _SCRATCH.fullmatch(left.name):
            remove(left)


@dataclass(frozen=True)
class Hits:
    """The best examples of each query: positions and scores [query, k], best first; -1 if missing.

    `whole` [query] is the score of the whole corpus as one group, with the method's pooling, and
    `sums` [query] the sum of all scores; None after an approximate search, which reads few rows.
    """

    places: np.ndarray
    scores: np.ndarray
    seconds: float
    whole: np.ndarray | None = None
    sums: np.ndarray | None = None


class CorpusIndex:
    """An index that `build` wrote, checked against its suite. Raises DataError if they differ."""

    def __init__(
        self, folder: Path, run: Run = in_turn, verify: bool = True, device: str = "cpu",
        data_dir: Path | None = None,
    ) -> None:  # fmt: skip
        self.folder = Path(folder)
        self.about = self._read()
        self.suite = load_suite(self.about["suite"], data_dir)
        self.declared = declared = self.suite.target(self.about["target"])
        self.target: Target = declared.target
        for what, now, then in (
            ("target", self.target.fingerprint, self.about["target_fingerprint"]),
            ("training corpus", self.suite.train.fingerprint, self.about["corpus"]),
        ):
            if now != then:
                raise DataError(
                    f"{folder} was built with another {what} than suite {self.suite.name} now has",
                    "Build the index again: tdabench index build",
                )
        named = self.about["method"]
        method = _representation(named["name"], named["params"])
        scratch = Path(tempfile.mkdtemp(prefix="tdabench-search-"))
        context = _context(self.suite, declared, self.about["seed"], device, scratch)
        self.index: RepresentationIndex = open_index(method, context, self.folder, run, verify)

    def _read(self) -> dict[str, Any]:
        path = self.folder / "index.json"
        if not path.is_file():
            raise UsageError(
                f"{self.folder} contains no finished index", "Build it with: tdabench index build"
            )
        about = read_json(path)
        kinds = {"suite": str, "target": str, "target_fingerprint": str, "corpus": str, "seed": int}
        if (
            not isinstance(about, dict)
            or about.get("schema") != SCHEMA
            or any(not isinstance(about.get(k), kind) for k, kind in kinds.items())
            or not isinstance(about.get("method"), dict)
            or not isinstance(about["method"].get("name"), str)
            or not isinstance(about["method"].get("params"), dict)
        ):
            raise DataError(f"{path} does not describe an index", "Build the index again")
        return about

    @property
    def train(self) -> Corpus:
        return self.suite.train

    def search(self, queries: Sequence[Example], k: int) -> Hits:
        """Finds the exact k best examples; every row is read once for all queries."""
        start = time.perf_counter()
        found = self.index.scan(queries, k)
        spent = time.perf_counter() - start
        return Hits(found.ids, found.values, spent, found.pooled, found.sums)

    def approximate(self, queries: Sequence[Example], k: int, probes: int) -> Hits:
        """Finds about the k best examples by FAISS; `probes` is the number of cells per query."""
        if not self.about.get("approximate"):
            raise UsageError(
                f"{self.folder} has no approximate index",
                "Build it with: tdabench index build --approximate IVF1024,SQ8",
            )
        faiss = FaissIndex.open(self.folder / APPROXIMATE, probes)
        if faiss.shape != self.index.rows.shape:
            raise DataError(
                f"{self.folder / APPROXIMATE} belongs to other rows", "Build the index again"
            )
        start = time.perf_counter()
        rows = np.asarray(self.index.query_features(queries), dtype=np.float32)
        scores, places = faiss.top_k(rows, k)
        return Hits(places, scores, time.perf_counter() - start)

    def close(self) -> None:
        """Removes temporary files of searches."""
        shutil.rmtree(self.index.context.scratch, ignore_errors=True)


def _representation(name: str, params: Mapping[str, Any]) -> RepresentationMethod:
    method = registry().method(name).cls.from_params(params)
    if not isinstance(method, RepresentationMethod):
        raise UsageError(
            f"{name} does not score by products of representations, so it cannot be indexed",
            "Use tdabench trace, or another method",
        )
    return method


def _context(suite: Suite, target: SuiteTarget, seed: int, device: str, scratch: Path) -> Context:
    assets = suite.assets_for(target)
    for path in assets.values():
        if path.exists():
            suite.verify(path)
    return Context(target.target, scratch, seed, device, assets)
