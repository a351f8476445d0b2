"""A board checks again what changed since it was found unaltered, and only that."""

from __future__ import annotations

import os

import pytest

from tdabench.io import cache_folder, read_json, write_json
from tdabench.report import checked
from tdabench.report.board import Board
from tdabench.report.records import read_run
from tdabench.run.folder import RunFolder
from tdabench.run.record import Record


@pytest.fixture
def signed(make_run, tmp_path, monkeypatch):
    """A run whose records carry digests, and a cache that knows of small folders at once."""
    monkeypatch.setenv("TDABENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checked, "LEAST", 1)
    monkeypatch.setattr(checked, "LATELY", -1)
    folder = make_run("r", {"a": 1.0, "b": 0.4}, benchmarks=("lds",))
    for r in read_run(folder).records:
        RunFolder(folder).write(r.data)
    return folder


def marked(folder) -> list[str]:
    board = Board.from_runs([folder])
    return [r.label for t in board.tables for r in t.rows if "[altered]" in r.label]


def test_unchanged_records_are_checked_once(signed, monkeypatch):
    assert marked(signed) == []
    with monkeypatch.context() as m:
        m.setattr(Record, "altered", lambda self: pytest.fail("it was checked again"))
        assert marked(signed) == []


@pytest.mark.parametrize("times", [False, True])
def test_a_change_is_noticed_although_size_and_time_are_put_back(signed, times):
    assert marked(signed) == []
    path = next(r.path for r in read_run(signed).records if r.label == "b")
    before = path.stat()
    text = path.read_text()
    cut = text.index('"seed": 0')
    path.write_text(text[:cut] + text[cut:].replace('"seed": 0', '"seed": 7', 1))
    if times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert marked(signed) == ["b [altered]"]
    assert marked(signed) == ["b [altered]"]


def test_a_recent_change_is_not_remembered_and_a_damaged_cache_is_ignored(signed, monkeypatch):
    monkeypatch.setattr(checked, "LATELY", 10**12)
    assert marked(signed) == []
    assert not (cache_folder() / "checked").exists()
    monkeypatch.setattr(checked, "LATELY", -1)
    assert marked(signed) == []
    (place,) = (cache_folder() / "checked").iterdir()
    assert len(read_json(place)) == 2
    for wrong in ([], {"x": 3}, {"x": [1, 2, 3]}):
        write_json(place, wrong)
        assert marked(signed) == []
