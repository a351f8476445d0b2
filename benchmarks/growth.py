"""Growth of build time, query time, memory and bytes with the corpus, by family.

    python benchmarks/growth.py [--families text,embedding] [--sizes 1000,10000] [--device cuda]

Each family is one representative method on the target `instruct` of the suite `pocket`, whose
corpus is repeated with a running number in every prompt, so that no two examples are equal. Every
size of every family runs in a separate process: it builds an index, answers 100 queries (scores of
all examples if they fit in 512 MB, and the best 100), and writes the result. Time is processor
time, which other processes do not distort. Memory is the peak resident set of a build or a query
(VmHWM), including the process's 300 to 500 MB of libraries, model and corpus.

A family is measured up to a build time of about `--budget` seconds; beyond that there is only the
extrapolation. The exponent is fitted by least squares to log time over log n, for sizes at which
fixed costs no longer show (the upper two measured decades). The extrapolation to 10^9 keeps the
exponent, splits rows into shards of at most `--shard` rows and puts as many shards on a node as fit
on its disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

SIZES = (1_000, 10_000, 100_000, 1_000_000)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "control": ("length", {}),
    "text": ("tfidf", {}),
    "embedding": ("hidden", {}),
    "gradient": ("logra", {"rank": 8}),
    "trak": ("trak", {"proj_dim": 512}),
    "influence": ("ekfac", {}),
    "learned": ("airrep", {}),
}
NODE_DISK, NODE_CORES = 8e12, 32  # bytes, cores: the node of the extrapolation


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--budget", type=float, default=60, help="seconds a build, about")
    parser.add_argument("--shard", type=float, default=1e7, help="rows a shard, at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", nargs=2, metavar=("FAMILY", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.device)))
        return
    sizes = [int(n) for n in args.sizes.split(",")]
    found: dict[str, list[dict]] = {}
    print(
        f"{'family':11}{'method':9}{'examples':>10}{'build s':>10}{'query ms':>10}"
        f"{'resident MB':>13}{'bytes/ex':>10}"
    )
    for family in args.families.split(","):
        for n in sizes:
            done = found.setdefault(family, [])
            if done and done[-1]["build"] * n / done[-1]["n"] > args.budget:
                break
            command = [sys.executable, __file__, "--one", family, str(n), "--device", args.device]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if out.returncode:
                print(f"{family:11}{FAMILIES[family][0]:9}{n:10} failed: status {out.returncode}")
                break
            m = json.loads(out.stdout.splitlines()[-1])
            done.append(m)
            print(
                f"{family:11}{m['method']:9}{n:10}{m['build']:10.2f}{m['query']:10.2f}"
                f"{m['resident'] / 1e6:13.0f}{m['bytes']:10.0f}",
                flush=True,
            )
    extrapolate(found, args.shard)


def extrapolate(found: dict[str, list[dict]], shard: float) -> None:
    print(
        f"\nexponents, and 10^9 examples on paper (nodes of {NODE_CORES} cores and "
        f"{NODE_DISK / 1e12:.0f} TB; build and query time over all cores of the nodes)\n"
        f"{'family':11}{'build':>7}{'query':>7}{'from':>11}{'disk TB':>9}{'shards':>8}{'nodes':>7}"
        f"{'core-hours':>12}{'build h':>9}{'query s':>9}"
    )
    for family, rows in found.items():
        if len(rows) < 2:
            print(f"{family:11} too few sizes")
            continue
        last = rows[-2:] if len(rows) < 3 else rows[-3:]
        n = np.log([m["n"] for m in last])
        b, q = (
            float(np.polyfit(n, np.log([m[k] for m in last]), 1)[0]) for k in ("build", "query")
        )
        times = 1e9 / last[-1]["n"]
        build = last[-1]["build"] * times ** max(b, 1.0)  # fixed costs still show below 1
        query = last[-1]["query"] / 1e3 * times ** max(q, 1.0)
        disk = last[-1]["bytes"] * 1e9
        nodes = max(1, int(np.ceil(disk / NODE_DISK)))
        cores = nodes * NODE_CORES
        print(
            f"{family:11}{b:7.2f}{q:7.2f}{last[-1]['n']:11}{disk / 1e12:9.2f}"
            f"{int(np.ceil(1e9 / shard)):8}{nodes:7}{build / 3600:12.0f}{build / 3600 / cores:9.1f}"
            f"{query / cores:9.2f}"
        )


# --------------------------------------------------------------------------- one size


def measure(family: str, n: int, device: str) -> dict:
    from tdabench.method import Context
    from tdabench.registry import registry
    from tdabench.run.sources import load_suite

    suite = load_suite("pocket")
    target = suite.target("instruct")
    name, params = FAMILIES[family]
    method = registry().methods[name].value.from_params(params)
    train = list(repeated(suite.train, n))
    queries = list(suite.queries())[:100]
    with tempfile.TemporaryDirectory() as folder:
        context = Context(
            target=target.target, scratch=Path(folder), device=device,
            assets=suite.assets_for(target),
        )  # fmt: skip
        method.build(context, train[:64]).top_k(queries[:1], 1)  # imports and models do not count
        Path("/proc/self/clear_refs").write_text("5")
        build, index = spent(lambda: method.build(context, train))
        ask = 10 if family == "influence" else len(queries)
        query, _ = spent(lambda: index.top_k(queries[:ask], 100))
        if 4 * n * ask <= 512 << 20:
            index.score(queries[:ask])
        resident = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
        saved = Path(folder) / "saved"
        saved.mkdir()
        index.save(saved)
        size = sum(f.stat().st_size for f in saved.rglob("*") if f.is_file())
    return {
        "method": name, "n": n, "build": build, "query": 1e3 * query / ask,
        "resident": resident, "bytes": size / n,
    }  # fmt: skip


def spent(run: Any) -> tuple[float, Any]:
    start = time.process_time()
    out = run()
    return time.process_time() - start, out


def repeated(pool: Any, n: int) -> Iterator[Any]:
    for i in range(n):
        e = pool[i % len(pool)]
        yield replace(e, id=f"{e.id}-{i}", prompt=f"{e.prompt} ({i // len(pool)})")


if __name__ == "__main__":
    main()
