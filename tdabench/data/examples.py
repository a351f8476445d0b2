"""Examples and corpora: training items, and queries to explain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import overload

from tdabench.errors import DataError


@dataclass(frozen=True, slots=True)
class Example:
    """One training or query item. `meta` holds further fields (such as fact, template)."""

    id: str
    prompt: str
    response: str
    task: str = ""
    meta: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def text(self) -> str:
        """Prompt and response on two lines, as text methods see the whole example."""
        return f"{self.prompt}\n{self.response}"


class Corpus(Sequence[Example]):
    """An ordered set of examples with unique ids; its fingerprint covers order and contents."""

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
        """Returns the examples at `indices`, in that order."""
        return Corpus((self._examples[int(i)] for i in indices), self.name)

    @property
    def ids(self) -> list[str]:
        return [e.id for e in self]

    @property
    def tasks(self) -> list[str]:
        return [e.task for e in self]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over ids, texts and tasks, in order."""
        digest = hashlib.sha256()
        for e in self._examples:
            digest.update(content_line(e))
        return digest.hexdigest()[:16]


def content_line(e: Example) -> bytes:
    """Returns the parts of an example that a fingerprint covers."""
    line = json.dumps([e.id, e.prompt, e.response, e.task], ensure_ascii=False)
    return line.encode("utf-8", "surrogatepass") + b"\n"
