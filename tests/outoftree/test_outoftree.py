"""Packages that know nothing of this repository, really installed by pip."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def env(installed):
    return installed("good", "broken")


def tdabench(env, *args, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "tdabench", *args], env=env, cwd=cwd, capture_output=True, text=True
    )


def test_the_good_plugin_is_listed_with_origin_and_version(env):
    done = tdabench(env, "plugins", "--json")
    assert done.returncode == 0
    plugins = {p["plugin"]: p for p in json.loads(done.stdout)}
    good = plugins["good"]
    assert (good["distribution"], good["version"]) == ("tdabench-good", "1.2.3")
    assert (good["status"], good["methods"]) == ("ok", ["shared-words"])
    assert (good["benchmarks"], good["suites"]) == (["spread"], ["lent"])
    broken = plugins["broken"]
    assert broken["status"] == "broken"
    assert "a_package_that_nobody_has" in broken["problems"][0]
    assert plugins["text"]["status"] == "ok"


def test_the_broken_plugin_only_warns(env):
    done = tdabench(env, "methods", "--json")
    assert done.returncode == 0
    assert {"shared-words", "tfidf"} <= {m["name"] for m in json.loads(done.stdout)}
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "broken (tdabench-broken 1.2.3)" in warnings[0]
    assert "Traceback" not in done.stderr
    quiet = tdabench({**env, "TDABENCH_DISABLE_PLUGINS": "broken"}, "methods")
    assert quiet.returncode == 0
    assert "warning" not in quiet.stderr


def test_its_command_and_its_laws(env):
    assert tdabench(env, "hello").stdout == "hello from tdabench-good\n"
    done = tdabench(env, "check", "shared-words", "--no-plugin", "broken")
    assert done.returncode == 0, done.stdout
    assert "25 passed" in done.stdout


def test_its_method_benchmark_and_observer_in_a_run(env, tiny_suite_file, tmp_path):
    done = tdabench(
        env,
        *("run", "--suite", str(tiny_suite_file), "--methods", "shared-words,tfidf"),
        *("--benchmarks", "spread", "--out", "out"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    cells = [json.loads(p.read_text()) for p in (tmp_path / "out/cells").glob("*.json")]
    assert sorted(c["method"]["name"] for c in cells) == ["shared-words", "tfidf"]
    assert {c["status"] for c in cells} == {"ok"}
    seen = json.loads((tmp_path / "out/seen-by-good.json").read_text())
    assert seen["status"] == "ok"


def test_its_method_is_timed_without_writing_anything(env, tiny_suite_file, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tdabench.testing.timing"]
        + ["--pyargs", "tdabench.testing.time_methods", "--methods", "shared-words"]
        + ["--suite", str(tiny_suite_file), "--sizes", "20,30,9999"]
        + ["--benchmark-json", "timing.json", "-p", "no:cacheprovider"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "4 passed, 2 skipped" in done.stdout
    rows = json.loads(tdabench(env, "timing", "timing.json", "--json", cwd=tmp_path).stdout)
    assert {(r["method"], r["n_train"], r["phase"]) for r in rows} == {
        ("shared-words", n, phase) for n in (20, 30) for phase in ("build", "query")
    }
    for r in rows:
        assert 0 < r["q1"] <= r["median"] <= r["q3"]
        # 300 float32 and a header shared by all
        assert r["phase"] == "query" or 1200 < r["bytes_per_example"] < 1400


def test_two_plugins_with_one_name(installed):
    env = installed("good", "twin")
    done = tdabench(env, "check", "shared-words")
    assert done.returncode == 2
    assert "good (tdabench-good 1.2.3) and twin (tdabench-twin 1.2.3)" in done.stderr
    assert "--no-plugin twin" in done.stderr
    assert tdabench(env, "check", "tfidf", "--law", "described").returncode == 0
    one = tdabench(env, "check", "shared-words", "--law", "described", "--no-plugin", "twin")
    assert one.returncode == 0
