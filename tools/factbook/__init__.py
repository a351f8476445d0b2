"""Builders of the suite `factbook`: corpus, small target, board.

They run from a checkout, as `python -m tools.factbook.make_corpus`, and are in no wheel.
"""

from __future__ import annotations

from pathlib import Path

SUITE = Path(__file__).parents[2] / "suites" / "factbook" / "tdabench_factbook"  # of this checkout
CORPUS = SUITE / "corpus.jsonl.gz"
