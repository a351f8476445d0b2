"""GradDot and GradCos: inner product and cosine of loss gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tdabench.api import Role
from tdabench_gradients.base import GradientMethod, normalised


@dataclass(frozen=True, kw_only=True)
class GradDot(GradientMethod):
    """score(q, z) = g_q . g_z, where g is the gradient of the mean response-token loss.

    To first order, a step of gradient descent on z lowers the loss of q by lr * g_q . g_z.
    Random projections (`rank`) preserve the inner product in expectation; rank=none is exact.
    """

    name = "graddot"
    source = "Charpiat et al. 2019, arXiv 2102.05262; TracIn at one checkpoint, arXiv 2002.08484"
    summary = "inner product of loss gradients"
    grid = {"checkpoint": ("base", "warm")}


@dataclass(frozen=True, kw_only=True)
class GradCos(GradientMethod):
    """score(q, z) = g_q . g_z / (|g_q| |g_z|)."""

    name = "gradcos"
    source = "Charpiat et al. 2019, arXiv 2102.05262"
    summary = "cosine of loss gradients"
    grid = {"checkpoint": ("base", "warm")}

    def transform(self, features: Any, state: Mapping[str, np.ndarray], role: Role) -> Any:
        return normalised(np.asarray(features)).astype(np.float32, copy=False)
