"""Labels: normalisation, drawing, retraining, resuming, the reference layout, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tdabench_airrep.cli import airrep
from tdabench_airrep.labels import Draw, Instance, LabelJob, Labels, normalise
from tdabench_airrep.reference import read_reference

from tdabench.api import Corpus, DataError, Example, Groups, GuardError, Recipe, UsageError

RECIPE = Recipe(lr=1e-3, epochs=1, batch_size=10)
DRAW = Draw(instances=2, subsets=3, pool_size=20, subset_sizes=(8,), dev=5, seed=1)


def test_normalise_is_minus_the_standard_score() -> None:
    losses = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])  # [subset, dev]
    r = normalise(losses)
    s = np.sqrt(1.5)
    np.testing.assert_allclose(r, [[s, 0, -s], [0, 0, 0]], atol=1e-6)  # [dev, subset]


def test_normalise_excludes_what_is_not_finite() -> None:
    losses = np.array([[1.0, np.nan], [3.0, np.inf], [np.nan, 2.0]])
    r = normalise(losses)
    np.testing.assert_allclose(r[0], [1, -1, np.nan])
    assert np.isnan(r[1]).all()  # one finite loss cannot be ranked


def test_normalise_clips_at_ten() -> None:
    losses = np.zeros((400, 1))
    losses[0] = 1.0
    assert normalise(losses)[0, 0] == -10.0


def test_equal_losses_say_nothing_whatever_their_rounding() -> None:
    losses = np.full((7, 3), 0.1, dtype=np.float32)
    np.testing.assert_array_equal(normalise(losses), np.zeros((3, 7)))


def test_draws_are_seeded_and_each_instance_stands_alone() -> None:
    pool, dev, subsets = DRAW.instance(1, 50, 12)
    again = Draw(**{**DRAW.__dict__, "instances": 9}).instance(1, 50, 12)
    np.testing.assert_array_equal(pool, again[0])
    np.testing.assert_array_equal(dev, again[1])
    assert subsets.fingerprint == again[2].fingerprint
    assert subsets.sizes.tolist() == [8, 8, 8]
    assert len(set(pool)) == 20
    other = DRAW.instance(0, 50, 12)
    assert subsets.fingerprint != other[2].fingerprint
    mixed = Draw(subsets=4, pool_size=20, subset_sizes=(3, 9), dev=2).instance(0, 50, 12)
    assert mixed[2].sizes.tolist() == [3, 9, 3, 9]


@pytest.mark.parametrize(
    "bad", [{"subset_sizes": (30,)}, {"dev": 0}, {"subset_sizes": ()}, {"pool_size": 0}]
)
def test_impossible_draws_are_refused(bad: dict) -> None:
    with pytest.raises(UsageError):
        Draw(**{**DRAW.__dict__, **bad})
    with pytest.raises(UsageError):
        DRAW.instance(0, 10, 12)


def _job(target, train, dev, folder: Path, draw: Draw = DRAW) -> LabelJob:
    return LabelJob(target, train, dev, draw, RECIPE, folder)


def test_labels_are_losses_after_retraining(tiny_target, tiny_corpus, tiny_queries, tmp_path):
    lines: list[str] = []
    job = _job(tiny_target, tiny_corpus, tiny_queries, tmp_path)
    job.run(1, lines.append)
    assert len(lines) == 6
    labels = Labels.load(tmp_path / "labels.safetensors")
    labels.check(tiny_corpus, tiny_queries)
    assert labels.retrainings == 6
    assert labels.meta["seconds"] > 0
    assert labels.meta["cpu_seconds"] > 0
    instance = labels.instances[1]
    pool, dev, groups = DRAW.instance(1, 60, 12)
    np.testing.assert_array_equal(instance.dev, dev)
    np.testing.assert_array_equal(instance.subsets[2], pool[groups[2]])

    # One subset retrained here by hand: the stored losses are those of that model.
    from tdabench.api import finetune

    plan, pool_corpus, dev_corpus, _, _ = job.plan(1)
    model = tiny_target.fresh_model("base")
    tokens = tiny_target.tokenize(pool_corpus.subset(groups[2]))
    finetune(model, tokens, RECIPE, plan.run_seed(plan.units()[2]), tiny_target.pad_id)
    want = tiny_target.losses(model, tiny_target.tokenize(dev_corpus))
    np.testing.assert_allclose(instance.losses[2], want, rtol=1e-6)

    lines.clear()
    job.run(1, lines.append)
    assert lines == []  # nothing is retrained twice


def test_stopped_job_goes_on_and_collects_what_is_there(
    tiny_target, tiny_corpus, tiny_queries, tmp_path
):
    whole = tmp_path / "whole"
    _job(tiny_target, tiny_corpus, tiny_queries, whole).run(1, lambda line: None)

    class Stop(Exception):
        pass

    def stop_at_five(line: str) -> None:
        if "instance 2/2, retraining 2/3" in line:
            raise Stop

    part = _job(tiny_target, tiny_corpus, tiny_queries, tmp_path / "part")
    with pytest.raises(Stop):
        part.run(1, stop_at_five)
    assert part.collect().retrainings == 5
    part.run(1, lambda line: None)
    a, b = (Labels.load(f / "labels.safetensors") for f in (whole, tmp_path / "part"))
    for x, y in zip(a.instances, b.instances):
        np.testing.assert_array_equal(x.losses, y.losses)
    # More instances of the same job may follow in the same folder; another job may not.
    more = Draw(**{**DRAW.__dict__, "instances": 3})
    _job(tiny_target, tiny_corpus, tiny_queries, tmp_path / "part", more).claim()
    other = Draw(**{**DRAW.__dict__, "seed": 2})
    with pytest.raises(DataError, match="another job"):
        _job(tiny_target, tiny_corpus, tiny_queries, tmp_path / "part", other).claim()


def test_labels_count_the_processor_time_of_every_process(
    tiny_target, tiny_corpus, tiny_queries, tmp_path
):
    from tdabench.api import finished_units, read_unit

    job = _job(tiny_target, tiny_corpus, tiny_queries, tmp_path)
    job.run(2, lambda line: None)  # retrained in processes that are not children of this one
    each = []
    for k in range(2):
        plan = job.plan(k)[0]
        rows = [read_unit(plan, job.place(k), unit) for unit in finished_units(plan, job.place(k))]
        each += [row.cpu_seconds for row in rows if row is not None]
    assert len(each) == 6
    assert all(e is not None and e > 0 for e in each)
    assert Labels.load(tmp_path / "labels.safetensors").meta["cpu_seconds"] == pytest.approx(
        sum(each), abs=1e-3
    )


def test_labels_refuse_another_corpus(tiny_corpus, tiny_queries, tmp_path) -> None:
    instance = Instance(np.array([0]), Groups.of([[1], [2]], 60), np.zeros((2, 1), np.float32))
    meta = {"train": tiny_corpus.fingerprint, "dev": tiny_queries.fingerprint}
    labels = Labels((instance,), 60, 12, meta)
    labels.check(tiny_corpus, tiny_queries)
    with pytest.raises(GuardError, match="another train corpus"):
        labels.check(tiny_corpus[::-1], tiny_queries)
    with pytest.raises(GuardError, match="another dev corpus"):
        labels.check(tiny_corpus, tiny_queries[:6])
    with pytest.raises(GuardError, match="over 12 dev examples"):
        Labels((instance,), 60, 12).check(tiny_corpus, tiny_queries[:6])
    labels.save(tmp_path / "l.safetensors")
    data = bytearray((tmp_path / "l.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "l.safetensors").write_bytes(data)
    with pytest.raises(DataError, match="corrupt"):
        Labels.load(tmp_path / "l.safetensors")


def test_a_dev_example_in_the_pool_is_refused(tiny_target, tiny_corpus, tmp_path) -> None:
    twin = Corpus([Example("d", tiny_corpus[3].prompt, tiny_corpus[3].response)], "dev")
    draw = Draw(instances=1, subsets=2, pool_size=60, subset_sizes=(30,), dev=1)
    with pytest.raises(GuardError, match="also a training example"):
        _job(tiny_target, tiny_corpus, twin, tmp_path, draw).run(1, lambda line: None)
    instance = Instance(np.array([0]), Groups.of([[3], [4]], 60), np.zeros((2, 1), np.float32))
    with pytest.raises(GuardError, match="in one of its own subsets"):
        Labels((instance,), 60, 1).check(tiny_corpus, twin)


def test_exclusions_are_reported() -> None:
    losses = np.ones((4, 3), np.float32)
    losses[0] = np.nan
    losses[1:, 2] = [np.nan, np.inf, 2.0]
    lines = Labels(
        (Instance(np.arange(3), Groups.of([[0], [1], [2], [3]], 9), losses),), 9, 3
    ).excluded()
    assert lines == [
        "instance 0: 1 subsets without losses, first 0",
        "instance 0: 2 losses are NaN or infinite, 1 dev examples are left with fewer than two",
    ]


# --------------------------------------------------------------------------- reference layout


def _write_reference(folder: Path, rows: list[dict], losses: dict[str, list]) -> tuple[Path, Path]:
    index = folder / "index.jsonl"
    index.write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = folder / "losses"
    out.mkdir()
    for row in rows:
        if row["id"] in losses:
            values = losses[row["id"]]
            record = {"pair_id": row["id"], "dev_id": row["dev_id"], "losses": values}
            (out / f"loss-{row['id']}.json").write_text(json.dumps({**record, "mean_loss": 0.0}))
    return index, out


ROWS = [
    {"id": "0-0", "select": [4, 2, 3], "dev": [0, 1], "dev_id": 0},
    {"id": "0-1", "select": [5, 6, 7], "dev": [0, 1], "dev_id": 0},
    {"id": "1-0", "select": [0, 1], "dev": [8, 9], "dev_id": 1},
    {"id": "1-1", "select": [2, 3], "dev": [8, 9], "dev_id": 1},
]
LOSSES: dict[str, list] = {"0-0": [1.0, 2.0], "0-1": [3.0, 1.0], "1-0": [0.5, 0.5], "1-1": [1, 2]}


def test_reference_layout(tiny_corpus, tmp_path: Path) -> None:
    labels = read_reference(*_write_reference(tmp_path, ROWS, LOSSES), tiny_corpus)
    labels.check(tiny_corpus, tiny_corpus)
    assert [i.dev.tolist() for i in labels.instances] == [[0, 1], [8, 9]]
    assert labels.instances[0].subsets[0].tolist() == [2, 3, 4]
    np.testing.assert_allclose(labels.instances[0].labels, [[1, -1], [-1, 1]])
    assert labels.retrainings == 4


def test_reference_layout_from_one_file_of_lines(tiny_corpus, tmp_path: Path) -> None:
    index, folder = _write_reference(tmp_path, ROWS, LOSSES)
    lines = tmp_path / "all.jsonl"
    lines.write_text("\n".join(p.read_text() for p in sorted(folder.glob("*.json"))))
    a = read_reference(index, folder, tiny_corpus)
    b = read_reference(index, lines, tiny_corpus)
    for x, y in zip(a.instances, b.instances):
        np.testing.assert_array_equal(x.losses, y.losses)


def test_bad_reference_files_are_named(tiny_corpus, tmp_path: Path) -> None:
    def read(name: str, rows: list[dict], losses: dict[str, list], **kw: bool) -> Labels:
        folder = tmp_path / name
        folder.mkdir()
        return read_reference(*_write_reference(folder, rows, losses), tiny_corpus, **kw)

    some = {k: v for k, v in LOSSES.items() if k != "0-1"}
    with pytest.raises(DataError, match="lacks the losses of 1 subsets, first '0-1'"):
        read("missing", ROWS, some)
    assert read("allowed", ROWS, some, allow_missing=True).retrainings == 3
    with pytest.raises(GuardError, match="in one of its own subsets"):
        read("touch", [{**ROWS[0], "select": [1, 2]}], LOSSES)
    with pytest.raises(DataError, match="do not belong"):
        read("short", ROWS[:1], {"0-0": [1.0]})
    with pytest.raises(DataError, match="'select' is missing"):
        read("field", [{k: v for k, v in ROWS[0].items() if k != "select"}], LOSSES)
    with pytest.raises(DataError, match="outside the corpus"):
        read("far", [{**ROWS[0], "select": [600]}], LOSSES)
    with pytest.raises(DataError, match="other dev examples"):
        read("dev", [ROWS[0], {**ROWS[1], "dev": [1, 0]}], LOSSES)
    nan = read("nan", ROWS[:2], {"0-0": [None, 2.0], "0-1": [3.0, 1.0]})
    assert "1 losses are NaN" in nan.excluded()[0]


# --------------------------------------------------------------------------- command line


def test_labels_command(tiny_target, tiny_corpus, tiny_queries, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    with corpus.open("w") as f:
        for split, examples in (("a", tiny_corpus), ("b", tiny_queries)):
            for e in examples:
                row = {"id": e.id, "prompt": e.prompt, "response": e.response, "split": split}
                f.write(json.dumps(row) + "\n")
    words = f"""labels --target {tiny_target.folder} --corpus {corpus} --pool-split a --dev-split b
        --recipe lr=1e-3,epochs=1,batch_size=10 --out {tmp_path / "out"} --instances 1 --subsets 2
        --pool-size 20 --subset-size 8 --dev 5""".split()
    done = CliRunner().invoke(airrep, words, catch_exceptions=False)
    result = json.loads(done.stdout)
    assert (result["instances"], result["retrainings"], result["excluded"]) == (1, 2, [])
    assert "retraining 2/2" in done.stderr
    assert len(Labels.load(tmp_path / "out" / "labels.safetensors").instances[0].dev) == 5
    again = CliRunner().invoke(airrep, [*words, "--collect-only"], catch_exceptions=False)
    assert json.loads(again.stdout) == result
    with pytest.raises(UsageError, match="unknown field of the recipe"):
        CliRunner().invoke(airrep, [*words, "--recipe", "rate=1"], catch_exceptions=False)
