"""Removal: whether a query's loss rises without the examples that a method ranks highest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tdabench.benchmark import Benchmark, BenchmarkContext, Metric, Outcome, Stored
from tdabench.benchmarks.common import blocks_of, metric, tasks_of
from tdabench.benchmarks.retrain import Retrainer
from tdabench.data.behaviours import Behaviour, behaviours_of, parts_of
from tdabench.data.examples import Corpus, Example
from tdabench.errors import NotApplicable, UsageError
from tdabench.seeds import named_seed
from tdabench.targets.recipe import Recipe


@dataclass(frozen=True)
class Removal(Benchmark):
    """Counterfactual removal (arXiv 2202.00622; also called brittleness).

    The target is trained from `start` on a fixed random part of the corpus (`fraction`), then
    again without the k examples of this part that score highest for a query. The rise of that
    query's loss, minus the rise after removing k random examples, is plotted over k from 0; the
    value is the area under this curve divided by its width: the mean extra rise in nats (called
    query-loss difference, QLD, elsewhere). `n` queries are drawn by a named seed.
    `behaviours` names a field of queries (such as `task`): the queries with one value of it are one
    behaviour, whose loss is their mean loss, and `n` behaviours are drawn. A query with the field
    `against` counts as a contrast (`tdabench.data.behaviours`).
    With `matched` > 0 the random removals are drawn per query, that many of each size, and look
    like what they are compared with: as many examples of each task, of nearest lengths, none of
    them among the removed. What a method gains by recognising the task or long examples then
    cancels. `opponents` also removes the k examples that score lowest.
    All models start from the same weights and see the kept examples in the same order at the same
    steps (removed examples have weight zero), so that differences come from the examples alone.
    Training follows the target's recipe; `recipe` says what differs ("epochs=4,batch_size=16").

    n             number of queries
    k             numbers of examples to remove
    fraction      share of the corpus that models are trained on
    seeds         trainings per removal, of which the mean counts
    random_seeds  random removals of each size
    matched       random removals of each size per query that match the removed examples; 0: none
    opponents     also remove the lowest-scoring examples
    behaviours    field of queries that are one behaviour; if empty, each query is asked alone
    start         checkpoint of the target from which models are trained
    recipe        changes to the target's recipe, such as "epochs=4,batch_size=16"
    replicates    bootstrap replicates behind each interval
    """

    name: ClassVar[str] = "removal"
    version: ClassVar[int] = 3
    summary: ClassVar[str] = "rise of a query's loss when its top k are left out of training"
    source: ClassVar[str] = "Ilyas et al. 2022, arXiv 2202.00622"
    slow: ClassVar[bool] = True

    n: int = 8
    k: tuple[int, ...] = (10, 50)
    fraction: float = 0.25
    seeds: int = 1
    random_seeds: int = 3
    matched: int = 0
    opponents: bool = False
    behaviours: str = ""
    start: str = "base"
    recipe: str = ""
    replicates: int = 1000

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1 or min(self.n, self.seeds, self.random_seeds) < 1:
            raise UsageError("removal: k, n, seeds and random_seeds must be at least 1")
        if self.matched < 0:
            raise UsageError(f"removal.matched must be at least 0, not {self.matched}")
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
            raise NotApplicable(
                f"removing {ks[-1]} of {len(pool)} examples leaves no training examples",
                "Lower removal.k or raise removal.fraction",
            )
        sets = self._asked(context.queries)
        # Scores are of behaviours; models are evaluated on their queries.
        queries, weights = parts_of(sets)
        found = blocks_of(context.index, sets if self.behaviours else (), queries, n_train)
        scores = np.concatenate([s for _, s in found])
        order = _best_first(scores[:, pool])  # [query, pool]

        def losses(removed: np.ndarray, whose: slice | int) -> np.ndarray:
            """Averages the loss without `removed` (pool positions) over seeds: [query], or [1]."""
            kept = np.delete(pool, removed)
            part, of = queries, weights
            if not isinstance(whose, slice):
                own = np.flatnonzero(weights[whose])
                part, of = queries.subset(own), weights[[whose]][:, own]
            runs = [trainer.run(kept, part, s, among=pool) for s in range(self.seeds)]
            return np.mean([of @ r.losses for r in runs], axis=0)

        none = np.empty(0, dtype=np.int64)
        away = [_draw(f"random-{s}", len(pool), len(pool)) for s in range(self.random_seeds)]
        lacking = [none, *(x[:k] for k in ks for x in away)]
        alike = [(np.delete(pool, x), s) for x in lacking for s in range(self.seeds)]
        trainer.begin(alike, queries, among=pool)
        before = losses(none, slice(None)).astype(np.float64)  # [query]
        rises = {"": np.zeros((len(ks), len(sets))), "random": np.zeros((len(ks), len(sets)))}
        examples = [context.train[int(i)] for i in pool]
        kinds = [e.task for e in examples]
        lengths = np.array([len(e.prompt) + len(e.response) for e in examples])
        total = len(ks) * len(sets)
        for j, k in enumerate(ks):
            for s in range(self.random_seeds):
                rise = losses(away[s][:k], slice(None)) - before
                rises["random"][j] += rise / self.random_seeds
            for q in range(len(sets)):
                context.progress("retraining without the top k", j * len(sets) + q, total)
                rises[""][j, q] = losses(order[q, :k], q)[0] - before[q]
                for m in range(self.matched):
                    rng = np.random.default_rng(named_seed(0, f"removal-matched-{m}-{q}"))
                    alike_q = matched(order[q, :k], kinds, lengths, rng)
                    rise = losses(alike_q, q)[0] - before[q]
                    of = rises.setdefault("matched", np.zeros((len(ks), len(sets))))
                    of[j, q] += rise / self.matched
                if self.opponents:
                    of = rises.setdefault("opponents", np.zeros((len(ks), len(sets))))
                    of[j, q] = losses(order[q, -k:], q)[0] - before[q]

        # Examples with the ids and tasks of behaviours.
        asked = Corpus([Example(b.id, b.prompt, b.response, b.task) for b in sets], "asked")
        tasks, few = tasks_of(asked)
        what = f"behaviours (by {self.behaviours!r})" if self.behaviours else "queries"
        notes = (f"{len(sets)} {what}, {trainer.done} models trained here", *few)
        return self._outcome(rises, tuple(asked.ids), tasks, notes)

    def _asked(self, queries: Corpus) -> list[Behaviour]:
        """Draws what is explained: queries, or sets of them with one value of a field."""
        if not self.behaviours:
            chosen = np.sort(_draw("queries", len(queries), self.n))
            return [Behaviour(q.id, (q,), (1.0,)) for q in queries.subset(chosen)]
        sets = behaviours_of(queries, self.behaviours)
        return [sets[i] for i in np.sort(_draw("queries", len(sets), self.n))]

    def recompute(self, stored: Stored) -> Outcome:
        arrays = stored.arrays
        tasks = {k: arrays[k] for k in ("task",) if k in arrays}
        rises = {
            k.removeprefix("rise").removeprefix("_"): v
            for k, v in arrays.items()
            if k.startswith("rise")
        }
        return self._outcome(rises, stored.query_ids, tasks)

    def _outcome(
        self,
        rises: Mapping[str, np.ndarray],  # [k, query], of "" (the top k) and what was removed else
        query_ids: tuple[str, ...],
        tasks: Mapping[str, np.ndarray],
        notes: tuple[str, ...] = (),
    ) -> Outcome:
        from tdabench import stats

        of = tasks.get("task")
        ks = sorted(set(self.k))
        top, control = rises[""], rises.get("matched", rises["random"])
        extra = area(ks, top - control)
        boot = stats.bootstrap_queries(extra, self.replicates, tasks=of)
        metrics = {self.name: metric(boot, unit="nats")}
        for j, k in enumerate(ks):
            for name, values in rises.items():
                if name in ("random", "matched"):
                    found = Metric(float(values[j].mean()), unit="nats")
                else:
                    boot_k = stats.bootstrap_queries(values[j], self.replicates, tasks=of)
                    found = metric(boot_k, unit="nats")
                metrics[f"rise{'_' if name else ''}{name}@{k}"] = found
        if "opponents" in rises:
            spread = area(ks, top - rises["opponents"])
            spread_boot = stats.bootstrap_queries(spread, self.replicates, tasks=of)
            metrics["spread"] = metric(spread_boot, unit="nats")
        return Outcome(
            primary=self.name,
            metrics=metrics,
            per_query=extra,
            query_ids=query_ids,
            replicates=boot.both,
            arrays={
                **{f"rise{'_' if k else ''}{k}": v for k, v in rises.items()},
                **tasks,
                **boot.arrays(),
            },
            notes=notes,
        )


def matched(
    removed: np.ndarray, kinds: Sequence[str], lengths: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draws as many places as in `removed`, none of them in it: for each, in order, one with the
    same entry in `kinds`, at random among the three nearest in `lengths` that are left. Where no
    example of the kind is left, one of any kind is taken.
    """
    kinds_, left = np.asarray(kinds), np.ones(len(lengths), dtype=bool)
    left[removed] = False
    out = []
    for i in removed[: left.sum()]:
        near = np.flatnonzero(left & (kinds_ == kinds_[i]))
        if not len(near):
            near = np.flatnonzero(left)
        near = near[np.argsort(np.abs(lengths[near] - lengths[i]), kind="stable")[:3]]
        out.append(int(rng.choice(near)))
        left[out[-1]] = False
    return np.array(out, dtype=np.int64)


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
