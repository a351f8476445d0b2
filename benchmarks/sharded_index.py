"""A sharded index, built and searched through Ray on a local cluster of several nodes.

    python benchmarks/sharded_index.py [--rows 200000] [--nodes 2]

The same rows are built and searched in three ways: one store, shards in one process, shards through
Ray on `--nodes` nodes of one core each. The script checks that the answers agree: ids exactly, the
rest up to float32 sums in another order (scores to 1e-5, pooled scores, of which the largest are
near 100, to 1e-4). Times are wall times; on one machine the nodes share its cores, so they show the
overhead of Ray and not the gain of more machines. Needs the extra `ray`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.toolkit.scan import scan
from tdabench.toolkit.sharded import Shards, build_shards, in_turn, on_ray

DIM = 384


def encode(items: range) -> np.ndarray:
    """Makes rows that depend only on their number."""
    first, out = items[0] // 1000, []
    for block in range(first, items[-1] // 1000 + 1):
        x = np.random.default_rng([5, block]).standard_normal((1000, DIM), dtype=np.float32)
        out.append(x[max(0, items[0] - 1000 * block) : items[-1] + 1 - 1000 * block])
    return np.concatenate(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--shards", type=int, default=8)
    args = parser.parse_args()
    try:
        import ray
        from ray.cluster_utils import Cluster
    except ImportError:
        sys.exit("Ray is not installed: pip install 'tdabench[ray]'")

    queries = np.random.default_rng(6).standard_normal((100, DIM), dtype=np.float32)
    size = -(-args.rows // args.shards)
    node = {"num_cpus": 1, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(args.nodes - 1):
        cluster.add_node(**node)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    # The nodes do not have this script, so its functions are sent by value.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        with tempfile.TemporaryDirectory() as folder:
            through_ray = on_ray()
            ways = {
                "one store": (args.rows, in_turn),
                f"{args.shards} shards, one process": (size, in_turn),
                f"{args.shards} shards, Ray, {len(ray.nodes())} nodes": (size, through_ray),
            }
            print(f"{args.rows} x {DIM} float16, top-100 of {len(queries)} queries, softmax-abs")
            print(f"{'':32}{'build s':>9}{'search s':>10}")
            first: Any = None
            for i, (name, (rows, run)) in enumerate(ways.items()):
                place = Path(folder) / str(i)
                build, index = timed(
                    lambda p=place, r=rows, f=run: build_shards(  # type: ignore[misc]
                        p, range(args.rows), encode, r, dtype="float16", run=f
                    )
                )
                search, found = timed(lambda s=index: find(s, queries))  # type: ignore[misc]
                print(f"{name:32}{build:9.2f}{search:10.2f}", flush=True)
                first = first or found
                np.testing.assert_array_equal(found.ids, first.ids)
                np.testing.assert_allclose(found.values, first.values, rtol=1e-5)
                np.testing.assert_allclose(found.pooled, first.pooled, atol=1e-4)
                np.testing.assert_allclose(found.sums, first.sums, rtol=1e-5, atol=1e-2)
            print("all three found the same")
    finally:
        ray.shutdown()
        cluster.shutdown()


def find(index: Shards, queries: np.ndarray) -> Any:
    find_once = scan(queries[:1], index, 1)  # workers and page cache
    assert find_once.ids.shape == (1, 1)
    return scan(queries, index, 100, pooling="softmax-abs", temperature=10.0)


def timed(run: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    out = run()
    return time.perf_counter() - start, out


if __name__ == "__main__":
    main()
