"""The bundled benchmarks, registered like the benchmarks of any plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdabench.hookspecs import hookimpl

if TYPE_CHECKING:
    from tdabench.benchmark import Benchmark


@hookimpl
def tdabench_benchmarks() -> list[type[Benchmark]]:
    from tdabench.benchmarks.behaviours import Behaviours
    from tdabench.benchmarks.classification import Classification
    from tdabench.benchmarks.cost import Cost
    from tdabench.benchmarks.filter import Filter
    from tdabench.benchmarks.lds import LDS
    from tdabench.benchmarks.loo import LOO
    from tdabench.benchmarks.noise import Noise
    from tdabench.benchmarks.removal import Removal
    from tdabench.benchmarks.selection import Selection
    from tdabench.benchmarks.sources import Sources
    from tdabench.benchmarks.tracing import Tracing
    from tdabench.benchmarks.transfer import Transfer

    return [
        LDS, Behaviours, LOO, Sources, Transfer, Selection, Removal, Filter, Classification,
        Tracing, Noise, Cost,
    ]  # fmt: skip
