"""A misbehaving plugin is a failed row that names the cause; every other cell completes.

tests/run/test_run.py has the common ones (raises, wrong shape, NaN, hangs, hoards, crashes,
prints, seeds, alters the model, litters); here are the devious, all in one run.
"""

from __future__ import annotations

import ast
import json
import time
from pathlib import Path
from typing import Any

import pytest

import tdabench
from tdabench.errors import clean
from tdabench.registry import configure
from tdabench.run import Options, Request, RunFolder, run
from tdabench.run.progress import describe

OFFENDERS = Path(__file__).parent / "offenders.py"
TOYS = Path(__file__).parents[1] / "run" / "toys.py"
CAUSES = {
    "seeds-in-load": "load drew from or seeded the global random state of numpy.random",
    "litters-in-save": "save wrote outside its scratch folder: ",
    "no-index": "build returned dict, expected an Index",
    "quits": "SystemExit: enough",
    "interrupts": "KeyboardInterrupt",
    "shouts": "all is well",
}
FINE = ["toy", "erases", "leaves", "jumps"]  # what they did must reach nobody, themselves included


@pytest.fixture(scope="module")
def found(
    toy_suite: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, dict[str, Any]]]:
    out = tmp_path_factory.mktemp("offenders")
    configure((), [str(TOYS), str(OFFENDERS)])
    try:
        methods = (*CAUSES, *FINE)
        options = Options(jobs=2, threads=1, timeout=300.0, log_file=out / "events.log")
        result = run(Request(str(toy_suite), methods), out / "run", options)
    finally:
        configure((), ())
    return out, {r["method"]["label"]: r for r in result.records}


def test_every_offender_is_a_failed_row_and_every_other_cell_completes(found):
    statuses = {label: r["status"] for label, r in found[1].items()}
    assert statuses == {**dict.fromkeys(CAUSES, "failed"), **dict.fromkeys(FINE, "ok")}


@pytest.mark.parametrize("name", CAUSES)
def test_its_row_names_the_cause(name: str, found):
    assert CAUSES[name] in found[1][name]["reason"]


def test_a_message_does_nothing_to_the_terminal(found):
    record = found[1]["shouts"]
    assert "\x1b" in record["reason"]  # kept as it was …
    line = describe(record)
    assert clean(line, 10**6) == line  # … and shown as an escape
    assert "\\x1b[2J" in line


def test_nobody_is_left_behind(found):
    out, _ = found
    assert not (out / "run" / "work").exists()
    time.sleep(0.5)
    assert not list((out / "run").rglob("beat"))


def test_times_do_not_follow_a_clock_that_jumps(found):
    record = found[1]["jumps"]
    assert 0 <= record["seconds"] < 600
    assert 0 <= record["cost"]["build"]["seconds"] < 600
    events = [json.loads(x) for x in (found[0] / "events.log").read_text().splitlines()]
    seconds = [e["seconds"] for e in events]
    assert seconds == sorted(seconds)


def test_nothing_of_ours_measures_by_the_wall_clock():
    """It is read for dates only."""
    for path in sorted(Path(tdabench.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("time", "time_ns"):
                clock = isinstance(node.value, ast.Name) and node.value.id == "time"
                assert not clock, f"{path}:{node.lineno}"


def test_the_log_file_tells_the_story_in_one_line_an_event(found):
    out, records = found
    text = (out / "events.log").read_text()
    events = [json.loads(line) for line in text.splitlines()]
    assert text == (out / "run" / "log.jsonl").read_text()
    kinds = [e["event"] for e in events]
    assert kinds[0] == "run"
    assert kinds[-1] == "end"
    assert events[-1]["ok"] == len(FINE)
    assert kinds.count("start") == kinds.count("stop") == len(records)
    told = {e["method"]: e["status"] for e in events if e["event"] == "cell"}
    assert told == {label: r["status"] for label, r in records.items()}
    assert all(Path(e["log"]).is_absolute() for e in events if e["event"] == "start")


def test_a_failed_cell_keeps_its_last_lines_for_show(found, capsys):
    from tdabench.cli import main

    assert main(["show", "quits", "--run", str(found[0] / "run")]) == 0
    shown = capsys.readouterr().out
    assert "last lines of the log:" in shown
    assert "| SystemExit: enough" in shown


def test_printing_for_ever_fills_no_disk(toy_suite, tmp_path, monkeypatch):
    from tdabench.run import execute

    monkeypatch.setattr(execute, "MOST_PRINTED", 20_000)
    configure((), [str(TOYS), str(OFFENDERS)])
    try:
        result = run(Request(str(toy_suite), ("floods",)), tmp_path / "run", Options(threads=1))
    finally:
        configure((), ())
    assert result.records[0]["status"] == "failed"
    assert "build printed more than 20,000 bytes" in result.records[0]["reason"]


def test_ids_of_examples_and_records_reach_no_path(tmp_path: Path):
    """A record is the cell its file name says; one that claims another is none."""
    from tests.faults.fuzz import RECORD, write_run

    write_run(tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "mine.json").write_text("{}")
    evil = {**RECORD, "key": "../../mine", "status": "failed"}
    (folder.cells / f"{'2' * 16}.json").write_text(json.dumps(evil))
    assert {r["key"] for r in folder.records()} == {"0" * 16, "1" * 16}
    assert [p.stem for p in folder.damaged()] == ["2" * 16]
    folder.write({**RECORD, "key": "3" * 16, "status": "failed"})
    assert (tmp_path / "mine.json").exists()
