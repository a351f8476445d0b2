"""Which words carry a score: constructed cases whose answer is known, and methods' own scores."""

from __future__ import annotations

import numpy as np
import pytest

from tdabench.data.behaviours import Behaviour
from tdabench.data.examples import Corpus, Example
from tdabench.registry import registry
from tdabench.report.traced import words
from tdabench.testing import tiny_world
from tdabench.toolkit.pipeline import PipelineIndex
from tdabench.toolkit.words import FILLER, occluded, word_scores, words_of

E = Example("e", "which  bird sings", "the heron", "t")


def test_every_word_is_left_out_once():
    assert words_of(E) == ["which", "bird", "sings", "the", "heron"]
    assert [(v.prompt, v.response) for v in occluded(E)] == [
        ("bird sings", "the heron"), ("which sings", "the heron"), ("which  bird", "the heron"),
        ("which  bird sings", "heron"), ("which  bird sings", "the"),
    ]  # fmt: skip
    assert len({v.id for v in occluded(E)}) == 5
    assert [v.response for v in occluded(Example("a", "", "yes"))] == [FILLER]
    assert occluded(Example("a", "", "")) == []


def test_a_score_by_words_is_found_again():
    """The score of a text is the sum of known worths of its words: occlusion returns them."""
    worth = {"bird": 2.0, "heron": 3.0, "the": -1.0}

    def score(examples):
        return np.array([sum(worth.get(w, 0.0) for w in words_of(e)) for e in examples])

    found = word_scores([E, Example("n", "", ""), Example("o", "heron", "x")], score)
    assert [f.tolist() for f in found] == [[0, 2, 0, -1, 3], [], [3, 0]]
    assert word_scores([], score) == []


def index_of(name: str, tmp_path, train: Corpus | None = None, **params):
    world = tiny_world()
    method = registry().method(name).cls.from_params(params)
    return method.build(world.context(tmp_path), train or world.train), world


def test_text_methods_name_the_shared_word(tmp_path):
    train = Corpus(
        [E, Example("f", "what plant grows", "a cedar"), Example("g", "how", "far")], "t"
    )
    index, _ = index_of("tfidf", tmp_path, train)
    asked = Behaviour.of("q", [Example("q", "name a wader", "heron")])
    (found,) = index.score_words(asked, [E])
    assert words_of(E)[int(np.argmax(found))] == "heron"


@pytest.mark.parametrize(
    ("name", "params"), [("graddot", {}), ("logra", {}), ("ekfac", {}), ("hidden", {})]
)
def test_word_scores_are_differences_of_the_methods_own_scores(tmp_path, name: str, params):
    (tmp_path / "a").mkdir()
    index, world = index_of(name, tmp_path / "a", **params)
    a, b = world.queries[0], world.queries[1]
    asked = Behaviour("c", (a, b), (1.0, -1.0))
    chosen = [world.train[0], world.train[3]]
    found = index.score_words(asked, chosen)
    assert [len(f) for f in found] == [len(words_of(e)) for e in chosen]
    of_all = index.score_behaviours([asked])[0]
    # The word scores of an example in the index start from the score that the index gives it.
    last = occluded(chosen[1])[-1]
    variants = Corpus([*world.train, last], "more")
    if name in ("hidden",):  # no state is learned from the corpus: another index has it, too
        (tmp_path / "b").mkdir()
        other, _ = index_of(name, tmp_path / "b", variants)
        without = other.score_behaviours([asked])[0][-1]
        assert found[1][-1] == pytest.approx(of_all[3] - without, rel=1e-3, abs=1e-4)
    assert np.isfinite(np.concatenate(found)).all()
    assert np.abs(np.concatenate(found)).max() > 0


def test_the_word_of_a_query_that_examples_share_is_found(tmp_path):
    """Only one word of the query is in the example: without it nothing is left of its score."""
    train = Corpus([E, Example("f", "what plant grows", "a cedar")], "t")
    for n, name in enumerate(("tfidf", "bm25")):
        (tmp_path / str(n)).mkdir()
        index, _ = index_of(name, tmp_path / str(n), train)
        query = Example("q", "name some wader", "grey heron")
        found = index.score_query_words(Behaviour.of("q", [query]), [0])
        whole = index.score([query])[0, 0]
        assert words_of(query)[int(np.argmax(found))] == "heron"
        assert found.max() == pytest.approx(whole, rel=1e-4)
        assert index.score_query_words(Behaviour.of("s", [query, E]), [0]) is None
        assert index.score_query_words(Behaviour.of("q", [query]), []) is None


@pytest.mark.parametrize("name", ["graddot", "logra", "ekfac", "hidden", "bm25>graddot"])
def test_query_words_are_differences_of_the_methods_own_scores(tmp_path, name: str):
    first, _, second = name.partition(">")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    index, world = index_of(first, tmp_path / "a")
    if second:
        index = PipelineIndex([index, index_of(second, tmp_path / "b")[0]], [5])
    a, b = world.queries[0], world.queries[1]
    last = index.stages[-1] if second else index
    wanted = [last.score([v])[0, [0, 3]].sum() for v in [a, *occluded(a)]]
    contrast = Behaviour("c", (a, b), (1.0, -1.0))  # the other response stays
    for asked in (Behaviour.of("q", [a]), contrast):
        found = index.score_query_words(asked, [0, 3])
        np.testing.assert_allclose(found, wanted[0] - np.array(wanted[1:]), rtol=1e-3, atol=1e-4)
    assert np.abs(found).max() > 0


def test_methods_that_cannot_tell_say_so(tmp_path):
    index, world = index_of("random", tmp_path)
    assert index.score_query_words(Behaviour.of("q", [world.queries[0]]), [0]) is None
    assert index.score_words(Behaviour.of("q", [world.queries[0]]), [E]) is None


def test_words_in_json_are_marked_by_side():
    told = words(E, np.arange(5.0))["words"]
    assert [w["side"] for w in told] == ["prompt"] * 3 + ["response"] * 2
    assert [bool(w.get("first")) for w in told] == [False, False, False, True, False]
    assert words(E, None) == {}
    assert words(Example("a", "", "yes"), np.ones(1))["words"][0]["first"]
