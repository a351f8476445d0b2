"""The key of a cell, computed by the plan before it runs and again by any verifier of a record."""

from __future__ import annotations

from typing import Any

from tdabench.io import fingerprint

SCHEMA = 1


def cell_key(
    method: Any, target: str, corpus: Any, benchmark: Any, truth: Any, seed: int, device: str
) -> str:
    """Computes the key of a cell: the hash of everything that changes its result.

    `method` is [name, version, parameters that change scores], `benchmark` [name, version,
    parameters]; `target` and `corpus` are fingerprints.
    """
    return fingerprint(
        {
            "schema": SCHEMA,
            "method": method,
            "target": target,
            "corpus": corpus,
            "benchmark": benchmark,
            "truth": truth,
            "seed": seed,
            "device": device.partition(":")[0],  # cuda:0 and cuda:1 give the same scores
        }
    )
