"""Chooses parameters of methods on factbook's tuning truth and writes them into suite.toml.

    python -m tools.factbook.make_tuned [--target small] [METHOD …]

The grids are smaller than the methods' own (`tools.pocket.make_tuned`), so that all of it takes
minutes of one core: gradients at the base only, the damping that pocket's targets chose most
often, and every pooling. The test queries and the test truth are not opened.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.factbook import SUITE
from tools.pocket.make_tuned import choose

POOLED: Mapping[str, Sequence[Any]] = {
    "pooling": ("sum", "softmax", "softmax-abs"),
    "temperature": ("auto",),
}
TEXT: Mapping[str, Sequence[Any]] = {"train_text": ("both", "response")}
GRIDS: dict[str, Mapping[str, Sequence[Any]]] = {
    "bm25": TEXT,
    "tfidf": TEXT,
    "dsir": TEXT,
    "ngram": {"unit": ("word", "char"), "n": ((1, 2, 3, 4),)},
    "hidden": {"layer": (-1,), "weighting": ("mean", "position")},
    "airrep": {},
    "embedding": {},
    "graddot": {},
    "gradcos": {},
    "hiddengrad": {"whiten": (True,), "normalise": (True,)},
    "logra": {"damping": (0.1, 1.0)},
    "trak": {"damping": (1.0,)},
    "trackstar": {"damping": (1.0,)},
    "less": {},
    "dsdm": {"damping": (1.0,)},
    "factgrass": {"damping": (0.1,)},
    "lorif": {"damping": (1.0,)},
    "tracin": {},
    "identity": {},
    "datainf": {"damping": (0.01,)},
    "kfac": {"damping": (0.001,)},
    "ekfac": {"damping": (0.001,)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(GRIDS)}")
    parser.add_argument("--target", default="small")
    parser.add_argument("--suite", type=Path, default=SUITE, help="folder of the suite")
    args = parser.parse_args()
    path = args.suite / "suite.toml"
    for name in args.methods or GRIDS:
        choose(path, args.target, name, {**GRIDS[name], **POOLED})


if __name__ == "__main__":
    main()
