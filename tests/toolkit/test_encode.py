"""The shared encoder: order, masks, batch independence, closed forms against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from tdabench.data.examples import Corpus, Example
from tdabench.errors import UsageError
from tdabench.targets.target import Target
from tdabench.toolkit.encode import (
    context_length,
    encode_texts,
    pooled_hidden_states,
    unit_rows,
)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A random two-layer BERT whose padding would show if it were not masked."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghijklmnopqrst"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]")
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(config).eval()
    return model, tokenizer


TEXTS = ["a b c", "d", "e f g h i j", "a b c", "k l", "m n o p q r s t"]


def by_hand(model, tokenizer, text, pooling):
    import torch

    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.inference_mode():
        h = model(input_ids=ids).last_hidden_state[0].numpy()  # [t, d]
    w = {"mean": np.ones(len(h)), "position": np.arange(1, len(h) + 1)}.get(pooling)
    if w is None:
        return h[0] if pooling == "cls" else h[-1]
    return (w[:, None] * h).sum(0) / w.sum()


@pytest.mark.parametrize("pooling", ["mean", "position", "cls", "last"])
@pytest.mark.parametrize("tokens_a_batch", [1, 17, 8192, None])
def test_pooling_equals_a_loop_without_padding(bert, pooling, tokens_a_batch):
    model, tokenizer = bert
    got = encode_texts(model, tokenizer, TEXTS, pooling=pooling, tokens_a_batch=tokens_a_batch)
    want = np.stack([by_hand(model, tokenizer, t, pooling) for t in TEXTS])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_batches_are_halved_when_memory_runs_out(bert, monkeypatch):
    from tdabench.toolkit import encode as module

    model, tokenizer = bert
    want = encode_texts(model, tokenizer, TEXTS)
    original, sizes, most = module.last_states, [], 2

    def small(model, input_ids, attention_mask, layer):
        sizes.append(len(input_ids))
        if len(input_ids) > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return original(model, input_ids, attention_mask, layer)

    monkeypatch.setattr(module, "last_states", small)
    np.testing.assert_allclose(encode_texts(model, tokenizer, TEXTS), want, atol=1e-6)
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]
    most = 0
    with pytest.raises(RuntimeError, match="allocate memory"):
        encode_texts(model, tokenizer, TEXTS)


def test_order_of_texts_is_kept(bert):
    model, tokenizer = bert
    order = [4, 2, 0, 5, 1, 3]
    straight = encode_texts(model, tokenizer, TEXTS)
    np.testing.assert_allclose(
        encode_texts(model, tokenizer, [TEXTS[i] for i in order]), straight[order], atol=1e-6
    )
    assert len({tuple(np.round(r, 4)) for r in straight}) == 5  # one text occurs twice


def test_windows_do_not_show(bert, monkeypatch):
    model, tokenizer = bert
    whole = encode_texts(model, tokenizer, TEXTS)
    monkeypatch.setattr("tdabench.toolkit.encode._WINDOW", 2)
    seen = []
    np.testing.assert_allclose(
        encode_texts(model, tokenizer, TEXTS, progress=lambda d, t: seen.append((d, t))),
        whole,
        atol=1e-6,
    )
    assert seen[-1] == (6, 6)


def test_long_text_is_cut_at_the_limit(bert):
    model, tokenizer = bert
    long = " ".join("abcdefghijklmnopqrst")
    assert context_length(model, tokenizer) == 12
    cut = encode_texts(model, tokenizer, [long, "a"])  # would overrun 12 positions
    np.testing.assert_allclose(
        cut[0], encode_texts(model, tokenizer, [" ".join("abcdefghij")])[0], atol=1e-6
    )
    short = encode_texts(model, tokenizer, [long], max_length=4)
    np.testing.assert_allclose(short, encode_texts(model, tokenizer, ["a b"]), atol=1e-6)


def test_empty_input_and_normalising(bert):
    model, tokenizer = bert
    assert encode_texts(model, tokenizer, []).shape == (0, 16)
    rows = encode_texts(model, tokenizer, TEXTS, normalise=True)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-6)
    assert (unit_rows(np.array([[0.0, 0.0], [3.0, 4.0]])) == np.float32([[0, 0], [0.6, 0.8]])).all()


def test_text_without_tokens_gives_zeros(tiny_target: Target):
    rows = encode_texts(tiny_target.model("base"), tiny_target.tokenizer, ["", "two words"])
    assert (rows[0] == 0).all()
    assert (rows[1] != 0).any()
    assert encode_texts(tiny_target.model("base"), tiny_target.tokenizer, [""]).shape == (1, 32)


def test_unknown_pooling_and_layer(bert):
    model, tokenizer = bert
    with pytest.raises(UsageError, match="unknown token pooling 'max'"):
        encode_texts(model, tokenizer, TEXTS, pooling="max")
    with pytest.raises(UsageError, match="no layer 9"):
        encode_texts(model, tokenizer, TEXTS, layer=9)


def test_model_is_left_as_found(bert):
    model, tokenizer = bert
    model.train()
    try:
        encode_texts(model, tokenizer, TEXTS)
        assert model.training
        with pytest.raises(UsageError):
            encode_texts(model, tokenizer, TEXTS, layer=9)
        assert model.training
    finally:
        model.eval()


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize(("layer", "weighting"), [(-1, "mean"), (0, "mean"), (1, "position")])
@pytest.mark.parametrize("part", ["both", "prompt", "response"])
def test_hidden_states_equal_a_loop(
    make_target,
    tiny_queries: Corpus,
    architecture: str,
    layer: int,
    weighting: str,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
):
    import torch

    monkeypatch.setattr("tdabench.toolkit.encode._WINDOW", 3)

    target = make_target(architecture)
    model = target.model("warm")
    got = pooled_hidden_states(
        target, model, tiny_queries, layer, weighting, part=part, tokens_a_batch=40
    )
    role = "prompt" if part == "prompt" else "full"
    for row, tokens in zip(got, target.tokenize(tiny_queries, role)):
        with torch.inference_mode():
            states = model(
                input_ids=torch.from_numpy(tokens.ids)[None], output_hidden_states=True
            ).hidden_states
        h = states[layer][0].numpy()[tokens.start if part == "response" else 0 :]
        w = np.ones(len(h)) if weighting == "mean" else np.arange(1.0, len(h) + 1)
        np.testing.assert_allclose(row, (w[:, None] * h).sum(0) / w.sum(), atol=5e-6)


def test_the_part_decides_what_is_read(tiny_target: Target):
    model = tiny_target.model("base")
    a = [Example("a", "same prompt", "one"), Example("b", "same prompt", "another")]
    prompt = pooled_hidden_states(tiny_target, model, a, part="prompt")
    both = pooled_hidden_states(tiny_target, model, a)
    np.testing.assert_allclose(prompt[0], prompt[1], atol=1e-6)
    assert np.abs(both[0] - both[1]).max() > 1e-3
    b = [Example("a", "one prompt", "same"), Example("b", "another prompt", "same")]
    response = pooled_hidden_states(tiny_target, model, b, part="response")
    assert np.abs(response[0] - response[1]).max() > 1e-4  # read in the context of the prompt
    with pytest.raises(UsageError, match="unknown part"):
        pooled_hidden_states(tiny_target, model, a, part="full")
    assert pooled_hidden_states(tiny_target, model, []).shape == (0, 32)
