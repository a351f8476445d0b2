"""The worker process: builds one index and runs its benchmarks, a record after each.

    python -m tdabench.run.worker job.json

It is a process of its own so that nothing a method does can reach another cell: a crash, a hang
or a leak ends here. Progress goes to an events file as one JSON line each; what the method
prints goes to a log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tdabench.benchmark import BenchmarkContext, Built, Outcome
from tdabench.data.examples import Corpus, Example
from tdabench.errors import MethodError, MissingAsset, MissingExtra, TdabenchError, brief, unknown
from tdabench.io import append_line, read_json, write_arrays
from tdabench.method import Context, Index
from tdabench.registry import configure, registry
from tdabench.run.folder import RunFolder, tail
from tdabench.run.meter import (
    GlobalRandomness,
    Memory,
    Meter,
    MeteredIndex,
    MeteredTarget,
    as_costs,
    folder_bytes,
)
from tdabench.run.plan import jsonable
from tdabench.run.record import Record
from tdabench.run.sources import load_suite
from tdabench.run.suite import Suite, SuiteTarget, truth_name
from tdabench.run.top import top_examples
from tdabench.run.watch import file_events, strays
from tdabench.targets.target import Target
from tdabench.truth.store import Truth


class Worker:
    """One job: what it was told, and where it puts things."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job = job
        self.folder = RunFolder(Path(job["folder"]))
        self.work = Path(job["work"])
        self.log = Path(job["log"])
        self.meter = Meter()
        self.memory = Memory()
        self.started = time.perf_counter()
        self.kept_apart: set[str] = set()  # truths that no checkpoint scored at is behind
        self._last_progress = 0.0

    # ------------------------------------------------------------------ telling

    def event(self, kind: str, **details: Any) -> None:
        append_line(self.work / "events.jsonl", {"event": kind, **details})

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
        status, reason = explain(error)
        if isinstance(error, MissingAsset) and not cells[0]["record"]["method"]["passed"]:
            status = "skipped"  # the suite lacks it; a name that the user passed is a mistake
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
            suite = load_suite(self.job["suite"])
            declared = suite.target(self.job["target"])
            target = MeteredTarget.of(declared.target, self.meter)
            assets = Inputs(suite, suite.assets_for(declared), "asset")
            method = self._method()
            context = Context(
                target=target,
                scratch=self._scratch("build"),
                seed=self.job["seed"],
                device=self.job["device"],
                assets=assets,
                progress=self.progress,
            )
            self.meter.watch_imports()
            train = suite.train
        except BaseException as e:
            self.fail(cells, e, {})
            return
        try:
            self.event("phase", phase="build", key="")
            index, cost = self._index(method, context, train, target, assets)
        except BaseException as e:
            self.fail(cells, e, {})
            return

        def build(corpus: Corpus) -> Built:
            return self._build_on(corpus, method, context)

        for cell in cells:
            self.event("phase", phase=cell["benchmark"]["name"], key=cell["key"])
            try:
                record = self._benchmark(cell, suite, declared, target, index, cost, assets, build)
            except BaseException as e:
                self.fail([cell], e, cost)
                if isinstance(e, (KeyboardInterrupt, SystemExit)):
                    raise
            else:
                self.finish(cell, record)

    @contextlib.contextmanager
    def _watched(self, who: str, target: MeteredTarget, *places: Path) -> Iterator[dict[str, Any]]:
        """Meters a phase; raises MethodError when the plugin left traces it must not leave.

        It may write to `places` besides its scratch folder.
        """
        randomness = GlobalRandomness()
        with file_events() as log, self.meter.phase() as phase:
            yield phase
        randomness.check(who)
        target.check_unchanged(who)
        ours = ("scratch", "tmp", "events.jsonl")
        cache = self.folder.path / "retrained"  # what benchmarks retrain is shared by methods
        found = strays(log, *(self.work / name for name in ours), cache, *places)
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise MethodError(
                f"{who} wrote outside its scratch folder: {found[0]}{more}",
                "Write below context.scratch only",
            )

    def _method(self) -> Any:
        cls = registry().method(self.job["method"]["name"]).cls
        return cls.from_params(self.job["method"]["params"])

    def _scratch(self, name: str) -> Path:
        path = self.work / "scratch" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _index(
        self, method: Any, context: Context, train: Any, target: MeteredTarget, assets: Inputs
    ) -> tuple[Index, dict[str, Any]]:
        """The index as loaded from disk, whether built now or by an earlier run.

        Scores always come from the loaded index: then a resumed run sees what a fresh one sees,
        and the bytes on disk are honest.
        """
        folder = self.folder.indices / self.job["index_key"]
        cost = self._kept(assets)
        if cost is not None:
            try:
                return self._load(method, context, target, folder), cost
            except Exception as e:
                traceback.print_exception(e)
                print(f"the kept index {folder} cannot be loaded: it is built again", flush=True)
        cost = self._build(method, context, train, target, assets)
        return self._load(method, context, target, folder), cost

    def _load(self, method: Any, context: Context, target: MeteredTarget, folder: Path) -> Index:
        name = self.job["method"]["name"]
        self.event("phase", phase="load", key="")
        with self._watched(f"{name}.load", target):
            index = method.load(context, folder / "index")
        if not isinstance(index, Index):
            raise MethodError(f"{name}.load returned {type(index).__name__}, expected an Index")
        return index

    def _kept(self, assets: Inputs) -> dict[str, Any] | None:
        """The cost of the kept index, if that is as it was written and made of these assets."""
        built = self.folder.kept_index(self.job["index_key"])
        if built is None:
            return None
        try:
            cost, made_of = built["cost"], dict(built["assets"])
        except (KeyError, TypeError, ValueError):
            return None
        if any(assets.content(k) != v for k, v in made_of.items()):
            return None
        assets.used.update(made_of)
        return dict(cost)

    def _build(
        self,
        method: Any,
        context: Context,
        train: Any,
        target: MeteredTarget,
        assets: Inputs,
    ) -> dict[str, Any]:
        name = self.job["method"]["name"]
        with self._watched(f"{name}.build", target) as phase:
            index = method.build(context, train)
        if not isinstance(index, Index):
            raise MethodError(f"{name}.build returned {type(index).__name__}, expected an Index")
        covers = getattr(index, "n_train", None)
        if covers != len(train):
            raise MethodError(f"{name} built an index of {covers} examples, not {len(train)}")
        self.event("phase", phase="save", key="")
        temporary = self.folder.new_index(self.job["index_key"])
        with self._watched(f"{name}.save", target, temporary / "index"):
            index.save(temporary / "index")
        size = folder_bytes(temporary / "index")
        cost = {
            "prepare": as_costs(method.prepare_cost(context)),
            "build": phase,
            "index_bytes": size,
            "bytes_per_example": size / len(train),
            "n_train": len(train),
        }
        built = {"cost": cost, "assets": dict(assets.used)}
        self.folder.keep_index(temporary, self.job["index_key"], built)
        return cost

    def _build_on(self, corpus: Corpus, method: Any, context: Context) -> Built:
        """The method's index on another corpus, as loaded from disk, and what it cost."""
        name = self.job["method"]["name"]
        folder = Path(tempfile.mkdtemp(dir=self._scratch("built")))
        (folder / "scratch").mkdir()
        (folder / "index").mkdir()
        inner = dataclasses.replace(context, scratch=folder / "scratch")
        with self.meter.phase() as phase:
            index = method.build(inner, corpus)
        if getattr(index, "n_train", None) != len(corpus):
            raise MethodError(f"{name} did not build an index of the {len(corpus)} examples given")
        index.save(folder / "index")
        loaded = MeteredIndex(method.load(inner, folder / "index"), name, len(corpus), self.meter)
        size = folder_bytes(folder / "index")
        return Built(loaded, phase["seconds"], phase["peak_bytes"], size)

    def _benchmark(
        self,
        cell: Mapping[str, Any],
        suite: Suite,
        declared: SuiteTarget,
        target: MeteredTarget,
        index: Index,
        cost: Mapping[str, Any],
        assets: Inputs,
        build: Callable[[Corpus], Built],
    ) -> Record:
        who = self.job["method"]["name"]
        name = cell["benchmark"]["name"]
        split = self.job["split"]
        train, queries = suite.train, suite.queries(split)
        metered = MeteredIndex(index, who, len(train), self.meter, self.memory)
        truths = Inputs(suite, declared.truths, "truth")

        def truth(kind: str) -> Truth:
            name = truth_name(kind, split)
            if name not in truths:
                raise unknown(f"truth of the target {declared.label}", name, truths)
            found = Truth.load(truths[name])
            found.check(train, target, declared.recipe_of(name))
            if name not in self.kept_apart:
                params = self.job["method"]["params"].values()
                named = [p for v in params for p in (v if isinstance(v, list) else [v])]
                scored_at = [c for c in target.checkpoints if c in named]
                found.check_apart(target, scored_at, queries)
                self.kept_apart.add(name)
            for used in assets.used:
                found.check_unseen(assets.paths[used.partition(":")[2]])
            return found.for_queries(queries.ids)

        others = {
            t.label: OtherTruths(suite, t, split)
            for t in suite.targets
            if t.label != declared.label and t.truths
        }

        benchmark = registry().benchmark(name).cls.from_params(cell["benchmark"]["params"])
        context = BenchmarkContext(
            index=metered,
            target=target,
            train=train,
            queries=queries,
            truth=truth,
            scratch=self._scratch(cell["key"]),
            seed=self.job["seed"],
            device=self.job["device"],
            params=cell["benchmark"]["params"],
            build=build,
            other_truths=others,
            assets=assets,
            cache=self.folder.path / "retrained",
            progress=self.progress,
        )
        start = time.perf_counter()
        with self._watched(f"scoring with {who}", target) as phase:
            outcome = benchmark.run(context)
        check_outcome(name, outcome)
        memory = {k: v for k, v in phase.items() if k not in ("seconds", "cpu_seconds")}
        metrics = {k: finite(m.as_dict()) for k, m in outcome.metrics.items()}
        seconds = round(time.perf_counter() - start + cost["build"]["seconds"], 3)
        queried = metered.cost()
        shown = top_examples(metered, queries, queried["seconds"]) if cell["headline"] else {}
        write_arrays(
            self.folder.arrays_path(cell["key"]),
            {**arrays_of(outcome), **shown},
            {"query_ids": list(outcome.query_ids), "key": cell["key"]},
        )
        return self.record(
            cell,
            "ok",
            primary=outcome.primary,
            metrics=metrics,
            notes=[*outcome.notes, *target_notes(target, train, queries)],
            **gradient_coverage(),
            cost={**cost, "query": {**queried, **memory}},
            inputs={
                **assets.used,
                **truths.used,
                **{k: v for o in others.values() for k, v in o.files.used.items()},
            },
            seconds=seconds,
        )


class Inputs(Mapping[str, Path]):
    """Declared files by name, each checked against its hash when first asked for.

    Which ones were asked for is recorded with their content: a record made with another
    encoder, say, is not taken for this one's.
    """

    def __init__(self, suite: Suite, paths: Mapping[str, Path], kind: str) -> None:
        self.suite, self.paths, self.kind = suite, paths, kind
        self.used: dict[str, str] = {}

    def __getitem__(self, name: str) -> Path:
        path = self.paths[name]
        if f"{self.kind}:{name}" not in self.used:
            self.suite.verify(path)
            self.used[f"{self.kind}:{name}"] = self.suite.content(path)
        return path

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __contains__(self, name: object) -> bool:
        return name in self.paths

    def content(self, used: str) -> str:
        """What the input recorded as `kind:name` holds now."""
        path = self.paths.get(used.partition(":")[2])
        return self.suite.content(path) if path is not None and path.exists() else ""


class OtherTruths:
    """Opens the truths of another target of the suite, for queries of one split."""

    def __init__(self, suite: Suite, declared: SuiteTarget, split: str) -> None:
        self.suite, self.declared, self.split = suite, declared, split
        self.files = Inputs(suite, declared.truths, f"truth@{declared.label}")

    def __call__(self, kind: str) -> Truth:
        name = truth_name(kind, self.split)
        if name not in self.files:
            raise unknown(f"truth of the target {self.declared.label}", name, self.files)
        found = Truth.load(self.files[name])
        found.check(self.suite.train, self.declared.target, self.declared.recipe_of(name))
        return found.for_queries(self.suite.queries(self.split).ids)


def gradient_coverage() -> dict[str, Any]:
    """Returns the record's field `gradients`: the smallest share of the weights that an engine of
    this process covered; empty if it computed no gradients."""
    module = sys.modules.get("tdabench.toolkit.coverage")
    if module is None or not module.covered:
        return {}
    return {"gradients": min(module.covered, key=lambda c: c.share).as_dict()}


def target_notes(target: Target, *corpora: Sequence[Example]) -> list[str]:
    """Returns remarks on how the target was measured, for the board's footnotes."""
    module = sys.modules.get("tdabench.toolkit.coverage")
    found = [c.warning for c in module.covered] if module is not None else []
    if "tokenizer" in target.__dict__:  # something was tokenised
        some = [e for corpus in corpora for e in corpus[:200]]
        if apart := target.apart(some):
            found.append(
                f"{apart} of the first {len(some)} examples have other tokens if prompt and "
                "response are tokenised as one text (docs/models.md)"
            )
    return list(dict.fromkeys(filter(None, found)))


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
    import numpy as np

    arrays = {"per_query": np.asarray(outcome.per_query), **outcome.arrays}
    if outcome.replicates is not None:
        arrays["replicates"] = np.asarray(outcome.replicates)
    return arrays


def finite(value: Any) -> Any:
    """`value` for JSON, which has no NaN: what is not finite becomes null."""
    value = jsonable(value)
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, float) and (value != value or abs(value) == float("inf")):
        return None
    return value


def explain(error: BaseException) -> tuple[str, str]:
    """Status and reason of a failure; for a bug in a plugin, also where it was raised."""
    if isinstance(error, TdabenchError):
        return ("skipped" if isinstance(error, MissingExtra) else "failed"), str(error)
    reason = brief(error)
    memory = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
    if memory or "can't allocate memory" in str(error) or "not enough memory" in str(error):
        return "oom", reason
    frames = traceback.extract_tb(error.__traceback__)
    if frames:
        last = frames[-1]
        reason += f" (in {last.name}, {Path(last.filename).name}:{last.lineno})"
    return "failed", reason


def follow_parent(parent: int) -> None:
    """Ends this process when the one that started it is gone: no orphan keeps computing."""
    try:
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        pass  # not Linux: the thread below does it

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: list[str]) -> int:
    job = read_json(Path(argv[0]))
    follow_parent(job["parent"])
    configure(**job["plugins"])
    os.chdir(job["cwd"])
    Worker(job).run()
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
