"""The run folder: a manifest, one record a cell, kept indices, logs and a lock.

manifest.json             what was asked for, and on what machine
cells/<key>.json          a record; written after its arrays, so it is the sign of completion
cells/<key>.safetensors   per-query values, replicates, scores
indices/<key>/            built indices, from which a later benchmark starts
superseded/               records that a newer version of a method or suite has replaced
logs/                     what each worker process printed
log.jsonl                 one line of JSON an event
work/                     scratch of the workers that run now; empty otherwise
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tdabench.errors import DataError, TdabenchError, UsageError
from tdabench.io import check_header, fingerprint, read_json, write_json

try:
    import fcntl
except ImportError:  # Windows: no lock, two runs on one folder are the user's care
    fcntl = None  # type: ignore[assignment]

SCHEMA = 1
STATUSES = ("ok", "failed", "skipped", "oom", "timeout", "interrupted")


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class RunFolder:
    """One folder of results."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.cells = self.path / "cells"
        self.indices = self.path / "indices"
        self.logs = self.path / "logs"
        self.work = self.path / "work"
        self.manifest_path = self.path / "manifest.json"

    # ------------------------------------------------------------------ records

    def record_path(self, key: str) -> Path:
        return self.cells / f"{key}.json"

    def arrays_path(self, key: str) -> Path:
        return self.cells / f"{key}.safetensors"

    def read(self, key: str) -> dict[str, Any] | None:
        """The record of a cell, or None when there is none or it cannot be used.

        Then its cell is measured again. A record whose arrays are not whole is none, and neither
        is one that names another cell: keys become paths, and a folder may be a stranger's.
        """
        try:
            record = read_json(self.record_path(key))
            if not is_record(record) or record["key"] != key:
                return None
            if record["status"] == "ok":
                check_header(self.arrays_path(key))
        except DataError:
            return None
        return record

    def damaged(self) -> list[Path]:
        """Files among the records that `read` takes for none."""
        return [p for p in sorted(self.cells.glob("*.json")) if self.read(p.stem) is None]

    def records(self) -> Iterator[dict[str, Any]]:
        """Every readable record, by file name."""
        for path in sorted(self.cells.glob("*.json")):
            record = self.read(path.stem)
            if record is not None:
                yield record

    def write(self, record: dict[str, Any]) -> None:
        """Writes a record; one in the same place on the board but of another key steps aside."""
        self.supersede(record)
        write_json(self.record_path(record["key"]), record)

    def supersede(self, record: dict[str, Any]) -> None:
        """Moves records of the same method label, target, benchmark and seed out of the way."""
        for other in list(self.records()):
            if other["key"] != record["key"] and slot(other) == slot(record):
                if record["status"] != "ok" and other["status"] == "ok":
                    continue  # a failure never hides a result
                aside = self.path / "superseded"
                aside.mkdir(exist_ok=True)
                for file in (self.arrays_path(other["key"]), self.record_path(other["key"])):
                    if file.exists():
                        os.replace(file, aside / file.name)

    # ------------------------------------------------------------------ the folder

    def manifest(self) -> dict[str, Any] | None:
        if not self.manifest_path.exists():
            return None
        data = read_json(self.manifest_path)
        if not isinstance(data, dict) or not isinstance(data.get("suite"), dict):
            raise DataError(f"{self.manifest_path} is not a manifest", "Choose another --out")
        return data

    def claim(self, suite: str, version: int) -> dict[str, Any] | None:
        """Checks that the folder may hold results of this suite; returns its old manifest."""
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file", "Choose another folder with --out")
        old = self.manifest()
        if old is None:
            return None
        held = (old["suite"].get("name"), old["suite"].get("version"))
        if held != (suite, version):
            raise UsageError(
                f"{self.path} holds results of suite {held[0]} version {held[1]}, not of "
                f"{suite} version {version}",
                "Choose another folder with --out",
            )
        return old

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder's lock; it falls with the process, however that ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = open(self.path / ".lock", "a+")
        except OSError as e:
            raise UsageError(
                f"cannot write to {self.path}: {e.strerror}", "Choose another folder with --out"
            ) from e
        with handle:
            if fcntl is not None:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as e:
                    handle.seek(0)
                    raise TdabenchError(
                        f"another run is writing to {self.path} ({handle.read().strip()})",
                        "Wait for it to finish, or choose another folder with --out",
                    ) from e
            with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
                handle.seek(0)
                handle.truncate()
                os.write(handle.fileno(), f"process {os.getpid()} since {now()}".encode())
            yield

    def tidy(self) -> None:
        """Removes what a killed run left half done. Call with the lock held."""
        shutil.rmtree(self.work, ignore_errors=True)
        for folder in (self.path, self.cells, self.path / "superseded"):
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        for leftover in self.indices.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)


_FIELDS = {
    "method": dict, "target": dict, "benchmark": dict, "metrics": dict, "cost": dict,
    "inputs": dict, "corpus": dict, "hardware": dict, "versions": dict, "notes": list,
    "log_tail": list, "reason": str, "primary": str, "started": str,
}  # fmt: skip


def is_record(value: Any) -> bool:
    """Whether `value` has the parts of a record, each of its kind."""
    if not isinstance(value, dict) or value.get("status") not in STATUSES:
        return False
    if not isinstance(value.get("key"), str) or type(value.get("seed")) is not int:
        return False
    if any(not isinstance(value.get(k, kind()), kind) for k, kind in _FIELDS.items()):
        return False
    parts = [(value.get(k) or {}).get("name") for k in ("method", "target", "benchmark")]
    return all(isinstance(n, str) for n in (*parts, (value.get("method") or {}).get("label")))


def slot(record: dict[str, Any]) -> tuple[str, str, str, str, int]:
    """A record's place on the board: method label, target, benchmark, queries, seed."""
    return (
        record["method"]["label"],
        record["target"].get("label", record["target"]["name"]),
        record["benchmark"]["name"],
        record.get("split", "test"),
        record["seed"],
    )


def file_name(text: str) -> str:
    """`text` as a file's name: no path, not too long, and no two texts alike in any case."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "._+=-") else "_" for c in text)
    same = safe == text.lower() and len(safe) <= 120 and not safe.startswith(".")
    return safe if same else f"{safe[:100].lstrip('.')}-{fingerprint(text)[:8]}"


def tail(path: Path, lines: int = 20, width: int = 500) -> list[str]:
    """The last lines of a log file, without control characters."""
    try:
        with open(path, "rb") as f:
            f.seek(0, os.SEEK_END)
            f.seek(max(0, f.tell() - 64_000))
            text = f.read().decode("utf-8", "replace")
    except OSError:
        return []
    kept = ["".join(c for c in line if c.isprintable() or c == "\t") for line in text.splitlines()]
    return [line[:width] for line in kept if line.strip()][-lines:]
