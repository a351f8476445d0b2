"""What a benchmark is: it asks an index for scores and returns per-query values."""

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
    """One number of a benchmark, with its 95% interval and how to read it."""

    value: float
    low: float | None = None
    high: float | None = None
    higher_is_better: bool = True
    unit: str = ""

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class Outcome:
    """What a benchmark found.

    `metrics[primary]` is the number a leaderboard shows. `per_query` [query] are its per-query
    values; `replicates` [replicate] are the primary metric in each bootstrap replicate, drawn
    with seeds that depend on the benchmark's data only, so that two methods' replicates are
    paired. `arrays` go beside the record (scores from which the metric can be recomputed);
    `notes` are shown with the row ("3 queries with constant scores counted as 0").
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
    """An index built during a benchmark, and what building it cost."""

    index: Index
    seconds: float
    peak_bytes: int
    index_bytes: int


@dataclass(frozen=True)
class BenchmarkContext:
    """What the harness lends to a benchmark.

    `index` is the method's index on `train`, wrapped so that the harness meters every call.
    `truth(name)` opens a truth file the suite declares, checked against corpus and target.
    `build(corpus)` builds the same method on another corpus, metered as a build phase is.
    `other_truths[label](name)` opens a truth of another target of the suite, made on the same
    corpus and checked against it. `assets` are the suite's files by name. `cache` is a folder
    that the cells of a run share: what lies there is named by everything it depends on.
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
        """`build(corpus)`, or a UsageError where the harness offers none."""
        if self.build is None:
            raise UsageError("this benchmark builds the method on other corpora, not offered here")
        return self.build(corpus)

    def rng(self, name: str) -> np.random.Generator:
        """A generator that depends on the seed and on `name` only."""
        return np.random.default_rng(named_seed(self.seed, name))


@dataclass(frozen=True)
class Stored:
    """What a record keeps of an outcome, for computing it again without the method.

    `arrays` are those of the outcome, `truth(name)` opens the truth that the record names, and
    `other_truth(label, name)` that of another target, where the record names one.
    """

    arrays: Mapping[str, np.ndarray]
    query_ids: tuple[str, ...]
    truth: Callable[[str], Truth]
    other_truth: Callable[[str, str], Truth]


class Benchmark(ABC):
    """Class variables: `name`, `version` (raise it when values change), `summary`, `source`.

    Subclass as a frozen dataclass; fields are the parameters a suite may set.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    truth_kind: ClassVar[str | None] = None  # the suite's truth it needs, e.g. "lds"

    @abstractmethod
    def run(self, context: BenchmarkContext) -> Outcome:
        """Scores the queries through `context.index` and compares with what is known."""

    @property
    def params(self) -> dict[str, Any]:
        """Parameters as resolved: every field with its value."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Self:
        """Constructs the benchmark from parameters by name, as `TDAMethod.from_params` does."""
        return construct(cls, params)

    def recompute(self, stored: Stored) -> Outcome | None:
        """The outcome again, from what its record stores; `tdabench verify` compares the two.

        A benchmark whose `run` measures arrays and derives all else from them by one function
        gives its outcome again by calling that function. None where it does not store enough.
        """
        return None
