"""The method `ensemble`: a weighted sum of other methods' group scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tdabench.api import (
    Context,
    Example,
    Groups,
    Index,
    TDAMethod,
    UsageError,
    random_groups,
    read_arrays,
    read_settings,
    registry,
    write_arrays,
)

_REFERENCES = 64  # random groups on which scores are put on one scale


@dataclass(frozen=True, kw_only=True)
class Ensemble(TDAMethod):
    """score(q, S) = sum over members m of  weight_m score_m(q, S) / sd_m(q)

    sd_m(q) is the standard deviation of the member's scores of query q over 64 random groups of the
    target's `fraction`, so that weights compare methods whose scores have different scales. Each
    member pools groups in its own way, so that groups need not be sums even where all members'
    example scores are. Methods whose errors differ gain from each other.

    members  methods separated by semicolons, each with its weight (1) and parameters:
             "ekfac:damping=0.001;0.3*ngram:n=3,pooling=softmax,temperature=0.2". Parameters that
             contain commas stand in parentheses: "hybrid:settings=(share=0.25,time=100)"
    """

    name = "ensemble"
    family = "ensemble"
    source = "tdabench"
    summary = "weighted sum of several methods' group scores, each on its own scale"

    members: str = "logra;0.3*ngram"

    def __post_init__(self) -> None:
        self.parts()

    def parts(self) -> list[tuple[float, TDAMethod]]:
        """Returns the members with their weights. Raises UsageError for an invalid member."""
        out = []
        for text in filter(None, (p.strip() for p in self.members.split(";"))):
            head, _, given = text.partition(":")
            number, times, name = head.rpartition("*")
            try:
                weight = float(number) if times else 1.0
            except ValueError:
                raise UsageError(
                    f"{self.name}: {number!r} is not a weight", "Give 0.3*ngram:n=3"
                ) from None
            if name.strip() == self.name:
                raise UsageError(f"{self.name}: a member must be another method")
            params = read_settings(given, self.name, "logra;0.3*ngram:n=3,pooling=mean")
            out.append((weight, registry().method(name.strip()).cls.from_params(params)))
        if not out:
            raise UsageError(f"{self.name}: there are no members", "Give logra;0.3*ngram")
        return out

    def uses(self) -> Sequence[str]:
        return [n for _, member in self.parts() for n in (member.name, *member.uses())]

    def build(self, context: Context, train: Sequence[Example]) -> EnsembleIndex:
        found = [(w, m.build(context, train)) for w, m in self.parts()]
        groups = random_groups(
            context, train, _REFERENCES, context.target.fraction, "ensemble/groups"
        )
        return EnsembleIndex(self, found, groups)

    def load(self, context: Context, path: Path) -> EnsembleIndex:
        arrays, meta = read_arrays(path / "groups.safetensors")
        self.check_saved(path, meta)
        found = [
            (w, m.load(context, path / f"member-{i}")) for i, (w, m) in enumerate(self.parts())
        ]
        groups = Groups(arrays["indptr"], arrays["indices"], int(meta["n_train"]))
        return EnsembleIndex(self, found, groups)

    def prepare_cost(self, context: Context) -> Mapping[str, float] | None:
        total: dict[str, float] = {}
        for _, member in self.parts():
            for key, value in (member.prepare_cost(context) or {}).items():
                total[key] = total.get(key, 0.0) + value
        return total or None


class EnsembleIndex(Index):
    """The members' indices with their weights, and the groups that give the scales."""

    pooling = "own"  # each member pools in its own way

    def __init__(
        self, method: Ensemble, found: list[tuple[float, Index]], references: Groups
    ) -> None:
        self.method, self.found, self.references = method, found, references
        self.n_train = found[0][1].n_train

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        return self.score_groups(queries, Groups.singletons(self.n_train))

    def score_groups(self, queries: Sequence[Example], groups: Groups) -> np.ndarray:
        n = len(self.references)
        both = Groups.of([*self.references, *groups], self.n_train)  # one pass over the queries
        total = np.zeros((len(queries), len(groups)))
        if not len(queries):
            return total.astype(np.float32)
        for weight, index in self.found:
            scores = np.asarray(index.score_groups(queries, both), dtype=np.float64)
            scale = scores[:, :n].std(axis=1) if n else np.zeros(len(queries))
            total += weight * scores[:, n:] / np.where(scale > 0, scale, 1.0)[:, None]
        return total.astype(np.float32)

    def save(self, path: Path) -> None:
        for i, (_, index) in enumerate(self.found):
            (path / f"member-{i}").mkdir()
            index.save(path / f"member-{i}")
        meta = {"method": self.method.name, "version": self.method.version}
        write_arrays(
            path / "groups.safetensors",
            {"indptr": self.references.indptr, "indices": self.references.indices},
            {**meta, "n_train": self.n_train},
        )
