"""The whole plugin surface. A plugin is a module with some of these functions, marked
`@hookimpl` and registered under the entry point group `tdabench`.

    from tdabench.api import hookimpl

    @hookimpl
    def tdabench_methods():
        return [MyMethod]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    import click

    from tdabench.benchmark import Benchmark
    from tdabench.method import TDAMethod

F = TypeVar("F", bound=Callable[..., Any])

PROJECT = "tdabench"
hookspec = pluggy.HookspecMarker(PROJECT)
_hookimpl = pluggy.HookimplMarker(PROJECT)


def hookimpl(function: F) -> F:
    """Marks a function as the plugin's implementation of the hook of the same name."""
    return _hookimpl(function)


@hookspec
def tdabench_methods() -> Iterable[type[TDAMethod]]:  # type: ignore[empty-body]
    """Returns the plugin's method classes. Called once, when methods are listed or run."""


@hookspec
def tdabench_benchmarks() -> Iterable[type[Benchmark]]:  # type: ignore[empty-body]
    """Returns the plugin's benchmark classes."""


@hookspec
def tdabench_suites() -> Iterable[Path]:  # type: ignore[empty-body]
    """Returns paths of the plugin's suite files (TOML)."""


@hookspec
def tdabench_commands(cli: click.Group) -> None:
    """Adds commands to the command line: `cli.add_command(my_command)`."""


@hookspec
def tdabench_record(record: dict[str, Any], folder: Path) -> None:
    """Receives every finished cell: its record, and the run folder that contains it.

    For loggers and dashboards. An observer that raises is reported and does not stop the run.
    """
