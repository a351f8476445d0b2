"""What `tdabench new` writes, and what it refuses."""

from __future__ import annotations

import ast
import os
import tomllib

import pytest
from click.testing import CliRunner

from tdabench.cli.new import LICENSES, command
from tdabench.errors import UsageError


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*args):
        return CliRunner().invoke(command, args, catch_exceptions=False, standalone_mode=False)

    return invoke


@pytest.mark.parametrize("kind", ["method", "benchmark"])
@pytest.mark.parametrize("licence", LICENSES)
def test_the_package_is_complete(invoke, tmp_path, kind, licence):
    said = invoke(kind, "my-idea", "--license", licence, "--author", "Ada L.").output
    folder = tmp_path / "tdabench-my-idea"
    assert "pip install -e tdabench-my-idea" in said
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["tdabench"] == {"my-idea": "tdabench_my_idea"}
    assert project["license"] == licence
    assert "Ada L." in (folder / "LICENSE").read_text()
    assert "my-idea" in (folder / "README.md").read_text()
    source = (folder / "src/tdabench_my_idea/__init__.py").read_text()
    assert len(source.splitlines()) < 40 or kind == "benchmark"
    classes = [n.name for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]
    assert classes == ["MyIdea"]
    assert list((folder / "tests").glob("test_*.py"))
    assert "$" not in source.replace("$/", "")


@pytest.mark.parametrize("name", ["My", "1st", "a_b", "-a", "a--b", "a b", "", "../x"])
def test_names_that_cannot_be(invoke, tmp_path, name):
    with pytest.raises(UsageError, match="is not a valid name for a method"):
        invoke("method", "--", name)
    assert not list(tmp_path.iterdir())


def test_a_taken_name_and_a_folder_in_use(invoke, tmp_path):
    with pytest.raises(UsageError, match=r"text \(tdabench .*\) already has .* 'tfidf'"):
        invoke("method", "tfidf")
    (tmp_path / "here").mkdir()
    invoke("method", "one", "--folder", "here")  # an empty folder is welcome
    before = sorted(p.name for p in (tmp_path / "here").iterdir())
    with pytest.raises(UsageError, match="is not empty"):
        invoke("method", "two", "--folder", "here")
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == before
    invoke("benchmark", "tfidf")  # methods and benchmarks have names of their own


def test_names_that_are_python_words(invoke, tmp_path):
    invoke("method", "none")
    source = (tmp_path / "tdabench-none/src/tdabench_none/__init__.py").read_text()
    assert "class None_(" in source
    compile(source, "none", "exec")


def workflows(folder):
    import yaml

    found = sorted((folder / ".github" / "workflows").glob("*.yml"))
    return {p.name: yaml.safe_load(p.read_text()) for p in found}


def test_a_method_brings_a_workflow_that_measures_it_and_a_badge(invoke, tmp_path):
    invoke("method", "my-idea")
    folder = tmp_path / "tdabench-my-idea"
    (flow,) = workflows(folder).values()
    said = [s.get("run", "") for s in flow["jobs"]["measure"]["steps"]]
    assert "tdabench run --methods my-idea,response-tfidf,random --benchmarks lds,cost" in said
    assert "tdabench board badge runs/pocket --method my-idea --out badge.svg" in said
    assert flow["permissions"] == {"contents": "read"}
    assert "badges/badge.svg" in (folder / "README.md").read_text()


def test_a_results_repository_checks_and_publishes(invoke, tmp_path):
    said = invoke("results", "tda-results").output
    folder = tmp_path / "tda-results"
    assert "tdabench submit runs/pocket --to tda-results" in said
    flows = workflows(folder)
    assert set(flows) == {"check.yml", "pages.yml"}
    check = flows["check.yml"]
    assert check["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in str(check)
    steps = " ".join(s.get("run", "") for s in check["jobs"]["check"]["steps"])
    assert "tdabench board check . --remeasure 2 --seed ${{ github.run_number }}" in steps
    with pytest.raises(UsageError, match="is not empty"):
        invoke("results", "tda-results")
    with pytest.raises(UsageError, match="not a valid name for a results repository"):
        invoke("results", "A b")


def test_a_suite_passes_its_own_tests_and_runs_at_once(invoke, tmp_path, monkeypatch, capsys):
    import subprocess
    import sys

    from tdabench.cli import main

    monkeypatch.setenv("TDABENCH_CACHE", str(tmp_path / "cache"))
    said = invoke("suite", "my-facts").output
    folder = tmp_path / "tdabench-my-facts"
    assert "tdabench run --suite src/tdabench_my_facts/suite.toml --benchmarks lds" in said
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["tdabench_my_facts"][0] == "*.toml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "src"), *sys.path])},
    )  # fmt: skip
    monkeypatch.chdir(folder)
    for line in said.splitlines()[2:-1]:  # every command that it names, as printed
        capsys.readouterr()
        assert main(line.split()[1:]) == 0, line
    assert "noise ceiling" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"already has .* 'pocket'"):
        invoke("suite", "pocket")
