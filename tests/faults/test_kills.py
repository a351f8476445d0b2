"""kill -9 and Ctrl-C at any moment of a truth build, of AirRep's training and of an index save.

The rerun ends in the same result, finished work is never redone and no half file is read.
tests/run/test_kill.py does the same to whole runs. A few kills each; a hundred with
TDABENCH_LONG=1, or as many as TDABENCH_KILLS says.
"""

from __future__ import annotations

import fnmatch
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tdabench.data.examples import Corpus
from tdabench.groups import Groups
from tdabench.io import read_arrays
from tdabench.run import RunFolder
from tdabench.targets.target import Target
from tdabench.truth import Truth
from tests.faults.conftest import command, environment
from tests.faults.test_offenders import OFFENDERS, TOYS

KILLS = int(os.environ.get("TDABENCH_KILLS", 100 if os.environ.get("TDABENCH_LONG") else 2))
PATIENCE = 7200 if KILLS > 10 else 240  # seconds: a long check may be stopped for a while


def kill_now_and_then(
    arguments: list[object],
    place: Path,
    pattern: str,
    check: Callable[[Path], None],
    seed: int,
) -> list[Path]:
    """Runs `arguments FOLDER`, kills it at a random moment, and again, until it was killed often
    enough; then lets it finish. Work that came to its end goes on in a new folder, so that every
    kill meets unfinished work; `check` runs after every kill. Returns the folders, all finished.

    Half of the moments are counted from the first new file of `pattern`, half from the start, up
    to a second behind the moment when that came last: a slow machine, too, is killed at work.
    """
    moments, kills, at_work, span = random.Random(seed), 0, 0, 3.0
    folders = [place / "0"]
    while kills < KILLS:
        out = folders[-1]
        before, start = stamps(out, pattern).items(), time.monotonic()
        process = subprocess.Popen(
            command(*arguments, out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        if kills % 2:
            time.sleep(moments.uniform(0.0, span + 1))
        else:
            while process.poll() is None and not stamps(out, pattern).items() - before:
                assert time.monotonic() - start < PATIENCE, "no progress"
                time.sleep(0.01)
            span = time.monotonic() - start
            time.sleep(moments.uniform(0.0, 0.3))
        ended = process.poll() is not None
        process.kill()
        _, err = process.communicate()
        assert b"Traceback" not in err, err.decode()
        check(out)
        if ended:
            assert process.returncode == 0, err.decode()
            folders.append(place / str(len(folders)))
            continue
        kills += 1
        at_work += bool(stamps(out, pattern).items() - before)
    done = subprocess.run(
        command(*arguments, folders[-1]), capture_output=True, env=environment(),
        timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    check(folders[-1])
    print(f"{kills} kills, {at_work} of them after progress, {len(folders)} times to the end")
    return folders


def stamps(folder: Path, pattern: str) -> dict[str, tuple[int, int]]:
    """Files by name, with what would change if one were written again."""
    found = {}
    for place, _, names in os.walk(folder):  # rglob trips over folders that vanish meanwhile
        for name in fnmatch.filter(names, pattern):
            try:
                status = os.stat(os.path.join(place, name))
            except FileNotFoundError:
                continue
            found[name] = (status.st_ino, status.st_mtime_ns)
    return found


class Whole:
    """Checks after every kill that files are whole, and that none was made twice."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.seen: dict[Path, dict[str, tuple[int, int]]] = {}

    def __call__(self, folder: Path) -> None:
        now, seen = stamps(folder, self.pattern), self.seen.get(folder, {})
        assert {k: now.get(k) for k in seen} == seen, "finished work was done again"
        for p in folder.rglob("*.safetensors"):
            if not p.name.startswith("."):
                read_arrays(p)
        self.seen[folder] = now


def write_corpus(path: Path, **splits: Corpus) -> None:
    with path.open("w") as f:
        for split, corpus in splits.items():
            for e in corpus:
                row = {"id": e.id, "prompt": e.prompt, "response": e.response, "task": e.task}
                f.write(json.dumps({**row, "split": split}) + "\n")


def with_plan(suite: Path, groups: int, seeds: int, epochs: int = 2) -> Path:
    """The suite with a truth to build."""
    text = suite.read_text().replace(
        "[benchmarks]",
        f"[targets.plans.lds]\ngroups = {groups}\nfraction = 0.5\nseeds = {seeds}\n"
        f"recipe = {{ lr = 3e-3, epochs = {epochs}, batch_size = 8 }}\n[benchmarks]",
        1,
    )
    suite.write_text(text)
    return suite


@pytest.mark.slow
def test_a_truth_build_goes_on_to_the_same_truth(make_suite, tmp_path: Path):
    suite = with_plan(make_suite(), 30 if KILLS > 10 else 6, 2)
    build: list[object] = ["truth", "build", suite, "--json", "--work"]
    subprocess.run(command(*build, tmp_path / "a"), env=environment(), check=True, timeout=300,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    folders = kill_now_and_then(
        build, tmp_path / "b", "g*.safetensors",
        Whole("g*.safetensors"), seed=0,
    )  # fmt: skip
    (made,) = {next(f.rglob("truth.safetensors")).read_bytes() for f in folders}
    assert made == next((tmp_path / "a").rglob("truth.safetensors")).read_bytes()


def airrep_training(
    target: Target, pool: Corpus, dev_queries: Corpus, folder: Path, steps: int, every: int
) -> list[object]:
    """Labels in `folder`, and `tdabench airrep train … --out`: the folder comes behind it."""
    from tdabench_airrep.labels import Instance, Labels

    write_corpus(folder / "c.jsonl", pool=pool, dev=dev_queries)
    rng = np.random.default_rng(0)
    dev = np.arange(len(dev_queries))
    groups = Groups.random(6, len(pool), 0.3, rng)
    losses = rng.normal(2, 0.1, (6, len(dev))).astype(np.float32)
    meta = {"train": pool.fingerprint, "dev": dev_queries.fingerprint}
    Labels((Instance(dev, groups, losses),) * 2, len(pool), len(dev), meta).save(
        folder / "labels.safetensors"
    )
    return [
        "airrep", "train", "--target", target.folder, "--corpus", folder / "c.jsonl",
        "--pool-split", "pool", "--dev-split", "dev", "--labels", folder / "labels.safetensors",
        "--init", "scratch:16x1", "--dim", "8", "--steps", steps, "--every", every,
        "--holdout", "1", "--patience", "1000", "--out",
    ]  # fmt: skip


@pytest.mark.slow
def test_airrep_training_goes_on_to_the_same_encoder(
    tiny_target: Target, tiny_corpus: Corpus, tiny_queries: Corpus, tmp_path: Path
):
    steps, every = (600, 20) if KILLS > 10 else (30, 3)
    train = airrep_training(tiny_target, tiny_corpus, tiny_queries, tmp_path, steps, every)
    subprocess.run(command(*train, tmp_path / "a"), env=environment(), check=True, timeout=300,
                   capture_output=True)  # fmt: skip
    folders = kill_now_and_then(
        train, tmp_path / "b", "checkpoint.safetensors",
        Whole("no-file-is-written-once"), seed=1,
    )  # fmt: skip
    (first,) = (tmp_path / "a").rglob("model.safetensors")
    for folder in folders:
        (other,) = folder.rglob("model.safetensors")
        assert other.read_bytes() == first.read_bytes()


@pytest.mark.slow
def test_an_index_is_whole_or_absent(toy_suite: Path, tmp_path: Path):
    run = [
        "run", "--suite", toy_suite, "--plugin", TOYS, "--plugin", OFFENDERS, "--threads", "1",
        "--methods", "slow-save", "--json", "--out",
    ]  # fmt: skip
    whole = subprocess.run(
        command(*run, tmp_path / "a"), env=environment(), check=True, capture_output=True
    )
    (cell,) = json.loads(whole.stdout)["cells"]
    folders = kill_now_and_then(
        run, tmp_path / "b", "part-*", Whole("????????????????.json"), seed=2
    )
    for folder in folders:
        (record,) = RunFolder(folder).records()
        assert cell["status"] == record["status"] == "ok"
        assert cell["metrics"] == record["metrics"]


def test_two_truth_builds_on_one_folder_end_in_the_same_truth(
    make_suite, tmp_path: Path, tiny_target: Target
):
    suite = with_plan(make_suite(), 4, 1)
    build = command("truth", "build", suite, "--json", "--work", tmp_path / "work")
    pair = [
        subprocess.Popen(build, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    answers = [p.communicate(timeout=300) for p in pair]
    for process, (out, err) in zip(pair, answers):
        assert process.returncode == 0, err.decode()
        assert json.loads(out)[0]["done"] == 4
    truth = Truth.load(next((tmp_path / "work").rglob("truth.safetensors")))
    assert np.isfinite(truth.losses).all()
    assert not list((tmp_path / "work").rglob(".*.tmp"))


def interrupt(
    arguments: list[object], progress: Callable[[], object], signals: int
) -> tuple[int, str]:
    """Ctrl-C, once or twice, at the first sign of progress: exit status and stderr."""
    before, start = progress(), time.monotonic()
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=environment(), start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and progress() == before:
        assert time.monotonic() - start < 240, "no progress"
        time.sleep(0.005)
    for n in range(signals):
        time.sleep(0.05 * n)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the group
    _, err = process.communicate(timeout=60)
    end = time.monotonic() + 30
    while members(process.pid):
        assert time.monotonic() < end, f"left behind: {members(process.pid)}"
        time.sleep(0.02)
    return process.returncode, err


def members(group: int) -> list[int]:
    """Processes of a group that are still there, other than zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def held_at_ctrl_c(code: int, err: str, signals: int) -> None:
    assert "Traceback" not in err
    if signals == 1:
        assert code == 130, err
        assert "tdabench: interrupted. The same command resumes from here" in err
    else:  # the second may come before the first is through, or find nobody
        assert code in (130, -signal.SIGINT), err


@pytest.mark.slow
def test_ctrl_c_stops_a_truth_build_that_goes_on_later(make_suite, tmp_path: Path):
    suite, work = with_plan(make_suite(), 6, 1, epochs=40), tmp_path / "work"
    build = ["truth", "build", suite, "--json", "--workers", 2, "--work", work]
    whole, done = Whole("g*.safetensors"), [0]
    for signals in (1, 2):
        code, err = interrupt(build, lambda: len(stamps(work, "g*.safetensors")), signals)
        held_at_ctrl_c(code, err, signals)
        whole(work)  # what the first build finished, the second has not touched
        done.append(len(whole.seen[work]))
    assert done == sorted(set(done))


@pytest.mark.slow
def test_ctrl_c_stops_airrep_training_that_goes_on_later(
    tiny_target: Target, tiny_corpus: Corpus, tiny_queries: Corpus, tmp_path: Path
):
    train = airrep_training(tiny_target, tiny_corpus, tiny_queries, tmp_path, 4000, 5)
    out = tmp_path / "out"
    for signals in (1, 2):
        code, err = interrupt([*train, out], lambda: stamps(out, "checkpoint.safetensors"), signals)
        held_at_ctrl_c(code, err, signals)
        assert ("resumed at step" in err) == (signals == 2)
        read_arrays(out / "checkpoint.safetensors")
