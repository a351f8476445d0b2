"""Pipelines: names, constructed scores, and the laws that every method keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdabench.data.examples import Corpus, Example
from tdabench.errors import MethodError, UsageError
from tdabench.groups import Groups
from tdabench.method import Index, TDAMethod
from tdabench.registry import registry
from tdabench.stats import average_ranks
from tdabench.testing import parametrize_with_laws
from tdabench.toolkit.pipeline import PipelineIndex, PipelineName, calibrated


class Fixed(Index):
    """Scores that are given: query i has row i, by its id."""

    def __init__(self, scores, pooling: str = "sum") -> None:
        self.scores = np.asarray(scores, dtype=np.float32)
        self.n_train, self.pooling = self.scores.shape[1], pooling
        self.asked: list[int] = []

    def score(self, queries):
        return self.scores[[int(q.id) for q in queries]]

    def score_some(self, queries, candidates):
        self.asked.append(candidates.size)
        return super().score_some(queries, candidates)

    def save(self, path: Path) -> None:
        raise NotImplementedError


def queries(n: int) -> Corpus:
    return Corpus([Example(str(i), "p", "r") for i in range(n)])


@pytest.mark.parametrize(
    ("text", "stages", "keep"),
    [
        ("bm25>ekfac@200", ("bm25", "ekfac"), (200,)),
        ("bm25 > ekfac", ("bm25", "ekfac"), (200,)),
        ("a>b@9>c@3", ("a", "b", "c"), (9, 3)),
    ],
)
def test_names(text: str, stages: tuple[str, ...], keep: tuple[int, ...]):
    found = PipelineName.parse(text)
    assert found is not None
    assert (found.stages, found.keep) == (stages, keep)
    assert PipelineName.parse(str(found)) == found


@pytest.mark.parametrize("text", ["a>", ">b", "a>b@0", "a>b@x", "a@3>b", "a>b@3>c@4", "a>@3"])
def test_malformed_names_say_what_is_expected(text: str):
    with pytest.raises(UsageError, match="does not name a pipeline: FIRST>SECOND@K"):
        PipelineName.parse(text)


def test_a_plain_name_is_no_pipeline():
    assert PipelineName.parse("bm25") is None


def test_candidates_have_the_second_stages_scores_and_the_rest_zero():
    first, second = Fixed([[4, 3, 2, 1.0]]), Fixed([[-5, 7, 9, 9.0]])
    index = PipelineIndex([first, second], [2], rest="zero")
    np.testing.assert_array_equal(index.score(queries(1)), [[-5, 7, 0, 0]])
    assert second.asked == [2]  # it never sees what the first stage drops
    values, ids = index.top_k(queries(1), 2)  # 0 beats -5
    assert values.tolist() == [[7, 0]]
    assert ids.tolist() == [[1, 2]]


def test_all_candidates_give_the_second_stage_itself():
    rng = np.random.default_rng(0)
    first, second = Fixed(rng.normal(size=(3, 20))), Fixed(rng.normal(size=(3, 20)))
    for rest in ("rank", "zero"):
        index = PipelineIndex([first, second], [20], rest=rest)
        np.testing.assert_array_equal(index.score(queries(3)), second.scores)
        wide = PipelineIndex([first, second], [500], rest=rest)
        np.testing.assert_array_equal(wide.score(queries(3)), second.scores)


def test_the_rest_keeps_the_first_stages_order_on_the_second_stages_scale():
    n = 101
    first = np.arange(n, dtype=np.float32)[None]  # example 100 is the best
    found = np.array([[30.0, 20.0, 10.0]], dtype=np.float32)
    chosen = np.array([[100, 99, 98]])
    scores = calibrated(first, chosen, found)[0]
    assert (np.diff(scores) > 0).all()
    assert scores[50] == pytest.approx(0.0, abs=1e-5)  # the middle rank
    np.testing.assert_allclose(calibrated(first, chosen, 2 * found)[0], 2 * scores, rtol=1e-5)
    # A later stage that contradicts the first leaves nothing to say of the rest.
    assert not calibrated(first, chosen, -found).any()
    # Ties of the first stage stay ties.
    assert len(np.unique(calibrated(np.zeros((1, n)), chosen, found))) == 1


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 40), st.booleans())
def test_ranks_of_the_rest_follow_the_first_stage(seed: int, n: int, k: int, ties: bool):
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 4, (2, n)).astype(float) if ties else rng.normal(size=(2, n))
    second = rng.normal(size=(2, n))
    index = PipelineIndex([Fixed(first), Fixed(second)], [k])
    scores = index.score(queries(2))
    assert np.isfinite(scores).all()
    for row, of in zip(scores, first):
        rest = np.argsort(-of, kind="stable")[k:]
        if len(np.unique(row[rest])) > 1:
            ranks = [average_ranks(x[None])[0] for x in (row[rest], of[rest])]
            np.testing.assert_allclose(*ranks)


def test_three_stages_narrow_one_after_another():
    first, second = Fixed([[5, 4, 3, 2, 1.0]]), Fixed([[1, 2, 3, 9, 9.0]])
    third = Fixed([[7, 7, 8, 7, 7.0]])
    index = PipelineIndex([first, second, third], [3, 1], rest="zero")
    np.testing.assert_array_equal(index.score(queries(1)), [[0, 0, 8, 0, 0]])
    assert (second.asked, third.asked) == ([3], [1])


def test_group_scores_pool_with_the_last_stages_pooling():
    first, second = Fixed([[4, 3, 2, 1.0]]), Fixed([[2, 4, 9, 9.0]], pooling="mean")
    index = PipelineIndex([first, second], [2], rest="zero")
    groups = Groups.of([[0, 1], [0, 3], [2, 3]], 4)
    np.testing.assert_allclose(index.score_groups(queries(1), groups), [[3, 1, 0]])
    own = PipelineIndex([first, Fixed([[1, 1, 1, 1.0]], pooling="own")], [2])
    assert own.pooling == "sum"


def test_no_query_and_no_example():
    empty = PipelineIndex([Fixed(np.ones((0, 5))), Fixed(np.ones((0, 5)))], [2])
    assert empty.score(queries(0)).shape == (0, 5)
    nothing = PipelineIndex([Fixed(np.ones((2, 0))), Fixed(np.ones((2, 0)))], [2])
    assert nothing.score(queries(2)).shape == (2, 0)


def test_a_stage_that_misbehaves_is_named():
    broken = Fixed([[1, np.nan, 3, 4.0]])
    with pytest.raises(MethodError, match="stage 2 returned NaN or infinite scores"):
        PipelineIndex([Fixed([[4, 3, 2, 1.0]]), broken], [2]).score(queries(1))
    with pytest.raises(UsageError, match="rest = 'none'"):
        PipelineIndex([broken, broken], [2], rest="none")


# --------------------------------------------------------------------------- the laws


@dataclass(frozen=True, kw_only=True)
class Composed(TDAMethod):
    """Stands for a pipeline in one process, to apply the laws to it."""

    name: ClassVar[str] = "composed"
    family: ClassVar[str] = "pipeline"
    summary: ClassVar[str] = "two methods, one after the other"

    first: str = "bm25"
    second: str = "graddot"
    keep: int = 7
    rest: str = "rank"

    def _stages(self):
        return [registry().method(n).cls() for n in (self.first, self.second)]

    def build(self, context, train):
        found = [m.build(context, train) for m in self._stages()]
        return PipelineIndex(found, [self.keep], self.rest)

    def load(self, context, path):
        found = [m.load(context, path / str(i)) for i, m in enumerate(self._stages())]
        return PipelineIndex(found, [self.keep], self.rest)


# A tie of the first stage at the edge of the candidates is broken by position; `ngram` has none
# here. The test module is not a plugin that a run could import in a sandbox.
LEFT_OUT = ("works-confined", "import-is-light")


@parametrize_with_laws(
    [Composed(first="graddot", second="hidden"), Composed(first="graddot", second="ekfac",
                                                          rest="zero")]
)  # fmt: skip
def test_pipelines_keep_the_laws(method, law):
    if law.law.name in LEFT_OUT:
        pytest.skip("needs a plugin")
    law(method)
