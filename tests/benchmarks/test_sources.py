"""Sources on constructed cases: exact effects, one source, duplicated sources."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from constructed import FixedIndex, corpus, truth_of

from tdabench.benchmark import Built, Stored
from tdabench.benchmarks.sources import Sources, drawn_sources
from tdabench.data.examples import Corpus, Example
from tdabench.data.origins import (
    copied_groups,
    members_by_origin,
    most_asked,
    origins,
    with_copies,
    without_each,
)
from tdabench.errors import DataError

N, Q, K = 24, 12, 6
TRAIN, QUERIES = corpus(N, "t", tasks=K), corpus(Q, "q", tasks=K)
OWN = np.array([[a == b for b in TRAIN.tasks] for a in QUERIES.tasks])
SCORES = np.random.default_rng(0).uniform(0.0, 1.0, (Q, N)) + 3.0 * OWN  # own sources help most
KEPT = without_each(TRAIN)


def values_of(scores: np.ndarray) -> np.ndarray:
    """-loss where every example lowers a query's loss by its score: [1, query, group]."""
    return (scores @ KEPT.membership(np.float64).toarray().T)[None]


TRUTH = truth_of(values_of(SCORES), KEPT, QUERIES.ids)


def measured(make_context, index, *, copies: int = 0, **more):
    context = make_context(index, TRAIN, QUERIES, {"sources": TRUTH}, **more)
    return Sources(copies=copies, replicates=100).run(context)


def test_origins_are_the_field_source_or_the_task():
    named = [Example("a", "p", "r", "t", {"source": "web"}), Example("b", "p", "r", "u")]
    assert origins(named) == ["web", ""]
    assert origins(named, "task") == ["t", "u"]
    assert origins(named, "licence") == ["", ""]
    assert origins(TRAIN) == TRAIN.tasks
    assert list(members_by_origin(TRAIN)) == [f"task{i}" for i in range(K)]


def test_each_source_is_left_out_once_and_then_none():
    assert len(KEPT) == K + 1
    assert KEPT.sizes.tolist() == [N - N // K] * K + [N]
    for (_, members), kept in zip(members_by_origin(TRAIN).items(), KEPT):
        assert sorted([*members, *kept]) == list(range(N))


def test_the_sources_that_most_queries_belong_to_are_left_out(make_context):
    asked = Corpus([Example(f"q{i}", f"p{i}", "r", t) for i, t in enumerate(
        ["task3", "task3", "task1", "task0", "other", "other", "other"])], "asked")  # fmt: skip
    assert most_asked(TRAIN, asked, "task", 2) == ["task3", "task0"]
    with pytest.raises(DataError, match="belong to 3 sources of training examples, fewer than 4"):
        most_asked(TRAIN, asked, "task", 4)
    kept = without_each(TRAIN, "task", ["task3", "task0"])
    members = members_by_origin(TRAIN)
    for name, group in zip(("task0", "task3"), kept):
        assert sorted([*members[name], *group]) == list(range(N))
    assert kept.sizes.tolist() == [N - N // K, N - N // K, N]
    values = (SCORES @ kept.membership(np.float64).toarray().T)[None]
    truth = truth_of(values, kept, QUERIES.ids)
    context = make_context(FixedIndex(SCORES, QUERIES.ids), TRAIN, QUERIES, {"sources": truth})
    out = Sources(copies=0, replicates=50).run(context)
    assert out.arrays["source_scores"].shape == (Q, 2)
    assert out.metrics["sources"].value == pytest.approx(1)
    assert out.metrics["strongest_chance"].value == 0.5


@pytest.mark.parametrize(("sign", "first"), [(1, 1.0), (-1, 0.0)])
def test_perfect_and_reversed_scores(make_context, sign: int, first: float):
    out = measured(make_context, FixedIndex(sign * SCORES, QUERIES.ids))
    assert out.primary == "sources"
    for name in ("sources", "elsewhere", "behaviour"):
        assert out.metrics[name].value == pytest.approx(sign, abs=1e-3)
    assert out.metrics["strongest"].value == first
    assert out.metrics["strongest_chance"].value == pytest.approx(1 / K)
    assert out.notes[0] == f"{K} sources, each left out in turn"


def test_constant_scores_are_chance(make_context):
    out = measured(make_context, FixedIndex(np.zeros((Q, N)), QUERIES.ids))
    assert out.metrics["sources"].value == 0
    assert out.metrics["constant_queries"].value == Q
    assert out.metrics["strongest"].value == pytest.approx(1 / K)
    assert out.metrics["elsewhere"].value == 0


def test_the_topic_alone_finds_the_strongest_source_and_nothing_elsewhere(make_context):
    out = measured(make_context, FixedIndex(OWN.astype(float), QUERIES.ids))
    assert out.metrics["strongest"].value == 1
    assert out.metrics["elsewhere"].value == 0


def test_intervals_draw_the_sources_that_were_left_out(make_context):
    noisy = SCORES + np.random.default_rng(1).normal(0, 2, SCORES.shape)
    m = measured(make_context, FixedIndex(noisy, QUERIES.ids)).metrics["sources"]
    assert m.low < m.value < m.high
    assert m.high - m.low > 0.02  # six sources say little of others


def test_one_source_and_none_are_refused(make_context):
    index = FixedIndex(SCORES, QUERIES.ids)
    for tasks in (("a",), ("",)):
        train = Corpus([Example(e.id, e.prompt, e.response, tasks[0]) for e in TRAIN], "one")
        context = make_context(index, train, QUERIES, {"sources": TRUTH})
        with pytest.raises(DataError, match="sources: two are needed"):
            Sources(copies=0).run(context)


def test_a_truth_of_other_groups_is_refused(make_context):
    half = truth_of(values_of(SCORES)[:, :, :K], KEPT[:K], QUERIES.ids)
    context = make_context(FixedIndex(SCORES, QUERIES.ids), TRAIN, QUERIES, {"sources": half})
    with pytest.raises(DataError, match="does not leave out one source at a time"):
        Sources(copies=0).run(context)


def test_the_record_gives_the_same_numbers(make_context):
    out = measured(make_context, FixedIndex(SCORES, QUERIES.ids))
    stored = Stored(out.arrays, out.query_ids, lambda name: TRUTH, lambda label, name: TRUTH)
    again = Sources(copies=0, replicates=100).recompute(stored)
    assert again.metrics == out.metrics
    np.testing.assert_array_equal(again.per_query, out.per_query)


# --------------------------------------------------------------------------- copies


def copied_table(additive: bool) -> np.ndarray:
    """Scores on the corpus with copies, additive or shared among equal texts: [query, train]."""
    copied = drawn_sources(list(members_by_origin(TRAIN)), 2)
    members = members_by_origin(TRAIN)
    places = np.concatenate([members[n] for n in copied])
    table = np.concatenate([SCORES, SCORES[:, places]], axis=1)
    if not additive:
        table[:, places] /= 2
        table[:, N:] /= 2
    return table


@pytest.mark.parametrize(("additive", "worth"), [(True, 2.0), (False, 1.0)])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_copies_that_count_twice_are_shown(make_context, additive, worth, scale):
    asked = []

    def build(other: Corpus) -> Built:
        asked.append(other)
        return Built(FixedIndex(scale * copied_table(additive), QUERIES.ids), 0.0, 0, 0)

    out = measured(make_context, FixedIndex(SCORES, QUERIES.ids), copies=2, build=build)
    assert out.metrics["copies_worth"].value == pytest.approx(worth, abs=1e-5)
    assert out.metrics["copies_worth"].low == pytest.approx(worth, abs=1e-5)
    assert any("truly worth is unknown" in n for n in out.notes)
    assert [len(c) for c in asked] == [N + 2 * N // K]
    assert all(i.endswith("+copy") for i in asked[0].ids[N:])


def test_retraining_says_what_copies_are_worth(make_context, tmp_path):
    """In this world a copy adds a quarter of what its source is worth."""
    copied = drawn_sources(list(members_by_origin(TRAIN)), 2)
    doubled, groups = with_copies(TRAIN, copied), copied_groups(TRAIN, copied)
    table = np.concatenate([SCORES, copied_table(True)[:, N:] / 4], axis=1)
    values = (table @ groups.membership(np.float64).toarray().T)[None]
    path = tmp_path / "copies.safetensors"
    truth_of(values, groups, QUERIES.ids, train=doubled.fingerprint, recipe={}).save(path)
    build = lambda other: Built(FixedIndex(copied_table(True), QUERIES.ids), 0.0, 0, 0)  # noqa: E731
    from tdabench.targets.recipe import Recipe

    target = SimpleNamespace(
        fingerprint_of=lambda start: "x", recipe=Recipe.of({}), name="constructed"
    )
    out = measured(
        make_context, FixedIndex(SCORES, QUERIES.ids), copies=2, build=build,
        assets={"copies": path}, target=target,
    )  # fmt: skip
    assert out.metrics["copies_worth"].value == pytest.approx(2.0, abs=1e-5)
    assert out.metrics["copies_worth_true"].value == pytest.approx(1.25, abs=1e-4)


def test_harmful_sources_have_no_worth_to_compare(make_context):
    build = lambda other: Built(FixedIndex(-copied_table(True), QUERIES.ids), 0.0, 0, 0)  # noqa: E731
    out = measured(make_context, FixedIndex(-SCORES, QUERIES.ids), copies=2, build=build)
    assert "copies_worth" not in out.metrics
    assert any("what copies are worth is undefined" in n for n in out.notes)
