"""`tdabench.load_results`: a public interface, which its page describes exactly."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import tdabench
from tdabench.cli import main
from tdabench.errors import DataError, MissingExtra, UsageError
from tdabench.results.table import COLUMNS, ResultTable

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_a_repository_and_a_run_give_the_same_results(repository):
    there = tdabench.load_results(repository)
    here = tdabench.load_results(repository.parent / "run")
    assert len(there) == len(here) == 4
    assert {r["label"]: r["value"] for r in there} == {r["label"]: r["value"] for r in here}
    (row,) = there.select(label="airrep")
    assert row["low"] < row["value"] < row["high"]
    assert row["by"] == "A. Author"
    assert list(row) == list(COLUMNS) == list(there.columns)
    (failed,) = there.select(status=["oom", "failed"])
    assert failed["value"] is None
    assert there.problems == ()
    values = there.per_query(row)
    assert len(values) == 40
    assert there.metrics(row)["lds"]["value"] == row["value"]
    with pytest.raises(DataError, match="demo on lds is oom"):
        there.per_query(failed)
    with pytest.raises(UsageError, match="not of this table"):
        there.per_query(dict(row))
    with pytest.raises(UsageError, match="unknown column 'bench'"):
        there.select(bench="lds")
    assert len(there[1:3]) == 2
    assert there[1:3].per_query(there[0]) == there.per_query(there[0])
    (next((repository / "results").rglob("submission.json"))).write_text("")
    assert len(tdabench.load_results(repository).problems) == 1


def test_data_frames(repository):
    pandas = pytest.importorskip("pandas")
    table = tdabench.load_results(repository)
    frame = table.to_dataframe()
    assert list(frame.columns) == list(COLUMNS)
    assert (
        frame.set_index("label").loc["airrep", "value"] == table.select(label="airrep")[0]["value"]
    )
    long = table.to_dataframe(per_query=True)
    assert isinstance(long, pandas.DataFrame)
    assert len(long) == 3 * 40
    means = long.groupby("label")["query_value"].mean()
    assert means["airrep"] == pytest.approx(table.select(label="airrep")[0]["value"], abs=1e-6)


def test_without_pandas_it_says_how_to_get_it(repository, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match="pip install pandas"):
        tdabench.load_results(repository).to_dataframe()


def test_the_table_of_a_notebook_escapes_what_it_shows(make_run):
    run = make_run("run", {"<b>x</b>": 0.5})
    text = tdabench.load_results(run)._repr_html_()
    assert "<b>x" not in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text
    assert text.count("<tr>") == 2


def test_the_page_describes_exactly_what_is_public():
    text = PAGE.read_text()
    named = set(re.findall(r"^\| `(\w+)(?:\(.*\))?` \|", text, re.M))
    public = {n for n in vars(ResultTable) if not n.startswith("_")} - {"select_rows"}
    fields = {n for n in ResultTable.__dataclass_fields__ if not n.startswith("_")}
    assert named == public | fields | set(COLUMNS)
    for name in ("select", "metrics", "per_query", "record", "to_dataframe"):
        arguments = list(inspect.signature(getattr(ResultTable, name)).parameters)[1:]
        (row,) = re.findall(rf"^\| `{name}\((.*?)\)` \|", text, re.M)
        assert re.findall(r"\w+", row) == arguments, name
    assert tdabench.__all__ == ["load_results"]
    assert "tdabench.load_results(" in text


def test_importing_tdabench_stays_light():
    code = "import sys, tdabench; print(sorted({'numpy', 'torch', 'click'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tdabench.nothing  # noqa: B018


def test_nothing_there(tmp_path):
    with pytest.raises(UsageError, match="contains no results"):
        tdabench.load_results(tmp_path)


# --------------------------------------------------------------------------- citations and cards


def test_citations_of_a_suite_methods_and_benchmarks(capsys):
    assert main(["cite", "flan", "--methods", "trak,ekfac,length", "--benchmarks", "lds"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("@software{tdabench,")
    assert "{{TRAK: Attributing Model Behavior at Scale}}" in out
    assert "In tdabench: method trak, benchmark lds" in out
    assert "@misc{arxiv-2505-18513," in out  # the suite's paper
    assert out.count("@misc{") == len(set(re.findall(r"@misc\{([^,]+),", out))) == 4
    assert out.count("{") == out.count("}")
    assert main(["cite", "--methods", "nothing"]) == 2
    assert main(["cite", "--methods", "trak", "--format", "cff"]) == 0
    whole = yaml.safe_load(capsys.readouterr().out)
    assert whole["references"][0]["identifiers"][0]["value"] == "arXiv:2303.14186"


def test_citations_of_a_board(repository, capsys):
    assert main(["cite", "--from", str(repository)]) == 0
    out = capsys.readouterr().out
    assert "method airrep" in out
    assert "benchmark lds" in out


def test_cards_are_what_the_hub_reads(repository, capsys):
    from huggingface_hub import ModelCardData
    from huggingface_hub.repocard_data import model_index_to_eval_results

    options = ["cite", "--from", str(repository), "--methods", "airrep", "--url", "u.example/r"]
    assert main([*options, "--format", "model-index", "--model", "enc"]) == 0
    index = yaml.safe_load(capsys.readouterr().out)["model-index"]
    name, results = model_index_to_eval_results(index)
    value = tdabench.load_results(repository).select(label="airrep")[0]["value"]
    assert name == "enc"
    assert results[0].metric_value == pytest.approx(value, abs=1e-6)
    assert results[0].dataset_type == "tdabench/trial"
    assert "95% interval [" in results[0].metric_name
    assert ModelCardData(model_name=name, eval_results=results).to_yaml()
    assert main([*options, "--format", "eval-results"]) == 0
    entries = yaml.safe_load(capsys.readouterr().out)
    parser = pytest.importorskip("huggingface_hub._eval_results")
    (entry,) = parser.parse_eval_result_entries(entries)
    assert entry.dataset_id == "tdabench/trial"
    assert entry.value == pytest.approx(value, abs=1e-6)
    assert main(["cite", "--format", "model-index"]) == 2
    assert main([*options[:3], "--methods", "demo", "--format", "model-index"]) == 2


def test_badges(repository, tmp_path, capsys):
    run, out = repository.parent / "run", tmp_path / "b.svg"
    command = ["board", "badge", str(run), "--out", str(out), "--method"]
    assert main([*command, "airrep"]) == 0
    text = out.read_text()
    assert re.search(r"LDS on trial: 0\.\d\d \[0\.\d\d, 0\.\d\d\]", text)
    assert main([*command, "demo"]) == 1
    assert "oom" in out.read_text()
    out.write_text("mine")
    assert main([*command, "airrep"]) == 2
    assert out.read_text() == "mine"
    assert main([*command, "nothing"]) == 2
