"""Which words of a training example, or of a query, carry a score: what it loses without each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from tdabench.data.behaviours import Behaviour
from tdabench.data.examples import Example
from tdabench.method import Index

FILLER = "_"  # stands for the only word of a response, which a loss needs


def words_of(e: Example) -> list[str]:
    """Returns the words of prompt and response, in order: runs without spaces."""
    return [*e.prompt.split(), *e.response.split()]


def occluded(e: Example) -> list[Example]:
    """Returns the example without each of its words in turn, in the order of `words_of`.

    The only word of a response is replaced, not removed.
    """
    out: list[Example] = []
    for side in ("prompt", "response"):
        text = getattr(e, side)
        found = list(re.finditer(r"\S+", text))
        for m in found:
            left = f"{text[: m.start()].rstrip()} {text[m.end() :].lstrip()}".strip()
            if side == "response" and len(found) == 1:
                left = FILLER
            prompt, response = (left, e.response) if side == "prompt" else (e.prompt, left)
            out.append(Example(f"{e.id}~{len(out)}", prompt, response, e.task))
    return out


def word_scores(
    examples: Sequence[Example], score: Callable[[list[Example]], np.ndarray]
) -> list[np.ndarray]:
    """Returns a score for each word of each example, float64 [word]: what the example's score
    loses without it.

    `score` computes the scores of given training examples for one query: [example].
    """
    variants = [[e, *occluded(e)] for e in examples]
    flat = [v for part in variants for v in part]
    if not flat:
        return []
    found = np.asarray(score(flat), dtype=np.float64)
    ends = np.cumsum([len(part) for part in variants])[:-1]
    return [part[0] - part[1:] for part in np.split(found, ends)]


def query_word_scores(
    index: Index, behaviour: Behaviour, indices: Sequence[int]
) -> np.ndarray | None:
    """Returns a score for each word of a query, float64 [word].

    It is the decrease of the sum of the scores of the training examples at `indices` without the
    word. In a contrast only words of the explained response are left out, not of the other one.
    None for a set of queries, and where there are no examples.
    """
    own, _ = behaviour.sides
    if len(own) != 1 or not len(indices):
        return None
    weight = max(behaviour.weights)
    variants = [own[0], *occluded(own[0])]
    candidates = np.tile(np.asarray(indices, dtype=np.int64), (len(variants), 1))
    scores = np.asarray(index.score_some(variants, candidates), dtype=np.float64)
    found = weight * scores.sum(axis=1)
    return found[0] - found[1:]
