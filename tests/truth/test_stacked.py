"""Stacked training: the same losses as one at a time, up to rounding, for any architecture."""

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("kind", ["granite", "gemma2", "mixtral"])
def test_a_stack_uses_the_models_own_logits(kind):
    """Models that scale or cap logits after the output matrix, and one with experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tdabench.targets.batches import Tokens, pad
    from tdabench.targets.target import token_losses
    from tdabench.truth.stacked import _Stack

    config = AutoConfig.for_model(
        kind, vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, intermediate_size=48, bos_token_id=0, eos_token_id=0,
        pad_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    config.logits_scaling, config.final_logit_softcapping = 8.0, 0.5
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
        models[-1].config.use_cache = False
    tokens = [Tokens(np.arange(3, 3 + n), start) for n, start in ((9, 4), (5, 2))]
    batch = pad(tokens, np.arange(2), 1)
    want = [token_losses(m, batch).detach() for m in models]
    stack = _Stack(models, 2, "cpu")
    at, gold = (v.expand(2, -1) for v in (batch.places, batch.gold))
    got = stack.token_losses(batch.input_ids, at, gold)
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=1e-5)


def test_a_model_that_cannot_be_stacked_is_refused():
    """Its forward pass branches on its weights, for which no batching rule exists."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tdabench.truth.stacked import _Stack

    class Branching(LlamaForCausalLM):
        def forward(self, **inputs):
            if self.lm_head.weight.sum() > 1e9:
                raise ValueError
            return super().forward(**inputs)

        base_model = property(lambda self: self)  # its own forward is the only way

    config = LlamaConfig(
        vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=48,
    )  # fmt: skip
    with pytest.raises(UsageError, match="stacked training does not support Branching"):
        _Stack([Branching(config).eval()], 2, "cpu")
