"""`tdabench suites`: lists and describes suites, and says what one needs."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tdabench.cli.common import (
    complete_suites,
    data_dir_option,
    discovered,
    emit_json,
    json_option,
    plugin_options,
    print_lines,
    print_table,
    warn,
)
from tdabench.errors import TdabenchError, UsageError, relative


@click.command(
    epilog="""\b
Examples:
  tdabench suites
  tdabench suites pocket       targets, truths, methods and sizes; checks every declared hash
  tdabench suites ./mine.toml
  tdabench suites check wikitext    what it needs, what is there, what is missing; fetches nothing
"""
)
@click.argument("words", nargs=-1, metavar="[check] [NAME]", shell_complete=complete_suites)
@data_dir_option
@click.option("--ask-hub", is_flag=True, help="With check: ask the hub for the sizes of files.")
@plugin_options
@json_option
def command(words: tuple[str, ...], data_dir: Path | None, ask_hub: bool, as_json: bool) -> None:
    """List suites, describe one and check its files, or say what one needs.

    `suites check NAME` fetches nothing. It exits with 1 if a run could not start: the corpus is
    missing, or every target lacks its model or a truth.
    """
    from tdabench.run.sources import load_suite
    from tdabench.run.suite_file import read_suite

    registry = discovered()
    if words[:1] == ("check",):
        if len(words) != 2:
            raise UsageError("suites check takes the name of one suite", "See: tdabench suites")
        return check(words[1], data_dir, ask_hub, as_json)
    if ask_hub:
        raise UsageError("--ask-hub belongs to: tdabench suites check NAME")
    if len(words) > 1:
        raise UsageError(f"unexpected {words[1]!r}", "Give one suite, or: suites check NAME")
    if words:
        name = words[0]
        suite = load_suite(name, data_dir)
        for line in suite.missing:
            warn(line)
        shown = describe(suite)
        return emit_json(shown) if as_json else print_suite(shown)
    rows: list[dict[str, Any]] = []
    for known, entry in registry.suites.items():
        try:
            suite = read_suite(entry.value)
        except TdabenchError as e:
            warn(f"suite {known} of plugin {entry.origin}: {e}")
            continue
        rows.append(
            {
                "name": suite.name,
                "version": suite.version,
                "summary": suite.summary,
                "targets": [t.label for t in suite.targets],
                "path": str(suite.path),
                "plugin": entry.origin.plugin,
            }
        )
    if as_json:
        return emit_json(rows)
    print_table(
        ["suite", "version", "targets", "description", "plugin"],
        [
            (r["name"], r["version"], ", ".join(r["targets"]), r["summary"], r["plugin"])
            for r in rows
        ],
    )


def check(name: str, data_dir: Path | None, ask_hub: bool, as_json: bool) -> None:
    """Prints what a suite needs. Exits with 1 if a run could not start."""
    from tdabench.run.needs import can_run, needs_of
    from tdabench.run.sources import suite_path

    needs = needs_of(suite_path(name), data_dir, ask_hub)
    ready = can_run(needs)
    if as_json:
        emit_json({"suite": name, "can_run": ready, "needs": [asdict(n) for n in needs]})
    else:
        print_needs(name, needs, ready)
    if not ready:
        sys.exit(1)


def print_needs(name: str, needs: list[Any], ready: bool) -> None:
    print_table(
        ["state", "target", "what", "size", "source"],
        [(n.state, n.target, n.role, _bytes(n), n.source) for n in needs],
    )
    lines = [""]
    for n in needs:
        if n.state == "missing":
            where = f"give it as DIR/{n.place} with --data-dir DIR" if n.place else n.problem
            rest = " (optional: methods that need it are skipped)" if n.optional else ""
            origin = f". It comes from: {n.about}" if n.about else ""
            lines.append(f"missing: {n.source}: {where}{rest}{origin}")
    weight = sum(n.bytes for n in needs if n.state == "missing")
    unknown = sum(not n.bytes for n in needs if n.state == "missing")
    if weight or unknown:
        parts = [f"about {weight / 1e6:,.0f} MB"] if weight else []
        parts += [f"{unknown} of unknown size (--ask-hub asks)"] if unknown else []
        lines.append(f"missing in all: {', and '.join(parts)}")
    targets = list(dict.fromkeys(n.target for n in needs if n.target))
    broken = {n.target for n in needs if n.state == "missing" and n.target and not n.optional}
    if ready and broken:
        lines.append(f"targets that can run: {', '.join(t for t in targets if t not in broken)}")
    lines.append(
        f"{name} can run: tdabench run --suite {name}" if ready else f"{name} cannot run yet"
    )
    print_lines("\n".join(lines))


def _bytes(need: Any) -> str:
    if not need.bytes:
        return "unknown" if need.state == "missing" else ""
    about = "" if need.state == "here" else "~"
    size = need.bytes
    return f"{about}{size / 1e6:,.1f} MB" if size >= 1e5 else f"{about}{size / 1e3:,.1f} kB"


def describe(suite: Any) -> dict[str, Any]:
    """Describes a suite; opens its files and checks their hashes."""
    for path in suite.hashes:
        suite.verify(path)
    train, queries = suite.train, suite.queries() if suite.corpus.queries else None
    targets = []
    for t in suite.targets:
        truths = {n: truth_shape(p) for n, p in t.truths.items() if p.exists() or n not in t.plans}
        targets.append(
            {
                "label": t.label,
                "name": t.target.name,
                "regime": t.target.regime,
                "main": t.main,
                "checkpoints": list(t.target.checkpoints),
                "fingerprint": t.target.fingerprint,
                "truths": truths,
                "not_built": [n for n in t.truths if n not in truths],
                "source": t.target.source,
                "assets": sorted(suite.assets_for(t)),
            }
        )
    size = sum(p.stat().st_size for p in suite.folder.rglob("*") if p.is_file())
    published = [{"method": r.method, "benchmark": r.benchmark, "value": r.value,
                  "source": r.source} for r in suite.published]  # fmt: skip
    return {
        "name": suite.name,
        "version": suite.version,
        "summary": suite.summary,
        "path": str(suite.path),
        "fingerprint": suite.fingerprint,
        "train": {"examples": len(train), "fingerprint": train.fingerprint},
        "queries": {
            "examples": len(queries) if queries else 0,
            "fingerprint": queries.fingerprint if queries else "",
        },
        "tasks": len(set(train.tasks)),
        "targets": targets,
        "published": published,
        "sources": dict(suite.sources),
        "methods": list(suite.default_methods),
        "variants": sorted(suite.variants),
        "benchmarks": list(suite.default_benchmarks),
        "seeds": list(suite.seeds),
        "hashed_files": len(suite.hashes),
        "folder_bytes": size,
    }


def truth_shape(path: Path) -> dict[str, Any]:
    from tdabench.truth.store import Truth

    truth = Truth.load(path)
    groups, seeds, queries = truth.losses.shape
    return {"groups": groups, "seeds": seeds, "queries": queries}


def print_suite(s: dict[str, Any]) -> None:
    n = s["hashed_files"]
    hashed = f"{n} hashed file{'s' * (n > 1)}, all verified" if n else "no hashes declared"
    lines = [
        f"{s['name']} · version {s['version']} · {s['summary']}",
        f"{s['train']['examples']:,} training examples of {s['tasks']} tasks, "
        f"{s['queries']['examples']:,} queries",
        f"methods: {', '.join(s['methods']) or 'all'}",
        *([f"variants: {', '.join(s['variants'])}"] if s["variants"] else []),
        f"benchmarks: {', '.join(s['benchmarks'])}",
        f"file: {relative(s['path'])} ({hashed}; {s['folder_bytes'] / 1e6:.1f} MB)",
        *(
            pinned if pinned.startswith(name) else f"{name}: {pinned}"
            for name, pinned in s["sources"].items()
        ),
        *(f"{t['label']}: {t['source']}" for t in s["targets"] if t["source"]),
        *([f"published rows: {len(s['published'])}"] if s["published"] else []),
        "",
    ]
    print_lines("\n".join(lines))
    print_table(
        ["target", "model", "regime", "checkpoints", "truths (groups x seeds x queries)"],
        [
            (
                t["label"] + (" (main)" if t["main"] else ""),
                t["name"],
                t["regime"],
                ", ".join(t["checkpoints"]),
                ", ".join(
                    f"{n} {v['groups']} x {v['seeds']} x {v['queries']}"
                    for n, v in t["truths"].items()
                )
                or (f"not built: {', '.join(t['not_built'])}" if t["not_built"] else "none"),
            )
            for t in s["targets"]
        ],
    )
