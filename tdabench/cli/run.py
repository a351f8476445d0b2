"""`tdabench run`: measures methods on a suite and prints the board."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from tdabench.cli import elsewhere
from tdabench.cli.common import (
    check_device,
    chosen_device,
    complete_benchmarks,
    complete_methods,
    complete_suites,
    console,
    devices,
    discovered,
    emit_json,
    json_option,
    own_data_options,
    plugin_options,
    print_lines,
    print_table,
    warn,
    words,
)
from tdabench.errors import UsageError

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def memory_size(ctx: click.Context, param: click.Parameter, value: str | None) -> int:
    """Converts `4G` or `500M` to bytes."""
    if value is None:
        return 0
    text = value.strip().lower().removesuffix("b").removesuffix("i")
    unit = text[-1:] if text[-1:] in UNITS else ""
    try:
        number = float(text.removesuffix(unit)) * UNITS[unit]
        if not 0 < number < 2**60:
            raise ValueError
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a size such as 4G or 500M") from None
    return int(number)


@click.command(
    epilog="""\b
Examples:
  tdabench run --methods airrep,trak
  tdabench run --methods logra --set logra.rank=8
  tdabench run --target all --methods all
  tdabench run --suite mine.toml --plugin my_method.py --methods my-method
  tdabench run --model ./my-model --train train.jsonl --queries q.jsonl
  tdabench run --model org/name --train train.jsonl --queries q.jsonl --truth-groups 50
  tdabench run --dry-run
Finished cells are never measured twice: run the same command again to resume.
"""
)
@click.option(
    "--suite",
    metavar="NAME|FILE",
    shell_complete=complete_suites,
    help="Name of a suite, or a TOML file.  [default: pocket]",
)
@click.option(
    "--methods",
    metavar="A,B|all",
    shell_complete=complete_methods,
    help="Methods, by name or label.  [default: the suite's]",
)
@click.option(
    "--target",
    "targets",
    metavar="A,B|all",
    help="Targets, by label.  [default: the suite's main one]",
)
@click.option(
    "--benchmarks",
    metavar="A,B|all",
    shell_complete=complete_benchmarks,
    help="Benchmarks.  [default: the suite's]",
)
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="NAME.PARAM=VALUE",
    help="Set a parameter of a method or a benchmark; repeatable.",
)
@click.option(
    "--seed",
    "seeds",
    multiple=True,
    type=click.IntRange(min=0),
    help="Seed; repeatable.  [default: the suite's]",
)
@click.option("--out", type=click.Path(path_type=Path), help="Run folder.  [default: runs/SUITE]")
@click.option(
    "--from",
    "replay",
    type=click.Path(path_type=Path),
    metavar="MANIFEST",
    help="Replay the request that a manifest.json records.",
)
@click.option("--dry-run", is_flag=True, help="List the cells and what is already on disk.")
@click.option("--force", is_flag=True, help="Measure again what is already on disk.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Worker processes at a time. More than one distorts timings.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=0),
    default=0,
    help="Threads per worker.  [default: cores / jobs]",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=7200.0,
    show_default=True,
    metavar="SECONDS",
    help="Time limit for one build or benchmark; 0 for no limit.",
)
@click.option(
    "--isolation",
    type=click.Choice(["strict", "auto", "off"]),
    default="auto",
    show_default=True,
    help="Confine methods, so that they read no truth and write no record: always (or refuse to "
    "run), where the system can (the board says where not), or never.",
)
@click.option(
    "--memory",
    callback=memory_size,
    metavar="SIZE",
    help="Memory limit per worker, such as 4G.  [default: 90% of free memory]",
)
@click.option(
    "--device", help="cpu, cuda, cuda:1 …  [default: cuda if available, or the manifest's]"
)
@click.option(
    "--retry-failed/--no-retry-failed",
    default=True,
    show_default=True,
    help="Whether to retry failed cells.",
)
@click.option(
    "--keep-indices/--no-keep-indices",
    default=True,
    show_default=True,
    help="Keep built indices for later benchmarks.",
)
@click.option(
    "--log-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Append one line of JSON per event to this file, too (like log.jsonl in the run folder).",
)
@click.option("--quiet", is_flag=True, help="Print no progress on stderr.")
@own_data_options
@click.option("--queries", metavar="FILE", help="Your own query examples (FILE#SPLIT).")
@click.option(
    "--truth-groups",
    type=click.IntRange(1),
    metavar="N",
    help="Retrain your own model on up to N random groups first; the estimated cost is printed "
    "before.",
)
@click.option("--truth-until", metavar="width=W|none", default="width=0.02", show_default=True,
              help="Train fewer groups if the LDS of tfidf is known to ±W over groups before; "
                   "none: train all.")  # fmt: skip
@click.option("--truth-seeds", type=click.IntRange(1), default=1, show_default=True,
              help="Retrainings per group; two give a noise ceiling.")  # fmt: skip
@click.option("--truth-fraction", type=click.FloatRange(0, 1, min_open=True), default=0.25,
              show_default=True, help="Fraction of the training examples per group.")  # fmt: skip
@click.option("--recipe", "recipe", multiple=True, metavar="KEY=VALUE",
              help="Training recipe of the groups: lr=1e-4, epochs=1, lora_rank=8 …")  # fmt: skip
@plugin_options
@json_option
def command(
    suite: str | None,
    methods: str | None,
    targets: str | None,
    benchmarks: str | None,
    sets: tuple[str, ...],
    seeds: tuple[int, ...],
    out: Path | None,
    replay: Path | None,
    dry_run: bool,
    force: bool,
    jobs: int,
    threads: int,
    timeout: float,
    isolation: str,
    memory: int,
    device: str | None,
    log_file: Path | None,
    retry_failed: bool,
    keep_indices: bool,
    quiet: bool,
    own: dict[str, Any],
    queries: str | None,
    truth_groups: int | None,
    truth_until: str,
    truth_seeds: int,
    truth_fraction: float,
    recipe: tuple[str, ...],
    as_json: bool,
) -> int:
    """Measure methods on a suite and print the board.

    Each method runs in its own process: a crash, a hang or excessive memory use is a failed row,
    and the run continues.
    """
    from tdabench import apart
    from tdabench import run as running
    from tdabench.run.progress import watcher

    apart.confined = isolation != "off"
    discovered()
    if device or not replay:
        device = chosen_device(device or "auto")
    if own["model"] or own["train"] or queries or truth_groups:
        if suite or replay:
            raise UsageError("--suite and --from define their own data", "Leave out one of them")
        from tdabench.run.own import build_truth, own_place
        from tdabench.truth import parse_until

        # The model and its truth are another process's work: a third-party model may do anything.
        code = elsewhere.carried_out(foreign=True, what="preparing the model")
        if code:
            return code
        if code is None:
            width = None if truth_until == "none" else parse_until(truth_until)
            suite, out, truth_plan = own_data(
                own, queries, out, truth_groups, width, truth_seeds, truth_fraction, recipe, quiet,
                device or "cpu",
                running.Request(methods=words(methods), benchmarks=words(benchmarks), sets=sets),
            )  # fmt: skip
            if truth_plan is not None and not dry_run:
                where, tell = devices(device or "cpu"), silent if quiet else say_progress
                if not build_truth(suite, jobs, where, say, tell, elsewhere.step, width):
                    return 1
            if elsewhere.here():
                return 0  # the process that waits measures the methods
        else:
            suite, out = own_place(own, out)
    asked: dict[str, Any] = {
        "suite": suite,
        "methods": words(methods),
        "targets": words(targets),
        "benchmarks": words(benchmarks),
        "seeds": seeds or None,
        "sets": sets or None,
        "device": device,
    }
    given = {k: v for k, v in asked.items() if v is not None}
    base = recorded_request(replay) if replay else {}
    request = running.Request.from_dict({**base, **given})
    if replay and not device:
        try:
            check_device(request.device)
        except UsageError as e:
            raise UsageError(f"the manifest: {e.message}", "Choose one with --device") from e
    options = running.Options(
        jobs=jobs,
        threads=threads,
        timeout=timeout,
        memory=memory,
        isolation=isolation,
        force=force,
        keep_indices=keep_indices,
        retry_failed=retry_failed,
        interactive=sys.stdin.isatty() and sys.stderr.isatty(),
        command=("tdabench", *sys.argv[1:]),
        log_file=log_file,
    )
    try:
        plan = running.make_plan(request, own["data_dir"])
    except UsageError as e:
        if replay and "unknown" in e.message:
            e.remedy += recorded_plugins(replay)
        raise
    for line in plan.suite.missing:
        warn(line)
    if plan.suite.sources:
        # Fetched files are pinned, so that readers and replays of this run find the same files.
        request = plan.request = dataclasses.replace(request, suite=str(plan.suite.path))
    folder = running.RunFolder(out or Path("runs") / plan.suite.name)
    if dry_run:
        show_plan(plan, folder, force, retry_failed, as_json)
        return 0
    progress = watcher(quiet)
    try:
        result = running.run(request, folder.path, options, progress, plan)
    finally:
        progress.close()
    if as_json:
        shown = {"run": str(result.folder), "cells": [dict(r) for r in result.records]}
        emit_json({**shown, "not_started": [c.title for c in result.not_started]})
    else:
        print_result(result)
    if result.interrupted:
        say("interrupted. The same command resumes from here")
        return 130
    return 1 if result.failed else 0


def own_data(
    own: dict[str, Any],
    queries: str | None,
    out: Path | None,
    groups: int | None,
    width: float | None,
    seeds: int,
    fraction: float,
    recipe: tuple[str, ...],
    quiet: bool,
    device: str,
    request: Any,
) -> tuple[str, Path, dict[str, Any] | None]:
    """Writes the suite of one's own data; reports its contents and the cost of its truth.

    `request` has the methods and benchmarks of the command line. Returns the suite's file, the run
    folder, and the plan of a truth that does not exist yet. Raises UsageError if nothing can be
    measured.
    """
    from tdabench.run import own as own_module
    from tdabench.run.environment import multiplies_bfloat16
    from tdabench.run.plan import check_names
    from tdabench.run.suite_file import read_suite
    from tdabench.truth.plan import check_disjoint

    if not queries:
        raise UsageError("own data needs --queries", "Give --model, --train and --queries")
    spec = {"groups": groups or 100, "seeds": seeds}
    _, folder = own_module.own_place(own, out)
    suite = own_module.own_suite(own, queries, folder, spec if groups else None, recipe, fraction)
    train, asked, (target,) = suite.train, suite.queries(), suite.targets
    check_disjoint(train, asked)
    planned = target.plans.get("lds")
    there = planned is not None and (
        own_module.is_built(target.truths["lds"], width)
        if groups
        else target.truths["lds"].exists()
    )
    if planned is not None and not there:  # before anything is timed or built
        size = round(planned.fraction * len(train))
        if planned.groups < 2 or size >= len(train):
            raise UsageError(
                f"{planned.groups} groups of {size} of {len(train)} training examples do not "
                "differ, so that nothing can be ranked by their truth",
                "Raise --truth-groups (two at least), or lower --truth-fraction",
            )
    nothing = UsageError(
        "there is no ground truth, and not all files have task labels: nothing to measure",
        "Give --truth-groups N (LDS), --field task=NAME (classification) or --benchmarks cost. "
        "The training examples behind one answer: tdabench trace",
    )
    check_names(suite, request)
    measures = request.benchmarks or suite.default_benchmarks
    if quiet:
        if not measures:
            raise nothing
        return str(suite.path), folder, (spec if planned and not there else None)
    long, seen = own_module.too_long(target.target, train)
    facts = [
        f"{suite.name}: {len(train):,} training examples, {len(asked):,} queries",
        f"target {target.target.source}, template {target.target.template}, "
        f"{target.target.max_length} tokens",
    ]
    if long:
        facts.append(
            f"{long:,} of {seen:,} examples exceed it and are cut ({target.target.truncate})"
        )
    say("; ".join(facts))
    if device == "cpu" and own["dtype"] in ("auto", "float32") and multiplies_bfloat16():
        say("this processor multiplies bfloat16 (AMX): --dtype bfloat16 scores faster with less "
            "precision, --recipe precision=bfloat16 trains with it")  # fmt: skip
    if not any(train.tasks) or not any(asked.tasks):
        say("no task labels, so no classification (map them with --field task=NAME)")
    if there:
        say(f"its truth exists: {target.truths['lds']}")
    else:
        say_cost(suite, target, train, asked, spec, planned, device, width)
    if not measures:
        raise nothing
    return str(read_suite(suite.path).path), folder, (spec if planned and not there else None)


def say_cost(
    suite: Any,
    target: Any,
    train: Any,
    asked: Any,
    spec: Any,
    planned: Any,
    device: str,
    width: float | None,
) -> None:
    """Estimates the cost of the truth on this machine by timing one step."""
    from tdabench.report.text import seconds
    from tdabench.run.own import unit_cost

    groups, seeds = (planned.groups, planned.seeds) if planned else (spec["groups"], spec["seeds"])
    size = round((planned.fraction if planned else target.target.fraction) * len(train))
    recipe = target.recipe_of("lds")
    cost = unit_cost(target.target, train, asked, recipe, size, device=device)
    units = groups * seeds
    span = f"{seconds(cost.low)} to {seconds(cost.high)} by the fastest and slowest of "
    one = (
        f"one retraining on {size:,} examples takes about {seconds(cost.seconds)} on this machine "
        f"in one thread ({span}{cost.steps} step{'s' * (cost.steps > 1)}; training "
        f"{seconds(cost.train_seconds)}, losses of the queries {seconds(cost.query_seconds)}, "
        f"loading {seconds(cost.load_seconds)})"
    )
    if cost.load > 1.2:
        one += f"; other work slows it down ({cost.load:.1f} processes per core)"
    whole = f"{groups} groups x {seeds} seed{'s' * (seeds > 1)}: {seconds(units * cost.low)} to "
    whole += f"{seconds(units * cost.high)} in one process"
    if planned:
        early = f", and ends early at ±{width:g} over groups (--truth-until)" if width else ""
        say(f"{one}. Ground truth: {whole}. It resumes where it stopped{early}")
    else:
        say(f"{one}. Ground truth: {whole}. None requested (--truth-groups N), so no LDS")


def say_progress(done: int, total: int, left: float) -> None:
    """Prints how far the truth is."""
    from tdabench.report.text import seconds

    rest = f", {seconds(left)} left" if done < total else ""
    say(f"truth: {done} of {total} retrainings{rest}")


def silent(done: int, total: int, left: float) -> None:
    """Discards progress."""


def say(message: str) -> None:
    from tdabench.cli import say as say_line

    say_line(message)


def recorded_request(path: Path) -> dict[str, Any]:
    """Returns the request in a manifest."""
    from tdabench.io import read_json

    manifest = read_json(path / "manifest.json" if path.is_dir() else path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("request"), dict):
        raise UsageError(f"{path} is not a run's manifest", "Give runs/NAME/manifest.json")
    return manifest["request"]


def recorded_plugins(path: Path) -> str:
    """Returns the `--plugin` options of a manifest, which are named but never loaded.

    A manifest is an untrusted file, and a plugin is code."""
    from tdabench.io import read_json

    found = read_json(path / "manifest.json" if path.is_dir() else path).get("plugins")
    modules = found.get("modules") if isinstance(found, dict) else None
    if not isinstance(modules, list) or not modules:
        return ""
    named = ", ".join(repr(str(m)[:80]) for m in modules[:5])
    return f". It was made with plugins that are not installed ({named}): see --plugin"


def show_plan(plan: Any, folder: Any, force: bool, retry_failed: bool, as_json: bool) -> None:
    from tdabench.run import is_done

    rows = []
    for cell in plan.cells:
        done = None if force else is_done(plan, folder, cell, retry_failed)
        state = "on disk" if done else (f"skip: {cell.skip}" if cell.skip else "to run")
        rows.append((cell, state))
    if as_json:
        emit_json(
            {
                "run": str(folder.path),
                "cells": [
                    {
                        "key": c.key,
                        "method": c.method.as_dict(),
                        "target": c.target.label,
                        "benchmark": c.benchmark.as_dict(),
                        "seed": c.seed,
                        "state": state,
                    }
                    for c, state in rows
                ],
            }
        )
        return
    print_table(
        ["method", "target", "benchmark", "seed", "state"],
        [(c.method.label, c.target.label, c.benchmark.name, c.seed, state) for c, state in rows],
    )


def print_result(result: Any) -> None:
    """Prints the board of this run's cells, from their records, and the cells without one."""
    from tdabench.report.board import Board
    from tdabench.report.published import print_published
    from tdabench.report.records import read_run
    from tdabench.report.terminal import print_board
    from tdabench.report.trust import print_left_out

    if result.records:
        run = read_run(result.folder, [r["key"] for r in result.records])
        board = Board.of_runs([run])
        print_board(board, console())
        print_left_out(board, console())
        print_published(board, console())
    left: dict[str, list[str]] = {}
    for cell in result.not_started:
        where = cell.target.label + (f", seed {cell.seed}" if cell.seed else "")
        left.setdefault(f"{cell.method.label} on {where}", []).append(cell.benchmark.name)
    for name, benchmarks in left.items():
        line = f" -    {name}  not started: {', '.join(benchmarks)}"
        print_lines(line)
