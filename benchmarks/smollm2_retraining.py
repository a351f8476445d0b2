"""Measures what a retraining of factbook's target `smollm2` costs, in float32 and bfloat16.

python benchmarks/smollm2_retraining.py [--examples 16]

Trains on a few examples and multiplies by the tokens of a whole group; the same for queries.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import numpy as np
import torch

from tdabench.run.sources import load_suite
from tdabench.targets.training import finetune
from tools.factbook import SUITE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    suite = load_suite(SUITE / "suite.toml", targets=("smollm2",))
    declared = suite.target("smollm2")
    target, plans = declared.target, declared.plans
    train, queries = target.tokenize(suite.train), target.tokenize(suite.queries())
    size = round(plans["lds"].fraction * len(train))
    group = target.recipe.epochs * size * float(np.mean([len(t) for t in train]))
    some, asked = train[: args.examples], queries[: args.examples]
    print(f"a group of {size}: {group:,.0f} tokens with {target.recipe.epochs} epochs")
    for precision in ("float32", "bfloat16"):
        recipe = dataclasses.replace(target.recipe, precision=precision, epochs=1)
        model = target.fresh_model("base")
        began = time.process_time()
        finetune(model, some, recipe, 0, target.pad_id)
        trained = (time.process_time() - began) / sum(len(t) for t in some)
        began = time.process_time()
        target.losses(model, asked)
        evaluated = (time.process_time() - began) / len(asked)
        whole = trained * group + evaluated * len(queries)
        units = sum(p.groups * p.seeds for p in plans.values())
        print(
            f"{precision}: {1e3 * trained:.1f} ms per token, {whole:.0f} s per retraining of one "
            f"core, {units * whole / 3600:.1f} core-hours for {units} retrainings"
        )


if __name__ == "__main__":
    main()
