"""Size and opening time of a report over 50 methods, 10 benchmarks and 2,000 queries.

    python benchmarks/report_opening.py [--methods 50] [--benchmarks 10] [--queries 2000]

Writes a run of random values with texts and top examples and its report, and opens the report in
headless Chromium `--times` times. Prints the wall time from the start of the navigation to the
page's load event, when board, plots and explorer are complete (the page draws itself while it
loads), and to the next frame after it. Needs selenium, Chromium and its driver.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tdabench.data.files import read_jsonl
from tdabench.io import fingerprint, write_arrays, write_json
from tdabench.report.board import Board
from tdabench.report.html import write_report

WORDS = "amber birch cedar delta ember fjord grove heron iris jade kelp lotus".split()
TOP = 10


def write_run(
    folder: Path, methods: int = 50, benchmarks: int = 10, n: int = 2000, n_train: int = 20_000
) -> Path:
    """Writes a run of random values and its suite; returns the suite's file."""
    rng = np.random.default_rng(0)
    suite, corpus = _write_suite(folder / "suite", rng, n, n_train)
    ids = [f"q{i}" for i in range(n)]
    for m in range(methods):
        for b in range(benchmarks):
            per_query = rng.normal(0.01 * m, 0.2, n)
            draws = per_query.mean() + rng.normal(0, 0.01, 200)
            arrays = {"per_query": per_query, "replicates": draws}
            if b == 0:
                arrays |= {
                    "top_index": rng.integers(0, n_train, (n, TOP)).astype(np.int32),
                    "top_score": -np.sort(-rng.random((n, TOP)), axis=1).astype(np.float32),
                    "bottom_index": rng.integers(0, n_train, (n, TOP)).astype(np.int32),
                    "bottom_score": np.sort(-rng.random((n, TOP)), axis=1).astype(np.float32),
                }
            name = "lds" if b == 0 else f"bench{b}"
            key = fingerprint([m, b])
            value = {"value": float(per_query.mean()), "low": 0.0, "high": 1.0}
            curve = {f"f1@{k}": {"value": 0.1 * b + 1e-4 * k * m} for k in (10, 100, 1000)}
            record = {
                "key": key,
                "status": "ok",
                "method": {"name": f"m{m}", "label": f"method {m}", "family": f"f{m % 5}"},
                "target": {"name": "t", "fingerprint": "beef"},
                "benchmark": {"name": name, "version": 1, "params": {}},
                "corpus": corpus,
                "primary": name,
                "metrics": {name: value, "ceiling": {"value": 0.8}, **(curve if b == 1 else {})},
                "cost": {
                    "build": {"seconds": 1.0 + m},
                    "query": {"seconds": 0.1 * (1 + m), "queries": n},
                    "bytes_per_example": 64.0 * (1 + m),
                    "n_train": n_train,
                },
            }
            write_json(folder / "cells" / f"{key}.json", record)
            write_arrays(folder / "cells" / f"{key}.safetensors", arrays, {"query_ids": ids})
    write_json(folder / "manifest.json", {"run": "large", "suite": {"name": "large"}})
    return suite


def _write_suite(
    folder: Path, rng: np.random.Generator, n: int, n_train: int
) -> tuple[Path, dict[str, str]]:
    folder.mkdir(parents=True)
    for name, count in (("train", n_train), ("queries", n)):
        text = rng.choice(WORDS, (count, 24))
        lines = [
            json.dumps(
                {
                    "id": f"{name[0]}{i}",
                    "prompt": " ".join(text[i, :16]),
                    "response": " ".join(text[i, 16:]),
                    "task": f"task {i % 30}",
                }
            )
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    path = folder / "suite.toml"
    path.write_text(
        '[suite]\nname = "large"\n[corpus]\ntrain_file = "train.jsonl"\n'
        'queries_file = "queries.jsonl"\n[[targets]]\nlabel = "t"\nfolder = "target"\n'
    )
    found = {x: read_jsonl(folder / f"{x}.jsonl").fingerprint for x in ("train", "queries")}
    return path, found


def opening(path: Path, times: int) -> list[tuple[float, float]]:
    """Measures seconds to the load event and to the next frame, for each of `times` openings."""
    from selenium import webdriver

    binary = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        sys.exit("needs Chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "about:blank"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    out = []
    try:
        for _ in range(times):
            browser.get("about:blank")
            browser.get(path.as_uri())
            load = browser.execute_script(
                "return performance.getEntriesByType('navigation')[0].loadEventEnd"
            )
            frame = browser.execute_async_script(
                "const done = arguments[0];"
                "requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())))"
            )
            out.append((load / 1e3, frame / 1e3))
    finally:
        browser.quit()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", type=int, default=50)
    parser.add_argument("--benchmarks", type=int, default=10)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="keep the report as this file")
    parser.add_argument("--open", type=Path, dest="page", help="only open this report")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.page or args.keep or Path(folder) / "report.html"
        if not args.page:
            run = Path(folder) / "large"
            suite = write_run(run, args.methods, args.benchmarks, args.queries)
            start = time.perf_counter()
            left_out = write_report(Board.from_runs([run]), path, suite=str(suite))
            print(f"written in {time.perf_counter() - start:.1f} s")
            print("\n".join(f"left out: {note}" for note in left_out))
        seconds = opening(path.resolve(), args.times)
        print(f"{path.stat().st_size / 1e6:.1f} MB")
        for name, values in zip(("load event", "next frame"), zip(*seconds, strict=True)):
            print(f"{name}: median {statistics.median(values):.2f} s, worst {max(values):.2f} s")


if __name__ == "__main__":
    main()
