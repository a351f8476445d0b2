"""An index in shards finds what one index finds, in one process and on a cluster of nodes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from tdabench.data.examples import Corpus, Example
from tdabench.errors import DataError, TdabenchError, UsageError
from tdabench.groups import Groups
from tdabench.method import Context
from tdabench.toolkit.representation import RepresentationMethod, build_index, open_index
from tdabench.toolkit.scan import scan
from tdabench.toolkit.sharded import Shards, build_shards, in_processes, in_turn, on_ray
from tdabench.toolkit.store import FeatureStore


def whole_numbers(items: list[int]) -> np.ndarray:
    """Row i depends on i alone; products are exact and often equal."""
    return np.stack([np.random.default_rng(i).integers(-2, 3, 5) for i in items]).astype(np.float32)


def queries(n: int = 4) -> np.ndarray:
    return np.random.default_rng(99).integers(-2, 3, (n, 5)).astype(np.float32)


@pytest.mark.parametrize("size", [1, 7, 30, 31, 100])
@pytest.mark.parametrize("k", [0, 3, 30, 50])
def test_shards_find_what_one_index_finds(tmp_path: Path, size: int, k: int) -> None:
    rows = whole_numbers(list(range(30)))
    shards = build_shards(tmp_path, list(range(30)), whole_numbers, size)
    for s in (shards, Shards.open(tmp_path)):
        assert s.shape == (30, 5)
        np.testing.assert_array_equal(s[:], rows)
        np.testing.assert_array_equal(s[5:22:3], rows[5:22:3])
        np.testing.assert_array_equal(s[np.array([29, 0, 7, 7, -1])], rows[[29, 0, 7, 7, -1]])
        found = scan(queries(), s, k, pooling="softmax-abs", temperature=2.0)
        one = scan(queries(), rows, k, pooling="softmax-abs", temperature=2.0)
        np.testing.assert_array_equal(found.ids, one.ids)
        np.testing.assert_array_equal(found.values, one.values)
        np.testing.assert_allclose(found.pooled, one.pooled, rtol=1e-6)
        np.testing.assert_allclose(found.sums, one.sums, rtol=1e-6)


def test_no_rows_at_all(tmp_path: Path) -> None:
    shards = build_shards(tmp_path, [], whole_numbers, 4)
    assert len(Shards.open(tmp_path)) == 0
    found = scan(queries()[:, :1], shards, 3, pooling="mean")
    assert found.ids.shape == (4, 0)


def test_a_build_goes_on_and_a_smaller_one_leaves_nothing_behind(tmp_path: Path) -> None:
    made: list[int] = []

    def encode(items):
        made.append(len(items))
        return whole_numbers(items)

    items = list(range(20))
    build_shards(tmp_path, items, encode, 6, key="a")
    (tmp_path / "shard-00001" / "store.json").unlink()  # as if a node had been lost
    made.clear()
    again = build_shards(tmp_path, items, encode, 6, key="a")
    assert made == [6]
    np.testing.assert_array_equal(again[:], whole_numbers(items))
    made.clear()
    build_shards(tmp_path, items[:8], encode, 6, key="b")
    assert made == [6, 2]
    assert sorted(p.name for p in tmp_path.glob("shard-*")) == ["shard-00000", "shard-00001"]


def test_damage_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 1 row"):
        build_shards(tmp_path, [1], whole_numbers, 0)
    build_shards(tmp_path, list(range(9)), whole_numbers, 4)
    file = tmp_path / "shard-00001" / "rows.bin"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="corrupt"):
        Shards.open(tmp_path)
    with pytest.raises(DataError, match="missing"):
        Shards.open(tmp_path / "nowhere")
    stray = FeatureStore.create(tmp_path / "shard-00001", 2, 5)
    stray.write(np.arange(2), np.ones((2, 5)))
    stray.close()
    with pytest.raises(DataError, match="holds"):
        Shards.open(tmp_path)


# --------------------------------------------------------------------------- a method's index


@dataclass(frozen=True, kw_only=True)
class Letters(RepresentationMethod):
    """Letter counts, made comparable by the corpus mean: encode, fit and transform all matter."""

    name = "letters"

    def encode(self, context, examples, role):
        alphabet = np.arange(97, 123)
        rows = [(np.frombuffer(e.text.encode(), np.uint8)[:, None] == alphabet) for e in examples]
        return np.stack([r.sum(axis=0) for r in rows]).astype(np.float32)

    def fit(self, context, features):
        return {"mean": np.asarray(features[:]).mean(axis=0)}

    def transform(self, features, state, role):
        return features - state["mean"]


class NoTarget:
    fingerprint = "none"


def corpus(n: int) -> Corpus:
    words = "red green blue cold warm slow quick north south river stone cloud".split()
    rng = np.random.default_rng(3)
    return Corpus(Example(f"e{i}", " ".join(rng.choice(words, 5)), "yes indeed") for i in range(n))


def check_index(folder: Path, run) -> None:
    context = Context(target=NoTarget(), scratch=folder / "scratch")  # type: ignore[arg-type]
    train, asked = corpus(40), corpus(46)[40:]
    method = Letters(pooling="softmax-abs", temperature=3.0)
    one = method.build(context, train)
    sharded = build_index(method, context, train, folder / "index", 9, run=run)
    np.testing.assert_allclose(sharded.score(asked), one.score(asked), rtol=1e-5, atol=1e-5)
    found, alone = sharded.scan(asked, 7), one.scan(asked, 7)
    np.testing.assert_array_equal(found.ids, alone.ids)
    np.testing.assert_allclose(found.values, alone.values, rtol=1e-5)
    np.testing.assert_allclose(found.pooled, alone.pooled, rtol=1e-5)
    everything = Groups.of([range(40)], 40)
    np.testing.assert_allclose(
        found.pooled, one.score_groups(asked, everything)[:, 0], rtol=1e-5, atol=1e-4
    )
    (folder / "saved").mkdir()
    sharded.save(folder / "saved")
    for path in (folder / "saved", folder / "index"):  # a copy, and where it was built
        again = method.load(context, path)
        np.testing.assert_array_equal(again.top_k(asked, 7)[1], alone.ids)
    elsewhere = open_index(method, context, folder / "index", run, verify=False)
    np.testing.assert_array_equal(elsewhere.top_k(asked, 7)[1], alone.ids)


def test_a_method_is_built_in_shards(tmp_path: Path) -> None:
    check_index(tmp_path, in_turn)


def test_tasks_run_in_processes_in_order(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    run = in_processes(2, done=lambda *counts: heard.append(counts))
    assert run(abs, range(-9, 0)) == list(range(9, 0, -1))
    assert heard == [(n, 9) for n in range(1, 10)]


def test_what_goes_wrong_in_a_process_is_said(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        in_processes(2)(partial(divmod, 1), [1, 0, 2])
    with pytest.raises(TdabenchError, match="a worker process died"):
        in_processes(2)(os._exit, [3, 3])
    assert in_processes(2)(abs, []) == []


def test_an_index_in_shards_resumes_and_says_what_it_cannot_hold(tmp_path: Path, monkeypatch):
    context = Context(target=NoTarget(), scratch=tmp_path / "scratch")  # type: ignore[arg-type]
    train, asked, runs = corpus(20), corpus(23)[20:], []

    def counted(task, items):
        runs.append(len(items))
        return in_turn(task, items)

    folder, method = tmp_path / "index", Letters()
    first = build_index(method, context, train, folder, 6, run=counted)
    assert runs == [4, 4]  # encoded, then transformed
    again = build_index(method, context, train, folder, 6, run=counted)
    assert runs == [4, 4, 4]  # opened only
    np.testing.assert_array_equal(again.score(asked), first.score(asked))
    build_index(method, context, train, folder, 6, dtype="float16", run=counted)
    assert runs[3:] == [4, 4]

    class Whole(Letters):
        def build(self, context, train):
            return super().build(context, train)

    with pytest.raises(UsageError, match="letters builds its index in one piece"):
        build_index(Whole(), context, train, folder, 6)

    class Sparse(Letters):
        def encode(self, context, examples, role):
            return sp.csr_matrix(super().encode(context, examples, role))

    with pytest.raises(UsageError, match="letters encodes sparse rows"):
        build_index(Sparse(), context, train, tmp_path / "sparse", 6)


# --------------------------------------------------------------------------- Ray


def test_a_process_is_prepared_before_it_restores_a_task(tmp_path: Path) -> None:
    """As on a cluster, whose processes have not imported a plugin's file."""
    (tmp_path / "far.py").write_text("def double(x):\n    return 2 * x\n")
    code = (
        "import pickle, site, sys; from functools import partial; "
        "from tdabench.toolkit.sharded import _First; {path}"
        "sys.stdout.buffer.write(pickle.dumps((_First(partial(site.addsitedir, {folder!r})), "
        "__import__('far').double)))"
    )
    folder = str(tmp_path)
    code = code.format(path=f"sys.path.append({folder!r}); ", folder=folder)
    sent = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    code = (
        "import pickle, sys; from tdabench.toolkit.sharded import _one; "
        "print(_one(pickle.loads(sys.stdin.buffer.read()), 21))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True)
    assert done.stdout == b"42\n", done.stderr.decode()


needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed"
)


@pytest.fixture(scope="module")
def cluster():
    """Three nodes on this machine, each with a core of its own."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    if ray.is_initialized():
        pytest.skip("a Ray connection of another test is open")
    small = {"num_cpus": 1, "object_store_memory": 80_000_000}
    # A node that a busy machine keeps waiting is not to be given up.
    patient = {"_system_config": {"health_check_failure_threshold": 100}}
    try:
        head = {**small, **patient, "include_dashboard": False}
        nodes = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            nodes.add_node(**small)
        nodes.wait_for_nodes(timeout=120)
        # Classes of this file travel by value: no node can import it.
        ray.init(address=nodes.address, log_to_driver=False)
    except Exception as e:
        pytest.skip(f"Ray does not start here: {e}")
    module = __import__("sys").modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)
    yield nodes
    ray.cloudpickle.unregister_pickle_by_value(module)
    ray.shutdown()
    nodes.shutdown()


def where(item: int) -> str:
    import time

    import ray

    time.sleep(0.5)  # long enough that one node cannot do all
    return ray.get_runtime_context().get_node_id()


def broken(item: int) -> None:
    raise UsageError("this task is refused")


@needs_ray
def test_several_nodes_build_and_search_with_the_result_of_one(cluster, tmp_path: Path) -> None:
    run = on_ray()
    # Workers may start late on one node or another: several nodes work, sooner or later.
    assert any(len(set(run(where, range(6)))) > 1 for _ in range(5))
    items = list(range(50))
    there = build_shards(tmp_path / "ray", items, whole_numbers, 8, dtype="float16", run=run)
    here = build_shards(tmp_path / "here", items, whole_numbers, 50, dtype="float16")
    for a, b in zip(*(scan_all(s) for s in (there, here))):
        np.testing.assert_array_equal(a, b)
    assert Shards.open(tmp_path / "ray", run=run).shape == (50, 5)
    check_index(tmp_path / "method", run)
    with pytest.raises(UsageError, match="this task is refused"):
        run(broken, [1])


def scan_all(rows: Shards) -> tuple[np.ndarray, ...]:
    find = partial(scan, queries(), rows, 12)
    found = find(pooling="sum")
    return found.values, found.ids, found.pooled, found.sums
