"""Observes changes of the process by running code; `tdabench.run.watch` observes the disk."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tdabench.run.watch import file_events, outside

__all__ = ["file_events", "global_seeds", "outside", "process_state"]


@contextmanager
def global_seeds(seed: int) -> Iterator[None]:
    """Seeds Python's, numpy's and torch's global generators within, and restores them after."""
    import torch

    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)  # the streams that methods must not draw from
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


def process_state() -> dict[str, Any]:
    """Returns settings of the process that a method must not change."""
    import torch

    return {
        "the working directory": os.getcwd(),
        "environment variables": dict(os.environ),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's number of threads": torch.get_num_threads(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "numpy's error handling": np.geterr(),
    }
