"""Environments in which packages are really installed, without touching the one tests run in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def clean_environment(**more: str) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("TDABENCH", "PYTEST", "PIP_"))}
    keep |= {"OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return {**keep, "COLUMNS": "200", **more}


def make_sandbox(folder: Path, *tools: str) -> dict[str, str]:
    """The variables of a virtual environment that sees this one's packages, tdabench among them.

    `pip install -e` goes into it and leaves no trace. Of the commands it has `tools`.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    site.mkdir(parents=True, exist_ok=True)
    own = sysconfig.get_path("purelib")
    (site / "parent.pth").write_text(f"import site; site.addsitedir({own!r})\n")
    bin_folder = folder / "bin"
    for tool in tools:
        module = {
            "tdabench": "from tdabench.cli import main",
            "pip": "from pip._internal.cli.main import main",
            "pytest": "from pytest import main",
        }[tool]
        script = bin_folder / tool
        script.write_text(f"#!{bin_folder}/python\nimport sys\n{module}\nsys.exit(main())\n")
        script.chmod(0o755)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    return clean_environment(PATH=path, VIRTUAL_ENV=str(folder), PIP_NO_BUILD_ISOLATION="0")


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory) -> dict[str, str]:
    return make_sandbox(tmp_path_factory.mktemp("venv"), "pip", "tdabench", "pytest")


@pytest.fixture
def new_sandbox(tmp_path) -> Callable[..., dict[str, str]]:
    """A function from commands to the variables of a sandbox of this test's own."""
    return lambda *tools: make_sandbox(tmp_path / "venv", *tools)


@pytest.fixture
def sources(tmp_path) -> Path:
    """What a release of tdabench is made of, in a folder that pip may build in."""
    root, copy = HERE.parents[1], tmp_path / "tdabench-sources"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "runs")
    for name in ("tdabench", "plugins"):
        shutil.copytree(root / name, copy / name, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Callable[..., dict[str, str]]:
    """A function from names of sample packages to variables of a process that has them."""

    def install(*names: str) -> dict[str, str]:
        target = tmp_path_factory.mktemp("site")
        for name in names:
            source = tmp_path_factory.mktemp("source") / name
            shutil.copytree(HERE / name, source)  # pip builds in the source folder
            subprocess.run(
                [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
                + ["--no-build-isolation", "--target", str(target), str(source)],
                check=True,
                env=clean_environment(),
                capture_output=True,
            )
        return clean_environment(PYTHONPATH=str(target))

    return install


@pytest.fixture(scope="session")
def tiny_suite_file(tmp_path_factory) -> Path:
    from tdabench.testing import tiny_suite

    return tiny_suite(tmp_path_factory.mktemp("tiny-suite"))
