"""The benchmark contract: a benchmark asks an index for scores and returns per-query values."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from tdabench.data.examples import Corpus
from tdabench.errors import UsageError
from tdabench.method import Index, Progress, no_progress
from tdabench.params import construct
from tdabench.seeds import named_seed

if TYPE_CHECKING:
    from tdabench.targets.target import Target
    from tdabench.truth.store import Truth


@dataclass(frozen=True)
class Metric:
    """One number of a benchmark, with its 95% interval and how to read it.

    Where queries carry tasks, `low` and `high` are for queries of new tasks, `tasks` is how many
    tasks they rest on, and `low_these_tasks` and `high_these_tasks` are for other queries of the
    same tasks. Without tasks `tasks` is None and the interval is for other queries.
    """

    value: float
    low: float | None = None
    high: float | None = None
    higher_is_better: bool = True
    unit: str = ""
    tasks: int | None = None
    low_these_tasks: float | None = None
    high_these_tasks: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class Outcome:
    """The result of a benchmark.

    `metrics[primary]` is the number on leaderboards. `per_query` [query] are its per-query values;
    `replicates` [replicate] are the primary metric in each bootstrap replicate, drawn with seeds
    that depend only on the benchmark's data, so that two methods' replicates are paired. `arrays`
    are stored with the record (scores from which the metric can be recomputed); `notes` are shown
    with the row ("3 queries with constant scores counted as 0").
    """

    primary: str
    metrics: Mapping[str, Metric]
    per_query: np.ndarray
    query_ids: tuple[str, ...]
    replicates: np.ndarray | None = None
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """An index built during a benchmark, and the cost of building it."""

    index: Index
    seconds: float
    peak_bytes: int
    index_bytes: int


@dataclass(frozen=True)
class BenchmarkContext:
    """The resources that the harness gives to a benchmark.

    `index` is the method's index on `train`, wrapped so that the harness meters every call.
    `truth(name)` opens a truth file of the suite, checked against corpus and target.
    `build(corpus)` builds the same method on another corpus, metered like a build phase.
    `other_truths` maps labels of the suite's other targets on the same corpus to such functions,
    which check the truth against that target. `assets` are the suite's files by name. `cache` is a
    folder that the cells of a run share; its files are named by everything they depend on.
    `progress("step", done, total)` reports how far it is. `params` are the benchmark's resolved
    parameters.
    """

    index: Index
    target: Target
    train: Corpus
    queries: Corpus
    truth: Callable[[str], Truth]
    scratch: Path
    seed: int = 0
    device: str = "cpu"
    params: Mapping[str, Any] = field(default_factory=dict)
    build: Callable[[Corpus], Built] | None = None
    other_truths: Mapping[str, Callable[[str], Truth]] = field(default_factory=dict)
    assets: Mapping[str, Path] = field(default_factory=dict)
    cache: Path | None = None
    progress: Progress = no_progress

    def built_on(self, corpus: Corpus) -> Built:
        """Calls `build(corpus)`; raises UsageError if the harness does not offer it."""
        if self.build is None:
            raise UsageError(
                "this benchmark builds the method on other corpora: not available here"
            )
        return self.build(corpus)

    def rng(self, name: str) -> np.random.Generator:
        """Returns a generator that depends only on the seed and on `name`."""
        return np.random.default_rng(named_seed(self.seed, name))


@dataclass(frozen=True)
class Stored:
    """The stored part of an outcome, for recomputing it without the method.

    `arrays` are the arrays of the outcome; `truth(name)` opens the truth that the record names, and
    `other_truth(label, name)` a truth of another target that the record names.
    """

    arrays: Mapping[str, np.ndarray]
    query_ids: tuple[str, ...]
    truth: Callable[[str], Truth]
    other_truth: Callable[[str, str], Truth]


class Benchmark(ABC):
    """Class variables: `name`, `version` (increase it when values change), `summary`, `source`.

    Subclass it as a frozen dataclass; its fields are the parameters that a suite may set.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    truth_kind: ClassVar[str | None] = None  # the truth that it needs, such as "lds"
    title: ClassVar[str] = ""  # what heads its column; by default its name
    headline: ClassVar[bool] = False  # whether boards open with it: it is measured first
    slow: ClassVar[bool] = False  # whether it trains models or builds further indices: last

    @abstractmethod
    def run(self, context: BenchmarkContext) -> Outcome:
        """Scores the queries through `context.index` and compares scores with the ground truth."""

    def asked(self, queries: Corpus) -> Corpus:
        """Returns the queries of a suite that it is measured on: all, by default."""
        return queries

    @property
    def params(self) -> dict[str, Any]:
        """Resolved parameters: every field with its value."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Self:
        """Constructs the benchmark from parameters by name, like `TDAMethod.from_params`."""
        return construct(cls, params)

    def recompute(self, stored: Stored) -> Outcome | None:
        """Recomputes the outcome from the stored arrays; `tdabench verify` compares the two.

        A benchmark whose `run` measures arrays and derives everything else from them in one
        function can call that function here. Returns None if the record does not store enough.
        """
        return None
