"""Teachers: another method's scores on the label corpora, for distillation."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.api import (
    Context,
    Corpus,
    DataError,
    Target,
    UsageError,
    check_replaceable,
    named_seed,
    read_arrays,
    registry,
    write_arrays,
)


@dataclass(frozen=True)
class Teacher:
    """Scores [dev, train] of another method on the corpora of the labels.

    NaN where the teacher did not score: it may have scored only a sample of either corpus.
    """

    scores: np.ndarray
    meta: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def rows(self) -> np.ndarray:
        """Scored positions in the dev corpus, ascending."""
        return np.flatnonzero(~np.isnan(self.scores).all(1))

    @cached_property
    def columns(self) -> np.ndarray:
        """Scored positions in the training corpus, ascending."""
        return np.flatnonzero(~np.isnan(self.scores).all(0))

    def check(self, train: Corpus, dev: Corpus) -> None:
        if self.scores.shape != (len(dev), len(train)):
            raise DataError(
                f"the teacher scored {self.scores.shape}, the corpora are "
                f"({len(dev)}, {len(train)})"
            )
        for what, corpus in (("train", train), ("dev", dev)):
            made = self.meta.get(what)
            if made is not None and made != corpus.fingerprint:
                raise DataError(
                    f"the teacher scored another {what} corpus ({made})",
                    "Score this one with: tdabench airrep teacher",
                )
        asked = self.scores[np.ix_(self.rows, self.columns)]
        if not asked.size or not np.isfinite(asked).all():
            raise DataError("the teacher's scores are not all finite")

    @classmethod
    def load(cls, path: Path) -> Teacher:
        arrays, meta = read_arrays(path)
        if meta.get("kind") != "airrep-teacher" or "shape" not in meta:
            raise DataError(f"{path} is not a teacher", "Make one with: tdabench airrep teacher")
        scores = np.full(meta.pop("shape"), np.nan, dtype=np.float32)
        scores[np.ix_(arrays["rows"], arrays["columns"])] = arrays["scores"]
        return cls(scores, meta)

    def save(self, path: Path) -> None:
        """Writes the teacher. Raises UsageError if `path` is another kind of file."""
        check_replaceable(path, "airrep-teacher")
        arrays = {
            "scores": self.scores[np.ix_(self.rows, self.columns)].astype(np.float32),
            "rows": self.rows.astype(np.int32),
            "columns": self.columns.astype(np.int32),
        }
        shape = list(self.scores.shape)
        write_arrays(path, arrays, {**self.meta, "kind": "airrep-teacher", "shape": shape})


def blend(specs: Sequence[str]) -> Teacher | None:
    """Averages teachers with weights, each row standardised; `FILE` or `FILE=WEIGHT`."""
    if not specs:
        return None
    total: np.ndarray | None = None
    parts, seconds = [], 0.0
    meta: dict[str, Any] = {}
    for spec in specs:
        path, _, weight = spec.partition("=")
        try:
            w = float(weight or 1.0)
        except ValueError as e:
            raise UsageError(f"the teacher's weight {weight!r} is not a number") from e
        teacher = Teacher.load(Path(path))
        asked = np.ix_(teacher.rows, teacher.columns)
        known = teacher.scores[asked].astype(np.float32)
        known = known - known.mean(1, keepdims=True)
        known /= np.maximum(known.std(1, keepdims=True), 1e-20)
        rows = np.full(teacher.scores.shape, np.nan, dtype=np.float32)
        rows[asked] = known
        total = w * rows if total is None else total + w * rows
        parts.append({**teacher.meta, "weight": w})
        seconds += float(teacher.meta.get("seconds", 0.0))
        for key in ("target", "train", "dev"):
            if meta.setdefault(key, teacher.meta.get(key)) != teacher.meta.get(key):
                raise DataError(f"the teacher {path} scored another {key} than the first")
    assert total is not None
    return Teacher(total, {**meta, "parts": parts, "seconds": seconds})


def make_teacher(
    method: str,
    params: Mapping[str, str],
    seed: int,
    target: Target,
    train: Corpus,
    dev: Corpus,
    say: Callable[[str], None],
    n_dev: int = 0,
    n_train: int = 0,
    level: float = 0.0,
) -> Teacher:
    """Scores the dev examples against the training corpus with another method.

    `level` divides each training example's scores by that power of their standard deviation over
    dev examples, so that the few with large gradients do not dominate (1: not at all).

    For an expensive method, `n_dev` dev and `n_train` training examples are drawn by the seed (0:
    all). A curvature is then computed on the drawn training examples.
    """
    rows, columns = (
        np.arange(len(corpus))
        if not 0 < n < len(corpus)
        else np.sort(
            np.random.default_rng(named_seed(seed, f"teacher-{what}")).choice(
                len(corpus), n, replace=False
            )
        )
        for what, corpus, n in (("dev", dev, n_dev), ("train", train, n_train))
    )
    chosen = registry().method(method).cls.from_params(params)
    began, last = time.process_time(), time.perf_counter()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.perf_counter() - last > 10:
            last = time.perf_counter()
            say(f"teacher {method}: {what} {done}/{total}")

    with tempfile.TemporaryDirectory() as scratch:
        context = Context(target, Path(scratch), seed=seed, progress=progress)
        found = chosen.build(context, train.subset(columns)).score(dev.subset(rows))
    if level:
        spread = found.std(0, dtype=np.float64)
        found = found / np.maximum(spread, 1e-6 * max(spread.max(), 1e-30)) ** level
    scores = np.full((len(dev), len(train)), np.nan, dtype=np.float32)
    scores[np.ix_(rows, columns)] = found
    meta = {
        "method": method,
        "params": {k: str(v) for k, v in chosen.params.items()},
        "seed": seed,
        "n_dev": len(rows),
        "n_train": len(columns),
        "level": level,
        "seconds": round(time.process_time() - began, 1),
        "target": target.fingerprint,
        "train": train.fingerprint,
        "dev": dev.fingerprint,
    }
    return Teacher(scores, meta)
