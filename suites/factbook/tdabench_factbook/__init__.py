"""The suite `factbook`, a separate distribution: its data do not fit into tdabench's wheel."""

from __future__ import annotations

from pathlib import Path

from tdabench.api import hookimpl


@hookimpl
def tdabench_suites() -> list[Path]:
    """Returns the suite file next to this file."""
    return [Path(__file__).parent / "suite.toml"]
