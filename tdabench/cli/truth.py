"""`tdabench truth`: plan, build, look at, verify and move ground truth."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tdabench.errors import UsageError, unknown

if TYPE_CHECKING:
    from tdabench.run.suite import Suite, SuiteTarget
    from tdabench.truth import Truth, TruthPlan


@click.group(name="truth")
def command() -> None:
    """Ground truth by retraining: plan, build, status, verify, export, import.

    A truth is one loss per (group, seed, query). A suite declares how each of its truths is made;
    a build does one retraining a unit, keeps every finished one, and goes on where it stopped.

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


def chosen(
    suite_name: str, targets: tuple[str, ...], truths: tuple[str, ...]
) -> list[tuple[Suite, SuiteTarget, str]]:
    """Every (suite, target, truth name) asked for that the suite knows how to make."""
    from tdabench.run.suite import load_suite

    suite = load_suite(suite_name)
    out = []
    for target in [suite.target(t) for t in targets] if targets else suite.targets:
        for name in truths or target.plans:
            if name not in target.truths:
                raise unknown(f"truth of target {target.label}", name, target.truths)
            if name not in target.plans:
                if truths:
                    raise UsageError(
                        f"{suite.path} declares no plan for the truth {name!r} of {target.label}",
                        f"Add [targets.plans.{name}] with groups, fraction and seeds",
                    )
                continue
            out.append((suite, target, name))
    if not out:
        raise UsageError(f"suite {suite.name} declares no truth that can be built here")
    return out


def draw(suite: Suite, target: SuiteTarget, name: str) -> TruthPlan:
    """The plan that the suite declares. Deterministic: the same suite draws the same groups."""
    from tdabench.targets import Recipe
    from tdabench.truth import TruthPlan

    spec = target.plans[name]
    try:
        recipe = Recipe(**spec.recipe)
    except TypeError as e:
        raise UsageError(f"{suite.path}: plan {name!r}: {e}") from e
    return TruthPlan.draw(
        f"{suite.name}-{target.label}-{name}",
        target.target,
        suite.train,
        suite.queries(spec.queries),
        n_groups=spec.groups,
        fraction=spec.fraction,
        n_seeds=spec.seeds,
        recipe=recipe,
        start=spec.start,
        order=spec.order,
        groups_of=spec.groups_of,
    )


def work_folder(work: Path, plan: TruthPlan) -> Path:
    return work / plan.name


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
    """What would be retrained: groups, seeds, recipe, number of retrainings.

    \b
    Example:
      tdabench truth plan pocket --target instruct --truth lds --out plan.safetensors
    """
    rows = []
    picked = chosen(suite, targets, truths)
    if out and len(picked) > 1:
        raise UsageError("--out takes one plan", "Name it with --target and --truth")
    for s, t, name in picked:
        p = draw(s, t, name)
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
        raise UsageError(f"--shard {text!r} is not of the form i/n", "For example 3/8") from None
    if not 1 <= i <= n:
        raise UsageError(f"--shard {text!r}: i must be from 1 to n")
    return i - 1, n


@command.command()
@selection
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True,
              help="Processes, one thread each.")  # fmt: skip
@click.option("--shard", default="1/1", show_default=True, help="Do only the i-th of n parts.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("truth-builds"),
              show_default=True, help="Where finished retrainings are kept.")  # fmt: skip
@click.option("--in-place", is_flag=True, help="Write the finished truth into the suite's folder.")
def build(
    suite: str,
    targets: tuple[str, ...],
    truths: tuple[str, ...],
    as_json: bool,
    workers: int,
    shard: str,
    work: Path,
    in_place: bool,
) -> None:
    """Does the missing retrainings; writes the truth once all of them are there.

    Stop it at any moment: finished retrainings are kept, and the same command goes on. To
    spread a build over machines, give each a --shard and copy the work folders together.

    \b
    Example:
      tdabench truth build pocket --target instruct --truth lds --workers 2
    """
    from tdabench.truth import build as build_units
    from tdabench.truth import collect, finished

    part = _shard(shard)
    results, broken = [], 0
    for s, t, name in chosen(suite, targets, truths):
        p = draw(s, t, name)
        folder = work_folder(work, p)
        queries = s.queries(t.plans[name].queries)
        progress = _Progress(p, len(finished(p, folder)), part)
        failed = build_units(
            p, t.target, s.train, queries, folder,
            workers=workers, shard=part, on_unit=progress,
        )  # fmt: skip
        done = len(finished(p, folder))
        row: dict[str, Any] = {"name": p.name, "done": done, "of": len(p.units()),
                               "failed": [u.name for u in failed]}  # fmt: skip
        if done == len(p.units()):
            out = t.truths[name] if in_place else folder / "truth.safetensors"
            collect(p, folder).save(out)
            row["file"] = str(out)
        broken += len(failed)
        results.append(row)
    if as_json:
        click.echo(json.dumps(results, indent=2))
    else:
        for row in results:
            where = f", written to {row['file']}" if "file" in row else ""
            click.echo(f"{row['name']}: {row['done']} of {row['of']} retrainings{where}")
    if broken:
        sys.exit(1)


class _Progress:
    """A line on stderr every ten seconds, and one a failure."""

    def __init__(self, plan: TruthPlan, already: int, shard: tuple[int, int]) -> None:
        self.plan, self.total = plan, len(plan.units()[shard[0] :: shard[1]])
        self.done = already if shard[1] == 1 else 0
        self.fresh, self.failed = 0, 0
        self.began = self.last = time.monotonic()

    def __call__(self, unit: Any, reason: str) -> None:
        self.done += 1
        self.fresh += 1
        if reason:
            self.failed += 1
            click.echo(f"{self.plan.name} {unit.name} failed: {reason}", err=True)
        now = time.monotonic()
        if now - self.last < 10 and self.done < self.total:
            return
        self.last = now
        pace = (now - self.began) / self.fresh
        left = max(0, self.total - self.done) * pace
        click.echo(
            f"{self.plan.name}: {self.done}/{self.total} retrainings, {pace:.2f} s each, "
            f"{left / 60:.0f} min left" + (f", {self.failed} failed" if self.failed else ""),
            err=True,
        )


@command.command()
@selection
@click.option("--work", type=click.Path(path_type=Path), default=Path("truth-builds"),
              show_default=True)  # fmt: skip
def status(
    suite: str, targets: tuple[str, ...], truths: tuple[str, ...], as_json: bool, work: Path
) -> None:
    """Which truths are there, how noisy they are, and how far a build has come."""
    from tdabench.errors import TdabenchError
    from tdabench.truth import Truth, finished

    rows = []
    for s, t, name in chosen(suite, targets, truths):
        p = draw(s, t, name)
        file = t.truths[name]
        row: dict[str, Any] = {"name": p.name, "file": str(file), "retrainings": len(p.units()),
                               "built": len(finished(p, work_folder(work, p)))}  # fmt: skip
        if file.exists():
            try:
                s.verify(file)
                row |= _describe(Truth.load(file), p)
            except TdabenchError as e:
                row["state"] = str(e)
        else:
            row["state"] = "not there"
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
        click.echo(f"{r['name']}: {r['state']}{facts}; {r['built']}/{r['retrainings']} built here")


def _describe(truth: Truth, plan: TruthPlan) -> dict[str, Any]:
    from tdabench import stats

    same = truth.groups.fingerprint == plan.groups.fingerprint and truth.plan == plan.describe()
    out: dict[str, Any] = {
        "state": "complete" if same else "complete, but not as the suite plans it now",
        "groups": len(truth.groups),
        "seeds": truth.n_seeds,
        "queries": len(truth.query_ids),
    }
    ceiling = stats.noise_ceiling(truth.by_seed(), replicates=2)
    if ceiling is not None:
        out |= {"ceiling": ceiling.value, "split_half": ceiling.split_half}
    return out


@command.command()
@selection
@click.option("--units", type=click.IntRange(1), default=4, show_default=True,
              help="Retrainings to repeat for each truth.")  # fmt: skip
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Draws which retrainings.")
@click.option("--tolerance", default=1e-3, show_default=True,
              help="Largest mean difference of losses that counts as the same.")  # fmt: skip
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
    """Retrains a random sample of a shipped truth and reports how well it agrees.

    On the machine type that made the truth the losses are the same to the bit; elsewhere they
    differ by rounding, which training amplifies. The yardstick is what another seed changes.
    Exits with 1 when a truth does not agree.
    """
    import tempfile

    from tdabench.truth.verify import verify_truth

    rows = []
    for s, t, name in chosen(suite, targets, truths):
        s.verify(t.truths[name])
        with tempfile.TemporaryDirectory() as scratch:
            found = verify_truth(
                t.truths[name], draw(s, t, name), t.target, s.train,
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
    """Writes a truth as JSON lines: `train_subset` and `test_loss` (mean over seeds) a group.

    This is the layout of the truth that AirRep's authors publish.
    """
    from tdabench.truth.exchange import export_lds

    n = export_lds(file, out)
    click.echo(f"{n} groups written to {out}")


@command.command(name="import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--train", required=True, type=click.Path(path_type=Path), help="JSON lines corpus.")
@click.option("--queries", required=True, type=click.Path(path_type=Path), help="JSON lines.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def import_(file: Path, train: Path, queries: Path, out: Path) -> None:
    """Reads a published `lds.jsonl` (train_subset, test_loss) into a truth file."""
    from tdabench.data import read_jsonl
    from tdabench.truth.exchange import import_lds

    truth = import_lds(file, read_jsonl(train), read_jsonl(queries))
    truth.save(out)
    click.echo(
        f"{len(truth.groups)} groups, {truth.n_seeds} seeds, {len(truth.query_ids)} queries "
        f"written to {out}"
    )
