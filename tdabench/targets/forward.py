"""Computes the logits of a causal model at selected positions, as its own forward pass does.

Most models apply an output matrix to the last hidden state of their base model, so logits can be
computed at the response positions only. Other models scale, cap or shift logits after the matrix,
or transform states before it, and some do not expose a base model. Configurations do not say so
reliably. Three ways are therefore compared with the model's own `forward` on a few tokens, once
per configuration, and the shortest one that agrees computes all logits:

    short   base model, then the output matrix at the requested positions
    rows    the model's own forward, with the output matrix at the requested positions
    whole   the model's own forward, of which the requested positions are kept

The same measurement refuses models that are not causal (later tokens change the logits of earlier
ones) and models whose logits depend on padding or on other examples of the batch.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from tdabench.errors import DataError, UsageError, first_line

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Way = Literal["short", "rows", "whole"]

POSITIONS = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions",
)  # fmt: skip
PROBE_ROWS, PROBE_TOKENS, PROBE_SHARED = 3, 11, 6  # rows share their first tokens
_LOUD = 10.0  # standard deviation of logits in the comparison: a cap of 30 then shows
_CLOSE = {"torch.float64": 1e-8, "torch.float32": 1e-4, "torch.float16": 1e-2}  # of the largest

# With the dtype: a model that is converted after loading is compared again.
_of_models: weakref.WeakKeyDictionary[Any, tuple[Any, Way]] = weakref.WeakKeyDictionary()
_of_configs: dict[str, Way] = {}


def logits_at(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, places: Tensor
) -> Tensor:
    """Computes the model's own logits [n, vocabulary] at `places` [n] among the b * t tokens.

    `attention_mask` may be None if there is no padding on the left.
    Raises DataError for a model that is not causal.
    """
    way = way_of(model)
    inputs = {"input_ids": input_ids}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if way == "short":
        hidden = model.base_model(**inputs).last_hidden_state  # [b, t, d]
        return model.get_output_embeddings()(_pick(hidden, places))
    if way == "rows":
        with _head_at(model, places):
            return _logits(model(**inputs))
    return _pick(_logits(model(**inputs)), places)


def last_states(model: Any, input_ids: Tensor, attention_mask: Tensor, layer: int = -1) -> Tensor:
    """Computes hidden states [b, t, d] of one layer, counted as in Hugging Face.

    0 is the embeddings, -1 the last layer after the final norm. If the base model does not return
    the last state, the input of the output matrix takes its place.

    Raises UsageError for a layer that the model does not have or does not return.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if layer == -1:
        if (body := model.base_model) is not model or model.get_output_embeddings() is None:
            found = getattr(body(**inputs), "last_hidden_state", None)
            if found is not None:
                return found
        seen: list[Tensor] = []
        head = model.get_output_embeddings()
        if head is None:
            raise UsageError(
                f"{type(model).__name__} returns no last hidden state", "Name another layer"
            )
        hook = head.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        try:
            model(**inputs)
        finally:
            hook.remove()
        return seen[0]
    states = getattr(model(**inputs, output_hidden_states=True), "hidden_states", None)
    if not states:
        raise UsageError(
            f"{type(model).__name__} returns no hidden states of its layers",
            "Use layer -1, the last",
        )
    if not -len(states) <= layer < len(states):
        raise UsageError(
            f"the model has no layer {layer}",
            f"Layers run from 0 (embeddings) to {len(states) - 1}",
        )
    return states[layer]


def way_of(model: PreTrainedModel) -> Way:
    """Returns the shortest way that agrees with the model's own forward, measured once.

    Raises DataError for a model that is not causal or whose forward pass fails on plain tokens.
    """
    dtype, way = _of_models.get(model, (None, None))
    if way is None or dtype != model.dtype:
        key = configuration_key(model)
        if key not in _of_configs:
            _of_configs[key] = _measured(model)
        way = _of_configs[key]
        _of_models[model] = model.dtype, way
    return way


def configuration_key(model: PreTrainedModel) -> str:
    """Returns a key that is equal for two models of one class, configuration and dtype."""
    config = model.config.to_diff_dict()
    return json.dumps(
        [type(model).__qualname__, str(model.dtype), config], default=str, sort_keys=True
    )


def probe_ids(model: PreTrainedModel) -> Tensor:
    """Returns plain tokens int64 [PROBE_ROWS, PROBE_TOKENS]; rows differ from PROBE_SHARED on.

    Ids that the configuration names (end of text, padding, image placeholders) are not used.
    """
    import torch

    plain = plain_ids(model)
    n = PROBE_ROWS * PROBE_TOKENS
    picked = torch.tensor([plain[(7 + 31 * i) % len(plain)] for i in range(n)])
    ids = picked.view(PROBE_ROWS, PROBE_TOKENS)
    ids[:, :PROBE_SHARED] = ids[0, :PROBE_SHARED].clone()
    return ids.to(model.device)


def plain_ids(model: PreTrainedModel) -> list[int]:
    """Returns up to 4,096 token ids that the configuration does not name."""
    rows = input_rows(model)
    named = set(_named_ids(model.config.to_dict()))
    return [i for i in range(min(rows, 4096)) if i not in named] or list(range(rows))


def input_rows(model: PreTrainedModel) -> int:
    """Returns the number of token ids that the model embeds."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return int(weight.shape[0] if weight is not None else model.config.vocab_size)


def context_length(config: Mapping[str, Any]) -> int | None:
    """Returns the number of positions that a model reads, None if not configured."""
    for key in POSITIONS:
        if isinstance(config.get(key), int):
            return int(config[key])
    text = config.get("text_config")
    return context_length(text) if isinstance(text, Mapping) else None


def _named_ids(config: Any) -> Iterator[int]:
    if isinstance(config, dict):
        for key, value in config.items():
            if str(key).endswith(("token_id", "token_index", "token_ids")):
                yield from (v for v in (value if isinstance(value, list) else [value])
                            if isinstance(v, int))  # fmt: skip
            else:
                yield from _named_ids(value)


def _measured(model: PreTrainedModel) -> Way:
    import torch

    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad(), moved(model):
            return _compared(model)
    finally:
        for m in training:
            m.training = True


def _compared(model: PreTrainedModel) -> Way:
    import torch

    name = type(model).__name__
    ids = probe_ids(model)
    real = torch.ones_like(ids)
    places = torch.tensor([2, PROBE_SHARED, PROBE_TOKENS + 3, 3 * PROBE_TOKENS - 2])
    places = places.to(ids.device)
    inputs = {"input_ids": ids, "attention_mask": real}
    try:
        quiet = _logits(model(**inputs))
    except Exception as e:
        if isinstance(e, MemoryError) or "out of memory" in str(e).lower():
            raise
        raise DataError(
            f"the forward pass of {name} fails on token ids and an attention mask: {first_line(e)}",
            "Use a causal language model that needs no other input",
        ) from e
    if quiet.shape[:2] != ids.shape:
        raise DataError(
            f"{name} returns logits of shape {list(quiet.shape)} for {list(ids.shape)} tokens",
            "Use a causal language model, with one prediction per token",
        )
    close = _CLOSE.get(str(quiet.dtype), 0.05)
    if not bool(torch.isfinite(quiet).all()):
        return "whole"  # nothing to compare; the losses will show the problem
    early = quiet[:, :PROBE_SHARED].float()
    apart = (early - early[:1]).abs().max() / early.abs().max().clamp_min(1e-30)
    if float(apart) > close:
        raise DataError(
            f"{name} is not causal: later tokens change the predictions of earlier ones",
            "Use a causal language model. A model that can be either, such as BERT, needs "
            "is_decoder = true in its config.json",
        )
    wider = torch.nn.functional.pad(ids[:1], (0, 3), value=int(ids[0, 0]))
    kept = torch.nn.functional.pad(real[:1], (0, 3))
    alone = _logits(model(input_ids=wider, attention_mask=kept))[:, : ids.shape[1]]
    if float((alone - quiet[:1]).abs().max() / quiet.abs().max().clamp_min(1e-30)) > close:
        raise DataError(
            f"the predictions of {name} depend on padding or on other examples of the batch",
            "Use another model: losses and gradients are computed in padded batches",
        )
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight"):
        return "whole"
    factor = _LOUD / float(quiet.float().std().clamp_min(1e-6))
    hook = head.register_forward_hook(lambda _m, _args, out: out * min(factor, 1e4))
    try:
        own = _pick(_logits(model(**inputs)), places).float()
        scale = own.abs().max()
        ways: tuple[Way, ...] = ("short", "rows")
        for way in ways:
            try:
                found = _by(model, way, inputs, places).float()
            except Exception:
                continue  # no base model, or a head that accepts one shape only
            if found.shape == own.shape and float((found - own).abs().max() / scale) <= close:
                return way
    finally:
        hook.remove()
    return "whole"


def _by(model: PreTrainedModel, way: Way, inputs: dict[str, Tensor], places: Tensor) -> Tensor:
    before = _of_models.get(model)
    _of_models[model] = model.dtype, way
    try:
        return logits_at(model, inputs["input_ids"], inputs["attention_mask"], places)
    finally:
        if before is None:
            del _of_models[model]
        else:
            _of_models[model] = before


@contextmanager
def moved(model: PreTrainedModel) -> Iterator[None]:
    """Perturbs scales, norms and biases within the context.

    The way is measured once per configuration, and a scale that is 1 in this checkpoint may have
    another value in a trained one.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    small = [p for p in model.parameters() if p.dim() <= 1 and p.is_floating_point()]
    before = [p.data for p in small]
    try:
        for p in small:
            noise = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
            p.data = p.data + 0.1 * noise * (p.data.abs().mean() + 0.1)
        yield
    finally:
        for p, value in zip(small, before):
            p.data = value


@contextmanager
def _head_at(model: PreTrainedModel, places: Tensor) -> Iterator[None]:
    """Passes only the states at `places`, as [n, d], to the output matrix within the context."""
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _m, args: (_pick(args[0], places), *args[1:])
    )
    try:
        yield
    finally:
        hook.remove()


def _pick(v: Tensor, places: Tensor) -> Tensor:
    """Returns v [b, t, d] at `places` [n] among b * t: [n, d]."""
    return v.flatten(0, 1).index_select(0, places)


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    return output[0] if logits is None else logits
