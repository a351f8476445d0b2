"""`verify` agrees with honest runs and names what was altered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tdabench.cli.verify import command
from tdabench.errors import DataError, UsageError
from tdabench.io import read_json, sha256_file, write_json
from tdabench.report.records import read_run
from tdabench.report.verify import Truths, verify_runs


@pytest.fixture
def honest(make_run) -> tuple[Path, Path]:
    """A run of LDS whose records name the truth that lies beside them, and that truth."""
    folder = make_run("r", {"a": 1.0, "b": 0.4}, benchmarks=("lds",))
    truth = folder / "truth.safetensors"
    for r in read_run(folder).records:
        write_json(r.path, {**r.data, "truth": sha256_file(truth)[:16]})
    return folder, truth


def check(folder: Path, *truths: Path):
    return {c.label: c for c in verify_runs([read_run(folder)], truths)}


def test_an_honest_run_agrees(honest):
    folder, truth = honest
    found = check(folder, truth)
    assert {c.status for c in found.values()} == {"agrees"}
    assert [c.problems for c in found.values()] == [(), ()]


def test_without_the_truth_nothing_is_said_to_agree(honest):
    folder, _ = honest
    found = check(folder)
    assert {c.status for c in found.values()} == {"unchecked"}
    assert "not available" in found["a"].problems[0]


@pytest.mark.parametrize(
    ("metric", "part", "said"),
    [
        ("lds", "value", "lds is 0.9"),
        ("lds", "low", "low end of its interval"),
        ("ceiling", "value", "ceiling is 0.9"),
        ("share_of_ceiling", "high", "share_of_ceiling (high end"),
    ],
)
def test_an_altered_metric_is_named(honest, metric, part, said):
    folder, truth = honest
    path = next(r.path for r in read_run(folder).records if r.label == "b")
    data = read_json(path)
    data["metrics"][metric][part] = 0.9
    write_json(path, data)
    found = check(folder, truth)
    assert found["a"].status == "agrees"
    assert found["b"].status == "differs"
    assert len(found["b"].problems) == 1
    assert said in found["b"].problems[0]


def test_a_metric_that_was_added_is_named(honest):
    folder, truth = honest
    path = next(r.path for r in read_run(folder).records if r.label == "b")
    data = read_json(path)
    data["metrics"]["wonder"] = {"value": 1.0}
    write_json(path, data)
    assert "wonder does not follow from stored scores" in check(folder, truth)["b"].problems[0]


@pytest.mark.parametrize("name", ["per_query", "replicates", "group_scores"])
def test_altered_arrays_are_named(honest, put_cell, name):
    folder, truth = honest
    r = next(r for r in read_run(folder).records if r.label == "b")
    arrays, meta = r.arrays()
    if name == "group_scores":
        arrays[name] = np.ascontiguousarray(arrays[name][:, ::-1])
    else:
        arrays[name] = arrays[name] + 0.01
    put_cell(folder, r.data, arrays, meta)
    found = check(folder, truth)["b"]
    assert found.status == "differs"
    assert any((name if name != "group_scores" else "lds is") in p for p in found.problems)


def test_damaged_files_are_named(honest):
    folder, truth = honest
    path = next(r.arrays_path for r in read_run(folder).records if r.label == "b")
    data = bytearray(path.read_bytes())
    data[-3] ^= 0xFF
    path.write_bytes(bytes(data))
    assert "corrupt" in check(folder, truth)["b"].problems[0]
    path.unlink()
    assert "missing" in check(folder, truth)["b"].problems[0]
    (folder / "cells" / "zz.json").write_text("{")
    assert "zz.json" in check(folder, truth)["?"].problems[0]


def test_a_truth_of_another_corpus_is_refused(honest):
    folder, truth = honest
    for r in read_run(folder).records:
        write_json(r.path, {**r.data, "corpus": {"train": "another", "queries": "9999"}})
    found = check(folder, truth)["a"]
    assert found.status == "differs"
    assert "another training corpus" in found.problems[0]


def test_an_older_version_and_an_unknown_benchmark_are_unchecked(honest, make_run):
    folder, truth = honest
    for r in read_run(folder).records:
        write_json(r.path, {**r.data, "benchmark": {**r.data["benchmark"], "version": 0}})
    assert "version 0" in check(folder, truth)["a"].problems[0]
    other = make_run("s", {"a": 1.0}, benchmarks=("nowhere",))
    assert check(other)["a"].status == "unchecked"


def test_a_record_moved_under_another_key_is_named(honest):
    folder, truth = honest
    r = next(r for r in read_run(folder).records if r.label == "b")
    r.path.rename(r.path.with_stem("0" * 16))
    r.arrays_path.rename(r.arrays_path.with_stem("0" * 16))
    assert "is not the name of its file" in check(folder, truth)["b"].problems[0]


def test_a_missing_truth_file_is_a_usage_error(honest):
    with pytest.raises(UsageError, match="does not exist"):
        check(honest[0], Path("nope"))


def test_the_command_and_its_exit_code(honest):
    folder, truth = honest
    args = [str(folder), "--truth", str(truth)]
    done = CliRunner().invoke(command, args)
    assert (done.exit_code, done.stdout) == (0, "2 of 2 results agree, 0 differ.\n")
    path = next(r.path for r in read_run(folder).records if r.label == "b")
    data = read_json(path)
    data["metrics"]["lds"]["value"] = 0.99
    write_json(path, data)
    done = CliRunner().invoke(command, args)
    assert done.exit_code == 1
    assert "differs: b · qwen2-1m · lds: lds is 0.99 in the record" in done.stdout
    rows = json.loads(CliRunner().invoke(command, [*args, "--json"]).stdout)
    assert {r["label"]: r["status"] for r in rows} == {"a": "agrees", "b": "differs"}


def test_a_truth_that_a_suite_declares_for_another_target_is_refused(honest):
    folder, path = honest
    record = next(iter(read_run(folder).records))
    truths = Truths()
    truths.add(path, "gpt2-2m")
    with pytest.raises(DataError, match="another target"):
        truths.of(record, "lds")
    truths.add(path, "qwen2-1m")
    assert len(truths.of(record, "lds").query_ids) == 40
