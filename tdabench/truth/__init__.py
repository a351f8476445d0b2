"""Ground truth by retraining: plan, build, store, verify."""

from tdabench.truth.build import build, collect, finished, survey
from tdabench.truth.engines import Engine, InProcess, Pool, Ray
from tdabench.truth.plan import TruthPlan, Unit, check_disjoint
from tdabench.truth.smoothness import metasmoothness, seed_agreement, try_recipe
from tdabench.truth.stacked import Stacked
from tdabench.truth.store import Truth
from tdabench.truth.until import Reference, build_until, check_stop, parse_until

__all__ = [
    "Engine", "InProcess", "Pool", "Ray", "Reference", "Stacked", "Truth", "TruthPlan", "Unit",
    "build", "build_until", "check_disjoint", "check_stop", "collect", "finished",
    "metasmoothness", "parse_until", "seed_agreement", "survey", "try_recipe",
]  # fmt: skip
