"""`tdabench plugins`: lists what each plugin provides, and why broken ones fail."""

from __future__ import annotations

import click

from tdabench.cli.common import emit_json, json_option, plugin_options, print_table


@click.command(
    epilog="""\b
Examples:
  tdabench plugins
  tdabench plugins --plugin ./my_method.py      check a plugin file
  tdabench run --no-plugin broken               leave one out
"""
)
@plugin_options
@json_option
def command(as_json: bool) -> None:
    """List plugins, and why broken ones fail."""
    from tdabench.cli.common import use_plugins
    from tdabench.registry import configuration, registry

    if not configuration()["disabled"]:
        use_plugins((), configuration()["modules"])
    rows = [
        {
            "plugin": p.origin.plugin,
            "distribution": p.origin.distribution,
            "version": p.origin.version,
            "module": p.module,
            "status": p.status,
            "problems": p.problems,
            "methods": p.methods,
            "benchmarks": p.benchmarks,
            "suites": p.suites,
            "hooks": p.hooks,
        }
        for p in registry().plugins
    ]
    if as_json:
        return emit_json(rows)
    table = []
    for p in registry().plugins:
        brings = [
            f"{kind}: {', '.join(names)}"
            for kind, names in (
                ("methods", p.methods),
                ("benchmarks", p.benchmarks),
                ("suites", p.suites),
            )
            if names
        ]
        brings += ["commands"] if "tdabench_commands" in p.hooks else []
        brings += ["a record observer"] if "tdabench_record" in p.hooks else []
        source = f"{p.origin.distribution} {p.origin.version}".strip()
        table.append((p.origin.plugin, source, p.status, "; ".join(brings) or "-"))
        table += [("", "", "", f"! {problem}") for problem in p.problems]
    print_table(["plugin", "from", "status", "brings"], table)
    for line in registry().clashes:
        click.echo(f"! {line}: neither can be used; leave one out with --no-plugin")
