"""Examples and corpora: what is attributed to, and what is explained."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import overload

from tdabench.errors import DataError


@dataclass(frozen=True, slots=True)
class Example:
    """One training or query item. `meta` holds what is neither text nor task (fact, template)."""

    id: str
    prompt: str
    response: str
    task: str = ""
    meta: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def text(self) -> str:
        """Prompt and response on two lines: what a text method sees of the whole example."""
        return f"{self.prompt}\n{self.response}"


class Corpus(Sequence[Example]):
    """An ordered set of examples with unique ids; its fingerprint covers order and content."""

    def __init__(self, examples: Iterable[Example], name: str = "corpus") -> None:
        self.name = name
        self._examples = tuple(examples)
        seen: set[str] = set()
        for e in self._examples:
            if e.id in seen:
                raise DataError(f"corpus {name!r} has two examples with the id {e.id!r}")
            seen.add(e.id)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> Corpus: ...
    def __getitem__(self, i: int | slice) -> Example | Corpus:
        if isinstance(i, slice):
            return Corpus(self._examples[i], self.name)
        return self._examples[i]

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    def __repr__(self) -> str:
        return f"Corpus({self.name!r}, {len(self)} examples, {self.fingerprint})"

    def subset(self, indices: Iterable[int]) -> Corpus:
        """The examples at `indices`, in that order."""
        return Corpus((self._examples[int(i)] for i in indices), self.name)

    @property
    def ids(self) -> list[str]:
        return [e.id for e in self._examples]

    @property
    def tasks(self) -> list[str]:
        return [e.task for e in self._examples]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over ids, texts and tasks, in order."""
        digest = hashlib.sha256()
        for e in self._examples:
            line = json.dumps([e.id, e.prompt, e.response, e.task], ensure_ascii=False)
            digest.update(line.encode("utf-8", "surrogatepass"))
            digest.update(b"\n")
        return digest.hexdigest()[:16]


def read_jsonl(path: Path, split: str | None = None, name: str = "") -> Corpus:
    """Reads `{"id", "prompt", "response", "task", …}` lines, plain or gzipped.

    With `split`, keeps the lines whose field `split` equals it. Further string fields go to
    `Example.meta`. Raises DataError naming the line for anything malformed.
    """
    path = Path(path)
    examples = []
    try:
        opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
        with opened as f:
            n = 0
            while raw := f.readline(MAX_LINE + 1):
                n += 1
                if len(raw) > MAX_LINE:
                    raise DataError(f"{path}, line {n}: longer than {MAX_LINE >> 20} MiB")
                if not raw.strip():
                    continue
                row = _row(path, n, raw)
                if split is not None and row.get("split") != split:
                    continue
                examples.append(_example(path, n, row))
    except FileNotFoundError as e:
        raise DataError(f"{path} is missing") from e
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path} cannot be read to its end: {e}", "It may be truncated") from e
    if not examples:
        what = f"no example of the split {split!r}" if split is not None else "no examples"
        raise DataError(f"{path} holds {what}", "An empty corpus cannot be attributed to")
    try:
        return Corpus(examples, name or split or path.stem)
    except DataError as e:
        raise DataError(f"{path}: {e.message}", e.remedy) from e


MAX_LINE = 64 << 20  # bytes: a few kilobytes of gzip can claim to be one line of gigabytes


def _row(path: Path, n: int, raw: bytes) -> dict[str, object]:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise DataError(f"{path}, line {n}: not UTF-8 (byte {e.start})", "Re-encode it") from e
    except (ValueError, RecursionError) as e:  # a number of 5,000 digits is a ValueError too
        raise DataError(f"{path}, line {n}: not valid JSON ({e})") from e
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {n}: expected an object, found {type(row).__name__}")
    return row


def _example(path: Path, n: int, row: dict[str, object]) -> Example:
    for key in ("prompt", "response"):
        if not isinstance(row.get(key), str):
            raise DataError(f"{path}, line {n}: the field {key!r} is missing or not a string")
    if not str(row["response"]).strip():
        raise DataError(f"{path}, line {n}: the response is empty", "Nothing would be trained on")
    id, task = row.get("id", f"{path.stem}-{n}"), row.get("task", "")
    if not isinstance(id, (str, int)) or isinstance(id, bool):
        raise DataError(f"{path}, line {n}: the id is neither a string nor an integer")
    if not isinstance(task, str):
        raise DataError(f"{path}, line {n}: the task is not a string")
    known = {"id", "prompt", "response", "task"}
    kept = {k: v for k, v in row.items() if k not in known and isinstance(v, str)}
    example = Example(str(id), str(row["prompt"]), str(row["response"]), task, kept)
    for text in (example.id, example.prompt, example.response, task, *kept, *kept.values()):
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise DataError(
                f"{path}, line {n}: half of a surrogate pair, which is no text", "Re-encode it"
            )
    return example
