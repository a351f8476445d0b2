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
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from tdabench.errors import UsageError
from tdabench.io import cache_folder, cannot_write, open_own, write_json
from tdabench.registry import configuration, registry
from tdabench.run import environment, sandbox
from tdabench.run.folder import RunFolder, tail
from tdabench.run.inputs import content_of, pointed_at
from tdabench.run.log import EventLog
from tdabench.run.nursery import below, status
from tdabench.run.plan import Cell, Job, MethodSpec, Plan
from tdabench.run.record import Record
from tdabench.run.suite import Suite
from tdabench.standins import uses_models

POLL_SECONDS = 0.05
AGAIN = 3.0  # seconds after a Ctrl-C that skips, in which another one stops the run
STOOD_STILL = 2.0  # seconds between two looks: a longer gap means that the machine was suspended
MOST_PRINTED = 256 << 20  # bytes of a worker's log: endless printing must not fill the disk


@dataclass(frozen=True)
class Options:
    """Settings of a run, none of which changes a score.

    `timeout`: maximum seconds per phase (build, load, one benchmark); `memory`: maximum bytes of a
    worker process and its children. 0 means no limit. `isolation`: "strict" refuses to run
    if methods cannot be confined, "auto" continues and records it, "off" confines none.
    `interactive`: one Ctrl-C skips the running cells, two in a row stop the run.
    """

    jobs: int = 1
    threads: int = 0  # 0: cores / jobs
    timeout: float = 7200.0
    memory: int = 0  # 0: nine tenths of what is available
    isolation: str = "auto"
    force: bool = False
    keep_indices: bool = True
    retry_failed: bool = True
    interactive: bool = False
    command: tuple[str, ...] = ()
    log_file: Path | None = None


class Watcher(Protocol):
    """Receiver of progress; see tdabench.run.progress."""

    def begin(self, total: int, cached: int) -> None: ...
    def coming(self, message: str) -> None: ...
    def job(self, title: str, phase: str, done: int, total: int) -> None: ...
    def finished(self, record: Record, cached: bool) -> None: ...
    def say(self, message: str) -> None: ...
    def close(self) -> None: ...


@dataclass
class _Running:
    """A running judge and its progress, as it reports it."""

    job: Job
    id: str
    process: subprocess.Popen
    work: Path
    log: Path
    phase: str = "start"
    cell: str = ""
    spent: float = 0.0  # seconds of this phase, suspensions of the machine left out
    unread: bytes = b""
    nurseries: set[int] = field(default_factory=set)
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
    pointed: dict[str, list[Path]] = {}
    for spec in cell.method.stages or (cell.method,):
        pointed |= pointed_at({"name": spec.name, "params": spec.params, "set": set_by(spec)})
    for used, content in record.get("inputs", {}).items():
        kind, _, name = used.partition(":")
        if kind == "parameter":
            if content_of(pointed.get(used, ())) != content:
                return None
            continue
        path = paths.get(kind, {}).get(name)
        if path is None or not path.exists() or plan.suite.content(path) != content:
            return None
    return record


def set_by(spec: MethodSpec) -> list[str]:
    """Lists the parameters of a method that the user or the suite has set."""
    return sorted({*spec.suite, *spec.tuned, *spec.passed})


class Interrupted(Exception):
    """Raised on Ctrl-C, after running cells have been recorded as interrupted."""


class Executor:
    """Runs the cells of a plan that are not on disk yet. Call with the folder's lock held."""

    def __init__(self, plan: Plan, folder: RunFolder, options: Options, watcher: Watcher) -> None:
        self.plan, self.folder, self.options, self.watcher = plan, folder, options, watcher
        self.queue: list[Job] = []
        self.running: list[_Running] = []
        self.records: dict[str, Record] = {}
        self.interrupts = 0
        self.skip, self.asked = False, -AGAIN  # to skip the running cells; when requested
        self.log = EventLog(folder.path / "log.jsonl", *filter(None, [options.log_file]))
        self.landlock = sandbox.abi() if options.isolation != "off" else 0
        self._looked = time.monotonic()
        if options.isolation == "strict" and not self.landlock:
            raise UsageError(
                "methods cannot be confined here: the system has no Landlock (Linux 5.13)",
                "Run with --isolation auto, and the board says so",
            )

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
        if self.options.isolation == "auto" and not self.landlock:
            self.watcher.say(
                "warning: this system has no Landlock: methods are not confined, as the board says"
            )
        self.folder.tidy()
        check_inputs(self.plan, todo)
        for cell in [c for c in todo if c.skip]:
            self._write(cell, "skipped", cell.skip)
        self.queue = self.plan.jobs(c for c in todo if not c.skip)
        if self.options.force:
            for job in self.queue:
                for key in job.kept_keys:
                    self.folder.drop_index(key)
        if len(self.queue) > 1 or any(len(job.cells) > 1 for job in self.queue):
            self.watcher.coming(coming(self.queue, self.options.interactive))
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
        """Copies a measurement that is on disk under another label."""
        if record["method"]["label"] == cell.method.label:
            return record
        record = record.ended(record.status, method=cell.method.as_dict())
        self.folder.write(record)
        return record

    # ------------------------------------------------------------------ the loop

    def _loop(self) -> None:
        try:
            self._looked = time.monotonic()
            while self.queue or self.running:
                while self.queue and len(self.running) < self.options.jobs:
                    self.running.append(self._start(self.queue.pop(0)))
                passed, self._looked = time.monotonic() - self._looked, time.monotonic()
                for worker in list(self.running):
                    self._hear(worker)
                    worker.spent += passed if passed < STOOD_STILL else 0.0
                    if worker.process.poll() is not None:
                        self.running.remove(worker)
                        self._end(worker)
                    else:
                        self._limit(worker)
                if self.interrupts:
                    raise Interrupted
                if self.skip:
                    self._skip()
                time.sleep(POLL_SECONDS)
        except BaseException as e:
            by_user = isinstance(e, Interrupted)
            self._log("interrupted" if by_user else "error", reason=str(e))
            for worker in self.running:
                worker.unread += kill(worker.process)
            for worker in self.running:
                reason = "stopped by the user" if by_user else f"the run stopped: {e}"
                worker.verdict = ("interrupted", reason)
                # On a full disk nothing can be recorded; the first error is the relevant one.
                with contextlib.nullcontext() if by_user else contextlib.suppress(Exception):
                    self._end(worker, again=False)
            raise

    def _skip(self) -> None:
        """Ends the running cells and records them as skipped; other cells of a method continue."""
        self.skip = False
        skipped, self.running = self.running, []
        for worker in skipped:
            here = [c.benchmark.name for c in worker.job.cells if c.key == worker.cell]
            what = f"{worker.job.title}, {here[0]}" if here else worker.job.title
            self.watcher.say(f"skipping {what}: Ctrl-C again within {AGAIN:g} s stops the run")
            self._log("skip", worker=worker.id, phase=worker.phase, key=worker.cell)
            worker.verdict = ("skipped", "skipped with Ctrl-C: the same command measures it")
            worker.unread += kill(worker.process)
            self._end(worker)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Handles Ctrl-C: once kills and records what runs, twice exits at once.

        In an interactive run the first Ctrl-C skips the running cells, and these two count within
        AGAIN seconds after it.
        """

        def on_signal(number: int, frame: object) -> None:
            asked, self.asked = self.asked, time.monotonic()
            first = self.asked - asked > AGAIN and not self.interrupts
            if self.options.interactive and number == signal.SIGINT and first:
                self.skip = True
                return
            self.interrupts += 1
            if self.interrupts > 1:
                for worker in self.running:
                    worker.unread += kill(worker.process)
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
            for path in (work / "scratch", work / "judge"):
                path.mkdir(parents=True, exist_ok=True)
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
            "TMPDIR": str(work / "judge"),
        }
        command = [sys.executable, "-P", "-m", "tdabench.run.judge", str(work / "job.json")]
        command += [str(max(1, len(job.method.stages)))]  # groups of contestants
        with open_own(log, "ab") as out:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # that it closes when this process ends tells the judge
                stdout=subprocess.PIPE,
                stderr=out,
                env=env,
                start_new_session=True,  # Ctrl-C reaches only the parent, which handles it
            )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
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
                "truth_kind": c.benchmark.truth,
                "record": dict(self._planned(c)),
            }
            for c in job.cells
        ]
        judges = {registry().benchmark(c.benchmark.name).origin.plugin for c in job.cells}
        found = configuration()
        own = self._describe_method(job.method, job.index_key)
        if job.method.stages:
            own["stages"] = [
                self._describe_method(s, k)
                for s, k in zip(job.method.stages, job.stage_keys, strict=True)
            ]
        return {
            "id": id,
            **own,
            "benchmark_plugins": {**found, "only": sorted(judges)},
            "landlock": self.landlock,
            "hidden": hidden_from_methods(self.folder.path),
            "withheld": withheld_assets(self.plan.suite),
            "most_printed": MOST_PRINTED,
            "fingerprint": self.plan.fingerprints[job.target.label],
            "folder": str(self.folder.path.absolute()),
            "work": str(work),
            "log": str(log),
            "suite": str(self.plan.suite.path),
            "target": job.target.label,
            "split": self.plan.request.split,
            "device": self.plan.request.device,
            "seed": job.seed,
            "threads": self._threads,
            "timeout": self.options.timeout,
            "cells": cells,
        }

    def _describe_method(self, spec: MethodSpec, index_key: str) -> dict[str, Any]:
        """Returns the description of a method, or of a pipeline, for its judge."""
        if spec.stages:
            return {
                "label": spec.label,
                "plugins": {**configuration(), "only": []},
                "preload": False,
                "method": {"name": spec.label, "params": {}},
                "index_key": index_key,
                "keep": list(spec.params["keep"]),
                "rest": spec.params["rest"],
            }
        entry = registry().method(spec.name)
        names = (spec.name, *entry.cls.from_params(spec.params).uses())
        plugins = sorted({registry().method(n).origin.plugin for n in names})
        return {
            "label": spec.label,
            "plugins": {**configuration(), "only": plugins},
            "preload": uses_models(entry.cls),
            "method": {
                "name": spec.name,
                "params": dict(spec.params),
                "set": set_by(spec),
                "labels": bool(entry.cls.reads_labels),
            },
            "index_key": index_key,
        }

    def _isolation(self, cell: Cell) -> str:
        """Returns the isolation of the method, as in the record."""
        brought = registry().benchmark(cell.benchmark.name).origin
        plugins = [cell.method.origin, *(s.origin for s in cell.method.stages)]
        if brought in plugins or any(map(registry().observes, plugins)):
            return "none"  # the plugin also runs in the judge or, as an observer, beside it
        return f"landlock {self.landlock}" if self.landlock else "none"

    # ------------------------------------------------------------------ watching

    def _hear(self, worker: _Running) -> None:
        """Reads a judge's events since the last look."""
        assert worker.process.stdout is not None
        if not worker.process.stdout.closed:
            with contextlib.suppress(BlockingIOError):
                while data := os.read(worker.process.stdout.fileno(), 1 << 16):
                    worker.unread += data
        *lines, worker.unread = worker.unread.split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                self._heard(worker, json.loads(line))

    def _heard(self, worker: _Running, event: dict[str, Any]) -> None:
        if event["event"] == "phase":
            worker.phase, worker.cell = str(event["phase"]), str(event["key"])
            worker.spent = 0.0
            self.watcher.job(worker.job.title, worker.phase, 0, 0)
            self._log("phase", worker=worker.id, phase=worker.phase, key=worker.cell)
        elif event["event"] == "progress":
            shown = f"{worker.phase}: {event['what']}"
            self.watcher.job(worker.job.title, shown, int(event["done"]), int(event["total"]))
        elif event["event"] == "record":
            self._done(worker, str(event["key"]))
        elif event["event"] == "nursery":
            worker.nurseries.add(int(event["pid"]))
        elif event["event"] == "flood" and worker.verdict is None:
            what = f"{event['phase'] or worker.phase} printed more than {MOST_PRINTED:,} bytes"
            worker.verdict = ("failed", what)
            worker.unread += kill(worker.process)

    def _done(self, worker: _Running, key: str) -> None:
        if key in worker.done or key not in {c.key for c in worker.job.cells}:
            return
        record = self.folder.read(key)
        if record is None:
            return
        worker.done.add(key)
        self._tell(record)

    def _limit(self, worker: _Running) -> None:
        """Kills a worker that exceeds its limit of time or memory."""
        if self.options.timeout and worker.spent > self.options.timeout:
            worker.verdict = (
                "timeout",
                f"{worker.phase} took longer than {self.options.timeout:g} s (--timeout)",
            )
            worker.unread += kill(worker.process)
            return
        limit = self.options.memory or self._default_memory()
        used = tree_bytes(worker.process.pid, worker.nurseries)
        worker.peak = max(worker.peak, used)
        if limit and used > limit:
            worker.verdict = (
                "oom",
                f"{worker.phase} used {used / 2**30:.2f} GiB, more than the "
                f"{limit / 2**30:.2f} GiB allowed (--memory)",
            )
            worker.unread += kill(worker.process)

    def _default_memory(self) -> int:
        if not hasattr(self, "_memory"):
            self._memory = int(0.9 * environment.available_bytes() / self.options.jobs)
        return self._memory

    def _end(self, worker: _Running, again: bool = True) -> None:
        """Records the cells of a worker that has ended; cells that it never reached run again."""
        worker.process.wait()
        self._hear(worker)
        worker.unread += kill(worker.process)  # and its children
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
                self.queue.insert(0, replace(job, cells=tuple(rest)))
        else:
            self._drop_index(worker)
        shutil.rmtree(worker.work, ignore_errors=True)

    def _drop_index(self, worker: _Running) -> None:
        if not self.options.keep_indices:
            for key in worker.job.kept_keys:
                self.folder.drop_index(key)

    def _cause_of_death(self, worker: _Running) -> tuple[str, str]:
        code = worker.process.returncode
        if code == -signal.SIGKILL and worker.peak > 0.5 * environment.memory_bytes():
            return "oom", f"{worker.phase} was killed by the system, most likely for its memory use"
        if code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
            return "failed", f"its judge was killed by {name} during {worker.phase}"
        return "failed", f"its judge ended with exit status {code} during {worker.phase}"

    # ------------------------------------------------------------------ records

    @property
    def _threads(self) -> int:
        """Threads per worker process."""
        return self.options.threads or max(1, environment.cores() // self.options.jobs)

    def _planned(self, cell: Cell) -> Record:
        return Record.planned(
            self.plan, cell, self._threads, self.options.jobs, self._isolation(cell)
        )

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


def coming(queue: Sequence[Job], interactive: bool) -> str:
    """Lists in one line the benchmarks of a run in their order."""
    benchmarks = list(dict.fromkeys(c.benchmark.name for job in queue for c in job.cells))
    labels = list(dict.fromkeys(job.method.label for job in queue))
    shown = ", ".join(labels[:8]) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")
    text = f"measuring {shown}, one after the other: {', then '.join(benchmarks)}"
    return f"{text}. Ctrl-C skips the current one, twice stops the run" if interactive else text


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


def kill(process: subprocess.Popen) -> bytes:
    """Kills a judge and waits until all processes that it started have ended.

    Returns its last output. Its nursery holds the same pipe and kills the processes below it.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    if process.stdout is None or process.stdout.closed:
        return b""
    said = b""
    fd, end = process.stdout.fileno(), time.monotonic() + 10
    while time.monotonic() < end:
        try:
            data = os.read(fd, 1 << 16)
            if not data:
                break
            said += data
        except BlockingIOError:
            time.sleep(0.01)
    process.stdout.close()
    return said


def tree_bytes(pid: int, nurseries: Collection[int] = ()) -> int:
    """Sums the anonymous and shared memory of a process and its descendants, without files.

    A nursery's memory is shared with the processes that it forked, and counted there. Returns 0 on
    a system without /proc.
    """
    total = 0
    for p in {pid, *below(pid)} - set(nurseries):
        facts = status(p)
        total += facts.get("RssAnon", 0) + facts.get("RssShmem", 0)
    return total


# --------------------------------------------------------------------------- hidden files


def hidden_from_methods(run: Path) -> list[str]:
    """Lists folders and files that a method may not read, except for its inputs.

    These are records and other runs, the cache, and all installed suites.
    """
    around = [run.absolute(), run.absolute().parent / "runs", Path.cwd() / "runs"]
    if run.absolute().parent.name == "runs":
        around.append(run.absolute().parent)
    found = [*around, cache_folder(), Path(__file__).parents[1] / "suites"]
    for entry in registry().suites.values():
        found += data_of(Path(entry.value).parent)
    return list(dict.fromkeys(str(p) for p in found if p.exists()))


def data_of(folder: Path) -> list[Path]:
    """Returns a suite's folder, or its files other than code if it also contains a plugin."""
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        return []
    if not any(p.suffix == ".py" for p in inside):
        return [folder]
    return [p for p in inside if p.suffix != ".py" and not (p / "__init__.py").exists()]


def withheld_assets(suite: Suite) -> list[str]:
    """Lists assets that hold the answers of a benchmark (its parameter `asset` names them)."""
    named = set()
    for name, entry in registry().benchmarks.items():
        given = suite.benchmark_params.get(name, {})
        named.add(given.get("asset", getattr(entry.cls, "asset", "")))
    return sorted(n for n in named if isinstance(n, str) and n)
