"""AirRep (arXiv 2505.18513): a text encoder trained to predict what retraining shows.

`airrep` is the method.
"""

from __future__ import annotations

from collections.abc import Iterable

from tdabench.api import TDAMethod, hookimpl


@hookimpl
def tdabench_methods() -> Iterable[type[TDAMethod]]:
    from tdabench_airrep.method import AirRep

    return [AirRep]
