"""The report as a file: self-contained, escaped, within its size."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner

from tdabench.cli.report import command
from tdabench.report.board import Board
from tdabench.report.examples import Texts, load_texts
from tdabench.report.html import Level, Source, render, write_report
from tdabench.report.records import read_run

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\u202e {{DATA}} {{X}}"


class Page(HTMLParser):
    """Tags with attributes, and the text of each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, dict, str]] = []
        self._inside: tuple[str, dict] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = (tag, dict(attrs)) if tag in ("script", "style") else None

    def handle_data(self, data):
        if self._inside:
            self.texts.append((*self._inside, data))
            self._inside = None

    @property
    def data(self):
        return json.loads(next(t for _, a, t in self.texts if a.get("id") == "data"))

    def blob(self, id, dtype):
        text = next(t for _, a, t in self.texts if a.get("id") == id)
        return np.frombuffer(base64.b64decode(text), dtype)


def page_of(folder, texts=None, level=None):
    return Page(render(Source(Board.from_runs([folder]), texts or [Texts()]), level)[0])


@pytest.fixture
def told(make_run, make_suite):
    """A run with top examples and the texts behind it, some of them hostile."""
    train = [
        {"id": f"t{i}", "prompt": f"p{i}", "response": f"r{i}", "task": "ab"[i % 2]}
        for i in range(200)
    ]
    train[7] |= {"prompt": EVIL, "response": "y" * 2_000_000}
    queries = [
        {"id": f"q{i:03d}", "prompt": f"{EVIL} {i}", "response": "r", "task": EVIL}
        for i in range(40)
    ]
    suite, corpus = make_suite(train, queries)
    folder = make_run(
        "r",
        {"a": 1.0, EVIL: 0.3},
        top=10,
        failed={"bad": ("failed", EVIL)},
        change=lambda record: record.update(corpus=dict(corpus)),
        manifest={"request": {"suite": str(suite)}, "command": ["tdabench", EVIL]},
    )
    return folder, load_texts(read_run(folder))


def test_the_page_asks_nothing_of_any_network(told):
    folder, texts = told
    page = page_of(folder, [texts])
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "poster", "action", "formaction"} & set(attributes)
        assert tag not in ("link", "iframe", "object", "embed", "img", "base")
        assert attributes.get("href", "#").startswith("#")
    style = next(t for tag, _, t in page.texts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style


def test_the_policy_allows_the_pages_own_script_and_style_only(told):
    folder, texts = told
    page = page_of(folder, [texts])
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        text = [t for tag, a, t in page.texts if tag == kind and "id" not in a]
        assert len(text) == 1
        digest = base64.b64encode(hashlib.sha256(text[0].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_the_script_never_parses_markup(told):
    folder, texts = told
    script = next(
        t for tag, a, t in page_of(folder, [texts]).texts if tag == "script" and "id" not in a
    )
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in script
    assert not re.search(
        r"fetch\(|XMLHttp|WebSocket|import\(|https?://(?!www\.w3\.org/2000/svg)", script
    )


def test_hostile_strings_stay_inside_the_data(told):
    folder, texts = told
    text, _ = render(Source(Board.from_runs([folder]), [texts]))
    page = Page(text)
    scripts = [a for t, a in page.tags if t == "script"]
    blobs = [a for a in scripts if a.get("type") == "text/plain"]
    assert len(scripts) - len(blobs) == 2
    assert not any(t == "img" for t, _ in page.tags)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", text)
    assert page.data["tables"][0]["rows"][-1]["cells"]["lds"]["reason"].startswith("</script>")
    assert "{{DATA}}" in page.data["tables"][0]["rows"][-1]["cells"]["lds"]["reason"]


def test_figures_are_the_boards(plain_run):
    board = Board.from_runs([plain_run])
    stored = page_of(plain_run).data["tables"][0]
    for row, shown in zip(board.table().rows, stored["rows"], strict=True):
        assert shown["label"] == row.label
        for name, cell in row.cells.items():
            if cell.value is not None:
                assert shown["cells"][name]["value"] == pytest.approx(cell.value, rel=1e-5)
            assert shown["cells"][name]["rank"] == cell.rank
            assert shown["cells"][name]["reason"] == cell.reason


def test_packed_values_and_examples_are_those_of_the_record(told):
    folder, texts = told
    page = page_of(folder, [texts])
    ex = page.data["tables"][0]["explorer"]
    record = next(
        r for r in read_run(folder).records if (r.label, r.benchmark_name) == ("a", "lds")
    )
    arrays, meta = record.arrays()
    entry = next(v for v in ex["values"] if (v["column"], v["method"]) == ("lds", "a"))
    packed = page.blob(entry["blob"], "<i2") / 32767 * entry["scale"]
    assert packed == pytest.approx(arrays["per_query"], abs=1e-4)
    ids = [page.data["queries"][q]["id"] for q in ex["queries"]]
    assert ids == meta["query_ids"]
    top = next(t for t in ex["tops"] if t["method"] == "a")
    for side in ("top", "bottom"):
        part = top[side]
        index = page.blob(f"{part['blob']}i", "<u2").reshape(40, 10)
        shown = [[page.data["train"][i]["id"] for i in row] for row in index]
        assert shown == [[f"t{i}" for i in row] for row in arrays[f"{side}_index"]]
        score = page.blob(f"{part['blob']}s", "<i2").reshape(40, 10) / 32767
        score = score * np.array(part["scale"])[:, None]
        assert score == pytest.approx(arrays[f"{side}_score"], abs=1e-3)


def test_megabytes_of_text_are_cut(told):
    folder, texts = told
    text, _ = render(Source(Board.from_runs([folder]), [texts]))
    assert len(text) < 2_000_000
    long = next(e for e in Page(text).data["train"] if e["id"] == "t7")
    assert len(long["response"]) == 1201


def test_a_smaller_level_says_what_it_leaves_out(told):
    folder, texts = told
    text, notes = render(Source(Board.from_runs([folder]), [texts]), Level(3, 50, 10))
    page = Page(text)
    assert len(page.data["tables"][0]["explorer"]["queries"]) == 10
    assert any("10 of 40 queries" in n for n in notes)
    assert any("3 of 10 examples a side" in n for n in notes)
    assert page.data["notes"] == notes


def test_the_file_stays_within_its_size(told, tmp_path):
    folder, _ = told
    board = Board.from_runs([folder])
    full, small = tmp_path / "full.html", tmp_path / "small.html"
    assert write_report(board, full) == ["1 texts are cut at 1,200 characters"]
    limit = full.stat().st_size - 100
    assert "1 texts are cut at 400 characters" in write_report(board, small, max_bytes=limit)
    assert small.stat().st_size <= limit
    assert "it cannot be reduced" in write_report(board, small, max_bytes=1000)[-1]


def test_without_texts_the_page_says_why(plain_run):
    data = page_of(plain_run, [Texts(reason="the suite has another training corpus now")]).data
    assert "another training corpus" in data["reason"]
    assert data["tables"][0]["tasks"] == {}
    assert data["tables"][0]["explorer"]["tops"] == []


def test_texts_of_another_corpus_are_not_shown(make_run, make_suite):
    examples = [{"id": "x", "prompt": "p", "response": "r"}]
    suite, _ = make_suite(examples, [{"id": "q000", "prompt": "q", "response": "r"}])
    folder = make_run("r", {"a": 1.0}, manifest={"request": {"suite": str(suite)}})
    found = load_texts(read_run(folder))
    assert (dict(found.queries), found.train) == ({}, None)
    assert "another training corpus" in found.reason
    assert "there is no suite" in load_texts(read_run(folder), "nowhere/suite.toml").reason


@pytest.mark.parametrize(
    "change",
    [
        {"top_index": np.full((40, 10), -1)},
        {"top_score": np.full((40, 10), np.nan, np.float32)},
        {"bottom_index": np.zeros((3, 10), np.int32)},
        {"top_index": np.zeros((40, 10), np.float32)},
        {"top_index": np.full((40, 10), 10**6, np.int64)},
    ],
)
def test_damaged_top_examples_do_no_harm(told, put_cell, change):
    folder, texts = told
    for record in read_run(folder).records:
        if record.ok and record.benchmark_name == "lds":
            arrays, meta = record.arrays()
            put_cell(folder, record.data, arrays | change, meta)
    page = page_of(folder, [texts])
    if change.get("top_index") is None or change["top_index"].max() < 10**6:
        assert page.data["tables"][0]["explorer"]["tops"] == []


def test_without_scripts_there_is_still_a_table(plain_run):
    text, _ = render(Source(Board.from_runs([plain_run]), [Texts()]))
    fallback = re.search(r"<noscript>(.*?)</noscript>", text, re.S)[1]
    assert fallback.count("<tr>") == 1 + len(Board.from_runs([plain_run]).table().rows)
    assert html.escape("failed: returned NaN for 3 queries") in fallback


def test_an_empty_run_has_a_page(make_run):
    assert page_of(make_run("r", {})).data["tables"] == []


def test_the_command_writes_beside_the_run(plain_run):
    done = CliRunner().invoke(command, [str(plain_run)])
    assert done.exit_code == 0, done.output
    path = plain_run / "report.html"
    assert done.stdout.strip() == str(path)
    assert path.read_text().startswith("<!doctype html>")
    again = path.read_bytes()
    CliRunner().invoke(command, [str(plain_run)])
    assert path.read_bytes() == again
