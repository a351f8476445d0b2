"""What counts as leaving a model changed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tdabench.data.examples import Corpus, Example
from tdabench.errors import MethodError
from tdabench.groups import Groups
from tdabench.method import Index
from tdabench.run.meter import GlobalRandomness, Memory, Meter, MeteredIndex, model_state
from tdabench.toolkit.representation import RepresentationIndex


def test_hooks_of_transformers_are_not_the_methods(tiny_target):
    model = tiny_target.fresh_model("base")
    before = model_state(model)
    model(input_ids=torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert model_state(model) == before
    model.register_forward_hook(lambda module, args, output: None)
    assert model_state(model)["hooks"] == before["hooks"] + 1


def test_what_a_library_draws_while_it_is_set_up_is_not_the_methods() -> None:
    meter, globals_ = Meter(), GlobalRandomness()
    with meter.setup, meter.setup:  # an import within an import
        random.random()
        np.random.random()
        torch.rand(1)
    globals_.check("method")
    for draw in (random.random, np.random.random, lambda: torch.rand(1)):
        draw()
        with pytest.raises(MethodError, match="method drew from or seeded the global random"):
            globals_.check("method")


class Counted(Index):
    """Scores by a query's length; counts how often it is asked and takes a while."""

    n_train = 3

    def __init__(self) -> None:
        self.asked: list[int] = []

    def score(self, queries):
        self.asked.append(len(queries))
        total, x = 0.0, np.random.default_rng(0).normal(size=200)
        for _ in range(2000):
            total += float(x @ x)
        row = np.arange(3, dtype=np.float32)
        return np.stack([row * len(q.prompt) for q in queries])

    def save(self, path):
        raise AssertionError("not called")


class Blocked(Counted):
    score_groups = RepresentationIndex.score_groups


def test_benchmarks_share_scores_and_each_counts_what_they_took() -> None:
    queries = Corpus([Example(str(i), "a" * (i + 1), "b") for i in range(5)], "queries")
    groups = Groups.of([[0, 2], [1]], 3)
    index, memory = Counted(), Memory()
    first, second, third = (MeteredIndex(index, "counted", 3, Meter(), memory) for _ in range(3))
    scores = first.score(queries)
    pooled = second.score_groups(queries, groups)
    np.testing.assert_array_equal(pooled, scores[:, [0, 1]] + [[1, 0]] * scores[:, [2, 1]])
    scores[:] = 7.0  # what a benchmark does to its scores is its own affair
    np.testing.assert_array_equal(third.score(queries), Counted().score(queries))
    assert index.asked == [5], "the others were told what the first found"
    assert third.seconds == first.seconds > 0
    assert third.cpu_seconds == first.cpu_seconds
    assert second.seconds >= first.seconds, "pooling is its own"
    assert "reused" not in first.cost()
    assert third.cost()["reused"] == 1
    assert third.cost()["queries"] == 5
    part = MeteredIndex(index, "counted", 3, Meter(), memory)
    np.testing.assert_array_equal(
        part.score(queries.subset([3, 1])), Counted().score(queries)[[3, 1]]
    )
    assert index.asked == [5], "some of the queries are known, too"
    assert part.seconds == pytest.approx(first.seconds * 2 / 5)
    part.score([*queries[:2], Example("9", "aaa", "b")])
    assert index.asked == [5, 3], "other queries are scored"
    held = Blocked()
    np.testing.assert_array_equal(
        MeteredIndex(held, "held", 3, Meter(), memory := Memory()).score_groups(queries, groups),
        pooled,
    )
    MeteredIndex(held, "held", 3, Meter(), memory).score(queries)
    assert held.asked == [5], "an index that pools as we do, block by block, is one of them"
    alone = MeteredIndex(index, "counted", 3, Meter())
    alone.score(queries)
    assert index.asked == [5, 3, 5]


def test_no_more_scores_are_kept_than_memory_is_meant_for(monkeypatch) -> None:
    monkeypatch.setattr(Memory, "MOST", 14)
    queries = Corpus([Example(str(i), "a" * (i + 1), "b") for i in range(5)], "queries")
    index, memory = Counted(), Memory()
    for part in (queries, queries[:3], queries[3:], queries[3:], queries[:3]):
        MeteredIndex(index, "counted", 3, Meter(), memory).score(part)
    assert index.asked == [5, 3, 2, 2], "three by three fit"
