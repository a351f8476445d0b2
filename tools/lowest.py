"""Prints the lowest allowed version of every dependency, as requirements.

python tools/lowest.py [pyproject.toml] > lowest.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def lowest(project: Path) -> list[str]:
    """Returns `name==version` of the dependencies in a pyproject.toml, in its order."""
    listed = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    out = []
    for text in listed:
        found = re.fullmatch(r"([\w.-]+)>=([\w.]+)", text.replace(" ", ""))
        if not found:
            raise ValueError(f"{project}: {text!r} does not have the form name>=version")
        out.append(f"{found[1]}=={found[2]}")
    return out


if __name__ == "__main__":
    print("\n".join(lowest(Path(sys.argv[1] if len(sys.argv) > 1 else "pyproject.toml"))))
