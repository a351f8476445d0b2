"""Base of the adapters: importing a package that may be absent, and batches in its format."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.api import Context, MissingExtra, TDAMethod, check_pooling

if TYPE_CHECKING:
    import torch

    from tdabench.api import Batch, Tokens


@dataclass(frozen=True, kw_only=True)
class PackageMethod(TDAMethod):
    """A method that another package computes.

    checkpoint   checkpoint of the target at which gradients are computed
    layers       regular expression searched in layer names; None is all but the output head
    pooling      how example scores become a group's: sum, mean, softmax or softmax-abs
    temperature  of softmax pooling; unused by sum and mean
    """

    family = "package"
    grid = {"checkpoint": ("base", "warm")}

    pooling: str = "sum"
    temperature: float = 1.0
    checkpoint: str = "base"
    layers: str | None = None

    def __post_init__(self) -> None:
        check_pooling(self.name, self.pooling, self.temperature)

    def layer_names(self, model: Any) -> list[str]:
        from tdabench.api import select_layers

        return [name for name, _ in select_layers(model, self.layers)]


def package(name: str, extra: str, remedy: str = "") -> Any:
    """Imports the module `name` and restores the process state; raises MissingExtra."""
    before = dict(os.environ)
    try:
        with contained():
            return importlib.import_module(name)
    except ImportError as e:
        what = extra if e.name is None or e.name.split(".")[0] == extra else f"{extra}'s {e.name}"
        raise MissingExtra(f"the package {what}", extra, remedy) from e
    finally:
        if dict(os.environ) != before:
            os.environ.clear()
            os.environ.update(before)


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Contains another package's progress bars, logs, warnings and global random draws."""
    import torch

    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    silent = io.StringIO()
    try:
        with (
            contextlib.redirect_stderr(silent),
            contextlib.redirect_stdout(silent),
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=[]),  # a DataLoader draws a seed for its workers
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def causal_mask(batch: Batch) -> torch.Tensor:
    """Builds an additive causal mask [b, 1, t, t]: deriving it from padding fails under vmap."""
    import torch

    t = batch.input_ids.shape[1]
    causal = torch.ones(t, t, device=batch.input_ids.device).tril().bool()
    seen = causal & batch.attention_mask.bool()[:, None, None, :]
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, math.log(1e-30))


def padded(context: Context, tokens: Sequence[Tokens]) -> Batch:
    """Pads all of `tokens` into one batch, in order."""
    from tdabench.api import pad

    return pad(tokens, np.arange(len(tokens)), context.target.pad_id)


def longest_first(tokens: Sequence[Tokens]) -> np.ndarray:
    """Returns positions [n] sorted by length, so that batches have little padding."""
    return np.argsort([-len(t) for t in tokens], kind="stable")
