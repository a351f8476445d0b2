"""Examples as token ids, in padded batches of similar length that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tokens:
    """One example as token ids; the response begins at `start` and is never empty."""

    ids: np.ndarray  # int64 [length]
    start: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right. `index` holds their positions in the requested sequence."""

    index: np.ndarray  # int64 [b]
    input_ids: torch.Tensor  # int64 [b, t]
    attention_mask: torch.Tensor  # int64 [b, t], 1 on real tokens
    loss_mask: torch.Tensor  # bool [b, t - 1]: position t predicts a response token

    def to(self, device: str) -> Batch:
        moved = Batch(
            self.index,
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.loss_mask.to(device),
        )
        # Value-dependent results are computed before the move: reading from a GPU would block.
        for name in ("places", "real_tokens", "padded_left"):
            value = getattr(self, name)
            moved.__dict__[name] = value.to(device) if hasattr(value, "to") else value
        return moved

    def numbered(self, index: np.ndarray) -> Batch:
        """Returns the same examples with other numbers."""
        made = Batch(index, self.input_ids, self.attention_mask, self.loss_mask)
        made.__dict__.update(self.__dict__ | {"index": index})  # with the results computed before
        return made

    @cached_property
    def places(self) -> torch.Tensor:
        """Flat positions (of b * t) that predict the response tokens, one before each: [tokens]."""
        rows, positions = self.loss_mask.nonzero(as_tuple=True)
        return rows * self.input_ids.shape[1] + positions

    @property
    def rows(self) -> torch.Tensor:
        """The example of each response token, row by row: int64 [tokens]."""
        return self.places // self.input_ids.shape[1]

    @property
    def gold(self) -> torch.Tensor:
        """The response tokens, row by row: int64 [tokens]."""
        return self.input_ids.flatten()[self.places + 1]

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """Averages values [..., tokens] over each example's response tokens: [..., b]."""
        sums = values.new_zeros(*values.shape[:-1], len(self.input_ids))
        return sums.index_add(-1, self.rows, values) / self.loss_mask.sum(1)

    @cached_property
    def real_tokens(self) -> torch.Tensor | None:
        """Flat positions (of b * t) of real tokens: int64 [tokens]. None without padding."""
        places = self.attention_mask.flatten().nonzero().squeeze(1)
        return None if len(places) == self.attention_mask.numel() else places

    @cached_property
    def padded_left(self) -> bool:
        """Whether any example begins with padding."""
        return not bool(self.attention_mask[:, 0].all())


def pad(tokens: Sequence[Tokens], index: np.ndarray, pad_id: int) -> Batch:
    """Pads the examples at `index` on the right to the longest of them."""
    import torch

    width = max(len(tokens[i]) for i in index)
    ids = np.full((len(index), width), pad_id, dtype=np.int64)
    real = np.zeros((len(index), width), dtype=np.int64)
    loss = np.zeros((len(index), width - 1), dtype=bool)
    for row, i in enumerate(index):
        t = tokens[i]
        ids[row, : len(t)] = t.ids
        real[row, : len(t)] = 1
        loss[row, t.start - 1 : len(t) - 1] = True
    return Batch(
        np.asarray(index), torch.from_numpy(ids), torch.from_numpy(real), torch.from_numpy(loss)
    )


def batch_places(
    lengths: Sequence[int] | np.ndarray, tokens_a_batch: int, max_examples: int = 256
) -> Iterator[np.ndarray]:
    """Returns the positions of each batch, longest first, at most `tokens_a_batch` with padding."""
    lengths = np.asarray(lengths, dtype=np.int64)
    left = np.argsort(-lengths, kind="stable")
    while len(left):
        index = _first(left, lengths, tokens_a_batch, max_examples)
        left = left[len(index) :]
        yield index


def over_batches(
    lengths: Sequence[int] | np.ndarray,
    compute: Callable[[np.ndarray], T],
    tokens_a_batch: int,
    max_examples: int = 256,
    on_halved: Callable[[int], None] = lambda most: None,
) -> Iterator[tuple[np.ndarray, T]]:
    """Yields (positions [b], compute(positions)) by batch over sequences of these lengths.

    Longest sequences come first. When memory runs out the batch is halved, for the rest of the
    pass, and `on_halved` receives the new batch size. Errors from a single example are raised.
    """
    import torch

    lengths = np.asarray(lengths, dtype=np.int64)
    left = np.argsort(-lengths, kind="stable")
    while len(left):
        index = _first(left, lengths, tokens_a_batch, max_examples)
        found: list[T] = []
        try:
            found.append(compute(index))
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e) or len(index) == 1:
                raise
        if found:
            left = left[len(index) :]
            yield index, found.pop()
        else:  # outside of the clause, which keeps the memory of the failed batch alive
            max_examples = len(index) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            on_halved(max_examples)


def _first(
    left: np.ndarray, lengths: np.ndarray, tokens_a_batch: int, max_examples: int
) -> np.ndarray:
    width = max(1, int(lengths[left[0]]))
    return left[: max(1, min(max_examples, tokens_a_batch // width))]


def out_of_memory(e: BaseException) -> bool:
    """Tells whether an error means that the device or the machine ran out of memory."""
    import torch

    if isinstance(e, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(e).lower()
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
