"""TracIn, DsDm, TrackStar, FactGraSS and LoRIF against their definitions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tdabench_gradients.dsdm import DsDm
from tdabench_gradients.graddot import GradDot
from tdabench_gradients.grass import FactGraSS
from tdabench_gradients.less import LESS
from tdabench_gradients.logra import LoGra
from tdabench_gradients.lorif import FactoredRows, LoRIF, _factors
from tdabench_gradients.tracin import TracIn
from tdabench_gradients.trackstar import TrackStar
from tdabench_gradients.trak import TRAK

from tdabench.data.examples import Corpus
from tdabench.errors import UsageError
from tdabench.method import Context, TDAMethod
from tdabench.targets.target import example_losses
from tdabench.toolkit.gradients import GradientEngine, stream_features

LAYER = "model.layers.0.mlp.down_proj"  # [32, 48]


def score(method: TDAMethod, context: Context, train: Corpus, queries: Corpus) -> np.ndarray:
    return method.build(context, train).score(queries)


def whole_gradients(context: Context, corpus: Corpus) -> np.ndarray:
    """Gradients of LAYER: [n, 32, 48]."""
    engine = GradientEngine(context.target.model("base"), layers=LAYER)
    g = stream_features(context, corpus, engine.gradients, engine.dim)
    return np.asarray(g[:], "f8").reshape(-1, 32, 48)


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-4) -> bool:
    return bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


def test_tracin_is_a_weighted_sum_over_checkpoints(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    at = (tiny_context, tiny_corpus, tiny_queries)
    base, warm = (score(GradDot(checkpoint=c), *at) for c in ("base", "warm"))
    assert close(score(TracIn(), *at), base + warm)
    weighted = TracIn(checkpoints=("warm", "base"), rates=(0.5, 2.0))
    assert close(score(weighted, *at), 0.5 * warm + 2 * base)
    with pytest.raises(UsageError, match="1 rates for 2 checkpoints"):
        TracIn(checkpoints=("base", "warm"), rates=(1.0,))


def test_dsdm_is_the_fisher_on_loss_gradients(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    at = (tiny_context, tiny_corpus, tiny_queries)
    g, q = (whole_gradients(tiny_context, c).reshape(-1, 32 * 48) for c in at[1:])
    # Damping this large leaves the inner product, here in a sketch larger than the layer.
    got = score(DsDm(layers=LAYER, proj_dim=2000, damping=1e9), *at)
    assert np.corrcoef(got.ravel(), (q @ g.T).ravel())[0, 1] > 0.98

    method = DsDm(layers=LAYER, proj_dim=50, damping=0.2)
    z, phi = (
        np.asarray(method.features(tiny_context, c, "query", {})[:][:, :50], "f8") for c in at[1:]
    )
    fisher = z.T @ z / len(z)
    inverse = np.linalg.inv(fisher + 0.2 * np.trace(fisher) / 50 * np.eye(50))
    assert close(score(method, *at), phi @ inverse @ z.T)
    assert not close(
        score(method, *at), score(TRAK(layers=LAYER, proj_dim=50, damping=0.2), *at), 1e-3
    )


def test_trackstar_is_the_cosine_of_normalised_whitened_gradients(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    g, q = (whole_gradients(tiny_context, c) for c in (tiny_corpus, tiny_queries))
    v = (g**2).mean(0)
    rows, cols = v.mean(1), v.mean(0)
    scale = 1 / np.sqrt(np.outer(rows, cols) / v.mean())
    g, q = ((x * scale).reshape(len(x), -1) for x in (g, q))
    c = g.T @ g / len(g)
    inverse = np.linalg.inv(c + 0.1 * np.trace(c) / len(c) * np.eye(len(c)))
    want = q @ inverse @ g.T
    want /= np.sqrt(np.einsum("nd,de,ne->n", q, inverse, q))[:, None]
    want /= np.sqrt(np.einsum("nd,de,ne->n", g, inverse, g))
    method = TrackStar(layers=LAYER, rank=64)  # no side is larger: nothing is projected
    assert close(score(method, tiny_context, tiny_corpus, tiny_queries), want, 1e-3)
    plain = TrackStar(moments="none", rank=4)
    logra = LoGra(normalise=True, rank=4)
    at = (tiny_context, tiny_corpus, tiny_queries)
    assert close(score(plain, *at), score(logra, *at))


def test_factgrass_without_compression_is_exact(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    at = (tiny_context, tiny_corpus, tiny_queries)
    settings = {"layers": LAYER, "damping": 0.1}
    exact = score(LoGra(rank=64, **settings), *at)
    assert close(score(FactGraSS(mask=64, dim=64 * 64, **settings), *at), exact, 1e-3)
    rough = [
        np.corrcoef(score(FactGraSS(mask=m, dim=d, **settings), *at).ravel(), exact.ravel())[0, 1]
        for m, d in ((4, 4), (48, 1000))
    ]
    assert rough[0] < rough[1]
    assert rough[1] > 0.8
    with pytest.raises(UsageError, match="rank and projection do not apply"):
        FactGraSS(rank=4)


def test_factgrass_keeps_norms_in_expectation(tiny_context: Context, tiny_corpus: Corpus) -> None:
    exact = (whole_gradients(tiny_context, tiny_corpus) ** 2).sum((1, 2))
    ratios = []
    for seed in range(12):
        context = Context(target=tiny_context.target, scratch=tiny_context.scratch, seed=seed)
        method = FactGraSS(layers=LAYER, mask=24, dim=200)
        f = np.asarray(method.features(context, tiny_corpus, "train", {})[:])
        ratios.append(((f**2).sum(1) / exact).mean())
    assert np.mean(ratios) == pytest.approx(1, abs=0.2)


def test_lorif_with_full_ranks_equals_logra(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    at = (tiny_context, tiny_corpus, tiny_queries)
    exact = score(LoGra(rank=6), *at)
    assert close(score(LoRIF(rank=6, factors=6, curvature_rank=36), *at), exact, 1e-3)
    fits = [
        np.corrcoef(score(LoRIF(rank=6, factors=f, curvature_rank=k), *at).ravel(), exact.ravel())[
            0, 1
        ]
        for f, k in ((1, 4), (3, 36))
    ]
    assert 0.3 < fits[0] < fits[1]


def test_low_rank_factors_are_the_truncated_svd(tiny_context: Context) -> None:
    generator = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -4, 8)
    g = torch.randn(5, 12, 8, generator=generator) * decay * 1e-6
    u, v = _factors(g, torch.randn(8, 3, generator=generator))
    left, s, right = torch.linalg.svd(g)
    best = left[..., :3] * s[:, None, :3] @ right[:, :3]
    assert float((u @ v.transpose(1, 2) - best).norm() / best.norm()) < 1e-3
    zeros, _ = _factors(torch.zeros(2, 4, 4), torch.ones(4, 2))
    assert torch.isfinite(zeros).all()


def test_lorif_keeps_factors_only(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus, tmp_path: Path
) -> None:
    method = LoRIF(rank=8, factors=1, dtype="float16")
    index = method.build(tiny_context, tiny_corpus)
    assert isinstance(index.rows, FactoredRows)
    assert index.rows.shape == (60, 14 * 64)
    assert index.rows.factors.shape == (60, 14 * 16)
    folder = tmp_path / "index"
    folder.mkdir()
    index.save(folder)
    loaded = method.load(tiny_context, folder)
    np.testing.assert_array_equal(loaded.score(tiny_queries), index.score(tiny_queries))
    np.testing.assert_array_equal(index.rows[10:20], index.rows[:][10:20])
    with pytest.raises(UsageError, match="damping must be positive"):
        LoRIF(damping=0.0)


# --------------------------------------------------------------------------- LESS


def less_state(context: Context, corpus: Corpus, method: LESS):  # type: ignore[no-untyped-def]
    engine = method.engine(context, {})
    state = method.learn(context, corpus)
    kept = {k: torch.from_numpy(v) for k, v in state.items() if k != "rates"}
    return engine, state, kept


def test_less_gradients_are_those_of_the_lora_weights(
    tiny_context: Context, tiny_corpus: Corpus
) -> None:
    method = LESS(warmup=0.5, lora_rank=2, epochs=2, lr=1e-2)
    engine, _, kept = less_state(tiny_context, tiny_corpus, method)
    (batch,) = tiny_context.target.batches(tiny_context.target.tokenize(tiny_corpus[:3]))
    got = method.lora_gradients(engine, batch, kept, 1)
    names = [f"{s}.{layer.name}" for layer in engine.layers for s in "ab"]
    lora = {k: kept[f"w.1.{k}"].clone().requires_grad_() for k in names}
    # Not "none at all": transformers leaves hooks of its own on a model once asked for its states.
    hooks = [list(m._forward_hooks) for m in engine.model.modules()]
    assert all(float(lora[k].detach().abs().max()) > 0 for k in names)  # B has left zero
    with method._attached(engine, lora):
        losses = example_losses(engine.model, batch)
        for i in range(3):
            want = torch.autograd.grad(losses[i], list(lora.values()), retain_graph=True)
            want = torch.cat([w.flatten() for w in want])
            assert float((got[i] - want).norm() / want.norm()) < 1e-5
    assert [list(m._forward_hooks) for m in engine.model.modules()] == hooks


def test_less_is_the_cosine_of_adam_updates(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    method = LESS(warmup=0.5, lora_rank=2, epochs=2, lr=1e-2, dim=10**6)
    engine, state, kept = less_state(tiny_context, tiny_corpus, method)
    want = np.zeros((len(tiny_queries), len(tiny_corpus)))
    for e in range(2):

        def at(corpus: Corpus, e: int = e) -> np.ndarray:
            out = np.empty((len(corpus), 0))
            for batch in tiny_context.target.batches(tiny_context.target.tokenize(corpus)):
                g = method.lora_gradients(engine, batch, kept, e).double().numpy()
                out = np.zeros((len(corpus), g.shape[1])) if not out.size else out
                out[batch.index] = g
            return out

        q, g = at(tiny_queries), at(tiny_corpus)
        m, v = (method._flat(engine, kept, k, e).double().numpy() for k in "mv")
        gamma = (0.9 * m + 0.1 * g) / (np.sqrt(0.999 * v + 0.001 * g**2) + 1e-8)
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, gamma)]
        want += state["rates"][e] * unit[0] @ unit[1].T
    assert state["rates"].sum() == pytest.approx(1)
    assert state["rates"][0] > state["rates"][1]
    got = score(method, tiny_context, tiny_corpus, tiny_queries)
    np.testing.assert_allclose(got, want, atol=1e-4)
    sketched = score(dataclasses.replace(method, dim=2000), tiny_context, tiny_corpus, tiny_queries)
    assert np.corrcoef(sketched.ravel(), want.ravel())[0, 1] > 0.7
