"""Words of a report's examples and queries that carry scores, from the indices that runs kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tdabench.data.examples import Example
from tdabench.errors import TdabenchError
from tdabench.report.records import Run

SHOWN = 3  # most helpful examples per query and method whose words are shaded

Shares = dict[str, list[float]]  # of "prompt" and "response": a share of the highest per word
Key = tuple[str, str]  # (target, method)


@dataclass(frozen=True)
class WordScores:
    """Shares of words of one query, and of its most helpful examples by training index."""

    query: Shares | None
    examples: Mapping[int, Shares]


def shares(e: Example, scores: np.ndarray) -> Shares:
    """Returns what of the highest word score each word has, 0 for a negative one: scores [word]."""
    top = float(np.max(scores, initial=0.0))
    found = np.round(np.maximum(scores, 0.0) / top, 2) if top > 0 else np.zeros(len(scores))
    n = len(e.prompt.split())
    return {"prompt": found[:n].tolist(), "response": found[n:].tolist()}


def words_of_run(
    run: Run, queries: int, say: Callable[[str], None] = lambda line: None
) -> tuple[dict[Key, dict[str, WordScores]], list[str]]:
    """Returns word scores by (target, method) and query id, for the first `queries` test queries.

    Indices are those that the run kept; a missing one is built and kept in the cache. Also returns
    why methods or the whole run are left out.
    """
    from tdabench.run.plan import Request, plan_indices
    from tdabench.run.trace import trace

    if not run.ours:
        return {}, [f"{run.name}: words are shaded only for runs made here"]
    asked: Mapping[str, Any] = run.manifest.get("request") or {}
    out: dict[Key, dict[str, WordScores]] = {}
    notes = []
    targets = list(dict.fromkeys(str(r.target.get("label")) for r in run.records if r.ok))
    for label in targets:
        try:
            plan = plan_indices(Request(
                suite=str(asked.get("suite") or run.suite.get("name")),
                methods=tuple(asked["methods"]) if asked.get("methods") else None,
                targets=(label,), seeds=tuple(asked["seeds"]) if asked.get("seeds") else None,
                sets=tuple(asked.get("sets") or ()), device=str(asked.get("device") or "auto"),
            ))  # fmt: skip
            train = plan.suite.train
            if all(r.corpus.get("train") != train.fingerprint for r in run.records):
                raise TdabenchError(f"the suite {plan.suite.name} now has another training corpus")
            chosen = list(plan.suite.queries(str(asked.get("split") or "test"))[:queries])
        except TdabenchError as e:
            notes.append(f"{run.name}: words of {label} are not shaded: {e}")
            continue
        for found in trace(plan, chosen, SHOWN, [run.folder], say, words=SHOWN):
            if found.reason:
                notes.append(f"{run.name}: words of {found.label} are not shaded: {found.reason}")
            elif found.words or found.query_words:
                out[label, found.label] = {
                    q.id: WordScores(
                        shares(q, found.query_words[n]) if n in found.query_words else None,
                        {i: shares(train[i], s) for (m, i), s in found.words.items() if m == n},
                    )
                    for n, q in enumerate(chosen)
                }
    return out, notes


def merged(found: Sequence[dict[Key, dict[str, WordScores]]]) -> dict[Key, dict[str, WordScores]]:
    """Joins the word scores of several runs; later runs take precedence."""
    return {key: of for one in found for key, of in one.items()}
