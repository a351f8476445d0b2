"""A suite of sixty training examples and a truth of random losses, on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tdabench.data.examples import Corpus
from tdabench.groups import Groups
from tdabench.registry import configure
from tdabench.targets.target import Target
from tdabench.truth.store import Truth

TOYS = Path(__file__).parent / "toys.py"


def write_suite(
    folder: Path, target: Target, train: Corpus, queries: Corpus, extra: str = ""
) -> Path:
    """Writes corpus, truth and suite.toml into `folder`; `extra` is appended to the TOML."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": e.id, "prompt": e.prompt, "response": e.response, "task": e.task, "split": split}
        for split, corpus in (("pool", train), ("test", queries))
        for e in corpus
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rng = np.random.default_rng(0)
    groups = Groups.random(8, len(train), 0.25, rng)
    losses = rng.normal(2.0, 0.1, (8, 2, len(queries))).astype(np.float32)
    plan = {"name": "toy", "train": train.fingerprint, "target": target.fingerprint_of("base")}
    Truth(losses, groups, tuple(queries.ids), plan).save(folder / "truth.safetensors")
    path = folder / "suite.toml"
    path.write_text(
        f"""
[suite]
name = "toy"
version = 1
[corpus]
file = "corpus.jsonl"
train = "pool"
queries = "test"
[[targets]]
label = "tiny"
name = "{target.name}"
folder = "{target.folder}"
checkpoints = {{ base = "base.safetensors", warm = "warm.safetensors" }}
regime = "cold"
max_length = {target.max_length}
[targets.truths]
lds = "truth.safetensors"
[benchmarks]
default = ["lds"]
[benchmarks.lds]
replicates = 50
{extra}
"""
    )
    return path


@pytest.fixture(scope="session")
def toy_suite(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_target: Target,
    tiny_corpus: Corpus,
    tiny_queries: Corpus,
) -> Path:
    """The path of the toy suite's file. Read only."""
    return write_suite(tmp_path_factory.mktemp("suite"), tiny_target, tiny_corpus, tiny_queries)


@pytest.fixture
def make_suite(
    tmp_path: Path, tiny_target: Target, tiny_corpus: Corpus, tiny_queries: Corpus
) -> Callable[..., Path]:
    """A function from further TOML (and another corpus) to the path of a suite of one's own."""

    def make(
        extra: str = "",
        train: Corpus = tiny_corpus,
        queries: Corpus = tiny_queries,
        target: Target = tiny_target,
    ) -> Path:
        return write_suite(tmp_path / "suite", target, train, queries, extra)

    return make


@pytest.fixture(scope="module")
def toys() -> Iterator[str]:
    """Registers the toy methods of toys.py, and forgets them afterwards."""
    configure((), [str(TOYS)])
    yield str(TOYS)
    configure((), ())
