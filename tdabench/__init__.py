"""tdabench: benchmarks for training-data attribution on language models.

`load_results(path)` reads results into a table: see docs/python.md.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tdabench.results.table import load_results

__version__ = "0.1.0"
__all__ = ["load_results"]

# Time that an idle thread of numpy's linear algebra spins before it sleeps: 2^20 cycles, not 2^26
# (0.03 s, during which it takes a core from other threads). Read when numpy is loaded.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")


def __getattr__(name: str) -> Any:
    if name == "load_results":  # loaded on use, since it needs numpy
        from tdabench.results.table import load_results

        return load_results
    raise AttributeError(f"module 'tdabench' has no attribute {name!r}")
