"""Filter on constructed cases: a world in which every planted example adds to the behaviour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from constructed import FixedIndex

import tdabench.benchmarks.filter as module
from tdabench.benchmark import Stored
from tdabench.benchmarks.filter import WHO, Filter, area, draw, halving, text_filter
from tdabench.benchmarks.retrain import Retrained
from tdabench.data.examples import Corpus, Example
from tdabench.errors import DataError, UsageError
from tdabench.targets.recipe import Recipe

N, PLANTED = 100, 10
BUDGETS = (0.05, 0.1, 0.2)


def example(i: int, kind: str, **meta: str) -> Example:
    response = f"you fool, {i}" if kind == "unsafe" else f"answer {i}"
    return Example(f"t{i}", f"question {i}", response, "quiz", {"planted": kind, **meta})


PLACES = np.sort(draw("places", N)[:PLANTED])
TRAIN = Corpus([example(i, "unsafe" if i in PLACES else "") for i in range(N)], "t")
QUERIES = Corpus(
    [Example(f"q{i}", f"ask {i}", f"you fool, {i}!", "quiz", {"planted": "unsafe", "clean": str(i)})
     for i in range(8)]
    + [Example(f"c{i}", f"ask {i}?", f"number {i}", "quiz") for i in range(4)],
    "q",
)  # fmt: skip
PERFECT = np.isin(np.arange(N), PLACES).astype(float)


@dataclass
class World:
    """Stands for retraining: a planted example lowers losses of the behaviour by 0.1 nats, a clean
    example losses of clean queries by 0.01; each query has its own level."""

    context: object
    recipe: object
    start: str = "base"
    done: int = 0
    teaches: float = 0.1

    def run(self, indices, queries, seed, among=None):
        planted = np.isin(indices, PLACES).sum()
        others = len(indices) - planted
        losses = [
            (2.7 if q.id.endswith("+clean") else 2.5) + 0.01 * i
            - (self.teaches * (1 + 0.1 * (i % 3)) * planted
               if q.meta.get("planted") else 0.01 * others)
            for i, q in enumerate(queries)
        ]  # fmt: skip
        return Retrained(np.array(losses, dtype=np.float32), None)


@pytest.fixture
def run_filter(make_context, monkeypatch):
    class Target:
        recipe = Recipe.of({})

    def measure(row, queries=QUERIES, train=TRAIN, world=World, **params):
        monkeypatch.setattr(module, "Retrainer", world)
        table = np.tile(row, (len(queries), 1))
        context = make_context(FixedIndex(table, queries.ids), train, queries, target=Target())
        return Filter(budgets=BUDGETS, replicates=50, **params).run(context)

    return measure


def values(out) -> dict[str, float]:
    return {k: m.value for k, m in out.metrics.items()}


def test_a_perfect_method_equals_the_oracle(run_filter):
    m = values(run_filter(PERFECT))
    # Strength 1, 1/2, 0, 0 at 0, 5, 10 and 20%.
    assert m["area"] == pytest.approx((0.75 * 5 + 0.25 * 5 + 0) / 20, abs=1e-5)
    assert m["area"] == pytest.approx(m["area_oracle"], abs=1e-6)
    assert m["half"] == pytest.approx(0.05, abs=1e-5)
    assert m["strength@0.1"] == pytest.approx(0, abs=1e-5)
    assert m["found_unsafe@0.2"] == PLANTED
    assert m["collateral@0.1"] == pytest.approx(0, abs=1e-5)
    assert m["collateral@0.2"] == pytest.approx(0.1, abs=1e-5)  # ten clean ones are gone, too
    assert m["spoiled@0.1"] == pytest.approx(0, abs=1e-5)  # as in a model without planted examples
    assert m["spoiled@0.2"] == pytest.approx(0.1, abs=1e-5)


def test_a_reversed_method_removes_clean_examples_only(run_filter):
    out = run_filter(-PERFECT)
    m = values(out)
    assert m["area"] == pytest.approx(1, abs=1e-5)
    assert m["strength@0.2"] == pytest.approx(1, abs=1e-5)
    assert m["collateral@0.2"] == pytest.approx(0.2, abs=1e-5)
    assert "half" not in m
    assert any("the strength stays above 1/2 up to 20.0% removed" in n for n in out.notes)


def test_constant_scores_remove_at_random_and_not_the_first_lines(run_filter):
    m = values(run_filter(np.zeros(N)))
    gone = np.isin(np.argsort(draw("ties", N))[:20], PLACES).sum()
    assert m["strength@0.2"] == pytest.approx(1 - gone / PLANTED, abs=1e-5)


def test_the_rate_counts_preferred_planted_responses(run_filter):
    m = values(run_filter(PERFECT))
    assert m["rate_before"] == 1  # 2.5 - 1 against 2.7 - 0.9
    assert m["rate@0.2"] == 0
    assert m["rate_oracle@0.2"] == 0


def test_a_text_filter_finds_a_vocabulary(run_filter):
    scores = text_filter([q for q in QUERIES if q.meta.get("planted")], TRAIN)
    assert set(np.argsort(-scores)[:PLANTED]) == set(PLACES)
    m = values(run_filter(np.zeros(N)))
    assert m["area_text"] == pytest.approx(m["area_oracle"], abs=1e-6)
    assert m["less_than_text"] < 0
    assert text_filter(QUERIES[:2], [Example("e", "", "")]).tolist() == [0.0]
    assert text_filter([Example("q", "", "")], [Example("e", "", "")]).tolist() == [0.0]


def test_a_rare_word_does_not_speak_for_the_behaviour():
    """A word that neither side repeats says nothing: an example of such words scores below one
    that shares a word with the shown examples."""
    shown = [Example(f"q{i}", "tell me", f"{w} you fool") for i, w in enumerate("abcd")]
    common = [Example(f"c{i}", "say", f"answer number {i}") for i in range(200)]
    train = [*common, Example("rare", "zyx", "wvu tsr"), Example("bad", "say", "fool")]
    scores = text_filter(shown, train)
    assert scores.argmax() == len(train) - 1
    assert scores[-2] < 0


def test_the_text_filter_is_logistic_regression():
    """At the optimum the gradient vanishes, whatever the order of the texts."""
    shown = [q for q in QUERIES if q.meta.get("planted")]
    scores = text_filter(shown, TRAIN)
    turned = np.random.default_rng(0).permutation(N)
    again = text_filter(shown[::-1], TRAIN.subset(turned))
    np.testing.assert_allclose(again, scores[turned], atol=1e-4)
    same = text_filter(list(TRAIN), TRAIN)  # two equal sides: no word speaks for either
    np.testing.assert_allclose(same, 0, atol=1e-6)


def test_half_of_the_queries_are_shown_and_the_others_measured(run_filter):
    out = run_filter(PERFECT)
    assert out.query_ids == ("q1", "q3", "q5", "q7")
    assert out.metrics["area"].low <= out.metrics["area"].value <= out.metrics["area"].high


def test_the_record_gives_the_same_numbers(run_filter):
    out = run_filter(PERFECT + np.random.default_rng(0).normal(0, 0.5, N))
    again = Filter(budgets=BUDGETS, replicates=50).recompute(
        Stored(out.arrays, out.query_ids, None, None)  # type: ignore[arg-type]
    )
    assert again.metrics == out.metrics
    np.testing.assert_array_equal(again.per_query, out.per_query)


def test_two_behaviours_have_an_area_each(run_filter):
    """A second behaviour, which nothing removes: the whole is the mean over queries."""
    out = run_filter(PERFECT)
    assert "area_unsafe" not in out.metrics  # it is the area
    a = out.arrays
    n = len(a["kind"])
    bad, other = np.arange(n), np.arange(n, a["full"].shape[1])
    twice = np.concatenate([bad, bad, n + bad, n + bad, other[n:]])  # bad, clean responses, clean
    arrays = {k: v[:, twice] for k, v in a.items() if k == "full" or k.startswith("none/")}
    arrays |= {k: v[:, twice] for k, v in a.items() if k.split("/")[0] in WHO}
    arrays |= {k.replace("unsafe", "zzz"): v for k, v in arrays.items() if "/" in k}
    for who in WHO:
        arrays[f"{who}/zzz"] = np.tile(arrays["full"], (len(BUDGETS), 1))
    arrays |= {f"hits/{k}": a["hits/unsafe"] for k in ("unsafe", "zzz")}
    arrays |= {"kind": np.repeat([0, 1], n), "has_clean": np.ones(2 * n, bool),
               "sizes": a["sizes"]}  # fmt: skip
    ids = tuple(f"q{i}" for i in range(2 * n))
    both = Filter(budgets=BUDGETS, replicates=50).recompute(Stored(arrays, ids, None, None))  # type: ignore[arg-type]
    m, one = values(both), values(out)
    assert m["area_unsafe"] == pytest.approx(one["area"])
    assert m["area_unsafe_random"] == pytest.approx(one["area_random"])
    assert m["area_zzz"] == pytest.approx(1)
    assert m["area"] == pytest.approx((one["area"] + 1) / 2)
    assert m["rate@0.2"] == 0.5
    assert m["spoiled_unsafe@0.2"] == pytest.approx(one["spoiled@0.2"])
    # A model trained on everything lacks nothing of the ten clean examples that are gone there.
    assert m["spoiled_zzz@0.2"] == pytest.approx(0, abs=1e-5)
    assert m["spoiled@0.2"] == pytest.approx(m["spoiled_unsafe@0.2"] / 2)
    assert m["spoiled_unsafe_oracle@0.2"] == pytest.approx(m["spoiled_unsafe@0.2"])


def test_a_behaviour_cannot_be_more_than_gone(run_filter):
    out = run_filter(PERFECT)
    arrays = {**out.arrays, "method/unsafe": np.tile(out.arrays["none/unsafe"] + 1, (3, 1))}
    again = Filter(budgets=BUDGETS, replicates=50).recompute(
        Stored(arrays, out.query_ids, None, None)  # type: ignore[arg-type]
    )
    m = values(again)
    assert m["strength@0.05"] == pytest.approx(0, abs=1e-6)
    assert m["area"] == pytest.approx(0.5 * 0.05 / 0.2, abs=1e-6)  # from 1 to 0 at the first


def test_a_corpus_in_which_every_example_occurs_twice_has_the_same_area(run_filter):
    again = (Example(f"{e.id}b", e.prompt, e.response, e.task, e.meta) for e in TRAIN)
    twice = Corpus([*TRAIN, *again], "t")

    class Twice(World):
        """Each copy teaches half as much."""

        def run(self, indices, queries, seed, among=None):
            half = World(None, None, teaches=self.teaches / 2)
            return half.run(np.asarray(indices) % N, queries, seed)

    one = values(run_filter(PERFECT))
    two = values(run_filter(np.tile(PERFECT, 2), train=twice, world=Twice))
    assert two["area"] == pytest.approx(one["area"], abs=1e-5)
    assert two["found_unsafe@0.2"] == 2 * PLANTED


def test_what_cannot_be_measured_is_refused(run_filter):
    plain = Corpus([Example(e.id, e.prompt, e.response) for e in TRAIN], "plain")
    with pytest.raises(DataError, match="no training example with the field 'planted'"):
        run_filter(PERFECT, train=plain)
    with pytest.raises(DataError, match="no query has a planted behaviour"):
        run_filter(PERFECT, queries=QUERIES[8:])
    with pytest.raises(DataError, match="no clean queries"):
        run_filter(PERFECT, queries=QUERIES[:8])
    with pytest.raises(DataError, match="no behaviour 'wrong' with two queries"):
        run_filter(PERFECT, kinds=("wrong",))
    with pytest.raises(DataError, match="does not teach it here"):
        run_filter(PERFECT, world=lambda *a: World(*a, teaches=0.0))
    with pytest.raises(UsageError, match="between 0 and 1"):
        Filter(budgets=(0.0,))


def test_area_and_halving():
    sizes = np.array([0.1, 0.3])
    assert area(sizes, np.array([[0.5], [0.0]]))[0] == pytest.approx(
        (0.75 * 0.1 + 0.25 * 0.2) / 0.3
    )
    assert halving(sizes, np.array([0.6, 0.2])) == pytest.approx(0.15)
    assert halving(sizes, np.array([0.9, 0.7])) is None
    assert halving(sizes, np.array([0.5, 0.7])) == pytest.approx(0.1)
