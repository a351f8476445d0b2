"""Truth: the results of retraining. One loss per (group, seed, query), and its recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.data.examples import Corpus
from tdabench.errors import DataError, GuardError
from tdabench.groups import Groups
from tdabench.io import check_replaceable, read_arrays, write_arrays
from tdabench.targets.recipe import Recipe

if TYPE_CHECKING:
    from tdabench.targets.target import Target
    from tdabench.truth.plan import TruthPlan


SAME_MODEL = 5e-3  # nats: a float16 copy of a model differs by less, another seed by far more


# What a truth says of its making, beside its plan: by what, how smooth, in how many seconds, and
# after how many groups it was stopped (`truth.until`).
OF_ITS_MAKING = ("made_by", "metasmoothness", "seconds", "stopped")


@dataclass(frozen=True)
class Truth:
    """Losses of retrained models, float32 [group, seed, query].

    `plan` is the recipe: target and start checkpoint, fingerprints of corpus and queries,
    training recipe, seeds. A unit that failed repeatedly is NaN and is listed in `plan`.
    """

    losses: np.ndarray
    groups: Groups
    query_ids: tuple[str, ...]
    plan: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.groups), self.losses.shape[1], len(self.query_ids))
        if self.losses.ndim != 3 or self.losses.shape != shape:
            raise DataError(f"truth of shape {self.losses.shape}, expected {shape}")

    @property
    def n_seeds(self) -> int:
        return self.losses.shape[1]

    def is_of(self, plan: TruthPlan) -> bool:
        """Tells whether `plan` is the plan behind this truth, which may have been stopped early."""
        mine = {k: v for k, v in self.plan.items() if k not in OF_ITS_MAKING}
        groups, stopped = plan.groups, self.plan.get("stopped")
        if stopped:
            if not 0 < len(self.groups) < len(groups) == stopped.get("planned"):
                return False
            groups = groups[: len(self.groups)]
        return mine == plan.describe() and self.groups.fingerprint == groups.fingerprint

    @property
    def values(self) -> np.ndarray:
        """-loss averaged over seeds, float64 [query, group]: the reference for group scores."""
        return -self.losses.astype(np.float64).mean(axis=1).T

    def by_seed(self) -> np.ndarray:
        """Returns -loss of each seed, float64 [seed, query, group]."""
        return -self.losses.astype(np.float64).transpose(1, 2, 0)

    def for_queries(self, ids: Sequence[str]) -> Truth:
        """Returns the same truth for the queries `ids`, in that order."""
        place = {q: i for i, q in enumerate(self.query_ids)}
        missing = [q for q in ids if q not in place]
        if missing:
            raise DataError(
                f"the truth {self.plan.get('name', '')!r} has no losses for {len(missing)} of "
                f"{len(ids)} queries, first {missing[0]!r}"
            )
        index = [place[q] for q in ids]
        return Truth(self.losses[:, :, index], self.groups, tuple(ids), self.plan)

    def check(self, train: Corpus, target: Target, recipe: Recipe | None = None) -> None:
        """Raises GuardError unless this truth was made on this corpus, from this target and, where
        it names its recipe, by `recipe` (by default the target's)."""
        target_fingerprint = target.fingerprint_of(self.plan.get("start", "base"))
        for what, expected, found in (
            ("training corpus", self.plan.get("train"), train.fingerprint),
            ("target", self.plan.get("target"), target_fingerprint),
        ):
            if expected is not None and expected != found:
                raise GuardError(
                    f"the truth {self.plan.get('name', '')!r} was built on another {what} "
                    f"({expected}, here {found})",
                    "Rebuild it with: tdabench truth build",
                )
        declared = recipe or target.recipe
        made = Recipe.of(self.plan.get("recipe") or declared.as_dict())
        if differs := made.differs_from(declared):
            raise GuardError(
                f"the truth {self.plan.get('name', '')!r} was made by another recipe than "
                f"{target.name} declares: {differs}",
                "Declare the truth's under [targets.recipe] (or for this truth alone under its "
                "plan), or rebuild it with: tdabench truth build",
            )
        if self.groups.n_train != len(train):
            raise GuardError(
                f"the truth's groups are over {self.groups.n_train} examples, "
                f"the corpus has {len(train)}"
            )

    def check_apart(self, target: Target, checkpoints: Iterable[str], queries: Corpus) -> None:
        """Raises GuardError if a checkpoint is one of the retrained models behind this truth.

        It is recognised by behaviour, under any name: its losses on the queries equal, up to
        rounding, those that the truth records for a retraining. Two seeds of one group differ by
        far more. Checkpoints that the truth starts from are skipped.
        """
        own = self.for_queries(queries.ids)
        for name in checkpoints:
            if name == self.plan.get("start", "base"):
                continue
            found = target.losses(target.model(name), target.tokenize(queries))
            apart = np.abs(own.losses - found).mean(axis=2)  # [group, seed]
            if len(queries) and np.nanmin(apart, initial=np.inf) < SAME_MODEL:
                g, s = np.unravel_index(np.nanargmin(apart), apart.shape)
                which = f"it has the losses of group {g}, seed {s}"
                raise GuardError(
                    f"the checkpoint {name!r} of {target.name} is among the models behind the "
                    f"truth {self.plan.get('name', '')!r}: {which}",
                    "Score at a checkpoint that is not one of the retrained models",
                )

    def check_unseen(self, path: Path) -> None:
        """Raises GuardError if the file at `path`, which a method read, reveals this truth.

        This is a truth file with a group and a query of this truth: a method cannot be scored on
        data that it was fitted on, for any seed of the retraining.
        """
        try:
            other = Truth.load(path) if path.is_file() else None
        except DataError:
            return  # another kind of file
        if other is None or not set(other.query_ids) & set(self.query_ids):
            return
        mine = {g.tobytes() for g in self.groups}
        shared = sum(g.tobytes() in mine for g in other.groups)
        if shared:
            raise GuardError(
                f"the method was fitted on {shared} groups of the truth "
                f"{self.plan.get('name', '')!r} on which it is to be scored ({path.name})",
                "Give it retrainings of other groups: see docs/methods/datamodels.md",
            )

    def save(self, path: Path) -> None:
        """Writes the truth. Raises UsageError when a file is there that tdabench did not write."""
        check_replaceable(path)
        write_arrays(
            path,
            {"losses": self.losses.astype(np.float32), **pack(self.groups)},
            {"query_ids": list(self.query_ids), "n_train": self.groups.n_train, **self.plan},
        )

    @classmethod
    def load(cls, path: Path) -> Truth:
        arrays, meta = read_arrays(path)
        try:
            n_train, ids = meta.pop("n_train"), meta.pop("query_ids")
            if type(n_train) is not int or not isinstance(ids, list):
                raise DataError(f"{path} is not a truth file: n_train or query_ids is invalid")
            if not all(isinstance(i, str) for i in ids):
                raise DataError(f"{path} is not a truth file: a query id is not a string")
            groups = unpack(arrays, n_train)
            if "stopped" in meta and not _is_stop(meta["stopped"], len(groups)):
                raise DataError(f"{path} does not say properly where its build was stopped")
            return cls(arrays["losses"], groups, tuple(ids), meta)
        except KeyError as e:
            raise DataError(f"{path} is not a truth file: it lacks {e}") from e
        except (TypeError, ValueError, IndexError, OverflowError) as e:
            raise DataError(f"{path} is a damaged truth file: {e!r}") from e


def _is_stop(said: Any, n_groups: int) -> bool:
    """Tells whether `stopped` of a truth of so many groups has the form that `truth.until` wrote.

    The last of its looks, [groups, LDS, width] each, is where the build was stopped.
    """
    try:
        ends = [(int(n), float(lds), float(width)) for n, lds, width in said["looks"]]
        return (
            ends[-1][0] == said["groups"] == n_groups < said["planned"]
            and isinstance(said["reference"]["name"], str)
            and float(said["width"]) > 0
        )
    except (TypeError, ValueError, KeyError, IndexError):
        return False


def pack(groups: Groups) -> dict[str, np.ndarray]:
    """Packs groups in the smaller form: one bit per (group, example), or CSR arrays."""
    if len(groups) * (-(-groups.n_train // 8)) < 4 * len(groups.indices):
        member = groups.membership(np.uint8).toarray()
        return {"members": np.packbits(member, axis=1)}  # [group, ceil(train / 8)]
    return {
        "indptr": groups.indptr.astype(np.int64),
        "indices": groups.indices.astype(np.int32),
    }


def unpack(arrays: Mapping[str, np.ndarray], n_train: int) -> Groups:
    """Returns the groups that `pack` wrote. Raises KeyError if there are none."""
    if "members" not in arrays:
        return Groups(arrays["indptr"], arrays["indices"], n_train)
    packed = arrays["members"]
    if packed.ndim != 2 or packed.shape[1] != -(-n_train // 8):
        raise DataError(f"groups of {packed.shape} bytes do not match {n_train} examples")
    member = np.unpackbits(packed, axis=1, count=n_train)
    return Groups.of((np.flatnonzero(row) for row in member), n_train)
