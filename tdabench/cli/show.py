"""`tdabench show`: prints one record in full."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tdabench.cli.common import (
    complete_from,
    complete_runs,
    emit_json,
    json_option,
    print_lines,
    print_table,
)
from tdabench.errors import DataError, UsageError, brief, clean, unknown

if TYPE_CHECKING:
    from tdabench.run.record import Record


def _labels() -> list[str]:
    from tdabench.report.records import find_runs

    return sorted({r["method"]["label"] for r in _records(find_runs()[0])})


@click.command(
    epilog="""\b
Examples:
  tdabench show trak                 the cells of a method in the newest run
  tdabench show 3f9c                 a cell, by a prefix of its key
  tdabench show demo --run runs/pocket --json
"""
)
@click.argument("name", required=False, shell_complete=complete_from(_labels))
@click.option(
    "--run",
    "folder",
    type=click.Path(path_type=Path),
    shell_complete=complete_runs,
    help="Run folder.  [default: the newest in runs/]",
)
@click.option("--target", help="Only this target.")
@click.option("--benchmark", help="Only this benchmark.")
@json_option
def command(
    name: str | None, folder: Path | None, target: str | None, benchmark: str | None, as_json: bool
) -> None:
    """Show one result, or one failure, in full: scores, cost, parameters, versions, log."""
    if folder is None:
        from tdabench.report.records import find_runs

        (folder,) = find_runs()
    records = _records(folder)
    chosen = [r for r in records if name is None or _answers(r, name)]
    if not chosen:
        labels = {r["method"]["label"] for r in records}
        raise unknown(f"method or key in {folder}", name or "", labels)
    chosen = [
        r
        for r in chosen
        if (target is None or _target(r) == target)
        and (benchmark is None or r["benchmark"]["name"] == benchmark)
    ]
    if not chosen:
        raise UsageError(f"{folder} has no such cell for {name}", "See: tdabench show")
    if as_json:
        return emit_json([dict(r) for r in chosen])
    if name is None:
        return print_table(
            ["key", "method", "target", "benchmark", "seed", "status", "value"],
            [
                (
                    r["key"],
                    r["method"]["label"],
                    _target(r),
                    r["benchmark"]["name"],
                    r["seed"],
                    r["status"] + (" [altered]" if r.altered() else ""),
                    _number(r["metrics"].get(r["primary"], {}).get("value")),
                )
                for r in chosen
            ],
        )
    for n, record in enumerate(chosen):
        try:
            print_record(record, folder, first=n == 0)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise DataError(
                f"{record.path} lacks what a record has, or has it in another form: {brief(e)}",
                "Was it edited? A run writes it again once it is removed",
            ) from e


def _records(folder: Path) -> list[Record]:
    from tdabench.run.folder import RunFolder

    run = RunFolder(folder)
    if not run.cells.is_dir():
        raise UsageError(f"{folder} is not a run folder: it has no cells", "Give --run runs/NAME")
    return list(run.records())


def _target(record: Record) -> str:
    return str(record["target"].get("label") or record["target"]["name"])


def _answers(record: Record, name: str) -> bool:
    method = record["method"]
    if name in (method["label"], method["name"], record["key"]):
        return True
    return len(name) >= 4 and record["key"].startswith(name)


def print_record(r: Record, folder: Path, first: bool = True) -> None:
    def line(text: str = "") -> None:
        print_lines(clean(text, 100_000))

    if not first:
        line()
    line(
        f"{r['method']['label']} · {_target(r)} · {r['benchmark']['name']} · "
        f"seed {r['seed']} · {r['status']}"
    )
    if r["reason"]:
        line(f"reason: {r['reason']}")
    for reason in r.altered():
        line(f"! altered after it was written: {reason}")
    for mark in r.odd_values():
        line(f"! {mark}")
    for name, m in sorted(r["metrics"].items(), key=lambda kv: kv[0] != r["primary"]):
        interval = ""
        if m.get("low") is not None:
            interval = f" [{_number(m['low'])}, {_number(m['high'])}]"
        if m.get("low_these_tasks") is not None:
            these = f"{_number(m['low_these_tasks'])}, {_number(m['high_these_tasks'])}"
            interval = f"{interval} for new tasks, [{these}] for these {m['tasks']} tasks"
        line(f"  {name} = {_number(m['value'])}{interval} {m.get('unit', '')}".rstrip())
    for note in r["notes"]:
        line(f"  note: {note}")
    cost = r["cost"]
    if cost.get("prepare"):
        facts = ", ".join(f"{k} {v:,.6g}" for k, v in sorted(cost["prepare"].items()))
        line(f"prepare: {facts}")
    for phase in ("build", "query"):
        if phase in cost:
            c = cost[phase]
            each = c["seconds"] / c["queries"] * 1000 if c.get("queries") else None
            line(
                f"{phase}: {c['seconds']:.3f} s"
                + (f" for {c['queries']} queries, {each:.2f} ms each" if each is not None else "")
                + f", peak memory {_bytes(c.get('peak_bytes', 0))}"
                + (f", GPU {_bytes(c['gpu_peak_bytes'])}" if c.get("gpu_peak_bytes") else "")
            )
    for stage in cost.get("stages") or ():
        line(
            f"  stage {stage['label']}: build {stage['build']['seconds']:.3f} s, query "
            f"{stage['query']['seconds']:.3f} s, index {_bytes(stage['index_bytes'])}"
        )
    if phases := _phases(cost):
        line(f"seconds by the clock and of processors: {phases}")
    if "index_bytes" in cost:
        line(
            f"index: {_bytes(cost['index_bytes'])}, {cost['bytes_per_example']:,.0f} bytes per "
            f"example, {cost['n_train']:,} examples"
        )
    method = r["method"]
    line("parameters:")
    for key, value in sorted(method["params"].items()):
        who = next((w for w in ("passed", "tuned", "suite") if key in method.get(w, {})), "default")
        line(f"  {key} = {json.dumps(value)}  ({who})")
    versions = ", ".join(f"{k} {v}" for k, v in sorted(r["versions"].items()))
    line(f"method version {method['version']} of plugin {method['plugin']}")
    line(f"made {r['started']} with {versions}, commit {r['git'] or 'unknown'}")
    line(
        f"on {r['hardware'].get('cpu')}, {r['hardware'].get('cores')} cores, "
        f"{r.get('threads', '?')} threads, device {r.get('device', 'cpu')}"
    )
    line(
        f"corpus {r['corpus']['train']}, queries {r['corpus']['queries']}, target "
        f"{r['target']['fingerprint']}" + (f", truth {r['truth']}" if r["truth"] else "")
    )
    line(f"isolation: {r.get('isolation') or 'none'}")
    line(f"record: {folder / 'cells' / r['key']}.json")
    if r["log_tail"]:
        line("last lines of the log:")
        for text in r["log_tail"]:
            line(f"  | {text}")


def _phases(cost: Mapping[str, Any]) -> str:
    """Everything the method's processes took, by phase; "" where a record does not say."""
    try:
        spent = {**cost["phases"], "together": cost["total"]}
        each = [f"{k} {v['seconds']:.3g} and {v['cpu_seconds']:.3g}" for k, v in spent.items()]
    except (KeyError, TypeError, ValueError):
        return ""
    return ", ".join(each)


def _number(value: Any) -> str:
    return "none" if value is None else f"{value:.4g}"


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
