"""Builds the truth of the benchmark `sources` on duplicated sources: truth/TARGET-copies.

    python -m tools.pocket.make_copies --work FOLDER [--target instruct] [--seeds 1]

The corpus is the pool with copies of some tasks behind it (tdabench.data.origins); the target is
retrained without copies, with each copy, and without each copied task. The build resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tdabench.benchmarks.sources import drawn_sources
from tdabench.data import Corpus
from tdabench.data.origins import copied_groups, members_by_origin, with_copies
from tdabench.run.sources import load_suite
from tdabench.targets.target import Target
from tdabench.truth import TruthPlan
from tdabench.truth.build import build, collect
from tools.pocket import SUITE


def plan_of(target_label: str, seeds: int = 1) -> tuple[TruthPlan, Target, Corpus, Corpus]:
    suite = load_suite(str(SUITE / "suite.toml"))
    target = suite.target(target_label).target
    copied = drawn_sources(list(members_by_origin(suite.train, "task")))
    train, queries = with_copies(suite.train, copied, "task"), suite.queries("test")
    groups = copied_groups(suite.train, copied, "task")
    plan = TruthPlan.of(
        f"pocket-{target_label}-copies", target, train, queries,
        groups=groups, n_seeds=seeds, recipe=target.recipe, order="pool",
    )  # fmt: skip
    return plan, target, train, queries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the build")
    parser.add_argument("--target", default="instruct", help="label of the target")
    parser.add_argument("--seeds", type=int, default=1, help="retrainings per group")
    args = parser.parse_args()
    plan, target, train, queries = plan_of(args.target, args.seeds)
    failed = build(
        plan,
        target,
        train,
        queries,
        args.work,
        on_unit=lambda u, why: print(u.name, why, flush=True),
    )
    if failed:
        raise SystemExit(f"{len(failed)} retrainings failed")
    collect(plan, args.work).save(SUITE / "truth" / f"{args.target}-copies.safetensors")


if __name__ == "__main__":
    main()
