"""Builders of the embedded suite `pocket`: corpus, planted corpora, targets, tuned values, hashes.

They run from a checkout, as `python -m tools.pocket.make_corpus`, and are not part of the wheel.
"""

from __future__ import annotations

from pathlib import Path

SUITE = Path(__file__).parents[2] / "tdabench" / "suites" / "pocket"  # of this checkout
CORPUS = SUITE / "corpus.jsonl.gz"
