"""Constructed parts: an index that returns given scores, a corpus, a truth of given values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.data.examples import Corpus, Example
from tdabench.groups import Groups
from tdabench.method import Index
from tdabench.truth.store import Truth


@dataclass
class FixedIndex(Index):
    """Scores looked up by query id, so that permuted queries are scored alike."""

    table: np.ndarray  # [query, train]
    ids: list[str]
    pooling: str = "sum"
    temperature: float = 1.0

    @property
    def n_train(self) -> int:  # type: ignore[override]
        return self.table.shape[1]

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        return self.table[[self.ids.index(q.id) for q in queries]].astype(np.float32)

    def save(self, path: Path) -> None:
        raise NotImplementedError


def corpus(n: int, prefix: str, tasks: int = 2) -> Corpus:
    return Corpus(
        [
            Example(f"{prefix}{i}", f"{prefix} prompt {i}", f"answer {i}", f"task{i % tasks}")
            for i in range(n)
        ],
        prefix,
    )


def truth_of(values: np.ndarray, groups: Groups, ids: Sequence[str], **plan: Any) -> Truth:
    """From -loss [seed, query, group]."""
    losses = -np.asarray(values, dtype=np.float32).transpose(2, 0, 1)
    return Truth(losses, groups, tuple(ids), {"name": "lds", **plan})
