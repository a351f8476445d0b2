"""Plans: which indices and cells a request needs, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from tdabench.errors import UsageError
from tdabench.registry import registry
from tdabench.run import Request, make_plan
from tdabench.run.plan import plan_indices


def test_the_headline_benchmark_is_measured_first(toy_suite: Path, toys: str):
    assert [n for n, e in registry().benchmarks.items() if e.cls.headline] == ["lds"]
    plan = make_plan(Request(str(toy_suite), ("toy",), benchmarks=("cost", "lds", "noise")))
    (job,) = plan.jobs(plan.cells)
    assert [c.benchmark.name for c in plan.cells] == ["cost", "lds", "noise"]
    assert [c.benchmark.name for c in job.cells] == ["lds", "noise", "cost"]  # slow ones last
    assert "headline" not in job.cells[0].benchmark.as_dict()  # nothing that a record stores


def test_indices_are_planned_without_queries(toy_suite: Path, toys: str, tmp_path: Path):
    request = Request(str(toy_suite), ("toy", "length"), seeds=(0, 1))
    plan, indices = make_plan(request), plan_indices(request)
    assert indices.cells == []
    assert [(b.method.label, b.seed) for b in indices.builds] == [
        ("toy", 0), ("toy", 1), ("length", 0), ("length", 1),
    ]  # fmt: skip
    assert {b.index_key for b in indices.builds} >= {j.index_key for j in plan.jobs(plan.cells)}

    text = toy_suite.read_text().replace('file = "corpus.jsonl"', 'train_file = "pool.jsonl"')
    text = text.replace('train = "pool"\n', "").replace('queries = "test"\n', "", 1)
    corpus = (toy_suite.parent / "corpus.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pool.jsonl").write_text("".join(r for r in corpus if '"split": "pool"' in r))
    (tmp_path / "truth.safetensors").symlink_to(toy_suite.parent / "truth.safetensors")
    (tmp_path / "suite.toml").write_text(text)
    bare = Request(str(tmp_path / "suite.toml"), ("toy",))
    assert plan_indices(bare).builds[0].index_key == indices.builds[0].index_key
    with pytest.raises(UsageError, match="suite toy declares no test queries"):
        make_plan(bare)
