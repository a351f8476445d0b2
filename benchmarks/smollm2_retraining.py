"""Measures what a retraining of factbook's target `smollm2` costs, in four ways.

python benchmarks/smollm2_retraining.py [--examples 32]

Adapters on all layers or on those of the suite's recipe; for the latter from the tokens on, as any
training does, or from the states that enter the first adapted layer, as truths are built; each by
the written-out passes, and the first also by autograd in bfloat16. Trains on a few examples and
multiplies by the tokens of a whole group; the same for queries. Seconds are of one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import numpy as np
import torch

from tdabench.run.sources import load_suite
from tdabench.targets.training import finetune, states_below
from tools.factbook import SUITE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    suite = load_suite(SUITE / "suite.toml", targets=("smollm2",))
    declared = suite.target("smollm2")
    target, plans = declared.target, declared.plans
    train, queries = target.tokenize(suite.train), target.tokenize(suite.queries())
    size = round(plans["lds"].fraction * len(train))
    mean = float(np.mean([len(t) for t in train]))
    # Examples of every length, as a group has them.
    ordered = sorted(train, key=len)
    some = [ordered[i] for i in np.linspace(0, len(train) - 1, args.examples).astype(int)]
    asked = queries[: args.examples]
    group = target.recipe.epochs * size * mean
    units = sum(p.groups * p.seeds for p in plans.values())
    print(
        f"a group of {size}: {group:,.0f} tokens with {target.recipe.epochs} epochs; "
        f"{units} retrainings; torch {torch.__version__}"
    )

    some_layers = dataclasses.replace(target.recipe, epochs=1)
    all_layers = dataclasses.replace(some_layers, layers_to_transform=())
    bfloat16 = dataclasses.replace(all_layers, precision="bfloat16", micro_batch=25)
    for name, recipe, kept in (
        ("all layers, autograd in bfloat16", bfloat16, False),
        ("all layers", all_layers, False),
        ("the recipe's layers", some_layers, False),
        ("the recipe's layers, states kept", some_layers, True),
    ):
        model = target.fresh_model("base")
        finetune(model, some[:2], recipe, 0, target.pad_id)  # compares the passes, once
        below = asked_below = None
        began = time.process_time()
        if kept:
            below = states_below(model, some, recipe, target.pad_id)
            asked_below = states_below(model, asked, recipe, target.pad_id)
        once = (time.process_time() - began) / args.examples * (len(train) + len(queries))
        began = time.process_time()
        finetune(model, some, recipe, 0, target.pad_id, below=below)
        trained = (time.process_time() - began) / sum(len(t) for t in some)
        began = time.process_time()
        target.losses(model, asked, below=asked_below)
        evaluated = (time.process_time() - began) / len(asked)
        whole = trained * group + evaluated * len(queries)
        print(
            f"{name}: {1e3 * trained:.2f} ms per token and {evaluated:.3f} s per query, "
            f"{whole:.0f} s per retraining, {(units * whole + once) / 3600:.1f} core-hours for all"
            + (f" (with {once:.0f} s for the states, once per process)" if kept else ""),
            flush=True,
        )


if __name__ == "__main__":
    main()
