"""The protocol of judge and contestant: JSON messages with arrays over a stream socket.

A frame is the length of its head (eight bytes), the head (JSON: the message, and name, type and
shape of every array), and the bytes of the arrays. Nothing is unpickled, and the sizes
in a head are checked before memory is allocated: the other side may be hostile.
"""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.data.examples import Corpus, Example
from tdabench.errors import MethodError

CHANNEL_FD = 3  # descriptor of the contestant's end
MOST_HEAD = 1 << 30  # bytes of JSON: a batch of queries may be long documents
KINDS = "fiub"  # kinds of numpy types that may cross

Arrays = dict[str, np.ndarray]


class Hangup(Exception):
    """Raised when the other side has closed the connection."""


class Channel:
    """One end of the connection. Messages may be sent from several threads."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any], arrays: Mapping[str, np.ndarray] = {}) -> None:
        """Sends one frame. Raises Hangup if the other side is closed."""
        held = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
        about = [[k, a.dtype.str, list(a.shape)] for k, a in held.items()]
        head = json.dumps({"message": message, "arrays": about}, default=str).encode()
        try:
            with self._lock:
                self.end.sendall(len(head).to_bytes(8, "little") + head)
                for a in held.values():
                    if a.size:
                        self.end.sendall(a.reshape(-1).data.cast("B"))
        except OSError as e:
            raise Hangup from e

    def head(self, most: int = MOST_HEAD) -> dict[str, Any]:
        """Reads the head of the next frame: {"message", "arrays"}. Raises Hangup or MethodError."""
        length = int.from_bytes(self._take(bytearray(8)), "little")
        if length > most:
            raise MethodError(f"a message of {length:,} bytes came, more than {most:,}")
        try:
            head = json.loads(bytes(self._take(bytearray(length))))
            if isinstance(head["message"], dict) and isinstance(head["arrays"], list):
                return dict(head)
        except (ValueError, RecursionError, TypeError, KeyError):
            pass
        raise MethodError("a message came that is not of the harness's protocol")

    def arrays(self, head: Mapping[str, Any], most: int) -> Arrays:
        """Reads the arrays that `head` announces, at most `most` bytes together."""
        found: Arrays = {}
        left = most
        for entry in head["arrays"]:
            name, dtype, shape = _described(entry)
            size = math.prod(shape) * dtype.itemsize
            left -= size
            if left < 0:
                raise MethodError(f"an answer came with more than the {most:,} bytes asked for")
            a = np.empty(shape, dtype)
            if a.size:
                self._take(a.reshape(-1).view(np.uint8))
            found[name] = a
        return found

    def receive(self, most: int = 1 << 40) -> tuple[dict[str, Any], Arrays]:
        """Receives the next message and its arrays."""
        head = self.head()
        return head["message"], self.arrays(head, most)

    def _take(self, into: Any) -> Any:
        view = memoryview(into)
        at = 0
        while at < len(view):
            try:
                got = self.end.recv_into(view[at:])
            except OSError as e:
                raise Hangup from e
            if not got:
                raise Hangup
            at += got
        return into

    def close(self) -> None:
        self.end.close()


def _described(entry: Any) -> tuple[str, np.dtype, tuple[int, ...]]:
    """Reads name, type and shape of an array from a head. Raises MethodError if malformed."""
    try:
        name, kind, shape = entry
        dtype = np.dtype(str(kind))
        sizes = tuple(shape)
        fits = dtype.kind in KINDS and dtype.itemsize <= 8 and len(sizes) <= 4
        if fits and all(type(s) is int and 0 <= s < 1 << 48 for s in sizes):
            return str(name), dtype, sizes
    except (TypeError, ValueError):
        pass
    raise MethodError(f"an array came that is not described as one: {str(entry)[:80]}")


def spelled(examples: Iterable[Example], labels: bool) -> list[list[Any]]:
    """Converts examples to JSON: [id, prompt, response], with `labels` also task and fields."""
    if labels:
        return [[e.id, e.prompt, e.response, e.task, dict(e.meta)] for e in examples]
    return [[e.id, e.prompt, e.response] for e in examples]


def read_examples(rows: Sequence[Sequence[Any]]) -> list[Example]:
    """Reads examples in the form of `spelled`."""
    return [Example(*row) for row in rows]


HELD = 128 << 20  # bytes of a corpus's file that are held in memory


def write_corpus(path: Path, corpus: Corpus, labels: bool) -> dict[str, Any]:
    """Writes a corpus for a contestant, one example per line; returns what `read_corpus` reads."""
    with open(path, "x", encoding="ascii") as f:
        for e in corpus:
            f.write(json.dumps(spelled([e], labels)[0]) + "\n")
    about = {"n": len(corpus), "name": corpus.name, "fingerprint": corpus.fingerprint}
    return {"path": str(path), **about}


def read_corpus(given: Mapping[str, Any]) -> Corpus:
    """Reads the corpus that `write_corpus` wrote; a large one stays on disk.

    It keeps the fingerprint of the corpus with its labels.
    """
    path = Path(given["path"])
    if path.stat().st_size > HELD:
        corpus: Corpus = Lines(path, given["name"])
    else:
        with open(path, encoding="ascii") as f:
            corpus = Corpus(read_examples([json.loads(line) for line in f]), given["name"])
    corpus.__dict__["fingerprint"] = given["fingerprint"]
    return corpus


class Lines(Corpus):
    """A corpus whose examples are read from its file when they are asked for."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self._file = open(path, "rb")
        sizes = np.fromiter((len(line) for line in self._file), np.int64)
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return self.subset(range(*i.indices(len(self))))
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        self._file.seek(int(self._starts[i]))
        return Example(*json.loads(self._file.readline()))

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def subset(self, indices: Iterable[int]) -> Corpus:
        return Corpus((self[int(i)] for i in indices), self.name)
