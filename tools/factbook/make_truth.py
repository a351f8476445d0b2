"""Builds the truths of the small target in place: test, tuning, and without one country at a time.

    python -m tools.factbook.make_truth [lds|tuning|loo]

Retrainings that are finished are kept in truth-builds/, so that the command resumes.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from tdabench.groups import Groups
from tdabench.run.sources import load_suite
from tdabench.run.suite import Suite
from tdabench.truth import TruthPlan
from tools.factbook import SUITE

COUNTRIES = 24


def countries(suite: Suite) -> list[str]:
    """Returns the countries with the most test queries, in alphabetical order."""
    asked = Counter(str(q.meta["source"]) for q in suite.queries())
    ordered = sorted(asked, key=lambda c: (-asked[c], c))
    return sorted(ordered[:COUNTRIES])


def leave_one_country_out(suite: Suite) -> TruthPlan:
    """Plans one retraining without each of `countries`, all in one order of the pool."""
    of = np.array([str(e.meta["source"]) for e in suite.train])
    target = suite.target("small").target
    return TruthPlan.of(
        f"{suite.name}-small-loo",
        target,
        suite.train,
        suite.queries(),
        groups=Groups.of([np.flatnonzero(of != c) for c in countries(suite)], len(of)),
        n_seeds=1,
        recipe=target.recipe,
        order="pool",
    )


def main() -> None:
    from tdabench.cli import main as tdabench
    from tdabench.truth import Truth

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("truths", nargs="*", default=["lds", "tuning", "loo"])
    parser.add_argument("--suite", type=Path, default=SUITE)
    parser.add_argument("--work", type=Path, default=Path("truth-builds"))
    parser.add_argument("--workers", default="auto")
    args = parser.parse_args()
    toml = args.suite / "suite.toml"
    shared = ["--target", "small", "--work", str(args.work), "--workers", args.workers]
    for name in args.truths:
        one = ["--truth", name, "--in-place"]
        if name == "loo":
            suite = load_suite(toml, targets=("small",))
            plan = leave_one_country_out(suite)
            planned = args.work / "factbook-small-loo-plan.safetensors"
            plan.save(planned)
            one = ["--plan", str(planned)]
        if code := tdabench(["truth", "build", str(toml), *shared, *one]):
            raise SystemExit(code)
        if name == "loo":
            built = args.work / plan.name / "truth.safetensors"
            Truth.load(built).save(args.suite / "truth" / "small-loo.safetensors")


if __name__ == "__main__":
    main()
