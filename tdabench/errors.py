"""Errors in a form that the command line prints as one line.

Every error names the thing, the reason and, if there is one, the remedy. This module imports
nothing heavy, because the command line loads it first.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any


class TdabenchError(Exception):
    """A problem with a known cause. `remedy` states what to do about it."""

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}".strip() if self.remedy else self.message


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Marks work that keeps finished parts: on Ctrl-C, says that the same command resumes."""
    try:
        yield
    except KeyboardInterrupt as e:
        e.add_note("The same command resumes from here")
        raise


class UsageError(TdabenchError):
    """The user asked for something that does not exist or does not fit (exit code 2)."""

    exit_code = 2


class MissingAsset(UsageError):
    """A method requested a file or folder that is not provided under the name `asset`."""

    def __init__(self, asset: str, provided: Iterable[str]) -> None:
        there = ", ".join(sorted(provided)) or "none"
        super().__init__(
            f"the suite provides no asset {asset!r}",
            f"It provides: {there}. Name a file or folder under [assets] in the suite, or with own "
            f"data: --asset {asset}=SOURCE",
        )
        self.asset = asset


class DataError(TdabenchError):
    """A file is missing, truncated, corrupt or belongs to something else (exit code 2)."""

    exit_code = 2


class NotApplicable(DataError):
    """A suite lacks what a benchmark needs, such as labels: the cell is skipped, not failed."""


class GuardError(TdabenchError):
    """Continuing would give a flattering number: leaked truth, mixed corpora (exit code 2)."""

    exit_code = 2


class MethodError(TdabenchError):
    """A method returned something that cannot be scored (exit code 1: its cell failed)."""


class MissingExtra(TdabenchError):
    """An optional package is not installed.

    `extra` names the extra of tdabench that installs it; a plugin of another distribution gives
    the `remedy` instead ("Install it with: pip install faiss-cpu"). A method raises it in `build`
    or `load`; its cell becomes a `skipped` row with the reason.
    """

    exit_code = 2

    def __init__(self, what: str, extra: str = "", remedy: str = "") -> None:
        install = f"Install it with: pip install 'tdabench[{extra}]'" if extra else ""
        super().__init__(f"{what} is not installed", remedy or install)
        self.extra = extra


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `Did you mean 'x'?`, or the list of known names if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(word[:100], known, n=2, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    return f"Known: {', '.join(known)}" if known else "None are known"


def unknown(kind: str, word: str, known: Iterable[str], see: str = "") -> UsageError:
    """Returns the error for an unknown name: `unknown method 'traak'. Did you mean 'trak'?`"""
    remedy = did_you_mean(word, known)
    return UsageError(f"unknown {kind} {word!r}", f"{remedy} {see}".strip())


def first_line(error: BaseException, limit: int = 300) -> str:
    """Returns the first line of an error's message, cut at `limit`; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


def brief(error: BaseException, limit: int = 300) -> str:
    """Returns the type of an error and the first line of its message, cut at `limit`."""
    name, line = type(error).__name__, first_line(error, limit)
    return name if line == name else f"{name}: {line}"


# --------------------------------------------------------------------------- safe to show

# Control, format (bidi overrides, zero-width), surrogate, private, unassigned, line separators.
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_MARKS = re.compile(
    r"([\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff]{4})"
    r"[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff]+"
)


def clean(value: Any, limit: int = 2000, keep_newlines: bool = False) -> str:
    r"""Returns `value` as text without control, bidi or zero-width characters, up to `limit`.

    Newlines and tabs become spaces, or stay newlines with `keep_newlines`; every other unsafe
    character becomes its escape (`\x1b`, `\u202e`). More than four stacked accents are cut.
    """
    text = value if isinstance(value, str) else str(value)
    cut = len(text) > limit
    text = text[:limit]
    if text.isascii() and text.isprintable():
        return text + "…" if cut else text
    text = text.replace("\r\n", "\n")
    out = []
    for c in text:
        if c in "\n\t":
            out.append(c if keep_newlines and c == "\n" else " ")
        elif unicodedata.category(c) in _UNSAFE:
            out.append(_escape(c))
        else:
            out.append(c)
    text = _MARKS.sub(r"\1", "".join(out))
    return text + "…" if cut else text


def _escape(c: str) -> str:
    n = ord(c)
    return f"\\x{n:02x}" if n < 0x100 else f"\\u{n:04x}" if n < 0x10000 else f"\\U{n:08x}"


def one_line(message: Any) -> str:
    """Returns a message as one line for a terminal: no escapes, no newlines, limited length."""
    return " ".join(clean(message, keep_newlines=True).split())


# --------------------------------------------------------------------------- on stderr


def notice(message: Any, head: str = "tdabench: ") -> None:
    """Prints a message on stderr: one line in a pipe or file, wrapped to the width of a terminal.

    Lines break between words only. Paths below the current folder are shown relative to it.
    """
    text = head + relative(one_line(message))
    if sys.stderr.isatty():
        text = wrapped(text, shutil.get_terminal_size().columns)
    print(text, file=sys.stderr, flush=True)


def wrapped(text: str, width: int) -> str:
    """Wraps one line between words, with later lines indented; a longer word is not broken."""
    if len(text) < width:
        return text
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    lines = textwrap.wrap(text, max(20, width - 1), subsequent_indent=indent,
                          break_long_words=False, break_on_hyphens=False)  # fmt: skip
    return "\n".join(lines)


def relative(text: str) -> str:
    """Returns `text` with every absolute path below the current folder made relative to it."""
    try:
        here = os.getcwd()
    except OSError:  # it was removed
        return text
    return text if here == "/" else re.sub(rf"(?<![\w./-]){re.escape(here)}/(?=\S)", "", text)
