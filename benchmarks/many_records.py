"""Time and memory of commands on a run folder with very many records.

    python benchmarks/many_records.py [--records 1000,10000,100000] [--methods 100] [--keep FOLDER]

Runs `random` on pocket's LDS once, and copies its record under other labels, benchmarks and seeds,
each with its own key, digest and interval replicates (100 different ones; the files of arrays are
hard links). In each size of folder, commands run as processes, and a new process writes one record.
Prints wall and processor seconds and peak memory of each. The record that `tdabench run` adds is
compared with the same run into a folder with nothing else. The second leaderboard finds in the
cache that the same files were unaltered, and how methods compare.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.io import (
    carried_hash,
    fingerprint,
    line_of,
    read_arrays,
    read_json,
    write_arrays,
)
from tdabench.run.keys import cell_key
from tdabench.run.record import Record, slot

TDABENCH = [os.path.join(os.path.dirname(sys.executable), "tdabench")]
VARIANTS, SEEDS, BENCHMARKS = 100, 20, 5
WRITE = """
import sys, time
from pathlib import Path
from tdabench.io import read_json
from tdabench.run.folder import RunFolder
folder, template = RunFolder(Path(sys.argv[1])), read_json(Path(sys.argv[2]))
method = {**template["method"], "label": "one more"}
for n in range(2):
    start, cpu = time.perf_counter(), time.process_time()
    folder.write({**template, "method": method, "key": f"{n + 1:016x}", "status": "failed"})
    print(f"{time.perf_counter() - start:.4f} {time.process_time() - cpu:.4f}")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", default="1000,10000,100000")
    parser.add_argument("--methods", type=int, default=100, help="labels, at most")
    parser.add_argument("--only-writing", action="store_true", help="measure only new records")
    parser.add_argument("--keep", type=Path, help="keep the folders here, and use them again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = (args.keep or Path(scratch)).absolute()
        root.mkdir(parents=True, exist_ok=True)
        os.environ["TDABENCH_CACHE"] = str(root / "cache")
        source = root / "source"
        if not (source / "manifest.json").exists():
            run_one(source, "random")
        alone = (0.0, 0.0, 0.0) if args.only_writing else measured([*adding, str(fresh(root))])
        for count in map(int, args.records.split(",")):
            folder = root / f"records-{count}"
            if filled := not folder.exists():
                fill(folder, source, count, args.methods)
            print(f"\n{count:,} records                    wall s   cpu s      MB")
            (template,) = (source / "cells").glob("*.json")
            done = subprocess.run(
                [sys.executable, "-c", WRITE, str(folder), str(template)],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            for what, line in zip(WRITTEN, done.stdout.split("\n")):
                show(what, *map(float, line.split()))
            if args.only_writing:
                continue
            cell = measured([*adding, str(folder)])
            show("run adds a cell", *cell)
            show("  beyond an empty folder", cell[0] - alone[0], cell[1] - alone[1])
            if filled:
                time.sleep(125)  # what changed less than two minutes ago is checked every time
            for what, more in COMMANDS.items():
                show(what, *measured([*TDABENCH, *more, str(folder)]))


WRITTEN = ("a record is written", "  and the next")
COMMANDS = {
    "leaderboard": ["leaderboard"],
    "leaderboard, again": ["leaderboard"],
    "leaderboard --json": ["leaderboard", "--json"],
}
adding = [*TDABENCH, "run", "--methods", "length", "--benchmarks", "cost", "--quiet", "--out"]


def fresh(root: Path) -> Path:
    shutil.rmtree(root / "empty", ignore_errors=True)
    return root / "empty"


def run_one(folder: Path, method: str) -> None:
    command = [*TDABENCH, "run", "--methods", method, "--benchmarks", "lds", "--quiet", "--out"]
    subprocess.run([*command, str(folder)], check=True, stdout=subprocess.DEVNULL)


def fill(folder: Path, source: Path, count: int, methods: int) -> None:
    """Writes `count` copies of the record of `source`, with other arrays, as a run would."""
    (path,) = (source / "cells").glob("*.json")
    template, rng = read_json(path), np.random.default_rng(0)
    arrays, meta = read_arrays(path.with_suffix(".safetensors"))
    names = [k for k in arrays if k.startswith(("per_query", "replicates", "task"))]
    cells, made = folder / "cells", folder / "arrays"
    cells.mkdir(parents=True)
    made.mkdir()
    shutil.copy(source / "manifest.json", folder)
    for n in range(VARIANTS):
        own = {k: arrays[k] for k in names}
        for k in names:
            if own[k].dtype.kind == "f":
                own[k] = own[k] + rng.normal(0.0, 0.02, own[k].shape) + 0.001 * n
        write_arrays(made / str(n), own, meta)
    signed = [carried_hash(made / str(n)) for n in range(VARIANTS)]
    places = []
    method, benchmark = template["method"], template["benchmark"]
    for n in range(count):
        # the position of a record among methods, benchmarks and seeds, methods changing fastest
        m, rest = n % methods, n // methods
        b, seed = rest % BENCHMARKS, rest // BENCHMARKS
        params = {**method["params"], "rank": m}
        name = "lds" if b == 0 else f"other{b}"
        data: dict[str, Any] = {
            **template, "seed": seed,
            "method": {**method, "label": f"method {m}", "params": params},
            "benchmark": {**benchmark, "name": name, "label": name},
            "metrics": {**template["metrics"],
                        "lds": {**template["metrics"]["lds"], "value": 0.001 * m,
                                "low": 0.001 * m - 0.02, "high": 0.001 * m + 0.02}},
        }  # fmt: skip
        data["key"] = cell_key(
            [method["name"], method["version"], params], data["target"]["fingerprint"],
            data["corpus"], [name, benchmark["version"], benchmark["params"]], data["truth"], seed,
            data["device"],
        )  # fmt: skip
        which = m % VARIANTS
        record = Record(data).signed(signed[which])
        text = json.dumps(dict(record), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (cells / f"{data['key']}.json").write_text(text)
        places.append(line_of({"place": fingerprint(list(slot(data))), "key": data["key"]}))
        os.link(made / str(which), cells / f"{data['key']}.safetensors")
    (folder / "places.jsonl").write_bytes(b"".join(places))
    shutil.rmtree(made)


def measured(command: list[str]) -> tuple[float, float, float]:
    """Returns wall and processor seconds of a process and its children, and its peak MB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {said.decode()[-500:]}")
    wall = time.perf_counter() - start
    return wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def show(what: str, wall: float, cpu: float, megabytes: float | None = None) -> None:
    memory = "" if megabytes is None else f"{megabytes:8.0f}"
    print(f"{what:30}{wall:10.2f}{cpu:8.2f}{memory}", flush=True)


if __name__ == "__main__":
    main()
