"""Pipelines as methods of a run: specs, labels, keys, records, indices shared with the stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tdabench.errors import UsageError
from tdabench.io import read_arrays
from tdabench.registry import configure
from tdabench.run import Options, Request, make_plan, run
from tdabench.run.record import Record
from tdabench.stats import average_ranks

QUICK = Options(jobs=1, threads=1, timeout=300.0)


def labels(suite: Path, methods: tuple[str, ...], sets: tuple[str, ...] = ()) -> list[str]:
    plan = make_plan(Request(str(suite), methods, benchmarks=("lds",), sets=sets))
    return [c.method.label for c in plan.cells]


def test_a_pipeline_is_a_method_with_a_label_of_its_own(toy_suite: Path, toys: str):
    assert labels(toy_suite, ("bm25>tfidf@9", "bm25 > tfidf", "bm25>tfidf@9")) == [
        "bm25>tfidf@9", "bm25>tfidf@200",
    ]  # fmt: skip
    assert labels(toy_suite, ("bm25>tfidf@9",), ("bm25>tfidf@9.rest=zero",)) == [
        "bm25>tfidf@9[rest=zero]"
    ]
    assert labels(toy_suite, ("bm25>tfidf@9",), ("bm25.k1=2",)) == ["bm25[k1=2.0]>tfidf@9"]


def test_commands_for_single_methods_say_so(tmp_path, capsys):
    from tdabench.cli import main

    for command in (["tune"], ["check"], ["index", "build", str(tmp_path / "i"), "--method"]):
        assert main([*command, "bm25>tfidf@5"]) == 2
        err = capsys.readouterr().err
        assert "is a pipeline, and a single method is needed here" in err


def test_what_changes_scores_changes_the_key(toy_suite: Path, toys: str):
    def key(method: str, *sets: str) -> str:
        (cell,) = make_plan(Request(str(toy_suite), (method,), sets=sets)).cells
        return cell.key

    first = key("bm25>tfidf@9")
    changed = [
        key("bm25>tfidf@8"), key("tfidf>bm25@9"), key("bm25>tfidf@9", "bm25.k1=2"),
        key("bm25>tfidf@9", "bm25>tfidf@9.rest=zero"), key("bm25"),
    ]  # fmt: skip
    assert len({first, *changed}) == 6
    assert key("bm25>tfidf@9", "bm25.k1=1.2") == first


def test_a_suite_may_name_a_pipeline(make_suite, toys: str):
    suite = make_suite(
        '[[methods.variants]]\nlabel = "two"\nmethod = "bm25>tfidf@9"\nparams = { rest = "zero" }\n'
    )
    (cell,) = make_plan(Request(str(suite), ("two",))).cells
    assert (cell.method.label, cell.method.name) == ("two", "bm25>tfidf")
    assert cell.method.params["rest"] == "zero"
    with pytest.raises(UsageError, match="the stage two is itself a pipeline"):
        make_plan(Request(str(suite), ("two>tfidf@3",)))


@pytest.mark.parametrize(
    ("methods", "sets", "message"),
    [
        (("bm25>nope@9",), (), "unknown method 'nope'"),
        (("bm25>tfidf@0",), (), "does not name a pipeline"),
        (("bm25>tfidf@9",), ("bm25>tfidf@9.keep=3",), "unknown parameter of bm25>tfidf@9 'keep'"),
        (("bm25>tfidf@9",), ("bm25>tfidf@9.rest=no",), "rest = 'no'"),
        (("bm25>tfidf@9",), ("ngram.n=3",), "unknown method or benchmark in --set"),
    ],
)
def test_mistakes_are_named(toy_suite: Path, toys: str, methods, sets, message: str):
    with pytest.raises(UsageError, match=message):
        make_plan(Request(str(toy_suite), methods, sets=sets))


@pytest.fixture(scope="module")
def measured(tmp_path_factory, toy_suite: Path, toys: str):
    configure((), [toys])  # a command that ran in this process forgot it
    out = tmp_path_factory.mktemp("pipelines")
    methods = ("tfidf", "bm25", "bm25>tfidf@60", "bm25>tfidf@5", "bm25>raises@5")
    found = run(Request(str(toy_suite), methods, benchmarks=("lds", "classification")), out, QUICK)
    return out, {(r["method"]["label"], r["benchmark"]["name"]): r for r in found.records}


def test_the_scores_of_a_run_are_those_of_the_composition(measured):
    out, records = measured

    def scores(label: str, name: str = "lds") -> np.ndarray:
        r = records[label, name]
        assert r["status"] == "ok", r["reason"]
        return read_arrays(out / "cells" / f"{r['key']}.safetensors")[0]["group_scores"]

    # All examples are candidates: the pipeline is its second stage.
    np.testing.assert_allclose(scores("bm25>tfidf@60"), scores("tfidf"), atol=1e-5)
    assert np.abs(scores("bm25>tfidf@5") - scores("tfidf")).max() > 1e-3
    top = read_arrays(out / "cells" / f"{records['bm25>tfidf@5', 'lds']['key']}.safetensors")[0]
    assert top["top_index"].shape[1] == 10


def test_the_cost_is_of_both_stages(measured):
    _, records = measured
    for name in ("lds", "classification"):
        cost = records["bm25>tfidf@5", name]["cost"]
        stages = cost["stages"]
        assert [s["label"] for s in stages] == ["bm25", "tfidf"]
        assert cost["index_bytes"] == sum(s["index_bytes"] for s in stages)
        built = sum(s["build"]["seconds"] for s in stages)
        assert cost["build"]["seconds"] == pytest.approx(built, abs=1e-5)
        assert cost["phases"]["build"]["seconds"] >= built - 1e-5
        assert {"import", "build", "load"} <= cost["phases"].keys()
    # The other benchmark reuses the example scores, so that its stages are not asked.
    assert records["bm25>tfidf@5", "classification"]["cost"]["query"]["reused"] == 1
    of_lds = records["bm25>tfidf@5", "lds"]["cost"]
    asked = sum(s["query"]["seconds"] for s in of_lds["stages"])
    assert 0 < asked <= of_lds["query"]["seconds"] + 1e-6  # the composition takes time, too


def test_indices_are_those_of_the_stages(measured):
    out, _ = measured
    assert len(list((out / "indices").iterdir())) == 2  # bm25 and tfidf, each built once


def test_a_stage_that_fails_is_a_failed_row(measured):
    _, records = measured
    record = records["bm25>raises@5", "lds"]
    assert record["status"] == "failed"
    assert "one by nought" in record["reason"]


def test_records_of_pipelines_can_be_verified(measured):
    out, records = measured
    for (label, _), r in records.items():
        assert Record(r, out / "cells" / f"{r['key']}.json").altered() == [], label
    assert [s["name"] for s in records["bm25>tfidf@5", "lds"]["method"]["stages"]] == [
        "bm25", "tfidf",
    ]  # fmt: skip


def test_the_frontier_over_k_is_a_line(measured):
    from tdabench.report import figures
    from tdabench.report.board import Board

    out, _ = measured
    table = Board.from_runs([out]).tables[0]
    points = figures.cost_points(table, "bytes")
    (path,) = figures.frontiers(points).values()
    assert {p.label for p in path} == {"bm25>tfidf@60", "bm25>tfidf@5"}


def test_trace_composes_the_same_index(toy_suite: Path, toys: str, tmp_path, monkeypatch):
    from tdabench.data.examples import Example
    from tdabench.run.plan import plan_indices
    from tdabench.run.trace import trace

    monkeypatch.setenv("TDABENCH_CACHE", str(tmp_path))
    plan = plan_indices(Request(str(toy_suite), ("tfidf", "bm25>tfidf@60")))
    query = Example("q", "Copy: amber birch", "amber birch")
    alone, piped = trace(plan, [query], 5)
    assert (alone.reason, piped.reason) == ("", "")
    np.testing.assert_allclose(alone.top_score, piped.top_score, atol=1e-6)
    np.testing.assert_allclose(average_ranks(alone.totals), average_ranks(piped.totals))


def test_the_frontier_counts_what_a_first_stage_holds():
    """Of 40 examples the 20 best by the second stage stand at known places of the first."""
    import sys

    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    import pipeline_frontier as script

    alone = np.concatenate([np.arange(20) + 100.0, np.zeros(20)])[None].astype(np.float32)
    perfect = np.arange(40, 0, -1, dtype=np.float32)[None]
    assert script.needed(perfect, alone) == 18
    assert script.needed(-perfect, alone) == 38
    assert script.needed(np.concatenate([perfect, -perfect]), np.tile(alone, (2, 1))) == 36
    assert script.agreement(alone, alone) == 1.0
    assert script.agreement(-alone, alone) == 0.0
    tied = np.tile(alone, (1, 2))  # every text twice: the 20 best are ten texts
    once = np.concatenate([alone, 0 * alone], axis=1)
    assert script.agreement(once, tied) == 0.5
    assert script.agreement(tied, tied) == 1.0


def test_the_frontiers_table_is_written_between_its_marks(tmp_path: Path):
    import sys

    sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
    import pipeline_frontier as script

    row = {"pipeline": "a>b@9", "agreement": 0.5, "share_of_time": 0.25, "needs": 1200,
           "share_of_time_of_one": 0.125}  # fmt: skip
    found = {"n_train": 20000, "queries": 6, "second": "b", "alone": 60.2, "alone_one": 50.1,
             "rows": [row]}  # fmt: skip
    page = tmp_path / "page.md"
    page.write_text("text\n")
    with pytest.raises(SystemExit, match="has no marks"):
        script.keep(found, None, page)
    shipped = Path(__file__).parents[2] / "docs" / "pipelines.md"
    page.write_text(shipped.read_text(encoding="utf-8"), encoding="utf-8")
    script.keep(found, tmp_path / "found.json", page)
    text = page.read_text(encoding="utf-8")
    assert "| `a>b@9` | 0.50 | 0.25 | 0.125 | 1,200 candidates |\n<!-- end of frontier -->" in text
    assert text.split("<!-- frontier")[0] == shipped.read_text("utf-8").split("<!-- frontier")[0]
