"""Converts Parquet files and saved datasets to lines of JSON, in a process with limits.

A Parquet file of 2 kB can expand to gigabytes. The expanded size is counted while it is written
(see `Limits`), and its reader runs in its own process (`tdabench.limited`).
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdabench.errors import DataError, MissingExtra, UsageError

READER_MEMORY = 4 << 30  # bytes
_ROWS = 64  # read at a time: a row may be as large as the limit allows
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _size(name: str, default: int) -> int:
    """Reads a size in bytes from the environment, such as TDABENCH_MAX_ROW=256M."""
    text = os.environ.get(name, "").strip().upper().rstrip("IB")
    if not text:
        return default
    unit = _UNITS.get(text[-1], 0)
    try:
        value = int(float(text[:-1] if unit else text) * (unit or 1))
        if value <= 0:
            raise ValueError
    except (ValueError, OverflowError):
        raise UsageError(f"{name}={text!r} is not a size such as 256M") from None
    return value


@dataclass
class Limits:
    """Limits on a corpus file: bytes of a field, of a row, and of the file when unpacked.

    Adjusted by TDABENCH_MAX_FIELD (64M), TDABENCH_MAX_ROW (64M) and TDABENCH_MAX_FILE (64G, of
    compressed formats). A compressed file that expands beyond 256 MiB may expand 200-fold at most,
    unless TDABENCH_MAX_FILE is set.
    """

    field: int = dataclasses.field(default_factory=lambda: _size("TDABENCH_MAX_FIELD", 64 << 20))
    row: int = dataclasses.field(default_factory=lambda: _size("TDABENCH_MAX_ROW", 64 << 20))
    file: int = dataclasses.field(default_factory=lambda: _size("TDABENCH_MAX_FILE", 64 << 30))

    def unpacked(self, path: Path, packed: int, so_far: int) -> None:
        """Raises DataError if a file of `packed` bytes has expanded too far."""
        most = self.file
        if not os.environ.get("TDABENCH_MAX_FILE"):
            most = min(most, max(256 << 20, 200 * packed))
        if so_far > most:
            raise DataError(
                f"{path} expands to more than {most >> 20:,} MiB from {packed:,} bytes",
                "If this is correct, set TDABENCH_MAX_FILE (such as 64G)",
            )

    def check_row(self, place: str, row: dict[str, Any]) -> int:
        """Returns the size of a row in bytes. Raises DataError naming a row that is too large."""
        total = 0
        for name, value in row.items():
            size = _bytes(value)
            if size > self.field:
                raise DataError(
                    f"{place}: the field {name[:60]!r} is larger than {self.field >> 20} MiB",
                    "Set TDABENCH_MAX_FIELD (such as 256M) if this is correct",
                )
            total += size + len(name)
        if total > self.row:
            raise DataError(
                f"{place}: larger than {self.row >> 20} MiB",
                "Set TDABENCH_MAX_ROW (such as 256M) if this is correct",
            )
        return total


def _bytes(value: Any) -> int:
    """Estimates the size of a value in bytes, to a limited depth."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, dict):
        return sum(_bytes(v) + len(str(k)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    return 8


def to_lines(path: str, out: str, split: str | None) -> int:
    """Writes the rows of a Parquet file or a saved dataset to `out`, one JSON object per line."""
    limits, source = Limits(), Path(path)
    files = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
    packed = sum(p.stat().st_size for p in files)
    rows = _parquet(source) if source.is_file() else _dataset(source, split)
    n = written = 0
    with open(out, "w", encoding="utf-8", errors="surrogatepass") as f:
        for row in rows:
            n += 1
            limits.check_row(f"{source}, row {n}", row)
            # Values that JSON cannot represent (bytes, dates) become null.
            line = json.dumps(row, ensure_ascii=False, default=lambda value: None) + "\n"
            written += len(line)
            limits.unpacked(source, packed, written)
            f.write(line)
        f.flush()
        os.fsync(f.fileno())
    return n


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.lib
        import pyarrow.parquet
    except ImportError as e:
        raise MissingExtra("pyarrow, which reads Parquet,", "parquet") from e
    try:
        # Dictionaries stay dictionaries: one long value in many rows is held once.
        with pyarrow.parquet.ParquetFile(path) as plain:
            names = plain.schema_arrow.names
        check_names(str(path), names)
        with pyarrow.parquet.ParquetFile(path, read_dictionary=names) as file:
            for batch in file.iter_batches(_ROWS):
                for i in range(batch.num_rows):
                    yield {name: batch.column(c)[i].as_py() for c, name in enumerate(names)}
    except pyarrow.lib.ArrowException as e:
        reason = (str(e).splitlines() or [""])[0]
        raise DataError(f"{path} is damaged or not Parquet: {reason}", "Fetch it again") from e


def check_names(place: str, names: list[str]) -> None:
    """Raises DataError if two columns have the same name, of which reading would keep one."""
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise DataError(f"{place}: two columns are named {twice[0]!r}", "Rename one of them")


def _dataset(path: Path, split: str | None) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as e:
        raise MissingExtra("datasets, which reads this folder,", "datasets") from e
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as e:
        raise DataError(f"{path} is not a readable dataset: {e}", "Save it again") from e
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(
                f"{path} has the splits {', '.join(found)}, and {split!r} is not among them",
                "Name one: PATH#SPLIT on the command line, train = … in a suite",
            )
        found = found[split]
    for row in found:
        yield {"split": split, **row} if split else dict(row)
