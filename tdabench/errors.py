"""What can go wrong, in a form that the command line prints as one line.

Every error names the thing, the reason and, where there is one, the remedy. Nothing here
imports anything heavy: the command line loads it first.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TdabenchError(Exception):
    """A problem with a known cause. `remedy` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}".strip() if self.remedy else self.message


class UsageError(TdabenchError):
    """The user asked for something that does not exist or does not fit (exit code 2)."""

    exit_code = 2


class MissingAsset(UsageError):
    """A method asked for a file or folder that nobody provides under the name `asset`."""

    def __init__(self, asset: str, provided: Iterable[str]) -> None:
        there = ", ".join(sorted(provided)) or "none"
        super().__init__(f"the suite provides no asset {asset!r}", f"It provides: {there}")
        self.asset = asset


class DataError(TdabenchError):
    """A file is missing, truncated, corrupt or belongs to something else (exit code 2)."""

    exit_code = 2


class GuardError(TdabenchError):
    """Going on would give a number that flatters: leaked truth, mixed corpora (exit code 2)."""

    exit_code = 2


class MethodError(TdabenchError):
    """A method returned something that cannot be scored (exit code 1: its cell failed)."""


class MissingExtra(TdabenchError):
    """An optional package is not installed; `extra` is the extra that brings it.

    A method raises it from `build` or `load`; its cell becomes a `skipped` row that says why.
    """

    def __init__(self, what: str, extra: str, remedy: str = "") -> None:
        install = remedy or f"Install it with: pip install 'tdabench[{extra}]'"
        super().__init__(f"{what} is not installed", install)
        self.extra = extra


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'?`, or the list of what is known when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    return f"Known: {', '.join(known)}" if known else "None are known"


def unknown(kind: str, word: str, known: Iterable[str], see: str = "") -> UsageError:
    """The error for a name that is not there: `unknown method 'traak'. Did you mean 'trak'?`"""
    remedy = did_you_mean(word, known)
    return UsageError(f"unknown {kind} {word!r}", f"{remedy} {see}".strip())
