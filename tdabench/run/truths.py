"""The truths that a suite declares, and the plan of each."""

from __future__ import annotations

import os
from pathlib import Path

from tdabench.data.origins import most_asked, without_each
from tdabench.errors import TdabenchError, UsageError, unknown
from tdabench.groups import Groups
from tdabench.run.sources import load_suite
from tdabench.run.suite import Suite, SuiteTarget
from tdabench.truth import TruthPlan


def planned_truths(
    suite_name: str, targets: tuple[str, ...], truths: tuple[str, ...]
) -> list[tuple[Suite, SuiteTarget, str]]:
    """Returns every requested (suite, target, truth name) for which the suite has a plan."""

    suite = load_suite(suite_name, targets=targets or None)
    out = []
    for target in [suite.target(t) for t in targets] if targets else suite.targets:
        for name in truths or target.plans:
            if name not in target.truths:
                raise unknown(f"truth of target {target.label}", name, target.truths)
            if name not in target.plans:
                if truths:
                    raise UsageError(
                        f"{suite.path} declares no plan for the truth {name!r} of {target.label}",
                        f"Add [targets.plans.{name}] with groups, fraction and seeds",
                    )
                continue
            out.append((suite, target, name))
    if not out:
        raise UsageError(f"suite {suite.name} declares no truth that can be built here")
    return out


def draw_plan(suite: Suite, target: SuiteTarget, name: str) -> TruthPlan:
    """Draws the plan that the suite declares. The same suite always draws the same groups."""

    spec = target.plans[name]
    if spec.leave_out:
        queries, by = suite.queries(spec.queries), spec.leave_out
        only = most_asked(suite.train, queries, by, spec.groups) if spec.groups else ()
        return TruthPlan.of(
            f"{suite.name}-{target.label}-{name}",
            target.target,
            suite.train,
            queries,
            groups=without_each(suite.train, by, only),
            n_seeds=spec.seeds,
            recipe=target.recipe_of(name),
            start=spec.start,
            order=spec.order,
        )
    plan = TruthPlan.draw(
        f"{suite.name}-{target.label}-{name}",
        target.target,
        suite.train,
        suite.queries(spec.queries),
        n_groups=spec.groups,
        fraction=spec.fraction,
        n_seeds=spec.seeds,
        recipe=target.recipe_of(name),
        start=spec.start,
        order=spec.order,
        groups_of=spec.groups_of,
    )
    check_groups_differ(plan.groups, name)
    return plan


def check_groups_differ(groups: Groups, name: str) -> None:
    """Raises UsageError for a plan whose groups are all alike: no score could rank them."""
    if len({g.tobytes() for g in groups}) < 2:
        raise UsageError(
            f"the truth {name!r} is planned over {len(groups)} groups that do not differ, so that "
            "nothing can be ranked by it",
            "Raise the number of groups (two at least), or lower the fraction below 1",
        )


def plan_from_file(
    suite_name: str, targets: tuple[str, ...], path: Path
) -> tuple[Suite, SuiteTarget, str, TruthPlan]:
    """Reads the plan in `path`, and finds the data in the suite that it was made for."""

    suite = load_suite(suite_name, targets=targets or None)
    plan = TruthPlan.load(path)
    for target in [suite.target(t) for t in targets] if targets else suite.targets:
        if target.target.fingerprint_of(plan.start) == plan.target:
            break
    else:
        raise UsageError(
            f"no target of the suite {suite.name} matches the plan {path}",
            f"The plan names it {plan.target}",
        )
    for queries in ("test", "tuning"):
        try:
            if suite.queries(queries).fingerprint == plan.queries:
                return suite, target, queries, plan
        except TdabenchError:
            continue  # a suite without tuning queries
    raise UsageError(f"{path} was planned for queries that the suite {suite.name} does not have")


def is_inside(suite: Suite, named: str, place: Path) -> bool:
    """Tells whether a declared truth is a file that may be written: in the suite's folder, links
    followed, and with the suffix of a truth. A suite may be untrusted.

    `named` is the suite as the user named it: files of a suite with fetched parts are resolved into
    the cache, but its truths belong beside the file that the user has.
    """
    given = Path(named)
    home = given if given.is_dir() else given.parent if given.is_file() else suite.folder
    real = Path(os.path.realpath(place))
    return real.is_relative_to(os.path.realpath(home)) and (
        real.suffix == place.suffix == ".safetensors"
    )


def check_inside(suite: Suite, named: str, place: Path) -> None:
    """Raises UsageError unless `is_inside`."""
    if not is_inside(suite, named, place):
        raise UsageError(
            f"suite {suite.name} declares a truth at {place}, which is not a .safetensors file in "
            "its folder: nothing is written there",
            "Build it without --in-place, and copy it from the work folder",
        )


def work_folder(work: Path, plan: TruthPlan) -> Path:
    return work / plan.name
