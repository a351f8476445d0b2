"""Runs methods confined as in a run, for the law `works-confined`.

A server process, `python -m tdabench.testing.confined`, has imported libraries and computed
nothing, so that it can fork: two children per method, one that builds and saves an index and one
that loads it and scores. Requests and answers are one line of JSON each.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.groups import Groups
from tdabench.method import TDAMethod
from tdabench.testing.tiny import TinyWorld

SECONDS = 300.0  # per child
NOT_FOUND = "not found"  # the kind of failure of a class that cannot be imported


def run_confined(
    method: TDAMethod, world: TinyWorld, groups: Groups, folder: Path
) -> dict[str, Any]:
    """Builds, saves, loads and scores a method in the sandbox, in other processes.

    `folder` is an empty folder for all that they write.

    Returns `scores` [query, train] and `group_scores` [query, group], or `error`, the reason,
    with its `kind` (the exception's class, or `NOT_FOUND`) and the call (`doing`).
    """
    from tdabench.run import sandbox
    from tdabench.run.plan import jsonable
    from tdabench.run.protocol import spelled, write_corpus

    cls = type(method)
    for name in ("cwd", "tmp", "build", "index", "load"):
        (folder / name).mkdir()
    given = write_corpus(folder / "train.jsonl", world.train, cls.reads_labels)
    target = {f.name: getattr(world.target, f.name) for f in dataclasses.fields(world.target)}
    target["recipe"] = dataclasses.asdict(world.target.recipe)
    shown = [world.target.folder, *world.assets.values()]
    rules = sandbox.libraries((), sys.path)
    for path in shown:
        rules += sandbox.with_links(path, ())
    module = sys.modules.get(cls.__module__)
    source = getattr(module, "__file__", None) or ""
    if source:
        rules += sandbox.granted(source, ())
    own = [("cwd", "read"), ("tmp", "write"), ("build", "write"), ("index", "write")]
    own += [("load", "write"), ("train.jsonl", "read")]
    request = {
        "path": sys.path,
        "module": cls.__module__,
        "class": cls.__qualname__,
        "source": source,
        "params": jsonable(method.params),
        "folder": str(folder),
        "target": {**jsonable(target), "fingerprint": world.target.fingerprint},
        "reading": world.target._reading,
        "assets": {k: str(v) for k, v in world.assets.items()},
        "train": given,
        "queries": spelled(world.queries, cls.reads_labels),
        "groups": [np.asarray(g).tolist() for g in groups],
        "rules": [*rules, *((str(folder / name), access) for name, access in own)],
        "landlock": sandbox.abi(),
    }
    for step in ("build", "load"):
        answer = _ask({**request, "step": step})
        if "error" in answer:
            return answer
    found = [folder / "load" / f"{name}.npy" for name in ("scores", "group_scores")]
    scores, group_scores = (np.load(f, allow_pickle=False) for f in found)
    return {"scores": scores, "group_scores": group_scores}


@functools.lru_cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "tdabench.testing.confined"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # its stdin ends, and with it the server
    return server


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    if _server().poll() is not None:  # something ended it since its last answer
        _server.cache_clear()
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        _server.cache_clear()
        raise RuntimeError("the process that starts confined methods ended")
    return dict(json.loads(answer))


# --------------------------------------------------------------------------- the server


def main() -> None:
    """Answers requests on stdin until it ends."""
    from tdabench.run.nursery import adopting_orphans, preload

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks ends this one
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    loaded = False
    with adopting_orphans():
        for line in iter(sys.stdin.readline, ""):
            request = json.loads(line)
            answer = _in_a_child(request)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
            if answer.pop("torch", False) and not loaded:
                preload(Path(request["target"]["folder"]))
                loaded = True


def _in_a_child(request: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the answer of a confined child, after everything that it started has ended."""
    from tdabench.run.nursery import end_all

    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            os.setsid()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.write(writing, json.dumps(_answer(request)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    end, ended, parent = time.monotonic() + SECONDS, False, os.getppid()
    while time.monotonic() < end and not ended and os.getppid() == parent:
        ended = os.waitpid(pid, os.WNOHANG)[0] == pid
        time.sleep(0.0 if ended else 0.01)
    end_all(set() if ended else {pid})
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)
    with os.fdopen(reading, "rb") as f:
        said = f.read()
    if said:
        return dict(json.loads(said))
    how = "its process died" if ended else f"it did not end within {SECONDS:.0f} s"
    return {"error": how, "kind": "", "doing": request["step"]}


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Confines this process and makes the calls of the request's step."""
    from tdabench.run import sandbox

    folder, doing = Path(request["folder"]), "the import"
    try:
        sys.path[:] = request["path"]
        os.environ.update(sandbox.private_environment(folder / "tmp"))
        os.chdir(folder / "cwd")
        sandbox.confine([(p, access) for p, access in request["rules"]], request["landlock"])
        cls = _method_class(request)
        if cls is None:
            return {"error": "", "kind": NOT_FOUND, "doing": doing}
        doing = request["step"]
        for call in _steps(cls, request, folder):
            doing = call
    except BaseException as e:
        return {"error": str(e)[:2000], "kind": type(e).__name__, "doing": doing}
    return {"torch": "torch" in sys.modules}


def _method_class(request: Mapping[str, Any]) -> Any:
    """Returns the method's class, or None if it cannot be imported by its name or from its file."""
    from tdabench.registry import import_plugin

    name, source = request["module"], request["source"]
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name is None or not (name == e.name or name.startswith(f"{e.name}.")):
            raise
        found = None
    if source.endswith(".py") and getattr(found, "__file__", None) != source:
        found = import_plugin(source)
    for part in request["class"].split("."):
        found = getattr(found, part, None)
    return found


def _steps(cls: Any, request: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Yields the name of each call before it makes the call."""
    from tdabench.data.examples import Corpus
    from tdabench.method import Context
    from tdabench.run.contestant import read_target
    from tdabench.run.protocol import read_corpus, read_examples

    method = cls.from_params(request["params"])
    context = Context(
        target=read_target(request["target"], request["reading"]),
        scratch=folder / request["step"],
        assets={k: Path(v) for k, v in request["assets"].items()},
    )
    train = read_corpus(request["train"])
    if request["step"] == "build":
        yield "build"
        index = method.build(context, train)
        yield "save"
        index.save(folder / "index")
        return
    queries = Corpus(read_examples(request["queries"]), "queries")
    yield "load"
    index = method.load(context, folder / "index")
    yield "score"
    np.save(folder / "load" / "scores.npy", np.asarray(index.score(queries)))
    yield "score_groups"
    groups = Groups.of(request["groups"], len(train))
    scores = np.asarray(index.score_groups(queries, groups))
    np.save(folder / "load" / "group_scores.npy", scores)


if __name__ == "__main__":
    main()
