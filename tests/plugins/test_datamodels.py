"""Datamodels: regressions against closed forms, and what may be fitted on."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tdabench_datamodels.method import Datamodels
from tdabench_datamodels.regression import (
    LASSO,
    RIDGE,
    largest_penalty,
    lasso,
    lasso_path,
    ridge,
)

from tdabench.data.examples import Corpus, Example
from tdabench.errors import GuardError, MethodError, MissingAsset, UsageError
from tdabench.groups import Groups
from tdabench.method import Context
from tdabench.targets.target import Target
from tdabench.truth.store import Truth


def design(m: int = 60, n: int = 30, q: int = 4, noise: float = 0.3, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = (rng.random((m, n)) < 0.3).astype(float)
    w = np.where(rng.random((q, n)) < 0.3, rng.normal(size=(q, n)), 0.0)
    return x, x @ w.T + 2.0 + noise * rng.normal(size=(m, q)), w


# --------------------------------------------------------------------------- ridge


def test_ridge_is_the_normal_equations_at_the_penalty_of_least_leave_one_out_error() -> None:
    x, y, _ = design(m=25, n=12, q=2)
    got, explained = ridge(x, y)
    xc = x - x.mean(0)
    scale = np.linalg.eigvalsh(xc @ xc.T).clip(0).mean()

    def fit(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
        xc = x - x.mean(0)
        w = np.linalg.solve(xc.T @ xc + penalty * np.eye(x.shape[1]), xc.T @ (y - y.mean()))
        return w, y.mean() - x.mean(0) @ w

    for q in range(2):
        errors = []
        for penalty in RIDGE * scale:
            left = []
            for i in range(len(x)):
                keep = np.arange(len(x)) != i
                w, b = fit(x[keep], y[keep, q], penalty)
                left.append(y[i, q] - x[i] @ w - b)
            errors.append(np.mean(np.square(left)))
        best = int(np.argmin(errors))
        np.testing.assert_allclose(got[q], fit(x, y[:, q], RIDGE[best] * scale)[0], atol=1e-8)
        means = [y[i, q] - np.delete(y[:, q], i).mean() for i in range(len(x))]
        assert explained[q] == pytest.approx(1 - min(errors) / np.mean(np.square(means)), rel=1e-6)


def test_ridge_with_more_examples_than_retrainings_finds_the_effects() -> None:
    x, y, w = design(m=150, n=200, noise=0.1)
    got, explained = ridge(x, y)
    assert got.shape == (4, 200)
    assert np.isfinite(got).all()
    held = np.random.default_rng(9).random((80, 200)) < 0.3
    r = [np.corrcoef(held @ a, held @ b)[0, 1] for a, b in zip(got, w)]
    assert min(r) > 0.6
    assert (explained > 0.2).all()


def test_noise_is_shrunk_to_nothing() -> None:
    x, _, w = design()
    y = np.random.default_rng(5).normal(size=(60, 4))
    assert np.abs(ridge(x, y)[0]).max() < 0.2 * np.abs(w).max()
    assert np.abs(lasso(x, y)[0]).max() < 0.5
    assert not ridge(x, np.ones((60, 2)))[0].any()
    assert not lasso(x, np.ones((60, 2)))[0].any()


# --------------------------------------------------------------------------- lasso


def test_lasso_on_an_orthonormal_design_is_a_soft_threshold() -> None:
    rng = np.random.default_rng(0)
    x, _ = np.linalg.qr(rng.normal(size=(20, 6)) - 0.0)
    x, y = x * 20**0.5, rng.normal(size=(20, 3))  # x^T x / m = I
    top = np.abs(x.T @ y / 20).max(0)
    for share, w in zip(LASSO, lasso_path(x, y, top)):
        plain = x.T @ y / 20
        want = np.sign(plain) * np.maximum(np.abs(plain) - share * top, 0)
        np.testing.assert_allclose(w, want.T, atol=1e-5)


def test_lasso_path_meets_its_optimality_conditions() -> None:
    x, y, _ = design(m=40, n=50)
    xc, yc = x - x.mean(0), y - y.mean(0)
    top = largest_penalty(x, y)
    for share, w in zip(LASSO, lasso_path(xc, yc, top)):
        slope = xc.T @ (yc - xc @ w.T) / len(x)  # [n, q]
        on = w.T != 0
        assert np.abs(slope - np.sign(w.T) * share * top)[on].max(initial=0) < 0.02 * top.max()
        assert (np.abs(slope) - share * top).max() < 0.02 * top.max()


def test_lasso_finds_few_effects_better_than_ridge() -> None:
    rng = np.random.default_rng(3)
    x = (rng.random((120, 150)) < 0.3).astype(float)
    w = np.zeros((2, 150))
    w[0, :4], w[1, 7:10] = 1.0, -1.5
    y = x @ w.T + 0.2 * rng.normal(size=(120, 2))
    sparse, explained = lasso(x, y)
    assert np.abs(sparse - w).max() < 0.3
    assert np.square(sparse - w).sum() < np.square(ridge(x, y)[0] - w).sum()
    assert (explained > 0.8).all()


# --------------------------------------------------------------------------- the method


@pytest.fixture
def made(
    tiny_target: Target, tiny_corpus: Corpus, tiny_queries: Corpus, tmp_path: Path
) -> tuple[Context, Truth]:
    """A context whose asset holds 80 retrainings with additive outcomes."""
    rng = np.random.default_rng(0)
    groups = Groups.random(80, len(tiny_corpus), 0.3, rng)
    effects = rng.normal(size=(len(tiny_queries), len(tiny_corpus)))
    losses = -(groups.membership(np.float64) @ effects.T) + 0.1 * rng.normal(size=(80, 12)) + 3
    plan = {"name": "toy", "train": tiny_corpus.fingerprint, "seconds": 12.5}
    truth = Truth(losses[:, None].astype("f4"), groups, tuple(tiny_queries.ids), plan)
    truth.save(tmp_path / "asset.safetensors")
    assets = {"datamodels": tmp_path / "asset.safetensors"}
    return Context(target=tiny_target, scratch=tmp_path, assets=assets), truth


@pytest.mark.parametrize("estimator", ["ridge", "lasso"])
def test_ranks_other_groups(
    made: tuple[Context, Truth], tiny_corpus: Corpus, tiny_queries: Corpus, estimator: str
) -> None:
    context, _ = made
    index = Datamodels.from_params({"estimator": estimator}).build(context, tiny_corpus)
    rng = np.random.default_rng(0)
    Groups.random(80, 60, 0.3, rng)
    effects = rng.normal(size=(12, 60))
    other = Groups.random(30, 60, 0.3, np.random.default_rng(1))
    want = (other.membership(np.float64) @ effects.T).T
    got = index.score_groups(tiny_queries, other)
    assert np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(got, want)]) > 0.8
    np.testing.assert_array_equal(index.score(tiny_queries[::-1]), index.score(tiny_queries)[::-1])


def test_saves_and_loads(
    made: tuple[Context, Truth], tiny_corpus: Corpus, tiny_queries: Corpus, tmp_path: Path
) -> None:
    context, _ = made
    index = Datamodels().build(context, tiny_corpus)
    (tmp_path / "index").mkdir()
    index.save(tmp_path / "index")
    loaded = Datamodels().load(context, tmp_path / "index")
    np.testing.assert_array_equal(loaded.score(tiny_queries), index.score(tiny_queries))
    assert loaded.score([]).shape == (0, 60)


def test_retrainings_are_its_cost(made: tuple[Context, Truth]) -> None:
    assert Datamodels().prepare_cost(made[0]) == {"retrainings": 80.0, "seconds": 12.5}


def test_failed_retrainings_are_left_out(
    made: tuple[Context, Truth], tiny_corpus: Corpus, tiny_queries: Corpus, tmp_path: Path
) -> None:
    context, truth = made
    truth.losses[5, 0, 3] = np.nan
    truth.save(tmp_path / "asset.safetensors")
    assert np.isfinite(Datamodels().build(context, tiny_corpus).score(tiny_queries)).all()
    truth.losses[:] = np.nan
    truth.save(tmp_path / "asset.safetensors")
    with pytest.raises(MethodError, match="holds 0 finished retrainings"):
        Datamodels().build(context, tiny_corpus)


def test_other_queries_corpora_and_settings_are_refused(
    made: tuple[Context, Truth], tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    context, _ = made
    index = Datamodels().build(context, tiny_corpus)
    stranger = Example("stranger", "What is 1 plus 1?", "2")
    with pytest.raises(MethodError, match="evaluated on 1 of 13 queries, first 'stranger'"):
        index.score([*tiny_queries, stranger])
    with pytest.raises(GuardError, match="another training corpus"):
        Datamodels().build(context, tiny_corpus[:30])
    with pytest.raises(MissingAsset, match=r"no asset 'datamodels'.*: --asset datamodels=SOURCE"):
        Datamodels().build(dataclasses.replace(context, assets={}), tiny_corpus)
    with pytest.raises(UsageError, match="unknown estimator"):
        Datamodels(estimator="ols")  # type: ignore[arg-type]
