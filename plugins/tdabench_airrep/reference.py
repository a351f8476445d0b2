"""Reads labels in the layout of the public AirRep code."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.api import Corpus, DataError, Groups, read_json
from tdabench_airrep.labels import Instance, Labels, refuse_overlap


def read_reference(
    index: Path, losses: Path, corpus: Corpus, *, allow_missing: bool = False
) -> Labels:
    """Reads labels in the layout of the public code: subset index lines and loss files.

    Each line of `index` has `id`, `select` (training indices), `dev` (dev indices) and `dev_id`
    (the instance); `losses` is a folder of `loss-<id>.json` or a JSON-lines file, each with
    `pair_id`, `dev_id` and `losses` in the order of `dev`. Both index `corpus`.

    Raises DataError for a malformed line or a missing loss file (unless `allow_missing`, which
    excludes that subset), GuardError for a subset with dev examples.
    """
    found = {str(row["pair_id"]): row for row in _loss_rows(Path(losses))}
    by_dev: dict[str, list[dict[str, Any]]] = {}
    for n, row in _lines(Path(index)):
        for key in ("id", "select", "dev", "dev_id"):
            if key not in row:
                raise DataError(f"{index}, line {n}: the field {key!r} is missing")
        by_dev.setdefault(str(row["dev_id"]), []).append(row)
    if not by_dev:
        raise DataError(f"{index} contains no subsets")
    missing = [str(r["id"]) for rows in by_dev.values() for r in rows if str(r["id"]) not in found]
    if missing and not allow_missing:
        raise DataError(
            f"{losses} lacks the losses of {len(missing)} subsets, first {missing[0]!r}",
            "Retrain on them, or pass --allow-missing to leave them out",
        )
    instances = []
    for k, (dev_id, rows) in enumerate(by_dev.items()):
        dev = _numbers(index, rows[0]["dev"], "dev", "iu").astype(np.int64)
        if len(dev) and not 0 <= dev.min() <= dev.max() < len(corpus):
            raise DataError(f"{index}: a dev example is outside the corpus of {len(corpus)}")
        values, members = [], []
        for row in rows:
            if row["dev"] != rows[0]["dev"]:
                raise DataError(
                    f"{index}: subset {row['id']!r} has other dev examples than {dev_id}"
                )
            loss = found.get(str(row["id"]))
            if loss is None:
                continue
            measured = loss["losses"]
            fits = isinstance(measured, list) and len(measured) == len(dev)
            if not fits or str(loss.get("dev_id", dev_id)) != dev_id:
                raise DataError(f"the losses of subset {row['id']!r} do not belong to its line")
            members.append(_numbers(index, row["select"], "select", "iu"))
            known = [np.nan if v is None else v for v in measured]
            values.append(_numbers(losses, known, "losses", "iuf").astype(np.float64))
        if not members:
            continue
        array = np.asarray(values, dtype=np.float32).reshape(len(members), len(dev))
        instance = Instance(dev, Groups.of(members, len(corpus)), array)
        refuse_overlap(k, instance, corpus, corpus)
        instances.append(instance)
    n = len(corpus)
    meta = {"train": corpus.fingerprint, "dev": corpus.fingerprint, "layout": "reference"}
    labels = Labels(tuple(instances), n, n, meta)
    return Labels(labels.instances, n, n, {**meta, "retrainings": labels.retrainings})


def _numbers(path: Path, values: Any, key: str, kinds: str) -> np.ndarray:
    """Converts a list of numbers to an array; raises DataError for anything else."""
    try:
        array = np.asarray(values if isinstance(values, list) else None)
    except (TypeError, ValueError, OverflowError) as e:
        raise DataError(f"{path}: {key} is not a list of numbers: {e}") from e
    if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        raise DataError(f"{path}: {key} must list {'integers' if kinds == 'iu' else 'numbers'}")
    return array


def _loss_rows(path: Path) -> Iterable[dict[str, Any]]:
    if path.is_dir():
        rows: Sequence[dict[str, Any]] = [read_json(p) for p in sorted(path.glob("*.json"))]
    else:
        rows = [row for _, row in _lines(path)]
    for row in rows:
        if not isinstance(row, dict) or "pair_id" not in row or "losses" not in row:
            raise DataError(f"{path}: a loss record lacks pair_id or losses")
    return rows


def _lines(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"cannot read {path}: {e}") from e
    for n, line in enumerate(text.split("\n"), start=1):  # a string may contain U+2028
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise DataError(f"{path}, line {n}: not valid JSON ({e})") from e
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {n}: expected an object")
            yield n, row
