"""Corpora: order, identity, and one clear line for every malformed file."""

import gzip
import json

import pytest

from tdabench.data import Corpus, Example, read_jsonl
from tdabench.errors import DataError


def example(i, **kw):
    return Example(**{"id": f"e{i}", "prompt": f"p{i}", "response": "r", "task": "t", **kw})


def test_fingerprint_covers_order_and_content():
    a, b = example(1), example(2)
    prints = {
        Corpus([a, b]).fingerprint,
        Corpus([b, a]).fingerprint,
        Corpus([a]).fingerprint,
        Corpus([a, example(2, response="other")]).fingerprint,
        Corpus([a, example(2, task="other")]).fingerprint,
    }
    assert len(prints) == 5
    assert Corpus([a, b], "x").fingerprint == Corpus([a, b], "y").fingerprint


def test_slices_and_subsets_are_corpora():
    c = Corpus([example(i) for i in range(5)])
    assert c[1:3].ids == ["e1", "e2"]
    assert c.subset([4, 0]).ids == ["e4", "e0"]
    assert len(c) == 5
    assert c[-1].id == "e4"


def test_repeated_ids_are_refused():
    with pytest.raises(DataError, match="e1"):
        Corpus([example(1), example(1)])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_reads_plain_and_gzipped_lines_of_a_split(tmp_path, suffix):
    rows = [
        {"id": "a", "prompt": "p", "response": "r", "task": "t", "split": "pool", "fact": "f"},
        {"id": "b", "prompt": "p2", "response": "r", "split": "test"},
    ]
    text = "\n".join(json.dumps(r) for r in rows).encode() + b"\n\n"
    path = tmp_path / f"c{suffix}"
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    corpus = read_jsonl(path, "pool")
    assert corpus.ids == ["a"]
    assert corpus[0].meta == {"split": "pool", "fact": "f"}
    assert read_jsonl(path).ids == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"{oops", "line 2: not valid JSON"),
        (b'{"prompt": "\xff", "response": "r"}', "line 2: not UTF-8"),
        (b"[1, 2]", "line 2: expected an object"),
        (b'{"prompt": 3, "response": "r"}', "line 2: the field 'prompt'"),
        (b'{"prompt": "p"}', "line 2: the field 'response'"),
        (b'{"prompt": "p", "response": "  "}', "line 2: the response is empty"),
        (b"[" * 100_000, "line 2: not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, what):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"prompt": "p", "response": "r"}\n' + line + b"\n")
    with pytest.raises(DataError, match=what):
        read_jsonl(path)


def test_missing_empty_and_truncated_files(tmp_path):
    with pytest.raises(DataError, match="missing"):
        read_jsonl(tmp_path / "no.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no examples"):
        read_jsonl(tmp_path / "empty.jsonl")
    whole = gzip.compress(b'{"prompt": "p", "response": "r"}\n' * 500)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match="truncated"):
        read_jsonl(tmp_path / "cut.jsonl.gz")
    (tmp_path / "c.jsonl").write_text('{"prompt": "p", "response": "r", "split": "a"}\n')
    with pytest.raises(DataError, match="split 'b'"):
        read_jsonl(tmp_path / "c.jsonl", "b")
