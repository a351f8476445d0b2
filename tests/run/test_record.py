"""One record: what a run plans and writes is what a report reads."""

from __future__ import annotations

import json
from pathlib import Path

from tdabench.io import read_json
from tdabench.report.records import read_run
from tdabench.run import Options, Request, RunFolder, make_plan, run
from tdabench.run.record import STATUSES, Record, is_record, slot


def test_a_record_is_the_same_planned_written_and_read(toy_suite: Path, toys: str, tmp_path: Path):
    request = Request(str(toy_suite), ("toy", "raises"))
    plan = make_plan(request)
    result = run(request, tmp_path / "run", Options(threads=1), plan=plan)
    read = {r.key: r for r in read_run(tmp_path / "run").records}
    kept = {r.key: r for r in RunFolder(tmp_path / "run").records()}
    assert {r.status for r in result.records} == {"ok", "failed"}
    for cell, record in zip(plan.cells, result.records, strict=True):
        planned = Record.planned(plan, cell, threads=1, concurrent=1)
        assert is_record(planned.data)
        assert planned.status == "interrupted"
        # Nothing is stored that was not planned, but what seals it.
        sealed = {"arrays", "digest"}
        assert set(record) == {*planned, "job", *sealed}
        assert slot(record) == slot(planned)
        same = ("key", "method", "target", "benchmark", "seed", "corpus", "truth", "threads")
        assert {k: record[k] for k in same} == json.loads(json.dumps({k: planned[k] for k in same}))
        assert dict(read[record.key]) == dict(kept[record.key]) == dict(record)
        assert read_json(kept[record.key].path) == dict(record)


def test_a_record_ends_with_a_status_and_facts():
    planned = Record({"key": "k", "status": "interrupted", "reason": ""})
    ended = planned.ended("failed", reason="no reason")
    assert (ended.status, ended.reason, planned.reason) == ("failed", "no reason", "")
    assert Record({"status": "splendid"}).status == "failed"
    assert all(Record({"status": s}).status == s for s in STATUSES)
    assert Record({}, Path("cells/abc.json")).key == "abc"
