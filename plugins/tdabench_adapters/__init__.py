"""Other attribution packages on the board, run by their own code: kronfluence, dattri and bergson.

Each is an optional extra. Importing this package loads none of them, nor torch.
"""

from tdabench.api import TDAMethod, hookimpl
from tdabench_adapters.bergson import BergsonGradDot
from tdabench_adapters.dattri import DattriTracIn, DattriTRAK
from tdabench_adapters.kronfluence import KronfluenceEKFAC


@hookimpl
def tdabench_methods() -> list[type[TDAMethod]]:
    return [KronfluenceEKFAC, DattriTracIn, DattriTRAK, BergsonGradDot]
