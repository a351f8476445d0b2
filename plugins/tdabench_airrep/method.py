"""The method: encode both sides with a trained encoder, pool groups by attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tdabench.api import (
    Context,
    Example,
    Groups,
    RepresentationIndex,
    RepresentationMethod,
    Role,
    Rows,
    UsageError,
    read_json,
    row_blocks,
)

if TYPE_CHECKING:
    from tdabench_airrep.encoder import Encoder

WINDOW = 16_384  # examples encoded at a time into a store
WHOLE = 64 << 20  # scores [query, train] held at once; beyond that group scores stream


@dataclass(frozen=True, kw_only=True)
class AirRep(RepresentationMethod):
    """f(x, S) = Enc(x) . sum_i a_i Enc(z_i), a = softmax over S of |Enc(x) . Enc(z_i)|.

    `encoder` is a folder, or the name of an asset of the suite. `max_tokens` (0: the encoder's
    own) and `text` ("": the encoder's own, else a template with {prompt} and {response}) change
    how examples are put to it; `dtype` is that of the arithmetic, `store` that of the training
    rows kept (int8: each row with its own scale). Source: arXiv 2505.18513, eq. 5.
    """

    name: ClassVar[str] = "airrep"
    version: ClassVar[int] = 1
    family: ClassVar[str] = "learned"
    source: ClassVar[str] = "arXiv 2505.18513"
    summary: ClassVar[str] = "encoder trained on retraining labels, attention-pooled groups"

    encoder: str = "airrep"
    pooling: str = "softmax-abs"
    max_tokens: int = 0
    text: str = ""
    dtype: str = "float32"
    store: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise UsageError(
                f"airrep: unknown dtype {self.dtype!r}", "One of: float32, float16, bfloat16"
            )
        if self.store not in ("float32", "float16", "int8"):
            raise UsageError(
                f"airrep: unknown store {self.store!r}", "One of: float32, float16, int8"
            )

    def folder(self, context: Context) -> Path:
        """The encoder's folder: a suite's asset of that name, else a path."""
        if self.encoder in context.assets:
            return context.asset(self.encoder)
        path = Path(self.encoder).expanduser()
        if path.is_dir():
            return path
        if "/" in self.encoder or path.exists():
            raise UsageError(
                f"airrep: there is no encoder folder {self.encoder}",
                "Train one with: tdabench airrep train",
            )
        return context.asset(self.encoder)

    def open(self, context: Context) -> Encoder:
        """The encoder, with this method's text parameters."""
        from dataclasses import replace

        from tdabench_airrep.encoder import load_encoder

        encoder = load_encoder(self.folder(context), context.device, self.dtype)
        changes = {"max_tokens": self.max_tokens, "template": self.text}
        encoder.text = replace(encoder.text, **{k: v for k, v in changes.items() if v})  # type: ignore[arg-type]
        return encoder

    def encode(self, context: Context, examples: Sequence[Example], role: Role) -> Rows:
        from tdabench_airrep.encoder import encode

        encoder = self.open(context)
        if role == "query" or self.store == "float32":
            return encode(encoder, examples, progress=context.progress)
        from tdabench.api import FeatureStore

        kept = FeatureStore.create(
            context.scratch / "airrep-rows", len(examples), encoder.dim, self.store
        )
        for a in range(0, len(examples), WINDOW):
            rows = encode(encoder, examples[a : a + WINDOW], progress=context.progress)
            kept.write(np.arange(a, a + len(rows)), rows)
        kept.close()
        return kept

    def build(self, context: Context, train: Sequence[Example]) -> AirRepIndex:
        return AirRepIndex.of(super().build(context, train))

    def load(self, context: Context, path: Path) -> AirRepIndex:
        return AirRepIndex.of(super().load(context, path))

    def prepare_cost(self, context: Context) -> Mapping[str, float] | None:
        """Seconds and retrainings behind the encoder, as its own record tells them."""
        path = self.folder(context) / "airrep.json"
        if not path.exists():
            return None
        cost = read_json(path).get("cost") or {}
        return {k: float(cost[k]) for k in ("seconds", "retrainings") if k in cost} or None


class AirRepIndex(RepresentationIndex):
    """Training embeddings; group scores of a corpus of any size in one pass over them."""

    @classmethod
    def of(cls, index: RepresentationIndex) -> AirRepIndex:
        return cls(index.method, index.context, index.rows, index.state)

    def score_groups(self, queries: Sequence[Example], groups: Groups) -> np.ndarray:
        if len(queries) * self.n_train <= WHOLE:
            return super().score_groups(queries, groups)
        return stream_groups(
            self.query_features(queries), self.rows, groups, self.pooling, self.temperature
        )

    def score_corpus(self, queries: Sequence[Example]) -> np.ndarray:
        """Score of the whole corpus as one group, float32 [query], in constant memory."""
        q = self.query_features(queries)
        return stream_groups(q, self.rows, None, self.pooling, self.temperature)[:, 0]


def stream_groups(
    q: np.ndarray,  # [query, dim]
    rows: Rows,  # [train, dim]
    groups: Groups | None,
    pooling: str,
    temperature: float = 1.0,
    bytes_a_block: int = 16 << 20,
) -> np.ndarray:
    """Pooled scores float32 [query, group] in one pass over `rows`; no groups: all of them as one.

    Holds [query, block] and [query, group], never [query, train]. A softmax is carried along as
    (maximum, sum of exponentials, weighted sum) of each group, rescaled when the maximum rises.
    """
    member = None if groups is None else groups.membership(np.float64).tocsc()  # [group, train]
    sizes = np.array([rows.shape[0]]) if groups is None else groups.sizes
    shape = (len(q), len(sizes))
    top, norm, total = np.full(shape, -np.inf), np.zeros(shape), np.zeros(shape)
    step = max(1, bytes_a_block // (8 * max(1, len(q))))
    for a, block in row_blocks(rows, bytes_a_block):
        for b in range(0, block.shape[0], step):
            s = (q @ block[b : b + step].T).astype(np.float64)  # [query, step]
            logits = (np.abs(s) if pooling == "softmax-abs" else s) / temperature
            for g, ids in _members(member, a + b, s.shape[1]):
                x = s[:, ids]
                if pooling in ("sum", "mean"):
                    total[:, g] += x.sum(1)
                    continue
                high = np.maximum(top[:, g], logits[:, ids].max(1))
                shrink, e = np.exp(top[:, g] - high), np.exp(logits[:, ids] - high[:, None])
                norm[:, g] = norm[:, g] * shrink + e.sum(1)
                total[:, g] = total[:, g] * shrink + (e * x).sum(1)
                top[:, g] = high
    if pooling == "mean":
        total /= np.maximum(sizes, 1)
    elif pooling != "sum":
        total /= np.where(norm > 0, norm, 1.0)  # an empty group scores 0
    return total.astype(np.float32)


def _members(member: Any, first: int, n: int) -> Iterator[tuple[int, Any]]:
    """(group, its places among the `n` rows from `first`) of every group with a member there."""
    if member is None:
        yield 0, slice(None)
        return
    part = member[:, first : first + n].tocsr()
    for g in np.flatnonzero(np.diff(part.indptr)):
        yield int(g), part.indices[part.indptr[g] : part.indptr[g + 1]]
