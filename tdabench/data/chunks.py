"""Texts joined and cut into pieces of a fixed number of tokens, as language models are trained.

Follows the usual script for causal language modelling, which kronfluence's truth was made with:
rows are tokenised without special tokens and joined, a number of rows at a time; each such batch is
cut into pieces, and its remainder is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice


def token_chunks(
    texts: Iterable[str],
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    size: int,
    rows: int = 1000,
) -> Iterator[str]:
    """Yields the texts of pieces of `size` tokens; `rows` texts are joined at a time."""
    rest = iter(texts)
    while batch := list(islice(rest, rows)):
        ids = list(chain.from_iterable(encode(text) for text in batch))
        for start in range(0, len(ids) - size + 1, size):
            yield decode(ids[start : start + size])
