"""The tables of results in the documentation are what records say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def script() -> Any:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(label: str, lds: float, status: str = "ok", started: str = "1", **method: Any) -> dict:
    metrics = {
        "lds": {"value": lds, "low": lds - 0.1, "high": lds + 0.1},
        "ceiling": {"value": 0.8},
        "share_of_ceiling": {"value": lds / 0.8},
    }
    return {
        "benchmark": {"name": "lds"},
        "target": {"label": "tiny"},
        "method": {"label": label, "tuned": {}, "passed": {}, **method},
        "status": status,
        "started": started,
        "metrics": metrics if status == "ok" else {},
        "cost": {
            "build": {"seconds": 9.0, "cpu_seconds": 1.5},
            "query": {"seconds": 9.0, "cpu_seconds": 0.2, "queries": 100},
            "bytes_per_example": 1024.0,
        },
    }


def test_rows_are_ordered_and_what_has_no_result_is_named(tmp_path: Path) -> None:
    cells = tmp_path / "cells"
    cells.mkdir()
    made = [
        record("low", 0.1),
        record("high", 0.4, tuned={"temperature": 330.0}),
        record("low", 0.2, started="2"),  # the later one counts
        record("low", 0.9, "failed", started="3"),  # a failure does not undo a result
        record("broken", 0.0, "failed"),
        record("asked", 0.9, passed={"rank": 8}),  # not the suite's settings
    ]
    for i, r in enumerate(made):
        (cells / f"{i}.json").write_text(json.dumps(r))
    module = script()
    text = module.fidelity(module.records([tmp_path], "lds"))
    rows = [line for line in text if line.startswith("| `")]
    high = "| `high` | temperature=330 | 0.400 [0.300, 0.500] |  |  | 50% | 1.5 s | 2 ms | 1,024 |"
    assert rows[0] == high
    assert rows[1].startswith("| `low` | defaults | 0.200 [0.100, 0.300] |  |  | 25% |")
    assert len(rows) == 2
    assert "Without a result in these runs: `broken` (failed)." in text


def test_pages_of_families_sizes_and_other_targets() -> None:
    module = script()

    def of(label: str, target: str, lds: float, **more: Any) -> dict:
        r = record(label, lds, family="text", **more)
        r["target"] = {"label": target}
        r["metrics"] |= {
            "lds[lds-10]": {"value": lds + 0.1, "low": None, "high": None},
            "transfer": {"value": lds, "low": 0.0, "high": 1.0},
            "lds[source]": {"value": lds}, "lds[other]": {"value": lds - 0.05},
            "truth[other]": {"value": 0.42}, "agnostic[other]": {"value": 0.65},
        }  # fmt: skip
        return r

    found = {
        ("instruct", "a"): of("a", "instruct", 0.2, tuned={"n": [1, 2]}),
        ("instruct", "b"): of("b", "instruct", 0.3),
        ("other", "a"): of("a", "other", 0.1),
    }
    text = module.family("text")(found)
    assert text[0] == "| method | settings | instruct | other |"
    assert text[2] == "| `b` | defaults (instruct) | 0.300 [0.200, 0.400] |  |"
    assert text[3].startswith("| `a` | n=[1, 2] (instruct) | 0.200 [0.100, 0.300] | 0.100 ")
    assert module.family("control")(found) == []
    sizes = module.group_sizes(found)
    assert sizes[0] == "Target `instruct`:"
    assert sizes[2] == "| method | a tenth (200) | a quarter (500) |"
    assert sizes[5] == "| `b` | 0.400 | 0.300 [0.200, 0.400] |"
    for r in found.values():
        del r["metrics"]["lds[lds-10]"]  # which a record of transfer does not have
    moved = module.transfer(found)
    assert moved[0] == "| method | transfer [95%] | instruct | other |"
    assert moved[2] == "| `b` | 0.300 [0.000, 1.000] | 0.300 | 0.250 |"
    assert moved[-2] == "| others' truths |  |  | 0.420 |"
    assert moved[-1] == "| knowing no model |  |  | 0.650 |"


def test_the_figure_shows_every_method_at_its_whole_cost(tmp_path: Path) -> None:
    from tdabench.report import figures, plots

    module = script()
    cells = tmp_path / "cells"
    cells.mkdir()
    made = [
        record("costly", 0.5, family="learned") | {"target": {"label": "instruct"}},
        record("cheap", 0.3, family="text") | {"target": {"label": "instruct"}},
        record("elsewhere", 0.6, family="text"),  # of another target
    ]
    made[0]["cost"]["prepare"] = {"seconds": 300.0}
    made[0]["metrics"]["additive_ceiling"] = {"value": 0.7}
    for i, r in enumerate(made):
        (cells / f"{i}.json").write_text(json.dumps(r))
    text = (module.cost_figure([tmp_path]) or b"").decode()
    for label in (
        "costly",
        "cheap",
        "noise ceiling",
        "additive ceiling",
        "100 queries",
        "instruct",
    ):
        assert label in text, label
    assert "elsewhere" not in text
    assert module.cost_figure([tmp_path]) == text.encode()  # the same records, the same file
    seen: list[figures.Point] = []
    real = plots.scatter

    def spy(points: Any, *rest: Any) -> Any:
        seen.extend(points)
        return real(points, *rest)

    plots.scatter = spy
    try:
        module.cost_figure([tmp_path])
    finally:
        plots.scatter = real
    assert {p.label: (p.x, p.y, p.front) for p in seen} == {
        "costly": (301.7, 0.5, True), "cheap": (1.7, 0.3, True)
    }  # fmt: skip
    assert module.cost_figure([tmp_path / "nothing"]) is None


def test_removals_have_a_table_per_target() -> None:
    module = script()
    found = {}
    for target, value in (("other", 0.1), ("instruct", 0.3), ("smooth", 0.2)):
        of = {"target": {"label": target}, "metrics": {"loo": {"value": value}}}
        found[target, "a"] = record("a", 0.1) | of
    text = module.loo(found)
    assert [x for x in text if x.startswith("#")] == ["### smooth", "### instruct", "### other"]
    assert "| `a` | 0.300 |  |  |  |" in text


def test_removals_are_compared_where_they_were_asked_alike() -> None:
    module = script()
    found = {}
    for name, n, matched in (("few", 5, 0), ("many", 50, 1), ("more", 50, 1)):
        metrics = {
            k: {"value": 0.25, "low": 0.1, "high": 0.5}
            for k in ("removal", "rise@5", "rise@20", "rise_matched@5", "rise_matched@20")
        }
        asked = {"name": "removal", "params": {"n": n, "matched": matched}}
        of = {"target": {"label": "smooth"}, "metrics": metrics, "benchmark": asked}
        found["smooth", name] = record(name, 0.1) | of
    lines = [x for x in module.removal(found) if x.startswith("| `")]
    assert [x.split("`")[1] for x in lines] == ["many", "more"]
    assert lines[0].endswith("| 0.25 [0.10, 0.50] | 0.25 [0.10, 0.50] | +0.25 | +0.25 |")


def test_factbook_has_a_board_per_target_and_says_how_far_they_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script()
    cells, page = tmp_path / "cells", tmp_path / "methods" / "fidelity.md"
    cells.mkdir()
    page.parent.mkdir()
    page.write_text("### instruct (noise ceiling 0.9)\n\n" + "".join(
        f"| `{m}` | defaults | {v} [0, 1] |\n" for m, v in (("a", 0.2), ("b", 0.4), ("c", 0.6))
    ))  # fmt: skip
    monkeypatch.setattr(module, "DOCS", tmp_path)

    def keep(target: str, benchmark: str, label: str, **values: float) -> None:
        r = record(label, values.get("lds", 0.0))
        metrics = {k: {"value": v, "low": None, "high": None} for k, v in values.items()}
        if benchmark == "lds":
            metrics |= {"lds_beyond": {"value": 0.05}, **r["metrics"]}
        r |= {"benchmark": {"name": benchmark}, "target": {"label": target}, "metrics": metrics}
        r |= {"suite": {"name": "factbook"}}
        (cells / f"{target}-{benchmark}-{label}.json").write_text(json.dumps(r))

    assert module.factbook([tmp_path]) == []
    keep("small", "lds", "a", lds=0.3)
    assert list(module.records([tmp_path], "lds", "factbook")) == [("small", "a")]
    assert module.records([tmp_path], "lds") == {}  # those of pocket's pages
    for label, lds in (("a", 0.3), ("b", 0.5), ("c", 0.1)):
        keep("small", "lds", label, lds=lds)
    keep("small", "classification", "a", accuracy=1.0, accuracy_source=0.25)
    keep("small", "sources", "a", sources=0.125)
    text = module.factbook([tmp_path])
    assert text[0].startswith("| method | LDS [95%] | rank | of ceiling | beyond | kind first |")
    assert "QLD" not in text[0]  # which is in no record
    assert text[2].startswith("| `b` | 0.500 [0.400, 0.600] |  | 62% | 0.05 |  |")
    assert "| 37% | 0.05 | 1.00 | 0.25 | 0.12 | 1.5 s | 2 ms |" in text[3]
    assert text[-1].startswith("Over the 3 methods that are on both boards")
    assert text[-1].endswith("correlation of -0.50.")
    for label, lds in (("a", 0.5), ("b", 0.3), ("c", 0.1)):
        keep("smollm2", "lds", label, lds=lds)
    keep("smollm2", "classification", "a", accuracy=0.5)
    text = module.factbook([tmp_path])
    assert text.index("### SmolLM2-135M") > text.index(
        "| `c` | 0.100 [0.000, 0.200] |  | 12% | 0.05 |  |  |  | 1.5 s | 2 ms |"
    )
    real = text[text.index("### SmolLM2-135M") :]
    assert "without a country" not in real[2]
    assert real[4].startswith("| `a` | 0.500 [0.400, 0.600] |  | 62% | 0.05 | 0.50 |")
    assert text[-1].endswith("LDS here and on `small` have a Spearman correlation of 0.50.")


def test_every_page_has_its_marks_and_another_page_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script()
    mark = "<!-- results: generated by docs/tables.py -->\n"
    for name, _, _ in module.PAGES:
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert text.count(mark) == text.count("<!-- end of results -->") == 1, name
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"before\n{mark}old\n<!-- end of results -->\nafter\n")
    cells = tmp_path / "run" / "cells"
    cells.mkdir(parents=True)
    for i, value in enumerate((0.1, 0.3, 0.2)):
        r = record(f"m{i}", 0.1) | {"benchmark": {"name": "loo"}, "target": {"label": "instruct"}}
        r["metrics"] = {"loo": {"value": value, "low": 0.0, "high": 1.0}}
        (cells / f"{i}.json").write_text(json.dumps(r))
    monkeypatch.setattr(module, "DOCS", tmp_path)
    monkeypatch.setattr(module, "README", tmp_path / "README.md")
    monkeypatch.setattr("sys.argv", ["tables.py", str(tmp_path / "run")])
    module.main()
    got = (tmp_path / "benchmarks" / "loo.md").read_text()
    assert got == (
        f"before\n{mark}"
        "| method | loo [95%] |  | method | loo [95%] |\n|---|---|---|---|---|\n"
        "| `m1` | 0.300 [0.000, 1.000] |  | `m0` | 0.100 [0.000, 1.000] |\n"
        "| `m2` | 0.200 [0.000, 1.000] |  |  |  |\n"
        "<!-- end of results -->\nafter\n"
    )
    assert "old" in (tmp_path / "benchmarks" / "removal.md").read_text()
    monkeypatch.setattr("sys.argv", ["tables.py", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="no records"):
        module.main()


def test_differences_are_paired_and_a_pair_without_both_methods_is_left_out(
    tmp_path: Path,
) -> None:
    import numpy as np

    from tdabench.io import write_arrays

    module = script()
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, 400)
    found = {}
    for label, value in (("kfac", 0.4), ("ekfac", 0.35), ("logra", 0.2)):
        path = tmp_path / f"{label}.json"
        own = value + noise + rng.normal(0, 0.001, 400)
        arrays = {"per_query": np.full(30, value), "replicates": own, "replicates_groups": own}
        write_arrays(path.with_suffix(".safetensors"), arrays, {})
        found["smooth", label] = record(label, value) | {"path": path}
        found["smooth", label]["target"] = {"label": "smooth"}
    text = module.contrasts(found)
    assert text[0] == "| methods | smooth: difference [95%], p |"
    rows = dict(x.strip("| ").split(" | ") for x in text[2:])
    assert list(rows) == ["`kfac` - `ekfac`", "`ekfac` - `logra`"]  # no row without ngram
    assert rows["`kfac` - `ekfac`"].startswith("+0.050 [+0.04")
    assert rows["`kfac` - `ekfac`"].endswith("], < 0.001")
    assert module.contrasts({}) == []
