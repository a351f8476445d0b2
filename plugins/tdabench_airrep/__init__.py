"""AirRep (arXiv 2505.18513): a text encoder trained to predict the results of retraining.

`airrep` is the method; `tdabench airrep` makes labels and trains encoders and their variants.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tdabench.api import TDAMethod, hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def tdabench_methods() -> Iterable[type[TDAMethod]]:
    from tdabench_airrep.method import AirRep

    return [AirRep]


@hookimpl
def tdabench_commands(cli: click.Group) -> None:
    from tdabench_airrep.cli import airrep

    cli.add_command(airrep)
