"""What counts as leaving a model changed."""

from __future__ import annotations

import torch

from tdabench.run.meter import model_state


def test_hooks_of_transformers_are_not_the_methods(tiny_target):
    model = tiny_target.fresh_model("base")
    before = model_state(model)
    model(input_ids=torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert model_state(model) == before
    model.register_forward_hook(lambda module, args, output: None)
    assert model_state(model)["hooks"] == before["hooks"] + 1
