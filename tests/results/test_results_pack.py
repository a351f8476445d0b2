"""Submissions: what they hold, what they never hold, and what is not packed."""

from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path

import numpy as np
import pytest

from tdabench.cli import main
from tdabench.errors import DataError, UsageError
from tdabench.io import read_arrays, write_arrays, write_json
from tdabench.report.records import read_run
from tdabench.results import layout, pack
from tdabench.results.layout import read_results
from tdabench.run.record import Record


def test_a_submission_holds_the_records_by_suite_target_and_version(repository):
    found = read_results(repository)
    assert found.refused == ()
    places = [s.place.rpartition("/")[0] for s in found.submissions]
    assert places == [f"results/trial/instruct/{m}-v1" for m in ("airrep", "bm25", "demo", "logra")]
    by_name = {s.method["name"]: s for s in found.submissions}
    airrep = by_name["airrep"]
    assert airrep.by == "A. Author"
    assert airrep.method["source"] == "arXiv 2505.18513"  # as installed
    assert airrep.hardware["cpu"] == "Testor 9"
    (record,) = airrep.records
    assert record.altered() == []
    run = {r.label: r for r in read_run(repository.parent / "run").records}
    assert record.metrics == run["airrep"].metrics
    assert np.array_equal(record.arrays()[0]["per_query"], run["airrep"].arrays()[0]["per_query"])
    (failed,) = by_name["demo"].records
    assert (failed.status, failed.reason) == ("oom", "needed 4 GB")
    assert "log_tail" not in failed.data


def test_the_same_results_again_change_nothing_and_new_ones_merge(repository, make_run, submit_run):
    before = sorted(p.relative_to(repository) for p in repository.rglob("*"))
    again = submit_run(repository.parent / "run", repository, by="A. Author")
    assert again.new == ()
    assert len(again.there) == 4
    assert sorted(p.relative_to(repository) for p in repository.rglob("*")) == before
    other = make_run("other", {"trak": 0.7})
    more = submit_run(other, repository, by="B. Author")
    assert len(more.new) == 1
    assert len(read_results(repository).submissions) == 5


def test_paths_users_and_hosts_stay_behind(make_run, submit_run, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "worker-17")
    monkeypatch.setattr(getpass, "getuser", lambda: "mariposa")

    def change(record):
        record["log_tail"] = ["File '/home/mariposa/x.py'"]
        record["notes"] = ["read /home/mariposa/data/x.jsonl on worker-17", "mariposa's model"]
        record["target"]["source"] = "/home/mariposa/models/qwen"
        record["surprise"] = "/etc/passwd"
        record["hardware"] = {**record["hardware"], "platform": "Linux 6.1-mariposa x86_64"}

    run = make_run("run", {"a": 1.0}, change=change)
    submit_run(run, tmp_path / "to")
    whole = b"".join(p.read_bytes() for p in (tmp_path / "to").rglob("*") if p.is_file())
    for word in (b"mariposa", b"worker-17", b"/home", b"passwd", str(tmp_path).encode()):
        assert word not in whole
    (s,) = read_results(tmp_path / "to").submissions
    assert s.hardware["platform"] == "Linux x86_64"
    assert s.records[0].notes == ["read … on …", "…'s model"]


@pytest.mark.parametrize("value", ["/home/x/encoder", "C:\\models\\e", "~/models/e", "worker-17"])
def test_a_parameter_that_names_a_path_or_host_is_refused(
    value, make_run, submit_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(socket, "gethostname", lambda: "worker-17")

    def change(record):
        record["method"]["params"]["encoder"] = value

    run = make_run("run", {"a": 1.0}, change=change)
    with pytest.raises(DataError, match="which names a path, a user or a host"):
        submit_run(run, tmp_path / "to")
    assert not (tmp_path / "to" / "results").exists()


def test_names_that_are_not_paths_are_kept():
    for text in ("hub:org/name/file@060db64", "0.3 s/query", "and/or", "1/2", "a / b", "x -> y"):
        assert pack.scrubbed(text) == text
        assert layout.private_text({"a": [text]}) is None
    for text in ("/root/x/y", "see file:///etc/hosts", "in /tmp/a/b.txt, twice"):
        assert layout.private_text({"a": [text]})[0] == "a"


def test_what_does_not_verify_is_not_packed(make_run, submit_run, tmp_path):
    run = make_run()
    record = next(r for r in read_run(run).records if r.label == "logra")
    data = json.loads(record.path.read_text())
    data["metrics"]["lds"]["value"] += 0.05
    write_json(record.path, data)
    with pytest.raises(DataError, match=r"logra.*does not verify: lds is .* in the record"):
        submit_run(run, tmp_path / "to")
    assert not (tmp_path / "to").exists()
    packed = submit_run(run, tmp_path / "to", methods=["airrep"])
    assert len(packed.new) == 1
    with pytest.raises(DataError, match=r"cannot be verified.*--truth"):
        submit_run(run, tmp_path / "to", methods=["bm25"], truths=[])


def test_a_folder_with_other_contents_and_unknown_names_are_refused(make_run, submit_run, tmp_path):
    run = make_run()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(UsageError, match="is not a results repository"):
        submit_run(run, tmp_path / "photos")
    with pytest.raises(UsageError, match="Clone the repository"):
        submit_run(run, Path("https://example.org/r.git"))
    with pytest.raises(UsageError, match="unknown method 'trok'"):
        submit_run(run, tmp_path / "to", methods=["trok"])
    with pytest.raises(UsageError, match="no path"):
        submit_run(run, tmp_path / "to", by="/home/me/x")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.png"]


def test_examples_for_the_explorer_stay_behind_and_sizes_are_bounded(
    make_run, submit_run, tmp_path, monkeypatch
):
    run = make_run("run", {"a": 1.0}, top=10)
    submit_run(run, tmp_path / "to")
    (path,) = (tmp_path / "to").rglob("*.safetensors")
    assert not set(pack.SHOWN_ONLY) & set(read_arrays(path)[0])
    monkeypatch.setattr(layout, "MAX_ARRAYS", 1000)
    with pytest.raises(DataError, match=r"are larger than 0 MiB.*--benchmarks"):
        submit_run(run, tmp_path / "other")


def test_the_text_of_the_pull_request(make_run, submit_run, tmp_path, capsys):
    run = make_run("run", {"airrep": 1.6, "a x|y": 0.2})
    text = submit_run(run, tmp_path / "to", by="A. Author").text
    assert text.startswith("Results of a v1, airrep v1 on trial 1\n")
    assert "measured by A. Author" in text
    assert "2 of 2 were recomputed" in text
    assert "| a x\\|y | instruct | lds | 0." in text
    assert "Testor 9, 2 cores" in text
    args = ["submit", str(run), "--to", str(tmp_path / "cli"), "--methods", "airrep"]
    truth = ["--truth", str(run / "truth.safetensors")]
    assert main([*args, *truth, "--text", str(tmp_path / "pr.md")]) == 0
    out = capsys.readouterr()
    assert out.out.startswith("Results of airrep v1 on trial 1")
    assert "written: " in out.err
    assert (tmp_path / "pr.md").read_text().startswith("Results of airrep")
    assert main(args) == 2  # without its truth
    assert "cannot be verified" in capsys.readouterr().err


def test_a_parameter_changed_after_the_run_is_found(repository):
    """The receiver recomputes the key: a record cannot claim other parameters."""
    (s, *_) = read_results(repository).submissions
    data = dict(s.records[0].data)
    data["method"] = {**data["method"], "params": {"rank": 99}, "ignored": []}
    data["device"] = "cpu"
    record = Record(data, s.records[0].path)
    write_json(record.path, dict(record.signed(record.arrays_hash())))
    (bad, *_) = read_results(repository).refused
    assert bad.place == s.place


def test_an_array_file_of_objects_or_with_a_lying_header_is_refused(repository):
    (s, *_) = read_results(repository).submissions
    path = s.records[0].arrays_path
    raw = bytearray(path.read_bytes())
    raw[:8] = (2**40).to_bytes(8, "little")
    path.write_bytes(raw)
    assert s.place in {r.place for r in read_results(repository).refused}
    write_arrays(path, {"per_query": np.zeros(3)})
    assert s.place in {r.place for r in read_results(repository).refused}
