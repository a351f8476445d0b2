"""Ground truth by retraining: plan, build, store, verify."""

from tdabench.truth.build import build, collect, finished, survey
from tdabench.truth.engines import Engine, InProcess, Pool, Ray
from tdabench.truth.plan import TruthPlan, Unit, check_disjoint
from tdabench.truth.smoothness import metasmoothness, seed_agreement, try_recipe
from tdabench.truth.stacked import Stacked
from tdabench.truth.store import Truth

__all__ = [
    "Engine", "InProcess", "Pool", "Ray", "Stacked", "Truth", "TruthPlan", "Unit",
    "build", "check_disjoint", "collect", "finished", "metasmoothness", "seed_agreement", "survey",
    "try_recipe",
]  # fmt: skip
