"""Running: faults become rows, finished work is never redone, and nothing half done is read."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tdabench.data.examples import Corpus
from tdabench.errors import DataError, GuardError, TdabenchError, UsageError
from tdabench.groups import Groups
from tdabench.io import read_arrays, read_json, write_json
from tdabench.report.board import Board
from tdabench.report.records import read_run
from tdabench.report.verify import verify_runs
from tdabench.run import Options, Request, RunFolder, RunResult, make_plan, run
from tdabench.run.plan import plan_indices
from tdabench.truth import Truth

QUICK = Options(jobs=2, threads=1, timeout=300.0)

FAULTS = {
    "raises": "ZeroDivisionError: one by nought (in during_build, toys.py:",
    "shape": "score returned shape [12, 59], expected [query, train] = [12, 60]",
    "nan": "returned NaN for 3 queries (3 scores)",
    "crashes": "killed by SIGSEGV during build",
    "seeds": "random state of random and numpy.random",
    "alters": "left the target's model 'base' with its weights changed",
    "exits": "exit status 3 during build",
    "litters": "litters.build wrote outside its scratch folder: ",
}


def measure(
    suite: Path, out: Path, methods: str, options: Options = QUICK, **asked: Any
) -> dict[str, dict[str, Any]]:
    """Runs methods of a suite; records by label."""
    return by_label(run(Request(str(suite), tuple(methods.split(",")), **asked), out, options))


def by_label(result: RunResult) -> dict[str, dict[str, Any]]:
    return {r["method"]["label"]: r for r in result.records}


@pytest.fixture
def builds(tmp_path: Path) -> Callable[[], list[str]]:
    """Which methods were built since the test began, in order, by the logs of its runs."""

    def built() -> list[str]:
        found = []
        for log in sorted([*tmp_path.glob("*/log.jsonl"), *tmp_path.glob("*/*/log.jsonl")]):
            names: dict[str, str] = {}
            for line in log.read_text().splitlines():
                event = json.loads(line)
                if event["event"] == "start":
                    names[event["worker"]] = event["job"].partition(" ")[0]
                elif event["event"] == "phase" and event["phase"] == "build":
                    found.append(names[event["worker"]])
        return found

    return built


# --------------------------------------------------------------------------- faults


@pytest.fixture(scope="module")
def faults(
    toy_suite: Path, toys: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, dict[str, Any]]]:
    out = tmp_path_factory.mktemp("faults")
    return out, measure(toy_suite, out, ",".join(["toy", "prints", "lacks", *FAULTS]))


def test_a_fault_ends_its_own_cell_only(faults):
    _, found = faults
    assert {k: r["status"] for k, r in found.items()} == {
        "toy": "ok",
        "prints": "ok",
        "lacks": "skipped",
        **dict.fromkeys(FAULTS, "failed"),
    }


@pytest.mark.parametrize("name", FAULTS)
def test_a_failed_row_names_its_cause(name: str, faults):
    assert FAULTS[name] in faults[1][name]["reason"]


def test_the_last_lines_of_its_log_stay_with_a_failed_cell(faults):
    _, found = faults
    assert "about to crash" in found["crashes"]["log_tail"]
    assert any("ZeroDivisionError" in line for line in found["raises"]["log_tail"])


def test_a_missing_extra_is_skipped_with_its_remedy(faults):
    assert "pip install sentence-transformers" in faults[1]["lacks"]["reason"]


def test_a_benchmark_that_the_suite_has_no_data_for_is_skipped(toy_suite, toys, tmp_path):
    request = Request(str(toy_suite), ("toy",), benchmarks=("noise", "transfer"))
    result = run(request, tmp_path)
    assert not result.failed
    found = {r["benchmark"]["name"]: r for r in result.records}
    assert {r["status"] for r in found.values()} == {"skipped"}
    assert "no training example with the field 'planted'. Give" in found["noise"]["reason"]
    assert "no other target with a truth 'lds'" in found["transfer"]["reason"]


def test_prints_land_in_the_log(faults):
    log = (faults[0] / "logs" / "prints-tiny-0.log").read_text()
    assert "noise on stdout" in log
    assert "noise on the descriptor" in log


def test_a_record_says_what_was_measured_and_what_it_cost(faults):
    out, found = faults
    record = found["toy"]
    assert read_json(out / "cells" / f"{record['key']}.json") == record
    assert record["method"]["params"] == {"size": 3, "share": 0.5}
    assert record["cost"]["n_train"] == 60
    index = out / "indices"
    kept = [p for p in index.iterdir() if (p / "index").is_dir()]
    sizes = {sum(f.stat().st_size for f in (p / "index").rglob("*")) for p in kept}
    assert record["cost"]["index_bytes"] in sizes
    assert record["cost"]["query"]["queries"] == 12
    assert record["cost"]["build"]["seconds"] >= 0
    assert record["cost"]["build"]["peak_bytes"] > 10 << 20
    assert record["truth"]
    assert record["inputs"]["truth:lds"] == record["truth"]
    arrays, meta = read_arrays(out / "cells" / f"{record['key']}.safetensors")
    assert arrays["per_query"].shape == (12,)
    assert len(meta["query_ids"]) == 12
    value = record["metrics"][record["primary"]]["value"]
    assert arrays["per_query"].mean() == pytest.approx(value, abs=1e-6)


def test_the_manifest_says_what_was_asked(faults):
    manifest = read_json(faults[0] / "manifest.json")
    assert manifest["suite"]["name"] == "toy"
    assert manifest["methods"] == ["toy", "prints", "lacks", *FAULTS]
    assert manifest["targets"]["tiny"]["regime"] == "cold"
    assert Request.from_dict(manifest["request"]).methods == tuple(manifest["methods"])


def test_nothing_temporary_is_left(faults):
    out, _ = faults
    assert not (out / "work").exists()
    assert not [p for p in out.rglob(".*") if p.name != ".lock"]


def test_a_hang_is_a_timeout_and_the_rest_completes(toy_suite: Path, toys: str, tmp_path: Path):
    options = Options(jobs=2, threads=1, timeout=20.0)
    found = measure(toy_suite, tmp_path / "run", "hangs,toy", options)
    assert found["hangs"]["status"] == "timeout"
    assert "lds took longer than 20 s (--timeout)" in found["hangs"]["reason"]
    assert found["toy"]["status"] == "ok"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_hoarding_memory_is_oom_and_names_the_limit(toy_suite: Path, toys: str, tmp_path: Path):
    options = Options(threads=1, memory=600 << 20)
    found = measure(toy_suite, tmp_path / "run", "hoards", options)
    assert found["hoards"]["status"] == "oom"
    assert "more than the 0.59 GiB allowed (--memory)" in found["hoards"]["reason"]


# --------------------------------------------------------------------------- resume


def test_finished_cells_are_not_measured_again(toy_suite, toys, tmp_path, builds):
    first = measure(toy_suite, tmp_path / "run", "toy,raises")
    again = measure(toy_suite, tmp_path / "run", "toy,raises")
    assert sorted(builds()) == ["raises", "raises", "toy"]  # what failed is tried again
    assert again["toy"] == first["toy"]
    assert again["raises"]["status"] == "failed"


def test_failed_cells_can_be_left_alone(toy_suite, toys, tmp_path, builds):
    measure(toy_suite, tmp_path / "run", "raises")
    options = Options(retry_failed=False)
    assert measure(toy_suite, tmp_path / "run", "raises", options)["raises"]["status"] == "failed"
    assert builds() == ["raises"]


def test_two_fresh_runs_give_identical_scores(toy_suite, toys, tmp_path):
    a = measure(toy_suite, tmp_path / "a", "toy")["toy"]
    b = measure(toy_suite, tmp_path / "b", "toy")["toy"]
    assert a["key"] == b["key"]
    assert a["metrics"] == b["metrics"]
    one, two = (read_arrays(tmp_path / x / "cells" / f"{a['key']}.safetensors")[0] for x in "ab")
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_a_kept_index_is_reused_with_its_cost(toy_suite, toys, tmp_path, builds):
    out = tmp_path / "run"
    first = measure(toy_suite, out, "toy")["toy"]
    (out / "cells" / f"{first['key']}.json").unlink()
    second = measure(toy_suite, out, "toy")["toy"]
    assert builds() == ["toy"]
    assert second["metrics"] == first["metrics"]
    assert second["cost"]["build"] == first["cost"]["build"]


def test_indices_can_be_dropped_and_force_builds_again(toy_suite, toys, tmp_path, builds):
    out = tmp_path / "run"
    measure(toy_suite, out, "toy", Options(keep_indices=False))
    assert list((out / "indices").iterdir()) == []
    measure(toy_suite, out, "toy", Options(force=True))
    assert builds() == ["toy", "toy"]


def test_a_damaged_record_is_measured_again(toy_suite, toys, tmp_path):
    out = tmp_path / "run"
    first = measure(toy_suite, out, "toy")["toy"]
    path = out / "cells" / f"{first['key']}.json"
    path.write_text(path.read_text()[:100])
    assert measure(toy_suite, out, "toy")["toy"]["metrics"] == first["metrics"]
    (out / "cells" / f"{first['key']}.safetensors").unlink()
    assert measure(toy_suite, out, "toy")["toy"]["metrics"] == first["metrics"]


def test_another_asset_is_another_measurement(make_suite, toys, tmp_path, builds):
    suite = make_suite('[assets]\nwords = "words.txt"')
    asset = suite.parent / "words.txt"
    asset.write_text("one")
    measure(suite, tmp_path / "run", "asset,toy")
    asset.write_text("two")
    found = measure(suite, tmp_path / "run", "asset,toy")
    assert sorted(builds()) == ["asset", "asset", "toy"]  # toy never opened it
    assert found["asset"]["status"] == "ok"


def test_nothing_is_reused_if_the_tokenizer_changes(
    make_suite, toys, tmp_path, builds, tiny_target
):
    """Whatever the template: another end of text means other losses."""
    folder = Path(shutil.copytree(tiny_target.folder, tmp_path / "target"))
    suite = make_suite(target=replace(tiny_target, folder=folder))
    measure(suite, tmp_path / "run", "toy")
    request, file = Request(str(suite), ("toy",)), folder / "tokenizer_config.json"
    settings = read_json(file)

    def index_key() -> str:
        return plan_indices(request).builds[0].index_key

    key = index_key()
    write_json(file, settings | {"model_max_length": 99})  # changes no token
    assert index_key() == key
    measure(suite, tmp_path / "run", "toy")
    assert builds() == ["toy"]
    write_json(file, settings | {"eos_token": "A"})
    assert index_key() != key  # `trace` and own data, which have no truth, build it again
    with pytest.raises(GuardError, match="truth 'toy' was built on another target"):
        measure(suite, tmp_path / "run", "toy")


def test_a_method_whose_asset_the_suite_lacks_is_skipped(toy_suite, toys, tmp_path):
    found = measure(toy_suite, tmp_path / "run", "asset")
    assert found["asset"]["status"] == "skipped"
    assert found["asset"]["reason"] == (
        "the suite provides no asset 'words'. It provides: none. Name a file or folder under "
        "[assets] in the suite, or with own data: --asset words=SOURCE"
    )
    (passed,) = measure(toy_suite, tmp_path / "run", "asset", sets=("asset.size=9",)).values()
    assert passed["status"] == "failed"


def test_what_a_new_version_replaces_steps_aside(toy_suite, toys, tmp_path):
    folder = RunFolder(tmp_path / "run")
    record = measure(toy_suite, folder.path, "toy")["toy"]
    newer = {**record, "key": "0" * 16, "status": "failed", "reason": "no"}
    folder.write(newer)
    assert {r["key"] for r in folder.records()} == {record["key"], "0" * 16}
    folder.arrays_path("1" * 16).write_bytes(folder.arrays_path(record["key"]).read_bytes())
    folder.write({**record, "key": "1" * 16})
    assert {r["key"] for r in folder.records()} == {"1" * 16}
    assert (folder.path / "superseded" / f"{record['key']}.json").exists()


# --------------------------------------------------------------------------- interruptions


def start(suite: Path, out: Path, methods: str, toys: str) -> subprocess.Popen:
    code = "import sys; from tdabench.cli import main; sys.exit(main())"
    arguments = ["run", "--suite", str(suite), "--methods", methods, "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--plugin", toys, "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_interrupted_once_records_and_goes_on_later(toy_suite, toys, tmp_path, builds):
    out = tmp_path / "run"
    process = start(toy_suite, out, "toy,slow,raises", toys)
    wait_for(lambda: "slow" in builds())
    process.send_signal(signal.SIGINT)
    board, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "slow  interrupted: stopped by the user" in board
    assert board.count("not started") == 1
    assert " -    raises on tiny  not started: lds\n" in board
    assert "Traceback" not in err
    assert "The same command resumes from here" in err
    statuses = {r["method"]["label"]: r["status"] for r in RunFolder(out).records()}
    assert statuses == {"toy": "ok", "slow": "interrupted"}
    found = measure(toy_suite, out, "toy,slow")
    assert {r["status"] for r in found.values()} == {"ok"}
    assert builds().count("toy") == 1


class Terminal:
    """A run whose stdin and stderr are a terminal, which someone reads."""

    def __init__(self, suite: Path, out: Path, methods: str, toys: str) -> None:
        self.ours, theirs = os.openpty()
        code = "import sys; from tdabench.cli import main; sys.exit(main())"
        arguments = ["run", "--suite", str(suite), "--methods", methods, "--out", str(out)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments, "--plugin", toys, "--threads", "1"],
            stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, text=True,
        )  # fmt: skip
        os.close(theirs)
        self.text = b""
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(self.ours, 1 << 16):
                self.text += part
        os.close(self.ours)

    def ended(self) -> tuple[int, str, str]:
        """Returns the exit code, the board, and what stderr said as one line of words."""
        board, _ = self.process.communicate(timeout=120)
        self.reader.join()
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", " ", self.text.decode())
        return self.process.returncode, board, " ".join(plain.split())


def test_a_single_interrupt_in_a_terminal_skips_what_is_in_hand(toy_suite, toys, tmp_path, builds):
    out = tmp_path / "run"
    terminal = Terminal(toy_suite, out, "hangs,toy", toys)
    wait_for(lambda: "hangs" in builds())
    terminal.process.send_signal(signal.SIGINT)
    code, board, err = terminal.ended()
    assert code == 0, err
    assert "measuring hangs, toy, one after the other: lds" in err
    assert "Ctrl-C skips the current one, twice stops the run" in err
    assert "skipping hangs on tiny" in err
    assert "skipped with Ctrl-C: the same command measures it" in board
    statuses = {r["method"]["label"]: r["status"] for r in RunFolder(out).records()}
    assert statuses == {"hangs": "skipped", "toy": "ok"}


def test_two_interrupts_in_a_terminal_stop_the_run(toy_suite, toys, tmp_path, builds):
    out = tmp_path / "run"
    terminal = Terminal(toy_suite, out, "hangs,slow,toy", toys)
    wait_for(lambda: "hangs" in builds())
    terminal.process.send_signal(signal.SIGINT)
    time.sleep(0.3)  # two signals at once would be one
    terminal.process.send_signal(signal.SIGINT)
    code, board, err = terminal.ended()
    assert code == 130, err
    assert "The same command resumes from here" in err
    statuses = {r["method"]["label"]: r["status"] for r in RunFolder(out).records()}
    assert statuses["hangs"] in ("skipped", "interrupted")
    assert statuses.get("slow", "interrupted") == "interrupted"
    assert "toy" not in statuses
    assert " -    toy on tiny  not started: lds" in board


def test_slow_benchmarks_are_measured_last(toy_suite, toys):
    names = ("cost", "removal", "classification", "lds")
    plan = make_plan(Request(str(toy_suite), ("toy",), benchmarks=names))
    (job,) = plan.jobs(plan.cells)
    assert [c.benchmark.name for c in job.cells] == ["lds", "classification", "cost", "removal"]


def test_killed_outright_leaves_no_worker_and_no_half_file(toy_suite, toys, tmp_path, builds):
    out = tmp_path / "run"
    process = start(toy_suite, out, "slow", toys)
    wait_for(lambda: builds() == ["slow"])
    job = read_json(next((out / "work").glob("*/job.json")))
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not _is_working(job["work"]))
    (out / "cells").mkdir(exist_ok=True)
    half = out / "cells" / ".0123456789abcdef.json.x1y2z3_4.tmp"
    half.write_text("{")
    assert measure(toy_suite, out, "slow")["slow"]["status"] == "ok"
    assert not half.exists()


def _is_working(work: str) -> bool:
    """Whether a worker of that folder is alive."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return any("tdabench.run.judge" in c and work in c for c in commands)


def test_two_runs_on_one_folder_refuse(toy_suite, toys, tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.locked(), pytest.raises(TdabenchError, match="another run is writing"):
        measure(toy_suite, folder.path, "toy")


# --------------------------------------------------------------------------- refusals


def test_a_query_that_is_trained_on_is_refused(make_suite, toys, tmp_path, tiny_corpus):
    leaked = [replace(e, id=f"other-{e.id}") for e in tiny_corpus[:3]]
    suite = make_suite(queries=Corpus(leaked, "leak"))
    with pytest.raises(GuardError, match="also a training example"):
        measure(suite, tmp_path / "run", "toy")


def test_a_truth_of_another_corpus_is_refused(make_suite, toys, tmp_path, tiny_corpus):
    suite = make_suite()
    text = (suite.parent / "corpus.jsonl").read_text()
    (suite.parent / "corpus.jsonl").write_text(text.replace(tiny_corpus[0].prompt, "Other", 1))
    with pytest.raises(GuardError, match="built on another training corpus"):
        measure(suite, tmp_path / "run", "toy")


def test_a_checkpoint_behind_the_truth_is_refused(make_suite, tmp_path, tiny_target, tiny_queries):
    """Where a method would score there, and only there."""
    suite = make_suite()
    truth = Truth.load(suite.parent / "truth.safetensors")
    model = tiny_target.model("warm")
    truth.losses[3, 1] = tiny_target.losses(model, tiny_target.tokenize(tiny_queries))
    truth.save(suite.parent / "truth.safetensors")
    asked = {"sets": ("hidden.checkpoint=warm",)}
    (found,) = measure(suite, tmp_path / "run", "hidden", **asked).values()
    assert found["status"] == "failed"
    assert "'warm' of tiny-qwen2 is among the models behind the truth 'toy'" in found["reason"]
    assert measure(suite, tmp_path / "run", "hidden")["hidden"]["status"] == "ok"


def test_some_queries_have_a_column_of_their_own(make_suite, toys, tmp_path, tiny_queries):
    suite = make_suite()
    whole = measure(suite, tmp_path / "run", "toy")["toy"]
    some = measure(suite, tmp_path / "some", "toy", sets=("lds.queries=2",))["toy"]
    assert some["key"] != whole["key"]
    assert some["cost"]["query"]["queries"] == 2
    stored, about = read_arrays(RunFolder(tmp_path / "some").arrays_path(some["key"]))
    assert len(about["query_ids"]) == 2
    assert set(about["query_ids"]) < set(tiny_queries.ids)
    assert stored["per_query"].shape == (2,)
    assert about["top_query_ids"] == about["query_ids"]
    found = [read_run(tmp_path / name) for name in ("run", "some")]
    (table,) = Board.of_runs(found).tables
    columns = sorted((c.benchmark, c.queries) for c in table.columns)
    assert columns == [("lds", 2), ("lds", len(tiny_queries))]
    checks = verify_runs(found, [suite.parent / "truth.safetensors"])
    assert {c.status for c in checks} == {"agrees"}


def test_a_method_fitted_on_the_scored_truth_is_refused(make_suite, toys, tmp_path):
    suite = make_suite('[assets]\ndatamodels = "truth.safetensors"\n')
    record = measure(suite, tmp_path / "run", "datamodels")["datamodels"]
    assert record["status"] == "failed"
    assert "fitted on 8 groups of the truth 'toy'" in record["reason"]


def test_a_method_fitted_on_other_groups_is_scored(
    make_suite, toys, tmp_path, tiny_corpus, tiny_queries
):
    suite = make_suite('[assets]\ndatamodels = "own.safetensors"\n')
    groups = Groups.random(20, len(tiny_corpus), 0.25, np.random.default_rng(7))
    losses = np.random.default_rng(8).normal(2, 0.1, (20, 1, len(tiny_queries)))
    plan = {"name": "own", "train": tiny_corpus.fingerprint}
    own = Truth(losses.astype("f4"), groups, tuple(tiny_queries.ids), plan)
    own.save(suite.parent / "own.safetensors")
    record = measure(suite, tmp_path / "run", "datamodels")["datamodels"]
    assert record["status"] == "ok"
    assert record["cost"]["prepare"]["retrainings"] == 20


def test_a_folder_of_another_suite_is_refused(toy_suite, toys, tmp_path, make_suite):
    measure(toy_suite, tmp_path / "run", "toy")
    suite = make_suite()
    suite.write_text(suite.read_text().replace('name = "toy"', 'name = "other"'))
    with pytest.raises(UsageError, match="contains results of suite toy version 1, not of other"):
        measure(suite, tmp_path / "run", "toy")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_an_unwritable_folder_is_refused(toy_suite, toys, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot write to"):
        measure(toy_suite, tmp_path / "run", "toy")
    tmp_path.chmod(0o700)


def test_a_file_in_place_of_the_folder_is_refused(toy_suite, toys, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        measure(toy_suite, tmp_path / "run", "toy")


def test_an_altered_file_is_refused(make_suite, toys, tmp_path):
    suite = make_suite(f'[hashes]\n"truth.safetensors" = "{"0" * 64}"')
    with pytest.raises(DataError, match="is not the declared file"):
        measure(suite, tmp_path / "run", "toy")


def test_a_target_without_the_truth_is_a_skipped_row(make_suite, toys, tmp_path):
    suite = make_suite()
    text = suite.read_text().replace('[targets.truths]\nlds = "truth.safetensors"\n', "")
    suite.write_text(text)
    found = measure(suite, tmp_path / "run", "toy")
    assert found["toy"]["status"] == "skipped"
    assert "declares no truth 'lds'" in found["toy"]["reason"]


# --------------------------------------------------------------------------- keys and labels


def keys(suite: Path, methods: str, **asked: Any) -> dict[str, str]:
    plan = make_plan(Request(str(suite), tuple(methods.split(",")), **asked))
    return {c.method.label: c.key for c in plan.cells}


def test_the_key_covers_parameters_and_the_label_shows_them(toy_suite, toys):
    plain = keys(toy_suite, "toy")
    other = keys(toy_suite, "toy", sets=("toy.size=4",))
    assert list(other) == ["toy[size=4]"]
    assert other["toy[size=4]"] != plain["toy"]
    same = keys(toy_suite, "toy", sets=("toy.size=3",))
    assert same == plain
    assert keys(toy_suite, "toy", seeds=(1,))["toy"] != plain["toy"]


def test_precedence_of_parameters(make_suite, toys):
    suite = make_suite(
        """
[methods]
default = ["toy", "big"]
[methods.params.toy]
size = 5
share = 0.1
[[methods.variants]]
label = "big"
method = "toy"
params = { size = 9 }
[tuned.tiny.toy]
share = 0.2
"""
    )
    plan = make_plan(Request(str(suite), sets=("big.share=0.3",)))
    found = {c.method.label: c.method for c in plan.cells}
    assert found["toy"].params == {"size": 5, "share": 0.2}
    assert found["toy"].tuned == {"share": 0.2}
    assert found["big[share=0.3]"].params == {"size": 9, "share": 0.3}
    assert found["big[share=0.3]"].passed == {"share": 0.3}
    assert found["big[share=0.3]"].tuned == {}


def test_two_labels_of_one_measurement_are_measured_once(make_suite, toys):
    suite = make_suite('[[methods.variants]]\nlabel = "twin"\nmethod = "toy"')
    plan = make_plan(Request(str(suite), ("toy", "twin")))
    assert [c.method.label for c in plan.cells] == ["toy"]
    assert plan.twins == {"twin": "toy"}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("toy.size=big", "toy.size = 'big' is not of the type int"),
        ("toy.siz=4", "unknown parameter of toy 'siz'"),
        ("tyo.size=4", "unknown method or benchmark in --set 'tyo'"),
        ("toy.size", "does not have the form NAME.PARAMETER=VALUE"),
        ("size=4", "does not have the form NAME.PARAMETER=VALUE"),
    ],
)
def test_a_wrong_set_is_one_clear_line(toy_suite, toys, sets: str, message: str):
    with pytest.raises(UsageError) as e:
        keys(toy_suite, "toy", sets=(sets,))
    assert message in str(e.value)


def test_a_parameter_of_a_benchmark_is_set_in_the_same_way(toy_suite, toys):
    plan = make_plan(Request(str(toy_suite), ("toy",), sets=("lds.replicates=77", "toy.size=4")))
    (cell,) = plan.cells
    assert cell.benchmark.params["replicates"] == 77
    assert cell.method.label == "toy[size=4]"
    assert keys(toy_suite, "toy", sets=("lds.replicates=77",)) != keys(toy_suite, "toy")
    assert keys(toy_suite, "toy", sets=("lds.replicates=50",)) == keys(toy_suite, "toy")
    for sets, message in (
        ("lds.replicats=77", "unknown parameter of lds 'replicats'. Did you mean 'replicates'"),
        ("lds.replicates=x", "lds.replicates = 'x' is not of the type int"),
        ("cost.repeats=3", "unknown method or benchmark in --set 'cost'"),  # it does not run
    ):
        with pytest.raises(UsageError) as e:
            keys(toy_suite, "toy", sets=(sets,))
        assert message in str(e.value)
    with pytest.raises(UsageError, match="unknown method in --set 'lds'"):  # nothing is measured
        plan_indices(Request(str(toy_suite), ("toy",), sets=("lds.replicates=77",)))


def test_unknown_names_are_named(toy_suite, toys):
    with pytest.raises(UsageError, match=r"unknown method 'tooy'\. Did you mean 'toy'"):
        keys(toy_suite, "tooy")
    with pytest.raises(UsageError, match="unknown target of suite toy 'tinny'"):
        keys(toy_suite, "toy", targets=("tinny",))
    with pytest.raises(UsageError, match="unknown benchmark 'ldss'"):
        keys(toy_suite, "toy", benchmarks=("ldss",))
    with pytest.raises(UsageError, match="declares no tuning queries"):
        keys(toy_suite, "toy", split="tuning")
