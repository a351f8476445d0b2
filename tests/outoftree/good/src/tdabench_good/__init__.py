"""A plugin with every hook, as a stranger would write it."""

from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from tdabench.api import (
    Benchmark,
    Metric,
    Outcome,
    RepresentationMethod,
    bootstrap_queries,
    hookimpl,
    write_json,
)


@dataclass(frozen=True, kw_only=True)
class SharedWords(RepresentationMethod):
    """Inverse-frequency weighted words in common, fitted on the corpus."""

    name = "shared-words"
    family = "text"
    summary = "words in common, rare ones count more"

    buckets: int = 300

    def encode(self, context, examples, role):
        rows = np.zeros((len(examples), self.buckets), dtype=np.float32)
        for row, e in zip(rows, examples):
            for word in set(e.text.lower().split()):
                row[sum(word.encode()) % self.buckets] = 1.0
        return rows

    def fit(self, context, features):
        return {"weight": 1.0 / (1.0 + features.sum(axis=0))}

    def transform(self, features, state, role):
        weighted = features * np.sqrt(state["weight"])
        return weighted / np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-9)


@dataclass(frozen=True)
class Spread(Benchmark):
    """Standard deviation of a query's scores, as a share of their largest size."""

    name = "spread"
    summary = "how much scores differ within a query"

    def run(self, context):
        scores = context.index.score(context.queries)
        per_query = scores.std(axis=1) / np.maximum(np.abs(scores).max(axis=1), 1e-9)
        mean = bootstrap_queries(per_query)
        low, high = mean.interval() or (None, None)
        metrics = {"spread": Metric(mean.value, low, high)}
        return Outcome("spread", metrics, per_query, tuple(context.queries.ids), mean.both)


@click.command()
def hello():
    """Say hello from a plugin."""
    click.echo("hello from tdabench-good")


@hookimpl
def tdabench_methods():
    return [SharedWords]


@hookimpl
def tdabench_benchmarks():
    return [Spread]


@hookimpl
def tdabench_suites():
    return [Path(__file__).parent / "lent.toml"]


@hookimpl
def tdabench_commands(cli):
    cli.add_command(hello)


@hookimpl
def tdabench_record(record, folder):
    seen = folder / "seen-by-good.json"
    write_json(seen, {"method": record["method"]["name"], "status": record["status"]})
