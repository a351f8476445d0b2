"""Gradient methods: dot products of (projected, preconditioned) per-example gradients.

Importing this package does not load torch; the methods load it when they build.
"""

from tdabench.api import TDAMethod, hookimpl
from tdabench_gradients.dda import DDA
from tdabench_gradients.dsdm import DsDm
from tdabench_gradients.forvalue import ForValue
from tdabench_gradients.graddot import GradCos, GradDot
from tdabench_gradients.grasp import GRASP
from tdabench_gradients.grass import FactGraSS
from tdabench_gradients.hiddengrad import HiddenGrad
from tdabench_gradients.less import LESS
from tdabench_gradients.logra import LoGra
from tdabench_gradients.lorif import LoRIF
from tdabench_gradients.tracin import TracIn
from tdabench_gradients.trackstar import TrackStar
from tdabench_gradients.trak import TRAK
from tdabench_gradients.traker import Traker


@hookimpl
def tdabench_methods() -> list[type[TDAMethod]]:
    return [
        GradDot,
        GradCos,
        HiddenGrad,
        ForValue,
        DDA,
        TracIn,
        LoGra,
        TRAK,
        Traker,
        DsDm,
        LESS,
        TrackStar,
        FactGraSS,
        GRASP,
        LoRIF,
    ]
