"""Smoothness of a recipe: closed forms, a smooth and a rough run, and the commands."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from tdabench.errors import UsageError
from tdabench.groups import Groups
from tdabench.targets import Recipe, finetune
from tdabench.truth import Truth, metasmoothness, seed_agreement, try_recipe
from tdabench.truth.smoothness import agreement


def test_agreement_by_hand():
    first = np.array([3.0, -1.0, 0.5])
    assert agreement(first, first) == 1
    assert agreement(first, -first) == -1
    assert agreement(first, np.array([1.0, 5.0, 0.0])) == pytest.approx((3 - 1) / 4.5)
    assert agreement(np.zeros(3), first) == 0


def test_seed_agreement_is_the_mean_over_queries_and_pairs():
    losses = np.random.default_rng(0).normal(size=(7, 3, 4)).astype(np.float32)
    truth = Truth(losses, Groups.random(7, 20, 0.5, np.random.default_rng(1)), tuple("abcd"))
    want = [
        spearmanr(losses[:, i, q], losses[:, j, q])[0]
        for i, j in ((0, 1), (0, 2), (1, 2))
        for q in range(4)
    ]
    assert seed_agreement(truth) == pytest.approx(np.mean(want))
    assert seed_agreement(Truth(losses[:, :1], truth.groups, truth.query_ids)) is None


def test_weights_multiply_losses_and_zero_leaves_out(tiny_target, tiny_corpus):
    """An example of weight 2 is one that stands in the batch twice; ones change no bit."""
    recipe = Recipe(lr=3e-3, epochs=1, batch_size=4, clip=0.0, optimizer="sgd", schedule="constant")
    tokens = tiny_target.tokenize(tiny_corpus[:4])

    def trained(weights):
        model = finetune(
            tiny_target.fresh_model(), tokens, recipe, 0, tiny_target.pad_id, weights=weights
        )
        return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])

    plain, ones = trained(None), trained(np.ones(4))
    np.testing.assert_array_equal(plain, ones)
    start = np.concatenate([p.numpy().ravel() for p in tiny_target.fresh_model().parameters()])
    parts = [trained(np.eye(4)[i]) - start for i in range(4)]  # a step of SGD is linear in weights
    want = start + 2 * parts[0] + 0.5 * parts[2]
    np.testing.assert_allclose(trained(np.array([2, 0, 0.5, 0])), want, atol=2e-6)


def test_a_gentle_run_is_smooth_and_a_wild_one_is_not(tiny_target, tiny_corpus, tiny_queries):
    gentle = Recipe(lr=1e-3, epochs=2, batch_size=10, optimizer="sgd", clip=0.0)
    wild = Recipe(lr=3e-1, epochs=6, batch_size=2)
    found = [
        metasmoothness(tiny_target, tiny_corpus, tiny_queries, recipe=r, fraction=0.5, directions=2)
        for r in (gentle, wild)
    ]
    assert found[0].value > 0.9
    assert found[1].value < found[0].value - 0.2
    assert len(found[0].values) == 2
    assert found[0].error >= 0
    for wrong in ({"directions": 0}, {"step": 0.6}, {"step": 0.0}):
        with pytest.raises(UsageError, match="metasmoothness"):
            metasmoothness(tiny_target, tiny_corpus, tiny_queries, **wrong)


def test_a_recipe_is_tried_and_one_that_diverges_says_so(tiny_target, tiny_corpus, tiny_queries):
    good = try_recipe(
        tiny_target, tiny_corpus, tiny_queries, Recipe(lr=1e-3, epochs=1, batch_size=5), groups=3
    )
    assert good.error == ""
    assert np.isfinite([good.loss, good.agreement, good.smoothness, good.seconds]).all()
    wild = Recipe(lr=1e30, clip=0.0, epochs=3, batch_size=5)
    bad = try_recipe(tiny_target, tiny_corpus, tiny_queries, wild, groups=2, directions=0)
    assert "lower lr" in bad.error
    large = try_recipe(tiny_target, tiny_corpus, tiny_queries, Recipe(batch_size=40), groups=2)
    assert "smaller than a batch" in large.error
