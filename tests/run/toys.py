"""Methods that misbehave, each in its own way, and one that does not."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from tdabench.api import (
    Index,
    MissingExtra,
    TDAMethod,
    hookimpl,
    read_arrays,
    write_arrays,
)


class ToyIndex(Index):
    def __init__(self, method, context, n_train):
        self.method, self.context, self.n_train = method, context, n_train

    def score(self, queries):
        rng = self.context.rng("toy")
        scores = rng.normal(size=(len(queries), self.n_train)).astype(np.float32)
        return self.method.spoil(scores, self.context)

    def save(self, path: Path) -> None:
        write_arrays(path / "index.safetensors", {"n": np.array([self.n_train])})


@dataclass(frozen=True, kw_only=True)
class Toy(TDAMethod):
    name: ClassVar[str] = "toy"
    summary: ClassVar[str] = "random scores"

    size: int = 3
    share: float = 0.5

    def build(self, context, train):
        self.during_build(context)
        return ToyIndex(self, context, len(train))

    def load(self, context, path):
        arrays, _ = read_arrays(path / "index.safetensors")
        return ToyIndex(self, context, int(arrays["n"][0]))

    def during_build(self, context):
        pass

    def spoil(self, scores, context):
        return scores


@dataclass(frozen=True, kw_only=True)
class Raises(Toy):
    name: ClassVar[str] = "raises"

    def during_build(self, context):
        raise ZeroDivisionError("one by nought")


@dataclass(frozen=True, kw_only=True)
class Shape(Toy):
    name: ClassVar[str] = "shape"

    def spoil(self, scores, context):
        return scores[:, :-1]


@dataclass(frozen=True, kw_only=True)
class NotANumber(Toy):
    name: ClassVar[str] = "nan"

    def spoil(self, scores, context):
        scores[:3, 0] = np.nan
        return scores


@dataclass(frozen=True, kw_only=True)
class Hangs(Toy):
    name: ClassVar[str] = "hangs"

    def spoil(self, scores, context):
        time.sleep(600)
        return scores


@dataclass(frozen=True, kw_only=True)
class Crashes(Toy):
    name: ClassVar[str] = "crashes"

    def during_build(self, context):
        print("about to crash", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)


@dataclass(frozen=True, kw_only=True)
class Prints(Toy):
    name: ClassVar[str] = "prints"

    def during_build(self, context):
        print("noise on stdout")
        os.write(1, b"noise on the descriptor\n")


@dataclass(frozen=True, kw_only=True)
class Seeds(Toy):
    name: ClassVar[str] = "seeds"

    def during_build(self, context):
        np.random.seed(0)
        random.random()


@dataclass(frozen=True, kw_only=True)
class Alters(Toy):
    name: ClassVar[str] = "alters"

    def during_build(self, context):
        import torch

        model = context.target.model("base")
        with torch.no_grad():
            next(iter(model.parameters())).mul_(2)


@dataclass(frozen=True, kw_only=True)
class Hoards(Toy):
    name: ClassVar[str] = "hoards"

    def during_build(self, context):
        kept = []
        for _ in range(200):
            kept.append(np.ones(2 << 20))  # 16 MiB
            time.sleep(0.02)


@dataclass(frozen=True, kw_only=True)
class Exits(Toy):
    name: ClassVar[str] = "exits"

    def during_build(self, context):
        os._exit(3)


@dataclass(frozen=True, kw_only=True)
class Litters(Toy):
    name: ClassVar[str] = "litters"

    def during_build(self, context):
        (context.scratch / "fine.txt").write_text("fine")
        Path("litter.txt").write_text("not fine")


@dataclass(frozen=True, kw_only=True)
class Lacks(Toy):
    name: ClassVar[str] = "lacks"

    def during_build(self, context):
        raise MissingExtra("sentence-transformers", remedy="pip install sentence-transformers")


@dataclass(frozen=True, kw_only=True)
class Slow(Toy):
    name: ClassVar[str] = "slow"

    def during_build(self, context):
        time.sleep(1.5)


@dataclass(frozen=True, kw_only=True)
class Asset(Toy):
    name: ClassVar[str] = "asset"

    def during_build(self, context):
        context.asset("words").read_text()


ALL = [
    Toy,
    Raises,
    Shape,
    NotANumber,
    Hangs,
    Crashes,
    Prints,
    Seeds,
    Alters,
    Hoards,
    Exits,
    Litters,
    Lacks,
    Slow,
    Asset,
]


@hookimpl
def tdabench_methods():
    return ALL
