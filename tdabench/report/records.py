"""Reads run folders, which are untrusted: the manifest and one record per cell.

A damaged record is listed among the run's problems and never stops other records from being read.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tdabench.errors import DataError, UsageError
from tdabench.io import read_json, read_jsons, seal
from tdabench.run.record import Record


@dataclass(frozen=True)
class Run:
    """One run folder: its manifest, its records and unreadable files."""

    folder: Path
    manifest: Mapping[str, Any]
    records: tuple[Record, ...]
    problems: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.manifest.get("run") or self.folder.name)

    @property
    def suite(self) -> Mapping[str, Any]:
        suite = self.manifest.get("suite")
        return suite if isinstance(suite, Mapping) else {}

    @cached_property
    def ours(self) -> bool:
        """Whether this user wrote the manifest on this machine, and nobody changed it since."""
        return self.manifest.get("seal") == seal({**self.manifest, "seal": ""})

    @cached_property
    def hardware(self) -> Mapping[str, Any]:
        hardware = self.manifest.get("hardware")
        return hardware if isinstance(hardware, Mapping) else {}


def read_run(folder: Path, keys: Iterable[str] | None = None) -> Run:
    """Reads a run folder, or only its records `keys`. Raises DataError if it has no manifest."""
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise DataError(f"{folder} is not a run folder: it has no manifest.json", _remedy())
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, Mapping):
        raise DataError(f"{folder / 'manifest.json'} is not a manifest: it is not a JSON object")
    records, problems = [], []
    name = str(manifest.get("run") or folder.name)
    with no_collection():
        paths = _cells(folder, keys)
        for path, data in zip(paths, read_jsons(paths), strict=True):
            if isinstance(data, Mapping):
                records.append(Record(data, path, name))
                continue
            why = f"{path} is not a record: it is not a JSON object"
            problems.append(f"unreadable record: {data if isinstance(data, DataError) else why}")
    return Run(folder, manifest, tuple(records), tuple(problems))


def _cells(folder: Path, keys: Iterable[str] | None) -> list[Path]:
    cells = folder / "cells"
    if keys is not None:
        return [cells / f"{key}.json" for key in sorted(set(keys))]
    try:
        names = os.listdir(cells)
    except OSError:
        return []
    return [cells / n for n in sorted(n for n in names if n.endswith(".json"))]


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Stops the search for reference cycles, which takes a third of the time to read records."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def find_runs(paths: Iterable[Path] = (), default: Path = Path("runs")) -> list[Path]:
    """Finds run folders in `paths`: runs themselves, or folders of runs.

    Without paths, returns the newest run under `default`. Raises UsageError if there is none.
    """
    paths = [Path(p) for p in paths]
    if not paths:
        if is_run(default):
            return [default]
        found = runs_in(default)
        if not found:
            raise UsageError(f"there is no run under {default}/", _remedy())
        return found[:1]
    out: list[Path] = []
    for path in paths:
        if is_run(path):
            out.append(path)
        elif not path.exists():
            named = default / path
            if not is_run(named):
                raise UsageError(f"there is no run folder {str(path)!r}", _remedy())
            out.append(named)
        elif found := runs_in(path):
            out.extend(reversed(found))
        else:
            raise UsageError(f"{path} contains no run (no manifest.json)", _remedy())
    return list(dict.fromkeys(p.resolve() for p in out))


def is_run(path: Path) -> bool:
    return (Path(path) / "manifest.json").is_file()


def runs_in(folder: Path) -> list[Path]:
    """Lists the runs in a folder, newest first by the creation time of their manifest."""
    try:
        found = [p for p in Path(folder).iterdir() if is_run(p)]
    except OSError:
        return []
    return sorted(found, key=_created, reverse=True)


def _created(folder: Path) -> tuple[str, float]:
    try:
        created = read_json(folder / "manifest.json").get("created", "")
    except (DataError, AttributeError):
        created = ""
    return str(created), (folder / "manifest.json").stat().st_mtime


def _remedy() -> str:
    return "Create one with: tdabench run"
