"""The ensemble against its formula, member by member."""

from __future__ import annotations

import numpy as np
import pytest
from tdabench_datamodels.ensemble import Ensemble
from tdabench_datamodels.hybrid import Hybrid
from tdabench_gradients.logra import LoGra
from tdabench_text.lexical import NGram

from tdabench.cli import main
from tdabench.data.examples import Corpus
from tdabench.errors import UsageError
from tdabench.groups import Groups
from tdabench.method import Context
from tdabench.params import read_settings
from tdabench.testing import parametrize_with_laws, tiny_suite


@parametrize_with_laws([Ensemble(members="logra:rank=4,damping=1;0.5*ngram:n=3")])
def test_laws(method, law) -> None:
    law(method)


def test_members_are_added_on_the_scale_of_their_own_groups(
    tiny_context: Context, tiny_corpus: Corpus, tiny_queries: Corpus
) -> None:
    method = Ensemble(
        members="logra:rank=4,damping=1; -0.5*ngram:n=3,pooling=softmax,temperature=0.2"
    )
    index = method.build(tiny_context, tiny_corpus)
    groups = Groups.of([[0, 3, 5], [1], list(range(10))], len(tiny_corpus))
    got = index.score_groups(tiny_queries, groups)
    want = np.zeros_like(got)
    for weight, member in (
        (1.0, LoGra(rank=4, damping=1.0)),
        (-0.5, NGram(n=(3,), pooling="softmax", temperature=0.2)),
    ):
        own = member.build(tiny_context, tiny_corpus)
        sd = own.score_groups(tiny_queries, index.references).std(axis=1, keepdims=True)
        want += weight * own.score_groups(tiny_queries, groups) / np.where(sd > 0, sd, 1.0)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(got[:, 1], index.score(tiny_queries)[:, 1], rtol=1e-4, atol=1e-5)
    sizes = np.diff(index.references.indptr)
    assert len(sizes) == 64
    assert (sizes == round(tiny_context.target.fraction * len(tiny_corpus))).all()


def test_members_settings_may_hold_settings() -> None:
    method = Ensemble(
        members="hybrid:base=source,settings=(segments=1,share=0.25),retrainings=3;0.3*ngram:n=3"
    )
    (one, hybrid), (weight, ngram) = method.parts()
    assert one == 1.0
    assert hybrid == Hybrid(base="source", settings="segments=1,share=0.25", retrainings=3)
    assert (weight, ngram) == (0.3, NGram(n=(3,)))
    assert read_settings("a=1,b=(c=2,d=(e=3,f=4)),g=x,y", "it", "") == {
        "a": "1", "b": "c=2,d=(e=3,f=4)", "g": "x,y"
    }  # fmt: skip


def test_costs_add_up_and_mistakes_are_named(tiny_context: Context) -> None:
    both = Ensemble(members="hybrid:retrainings=3;hybrid:retrainings=4;ngram")
    assert both.prepare_cost(tiny_context) == {"retrainings": 7.0}
    assert Ensemble(members="ngram").prepare_cost(tiny_context) is None
    for members, said in (
        ("", "no members"),
        ("ensemble", "another method"),
        ("x*ngram", "not a weight"),
        ("ngram:n", "NAME=VALUE"),
        ("ngrm", "Did you mean"),
    ):
        with pytest.raises(UsageError) as e:
            Ensemble(members=members)
        assert said in str(e.value)


def test_methods_that_build_others_run_in_their_own_process(tmp_path, capsys) -> None:
    """Their process imports the plugins of the methods that they use, and no others."""
    assert Ensemble(members="hybrid:base=logra;ngram").uses() == ["hybrid", "logra", "ngram"]
    suite = tiny_suite(tmp_path / "suite")
    args = ["run", "--suite", str(suite), "--out", str(tmp_path / "run"), "--json"]
    args += ["--methods", "ensemble,grasp,hybrid", "--set", "ensemble.members=bm25;0.5*ngram"]
    args += ["--set", "grasp.base=tfidf", "--set", "grasp.settings=pooling=sum"]
    args += ["--set", "hybrid.base=bm25", "--set", "hybrid.retrainings=2"]
    assert main(args) == 0, capsys.readouterr().err
