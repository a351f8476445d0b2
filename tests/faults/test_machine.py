"""What the machine does to a run: a full disk, a vanished index, two runs at once, Ctrl-C."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tdabench.io import read_arrays, read_json, sha256_file, write_arrays, write_json
from tdabench.run import Options, Request, RunFolder, run
from tests.faults.conftest import command, environment, one_line
from tests.faults.test_offenders import TOYS


def statuses(out: Path) -> dict[str, str]:
    return {r["method"]["label"]: r["status"] for r in RunFolder(out).records()}


# --------------------------------------------------------------------------- the disk


def limited(size: int) -> object:
    """A limit on the size of any file: the write beyond it fails as on a full disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize("size", [0, 600, 6000])
def test_what_cannot_be_written_is_said_and_nothing_is_half_there(
    size: int, toy_suite, tdabench, tmp_path: Path
):
    """At 0 nothing can be written, at 600 the manifest cannot, at 6000 the records' arrays may."""
    out = tmp_path / "run"
    asked = ["run", "--suite", toy_suite, "--plugin", TOYS, "--methods", "toy", "--threads", "1"]
    done = tdabench(*asked, "--out", out, preexec_fn=limited(size))
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr
    if done.returncode:
        assert "cannot write" in done.stderr or "failed" in done.stderr
    for record in RunFolder(out).records():
        assert record["status"] != "ok" or done.returncode == 0
    done = tdabench(*asked, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert statuses(out) == {"toy": "ok"}
    assert not list(out.rglob(".*.tmp"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_that_fills_its_disk_does_not_stop_the_run(toy_suite, tdabench, tmp_path: Path):
    asked = ["run", "--suite", toy_suite, "--plugin", TOYS, "--methods", "toy", "--threads", "1"]
    done = tdabench(*asked, "--out", tmp_path / "run", "--log-file", "/dev/full")
    assert done.returncode == 0, done.stderr
    assert "warning: cannot write the log /dev/full: No space left on device" in done.stderr


def test_a_full_disk_is_one_line_and_the_rerun_completes(toy_suite, tdabench, tmp_path: Path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    asked = ["run", "--suite", toy_suite, "--plugin", TOYS, "--methods", "toy", "--threads", "1"]
    try:
        (small / "ballast").write_bytes(b"x" * 40_000)
        done = tdabench(*asked, "--out", small / "run")
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "No space left on device" in done.stderr
        (small / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
        done = tdabench(*asked, "--out", small / "run")
        assert done.returncode == 0, done.stderr
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        done = tdabench(*asked, "--out", small / "other")
        assert "Read-only file system" in one_line(done, 2)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


# --------------------------------------------------------------------------- kept indices


@pytest.mark.parametrize(
    "damage",
    ["vanished", "emptied", "cut", "altered", "negated", "forged", "linked", "unreadable record"],
)
def test_a_kept_index_that_is_not_whole_is_built_again(
    damage: str, toy_suite, toys, tmp_path: Path
):
    request, out = Request(str(toy_suite), ("toy",)), tmp_path / "run"
    options = Options(threads=1)
    first = run(request, out, options).records[0]
    (folder,) = (out / "indices").iterdir()
    file = folder / "index" / "index.safetensors"
    if damage == "vanished":
        shutil.rmtree(folder)
    elif damage == "emptied":
        shutil.rmtree(folder / "index")
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "altered":  # the same size: noticed by the hash when it is loaded
        file.write_bytes(file.read_bytes()[:-1] + b"\x07")
    elif damage in ("negated", "forged"):  # whole in itself: nothing but the seal tells
        arrays, meta = read_arrays(file)
        write_arrays(file, {k: -v for k, v in arrays.items()}, meta)
        if damage == "forged":
            built = read_json(folder / "built.json")
            built["files"][file.name] = [file.stat().st_size, sha256_file(file)]
            write_json(folder / "built.json", built)
    elif damage == "linked":
        shutil.move(folder, tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        (folder / "built.json").write_text("{")
    (out / "cells" / f"{first['key']}.json").unlink()
    again = run(request, out, options).records[0]
    assert again["status"] == "ok", again["reason"]
    assert again["metrics"] == first["metrics"]
    if damage == "linked":
        assert (tmp_path / "elsewhere" / "index" / file.name).exists()


# --------------------------------------------------------------------------- other processes


def start(toy_suite: Path, out: Path, methods: str) -> subprocess.Popen[str]:
    asked = ["run", "--suite", toy_suite, "--plugin", TOYS, "--methods", methods, "--out", out]
    return subprocess.Popen(
        command(*asked, "--threads", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def building(out: Path, worker: str) -> bool:
    """Whether a worker has begun to build, by the folder's log."""
    try:
        text = (out / "log.jsonl").read_text()
    except FileNotFoundError:
        return False
    events = [json.loads(x) for x in text.splitlines()]
    ids = {e["worker"] for e in events if e["event"] == "start" and e["job"].startswith(worker)}
    return any(e["event"] == "phase" and e["worker"] in ids for e in events)


def wait_for(out: Path, worker: str) -> None:
    end = time.monotonic() + 120
    while not building(out, worker):
        assert time.monotonic() < end, "it did not begin in time"
        time.sleep(0.02)


def test_two_runs_on_one_folder_the_second_refuses(toy_suite, tdabench, tmp_path: Path):
    out = tmp_path / "run"
    first = start(toy_suite, out, "hangs")
    try:
        wait_for(out, "hangs")
        asked = ["run", "--suite", toy_suite, "--plugin", TOYS, "--methods", "toy", "--out", out]
        line = one_line(tdabench(*asked), 1)
        assert f"another run is writing to {out.name} (process {first.pid} since" in line
        assert "choose another folder with --out" in line
    finally:
        first.kill()
        first.communicate()
    done = tdabench(*asked)  # the lock fell with its process
    assert done.returncode == 0, done.stderr


def test_ctrl_c_twice_leaves_at_once(toy_suite, tdabench, tmp_path: Path):
    out = tmp_path / "run"
    process = start(toy_suite, out, "toy,hangs")
    wait_for(out, "hangs")
    job = json.loads(next((out / "work").glob("*/job.json")).read_text())
    process.send_signal(signal.SIGSTOP)  # both signals are there before it can act on the first
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert statuses(out).get("toy") == "ok"
    events = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    workers = [e["process"] for e in events if e["event"] == "start"]
    end = time.monotonic() + 30
    while any(alive(pid, job["work"]) for pid in workers):
        assert time.monotonic() < end, "a worker stayed behind"
        time.sleep(0.05)


def alive(pid: int, work: str) -> bool:
    try:
        return work in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
def test_a_manifest_names_its_plugins_and_loads_none(toy_suite, tdabench, tmp_path: Path):
    """A manifest replays a run, but never runs code that only the manifest asks for."""
    (tmp_path / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    )
    out = tmp_path / "run"
    asked = ["--plugin", TOYS, "--methods", "toy", "--threads", "1", "--out", out]
    assert tdabench("run", "--suite", toy_suite, *asked).returncode == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["plugins"]["modules"] == [str(TOYS)]
    manifest["plugins"]["modules"] = [str(tmp_path / "evil.py")]
    (tmp_path / "evil.json").write_text(json.dumps(manifest))
    line = one_line(tdabench("run", "--from", tmp_path / "evil.json"), 2)
    assert "It was made with plugins that are not installed" in line
    assert "--plugin /" not in line  # a stranger's text is never part of a command to paste
    assert not (tmp_path / "ran").exists()
