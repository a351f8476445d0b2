"""Corpora from files: JSON lines, CSV, Parquet and Hugging Face datasets.

A small file is held in memory. A large one stays on disk: `FileCorpus` stores where each line
begins and reads examples on demand, so that a corpus may exceed memory.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, overload

import numpy as np

from tdabench.data.examples import Corpus, Example, content_line
from tdabench.data.layouts import BadRow, Layout, Reading
from tdabench.data.packed import READER_MEMORY, Limits
from tdabench.errors import DataError, MissingExtra
from tdabench.io import (
    cache_folder,
    cannot_write,
    fingerprint,
    open_input,
    read_json,
    write_json,
    write_text,
)
from tdabench.limited import limited

JSON_LINES = (".jsonl", ".ndjson", ".jl", ".json")
TABLES = (".csv", ".tsv")
STREAM_BYTES = 128 << 20  # larger files are streamed
PACKED_BYTES = 32 << 20  # the same for compressed formats


def read_corpus(
    path: Path,
    reading: Reading | None = None,
    name: str = "",
    *,
    prefix: str = "",
    stream: bool | None = None,
) -> Corpus:
    """Reads the examples in a file, a folder of files or a folder of a Hugging Face dataset.

    Formats by suffix: .jsonl (.json, .ndjson), .csv, .tsv, each also with .gz, and .parquet. A row
    without an id gets `prefix` (the file's name) and its number. `stream` says whether the corpus
    stays on disk; by default large files do. Raises DataError naming the line or row of malformed
    data.
    """
    path, reading = Path(path), reading or Reading()
    prefix = prefix or path.name.partition(".")[0] or "row"
    name = name or reading.split or prefix
    if not path.exists():
        raise DataError(f"{path} is missing", "Check the path")
    if not path.is_file() and not path.is_dir():
        raise DataError(f"{path} is neither a file nor a folder", "Give a file of examples")
    if stream is None:
        stream = _size(path) > (STREAM_BYTES if _is_plain(path) else PACKED_BYTES)
    if stream:
        return FileCorpus.of(path, reading, name, prefix)
    examples, held = [], 0
    for example in read_examples(path, reading, prefix):
        examples.append(example)
        held += len(example.prompt) + len(example.response)
        if held > STREAM_BYTES and not _is_plain(path):  # it was larger than it looked
            del examples
            return FileCorpus.of(path, reading, name, prefix)
    _check_some(path, reading, len(examples))
    try:
        return Corpus(examples, name)
    except DataError as e:
        raise DataError(f"{path}: {e.message}", e.remedy) from e


def read_jsonl(path: Path, split: str | None = None, name: str = "") -> Corpus:
    """Reads `{"id", "prompt", "response", "task", …}` lines, plain or gzipped.

    With `split`, keeps the lines whose field `split` equals it. Further string fields go to
    `Example.meta`; other layouts are recognised. Raises DataError naming the malformed line.
    """
    return read_corpus(Path(path), Reading(split=split), name, stream=False)


def write_jsonl(path: Path, examples: Iterable[Example]) -> None:
    """Writes examples as lines that `read_jsonl` reads."""
    fields = ("id", "prompt", "response", "task")
    rows = [{**e.meta, **{k: getattr(e, k) for k in fields}} for e in examples]
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def write_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Writes rows as JSON lines."""
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def read_examples(path: Path, reading: Reading, prefix: str) -> Iterator[Example]:
    """Yields the examples of `read_corpus`, one at a time."""
    layout: Layout | None = None
    for n, (place, row) in enumerate(read_rows(path, reading.split), start=1):
        try:
            if n == 1:
                layout = reading.layout_of(row)
            example = reading.example(row, layout, f"{prefix}-{n}")
        except BadRow as e:
            raise DataError(f"{place}: {e.message}", e.remedy) from e
        if example is not None:
            yield example


def _check_some(path: Path, reading: Reading, n: int) -> None:
    if not n:
        parts = [f"of the split {reading.split!r}"] if reading.split is not None else []
        parts += [f"of the tasks {', '.join(reading.tasks)}"] if reading.tasks else []
        what = f"no example {' and '.join(parts)}" if parts else "no examples"
        raise DataError(f"{path} holds {what}", "An empty corpus cannot be attributed to")


# --------------------------------------------------------------------------- rows of a file


def read_rows(path: Path, split: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("file, line n", row) of every row. `split` selects within a DatasetDict."""
    path = Path(path)
    try:
        if path.is_dir():
            yield from _folder_rows(path, split)
            return
        bare = path.with_suffix("") if path.suffix == ".gz" else path
        if bare.suffix == ".parquet":
            yield from _packed_rows(path, None)
        elif bare.suffix in TABLES:
            yield from _table_rows(path, "\t" if bare.suffix == ".tsv" else "")
        elif bare.suffix in JSON_LINES and _is_list(path):
            yield from _list_rows(path)
        elif bare.suffix in JSON_LINES:
            for n, _, raw in _lines(path):
                yield f"{path}, line {n}", _row(path, n, raw)
        else:
            raise DataError(
                f"{path}: files ending in {path.suffix or 'nothing'!r} are not supported",
                "Give .jsonl, .csv, .tsv (each also .gz), .parquet or a dataset's folder",
            )
    except FileNotFoundError as e:
        raise DataError(f"{path} is missing") from e
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path} cannot be read to its end: {e}", "It may be truncated") from e


def _open(path: Path) -> Any:
    file = open_input(path)
    return gzip.open(file, "rb") if path.suffix == ".gz" else file


def _all_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yields (number, offset, line) of every line.

    Raises DataError for a line beyond the limit of a row, and for a compressed file that expands
    too far.
    """
    n = offset = 0
    limits, packed = Limits(), path.stat().st_size if path.suffix == ".gz" else 0
    with _open(path) as f:
        while raw := f.readline(limits.row + 1):
            n += 1
            if len(raw) > limits.row:
                raise DataError(
                    f"{path}, line {n}: longer than {limits.row >> 20} MiB",
                    "Set TDABENCH_MAX_ROW (such as 256M) if it should be",
                )
            yield n, offset, raw
            offset += len(raw)
            if packed:
                limits.unpacked(path, packed, offset)


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yields the same for every line that is not blank."""
    return (line for line in _all_lines(path) if line[2].strip())


def _object(place: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object. Raises DataError for a repeated key, of which the last would count."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
        raise DataError(f"{place}: the key {twice!r} is repeated", "Rename or remove one of them")
    return found


def _row(path: Path, n: int, raw: bytes) -> dict[str, Any]:
    try:
        text = raw.decode("utf-8-sig" if n == 1 else "utf-8")
        row = json.loads(text, object_pairs_hook=partial(_object, f"{path}, line {n}"))
    except UnicodeDecodeError as e:
        raise DataError(f"{path}, line {n}: not UTF-8 (byte {e.start})", "Re-encode it") from e
    except (ValueError, RecursionError) as e:  # a number of 5,000 digits is a ValueError too
        whole = n == 1 and raw.lstrip()[:1] == b"{" and path.suffix == ".json"
        where = f"{e.msg}, column {e.pos + 1}" if isinstance(e, json.JSONDecodeError) else str(e)
        raise DataError(
            f"{path}, line {n}: not valid JSON ({where})",
            "Give one object per line, or one list of objects: jq -c makes lines"
            if whole
            else "Fix or remove the line",
        ) from e
    if not isinstance(row, dict):
        raise DataError(
            f"{path}, line {n}: expected an object, found {type(row).__name__}",
            "Give one object per line" if isinstance(row, list) else "",
        )
    return row


def _is_list(path: Path) -> bool:
    """Tells whether a file is one JSON list of objects, rather than lines of objects."""
    with _open(path) as f:
        start = f.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()
    return start[:1] == b"[" and start[1:].lstrip()[:1] in (b"{", b"]", b"")


def _list_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of a file that is one JSON list, read one at a time."""
    limits, packed = Limits(), path.stat().st_size if path.suffix == ".gz" else 0
    decoder = json.JSONDecoder(object_pairs_hook=partial(_object, str(path)))
    text, ended, n, read = "", False, 0, 0
    with _open(path) as f, io.TextIOWrapper(f, encoding="utf-8-sig") as chars:

        def more() -> None:
            nonlocal text, ended, read
            try:
                # As much again as is left over: a long object is not scanned too often.
                part = chars.read(max(1 << 20, len(text)))
            except UnicodeDecodeError as e:
                raise DataError(f"{path}: not UTF-8", "Re-encode it") from e
            text, ended, read = text + part, not part, read + len(part)
            if packed:
                limits.unpacked(path, packed, read)

        more()
        text, due = text.lstrip()[1:], False  # whether a comma or the end is due
        while True:
            text = text.lstrip()
            if not text and not ended:
                more()
                continue
            if text[:1] == "]":
                return
            place = f"{path}, item {n + 1}"
            if due and text:
                if text[0] != ",":
                    raise DataError(f"{place}: not valid JSON (no comma before it)")
                text, due = text[1:], False
                continue
            try:
                row, end = decoder.raw_decode(text)
            except (ValueError, RecursionError) as e:
                if not ended and isinstance(e, json.JSONDecodeError):
                    if len(text) > limits.row:
                        raise DataError(
                            f"{place}: not valid JSON, or longer than {limits.row >> 20} MiB",
                            "Fix it, or set TDABENCH_MAX_ROW (such as 256M)",
                        ) from e
                    more()
                    continue
                what = e.msg if isinstance(e, json.JSONDecodeError) else str(e)
                raise DataError(f"{place}: not valid JSON ({what})", "Fix or remove it") from e
            if not isinstance(row, dict):
                raise DataError(f"{place}: expected an object, found {type(row).__name__}")
            n, due = n + 1, True
            text = text[end:]
            yield place, row


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the rows of a table; without a `delimiter` the header decides on one.

    Lines may end as on any system, also in CR alone.
    """
    limits = Limits()

    def text() -> Iterator[str]:
        for n, _, raw in _all_lines(path):
            try:
                line = raw.decode("utf-8-sig" if n == 1 else "utf-8")
            except UnicodeDecodeError as e:
                raise DataError(
                    f"{path}, line {n}: not UTF-8 (byte {e.start})", "Re-encode it"
                ) from e
            yield from _CR.split(line) if "\r" in line else (line,)

    rows = text()
    header = next(rows, "")
    if not delimiter:
        bare = re.sub(r'"[^"]*"', "", header)  # a quoted name may hold either
        delimiter = max(",;\t", key=bare.count)
    csv.field_size_limit(limits.field)  # the default refuses documents
    reader = csv.DictReader(itertools.chain([header], rows), delimiter=delimiter, strict=True)
    try:
        for name, n in Counter(reader.fieldnames or ()).items():
            if n > 1:
                raise DataError(
                    f"{path}, line 1: {n} columns are named {name!r}",
                    "Rename or remove all but one",
                )
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row:
                raise DataError(f"{place}: more fields than the header names")
            if None in row.values():
                raise DataError(f"{place}: fewer fields than the header names")
            limits.check_row(place, row)
            yield place, row
    except csv.Error as e:
        remedy = (
            "Set TDABENCH_MAX_FIELD (such as 256M) if it should be" if "limit" in str(e) else ""
        )
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({e})", remedy) from e


_CR = re.compile(r"(?<=\r)(?!\n)(?!$)")


def _packed_rows(path: Path, split: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads the rows of a Parquet file or a saved dataset, by way of lines in the cache."""
    if find_spec(needs := "pyarrow" if path.is_file() else "datasets") is None:
        raise MissingExtra(
            f"{needs}, which reads {'Parquet' if path.is_file() else 'this folder'},",
            "parquet" if path.is_file() else "datasets",
        )
    stamp = [str(path.resolve()), _stamp(path), split, 1]
    lines = cache_folder() / "rows" / f"{fingerprint(stamp)}.jsonl"
    if not lines.exists():
        try:
            lines.parent.mkdir(parents=True, exist_ok=True)
            fd, temporary = tempfile.mkstemp(dir=lines.parent, prefix=".", suffix=".tmp")
        except OSError as e:
            raise cannot_write(lines, e) from e
        os.close(fd)
        try:
            limited(
                "tdabench.data.packed:to_lines",
                {"path": str(path), "out": temporary, "split": split},
                what=str(path),
                memory=READER_MEMORY,
            )
            os.replace(temporary, lines)
        finally:
            Path(temporary).unlink(missing_ok=True)
    with open_input(lines) as f:
        for n, raw in enumerate(f, start=1):
            yield f"{path}, row {n}", json.loads(raw)


def _folder_rows(path: Path, split: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Reads a dataset saved by `datasets`, or a folder of data files (`split` matches names)."""
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        yield from _packed_rows(path, split)
        return
    suffixes = (*JSON_LINES, *TABLES, ".parquet")
    files = [
        p
        for p in sorted(path.rglob("*"))
        if (p.with_suffix("") if p.suffix == ".gz" else p).suffix in suffixes
        and p.name not in ("dataset_infos.json", "dataset_info.json")
    ]
    named = [p for p in files if split and p.name.startswith(split)]
    if not files:
        raise DataError(f"the folder {path} has no data files", "Give .jsonl, .csv or .parquet")
    for file in named or files:
        for place, row in read_rows(file):
            yield place, ({**row, "split": split} if named else row)


# --------------------------------------------------------------------------- corpora on disk


class FileCorpus(Corpus):
    """A corpus whose examples stay in a file of JSON lines and are read on demand.

    Its memory does not grow with the corpus: line offsets are in a memory-mapped file. Slices and
    subsets are ordinary corpora in memory. Other formats are first converted to lines in the
    cache. Changes to a file in use are detected.
    """

    def __init__(self, meta: dict[str, Any], folder: Path, reading: Reading, name: str) -> None:
        self.name = name
        self.meta, self.folder, self.reading = meta, folder, reading
        self.path = Path(meta["file"])

    @classmethod
    def of(cls, path: Path, reading: Reading, name: str, prefix: str) -> FileCorpus:
        """Reads the file once and checks every row, unless it is in the cache."""
        stamp = [str(path.resolve()), _stamp(path), reading.as_list(), prefix, 1]
        folder = cache_folder() / "corpora" / fingerprint(stamp)
        if (folder / "index.json").exists():
            meta = read_json(folder / "index.json")
            if Path(meta["file"]).exists():
                return cls(meta, folder, reading, name)
        folder.mkdir(parents=True, exist_ok=True)
        if _is_plain(path):
            file, native = path.resolve(), None
        else:
            file = folder / "corpus.jsonl"
            native = _write_lines(read_examples(path, reading, prefix), file)
        offsets, numbers, ids = array("q"), array("q"), array("Q")
        digest, layout = hashlib.sha256(), None
        for n, offset, raw in _lines(file):
            row = _row(file, n, raw)
            try:
                if native is None and not numbers and layout is None:
                    layout = reading.layout_of(row)
                example = (
                    _native(row) if native is not None
                    else reading.example(row, layout, f"{prefix}-{n}")
                )  # fmt: skip
            except BadRow as e:
                raise DataError(f"{path}, line {n}: {e.message}", e.remedy) from e
            if example is None:
                continue
            digest.update(content_line(example))
            offsets.append(offset)
            numbers.append(n)
            ids.append(int.from_bytes(hashlib.blake2b(example.id.encode(), digest_size=8).digest()))
        _check_some(path, reading, len(offsets))
        order = np.sort(np.frombuffer(ids, dtype=np.uint64))
        if (order[1:] == order[:-1]).any():
            raise DataError(f"{path} has two examples with the same id", "Make ids unique")
        np.stack([np.frombuffer(offsets, np.int64), np.frombuffer(numbers, np.int64)], 1).tofile(
            folder / "offsets.bin"
        )
        meta = {
            "file": str(file),
            "native": native is not None,
            "prefix": prefix,
            "n": len(offsets),
            "stamp": _stamp(file),
            "fingerprint": digest.hexdigest()[:16],
        }
        write_json(folder / "index.json", meta)
        return cls(meta, folder, reading, name)

    @cached_property
    def fingerprint(self) -> str:
        return str(self.meta["fingerprint"])

    @cached_property
    def _where(self) -> np.memmap:
        """(offset, line number) of each example: int64 [n, 2]."""
        return np.memmap(self.folder / "offsets.bin", np.int64, "r", shape=(int(self.meta["n"]), 2))

    @cached_property
    def _file(self) -> Any:
        if _stamp(self.path) != self.meta["stamp"]:
            raise DataError(f"{self.path} has changed since it was read", "Start again")
        return open(self.path, "rb")

    @cached_property
    def _layout(self) -> Layout | None:
        for n, _, raw in _lines(self.path):
            return self.reading.layout_of(_row(self.path, n, raw))
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Omits open files: another process opens its own."""
        return {k: self.__dict__[k] for k in ("name", "meta", "folder", "reading", "path")}

    def _read(self, i: int) -> Example:
        offset, n = (int(x) for x in self._where[i])
        self._file.seek(offset)
        row = _row(self.path, n, self._file.readline())
        if self.meta["native"]:
            return _native(row)
        example = self.reading.example(row, self._layout, f"{self.meta['prefix']}-{n}")
        assert example is not None
        return example

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> Corpus: ...
    def __getitem__(self, i: int | slice) -> Example | Corpus:
        if isinstance(i, slice):
            return Corpus((self._read(j) for j in range(*i.indices(len(self)))), self.name)
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self._read(i % len(self))

    def __len__(self) -> int:
        return int(self.meta["n"])

    def __iter__(self) -> Iterator[Example]:
        return (self._read(i) for i in range(len(self)))

    def subset(self, indices: Iterable[int]) -> Corpus:
        return Corpus((self[int(i)] for i in indices), self.name)


def _native(row: dict[str, Any]) -> Example:
    return Example(row["id"], row["prompt"], row["response"], row["task"], row.get("meta", {}))


def _write_lines(examples: Iterable[Example], file: Path) -> int:
    """Writes examples as native lines and returns their number; writes all of them or no file."""
    n = 0
    fd, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
    try:
        with os.fdopen(fd, "w", encoding="utf-8", errors="surrogatepass") as f:
            for e in examples:
                row = {"id": e.id, "prompt": e.prompt, "response": e.response, "task": e.task}
                f.write(json.dumps({**row, "meta": dict(e.meta)}, ensure_ascii=False) + "\n")
                n += 1
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, file)
    except BaseException as e:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise DataError(f"cannot write {file}: {e.strerror}", "Free some space") from e
        raise
    return n


def _is_plain(path: Path) -> bool:
    return path.is_file() and path.suffix in JSON_LINES and not _is_list(path)


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in _files(path))


def _files(path: Path) -> list[Path]:
    """Lists the file, or the files of a folder and its subfolders, one level deep.

    Deeper folders are ignored, so that `/` is not traversed. Raises DataError if they cannot be
    listed.
    """
    if path.is_file():
        return [path]
    try:
        return sorted(p for deep in ("*", "*/*") for p in path.glob(deep) if p.is_file())
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}", "Give a folder of one corpus") from e


def _stamp(path: Path) -> list[Any]:
    """Returns a stamp that changes when the file changes."""
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in _files(path)]
