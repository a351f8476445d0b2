"""Noise: are planted bad examples found?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tdabench.benchmarks.base import Benchmark, BenchmarkContext, Metric, Outcome
from tdabench.benchmarks.common import metric, score_blocks
from tdabench.benchmarks.planted import planted
from tdabench.errors import DataError


@dataclass(frozen=True)
class Noise(Benchmark):
    """Finding planted examples, by average precision (DATE-LM, arXiv 2507.09424).

    Training examples carry `planted`: a kind of defect, or nothing. Queries carry it too:

    - A query *of* a kind (an answer in the unsafe style, say) looks for the examples that
      taught it: those of its kind should score highest. Also measured among look-alikes only
      (`lookalike` = the kind: benign examples of the same form), the homogeneous pair, where
      the form alone does not give them away.
    - A clean query with a task looks for what harms it: among the training examples of its
      task, those planted should score lowest.

    Per query, average precision with ties by expectation; then the mean over queries.
    `chance` is what constant scores get.
    """

    name: ClassVar[str] = "noise"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "average precision of finding planted wrong and unsafe examples"
    source: ClassVar[str] = "Jiao et al. 2025, arXiv 2507.09424"

    asset: str = "noise"
    replicates: int = 1000

    def run(self, context: BenchmarkContext) -> Outcome:
        from tdabench import stats

        index, train, queries = planted(context, self.asset, "planted")
        kind = np.array([e.meta.get("planted", "") for e in train])  # [train]
        form = np.array([e.meta.get("lookalike", "") for e in train])
        task = np.array(train.tasks)

        found: dict[str, list[float]] = {}
        values, chances, ids = [], [], []
        for rows, scores in score_blocks(index, queries, len(train)):
            for q, s in zip(queries[rows], scores):
                of = q.meta.get("planted", "")
                if of:
                    relevant, among, sign = kind == of, np.ones(len(train), dtype=bool), 1.0
                else:
                    relevant, among, sign = kind != "", task == q.task, -1.0
                if not (relevant & among).any() or (relevant | ~among).all():
                    continue  # nothing to find, or nothing else to choose
                ap = stats.average_precision(sign * s[among], relevant[among])
                name = of or "harmful"
                found.setdefault(name, []).append(ap)
                pair = relevant | (form == of)
                if of and (form == of).any():
                    same = stats.average_precision(s[pair], relevant[pair])
                    found.setdefault(f"{name}_homogeneous", []).append(same)
                values.append(ap)
                chances.append(stats.average_precision(np.zeros(among.sum()), relevant[among]))
                ids.append(q.id)
        if not values:
            raise DataError("no query has a planted example to find", "See docs/benchmarks/noise")
        boot = stats.bootstrap_queries(np.array(values), self.replicates)
        metrics = {
            "average_precision": metric(boot, clip=(0.0, 1.0)),
            "chance": Metric(float(np.mean(chances))),
        }
        for name, aps in sorted(found.items()):
            part = stats.bootstrap_queries(np.array(aps), self.replicates)
            metrics[f"average_precision_{name}"] = metric(part, clip=(0.0, 1.0))
        left = len(queries) - len(values)
        notes = [f"{left} queries have nothing planted to find"] if left else []
        return Outcome(
            primary="average_precision",
            metrics=metrics,
            per_query=np.array(values),
            query_ids=tuple(ids),
            replicates=boot.both,
            arrays=boot.arrays(),
            notes=tuple(notes),
        )
