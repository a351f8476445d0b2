"""Chooses every method's parameters on pocket's tuning truth and writes them into suite.toml.

    python -m tools.pocket.make_tuned [--suite FOLDER] [--target instruct] [METHOD …]

Each method tries its own grid (`TDAMethod.grid`, poolings and temperatures) by `tdabench tune`. The
test queries and the test truth are not opened.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tdabench.io import write_text
from tdabench.registry import registry
from tdabench.run.sources import load_suite
from tdabench.run.tune import default_grid, tune, with_tuned
from tools.pocket import SUITE
from tools.pocket.make_hashes import MARK

# What has nothing to tune. Methods of extras that are not installed say so and are passed over.
LEFT_ALONE = ("random", "length", "gradnorm", "sametask", "response-ngram", "response-tfidf")
HEAD = "# Chosen on the tuning truth: python -m tools.pocket.make_tuned\n"


def with_table(text: str, target: str, method: str, params: dict[str, Any], lds: float) -> str:
    """Returns suite.toml with a tuned table replaced or added, above the table of hashes."""
    text, _, hashes = text.partition(MARK)
    if HEAD not in text:
        text = text.rstrip("\n") + "\n\n" + HEAD
    text = with_tuned(text, target, method, params, lds)
    return text + (MARK + hashes if hashes else "")


def choose(path: Path, target: str, name: str, grid: Mapping[str, Sequence[Any]]) -> None:
    """Tunes a method over `grid`, prints its best parameters and writes them into suite.toml."""
    best = tune(str(path), target, name, grid, fresh=True)[0]
    if best.error:
        print(f"{target} {name}: {best.error}", file=sys.stderr, flush=True)
        return
    params = registry().method(name).cls.from_params(best.params).params
    chosen = {k: params[k] for k in best.params}
    print(f"{target} {name}: {best.lds:.3f} {chosen}", file=sys.stderr, flush=True)
    now = path.read_text(encoding="utf-8")
    write_text(path, with_table(now, target, name, chosen, best.lds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--target", action="append", help="Default: every target.")
    parser.add_argument("--suite", type=Path, default=SUITE, help="Folder of the suite.")
    args = parser.parse_args()
    path = args.suite / "suite.toml"
    suite = load_suite(path, targets=tuple(args.target or ()) or None)
    names = args.methods or [m for m in registry().methods if m not in LEFT_ALONE]
    for target in args.target or [t.label for t in suite.targets]:
        for name in names:
            choose(path, target, name, default_grid(registry().method(name).cls))


if __name__ == "__main__":
    main()
