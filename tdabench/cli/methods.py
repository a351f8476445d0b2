"""`tdabench methods`: lists methods and their parameters."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from typing import Any

import click

from tdabench.cli.common import (
    complete_methods,
    console,
    discovered,
    emit_json,
    json_option,
    plugin_options,
    print_table,
)


@click.command(
    epilog="""\b
Examples:
  tdabench methods            every method of the installed plugins
  tdabench methods trak       one method, with its parameters
  tdabench methods --json
"""
)
@click.argument("name", required=False, shell_complete=complete_methods)
@plugin_options
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List methods, or the parameters of one."""
    registry = discovered()
    if name is not None:
        shown = describe(registry.method(name))
        return emit_json(shown) if as_json else print_described("method", shown)
    rows = [describe(e) for e in registry.methods.values()]
    if as_json:
        return emit_json(rows)
    print_table(
        ["method", "family", "description", "plugin"],
        [(r["name"], r["family"], r["summary"], r["plugin"]) for r in rows],
    )


def describe(entry: Any) -> dict[str, Any]:
    """Returns a method or benchmark class as JSON: its declarations and parameters."""
    cls = entry.cls
    return {
        "name": cls.name,
        "version": cls.version,
        "family": getattr(cls, "family", ""),
        "summary": cls.summary,
        "source": cls.source,
        "description": inspect.getdoc(cls) or "",
        "plugin": entry.origin.plugin,
        "distribution": f"{entry.origin.distribution} {entry.origin.version}".strip(),
        "parameters": parameters(cls),
    }


def parameters(cls: Any) -> list[dict[str, Any]]:
    """Returns name, type, default and description of each field of a method or benchmark."""
    from tdabench.run.plan import jsonable

    texts = descriptions(cls)
    hints = typing.get_type_hints(cls)
    out = []
    for f in dataclasses.fields(cls):
        default = f.default
        if default is dataclasses.MISSING and f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        required = default is dataclasses.MISSING
        out.append(
            {
                "name": f.name,
                "type": type_name(hints[f.name]),
                "default": None if required else jsonable(default),
                "required": required,
                "description": texts.get(f.name, ""),
            }
        )
    return out


def descriptions(cls: Any) -> dict[str, str]:
    """Reads `name  text` lines, with indented continuations, in the docstrings of a class and its
    bases; the class itself takes precedence."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        name = ""
        own: dict[str, str] = {}
        for line in inspect.cleandoc(vars(base).get("__doc__") or "").splitlines():
            if match := re.match(r"(\w+)  +(\S.*)", line):
                name, own[match[1]] = match[1], match[2]
            elif name and line.startswith("  "):
                own[name] += " " + line.strip()
            else:
                name = ""
        found = {**own, **found}
    return found


def without_parameters(shown: dict[str, Any]) -> str:
    """Returns a description without its `name  text` lines, which the list of parameters has."""
    names = {p["name"] for p in shown["parameters"]}
    kept, inside = [], False
    for line in shown["description"].splitlines():
        match = re.match(r"(\w+)  +\S", line)
        inside = bool(match and match[1] in names) or (inside and line.startswith("  "))
        if not inside:
            kept.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(str(a) for a in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)


def fitted(text: str, width: int) -> str:
    """Wraps the paragraphs of `text` that have lines longer than `width`, between words.

    The continuation of a `name  text` line is aligned with its text."""
    blocks: list[tuple[int, list[str]]] = []  # indentation of continuations, and lines
    for line in text.splitlines():
        item = re.match(r"\w+  +", line)
        indent = item.end() if item else len(line) - len(line.lstrip())
        if blocks and not item and line and blocks[-1][1][-1] and indent == blocks[-1][0]:
            blocks[-1][1].append(line)
        else:
            blocks.append((indent, [line]))
    out = []
    for indent, lines in blocks:
        if max(map(len, lines)) > width:
            filled = " ".join([lines[0], *(x.strip() for x in lines[1:])])
            lines = textwrap.wrap(
                filled, width, subsequent_indent=" " * (indent if indent < width // 2 else 0),
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
        out += lines
    return "\n".join(out)


def example(shown: dict[str, Any]) -> str:
    """Returns `--set` with a value worth trying: from the method's grid, other than the default."""
    from tdabench.registry import registry
    from tdabench.run.tune import default_grid

    defaults = {p["name"]: p["default"] for p in shown["parameters"]}
    for name, values in default_grid(registry().method(shown["name"]).cls).items():
        for value in values:
            if isinstance(value, (str, int, float)) and value not in (defaults.get(name), "auto"):
                return f" --set {shown['name']}.{name}={value}"
    return ""


def print_described(kind: str, shown: dict[str, Any]) -> None:
    out = console()
    lines = [f"{shown['name']} · version {shown['version']}"]
    if shown["summary"]:
        lines.append(shown["summary"])
    if shown["source"]:
        lines.append(f"source: {shown['source']}")
    lines += [f"plugin: {shown['plugin']} ({shown['distribution']})", ""]
    lines += [without_parameters(shown), ""]
    out.print("\n".join(fitted(x, out.width) for x in lines), markup=False, soft_wrap=True)
    if shown["parameters"]:
        out.print("Parameters:", markup=False)
    for p in shown["parameters"]:
        default = "required" if p["required"] else f"default: {p['default']!r}"
        head = f"{p['name']}  {p['type']}  [{default}]"
        text = textwrap.fill(
            p["description"], max(20, out.width - 4), break_long_words=False,
            break_on_hyphens=False,
        )  # fmt: skip
        out.print(head, textwrap.indent(text, "    "), sep="\n", markup=False, soft_wrap=True)
    name = shown["name"]
    if kind == "method":
        text = f"\nRun it: tdabench run --methods {name}{example(shown)}"
    else:
        text = f"\nRun it: tdabench run --benchmarks {name} --set {name}.PARAMETER=VALUE"
    out.print(text, markup=False, soft_wrap=True)
