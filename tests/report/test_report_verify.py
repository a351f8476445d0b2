"""`verify` agrees with honest runs and names what was altered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tdabench.benchmark import Stored
from tdabench.benchmarks.lds import LDS
from tdabench.cli.verify import command
from tdabench.errors import DataError, UsageError
from tdabench.groups import pool_scores
from tdabench.io import read_arrays, read_json, sha256_file, write_arrays, write_json
from tdabench.report.board import Board
from tdabench.report.records import read_run
from tdabench.report.verify import Truths, verify_runs
from tdabench.run.folder import RunFolder
from tdabench.run.keys import cell_key
from tdabench.run.record import Record
from tdabench.truth.store import Truth


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
    assert {c.status for c in found.values()} == {"missing"}
    assert "not available" in found["a"].problems[0]
    done = CliRunner().invoke(command, [str(folder)])
    assert done.exit_code == 1
    assert "0 of 2 results agree, 0 differ, 2 lack their truth." in done.output


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


# --------------------------------------------------------------------------- edited records


def written(folder: Path, truth: Path) -> dict[str, Path]:
    """Writes the records of a run as a run writes them, with key, digest and hash of arrays."""
    run_folder = RunFolder(folder)
    out = {}
    for r in read_run(folder).records:
        method = {**r.data["method"], "ignored": ["batch"]}
        data = {**r.data, "method": method, "device": "cpu", "truth": sha256_file(truth)[:16]}
        b = data["benchmark"]
        data["key"] = cell_key(
            [method["name"], method["version"], method["params"]], data["target"]["fingerprint"],
            data["corpus"], [b["name"], b["version"], b["params"]], data["truth"], data["seed"],
            "cpu",
        )  # fmt: skip
        arrays, meta = r.arrays()
        r.path.unlink()
        r.arrays_path.unlink()
        write_arrays(run_folder.arrays_path(data["key"]), arrays, {**meta, "key": data["key"]})
        run_folder.write(data)
        out[r.label] = run_folder.record_path(data["key"])
    return out


def edited(path: Path, *where: str, to: object) -> None:
    data = read_json(path)
    part = data
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = to
    write_json(path, data)


def test_show_and_python_mark_what_was_altered(honest):
    from tdabench import load_results
    from tdabench.cli.show import command as show

    folder, truth = honest
    path = written(folder, truth)["b"]
    edited(path, "metrics", "lds", "value", to=0.99)
    done = CliRunner().invoke(show, ["b", "--run", str(folder)])
    assert "! altered after it was written: its digest does not match its fields" in done.output
    assert "! lds 0.990 lies outside its interval" in done.output
    listed = CliRunner().invoke(show, ["--run", str(folder)]).output.splitlines()
    assert ["[altered]" in x for x in listed[1:]] == [" b " in x for x in listed[1:]]
    marks = {row["label"]: row["marks"] for row in load_results(folder)}
    assert "its digest does not match its fields; lds 0.990 lies outside" in marks["b"]
    assert marks["a"] == ""


EDITS = [
    (("method", "label"), "airrep"),
    (("method", "params", "rank"), 4),
    (("method", "version"), 2),
    (("seed",), 3),
    (("cost", "build", "seconds"), 0.001),
    (("hardware", "cpu"), "Fastor 1"),
    (("inputs",), {"asset:x": "1"}),
    (("metrics", "lds", "value"), 0.99),
]


@pytest.mark.parametrize(("where", "to"), EDITS)
def test_an_edited_field_is_named_and_its_row_marked(honest, where, to):
    folder, truth = honest
    places = written(folder, truth)
    assert {c.status for c in verify_runs([read_run(folder)], [truth])} == {"agrees"}
    assert not any("altered" in w for w in Board.from_runs([folder], cache=False).warnings)
    edited(places["b"], *where, to=to)
    (bad,) = [c for c in verify_runs([read_run(folder)], [truth]) if c.status == "differs"]
    assert "its digest does not match its fields" in bad.problems
    board = Board.from_runs([folder], cache=False)
    assert any("was altered after it was written" in w for w in board.warnings)
    labels = [r.label for t in board.tables for r in t.rows]
    assert sum("[altered]" in label for label in labels) == 1


@pytest.mark.parametrize(("where", "to"), EDITS[1:4])
def test_a_key_that_does_not_fit_is_named_although_the_digest_does(honest, where, to):
    folder, truth = honest
    path = written(folder, truth)["b"]
    edited(path, *where, to=to)
    data = read_json(path)
    write_json(path, dict(Record(data).signed(data["arrays"])))
    (bad,) = [c for c in verify_runs([read_run(folder)], [truth]) if c.status == "differs"]
    assert bad.problems == ("its key does not fit its method, data, benchmark, seed or device",)
    assert any("its key does not fit" in w for w in Board.from_runs([folder], cache=False).warnings)


def test_other_arrays_beside_a_record_are_named(honest):
    folder, truth = honest
    places = written(folder, truth)
    arrays, meta = read_arrays(places["a"].with_suffix(".safetensors"))
    key = read_json(places["b"])["key"]
    write_arrays(places["b"].with_suffix(".safetensors"), arrays, {**meta, "key": key})
    (bad,) = [c for c in verify_runs([read_run(folder)], [truth]) if c.status == "differs"]
    assert "its arrays are not the ones it was written with" in bad.problems


@pytest.fixture
def pooled(honest) -> tuple[Path, Path, Path]:
    """A run, its truth, and a record that holds example scores and follows from them."""
    folder, truth = honest
    path = written(folder, truth)["b"]
    groups = Truth.load(truth).groups
    scores = np.random.default_rng(5).normal(size=(40, groups.n_train)).astype(np.float32)
    arrays = {"example_scores": scores, "group_scores": pool_scores(scores, groups, "softmax", 0.5)}
    rewrite(path, truth, arrays, {"pooling": "softmax", "temperature": 0.5})
    return folder, truth, path


def rewrite(path: Path, truth: Path, changed: dict, meta: dict) -> None:
    """Forges a record: arrays, and all that follows from them, key and digest included."""
    arrays, about = read_arrays(path.with_suffix(".safetensors"))
    arrays, about = {**arrays, **changed}, {**about, **meta}
    data = read_json(path)
    stored = Stored(arrays, tuple(about["query_ids"]), lambda kind: Truth.load(truth), None)
    again = LDS.from_params(data["benchmark"]["params"]).recompute(stored)
    arrays |= {**again.arrays, "per_query": again.per_query, "replicates": again.replicates}
    write_arrays(path.with_suffix(".safetensors"), arrays, about)
    metrics = {k: m.as_dict() for k, m in again.metrics.items()}
    RunFolder(path.parents[1]).write({**data, "metrics": metrics})


def test_group_scores_follow_from_example_scores(pooled):
    folder, truth, _ = pooled
    assert {c.status for c in verify_runs([read_run(folder)], [truth])} == {"agrees"}


def test_group_scores_that_do_not_follow_from_example_scores_are_named(pooled):
    """All else is forged to fit: metrics, replicates, key, digest and hash of the arrays."""
    folder, truth, path = pooled
    better = Truth.load(truth).values.astype(np.float32)
    rewrite(path, truth, {"group_scores": better}, {})
    assert read_json(path)["metrics"]["lds"]["value"] == pytest.approx(1.0)
    (bad,) = [c for c in verify_runs([read_run(folder)], [truth]) if c.status == "differs"]
    assert bad.problems == ("its stored group_scores do not follow from its example scores",)


def test_a_single_edited_group_score_is_named(pooled):
    folder, truth, path = pooled
    arrays, _ = read_arrays(path.with_suffix(".safetensors"))
    scores = arrays["group_scores"].copy()
    scores[3, 7] += 0.1
    rewrite(path, truth, {"group_scores": scores}, {})
    (bad,) = [c for c in verify_runs([read_run(folder)], [truth]) if c.status == "differs"]
    assert "do not follow from its example scores" in bad.problems[0]
    rewrite(path, truth, {}, {"pooling": "nonsense"})
    (bad,) = [c for c in verify_runs([read_run(folder)], [truth]) if c.status == "differs"]
    assert "cannot be pooled from its example scores" in bad.problems[0]


def test_a_truth_inside_a_strangers_run_is_not_believed(honest):
    """Its manifest names a suite beside it, whose truth was made to fit the scores."""
    folder, _ = honest
    suite = folder / "suite.toml"
    suite.write_text("[suite]\nname = 'theirs'\nversion = 1\n")
    manifest = read_json(folder / "manifest.json")
    write_json(
        folder / "manifest.json",
        {**manifest, "request": {"suite": str(suite)}, "seal": "0" * 64},
    )
    assert {c.status for c in verify_runs([read_run(folder)])} == {"missing"}


def test_impossible_looking_values_are_marked(honest):
    folder, truth = honest
    path = next(r.path for r in read_run(folder).records if r.label == "b")
    data = read_json(path)
    data["metrics"]["lds"] |= {"value": -0.99, "low": 0.181, "high": 0.718}
    data["metrics"]["share_of_ceiling"]["value"] = 1.12
    write_json(path, data)
    found = check(folder, truth)["b"]
    assert "lds -0.990 lies outside its interval [0.181, 0.718]" in found.marks
    assert "its value is 112% of the noise ceiling" in found.marks
    warnings = Board.from_runs([folder], cache=False).warnings
    assert any("b on lds: lds -0.990 lies outside its interval" in w for w in warnings)
    assert any("112% of the noise ceiling" in w for w in warnings)


def test_rows_of_another_regime_have_a_table_of_their_own(make_run):
    def other(record):
        if record["method"]["label"] == "b":
            record["target"] = {**record["target"], "regime": "continued"}

    folder = make_run("r", {"a": 1.0, "b": 0.4}, benchmarks=("lds",), change=other)
    board = Board.from_runs([folder], cache=False)
    assert sorted((t.regime, len(t.rows)) for t in board.tables) == [
        ("continued", 1),
        ("instruct", 1),
    ]
    assert any("another regime" in w for w in board.warnings)


def test_a_label_is_one_word_of_the_command_that_a_board_suggests(make_run):
    import io
    import shlex

    from rich.console import Console

    from tdabench.report.terminal import print_board

    label = "x'; rm -rf ~; '"
    out = io.StringIO()
    board = Board.from_runs([make_run("r", {label: 1.0}, benchmarks=("lds",))], cache=False)
    print_board(board, Console(file=out, width=200))
    (line,) = [x for x in out.getvalue().splitlines() if x.startswith("Details: ")]
    words = shlex.split(line.removeprefix("Details: ").rpartition(", tdabench report")[0])
    assert words == ["tdabench", "show", label]
