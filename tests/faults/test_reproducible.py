"""The same suite on another number of processes or threads gives the same scores.

Processes change nothing, to the bit. Threads change the order of sums: scores agree to 1e-4 of the
largest. Batch sizes are tried in tests/toolkit, the engines of truth in tests/truth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tdabench.io import read_arrays
from tdabench.run import Options, Request, run

METHODS = ("tfidf", "logra")


def measured(
    suite: Path, out: Path, options: Options
) -> dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Record and arrays by method."""
    found = {}
    for r in run(Request(str(suite), METHODS), out, options).records:
        assert r["status"] == "ok", r["reason"]
        found[r["method"]["name"]] = r, read_arrays(out / "cells" / f"{r['key']}.safetensors")[0]
    return found


@pytest.mark.slow
def test_scores_do_not_depend_on_how_they_are_computed(toy_suite: Path, tmp_path: Path):
    plain = measured(toy_suite, tmp_path / "a", Options(jobs=1, threads=1))
    both = measured(toy_suite, tmp_path / "b", Options(jobs=2, threads=1))
    other = measured(toy_suite, tmp_path / "c", Options(jobs=2, threads=2))
    for name in METHODS:
        record, arrays = plain[name]
        assert both[name][0]["metrics"] == record["metrics"]
        assert both[name][0]["key"] == other[name][0]["key"] == record["key"]
        for key in arrays:
            np.testing.assert_array_equal(both[name][1][key], arrays[key], err_msg=name)
        top, again = arrays["top_score"], other[name][1]["top_score"]
        np.testing.assert_allclose(again, top, atol=1e-4 * np.abs(top).max(), err_msg=name)
        for metric, m in record["metrics"].items():
            if m["value"] is not None:  # eight groups: one swapped pair moves a rank correlation
                assert other[name][0]["metrics"][metric]["value"] == pytest.approx(
                    m["value"], abs=0.02
                ), (name, metric)
