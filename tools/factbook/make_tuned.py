"""Chooses parameters of methods on factbook's tuning truth and writes them into suite.toml.

    python -m tools.factbook.make_tuned [--target small] [METHOD …]

The grids are smaller than the methods' own (`tools.pocket.make_tuned`), so that all of it takes
minutes of one core: gradients at the base only, the damping that pocket's targets chose most
often, and every pooling. The test queries and the test truth are not opened.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tdabench.io import write_text
from tdabench.registry import registry
from tdabench.run.tune import tune
from tools.factbook import SUITE
from tools.pocket.make_tuned import with_table

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
        cls = registry().method(name).cls
        best = tune(str(path), args.target, name, {**GRIDS[name], **POOLED}, fresh=True)[0]
        if best.error:
            print(f"{name}: {best.error}", file=sys.stderr, flush=True)
            continue
        params = cls.from_params(best.params).params
        chosen = {k: params[k] for k in best.params}
        print(f"{name}: {best.lds:.3f} {chosen}", file=sys.stderr, flush=True)
        now = path.read_text(encoding="utf-8")
        write_text(path, with_table(now, args.target, name, chosen, best.lds))


if __name__ == "__main__":
    main()
