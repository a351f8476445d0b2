"""`tdabench truth` on a suite of one's own: plan, build in parts, status, verify, exchange."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tdabench.cli.truth import command
from tdabench.errors import DataError, GuardError, MissingExtra, UsageError
from tdabench.io import read_arrays, write_arrays
from tdabench.run.plan import Request, make_plan
from tdabench.targets import Recipe
from tdabench.truth import Truth, Unit

PLAN = """
[targets.plans.lds]
groups = 3
fraction = 0.25
seeds = 2
recipe = { lr = 3e-3, epochs = 1, batch_size = 8 }
"""


@pytest.fixture
def suite(tiny_target, tiny_corpus, tiny_queries, tmp_path):
    """A suite that plans a truth of six retrainings and does not have it yet."""
    rows = [
        {"id": e.id, "prompt": e.prompt, "response": e.response, "task": e.task, "split": split}
        for split, corpus in (("pool", tiny_corpus), ("test", tiny_queries))
        for e in corpus
    ]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = tmp_path / "suite.toml"
    path.write_text(
        f"""
[suite]
name = "toy"
[corpus]
file = "corpus.jsonl"
train = "pool"
queries = "test"
[[targets]]
label = "tiny"
folder = "{tiny_target.folder}"
checkpoints = {{ base = "base.safetensors", warm = "warm.safetensors" }}
max_length = 128
[targets.truths]
lds = "lds.safetensors"
{PLAN}"""
    )
    return path


def run(*args, code=0):
    result = CliRunner().invoke(command, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_plan_build_status_verify(suite, tmp_path):
    (planned,) = json.loads(run("plan", suite, "--json", "--out", tmp_path / "p.safetensors"))
    assert (planned["groups"], planned["group_size"], planned["retrainings"]) == (3, 15, 6)
    assert (tmp_path / "p.safetensors").exists()
    work = ["--work", tmp_path / "work"]

    (row,) = json.loads(run("status", suite, "--json", *work))
    assert (row["state"], row["built"]) == ("missing", 0)

    (row,) = json.loads(run("build", suite, "--json", "--shard", "2/3", *work))
    assert (row["done"], row["of"]) == (2, 6)
    assert "file" not in row
    (row,) = json.loads(run("build", suite, "--json", "--in-place", *work))
    assert (row["done"], row["failed"]) == (6, [])

    (row,) = json.loads(run("status", suite, "--json", *work))
    assert row["state"] == "complete"
    assert (row["groups"], row["seeds"], row["queries"]) == (3, 2, 12)

    (found,) = json.loads(run("verify", suite, "--json", "--units", 2))
    assert found["agrees"]
    assert found["identical"] == 1.0
    assert found["between_seeds"] > 0


def test_a_truth_is_written_into_its_suites_folder_only(suite, tmp_path, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (suite.parent / "out").symlink_to(outside)
    text = suite.read_text()
    work = ["--work", tmp_path / "work"]
    there = set(suite.parent.iterdir())
    up = f"../../{outside.relative_to(tmp_path.parent.parent)}"
    for place in (f"{up}/bashrc", f"{up}/t.safetensors", "out/t.safetensors", "bashrc"):
        suite.write_text(text.replace('"lds.safetensors"', f'"{place}"'))
        with pytest.raises(UsageError, match="nothing is written there"):
            run("build", suite, "--in-place", *work)
    (row,) = json.loads(run("build", suite, "--json", *work))  # without it: the work folder only
    assert row["in_place"] is False
    assert Path(row["file"]).is_relative_to(tmp_path / "work")
    assert not list(outside.iterdir())
    assert set(suite.parent.iterdir()) == there | {tmp_path / "work"}


def test_verify_notices_losses_that_are_not_so(suite, tmp_path):
    run("build", suite, "--in-place", "--work", tmp_path / "work")
    path = suite.parent / "lds.safetensors"
    arrays, meta = read_arrays(path)
    write_arrays(path, {**arrays, "losses": arrays["losses"] * 1.1}, meta)
    out = run("verify", suite, "--units", 1, code=1)
    assert "DOES NOT AGREE" in out


def test_a_truth_of_another_plan_is_said_so(suite, tmp_path):
    run("build", suite, "--in-place", "--work", tmp_path / "work")
    suite.write_text(suite.read_text().replace("epochs = 1", "epochs = 2"))
    assert "not by the suite's present plan" in run("status", suite)
    with pytest.raises(GuardError, match="not built by the plan"):
        run("verify", suite, "--units", 1)


def test_export_and_import_are_inverse_up_to_the_mean_over_seeds(
    suite, tmp_path, tiny_corpus, tiny_queries
):
    run("build", suite, "--in-place", "--work", tmp_path / "work")
    lines = tmp_path / "lds.jsonl"
    run("export", suite.parent / "lds.safetensors", "--out", lines)
    for name, corpus in (("train", tiny_corpus), ("queries", tiny_queries)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(
                json.dumps({"id": e.id, "prompt": e.prompt, "response": e.response}) + "\n"
                for e in corpus
            )
        )
    out = tmp_path / "again.safetensors"
    sources = ["--train", tmp_path / "train.jsonl", "--queries", tmp_path / "queries.jsonl"]
    run("import", lines, *sources, "--out", out)
    first, again = Truth.load(suite.parent / "lds.safetensors"), Truth.load(out)
    assert again.groups.fingerprint == first.groups.fingerprint
    np.testing.assert_allclose(again.values, first.values, rtol=1e-6)

    lines.write_text(lines.read_text() + '{"train_subset": [0], "test_loss": [1.0]}\n')
    with pytest.raises(DataError, match=r"line 4: 1 losses for 12 queries"):
        run("import", lines, *sources, "--out", out)
    lines.write_text('{"train_subset": [0, 999], "test_loss": ' + str([1.0] * 12) + "}\n")
    with pytest.raises(DataError, match="outside the corpus"):
        run("import", lines, *sources, "--out", out)


def test_bad_requests_are_named(suite):
    with pytest.raises(UsageError, match="'ldss'"):
        run("plan", suite, "--truth", "ldss")
    with pytest.raises(UsageError, match="3/2"):
        run("build", suite, "--shard", "3/2")
    with pytest.raises(UsageError, match="form i/n"):
        run("build", suite, "--shard", "x")
    suite.write_text(suite.read_text().replace("lr = 3e-3", "learning = 3"))
    with pytest.raises(DataError, match="unknown field of the recipe 'learning'"):
        run("plan", suite)


def test_a_plan_file_builds_what_the_suite_would(suite, tmp_path):
    path = tmp_path / "p.safetensors"
    run("plan", suite, "--out", path)
    (a,) = json.loads(run("build", suite, "--json", "--workers", 1, "--work", tmp_path / "a"))
    suite.write_text(suite.read_text().replace("epochs = 1", "epochs = 2"))
    options = ["--plan", path, "--workers", 1, "--work", tmp_path / "b"]
    (b,) = json.loads(run("build", suite, "--json", *options))
    assert Path(a["file"]).read_bytes() == Path(b["file"]).read_bytes()
    with pytest.raises(UsageError, match="Leave out --plan"):
        run("build", suite, *options, "--in-place")
    queries = suite.read_text().replace('queries = "test"', 'queries = "pool"')
    suite.write_text(queries.replace('train = "pool"', 'train = "test"'))
    with pytest.raises(UsageError, match="planned for queries"):
        run("build", suite, *options)


def test_status_tells_failures_and_damage(suite, tmp_path, monkeypatch):
    from tdabench.truth.engines import UnitTrainer

    real, work = UnitTrainer.losses, ["--work", tmp_path / "work"]

    def fails(self, unit, *rest):
        if unit.name == "g00001-s00":
            raise RuntimeError("out of luck")
        return real(self, unit, *rest)

    monkeypatch.setattr(UnitTrainer, "losses", fails)
    out = run("build", suite, "--workers", 1, *work, code=1)
    assert "5 of 6 retrainings, 1 failed" in out
    (row,) = (tmp_path / "work").glob("*/units/g00000-s00.safetensors")
    row.write_bytes(row.read_bytes()[:-3])
    out = run("status", suite, *work)
    assert "4/6 built here" in out
    assert "g00001-s00 failed: RuntimeError: out of luck" in out
    assert "rebuilt by the next build: g00000-s00" in out
    monkeypatch.setattr(UnitTrainer, "losses", real)
    assert "6 of 6" in run("build", suite, "--workers", 1, *work)
    assert "6/6 built here" in run("status", suite, *work)


def test_a_stack_is_asked_for_and_agrees(suite, tmp_path):
    run("build", suite, "--in-place", "--stack", 4, "--work", tmp_path / "work")
    (found,) = json.loads(run("verify", suite, "--json", "--units", 1))
    assert found["agrees"]
    with pytest.raises(UsageError, match="Leave one out"):
        run("build", suite, "--stack", 2, "--engine", "ray")


def test_without_ray_its_engine_says_how_to_get_it(suite, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'tdabench\[ray\]'"):
        run("build", suite, "--engine", "ray", "--work", tmp_path / "work")


def test_workers_are_as_many_as_cores_and_memory_allow(suite, monkeypatch):
    from tdabench.cli import truth as cli
    from tdabench.run import environment, truths
    from tdabench.truth.engines import needed_bytes

    ((s, t, name),) = truths.planned_truths(str(suite), (), ())
    plan = truths.draw_plan(s, t, name)
    need = needed_bytes(plan, t.target)
    monkeypatch.setattr(environment, "cores", lambda: 8)
    for free, expected in ((100 * need, 6), (3.5 * need, 3), (0.5 * need, 1), (0, 6)):
        monkeypatch.setattr(environment, "available_bytes", lambda free=free: int(free))
        assert cli._workers("auto", "cpu", plan, t, 6, "local") == expected
    assert cli._workers("3", "cpu", plan, t, 6, "local") == 3
    for bad in ("0", "-1", "many"):
        with pytest.raises(UsageError, match="A number from 1, or auto"):
            cli._workers(bad, "cpu", plan, t, 6, "local")
    light = dataclasses.replace(plan, recipe=Recipe(checkpointing=True, micro_batch=2))
    assert needed_bytes(light, t.target) < need
    # Large batches are cut into parts; with bfloat16 they are not.
    large = {"batch_size": 4096, "lora_rank": 2}
    whole, upper, half = (
        needed_bytes(dataclasses.replace(plan, recipe=Recipe(**large, **more)), t.target)
        for more in ({}, {"layers_to_transform": (1,)}, {"precision": "bfloat16"})
    )
    assert upper < whole < half
    assert whole < 1.5 * need


def test_what_will_be_slow_or_fail_is_said_before_it_starts(suite, tmp_path, monkeypatch, capsys):
    from tdabench.cli import truth as cli
    from tdabench.run import environment, truths

    ((s, t, name),) = truths.planned_truths(str(suite), (), ())
    plan = truths.draw_plan(s, t, name)
    assert cli.cautions(plan, t, "cpu") == []
    monkeypatch.setattr(environment, "available_bytes", lambda: 1 << 20)
    (line,) = cli.cautions(plan, t, "cpu")
    assert "GiB of memory and 0.0 GiB is free" in line
    half = dataclasses.replace(plan, recipe=Recipe(precision="bfloat16"))
    for known, lines in ((False, 2), (True, 1), (None, 1)):
        monkeypatch.setattr(environment, "knows_bfloat16", lambda known=known: known)
        found = cli.cautions(half, t, "cpu")
        assert len(found) == lines
        assert ("has no instructions" in found[0]) == (known is False)
    assert cli.cautions(half, t, "cuda") == []


@pytest.mark.parametrize("bar", [False, True])
def test_progress_shows_pace_time_left_retries_and_failures(bar, monkeypatch, capsys):
    from tdabench.cli import truth as cli

    now = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    watch = (cli._Bar if bar else cli._Lines)("pocket-lds", 2, 10, 1)
    with watch:
        for unit, reason in ((Unit(0, 0), ""), (Unit(1, 0), "RuntimeError: no"), (Unit(2, 0), "")):
            now[0] += 20
            if reason:
                watch.retry(unit, reason)
            watch.unit(unit, reason)
        facts = watch.bar.tasks[0].fields["facts"] if bar else ""
    err = capsys.readouterr().err
    assert "g00001-s00 failed: RuntimeError: no" in err
    shown = facts if bar else err.splitlines()[-1]
    assert "20.00 s each, 2 min left, 1 retried, 1 failed" in shown
    assert [cli.duration(x) for x in (40, 720, 12600)] == ["40 s", "12 min", "3.5 h"]


def test_describe_says_how_smooth_and_how_noisy(suite, tmp_path):
    run("build", suite, "--in-place", "--work", tmp_path / "work")
    (row,) = json.loads(run("describe", suite, "--directions", 1, "--json", "--save"))
    assert -1 <= row["metasmoothness"]["value"] <= 1
    assert row["recipe"]["lr"] == 3e-3
    assert -1 <= row["seed_agreement"] <= 1
    saved = Truth.load(suite.parent / "lds.safetensors")
    assert saved.plan["metasmoothness"] == row["metasmoothness"]
    assert "complete;" in run("status", suite).replace(",", ";")  # still the suite's plan
    out = run("describe", suite, "--directions", 0)
    assert "lr=0.003, epochs=1, batch_size=8; two seeds agree" in out
    assert "metasmoothness" not in out


def test_a_recipe_is_searched_for(suite):
    text = suite.read_text()
    suite.write_text(text.replace('queries = "test"', 'queries = "test"\ntuning_queries = "test"'))
    asked = ["tune-recipe", suite, "--groups", 2, "--directions", 1, "--grid", "lr=1e-3,1e30"]
    asked += ["--grid", "batch_size=8", "--grid", "clip=0", "--grid", "epochs=2"]
    own, good, bad = json.loads(run(*asked, "--json"))
    assert own["recipe"]["batch_size"] == 32
    assert "smaller than a batch" in own["error"]
    assert good["error"] == ""
    assert good["loss"] > 0
    assert bad["recipe"]["lr"] == 1e30
    assert "lower lr" in bad["error"]
    table = run("tune-recipe", suite, "--groups", 2, "--directions", 0, "--grid", "batch_size=8")
    assert "batch_size=8" in table.splitlines()[-1]
    with pytest.raises(UsageError, match="FIELD=A,B"):
        run("tune-recipe", suite, "--grid", "lr")


def test_a_suite_file_of_ones_own_gets_its_truth_where_run_looks_for_it(suite, tmp_path):
    work = ["--work", tmp_path / "work", "--workers", 1]
    place = suite.parent / "lds.safetensors"
    plan = make_plan(Request(str(suite), ("random",), benchmarks=("lds",)))
    assert f"no {place}" in plan.cells[0].skip
    assert f"truth build {suite} --in-place" in plan.cells[0].skip
    assert f"written to {place}" in run("build", suite, *work)
    (cell,) = make_plan(Request(str(suite), ("random",), benchmarks=("lds",))).cells
    assert cell.skip == ""
    before = place.stat().st_mtime_ns
    out = run("build", suite, *work)  # one that is there is replaced on request only
    assert "the suite's own file: --in-place writes that" in out
    assert place.stat().st_mtime_ns == before
