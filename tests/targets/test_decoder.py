"""The written-out passes against autograd through the model's own forward."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdabench.targets import Recipe, decoder, example_losses, finetune, products
from tdabench.targets.batches import Tokens, pad
from tdabench.targets.decoder import LONGEST, Decoder, States, cut
from tdabench.targets.lora import LoRA
from tdabench.targets.products import product
from tdabench.targets.training import states_below

SERVED = ("qwen2", "llama")  # of the tiny targets: tied and untied output matrix
LINEAR = products._linear()


def drawn(n: int, longest: int, vocabulary: int, seed: int = 0) -> list[Tokens]:
    """Random examples of 2 to `longest` tokens, whose responses begin anywhere."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, size=n)
    return [Tokens(rng.integers(0, vocabulary, size=k), int(rng.integers(1, k))) for k in lengths]


def changed(target, **config):
    """A model of the tiny target's configuration with other settings, random weights."""
    model = target.fresh_model()
    settings = model.config.to_dict() | config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return type(model)(type(model.config)(**settings)).eval()


def both(model, batch, each):
    """(losses, gradients by parameter) by autograd and written out."""
    model.requires_grad_(True)
    params = list(model.parameters())
    losses = example_losses(model, batch)
    theirs = torch.autograd.grad((losses * each).sum(), params)
    passes = Decoder.of(model, batch.input_ids.shape[1], gradients=True)
    assert passes is not None
    np.testing.assert_allclose(passes.losses(batch), losses.detach(), atol=2e-5, rtol=1e-5)
    with passes.training():
        values = passes.gradient(batch, each)
        found = passes.gradients()
        ours = [found[id(p)].clone() for p in params]
    return (losses.detach(), theirs), (values, ours)


@pytest.mark.parametrize("architecture", SERVED)
@pytest.mark.parametrize(("n", "longest"), [(1, 2), (1, 17), (9, 40), (30, 11)])
def test_losses_and_gradients_are_autograds(make_target, architecture, n, longest):
    model = make_target(architecture).fresh_model()
    tokens = drawn(n, longest, model.config.vocab_size)
    batch = pad(tokens, np.arange(n), 0)
    each = torch.linspace(-1, 2, n)
    (want, theirs), (got, ours) = both(model, batch, each)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(b.abs().max()) + 1e-7)


@pytest.mark.parametrize(
    "config",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
        {"rms_norm_eps": 0.1},
        {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}},
        {"tie_word_embeddings": False},
    ],
)
def test_settings_of_the_configuration_count(tiny_target, config):
    model = changed(tiny_target, **config)
    batch = pad(drawn(5, 20, model.config.vocab_size), np.arange(5), 0)
    (want, theirs), (got, ours) = both(model, batch, torch.ones(5))
    np.testing.assert_allclose(got, want, atol=2e-5)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(b.abs().max()) + 1e-7)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_other_architectures_have_none(make_target, architecture):
    assert Decoder.of(make_target(architecture).fresh_model(), 20) is None


def test_what_it_does_not_implement_falls_back(tiny_target, make_target):
    model = tiny_target.fresh_model()
    assert Decoder.of(model, 20) is not None
    assert Decoder.of(model, LONGEST + 1) is None
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert Decoder.of(model, 20) is None
    hook.remove()
    assert Decoder.of(model, 20) is not None
    assert Decoder.of(tiny_target.fresh_model().bfloat16(), 20) is None
    assert Decoder.of(changed(tiny_target, hidden_act="gelu"), 20) is None
    kinds = ["full_attention", "sliding_attention"]
    slid = changed(tiny_target, layer_types=kinds, use_sliding_window=True, sliding_window=4)
    assert Decoder.of(slid, 20) is None
    llama = make_target("llama")
    assert Decoder.of(changed(llama, attention_bias=True), 20) is None
    assert Decoder.of(changed(llama, mlp_bias=True), 20) is None


def test_a_model_that_computes_something_else_falls_back(tiny_target, monkeypatch):
    """The comparison, once per configuration, is what admits a model."""
    monkeypatch.setattr(decoder, "_agrees", {})
    genuine = decoder._normed
    monkeypatch.setattr(decoder, "_normed", lambda x, w, eps: genuine(x, w, eps + 1e-2))
    assert Decoder.of(tiny_target.fresh_model(), 20) is None
    monkeypatch.setattr(decoder, "_normed", genuine)
    assert Decoder.of(tiny_target.fresh_model(), 20) is None  # kept
    monkeypatch.setattr(decoder, "_agrees", {})
    assert Decoder.of(tiny_target.fresh_model(), 20) is not None


def test_a_wrong_gradient_falls_back_in_training_only(tiny_target, monkeypatch):
    monkeypatch.setattr(decoder, "_agrees", {})
    genuine = Decoder._attention_back
    monkeypatch.setattr(Decoder, "_attention_back", lambda *args: genuine(*args) * 1.01)
    assert Decoder.of(tiny_target.fresh_model(), 20, gradients=True) is None
    assert Decoder.of(tiny_target.fresh_model(), 20) is not None


def test_a_large_model_falls_back(tiny_target, monkeypatch):
    monkeypatch.setattr(decoder, "_LARGEST", 1000)
    assert Decoder.of(tiny_target.fresh_model(), 20) is None


@pytest.mark.parametrize("architecture", SERVED)
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(lr=1e-3, epochs=2, batch_size=12, weight_decay=0.1, eps=1e-4),
        Recipe(lr=1e-2, epochs=1, batch_size=9, optimizer="sgd", momentum=0.9, clip=0.1),
        Recipe(lr=1e-3, epochs=1, batch_size=36, clip=0.0, micro_batch=5, eps=1e-4),
        Recipe(lr=1e-2, epochs=2, batch_size=12, eps=1e-4, lora_rank=3),
        Recipe(lr=1e-2, batch_size=9, eps=1e-4, lora_rank=2, layers_to_transform=(1,)),
        Recipe(lr=1e-2, batch_size=9, eps=1e-4, lora_rank=2, lora_targets=("k_proj", "up_proj")),
    ],
)
def test_training_is_autograds(make_target, tiny_corpus, monkeypatch, architecture, recipe):
    target = make_target(architecture)
    tokens = target.tokenize(tiny_corpus[:36])
    weights = np.linspace(0, 1.5, 36)
    kept: list[dict[int, dict[str, torch.Tensor]]] = [{}, {}]
    models = []
    for trial in kept:
        model = target.fresh_model()
        finetune(
            model, tokens, recipe, 3, target.pad_id, weights=weights, keep={0, 2},
            on_checkpoint=lambda step, m, trial=trial: trial.__setitem__(
                step, {n: p.detach().clone() for n, p in m.named_parameters()}
            ),
        )  # fmt: skip
        models.append(dict(model.named_parameters()))
        monkeypatch.setattr(Decoder, "of", lambda *_, **__: None)
    for name, p in models[0].items():
        np.testing.assert_allclose(p.detach(), models[1][name].detach(), atol=2e-5, err_msg=name)
        for step in kept[1]:
            np.testing.assert_allclose(kept[0][step][name], kept[1][step][name], atol=2e-5)
    assert len({p.untyped_storage().data_ptr() for p in models[0].values()}) == len(models[0])


def lora_of(model, **settings):
    """Adapters whose B is not zero, so that A has gradients too."""
    lora = LoRA(model, 3, 6.0, settings.get("targets", ()), 0, settings.get("blocks", ()))
    generator = torch.Generator().manual_seed(1)
    for _, _, b in lora.layers:
        b.data.normal_(0, 0.05, generator=generator)
    return lora


@pytest.mark.parametrize("architecture", SERVED)
@pytest.mark.parametrize(
    "settings", [{}, {"blocks": (1,)}, {"targets": ("v_proj", "gate_proj", "down_proj")}]
)
@pytest.mark.parametrize("cached", [False, True])
def test_gradients_of_adapters_are_autograds(make_target, architecture, settings, cached):
    target = make_target(architecture)
    tokens = drawn(9, 30, target.model().config.vocab_size)
    batch, each = pad(tokens, np.arange(9), 0), torch.linspace(-1, 2, 9)

    hooked = target.fresh_model()
    with lora_of(hooked, **settings).attached() as lora:
        losses = example_losses(hooked, batch)
        theirs = torch.autograd.grad((losses * each).sum(), lora.parameters())

    model = target.fresh_model()
    written, lora = Decoder.of(model, 30, gradients=True), lora_of(model, **settings)
    below = States(lora.first, written.states(batch, lora.first)) if cached else None
    with lora.attached(merged=True), written.adapting(lora):
        lora.merge()
        written.clear()
        got = written.gradient(batch, each, below)
        ours = [p.grad.clone() for p in lora.parameters()]
    np.testing.assert_allclose(got, losses.detach(), atol=2e-5, rtol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(b.abs().max()) + 1e-7)


@pytest.mark.parametrize("architecture", SERVED)
def test_frozen_layers_are_computed_once(make_target, tiny_corpus, monkeypatch, architecture):
    """Training and losses from the states below the first adapted layer, and from the tokens."""
    target = make_target(architecture)
    tokens = target.tokenize(tiny_corpus[:36])
    recipe = Recipe(lr=1e-2, batch_size=9, eps=1e-4, lora_rank=2, layers_to_transform=(1,))
    base = target.fresh_model()
    below = states_below(base, tokens, recipe, target.pad_id)
    assert below is not None
    assert below.first == 1
    assert [s.shape[1] for s in below.of] == [len(t) for t in tokens]
    np.testing.assert_allclose(
        target.losses(base, tokens, below=below), target.losses(base, tokens), atol=2e-5
    )
    some = [30, 2, 17, 5, 8, 21, 11, 3, 33, 1]
    chosen = [tokens[i] for i in some]
    plain = finetune(target.fresh_model(), chosen, recipe, 0, target.pad_id)
    genuine, through = Decoder._through, []
    monkeypatch.setattr(
        Decoder, "_through", lambda self, i, *rest: through.append(i) or genuine(self, i, *rest)
    )
    cached = finetune(target.fresh_model(), chosen, recipe, 0, target.pad_id, below=below.at(some))
    found = target.losses(cached, tokens, below=below)
    assert set(through) == {1}
    np.testing.assert_allclose(found, target.losses(plain, tokens), atol=5e-5)
    assert not np.allclose(found, target.losses(base, tokens), atol=1e-2)


def test_states_of_another_layer_are_refused(tiny_target, tiny_corpus):
    tokens = tiny_target.tokenize(tiny_corpus[:6])
    upper = Recipe(lora_rank=2, layers_to_transform=(1,))
    below = states_below(tiny_target.fresh_model(), tokens, upper, tiny_target.pad_id)
    with pytest.raises(ValueError, match="layer 1"):
        finetune(
            tiny_target.fresh_model(), tokens, Recipe(lora_rank=2, epochs=1), 0,
            tiny_target.pad_id, below=below,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "recipe"),
    [
        ("gpt2", Recipe(lora_rank=2, layers_to_transform=(1,))),  # not written out
        ("qwen2", Recipe(lora_rank=2, layers_to_transform=(0,))),  # nothing lies below
        ("qwen2", Recipe(lora_rank=2, layers_to_transform=(1,), precision="bfloat16")),
        ("qwen2", Recipe()),
    ],
)
def test_no_states_are_kept_where_nothing_is_saved(make_target, tiny_corpus, architecture, recipe):
    target = make_target(architecture)
    tokens = target.tokenize(tiny_corpus[:4])
    assert states_below(target.fresh_model(), tokens, recipe, target.pad_id) is None


def test_an_error_leaves_the_base(tiny_target, tiny_corpus):
    """Adapters that are merged throughout are taken out again when training fails."""
    model, tokens = tiny_target.fresh_model(), tiny_target.tokenize(tiny_corpus[:12])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    def stop(done, total, value):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(
            model, tokens, Recipe(lr=1e-2, batch_size=4, lora_rank=2), 0, tiny_target.pad_id, stop
        )
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_frozen_weights_are_left_to_autograd(tiny_target, tiny_corpus):
    model = tiny_target.fresh_model()
    model.model.layers[0].requires_grad_(True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    finetune(model, tiny_target.tokenize(tiny_corpus[:12]), Recipe(epochs=1), 0, tiny_target.pad_id)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(n.startswith("model.layers.0.") for n in moved)


def test_training_backs_off_when_memory_runs_out(tiny_target, tiny_corpus, monkeypatch):
    tokens = tiny_target.tokenize(tiny_corpus[:36])
    recipe = Recipe(lr=1e-2, epochs=1, batch_size=12, clip=0.0, micro_batch=11)
    whole = tiny_target.losses(
        finetune(tiny_target.fresh_model(), tokens, recipe, 0, tiny_target.pad_id), tokens
    )
    genuine, sizes, told = Decoder.gradient, [], []

    def small(self, batch, each, below):
        losses = genuine(self, batch, each, below)  # it has added its gradient already
        if len(each) > 4:
            raise MemoryError
        sizes.append(len(each))
        return losses

    monkeypatch.setattr(Decoder, "gradient", small)
    model = tiny_target.fresh_model()
    finetune(model, tokens, recipe, 0, tiny_target.pad_id, on_backoff=told.append)
    assert told[-1] <= 4
    assert sum(sizes) >= 36
    np.testing.assert_allclose(tiny_target.losses(model, tokens), whole, atol=2e-4)


def test_losses_back_off_when_memory_runs_out(tiny_target, tiny_queries, monkeypatch):
    # A fresh one: other tests may have left hooks on the shared model, which rule these passes out.
    tokens, model = tiny_target.tokenize(tiny_queries), tiny_target.fresh_model()
    expected = tiny_target.losses(model, tokens)
    genuine, sizes = Decoder.losses, []

    def small(self, batch, below):
        sizes.append(len(batch.index))
        if sizes[-1] > 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return genuine(self, batch, below)

    monkeypatch.setattr(Decoder, "losses", small)
    np.testing.assert_allclose(tiny_target.losses(model, tokens), expected, rtol=1e-5)
    assert sizes[0] > 2


def test_a_model_that_diverged_says_nothing_about_others(tiny_target, monkeypatch):
    monkeypatch.setattr("tdabench.targets.decoder._agrees", {})
    broken, sound = tiny_target.fresh_model(), tiny_target.fresh_model()
    next(broken.parameters()).data.fill_(float("nan"))
    assert Decoder.of(broken, 8) is None
    assert Decoder.of(sound, 8) is not None
    assert Decoder.of(broken, 8) is not None  # known by now


def test_an_adapter_at_work_is_not_passed_over(tiny_target, tiny_queries):
    """A LoRA is a set of hooks: losses within it are the adapted model's."""
    tokens, model = tiny_target.tokenize(tiny_queries), tiny_target.fresh_model()
    plain = tiny_target.losses(model, tokens)
    with LoRA(model, 2, 4.0, (), 0).attached() as lora:
        for p in lora.parameters():
            p.data.fill_(0.1)
        adapted = tiny_target.losses(model, tokens)
        with lora.merged():
            pass
    assert not np.allclose(plain, adapted, atol=1e-3)
    np.testing.assert_allclose(tiny_target.losses(model, tokens), adapted, atol=1e-4)


@pytest.mark.parametrize("linear", [None, LINEAR], ids=["mm", "oneDNN"])
def test_products_of_any_layout(monkeypatch, linear):
    monkeypatch.setattr(products, "_linear", lambda: linear)
    a, b = torch.randn(70, 33, dtype=torch.float32), torch.randn(33, 65)
    want = (a.double() @ b.double()).float()
    for x in (a, a.T.contiguous().T):
        for y in (b, b.T.contiguous().T):
            np.testing.assert_allclose(product(x, y), want, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(2, 300), min_size=1, max_size=60),
    st.sampled_from([0, 1, 3, 24]),
    st.sampled_from([64, 300, 768]),
)
def test_a_cut_is_a_partition_by_length(lengths, most, tokens):
    parts = cut(lengths, most, tokens)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    sizes = np.array(lengths)
    ends = [(sizes[p].min(), sizes[p].max()) for p in parts]
    assert all(a[1] <= b[0] for a, b in pairwise(ends))
    for p in parts:
        assert len(p) == 1 or len(p) * sizes[p].max() <= tokens
        assert not most or len(p) <= most


def test_a_cut_saves_padding():
    """Two lengths far apart are two parts; equal ones are one."""
    assert [len(p) for p in cut([16] * 20 + [64] * 4)] == [20, 4]
    assert [len(p) for p in cut([12] * 30)] == [30]
