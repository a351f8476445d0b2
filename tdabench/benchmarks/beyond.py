"""The part of an LDS that tasks and common strings explain, and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tdabench.benchmark import BenchmarkContext, Outcome
from tdabench.benchmarks.common import metric
from tdabench.data.examples import Corpus
from tdabench.errors import DataError
from tdabench.groups import Groups
from tdabench.io import fingerprint, keep_arrays, kept_arrays
from tdabench.truth.store import Truth

if TYPE_CHECKING:
    import scipy.sparse as sp

VERSION = 1
NAME = "lds_beyond"


def known_ranks(context: BenchmarkContext, groups: Groups) -> np.ndarray:
    """Computes features of groups that need no model, as twice their average ranks over the groups.

    uint16 [feature, query, group]. Features: the number of the group's examples that have the
    query's task (where there are tasks), and the overlap of their responses' character trigrams
    with the query's, summed over the group. Computed once per run.
    """
    from tdabench.stats import average_ranks

    train, queries = context.train, context.queries
    key = fingerprint([VERSION, train.fingerprint, queries.fingerprint, groups.fingerprint])
    path = context.cache / f"beyond-{key}.safetensors" if context.cache else None
    if path is not None and path.exists():
        try:
            return kept_arrays(path)[0]["known"]
        except (DataError, KeyError):
            path.unlink(missing_ok=True)  # damaged: it is only a cache
    member = groups.membership(np.float64)  # [group, train]
    features = [trigram_overlap(train, queries, member)]
    if any(train.tasks) and any(queries.tasks):
        features.insert(0, own_task(train, queries, member))
    known = np.stack([(2 * average_ranks(f)).astype(np.uint16) for f in features])
    if path is not None:
        keep_arrays(path, {"known": known})
    return known


def own_task(train: Corpus, queries: Corpus, member: sp.csr_matrix) -> np.ndarray:
    """Counts the examples of each group that have the query's task: float64 [query, group]."""
    tasks = sorted({t for t in train.tasks if t})
    count = {t: member @ np.array([x == t for x in train.tasks], dtype=float) for t in tasks}
    none = np.zeros(member.shape[0])
    return np.stack([count.get(t, none) for t in queries.tasks])


def trigram_overlap(train: Corpus, queries: Corpus, member: sp.csr_matrix) -> np.ndarray:
    """Computes the Ochiai overlap of response trigrams, summed per group: float64 [query, group].

    |A & B| / sqrt(|A| |B|) for the sets A, B of character trigrams of two responses, lower-cased
    and with spaces collapsed.
    """
    place: dict[str, int] = {}
    a = _trigrams([e.response for e in train], place)
    b = _trigrams([e.response for e in queries], place)
    return np.asarray(_rows(b, len(place)) @ (_rows(a, len(place)).T @ member.T).toarray())


def _trigrams(texts: Sequence[str], place: dict[str, int]) -> list[list[int]]:
    out = []
    for text in texts:
        t = " ".join(text.lower().split())
        grams = sorted({t[i : i + 3] for i in range(len(t) - 2)})
        out.append([place.setdefault(g, len(place)) for g in grams])
    return out


def _rows(lists: Sequence[Sequence[int]], width: int) -> sp.csr_matrix:
    """A row of 1 / sqrt(number of terms) at each term: CSR [text, width]."""
    import scipy.sparse as sp

    sizes = np.array([len(x) for x in lists])
    data = np.repeat(1 / np.sqrt(np.maximum(sizes, 1)), sizes)
    indices = np.array([i for x in lists for i in x], dtype=np.int64)
    return sp.csr_matrix((data, indices, np.concatenate([[0], np.cumsum(sizes)])),
                         shape=(len(lists), max(1, width)))  # fmt: skip


def with_beyond(out: Outcome, truth: Truth, known: np.ndarray, replicates: int) -> Outcome:
    """Returns an outcome of LDS with the metric `lds_beyond`: the correlation given `known`.

    Scores and truth are ranked over the groups, what `known` [feature, query, group] explains
    linearly is taken from both, and the residuals are correlated; then the mean over queries.
    """
    from tdabench import stats

    boot = stats.bootstrap_partial(
        out.arrays["group_scores"], truth.values, known, replicates, tasks=out.arrays.get("task")
    )
    metrics = {**out.metrics, NAME: metric(boot, clip=(-1.0, 1.0))}
    return replace(out, metrics=metrics, arrays={**out.arrays, "known_ranks": known})
