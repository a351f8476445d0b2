"""Speed of truth builds: tdabench and a straightforward loop, same recipe, same losses.

    python benchmarks/truth_speed.py [--target instruct] [--units 8] [--loop-units 1] [--stack 4]

The loop is a straightforward implementation: one process with one thread per core, batches of the
recipe's size padded to a fixed length, text tokenised on the fly, logits at every position. Its
other row pads to the longest example of each batch, which is already an optimisation. tdabench's
rows are its engines: in this process (one thread), a pool of processes (one thread each), and a
stack of targets under vmap. All retrain the same units of one plan of the suite `pocket`.

Seconds are wall time per unit once all workers are busy; loading and start-up are shown separately.
`--json FILE` writes the rows there; `--tiny` retrains a toy target on 10 examples, to try the
script out. Run this on an otherwise idle machine. `difference` is the largest difference of a
query's loss from the pool's. Ratios are units per second relative to the first row.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from tdabench.groups import Groups
from tdabench.run.sources import load_suite
from tdabench.run.truths import draw_plan
from tdabench.targets import Recipe
from tdabench.targets.training import batch_order, make_optimizer
from tdabench.testing.tiny import tiny_world
from tdabench.truth import InProcess, Pool, Stacked, TruthPlan, Unit
from tdabench.truth.build import build_units, read_row
from tdabench.truth.engines import Engine, UnitTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="instruct")
    parser.add_argument("--units", type=int, default=8, help="for tdabench's engines")
    parser.add_argument("--loop-units", type=int, default=1, help="for the loops, which are slow")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--stack", type=int, default=4, help="targets a stack; 0 leaves it out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", default="loops,process,pool,stack")
    parser.add_argument("--tiny", action="store_true", help="a toy target, to try the script out")
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()
    asked = args.rows.split(",")

    parts = toy_parts() if args.tiny else pocket_parts(args.target)
    plan, target, train, queries = parts
    trainer = UnitTrainer.of(*parts)
    trainer.losses(Unit(0, 0))  # warm caches
    print(
        f"{plan.name}: {plan.groups.sizes[0]} examples, {plan.recipe.epochs} epochs, "
        f"{len(queries)} queries, {args.device}, torch {torch.__version__}, "
        f"{len(os.sched_getaffinity(0))} cores"
    )

    rows: list[tuple[str, float, float, dict[Unit, np.ndarray]]] = []
    if "loops" in asked:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        for name, width in (
            (f"loop, padded to {target.max_length}", target.max_length),
            ("loop, padded to the longest of the batch", 0),
        ):
            began, found = time.perf_counter(), {}
            for unit in plan.units()[: args.loop_units]:
                found[unit] = loop(trainer, train, queries, unit, width, args.device)
            rows.append((name, (time.perf_counter() - began) / args.loop_units, 0.0, found))
        torch.set_num_threads(1)
    engines: dict[str, tuple[str, Engine, int]] = {
        "process": ("tdabench, in process", InProcess(args.device), 1),
        "pool": (
            f"tdabench, {args.workers} workers", Pool(args.workers, (args.device,)), args.workers
        ),
        "stack": (f"tdabench, stack of {args.stack}", Stacked(args.stack, args.device), args.stack),
    }  # fmt: skip
    for key, (name, engine, at_once) in engines.items():
        if key in asked and at_once:
            rows.append((name, *timed(parts, engine, args.units, at_once)))
    reference = rows[-1][3]
    for name, _, _, found in rows:
        if "workers" in name:
            reference = found
    first = rows[0][1]
    print(f"\n{'':42} {'s a unit':>9} {'start s':>8} {'ratio':>6} {'difference':>11}")
    written = {}
    for name, each, start, found in rows:
        apart = max(np.abs(found[u] - reference[u]).max() for u in found if u in reference)
        print(f"{name:42} {each:9.2f} {start:8.1f} {first / each:6.2f} {apart:11.1e}")
        written[name] = {"seconds": each, "start": start, "difference": float(apart)}
    if args.json:
        args.json.write_text(json.dumps(written, indent=1))


def pocket_parts(label: str):  # type: ignore[no-untyped-def]
    """Returns (plan, target, corpus, queries) of one of pocket's targets."""
    suite = load_suite("pocket")
    target, queries = suite.target(label), suite.queries("test")
    return draw_plan(suite, target, "lds"), target.target, suite.train, queries


def toy_parts():  # type: ignore[no-untyped-def]
    """Returns the same of a toy target, with 32 groups of 10 examples."""
    world = tiny_world()
    parts = world.target, world.train, world.queries
    groups = Groups.random(32, len(world.train), 10 / len(world.train), np.random.default_rng(0))
    recipe = Recipe(lr=1e-3, epochs=1, batch_size=8)
    plan = TruthPlan.of("toy", *parts, groups=groups, n_seeds=1, recipe=recipe)
    return plan, *parts


def loop(trainer, train, queries, unit, width, device):  # type: ignore[no-untyped-def]
    """Runs one retraining in the straightforward way: losses of the queries [query]."""
    plan, target = trainer.plan, trainer.target
    model = target.fresh_model(plan.start).to(device)
    model.requires_grad_(True).train()
    params = list(model.parameters())
    optimizer = make_optimizer(params, plan.recipe)
    group = [train[i] for i in plan.groups[unit.group]]
    total, seed = plan.recipe.steps(len(group)), plan.run_seed(unit)
    for step, chosen in enumerate(batch_order(len(group), plan.recipe, seed)):
        for g in optimizer.param_groups:
            g["lr"] = plan.recipe.lr_at(step, total)
        full_losses(target, model, [group[i] for i in chosen], width).mean().backward()
        torch.nn.utils.clip_grad_norm_(params, plan.recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        size = plan.recipe.batch_size
        parts = [queries[a : a + size] for a in range(0, len(queries), size)]
        return torch.cat([full_losses(target, model, p, width) for p in parts]).cpu().numpy()


def full_losses(target, model, examples, width):  # type: ignore[no-untyped-def]
    """Computes each example's mean response-token loss from logits at every position: [b]."""
    tokens = [target.tokenize([e])[0] for e in examples]
    width = width or max(len(t) for t in tokens)
    ids = torch.full((len(tokens), width), target.pad_id)
    labels = torch.full((len(tokens), width), -100)
    for row, t in enumerate(tokens):
        ids[row, : len(t)] = torch.from_numpy(t.ids)
        labels[row, t.start : len(t)] = torch.from_numpy(t.ids[t.start :])
    real = torch.zeros_like(ids)
    for row, t in enumerate(tokens):
        real[row, : len(t)] = 1
    ids, labels, real = (x.to(model.device) for x in (ids, labels, real))
    logits = model(input_ids=ids, attention_mask=real).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    ).view(len(tokens), -1)
    return losses.sum(1) / (labels[:, 1:] != -100).sum(1)


def timed(parts, engine, n, at_once):  # type: ignore[no-untyped-def]
    """Measures seconds per unit once every worker has finished one, seconds before, and losses."""
    plan = parts[0]
    units, stamps = plan.units()[:n], []
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        failed = build_units(
            *parts, Path(folder), units, engine=engine,
            on_unit=lambda u, reason: stamps.append(time.perf_counter()),
        )  # fmt: skip
        if failed:
            sys.exit(f"{len(failed)} retrainings failed")
        rows = {u: read_row(plan, Path(folder), u) for u in units}
        found = {u: row.losses for u, row in rows.items() if row is not None}
    at_once = min(at_once, n - 1)
    each = (stamps[-1] - stamps[at_once - 1]) / (n - at_once)
    return each, max(0.0, stamps[at_once - 1] - began - each * at_once), found


if __name__ == "__main__":
    main()
