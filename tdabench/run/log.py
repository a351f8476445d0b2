"""The log of a run: one line of JSON an event, for people with `jq` and for other programs."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tdabench.errors import UsageError


class EventLog:
    """Appends events to every one of `paths`: the run folder's own log, and `--log-file`.

    A line has `time` (UTC, milliseconds), `seconds` since the run began (of a clock that never
    jumps), `event`, and what belongs to it; see docs/records.md. A log that can no longer be
    written is given up: `complaint` says why, and the run goes on.
    """

    def __init__(self, *paths: Path) -> None:
        self.paths = list(paths)
        self.start = time.monotonic()
        self.complaint = ""

    def write(self, event: str, **details: Any) -> None:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "seconds": round(time.monotonic() - self.start, 3),
            "event": event,
            **details,
        }
        for path in list(self.paths):
            try:
                append_line(path, line)
            except OSError as e:
                self.paths.remove(path)
                self.complaint = f"cannot write the log {path}: {e.strerror}; going on without it"


def check_log(path: Path) -> None:
    """Raises UsageError when a log cannot be written to `path`."""
    try:
        with open(path, "ab"):
            pass
    except OSError as e:
        raise UsageError(
            f"cannot write the log {path}: {e.strerror}", "Choose another --log-file"
        ) from e


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Adds one line of JSON to a file, in one write: lines of two processes never mix."""
    text = json.dumps(value, ensure_ascii=False, default=str) + "\n"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(fd, text.encode("utf-8", "backslashreplace"))
    finally:
        os.close(fd)
