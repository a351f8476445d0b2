"""Truth in the published layout: one line of JSON per group.

`train_subset` lists training indices, `test_loss` one loss per query (a data card calls it
`test_score`). See docs/truth.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from tdabench.data.examples import Corpus
from tdabench.errors import DataError, UsageError
from tdabench.groups import Groups
from tdabench.io import open_own, write_text
from tdabench.truth.store import Truth


def export_lds(path: Path, out: Path) -> int:
    """Writes the truth in `path`, losses averaged over seeds; returns the number of groups."""
    _check_place(out)
    truth = Truth.load(path)
    mean = truth.losses.astype(np.float64).mean(axis=1)
    lines = [
        json.dumps({"train_subset": ids.tolist(), "test_loss": [float(x) for x in row]})
        for ids, row in zip(truth.groups, mean)
    ]
    write_text(out, "\n".join(lines) + "\n")
    return len(lines)


def _check_place(out: Path) -> None:
    """Raises UsageError when something lies at `out` that `export_lds` did not write."""
    if not os.path.lexists(out):
        return
    try:
        with open_own(out, "rb") as f:
            line = f.readline(1 << 26)
        if {"train_subset", "test_loss"} == set(json.loads(line)):
            return
    except (OSError, DataError, ValueError, TypeError, RecursionError):
        pass
    raise UsageError(
        f"{out} is there, and is not an exported truth",
        "Remove it, or choose another file with --out",
    )


def import_lds(path: Path, train: Corpus, queries: Corpus) -> Truth:
    """Reads a truth of one seed from published lines. Raises DataError naming a malformed line."""
    groups, losses = [], []
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from e
    for n, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw.decode("utf-8"))
            subset, loss = row["train_subset"], row.get("test_loss", row.get("test_score"))
            group = Groups.of([subset], len(train))[0]
            values = np.asarray(loss)
            if values.dtype.kind not in "iuf":
                raise TypeError(f"losses of type {values.dtype}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise DataError(f"{path}, line {n}: not a train_subset with test_loss ({e!r})") from e
        except DataError as e:
            raise DataError(f"{path}, line {n}: {e.message}", e.remedy) from e
        if values.shape != (len(queries),):
            raise DataError(
                f"{path}, line {n}: {values.size} losses for {len(queries)} queries",
                "Give the query file that the losses were measured on",
            )
        groups.append(group)
        losses.append(values.astype(np.float32))
    if not groups:
        raise DataError(f"{path} contains no groups")
    plan = {"name": Path(path).stem, "train": train.fingerprint, "queries": queries.fingerprint}
    stacked = np.stack(losses)[:, None, :]
    return Truth(stacked, Groups.of(groups, len(train)), tuple(queries.ids), plan)
