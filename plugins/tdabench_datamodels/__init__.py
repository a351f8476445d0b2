"""Datamodels: regression of outcomes of (simulated) retrainings on membership.

Importing this package loads no torch.
"""

from tdabench.api import TDAMethod, hookimpl
from tdabench_datamodels.ensemble import Ensemble
from tdabench_datamodels.hybrid import Hybrid
from tdabench_datamodels.method import Datamodels
from tdabench_datamodels.stride import STRIDE


@hookimpl
def tdabench_methods() -> list[type[TDAMethod]]:
    return [Datamodels, Hybrid, Ensemble, STRIDE]
