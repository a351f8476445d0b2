"""The gradient engine against a batch-1 autograd loop, and what must not change its results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tdabench.data.examples import Corpus
from tdabench.errors import MethodError, UsageError
from tdabench.method import Context
from tdabench.targets.batches import Batch
from tdabench.targets.target import Target, example_losses
from tdabench.toolkit import gradients as G
from tdabench.toolkit.gradients import GradientEngine, map_batches, stream_features
from tdabench.toolkit.store import FeatureStore

ARCHITECTURES = ["qwen2", "llama", "gpt2", "gpt_neox"]


def autograd_loop(target: Target, corpus: Corpus, names: list[str], bias: bool) -> np.ndarray:
    """One example at a time, weight gradients by autograd: [n, dim] in the engine's layout."""
    model = target.fresh_model("warm")
    modules = dict(model.named_modules())
    model.requires_grad_(True)
    out = []
    for tokens in target.tokenize(corpus):
        (batch,) = target.batches([tokens])
        model.zero_grad()
        example_losses(model, batch).sum().backward()
        row = []
        for name in names:
            m = modules[name]
            g = m.weight.grad if isinstance(m, torch.nn.Linear) else m.weight.grad.T  # [out, in]
            if bias and m.bias is not None:
                g = torch.cat([g, m.bias.grad[:, None]], dim=1)
            row.append(g.reshape(-1))
        out.append(torch.cat(row).numpy().copy())
    return np.stack(out)


def all_features(
    engine: GradientEngine, target: Target, corpus: Corpus, tokens_a_batch: int = 4096
) -> np.ndarray:
    tokens = target.tokenize(corpus)
    out = np.full((len(corpus), engine.dim), np.nan, dtype=np.float32)
    for index, block in engine.features(target.batches(tokens, tokens_a_batch)):
        out[index] = block.numpy()
    return out


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Largest error of a row, relative to the row's norm."""
    return float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).max())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_a_batch_1_autograd_loop(
    make_target: Callable[[str], Target], tiny_corpus: Corpus, architecture: str, bias: bool
) -> None:
    target, some = make_target(architecture), tiny_corpus[:16]
    engine = GradientEngine(target.model("warm"), bias=bias)
    want = autograd_loop(target, some, list(engine.dims), bias)
    assert want.shape[1] == engine.dim == sum(engine.dims.values())
    assert relative(all_features(engine, target, some), want) < 1e-5


def test_the_output_head_can_be_asked_for(
    make_target: Callable[[str], Target], tiny_corpus: Corpus
) -> None:
    target = make_target("llama")  # untied: its head has a gradient of its own
    engine = GradientEngine(target.model("warm"), layers="lm_head|layers.1.mlp.down_proj")
    assert list(engine.dims) == ["model.layers.1.mlp.down_proj", "lm_head"]
    want = autograd_loop(target, tiny_corpus[:8], list(engine.dims), False)
    assert relative(all_features(engine, target, tiny_corpus[:8]), want) < 1e-5


@pytest.mark.parametrize("rank", [5, 32, 64])
def test_projection_in_the_hook_equals_projecting_the_gradient(
    tiny_target: Target, tiny_corpus: Corpus, tiny_context: Context, rank: int
) -> None:
    model, some = tiny_target.model("warm"), tiny_corpus[:10]
    whole = GradientEngine(model, bias=True)
    small = GradientEngine(model, rank=rank, random=tiny_context.torch_generator, bias=True)
    full, got = (all_features(e, tiny_target, some) for e in (whole, small))
    for layer, part in zip(small.layers, small.split(got).values()):
        g = full[:, whole.layers[small.layers.index(layer)].columns]
        g = g.reshape(len(some), layer.d_out, layer.d_in)
        p_out = np.eye(layer.d_out) if layer.p_out is None else layer.p_out.numpy()
        p_in = np.eye(layer.d_in) if layer.p_in is None else layer.p_in.numpy()
        want = (p_out.T @ g @ p_in).reshape(len(some), -1)
        assert relative(part, want) < 1e-5
    assert all(layer.p_in is None for layer in small.layers) == (rank == 64)


def test_random_projection_keeps_inner_products_in_expectation(tiny_target: Target) -> None:
    generator = lambda name: torch.Generator().manual_seed(len(name))  # noqa: E731
    p = G._draw(generator, "a name", 500, 400)
    assert p is not None
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    assert float((x @ p).square().sum() / x.square().sum()) == pytest.approx(1, abs=0.2)


def test_features_do_not_depend_on_batch_order_padding_or_call(
    tiny_target: Target, tiny_corpus: Corpus, tiny_context: Context
) -> None:
    engine = GradientEngine(tiny_target.model("warm"), rank=6, random=tiny_context.torch_generator)
    first = all_features(engine, tiny_target, tiny_corpus)
    np.testing.assert_array_equal(first, all_features(engine, tiny_target, tiny_corpus))
    assert relative(all_features(engine, tiny_target, tiny_corpus, 1), first) < 1e-5
    assert relative(all_features(engine, tiny_target, tiny_corpus, 100), first) < 1e-5
    order = np.random.default_rng(0).permutation(len(tiny_corpus))
    shuffled = all_features(engine, tiny_target, tiny_corpus.subset(order), 512)
    assert relative(shuffled, first[order]) < 1e-5


@pytest.mark.parametrize("architecture", ["qwen2", "gpt_neox"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_extra_padding_on_either_side_changes_nothing(
    make_target: Callable[[str], Target], tiny_corpus: Corpus, architecture: str, side: str
) -> None:
    target = make_target(architecture)
    engine = GradientEngine(target.model("warm"), bias=True)
    (batch,) = target.batches(target.tokenize(tiny_corpus[:4]))
    want = engine.gradients(batch)

    def extended(v: torch.Tensor, value: int) -> torch.Tensor:
        extra = torch.full((len(v), 7), value, dtype=v.dtype)
        return torch.cat([extra, v] if side == "left" else [v, extra], dim=1)

    padded = Batch(
        batch.index,
        extended(batch.input_ids, target.pad_id),
        extended(batch.attention_mask, 0),
        extended(batch.loss_mask, 0),
    )
    # Left padding moves positions; rotary embeddings see differences of positions only.
    assert relative(engine.gradients(padded).numpy(), want.numpy()) < 1e-4


def test_the_model_and_global_random_state_are_left_alone(
    tiny_target: Target, tiny_corpus: Corpus, tiny_context: Context
) -> None:
    model = tiny_target.fresh_model("warm").train()
    model.lm_head.eval()
    model.model.layers[0].requires_grad_(True)
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    engine = GradientEngine(model, rank=4, random=tiny_context.torch_generator)
    (batch,) = tiny_target.batches(tiny_target.tokenize(tiny_corpus[:4]))
    engine.gradients(batch)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.requires_grad == before[name][1]
        assert p.grad is None
    assert not any(m._forward_hooks for m in model.modules())


def test_bfloat16_is_close(tiny_target: Target, tiny_corpus: Corpus) -> None:
    half = tiny_target.fresh_model("warm").to(torch.bfloat16)
    engine = GradientEngine(half)
    want = all_features(GradientEngine(tiny_target.model("warm")), tiny_target, tiny_corpus[:8])
    got = all_features(engine, tiny_target, tiny_corpus[:8])
    assert got.dtype == np.float32
    assert relative(got, want) < 0.1


def test_projections_are_those_given(tiny_target: Target, tiny_corpus: Corpus) -> None:
    model = tiny_target.model("warm")
    whole = GradientEngine(model, layers=r"layers\.0\.mlp\.down_proj")
    p_in = np.eye(48)[:, [3, 5]]
    given = {"model.layers.0.mlp.down_proj": (p_in, None)}
    picked = GradientEngine(model, layers=r"layers\.0\.mlp\.down_proj", projection=given)
    full = all_features(whole, tiny_target, tiny_corpus[:5]).reshape(5, 32, 48)
    got = all_features(picked, tiny_target, tiny_corpus[:5]).reshape(5, 32, 2)
    np.testing.assert_allclose(got, full[:, :, [3, 5]], rtol=1e-4, atol=1e-7)
    with pytest.raises(UsageError, match="unknown layer in the given projections"):
        GradientEngine(model, layers="layers.1.mlp", projection=given)
    with pytest.raises(UsageError, match="has 48 rows, not 32"):
        GradientEngine(
            model,
            layers="layers.0.self_attn.q_proj",
            projection={"model.layers.0.self_attn.q_proj": (p_in, None)},
        )


# --------------------------------------------------------------------------- bad input


def test_layer_patterns_are_checked(tiny_target: Target) -> None:
    model = tiny_target.model("warm")
    with pytest.raises(UsageError, match=r"no linear layer matches.*The model has 15: model"):
        GradientEngine(model, layers="nothing_like_this")
    with pytest.raises(UsageError, match="not a regular expression"):
        GradientEngine(model, layers="(")
    with pytest.raises(UsageError, match="no linear layers"):
        GradientEngine(torch.nn.LayerNorm(3))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="seeded generator"):
        GradientEngine(model, rank=2)


def test_a_quantised_model_is_refused(tiny_target: Target) -> None:
    model = tiny_target.fresh_model("warm")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(MethodError, match="quantised"):
        GradientEngine(model)


def test_nan_gradients_name_the_example(
    tiny_target: Target, tiny_corpus: Corpus, tiny_context: Context
) -> None:
    engine = GradientEngine(tiny_target.model("warm"))

    def poisoned(batch: Batch) -> torch.Tensor:
        g = engine.gradients(batch)
        g[batch.index == 7] = torch.nan
        return g

    with pytest.raises(MethodError, match="NaN or infinite gradients for 1 examples, first 't007'"):
        stream_features(tiny_context, tiny_corpus, poisoned, engine.dim)


def test_bfloat16_rounds_the_gradients_and_leaves_the_model(
    tiny_target: Target, tiny_corpus: Corpus
) -> None:
    import dataclasses

    want = all_features(GradientEngine(tiny_target.model("warm")), tiny_target, tiny_corpus)
    half = dataclasses.replace(tiny_target, dtype="bfloat16").model("warm")
    assert half.config._attn_implementation == "sdpa"
    seen = []
    hook = half.register_forward_hook(lambda *_: seen.append(half.config._attn_implementation))
    base = half.base_model.register_forward_hook(
        lambda *_: seen.append(half.config._attn_implementation)
    )
    got = all_features(GradientEngine(half), tiny_target, tiny_corpus)
    hook.remove()
    base.remove()
    assert set(seen) == {"eager"}
    assert half.config._attn_implementation == "sdpa"
    cosines = (got * want).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(want, axis=1)
    assert cosines.min() > 0.99


def test_out_of_memory_halves_the_batch_and_says_so(
    tiny_target: Target, tiny_corpus: Corpus, tmp_path: Path
) -> None:
    told: list[str] = []
    context = Context(
        target=tiny_target, scratch=tmp_path, progress=lambda what, done, total: told.append(what)
    )
    sizes = []

    def compute(batch: Batch) -> torch.Tensor:
        if len(batch.input_ids) > 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch.input_ids))
        return batch.input_ids.sum(1, keepdim=True).float()

    got = stream_features(context, tiny_corpus, compute, 1, tokens_a_batch=4096)
    want = [int(t.ids.sum()) for t in tiny_target.tokenize(tiny_corpus)]
    pad = tiny_target.pad_id
    assert pad == 0  # so that padding adds nothing to the sums
    np.testing.assert_array_equal(got[:].ravel(), want)
    assert max(sizes) == 7  # 60 -> 30 -> 15 -> 7
    assert sum("halved" in t for t in told) == 3

    def never(batch: Batch) -> torch.Tensor:
        raise MemoryError

    with pytest.raises(MethodError, match="out of memory on one example"):
        list(map_batches(context, tiny_target.tokenize(tiny_corpus[:5]), never))

    def other(batch: Batch) -> torch.Tensor:
        raise RuntimeError("a shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(map_batches(context, tiny_target.tokenize(tiny_corpus[:5]), other))


def test_large_features_go_to_a_store_and_resume(
    tiny_target: Target,
    tiny_corpus: Corpus,
    tiny_context: Context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = GradientEngine(tiny_target.model("warm"), rank=4, random=tiny_context.torch_generator)
    want = stream_features(tiny_context, tiny_corpus, engine.gradients, engine.dim)
    assert isinstance(want, np.ndarray)
    monkeypatch.setattr(G, "IN_MEMORY_BYTES", 1000)
    calls: list[int] = []

    def until_interrupted(batch: Batch) -> torch.Tensor:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(batch.input_ids))
        return engine.gradients(batch)

    def run(compute: Callable[[Batch], torch.Tensor]) -> FeatureStore:
        store = stream_features(
            tiny_context, tiny_corpus, compute, engine.dim, key="k", tokens_a_batch=512
        )
        assert isinstance(store, FeatureStore)
        return store

    monkeypatch.setattr("tdabench.toolkit.store._SECONDS_BETWEEN_FLUSHES", -1.0)
    with pytest.raises(KeyboardInterrupt):
        run(until_interrupted)
    resumed: list[int] = []

    def counted(batch: Batch) -> torch.Tensor:
        resumed.append(len(batch.input_ids))
        return engine.gradients(batch)

    store = run(counted)
    assert sum(resumed) == len(tiny_corpus) - sum(calls)
    assert relative(store[:], want) < 1e-5


def test_empty_input(tiny_context: Context) -> None:
    got = stream_features(tiny_context, [], lambda b: torch.zeros(0, 3), 3)
    assert got.shape == (0, 3)


def test_a_corpus_is_tokenised_a_window_at_a_time(tiny_context, tiny_corpus, monkeypatch):
    from tdabench.targets.target import Target
    from tdabench.toolkit import gradients

    engine = GradientEngine(tiny_context.target.model("base"), rank=2,
                            random=tiny_context.torch_generator)  # fmt: skip
    whole = stream_features(tiny_context, tiny_corpus, engine.gradients, engine.dim)
    sizes, original = [], Target.tokenize

    def watched(self, examples, role="full"):
        sizes.append(len(examples))
        return original(self, examples, role)

    monkeypatch.setattr(Target, "tokenize", watched)
    monkeypatch.setattr(gradients, "WINDOW", 7)
    parts = stream_features(tiny_context, tiny_corpus, engine.gradients, engine.dim)
    assert sizes == [7] * 8 + [4]
    np.testing.assert_allclose(parts[:], whole[:], rtol=1e-3, atol=1e-4)
