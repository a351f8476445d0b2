"""Indices of third-party methods for commands that are not runs, such as `trace` and `tune`.

Where the command line keeps third-party plugins out of its process (`tdabench.apart`), their
methods are stand-ins. Their indices are built, loaded and asked in contestants, as in a run: in
processes of their own, confined where the system can, which are given neither truths nor records.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from tdabench.errors import MethodError
from tdabench.io import cache_folder
from tdabench.method import Index
from tdabench.registry import configuration, registry
from tdabench.run import sandbox
from tdabench.run.execute import hidden_from_methods, withheld_assets
from tdabench.run.folder import RunFolder
from tdabench.run.judge import Judge, RemoteIndex
from tdabench.run.meter import Meter, MeteredIndex
from tdabench.run.nursery import Nursery
from tdabench.run.suite import Suite, SuiteTarget
from tdabench.standins import StandIn, uses_models

MOST_PRINTED = 1 << 20  # bytes of a method's output that are shown


def lives_apart(name: str) -> bool:
    """Tells whether a method is a stand-in for one that only another process may import."""
    entry = registry().methods.get(name)
    return entry is not None and issubclass(entry.cls, StandIn)


class Contestants:
    """Opens indices of third-party methods; use it as a context manager.

    Make it before torch computes anything in this process: its nurseries are forks. `names` are the
    methods, of which those that are not third-party need nothing.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._free: list[Nursery] = []
        for name in names:
            if lives_apart(name):
                self._free.append(Nursery(self._free, hold_stdout=False))
        self._all = list(self._free)
        self._work = tempfile.TemporaryDirectory(prefix="tdabench-contestants-")
        self._events = os.open(os.devnull, os.O_WRONLY)
        self._judges: list[Judge] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        for nursery in self._all:
            nursery.close()
        os.close(self._events)
        self._work.cleanup()

    def release(self) -> None:
        """Ends the contestants of all indices that were opened."""
        for judge in self._judges:
            judge.stage.close()
        self._free = list(self._all)
        self._judges.clear()

    def index(
        self,
        name: str,
        params: Mapping[str, Any],
        given: Iterable[str],
        key: str,
        suite: Suite,
        target: SuiteTarget,
        *,
        seed: int = 0,
        device: str = "cpu",
        places: Sequence[Path] = (),
        keep: Path | None = None,
        on_build: Callable[[], None] = lambda: None,
    ) -> tuple[RemoteIndex, float]:
        """Returns the index of a method on the suite's training corpus, and seconds of building.

        `given` are the names of parameters that the user or the suite has set. The index is taken
        from a folder of `places` (runs) if one has it under `key`, else from the folder `keep` (by
        default the cache). If it is missing there, `on_build` is called and it is built; 0 seconds
        if it was there.
        """
        judge = self._judge(name, params, given, key, suite, target, seed, device)
        for place in places:
            judge.folder = RunFolder(place)
            if judge._kept() is not None:
                index = RemoteIndex(
                    judge, judge.folder.indices / key / "index", judge.given, len(suite.train)
                )
                index.open()
                return index, 0.0
        judge.folder = RunFolder(keep or cache_folder())
        there = judge._kept() is not None
        if not there:
            on_build()
        index, cost = judge._index()
        return index, 0.0 if there else float(cost["build"]["seconds"])

    def _judge(
        self, name: str, params: Mapping[str, Any], given: Iterable[str], key: str, suite: Suite,
        target: SuiteTarget, seed: int, device: str,
    ) -> Judge:  # fmt: skip
        if not self._free:
            raise MethodError(f"{name} has no process to run in")
        entry = registry().method(name)
        work = Path(tempfile.mkdtemp(dir=self._work.name))
        job = {
            "id": "", "stages": (), "cells": [], "split": "test", "timeout": 0.0,
            "label": name,
            "method": {"name": name, "params": dict(params), "set": sorted(given),
                       "labels": bool(entry.cls.reads_labels)},
            "plugins": {**configuration(), "only": [entry.origin.plugin]},
            "preload": uses_models(entry.cls),
            "index_key": key, "seed": seed, "device": device, "target": target.label,
            "fingerprint": target.target.fingerprint,
            "landlock": sandbox.abi(), "most_printed": MOST_PRINTED,
            "hidden": hidden_from_methods(cache_folder()),
            "withheld": withheld_assets(suite),
            "folder": str(cache_folder()), "work": str(work), "log": os.devnull,
        }  # fmt: skip
        judge = Judge(job, [self._free.pop()], self._events)
        self._judges.append(judge)
        judge.suite, judge.declared, judge.train = suite, target, suite.train
        judge.enter(judge)
        return judge


def checked(index: Index, name: str) -> Index:
    """Returns an index whose answers are checked for shape and finite values."""
    return MeteredIndex(index, name, index.n_train, Meter())
