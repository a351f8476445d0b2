"""The record of one cell: written by the run, read by every report.

A record is a JSON object; docs/records.md names its fields. Files may be untrusted, so their
contents are always checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.errors import DataError
from tdabench.io import carried_hash, fingerprint, has_fingerprint, read_arrays, read_header
from tdabench.run import environment
from tdabench.run.keys import SCHEMA, cell_key

if TYPE_CHECKING:
    from functools import cached_property as kept_property

    from tdabench.run.plan import Cell, Plan
else:

    class kept_property:
        """A property that is computed once, as functools.cached_property without its lock.

        The lock takes longer than most fields of a record, of which a board of 10^4 reads 10^5.
        """

        def __init__(self, compute: Any) -> None:
            self.compute, self.__doc__ = compute, compute.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self.name = name

        def __get__(self, record: Any, owner: type | None = None) -> Any:
            if record is None:
                return self
            value = record.__dict__[self.name] = self.compute(record)
            return value


STATUSES = ("ok", "failed", "skipped", "oom", "timeout", "interrupted")


def now() -> str:
    """Returns the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, eq=False)
class Record(Mapping[str, Any]):
    """One cell as stored: the JSON object, and properties that work for any missing field.

    `path` is its file, `run` the name of its run, if known. docs/records.md names the fields.
    """

    data: Mapping[str, Any]
    path: Path = Path()
    run: str = ""

    @classmethod
    def planned(
        cls, plan: Plan, cell: Cell, threads: int, concurrent: int, isolation: str = "none"
    ) -> Record:
        """Returns the record of a cell before it runs, with everything known at that time.

        `threads` is the number of threads per worker process, `concurrent` the number of worker
        processes at a time; `isolation` says how methods are confined ("landlock 7", or
        "none"). The status is "interrupted" until `ended` says otherwise.
        """
        target = cell.target
        return cls(
            {
                "schema": SCHEMA,
                "key": cell.key,
                "status": "interrupted",
                "reason": "",
                "log_tail": [],
                "suite": {"name": plan.suite.name, "version": plan.suite.version},
                "method": cell.method.as_dict(),
                "target": {
                    "label": target.label,
                    **target.target.describe(),
                    "fingerprint": plan.fingerprints[target.label],
                },
                "benchmark": cell.benchmark.as_dict(),
                "seed": cell.seed,
                "split": plan.request.split,
                "device": plan.request.device,
                "corpus": plan.corpora,
                "truth": cell.truth,
                "primary": "",
                "metrics": {},
                "notes": [],
                "cost": {},
                "inputs": {},
                "versions": environment.versions((cell.method.origin.distribution,)),
                "hardware": environment.hardware(),
                "threads": threads,
                "concurrent": concurrent,
                "isolation": isolation,
                "git": environment.git_commit(),
                "started": now(),
                "seconds": 0.0,
            }
        )

    def ended(self, status: str, **facts: Any) -> Record:
        """Returns this record with its status and further fields."""
        return Record({**self.data, "status": status, **facts}, self.path, self.run)

    def __getitem__(self, key: str) -> Any:
        return self.data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def _part(self, name: str) -> Mapping[str, Any]:
        part = self.data.get(name)
        return part if isinstance(part, Mapping) else {}

    @property
    def key(self) -> str:
        return str(self.data.get("key") or self.path.stem)

    def signed(self, arrays: str = "") -> Record:
        """Returns this record with the hash of its arrays and a digest of all its fields."""
        data = {k: v for k, v in self.data.items() if k != "digest"} | {"arrays": arrays}
        return Record({**data, "digest": fingerprint(data)}, self.path, self.run)

    def altered(self, ignored: Iterable[str] | None = None) -> list[str]:
        """Lists what shows that the record was edited after it was written; none is a proof.

        The key is recomputed from the fields that it covers, leaving out the parameters `ignored`
        (by default those that the record names as changing no score). A record that does not say
        enough for a check passes it. No method and no array is read.
        """
        out = []
        data = {k: v for k, v in self.data.items() if k != "digest"}
        if "digest" in self.data and not has_fingerprint(data, self.data["digest"]):
            out.append("its digest does not match its fields")
        if self.ok and data.get("arrays") and data["arrays"] != self.arrays_hash():
            out.append("its arrays are not the ones it was written with")
        if ignored is None and isinstance(self.method.get("ignored"), list):
            ignored = [str(n) for n in self.method["ignored"]]
        params, device = self.method.get("params"), data.get("device")
        if ignored is not None and isinstance(params, Mapping) and isinstance(device, str):
            left_out = set(ignored)
            kept = {k: v for k, v in params.items() if k not in left_out}
            b = self.benchmark
            key = cell_key(
                [self.method.get("name"), self.method.get("version"), kept],
                str(self.target.get("fingerprint")),
                data.get("corpus"),
                [b.get("name"), b.get("version"), b.get("params")],
                data.get("truth"),
                self.seed,
                device,
            )
            if key != self.key:
                out.append("its key does not fit its method, data, benchmark, seed or device")
        return out

    def odd_values(self) -> list[str]:
        """Lists metrics outside their own interval, and shares above the noise ceiling."""
        out = []
        for name, m in self.metrics.items():
            if not isinstance(m, dict):
                continue
            value, low, high = m.get("value"), m.get("low"), m.get("high")
            if low is None or high is None:
                continue
            if type(value) is type(low) is type(high) is float and low <= value <= high:
                continue  # as nearly all, of which there may be a million
            value, low, high = finite(value), finite(low), finite(high)
            if value is None or low is None or high is None:
                continue
            if not low - 1e-9 <= value <= high + 1e-9:
                out.append(f"{name} {value:.3f} lies outside its interval [{low:.3f}, {high:.3f}]")
        share = finite(self.metric("share_of_ceiling").get("value"))
        if share is not None and share > 1 + 1e-9:
            out.append(f"its value is {share:.0%} of the noise ceiling")
        return out

    @kept_property
    def status(self) -> str:
        status = str(self.data.get("status", "failed"))
        return status if status in STATUSES else "failed"

    @kept_property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def reason(self) -> str:
        return str(self.data.get("reason") or "")

    @kept_property
    def method(self) -> Mapping[str, Any]:
        return self._part("method")

    @kept_property
    def label(self) -> str:
        return str(self.method.get("label") or self.method.get("name") or "?")

    @kept_property
    def target(self) -> Mapping[str, Any]:
        return self._part("target")

    @kept_property
    def benchmark(self) -> Mapping[str, Any]:
        return self._part("benchmark")

    @kept_property
    def benchmark_name(self) -> str:
        return str(self.benchmark.get("label") or self.benchmark.get("name") or "?")

    @kept_property
    def corpus(self) -> Mapping[str, Any]:
        return self._part("corpus")

    @kept_property
    def cost(self) -> Mapping[str, Any]:
        return self._part("cost")

    @kept_property
    def hardware(self) -> Mapping[str, Any]:
        return self._part("hardware")

    @kept_property
    def versions(self) -> Mapping[str, Any]:
        return self._part("versions")

    @kept_property
    def metrics(self) -> Mapping[str, Any]:
        return self._part("metrics")

    @property
    def notes(self) -> list[str]:
        notes = self.data.get("notes")
        return [str(n) for n in notes] if isinstance(notes, list) else []

    @property
    def seed(self) -> int:
        seed = self.data.get("seed", 0)
        return seed if isinstance(seed, int) else 0

    @property
    def primary(self) -> str:
        return str(self.data.get("primary") or next(iter(self.metrics), ""))

    def metric(self, name: str) -> Mapping[str, Any]:
        metric = self.metrics.get(name)
        return metric if isinstance(metric, Mapping) else {}

    @kept_property
    def data_hash(self) -> str:
        """Returns the hash of the training corpus and the regime of the target."""
        return fingerprint([self.corpus.get("train"), str(self.target.get("regime") or "")])

    @kept_property
    def what_hash(self) -> str:
        """Returns the hash of `what`."""
        return fingerprint(self.what)

    @property
    def what(self) -> Mapping[str, Any]:
        """The fields that must agree for the values of two records in a column to be comparable."""
        return {
            "version": self.benchmark.get("version"),
            "params": self.benchmark.get("params"),
            "truth": self.data.get("truth"),
            "queries": self.corpus.get("queries"),
        }

    @property
    def machine(self) -> Mapping[str, Any]:
        """The hardware and its use, which determine times."""
        used = {k: self.data.get(k) for k in ("device", "threads", "concurrent")}
        return {**self.hardware, **{k: v for k, v in used.items() if v is not None}}

    @kept_property
    def arrays_path(self) -> Path:
        return self.path.with_suffix(".safetensors")

    def arrays(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Reads stored arrays and their metadata. Raises DataError."""
        return read_arrays(self.arrays_path)

    def arrays_hash(self) -> str:
        """Returns the hash in the header of the file of arrays; "" if there is none."""
        return self._arrays_hash

    def know_arrays_hash(self, known: str) -> None:
        """Sets the hash that a caller has read from the same file before."""
        self.__dict__["_arrays_hash"] = known

    @kept_property
    def _arrays_hash(self) -> str:
        try:
            return carried_hash(self.arrays_path)
        except DataError:
            return ""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each stored array, read only from the header."""
        shapes = {
            k: v["shape"]
            for k, v in self._header.items()
            if k != "__metadata__" and isinstance(v, Mapping) and isinstance(v.get("shape"), list)
        }
        return {k: tuple(v) for k, v in shapes.items() if all(type(n) is int for n in v)}

    def metadata(self) -> dict[str, Any]:
        """Returns the metadata of the arrays (including query ids), read only from the header."""
        try:
            value = json.loads(self._carried.get("tdabench", "{}"))
        except (ValueError, TypeError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    @kept_property
    def _header(self) -> Mapping[str, Any]:
        """The header of the file of arrays; empty if it cannot be read."""
        try:
            return read_header(self.arrays_path)
        except DataError:
            return {}

    @property
    def _carried(self) -> Mapping[str, Any]:
        """The metadata in that header."""
        metadata = self._header.get("__metadata__")
        return metadata if isinstance(metadata, Mapping) else {}


_FIELDS = {
    "method": dict, "target": dict, "benchmark": dict, "metrics": dict, "cost": dict,
    "inputs": dict, "corpus": dict, "hardware": dict, "versions": dict, "notes": list,
    "log_tail": list, "reason": str, "primary": str, "started": str,
}  # fmt: skip


def is_record(value: Any) -> bool:
    """Tells whether `value` has the parts of a record with the right types."""
    if not isinstance(value, dict) or value.get("status") not in STATUSES:
        return False
    if not isinstance(value.get("key"), str) or type(value.get("seed")) is not int:
        return False
    if any(not isinstance(value.get(k, kind()), kind) for k, kind in _FIELDS.items()):
        return False
    parts = [(value.get(k) or {}).get("name") for k in ("method", "target", "benchmark")]
    return all(isinstance(n, str) for n in (*parts, (value.get("method") or {}).get("label")))


def slot(record: Mapping[str, Any]) -> tuple[str, str, str, str, int]:
    """Returns a record's place on the board: method label, target, benchmark, queries, seed."""
    return (
        record["method"]["label"],
        record["target"].get("label", record["target"]["name"]),
        record["benchmark"]["name"],
        record.get("split", "test"),
        record["seed"],
    )


def finite(value: Any) -> float | None:
    """Returns `value` as a finite float, or None, since records are untrusted."""
    if type(value) is float:
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


_DECIDES = ("cpu", "cores", "gpu", "device", "threads", "concurrent")


def machine_of(machine: Mapping[str, Any]) -> str:
    """Hashes what determines times: processor, cores, accelerator, threads, jobs."""
    return fingerprint([str(machine.get(k) or "") for k in _DECIDES])


def describe_machine(machine: Mapping[str, Any]) -> str:
    """Describes a machine in one line: `Testor 9, 2 cores, 1 thread, 2 jobs at once`."""
    cores, threads = machine.get("cores"), machine.get("threads")
    jobs = machine.get("concurrent")
    parts = [
        str(machine.get("cpu") or "unknown processor"),
        f"{cores} cores" if cores else "",
        str(machine.get("gpu") or ""),
        f"{threads} thread{'s' if threads != 1 else ''} per method" if threads else "",
        f"{jobs} methods at once" if jobs and jobs != 1 else "",
    ]
    return ", ".join(p for p in parts if p)
