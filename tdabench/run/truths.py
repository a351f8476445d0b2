"""The truths that a suite declares, and the plan of each."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from tdabench.data.origins import most_asked, without_each
from tdabench.errors import TdabenchError, UsageError, unknown
from tdabench.groups import Groups
from tdabench.method import Context
from tdabench.run.contestants import lives_apart
from tdabench.run.plan import jsonable
from tdabench.run.sources import load_suite
from tdabench.run.suite import Suite, SuiteTarget
from tdabench.truth import Reference, Truth, TruthPlan, check_stop


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


def reference(
    suite: Suite, target: SuiteTarget, plan: TruthPlan, queries: str, label: str, device: str
) -> Reference:
    """Scores the plan's groups with a cheap method, by whose LDS a build may be stopped.

    `label` is a method of tdabench's own or a variant of the suite, with its default parameters.
    Raises UsageError for a third-party method, which this process must not import.
    """
    from tdabench.run.tune import method_of

    cls, fixed = method_of(suite, label)
    if lives_apart(cls.name):
        raise UsageError(
            f"{label} is a third-party method, which cannot be the reference of a truth",
            "Choose a method of tdabench's own, such as tfidf",
        )
    method = cls.from_params(fixed)
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(
            target=target.target, scratch=Path(scratch), seed=0, device=device,
            assets=suite.assets_for(target),
        )  # fmt: skip
        index = method.build(context, suite.train)
        scores = np.asarray(index.score_groups(suite.queries(queries), plan.groups))
    made = {"name": label, "version": cls.version, "params": jsonable(method.params)}
    return Reference(made, scores)


def check_stopped(suite: Suite, target: SuiteTarget, name: str) -> str:
    """Checks where the declared truth `name` was stopped, if it was; see `check_stop`.

    Returns a remark if this cannot be checked, else "". Raises GuardError if it was stopped
    elsewhere.
    """
    truth, plan = Truth.load(target.truths[name]), draw_plan(suite, target, name)
    if "stopped" not in truth.plan or not truth.is_of(plan):
        return ""
    made = truth.plan["stopped"]["reference"]
    found = reference(suite, target, plan, target.plans[name].queries, made["name"], "cpu")
    if found.method != made:
        return (
            f"{plan.name} was stopped by version {made['version']} of {made['name']}, and this is "
            f"version {found.method['version']} or has other parameters: where it was stopped is "
            "not checked"
        )
    check_stop(truth, found)
    return ""


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
