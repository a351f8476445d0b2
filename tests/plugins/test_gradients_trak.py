"""TRAK against the `traker` package with one projection matrix, and against its formula."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tdabench_gradients import sketch as sketch_module
from tdabench_gradients.sketch import Sketch, SparseSketch
from tdabench_gradients.trak import TRAK
from tdabench_gradients.traker import Traker

from tdabench.api import random_groups, retrained
from tdabench.data.examples import Corpus
from tdabench.errors import MethodError, MissingExtra, UsageError
from tdabench.method import Context
from tdabench.targets.target import Target, token_losses
from tdabench.testing import parametrize_with_laws

DIM = 48


def test_equals_traker_with_the_same_projection(
    tiny_target: Target,
    tiny_corpus: Corpus,
    tiny_queries: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = Context(target=tiny_target, scratch=tmp_path)
    theirs = Traker(proj_dim=DIM, damping=0.1).build(context, tiny_corpus).score(tiny_queries)

    from trak.projectors import BasicProjector, ProjectionType

    parameters = sum(
        m.weight.numel()
        for n, m in tiny_target.model("base").named_modules()
        if isinstance(m, torch.nn.Linear) and n != "lm_head"
    )
    projector = BasicProjector(
        parameters, DIM, seed=0, proj_type=ProjectionType.normal, device="cpu"
    )
    p = projector.proj_matrix.numpy()  # [parameters, dim], in the order of named_parameters
    at = [0]

    def theirs_in_order(_path: Any, n: int, dim: int, kind: str, generator: Any) -> np.ndarray:
        at[0] += n
        return p[at[0] - n : at[0]]

    monkeypatch.setattr(sketch_module, "_dense", theirs_in_order)
    method = TRAK(proj_dim=DIM, damping=0.1, sketch="normal")
    ours = method.build(context, tiny_corpus)
    at[0] = 0
    ours = ours.score(tiny_queries)
    # traker divides the inverse by its mean absolute entry: equal up to one positive factor.
    scale = (theirs * ours).sum() / (ours * ours).sum()
    assert scale > 0
    assert np.abs(scale * ours - theirs).max() / np.abs(theirs).max() < 1e-3


def test_the_measurement_is_the_log_odds_of_the_response(
    tiny_target: Target, tiny_corpus: Corpus
) -> None:
    model = tiny_target.model("base")
    (batch,) = tiny_target.batches(tiny_target.tokenize(tiny_corpus[:5]))
    losses, rows = token_losses(model, batch), batch.rows
    p = (-losses).exp().double().numpy()
    for reduction, over in (("mean", np.mean), ("sum", np.sum)):
        f, weight = TRAK(reduction=reduction).measure(model, batch)
        for i in range(5):
            token = p[rows.numpy() == i]
            assert float(f[i]) == pytest.approx(over(np.log(token / (1 - token))), rel=1e-4)
            assert float(weight[i]) == pytest.approx((1 - token).mean(), rel=1e-5)


def test_a_certain_token_does_not_make_infinite_odds(
    tiny_target: Target, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch,) = tiny_target.batches(tiny_target.tokenize(tiny_corpus[:2]))
    rows = torch.nonzero(batch.loss_mask)[:, 0]
    certain = torch.zeros(len(rows), requires_grad=True)
    monkeypatch.setattr("tdabench.api.token_losses", lambda model, batch: certain * 1.0)
    f, weight = TRAK().measure(None, batch)
    assert torch.isfinite(f).all()
    f.sum().backward()
    assert certain.grad is not None
    assert torch.isfinite(certain.grad).all()
    assert float(weight.max()) < 1e-30


@pytest.mark.parametrize("kind", ["sparse", "rademacher", "normal"])
def test_sketches_keep_inner_products_in_expectation(tiny_context: Context, kind: str) -> None:
    layer = types.SimpleNamespace(name="x", dim=20_000, start=0)  # more than one block
    engine = types.SimpleNamespace(layers=[layer])
    sketch = Sketch(tiny_context, engine, 2000, kind)  # type: ignore[arg-type]
    g = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(1))
    out, again = torch.zeros(3, 2000), torch.zeros(3, 2000)
    sketch.add(layer, g, out)  # type: ignore[arg-type]
    np.testing.assert_allclose((out @ out.T) / 20_000, (g @ g.T) / 20_000, atol=0.1)
    # Drawn from the seed: a second sketch, and one in another folder, are the same.
    Sketch(tiny_context, engine, 2000, kind).add(layer, g, again)  # type: ignore[arg-type]
    assert torch.equal(out, again)


@pytest.mark.parametrize("n", [40, 333, 1024])  # fewer than sums, no multiple of them, a multiple
def test_a_sparse_sketch_is_unbiased_and_as_exact_as_a_count_sketch(n: int) -> None:
    dim, draws = 64, 3000
    generator = torch.Generator().manual_seed(n)
    x, y = torch.rand(2, n, generator=generator) + 0.1  # dense, and far from centred
    x[:: n // 8] *= 10
    found = []
    for _ in range(draws):
        out = torch.zeros(2, dim)
        SparseSketch(n, dim, generator, "cpu").add(torch.stack([x, y]), out)
        found.append(float(out[0] @ out[1]))
    xy = float(x @ y)
    others = float((x @ x) * (y @ y) + xy**2 - 2 * (x * x) @ (y * y))
    # By independent places the variance is `others` / dim; evenly filled sums collide less.
    worst = others / dim
    assert np.mean(found) == pytest.approx(xy, abs=5 * (worst / draws) ** 0.5)
    assert np.var(found) <= 1.15 * worst


def test_scores_equal_the_formula_over_two_models(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    method = TRAK(proj_dim=DIM, damping=0.3, checkpoints=("base", "warm"))
    z, q = (
        np.asarray(method.features(tiny_context, c, r, {})[:], "f8")
        for c, r in ((tiny_corpus, "train"), (tiny_queries, "query"))
    )
    want = 0.0
    for a in (0, DIM):
        phi, psi = z[:, a : a + DIM], q[:, a : a + DIM]
        fisher = phi.T @ phi / len(phi)
        ridge = 0.3 * np.trace(fisher) / DIM * np.eye(DIM)
        want = want + psi @ np.linalg.inv(fisher + ridge) @ phi.T / 2
    want = want * z[:, 2 * DIM :].mean(axis=1)
    got = method.build(tiny_context, tiny_corpus).score(tiny_queries)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_a_ridge_is_required_with_few_examples(tiny_context: Context, tiny_corpus: Corpus) -> None:
    with pytest.raises(MethodError, match="60 examples, 64 dimensions, no damping"):
        TRAK(proj_dim=64, damping=0.0).build(tiny_context, tiny_corpus)
    with pytest.raises(MethodError, match="need a ridge"):
        Traker(proj_dim=64, damping=0.0).build(tiny_context, tiny_corpus)
    assert TRAK(proj_dim=8, damping=0.0).build(tiny_context, tiny_corpus).n_train == 60
    with pytest.raises(UsageError, match="unknown reduction"):
        TRAK(reduction="max")  # type: ignore[arg-type]


def test_the_wrong_trak_package_is_named(
    tiny_context: Context, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trak", types.ModuleType("trak"))
    with pytest.raises(MethodError, match=r"unrelated program.*pip install traker"):
        Traker().build(tiny_context, tiny_corpus)
    monkeypatch.setitem(sys.modules, "trak", None)
    with pytest.raises(MissingExtra, match="pip install traker"):
        Traker().build(tiny_context, tiny_corpus)


# --------------------------------------------------------------------------- an ensemble


@parametrize_with_laws(
    [TRAK(ensemble=2, proj_dim=16)],
    laws=["shapes-and-finiteness", "batches-do-not-matter", "corpus-order-does-not-matter",
          "same-seed-same-scores", "save-and-load-round-trip", "model-is-untouched"],
)  # fmt: skip
def test_laws_of_an_ensemble(method, law) -> None:  # type: ignore[no-untyped-def]
    law(method)


def test_an_ensemble_averages_over_models_that_it_trains(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    method = TRAK(ensemble=2, proj_dim=DIM, damping=0.1)
    index = method.build(tiny_context, tiny_corpus)
    models = index.state["ensemble"]
    groups = random_groups(tiny_context, tiny_corpus, 2, 0.5, "trak/groups")
    assert [len(g) for g in groups] == [30, 30]
    np.testing.assert_array_equal(models, retrained(tiny_context, tiny_corpus, groups, "trak"))
    assert not np.array_equal(models[0], models[1])

    score, missing = np.zeros((len(tiny_queries), len(tiny_corpus))), np.zeros(len(tiny_corpus))
    target = tiny_context.target
    for row in models:
        part = method._sketched(tiny_context, method._of(tiny_context, row))

        def features(corpus: Corpus, part: Any = part) -> tuple[np.ndarray, np.ndarray]:
            found = [part(b) for t in target.tokenize(corpus) for b in target.batches([t])]
            phi, weight = (torch.cat(x).double().numpy() for x in zip(*found))
            return phi, weight

        (z, weight), (q, _) = features(tiny_corpus), features(tiny_queries)
        f = z.T @ z / len(z)
        f += 0.1 * np.trace(f) / DIM * np.eye(DIM)
        score += q @ np.linalg.solve(f, z.T) / 2
        missing += weight / 2
    want = score * missing
    assert np.abs(index.score(tiny_queries) - want).max() < 1e-3 * np.abs(want).max()
    assert method.prepare_cost(tiny_context) == {"retrainings": 2.0}
    assert TRAK().prepare_cost(tiny_context) is None
    with pytest.raises(UsageError, match="an ensemble or checkpoints"):
        TRAK(ensemble=2, checkpoints=("base",))
    with pytest.raises(UsageError, match="share in"):
        TRAK(ensemble=2, share=0.0)
