"""The log of a run: one line of JSON per event, for `jq` and other programs."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tdabench.errors import DataError, UsageError
from tdabench.io import append_line, line_of


class EventLog:
    """Appends events to the run folder's `own` log and to each of `paths` (`--log-file`).

    A line has `time` (UTC, milliseconds), `seconds` since the run began (from a monotonic clock),
    `event`, and its data; see docs/records.md. If a log cannot be written any more, it is
    abandoned: `complaint` states why, and the run continues.
    """

    def __init__(self, own: Path, *paths: Path) -> None:
        self.own, self.paths = own, [own, *paths]
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
                if path is self.own:
                    append_line(path, line)
                else:  # the user's own choice, which may be a link or a device
                    with open(path, "ab", buffering=0) as f:
                        f.write(line_of(line))
            except (OSError, DataError) as e:
                self.paths.remove(path)
                why = e.strerror if isinstance(e, OSError) else e.message
                self.complaint = f"cannot write the log {path}: {why}; continuing without it"


def check_log(path: Path) -> None:
    """Raises UsageError if a log cannot be written to `path`."""
    try:
        with open(path, "ab"):
            pass
    except OSError as e:
        raise UsageError(
            f"cannot write the log {path}: {e.strerror}", "Choose another --log-file"
        ) from e
