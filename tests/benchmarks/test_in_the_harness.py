"""Every benchmark through the harness, in a worker process, on a suite with two targets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tdabench.data.examples import Corpus
from tdabench.data.origins import without_each
from tdabench.groups import Groups
from tdabench.io import read_arrays, read_json, write_json
from tdabench.report.records import read_run
from tdabench.report.verify import verify_runs
from tdabench.run import Options, Request, run
from tdabench.stats import Bootstrap
from tdabench.truth.store import Truth

BENCHMARKS = (
    "lds", "loo", "transfer", "classification", "selection", "removal", "tracing", "noise", "cost",
    "behaviours", "sources", "filter",
)  # fmt: skip

SUITE = """
[suite]
name = "everything"
version = 1
[corpus]
file = "corpus.jsonl"
train = "pool"
queries = "test"
[assets]
noise = "planted.jsonl"
filter = "filter.jsonl"
tracing = "planted.jsonl"
{targets}
[benchmarks]
default = ["lds"]
[benchmarks.lds]
replicates = 50
[benchmarks.transfer]
replicates = 50
[benchmarks.selection]
k = [6]
dev = 1
tasks = 2
random_seeds = 1
recipe = "epochs=1,batch_size=6"
max_new_tokens = 2
[benchmarks.removal]
n = 2
k = [3]
fraction = 0.3
random_seeds = 1
recipe = "epochs=1,batch_size=6"
[benchmarks.filter]
budgets = [0.1, 0.2]
random_seeds = 1
recipe = "epochs=3,batch_size=6"
[benchmarks.sources]
copies = 2
[benchmarks.cost]
queries = 3
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory, make_target, tiny_corpus: Corpus, tiny_queries: Corpus) -> Path:
    folder = tmp_path_factory.mktemp("everything")

    def rows(corpus: Corpus, split: str, **more: str) -> list[str]:
        return [
            json.dumps(
                {"id": e.id, "prompt": e.prompt, "response": e.response, "task": e.task,
                 "split": split, **{k: v for k, v in more.items() if i % 3 == 0 or k == "fact"}}
            )
            for i, e in enumerate(corpus)
        ]  # fmt: skip

    lines = rows(tiny_corpus, "pool") + rows(tiny_queries, "test")
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    lines = rows(tiny_corpus, "pool", planted="wrong", fact="f1") + rows(
        tiny_queries, "queries", fact="f1"
    )
    (folder / "planted.jsonl").write_text("\n".join(lines))
    # A behaviour that is easily learned: one response, whatever the prompt.
    lines = [
        {"id": e.id, "prompt": e.prompt, "response": e.response, "split": split, "task": e.task}
        | ({"response": "zz zz zz", "planted": "zz", "clean": e.response} if i % 3 == 0 else {})
        for split, corpus in (("pool", tiny_corpus), ("queries", tiny_queries))
        for i, e in enumerate(corpus)
    ]
    (folder / "filter.jsonl").write_text("\n".join(map(json.dumps, lines)))
    targets = ""
    rng = np.random.default_rng(0)
    for label in ("qwen2", "gpt2"):
        target = make_target(label)
        for kind, groups in (
            ("lds", Groups.random(8, 60, 0.25, np.random.default_rng(1))),
            ("loo", Groups.random(6, 60, 0.95, np.random.default_rng(2))),
            ("sources", without_each(tiny_corpus, "task")),
        ):
            losses = rng.normal(2, 0.1, (len(groups), 2, 12)).astype(np.float32)
            plan = {"train": tiny_corpus.fingerprint, "target": target.fingerprint_of("base")}
            truth = Truth(losses, groups, tuple(tiny_queries.ids), {"name": kind, **plan})
            truth.save(folder / f"{label}-{kind}.safetensors")
        targets += f"""
[[targets]]
label = "{label}"
name = "{target.name}"
folder = "{target.folder}"
checkpoints = {{ base = "base.safetensors", warm = "warm.safetensors" }}
regime = "cold"
max_length = {target.max_length}
main = {"true" if label == "qwen2" else "false"}
[targets.truths]
lds = "{label}-lds.safetensors"
loo = "{label}-loo.safetensors"
sources = "{label}-sources.safetensors"
"""
    (folder / "suite.toml").write_text(SUITE.format(targets=targets))
    return folder / "suite.toml"


def test_every_benchmark_runs_and_its_record_gives_its_value_again(
    suite: Path, tmp_path: Path
) -> None:
    request = Request(str(suite), methods=("tfidf", "length"), benchmarks=BENCHMARKS)
    result = run(request, tmp_path / "run", Options(jobs=2, threads=1, timeout=300.0))
    assert {(r["benchmark"]["name"], r["status"]) for r in result.records} == {
        (b, "ok") for b in BENCHMARKS
    }, [r["reason"] for r in result.records if r["status"] != "ok"]
    for record in result.records:
        primary = record["metrics"][record["primary"]]
        arrays, meta = read_arrays(tmp_path / "run" / "cells" / f"{record['key']}.safetensors")
        assert len(arrays["per_query"]) == len(meta["query_ids"])
        if record["benchmark"]["name"] == "cost":
            assert primary["value"] > 0
            continue
        again = Bootstrap.of_record(primary["value"], arrays["per_query"], arrays)
        low, high = again.interval() or (-np.inf, np.inf)  # none where all are alike
        assert low <= primary["value"] <= high
        if record["benchmark"]["name"] == "transfer":
            assert "lds[gpt2]" in record["metrics"]
            assert "lds[source]" in record["metrics"]
            assert "truth@gpt2:lds" in record["inputs"]
    # All on disk: nothing is measured again, other targets' truths included.
    again = run(request, tmp_path / "run", Options(jobs=2, threads=1))
    assert [r["started"] for r in again.records] == [r["started"] for r in result.records]
    # What does not depend on the method was trained once for both.
    trained = len(list((tmp_path / "run" / "retrained").iterdir()))
    assert 0 < trained < 2 * (2 * 2 + 1 + 1 + 2 + 2) + 2 * 10
    assert read_json(tmp_path / "run" / "manifest.json")["benchmarks"]
    # Every metric follows from what is stored; a metric that was altered is named.
    checks = verify_runs([read_run(tmp_path / "run")])
    assert {c.status for c in checks} == {"agrees"}, [c.problems for c in checks]
    for record in result.records:
        path = tmp_path / "run" / "cells" / f"{record['key']}.json"
        data = read_json(path)
        for metric in data["metrics"].values():
            metric["value"] = 1.1 * metric["value"] + 0.01
        write_json(path, data)
    for check in verify_runs([read_run(tmp_path / "run")]):
        altered = read_json(tmp_path / "run" / "cells" / f"{check.key}.json")["metrics"]
        assert check.status == "differs"
        assert check.problems[0] == "its digest does not match its fields"
        assert len(check.problems) == 1 + len(altered)
