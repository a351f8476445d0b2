"""Methods that cheat or attack, each in several ways; the reason of a row names what worked."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tdabench.api import Index, TdabenchError, TDAMethod, hookimpl, read_arrays, write_arrays

IMPORTED_IN = os.getpid()
SPIN = 0.3  # processor seconds of hidden work


def spin(seconds: float = SPIN) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


class PlainIndex(Index):
    """Random scores, the same for every method here."""

    def __init__(self, method: Any, context: Any, n_train: int) -> None:
        self.method, self.context, self.n_train = method, context, n_train

    def score(self, queries):
        self.method.scoring(self.context, queries)
        rng = self.context.rng("plain")
        return rng.normal(size=(len(queries), self.n_train)).astype(np.float32)

    def save(self, path: Path) -> None:
        write_arrays(path / "index.safetensors", {"n": np.array([self.n_train])})
        self.method.saving(self.context, path)


@dataclass(frozen=True, kw_only=True)
class Plain(TDAMethod):
    name: ClassVar[str] = "plain"
    summary: ClassVar[str] = "random scores"

    at: str = ""  # what to attack, as JSON: {"truth": PATH, "run": PATH, ...}

    def build(self, context, train):
        self.building(context, train)
        return PlainIndex(self, context, len(train))

    def load(self, context, path):
        self.loading(context, path)
        arrays, _ = read_arrays(path / "index.safetensors")
        return PlainIndex(self, context, int(arrays["n"][0]))

    def building(self, context, train):
        pass

    def saving(self, context, path):
        pass

    def loading(self, context, path):
        pass

    def scoring(self, context, queries):
        pass

    def places(self) -> dict[str, str]:
        return json.loads(self.at)


def succeeded(attempts: dict[str, Callable[[], Any]]) -> list[str]:
    """Names of the attempts that gave something."""
    found = []
    for name, attempt in attempts.items():
        with contextlib.suppress(Exception):
            if attempt():
                found.append(name)
    return found


def tell(found: list[str]) -> None:
    if found:
        raise TdabenchError(f"succeeded: {', '.join(found)}")


def ancestors() -> list[int]:
    """This process's parents, as far as /proc or the system calls tell."""
    found, pid = [], os.getppid()
    while pid > 1:
        found.append(pid)
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            pid = int(fields[1])
        except OSError:
            break
    return found


def by_child(*command: str) -> bytes:
    return subprocess.run(command, capture_output=True).stdout


@dataclass(frozen=True, kw_only=True)
class Reads(Plain):
    """Reads the truth, by every way there is."""

    name: ClassVar[str] = "reads"

    def building(self, context, train):
        tell(self.attempts(context))

    def scoring(self, context, queries):
        tell(self.attempts(context))

    def attempts(self, context) -> list[str]:
        at, scratch = self.places(), context.scratch
        truth = at["truth"]

        libc = ctypes.CDLL(None)

        def linked() -> bytes:
            link = scratch / "link"
            link.symlink_to(truth)
            try:
                return link.read_bytes()
            finally:
                link.unlink()

        def hard() -> bytes:
            os.link(truth, scratch / "hard")
            return (scratch / "hard").read_bytes()

        def moved() -> bool:
            here, there = truth.encode(), str(scratch / "moved").encode()
            return libc.rename(here, there) == 0 and libc.rename(there, here) == 0

        def native() -> bool:
            return libc.open(truth.encode(), os.O_RDONLY) >= 0

        def suite() -> bytes:
            return Path(context.assets.suite.targets[0].truths["lds"]).read_bytes()

        def inherited() -> bool:
            return any(
                "truth" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
            )

        return succeeded(
            {
                "open": lambda: Path(truth).read_bytes(),
                "a child": lambda: by_child("cat", truth),
                "a python child": lambda: by_child(
                    sys.executable, "-c", f"print(open({truth!r}, 'rb').read())"
                ),
                "a symbolic link": linked,
                "a hard link": hard,
                "a move": moved,
                "libc": native,
                "context.assets.suite": suite,
                "the root of a parent": lambda: [
                    Path(f"/proc/{p}/root{truth}").read_bytes() for p in ancestors()
                ],
                "descriptors of a parent": lambda: [
                    os.readlink(fd) for p in ancestors() for fd in glob.glob(f"/proc/{p}/fd/*")
                ],
                "memory of a parent": lambda: [
                    open(f"/proc/{p}/mem", "rb") for p in ancestors() or [1 / 0]
                ],
                "an inherited descriptor": inherited,
                "the suite": lambda: Path(at["suite"]).read_bytes(),
                "the corpus with its queries": lambda: Path(at["corpus"]).read_bytes(),
                "the job": lambda: next(iter(Path(at["run"]).rglob("job.json"))).read_bytes(),
                "a record": lambda: next(Path(at["run"], "cells").iterdir()).read_bytes(),
                "another run": lambda: Path(at["other"], "log.jsonl").read_bytes(),
                "kernel memory": lambda: open("/proc/kcore", "rb").read(64),
                "a disk": lambda: [
                    os.mknod(scratch / "disk", 0o60600, os.stat(truth).st_dev),
                    (scratch / "disk").open("rb").read(16),
                ],
            }
        )


@dataclass(frozen=True, kw_only=True)
class Writes(Plain):
    """Writes to what is not its own."""

    name: ClassVar[str] = "writes"

    def building(self, context, train):
        at = self.places()
        run = Path(at["run"])
        targets = {
            "the truth": Path(at["truth"]),
            "the log of the run": run / "log.jsonl",
            "the manifest": run / "manifest.json",
            "retrained": run / "retrained" / "0.safetensors",
            "another row": run / "cells" / f"{'0' * 16}.json",
            "its own log": next(iter((run / "logs").glob("writes*")), run / "logs" / "x.log"),
            "another run": Path(at["other"]) / "log.jsonl",
        }
        if at["confined"]:  # where it may succeed, the tests go on afterwards
            targets |= {
                "the target": context.target.folder / "config.json",
                "the harness": Path(sys.modules["tdabench"].__file__),
                "home": Path.home() / ".tdabench-was-here",
            }
        attempts: dict[str, Callable[[], Any]] = {}
        for what, path in targets.items():
            attempts[f"{what} by a child"] = lambda p=path: (
                not by_child("sh", "-c", f"echo x >> {p} && echo done") == b""
            )
            attempts[f"{what} truncated"] = lambda p=path: (
                ctypes.CDLL(None).truncate(str(p).encode(), 3) == 0
            )
            attempts[f"{what} removed"] = lambda p=path: (
                ctypes.CDLL(None).unlink(str(p).encode()) == 0
            )
            attempts[f"{what} as a FIFO"] = lambda p=path: (
                ctypes.CDLL(None).mkfifo(str(p).encode(), 0o600) == 0
            )
        tell(succeeded(attempts))


@dataclass(frozen=True, kw_only=True)
class Patches(Plain):
    """Patches statistics, arrays and clocks in its process, at import and later."""

    name: ClassVar[str] = "patches"

    def building(self, context, train):
        patch()

    def loading(self, context, path):
        patch()
        context.target._meter.setup.seconds += 1e6  # claims that all it did was set-up


def patch() -> None:
    import tdabench.groups
    import tdabench.run.meter
    import tdabench.stats

    tdabench.stats.spearman_rows = lambda a, b: np.ones(len(a))
    tdabench.groups.pool_scores = lambda *a: np.zeros((1, 1))
    tdabench.run.meter.checked = lambda *a: None
    for name in ("perf_counter", "process_time", "monotonic"):
        setattr(time, name, lambda: 0.0)


class HidesIndex(PlainIndex):
    def save(self, path: Path) -> None:
        spin()
        super().save(path)


def hidden_child() -> None:
    code = f"import time\nwhile time.process_time() < {SPIN}: pass"
    subprocess.run([sys.executable, "-S", "-c", code])


@dataclass(frozen=True, kw_only=True)
class HidesTime(Plain):
    """Works while it prepares, saves and loads, in a child, a thread, and under a false clock."""

    name: ClassVar[str] = "hides-time"

    def prepare_cost(self, context):
        spin()
        return None

    def building(self, context, train):
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody is told what the child took
        hidden_child()
        context.target._meter.setup.seconds += 1e6
        context.target._meter.setup.cpu += 1e6

    def saving(self, context, path):
        spin()

    def loading(self, context, path):
        thread = threading.Thread(target=spin, args=(1e9,), daemon=True)
        thread.start()
        spin()


@dataclass(frozen=True, kw_only=True)
class HidesMemory(Plain):
    """Its child holds 200 MB; and it asks the kernel to forget."""

    name: ClassVar[str] = "hides-memory"

    def building(self, context, train):
        code = "import time\nx = bytearray(200 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\n"
        subprocess.run([sys.executable, "-S", "-c", code + "time.sleep(1)"])
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


KEPT: dict[str, int] = {}


@dataclass(frozen=True, kw_only=True)
class HidesBytes(Plain):
    """Its index is in the scratch folder."""

    name: ClassVar[str] = "hides-bytes"

    def saving(self, context, path):
        (context.scratch / "rest").write_bytes(b"x" * 500_000)
        (path / "where").write_text(str(context.scratch / "rest"))

    def loading(self, context, path):
        Path((path / "where").read_text()).read_bytes()


@dataclass(frozen=True, kw_only=True)
class HidesInMemory(Plain):
    """Its index is in the process that built it."""

    name: ClassVar[str] = "hides-in-memory"

    def building(self, context, train):
        KEPT["n"] = 1

    def loading(self, context, path):
        assert KEPT, "nothing is left in memory"


@dataclass(frozen=True, kw_only=True)
class LinksBytes(Plain):
    """Its index is a link."""

    name: ClassVar[str] = "links-bytes"

    def saving(self, context, path):
        (context.scratch / "rest").write_bytes(b"x" * 500_000)
        (path / "rest").symlink_to(context.scratch / "rest")


@dataclass(frozen=True, kw_only=True)
class Daemon(Plain):
    """Leaves a process that belongs to no session of its own, and goes on for ever."""

    name: ClassVar[str] = "daemon"

    def building(self, context, train):
        gone, kept = os.pipe()  # closed in the orphan when it becomes another program
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            code = "import time; time.sleep(1e6)  # tdabench-orphan"
            os.execv(sys.executable, [sys.executable, "-S", "-c", code])
        os.wait()
        os.close(kept)
        os.read(gone, 1)


@dataclass(frozen=True, kw_only=True)
class Signals(Plain):
    """Ends, interrupts and stops whoever runs it."""

    name: ClassVar[str] = "signals"

    def building(self, context, train):
        attempts = {}
        for pid in [os.getppid(), *ancestors(), int(self.places()["harness"])]:
            for s in (signal.SIGINT, signal.SIGTERM, signal.SIGSTOP):
                attempts[f"{s.name} to {pid}"] = lambda p=pid, s=s: os.kill(p, s) is None
        tell(succeeded(attempts))


@dataclass(frozen=True, kw_only=True)
class Connects(Plain):
    """Asks somebody outside."""

    name: ClassVar[str] = "connects"

    def building(self, context, train):
        port = int(self.places()["port"])
        tell(
            succeeded(
                {"a connection": lambda: socket.create_connection(("127.0.0.1", port), timeout=5)}
            )
        )


@dataclass(frozen=True, kw_only=True)
class HangsUp(Plain):
    """Closes its connection to the harness, and stays."""

    name: ClassVar[str] = "hangs-up"

    def building(self, context, train):
        os.close(3)
        time.sleep(600)


@dataclass(frozen=True, kw_only=True)
class Babbles(Plain):
    """Says to the harness what is no message."""

    name: ClassVar[str] = "babbles"

    def building(self, context, train):
        os.write(3, (20).to_bytes(8, "little") + b"not JSON, twenty by.")
        time.sleep(600)


@dataclass(frozen=True, kw_only=True)
class Floods(Plain):
    """Answers with more than was asked for."""

    name: ClassVar[str] = "overflows"

    def scoring(self, context, queries):
        head = json.dumps({"message": {}, "arrays": [["scores", "<f8", [1 << 20, 1 << 20]]]})
        os.write(3, len(head).to_bytes(8, "little") + head.encode())
        time.sleep(600)


@dataclass(frozen=True, kw_only=True)
class Labels(Plain):
    """Looks for labels and other fields in what it is given."""

    name: ClassVar[str] = "labels"

    def building(self, context, train):
        tell(["training labels"] if any(e.task or dict(e.meta) for e in train) else [])

    def scoring(self, context, queries):
        tell(["labels of queries"] if any(e.task or dict(e.meta) for e in queries) else [])


@dataclass(frozen=True, kw_only=True)
class Points(Plain):
    """Its parameters name what it wants to read; some of them by default."""

    name: ClassVar[str] = "points"

    truth: str = ""
    link: str = ""
    folder: str = ""
    corpus: str = ""
    own: str = ""  # a file that it may read
    root: str = "/"

    def building(self, context, train):
        truth = self.places()["truth"]
        assert Path(self.own).read_text() == "mine"
        tell(
            succeeded(
                {
                    "the truth as a parameter": lambda: Path(self.truth).read_bytes(),
                    "a link to it": lambda: Path(self.link).read_bytes(),
                    "its folder": lambda: os.listdir(self.folder),
                    "the corpus": lambda: Path(self.corpus).read_bytes(),
                    "all, by default": lambda: Path(self.root, truth.lstrip("/")).read_bytes(),
                    "the root, by default": lambda: Path(self.root, "root").iterdir().__next__(),
                }
            )
        )


@dataclass(frozen=True, kw_only=True)
class Borrows(Plain):
    """Reads an asset by its path, before and after it asks for it."""

    name: ClassVar[str] = "borrows"

    def building(self, context, train):
        original = Path(self.places()["asset"])
        found = succeeded({"an asset by its path": original.read_bytes})
        lent = context.asset("notes")
        assert (lent / "a" / "deep.txt").read_text() == "an asset"
        libc, file = ctypes.CDLL(None), str(lent / "a" / "deep.txt").encode()
        found += succeeded(
            {
                "an asset by its path, after asking": (original / "a" / "deep.txt").read_bytes,
                "writing to an asset": lambda: libc.truncate(file, 3) == 0,
                "removing it": lambda: libc.unlink(file) == 0,
            }
        )
        tell(found)


@dataclass(frozen=True, kw_only=True)
class Follows(Plain):
    """Reads a file that a parameter names."""

    name: ClassVar[str] = "follows"

    file: str = ""

    def building(self, context, train):
        assert Path(self.file).read_text()


@dataclass(frozen=True, kw_only=True)
class Channels(Plain):
    """Leaves a word with somebody outside, by ways that are no files."""

    name: ClassVar[str] = "channels"

    def building(self, context, train):
        libc = ctypes.CDLL(None)

        def datagram() -> bool:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                return s.sendto(b"x", ("127.0.0.1", 9)) == 1

        def abstract() -> bool:
            with socket.socket(socket.AF_UNIX) as s:
                return s.bind("\0tdabench-attack") is None

        def raw(number: int, *arguments: int) -> bool:
            return libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)) >= 0

        tell(
            succeeded(
                {
                    "a datagram": datagram,
                    "an abstract socket": abstract,
                    "System V memory": lambda: libc.shmget(0x7DAB, 4096, 0o1600) >= 0,
                    "a System V queue": lambda: libc.msgget(0x7DAB, 0o1600) >= 0,
                    "a System V semaphore": lambda: libc.semget(0x7DAB, 1, 0o1600) >= 0,
                    "a POSIX queue": lambda: libc.mq_open(b"/tdabench", 0o102, 0o600, None) >= 0,
                    "POSIX memory": lambda: libc.shm_open(b"/tdabench", 0o102, 0o600) >= 0,
                    "io_uring": lambda: raw(
                        425, 4, ctypes.addressof(ctypes.create_string_buffer(512))
                    ),
                }
            )
        )


@dataclass(frozen=True, kw_only=True)
class Locks(Plain):
    """Uses a lock of multiprocessing."""

    name: ClassVar[str] = "locks"

    def building(self, context, train):
        import multiprocessing

        multiprocessing.Lock()


@dataclass(frozen=True, kw_only=True)
class Pipes(Plain):
    """Works in a child process and through a pipe, which it may."""

    name: ClassVar[str] = "pipes"

    def building(self, context, train):
        import multiprocessing

        ours, theirs = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=theirs.send, args=(42,))
        child.start()
        assert ours.recv() == 42
        child.join()
        a, b = socket.socketpair()
        b.send(b"x")
        assert a.recv(1) == b"x"


ALL = [
    Plain, Reads, Writes, Patches, HidesTime, HidesMemory, HidesBytes, HidesInMemory, LinksBytes,
    Daemon, Signals, Connects, HangsUp, Babbles, Floods, Labels, Points, Borrows, Follows, Channels,
    Locks, Pipes,
]  # fmt: skip


@hookimpl
def tdabench_methods():
    return ALL
