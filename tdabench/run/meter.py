"""The cost meter, and checks of a plugin's return values and side effects.

Time spent importing libraries and loading the target's weights is measured separately from the
phases: it is the same for every method that needs them, and would dominate at small scale.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.machinery as machinery
import os
import random
import resource
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.data.behaviours import Behaviour
from tdabench.data.examples import Example, content_line
from tdabench.errors import MethodError
from tdabench.groups import Groups, pool_scores
from tdabench.method import Index
from tdabench.targets.target import Target
from tdabench.toolkit.representation import SCORES_BYTES, RepresentationIndex

PAGE = resource.getpagesize()
GLOBAL_SEED = 20250518  # any number that a plugin is unlikely to use as a seed


class Clock:
    """Wall and processor seconds spent under it; nested uses are counted once.

    It undoes draws from the global generators: a library may draw while it is imported or
    initialises a GPU, for which the method is not responsible.
    """

    def __init__(self) -> None:
        self.seconds, self.cpu, self._depth = 0.0, 0.0, 0
        self._start = 0.0, 0.0
        self._drawn: list[Any] = []

    def __enter__(self) -> Clock:
        if self._depth == 0:
            self._drawn = [random.getstate(), np.random.get_state(), _torch_state()]
            self._start = time.perf_counter(), time.process_time()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._start[0]
            self.cpu += time.process_time() - self._start[1]
            python, numpy, torch = self._drawn
            random.setstate(python)
            np.random.set_state(numpy)
            if torch is not None:
                sys.modules["torch"].default_generator.set_state(torch)

    def now(self) -> tuple[float, float]:
        """Returns wall and processor time outside of it; only differences are meaningful."""
        return time.perf_counter() - self.seconds, time.process_time() - self.cpu


class Meter:
    """Seconds and peak memory of a phase, without imports and loading of the target.

    `setup` runs while a library is imported or a checkpoint is read.
    """

    def __init__(self) -> None:
        self.setup = Clock()

    def watch_imports(self) -> None:
        """Counts the execution of modules imported from now on as set-up."""
        seed_globals()
        for loader in (machinery.SourceFileLoader, machinery.ExtensionFileLoader):
            loader.exec_module = _timed(loader.exec_module, self.setup)  # type: ignore[method-assign]

    @contextlib.contextmanager
    def phase(self) -> Iterator[dict[str, Any]]:
        """Yields a dict that is filled when the phase ends.

        `seconds` of wall time and `cpu_seconds` over all threads, both without set-up, whose wall
        time is `setup_seconds`; `peak_bytes` resident, of which `base_bytes` were in use before.
        """
        cost: dict[str, Any] = {}
        exact = reset_peak()
        cost["base_bytes"] = resident_bytes()
        reset_gpu_peak()
        set_up, (start, cpu) = self.setup.seconds, self.setup.now()
        try:
            yield cost
        finally:
            end, cpu_end = self.setup.now()
            cost["cpu_seconds"] = round(max(0.0, cpu_end - cpu), 6)
            cost["setup_seconds"] = round(self.setup.seconds - set_up, 4)
            cost["seconds"] = round(max(0.0, end - start), 6)
            cost["peak_bytes"] = peak_bytes()
            cost["peak_measured"] = "phase" if exact else "process"
            gpu = gpu_peak_bytes()
            if gpu:
                cost["gpu_peak_bytes"] = gpu


def _timed(function: Any, clock: Clock) -> Any:
    @functools.wraps(function)
    def wrapper(self: Any, module: Any) -> Any:
        with clock:
            function(self, module)
        if module.__name__ == "torch":
            module.manual_seed(GLOBAL_SEED)  # torch seeds itself from the clock when imported

    return wrapper


class MeteredTarget(Target):
    """A target whose loading is timed separately and whose models must stay unchanged."""

    def attach(self, meter: Meter) -> MeteredTarget:
        object.__setattr__(self, "_meter", meter)
        object.__setattr__(self, "_seen", {})
        return self

    @classmethod
    def of(cls, target: Target, meter: Meter) -> MeteredTarget:
        fields = {f: getattr(target, f) for f in target.__dataclass_fields__}
        made = cls(**fields).attach(meter)
        for known in ("fingerprint", "_reading"):
            if known in target.__dict__:
                made.__dict__[known] = target.__dict__[known]
        return made

    def model(self, checkpoint: str = "base", device: str = "cpu") -> Any:
        meter: Meter = self.__dict__["_meter"]
        with meter.setup:
            model = super().model(checkpoint, device)
            seen: dict[tuple[str, str], Any] = self.__dict__["_seen"]
            if (checkpoint, device) not in seen:
                seen[checkpoint, device] = model_state(model)
        return model

    def fresh_model(self, checkpoint: str = "base", seed: int = 0) -> Any:
        meter: Meter = self.__dict__["_meter"]
        with meter.setup:
            return super().fresh_model(checkpoint, seed)

    @functools.cached_property
    def tokenizer(self) -> Any:
        meter: Meter = self.__dict__["_meter"]
        with meter.setup:
            return vars(Target)["tokenizer"].func(self)

    def check_unchanged(self, who: str) -> None:
        """Raises MethodError if a model has changed since it was loaded."""
        for (checkpoint, device), before in self.__dict__["_seen"].items():
            model = self._models.get((checkpoint, device))
            if model is None:
                continue
            after = model_state(model)
            for what in before:
                if before[what] != after[what]:
                    raise MethodError(
                        f"{who} left the target's model {checkpoint!r} with {what} changed",
                        "A method must leave the model as it found it: work on "
                        "target.fresh_model()",
                    )


def model_state(model: Any) -> dict[str, Any]:
    """Returns the state that a method must not change: weights (hashed), mode, flags, hooks."""
    digest = hashlib.sha256()
    for name, p in model.state_dict().items():
        flat = p.detach().reshape(-1)
        # Large tensors by a strided sample and their sum: hashing 30 GB would take too long.
        if flat.numel() > 1 << 22:
            step = flat.numel() >> 20
            digest.update(np.float64(flat.double().sum().item()).tobytes())
            flat = flat[::step]
        digest.update(name.encode())
        digest.update(flat.float().cpu().numpy().tobytes())
    return {
        "its weights": digest.hexdigest(),
        "train/eval mode": model.training,
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "hooks": sum(
            not _of_transformers(hook)
            for m in model.modules()
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
            for hook in hooks.values()
        ),
    }


def _of_transformers(hook: Any) -> bool:
    """Tells whether a hook is transformers' own, which it leaves after returning hidden states."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


# --------------------------------------------------------------------------- global randomness


def seed_globals() -> None:
    """Gives the global generators a known state, so that libraries that draw are reproducible."""
    random.seed(GLOBAL_SEED)
    np.random.seed(GLOBAL_SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(GLOBAL_SEED)


def _torch_state() -> Any:
    """Returns the state of torch's global generator, or None before torch is imported."""
    torch: Any = sys.modules.get("torch")
    return torch.default_generator.get_state() if hasattr(torch, "default_generator") else None


class GlobalRandomness:
    """The state of Python's, numpy's and torch's global generators."""

    def __init__(self) -> None:
        self.before = self._state()

    @staticmethod
    def _state() -> dict[str, Any]:
        numpy_state: Any = np.random.get_state()
        kind, keys, pos = numpy_state[:3]
        state: dict[str, Any] = {
            "random": random.getstate(),
            "numpy.random": (kind, keys.tobytes(), pos),
        }
        if (torch := _torch_state()) is not None:
            state["torch"] = torch.numpy().tobytes()
        return state

    def check(self, who: str) -> None:
        """Raises MethodError naming the generators that advanced."""
        after = self._state()
        if "torch" in after and "torch" not in self.before:
            # Imported in the meantime, and seeded then (see Meter.watch_imports).
            fresh = sys.modules["torch"].Generator().manual_seed(GLOBAL_SEED)
            self.before["torch"] = fresh.get_state().numpy().tobytes()
        moved = [k for k in after if after[k] != self.before[k]]
        self.before = after
        if moved:
            raise MethodError(
                f"{who} drew from or seeded the global random state of {' and '.join(moved)}",
                "Draw from context.rng(name) or context.torch_generator(name)",
            )


# --------------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Known:
    """Example scores [query, train] and the wall and processor seconds that they took."""

    scores: np.ndarray
    seconds: float
    cpu_seconds: float


class Memory:
    """Scores that the benchmarks of one worker share, by the content of the queries.

    Several benchmarks need scores of the same queries, which are computed once. A method's scores
    of a query may not depend on other queries of a call (the law `batches-do-not-matter`), so
    queries of an earlier call need not be scored again. The time of the call counts in each cell,
    in proportion to its queries, so that sharing does not make a cell look cheap.
    """

    MOST = 16 << 20  # number of scores held

    def __init__(self) -> None:
        self._calls: list[tuple[dict[bytes, int], Known]] = []

    def get(self, queries: Sequence[Example]) -> Known | None:
        wanted = [content_line(query) for query in queries]
        for rows, known in self._calls:
            if wanted and all(w in rows for w in wanted):
                share = len(wanted) / len(known.scores)
                places = [rows[w] for w in wanted]
                return Known(known.scores[places], share * known.seconds, share * known.cpu_seconds)
        return None

    def keep(self, queries: Sequence[Example], known: Known) -> None:
        held = sum(k.scores.size for _, k in self._calls)
        if len(queries) and held + known.scores.size <= self.MOST:
            rows = {content_line(query): i for i, query in enumerate(queries)}
            self._calls.append((rows, known))


class MeteredIndex(Index):
    """An index whose calls are all timed, counted and checked."""

    def __init__(
        self, index: Index, method: str, n_train: int, meter: Meter, memory: Memory | None = None
    ) -> None:
        self.inner, self.method, self.meter, self.memory = index, method, meter, memory
        self.n_train, self.reused = n_train, 0
        self.pooling = getattr(index, "pooling", "sum")
        self.temperature = getattr(index, "temperature", 1.0)
        self.seconds, self.cpu_seconds, self.queries, self.calls = 0.0, 0.0, 0, 0

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        start, cpu = self.meter.setup.now()
        yield
        end, cpu_end = self.meter.setup.now()
        self.seconds += max(0.0, end - start)
        self.cpu_seconds += max(0.0, cpu_end - cpu)

    def _count(self, queries: Sequence[Example]) -> None:
        self.queries += len(queries)
        self.calls += 1

    def score(self, queries: Sequence[Example]) -> np.ndarray:
        self._count(queries)
        known = self.memory.get(queries) if self.memory else None
        if known is not None:
            self.seconds += known.seconds
            self.cpu_seconds += known.cpu_seconds
            self.reused += 1
            return known.scores
        before = self.seconds, self.cpu_seconds
        with self._call():
            scores = self.inner.score(queries)
        scores = checked(self.method, "score", scores, (len(queries), self.n_train))
        if self.memory:
            spent = self.seconds - before[0], self.cpu_seconds - before[1]
            self.memory.keep(queries, Known(scores.copy(), *spent))
        return scores

    def score_groups(self, queries: Sequence[Example], groups: Groups) -> np.ndarray:
        if self._pools(len(queries)):
            # Inherited: check the example scores before pooling hides problems.
            raw = self.score(queries)
            with self._call():
                scores = pool_scores(raw, groups, self.pooling, self.temperature)
        else:
            self._count(queries)
            with self._call():
                scores = self.inner.score_groups(queries, groups)
        return checked(self.method, "score_groups", scores, (len(queries), len(groups)))

    def score_behaviours(
        self, behaviours: Sequence[Behaviour], groups: Groups | None = None
    ) -> np.ndarray:
        own = getattr(self.inner, "own_behaviours", None)  # by an index in another process
        if own is None:
            own = type(self.inner).score_behaviours is not Index.score_behaviours
        if not own:
            return super().score_behaviours(behaviours, groups)  # through the metered calls above
        self.queries += len(behaviours)
        self.calls += 1
        with self._call():
            scores = self.inner.score_behaviours(behaviours, groups)
        shape = (len(behaviours), self.n_train if groups is None else len(groups))
        return checked(self.method, "score_behaviours", scores, shape)

    def _pools(self, n_queries: int) -> bool:
        """Tells whether the harness can pool the index's example scores, and hold them."""
        few = n_queries * self.n_train * 4 <= SCORES_BYTES
        told = getattr(self.inner, "pools", None)  # by an index in another process
        if told is not None:
            return bool(told == "always" or (told == "few" and few))
        how = type(self.inner).score_groups
        return how is Index.score_groups or (how is RepresentationIndex.score_groups and few)

    def top_k(self, queries: Sequence[Example], k: int) -> tuple[np.ndarray, np.ndarray]:
        self._count(queries)
        with self._call():
            answer = self.inner.top_k(queries, k)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise MethodError(f"{self.method}: top_k returned {type(answer).__name__}, not a pair")
        shape = (len(queries), min(k, self.n_train))
        values = checked(self.method, "top_k", answer[0], shape)
        ids = np.asarray(answer[1])
        if ids.shape != shape or ids.dtype.kind not in "iu":
            raise MethodError(
                f"{self.method}: top_k returned indices {ids.dtype} {list(ids.shape)}, expected "
                f"integers {list(shape)}"
            )
        if ids.size and not (ids.min() >= 0 and ids.max() < self.n_train):
            raise MethodError(f"{self.method}: top_k returned indices outside the corpus")
        return values, ids

    def save(self, path: Path) -> None:
        self.inner.save(path)

    def cost(self) -> dict[str, Any]:
        return {
            "seconds": round(self.seconds, 6),
            "cpu_seconds": round(self.cpu_seconds, 6),
            "queries": self.queries,
            "calls": self.calls,
            **({"reused": self.reused} if self.reused else {}),
        }


def checked(who: str, call: str, scores: Any, shape: tuple[int, int]) -> np.ndarray:
    """Returns `scores` as a contiguous float array; raises MethodError counting invalid values."""
    if hasattr(scores, "detach"):
        scores = scores.detach().cpu().numpy()
    if not isinstance(scores, np.ndarray):
        raise MethodError(f"{who}: {call} returned {type(scores).__name__}, expected an array")
    if scores.shape != shape:
        axes = "[query, group]" if call == "score_groups" else "[query, train]"
        raise MethodError(
            f"{who}: {call} returned shape {list(scores.shape)}, expected {axes} = {list(shape)}"
        )
    if scores.dtype.kind != "f" or scores.dtype.itemsize < 4:
        raise MethodError(f"{who}: {call} returned {scores.dtype}, expected float32 or float64")
    bad = ~np.isfinite(scores)
    if bad.any():
        rows = int(bad.any(axis=1).sum())
        kind = "NaN" if np.isnan(scores).any() else "infinite values"
        noun = "query" if rows == 1 else "queries"
        raise MethodError(f"{who} returned {kind} for {rows} {noun} ({int(bad.sum())} scores)")
    return np.ascontiguousarray(scores)


# --------------------------------------------------------------------------- memory


def resident_bytes() -> int:
    """Returns resident memory of this process (0 if the system does not report it)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0


def reset_peak() -> bool:
    """Resets the kernel's memory peak; returns False if it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def peak_bytes() -> int:
    """Returns peak resident memory since `reset_peak`, or of the process if that failed."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_gpu_peak() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def gpu_peak_bytes() -> int:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return 0


def folder_bytes(path: Path) -> int:
    """Counts the bytes of all files below `path`, links followed, each file once."""
    seen: set[tuple[int, int]] = set()
    total, pending = 0, [os.fspath(path)]
    while pending:
        try:
            entries = list(os.scandir(pending.pop()))
        except OSError:
            continue
        for entry in entries:
            try:
                found = os.stat(entry.path)
            except OSError:
                continue  # a link that leads nowhere
            if (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
            if stat.S_ISDIR(found.st_mode):
                pending.append(entry.path)
            elif stat.S_ISREG(found.st_mode):
                total += found.st_size
    return total


def as_costs(cost: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Returns a method's own prepare cost, keeping only finite numbers."""
    if not cost:
        return None
    return {str(k): float(v) for k, v in cost.items() if isinstance(v, (int, float))}
