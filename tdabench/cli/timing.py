"""`tdabench timing`: prints and compares timing reports of pytest-benchmark."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tdabench.cli.common import emit_json, json_option, print_table
from tdabench.errors import DataError, UsageError, notice


@click.command(
    epilog="""\b
Examples:
  pytest -p tdabench.testing.timing --pyargs tdabench.testing.time_methods \\
      --methods mine --benchmark-json timing.json
  tdabench timing timing.json
  tdabench timing before.json after.json --fail-above 20
"""
)
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="FILE...",
    type=click.Path(path_type=Path, dir_okay=False),
)
@click.option("--phase", type=click.Choice(["build", "query"]), help="Only this phase.")
@click.option(
    "--fail-above",
    type=click.FloatRange(min=0),
    metavar="PERCENT",
    help="Exit with 1 if a call in the last file is this much slower than in the first.",
)
@json_option
def command(
    files: tuple[Path, ...], phase: str | None, fail_above: float | None, as_json: bool
) -> None:
    """Print timing reports; with several, compare each with the first.

    A call is slower or faster if its median changed by at least 10% (or by --fail-above) and the
    interquartile ranges of the two measurements do not overlap.
    """
    reports = [read_report(f) for f in files]
    calls = [key for key in dict.fromkeys(k for r in reports for k in r) if phase in (None, key[2])]
    if not calls:
        raise UsageError("these reports contain no timed calls", "See: tdabench timing --help")
    limit = 1 + (10.0 if fail_above is None else fail_above) / 100
    rows = []
    for key in calls:
        first = reports[0].get(key)
        for n, report in enumerate(reports):
            if key in report:
                row = {**report[key], "file": str(files[n])}
                if n and first:
                    row |= compared(first, row, limit)
                rows.append(row)
    if as_json:
        emit_json(rows)
    else:
        print_rows(rows, several=len(files) > 1)
    machines = {r["machine"] for r in rows}
    if len(machines) > 1:
        notice(f"these were timed on different machines: {', '.join(sorted(machines))}")
    if fail_above is not None and any(
        r.get("verdict") == "slower" and r["file"] == str(files[-1]) for r in rows
    ):
        sys.exit(1)


def read_report(path: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Reads timed calls of a pytest-benchmark JSON file by (method, training examples, phase).

    Raises DataError for any other file.
    """
    from tdabench.io import read_json

    report = read_json(path)
    found: dict[tuple[str, int, str], dict[str, Any]] = {}
    try:
        machine = report["machine_info"].get("cpu", {}).get("brand_raw") or "unknown processor"
        for b in report["benchmarks"]:
            info, stats = b["extra_info"], b["stats"]
            if "phase" not in info or "method" not in info:
                continue  # another benchmark
            key = (info["method"], int(info["n_train"]), info["phase"])
            found[key] = {
                "method": key[0],
                "n_train": key[1],
                "phase": key[2],
                "n_queries": info.get("n_queries"),
                "median": stats["median"],
                "q1": stats["q1"],
                "q3": stats["q3"],
                "rounds": stats["rounds"],
                "peak_bytes": info.get("peak_bytes"),
                "bytes_per_example": info.get("bytes_per_example"),
                "machine": machine,
            }
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise DataError(
            f"{path} is not a pytest-benchmark report ({type(e).__name__}: {e})",
            "Write one with: pytest benchmarks/ --benchmark-json FILE",
        ) from e
    return found


def compared(first: dict[str, Any], row: dict[str, Any], limit: float) -> dict[str, Any]:
    """Returns the ratio of the medians, and a verdict."""
    ratio = row["median"] / first["median"] if first["median"] else float("inf")
    verdict = "same"
    if ratio >= limit and row["q1"] > first["q3"]:
        verdict = "slower"
    elif ratio <= 1 / limit and row["q3"] < first["q1"]:
        verdict = "faster"
    return {"ratio": round(ratio, 4), "verdict": verdict}


def print_rows(rows: list[dict[str, Any]], several: bool) -> None:
    header = ["method", "train", "phase", "median", "quartiles", "a second", "bytes/ex", "peak"]
    if several:
        header += ["relative to first", "file"]
    table = []
    for r in rows:
        items = r["n_train"] if r["phase"] == "build" else r["n_queries"]
        rate = items / r["median"] if items and r["median"] else None
        cells = [
            r["method"],
            f"{r['n_train']:,}",
            r["phase"],
            seconds(r["median"]),
            f"{seconds(r['q1'])} – {seconds(r['q3'])}",
            "" if rate is None else f"{rate:,.0f} {'ex' if r['phase'] == 'build' else 'q'}",
            "" if r["bytes_per_example"] is None else f"{r['bytes_per_example']:,.0f}",
            "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:,.1f} MiB",
        ]
        if several:
            change = f"{r['ratio']:.2f}x {r['verdict']}" if "ratio" in r else ""
            cells += [change, r["file"]]
        table.append(cells)
    print_table(header, table)


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e9:.0f} ns"
