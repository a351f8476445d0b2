"""The bundled suites: a folder each with a suite.toml and its assets, or a single TOML file if all
files come from the hub or from packages.
"""

from __future__ import annotations

from pathlib import Path

from tdabench.hookspecs import hookimpl


@hookimpl
def tdabench_suites() -> list[Path]:
    """Returns every suite file next to this file, alone or in a folder."""
    here = Path(__file__).parent
    return sorted([*here.glob("*/suite.toml"), *here.glob("*.toml")])
