"""Removal: whether a query's loss rises without the examples that a method ranks highest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tdabench.benchmark import Benchmark, BenchmarkContext, Metric, Outcome, Stored
from tdabench.benchmarks.common import metric, score_blocks, tasks_of
from tdabench.benchmarks.retrain import Retrainer
from tdabench.errors import DataError, UsageError
from tdabench.seeds import named_seed
from tdabench.targets.recipe import Recipe


@dataclass(frozen=True)
class Removal(Benchmark):
    """Counterfactual removal (arXiv 2202.00622; also called brittleness).

    The target is trained from `start` on a fixed random part of the corpus (`fraction`), then
    again without the k examples of this part that score highest for a query. The rise of that
    query's loss, minus the rise after removing k random examples, is plotted over k from 0; the
    value is the area under this curve divided by its width: the mean extra rise in nats. `n`
    queries are drawn by a named seed. All models start from the same weights and see the kept
    examples in the same order at the same steps (removed examples have weight zero), so that
    differences come from the examples alone.
    Training follows the target's recipe; `recipe` says what differs ("epochs=4,batch_size=16").
    """

    name: ClassVar[str] = "removal"
    version: ClassVar[int] = 3
    summary: ClassVar[str] = "rise of a query's loss when its top k are left out of training"
    source: ClassVar[str] = "Ilyas et al. 2022, arXiv 2202.00622"

    n: int = 8
    k: tuple[int, ...] = (10, 50)
    fraction: float = 0.25
    seeds: int = 1
    random_seeds: int = 3
    start: str = "base"
    recipe: str = ""
    replicates: int = 1000

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1 or min(self.n, self.seeds, self.random_seeds) < 1:
            raise UsageError("removal: k, n, seeds and random_seeds must be at least 1")
        if not 0 < self.fraction <= 1:
            raise UsageError(f"removal.fraction must be in (0, 1], not {self.fraction}")
        Recipe().changed(self.recipe)

    def run(self, context: BenchmarkContext) -> Outcome:
        recipe = context.target.recipe.changed(self.recipe)
        trainer = Retrainer(context, recipe, self.start)
        n_train = len(context.train)
        pool = np.sort(_draw("pool", n_train, max(1, round(self.fraction * n_train))))
        ks = sorted(set(self.k))
        if ks[-1] >= len(pool):
            raise DataError(
                f"removing {ks[-1]} of {len(pool)} examples leaves no training examples",
                "Lower removal.k or raise removal.fraction",
            )
        chosen = np.sort(_draw("queries", len(context.queries), self.n))
        queries = context.queries.subset(chosen)
        scores = np.concatenate([s for _, s in score_blocks(context.index, queries, n_train)])
        order = _best_first(scores[:, pool])  # [query, pool]

        def losses(removed: np.ndarray, whose: slice | int) -> np.ndarray:
            """Averages the loss without `removed` (pool positions) over seeds."""
            kept = np.delete(pool, removed)
            part = queries if isinstance(whose, slice) else queries.subset([whose])
            runs = [trainer.run(kept, part, s, among=pool) for s in range(self.seeds)]
            return np.mean([r.losses for r in runs], axis=0)

        none = np.empty(0, dtype=np.int64)
        away = [_draw(f"random-{s}", len(pool), len(pool)) for s in range(self.random_seeds)]
        lacking = [none, *(x[:k] for k in ks for x in away)]
        alike = [(np.delete(pool, x), s) for x in lacking for s in range(self.seeds)]
        trainer.begin(alike, queries, among=pool)
        before = losses(none, slice(None)).astype(np.float64)  # [query]
        top, random = np.zeros((2, len(ks), len(queries)))
        for j, k in enumerate(ks):
            for s in range(self.random_seeds):
                random[j] += (losses(away[s][:k], slice(None)) - before) / self.random_seeds
            for q in range(len(queries)):
                context.progress("retraining without the top k", j * len(queries) + q, top.size)
                top[j, q] = losses(order[q, :k], q)[0] - before[q]

        tasks, few = tasks_of(queries)
        notes = (f"{len(queries)} queries, {trainer.done} models trained here", *few)
        return self._outcome(top, random, tuple(queries.ids), tasks, notes)

    def recompute(self, stored: Stored) -> Outcome:
        arrays = stored.arrays
        tasks = {k: arrays[k] for k in ("task",) if k in arrays}
        return self._outcome(arrays["rise"], arrays["rise_random"], stored.query_ids, tasks)

    def _outcome(
        self,
        top: np.ndarray,  # [k, query]: rise of the loss without the top k
        random: np.ndarray,  # [k, query]: without as many random ones
        query_ids: tuple[str, ...],
        tasks: Mapping[str, np.ndarray],
        notes: tuple[str, ...] = (),
    ) -> Outcome:
        from tdabench import stats

        of = tasks.get("task")
        ks = sorted(set(self.k))
        extra = area(ks, top - random)
        boot = stats.bootstrap_queries(extra, self.replicates, tasks=of)
        metrics = {self.name: metric(boot, unit="nats")}
        for j, k in enumerate(ks):
            rise = stats.bootstrap_queries(top[j], self.replicates, tasks=of)
            metrics[f"rise@{k}"] = metric(rise, unit="nats")
            metrics[f"rise_random@{k}"] = Metric(float(random[j].mean()), unit="nats")
        return Outcome(
            primary=self.name,
            metrics=metrics,
            per_query=extra,
            query_ids=query_ids,
            replicates=boot.both,
            arrays={"rise": top, "rise_random": random, **tasks, **boot.arrays()},
            notes=notes,
        )


def area(ks: list[int], rise: np.ndarray) -> np.ndarray:
    """Averages the line through (0, 0) and (k, rise) over 0..max k: [k, query] -> [query]."""
    x = np.array([0, *ks], dtype=np.float64)
    y = np.concatenate([np.zeros((1, rise.shape[1])), rise])
    return ((y[1:] + y[:-1]) / 2 * np.diff(x)[:, None]).sum(axis=0) / x[-1]


def _best_first(scores: np.ndarray) -> np.ndarray:
    """Sorts each row by falling score, ties in a fixed random order: int64 like `scores`."""
    tie = _draw("ties", scores.shape[1], scores.shape[1])
    return np.stack([np.lexsort((tie, -row)) for row in scores])


def _draw(name: str, n: int, size: int) -> np.ndarray:
    """Draws `size` of n numbers, depending only on `name`, the same for every method."""
    rng = np.random.default_rng(named_seed(0, f"removal-{name}"))
    return rng.permutation(n)[: min(size, n)]
