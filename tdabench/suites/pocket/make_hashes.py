"""Writes the sha256 of every shipped asset into suite.toml, or checks them.

python -m tdabench.suites.pocket.make_hashes [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tdabench.io import sha256_file, write_text

HERE = Path(__file__).parent
MARK = "\n# sha256 of every asset: python -m tdabench.suites.pocket.make_hashes\n[hashes]\n"
KINDS = (".gz", ".safetensors", ".json")


def assets() -> list[Path]:
    return sorted(p for p in HERE.rglob("*") if p.is_file() and p.name.endswith(KINDS))


def hashed(toml: str) -> str:
    """The suite file with its [hashes] table made anew."""
    head = toml.split(MARK)[0].rstrip("\n") + "\n"
    lines = [f'"{p.relative_to(HERE).as_posix()}" = "{sha256_file(p)}"' for p in assets()]
    return head + MARK + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="Only say whether they are right.")
    args = parser.parse_args()
    path = HERE / "suite.toml"
    before = path.read_text(encoding="utf-8")
    after = hashed(before)
    if args.check:
        sys.exit(0 if before == after else "suite.toml does not hold the hashes of its assets")
    write_text(path, after)
    size = sum(p.stat().st_size for p in assets())
    print(f"{len(assets())} assets, {size / 1e6:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
