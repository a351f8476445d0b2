"""The benchmarks that tdabench brings, registered in the way any plugin's are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdabench.hookspecs import hookimpl

if TYPE_CHECKING:
    from tdabench.benchmarks.base import Benchmark


@hookimpl
def tdabench_benchmarks() -> list[type[Benchmark]]:
    from tdabench.benchmarks.lds import LDS

    return [LDS]
