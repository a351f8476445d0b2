"""The contestant never sees the answers, and what it does shows in its own row only.

Every attack of attackers.py runs once, in one run, confined; those on files and processes once
more without confinement, where they succeed: the tests can fail.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tdabench import registry as plugins
from tdabench.errors import UsageError
from tdabench.io import read_arrays
from tdabench.run import Options, Request, RunFolder, run, sandbox
from tests.faults import attackers
from tests.faults.attackers import SPIN
from tests.run.conftest import write_suite

ATTACKERS = Path(attackers.__file__)
confined = pytest.mark.skipif(not sandbox.abi(), reason="this system has no Landlock")

REFUSED = [
    "plain",
    "reads",
    "writes",
    "labels",
    "points",
    "borrows",
    "channels",
    "pipes",
]  # nothing worked: their rows are as any other
SEEN = ["patches", "hides-time", "hides-memory", "hides-bytes", "daemon"]
ENDED = {
    "hides-in-memory": "nothing is left in memory",
    "links-bytes": "is neither a file nor a folder",
    "hangs-up": "it closed its connection to the harness during build",
    "babbles": "a message came that is not of the harness's protocol",
    "overflows": "bytes asked for",
    "locks": "used a lock, queue or pool of multiprocessing",
}


def attack(
    suite: Path, out: Path, methods: list[str], isolation: str, port: int = 0, jobs: int = 2
) -> dict[str, Any]:
    """Records by method of a run in which every method knows where everything lies."""
    at = {
        "truth": str(suite.parent / "truth.safetensors"),
        "suite": str(suite),
        "corpus": str(suite.parent / "corpus.jsonl"),
        "asset": str(suite.parent / "notes"),
        "run": str(out),
        "other": str(out.parent / "other"),
        "harness": str(os.getpid()),
        "port": str(port),
        "confined": bool(sandbox.abi()) and isolation != "off",
    }
    (out.parent / "other").mkdir(exist_ok=True)
    (out.parent / "other" / "log.jsonl").write_text("{}\n")
    sets = tuple(f"{m}.at={json.dumps(at)}" for m in methods)
    if "points" in methods:
        own, link = out.parent / "other" / "own.txt", out.parent / "link"
        own.write_text("mine")
        link.symlink_to(at["truth"])
        sets += (f"points.truth={at['truth']}", f"points.link={link}", f"points.own={own}")
        sets += (f"points.folder={suite.parent}", f"points.corpus={at['corpus']}")
    plugins.configure((), [str(ATTACKERS)])
    try:
        options = Options(jobs=jobs, threads=1, timeout=300.0, isolation=isolation)
        result = run(Request(str(suite), tuple(methods), sets=sets), out, options)
    finally:
        plugins.configure((), ())
    return {r["method"]["name"]: r for r in result.records}


@pytest.fixture(scope="module")
def own_suite(
    tmp_path_factory: pytest.TempPathFactory, tiny_target, tiny_corpus, tiny_queries
) -> Path:
    """A suite of its own: these methods do what they can to it."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "notes" / "a").mkdir(parents=True)
    (folder / "notes" / "a" / "deep.txt").write_text("an asset")
    extra = '[assets]\nnotes = "notes"\n'
    return write_suite(folder, tiny_target, tiny_corpus, tiny_queries, extra)


@pytest.fixture(scope="module")
def found(
    own_suite: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, Any]]]:
    out = tmp_path_factory.mktemp("attacked") / "run"
    before = digest(own_suite.parent)
    with socket.create_server(("127.0.0.1", 0)) as server:
        methods = [*REFUSED, *SEEN, *ENDED]
        abi = sandbox.abi()
        methods += ["connects"] if abi >= 4 else []
        methods += ["signals"] if abi >= 6 else []
        records = attack(own_suite, out, methods, "strict", server.getsockname()[1])
    assert digest(own_suite.parent) == before
    return out, records


def digest(folder: Path) -> str:
    parts = [[str(p), p.read_bytes().hex()] for p in sorted(folder.rglob("*")) if p.is_file()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def value(record: dict[str, Any]) -> float:
    return float(record["metrics"]["lds"]["value"])


@confined
def test_every_attack_is_refused_or_visible_and_every_row_ends(found):
    _, records = found
    for name, record in records.items():
        assert record["isolation"] == f"landlock {sandbox.abi()}"
        if name in ENDED:
            assert (record["status"], ENDED[name] in record["reason"]) == ("failed", True), record
        else:
            assert record["status"] == "ok", f"{name}: {record['reason']}"


@confined
def test_no_way_leads_to_the_truth_and_none_to_what_is_anothers(found):
    out, records = found
    for name in (*REFUSED, "connects", "signals"):
        if name in records:
            assert value(records[name]) == value(records["plain"])
    assert (out.parent / "other" / "log.jsonl").read_text() == "{}\n"
    assert not (Path.home() / ".tdabench-was-here").exists()


@confined
def test_an_asset_is_readable_once_it_was_requested_and_then_in_the_record(found):
    _, records = found
    assert "asset:notes" in records["borrows"]["inputs"]
    assert "asset:notes" not in records["plain"]["inputs"]


@pytest.mark.parametrize("isolation", ["auto", "off"])
def test_a_cell_is_measured_again_when_a_file_that_a_parameter_names_changes(
    isolation, own_suite, tmp_path
):
    file, out = tmp_path / "words.txt", tmp_path / "run"
    file.write_text("one")
    plugins.configure((), [str(ATTACKERS)])
    try:
        request = Request(str(own_suite), ("follows",), sets=(f"follows.file={file}",))
        options = Options(threads=1, isolation=isolation)
        first, same = (run(request, out, options).records[0] for _ in range(2))
        file.write_text("two")
        changed = run(request, out, options).records[0]
    finally:
        plugins.configure((), ())
    assert first["status"] == "ok", first["reason"]
    assert same["job"] == first["job"]
    assert changed["job"] != first["job"]
    name = "parameter:follows.file"
    assert first["inputs"][name] != changed["inputs"][name]


@confined
def test_patched_statistics_and_clocks_change_no_figure(found):
    out, records = found
    plain, patched = records["plain"], records["patches"]
    assert patched["metrics"] == plain["metrics"]
    arrays = [
        read_arrays(out / "cells" / f"{r['key']}.safetensors")[0]["group_scores"]
        for r in (plain, patched)
    ]
    np.testing.assert_array_equal(*arrays)
    assert patched["cost"]["query"]["seconds"] > 0
    assert patched["cost"]["phases"]["query"]["seconds"] > 0


@confined
def test_hidden_work_is_in_the_phase_in_which_it_was_done(found):
    cost = found[1]["hides-time"]["cost"]
    phases = {k: v["cpu_seconds"] for k, v in cost["phases"].items()}
    assert phases["prepare"] > 0.9 * SPIN
    # A child nobody waited for, under a false claim: the kernel reports nothing of it, so that
    # what it did after the last look at the process table is missing.
    assert phases["build"] > 0.5 * SPIN
    assert phases["save"] > 0.9 * SPIN
    assert phases["load"] > 0.9 * SPIN
    # It claimed a million seconds of set-up; the judge's figures do not follow its word.
    assert cost["build"]["setup_seconds"] <= cost["phases"]["build"]["seconds"] + 1e-3
    for what in ("seconds", "cpu_seconds"):
        assert cost["build"][what] == pytest.approx(cost["phases"]["build"][what], abs=1e-3)
        assert cost["query"][what] > 0.9 * cost["phases"]["query"][what]
    for what in ("seconds", "cpu_seconds"):
        together = sum(v[what] for v in cost["phases"].values())
        assert cost["total"][what] == pytest.approx(together, abs=1e-4)


@confined
def test_memory_of_children_counts(found):
    cost = found[1]["hides-memory"]["cost"]["build"]
    assert cost["peak_bytes"] > 200 << 20
    assert found[1]["plain"]["cost"]["build"]["peak_bytes"] < 200 << 20


@confined
def test_bytes_in_scratch_count_where_loading_needs_them(found):
    cost, plain = (found[1][n]["cost"] for n in ("hides-bytes", "plain"))
    assert cost["scratch_bytes"] == 500_000
    assert cost["index_bytes"] > 500_000 + plain["index_bytes"]
    assert cost["bytes_per_example"] == cost["index_bytes"] / cost["n_train"]


@confined
def test_a_process_that_outlives_its_phase_is_killed_and_named(found):
    notes = found[1]["daemon"]["notes"]
    assert any("build left a process running, which was killed" in n for n in notes)
    assert any("tdabench-orphan" in n for n in notes)
    assert not any(b"tdabench-orphan" in c for c in commands())


def commands() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes()
        except OSError:
            continue


def test_without_isolation_the_same_attacks_work_and_the_record_says_so(make_suite, tmp_path):
    """Otherwise the tests above could not fail; and nothing else is lost by them."""
    records = attack(make_suite(), tmp_path / "run", ["plain", "reads", "points"], "off")
    assert {r["isolation"] for r in records.values()} == {"none"}
    assert records["reads"]["status"] == "failed"
    for way in ("open", "a child", "a symbolic link", "a hard link", "libc", "the suite", "a move"):
        assert way in records["reads"]["reason"]
    for way in ("as a parameter", "a link to it", "its folder", "the corpus", "all, by default"):
        assert way in records["points"]["reason"]
    assert records["plain"]["status"] == "ok"


def test_unconfined_it_can_delete_its_log_and_daemonise_and_the_run_goes_on(make_suite, tmp_path):
    methods = ["daemon", "hides-bytes", "writes", "hides-in-memory"]
    records = attack(make_suite(), tmp_path / "run", methods, "off", jobs=1)
    assert "its own log removed" in records["writes"]["reason"]
    assert records["daemon"]["status"] == "ok"
    assert any("left a process running" in n for n in records["daemon"]["notes"])
    assert records["hides-bytes"]["cost"]["scratch_bytes"] == 500_000


# --------------------------------------------------------------------------- where there is none


def test_a_system_without_landlock_says_so_once_and_records_it(
    own_suite, tmp_path, monkeypatch, capsys
):
    from tdabench.cli import main
    from tdabench.run import execute

    monkeypatch.setattr(execute.sandbox, "abi", lambda: 0)
    asked = ["run", "--suite", str(own_suite), "--plugin", str(ATTACKERS), "--methods", "plain"]
    asked += ["--threads", "1", "--out", str(tmp_path / "run")]
    try:
        assert main([*asked, "--isolation", "strict"]) == 2
        assert "cannot be confined here" in capsys.readouterr().err
        assert main(asked) == 0
    finally:
        plugins.configure((), ())
    shown = capsys.readouterr()
    assert shown.err.count("no Landlock") == 1
    assert "isolation: none for plain" in " ".join(shown.out.split())
    (record,) = RunFolder(tmp_path / "run").records()
    assert record["isolation"] == "none"


def test_on_macos_there_is_no_landlock(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(sandbox, "_call", lambda *a: pytest.fail("a system call was made"))
    assert sandbox.abi() == 0


def test_a_kernel_without_landlock_or_with_it_turned_off_has_none(monkeypatch):
    for number in (errno.ENOSYS, errno.EOPNOTSUPP):

        def refused(*arguments: object, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(sandbox, "_call", refused)
        assert sandbox.abi() == 0


def test_on_macos_a_run_completes_without_proc_and_sandbox(own_suite, tmp_path, monkeypatch):
    """What Linux alone has is absent: /proc, Landlock, the clock of another process."""
    monkeypatch.setattr(sandbox, "abi", lambda: 0)
    place = tmp_path / "sitecustomize.py"
    place.write_text(
        "from tdabench.run import nursery\n"
        "nursery.below = lambda root: []\n"
        "nursery._stat = lambda pid: None\n"
        "nursery.status = lambda pid: {}\n"
        "nursery.process_seconds = lambda pid: None\n"
        "whole = nursery.Tree.__init__\n"
        "def without(self, root):\n"
        "    whole(self, root)\n"
        "    self.works = False\n"
        "nursery.Tree.__init__ = without\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    records = attack(own_suite, tmp_path / "run", ["plain", "hides-time"], "auto", jobs=1)
    assert {r["status"] for r in records.values()} == {"ok"}
    assert {r["isolation"] for r in records.values()} == {"none"}
    cost = records["plain"]["cost"]
    assert cost["total"]["seconds"] > 0
    assert cost["build"]["peak_bytes"] > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="seccomp is Linux's")
def test_a_processor_without_a_table_of_calls_gets_no_filter(monkeypatch):
    other = SimpleNamespace(machine="riscv64")
    monkeypatch.setattr(sandbox.os, "uname", lambda: other)
    libc = SimpleNamespace(prctl=lambda *a: pytest.fail("a filter was set"))
    assert sandbox.refuse_calls(libc) is False  # type: ignore[arg-type]


def test_strict_refuses_before_any_work(own_suite, tmp_path, monkeypatch):
    from tdabench.run import execute

    monkeypatch.setattr(execute.sandbox, "abi", lambda: 0)
    with pytest.raises(UsageError, match="no Landlock"):
        attack(own_suite, tmp_path / "run", ["plain"], "strict")
    assert not list((tmp_path / "run").glob("cells/*"))


def test_a_plugin_file_given_by_a_relative_path_runs(toy_suite, tdabench, tmp_path):
    (tmp_path / "mine.py").write_text(ATTACKERS.read_text())
    asked = ["run", "--suite", toy_suite, "--plugin", "./mine.py", "--methods", "plain"]
    done = tdabench(*asked, "--threads", "1", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert [r["status"] for r in RunFolder(tmp_path / "run").records()] == ["ok"]


# --------------------------------------------------------------------------- what may be read


def test_hidden_paths_are_carved_out_of_what_is_granted(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/code.py", "a/b/data.txt", "a/b/truth", "c.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b" / "truth")
    rules = dict(sandbox.granted(str(tmp_path), [str(tmp_path / "a" / "b" / "truth")]))
    readable = {k for k, v in rules.items() if v == "read"}
    assert readable == {str(tmp_path / x) for x in ("a/code.py", "a/b/data.txt", "c.py")}
    assert {k for k, v in rules.items() if v == "list"} == {
        str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b"),
    }  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX paths")
def test_no_truth_record_or_cache_is_among_the_libraries(tmp_path: Path):
    from tdabench.run.execute import hidden_from_methods

    out = tmp_path / "runs" / "mine"
    out.mkdir(parents=True)
    hidden = hidden_from_methods(out)
    granted = [path for path, access in sandbox.libraries(hidden) if access == "read"]
    truths = list((Path(plugins.__file__).parent / "suites").rglob("*.safetensors"))
    assert truths
    for secret in [*truths, out]:
        assert not any(Path(g) == secret or Path(g) in secret.parents for g in granted), secret
