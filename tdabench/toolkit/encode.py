"""Encoding text with a transformer: length-sorted, token-budget batches, masked pooling.

Results are in the order of the input and do not depend on the batch size beyond float
rounding, since padding is masked in the attention and in the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.data.examples import Example
from tdabench.errors import UsageError
from tdabench.targets.batches import over_batches
from tdabench.targets.forward import context_length as positions
from tdabench.targets.forward import last_states
from tdabench.targets.products import fast_products

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tdabench.targets.target import Target

TOKEN_POOLINGS = ("mean", "position", "cls", "last")
PARTS = ("both", "prompt", "response")
# A CPU is fastest while activations stay in its cache, an accelerator when it is full.
TOKENS_A_BATCH = {"cpu": 1024, "cuda": 16_384}
_WINDOW = 16_384  # texts tokenised at a time, so that a corpus of any size fits


def encode_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    pooling: str = "mean",
    layer: int = -1,
    max_length: int | None = None,
    tokens_a_batch: int | None = None,
    max_examples: int = 256,
    normalise: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Encodes each text as one vector: float32 [text, width].

    `model` is any encoder or causal model that returns `last_hidden_state` (without its head).
    Texts longer than `max_length` tokens (including special tokens; default: the maximum of model
    and tokenizer) are cut at the end. `pooling` is "mean" over real tokens, "position" (weights
    1, 2, … over real tokens), "cls" (first token) or "last". `normalise` scales to length 1. A text
    without tokens gives zeros. `tokens_a_batch` (including padding) limits a batch; None chooses
    by device, and only speed depends on it. When memory runs out, batches are halved for the rest
    of the call.

    Raises UsageError for an unknown pooling or layer.
    """
    limit = max_length or context_length(model, tokenizer)

    def ids_of(window: slice) -> tuple[list[list[int]], None]:
        encoded = tokenizer(
            list(texts[window]),
            add_special_tokens=True,
            truncation=limit is not None,
            max_length=limit,
            return_attention_mask=False,
            verbose=False,
        )
        return encoded["input_ids"], None

    vectors = _encode_windows(
        model, len(texts), ids_of, tokenizer.pad_token_id or 0, pooling, layer, tokens_a_batch,
        progress, max_examples,
    )  # fmt: skip
    return unit_rows(vectors) if normalise else vectors


def pooled_hidden_states(
    target: Target,
    model: PreTrainedModel,
    examples: Sequence[Example],
    layer: int = -1,
    weighting: str = "mean",
    part: str = "both",
    tokens_a_batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Pools the target's hidden states over the tokens of each example: float32 [example, d].

    `layer` counts as in Hugging Face: 0 is the embeddings, -1 the last layer after the final
    norm. `weighting` is "mean" (RDS) or "position": weights 1, 2, … T over the T tokens, divided
    by their sum (RDS+, arXiv 2503.01807, section 3). `part` is "both", "prompt" to exclude the
    response, or "response" to read both and pool the response's tokens only; examples are
    tokenised as in training of the target.

    Raises UsageError for an unknown part or layer.
    """
    if part not in PARTS:
        raise UsageError(f"unknown part of an example {part!r}", f"One of: {', '.join(PARTS)}")

    def ids_of(window: slice) -> tuple[list[np.ndarray], list[int] | None]:
        tokens = target.tokenize(examples[window], "prompt" if part == "prompt" else "full")
        starts = [t.start for t in tokens] if part == "response" else None
        return [t.ids for t in tokens], starts

    return _encode_windows(
        model, len(examples), ids_of, target.pad_id, weighting, layer, tokens_a_batch, progress
    )


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Scales rows [n, d] to length 1; a zero row stays zero."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1.0)).astype(np.float32)


def context_length(model: Any, tokenizer: Any) -> int | None:
    """Returns the most tokens that both model and tokenizer accept; None if neither states it."""
    limits = [positions(model.config.to_dict()), getattr(tokenizer, "model_max_length", None)]
    if getattr(model.config, "model_type", "") in ("roberta", "xlm-roberta", "camembert"):
        limits[0] = limits[0] and limits[0] - 2  # two positions are reserved for padding
    known = [int(x) for x in limits if x and x < 1 << 20]  # tokenizers use 1e30 for "no limit"
    return min(known) if known else None


def _encode_windows(
    model: PreTrainedModel,
    n: int,
    ids_of: Callable[[slice], tuple[Sequence[Sequence[int] | np.ndarray], list[int] | None]],
    pad_id: int,
    pooling: str,
    layer: int,
    tokens_a_batch: int | None,
    progress: Callable[[int, int], None] | None,
    max_examples: int = 256,
) -> np.ndarray:
    """Returns pooled vectors float32 [n, width] in order; `ids_of` tokenises a window at a time.

    `ids_of` gives token ids and, where not all tokens are pooled, the first one that is.
    """
    out: np.ndarray | None = None
    done = 0
    for a in range(0, n, _WINDOW):
        ids, starts = ids_of(slice(a, a + _WINDOW))
        for index, pooled in _encode_ids(
            model, ids, starts, pad_id, pooling, layer, tokens_a_batch, max_examples
        ):
            if out is None:
                out = np.zeros((n, pooled.shape[1]), dtype=np.float32)
            out[a + index] = pooled
            done += len(index)
            if progress:
                progress(done, n)
    return np.zeros((n, int(model.config.hidden_size)), dtype=np.float32) if out is None else out


def _encode_ids(
    model: PreTrainedModel,
    ids: Sequence[Sequence[int] | np.ndarray],
    starts: Sequence[int] | None,
    pad_id: int,
    pooling: str,
    layer: int,
    tokens_a_batch: int | None,
    max_examples: int = 256,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (positions in `ids`, pooled float32 [b, d]) batch by batch, longest first."""
    import torch

    if pooling not in TOKEN_POOLINGS:
        raise UsageError(
            f"unknown token pooling {pooling!r}", f"One of: {', '.join(TOKEN_POOLINGS)}"
        )
    budget = tokens_a_batch or TOKENS_A_BATCH.get(model.device.type, TOKENS_A_BATCH["cuda"])
    lengths = np.array([len(x) for x in ids], dtype=np.int64)
    first = np.zeros_like(lengths) if starts is None else np.asarray(starts, dtype=np.int64)
    some = np.flatnonzero(lengths > first)  # a text without tokens has no vector to pool

    def compute(places: np.ndarray) -> np.ndarray:
        index = some[places]
        width = int(lengths[index[0]])
        padded = np.full((len(index), width), pad_id, dtype=np.int64)
        for row, i in enumerate(index):
            padded[row, : lengths[i]] = ids[i]
        real = np.arange(width) < lengths[index, None]  # [b, t]
        with torch.inference_mode(), fast_products(model, width):
            hidden = last_states(
                model,
                torch.from_numpy(padded).to(model.device),
                torch.from_numpy(real.astype(np.int64)).to(model.device),
                layer,
            )
            read = real & (np.arange(width) >= first[index, None])
            mask = torch.from_numpy(read).to(model.device)
            return _pool(hidden.float(), mask, pooling).cpu().numpy()

    trained = model.training
    model.eval()
    try:
        for places, pooled in over_batches(lengths[some], compute, budget, max_examples):
            yield some[places], pooled
    finally:
        model.train(trained)


def _pool(hidden: torch.Tensor, real: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pools [b, t, d] -> [b, d]."""
    import torch

    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), real.sum(1) - 1]
    weights = real.to(hidden.dtype)  # [b, t]
    if pooling == "position":  # counted over the tokens that are pooled
        weights = weights * weights.cumsum(1)
    weights = weights / weights.sum(1, keepdim=True)
    return torch.einsum("bt,btd->bd", weights, hidden)
