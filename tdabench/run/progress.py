"""Progress on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from tdabench.errors import notice, one_line, relative, wrapped
from tdabench.run.record import Record


def describe(record: Record) -> str:
    """Describes a cell's result, or the reason for its absence, in one line."""
    title = f"{record['method']['label']} · {record['target']['label']}"
    title += f" · {record['benchmark']['name']}"
    if record["seed"]:
        title += f" · seed {record['seed']}"
    if record["status"] != "ok":
        return one_line(f"{title}: {record['status']}: {record['reason']}")
    metric = record["metrics"].get(record["primary"], {})
    value = metric.get("value")
    shown = "no value" if value is None else f"{value:.3f}"
    if value is not None and metric.get("low") is not None and metric.get("high") is not None:
        shown += f" [{metric['low']:.3f}, {metric['high']:.3f}]"
    build = record["cost"].get("build", {}).get("seconds", 0.0)
    query = record["cost"].get("query", {})
    scored = query.get("queries", 0)
    each = f", {_short(query.get('seconds', 0.0) / scored)} per query" if scored else ""
    return one_line(f"{title}: {record['primary']} {shown} (build {_short(build)}{each})")


def _short(seconds: float) -> str:
    """Formats a time as the board does: `0.85 ms`, `3.1 s`."""
    value, unit = (seconds, "s") if seconds >= 1 else (1e3 * seconds, "ms")
    return f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:.2g} {unit}"


class Silent:
    """Prints only warnings."""

    def begin(self, total: int, cached: int) -> None:
        pass

    def coming(self, message: str) -> None:
        pass

    def job(self, title: str, phase: str, done: int, total: int) -> None:
        pass

    def finished(self, record: Record, cached: bool) -> None:
        pass

    def say(self, message: str) -> None:
        notice(message)

    def close(self) -> None:
        pass


class Lines(Silent):
    """Prints one line per finished cell, for logs and pipes."""

    def __init__(self) -> None:
        self.total, self.count, self.start = 0, 0, time.monotonic()

    def begin(self, total: int, cached: int) -> None:
        self.total, self.count = total, cached
        if cached:
            notice(f"{cached} of {total} cells are on disk", "")

    def coming(self, message: str) -> None:
        self.say(message)

    def finished(self, record: Record, cached: bool) -> None:
        if cached:
            return
        self.count += 1
        notice(describe(record), f"[{self.count}/{self.total}] ")


class Bars(Silent):
    """A bar over all cells and a line for each running job; finished cells scroll above."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        self.console = Console(stderr=True, highlight=False)
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
        self.all: Any = None
        self.tasks: dict[str, Any] = {}

    def begin(self, total: int, cached: int) -> None:
        if cached == total:
            return
        self.all = self.bars.add_task("cells", total=total, completed=cached)
        self.bars.start()

    def coming(self, message: str) -> None:
        self.say(message)

    def job(self, title: str, phase: str, done: int, total: int) -> None:
        if title not in self.tasks:
            self.tasks[title] = self.bars.add_task(title, total=None)
        self.bars.update(
            self.tasks[title],
            description=one_line(f"{title}: {phase}"),
            completed=done,
            total=total or None,
        )

    def finished(self, record: Record, cached: bool) -> None:
        if cached or self.all is None:
            return
        self.bars.advance(self.all)
        style = {"ok": "green", "skipped": "yellow"}.get(record["status"], "red")
        mark = {"ok": "✓", "skipped": "–"}.get(record["status"], "✗")
        from rich.text import Text

        line = Text(f"{mark} ", style)
        line.append(wrapped(describe(record), self.console.width - 2), "default")
        self.console.print(line, soft_wrap=True)
        for title in [t for t in self.tasks if t.startswith(record["method"]["label"] + " on ")]:
            self.bars.remove_task(self.tasks.pop(title))

    def say(self, message: str) -> None:
        self._print(f"tdabench: {relative(one_line(message))}")

    def _print(self, text: str) -> None:
        self.console.print(wrapped(text, self.console.width), markup=False, soft_wrap=True)

    def close(self) -> None:
        self.bars.stop()


def watcher(quiet: bool = False) -> Silent:
    """Returns the watcher that suits stderr."""
    if quiet:
        return Silent()
    return Bars() if sys.stderr.isatty() else Lines()
