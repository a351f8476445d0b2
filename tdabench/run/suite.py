"""Suites: a corpus, targets with their truths, methods and benchmarks, as named in a TOML file.

`suite_file` reads and writes the file, `sources` fetches the files that it names. See
docs/suites.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tdabench.data.examples import Corpus
from tdabench.data.files import STREAM_BYTES, read_corpus
from tdabench.data.layouts import Reading
from tdabench.errors import DataError, UsageError, did_you_mean, unknown
from tdabench.io import fingerprint, sha256_file
from tdabench.targets.recipe import Recipe
from tdabench.targets.target import Target
from tdabench.toolkit.pipeline import PipelineName


@dataclass(frozen=True)
class PlanSpec:
    """The plan of a suite's truth: random groups of a fraction of the pool, seeds per group.

    With `leave_out`, the field that names an example's source, the groups are instead the pool
    without each source in turn, and the whole pool (`tdabench.data.origins`); `groups` is then the
    number of sources to leave out, those that most queries ask about, or 0 for every source.

    `recipe` overrides fields of `tdabench.targets.Recipe`; `start` is a checkpoint, or "scratch".
    `order` and `groups_of` are as in `tdabench.truth.TruthPlan.draw`.
    """

    groups: int
    fraction: float
    seeds: int
    queries: str = "test"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    start: str = "base"
    order: str = "own"
    groups_of: str = ""
    leave_out: str = ""


@dataclass(frozen=True)
class ImportSpec:
    """The reading of a truth of another project: arguments of `truth.exchange.import_truth`."""

    masks: str = ""
    values: str = ""
    left_out: bool = False


@dataclass(frozen=True)
class ExternalFile:
    """A file that a suite does not bring, as described there: approximate size and origin."""

    source: str
    bytes: int = 0
    about: str = ""


@dataclass(frozen=True)
class SuiteTarget:
    """A target as a suite declares it: its folder, its truths and its own assets."""

    label: str
    target: Target
    truths: Mapping[str, Path]
    assets: Mapping[str, Path]
    main: bool = False
    plans: Mapping[str, PlanSpec] = field(default_factory=dict)
    trained: str = ""  # the checkpoint that was trained on the suite's training corpus
    imports: Mapping[str, ImportSpec] = field(default_factory=dict)

    def recipe_of(self, truth: str) -> Recipe:
        """Returns the recipe of the truth of that name: the target's, unless its plan overrides
        it."""
        spec = self.plans.get(truth)
        return Recipe.of(spec.recipe, self.target.recipe) if spec else self.target.recipe


@dataclass(frozen=True)
class Variant:
    """A method, or a pipeline of methods, under a label, with the parameters of this row."""

    label: str
    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    pipeline: PipelineName | None = None


@dataclass(frozen=True)
class CorpusFiles:
    """Files and split names of the training pool, the queries and the tuning queries.

    `reading` defines how their rows become examples. A suite without queries can be traced in, and
    indexed, but not run.
    """

    train: tuple[Path, str | None]
    queries: tuple[Path, str | None] | None
    tuning_queries: tuple[Path, str | None] | None
    reading: Reading = field(default_factory=Reading)
    # Texts are joined and cut into pieces of so many tokens, so many rows at a time; 0: they stay.
    chunk_tokens: int = 0
    chunk_rows: int = 1000


@dataclass(frozen=True)
class Published:
    """A row that others published on this suite's truth; shown next to ours, never ranked.

    `ours` is the corresponding tdabench method, or ""; `target` the label of the target that it is
    about, by default the suite's first.
    """

    method: str
    value: float
    benchmark: str = "lds"
    ours: str = ""
    target: str = ""
    note: str = ""
    source: str = ""


@dataclass(frozen=True)
class Suite:
    """The checked contents of a suite file. Corpora and assets are read and hashed on use."""

    name: str
    version: int
    summary: str
    path: Path
    seeds: tuple[int, ...]
    corpus: CorpusFiles
    targets: tuple[SuiteTarget, ...]
    assets: Mapping[str, Path]
    hashes: Mapping[Path, str]
    default_methods: tuple[str, ...]
    method_params: Mapping[str, Mapping[str, Any]]
    variants: Mapping[str, Variant]
    tuned: Mapping[str, Mapping[str, Mapping[str, Any]]]
    default_benchmarks: tuple[str, ...]
    benchmark_params: Mapping[str, Mapping[str, Any]]
    fingerprint: str
    published: tuple[Published, ...] = ()
    fetched: bool = False  # whether any file is named by hub:, package: or model
    sources: Mapping[str, str] = field(
        default_factory=dict
    )  # source as named -> source as found, pinned
    missing: tuple[str, ...] = ()  # unavailable assets and targets, with reasons
    files: tuple[ExternalFile, ...] = ()

    def __hash__(self) -> int:
        return hash((self.path, self.fingerprint))

    @property
    def folder(self) -> Path:
        return self.path.parent

    # ------------------------------------------------------------------ targets

    def target(self, label: str) -> SuiteTarget:
        for t in self.targets:
            if t.label == label:
                return t
        for line in self.missing:
            if line.startswith(f"the target {label!r} is left out"):
                raise UsageError(line, f"See: tdabench suites check {self.name}")
        raise unknown(f"target of suite {self.name}", label, [t.label for t in self.targets])

    @property
    def main_targets(self) -> tuple[SuiteTarget, ...]:
        """The targets with `main = true`, or all if there are none."""
        return tuple(t for t in self.targets if t.main) or self.targets

    def assets_for(self, target: SuiteTarget) -> dict[str, Path]:
        """Returns assets by name; a target's assets override the suite's of the same name."""
        return {**self.assets, **target.assets}

    # ------------------------------------------------------------------ corpora

    @cached_property
    def _files(self) -> dict[Path, Corpus]:
        return {}

    def _corpus(self, role: str, source: tuple[Path, str | None], name: str) -> Corpus:
        (path, split), files = source, self.corpus
        self.verify(path)
        others = [s for s in (files.train, files.queries, files.tuning_queries) if s]
        reading = replace(files.reading, split=split)
        if not (path.is_file() and path.stat().st_size <= STREAM_BYTES):
            return read_corpus(path, reading, name, prefix=role)
        # Files with the same name in two folders must not give two examples the same id.
        clash = any(p != path and p.name == path.name for p, _ in others)
        if split is None or sum(p == path for p, _ in others) < 2:
            return read_corpus(path, reading, name, prefix=role if clash else "", stream=False)
        if path not in self._files:
            # Read once for any number of splits: the field is stored in `meta`.
            self._files[path] = read_corpus(path, files.reading, path.stem, stream=False)
        chosen = [e for e in self._files[path] if e.meta.get("split") == split]
        if not chosen:
            known = {e.meta.get("split", "") for e in self._files[path]} - {""}
            raise DataError(
                f"{path} has no example of the split {split!r}", did_you_mean(split, known)
            )
        return Corpus(chosen, name)

    @cached_property
    def train(self) -> Corpus:
        return self._corpus("train", self.corpus.train, f"{self.name}-train")

    @cached_property
    def _queries(self) -> dict[str, Corpus]:
        return {}

    def queries(self, split: str = "test") -> Corpus:
        """Returns the query examples: `test`, or `tuning` for choosing parameters."""
        source = {"test": self.corpus.queries, "tuning": self.corpus.tuning_queries}.get(split)
        if source is None:
            raise UsageError(
                f"suite {self.name} declares no {split} queries", "Name them in its [corpus]"
            )
        if split not in self._queries:
            role = "query" if split == "test" else split
            self._queries[split] = self._corpus(role, source, f"{self.name}-{split}")
        return self._queries[split]

    # ------------------------------------------------------------------ files

    def verify(self, path: Path) -> None:
        """Checks the declared hashes of a file, or of every file in a folder.

        Raises DataError naming the missing or altered file.
        """
        if not path.exists():
            raise DataError(
                f"suite {self.name}: {path} is missing",
                "Reinstall the package that contains the suite, or correct the path in its TOML",
            )
        for file in [p for p in self.hashes if p == path or path in p.parents]:
            if not file.exists():
                raise DataError(f"suite {self.name}: {file} is missing", "Reinstall the suite")
            found = sha256_file(file)
            if found != self.hashes[file]:
                raise DataError(
                    f"suite {self.name}: {file} is not the declared file (sha256 {found[:12]}, "
                    f"expected {self.hashes[file][:12]})",
                    "It is damaged or was altered: reinstall the suite, or correct its hash",
                )

    def content(self, path: Path) -> str:
        """Hashes the contents of a file, or of every file in a folder: 16 hex digits."""
        if not path.exists():
            self.verify(path)
        if path.is_file():
            return sha256_file(path)[:16]
        files = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        return fingerprint([[p.relative_to(path).as_posix(), sha256_file(p)] for p in files])


def truth_name(kind: str, split: str) -> str:
    """Returns a target's name for a kind of truth: `tuning` for tuning queries."""
    if split == "test":
        return kind
    return split if kind == "lds" else f"{split}-{kind}"
