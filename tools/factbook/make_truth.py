"""Builds a target's truths in place: test, tuning, and without one country at a time (`small`).

    python -m tools.factbook.make_truth [--target smollm2] [lds|tuning|loo]

Retrainings that are finished are kept in truth-builds/, so that the command resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.factbook import SUITE


def main() -> None:
    from tdabench.cli import main as tdabench
    from tdabench.run.suite_file import read_suite

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("truths", nargs="*", help="default: all that the target plans")
    parser.add_argument("--target", default="small")
    parser.add_argument("--suite", type=Path, default=SUITE)
    parser.add_argument("--work", type=Path, default=Path("truth-builds"))
    parser.add_argument("--workers", default="auto")
    args = parser.parse_args()
    planned = read_suite(args.suite / "suite.toml").target(args.target).plans
    shared = ["--target", args.target, "--work", str(args.work), "--workers", args.workers]
    for name in args.truths or [n for n in ("lds", "tuning", "loo") if n in planned]:
        command = ["truth", "build", str(args.suite / "suite.toml"), *shared]
        if code := tdabench([*command, "--truth", name, "--in-place"]):
            raise SystemExit(code)


if __name__ == "__main__":
    main()
