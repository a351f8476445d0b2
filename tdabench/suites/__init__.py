"""The suites that come with tdabench: a folder each with a suite.toml and its assets, or
a TOML file alone where everything comes from the hub or from packages.
"""

from __future__ import annotations

from pathlib import Path

from tdabench.hookspecs import hookimpl


@hookimpl
def tdabench_suites() -> list[Path]:
    """Every suite file in a folder, or alone, beside this file."""
    here = Path(__file__).parent
    return sorted([*here.glob("*/suite.toml"), *here.glob("*.toml")])
