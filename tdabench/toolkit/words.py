"""Which words of a training example carry its score: what the score loses without each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from tdabench.data.examples import Example

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
