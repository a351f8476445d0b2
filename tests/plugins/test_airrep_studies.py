"""AirRep's studies: each table on scores whose answer is known, each command on a tiny suite."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tdabench_airrep.build import Body, Stage, train_encoder
from tdabench_airrep.cli import airrep
from tdabench_airrep.labels import Instance, Labels
from tdabench_airrep.recipe import TrainConfig
from tdabench_airrep.studies import (
    Pooling,
    Scored,
    Setting,
    ablation,
    amortisation_table,
    crossover,
    index_table,
    ordering_table,
    pooling_table,
    poolings,
    size_table,
    transfer_table,
)
from tdabench_airrep.train import Teacher

from tdabench.api import (
    Corpus,
    Groups,
    Truth,
    UsageError,
    pool_scores,
    read_json,
    spearman_rows,
)
from tdabench.testing.tiny import tiny_corpus as examples

# --------------------------------------------------------------------------- tables


def _truth(scores: np.ndarray, seed: int, noise: float = 0.0, seeds: int = 2) -> Truth:
    """Losses [group, seed, query] of a world in which softmax-pooled `scores` are the truth."""
    rng = np.random.default_rng(seed)
    groups = Groups.random(14, scores.shape[1], 0.25, rng)
    f = pool_scores(scores, groups, "softmax", float(scores.std())).T[:, None, :]
    losses = -f + noise * rng.standard_normal((len(groups), seeds, len(scores)))
    return Truth(losses.astype(np.float32), groups, tuple(f"q{i}" for i in range(len(scores))))


def _world(noise: float = 0.0) -> tuple[Setting, Scored, Scored]:
    """A setting, the method that is right in it, and one that knows nothing."""
    rng = np.random.default_rng(0)
    good = {s: rng.standard_normal((6, 40)).astype(np.float32) for s in ("test", "tuning")}
    bad = {s: rng.standard_normal((6, 40)).astype(np.float32) for s in ("test", "tuning")}
    truths = {s: _truth(good[s], n, noise) for n, s in enumerate(good)}
    setting = Setting("tiny", None, Corpus([]), {}, truths)  # type: ignore[arg-type]
    return (
        setting,
        Scored("good", good, Pooling("sum"), 1.0, 1.0, 100.0),
        Scored("bad", bad, Pooling("sum"), 2.0, 1.0, 5000.0),
    )


def test_poolings_are_chosen_on_tuning_and_reported_on_test() -> None:
    setting, good, _ = _world()
    chosen = setting.choose(good)
    assert chosen.kind == "softmax"
    assert chosen.temperature == pytest.approx(float(good.scores["tuning"].std()))
    assert setting.choose(good, ("sum",)) == Pooling("sum")
    rows = pooling_table(setting, [good], [0.3, 1.0], replicates=50)
    assert [(r["pooling"], r["temperature"]) for r in rows] == [
        ("sum", None),
        ("softmax", 0.3),
        ("softmax", 1.0),
        ("softmax-abs", 0.3),
        ("softmax-abs", 1.0),
    ]
    want = spearman_rows(
        pool_scores(good.scores["test"], setting.truths["test"].groups),
        setting.truths["test"].values,
    ).mean()
    assert rows[0]["lds"] == pytest.approx(want, abs=1e-4)
    assert rows[2]["lds"] > 0.95
    assert [r["chosen"] for r in rows] == ["", "", "*", "", ""]
    assert all(r["low"] <= r["high"] for r in rows)
    # Nothing of the test truth decides what is chosen.
    other = replace(setting, truths={**setting.truths, "test": _truth(good.scores["test"], 9)})
    assert other.choose(good) == chosen
    no_tuning = replace(setting, truths={"test": setting.truths["test"]})
    with pytest.raises(UsageError, match="no tuning truth"):
        no_tuning.choose(good)


def test_groups_of_different_sizes_tell_sum_from_mean() -> None:
    kinds = {p.kind for p in poolings(np.ones((2, 3)), ("sum", "mean"))}
    assert kinds == {"sum", "mean"}
    setting, good, _ = _world()
    mixed = Groups.of([range(g + 1) for g in range(14)], 40)
    truth = Truth(setting.truths["test"].losses, mixed, setting.truths["test"].query_ids)
    rows = pooling_table(
        replace(setting, truths={**setting.truths, "test": truth}), [good], [1.0], replicates=20
    )
    assert [r["pooling"] for r in rows] == ["sum", "mean", "softmax", "softmax-abs"]


def test_ordering_is_by_lds_and_paired_against_the_first() -> None:
    setting, good, bad = _world(noise=0.05)
    rows = ordering_table(setting, [bad, good], replicates=200)
    assert [r["method"] for r in rows] == ["good", "bad"]
    top, bottom = rows
    assert top["difference"] == pytest.approx(bottom["lds"] - top["lds"], abs=2e-4)
    assert top["from"] <= top["difference"] <= top["to"] < 0
    assert top["p"] < 0.01
    assert bottom["difference"] is None


def test_index_table_says_who_reaches_the_first() -> None:
    setting, good, bad = _world(noise=0.05)
    twin = replace(good, label="twin", bytes=4200.0)
    rows = {r["method"]: r for r in index_table(setting, [good, bad, twin], replicates=200)}
    assert list(rows) == ["good", "twin", "bad"]
    assert (rows["twin"]["times"], rows["twin"]["reaches"]) == (42.0, "yes")
    assert (rows["bad"]["times"], rows["bad"]["reaches"]) == (50.0, "no")
    assert rows["good"]["reaches"] == ""


def test_size_and_transfer_tables() -> None:
    setting, good, bad = _world(noise=0.05)
    sizes = [setting.truths["test"], _truth(good.scores["test"], 5)]
    rows = size_table(setting, [good, bad], sizes, replicates=50)
    assert [(r["group size"], r["method"]) for r in rows] == [(10, "good"), (10, "bad")] * 2
    assert rows[2]["lds"] > 0.95  # the second truth has no noise
    assert rows[2]["ceiling"] == pytest.approx(1.0, abs=0.01)

    other = replace(setting, name="other", truths={"test": sizes[1]})
    own = replace(good, label="own", pooling=Pooling("softmax", float(good.scores["test"].std())))
    rows = transfer_table(
        {"here": setting, "there": other},
        {"here": [good, bad], "there": [own]},
        "here",
        replicates=50,
    )
    assert [(r["truth of"], r["built on"], r["method"]) for r in rows] == [
        ("here", "here", "good"),
        ("here", "here", "bad"),
        ("there", "here", "good"),
        ("there", "here", "bad"),
        ("there", "there", "own"),
    ]
    assert rows[4]["lds"] > 0.95  # no tuning truth there: its own pooling is kept
    assert rows[1]["difference"] > 0.2


def test_crossover_of_costs() -> None:
    a, b, size = crossover(prepare=1000.0, build_a=2.0, build_b=12.0, n=100)
    assert (a, b) == (0.02, 0.12)
    assert size == pytest.approx(10_000)
    assert 1000 + size * a == pytest.approx(size * b)
    assert crossover(1.0, 5.0, 5.0, 10)[2] is None
    rows = amortisation_table(
        1000.0, {"airrep": [2.0, 2.2, 1.8], "logra": [12.0, 11.0, 13.0], "fast": [1.0, 1.0]},
        100, [1000],
    )  # fmt: skip
    assert [r["s/1k"] for r in rows] == [20.0, 120.0, 10.0]
    assert (rows[0]["1,000"], rows[1]["1,000"]) == ("1,020 s", "120 s")
    assert rows[1]["from"] < rows[1]["cheaper from"] == 10_000 < rows[1]["to"]
    assert rows[0]["cheaper from"] is None
    assert rows[2]["cheaper from"] is None  # never: it is cheaper an example


# --------------------------------------------------------------------------- variants


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
        "untrained", "start", "distilled", "ranked", "without attention", "full",
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
    before, after = made["without attention"]
    assert before == stages[0]
    assert after == replace(stages[1], config=replace(stages[1].config, pooling="mean"))
    # A recipe of one stage without a teacher has nothing to distil.
    only = replace(stages[1], body=stages[0].body, teacher=False)
    assert list(ablation([only])) == ["untrained", "start", "without attention", "full"]


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
        with pytest.raises(UsageError, match="cannot be cut"):
            labels.cut(*bad, holdout=1)


# --------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, make_target) -> Path:
    """A suite in which TF-IDF is the truth, with an encoder, its labels and its teacher."""
    import shutil
    import tempfile

    from tdabench.api import Context, registry

    folder = tmp_path_factory.mktemp("studies")
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
        made = _truth(scores[split], n, noise=1e-3)
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
    from tdabench.api import load_suite

    return load_suite(folder / "suite.toml").target("one").target


def _call(suite: Path, name: str, *words: str) -> dict:
    command = ["study", name, "--suite", str(suite / "suite.toml"), "--target", "one"]
    done = CliRunner().invoke(
        airrep, [*command, "--replicates", "40", "--json", *words], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_pooling_study(suite: Path) -> None:
    found = _call(suite, "pooling", "--method", "tfidf", "--method", "random")
    assert (found["study"], found["truth"]) == ("pooling", "lds")
    best = {r["method"]: r for r in found["rows"] if r["chosen"]}
    assert set(best) == {"tfidf", "random"}
    assert best["tfidf"]["lds"] > 0.9 > 0.5 > best["random"]["lds"]


def test_ordering_index_and_tables_as_text(suite: Path) -> None:
    found = _call(suite, "ordering", "--method", "airrep", "--method", "tfidf:sublinear=true")
    rows = {r["method"]: r for r in found["rows"]}
    assert set(rows) == {"airrep", "tfidf sublinear=true"}
    assert rows["airrep"]["difference"] is None
    assert rows["tfidf sublinear=true"]["difference"] < 0  # it is nearly the truth itself
    rows = _call(suite, "index", "--method", "airrep:store=int8", "--method", "airrep")["rows"]
    sizes = {r["method"]: r["bytes"] for r in rows}
    assert sizes["airrep store=int8"] < sizes["airrep"]
    words = ["study", "ordering", "--suite", str(suite / "suite.toml"), "--target", "one"]
    text = CliRunner().invoke(airrep, [*words, "--method", "tfidf", "--replicates", "20"])
    head, row = text.stdout.splitlines()
    assert head.split()[:3] == ["method", "bytes", "pooling"]
    assert row.startswith("tfidf")


def test_transfer_study(suite: Path) -> None:
    rows = _call(suite, "transfer", "--method", "airrep", "--method", "graddot")["rows"]
    assert [(r["truth of"], r["built on"], r["method"]) for r in rows] == [
        ("one", "one", "airrep"),
        ("one", "one", "graddot"),
        ("two", "one", "airrep"),
        ("two", "one", "graddot"),
        ("two", "two", "graddot"),  # it has no encoder of its own
    ]


def test_group_size_study(suite: Path, tmp_path: Path) -> None:
    words = f"--fractions 0.25,0.5 --groups 3 --seeds 2 --work {tmp_path} --method tfidf".split()
    found = _call(suite, "group-size", *words)
    assert [r["group size"] for r in found["rows"]] == [8, 16]
    units = sorted(tmp_path.rglob("units/*.safetensors"))
    assert len(units) == 12
    times = [u.stat().st_mtime_ns for u in units]
    assert _call(suite, "group-size", *words) == found
    assert [u.stat().st_mtime_ns for u in units] == times  # nothing is retrained twice


def test_amortisation_study(suite: Path) -> None:
    rows = _call(suite, "amortisation", "--method", "graddot", "--repeats", "2")["rows"]
    record = read_json(suite / "encoder" / "airrep.json")
    assert rows[0]["prepare s"] == round(record["cost"]["seconds"])
    assert rows[1]["prepare s"] == 0
    assert record["cost"]["label_seconds"] == 24.0


def _work(suite: Path, work: Path) -> list[str]:
    return f"""--labels {suite}/labels.safetensors --teacher {suite}/teacher.safetensors
        --work {work}""".split()


def test_ablation_study(suite: Path, tmp_path: Path) -> None:
    found = _call(suite, "ablation", *_work(suite, tmp_path))
    rows = {r["encoder"]: r for r in found["rows"]}
    assert [*rows] == ["untrained", "start", "distilled", "ranked", "without attention", "full"]
    assert rows["full"]["difference"] is None
    assert rows["distilled"]["retrainings"] == 0
    assert rows["full"]["retrainings"] == rows["ranked"]["retrainings"] == 24
    # "full" is the suite's own encoder trained again: the same scores.
    own = _call(suite, "ordering", "--method", "airrep")["rows"][0]
    assert rows["full"]["lds"] == pytest.approx(own["lds"], abs=2e-3)
    # Trainings that begin alike share their beginning: two distillations less.
    assert len(list(tmp_path.glob("stage-*/airrep.json"))) == 6


def test_budget_study(suite: Path, tmp_path: Path) -> None:
    words = [*_work(suite, tmp_path), "--instances", "1,2", "--subsets", "4", "--steps", "1"]
    rows = _call(suite, "budget", *words)["rows"]
    assert [(r["start"], r["instances"], r["subsets"], r["retrainings"]) for r in rows] == [
        ("distilled", 0, 0, 0),
        ("distilled", 1, 4, 12),  # the held-out instance counts
        ("distilled", 2, 4, 16),
        ("untaught", 0, 0, 0),
        ("untaught", 1, 4, 12),
        ("untaught", 2, 4, 16),
    ]
    with pytest.raises(UsageError, match="cannot be cut"):
        _call(suite, "budget", *_work(suite, tmp_path), "--instances", "3", "--subsets", "4")


def test_studies_say_what_is_wrong(suite: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no truth 'loo'"):
        _call(suite, "pooling", "--truth", "loo")
    with pytest.raises(UsageError, match="not a list of numbers"):
        _call(suite, "pooling", "--temperatures", "a,b", "--method", "random")
    with pytest.raises(UsageError, match="at least two repeats"):
        _call(suite, "amortisation", "--repeats", "1")
    command = ["study", "amortisation", "--suite", str(suite / "suite.toml"), "--target", "two"]
    with pytest.raises(UsageError, match="no encoder for the target two"):
        CliRunner().invoke(airrep, command, catch_exceptions=False)
