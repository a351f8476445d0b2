"""What factbook's truth rewards: counts on constructed groups."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tdabench.data.examples import Example
from tdabench.groups import Groups
from tdabench.io import write_arrays
from tdabench.truth import Truth
from tools.factbook import explain_truth
from tools.factbook.explain_truth import FORM, counts, is_question, tables

ASK = "Chad: what does its flag look like? Name its colors."
TRAIN = [
    Example("a", ASK, "blue", "flag", {"source": "Chad"}),
    Example("b", "Chad: what does its flag look like?", "three bands", "flag", {"source": "Chad"}),
    Example("c", ASK, "red", "flag", {"source": "Mali"}),
    Example("d", "Describe the telephone system of Mali.", "good", "phone", {"source": "Mali"}),
]
QUERIES = [Example("q", ASK, "blue and red", "flag", {"source": "Chad"})]


def test_questions_are_told_from_passages():
    assert [is_question(e) for e in TRAIN] == [True, False, True, False]


def test_counts_are_of_sorts_of_examples():
    found = {name: w[0].tolist() for name, w in counts(TRAIN, QUERIES).items()}
    assert found[FORM] == [1, 0, 1, 0]
    assert found["passages of the query's kind"] == [0, 1, 0, 0]
    assert found["examples of the query's kind"] == [1, 1, 1, 0]
    assert found["answered questions"] == [1, 0, 1, 0]
    assert found["examples of the query's country"] == [1, 1, 0, 0]


def test_a_truth_that_counts_questions_is_explained_by_them(tmp_path: Path):
    """Of a method that counts nothing is left beyond the count; of one that knows more, more is."""
    rng = np.random.default_rng(0)
    train = TRAIN * 8
    groups = Groups.random(40, len(train), 0.4, rng)
    member = groups.membership(np.float64)
    weights = counts(train, QUERIES)[FORM]
    more = (member @ rng.normal(0, 0.4, (1, len(train))).T).T
    values = (member @ weights.T).T + more
    truth = Truth(-values.T[:, None].astype(np.float32), groups, ("q",), {"name": "t"})
    run = tmp_path / "run"
    (run / "cells").mkdir(parents=True)
    for label, scores in (("count", (member @ weights.T).T), ("all", values)):
        path = run / "cells" / f"{label}.json"
        path.write_text(json.dumps({
            "benchmark": {"name": "lds"}, "target": {"label": "small"}, "status": "ok",
            "method": {"label": label, "passed": {}}, "metrics": {"lds": {"value": 0.5}},
        }))  # fmt: skip
        arrays = {"group_scores": scores.astype(np.float32)}
        write_arrays(path.with_suffix(".safetensors"), arrays, {"query_ids": ["q"]})
    lines = tables(truth, train, QUERIES, [run], "small")
    value = {x.split("|")[1].strip(): float(x.split("|")[2]) for x in lines[2:7]}
    assert value[FORM] > 0.7
    assert value[FORM] > value["examples of the query's country"]
    beyond = {x.split("`")[1]: float(x.split("|")[3].split()[0]) for x in lines if "`" in x}
    assert beyond["all"] == pytest.approx(1, abs=1e-6)
    assert beyond["count"] == pytest.approx(0, abs=1e-6)
    assert len(tables(truth, train, QUERIES, [run], "smollm2")) == 7  # no method of this target


@pytest.mark.parametrize("target", explain_truth.TARGETS)
def test_the_page_has_a_place_for_the_tables(target):
    assert explain_truth.marks(target).search(explain_truth.PAGE.read_text(encoding="utf-8"))
