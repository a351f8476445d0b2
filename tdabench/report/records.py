"""Reading run folders: the manifest and one record a cell, taken as a stranger's files.

A damaged record is named among the run's problems and never stops the others from being read.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.errors import DataError, UsageError
from tdabench.io import fingerprint, read_arrays, read_json

STATUSES = ("ok", "failed", "skipped", "oom", "timeout", "interrupted")
_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class Record:
    """One cell as stored. Properties give what tables need, whatever is missing."""

    data: Mapping[str, Any]
    path: Path
    run: str = ""

    def _part(self, name: str) -> Mapping[str, Any]:
        part = self.data.get(name)
        return part if isinstance(part, Mapping) else {}

    @property
    def key(self) -> str:
        return str(self.data.get("key") or self.path.stem)

    @property
    def status(self) -> str:
        status = str(self.data.get("status", "failed"))
        return status if status in STATUSES else "failed"

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def reason(self) -> str:
        return str(self.data.get("reason") or "")

    @property
    def method(self) -> Mapping[str, Any]:
        return self._part("method")

    @property
    def label(self) -> str:
        return str(self.method.get("label") or self.method.get("name") or "?")

    @property
    def target(self) -> Mapping[str, Any]:
        return self._part("target")

    @property
    def benchmark(self) -> Mapping[str, Any]:
        return self._part("benchmark")

    @property
    def benchmark_name(self) -> str:
        return str(self.benchmark.get("label") or self.benchmark.get("name") or "?")

    @property
    def corpus(self) -> Mapping[str, Any]:
        return self._part("corpus")

    @property
    def cost(self) -> Mapping[str, Any]:
        return self._part("cost")

    @property
    def hardware(self) -> Mapping[str, Any]:
        return self._part("hardware")

    @property
    def versions(self) -> Mapping[str, Any]:
        return self._part("versions")

    @property
    def metrics(self) -> Mapping[str, Any]:
        return self._part("metrics")

    @property
    def notes(self) -> list[str]:
        notes = self.data.get("notes")
        return [str(n) for n in notes] if isinstance(notes, list) else []

    @property
    def seed(self) -> int:
        seed = self.data.get("seed", 0)
        return seed if isinstance(seed, int) else 0

    @property
    def primary(self) -> str:
        return str(self.data.get("primary") or next(iter(self.metrics), ""))

    def metric(self, name: str) -> Mapping[str, Any]:
        metric = self.metrics.get(name)
        return metric if isinstance(metric, Mapping) else {}

    @property
    def what(self) -> Mapping[str, Any]:
        """All that two records of a column must share for their values to be comparable."""
        return {
            "version": self.benchmark.get("version"),
            "params": self.benchmark.get("params"),
            "truth": self.data.get("truth"),
            "queries": self.corpus.get("queries"),
        }

    @property
    def machine(self) -> Mapping[str, Any]:
        """What decides how long things take: hardware, and how it was used."""
        used = {k: self.data.get(k) for k in ("device", "threads", "concurrent")}
        return {**self.hardware, **{k: v for k, v in used.items() if v is not None}}

    @property
    def arrays_path(self) -> Path:
        return self.path.with_suffix(".safetensors")

    def arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Stored arrays and their metadata. Raises DataError."""
        return read_arrays(self.arrays_path)

    def arrays_hash(self) -> str:
        """The hash that the file of arrays carries, read from its header alone; "" if none."""
        return str(_carried(self.arrays_path).get("sha256", ""))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each stored array, read from the header alone."""
        header = _header(self.arrays_path)
        shapes = {
            k: v["shape"]
            for k, v in header.items()
            if k != "__metadata__" and isinstance(v, Mapping) and isinstance(v.get("shape"), list)
        }
        return {k: tuple(v) for k, v in shapes.items() if all(type(n) is int for n in v)}

    def metadata(self) -> dict[str, Any]:
        """The metadata that lies beside the arrays (query ids among it), header only."""
        try:
            value = json.loads(_carried(self.arrays_path).get("tdabench", "{}"))
        except (ValueError, TypeError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}


def _header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file; empty when there is none to be read."""
    try:
        with open(path, "rb") as f:
            (size,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(size)) if size <= _MAX_HEADER else {}
    except (OSError, struct.error, ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def _carried(path: Path) -> Mapping[str, Any]:
    """What the header of a safetensors file says besides its arrays."""
    metadata = _header(path).get("__metadata__")
    return metadata if isinstance(metadata, Mapping) else {}


@dataclass(frozen=True)
class Run:
    """One run folder: its manifest, its records and what could not be read."""

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
    def hardware(self) -> Mapping[str, Any]:
        hardware = self.manifest.get("hardware")
        return hardware if isinstance(hardware, Mapping) else {}


def read_run(folder: Path) -> Run:
    """Reads a run folder. Raises DataError when it holds no manifest."""
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise DataError(f"{folder} is not a run folder: it holds no manifest.json", _remedy())
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, Mapping):
        raise DataError(f"{folder / 'manifest.json'} is not a manifest: it is no JSON object")
    records, problems = [], []
    for path in sorted((folder / "cells").glob("*.json")):
        try:
            data = read_json(path)
            if not isinstance(data, Mapping):
                raise DataError(f"{path} is not a record: it is no JSON object")
        except (DataError, RecursionError) as e:
            problems.append(f"unreadable record: {e}")
            continue
        records.append(Record(data, path, str(manifest.get("run") or folder.name)))
    return Run(folder, manifest, tuple(records), tuple(problems))


def find_runs(paths: Iterable[Path] = (), default: Path = Path("runs")) -> list[Path]:
    """Run folders meant by `paths`: runs themselves, or folders of runs.

    Without paths, the newest run under `default`. Raises UsageError when there is none.
    """
    paths = [Path(p) for p in paths]
    if not paths:
        if is_run(default):
            return [default]
        found = sorted(_runs_in(default), key=_created)
        if not found:
            raise UsageError(f"there is no run under {default}/", _remedy())
        return found[-1:]
    out: list[Path] = []
    for path in paths:
        if is_run(path):
            out.append(path)
        elif not path.exists():
            named = default / path
            if not is_run(named):
                raise UsageError(f"there is no run folder {str(path)!r}", _remedy())
            out.append(named)
        elif found := sorted(_runs_in(path), key=_created):
            out.extend(found)
        else:
            raise UsageError(f"{path} holds no run (no manifest.json)", _remedy())
    return list(dict.fromkeys(p.resolve() for p in out))


def is_run(path: Path) -> bool:
    return (Path(path) / "manifest.json").is_file()


def _runs_in(folder: Path) -> list[Path]:
    try:
        return [p for p in folder.iterdir() if is_run(p)]
    except OSError:
        return []


def _created(folder: Path) -> tuple[str, float]:
    try:
        created = read_json(folder / "manifest.json").get("created", "")
    except (DataError, AttributeError):
        created = ""
    return str(created), (folder / "manifest.json").stat().st_mtime


def _remedy() -> str:
    return "Make one with: tdabench run"


def finite(value: Any) -> float | None:
    """`value` as a finite float, or None: records are not trusted to hold numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


_DECIDES = ("cpu", "cores", "gpu", "device", "threads", "concurrent")


def machine_of(machine: Mapping[str, Any]) -> str:
    """A fingerprint of what decides times: processor, cores, accelerator, threads, jobs."""
    return fingerprint([str(machine.get(k) or "") for k in _DECIDES])


def describe_machine(machine: Mapping[str, Any]) -> str:
    """One line for a reader: `Testor 9, 2 cores, 1 thread, 2 jobs at once`."""
    cores, threads = machine.get("cores"), machine.get("threads")
    jobs = machine.get("concurrent")
    parts = [
        str(machine.get("cpu") or "unknown processor"),
        f"{cores} cores" if cores else "",
        str(machine.get("gpu") or ""),
        f"{threads} thread{'s' if threads != 1 else ''} a method" if threads else "",
        f"{jobs} methods at once" if jobs and jobs != 1 else "",
    ]
    return ", ".join(p for p in parts if p)
