"""Influence methods against explicit matrices built from batch-1 gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tdabench_influence import tdabench_methods
from tdabench_influence.curvature import product
from tdabench_influence.datainf import DataInf
from tdabench_influence.ekfac import EKFAC, KFAC, EShampoo, _drawn_losses
from tdabench_influence.identity import Identity
from tdabench_influence.inverse import Arnoldi, ConjugateGradient, Explicit, InverseMethod, LiSSA
from tdabench_influence.preconditioned import EKFACCG
from tdabench_influence.source import SOURCE
from tdabench_influence.streaming import StreamingIndex

from tdabench.data.examples import Corpus, Example
from tdabench.errors import MethodError, UsageError
from tdabench.groups import Groups
from tdabench.method import Context, TDAMethod
from tdabench.targets.target import Target, example_losses, response_logits
from tdabench.testing import parametrize_with_laws
from tdabench.toolkit.gradients import GradientEngine, stream_features

ONE = "layers.1.self_attn.k_proj"  # [16, 32] and a bias: 528 weights
TWO = r"layers.[01].self_attn.v_proj"


def gradients(context: Context, corpus: Corpus, layers: str, bias: bool = True) -> np.ndarray:
    engine = GradientEngine(context.target.model("base"), layers=layers, bias=bias)
    return np.asarray(stream_features(context, corpus, engine.gradients, engine.dim)[:], "f8")


def score(method: TDAMethod, context: Context, train: Corpus, queries: Corpus) -> np.ndarray:
    return method.build(context, train).score(queries)


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-4) -> bool:
    return bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


def small(cls: type) -> TDAMethod:
    settings: dict[str, Any] = {"layers": ONE, "iterations": 20, "directions": 5, "depth": 10}
    fields = {f.name for f in dataclasses.fields(cls)}
    if cls is ConjugateGradient:
        del settings["iterations"]  # cut short, it magnifies the last bits of its gradients
    if cls is EKFACCG:  # the same
        settings |= {"iterations": 5, "tolerance": 1e-6, "damping": 10.0}
    return cls(**{k: v for k, v in settings.items() if k in fields})


FOLLOWING = (
    "magic",
    "source",
    "source-adam",
    "bif",
    "daunce",
)  # they train: their own tests ask some of the laws


@parametrize_with_laws([small(cls) for cls in tdabench_methods() if cls.name not in FOLLOWING])
def test_laws(method, law) -> None:
    law(method)


# --------------------------------------------------------------------------- streaming


def test_identity_is_the_exact_inner_product(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    g, q = (gradients(tiny_context, c, ".") for c in (tiny_corpus, tiny_queries))
    engine = GradientEngine(tiny_context.target.model("base"), layers=".", bias=True)
    assert "lm_head" in engine.dims
    got = score(Identity(layers="."), tiny_context, tiny_corpus, tiny_queries)
    assert close(got, q @ g.T)


def test_query_blocks_do_not_change_scores(
    tiny_context: Context,
    tiny_corpus: Corpus,
    tiny_queries: Corpus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = EKFAC().build(tiny_context, tiny_corpus)
    want = index.score(tiny_queries)
    monkeypatch.setattr(StreamingIndex, "query_bytes", 4 * index.engine.dim * 5)
    assert close(index.score(tiny_queries), want, 1e-5)


def test_a_batch_that_comes_again_for_want_of_memory_counts_once(
    tiny_context: Context,
    tiny_corpus: Corpus,
    tiny_queries: Corpus,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory runs out after some layers have added what is theirs of a batch."""
    import tdabench.toolkit.gradients as toolkit

    index = DataInf().build(tiny_context, tiny_corpus)
    want = index.score(tiny_queries)
    genuine, visits = toolkit.per_example, 0

    def scarce(layer, x, delta, workspace=None):
        nonlocal visits
        visits += 1
        if len(x) > 5 and visits % 3 == 0:
            raise MemoryError
        return genuine(layer, x, delta, workspace)

    monkeypatch.setattr(toolkit, "per_example", scarce)
    assert close(index.score(tiny_queries), want, 1e-5)
    assert visits > 20


def test_group_influence_is_the_sum_over_members(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    index = KFAC(layers=ONE).build(tiny_context, tiny_corpus)
    groups = Groups.of([[0, 5, 9], [1], []], len(tiny_corpus))
    s = index.score(tiny_queries)
    want = np.stack([s[:, [0, 5, 9]].sum(1), s[:, 1], np.zeros(len(s))], axis=1)
    np.testing.assert_allclose(index.score_groups(tiny_queries, groups), want, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------- EK-FAC


def kronecker(context: Context, corpus: Corpus) -> tuple[np.ndarray, ...]:
    """(A, S, mean tokens) of ONE by a loop over examples, training labels."""
    engine = GradientEngine(context.target.model("base"), layers=ONE, bias=True)
    xs, ds = [], []
    for tokens in context.target.tokenize(corpus):
        (batch,) = context.target.batches([tokens])
        engine.backward(batch, lambda _layer, x, d: (xs.append(x[0]), ds.append(d[0])))
    x, d = (np.concatenate([v.numpy() for v in vs]).astype("f8") for vs in (xs, ds))
    return x.T @ x / len(x), d.T @ d / len(x), len(x) / len(corpus)


def test_kfac_is_the_damped_kronecker_inverse(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    a, s, per_example = kronecker(tiny_context, tiny_corpus)
    g, q = (gradients(tiny_context, c, ONE) for c in (tiny_corpus, tiny_queries))
    f = per_example * np.kron(s, a)
    inverse = np.linalg.inv(f + 0.1 * np.trace(f) / len(f) * np.eye(len(f)))
    method = KFAC(layers=ONE, fisher="empirical")
    assert close(score(method, tiny_context, tiny_corpus, tiny_queries), q @ inverse @ g.T, 1e-3)


def test_ekfac_has_the_best_diagonal_in_the_eigenbasis(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    a, s, _ = kronecker(tiny_context, tiny_corpus)
    g, q = (gradients(tiny_context, c, ONE) for c in (tiny_corpus, tiny_queries))
    basis = np.kron(np.linalg.eigh(s)[1], np.linalg.eigh(a)[1])
    values = ((g @ basis) ** 2).mean(0)
    inverse = basis @ np.diag(1 / (values + 0.1 * values.mean())) @ basis.T
    method = EKFAC(layers=ONE, fisher="empirical")
    assert close(score(method, tiny_context, tiny_corpus, tiny_queries), q @ inverse @ g.T, 1e-3)


def test_eshampoo_has_the_best_diagonal_in_the_bases_of_whole_gradients(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    method = EShampoo(layers=ONE, fisher="empirical", damping=0.1)
    g = gradients(tiny_context, tiny_corpus, ONE)
    layer = method.engine(tiny_context).layers[0]
    whole = g.reshape(len(g), layer.d_out, layer.d_in)
    _, q_s = np.linalg.eigh(np.einsum("noi,npi->op", whole, whole))
    _, q_a = np.linalg.eigh(np.einsum("noi,noj->ij", whole, whole))
    basis = np.kron(q_s, q_a)
    values = np.square(g @ basis).mean(0)
    q = gradients(tiny_context, tiny_queries, ONE)
    want = (q @ basis / (values + 0.1 * values.mean())) @ (g @ basis).T
    assert close(score(method, tiny_context, tiny_corpus, tiny_queries), want, 1e-3)


def test_labels_are_drawn_from_the_model(tiny_target: Target, tiny_corpus: Corpus) -> None:
    model = tiny_target.model("base")
    (batch,) = tiny_target.batches(tiny_target.tokenize(tiny_corpus[:2]))
    logits = response_logits(model, batch)
    p = torch.softmax(logits, 1).double().numpy()
    draws = 4000
    rng = np.random.default_rng(0)
    counts = np.zeros_like(p)
    for _ in range(draws):
        u = rng.random(len(p))
        counts[
            np.arange(len(p)), (np.cumsum(p, 1) < u[:, None]).sum(1).clip(max=p.shape[1] - 1)
        ] += 1
    np.testing.assert_allclose(counts / draws, p, atol=0.04)  # inverse-CDF sampling is sampling
    u = rng.random(len(p))
    labels = (np.cumsum(p, 1) < u[:, None]).sum(1)
    want = -np.log(p[np.arange(len(p)), labels])
    rows = np.nonzero(batch.loss_mask.numpy())[0]
    got = _drawn_losses(model, batch, u)
    for i in range(2):
        assert float(got[i]) == pytest.approx(want[rows == i].mean(), rel=1e-4)


def test_true_and_empirical_fisher_differ_and_are_repeatable(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    at = (tiny_context, tiny_corpus, tiny_queries)
    true, again, empirical = (
        score(EKFAC(layers=ONE, fisher=f), *at) for f in ("true", "true", "empirical")
    )
    np.testing.assert_array_equal(true, again)
    assert not close(true, empirical, 0.01)


def test_a_singular_curvature_without_damping_is_refused(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    index = KFAC(damping=0.0, fisher="empirical").build(tiny_context, tiny_corpus[:1])
    with pytest.raises(MethodError, match=r"kfac: the curvature of .* is singular"):
        index.score(tiny_queries)
    with pytest.raises(UsageError, match="damping must not be negative"):
        EKFAC(damping=-0.1)
    with pytest.raises(UsageError, match="unknown fisher"):
        EKFAC(fisher="flase")  # type: ignore[arg-type]


# --------------------------------------------------------------------------- inverses


def fisher_inverse(g: np.ndarray, damping: float = 0.1) -> np.ndarray:
    c = g.T @ g / len(g)
    return np.linalg.inv(c + damping * np.trace(c) / len(c) * np.eye(len(c)))


def test_explicit_is_the_inverse_over_all_layers(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    g, q = (gradients(tiny_context, c, TWO) for c in (tiny_corpus, tiny_queries))
    got = score(Explicit(layers=TWO), tiny_context, tiny_corpus, tiny_queries)
    assert close(got, q @ fisher_inverse(g) @ g.T)


@pytest.mark.parametrize("curvature", ["fisher", "gauss-newton"])
def test_conjugate_gradient_equals_the_explicit_solution(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus, curvature: Any
) -> None:
    settings = {"layers": ONE, "curvature": curvature}
    n = {"fisher": 30, "gauss-newton": 4}[curvature]
    some = (tiny_context, tiny_corpus[:n], tiny_queries[:2])
    exact = score(Explicit(**settings), *some)
    assert close(score(ConjugateGradient(iterations=300, tolerance=1e-6, **settings), *some), exact)
    few = score(ConjugateGradient(iterations=2, **settings), *some)
    assert not close(few, exact, 1e-2)


def test_ekfac_as_preconditioner_reaches_the_gauss_newton_solution_in_fewer_steps(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    train, queries = tiny_corpus[:10], tiny_queries[:3]
    method = EKFACCG(layers=ONE, damping=0.3, iterations=60, tolerance=1e-8)
    index = method.build(tiny_context, train)
    q = torch.from_numpy(gradients(tiny_context, queries, ONE))
    g = gradients(tiny_context, train, ONE)
    c = index.product(torch.eye(index.dim, dtype=torch.float64))
    c = (c + c.T) / 2 + index.lam * torch.eye(index.dim)
    exact = torch.linalg.solve(c, q.T).T
    assert close(index.score(queries), exact.numpy() @ g.T, 1e-3)
    mean = np.mean(np.concatenate([v.ravel() for k, v in index.state.items() if "lambda" in k]))
    assert index.lam == pytest.approx(0.3 * mean)

    def error(method: InverseMethod, steps: int) -> float:
        x = dataclasses.replace(method, iterations=steps, tolerance=1e-12).solve(
            index, q, index.lam
        )  # type: ignore[call-arg]
        d = x - exact
        return float(((d @ c) * d).sum() / ((exact @ c) * exact).sum())  # in the norm of C + lam

    plain = ConjugateGradient(layers=ONE, curvature="gauss-newton")
    errors = [error(method, k) for k in (0, 2, 6)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.3 * error(plain, 6)
    # Without an iteration it is EK-FAC at the scale of the Gauss-Newton matrix.
    start = dataclasses.replace(method, iterations=0).solve(index, q, index.lam)
    layer = index.engine.layers[0]
    q_a, q_s, values = (index.state[f"{k}.{layer.name}"] for k in ("q_a", "q_s", "lambda"))
    basis = np.kron(q_s, q_a).astype("f8")
    want = q.numpy() @ (basis / (values.ravel() + index.lam)) @ basis.T
    assert close(start.numpy(), want, 1e-4)


def test_the_curvature_of_some_examples_does_not_depend_on_the_order_of_the_corpus(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    method = EKFACCG(layers=ONE, examples=6, iterations=3)
    got = score(method, tiny_context, tiny_corpus[:12], tiny_queries[:2])
    back = score(method, tiny_context, tiny_corpus[:12][::-1], tiny_queries[:2])
    assert close(back[:, ::-1], got, 1e-3)
    assert not close(got, score(dataclasses.replace(method, examples=None), tiny_context,
                                tiny_corpus[:12], tiny_queries[:2]))  # fmt: skip
    for params in ({"iterations": -1}, {"examples": 0}, {"damping": 0.0}, {"tolerance": 0.0}):
        with pytest.raises(UsageError):
            EKFACCG(**params)  # type: ignore[arg-type]


@pytest.mark.parametrize("damping", [1e-2, 1.0, 100.0])
def test_the_span_of_the_training_gradients_holds_all_that_solvers_need(
    tiny_context: Context,
    tiny_corpus: Corpus,
    tiny_queries: Corpus,
    monkeypatch: pytest.MonkeyPatch,
    damping: float,
) -> None:
    """With 30 examples and a repeated one, in weights and in the span, whole and in blocks."""
    again = Example("again", tiny_corpus[4].prompt, tiny_corpus[4].response, tiny_corpus[4].task)
    train = Corpus([*tiny_corpus[:30], again], "repeated")
    at = (tiny_context, train, tiny_queries)
    g, q = (gradients(tiny_context, c, TWO) for c in (train, tiny_queries))
    settings: dict[str, Any] = {"layers": TWO, "damping": damping}
    methods = [
        Explicit(**settings),
        ConjugateGradient(iterations=500, tolerance=1e-7, **settings),
        ConjugateGradient(iterations=3, **settings),
        LiSSA(depth=5, batch=8, **settings),
    ]
    monkeypatch.setattr(LiSSA, "_largest", lambda self, index: 1.0)  # found from a random start
    index = methods[0].build(*at[:2])
    assert index.state["rows"].shape == (31, 30)  # the repeated one adds no direction
    whole = [score(m, *at) for m in methods]
    assert close(whole[0], q @ fisher_inverse(g, damping) @ g.T)
    assert close(whole[1], whole[0])
    monkeypatch.setattr(StreamingIndex, "query_bytes", 4 * index.engine.dim * 7)
    for got, want in zip([score(m, *at) for m in methods], whole):
        assert close(got, want, 1e-5)
    monkeypatch.setattr("tdabench_influence.inverse._LARGEST_GRAM", 0)
    assert "rows" not in methods[0].build(*at[:2]).state
    tolerance = 1e-3 if damping < 1 else 2e-4  # solving magnifies float32 rounding errors
    for got, want in zip([score(m, *at) for m in methods], whole):
        assert close(got, want, tolerance)


def test_explicit_takes_any_number_of_weights(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    g, q = (gradients(tiny_context, c, ".") for c in (tiny_corpus, tiny_queries))
    assert g.shape[1] > 20_000
    gram, lam = g @ g.T, 0.1 * (g**2).sum() / g.shape[1]  # n lambda
    want = len(g) * np.linalg.solve(gram + lam * np.eye(len(g)), g @ q.T).T
    got = score(Explicit(layers="."), tiny_context, tiny_corpus, tiny_queries)
    assert close(got, want, 1e-3)


def test_a_gradient_that_is_not_finite_is_named(
    tiny_context: Context, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = StreamingIndex.products

    def spoiled(self, given, first=0):
        for index, part in genuine(self, given, first):
            part[7] = np.nan
            yield index, part

    monkeypatch.setattr(StreamingIndex, "products", spoiled)
    with pytest.raises(MethodError, match="the gradient of 't007' is not finite"):
        Explicit(layers=ONE).build(tiny_context, tiny_corpus)


def test_a_saved_index_serves_every_damping(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus, tmp_path: Path
) -> None:
    for cls in tdabench_methods():
        if "damping" not in cls.query_time:
            continue
        one, other = (dataclasses.replace(small(cls), damping=d) for d in (0.5, 50.0))
        folder = tmp_path / cls.name
        folder.mkdir()
        one.build(tiny_context, tiny_corpus).save(folder)
        got = other.load(tiny_context, folder).score(tiny_queries)
        want = other.build(tiny_context, tiny_corpus).score(tiny_queries)
        assert close(got, want, 1e-6), cls.name
        assert not close(one.load(tiny_context, folder).score(tiny_queries), want, 0.1), cls.name


def test_lissa_converges_to_the_explicit_solution(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    at = (tiny_context, tiny_corpus[:12], tiny_queries)
    settings = {"layers": ONE, "damping": 40.0}
    exact = score(Explicit(**settings), *at)
    full = LiSSA(depth=40, batch=None, scale=1.0, **settings)
    assert close(score(full, *at), exact, 1e-3)
    drawn = score(LiSSA(depth=30, batch=8, **settings), *at)
    assert np.corrcoef(drawn.ravel(), exact.ravel())[0, 1] > 0.9
    with pytest.raises(MethodError, match="diverged"):
        score(LiSSA(depth=40, batch=None, scale=1e-3, **settings), *at)


def test_arnoldi_with_the_whole_space_equals_the_explicit_solution(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    at = (tiny_context, tiny_corpus[:20], tiny_queries)
    settings = {"layers": ONE, "damping": 0.1}
    exact = score(Explicit(**settings), *at)
    # The Fisher of 20 examples has rank 20, and train gradients lie in its range: 21 directions
    # span all that a score can see.
    assert close(score(Arnoldi(iterations=40, directions=40, **settings), *at), exact, 1e-3)
    index = Arnoldi(iterations=40, directions=5, **settings).build(*at[:2])
    g = gradients(tiny_context, tiny_corpus[:20], ONE)
    top = np.sort(np.linalg.eigvalsh(g @ g.T / 20))[::-1]
    np.testing.assert_allclose(index.state["values"], top[:5], rtol=1e-3)


def test_datainf_averages_rank_one_inverses(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    want = 0.0
    for layers in ("layers.0.self_attn.v_proj", "layers.1.self_attn.v_proj"):
        g, q = (gradients(tiny_context, c, layers) for c in (tiny_corpus, tiny_queries))
        d = g.shape[1]
        lam = 0.1 * (g**2).sum(1).mean() / d
        inverse = np.mean([np.linalg.inv(np.outer(z, z) + lam * np.eye(d)) for z in g], axis=0)
        want = want + q @ inverse @ g.T
    assert close(score(DataInf(layers=TWO), tiny_context, tiny_corpus, tiny_queries), want, 1e-3)
    with pytest.raises(UsageError, match="damping must be positive"):
        DataInf(damping=0.0)


# --------------------------------------------------------------------------- curvature products


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_curvature_products_equal_finite_differences(
    make_target: Any, tiny_corpus: Corpus, tmp_path: Path, architecture: str
) -> None:
    layers = {"qwen2": ONE, "gpt2": r"h\.1\.attn\.c_proj"}[architecture]
    target = make_target(architecture)
    context = Context(target=target, scratch=tmp_path)
    index = Explicit(layers=layers, bias=True).build(context, tiny_corpus[:6])
    v = torch.randn(2, index.engine.dim, generator=torch.Generator().manual_seed(0))
    h = product(index, v, "hessian").double().numpy()

    # The mean gradient in float64, at weights moved along v.
    model = target.fresh_model("base").double()
    engine = GradientEngine(model, layers=layers, bias=True)
    layer = engine.layers[0]
    module = dict(model.named_modules())[layer.name]
    weight, bias = module.weight.clone(), module.bias.clone()
    (batch,) = target.batches(target.tokenize(tiny_corpus[:6]))

    def loss_gradient(step: torch.Tensor) -> np.ndarray:
        step = step.view(layer.d_out, layer.d_in)
        w = step[:, :-1]
        module.weight.data = weight + (w.T if layer.conv1d else w)
        module.bias.data = bias + step[:, -1]
        module.requires_grad_(True)
        loss = example_losses(model, batch).mean()
        g_w, g_b = torch.autograd.grad(loss, [module.weight, module.bias])
        g_w = g_w.T if layer.conv1d else g_w
        return torch.cat([g_w, g_b[:, None]], 1).flatten().double().numpy()

    for k in range(2):
        e = 1e-3 * v[k].double()
        want = (loss_gradient(e) - loss_gradient(-e)) / 2e-3
        assert np.abs(h[k] - want).max() / np.abs(want).max() < 1e-2


def test_gauss_newton_is_the_mean_over_drawn_labels(
    tiny_context: Context, tiny_corpus: Corpus
) -> None:
    """For softmax losses J^T H J is the covariance of token gradients under the model's labels."""
    some = tiny_corpus[2:3]  # a number: a response of few tokens
    index = Explicit(layers="layers.1.self_attn.k_proj", bias=False).build(tiny_context, some)
    v = torch.randn(1, index.engine.dim, generator=torch.Generator().manual_seed(0))
    got = product(index, v, "gauss-newton")[0].double().numpy()
    model = tiny_context.target.model("base")
    (batch,) = tiny_context.target.batches(tiny_context.target.tokenize(some))
    with torch.no_grad():
        p = torch.softmax(response_logits(model, batch), 1).double().numpy()
    want = np.zeros(index.engine.dim)
    for position in range(len(p)):
        for label in range(p.shape[1]):

            def loss(m: Any, b: Any, at: int = position, label: int = label) -> torch.Tensor:
                z = response_logits(m, b)[at : at + 1]
                return torch.nn.functional.cross_entropy(z, torch.tensor([label]))[None]

            found: list[Any] = []
            index.engine.backward(batch, lambda _, x, d, f=found: f.append(d[0].T @ x[0]), loss)
            g = found[0].flatten().double().numpy()
            want += p[position, label] * g * (g @ v[0].double().numpy()) / len(p)
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-3


def test_hessian_that_is_not_positive_is_refused_by_cg(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    method = ConjugateGradient(layers=ONE, curvature="hessian", damping=0.0)
    with pytest.raises(MethodError, match=r"the hessian at damping 0\.0 is not positive"):
        score(method, tiny_context, tiny_corpus[:10], tiny_queries[:2])


def test_explicit_refuses_large_models_and_singular_fishers(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    large = Explicit(layers=".", curvature="hessian")
    with pytest.raises(MethodError, match="Choose fewer layers"):
        score(large, tiny_context, tiny_corpus, tiny_queries)
    with pytest.raises(MethodError, match="is singular"):
        score(Explicit(layers=ONE, damping=0.0), tiny_context, tiny_corpus, tiny_queries)
    with pytest.raises(UsageError, match="unknown curvature"):
        Explicit(curvature="fischer")  # type: ignore[arg-type]
    assert issubclass(Explicit, InverseMethod)


@pytest.mark.parametrize("method", [Identity(), EKFAC(), DataInf(), Explicit(), SOURCE(segments=2)])
def test_warming_up_touches_a_small_part_of_the_corpus(
    method, tiny_target, tiny_corpus, tiny_queries, tmp_path, monkeypatch
):
    """A score is a pass over the corpus, and warming up is not; scores afterwards are the same."""
    monkeypatch.setattr("tdabench_influence.streaming.WARM_UP_EXAMPLES", 4)
    index = method.build(Context(target=tiny_target, scratch=tmp_path), tiny_corpus)
    expected = index.score(tiny_queries)
    seen: list[int] = []
    backward = GradientEngine.backward

    def counted(self, batch, visit, loss=None):
        seen.extend(batch.index)
        return backward(self, batch, visit, loss)

    monkeypatch.setattr(GradientEngine, "backward", counted)
    index.warm_up(tiny_queries[:1])
    warm = len(seen)
    np.testing.assert_array_equal(index.score(tiny_queries), expected)
    passes = (len(seen) - warm - len(tiny_queries)) // len(tiny_corpus)
    assert 1 + 4 <= warm <= 1 + 4 * passes
