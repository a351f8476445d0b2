"""Finds what limits a trained AirRep encoder: features, labels, label noise or queries.

    python benchmarks/airrep_limits.py --encoder FOLDER --labels FILE --teacher FILE

Body, loss, optimizer and dropout are the recipe in the encoder's record. Each row is a training of
the projection, and prints one JSON line: the LDS on its held-out labels, and on the tuning truth.

- oracle: trained on three quarters of the tuning truth's groups, all its queries, and measured on
  the remaining groups of the same queries: what the features can express, if the queries' own
  retrainings were known. Four folds.
- queries: the labels of a share of the dev examples only.
- tasks: the labels of dev examples of one half of the tasks only, measured on the tuning queries of
  the other half; of a random half of the dev examples, and no step at all, on the same queries.
- noise: the noise of a retraining added to every label (two retrainings agree by about 0.75, so its
  variance is a third of the signal's).
- simulated: labels from a teacher's scores (sums over a subset), without noise and with that of a
  retraining, for as many subsets as wanted. The held-out labels are the teacher's, without noise.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from tdabench_airrep.cli import open_source
from tdabench_airrep.labels import Instance, Labels
from tdabench_airrep.pipeline import stages_of
from tdabench_airrep.recipe import TrainConfig
from tdabench_airrep.teacher import Teacher
from tdabench_airrep.train import Trainer, lds_of

from tdabench.api import Groups, fast_products, load_suite, read_json
from tdabench.run.tune import tuning_truth

NOISE = 1 / 3  # variance of the noise over that of the signal: two labels correlate by 0.75


class OnItsQueries(Trainer):
    """Trains on all dev examples, and measures on the held-out groups of the same ones."""

    def measure(self) -> dict[str, float]:
        self.probe = np.arange(0)
        return {"lds": float(np.mean([lds_of(self.scores_of(i), i.labels) for i in self.held]))}


def only(instance: Instance, some: np.ndarray) -> Instance:
    """Returns the labels of the dev examples `some` alone."""
    k = np.isin(instance.dev, some)
    return Instance(instance.dev[k], instance.subsets, instance.losses[:, k])


def noisy(losses: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds noise to losses [subset, dev], of a third of each dev example's variance."""
    scale = losses.std(0, keepdims=True) * NOISE**0.5
    return (losses + scale * rng.standard_normal(losses.shape)).astype(np.float32)


def simulated(
    scores: np.ndarray, n: int, dev: int, noise: bool, rng: np.random.Generator
) -> list[Instance]:
    """Makes `n` instances of 32 subsets of 500 from pools of 2,000; scores [dev, train]."""
    out = []
    for _ in range(n):
        pool = rng.choice(scores.shape[1], 2000, replace=False)
        asked = np.sort(rng.choice(scores.shape[0], dev, replace=False))
        subsets = [np.sort(rng.choice(pool, 500, replace=False)) for _ in range(32)]
        losses = np.stack([-scores[asked][:, s].sum(1) for s in subsets])
        if noise:
            losses = noisy(losses, rng)
        groups = Groups.of(subsets, scores.shape[1])
        out.append(Instance(asked, groups, losses.astype(np.float32)))
    return out


@click.command()
@click.option("--suite", default="pocket", show_default=True)
@click.option("--target", default="smooth", show_default=True)
@click.option("--encoder", required=True, type=click.Path(path_type=Path), help="A trained one.")
@click.option("--labels", required=True, type=click.Path(path_type=Path), help="Its labels.")
@click.option("--teacher", default=None, type=click.Path(path_type=Path), help="For simulation.")
@click.option("--rows", default="oracle,queries,tasks,noise,simulated", show_default=True)
@click.option("--budgets", default="11,61,305", show_default=True, help="Simulated instances.")
@click.option("--shares", default="0.1,0.3,1", show_default=True, help="Shares of dev examples.")
@click.option("--steps", default=0, help="Maximum steps; 0: the recipe's.")
def main(
    suite: str,
    target: str,
    encoder: Path,
    labels: Path,
    teacher: Path | None,
    rows: str,
    budgets: str,
    shares: str,
    steps: int,
) -> None:
    """Prints one JSON line per training."""
    loaded = load_suite(suite)
    declared = loaded.target(target)
    source = open_source(suite, target, "", "labels_pool", "labels_dev", 128, "plain", "")
    stage = stages_of(read_json(encoder / "airrep.json"))[-1]
    config = replace(stage.config, steps=steps or stage.config.steps)
    real = Labels.load(labels)
    truth, asked = tuning_truth(loaded, declared), loaded.queries("tuning")
    goal = Instance(np.arange(len(asked)), truth.groups, truth.losses.mean(1))

    def train(
        cls: type[Trainer], train: Any, dev: Any, parts: list[Instance], hold: int,
        recipe: TrainConfig = config,
    ) -> Trainer:  # fmt: skip
        meta = {"train": train.fingerprint, "dev": dev.fingerprint}
        made = Labels(tuple(parts), len(train), len(dev), meta)
        with tempfile.TemporaryDirectory() as work:
            trainer = cls(
                stage.body.encoder(declared.target, recipe.seed),
                train,
                dev,
                replace(recipe, holdout=hold),
                Path(work),
                labels=made,
            )
            with fast_products():
                trainer.run()
        return trainer

    def on_truth(trainer: Trainer, losses: np.ndarray, some: np.ndarray = goal.dev) -> float:
        """Returns the LDS of the trained encoder on losses [group, query] of some queries."""
        with tempfile.TemporaryDirectory() as work:
            judge = Trainer(
                trainer.encoder, loaded.train, asked, replace(config, steps=0), Path(work)
            )
            instance = Instance(some, goal.subsets, losses)
            return lds_of(judge.scores_of(instance), instance.labels)

    def tell(row: str, trainer: Trainer, on: float | None, **what: Any) -> None:
        curve = [r["lds"] for r in trainer.curve]
        line = {"row": row, **what, "start": curve[0], "held_out": max(curve[1:], default=None)}
        if on is not None:
            line["tuning"] = round(on, 4)
        print(json.dumps(line), flush=True)

    wanted = rows.split(",")
    rng = np.random.default_rng(0)
    if "oracle" in wanted:
        order = rng.permutation(len(truth.groups))
        for fold in np.array_split(order, 4):
            parts = [np.setdiff1d(order, fold), fold]
            halves = [
                Instance(
                    goal.dev,
                    Groups.of([truth.groups[int(g)] for g in part], len(loaded.train)),
                    goal.losses[part],
                )
                for part in parts
            ]
            tell("oracle", train(OnItsQueries, loaded.train, asked, halves, 1), None)
    hold = config.holdout
    seen, held = real.instances[:-hold], real.instances[-hold:]

    def on_labels(parts: list[Instance], recipe: TrainConfig = config) -> Trainer:
        return train(Trainer, source.train, source.dev, [*parts, *held], hold, recipe)

    if "queries" in wanted:
        for share in (float(x) for x in shares.split(",")):
            some = rng.permutation(real.n_dev)[: round(share * real.n_dev)]
            done = on_labels([only(i, some) for i in seen])
            tell("queries", done, on_truth(done, goal.losses), dev_examples=len(some))
    if "tasks" in wanted:
        names = sorted({e.task for e in asked})
        for half in (names[::2], names[1::2]):
            other = np.flatnonzero([e.task not in half for e in asked])
            of_half = np.flatnonzero([e.task in half for e in source.dev])
            random = rng.permutation(real.n_dev)[: len(of_half)]
            for what, some in (("none", random), ("other tasks", of_half), ("all tasks", random)):
                recipe = replace(config, steps=0) if what == "none" else config
                done = on_labels([only(i, some) for i in seen], recipe)
                on = on_truth(done, goal.losses[:, other], other)
                tell("tasks", done, on, labels_of=what, dev_examples=len(some))
    if "noise" in wanted:
        done = on_labels([replace(i, losses=noisy(i.losses, rng)) for i in seen])
        tell("noise", done, on_truth(done, goal.losses))
    if "simulated" in wanted and teacher is not None:
        scores = Teacher.load(teacher).scores.astype(np.float32)
        for noise in (False, True):
            for n in (int(x) for x in budgets.split(",")):
                draw = np.random.default_rng(1)
                parts = simulated(scores, n, 1000, noise, draw)
                clean = simulated(scores, hold, 1000, False, np.random.default_rng(2))
                done = train(Trainer, source.train, source.dev, [*parts, *clean], hold)
                on = on_truth(done, goal.losses)
                tell("simulated", done, on, retrainings=32 * n, noise=noise)


if __name__ == "__main__":
    main()
