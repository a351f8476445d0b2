"""Batches of similar length, and halving them when memory runs out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tdabench.targets.target as target_module
from tdabench.data.examples import Corpus
from tdabench.targets.batches import batch_places, over_batches
from tdabench.targets.decoder import Decoder
from tdabench.targets.target import Target


def test_batches_are_of_similar_length_and_hold_everything_once() -> None:
    lengths = np.random.default_rng(0).integers(0, 50, 200)
    batches = list(batch_places(lengths, tokens_a_batch=120, max_examples=7))
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    assert (np.diff(lengths[np.concatenate(batches)]) <= 0).all()
    for index in batches:
        assert len(index) <= 7
        assert len(index) == 1 or len(index) * lengths[index].max() <= 120
    assert [b.tolist() for b in batch_places([5], 1)] == [[0]]  # too long for any batch: alone
    assert not list(batch_places([], 10))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("out of memory")]
)
def test_a_batch_that_does_not_fit_is_halved_from_then_on(error: Exception) -> None:
    lengths = np.arange(30)
    told: list[int] = []
    asked: list[int] = []

    def compute(index: np.ndarray) -> np.ndarray:
        asked.append(len(index))
        if len(index) > 4:
            raise error
        return lengths[index] * 2

    found = list(over_batches(lengths, compute, 10_000, 16, told.append))
    assert told == [8, 4]
    assert asked[:3] == [16, 8, 4]
    assert max(asked[2:]) == 4  # it does not try the larger ones again
    assert sorted(np.concatenate([i for i, _ in found]).tolist()) == list(range(30))
    for index, result in found:
        np.testing.assert_array_equal(result, lengths[index] * 2)
    assert not list(over_batches([], compute, 10))


def test_what_one_example_or_another_fault_raises_is_passed_on() -> None:
    def full(index: np.ndarray) -> None:
        raise MemoryError

    def broken(index: np.ndarray) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(MemoryError):
        list(over_batches([3, 2, 1], full, 100))
    with pytest.raises(RuntimeError, match="shapes differ"):
        list(over_batches([3, 2, 1], broken, 100))


def test_losses_are_the_same_in_halved_batches(
    tiny_target: Target, tiny_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "of", lambda *_, **__: None)  # see test_decoder.py for its own
    model, tokens = tiny_target.model("base"), tiny_target.tokenize(tiny_corpus)
    want = tiny_target.losses(model, tokens)
    genuine, sizes = target_module.example_losses, []

    def scarce(model, batch):
        if len(batch.index) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch.index))
        return genuine(model, batch)

    monkeypatch.setattr(target_module, "example_losses", scarce)
    np.testing.assert_allclose(tiny_target.losses(model, tokens), want, rtol=1e-5)
    assert max(sizes) <= 6


def test_the_mean_over_response_tokens(tiny_target: Target, tiny_corpus: Corpus) -> None:
    (batch,) = tiny_target.batches(tiny_target.tokenize(tiny_corpus[:5]))
    values = torch.randn(3, len(batch.places))
    rows = batch.rows.numpy()
    want = np.stack([values.numpy()[:, rows == i].mean(1) for i in range(5)], axis=1)
    np.testing.assert_allclose(batch.means(values), want, rtol=1e-5)
    np.testing.assert_allclose(batch.means(values[0]), want[0], rtol=1e-5)
