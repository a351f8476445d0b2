"""What a pipeline finds of its second stage's best examples, and at what share of its time.

    python benchmarks/pipeline_frontier.py [--first bm25,airrep] [--second ekfac] [--repeat 10]
        [--queries 6] [--keep 200,400] [--json FILE]

The corpus is pocket's training pool, repeated. Agreement is the share of a pipeline's 20
highest-scoring examples whose score by the second stage is at least that stage's 20th highest (up
to rounding: copies of a text tie). `needs` is the least number of candidates that hold 0.9 of the
second stage's 20 best, and therefore what an agreement of 0.9 takes.

All times are of one process, side by side. Pipelines are timed on the repeated corpus. The second
stage alone is timed on the pool once: its time for the queries does not depend on the corpus, and
the rest is a pass over it, counted as often as it is repeated (copies have equal scores). Times
are of all queries together and of one query; a pass serves all queries, but every query has
candidates of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tdabench.data.examples import Example
from tdabench.method import Context, Index
from tdabench.registry import registry
from tdabench.rows import is_sparse
from tdabench.run.plan import Request, plan_indices
from tdabench.toolkit.pipeline import PipelineIndex
from tdabench.toolkit.representation import RepresentationIndex

TOP = 20


def built(name: str, work: Path) -> Index:
    """Builds a method on pocket as it is tuned there."""
    plan = plan_indices(Request("pocket", (name,)))
    (job,) = plan.builds
    method = registry().method(job.method.name).cls.from_params(job.method.params)
    suite, scratch = plan.suite, work / name
    scratch.mkdir()
    context = Context(job.target.target, scratch, assets=suite.assets_for(job.target))
    return method.build(context, suite.train)


def again(index: Index, times: int) -> Index:
    """Repeats what an index stored, as if its corpus had held every example `times` times.

    A curvature or document frequencies stay: repeating a corpus changes neither.
    """
    if isinstance(index, RepresentationIndex):
        rows = index.rows
        if is_sparse(rows):
            from scipy.sparse import vstack

            rows = vstack([rows] * times).tocsr()
        else:
            rows = np.tile(np.asarray(rows[:]), (times, 1))
        return RepresentationIndex(index.method, index.context, rows, index.state)
    train = [e for corpus in [index.train] * times for e in corpus]
    return type(index)(index.method, index.context, train, index.state)


def timed(call) -> tuple[float, np.ndarray]:
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


def alone_for(index: Index, asked: Sequence[Example], times: int) -> tuple[float, np.ndarray]:
    """Times a stage alone on a corpus repeated `times` times: seconds, scores [query, train]."""
    one = np.zeros((len(asked), 1), dtype=np.int64)
    fixed, _ = timed(lambda: index.score_some(asked, one))
    whole, scores = timed(lambda: index.score(asked))
    return fixed + times * max(0.0, whole - fixed), np.tile(scores, (1, times))


def bars(alone: np.ndarray) -> np.ndarray:
    """Returns the TOP-th highest score of each query, less rounding: [query, 1]."""
    bar = np.sort(alone, axis=1)[:, -TOP]
    return (bar - 1e-3 * np.abs(bar))[:, None]


def agreement(piped: np.ndarray, alone: np.ndarray) -> float:
    """Mean share of the pipeline's best that are among the best by the second stage alone."""
    best = np.argsort(-piped, axis=1, kind="stable")[:, :TOP]
    return float((np.take_along_axis(alone, best, axis=1) >= bars(alone)).mean())


def needed(first: np.ndarray, alone: np.ndarray, share: float = 0.9) -> int:
    """Returns how many of the first stage's best hold `share` of the second's TOP best."""
    order = np.argsort(-first, axis=1, kind="stable")
    good = np.take_along_axis(alone >= bars(alone), order, axis=1)
    held = np.minimum(good.cumsum(axis=1), TOP).mean(axis=0) / TOP  # [k]
    return int(np.argmax(held >= share)) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", default="bm25,airrep")
    parser.add_argument("--second", default="ekfac")
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--queries", type=int, default=6)
    parser.add_argument("--keep", default="200,400")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    queries = plan_indices(Request("pocket", ("bm25",))).suite.queries("test")
    step = max(1, len(queries) // args.queries)
    asked = queries.subset(range(0, step * args.queries, step))
    rows = []
    with tempfile.TemporaryDirectory() as work:
        once = built(args.second, Path(work))
        once.score_some(asked[:1], np.zeros((1, 1), dtype=np.int64))  # loads the model
        seconds, alone = alone_for(once, asked, args.repeat)
        one, _ = alone_for(once, asked[:1], args.repeat)
        second, n = again(once, args.repeat), alone.shape[1]
        print(f"{args.second} alone: {seconds:.2f} s for {len(asked)} queries on {n:,} examples, "
              f"{one:.2f} s for one", flush=True)  # fmt: skip
        for name in args.first.split(","):
            first = again(built(name, Path(work)), args.repeat)
            needs = needed(np.asarray(first.score(asked)), alone)
            for k in map(int, args.keep.split(",")):
                index = PipelineIndex([first, second], [k])
                took, piped = timed(lambda index=index: index.score(asked))
                single, _ = timed(lambda index=index: index.score(asked[:1]))
                row = {
                    "pipeline": f"{name}>{args.second}@{k}",
                    "agreement": round(agreement(piped, alone), 3),
                    "share_of_time": round(took / seconds, 3),
                    "share_of_time_of_one": round(single / one, 3),
                    "seconds": round(took, 2),
                    "needs": needs,
                }
                rows.append(row)
                print(
                    f"{row['pipeline']:20} finds {row['agreement']:.2f} of the top {TOP} in "
                    f"{row['share_of_time']:.2f} of the time ({row['share_of_time_of_one']:.3f} "
                    f"for one query); 0.9 needs @{needs:,}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps({"n_train": n, "queries": len(asked), "alone": seconds,
                                         "alone_one": one, "rows": rows}, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
