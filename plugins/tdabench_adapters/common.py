"""What the adapters share: importing a package that may be absent, and batches it can read."""

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

    checkpoint  checkpoint of the target;  layers  regular expression searched in layer names
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
    """The module `name`, or MissingExtra. What importing it changes in the process is put back."""
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
    """Progress bars, logs, warnings and global random draws of another package stay within."""
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
    """Additive causal mask [b, 1, t, t]: building it from padding fails under vmap."""
    import torch

    t = batch.input_ids.shape[1]
    causal = torch.ones(t, t, device=batch.input_ids.device).tril().bool()
    seen = causal & batch.attention_mask.bool()[:, None, None, :]
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, math.log(1e-30))


def padded(context: Context, tokens: Sequence[Tokens]) -> Batch:
    """All of `tokens` in one batch, in their order."""
    from tdabench.api import pad

    return pad(tokens, np.arange(len(tokens)), context.target.pad_id)


def longest_first(tokens: Sequence[Tokens]) -> np.ndarray:
    """Places by length, so that batches hold little padding: [n]."""
    return np.argsort([-len(t) for t in tokens], kind="stable")
