"""Other attribution packages on the board: kronfluence, dattri and bergson, by their own code.

Each is an optional extra. Importing this package loads none of them, and no torch.
"""

from tdabench.api import TDAMethod, hookimpl
from tdabench_adapters.bergson import BergsonGradDot
from tdabench_adapters.dattri import DattriTracIn, DattriTRAK
from tdabench_adapters.kronfluence import KronfluenceEKFAC


@hookimpl
def tdabench_methods() -> list[type[TDAMethod]]:
    return [KronfluenceEKFAC, DattriTracIn, DattriTRAK, BergsonGradDot]
