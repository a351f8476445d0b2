"""Selection: whether fine-tuning on the examples that a method selects improves a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tdabench.benchmark import BenchmarkContext, Metric, Outcome
from tdabench.benchmarks.common import Arrays, FromArrays, Texts, metric, outcome_of, score_blocks
from tdabench.benchmarks.retrain import Retrained, Retrainer, exact_match, unigram_f1
from tdabench.data.alike import overlap, trigrams
from tdabench.data.examples import Corpus
from tdabench.errors import NotApplicable, UsageError
from tdabench.seeds import named_seed
from tdabench.targets.recipe import Recipe

MEASURES = ("loss", "exact_match", "f1")


@dataclass(frozen=True)
class Selection(FromArrays):
    """Targeted data selection (LESS, arXiv 2402.04333; AirRep, arXiv 2505.18513).

    For each task, `dev` queries guide the selection of k training examples; the target is
    fine-tuned on them from `start` and measured on the task's other queries: loss, exact match
    and unigram F1 of greedy responses. The method is compared with random choices of k
    (`random_seeds` of them), a random k of the task's own examples (oracle), the whole pool (full),
    and the model without this training (zeroshot).

    Scoring and picking are separate: the method gives scores [dev query, train], and `rule` picks.
    "min-rank" takes the examples whose best rank over the dev queries is lowest, "top" those with
    the highest mean score, "softmax" draws without replacement with probabilities proportional to
    exp(mean score / standard deviation), and "diverse" takes the order of min-rank, but passes
    over examples that share half of their text with one taken before.

    Values are means over tasks; a task is the unit of the interval, since its queries share a
    retraining. `tasks` limits them to that many, drawn by a named seed (0: all).
    The headline is the mean of `measure` over the curve's points: every k counts, none is chosen
    afterwards. A target too small to answer correctly is better judged by "loss". Training
    follows the target's recipe; `recipe` says what differs ("epochs=4,batch_size=16": a selection
    may be smaller than a batch).

    k               numbers of examples to select
    rule            min-rank, top, softmax or diverse
    measure         measure of the headline: f1, exact_match or loss
    dev             queries of each task that guide the selection
    tasks           number of tasks; 0: all
    seeds           trainings per selection, of which the mean counts
    random_seeds    random selections of each size
    start           checkpoint of the target from which models are trained
    recipe          changes to the target's recipe, such as "epochs=4,batch_size=16"
    max_new_tokens  longest response to generate
    replicates      bootstrap replicates behind each interval
    """

    name: ClassVar[str] = "selection"
    version: ClassVar[int] = 3
    summary: ClassVar[str] = "quality of a model fine-tuned on the examples that a method selects"
    source: ClassVar[str] = "Xia et al. 2024, arXiv 2402.04333; Sun et al. 2025, arXiv 2505.18513"
    kept: ClassVar[str] = ".*@|task$|picked$"
    slow: ClassVar[bool] = True

    k: tuple[int, ...] = (100,)
    rule: str = "min-rank"
    measure: str = "f1"
    dev: int = 3
    tasks: int = 10
    seeds: int = 1
    random_seeds: int = 3
    start: str = "base"
    recipe: str = ""
    max_new_tokens: int = 24
    replicates: int = 1000

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UsageError(f"selection.rule = {self.rule!r}", f"One of: {', '.join(RULES)}")
        if self.measure not in MEASURES:
            raise UsageError(
                f"selection.measure = {self.measure!r}", f"One of: {', '.join(MEASURES)}"
            )
        if not self.k or min(self.k) < 1 or self.dev < 1 or self.seeds < 1:
            raise UsageError("selection: k, dev and seeds must be at least 1")
        Recipe().changed(self.recipe)

    def run(self, context: BenchmarkContext) -> Outcome:
        recipe = context.target.recipe.changed(self.recipe)
        trainer = Retrainer(context, recipe, self.start, self.max_new_tokens)
        parts, notes = split_tasks(context.queries, self.dev, self.tasks)
        n = len(context.train)
        ks = sorted({min(k, n) for k in self.k})
        place = np.concatenate([unseen for _, _, unseen in parts])
        unseen_all = context.queries.subset(place)
        tasks = [e.task for e in unseen_all]

        # quality[source, k] is [measure, query]: loss, exact match and F1, averaged over runs.
        quality: dict[tuple[str, int], np.ndarray] = {}
        anything = [permutation(np.arange(n), f"random-{s}") for s in range(self.random_seeds)]
        everything = [(np.arange(n), s) for s in range(self.seeds)]
        at_random = [(o[:k], s) for k in ks for s, o in enumerate(anything)]
        trainer.begin(everything + at_random, unseen_all)
        for k in ks:
            if anything:
                runs = [trainer.run(o[:k], unseen_all, s) for s, o in enumerate(anything)]
                quality["random", k] = np.mean([measure(r, unseen_all) for r in runs], axis=0)
            for who in ("method", "oracle"):
                quality[who, k] = np.full((3, len(place)), np.nan)
        as_is = trainer.run([], unseen_all, 0)
        quality["zeroshot", 0] = measure(as_is, unseen_all)
        whole = [trainer.run(np.arange(n), unseen_all, s) for s in range(self.seeds)]
        quality["full", n] = np.mean([measure(r, unseen_all) for r in whole], axis=0)

        picked = np.empty((len(parts), max(ks)), dtype=np.int64)
        at = 0
        for t, (task, dev, unseen) in enumerate(parts):
            context.progress("retraining on selections", t, len(parts))
            queries = context.queries.subset(unseen)
            scores = dev_scores(context, context.queries.subset(dev))
            ranked = pick(self.rule, scores, context.train, max(ks))
            picked[t] = ranked
            own = np.array([i for i, e in enumerate(context.train) if e.task == task], dtype=int)
            for k in ks:
                for who in ("method", "oracle"):
                    measured = []
                    for s in range(self.seeds):
                        mine = ranked if who == "method" else permutation(own, f"{task}-{s}")
                        measured.append(measure(trainer.run(mine[:k], queries, s), queries))
                    quality[who, k][:, at : at + len(unseen)] = np.mean(measured, axis=0)
            at += len(unseen)
        context.progress("retraining on selections", len(parts), len(parts))

        notes.append(
            f"{len(parts)} tasks, {len(place)} unseen queries, {trainer.done} models trained here"
        )
        arrays: dict[str, np.ndarray] = {
            "picked": picked,
            # Tasks by position in the order of names, by which the bootstrap draws them.
            "task": np.unique(tasks, return_inverse=True)[1],
            **{f"{who}@{k}": v.astype(np.float32) for (who, k), v in quality.items()},
        }
        return self.outcome(arrays, tuple(unseen_all.ids), tuple(notes))

    def outcome(self, arrays: Arrays, query_ids: Texts, notes: Texts = ()) -> Outcome:
        from tdabench import stats

        quality: dict[tuple[str, int], np.ndarray] = {}
        for name, values in arrays.items():
            who, at, size = name.partition("@")
            if at:
                quality[who, int(size)] = values.astype(np.float64)
        ks = sorted(k for who, k in quality if who == "method")
        tasks = [f"{t:09d}" for t in arrays["task"]]
        main = MEASURES.index(self.measure)
        lower, unit = self.measure == "loss", "nats" if self.measure == "loss" else ""

        def headline(who: str) -> np.ndarray:  # [query]
            return np.mean([quality[who, k][main] for k in ks], axis=0)

        def over_tasks(values: np.ndarray) -> stats.Bootstrap:
            return stats.bootstrap_clusters(values, tasks, self.replicates)

        def stated(values: np.ndarray) -> Metric:
            return metric(over_tasks(values), higher_is_better=not lower, unit=unit)

        per_query = headline("method")
        boot = over_tasks(per_query)
        metrics = {self.measure: stated(per_query)}
        if ("random", ks[0]) in quality:
            metrics[f"{self.measure}_random"] = stated(headline("random"))
            gain = (headline("random") - per_query) if lower else (per_query - headline("random"))
            metrics["gain_over_random"] = metric(over_tasks(gain), unit=unit)
        metrics[f"{self.measure}_oracle"] = stated(headline("oracle"))
        if ("zeroshot", 0) in quality:
            without = quality["zeroshot", 0][main]
            gain = (without - per_query) if lower else (per_query - without)
            metrics["gain_over_zeroshot"] = metric(over_tasks(gain), unit=unit)
        masks = [np.array([x == t for x in tasks]) for t in sorted(set(tasks))]
        for (who, k), values in quality.items():
            for name, row in zip(MEASURES, values):
                mean = float(np.mean([row[m].mean() for m in masks]))
                label = f"{name}@{k}" if who == "method" else f"{name}_{who}@{k}"
                worse = name == "loss"
                metrics[label] = Metric(
                    mean, higher_is_better=not worse, unit="nats" if worse else ""
                )
        return outcome_of(metrics, per_query, boot, arrays, query_ids, notes)


def measure(run: Retrained, queries: Corpus) -> np.ndarray:
    """Computes loss, exact match and F1 of a retrained model: float64 [3, query]."""
    assert run.responses is not None
    pairs = [(r, q.response) for r, q in zip(run.responses, queries)]
    exact = [exact_match(r, w) for r, w in pairs]
    return np.stack([run.losses.astype(np.float64), exact, [unigram_f1(r, w) for r, w in pairs]])


def split_tasks(
    queries: Corpus, dev: int, limit: int
) -> tuple[list[tuple[str, list[int], list[int]]], list[str]]:
    """Returns (task, dev queries, unseen queries) of each task with both, and notes.

    Raises DataError if there is none.
    """
    tasks = sorted(set(queries.tasks) - {""})
    parts = []
    for task in tasks:
        own = permutation(
            np.array([i for i, e in enumerate(queries) if e.task == task]), f"dev-{task}"
        ).tolist()
        if len(own) > dev:
            parts.append((task, sorted(own[:dev]), sorted(own[dev:])))
    notes = []
    if len(parts) < len(tasks):
        notes.append(f"{len(tasks) - len(parts)} tasks have at most {dev} queries and are left out")
    if not parts:
        raise NotApplicable(
            f"no task has more than {dev} queries", "Selection needs task labels, or a lower dev"
        )
    if 0 < limit < len(parts):
        kept = sorted(permutation(np.arange(len(parts)), "tasks")[:limit].tolist())
        parts = [parts[i] for i in kept]
    return parts, notes


def dev_scores(context: BenchmarkContext, dev: Corpus) -> np.ndarray:
    """Returns the method's scores for the dev queries: float32 [dev, train]."""
    n = len(context.train)
    return np.concatenate([s for _, s in score_blocks(context.index, dev, n)])


def pick(rule: str, scores: np.ndarray, train: Corpus, k: int) -> np.ndarray:
    """Selects k training examples by a rule from scores [dev, train], best first: int64 [k].

    Ties are broken by a fixed random order, so that a method with constant scores selects at
    random and not the first lines of the corpus.
    """
    return RULES[rule](scores, train, permutation(np.arange(len(train)), "ties"))[:k]


def _top(scores: np.ndarray, train: Corpus, tie: np.ndarray) -> np.ndarray:
    return np.lexsort((tie, -scores.mean(axis=0, dtype=np.float64)))


def _min_rank(scores: np.ndarray, train: Corpus, tie: np.ndarray) -> np.ndarray:
    from tdabench import stats

    ranks = stats.average_ranks(-scores)
    return np.lexsort((tie, ranks.mean(axis=0), ranks.min(axis=0)))


def _softmax(scores: np.ndarray, train: Corpus, tie: np.ndarray) -> np.ndarray:
    """Draws without replacement: the order of logits with Gumbel noise (arXiv 1903.06059)."""
    mean = scores.mean(axis=0, dtype=np.float64)
    spread = mean.std() or 1.0
    noise = np.random.default_rng(named_seed(0, "selection-gumbel")).gumbel(size=len(mean))
    return np.lexsort((tie, -(mean / spread + noise)))


def _diverse(scores: np.ndarray, train: Corpus, tie: np.ndarray) -> np.ndarray:
    taken: list[int] = []
    passed: list[int] = []
    seen: list[frozenset[str]] = []
    for i in _min_rank(scores, train, tie).tolist():
        grams = trigrams(train[i].text)
        if any(overlap(grams, g) >= SAME for g in seen):
            passed.append(i)
            continue
        taken.append(i)
        if len(seen) < MOST_COMPARED:
            seen.append(grams)
    return np.array([*taken, *passed])


SAME = 0.5  # overlap of texts from which "diverse" passes over an example
MOST_COMPARED = 200  # later examples are compared with the first so many only
RULES: dict[str, Callable[[np.ndarray, Corpus, np.ndarray], np.ndarray]] = {
    "min-rank": _min_rank,
    "top": _top,
    "softmax": _softmax,
    "diverse": _diverse,
}


def permutation(items: np.ndarray, name: str) -> np.ndarray:
    """Permutes `items` in an order that depends only on `name`, the same for every method."""
    return np.random.default_rng(named_seed(0, f"selection-{name}")).permutation(items)
