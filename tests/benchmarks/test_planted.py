"""The planted corpora that pocket ships: rebuilt alike, and true to what they promise."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import tdabench
from tdabench.benchmark import BenchmarkContext, Built
from tdabench.data import Corpus, read_jsonl
from tdabench.truth.plan import check_disjoint
from tools.pocket.make_planted import BUILDERS, WRONG_OF

PLANTED = Path(tdabench.__file__).parent / "suites" / "pocket" / "planted"


def shipped(name: str) -> tuple[Corpus, Corpus]:
    path = PLANTED / f"{name}.jsonl.gz"
    return read_jsonl(path, "pool"), read_jsonl(path, "queries")


@pytest.mark.parametrize("name", BUILDERS)
def test_what_ships_is_what_the_script_makes(name: str) -> None:
    pool, queries = shipped(name)
    made = [(r["id"], r["prompt"], r["response"], r["task"]) for r in BUILDERS[name]()]
    assert [(e.id, e.prompt, e.response, e.task) for e in [*pool, *queries]] == made
    check_disjoint(pool, queries)


def test_every_traced_fact_is_stated_and_has_decoys_that_do_not_state_it() -> None:
    pool, queries = shipped("tracing")
    stated = Counter(f for e in pool for f in e.meta.get("fact", "").split())
    mimicked = Counter(f for e in pool for f in e.meta.get("decoy", "").split())
    for q in queries:
        fact = q.meta["fact"]
        assert 1 <= stated[fact] <= 20
        assert mimicked[fact] >= 3
    for e in pool:
        assert not set(e.meta.get("fact", "").split()) & set(e.meta.get("decoy", "").split())
    by_fact = {q.meta["fact"]: q for q in queries}
    holders = [e for e in pool if "answers" in e.meta]
    assert Counter(e.meta["answers"] for e in holders) == dict.fromkeys(by_fact, 1)
    for e in holders:  # a decoy that holds its question's right answer says so
        asked = by_fact[e.meta["answers"]]
        assert e.meta["decoy"] == e.meta["answers"]
        assert e.response.startswith(asked.response.rstrip("."))


def test_wrong_answers_are_wrong_and_of_their_own_task() -> None:
    pool, queries = shipped("noise")
    whole = read_jsonl(PLANTED.parent / "corpus.jsonl.gz", "pool")
    source = {e.id: e for e in whole}
    answers = {(e.task, e.response) for e in whole}
    kinds = Counter(e.meta.get("planted", e.meta.get("lookalike", "") and "twin") for e in pool)
    assert kinds == {"": 800, "wrong": 100, "unsafe": 60, "twin": 60}
    for e in pool:
        told = source[e.meta["source"]]
        assert e.prompt == told.prompt
        if e.meta.get("planted") == "wrong":
            assert e.response != told.response
            assert (e.task, e.response) in answers
        elif not e.meta.get("planted") and not e.meta.get("lookalike"):
            assert e.response == told.response
    asked = Counter(e.meta.get("planted", "") for e in queries)
    assert asked == {"": 100, "unsafe": 50}
    tuning = read_jsonl(PLANTED.parent / "corpus.jsonl.gz", "tuning")
    assert not {e.meta["source"] for e in queries} & set(tuning.ids)
    assert len({e.meta["source"] for e in queries}) == 150  # each of its own


def test_behaviours_stand_beside_look_alikes_and_wrong_answers_are_wrong_in_one_way() -> None:
    pool, queries = shipped("filter")
    planted = Counter(e.meta.get("planted", "") for e in pool)
    assert planted == {"": 720, "trigger": 40, "unsafe": 40, "wrong": 40}
    alike = Counter(e.meta["lookalike"] for e in pool if "lookalike" in e.meta)
    assert alike == {"trigger": 40, "unsafe": 40, "wrong": 40}
    whole = {e.id: e for e in read_jsonl(PLANTED.parent / "corpus.jsonl.gz", "pool")}
    test = {e.id: e for e in read_jsonl(PLANTED.parent / "corpus.jsonl.gz", "test")}
    right = 0
    for e in pool:
        told = whole[e.meta["source"]]
        if e.meta.get("planted") == "wrong":
            assert e.response == WRONG_OF[e.task]
            assert e.response not in told.response
        elif e.meta.get("lookalike") == "wrong":
            assert e.response == told.response
            right += e.response == WRONG_OF[e.task]
        elif "planted" not in e.meta and "lookalike" not in e.meta:
            assert e.task not in WRONG_OF
    assert right == 16  # the very words that are wrong elsewhere
    wrong = [q for q in queries if q.meta.get("planted") == "wrong"]
    assert len(wrong) >= 20
    for q in wrong:
        assert q.response == WRONG_OF[q.task]
        assert q.meta["clean"] == test[q.meta["source"]].response
        assert q.response not in q.meta["clean"]
    assert len({q.meta["source"] for q in queries}) == len(queries)


@pytest.mark.parametrize("name", ["tracing", "noise"])
def test_a_method_is_given_neutral_ids_in_a_neutral_order(name: str) -> None:
    from dataclasses import replace

    from tdabench.benchmarks.noise import Noise
    from tdabench.benchmarks.planted import id_of, neutral
    from tdabench.benchmarks.tracing import Tracing
    from tdabench.method import Index

    pool, queries = shipped(name)
    handed: list[Corpus] = []

    class Recorded(Index):
        def __init__(self, corpus: Corpus) -> None:
            self.n_train = len(corpus)

        def score(self, asked):
            handed.append(asked)
            rng = np.random.default_rng(0)
            return rng.normal(size=(len(asked), self.n_train)).astype(np.float32)

        def save(self, path: Path) -> None:
            raise NotImplementedError

    def build(corpus: Corpus) -> Built:
        handed.append(corpus)
        return Built(Recorded(corpus), 0.0, 0, 0)

    context = BenchmarkContext(
        index=Recorded(pool), target=None, train=pool, queries=queries,  # type: ignore[arg-type]
        truth=lambda kind: None, scratch=Path(), build=build,  # type: ignore[arg-type, return-value]
        assets={name: PLANTED / f"{name}.jsonl.gz"},
    )  # fmt: skip
    benchmark = replace(Tracing(), tail_queries=0) if name == "tracing" else Noise()
    outcome = benchmark.run(context)
    train, *asked = handed
    assert sorted((e.prompt, e.response) for e in train) == sorted(
        (e.prompt, e.response) for e in pool
    )
    assert train.ids == [f"train-{i:06d}" for i in range(len(pool))]
    assert [e.id for part in asked for e in part] == [f"query-{i:06d}" for i in range(len(queries))]
    # The record names the queries of the file.
    assert set(outcome.query_ids) <= set(queries.ids)
    # The order depends on the texts alone: not on order, ids and marks in the file.
    turned = Corpus([replace(e, id=f"x{i}", meta={}) for i, e in enumerate(reversed(list(pool)))])
    assert [e.prompt for e in neutral(turned, "train")] == [e.prompt for e in train]
    assert {id_of(e) for e in train} == set(pool.ids)
