"""`tdabench truth`: plans, builds, inspects, verifies and converts ground truth."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from tdabench.cli import elsewhere
from tdabench.cli.common import check_device, devices, print_lines, warn
from tdabench.errors import TdabenchError, UsageError, notice, relative, resumable, wrapped

if TYPE_CHECKING:
    from tdabench.run.suite import Suite, SuiteTarget
    from tdabench.truth import Truth, TruthPlan


@click.group(name="truth")
def command() -> None:
    """Plan, build, verify and describe ground truth by retraining, and search for a recipe.

    A truth is one loss per (group, seed, query). A suite declares how each of its truths is built.
    A build runs one retraining per unit, keeps every finished one, and resumes where it stopped.

    \b
    Examples:
      tdabench truth status pocket
      tdabench truth verify pocket
      tdabench truth build pocket --target instruct --truth lds --workers 2
      tdabench truth build pocket --shard 3/8          # the third of eight array jobs
    """


def selection(function: Any) -> Any:
    for option in (
        click.argument("suite", default="pocket"),
        click.option("--target", "targets", multiple=True, help="Target label (default: all)."),
        click.option("--truth", "truths", multiple=True, help="Truth name (default: all)."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    ):
        function = option(function)
    return function


@command.command()
@selection
@click.option("--out", type=click.Path(path_type=Path), help="Write the plan to this file.")
def plan(
    suite: str,
    targets: tuple[str, ...],
    truths: tuple[str, ...],
    as_json: bool,
    out: Path | None,
) -> None:
    """Show what a build would retrain.

    Groups, seeds, recipe and the number of retrainings.

    \b
    Example:
      tdabench truth plan pocket --target instruct --truth lds --out plan.safetensors
    """
    from tdabench.run.truths import draw_plan, planned_truths

    rows = []
    picked = planned_truths(suite, targets, truths)
    if out and len(picked) > 1:
        raise UsageError("--out takes one plan", "Name it with --target and --truth")
    for s, t, name in picked:
        p = draw_plan(s, t, name)
        if out:
            p.save(out)
        rows.append({**p.describe(), "key": p.key, "groups": len(p.groups),
                     "group_size": int(p.groups.sizes[0]), "retrainings": len(p.units()),
                     "n_queries": len(p.query_ids)})  # fmt: skip
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for r in rows:
        click.echo(
            f"{r['name']}: {r['groups']} groups of {r['group_size']} x {r['n_seeds']} seeds = "
            f"{r['retrainings']} retrainings, {r['n_queries']} queries, plan {r['key']}"
        )


def _shard(text: str) -> tuple[int, int]:
    try:
        i, n = (int(x) for x in text.split("/"))
    except ValueError:
        raise UsageError(f"--shard {text!r} lacks the form i/n", "For example 3/8") from None
    if not 1 <= i <= n:
        raise UsageError(f"--shard {text!r}: i must be from 1 to n")
    return i - 1, n


@command.command()
@selection
@click.option("--workers", default="auto", show_default=True,
              help="Processes of one thread each; auto: limited by cores and memory.")  # fmt: skip
@click.option("--shard", default="1/1", show_default=True, help="Build only the i-th of n parts.")
@click.option("--until", metavar="width=W",
              help="Stop once the LDS of --reference is known to ±W over groups.")  # fmt: skip
@click.option("--reference", metavar="METHOD",
              help="Cheap method by which --until judges.  [default: tfidf]")  # fmt: skip
@click.option("--plan", "plan_file", type=click.Path(path_type=Path),
              help="Build this plan file instead of the suite's plan.")  # fmt: skip
@click.option("--work", type=click.Path(path_type=Path), default=Path("truth-builds"),
              show_default=True, help="Folder for finished retrainings.")  # fmt: skip
@click.option("--in-place", is_flag=True,
              help="Write the finished truth where the suite declares it.  [default: only for a "
                   "suite file of your own that has none there yet]")  # fmt: skip
@click.option("--retries", type=click.IntRange(0), default=1, show_default=True,
              help="Further attempts at a failed retraining.")  # fmt: skip
@click.option("--device", default="cpu", show_default=True,
              help="cpu, or cuda: workers are assigned to GPUs in turn.")  # fmt: skip
@click.option("--stack", type=click.IntRange(1), default=1, show_default=True,
              help="Train this many targets at once, for small targets on a GPU.")  # fmt: skip
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
              help="This machine, or a Ray cluster (extra ray).")  # fmt: skip
@click.option("--address", default="", help="Ray: address (default: $RAY_ADDRESS, or local).")
@click.option("--cpus", default=1.0, show_default=True, help="Ray: cores per retraining.")
@click.option(
    "--gpus", default=0.0, show_default=True, help="Ray: GPUs per retraining (0.25: shared)."
)
@click.option("--memory", default=0.0, help="Ray: GiB of memory per retraining.")
def build(
    suite: str,
    targets: tuple[str, ...],
    truths: tuple[str, ...],
    as_json: bool,
    workers: str,
    shard: str,
    until: str | None,
    reference: str | None,
    plan_file: Path | None,
    work: Path,
    in_place: bool,
    retries: int,
    device: str,
    stack: int,
    engine: str,
    address: str,
    cpus: float,
    gpus: float,
    memory: float,
) -> None:
    """Run the missing retrainings of a truth.

    The truth is written once all are finished. A build can be stopped at any time: finished
    retrainings are kept, and the same command resumes. To spread a build over machines, give each
    a --shard and copy the work folders together, or let several build in one shared folder, or use
    a Ray cluster. With --until, groups are trained in their order, and the build stops as soon as
    the truth is precise enough; a smaller width, or none, goes on from there. Exits with 1 if a
    retraining failed repeatedly; the next build retries it.

    \b
    Examples:
      tdabench truth build pocket --target instruct --truth lds --workers 2
      tdabench truth build pocket --target smooth --truth lds --until width=0.02
      tdabench truth build pocket --engine ray --address 10.0.0.7:6379 --gpus 0.25
    """
    from tdabench.run import truths as planning
    from tdabench.run.truths import (
        check_inside,
        draw_plan,
        is_inside,
        plan_from_file,
        planned_truths,
        work_folder,
    )
    from tdabench.truth import Ray, Stacked, build_until, collect, parse_until, survey
    from tdabench.truth import build as build_units
    from tdabench.truth.until import stopped_in_words

    part = _shard(shard)
    width = parse_until(until) if until else None
    if width and part != (0, 1):
        raise UsageError(
            "--until does not work with --shard: where to stop follows from all groups",
            "Let several builders work in one shared folder (--work)",
        )
    if reference and not width:
        raise UsageError("--reference belongs to --until", "Give --until width=0.02, too")
    _elsewhere(suite)
    if stack > 1 and engine == "ray":
        raise UsageError("--stack does not work with --engine ray", "Leave one out")
    jobs: list[tuple[Suite, SuiteTarget, str, TruthPlan, Path | None]] = []
    if plan_file:
        s, t, queries, p = plan_from_file(suite, targets, plan_file)
        if in_place:
            raise UsageError("--in-place needs a plan of the suite", "Leave out --plan")
        jobs.append((s, t, queries, p, None))
    else:
        for s, t, name in planned_truths(suite, targets, truths):
            p = draw_plan(s, t, name)
            place = t.truths[name]
            if in_place:
                check_inside(s, suite, place)
            own = Path(suite).is_file() and not place.exists()
            here = in_place or (own and is_inside(s, suite, place))
            jobs.append((s, t, t.plans[name].queries, p, place if here else None))
    results, broken = [], 0
    for s, t, queries, p, out in jobs:
        folder = work_folder(work, p)
        units = p.units()[part[0] :: part[1]]
        there = survey(p, folder, units)
        if engine != "ray" and len(there.done) < len(units):
            for line in cautions(p, t, device):
                warn(line)
        n_workers = _workers(workers, device, p, t, len(units) - len(there.done), engine)
        if engine == "ray":
            where: Any = Ray(address, cpus, gpus, int(memory * 2**30))
        elif stack > 1:
            where = Stacked(stack, devices(device)[0])
        else:
            from tdabench.truth.engines import local_engine

            where = local_engine(n_workers, devices(device))
        stopped = judge = None
        if width:
            declared = t.plans.get(p.name.removeprefix(f"{s.name}-{t.label}-"))
            if declared is not None and declared.leave_out:
                raise UsageError(
                    f"{p.name} leaves out named parts of the corpus: none of its groups stands for "
                    "the others",
                    "Leave out --until",
                )
            judge = planning.reference(s, t, p, queries, reference or "tfidf", devices(device)[0])
        with resumable(), _watch(p, len(there.done), len(units), n_workers) as watch:
            how: dict[str, Any] = {
                "engine": where, "retries": retries, "on_unit": watch.unit, "note": watch.say,
                "on_retry": watch.retry,
            }  # fmt: skip
            parts = p, t.target, s.train, s.queries(queries), folder
            if width and judge:
                last: list[Any] = []
                failed, stopped = build_until(
                    *parts, width, judge, on_look=watch.look(judge, last), **how
                )
                if not failed and last[-1].width > width:
                    watch.say(f"±{width:g} over groups is not reached with all groups of the plan")
            else:
                failed = build_units(*parts, shard=part, **how)
        found = survey(p, folder)
        row: dict[str, Any] = {
            "name": p.name, "done": len(found.done), "of": len(p.units()),
            "failed": [u.name for u in failed],
        }  # fmt: skip
        if stopped:
            row["stopped"] = stopped
        if stopped or len(found.done) == len(p.units()):
            made = collect(p, folder, stopped)
            row["file"] = str(out or folder / "truth.safetensors")
            for place in dict.fromkeys([folder / "truth.safetensors", Path(row["file"])]):
                made.save(place)  # the work folder always has it
            row["in_place"] = out is not None
        broken += len(failed)
        results.append(row)
    if as_json:
        click.echo(json.dumps(results, indent=2))
    else:
        for row in results:
            where = f", written to {relative(row['file'])}" if "file" in row else ""
            if where and not row["in_place"] and not plan_file:
                where += " (tdabench run reads the suite's own file: --in-place writes that)"
            bad = f", {len(row['failed'])} failed" if row["failed"] else ""
            ended = stopped_in_words(row["stopped"]) if "stopped" in row else ""
            ended = f", {ended}" if ended else ""
            print_lines(
                f"{row['name']}: {row['done']} of {row['of']} retrainings{ended}{bad}{where}"
            )
    if broken:
        sys.exit(1)


def cautions(plan: TruthPlan, target: SuiteTarget, device: str) -> list[str]:
    """Returns what will make retraining slow or fail on this machine, before it starts."""
    from tdabench.run import environment
    from tdabench.truth.engines import needed_bytes

    if device != "cpu":
        return []
    found = []
    if plan.recipe.precision == "bfloat16" and environment.knows_bfloat16() is False:
        found.append(
            f"{plan.name} trains in bfloat16, for which this processor has no instructions: "
            "a retraining takes several times as long as one in float32"
        )
    free, need = environment.available_bytes(), needed_bytes(plan, target.target)
    if free and need > free:
        found.append(
            f"a retraining of {plan.name} needs about {need / 2**30:.1f} GiB of memory and "
            f"{free / 2**30:.1f} GiB is free: set micro_batch in the recipe, or free some"
        )
    return found


def _elsewhere(suite: str) -> None:
    """Leaves the command to another process if the suite's models are not tdabench's own."""
    foreign = elsewhere.is_foreign(suite)
    code = elsewhere.carried_out(foreign=foreign, what=f"the work on {suite}")
    if code is not None:
        sys.exit(code)


def _workers(
    asked: str, device: str, plan: TruthPlan, target: SuiteTarget, todo: int, engine: str
) -> int:
    """Returns the number of processes: as given, or as many as cores and free memory allow."""
    if asked != "auto":
        try:
            count = int(asked)
        except ValueError:
            count = 0
        if count < 1:
            raise UsageError(f"--workers {asked!r}", "A number from 1, or auto")
        return count
    if engine == "ray" or todo < 2:
        return 1
    if device != "cpu":
        return min(todo, max(1, len(devices(device))))
    from tdabench.run import environment
    from tdabench.truth.engines import needed_bytes

    free, need = environment.available_bytes(), needed_bytes(plan, target.target)
    room = int(0.9 * free / need) if free else environment.cores()
    return max(1, min(todo, environment.cores(), room))


def _watch(plan: TruthPlan, done: int, total: int, workers: int) -> _Lines:
    kind = _Bar if sys.stderr.isatty() and done < total else _Lines
    return kind(plan.name, done, total, workers)


class _Lines:
    """Progress for logs: a line on stderr every ten seconds, and one per failure or note."""

    def __init__(self, name: str, done: int, total: int, workers: int) -> None:
        self.name, self.done, self.total, self.workers = name, done, total, workers
        self.fresh = self.failed = self.retried = 0
        self.began = self.last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def unit(self, unit: Any, reason: str) -> None:
        """Reports a finished unit."""
        elsewhere.step()
        self.done += not reason
        self.fresh += 1
        if reason:
            self.failed += 1
            self.say(f"{unit.name} failed: {reason}")
        self.show()

    def retry(self, unit: Any, reason: str) -> None:
        """Reports a failed attempt that is repeated."""
        self.retried += 1
        self.say(f"{unit.name} failed and is retried: {reason}")

    def look(self, reference: Any, looks: list[Any]) -> Any:
        """Returns what reports a look at the precision of the truth so far, and adds it."""
        name = reference.method["name"]

        def seen(found: Any) -> None:
            looks.append(found)
            self.say(
                f"{found.groups} groups: the LDS of {name} is {found.lds:.3f} ± {found.width:.3f} "
                "over groups"
            )

        return seen

    def counts(self) -> str:
        """Returns the counts of retries and failures, if any."""
        parts = [(self.retried, "retried"), (self.failed, "failed")]
        return "".join(f", {n} {what}" for n, what in parts if n)

    def say(self, line: str) -> None:
        notice(line, f"{self.name}: ")

    def show(self) -> None:
        now = time.monotonic()
        left = self.total - self.done - self.failed
        if now - self.last < 10 and left > 0:
            return
        self.last = now
        pace = (now - self.began) / self.fresh
        self.say(
            f"{self.done}/{self.total} retrainings, {pace:.2f} s each, "
            f"{duration(max(0, left) * pace)} left{self.counts()}"
        )


class _Bar(_Lines):
    """Progress on a terminal: one bar with time left; faults scroll above it."""

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.console = Console(stderr=True, highlight=False)
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            console=self.console,
            transient=True,
        )
        self.task = self.bar.add_task(
            self.name, total=self.total, completed=self.done, facts="starting"
        )
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        text = wrapped(f"{self.name}: {line}", self.console.width)
        self.console.print(text, markup=False, soft_wrap=True)

    def show(self) -> None:
        pace = (time.monotonic() - self.began) / self.fresh
        left = max(0, self.total - self.done - self.failed) * pace
        self.bar.update(
            self.task,
            completed=self.done,
            facts=f"{pace:.2f} s each, {duration(left)} left{self.counts()}",
        )


def duration(seconds: float) -> str:
    """Formats an approximate duration: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@command.command()
@selection
@click.option("--work", type=click.Path(path_type=Path), default=Path("truth-builds"),
              show_default=True)  # fmt: skip
def status(
    suite: str, targets: tuple[str, ...], truths: tuple[str, ...], as_json: bool, work: Path
) -> None:
    """Show which truths exist and the progress of builds.

    For a build in progress it lists finished, damaged and failed units, the latter with reasons.
    """
    from tdabench.run.truths import draw_plan, planned_truths, work_folder
    from tdabench.truth import Truth, survey

    rows = []
    for s, t, name in planned_truths(suite, targets, truths):
        p = draw_plan(s, t, name)
        file = t.truths[name]
        row: dict[str, Any] = {"name": p.name, "file": str(file), "retrainings": len(p.units())}
        try:
            found = survey(p, work_folder(work, p))
            row |= {
                "built": len(found.done),
                "damaged": [u.name for u in found.damaged],
                "failed": {u.name: reason for u, reason in found.failed.items()},
            }
        except TdabenchError as e:
            row |= {"built": 0, "damaged": [], "failed": {}, "build": str(e)}
        if file.exists():
            try:
                s.verify(file)
                row |= _describe(Truth.load(file), p)
            except TdabenchError as e:
                row["state"] = str(e)
        else:
            row["state"] = "missing"
        rows.append(row)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for r in rows:
        facts = (
            f", split-half {r['split_half']:.2f}, ceiling {r['ceiling']:.2f}"
            if r.get("ceiling")
            else ""
        )
        print_lines(f"{r['name']}: {r['state']}{facts}; {r['built']}/{r['retrainings']} built here")
        if "build" in r:
            print_lines(f"  {r['build']}")
        if r["damaged"]:
            print_lines(f"  damaged, rebuilt by the next build: {', '.join(r['damaged'])}")
        for unit, reason in r["failed"].items():
            print_lines(f"  {unit} failed: {reason}")


def _describe(truth: Truth, plan: TruthPlan) -> dict[str, Any]:
    from tdabench import stats
    from tdabench.truth.until import stopped_in_words

    same, ended = truth.is_of(plan), truth.plan.get("stopped")
    state = stopped_in_words(ended) if ended else "complete"
    out: dict[str, Any] = {
        "state": state if same else f"{state}, but not by the suite's present plan",
        "groups": len(truth.groups),
        "seeds": truth.n_seeds,
        "queries": len(truth.query_ids),
    }
    ceiling = stats.noise_ceiling(truth.by_seed(), replicates=2)
    if ceiling is not None:
        out |= {"ceiling": ceiling.value, "split_half": ceiling.split_half}
    return out


def _additive(truth: Truth) -> float | None:
    """Returns the ceiling of additive predictors on a truth's finished groups, if it is known."""
    import numpy as np

    from tdabench import stats

    known = np.isfinite(truth.losses).all(axis=(1, 2))
    member = truth.groups.membership().toarray()[known]
    found = stats.additive_ceiling(truth.values[:, known], member)
    return found.value if found else None


@command.command()
@selection
@click.option("--directions", type=click.IntRange(0), default=4, show_default=True,
              help="Directions of metasmoothness, two trainings each; 0 skips it.")  # fmt: skip
@click.option("--step", default=0.1, show_default=True, help="Step in the examples' weights.")
@click.option("--save", is_flag=True, help="Record the metasmoothness in the truth's file.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:1.")
def describe(
    suite: str,
    targets: tuple[str, ...],
    truths: tuple[str, ...],
    as_json: bool,
    directions: int,
    step: float,
    save: bool,
    device: str,
) -> None:
    """Show how smooth the recipe of a truth is, and how noisy.

    Seed agreement is the Spearman correlation of two seeds over groups, averaged over queries.
    Noise ceiling is the LDS of a perfect predictor, additive ceiling of the best that adds up
    scores of a group's members (known from about 100 groups on). Metasmoothness, from -1 to 1, is
    the agreement of the effects of successive equal steps in the weights of training examples on
    the losses of queries (arXiv 2503.13751). Near 1, training can be differentiated; if it is low,
    derivatives of training do not predict the effect of changing the data.

    \b
    Examples:
      tdabench truth describe pocket --target instruct --truth lds
      tdabench truth describe pocket --directions 0
    """
    from tdabench import stats
    from tdabench.run.truths import check_inside, planned_truths
    from tdabench.truth import Truth, metasmoothness, seed_agreement

    if device != "cpu":
        check_device(device)
    _elsewhere(suite)
    known: dict[Any, Any] = {}
    rows, picked = [], planned_truths(suite, targets, truths)
    for s, t, name in picked:
        recipe, spec, file = t.recipe_of(name), t.plans[name], t.truths[name]
        row: dict[str, Any] = {"name": f"{s.name}-{t.label}-{name}", "recipe": recipe.as_dict(),
                               "fraction": spec.fraction}  # fmt: skip
        truth = None
        if file.exists():
            truth = Truth.load(file)
            ceiling = stats.noise_ceiling(truth.by_seed(), replicates=2)
            row |= {"seed_agreement": seed_agreement(truth),
                    "ceiling": ceiling.value if ceiling else None,
                    "additive_ceiling": _additive(truth)}  # fmt: skip
        key = (t.label, recipe, t.target.fraction, spec.start)
        if directions and key not in known:

            def tell(done: int, total: int, name: str = str(row["name"])) -> None:
                elsewhere.step()
                click.echo(f"{name}: training {done} of {total}", err=True)

            known[key] = metasmoothness(
                t.target, s.train, s.queries("test"), recipe=recipe, directions=directions,
                step=step, start=spec.start, device=device, on_run=tell,
            )  # fmt: skip
        if directions:
            found = known[key]
            row["metasmoothness"] = {"value": found.value, "error": finite_or_none(found.error),
                                     "directions": directions, "step": step}  # fmt: skip
            if save and truth is not None:
                check_inside(s, suite, file)
                plan = {**truth.plan, "metasmoothness": row["metasmoothness"]}
                replace(truth, plan=plan).save(file)
        rows.append(row)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for (_, t, name), r in zip(picked, rows):
        facts = [str(t.recipe_of(name))]
        if r.get("seed_agreement") is not None:
            facts.append(f"two seeds agree {r['seed_agreement']:.2f}")
        if r.get("ceiling") is not None:
            facts.append(f"noise ceiling {r['ceiling']:.2f}")
        if r.get("additive_ceiling") is not None:
            facts.append(f"additive ceiling {r['additive_ceiling']:.2f}")
        if "metasmoothness" in r:
            m = r["metasmoothness"]
            error = f" ± {m['error']:.2f}" if m["error"] is not None else ""
            facts.append(f"metasmoothness {m['value']:.2f}{error}")
        print_lines(f"{r['name']}: {'; '.join(facts)}")


def finite_or_none(value: float) -> float | None:
    """Returns a finite number for JSON, or None."""
    return value if value == value else None


@command.command(name="tune-recipe")
@click.argument("suite", default="pocket")
@click.option("--target", "target", help="Target label (default: the suite's main one).")
@click.option("--grid", "grid", multiple=True, metavar="FIELD=A,B,…",
              help="Values of a field of the recipe to try; repeatable.")  # fmt: skip
@click.option("--groups", type=click.IntRange(2), default=12, show_default=True,
              help="Random groups per recipe, two seeds each.")  # fmt: skip
@click.option("--directions", type=click.IntRange(0), default=2, show_default=True,
              help="Directions of metasmoothness; 0 skips it.")  # fmt: skip
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tune_recipe(
    suite: str,
    target: str | None,
    grid: tuple[str, ...],
    groups: int,
    directions: int,
    seed: int,
    as_json: bool,
) -> None:
    """Search for a recipe that is smooth and still learns.

    Every combination in the grid is tried on random groups of the target's fraction, evaluated on
    the suite's tuning queries: agreement of two seeds, metasmoothness, mean loss, and the seconds
    of a retraining. Other fields come from the target's recipe, which is the first row. No truth is
    read, and nothing is changed: declare the recipe of your choice under the target.

    \b
    Example:
      tdabench truth tune-recipe pocket --target instruct --grid lr=5e-4,1e-3 --grid eps=1e-8,1e-3
    """
    import itertools

    from tdabench.run.sources import load_suite
    from tdabench.targets import Recipe
    from tdabench.truth import try_recipe

    _elsewhere(suite)
    loaded = load_suite(suite, targets=(target,) if target else ())
    t = loaded.target(target) if target else loaded.main_targets[0]
    values: dict[str, list[str]] = {}
    for text in grid:
        name, equals, listed = text.partition("=")
        if not (equals and name and listed):
            raise UsageError(f"--grid {text!r} lacks the form FIELD=A,B,…", "Give lr=5e-4,1e-3")
        values[name] = listed.split(",")
    base = t.target.recipe
    recipes = [base]
    for chosen in itertools.product(*values.values()):
        recipe = Recipe.of(dict(zip(values, chosen)), base)
        if recipe not in recipes:
            recipes.append(recipe)
    trials = []
    if not as_json:
        click.echo(f"{'seeds agree':>11}  {'smoothness':>10}  {'loss':>6}  {'s each':>6}  recipe")
    for n, recipe in enumerate(recipes, start=1):

        def tell(done: int, total: int, n: int = n) -> None:
            elsewhere.step()
            if done % 10 == 0 or done == total:
                click.echo(f"recipe {n} of {len(recipes)}: training {done} of {total}", err=True)

        trial = try_recipe(
            t.target, loaded.train, loaded.queries("tuning"), recipe,
            groups=groups, directions=directions, seed=seed, on_run=tell,
        )  # fmt: skip
        trials.append(trial)
        if as_json:
            continue
        if trial.error:
            click.echo(f"{'-':>11}  {'-':>10}  {'-':>6}  {'-':>6}  {recipe}: {trial.error}")
        else:
            click.echo(
                f"{trial.agreement:11.2f}  {trial.smoothness:10.2f}  {trial.loss:6.3f}  "
                f"{trial.seconds:6.1f}  {recipe}"
            )
    if as_json:
        rows = [
            {"recipe": x.recipe.as_dict(), "error": x.error,
             **{k: finite_or_none(getattr(x, k))
                for k in ("loss", "agreement", "smoothness", "seconds")}}
            for x in trials
        ]  # fmt: skip
        click.echo(json.dumps(rows, indent=2))


@command.command()
@selection
@click.option("--units", type=click.IntRange(1), default=4, show_default=True,
              help="Retrainings to repeat for each truth.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Seed for the choice of retrainings.")
@click.option("--tolerance", default=1e-3, show_default=True,
              help="Largest mean difference of losses that counts as equal.")  # fmt: skip
def verify(
    suite: str,
    targets: tuple[str, ...],
    truths: tuple[str, ...],
    as_json: bool,
    units: int,
    workers: int,
    seed: int,
    tolerance: float,
) -> None:
    """Retrain a random sample of a truth and compare.

    On the type of machine that built the truth the losses are identical to the bit. Elsewhere they
    differ by rounding, which training amplifies. The reference is the difference between seeds.
    A truth that was stopped early (--until) must have been stopped where its rule says. Exits with
    1 if a truth does not agree.
    """
    import tempfile

    from tdabench.run.truths import check_stopped, draw_plan, planned_truths
    from tdabench.truth.verify import verify_truth

    _elsewhere(suite)
    rows = []
    for s, t, name in planned_truths(suite, targets, truths):
        s.verify(t.truths[name])
        if remark := check_stopped(s, t, name):
            warn(remark)
        with tempfile.TemporaryDirectory() as scratch:
            found = verify_truth(
                t.truths[name], draw_plan(s, t, name), t.target, s.train,
                s.queries(t.plans[name].queries), Path(scratch),
                n_units=units, workers=workers, seed=seed,
            )  # fmt: skip
        rows.append({**found, "agrees": found["mean_difference"] <= tolerance})
        if not as_json:
            r = rows[-1]
            verdict = "agrees" if r["agrees"] else "DOES NOT AGREE"
            click.echo(
                f"{r['name']}: {verdict}; {r['units']} retrainings repeated, mean difference of "
                f"losses {r['mean_difference']:.2e} (another seed: {r['between_seeds']:.2e}), "
                f"{r['identical']:.0%} identical to the bit"
            )
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    if not all(r["agrees"] for r in rows):
        sys.exit(1)


@command.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON lines file.")
def export(file: Path, out: Path) -> None:
    """Write a truth as JSON lines.

    A line has `train_subset` and `test_loss` (mean over seeds) of a group. AirRep's
    authors publish their truth in this layout.
    """
    from tdabench.truth.exchange import export_lds

    n = export_lds(file, out)
    print_lines(f"{n} groups written to {out}")


@command.command(name="import")
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE..."
)
@click.option("--train", required=True, type=click.Path(path_type=Path),
              help="The training corpus, or pool, that groups are drawn from.")  # fmt: skip
@click.option("--queries", type=click.Path(path_type=Path), help="The queries, in their order.")
@click.option("--masks", type=click.Path(path_type=Path), metavar="FILE",
              help="Groups of a file of arrays: bool [group, train], or indices.")  # fmt: skip
@click.option("--values", type=click.Choice(["loss", "margin"]),
              help="What the values are: lower is better, or higher.  [default: loss]")  # fmt: skip
@click.option("--left-out", is_flag=True,
              help="The masks name the examples that a group was trained without.")  # fmt: skip
@click.option("--split", type=int, help="For AirRep's training data: which dev set (dev_id).")
@click.option("--corpora", type=click.Path(path_type=Path), metavar="DIR",
              help="For AirRep's training data: folder for its two corpora.")  # fmt: skip
@click.option("--layout", default="auto", show_default=True, metavar="NAME",
              help="Layout of the corpora: native, flan, alpaca, chat, text.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The truth file.")
def import_(
    files: tuple[Path, ...],
    train: Path,
    queries: Path | None,
    masks: Path | None,
    values: str | None,
    left_out: bool,
    split: int | None,
    corpora: Path | None,
    layout: str,
    out: Path,
) -> None:
    """Convert a truth of another project to a truth file. Several FILEs are seeds.

    A FILE is a lds.jsonl of AirRep or STRIDE, a file of losses (.npy, .npz, .safetensors, .pt)
    with --masks, or a folder of dattri, bergson or AirRep. FILE#NAME names one array of several.
    Torch files are read by torch's safe loader: nothing in them is run.

    \b
    Examples:
      tdabench truth import lds.jsonl --train a.jsonl --queries q.jsonl --out t.safetensors
      tdabench truth import losses.pt --masks m.pt --train a.jsonl --queries q.jsonl --out t.safetensors
      tdabench truth import losses/ --masks m.jsonl --split 0 --train a.jsonl --corpora c --out t.safetensors
    """  # noqa: E501
    from tdabench.data.files import read_corpus, write_jsonl
    from tdabench.data.layouts import Reading
    from tdabench.truth.exchange import import_bank, import_truth

    reading = Reading(layout=layout, empty="keep")
    pool = read_corpus(train, reading)
    if any(next(f.glob("loss-*.json"), None) for f in files if f.is_dir()):
        if masks is None or split is None or corpora is None or len(files) > 1:
            raise UsageError(
                f"{files[0]} holds losses of AirRep's training data",
                "Give --masks INDEX.jsonl, --split N and --corpora DIR, and one folder",
            )
        truth, pool, asked = import_bank(files[0], masks, pool, split)
        for name, corpus in (("train", pool), ("test", asked)):
            place = corpora / f"{name}.jsonl"
            if place.exists():
                raise UsageError(f"{place} exists", "Choose another folder with --corpora")
            write_jsonl(place, corpus)
    elif split is not None or corpora is not None:
        raise UsageError("--split and --corpora belong to a folder of loss-*.json (AirRep)")
    elif queries is None:
        raise UsageError(
            "--queries is missing", "Give the queries that the losses were measured on"
        )
    else:
        truth = import_truth(
            files, pool, read_corpus(queries, reading),
            masks=masks, values=values or "", left_out=left_out,
        )  # fmt: skip
    truth.save(out)
    click.echo(
        f"{len(truth.groups)} groups, {truth.n_seeds} seeds, {len(truth.query_ids)} queries "
        f"written to {out}"
    )
