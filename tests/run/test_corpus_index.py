"""`tdabench index` as a process: built by several workers, searched from disk."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tdabench.cli import main
from tdabench.method import Context
from tdabench.registry import registry
from tdabench.run.sources import load_suite

needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="faiss is not installed"
)


def tdabench(*words: object, code: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tdabench", *map(str, words)], capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def ask(capsys):
    """The same command in this process."""

    def asked(*words: object, code: int = 0) -> tuple[str, str]:
        assert main([str(w) for w in words]) == code
        return tuple(capsys.readouterr())

    return asked


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory, tiny_queries) -> Path:
    path = tmp_path_factory.mktemp("queries") / "queries.jsonl"
    rows = [{"id": e.id, "prompt": e.prompt, "response": e.response} for e in tiny_queries]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, toy_suite: Path) -> tuple[Path, dict]:
    """An index in four shards, which two processes built."""
    folder = tmp_path_factory.mktemp("built") / "idx"
    words = ["--method", "hidden", "--suite", toy_suite, "--shard-rows", 16, "--workers", 2]
    out, err = tdabench("index", "build", folder, *words, "--device", "cpu", "--json")
    assert "4 of 4 shards" in err
    return folder, json.loads(out)


def whole(toy_suite: Path, tmp_path: Path, name: str = "hidden"):
    """The index that the method itself builds, in one piece."""
    suite = load_suite(toy_suite)
    method = registry().method(name).cls()
    return suite, method.build(Context(suite.target("tiny").target, tmp_path), suite.train)


def test_searching_finds_what_the_whole_index_finds(built, toy_suite, queries, tmp_path: Path, ask):
    folder, about = built
    suite, index = whole(toy_suite, tmp_path)
    assert (about["n_train"], about["shards"], about["dtype"]) == (60, 4, "float32")
    out, _ = tdabench("index", "search", folder, "--queries", queries, "-k", 7, "--json")
    found = json.loads(out)
    scores, places = index.top_k(suite.queries(), 7)
    sums = index.score(suite.queries()).sum(axis=1)
    for q, row in enumerate(found["queries"]):
        assert [e["index"] for e in row["examples"]] == places[q].tolist()
        assert [e["id"] for e in row["examples"]] == [suite.train[int(i)].id for i in places[q]]
        np.testing.assert_allclose([e["score"] for e in row["examples"]], scores[q], rtol=1e-5)
        assert row["sum_of_scores"] == pytest.approx(sums[q], rel=1e-4)
        assert row["corpus_score"] == pytest.approx(sums[q], rel=1e-4)
    lines, _ = ask("index", "search", folder, "Copy: amber", "--response", "amber", "-k", 3)
    assert [line.split("\t")[1] for line in lines.splitlines()] == ["rank", "1", "2", "3"]
    assert not (folder / "work").exists()


def test_the_same_command_builds_nothing_again(built, toy_suite, ask):
    folder, _ = built
    before = {p: p.stat().st_mtime_ns for p in (folder / "rows").rglob("*") if p.is_file()}
    words = ["--method", "hidden", "--suite", toy_suite, "--shard-rows", 16, "--device", "cpu"]
    out, _ = ask("index", "build", folder, *words)
    assert "60 examples x" in out
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_learned_state_and_two_planes(toy_suite, queries, tmp_path: Path, ask):
    """A gradient method with curvature, its rows in two planes of int8."""
    suite, index = whole(toy_suite, tmp_path, "logra")
    folder = tmp_path / "idx"
    words = ["--method", "logra", "--suite", toy_suite, "--shard-rows", 25, "--store", "int8x2"]
    ask("index", "build", folder, *words)
    out, _ = ask("index", "search", folder, "--queries", queries, "-k", 5, "--json")
    scores, _ = index.top_k(suite.queries(), 5)
    got = [[e["score"] for e in row["examples"]] for row in json.loads(out)["queries"]]
    np.testing.assert_allclose(got, scores, rtol=2e-3, atol=1e-3 * np.abs(scores).max())


@needs_faiss
def test_the_approximate_index(toy_suite, queries, tmp_path: Path, ask):
    suite, index = whole(toy_suite, tmp_path)
    words = ["--method", "hidden", "--suite", toy_suite, "--shard-rows", 16]
    ask("index", "build", tmp_path / "idx", *words, "--approximate", "Flat")
    asked = ["index", "search", tmp_path / "idx", "--queries", queries, "-k", 4, "--json"]
    row = json.loads(ask(*asked, "--approximate")[0])["queries"][0]
    assert [e["index"] for e in row["examples"]] == index.top_k(suite.queries(), 4)[1][0].tolist()
    assert "corpus_score" not in row


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("tfidf", "tfidf encodes sparse rows, which shards do not hold"),
        ("random", "random does not score by products of representations"),
        ("hidden,logra", "unknown method 'hidden,logra'"),
        ("lorif", "lorif builds its index in one piece"),
    ],
)
def test_what_cannot_be_indexed_is_said_in_one_line(toy_suite, tmp_path: Path, method, said, ask):
    words = ["--method", method, "--suite", toy_suite]
    _, err = ask("index", "build", tmp_path / "idx", *words, code=2)
    assert said in err
    assert "Traceback" not in err


def test_a_search_says_what_is_wrong(built, tmp_path: Path, ask):
    folder, about = built
    _, err = ask("index", "search", tmp_path, "p", code=2)
    assert "contains no finished index. Build it with: tdabench index build" in err
    _, err = ask("index", "search", folder, "p", "--response", "r", "--approximate", code=2)
    assert "has no approximate index" in err
    _, err = ask("index", "search", folder, code=2)
    assert "search takes a prompt, or a file of them with --queries" in err
    for change in ({"corpus": "0" * 16}, {"target_fingerprint": "0" * 16}, {"seed": "x"}):
        (folder / "index.json").write_text(json.dumps({**about, **change}))
        _, err = ask("index", "search", folder, "p", "--response", "r", code=2)
        assert "was built with another" in err or "does not describe an index" in err
    (folder / "index.json").write_text(json.dumps(about))
    (tmp_path / "mine.txt").write_text("mine")
    _, err = ask("index", "build", tmp_path, "--method", "hidden", code=2)
    assert "holds 'mine.txt'. Give an empty or new folder" in err


PLUGIN = """
import numpy as np
from tdabench.api import RepresentationMethod, hookimpl

class Letters(RepresentationMethod):
    name = "letters"
    version = 1
    def encode(self, context, examples, role):
        rows = [[e.text.count(c) for c in "abcdefgh"] for e in examples]
        return np.array(rows, dtype=np.float32).reshape(len(examples), 8)

@hookimpl
def tdabench_methods():
    return [Letters]
"""


def test_ray_builds_the_same_index(toy_suite, queries, tmp_path: Path):
    """On a cluster that the command starts on this machine; its processes find the plugin, too."""
    pytest.importorskip("ray", reason="ray is not installed (pip install 'tdabench[ray]')")
    plugin = tmp_path / "letters.py"
    plugin.write_text(PLUGIN)
    words = ["--method", "letters", "--suite", toy_suite, "--shard-rows", 16, "--device", "cpu"]
    words += ["--plugin", plugin]
    _, err = tdabench("index", "build", tmp_path / "ray", *words, "--ray", "")
    assert "4 of 4 shards" in err
    assert "INFO" not in err
    tdabench("index", "build", tmp_path / "one", *words)
    ends = {}
    for name in ("ray", "one"):
        files = sorted(p for p in (tmp_path / name / "rows").rglob("*") if p.is_file())
        ends[name] = [(p.relative_to(tmp_path / name), p.read_bytes()) for p in files]
    assert ends["ray"] == ends["one"]
    found = [
        tdabench("index", "search", tmp_path / "ray", "--queries", queries, "--json", *more)[0]
        for more in (["--plugin", plugin], ["--plugin", plugin, "--ray", ""])
    ]
    shown = [[q["examples"] for q in json.loads(f)["queries"]] for f in found]
    assert shown[0] == shown[1]


@pytest.mark.parametrize("name", ["work/thesis.tex", "features/x", "rows/x", "state.safetensors"])
def test_a_folder_with_someones_files_is_refused_and_untouched(name, tmp_path: Path, ask):
    folder = tmp_path / "idx"
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    _, err = ask("index", "build", folder, "--method", "hidden", code=2)
    assert f"holds {name.partition('/')[0]!r}" in err
    assert {p.name for p in folder.rglob("*") if p.is_file()} == {Path(name).name}
    assert (folder / name).read_text() == "mine"


def test_a_search_leaves_what_was_put_into_its_folder(built, ask):
    folder, _ = built
    (folder / "work").mkdir()
    (folder / "work" / "thesis.tex").write_text("mine")
    ask("index", "search", folder, "Copy: amber", "--response", "amber", "-k", 3)
    assert (folder / "work" / "thesis.tex").read_text() == "mine"
    assert not list(folder.glob(".work-*"))
