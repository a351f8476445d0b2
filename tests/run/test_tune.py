"""Tuning finds the parameters that made a constructed truth, and touches no other truth."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tdabench.data import Corpus, Example
from tdabench.errors import GuardError, UsageError
from tdabench.groups import Groups, pool_scores
from tdabench.method import Context
from tdabench.registry import registry
from tdabench.run.sources import load_suite
from tdabench.run.tune import default_grid, tune, tuning_truth, with_tuned
from tdabench.truth import Truth


@pytest.fixture
def suite_file(make_suite, tiny_target, tiny_corpus, tiny_queries, tmp_path):
    """A suite whose tuning truth is exactly TF-IDF pooled by a softmax at temperature 0.05."""
    path = make_suite()
    tuning = Corpus(
        [Example(f"u{i}", f"{e.prompt} Now.", e.response, e.task)
         for i, e in enumerate(tiny_queries)], "u",
    )  # fmt: skip
    with open(path.parent / "corpus.jsonl", "a") as f:
        for e in tuning:
            f.write(json.dumps({"id": e.id, "prompt": e.prompt, "response": e.response,
                                "task": e.task, "split": "tuning"}) + "\n")  # fmt: skip
    text = path.read_text().replace(
        'queries = "test"', 'queries = "test"\ntuning_queries = "tuning"'
    )
    text = text.replace('lds = "truth.safetensors"', 'tuning = "tuning.safetensors"')
    path.write_text(text)
    method = registry().method("tfidf").cls()
    index = method.build(Context(tiny_target, tmp_path), tiny_corpus)
    groups = Groups.random(12, len(tiny_corpus), 0.25, np.random.default_rng(5))
    values = pool_scores(index.score(tuning), groups, "softmax", 0.05)
    plan = {"train": tiny_corpus.fingerprint, "target": tiny_target.fingerprint_of("base")}
    truth = Truth(-values.T[:, None, :], groups, tuple(tuning.ids), plan)
    truth.save(path.parent / "tuning.safetensors")
    return path


def test_the_parameters_behind_the_truth_are_found(suite_file):
    grid = {"pooling": ["sum", "softmax"], "temperature": [0.05, 1.0]}
    trials = tune(str(suite_file), None, "tfidf", grid)
    assert len(trials) == 3  # a temperature means nothing to a sum
    assert trials[0].params == {"pooling": "softmax", "temperature": 0.05}
    assert trials[0].lds == pytest.approx(1.0)
    assert trials[0].lds > trials[1].lds >= trials[2].lds


def test_auto_temperatures_follow_the_scale_of_the_scores(suite_file):
    grid = {"pooling": ["softmax"], "temperature": ["auto"]}
    found = [t.params["temperature"] for t in tune(str(suite_file), None, "tfidf", grid)]
    assert len(set(found)) == 5
    assert max(found) / min(found) == pytest.approx(100, rel=0.1)


def test_a_combination_that_fails_is_kept_with_its_reason(suite_file):
    trials = tune(str(suite_file), None, "logra", {"layers": ["no_such_layer", None]})
    assert len(trials) == 2
    assert not trials[0].error
    assert "no_such_layer" in trials[1].error


def test_parameters_of_query_time_are_tried_on_one_index(suite_file, monkeypatch):
    cls = registry().method("kfac").cls
    built, genuine = [], cls.build
    monkeypatch.setattr(cls, "build", lambda *a: built.append(a[0].damping) or genuine(*a))
    grid = {"damping": [-1.0, 0.1, 10.0], "pooling": ["sum"]}
    together = tune(str(suite_file), None, "kfac", grid)
    assert built == [0.1]  # -1 is no damping, and builds nothing
    assert "must not be negative" in together[-1].error
    alone = [tune(str(suite_file), None, "kfac", grid | {"damping": [d]})[0] for d in (0.1, 10.0)]
    assert sorted(t.lds for t in alone) == sorted(t.lds for t in together[:2])
    assert alone[0].lds != alone[1].lds


def test_every_bundled_method_has_a_grid_of_parameters_it_knows():
    for name, entry in registry().methods.items():
        assert set(default_grid(entry.cls)) <= set(entry.cls().params), name
        assert set(entry.cls.query_time) <= set(entry.cls().params), name


def test_without_a_tuning_truth_nothing_is_tuned(make_suite):
    path = make_suite()
    suite = load_suite(str(path))
    with pytest.raises(UsageError, match="no tuning truth"):
        tuning_truth(suite, suite.target("tiny"))


def test_unknown_parameters_are_named(suite_file):
    with pytest.raises(UsageError, match="temprature"):
        tune(str(suite_file), None, "tfidf", {"temprature": [1]})


def test_the_command_prints_the_lines_for_the_suite(suite_file):
    from click.testing import CliRunner

    from tdabench.cli.tune import command

    out = CliRunner().invoke(
        command,
        ["tfidf", "--suite", str(suite_file), "--grid", "pooling=sum,softmax",
         "--grid", "temperature=0.05"],
        catch_exceptions=False,
    )  # fmt: skip
    assert out.exit_code == 0
    table = '[tuned.tiny.tfidf]  # LDS on tuning 1.000\npooling = "softmax"\ntemperature = 0.05'
    assert table in out.stdout


def test_a_variant_is_tuned_and_written_into_the_suite(suite_file):
    from click.testing import CliRunner

    from tdabench.cli.tune import command

    rows = '[[methods.variants]]\nlabel = "flat one"\nmethod = "tfidf"\n'
    rows += "params = { sublinear = true }\n"
    suite_file.write_text(suite_file.read_text() + "\n# mine\n" + rows)
    words = ["flat one", "--suite", str(suite_file), "--grid", "pooling=sum,softmax", "--write"]
    for grid in (["--grid", "temperature=0.05"], ["--grid", "temperature=0.04"]):
        out = CliRunner().invoke(command, [*words, *grid], catch_exceptions=False)
        assert out.exit_code == 0
    suite = load_suite(str(suite_file))
    assert dict(suite.tuned["tiny"]["flat one"]) == {"pooling": "softmax", "temperature": 0.04}
    assert "# mine" in suite_file.read_text()
    assert suite.variants["flat one"].params == {"sublinear": True}
    (own,) = tune(str(suite_file), None, "flat one", {"pooling": ["softmax"]})
    (plain,) = tune(str(suite_file), None, "tfidf", {"pooling": ["softmax"], "temperature": [0.04]})
    assert own.lds != plain.lds  # its own parameters and tuned temperature hold
    with pytest.raises(UsageError, match="is the variant of tfidf whose sublinear is True"):
        tune(str(suite_file), None, "flat one", {"sublinear": [False]})


def test_a_tuned_table_is_replaced_and_nothing_else():
    text = (
        '# head\n\n[tuned.a.m]  # old\nx = 1\nplaces = ["q"]\n\n[tuned.a.mm]\nx = 3\n'
        '\n[hashes]\n"f" = "0"\n'
    )
    changed = with_tuned(text, "a", "m", {"x": 2, "on": True, "at": (1, 2)}, 0.5)
    assert changed == (
        "# head\n\n[tuned.a.m]  # LDS on tuning 0.500\nx = 2\non = true\nat = [1, 2]\n"
        '\n[tuned.a.mm]\nx = 3\n\n[hashes]\n"f" = "0"\n'
    )
    added = with_tuned(text, "a", "n", {"x": 2}, 0.5)
    assert added == text + "\n[tuned.a.n]  # LDS on tuning 0.500\nx = 2\n"


def test_tuning_on_test_queries_is_refused(suite_file):
    text = suite_file.read_text().replace('tuning_queries = "tuning"', 'tuning_queries = "test"')
    suite_file.write_text(text)
    suite = load_suite(str(suite_file))
    path = suite.targets[0].truths["tuning"]
    truth = Truth.load(path)
    Truth(truth.losses, truth.groups, tuple(suite.queries("test").ids), truth.plan).save(path)
    with pytest.raises(GuardError, match="is also a test query"):
        tune(str(suite_file), None, "tfidf", {"pooling": ["sum"]})


def test_tuning_on_the_groups_of_the_test_truth_is_refused(suite_file):
    suite = load_suite(str(suite_file))
    truth = Truth.load(suite.targets[0].truths["tuning"])
    ids = tuple(suite.queries("test").ids)
    losses = np.zeros((len(truth.groups), 1, len(ids)), dtype=np.float32)
    Truth(losses, truth.groups, ids, truth.plan).save(suite_file.parent / "test.safetensors")
    text = suite_file.read_text()
    both = 'lds = "test.safetensors"\ntuning = "tuning.safetensors"'
    suite_file.write_text(text.replace('tuning = "tuning.safetensors"', both))
    with pytest.raises(GuardError, match="has the groups of its truth 'lds'"):
        tune(str(suite_file), None, "tfidf", {"pooling": ["sum"]})
