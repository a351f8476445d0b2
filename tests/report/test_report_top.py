"""What the run engine keeps for the query explorer."""

from __future__ import annotations

import numpy as np
import pytest

from tdabench.data.examples import Corpus, Example
from tdabench.method import Index
from tdabench.run import top
from tdabench.run.top import too_long, top_examples

QUERIES = Corpus(Example(f"q{i}", "p", f"r{i}") for i in range(7))


class Fixed(Index):
    def __init__(self, scores: np.ndarray) -> None:
        self.scores, self.n_train = scores.astype(np.float32), scores.shape[1]

    def score(self, queries):
        return self.scores[[int(q.id[1:]) for q in queries]]

    def save(self, path):
        raise NotImplementedError


@pytest.mark.parametrize("n_train", [3, 10, 500])
def test_extremes_in_order_with_ties_by_place(n_train, monkeypatch):
    monkeypatch.setattr(top, "BLOCK", 2 * n_train)  # several blocks
    scores = np.random.default_rng(0).integers(-3, 4, (7, n_train))
    found = top_examples(Fixed(scores), QUERIES)
    k = min(10, n_train)
    for q in range(7):
        best = sorted(range(n_train), key=lambda i: (-scores[q, i], i))[:k]
        worst = sorted(range(n_train), key=lambda i: (scores[q, i], i))[:k]
        assert found["top_index"][q].tolist() == best
        assert found["bottom_index"][q].tolist() == worst
        assert found["top_score"][q].tolist() == [scores[q, i] for i in best]
        assert found["bottom_score"][q].tolist() == [scores[q, i] for i in worst]


def test_nothing_is_kept_where_it_cannot_or_should_not_be():
    class GroupsOnly(Fixed):
        def score(self, queries):
            raise NotImplementedError("group scores only")

    scores = np.zeros((7, 5))
    assert top_examples(GroupsOnly(scores), QUERIES) == {}
    assert top_examples(Fixed(np.full((7, 5), np.nan)), QUERIES) == {}
    assert top_examples(Fixed(np.zeros((7, 0))), QUERIES) == {}


def test_a_display_costs_no_measurement():
    assert not too_long(90.0, cell=80.0, timeout=7200.0)  # kfac on `pocket`
    assert not too_long(4000.0, cell=5000.0, timeout=0.0)
    assert too_long(4000.0, cell=10.0, timeout=0.0)
    assert too_long(95.0, cell=200.0, timeout=100.0)
