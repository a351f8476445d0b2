"""Truths of other projects, and ours in the layout that AirRep's authors publish.

    lines     one line of JSON per group (AirRep, STRIDE): `train_subset` lists training indices,
              `test_loss` one loss per query (a data card calls it `test_score`). Lines with `_meta`
              describe the file. Where there is a `train_subset_global`, its indices are ids of the
              pool's examples.
    arrays    losses or margins [group, query] beside masks [group, train] (kronfluence)
    dattri    a folder with target_values_lds.pt and indices_lds.pt
    bergson   a folder with subsets.json (examples left out) and query_loss_cache/losses_*.pt
    airrep    a folder of loss-*.json of AirRep's training data, beside its index file

See docs/suites.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.data.examples import Corpus
from tdabench.errors import DataError, UsageError, first_line
from tdabench.groups import Groups
from tdabench.io import open_input, open_own, read_json, sha256_file, write_text
from tdabench.truth.numbers import SUFFIXES, read_one
from tdabench.truth.store import Truth

VALUES = ("loss", "margin")  # lower is better, or higher is better
LISTS = (".json", ".yaml", ".yml")  # lists of training indices, one per group
MAX_LISTS = 512 << 20  # bytes of such a file
MAX_LINE = 256 << 20  # bytes of one line of JSON


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


def import_truth(
    sources: Sequence[Path],
    train: Corpus,
    queries: Corpus,
    *,
    masks: Path | None = None,
    values: str = "",
    left_out: bool = False,
) -> Truth:
    """Reads a truth of another project; several sources are seeds of the same groups.

    `masks` belongs to sources that are arrays: bool or 0/1 [group, train], training indices
    [group, size], or a JSON or YAML file of lists of them; with `left_out` they are the examples
    that a group was trained without. `values` is "loss" (the default) or "margin", which is higher
    where the model is better. Raises DataError or UsageError naming the file, and what is missing.
    """
    if values not in ("", *VALUES):
        raise UsageError(f"unknown kind of values {values!r}", f"One of: {', '.join(VALUES)}")
    if not sources:
        raise UsageError("no file to import was given")
    found = [_import_one(Path(s), train, queries, masks, values, left_out) for s in sources]
    first = found[0]
    for source, other in zip(sources[1:], found[1:]):
        if other.groups.fingerprint != first.groups.fingerprint:
            raise DataError(
                f"{source} is of other groups than {sources[0]}, so it is not another seed of them"
            )
    losses = np.concatenate([t.losses for t in found], axis=1)
    return Truth(losses, first.groups, first.query_ids, first.plan)


def _import_one(
    source: Path,
    train: Corpus,
    queries: Corpus,
    masks: Path | None,
    values: str,
    left_out: bool,
) -> Truth:
    source, _, name = str(source).partition("#")  # type: ignore[assignment]
    path = Path(source)
    if not path.exists():
        raise DataError(f"{path} is missing", "Check the path")
    if path.is_dir():
        path, name, masks, values, left_out = _in_folder(path, masks, values, left_out)
    if path.suffix not in SUFFIXES:
        if masks is not None:
            raise UsageError(
                f"{path} names its groups itself", "Leave out --masks: it belongs to arrays"
            )
        if values == "margin":
            raise UsageError(f"{path} holds losses", "Leave out --values margin")
        return import_lds(path, train, queries)
    if masks is None:
        raise UsageError(
            f"{path} holds values, and nothing says which examples each group was trained on",
            "Give them: --masks FILE (bool [group, train], or lists of training indices)",
        )
    at = Path(f"{path}#{name}") if name else path
    return import_arrays(at, masks, train, queries, values=values or "loss", left_out=left_out)


def _in_folder(
    folder: Path, masks: Path | None, values: str, left_out: bool
) -> tuple[Path, str, Path | None, str, bool]:
    """Finds the values and the groups in a folder as other projects write them."""
    for inside in (folder, folder / "lds"):  # dattri: benchmark/<name>/lds
        if (inside / "target_values_lds.pt").exists():
            return (
                inside / "target_values_lds.pt", "", masks or inside / "indices_lds.pt",
                values or "margin", left_out,  # dattri stores the negative loss
            )  # fmt: skip
    if (folder / "subsets.json").exists():  # bergson: one left-out list per retrained model
        kept = sorted((folder / "query_loss_cache").glob("losses_*.pt"))
        if len(kept) > 1:
            names = ", ".join(p.name for p in kept)
            raise UsageError(
                f"{folder} holds losses of {len(kept)} sets of queries: {names}",
                "Give the file of one, with --masks subsets.json --left-out",
            )
        if not kept:
            raise DataError(
                f"{folder} holds no losses (query_loss_cache/losses_*.pt)",
                "bergson writes them when it validates scores against the bank",
            )
        return kept[0], "per_subset", masks or folder / "subsets.json", values, True
    raise DataError(
        f"{folder} is not a truth that can be imported",
        "Give a file, a folder of dattri (target_values_lds.pt) or of bergson (subsets.json)",
    )


# --------------------------------------------------------------------------- arrays


def import_arrays(
    source: Path,
    masks: Path,
    train: Corpus,
    queries: Corpus,
    *,
    values: str = "loss",
    left_out: bool = False,
) -> Truth:
    """Reads values [group, query] or [group, seed, query] and the groups behind them.

    Losses may be sums or means over a query's tokens: LDS ranks groups for each query, so that the
    scale does not matter. A margin is stored as its negative. Raises DataError naming the file.
    """
    groups = read_groups(masks, len(train), left_out)
    found = np.asarray(read_one(source, "per_subset"), dtype=np.float64)
    if found.ndim == 2:
        found = found[:, None]
    shape = (len(groups), len(queries))
    if found.ndim != 3 or (found.shape[0], found.shape[2]) != shape:
        turned = found.ndim == 3 and (found.shape[2], found.shape[0]) == shape
        raise DataError(
            f"{source} holds values of shape {_shape(found)} for {len(groups)} groups and "
            f"{len(queries)} queries",
            "It is transposed: values are [group, query]"
            if turned
            else "Give the corpora and masks that it was measured on",
        )
    if not np.isfinite(found).all():
        bad = int((~np.isfinite(found)).sum())
        raise DataError(f"{source}: {bad} values are NaN or infinite")
    plan = {
        **_plan(Path(str(source).partition("#")[0]), train, queries),
        "values": values,
        "masks": sha256_file(Path(str(masks).partition("#")[0]))[:16],
    }
    losses = (-found if values == "margin" else found).astype(np.float32)
    return Truth(losses, groups, tuple(queries.ids), plan)


def read_groups(masks: Path, n_train: int, left_out: bool = False) -> Groups:
    """Reads groups over `n_train` examples from masks or lists of indices. Raises DataError."""
    text = str(masks).partition("#")[0]
    rows: list[Any]
    if Path(text).suffix in LISTS:
        rows = _lists(Path(text))
    else:
        array = read_one(masks, "masks")
        if array.ndim != 2:
            raise DataError(f"{masks}: masks of shape {array.shape}, not [group, train]")
        binary = array.dtype.kind == "b" or bool(np.isin(array, (0, 1)).all())
        if binary and array.shape[1] == n_train:
            rows = [np.flatnonzero(row) for row in array]
        elif binary and array.shape[1] > 2:
            raise DataError(
                f"{masks}: masks over {array.shape[1]} examples, the corpus has {n_train}",
                "Give the training corpus that the groups were drawn from, in its order",
            )
        elif array.dtype.kind == "f" and not (array == np.floor(array)).all():
            raise DataError(f"{masks} holds fractions, which are neither masks nor indices")
        else:
            rows = list(array.astype(np.int64))
    out = []
    for n, row in enumerate(rows):
        try:
            out.append(Groups.of([row], n_train)[0])
        except DataError as e:
            raise DataError(f"{masks}, group {n}: {e.message}", e.remedy) from e
        except (ValueError, TypeError, OverflowError) as e:
            raise DataError(f"{masks}, group {n}: not a list of training indices") from e
    if left_out:
        whole = np.arange(n_train)
        out = [np.setdiff1d(whole, row) for row in out]
    if not out:
        raise DataError(f"{masks} contains no groups")
    return Groups.of(out, n_train)


def _lists(path: Path) -> list[Any]:
    """Reads lists of training indices, JSON or YAML (quanda's lds_subsets.yaml)."""
    if not path.exists():
        raise DataError(f"{path} is missing", "Check the path")
    if path.suffix == ".json":
        value = read_json(path)
    else:
        import yaml

        if path.stat().st_size > MAX_LISTS:
            raise DataError(f"{path} is larger than {MAX_LISTS >> 20} MiB")
        try:
            with open_input(path) as f:
                value = yaml.load(f, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (yaml.YAMLError, ValueError, RecursionError) as e:
            raise DataError(f"{path} is not valid YAML: {first_line(e)}") from e
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise DataError(f"{path} is not a list of lists of training indices")
    return value


def _shape(array: np.ndarray) -> str:
    return " x ".join(map(str, array.shape if array.shape[1:2] != (1,) else array[:, 0].shape))


def _plan(path: Path, train: Corpus, queries: Corpus) -> dict[str, Any]:
    return {
        "name": path.stem,
        "train": train.fingerprint,
        "queries": queries.fingerprint,
        "imported": sha256_file(path)[:16],
    }


# --------------------------------------------------------------------------- lines


def import_lds(path: Path, train: Corpus, queries: Corpus) -> Truth:
    """Reads a truth of one seed from published lines.

    `train_subset` lists positions in the training corpus. Where lines carry a
    `train_subset_global` (STRIDE), these are the ids of the corpus's examples instead, since
    `train_subset` then counts within a pool that the file does not contain. Raises DataError naming
    a malformed line, or the examples that the pool lacks.
    """
    groups: list[Any] = []
    losses = []
    keyed = False
    for n, row in _lines(Path(path)):
        try:
            keyed = keyed or (not groups and "train_subset_global" in row)
            subset = row["train_subset_global" if keyed else "train_subset"]
            values = np.asarray(row.get("test_loss", row.get("test_score")))
            if values.dtype.kind not in "iuf":
                raise TypeError(f"losses of type {values.dtype}")
            if keyed:
                local = row.get("train_subset", subset)
                if len(local) != len(subset) or any(type(i) is not int for i in subset):
                    raise TypeError("train_subset and train_subset_global differ in length")
                group = subset
            else:
                group = Groups.of([subset], len(train))[0]
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
    if keyed:
        groups = _by_id(path, groups, train)
    stacked = np.stack(losses)[:, None, :]
    plan = _plan(Path(path), train, queries)
    return Truth(stacked, Groups.of(groups, len(train)), tuple(queries.ids), plan)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of a file of JSON lines, without blank and `_meta` lines."""
    try:
        f = open_input(path)
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from e
    with f:
        n = 0
        while raw := f.readline(MAX_LINE):
            n += 1
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8"))
                if not isinstance(row, dict):
                    raise TypeError(type(row).__name__)
            except (ValueError, TypeError, RecursionError) as e:
                raise DataError(
                    f"{path}, line {n}: not a train_subset with test_loss ({e!r})"
                ) from e
            if "_meta" not in row:
                yield n, row


def _by_id(path: Path, groups: list[list[int]], train: Corpus) -> list[list[int]]:
    """Returns groups of corpus-wide indices as groups of positions in the pool."""
    place = {id: n for n, id in enumerate(train.ids)}
    named = {i for group in groups for i in group}
    lacking = sorted(i for i in named if str(i) not in place)
    if lacking:
        raise DataError(
            f"{path} names {len(named):,} examples of a corpus by index, and the pool lacks "
            f"{len(lacking):,} of them as ids, first {lacking[0]}",
            'Give the pool as lines {"id": INDEX, "text": …} with these indices (docs/suites.md)',
        )
    out = [[place[str(i)] for i in group] for group in groups]
    for group in out:
        if len(set(group)) < len(group):
            raise DataError(f"{path} names an example twice in a group")
    return out


# --------------------------------------------------------------------------- AirRep's banks


def import_bank(
    losses: Path, index: Path, data: Corpus, split: int
) -> tuple[Truth, Corpus, Corpus]:
    """Reads one cross-validation split of AirRep's training data as a truth.

    `losses` is the folder of loss-*.json, `index` the file of lines {id, select, dev, dev_id}, both
    as its public code writes them, and `data` the examples that they index. Returns the truth, the
    pool (all examples but the split's dev set) and the queries (the dev set). Raises DataError
    naming what is missing.
    """
    rows = [(n, r) for n, r in _lines(index) if r.get("dev_id") == split]
    known = sorted({int(r["dev_id"]) for _, r in _lines(index) if type(r.get("dev_id")) is int})
    if not rows:
        raise UsageError(
            f"{index} has no subsets of the split {split}",
            f"It has: {', '.join(map(str, known[:10]))}",
        )
    groups, values, lacking = [], [], []
    dev: list[int] = []
    for n, row in rows:
        try:
            chosen, held = [int(i) for i in row["select"]], [int(i) for i in row["dev"]]
            for i in (*chosen, *held):
                if not 0 <= i < len(data):
                    raise DataError(f"{index}, line {n}: {i} is not one of {len(data)} examples")
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(f"{index}, line {n}: not a subset ({e!r})") from e
        if dev and held != dev:
            raise DataError(f"{index}, line {n}: another dev set than the line before")
        dev = held
        name = f"loss-{row.get('id')}.json"
        if os.sep in name or not (losses / name).exists():
            lacking.append(name)
            continue
        found = read_json(losses / name)
        found = np.asarray(found.get("losses") if isinstance(found, dict) else None)
        if found.shape != (len(dev),) or found.dtype.kind not in "iuf":
            raise DataError(f"{losses / name}: not {len(dev)} losses")
        groups.append(chosen)
        values.append(found.astype(np.float32))
    if not groups:
        raise DataError(f"{losses} lacks {lacking[0]} and {len(lacking) - 1} other files")
    if set(dev) & {i for g in groups for i in g}:
        raise DataError(f"{index}: a subset of the split {split} contains examples of its dev set")
    held_out = set(dev)
    pool = [i for i in range(len(data)) if i not in held_out]
    place = {i: n for n, i in enumerate(pool)}
    train = Corpus([data[i] for i in pool], f"{data.name}-pool")
    queries = Corpus([data[i] for i in dev], f"{data.name}-dev")
    plan = {**_plan(index, train, queries), "split": split, "not_there": len(lacking)}
    stacked = np.stack(values)[:, None, :]
    inner = Groups.of([[place[i] for i in g] for g in groups], len(train))
    return Truth(stacked, inner, tuple(queries.ids), plan), train, queries
