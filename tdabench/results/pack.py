"""Packs chosen cells of a run as submissions, after verification, and merges them into a folder."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdabench.data.hub import COMMIT
from tdabench.errors import DataError, UsageError, clean, unknown
from tdabench.io import read_arrays, sha256_file, write_arrays, write_json
from tdabench.registry import registry
from tdabench.report.records import Run
from tdabench.report.text import number
from tdabench.report.verify import Check, verify_runs
from tdabench.results import layout
from tdabench.results.layout import HEAD, MARK, NAME, PRIVATE, SHARED, identity, is_repository
from tdabench.run.record import Record, describe_machine, now

# Arrays of examples for the explorer of a report: no metric is computed from them.
SHOWN_ONLY = ("top_index", "top_score", "bottom_index", "bottom_score")
COMMON_USERS = ("root", "user", "admin", "ubuntu", "home", "runner", "docker", "nobody", "test")


@dataclass(frozen=True)
class Packed:
    """Submissions as written: their places in the repository, new ones and those already there.

    `text` is a pull request's title and body; `left_out` says what was not packed, and why.
    """

    new: tuple[str, ...]
    there: tuple[str, ...]
    left_out: tuple[str, ...]
    text: str


def pack(
    run: Run,
    to: Path,
    *,
    methods: Sequence[str] = (),
    targets: Sequence[str] = (),
    benchmarks: Sequence[str] = (),
    by: str = "",
    truths: Iterable[Path] = (),
    suite: str | None = None,
) -> Packed:
    """Verifies the chosen cells of `run` and writes them into the results repository `to`.

    `to` is a folder or a git checkout; a new or empty folder becomes a repository. Raises
    UsageError for a folder with other contents and for unknown names, and DataError if a result
    does not follow from its scores, cannot be verified, or would reveal a path, a user or a host.
    """
    check_destination(to)
    if len(by) > 100 or PRIVATE.search(by):
        raise UsageError(f"--by {by[:40]!r} is not a name", "Give at most 100 characters, no path")
    records = _chosen(run, methods, targets, benchmarks)
    left_out = [
        f"{r.label} on {r.benchmark_name}: {r.status}" for r in records if r.status not in SHARED
    ]
    records = [r for r in records if r.status in SHARED]
    if not any(r.ok for r in records):
        raise UsageError(f"{run.name} has no result to submit", "See: tdabench leaderboard")
    checks = _verified(run, records, truths, suite)
    groups: dict[tuple[str, str, int], list[Record]] = {}
    for r in records:
        of = (str(r.target.get("label")), str(r.method["name"]), int(r.method["version"]))
        groups.setdefault(of, []).append(r)
    new: list[str] = []
    there: list[str] = []
    with tempfile.TemporaryDirectory(prefix="tdabench-") as scratch:
        drafts = [
            _write(Path(scratch) / str(n), run, members, by)
            for n, members in enumerate(groups.values())
        ]
        if not is_repository(to):
            write_json(to / MARK, {"layout": layout.LAYOUT})
        for folder, place in drafts:
            layout.read_submission(folder, place)  # as the receiver will
            if (to / place).exists():
                there.append(place)
                continue
            (to / place).parent.mkdir(parents=True, exist_ok=True)
            half = (to / place).with_name(f".{Path(place).name}.half")
            shutil.rmtree(half, ignore_errors=True)
            shutil.copytree(folder, half)
            os.replace(half, to / place)
            new.append(place)
    text = _text(run, [r for r in records if r.ok], checks, new or there, by)
    return Packed(tuple(new), tuple(there), tuple(left_out), text)


def check_destination(to: Path) -> None:
    """Raises UsageError unless `to` is a results repository, new, or an empty folder."""
    text = str(to)
    if "://" in text or text.startswith("git@") or ":/" in text:
        raise UsageError(f"{text} is not a folder", "Clone the repository, and give its checkout")
    if to.exists() and not to.is_dir():
        raise UsageError(f"{to} is a file", "Give a folder")
    if to.exists() and not is_repository(to) and any(to.iterdir()):
        raise UsageError(
            f"{to} has other contents, and is not a results repository",
            "Start one with: tdabench new results FOLDER",
        )


def _chosen(
    run: Run, methods: Sequence[str], targets: Sequence[str], benchmarks: Sequence[str]
) -> list[Record]:
    labels = {r.label for r in run.records}
    names = {str(r.target.get("label")) for r in run.records}
    kinds = {r.benchmark_name for r in run.records}
    for what, asked, known in (
        ("method", methods, labels), ("target", targets, names), ("benchmark", benchmarks, kinds),
    ):  # fmt: skip
        for word in asked:
            if word not in known:
                raise unknown(what, word, known, f"in {run.name}")
    chosen = [
        r
        for r in run.records
        if (not methods or r.label in methods)
        and (not targets or r.target.get("label") in targets)
        and (not benchmarks or r.benchmark_name in benchmarks)
    ]
    order = {r.key: (r.label, str(r.target.get("label")), r.benchmark_name, r.seed) for r in chosen}
    return sorted(chosen, key=lambda r: order[r.key])


def _verified(
    run: Run, records: Sequence[Record], truths: Iterable[Path], suite: str | None
) -> list[Check]:
    keys = {r.key for r in records}
    checks = [c for c in verify_runs([run], truths, suite) if c.key in keys]
    for check in checks:
        if check.status == "differs":
            raise DataError(
                f"{check.name} does not verify: {clean(check.problems[0], 300)}",
                "Measure it again with: tdabench run --force",
            )
        if check.status == "missing":
            raise DataError(
                f"{check.name} cannot be verified: {clean(check.problems[0], 300)}",
                "Give its suite with --suite, or its truth with --truth",
            )
    return checks


def _write(folder: Path, run: Run, records: Sequence[Record], by: str) -> tuple[Path, str]:
    """Writes one submission into `folder` and returns it with its place in a repository."""
    first = records[0]
    suite, target = dict(first.data["suite"]), str(first.target.get("label"))
    name, version = str(first.method["name"]), int(first.method["version"])
    for what, word in (("suite", suite["name"]), ("target", target), ("method", name)):
        if not NAME.fullmatch(str(word)):
            raise UsageError(f"the {what} {word!r} is not a name that a folder can have")
    cells = {}
    for record in records:
        data = shareable(record)
        arrays_name = folder / f"{record.key}.safetensors"
        hashed = ""
        if record.ok:
            arrays, meta = read_arrays(record.arrays_path)
            kept = {k: v for k, v in arrays.items() if k not in SHOWN_ONLY}
            write_arrays(arrays_name, kept, meta)
            if arrays_name.stat().st_size > layout.MAX_ARRAYS:
                raise DataError(
                    f"the arrays of {record.label} on {record.benchmark_name} are larger than "
                    f"{layout.MAX_ARRAYS >> 20} MiB",
                    "Leave this benchmark out with --benchmarks",
                )
            hashed = sha256_file(arrays_name)
        path = folder / f"{record.key}.json"
        stored = Record(data, path)
        write_json(path, dict(stored.signed(stored.arrays_hash() if record.ok else "")))
        cells[record.key] = {"record": sha256_file(path), "arrays": hashed}
    head: dict[str, Any] = {
        "layout": layout.LAYOUT,
        "suite": {**suite, "fingerprint": str(run.suite.get("fingerprint") or "")},
        "target": target,
        "method": {"name": name, "version": version, **_about(name, first)},
        "created": max(str(r.data.get("started") or "") for r in records) or now(),
        "by": by,
        "tdabench": str(first.versions.get("tdabench") or ""),
        "packages": dict(first.versions),
        "hardware": shareable(first)["hardware"],
        "cells": cells,
    }
    head["id"] = identity(head)
    write_json(folder / HEAD, head)
    return folder, f"results/{suite['name']}/{target}/{name}-v{version}/{head['id']}"


def _about(name: str, record: Record) -> dict[str, str]:
    """Returns what a card says of a method: one line, its paper, its family and its package."""
    out = {"family": str(record.method.get("family") or ""), "summary": "", "source": ""}
    known = registry().methods.get(name)
    if known is not None:
        out |= {"summary": known.cls.summary, "source": known.cls.source}
    return {**{k: clean(v, 300) for k, v in out.items()}, "plugin": str(record.method["plugin"])}


def shareable(record: Record) -> dict[str, Any]:
    """Returns a record's fields without paths, user and host names; `log_tail` stays behind.

    Free text is cut where it names one. Raises DataError if a parameter, a name or a hash would
    reveal one, since changing it would change the record's key.
    """
    data = {k: v for k, v in record.data.items() if k in layout.RECORD_FIELDS - {"digest"}}
    data["reason"] = scrubbed(record.reason)[:2000]
    data["notes"] = [scrubbed(n)[:2000] for n in record.notes]
    target = dict(record.target)
    source = str(target.get("source") or "")
    pinned = source.startswith(("hub:", "package:")) or COMMIT.search(source)
    target["source"] = source if pinned and not PRIVATE.search(source) else ""
    data["target"] = target
    hardware = dict(record.hardware)
    words = str(hardware.get("platform") or "").split()
    # A kernel's release may name its builder: system and architecture remain.
    hardware["platform"] = " ".join(dict.fromkeys([*words[:1], *words[-1:]]))
    data["hardware"] = hardware
    found = layout.private_text(data) or _named(data)
    if found:
        raise DataError(
            f"{record.label} on {record.benchmark_name}: {found[0]} contains {found[1]!r}, which "
            "names a path, a user or a host of this machine",
            "Measure it with a parameter that names none",
        )
    return data


def _private_words() -> list[str]:
    """Lists words that name this machine and its user, unless they are common words."""
    words = [socket.gethostname(), os.path.expanduser("~").rpartition("/")[2]]
    try:
        words.append(getpass.getuser())
    except (OSError, KeyError, ImportError):
        pass
    return [w for w in dict.fromkeys(words) if len(w) > 3 and w.lower() not in COMMON_USERS]


def scrubbed(text: str) -> str:
    """Returns `text` with paths, the user's name and the host's name replaced by an ellipsis."""
    text = PRIVATE.sub("…", text)
    for word in _private_words():
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "…", text)
    return text


def _named(value: Mapping[str, Any]) -> tuple[str, str] | None:
    text = str(value)
    for word in _private_words():
        if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text):
            return "a field", word
    return None


def _text(
    run: Run, records: Sequence[Record], checks: Sequence[Check], places: Sequence[str], by: str
) -> str:
    """Returns the title and body of a pull request, in Markdown."""
    agreed = sum(c.status == "agrees" for c in checks)
    methods = list(dict.fromkeys(f"{r.method['name']} v{r.method['version']}" for r in records))
    shown = ", ".join(methods[:3]) + (f" and {len(methods) - 3} more" if len(methods) > 3 else "")
    suite = f"{run.suite.get('name')} {run.suite.get('version')}"
    lines = [
        f"Results of {shown} on {suite}", "",
        f"{len(records)} results in {len(places)} submissions"
        + (f", measured by {clean(by, 100)}" if by else "") + ". "
        f"{agreed} of {len(checks)} were recomputed from their stored scores and agree.", "",
        "| method | target | benchmark | value | 95% interval |", "|-|-|-|--:|-|",
    ]  # fmt: skip
    for r in records[:60]:
        m = r.metric(r.primary)
        low, high = m.get("low"), m.get("high")
        span = f"[{number(low, 3)}, {number(high, 3)}]" if low is not None else ""
        label = clean(r.label, 60).replace("|", "\\|")
        value = number(m.get("value"), 3)
        lines.append(
            f"| {label} | {r.target.get('label')} | {r.benchmark_name} | {value} | {span} |"
        )
    if len(records) > 60:
        lines.append(f"| … | | {len(records) - 60} more | | |")
    machines = list(dict.fromkeys(describe_machine(r.machine) for r in records))
    lines += ["", f"Measured on: {'; '.join(clean(m, 200) for m in machines)}.", ""]
    lines += ["Check with: `tdabench board check .`", ""]
    return "\n".join(lines)
