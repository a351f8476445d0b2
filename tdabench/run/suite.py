"""Suites: a TOML file that names a corpus, targets with their truths, methods and benchmarks.

The format is strict, since a misspelt key that is ignored changes a result in silence: an
unknown key, a missing one or a wrong type is one line that names the file and the key. See
docs/suites.md.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tdabench.data.examples import Corpus
from tdabench.data.files import STREAM_BYTES, read_corpus
from tdabench.data.layouts import Reading
from tdabench.errors import DataError, UsageError, did_you_mean, unknown
from tdabench.io import fingerprint, sha256_file
from tdabench.registry import NAME, registry
from tdabench.targets.target import Target

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]*")
FETCHED = ("hub:", "package:")  # what begins so is no path beside the suite file


@dataclass(frozen=True)
class PlanSpec:
    """How a truth of a suite is made: random groups of a fraction of the pool, seeds a group.

    `recipe` overrides fields of `tdabench.targets.Recipe`; `start` is a checkpoint, or "scratch".
    `order` and `groups_of` are those of `tdabench.truth.TruthPlan.draw`.
    """

    groups: int
    fraction: float
    seeds: int
    queries: str = "test"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    start: str = "base"
    order: str = "own"
    groups_of: str = ""


@dataclass(frozen=True)
class SuiteTarget:
    """A target as a suite declares it: where it lies, its truths and its own assets."""

    label: str
    target: Target
    truths: Mapping[str, Path]
    assets: Mapping[str, Path]
    main: bool = False
    plans: Mapping[str, PlanSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A method under a label, with the parameters that make it another row."""

    label: str
    method: str
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CorpusFiles:
    """Files and split names of the training pool, the queries and the tuning queries.

    `reading` says how their rows become examples.
    """

    train: tuple[Path, str | None]
    queries: tuple[Path, str | None]
    tuning_queries: tuple[Path, str | None] | None
    reading: Reading = field(default_factory=Reading)


@dataclass(frozen=True)
class Published:
    """A row that others published on this suite's truth: shown beside ours, never ranked.

    `ours` is the method of ours that it corresponds to, or "".
    """

    method: str
    value: float
    benchmark: str = "lds"
    ours: str = ""
    note: str = ""
    source: str = ""


@dataclass(frozen=True)
class Suite:
    """What a suite file says, checked. Corpora and assets are read, and hashed, on use."""

    name: str
    version: int
    summary: str
    path: Path
    seeds: tuple[int, ...]
    corpus: CorpusFiles
    targets: tuple[SuiteTarget, ...]
    assets: Mapping[str, Path]
    hashes: Mapping[Path, str]
    default_methods: tuple[str, ...]
    method_params: Mapping[str, Mapping[str, Any]]
    variants: Mapping[str, Variant]
    tuned: Mapping[str, Mapping[str, Mapping[str, Any]]]
    default_benchmarks: tuple[str, ...]
    benchmark_params: Mapping[str, Mapping[str, Any]]
    fingerprint: str
    published: tuple[Published, ...] = ()
    fetched: bool = False  # whether some of its files are named by hub:, package: or model
    sources: Mapping[str, str] = field(default_factory=dict)  # as named -> as found, pinned
    missing: tuple[str, ...] = ()  # assets that could not be had, and why

    def __hash__(self) -> int:
        return hash((self.path, self.fingerprint))

    @property
    def folder(self) -> Path:
        return self.path.parent

    # ------------------------------------------------------------------ targets

    def target(self, label: str) -> SuiteTarget:
        for t in self.targets:
            if t.label == label:
                return t
        raise unknown(f"target of suite {self.name}", label, [t.label for t in self.targets])

    @property
    def main_targets(self) -> tuple[SuiteTarget, ...]:
        """Those marked `main = true`, or all when none is."""
        return tuple(t for t in self.targets if t.main) or self.targets

    def assets_for(self, target: SuiteTarget) -> dict[str, Path]:
        """Assets by name; those of the target hide the suite's of the same name."""
        return {**self.assets, **target.assets}

    # ------------------------------------------------------------------ corpora

    @cached_property
    def _files(self) -> dict[Path, Corpus]:
        return {}

    def _corpus(self, role: str, source: tuple[Path, str | None], name: str) -> Corpus:
        (path, split), files = source, self.corpus
        self.verify(path)
        others = [s for s in (files.train, files.queries, files.tuning_queries) if s]
        reading = replace(files.reading, split=split)
        if not (path.is_file() and path.stat().st_size <= STREAM_BYTES):
            return read_corpus(path, reading, name, prefix=role)
        # Files of one name, in two folders, must not give two examples the same id.
        clash = any(p != path and p.name == path.name for p, _ in others)
        if split is None or sum(p == path for p, _ in others) < 2:
            return read_corpus(path, reading, name, prefix=role if clash else "", stream=False)
        if path not in self._files:
            # Read once whatever the number of splits: the field lands in `meta`.
            self._files[path] = read_corpus(path, files.reading, path.stem, stream=False)
        chosen = [e for e in self._files[path] if e.meta.get("split") == split]
        if not chosen:
            known = {e.meta.get("split", "") for e in self._files[path]} - {""}
            raise DataError(
                f"{path} holds no example of the split {split!r}", did_you_mean(split, known)
            )
        return Corpus(chosen, name)

    @cached_property
    def train(self) -> Corpus:
        return self._corpus("train", self.corpus.train, f"{self.name}-train")

    @cached_property
    def _queries(self) -> dict[str, Corpus]:
        return {}

    def queries(self, split: str = "test") -> Corpus:
        """The query examples: `test`, or `tuning` for choosing hyperparameters."""
        source = {"test": self.corpus.queries, "tuning": self.corpus.tuning_queries}.get(split)
        if source is None:
            raise UsageError(f"suite {self.name} declares no {split} queries")
        if split not in self._queries:
            role = "query" if split == "test" else split
            self._queries[split] = self._corpus(role, source, f"{self.name}-{split}")
        return self._queries[split]

    # ------------------------------------------------------------------ files

    def verify(self, path: Path) -> None:
        """Checks the declared hashes of a file, or of every file in a folder.

        Raises DataError naming the file that is missing or altered.
        """
        if not path.exists():
            raise DataError(
                f"suite {self.name}: {path} is missing",
                "Reinstall the package that carries the suite, or correct the path in its TOML",
            )
        for file in [p for p in self.hashes if p == path or path in p.parents]:
            if not file.exists():
                raise DataError(f"suite {self.name}: {file} is missing", "Reinstall the suite")
            found = sha256_file(file)
            if found != self.hashes[file]:
                raise DataError(
                    f"suite {self.name}: {file} is not the declared file (sha256 {found[:12]}, "
                    f"expected {self.hashes[file][:12]})",
                    "It is damaged or was altered: reinstall the suite, or correct its hash",
                )

    def content(self, path: Path) -> str:
        """16 hex digits of what a file, or every file of a folder, holds."""
        if not path.exists():
            self.verify(path)
        if path.is_file():
            return sha256_file(path)[:16]
        files = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        return fingerprint([[p.relative_to(path).as_posix(), sha256_file(p)] for p in files])


def truth_name(kind: str, split: str) -> str:
    """The name under which a target declares the truth of a kind: on tuning queries `tuning`."""
    if split == "test":
        return kind
    return split if kind == "lds" else f"{split}-{kind}"


def load_suite(name: str | Path, data_dir: Path | None = None) -> Suite:
    """The suite of that name, or in that file, with everything it names on this machine.

    What a suite takes from the hub or a package is fetched, from `data_dir` where it is there;
    the suite returned is then the copy in the cache that names paths only. Raises UsageError for
    an unknown name or for what cannot be fetched, and DataError for a malformed file.
    """
    text = str(name)
    if text.endswith(".toml") or "/" in text or "\\" in text:
        path = Path(text)
        if path.is_dir():
            path = path / "suite.toml"
        if not path.is_file():
            raise UsageError(f"there is no suite file {path}", "List suites: tdabench suites")
    else:
        path = registry().suite(text).value
    suite = read_suite(path)
    if suite.fetched:
        from tdabench.run.sources import resolve

        return resolve(suite, data_dir)
    return suite


def read_suite(path: Path) -> Suite:
    """Parses a suite file. What it takes from elsewhere stays named, not fetched."""
    path = Path(path).resolve()
    return _suite(path, read_toml(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a suite file."""
    try:
        raw = path.read_bytes()
        data = tomllib.loads(raw.decode("utf-8"))
    except OSError as e:
        raise DataError(f"cannot read the suite {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 (byte {e.start})", "Save it as UTF-8") from e
    except (ValueError, RecursionError) as e:  # a number of 5,000 digits is a ValueError too
        raise DataError(f"{path} is not valid TOML: {e}") from e
    return data


# --------------------------------------------------------------------------- the format


class _Table:
    """A TOML table from which known keys are taken; what is left over is an error."""

    def __init__(self, data: Any, file: Path, where: str) -> None:
        self.file, self.where = file, where
        if not isinstance(data, dict):
            raise DataError(f"{file}: {where} must be a table, not {_kind(data)}")
        self.data, self.known = data, set[str]()

    def error(self, key: str, message: str, remedy: str = "") -> DataError:
        where = f"{self.where} " if self.where else ""
        return DataError(f"{self.file}: {where}{key}: {message}", remedy)

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        self.known.add(key)
        if key not in self.data:
            if default is ...:
                raise self.error(key, "is missing")
            return default
        value = self.data[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(_KINDS.get(k, k.__name__) for k in kinds)
            raise self.error(key, f"must be {wanted}, not {_kind(value)}")
        return value

    def strings(self, key: str, default: Iterable[str] = ()) -> tuple[str, ...]:
        values = self.take(key, list, list(default))
        for v in values:
            if not isinstance(v, str):
                raise self.error(key, f"must list strings, not {_kind(v)}")
        return tuple(values)

    def mapping(self, key: str) -> dict[str, str]:
        values = self.take(key, dict, {})
        for k, v in values.items():
            if not isinstance(v, str):
                raise self.error(f"{key}.{k}", f"must be a string, not {_kind(v)}")
        return dict(values)

    def table(self, key: str, required: bool = False) -> _Table:
        where = f"[{self.where.strip('[]')}.{key}]" if self.where else f"[{key}]"
        return _Table(self.take(key, dict, ... if required else {}), self.file, where)

    def tables(self, key: str, required: bool = False) -> list[_Table]:
        items = self.take(key, list, ... if required else [])
        where = f"{self.where.strip('[]')}.{key}" if self.where else key
        return [_Table(item, self.file, f"[[{where}]] {n + 1}") for n, item in enumerate(items)]

    def path(self, key: str, default: Any = ...) -> Path | None:
        value = self.take(key, str, default)
        return None if value is None else self.resolve(key, value)

    def resolve(self, key: str, value: str) -> Path:
        longest = max(len(os.fsencode(p)) for p in value.split("/"))
        if not value or "\0" in value or longest > 255 or len(value) > 2000:
            raise self.error(key, f"{value[:80]!r} is not a path")
        if value.startswith(FETCHED):
            return Path(value)
        return (self.file.parent / value).absolute()

    def paths(self, key: str) -> dict[str, Path]:
        return {k: self.resolve(f"{key}.{k}", v) for k, v in self.mapping(key).items()}

    def done(self) -> None:
        for key in self.data:
            if key not in self.known:
                raise self.error(key, "is not a known key", did_you_mean(key, self.known))


_KINDS = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


def _kind(value: Any) -> str:
    return f"{_KINDS.get(type(value), type(value).__name__)} ({str(value)[:40]!r})"


def _suite(path: Path, data: dict[str, Any]) -> Suite:
    top = _Table(data, path, "")

    head = top.table("suite", required=True)
    name = head.take("name", str)
    if not NAME.fullmatch(name):
        raise head.error("name", f"{name!r} may hold letters, digits, '.', '_' and '-' only")
    version = head.take("version", int, 1)
    summary = head.take("summary", str, "")
    seeds = head.take("seeds", list, [0])
    if not seeds or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in seeds):
        raise head.error("seeds", "must list at least one integer that is not negative")
    head.done()

    hashes = {}
    declared = top.mapping("hashes")
    for file, value in declared.items():
        if not re.fullmatch(r"[0-9a-f]{64}", value):
            raise top.error(f"[hashes] {file}", "must be a sha256 of 64 hex digits")
        hashes[top.resolve("hashes", file)] = value
    corpus = _corpus(top.table("corpus", required=True), hashes)

    targets = tuple(_target(t) for t in top.tables("targets", required=True))
    if not targets:
        raise top.error("targets", "must declare at least one target")
    labels = [t.label for t in targets]
    if len(set(labels)) < len(labels):
        raise top.error("targets", f"two targets have the label {_repeated(labels)!r}")

    methods = top.table("methods")
    variants = {}
    for t in methods.tables("variants"):
        label = t.take("label", str)
        if not LABEL.fullmatch(label):
            raise t.error("label", f"{label!r} is not a label")
        if label in variants:
            raise t.error("label", f"{label!r} is used twice")
        variants[label] = Variant(label, t.take("method", str), t.take("params", dict, {}))
        t.done()
    default_methods = methods.strings("default")
    params = _parameters(methods, "params")
    methods.done()

    tuned_table, tuned = top.table("tuned"), {}
    for label in tuned_table.data:
        if label not in labels:
            raise tuned_table.error(label, "is not a target's label", did_you_mean(label, labels))
        tuned[label] = _parameters(tuned_table, label)
    tuned_table.done()

    benchmarks = top.table("benchmarks")
    default_benchmarks = benchmarks.strings("default", ["lds"])
    benchmark_params = {
        key: dict(benchmarks.take(key, dict)) for key in benchmarks.data if key != "default"
    }
    benchmarks.done()

    assets = top.paths("assets")
    published = tuple(_published(t) for t in top.tables("published"))
    resolved = top.table("resolved")
    sources, missing = resolved.mapping("sources"), resolved.strings("missing")
    resolved.done()
    top.done()
    named = [corpus.train[0], corpus.queries[0], *assets.values()]
    for target in targets:
        named += [target.target.folder, *target.truths.values(), *target.assets.values()]
    fetched = any(not p.is_absolute() for p in named) or any(
        p.suffix == ".jsonl" for target in targets for p in target.truths.values()
    )
    return Suite(
        name=name,
        version=version,
        summary=summary,
        path=path,
        seeds=tuple(dict.fromkeys(seeds)),
        corpus=corpus,
        targets=targets,
        assets=assets,
        hashes=hashes,
        default_methods=tuple(dict.fromkeys(default_methods)),
        method_params=params,
        variants=variants,
        tuned=tuned,
        default_benchmarks=tuple(dict.fromkeys(default_benchmarks)),
        benchmark_params=benchmark_params,
        fingerprint=fingerprint(_plain(data)),
        published=published,
        fetched=fetched,
        sources=sources,
        missing=missing,
    )


def _published(t: _Table) -> Published:
    row = Published(
        method=t.take("method", str),
        value=float(t.take("value", (int, float))),
        benchmark=t.take("benchmark", str, "lds"),
        ours=t.take("ours", str, ""),
        note=t.take("note", str, ""),
        source=t.take("source", str, ""),
    )
    t.done()
    return row


def _corpus(t: _Table, hashes: dict[Path, str]) -> CorpusFiles:
    shared = t.path("file", None)
    train_file = t.path("train_file", None) or shared
    query_file = t.path("queries_file", None) or shared
    tuning_file = t.path("tuning_queries_file", None) or shared
    train, queries = t.take("train", str, None), t.take("queries", str, None)
    tuning = t.take("tuning_queries", str, None)
    digest = t.take("sha256", str, None)
    try:
        reading = Reading(
            layout=t.take("layout", str, "auto"),
            fields=t.mapping("fields"),
            tasks=t.strings("tasks"),
            empty=t.take("empty", str, "error"),
        )
    except UsageError as e:
        raise DataError(f"{t.file}: {t.where}: {e.message}", e.remedy) from e
    t.done()
    if train_file is None or query_file is None:
        raise t.error("file", "is missing", "Give file, or train_file and queries_file")
    if train_file == query_file and (train is None or queries is None):
        raise t.error("train", "and queries must name the splits of the one file")
    if digest is not None:
        if shared is None or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise t.error("sha256", "must be the 64 hex digits of file")
        hashes[shared] = digest
    has_tuning = tuning is not None or (tuning_file is not None and tuning_file != shared)
    return CorpusFiles(
        (train_file, train),
        (query_file, queries),
        (tuning_file, tuning) if has_tuning and tuning_file is not None else None,
        reading,
    )


def _target(t: _Table) -> SuiteTarget:
    label = t.take("label", str)
    if not NAME.fullmatch(label):
        raise t.error("label", f"{label!r} may hold letters, digits, '.', '_' and '-' only")
    model = t.take("model", str, None)
    if model is not None and "folder" in t.data:
        raise t.error("folder", "and model exclude each other")
    if model is not None and (not model or "\0" in model):
        raise t.error("model", f"{model!r} names no model")
    folder = t.path("folder") if model is None else Path("model") / model.lstrip("/")
    checkpoints = t.mapping("checkpoints")
    if model is None:
        checkpoints = checkpoints or {"base": "base.safetensors"}
        for name, file in checkpoints.items():
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise t.error(f"checkpoints.{name}", f"{file!r} leaves the target's folder")
        t.resolve(f"checkpoints.{name}", file)
    elif "base" in checkpoints:
        raise t.error("checkpoints.base", "is the model itself")
    length = t.take("max_length", int, 256)
    if length < 2:
        raise t.error("max_length", f"must be at least 2, not {length}")
    assert folder is not None
    try:
        target = Target(
            name=t.take("name", str, label),
            folder=folder,
            checkpoints=checkpoints,
            regime=t.take("regime", str, ""),
            template=t.take("template", str, "plain"),
            max_length=length,
            truncate=t.take("truncate", str, "error"),
            dtype=t.take("dtype", str, "float32"),
            source=t.take("source", str, ""),
        )
    except UsageError as e:
        raise DataError(f"{t.file}: {t.where}: {e.message}", e.remedy) from e
    main = t.take("main", bool, False)
    truths, assets = t.paths("truths"), t.paths("assets")
    plans_table = t.table("plans")
    plans = {key: _plan_spec(plans_table.table(key)) for key in plans_table.data}
    plans_table.done()
    t.done()
    for key in plans:
        if key not in truths:
            raise t.error(f"plans.{key}", "has no file in truths", did_you_mean(key, truths))
    return SuiteTarget(label, target, truths, assets, main, plans)


def _plan_spec(t: _Table) -> PlanSpec:
    spec = PlanSpec(
        groups=t.take("groups", int),
        fraction=float(t.take("fraction", (int, float))),
        seeds=t.take("seeds", int),
        queries=t.take("queries", str, "test"),
        recipe=t.take("recipe", dict, {}),
        start=t.take("start", str, "base"),
        order=t.take("order", str, "own"),
        groups_of=t.take("groups_of", str, ""),
    )
    t.done()
    if spec.order not in ("own", "pool"):
        raise t.error("order", f"{spec.order!r} is neither own nor pool")
    if spec.queries not in ("test", "tuning"):
        raise t.error("queries", f"{spec.queries!r} is neither test nor tuning")
    if spec.groups < 1 or spec.seeds < 1 or not 0 < spec.fraction <= 1:
        raise t.error("groups", "groups and seeds must be at least 1, fraction in (0, 1]")
    return spec


def _parameters(parent: _Table, key: str) -> dict[str, dict[str, Any]]:
    table = parent.table(key)
    return {label: dict(table.take(label, dict)) for label in table.data}


def _repeated(items: list[str]) -> str:
    return next(i for i in items if items.count(i) > 1)


def _plain(value: Any) -> Any:
    """TOML values as JSON ones (dates become text)."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool)) else str(value)
