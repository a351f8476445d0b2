"""The run folder: a manifest, one record a cell, kept indices, logs and a lock.

manifest.json             what was asked for last, and on what machine
manifests/<key>.json      each request that ever ran here, as its own manifest
cells/<key>.json          a record; written after its arrays, so it is the sign of completion
cells/<key>.safetensors   per-query values, replicates, scores
places.jsonl              which keys were ever written for a place on the board
indices/<key>/            built indices, from which a later benchmark starts
superseded/               records that a newer version of a method or suite has replaced
logs/                     what each worker process printed
log.jsonl                 one line of JSON an event
work/                     scratch of the workers that run now; empty otherwise

A folder is ours when its manifest says so; one that holds something under these names without a
manifest is refused, and nothing is deleted but what carries a name that only we give. None of the
names may be a link, since a run folder can come from a stranger, with the exception of `indices`
and `retrained`: their owner may keep them on another disk (see `RunFolder.check_links`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tdabench.errors import DataError, TdabenchError, UsageError
from tdabench.io import (
    append_line,
    cannot_write,
    fingerprint,
    open_own,
    read_header,
    read_json,
    remove,
    seal,
    sha256_file,
    sync_folder,
    write_json,
)
from tdabench.run.record import Record, is_record, now, slot

try:
    import fcntl
except ImportError:  # Windows: no lock, two runs on one folder are the user's care
    fcntl = None  # type: ignore[assignment]

FOLDERS = ("cells", "indices", "logs", "manifests", "retrained", "superseded", "work")
FILES = ("log.jsonl", "places.jsonl")
LINKABLE = ("indices", "retrained")  # large, and of no use to anybody else
OWNER = ".tdabench-run"  # in a folder that one of LINKABLE leads to: the id of the run it serves
_KEY = "[0-9a-f]{16}"
_TEMPORARY = re.compile(rf"\.(manifest\.json|{_KEY}\.(json|safetensors))\.[A-Za-z0-9_]{{8}}\.tmp")
_UNFINISHED = re.compile(rf"\.{_KEY}-[A-Za-z0-9_]{{8}}")
_WORKER = re.compile("[0-9a-f]{12}")


class RunFolder:
    """One folder of results."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.cells = self.path / "cells"
        self.indices = self.path / "indices"
        self.logs = self.path / "logs"
        self.work = self.path / "work"
        self.manifest_path = self.path / "manifest.json"
        self.places_path = self.path / "places.jsonl"
        self._known: dict[str, dict[str, None]] | None = None
        self._read_to = 0

    # ------------------------------------------------------------------ records

    def record_path(self, key: str) -> Path:
        return self.cells / f"{key}.json"

    def arrays_path(self, key: str) -> Path:
        return self.cells / f"{key}.safetensors"

    def read(self, key: str) -> Record | None:
        """The record of a cell, or None when there is none or it cannot be used.

        Then its cell is measured again. A record whose arrays are not whole is none, and neither
        is one that names another cell: keys become paths, and a folder may be a stranger's.
        """
        try:
            data = read_json(self.record_path(key))
            if not is_record(data) or data["key"] != key:
                return None
            if data["status"] == "ok":
                read_header(self.arrays_path(key))
        except DataError:
            return None
        return Record(data, self.record_path(key))

    def damaged(self) -> list[Path]:
        """Files among the records that `read` takes for none."""
        return [p for p in sorted(self.cells.glob("*.json")) if self.read(p.stem) is None]

    def records(self) -> Iterator[Record]:
        """Every readable record, by file name."""
        for path in sorted(self.cells.glob("*.json")):
            record = self.read(path.stem)
            if record is not None:
                yield record

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a record; one in the same place on the board but of another key steps aside."""
        self.supersede(record)
        write_json(self.record_path(record["key"]), dict(record))

    def supersede(self, record: Mapping[str, Any]) -> None:
        """Moves records of the same method label, target, benchmark and seed out of the way.

        Only records of that place are read, however many the folder holds.
        """
        place = fingerprint(list(slot(record)))
        known = self._places().setdefault(place, {})
        if record["key"] not in known:
            append_line(self.places_path, {"place": place, "key": record["key"]})
            known[record["key"]] = None
        for key in [k for k in known if k != record["key"]]:
            other = self.read(key)
            if other is None or slot(other) != slot(record):
                continue
            if record["status"] != "ok" and other["status"] == "ok":
                continue  # a failure never hides a result
            aside = self.path / "superseded"
            aside.mkdir(exist_ok=True)
            for file in (self.arrays_path(key), self.record_path(key)):
                if file.exists():
                    os.replace(file, aside / file.name)

    def _places(self) -> dict[str, dict[str, None]]:
        """Keys by place on the board, as `places.jsonl` lists them; what is new in it is read.

        Made from the records once, where they are older than that file.
        """
        if self._known is None:
            self._known, self._read_to = {}, 0
            if not self.places_path.exists() and self.cells.is_dir():
                for record in self.records():
                    place = fingerprint(list(slot(record)))
                    append_line(self.places_path, {"place": place, "key": record["key"]})
        try:
            with open_own(self.places_path, "rb") as f:
                f.seek(self._read_to)
                lines = f.read().split(b"\n")[:-1]
        except (FileNotFoundError, DataError):
            return self._known
        for line in lines:
            self._read_to += len(line) + 1
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(line)
                if re.fullmatch(_KEY, entry["key"]):
                    self._known.setdefault(str(entry["place"]), {})[entry["key"]] = None
        return self._known

    # ------------------------------------------------------------------ the folder

    def manifest(self) -> dict[str, Any] | None:
        """What the folder says it holds; None without a manifest. Raises DataError."""
        if not os.path.lexists(self.manifest_path):
            return None
        data = read_json(self.manifest_path)
        kinds = {"suite": dict, "request": dict, "targets": dict, "methods": list,
                 "benchmarks": list, "seeds": list, "id": str, "created": str}  # fmt: skip
        whole = isinstance(data, dict) and "suite" in data
        if not whole or any(not isinstance(data.get(k, v()), v) for k, v in kinds.items()):
            raise DataError(
                f"{self.manifest_path} is not a manifest of a run", "Choose another --out"
            )
        return data

    def claim(self, suite: str, version: int) -> dict[str, Any] | None:
        """Checks that the folder may hold results of this suite; returns its old manifest.

        Raises UsageError for a folder that holds anything under our names that we did not make.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file", "Choose another folder with --out")
        old = self.manifest()
        if old is None:
            self.check_free()
            return None
        held = (old["suite"].get("name"), old["suite"].get("version"))
        if held != (suite, version):
            raise UsageError(
                f"{self.path} holds results of suite {held[0]} version {held[1]}, not of "
                f"{suite} version {version}",
                "Choose another folder with --out",
            )
        self.check_links(old)
        return old

    def check_free(self) -> None:
        """Raises UsageError when something lies under our names although no run is here."""
        found = [n for n in (*FOLDERS, *FILES) if os.path.lexists(self.path / n)]
        # A link to an empty folder is how its owner puts the indices on another disk.
        found = [n for n in found if not (n in LINKABLE and _is_empty(self.path / n))]
        if not _is_our_lock(self.path / ".lock"):
            found.append(".lock")
        if found:
            raise UsageError(
                f"{self.path} holds {', '.join(map(repr, found))}, which a run would write to, "
                "and no run is there",
                "Choose another folder with --out",
            )

    def check_links(self, manifest: Mapping[str, Any]) -> None:
        """Raises UsageError for a link among our names that could lead to someone's files.

        `indices` and `retrained` may lead to another disk: to an empty folder, which from then on
        carries this run's id, or to one that carries it.
        """
        for name in (*FOLDERS, *FILES, ".lock", "manifest.json"):
            place = self.path / name
            if not place.is_symlink():
                if name in FOLDERS and place.exists() and not place.is_dir():
                    raise UsageError(f"{place} is not a folder", "Choose another folder with --out")
                continue
            if name not in LINKABLE:
                raise UsageError(
                    f"{place} is a link, which a run never makes", f"Remove it: {name!r}"
                )
            if _is_empty(place):
                continue
            try:
                owner = (place / OWNER).read_text("utf-8", "replace")
            except OSError:
                owner = ""
            if not owner or owner != manifest.get("id"):
                raise UsageError(
                    f"{place} is a link to a folder that holds files of others "
                    f"({os.path.realpath(place)})",
                    "Link it to an empty folder",
                )

    def begin(self, manifest: dict[str, Any], old: Mapping[str, Any] | None) -> None:
        """Writes the manifest before anything else is, and this request's own beside it.

        Call with the lock held. A linked folder is marked as this run's.
        """
        key = fingerprint([manifest["request"], manifest["plugins"]])
        if old is None or _substance(old) != _substance(manifest):
            write_json(self.manifest_path, manifest)
        for name in LINKABLE:
            place = self.path / name
            if place.is_symlink() and _is_empty(place):
                (place / OWNER).write_text(manifest["id"], "utf-8")
        own = self.path / "manifests" / f"{key}.json"
        if not own.exists():
            write_json(own, manifest)

    @contextlib.contextmanager
    def locked(self, say: Callable[[str], None] = lambda message: None) -> Iterator[None]:
        """Holds the folder's lock; it falls with the process, however that ends.

        Where the file system has no locks, `say` is told so and the run goes on without.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = open_own(self.path / ".lock", "a+b")
        except OSError as e:
            raise UsageError(
                f"cannot write to {self.path}: {e.strerror}", "Choose another folder with --out"
            ) from e
        with handle:
            if fcntl is not None:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as e:
                    handle.seek(0)
                    who = handle.read(200).decode("utf-8", "replace").strip()
                    raise TdabenchError(
                        f"another run is writing to {self.path} ({who})",
                        "Wait for it to finish, or choose another folder with --out",
                    ) from e
                except OSError as e:
                    if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                        raise UsageError(
                            f"cannot lock {self.path}: {e.strerror}",
                            "Choose another folder with --out",
                        ) from e
                    say(
                        f"warning: the file system of {self.path} has no locks ({e.strerror}): "
                        "take care that no second run writes there"
                    )
            with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
                handle.seek(0)
                handle.truncate()
                os.write(handle.fileno(), f"process {os.getpid()} since {now()}".encode())
            yield

    def tidy(self) -> None:
        """Removes what a killed run left half done. Call with the lock held.

        That is: what carries a name that only a run gives. Anything else stays.
        """
        self.clear_work()
        for folder in (self.path, self.cells, self.path / "superseded", self.path / "manifests"):
            for leftover in _children(folder):
                if _TEMPORARY.fullmatch(leftover.name) and leftover.is_file():
                    leftover.unlink(missing_ok=True)
        for leftover in _children(self.indices):
            if _UNFINISHED.fullmatch(leftover.name):
                remove(leftover)

    def clear_work(self) -> None:
        """Removes the folders of workers that have ended, and `work` when nothing else is there."""
        for leftover in _children(self.work):
            if _WORKER.fullmatch(leftover.name):
                remove(leftover)
        with contextlib.suppress(OSError):
            self.work.rmdir()

    def new_log(self, name: str) -> Path:
        """An empty file logs/<name>.log, in place of an earlier one. Raises TdabenchError."""
        path = (self.logs / f"{file_name(name)}.log").absolute()
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except OSError as e:
            raise cannot_write(path, e) from e
        return path

    # ------------------------------------------------------------------ indices

    def new_index(self, key: str) -> Path:
        """A folder for an index that is being built; `keep_index` or `remove` ends it."""
        return new_index(self.indices, key)

    def keep_index(self, unfinished: Path, key: str, built: Mapping[str, Any]) -> None:
        """Makes what lies in `unfinished`/index the kept index of `key`; see `keep_index`."""
        keep_index(unfinished, self.indices, key, built)

    def kept_index(self, key: str) -> dict[str, Any] | None:
        """What `keep_index` was told of the index of `key`, when it is as it was written."""
        return kept_index(self.indices, key)

    def drop_index(self, key: str) -> None:
        """Removes the kept index of `key`, if there is one."""
        if re.fullmatch(_KEY, key):
            remove(self.indices / key)


def _children(folder: Path) -> list[Path]:
    """What lies in a folder; nothing where it is missing."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _is_empty(folder: Path) -> bool:
    try:
        return folder.is_dir() and not any(folder.iterdir())
    except OSError:
        return False


def _is_our_lock(path: Path) -> bool:
    """Whether `path` is absent, or a lock as `locked` leaves it."""
    if not os.path.lexists(path):
        return True
    try:
        with open_own(path, "rb") as f:
            text = f.read(200)
    except (OSError, DataError):
        return False
    return not text or re.fullmatch(rb"process [0-9]+ since [0-9TZ:-]+", text) is not None


def _substance(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in manifest.items() if k not in ("hardware", "created")}


# --------------------------------------------------------------------------- kept indices


def new_index(indices: Path, key: str) -> Path:
    """A new folder in `indices` for an index of `key` that is being built, `index` in it."""
    try:
        indices.mkdir(parents=True, exist_ok=True)
        name = tempfile.mkdtemp(dir=indices, prefix=f".{key}-")
        (Path(name) / "index").mkdir()
    except OSError as e:
        raise cannot_write(indices, e) from e
    return Path(name)


def keep_index(unfinished: Path, indices: Path, key: str, built: Mapping[str, Any]) -> None:
    """Moves `unfinished` to `indices`/`key`, with the hash of each of its files in built.json.

    `built` (what it cost, and of what it was made) and the hashes are sealed: see `io.seal`.
    """
    about = {**built, "key": key, "files": _hashes(unfinished / "index")}
    write_json(unfinished / "built.json", {**about, "seal": seal(about)})
    os.chmod(unfinished, 0o755)
    remove(indices / key)
    os.replace(unfinished, indices / key)
    sync_folder(indices)


def kept_index(indices: Path, key: str) -> dict[str, Any] | None:
    """What `keep_index` was told, or None when the index is absent, altered or another's.

    Every byte of it is read: scores of an index that someone changed would look like measured
    ones. An index that was built on another machine carries a seal that is not ours, and is
    built again.
    """
    folder = indices / key
    try:
        if folder.is_symlink():
            return None
        about = read_json(folder / "built.json")
        sealed = about.pop("seal")
        if about["key"] != key or sealed != seal(about):
            return None
        if about["files"] != _hashes(folder / "index", about["files"]):
            return None
    except (DataError, OSError, KeyError, TypeError, AttributeError, ValueError):
        return None
    return about


def _hashes(folder: Path, expected: Mapping[str, Any] | None = None) -> dict[str, list[Any]]:
    """Size and sha256 of every file below `folder`, by its path there.

    With `expected`, a file of another size is not read. Raises DataError for a link, whose
    content lies elsewhere.
    """
    out: dict[str, list[Any]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise DataError(f"{path} is neither a file nor a folder")
        if path.is_file():
            size = path.stat().st_size
            same = expected is None or (expected.get(name) or [None])[0] == size
            out[name] = [size, sha256_file(path) if same else ""]
    return out


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
