"""`make_run` writes run folders in the documented format, with real statistics inside."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tdabench import stats
from tdabench.benchmarks.lds import LDS, metric, rank_outcome
from tdabench.data.files import read_jsonl
from tdabench.groups import Groups
from tdabench.io import fingerprint, write_arrays, write_json
from tdabench.truth.store import Truth

HARDWARE = {
    "cpu": "Testor 9",
    "cores": 2,
    "memory_bytes": 8 << 30,
    "gpu": None,
    "platform": "Linux-x86_64",
}
METHODS = {"airrep": 1.6, "logra": 1.0, "ekfac": 0.97, "bm25": 0.35, "random": 0.0}
N_TRAIN, N_QUERIES, N_GROUPS, N_SEEDS = 200, 40, 60, 4


def make_truth(seed: int = 0) -> tuple[Truth, np.ndarray]:
    """A truth whose noise-free part [query, group] is returned with it."""
    rng = np.random.default_rng(seed)
    groups = Groups.random(N_GROUPS, N_TRAIN, 0.25, rng)
    signal = rng.normal(size=(N_QUERIES, N_GROUPS))
    noise = rng.normal(size=(N_SEEDS, N_QUERIES, N_GROUPS))
    losses = (5.0 - signal[None] - noise).transpose(2, 0, 1).astype(np.float32)
    ids = tuple(f"q{i:03d}" for i in range(N_QUERIES))
    plan = {"name": "lds", "n_seeds": N_SEEDS, "train": "c0ffee", "target": "beef"}
    return Truth(losses, groups, ids, plan), signal


def _record(run: str, label: str, benchmark: str, seed: int, **more: Any) -> dict[str, Any]:
    name = label.split()[0]
    record = {
        "schema": 1,
        "status": "ok",
        "reason": "",
        "log_tail": [],
        "method": {
            "name": name,
            "label": label,
            "version": 1,
            "plugin": f"tdabench_{name}",
            "family": "test",
            "passed": {},
            "params": {"rank": 16},
        },
        "target": {"name": "qwen2-1m", "regime": "instruct", "fingerprint": "beef"},
        "benchmark": {
            "name": benchmark,
            "version": LDS.version if benchmark == "lds" else 1,
            "params": {"replicates": 200},
        },
        "seed": seed,
        "corpus": {"train": "c0ffee", "queries": "9999"},
        "truth": None,
        "primary": benchmark,
        "metrics": {},
        "notes": [],
        "cost": {
            "prepare": {"seconds": 2460.0, "retrainings": 4800} if name == "airrep" else None,
            "build": {"seconds": 0.5 + len(label), "peak_bytes": 10 << 20},
            "query": {"seconds": 0.01 * len(label), "queries": N_QUERIES, "peak_bytes": 1 << 20},
            "index_bytes": N_TRAIN * 64 * len(label),
            "bytes_per_example": 64.0 * len(label),
            "n_train": N_TRAIN,
        },
        "versions": {"torch": "2.13.0", "numpy": "2.0.0"},
        "hardware": HARDWARE,
        "git": "0123456789ab",
        "started": "2026-01-01T00:00:00Z",
        "seconds": 1.5,
    }
    record.update(more)
    record["key"] = fingerprint(
        [record["method"], record["target"], record["benchmark"], seed, record["truth"]]
    )
    return record


def write_cell(
    folder: Path,
    record: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    path = folder / "cells" / f"{record['key']}.json"
    write_json(path, record)
    if arrays is not None:
        write_arrays(path.with_suffix(".safetensors"), arrays, metadata)
    return path


def write_run(
    folder: Path,
    methods: Mapping[str, float] = METHODS,
    *,
    benchmarks: tuple[str, ...] = ("lds", "transfer", "selection"),
    failed: Mapping[str, tuple[str, str]] | None = None,
    seeds: Mapping[str, int] | None = None,
    change: Callable[[dict[str, Any]], None] = lambda record: None,
    manifest: Mapping[str, Any] | None = None,
    top: int = 0,
    tasks: int = 0,
) -> Path:
    """Writes a run. `methods` maps a label to how much signal its scores carry.

    `failed` maps a label to (status, reason); `seeds` a label to a number of seeds; `change`
    edits every record before it is written; `tasks` spreads the queries of LDS over tasks.
    """
    truth, signal = make_truth()
    truth.save(folder / "truth.safetensors")
    failed, seeds = failed or {}, seeds or {}
    for m, (label, quality) in enumerate({**methods, **dict.fromkeys(failed, 0.0)}.items()):
        for seed in range(seeds.get(label, 1)):
            for b, benchmark in enumerate(benchmarks):
                rng = np.random.default_rng([m, seed, b])
                record = _record(folder.name, label, benchmark, seed)
                record["truth"] = "7777" if benchmark == "lds" else None
                if label in failed:
                    record["status"], record["reason"] = failed[label]
                    record["log_tail"] = ["Traceback", "ValueError: <b>bad</b>"]
                    record["cost"] = {}
                    change(record)
                    write_cell(folder, record)
                    continue
                if benchmark == "lds":
                    scores = quality * signal + rng.normal(size=signal.shape)
                    of = np.arange(N_QUERIES) % tasks if tasks else None
                    outcome = rank_outcome("lds", scores.astype(np.float32), truth, 200, of)
                    arrays = dict(outcome.arrays)
                    metrics = {k: v.as_dict() for k, v in outcome.metrics.items()}
                    record["notes"] = list(outcome.notes)
                    per_query, replicates = outcome.per_query, outcome.replicates
                    if top:
                        order = np.argsort(-rng.normal(size=(N_QUERIES, N_TRAIN)), axis=1)
                        values = -np.sort(-rng.normal(size=(N_QUERIES, N_TRAIN)), axis=1)
                        arrays |= {
                            "top_index": order[:, :top].astype(np.int32),
                            "top_score": values[:, :top].astype(np.float32),
                            "bottom_index": order[:, ::-1][:, :top].astype(np.int32),
                            "bottom_score": values[:, ::-1][:, :top].astype(np.float32),
                        }
                else:
                    per_query = 0.2 * quality + 0.3 * rng.normal(size=N_QUERIES)
                    boot = stats.bootstrap_queries(per_query, 200)
                    metrics = {benchmark: metric(boot).as_dict()}
                    arrays, replicates = boot.arrays(), boot.both
                record["metrics"] = metrics
                assert replicates is not None
                arrays |= {"per_query": per_query, "replicates": replicates}
                change(record)
                ids = {
                    "query_ids": list(truth.query_ids),
                    "tasks": [f"t{i % 3}" for i in range(N_QUERIES)],
                }
                write_cell(folder, record, arrays, ids)
    labels = [*methods, *failed]
    write_json(
        folder / "manifest.json",
        {
            "schema": 1,
            "run": folder.name,
            "suite": {"name": "pocket", "version": 1, "fingerprint": "50174e"},
            "command": ["tdabench", "run", "--methods", ",".join(labels)],
            "created": "2026-01-01T00:00:00Z",
            "tdabench": "0.1.0",
            "git": "0123456789ab",
            "python": "3.11.9",
            "packages": {"torch": "2.13.0", "numpy": "2.0.0"},
            "hardware": HARDWARE,
            "targets": {
                "qwen2-1m": {"name": "qwen2-1m", "regime": "instruct", "fingerprint": "beef"}
            },
            "methods": labels,
            "benchmarks": list(benchmarks),
            "seeds": [0],
            **(manifest or {}),
        },
    )
    return folder


def write_suite(
    folder: Path, train: list[dict[str, str]], queries: list[dict[str, str]]
) -> tuple[Path, dict[str, str]]:
    """A suite file over these examples, and the corpus fingerprints its records carry."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, examples in (("train", train), ("queries", queries)):
        lines = (json.dumps(e) for e in examples)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    path = folder / "suite.toml"
    path.write_text(
        '[suite]\nname = "pocket"\n[corpus]\ntrain_file = "train.jsonl"\n'
        'queries_file = "queries.jsonl"\n[[targets]]\nlabel = "qwen2-1m"\nfolder = "target"\n'
    )
    found = {n: read_jsonl(folder / f"{n}.jsonl").fingerprint for n in ("train", "queries")}
    return path, found


@pytest.fixture(scope="session")
def _plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "plain"
    return write_run(
        folder, failed={"demo": ("failed", "returned NaN for 3 queries")}, seeds={"random": 3}
    )


@pytest.fixture
def plain_run(_plain_run: Path, tmp_path: Path) -> Path:
    """A run of five methods (random with three seeds), a failed one, three benchmarks."""
    import shutil

    return Path(shutil.copytree(_plain_run, tmp_path / "runs" / "plain"))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run("name", …)`: `write_run` under the test's own folder."""

    def make(name: str = "plain", *args: Any, **more: Any) -> Path:
        return write_run(tmp_path / "runs" / name, *args, **copy.deepcopy(more))

    return make


@pytest.fixture
def put_cell() -> Callable[..., Path]:
    """`put_cell(folder, record, arrays, metadata)` writes one cell."""
    return write_cell


@pytest.fixture
def make_suite(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, str]]]:
    """`make_suite(train, queries)`: `write_suite` under the test's own folder."""
    return lambda train, queries: write_suite(tmp_path / "suite", train, queries)
