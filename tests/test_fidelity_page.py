"""The fidelity table is what records say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def script() -> Any:
    spec = importlib.util.spec_from_file_location("fidelity", ROOT / "docs" / "fidelity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(label: str, lds: float, status: str = "ok", started: str = "1", **method: Any) -> dict:
    metrics = {
        "lds": {"value": lds, "low": lds - 0.1, "high": lds + 0.1},
        "ceiling": {"value": 0.8},
        "share_of_ceiling": {"value": lds / 0.8},
    }
    return {
        "benchmark": {"name": "lds"},
        "target": {"label": "tiny"},
        "method": {"label": label, "tuned": {}, "passed": {}, **method},
        "status": status,
        "started": started,
        "metrics": metrics if status == "ok" else {},
        "cost": {
            "build": {"seconds": 9.0, "cpu_seconds": 1.5},
            "query": {"seconds": 9.0, "cpu_seconds": 0.2, "queries": 100},
            "bytes_per_example": 1024.0,
        },
    }


def test_rows_are_ordered_and_what_has_no_result_is_named(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    cells.mkdir()
    made = [
        record("low", 0.1),
        record("high", 0.4, tuned={"temperature": 330.0}),
        record("low", 0.2, started="2"),  # the later one counts
        record("low", 0.9, "failed", started="3"),  # a failure does not undo a result
        record("broken", 0.0, "failed"),
        record("asked", 0.9, passed={"rank": 8}),  # not the suite's settings
    ]
    for i, r in enumerate(made):
        (cells / f"{i}.json").write_text(json.dumps(r))
    module = script()
    text = module.table(module.records([tmp_path]))
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    high = "| `high` | temperature=330 | 0.400 [0.300, 0.500] | 50% | 1.5 s | 2 ms | 1,024 |"
    assert rows[0] == high
    assert rows[1].startswith("| `low` | defaults | 0.200 [0.100, 0.300] | 25% |")
    assert len(rows) == 2
    assert "Without a result in these runs: `broken` (failed)." in text


def test_the_page_has_its_marks() -> None:
    module = script()
    text = module.PAGE.read_text(encoding="utf-8")
    assert module.BEGIN in text
    assert module.END in text
