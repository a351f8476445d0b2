"""The process that forks contestants: it has imported libraries and holds nothing else.

The judge forks its nursery before it reads anything that a method must not know, so that neither
the nursery nor what it forks has held a truth. Libraries are imported once there for all
contestants of a job. The nursery is a sub-reaper: it adopts processes that a contestant leaves
behind, so that their time is counted and they end with the judge.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import re
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tdabench.run import sandbox
from tdabench.run.protocol import CHANNEL_FD, Channel, Hangup

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


# --------------------------------------------------------------------------- the judge's side


class Nursery:
    """The judge's handle on its nursery. `output` is a descriptor with the contestants' output."""

    _control: socket.socket

    def __init__(self, others: Sequence[Nursery] = (), hold_stdout: bool = True) -> None:
        """Forks the nursery. It closes its copies of `others`, which then end with their judge.

        With `hold_stdout`, readers of this process's stdout see the nursery's end.
        """
        mine, its = socket.socketpair()
        self.output, printed = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                mine.close()
                os.close(self.output)
                for other in others:
                    other._control.close()
                    os.close(other.output)
                _nurse(its, printed, hold_stdout)
            finally:
                os._exit(0)
        its.close()
        os.close(printed)
        os.set_blocking(self.output, False)
        self._control = mine
        self._answers: list[dict[str, Any]] = []
        self.deaths: dict[int, dict[str, Any]] = {}
        self.tree = Tree(self.pid)
        self.imported = [0.0, 0.0]  # wall and processor seconds of libraries imported here
        self._pending = 0

    def preload(self, folder: Path | None = None) -> None:
        """Imports libraries: those of text methods, and what the model in `folder` needs.

        The import runs in parallel with the judge; `start` waits for it.
        """
        _send(self._control, {"do": "import", "folder": None if folder is None else str(folder)})
        self._pending += 1

    def start(self, place: Mapping[str, Any]) -> tuple[int, Channel]:
        """Starts a contestant: returns its process and the connection to it.

        `place`: `rules`, `landlock` (a version, 0 for no sandbox), `environment`, `cwd`, `fork`
        (False: a new interpreter, for what does not survive a fork, such as CUDA), and `serves`,
        the module whose `main` it runs (by default the contestant's).
        """
        self.ready()
        mine, its = socket.socketpair()
        _send(self._control, {"do": "start", "place": dict(place)}, its)
        its.close()
        return int(self._wait("pid")["pid"]), Channel(mine)

    def ready(self) -> None:
        """Waits until the imports that `preload` requested are done."""
        while self._pending:
            answer = self._wait("imported")
            self._pending -= 1
            self.imported = [a + b for a, b in zip(self.imported, answer["imported"])]

    def death(self, pid: int, seconds: float = 5.0) -> dict[str, Any] | None:
        """Returns how `pid` ended: {"status", "cpu"}, or None if it still runs after `seconds`."""
        end = time.monotonic() + seconds
        while pid not in self.deaths:
            left = end - time.monotonic()
            if left <= 0 or not self._hear(left):
                break
        return self.deaths.get(pid)

    def reap(self) -> None:
        """Reads the nursery's reports of processes that ended."""
        while self._hear(0.0):
            pass

    def _wait(self, key: str) -> dict[str, Any]:
        while True:
            for answer in self._answers:
                if key in answer:
                    self._answers.remove(answer)
                    return answer
            self._hear(None)

    def _hear(self, seconds: float | None) -> bool:
        if not select.select([self._control], [], [], seconds)[0]:
            return False
        message, _ = _receive(self._control)
        if "died" in message:
            self.deaths[message["died"]] = message
            self.tree.died(message["cpu"])
        else:
            self._answers.append(message)
        return True

    def close(self) -> None:
        """Ends the nursery with everything it has started."""
        with contextlib.suppress(OSError):
            self._control.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _send(to: socket.socket, message: Mapping[str, Any], end: socket.socket | None = None) -> None:
    data = json.dumps(message).encode()
    try:
        head = len(data).to_bytes(8, "little")
        if end is None:
            to.sendall(head)
        else:
            socket.send_fds(to, [head], [end.fileno()])
        to.sendall(data)
    except OSError as e:
        raise Hangup from e


def _receive(source: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, fds, _, _ = socket.recv_fds(source, 8, 1)
    length, data = int.from_bytes(head, "little"), b""
    if len(head) < 8:
        raise Hangup
    while len(data) < length:
        more = source.recv(length - len(data))
        if not more:
            raise Hangup
        data += more
    return json.loads(data), fds


# --------------------------------------------------------------------------- the nursery itself


def _nurse(control: socket.socket, printed: int, hold_stdout: bool) -> None:
    """Answers the judge until it ends; then kills all processes below."""
    os.setsid()  # a signal to the judge's group must not end this process before it has cleaned up
    if found := sys.modules.get("tdabench.registry"):
        found.abandon()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    life = os.dup(1 if hold_stdout else null)  # the judge's parent reads it to its end
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    children: set[int] = set()
    try:
        while True:
            waiting: list[Any] = [control, woken]
            ready = select.select(waiting, [], [])[0]
            if woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(woken, 4096)
                _bury(control, children)
            if control not in ready:
                continue
            message, fds = _receive(control)
            if message["do"] == "import":
                start, cpu = time.perf_counter(), time.process_time()
                preload(message["folder"] and Path(message["folder"]))
                spent = [time.perf_counter() - start, time.process_time() - cpu]
                _send(control, {"imported": spent})
            elif message["do"] == "start":
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    _become(control, fds[0], message["place"])
                os.close(fds[0])
                children.add(pid)
                _send(control, {"pid": pid})
    except (Hangup, OSError):
        pass
    signal.set_wakeup_fd(-1)
    end_all(children)
    os.close(life)


def _bury(control: socket.socket, children: set[int]) -> None:
    """Reports every process that has ended to the judge."""
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        children.discard(pid)
        cpu = usage.ru_utime + usage.ru_stime
        _send(control, {"died": pid, "status": status, "cpu": cpu})


def end_all(children: set[int], spared: Collection[int] = ()) -> None:
    """Kills every process below this one, orphans of orphans included, except `spared`.

    `spared` are processes that this one has for another purpose; what is below them stays as well.
    """
    end = time.monotonic() + 5.0
    while time.monotonic() < end:
        kept = {p for s in spared for p in (s, *below(s))}
        left = {*children, *below(os.getpid())} - kept
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)  # each contestant leads its own group
        if spared:  # they are waited for elsewhere
            for pid in left:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            if not left:
                return
            time.sleep(0.005)
            continue
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.005)
            continue
        return


def _become(control: socket.socket, end: int, place: Mapping[str, Any]) -> None:
    """Turns a newly forked process into a contestant; does not return."""
    code = 1
    try:
        control.detach()  # closed below, by number
        os.setsid()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        os.dup2(end, CHANNEL_FD)
        os.closerange(CHANNEL_FD + 1, 1 << 16)
        for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(s, signal.SIG_DFL)
        os.environ.update(place["environment"])
        os.chdir(place["cwd"])
        if place["landlock"]:
            sandbox.confine([tuple(r) for r in place["rules"]], place["landlock"])
        serves = place.get("serves", "tdabench.run.contestant")
        if not place["fork"]:
            os.set_inheritable(CHANNEL_FD, True)
            os.execv(sys.executable, [sys.executable, "-P", "-m", serves])
        tempfile.tempdir = None
        code = importlib.import_module(serves).main()
    except BaseException as e:
        import traceback

        traceback.print_exception(e)
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def preload(folder: Path | None) -> None:
    """Imports what most methods import; with `folder`, torch and the class of its model, too.

    The time to import these libraries does not count in a method's build. Garbage collections are
    off meanwhile, and never visit what was imported: a full one would take a quarter of a second in
    each process forked from this one, and copy 100 MB of pages that these processes share.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        _import_for(folder)
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def _import_for(folder: Path | None) -> None:
    with contextlib.suppress(Exception):
        import scipy.sparse  # noqa: F401

        import tdabench.toolkit.representation
    if folder is None:
        return
    with contextlib.suppress(Exception):
        import torch  # noqa: F401
        import transformers
        from transformers import (  # noqa: F401
            AutoConfig,
            AutoModelForCausalLM,
            AutoTokenizer,
            PreTrainedTokenizerFast,
        )

        import tdabench.targets.target  # noqa: F401

        kind = json.loads((folder / "config.json").read_bytes()).get("model_type", "")
        if re.fullmatch(r"[a-z0-9_]{1,40}", kind):
            __import__(f"{transformers.__name__}.models.{kind}.modeling_{kind}")


# --------------------------------------------------------------------------- times and memory


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Makes this process a sub-reaper within (Linux): orphans below it become its children."""
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), ctypes.c_int()
    libc.prctl(37, ctypes.byref(before), 0, 0, 0)  # PR_GET_CHILD_SUBREAPER
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    try:
        yield
    finally:
        libc.prctl(36, before.value, 0, 0, 0)


def below(root: int) -> list[int]:
    """Lists the ids of all processes below `root`, without `root`; none without /proc."""
    found: list[int] = []
    pending = [root]
    while pending:
        p = pending.pop()
        try:
            for task in os.listdir(f"/proc/{p}/task"):
                with open(f"/proc/{p}/task/{task}/children") as f:
                    pending += map(int, f.read().split())
        except (OSError, ValueError):
            pass
        if p != root:
            found.append(p)
    return found


class Tree:
    """Processor time and memory of all processes below one, read by the measuring process.

    Processor time counts every thread of every process, including those that have ended: the
    kernel adds a child's time to the parent that waited for it, else the nursery counts it.
    """

    def __init__(self, root: int) -> None:
        self.root = root
        self.peak = 0  # bytes, since `forget`
        self._dead = 0.0
        self._most = 0.0
        self._seen: dict[tuple[int, int], float] = {}
        self.works = os.path.isdir(f"/proc/{root}/task")

    def died(self, cpu: float) -> None:
        self._dead += cpu

    def cpu(self) -> float:
        """Sums the processor seconds of every process ever below the root; never decreases."""
        total = self._dead
        for pid in below(self.root):
            own = process_seconds(pid)
            fields = _stat(pid)
            if own is None or fields is None:
                continue
            total += own + (int(fields[13]) + int(fields[14])) / TICKS
            self._seen[pid, int(fields[19])] = own
        # A process that ignores SIGCHLD loses the times of its children: the last values seen
        # of each are then the better bound.
        self._most = max(self._most, total, sum(self._seen.values()))
        return self._most

    def memory(self, main: int) -> int:
        """Returns resident bytes of `main`, and of the other processes without mapped files."""
        total = 0
        for pid in below(self.root):
            facts = status(pid)
            if pid == main:
                total += facts.get("VmRSS", 0)
            else:
                total += facts.get("RssAnon", 0) + facts.get("RssShmem", 0)
        self.peak = max(self.peak, total)
        return total

    def forget(self, main: int) -> bool:
        """Resets the peak; returns whether the kernel could reset the process's own peak."""
        self.peak = 0
        try:
            Path(f"/proc/{main}/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def highest(self, main: int) -> int:
        """Returns peak bytes since `forget`."""
        self.memory(main)
        return max(self.peak, status(main).get("VmHWM", 0))


def process_seconds(pid: int) -> float | None:
    """Sums processor seconds of all threads of a process, to the nanosecond (Linux)."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except (OSError, AttributeError):
        return None


def _stat(pid: int) -> list[str] | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            return f.read().rpartition(")")[2].split()
    except OSError:
        return None


def is_alive(pid: int) -> bool:
    fields = _stat(pid)
    return fields is not None and fields[0] not in "ZX"


def status(pid: int) -> dict[str, int]:
    """Reads the sizes in /proc/PID/status, in bytes."""
    found = {}
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as f:
            for line in f:
                name, _, rest = line.partition(":")
                if rest.endswith(" kB\n"):
                    found[name] = int(rest.split()[0]) * 1024
    except (OSError, ValueError):
        pass
    return found


def command_of(pid: int) -> str:
    """Returns a process's command line, for a message."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return f"process {pid}"
    return " ".join(w for w in words if w)[:120] or f"process {pid}"


def lines(fd: int) -> Iterator[bytes]:
    """Reads from a descriptor what is available now, without waiting."""
    while True:
        try:
            data = os.read(fd, 1 << 16)
        except (BlockingIOError, OSError):
            return
        if not data:
            return
        yield data
