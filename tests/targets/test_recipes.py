"""Recipes: each field against a closed form, another spelling of it, or the library that has it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tdabench.errors import UsageError
from tdabench.targets import Recipe, example_losses, finetune
from tdabench.targets.batches import pad
from tdabench.targets.decoder import Decoder
from tdabench.targets.lora import LoRA
from tdabench.targets.training import batch_order, micro_batches

PLAIN = {"lr": 1e-2, "epochs": 1, "batch_size": 12, "schedule": "constant", "clip": 0.0}


@pytest.fixture(scope="module")
def data(tiny_target, tiny_corpus):
    return tiny_target.tokenize(tiny_corpus[:36])


def train(target, data, recipe, seed=0, **kw):
    start = kw.pop("model", None) or target.fresh_model()
    return finetune(start, data, recipe, seed, target.pad_id, **kw)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def gradients(target, data, batch):
    """Of the mean loss over the examples at `batch`, at the base checkpoint, by name."""
    model = target.fresh_model().requires_grad_(True)
    (example_losses(model, pad(data, batch, target.pad_id)).sum() / len(batch)).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def test_what_is_recorded_of_the_default_never_grows():
    """Plan keys and records of truths made before a field was added must stay as they are."""
    assert Recipe().as_dict() == {
        "lr": 1e-3, "epochs": 2, "batch_size": 32, "schedule": "linear", "warmup": 0.0,
        "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "clip": 1.0,
    }  # fmt: skip
    odd = Recipe(optimizer="sgd", lora_rank=2, lora_targets=["q_proj"], keep=[5, 0, 5])
    assert {k: v for k, v in odd.as_dict().items() if k not in Recipe().as_dict()} == {
        "optimizer": "sgd", "lora_rank": 2, "lora_targets": ["q_proj"], "keep": [0, 5],
    }  # fmt: skip
    assert Recipe(**odd.as_dict()) == odd


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", "cosin"), ("optimizer", "adam"), ("precision", "bf17"), ("epochs", 0),
        ("batch_size", 0), ("lr", 0.0), ("lr", float("nan")), ("warmup", 1.5), ("max_steps", -1),
        ("momentum", 0.9), ("keep", (-1,)), ("micro_batch", -2),
        ("layers_to_transform", (1,)),
    ],
)  # fmt: skip
def test_values_that_mean_nothing_are_refused(field, value):
    with pytest.raises(UsageError, match=field):
        Recipe(**{field: value})


def test_steps_instead_of_epochs():
    recipe = Recipe(epochs=1, batch_size=4, max_steps=7)
    assert recipe.steps(10) == 7
    batches = list(batch_order(10, recipe, seed=1))
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2, 4]
    long = list(batch_order(10, Recipe(epochs=3, batch_size=4), seed=1))
    assert all((a == b).all() for a, b in zip(batches, long))
    assert list(batch_order(0, recipe, seed=1)) == []


def test_cosine_schedule():
    recipe = Recipe(lr=2.0, schedule="cosine", warmup=0.2)
    assert [recipe.lr_at(s, 10) for s in (0, 1, 2, 6)] == pytest.approx([1.0, 2.0, 2.0, 1.0])
    assert recipe.lr_at(9, 10) == pytest.approx(1 + np.cos(np.pi * 7 / 8))


def test_sgd_is_the_textbooks(tiny_target, data):
    recipe = Recipe(**PLAIN, optimizer="sgd", momentum=0.5)
    batch = next(batch_order(12, recipe, 3))
    before, after = weights(tiny_target.model()), weights(train(tiny_target, data[:12], recipe, 3))
    for name, g in gradients(tiny_target, data, batch).items():
        torch.testing.assert_close(after[name], before[name] - 1e-2 * g, rtol=1e-4, atol=1e-6)

    # The second step adds half of the first one's direction.
    steps: dict[int, dict] = {}
    train(
        tiny_target, data[:24], recipe, 3, keep=range(3),
        on_checkpoint=lambda k, m: steps.update({k: weights(m)}),
    )  # fmt: skip
    second = list(batch_order(24, recipe, 3))[1]
    model = tiny_target.fresh_model().requires_grad_(True)
    model.load_state_dict(steps[1], strict=False)
    (example_losses(model, pad(data, second, tiny_target.pad_id)).mean()).backward()
    name, p = next((n, p) for n, p in model.named_parameters() if "q_proj.weight" in n)
    expected = steps[1][name] + 0.5 * (steps[1][name] - steps[0][name]) - 1e-2 * p.grad
    torch.testing.assert_close(steps[2][name], expected, rtol=1e-4, atol=1e-6)


def test_accumulating_gradients_changes_rounding_only(tiny_target, data):
    parts = micro_batches(data, np.arange(12), most=5)
    assert sorted(len(p) for p in parts) == [2, 5, 5]
    assert sorted(np.concatenate(parts).tolist()) == list(range(12))
    whole = tiny_target.losses(train(tiny_target, data, Recipe(**PLAIN)), data)
    split = tiny_target.losses(train(tiny_target, data, Recipe(**PLAIN, micro_batch=5)), data)
    np.testing.assert_allclose(split, whole, atol=2e-4)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_training_backs_off_when_memory_runs_out(tiny_target, data, monkeypatch, where):
    from tdabench.targets import training as module

    monkeypatch.setattr(Decoder, "of", lambda *_, **__: None)  # see test_decoder.py for its own
    whole = tiny_target.losses(train(tiny_target, data, Recipe(**PLAIN)), data)
    original, sizes, told = module.example_losses, [], []

    def full(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def small(model, batch):
        n = len(batch.input_ids)
        sizes.append(n)
        losses = original(model, batch)
        if n > 4 and where == "forward":
            raise MemoryError
        if n > 4:
            losses.register_hook(full)
        return losses

    patch = pytest.MonkeyPatch()
    patch.setattr(module, "example_losses", small)
    # The second part of the first try runs out after the first has left its gradient.
    recipe = Recipe(**PLAIN, micro_batch=11)
    model = train(tiny_target, data, recipe, on_backoff=told.append)
    patch.undo()
    assert told == [5, 2]
    assert [sizes.count(11), sizes.count(5)] == [1, 1]
    assert sum(n for n in sizes if n <= 4) == len(data)
    np.testing.assert_allclose(tiny_target.losses(model, data), whole, atol=2e-4)

    def never(model, batch):
        raise MemoryError

    monkeypatch.setattr(module, "example_losses", never)
    with pytest.raises(MemoryError):
        train(tiny_target, data, recipe)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_recomputing_activations_changes_nothing(make_target, data, architecture):
    target = make_target(architecture)
    calls = []

    def run(recipe):
        model = target.fresh_model()
        layer = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[0]
        first = next(m for m in layer.modules() if not list(m.children()))
        first.register_forward_hook(lambda *_: calls.append(recipe.checkpointing))
        train(target, data, recipe, model=model)
        assert not any(m.training for m in model.modules())
        return weights(model)

    plain, again = run(Recipe(**PLAIN)), run(Recipe(**PLAIN, checkpointing=True))
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=0, atol=1e-7)
    assert calls.count(True) == 2 * calls.count(False) > 0


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains_float32_weights(tiny_target, data, precision):
    model = train(tiny_target, data, Recipe(**PLAIN, precision=precision))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    mixed, plain = (
        tiny_target.losses(m, data) for m in (model, train(tiny_target, data, Recipe(**PLAIN)))
    )
    start = tiny_target.losses(tiny_target.model(), data)
    assert np.abs(mixed - plain).mean() < 0.1 * np.abs(start - plain).mean()
    assert not np.array_equal(mixed, plain)


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 2}])
def test_a_checkpoint_kept_is_where_a_shorter_run_ends(tiny_target, data, lora):
    recipe = Recipe(**PLAIN, **lora, keep=(0, 2))
    kept: dict[int, dict] = {}
    end = train(
        tiny_target, data, recipe, keep=[3], on_checkpoint=lambda k, m: kept.update({k: weights(m)})
    )
    assert sorted(kept) == [0, 2, 3]
    short = weights(train(tiny_target, data, Recipe(**PLAIN, **lora, max_steps=2)))
    for name, w in weights(tiny_target.model()).items():
        assert torch.equal(kept[0][name], w)
        assert torch.equal(kept[2][name], short[name])
        assert torch.equal(kept[3][name], weights(end)[name])


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_one_step_of_lora(make_target, data, architecture):
    """B begins at zero, so one step of SGD moves W by -lr (alpha / rank)^2 G A'A and no other."""
    target = make_target(architecture)
    name = {"qwen2": "q_proj", "gpt2": "attn.c_attn"}[architecture]
    recipe = Recipe(**PLAIN, optimizer="sgd", lora_rank=3, lora_alpha=6.0, lora_targets=(name,))
    before, after = weights(target.model()), weights(train(target, data[:12], recipe, 5))
    with LoRA(target.fresh_model(), 3, 6.0, (name,), seed=5).attached() as lora:
        first = [a.detach() for _, a, _ in lora.layers]
    g = gradients(target, data[:12], np.arange(12))
    touched = [n for n in before if n.endswith(f"{name}.weight")]
    assert len(touched) == len(first) == 2
    for n, a in zip(touched, first):
        grad = g[n] if architecture == "qwen2" else g[n].T
        delta = -1e-2 * 4 * grad @ a.T @ a
        delta = delta if architecture == "qwen2" else delta.T
        torch.testing.assert_close(after[n] - before[n], delta, rtol=1e-2, atol=1e-7)
    assert all(torch.equal(after[n], before[n]) for n in before if n not in touched)


def test_lora_takes_all_linear_layers_but_the_output_and_leaves_no_hook(make_target, data):
    target = make_target("llama")  # its output layer has weights of its own
    model = target.fresh_model()
    with LoRA(model, 2, 4.0, (), seed=0).attached() as lora:
        assert len(lora.layers) == 2 * 7
        assert model.lm_head not in [m for m, _, _ in lora.layers]
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(UsageError, match="q_projj"):
        train(target, data, Recipe(**PLAIN, lora_rank=2, lora_targets=("q_projj",)))


@pytest.mark.parametrize("blocks", [(), (1,)])
def test_lora_is_pefts(make_target, data, blocks):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    target = make_target("llama")
    recipe = Recipe(**PLAIN, lora_rank=4, lora_alpha=8.0, layers_to_transform=blocks)
    ours = target.losses(train(target, data, recipe, 7), data)

    model = target.fresh_model()
    with LoRA(target.fresh_model(), 4, 8.0, (), seed=7, blocks=blocks).attached() as lora:
        first = [a.detach().clone() for _, a, _ in lora.layers]
    config = peft.LoraConfig(
        r=4, lora_alpha=8.0, layers_to_transform=list(blocks) or None,
        target_modules=[
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ],
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config)
    drawn = [p for n, p in wrapped.named_parameters() if "lora_A" in n]
    assert len(drawn) == len(first) == (7 if blocks else 14)
    for p, a in zip(drawn, first):
        p.data.copy_(a)
    finetune(wrapped.base_model.model, data, Recipe(**PLAIN), 7, target.pad_id)
    theirs = target.losses(wrapped.merge_and_unload(), data)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_layers_to_transform_leaves_the_others_alone(make_target, data, architecture):
    target = make_target(architecture)
    recipe = Recipe(**PLAIN, lora_rank=2, layers_to_transform=[1])
    before, after = weights(target.model()), weights(train(target, data[:12], recipe))
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved
    assert all(".1." in n for n in moved)
    with pytest.raises(UsageError, match=r"no layer 2.*") as e:
        train(target, data, Recipe(**PLAIN, lora_rank=2, layers_to_transform=(1, 2)))
    assert "0 to 1" in str(e.value)


def test_dropout_stays_off_and_no_global_stream_moves(make_target, data):
    target = make_target("gpt2")
    assert target.fresh_model().config.resid_pdrop > 0
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = weights(train(target, data, Recipe(**PLAIN)))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    again = weights(train(target, data, Recipe(**PLAIN)))
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_from_scratch(tiny_target):
    one, same, other = (weights(tiny_target.fresh_model("scratch", s)) for s in (1, 1, 2))
    base = weights(tiny_target.model())
    q = next(n for n in one if "q_proj.weight" in n)
    assert torch.equal(one[q], same[q])
    assert not torch.equal(one[q], other[q])
    assert not torch.equal(one[q], base[q])
    assert tiny_target.fingerprint_of("scratch") != tiny_target.fingerprint_of("base")


def test_a_recipe_is_changed_by_words_and_says_what_differs():
    base = Recipe(lr=2e-3, epochs=3)
    assert base.changed("") == base
    changed = base.changed("lr=1e-4, lora_targets=q_proj,v_proj,lora_rank=8")
    assert changed == Recipe(lr=1e-4, epochs=3, lora_rank=8, lora_targets=("q_proj", "v_proj"))
    assert changed.differs_from(base).startswith("lr 0.0001 (0.002), lora_rank 8 (0)")
    assert base.differs_from(Recipe(lr=2e-3, epochs=3, keep=(5,))) == ""
    assert Recipe().changed(str(base)) == base
    assert str(Recipe()) == "the default recipe"
    for text, what in (
        ("lr", "not have the form NAME=VALUE"),
        ("rate=1", "unknown field"),
        ("lr=fast", "not of the type float"),
        ("epochs=0", "epochs = 0"),
    ):
        with pytest.raises(UsageError, match=what):
            base.changed(text)


def test_another_recipe_is_another_target_but_the_same_start(tiny_target):
    other = replace(tiny_target, recipe=Recipe(lr=5e-4))
    assert other.fingerprint != tiny_target.fingerprint
    assert other.fingerprint_of("base") == tiny_target.fingerprint_of("base")
    assert replace(tiny_target, fraction=0.5).fingerprint != tiny_target.fingerprint
    assert other.describe()["recipe"]["lr"] == 5e-4
    with pytest.raises(UsageError, match="fraction"):
        replace(tiny_target, fraction=0.0)
