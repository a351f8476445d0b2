"""Classification, noise and tracing on constructed cases: what is found by labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from constructed import FixedIndex, corpus

from tdabench.benchmark import Built, Stored
from tdabench.benchmarks.classification import Classification, elected, share_of, votes
from tdabench.benchmarks.noise import Noise
from tdabench.benchmarks.planted import id_of, neutral
from tdabench.benchmarks.tracing import Tracing
from tdabench.data.examples import Corpus, Example
from tdabench.errors import DataError, GuardError, UsageError

RNG = np.random.default_rng(0)
TRAIN, QUERIES = corpus(12, "t", tasks=3), corpus(6, "q", tasks=3)
SAME = np.array([[float(a == b) for b in TRAIN.tasks] for a in QUERIES.tasks])


def fixed(scores: np.ndarray, queries: Corpus = QUERIES) -> FixedIndex:
    return FixedIndex(np.asarray(scores, dtype=np.float64), queries.ids)


# ------------------------------------------------------------------ classification


def test_classification_perfect_and_reversed(make_context) -> None:
    out = Classification(k=3).run(make_context(fixed(SAME), TRAIN, QUERIES))
    assert out.metrics["accuracy"].value == 1
    assert out.metrics["accuracy_knn"].value == 1
    out = Classification(k=3).run(make_context(fixed(-SAME), TRAIN, QUERIES))
    assert out.metrics["accuracy"].value == 0
    assert out.metrics["accuracy_knn"].value == 0


def test_constant_scores_get_chance(make_context) -> None:
    out = Classification(k=5).run(make_context(fixed(0 * SAME), TRAIN, QUERIES))
    assert out.metrics["accuracy"].value == pytest.approx(1 / 3)
    assert out.metrics["accuracy_knn"].value == pytest.approx(1 / 3)
    assert out.metrics["chance"].value == pytest.approx(1 / 3)


def test_ties_at_the_top_share_by_expectation() -> None:
    label = np.array([0, 1, 1, 2])
    scores = np.array([[5.0, 5.0, 5.0, 1.0]])
    assert share_of(votes(scores, label, 1, 3), np.array([1]))[0] == pytest.approx(2 / 3)
    assert share_of(votes(scores, label, 1, 3), np.array([0]))[0] == pytest.approx(1 / 3)
    # Two of three tied items: 2/3 of a vote for task 0, 4/3 for task 1.
    assert elected(votes(scores, label, 2, 3), np.array([1]))[0] == 1
    assert elected(votes(np.array([[2.0, 2.0, 1.0, 0.0]]), label, 2, 3), np.array([0]))[0] == 0.5


def test_knn_takes_the_majority_and_permutation_changes_nothing(make_context) -> None:
    scores = RNG.normal(size=SAME.shape)
    out = Classification(k=4).run(make_context(fixed(scores), TRAIN, QUERIES))
    for q in range(6):
        best = np.argsort(-scores[q])
        assert out.per_query[q] == (TRAIN.tasks[best[0]] == QUERIES.tasks[q])
    order = RNG.permutation(12)
    moved = Classification(k=4).run(
        make_context(fixed(scores[:, order]), TRAIN.subset(order), QUERIES)
    )
    np.testing.assert_array_equal(moved.per_query, out.per_query)
    np.testing.assert_allclose(moved.arrays["per_query_knn"], out.arrays["per_query_knn"])


def test_sources_are_classified_where_examples_have_them(make_context) -> None:
    def marked(examples: Corpus, names: list[str]) -> Corpus:
        return Corpus(Example(e.id, e.prompt, e.response, e.task, {"source": n} if n else {})
                      for e, n in zip(examples, names))  # fmt: skip

    of_train = [f"c{i % 4}" for i in range(12)]
    of_queries = ["c0", "c1", "c2", "c3", "elsewhere", ""]
    train, queries = marked(TRAIN, of_train), marked(QUERIES, of_queries)
    same = np.array([[float(a == b) for b in of_train] for a in of_queries])
    out = Classification(k=3).run(make_context(fixed(same), train, queries))
    # The last two queries have no source among the training examples: wrong.
    assert out.metrics["accuracy_source"].value == pytest.approx(4 / 6)
    assert out.metrics["accuracy_source_knn"].value == pytest.approx(4 / 6)
    assert out.metrics["chance_source"].value == pytest.approx(4 / 6 / 4)
    plain = Classification(k=3).run(make_context(fixed(same), TRAIN, QUERIES))
    assert "accuracy_source" not in plain.metrics
    assert out.metrics["accuracy"] == plain.metrics["accuracy"]
    stored = Stored(out.arrays, out.query_ids, None, None)  # type: ignore[arg-type]
    assert Classification(k=3).recompute(stored).metrics == out.metrics


def test_classification_edges(make_context) -> None:
    one = QUERIES.subset([0])
    out = Classification(k=100).run(make_context(fixed(SAME), TRAIN, one))
    assert out.metrics["accuracy"].value == 1
    assert out.metrics["accuracy"].low is None
    strange = Corpus([Example("q0", "p", "r", "unheard of"), Example("q1", "p", "r", "")])
    out = Classification().run(make_context(fixed(SAME), TRAIN, strange))
    assert out.metrics["accuracy"].value == 0
    assert out.query_ids == ("q0",)
    assert len(out.notes) == 3  # and too few tasks to speak of new ones
    assert any("too few tasks (1" in n for n in out.notes)
    bare = Corpus([Example("q0", "p", "r")])
    with pytest.raises(DataError, match="no task labels"):
        Classification().run(make_context(fixed(SAME), TRAIN, bare))
    with pytest.raises(UsageError, match="at least 1"):
        Classification(k=0)


# ------------------------------------------------------------------ noise


def bad(i: int, task: str, **meta: str) -> Example:
    return Example(f"t{i}", f"prompt {i}", f"answer {i}", task, meta)


NOISY = Corpus(
    [
        bad(0, "a"), bad(1, "a", planted="wrong"), bad(2, "a"), bad(3, "b"),
        bad(4, "b", planted="wrong"), bad(5, "b"), bad(6, "c", planted="unsafe"),
        bad(7, "c", lookalike="unsafe"), bad(8, "c", lookalike="unsafe"),
    ]
)  # fmt: skip
ASKED = Corpus(
    [
        Example("q0", "x", "y", "a"),
        Example("q1", "xx", "y", "b"),
        Example("q2", "xxx", "y", "c", {"planted": "unsafe"}),
    ]
)


def test_noise_perfect_reversed_and_constant(make_context) -> None:
    scores = np.zeros((3, 9))
    scores[0, 1] = scores[1, 4] = -1.0  # harm to clean queries
    scores[2, 6] = 1.0  # taught the unsafe one
    m = Noise().run(make_context(fixed(scores, ASKED), NOISY, ASKED)).metrics
    assert m["average_precision"].value == 1
    assert m["average_precision_harmful"].value == 1
    assert m["average_precision_unsafe"].value == 1
    assert m["average_precision_unsafe_homogeneous"].value == 1
    m = Noise().run(make_context(fixed(-scores, ASKED), NOISY, ASKED)).metrics
    assert m["average_precision_harmful"].value == pytest.approx(1 / 3)
    assert m["average_precision_unsafe"].value == pytest.approx(1 / 9)
    assert m["average_precision_unsafe_homogeneous"].value == pytest.approx(1 / 3)
    m = Noise().run(make_context(fixed(0 * scores, ASKED), NOISY, ASKED)).metrics
    assert m["average_precision"].value == pytest.approx(m["chance"].value)
    assert m["average_precision_harmful"].value == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_a_form_that_gives_itself_away_is_caught_by_the_homogeneous_pair(make_context) -> None:
    scores = np.zeros((3, 9))
    scores[2, 6:] = 1.0  # knows the form, not the defect
    m = Noise().run(make_context(fixed(scores, ASKED), NOISY, ASKED)).metrics
    assert m["average_precision_unsafe"].value > 0.6
    homogeneous = m["average_precision_unsafe_homogeneous"].value
    assert homogeneous == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_noise_without_marks_is_refused(make_context) -> None:
    with pytest.raises(DataError, match="no training example with the field 'planted'"):
        Noise().run(make_context(fixed(SAME), TRAIN, QUERIES))
    lost = Corpus([Example("q0", "x", "y", "no such task")])
    with pytest.raises(DataError, match="no query has a planted example"):
        Noise().run(make_context(fixed(np.zeros((1, 9)), lost), NOISY, lost))


def test_noise_builds_on_the_corpus_of_the_asset(make_context, tmp_path: Path) -> None:
    path = tmp_path / "noise.jsonl"
    with open(path, "w") as f:
        for split, examples in (("pool", NOISY), ("queries", ASKED)):
            for e in examples:
                row = {"id": e.id, "prompt": e.prompt, "response": e.response, "task": e.task}
                f.write(json.dumps({**row, **e.meta, "split": split}) + "\n")
    seen = []

    def build(train: Corpus) -> Built:
        seen.append(train.ids)
        return Built(fixed(np.zeros((3, 9)), neutral(ASKED, "query")), 1.0, 1, 1)

    context = make_context(fixed(SAME), TRAIN, QUERIES, assets={"noise": path}, build=build)
    out = Noise().run(context)
    assert seen == [[f"train-{i:06d}" for i in range(len(NOISY))]]
    assert out.query_ids == tuple(map(id_of, neutral(ASKED, "query")))
    assert set(out.query_ids) == set(ASKED.ids)
    with pytest.raises(UsageError, match="not available"):
        Noise().run(make_context(fixed(SAME), TRAIN, QUERIES, assets={"noise": path}))


# ------------------------------------------------------------------ tracing

STATED = Corpus(
    [
        Example("t0", "p0", "r0", meta={"fact": "f1"}),
        Example("t1", "p1", "r1", meta={"fact": "f2 f3"}),
        Example("t2", "p2", "r2", meta={"fact": "f1 f4"}),
        Example("t3", "p3", "r3", meta={"fact": "f5", "decoy": "f1"}),
    ]
)
WANTED = Corpus(
    [Example("q0", "a", "b", meta={"fact": "f1"}), Example("q1", "aa", "b", meta={"fact": "f3"})]
)


def test_tracing_by_hand(make_context) -> None:
    scores = np.array([[3.0, 1.0, 2.0, 4.0], [0.0, 1.0, 0.0, 0.0]])
    out = Tracing(k=(1, 2, 3)).run(make_context(fixed(scores, WANTED), STATED, WANTED))
    m = out.metrics
    assert out.per_query.tolist() == [0.5, 1.0]
    assert m["mrr"].value == 0.75
    assert m["recall@1"].value == 0.5  # none of two, one of one
    assert m["recall@2"].value == 0.75  # the share of the supporting examples, not a hit
    assert m["recall@3"].value == 1.0
    assert m["average_precision"].value == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1) / 2)
    assert m["decoy_rate"].value == 0.5


def test_a_decoy_that_holds_the_answer_counts_neither_way(make_context) -> None:
    """By hand: the decoy with the answer is first, that without second, the statement third."""
    marks = [{"fact": "f"}, {"decoy": "f"}, {"decoy": "f", "answers": "f"}, {}]
    pool = Corpus([Example(f"t{i}", "", f"text {i}", "", m) for i, m in enumerate(marks)])
    asked = Corpus([Example(f"q{i}", "which", f"one {i}", "", {"fact": "f"}) for i in range(2)])
    scores = np.array([[1.0, 2.0, 3.0, 0.0], [3.0, 2.0, 4.0, 0.0]])
    m = Tracing().run(make_context(fixed(scores, asked), pool, asked)).metrics
    assert m["mrr"].value == (1 / 2 + 1) / 2
    assert m["mrr_with_answers"].value == (1 / 3 + 1 / 2) / 2
    assert m["mrr_without_decoys"].value == 1
    assert m["decoy_rate"].value == 1 / 2
    assert m["decoy_rate"].low is not None  # a share: Wilson's interval
    assert m["chance"].value == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_questions_about_one_fact_are_asked_together(make_context) -> None:
    """Each question alone prefers another example; only their mean finds the statement."""
    pool = Corpus([Example(f"t{i}", "", f"text {i}", "", m)
                   for i, m in enumerate(({"fact": "f"}, {}, {}, {"fact": "g"}))])  # fmt: skip
    facts = ("f", "f", "g")
    asked = Corpus([Example(f"q{i}", "which", f"one {i}", "", {"fact": f, "kind": f})
                    for i, f in enumerate(facts)])  # fmt: skip
    scores = np.array([[2.0, 3.0, 0.0, 0.0], [2.0, 0.0, 3.0, 0.0], [0.0, 1.0, 0.0, 2.0]])
    context = make_context(fixed(scores, asked), pool, asked)
    assert Tracing(k=(1,)).run(context).metrics["mrr"].value == pytest.approx(2 / 3)
    out = Tracing(k=(1,), behaviours="kind", tail_queries=1).run(context)
    assert out.query_ids == ("f", "g")
    assert out.metrics["mrr"].value == 1
    assert "tail_patch" not in out.metrics
    assert any("asked together" in n for n in out.notes)
    with pytest.raises(DataError, match="no query has the field 'nothing'"):
        Tracing(behaviours="nothing").run(context)


def test_tracing_constant_scores_get_chance_and_unstated_facts_are_said(make_context) -> None:
    asked = Corpus([*WANTED, Example("q2", "aaa", "b", meta={"fact": "nowhere"})])
    out = Tracing().run(make_context(fixed(np.ones((3, 4)), asked), STATED, asked))
    assert out.metrics["mrr"].value == pytest.approx(out.metrics["chance"].value)
    assert out.query_ids == ("q0", "q1")
    assert "1 queries ask for unstated facts" in out.notes[0]
    assert out.metrics["decoy_rate"].value == pytest.approx((1 / 4 + 0) / 2)
    only = asked.subset([2])
    with pytest.raises(DataError, match="no query asks for a fact"):
        Tracing().run(make_context(fixed(np.ones((1, 4)), only), STATED, only))


def test_a_query_among_the_planted_examples_is_refused(make_context) -> None:
    leaked = Corpus([*STATED, Example("t9", "a", "b", meta={"fact": "f1"})])
    with pytest.raises(GuardError, match="also a training example"):
        Tracing().run(make_context(fixed(np.ones((2, 5)), WANTED), leaked, WANTED))


def test_tail_patch_rewards_what_teaches_the_answer(
    make_context, tiny_target, tiny_corpus, tiny_queries
) -> None:
    """One step on the very answer lowers the loss more than one on random examples."""
    query = Example("q", tiny_queries[0].prompt + "?", tiny_queries[0].response,
                    meta={"fact": "f"})  # fmt: skip
    twin = Example("twin", tiny_queries[0].prompt, tiny_queries[0].response, meta={"fact": "f"})
    train, queries = Corpus([*tiny_corpus, twin]), Corpus([query])
    scores = np.zeros((1, 61))
    scores[0, 60] = 1.0
    context = make_context(fixed(scores, queries), train, queries, target=tiny_target)
    out = Tracing(tail_k=1, tail_queries=1).run(context)
    assert out.metrics["tail_patch"].value > 0
