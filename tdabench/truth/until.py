"""Builds a truth group by group and stops once it is precise enough.

More retrainings narrow the interval over groups: how far the LDS of a method on *these* queries
would differ on other groups. What queries and tasks add stays as it is. The interval is of the LDS
of a cheap reference method, whose scores are known before any retraining. It is looked at after
fixed numbers of groups only, of which the plan decides the order, so that the same plan, width and
reference always stop at the same group. docs/statistics.md shows that intervals cover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdabench import stats
from tdabench.data.examples import Corpus
from tdabench.errors import GuardError, UsageError
from tdabench.targets.target import Target
from tdabench.truth.build import build_units, read_row
from tdabench.truth.plan import TruthPlan, Unit
from tdabench.truth.store import Truth

FEWEST = 20  # groups before the first look: of fewer, the width is too uncertain to stop by
GROWTH = math.sqrt(2)  # from one look to the next
SLACK = 0.01  # of a width: losses of another machine round differently


@dataclass(frozen=True)
class Look:
    """The reference's LDS after so many groups, and half its 95% interval over groups."""

    groups: int
    lds: float
    width: float


@dataclass(frozen=True)
class Reference:
    """A cheap method by whose LDS a truth is judged precise: its group scores [query, group].

    Queries whose scores are the same for all groups always have the value 0, which would look
    precise: they are left out. Raises UsageError if they are more than half.
    """

    method: Mapping[str, Any]  # name, version and parameters
    scores: np.ndarray

    def __post_init__(self) -> None:
        flat = int(stats.constant_rows(self.scores).sum())
        if 2 * flat > len(self.scores) or not len(self.scores):
            raise UsageError(
                f"{self.method.get('name')} scores all groups alike for {flat} of "
                f"{len(self.scores)} queries, so that its interval does not say how precise the "
                "truth is",
                "Choose another reference method",
            )

    def look(self, values: np.ndarray) -> Look:
        """Measures the interval over groups on the first groups' values [query, group].

        Half its width is Student's quantile times the standard deviation of the mean LDS when
        groups alone are drawn again.
        """
        n = values.shape[1]
        varies = ~stats.constant_rows(self.scores)
        boot = stats.bootstrap_lds(self.scores[varies, :n], values[varies])
        return Look(n, boot.value, boot.half_width_over_groups(n))


def parse_until(text: str) -> float:
    """Reads `width=0.02`. Raises UsageError for anything else."""
    name, _, value = text.partition("=")
    try:
        width = float(value)
    except ValueError:
        width = math.nan
    if name != "width" or not 0 < width < 1:
        raise UsageError(
            f"{text!r} does not have the form width=W with W between 0 and 1",
            "Give width=0.02 to stop at an LDS that is known to ±0.02 over groups",
        )
    return width


def looks(planned: int) -> list[int]:
    """Returns after how many groups the width is looked at: 20, 28, 40, 57, … and all `planned`."""
    out, n = [], float(FEWEST)
    while (here := round(n)) < planned:
        out.append(here)
        n *= GROWTH
    return [*out, planned]


def build_until(
    plan: TruthPlan,
    target: Target,
    train: Corpus,
    queries: Corpus,
    folder: Path,
    width: float,
    reference: Reference,
    *,
    on_look: Callable[[Look], None] = lambda found: None,
    **how: Any,
) -> tuple[list[Unit], dict[str, Any] | None]:
    """Trains the plan's groups in their order until `width` is reached, or all are trained.

    `how` goes to `build_units`. Returns the units that failed, and how the build was stopped: the
    value of `stopped` for `collect`, None for a plan that was built whole or has failures.
    """
    seen: list[Look] = []
    for n in looks(len(plan.groups)):
        units = [Unit(g, s) for g in range(n) for s in range(plan.n_seeds)]
        failed = build_units(plan, target, train, queries, folder, units, **how)
        if failed:
            return failed, None
        rows = np.stack([_losses(plan, folder, u) for u in units])  # [group * seed, query]
        values = -rows.reshape(n, plan.n_seeds, -1).astype(np.float64).mean(axis=1).T
        seen.append(reference.look(values))
        on_look(seen[-1])
        if seen[-1].width <= width and n < len(plan.groups):
            return [], _stopped(width, reference.method, len(plan.groups), seen)
    return [], None


def check_stop(truth: Truth, reference: Reference) -> None:
    """Raises GuardError unless a stopped truth ends at the look at which its rule stops it.

    A truth that was ended at another group may have been ended where its figures were liked.
    """
    said = truth.plan["stopped"]
    seen = []
    for n in looks(said["planned"]):
        seen.append(reference.look(truth.values[:, :n]))
        if seen[-1].width <= (1 - SLACK) * said["width"] or n >= len(truth.groups):
            break
    end = seen[-1]
    if end.groups != len(truth.groups) or end.width > (1 + SLACK) * said["width"]:
        raise GuardError(
            f"the truth {truth.plan.get('name', '')!r} says that it was stopped at "
            f"{len(truth.groups)} of {said['planned']} groups for an interval of "
            f"±{said['width']:g}, and after {end.groups} the interval is ±{end.width:.4f}",
            "Rebuild it with: tdabench truth build",
        )


def stopped_in_words(stopped: Mapping[str, Any]) -> str:
    """Returns where a build was stopped, and by what."""
    n, lds, width = stopped["looks"][-1]
    return (
        f"stopped at {n} of {stopped['planned']} groups, where the LDS of "
        f"{stopped['reference']['name']} is {lds:.3f} ± {width:.3f} over groups"
    )


def _losses(plan: TruthPlan, folder: Path, unit: Unit) -> np.ndarray:
    row = read_row(plan, folder, unit)
    assert row is not None  # just built
    return row.losses


def _stopped(
    width: float, method: Mapping[str, Any], planned: int, seen: Sequence[Look]
) -> dict[str, Any]:
    return {
        "width": width,
        "reference": dict(method),
        "planned": planned,
        "groups": seen[-1].groups,
        "looks": [[x.groups, round(x.lds, 6), round(x.width, 6)] for x in seen],
    }
