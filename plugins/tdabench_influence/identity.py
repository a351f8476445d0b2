"""Influence with the identity as curvature: exact GradDot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tdabench.api import Context, Example
from tdabench_influence.streaming import Gradients, State, StreamingIndex, StreamingMethod

if TYPE_CHECKING:
    from tdabench.api import GradientEngine


@dataclass(frozen=True, kw_only=True)
class Identity(StreamingMethod):
    """score(q, z) = g_q . g_z with whole gradients: the baseline for curvature."""

    name = "identity"
    source = "TracIn at one checkpoint, arXiv 2002.08484"
    summary = "exact inner product of whole gradients"

    def fit(self, context: Context, engine: GradientEngine, train: Sequence[Example]) -> State:
        return {}

    def precondition(self, index: StreamingIndex, gradients: Gradients) -> Gradients:
        return gradients
