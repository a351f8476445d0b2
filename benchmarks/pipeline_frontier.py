"""What a pipeline finds of its second stage's best examples, and at what share of its time.

    python benchmarks/pipeline_frontier.py [--first bm25,logra] [--second ekfac] [--repeat 10]
        [--queries 20] [--keep 200,1000,4000] [--json FILE]

The corpus is pocket's training pool, repeated. Both stages answer the same queries in this process,
the second alone first, then pipelines; all times are of one process, side by side. Agreement is the
share of a pipeline's 20 highest-scoring examples whose score by the second stage is at least that
stage's 20th highest (up to rounding: copies of a text tie).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from tdabench.data.examples import Corpus, Example
from tdabench.method import Context, Index
from tdabench.registry import registry
from tdabench.rows import is_sparse
from tdabench.run.plan import Request, plan_indices
from tdabench.toolkit.pipeline import PipelineIndex
from tdabench.toolkit.representation import RepresentationIndex

TOP = 20


def repeated(corpus: Corpus, times: int) -> Corpus:
    return Corpus(
        [
            Example(f"{e.id}-{i}", e.prompt, e.response, e.task)
            for i in range(times)
            for e in corpus
        ],
        f"{corpus.name} x {times}",
    )


def built(name: str, times: int, work: Path) -> Index:
    """Builds a method on pocket as it is tuned there, and repeats what it stored.

    A curvature or document frequencies are those of pocket: repeating a corpus changes neither.
    """
    plan = plan_indices(Request("pocket", (name,)))
    (job,) = plan.builds
    method = registry().method(job.method.name).cls.from_params(job.method.params)
    suite, scratch = plan.suite, work / name
    scratch.mkdir()
    assets = suite.assets_for(job.target)
    context = Context(job.target.target, scratch, assets=assets)
    index = method.build(context, suite.train)
    if isinstance(index, RepresentationIndex):
        rows = index.rows
        if is_sparse(rows):
            from scipy.sparse import vstack

            rows = vstack([rows] * times).tocsr()
        else:
            rows = np.tile(np.asarray(rows[:]), (times, 1))
        return RepresentationIndex(method, context, rows, index.state)
    return type(index)(method, context, list(repeated(suite.train, times)), index.state)


def timed(call) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found


def agreement(piped: np.ndarray, alone: np.ndarray) -> float:
    """Mean share of the pipeline's best that are among the best by the second stage alone."""
    shares = []
    for p, a in zip(piped, alone):
        bar = np.sort(a)[-TOP]
        best = np.argsort(-p, kind="stable")[:TOP]
        shares.append(np.mean(a[best] >= bar - 1e-3 * abs(bar)))
    return float(np.mean(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", default="bm25,logra")
    parser.add_argument("--second", default="ekfac")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--keep", default="200,1000,4000")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    queries = plan_indices(Request("pocket", ("bm25",))).suite.queries("test")
    step = max(1, len(queries) // args.queries)
    asked = queries.subset(range(0, step * args.queries, step))
    rows = []
    with tempfile.TemporaryDirectory() as work:
        second = built(args.second, args.repeat, Path(work))
        second.score_some(asked[:1], np.zeros((1, 1), dtype=np.int64))  # loads the model
        seconds, alone = timed(lambda: second.score(asked))
        n = alone.shape[1]
        print(f"{args.second} alone: {seconds:.2f} s for {len(asked)} queries on {n:,} examples",
              flush=True)  # fmt: skip
        for name in args.first.split(","):
            first = built(name, args.repeat, Path(work))
            first.score(asked[:1])
            for k in map(int, args.keep.split(",")):
                index = PipelineIndex([first, second], [k])
                took, piped = timed(lambda index=index: index.score(asked))
                row = {
                    "pipeline": f"{name}>{args.second}@{k}",
                    "agreement": round(agreement(piped, alone), 3),
                    "share_of_time": round(took / seconds, 3),
                    "seconds": round(took, 2),
                }
                rows.append(row)
                print(
                    f"{row['pipeline']:24} finds {row['agreement']:.2f} of the top {TOP} in "
                    f"{row['share_of_time']:.2f} of the time ({took:.2f} s)",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps({"n_train": n, "queries": len(asked), "alone": seconds,
                                         "rows": rows}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
