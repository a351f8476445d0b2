"""Stacked training: the same losses as one at a time, up to rounding, for any architecture."""

import numpy as np
import pytest

from tdabench.errors import UsageError
from tdabench.groups import Groups
from tdabench.targets import Recipe
from tdabench.truth import Stacked, Truth, TruthPlan, build, collect, survey
from tdabench.truth.build import build_units
from tdabench.truth.engines import UnitTrainer
from tdabench.truth.stacked import losses

KW = {"lr": 3e-3, "epochs": 1, "batch_size": 8}


def plan_of(parts, **recipe):
    groups = Groups.of([range(10), range(7, 17), range(30, 45), range(20, 30)], 60)
    return TruthPlan.of("stack", *parts, groups=groups, n_seeds=1, recipe=Recipe(**KW | recipe))


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2", "gpt_neox"])
def test_a_stack_gives_the_losses_of_its_units_alone(
    make_target, tiny_corpus, tiny_queries, architecture, tmp_path
):
    parts = make_target(architecture), tiny_corpus, tiny_queries
    plan = plan_of(parts, weight_decay=0.1, micro_batch=5)
    assert build(plan, *parts, tmp_path / "alone") == []
    assert build(plan, *parts, tmp_path / "stack", engine=Stacked(3)) == []
    alone, stacked = (collect(plan, tmp_path / n) for n in ("alone", "stack"))
    np.testing.assert_allclose(stacked.losses, alone.losses, atol=2e-4)
    moved = np.abs(alone.losses - parts[0].losses(
        parts[0].model(), parts[0].tokenize(tiny_queries)
    )).mean()  # fmt: skip
    assert moved > 100 * np.abs(stacked.losses - alone.losses).mean()

    # What was rounded otherwise is said, and is no other plan's truth for that.
    stacked.save(tmp_path / "t.safetensors")
    again = Truth.load(tmp_path / "t.safetensors")
    assert again.plan["made_by"] == ["stack of 1", "stack of 2"]
    assert "made_by" not in alone.plan
    assert again.is_of(plan)
    assert not again.is_of(plan_of(parts))


def test_sgd_and_scratch_in_a_stack(parts):
    recipe = Recipe(**KW, optimizer="sgd", momentum=0.5, clip=0.0)
    plan = TruthPlan.draw(
        "s", *parts, n_groups=2, fraction=0.25, n_seeds=1, recipe=recipe, start="scratch"
    )
    trainer = UnitTrainer.of(plan, *parts)
    for unit, row in zip(plan.units(), losses(trainer, plan.units())):
        np.testing.assert_allclose(row, trainer.losses(unit), atol=2e-4)


def test_one_diverging_unit_leaves_the_others_alone(parts, tmp_path, monkeypatch):
    plan = plan_of(parts)
    whole = UnitTrainer.of(plan, *parts)
    expected = losses(whole, plan.units()[:2])
    import tdabench.truth.stacked as stacked

    real = stacked._padded

    def poisoned(chosen, pad_id, device):
        ids, at, gold, weight = real(chosen, pad_id, device)
        weight[1] = float("nan")
        return ids, at, gold, weight

    monkeypatch.setattr(stacked, "_padded", poisoned)
    found = losses(whole, plan.units()[:2])
    assert "loss became nan at step 0" in found[1]
    np.testing.assert_array_equal(found[0], expected[0])
    pair = plan.units()[:2]
    failed = build_units(plan, *parts, tmp_path, pair, engine=Stacked(2), retries=0)
    assert failed == pair[1:]
    assert "nan at step 0" in next(iter(survey(plan, tmp_path).failed.values()))


@pytest.mark.parametrize(
    "recipe", [{"lora_rank": 2}, {"precision": "bfloat16"}, {"checkpointing": True}, {"keep": (1,)}]
)
def test_recipes_that_a_stack_does_not_follow_are_refused(parts, tmp_path, recipe):
    with pytest.raises(UsageError, match="stacked training does not support"):
        build(plan_of(parts, **recipe), *parts, tmp_path, engine=Stacked(2))
