"""Runs the laws: results for a table, and a parametrisation for pytest."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tdabench.errors import MissingAsset, MissingExtra, UsageError, unknown
from tdabench.method import TDAMethod
from tdabench.testing.laws import LAWS, Case, DoesNotApply, Law, LawBroken
from tdabench.testing.tiny import tiny_world

if TYPE_CHECKING:
    from tdabench.benchmark import Benchmark, Outcome

Status = Literal["passed", "failed", "expected", "unexpected", "skipped"]


@dataclass(frozen=True)
class LawResult:
    """The result of one law. `failed` and `unexpected` (an unnecessary waiver) are failures.

    `expected` is a failure that the method declares, with its reason in `detail`; `where` is the
    traceback of an exception other than a broken law; `missing` means skipped because an optional
    package or an asset is missing.
    """

    method: str
    law: str
    status: Status
    detail: str = ""
    seconds: float = 0.0
    where: str = ""
    missing: bool = False

    @property
    def ok(self) -> bool:
        return self.status not in ("failed", "unexpected")


def check_law(law: Law, case: Case) -> LawResult:
    """Checks one law on one case and catches any exception."""
    cls = type(case.method)
    waiver = cls.expected_failures.get(law.name)
    start, where = time.perf_counter(), ""
    status: Status = "passed"
    detail, missing = "", False
    try:
        law(case)
    except (MissingExtra, MissingAsset, DoesNotApply) as e:
        status, detail, missing = "skipped", str(e), not isinstance(e, DoesNotApply)
    except LawBroken as e:
        status, detail = "failed", str(e)
    except Exception as e:
        status, detail = "failed", f"raised {type(e).__name__}: {e}"
        where = traceback.format_exc()
    if waiver and status == "failed" and not where:
        status, detail = "expected", waiver
    elif waiver and status == "passed":
        status, detail = "unexpected", f"the law holds, but a failure is declared: {waiver}"
    seconds = time.perf_counter() - start
    return LawResult(cls.name, law.name, status, detail, seconds, where, missing)


def check_method(
    method: TDAMethod,
    laws: Iterable[str] | None = None,
    assets: Mapping[str, Path] | None = None,
    architecture: str = "qwen2",
) -> Iterator[LawResult]:
    """Yields the results of the laws (all by default), one by one.

    Raises UsageError for an unknown law.
    """
    chosen = [find_law(name) for name in laws] if laws is not None else list(LAWS.values())
    world = replace(tiny_world(architecture), assets=dict(assets or {}))
    case = Case(method, world)
    try:
        for law in chosen:
            yield check_law(law, case)
    finally:
        case.close()


def find_law(name: str) -> Law:
    """Returns the law of that name. Raises UsageError with the nearest names."""
    if name not in LAWS:
        raise unknown("law", name, LAWS)
    return LAWS[name]


def run_benchmark(benchmark: Benchmark, method: TDAMethod | str, **context: Any) -> Outcome:
    """Returns the benchmark's outcome for a method, or a method's name, on the tiny world.

    Checks that the outcome is complete: its primary metric exists and is finite, with a value and
    an id per query. `context` sets further fields of `BenchmarkContext`.
    """
    from tdabench.benchmark import BenchmarkContext
    from tdabench.registry import registry

    chosen: TDAMethod = registry().method(method).cls() if isinstance(method, str) else method

    def no_truth(name: str) -> Any:
        raise UsageError(f"the tiny world has no truth {name!r}", "Pass truth=… to run_benchmark")

    case = Case(chosen, replace(tiny_world(), assets=context.get("assets", {})))
    try:
        given = {"truth": no_truth, "scratch": case.new_folder("benchmark"), **context}
        outcome = benchmark.run(
            BenchmarkContext(
                index=case.index,
                target=case.world.target,
                train=case.train,
                queries=case.queries,
                **given,
            )
        )
    finally:
        case.close()
    assert outcome.primary in outcome.metrics, f"no metric {outcome.primary!r}"
    assert np.isfinite(outcome.metrics[outcome.primary].value), "the primary metric is not finite"
    assert len(outcome.per_query) == len(outcome.query_ids), "per_query and query_ids differ"
    return outcome


# --------------------------------------------------------------------------- pytest


class BoundLaw:
    """A law that a test calls as `law(method)`. Skips if the law does not apply."""

    def __init__(self, law: Law, cases: dict[TDAMethod, Case], assets: Mapping[str, Path]) -> None:
        self.law, self.cases, self.assets = law, cases, assets

    def __repr__(self) -> str:
        return self.law.name

    def __call__(self, method: TDAMethod) -> None:
        """Raises LawBroken, or any exception of the method."""
        import pytest

        __tracebackhide__ = True
        if method not in self.cases:
            for case in self.cases.values():
                case.close()  # tests run method by method, so one case is enough
            self.cases.clear()
            self.cases[method] = Case(method, replace(tiny_world(), assets=dict(self.assets)))
        try:
            self.law(self.cases[method])
        except (MissingExtra, MissingAsset, DoesNotApply) as e:
            pytest.skip(str(e))


def parametrize_with_laws(
    methods: Sequence[TDAMethod | type[TDAMethod]],
    assets: Mapping[str, Path] | None = None,
    laws: Iterable[str] | None = None,
) -> Callable[[Any], Any]:
    """Decorates a test to run once for every method and law.

        @parametrize_with_laws([MyMethod(), MyMethod(width=64)])
        def test_laws(method, law):
            law(method)

    A class means an instance with its defaults. Failures that a method declares in
    `expected_failures` are strict xfails with the reason; laws that do not apply, and methods whose
    optional package or asset is missing, are skipped.
    """
    import pytest

    chosen = [find_law(name) for name in laws] if laws is not None else list(LAWS.values())
    cases: dict[TDAMethod, Case] = {}
    params = []
    for m in methods:
        method = m() if isinstance(m, type) else m
        for law in chosen:
            waiver = type(method).expected_failures.get(law.name)
            marks = (
                [pytest.mark.xfail(raises=LawBroken, strict=True, reason=waiver)] if waiver else []
            )
            bound = BoundLaw(law, cases, assets or {})
            params.append(
                pytest.param(method, bound, marks=marks, id=f"{_label(method)}-{law.name}")
            )
    return pytest.mark.parametrize(("method", "law"), params)


def _label(method: TDAMethod) -> str:
    """Returns the name with the parameters that differ from their defaults."""
    plain = type(method)().params
    changed = [f"{k}={v}" for k, v in method.params.items() if v != plain[k]]
    return "-".join([type(method).name, *changed])
