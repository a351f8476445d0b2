"""GRASP: groups against the formula written out over pairs of members."""

from __future__ import annotations

import numpy as np
import pytest
from tdabench_gradients.grasp import GRASP
from tdabench_gradients.logra import LoGra

from tdabench.data.examples import Corpus
from tdabench.errors import UsageError
from tdabench.groups import Groups
from tdabench.method import Context
from tdabench.testing import parametrize_with_laws


@parametrize_with_laws([GRASP(settings="rank=4,damping=1"), GRASP(base="tfidf", settings="")])
def test_laws(method, law) -> None:
    law(method)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_a_group_is_its_alignment_less_its_pairs(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    base = LoGra(rank=4, damping=1.0).build(tiny_context, tiny_corpus)
    phi, q = unit(np.asarray(base.rows[:])), unit(base.query_features(tiny_queries))
    method = GRASP(settings="rank=4,damping=1", penalty=0.7)
    index = method.build(tiny_context, tiny_corpus)
    groups = Groups.of([[0, 3, 5], [1], [], list(range(len(tiny_corpus)))], len(tiny_corpus))
    got = index.score_groups(tiny_queries, groups)
    for j, members in enumerate(groups):
        pairs = sum(float(phi[a] @ phi[b]) for a in members for b in members)
        n = max(1, len(members))
        want = sum(q @ phi[a] for a in members) / n - 0.35 * pairs / n**2
        np.testing.assert_allclose(got[:, j], want, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(got[:, 1], index.score(tiny_queries)[:, 1], rtol=1e-4)
    whole = GRASP(settings="rank=4,damping=1", penalty=1.0).build(tiny_context, tiny_corpus)
    away = np.square(q[:, None] - phi[None, :].mean(1)).sum(2)[:, 0]  # |phi_q - m|^2
    np.testing.assert_allclose(
        whole.score_groups(tiny_queries, groups)[:, 3], (1 - away) / 2, rtol=1e-3, atol=1e-5
    )


def test_members_that_repeat_each_other_are_worth_less(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    index = GRASP(settings="rank=4,damping=1", penalty=1.0).build(tiny_context, tiny_corpus)
    index.rows = unit(np.random.default_rng(0).normal(size=index.rows.shape)).astype("f4")
    index.rows[1] = index.rows[0]  # a copy
    index._features = lambda queries: np.zeros((1, index.rows.shape[1]))  # type: ignore[method-assign]
    groups = Groups.of([[0, 1], [0, 2]], index.n_train)
    copies, others = index.score_groups(tiny_queries[:1], groups)[0]
    assert copies < others


def test_mistakes_are_named(tiny_context: Context, tiny_corpus: Corpus) -> None:
    with pytest.raises(UsageError, match="penalty"):
        GRASP(penalty=-1.0)
    with pytest.raises(UsageError, match="ekfac has no features"):
        GRASP(base="ekfac", settings="").build(tiny_context, tiny_corpus)
    with pytest.raises(UsageError, match="NAME=VALUE"):
        GRASP(settings="damping").build(tiny_context, tiny_corpus)
