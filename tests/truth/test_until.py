"""A truth that is stopped once it is precise enough: where, that it is whole, and coverage."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner

from tdabench import stats
from tdabench.benchmarks.lds import rank_outcome
from tdabench.cli.truth import command
from tdabench.errors import DataError, GuardError, UsageError
from tdabench.io import read_arrays, write_arrays
from tdabench.truth import (
    Reference,
    Truth,
    TruthPlan,
    build,
    build_until,
    check_stop,
    collect,
    finished,
    parse_until,
    until,
)
from tests.truth.test_cli import run, suite  # noqa: F401


@pytest.fixture
def few(monkeypatch):
    """Looks after 3, 4 and 6 groups, so that a small plan can be stopped."""
    monkeypatch.setattr(until, "FEWEST", 3)


@pytest.fixture(scope="module")
def long_plan(parts):
    from tests.truth.conftest import RECIPE

    return TruthPlan.draw("tiny", *parts, n_groups=6, fraction=0.25, n_seeds=2, recipe=RECIPE)


@pytest.fixture(scope="module")
def whole(long_plan, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert build(long_plan, *parts, folder) == []
    return folder, collect(long_plan, folder)


def judge(truth: Truth) -> Reference:
    """A reference whose scores are the truth with noise."""
    rng = np.random.default_rng(0)
    values = truth.values
    noise = rng.normal(size=values.shape) * values.std(axis=1, keepdims=True)
    return Reference({"name": "noisy", "version": 1, "params": {}}, values + noise)


def width_at(reference: Reference, truth: Truth, n: int) -> float:
    return reference.look(truth.values[:, :n]).width


def test_looks_are_at_fixed_numbers_of_groups():
    assert until.looks(100) == [20, 28, 40, 57, 80, 100]
    assert until.looks(20) == [20]
    assert until.looks(3) == [3]


@pytest.mark.parametrize("text", ["0.02", "width", "width=", "width=0", "width=1", "groups=3"])
def test_a_width_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="does not have the form width=W"):
        parse_until(text)
    assert parse_until("width=0.02") == 0.02


def test_the_width_is_students_interval_of_the_mean_over_groups(whole):
    _, truth = whole
    found = judge(truth)
    boot = stats.bootstrap_lds(found.scores, truth.values)
    assert found.look(truth.values).width == pytest.approx(2.5706 * boot.groups.std(), rel=1e-4)
    assert boot.half_width_over_groups(1) == np.inf
    perfect = stats.bootstrap_lds(truth.values, truth.values)
    assert perfect.half_width_over_groups(6) == np.inf  # not 0: no width can be told


def test_a_stopped_truth_is_the_first_groups_of_the_whole(
    few, long_plan, parts, whole, tmp_path, monkeypatch
):
    folder, all_groups = whole
    found = judge(all_groups)
    width = width_at(found, all_groups, 4)
    assert width < width_at(found, all_groups, 3)
    expected = 4
    # It is interrupted, and resumes.
    with pytest.raises(KeyboardInterrupt):
        build_until(long_plan, *parts, tmp_path, width, found, on_unit=interrupt)
    seen = []
    failed, stopped = build_until(long_plan, *parts, tmp_path, width, found, on_look=seen.append)
    assert failed == []
    assert [x.groups for x in seen] == [3, 4]
    truth = collect(long_plan, tmp_path, stopped)
    assert len(truth.groups) == expected == stopped["groups"]
    np.testing.assert_array_equal(truth.losses, all_groups.losses[:expected])
    assert truth.is_of(long_plan)
    assert not truth.is_of(dataclasses.replace(long_plan, groups=long_plan.groups[:5]))
    check_stop(truth, found)
    # In the folder of a whole build, it ends at the same group.
    assert build_until(long_plan, *parts, folder, width, found)[1] == stopped
    truth.save(tmp_path / "t.safetensors")
    assert Truth.load(tmp_path / "t.safetensors").plan["stopped"] == stopped
    notes = rank_outcome("lds", found.scores[:, :expected], truth, 50).notes
    assert any("stopped at 4 of 6 groups" in n for n in notes)

    # A smaller width goes on from there, and none reaches the plan's end.
    done = finished(long_plan, tmp_path)
    fresh = []
    failed, stopped = build_until(
        long_plan, *parts, tmp_path, 1e-9, found, on_unit=lambda u, reason: fresh.append(u),
        on_look=seen.append,
    )  # fmt: skip
    assert (failed, stopped) == ([], None)
    assert [x.groups for x in seen] == [3, 4, 3, 4, 6]
    assert not set(fresh) & set(done)
    np.testing.assert_array_equal(collect(long_plan, tmp_path).losses, all_groups.losses)


def interrupt(unit, reason):
    raise KeyboardInterrupt


def test_a_truth_that_was_stopped_elsewhere_is_refused(few, long_plan, whole):
    _, truth = whole
    found = judge(truth)
    width = width_at(found, truth, 3)  # the rule stops at the first look

    def claimed(n, width=width):
        said = {"width": width, "reference": {"name": "noisy"}, "planned": 6, "groups": n,
                "looks": [[n, 0.1, width]]}  # fmt: skip
        return Truth(truth.losses[:n], truth.groups[:n], truth.query_ids,
                     {**truth.plan, "stopped": said})  # fmt: skip

    for n, narrow in ((4, 1.1 * width), (3, 0.5 * width), (5, 1.1 * width)):
        with pytest.raises(GuardError, match=rf"stopped at {n} of 6 groups"):
            check_stop(claimed(n, narrow), found)
    check_stop(claimed(3, 1.001 * width), found)


def test_a_reference_that_ranks_nothing_is_refused():
    scores = np.zeros((5, 4))
    with pytest.raises(UsageError, match="b scores all groups alike for 5 of 5 queries"):
        Reference({"name": "b"}, scores)
    # Queries without a ranking do not make the interval look narrow.
    rng = np.random.default_rng(1)
    scores, values = rng.normal(size=(2, 40, 30))
    alone = Reference({"name": "b"}, scores).look(values)
    padded = Reference({"name": "b"}, np.concatenate([scores, np.ones((30, 30))]))
    assert padded.look(np.concatenate([values, values[:30]])).width == alone.width


def test_a_file_that_does_not_say_properly_where_it_stopped_is_refused(whole, tmp_path):
    _, truth = whole
    path = tmp_path / "t.safetensors"
    truth.save(path)
    arrays, meta = read_arrays(path)
    good = {"width": 0.1, "reference": {"name": "x"}, "planned": 9, "groups": 6,
            "looks": [[6, 0.2, 0.05]]}  # fmt: skip
    write_arrays(path, arrays, {**meta, "stopped": good})
    assert Truth.load(path).plan["stopped"] == good
    for bad in ({}, [], "x", {**good, "looks": []}, {**good, "groups": 5}, {**good, "planned": 6},
                {**good, "reference": "x"}, {**good, "looks": [[6, None, 1]]}):  # fmt: skip
        write_arrays(path, arrays, {**meta, "stopped": bad})
        with pytest.raises(DataError, match="where its build was stopped"):
            Truth.load(path)


def test_the_command_builds_stops_and_verifies(few, suite, tmp_path):  # noqa: F811
    suite.write_text(suite.read_text().replace("groups = 3", "groups = 6"))
    work = ["--work", tmp_path / "work"]
    asked = ["build", suite, "--until", "width=0.99", *work]
    (row,) = json.loads(run(*asked, "--json", "--reference", "tfidf"))
    n = row["stopped"]["groups"]
    assert n < 6
    assert (row["done"], row["of"]) == (2 * n, 12)
    assert row["stopped"]["reference"]["name"] == "tfidf"
    assert f"stopped at {n} of 6 groups, where the LDS of tfidf is" in run(*asked)
    (shown,) = json.loads(run("status", suite, "--json", *work))
    assert shown["state"].startswith(f"stopped at {n} of 6 groups")
    assert "agrees" in run("verify", suite, "--units", 1)
    on = [
        "build",
        str(suite),
        "--until",
        "width=0.0001",
        "--work",
        str(tmp_path / "work"),
        "--json",
    ]
    result = CliRunner().invoke(command, on)
    (row,) = json.loads(result.stdout)
    assert (row["done"], "stopped" in row) == (12, False)
    assert "±0.0001 over groups is not reached with all groups of the plan" in result.stderr

    path = suite.parent / "lds.safetensors"
    arrays, meta = read_arrays(path)
    write_arrays(path, arrays, {**meta, "stopped": {**meta["stopped"], "width": 1e-4}})
    with pytest.raises(GuardError, match="says that it was stopped at"):
        run("verify", suite, "--units", 1)
    made = {**meta["stopped"]["reference"], "version": 0}
    write_arrays(path, arrays, {**meta, "stopped": {**meta["stopped"], "reference": made}})
    run("verify", suite, "--units", 1)

    with pytest.raises(UsageError, match="--until does not work with --shard"):
        run(*asked, "--shard", "1/2")
    with pytest.raises(UsageError, match="--reference belongs to --until"):
        run("build", suite, "--reference", "tfidf", *work)
    with pytest.raises(UsageError, match="width=W"):
        run("build", suite, "--until", "0.02", *work)


def test_intervals_cover_at_the_group_where_the_rule_stops():
    """Seeded, small version of `benchmarks/statistics_simulation.py until`."""
    rng = np.random.default_rng(3)
    n_queries, n_train, planned = 30, 100, 80
    effects = rng.normal(size=(n_queries, n_train)) + rng.normal(size=n_train)
    skilled = 0.5 * effects + 1.2 * rng.normal(size=effects.shape)
    ends, values = [], []
    for _ in range(160):
        member = np.stack([rng.permutation(n_train) < n_train // 4 for _ in range(planned)])
        truth = effects @ member.T
        truth = truth + truth.std() * rng.normal(size=truth.shape)
        reference = Reference({"name": "x"}, skilled @ member.T)
        for n in until.looks(planned):
            seen = reference.look(truth[:, :n])
            if seen.width <= 0.10:
                break
        ends.append(seen)
        values.append([stats.lds(reference.scores[:, :n], truth[:, :n])
                       for n in until.looks(planned)])  # fmt: skip
    expected = dict(zip(until.looks(planned), np.mean(values, axis=0)))
    groups = {x.groups for x in ends}
    assert len(groups) > 1  # the rule did something
    covered = np.mean([abs(x.lds - expected[x.groups]) <= x.width for x in ends])
    assert covered >= 0.92
