"""Verifies that a run's results follow from its stored scores by recomputing every metric.

A record is checked against its own fields (key, digest) and files (hash, ids, shapes) and against
its benchmark: from the stored scores and the truth that the record names, found by content, the
benchmark recomputes the outcome; metrics, per-query values and replicates must agree. No method and
no model is run.

Truths and corpora are the verifier's own: of the suite or the files that the verifier names, of an
installed suite, or of a suite file that a manifest of this very user names. A run folder from
elsewhere brings none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.errors import DataError, TdabenchError, UsageError
from tdabench.io import sha256_file
from tdabench.report.records import Run
from tdabench.report.text import clean
from tdabench.run.record import Record, finite
from tdabench.truth.store import Truth

POOLED = 1e-5  # of the largest example score, per root of a group's size
TOLERANCE = 1e-5  # float32 replicates, summed in another order on another machine


class MissingTruth(DataError):
    """The verifier does not have the truth that a record names."""


@dataclass(frozen=True)
class Check:
    """One record: `status` is agrees, differs, missing (its truth is not available) or unchecked.

    `problems` give the reasons; `marks` what a reader should notice although it may be right.
    """

    run: str
    label: str
    target: str
    benchmark: str
    seed: int
    key: str
    status: str
    problems: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{clean(self.label, 60)} · {clean(self.target, 60)} · {clean(self.benchmark)}{seed}"


@dataclass
class Truths:
    """Truth files by the hash of their contents, opened once."""

    paths: dict[str, Path] = field(default_factory=dict)
    opened: dict[str, Truth] = field(default_factory=dict)
    # By hash: the targets and the names that suites declare it for, if they do.
    owners: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    suites: dict[tuple[Any, Any], Any] = field(default_factory=dict)  # by name and version
    corpora: dict[tuple[Any, ...], str] = field(default_factory=dict)  # fingerprints, once read

    def add(self, path: Path, target: str = "", name: str = "") -> None:
        if not path.is_file():
            raise UsageError(f"truth file {path} does not exist")
        content = sha256_file(path)[:16]
        self.paths.setdefault(content, path)
        if target:
            self.owners.setdefault(content, set()).add((target, name))

    def add_suite(self, name: str) -> None:
        """Adds every truth that a suite declares and has on disk. Raises TdabenchError."""
        from tdabench.run.sources import load_suite

        suite = load_suite(name)
        self.suites.setdefault((suite.name, suite.version), suite)
        for target in suite.targets:
            for kind, path in target.truths.items():
                if path.is_file():
                    self.add(path, target.label, kind)

    def check_corpora(self, record: Record) -> list[str]:
        """Compares a record's corpora with the corpora of its suite, if it is available."""
        named = record.data.get("suite")
        named = named if isinstance(named, Mapping) else {}
        place = (named.get("name"), named.get("version"))
        suite = self.suites.get(place)
        if suite is None:
            return []
        split = str(record.data.get("split") or "test")
        out: list[str] = []
        for what, read in (
            ("train", lambda: suite.train),
            ("queries", lambda: suite.queries(split)),
        ):
            where = (*place, what, split)
            if where not in self.corpora:
                try:
                    self.corpora[where] = read().fingerprint
                except TdabenchError:
                    return out  # without such queries, or not on this machine
            if record.corpus.get(what) != self.corpora[where]:
                out.append(
                    f"its {what} corpus is {clean(record.corpus.get(what), 40)}, the suite's is "
                    f"{self.corpora[where]}"
                )
        return out

    def of(self, record: Record, kind: str, label: str = "") -> Truth:
        """Returns the truth of a kind that a record names, checked against its corpus.

        `label` names another target than the record's own. If a suite declares the truth, it
        must be declared for this target.
        """
        from tdabench.run.suite import truth_name

        split = str(record.data.get("split") or "test")
        inputs = record.data.get("inputs")
        inputs = inputs if isinstance(inputs, Mapping) else {}
        name = truth_name(kind, split)
        if label:
            named = inputs.get(f"truth@{label}:{name}")
        else:
            named = inputs.get(f"truth:{name}") or record.data.get("truth")
        wanted = str(named or "")
        if wanted not in self.paths:
            raise MissingTruth(
                f"the truth {wanted or '(unnamed)'} is not available", "Give it with --truth FILE"
            )
        if wanted not in self.opened:
            self.opened[wanted] = Truth.load(self.paths[wanted])
        truth = self.opened[wanted]
        planned, found = truth.plan.get("train"), record.corpus.get("train")
        if planned is not None and planned != found:
            raise DataError(
                f"its truth was built on another training corpus ({planned}, here {found})"
            )
        target = label or str(record.target.get("label") or record.target.get("name"))
        owners = self.owners.get(wanted, set())
        if owners and target not in {t for t, _ in owners}:
            there = ", ".join(sorted({t for t, _ in owners}))
            raise DataError(f"its truth belongs to another target ({there})")
        if owners and not {(target, name), (target, "")} & owners:
            raise DataError(f"its truth is not the one that the suite declares as {name!r}")
        return truth


def verify_runs(
    runs: Sequence[Run], truths: Iterable[Path] = (), suite: str | None = None
) -> list[Check]:
    """Checks every record that has a result. Raises UsageError for a missing truth file."""
    known = Truths()
    for path in truths:
        known.add(path)
    for name in dict.fromkeys(str(n) for n in ([suite] if suite else map(_own_suite, runs)) if n):
        try:
            known.add_suite(name)
        except TdabenchError:
            if suite:
                raise
    out = []
    for run in runs:
        for problem in run.problems:
            out.append(Check(run.name, "?", "?", "?", 0, "", "differs", (problem,)))
        out += [_check(record, known) for record in run.records if record.ok]
    return out


def verify_records(
    records: Iterable[Record], truths: Iterable[Path] = (), suites: Iterable[str] = ()
) -> list[Check]:
    """Checks records that have a result, on the given truths and the truths of named suites.

    A suite that is not available is left out, and its records lack their truth.
    """
    known = Truths()
    for path in truths:
        known.add(path)
    for name in dict.fromkeys(suites):
        try:
            known.add_suite(name)
        except TdabenchError:
            continue
    return [_check(record, known) for record in records if record.ok]


def _own_suite(run: Run) -> str | None:
    """Returns the suite of a run, if the verifier has it: an installed one, by name, or the file
    that the verifier ran. A path in anyone else's manifest could lead to a made-up truth."""
    from tdabench.registry import registry

    request = run.manifest.get("request")
    asked = request.get("suite") if isinstance(request, Mapping) else None
    if run.ours and isinstance(asked, str):
        return asked
    return next((str(n) for n in (asked, run.suite.get("name")) if n in registry().suites), None)


def _check(record: Record, truths: Truths) -> Check:
    status, problems = "agrees", []
    try:
        problems = record.altered(_ignored(record)) + _files(record)
        problems += truths.check_corpora(record)
        found, unchecked = _metrics(record, truths)
        problems += found
        if not unchecked:
            problems += _pooled(record, truths)
        if problems:
            status = "differs"
        elif unchecked:
            status = unchecked.status
        problems += [unchecked.reason] if unchecked else []
    except TdabenchError as e:
        status, problems = "differs", [*problems, str(e)]
    return Check(
        run=record.run,
        label=record.label,
        target=str(record.target.get("label") or record.target.get("name") or "?"),
        benchmark=record.benchmark_name,
        seed=record.seed,
        key=record.key,
        status=status,
        problems=tuple(problems),
        marks=tuple(record.odd_values()),
    )


def _ignored(record: Record) -> list[str] | None:
    """Returns the parameters that change no score: as the method says where it is installed, else
    as the record says."""
    from tdabench.registry import registry

    try:
        cls = registry().method(str(record.method.get("name"))).cls
    except TdabenchError:
        return None
    if not isinstance(record.method.get("ignored"), list):
        return None
    fields = dataclasses.fields(cls)
    return [f.name for f in fields if f.metadata.get("changes_scores") is False]


def _files(record: Record) -> list[str]:
    """Lists problems of the record and its arrays as files."""
    out = []
    if record.key != record.path.stem:
        out.append(f"its key {clean(record.key, 40)} is not the name of its file")
    arrays, meta = record.arrays()
    key = meta.get("key")
    if key is not None and key != record.key:
        out.append("its arrays belong to another record")
    if "per_query" not in arrays:
        return [*out, "its arrays lack per_query"]
    ids = meta.get("query_ids")
    if isinstance(ids, list) and len(ids) != len(arrays["per_query"]):
        out.append(f"it has {len(arrays['per_query'])} values for {len(ids)} queries")
    for name in ("per_query", "replicates"):
        if name in arrays and not np.isfinite(arrays[name]).all():
            out.append(f"its {name} hold NaN or infinity")
    if finite(record.metric(record.primary).get("value")) is None:
        out.append(f"it has no finite {clean(record.primary, 40) or 'primary metric'}")
    return out


@dataclass(frozen=True)
class _Unchecked:
    """Why stored scores could not be used: the truth is "missing", or anything else."""

    reason: str
    status: str = "unchecked"


def _metrics(record: Record, truths: Truths) -> tuple[list[str], _Unchecked | None]:
    """Lists results that the stored scores contradict, and the reason if scores were unusable."""
    from tdabench.benchmark import Stored
    from tdabench.registry import registry

    name = str(record.benchmark.get("name"))
    try:
        cls = registry().benchmark(name).cls
    except TdabenchError as e:
        return [], _Unchecked(str(e))
    if cls.version != record.benchmark.get("version"):
        made = record.benchmark.get("version")
        return [], _Unchecked(f"made by {name} version {made}, not {cls.version}")
    arrays, meta = record.arrays()
    missing: list[str] = []

    def truth(kind: str, label: str = "") -> Truth:
        try:
            return truths.of(record, kind, label)
        except MissingTruth as e:
            missing.append(str(e))
            raise

    ids = tuple(str(i) for i in meta.get("query_ids") or ())
    stored = Stored(arrays, ids, truth, lambda label, kind: truth(kind, label))
    try:
        benchmark = cls.from_params(dict(record.benchmark.get("params") or {}))
        again = benchmark.recompute(stored)
    except KeyError as e:
        return [f"its stored arrays lack {e}"], None
    except (TypeError, ValueError, IndexError) as e:
        return [f"its stored scores cannot be read: {type(e).__name__} {e}"], None
    except TdabenchError as e:
        return ([], _Unchecked(missing[0], "missing")) if missing else ([str(e)], None)
    if again is None:
        return [], _Unchecked(f"{name} does not store enough to recompute it")
    out = []
    for metric, value in again.metrics.items():
        claimed = record.metric(metric)
        for part in ("value", "low", "high"):
            here, there = getattr(value, part), finite(claimed.get(part))
            here = None if here is None or not math.isfinite(here) else float(here)
            if not _close(here, there):
                what = metric if part == "value" else f"{metric} ({part} end of its interval)"
                out.append(f"{what} is {_said(there)} in the record, {_said(here)} from its scores")
    extra = set(map(str, record.metrics)) - set(again.metrics)
    out += [f"{clean(m, 40)} does not follow from stored scores" for m in sorted(extra)]
    replicates = again.replicates if again.replicates is not None else np.empty(0)
    for what, new in (("per_query", again.per_query), ("replicates", replicates)):
        old = arrays.get(what, np.empty(0))
        if old.shape != np.shape(new) or not np.allclose(old, new, TOLERANCE, TOLERANCE):
            out.append(f"its stored {what} do not follow from its scores")
    return out, None


def _pooled(record: Record, truths: Truths) -> list[str]:
    """Lists stored group scores that do not follow from the stored example scores.

    A record holds example scores if its group scores are a pooling of them, and if they are few.
    """
    arrays, meta = record.arrays()
    if "example_scores" not in arrays:
        return []
    from tdabench.benchmarks.lds import usable
    from tdabench.groups import pool_scores
    from tdabench.registry import registry

    out, ids = [], [str(i) for i in meta.get("query_ids") or ()]
    cls = registry().benchmark(str(record.benchmark.get("name"))).cls
    main = getattr(cls.from_params(dict(record.benchmark.get("params") or {})), "truth", "")
    for name, stored in arrays.items():
        if name != "group_scores" and not name.startswith("group_scores["):
            continue
        kind = str(main) if name == "group_scores" else name[len("group_scores[") : -1]
        try:
            truth, _ = usable(truths.of(record, kind), ids)
            scores = pool_scores(
                arrays["example_scores"], truth.groups,
                str(meta.get("pooling")), float(meta.get("temperature") or 0.0),
            )  # fmt: skip
        except (TdabenchError, ValueError, TypeError) as e:
            out.append(f"its {clean(name, 60)} cannot be pooled from its example scores: {e}")
            continue
        # Sums of float32 in another order: the error grows with the members of a group, and with
        # the steepness of a softmax.
        size = np.abs(arrays["example_scores"]).max(axis=1, keepdims=True)
        allowed = POOLED * size * np.sqrt(truth.groups.sizes + 1.0)
        if str(meta["pooling"]).startswith("softmax"):
            allowed = allowed * np.maximum(1.0, 0.01 * size / float(meta["temperature"]))
        close = np.abs(scores - stored) <= allowed if scores.shape == stored.shape else np.zeros(1)
        if not close.all():
            out.append(f"its stored {clean(name, 60)} do not follow from its example scores")
    return out


def _close(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _said(value: float | None) -> str:
    return "missing" if value is None else f"{value:.6g}"
