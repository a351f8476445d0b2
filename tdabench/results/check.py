"""Checks a results repository: recomputes every metric, and measures a random sample again."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.errors import TdabenchError, clean
from tdabench.registry import registry
from tdabench.report.records import read_run
from tdabench.report.text import number
from tdabench.report.verify import verify_records
from tdabench.results.layout import Results, Submission
from tdabench.run.record import Record, finite
from tdabench.run.sources import derive_suite, load_suite
from tdabench.seeds import named_seed

TIMES = ("cost",)  # benchmarks whose values are times of a machine


@dataclass(frozen=True)
class Finding:
    """The verdict on one submission, or one record of it.

    `status` is agrees, differs, refused, missing (its truth is not available here), unchecked (too
    little is stored, or it was not measured again), again (measured again, and agrees).
    """

    place: str
    name: str
    status: str
    reason: str = ""


def check_results(
    results: Results,
    *,
    truths: Iterable[Path] = (),
    suite: str | None = None,
    remeasure: int = 0,
    seed: int = 0,
    seconds: float = 3600,
) -> list[Finding]:
    """Recomputes every metric of the repository; measures `remeasure` records again.

    `suite` is a suite file to use beside installed suites. The sample is drawn with `seed` among
    the records whose method is installed in the submitted version.
    """
    out = [Finding(r.place, "", "refused", r.reason) for r in results.refused]
    places = {s.id: s for s in results.submissions}
    records = [r for s in results.submissions for r in s.records]
    names = [str(s.suite["name"]) for s in results.submissions]
    known = [n for n in dict.fromkeys(names) if n in registry().suites]
    checks = verify_records(records, truths, [*([suite] if suite else []), *known])
    for check in checks:
        place = places[check.run].place
        reasons = check.problems or tuple(check.marks)
        reason = "; ".join(clean(r, 300) for r in reasons[:3])
        out.append(Finding(place, check.name, check.status, reason))
    if remeasure:
        fine = {(c.run, c.key) for c in checks if c.status in ("agrees", "unchecked")}
        pool = [
            (s, r) for s in results.submissions for r in s.records
            if (s.id, r.key) in fine and _installed(r)
        ]  # fmt: skip
        rng = np.random.default_rng(named_seed(seed, "remeasure"))
        order = rng.permutation(len(pool))[:remeasure]
        for n in sorted(order.tolist()):
            out.append(measure_again(*pool[n], suite=suite, seconds=seconds))
        if not pool:
            out.append(Finding("", "", "unchecked", "no submitted method is installed here"))
    return out


def _installed(record: Record) -> bool:
    known = registry().methods.get(str(record.method.get("name")))
    fits = known is not None and known.cls.version == record.method.get("version")
    return fits and record.benchmark_name not in TIMES and record.data.get("device") == "cpu"


def measure_again(
    submission: Submission, record: Record, *, suite: str | None = None, seconds: float = 3600
) -> Finding:
    """Runs a record's method with its parameters in its own process and compares the value."""
    name = f"{record.label} · {submission.target} · {record.benchmark_name}"
    named = suite or str(submission.suite["name"])
    label = "again"

    def add(tables: dict[str, Any]) -> None:
        params = {k: v for k, v in record.method.get("params", {}).items() if v is not None}
        methods = tables.setdefault("methods", {})
        variant = {"label": label, "method": record.method["name"], "params": params}
        methods["variants"] = [*methods.get("variants", []), variant]

    with tempfile.TemporaryDirectory(prefix="tdabench-") as scratch:
        try:
            derived = derive_suite(load_suite(named), Path(scratch) / "suite.toml", add)
        except TdabenchError as e:
            return Finding(submission.place, name, "missing", clean(e.message, 300))
        command = [
            sys.executable, "-m", "tdabench", "run", "--suite", str(derived.path), "--methods",
            label, "--target", submission.target, "--benchmarks", record.benchmark_name,
            "--seed", str(record.seed), "--out", f"{scratch}/run", "--json",
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, env=dict(os.environ)
            )
        except subprocess.TimeoutExpired:
            return Finding(submission.place, name, "unchecked", f"took longer than {seconds:g} s")
        try:
            found = [r for r in read_run(Path(scratch) / "run").records if r.label == label]
        except TdabenchError:
            found = []
        if not found or not found[0].ok:
            why = found[0].reason if found else done.stderr.strip().rpartition("\n")[2]
            return Finding(submission.place, name, "unchecked", f"not measured: {clean(why, 200)}")
        return compared(submission.place, name, record, found[0])


def compared(place: str, name: str, record: Record, again: Record) -> Finding:
    """Compares a submitted value with the value measured again.

    They agree if they differ by at most a tenth of the width of the submitted 95% interval, or by
    0.001: scores depend on the machine by rounding only.
    """
    claimed: Mapping[str, Any] = record.metric(record.primary)
    there, here = (finite(r.metric(record.primary).get("value")) for r in (record, again))
    low, high = finite(claimed.get("low")), finite(claimed.get("high"))
    if there is None or here is None:
        return Finding(place, name, "unchecked", "one of the two has no value")
    allowed = max(1e-3, (high - low) / 10 if low is not None and high is not None else 0.0)
    said = f"measured again: {number(here, 4)}, submitted {number(there, 4)}"
    agrees = abs(here - there) <= allowed
    return Finding(place, name, "again" if agrees else "differs", said)
