"""Top-100 of 100 queries over a million rows on disk, compared with reading and multiplying.

    python benchmarks/retrieval_speed.py [--rows 1000000] [--device cuda] [--folder DIR]

Rows are drawn from a seed (`gauss`: independent normal numbers, where neighbours are as close
together as possible; `clusters`: 1,000 directions with noise, of length 1) and written once to
feature stores of every dtype; then, in one run:

* the yardstick: the float16 file is read once sequentially into a buffer, cast to float32 and
  multiplied with the queries, and nothing is kept. The best of several block sizes counts;
* `scan` of each store, and of float16 and int8 with top-k, softmax-abs of the whole corpus and
  sums together;
* with `--faiss SPEC`, FAISS: an index of that factory string, built in memory.

Files are in the page cache for all contenders (each is read once before). Recall is the share of
the exact top-100 by the float32 rows. Every measurement runs in a separate process. Memory is that
process's own (RssAnon, sampled every 2 ms, including interpreter and queries), with file-backed
pages (RssFile: libraries, mapped files) counted separately.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.groups import threads
from tdabench.rows import top_k_of
from tdabench.toolkit.scan import scan
from tdabench.toolkit.store import FeatureStore

DTYPES = ("float16", "int8", "int8x2", "float32")
BLOCKS = (4096, 8192, 16384, 32768)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--data", default="gauss", choices=["gauss", "clusters"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="keep the stores here, and use them again")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--faiss", action="append", metavar="SPEC", help="Flat, IVF1024,SQ8, …")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        args.folder = args.folder or Path(scratch)
        build(args)
        if not args.build_only:
            report(args)


def report(args: argparse.Namespace) -> None:
    print(
        f"top-{args.k} of {args.queries} queries over {args.rows} x {args.dim}, {args.data}, "
        f"{args.device}, {threads()} thread(s)"
    )
    names = ["yardstick", *DTYPES, "one pass float16", "one pass int8", "yardstick"]
    if args.faiss and importlib.util.find_spec("faiss"):
        names += [f"faiss {spec}" for spec in args.faiss]
    elif args.faiss:
        print("FAISS is not installed: left out", file=sys.stderr)
    found: dict[str, dict] = {}
    for name in names:
        one = child(args, name)
        if name in found:  # the yardstick runs before and after; its best counts
            one = min(one, found[name], key=lambda m: m["seconds"])
        found[name] = one
    base = found["yardstick"]["seconds"]
    print(
        f"{'':40}{'seconds':>8}{'ratio':>7}{'recall':>8}{'index MB':>10}{'own MB':>8}{'mapped':>8}"
    )
    for m in found.values():
        recall = f"{m['recall']:8.4f}" if "recall" in m else " " * 8
        print(
            f"{m['what']:40}{m['seconds']:8.3f}{m['seconds'] / base:6.2f}x{recall}"
            f"{m['bytes'] / 1e6:10.0f}{m['own'] / 1e6:8.0f}{m['mapped'] / 1e6:8.0f}"
        )


def child(args: argparse.Namespace, name: str) -> dict:
    command = [sys.executable, __file__, "--one", name, "--folder", str(args.folder)]
    for key in ("rows", "dim", "queries", "k", "data", "device", "rounds"):
        command += [f"--{key}", str(getattr(args, key))]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


# --------------------------------------------------------------------------- data


def chunks(args: argparse.Namespace) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, rows [50,000, dim]), the same at every call."""
    centres = np.random.default_rng(7).standard_normal((1000, args.dim), dtype=np.float32)
    for a in range(0, args.rows, 50_000):
        rng = np.random.default_rng([1, a])
        x = rng.standard_normal((min(50_000, args.rows - a), args.dim), dtype=np.float32)
        if args.data == "clusters":
            x = centres[rng.integers(0, 1000, len(x))] + 0.5 * x
            x /= np.linalg.norm(x, axis=1, keepdims=True)
        yield a, x


def draw_queries(args: argparse.Namespace) -> np.ndarray:
    rng = np.random.default_rng(2)
    q = rng.standard_normal((args.queries, args.dim), dtype=np.float32)
    if args.data == "clusters":
        centres = np.random.default_rng(7).standard_normal((1000, args.dim), dtype=np.float32)
        q = centres[: args.queries] + 0.5 * q
    return q


def place(args: argparse.Namespace, name: str) -> Path:
    return args.folder / f"{args.data}-{args.rows}x{args.dim}" / name


def build(args: argparse.Namespace) -> None:
    """Builds every store, and the exact answer."""
    if place(args, "exact.npy").exists():
        return
    print("writing the stores …", file=sys.stderr)
    place(args, "").mkdir(parents=True, exist_ok=True)
    stores = {d: FeatureStore.create(place(args, d), args.rows, args.dim, d) for d in DTYPES}
    queries = draw_queries(args)
    values, ids = np.empty((args.queries, 0), np.float32), np.empty((args.queries, 0), np.int64)
    for a, x in chunks(args):
        for store in stores.values():
            store.write(np.arange(a, a + len(x)), x)
        v, i = top_k_of(queries @ x.T, args.k, offset=a)
        values, ids = np.hstack([values, v]), np.hstack([ids, i])
        values, order = top_k_of(values, args.k)
        ids = np.take_along_axis(ids, order, axis=1)
    for store in stores.values():
        store.close()
    np.save(place(args, "exact.npy"), ids)


# --------------------------------------------------------------------------- one measurement


def measure(args: argparse.Namespace) -> dict:
    queries, exact = draw_queries(args), np.load(place(args, "exact.npy"))
    if args.one == "yardstick":
        file = place(args, "float16") / "rows.bin"
        ways = [lambda b=b: read_and_multiply(file, queries, args, b) for b in BLOCKS]
        runs = [best_of(way, args.rounds) for way in ways]
        result = min(runs, key=lambda r: r["seconds"])
        return result | {"what": "read float16 once and multiply", "bytes": file.stat().st_size}
    if args.one.startswith("faiss"):
        return through_faiss(args, queries, exact)
    name = args.one.removeprefix("one pass ")
    pooling = "softmax-abs" if name != args.one else None
    store = FeatureStore.open(place(args, name), verify=False)
    device = None if args.device == "cpu" else args.device
    result = best_of(
        lambda: scan(queries, store, args.k, pooling=pooling, device=device).ids, args.rounds
    )
    ids = result.pop("answer")
    what = f"scan {name}" + (", top-k + softmax-abs + sums" if pooling else ", top-k")
    return result | {"what": what, "recall": recall(ids, exact), "bytes": store.nbytes}


def read_and_multiply(file: Path, queries: np.ndarray, args: argparse.Namespace, b: int) -> None:
    raw = np.empty((b, args.dim), np.float16)
    block = np.empty((b, args.dim), np.float32)
    dots = np.empty((args.queries, b), np.float32)
    on = None
    if args.device != "cpu":
        import torch

        on = torch.from_numpy(queries).half().to(args.device)
    with open(file, "rb", buffering=0) as f:
        while got := f.readinto(raw.reshape(-1).view(np.uint8).data):
            n = got // (2 * args.dim)
            if on is not None:
                (on @ torch.from_numpy(raw[:n]).to(args.device).T).float()
                continue
            np.copyto(block[:n], raw[:n])
            np.matmul(queries, block[:n].T, out=dots[:, :n])
    if on is not None:
        torch.cuda.synchronize()


def through_faiss(args: argparse.Namespace, queries: np.ndarray, exact: np.ndarray) -> dict:
    from tdabench.toolkit.approximate import FaissIndex

    spec = args.one.removeprefix("faiss ")
    start = time.perf_counter()
    index = FaissIndex(FeatureStore.open(place(args, "int8x2"), verify=False), spec)
    took = time.perf_counter() - start
    result = best_of(lambda: index.top_k(queries, args.k)[1], args.rounds)
    ids = result.pop("answer")
    what = f"FAISS {spec}, built in {took:.0f} s"
    each = args.dim * (4 if spec == "Flat" else 1) + 8 * (spec != "Flat")
    return result | {"what": what, "recall": recall(ids, exact), "bytes": args.rows * each}


def recall(ids: np.ndarray, exact: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(ids, exact)]))


def best_of(run: Any, rounds: int) -> dict:
    """Returns the least wall time of `rounds`, the answer, and the peak memory."""
    run()  # page cache, thread pools
    seconds = float("inf")
    with Watch() as watch:
        for _ in range(rounds):
            start = time.perf_counter()
            answer = run()
            seconds = min(seconds, time.perf_counter() - start)
    return {"seconds": seconds, "own": watch.own, "mapped": watch.mapped, "answer": answer}


class Watch:
    """Sampled peaks of anonymous and file-backed resident bytes of this process."""

    own = mapped = 0

    def __enter__(self) -> Watch:
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()
        return self

    def look(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            own, mapped = (
                1024 * int(status.split(name)[1].split()[0]) for name in ("RssAnon:", "RssFile:")
            )
            self.own, self.mapped = max(self.own, own), max(self.mapped, mapped)
            if self.stop.wait(0.002):
                return

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        self.thread.join()


if __name__ == "__main__":
    main()
