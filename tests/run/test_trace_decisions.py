"""`trace` for decisions: contrasts, behaviours, sources, near-duplicates, words, and a page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tdabench.cli import main
from tdabench.data.behaviours import Behaviour
from tdabench.data.examples import Corpus, Example
from tdabench.method import Index
from tdabench.registry import registry
from tdabench.report import traced
from tdabench.run.trace import Traced, scores_of, with_totals
from tdabench.testing import tiny_world

TRAIN = Corpus(
    [
        Example("a", "What is the capital of France?", "Paris", "capital", {"source": "web"}),
        Example("b", "what is the  capital of France?", "paris", "capital", {"source": "web"}),
        Example("c", "Name a river.", "Seine", "river", {"source": "book"}),
        Example("d", "Name a tree.", "Oak", "tree", {"source": "book"}),
    ],
    "t",
)


def test_near_duplicates_are_shown_once():
    items = [(3.0, 0), (2.0, 2), (1.5, 1), (1.0, 3)]
    found = traced.folded(TRAIN, items, 2)
    assert [(s.score, s.index, s.copies) for s in found] == [(3.0, 0, (1,)), (2.0, 2, ())]
    assert traced.kinds(TRAIN, found) == [("web", 2), ("book", 1)]
    assert traced.folded(TRAIN, [], 2) == []
    same = Corpus([Example(str(i), "p", "r") for i in range(3)])
    assert [s.copies for s in traced.folded(same, [(1.0, i) for i in range(3)], 9)] == [(1, 2)]


def answer(label: str, top: list[int], scores: list[float], totals=(4.0, -1.0)) -> Traced:
    row, value = np.array([top]), np.array([scores], dtype=np.float32)
    return Traced(label, 0, 0, row, value, row[:, ::-1], value[:, ::-1], totals=np.array([totals]))


def test_shares_and_agreement():
    a, b = answer("x", [0, 2, 3], [2.0, 1.0, -1.0]), answer("y", [3, 2, 1], [1.0, 1.0, 1.0])
    shown = traced.folded(TRAIN, traced.sides(a, 0)[0], 5)
    assert traced.share(a, 0, shown, 0) == pytest.approx(0.75)
    assert traced.share(answer("x", [0], [1.0], (0.0, 0.0)), 0, shown, 0) is None
    (pair,) = traced.agreements([a, b, Traced("z", reason="failed")], 0, 3, 4)
    assert (pair["methods"], pair["shared"], pair["k"]) == (["x", "y"], 2, 3)
    assert "x and y share 2 of their 3 highest-scoring examples" in traced.agreement_line(pair)


def test_sources_are_listed_from_both_ends():
    rows = traced.source_rows(["a", "b", "c", "d", "e"], [1, 2, 4, 1, 1],
                              np.array([0.5, -2.0, 4.0, 0.0, -9.0]), 1)  # fmt: skip
    assert [(r["source"], r["each"]) for r in rows] == [("c", 1.0), ("e", -9.0)]
    assert len(traced.source_rows(["a", "b"], [1, 1], np.zeros(2), 3)) == 2


class Table(Index):
    def __init__(self, index: Index) -> None:
        self.inner, self.n_train = index, index.n_train

    def score(self, queries):
        return self.inner.score(queries)

    def save(self, path: Path) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("name", ["bm25", "hidden"])  # sparse and dense rows
def test_behaviours_are_read_in_one_pass_and_equal_the_sums_of_scores(tmp_path, name):
    world = tiny_world()
    index = registry().method(name).cls().build(world.context(tmp_path), world.train)
    a, b, c = world.queries[:3]
    asked = [Behaviour.of("s", [a, b]), Behaviour("c", (a, c), (1.0, -1.0)), b]
    for found, other in zip(with_totals(index, asked, 4), with_totals(Table(index), asked, 4)):
        for x, y in zip(found, other):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    scores = scores_of(index, asked)
    np.testing.assert_allclose(scores[1], index.score([a])[0] - index.score([c])[0], atol=1e-4)
    totals = with_totals(index, asked, 4)[1]
    np.testing.assert_allclose(totals.sum(axis=1), scores.sum(axis=1), rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------- the command


@pytest.fixture
def files(own_cache, tmp_path, monkeypatch, toy_suite: Path) -> list[str]:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "Copy: amber", "response": "amber"}, {"prompt": "Copy: fjord",
                                                               "response": "fjord"}]  # fmt: skip
    Path("set.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    marked = [{**r, "behaviour": n, "against": "no"} for r, n in zip(rows, ("one", "two"))]
    Path("two.jsonl").write_text("".join(json.dumps(r) + "\n" for r in marked))
    return ["--suite", str(toy_suite), "--methods", "bm25,tfidf>bm25@30"]


def test_a_contrast_a_set_and_sources_in_json_and_as_a_page(files, capsys):
    asked = ["trace", *files, "--json", "-k", "2"]
    assert main([*asked, "Copy: amber", "--response", "amber", "--against", "fjord"]) == 0
    (query,) = json.loads(capsys.readouterr().out)["queries"]
    assert query["response"] == "amber, not: fjord"
    told = query["methods"]["bm25"]
    assert told["helpful"][0]["score"] > 0 > told["harmful"][0]["score"]
    assert query["agreement"][0]["methods"] == ["bm25", "tfidf>bm25@30"]

    more = ["--behaviour", "set.jsonl", "--by", "task", "--words", "--html", "page.html"]
    assert main([*asked, *more]) == 0
    (query,) = json.loads(capsys.readouterr().out)["queries"]
    assert query["id"] == "set"
    assert query["prompt"] == "Copy: amber (and 1 more)"
    told = query["methods"]["bm25"]
    assert {r["source"] for r in told["sources"]} <= {"add", "copy", "count", "reverse"}
    assert told["sources"][0]["score"] >= told["sources"][-1]["score"]
    first = told["helpful"][0]
    assert {w["side"] for w in first["words"]} == {"prompt", "response"}
    assert sum(w["score"] for w in first["words"]) != 0
    assert "query_words" not in told  # a set of examples has no words of its own
    page = Path("page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "By source" in page
    assert "rgba(" in page
    assert "<script" not in page
    assert main([*asked, *more]) == 0  # its own page is written over, nobody else's
    Path("page.html").write_text("my homepage")
    capsys.readouterr()
    assert main([*asked, *more]) == 2
    assert "page.html exists and is not a trace of tdabench" in capsys.readouterr().err
    assert Path("page.html").read_text() == "my homepage"

    assert main([*asked, "--behaviour", "two.jsonl"]) == 0
    found = json.loads(capsys.readouterr().out)["queries"]
    assert [q["id"] for q in found] == ["one", "two"]
    assert found[0]["response"] == "amber, not: no"


def test_words_of_the_answer_are_in_json_and_on_the_page(files, capsys):
    asked = ["trace", *files, "--words", "Copy: amber", "--response", "amber"]
    assert main([*asked, "--json", "--html", "page.html"]) == 0
    (query,) = json.loads(capsys.readouterr().out)["queries"]
    for told in query["methods"].values():
        assert [w["word"] for w in told["query_words"]] == ["Copy:", "amber", "amber"]
        assert [w["side"] for w in told["query_words"]] == ["prompt", "prompt", "response"]
        assert max(w["score"] for w in told["query_words"]) > 0
    page = Path("page.html").read_text()
    assert page.count("Words of the query:") == 2


def test_sources_in_a_pipe(files, capsys):
    assert main(["trace", *files, "Copy: amber", "--response", "amber", "--by", "task"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {r[2] for r in rows[1:]} == {"helpful", "source"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--behaviour", "set.jsonl"], "trace takes a prompt, or a file"),
        (["--queries", "set.jsonl", "--against", "y"], "--against belongs to a prompt"),
        (["x", "--response", "y", "--against", " "], "--against is empty"),
        (["x", "--response", "y", "--against", "y"], "are the same"),
        (["x", "--response", "y", "--by", "licence"], "come from 0 sources"),
    ],
)
def test_mistakes_are_one_line(files, capsys, arguments, message):
    assert main(["trace", *files, *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
