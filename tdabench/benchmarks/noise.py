"""Noise: whether a method finds planted bad examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tdabench.benchmark import BenchmarkContext, Metric, Outcome
from tdabench.benchmarks.common import (
    Arrays,
    FromArrays,
    Texts,
    metric,
    outcome_of,
    pack,
    score_blocks,
    tasks_of,
    unpack,
)
from tdabench.benchmarks.planted import id_of, planted
from tdabench.errors import NotApplicable


@dataclass(frozen=True)
class Noise(FromArrays):
    """Finding planted examples, by average precision (DATE-LM, arXiv 2507.09424).

    The field `planted` of a training example names a kind of defect, or is empty. Queries have it,
    too:

    - A query *of* a kind (such as an answer in the unsafe style) searches for the examples that
      taught it: examples of its kind should score highest. This is also measured among look-alikes
      only (`lookalike` = the kind: benign examples of the same form), the homogeneous variant, in
      which the form alone does not reveal them.
    - A clean query with a task searches for the examples that harm it: among the training examples
      of its task, the planted ones should score lowest.

    The value is average precision per query, with ties by expectation, averaged over queries.
    `chance` is the value of constant scores.

    asset       name of the suite's asset with the examples, unless its corpus has the field
                `planted`
    replicates  bootstrap replicates behind each interval
    """

    name: ClassVar[str] = "noise"
    version: ClassVar[int] = 3
    summary: ClassVar[str] = "average precision in finding planted wrong and unsafe examples"
    source: ClassVar[str] = "Jiao et al. 2025, arXiv 2507.09424"
    kept: ClassVar[str] = r"places|among|is\[|task$"

    asset: str = "noise"
    replicates: int = 1000

    def run(self, context: BenchmarkContext) -> Outcome:
        from tdabench import stats

        index, train, queries = planted(context, self.asset, "planted")
        kind = np.array([e.meta.get("planted", "") for e in train])  # [train]
        form = np.array([e.meta.get("lookalike", "") for e in train])
        task = np.array(train.tasks)

        found: list[np.ndarray] = []  # a query's tie blocks among its candidates
        pairs: dict[str, list[np.ndarray]] = {}  # by kind: the same among look-alikes
        among_of, names, ids = [], [], []
        for rows, scores in score_blocks(index, queries, len(train)):
            for q, s in zip(queries[rows], scores):
                of = q.meta.get("planted", "")
                if of:
                    relevant, among, sign = kind == of, np.ones(len(train), dtype=bool), 1.0
                else:
                    relevant, among, sign = kind != "", task == q.task, -1.0
                if not (relevant & among).any() or (relevant | ~among).all():
                    continue  # nothing to find, or no other candidate
                found.append(stats.tie_blocks(sign * s[among], relevant[among]))
                pair = relevant | (form == of)
                if of and (form == of).any():
                    same = stats.tie_blocks(s[pair], relevant[pair])
                    pairs.setdefault(of, []).append(same)
                among_of.append(int(among.sum()))
                names.append(of or "harmful")
                ids.append(q.id)
        if not ids:
            raise NotApplicable(
                "no query has a planted example to find", "See docs/benchmarks/noise"
            )
        place = {q: i for i, q in enumerate(queries.ids)}
        tasks, few = tasks_of(queries.subset([place[i] for i in ids]))
        arrays = {**pack("places", found), "among": np.array(among_of), **tasks}
        for name in sorted(set(names)):
            arrays[f"is[{name}]"] = np.array(names) == name
        for of, blocks in pairs.items():
            arrays |= pack(f"places[{of}_homogeneous]", blocks)
        left = len(queries) - len(ids)
        notes = [f"{left} queries have no planted examples to find"] if left else []
        asked = tuple(id_of(queries[place[i]]) for i in ids)
        return self.outcome(arrays, asked, (*notes, *few))

    def outcome(self, arrays: Arrays, query_ids: Texts, notes: Texts = ()) -> Outcome:
        from tdabench import stats

        found = unpack("places", arrays)
        values = np.array([stats.precision_of(b) for b in found])
        chances = [
            stats.precision_of(np.array([[0, 0, n, b[:, 3].sum()]]))
            for n, b in zip(arrays["among"], found, strict=True)
        ]
        tasks = arrays.get("task")
        boot = stats.bootstrap_queries(values, self.replicates, tasks=tasks)
        metrics = {
            "average_precision": metric(boot, clip=(0.0, 1.0)),
            "chance": Metric(float(np.mean(chances))),
        }
        # Each kind by itself, and each against its look-alikes, with the queries it is asked by.
        parts = {
            k[3:-1]: (values[v.astype(bool)], v) for k, v in arrays.items() if k.startswith("is[")
        }
        for key in arrays:
            if key.startswith("places[") and key.endswith("]"):
                same = np.array([stats.precision_of(b) for b in unpack(key, arrays)])
                kind = key[len("places[") : -len("_homogeneous]")]
                parts[key[7:-1]] = (same, arrays[f"is[{kind}]"])
        for name, (aps, asked) in sorted(parts.items()):
            of = None if tasks is None else tasks[asked.astype(bool)]
            part = stats.bootstrap_queries(aps, self.replicates, tasks=of)
            metrics[f"average_precision_{name}"] = metric(part, clip=(0.0, 1.0))
        return outcome_of(metrics, values, boot, arrays, query_ids, notes)
