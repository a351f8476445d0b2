"""SOURCE against unrolled gradient descent, its two limits, and the exact metagradient."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tdabench_influence.curvature import product
from tdabench_influence.inverse import Explicit
from tdabench_influence.magic import MAGIC
from tdabench_influence.source import (
    SOURCE,
    AdamSOURCE,
    SourceIndex,
    _GaussNewton,
    responses,
)

from tdabench.data.examples import Corpus
from tdabench.errors import UsageError
from tdabench.method import Context
from tdabench.testing import parametrize_with_laws
from tdabench.toolkit.gradients import per_example, stream_features

TWO = r"layers.[01].self_attn.v_proj"
SGD = "eps=1e6,clip=0,beta1=0"  # lr m / (sqrt(v) + eps) is then lr g / eps


@parametrize_with_laws(
    [
        SOURCE(segments=2, recipe="epochs=1", layers=TWO),
        AdamSOURCE(segments=2, recipe="epochs=1", layers=TWO),
    ],
    laws=["described", "parameters-are-checked", "shapes-and-finiteness", "batches-do-not-matter",
          "corpus-order-does-not-matter", "save-and-load-round-trip", "globals-are-untouched",
          "second-call-equals-the-first", "model-is-untouched"],
)  # fmt: skip
def test_laws(method, law) -> None:
    law(method)


def gradients(context: Context, corpus: Corpus, method: SOURCE, theta: np.ndarray) -> np.ndarray:
    engine = method.engine_at(context, theta)
    return np.asarray(stream_features(context, corpus, engine.gradients, engine.dim)[:], "f8")


# --------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(("segments", "tolerance"), [(400, 0.01), (3, 0.1)])
def test_segments_unroll_gradient_descent_on_a_quadratic(segments: int, tolerance: float) -> None:
    """Losses (theta - a_i)^T diag(h) (theta - a_i) / 2, full batches: d theta_T / d w_i exactly."""
    rng = np.random.default_rng(0)
    n, d, steps, lr = 12, 6, 400, 0.05
    h, a, query = rng.uniform(0, 0.3, d), rng.normal(size=(n, d)), rng.normal(size=d)
    h[0] = 0.0  # a flat direction
    theta, by_w, path = np.zeros(d), np.zeros((n, d)), []
    for _ in range(steps):
        path.append(theta)
        by_w = by_w - lr * (h * by_w + h * (theta - a) / n)  # the derivative of the step
        theta = theta - lr * h * (theta - a.mean(0))
    want = -by_w @ query

    ends = np.linspace(0, steps, segments + 1).round().astype(int)
    carried, got = torch.from_numpy(query), np.zeros(n)
    for i in reversed(range(segments)):
        f, s = responses(torch.from_numpy(h), lr * (ends[i + 1] - ends[i]))
        middle = path[(ends[i] + ends[i + 1]) // 2]
        got += (h * (middle - a) / n) @ (f * carried).numpy()
        carried = s * carried
    assert np.abs(got - want).max() / np.abs(want).max() < tolerance


def test_limits_of_a_segment() -> None:
    values = torch.tensor([0.0, 1e-30, 0.5, 3.0], dtype=torch.float64)
    f, s = responses(values, 1e-9)  # short: the gradient pushes for a time t, nothing decays
    np.testing.assert_allclose(f, [1e-9] * 4, rtol=1e-6)
    np.testing.assert_allclose(s, np.ones(4), rtol=1e-6)
    f, s = responses(values[2:], 1e6)  # long: the inverse curvature, all that was before is gone
    np.testing.assert_allclose(f, 1 / values[2:])
    np.testing.assert_allclose(s, [0, 0])
    assert responses(values, 0.0)[0].tolist() == [0, 0, 0, 0]


def test_a_short_run_is_tracin_along_it(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    train = tiny_corpus[:24]
    method = SOURCE(segments=2, layers=TWO, share=1.0, recipe=f"batch_size=6,lr=1e-4,{SGD}")
    index = method.build(tiny_context, train)
    q = gradients(tiny_context, tiny_queries, method, index.state["end.theta"])
    steps = 8
    rates = [1e-4 * (steps - k) / steps / 1e6 for k in range(steps)]  # over eps
    want = np.zeros((len(tiny_queries), len(train)))
    for i, part in enumerate((rates[:4], rates[4:])):
        g = gradients(tiny_context, train, method, index.state[f"{i}.theta"])
        want += sum(part) * q @ g.T / len(train)
        np.testing.assert_allclose(index.state[f"{i}.t"], sum(part), rtol=1e-4)
    longer = replace(method, time=8.0).build(tiny_context, train)
    np.testing.assert_allclose(longer.state["1.t"], 8 * index.state["1.t"], rtol=1e-5)
    got = index.score(tiny_queries)
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-4


def test_a_long_last_segment_is_the_influence_function(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    train = tiny_corpus[:24]
    method = SOURCE(segments=1, layers=TWO, share=1.0, recipe="epochs=1")
    built = method.build(tiny_context, train)
    state = {**built.state, "0.t": np.full(2, 1e12)}
    for key in [k for k in state if ".lambda." in k]:  # no eigenvalue near 0: nothing is damped
        state[key] = state[key] + 1e-3
    got = SourceIndex(method, tiny_context, list(train), state).score(tiny_queries)
    engine = method.engine_at(tiny_context, state["0.theta"])
    q = gradients(tiny_context, tiny_queries, method, state["end.theta"])
    g = gradients(tiny_context, train, method, state["0.theta"])
    want = 0.0
    for layer in engine.layers:
        q_a, q_s, values = (state[f"0.{k}.{layer.name}"] for k in ("q_a", "q_s", "lambda"))
        basis = np.kron(q_s, q_a).astype("f8")
        want += (q[:, layer.columns] @ basis / values.ravel()) @ (g[:, layer.columns] @ basis).T
    want = want / len(train)
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-3


def test_agrees_with_the_exact_metagradient(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    """On a gentle run of plain gradient descent; it sees linear layers, MAGIC all weights."""
    train, queries = tiny_corpus[:24], tiny_queries[:6]
    run = {"share": 1.0, "recipe": f"lr=2e4,batch_size=12,epochs=4,{SGD}"}
    exact = MAGIC(**run).build(tiny_context, train).score(queries)
    got = SOURCE(layers=".", segments=2, **run).build(tiny_context, train).score(queries)
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(got, exact)]
    assert np.mean(r) > 0.9


def test_the_curvature_is_gauss_newton_to_scale(tiny_context: Context, tiny_corpus: Corpus) -> None:
    """Its trace in a layer, over draws of labels, is that of the Gauss-Newton matrix."""
    train, layer = tiny_corpus[:3], "layers.1.self_attn.k_proj"
    index = Explicit(layers=layer).build(tiny_context, train)
    rows = torch.eye(index.engine.dim)[::12]  # every twelfth diagonal element: 44 rows
    want = float((product(index, rows, "gauss-newton") * rows).sum())
    found = []
    for seed in range(20):
        context = Context(tiny_context.target, tiny_context.scratch, seed=seed)
        method = _GaussNewton(layers=layer)
        drawn = method._pass(context, index.engine, train, _squares, "squares")
        found.append(drawn[f"model.{layer}"][0].ravel()[::12].sum().item() / len(train))
    assert abs(np.mean(found) - want) < 4 * np.std(found) / len(found) ** 0.5
    # Without the factor it would be smaller by the number of tokens of a response.
    tokens = [len(t) - t.start for t in tiny_context.target.tokenize(train)]
    assert min(tokens) > 1
    assert np.mean(found) > 0.6 * want


def _squares(layer, x, delta, batch):  # type: ignore[no-untyped-def]
    return (per_example(layer, x, delta).square().sum(0),)


# --------------------------------------------------------------------------- AdamW's geometry


def test_a_segment_solves_the_differential_equation_of_preconditioned_descent(
    tiny_context: Context,
) -> None:
    """d' = -D (H d + g): S^T carries a query's gradient back, F^T is its integral times D."""
    from scipy.linalg import expm

    rng = np.random.default_rng(0)
    q_s, q_a = (np.linalg.qr(rng.normal(size=(k, k)))[0] for k in (3, 4))
    values, t = rng.uniform(0.1, 2, size=(3, 4)), 0.8
    out, into = rng.uniform(0.5, 2, 3), rng.uniform(0.5, 2, 4)
    g = rng.normal(size=(2, 3, 4))

    index = SourceIndex.__new__(SourceIndex)
    index.context, index.engine = tiny_context, SimpleNamespace(layers=[SimpleNamespace(name="a")])
    parts = {"q_a": q_a, "q_s": q_s, "lambda": values, "out": out, "in": into}
    index.state = {f"0.{k}.a": v for k, v in parts.items()} | {"0.t": np.array([t])}
    pushed, carried = index._segment(0, {"a": torch.from_numpy(g)})

    root = np.outer(out, into).ravel()
    basis = np.kron(q_s, q_a)
    h = (basis * values.ravel()) @ basis.T / np.outer(root, root)  # H, of unscaled gradients
    d = root**2
    s = expm(-t * d[:, None] * h)
    times = np.linspace(0, t, 4001)
    steps = [expm(-x * d[:, None] * h) for x in times[::40]]
    f = np.trapezoid(steps, times[::40], axis=0) * d
    np.testing.assert_allclose(carried["a"].reshape(2, -1), g.reshape(2, -1) @ s, rtol=1e-8)
    np.testing.assert_allclose(pushed["a"].reshape(2, -1), g.reshape(2, -1) @ f, rtol=1e-3)


def test_where_eps_outweighs_gradients_it_is_source(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    run = {"segments": 2, "layers": TWO, "share": 1.0, "recipe": f"lr=1e4,batch_size=6,{SGD}"}
    want = SOURCE(**run).build(tiny_context, tiny_corpus[:24]).score(tiny_queries)
    got = AdamSOURCE(**run).build(tiny_context, tiny_corpus[:24]).score(tiny_queries)
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-3


def test_it_is_nearer_to_the_exact_metagradient_of_adamw(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    train, queries = tiny_corpus[:24], tiny_queries[:6]
    run = {"share": 1.0, "recipe": "lr=1e-3,batch_size=24,epochs=12,eps=1e-3,warmup=0.25"}
    exact = MAGIC(**run).build(tiny_context, train).score(queries)

    def agreement(method: SOURCE) -> float:
        got = method.build(tiny_context, train).score(queries)
        return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(got, exact)]))

    plain = agreement(SOURCE(layers=".", segments=3, **run))
    adam = agreement(AdamSOURCE(layers=".", segments=3, **run))
    assert adam > plain
    assert adam > 0.8


def test_bad_settings_are_refused(tiny_context: Context) -> None:
    with pytest.raises(UsageError, match="segments must be at least 1"):
        SOURCE(segments=0)
    with pytest.raises(UsageError, match="time must be positive"):
        SOURCE(time=0.0)
    with pytest.raises(UsageError, match="share must be in"):
        SOURCE(share=2.0)


def test_more_segments_than_steps(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus, tmp_path: Path
) -> None:
    method = SOURCE(segments=4, share=1.0, recipe="epochs=1", layers=TWO)
    scores = method.build(tiny_context, tiny_corpus[:8]).score(tiny_queries[:2])
    assert np.isfinite(scores).all()
    assert scores.any()
