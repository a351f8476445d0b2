"""`tdabench report --words`: words that carry scores, from the indices of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tdabench.cli import main
from tdabench.data.examples import Example
from tdabench.io import read_json, write_json
from tdabench.report.records import read_run
from tdabench.report.words import shares, words_of_run


def test_shares_are_of_the_highest_word_and_by_side():
    e = Example("e", "a bird", "the grey heron")
    found = shares(e, np.array([1.0, -2.0, 0.0, 4.0, 2.0]))
    assert found == {"prompt": [0.25, 0.0], "response": [0.0, 1.0, 0.5]}
    assert shares(e, -np.ones(5)) == {"prompt": [0.0] * 2, "response": [0.0] * 3}
    assert shares(Example("n", "", ""), np.empty(0)) == {"prompt": [], "response": []}


def data_of(page: Path) -> dict:
    found = re.search(r'id="data"[^>]*>(.*?)</script>', page.read_text(), re.S)
    assert found
    return json.loads(found.group(1))


def test_a_report_shades_words_of_queries_and_examples(toy_suite, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TDABENCH_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    asked = ["--suite", str(toy_suite), "--methods", "bm25,random", "--jobs", "1"]
    assert main(["run", *asked, "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["report", str(out), "--words", "2"]) == 0
    said = capsys.readouterr().err
    assert "building its index" not in said  # that of the run
    data = data_of(out / "report.html")
    for table in data["tables"]:
        tops = {t["method"]: t["words"] for t in table["explorer"]["tops"]}
        assert tops["random"] == {}  # this method cannot tell
        assert len(tops["bm25"]) == 2
        for place, of in tops["bm25"].items():
            e = data["queries"][table["explorer"]["queries"][int(place)]]
            assert len(of["query"]["prompt"]) == len(e["prompt"].split())
            assert len(of["query"]["response"]) == len(e["response"].split())
            assert max(of["query"]["prompt"] + of["query"]["response"]) == 1
            assert 1 <= len(of["examples"]) <= 3
            for i, found in of["examples"].items():
                assert len(found["prompt"]) == len(data["train"][int(i)]["prompt"].split())
    assert main(["report", str(out)]) == 0
    tops = data_of(out / "report.html")["tables"][0]["explorer"]["tops"]
    assert all(t["words"] == {} for t in tops)
    # Nothing of a run that came from elsewhere, or was changed, is opened.
    write_json(out / "manifest.json", {**read_json(out / "manifest.json"), "run": "theirs"})
    found, notes = words_of_run(read_run(out), 2)
    assert found == {}
    assert notes == ["theirs: words are shaded only for runs made here"]


@pytest.mark.parametrize("n", ["-1", "x"])
def test_a_number_of_queries_is_asked_for(n, capsys):
    assert main(["report", "--words", n]) == 2
    assert "--words" in capsys.readouterr().err
