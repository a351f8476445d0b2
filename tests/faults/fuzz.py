"""Damaged input, a case at a time: what every reader must survive, and how its input is spoilt.

A case draws all its randomness from a `random.Random`, so that hypothesis can drive it (and
shrink what it finds), atheris can, and a plain seed can. Run as a script it is the long mode:

    python tests/faults/fuzz.py --inputs 100000
    python tests/faults/fuzz.py --atheris header -- -max_total_time=60 -max_len=4096

A case fails with an AssertionError, or with whatever escaped from the reader.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

ROOT = Path(__file__).parents[2]
for place in (ROOT, ROOT / "plugins"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

if "--atheris" in sys.argv:  # what it watches must be instrumented when it is imported
    import atheris

    watched: Any = atheris.instrument_imports(include=["tdabench", "tdabench_airrep"])
else:
    watched = contextlib.nullcontext()
with watched:
    from tdabench.data import Corpus, Example, read_jsonl
    from tdabench.errors import DataError, TdabenchError, clean
    from tdabench.groups import Groups
    from tdabench.io import read_arrays, write_arrays, write_json
    from tdabench.run import Request, RunFolder
    from tdabench.run.suite_file import read_suite
    from tdabench.truth.exchange import import_lds
    from tdabench.truth.store import Truth

SLOW = 20.0  # seconds of processor time: a case that takes longer counts as hung

AWKWARD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.0, -0.0, 0.5, 1e308,
    float("nan"), float("inf"), float("-inf"), "", " ", "\0", "a", "x" * 3000, "../../../up",
    "..", "/", "~", "a/b", "a\\b", "CON", "NaN", "1e999", "\ud800", "\u202edrow", "\x1b[31mred",
    "\x9b31m", "[bold]b[/]", "[/]", "</script><script>", "{}", "%s%n", "é", "e\u0301" * 9, "日本",
    "\n", "\r\n", "\u2028", "\ufeff", [], {}, [[]], [None], {"": None}, {"a": {"b": [1, "2"]}},
    [1, 2, 3], ["a", "a"], [2**64], [-1], [0.5], "true", "1", "base", "test", "lds", "ok",
]  # fmt: skip
PIECES = [
    b"", b"\0", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\n", b"\r", b"{", b"}", b"[", b"]", b'"',
    b"\\", b"\\u0000", b"\\ud800", b",", b":", b"=", b"'''", b"#", b"null", b"NaN", b"-", b"1e999",
    b"9" * 5000, b"[" * 3000, b"{\"a\":" * 2000, b"[[targets]]\n", b"[suite]\n", b"a.b.c = 1\n",
    b"1979-05-27", b"\x80\x04\x95", b"PK\x03\x04", b"\x1f\x8b\x08", b" " * 100,
]  # fmt: skip


# --------------------------------------------------------------------------- spoiling


def spoil(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """A JSON value with one thing wrong somewhere in it."""
    if isinstance(value, (dict, list)) and value and (depth == 0 or rng.random() < 0.8):
        if isinstance(value, dict):
            key = rng.choice(list(value))
            action = rng.randrange(8)
            rest = {k: v for k, v in value.items() if k != key}
            if action == 0:
                return rest
            if action == 1:
                return {**rest, str(rng.choice(AWKWARD)): value[key]}
            if action == 2:
                return {**value, str(rng.choice(AWKWARD)): rng.choice(AWKWARD)}
            if action == 3:
                return {**value, key: rng.choice(AWKWARD)}
            return {**value, key: spoil(rng, value[key], depth + 1)}
        place = rng.randrange(len(value))
        action = rng.randrange(6)
        if action == 0:
            return value[:place] + value[place + 1 :]
        if action == 1:
            return [*value, value[place]]
        if action == 2:
            return [*value[:place], rng.choice(AWKWARD), *value[place + 1 :]]
        return [*value[:place], spoil(rng, value[place], depth + 1), *value[place + 1 :]]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice([-value, value + 1, value * 1000, 2**63, -1, 0, 0.5, str(value)])
    if isinstance(value, str) and value and rng.random() < 0.5:
        at = rng.randrange(len(value))
        return (
            value[:at] + rng.choice(["\0", "\x1b[2J", "\u202e", "/", "..", " ", "é"]) + value[at:]
        )
    return rng.choice(AWKWARD)


def damage(rng: random.Random, data: bytes) -> bytes:
    """Bytes cut, overwritten, doubled or flipped somewhere."""
    for _ in range(rng.randint(1, 3)):
        a = rng.randint(0, len(data))
        b = min(len(data), a + rng.choice([0, 1, 2, 8, 40]))
        action = rng.randrange(5)
        if action == 0:
            data = data[:a]
        elif action == 1:
            data = data[:b] + data[a:]
        elif action == 2 and a < len(data):
            data = data[:a] + bytes([data[a] ^ (1 << rng.randrange(8))]) + data[a + 1 :]
        elif action == 3:
            data = data[:a] + bytes(rng.randrange(256) for _ in range(b - a)) + data[b:]
        else:
            data = data[:a] + rng.choice(PIECES) + data[b:]
    return data


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


def as_toml(value: Any) -> bytes:
    """A TOML document: top-level keys with inline values. Not valid for every value."""

    def inline(v: Any) -> str:
        if isinstance(v, dict):
            return (
                "{" + ", ".join(f"{json.dumps(str(k))} = {inline(x)}" for k, x in v.items()) + "}"
            )
        if isinstance(v, list):
            return "[" + ", ".join(map(inline, v)) + "]"
        if v is None:
            return '""'
        if isinstance(v, float) and v != v:
            return "nan"
        return json.dumps(v).replace("Infinity", "inf")

    lines = [f"{json.dumps(str(k))} = {inline(v)}" for k, v in value.items()]
    return "\n".join(lines).encode("utf-8", "backslashreplace")


# --------------------------------------------------------------------------- what must hold


def refused(error: TdabenchError, *names: Path) -> None:
    """A refusal is a sentence, and names the file."""
    message = str(error)
    assert len(error.message) > 10, f"{message!r} says nothing"
    assert all(str(n) in message for n in names), f"{message!r} names not {names}"


def shown_safely(text: str) -> None:
    """Nothing that a terminal would act on."""
    for line in text.split("\n"):
        assert clean(line, 10**9) == line, f"{line!r} could act on a terminal"


@dataclass
class Case:
    """A kind of input: `prepare` writes what is whole once, `run` spoils it and reads."""

    name: str
    prepare: Callable[[Path], Any]
    run: Callable[[random.Random, Path, Any], None]
    share: float  # of the inputs of the long mode


# --------------------------------------------------------------------------- suite files

SUITE: dict[str, Any] = {
    "suite": {"name": "mine", "version": 2, "summary": "a suite", "seeds": [0, 1]},
    "corpus": {
        "file": "corpus.jsonl", "train": "pool", "queries": "test", "tuning_queries": "tuning",
    },
    "targets": [
        {
            "label": "a", "name": "model", "folder": "target", "main": True, "max_length": 64,
            "checkpoints": {"base": "base.safetensors"}, "template": "plain", "truncate": "error",
            "truths": {"lds": "truth.safetensors"}, "assets": {"words": "words.txt"},
            "plans": {"lds": {"groups": 4, "fraction": 0.25, "seeds": 2, "recipe": {"lr": 0.1}}},
        },
        {"label": "b", "folder": "target"},
    ],
    "assets": {"words": "words.txt"},
    "hashes": {},
    "benchmarks": {"default": ["lds"], "lds": {"replicates": 10}},
    "methods": {
        "default": ["tfidf", "big"], "params": {"tfidf": {"pooling": "mean"}},
        "variants": [{"label": "big", "method": "tfidf", "params": {"temperature": 2.0}}],
    },
    "tuned": {"a": {"tfidf": {"temperature": 0.5}}},
}  # fmt: skip

ROWS = [
    {"id": f"{split}{i}", "prompt": f"What is {i}?", "response": f"It is {i}.", "task": "t{i % 2}",
     "split": split, "fact": "f"}
    for split, n in (("pool", 8), ("test", 4), ("tuning", 3)) for i in range(n)
]  # fmt: skip


def corpora() -> tuple[Corpus, Corpus]:
    rows = [Example(r["id"], r["prompt"], r["response"], r["task"]) for r in ROWS]
    return Corpus(rows[:8], "pool"), Corpus(rows[8:12], "test")


def write_truth(path: Path) -> None:
    train, queries = corpora()
    groups = Groups.random(4, 8, 0.25, np.random.default_rng(0))
    losses = np.random.default_rng(1).normal(2, 0.1, (4, 2, 4)).astype(np.float32)
    Truth(losses, groups, tuple(queries.ids), {"train": train.fingerprint}).save(path)


def prepare_suite(folder: Path) -> None:
    target = folder / "target"
    target.mkdir()
    for name in ("config.json", "base.safetensors"):
        (target / name).write_text("{}")
    vocabulary = WordLevel({"[UNK]": 0, "words": 1, "[END]": 2}, unk_token="[UNK]")
    Tokenizer(vocabulary).save(str(target / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[END]"}
    (target / "tokenizer_config.json").write_bytes(as_json(settings))
    (folder / "words.txt").write_text("words")
    (folder / "corpus.jsonl").write_bytes(b"\n".join(as_json(r) for r in ROWS))
    write_truth(folder / "truth.safetensors")


def run_suite(rng: random.Random, folder: Path, _: Any) -> None:
    from tdabench.run import make_plan

    data = as_toml(spoil(rng, SUITE)) if rng.random() < 0.7 else damage(rng, as_toml(SUITE))
    path = folder / "fuzzed.toml"
    path.write_bytes(data)
    try:
        suite = read_suite(path)
    except TdabenchError as e:
        refused(e, path)
        return
    assert suite.targets
    try:
        plan = make_plan(Request(str(path)))
    except TdabenchError as e:
        refused(e)
        return
    assert all(len(c.key) == 16 for c in plan.cells)


# --------------------------------------------------------------------------- corpora


def run_corpus(rng: random.Random, folder: Path, _: Any) -> None:
    rows: list[Any] = [dict(r) for r in ROWS[: rng.randint(0, 6)]]
    data = b"\n".join(as_json(r) for r in rows)
    if rows and rng.random() < 0.6:
        at = rng.randrange(len(rows))
        rows[at] = spoil(rng, rows[at])
        data = b"\n".join(as_json(r) for r in rows)
    else:
        data = damage(rng, data)
    packed = rng.random() < 0.2
    path = folder / ("fuzzed.jsonl.gz" if packed else "fuzzed.jsonl")
    whole = data
    if packed:
        data = gzip.compress(data, 1)
        if rng.random() < 0.5:
            data = damage(rng, data)
    path.write_bytes(data)
    try:
        corpus = read_jsonl(path)
    except DataError as e:
        refused(e, *([path] if "two examples" not in str(e) else []))
        return
    if not packed:
        lines = [line for line in whole.split(b"\n") if line.strip()]
        assert len(corpus) == len(lines), "a line was passed over in silence"
    for e in corpus:
        assert e.response.strip()
        for text in (e.id, e.prompt, e.response, e.task, *e.meta.values()):
            text.encode()  # tokenizers and files take no lone surrogate


# --------------------------------------------------------------------------- safetensors


def prepare_header(folder: Path) -> tuple[bytes, dict[str, np.ndarray]]:
    arrays = {
        "x": np.arange(12, dtype=np.float32).reshape(3, 4),
        "n": np.array([3], dtype=np.int64),
        "empty": np.zeros((0, 5), dtype=np.float16),
    }
    path = folder / "whole.safetensors"
    write_arrays(path, arrays, {"query_ids": ["a", "b"], "n_train": 3})
    return path.read_bytes(), arrays


def respell(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with a spoilt header of the right length, or with spoilt bytes."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.6:
        header = spoil(rng, json.loads(data[8 : 8 + length]))
        text = as_json(header)
        return len(text).to_bytes(8, "little") + text + data[8 + length :]
    if rng.random() < 0.2:
        claimed = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63 - 1, 2**64 - 1])
        return claimed.to_bytes(8, "little") + data[8:]
    return damage(rng, data)


def run_header(rng: random.Random, folder: Path, whole: Any) -> None:
    from tdabench.run.record import Record
    from tdabench.targets.target import read_weights

    data, arrays = whole
    data = respell(rng, data)
    path = folder / "fuzzed.safetensors"
    path.write_bytes(data)
    try:
        found, meta = read_arrays(path)
    except DataError as e:
        refused(e, path)
    else:
        assert isinstance(meta, dict)
        assert sum(a.nbytes for a in found.values()) <= len(data)
        if b'"sha256"' in data:  # nothing that carries its hash is taken for what it is not
            assert found.keys() == arrays.keys()
            for name, a in found.items():
                assert np.array_equal(a, arrays[name], equal_nan=True)
    record = Record({}, path)
    assert isinstance((record.shapes(), record.metadata(), record.arrays_hash()), tuple)
    if "torch" in sys.modules:
        with contextlib.suppress(DataError):
            read_weights(path)


# --------------------------------------------------------------------------- label files


def prepare_labels(folder: Path) -> dict[str, bytes]:
    from tdabench_airrep.labels import Instance, Labels
    from tdabench_airrep.teacher import Teacher

    train, _ = corpora()
    groups = Groups.random(4, 8, 0.25, np.random.default_rng(0))
    losses = np.random.default_rng(1).normal(2, 0.1, (4, 4)).astype(np.float32)
    labels = Labels((Instance(np.arange(4), groups, losses),), 8, 4, {"train": train.fingerprint})
    labels.save(folder / "labels.safetensors")
    Teacher(losses, {"train": train.fingerprint}).save(folder / "teacher.safetensors")
    write_truth(folder / "truth.safetensors")
    return {p.stem: p.read_bytes() for p in folder.glob("*.safetensors")}


def run_labels(rng: random.Random, folder: Path, whole: Any) -> None:
    from tdabench_airrep.labels import Labels
    from tdabench_airrep.reference import read_reference
    from tdabench_airrep.teacher import Teacher

    train, queries = corpora()
    kind = rng.choice(["lds", "reference", *whole])
    try:
        if kind == "lds":
            rows: list[Any] = [
                {"train_subset": [g, g + 1], "test_loss": [0.1, 0.2, 0.3, 0.4]} for g in range(4)
            ]
            data = lines(rng, rows)
            (folder / "lds.jsonl").write_bytes(data)
            truth = import_lds(folder / "lds.jsonl", train, queries)
            held = [line for line in data.splitlines() if line.strip()]
            assert len(truth.groups) == len(held), "a line was passed over in silence"
            assert truth.losses.shape == (len(held), 1, 4)
        elif kind == "reference":
            index: list[Any] = [
                {"id": i, "select": [i, i + 1], "dev": [6, 7], "dev_id": 0} for i in range(3)
            ]
            losses: list[Any] = [
                {"pair_id": i, "dev_id": 0, "losses": [0.1, 0.2 * i]} for i in range(3)
            ]
            first = rng.random() < 0.5
            (folder / "index.jsonl").write_bytes(lines(rng, index, first))
            (folder / "losses.jsonl").write_bytes(lines(rng, losses, not first))
            paths = (folder / "index.jsonl", folder / "losses.jsonl")
            labels = read_reference(*paths, train, allow_missing=rng.random() < 0.5)
            assert labels.n_train == 8
        else:
            path = folder / "fuzzed.safetensors"
            path.write_bytes(respell(rng, whole[kind]))
            loader: Any = {"labels": Labels, "teacher": Teacher, "truth": Truth}[kind]
            found = loader.load(path)
            if kind == "truth":
                found.for_queries(found.query_ids)
            else:
                found.check(train, queries)
    except TdabenchError as e:
        refused(e)


def lines(rng: random.Random, rows: list[Any], spoilt: bool = True) -> bytes:
    if spoilt and rng.random() < 0.6:
        at = rng.randrange(len(rows))
        rows = [*rows[:at], spoil(rng, rows[at]), *rows[at + 1 :]]
        spoilt = False
    data = b"\n".join(map(as_json, rows))
    return damage(rng, data) if spoilt else data


# --------------------------------------------------------------------------- records

RECORD: dict[str, Any] = {
    "schema": 1, "key": "", "status": "ok", "reason": "", "log_tail": ["one", "two"],
    "suite": {"name": "mine", "version": 2},
    "method": {
        "name": "tfidf", "label": "tfidf", "version": 1, "plugin": "text", "family": "text",
        "passed": {}, "tuned": {}, "suite": {}, "params": {"rank": 16},
    },
    "target": {"label": "a", "name": "model", "regime": "cold", "fingerprint": "beef"},
    "benchmark": {"name": "lds", "version": 1, "params": {"replicates": 10}},
    "seed": 0, "split": "test", "device": "cpu", "corpus": {"train": "c0", "queries": "99"},
    "truth": "7777", "primary": "lds",
    "metrics": {"lds": {"value": 0.25, "low": 0.2, "high": 0.3, "higher_is_better": True}},
    "notes": ["a note"],
    "cost": {
        "prepare": {"seconds": 2.0}, "build": {"seconds": 0.5, "peak_bytes": 1000},
        "query": {"seconds": 0.1, "queries": 4, "calls": 1}, "index_bytes": 64,
        "bytes_per_example": 8.0, "n_train": 8,
    },
    "inputs": {"truth:lds": "7777"}, "versions": {"numpy": "2"},
    "hardware": {"cpu": "Testor", "cores": 2}, "threads": 1, "concurrent": 1, "git": "0123",
    "started": "2026-01-01T00:00:00Z", "seconds": 1.5,
}  # fmt: skip
MANIFEST: dict[str, Any] = {
    "schema": 1, "run": "run", "suite": {"name": "mine", "version": 2, "fingerprint": "ab"},
    "command": ["tdabench", "run"],
    "request": {
        "suite": "mine", "methods": ["tfidf"], "targets": None, "benchmarks": ["lds"],
        "seeds": [0], "sets": ["tfidf.temperature=2"], "split": "test", "device": "cpu",
    },
    "created": "2026-01-01T00:00:00Z", "tdabench": "0.1", "git": "", "python": "3.11",
    "packages": {"numpy": "2"}, "hardware": {"cpu": "Testor", "cores": 2},
    "targets": {"a": {"name": "model", "regime": "cold", "fingerprint": "beef"}},
    "methods": ["tfidf"], "benchmarks": ["lds"], "seeds": [0],
}  # fmt: skip


def write_run(folder: Path) -> None:
    """A run folder of two methods on one benchmark."""
    write_json(folder / "manifest.json", MANIFEST)
    for label, key in (("tfidf", "0" * 16), ("whole", "1" * 16)):
        record = {**RECORD, "key": key, "method": {**RECORD["method"], "label": label}}
        arrays = {
            "per_query": np.linspace(0, 0.5, 4),
            "replicates": np.linspace(0.2, 0.3, 10),
        }
        meta = {"query_ids": ["test0", "test1", "test2", "test3"], "key": key}
        write_arrays(folder / "cells" / f"{key}.safetensors", arrays, meta)
        write_json(folder / "cells" / f"{key}.json", record)


def prepare_records(folder: Path) -> dict[Path, bytes]:
    write_run(folder / "run")
    return {p: p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file()}


def run_records(rng: random.Random, folder: Path, whole: Any) -> None:
    from tdabench.report.board import Board
    from tdabench.report.terminal import print_board

    run = folder / "run"
    path = rng.choice([p for p in whole if p.name != f"{'1' * 16}.json"])
    data = whole[path]
    if path.suffix == ".safetensors":
        data = respell(rng, data)
    elif rng.random() < 0.7:
        data = as_json(spoil(rng, json.loads(data)))
    else:
        data = damage(rng, data)
    path.write_bytes(data)
    try:
        kept = RunFolder(run)
        records, damaged = list(kept.records()), kept.damaged()
        spoilt_arrays = path.name.startswith("1" * 16)
        assert len(records) + len(damaged) == 2
        assert spoilt_arrays or "1" * 16 in {r["key"] for r in records}
        for r in records:
            assert kept.record_path(r["key"]).parent == kept.cells
        if path.name == "manifest.json":
            with contextlib.suppress(TdabenchError):
                manifest = kept.manifest() or {}
                Request.from_dict(manifest.get("request") or {})
        out = io.StringIO()
        try:
            from rich.console import Console

            board = Board.from_runs([run], cache=False)
            print_board(board, Console(file=out, width=120))
            if not spoilt_arrays and path.name != "manifest.json":
                assert "whole" in out.getvalue()
        except TdabenchError as e:
            refused(e)
        shown_safely(out.getvalue())
    finally:
        path.write_bytes(whole[path])


# --------------------------------------------------------------------------- the command line

WORDS = [
    "tfidf", "trak", "all", "none", ",", "lds", "pocket", "instruct", "run", "runs", "runs/run",
    "mine.toml", "broken.toml", "a", "b", "0", "1", "-1", "3.5", "1e9", "4G", "-4G", "nan", "x=y",
    "tfidf.temperature=2", "tfidf.temperature=hot", "tfidf.nope=1", "=", ".", "..", "-", "--", "",
    " ", "é", "\u202e", "\x1b[31m", "\udcff", "[bold]", "x" * 3000, "no/such", "corpus.jsonl",
    "manifest.json", "runs/run/manifest.json", "truth.safetensors", "json", "png", "os", "0000",
    "whole", "--help", "--json", "--debug", "--no-such", "-h", "--version", "nul.py", "target",
    "0/2", "2/2", "a/b", "base", "markdown", "csv", "2147483648", "9" * 400,
]  # fmt: skip
# These would work for minutes when their arguments are right, or open a browser.
LONG = {("check",), ("timing",), ("tune",), ("truth", "build"), ("truth", "verify"),
        ("truth", "prune"), ("truth", "describe"), ("truth", "tune-recipe"), ("index", "build"),
         ("report",), ("completion",)}  # fmt: skip


def command_tree() -> dict[tuple[str, ...], Any]:
    """Every command by its path."""
    import click

    from tdabench.cli import cli

    found: dict[tuple[str, ...], Any] = {}

    def walk(group: Any, path: tuple[str, ...]) -> None:
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            found[*path, name] = command
            if isinstance(command, click.Group):
                walk(command, (*path, name))

    walk(cli, ())
    return found


def prepare_cli(folder: Path) -> dict[tuple[str, ...], Any]:
    inner = folder / "deep" / "deeper" / "deepest"
    inner.mkdir(parents=True)
    prepare_suite(inner)
    write_run(inner / "runs" / "run")
    (inner / "mine.toml").write_bytes(as_toml(SUITE))
    (inner / "broken.toml").write_text("[suite]\nname = 3\n")
    (inner / "nul.py").write_text("raise SystemExit(3)\n")
    return command_tree()


def draw_arguments(rng: random.Random, tree: dict[tuple[str, ...], Any]) -> list[str]:
    import click

    path = rng.choice(list(tree))
    command = tree[path]
    arguments = list(path)
    for _ in range(rng.randint(0, 4)):
        parameter = rng.choice(command.params) if command.params else None
        if parameter is None or rng.random() < 0.2:
            arguments.append(rng.choice(WORDS))
        elif isinstance(parameter, click.Option):
            if parameter.name == "open_it":
                continue
            arguments.append(rng.choice([*parameter.opts, *parameter.secondary_opts]))
            if not parameter.is_flag or rng.random() < 0.05:
                arguments.append(rng.choice(WORDS))
        else:
            arguments.append(rng.choice(WORDS))
    if rng.random() < 0.1:
        rng.shuffle(arguments)
    if path in LONG or any(tuple(arguments[:n]) in LONG for n in (1, 2)):
        arguments.append("--no-such-option")
    if "run" in arguments or not arguments:
        arguments.append("--dry-run")
    return arguments


def run_cli(rng: random.Random, folder: Path, tree: Any) -> None:
    arguments = draw_arguments(rng, tree)
    outer = {p.name for p in folder.iterdir()} | {p.name for p in (folder / "deep").iterdir()}
    code, out, err = in_process(arguments, folder / "deep" / "deeper" / "deepest")
    held(arguments, code, out, err)
    now = {p.name for p in folder.iterdir()} | {p.name for p in (folder / "deep").iterdir()}
    assert outer == now, f"{arguments} wrote outside its folder"


def held(arguments: list[str], code: int, out: str, err: str) -> None:
    """What holds of every command line, right or wrong."""
    told = f"{arguments!r} gave {code}: {err!r}"
    assert code in (0, 1, 2), told
    assert "Traceback" not in err, told
    assert "unexpected " not in err.replace("unexpected extra argument", ""), told
    if "--debug" not in arguments:
        shown_safely(err)
    if code == 2 and err.startswith("Usage: ") and "--help" in err:
        assert out == "", told  # a command that needs another one shows its help
    elif code == 2:
        mistakes = [x for x in err.splitlines() if not x.startswith("tdabench: warning: ")]
        assert len(mistakes) == 1, told
        assert mistakes[0].startswith("tdabench: "), told
        assert out == "", f"{told} and printed {out[:200]!r}"


def in_process(arguments: list[str], cwd: Path) -> tuple[int, str, str]:
    """`tdabench ARGUMENTS` in this process: (exit code, stdout, stderr)."""
    from tdabench.cli import main
    from tdabench.registry import configure

    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    before = os.getcwd()
    os.chdir(cwd)
    try:
        configure((), ())
        arguments = [a for a in arguments if a != "--debug"]  # it asks for a traceback
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            code = main(arguments)
    finally:
        os.chdir(before)
        configure((), ())
    out, err = (s.buffer.getvalue().decode() for s in streams)  # type: ignore[attr-defined]
    return code, out, err


# --------------------------------------------------------------------------- running


def nothing(folder: Path) -> None:
    pass


CASES = {
    c.name: c
    for c in (
        Case("suite", prepare_suite, run_suite, 0.22),
        Case("corpus", nothing, run_corpus, 0.25),
        Case("header", prepare_header, run_header, 0.25),
        Case("labels", prepare_labels, run_labels, 0.16),
        Case("records", prepare_records, run_records, 0.06),
        Case("cli", prepare_cli, run_cli, 0.06),
    )
}


def once(case: Case, rng: random.Random, folder: Path, whole: Any) -> None:
    """One input. Raises AssertionError also when it took too long."""
    start = time.process_time()  # the clock on the wall also counts what other programs take
    case.run(rng, folder, whole)
    spent = time.process_time() - start
    assert spent < SLOW, f"an input of {case.name} took {spent:.0f} s"


def long_mode(inputs: int, seed: int, only: str | None, keep_going: bool) -> int:
    """`inputs` cases from `seed`, shared out over the kinds; returns how many failed."""
    failures = 0
    for case in CASES.values():
        if only not in (None, case.name):
            continue
        n = inputs if only else round(case.share * inputs)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name).resolve()
            whole = case.prepare(folder)
            start = time.monotonic()
            for i in range(n):
                try:
                    once(case, random.Random(f"{seed}-{case.name}-{i}"), folder, whole)
                except BaseException as e:
                    if isinstance(e, KeyboardInterrupt):
                        raise
                    failures += 1
                    print(f"{case.name} {seed} {i}: {type(e).__name__}: {str(e)[:600]}", flush=True)
                    if failures <= 3:
                        import traceback

                        traceback.print_exc()
                    if not keep_going:
                        return failures
                    shutil.rmtree(folder)
                    folder.mkdir()
                    whole = case.prepare(folder)
            spent = time.monotonic() - start
            print(f"{case.name}: {n} inputs in {spent:.0f} s, {failures} failures", flush=True)
    return failures


class Provided(random.Random):
    """The `random.Random` that a fuzzer's bytes decide."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        super().__init__(0)

    def getrandbits(self, k: int) -> int:
        n = (k + 7) // 8
        part = self.data[self.at : self.at + n]
        self.at += n
        return int.from_bytes(part, "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(53) / (1 << 53)


def guided(name: str, arguments: list[str]) -> None:
    """Coverage-guided, where atheris is installed. Does not return."""
    import atheris

    case = CASES[name]
    folder = Path(tempfile.mkdtemp()).resolve()
    whole = case.prepare(folder)
    atheris.Setup([sys.argv[0], *arguments], lambda d: once(case, Provided(d), folder, whole))
    atheris.Fuzz()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--inputs", type=int, default=100_000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", choices=CASES)
    p.add_argument("--keep-going", action="store_true", help="count failures instead of stopping")
    p.add_argument("--atheris", choices=CASES, metavar="KIND", help="coverage-guided, one kind")
    p.add_argument("rest", nargs="*", help="arguments for the fuzzer, after --")
    return p


if __name__ == "__main__":
    asked = parser().parse_args()
    if asked.atheris:
        guided(asked.atheris, asked.rest)
    sys.exit(min(1, long_mode(asked.inputs, asked.seed, asked.only, asked.keep_going)))
