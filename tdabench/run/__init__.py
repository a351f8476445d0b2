"""Running a suite: request -> plan -> cells -> records.

from tdabench.run import Request, run
result = run(Request(methods=("tfidf", "trak")), Path("runs/mine"))
"""

from __future__ import annotations

import dataclasses
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdabench.errors import UsageError
from tdabench.registry import configuration
from tdabench.run import environment
from tdabench.run.execute import Executor, Interrupted, Options, Watcher, is_done
from tdabench.run.folder import RunFolder
from tdabench.run.log import check_log
from tdabench.run.plan import Cell, Plan, Request, make_plan
from tdabench.run.progress import Silent
from tdabench.run.record import SCHEMA, Record, now

__all__ = [
    "Cell",
    "Interrupted",
    "Options",
    "Plan",
    "Request",
    "RunFolder",
    "RunResult",
    "is_done",
    "make_plan",
    "run",
]


@dataclass(frozen=True)
class RunResult:
    """Records of a run in the order of its cells, and whether Ctrl-C interrupted it."""

    folder: Path
    plan: Plan
    records: list[Record]
    interrupted: bool = False

    @property
    def failed(self) -> list[Record]:
        """Records that are neither ok nor skipped."""
        return [r for r in self.records if r["status"] not in ("ok", "skipped")]

    @property
    def not_started(self) -> list[Cell]:
        """Cells of the plan that an interrupted run did not reach."""
        known = {r["key"] for r in self.records}
        return [c for c in self.plan.cells if c.key not in known]


def run(
    request: Request,
    out: Path | None = None,
    options: Options | None = None,
    watcher: Watcher | None = None,
    plan: Plan | None = None,
) -> RunResult:
    """Measures every cell of a request that is not on disk yet; returns all their records.

    Results go to `out`, by default runs/<suite>. Raises UsageError, DataError or GuardError
    before any work if the request is invalid.
    """
    options, watcher = options or Options(), watcher or Silent()
    plan = plan or make_plan(request)
    if not plan.cells:
        raise UsageError("nothing to run: no methods or no benchmarks selected")
    folder = RunFolder(out or Path("runs") / plan.suite.name)
    if options.log_file is not None:
        check_log(options.log_file)
    old = folder.claim(plan.suite.name, plan.suite.version)
    with folder.locked(watcher.say):
        folder.begin(make_manifest(plan, folder, options, old), old)
        for label, first in plan.twins.items():
            watcher.say(f"{label} has the same parameters as {first} and is measured once")
        executor = Executor(plan, folder, options, watcher)
        interrupted = False
        try:
            executor.run()
        except Interrupted:
            interrupted = True
    records = [executor.records[c.key] for c in plan.cells if c.key in executor.records]
    return RunResult(folder.path, plan, records, interrupted)


def make_manifest(
    plan: Plan, folder: RunFolder, options: Options, old: dict[str, Any] | None
) -> dict[str, Any]:
    """Makes the folder's manifest: this run's request merged with those of earlier runs."""
    old = old or {}

    def joined(key: str, values: list[Any]) -> list[Any]:
        return list(dict.fromkeys([*old.get(key, []), *values]))

    return {
        "schema": SCHEMA,
        "id": old.get("id") or uuid.uuid4().hex,
        "run": folder.path.resolve().name,
        "suite": {
            "name": plan.suite.name,
            "version": plan.suite.version,
            "fingerprint": plan.suite.fingerprint,
        },
        "command": list(options.command),
        "request": plan.request.as_dict(),
        "plugins": configuration(),
        "created": old.get("created", now()),
        "tdabench": environment.versions().get("tdabench", ""),
        "git": environment.git_commit(),
        "python": _python(),
        "packages": environment.versions(),
        "hardware": environment.hardware(),
        "targets": {
            **old.get("targets", {}),
            **{
                t.label: {
                    **t.target.describe(),
                    "fingerprint": plan.fingerprints[t.label],
                }
                for t in plan.targets
            },
        },
        "published": [dataclasses.asdict(row) for row in plan.suite.published],
        "methods": joined("methods", [c.method.label for c in plan.cells]),
        "benchmarks": joined("benchmarks", [c.benchmark.name for c in plan.cells]),
        "seeds": joined("seeds", [c.seed for c in plan.cells]),
    }


def _python() -> str:
    import platform

    return platform.python_version()
