"""Finds the corpus of a benchmark that needs planted examples."""

from __future__ import annotations

from tdabench.benchmark import BenchmarkContext
from tdabench.data.examples import Corpus
from tdabench.data.files import read_jsonl
from tdabench.errors import DataError
from tdabench.method import Index


def planted(context: BenchmarkContext, asset: str, mark: str) -> tuple[Index, Corpus, Corpus]:
    """Returns index, training examples and queries of a benchmark that needs the field `mark`.

    The suite's asset of that name is a JSON Lines file with the splits `pool` and `queries`; the
    method is built on its pool. A suite whose own examples have the field needs no asset.
    Raises DataError if there is neither.
    """
    if asset in context.assets:
        path = context.assets[asset]
        train = read_jsonl(path, "pool", f"{asset}-pool")
        queries = read_jsonl(path, "queries", f"{asset}-queries")
        _check(train, queries, mark, str(path))
        return context.built_on(train).index, train, queries
    _check(context.train, context.queries, mark, "the suite's corpus")
    return context.index, context.train, context.queries


def _check(train: Corpus, queries: Corpus, mark: str, where: str) -> None:
    from tdabench.truth.plan import check_disjoint

    if not any(e.meta.get(mark) for e in train):
        raise DataError(
            f"{where} has no training example with the field {mark!r}",
            "Give the suite an asset, or mark examples of its corpus (docs/benchmarks)",
        )
    check_disjoint(train, queries)
