"""One method for every way of behaving badly that tests/run/toys.py does not have already."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from tdabench.api import hookimpl

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
from toys import Toy, ToyIndex


@dataclass(frozen=True, kw_only=True)
class SeedsInLoad(Toy):
    name: ClassVar[str] = "seeds-in-load"

    def load(self, context, path):
        np.random.seed(0)
        return super().load(context, path)


class LitteringIndex(ToyIndex):
    def save(self, path: Path) -> None:
        super().save(path)
        (path.parent.parent.parent / "litter.txt").write_text("not fine")


@dataclass(frozen=True, kw_only=True)
class LittersInSave(Toy):
    name: ClassVar[str] = "litters-in-save"

    def build(self, context, train):
        return LitteringIndex(self, context, len(train))


@dataclass(frozen=True, kw_only=True)
class NoIndex(Toy):
    name: ClassVar[str] = "no-index"

    def build(self, context, train):
        return {"scores": 1}


@dataclass(frozen=True, kw_only=True)
class Quits(Toy):
    name: ClassVar[str] = "quits"

    def during_build(self, context):
        sys.exit("enough")


@dataclass(frozen=True, kw_only=True)
class Interrupts(Toy):
    name: ClassVar[str] = "interrupts"

    def spoil(self, scores, context):
        raise KeyboardInterrupt


@dataclass(frozen=True, kw_only=True)
class Shouts(Toy):
    """Its message would repaint the terminal, and holds half a surrogate pair."""

    name: ClassVar[str] = "shouts"

    def during_build(self, context):
        raise ValueError("\x1b[2J\x1b[31m[bold]all is well[/] \u202e\ud800" + "!" * 10_000)


@dataclass(frozen=True, kw_only=True)
class Erases(Toy):
    """Removes the run, closes its own output, and goes on to another folder."""

    name: ClassVar[str] = "erases"

    def during_build(self, context):
        run = next(p for p in context.scratch.parents if p.name == "work").parent
        subprocess.run(["rm", "-rf", run], capture_output=True)
        os.chdir("/")
        os.environ.clear()
        os.close(1)


@dataclass(frozen=True, kw_only=True)
class Leaves(Toy):
    """Leaves a process behind that would write for ever."""

    name: ClassVar[str] = "leaves"

    def during_build(self, context):
        code = "import sys, time\nwhile True: time.sleep(0.1); open(sys.argv[1], 'a').write('x')"
        subprocess.Popen([sys.executable, "-c", code, str(context.scratch / "beat")])


@dataclass(frozen=True, kw_only=True)
class Jumps(Toy):
    """The wall clock goes years back and forth under it, and under the harness with it."""

    name: ClassVar[str] = "jumps"

    def during_build(self, context):
        real, calls = time.time, []

        def jumping() -> float:
            calls.append(1)
            return real() + (1e9 if len(calls) % 2 else -1e9)

        time.time = jumping


@dataclass(frozen=True, kw_only=True)
class Floods(Toy):
    name: ClassVar[str] = "floods"

    def during_build(self, context):
        while True:
            print("x" * 1000, flush=True)
            time.sleep(0.005)


@dataclass(frozen=True, kw_only=True)
class SlowSave(Toy):
    """An index of many files, slowly written: most kills fall in the middle of it."""

    name: ClassVar[str] = "slow-save"

    def build(self, context, train):
        return SlowIndex(self, context, len(train))

    def load(self, context, path):
        assert len(list(path.glob("part-*"))) == 8, "a half-written index was read"
        return super().load(context, path)


class SlowIndex(ToyIndex):
    def save(self, path: Path) -> None:
        for n in range(8):
            time.sleep(0.1)
            (path / f"part-{n}").write_bytes(b"x" * 1000)
        super().save(path)


ALL = [SeedsInLoad, LittersInSave, NoIndex, Quits, Interrupts, Shouts, Erases, Leaves, Jumps]


@hookimpl
def tdabench_methods():
    return [*ALL, Floods, SlowSave]
