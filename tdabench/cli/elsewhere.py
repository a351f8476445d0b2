"""Carries out a command in another process, where third-party plugins and models may be loaded.

A command that would import a third-party plugin or load a model that tdabench did not bring starts
itself again: this process waits, and ends the other one, with all that it started, when a step
takes longer or more memory than a cell of a run may. The other process says when a step is done.
It imports third-party plugins only if the command cannot do without (`imports`), and is then
confined to `rules` where the system can, if the command gives some.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from tdabench.errors import TdabenchError

VARIABLE = "TDABENCH_WORKER"  # the descriptor that the other process reports to
SECONDS = 7200.0  # per step, as for a phase of a cell
_POLL = 0.05
_arguments: list[str] = []
_report = -1
_imports = False


def begin(arguments: Sequence[str]) -> None:
    """Stores the arguments of this command line, and whether this is the other process."""
    global _report, _imports
    _arguments[:] = arguments
    told = os.environ.pop(VARIABLE, "")
    if told:
        number, _, rest = told.partition(",")
        _report, _imports = int(number), bool(rest)
        os.set_inheritable(_report, False)
        _follow_parent()
        if rest.startswith("/"):
            _confine(Path(rest))


def imports() -> bool:
    """Tells whether this process may import third-party plugins."""
    return here() and _imports


def _confine(given: Path) -> None:
    """Confines this process, before any plugin is imported."""
    from tdabench.run import sandbox

    told = json.loads(given.read_text("utf-8"))
    os.environ.update(told["environment"])
    tempfile.tempdir = None
    sandbox.confine([(path, access) for path, access in told["rules"]], told["landlock"])


def here() -> bool:
    """Tells whether this process may load third-party plugins and models."""
    return _report >= 0


def step() -> None:
    """Reports that a step is done, which starts the time limit anew."""
    if here():
        with contextlib.suppress(OSError):
            os.write(_report, b".")


def end(code: int) -> None:
    """Reports that the command is done; without this report its end counts as a crash."""
    _arguments.clear()
    if here():
        with contextlib.suppress(OSError):
            os.write(_report, b"=%d\n" % code)


def carried_out(
    methods: Iterable[str] = (),
    *,
    benchmarks: Iterable[str] = (),
    foreign: bool = False,
    what: str = "the command",
    imports: bool = False,
    rules: Callable[[], list[tuple[str, str]]] | None = None,
) -> int | None:
    """Runs the command in another process if third-party code or models need it.

    `methods` and `benchmarks` are the names concerned; `foreign` tells whether a model of the
    user's own is; `imports` whether the other process has to import third-party plugins, and
    `rules` what it may read then (see tdabench.run.sandbox), besides a temporary folder that it may
    write. Returns the exit code, or None if the command belongs in this process. Raises
    TdabenchError if the other process hit a limit or died.
    """
    inside = here() or not _arguments  # not called by the command line
    if inside or not (foreign or _third_party(methods, benchmarks)):
        return None
    return _watched(what, imports, rules)


def is_foreign(suite: str | None) -> bool:
    """Tells whether a suite is not one that tdabench brings."""
    from tdabench.registry import OWN, registry

    entry = registry().suites.get(suite or "pocket")
    return entry is None or entry.origin.distribution != OWN


def _third_party(methods: Iterable[str], benchmarks: Iterable[str]) -> bool:
    """Tells whether a third-party plugin brings one of these; unknown names do not count."""
    from tdabench.registry import OWN, registry

    known, methods = registry(), list(methods)
    if "all" in methods:
        methods = list(known.methods)
    found = [known.methods.get(n) for n in methods]
    found += [known.benchmarks.get(n) for n in benchmarks]
    return any(e is not None and e.origin.distribution != OWN for e in found)


# --------------------------------------------------------------------------- the watching process


@contextlib.contextmanager
def _limits(rules: Callable[[], list[tuple[str, str]]] | None) -> Iterator[str]:
    """Writes down what the other process may read, in a folder that it may write; its file."""
    from tdabench.run import sandbox

    if rules is None or not sandbox.abi():
        yield "imports"
        return
    with tempfile.TemporaryDirectory(prefix="tdabench-") as folder:
        place = Path(folder, "limits.json")
        told = {
            "rules": [*rules(), (folder, "write")],
            "landlock": sandbox.abi(),
            "environment": sandbox.private_environment(Path(folder)),
        }
        place.write_text(json.dumps(told), "utf-8")
        yield str(place)


def _watched(what: str, imports: bool, rules: Callable[[], list[tuple[str, str]]] | None) -> int:
    with _limits(rules) if imports else contextlib.nullcontext("") as told:
        return _wait_for(what, told)


def _wait_for(what: str, told: str) -> int:
    from tdabench.limited import allowed_memory, seconds_limit
    from tdabench.run.execute import tree_bytes
    from tdabench.run.nursery import adopting_orphans, below, end_all

    spared = below(os.getpid())  # processes of plugins, and any that the calling program started
    seconds, memory = seconds_limit(SECONDS), allowed_memory()
    reading, writing = os.pipe()
    paths = [os.path.abspath(p) for p in sys.path]
    env = {**os.environ, VARIABLE: f"{writing},{told}", "PYTHONPATH": os.pathsep.join(paths)}
    sys.stdout.flush()
    sys.stderr.flush()
    ours = _passed_through()
    with adopting_orphans():
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tdabench", *_arguments], env=env, pass_fds=(writing,),
            stdout=None if ours else subprocess.PIPE, stderr=None if ours else subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        relays = [] if ours else _relays(process)
        os.set_blocking(reading, False)
        said, verdict, since = b"", "", time.monotonic()
        try:
            while process.poll() is None:
                with contextlib.suppress(BlockingIOError):
                    if more := os.read(reading, 1 << 16):
                        said, since = (said + more)[-64:], time.monotonic()
                if time.monotonic() - since > seconds:
                    verdict = f"took longer than {seconds:g} s"
                    break
                if memory and tree_bytes(process.pid) > memory:
                    verdict = f"took more than the {memory / 2**30:.2f} GiB of memory allowed"
                    break
                time.sleep(_POLL)
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):
                process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                process.wait(10)
            raise
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            end_all(set(), spared)
            with contextlib.suppress(BlockingIOError):
                said = (said + os.read(reading, 1 << 16))[-64:]
            os.close(reading)
            for relay in relays:
                relay.join(5)
    if verdict:
        raise TdabenchError(
            f"{what} {verdict}", "See TDABENCH_LOAD_SECONDS and TDABENCH_LOAD_MEMORY"
        )
    code = process.returncode
    if b"=" in said:
        return int(said.rpartition(b"=")[2] or b"1")
    if code == -signal.SIGINT or code == 130:
        return 130
    how = f"ended with exit status {code}"
    if code < 0:
        known = {s.value: s.name for s in signal.Signals}
        how = f"was killed by {known.get(-code, f'signal {-code}')}"
    raise TdabenchError(f"{what} stopped: its process {how}", "A plugin or a model may do that")


def _passed_through() -> bool:
    """Tells whether the other process can write where this one does: not if Python captures it."""
    try:
        return (sys.stdout.fileno(), sys.stderr.fileno()) == (1, 2)
    except (OSError, ValueError, AttributeError):
        return False


def _relays(process: subprocess.Popen[bytes]) -> list[threading.Thread]:
    def relay(source: IO[bytes], to: Any) -> None:
        for line in source:
            to.write(line.decode("utf-8", "backslashreplace"))

    assert process.stdout is not None
    assert process.stderr is not None
    pairs = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    threads = [threading.Thread(target=relay, args=p, daemon=True) for p in pairs]
    for thread in threads:
        thread.start()
    return threads


def _follow_parent() -> None:
    """Makes this process die with the one that watches it, if the system supports it."""
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
