"""The layout of a results repository, and its reading. Everything in it is untrusted.

    tdabench-results.json                                       {"layout": 1}
    results/<suite>/<target>/<method>-v<version>/<id>/
        submission.json       what was measured, by whom, on what; the sha256 of every other file
        <key>.json            one record (docs/records.md), without paths, users and hosts
        <key>.safetensors     its arrays

`<id>` is a hash of the submission's identity and files, so that an edited submission no longer has
its name. A submission that is damaged, edited, too large or malformed is refused with its place and
the reason, and never stops the others from being read.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tdabench.errors import DataError, TdabenchError, UsageError, clean
from tdabench.io import fingerprint, open_own, read_header, sha256_bytes
from tdabench.run.record import Record, finite, is_record

LAYOUT = 1
MARK = "tdabench-results.json"
HEAD = "submission.json"
MAX_HEAD = 256 << 10  # bytes of submission.json
MAX_RECORD = 256 << 10  # bytes of a record
MAX_ARRAYS = 16 << 20  # bytes of a record's arrays
MAX_SUBMISSION = 64 << 20  # bytes of a submission
MAX_CELLS = 500  # records in a submission
MAX_SUBMISSIONS = 100_000
MAX_DEPTH = 40  # nested lists and objects in a JSON file

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
VERSIONED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,99})-v(\d{1,9})")
ID = re.compile(r"[0-9a-f]{16}")
KEY = re.compile(r"[0-9a-f]{8,64}")
SHARED = ("ok", "failed", "oom", "timeout")  # statuses of records that a submission may contain

RECORD_FIELDS = frozenset(
    """schema key status reason suite method target benchmark seed split device corpus truth
    primary metrics notes cost inputs versions hardware threads concurrent isolation git started
    seconds arrays digest""".split()
)
HEAD_FIELDS = frozenset(
    "layout id suite target method created by tdabench packages hardware cells".split()
)

# Absolute paths, home folders and file addresses; not `hub:org/name/file`, and not a/b.
PRIVATE = re.compile(
    r"(?<![\w.:/@-])/(?:[\w.@+ -]+/)+[\w.@+-]*|(?<![\w.])~/[\w./-]+|\b[A-Za-z]:\\[\w\\. -]+"
    r"|file://\S+"
)


@dataclass(frozen=True)
class Submission:
    """Records of one suite, target and method version, as one person measured them.

    `place` is its folder within the repository, `head` the contents of its submission.json.
    """

    folder: Path
    place: str
    head: Mapping[str, Any]
    records: tuple[Record, ...]

    @property
    def id(self) -> str:
        return str(self.head["id"])

    @property
    def suite(self) -> Mapping[str, Any]:
        return dict(self.head["suite"])

    @property
    def target(self) -> str:
        return str(self.head["target"])

    @property
    def method(self) -> Mapping[str, Any]:
        return dict(self.head["method"])

    @property
    def created(self) -> str:
        return str(self.head["created"])

    @property
    def by(self) -> str:
        return str(self.head["by"])

    @cached_property
    def hardware(self) -> Mapping[str, Any]:
        return dict(self.head["hardware"])


@dataclass(frozen=True)
class Refused:
    """A place in a repository that is not a valid submission, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Results:
    """A results repository as read: valid submissions in the order of places, and the rest."""

    folder: Path
    submissions: tuple[Submission, ...]
    refused: tuple[Refused, ...]


def is_repository(folder: Path) -> bool:
    return (Path(folder) / MARK).is_file()


def read_results(folder: Path) -> Results:
    """Reads a results repository. Raises UsageError if `folder` is not one."""
    folder = Path(folder)
    if not is_repository(folder):
        raise UsageError(
            f"{folder} is not a results repository: it has no {MARK}",
            "Start one with: tdabench new results FOLDER",
        )
    found, refused = [], []
    try:
        mark = _json(folder, MARK, MAX_HEAD)[0]
        if mark.get("layout") != LAYOUT:
            raise DataError(f"layout {mark.get('layout')!r}, this version reads {LAYOUT}")
    except TdabenchError as e:
        raise UsageError(f"{folder / MARK}: {e.message}", "Update tdabench") from e
    for n, (place, problem) in enumerate(_places(folder)):
        if n >= MAX_SUBMISSIONS:
            refused.append(Refused(place, f"more than {MAX_SUBMISSIONS:,} submissions"))
            break
        if problem:
            refused.append(Refused(place, problem))
            continue
        try:
            found.append(read_submission(folder / place, place))
        except TdabenchError as e:
            refused.append(Refused(place, clean(e.message, 400)))
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as e:
            refused.append(Refused(place, f"malformed: {clean(f'{type(e).__name__} {e}', 300)}"))
    return Results(folder, tuple(found), tuple(refused))


def _places(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields (place, problem) of every submission folder, and of anything else there."""
    levels = ("a suite", "a target", "a method and version", "a submission")

    def below(place: str, level: int) -> Iterator[tuple[str, str]]:
        try:
            entries = sorted(os.scandir(folder / place), key=lambda e: e.name)
        except OSError as e:
            yield place, f"cannot be read: {e.strerror}"
            return
        for entry in entries:
            inner = f"{place}/{entry.name}"
            if entry.name.startswith(".") and entry.is_file(follow_symlinks=False):
                continue  # .gitkeep and the like
            if entry.is_symlink() or not entry.is_dir(follow_symlinks=False):
                yield clean(inner, 300), f"not a folder of {levels[level]}"
            elif not (ID if level == 3 else VERSIONED if level == 2 else NAME).fullmatch(
                entry.name
            ):
                yield clean(inner, 300), f"not a name of {levels[level]}"
            elif level == 3:
                yield inner, ""
            else:
                yield from below(inner, level + 1)

    if (folder / "results").is_dir() and not (folder / "results").is_symlink():
        yield from below("results", 0)


def read_submission(folder: Path, place: str) -> Submission:
    """Reads one submission. Raises DataError naming what is wrong with it.

    Checks names, sizes, hashes, fields and digests; what follows from the arrays is checked by
    `tdabench board check`.
    """
    _, suite, target, versioned, id = place.split("/")
    found = VERSIONED.fullmatch(versioned)
    method, version = (found[1], int(found[2])) if found else ("", 0)
    head, _ = _json(folder, HEAD, MAX_HEAD)
    _check_head(head, suite, target, method, version, id)
    cells = head["cells"]
    wanted = {HEAD} | {f"{key}.json" for key in cells}
    wanted |= {f"{key}.safetensors" for key, of in cells.items() if of["arrays"]}
    sizes = {}
    for entry in os.scandir(folder):
        about = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(about.st_mode):
            raise DataError(f"{clean(entry.name, 80)} is not a plain file")
        sizes[entry.name] = about.st_size
    if extra := sorted(set(sizes) - wanted):
        raise DataError(f"it contains {clean(extra[0], 80)}, which submission.json does not list")
    if lacking := sorted(wanted - set(sizes)):
        raise DataError(f"it lacks {lacking[0]}")
    if sum(sizes.values()) > MAX_SUBMISSION:
        raise DataError(f"it is larger than {MAX_SUBMISSION >> 20} MiB")
    records = []
    for key, of in cells.items():
        data, raw = _json(folder, f"{key}.json", MAX_RECORD)
        if sha256_bytes(raw) != of["record"]:
            raise DataError(f"{key}.json is not the file that was submitted (sha256)")
        record = Record(data, folder / f"{key}.json", id)
        _check_record(record, key, head)
        if of["arrays"]:
            name = f"{key}.safetensors"
            if sha256_bytes(_bytes(folder, name, MAX_ARRAYS)) != of["arrays"]:
                raise DataError(f"{name} is not the file that was submitted (sha256)")
            read_header(folder / name)
        elif record.ok:
            raise DataError(f"{key}.json is a result without arrays")
        if altered := record.altered():
            raise DataError(f"{key}.json: {altered[0]}")
        records.append(record)
    return Submission(folder, place, head, tuple(records))


def identity(head: Mapping[str, Any]) -> str:
    """Returns the id of a submission: 16 hex digits over what it is and the files in it."""
    return fingerprint({k: v for k, v in head.items() if k != "id"})


def private_text(value: Any, where: str = "") -> tuple[str, str] | None:
    """Returns (field, text) of the first string that contains a path of a machine, or None."""
    if isinstance(value, str):
        found = PRIVATE.search(value)
        return (where or "text", found[0]) if found else None
    if isinstance(value, Mapping):
        pairs = [*((f"{where}.{k}".strip("."), v) for k, v in value.items())]
        pairs += [(f"{where} (a name)".strip(), str(k)) for k in value]
    elif isinstance(value, (list, tuple)):
        pairs = [(where, v) for v in value]
    else:
        return None
    return next((f for name, part in pairs if (f := private_text(part, name))), None)


# --------------------------------------------------------------------------- checks


def _check_head(
    head: dict[str, Any], suite: str, target: str, method: str, version: int, id: str
) -> None:
    if set(head) != HEAD_FIELDS:
        odd = sorted(set(head) ^ HEAD_FIELDS)
        raise DataError(f"{HEAD}: {clean(odd[0], 60)} is missing or unknown")
    if head["layout"] != LAYOUT:
        raise DataError(f"{HEAD}: layout {head['layout']!r}, this version reads {LAYOUT}")
    for name, kind in (
        ("id", str), ("suite", dict), ("target", str), ("method", dict), ("created", str),
        ("by", str), ("tdabench", str), ("packages", dict), ("hardware", dict), ("cells", dict),
    ):  # fmt: skip
        if not isinstance(head[name], kind):
            raise DataError(f"{HEAD}: {name} is not of the right type")
    named = (
        head["suite"].get("name"), head["target"], head["method"].get("name"),
        head["method"].get("version"), head["id"],
    )  # fmt: skip
    if (
        named != (suite, target, method, version, id)
        or type(head["suite"].get("version")) is not int
    ):
        raise DataError(f"{HEAD} does not belong to this folder")
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", head["created"]):
        raise DataError(f"{HEAD}: created is not a time in UTC")
    if len(head["by"]) > 100:
        raise DataError(f"{HEAD}: by is longer than 100 characters")
    if not head["cells"] or len(head["cells"]) > MAX_CELLS:
        raise DataError(f"{HEAD}: {len(head['cells'])} records, 1 to {MAX_CELLS} are allowed")
    for key, of in head["cells"].items():
        right = isinstance(of, dict) and set(of) == {"record", "arrays"}
        if not right or not KEY.fullmatch(key):
            raise DataError(f"{HEAD}: the record {clean(key, 60)!r} is not described")
        if any(
            not isinstance(v, str) or not re.fullmatch("([0-9a-f]{64})?", v) for v in of.values()
        ):
            raise DataError(f"{HEAD}: a hash of {key} is malformed")
    if identity(head) != id:
        raise DataError(f"{HEAD} was edited: it no longer has the id {id}")
    if found := private_text({k: v for k, v in head.items() if k != "cells"}):
        raise DataError(f"{HEAD}: {clean(found[0], 60)} contains a path of a machine")


def _check_record(record: Record, key: str, head: Mapping[str, Any]) -> None:
    data = record.data
    if not is_record(data):
        raise DataError(f"{key}.json is not a record")
    if odd := sorted(set(data) - RECORD_FIELDS):
        raise DataError(f"{key}.json has the unknown field {clean(odd[0], 60)}")
    suite = data["suite"] if isinstance(data.get("suite"), dict) else {}
    mine = (
        data.get("key"), suite.get("name"), suite.get("version"), record.target.get("label"),
        record.method.get("name"), record.method.get("version"),
    )  # fmt: skip
    theirs = (
        key, head["suite"]["name"], head["suite"]["version"], head["target"],
        head["method"]["name"], head["method"]["version"],
    )  # fmt: skip
    if mine != theirs:
        raise DataError(f"{key}.json belongs to another suite, target or method version")
    if record.status not in SHARED:
        raise DataError(f"{key}.json has the status {record.status}")
    if "digest" not in data:
        raise DataError(f"{key}.json has no digest")
    if len(record.label) > 200:
        raise DataError(f"{key}.json has a label of {len(record.label)} characters")
    if record.ok and finite(record.metric(record.primary).get("value")) is None:
        raise DataError(f"{key}.json has no finite {clean(record.primary, 40) or 'metric'}")
    if found := private_text(data):
        raise DataError(f"{key}.json: {clean(found[0], 60)} contains a path of a machine")


def _bytes(folder: Path, name: str, most: int) -> bytes:
    with open_own(folder / name, "rb") as f:
        data = f.read(most + 1)
    if len(data) > most:
        raise DataError(f"{name} is larger than {most >> 10} KiB")
    return data


def _json(folder: Path, name: str, most: int) -> tuple[dict[str, Any], bytes]:
    """Returns an object in a JSON file, and its bytes. Raises DataError."""
    try:
        raw = _bytes(folder, name, most)
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except FileNotFoundError as e:
        raise DataError(f"it lacks {name}") from e
    except OSError as e:
        raise DataError(f"{name} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{name} is not valid JSON: {clean(str(e), 120)}") from e
    if not isinstance(value, dict):
        raise DataError(f"{name} is not a JSON object")
    if not _sensible(value, MAX_DEPTH):
        raise DataError(f"{name} is nested too deeply, or has numbers out of range")
    return value, raw


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _sensible(value: Any, depth: int) -> bool:
    if depth <= 0:
        return False
    if isinstance(value, dict):
        return all(_sensible(v, depth - 1) for v in value.values())
    if isinstance(value, list):
        return all(_sensible(v, depth - 1) for v in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) < 2**63
