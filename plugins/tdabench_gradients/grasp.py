"""GRASP-like: alignment of a group's mean feature with the query, less a quadratic penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.api import (
    Context,
    Example,
    Groups,
    Index,
    RepresentationMethod,
    TDAMethod,
    UsageError,
    read_arrays,
    read_settings,
    registry,
    row_blocks,
    write_arrays,
)
from tdabench_gradients.base import normalised

_SUMS = 256 << 20  # bytes of group means that are held at once


@dataclass(frozen=True, kw_only=True)
class GRASP(TDAMethod):
    """score(q, S) = phi_q . m_S - penalty / 2 |m_S|^2,   m_S = mean of phi_z over z in S.

    phi are the features of another method, scaled to length 1. The first term is additive; the
    second is a sum over pairs of members, phi_z . phi_z', and lowers the score of groups whose
    members repeat each other. It follows from the smoothness of the loss, by which a step along m_S
    helps q by at least phi_q . m_S less a multiple of |m_S|^2; with penalty = 1 the score is, up to
    a constant of the query, -|phi_q - m_S|^2 / 2, the residual of the query's feature. In the
    spirit of GRASP (arXiv 2606.06892), of which only the abstract was read.

    base      the method whose features are taken: logra, hiddengrad, hidden, … (a representation)
    settings  its parameters, as "damping=1,checkpoint=base"
    penalty   weight of the pairs; 0 is the mean of cosines
    """

    name = "grasp"
    family = "gradient"
    source = "in the spirit of Min et al. 2026 (GRASP), arXiv 2606.06892"
    summary = "mean alignment of a group less a penalty on pairs of members that repeat each other"
    grid = {"penalty": (0.0, 0.3, 1.0, 3.0), "settings": ("damping=0.1", "damping=1")}
    query_time = ("penalty",)

    base: str = "logra"
    settings: str = "damping=1"
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.penalty < 0:
            raise UsageError(f"{self.name}: penalty must not be negative, but is {self.penalty}")

    def based_on(self) -> RepresentationMethod:
        """Returns the base method. Raises UsageError for one without features."""
        given = read_settings(self.settings, self.name, "settings=damping=1,checkpoint=base")
        cls = registry().method(self.base).cls
        if not issubclass(cls, RepresentationMethod):
            raise UsageError(
                f"{self.name}: {self.base} has no features, since it is not a representation",
                "Choose another base: logra, hiddengrad, hidden",
            )
        return cls.from_params(given)

    def uses(self) -> Sequence[str]:
        return (self.base, *self.based_on().uses())

    def build(self, context: Context, train: Sequence[Example]) -> GRASPIndex:
        inner = self.based_on().build(context, train)
        blocks = [_unit(b) for _, b in row_blocks(inner.rows)]
        dim = inner.rows.shape[1]
        rows = np.concatenate(blocks) if blocks else np.zeros((0, dim), dtype=np.float32)
        return GRASPIndex(self, inner, rows)

    def load(self, context: Context, path: Path) -> GRASPIndex:
        arrays, meta = read_arrays(path / "rows.safetensors")
        self.check_saved(path, meta)
        inner = self.based_on().load(context, path / "base")
        return GRASPIndex(self, inner, arrays["rows"])


class GRASPIndex(Index):
    """`rows` [train, dim] of length 1, and the base's index, which computes query features."""

    pooling = "own"  # groups are not sums

    def __init__(self, method: GRASP, inner: Any, rows: np.ndarray) -> None:
        self.method, self.inner, self.rows = method, inner, rows
        self.n_train = len(rows)

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        out = self._features(queries) @ self.rows.T
        return out - self.method.penalty / 2 * np.square(self.rows).sum(1)

    def score_groups(self, queries: Sequence[Example], groups: Groups) -> np.ndarray:
        q = self._features(queries)
        member = groups.membership(np.float32)  # [group, train], sparse
        sizes = np.maximum(np.diff(groups.indptr), 1).astype(np.float32)
        out = np.zeros((len(queries), len(groups)), dtype=np.float32)
        step = max(1, _SUMS // (4 * max(1, self.rows.shape[1])))
        for a in range(0, len(groups), step):
            means = member[a : a + step] @ self.rows / sizes[a : a + step, None]  # [group, dim]
            penalty = self.method.penalty / 2 * np.square(means).sum(1)
            out[:, a : a + step] = q @ means.T - penalty
        return out

    def _features(self, queries: Sequence[Example]) -> np.ndarray:
        if not len(queries):
            return np.zeros((0, self.rows.shape[1]), dtype=np.float32)
        return _unit(self.inner.query_features(queries))

    def save(self, path: Path) -> None:
        (path / "base").mkdir()
        self.inner.save(path / "base")
        meta = {"method": self.method.name, "version": self.method.version}
        write_arrays(path / "rows.safetensors", {"rows": self.rows}, meta)


def _unit(features: Any) -> np.ndarray:
    """Scales rows to length 1, as dense float32."""
    dense = features.toarray() if hasattr(features, "toarray") else np.asarray(features)
    return normalised(dense.astype(np.float32)).astype(np.float32)
