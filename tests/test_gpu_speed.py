"""The script of GPU measurements, as processes on the CPU with toy models."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_speed.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_speed", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_speed"] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module


def call(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *args], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "try.json"
    parts = ["gradients-bfloat16", "stacked", "paper-bfloat16", "tests"]
    done = call("--out", out, "--device", "cpu", "--tiny", "--parts", *parts)
    assert done.returncode == 0, done.stderr
    return out


def test_every_part_runs_to_its_end_on_a_cpu(tried: Path) -> None:
    found = json.loads(tried.read_text())
    assert {p["status"] for p in found["parts"].values()} == {"ok"}
    rates = found["parts"]["gradients-bfloat16"]["result"]["gradients"]
    assert len(rates) == 4
    assert all(r > 0 for r in rates.values())
    assert len(found["parts"]["stacked"]["result"]) == 2
    assert len(found["parts"]["paper-bfloat16"]["result"]) == 4
    tests = found["parts"]["tests"]["result"]
    assert tests["passed"] + tests["skipped"] > 60


def test_results_are_written_between_the_marks_of_a_page(tried: Path, tmp_path: Path) -> None:
    page = tmp_path / "speed.md"
    page.write_text((ROOT / "docs/speed.md").read_text())
    done = call("--write", tried, "--page", page)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "Toy models" in text
    for head in ("per-example gradients", "retrainings of", "shapes of the paper"):
        assert f"\n| {head}" in text.split("<!-- gpu:")[1].split("<!-- end of gpu -->")[0]
    assert "`tests/test_cuda.py`: " in text
    assert text.split("<!-- end of gpu -->")[1]  # the rest of the page stays


def test_toy_results_are_refused_by_the_documentation(tried: Path) -> None:
    before = (ROOT / "docs/speed.md").read_text()
    done = call("--write", tried)
    assert done.returncode == 1
    assert "not results" in done.stderr
    assert (ROOT / "docs/speed.md").read_text() == before


def test_a_device_that_is_not_there_is_said(tmp_path: Path) -> None:
    done = call("--out", tmp_path / "x.json", "--device", "cuda:63")
    assert done.returncode == 1
    assert done.stderr.startswith("no device cuda:63: ")
    assert "Traceback" not in done.stderr


def test_a_part_out_of_time_costs_only_itself(script: Any, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(script, "machine", lambda device: {})
    monkeypatch.setattr(script, "LEAST", 0.0)
    monkeypatch.setattr(script, "HERE", tmp_path)
    (tmp_path / "slow.py").write_text("import time; print('begun'); time.sleep(60)")
    (tmp_path / "bad.py").write_text("raise SystemExit('nothing to measure')")
    (tmp_path / "good.py").write_text(
        "import json, sys; json.dump({'a': 1}, open(sys.argv[-1], 'w'))"
    )
    parts = {n: script.Part(n, 2.0, f"{n}.py", "", "") for n in ("slow", "bad", "good")}
    monkeypatch.setattr(script, "PARTS", parts)
    failed = script.measure(tmp_path / "out.json", list(parts), "cpu", False, 60.0)
    assert failed == ["slow", "bad"]
    found = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert found["slow"]["status"] == "stopped after 2 s"
    assert found["bad"]["status"] == "failed (1): nothing to measure"
    assert found["good"]["result"] == {"a": 1}
    script.measure(tmp_path / "out.json", ["good"], "cpu", False, -1.0)
    found = json.loads((tmp_path / "out.json").read_text())["parts"]
    assert found["good"]["status"] == "not begun: the time was up"


def test_outcomes_are_counted_until_the_time_was_up(script: Any) -> None:
    text = (
        "tests/test_cuda.py::test_a[x 1] PASSED [ 1%]\n"
        "tests/test_cuda.py::test_b SKIPPED (why) [ 2%]\n"
        "tests/test_cuda.py::test_c FAILED [ 3%]\ntests/test_cuda.py::test_d "
    )
    assert script.outcomes(text) == {
        "passed": 1, "failed": 1, "error": 0, "skipped": 1, "names": ["test_c"],
    }  # fmt: skip


def test_the_scripts_know_every_argument_and_fit_the_time(script: Any) -> None:
    for part in script.PARTS.values():
        if part.script == "pytest":
            continue
        source = (ROOT / "benchmarks" / part.script).read_text()
        for flag in re.findall(r"--[a-z-]+", f"{part.arguments} {part.tiny} --device --json"):
            assert f'"{flag}"' in source, (part.script, flag)
    measured = [p.limit for p in script.PARTS.values() if p.script != "pytest"]
    assert sum(measured) <= 600
