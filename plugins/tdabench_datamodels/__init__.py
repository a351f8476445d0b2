"""Datamodels: regression of retraining outcomes on membership in the training set.

Importing this package loads no torch.
"""

from tdabench.api import TDAMethod, hookimpl
from tdabench_datamodels.hybrid import Hybrid
from tdabench_datamodels.method import Datamodels


@hookimpl
def tdabench_methods() -> list[type[TDAMethod]]:
    return [Datamodels, Hybrid]
