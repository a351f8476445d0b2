"""Whatever happens to a build: finished units stay, none is done twice, the file is the same."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import stat
import time

import killable
import numpy as np
import pytest

import tdabench.io
from tdabench.errors import DataError, GuardError, TdabenchError
from tdabench.io import read_arrays, read_json, write_arrays
from tdabench.targets import Recipe
from tdabench.truth import Pool, TruthPlan, Unit, build, collect, finished, survey
from tdabench.truth.build import checkpoint_path, failure_path, unit_path
from tdabench.truth.engines import UnitTrainer, _context

KILLS = 100 if os.environ.get("TDABENCH_LONG") else 5
forked = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="starts many processes"
)


def start(plan, parts, folder, log, pause):
    """A build in a process of its own (killable.py)."""
    context = _context()
    process = context.Process(target=killable.run, args=(plan, parts, folder, log, pause))
    process.start()
    return process


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


def rows(folder):
    return {p.name: p.read_bytes() for p in (folder / "units").glob("*.safetensors")}


@forked
def test_killed_at_random_moments(plan, parts, serial, file_of, tmp_path):
    """kill -9 again and again: five times, or a hundred with TDABENCH_LONG=1."""
    moments = random.Random(0)
    folder, log, kills, builds = tmp_path / "b0", tmp_path / "log", 0, 0
    took = 0.2
    while kills < KILLS:
        before, begun = rows(folder), time.monotonic()
        process = start(plan, parts, folder, log, 0.0)
        process.join(moments.uniform(0, 1.5 * took))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            took *= 1.0 if rows(folder) != before else 1.5  # too early to tell anything
        else:
            assert process.exitcode == 0
            took = time.monotonic() - begun
        for name, data in before.items():
            assert rows(folder)[name] == data, f"{name} was lost or redone"
        if len(finished(plan, folder)) == len(plan.units()):
            assert file_of(folder) == serial
            builds += 1
            folder = tmp_path / f"b{builds}"
    build(plan, *parts, folder)
    assert file_of(folder) == serial
    assert not list(folder.rglob("*.tmp"))
    assert len(rows(folder)) == len(plan.units())


@forked
def test_two_builders_share_a_folder_and_do_nothing_twice(plan, parts, serial, file_of, tmp_path):
    log = tmp_path / "log"
    builders = [start(plan, parts, tmp_path / "b", log, 0.2) for _ in range(2)]
    for process in builders:
        process.join(120)
        assert process.exitcode == 0
        assert len(finished(plan, tmp_path / "b")) == 6  # whoever ends waits for the other
    assert sorted(log.read_text().split()) == sorted(u.name for u in plan.units())
    assert file_of(tmp_path / "b") == serial


@forked
def test_the_unit_of_a_builder_that_dies_is_taken_over(plan, parts, serial, file_of, tmp_path):
    log = tmp_path / "log"
    hung = start(plan, parts, tmp_path / "b", log, 1e6)
    wait_for(log.exists)
    other = start(plan, parts, tmp_path / "b", log, 0.0)
    wait_for(lambda: len(finished(plan, tmp_path / "b")) == 5)
    time.sleep(0.2)
    assert other.is_alive()  # it waits for the sixth
    hung.kill()
    other.join(120)
    assert other.exitcode == 0
    assert file_of(tmp_path / "b") == serial


def test_a_full_disk_stops_the_build_and_loses_nothing(
    plan, parts, serial, file_of, tmp_path, monkeypatch
):
    real = os.fsync

    def full(fd):
        if stat.S_ISREG(os.fstat(fd).st_mode) and len(rows(tmp_path / "b")) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    monkeypatch.setattr(tdabench.io.os, "fsync", full)
    with pytest.raises(TdabenchError, match=r"g00002-s00.*No space left.*Free some space"):
        build(plan, *parts, tmp_path / "b")
    assert len(finished(plan, tmp_path / "b")) == 2
    assert not list((tmp_path / "b").rglob("*.tmp"))
    monkeypatch.setattr(tdabench.io.os, "fsync", real)
    kept = rows(tmp_path / "b")
    build(plan, *parts, tmp_path / "b")
    assert file_of(tmp_path / "b") == serial
    assert kept.items() <= rows(tmp_path / "b").items()


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_row_is_named_and_done_again(
    plan, parts, serial, file_of, tmp_path, damage
):  # fmt: skip
    folder = tmp_path / "b"
    build(plan, *parts, folder)
    row = unit_path(folder, Unit(1, 0))
    data = bytearray(row.read_bytes())
    data[-1] ^= 1
    row.write_bytes({"flipped": data, "cut": data[:-7], "empty": b""}[damage])
    assert survey(plan, folder).damaged == (Unit(1, 0),)
    with pytest.raises(DataError, match=r"g00001-s00.*Run the build again"):
        collect(plan, folder)
    notes, done = [], []
    build(plan, *parts, folder, on_unit=lambda u, _: done.append(u), note=notes.append)
    assert done == [Unit(1, 0)]
    assert "g00001-s00 is trained again" in notes[0]
    assert file_of(folder) == serial


def test_a_row_of_another_plan_is_refused_before_anything_is_trained(plan, parts, tmp_path):
    build(plan, *parts, tmp_path / "b", shard=(0, 6))
    row = unit_path(tmp_path / "b", Unit(0, 0))
    write_arrays(row, read_arrays(row)[0], {"unit": "g00000-s00", "plan": "0" * 16})
    with pytest.raises(DataError, match=r"another plan.*Delete it"):
        build(plan, *parts, tmp_path / "b")
    assert len(finished(plan, tmp_path / "b")) == 1


def test_a_plan_for_other_data_says_which_and_what_to_do(plan, parts, tmp_path):
    target, train, queries = parts
    with pytest.raises(GuardError, match=r"another training corpus.*tdabench truth plan"):
        build(plan, target, train[:59], queries, tmp_path)
    with pytest.raises(GuardError, match="another query set"):
        build(plan, target, train, queries[:3], tmp_path)


def test_folders_are_merged_by_copying(plan, parts, serial, file_of, tmp_path):
    for i in range(3):
        build(plan, *parts, tmp_path / f"part{i}", shard=(i, 3))
    merged = tmp_path / "merged"
    for i in range(3):
        shutil.copytree(tmp_path / f"part{i}", merged, dirs_exist_ok=True)
    assert build(plan, *parts, merged, on_unit=lambda u, _: pytest.fail(u.name)) == []
    assert file_of(merged) == serial


def test_a_failure_is_recorded_with_its_reason_and_tried_again_by_the_next_build(
    plan, parts, serial, file_of, tmp_path, monkeypatch
):
    real, folder, notes = UnitTrainer.losses, tmp_path / "b", []

    def fails(self, unit, *rest):
        if unit == Unit(2, 1):
            raise RuntimeError("no luck")
        return real(self, unit, *rest)

    monkeypatch.setattr(UnitTrainer, "losses", fails)
    assert build(plan, *parts, folder, retries=2, note=notes.append) == [Unit(2, 1)]
    assert len([n for n in notes if "g00002-s01 failed and is retried" in n]) == 2
    record = read_json(failure_path(folder, Unit(2, 1)))
    assert (record["attempts"], record["plan"]) == (3, plan.key)
    assert survey(plan, folder).failed == {Unit(2, 1): "RuntimeError: no luck"}
    with pytest.raises(DataError, match=r"1 of 6 .* missing, first g00002-s01; 1 failed"):
        collect(plan, folder)
    monkeypatch.setattr(UnitTrainer, "losses", real)
    assert build(plan, *parts, folder) == []
    assert survey(plan, folder).failed == {}
    assert file_of(folder) == serial


def test_losses_that_are_not_finite_are_a_failure(plan, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(UnitTrainer, "losses", lambda self, unit, *rest: np.array([1.0, np.nan]))
    assert len(build(plan, *parts, tmp_path / "b", shard=(0, 6), retries=0)) == 1
    assert survey(plan, tmp_path / "b").failed == {Unit(0, 0): "1 of its losses are not finite"}


@pytest.mark.slow
def test_workers_give_the_same_file_also_when_one_is_killed(
    plan, parts, serial, file_of, tmp_path
):  # fmt: skip
    folder, notes, killed = tmp_path / "b", [], []

    def kill_one(unit, reason):
        assert reason == ""
        if not killed:
            killed.append(multiprocessing.active_children()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    engine = Pool(2)
    assert build(plan, *parts, folder, engine=engine, on_unit=kill_one, note=notes.append) == []
    assert file_of(folder) == serial
    assert not multiprocessing.active_children()
    if any("retried" in n for n in notes):  # it had a unit when it died
        assert any("was killed (out of memory?)" in n for n in notes)


def test_checkpoints_that_the_recipe_keeps(parts, tmp_path):
    from tdabench.targets import finetune
    from tdabench.targets.target import load_weights

    target, train, queries = parts
    recipe = Recipe(lr=3e-3, epochs=1, batch_size=8, keep=(0, 2))
    plan = TruthPlan.draw(
        "kept", *parts, n_groups=1, fraction=0.25, n_seeds=1, recipe=recipe
    )  # fmt: skip
    build(plan, *parts, tmp_path)
    unit = Unit(0, 0)
    start, end = (checkpoint_path(tmp_path, unit, k) for k in (0, 2))
    assert start.exists()
    model = target.fresh_model()
    load_weights(model, end)
    tokens = target.tokenize(train.subset(plan.groups[0]))
    again = finetune(target.fresh_model(), tokens, recipe, plan.run_seed(unit), target.pad_id)
    asked = target.tokenize(queries)
    np.testing.assert_array_equal(target.losses(model, asked), target.losses(again, asked))
    assert json.loads(json.dumps(plan.describe()))["recipe"]["keep"] == [0, 2]
