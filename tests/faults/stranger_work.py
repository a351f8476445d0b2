"""What a stranger's file may do to whoever reads it, for test_strangers.py."""

from __future__ import annotations

import ctypes
import os
import time

import numpy as np

from tdabench.errors import MissingExtra, UsageError


def adds(a: int, b: int) -> int:
    return a + b


def sleeps() -> None:
    time.sleep(600)


def hoards() -> None:
    held = []
    while True:
        held.append(np.ones(1 << 22))


def crashes() -> None:
    ctypes.string_at(0)


def quits() -> None:
    os._exit(3)


def panics() -> None:
    class PanicException(BaseException):
        pass

    raise PanicException("index out of bounds")


def refuses(kind: str) -> None:
    if kind == "extra":
        raise MissingExtra("peft", "peft")
    raise UsageError("it does not fit", "Give another")
