"""The training recipe: every number that determines an encoder, recorded with it."""

from __future__ import annotations

from dataclasses import dataclass

from tdabench.api import POOLINGS, UsageError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The recipe, recorded with the encoder.

    Distillation: `distil_steps` steps of `distil_queries` x `distil_train` teacher scores.
    Ranking: at most `steps` steps, each of one instance, `dev` of its dev examples and `subsets`
    of its subsets (0: all). `pool` > 0 draws that many examples per step from the instance's pool
    and intersects the subsets with them, which is cheaper but only estimates the groups' scores.
    `anchor` adds that much of the distillation loss to every ranking step.
    `train_body` false trains only the projection and the length: the body runs once per example,
    and a step costs little more than its loss.
    `slope` lets the loss rank `e^b f` with a trained b, which is thrown away: the length of
    normalised embeddings, which otherwise also sets how steep the loss is, is then the trained
    temperature of the pooling alone. It moves `length_factor` times as fast as the projection.
    `dropout` is the share of the projection's (whitened) inputs that each step sets to zero, drawn
    per example; nothing is dropped outside training.
    The last `holdout` instances and every `probe`-th dev example are not trained on: the LDS of
    these queries on these instances is measured every `every` steps, and training ends after
    `patience` measurements without an improvement; the best weights are kept.
    """

    lr: float = 1e-4
    warmup: int = 10
    weight_decay: float = 0.01
    clip: float = 1.0
    head_factor: float = 1.0  # learning rate of the projection, as a multiple of the body's
    steps: int = 2000
    dev: int = 1000
    subsets: int = 32
    pool: int = 0
    low: float = 0.1
    high: float = 5.0
    pooling: str = "softmax-abs"
    temperature: float = 1.0
    anchor: float = 0.0
    train_body: bool = True
    slope: bool = False
    length_factor: float = 1.0
    dropout: float = 0.0
    holdout: int = 2
    probe: int = 5
    every: int = 20
    patience: int = 10
    distil_steps: int = 0
    distil_lr: float = 1e-3
    distil_queries: int = 256
    distil_train: int = 512
    whiten: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise UsageError(f"unknown pooling {self.pooling!r}", f"One of: {', '.join(POOLINGS)}")
        if not 0 <= self.low < self.high:
            raise UsageError(f"the weight thresholds {self.low} and {self.high} are not ordered")
        if not self.temperature > 0:
            raise UsageError(f"the pooling temperature must be positive, not {self.temperature}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        for name in ("lr", "distil_lr", "length_factor"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("every", "probe", "patience", "distil_queries", "distil_train"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
