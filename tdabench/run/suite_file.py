"""The suite file: TOML to `Suite`, and back.

The format is strict, since ignoring a misspelt key would change a result silently: an unknown key,
a missing one or a wrong type is a one-line error that names the file and the key. See
docs/suites.md.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tdabench.data.layouts import Reading
from tdabench.errors import DataError, UsageError, did_you_mean
from tdabench.io import cache_folder, check_free, fingerprint, open_own, write_text
from tdabench.registry import NAME
from tdabench.run.suite import (
    CorpusFiles,
    ExternalFile,
    ImportSpec,
    PlanSpec,
    Published,
    Suite,
    SuiteTarget,
    Variant,
)
from tdabench.targets.recipe import Recipe
from tdabench.targets.target import Target

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]*")
FETCHED = ("hub:", "package:", "data:")  # sources that are not paths relative to the suite file


def read_suite(path: Path) -> Suite:
    """Parses a suite file. Files from elsewhere are not fetched."""
    path = Path(path).resolve()
    return _suite(path, read_toml(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Reads the tables of a suite file."""
    try:
        raw = path.read_bytes()
        data = tomllib.loads(raw.decode("utf-8"))
    except OSError as e:
        raise DataError(f"cannot read the suite {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 (byte {e.start})", "Save it as UTF-8") from e
    except (ValueError, RecursionError) as e:  # a number of 5,000 digits is a ValueError, too
        raise DataError(f"{path} is not valid TOML: {e}") from e
    _check_values(path, data)
    return data


DEEPEST = 100  # tables within tables


def _check_values(path: Path, data: dict[str, Any]) -> None:
    """Raises DataError for an integer beyond TOML's 64 bits or a table nested beyond `DEEPEST`.

    Python's parser accepts both.
    """
    left: list[tuple[Any, int]] = [(data, 0)]
    while left:
        value, depth = left.pop()
        if depth > DEEPEST:
            raise DataError(f"{path} nests tables or lists more than {DEEPEST} deep")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise DataError(
                f"{path} is not valid TOML: an integer of {len(str(abs(value)))} digits",
                "Integers have at most 64 bits",
            )
        if isinstance(value, (dict, list)):
            inside = value.values() if isinstance(value, dict) else value
            left += [(item, depth + 1) for item in inside]


def write_suite(data: dict[str, Any], path: Path | None = None) -> Suite:
    """Writes the tables of a suite to `path`, by default into the cache, and reads it again."""
    text = HEADER + toml_text(data)
    if path is None:
        name = data["suite"]["name"]
        path = cache_folder() / "suites" / f"{name}-{fingerprint(text)}" / "suite.toml"
    if not os.path.lexists(path) or _text(path) != text:
        check_free(path.parent, ["suite.toml"], mine=_text(path).startswith(HEADER))
        write_text(path, text)
    return read_suite(path)


HEADER = "# Written by tdabench. It may be edited; a run with --model writes it again.\n\n"


def _text(path: Path) -> str:
    """Returns the text of a suite file; "" if there is none."""
    try:
        with open_own(path, "rb") as f:
            return f.read(1 << 20).decode("utf-8", "replace")
    except (OSError, DataError):
        return ""


# --------------------------------------------------------------------------- TOML -> Suite


class _Table:
    """A TOML table from which known keys are taken; remaining keys are errors."""

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
        raise head.error("name", f"{name!r} may contain only letters, digits, '.', '_' and '-'")
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
    files = tuple(_external(t) for t in top.tables("files"))
    resolved = top.table("resolved")
    sources, missing = resolved.mapping("sources"), resolved.strings("missing")
    resolved.done()
    top.done()
    named = [f[0] for f in (corpus.train, corpus.queries) if f] + list(assets.values())
    for target in targets:
        named += [target.target.folder, *target.truths.values(), *target.assets.values()]
    fetched = (
        any(not p.is_absolute() for p in named)
        or any(p.suffix == ".jsonl" for target in targets for p in target.truths.values())
        or any(target.imports for target in targets)
        or bool(corpus.chunk_tokens)
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
        files=files,
    )


def _external(t: _Table) -> ExternalFile:
    file = ExternalFile(
        source=t.take("source", str),
        bytes=t.take("bytes", int, 0),
        about=t.take("about", str, ""),
    )
    t.done()
    if not file.source.startswith(FETCHED) or file.bytes < 0:
        raise t.error("source", f"{file.source!r} does not begin with {', '.join(FETCHED)}")
    return file


def _published(t: _Table) -> Published:
    row = Published(
        method=t.take("method", str),
        value=float(t.take("value", (int, float))),
        benchmark=t.take("benchmark", str, "lds"),
        ours=t.take("ours", str, ""),
        target=t.take("target", str, ""),
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
    chunk_tokens, chunk_rows = t.take("chunk_tokens", int, 0), t.take("chunk_rows", int, 1000)
    if chunk_tokens < 0 or chunk_rows < 1:
        raise t.error("chunk_tokens", "and chunk_rows must be positive")
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
    if train_file is None:
        raise t.error("file", "is missing", "Give file, or train_file and queries_file")
    if query_file is None and queries is not None:
        raise t.error("queries", "names a split without a file", "Give file, or queries_file")
    if train_file == query_file and (train is None or queries is None):
        raise t.error("train", "and queries must name the splits of the file")
    if digest is not None:
        if shared is None or not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise t.error("sha256", "must be the 64 hex digits of file")
        hashes[shared] = digest
    has_tuning = tuning is not None or (tuning_file is not None and tuning_file != shared)
    return CorpusFiles(
        (train_file, train),
        None if query_file is None else (query_file, queries),
        (tuning_file, tuning) if has_tuning and tuning_file is not None else None,
        reading,
        chunk_tokens,
        chunk_rows,
    )


def _target(t: _Table) -> SuiteTarget:
    label = t.take("label", str)
    if not NAME.fullmatch(label):
        raise t.error("label", f"{label!r} may contain only letters, digits, '.', '_' and '-'")
    model = t.take("model", str, None)
    if model is not None and "folder" in t.data:
        raise t.error("folder", "and model exclude each other")
    if model is not None and (not model or "\0" in model):
        raise t.error("model", f"{model!r} is not the name of a model")
    folder = t.path("folder") if model is None else Path("model") / model.lstrip("/")
    checkpoints = t.mapping("checkpoints")
    if model is None:
        checkpoints = checkpoints or {"base": "base.safetensors"}
        for name, file in checkpoints.items():
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise t.error(f"checkpoints.{name}", f"{file!r} is outside the target's folder")
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
            recipe=Recipe.of(t.take("recipe", dict, {})),
            fraction=float(t.take("fraction", (int, float), 0.25)),
        )
    except UsageError as e:
        raise DataError(f"{t.file}: {t.where}: {e.message}", e.remedy) from e
    main = t.take("main", bool, False)
    trained = t.take("trained", str, "")
    if trained and trained not in {"base", *checkpoints}:
        raise t.error(
            "trained", f"{trained!r} is not a checkpoint", did_you_mean(trained, checkpoints)
        )
    truths, assets = t.paths("truths"), t.paths("assets")
    plans_table = t.table("plans")
    plans = {key: _plan_spec(plans_table.table(key), target) for key in plans_table.data}
    plans_table.done()
    imports_table = t.table("imports")
    imports = {key: _import_spec(imports_table.table(key)) for key in imports_table.data}
    imports_table.done()
    t.done()
    for what, keys in (("plans", plans), ("imports", imports)):
        for key in keys:
            if key not in truths:
                raise t.error(f"{what}.{key}", "has no file in truths", did_you_mean(key, truths))
    return SuiteTarget(label, target, truths, assets, main, plans, trained, imports)


def _import_spec(t: _Table) -> ImportSpec:
    spec = ImportSpec(
        masks=t.take("masks", str, ""),
        values=t.take("values", str, ""),
        left_out=t.take("left_out", bool, False),
    )
    t.done()
    if spec.values not in ("", "loss", "margin"):
        raise t.error("values", f"{spec.values!r} is neither loss nor margin")
    return spec


def _plan_spec(t: _Table, target: Target) -> PlanSpec:
    leave_out = t.take("leave_out", str, "")
    spec = PlanSpec(
        groups=t.take("groups", int, 0 if leave_out else ...),  # 0: every source
        fraction=float(t.take("fraction", (int, float), target.fraction)),
        seeds=t.take("seeds", int),
        queries=t.take("queries", str, "test"),
        recipe=t.take("recipe", dict, {}),
        start=t.take("start", str, "base"),
        order=t.take("order", str, "own"),
        groups_of=t.take("groups_of", str, ""),
        leave_out=leave_out,
    )
    t.done()
    if leave_out and {"fraction", "groups_of"} & set(t.data):
        raise t.error("leave_out", "defines the groups: leave out fraction and groups_of")
    if leave_out and spec.groups == 1:
        raise t.error("groups", "must be at least 2: one source that is left out ranks nothing")
    if spec.order not in ("own", "pool"):
        raise t.error("order", f"{spec.order!r} is neither own nor pool")
    if spec.queries not in ("test", "tuning"):
        raise t.error("queries", f"{spec.queries!r} is neither test nor tuning")
    if spec.groups < (0 if leave_out else 1) or spec.seeds < 1 or not 0 < spec.fraction <= 1:
        raise t.error("groups", "groups and seeds must be at least 1, fraction in (0, 1]")
    try:
        Recipe.of(spec.recipe, target.recipe)
    except UsageError as e:
        raise t.error("recipe", e.message, e.remedy) from e
    return spec


def _parameters(parent: _Table, key: str) -> dict[str, dict[str, Any]]:
    table = parent.table(key)
    return {label: dict(table.take(label, dict)) for label in table.data}


def _repeated(items: list[str]) -> str:
    return next(i for i in items if items.count(i) > 1)


def _plain(value: Any) -> Any:
    """Converts TOML values to JSON values (dates become text)."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool)) else str(value)


# --------------------------------------------------------------------------- tables -> TOML


def toml_text(data: Mapping[str, Any]) -> str:
    """Formats `data` as TOML: scalars, lists of them, tables and lists of tables."""
    lines: list[str] = []
    _table(lines, "", data)
    return "\n".join(lines).strip() + "\n"


def _table(lines: list[str], name: str, table: Mapping[str, Any]) -> None:
    plain = {k: v for k, v in table.items() if not _is_table(v) and v is not None}
    if name and (plain or not table):
        lines += ["", f"[{name}]"]
    lines += [f"{toml_key(k)} = {toml_value(v)}" for k, v in plain.items()]
    for k, v in table.items():
        inner = f"{name}.{toml_key(k)}" if name else toml_key(k)
        if isinstance(v, Mapping):
            _table(lines, inner, v)
        elif _is_table(v):
            for item in v:
                lines += ["", f"[[{inner}]]"]
                flat = {a: b for a, b in item.items() if not _is_table(b)}
                lines += [f"{toml_key(a)} = {toml_value(b)}" for a, b in flat.items()]
                for a, b in item.items():
                    if _is_table(b):
                        _table(lines, f"{inner}.{toml_key(a)}", b)


def _is_table(value: Any) -> bool:
    rows = isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)
    return rows or isinstance(value, Mapping)


def toml_key(key: str) -> str:
    """Returns a key of a TOML table, quoted if necessary."""
    bare = key and all(c.isascii() and (c.isalnum() or c in "-_") for c in key)
    return key if bare else toml_value(str(key))


def toml_value(value: Any) -> str:
    """Returns a scalar, a list or an inline table as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(toml_value(v) for v in value)}]"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{toml_key(k)} = {toml_value(v)}" for k, v in value.items()) + " }"
    # A JSON string is a TOML basic string, except that TOML requires DEL to be escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
