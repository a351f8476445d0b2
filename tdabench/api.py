"""Everything a plugin author imports; nothing else of tdabench is public.

    from tdabench.api import RepresentationMethod, hookimpl

Names that need torch are loaded when first touched, so that importing a plugin costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tdabench.benchmark import Benchmark, BenchmarkContext, Metric, Outcome
from tdabench.data.examples import Corpus, Example
from tdabench.data.files import read_jsonl, write_jsonl
from tdabench.errors import (
    DataError,
    GuardError,
    MethodError,
    MissingAsset,
    MissingExtra,
    TdabenchError,
    UsageError,
    resumable,
)
from tdabench.groups import POOLINGS, Groups, Pooling, check_pooling, pool_scores
from tdabench.hookspecs import hookimpl
from tdabench.io import (
    check_free,
    check_replaceable,
    fingerprint,
    read_arrays,
    read_json,
    sha256_file,
    write_arrays,
    write_bytes,
    write_json,
    write_text,
)
from tdabench.method import Context, Index, TDAMethod
from tdabench.rows import Rows, row_blocks, top_k_of
from tdabench.seeds import named_seed
from tdabench.toolkit.representation import (
    RepresentationIndex,
    RepresentationMethod,
    Role,
    transform_rows,
)

if TYPE_CHECKING:
    from tdabench.registry import registry
    from tdabench.run.sources import derive_suite, load_suite
    from tdabench.run.suite import Suite
    from tdabench.stats import bootstrap_queries, spearman_rows
    from tdabench.targets.batches import Batch, Tokens, batch_places, over_batches, pad
    from tdabench.targets.target import (
        Target,
        example_losses,
        no_bars,
        response_logits,
        token_losses,
    )
    from tdabench.targets.training import Recipe, finetune
    from tdabench.toolkit.encode import encode_texts, pooled_hidden_states
    from tdabench.toolkit.gradients import (
        GradientEngine,
        Layer,
        Workspace,
        example_blocks,
        layer_sums,
        map_batches,
        per_example,
        second_moment,
        select_layers,
        stream_features,
    )
    from tdabench.toolkit.store import FeatureStore
    from tdabench.truth.build import build as build_truth
    from tdabench.truth.build import finished as finished_units
    from tdabench.truth.build import read_row as unit_losses
    from tdabench.truth.plan import TruthPlan, check_disjoint
    from tdabench.truth.store import Truth

_LAZY = {
    "Batch": "tdabench.targets.batches",
    "Tokens": "tdabench.targets.batches",
    "batch_places": "tdabench.targets.batches",
    "over_batches": "tdabench.targets.batches",
    "pad": "tdabench.targets.batches",
    "Target": "tdabench.targets.target",
    "example_losses": "tdabench.targets.target",
    "no_bars": "tdabench.targets.target",
    "response_logits": "tdabench.targets.target",
    "token_losses": "tdabench.targets.target",
    "Recipe": "tdabench.targets.training",
    "finetune": "tdabench.targets.training",
    "encode_texts": "tdabench.toolkit.encode",
    "pooled_hidden_states": "tdabench.toolkit.encode",
    "GradientEngine": "tdabench.toolkit.gradients",
    "Layer": "tdabench.toolkit.gradients",
    "example_blocks": "tdabench.toolkit.gradients",
    "layer_sums": "tdabench.toolkit.gradients",
    "map_batches": "tdabench.toolkit.gradients",
    "per_example": "tdabench.toolkit.gradients",
    "second_moment": "tdabench.toolkit.gradients",
    "Workspace": "tdabench.toolkit.gradients",
    "select_layers": "tdabench.toolkit.gradients",
    "stream_features": "tdabench.toolkit.gradients",
    "FeatureStore": "tdabench.toolkit.store",
    "Truth": "tdabench.truth.store",
    "TruthPlan": "tdabench.truth.plan",
    "build_truth": "tdabench.truth.build:build",
    "check_disjoint": "tdabench.truth.plan",
    "finished_units": "tdabench.truth.build:finished",
    "unit_losses": "tdabench.truth.build:read_row",
    "derive_suite": "tdabench.run.sources",
    "Suite": "tdabench.run.suite",
    "load_suite": "tdabench.run.sources",
    "registry": "tdabench.registry",
    "bootstrap_queries": "tdabench.stats",
    "spearman_rows": "tdabench.stats",
}

__all__ = [
    "POOLINGS",
    "Batch",
    "Benchmark",
    "BenchmarkContext",
    "Context",
    "Corpus",
    "DataError",
    "Example",
    "FeatureStore",
    "GradientEngine",
    "Groups",
    "GuardError",
    "Index",
    "Layer",
    "MethodError",
    "Metric",
    "MissingAsset",
    "MissingExtra",
    "Outcome",
    "Pooling",
    "Recipe",
    "RepresentationIndex",
    "RepresentationMethod",
    "Role",
    "Rows",
    "Suite",
    "TDAMethod",
    "Target",
    "TdabenchError",
    "Tokens",
    "Truth",
    "TruthPlan",
    "UsageError",
    "Workspace",
    "batch_places",
    "bootstrap_queries",
    "build_truth",
    "check_disjoint",
    "check_free",
    "check_pooling",
    "check_replaceable",
    "derive_suite",
    "encode_texts",
    "example_blocks",
    "example_losses",
    "finetune",
    "fingerprint",
    "finished_units",
    "hookimpl",
    "layer_sums",
    "load_suite",
    "map_batches",
    "named_seed",
    "no_bars",
    "over_batches",
    "pad",
    "per_example",
    "pool_scores",
    "pooled_hidden_states",
    "read_arrays",
    "read_json",
    "read_jsonl",
    "registry",
    "response_logits",
    "resumable",
    "row_blocks",
    "second_moment",
    "select_layers",
    "sha256_file",
    "spearman_rows",
    "stream_features",
    "token_losses",
    "top_k_of",
    "transform_rows",
    "unit_losses",
    "write_arrays",
    "write_bytes",
    "write_json",
    "write_jsonl",
    "write_text",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        module, _, attribute = _LAZY[name].partition(":")
        return getattr(importlib.import_module(module), attribute or name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
