"""Building a truth: one small checksummed file a retraining, so that a build can stop anywhere.

A unit's losses depend on the plan and on nothing else: not on the engine, the number of workers
or the order. Workers use one thread each: two threads in each of two processes run many times
slower than one each.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tdabench.data.examples import Corpus
from tdabench.errors import DataError, TdabenchError
from tdabench.io import read_arrays, write_arrays
from tdabench.targets.target import Target, Tokens
from tdabench.targets.training import finetune
from tdabench.truth.plan import TruthPlan, Unit
from tdabench.truth.store import Truth

OnUnit = Callable[[Unit, str], None]  # (unit, "" or the reason it failed)


@dataclass
class Trainer:
    """What every unit of a plan shares: the target, and both corpora tokenised once."""

    plan: TruthPlan
    target: Target
    train: list[Tokens]
    queries: list[Tokens]

    @classmethod
    def of(cls, plan: TruthPlan, target: Target, train: Corpus, queries: Corpus) -> Trainer:
        plan.check(target, train, queries)
        return cls(plan, target, target.tokenize(train), target.tokenize(queries))

    def losses(self, unit: Unit) -> np.ndarray:
        """Retrains on the unit's group and evaluates: float32 [query]."""
        seed = self.plan.run_seed(unit)
        model = self.target.fresh_model(self.plan.start, seed)
        group, tokens, members = self.plan.groups[unit.group], self.train, None
        if self.plan.order == "pool":
            members = np.isin(np.arange(len(tokens)), group)
        else:
            tokens = [self.train[i] for i in group]
        finetune(model, tokens, self.plan.recipe, seed, self.target.pad_id, members=members)
        return self.target.losses(model, self.queries)


def build(
    plan: TruthPlan,
    target: Target,
    train: Corpus,
    queries: Corpus,
    folder: Path,
    *,
    workers: int = 1,
    shard: tuple[int, int] = (0, 1),
    retries: int = 1,
    on_unit: OnUnit = lambda unit, reason: None,
) -> list[Unit]:
    """Does the plan's missing units and stores each in `folder`; returns those that failed.

    `shard=(i, n)` does every n-th unit, beginning with the i-th. Finished units are kept and
    never redone. A unit that fails is retried, then reported with its reason; the rest goes on.
    """
    units = plan.units()[shard[0] :: shard[1]]
    return build_units(
        plan, target, train, queries, folder, units,
        workers=workers, retries=retries, on_unit=on_unit,
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
    retries: int = 1,
    on_unit: OnUnit = lambda unit, reason: None,
) -> list[Unit]:
    """The same for chosen units."""
    folder = Path(folder)
    plan.check(target, train, queries)
    claim(plan, folder)
    todo = [u for u in units if not unit_path(folder, u).exists()]
    if not todo:
        return []
    trainer = Trainer.of(plan, target, train, queries)
    failed = []
    for unit, result in _engine(trainer, todo, min(workers, max(1, len(todo))), retries):
        if isinstance(result, np.ndarray):
            write_arrays(
                unit_path(folder, unit), {"losses": result}, {"unit": unit.name, "plan": plan.key}
            )
            on_unit(unit, "")
        else:
            failed.append(unit)
            on_unit(unit, result)
    return failed


def claim(plan: TruthPlan, folder: Path) -> None:
    """Writes the plan into `folder`, or checks that the folder is this plan's."""
    path = folder / "plan.safetensors"
    if path.exists():
        if TruthPlan.load(path).key != plan.key:
            raise DataError(f"{folder} holds another truth's build", "Choose another folder")
    else:
        plan.save(path)


def finished(plan: TruthPlan, folder: Path) -> list[Unit]:
    """The units whose result lies in `folder`."""
    return [u for u in plan.units() if unit_path(folder, u).exists()]


def collect(plan: TruthPlan, folder: Path) -> Truth:
    """The truth from a folder with every unit done. Raises DataError naming what is missing."""
    losses = np.full(
        (len(plan.groups), plan.n_seeds, len(plan.query_ids)), np.nan, dtype=np.float32
    )
    missing = []
    for unit in plan.units():
        path = unit_path(folder, unit)
        if not path.exists():
            missing.append(unit)
            continue
        arrays, meta = read_arrays(path)
        if meta.get("plan") != plan.key or meta.get("unit") != unit.name:
            raise DataError(f"{path} belongs to another plan", "Delete it and build again")
        losses[unit.group, unit.seed] = arrays["losses"]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(plan.units())} retrainings of {plan.name!r} are missing, "
            f"first {missing[0].name}",
            "Run the build again: it goes on where it stopped",
        )
    return Truth(losses, plan.groups, plan.query_ids, plan.describe())


def unit_path(folder: Path, unit: Unit) -> Path:
    """Where the losses of a unit lie."""
    return folder / "units" / f"{unit.name}.safetensors"


# --------------------------------------------------------------------------- engines

_trainer: Trainer | None = None


def _engine(
    trainer: Trainer, todo: Sequence[Unit], workers: int, retries: int
) -> Iterable[tuple[Unit, np.ndarray | str]]:
    """Yields (unit, losses or the reason of its failure) as units finish."""
    if workers <= 1:
        for unit in todo:
            yield unit, _attempt(trainer, unit, retries)
        return
    yield from _pool(trainer, list(todo), workers, retries)


def _attempt(trainer: Trainer, unit: Unit, retries: int) -> np.ndarray | str:
    reason = ""
    for _ in range(retries + 1):
        try:
            return trainer.losses(unit)
        except (TdabenchError, RuntimeError, MemoryError) as e:
            reason = f"{type(e).__name__}: {e}"
    return reason


def _pool(
    trainer: Trainer, todo: list[Unit], workers: int, retries: int
) -> Iterable[tuple[Unit, np.ndarray | str]]:
    """A pool of one-thread processes. A worker that is killed costs its units one attempt."""
    attempts = dict.fromkeys(todo, 0)
    while todo:
        broken = False
        with ProcessPoolExecutor(
            workers,
            multiprocessing.get_context("spawn"),
            _start_worker,
            (trainer, os.getpid()),
        ) as pool:
            futures: dict[Future, Unit] = {}
            waiting = list(reversed(todo))
            try:
                while (waiting or futures) and not broken:
                    while waiting and len(futures) < workers + 1:
                        unit = waiting.pop()
                        futures[pool.submit(_work, unit, retries)] = unit
                    done, _ = wait(futures, return_when=FIRST_COMPLETED)
                    for future in done:
                        unit = futures.pop(future)
                        try:
                            result = future.result()
                        except BrokenProcessPool:
                            broken = True
                            attempts[unit] += 1
                            if attempts[unit] <= retries + workers:
                                continue
                            result = "its worker process was killed (out of memory?)"
                        todo.remove(unit)
                        yield unit, result
            except GeneratorExit:
                pool.shutdown(cancel_futures=True)
                raise


def _start_worker(trainer: Trainer, parent: int) -> None:
    global _trainer
    import signal
    import threading

    import torch

    # A parent that is killed outright cannot stop its workers, and they would wait for ever.
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    _trainer = trainer


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(unit: Unit, retries: int) -> np.ndarray | str:
    assert _trainer is not None
    return _attempt(_trainer, unit, retries)
