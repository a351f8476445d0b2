"""The contestant: the process of a method, which holds nothing that the method must not know.

It receives a training corpus without labels, a target and assets, and then answers `prepare`,
`build`, `save`, `load`, `score`, `score_groups`, `top_k`. Queries and groups arrive when they are
scored. It reports how long imports and the loading of models took; the judge measures all other
figures. The checks here (models and generators unchanged, no files written outside) help authors
to find mistakes; defences against a hostile method lie outside this process.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.data.behaviours import Behaviour
from tdabench.data.examples import Corpus, Example
from tdabench.errors import (
    GuardError,
    MethodError,
    MissingAsset,
    MissingExtra,
    NotApplicable,
    TdabenchError,
    brief,
)
from tdabench.groups import Groups
from tdabench.method import Context, Index
from tdabench.registry import configure, registry
from tdabench.run.meter import (
    GlobalRandomness,
    Meter,
    MeteredTarget,
    as_costs,
    gpu_peak_bytes,
    peak_bytes,
    reset_gpu_peak,
)
from tdabench.run.protocol import (
    CHANNEL_FD,
    Arrays,
    Channel,
    Hangup,
    read_corpus,
    read_examples,
)
from tdabench.run.watch import file_events, strays
from tdabench.targets.recipe import Recipe
from tdabench.targets.target import Target
from tdabench.toolkit.representation import RepresentationIndex

Reply = tuple[dict[str, Any], Arrays]


def main() -> int:
    """Serves the connection inherited from the judge until the judge closes it."""
    channel = Channel(socket.socket(fileno=CHANNEL_FD))
    try:
        Contestant(channel).serve()
    except Hangup:
        pass
    return 0


class Contestant:
    """One method, and the index it has built or loaded."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.meter = Meter()
        self.meter.watch_imports()
        self.index: Index | None = None
        self.events: list[tuple[str, str]] = []
        self._lock = threading.RLock()
        self._last_progress = 0.0
        self._temporary = Path(os.environ.get("TMPDIR", "/tmp"))

    # ------------------------------------------------------------------ the conversation

    def serve(self) -> None:
        while True:
            message, arrays = self.channel.receive()
            setup = self.meter.setup.seconds, self.meter.setup.cpu
            reset_gpu_peak()
            out: Arrays = {}
            try:
                with file_events() as log:
                    try:
                        reply, out = getattr(self, f"do_{message['do']}")(message, arrays)
                    finally:
                        self.events += log
                finish_gpu()
            except BaseException as e:
                reply = {"error": self._described(e, log, message["do"])}
            reply["setup"] = [
                self.meter.setup.seconds - setup[0],
                self.meter.setup.cpu - setup[1],
            ]
            reply["gpu_peak_bytes"] = gpu_peak_bytes()
            reply["own"] = [time.process_time(), peak_bytes()]  # where there is no /proc
            reply["torch"] = "torch" in sys.modules
            self.channel.send(reply, out)

    def _described(
        self, error: BaseException, log: list[tuple[str, str]], doing: str
    ) -> dict[str, Any]:
        """Describes a failure; if the sandbox caused it, names the path."""
        traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        path = getattr(error, "filename", None)
        if isinstance(error, PermissionError) and isinstance(path, (str, bytes)):
            where = os.path.abspath(os.fsdecode(path))
            writing = where in strays(log, *self._own_places())
            asked = doing in ("prepare", "build", "save", "load")
            who = f"{self.name}.{doing}" if asked else f"scoring with {self.name}"
            error = MethodError(
                f"{who} wrote outside its scratch folder: {where} (refused)"
                if writing
                else f"{who} reached for {where}, which a method is not given",
                "Write below context.scratch only" if writing else "See docs/plugins.md",
            )
        elif isinstance(error, PermissionError) and _is_within("multiprocessing", error):
            error = MethodError(
                f"{self.name} used a lock, queue or pool of multiprocessing, which need memory "
                "shared beyond the method's own processes (refused)",
                "Use threads, or processes that talk through pipes (docs/plugins.md)",
            )
        elif isinstance(error, PermissionError) and path is None:
            error = MethodError(
                f"{self.name} asked the system for a socket, shared memory or the like, which a "
                f"method is not given: {brief(error)}",
                "See docs/plugins.md",
            )
        status, reason = explain(error)
        return {
            "status": status,
            "reason": reason,
            "missing": isinstance(error, MissingAsset),
            "path": os.fsdecode(path) if isinstance(path, (str, bytes)) else "",
        }

    def _own_places(self) -> list[Path]:
        return [self.scratch, self._temporary]

    def progress(self, what: str, done: int, total: int) -> None:
        if done >= total or time.monotonic() - self._last_progress > 0.2:
            self._last_progress = time.monotonic()
            self.channel.send({"progress": [str(what)[:80], int(done), int(total)]})

    def asset(self, name: str) -> Path:
        """Asks the judge for an asset; the judge records its use."""
        with self._lock:
            self.channel.send({"asset": str(name)})
            answer, _ = self.channel.receive()
        if "path" in answer:
            return Path(answer["path"])
        kind = {"guard": GuardError, "missing": MissingAsset}.get(answer["kind"], TdabenchError)
        if kind is MissingAsset:
            raise MissingAsset(name, answer["provided"])
        raise kind(answer["error"], answer.get("remedy", ""))

    # ------------------------------------------------------------------ requests

    def do_start(self, message: dict[str, Any], arrays: Arrays) -> Reply:
        """Imports the method's plugin (no other plugin) and constructs the method."""
        self.scratch = Path(message["scratch"])
        target = read_target(message["target"], message["reading"])
        self.target = MeteredTarget.of(target, self.meter)
        self.name = "the harness"
        if message.get("method"):
            self.name = message["method"]["name"]
            configure(**message["plugins"])
            for origin, problem in registry().problems:
                print(f"plugin {origin}: {problem}", file=sys.stderr)
            cls = registry().method(self.name).cls
            self.method = cls.from_params(message["method"]["params"])
            self.context = Context(
                target=self.target,
                scratch=self.scratch,
                seed=message["seed"],
                device=message["device"],
                assets=Assets(message["assets"], self),
                progress=self.progress,
            )
            self.train = read_corpus(message["train"])
        self.randomness = GlobalRandomness()
        self.events = []
        return {}, {}

    def do_prepare(self, message: dict[str, Any], arrays: Arrays) -> Reply:
        return {"cost": as_costs(self.method.prepare_cost(self.context))}, {}

    def do_build(self, message: dict[str, Any], arrays: Arrays) -> Reply:
        context, train = self.context, self.train
        index = self.method.build(context, train)
        if not isinstance(index, Index):
            raise MethodError(
                f"{self.name}.build returned {type(index).__name__}, expected an Index"
            )
        covers = getattr(index, "n_train", None)
        if covers != len(train):
            raise MethodError(f"{self.name} built an index of {covers} examples, not {len(train)}")
        self.index = index
        return {}, {}

    def do_save(self, message: dict[str, Any], arrays: Arrays) -> Reply:
        assert self.index is not None
        self.index.save(Path(message["path"]))
        return {}, {}

    def do_load(self, message: dict[str, Any], arrays: Arrays) -> Reply:
        context = dataclasses.replace(self.context, scratch=Path(message["scratch"]))
        self.scratch = context.scratch
        index = self.method.load(context, Path(message["path"]))
        if not isinstance(index, Index):
            raise MethodError(
                f"{self.name}.load returned {type(index).__name__}, expected an Index"
            )
        self.index = index
        how = type(index).score_groups
        return {
            "n_train": int(index.n_train),
            "pooling": str(index.pooling),
            "temperature": float(index.temperature),
            "own_behaviours": type(index).score_behaviours is not Index.score_behaviours,
            # If group scores are the harness's pooling of example scores, the judge pools them.
            "pools": "always"
            if how is Index.score_groups
            else "few"
            if how is RepresentationIndex.score_groups
            else "never",
        }, {}

    def do_score(self, message: dict[str, Any], arrays: Arrays) -> Reply:
        assert self.index is not None
        return _answer("scores", self.index.score(self._queries(message)))

    def do_warm_up(self, message: dict[str, Any], arrays: Arrays) -> Reply:
        assert self.index is not None
        self.index.warm_up(self._queries(message))
        return {}, {}

    def do_score_some(self, message: dict[str, Any], arrays: Arrays) -> Reply:
        assert self.index is not None
        return _answer(
            "scores", self.index.score_some(self._queries(message), arrays["candidates"])
        )

    def do_score_behaviours(self, message: dict[str, Any], arrays: Arrays) -> Reply:
        assert self.index is not None
        examples = read_examples(message["queries"])
        behaviours = [
            Behaviour(
                id, tuple(examples[i] for i in np.flatnonzero(row)), tuple(row[row != 0].tolist())
            )
            for id, row in zip(message["ids"], arrays["weights"])
        ]
        groups = None
        if "indptr" in arrays:
            groups = Groups(arrays["indptr"], arrays["indices"], message["n_train"])
        return _answer("scores", self.index.score_behaviours(behaviours, groups))

    def do_score_groups(self, message: dict[str, Any], arrays: Arrays) -> Reply:
        assert self.index is not None
        if "pooling" in message:
            self.index.pooling = str(message["pooling"])
            self.index.temperature = float(message["temperature"])
        groups = Groups(arrays["indptr"], arrays["indices"], message["n_train"])
        return _answer("scores", self.index.score_groups(self._queries(message), groups))

    def do_top_k(self, message: dict[str, Any], arrays: Arrays) -> Reply:
        assert self.index is not None
        answer = self.index.top_k(self._queries(message), int(message["k"]))
        if not isinstance(answer, tuple) or len(answer) != 2:
            return {"not": type(answer).__name__}, {}
        (a, scores), (b, ids) = _answer("scores", answer[0]), _answer("ids", answer[1])
        return {**a, **b}, {**scores, **ids}

    def _queries(self, message: dict[str, Any]) -> Corpus:
        return Corpus(read_examples(message["queries"]), message.get("name", "queries"))

    def do_losses(self, message: dict[str, Any], arrays: Arrays) -> Reply:
        """Computes the target's losses at a checkpoint; for a contestant without a method."""
        model = self.target.model(message["checkpoint"])
        queries: list[Example] = read_examples(message["queries"])
        return {}, {"losses": self.target.losses(model, self.target.tokenize(queries))}

    def do_remarks(self, message: dict[str, Any], arrays: Arrays) -> Reply:
        """Returns the share of weights that gradients cover, and notes on the target."""
        notes = target_notes(self.target, self.train, read_examples(message["queries"]))
        return {**gradient_coverage(), "notes": notes}, {}

    def do_check(self, message: dict[str, Any], arrays: Arrays) -> Reply:
        """Raises MethodError if the method changed what it must not since the last check."""
        who, events = message["who"], self.events
        self.events = []
        self.randomness.check(who)
        self.target.check_unchanged(who)
        places = [*self._own_places(), *map(Path, message["places"])]
        found = strays(events, *places)
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise MethodError(
                f"{who} wrote outside its scratch folder: {found[0]}{more}",
                "Write below context.scratch only",
            )
        return {}, {}


def _is_within(package: str, error: BaseException) -> bool:
    """Tells whether an exception was raised in a package of the standard library."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(package in Path(f.filename).parts for f in frames)


class Assets(Mapping[str, Path]):
    """Assets by name; looking one up asks the judge for it."""

    def __init__(self, names: list[str], contestant: Contestant) -> None:
        self.names, self.contestant = names, contestant

    def __getitem__(self, name: str) -> Path:
        if name not in self.names:
            raise KeyError(name)
        return self.contestant.asset(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names


def read_target(given: Mapping[str, Any], reading: str) -> Target:
    """Returns the target described in JSON, with its fingerprint, which is not computed again."""
    fields = {**given, "folder": Path(given["folder"]), "recipe": _recipe(given["recipe"])}
    fingerprint = fields.pop("fingerprint")
    target = Target(**fields)
    target.__dict__.update(fingerprint=fingerprint, _reading=reading)
    return target


def _recipe(given: Mapping[str, Any]) -> Recipe:
    """Reads a recipe from JSON, which has lists for tuples."""
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return Recipe(**fields)


def _answer(name: str, value: Any) -> Reply:
    """Returns the array to send, or the type of a value that is not an array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub" or value.ndim > 4:
        kind = f"{value.dtype} array" if isinstance(value, np.ndarray) else type(value).__name__
        return {"not": kind}, {}
    return {}, {name: np.asarray(value)}


def finish_gpu() -> None:
    """Waits until a GPU is idle, so that its work counts in the current phase."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def gradient_coverage() -> dict[str, Any]:
    """Returns the record's field `gradients`: the smallest share of the weights that an engine of
    this process covered; empty if it computed no gradients."""
    module = sys.modules.get("tdabench.toolkit.coverage")
    if module is None or not module.covered:
        return {}
    return {"gradients": min(module.covered, key=lambda c: c.share).as_dict()}


def target_notes(target: Target, *corpora: Sequence[Example]) -> list[str]:
    """Returns remarks on how the target was measured, for the board's footnotes."""
    module = sys.modules.get("tdabench.toolkit.coverage")
    found = [c.warning for c in module.covered] if module is not None else []
    if "tokenizer" in target.__dict__:  # something was tokenised
        some = [e for corpus in corpora for e in corpus[:200]]
        if apart := target.apart(some):
            found.append(
                f"{apart} of the first {len(some)} examples have other tokens if prompt and "
                "response are tokenised as one text (docs/models.md)"
            )
    return list(dict.fromkeys(filter(None, found)))


def explain(error: BaseException) -> tuple[str, str]:
    """Returns status and reason of a failure, and the origin of a bug in a plugin."""
    if isinstance(error, TdabenchError):
        lacking = isinstance(error, MissingExtra | NotApplicable)
        return ("skipped" if lacking else "failed"), str(error)
    reason = brief(error)
    memory = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__
    if memory or "can't allocate memory" in str(error) or "not enough memory" in str(error):
        return "oom", reason
    frames = traceback.extract_tb(error.__traceback__)
    if frames:
        last = frames[-1]
        reason += f" (in {last.name}, {Path(last.filename).name}:{last.lineno})"
    return "failed", reason


if __name__ == "__main__":
    sys.exit(main())
