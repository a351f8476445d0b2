"""Behaviours on constructed cases: sets, contrasts, and what linear methods get for free."""

from __future__ import annotations

import numpy as np
import pytest
from constructed import FixedIndex, corpus, truth_of

from tdabench.benchmark import Stored
from tdabench.benchmarks.behaviours import Behaviours, contrasts_of, sided
from tdabench.data.behaviours import Behaviour, behaviours_of, contrast, parts_of
from tdabench.data.examples import Corpus, Example
from tdabench.errors import DataError
from tdabench.groups import Groups

N, Q = 20, 12
TRAIN, QUERIES = corpus(N, "t", tasks=4), corpus(Q, "q", tasks=4)
SCORES = np.random.default_rng(0).normal(size=(Q, N))
GROUPS = Groups.random(30, N, 0.5, np.random.default_rng(1))
VALUES = (SCORES @ GROUPS.membership(np.float64).toarray().T)[None]
TRUTH = truth_of(VALUES, GROUPS, QUERIES.ids)


def test_a_set_is_the_mean_loss_and_a_contrast_a_difference():
    a = Behaviour.of("a", QUERIES[:4])
    assert a.weights == (0.25,) * 4
    asked = Example("x", "Who?", "Ann", meta={"against": "Bob"})
    both = Behaviour.of("b", [asked])
    assert both.weights == (1.0, -1.0)
    assert [e.response for e in both.examples] == ["Ann", "Bob"]
    assert (both.prompt, both.response) == ("Who?", "Ann, not: Bob")
    assert a.prompt == "q prompt 0 (and 3 more)"
    with pytest.raises(DataError, match="are the same"):
        Behaviour.of("b", [Example("x", "Who?", "Ann", meta={"against": "Ann "})])
    with pytest.raises(DataError, match="has no examples"):
        Behaviour.of("empty", [])


def test_scores_of_behaviours_are_the_sums_of_their_examples_scores():
    index = FixedIndex(SCORES, QUERIES.ids)
    sets = behaviours_of(QUERIES, "task")
    found = index.score_behaviours([*sets, contrast("c", sets[0], sets[1])])
    means = [SCORES[[i for i in range(Q) if i % 4 == t]].mean(axis=0) for t in range(4)]
    np.testing.assert_allclose(found, [*means, means[0] - means[1]], atol=1e-6)
    groups = index.score_behaviours(sets, GROUPS)
    np.testing.assert_allclose(groups, np.stack(means) @ GROUPS.membership().toarray().T, atol=1e-5)


def test_an_example_in_two_behaviours_is_scored_once():
    a, b = Behaviour.of("a", QUERIES[:3]), Behaviour.of("b", QUERIES[2:5])
    examples, weights = parts_of([a, b])
    assert examples.ids == QUERIES[:5].ids
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    assert (weights[:, 2] > 0).all()
    other = Behaviour.of("c", [Example("q0", "another", "text")])
    with pytest.raises(DataError, match="have the id 'q0'"):
        parts_of([a, other])


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_perfect_reversed_and_constant(make_context, sign: int):
    context = make_context(FixedIndex(sign * SCORES, QUERIES.ids), TRAIN, QUERIES, {"lds": TRUTH})
    out = Behaviours(replicates=50).run(context)
    assert out.primary == "behaviours"
    assert out.query_ids == ("task0", "task1", "task2", "task3")
    assert out.metrics["behaviours"].value == pytest.approx(sign, abs=0.02)
    assert out.metrics["contrast"].value == pytest.approx(sign, abs=0.02)
    assert out.notes[0] == "4 behaviours of 12 queries"


def test_what_all_queries_share_cancels_in_contrasts(make_context):
    """A method that knows only what a group does to every query has no say in contrasts."""
    shared = np.random.default_rng(2).normal(size=N)
    values = ((SCORES / 10 + shared) @ GROUPS.membership(np.float64).toarray().T)[None]
    truth = truth_of(values, GROUPS, QUERIES.ids)
    table = np.tile(shared, (Q, 1))
    out = Behaviours(replicates=50).run(
        make_context(FixedIndex(table, QUERIES.ids), TRAIN, QUERIES, {"lds": truth})
    )
    assert out.metrics["behaviours"].value > 0.9
    assert abs(out.metrics["contrast"].value) < 0.3


def test_queries_of_the_side_against_count_negatively():
    marked = [
        Example(q.id, q.prompt, q.response, q.task, {"side": "against" if i >= 8 else ""})
        for i, q in enumerate(QUERIES)
    ]
    for b in sided(marked, "task"):
        own, against = b.sides
        assert (len(own), len(against)) == (2, 1)
        assert sum(b.weights) == pytest.approx(0)
    with pytest.raises(DataError, match="only queries of the side 'against'"):
        sided([marked[8]], "task")
    with pytest.raises(DataError, match="no query has the field 'kind'"):
        sided(marked, "kind")
    assert contrasts_of(sided(QUERIES[:1], "task")) == []
    assert len(contrasts_of(sided(QUERIES[:2], "task"))) == 1


def test_the_record_gives_the_same_numbers(make_context):
    shuffled = Corpus([QUERIES[i] for i in np.random.default_rng(3).permutation(Q)], "q")
    truth = TRUTH.for_queries(shuffled.ids)
    context = make_context(FixedIndex(SCORES, QUERIES.ids), TRAIN, shuffled, {"lds": truth})
    out = Behaviours(replicates=50).run(context)
    stored = Stored(out.arrays, out.query_ids, lambda name: TRUTH, lambda label, name: TRUTH)
    again = Behaviours(replicates=50).recompute(stored)
    assert again is not None
    assert again.metrics == out.metrics


def test_one_behaviour_has_no_contrast(make_context):
    alone = Corpus([Example(q.id, q.prompt, q.response, "all") for q in QUERIES], "q")
    context = make_context(FixedIndex(SCORES, QUERIES.ids), TRAIN, alone, {"lds": TRUTH})
    out = Behaviours(replicates=50).run(context)
    assert out.query_ids == ("all",)
    assert out.metrics["behaviours"].value == pytest.approx(1, abs=0.02)
    assert "contrast" not in out.metrics


def test_a_query_asked_twice_changes_nothing(make_context):
    """Every query under two ids: sets are means, so that values stay."""
    twice = Corpus(
        [Example(f"{q.id}{c}", q.prompt, q.response, q.task) for c in "ab" for q in QUERIES], "q"
    )
    noisy = SCORES + np.random.default_rng(4).normal(size=SCORES.shape)
    found = []
    for queries, copies in ((QUERIES, 1), (twice, 2)):
        truth = truth_of(np.tile(VALUES, (1, copies, 1)), GROUPS, queries.ids)
        index = FixedIndex(np.tile(noisy, (copies, 1)), queries.ids)
        context = make_context(index, TRAIN, queries, {"lds": truth})
        found.append(Behaviours(replicates=50).run(context).metrics)
    for name in ("behaviours", "contrast"):
        assert found[0][name].value == pytest.approx(found[1][name].value, abs=1e-6)
        assert abs(found[0][name].value) < 1


def test_no_query_with_the_field_is_refused(make_context):
    context = make_context(FixedIndex(SCORES, QUERIES.ids), TRAIN, QUERIES, {"lds": TRUTH})
    with pytest.raises(DataError, match="no query has the field 'style'"):
        Behaviours(by="style").run(context)
