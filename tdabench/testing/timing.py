"""A pytest plugin that times `build` and `score` of registered methods with pytest-benchmark.

In this repository: `pytest benchmarks/`. For your own plugin, without writing any code:

    pytest -p tdabench.testing.timing --pyargs tdabench.testing.time_methods \\
        --methods mine,tfidf --benchmark-json timing.json
    tdabench timing timing.json

Loading of the target's weights and a first call come before the clock starts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tdabench.data.examples import Corpus
    from tdabench.method import Context, Index, TDAMethod


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tdabench", "timing of methods")
    group.addoption("--methods", default="all", help="methods to time, as a,b  [all]")
    group.addoption("--sizes", default="200,1000", help="training corpus sizes  [200,1000]")
    group.addoption("--queries", default=50, type=int, help="queries to score  [50]")
    group.addoption("--suite", default="pocket", help="suite with corpus and target")
    group.addoption("--target", default=None, help="its target  [the main one]")
    group.addoption("--device", default="cpu", help="cpu, cuda …  [cpu]")
    group.addoption("--rounds", default=3, type=int, help="minimum number of rounds per call  [3]")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "timed" not in metafunc.fixturenames:
        return
    from tdabench.registry import registry

    option = metafunc.config.getoption
    known = registry()
    names = list(known.methods) if option("--methods") == "all" else option("--methods").split(",")
    try:
        sizes = [int(s) for s in option("--sizes").split(",")]
        methods = [known.method(n.strip()).cls.name for n in names]
    except Exception as e:
        raise pytest.UsageError(f"--methods or --sizes: {e}") from e
    cases = [(m, s) for m in methods for s in sizes]
    metafunc.parametrize("timed", cases, indirect=True, ids=[f"{m}-{s}" for m, s in cases])


@dataclass(frozen=True)
class Timed:
    """One method, and the part of the suite on which it is timed."""

    method: TDAMethod
    train: Corpus
    queries: Corpus
    context: Callable[[], Context]  # a new scratch folder each time
    rounds: int
    info: dict[str, Any]

    def build(self, context: Context) -> Index:
        return type(self.method)(**self.method.params).build(context, self.train)

    def saved_bytes(self, index: Index) -> int:
        """Returns the size on disk of the saved index, in bytes."""
        from tdabench.run.meter import folder_bytes

        with tempfile.TemporaryDirectory() as folder:
            index.save(Path(folder))
            return folder_bytes(Path(folder))


@lru_cache(maxsize=1)
def _suite(name: str, label: str | None) -> tuple[Any, Any]:
    from tdabench.run.sources import load_suite

    suite = load_suite(name, targets=(label,) if label else ())
    return suite, suite.target(label) if label else suite.main_targets[0]


@pytest.fixture
def timed(request: pytest.FixtureRequest, tmp_path: Path) -> Timed:
    """Returns the method and corpus size of this test; skips if the corpus is too small."""
    from tdabench.method import Context
    from tdabench.registry import registry

    name, size = request.param
    option = request.config.getoption
    suite, chosen = _suite(option("--suite"), option("--target"))
    if size > len(suite.train):
        pytest.skip(f"the suite {suite.name} has {len(suite.train)} training examples")
    method = registry().method(name).cls.from_params(suite.method_params.get(name, {}))
    assets = suite.assets_for(chosen)

    def context() -> Context:
        return Context(
            target=chosen.target,
            scratch=Path(tempfile.mkdtemp(dir=tmp_path)),
            device=option("--device"),
            assets={k: v for k, v in assets.items() if Path(v).exists()},
        )

    queries = suite.queries()[: option("--queries")]
    info = {
        "method": name,
        "params": {k: str(v) for k, v in method.params.items()},
        "suite": suite.name,
        "target": chosen.label,
        "n_train": size,
        "n_queries": len(queries),
        "device": option("--device"),
    }
    return Timed(method, suite.train[:size], queries, context, option("--rounds"), info)
