"""Retraining during a benchmark: fine-tune on selected examples, evaluate, keep the result.

The value of a selection or a removal is known only after training on it, so it cannot be shipped
for methods not yet written. Results are kept under a name that covers everything they depend on:
the same selection by two methods, or made again, is trained once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tdabench.benchmark import BenchmarkContext
from tdabench.data.examples import Corpus, Example
from tdabench.errors import DataError
from tdabench.io import fingerprint, keep_arrays, kept_arrays, open_own
from tdabench.seeds import named_seed
from tdabench.targets.batches import Tokens
from tdabench.targets.recipe import Recipe
from tdabench.targets.target import Target
from tdabench.targets.training import finetune

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

VERSION = 1


@dataclass(frozen=True)
class Retrained:
    """Mean response-token loss of each query [query]; greedy responses if requested."""

    losses: np.ndarray
    responses: tuple[str, ...] | None


@dataclass
class Retrainer:
    """Fine-tunes the context's target on subsets of its training corpus."""

    context: BenchmarkContext
    recipe: Recipe
    start: str = "base"
    max_new_tokens: int = 0  # 0: losses only
    done: int = 0  # retrainings that were not found in the cache
    _tokens: list[Tokens] = field(default_factory=list)

    def run(
        self,
        indices: Sequence[int] | np.ndarray,
        queries: Corpus,
        seed: int,
        among: Sequence[int] | np.ndarray | None = None,
    ) -> Retrained:
        """Trains on the examples at `indices` (in any order) and evaluates.

        With `among`, a larger set, the seed orders that set, and unselected examples have weight
        zero: models of one seed then differ by the missing examples, not by the order of the rest.
        If another process is training the same model, this call waits for it.
        """
        result = self._run(indices, queries, seed, among, wait=True)
        assert result is not None
        return result

    def begin(
        self,
        runs: Sequence[tuple[Sequence[int] | np.ndarray, int]],
        queries: Corpus,
        among: Sequence[int] | np.ndarray | None = None,
    ) -> None:
        """Trains those of (indices, seed) that no other process is training.

        Called before `run` for models that every method needs, so that concurrent workers share
        them instead of each training all.
        """
        for indices, seed in runs:
            self._run(indices, queries, seed, among, wait=False)

    def _run(
        self,
        indices: Sequence[int] | np.ndarray,
        queries: Corpus,
        seed: int,
        among: Sequence[int] | np.ndarray | None,
        wait: bool,
    ) -> Retrained | None:
        context = self.context
        chosen = sorted(int(i) for i in indices)
        pool = chosen if among is None else sorted(int(i) for i in among)
        key = fingerprint(
            [
                VERSION,
                context.target.fingerprint,
                self.start,
                self.recipe.as_dict(),
                seed,
                context.train.subset(chosen).fingerprint,
                queries.fingerprint,
                self.max_new_tokens,
                *([context.train.subset(pool).fingerprint] if among is not None else []),
            ]
        )
        path = (context.cache or context.scratch / "retrained") / f"{key}.safetensors"
        kept = _read(path, key)
        if kept is not None:
            return kept
        with _turn(path, wait) as mine:
            if not mine:
                return None
            kept = _read(path, key)  # the result that was waited for
            if kept is not None:
                return kept
            result = self._train(chosen, pool, queries, seed)
            self.done += 1
            responses = list(result.responses) if result.responses is not None else None
            keep_arrays(path, {"losses": result.losses}, {"responses": responses, "key": key})
            return result

    def _train(self, chosen: list[int], pool: list[int], queries: Corpus, seed: int) -> Retrained:
        target = self.context.target
        if not self._tokens:
            self._tokens = target.tokenize(self.context.train)
        model = target.fresh_model(self.start).to(self.context.device)  # type: ignore[arg-type]
        tokens = [self._tokens[i] for i in pool]
        weights = np.isin(pool, chosen) if len(chosen) < len(pool) else None
        order = named_seed(0, f"retrain-{seed}")
        if chosen:  # otherwise the model is measured as it is
            finetune(model, tokens, self.recipe, order, target.pad_id, weights=weights)
        losses = target.losses(model, target.tokenize(queries))
        responses = None
        if self.max_new_tokens:
            responses = tuple(greedy(model, target, queries, self.max_new_tokens))
        return Retrained(losses, responses)


def _read(path: Path, key: str) -> Retrained | None:
    """What was kept under `key`, which names all that it was made of; None when it is not whole, or
    not this user's: a later method must not be measured against losses that someone else wrote."""
    if not path.exists():
        return None
    try:
        arrays, meta = kept_arrays(path)
        if meta["key"] != key:
            raise DataError(f"{path} is of another retraining")
        responses = meta["responses"]
        return Retrained(arrays["losses"], tuple(responses) if responses is not None else None)
    except (DataError, KeyError):
        path.unlink(missing_ok=True)  # a damaged cache is ignored
        return None


@contextmanager
def _turn(path: Path, wait: bool) -> Iterator[bool]:
    """Tells whether this process is the one to make `path`; with `wait`, waits for its turn.

    Without locks every process is: at worst the same file is made twice.
    """
    if fcntl is None:
        yield True
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    with open_own(lock, "ab") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks
        try:
            yield True
        finally:
            lock.unlink(missing_ok=True)  # a waiting process finds the result next


def greedy(
    model: PreTrainedModel, target: Target, queries: Sequence[Example], max_new_tokens: int
) -> list[str]:
    """Generates the model's greedy response to each prompt, up to end-of-text, stripped."""
    import torch

    prompts = target.tokenize(queries, role="prompt")
    eos = int(target.tokenizer.eos_token_id)
    out = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for a in range(0, len(order), 128):
        part = order[a : a + 128]
        width = max(len(prompts[i]) for i in part)
        ids = torch.full((len(part), width), target.pad_id)
        real = torch.zeros((len(part), width), dtype=torch.long)
        for row, i in enumerate(part):  # left padding: all responses begin at `width`
            ids[row, width - len(prompts[i]) :] = torch.from_numpy(prompts[i].ids)
            real[row, width - len(prompts[i]) :] = 1
        new_ids = _continue(model, ids.to(model.device), real.to(model.device), max_new_tokens, eos)
        for row, i in enumerate(part):
            new = new_ids[row].tolist()
            if eos in new:
                new = new[: new.index(eos)]
            out[i] = str(target.tokenizer.decode(new, skip_special_tokens=True)).strip()
    return out


def _continue(
    model: PreTrainedModel, ids: torch.Tensor, real: torch.Tensor, steps: int, eos: int
) -> torch.Tensor:
    """Generates at most `steps` greedy tokens after each row of ids [b, t], until all reach `eos`.

    A plain loop, since transformers' generate() obeys a generation config that a target may have
    (penalties, sampling), and responses must be greedy for every target.
    """
    import torch

    made: list[torch.Tensor] = []
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    past = None
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        while len(made) < steps and not bool(done.all()):
            out = model(
                input_ids=ids,
                attention_mask=real,
                position_ids=positions,
                past_key_values=past,
                use_cache=True,
            )
            past = out.past_key_values
            ids = out.logits[:, -1:].argmax(-1)  # [b, 1]
            done |= ids[:, 0] == eos
            made.append(ids)
            real = torch.cat([real, torch.ones_like(ids)], dim=1)
            positions = positions[:, -1:] + 1
    return torch.cat(made, dim=1)


def exact_match(response: str, wanted: str) -> float:
    """Returns 1 if the two are equal up to case and surrounding or repeated spaces."""
    return float(response.casefold().split() == wanted.casefold().split())


def unigram_f1(response: str, wanted: str) -> float:
    """Computes F1 of two texts as bags of words, case-folded, with punctuation separated.

    Texts without words are compared as a whole.
    """
    a, b = (Counter(re.findall(r"\w+", t.casefold())) for t in (response, wanted))
    if not a or not b:
        return exact_match(response, wanted)
    common = (a & b).total()
    if common == 0:
        return 0.0
    precision, recall = common / a.total(), common / b.total()
    return 2 * precision * recall / (precision + recall)
