"""The texts behind a run: query tasks, and the examples that a method ranks highest.

A run stores only ids. The texts come from its suite, and only if the corpus still has the
fingerprint that the records name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tdabench.data.examples import Corpus, Example
from tdabench.errors import TdabenchError
from tdabench.report.records import Run


@dataclass(frozen=True)
class Texts:
    """Queries by id and training examples by position; empty with a `reason` if unavailable."""

    queries: Mapping[str, Example] = field(default_factory=dict)
    train: Corpus | None = None
    reason: str = ""

    @property
    def tasks(self) -> dict[str, str]:
        return {i: e.task for i, e in self.queries.items() if e.task}


def load_texts(run: Run, suite: str | Path | None = None) -> Texts:
    """Loads the corpora of a run's records from `suite`, or from the suite that the run names."""
    request = run.manifest.get("request")
    asked = request.get("suite") if isinstance(request, Mapping) else None
    name = suite or asked or run.suite.get("name")
    if not name:
        return Texts(reason="the run does not name a suite")
    try:
        from tdabench.run.sources import load_suite

        loaded = load_suite(str(name))
        train = loaded.train
        corpora = [loaded.queries("test")]
        if loaded.corpus.tuning_queries is not None:
            corpora.append(loaded.queries("tuning"))
    except TdabenchError as e:
        return Texts(reason=str(e))
    wanted = {str(r.corpus.get(part)) for r in run.records for part in ("train", "queries")}
    queries = {e.id: e for c in corpora if c.fingerprint in wanted for e in c}
    if train.fingerprint not in wanted:
        return Texts(queries, None, f"the suite {name} now has another training corpus")
    return Texts(queries, train, "" if queries else f"the suite {name} now has other queries")
