"""Keeps third-party plugins out of this process; the command line turns it on.

A plugin that is not tdabench's own may quit, hang or print when it is imported. With `keeper` set,
discovery (`tdabench.registry`) has such plugins described by other processes and holds stand-ins
for their classes; without it, as in workers, tests and notebooks, it imports them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol


class Keeper(Protocol):
    """Holds the processes that import third-party plugins; see tdabench.run.third_party."""

    def describe(self, plugins: list[tuple[str, str]]) -> list[Mapping[str, Any] | str]:
        """Describes plugins, given as (name, module); for a failed one the result is the reason."""

    def construct(self, plugin: str, kind: str, name: str, params: Mapping[str, Any]) -> Any:
        """Returns the resolved parameters of a class. Raises UsageError if it refuses them."""

    def tell(self, plugin: str, module: str, record: Mapping[str, Any], folder: Path) -> str:
        """Sends a record to a plugin's observer; returns a complaint, or ""."""

    def close(self) -> None:
        """Ends every process."""


keeper: Callable[[Mapping[str, Any]], Keeper] | None = None  # from a registry's configuration
confined = True  # whether these processes are confined where the system can
