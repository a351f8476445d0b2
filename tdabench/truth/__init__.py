"""Ground truth by retraining: plan, build, store, verify."""

from tdabench.truth.build import build, collect, finished
from tdabench.truth.plan import TruthPlan, Unit, check_disjoint
from tdabench.truth.store import Truth

__all__ = ["Truth", "TruthPlan", "Unit", "build", "check_disjoint", "collect", "finished"]
