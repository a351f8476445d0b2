"""BIF: Langevin sampling against its stationary law, covariances against gradients."""

from __future__ import annotations

import numpy as np
import pytest
from tdabench_influence.bif import BIF
from tdabench_influence.covariance import CovarianceIndex

from tdabench.data.examples import Corpus
from tdabench.errors import MethodError, UsageError
from tdabench.method import Context
from tdabench.targets.target import example_losses
from tdabench.testing import parametrize_with_laws


@parametrize_with_laws([BIF(draws=12, chains=2, every=2, burn_in=8)])
def test_laws(method, law) -> None:
    law(method)


def test_without_a_loss_the_samples_are_normal_around_the_checkpoint(
    tiny_context: Context, tiny_corpus: Corpus
) -> None:
    method = BIF(beta=0.0, draws=4, chains=6, every=10, burn_in=60, localisation=1e4, step=2e-5)
    samples = method.models_near(tiny_context, tiny_corpus).astype("f8")
    model = tiny_context.target.model("base")
    start = np.concatenate([p.numpy().ravel() for p in model.parameters()])
    apart = samples - start
    # The recursion d <- (1 - s l / 2) d + sqrt(s) z is stationary at this variance.
    want = 2e-5 / (1 - (1 - 2e-5 * 1e4 / 2) ** 2)
    assert apart.var() == pytest.approx(want, rel=0.05)
    assert abs(apart.mean()) < 4 * want**0.5 / apart.size**0.5 + 1e-4
    between = np.corrcoef(apart)[~np.eye(24, dtype=bool)]
    # Samples of a chain are 10 steps apart: they share (1 - s l / 2)^10 of their deviation.
    assert np.abs(between).max() < 0.9**10 + 0.05


def test_near_the_checkpoint_the_covariance_is_the_inner_product_of_gradients(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    import torch

    train, queries = tiny_corpus[:10], tiny_queries[:6]
    method = BIF(beta=0.0, draws=150, chains=2, every=8, burn_in=30, localisation=1e6, step=4e-7)
    got = method.build(tiny_context, train).score(queries)
    target = tiny_context.target
    model = target.fresh_model("base").requires_grad_(True)

    def gradients(corpus: Corpus) -> torch.Tensor:
        out = []
        for tokens in target.tokenize(corpus):
            (batch,) = target.batches([tokens])
            grads = torch.autograd.grad(
                example_losses(model, batch).sum(), list(model.parameters())
            )
            out.append(torch.cat([g.flatten() for g in grads]))
        return torch.stack(out)

    want = (gradients(queries) @ gradients(train).T).numpy() / 1e6
    assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > 0.9
    assert got.sum() / want.sum() == pytest.approx(1, abs=0.4)


def test_the_loss_pulls_samples_to_where_it_is_low(
    tiny_context: Context, tiny_corpus: Corpus
) -> None:
    settings = {"draws": 2, "chains": 2, "every": 10, "burn_in": 60, "localisation": 1e3}
    free = BIF(beta=0.0, step=1e-4, **settings).build(tiny_context, tiny_corpus)
    pulled = BIF(beta=1e3, step=1e-4, **settings).build(tiny_context, tiny_corpus)
    assert pulled.losses.mean() < free.losses.mean() - 0.1


def test_covariances_are_within_chains(tiny_context: Context) -> None:
    rng = np.random.default_rng(0)
    losses = rng.normal(size=(6, 4)) + np.repeat([[0.0], [50.0]], 3, axis=0)  # chains of 3
    index = CovarianceIndex(BIF(chains=2), tiny_context, np.zeros((6, 1)), losses)
    want = np.mean([np.cov(losses[:3].T), np.cov(losses[3:].T)], axis=0)
    a = index._centred(losses)
    np.testing.assert_allclose(a.T @ a / 4, want)
    single = CovarianceIndex(BIF(chains=6), tiny_context, np.zeros((6, 1)), losses)
    np.testing.assert_allclose(single._centred(losses), losses - losses.mean(0))


def test_mistakes_are_named(tiny_context: Context, tiny_corpus: Corpus) -> None:
    for params in ({"draws": 0}, {"draws": 1, "chains": 1}, {"step": 0.0}, {"beta": -1.0}):
        with pytest.raises(UsageError):
            BIF(**params)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match="diverged"):
        BIF(step=1.0, localisation=1e5, draws=2, chains=1).build(tiny_context, tiny_corpus[:4])
