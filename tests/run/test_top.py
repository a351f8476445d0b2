"""Every record keeps the examples that a method scores highest and lowest, for the explorer."""

from __future__ import annotations

import json
import re

from tdabench.io import read_arrays
from tdabench.report.board import Board
from tdabench.report.examples import Texts
from tdabench.report.html import Source, _stored_tops, render
from tdabench.run import Options, Request, run


def test_every_benchmark_keeps_them_for_the_queries_of_the_suite(toy_suite, toys, tmp_path):
    request = Request(
        str(toy_suite), ("toy", "length"), benchmarks=("cost", "classification", "lds")
    )
    result = run(request, tmp_path / "run", Options(jobs=1))
    found = {}
    for record in result.records:
        arrays, about = read_arrays(tmp_path / "run" / "cells" / f"{record['key']}.safetensors")
        assert len(about["top_query_ids"]) == len(arrays["top_index"]) > 0, record["reason"]
        found.setdefault(record["method"]["label"], []).append(arrays["top_index"].tolist())
    assert {k: len(v) for k, v in found.items()} == {"toy": 3, "length": 3}
    for label, of_cells in found.items():
        assert of_cells[0] == of_cells[1] == of_cells[2], label
    board = Board.from_runs([tmp_path / "run"])
    assert sorted(t.label for t in _stored_tops(board, board.tables[0])) == ["length", "toy"]


def test_the_explorer_has_them_without_any_value_per_query(toy_suite, toys, tmp_path):
    request = Request(str(toy_suite), ("toy", "length"), benchmarks=("cost",))
    run(request, tmp_path / "run", Options(jobs=1))
    board = Board.from_runs([tmp_path / "run"])
    page, _ = render(Source(board, [Texts()]))
    data = json.loads(
        re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S)[1]
    )
    (table,) = data["tables"]
    assert {t["method"] for t in table["explorer"]["tops"]} == {"toy", "length"}
    assert len(table["explorer"]["queries"]) > 0
