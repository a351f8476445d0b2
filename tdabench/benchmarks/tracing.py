"""Tracing: whether a method finds the training examples that state a fact asked by a query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tdabench.benchmark import BenchmarkContext, Metric, Outcome
from tdabench.benchmarks.common import (
    Arrays,
    FromArrays,
    Texts,
    blocks_of,
    metric,
    outcome_of,
    pack,
    tasks_of,
    unpack,
)
from tdabench.benchmarks.planted import id_of, planted
from tdabench.data.behaviours import Behaviour, behaviours_of
from tdabench.data.examples import Corpus, Example
from tdabench.errors import NotApplicable


@dataclass(frozen=True)
class Tracing(FromArrays):
    """Fact tracing (arXiv 2205.11482; tail-patch: TrackStar, arXiv 2410.17413).

    The field `fact` of training examples and queries holds one or more fact names, separated by
    spaces. An example supports a query if they share one. Values are the reciprocal rank of the
    first supporting example (`mrr`), the share of a query's supporting examples among the k best
    (`recall@k`: not the share of queries with a hit) and average precision; ties count by
    expectation. `tail_patch` is the decrease of the query's loss, in nats, after one optimizer step
    on its `tail_k` best examples together, minus the decrease after as many random ones; it is
    measured for the first `tail_queries` queries (0: not at all).

    `behaviours` names a field of queries (such as `fact`, several questions about one): queries
    with the same value are asked together, as one behaviour, and have no tail-patch.

    Lexical decoys share the query's words: `decoy` names the facts that an example was made to
    mimic, and `decoy_rate` is the share of queries whose best example is one of their decoys. A
    decoy that contains the fact's answer names the fact in `answers`. It is left out of the ranking
    of that query, since finding it is not clearly wrong. `mrr_with_answers` counts it as
    irrelevant, and `mrr_without_decoys` leaves out all decoys.

    asset         name of the suite's asset with the examples, unless its corpus has the field
                  `fact`
    k             numbers of best examples for `recall@k`
    tail_k        examples of a tail-patch
    tail_queries  queries with a tail-patch; 0: none
    behaviours    field of queries that are asked together; if empty, each query is asked alone
    start         checkpoint of the target for tail-patches
    lr            learning rate of tail-patches
    replicates    bootstrap replicates behind each interval
    """

    name: ClassVar[str] = "tracing"
    version: ClassVar[int] = 3
    summary: ClassVar[str] = "rank of the examples that state the fact a query asks for"
    source: ClassVar[str] = "Akyürek et al. 2022, arXiv 2205.11482; arXiv 2410.17413"
    kept: ClassVar[str] = "places|among|decoyed|tail_patch|task$"

    asset: str = "tracing"
    k: tuple[int, ...] = (10, 50)
    tail_k: int = 10
    tail_queries: int = 0
    behaviours: str = ""
    start: str = "base"
    lr: float = 1e-3
    replicates: int = 1000

    def run(self, context: BenchmarkContext) -> Outcome:
        from tdabench import stats

        index, train, queries = planted(context, self.asset, "fact")
        stated = [set(e.meta.get("fact", "").split()) for e in train]
        mimicked = [set(e.meta.get("decoy", "").split()) for e in train]
        answered = [set(e.meta.get("answers", "").split()) for e in train]
        by_fact: dict[str, list[int]] = {}
        for i, facts in enumerate(stated):
            for f in facts:
                by_fact.setdefault(f, []).append(i)

        asked, decoyed, among = [], [], []
        # A query's tie blocks: without what holds its answer, with it, and without any decoy.
        found: list[np.ndarray] = []
        found_all: list[np.ndarray] = []
        found_plain: list[np.ndarray] = []
        best: list[np.ndarray] = []
        sets: list[Behaviour] = []
        if self.behaviours:
            sets = behaviours_of(queries, self.behaviours)
        for rows, scores in blocks_of(index, sets, queries, len(train)):
            for at, s in zip(range(rows.start, rows.stop), scores):
                of = sets[at].examples if sets else (queries[at],)
                wanted = {f for e in of for f in e.meta.get("fact", "").split()}
                support = sorted({i for f in wanted for i in by_fact.get(f, [])})
                if not support:
                    continue
                relevant = np.zeros(len(train), dtype=bool)
                relevant[support] = True
                asked.append(at)
                decoys = np.array([bool(m & wanted) for m in mimicked]) & ~relevant
                counted = ~np.array([bool(a & wanted) for a in answered]) | relevant
                among.append(int(counted.sum()))
                found.append(stats.tie_blocks(s[counted], relevant[counted]))
                found_all.append(stats.tie_blocks(s, relevant))
                plain = counted & ~decoys
                found_plain.append(stats.tie_blocks(s[plain], relevant[plain]))
                top = counted & (s == s[counted].max())
                decoyed.append(float((decoys & top).sum() / top.sum()))
                best.append(np.argsort(-s, kind="stable")[: self.tail_k])
        if not asked:
            raise NotApplicable(
                "no query asks for a fact in the training examples", "See docs/benchmarks/tracing"
            )
        chosen = queries.subset(asked)
        if sets:  # examples in their place: the rest needs ids and tasks
            chosen = Corpus([Example(sets[i].id, sets[i].prompt, sets[i].response, sets[i].task)
                             for i in asked], "behaviours")  # fmt: skip
        tasks, few = tasks_of(chosen)
        arrays = {**pack("places", found), "among": np.array(among), **tasks}
        if any(mimicked):
            arrays["decoyed"] = np.array(decoyed)
            arrays |= pack("places_without_decoys", found_plain)
        if any(answered):
            arrays |= pack("places_with_answers", found_all)
        if self.tail_queries and not sets:
            tried = chosen[: self.tail_queries]
            arrays["tail_patch"] = self._tail_patch(context, train, tried, best)
        left = len(sets or queries) - len(asked)
        notes = [f"{left} queries ask for unstated facts: left out"] if left else []
        if sets:
            notes.append(f"queries of the same {self.behaviours!r} are asked together")
        return self.outcome(arrays, tuple(map(id_of, chosen)), (*notes, *few))

    def outcome(self, arrays: Arrays, query_ids: Texts, notes: Texts = ()) -> Outcome:
        from tdabench import stats

        found, tasks = unpack("places", arrays), arrays.get("task")
        rr = np.array([stats.reciprocal_of(b) for b in found])
        ap = np.array([stats.precision_of(b) for b in found])
        chances = [
            stats.reciprocal_of(np.array([[0, 0, n, b[:, 3].sum()]]))
            for n, b in zip(arrays["among"], found, strict=True)
        ]

        def again(values: np.ndarray) -> stats.Bootstrap:
            of = None if tasks is None else tasks[: len(values)]
            return stats.bootstrap_queries(values, self.replicates, tasks=of)

        boot = again(rr)
        metrics = {
            "mrr": metric(boot, clip=(0.0, 1.0)),
            "average_precision": metric(again(ap), clip=(0.0, 1.0)),
            "chance": Metric(float(np.mean(chances))),
        }
        for name in ("with_answers", "without_decoys"):
            if f"places_{name}" in arrays:
                other = [stats.reciprocal_of(b) for b in unpack(f"places_{name}", arrays)]
                metrics[f"mrr_{name}"] = metric(again(np.array(other)), clip=(0.0, 1.0))
        for k in self.k:
            recall = np.array([stats.recall_of(b, k) for b in found])
            metrics[f"recall@{k}"] = metric(again(recall), clip=(0.0, 1.0))
        if "decoyed" in arrays:
            rate = again(arrays["decoyed"])
            metrics["decoy_rate"] = metric(rate, higher_is_better=False, share=True)
        if "tail_patch" in arrays:
            metrics["tail_patch"] = metric(again(arrays["tail_patch"]), unit="nats")
        return outcome_of(metrics, rr, boot, arrays, query_ids, notes)

    def _tail_patch(
        self, context: BenchmarkContext, train: Corpus, queries: Corpus, best: list[np.ndarray]
    ) -> np.ndarray:
        """Computes the loss decrease after a step on the best examples, minus random: [query]."""
        from tdabench.seeds import named_seed
        from tdabench.targets.recipe import Recipe
        from tdabench.targets.training import finetune

        target = context.target
        recipe = Recipe(lr=self.lr, epochs=1, batch_size=self.tail_k, schedule="constant")
        rng = np.random.default_rng(named_seed(0, "tail-patch"))
        out = np.empty(len(queries))
        for q, query in enumerate(queries):
            asked = target.tokenize([query])
            after = []
            random = rng.choice(len(train), min(self.tail_k, len(train)), replace=False)
            for ids in (random, best[q]):
                model = target.fresh_model(self.start).to(context.device)  # type: ignore[arg-type]
                tokens = target.tokenize(train.subset(ids))
                finetune(model, tokens, recipe, 0, target.pad_id)
                after.append(float(target.losses(model, asked)[0]))
            out[q] = after[0] - after[1]
        return out
