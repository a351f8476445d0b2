"""The shipped pocket suite: whole, small, consistent with its plans, and true."""

from __future__ import annotations

import numpy as np
import pytest

from tdabench import stats
from tdabench.errors import DataError
from tdabench.io import read_json
from tdabench.run.sources import load_suite
from tdabench.run.truths import draw_plan
from tdabench.truth import Truth, check_disjoint, seed_agreement
from tdabench.truth.verify import verify_truth
from tools.pocket import SUITE as POCKET
from tools.pocket import make_hashes, make_targets

SUITE = load_suite("pocket")
TRUTHS = [(t.label, name) for t in SUITE.targets for name in t.plans]


def test_the_whole_suite_is_small():
    size = sum(p.stat().st_size for p in POCKET.rglob("*") if p.is_file())
    assert size < 25_000_000


def test_the_declared_hashes_are_those_of_the_files():
    text = (POCKET / "suite.toml").read_text()
    assert make_hashes.hashed(text) == text


def test_queries_tuning_queries_and_pool_are_disjoint():
    assert (len(SUITE.train), len(SUITE.queries()), len(SUITE.queries("tuning"))) == (
        2000,
        400,
        200,
    )
    check_disjoint(SUITE.train, SUITE.queries())
    check_disjoint(SUITE.train, SUITE.queries("tuning"))
    check_disjoint(SUITE.queries("tuning"), SUITE.queries())


MAIN = [t for t in SUITE.targets if "warm" in t.target.checkpoints]
FURTHER = [t for t in SUITE.targets if t not in MAIN]


def test_further_targets_differ_in_architecture_and_size_and_run_only_when_asked():
    sizes = {}
    for t in FURTHER:
        sizes[t.label] = sum(p.numel() for p in t.target.model("base").parameters())
        assert t.target.regime == "instruct"
    assert [t.label for t in SUITE.main_targets] == ["smooth"]
    kinds = {t.target.model("base").config.model_type for t in FURTHER}
    assert kinds >= {"llama", "gpt2", "gpt_neox"}
    main = sum(p.numel() for p in SUITE.target("instruct").target.model("base").parameters())
    assert sizes["neox"] < main / 2
    assert sizes["large"] > main * 1.5


def test_further_targets_were_retrained_on_groups_of_the_main_one():
    main = Truth.load(SUITE.target("instruct").truths["lds"])
    for t in FURTHER:
        truth = Truth.load(t.truths["lds"])
        assert truth.query_ids == main.query_ids
        for mine, theirs in zip(truth.groups, main.groups):
            np.testing.assert_array_equal(mine, theirs)
        ceiling = stats.noise_ceiling(truth.by_seed(), replicates=2)
        assert ceiling is not None
        assert ceiling.value > 0.6


@pytest.mark.parametrize("target", MAIN, ids=lambda t: t.label)
def test_targets_are_about_a_million_parameters_and_know_their_checkpoints(target):
    model = target.target.model("base")
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.3e6
    tokens = target.target.tokenize(SUITE.queries("tuning")[:50])
    base = target.target.losses(model, tokens).mean()
    warm = target.target.losses(target.target.model("warm"), tokens).mean()
    assert np.isfinite([base, warm]).all()
    if target.target.regime == "instruct":
        assert base > warm + 1, "the base has not seen the format: warming up teaches it"
    assert abs(float(base - warm)) > 0.01


def test_the_instruct_base_has_not_seen_the_format():
    plans = make_targets.TARGETS
    assert plans["instruct"].instruct_share == 0
    assert plans["continued"].instruct_share > 0


@pytest.mark.parametrize(("label", "name"), TRUTHS)
def test_a_truth_is_the_one_that_the_suite_plans(label, name):
    target = SUITE.target(label)
    SUITE.verify(target.truths[name])
    truth, plan = Truth.load(target.truths[name]), draw_plan(SUITE, target, name)
    truth.check(SUITE.train, target.target)
    assert truth.groups.fingerprint == plan.groups.fingerprint
    assert truth.query_ids == plan.query_ids
    assert truth.is_of(plan)
    assert np.isfinite(truth.losses).all()
    assert plan.recipe == target.recipe_of(name)


@pytest.mark.parametrize("label", ["instruct", "continued"])
def test_truths_are_large_and_reliable_enough(label):
    target = SUITE.target(label)
    lds, tuning = (Truth.load(target.truths[n]) for n in ("lds", "tuning"))
    assert lds.losses.shape[0] >= 100
    assert lds.n_seeds >= 4
    assert set(lds.query_ids).isdisjoint(tuning.query_ids)
    ceiling = stats.noise_ceiling(lds.by_seed(), replicates=2)
    assert ceiling is not None
    assert ceiling.value > 0.8


def test_the_smooth_recipe_is_smooth_and_its_truths_are_apart():
    """Two seeds agree, where those of `instruct` hardly do; tuning shares no query with test."""
    smooth, rough = (Truth.load(SUITE.target(t).truths["lds"]) for t in ("smooth", "instruct"))
    tuning = Truth.load(SUITE.target("smooth").truths["tuning"])
    assert seed_agreement(smooth) >= 0.7
    assert seed_agreement(rough) < 0.6
    assert smooth.plan["metasmoothness"]["value"] > 0.5
    assert set(smooth.query_ids).isdisjoint(tuning.query_ids)
    assert smooth.groups.fingerprint != tuning.groups.fingerprint
    assert smooth.plan["target"] == rough.plan["target"]  # one base, two recipes
    loo = Truth.load(SUITE.target("smooth").truths["loo"])
    assert loo.plan["order"] == "pool"
    assert loo.n_seeds == 1
    # Close to what the recipe of `instruct` reaches on the same groups.
    same = rough.losses[: len(smooth.groups)].mean()
    assert smooth.losses.mean() < same + 0.15


def test_queries_have_nothing_global_in_common():
    """Losses of different queries move independently: no single factor would explain an LDS."""
    values = Truth.load(SUITE.target("instruct").truths["lds"]).values
    c = np.corrcoef(values)
    assert abs(c[np.triu_indices(len(c), 1)].mean()) < 0.1


@pytest.mark.parametrize(
    ("label", "name", "split"), [("instruct", "tuning", "tuning"), ("neox", "lds", "test")]
)
def test_retraining_shows_what_the_truth_says(label, name, split, tmp_path):
    target = SUITE.target(label)
    found = verify_truth(
        target.truths[name], draw_plan(SUITE, target, name), target.target, SUITE.train,
        SUITE.queries(split), tmp_path, n_units=1, seed=3,
    )  # fmt: skip
    # Rounding differs between machine types and training amplifies it: far below another seed.
    assert found["mean_difference"] < 0.2 * found["between_seeds"]


@pytest.mark.parametrize("label", [t.label for t in MAIN if "airrep" in t.assets])
def test_a_shipped_encoder_is_airrep_as_published(label):
    """Text states and retraining labels only: no error of prediction, no teacher, no gradient."""
    target = SUITE.target(label)
    record = read_json(SUITE.assets_for(target)["airrep"] / "airrep.json")
    assert set(record["body"]["spans"]) <= {"all", "response"}
    assert (record["teacher"], record["earlier"]) == (None, None)
    assert record["labels"]["target"] == target.target.fingerprint
    assert record["recipe"]["pooling"] == SUITE.tuned[label]["airrep"]["pooling"] == "softmax-abs"
    assert record["cost"]["retrainings"] > 0
    assert record["best"]["lds"] > record["curve"][0]["lds"]  # training helped on what it held out


def test_an_altered_asset_is_one_clear_line(tmp_path):
    import shutil

    folder = tmp_path / "pocket"
    shutil.copytree(POCKET, folder)
    path = folder / "truth" / "instruct-lds.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    copy = load_suite(str(folder / "suite.toml"))
    with pytest.raises(DataError, match=r"instruct-lds.*damaged or was altered"):
        copy.verify(copy.target("instruct").truths["lds"])
