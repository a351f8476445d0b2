"""Parameters of methods that follow a training run: its recipe."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal

from tdabench.api import UsageError

if TYPE_CHECKING:
    from tdabench.api import Recipe


@dataclass(frozen=True, kw_only=True)
class Followed:
    """The recipe of the run to follow; the defaults are those of `tdabench.api.Recipe`.

    The run is AdamW over all weights, by epochs; other options of a recipe are not supported.

    share  weight of every example in the run. 1 trains on the whole corpus like on a group of
           that size. With the fraction of the corpus that the truth's groups hold, every example
           has that weight in batches of batch_size / share, so the run takes as many steps, at the
           same learning rates, as the truth's runs, and lies between them
    """

    name: ClassVar[str]

    share: float = 1.0
    lr: float = 1e-3
    epochs: int = 2
    batch_size: int = 32
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0

    def check_recipe(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"{self.name}: share must be in (0, 1], not {self.share}")
        if self.epochs < 1 or self.batch_size < 1 or not self.lr > 0:
            raise UsageError(f"{self.name}: epochs, batch_size and lr must be positive")

    @property
    def recipe(self) -> Recipe:
        from tdabench.api import Recipe

        own = {f.name for f in fields(Followed)} - {"share"}
        return Recipe(**{name: getattr(self, name) for name in own})
