"""Builds the truths of the small target in place: test, tuning, and without one country at a time.

    python -m tools.factbook.make_truth [lds|tuning|loo]

Retrainings that are finished are kept in truth-builds/, so that the command resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.factbook import SUITE


def main() -> None:
    from tdabench.cli import main as tdabench

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("truths", nargs="*", default=["lds", "tuning", "loo"])
    parser.add_argument("--suite", type=Path, default=SUITE)
    parser.add_argument("--work", type=Path, default=Path("truth-builds"))
    parser.add_argument("--workers", default="auto")
    args = parser.parse_args()
    shared = ["--target", "small", "--work", str(args.work), "--workers", args.workers]
    for name in args.truths:
        command = ["truth", "build", str(args.suite / "suite.toml"), *shared]
        if code := tdabench([*command, "--truth", name, "--in-place"]):
            raise SystemExit(code)


if __name__ == "__main__":
    main()
