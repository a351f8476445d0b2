"""Influence functions: curvature of the training loss applied to whole query gradients.

Importing this package does not load torch; the methods load it when they build.
"""

from tdabench.api import TDAMethod, hookimpl
from tdabench_influence.bif import BIF
from tdabench_influence.datainf import DataInf
from tdabench_influence.daunce import Daunce
from tdabench_influence.ekfac import EKFAC, KFAC, EShampoo
from tdabench_influence.identity import Identity
from tdabench_influence.inverse import Arnoldi, ConjugateGradient, Explicit, LiSSA
from tdabench_influence.magic import MAGIC
from tdabench_influence.preconditioned import EKFACCG
from tdabench_influence.source import SOURCE, AdamSOURCE


@hookimpl
def tdabench_methods() -> list[type[TDAMethod]]:
    return [
        EKFAC, KFAC, EShampoo, Identity, DataInf, ConjugateGradient, LiSSA, Arnoldi, Explicit,
        EKFACCG, SOURCE, AdamSOURCE, MAGIC, BIF, Daunce,
    ]  # fmt: skip
