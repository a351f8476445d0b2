"""Observes which files code writes and what it connects to, from Python's audit events."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# (event, argument positions of path and of its folder descriptor)
_CHANGES = {
    "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),),
    "os.remove": ((0, 1),),
    "os.truncate": ((0, None),),
    "os.symlink": ((1, 2),),
    "os.link": ((1, 3),),
    "os.rename": ((0, 2), (1, 3)),
}
_log: list[tuple[str, str]] | None = None
_hooked = False


@contextmanager
def file_events() -> Iterator[list[tuple[str, str]]]:
    """Collects (kind, path or address), where kind is "read", "write" or "connect".

    The source is Python's audit events, so files opened by native libraries are not seen.
    Bytecode caches are excluded.
    """
    global _log, _hooked
    if not _hooked:
        sys.addaudithook(_hook)  # cannot be removed again; it does nothing outside this block
        _hooked = True
    log: list[tuple[str, str]] = []
    outer, _log = _log, log
    try:
        yield log
    finally:
        _log = outer


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _log is None:
        return
    if event == "open":
        path, mode, flags = args
        writes = bool((flags or 0) & _WRITING) or bool(set(mode or "") & set("wax+"))
        _note("write" if writes else "read", path, None)
    elif event in _CHANGES:
        for place, at in _CHANGES[event]:
            _note("write", args[place], args[at] if at is not None and at < len(args) else None)
    elif event == "socket.connect" and isinstance(args[1], tuple):
        _log.append(("connect", f"{args[1][0]}:{args[1][1]}"))


def _note(what: str, path: Any, folder: Any) -> None:
    assert _log is not None
    if isinstance(path, int) or path is None:
        return
    text = os.fsdecode(path)
    if isinstance(folder, int) and folder >= 0 and not os.path.isabs(text):
        try:
            text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
        except OSError:
            return
    text = os.path.abspath(text)
    if "__pycache__" not in text and not text.startswith(("/dev/", "/proc/", "/sys/")):
        _log.append((what, text))


def outside(log: list[tuple[str, str]], *folders: Path) -> list[str]:
    """Returns paths written outside `folders`, and addresses connected to, each once."""
    roots = [os.path.realpath(f) for f in folders]
    found = []
    for what, where in log:
        real = os.path.realpath(where)
        held = any(real == r or real.startswith(r + os.sep) for r in roots)
        if what == "connect" or (what == "write" and not held):
            found.append(where)
    return list(dict.fromkeys(found))


def strays(log: list[tuple[str, str]], *folders: Path) -> list[str]:
    """Returns paths written outside `folders` and outside the caches of libraries."""
    home = Path(os.path.expanduser("~"))
    caches = [os.environ.get(v) for v in ("XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME")]
    kept = [home / ".cache", home / ".triton", *(Path(c) for c in caches if c)]
    return outside([event for event in log if event[0] == "write"], *folders, *kept)
