"""The files that a suite declares, opened by name; which were used goes into the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from tdabench.errors import unknown
from tdabench.run.suite import Suite, SuiteTarget, truth_name
from tdabench.truth.store import Truth


class Inputs(Mapping[str, Path]):
    """Declared files by name, each checked against its hash when first requested.

    Records the name and content of every file requested, so that a record made with, for example,
    another encoder is not mistaken for this one's.
    """

    def __init__(self, suite: Suite, paths: Mapping[str, Path], kind: str) -> None:
        self.suite, self.paths, self.kind = suite, paths, kind
        self.used: dict[str, str] = {}

    def __getitem__(self, name: str) -> Path:
        path = self.paths[name]
        if f"{self.kind}:{name}" not in self.used:
            self.suite.verify(path)
            self.used[f"{self.kind}:{name}"] = self.suite.content(path)
        return path

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __contains__(self, name: object) -> bool:
        return name in self.paths

    def content(self, used: str) -> str:
        """Returns the present content of the input recorded as `kind:name`."""
        path = self.paths.get(used.partition(":")[2])
        return self.suite.content(path) if path is not None and path.exists() else ""


class OtherTruths:
    """Opens truths of the suite's other targets, for queries of one split."""

    def __init__(self, suite: Suite, declared: SuiteTarget, split: str) -> None:
        self.suite, self.declared, self.split = suite, declared, split
        self.files = Inputs(suite, declared.truths, f"truth@{declared.label}")

    def __call__(self, kind: str) -> Truth:
        name = truth_name(kind, self.split)
        if name not in self.files:
            raise unknown(f"truth of the target {self.declared.label}", name, self.files)
        found = Truth.load(self.files[name])
        found.check(self.suite.train, self.declared.target, self.declared.recipe_of(name))
        return found.for_queries(self.suite.queries(self.split).ids)
