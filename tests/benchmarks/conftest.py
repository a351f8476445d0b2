"""A benchmark context without models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tdabench.benchmark import BenchmarkContext
from tdabench.data.examples import Corpus
from tdabench.errors import UsageError
from tdabench.method import Index
from tdabench.truth.store import Truth

sys.path.insert(0, str(Path(__file__).parent))  # for `constructed`, whatever the import mode


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., BenchmarkContext]:
    def make(
        index: Index, train: Corpus, queries: Corpus, truths: dict[str, Truth] | None = None,
        target: Any = None, **more: Any,
    ) -> BenchmarkContext:  # fmt: skip
        def truth(name: str) -> Truth:
            if name not in (truths or {}):
                raise UsageError(f"the suite declares no truth {name!r}")
            return (truths or {})[name]

        return BenchmarkContext(
            index=index, target=target, train=train, queries=queries, truth=truth,
            scratch=tmp_path, **more,
        )  # fmt: skip

    return make
