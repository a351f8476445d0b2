"""The suites that come with tdabench: one folder each, with a suite.toml and its assets."""

from __future__ import annotations

from pathlib import Path

from tdabench.hookspecs import hookimpl


@hookimpl
def tdabench_suites() -> list[Path]:
    """Every suite.toml that lies beside this file."""
    return sorted(Path(__file__).parent.glob("*/suite.toml"))
