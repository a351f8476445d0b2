"""Writes the sha256 of every shipped asset into suite.toml, or checks them.

python -m tools.pocket.make_hashes [--suite FOLDER] [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tdabench.io import sha256_file, write_text
from tools.pocket import SUITE

MARK = "\n# sha256 of every asset: python -m tools.pocket.make_hashes\n[hashes]\n"
KINDS = (".gz", ".safetensors", ".json")


def assets(suite: Path) -> list[Path]:
    return sorted(p for p in suite.rglob("*") if p.is_file() and p.name.endswith(KINDS))


def hashed(toml: str, suite: Path = SUITE) -> str:
    """Returns the suite file with its [hashes] table computed from the files in `suite`."""
    head, _, old = toml.partition(MARK)
    head = head.rstrip("\n") + "\n"
    lines = [line for line in old.splitlines() if line.startswith('"package:')]  # stay as they are
    lines += [f'"{p.relative_to(suite).as_posix()}" = "{sha256_file(p)}"' for p in assets(suite)]
    return head + MARK + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="Only say whether they are right.")
    parser.add_argument("--suite", type=Path, default=SUITE, help="Folder of the suite.")
    args = parser.parse_args()
    path = args.suite / "suite.toml"
    before = path.read_text(encoding="utf-8")
    after = hashed(before, args.suite)
    if args.check:
        sys.exit(0 if before == after else "suite.toml does not hold the hashes of its assets")
    write_text(path, after)
    found = assets(args.suite)
    size = sum(p.stat().st_size for p in found)
    print(f"{len(found)} assets, {size / 1e6:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
