"""Verifies a truth: retrains a random sample of it and compares losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tdabench.data.examples import Corpus
from tdabench.errors import DataError, GuardError
from tdabench.io import read_arrays
from tdabench.seeds import named_seed
from tdabench.targets.recipe import Recipe
from tdabench.targets.target import Target
from tdabench.truth.build import build_units, unit_path
from tdabench.truth.plan import TruthPlan, Unit
from tdabench.truth.store import Truth


def verify_truth(
    path: Path,
    plan: TruthPlan,
    target: Target,
    train: Corpus,
    queries: Corpus,
    scratch: Path,
    *,
    n_units: int = 4,
    workers: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Repeats `n_units` retrainings, drawn by `seed`, of the truth in `path`.

    Returns `mean_difference` (mean absolute difference of losses, nats), `identical` (share equal
    to the bit), and `between_seeds` (the same difference between two seeds of one group, as the
    reference; NaN with one seed). Raises GuardError if the truth belongs to another plan, and
    DataError if a retraining fails.
    """
    truth = Truth.load(path)
    made = Recipe.of(truth.plan.get("recipe", {}))
    truth.check(train, target, made)  # the recipe is the plan's, compared next
    if not truth.is_of(plan):
        raise GuardError(
            f"{path} was not built by the plan {plan.name!r} that the suite declares",
            "Rebuild it with: tdabench truth build",
        )
    units = [u for u in plan.units() if u.group < len(truth.groups)]  # it may have been stopped
    rng = np.random.default_rng(named_seed(seed, f"verify-{plan.name}"))
    sample = [units[i] for i in rng.choice(len(units), min(n_units, len(units)), replace=False)]
    reasons: dict[Unit, str] = {}
    failed = build_units(
        plan, target, train, queries, scratch, sample, workers=workers, on_unit=reasons.__setitem__
    )
    if failed:
        raise DataError(
            f"the retraining {failed[0].name} of {plan.name!r} failed: {reasons[failed[0]]}"
        )
    again = np.stack([read_arrays(unit_path(scratch, u))[0]["losses"] for u in sample])
    shipped = np.stack([truth.losses[u.group, u.seed] for u in sample])
    between = (
        float(np.abs(truth.losses[:, 0] - truth.losses[:, 1]).mean())
        if truth.n_seeds > 1
        else float("nan")
    )
    return {
        "name": plan.name,
        "units": len(sample),
        "mean_difference": float(np.abs(again - shipped).mean()),
        "max_difference": float(np.abs(again - shipped).max()),
        "identical": float((again == shipped).mean()),
        "between_seeds": between,
    }
