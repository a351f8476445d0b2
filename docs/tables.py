"""Writes the tables of results in docs/ from the records of runs.

python docs/tables.py RUN [RUN …]

Pages: methods/fidelity.md, benchmarks/loo.md, removal.md, selection.md. If a method, target and
benchmark have several successful records, the record in the last folder counts, and within a folder
the latest. Times are processor times, which other work on the machine distorts least. A page whose
benchmark is not in any of the runs stays as it is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
Record = dict[str, Any]
Records = dict[tuple[str, str], Record]  # (target, method)


def records(folders: list[Path], benchmark: str) -> Records:
    found: Records = {}
    ranks: dict[tuple[str, str], tuple[bool, int, str]] = {}
    places = ((i, p) for i, folder in enumerate(folders) for p in folder.glob("cells/*.json"))
    for i, path in places:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["benchmark"]["name"] != benchmark or record["method"]["passed"]:
            continue
        key = record["target"]["label"], record["method"]["label"]
        rank = (record["status"] == "ok", i, record["started"])
        if key not in ranks or rank > ranks[key]:
            found[key], ranks[key] = record, rank
    return found


def interval(metric: dict[str, float], digits: int = 3) -> str:
    value, low, high = (f"{metric[k]:.{digits}f}" for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def markdown(header: str, rows: Iterable[list[str]], numbers: int = 0) -> list[str]:
    """Lines of a table whose last `numbers` columns are right-aligned."""
    names = header.split(" | ")
    rules = ["---"] * (len(names) - numbers) + ["--:"] * numbers
    return [
        f"| {header} |",
        f"|{'|'.join(rules)}|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def good(found: Records, target: str, metric: str, sign: int = -1) -> list[Record]:
    """Records of a target that succeeded, best first."""
    of = [r for (t, _), r in found.items() if t == target and r["status"] == "ok"]
    return sorted(of, key=lambda r: sign * r["metrics"][metric]["value"])


# --------------------------------------------------------------------------- pages


def fidelity(found: Records) -> list[str]:
    lines = []
    for target in sorted({t for t, _ in found}, key=lambda t: (t != "instruct", t)):
        rows = good(found, target, "lds")
        ceiling = next((r["metrics"]["ceiling"]["value"] for r in rows), float("nan"))
        header = "method | tuned settings | LDS [95%] | of ceiling | build | per query | bytes/ex"
        lines += [f"### {target} (noise ceiling {ceiling:.2f})", ""]
        lines += markdown(header, map(_fidelity_row, rows), 4)
        rest = [
            f"`{m}` ({r['status']})"
            for (t, m), r in found.items()
            if t == target and r["status"] != "ok"
        ]
        if rest:
            lines += [f"Without a result in these runs: {', '.join(sorted(rest))}.", ""]
    return lines[:-1]


def _fidelity_row(record: Record) -> list[str]:
    method, cost, metrics = record["method"], record["cost"], record["metrics"]
    tuned = ", ".join(f"{k}={_short(v)}" for k, v in method["tuned"].items()) or "defaults"
    share, query = metrics.get("share_of_ceiling"), cost["query"]
    each = 1e3 * query["cpu_seconds"] / max(1, query["queries"])
    return [
        f"`{method['label']}`",
        tuned,
        interval(metrics["lds"]),
        f"{share['value']:.0%}" if share else "",
        f"{cost['build']['cpu_seconds']:.3g} s",
        f"{each:.3g} ms",
        f"{cost['bytes_per_example']:,.0f}",
    ]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def loo(found: Records) -> list[str]:
    rows = good(found, "instruct", "loo")
    cells = [[f"`{r['method']['label']}`", interval(r["metrics"]["loo"])] for r in rows]
    half = (len(cells) + 1) // 2
    right = cells[half:] + [["", ""]] * (2 * half - len(cells))
    pairs = [[*a, "", *b] for a, b in zip(cells[:half], right)]
    return markdown("method | loo [95%] |  | method | loo [95%]", pairs)[:-1]


def removal(found: Records) -> list[str]:
    def row(record: Record) -> list[str]:
        m = record["metrics"]
        rises = [f"{m[f'rise@{k}']['value']:.2f}" for k in (5, 20)]
        return [f"`{record['method']['label']}`", interval(m["removal"], 2), *rises]

    header = "method | removal [95%] | rise@5 | rise@20"
    return markdown(header, map(row, good(found, "instruct", "removal")))[:-1]


def selection(found: Records) -> list[str]:
    def row(record: Record) -> list[str]:
        m = record["metrics"]
        losses = [f"{m[f'loss@{k}']['value']:.2f}" for k in (20, 60)]
        of = [interval(m[k], 2) for k in ("loss", "gain_over_random")]
        return [f"`{record['method']['label']}`", *of, *losses]

    header = "method | loss [95%] | reduction from random examples [95%] | k = 20 | k = 60"
    return markdown(header, map(row, good(found, "instruct", "loss", sign=1)))[:-1]


PAGES: list[tuple[str, str, Callable[[Records], list[str]]]] = [
    ("methods/fidelity.md", "lds", fidelity),
    ("benchmarks/loo.md", "loo", loo),
    ("benchmarks/removal.md", "removal", removal),
    ("benchmarks/selection.md", "selection", selection),
]


def main() -> None:
    folders = [Path(a) for a in sys.argv[1:]]
    written = 0
    for name, benchmark, page in PAGES:
        found = records(folders, benchmark)
        if not found:
            continue
        path = DOCS / name
        text = path.read_text(encoding="utf-8")
        pattern = re.compile(
            r"(<!-- results: generated by docs/tables.py -->\n).*?(<!-- end of results -->)", re.S
        )
        if not pattern.search(text):
            sys.exit(f"{path} has no marks")
        body = "\n".join(page(found)) + "\n"
        path.write_text(pattern.sub(lambda m, b=body: m[1] + b + m[2], text), encoding="utf-8")
        written += 1
    if not written:
        sys.exit(f"no records of these benchmarks in {sys.argv[1:]}")


if __name__ == "__main__":
    main()
