"""Run folders: nothing is deleted or written over but what we made, and links lead nowhere."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tdabench.cli import main
from tdabench.errors import TdabenchError
from tdabench.io import read_json, write_json
from tdabench.run import Options, Request, RunFolder, run
from tdabench.run import folder as folder_module
from tdabench.run.folder import FILES, FOLDERS
from tests.faults.conftest import one_line

QUICK = Options(threads=1)


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file below `folder` with its content, links with where they lead; folders with ""."""
    out: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            out[name] = f"-> {os.readlink(path)}"
        else:
            out[name] = path.read_bytes() if path.is_file() else ""
    return out


def still_there(before: dict[str, bytes | str], folder: Path) -> None:
    after = tree(folder)
    assert {k: after.get(k) for k in before} == before


@pytest.fixture
def untrue(make_suite: Callable[..., Path]) -> Path:
    """A suite whose target has no truth: its cells are skipped, without a process."""
    path = make_suite()
    path.write_text(path.read_text().replace('lds = "truth.safetensors"', ""))
    return path


def test_a_folder_with_someones_work_is_refused_and_untouched(toy_suite, tdabench, tmp_path: Path):
    here = tmp_path / "here"
    for name in ("work/thesis.tex", "indices/.ssh/id", "cells/.notes.tmp"):
        (here / name).parent.mkdir(parents=True)
        (here / name).write_text("mine")
    before = tree(here)
    done = tdabench("run", "--suite", toy_suite, "--methods", "random", "--out", ".", cwd=here)
    assert "holds 'cells', 'indices', 'work'" in one_line(done, 2)
    assert tree(here) == before


def test_what_is_put_into_a_run_later_stays(untrue, tmp_path: Path):
    out = tmp_path / "run"
    run(Request(str(untrue), ("tfidf",)), out, QUICK)
    for name in ("work/thesis.tex", "work/0123456789ab.txt", "indices/.ssh/id", "cells/.notes.tmp",
                 ".x.tmp", "superseded/.y.tmp", "logs/mine.log", "cells/notes.md"):  # fmt: skip
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    stale = out / "work" / "0123456789ab"
    stale.mkdir()
    half = out / "cells" / ".0123456789abcdef.json.a1b2c3d4.tmp"
    half.write_text("{")
    unfinished = out / "indices" / ".0123456789abcdef-abcd1234"
    unfinished.mkdir()
    mine = {k: v for k, v in tree(out).items() if v == b"mine"}
    assert len(mine) == 8
    run(Request(str(untrue), ("bm25",)), out, QUICK)
    still_there(mine, out)
    assert not stale.exists()
    assert not half.exists()
    assert not unfinished.exists()


def test_indices_on_another_disk_are_used_and_nothing_else_there_is_touched(
    toy_suite, toys, tmp_path: Path
):
    out, disk = tmp_path / "run", tmp_path / "disk"
    out.mkdir()
    disk.mkdir()
    (out / "indices").symlink_to(disk)
    request = Request(str(toy_suite), ("toy",))
    (record,) = run(request, out, QUICK).records
    assert record["status"] == "ok", record["reason"]
    assert (out / "indices").is_symlink()
    assert len([p for p in disk.iterdir() if p.name != folder_module.OWNER]) == 1
    (disk / ".config").mkdir()
    (disk / ".config" / "x").write_text("mine")
    (out / "cells" / f"{record['key']}.json").unlink()
    (again,) = run(request, out, QUICK).records
    assert again["cost"]["build"] == record["cost"]["build"]  # the kept index served
    assert (disk / ".config" / "x").read_text() == "mine"


def test_a_link_to_a_folder_of_others_is_refused(untrue, tmp_path: Path):
    home, out = tmp_path / "home", tmp_path / "run"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "id").write_text("mine")
    run(Request(str(untrue), ("tfidf",)), out, QUICK)
    for name in FOLDERS:
        if (out / name).is_dir():
            os.rename(out / name, tmp_path / f"real-{name}")
        (out / name).symlink_to(home)
        with pytest.raises(TdabenchError, match="is a link"):
            run(Request(str(untrue), ("bm25",)), out, QUICK)
        (out / name).unlink()
        if (tmp_path / f"real-{name}").exists():
            os.rename(tmp_path / f"real-{name}", out / name)
    assert tree(home) == {".ssh": "", ".ssh/id": b"mine"}


@pytest.mark.parametrize("name", [".lock", "log.jsonl", "places.jsonl", "manifest.json"])
@pytest.mark.parametrize("how", ["link", "hard link", "fifo"])
def test_a_strangers_link_is_neither_cut_nor_appended_to(name, how, untrue, tmp_path: Path):
    victim, out = tmp_path / "bashrc", tmp_path / "run"
    run(Request(str(untrue), ("tfidf",)), out, QUICK)
    (out / name).unlink(missing_ok=True)
    victim.write_text("export A=1\n")
    if how == "link":
        (out / name).symlink_to(victim)
    elif how == "hard link":
        os.link(victim, out / name)
    else:
        os.mkfifo(out / name)
    ended = threading.Timer(120, os._exit, (3,))  # a FIFO must not make it wait for ever
    ended.start()
    try:
        run(Request(str(untrue), ("bm25",)), out, QUICK)
    except TdabenchError:
        pass
    finally:
        ended.cancel()
    assert victim.read_text() == "export A=1\n"


def test_a_workers_log_replaces_a_link_and_does_not_follow_it(tmp_path: Path):
    victim, out = tmp_path / "bashrc", RunFolder(tmp_path / "run")
    victim.write_text("export A=1\n")
    out.logs.mkdir(parents=True)
    (out.logs / "toy-tiny-0.log").symlink_to(victim)
    path = out.new_log("toy-tiny-0")
    assert path.read_bytes() == b""
    assert not path.is_symlink()
    assert victim.read_text() == "export A=1\n"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_without_locks_a_run_says_so_and_goes_on(code, tmp_path: Path, monkeypatch):
    def flock(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folder_module.fcntl, "flock", flock)
    said: list[str] = []
    with RunFolder(tmp_path / "run").locked(said.append):
        pass
    assert len(said) == 1
    assert "has no locks" in said[0]


def test_of_two_requests_in_one_folder_both_replay(untrue, tmp_path: Path):
    out = tmp_path / "run"
    asked = [("tfidf", "bm25"), ("bm25",)]
    for methods in asked:
        run(Request(str(untrue), methods), out, QUICK)
    run(Request(str(untrue), asked[0]), out, QUICK)  # the same request again is the same manifest
    last = read_json(out / "manifest.json")
    assert tuple(last["request"]["methods"]) == asked[0]
    kept = [read_json(p) for p in (out / "manifests").glob("*.json")]
    assert sorted(tuple(m["request"]["methods"]) for m in kept) == sorted(asked)
    for manifest in kept:
        request = Request.from_dict(manifest["request"])
        replayed = run(request, tmp_path / f"again-{len(request.methods or ())}", QUICK)
        assert [r["method"]["label"] for r in replayed.records] == list(request.methods or ())


def test_writing_a_record_reads_none_of_another_place(tmp_path: Path, monkeypatch):
    folder = RunFolder(tmp_path / "run")

    def record(n: int, method: str) -> dict[str, Any]:
        named = {"name": method, "label": method}
        return {"key": f"{n:016x}", "status": "failed", "seed": 0, "method": named,
                "target": {"name": "t"}, "benchmark": {"name": "b"}}  # fmt: skip

    for n in range(30):
        write_json(folder.record_path(f"{n:016x}"), record(n, f"m{n}"))
    folder.write(record(100, "m7"))  # older records are found once
    assert folder.read(f"{7:016x}") is None
    assert (folder.path / "superseded" / f"{7:016x}.json").exists()
    read: list[Path] = []
    monkeypatch.setattr(folder_module, "read_json", lambda p: read.append(p) or read_json(p))
    other = RunFolder(folder.path)  # another process
    other.write(record(101, "m8"))
    assert [p.stem for p in read] == [f"{8:016x}"]
    assert len(list(other.cells.glob("*.json"))) == 30


# --------------------------------------------------------------------------- any foreign files

OURS = [*FOLDERS, *FILES, ".lock", ".cache", "report.html", "suite", "builds", "plan.safetensors",
        "truth.safetensors", "units", "failed", "claims", "job.json", "cost.json", "airrep.json",
        "labels.safetensors", "instance-000", "config.json", "model.safetensors",
        "manifest.json", "checkpoint.safetensors"]  # fmt: skip
NAMES = st.one_of(
    st.sampled_from(OURS),
    st.sampled_from([".0123456789abcdef-abcd1234", "0123456789ab", "g000-s0.safetensors"]),
    st.text("abc.-_", min_size=1, max_size=6).filter(lambda n: n.strip(".")),
)
CONTENT = st.one_of(
    st.sampled_from([b"", b"{}", b"[]", b"\x00", b'{"draw": {}}', b"process x"]), st.binary()
)
TREES = st.dictionaries(
    st.lists(NAMES, min_size=1, max_size=3).map("/".join), CONTENT, min_size=1, max_size=6
)


def plant(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError:
            continue  # a file is where a folder would have to be


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(files=TREES)
@example(files={".lock": b""})
def test_foreign_files_stay_byte_for_byte(files, untrue, tmp_path_factory, capsys, monkeypatch):
    """Of `run`, `truth`, `airrep` and `report` in a folder of arbitrary files, with `--out .`."""
    here = tmp_path_factory.mktemp("here")
    plant(here, files)
    before = tree(here)
    monkeypatch.chdir(here)
    corpus = str(untrue.parent / "corpus.jsonl")
    target = str(Path(untrue.read_text().split('folder = "')[1].split('"')[0]))
    label = ["airrep", "labels", "--target", target, "--corpus", corpus, "--pool-split", "pool"]
    for arguments in (
        ["report", "."],
        ["run", "--suite", str(untrue), "--methods", "tfidf", "--out", ".", "--quiet"],
        ["report", "."],
        ["truth", "plan", str(untrue), "--out", next(iter(files))],
        ["truth", "export", str(untrue.parent / "truth.safetensors"), "--out", next(iter(files))],
        [*label, "--dev-split", "test", "--out", ".", "--collect-only", "--pool-size", "20"]
        + ["--subset-size", "10", "--dev", "5", "--instances", "1", "--subsets", "2"],
    ):
        code = main(arguments)
        assert code in (0, 1, 2), arguments
        assert "Traceback" not in capsys.readouterr().err
    still_there(before, here)
