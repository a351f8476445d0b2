"""docs/plugins.md says what the code says, and its examples work."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

from tdabench.run import sandbox
from tdabench.testing import LAWS, check_method

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "plugins.md").read_text(encoding="utf-8")


def test_generated_parts_are_up_to_date():
    filled = runpy.run_path(str(DOCS / "generate.py"))["filled"]
    assert filled(PAGE) == PAGE, "run: python docs/generate.py"
    assert all(f"| `{name}` |" in PAGE for name in LAWS)
    assert filled(PAGE.replace("| `described` |", "| `gone` |")) == PAGE


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
