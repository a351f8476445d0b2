"""Engines run retrainings: in this process, in a pool of processes, or on a Ray cluster.

An engine fetches units with `take` when it has room for them (None: no unit available now) and
yields each with its result, in any order. It makes one attempt per unit; the build claims, retries
and stores. Every retraining uses one thread: the number of threads changes how sums are rounded,
and two processes of two threads each run many times slower than two of one thread each.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from tdabench.data.examples import Corpus
from tdabench.errors import MissingExtra, TdabenchError, UsageError, brief, first_line
from tdabench.io import write_bytes
from tdabench.targets.batches import Tokens
from tdabench.targets.decoder import TOKENS, States, serves
from tdabench.targets.target import SCRATCH, Target
from tdabench.targets.training import finetune, states_below
from tdabench.truth.plan import TruthPlan, Unit

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from transformers import PreTrainedModel


@dataclass(frozen=True)
class UnitResult:
    """The result of one retraining: losses float32 [query], and the checkpoints that it kept.

    `checkpoints` maps a step to the weights after it, float32 by name. `made_by` names a training
    mode that rounds differently from a unit trained alone. `cpu_seconds` is the processor time of
    the retraining; 0 if it was not measured.
    """

    losses: np.ndarray
    checkpoints: Mapping[int, Mapping[str, np.ndarray]] = field(default_factory=dict)
    made_by: str = ""
    cpu_seconds: float = 0.0


Take = Callable[[], Unit | None]
Outcomes = Iterator[tuple[Unit, UnitResult | str]]  # (unit, its result or the reason it failed)


@dataclass
class UnitTrainer:
    """The shared parts of a plan's units: the target, and both corpora tokenised once."""

    plan: TruthPlan
    target: Target
    train: list[Tokens]
    queries: list[Tokens]
    device: str = "cpu"
    _kept: tuple[States | None, States | None] | None = field(default=None, repr=False)

    @classmethod
    def of(cls, plan: TruthPlan, target: Target, train: Corpus, queries: Corpus) -> UnitTrainer:
        plan.check(target, train, queries)
        return cls(plan, target, target.tokenize(train), target.tokenize(queries))

    def losses(self, unit: Unit, on_checkpoint: Any = None, on_backoff: Any = None) -> np.ndarray:
        """Retrains on the unit's group and evaluates: float32 [query]."""
        seed = self.plan.run_seed(unit)
        model = self.target.fresh_model(self.plan.start, seed).to(self.device)  # type: ignore[arg-type]
        group, tokens, weights = self.plan.groups[unit.group], self.train, None
        below, asked = self._below(model)
        if self.plan.order == "pool":
            weights = np.isin(np.arange(len(tokens)), group)
        else:
            tokens = [self.train[i] for i in group]
            below = below.at(group) if below else None
        finetune(
            model, tokens, self.plan.recipe, seed, self.target.pad_id,
            on_checkpoint=on_checkpoint, weights=weights, on_backoff=on_backoff, below=below,
        )  # fmt: skip
        return self.target.losses(model, self.queries, below=asked)

    def _below(self, base: PreTrainedModel) -> tuple[States | None, States | None]:
        """Returns the states of both corpora that enter the first trained layer, computed once."""
        if self.plan.start == SCRATCH:  # each retraining begins with other weights
            return None, None
        if self._kept is None:
            recipe, pad_id = self.plan.recipe, self.target.pad_id
            self._kept = (
                states_below(base, self.train, recipe, pad_id),
                states_below(base, self.queries, recipe, pad_id),
            )
        return self._kept

    def attempt(self, unit: Unit) -> UnitResult | str:
        """Returns the unit's result, or the reason for its absence."""
        kept: dict[int, dict[str, np.ndarray]] = {}
        parts: list[int] = []  # examples per pass, if memory ran out
        began = time.process_time()

        def keep(step: int, model: PreTrainedModel) -> None:
            kept[step] = {k: v.to("cpu", copy=True).numpy() for k, v in model.state_dict().items()}

        try:
            with one_thread():
                losses = self.losses(unit, keep if self.plan.recipe.keep else None, parts.append)
            if not np.isfinite(losses).all():
                return f"{int((~np.isfinite(losses)).sum())} of its losses are not finite"
            made_by = f"micro-batches of {parts[-1]}" if parts else ""
            return UnitResult(losses, kept, made_by, time.process_time() - began)
        except (TdabenchError, RuntimeError, MemoryError) as e:
            return f"{type(e).__name__}: {e}"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Engine(Protocol):
    """Trains the units from `take` until it returns None and no unit is in progress."""

    def run(self, trainer: UnitTrainer, take: Take, note: Callable[[str], None]) -> Outcomes: ...


@dataclass(frozen=True)
class InProcess:
    """Runs one retraining after the other in this process."""

    device: str = "cpu"

    def run(self, trainer: UnitTrainer, take: Take, note: Callable[[str], None]) -> Outcomes:
        trainer = replace(trainer, device=self.device)
        while (unit := take()) is not None:
            yield unit, trainer.attempt(unit)


def local_engine(workers: int, devices: Sequence[str] = ("cpu",)) -> Engine:
    """Returns the engine of `workers` processes on this machine; of this process for one."""
    return InProcess(devices[0]) if workers == 1 else Pool(workers, tuple(devices))


# --------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Pool:
    """Worker processes on this machine, each with one thread and one unit at a time.

    `devices` are assigned in turn. A worker that dies costs its unit one attempt; if the system
    killed it (most likely for memory), it is not replaced while other workers are running.

    Raises TdabenchError if workers cannot start.
    """

    workers: int
    devices: tuple[str, ...] = ("cpu",)

    def run(self, trainer: UnitTrainer, take: Take, note: Callable[[str], None]) -> Outcomes:
        from multiprocessing.connection import wait

        places = list(range(self.workers))
        workers: dict[int, _Worker] = {}
        busy: dict[Any, int] = {}  # pipe -> place
        stillborn = 0
        try:
            while True:
                for place in places:
                    if place in workers and workers[place].unit is not None:
                        continue
                    unit = take()
                    if unit is None:
                        break
                    if place not in workers or not workers[place].process.is_alive():
                        device = self.devices[place % len(self.devices)]
                        workers[place] = _Worker(trainer, device)
                    workers[place].begin(unit)
                    busy[workers[place].pipe] = place
                if not busy:
                    return
                for pipe in cast(list[Any], wait(list(busy))):
                    place = busy[pipe]
                    worker = workers[place]
                    try:
                        message = pipe.recv()
                    except (EOFError, OSError):
                        reason = worker.why_it_died()
                        stillborn = 0 if worker.ready else stillborn + 1
                        if stillborn > 2:
                            raise TdabenchError(
                                f"worker processes cannot start: {reason}",
                                'A script that builds needs: if __name__ == "__main__"',
                            ) from None
                        if worker.killed and len(places) > 1:
                            places.remove(place)
                            note(f"a worker was killed; continuing with {len(places)}")
                        del busy[pipe], workers[place]
                        yield worker.given(), reason
                        continue
                    if message is _READY:
                        worker.ready, stillborn = True, 0
                        continue
                    del busy[pipe]
                    unit = worker.given()
                    worker.unit = None
                    yield unit, message
        finally:
            for worker in workers.values():
                worker.end()


_READY = None  # a worker's first message


def _context() -> Any:
    """Returns the start method of workers.

    On Linux they are forked from a server that has imported torch without using it, which takes no
    time and shares memory; elsewhere they are spawned."""
    import multiprocessing

    if not sys.platform.startswith("linux"):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "transformers.modeling_utils", "transformers.models.auto.modeling_auto",
         "tdabench.truth.build"]
    )  # fmt: skip
    return context


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, trainer: UnitTrainer, device: str) -> None:
        context = _context()
        self.pipe, theirs = context.Pipe()
        # The far end closes when this process ends in any way, which tells the worker to exit.
        lifeline, self.lifeline = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_serve, args=(theirs, lifeline, trainer, device), daemon=True
        )
        self.process.start()
        theirs.close()  # so that the pipe ends with the worker
        lifeline.close()
        self.unit: Unit | None = None
        self.ready = self.killed = False

    def given(self) -> Unit:
        assert self.unit is not None
        return self.unit

    def begin(self, unit: Unit) -> None:
        self.unit = unit
        with contextlib.suppress(OSError):  # it has died: reading reports it
            self.pipe.send(unit)

    def why_it_died(self) -> str:
        self.process.join(10)
        code = self.process.exitcode
        self.killed = code == -signal.SIGKILL
        self.end()
        if self.killed:
            return "its worker process was killed (out of memory?)"
        return f"its worker process ended with exit code {code}"

    def end(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.pipe.close()
        self.lifeline.close()


def _serve(pipe: Connection, lifeline: Connection, trainer: UnitTrainer, device: str) -> None:
    threading.Thread(target=_die_with, args=(lifeline,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    trainer.device = device
    with contextlib.suppress(EOFError, OSError):  # the parent has exited
        pipe.send(_READY)
        while True:
            unit = pipe.recv()
            pipe.send(trainer.attempt(unit))


def _die_with(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)


PROCESS_BYTES = 450 << 20  # Python with torch and transformers loaded


def needed_bytes(plan: TruthPlan, target: Target) -> int:
    """Estimates the peak memory of one retraining, including its process.

    This is the sum of weights, gradients and optimizer states in float32, activations of a forward
    pass over the longest examples of the target, and logits with their gradients.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe, config = plan.recipe, AutoConfig.from_pretrained(target.folder, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(p.numel() for p in model.parameters())
    states = 2 if recipe.optimizer == "adamw" else int(recipe.momentum > 0)
    # On a CPU; the comparison with autograd needs the gradient of every weight even with adapters.
    written = (
        recipe.precision == "float32"
        and not recipe.checkpointing
        and serves(model, target.max_length)
    )
    # Two copies while the checkpoint is read; later gradients and states of trained weights.
    fixed = 4 * weights * (2 if recipe.lora_rank and not written else 2 + states)
    rows = min(recipe.batch_size, recipe.micro_batch or recipe.batch_size)
    tokens = rows * target.max_length
    if written:
        tokens = min(tokens, max(TOKENS, target.max_length))
    width = int(config.hidden_size)
    depth = int(config.num_hidden_layers) - min(recipe.layers_to_transform, default=0)
    layer = 68 * tokens * width  # arXiv 2205.05198, eq. 2, in float32 and without the scores
    kept = depth * 4 * tokens * width + layer if recipe.checkpointing else depth * layer
    logits = 3 * 4 * tokens * int(config.vocab_size)
    return PROCESS_BYTES + fixed + kept + logits


# --------------------------------------------------------------------------- Ray


@dataclass(frozen=True)
class Ray:
    """Tasks of a Ray cluster (extra `ray`): any number of nodes, GPUs as resources.

    `address` is the address of the cluster ("" is $RAY_ADDRESS, else a cluster running here, else a
    new one for this build). Each task takes `cpus` and `gpus` (a fraction shares a GPU) and
    `memory` bytes of a node. Work lost with its node or process is repeated elsewhere, at most
    `lost` times. The target's files are sent with the job to nodes that lack them.
    """

    address: str = ""
    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0
    lost: int = 5
    ahead: int = 2  # submitted tasks per task that the cluster has room for

    def run(self, trainer: UnitTrainer, take: Take, note: Callable[[str], None]) -> Outcomes:
        ray = _import_ray()
        ours = not ray.is_initialized()
        if ours:
            _connect(ray, self.address)
        running: dict[Any, Unit] = {}
        try:
            task = ray.remote(_ray_task).options(
                num_cpus=self.cpus, num_gpus=self.gpus, memory=self.memory or None,
                max_retries=self.lost,
            )  # fmt: skip
            # In a list it stays a reference, which a process resolves once, not for every task.
            shared = [ray.put(_Shipped.of(trainer, "cuda" if self.gpus else "cpu"))]
            while True:
                while len(running) < self.ahead * self._room(ray) + 1:
                    unit = take()
                    if unit is None:
                        break
                    running[task.remote(shared, trainer.plan.key, unit)] = unit
                if not running:
                    return
                done, _ = ray.wait(list(running), num_returns=1, timeout=5.0)
                for ref in done:
                    unit = running.pop(ref)
                    try:
                        result = ray.get(ref)
                    except ray.exceptions.RayError as e:
                        result = _ray_reason(e)
                    yield unit, result
        finally:
            for ref in running:
                with contextlib.suppress(Exception):
                    ray.cancel(ref, force=True)
            if ours:
                ray.shutdown()

    def _room(self, ray: Any) -> int:
        """Returns the number of tasks that the cluster can run at once now."""
        there = ray.cluster_resources()
        rooms = [there.get("CPU", 0) / self.cpus] if self.cpus else []
        if self.gpus:
            rooms.append(there.get("GPU", 0) / self.gpus)
        if self.memory:
            rooms.append(there.get("memory", 0) / self.memory)
        return max(1, int(min(rooms, default=1)))


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as e:
        raise MissingExtra("Ray", "ray") from e
    return ray


def _connect(ray: Any, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    host, _, port = address.rpartition(":")
    try:
        if host and "/" not in address and port.isdigit():  # Ray itself would retry for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(
            address=address or None, log_to_driver=False, logging_level="ERROR",
            include_dashboard=None if address else False,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as e:
        where = address or os.environ.get("RAY_ADDRESS", "")
        raise UsageError(
            f"cannot reach a Ray cluster at {where or 'this machine'}: {first_line(e)}",
            "Start one with: ray start --head",
        ) from e


def _ray_reason(error: Any) -> str:
    """Returns Ray's error in one line."""
    cause = getattr(error, "cause", None) or error
    return brief(cause)


@dataclass(frozen=True)
class _Shipped:
    """A trainer with the target's files, for nodes that do not have them."""

    trainer: UnitTrainer
    files: Mapping[str, bytes]

    @classmethod
    def of(cls, trainer: UnitTrainer, device: str) -> _Shipped:
        sent = replace(trainer, device=device)
        folder = trainer.target.folder
        paths = trainer.target.files(trainer.plan.start)
        return cls(sent, {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths})

    def here(self) -> UnitTrainer:
        """Returns the trainer with its target's files on this machine."""
        t = self.trainer
        with contextlib.suppress(TdabenchError):
            if t.target.fingerprint_of(t.plan.start) == t.plan.target:
                return t
        place = Path(tempfile.gettempdir()) / f"tdabench-{os.getuid()}" / t.plan.target
        for name, data in self.files.items():
            if not (place / name).exists():
                write_bytes(place / name, data)
        target = replace(t.target, folder=place)
        if target.fingerprint_of(t.plan.start) != t.plan.target:
            raise TdabenchError(f"the target's files in {place} are damaged", "Delete that folder")
        return replace(t, target=target)


_trainers: dict[str, UnitTrainer] = {}  # of this Ray worker, since processes are reused


def _ray_task(shared: list[Any], key: str, unit: Unit) -> UnitResult | str:
    import ray

    if key not in _trainers:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _trainers.clear()
        _trainers[key] = ray.get(shared[0]).here()
    return _trainers[key].attempt(unit)
