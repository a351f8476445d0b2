"""AirRep inference: the released layout, own encoders, text, batching, records, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tdabench_airrep.encoder import (
    Encoder,
    Pooled,
    TextFormat,
    encode,
)
from tdabench_airrep.loading import load_encoder, load_tokenizer
from tdabench_airrep.method import AirRep

from tdabench.api import DataError, Example, Groups, UsageError
from tdabench.groups import pool_scores
from tdabench.method import Context

OWN = Path(__file__).parent.parent / "fixtures" / "airrep"
SHARED = Path(__file__).parents[3] / "shared" / "parity" / "airrep"
FIXTURES = [
    OWN,
    pytest.param(
        SHARED, marks=pytest.mark.skipif(not SHARED.exists(), reason="fixture not at hand")
    ),
]
# bfloat16 has 8 significant bits; two layers with weights of this scale add up a few roundings.
BF16 = 2.0**-8


def _parity(folder: Path):
    data = json.loads((folder / "inputs.json").read_text())
    items = {
        k: [Example(f"{k}{i}", x["input"], x["output"]) for i, x in enumerate(data[k])]
        for k in ("train", "queries")
    }
    groups = Groups.of(data["groups"], len(items["train"]))
    return items, groups, load_file(folder / "expected.safetensors")


@pytest.mark.parametrize("folder", FIXTURES)
@pytest.mark.parametrize(("dtype", "ulps"), [("bfloat16", 4), ("float32", 16)])
def test_embeddings_agree_with_the_reference(folder: Path, dtype: str, ulps: int) -> None:
    items, _, expected = _parity(folder)
    encoder = load_encoder(folder / "checkpoint", dtype=dtype)
    for role, key in (("train", "train_embeddings"), ("queries", "query_embeddings")):
        got = encode(encoder, items[role])
        scale = np.abs(expected[key]).max()
        assert np.abs(got - expected[key]).max() <= ulps * BF16 * scale
        assert np.abs(got - expected[key]).mean() <= 2 * BF16 * scale


@pytest.mark.parametrize("folder", FIXTURES)
def test_bfloat16_rounds_alike_in_the_references_batching(folder: Path) -> None:
    items, _, expected = _parity(folder)
    encoder = load_encoder(folder / "checkpoint", dtype="bfloat16")
    tokens = encoder.tokenize(items["train"])
    from tdabench_airrep.encoder import padded

    with torch.inference_mode():
        got = encoder(*padded(tokens, np.arange(len(tokens)), "cpu")).float().numpy()
    # Equal to the bit on the processor that made the fixture; others sum in another order, which
    # moves a few values by a rounding.
    wanted = expected["train_embeddings"]
    scale = np.abs(wanted).max()
    assert np.abs(got - wanted).max() <= 2 * BF16 * scale
    assert np.abs(got - wanted).mean() <= 0.1 * BF16 * scale


@pytest.mark.parametrize("folder", FIXTURES)
@pytest.mark.parametrize(
    ("pooling", "key"), [("softmax-abs", "group_score_abs_softmax"), ("sum", "group_score_sum")]
)
def test_group_scores_from_stored_embeddings(folder: Path, pooling: str, key: str) -> None:
    _, groups, expected = _parity(folder)
    scores = expected["query_embeddings"] @ expected["train_embeddings"].T
    np.testing.assert_allclose(
        pool_scores(scores, groups, pooling), expected[key], rtol=1e-5, atol=1e-5
    )


def test_method_scores_groups_like_the_reference(tiny_target, tmp_path: Path) -> None:
    items, groups, expected = _parity(OWN)
    context = Context(tiny_target, tmp_path, assets={"airrep": OWN / "checkpoint"})
    index = AirRep().build(context, items["train"])
    want = expected["group_score_abs_softmax"]
    got = index.score_groups(items["queries"], groups)
    assert np.abs(got - want).max() <= 16 * BF16 * np.abs(want).max()
    singles = Groups.singletons(len(items["train"]))
    np.testing.assert_allclose(
        index.score_groups(items["queries"], singles), index.score(items["queries"]), rtol=1e-5
    )
    assert AirRep().prepare_cost(context) is None  # the released layout has no record


def test_encoding_does_not_depend_on_batching_or_order() -> None:
    items, _, _ = _parity(OWN)
    encoder = load_encoder(OWN / "checkpoint")
    whole = encode(encoder, items["train"], tokens_a_batch=4096)
    alone = np.vstack([encode(encoder, [e]) for e in items["train"]])
    tight = encode(encoder, items["train"][::-1], tokens_a_batch=1)[::-1]
    np.testing.assert_allclose(whole, alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole, tight, rtol=1e-5, atol=1e-5)
    assert encode(encoder, []).shape == (0, 16)


def test_encoding_halves_its_batches_when_memory_runs_out(monkeypatch) -> None:
    from tdabench_airrep import encoder as module

    items, _, _ = _parity(OWN)
    encoder = load_encoder(OWN / "checkpoint")
    want = encode(encoder, items["train"], tokens_a_batch=4096)
    original, sizes = module.padded, []

    def small(tokens, index, device):
        sizes.append(len(index))
        if len(index) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(tokens, index, device)

    monkeypatch.setattr(module, "padded", small)
    got = encode(encoder, items["train"], tokens_a_batch=4096)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert sizes[0] > 3
    assert sum(n for n in sizes if n <= 3) == len(want)


def own_encoder(target, dim: int = 24, pooled: Pooled | None = None, **text) -> Encoder:
    body = target.model("base").base_model
    return Encoder(body, dim, load_tokenizer(target.folder), TextFormat(**text), pooled)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "llama"])
def test_own_encoder_survives_saving(
    make_target, tiny_corpus, tmp_path: Path, architecture
) -> None:
    encoder = own_encoder(make_target(architecture), max_tokens=100, append_eos=True)
    assert encoder.causal
    before = encode(encoder, tiny_corpus)
    encoder.save(tmp_path / "enc", {"cost": {"seconds": 2.5, "retrainings": 7}}, half=False)
    loaded = load_encoder(tmp_path / "enc")
    assert loaded.text == encoder.text
    assert loaded.dim == 24
    np.testing.assert_allclose(encode(loaded, tiny_corpus), before, rtol=1e-5, atol=1e-6)
    context = Context(make_target(architecture), tmp_path, assets={"airrep": tmp_path / "enc"})
    assert AirRep().prepare_cost(context) == {"seconds": 2.5, "retrainings": 7.0}


def test_mean_pooling_then_projection(tiny_target, tiny_corpus) -> None:
    encoder = own_encoder(tiny_target)
    tokens = encoder.tokenize(tiny_corpus[:1])[0]
    hidden = tiny_target.model("base").base_model(input_ids=torch.tensor(tokens.ids[None]))
    mean = hidden.last_hidden_state[0].mean(0)
    want = encoder.projector.weight @ mean + encoder.projector.bias
    np.testing.assert_allclose(
        encode(encoder, tiny_corpus[:5])[0], want.detach().numpy(), rtol=1e-4, atol=1e-5
    )


def test_response_span_is_the_mean_from_where_the_response_begins(tiny_target, tiny_corpus) -> None:
    spans = Pooled(layers=(0, -1), spans=("response", "all"))
    encoder = own_encoder(tiny_target, pooled=spans, append_eos=True, max_words=0)
    encoder.text = TextFormat(template="Q: {prompt}\nA: {response}", max_words=0, append_eos=True)
    e = tiny_corpus[1]
    tokens = encoder.tokenize([e])[0]
    as_trained = tiny_target.tokenize([e])[0]
    np.testing.assert_array_equal(tokens.ids, as_trained.ids)
    # The target counts the space before the response to it; here it may stand alone.
    assert tokens.start - as_trained.start in (0, 1)
    out = tiny_target.model("base").base_model(
        input_ids=torch.tensor(tokens.ids[None]), output_hidden_states=True
    )
    first, last = out.hidden_states[0][0], out.last_hidden_state[0]
    k = tokens.start
    states = torch.cat([first[k:].mean(0), last[k:].mean(0), first.mean(0), last.mean(0)])
    want = encoder.projector(states).detach().numpy()
    np.testing.assert_allclose(encode(encoder, [e])[0], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(encode(encoder, tiny_corpus[:9])[1], want, rtol=1e-4, atol=1e-5)


def test_error_span_is_the_gradient_at_the_states_that_predict(tiny_target, tiny_corpus) -> None:
    spans = Pooled(spans=("error",))
    encoder = own_encoder(tiny_target, pooled=spans, append_eos=True, max_words=0)
    e = tiny_corpus[1]
    (tokens,) = encoder.tokenize([e])
    model = tiny_target.model("base")
    hidden = model.base_model(input_ids=torch.tensor(tokens.ids[None])).last_hidden_state.detach()
    hidden.requires_grad_(True)
    logits = model.get_output_embeddings()(hidden)[0]
    k, ids = tokens.start, torch.tensor(tokens.ids)
    torch.nn.functional.cross_entropy(logits[k - 1 : -1], ids[k:]).backward()
    want = encoder.projector(-hidden.grad[0].sum(0)).detach().numpy()
    np.testing.assert_allclose(encode(encoder, [e])[0], want, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(encode(encoder, tiny_corpus[:9])[1], want, rtol=1e-3, atol=1e-5)


def test_error_span_of_a_text_with_nothing_to_predict_is_zero(tiny_target) -> None:
    encoder = own_encoder(tiny_target, pooled=Pooled(spans=("error",)))
    encoder.text = TextFormat(template="{response}", max_words=0)
    bias = encoder.projector.bias.detach().numpy()
    texts = [Example("a", "", ""), Example("b", "", "some words")]
    got = encode(encoder, texts)
    np.testing.assert_allclose(got[0], bias, atol=1e-6)
    assert np.isfinite(got).all()
    assert np.abs(got[1] - bias).max() > 1e-4


def test_error_span_asks_for_predictions(tiny_target) -> None:
    with pytest.raises(UsageError, match="attention = full"):
        Pooled(spans=("error",), attention="full")
    body = tiny_target.fresh_model("base").base_model
    body.config.tie_word_embeddings = False
    with pytest.raises(UsageError, match="tied embeddings"):
        Encoder(body, 8, load_tokenizer(tiny_target.folder), TextFormat(), Pooled(spans=("error",)))


def test_normalised_embeddings_have_one_learnt_length(tiny_target, tiny_corpus, tmp_path) -> None:
    encoder = own_encoder(tiny_target)
    plain = encode(encoder, tiny_corpus)
    encoder.normalised().rescale(3.0)
    unit = encode(encoder, tiny_corpus)
    want = 3 * plain / np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, want, rtol=1e-4, atol=1e-5)
    encoder.save(tmp_path / "e", {}, half=False)
    np.testing.assert_allclose(encode(load_encoder(tmp_path / "e"), tiny_corpus), want, rtol=1e-4)


def test_rescaling_an_encoder_scales_its_embeddings(tiny_target, tiny_corpus) -> None:
    encoder = own_encoder(tiny_target)
    plain = encode(encoder, tiny_corpus)
    encoder.rescale(0.5)
    np.testing.assert_allclose(encode(encoder, tiny_corpus), plain / 2, rtol=1e-4, atol=1e-6)


def test_the_response_cut_off_leaves_the_last_token(tiny_target) -> None:
    encoder = own_encoder(tiny_target, pooled=Pooled(spans=("response",)), max_tokens=4)
    tokens = encoder.tokenize([Example("a", "many words stand before it", "x")])[0]
    assert (len(tokens), tokens.start) == (4, 3)
    assert np.isfinite(encode(encoder, [Example("a", "many words stand before it", "x")])).all()


@pytest.mark.parametrize(("store", "tolerance"), [("float16", 2e-3), ("int8", 0.03)])
def test_stores(tiny_target, tmp_path: Path, store: str, tolerance: float) -> None:
    items, _, _ = _parity(OWN)
    assets = {"airrep": OWN / "checkpoint"}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    full = AirRep().build(Context(tiny_target, tmp_path / "a", assets=assets), items["train"])
    method = AirRep(store=store)
    context = Context(tiny_target, tmp_path / "b", assets=assets)
    small = method.build(context, items["train"])
    a, b = full.score(items["queries"]), small.score(items["queries"])
    assert np.abs(a - b).max() <= tolerance * np.abs(a).max()
    (tmp_path / "saved").mkdir()
    small.save(tmp_path / "saved")
    loaded = method.load(context, tmp_path / "saved")
    np.testing.assert_array_equal(loaded.score(items["queries"]), b)
    with pytest.raises(UsageError, match="store"):
        AirRep(store="int4")


def test_text_format() -> None:
    long = Example("a", " ".join(f"w{i}" for i in range(300)), "{prompt} {response}")
    text = TextFormat().text(long)
    assert text.startswith("Question: w0 w1 ")
    assert text.endswith(" w255\nAnswer: {prompt} {response}")
    assert (
        TextFormat(max_words=0).text(Example("a", "x \n y", "z")) == "Question: x \n y\nAnswer: z"
    )
    for bad in ({"template": "x"}, {"side": "middle"}, {"max_tokens": 1}):
        with pytest.raises(UsageError):
            TextFormat(**bad)


def test_texts_are_cut_on_the_side_asked_for(tiny_target) -> None:
    e = Example("a", "one two three four five six seven", "eight")
    full, first, last = (
        own_encoder(tiny_target, **kw).tokenize([e])[0]
        for kw in ({}, {"max_tokens": 6}, {"max_tokens": 6, "side": "last"})
    )
    assert len(full) > 6
    np.testing.assert_array_equal(first.ids, full.ids[:6])
    np.testing.assert_array_equal(last.ids, full.ids[-6:])


def _copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OWN / "checkpoint", tmp_path / "copy"))


def test_bad_encoders_are_named(tmp_path: Path, tiny_target) -> None:
    folder = _copy(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="has no tokenizer"):
        load_encoder(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="not a readable tokenizer"):
        load_encoder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(DataError, match="not an AirRep encoder"):
        load_encoder(folder)
    shutil.copy(OWN / "checkpoint" / "tokenizer.json", folder)
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 8}))
    with pytest.raises(DataError, match="do not fit"):
        load_encoder(folder)
    (folder / "config.json").write_text(json.dumps({**config, "backbone": "nonesuch"}))
    with pytest.raises(DataError, match="unknown kind"):
        load_encoder(folder)
    (folder / "config.json").write_text(json.dumps(config))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(DataError, match="truncated"):
        load_encoder(folder)
    context = Context(tiny_target, tmp_path)
    with pytest.raises(UsageError, match="no encoder folder"):
        AirRep(encoder="some/where").build(context, [])
    with pytest.raises(UsageError, match="no asset 'airrep'"):
        AirRep().build(context, [])
    with pytest.raises(UsageError, match="dtype"):
        AirRep(dtype="int4")


def test_an_untrained_encoder_has_the_recipes_body_and_whitened_states(tmp_path: Path) -> None:
    """The row that shows what training adds: the same states, without labels."""
    from tdabench.run.sources import load_suite

    suite = load_suite("pocket")
    declared = suite.target("smooth")
    train, queries = list(suite.train)[:120], list(suite.queries())[:6]
    context = Context(target=declared.target, scratch=tmp_path, assets=suite.assets_for(declared))
    method = AirRep(encoder="airrep:untrained")
    index = method.build(context, train)
    scores = index.score(queries)
    index.save(tmp_path / "index")
    np.testing.assert_array_equal(method.load(context, tmp_path / "index").score(queries), scores)
    again = method.build(context, train[::-1])  # in another order
    np.testing.assert_allclose(again.score(queries)[:, ::-1], scores, rtol=1e-4, atol=1e-5)
    rows = np.asarray(index.rows[:])
    trained = AirRep()
    assert rows.shape[1] == np.asarray(trained.build(context, train[:2]).rows[:]).shape[1]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, rtol=1e-4)  # length not learned
    assert np.linalg.norm(rows.mean(axis=0)) < 0.2  # centred
    assert method.prepare_cost(context) is None
    assert (trained.prepare_cost(context) or {})["retrainings"] > 0
    bare = Context(target=declared.target, scratch=tmp_path)
    with pytest.raises(UsageError, match="provides no asset 'airrep'"):
        method.build(bare, train)
    folder = AirRep(encoder=f"{suite.assets_for(declared)['airrep']}:untrained")
    np.testing.assert_array_equal(folder.build(bare, train).score(queries), scores)
    with pytest.raises(UsageError, match="no encoder folder"):
        AirRep(encoder=f"{tmp_path / 'absent'}:untrained").build(bare, train)
