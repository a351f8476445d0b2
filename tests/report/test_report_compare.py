"""Comparing two methods or two runs: effect, interval, verdict, exit code."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from tdabench import stats
from tdabench.benchmarks.cost import crossover_interval
from tdabench.cli.compare import command
from tdabench.errors import DataError, UsageError
from tdabench.report.compare import compare, print_comparison, times
from tdabench.report.records import read_run


def said(found, width=200):
    out = io.StringIO()
    print_comparison(found, Console(file=out, width=width))
    return out.getvalue()


def boot(folder, label, benchmark="lds"):
    r = next(
        r for r in read_run(folder).records if (r.label, r.benchmark_name) == (label, benchmark)
    )
    arrays, _ = r.arrays()
    value = r.metrics[benchmark]["value"]
    return stats.Bootstrap.of_record(value, arrays["per_query"], arrays)


def test_the_effect_is_that_of_the_statistics_module(plain_run):
    (d,) = compare("bm25", "logra", [plain_run], benchmark="lds")
    expected = stats.compare(boot(plain_run, "logra"), boot(plain_run, "bm25"))
    assert (d.effect, d.low, d.high, d.p) == (
        expected.effect,
        expected.low,
        expected.high,
        expected.p,
    )
    assert d.verdict == "better"
    assert "logra is better than bm25 on LDS by" in said([d])


def test_the_other_way_round_is_a_regression(plain_run):
    (d,) = compare("logra", "bm25", [plain_run], benchmark="lds")
    assert (d.verdict, d.regressed) == ("worse", True)
    assert d.effect < 0


def test_equal_methods_are_not_told_apart(plain_run):
    (d,) = compare("logra", "ekfac", [plain_run], benchmark="lds")
    assert d.verdict == "tied"
    assert not d.regressed
    assert "do not differ significantly on LDS (95% interval" in said([d])


def test_a_method_against_itself_has_no_effect(plain_run):
    for d in compare("logra", "logra", [plain_run]):
        assert (d.effect, d.verdict) == (0.0, "tied")


def test_p_values_of_several_benchmarks_are_adjusted_together(plain_run):
    alone = [compare("bm25", "airrep", [plain_run], b)[0].p for b in ("lds", "transfer")]
    together = {d.benchmark: d.p for d in compare("bm25", "airrep", [plain_run])}
    third = compare("bm25", "airrep", [plain_run], "selection")[0].p
    adjusted = stats.holm([*alone, third])
    assert together["LDS"] == pytest.approx(adjusted[0])
    assert together["transfer"] == pytest.approx(adjusted[1])


def test_less_is_better_turns_the_verdict(make_run):
    def lower(record):
        for m in record["metrics"].values():
            m["higher_is_better"] = False

    folder = make_run("r", {"a": 3.0, "b": 0.0}, benchmarks=("transfer",), change=lower)
    (d,) = compare("a", "b", [folder])
    assert d.effect < 0
    assert d.verdict == "better"


def test_two_runs_are_compared_method_by_method(make_run):
    before = make_run("before", {"x": 1.5, "y": 0.3}, benchmarks=("lds",))
    after = make_run("after", {"x": 0.5, "y": 0.3}, benchmarks=("lds",))
    found = {d.a: d for d in compare(str(before), str(after))}
    assert found["x (before)"].verdict == "worse"
    assert found["y (before)"].verdict == "tied"
    assert found["y (before)"].b == "y (after)"


def test_a_result_that_is_lost_is_a_regression(make_run):
    before = make_run("before", {"x": 1.5}, benchmarks=("lds",))
    after = make_run("after", {}, benchmarks=("lds",), failed={"x": ("oom", "needed 9 GiB")})
    (d,) = compare(str(before), str(after))
    assert (d.verdict, d.regressed) == ("lost", True)
    assert "needed 9 GiB" in said([d])


def test_without_replicates_nothing_is_claimed(plain_run):
    for r in read_run(plain_run).records:
        if r.label == "airrep":
            r.arrays_path.unlink()
    (d,) = compare("bm25", "airrep", [plain_run], "lds")
    assert (d.verdict, d.p) == ("untested", None)
    assert not d.regressed
    assert "not tested" in said([d])


def test_unpaired_replicates_are_not_compared(plain_run, put_cell):
    r = next(
        r for r in read_run(plain_run).records if (r.label, r.benchmark_name) == ("bm25", "lds")
    )
    arrays, meta = r.arrays()
    short = {k: v[:50] if k.startswith("replicates") else v for k, v in arrays.items()}
    put_cell(plain_run, r.data, {k: np.ascontiguousarray(v) for k, v in short.items()}, meta)
    (d,) = compare("bm25", "airrep", [plain_run], "lds")
    assert d.verdict == "untested"
    assert "not paired" in d.reason


def test_cells_measured_otherwise_are_refused(make_run):
    def other(record):
        record["truth"] = "8888"

    before = make_run("before", {"x": 1.5}, benchmarks=("lds",))
    after = make_run("after", {"x": 1.5}, benchmarks=("lds",), change=other)
    with pytest.raises(DataError, match="measured differently"):
        compare(str(before), str(after))


def test_unknown_names(plain_run):
    with pytest.raises(UsageError, match="Did you mean 'airrep'"):
        compare("airep", "bm25", [plain_run])
    with pytest.raises(UsageError, match="unknown benchmark 'ldz'"):
        compare("airrep", "bm25", [plain_run], "ldz")
    with pytest.raises(DataError, match="demo has no result on lds"):
        compare("demo", "bm25", [plain_run], "lds")


def test_machines_are_named_when_times_cannot_be_compared(make_run):
    def other(record):
        record["hardware"] = {"cpu": "Other", "cores": 64}

    before = make_run("before", {"x": 1.5}, benchmarks=("lds",))
    after = make_run("after", {"x": 1.5}, benchmarks=("lds",), change=other)
    assert "times come from two machines" in said(compare(str(before), str(after)))
    assert "two machines" not in said(compare(str(before), str(before)))


def test_the_command_and_its_exit_code(plain_run):
    run = CliRunner().invoke
    worse = ["airrep", "bm25", "--run", str(plain_run)]
    assert run(command, worse).exit_code == 0
    assert run(command, [*worse, "--fail-on", "regression"]).exit_code == 1
    better = ["bm25", "airrep", "--run", str(plain_run), "--fail-on", "regression"]
    assert run(command, better).exit_code == 0
    rows = json.loads(run(command, [*worse, "--json"]).stdout)
    assert [r["regressed"] for r in rows if r["benchmark"] == "LDS"] == [True]


def test_cost_says_from_which_size_on_a_method_is_cheaper(make_run):
    """airrep prepares for 2,460 s (see conftest) and adds 1 ms an example, logra 4 ms."""
    per_example = {"airrep": 0.001, "logra": 0.004, "ekfac": 0.005}

    def change(record):
        slope = per_example[record["method"]["name"]]
        record["metrics"]["cost"]["value"] = 1 / slope
        for n, label in ((1e6, "1e6"), (1e9, "1e9")):
            record["metrics"][f"build_at_{label}"] = {"value": 2.0 + slope * n}

    folder = make_run(
        "priced", dict.fromkeys(per_example, 1.0), benchmarks=("cost",), change=change
    )
    (d,) = compare("logra", "airrep", [folder])
    assert d.crossover == (
        "For preparation and build together, airrep costs less than logra from 820,000 examples "
        "(extrapolated; for an interval, measure with --seed 0 --seed 1 --seed 2)."
    )
    assert d.crossover in said([d])
    (d,) = compare("logra", "ekfac", [folder])
    assert "logra costs less than ekfac at any size" in d.crossover


def test_a_crossover_measured_more_than_once_has_an_interval(make_run):
    per_example = {"airrep": (0.0010, 0.0011, 0.0012), "logra": (0.0039, 0.0041, 0.0043)}

    def change(record):
        slope = per_example[record["method"]["name"]][record["seed"]]
        record["metrics"]["cost"]["value"] = 1 / slope
        for n, label in ((1e6, "1e6"), (1e9, "1e9")):
            record["metrics"][f"build_at_{label}"] = {"value": 2.0 + slope * n}

    folder = make_run(
        "priced",
        dict.fromkeys(per_example, 1.0),
        benchmarks=("cost",),
        change=change,
        seeds=dict.fromkeys(per_example, 3),
    )
    (d,) = compare("logra", "airrep", [folder])
    lines = {k: np.array([[2.0, s] for s in v]) for k, v in per_example.items()}
    lines["airrep"][:, 0] += 2460
    low, high = crossover_interval(lines["airrep"], lines["logra"])
    assert low < 2460 / 0.003 < high
    assert d.crossover == (
        "For preparation and build together, airrep costs less than logra from "
        f"{2460 / 0.003:,.0f} examples (95% interval {low:,.0f} to {high:,.0f}, over 3 and 3 "
        "measurements; extrapolated)."
    )


def test_ratios_of_times_have_no_exponent():
    assert [times(r) for r in (0.352, 2.13, 9.96, 168.4, 12345.6)] == [
        "0.35x", "2.1x", "10x", "168x", "12,346x",
    ]  # fmt: skip
