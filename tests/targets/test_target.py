"""Targets: the loss against the model's own, independence of batching, truncation, training."""

import pickle

import numpy as np
import pytest
import torch

from tdabench.data import Example
from tdabench.errors import DataError, TdabenchError, UsageError
from tdabench.targets import Recipe, Target, example_losses, finetune
from tdabench.targets.batches import Batch, pad
from tdabench.targets.target import load_weights, save_weights
from tdabench.targets.training import batch_order, micro_batches


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2", "gpt_neox"])
def test_the_loss_is_the_models_own_one_example_at_a_time(make_target, tiny_queries, architecture):
    target = make_target(architecture)
    model = target.model("warm")
    tokens = target.tokenize(tiny_queries)
    expected = []
    for t in tokens:
        ids = torch.tensor(t.ids)[None]
        labels = ids.clone()
        labels[:, : t.start] = -100
        expected.append(float(model(input_ids=ids, labels=labels).loss))
    for width in (64, 10_000):
        got = target.losses(model, tokens, tokens_a_batch=width)
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_tokens_end_with_end_of_text_and_start_after_the_prompt(tiny_target):
    example = Example("a", "Copy: amber", "amber")
    (t,) = tiny_target.tokenize([example])
    tokenizer = tiny_target.tokenizer
    assert t.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(t.ids[: t.start]) == "Q: Copy: amber\nA:"
    assert tokenizer.decode(t.ids[t.start : -1]) == " amber"
    (p,) = tiny_target.tokenize([example], role="prompt")
    assert len(p) == p.start == t.start
    assert tiny_target.tokenize([]) == []


def test_an_example_longer_than_the_context(tiny_target):
    long = Example("long-one", "word " * 400, "short")
    with pytest.raises(DataError, match=r"'long-one'.*128.*truncate"):
        tiny_target.tokenize([long])
    cutting = Target(**{**tiny_target.__getstate__(), "truncate": "prompt-left"})
    (t,) = cutting.tokenize([long])
    assert len(t) == 128
    assert cutting.tokenizer.decode(t.ids[t.start : -1]) == " short"
    (t,) = cutting.tokenize([Example("b", "hi", "word " * 400)])
    assert len(t) == 128
    assert t.start == 1


def test_unknown_checkpoint_template_and_rule(tiny_target):
    with pytest.raises(UsageError, match="warm"):
        tiny_target.model("wram")
    with pytest.raises(UsageError, match="template"):
        Target("x", tiny_target.folder, template="plan")
    with pytest.raises(UsageError, match="truncation"):
        Target("x", tiny_target.folder, truncate="middle")


def test_damaged_and_missing_weights(tiny_target, tmp_path):
    model = tiny_target.fresh_model("base")
    with pytest.raises(DataError, match="missing"):
        load_weights(model, tmp_path / "no.safetensors")
    whole = (tiny_target.folder / "base.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    with pytest.raises(DataError, match="truncated"):
        load_weights(model, tmp_path / "cut.safetensors")
    from safetensors.torch import load, save

    state = load(whole)
    state.pop(next(k for k in state if "q_proj" in k))
    (tmp_path / "less.safetensors").write_bytes(save(state))
    with pytest.raises(DataError, match="q_proj"):
        load_weights(model, tmp_path / "less.safetensors")


def test_weights_round_trip_exactly_once_rounded(tiny_target, tmp_path):
    model = tiny_target.fresh_model("warm")
    save_weights(model, tmp_path / "again.safetensors")
    other = tiny_target.fresh_model("base")
    load_weights(other, tmp_path / "again.safetensors")
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)


def test_fresh_models_leave_global_randomness_alone(tiny_target):
    before = torch.random.get_rng_state()
    tiny_target.fresh_model("base")
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_target_travels_without_its_models(tiny_target):
    tiny_target.model("base")
    assert len(pickle.dumps(tiny_target)) < 2000


def test_fingerprint_follows_the_template(tiny_target):
    other = Target(**{**tiny_target.__getstate__(), "template": "alpaca"})
    assert other.fingerprint != tiny_target.fingerprint


def test_splitting_a_batch_by_length_changes_no_gradient(tiny_target, tiny_corpus):
    tokens = tiny_target.tokenize(tiny_corpus)
    batch = np.arange(30)
    parts = micro_batches(tokens, batch)
    assert sorted(np.concatenate(parts).tolist()) == batch.tolist()

    def gradient(pieces):
        model = tiny_target.fresh_model("base").requires_grad_(True)
        for piece in pieces:
            example_losses(model, pad(tokens, piece, tiny_target.pad_id)).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole, split = gradient([batch]), gradient([batch[:11], batch[11:]])
    assert float((whole - split).norm() / whole.norm()) < 1e-5


def test_batch_order_is_a_permutation_an_epoch():
    recipe = Recipe(epochs=3, batch_size=4)
    batches = list(batch_order(10, recipe, seed=1))
    assert [len(b) for b in batches] == [4, 4, 2] * 3
    epochs = np.concatenate(batches).reshape(3, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert (epochs[0] != epochs[1]).any()
    again = np.concatenate(list(batch_order(10, recipe, seed=1))).reshape(3, 10)
    assert (again == epochs).all()


def test_learning_rate_schedule():
    recipe = Recipe(lr=1.0, warmup=0.2)
    assert [round(recipe.lr_at(s, 10), 3) for s in range(10)] == [
        0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125,
    ]  # fmt: skip
    assert Recipe(lr=1.0, schedule="constant").lr_at(9, 10) == 1.0


def test_finetuning_learns_and_repeats_exactly(tiny_target, tiny_corpus):
    tokens = tiny_target.tokenize(tiny_corpus)
    recipe = Recipe(lr=3e-3, epochs=2, batch_size=10)

    def run(seed):
        model = finetune(tiny_target.fresh_model(), tokens, recipe, seed, tiny_target.pad_id)
        return tiny_target.losses(model, tokens)

    before = tiny_target.losses(tiny_target.model(), tokens).mean()
    assert run(0).mean() < before - 0.1
    assert np.array_equal(run(0), run(0))
    assert not np.array_equal(run(0), run(1))


def test_finetuning_on_nothing_changes_nothing(tiny_target, tiny_queries):
    tokens = tiny_target.tokenize(tiny_queries)
    model = finetune(tiny_target.fresh_model(), [], Recipe(), 0, tiny_target.pad_id)
    assert np.array_equal(
        tiny_target.losses(model, tokens), tiny_target.losses(tiny_target.model(), tokens)
    )


def test_a_diverging_run_is_named(tiny_target, tiny_corpus):
    tokens = tiny_target.tokenize(tiny_corpus)
    with pytest.raises(TdabenchError, match="loss became"):
        finetune(
            tiny_target.fresh_model(), tokens, Recipe(lr=1e30, clip=0, epochs=3), 0,
            tiny_target.pad_id,
        )  # fmt: skip


def test_a_batch_knows_its_response_tokens_wherever_it_is(tiny_target, tiny_corpus):
    tokens = tiny_target.tokenize(tiny_corpus)
    batch = next(tiny_target.batches(tokens, 512))
    moved = batch.to("cpu").numbered(batch.index + 100)
    np.testing.assert_array_equal(moved.index, batch.index + 100)
    for b in (batch, moved):
        torch.testing.assert_close(b.gold, b.input_ids[:, 1:][b.loss_mask])
        torch.testing.assert_close(b.rows, b.loss_mask.nonzero()[:, 0])
        real = b.input_ids.flatten()[b.real_tokens]
        assert real.tolist() == [i for row in batch.index for i in tokens[row].ids]
        assert not b.padded_left
    assert Batch(
        batch.index, batch.input_ids, batch.attention_mask.flip(1), batch.loss_mask
    ).padded_left  # some are shorter than the longest
