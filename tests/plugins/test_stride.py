"""STRIDE: subsets, operators and sparse recovery against constructed answers."""

from __future__ import annotations

import numpy as np
import pytest
from tdabench_datamodels.regression import sparse
from tdabench_datamodels.stride import STRIDE, _Frozen, measured, residual

from tdabench.data.examples import Corpus
from tdabench.errors import UsageError
from tdabench.method import Context
from tdabench.testing import parametrize_with_laws

SMALL = {"subsets": 12, "per_example": 3, "rank": 4, "epochs": 2, "batch": 4, "at_once": 2}


@parametrize_with_laws([STRIDE(**SMALL)])
def test_laws(method, law) -> None:
    law(method)


def test_each_example_is_in_as_many_subsets_as_asked(
    tiny_context: Context, tiny_corpus: Corpus
) -> None:
    member = STRIDE(subsets=9, per_example=4).membership(tiny_context, tiny_corpus)
    assert (member.sum(0) == 4).all()
    again = STRIDE(subsets=9, per_example=4).membership(tiny_context, tiny_corpus[::-1])
    np.testing.assert_array_equal(again[:, ::-1], member)


def test_few_effects_are_recovered_from_fewer_measurements_than_examples() -> None:
    """The lemma: a sparse w is found from K measurements by subsets, K well below n."""
    rng = np.random.default_rng(0)
    x = np.zeros((60, 200))
    for i in range(200):
        x[rng.choice(60, 6, replace=False), i] = 1
    w = np.zeros((3, 200))
    for row in w:
        row[rng.choice(200, 4, replace=False)] = rng.normal(size=4) + 2
    got = sparse(x, x @ w.T, 0.001)
    assert np.abs(got - w).max() < 0.1
    assert not sparse(x, x @ w.T, 1.0).any()  # the smallest penalty that leaves nothing


def test_the_lasso_meets_its_optimality_conditions() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.random((30, 50)) < 0.3, rng.normal(size=(30, 4))
    x = x.astype(float)
    penalty = 0.2 * np.abs(x.T @ y).max(0)
    w = sparse(x, y, 0.2)
    slope = x.T @ (y - x @ w.T)  # lambda sign(w) where w is not 0, within lambda elsewhere
    on = w.T != 0
    assert (np.abs(slope) <= penalty * (1 + 1e-3)).all()
    np.testing.assert_allclose(slope[on], (np.sign(w.T) * penalty)[on], rtol=1e-3)


def test_measurements_are_decreases_of_the_loss(tiny_context: Context, tiny_corpus: Corpus) -> None:
    import torch

    method = STRIDE(**SMALL)
    frozen = _Frozen(method, tiny_context, tiny_corpus)
    part = frozen.of(np.array([2, 0, 5]))
    fresh = frozen.read(part.batch)  # what was kept is what the model computes
    torch.testing.assert_close(part.states, fresh.states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.logits, fresh.logits, rtol=1e-4, atol=1e-4)
    basis = torch.randn(frozen.width, 4)
    steering = 0.1 * torch.randn(2, 4, frozen.vocabulary)
    steering[1] = 0
    y = measured(part, basis, steering)
    steered = part.logits + part.states @ basis @ steering[0]
    ce = torch.nn.functional.cross_entropy
    want = part.batch.means(
        ce(part.logits, part.batch.gold, reduction="none")
        - ce(steered, part.batch.gold, reduction="none")
    )
    torch.testing.assert_close(y[0], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[1], torch.zeros(3), atol=1e-5, rtol=0)


def test_operators_lower_the_loss_of_their_own_subset_most(
    tiny_context: Context, tiny_corpus: Corpus
) -> None:
    method = STRIDE(subsets=6, per_example=1, rank=8, epochs=40, batch=8, at_once=6, lr=0.05)
    index = method.build(tiny_context, tiny_corpus)
    y = index.measurements(tiny_corpus)  # [example, subset]
    inside = index.arrays["member"].T
    assert y[inside].mean() > 0.1
    assert y[inside].mean() > y[~inside].mean() + 0.1
    steady = STRIDE(**{**method.params, "stability": 20.0}).build(tiny_context, tiny_corpus)
    away = steady.measurements(tiny_corpus)[~inside]
    assert np.abs(away).mean() < np.abs(y[~inside]).mean() / 2


def test_the_linearity_loss_is_what_a_ridge_regression_leaves() -> None:
    import torch

    rng = np.random.default_rng(2)
    n = rng.normal(size=(20, 5))
    y = n @ rng.normal(size=5)  # additive: nothing is left but for the ridge
    assert float(residual(torch.from_numpy(y), n, 1e-9)) < 1e-12
    z = rng.normal(size=20)
    left = z - n @ np.linalg.solve(n.T @ n + np.eye(5), n.T @ z)
    assert float(residual(torch.from_numpy(z), n)) == pytest.approx(np.square(left).mean())


def test_nothing_is_retrained_and_mistakes_are_named(tiny_context: Context) -> None:
    assert STRIDE().prepare_cost(tiny_context) == {"retrainings": 0.0}
    for params in ({"subsets": 0}, {"subsets": 2, "per_example": 3}, {"depth": 0.0},
                   {"penalty": 0.0}, {"stability": -1.0}, {"lr": 0.0}):  # fmt: skip
        with pytest.raises(UsageError):
            STRIDE(**params)  # type: ignore[arg-type]
