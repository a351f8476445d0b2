"""Finds the corpus of a benchmark that needs planted examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from tdabench.benchmark import BenchmarkContext
from tdabench.data.examples import Corpus, Example
from tdabench.data.files import read_jsonl
from tdabench.errors import NotApplicable
from tdabench.method import Index


def planted(context: BenchmarkContext, asset: str, mark: str) -> tuple[Index, Corpus, Corpus]:
    """Returns index, training examples and queries of a benchmark that needs the field `mark`.

    The suite's asset of that name is a JSON Lines file with the splits `pool` and `queries`; the
    method is built on its pool. Their ids and order are neutral (`neutral`), so that neither tells
    a method which examples are planted. A suite whose own examples have the field needs no asset;
    its examples keep their ids and order. Raises DataError if there is neither.
    """
    if asset in context.assets:
        path = context.assets[asset]
        train = read_jsonl(path, "pool", f"{asset}-pool")
        queries = read_jsonl(path, "queries", f"{asset}-queries")
        _check(train, queries, mark, str(path))
        train, queries = neutral(train, "train"), neutral(queries, "query")
        return context.built_on(train).index, train, queries
    _check(context.train, context.queries, mark, "the suite's corpus")
    return context.index, context.train, context.queries


def neutral(corpus: Corpus, word: str) -> Corpus:
    """Returns a corpus ordered by hashes of the texts, with ids numbered in that order.

    The field `id` keeps the former id (`id_of`), which methods are not given.
    """

    def digest(e: Example) -> bytes:
        return hashlib.sha256(f"{e.prompt}\0{e.response}".encode("utf-8", "surrogatepass")).digest()

    ordered: Iterable[Example] = sorted(corpus, key=digest)
    renamed = (
        Example(f"{word}-{i:06d}", e.prompt, e.response, e.task, {**e.meta, "id": e.id})
        for i, e in enumerate(ordered)
    )
    return Corpus(renamed, corpus.name)


def id_of(example: Example) -> str:
    """Returns the id that an example has in its file."""
    return example.meta.get("id", example.id)


def _check(train: Corpus, queries: Corpus, mark: str, where: str) -> None:
    from tdabench.truth.plan import check_disjoint

    if not any(e.meta.get(mark) for e in train):
        raise NotApplicable(
            f"{where} has no training example with the field {mark!r}",
            "Give the suite an asset, or mark examples of its corpus (docs/benchmarks)",
        )
    check_disjoint(train, queries)
