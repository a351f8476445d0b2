"""The method `airrep`: encodes with a trained encoder and pools groups by attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tdabench.api import (
    Context,
    Example,
    RepresentationMethod,
    Role,
    Rows,
    UsageError,
    read_json,
)

if TYPE_CHECKING:
    from tdabench_airrep.encoder import Encoder

WINDOW = 16_384  # examples encoded at a time into a store
UNTRAINED = ":untrained"  # behind the name of an asset, or a folder
WHITENED_ON = 1000  # training examples


@dataclass(frozen=True, kw_only=True)
class AirRep(RepresentationMethod):
    """f(x, S) = Enc(x) . sum_i a_i Enc(z_i), a = softmax over S of |Enc(x) . Enc(z_i)|.

    Source: arXiv 2505.18513, eq. 5.

    encoder     a folder, or the name of an asset of the suite; with ":untrained" behind, the
                encoder before training: its body and a projection that centres and whitens
                states of the training corpus, without labels
    max_tokens  tokens read per example; 0: as set by the encoder
    text        template with {prompt} and {response}; "": as set by the encoder
    dtype       of the arithmetic
    store       dtype of the stored training rows (int8: each row with its own scale)
    """

    name: ClassVar[str] = "airrep"
    version: ClassVar[int] = 2
    family: ClassVar[str] = "learned"
    source: ClassVar[str] = "arXiv 2505.18513"
    summary: ClassVar[str] = "encoder trained on retraining labels, attention-pooled groups"
    # Pooling is the published one; training sets the scale of the scores, tuning may correct it.
    grid: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "pooling": ("softmax-abs",),
        "temperature": (1.0, "auto"),
    }

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
        """Returns the encoder's folder: a suite's asset of that name, else a path."""
        name = self.encoder.removesuffix(UNTRAINED)
        if name in context.assets:
            return context.asset(name)
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        if "/" in name or path.exists():
            raise UsageError(
                f"airrep: there is no encoder folder {name}",
                "Train one with: tdabench airrep train",
            )
        return context.asset(name)

    def open(self, context: Context) -> Encoder:
        """Opens the encoder with this method's text parameters."""
        from dataclasses import replace

        from tdabench_airrep.loading import load_encoder

        folder = self.folder(context)
        if self.encoder.endswith(UNTRAINED):
            from tdabench_airrep.pipeline import untrained

            encoder = untrained(folder, context.target, context.device, self.dtype)
        else:
            encoder = load_encoder(folder, context.device, self.dtype, context.target)
        changes = {"max_tokens": self.max_tokens, "template": self.text}
        encoder.text = replace(encoder.text, **{k: v for k, v in changes.items() if v})  # type: ignore[arg-type]
        return encoder

    def learn(self, context: Context, train: Sequence[Example]) -> dict[str, np.ndarray]:
        """Computes the projection of an untrained encoder; a trained one needs nothing."""
        if not self.encoder.endswith(UNTRAINED) or not len(train):
            return {}
        from tdabench_airrep.train import whiten_projection

        encoder = self.open(context)
        by_id = sorted(train, key=lambda e: e.id)  # the order of the corpus does not matter
        n = min(WHITENED_ON, len(by_id))
        chosen = context.rng("airrep/sample").choice(len(by_id), n, replace=False)
        tokens = encoder.tokenize([by_id[i] for i in chosen])
        whiten_projection(encoder, tokens, context.rng("airrep/whiten"))
        projector = encoder.fold().projector
        return {k: v.float().cpu().numpy() for k, v in projector.state_dict().items()}

    def features(
        self,
        context: Context,
        examples: Sequence[Example],
        role: Role,
        state: dict[str, np.ndarray],
    ) -> Rows:
        encoder = self.open(context)
        if state:
            import torch

            with torch.no_grad():
                for name, value in encoder.projector.named_parameters():
                    value.copy_(torch.from_numpy(state[name]))
        return self._encoded(encoder, context, examples, role)

    def encode(self, context: Context, examples: Sequence[Example], role: Role) -> Rows:
        return self._encoded(self.open(context), context, examples, role)

    def _encoded(
        self, encoder: Encoder, context: Context, examples: Sequence[Example], role: Role
    ) -> Rows:
        from tdabench_airrep.encoder import encode

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

    def prepare_cost(self, context: Context) -> Mapping[str, float] | None:
        """Returns seconds and retrainings behind the encoder, from its own record."""
        if self.encoder.endswith(UNTRAINED):
            return None
        path = self.folder(context) / "airrep.json"
        if not path.exists():
            return None
        cost = read_json(path).get("cost") or {}
        return {k: float(cost[k]) for k in ("seconds", "retrainings") if k in cost} or None
