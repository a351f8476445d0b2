"""Observes changes of the process by running code; `tdabench.run.watch` observes the disk."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tdabench.run.nursery import adopting_orphans, below, command_of, is_alive
from tdabench.run.watch import file_events, outside

__all__ = ["file_events", "global_seeds", "left_running", "outside", "process_state"]


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


ENDING_SECONDS = 0.5  # what has been told to end has this long to do so


@contextmanager
def left_running() -> Iterator[Callable[[], list[str]]]:
    """Yields a function that describes the threads and processes started within that still run.

    Orphans count (on Linux). Processes that still run at the end are killed. Without /proc, only
    threads and the children that `multiprocessing` knows of are seen.
    """
    threads, processes = set(threading.enumerate()), set(_processes())

    def started() -> tuple[list[threading.Thread], list[int]]:
        return (
            [t for t in threading.enumerate() if t not in threads],
            [p for p in _processes() if p not in processes],
        )

    def left() -> list[str]:
        end = time.monotonic() + ENDING_SECONDS
        while any(found := started()) and time.monotonic() < end:
            time.sleep(0.01)
        return [
            *(f"the process {command_of(p)}" for p in found[1]),
            *(f"the thread {t.name!r}" for t in found[0]),
        ]

    with adopting_orphans():
        try:
            yield left
        finally:
            for pid in started()[1]:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(OSError):
                    os.waitpid(pid, 0)  # refused for what is not a child of this process


def _processes() -> list[int]:
    """Returns the ids of all processes below this one that have not ended."""
    if sys.platform == "linux":
        return [p for p in below(os.getpid()) if is_alive(p)]
    import multiprocessing

    return [p.pid for p in multiprocessing.active_children() if p.pid is not None]
