"""`board check` recomputes, and measures again; the site shows every result."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from tdabench.benchmark import Stored
from tdabench.cli import main
from tdabench.errors import UsageError
from tdabench.io import sha256_file, write_arrays, write_json
from tdabench.registry import registry
from tdabench.results.check import check_results, compared, measure_again
from tdabench.results.layout import HEAD, identity, read_results
from tdabench.results.site import build_site, render
from tdabench.run.record import Record
from tdabench.run.sources import load_suite
from tdabench.truth.store import Truth


def forge(folder: Path, change) -> Path:
    """Changes the first record of a submission and makes every hash fit again."""
    head = json.loads((folder / HEAD).read_text())
    (key, of), *_ = head["cells"].items()
    path = folder / f"{key}.json"
    data = json.loads(path.read_text())
    change(data)
    record = Record(data, path)
    write_json(path, dict(record.signed(record.arrays_hash())))
    of["record"] = sha256_file(path)
    head["id"] = identity(head)
    write_json(folder / HEAD, head)
    return folder.rename(folder.with_name(head["id"]))


def test_a_forged_value_with_fitting_hashes_is_found_by_recomputing(repository, capsys):
    truth = repository.parent / "run" / "truth.safetensors"
    command = ["board", "check", str(repository), "--truth", str(truth)]
    assert main(command) == 0
    assert "3 results agree, 0 do not." in capsys.readouterr().out
    found = {s.method["name"]: s for s in read_results(repository).submissions}

    def better(data):
        data["metrics"]["lds"]["value"] = 0.99
        data["metrics"]["lds"]["high"] = 1.0

    folder = forge(found["bm25"].folder, better)
    assert len(read_results(repository).submissions) == 4  # the layout alone cannot tell
    assert main(command) == 1
    out = capsys.readouterr().out
    assert f"differs: results/trial/instruct/bm25-v1/{folder.name}: bm25" in out
    assert "lds is 0.99 in the record" in out
    assert "2 results agree, 1 do not." in out
    assert main([*command, "--json"]) == 1
    states = [f["status"] for f in json.loads(capsys.readouterr().out)]
    assert sorted(states) == ["agrees", "agrees", "differs"]


def test_without_the_truth_nothing_is_claimed(repository, capsys):
    command = ["board", "check", str(repository)]
    assert main(command) == 0
    assert "0 results agree, 0 do not, 3 lack their truth here." in capsys.readouterr().out
    assert main([*command, "--strict"]) == 1
    (repository / "tdabench-results.json").write_text('{"layout": 99}')
    assert main(command) == 2
    assert main(["board", "check", str(repository.parent)]) == 2
    assert "tdabench new results" in capsys.readouterr().err


def test_values_measured_again_agree_within_the_interval():
    def record(value, low=None, high=None):
        metric = {"value": value, "low": low, "high": high}
        return Record({"status": "ok", "primary": "lds", "metrics": {"lds": metric}})

    def status(claimed, again):
        return compared("p", "n", claimed, again).status

    assert status(record(0.3, 0.25, 0.35), record(0.305)) == "again"
    assert status(record(0.3, 0.25, 0.35), record(0.32)) == "differs"
    assert status(record(0.3), record(0.3005)) == "again"
    assert status(record(0.3), record(0.31)) == "differs"
    assert status(record(0.3), record(None)) == "unchecked"


@pytest.mark.slow
def test_a_random_sample_is_measured_again(tmp_path, capsys):
    """A real run of the embedded suite: submitted, checked, forged, and found out."""
    run, to = tmp_path / "run", tmp_path / "results"
    methods = "response-tfidf,length"
    assert main(["run", "--methods", methods, "--benchmarks", "lds", "--out", str(run)]) == 0
    assert main(["submit", str(run), "--to", str(to)]) == 0
    text = b"".join(p.read_bytes() for p in to.rglob("*") if p.is_file())
    assert str(tmp_path).encode() not in text
    capsys.readouterr()
    assert main(["board", "check", str(to), "--remeasure", "2"]) == 0
    assert "2 results agree, 0 do not, 2 measured again and agree." in capsys.readouterr().out
    found = read_results(to)
    (s,) = (s for s in found.submissions if s.method["name"] == "length")
    arrays, meta = s.records[0].arrays()
    # Scores that were made up, with metrics that follow from them: only measuring again can tell.
    files = load_suite("pocket").main_targets[0].truths

    def truth(kind: str) -> Truth:
        return Truth.load(files[kind])

    made_up = truth("lds").for_queries(meta["query_ids"]).values.astype(np.float32)
    benchmark = registry().benchmark("lds").cls.from_params(s.records[0].benchmark["params"])
    fake = {**arrays, "group_scores": made_up}
    fake.pop("example_scores", None)  # their pooled sums would give the forgery away
    stored = Stored(fake, tuple(meta["query_ids"]), truth, lambda label, kind: truth(kind))
    outcome = benchmark.recompute(stored)
    fake |= {
        "per_query": outcome.per_query, "replicates": outcome.replicates, **outcome.arrays
    }  # fmt: skip
    write_arrays(s.records[0].arrays_path, fake, meta)
    head = json.loads((s.folder / HEAD).read_text())
    key = s.records[0].key
    head["cells"][key]["arrays"] = sha256_file(s.records[0].arrays_path)
    write_json(s.folder / HEAD, head)

    def claim(data):
        data["metrics"] = {k: v.as_dict() for k, v in outcome.metrics.items()}

    forge(s.folder, claim)
    forged = read_results(to)
    findings = check_results(forged)
    assert [f.status for f in findings if "length" in f.place] == ["agrees"]
    (s,) = (s for s in forged.submissions if s.method["name"] == "length")
    again = measure_again(s, s.records[0])
    assert again.status == "differs"
    assert "submitted 1.0" in again.reason or "submitted 0.9" in again.reason


# --------------------------------------------------------------------------- the site


def data_of(page: str) -> dict:
    return json.loads(page.partition('id="data">')[2].partition("</script>")[0])


def test_the_page_has_boards_cards_history_machines_and_refusals(repository, make_run, submit_run):
    def newer(record):
        record["method"]["version"] = 2
        record["started"] = "2026-02-01T00:00:00Z"
        record["hardware"] = {**record["hardware"], "cpu": "Testor 10"}

    submit_run(make_run("new", {"airrep": 0.9, "trak": 0.8}, change=newer), repository, by="B.")
    bad = next(s for s in read_results(repository).submissions if s.method["name"] == "logra")
    (bad.folder / HEAD).write_text("{}")
    page = render(read_results(repository), "My board", cache=False)
    data = data_of(page)
    (table,) = data["tables"]
    assert (table["suite"], table["target"]) == ("trial 1", "instruct")
    rows = {r["label"]: r for r in table["rows"]}
    assert set(rows) == {"airrep", "bm25", "demo", "trak"}
    assert rows["airrep"]["version"] == 2  # the newest version is on the board …
    assert [h[1] for h in data["history"] if h[0] == "airrep"] == [2, 1]  # … and all in the history
    assert rows["bm25"]["by"] == "A. Author"
    assert data["machines"][rows["airrep"]["machine"]].startswith("Testor 10")
    assert rows["demo"]["cells"]["lds"]["status"] == "oom"
    assert rows["airrep"]["cells"]["lds"]["rank"]
    card = data["methods"]["airrep"]
    assert card["source"] == "arXiv 2505.18513"
    assert card["versions"] == [1, 2]
    assert card["params"]["airrep"] == {"rank": 16}
    assert card["costs"][0]["retrainings"] == 4800
    assert [place for place, _ in data["refused"]] == [bad.place]
    assert sorted(n for _, _, n in data["who"]) == [2, 3]
    assert "default-src 'none'" in page.replace("&#x27;", "'")
    assert "http" not in page.replace("http-equiv", "").replace("www.w3.org", "")


def test_building_writes_only_its_own_files(repository, tmp_path, capsys):
    out = tmp_path / "site"
    assert main(["board", "build", str(repository), "--out", str(out)]) == 0
    assert main(["board", "build", str(repository), "--out", str(out)]) == 0  # again: its own
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == str(out / "index.html")
    assert "4 submissions" in captured.err
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert {r["label"] for r in rows} == {"airrep", "logra", "bm25", "demo"}
    assert json.loads((out / "results.json").read_text())[0]["suite"] == "trial"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("my page")
    with pytest.raises(UsageError, match="not of a site"):
        build_site(read_results(repository), tmp_path / "mine")
    assert (tmp_path / "mine" / "index.html").read_text() == "my page"


def test_an_empty_repository_has_a_page(tmp_path, capsys):
    assert main(["new", "results", "mine", "--folder", str(tmp_path / "r")]) == 0
    assert main(["board", "build", str(tmp_path / "r"), "--out", str(tmp_path / "site")]) == 0
    assert data_of((tmp_path / "site" / "index.html").read_text())["tables"] == []
    assert main(["board", "check", str(tmp_path / "r")]) == 0
