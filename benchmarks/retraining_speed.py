"""One retraining against its arithmetic limit and against autograd, on one thread of a CPU.

    OMP_NUM_THREADS=1 python benchmarks/retraining_speed.py [--target smooth] [--rounds 5]

A retraining is a run of the recipe on one group of the suite `pocket` and the losses of all test
queries. Its arithmetic limit is the time of its matrix products alone, on operands of the same
shapes that are there: for every part of a batch and every layer, q/k/v, output, gate/up and down,
forward, backward to the input and backward to the weights, over tokens without padding; and the
output matrix at response tokens. It is taken twice, with torch.mm and with the product that
tdabench uses (oneDNN's). Attention, norms, activations, the optimizer and loading are not in it.

The rows take turns in every round, and the fastest round counts: seconds of processor time.
`autograd` is the same loop with the model's own forward pass, as other architectures are trained;
with torch.mm for its products it is what all architectures had before.
`difference` is the largest difference of a query's loss from the written-out pass.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import numpy as np
import torch

from tdabench.run.sources import load_suite
from tdabench.run.truths import draw_plan
from tdabench.targets.decoder import Decoder, cut
from tdabench.targets.products import product
from tdabench.targets.training import batch_order
from tdabench.truth import Unit
from tdabench.truth.engines import UnitTrainer

Shapes = list[tuple[int, int]]  # (tokens, response tokens) of each part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="smooth")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    suite = load_suite("pocket")
    target, queries = suite.target(args.target), suite.queries("test")
    plan = draw_plan(suite, target, "lds")
    trainer, unit = UnitTrainer.of(plan, target.target, suite.train, queries), Unit(0, 0)
    trainer.losses(unit)  # warm caches
    train, asked = parts(trainer, unit)
    config = target.target.fresh_model().config
    print(
        f"{args.target}: {len(plan.groups[0])} examples, {len(queries)} queries; "
        f"{sum(t for t, _ in train):,} tokens in {len(train)} parts forward and backward, "
        f"{sum(t for t, _ in asked):,} in {len(asked)} forward; torch {torch.__version__}"
    )

    def plain() -> np.ndarray:
        with mock.patch.object(Decoder, "of", return_value=None):
            return trainer.losses(unit)

    def before() -> np.ndarray:
        with (
            mock.patch("tdabench.targets.training.fast_products", return_value=nullcontext()),
            mock.patch("tdabench.targets.target.fast_products", return_value=nullcontext()),
        ):
            return plain()

    rows: dict[str, Callable[[], object]] = {
        "products, torch.mm": lambda: limit(config, train, asked, torch.mm),
        "products, oneDNN": lambda: limit(config, train, asked, product),
        "tdabench": lambda: trainer.losses(unit),
        "autograd, oneDNN": plain,
        "autograd, torch.mm": before,
    }
    found: dict[str, list[float]] = {name: [] for name in rows}
    losses: dict[str, np.ndarray] = {}
    for _ in range(args.rounds):
        for name, run in rows.items():
            began = time.process_time()
            result = run()
            found[name].append(time.process_time() - began)
            if isinstance(result, np.ndarray):
                losses[name] = result
    best = {name: min(seconds) for name, seconds in found.items()}
    print(f"\n{'':20} {'seconds':>8} {'of torch.mm':>12} {'of oneDNN':>10} {'difference':>11}")
    for name, seconds in best.items():
        apart = f"{np.abs(losses[name] - losses['tdabench']).max():11.1e}" if name in losses else ""
        print(
            f"{name:20} {seconds:8.2f} {seconds / best['products, torch.mm']:12.2f} "
            f"{seconds / best['products, oneDNN']:10.2f} {apart}"
        )


def parts(trainer: UnitTrainer, unit: Unit) -> tuple[Shapes, Shapes]:
    """Returns the parts of every step of the unit's retraining, and of the queries' losses."""
    recipe = trainer.plan.recipe
    tokens = [trainer.train[i] for i in trainer.plan.groups[unit.group]]
    out = []
    for batch in batch_order(len(tokens), recipe, trainer.plan.run_seed(unit)):
        for index in cut([len(tokens[i]) for i in batch], recipe.micro_batch):
            part = [tokens[i] for i in batch[index]]
            out.append(shape(part))
    asked = [[trainer.queries[i] for i in p] for p in cut([len(t) for t in trainer.queries])]
    return out, [shape(p) for p in asked]


def shape(part: list) -> tuple[int, int]:
    """Returns tokens and response tokens, to the nearest multiple of 64.

    oneDNN compiles a routine for every new shape, which is not arithmetic.
    """
    counts = sum(map(len, part)), sum(len(t) - t.start for t in part)
    return tuple(max(64, 64 * round(n / 64)) for n in counts)


def limit(config: object, train: Shapes, asked: Shapes, multiply: Callable) -> None:
    """Computes the products of one retraining."""
    c, kept = config, {}
    heads, d, f = c.num_attention_heads, c.hidden_size, c.intermediate_size
    h = getattr(c, "head_dim", None) or d // heads
    sides = [((heads + 2 * c.num_key_value_heads) * h, d), (d, heads * h), (2 * f, d), (d, f)]

    def some(*shape: int) -> torch.Tensor:  # drawn once per shape
        if shape not in kept:
            kept[shape] = torch.randn(shape)
        return kept[shape]

    def one(out: int, into: int, tokens: int, backward: bool) -> None:
        multiply(some(out, into), some(into, tokens))
        if backward:
            multiply(some(into, out), some(out, tokens))
            multiply(some(out, tokens), some(into, tokens).T)

    for shapes, backward in ((train, True), (asked, False)):
        for tokens, responses in shapes:
            for _ in range(c.num_hidden_layers):
                for out, into in sides:
                    one(out, into, tokens, backward)
            one(c.vocab_size, d, responses, backward)


if __name__ == "__main__":
    main()
