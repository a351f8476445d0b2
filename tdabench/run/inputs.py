"""The files that a suite declares, opened by name; which were used goes into the record."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tdabench.errors import unknown
from tdabench.io import fingerprint, sha256_kept
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


def pointed_at(method: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Returns the existing files and folders that a method's parameters name.

    `method` has its `name`, its `params` and the names `set` by the user or the suite, which do not
    include a plugin's defaults. The keys are "parameter:METHOD.NAME".
    """
    found = {}
    for name in method.get("set", ()):
        value = method["params"].get(name)
        places = [
            Path(v)
            for v in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(v, str) and os.path.isabs(v) and os.path.exists(v)
        ]
        if places:
            found[f"parameter:{method['name']}.{name}"] = places
    return found


def content_of(places: Iterable[Path]) -> str:
    """Hashes the contents of files and folders, in their order: 16 hex digits."""
    told = []
    for place in places:
        files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
        told.append([[p.relative_to(place).as_posix(), sha256_kept(p)] for p in files])
    return fingerprint(told)


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
