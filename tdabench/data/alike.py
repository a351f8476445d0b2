"""Near-duplicates of examples, by their text alone."""

from __future__ import annotations

ALIKE = 0.8  # overlap from which two examples count as nearly the same


def trigrams(text: str) -> frozenset[str]:
    """Returns the character trigrams of a text, lower-cased and with spaces collapsed."""
    t = f" {' '.join(text.lower().split())} "
    return frozenset(t[i : i + 3] for i in range(len(t) - 2)) or frozenset([t])


def overlap(a: frozenset[str], b: frozenset[str]) -> float:
    """Returns the Jaccard overlap |A & B| / |A | B| of two sets that are not empty."""
    both = len(a & b)
    return both / (len(a) + len(b) - both)
