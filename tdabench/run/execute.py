"""Runs a plan: resume, worker processes and their limits, records for workers that die."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tdabench.io import cannot_write, open_own, write_json
from tdabench.registry import configuration, registry
from tdabench.run import environment
from tdabench.run.folder import RunFolder, tail
from tdabench.run.log import EventLog
from tdabench.run.plan import Cell, Job, Plan
from tdabench.run.record import Record

POLL_SECONDS = 0.05
MOST_PRINTED = 256 << 20  # bytes of a worker's log: a plugin that prints for ever fills no disk


@dataclass(frozen=True)
class Options:
    """How to run: nothing here changes a score.

    `timeout`: most seconds a phase (build, load, one benchmark) may take; `memory`: most bytes
    of a worker process. 0 means no limit.
    """

    jobs: int = 1
    threads: int = 0  # 0: cores / jobs
    timeout: float = 7200.0
    memory: int = 0  # 0: nine tenths of what is available
    force: bool = False
    keep_indices: bool = True
    retry_failed: bool = True
    command: tuple[str, ...] = ()
    log_file: Path | None = None


class Watcher(Protocol):
    """Receiver of progress; see tdabench.run.progress."""

    def begin(self, total: int, cached: int) -> None: ...
    def job(self, title: str, phase: str, done: int, total: int) -> None: ...
    def finished(self, record: Record, cached: bool) -> None: ...
    def say(self, message: str) -> None: ...
    def close(self) -> None: ...


@dataclass
class _Running:
    """A worker process and how far it has come."""

    job: Job
    id: str
    process: subprocess.Popen
    work: Path
    log: Path
    phase: str = "start"
    cell: str = ""
    since: float = field(default_factory=time.monotonic)
    offset: int = 0
    done: set[str] = field(default_factory=set)
    verdict: tuple[str, str] | None = None
    peak: int = 0


def is_done(plan: Plan, folder: RunFolder, cell: Cell, retry_failed: bool) -> Record | None:
    """Returns the record that makes running a cell unnecessary, if there is one."""
    record = folder.read(cell.key)
    if record is None:
        return None
    if record["status"] != "ok":
        return None if retry_failed or record["status"] == "interrupted" else record
    paths = {
        "asset": plan.suite.assets_for(cell.target),
        "truth": cell.target.truths,
        **{f"truth@{t.label}": t.truths for t in plan.suite.targets},
    }
    for used, content in record.get("inputs", {}).items():
        kind, _, name = used.partition(":")
        path = paths.get(kind, {}).get(name)
        if path is None or not path.exists() or plan.suite.content(path) != content:
            return None
    return record


class Interrupted(Exception):
    """Ctrl-C: running cells have been recorded as interrupted."""


class Executor:
    """Runs the cells of a plan that are not on disk yet. Call with the folder's lock held."""

    def __init__(self, plan: Plan, folder: RunFolder, options: Options, watcher: Watcher) -> None:
        self.plan, self.folder, self.options, self.watcher = plan, folder, options, watcher
        self.queue: list[Job] = []
        self.running: list[_Running] = []
        self.records: dict[str, Record] = {}
        self.interrupts = 0
        self.log = EventLog(folder.path / "log.jsonl", *filter(None, [options.log_file]))

    def run(self) -> dict[str, Record]:
        """Returns records by cell key, including cached ones."""
        cached = {}
        if not self.options.force:
            for cell in self.plan.cells:
                record = is_done(self.plan, self.folder, cell, self.options.retry_failed)
                if record is not None:
                    cached[cell.key] = record
        todo = [c for c in self.plan.cells if c.key not in cached]
        self.watcher.begin(len(self.plan.cells), len(cached))
        self._log(
            "run",
            suite=self.plan.suite.name,
            version=self.plan.suite.version,
            folder=str(self.folder.path.absolute()),
            command=list(self.options.command),
            process=os.getpid(),
            cells=len(self.plan.cells),
            on_disk=len(cached),
            jobs=self.options.jobs,
        )
        for cell in self.plan.cells:
            if cell.key in cached:
                record = self._relabelled(cached[cell.key], cell)
                self.records[cell.key] = record
                self.watcher.finished(record, cached=True)
        if not todo:
            return self.records
        self.folder.tidy()
        check_inputs(self.plan, todo)
        for cell in [c for c in todo if c.skip]:
            self._write(cell, "skipped", cell.skip)
        self.queue = self.plan.jobs(c for c in todo if not c.skip)
        if self.options.force:
            for job in self.queue:
                self.folder.drop_index(job.index_key)
        with self._signals():
            self._loop()
        self.folder.clear_work()
        counts = Counter(r["status"] for r in self.records.values())
        self._log("end", **dict(sorted(counts.items())))
        return self.records

    def _log(self, event: str, **details: Any) -> None:
        self.log.write(event, **details)
        if self.log.complaint:
            self.watcher.say(f"warning: {self.log.complaint}")
            self.log.complaint = ""

    def _relabelled(self, record: Record, cell: Cell) -> Record:
        """Takes over a measurement that is on disk under another label."""
        if record["method"]["label"] == cell.method.label:
            return record
        record = record.ended(record.status, method=cell.method.as_dict())
        self.folder.write(record)
        return record

    # ------------------------------------------------------------------ the loop

    def _loop(self) -> None:
        try:
            while self.queue or self.running:
                while self.queue and len(self.running) < self.options.jobs:
                    self.running.append(self._start(self.queue.pop(0)))
                for worker in list(self.running):
                    self._hear(worker)
                    if worker.process.poll() is not None:
                        self.running.remove(worker)
                        self._end(worker)
                    else:
                        self._limit(worker)
                if self.interrupts:
                    raise Interrupted
                time.sleep(POLL_SECONDS)
        except BaseException as e:
            by_user = isinstance(e, Interrupted)
            self._log("interrupted" if by_user else "error", reason=str(e))
            for worker in self.running:
                kill(worker.process)
            for worker in self.running:
                reason = "stopped by the user" if by_user else f"the run stopped: {e}"
                worker.verdict = ("interrupted", reason)
                # On a full disk nothing can be recorded; the first error is the relevant one.
                with contextlib.nullcontext() if by_user else contextlib.suppress(Exception):
                    self._end(worker, again=False)
            raise

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Handles Ctrl-C: once kills and records what runs, twice exits at once."""

        def on_signal(number: int, frame: object) -> None:
            self.interrupts += 1
            if self.interrupts > 1:
                for worker in self.running:
                    kill(worker.process)
                with contextlib.suppress(Exception):
                    self.watcher.close()  # restores the terminal's cursor
                os._exit(130)
            self.watcher.say("stopping: recording what was running (Ctrl-C again exits at once)")

        try:
            previous = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the caller handles signals
            yield
            return
        try:
            yield
        finally:
            for s, handler in previous.items():
                signal.signal(s, handler)

    def _start(self, job: Job) -> _Running:
        id = uuid.uuid4().hex[:12]
        work = (self.folder.work / id).absolute()
        name = f"{job.method.label}-{job.target.label}-{job.seed}"
        log = self.folder.new_log(name)
        try:
            for path in (work / "scratch", work / "cwd", work / "tmp"):
                path.mkdir(parents=True, exist_ok=True)
            (work / "events.jsonl").touch()
        except OSError as e:
            raise cannot_write(e.filename or self.folder.path, e) from e
        write_json(work / "job.json", self._describe(job, id, work, log))
        threads = self._threads
        count = str(threads)
        env = {
            **os.environ,
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "OPENBLAS_NUM_THREADS": count,
            "RAYON_NUM_THREADS": count,
            # Threads that spin while they wait starve each other once the cores are shared: a build
            # of 6 s took 137 s on a busy machine. Sleeping costs nothing on an idle one.
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONHASHSEED": "0",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path),
            "TMPDIR": str(work / "tmp"),
            "TORCHINDUCTOR_CACHE_DIR": str(work / "tmp" / "inductor"),
        }
        command = [sys.executable, "-P", "-m", "tdabench.run.worker", str(work / "job.json")]
        with open_own(log, "ab") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,  # Ctrl-C reaches only the parent, which handles it
            )
        self.watcher.job(job.title, "start", 0, 0)
        self._log(
            "start", job=job.title, worker=id, process=process.pid, threads=threads, log=str(log)
        )
        return _Running(job, id, process, work, log)

    def _describe(self, job: Job, id: str, work: Path, log: Path) -> dict[str, Any]:
        cells = [
            {
                "key": c.key,
                "benchmark": c.benchmark.as_dict(),
                "headline": c.benchmark.headline,
                "record": dict(self._planned(c)),
            }
            for c in job.cells
        ]
        return {
            "id": id,
            "parent": os.getpid(),
            "plugins": configuration(),
            "cwd": str(work / "cwd"),
            "folder": str(self.folder.path.absolute()),
            "work": str(work),
            "log": str(log),
            "suite": str(self.plan.suite.path),
            "target": job.target.label,
            "split": self.plan.request.split,
            "device": self.plan.request.device,
            "seed": job.seed,
            "threads": self._threads,
            "method": {"name": job.method.name, "params": dict(job.method.params)},
            "index_key": job.index_key,
            "cells": cells,
        }

    # ------------------------------------------------------------------ watching

    def _hear(self, worker: _Running) -> None:
        """Reads the events a worker has written since the last look.

        The plugin could write to that file, or remove it: what makes no sense is passed over.
        """
        try:
            with open(worker.work / "events.jsonl", "rb") as f:
                f.seek(worker.offset)
                lines = f.read(1 << 22).split(b"\n")[:-1]
        except OSError:
            return
        for line in lines:
            worker.offset += len(line) + 1
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                self._heard(worker, json.loads(line))

    def _heard(self, worker: _Running, event: dict[str, Any]) -> None:
        if event["event"] == "phase":
            worker.phase, worker.cell = str(event["phase"]), str(event["key"])
            worker.since = time.monotonic()
            self.watcher.job(worker.job.title, worker.phase, 0, 0)
            self._log("phase", worker=worker.id, phase=worker.phase, key=worker.cell)
        elif event["event"] == "progress":
            shown = f"{worker.phase}: {event['what']}"
            self.watcher.job(worker.job.title, shown, int(event["done"]), int(event["total"]))
        elif event["event"] == "record":
            self._done(worker, str(event["key"]))

    def _done(self, worker: _Running, key: str) -> None:
        if key in worker.done or key not in {c.key for c in worker.job.cells}:
            return
        record = self.folder.read(key)
        if record is None:
            return
        worker.done.add(key)
        self._tell(record)

    def _limit(self, worker: _Running) -> None:
        """Kills a worker that takes too long or too much."""
        spent = time.monotonic() - worker.since
        if self.options.timeout and spent > self.options.timeout:
            worker.verdict = (
                "timeout",
                f"{worker.phase} took longer than {self.options.timeout:g} s (--timeout)",
            )
            kill(worker.process)
            return
        if worker.log.stat().st_size > MOST_PRINTED:
            worker.verdict = ("failed", f"{worker.phase} printed more than {MOST_PRINTED:,} bytes")
            kill(worker.process)
            return
        limit = self.options.memory or self._default_memory()
        used = tree_bytes(worker.process.pid)
        worker.peak = max(worker.peak, used)
        if limit and used > limit:
            worker.verdict = (
                "oom",
                f"{worker.phase} used {used / 2**30:.2f} GiB, more than the "
                f"{limit / 2**30:.2f} GiB allowed (--memory)",
            )
            kill(worker.process)

    def _default_memory(self) -> int:
        if not hasattr(self, "_memory"):
            self._memory = int(0.9 * environment.available_bytes() / self.options.jobs)
        return self._memory

    def _end(self, worker: _Running, again: bool = True) -> None:
        """Records the cells of a worker that has ended; cells that it never reached run again."""
        worker.process.wait()
        kill(worker.process)  # what it started and left behind
        self._hear(worker)
        status, reason = worker.verdict or ("", "")
        self._log(
            "stop",
            worker=worker.id,
            exit=worker.process.returncode,
            peak_bytes=worker.peak,
            **({"killed_for": reason} if status else {}),
        )
        for cell in worker.job.cells:
            record = self.folder.read(cell.key)
            if record is not None and record.get("job") == worker.id:
                self._done(worker, cell.key)
        left = [c for c in worker.job.cells if c.key not in worker.done]
        if left:
            status, reason = worker.verdict or self._cause_of_death(worker)
            here = [c for c in left if c.key == worker.cell] or left
            for cell in here:
                self._write(cell, status, reason, worker)
            rest = [c for c in left if c not in here]
            if rest and again:
                job = worker.job
                self.queue.insert(
                    0, Job(job.method, job.target, job.seed, job.index_key, tuple(rest))
                )
        else:
            self._drop_index(worker)
        shutil.rmtree(worker.work, ignore_errors=True)

    def _drop_index(self, worker: _Running) -> None:
        if not self.options.keep_indices:
            self.folder.drop_index(worker.job.index_key)

    def _cause_of_death(self, worker: _Running) -> tuple[str, str]:
        code = worker.process.returncode
        if code == -signal.SIGKILL and worker.peak > 0.5 * environment.memory_bytes():
            return "oom", f"{worker.phase} was killed by the system, most likely for its memory use"
        if code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
            return "failed", f"its process was killed by {name} during {worker.phase}"
        return "failed", f"its process ended with exit status {code} during {worker.phase}"

    # ------------------------------------------------------------------ records

    @property
    def _threads(self) -> int:
        """Threads per worker process."""
        return self.options.threads or max(1, environment.cores() // self.options.jobs)

    def _planned(self, cell: Cell) -> Record:
        return Record.planned(self.plan, cell, self._threads, self.options.jobs)

    def _write(self, cell: Cell, status: str, reason: str, worker: _Running | None = None) -> None:
        printed = [] if worker is None else tail(worker.log)
        record = self._planned(cell).ended(status, reason=reason, log_tail=printed)
        self.folder.write(record)
        self._tell(record)

    def _tell(self, record: Record) -> None:
        self.records[record["key"]] = record
        self._log(
            "cell",
            key=record["key"],
            method=record["method"]["label"],
            target=record["target"]["label"],
            benchmark=record["benchmark"]["name"],
            seed=record["seed"],
            status=record["status"],
            reason=record["reason"],
            took=record["seconds"],
        )
        self.watcher.finished(record, cached=False)
        for complaint in registry().tell(dict(record), self.folder.path):
            self.watcher.say(f"warning: {complaint}")


# --------------------------------------------------------------------------- guards


def check_inputs(plan: Plan, todo: Sequence[Cell]) -> None:
    """Refuses inputs that would give flattering numbers, before any work.

    Raises GuardError for a query that is also trained on, and for a truth built on another corpus
    or target. The worker, which has the models, detects a checkpoint that is one of the models
    behind the truth (see `Truth.check_apart`).
    """
    from tdabench.run.suite import truth_name
    from tdabench.truth.plan import check_disjoint
    from tdabench.truth.store import Truth

    queries = plan.suite.queries(plan.request.split)
    check_disjoint(plan.suite.train, queries)
    checked = set()
    for cell in todo:
        if cell.benchmark.truth is None or cell.skip:
            continue
        name = truth_name(cell.benchmark.truth, plan.request.split)
        if (cell.target.label, name) in checked:
            continue
        checked.add((cell.target.label, name))
        truth = Truth.load(cell.target.truths[name])
        truth.check(plan.suite.train, cell.target.target, cell.target.recipe_of(name))
        truth.for_queries(queries.ids)


# --------------------------------------------------------------------------- processes


def kill(process: subprocess.Popen) -> None:
    """Kills a worker with everything it started, and waits for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def tree_bytes(pid: int) -> int:
    """Memory a process and its descendants cannot give back: anonymous and shared, not files.

    0 where the system has no /proc.
    """
    total = 0
    pending = [pid]
    while pending:
        p = pending.pop()
        try:
            status = Path(f"/proc/{p}/status").read_text()
            for task in Path(f"/proc/{p}/task").iterdir():
                pending += map(int, (task / "children").read_text().split())
        except (OSError, ValueError):
            continue
        for line in status.splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) * 1024
    return total
