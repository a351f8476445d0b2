"""Records that were found unaltered before, so that a board of many does not check them again.

Kept in the user's cache, which is trusted, for folders of at least `LEAST` records. A record counts
as checked while its file and its arrays have the size, the times and the inode that they had. The
time of the last change of an inode cannot be set by the programs that change a file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tdabench.errors import DataError, TdabenchError
from tdabench.io import cache_folder, canonical, fingerprint, read_json, write_text
from tdabench.run.record import Record

LEAST = 200
LATELY = 120  # seconds, longer than a board takes to read
State = list[int]  # size, times of the last write and change in nanoseconds, inode; of both files


class Checked:
    """The records of a board that were found unaltered, before and now."""

    def __init__(self, records: Iterable[Record]) -> None:
        folders: dict[Path, int] = {}
        for record in records:
            folders[record.path.parent] = folders.get(record.path.parent, 0) + 1
        self._places = {f: _place(f) for f, count in folders.items() if count >= LEAST}
        self._known: dict[Path, dict[str, tuple[State, str]]] = {f: {} for f in self._places}
        self._new: set[Path] = set()
        for folder, place in self._places.items():
            with contextlib.suppress(DataError, AttributeError, TypeError, ValueError):
                self._known[folder] = {
                    str(name): (list(state), str(arrays))
                    for name, (state, arrays) in read_json(place).items()
                }

    def altered(self, record: Record) -> list[str]:
        """Returns `record.altered()`, without a check if there was one of the same files."""
        known = self._known.get(record.path.parent)
        if known is None:
            return record.altered()
        try:
            state = _state(record)
        except OSError:
            return record.altered()
        there = known.get(record.path.name)
        if there is not None and there[0] == state:
            record.know_arrays_hash(there[1])
            return []
        reasons = record.altered()
        # A file that changed lately may have changed after it was read.
        now = datetime.now(UTC).timestamp()
        if not reasons and now - max(state[2], state[6]) / 1e9 > LATELY:
            known[record.path.name] = (state, record.arrays_hash())
            self._new.add(record.path.parent)
        return reasons

    def keep(self) -> None:
        """Writes down what was learned."""
        for folder in self._new:
            with contextlib.suppress(TdabenchError):  # a cache that cannot be written costs time
                write_text(self._places[folder], canonical(self._known[folder]))  # in one line


def _place(folder: Path) -> Path:
    key = fingerprint([version("tdabench"), os.path.realpath(folder)])
    return cache_folder() / "checked" / f"{key}.json"


def _state(record: Record) -> State:
    found: State = []
    for path in (record.path, record.arrays_path):
        about = os.lstat(path)
        found += [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
    return found
