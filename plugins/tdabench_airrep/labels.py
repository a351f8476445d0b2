"""Labels: the effect of retraining on subsets on the losses of held-out examples.

A cross-validation instance is a pool of training examples, dev examples outside it, and M subsets
of the pool; the target is fine-tuned on each subset and the loss of each dev example stored
(arXiv 2505.18513, section 3.2). An encoder is trained to rank the subsets of each dev example by
r = -(loss - mean) / std, with mean and population std over the instance's subsets, clipped to ±10.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.api import (
    Corpus,
    DataError,
    Groups,
    GuardError,
    UsageError,
    check_free,
    check_replaceable,
    fingerprint,
    named_seed,
    read_arrays,
    read_json,
    write_arrays,
    write_json,
)

if TYPE_CHECKING:
    from tdabench.api import Recipe, Target, TruthPlan

CLIP = 10.0


@dataclass(frozen=True)
class Instance:
    """One cross-validation instance.

    `dev` [dev] indexes the dev corpus, `subsets` the training corpus; `losses` is float32
    [subset, dev], NaN where a loss is unknown.
    """

    dev: np.ndarray
    subsets: Groups
    losses: np.ndarray

    def __post_init__(self) -> None:
        if self.losses.shape != (len(self.subsets), len(self.dev)):
            raise DataError(
                f"label losses of shape {self.losses.shape}, expected "
                f"({len(self.subsets)}, {len(self.dev)})"
            )

    @property
    def labels(self) -> np.ndarray:
        """r, float32 [dev, subset]; NaN where excluded."""
        return normalise(self.losses)

    @property
    def pool(self) -> np.ndarray:
        """Every training example in any subset, ascending."""
        return np.unique(self.subsets.indices)


def normalise(losses: np.ndarray) -> np.ndarray:
    """Converts losses [subset, dev] -> r [dev, subset], float32.

    A non-finite loss is excluded: its r is NaN, and it does not count in the mean or the std. A dev
    example with fewer than two finite losses is NaN throughout; one with equal losses is
    uninformative and gets 0.
    """
    x = np.where(np.isfinite(losses), losses, np.nan).astype(np.float64).T  # [dev, subset]
    n = np.isfinite(x).sum(1, keepdims=True)
    known = np.nan_to_num(x)
    mean = known.sum(1, keepdims=True) / np.maximum(n, 1)
    deviation = np.where(np.isfinite(x), x - mean, 0.0)
    std = np.sqrt((deviation**2).sum(1, keepdims=True) / np.maximum(n, 1))
    # Equal losses leave a rounding residue relative to the mean, which is not a spread.
    flat = std <= 1e-9 * np.maximum(1.0, np.abs(mean))
    r = -(x - mean) / np.where(flat, 1.0, std)
    r = np.where(flat & np.isfinite(x), 0.0, r)
    return np.where(n >= 2, np.clip(r, -CLIP, CLIP), np.nan).astype(np.float32)


@dataclass(frozen=True)
class Labels:
    """Instances over one training corpus and one dev corpus (which may be the same).

    `meta` records their origin: fingerprints of target, `train` and `dev`, the recipe,
    seeds, `retrainings`, `seconds` of wall time and `cpu_seconds` of all workers.
    """

    instances: tuple[Instance, ...]
    n_train: int
    n_dev: int
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def retrainings(self) -> int:
        return sum(len(i.subsets) for i in self.instances)

    def cut(self, instances: int, subsets: int, holdout: int) -> Labels:
        """Takes `subsets` of the first `instances`, and the last `holdout` instances whole.

        Raises UsageError if there are fewer.
        """
        kept = self.instances[: len(self.instances) - holdout]
        most = min((len(i.subsets) for i in kept), default=0)
        if not 1 <= instances <= len(kept) or not 2 <= subsets <= most:
            raise UsageError(
                f"{instances} instances of {subsets} subsets cannot be taken from {len(kept)} "
                f"instances of {most}, with {holdout} more held out"
            )
        some = [
            Instance(
                i.dev,
                Groups.of([i.subsets[g] for g in range(subsets)], self.n_train),
                i.losses[:subsets],
            )
            for i in kept[:instances]
        ]
        held = self.instances[len(self.instances) - holdout :] if holdout else ()
        cut = replace(self, instances=(*some, *held))
        share = cut.retrainings / max(1, self.retrainings)
        cost = {k: self.meta[k] * share for k in ("seconds", "cpu_seconds") if k in self.meta}
        return replace(cut, meta={**self.meta, **cost, "retrainings": cut.retrainings})

    def check(self, train: Corpus, dev: Corpus) -> None:
        """Raises GuardError unless these labels were made on these corpora, DataError if empty.

        Also raises if a subset contains a dev example of its own instance: the encoder would learn
        to recognise examples, not to attribute.
        """
        for what, corpus, n in (("train", train, self.n_train), ("dev", dev, self.n_dev)):
            made = self.meta.get(what)
            if made is not None and made != corpus.fingerprint:
                raise GuardError(
                    f"the labels were made on another {what} corpus ({made}, here "
                    f"{corpus.fingerprint})",
                    "Give the corpus they were made on, or make labels on this one with: "
                    "tdabench airrep labels",
                )
            if n != len(corpus):
                raise GuardError(
                    f"the labels are over {n} {what} examples, the corpus has {len(corpus)}"
                )
        for k, instance in enumerate(self.instances):
            refuse_overlap(k, instance, train, dev)
        if not any((np.isfinite(i.losses).sum(0) >= 2).any() for i in self.instances):
            raise DataError(
                "the labels have no dev example with two finite losses to rank",
                "Retrain with a smaller learning rate: tdabench airrep labels --recipe lr=…",
            )

    def excluded(self) -> list[str]:
        """Describes, one per line, the parts left out of training because of non-finite losses."""
        lines = []
        for k, instance in enumerate(self.instances):
            bad = ~np.isfinite(instance.losses)  # [subset, dev]
            whole = np.flatnonzero(bad.all(1))
            if len(whole):
                lines.append(f"instance {k}: {len(whole)} subsets without losses, first {whole[0]}")
            rest = bad[~bad.all(1)]
            dead = np.flatnonzero((~rest).sum(0) < 2)
            partial = int(rest.sum())
            if partial:
                lines.append(
                    f"instance {k}: {partial} losses are NaN or infinite, "
                    f"{len(dead)} dev examples are left with fewer than two"
                )
        return lines

    # ------------------------------------------------------------------ files

    def save(self, path: Path) -> None:
        """Writes the labels. Raises UsageError if `path` is another kind of file."""
        check_replaceable(path, "airrep-labels")
        arrays: dict[str, np.ndarray] = {}
        for k, i in enumerate(self.instances):
            arrays |= {
                f"{k:04d}.dev": i.dev.astype(np.int32),
                f"{k:04d}.indptr": i.subsets.indptr.astype(np.int64),
                f"{k:04d}.indices": i.subsets.indices.astype(np.int32),
                f"{k:04d}.losses": i.losses.astype(np.float32),
                f"{k:04d}.labels": i.labels,
            }
        meta = {**self.meta, "kind": "airrep-labels", "n_train": self.n_train}
        write_arrays(path, arrays, {**meta, "n_dev": self.n_dev, "instances": len(self.instances)})

    @classmethod
    def load(cls, path: Path) -> Labels:
        arrays, meta = read_arrays(path)
        if meta.pop("kind", "") != "airrep-labels":
            raise DataError(f"{path} is not a labels file", "Make one with: tdabench airrep labels")
        try:
            n_train, n_dev, n = (int(meta.pop(k)) for k in ("n_train", "n_dev", "instances"))
            instances = []
            for k in range(n):
                names = ("dev", "indptr", "indices", "losses")
                a = {name: arrays[f"{k:04d}.{name}"] for name in names}
                subsets = Groups(a["indptr"], a["indices"], n_train)
                instances.append(Instance(a["dev"].astype(np.int64), subsets, a["losses"]))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as e:
            raise DataError(f"{path} is a damaged labels file: {e!r}") from e
        return cls(tuple(instances), n_train, n_dev, meta)


def refuse_overlap(k: int, instance: Instance, train: Corpus, dev: Corpus) -> None:
    """Raises GuardError if a subset of instance `k` contains one of its dev examples."""
    ids = {train[int(i)].id for i in instance.pool}
    texts = {(train[int(i)].prompt, train[int(i)].response) for i in instance.pool}
    for d in instance.dev:
        e = dev[int(d)]
        if e.id in ids or (e.prompt, e.response) in texts:
            raise GuardError(
                f"instance {k}: the dev example {e.id!r} is in one of its own subsets",
                "It would explain its own loss: draw dev examples outside the pool",
            )


# --------------------------------------------------------------------------- making labels


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The draw of instances: all from the named seed, each independent of their number."""

    instances: int = 20
    subsets: int = 32
    pool_size: int = 2000
    subset_sizes: tuple[int, ...] = (1000,)
    dev: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("instances", "subsets", "pool_size", "dev"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.subset_sizes or not 0 < min(self.subset_sizes):
            raise UsageError("subset sizes must be positive")
        if max(self.subset_sizes) > self.pool_size:
            raise UsageError(
                f"subsets of {max(self.subset_sizes)} do not fit into a pool of {self.pool_size}"
            )

    def instance(self, k: int, n_train: int, n_dev: int) -> tuple[np.ndarray, np.ndarray, Groups]:
        """Draws (pool [pool_size] into train, dev [dev] into dev, subsets over the *pool*)."""
        if self.pool_size > n_train or self.dev > n_dev:
            raise UsageError(
                f"a pool of {self.pool_size} and {self.dev} dev examples cannot be drawn from "
                f"{n_train} and {n_dev}"
            )
        rng = np.random.default_rng(named_seed(self.seed, f"airrep-instance-{k}"))
        pool = np.sort(rng.choice(n_train, self.pool_size, replace=False))
        dev = np.sort(rng.choice(n_dev, self.dev, replace=False))
        sizes = [self.subset_sizes[j % len(self.subset_sizes)] for j in range(self.subsets)]
        members = [rng.choice(self.pool_size, size, replace=False) for size in sizes]
        return pool, dev, Groups.of(members, self.pool_size)


@dataclass(frozen=True)
class LabelJob:
    """The retrainings behind a labels file, in a folder: one truth build per instance."""

    target: Target
    train: Corpus
    dev: Corpus
    draw: Draw
    recipe: Recipe
    folder: Path

    def plan(self, k: int) -> tuple[TruthPlan, Corpus, Corpus, np.ndarray, np.ndarray]:
        """Returns (plan, pool, dev examples, their positions in train and dev) of instance `k`.

        Raises GuardError if a dev example is in the pool.
        """
        from tdabench.api import TruthPlan, check_disjoint

        pool, dev, groups = self.draw.instance(k, len(self.train), len(self.dev))
        pool_corpus, dev_corpus = self.train.subset(pool), self.dev.subset(dev)
        check_disjoint(pool_corpus, dev_corpus)
        plan = TruthPlan.of(
            f"airrep-labels-{k:03d}",
            self.target,
            pool_corpus,
            dev_corpus,
            groups=groups,
            n_seeds=1,
            recipe=self.recipe,
            seed=self.draw.seed,
        )
        return plan, pool_corpus, dev_corpus, pool, dev

    def place(self, k: int) -> Path:
        return self.folder / f"instance-{k:03d}"

    def describe(self) -> dict[str, Any]:
        return {
            "target": self.target.fingerprint,
            "target_name": self.target.name,
            "regime": self.target.regime,
            "train": self.train.fingerprint,
            "dev": self.dev.fingerprint,
            "recipe": self.recipe.as_dict(),
            "draw": {**asdict(self.draw), "subset_sizes": list(self.draw.subset_sizes)},
        }

    def claim(self) -> None:
        """Writes the job's description into the folder, or checks it. Instances can be added."""
        path = self.folder / "job.json"
        mine = self.describe()
        theirs = read_json(path) if path.is_file() else None
        ours = isinstance(theirs, dict) and set(theirs) == set(mine)
        check_free(
            self.folder, ["job.json", "cost.json", "labels.safetensors", "instance-*"], mine=ours
        )
        if theirs is not None:
            theirs["draw"]["instances"] = mine["draw"]["instances"]
            if fingerprint(theirs) != fingerprint(mine):
                differ = [k for k in mine if theirs.get(k) != mine[k]]
                raise DataError(
                    f"{self.folder} has labels of another job (differs in {', '.join(differ)})",
                    "Choose another folder",
                )
        write_json(path, mine)

    def run(self, workers: int, say: Callable[[str], None]) -> None:
        """Runs the missing retrainings, instance by instance; keeps the labels file current."""
        from tdabench.api import build_truth

        self.claim()
        for k in range(self.draw.instances):
            plan, pool, dev, _, _ = self.plan(k)
            began, n, done = time.perf_counter(), len(plan.units()), _count(self.place(k))
            if done == n:
                continue

            def on_unit(unit: Any, reason: str, k: int = k, n: int = n) -> None:
                nonlocal began, done
                now = time.perf_counter()
                self._charge(now - began)
                done += 1
                say(
                    f"instance {k + 1}/{self.draw.instances}, retraining {done}/{n}, "
                    f"{now - began:.1f} s{': failed: ' + reason if reason else ''}"
                )
                began = now

            place = self.place(k)
            build_truth(plan, self.target, pool, dev, place, workers=workers, on_unit=on_unit)
            self.collect().save(self.folder / "labels.safetensors")
        labels = self.collect()
        for line in labels.excluded():
            say(f"excluded: {line}")
        labels.save(self.folder / "labels.safetensors")

    def _charge(self, seconds: float) -> None:
        path = self.folder / "cost.json"
        spent = read_json(path)["seconds"] if path.exists() else 0.0
        write_json(path, {"seconds": round(spent + seconds, 3)})

    def collect(self) -> Labels:
        """Collects the labels of every instance with at least two finished retrainings.

        Subsets with failed or unfinished retrainings are left out.
        """
        from tdabench.api import finished_units, read_unit

        instances = []
        seconds: list[float] = []  # of the processor, for each retraining that measured it
        for k in range(self.draw.instances):
            if not self.place(k).exists():
                continue
            plan, _, _, pool, dev = self.plan(k)
            members, losses = [], []
            for unit in finished_units(plan, self.place(k)):
                row = read_unit(plan, self.place(k), unit)
                if row is not None:
                    members.append(pool[plan.groups[unit.group]])
                    losses.append(row.losses)
                    seconds += [] if row.cpu_seconds is None else [row.cpu_seconds]
            if len(losses) >= 2:
                subsets = Groups.of(members, len(self.train))
                instances.append(Instance(dev, subsets, np.stack(losses)))
        if not instances:
            raise DataError(f"{self.folder} contains no finished retrainings")
        cost = self.folder / "cost.json"
        meta = self.describe() | (read_json(cost) if cost.exists() else {"seconds": 0.0})
        meta["retrainings"] = sum(len(i.subsets) for i in instances)
        if seconds:  # retrainings that did not measure it count as the mean of those that did
            meta["cpu_seconds"] = round(float(np.mean(seconds)) * meta["retrainings"], 3)
        return Labels(tuple(instances), len(self.train), len(self.dev), meta)


def _count(folder: Path) -> int:
    return len(list((folder / "units").glob("*.safetensors")))
