"""Everything a plugin author imports; nothing else of tdabench is public.

    from tdabench.api import RepresentationMethod, hookimpl

Each name is listed once, as `import X as X`. Importing this module does not load torch: the names
of `toolkit.gradients`, which needs torch, are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tdabench.benchmark import Benchmark as Benchmark
from tdabench.benchmark import BenchmarkContext as BenchmarkContext
from tdabench.benchmark import Metric as Metric
from tdabench.benchmark import Outcome as Outcome
from tdabench.data.behaviours import Behaviour as Behaviour
from tdabench.data.examples import Corpus as Corpus
from tdabench.data.examples import Example as Example
from tdabench.data.files import read_jsonl as read_jsonl
from tdabench.data.files import write_jsonl as write_jsonl
from tdabench.errors import DataError as DataError
from tdabench.errors import GuardError as GuardError
from tdabench.errors import MethodError as MethodError
from tdabench.errors import MissingExtra as MissingExtra
from tdabench.errors import NotApplicable as NotApplicable
from tdabench.errors import TdabenchError as TdabenchError
from tdabench.errors import UsageError as UsageError
from tdabench.errors import resumable as resumable
from tdabench.groups import POOLINGS as POOLINGS
from tdabench.groups import Groups as Groups
from tdabench.groups import check_pooling as check_pooling
from tdabench.hookspecs import hookimpl as hookimpl
from tdabench.io import array_shapes as array_shapes
from tdabench.io import check_free as check_free
from tdabench.io import check_replaceable as check_replaceable
from tdabench.io import fingerprint as fingerprint
from tdabench.io import read_arrays as read_arrays
from tdabench.io import read_json as read_json
from tdabench.io import sha256_file as sha256_file
from tdabench.io import write_arrays as write_arrays
from tdabench.io import write_bytes as write_bytes
from tdabench.io import write_json as write_json
from tdabench.method import Context as Context
from tdabench.method import Index as Index
from tdabench.method import TDAMethod as TDAMethod
from tdabench.params import read_settings as read_settings
from tdabench.registry import registry as registry
from tdabench.rows import Rows as Rows
from tdabench.rows import row_blocks as row_blocks
from tdabench.run.sources import derive_suite as derive_suite
from tdabench.run.sources import load_suite as load_suite
from tdabench.run.suite import Suite as Suite
from tdabench.seeds import named_seed as named_seed
from tdabench.stats import bootstrap_queries as bootstrap_queries
from tdabench.stats import spearman_rows as spearman_rows
from tdabench.targets.batches import Batch as Batch
from tdabench.targets.batches import Tokens as Tokens
from tdabench.targets.batches import batch_places as batch_places
from tdabench.targets.batches import over_batches as over_batches
from tdabench.targets.batches import pad as pad
from tdabench.targets.forward import last_states as last_states
from tdabench.targets.products import fast_products as fast_products
from tdabench.targets.recipe import Recipe as Recipe
from tdabench.targets.sizes import check_folder as check_folder
from tdabench.targets.target import Target as Target
from tdabench.targets.target import example_losses as example_losses
from tdabench.targets.target import load_body as load_body
from tdabench.targets.target import response_logits as response_logits
from tdabench.targets.target import token_losses as token_losses
from tdabench.targets.training import batch_order as batch_order
from tdabench.targets.training import finetune as finetune
from tdabench.toolkit.encode import encode_texts as encode_texts
from tdabench.toolkit.encode import pooled_hidden_states as pooled_hidden_states
from tdabench.toolkit.representation import RepresentationIndex as RepresentationIndex
from tdabench.toolkit.representation import RepresentationMethod as RepresentationMethod
from tdabench.toolkit.representation import Role as Role
from tdabench.toolkit.representation import build_index as build_index
from tdabench.toolkit.representation import open_index as open_index
from tdabench.toolkit.sharded import in_processes as in_processes
from tdabench.toolkit.sharded import on_ray as on_ray
from tdabench.toolkit.store import FeatureStore as FeatureStore
from tdabench.toolkit.weights import check_room as check_room
from tdabench.toolkit.weights import losses_of as losses_of
from tdabench.toolkit.weights import models_of as models_of
from tdabench.toolkit.weights import random_groups as random_groups
from tdabench.toolkit.weights import retrained as retrained
from tdabench.toolkit.weights import weights_of as weights_of
from tdabench.toolkit.words import query_word_scores as query_word_scores
from tdabench.toolkit.words import word_scores as word_scores
from tdabench.truth.build import build as build_truth  # noqa: F401
from tdabench.truth.build import finished as finished_units  # noqa: F401
from tdabench.truth.build import read_row as read_unit  # noqa: F401
from tdabench.truth.plan import TruthPlan as TruthPlan
from tdabench.truth.plan import check_disjoint as check_disjoint
from tdabench.truth.store import Truth as Truth

if TYPE_CHECKING:
    from tdabench.toolkit.gradients import GradientEngine as GradientEngine
    from tdabench.toolkit.gradients import Layer as Layer
    from tdabench.toolkit.gradients import Workspace as Workspace
    from tdabench.toolkit.gradients import example_blocks as example_blocks
    from tdabench.toolkit.gradients import layer_sums as layer_sums
    from tdabench.toolkit.gradients import map_batches as map_batches
    from tdabench.toolkit.gradients import per_example as per_example
    from tdabench.toolkit.gradients import second_moment as second_moment
    from tdabench.toolkit.gradients import select_layers as select_layers
    from tdabench.toolkit.gradients import stream_features as stream_features
else:

    def __getattr__(name: str) -> Any:
        if not name.startswith("_"):
            from tdabench.toolkit import gradients

            if name in gradients.__all__:
                return getattr(gradients, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
