"""Targets: language models under study, their loss and their training recipe."""

from tdabench.targets.batches import Batch, Tokens
from tdabench.targets.recipe import Recipe
from tdabench.targets.target import Target, example_losses, token_losses
from tdabench.targets.training import finetune

__all__ = ["Batch", "Recipe", "Target", "Tokens", "example_losses", "finetune", "token_losses"]
