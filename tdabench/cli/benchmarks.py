"""`tdabench benchmarks`: lists and describes benchmarks."""

from __future__ import annotations

import click

from tdabench.cli.common import (
    complete_benchmarks,
    discovered,
    emit_json,
    json_option,
    plugin_options,
    print_table,
)


@click.command(
    epilog="""\b
Examples:
  tdabench benchmarks
  tdabench benchmarks lds
"""
)
@click.argument("name", required=False, shell_complete=complete_benchmarks)
@plugin_options
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List benchmarks, or describe one."""
    from tdabench.cli.methods import describe, print_described

    registry = discovered()
    if name is not None:
        entry = registry.benchmark(name)
        shown = {**describe(entry), "truth": entry.cls.truth_kind}
        return emit_json(shown) if as_json else print_described("benchmark", shown)
    rows = [{**describe(e), "truth": e.cls.truth_kind} for e in registry.benchmarks.values()]
    if as_json:
        return emit_json(rows)
    print_table(
        ["benchmark", "truth", "what it measures", "plugin"],
        [(r["name"], r["truth"] or "-", r["summary"], r["plugin"]) for r in rows],
    )
