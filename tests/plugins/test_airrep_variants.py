"""Variants of AirRep's recipe: what each leaves out, and a suite in which each is a row."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tdabench_airrep.cli import airrep
from tdabench_airrep.labels import Instance, Labels
from tdabench_airrep.pipeline import Body, Stage, limited, train_encoder
from tdabench_airrep.recipe import TrainConfig
from tdabench_airrep.teacher import Teacher
from tdabench_airrep.variants import ablation

from tdabench.api import Groups, Truth, UsageError, load_suite, read_json
from tdabench.groups import pool_scores
from tdabench.testing.tiny import tiny_corpus as examples


def _truth(scores: np.ndarray, seed: int) -> Truth:
    """Losses [group, seed, query] of a world in which softmax-pooled `scores` are the truth."""
    rng = np.random.default_rng(seed)
    groups = Groups.random(14, scores.shape[1], 0.25, rng)
    f = pool_scores(scores, groups, "softmax", float(scores.std())).T[:, None, :]
    losses = -f + 1e-3 * rng.standard_normal((len(groups), 2, len(scores)))
    return Truth(losses.astype(np.float32), groups, tuple(f"q{i}" for i in range(len(scores))))


def _stages() -> list[Stage]:
    body = Body(dim=8, layers=(0, -1), spans=("response",))
    config = TrainConfig(steps=0, distil_steps=2, every=1, holdout=1, probe=3, distil_queries=4)
    last = replace(config, steps=2, distil_steps=0, anchor=0.5, whiten=False, subsets=6)
    return [
        Stage(body=body, config=config, labels=False, teacher=True),
        Stage(body=Body(init="earlier", normalise=True), config=last, labels=True, teacher=True),
    ]


def test_ablation_takes_out_one_part_at_a_time() -> None:
    stages = _stages()
    made = ablation(stages)
    assert list(made) == [
        "untrained", "start", "distilled", "ranked", "no-attention", "full",
    ]  # fmt: skip
    assert made["full"] == stages
    assert made["distilled"] == stages[:1]
    for name in ("untrained", "start"):
        (only,) = made[name]
        assert (only.config.steps, only.config.distil_steps) == (0, 0)
        assert not only.labels
        assert not only.teacher
    assert made["untrained"][0].body.layers == (-1,)
    assert not made["untrained"][0].config.whiten
    (alone,) = made["ranked"]
    assert (alone.teacher, alone.labels, alone.config.anchor) == (False, True, 0.0)
    assert alone.body == replace(stages[0].body, normalise=True)
    before, after = made["no-attention"]
    assert before == stages[0]
    assert after == replace(stages[1], config=replace(stages[1].config, pooling="mean"))
    # A recipe of one stage without a teacher has nothing to distil.
    only = replace(stages[1], body=stages[0].body, teacher=False)
    assert list(ablation([only])) == ["untrained", "start", "no-attention", "full"]


def test_labels_are_cut_to_a_budget() -> None:
    rng = np.random.default_rng(0)
    instances = tuple(
        Instance(
            np.arange(3),
            Groups.random(5, 20, 0.5, rng),
            rng.standard_normal((5, 3)).astype(np.float32),
        )
        for _ in range(4)
    )
    labels = Labels(instances, 20, 3, {"seconds": 40.0, "train": "x"})
    cut = labels.cut(2, 3, holdout=1)
    assert [len(i.subsets) for i in cut.instances] == [3, 3, 5]
    np.testing.assert_array_equal(cut.instances[1].losses, instances[1].losses[:3])
    np.testing.assert_array_equal(cut.instances[1].subsets[2], instances[1].subsets[2])
    assert cut.instances[-1] is instances[-1]
    assert (cut.retrainings, cut.meta["retrainings"]) == (11, 11)
    assert cut.meta["seconds"] == pytest.approx(40 * 11 / 20)  # of what all cost, its share
    for bad in ((4, 3), (0, 3), (1, 6), (1, 1)):
        with pytest.raises(UsageError, match="cannot be taken"):
            labels.cut(*bad, holdout=1)


def test_steps_are_limited_and_never_raised() -> None:
    assert [(s.config.steps, s.config.distil_steps) for s in limited(_stages(), 1, 9)] == [
        (0, 2), (1, 0),
    ]  # fmt: skip
    assert limited(_stages(), 0, 0) == _stages()


# --------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, make_target) -> Path:
    """A suite in which TF-IDF is the truth, with an encoder, its labels and its teacher."""
    import shutil
    import tempfile

    from tdabench.api import Context, registry

    folder = tmp_path_factory.mktemp("variants")
    target = make_target("qwen2")
    shutil.copytree(target.folder, folder / "target")
    splits = {
        "train": examples(32, 2, "a"),
        "test": examples(9, 3, "b"),
        "tuning": examples(8, 4, "c"),
        "labels_pool": examples(30, 5, "d"),
        "labels_dev": examples(12, 6, "e"),
    }
    with (folder / "corpus.jsonl").open("w") as f:
        for split, corpus in splits.items():
            for e in corpus:
                row = {k: getattr(e, k) for k in ("id", "prompt", "response", "task")}
                f.write(json.dumps({**row, "split": split}) + "\n")
    from tdabench.api import read_jsonl

    read = {k: read_jsonl(folder / "corpus.jsonl", k, k) for k in splits}
    with tempfile.TemporaryDirectory() as scratch:
        method = registry().method("tfidf").cls.from_params({})
        index = method.build(Context(target, Path(scratch)), read["train"])
        scores = {k: index.score(read[k]) for k in ("test", "tuning")}
    recipe = {"lr": 1e-3, "epochs": 1, "batch_size": 8}
    for n, (split, name) in enumerate((("test", "lds"), ("tuning", "tuning"))):
        made = _truth(scores[split], n)
        ids = tuple(read[split].ids)
        plan = {"recipe": recipe, "train": read["train"].fingerprint}
        Truth(made.losses, made.groups, ids, plan).save(folder / f"{name}.safetensors")
    target_table = """
[[targets]]
label = "{label}"
name = "tiny"
folder = "target"
checkpoints = {{ base = "base.safetensors", warm = "warm.safetensors" }}
max_length = 128
recipe = {{ lr = 1e-3, epochs = 1, batch_size = 8 }}
truths = {{ lds = "lds.safetensors"{tuning} }}
assets = {{ {asset} }}
"""
    (folder / "suite.toml").write_text(
        '[suite]\nname = "tiny"\n\n[corpus]\nfile = "corpus.jsonl"\ntrain = "train"\n'
        'queries = "test"\ntuning_queries = "tuning"\n'
        + target_table.format(
            label="one", tuning=', tuning = "tuning.safetensors"', asset='airrep = "encoder"'
        )
        + target_table.format(label="two", tuning="", asset="")
        + '\n[methods]\ndefault = ["airrep"]\n\n[tuned.one.tfidf]\npooling = "softmax"\n'
        "temperature = 0.1\n"
    )

    rng = np.random.default_rng(0)
    pool, dev = read["labels_pool"], read["labels_dev"]
    same = np.array([[float(a.task == b.task) for b in pool] for a in dev])
    instances = []
    for _ in range(3):
        groups = Groups.random(8, len(pool), 0.4, rng)
        losses = -(groups.membership(np.float64) @ same.T) + 0.1 * rng.standard_normal((8, 12))
        instances.append(Instance(np.arange(12), groups, losses.astype(np.float32)))
    meta = {"train": pool.fingerprint, "dev": dev.fingerprint, "seconds": 24.0}
    Labels(tuple(instances), 30, 12, meta).save(folder / "labels.safetensors")
    teacher = Teacher(
        same.astype(np.float32) + 0.01 * rng.random((12, 30)).astype(np.float32),
        {"train": pool.fingerprint, "dev": dev.fingerprint, "target": target.fingerprint},
    )
    teacher.save(folder / "teacher.safetensors")
    first, last = _stages()
    common = {"target": _loaded(folder), "train": pool, "dev": dev, "say": lambda line: None}
    files = [str(folder / "teacher.safetensors")]
    train_encoder(
        **common, label_files=[], teacher_files=files, body=first.body, config=first.config,
        out=folder / "first",
    )  # fmt: skip
    train_encoder(
        **common,
        label_files=[folder / "labels.safetensors"],
        teacher_files=files,
        body=replace(last.body, init=str(folder / "first")),
        config=last.config,
        out=folder / "encoder",
    )
    return folder


def _loaded(folder: Path):
    return load_suite(folder / "suite.toml").target("one").target


NAMES = ["untrained", "start", "distilled", "ranked", "no-attention", "full"]


def _variants(suite: Path, work: Path, *words: str) -> dict:
    command = f"""variants --suite {suite}/suite.toml --target one --work {work}
        --labels {suite}/labels.safetensors --teacher {suite}/teacher.safetensors""".split()
    done = CliRunner().invoke(airrep, [*command, *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_variants_are_rows_of_a_suite_that_every_command_reads(suite: Path, tmp_path: Path) -> None:
    def tdabench(*words: str | Path) -> str:
        command = [sys.executable, "-m", "tdabench", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    work, runs = tmp_path / "work", tmp_path / "run"
    made = _variants(suite, work)
    assert made["variants"] == [f"airrep-{n}" for n in NAMES]
    written = load_suite(made["suite"])
    assert (written.name, written.path) == ("tiny-variants", work / "suite.toml")
    assert [t.label for t in written.main_targets] == ["one"]
    assert written.tuned["one"]["airrep-no-attention"]["pooling"] == "mean"
    assert written.tuned["one"]["tfidf"] == {"pooling": "softmax", "temperature": 0.1}
    folders = {k: Path(v.params["encoder"]) for k, v in written.variants.items()}
    records = {k: read_json(f / "airrep.json")["cost"] for k, f in folders.items()}
    assert records["airrep-full"]["retrainings"] == records["airrep-ranked"]["retrainings"] == 24
    assert records["airrep-distilled"]["retrainings"] == 0
    # Trainings that begin alike share their beginning: two distillations less.
    assert len(list(work.glob("stage-*/airrep.json"))) == 6

    words = ("--suite", work / "suite.toml")
    tdabench("tune", "airrep-full", *words, "--write", "--grid", "pooling=sum,softmax",
             "--grid", "temperature=0.1,auto")  # fmt: skip
    tuned = load_suite(work / "suite.toml").tuned["one"]["airrep-full"]
    assert tuned != written.tuned["one"]["airrep-full"]
    _variants(suite, work)  # nothing is trained again, and what was chosen is kept
    assert load_suite(work / "suite.toml").tuned["one"]["airrep-full"] == tuned

    methods = "airrep-full,airrep-no-attention,airrep"
    tdabench("run", *words, "--methods", methods, "--out", runs, "--quiet", "--jobs", "1")
    found = json.loads(
        tdabench("compare", "airrep", "airrep-full", "--run", runs, "--json", "--benchmark", "lds")
    )
    # "full" is the suite's own encoder trained again: but for its pooling, the same scores.
    assert found[0]["value_a"] is not None
    told = json.loads(tdabench("compare", "airrep-no-attention", "airrep-full", "--run", runs,
                               "--json", "--benchmark", "lds"))  # fmt: skip
    assert told[0]["low"] <= told[0]["effect"] <= told[0]["high"]


def test_the_full_variant_is_the_suites_own_encoder(suite: Path, tmp_path: Path) -> None:
    from tdabench_airrep.encoder import encode
    from tdabench_airrep.loading import load_encoder

    made = _variants(suite, tmp_path)
    full = load_suite(made["suite"]).variants["airrep-full"].params["encoder"]
    some = examples(5, 9, "z")
    own, again = (encode(load_encoder(Path(f)), some) for f in (suite / "encoder", full))
    np.testing.assert_array_equal(own, again)


def test_budgets_are_variants_too(suite: Path, tmp_path: Path) -> None:
    words = ["--instances", "1,2", "--subsets", "4", "--steps", "1"]
    made = _variants(suite, tmp_path, *words)
    assert made["variants"][-2:] == ["airrep-1x4", "airrep-2x4"]
    variants = load_suite(made["suite"]).variants
    costs = [
        read_json(Path(variants[f"airrep-{n}"].params["encoder"]) / "airrep.json")["cost"]
        for n in ("1x4", "2x4", "full")
    ]
    assert [c["retrainings"] for c in costs] == [12, 16, 24]  # the held-out instance counts
    raw = tomllib.loads(Path(made["suite"]).read_text())
    assert all(Path(p).is_absolute() for t in raw["targets"] for p in t["truths"].values())


def test_variants_say_what_is_wrong(suite: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be taken"):
        _variants(suite, tmp_path, "--instances", "3", "--subsets", "4")
    with pytest.raises(UsageError, match="needs --instances and --subsets"):
        _variants(suite, tmp_path, "--instances", "3")
    command = f"variants --suite {suite}/suite.toml --target two --work {tmp_path}".split()
    with pytest.raises(UsageError, match="no encoder for the target two"):
        CliRunner().invoke(airrep, command, catch_exceptions=False)
