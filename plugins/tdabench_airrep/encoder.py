"""Encoders: the released AirRep layout, and tdabench's own on any Hugging Face body.

An encoder is a folder with `config.json` (`model_type: airrep`), `model.safetensors` and a
tokenizer. Enc(x) = W mean_t h_t(x) + b: the mean of the last hidden states over real tokens, then a
linear layer; no normalisation (arXiv 2505.18513, section 3; public code `modeling_airrep.py`).

The released layout has a BERT under `bert.*` and `projector.*`, and no further keys. tdabench's own
encoders name their body in `backbone` (weights under `body.*`), their width in `projection_dim`,
the text format in `airrep_text` and, if different from the above, the pooled layers and the
attention in `airrep_body`. An encoder that left the body of a target's checkpoint as it is stores
no body: `body_of` names the checkpoint (`target:base`) and `body_sha256` its file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from tdabench.api import (
    Example,
    TdabenchError,
    Tokens,
    UsageError,
    over_batches,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer


RECORD = "airrep.json"
SPANS = ("all", "response", "error")
NOT_BODY = ("architectures", "dtype", "torch_dtype", "model_type", "transformers_version")


@dataclass(frozen=True, kw_only=True)
class TextFormat:
    """The conversion of an example to tokens.

    `template` contains {prompt} and {response}; a prompt is cut to its first `max_words` words
    (0: not cut; otherwise runs of white space become one space, as in the public code) and the
    whole to `max_tokens` tokens, including special ones. `side` says which tokens are kept:
    "first" (the public code's inference) or "last" (its training). `append_eos` ends the text
    with the tokenizer's end-of-text token, as in training of causal targets.
    """

    template: str = "Question: {prompt}\nAnswer: {response}"
    max_words: int = 256
    max_tokens: int = 512
    side: str = "first"
    append_eos: bool = False

    def __post_init__(self) -> None:
        if "{prompt}" not in self.template and "{response}" not in self.template:
            raise UsageError(
                f"the text template {self.template!r} has neither {{prompt}} nor {{response}}"
            )
        if self.side not in ("first", "last"):
            raise UsageError(f"unknown side {self.side!r} for cut texts", "One of: first, last")
        if self.max_tokens < 2:
            raise UsageError(f"max_tokens = {self.max_tokens} leaves no room for text")

    @property
    def response_last(self) -> bool:
        """Whether all text from the response's first character on belongs to the response."""
        return self.template.endswith("{response}")

    def text(self, example: Example) -> str:
        prompt = example.prompt
        if self.max_words:
            prompt = " ".join(prompt.split()[: self.max_words])
        # Not str.format: prompts and responses may contain braces.
        out = self.template.replace("{prompt}", "\0")
        return out.replace("{response}", example.response).replace("\0", prompt)


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """The states that are averaged over tokens.

    `layers` lists hidden states to concatenate, counted as in Hugging Face (0: the embeddings,
    -1: the last, after the final norm). `spans` lists the tokens to average over: "all", and
    "response" for tokens from the beginning of the response; their means are concatenated. "error"
    is not a mean of states but the body's prediction error on the response: each response token's
    embedding minus the mean embedding under the body's prediction of it, which is the negative
    gradient of that token's loss at the state that predicts it. It needs a causal body with tied
    input and output embeddings, and no backward pass.
    `attention` is "own", or "full" to let every token of a causal body attend to every other.
    `normalise` gives every embedding the same length, which is learned: its square is the inverse
    temperature of a cosine. The paper's encoders are not normalised.
    """

    layers: tuple[int, ...] = (-1,)
    spans: tuple[str, ...] = ("all",)
    attention: str = "own"
    normalise: bool = False

    def __post_init__(self) -> None:
        if not self.spans or not set(self.spans) <= set(SPANS):
            raise UsageError(f"unknown spans {', '.join(self.spans)!r}", f"Of: {', '.join(SPANS)}")
        if self.attention not in ("own", "full"):
            raise UsageError(f"unknown attention {self.attention!r}", "One of: own, full")
        if self.attention == "full" and "error" in self.spans:
            raise UsageError(
                "the span error needs predictions, but with attention = full a token sees itself",
                "Keep attention = own",
            )
        if not self.layers:
            raise UsageError("there are no layers to pool", "Give at least one, -1 for the last")


class Encoder(nn.Module):
    """A transformer body, mean pooling and a linear projection; always without dropout."""

    def __init__(
        self,
        body: nn.Module,
        dim: int,
        tokenizer: Tokenizer,
        text: TextFormat,
        pooled: Pooled | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        config: Any = body.config
        self.pooled = pooled or Pooled()
        self.causal = is_causal(config)
        if "error" in self.pooled.spans and not (self.causal and config.tie_word_embeddings):
            raise UsageError(
                f"the span error needs a causal body with tied embeddings; {config.model_type} "
                "as configured is not one",
                "Remove it from --spans",
            )
        width, layers = int(config.hidden_size), len(self.pooled.layers)
        self.blocks = [width if s == "error" else width * layers for s in self.pooled.spans]
        self.projector = nn.Linear(sum(self.blocks), dim)
        self.length = nn.Parameter(torch.ones(())) if self.pooled.normalise else None
        self.shared = ""  # "target:CHECKPOINT" if the body is that checkpoint's, and is not saved
        self.shared_sha256 = ""
        self.centre: torch.Tensor | None
        self.register_buffer("centre", None)
        for i in range(len(self.blocks)):
            self.register_buffer(f"root{i}", None)
        self.tokenizer = tokenizer
        self.text = text
        self.eval()

    def normalised(self) -> Encoder:
        """Makes this encoder normalise its embeddings, and returns it."""
        if self.length is None:
            self.pooled = replace(self.pooled, normalise=True)
            self.length = nn.Parameter(torch.ones_like(self.projector.bias[0]))
        return self

    def read_through(self, centre: torch.Tensor, roots: Sequence[torch.Tensor]) -> None:
        """Lets the projection read each span's mean minus its `centre`, times its root.

        In these coordinates all inputs vary equally around zero, and steps do not move embeddings
        by their common component. `fold` merges them into the projection.
        """
        self.centre = centre
        for i, root in enumerate(roots):
            setattr(self, f"root{i}", root)

    @property
    def roots(self) -> list[torch.Tensor]:
        return [getattr(self, f"root{i}") for i in range(len(self.blocks))]

    def fold(self) -> Encoder:
        """Merges the coordinates of `read_through` into the weights, and returns this encoder."""
        if self.centre is not None:
            parts = self.projector.weight.split(self.blocks, dim=1)
            with torch.no_grad():
                weight = torch.cat([w @ r.T for w, r in zip(parts, self.roots)], dim=1)
                self.projector.bias.sub_(weight @ self.centre)
                self.projector.weight.copy_(weight)
            self.centre = None
            for i in range(len(self.blocks)):
                setattr(self, f"root{i}", None)
        return self

    def rescale(self, factor: float) -> None:
        """Multiplies every embedding by `factor`."""
        with torch.no_grad():
            if self.length is not None:
                self.length.mul_(factor)
            else:
                self.projector.weight.mul_(factor)
                self.projector.bias.mul_(factor)

    @property
    def dim(self) -> int:
        return self.projector.out_features

    @property
    def device(self) -> torch.device:
        return self.projector.weight.device

    def forward(
        self,
        ids: torch.Tensor,
        real: torch.Tensor | None,
        answer: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes embeddings [b, dim] in the dtype of the weights.

        ids are int64 [b, t], padded on the right; real bool [b, t], None without padding; answer
        bool [b, t], true on response tokens, for the span "response"; keep as in `project`.
        """
        return self.project(self.mean_states(ids, real, answer), keep)

    def project(self, states: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Computes embeddings [b, dim] from span means [b, sum(blocks)].

        `keep` [b, sum(blocks)] multiplies the projection's inputs (dropout while training).
        """
        if self.centre is not None:
            parts = (states - self.centre).split(self.blocks, dim=1)
            states = torch.cat([h @ r for h, r in zip(parts, self.roots)], dim=1)
        if keep is not None:
            states = states * keep.to(states)
        out = self.projector(states)
        if self.length is None:
            return out
        return torch.nn.functional.normalize(out, dim=1) * self.length

    def mean_states(
        self, ids: torch.Tensor, real: torch.Tensor | None, answer: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Computes the inputs of the projection: the concatenated span means [b, sum(blocks)]."""
        h, last = self._hidden(ids, real)  # [b, t, layers * d], [b, t, d]
        means = []
        for span in self.pooled.spans:
            kept = real if span == "all" else answer
            if span == "error":
                assert answer is not None
                means.append(self._errors(ids, last, answer))
            elif kept is None:
                means.append(h.sum(1) / h.shape[1])
            else:
                total = h.masked_fill(~kept[..., None], 0.0).sum(1)
                means.append(total / kept.sum(1, keepdim=True))
        return means[0] if len(means) == 1 else torch.cat(means, dim=1)

    def _errors(self, ids: torch.Tensor, last: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        """Averages e(token) - E[e(token)] over predicted response tokens, e the embedding: [b, d].

        A text's first token is not predicted and does not count; zero if no token is left.
        """
        embeddings = self.body.get_input_embeddings().weight  # type: ignore[operator]
        kept = answer[:, 1:]
        expected = torch.softmax(last[:, :-1][kept] @ embeddings.T, dim=1) @ embeddings
        errors = embeddings[ids[:, 1:][kept]] - expected  # [response token, d]
        total = errors.new_zeros(len(ids), errors.shape[1])
        total = total.index_add(0, kept.nonzero()[:, 0], errors)
        return total / kept.sum(1, keepdim=True).clamp(min=1)

    def _hidden(
        self, ids: torch.Tensor, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (the concatenated pooled layers, the last layer)."""
        mask = None if real is None else real.long()
        if self.causal:
            # In a causal body a token is not affected by later ones, so padding on the right needs
            # no mask, and unmasked attention is faster.
            mask = None
            if self.pooled.attention == "full":
                b, t = ids.shape
                seen = torch.ones_like(ids, dtype=torch.bool) if real is None else real
                dtype = self.projector.weight.dtype
                mask = torch.zeros(b, 1, t, t, dtype=dtype, device=ids.device)
                mask = mask.masked_fill(~seen[:, None, None, :], torch.finfo(dtype).min)
        layers = self.pooled.layers
        out = self.body(
            input_ids=ids, attention_mask=mask, output_hidden_states=layers != (-1,) or None
        )
        if layers == (-1,):
            return out.last_hidden_state, out.last_hidden_state
        pooled = torch.cat([out.hidden_states[i] for i in layers], dim=-1)
        return pooled, out.last_hidden_state

    # ------------------------------------------------------------------ text

    def tokenize(self, examples: Sequence[Example]) -> list[Tokens]:
        """Tokenises each example to at least one and at most `text.max_tokens` ids.

        `start` is the first token that overlaps the response; the last token if no response is
        left.
        """
        texts = [self.text.text(e) for e in examples]
        eos = [self.eos_id] if self.text.append_eos else []
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(
            self.text.max_tokens - len(eos),
            direction="right" if self.text.side == "first" else "left",
        )
        out = []
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=True)
        for example, text, encoding in zip(examples, texts, encodings):
            ids = encoding.ids + eos or [self.eos_id]
            start = 0
            if set(self.pooled.spans) - {"all"}:
                begins = len(text) - len(example.response) if self.text.response_last else 0
                ends = [end for _, end in encoding.offsets]
                start = next((i for i, end in enumerate(ends) if end > begins), len(ids) - 1)
            out.append(Tokens(np.asarray(ids, dtype=np.int64), start))
        return out

    @property
    def eos_id(self) -> int:
        config: Any = self.body.config
        for key in ("eos_token_id", "sep_token_id", "pad_token_id"):
            value = getattr(config, key, None)
            if isinstance(value, list):
                value = value[0]
            if value is not None:
                return int(value)
        return 0

    # ------------------------------------------------------------------ files

    def config(self) -> dict[str, Any]:
        """Returns the contents of config.json: the body's fields, flat, and ours."""
        body: Any = self.body.config
        fields = json.loads(body.to_json_string(use_diff=True))
        keys = asdict(self.pooled)
        return {
            **{k: v for k, v in fields.items() if k not in NOT_BODY},
            "model_type": "airrep",
            "backbone": body.model_type,
            **({"body_of": self.shared, "body_sha256": self.shared_sha256} if self.shared else {}),
            "projection_dim": self.dim,
            "airrep_text": asdict(self.text),
            "airrep_body": {k: list(v) if isinstance(v, tuple) else v for k, v in keys.items()},
        }

    def save(self, folder: Path, record: Mapping[str, Any], half: bool = True) -> None:
        """Folds, then writes config, weights (float16 or float32), tokenizer and `airrep.json`."""
        from safetensors.torch import save

        from tdabench.api import write_bytes, write_json

        self.fold()
        dtype = torch.float16 if half else torch.float32
        kept = {
            k: v
            for k, v in self.state_dict().items()
            if not (self.shared and k.startswith("body."))
        }
        state = {k: v.detach().to(dtype).contiguous().cpu() for k, v in kept.items()}
        bad = [k for k, v in state.items() if not torch.isfinite(v).all()]
        if bad:
            raise TdabenchError(f"the encoder has weights that are not finite, first {bad[0]}")
        write_json(folder / "config.json", self.config())
        write_bytes(folder / "model.safetensors", save(state))
        self.tokenizer.no_truncation()
        write_bytes(folder / "tokenizer.json", self.tokenizer.to_str().encode())
        write_json(folder / RECORD, dict(record))


def is_causal(config: Any) -> bool:
    """Tells whether a body of this configuration lets a token attend only to earlier tokens."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    # Encoders with a causal head (BERT) are causal only if configured so.
    if getattr(config, "is_decoder", None) is not None and hasattr(config, "type_vocab_size"):
        return bool(config.is_decoder)
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


# --------------------------------------------------------------------------- encoding


def padded(
    tokens: Sequence[Tokens], index: np.ndarray, device: Any
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Returns ids int64 [b, t]; real bool [b, t], None without padding; answer bool [b, t]."""
    lengths = np.array([len(tokens[i]) for i in index])
    starts = np.array([tokens[i].start for i in index])
    places = np.arange(int(lengths.max()))
    ids = np.zeros((len(index), len(places)), dtype=np.int64)
    for row, i in enumerate(index):
        ids[row, : lengths[row]] = tokens[i].ids
    real = places < lengths[:, None]
    answer = torch.from_numpy(real & (places >= starts[:, None])).to(device)
    if real.all():
        return torch.from_numpy(ids).to(device), None, answer
    return torch.from_numpy(ids).to(device), torch.from_numpy(real).to(device), answer


WINDOW = 16_384  # examples tokenised at a time, so that a corpus of any size fits


def encode(
    encoder: Encoder,
    examples: Sequence[Example],
    tokens_a_batch: int = 0,
    progress: Any = None,
) -> np.ndarray:
    """Computes embeddings float32 [example, dim], in the given order for any batching.

    `tokens_a_batch` 0 chooses by device: on a CPU activations should stay in cache.
    When memory runs out, batches are halved for the rest of the call.
    """
    budget = tokens_a_batch or (2048 if encoder.device.type == "cpu" else 65_536)
    out = np.empty((len(examples), encoder.dim), dtype=np.float32)
    done, most = 0, 256

    def halved(left: int) -> None:
        nonlocal most
        most = left

    for a in range(0, len(examples), WINDOW):
        tokens = encoder.tokenize(examples[a : a + WINDOW])

        def compute(index: np.ndarray, tokens: Sequence[Tokens] = tokens) -> np.ndarray:
            with torch.inference_mode():
                return encoder(*padded(tokens, index, encoder.device)).float().cpu().numpy()

        for index, rows in over_batches([len(t) for t in tokens], compute, budget, most, halved):
            out[a + index] = rows
            done += len(index)
            if progress:
                progress("encode", done, len(examples))
    return out
