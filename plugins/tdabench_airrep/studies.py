"""Studies: tables with intervals, each from scores taken once."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.api import (
    POOLINGS,
    Context,
    Corpus,
    Target,
    Truth,
    bootstrap_lds,
    pool_scores,
    registry,
)


@dataclass(frozen=True)
class Scored:
    """A method's example scores [query, train] and what they cost."""

    label: str
    scores: np.ndarray
    build_seconds: float
    query_seconds: float


def score(
    spec: str,
    params: dict[str, str],
    target: Target,
    train: Corpus,
    queries: Corpus,
    assets: dict[str, Path],
    say: Callable[[str], None],
) -> Scored:
    """Builds a method once and scores every query; seconds are processor time."""
    method = registry().method(spec).cls.from_params(params)
    label = spec + "".join(f" {k}={v}" for k, v in params.items())
    say(f"scoring by {label}")
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(target, Path(scratch), assets=assets)
        a = time.process_time()
        index = method.build(context, train)
        b = time.process_time()
        scores = index.score(queries)
        return Scored(label, scores, b - a, time.process_time() - b)


def pooling_table(
    scored: Sequence[Scored], truth: Truth, temperatures: Sequence[float], replicates: int = 400
) -> list[dict[str, Any]]:
    """LDS of each method under each pooling, with 95% intervals.

    A temperature counts in standard deviations of the method's scores, so that the same one means
    the same to methods of different scale; sum and mean have none. For groups of one size sum and
    mean are the same, and the mean is left out.
    """
    same_size = len(set(truth.groups.sizes.tolist())) == 1
    rows = []
    for s in scored:
        unit = float(s.scores.std()) or 1.0
        for pooling in POOLINGS:
            if pooling == "mean" and same_size:
                continue
            for t in temperatures if pooling.startswith("softmax") else (1.0,):
                f = pool_scores(s.scores, truth.groups, pooling, t * unit)
                found = bootstrap_lds(f, truth.values, replicates)
                low, high = np.quantile(found.both, [0.025, 0.975])
                rows.append(
                    {
                        "method": s.label,
                        "pooling": pooling,
                        "temperature": t if pooling.startswith("softmax") else None,
                        "lds": round(found.value, 4),
                        "low": round(float(low), 4),
                        "high": round(float(high), 4),
                    }
                )
    return rows


def crossover(
    prepare: float, build_a: float, build_b: float, n: int
) -> tuple[float, float, float | None]:
    """Seconds an example of A and B, and the corpus size from which A is cheaper in total.

    A costs `prepare` once and `build_a` for `n` examples, B nothing once and `build_b`. None when
    A is not cheaper an example.
    """
    a, b = build_a / n, build_b / n
    return a, b, prepare / (b - a) if b > a else None
