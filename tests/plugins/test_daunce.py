"""Daunce: the covariance of perturbed models against its closed form after one step."""

from __future__ import annotations

import numpy as np
import pytest
from tdabench_influence.daunce import Daunce

from tdabench.data.examples import Corpus
from tdabench.errors import MethodError, UsageError
from tdabench.method import Context
from tdabench.targets.target import example_losses
from tdabench.testing import parametrize_with_laws


@parametrize_with_laws([Daunce(models=6, steps=3, batch=4)])
def test_laws(method, law) -> None:
    law(method)


def gradients(context: Context, corpus: Corpus) -> np.ndarray:
    import torch

    model = context.target.fresh_model("base").requires_grad_(True)
    out = []
    for tokens in context.target.tokenize(corpus):
        (batch,) = context.target.batches([tokens])
        grads = torch.autograd.grad(example_losses(model, batch).sum(), list(model.parameters()))
        out.append(torch.cat([g.flatten() for g in grads]).double())
    return torch.stack(out).numpy()


def test_a_step_moves_against_the_perturbed_gradient(
    tiny_context: Context, tiny_corpus: Corpus
) -> None:
    train = tiny_corpus[:8]
    method = Daunce(models=3, steps=1, lr=0.5, batch=8, share=1.0)
    moved = method.models_near(tiny_context, train)
    model = tiny_context.target.model("base")
    start = np.concatenate([p.numpy().ravel() for p in model.parameters()])
    g = gradients(tiny_context, train)
    for k, theta in enumerate(moved):
        # theta - theta_0 = -lr mean_i (1 - 2 xi_i) g_i: solve for xi, which must be in [0, 1].
        weights, *_ = np.linalg.lstsq(g.T, (start - theta.astype("f8")) / 0.5 * 8, rcond=None)
        assert np.abs(weights @ g - (start - theta) * 16).max() < 1e-3, k
        assert (np.abs(weights) < 1.001).all()
    assert len({row.tobytes() for row in moved}) == 3


def test_after_one_step_the_covariance_is_an_inner_product_through_the_fisher(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    train, queries = tiny_corpus[:12], tiny_queries[:6]
    method = Daunce(models=200, steps=1, lr=0.02, batch=12, share=1.0)
    got = method.build(tiny_context, train).score(queries)
    g, q = gradients(tiny_context, train), gradients(tiny_context, queries)
    # Var(1 - 2 xi) = 1/3, and a step is -lr mean_i (1 - 2 xi_i) g_i over 12 examples.
    want = 0.02**2 / 3 / 12**2 * (q @ g.T) @ (g @ g.T)
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.95
    assert got.sum() / want.sum() == pytest.approx(1, abs=0.3)


def test_without_perturbation_nothing_moves(
    tiny_context: Context, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """xi = 1/2 for every example: the gradients cancel on every batch, as at theta_0."""

    class Half(np.random.Generator):
        def random(self, size=None, *rest):
            return np.full(size, 0.5)

    method = Daunce(models=2, steps=3, batch=4)
    real = Context.rng

    def rng(self, name):
        return (
            Half(real(self, name).bit_generator) if name.startswith("daunce/") else real(self, name)
        )

    monkeypatch.setattr(Context, "rng", rng)
    moved = method.models_near(tiny_context, tiny_corpus)
    model = tiny_context.target.model("base")
    start = np.concatenate([p.numpy().ravel() for p in model.parameters()])
    np.testing.assert_allclose(moved, np.broadcast_to(start, moved.shape), atol=1e-6)


def test_retrainings_are_counted_and_mistakes_named(
    tiny_context: Context, tiny_corpus: Corpus
) -> None:
    assert Daunce(models=7).prepare_cost(tiny_context) == {"retrainings": 7.0}
    for params in ({"models": 1}, {"share": 0.0}, {"lr": 0.0}, {"steps": 0}):
        with pytest.raises(UsageError):
            Daunce(**params)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="diverged"):
        Daunce(models=2, lr=1e30).build(tiny_context, tiny_corpus[:4])
