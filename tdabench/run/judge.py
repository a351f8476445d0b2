"""The judge: holds benchmark, truth and statistics, lets a contestant score, and writes records.

    python -m tdabench.run.judge job.json

There is one judge per job (a method on a target). It imports no method: the method runs in another
process (`tdabench.run.contestant`), confined where the system can, and the judge knows only its
answers. The judge measures time, memory and bytes. Events go to the parent on stdout, one line of
JSON each; printed text goes to the log, on stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.benchmark import BenchmarkContext, Built, Outcome
from tdabench.data.behaviours import Behaviour, parts_of
from tdabench.data.examples import Corpus, Example
from tdabench.errors import GuardError, MethodError, TdabenchError, unknown
from tdabench.groups import Groups
from tdabench.io import fingerprint, read_json, remove, write_arrays
from tdabench.method import Index
from tdabench.registry import configure, registry
from tdabench.run import environment, sandbox
from tdabench.run.contestant import explain
from tdabench.run.folder import RunFolder, tail
from tdabench.run.inputs import Inputs, OtherTruths, content_of, pointed_at
from tdabench.run.meter import Memory, Meter, MeteredIndex, checked, folder_bytes
from tdabench.run.nursery import (
    Nursery,
    below,
    command_of,
    is_alive,
    lines,
    status,
)
from tdabench.run.plan import jsonable
from tdabench.run.protocol import Arrays, Channel, Hangup, spelled, write_corpus
from tdabench.run.record import Record
from tdabench.run.sources import load_suite
from tdabench.run.suite import Suite, SuiteTarget, truth_name
from tdabench.run.top import too_long, top_examples
from tdabench.toolkit.pipeline import PipelineIndex
from tdabench.truth.store import Truth

POLL_SECONDS = 0.05
GAP_SECONDS = 2.0  # between two looks: a longer gap means that the machine was suspended


class Refused(MethodError):
    """Raised when a contestant answers with an error instead of a result, or dies."""

    def __init__(self, status: str, reason: str, missing: bool = False, path: str = "") -> None:
        super().__init__(reason)
        self.status = status if status in ("failed", "skipped", "oom") else "failed"
        self.missing, self.path = missing, path


class Died(Refused):
    """Raised when the contestant's process ended."""


@dataclasses.dataclass
class Spent:
    """Seconds of wall and processor time of one request, as the judge measured them.

    `setup` is the part of the wall time that the contestant says went into imports and loading.
    """

    seconds: float = 0.0
    cpu: float = 0.0
    setup: float = 0.0


class Ledger:
    """Wall and processor seconds by phase. Their sum is all that the contestants used."""

    def __init__(self) -> None:
        self.phases: dict[str, list[float]] = {}
        self.scoring = [0.0, 0.0]  # of the phase query, without set-up
        self.left_running: list[str] = []

    def add(self, phase: str, seconds: float, cpu: float) -> None:
        entry = self.phases.setdefault(phase, [0.0, 0.0])
        entry[0] += seconds
        entry[1] += cpu

    def scored(self, seconds: float, cpu: float) -> None:
        self.scoring[0] += seconds
        self.scoring[1] += cpu


class Stage:
    """Runs contestants, one at a time, and measures them.

    A contestant is stopped between two requests, so it computes only during a request.
    """

    def __init__(
        self, nursery: Nursery, place: Mapping[str, Any], hello: Mapping[str, Any]
    ) -> None:
        self.nursery, self.place, self.hello = nursery, place, hello
        self.ledger = Ledger()
        self.clock = Meter()  # of the judge's time, only for the contestants' work
        self.clock.watch_imports()
        self.pid = 0
        self.channel: Channel | None = None
        self.holder: weakref.ref[RemoteIndex] | None = None
        self.phase = ""
        self.printed = 0
        self.most_printed = 1 << 62
        self.used_torch = False
        self.gpu_peak = 0
        self.base = 0
        self.exact = False
        self.find_asset: Callable[[str], dict[str, Any]] = lambda name: {}
        self.on_progress: Callable[[str, int, int], None] = lambda what, done, total: None
        self.event: Callable[..., None] = lambda kind, **details: None
        self._imported = [0.0, 0.0]
        self._own = [0.0, 0.0]

    # ------------------------------------------------------------------ processes

    def open(self, scratch: Path, rules: Sequence[sandbox.Rule], given: Mapping[str, Any]) -> None:
        """Starts a contestant of the method and ends a running one; `given`: its corpus."""
        self.close()
        self.nursery.ready()
        tree = self.nursery.tree
        cpu, start = tree.cpu(), time.perf_counter()
        base = [*self.place["rules"], *rules, (str(scratch), "write")]
        self.pid, self.channel = self.nursery.start({**self.place, "rules": base})
        self.event("contestant", pid=self.pid)
        self._own = [0.0, 0.0]
        hello = {"do": "start", **self.hello, "scratch": str(scratch), "train": dict(given)}
        self._ask(hello, {}, "import", 0, start, cpu)
        libraries = [a - b for a, b in zip(self.nursery.imported, self._imported)]
        self._imported = list(self.nursery.imported)
        self.ledger.add("import", *libraries)

    def close(self) -> None:
        """Ends the contestant that runs."""
        self.holder = None
        if self.channel is None:
            return
        self.channel.close()
        self.channel = None
        for pid in below(self.nursery.pid) or [self.pid]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(Hangup):
            self.nursery.death(self.pid)
        self._drain()

    # ------------------------------------------------------------------ asking

    def ask(
        self,
        message: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray] = {},
        phase: str = "",
        most: int = 0,
    ) -> tuple[dict[str, Any], Arrays, Spent]:
        """Returns the answer, its arrays and its cost. Raises Refused if it fails, Died if it ends.

        `most`: maximum bytes of arrays in the answer.
        """
        return self._ask(message, arrays, phase, most, None, None)

    def _ask(
        self,
        message: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        phase: str,
        most: int,
        start: float | None,
        cpu: float | None,
    ) -> tuple[dict[str, Any], Arrays, Spent]:
        assert self.channel is not None
        self.phase = phase
        tree = self.nursery.tree
        entered = time.perf_counter(), time.process_time()
        cpu = tree.cpu() if cpu is None else cpu
        frozen, ended = 0.0, 0.0
        reply, out = {}, {}
        try:
            os.kill(self.pid, signal.SIGCONT)
            self.channel.send(message, arrays)
            start = time.perf_counter() if start is None else start
            head, frozen = self._next(tree)
            ended = time.perf_counter()
            out = self.channel.arrays(head, most)
            reply = head["message"]
        except (Hangup, ProcessLookupError):
            ended = time.perf_counter()
            self._account(phase, Spent(max(0.0, ended - (start or entered[0])), tree.cpu() - cpu))
            raise self._autopsy(phase) from None
        except MethodError as e:
            self.close()
            raise Refused("failed", f"{self.who}: {e.message}") from e
        self._halt(phase)
        spent = Spent(max(0.0, ended - start - frozen), max(0.0, tree.cpu() - cpu))
        if not tree.works:
            own = _numbers(reply.get("own"), 2)
            spent.cpu = max(0.0, own[0] - self._own[0])
            self._own = own
        spent.setup = max(0.0, min(_numbers(reply.get("setup"), 2)[0], spent.seconds))
        self._account(phase, spent)
        if phase == "query":
            self.ledger.scored(spent.seconds, spent.cpu)
        self.used_torch |= bool(reply.get("torch"))
        self.gpu_peak = max(self.gpu_peak, int(_numbers([reply.get("gpu_peak_bytes", 0)], 1)[0]))
        # The judge's clock advances only by the time that the contestant took.
        passed = time.perf_counter() - entered[0]
        self.clock.setup.seconds += max(0.0, passed - spent.seconds)
        self.clock.setup.cpu += time.process_time() - entered[1] - spent.cpu
        self._drain()
        if "error" in reply:
            raise _refusal(reply["error"])
        return reply, out, spent

    @property
    def who(self) -> str:
        method = self.hello.get("method") or {}
        return str(method.get("name", "the target"))

    def _next(self, tree: Any) -> tuple[dict[str, Any], float]:
        """Returns the head of the answer, and the seconds in which the contestant could not work.

        These are seconds in which the machine was suspended or the judge looked up an asset.
        """
        assert self.channel is not None
        end, output = self.channel.end.fileno(), self.nursery.output
        last, used, frozen = time.perf_counter(), tree.cpu(), 0.0
        while True:
            ready, _, _ = select.select([end, output], [], [], POLL_SECONDS)
            now = time.perf_counter()
            if now - last > POLL_SECONDS:
                tree.memory(self.pid)
                cpu = tree.cpu()
                if now - last > GAP_SECONDS and cpu - used < 0.05 * (now - last):
                    frozen += now - last
                used = cpu
            last = now
            if output in ready:
                self._drain()
            if end not in ready:
                continue
            head = self.channel.head()
            message = head["message"]
            if "progress" in message:
                with contextlib.suppress(ValueError, TypeError):
                    what, done, total = message["progress"]
                    self.on_progress(str(what)[:80], int(done), int(total))
            elif "asset" in message:
                asked = time.perf_counter()
                self.channel.send(self.find_asset(str(message["asset"])))
                frozen += time.perf_counter() - asked  # the judge's own work
            else:
                return head, frozen

    def _halt(self, phase: str) -> None:
        """Stops the contestant until the next request; kills the processes that it left running."""
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGSTOP)
        for _ in range(100):  # children may fork while they are killed; their parent is stopped
            others = [p for p in below(self.nursery.pid) if p != self.pid and is_alive(p)]
            if not others:
                break
            for pid in others:
                name = command_of(pid)
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                note = f"{phase or 'scoring'} left a process running, which was killed: {name}"
                if note not in self.ledger.left_running and len(self.ledger.left_running) < 10:
                    self.ledger.left_running.append(note)
            time.sleep(0.002)
        self.nursery.reap()

    def _account(self, phase: str, spent: Spent) -> None:
        self.ledger.add(phase or "query", spent.seconds, spent.cpu)

    def _autopsy(self, phase: str) -> Died:
        """Returns why the contestant ended."""
        doing = phase if phase not in ("query", "warm-up") else "scoring"
        peak = self.nursery.tree.peak
        found = self.nursery.death(self.pid, 1.0)
        if found is None:
            self.close()
            return Died("failed", f"it closed its connection to the harness during {doing}")
        self.close()
        code = os.waitstatus_to_exitcode(found["status"])
        if code == -signal.SIGKILL and peak > 0.5 * environment.memory_bytes():
            return Died("oom", f"{doing} was killed by the system, most likely for its memory")
        if code < 0:
            try:
                name = signal.Signals(-code).name
            except ValueError:
                name = f"signal {-code}"
            return Died("failed", f"its process was killed by {name} during {doing}")
        return Died("failed", f"its process ended with exit status {code} during {doing}")

    def _drain(self) -> None:
        """Writes the contestant's output to the log, up to a limit."""
        for data in lines(self.nursery.output):
            self.printed += len(data)
            if self.printed <= self.most_printed:
                with contextlib.suppress(OSError):
                    os.write(2, data)
            elif self.printed - len(data) <= self.most_printed:
                self.event("flood", phase=self.phase)

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Drops the time within the context from `clock`."""
        wall, cpu = self.clock.setup.now()
        try:
            yield
        finally:
            after = self.clock.setup.now()
            self.clock.setup.seconds += after[0] - wall
            self.clock.setup.cpu += after[1] - cpu

    # ------------------------------------------------------------------ memory

    @contextlib.contextmanager
    def memory(self) -> Iterator[dict[str, Any]]:
        """Fills a dict with the peak memory of the contestant and its children at the end."""
        tree = self.nursery.tree
        cost: dict[str, Any] = {}
        pid = self.pid
        exact = tree.forget(pid)
        cost["base_bytes"] = status(pid).get("VmRSS", 0)
        self.gpu_peak = 0
        try:
            yield cost
        finally:
            if pid != self.pid:  # started within the context: it counts from its start
                cost["base_bytes"], exact = 0, False
            cost["peak_bytes"] = tree.highest(self.pid) or int(self._own[1])
            cost["peak_measured"] = "phase" if exact else "process"
            if self.gpu_peak:
                cost["gpu_peak_bytes"] = self.gpu_peak


def _numbers(values: Any, n: int) -> list[float]:
    """Returns n finite numbers from a contestant's answer, 0 for anything else."""
    found = [0.0] * n
    if isinstance(values, list):
        for i, v in enumerate(values[:n]):
            if isinstance(v, (int, float)) and math.isfinite(v):
                found[i] = float(v)
    return found


def _refusal(error: Any) -> Refused:
    if not isinstance(error, dict):
        return Refused("failed", "it failed without a reason")
    text = str(error.get("reason", ""))[:20_000]
    told = str(error.get("status", "failed"))
    return Refused(told, text, bool(error.get("missing")), str(error.get("path", "")))


class RemoteIndex(Index):
    """An index in a contestant, loaded on first use from the folder it was saved in."""

    def __init__(self, judge: Judge, folder: Path, given: Mapping[str, Any], n_train: int) -> None:
        self.judge, self.folder, self.given, self.n_train = judge, folder, given, n_train
        self.pools = "never"
        self.own_behaviours = False  # whether the method itself scores them
        self.scratch: Path | None = None  # the build's scratch folder, if loading needs it
        self.scratch_bytes = 0
        self._warm = False
        self._loaded: tuple[str, float] | None = None  # pooling and temperature, as loaded
        weakref.finalize(self, _leave, judge.stage)

    def save(self, path: Path) -> None:
        raise NotImplementedError

    def open(self) -> None:
        """Loads the index in its own contestant, unless it is already loaded."""
        stage = self.judge.stage
        if stage.channel is not None and stage.holder is not None and stage.holder() is self:
            return
        with stage.apart():
            self._open(stage)

    def _open(self, stage: Stage) -> None:
        own = self.judge.new_folder("load")
        rules = [(str(self.folder), "read"), (self.given["path"], "read")]
        if self.scratch is not None:
            rules.append((str(self.scratch), "read"))
        stage.open(own, rules, self.given)
        message = {"do": "load", "path": str(self.folder), "scratch": str(own)}
        reply, _, _ = stage.ask(message, phase="load")
        self.judge.settle(f"{stage.who}.load")
        if reply.get("n_train") != self.n_train:
            raise Refused(
                "failed",
                f"{stage.who}.load gave an index of {reply.get('n_train')} examples, "
                f"not {self.n_train}",
            )
        if not self._loaded:  # else it is loaded again, and both may have been changed
            self.pooling, self.temperature = str(reply["pooling"]), float(reply["temperature"])
        self._loaded = str(reply["pooling"]), float(reply["temperature"])
        self.pools = str(reply["pools"])
        self.own_behaviours = bool(reply.get("own_behaviours"))
        stage.holder = weakref.ref(self)
        self._warm = False

    def ready(self) -> None:
        """Loads the index and warms it up by one query, so that query times contain no loading.

        Only the first call after loading has an effect, in its own phase. An index that scores
        only groups refuses the query, which is ignored.
        """
        self.open()
        if self._warm:
            return
        self._warm, stage = True, self.judge.stage
        query = self.judge.suite.queries(self.judge.job["split"])[:1]
        message = {"do": "warm_up", **self._rows(query)}
        with stage.apart():
            try:
                stage.ask(message, {}, "warm-up", 1 << 20)
            except Died:
                raise
            except Refused:
                pass

    def _ask(self, message: dict[str, Any], arrays: Arrays, most: int) -> tuple[dict, Arrays]:
        self.open()
        reply, out, _ = self.judge.stage.ask(message, arrays, "query", most)
        return reply, out

    def _rows(self, queries: Sequence[Example]) -> dict[str, Any]:
        name = getattr(queries, "name", "queries")
        return {"queries": spelled(queries, self.judge.labels), "name": name}

    def score(self, queries: Sequence[Example]) -> Any:
        most = 8 * len(queries) * self.n_train + (1 << 20)
        return _array(*self._ask({"do": "score", **self._rows(queries)}, {}, most), "scores")

    def score_some(self, queries: Sequence[Example], candidates: np.ndarray) -> np.ndarray:
        """Asks for the scores of some training examples per query; MethodError for other shapes."""
        message, arrays = {"do": "score_some", **self._rows(queries)}, {"candidates": candidates}
        found = _array(*self._ask(message, arrays, 8 * candidates.size + (1 << 20)), "scores")
        return checked(self.judge.stage.who, "score_some", found, candidates.shape)

    def score_behaviours(
        self, behaviours: Sequence[Behaviour], groups: Groups | None = None
    ) -> Any:
        self.open()
        if not self.own_behaviours:
            return super().score_behaviours(behaviours, groups)
        examples, weights = parts_of(behaviours)
        ids = [b.id for b in behaviours]
        message = {"do": "score_behaviours", "ids": ids, **self._rows(examples),
                   "n_train": self.n_train}  # fmt: skip
        arrays = {"weights": weights}
        if groups is not None:
            arrays |= {"indptr": groups.indptr, "indices": groups.indices}
        most = 8 * len(ids) * (self.n_train if groups is None else len(groups)) + (1 << 20)
        return _array(*self._ask(message, arrays, most), "scores")

    def score_groups(self, queries: Sequence[Example], groups: Groups) -> Any:
        most = 8 * len(queries) * len(groups) + (1 << 20)
        message = {"do": "score_groups", **self._rows(queries), "n_train": groups.n_train}
        self.open()
        if self._loaded != (self.pooling, self.temperature):
            message |= {"pooling": self.pooling, "temperature": self.temperature}
        arrays = {"indptr": groups.indptr, "indices": groups.indices}
        return _array(*self._ask(message, arrays, most), "scores")

    def top_k(self, queries: Sequence[Example], k: int) -> Any:
        most = 16 * len(queries) * k + (1 << 20)
        answer = self._ask({"do": "top_k", **self._rows(queries), "k": k}, {}, most)
        if not {"scores", "ids"} <= answer[1].keys():
            return Strange(str(answer[0].get("not", "nothing")))
        return answer[1]["scores"], answer[1]["ids"]


class Strange:
    """A value that a method returned in place of an array; its type has that value's name."""

    def __init__(self, kind: str) -> None:
        self.__class__ = type(kind[:80], (Strange,), {})


def _array(reply: Mapping[str, Any], out: Arrays, name: str) -> Any:
    return out[name] if name in out else Strange(str(reply.get("not", "nothing")))


def _leave(stage: Stage) -> None:
    """Ends the process of an index that is no longer referenced."""
    if stage.holder is not None and stage.holder() is None:
        stage.close()


class Judge:
    """One job: its description, its folders and its contestants.

    `parts` are the judges of its methods: itself, or one per stage of a pipeline. Each stage
    has its own contestants, and the same index as the method alone.
    """

    suite: Suite
    declared: SuiteTarget
    train: Corpus
    assets: Inputs
    stage: Stage
    loading: Ledger  # time before the first benchmark

    def __init__(self, job: Mapping[str, Any], nurseries: Sequence[Nursery], events: int) -> None:
        self.job, self.nursery, self.events = job, nurseries[0], events
        self.folder = RunFolder(Path(job["folder"]))
        self.work = Path(job["work"])
        self.log = Path(job["log"])
        self.memory = Memory()
        self.started = time.perf_counter()
        self.kept_apart: set[str] = set()  # truths checked against the method's checkpoints
        self.labels = bool(job["method"].get("labels"))
        self.pointed: dict[str, str] = {}  # contents of the files that parameters name
        # Top examples, once they are known, and the ids of their queries.
        self.shown: tuple[tuple[str, ...], dict[str, np.ndarray]] | None = None
        self._last_progress = 0.0
        stages = job.get("stages") or ()
        self.parts: list[Judge] = [
            Judge({**job, **stage, "stages": (), "work": str(self.work / f"stage-{i}")}, [held],
                  events)
            for i, (stage, held) in enumerate(zip(stages, nurseries, strict=bool(stages)))
        ] or [self]  # fmt: skip
        if stages:
            # All parts count as the work of one method, on one clock.
            self.clock = Meter()
            self.clock.watch_imports()

    # ------------------------------------------------------------------ telling

    def event(self, kind: str, **details: Any) -> None:
        line = json.dumps({"event": kind, **details}, default=str) + "\n"
        with contextlib.suppress(OSError):
            os.write(self.events, line.encode("utf-8", "backslashreplace"))

    def progress(self, what: str, done: int, total: int) -> None:
        if done >= total or time.monotonic() - self._last_progress > 0.2:
            self._last_progress = time.monotonic()
            self.event("progress", what=str(what)[:80], done=int(done), total=int(total))

    def record(self, cell: Mapping[str, Any], status: str, **fields: Any) -> Record:
        return Record(cell["record"]).ended(status, job=self.job["id"], **fields)

    def finish(self, cell: Mapping[str, Any], record: Record) -> None:
        self.folder.write(record)
        self.event("record", key=cell["key"], status=record["status"])

    def fail(self, cells: list[dict], error: BaseException, cost: Mapping[str, Any]) -> None:
        if isinstance(error, Refused):
            status, reason = error.status, error.message
            if error.missing and not cells[0]["record"]["method"]["passed"]:
                status = "skipped"  # the suite lacks it; a name that the user passed is a mistake
        else:
            status, reason = explain(error)
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        for cell in cells:
            details = {"reason": reason, "log_tail": tail(self.log), "cost": dict(cost)}
            seconds = round(time.perf_counter() - self.started, 3)
            self.finish(cell, self.record(cell, status, **details, seconds=seconds))

    # ------------------------------------------------------------------ working

    def run(self) -> None:
        cells = self.job["cells"]
        try:
            self.suite = load_suite(self.job["suite"])
            self.declared = self.suite.target(self.job["target"])
            self.train = self.suite.train
            for part in self.parts:
                part.enter(self)
            # Files that a benchmark reads; a single method's own reads are recorded here, too.
            self.assets = self.parts[0].assets if self.parts == [self] else self._assets()
        except BaseException as e:
            self.fail(cells, e, {})
            return
        found: list[tuple[RemoteIndex, dict[str, Any]]] = []
        try:
            for part in self.parts:
                part._look_at_checkpoints(cells)
                found.append(part._index())
                part.loading, part.stage.ledger = part.stage.ledger, Ledger()
            indices = [index for index, _ in found]
            cost = self._cost_of_all([cost for _, cost in found])
        except BaseException as e:
            self.fail(cells, e, {})
            return
        for cell in cells:
            self.event("phase", phase=cell["benchmark"]["name"], key=cell["key"])
            try:
                record = self._benchmark(cell, indices, cost)
            except BaseException as e:
                self.fail([cell], e, cost)
                if isinstance(e, (KeyboardInterrupt, SystemExit)):
                    raise
            else:
                self.finish(cell, record)

    def enter(self, whole: Judge) -> None:
        """Prepares the contestants and their inputs; `whole` has read the suite."""
        self.suite, self.declared, self.train = whole.suite, whole.declared, whole.train
        self.nursery.preload(self.declared.target.folder if self.job["preload"] else None)
        self.assets = self._assets()
        self.stage = self._stage()
        if whole is not self:
            self.stage.clock = whole.clock
        self.given = self._give(self.train)

    def _assets(self) -> Inputs:
        return Inputs(self.suite, self.suite.assets_for(self.declared), "asset")

    @property
    def who(self) -> str:
        """The method's name, or the pipeline's label, for messages."""
        return self.stage.who if self.parts == [self] else str(self.job["method"]["name"])

    def _composed(self, indices: Sequence[Index]) -> Index:
        """Returns the index for a benchmark: the method's, or the pipeline over its stages'."""
        if self.parts == [self]:
            return indices[0]
        return PipelineIndex(indices, self.job["keep"], self.job["rest"])

    def _cost_of_all(self, costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns the cost of a method's index, or of all indices of a pipeline together.

        Stages are built one after another: their times add up, and the highest peak counts.
        """
        if self.parts == [self]:
            return costs[0]
        out: dict[str, Any] = {"n_train": len(self.train), "phases": {}, "left_running": []}
        for key in ("index_bytes", "bytes_per_example", "scratch_bytes"):
            if any(key in c for c in costs):
                out[key] = sum(c.get(key, 0) for c in costs)
        builds: list[dict[str, Any]] = [c["build"] for c in costs]
        highest: dict[str, Any] = max(builds, key=lambda b: float(b.get("peak_bytes", 0)))
        out["build"] = {
            **highest,
            **{
                k: round(sum(b.get(k, 0.0) for b in builds), 6)
                for k in ("seconds", "cpu_seconds", "setup_seconds")
            },
        }
        prepared: list[dict[str, float]] = [c["prepare"] for c in costs if c.get("prepare")]
        names = list(dict.fromkeys(k for p in prepared for k in p))
        out["prepare"] = {k: sum(p.get(k, 0.0) for p in prepared) for k in names} or None
        for c in costs:
            out["phases"] = joined(out["phases"], c.get("phases", {}))
            out["left_running"] += c.get("left_running", ())
        said: list[dict[str, Any]] = [c.get("remarks") or {} for c in costs]
        covered = [r["gradients"] for r in said if r.get("gradients")]
        out["remarks"] = {
            "notes": [n for r in said for n in r.get("notes", ())],
            "gradients": min(covered, key=_share) if covered else {},
        }
        out["stages"] = [
            {"label": part.job["label"], "build": c["build"], "index_bytes": c["index_bytes"]}
            for part, c in zip(self.parts, costs)
        ]
        return out

    def _stage(self) -> Stage:
        job, target = self.job, self.declared.target
        target_fields = {f: getattr(target, f) for f in target.__dataclass_fields__}
        target_fields["recipe"] = dataclasses.asdict(target.recipe)
        hello = {
            "plugins": job["plugins"],
            "method": {"name": job["method"]["name"], "params": job["method"]["params"]},
            "target": {**jsonable(target_fields), "fingerprint": job["fingerprint"]},
            "reading": target._reading,
            "seed": job["seed"],
            "device": job["device"],
            "assets": [a for a in self.assets if a not in job["withheld"]],
        }
        # Stages that share a job have separate folders.
        for name in ("cwd", "given", "lent", "tmp", "scratch", "judge"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        rules = self._rules()
        place = {
            "landlock": job["landlock"],
            "rules": rules if job["landlock"] else [],
            "cwd": str(self.work / "cwd"),
            "fork": job["device"] == "cpu" and sys.platform == "linux",
            "environment": sandbox.private_environment(self.work / "tmp"),
        }
        stage = Stage(self.nursery, place, hello)
        stage.event, stage.on_progress, stage.find_asset = self.event, self.progress, self._asset
        stage.most_printed = job["most_printed"]
        return stage

    def _rules(self) -> list[sandbox.Rule]:
        """Returns what a contestant may read and write, for every request."""
        suite, target = self.suite, self.declared.target
        truths = {p for t in suite.targets for p in t.truths.values()}
        scored = {self.declared.truths[n] for n in self._truth_names(self.job["cells"])}
        answers = [str(p) for p in truths | scored]
        shown = [target.folder, *(target.folder / c for c in target.checkpoints.values())]
        # An asset is readable once it was requested (see `_lent`), unless it contains the target.
        asked = [str(p) for p in self.assets.paths.values()
                 if not any(_real(s).is_relative_to(_real(p)) for s in shown)]  # fmt: skip
        hidden = [*answers, *asked, str(suite.folder), *self.job["hidden"]]
        rules = sandbox.libraries(hidden)
        for module in self.job["plugins"]["modules"]:
            if module.endswith(".py"):
                rules += sandbox.granted(module, ())
        for path in shown:
            rules += sandbox.with_links(path, [*answers, *asked])
        for place in self._places_in_parameters(answers):
            rules += sandbox.with_links(place, [*answers, *self._corpora(), *self.job["hidden"]])
        rules += [(str(self.work / name), "read") for name in ("cwd", "lent")]
        return [*rules, (str(self.work / "tmp"), "write")]

    def _corpora(self) -> list[str]:
        """Lists the suite file and the files of its corpora, which hold queries and labels."""
        files = self.suite.corpus
        named = (files.train, files.queries, files.tuning_queries)
        return [str(self.suite.path), *(str(source[0]) for source in named if source)]

    def _places_in_parameters(self, answers: Sequence[str]) -> list[Path]:
        """Lists files and folders that the method's parameters name (such as an encoder).

        Only parameters that the user or the suite set count, not a plugin's defaults. Excluded
        are paths inside records, the cache or an installed suite, and folders that contain one
        of these, the suite's folder or a truth.
        """
        closed = [_real(h) for h in self.job["hidden"]]
        kept = [_real(p) for p in (*answers, str(self.suite.folder))]
        found = []
        for name, places in pointed_at(self.job["method"]).items():
            opened = []
            for place in places:
                inside = any(_real(place).is_relative_to(h) for h in closed)
                above = any(k.is_relative_to(_real(place)) for k in (*closed, *kept))
                if not (inside or above):
                    opened.append(place)
            if opened and len(opened) == len(places):
                self.pointed[name] = content_of(opened)
            found += opened
        return found

    def _parameter_values(self) -> list[Any]:
        """Lists the values of the method's parameters, lists flattened."""
        values = self.job["method"]["params"].values()
        return [v for value in values for v in (value if isinstance(value, list) else [value])]

    def _truth_names(self, cells: Sequence[Mapping[str, Any]]) -> list[str]:
        """Lists the declared truths that the cells score on."""
        kinds = [
            kind
            for c in cells
            for kind in (c.get("truth_kind"), *(c["benchmark"]["params"].get("also") or ()))
            if isinstance(kind, str)
        ]
        names = [truth_name(kind, self.job["split"]) for kind in kinds]
        return [n for n in dict.fromkeys(names) if n in self.declared.truths]

    def _give(self, corpus: Corpus) -> dict[str, Any]:
        path = self.work / "given" / f"{len(os.listdir(self.work / 'given'))}.jsonl"
        return write_corpus(path, corpus, self.labels)

    def new_folder(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.work / "scratch"))

    def _asset(self, name: str) -> dict[str, Any]:
        """Returns the answer to a contestant's request for an asset."""
        try:
            if name in self.job["withheld"] or name not in self.assets:
                there = [a for a in self.assets if a not in self.job["withheld"]]
                return {"error": name, "kind": "missing", "provided": there}
            path = self.assets[name]
            for kind in self._truth_names(self.job["cells"]):
                Truth.load(self.declared.truths[kind]).check_unseen(path)
            return {"path": str(self._lent(name, path))}
        except GuardError as e:
            return {"error": e.message, "remedy": e.remedy, "kind": "guard"}
        except TdabenchError as e:
            return {"error": e.message, "remedy": e.remedy, "kind": ""}

    def _lent(self, name: str, path: Path) -> Path:
        """Returns where a confined contestant may read an asset; unconfined, it reads the original.

        No rule can be added to a process that is confined, and one that may read all assets from
        the beginning would read them without a trace in the record. So a folder that it may read
        receives links to the files.
        """
        if not self.job["landlock"]:
            return path
        place = self.work / "lent" / fingerprint(name) / path.name
        if not place.exists():
            link_files(path, place)
        return place

    def settle(self, who: str, *places: Path) -> None:
        """Raises Refused if the method changed models, random generators or files of others."""
        message = {"do": "check", "who": who, "places": [str(p) for p in places]}
        self.stage.ask(message, phase="checks")

    def remarks(self, queries: Sequence[Example] = ()) -> dict[str, Any]:
        """Returns the contestant's remarks on how the target was measured."""
        message = {"do": "remarks", "queries": spelled(queries[:200], labels=False)}
        reply = self.stage.ask(message, phase="checks")[0]
        notes, gradients = reply.get("notes"), reply.get("gradients")
        return {
            "notes": [str(n)[:300] for n in notes[:5]] if isinstance(notes, list) else [],
            "gradients": gradients if isinstance(gradients, dict) else {},
        }

    # ------------------------------------------------------------------ the index

    def _index(self) -> tuple[RemoteIndex, dict[str, Any]]:
        """Returns the index as loaded from disk, built now or by an earlier run.

        Scores always come from the loaded index, in a process that did not build it, so that a
        resumed run and a fresh one agree, and the bytes on disk are complete.
        """
        folder = self.folder.indices / self.job["index_key"]
        index = RemoteIndex(self, folder / "index", self.given, len(self.train))
        cost = self._kept()
        if cost is not None:
            try:
                self.event("phase", phase="load", key="")
                index.open()
                return index, cost
            except Exception as e:
                traceback.print_exception(e)
                print(f"the kept index {folder} cannot be loaded: it is built again", flush=True)
                self.stage.ledger = Ledger()
        made = self.folder.new_index(self.job["index_key"])
        try:
            scratch, cost = self._build(self.given, len(self.train), made / "index")
            cost["phases"] = rounded(self.stage.ledger.phases)
            cost["left_running"] = list(self.stage.ledger.left_running)
            self.stage.ledger = Ledger()
            built = {"cost": cost, "assets": dict(self.assets.used)}
            self.folder.keep_index(made, self.job["index_key"], built)
        finally:
            remove(made)
        self.event("phase", phase="load", key="")
        self._open_without(index, scratch)
        if index.scratch_bytes:
            cost["scratch_bytes"] = index.scratch_bytes
            cost["index_bytes"] += index.scratch_bytes
            cost["bytes_per_example"] = cost["index_bytes"] / len(self.train)
        return index, cost

    def _open_without(self, index: RemoteIndex, scratch: Path) -> None:
        """Loads an index while the scratch folder of its build is moved away.

        If the index needs files from there, the folder is moved back and its bytes count.
        """
        aside = scratch.with_name(f".{scratch.name}")
        os.rename(scratch, aside)
        try:
            index.open()
        except Refused as e:
            if not folder_bytes(aside):
                raise
            os.rename(aside, scratch)
            index.scratch, index.scratch_bytes = scratch, folder_bytes(scratch)
            try:
                index.open()
            except Refused:
                raise e from None
        else:
            shutil.rmtree(aside, ignore_errors=True)

    def _kept(self) -> dict[str, Any] | None:
        """Returns the cost of the kept index if it is unchanged and was built with these assets."""
        built = self.folder.kept_index(self.job["index_key"])
        if built is None:
            return None
        try:
            cost, made_of = built["cost"], dict(built["assets"])
        except (KeyError, TypeError, ValueError):
            return None
        if any(self.assets.content(k) != v for k, v in made_of.items()):
            return None
        self.assets.used.update(made_of)
        return dict(cost)

    def _build(
        self, given: Mapping[str, Any], n: int, place: Path, quiet: bool = False
    ) -> tuple[Path, dict[str, Any]]:
        """Lets a contestant build an index on `given` and save it in `place`.

        Returns the scratch folder of the build, and its cost.
        """
        stage = self.stage
        scratch = self.new_folder("build")
        if not quiet:
            self.event("phase", phase="import", key="")
        stage.open(scratch, [(given["path"], "read"), (str(place), "write")], given)
        who = stage.who
        try:
            prepared = None
            if not quiet:
                self.event("phase", phase="build", key="")
                prepared = stage.ask({"do": "prepare"}, phase="prepare")[0].get("cost")
            with stage.memory() as cost:
                _, _, spent = stage.ask({"do": "build"}, phase="build")
            self.settle(f"{who}.build")
            if not quiet:
                self.event("phase", phase="save", key="")
            stage.ask({"do": "save", "path": str(place)}, phase="save")
            self.settle(f"{who}.save", place)
            remarks = self.remarks()
        finally:
            stage.close()
        if stage.used_torch:
            self.nursery.preload(self.declared.target.folder)
        cost |= {
            "seconds": round(spent.seconds, 6),
            "cpu_seconds": round(spent.cpu, 6),
            "setup_seconds": round(spent.setup, 4),
        }
        size = folder_bytes(place)
        return scratch, {
            "prepare": as_numbers(prepared),
            "build": cost,
            "index_bytes": size,
            "bytes_per_example": size / n if n else 0.0,
            "n_train": n,
            "remarks": remarks,
        }

    def _build_on(self, corpus: Corpus) -> Built:
        """Returns the method's index on another corpus, as loaded from disk, and its cost."""
        made = [part._remote_on(corpus) for part in self.parts]
        index = self._composed([remote for remote, _ in made])
        metered = MeteredIndex(index, self.who, len(corpus), self.parts[0].stage.clock)
        cost = self._cost_of_all([cost for _, cost in made])
        size = cost["index_bytes"] + sum(remote.scratch_bytes for remote, _ in made)
        built = cost["build"]
        return Built(metered, built["seconds"], built["peak_bytes"], size)

    def _remote_on(self, corpus: Corpus) -> tuple[RemoteIndex, dict[str, Any]]:
        """Builds the method of this part on another corpus."""
        outer, self.stage.ledger = self.stage.ledger, Ledger()
        try:
            given = self._give(corpus)
            place = Path(tempfile.mkdtemp(dir=self.work / "judge"))
            scratch, cost = self._build(given, len(corpus), place, quiet=True)
            remote = RemoteIndex(self, place, given, len(corpus))
            self._open_without(remote, scratch)
            remote.ready()
        finally:
            inner, self.stage.ledger = self.stage.ledger, outer
            for seconds, cpu in inner.phases.values():
                outer.add("other builds", seconds, cpu)
            outer.left_running += inner.left_running
        return remote, cost

    # ------------------------------------------------------------------ benchmarks

    def _look_at_checkpoints(self, cells: Sequence[Mapping[str, Any]]) -> None:
        """Raises GuardError if the method scores at a model that a truth was measured on.

        A contestant without a method computes the losses that are compared.
        """
        target = self.declared.target
        named = self._parameter_values()
        checkpoints = [c for c in target.checkpoints if c in named]
        if not checkpoints:
            return
        queries = self.suite.queries(self.job["split"])
        known: dict[str, np.ndarray] = {}
        wanted = {}
        for name in self._truth_names(cells):
            truth = Truth.load(self.declared.truths[name])
            start = truth.plan.get("start", "base")
            wanted[name] = [c for c in checkpoints if c != start]
        needed = list(dict.fromkeys(c for found in wanted.values() for c in found))
        if needed:
            hello = {**self.stage.hello, "method": None}
            clerk = Stage(self.nursery, self.stage.place, hello)
            try:
                clerk.open(self.new_folder("clerk"), [], {})
                for c in needed:
                    rows = spelled(queries, labels=False)
                    message = {"do": "losses", "checkpoint": c, "queries": rows}
                    _, out, _ = clerk.ask(message, most=8 * len(queries) + 64)
                    known[c] = out["losses"]
            finally:
                clerk.close()
                self.stage._imported = list(self.nursery.imported)
                self.stage.ledger.add("import", *self.nursery.imported)
        self.losses = KnownLosses(target.name, known)

    def _truth(self, kind: str, truths: Inputs, queries: Corpus) -> Truth:
        name = truth_name(kind, self.job["split"])
        if name not in truths:
            raise unknown(f"truth of the target {self.declared.label}", name, truths)
        found = Truth.load(truths[name])
        found.check(self.train, self.declared.target, self.declared.recipe_of(name))
        for part in self.parts:
            if name not in part.kept_apart and hasattr(part, "losses"):
                found.check_apart(part.losses, list(part.losses.known), queries)  # type: ignore[arg-type]
                part.kept_apart.add(name)
            for used in part.assets.used:
                found.check_unseen(part.assets.paths[used.partition(":")[2]])
        return found.for_queries(queries.ids)

    def _benchmark(
        self, cell: Mapping[str, Any], indices: Sequence[RemoteIndex], cost: Mapping[str, Any]
    ) -> Record:
        job, suite, declared = self.job, self.suite, self.declared
        who, name, split = self.who, cell["benchmark"]["name"], job["split"]
        queries, clock = suite.queries(split), self.parts[0].stage.clock
        held = list(zip(self.parts, indices, strict=True))
        index = self._composed(indices)
        metered = MeteredIndex(index, who, len(self.train), clock, self.memory)
        truths = Inputs(suite, declared.truths, "truth")
        others = {
            t.label: OtherTruths(suite, t, split)
            for t in suite.targets
            if t.label != declared.label and t.truths
        }
        benchmark = registry().benchmark(name).cls.from_params(cell["benchmark"]["params"])
        queries = benchmark.asked(queries)
        scratch = self.work / "judge" / cell["key"]
        scratch.mkdir(parents=True, exist_ok=True)
        context = BenchmarkContext(
            index=metered,
            target=declared.target,
            train=self.train,
            queries=queries,
            truth=lambda kind: self._truth(kind, truths, queries),
            scratch=scratch,
            seed=job["seed"],
            device=job["device"],
            params=cell["benchmark"]["params"],
            build=self._build_on,
            other_truths=others,
            assets=self.assets,
            cache=self.folder.path / "retrained",
            progress=self.progress,
        )
        for part in self.parts:
            part.stage.ledger = Ledger()
        remarks: list[dict[str, Any]] = []
        start = time.perf_counter()
        for remote in indices:
            remote.ready()
        with contextlib.ExitStack() as stack:
            memories = [stack.enter_context(part.stage.memory()) for part in self.parts]
            outcome = benchmark.run(context)
        memory = memories[0] if len(memories) == 1 else sum_of_memory(memories)
        for part, remote in held:
            stage = part.stage
            if stage.channel is not None and stage.holder is not None and stage.holder() is remote:
                part.settle(f"scoring with {stage.who}")
                remarks.append(part.remarks(queries))
        check_outcome(name, outcome)
        metrics = {k: finite(m.as_dict()) for k, m in outcome.metrics.items()}
        seconds = round(time.perf_counter() - start + cost["build"]["seconds"], 3)
        queried = metered.cost()
        ledgers = [part.stage.ledger for part in self.parts]
        for part in self.parts:
            part.stage.ledger = Ledger()
        shown = self._top_examples(cell, metered, queries, seconds)
        about: dict[str, Any] = {"query_ids": list(outcome.query_ids), "key": cell["key"]}
        if shown:
            about["top_query_ids"] = list(queries.ids)
        pooled = getattr(index, "pools", "never") != "never"  # else group scores are its own
        if "example_scores" in shown and benchmark.headline and pooled:
            about |= {"pooling": index.pooling, "temperature": index.temperature}
        else:
            shown = {k: v for k, v in shown.items() if k != "example_scores"}
        write_arrays(self.folder.arrays_path(cell["key"]), {**arrays_of(outcome), **shown}, about)
        all_ledgers = [*(part.loading for part in self.parts), *ledgers]
        running = [cost.get("left_running", ()), *(ledger.left_running for ledger in all_ledgers)]
        left = dict.fromkeys(note for notes in running for note in notes)
        phases = cost.get("phases", {})
        for ledger in all_ledgers:
            phases = joined(phases, rounded(ledger.phases))
        built = {k: v for k, v in cost.items() if k not in ("left_running", "remarks")}
        if "stages" in built:  # per stage; the rest of `query` is composition
            built["stages"] = [
                {**s, "query": {"seconds": round(of.scoring[0], 6),
                                "cpu_seconds": round(of.scoring[1], 6)}}
                for s, of in zip(built["stages"], ledgers)
            ]  # fmt: skip
        said = [cost.get("remarks") or {}, *remarks]
        notes = [*outcome.notes, *(n for part in said for n in part.get("notes", ())), *left]
        covered = [part["gradients"] for part in said if part.get("gradients")]
        return self.record(
            cell,
            "ok",
            primary=outcome.primary,
            metrics=metrics,
            notes=list(dict.fromkeys(notes)),
            **({"gradients": min(covered, key=_share)} if covered else {}),
            cost={
                **built,
                "query": {**queried, **memory},
                "phases": phases,
                "total": {
                    "seconds": round(sum(p["seconds"] for p in phases.values()), 6),
                    "cpu_seconds": round(sum(p["cpu_seconds"] for p in phases.values()), 6),
                },
            },
            inputs={
                **{k: v for part in self.parts for k, v in part.pointed.items()},
                **{k: v for part in self.parts for k, v in part.assets.used.items()},
                **self.assets.used,
                **truths.used,
                **{k: v for o in others.values() for k, v in o.files.used.items()},
            },
            seconds=seconds,
        )

    def _top_examples(
        self, cell: Mapping[str, Any], index: MeteredIndex, queries: Corpus, seconds: float
    ) -> dict[str, np.ndarray]:
        """Returns the top examples of every query, the same in all cells that ask these queries."""
        ids = tuple(queries.ids)
        if self.shown is None or self.shown[0] != ids:
            known = index.memory is not None and index.memory.get(queries) is not None
            one = 0.0 if known else index.seconds / max(1, index.queries)
            if too_long(one * len(queries), seconds, self.job["timeout"]):
                return {}
            self.event("phase", phase="top examples", key=cell["key"])
            self.shown = ids, top_examples(index, queries)
        return self.shown[1]


@dataclasses.dataclass
class KnownLosses:
    """A target whose losses on the queries are known, by checkpoint."""

    name: str
    known: Mapping[str, np.ndarray]

    def model(self, checkpoint: str) -> str:
        return checkpoint

    def tokenize(self, queries: Corpus) -> Corpus:
        return queries

    def losses(self, model: str, tokens: Corpus) -> np.ndarray:
        return self.known[model]


def _real(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


def link_files(path: Path, place: Path) -> None:
    """Makes a second name `place` for a file, or for every file in a folder, links followed.

    Copies where the file system does not allow a hard link.
    """
    if path.is_dir():
        place.mkdir(parents=True, exist_ok=True)
        for child in path.iterdir():
            link_files(child, place / child.name)
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    real = os.path.realpath(path)
    try:
        os.link(real, place)
    except OSError:
        shutil.copyfile(real, place)


def _share(covered: Mapping[str, Any]) -> float:
    share = covered.get("share")
    return float(share) if isinstance(share, (int, float)) else 1.0


def sum_of_memory(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Adds the memory of processes that exist at the same time."""
    keys = dict.fromkeys(k for c in costs for k in c if k.endswith("_bytes"))
    out: dict[str, Any] = {k: sum(c.get(k, 0) for c in costs) for k in keys}
    measured = {c.get("peak_measured") for c in costs}
    return {**out, "peak_measured": "phase" if measured == {"phase"} else "process"}


def as_numbers(cost: Any) -> dict[str, float] | None:
    """Keeps the finite numbers that a method reports about its preparation."""
    if not isinstance(cost, dict):
        return None
    numbers = {k: v for k, v in cost.items() if isinstance(v, (int, float)) and math.isfinite(v)}
    return {str(k): float(v) for k, v in numbers.items()} or None


def rounded(phases: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    return {
        k: {"seconds": round(v[0], 6), "cpu_seconds": round(v[1], 6)} for k, v in phases.items()
    }


def joined(
    a: Mapping[str, Mapping[str, float]], b: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Adds the phases of two parts of a cell's work."""
    out = {k: dict(v) for k, v in a.items()}
    for k, v in b.items():
        held = out.setdefault(k, {"seconds": 0.0, "cpu_seconds": 0.0})
        for what in held:
            held[what] = round(held[what] + v[what], 6)
    return out


def check_outcome(name: str, outcome: Any) -> None:
    """Raises TdabenchError unless a benchmark returned a well-formed outcome."""
    if not isinstance(outcome, Outcome):
        raise TdabenchError(f"benchmark {name} returned {type(outcome).__name__}, not an Outcome")
    if outcome.primary not in outcome.metrics:
        raise TdabenchError(f"benchmark {name} has no metric {outcome.primary!r}, its primary")
    if len(outcome.per_query) != len(outcome.query_ids):
        raise TdabenchError(
            f"benchmark {name} returned {len(outcome.per_query)} values for "
            f"{len(outcome.query_ids)} queries"
        )


def arrays_of(outcome: Outcome) -> dict[str, Any]:
    arrays = {"per_query": np.asarray(outcome.per_query), **outcome.arrays}
    if outcome.replicates is not None:
        arrays["replicates"] = np.asarray(outcome.replicates)
    return arrays


def finite(value: Any) -> Any:
    """Converts `value` for JSON, which has no NaN: non-finite numbers become null."""
    value = jsonable(value)
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value


def follow_parent() -> None:
    """Ends this process and all that it started when its parent ends or closes its stdin."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1):
                pass
        os._exit(1)  # the nurseries notice and end the processes below them

    threading.Thread(target=watch, daemon=True).start()


def main(argv: list[str]) -> int:
    with contextlib.suppress(AttributeError, ValueError):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    # Forked before the judge reads anything that a method must not know; one per stage.
    nurseries: list[Nursery] = []
    for _ in range(int(argv[1]) if len(argv) > 1 else 1):
        nurseries.append(Nursery(nurseries))
    events = os.dup(1)
    os.dup2(2, 1)  # printed text of a benchmark goes to the log
    follow_parent()
    job = read_json(Path(argv[0]))
    configure(**job["benchmark_plugins"])
    judge = Judge(job, nurseries, events)
    for nursery in nurseries:
        judge.event("nursery", pid=nursery.pid)
    judge.run()
    sys.stdout.flush()
    for nursery in nurseries:
        nursery.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
