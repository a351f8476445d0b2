"""The method contract: `TDAMethod`, and the `Index` that it builds.

A method is a frozen dataclass: its fields are its parameters, and constructing it does no work.
`build` turns a training corpus into an `Index`; the index answers queries. Most methods map an
example to a vector and score by dot product: they subclass `RepresentationMethod`
(toolkit/representation.py) and write `encode`. See docs/plugins.md.

Scores are float32 `[query, train]`; positive means helpful: training on the example lowers the
query's loss.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from tdabench.data.behaviours import Behaviour, parts_of
from tdabench.data.examples import Example
from tdabench.errors import DataError, MissingAsset
from tdabench.groups import Groups, pool_scores
from tdabench.params import construct
from tdabench.rows import top_k_of
from tdabench.seeds import named_seed

if TYPE_CHECKING:
    import torch

    from tdabench.targets.target import Target

Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """Ignores progress."""


@dataclass(frozen=True)
class Context:
    """The resources of a method: the target, named randomness, a folder, files.

    A method writes only in `scratch`, never prints, reads no environment variable, seeds nothing
    globally and leaves the target's models unchanged. `progress("step", done, total)` reports how
    far it is, as often as it likes: the run shows it beside the method's name (a `total` of 0 is
    unknown).
    """

    target: Target
    scratch: Path
    seed: int = 0
    device: str = "cpu"
    assets: Mapping[str, Path] = field(default_factory=dict)
    progress: Progress = no_progress

    def rng(self, name: str) -> np.random.Generator:
        """Returns a numpy generator that depends only on the seed and on `name`."""
        return np.random.default_rng(named_seed(self.seed, name))

    def torch_generator(self, name: str) -> torch.Generator:
        """Returns the same as a CPU `torch.Generator`."""
        import torch

        return torch.Generator().manual_seed(named_seed(self.seed, name))

    def asset(self, name: str) -> Path:
        """Returns the file or folder that the suite provides under `name` (such as an encoder)."""
        if name not in self.assets:
            raise MissingAsset(name, self.assets)
        return self.assets[name]


class TDAMethod(ABC):
    """A training-data-attribution method: subclass it as a frozen, keyword-only dataclass.

    Class variables: `name` (what users type), `version` (increase it when scores change),
    `family` (for grouping in tables), `source` (paper), `summary` (one line). For `tdabench tune`:
    `grid` (values to try, by parameter) and `query_time` (parameters that do not affect the index,
    which are tried on an index that is built once).
    Examples come without task labels and further fields unless `reads_labels` says that the method
    is a control that looks at them.
    `expected_failures` maps a law of the conformance kit that the method breaks to the reason, and
    `check_settings` are parameters for `tdabench check` where the defaults would take minutes.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    family: ClassVar[str] = "other"
    source: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    expected_failures: ClassVar[Mapping[str, str]] = {}
    check_settings: ClassVar[Mapping[str, Any]] = {}
    grid: ClassVar[Mapping[str, tuple]] = {}
    query_time: ClassVar[tuple[str, ...]] = ()
    reads_labels: ClassVar[bool] = False

    @abstractmethod
    def build(self, context: Context, train: Sequence[Example]) -> Index:
        """Does all work that needs no query. Timed as the build phase."""

    @abstractmethod
    def load(self, context: Context, path: Path) -> Index:
        """Loads an index that `Index.save` wrote to the folder `path`."""

    def check_saved(self, path: Path, meta: Mapping[str, Any]) -> None:
        """Raises DataError unless `meta`, saved with the index at `path`, names this method.

        It holds the method's name as "method" and its version as "version".
        """
        name, version = meta.get("method"), meta.get("version")
        if (name, version) != (self.name, self.version):
            raise DataError(
                f"{path} is an index of {name} version {version}, not of {self.name} version "
                f"{self.version}",
                "Build it again",
            )

    def uses(self) -> Sequence[str]:
        """Returns the names of other methods that this one builds or loads (none by default).

        The process in which a method is measured imports its own plugin and the plugins of these.
        """
        return ()

    def prepare_cost(self, context: Context) -> Mapping[str, float] | None:
        """Returns the cost of work done once before any corpus (labels, encoder training), if any.

        Keys: `seconds`, `retrainings`; read from the asset's own record, never entered by hand.
        """
        return None

    @property
    def params(self) -> dict[str, Any]:
        """Resolved parameters: every field with its value."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Self:
        """Constructs the method from parameters by name, checking names and types.

        Strings are converted to the field's type (`"512"` to an int). Raises UsageError for an
        unknown name or an invalid value.
        """
        return construct(cls, params)


class Index(ABC):
    """A method's result on a training corpus; answers queries.

    It covers `n_train` examples; `pooling` and `temperature` define how example scores are combined
    into group scores. An index whose group scores are not a pooling of its example scores overrides
    `score_groups` and sets `pooling = "own"`.
    """

    n_train: int
    pooling: str = "sum"
    temperature: float = 1.0

    @abstractmethod
    def score(self, queries: Sequence[Example]) -> np.ndarray:
        """Computes attribution scores, float32 [query, train]."""

    def score_groups(self, queries: Sequence[Example], groups: Groups) -> np.ndarray:
        """Computes group scores, float32 [query, group]. A group of one equals `score`."""
        return pool_scores(self.score(queries), groups, self.pooling, self.temperature)

    def top_k(self, queries: Sequence[Example], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the k highest scores, float32 [query, k], and training indices, best first.

        Equal scores are ordered by training index.
        """
        return top_k_of(self.score(queries), k)

    def score_some(self, queries: Sequence[Example], candidates: np.ndarray) -> np.ndarray:
        """Computes the scores of some training examples per query, float32 [query, k].

        `candidates` are training indices [query, k], which differ by query. Equal to the same
        entries of `score`; an index that can do it in less time than all scores overrides it. The
        later stages of a pipeline are asked this way.
        """
        return np.take_along_axis(np.asarray(self.score(queries)), candidates, axis=1)

    def score_behaviours(
        self, behaviours: Sequence[Behaviour], groups: Groups | None = None
    ) -> np.ndarray:
        """Computes scores of behaviours, float32 [behaviour, train], or of `groups`
        [behaviour, group].

        A behaviour is a weighted sum of losses, and its score here the same sum of the scores of
        its examples: exact for every method that is linear in the query's loss, as scores by
        gradients are. An index that can do better for a set than average overrides this.
        """
        examples, weights = parts_of(behaviours)
        scores = self.score(examples) if groups is None else self.score_groups(examples, groups)
        return weights @ np.asarray(scores, dtype=np.float32)

    def score_words(
        self, behaviour: Behaviour, examples: Sequence[Example]
    ) -> list[np.ndarray] | None:
        """Computes a score for each word of training examples, float [word] each, or None.

        Words are runs without spaces of the prompt, then of the response
        (`tdabench.toolkit.words`). None, the default, says that the method cannot tell.
        """
        return None

    def score_query_words(self, behaviour: Behaviour, indices: Sequence[int]) -> np.ndarray | None:
        """Computes a score for each word of the query that is explained, float [word], or None.

        It says how much of the scores of the training examples at `indices` rests on the word.
        None, the default, says that the method cannot tell, and is the answer for a set of queries.
        """
        return None

    def warm_up(self, queries: Sequence[Example]) -> None:
        """Does once what only the first query would pay for, such as loading a model.

        It is called after loading and before query times count, with one query. Scores it, by
        default; an index whose score is a pass over the corpus overrides this and scores a few
        training examples.
        """
        self.score(queries)

    @abstractmethod
    def save(self, path: Path) -> None:
        """Writes the index into the folder `path`, which exists and is empty."""
