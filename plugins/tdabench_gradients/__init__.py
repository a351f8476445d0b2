"""Gradient methods: dot products of (projected, preconditioned) per-example gradients.

Importing this package loads no torch: the methods do when they build.
"""

from tdabench.api import TDAMethod, hookimpl
from tdabench_gradients.graddot import GradCos, GradDot
from tdabench_gradients.logra import LoGra
from tdabench_gradients.trak import TRAK
from tdabench_gradients.traker import Traker


@hookimpl
def tdabench_methods() -> list[type[TDAMethod]]:
    return [GradDot, GradCos, LoGra, TRAK, Traker]
