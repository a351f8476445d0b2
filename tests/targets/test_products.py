"""Float32 products by the faster of torch's libraries: exact, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tdabench.targets import products
from tdabench.targets.batches import pad
from tdabench.targets.products import PLAIN_ATTENTION, fast_products, onednn_is_faster
from tdabench.targets.target import example_losses
from tdabench.testing.tiny import tiny_world


def state(model: torch.nn.Module) -> tuple[str, str]:
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    return getattr(setting, "fp32_precision", ""), model.config._attn_implementation  # type: ignore[union-attr]


@pytest.mark.parametrize(("m", "n", "k"), [(3, 2, 5), (64, 48, 128), (141, 100, 4096), (1, 300, 7)])
def test_products_are_as_exact_as_float32_is(m: int, n: int, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, k, generator=generator) for rows in (m, n))
    exact = a.double() @ b.double().T
    with fast_products():
        found = a @ b.T
        added = torch.ones(m, n).addmm_(a, b.T) - 1
        batched = torch.bmm(a[None], b.T[None])[0]
    # Rounding errors of float32 relative to the length of the factors; bfloat16 has 1e-3.
    scale = a.double().norm(dim=1)[:, None] * b.double().norm(dim=1)
    for value in (found, added, batched):
        assert float(((value - exact).abs() / scale).max()) < 2e-6


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_losses_and_their_gradients_are_the_same(architecture: str) -> None:
    world = tiny_world(architecture)
    model = world.target.fresh_model("base").requires_grad_(True)
    tokens = world.target.tokenize(world.train)
    batch = pad(tokens, np.arange(12), world.target.pad_id)
    before = state(model)
    found = []
    for context in (fast_products(model, batch.input_ids.shape[1]), fast_products(), None):
        if context is None:
            losses = example_losses(model, batch)
            gradients = torch.autograd.grad(losses.sum(), list(model.parameters()))
        else:
            with context:
                losses = example_losses(model, batch)
                gradients = torch.autograd.grad(losses.sum(), list(model.parameters()))
        found.append(torch.cat([losses, *(g.flatten() for g in gradients)]).detach())
    assert state(model) == before
    for one in found[:2]:
        torch.testing.assert_close(one, found[2], rtol=1e-4, atol=1e-5)


def test_settings_return_after_an_error_and_within_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"):
        pytest.skip("this torch has no such setting")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    model = tiny_world().target.fresh_model("base")
    before = state(model)
    assert before[1] == "sdpa"

    def broken() -> None:
        with fast_products(model, 5):
            with fast_products(), fast_products(model, 5):
                assert state(model) == ("bf16", "eager")
            assert state(model) == ("bf16", "eager")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        broken()
    assert state(model) == before
    with fast_products(model, PLAIN_ATTENTION + 1):
        assert state(model) == ("bf16", "sdpa")
    model.config.attn_logit_softcapping = 30.0  # which only plain products apply
    with fast_products(model, 5):
        assert state(model)[1] == "sdpa"


def test_a_processor_that_rounds_factors_keeps_the_exact_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On Intel's processors and matrix units the permission would be used, or brings nothing."""
    model = tiny_world().target.fresh_model("base")
    onednn_is_faster.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(products, "_made_by_intel", lambda: True)
        assert not onednn_is_faster()
        before = state(model)
        with fast_products(model, 5):
            assert state(model) == before
    onednn_is_faster.cache_clear()


def test_looking_for_a_library_draws_no_random_number() -> None:
    """It happens within a method's build, where the harness refuses a use of global streams."""
    before = torch.random.get_rng_state()
    onednn_is_faster.cache_clear()
    products._linear.cache_clear()
    products.product(torch.ones(2, 3), torch.ones(3, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
