"""`tdabench timing`: tables and verdicts from saved reports."""

from __future__ import annotations

import json

import pytest

from tdabench.cli import main


@pytest.fixture
def report(tmp_path):
    def write(name, medians, cpu="Engine 9"):
        benchmarks = [{"extra_info": {}, "stats": {"median": 1.0}}]  # somebody else's
        for (method, n, phase), (median, spread) in medians.items():
            info = {"method": method, "n_train": n, "n_queries": 50, "phase": phase}
            if phase == "build":
                info |= {"bytes_per_example": 2048.0, "peak_bytes": 3 << 20}
            q1, q3 = median - spread, median + spread
            stats = {"median": median, "q1": q1, "q3": q3, "rounds": 5}
            benchmarks.append({"extra_info": info, "stats": stats})
        path = tmp_path / name
        machine = {"cpu": {"brand_raw": cpu}}
        path.write_text(json.dumps({"machine_info": machine, "benchmarks": benchmarks}))
        return str(path)

    return write


BEFORE = {
    ("trak", 200, "build"): (2.0, 0.1),
    ("trak", 200, "query"): (0.010, 0.001),
    ("tfidf", 200, "build"): (0.0005, 0.0001),
}


def test_one_report(report, capsys):
    assert main(["timing", report("a.json", BEFORE)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ("trak 200 build 2 s 1.9 s – 2.1 s 100 ex 2,048 3.0 MiB".split())
    assert "5,000 q" in lines[2]
    assert "500 µs" in lines[3]
    assert "400,000 ex" in lines[3]


def test_verdicts(report, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # paths of temporary folders are long
    after = {
        ("trak", 200, "build"): (2.6, 0.1),  # clearly slower
        ("trak", 200, "query"): (0.012, 0.002),  # within the noise
        ("tfidf", 200, "build"): (0.0003, 0.00005),  # clearly faster
        ("new", 200, "build"): (1.0, 0.1),
    }
    files = [report("a.json", BEFORE), report("b.json", after)]
    assert main(["timing", *files, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    verdicts = {(r["method"], r["phase"]): r["verdict"] for r in rows if "verdict" in r}
    assert verdicts == {
        ("trak", "build"): "slower",
        ("trak", "query"): "same",
        ("tfidf", "build"): "faster",
    }
    assert main(["timing", *files]) == 0
    assert "1.30x slower" in capsys.readouterr().out
    assert main(["timing", *files, "--fail-above", "20"]) == 1
    assert main(["timing", *files, "--fail-above", "50"]) == 0
    assert main(["timing", *files, "--fail-above", "20", "--phase", "query"]) == 0
    assert main(["timing", *reversed(files), "--fail-above", "20", "--phase", "query"]) == 0


def test_other_machines_are_pointed_out(report, capsys):
    main(["timing", report("a.json", BEFORE), report("b.json", BEFORE, cpu="Engine 10")])
    assert "different machines: Engine 10, Engine 9" in capsys.readouterr().err


def test_files_that_are_no_reports(report, tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "y.json").write_text("not json")
    for file, said in (
        (str(tmp_path / "x.json"), "is not a pytest-benchmark report"),
        (str(tmp_path / "y.json"), "is not valid JSON"),
        (str(tmp_path / "z.json"), "is missing"),
        (report("e.json", {}), "contain no timed calls"),
    ):
        assert main(["timing", file]) == 2
        assert said in capsys.readouterr().err
    assert main(["timing"]) == 2
