"""The timed calls. Collected by `pytest benchmarks/` and by `--pyargs` (see timing.py)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tdabench.errors import MissingAsset, MissingExtra
from tdabench.run.meter import peak_bytes, reset_peak, resident_bytes
from tdabench.testing.timing import Timed


def peak_of(call: Callable[[], Any]) -> tuple[Any, int | None, float]:
    """Returns the result of `call`, the rise of resident memory, and seconds."""
    exact, before = reset_peak(), resident_bytes()
    start = time.perf_counter()
    result = call()
    spent = time.perf_counter() - start
    return result, max(0, peak_bytes() - before) if exact else None, spent


def rounds(timed: Timed, seconds: float) -> int:
    """Chooses the number of rounds: fast calls are timed for half a second to average out noise."""
    return max(timed.rounds, min(50, int(0.5 / max(seconds, 1e-9))))


def warmed(timed: Timed) -> tuple[Any, int | None, float]:
    """Builds twice (the first build loads libraries); returns the second index, peak and time."""
    try:
        timed.build(timed.context())
    except (MissingExtra, MissingAsset) as e:
        pytest.skip(str(e))
    return peak_of(lambda: timed.build(timed.context()))


def test_build(benchmark: Any, timed: Timed) -> None:
    """Times the build on the corpus."""
    index, peak, spent = warmed(timed)
    size = timed.saved_bytes(index)
    del index
    benchmark.group = f"build · {timed.info['n_train']} train"
    benchmark.extra_info.update(
        timed.info,
        phase="build",
        peak_bytes=peak,
        index_bytes=size,
        bytes_per_example=size / len(timed.train),
    )
    benchmark.pedantic(
        timed.build,
        setup=lambda: ((timed.context(),), {}),
        rounds=rounds(timed, spent),
        iterations=1,
    )


def test_query(benchmark: Any, timed: Timed) -> None:
    """Times scoring of all queries on the corpus."""
    index, _, _ = warmed(timed)
    scores, peak, spent = peak_of(lambda: index.score(timed.queries))
    assert scores.shape == (len(timed.queries), len(timed.train))
    benchmark.group = f"query · {timed.info['n_train']} train"
    benchmark.extra_info.update(timed.info, phase="query", peak_bytes=peak)
    benchmark.pedantic(
        index.score, args=(timed.queries,), rounds=rounds(timed, spent), iterations=1
    )
