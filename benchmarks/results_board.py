"""Building and opening time of the board of 1,000 submissions of 30 methods.

    python benchmarks/results_board.py [--submissions 1000] [--methods 30] [--keep FOLDER]

Writes a results repository of random scores on two suites with two targets each, three benchmarks
per submission, several versions per method, and builds its site without a cache of comparisons.
Prints the seconds to read and to build, the size of the page and of the repository, and the wall
time to open the page in headless Chromium (from the start of the navigation to the load event, and
to the next frame). Needs selenium, Chromium and its driver for the latter.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from report_opening import opening

from tdabench.io import fingerprint, sha256_file, write_arrays, write_json
from tdabench.results.layout import HEAD, LAYOUT, MARK, identity, read_results
from tdabench.results.site import build_site
from tdabench.run.record import Record

BENCHMARKS = ("lds", "selection", "cost")
QUERIES, REPLICATES = 200, 200


def write_submission(root: Path, n: int, methods: int, rng: np.random.Generator) -> None:
    """Writes the n-th submission: one method, version, suite and target, three benchmarks."""
    method, version = f"m{n % methods}", 1 + n // methods % 4
    suite, target = f"suite{n // methods % 2}", f"t{n // methods // 2 % 2}"
    hardware = {"cpu": f"Testor {n % 7}", "cores": 8, "memory_bytes": 1 << 34, "gpu": "",
                "platform": "Linux"}  # fmt: skip
    created = f"2026-{1 + n // 90 % 12:02d}-{1 + n % 28:02d}T00:00:00Z"
    folder, cells = root / f"new-{n}", {}
    for name in BENCHMARKS:
        per_query = rng.normal(0.01 * (n % methods), 0.2, QUERIES).astype(np.float32)
        value = float(per_query.mean())
        draws = value + rng.normal(0, 0.01, REPLICATES)
        key = fingerprint([n, name])
        arrays = folder / f"{key}.safetensors"
        write_arrays(arrays, {"per_query": per_query, "replicates": draws},
                     {"query_ids": [f"q{i}" for i in range(QUERIES)], "key": key})  # fmt: skip
        metric = {"value": value, "low": value - 0.02, "high": value + 0.02,
                  "higher_is_better": True, "unit": ""}  # fmt: skip
        data = {
            "schema": 1, "key": key, "status": "ok", "reason": "", "seed": 0,
            "suite": {"name": suite, "version": 1}, "split": "test",
            "method": {"name": method, "label": method, "version": version, "plugin": "p 1",
                       "family": f"f{n % 5}", "params": {"rank": 16, "damping": 0.1}},
            "target": {"name": target, "label": target, "fingerprint": f"{target}-{suite}"},
            "benchmark": {"name": name, "version": 1, "params": {}},
            "corpus": {"train": suite, "queries": suite}, "truth": None, "primary": name,
            "metrics": {name: metric}, "notes": [], "inputs": {}, "versions": {"torch": "2.13"},
            "cost": {"build": {"seconds": 1.0}, "query": {"seconds": 0.1, "queries": QUERIES},
                     "bytes_per_example": 512.0, "n_train": 2000},
            "hardware": hardware, "threads": 1, "concurrent": 1, "started": created,
        }  # fmt: skip
        record = Record(data, folder / f"{key}.json")
        write_json(record.path, dict(record.signed(record.arrays_hash())))
        cells[key] = {"record": sha256_file(record.path), "arrays": sha256_file(arrays)}
    head = {
        "layout": LAYOUT, "suite": {"name": suite, "version": 1, "fingerprint": suite},
        "target": target,
        "method": {"name": method, "version": version, "summary": "a method of random scores",
                   "source": "arXiv 2303.14186", "family": f"f{n % 5}", "plugin": "p 1"},
        "created": created, "by": f"Person {n % 40}", "tdabench": "0.1.0",
        "packages": {"torch": "2.13"}, "hardware": hardware, "cells": cells,
    }  # fmt: skip
    head["id"] = identity(head)
    write_json(folder / HEAD, head)
    place = root / "results" / suite / target / f"{method}-v{version}" / head["id"]
    place.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--submissions", type=int, default=1000)
    parser.add_argument("--methods", type=int, default=30)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="keep repository and site in this folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        root = folder / "repository"
        if not (root / MARK).exists():
            write_json(root / MARK, {"layout": LAYOUT})
            rng = np.random.default_rng(0)
            for n in range(args.submissions):
                write_submission(root, n, args.methods, rng)
        size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
        start, cpu = time.perf_counter(), time.process_time()
        results = read_results(root)
        read = time.perf_counter() - start
        build_site(results, folder / "site", cache=False)
        whole, used = time.perf_counter() - start, time.process_time() - cpu
        print(f"{len(results.submissions)} submissions, {len(results.refused)} refused, "
              f"{size / 1e6:.0f} MB")  # fmt: skip
        print(f"read in {read:.1f} s, built in {whole:.1f} s ({used:.1f} s of processor time)")
        page = folder / "site" / "index.html"
        total = sum(p.stat().st_size for p in page.parent.iterdir())
        print(f"page {page.stat().st_size / 1e6:.2f} MB, site {total / 1e6:.2f} MB")
        seconds = opening(page.resolve(), args.times)
        for name, values in zip(("load event", "next frame"), zip(*seconds, strict=True)):
            print(f"{name}: median {statistics.median(values):.2f} s, worst {max(values):.2f} s")


if __name__ == "__main__":
    main()
