"""Measures the smoothness of a training recipe: whether its response to data is predictable at all.

Two figures need no attribution method. *Seed agreement*: do two seeds rank groups in the same
order? *Metasmoothness* (Engstrom et al. 2025, arXiv 2503.13751, section 3): does a step in the
weights of the data change the outcome like the previous equal step?
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tdabench import stats
from tdabench.data.examples import Corpus
from tdabench.errors import TdabenchError, UsageError
from tdabench.seeds import named_seed
from tdabench.targets.recipe import Recipe
from tdabench.targets.target import Target
from tdabench.targets.training import finetune
from tdabench.truth.engines import one_thread
from tdabench.truth.store import Truth

OnRun = Callable[[int, int], None]  # (finished trainings, total)


@dataclass(frozen=True)
class Metasmoothness:
    """Agreement of successive differences along each direction [direction], from -1 to 1."""

    values: tuple[float, ...]
    step: float

    @property
    def value(self) -> float:
        """The mean over directions."""
        return float(np.mean(self.values))

    @property
    def error(self) -> float:
        """The standard error of the mean over directions; NaN with one direction."""
        n = len(self.values)
        return float(np.std(self.values, ddof=1) / n**0.5) if n > 1 else float("nan")


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Returns how far the signs of two differences [outcome] agree, weighted by the first's sizes.

    sum |a| sign(a) sign(b) / sum |a| (arXiv 2503.13751, eq. 8): 1 if every outcome continues in its
    first direction, about 0 if the second difference is unrelated to the first.
    """
    total = float(np.abs(first).sum())
    return float((first * np.sign(second)).sum() / total) if total > 0 else 0.0


def metasmoothness(
    target: Target,
    train: Corpus,
    queries: Corpus,
    *,
    recipe: Recipe | None = None,
    fraction: float | None = None,
    directions: int = 4,
    step: float = 0.1,
    seed: int = 0,
    start: str = "base",
    device: str = "cpu",
    on_run: OnRun = lambda done, total: None,
) -> Metasmoothness:
    """Trains `1 + 2 directions` times and compares successive differences of query losses.

    Trainings are on one random group of `fraction` of `train` in one order, with the examples'
    losses weighted by 1, 1 + h v and 1 + 2 h v, with random signs v and h = `step`. `recipe` and
    `fraction` default to the target's. Raises UsageError for a step that makes weights negative,
    TdabenchError if the training diverges.
    """
    if directions < 1 or not 0 < step <= 0.5:
        raise UsageError(
            f"metasmoothness: {directions} directions, step {step:g}",
            "At least one direction, and a step in (0, 0.5]: weights must not be negative",
        )
    recipe, fraction = recipe or target.recipe, fraction or target.fraction
    rng = np.random.default_rng(named_seed(seed, "metasmoothness"))
    size = max(1, round(fraction * len(train)))
    group = rng.choice(len(train), size, replace=False)
    tokens = target.tokenize(train.subset(group))
    asked = target.tokenize(queries)
    total, done = 1 + 2 * directions, 0

    def losses(weights: np.ndarray) -> np.ndarray:
        """Computes each query's loss after training with weights [example]: float64 [query]."""
        nonlocal done
        model = target.fresh_model(start, seed).to(device)  # type: ignore[arg-type]
        with one_thread():
            finetune(model, tokens, recipe, seed, target.pad_id, weights=weights)
        done += 1
        on_run(done, total)
        return target.losses(model, asked).astype(np.float64)

    ones = np.ones(size, dtype=np.float32)
    before, found = losses(ones), []
    for _ in range(directions):
        v = rng.choice(np.array([-1, 1], dtype=np.float32), size)
        middle, after = losses(ones + step * v), losses(ones + 2 * step * v)
        found.append(agreement(middle - before, after - middle))
    return Metasmoothness(tuple(found), step)


def seed_agreement(truth: Truth) -> float | None:
    """Returns the Spearman correlation of two seeds' losses over groups; None with one seed.

    It is averaged over queries and pairs of seeds."""
    losses = truth.by_seed()  # [seed, query, group]
    n = len(losses)
    if n < 2:
        return None
    pairs = [
        stats.spearman_rows(losses[i], losses[j]).mean() for i in range(n) for j in range(i + 1, n)
    ]
    return float(np.mean(pairs))


@dataclass(frozen=True)
class RecipeTrial:
    """The results of a recipe, or the reason of its failure.

    The results are the loss on held-out queries (in nats), the agreement of two seeds over groups,
    metasmoothness, and the seconds of a retraining."""

    recipe: Recipe
    loss: float = float("nan")
    agreement: float = float("nan")
    smoothness: float = float("nan")
    seconds: float = float("nan")
    error: str = ""


def try_recipe(
    target: Target,
    train: Corpus,
    queries: Corpus,
    recipe: Recipe,
    *,
    groups: int = 12,
    directions: int = 2,
    seed: int = 0,
    on_run: OnRun = lambda done, total: None,
) -> RecipeTrial:
    """Retrains on `groups` random groups with two seeds each, and measures metasmoothness.

    `queries` are held out (a suite's tuning queries), and the groups are not used by any shipped
    truth. A recipe that diverges, or whose batch is larger than a group, gives a trial with its
    error.
    """
    from tdabench.truth.engines import UnitTrainer
    from tdabench.truth.plan import TruthPlan

    try:
        plan = TruthPlan.draw(
            "tune-recipe", target, train, queries, n_groups=groups, fraction=target.fraction,
            n_seeds=2, recipe=recipe, seed=seed,
        )  # fmt: skip
        trainer = UnitTrainer.of(plan, target, train, queries)
        units, began = plan.units(), time.perf_counter()
        total = len(units) + (1 + 2 * directions if directions else 0)
        losses = np.empty((groups, 2, len(queries)), dtype=np.float32)
        with one_thread():
            for done, unit in enumerate(units, start=1):
                losses[unit.group, unit.seed] = trainer.losses(unit)
                on_run(done, total)
        took = (time.perf_counter() - began) / len(units)
        truth = Truth(losses, plan.groups, plan.query_ids)
        smooth = float("nan")
        if directions:
            smooth = metasmoothness(
                target, train, queries, recipe=recipe, directions=directions, seed=seed,
                on_run=lambda done, of: on_run(len(units) + done, total),
            ).value  # fmt: skip
    except TdabenchError as e:
        return RecipeTrial(recipe, error=str(e))
    agreed = seed_agreement(truth)
    return RecipeTrial(
        recipe, float(losses.mean()), float("nan") if agreed is None else agreed, smooth, took
    )
