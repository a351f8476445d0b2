"""Parameters of methods that follow a training run: its recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tdabench.api import UsageError

if TYPE_CHECKING:
    from tdabench.api import Context, Recipe


@dataclass(frozen=True, kw_only=True)
class Followed:
    """The training run to follow, by default the target's.

    recipe  fields that differ from the target's recipe, as "lr=1e-4,epochs=1". The run is AdamW
            over all weights, by epochs; other recipes are refused. Options that save memory
            (micro_batch, checkpointing, precision) and `keep` are ignored
    share   weight of every example in the run; None is the target's `fraction`. 1 trains on the
            whole corpus like on a group of that size. With the fraction of the corpus that the
            truth's groups hold, every example has that weight in batches of batch_size / share, so
            the run takes as many steps, at the same learning rates, as the truth's runs, and lies
            between them
    follow  name of a run of a truth, to train in its order: `<suite>-<target>-<truth>-s00` for
            the first seed of a truth with `order = "pool"`; "" draws an order
    """

    name: ClassVar[str]

    recipe: str = ""
    share: float | None = None
    follow: str = ""

    def check_followed(self) -> None:
        """Raises UsageError for a share out of range or an invalid recipe."""
        from tdabench.api import Recipe

        if self.share is not None and not 0 < self.share <= 1:
            raise UsageError(f"{self.name}: share must be in (0, 1], not {self.share}")
        Recipe().changed(self.recipe)

    def share_of(self, context: Context) -> float:
        """Returns the weight of every example in the run."""
        return context.target.fraction if self.share is None else self.share

    def recipe_of(self, context: Context) -> Recipe:
        """Returns the recipe of the run. Raises UsageError unless it is AdamW on all weights."""
        recipe = context.target.recipe.changed(self.recipe)
        for is_set, what in (
            (recipe.optimizer != "adamw", f"optimizer={recipe.optimizer}"),
            (recipe.lora_rank, f"lora_rank={recipe.lora_rank}"),
            (recipe.max_steps, f"max_steps={recipe.max_steps}"),
        ):
            if is_set:
                raise UsageError(
                    f"{self.name} follows AdamW over all weights, by epochs; the recipe of "
                    f"{context.target.name} says {what}",
                    f"Choose another method, or another run: --set {self.name}.recipe=…",
                )
        return recipe
