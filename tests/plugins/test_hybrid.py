"""The hybrid: its posterior against Gaussian conditioning, and its retrainings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tdabench_datamodels.hybrid import Hybrid
from tdabench_datamodels.regression import Prior, posterior

from tdabench.api import finetune, named_seed, registry
from tdabench.data.examples import Corpus, Example
from tdabench.errors import GuardError, MethodError, UsageError
from tdabench.groups import Groups
from tdabench.method import Context
from tdabench.stats import spearman_rows
from tdabench.targets.target import Target
from tdabench.testing import parametrize_with_laws
from tdabench.truth.store import Truth


@parametrize_with_laws(
    [Hybrid(base="hidden", retrainings=6), Hybrid(base="tfidf", retrainings=3, kernel="none")]
)
def test_laws(method, law) -> None:
    law(method)


# --------------------------------------------------------------------------- the posterior


def world(m: int = 12, n: int = 20, q: int = 3, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = (rng.random((m, n)) < 0.4).astype(np.uint8)
    scores, y = rng.normal(size=(q, n)), rng.normal(size=(q, m))
    return x, y, scores, rng.normal(size=(n, 4))


@pytest.mark.parametrize("spread", [0.0, 0.15])
def test_posterior_is_conditioning_of_the_joint_normal_distribution(spread: float) -> None:
    x, y, scores, z = world()
    prior = Prior(agreement=0.3, spread=spread, noise=0.5, floor=0.2)
    got = posterior(x, y, scores, z, prior)
    m = len(x)
    centre = np.eye(m) - 1 / m
    for q in range(3):
        s = scores[q] / np.sqrt(np.mean(scores[q] ** 2))
        d = np.diag(np.sqrt(0.2 + s**2))
        xc = centre @ x
        size, sd = (xc @ s).std(), y[q].std()
        shape = d @ (z @ z.T + np.eye(20)) @ d
        rest = (1 - 0.5 - 0.3**2) / (np.trace(xc @ shape @ xc.T) / m)
        # The prior of w in units of sd, [n], and y = xc w + e.
        mean = 0.3 / size * s
        cov = rest * shape + spread**2 / size**2 * np.outer(s, s)
        gain = cov @ xc.T @ np.linalg.inv(xc @ cov @ xc.T + 0.5 * np.eye(m))
        want = mean + gain @ ((y[q] - y[q].mean()) / sd - xc @ mean)
        np.testing.assert_allclose(got[q], sd * want, rtol=1e-8, atol=1e-10)


def test_without_kernel_and_information_the_prior_mean_remains() -> None:
    x, y, scores, _ = world()
    prior = Prior(agreement=0.3, spread=0.0, noise=1 - 0.3**2 - 1e-9)  # nothing left to learn
    got = posterior(x, y, scores, np.zeros((20, 0)), prior)
    for a, b in zip(got, scores):
        assert np.corrcoef(a, b)[0, 1] == pytest.approx(1)


def test_outcomes_and_scores_that_are_constant() -> None:
    x, y, scores, z = world()
    y[0] = 2.5
    scores[1], scores[2] = 0.0, 3.0
    got = posterior(x, y, scores, z, Prior())
    assert np.isfinite(got).all()
    assert not got[0].any()
    # A score of 0 for every example is a prior without a direction, as is a negligible one.
    plain = posterior(x, y, scores, z, Prior(floor=1.0))[1]
    np.testing.assert_allclose(got[1], plain)


def test_units_of_scores_and_outcomes() -> None:
    x, y, scores, z = world()
    got = posterior(x, y, scores, z, Prior())
    np.testing.assert_allclose(posterior(x, y, 7 * scores, z, Prior()), got, rtol=1e-6)
    np.testing.assert_allclose(posterior(x, 3 * y + 5, scores, z, Prior()), 3 * got, rtol=1e-6)


def test_few_retrainings_correct_the_sizes_that_a_prior_gives() -> None:
    """Effects of random size where the prior is large: it knows where, and only partly how much."""
    rng = np.random.default_rng(1)
    n, m, q = 300, 60, 8
    scores = rng.normal(size=(q, n)) * (rng.random((q, n)) < 0.1) + 0.02 * rng.normal(size=(q, n))
    effects = scores * rng.normal(0.6, 1.0, size=(q, n))
    x, held = (rng.random((m, n)) < 0.25), rng.random((200, n)) < 0.25
    y = effects @ x.T + 0.3 * rng.normal(size=(q, m))
    got = posterior(x, y, scores, np.zeros((n, 0)), Prior())
    want = effects @ held.T
    base = spearman_rows(scores @ held.T, want).mean()
    plain = posterior(x, y, np.ones_like(scores), np.zeros((n, 0)), Prior())
    hybrid = spearman_rows(got @ held.T, want).mean()
    assert hybrid > base + 0.1
    assert hybrid > spearman_rows(plain @ held.T, want).mean() + 0.1


# --------------------------------------------------------------------------- the method


def context_of(target: Target, path: Path, fraction: float = 0.25) -> Context:
    return Context(target=dataclasses.replace(target, fraction=fraction), scratch=path)


def test_losses_are_those_of_models_trained_on_its_groups(
    tiny_target: Target, tiny_corpus: Corpus, tiny_queries: Corpus, tmp_path: Path
) -> None:
    context = context_of(tiny_target, tmp_path)
    index = Hybrid(base="tfidf", retrainings=2).build(context, tiny_corpus)
    member = index.arrays["member"]
    assert member.sum(1).tolist() == [15, 15]
    target = context.target
    for g in range(2):
        part = [e for e, there in zip(tiny_corpus, member[g]) if there]
        part.sort(key=lambda e: e.id)
        model = finetune(
            target.fresh_model("base"),
            target.tokenize(part),
            target.recipe,
            named_seed(0, f"hybrid/{g}"),
            target.pad_id,
        )
        want = target.losses(model, target.tokenize(tiny_queries))
        np.testing.assert_allclose(index.losses(tiny_queries)[g], want, atol=5e-3)  # float16


def test_no_retrainings_give_the_scores_of_the_base(
    tiny_target: Target, tiny_corpus: Corpus, tiny_queries: Corpus, tmp_path: Path
) -> None:
    context = context_of(tiny_target, tmp_path)
    base = registry().method("tfidf").cls().build(context, tiny_corpus)
    index = Hybrid(base="tfidf", retrainings=0).build(context, tiny_corpus)
    np.testing.assert_array_equal(index.score(tiny_queries), base.score(tiny_queries))


@pytest.fixture
def banked(
    tiny_target: Target, tiny_corpus: Corpus, tiny_queries: Corpus, tmp_path: Path
) -> Context:
    """A context whose asset `bank` holds 40 retrainings."""
    rng = np.random.default_rng(0)
    groups = Groups.random(40, len(tiny_corpus), 0.3, rng)
    losses = rng.normal(size=(40, 1, 12)).astype("f4")
    plan = {"name": "toy", "train": tiny_corpus.fingerprint, "seconds": 80.0}
    Truth(losses, groups, tuple(tiny_queries.ids), plan).save(tmp_path / "bank.safetensors")
    assets = {"bank": tmp_path / "bank.safetensors"}
    return Context(target=tiny_target, scratch=tmp_path, assets=assets)


def test_retrainings_of_an_asset(
    banked: Context, tiny_corpus: Corpus, tiny_queries: Corpus, tmp_path: Path
) -> None:
    method = Hybrid(base="tfidf", retrainings=30, asset="bank")
    index = method.build(banked, tiny_corpus)
    truth = Truth.load(banked.asset("bank"))
    base = index.base.score(tiny_queries)
    want = posterior(
        truth.groups.membership().toarray()[:30],
        truth.values[:, :30],
        base,
        index.arrays["kernel"],
        method.prior,
    )
    np.testing.assert_allclose(index.score(tiny_queries), want, rtol=1e-4, atol=1e-6)
    assert method.prepare_cost(banked) == {"retrainings": 30.0, "seconds": 60.0}
    (tmp_path / "index").mkdir()
    index.save(tmp_path / "index")
    again = method.load(banked, tmp_path / "index")
    np.testing.assert_array_equal(again.score(tiny_queries), index.score(tiny_queries))
    with pytest.raises(MethodError, match="no losses for 1 of 1 queries, first 'new'"):
        index.score([Example("new", "a", "b")])
    with pytest.raises(MethodError, match="holds 40 retrainings, not 96"):
        Hybrid(base="tfidf", asset="bank").build(banked, tiny_corpus)
    with pytest.raises(GuardError, match="another training corpus"):
        method.build(banked, tiny_corpus[:30])


def test_failed_retrainings_are_left_out(
    banked: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    method = Hybrid(base="tfidf", retrainings=10, asset="bank")
    index = method.build(banked, tiny_corpus)
    index.arrays["losses"][2:] = np.nan
    assert np.isfinite(index.score(tiny_queries)).all()
    index.arrays["losses"][:] = np.nan
    with pytest.raises(MethodError, match="0 of 10 retrainings have finite losses"):
        index.score(tiny_queries)


def test_mistakes_are_named(tiny_context: Context, tiny_corpus: Corpus) -> None:
    for params, words in (
        ({"retrainings": -1}, "must not be negative"),
        ({"kernel": "rbf"}, "kernel"),
        ({"noise": 1.0}, r"noise is in \(0, 1\)"),
        ({"agreement": 1.5}, "is a correlation"),
    ):
        with pytest.raises(UsageError, match=words):
            Hybrid.from_params(params)
    for given, words in (
        ({"base": "hybrid"}, "the base must be another method"),
        ({"base": "ekfak"}, "ekfak"),
        ({"settings": "damping"}, "'damping' does not have the form NAME=VALUE"),
        ({"settings": "dampening=3"}, "dampening"),
    ):
        with pytest.raises(UsageError, match=words):
            Hybrid.from_params(given).build(tiny_context, tiny_corpus)
    assert Hybrid().prepare_cost(tiny_context) == {"retrainings": 96.0}
