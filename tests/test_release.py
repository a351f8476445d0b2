"""What CI and releases rely on: workflows, the lowest versions, the pre-commit hooks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FLOWS = {p.name: yaml.safe_load(p.read_text()) for p in (ROOT / ".github/workflows").glob("*.yml")}


def lowest(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "lowest.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_every_dependency_has_a_lowest_version(tmp_path):
    pinned = lowest().stdout.split()
    assert len(pinned) == len(PROJECT["dependencies"])
    for line, text in zip(pinned, PROJECT["dependencies"]):
        assert text.replace(" ", "").split(">=") == line.split("==")
    (tmp_path / "p.toml").write_text('[project]\ndependencies = ["numpy"]\n')
    assert "does not have the form" in lowest(str(tmp_path / "p.toml")).stderr


def test_ci_covers_every_python_that_is_declared():
    declared = {c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)}
    matrix = FLOWS["ci.yml"]["jobs"]["wheel"]["strategy"]["matrix"]
    assert set(matrix["python"]) == declared
    assert PROJECT["requires-python"] == f">={min(declared)}"
    assert matrix["include"] == [{"python": min(declared), "dependencies": "lowest"}]


@pytest.mark.parametrize("name", FLOWS)
def test_a_workflow_names_files_that_are_there_and_asks_for_little(name):
    flow = FLOWS[name]
    assert flow["permissions"] == {"contents": "read"}
    steps = [s for job in flow["jobs"].values() for s in job["steps"]]
    for said in (s["run"] for s in steps if "run" in s):
        for word in re.findall(r"(?:source/)?((?:tests|tools|\.ci)/[\w./]+)", said):
            assert (ROOT / word).exists(), f"{name}: {word}"
    assert not re.search(
        r"password:|[^-]token:|secrets\.", (ROOT / ".github/workflows" / name).read_text()
    )


def test_pre_commit_runs_what_ci_runs():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [h["id"] for h in repo["hooks"]] == ["ruff-check", "ruff-format", "mypy", "architecture"]
    for hook in repo["hooks"]:
        for word in re.findall(r"tests/\S+", hook["entry"]):
            assert (ROOT / word).exists()


@pytest.mark.parametrize("address", ["", "https://example.org/cpu"])
def test_make_names_the_light_installation_on_linux_without_a_gpu(address, tmp_path):
    """The recipe's first line runs; the rest is what pip would be called with."""
    command = ["make", "-n", "install", f"VENV={tmp_path}", f"CPU_INDEX={address}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said, _, rest = done.stdout.partition("; fi\n")
    assert (f"--extra-index-url {address} torch" in rest) == bool(address)
    hint = said[said.index("if [ ") :] + "; fi"
    places = tmp_path / "bin"
    places.mkdir()
    for name in ("uname", "sh"):
        (places / name).symlink_to(shutil.which(name))

    def shown() -> str:
        sh = [shutil.which("sh"), "-c", hint]
        done = subprocess.run(
            sh, capture_output=True, text=True, check=False, env={"PATH": str(places)}
        )
        return done.stderr

    assert ("CPU_INDEX=ADDRESS" in shown()) == (sys.platform == "linux" and not address)
    (places / "nvidia-smi").symlink_to(shutil.which("sh"))
    assert shown() == ""
