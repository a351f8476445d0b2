"""`tdabench.api`: each name once, each name in use, and no torch until a name needs it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tdabench.api
from tdabench.toolkit import gradients

ROOT = Path(__file__).parents[1]
TREE = ast.parse(Path(tdabench.api.__file__).read_text())
LISTED = [
    (node.module, alias)
    for node in ast.walk(TREE)
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tdabench")
    for alias in node.names
    if alias.asname
]
EXPORTED = [alias.asname for _, alias in LISTED]


def imported(text: str) -> set[str]:
    """Names that a text imports from tdabench.api, whatever the text around."""
    found = re.findall(r"from tdabench\.api import (\([^)]*\)|[^\n]*)", text)
    return {name for names in found for name in re.findall(r"\w+", names)}


def used() -> set[str]:
    """Names that plugins, the templates of `tdabench new` or the authors' page use."""
    files = [*(ROOT / "plugins").rglob("*.py"), ROOT / "tdabench" / "cli" / "new.py"]
    files += [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    page = (ROOT / "docs" / "plugins.md").read_text()
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", page))))
    return named.union(*(imported(f.read_text()) for f in files))


def test_each_name_is_listed_once():
    assert len(set(EXPORTED)) == len(EXPORTED) > 50


@pytest.mark.parametrize("name", EXPORTED)
def test_every_exported_name_is_there_and_in_use(name: str):
    assert getattr(tdabench.api, name) is not None
    assert name in used(), f"no plugin, template or page for authors uses {name}: drop it"


def test_the_names_that_load_torch_come_late():
    late = {alias.asname for module, alias in LISTED if module == gradients.__name__}
    assert late == set(gradients.__all__)
    code = "import sys, tdabench.api; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'Tensor'"):
        tdabench.api.Tensor  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute '__path__'"):
        tdabench.api.__path__  # noqa: B018
