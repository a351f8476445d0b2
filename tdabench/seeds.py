"""Named seeds: the one source of randomness."""

from __future__ import annotations

from tdabench.io import fingerprint


def named_seed(seed: int, name: str) -> int:
    """Derives a 63-bit seed from a number and a name, the same on every machine."""
    return int(fingerprint([seed, name]), 16) >> 1
