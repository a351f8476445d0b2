"""Pipelines: a cheap method keeps candidates for each query, and a costlier one scores them.

`bm25>ekfac@200` names a pipeline: the 200 training examples that bm25 scores highest for a query
are scored by ekfac. Further stages narrow further: `bm25>graddot@500>ekfac@50`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from tdabench.data.behaviours import Behaviour, parts_of
from tdabench.data.examples import Example
from tdabench.errors import MethodError, UsageError
from tdabench.groups import Groups, pool_scores
from tdabench.method import Index
from tdabench.rows import top_k_of

VERSION = 1  # increase it when scores of pipelines change
KEPT = 200  # candidates per query where a name does not say
Rest = Literal["rank", "zero"]
RESTS: tuple[str, ...] = get_args(Rest)


@dataclass(frozen=True)
class PipelineName:
    """A pipeline as users type it: labels of its stages, and how many candidates each keeps.

    `keep[i]` is the number of candidates that stage i + 1 scores.
    """

    stages: tuple[str, ...]
    keep: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> PipelineName | None:
        """Returns the pipeline that `text` names; None if it has no ">".

        Raises UsageError for one that is not of the form FIRST>SECOND@K.
        """
        if ">" not in text:
            return None
        first, *later = (part.strip() for part in text.split(">"))
        stages, keep = [first], []
        for part in later:
            match = re.fullmatch(r"(?P<label>[^@]+?)\s*(?:@\s*(?P<k>\d+))?", part)
            if match is None or int(match["k"] or KEPT) < 1:
                raise cls._malformed(text)
            stages.append(match["label"])
            keep.append(int(match["k"] or KEPT))
        if not first or "@" in first or sorted(keep, reverse=True) != keep:
            raise cls._malformed(text)
        return cls(tuple(stages), tuple(keep))

    @staticmethod
    def _malformed(text: str) -> UsageError:
        return UsageError(
            f"{text!r} does not name a pipeline: FIRST>SECOND@K, where SECOND scores the K "
            "examples that FIRST scores highest for a query",
            "For example: 'bm25>ekfac@200'",
        )

    def __str__(self) -> str:
        return self.stages[0] + "".join(f">{s}@{k}" for s, k in zip(self.stages[1:], self.keep))


class PipelineIndex(Index):
    """Indices of the stages of a pipeline, on the same corpus.

    Each later stage scores the candidates: the `keep` examples with the highest scores so far,
    ties by training index. What is not a candidate keeps a place, which `rest` defines:

    - "rank": its rank by the earlier stages, on the scale of the candidates' scores
      (`calibrated`), so that group scores also say something of groups without candidates;
    - "zero": the score 0.

    Group scores pool example scores, with the pooling of the last stage (a sum where that stage
    has its own).
    """

    def __init__(self, stages: Sequence[Index], keep: Sequence[int], rest: str = "rank") -> None:
        if rest not in RESTS:
            raise UsageError(f"pipeline: rest = {rest!r}", f"One of: {', '.join(RESTS)}")
        self.stages, self.keep, self.rest = list(stages), list(keep), rest

    @property
    def n_train(self) -> int:  # type: ignore[override]
        return self.stages[0].n_train

    @property
    def pooling(self) -> str:  # type: ignore[override]
        own = self.stages[-1].pooling
        return "sum" if own == "own" else own

    @property
    def temperature(self) -> float:  # type: ignore[override]
        return self.stages[-1].temperature

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        scores = np.asarray(self.stages[0].score(queries), dtype=np.float32)
        self._check(0, scores, (len(queries), self.n_train))
        for i, k in enumerate(self.keep, start=1):
            _, candidates = top_k_of(scores, k)  # [query, k]
            found = self._found(i, queries, candidates)
            scores = self._refined(scores, candidates, found)
        return scores

    def score_behaviours(
        self, behaviours: Sequence[Behaviour], groups: Groups | None = None
    ) -> np.ndarray:
        """Finds candidates for each behaviour as a whole: [behaviour, train] or [., group]."""
        scores = np.asarray(self.stages[0].score_behaviours(behaviours), dtype=np.float32)
        scores = self._check(0, scores, (len(behaviours), self.n_train))
        for i, k in enumerate(self.keep, start=1):
            _, candidates = top_k_of(scores, k)
            found = np.empty(candidates.shape, dtype=np.float32)
            for b, (behaviour, chosen) in enumerate(zip(behaviours, candidates)):
                examples, weights = parts_of([behaviour])
                of_each = self._found(i, examples, np.tile(chosen, (len(examples), 1)))
                found[b] = weights[0] @ of_each
            scores = self._refined(scores, candidates, found)
        if groups is None:
            return scores
        return pool_scores(scores, groups, self.pooling, self.temperature)

    def score_words(
        self, behaviour: Behaviour, examples: Sequence[Example]
    ) -> list[np.ndarray] | None:
        """Asks the last stage, whose scores the best examples have."""
        return self.stages[-1].score_words(behaviour, examples)

    def score_query_words(self, behaviour: Behaviour, indices: Sequence[int]) -> np.ndarray | None:
        """Asks the last stage, too."""
        return self.stages[-1].score_query_words(behaviour, indices)

    def _refined(self, scores: np.ndarray, candidates: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Returns scores after a stage: its own for candidates, and the rule for the rest."""
        if self.rest == "zero":
            scores = np.zeros_like(scores)
        else:
            scores = calibrated(scores, candidates, found)
        np.put_along_axis(scores, candidates, found, axis=1)
        return scores

    def _found(self, i: int, queries: Sequence[Example], candidates: np.ndarray) -> np.ndarray:
        scores = np.asarray(self.stages[i].score_some(queries, candidates), dtype=np.float32)
        return self._check(i, scores, candidates.shape)

    def _check(self, i: int, scores: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if scores.shape != shape:
            raise MethodError(f"stage {i + 1} returned shape {scores.shape}, expected {shape}")
        if not np.isfinite(scores).all():
            raise MethodError(f"stage {i + 1} returned NaN or infinite scores")
        return scores

    def top_k(self, queries: Sequence[Example], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the k highest scores; reads only candidates where those suffice.

        With `rest` "zero" and at least k candidates with a positive score, no other example can
        be among the best, and the first stage streams.
        """
        if self.rest == "zero" and len(self.keep) == 1 and k <= self.keep[0]:
            _, candidates = self.stages[0].top_k(queries, self.keep[0])
            candidates = np.sort(np.asarray(candidates, dtype=np.int64), axis=1)
            found = self._found(1, queries, candidates)
            values, places = top_k_of(found, k)
            if values.size == 0 or values[:, -1].min() > 0:
                return values, np.take_along_axis(candidates, places, axis=1)
            return super().top_k(queries, k)
        return super().top_k(queries, k)

    def save(self, path: Path) -> None:
        for i, stage in enumerate(self.stages):
            (path / str(i)).mkdir()
            stage.save(path / str(i))


def calibrated(scores: np.ndarray, candidates: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Puts ranks on the scale of a later stage's scores: float32 [query, train].

    scores [query, train] are the earlier stages'; found [query, k] are the later stage's scores of
    the examples `candidates` [query, k]. An example of average rank r of n (1 is the lowest) has
    the normal quantile z = Phi^-1((r - 1/2) / n). Its calibrated score is b z, where b >= 0 is the
    least-squares slope of `found` on the candidates' z, through the origin: an example of middling
    rank gets 0. Ties get equal scores; b is 0 where the later stage contradicts the earlier ones.
    """
    from scipy.special import ndtri

    from tdabench.stats import average_ranks

    n = scores.shape[1]
    if n == 0 or len(scores) == 0:
        return scores.copy()
    z = ndtri((average_ranks(scores) - 0.5) / n)  # [query, train]
    of = np.take_along_axis(z, candidates, axis=1)
    slope = (of * found).sum(axis=1) / np.maximum((of * of).sum(axis=1), 1e-12)
    return (np.maximum(slope, 0.0)[:, None] * z).astype(np.float32)
