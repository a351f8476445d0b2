"""docs/plugins.md says what the code says, and its examples work."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from tdabench.cli.methods import describe, example
from tdabench.registry import registry
from tdabench.run import sandbox
from tdabench.testing import LAWS, check_method

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "plugins.md").read_text(encoding="utf-8")


def test_generated_parts_are_up_to_date():
    filled = runpy.run_path(str(DOCS / "generate.py"))["filled"]
    assert filled(PAGE) == PAGE, "run: python docs/generate.py"
    assert all(f"| `{name}` |" in PAGE for name in LAWS)
    assert filled(PAGE.replace("| `described` |", "| `gone` |")) == PAGE


def test_the_api_reference_is_up_to_date():
    made = runpy.run_path(str(DOCS / "generate.py"))
    text = made["reference"]()
    assert text == made["API"].read_text(encoding="utf-8"), "run: python docs/generate.py"
    for name in made["public_names"]():
        assert text.count(f"### `{name}`\n") == 1, name
    assert "`built_on(corpus: Corpus) -> Built`: Calls `build(corpus)`" in text


def test_the_example_method_keeps_the_laws(tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    source = next(b for b in blocks if "class LastLayer" in b)
    (tmp_path / "last_layer_example.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import last_layer_example

    (cls,) = last_layer_example.tdabench_methods()
    results = {r.law: r for r in check_method(cls())}
    sys.modules.pop("last_layer_example")
    confined = results.pop("works-confined")
    assert confined.status == ("passed" if sandbox.abi() else "skipped")
    assert {r.status for r in results.values()} == {"passed"}


def test_the_figures_that_trace_quotes_are_those_of_the_fidelity_page():
    made = runpy.run_path(str(DOCS / "generate.py"))
    text = made["figures"](made["FIDELITY"].read_text(encoding="utf-8"))
    assert text == made["FIGURES"].read_text(encoding="utf-8"), "run: python docs/generate.py"
    figures = json.loads(text)
    assert {"instruct", "continued"} <= figures.keys()
    assert figures["instruct"]["random"]["share"] < 0.05 < figures["instruct"]["kfac"]["share"]


METHODS = registry().methods


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_of_a_bundled_method_is_described(name: str):
    shown = describe(METHODS[name])
    missing = [p["name"] for p in shown["parameters"] if not p["description"]]
    assert not missing, f"add lines `name  text` to the docstring of {METHODS[name].cls}"


def test_no_example_sets_a_parameter_to_its_default():
    """Neither of `tdabench methods NAME` nor on a page."""
    defaults = {
        f"{name}.{p['name']}": str(p["default"])
        for name, entry in METHODS.items()
        for p in describe(entry)["parameters"]
    }
    found = [example(describe(entry)) for entry in METHODS.values()]
    assert sum(map(bool, found)) > 10
    assert example(describe(METHODS["random"])) == ""
    root = DOCS.parent
    pages = [root / "README.md", *DOCS.rglob("*.md"), *(root / "tdabench").rglob("*.py")]
    text = "\n".join([*found, *(p.read_text(encoding="utf-8") for p in pages)])
    set_here = re.findall(r"--set ([a-z-]+\.\w+)=([^\s`'\")]+)", text)
    assert len(set_here) > 20
    assert [f"{p}={v}" for p, v in set_here if defaults.get(p) == v] == []
