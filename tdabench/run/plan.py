"""Plans a request: which (method, target, benchmark, seed) cells to measure.

Planning reads files and hashes them, and imports neither torch nor transformers, so that a run
whose cells are all on disk is fast.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tdabench.errors import TdabenchError, UsageError, relative, unknown
from tdabench.io import fingerprint
from tdabench.method import TDAMethod
from tdabench.registry import Origin, registry
from tdabench.run.keys import SCHEMA, cell_key
from tdabench.run.sources import load_suite
from tdabench.run.suite import Suite, SuiteTarget, Variant, truth_name
from tdabench.toolkit.pipeline import RESTS, PipelineName
from tdabench.toolkit.pipeline import VERSION as PIPELINE_VERSION


@dataclass(frozen=True)
class Request:
    """The user's request. `None` means the suite's default."""

    suite: str = "pocket"
    methods: tuple[str, ...] | None = None
    targets: tuple[str, ...] | None = None
    benchmarks: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    sets: tuple[str, ...] = ()
    split: str = "test"
    device: str = "cpu"

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Request:
        """Reads the request in a manifest. Raises UsageError if it is invalid."""
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(data, Mapping):
            raise UsageError(f"the manifest's request must be a table, not {data!r}")
        if set(data) - known:
            raise UsageError(f"the manifest requests {sorted(set(data) - known)[0]!r}, unknown")
        values: dict[str, Any] = {}
        for key, value in data.items():
            if key in ("suite", "split", "device"):
                fits = isinstance(value, str)
            else:
                kind = int if key == "seeds" else str
                fits = value is None or (
                    isinstance(value, (list, tuple)) and all(type(v) is kind for v in value)
                )
            if not fits:
                raise UsageError(f"the manifest's request has an invalid {key}: {value!r}")
            values[key] = tuple(value) if isinstance(value, list) else value
        if values.get("seeds") is not None and any(s < 0 for s in values["seeds"]):
            raise UsageError("the manifest requests a negative seed")
        return cls(**values)


@dataclass(frozen=True)
class MethodSpec:
    """A method as it runs on one target: resolved parameters, and their sources."""

    label: str
    name: str
    version: int
    family: str
    origin: Origin
    params: Mapping[str, Any]
    passed: Mapping[str, Any]
    tuned: Mapping[str, Any]
    suite: Mapping[str, Any]
    stages: tuple[MethodSpec, ...] = ()  # of a pipeline

    @property
    def identity(self) -> list[Any]:
        """The parts that change scores: name, version and parameters."""
        kept = {k: v for k, v in self.params.items() if k not in self.ignored}
        return [self.name, self.version, kept]

    @property
    def ignored(self) -> list[str]:
        """The parameters that change no score."""
        if self.stages:
            return []
        cls = registry().method(self.name).cls
        fields = dataclasses.fields(cls)
        return sorted(f.name for f in fields if f.metadata.get("changes_scores") is False)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "label": self.label,
            "version": self.version,
            "plugin": str(self.origin),
            "family": self.family,
            "passed": dict(self.passed),
            "tuned": dict(self.tuned),
            "suite": dict(self.suite),
            "params": dict(self.params),
            "ignored": self.ignored,
            **({"stages": [s.as_dict() for s in self.stages]} if self.stages else {}),
        }


@dataclass(frozen=True)
class BenchmarkSpec:
    """A benchmark with resolved parameters, and the name of the truth that it needs, if any."""

    name: str
    version: int
    params: Mapping[str, Any]
    truth: str | None
    headline: bool = False
    slow: bool = False

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "version": self.version, "params": dict(self.params)}


@dataclass(frozen=True)
class Cell:
    """One measurement. `key` covers everything that changes its result and nothing else.

    `skip` holds the reason if it cannot be measured (such as a missing truth).
    """

    key: str
    method: MethodSpec
    target: SuiteTarget
    benchmark: BenchmarkSpec
    seed: int
    truth: str | None
    skip: str = ""

    @property
    def title(self) -> str:
        seed = f" seed {self.seed}" if self.seed else ""
        return f"{self.method.label} · {self.target.label} · {self.benchmark.name}{seed}"


@dataclass(frozen=True)
class Job:
    """The cells of one method, target and seed: one index, one process.

    The headline benchmark comes first: the query time and memory that a board shows are of a cell
    that computed its scores. Slow benchmarks come last.
    """

    method: MethodSpec
    target: SuiteTarget
    seed: int
    index_key: str
    cells: tuple[Cell, ...]
    stage_keys: tuple[str, ...] = ()  # of the indices of a pipeline's stages

    @property
    def kept_keys(self) -> tuple[str, ...]:
        """Keys of the indices on disk: a pipeline keeps its stages' indices."""
        return self.stage_keys or (self.index_key,)

    @property
    def title(self) -> str:
        return f"{self.method.label} on {self.target.label}" + (
            f", seed {self.seed}" if self.seed else ""
        )


@dataclass
class Plan:
    """Every cell of a request, in the order of methods, targets, seeds, benchmarks.

    `builds` are the indices that the request needs, as jobs without cells.
    """

    request: Request
    suite: Suite
    cells: list[Cell]
    corpora: dict[str, str]  # {"train", "queries"}: fingerprints; queries where cells are planned
    targets: list[SuiteTarget]
    fingerprints: dict[str, str] = field(default_factory=dict)  # target label -> fingerprint
    twins: dict[str, str] = field(default_factory=dict)  # label -> the identical label
    builds: list[Job] = field(default_factory=list)

    def jobs(self, cells: Iterable[Cell]) -> list[Job]:
        """Groups `cells` so that each index is built once."""
        grouped: dict[str, list[Cell]] = {}
        for cell in cells:
            key = self.index_key(cell.method, cell.target, cell.seed)
            grouped.setdefault(key, []).append(cell)
        jobs = []
        for of_index in grouped.values():
            first = sorted(of_index, key=lambda c: (not c.benchmark.headline, c.benchmark.slow))
            cell = first[0]
            jobs.append(self.job(cell.method, cell.target, cell.seed, tuple(first)))
        return jobs

    def job(
        self, method: MethodSpec, target: SuiteTarget, seed: int, cells: tuple[Cell, ...] = ()
    ) -> Job:
        """Returns the job of a method on a target, with the keys of the indices that it needs."""
        keys = tuple(self.index_key(s, target, seed) for s in method.stages)
        return Job(method, target, seed, self.index_key(method, target, seed), cells, keys)

    def index_key(self, method: MethodSpec, target: SuiteTarget, seed: int) -> str:
        """Returns a key of everything that `build` depends on, for safe reuse of indices."""
        return fingerprint(
            [
                SCHEMA,
                "index",
                jsonable(method.identity),
                self.fingerprints[target.label],
                self.corpora["train"],
                seed,
                _device(self.request.device),
            ]
        )


def check_names(suite: Suite, request: Request) -> None:
    """Raises UsageError for an unknown method, parameter or benchmark of a request."""
    chosen = _methods(suite, request.methods)
    names = _benchmarks(suite, request.benchmarks)
    overrides, measured = _overrides(request.sets, chosen, names)
    for variant in chosen:
        _method(suite, variant, suite.targets[0], overrides.get(variant.label, {}))
    for name in names:
        _benchmark(suite, name, measured.get(name, {}))


def make_plan(request: Request, data_dir: Path | None = None) -> Plan:
    """Resolves every name and parameter, reads the corpora and computes the cell keys.

    Hub files of the suite are searched in `data_dir` first. Raises UsageError or DataError, naming
    the first error.
    """
    plan, benchmarks = _plan(request, data_dir, measures=True)
    plan.corpora["queries"] = plan.suite.queries(request.split).fingerprint
    truths: dict[Path, str] = {}
    seen: dict[tuple[str, str], str] = {}
    for build in plan.builds:
        for benchmark in benchmarks:
            spec, target = build.method, build.target
            cell = _cell(plan, truths, spec, target, benchmark, build.seed)
            # Two labels with the same resolved parameters are one measurement.
            first = seen.setdefault((target.label, cell.key), spec.label)
            if first == spec.label:
                plan.cells.append(cell)
            else:
                plan.twins[spec.label] = first
    return plan


def plan_indices(request: Request, data_dir: Path | None = None) -> Plan:
    """Returns a plan of the indices that a request needs, without cells: `Plan.builds`.

    Asks the suite for neither queries nor benchmarks. Raises as `make_plan`.
    """
    return _plan(request, data_dir, measures=False)[0]


def _plan(
    request: Request, data_dir: Path | None, measures: bool
) -> tuple[Plan, list[BenchmarkSpec]]:
    """Returns a plan without cells, and the benchmarks if it `measures` anything."""
    suite = load_suite(request.suite, data_dir, _opened(request))
    targets = _targets(suite, request.targets)
    chosen = _methods(suite, request.methods)
    names = _benchmarks(suite, request.benchmarks) if measures else []
    overrides, measured = _overrides(request.sets, chosen, names)
    benchmarks = [_benchmark(suite, name, measured.get(name, {})) for name in names]
    seeds = request.seeds if request.seeds is not None else suite.seeds
    specs = {(v.label, t.label): _spec(suite, v, t, overrides) for v in chosen for t in targets}
    corpora = {"train": suite.train.fingerprint}
    for t in targets:
        suite.verify(t.target.folder)
    fingerprints = {t.label: t.target.fingerprint for t in targets}
    plan = Plan(request, suite, [], corpora, targets, fingerprints)
    for variant in chosen:
        for target in targets:
            for seed in seeds:
                spec = specs[variant.label, target.label]
                plan.builds.append(plan.job(spec, target, seed))
    return plan, benchmarks


def _cell(
    plan: Plan,
    truths: dict[Path, str],
    method: MethodSpec,
    target: SuiteTarget,
    benchmark: BenchmarkSpec,
    seed: int,
) -> Cell:
    truth, skip = None, ""
    if benchmark.truth is not None:
        name = truth_name(benchmark.truth, plan.request.split)
        path = target.truths.get(name)
        if path is None:
            skip = f"the target {target.label} declares no truth {name!r}"
        elif name in target.plans and not path.exists():
            skip = (
                f"the truth {name!r} of {target.label} is planned but not built: no "
                f"{relative(str(path))} (tdabench truth build {plan.request.suite} --in-place)"
            )
        else:
            if path not in truths:
                plan.suite.verify(path)
                truths[path] = plan.suite.content(path)
            truth = truths[path]
    key = cell_key(
        jsonable(method.identity),
        plan.fingerprints[target.label],
        plan.corpora,
        [benchmark.name, benchmark.version, benchmark.params],
        truth,
        seed,
        plan.request.device,
    )
    return Cell(key, method, target, benchmark, seed, truth, skip)


def _device(device: str) -> str:
    """Returns the kind of device: cuda:0 and cuda:1 give the same scores."""
    return device.partition(":")[0]


# --------------------------------------------------------------------------- names


def _opened(request: Request) -> Sequence[str] | None:
    """Returns the targets whose models a request needs, () for the main ones, None for all.

    A model may have to be fetched and converted. Transfer compares with truths of other targets.
    """
    named = {*(request.targets or ()), *(request.benchmarks or ())}
    return None if named & {"all", "transfer"} else tuple(request.targets or ())


def _targets(suite: Suite, asked: Sequence[str] | None) -> list[SuiteTarget]:
    if asked is None:
        return list(suite.main_targets)
    if "all" in asked:
        return list(suite.targets)
    return [suite.target(label) for label in dict.fromkeys(asked)]


def _benchmarks(suite: Suite, asked: Sequence[str] | None) -> list[str]:
    if asked is None:
        return list(suite.default_benchmarks)
    if "all" in asked:
        return list(registry().benchmarks)
    return list(dict.fromkeys(asked))


def _methods(suite: Suite, asked: Sequence[str] | None) -> list[Variant]:
    """Returns the selected methods as variants: a plain name is a variant without parameters."""
    if asked is None:
        asked = suite.default_methods or tuple(registry().methods)
    labels: list[str] = []
    for word in asked:
        labels += [*registry().methods, *suite.variants] if word == "all" else [word]
    chosen = []
    for label in labels:
        pipeline = PipelineName.parse(suite.variants[label].method if label in suite.variants
                                      else label)  # fmt: skip
        for stage in pipeline.stages if pipeline else ():
            if (variant := _variant(suite, stage)).pipeline is not None:
                raise UsageError(f"{label}: the stage {variant.label} is itself a pipeline")
        chosen.append(
            replace(suite.variants[label], pipeline=pipeline) if label in suite.variants
            else Variant(str(pipeline), str(pipeline), pipeline=pipeline) if pipeline
            else _variant(suite, label)
        )  # fmt: skip
    return list({v.label: v for v in chosen}.values())


def _variant(suite: Suite, label: str) -> Variant:
    """Returns the method of that name, or the suite's variant. Raises UsageError if unknown."""
    if label in suite.variants:
        variant = suite.variants[label]
        if PipelineName.parse(variant.method) is None:
            registry().method(variant.method)
        return replace(variant, pipeline=PipelineName.parse(variant.method))
    try:
        registry().method(label)
    except UsageError as e:
        if "unknown" not in e.message:
            raise
        known = [*registry().methods, *suite.variants]
        error = unknown("method", label, known, "List them with: tdabench methods")
        error.remedy = e.remedy if "Broken" in e.remedy or not known else error.remedy
        raise error from None
    return Variant(label, label)


def _overrides(
    sets: Sequence[str], chosen: Sequence[Variant], benchmarks: Sequence[str]
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """Parses `--set NAME.PARAM=VALUE`: parameters by label of a method, and by benchmark.

    NAME is a label, a method (all its labels), or a benchmark. A method that runs only as a stage
    of pipelines can be named, too.
    """
    staged = {stage for v in chosen if v.pipeline for stage in v.pipeline.stages}
    methods: dict[str, dict[str, str]] = {}
    measured: dict[str, dict[str, str]] = {}
    for text in sets:
        left, equals, value = text.partition("=")
        name, dot, param = left.strip().rpartition(".")
        if not (equals and dot and name and param):
            raise UsageError(f"--set {text!r} does not have the form NAME.PARAMETER=VALUE")
        labels = [v.label for v in chosen if v.label == name] or [
            v.label for v in chosen if v.method == name
        ]
        if name in staged:
            labels.append(name)
        if not labels and name in benchmarks:
            measured.setdefault(name, {})[param] = value
        elif not labels:
            known = {*staged, *(v.label for v in chosen), *(v.method for v in chosen), *benchmarks}
            what = "method or benchmark in --set" if benchmarks else "method in --set"
            raise unknown(what, name, known, "It must be one of those that run")
        for label in dict.fromkeys(labels):
            methods.setdefault(label, {})[param] = _whole_path(value)
    return methods, measured


def _whole_path(value: Any, near: Path | None = None) -> Any:
    """Makes a relative path to something that exists absolute: methods run in another folder.

    Paths are relative to `near` (a suite's folder), or to the working folder.
    """
    if not isinstance(value, str) or "/" not in value or value.startswith("/"):
        return value
    path = os.path.join(near or Path.cwd(), os.path.expanduser(value))
    return os.path.abspath(path) if os.path.exists(path) else value


def _spec(
    suite: Suite, variant: Variant, target: SuiteTarget, overrides: Mapping[str, Mapping[str, str]]
) -> MethodSpec:
    """Resolves a method, or a pipeline with every stage."""
    passed = overrides.get(variant.label, {})
    if variant.pipeline is None:
        return _method(suite, variant, target, passed)
    name = variant.pipeline
    stages = tuple(
        _method(suite, _variant(suite, label), target, overrides.get(label, {}))
        for label in name.stages
    )
    settings = {"rest": "rank", **variant.params, **passed}
    if strange := set(settings) - {"rest"}:
        raise unknown(f"parameter of {variant.label}", min(strange), ("rest",))
    if settings["rest"] not in RESTS:
        raise UsageError(f"{variant.label}.rest = {settings['rest']!r}",
                         f"One of: {', '.join(RESTS)}")  # fmt: skip
    shown = str(PipelineName(tuple(s.label for s in stages), name.keep))
    label = shown if variant.label == str(name) else variant.label
    if settings["rest"] != variant.params.get("rest", "rank"):
        label += f"[rest={settings['rest']}]"
    return MethodSpec(
        label=label,
        name=">".join(s.name for s in stages),
        version=PIPELINE_VERSION,
        family="pipeline",
        origin=stages[-1].origin,
        # Every part that changes scores: `identity` covers it.
        params={
            "keep": list(name.keep),
            "rest": settings["rest"],
            "stages": [jsonable(s.identity) for s in stages],
        },
        passed=dict(passed),
        tuned={},
        suite=dict(variant.params),
        stages=stages,
    )


def _method(
    suite: Suite, variant: Variant, target: SuiteTarget, passed: Mapping[str, str]
) -> MethodSpec:
    """Resolves parameters; later wins: defaults, the suite, tuned values, the variant, --set."""
    entry = registry().method(variant.method)
    cls: type[TDAMethod] = entry.cls
    base = {
        **suite.method_params.get(variant.method, {}),
        **suite.method_params.get(variant.label, {}),
    }
    tuned_here = suite.tuned.get(target.label, {})
    tuned = {**tuned_here.get(variant.method, {}), **tuned_here.get(variant.label, {})}
    base, tuned, fixed = (
        {k: _whole_path(v, suite.folder) for k, v in part.items()}
        for part in (base, tuned, variant.params)
    )
    source = f"suite {suite.name}" if not passed else "--set"
    try:
        before = cls.from_params({**base, **tuned, **fixed})
        method = cls.from_params({**base, **tuned, **fixed, **passed})
    except TdabenchError as e:
        raise UsageError(f"{source}: {e.message}", e.remedy) from e
    except Exception as e:
        raise UsageError(f"{source}: {variant.method} refuses its parameters: {e}") from e
    params = jsonable(method.params)
    given = {k: params[k] for k in passed}
    altered = {k: v for k, v in given.items() if v != jsonable(before.params)[k]}
    # Other parameters are another row, named in the label.
    suffix = ",".join(f"{k}={_short(v)}" for k, v in sorted(altered.items()))
    return MethodSpec(
        label=f"{variant.label}[{suffix}]" if suffix else variant.label,
        name=cls.name,
        version=cls.version,
        family=cls.family,
        origin=entry.origin,
        params=params,
        passed=given,
        tuned={k: params[k] for k in tuned if k not in variant.params and k not in given},
        suite={k: params[k] for k in {**base, **variant.params} if k not in given},
    )


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _benchmark(suite: Suite, name: str, given: Mapping[str, str]) -> BenchmarkSpec:
    cls = registry().benchmark(name).cls
    benchmark = cls.from_params({**suite.benchmark_params.get(name, {}), **given})
    params = {f.name: getattr(benchmark, f.name) for f in dataclasses.fields(cls)}
    # The parameter `truth` of a benchmark may name another truth of its kind.
    truth = params.get("truth", cls.truth_kind) if cls.truth_kind else None
    return BenchmarkSpec(cls.name, cls.version, jsonable(params), truth, cls.headline, cls.slow)


def jsonable(value: Any) -> Any:
    """Converts `value` to JSON types: tuples become lists, numpy scalars numbers."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    return jsonable(value.item()) if hasattr(value, "item") else str(value)
