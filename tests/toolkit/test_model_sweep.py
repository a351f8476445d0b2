"""Twelve model types against their own forward, by the script that goes through all of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tdabench.errors import DataError
from tdabench.targets.batches import pad
from tdabench.targets.forward import last_states, logits_at, way_of
from tdabench.targets.target import example_losses
from tdabench.toolkit.gradients import GradientEngine

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "model_sweep.py"


@pytest.fixture(scope="module")
def sweep() -> Any:
    spec = importlib.util.spec_from_file_location("model_sweep", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["model_sweep"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("kind", "way", "share"),
    [
        ("qwen3", "short", 0.95),
        ("granite", "rows", 0.95),  # logits divided by 8
        ("cohere", "rows", 0.95),  # logits times a scale
        ("gemma2", "rows", 0.95),  # logits capped
        ("modernbert-decoder", "rows", 0.9),  # states transformed before the output matrix
        ("bert", "rows", 0.9),
        ("mixtral", "short", 0.95),  # experts in one tensor
        ("gpt_oss", "short", 0.95),  # the same with biases, transposed, with a clamp
        ("deepseek_v3", "short", 0.95),  # latent attention, shared and routed experts
        ("llama4_text", "rows", 0.2),  # a body that is not `base_model`; experts not covered
        ("mamba", "short", 0.8),  # a layer whose weight is used without calling it
        ("bart", "short", 0.9),  # cross-attention that nothing reaches
    ],
)
def test_losses_and_gradients_are_the_models_own(
    sweep: Any, kind: str, way: str, share: float
) -> None:
    found = sweep.measure(kind)
    assert found.outcome == "right", found
    assert found.way == way
    assert max(found.losses, found.gradients) < 1e-5
    assert not found.left > 1e-5
    assert not found.other_head > 1e-5
    assert found.half < 1e-3
    assert found.share > share


def test_a_model_that_sees_later_tokens_is_refused(sweep: Any) -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"BertLMHeadModel is not causal.*is_decoder"):
        way_of(BertLMHeadModel(config).eval())
    assert sweep.measure("xlnet").outcome == "refused"


def test_a_model_whose_predictions_depend_on_padding_is_refused(sweep: Any) -> None:
    found = sweep.measure("prophetnet")
    assert found.outcome == "refused"
    assert "depend on padding or on other examples" in found.reason


def test_a_scale_that_is_one_now_is_found_all_the_same(sweep: Any) -> None:
    """The way is measured once per configuration; another checkpoint may have another scale."""
    from transformers import LlamaForCausalLM

    class Scaled(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, **inputs: Any) -> Any:
            out = super().forward(**inputs)
            out.logits = out.logits * self.scale
            return out

    model = Scaled(sweep.tiny_config("llama")).eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    assert way_of(model) == "rows"
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert way_of(LlamaForCausalLM(sweep.tiny_config("llama")).eval()) == "short"


@pytest.mark.parametrize("kind", ["granite", "gemma2", "mamba"])
def test_bfloat16_and_double_precision(sweep: Any, kind: str) -> None:
    model = sweep.tiny_model(kind)
    tokens = sweep.sequences(model)
    batch = pad(tokens, np.arange(len(tokens)), 1)
    with torch.no_grad():
        single = example_losses(model, batch)
        torch.testing.assert_close(example_losses(model.double(), batch).float(), single)
        half = example_losses(model.bfloat16(), batch)
        torch.testing.assert_close(half, sweep.own_losses(model, batch), rtol=1e-3, atol=1e-3)


def test_the_last_state_of_a_model_without_a_body(sweep: Any) -> None:
    """What the output matrix is applied to, where `base_model` is the model itself."""
    model = sweep.tiny_model("llama4_text")
    ids = torch.arange(2, 20).view(2, 9)
    with torch.no_grad():
        states = last_states(model, ids, torch.ones_like(ids))
        own = model(input_ids=ids).logits
    torch.testing.assert_close(model.lm_head(states), own)
    places = torch.tensor([3, 17])
    with torch.no_grad():
        torch.testing.assert_close(logits_at(model, ids, None, places), own.flatten(0, 1)[places])


def test_experts_are_left_out_or_chosen_by_name(sweep: Any) -> None:
    model = sweep.tiny_model("mixtral")
    without = GradientEngine(model, experts=False)
    assert not any("experts" in name for name in without.dims)
    assert without.coverage.share < 0.5
    assert "left out: MixtralExperts" in without.coverage.warning
    some = GradientEngine(model, layers=r"experts\.down_proj")
    assert next(iter(some.dims)) == "model.layers.0.mlp.experts.down_proj.0"
    assert some.coverage.warning == ""  # asked for
    # An expert that no token of a batch reaches has a gradient of zero, and nothing else changes.
    tokens = sweep.sequences(model)
    alone = np.stack(
        [some.gradients(pad(tokens, np.array([i]), 1)).numpy()[0] for i in range(len(tokens))]
    )
    together = some.gradients(pad(tokens, np.arange(len(tokens)), 1)).numpy()
    np.testing.assert_allclose(alone, together, atol=1e-6)
    assert (alone == 0).any()
    assert model.config._experts_implementation != "tdabench"


def test_what_is_not_covered_is_recorded_and_told(
    sweep: Any, monkeypatch: pytest.MonkeyPatch, tiny_target: Any, tiny_corpus: Any
) -> None:
    from tdabench.run.contestant import gradient_coverage, target_notes
    from tdabench.toolkit import coverage
    from tdabench.toolkit.gradients import select_layers

    monkeypatch.setattr(coverage, "covered", coverage.deque())
    monkeypatch.setattr("tdabench.toolkit.gradients.covered", coverage.covered)
    assert gradient_coverage() == {}
    tiny_target.tokenize(tiny_corpus)
    assert target_notes(tiny_target, tiny_corpus) == []
    GradientEngine(sweep.tiny_model("qwen3"))
    assert gradient_coverage()["gradients"]["share"] > 0.95
    assert target_notes(tiny_target) == []
    select_layers(sweep.tiny_model("mixtral"))  # what other packages cover
    recorded = gradient_coverage()["gradients"]
    assert recorded["share"] < 0.5
    assert next(iter(recorded["left_out"])) == "MixtralExperts"
    assert recorded["chosen"] is False
    (note,) = target_notes(tiny_target)
    assert note.startswith("gradients cover ")
    assert "MixtralExperts" in note
