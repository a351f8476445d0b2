"""A tiny plan of six retrainings, its parts, and the truth that a serial build gives."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tdabench.targets import Recipe
from tdabench.truth import TruthPlan, build, collect

sys.path.insert(0, str(Path(__file__).parent))  # for killable.py, here and in processes

RECIPE = Recipe(lr=3e-3, epochs=1, batch_size=8)


@pytest.fixture(scope="package")
def parts(tiny_target, tiny_corpus, tiny_queries):
    return tiny_target, tiny_corpus, tiny_queries


@pytest.fixture(scope="package")
def plan(parts):
    return TruthPlan.draw("tiny", *parts, n_groups=3, fraction=0.25, n_seeds=2, recipe=RECIPE)


@pytest.fixture(scope="package")
def serial(plan, parts, tmp_path_factory):
    """The bytes of the truth file that an undisturbed build in this process ends in."""
    folder = tmp_path_factory.mktemp("serial")
    assert build(plan, *parts, folder) == []
    collect(plan, folder).save(folder / "truth.safetensors")
    return (folder / "truth.safetensors").read_bytes()


@pytest.fixture
def file_of(plan):
    """The bytes of the truth file that a build's folder gives."""

    def make(folder):
        collect(plan, folder).save(folder / "truth.safetensors")
        return (folder / "truth.safetensors").read_bytes()

    return make
