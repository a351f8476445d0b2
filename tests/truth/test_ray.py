"""A truth built on a Ray cluster of several nodes, one of which is lost in the middle.

Ray is no part of the test extra: where it is not installed these are skipped.
"""

import dataclasses
import shutil

import pytest

from tdabench.errors import UsageError
from tdabench.truth import Ray, build

ray = pytest.importorskip("ray", reason="ray is not installed (pip install 'tdabench[ray]')")


@pytest.fixture
def cluster(monkeypatch):
    """A head that takes no work and two nodes with one core each, all on this machine."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    try:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
    except Exception as e:  # a busy machine, a sandbox without sockets: not what is tested here
        pytest.skip(f"Ray starts no cluster here: {e}")
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
def test_a_node_lost_in_the_middle_changes_nothing(cluster, plan, parts, serial, file_of, tmp_path):
    cluster, nodes = cluster
    lost, done = [], []

    def lose_one(unit, reason):
        done.append((unit, reason))
        if not lost:
            lost.append(nodes[0])
            cluster.remove_node(nodes[0], allow_graceful=False)

    # The target's files travel: they are no longer where the plan was made.
    target, train, queries = parts
    moved = tmp_path / "moved"
    shutil.copytree(target.folder, moved)
    target = dataclasses.replace(target, folder=moved)
    engine = Ray(cluster.address)
    failed = build(plan, target, train, queries, tmp_path / "b", engine=engine, on_unit=lose_one)
    assert failed == []
    assert sorted(u for u, _ in done) == sorted(plan.units())
    assert lost
    assert file_of(tmp_path / "b") == serial
    assert not ray.is_initialized()


def test_no_cluster_at_the_address(plan, parts, tmp_path):
    with pytest.raises(UsageError, match=r"cannot reach a Ray cluster at 127\.0\.0\.1:1"):
        build(plan, *parts, tmp_path, engine=Ray("127.0.0.1:1"))
