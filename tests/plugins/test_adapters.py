"""Packages on the board: each against our own method where they compute the same thing."""

from __future__ import annotations

import builtins
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tdabench_adapters import tdabench_methods
from tdabench_adapters.bergson import BergsonGradDot
from tdabench_adapters.dattri import DattriTracIn, DattriTRAK
from tdabench_adapters.kronfluence import KronfluenceEKFAC

from tdabench.data.examples import Corpus
from tdabench.errors import MethodError, MissingExtra, UsageError
from tdabench.method import Context, TDAMethod
from tdabench.registry import registry
from tdabench.targets.target import Target
from tdabench.testing import parametrize_with_laws

MODULES = {"kronfluence": KronfluenceEKFAC, "dattri": DattriTracIn, "bergson": BergsonGradDot}


def installed(extra: str) -> bool:
    """Whether the package can be imported here: it may be there without what it imports."""
    from tdabench_adapters.common import package

    if importlib.util.find_spec(extra) is None:
        return False
    try:
        package("dattri.algorithm" if extra == "dattri" else extra, extra)
    except MissingExtra:
        return False
    return True


HERE = {extra for extra in MODULES if installed(extra)}


def needs(extra: str) -> Any:
    return pytest.mark.skipif(extra not in HERE, reason=f"{extra} is not installed")


@pytest.fixture
def context(tiny_target: Target, tmp_path: Path) -> Context:
    return Context(target=tiny_target, scratch=tmp_path)


def scores(
    name_or_method: str | TDAMethod,
    context: Context,
    train: Corpus,
    queries: Corpus,
    **params: Any,
) -> np.ndarray:
    method = name_or_method
    if isinstance(method, str):
        method = registry().method(method).cls.from_params(params)
    scratch = context.scratch / method.name
    scratch.mkdir(exist_ok=True)
    inner = dataclasses.replace(context, scratch=scratch)
    return method.build(inner, train).score(queries)


def off(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


FEW = ["described", "parameters-are-checked", "shapes-and-finiteness",
       "corpus-order-does-not-matter", "save-and-load-round-trip",
       "globals-are-untouched"]  # fmt: skip
ALSO = ["batches-do-not-matter", "second-call-equals-the-first", "model-is-untouched",
        "writes-only-in-scratch", "prints-nothing"]  # fmt: skip
ONE = "layers.1.self_attn.v_proj"
LIGHT = [
    DattriTracIn(layers=ONE),
    DattriTRAK(layers=ONE, proj_dim=16),
    BergsonGradDot(rank=4, layers=ONE),
]


@parametrize_with_laws([KronfluenceEKFAC(layers=ONE), *LIGHT], laws=FEW)
def test_laws(method, law) -> None:
    """Some of them: `tdabench check NAME` asks all."""
    law(method)


@parametrize_with_laws(LIGHT, laws=ALSO)
def test_more_laws(method, law) -> None:
    law(method)


# --------------------------------------------------------------------------- the same numbers


@needs("kronfluence")
@pytest.mark.parametrize("fisher", ["true", "empirical"])
def test_kronfluence_equals_ekfac(
    context: Context, tiny_corpus: Corpus, tiny_queries: Corpus, fisher: Any
) -> None:
    theirs = scores(KronfluenceEKFAC(fisher=fisher), context, tiny_corpus, tiny_queries)
    ours = scores("ekfac", context, tiny_corpus, tiny_queries, fisher=fisher, damping=0.1)
    assert off(theirs, ours) < 1e-4


@needs("kronfluence")
def test_kronfluence_identity_equals_identity(
    context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    method = KronfluenceEKFAC(strategy="identity", layers=ONE)
    theirs = scores(method, context, tiny_corpus, tiny_queries)
    assert off(theirs, scores("identity", context, tiny_corpus, tiny_queries, layers=ONE)) < 1e-4


@needs("dattri")
def test_dattri_tracin_equals_identity(
    context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    theirs = scores(DattriTracIn(), context, tiny_corpus, tiny_queries)
    ours = scores("identity", context, tiny_corpus, tiny_queries, bias=False)
    assert off(theirs, ours) < 1e-4


@needs("dattri")
def test_dattri_trak_is_trak_up_to_its_sketch(
    context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    """With more dimensions than weights and examples, both sketches keep inner products."""
    train, queries = tiny_corpus[:40], tiny_queries
    method = DattriTRAK(layers=ONE, proj_dim=4096, regularization=1e-9)
    theirs = scores(method, context, train, queries)
    g = scores("identity", context, train, queries, layers=ONE, bias=False)
    assert theirs.shape == g.shape
    ours = scores(
        "trak", context, train, queries, layers=ONE, proj_dim=4096, sketch="normal", damping=1e-3
    )
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(theirs, ours)]
    assert np.mean(r) > 0.9


@needs("bergson")
@pytest.mark.parametrize("unit_norm", [False, True])
def test_bergson_equals_graddot(
    context: Context, tiny_corpus: Corpus, tiny_queries: Corpus, unit_norm: bool
) -> None:
    method = BergsonGradDot(rank=None, unit_norm=unit_norm)
    theirs = scores(method, context, tiny_corpus, tiny_queries)
    native = "gradcos" if unit_norm else "graddot"
    assert off(theirs, scores(native, context, tiny_corpus, tiny_queries, rank=None)) < 1e-5


@needs("bergson")
def test_bergson_projects_by_its_own_matrices(
    context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    whole = scores(BergsonGradDot(rank=None), context, tiny_corpus, tiny_queries)
    small = scores(BergsonGradDot(rank=12), context, tiny_corpus, tiny_queries)
    assert np.corrcoef(whole.ravel(), small.ravel())[0, 1] > 0.9
    other = Context(context.target, context.scratch, seed=1)
    assert off(scores(BergsonGradDot(rank=12), other, tiny_corpus, tiny_queries), small) > 1e-3


# --------------------------------------------------------------------------- absent, or misused


@pytest.mark.parametrize("extra", sorted(MODULES))
def test_an_absent_package_names_its_extra(
    context: Context, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch, extra: str
) -> None:
    real = importlib.import_module

    def without(name: str, *args: Any) -> Any:
        if name.split(".")[0] == extra:
            raise ModuleNotFoundError(f"No module named {extra!r}", name=extra)
        return real(name, *args)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(MissingExtra, match=f"the package {extra} is not installed") as raised:
        MODULES[extra]().build(context, tiny_corpus[:4])
    assert raised.value.extra == extra
    assert "pip install" in str(raised.value)


def test_a_package_without_what_it_imports_names_that(
    context: Context, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, *args: Any) -> Any:
        raise ModuleNotFoundError("No module named 'einconv'", name="einconv")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(MissingExtra, match="kronfluence's einconv is not installed"):
        KronfluenceEKFAC().build(context, tiny_corpus[:4])


def test_extras_are_declared() -> None:
    import tomllib

    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert set(MODULES) <= set(extras["optional-dependencies"])


def test_bad_settings_are_refused(context: Context, tiny_corpus: Corpus) -> None:
    with pytest.raises(UsageError, match="damping must not be negative"):
        KronfluenceEKFAC(damping=-1.0)
    with pytest.raises(UsageError, match="proj_dim must be"):
        DattriTRAK(proj_dim=0)
    with pytest.raises(UsageError, match="rank must be at least 1"):
        BergsonGradDot(rank=0)
    with pytest.raises(UsageError, match="unknown pooling"):
        DattriTracIn(pooling="max")
    if "dattri" in HERE:
        with pytest.raises(MethodError, match="need a ridge"):
            DattriTRAK(regularization=0.0).build(context, tiny_corpus[:4])
    assert {cls.family for cls in tdabench_methods()} == {"package"}
    assert builtins.all(cls.summary.endswith("(extra)") for cls in tdabench_methods())
