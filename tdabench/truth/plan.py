"""The plan of a truth: a file that defines the retrainings and their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.data.examples import Corpus
from tdabench.errors import DataError, GuardError, UsageError, unknown
from tdabench.groups import Groups
from tdabench.io import check_replaceable, fingerprint, read_arrays, write_arrays
from tdabench.seeds import named_seed
from tdabench.targets.recipe import Recipe
from tdabench.targets.target import Target


@dataclass(frozen=True, order=True)
class Unit:
    """One retraining: group `group` with its seed number `seed`."""

    group: int
    seed: int

    @property
    def name(self) -> str:
        return f"g{self.group:05d}-s{self.seed:02d}"


@dataclass(frozen=True)
class TruthPlan:
    """Groups x seeds from one checkpoint with one recipe, evaluated on one set of queries.

    `target`, `train` and `queries` are fingerprints. Two plans with the same `key` define the same
    numbers. `order` is how a seed orders examples: with "own" each retraining draws an order of its
    group; with "pool" a seed draws one order of the whole pool, the same for every group, in which
    examples outside the group have weight zero. Common orders cancel when groups are compared,
    which reveals the effect of leaving out a few examples (see docs/truth.md).
    """

    name: str
    groups: Groups
    n_seeds: int
    recipe: Recipe
    target: str
    train: str
    queries: str
    query_ids: tuple[str, ...]
    start: str = "base"
    seed: int = 0
    order: str = "own"
    note: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.order not in ("own", "pool"):
            raise unknown("order of a truth plan", self.order, ("own", "pool"))

    @classmethod
    def draw(
        cls,
        name: str,
        target: Target,
        train: Corpus,
        queries: Corpus,
        *,
        n_groups: int,
        fraction: float,
        n_seeds: int,
        recipe: Recipe,
        start: str = "base",
        seed: int = 0,
        order: str = "own",
        groups_of: str = "",
    ) -> TruthPlan:
        """Draws a plan over uniform groups. The draw depends only on `name` and `seed`.

        `groups_of` names another plan whose draw this one repeats: truths over the same groups
        share their bootstrap's draws. Raises GuardError when a query is also a training example,
        and UsageError when a group is smaller than a batch.
        """
        check_disjoint(train, queries)
        size = max(1, round(fraction * len(train)))
        if size < min(recipe.batch_size, len(train)):
            raise UsageError(
                f"groups of {size} examples ({fraction:g} of {len(train)}) are smaller than a "
                f"batch of the recipe ({recipe.batch_size})",
                "Raise the fraction, or lower batch_size in the recipe",
            )
        rng = np.random.default_rng(named_seed(seed, f"groups-{groups_of or name}"))
        groups = Groups.random(n_groups, len(train), fraction, rng)
        return cls.of(
            name, target, train, queries, groups=groups, n_seeds=n_seeds, recipe=recipe,
            start=start, seed=seed, order=order,
        )  # fmt: skip

    @classmethod
    def of(
        cls,
        name: str,
        target: Target,
        train: Corpus,
        queries: Corpus,
        *,
        groups: Groups,
        n_seeds: int,
        recipe: Recipe,
        start: str = "base",
        seed: int = 0,
        order: str = "own",
    ) -> TruthPlan:
        """Makes a plan over the given groups. `start` is a checkpoint of `target`, or "scratch"."""
        if groups.n_train != len(train):
            raise GuardError(f"groups over {groups.n_train} examples, a corpus of {len(train)}")
        return cls(
            name=name,
            groups=groups,
            n_seeds=n_seeds,
            recipe=recipe,
            target=target.fingerprint_of(start),
            train=train.fingerprint,
            queries=queries.fingerprint,
            query_ids=tuple(queries.ids),
            start=start,
            seed=seed,
            order=order,
        )

    def units(self) -> list[Unit]:
        """Lists every retraining, seeds outermost, so that a partial build is a smaller truth."""
        return [Unit(g, s) for s in range(self.n_seeds) for g in range(len(self.groups))]

    def run_seed(self, unit: Unit) -> int:
        """Returns a retraining's seed, for example order, adapters, and weights from scratch."""
        if self.order == "pool":
            return named_seed(self.seed, f"{self.name}-s{unit.seed:02d}")
        return named_seed(self.seed, f"{self.name}-{unit.name}")

    def describe(self) -> dict[str, Any]:
        """Returns the part of a plan that a truth records."""
        return {
            "name": self.name,
            "n_seeds": self.n_seeds,
            "recipe": self.recipe.as_dict(),
            "target": self.target,
            "train": self.train,
            "queries": self.queries,
            "start": self.start,
            "seed": self.seed,
            **({"order": self.order} if self.order != "own" else {}),
        }

    @property
    def key(self) -> str:
        return fingerprint([self.describe(), self.groups.fingerprint, list(self.query_ids)])

    def check(self, target: Target, train: Corpus, queries: Corpus) -> None:
        """Raises GuardError naming differences from the plan."""
        for what, planned, found in (
            ("target", self.target, target.fingerprint_of(self.start)),
            ("training corpus", self.train, train.fingerprint),
            ("query set", self.queries, queries.fingerprint),
        ):
            if planned != found:
                raise GuardError(
                    f"the plan {self.name!r} is for another {what} ({planned}, here {found})",
                    "Build on the plan's data, or make a new plan: tdabench truth plan",
                )

    def save(self, path: Path) -> None:
        """Writes the plan. Raises UsageError when another kind of file is there."""
        check_replaceable(path, "truth-plan")
        write_arrays(
            path,
            {"indptr": self.groups.indptr, "indices": self.groups.indices.astype(np.int32)},
            {
                **self.describe(),
                "n_train": self.groups.n_train,
                "query_ids": list(self.query_ids),
                "kind": "truth-plan",
            },
        )

    @classmethod
    def load(cls, path: Path) -> TruthPlan:
        arrays, meta = read_arrays(path)
        if meta.pop("kind", "") != "truth-plan":
            raise DataError(f"{path} is not a truth plan")
        groups = Groups(arrays["indptr"], arrays["indices"], meta.pop("n_train"))
        recipe = Recipe(**meta.pop("recipe"))
        ids = tuple(meta.pop("query_ids"))
        return cls(groups=groups, recipe=recipe, query_ids=ids, **meta)


def check_disjoint(train: Corpus, queries: Corpus) -> None:
    """Raises GuardError if a query (by id or by text) is among the training examples.

    The training examples are read once: their corpus may not fit in memory.
    """
    asked = {q.id: q.id for q in queries} | {(q.prompt, q.response): q.id for q in queries}
    for e in train:
        found = asked.get(e.id) or asked.get((e.prompt, e.response))
        if found is not None:
            raise GuardError(
                f"the query {found!r} is also a training example",
                "It would explain its own loss: remove it from one of the two",
            )
