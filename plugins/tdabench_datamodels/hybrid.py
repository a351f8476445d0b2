"""The method `hybrid`: a datamodel whose prior is another method's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from tdabench.api import (
    Context,
    Corpus,
    Example,
    Groups,
    Index,
    MethodError,
    TDAMethod,
    UsageError,
    losses_of,
    pooled_hidden_states,
    random_groups,
    read_arrays,
    read_settings,
    registry,
    retrained,
    write_arrays,
)
from tdabench_datamodels.regression import Prior, posterior

if TYPE_CHECKING:
    from tdabench.api import Truth


@dataclass(frozen=True, kw_only=True)
class Hybrid(TDAMethod):
    """Datamodel weights with a prior from another method, given few retrainings.

    -loss_q(S) = b_q + sum_(z in S) w_qz + noise for random groups S, as in `datamodels`, and

        w_q ~ N(a s_q, D_q^1/2 (K + I) D_q^1/2),   D_q = floor + s_q^2 / mean(s_q^2)

    where s_q are the base method's scores of query q. The score is the posterior mean of w_qz
    (`regression.posterior`). The base says which examples may matter (the variance D) and in which
    direction (the mean a s); the retrainings say how much each does. K, an inner product of
    whitened hidden states of training examples, lets similar examples share evidence.

    base         the method whose scores are the prior; its scores per example are used, not its
                 pooling
    settings     its parameters, as "damping=0.001,checkpoint=base"
    retrainings  number of retrainings, on random groups of the target's `fraction`, by the
                 target's recipe. They are made while building, and the models are kept as
                 float16; a query is evaluated by each of them. 0 gives the base's scores
    asset        a truth file of the suite to take retrainings from instead (the first
                 `retrainings` of it), which can only score the queries that it holds
    agreement    prior mean of the correlation between the base's group scores and outcomes
    spread       prior standard deviation of that correlation
    noise        share of an outcome's variance that sums over members do not explain: training
                 noise and interactions
    floor        variance of the effect of an example to which the base assigns a score of 0
    kernel       "hidden", or "none" for K = 0
    """

    name = "hybrid"
    family = "retraining"
    source = "tdabench; datamodels are Ilyas et al. 2022, arXiv 2202.00622"
    summary = "few retrainings correct another method's scores (Bayesian datamodel)"
    grid = {"noise": (0.2, 0.4, 0.6), "floor": (0.1, 0.3)}
    query_time = ("agreement", "spread", "noise", "floor")
    check_settings = {"retrainings": 12}

    base: str = "ekfac"
    settings: str = ""
    retrainings: int = 96
    asset: str = ""
    agreement: float = 0.4
    spread: float = 0.15
    noise: float = 0.6
    floor: float = 0.3
    kernel: Literal["hidden", "none"] = "hidden"

    def __post_init__(self) -> None:
        if self.retrainings < 0:
            raise UsageError(f"{self.name}: retrainings must not be negative")
        if self.kernel not in ("hidden", "none"):
            raise UsageError(f"{self.name}: unknown kernel {self.kernel!r}", "One of: hidden, none")
        if not 0 < self.noise < 1 or self.floor < 0 or self.spread < 0:
            raise UsageError(f"{self.name}: noise is in (0, 1); floor and spread are at least 0")
        if not -1 < self.agreement < 1:
            raise UsageError(f"{self.name}: agreement is a correlation, not {self.agreement}")

    @property
    def prior(self) -> Prior:
        """The prior's numbers, for `posterior`."""
        return Prior(self.agreement, self.spread, self.noise, self.floor)

    def based_on(self) -> TDAMethod:
        """Returns the base method. Raises UsageError for an unknown one or for `hybrid` itself."""
        if self.base == self.name:
            raise UsageError(f"{self.name}: the base must be another method")
        given = read_settings(self.settings, self.name, "settings=damping=0.001,checkpoint=base")
        return registry().method(self.base).cls.from_params(given)

    def uses(self) -> Sequence[str]:
        return (self.base, *self.based_on().uses())

    # ------------------------------------------------------------------ building

    def build(self, context: Context, train: Sequence[Example]) -> HybridIndex:
        base = self.based_on().build(context, train)
        arrays = {"kernel": self._kernel(context, train)}
        ids: tuple[str, ...] = ()
        if self.asset:
            truth = self._retrainings(context)
            truth.check(train if isinstance(train, Corpus) else Corpus(train), context.target)
            arrays["member"] = truth.groups.membership(np.uint8).toarray()
            arrays["losses"] = truth.losses.mean(axis=1)  # [group, query]
            ids = truth.query_ids
        else:
            groups = random_groups(
                context, train, self.retrainings, context.target.fraction, "hybrid/groups"
            )
            arrays["member"] = groups.membership(np.uint8).toarray()
            arrays["models"] = retrained(context, train, groups, "hybrid")
        return HybridIndex(self, context, base, arrays, ids)

    def load(self, context: Context, path: Path) -> HybridIndex:
        arrays, meta = read_arrays(path / "hybrid.safetensors")
        self.check_saved(path, meta)
        base = self.based_on().load(context, path / "base")
        return HybridIndex(self, context, base, dict(arrays), tuple(meta["query_ids"]))

    def prepare_cost(self, context: Context) -> Mapping[str, float] | None:
        if not self.asset:
            return {"retrainings": float(self.retrainings)}  # their time is in the build
        truth = self._retrainings(context)
        cost = {"retrainings": float(len(truth.groups) * truth.n_seeds)}
        if "seconds" in truth.plan:
            whole = len(self._truth(context).groups)
            cost["seconds"] = float(truth.plan["seconds"]) * len(truth.groups) / max(1, whole)
        return cost

    def _truth(self, context: Context) -> Truth:
        from tdabench.api import Truth

        return Truth.load(context.asset(self.asset))

    def _retrainings(self, context: Context) -> Truth:
        """Returns the first `retrainings` of the asset. Raises MethodError if it has fewer."""
        from tdabench.api import Truth

        truth = self._truth(context)
        used = self.retrainings
        if used > len(truth.groups):
            raise MethodError(
                f"{self.name}: the asset {self.asset!r} holds {len(truth.groups)} retrainings, "
                f"not {used}",
                f"Set {self.name}.retrainings, or leave {self.name}.asset empty to make them",
            )
        groups = Groups.of((truth.groups[g] for g in range(used)), truth.groups.n_train)
        return Truth(truth.losses[:used], groups, truth.query_ids, truth.plan)

    def _kernel(self, context: Context, train: Sequence[Example]) -> np.ndarray:
        """Computes whitened hidden states of training responses at the base, of length 1: [n, d].

        Inner products of the rows are K; [n, 0] without a kernel.
        """
        if self.kernel == "none" or not len(train):
            return np.zeros((len(train), 0), dtype=np.float32)
        model = context.target.model("base", context.device)
        h = pooled_hidden_states(context.target, model, train, part="response").astype(np.float64)
        h -= h.mean(0)
        c = h.T @ h / len(h)
        d = len(c)
        if not np.trace(c):
            return np.zeros((len(train), 0), dtype=np.float32)
        low = np.linalg.cholesky(c + 0.1 * np.trace(c) / d * np.eye(d))
        z = np.linalg.solve(low, h.T).T
        norms = np.linalg.norm(z, axis=1, keepdims=True)
        return (z / np.where(norms > 0, norms, 1.0)).astype(np.float32)


class HybridIndex(Index):
    """The base's index, groups `member` [group, train], `kernel` [train, d], and the retrainings.

    Those are `models` [group, parameter], or `losses` [group, query] of the queries `query_ids`.
    """

    def __init__(
        self,
        method: Hybrid,
        context: Context,
        base: Index,
        arrays: dict[str, np.ndarray],
        query_ids: tuple[str, ...],
    ) -> None:
        self.method, self.context, self.base, self.arrays = method, context, base, arrays
        self.query_ids = query_ids
        self.n_train = base.n_train

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        scores = np.asarray(self.base.score(queries))
        if not len(self.arrays["member"]) or not len(queries):
            return scores
        losses = self.losses(queries)  # [group, query]
        known = np.isfinite(losses).all(axis=1)
        if known.sum() < 2:
            raise MethodError(
                f"{self.method.name}: {known.sum()} of {len(known)} retrainings have finite losses",
                "The recipe diverges: check it with: tdabench truth describe",
            )
        member = self.arrays["member"][known]
        return posterior(
            member, -losses[known].T, scores, self.arrays["kernel"], self.method.prior
        ).astype(np.float32)

    def losses(self, queries: Sequence[Example]) -> np.ndarray:
        """Returns the loss of each query under each retraining: [group, query]."""
        if "losses" in self.arrays:
            place = {q: i for i, q in enumerate(self.query_ids)}
            missing = [q.id for q in queries if q.id not in place]
            if missing:
                raise MethodError(
                    f"{self.method.name}: the asset {self.method.asset!r} has no losses for "
                    f"{len(missing)} of {len(queries)} queries, first {missing[0]!r}",
                    f"Leave {self.method.name}.asset empty to retrain while building",
                )
            return self.arrays["losses"][:, [place[q.id] for q in queries]]
        return losses_of(self.context, self.arrays["models"], queries)

    def save(self, path: Path) -> None:
        (path / "base").mkdir()
        self.base.save(path / "base")
        meta = {"method": self.method.name, "version": self.method.version}
        write_arrays(
            path / "hybrid.safetensors", self.arrays, {**meta, "query_ids": list(self.query_ids)}
        )
