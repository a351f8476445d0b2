"""LDS of `trak` by number of independently trained checkpoints, on one of pocket's targets.

    OMP_NUM_THREADS=1 python benchmarks/trak_ensemble.py --target smooth --models 8

Trains the models of `trak.ensemble`, each on a random half of the corpus, and computes the sketches
of each once. The damping and the pooling are chosen on the tuning truth, for each number of
checkpoints; the LDS on the test truth is printed with its interval, beside that of the base
checkpoint. Models and features are kept under `--work`, so that an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdabench import stats
from tdabench.groups import Groups, pool_scores
from tdabench.io import read_arrays, write_arrays
from tdabench.method import Context
from tdabench.run.sources import load_suite
from tdabench.run.tune import TEMPERATURES, tuning_truth
from tdabench.truth import Truth


def main() -> None:
    from tdabench_gradients.trak import TRAK

    from tdabench.api import random_groups, retrained

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="instruct")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--dampings", type=float, nargs="+", default=[0.01, 0.1, 1.0, 10.0])
    parser.add_argument("--every", type=int, default=1, help="Use every n-th query.")
    parser.add_argument("--work", type=Path, default=Path("runs/trak-ensemble"))
    parser.add_argument("--seconds", type=float, default=1e9, help="Stop after so long; resumes.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.time()

    suite = load_suite("pocket")
    target = suite.target(args.target)
    method = TRAK(ensemble=args.models)
    queries = {s: list(suite.queries(s))[:: args.every] for s in ("tuning", "test")}
    ids = {s: [q.id for q in qs] for s, qs in queries.items()}
    truths = {
        "tuning": tuning_truth(suite, target).for_queries(ids["tuning"]),
        "test": Truth.load(target.truths["lds"]).for_queries(ids["test"]),
    }
    work = args.work / args.target
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(target=target.target, scratch=Path(scratch))
        groups = random_groups(context, suite.train, args.models, method.share, "trak/groups")
        for k in range(-1, args.models):  # -1: the base checkpoint
            path = work / f"features-{args.every}-{k}.safetensors"
            if path.exists():
                continue
            if time.time() - started > args.seconds:
                sys.exit("out of time: run again to resume")
            if k < 0:
                part = method._sketched(context, method.engine(context, {}, checkpoint="base"))
            else:
                weights = work / f"model-{k}.safetensors"
                if not weights.exists():
                    one = Groups.of([groups[k]], len(suite.train))
                    row = retrained(context, suite.train, one, f"trak-{k}")[0]
                    write_arrays(weights, {"weights": row})
                row = read_arrays(weights)[0]["weights"]
                part = method._sketched(context, method._of(context, row))
            found = {
                s: features(part, context, examples)
                for s, examples in (("train", list(suite.train)), *queries.items())
            }
            write_arrays(path, found)
    raw = [
        read_arrays(work / f"features-{args.every}-{k}.safetensors")[0]
        for k in range(-1, args.models)
    ]
    print(f"{target.label}: {len(ids['test'])} test queries; LDS [95%] at the settings chosen")
    sizes = [1 << i for i in range(10) if 1 << i <= args.models]
    for name, parts in (("base", raw[:1]), *((str(m), raw[1 : 1 + m]) for m in sizes)):
        report(name, parts, args.dampings, truths, [q.task for q in queries["test"]])


def features(part: Any, context: Context, examples: list[Any]) -> np.ndarray:
    """Computes one model's sketches and 1 - p: float32 [example, dim + 1]."""
    from tdabench.api import map_batches

    def compute(batch: Any) -> torch.Tensor:
        phi, weight = part(batch)
        return torch.cat([phi, weight[:, None]], dim=1)

    tokens = context.target.tokenize(examples)
    out: np.ndarray | None = None
    for index, found in map_batches(context, tokens, compute, what="sketches", max_examples=64):
        if out is None:
            out = np.empty((len(examples), found.shape[1]), dtype=np.float32)
        out[index] = found.detach().numpy()
    assert out is not None
    return out


def report(
    name: str,
    parts: list[dict[str, np.ndarray]],
    dampings: list[float],
    truths: dict[str, Truth],
    tasks: list[str],
) -> None:
    """Chooses damping and pooling on the tuning truth, and prints the LDS on the test truth."""
    best: tuple[float, str, float, str, float] | None = None
    for damping in dampings:
        scores = {s: scored(parts, damping, s) for s in ("tuning",)}["tuning"]
        spread = float(scores.std())
        for pooling in ("sum", "softmax", "softmax-abs"):
            for t in (1.0,) if pooling == "sum" else TEMPERATURES:
                temperature = 1.0 if pooling == "sum" else t * spread
                grouped = pool_scores(scores, truths["tuning"].groups, pooling, temperature)
                value = stats.lds(grouped, truths["tuning"].values)
                if best is None or value > best[0]:
                    best = value, pooling, temperature, f"damping={damping:g}", damping
    assert best is not None
    value, pooling, temperature, told, damping = best
    grouped = pool_scores(
        scored(parts, damping, "test"), truths["test"].groups, pooling, temperature
    )
    boot = stats.bootstrap_lds(grouped, truths["test"].values, tasks=stats.task_codes(tasks))
    low, high = boot.interval() or (np.nan, np.nan)
    print(
        f"{name:>5} checkpoints  {boot.value:.3f} [{low:.3f}, {high:.3f}]  tuning {value:.3f}  "
        f"{told} {pooling} {temperature:.3g}",
        flush=True,
    )


def scored(parts: list[dict[str, np.ndarray]], damping: float, split: str) -> np.ndarray:
    """Computes mean_m phi_m(q)^T (F_m + lambda I)^-1 phi_m(z), times the mean of 1 - p_m(z)."""
    total, weight = 0.0, 0.0
    for part in parts:
        phi = part["train"][:, :-1].astype(np.float64)
        fisher = phi.T @ phi / len(phi)
        fisher += damping * np.trace(fisher) / len(fisher) * np.eye(len(fisher))
        solved = np.linalg.solve(fisher, part[split][:, :-1].T.astype(np.float64))  # [dim, query]
        total = total + solved.T @ phi.T
        weight = weight + part["train"][:, -1]
    return (total * weight / len(parts) ** 2).astype(np.float32)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "plugins"))
    main()
