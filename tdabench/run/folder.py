"""The run folder: a manifest, one record per cell, kept indices, logs and a lock.

manifest.json             the last request, and the machine
manifests/<key>.json      each request that ever ran here, as its own manifest
cells/<key>.json          a record; written after its arrays, so it marks completion
cells/<key>.safetensors   per-query values, replicates, scores
places.jsonl              keys that were ever written for a place on the board
indices/<key>/            built indices, from which a later benchmark starts
superseded/               records that a newer version of a method or suite has replaced
logs/                     output of each worker process
log.jsonl                 one line of JSON per event
work/                     scratch space of running workers; otherwise empty

A folder belongs to tdabench if its manifest says so. A folder that contains these names without a
manifest is refused, and only files with names that tdabench alone gives are deleted. None of the
names may be a link, since a run folder can come from an untrusted source, except `indices` and
`retrained`, which their owner may keep on another disk (see `RunFolder.check_links`).
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
    carried,
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
except ImportError:  # Windows has no such lock: the user must not start two runs on one folder
    fcntl = None  # type: ignore[assignment]

FOLDERS = ("cells", "indices", "logs", "manifests", "retrained", "superseded", "work")
FILES = ("log.jsonl", "places.jsonl")
LINKABLE = ("indices", "retrained")  # large, and useful only here
OWNER = ".tdabench-run"  # in the target of a LINKABLE link: the id of the run that it serves
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
        self._lines: bytes | None = None  # of places.jsonl, as far as it was read

    # ------------------------------------------------------------------ records

    def record_path(self, key: str) -> Path:
        return self.cells / f"{key}.json"

    def arrays_path(self, key: str) -> Path:
        return self.cells / f"{key}.safetensors"

    def read(self, key: str) -> Record | None:
        """Reads the record of a cell, or returns None if it is missing or unusable.

        In that case the cell is measured again. A record with incomplete arrays is unusable, as is
        one that names another cell: keys become paths, and a folder may be untrusted.
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
        """Lists record files that `read` cannot use."""
        return [p for p in sorted(self.cells.glob("*.json")) if self.read(p.stem) is None]

    def records(self) -> Iterator[Record]:
        """Returns every readable record, by file name."""
        for path in sorted(self.cells.glob("*.json")):
            record = self.read(path.stem)
            if record is not None:
                yield record

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes a record; moves aside one with another key for the same place on the board."""
        self.supersede(record)
        arrays = ""
        if record["status"] == "ok":
            with contextlib.suppress(DataError):
                arrays = carried(self.arrays_path(record["key"])).get("sha256", "")
        write_json(self.record_path(record["key"]), dict(Record(record).signed(arrays)))

    def supersede(self, record: Mapping[str, Any]) -> None:
        """Moves records of the same method label, target, benchmark and seed to `superseded`.

        Only records of that place are read, for any size of the folder.
        """
        place = fingerprint(list(slot(record)))
        known = self._keys_at(place)
        if record["key"] not in known:
            append_line(self.places_path, {"place": place, "key": record["key"]})
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

    def _keys_at(self, place: str) -> list[str]:
        """Returns the keys ever written for a place on the board, by `places.jsonl`.

        Reads only new lines of the file, and parses only the lines of the place. The file is made
        from the records once, if they are older than the file.
        """
        if self._lines is None:
            self._lines = b""
            if not self.places_path.exists() and self.cells.is_dir():
                for record in self.records():
                    held = fingerprint(list(slot(record)))
                    append_line(self.places_path, {"place": held, "key": record["key"]})
        with (
            contextlib.suppress(FileNotFoundError, DataError),
            open_own(self.places_path, "rb") as f,
        ):
            f.seek(len(self._lines))
            self._lines += f.read()
        found: dict[str, None] = {}
        lines, wanted, at = self._lines, place.encode(), 0
        while (at := lines.find(wanted, at)) >= 0:
            end = lines.find(b"\n", at)
            if end < 0:
                break  # another process is writing it
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(lines[lines.rfind(b"\n", 0, at) + 1 : end])
                if entry["place"] == place and re.fullmatch(_KEY, entry["key"]):
                    found[entry["key"]] = None
            at = end
        return list(found)

    # ------------------------------------------------------------------ the folder

    def manifest(self) -> dict[str, Any] | None:
        """Returns the folder's manifest, or None without one. Raises DataError."""
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

        Raises UsageError for a folder with foreign files under our names.
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
                f"{self.path} contains results of suite {held[0]} version {held[1]}, not of "
                f"{suite} version {version}",
                "Choose another folder with --out",
            )
        self.check_links(old)
        return old

    def check_free(self) -> None:
        """Raises UsageError if files have our names although there is no run."""
        found = [n for n in (*FOLDERS, *FILES) if os.path.lexists(self.path / n)]
        # The owner may put indices on another disk with a link to an empty folder.
        found = [n for n in found if not (n in LINKABLE and _is_empty(self.path / n))]
        if not _is_our_lock(self.path / ".lock"):
            found.append(".lock")
        if found:
            raise UsageError(
                f"{self.path} holds {', '.join(map(repr, found))}, which a run would write, "
                "but it is not a run folder",
                "Choose another folder with --out",
            )

    def check_links(self, manifest: Mapping[str, Any]) -> None:
        """Raises UsageError for a link among our names that could lead to someone's files.

        `indices` and `retrained` may lead to another disk: to an empty folder, which is then marked
        with this run's id, or to a folder marked with it.
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
                    f"{place} is a link to a folder with other files ({os.path.realpath(place)})",
                    "Link it to an empty folder",
                )

    def begin(self, manifest: dict[str, Any], old: Mapping[str, Any] | None) -> None:
        """Writes the manifest before anything else, and this request's own manifest.

        Call with the lock held. A linked folder is marked as this run's.
        """
        manifest = {**manifest, "seal": seal({**manifest, "seal": ""})}
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
        """Holds the folder's lock, which is released when the process ends in any way.

        If the file system has no locks, `say` receives a warning and the run continues without.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            new = not os.path.lexists(self.path / ".lock")
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
                        "make sure that no second run writes there"
                    )
            # An empty file that was there may be another program's: it is locked, not written.
            if new or handle.seek(0, os.SEEK_END):
                with contextlib.suppress(OSError):  # on a full disk the lock works without a name
                    handle.seek(0)
                    handle.truncate()
                    os.write(handle.fileno(), f"process {os.getpid()} since {now()}".encode())
            yield

    def tidy(self) -> None:
        """Removes unfinished files of a killed run. Call with the lock held.

        Only files with names that tdabench alone gives are removed.
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
        """Removes the folders of ended workers, and `work` if it is then empty."""
        for leftover in _children(self.work):
            if _WORKER.fullmatch(leftover.name):
                remove(leftover)
        with contextlib.suppress(OSError):
            self.work.rmdir()

    def new_log(self, name: str) -> Path:
        """Makes an empty file logs/<name>.log, replacing an earlier one. Raises TdabenchError."""
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
        """Makes a folder for an index to build, until `keep_index` or `remove`."""
        return new_index(self.indices, key)

    def keep_index(self, unfinished: Path, key: str, built: Mapping[str, Any]) -> None:
        """Makes `unfinished`/index the kept index of `key`; see `keep_index`."""
        keep_index(unfinished, self.indices, key, built)

    def kept_index(self, key: str) -> dict[str, Any] | None:
        """Returns the description given to `keep_index`, if the index of `key` is unchanged."""
        return kept_index(self.indices, key)

    def drop_index(self, key: str) -> None:
        """Removes the kept index of `key`, if there is one."""
        if re.fullmatch(_KEY, key):
            remove(self.indices / key)


def _children(folder: Path) -> list[Path]:
    """Lists the contents of a folder; empty if it is missing."""
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
    """Tells whether `path` is absent or a lock file left by `locked`."""
    if not os.path.lexists(path):
        return True
    try:
        with open_own(path, "rb") as f:
            text = f.read(200)
    except (OSError, DataError):
        return False
    return not text or re.fullmatch(rb"process [0-9]+ since [0-9TZ:-]+", text) is not None


def _substance(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in manifest.items() if k not in ("hardware", "created", "seal")}


# --------------------------------------------------------------------------- kept indices


def new_index(indices: Path, key: str) -> Path:
    """Makes a new folder in `indices` to build an index of `key` in its subfolder `index`."""
    try:
        indices.mkdir(parents=True, exist_ok=True)
        name = tempfile.mkdtemp(dir=indices, prefix=f".{key}-")
        (Path(name) / "index").mkdir()
    except OSError as e:
        raise cannot_write(indices, e) from e
    return Path(name)


def keep_index(unfinished: Path, indices: Path, key: str, built: Mapping[str, Any]) -> None:
    """Moves `unfinished` to `indices`/`key`, with the hash of each of its files in built.json.

    `built` (its cost and inputs) and the hashes are sealed: see `io.seal`.
    """
    about = {**built, "key": key, "files": _hashes(unfinished / "index")}
    write_json(unfinished / "built.json", {**about, "seal": seal(about)})
    os.chmod(unfinished, 0o755)
    remove(indices / key)
    os.replace(unfinished, indices / key)
    sync_folder(indices)


def kept_index(indices: Path, key: str) -> dict[str, Any] | None:
    """Returns the description given to `keep_index`, or None if the index is not usable.

    An index is unusable if it is absent, altered or sealed elsewhere. Every byte is read, since
    scores of an altered index would look like measured ones. An index from another machine has
    another seal and is built again.
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
    """Returns size and sha256 of every file below `folder`, by relative path.

    With `expected`, a file of another size is not read. Raises DataError for a link, whose contents
    are elsewhere.
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
    """Converts `text` to a file name: no path, limited length, unique even if case is ignored."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "._+=-") else "_" for c in text)
    same = safe == text.lower() and len(safe) <= 120 and not safe.startswith(".")
    return safe if same else f"{safe[:100].lstrip('.')}-{fingerprint(text)[:8]}"


def tail(path: Path, lines: int = 20, width: int = 500) -> list[str]:
    """Returns the last lines of a log file, without control characters."""
    try:
        with open_own(path, "rb") as f:
            f.seek(0, os.SEEK_END)
            f.seek(max(0, f.tell() - 64_000))
            text = f.read().decode("utf-8", "replace")
    except (OSError, DataError):  # an unconfined method may put anything there
        return []
    kept = ["".join(c for c in line if c.isprintable() or c == "\t") for line in text.splitlines()]
    return [line[:width] for line in kept if line.strip()][-lines:]
