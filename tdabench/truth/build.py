"""Builds a truth as one small checksummed file per retraining, so that a build can stop any time.

A unit's losses depend on nothing but the plan: not on the engine, the number of workers or the
order. A build's folder contains

plan.safetensors                  the plan; one per folder
units/<unit>.safetensors          losses of a finished retraining, with the plan's key
failed/<unit>.json                why a retraining failed; removed once it succeeds
checkpoints/<unit>/step-<n>.safetensors   if the recipe keeps any
claims                            locked byte by byte for units in progress
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tdabench.data.examples import Corpus
from tdabench.errors import DataError, TdabenchError
from tdabench.io import check_free, read_arrays, read_json, write_arrays, write_json
from tdabench.targets.target import Target
from tdabench.truth.engines import Engine, InProcess, Pool, UnitResult, UnitTrainer
from tdabench.truth.plan import TruthPlan, Unit
from tdabench.truth.store import Truth

try:
    import fcntl
except ImportError:  # Windows: builders on one folder train some units twice, identically
    fcntl = None  # type: ignore[assignment]

OnUnit = Callable[[Unit, str], None]  # (unit, "" or the reason it failed)
Note = Callable[[str], None]


def build(
    plan: TruthPlan,
    target: Target,
    train: Corpus,
    queries: Corpus,
    folder: Path,
    *,
    workers: int = 1,
    engine: Engine | None = None,
    shard: tuple[int, int] = (0, 1),
    retries: int = 1,
    on_unit: OnUnit = lambda unit, reason: None,
    note: Note = lambda line: None,
    on_retry: OnUnit | None = None,
) -> list[Unit]:
    """Trains the plan's missing units and stores each in `folder`; returns those that failed.

    `engine` decides where; by default `workers` processes on this machine. `shard=(i, n)` trains
    every n-th unit, starting with the i-th. Finished units are kept and never retrained, except
    damaged ones. A failed unit is retried at the end, `retries` times, then recorded with its
    reason, and retried by the next build. Builders on one folder share its units: each waits for
    units in progress elsewhere. `note` receives repairs, and retries, unless `on_retry` does.

    Raises GuardError if the plan is for other data, DataError if the folder belongs to another
    plan, and TdabenchError if a result cannot be written; results already written are kept.
    """
    units = plan.units()[shard[0] :: shard[1]]
    return build_units(
        plan, target, train, queries, folder, units, workers=workers, engine=engine,
        retries=retries, on_unit=on_unit, note=note, on_retry=on_retry,
    )  # fmt: skip


def build_units(
    plan: TruthPlan,
    target: Target,
    train: Corpus,
    queries: Corpus,
    folder: Path,
    units: Sequence[Unit],
    *,
    workers: int = 1,
    engine: Engine | None = None,
    retries: int = 1,
    on_unit: OnUnit = lambda unit, reason: None,
    note: Note = lambda line: None,
    on_retry: OnUnit | None = None,
) -> list[Unit]:
    """Trains the given units like `build`."""
    folder = Path(folder)
    plan.check(target, train, queries)
    claim(plan, folder)
    todo = []
    for unit in units:
        try:
            if read_row(plan, folder, unit) is None:
                todo.append(unit)
        except DamagedRow as e:
            note(f"{unit.name} is trained again: {e.message}")
            unit_path(folder, unit).unlink(missing_ok=True)
            todo.append(unit)
    if not todo:
        return []
    if engine is None:
        workers = min(workers, len(todo))
        engine = Pool(workers) if workers > 1 else InProcess()
    trainer = UnitTrainer.of(plan, target, train, queries)
    queue = _Queue(plan, folder, todo)
    failed = []
    try:
        while queue.left():
            for unit, result in engine.run(trainer, queue.take, note):
                if isinstance(result, UnitResult):
                    store(plan, folder, unit, result)
                    reason = ""
                elif queue.attempts[unit] <= retries:
                    if on_retry is not None:
                        on_retry(unit, result)
                    else:
                        note(f"{unit.name} failed and is retried: {result}")
                    queue.put_back(unit)
                    continue
                else:
                    failed.append(unit)
                    reason = result
                    write_json(
                        failure_path(folder, unit),
                        {"unit": unit.name, "plan": plan.key, "reason": reason,
                         "attempts": queue.attempts[unit]},
                    )  # fmt: skip
                queue.close(unit)
                on_unit(unit, reason)
            for unit in queue.wait_for_others():
                on_unit(unit, "")
    finally:
        queue.release()
    return failed


def claim(plan: TruthPlan, folder: Path) -> None:
    """Writes the plan into `folder`, or checks that the folder belongs to this plan."""
    path = folder / "plan.safetensors"
    if path.exists():
        there = TruthPlan.load(path)
        if there.key != plan.key:
            raise DataError(
                f"{folder} contains another truth's build ({there.name}, plan {there.key}, not "
                f"{plan.key})",
                "Choose another folder",
            )
    else:
        names = ["units", "failed", "claims", "checkpoints", "truth.safetensors", path.name]
        check_free(folder, names, mine=False, option="--work")
        plan.save(path)


def store(plan: TruthPlan, folder: Path, unit: Unit, result: UnitResult) -> None:
    """Writes a unit's checkpoints, then its row, which marks the unit as complete."""
    for step, weights in result.checkpoints.items():
        write_arrays(
            checkpoint_path(folder, unit, step), weights,
            {"unit": unit.name, "plan": plan.key, "step": step},
        )  # fmt: skip
    meta: dict[str, Any] = {"unit": unit.name, "plan": plan.key}
    if result.made_by:
        meta["made_by"] = result.made_by
    if result.cpu_seconds:
        meta["cpu_seconds"] = round(result.cpu_seconds, 3)
    write_arrays(unit_path(folder, unit), {"losses": result.losses}, meta)
    failure_path(folder, unit).unlink(missing_ok=True)


class DamagedRow(DataError):
    """A row that cannot be read; building again repairs it."""


class Row(NamedTuple):
    """A finished unit as it is on disk."""

    losses: np.ndarray  # float32 [query]
    made_by: str  # a training mode that rounds differently ("" by default)
    cpu_seconds: float | None  # processor time of the retraining; None if it was not measured


def read_row(plan: TruthPlan, folder: Path, unit: Unit) -> Row | None:
    """Reads the row of a unit; None if it is not finished.

    Raises DataError for a row that is damaged or belongs to another plan.
    """
    path = unit_path(folder, unit)
    if not path.exists():
        return None
    try:
        arrays, meta = read_arrays(path)
        losses = arrays["losses"]
    except DataError as e:
        raise DamagedRow(e.message, "Run the build again to repeat this retraining") from e
    except KeyError as e:
        raise DamagedRow(f"{path} contains no losses", "Run the build again") from e
    if meta.get("plan") != plan.key or meta.get("unit") != unit.name:
        raise DataError(f"{path} belongs to another plan", "Delete it and build again")
    if losses.shape != (len(plan.query_ids),):
        raise DamagedRow(f"{path} holds {losses.size} losses", "Run the build again")
    seconds = meta.get("cpu_seconds")
    return Row(losses, str(meta.get("made_by", "")), None if seconds is None else float(seconds))


def finished(plan: TruthPlan, folder: Path) -> list[Unit]:
    """Returns the units with a result in `folder`."""
    return [u for u in plan.units() if unit_path(folder, u).exists()]


@dataclass(frozen=True)
class Survey:
    """Progress of a build: finished units, damaged rows, and reasons of failed units."""

    done: tuple[Unit, ...]
    damaged: tuple[Unit, ...]
    failed: dict[Unit, str]


def survey(plan: TruthPlan, folder: Path, units: Sequence[Unit] | None = None) -> Survey:
    """Reads every row of a build's folder (or of the given units).

    Raises DataError if a row belongs to another plan.
    """
    done, damaged, failed = [], [], {}
    for unit in plan.units() if units is None else units:
        path = failure_path(folder, unit)
        try:
            if read_row(plan, folder, unit) is not None:
                done.append(unit)
            elif path.exists() and (record := read_json(path)).get("plan") == plan.key:
                failed[unit] = str(record.get("reason", ""))
        except DamagedRow:
            damaged.append(unit)
    return Survey(tuple(done), tuple(damaged), failed)


def collect(plan: TruthPlan, folder: Path, stopped: Mapping[str, Any] | None = None) -> Truth:
    """Collects the truth from a folder of finished units. Raises DataError naming missing ones.

    `stopped` says how `build_until` ended the build early, if it did: the truth then has the
    plan's first `stopped["groups"]` groups, and records this. If units were trained in a mode that
    rounds differently, the truth records it ("made_by").
    """
    n = stopped["groups"] if stopped else len(plan.groups)
    losses = np.full((n, plan.n_seeds, len(plan.query_ids)), np.nan, dtype=np.float32)
    units = [u for u in plan.units() if u.group < n]
    missing, ways = [], set()
    for unit in units:
        row = read_row(plan, folder, unit)
        if row is None:
            missing.append(unit)
        else:
            losses[unit.group, unit.seed] = row.losses
            ways.add(row.made_by)
    if missing:
        failed = sum(failure_path(folder, u).exists() for u in missing)
        raise DataError(
            f"{len(missing)} of {len(units)} retrainings of {plan.name!r} are missing, "
            f"first {missing[0].name}" + (f"; {failed} failed" if failed else ""),
            "Run the build again to resume it",
        )
    made_by = {"made_by": sorted(ways - {""})} if ways - {""} else {}
    ended = {"stopped": dict(stopped)} if stopped else {}
    groups = plan.groups[:n] if stopped else plan.groups
    return Truth(losses, groups, plan.query_ids, {**plan.describe(), **made_by, **ended})


def unit_path(folder: Path, unit: Unit) -> Path:
    """Returns the path of a unit's losses."""
    return folder / "units" / f"{unit.name}.safetensors"


def failure_path(folder: Path, unit: Unit) -> Path:
    """Returns the path of a unit's failure record."""
    return folder / "failed" / f"{unit.name}.json"


def checkpoint_path(folder: Path, unit: Unit, step: int) -> Path:
    """Returns the path of a unit's weights after `step` steps, if the recipe keeps them."""
    return folder / "checkpoints" / unit.name / f"step-{step:06d}.safetensors"


# --------------------------------------------------------------------------- sharing a folder


@dataclass
class _Queue:
    """Units to train, claimed when they are taken."""

    plan: TruthPlan
    folder: Path
    todo: Sequence[Unit]
    attempts: dict[Unit, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.waiting = deque(self.todo)
        self.elsewhere: list[Unit] = []  # another builder has claimed them
        self.claims = _Claims(self.folder / "claims", self.plan.units())

    def left(self) -> bool:
        return bool(self.waiting or self.elsewhere)

    def take(self) -> Unit | None:
        """Returns the next unit that no other builder is training."""
        while self.waiting:
            unit = self.waiting.popleft()
            if unit in self.attempts:  # already claimed here
                self.attempts[unit] += 1
                return unit
            if not self.claims.take(unit):
                self.elsewhere.append(unit)
            elif unit_path(self.folder, unit).exists():  # finished elsewhere in the meantime
                self.claims.drop(unit)
                self.elsewhere.append(unit)
            else:
                for torn in unit_path(self.folder, unit).parent.glob(f".{unit.name}.*.tmp"):
                    torn.unlink(missing_ok=True)  # its writer died
                self.attempts[unit] = 1
                return unit
        return None

    def put_back(self, unit: Unit) -> None:
        self.waiting.append(unit)

    def close(self, unit: Unit) -> None:
        self.claims.drop(unit)

    def wait_for_others(self) -> list[Unit]:
        """Waits until a unit of another builder is finished or free; returns finished units."""
        while self.elsewhere and not self.waiting:
            done = [u for u in self.elsewhere if unit_path(self.folder, u).exists()]
            rest = [u for u in self.elsewhere if u not in set(done)]
            free = [u for u in rest if self.claims.free(u)]
            self.elsewhere = [u for u in rest if u not in set(free)]
            self.waiting.extend(free)
            if done:
                return done
            if not free:
                time.sleep(0.5)
        return []

    def release(self) -> None:
        self.claims.close()


class _Claims:
    """A file with one byte per unit, locked while a builder trains the unit.

    The system drops the locks of a process that ends in any way, so no claim outlives its
    builder. Without locks, every builder may claim every unit: a unit is then trained twice, with
    identical results.
    """

    def __init__(self, path: Path, units: Sequence[Unit]) -> None:
        self.place = {u: i for i, u in enumerate(units)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise TdabenchError(
                f"cannot write {path}: {e.strerror}", "Choose another folder"
            ) from e

    def take(self, unit: Unit) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self.place[unit])
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks
            return True
        return True

    def free(self, unit: Unit) -> bool:
        """Tells whether no other builder holds the unit."""
        if not self.take(unit):
            return False
        self.drop(unit)
        return True

    def drop(self, unit: Unit) -> None:
        if fcntl is not None:
            try:
                fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, self.place[unit])
            except OSError:
                pass

    def close(self) -> None:
        os.close(self.fd)
