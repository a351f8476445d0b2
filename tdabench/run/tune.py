"""Chooses a method's parameters on tuning queries and tuning groups, never on test truth.

The tuning truth is another draw of groups, retrained with other seeds and evaluated on other
queries. Chosen parameters go into the suite's `[tuned.<target>.<method>]` table, and every record
made with them says so.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.errors import GuardError, TdabenchError, UsageError, unknown
from tdabench.groups import pool_scores
from tdabench.io import fingerprint
from tdabench.method import Context, Index, TDAMethod
from tdabench.registry import registry
from tdabench.run.contestants import Contestants, checked, lives_apart
from tdabench.run.meter import MeteredIndex
from tdabench.run.sources import load_suite
from tdabench.run.suite import Suite, SuiteTarget
from tdabench.run.suite_file import toml_key, toml_value
from tdabench.truth import Truth

# Parameters of scores, not of indices: trying them needs no new scores.
POOLING = ("pooling", "temperature")

# Softmax temperatures to try, as multiples of the standard deviation of the method's own scores,
# since scores have no common scale.
TEMPERATURES = (0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Trial:
    """Parameters that differ from the method's defaults, and their LDS on the tuning truth."""

    params: Mapping[str, Any]
    lds: float
    error: str = ""


def tune(
    suite_name: str,
    target_label: str | None,
    label: str,
    grid: Mapping[str, Sequence[Any]],
    *,
    seed: int = 0,
    device: str = "cpu",
    fresh: bool = False,
    on_trial: Callable[[Trial], None] = lambda trial: None,
    contestants: Contestants | None = None,
) -> list[Trial]:
    """Tries every combination in `grid`; returns them best first, failed ones last with reasons.

    `label` is a method or a variant of the suite. `grid` maps parameters to values. For the
    softmax poolings a temperature of `"auto"` means multiples of the scores' standard
    deviation. With `fresh` the suite's tuned values are not the starting point. A third-party
    method that this process must not import runs in `contestants`. Raises UsageError
    for an unknown parameter, for one that the variant fixes,
    or when the target has no tuning truth.
    """
    suite = load_suite(suite_name, targets=(target_label,) if target_label else ())
    target = suite.target(target_label) if target_label else suite.main_targets[0]
    cls, fixed = method_of(suite, label)
    names = dict.fromkeys((cls.name, label))
    base: dict[str, Any] = {}
    for name in names:
        base |= suite.method_params.get(name, {})
    for name in names if not fresh else ():
        base |= suite.tuned.get(target.label, {}).get(name, {})
    base |= fixed
    known = cls.from_params(base).params
    for key in grid:
        if key not in known:
            raise unknown(f"parameter of {label}", key, known)
        if key in fixed:
            raise UsageError(
                f"{label} is the variant of {cls.name} whose {key} is {fixed[key]}",
                f"Tune {cls.name}, or other parameters",
            )
    truth = tuning_truth(suite, target)
    queries = suite.queries("tuning")

    trials = []
    inner = {k: v for k, v in grid.items() if k in POOLING}
    late = {k: v for k, v in grid.items() if k in cls.query_time and k not in POOLING}
    outer = {k: v for k, v in grid.items() if k not in inner and k not in late}
    for chosen in combinations(outer):
        with tempfile.TemporaryDirectory() as scratch:
            context = Context(
                target=target.target,
                scratch=Path(scratch),
                seed=seed,
                device=device,
                assets=suite.assets_for(target),
            )
            path = Path(scratch) / "index"
            for later in combinations(late):
                given = {**chosen, **later}
                try:
                    method = cls.from_params({**base, **given})
                    if contestants is not None and lives_apart(cls.name):
                        contestants.release()
                        remote, _ = contestants.index(
                            cls.name, method.params, {**base, **given}, fingerprint(chosen),
                            suite, target, seed=seed, device=device, keep=Path(scratch) / "kept",
                        )  # fmt: skip
                        index: Index = checked(remote, cls.name)
                    elif path.exists():  # the same index, read by a method with other parameters
                        index = method.load(context, path)
                    else:
                        index = method.build(context, suite.train)
                        if late:
                            path.mkdir()
                            index.save(path)
                    scored = list(_scored(index, queries, truth, inner))
                except (TdabenchError, RuntimeError, ValueError) as e:
                    scored = [({}, float("nan"), str(e) or type(e).__name__)]
                for extra, value, error in scored:
                    trials.append(Trial({**given, **extra}, value, error))
                    on_trial(trials[-1])
    return sorted(trials, key=lambda t: -t.lds if np.isfinite(t.lds) else np.inf)


def method_of(suite: Suite, label: str) -> tuple[type[TDAMethod], Mapping[str, Any]]:
    """Returns (class, fixed parameters) of a method, or of a variant that the suite declares.

    Raises UsageError for an unknown label.
    """
    if label in suite.variants:
        variant = suite.variants[label]
        return registry().method(variant.method).cls, variant.params
    return registry().method(label).cls, {}


def with_tuned(text: str, target: str, label: str, params: Mapping[str, Any], lds: float) -> str:
    """Returns a suite file's text with the table [tuned.<target>.<label>] replaced or added.

    `lds` is the LDS on the tuning truth, noted behind the table's name. The rest of the text,
    comments included, stays as it is.
    """
    name = f"[tuned.{toml_key(target)}.{toml_key(label)}]"
    table = f"{name}  # LDS on tuning {lds:.3f}\n" + "".join(
        f"{toml_key(k)} = {toml_value(v)}\n" for k, v in params.items() if v is not None
    )
    old = re.compile(rf"^{re.escape(name)}[^\n]*\n(?:(?!\[)[^\n]+(?:\n|\Z))*", re.MULTILINE)
    if old.search(text):
        return old.sub(lambda _: table, text, count=1)
    return text.rstrip("\n") + "\n\n" + table


def tuning_truth(suite: Suite, target: SuiteTarget) -> Truth:
    """Returns the target's truth on tuning queries, checked."""
    if "tuning" not in target.truths:
        raise UsageError(
            f"the target {target.label} of suite {suite.name} declares no tuning truth",
            "Parameters must not be chosen on the test truth: add a tuning truth to the suite",
        )
    path = target.truths["tuning"]
    suite.verify(path)
    truth = Truth.load(path)
    truth.check(suite.train, target.target, target.recipe_of("tuning"))
    check_apart(suite, target, truth)
    return truth.for_queries(suite.queries("tuning").ids)


def check_apart(suite: Suite, target: SuiteTarget, tuning: Truth) -> None:
    """Raises GuardError if choosing parameters would use the data that scores methods."""
    test = suite.queries("test")
    ids, texts = set(test.ids), {(e.prompt, e.response) for e in test}
    for e in suite.queries("tuning"):
        if e.id in ids or (e.prompt, e.response) in texts:
            raise GuardError(
                f"the tuning query {e.id!r} is also a test query",
                "Parameters chosen on it would be scored on it: choose other tuning queries",
            )
    for name, path in target.truths.items():
        if name == "tuning" or name.startswith("tuning-") or not path.exists():
            continue
        if Truth.load(path).groups.fingerprint == tuning.groups.fingerprint:
            raise GuardError(
                f"the tuning truth of {target.label} has the groups of its truth {name!r}",
                "Draw other groups: tdabench truth build makes them from the plan's name",
            )


def combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values))


def _scored(
    index: Index, queries: Any, truth: Truth, inner: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[dict[str, Any], float, str]]:
    from tdabench import stats

    if not inner:
        scores = index.score_groups(queries, truth.groups)
        yield {}, stats.lds(scores, truth.values), ""
        return
    scores = index.score(queries)  # [query, train], once for all poolings
    own = type(index).score_groups is not Index.score_groups  # it may stream
    spread = float(scores.std()) or 1.0
    for pooling in inner.get("pooling", [index.pooling]):
        temperatures: Sequence[Any] = inner.get("temperature", [index.temperature])
        if pooling in ("sum", "mean"):
            temperatures = [None]
        for t in temperatures:
            for value in [x * spread for x in TEMPERATURES] if t == "auto" else [t]:
                params: dict[str, Any] = {"pooling": pooling}
                if value is not None:
                    params["temperature"] = float(f"{float(value):.2g}")
                for held in (index, *([index.inner] if isinstance(index, MeteredIndex) else [])):
                    held.pooling, held.temperature = pooling, params.get("temperature", 1.0)
                pooled = (
                    index.score_groups(queries, truth.groups)
                    if own
                    else pool_scores(scores, truth.groups, index.pooling, index.temperature)
                )
                yield params, stats.lds(pooled, truth.values), ""


def default_grid(cls: type[TDAMethod]) -> dict[str, list[Any]]:
    """Returns the values to try: the method's own `grid`, and pooling if it has one."""
    import dataclasses

    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    grid: dict[str, list[Any]] = {k: list(v) for k, v in cls.grid.items()}
    if "pooling" in fields:
        grid.setdefault("pooling", ["sum", "softmax", "softmax-abs"])
        grid.setdefault("temperature", ["auto"])
    return grid
