"""Gradient methods against closed forms on explicit gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tdabench_gradients import tdabench_methods
from tdabench_gradients.base import GradientMethod, curvature_blocks, damped_cholesky, whiten
from tdabench_gradients.graddot import GradCos, GradDot
from tdabench_gradients.grass import FactGraSS
from tdabench_gradients.less import LESS
from tdabench_gradients.logra import LoGra, second_moments

from tdabench.data.examples import Corpus
from tdabench.errors import MethodError, UsageError
from tdabench.method import Context
from tdabench.targets.target import Target
from tdabench.testing import parametrize_with_laws
from tdabench.toolkit.gradients import GradientEngine, stream_features


def gradients(context: Context, corpus: Corpus, rank: int | None = None) -> np.ndarray:
    engine = GradientEngine(context.target.model("base"), rank=rank, random=context.torch_generator)
    return np.asarray(stream_features(context, corpus, engine.gradients, engine.dim)[:], "f8")


def scores(method: GradientMethod, context: Context, train: Corpus, queries: Corpus) -> np.ndarray:
    return method.build(context, train).score(queries)


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-5) -> bool:
    return bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


def small(cls: type) -> GradientMethod:
    fields = {f.name for f in dataclasses.fields(cls)}
    settings = {"dim": 64} if cls in (FactGraSS, LESS) else {"rank": 4, "dim": 64}
    return cls(**{k: v for k, v in settings.items() if k in fields})


@parametrize_with_laws([small(cls) for cls in tdabench_methods()])
def test_laws(method, law) -> None:
    law(method)


# --------------------------------------------------------------------------- closed forms


def test_graddot_without_projection_is_the_inner_product(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    q, z = (gradients(tiny_context, c) for c in (tiny_queries, tiny_corpus))
    got = scores(GradDot(rank=None), tiny_context, tiny_corpus, tiny_queries)
    assert close(got, q @ z.T)
    cosine = (q @ z.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(z, axis=1)
    assert close(scores(GradCos(rank=None), tiny_context, tiny_corpus, tiny_queries), cosine)


def test_projected_graddot_approaches_the_exact_one(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    exact = scores(GradDot(rank=None), tiny_context, tiny_corpus, tiny_queries).ravel()
    correlation = [
        np.corrcoef(
            exact, scores(GradDot(rank=r), tiny_context, tiny_corpus, tiny_queries).ravel()
        )[0, 1]
        for r in (2, 16, 64)
    ]
    assert correlation[0] < correlation[1] < correlation[2]
    assert correlation[2] == pytest.approx(1, abs=1e-6)  # no side is larger than 64


@pytest.mark.parametrize("normalise", [False, True])
def test_logra_is_the_block_inverse(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus, normalise: bool
) -> None:
    q, z = (gradients(tiny_context, c, rank=4) for c in (tiny_queries, tiny_corpus))
    inverse = np.zeros((z.shape[1], z.shape[1]))
    for a in range(0, z.shape[1], 16):
        block = slice(a, a + 16)
        c = z[:, block].T @ z[:, block] / len(z)
        inverse[block, block] = np.linalg.inv(c + 0.1 * np.trace(c) / 16 * np.eye(16))
    want = q @ inverse @ z.T
    if normalise:
        want /= np.sqrt(np.einsum("nd,de,ne->n", q, inverse, q))[:, None]
        want /= np.sqrt(np.einsum("nd,de,ne->n", z, inverse, z))
    method = LoGra(rank=4, damping=0.1, normalise=normalise)
    assert close(scores(method, tiny_context, tiny_corpus, tiny_queries), want, 1e-4)


def test_pca_projection_keeps_the_leading_directions(
    tiny_context: Context, tiny_corpus: Corpus
) -> None:
    method = LoGra(rank=4, projection="pca")
    state = method.learn(tiny_context, tiny_corpus)
    whole = method.engine(tiny_context, {}, rank=None)
    moments = second_moments(tiny_context, whole, tiny_corpus)
    name = "model.layers.0.mlp.down_proj"
    for side, c in zip(("in", "out"), moments[name]):
        p = state[f"pca.{side}.{name}"].astype("f8")
        assert p.shape == (len(c), 4)
        np.testing.assert_allclose(p.T @ p, np.eye(4), atol=1e-5)
        kept = np.trace(p.T @ c @ p)
        assert kept == pytest.approx(np.sort(np.linalg.eigvalsh(c))[-4:].sum(), rel=1e-5)
    engine = method.engine(tiny_context, state)
    assert set(engine.dims.values()) == {16}


def test_second_moments_equal_a_loop_over_tokens(
    tiny_context: Context, tiny_corpus: Corpus
) -> None:
    some = tiny_corpus[:6]
    engine = GradientEngine(tiny_context.target.model("base"), layers="layers.0.self_attn.q_proj")
    ((a, s),) = second_moments(tiny_context, engine, some).values()
    xs, deltas = [], []
    for tokens in tiny_context.target.tokenize(some):
        (batch,) = tiny_context.target.batches([tokens])
        engine.backward(batch, lambda _layer, x, d: (xs.append(x[0]), deltas.append(d[0])))
    x, d = (np.concatenate([v.numpy() for v in vs]).astype("f8") for vs in (xs, deltas))
    np.testing.assert_allclose(a, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(s, d.T @ d / len(d), rtol=1e-4, atol=1e-10)


def test_full_rank_pca_equals_full_rank_random(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    settings = {"rank": 8, "layers": "layers.0.self_attn.k_proj", "damping": 0.5}
    pca, random = (
        scores(LoGra(projection=p, **settings), tiny_context, tiny_corpus, tiny_queries)
        for p in ("pca", "random")
    )
    assert not close(pca, random, 1e-2)  # k_proj is [16, 32]: rank 8 loses something
    settings["rank"] = 32
    pca, random = (
        scores(LoGra(projection=p, **settings), tiny_context, tiny_corpus, tiny_queries)
        for p in ("pca", "random")
    )
    assert close(pca, random, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("int8", 2e-2)])
def test_smaller_rows_stay_close(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus, dtype: str, tolerance: float
) -> None:
    want = scores(LoGra(rank=4), tiny_context, tiny_corpus, tiny_queries)
    got = scores(LoGra(rank=4, dtype=dtype), tiny_context, tiny_corpus, tiny_queries)
    assert not np.array_equal(got, want)
    assert close(got, want, tolerance)


# --------------------------------------------------------------------------- curvature


def test_curvature_blocks_and_whitening() -> None:
    x = np.random.default_rng(0).normal(size=(50, 7)).astype("f4")
    blocks = curvature_blocks(x, np.array([0, 3, 7]))
    np.testing.assert_allclose(blocks[1], x[:, 3:].T @ x[:, 3:] / 50, rtol=1e-5)
    low = damped_cholesky(blocks[1], 0.3, "x", 50)
    damped = blocks[1] + 0.3 * np.trace(blocks[1]) / 4 * np.eye(4)
    w = whiten(x[:, 3:], low)
    np.testing.assert_allclose(
        w @ w.T, x[:, 3:] @ np.linalg.solve(damped, x[:, 3:].T.astype("f8")), rtol=1e-5
    )


def test_singular_curvature_is_refused_or_named() -> None:
    x = np.random.default_rng(0).normal(size=(5, 7))
    c = x.T @ x / 5
    with pytest.raises(MethodError, match="singular: 5 examples, 7 dimensions, no damping"):
        damped_cholesky(c, 0.0, "layer", 5)
    with pytest.raises(MethodError, match="is singular at damping 0"):
        damped_cholesky(np.ones((3, 3)), 0.0, "layer", 100)
    assert np.isfinite(damped_cholesky(c, 1e-6, "layer", 5)).all()
    np.testing.assert_array_equal(damped_cholesky(np.zeros((2, 2)), 0.1, "layer", 5), np.eye(2))


def test_too_few_examples_without_damping_is_an_error(
    tiny_context: Context, tiny_corpus: Corpus
) -> None:
    with pytest.raises(MethodError, match=r"logra at model.*singular: 10 examples, 256 dim"):
        LoGra(damping=0.0).build(tiny_context, tiny_corpus[:10])


# --------------------------------------------------------------------------- parameters


def test_parameters_are_checked(tiny_context: Context, tiny_corpus: Corpus) -> None:
    with pytest.raises(UsageError, match="damping must not be negative"):
        LoGra(damping=-1)
    with pytest.raises(UsageError, match="unknown projection 'svd'"):
        LoGra(projection="svd")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="rank must be at least 1"):
        GradDot(rank=0)
    with pytest.raises(UsageError, match="unknown dtype 'int4'"):
        GradDot(dtype="int4")
    with pytest.raises(UsageError, match=r"unknown checkpoint of tiny-qwen2 'wram'. Did you mean"):
        GradDot(checkpoint="wram").build(tiny_context, tiny_corpus)
    with pytest.raises(UsageError, match="no linear layer matches layers = 'nope'"):
        GradDot(layers="nope").build(tiny_context, tiny_corpus)
    assert GradDot.from_params({"rank": "none"}).rank is None


def test_layers_and_checkpoint_change_the_scores(
    tiny_target: Target, tiny_corpus: Corpus, tiny_queries: Corpus, tmp_path: Path
) -> None:
    context = Context(target=tiny_target, scratch=tmp_path)
    all_layers, attention, warm = (
        scores(m, context, tiny_corpus, tiny_queries)
        for m in (GradDot(), GradDot(layers="self_attn"), GradDot(checkpoint="warm"))
    )
    mlp = scores(GradDot(layers="mlp"), context, tiny_corpus, tiny_queries)
    assert close(attention + mlp, all_layers)
    assert not close(warm, all_layers, 0.1)
