"""LOO and transfer on constructed cases."""

from __future__ import annotations

import numpy as np
import pytest
from constructed import FixedIndex, corpus, truth_of

from tdabench.benchmarks.loo import LOO, complement
from tdabench.benchmarks.transfer import Transfer
from tdabench.errors import DataError, UsageError
from tdabench.groups import Groups

RNG = np.random.default_rng(0)
TRAIN, QUERIES = corpus(20, "t"), corpus(6, "q")
SCORES = RNG.normal(size=(6, 20))
LEFT_OUT = Groups.singletons(20)
KEPT = complement(LEFT_OUT)


def test_complement() -> None:
    groups = Groups.of([[0, 2], [], [0, 1, 2]], 3)
    assert [g.tolist() for g in complement(groups)] == [[1], [0, 1, 2], []]


@pytest.mark.parametrize("score", ["removed", "kept"])
def test_leaving_out_what_helps_raises_the_loss(make_context, score: str) -> None:
    truth = truth_of((SCORES.sum(1, keepdims=True) - SCORES)[None], KEPT, QUERIES.ids)
    for sign in (1, -1):
        context = make_context(FixedIndex(sign * SCORES, QUERIES.ids), TRAIN, QUERIES,
                               {"loo": truth})  # fmt: skip
        out = LOO(score=score, replicates=50).run(context)
        assert out.metrics["loo"].value == pytest.approx(sign, abs=1e-3)
        assert out.primary == "loo"


def test_leave_several_out_says_how_many(make_context) -> None:
    removed = Groups.random(15, 20, 0.2, np.random.default_rng(2))
    kept = complement(removed)
    values = SCORES @ kept.membership(np.float64).toarray().T
    context = make_context(
        FixedIndex(SCORES, QUERIES.ids), TRAIN, QUERIES,
        {"loo": truth_of(values[None], kept, QUERIES.ids)},
    )  # fmt: skip
    out = LOO(replicates=50).run(context)
    assert out.metrics["loo"].value == pytest.approx(1, abs=1e-6)
    assert "examples left out at a time: 4" in out.notes


def test_leaving_out_one_and_several_in_one_run(make_context) -> None:
    removed = Groups.random(15, 20, 0.2, np.random.default_rng(2))
    kept = complement(removed)
    values = SCORES @ kept.membership(np.float64).toarray().T
    ones = truth_of((SCORES.sum(1, keepdims=True) - SCORES)[None], KEPT, QUERIES.ids)
    truths = {"loo": truth_of(-values[None], kept, QUERIES.ids), "loo-1": ones}
    context = make_context(FixedIndex(SCORES, QUERIES.ids), TRAIN, QUERIES, truths)
    out = LOO(also=("loo-1",), replicates=50).run(context)
    assert out.metrics["loo"].value == pytest.approx(-1, abs=1e-6)
    assert out.metrics["loo[loo-1]"].value == pytest.approx(1, abs=1e-6)
    assert out.notes[0] == "examples left out at a time: 4"


def test_leaving_nothing_out_ranks_nothing(make_context) -> None:
    """An empty removal scores 0, as an empty group does: constant, and reported."""
    whole = Groups.of([range(20)] * 3, 20)
    truth = truth_of(RNG.normal(size=(1, 6, 3)), whole, QUERIES.ids)
    context = make_context(FixedIndex(SCORES, QUERIES.ids), TRAIN, QUERIES, {"loo": truth})
    out = LOO(replicates=50).run(context)
    assert out.metrics["loo"].value == 0
    assert out.metrics["constant_queries"].value == 6


def test_loo_refuses_an_unknown_rule() -> None:
    with pytest.raises(UsageError, match="removed, kept"):
        LOO(score="both")


GROUPS = Groups.random(12, 20, 0.3, np.random.default_rng(1))
VALUES = SCORES @ GROUPS.membership(np.float64).toarray().T


def transfer(make_context, others, truths=None, **params):
    context = make_context(
        FixedIndex(SCORES, QUERIES.ids), TRAIN, QUERIES, truths,
        other_truths={label: (lambda name, t=t: t) for label, t in others.items()},
    )  # fmt: skip
    return Transfer(replicates=100, **params).run(context)


def test_transfer_is_the_mean_over_other_targets(make_context) -> None:
    same = truth_of(VALUES[None], GROUPS, QUERIES.ids)
    opposite = truth_of(-VALUES[None], GROUPS, QUERIES.ids)
    noise = RNG.normal(size=VALUES.shape)
    other = truth_of(noise[None], GROUPS, QUERIES.ids)
    out = transfer(make_context, {"a": same, "b": opposite}, {"lds": other})
    assert out.metrics["transfer"].value == pytest.approx(0, abs=1e-12)
    assert out.metrics["lds[a]"].value == pytest.approx(1)
    assert out.metrics["lds[b]"].value == pytest.approx(-1)
    # The in-model diagonal is shown and stays out of the mean.
    assert abs(out.metrics["lds[source]"].value) < 0.9
    only = transfer(make_context, {"a": same, "b": opposite}, targets=("a",))
    assert only.metrics["transfer"].value == pytest.approx(1)
    assert any("no in-model diagonal" in n for n in only.notes)


def test_transfer_with_other_groups_and_another_order_of_queries(make_context) -> None:
    groups = Groups.random(9, 20, 0.5, np.random.default_rng(3))
    values = SCORES @ groups.membership(np.float64).toarray().T
    order = RNG.permutation(6)
    shuffled = truth_of(values[None, order], groups, [QUERIES.ids[i] for i in order])
    a = truth_of(VALUES[None], GROUPS, QUERIES.ids)
    out = transfer(make_context, {"a": a, "b": shuffled})
    assert out.metrics["transfer"].value == pytest.approx(1)
    assert out.replicates is not None
    np.testing.assert_allclose(out.replicates, 1, atol=1e-6)


def test_targets_without_the_truth_are_passed_over_unless_asked_for(make_context) -> None:
    def absent(name: str):
        raise UsageError(f"unknown truth of the target b {name!r}")

    a = truth_of(VALUES[None], GROUPS, QUERIES.ids)
    context = make_context(
        FixedIndex(SCORES, QUERIES.ids), TRAIN, QUERIES,
        other_truths={"a": lambda name: a, "b": absent},
    )  # fmt: skip
    out = Transfer(replicates=50).run(context)
    assert out.metrics["transfer"].value == pytest.approx(1)
    assert any("not compared: unknown truth of the target b" in n for n in out.notes)
    with pytest.raises(UsageError, match="target b"):
        Transfer(targets=("b",)).run(context)


def test_the_ceiling_is_the_mean_of_the_other_targets(make_context) -> None:
    def noisy(sd: float):
        values = VALUES + sd * VALUES.std() * RNG.normal(size=(4, *VALUES.shape))
        return truth_of(values, GROUPS, QUERIES.ids)

    out = transfer(make_context, {"a": noisy(0.2), "b": noisy(1.0)}, {"lds": noisy(0.1)})
    m = out.metrics
    assert m["ceiling[source]"].value > m["ceiling[a]"].value > m["ceiling[b]"].value
    expected = (m["ceiling[a]"].value + m["ceiling[b]"].value) / 2
    assert m["ceiling"].value == pytest.approx(expected)


def test_what_models_have_in_common_bounds_a_method_that_knows_none(make_context) -> None:
    """Truths of one common factor with loadings 0.9, 0.8, 0.6 and 0.7: `agnostic` finds each."""
    rng = np.random.default_rng(5)
    queries = corpus(150, "f")
    groups = Groups.random(60, 20, 0.3, rng)
    common = rng.normal(size=(150, 60))
    loading = {"a": 0.9, "b": 0.8, "c": 0.6, "source": 0.7}
    truths = {}
    for name, x in loading.items():
        values = x * common + np.sqrt(1 - x * x) * rng.normal(size=common.shape)
        truths[name] = truth_of(values[None], groups, queries.ids)
    # Another target holds the first 20 of the same groups only.
    part = Groups.of([groups[g] for g in range(20)], 20)
    few = common[:, :20]
    truths["few"] = truth_of(few[None], part, queries.ids)
    own = truths.pop("source")
    context = make_context(
        FixedIndex(rng.normal(size=(150, 20)), queries.ids), TRAIN, queries, {"lds": own},
        other_truths={label: (lambda name, t=t: t) for label, t in truths.items()},
    )  # fmt: skip
    m = Transfer(replicates=20).run(context).metrics
    for name, x in loading.items():  # Spearman's correlation of normal values is a little lower
        assert m[f"agnostic[{name}]"].value == pytest.approx(x, abs=0.04)
    mean = np.mean([0.9 * 0.8, 0.9 * 0.6, 0.9 * 0.7, 0.9])
    assert m["truth[a]"].value == pytest.approx(mean, abs=0.04)
    only = transfer(make_context, {"a": truth_of(VALUES[None], GROUPS, QUERIES.ids)})
    assert "truth[a]" not in only.metrics  # nothing to compare it with


def test_groups_held_by_two_truths_are_drawn_alike(make_context) -> None:
    """Two targets with the same truth, one over half of the groups, in another order: where both
    hold a group it counts as often, so that their replicates go together."""
    rng = np.random.default_rng(6)
    values = VALUES + 0.5 * VALUES.std() * rng.normal(size=VALUES.shape)
    whole = truth_of(values[None], GROUPS, QUERIES.ids)
    order = rng.permutation(12)
    mixed = truth_of(
        values[None][:, :, order], Groups.of([GROUPS[int(g)] for g in order], 20), QUERIES.ids
    )
    one = transfer(make_context, {"a": whole})
    two = transfer(make_context, {"a": whole, "b": mixed})
    assert one.replicates is not None
    np.testing.assert_allclose(two.replicates, one.replicates, atol=1e-6)


def test_transfer_needs_another_target(make_context) -> None:
    with pytest.raises(DataError, match="no other target"):
        transfer(make_context, {})
    with pytest.raises(UsageError, match="unknown other target 'c'"):
        transfer(make_context, {}, targets=("c",))
