"""Building a truth: one small checksummed file a retraining, so that a build can stop anywhere.

A unit's losses depend on the plan and on nothing else: not on the engine, the number of workers
or the order. A build's folder holds

plan.safetensors                  the plan; a folder is of one plan
units/<unit>.safetensors          losses of a finished retraining, with the plan's key
failed/<unit>.json                why a retraining failed; gone once it succeeds
checkpoints/<unit>/step-<n>.safetensors   where the recipe keeps any
claims                            locked byte by byte: which units somebody works on now
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
except ImportError:  # Windows: two builders on one folder do some units twice, to the same bytes
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
) -> list[Unit]:
    """Does the plan's missing units and stores each in `folder`; returns those that failed.

    `engine` says where; without one, `workers` processes of this machine. `shard=(i, n)` does
    every n-th unit, beginning with the i-th. Finished units are kept and never redone; a damaged
    one is. A unit that fails is retried at the end, `retries` times, then recorded with its
    reason, and tried again by the next build. Builders on one folder share its units: each waits
    for what another is doing. `note` is told of retries and repairs.

    Raises GuardError when the plan is for other data, DataError when the folder is another
    plan's, TdabenchError when a result cannot be written: what was written stays.
    """
    units = plan.units()[shard[0] :: shard[1]]
    return build_units(
        plan, target, train, queries, folder, units, workers=workers, engine=engine,
        retries=retries, on_unit=on_unit, note=note,
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
) -> list[Unit]:
    """The same for chosen units."""
    folder = Path(folder)
    plan.check(target, train, queries)
    claim(plan, folder)
    todo = []
    for unit in units:
        try:
            if read_row(plan, folder, unit) is None:
                todo.append(unit)
        except DamagedRow as e:
            note(f"{unit.name} is done again: {e.message}")
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
                    note(f"{unit.name} failed and is tried again: {result}")
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
    """Writes the plan into `folder`, or checks that the folder is this plan's."""
    path = folder / "plan.safetensors"
    if path.exists():
        there = TruthPlan.load(path)
        if there.key != plan.key:
            raise DataError(
                f"{folder} holds another truth's build ({there.name}, plan {there.key}, not "
                f"{plan.key})",
                "Choose another folder",
            )
    else:
        names = ["units", "failed", "claims", "checkpoints", "truth.safetensors", path.name]
        check_free(folder, names, mine=False, option="--work")
        plan.save(path)


def store(plan: TruthPlan, folder: Path, unit: Unit, result: UnitResult) -> None:
    """Writes a unit's checkpoints, then its row: the row is the sign that all of it is there."""
    for step, weights in result.checkpoints.items():
        write_arrays(
            checkpoint_path(folder, unit, step), weights,
            {"unit": unit.name, "plan": plan.key, "step": step},
        )  # fmt: skip
    meta = {"unit": unit.name, "plan": plan.key}
    if result.made_by:
        meta["made_by"] = result.made_by
    write_arrays(unit_path(folder, unit), {"losses": result.losses}, meta)
    failure_path(folder, unit).unlink(missing_ok=True)


class DamagedRow(DataError):
    """A row that cannot be read: building again mends it."""


def read_row(plan: TruthPlan, folder: Path, unit: Unit) -> np.ndarray | None:
    """The losses of a unit, float32 [query]; None when it is not done.

    Raises DataError for a row that is damaged or belongs to another plan.
    """
    found = _read_row(plan, folder, unit)
    return found[0] if found else None


def _read_row(plan: TruthPlan, folder: Path, unit: Unit) -> tuple[np.ndarray, str] | None:
    """The losses, and the way of training that rounds otherwise ("" for the usual one)."""
    path = unit_path(folder, unit)
    if not path.exists():
        return None
    try:
        arrays, meta = read_arrays(path)
        losses = arrays["losses"]
    except DataError as e:
        raise DamagedRow(e.message, "Run the build again: it redoes this retraining") from e
    except KeyError as e:
        raise DamagedRow(f"{path} holds no losses", "Run the build again") from e
    if meta.get("plan") != plan.key or meta.get("unit") != unit.name:
        raise DataError(f"{path} belongs to another plan", "Delete it and build again")
    if losses.shape != (len(plan.query_ids),):
        raise DamagedRow(f"{path} holds {losses.size} losses", "Run the build again")
    return losses, str(meta.get("made_by", ""))


def finished(plan: TruthPlan, folder: Path) -> list[Unit]:
    """The units whose result lies in `folder`."""
    return [u for u in plan.units() if unit_path(folder, u).exists()]


@dataclass(frozen=True)
class Survey:
    """How far a build has come: units done, their damaged rows, and why others failed."""

    done: tuple[Unit, ...]
    damaged: tuple[Unit, ...]
    failed: dict[Unit, str]


def survey(plan: TruthPlan, folder: Path, units: Sequence[Unit] | None = None) -> Survey:
    """Reads every row of a build's folder (or of some units).

    Raises DataError when one is another plan's.
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


def collect(plan: TruthPlan, folder: Path) -> Truth:
    """The truth from a folder with every unit done. Raises DataError naming what is missing.

    Where units were trained in a way that rounds otherwise, the truth records it ("made_by").
    """
    losses = np.full(
        (len(plan.groups), plan.n_seeds, len(plan.query_ids)), np.nan, dtype=np.float32
    )
    missing, ways = [], set()
    for unit in plan.units():
        row = _read_row(plan, folder, unit)
        if row is None:
            missing.append(unit)
        else:
            losses[unit.group, unit.seed] = row[0]
            ways.add(row[1])
    if missing:
        failed = sum(failure_path(folder, u).exists() for u in missing)
        raise DataError(
            f"{len(missing)} of {len(plan.units())} retrainings of {plan.name!r} are missing, "
            f"first {missing[0].name}" + (f"; {failed} failed" if failed else ""),
            "Run the build again: it goes on where it stopped",
        )
    made_by = {"made_by": sorted(ways - {""})} if ways - {""} else {}
    return Truth(losses, plan.groups, plan.query_ids, {**plan.describe(), **made_by})


def unit_path(folder: Path, unit: Unit) -> Path:
    """Where the losses of a unit lie."""
    return folder / "units" / f"{unit.name}.safetensors"


def failure_path(folder: Path, unit: Unit) -> Path:
    """Where it is recorded that a unit failed."""
    return folder / "failed" / f"{unit.name}.json"


def checkpoint_path(folder: Path, unit: Unit, step: int) -> Path:
    """Where the weights of a unit after `step` steps lie, if the recipe keeps them."""
    return folder / "checkpoints" / unit.name / f"step-{step:06d}.safetensors"


# --------------------------------------------------------------------------- sharing a folder


@dataclass
class _Queue:
    """Units still to be done, claimed as they are taken."""

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
        """The next unit that nobody else works on."""
        while self.waiting:
            unit = self.waiting.popleft()
            if unit in self.attempts:  # ours already
                self.attempts[unit] += 1
                return unit
            if not self.claims.take(unit):
                self.elsewhere.append(unit)
            elif unit_path(self.folder, unit).exists():  # done elsewhere since we looked
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
        """Waits until a unit of another builder is done or free again; returns those done."""
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
    """A file with one byte a unit, locked while somebody works on it.

    The system drops the locks of a process that ends, however it ends, so no claim outlives its
    builder. Where locks cannot be had, everybody may claim everything: a unit is then done twice,
    to the same bytes.
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
        """Whether nobody else holds the unit."""
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
