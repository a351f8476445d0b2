"""Every method that ships keeps the laws, and no plugin imports more than it may."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tdabench.registry import Registry
from tdabench.testing import parametrize_with_laws

ROOT = Path(__file__).parents[2]
ASSETS = {"airrep": ROOT / "tests/fixtures/airrep/checkpoint"}
# What takes a curvature product a query and step, a training run or a matrix of all weights.
# tests/plugins checks them, with some of the laws; `tdabench check NAME` runs all.
SLOW = ("arnoldi", "cg", "explicit", "lissa", "magic", "source")
OTHERS = "package"  # the family of adapters: tests/plugins/test_adapters.py
SHIPPED = [  # with the settings that `tdabench check` takes
    entry.cls.from_params(entry.cls.check_settings)
    for name, entry in Registry().methods.items()
    if entry.origin.distribution == "tdabench" and name not in SLOW and entry.cls.family != OTHERS
]


@parametrize_with_laws(SHIPPED, assets=ASSETS)
def test_shipped_methods_keep_the_laws(method, law):
    law(method)


def test_something_ships():
    names = {m.name for m in SHIPPED}
    assert {"tfidf", "bm25", "ngram", "dsir", "hidden", "embedding"} <= names
    assert {"random", "length", "gradnorm", "sametask"} <= names


@pytest.mark.parametrize(
    "file", sorted((ROOT / "plugins").rglob("*.py")), ids=lambda p: f"{p.parent.name}.{p.stem}"
)
def test_plugins_import_the_public_interface_only(file):
    own = file.relative_to(ROOT / "plugins").parts[0]
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or own, file
            imported.add(node.module or "")
    of_tdabench = {m for m in imported if m.split(".")[0] == "tdabench"}
    assert of_tdabench <= {"tdabench.api", "tdabench.testing"}
    of_others = {m for m in imported if m.startswith("tdabench_") and m.split(".")[0] != own}
    assert not of_others
