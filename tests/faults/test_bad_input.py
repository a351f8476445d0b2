"""What a user gets wrong, as processes: one line (the thing, the reason, the remedy), exit 1 or 2,
nothing lost, no traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tdabench.data.examples import Corpus, Example
from tdabench.errors import DataError, UsageError
from tdabench.run import RunFolder
from tests.faults.conftest import one_line
from tests.faults.test_offenders import TOYS

EDITS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unknown key": (
        lambda s: s.write_text(s.read_text() + '\n[methdos]\ndefault = ["toy"]\n'),
        "methdos: is not a known key. Did you mean 'methods'?",
    ),
    "wrong type": (
        lambda s: s.write_text(s.read_text().replace("version = 1", 'version = "one"')),
        "[suite] version: must be an integer, not a string ('one')",
    ),
    "not TOML": (lambda s: s.write_text("[suite\n"), "is not valid TOML"),
    "not text": (lambda s: s.write_bytes(b"\xff\xfe"), "is not UTF-8 (byte 0)"),
    "truncated truth": (
        lambda s: cut(s.parent / "truth.safetensors", 200),
        "truth.safetensors is truncated or not a safetensors file",
    ),
    "corrupt truth": (
        lambda s: flip(s.parent / "truth.safetensors"),
        "truth.safetensors is corrupt: its contents do not match the hash in its header",
    ),
    "missing truth": (
        lambda s: (s.parent / "truth.safetensors").unlink(),
        "truth.safetensors is missing",
    ),
    "altered asset": (
        lambda s: s.write_text(s.read_text() + f'\n[hashes]\n"corpus.jsonl" = "{"0" * 64}"\n'),
        "is not the declared file",
    ),
    "empty corpus": (lambda s: (s.parent / "corpus.jsonl").write_text(""), "holds no examples"),
    "corpus cut short": (
        lambda s: cut(s.parent / "corpus.jsonl", 7),
        "not valid JSON",
    ),
    "no such split": (
        lambda s: s.write_text(s.read_text().replace('"pool"', '"pol"')),
        "has no example of the split 'pol'. Did you mean 'pool'?",
    ),
    "no such folder": (
        lambda s: s.write_text(s.read_text().replace('folder = "', 'folder = "/nowhere')),
        "is missing",
    ),
}


def cut(path: Path, bytes_: int) -> None:
    path.write_bytes(path.read_bytes()[:-bytes_])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("mistake", EDITS)
def test_a_bad_suite_or_asset_is_one_line(mistake: str, make_suite, tdabench, tmp_path: Path):
    suite = make_suite()
    edit, message = EDITS[mistake]
    edit(suite)
    out = tmp_path / "run"
    done = tdabench("run", "--suite", suite, "--plugin", TOYS, "--methods", "toy", "--out", out)
    assert message in one_line(done, 2)
    assert not list(out.glob("cells/*"))


DIGITS = "9" * 400
DEEP = 5000
HOSTILE_TOML = {
    "a number of 400 digits": ("version = 1", f"version = {DIGITS}"),
    "a parameter of 400 digits": ("replicates = 50", f"replicates = {DIGITS}"),
    "a length of 400 digits": ("regime =", f"fraction = {DIGITS}\nregime ="),
    "seeds of 400 digits": ("[corpus]", f"seeds = [{DIGITS}]\n[corpus]"),
    "a float without bound": ("regime =", "fraction = 1e999\nregime ="),
    "deep arrays": ("[corpus]", f"summary = {'[' * DEEP}{']' * DEEP}\n[corpus]"),
    "deep inline tables": ("[corpus]", f"x = {'{a=' * DEEP}1{'}' * DEEP}\n[corpus]"),
    "deep dotted keys": ("[corpus]", f"{'a.' * DEEP}a = 1\n[corpus]"),
    "deep tables": ("[corpus]", f"[{'a.' * DEEP}a]\n[corpus]"),
    "a package left": ('file = "corpus.jsonl"', 'file = "package:tdabench/../../x.jsonl"'),
    "a package left by the root": (
        'file = "corpus.jsonl"',
        'file = "package:tdabench//etc/passwd"',
    ),
    "a hub name that climbs": ('file = "corpus.jsonl"', 'file = "hub:../../etc/passwd"'),
    "a hub file that climbs": ('file = "corpus.jsonl"', 'file = "hub:org/name/../../../x.jsonl"'),
}


@pytest.mark.parametrize("what", HOSTILE_TOML)
def test_a_hostile_suite_file_is_refused_in_one_line(what: str, make_suite, tmp_path: Path):
    """Within the process that plans: what it raises is what the command line prints."""
    from tdabench.run.plan import Request, make_plan

    suite = make_suite()
    old, new = HOSTILE_TOML[what]
    text = suite.read_text()
    assert old in text
    suite.write_text(text.replace(old, new, 1))
    (tmp_path / "data").mkdir()
    with pytest.raises((UsageError, DataError)) as refused:
        make_plan(Request(str(suite), ("random",)), data_dir=tmp_path / "data")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1500


def test_a_corpus_that_is_a_fifo_is_refused_at_once(make_suite, tdabench, tmp_path: Path):
    suite = make_suite()
    (suite.parent / "corpus.jsonl").unlink()
    os.mkfifo(suite.parent / "corpus.jsonl")
    done = tdabench("run", "--suite", suite, "--methods", "random", "--out", tmp_path / "run")
    assert "corpus.jsonl" in one_line(done, 2)


def test_a_path_in_a_suite_file_is_relative_to_that_file(make_suite, tmp_path: Path, monkeypatch):
    from tdabench.registry import configure
    from tdabench.run.plan import Request, make_plan

    suite = make_suite('[methods.params.reads-file]\nfile = "given/word.txt"\n')
    (suite.parent / "given").mkdir()
    (suite.parent / "given" / "word.txt").write_text("x")
    plugin = tmp_path / "reads_file.py"
    plugin.write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\n"
        "from tdabench.api import TDAMethod, hookimpl\n"
        "@dataclass(frozen=True, kw_only=True)\nclass M(TDAMethod):\n"
        "    name: ClassVar[str] = 'reads-file'\n    file: str = ''\n"
        "    def build(self, context, train): ...\n    def load(self, context, path): ...\n"
        "@hookimpl\ndef tdabench_methods(): return [M]\n"
    )
    monkeypatch.chdir("/")
    configure((), [str(plugin)])
    try:
        plan = make_plan(Request(str(suite), ("reads-file",)))
    finally:
        configure((), ())
    assert plan.cells[0].method.params["file"] == str(suite.parent / "given" / "word.txt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "tooy"], "unknown method 'tooy'. Did you mean 'toy'?"),
        (["--methods", "toy", "--benchmarks", "ldz"], "unknown benchmark 'ldz'"),
        (["--methods", "toy", "--target", "tinny"], "unknown target of suite toy 'tinny'"),
        (["--methods", "toy", "--set", "toy.sise=2"], "unknown parameter of toy 'sise'"),
        (["--methods", "toy", "--set", "toy.size=big"], "is not of the type int"),
        (["--methods", "toy", "--out", "/dev/null/run"], "cannot write to /dev/null/run"),
        (["--methods", "toy", "--log-file", "/dev/null/x"], "cannot write the log /dev/null/x"),
        (["--methods", "toy", "--device", "gpu0"], "--device 'gpu0' is not a device"),
        (["--from", "/dev/null"], "/dev/null is not a regular file"),
    ],
)
def test_a_bad_request_is_one_line(arguments, message, toy_suite, tdabench):
    done = tdabench("run", "--suite", toy_suite, "--plugin", TOYS, *arguments)
    assert message in one_line(done, 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"device": "gpu0"}, "the manifest: --device 'gpu0' is not a device"),
        ({"device": 3}, "the manifest's request has an invalid device: 3"),
        ({"sets": ["toy.size=big"]}, "is not of the type int"),
        ({"sets": ["toy.sise=2"]}, "unknown parameter of toy 'sise'"),
        ({"seeds": [-1]}, "the manifest requests a negative seed"),
        ({"seeds": ["0"]}, "the manifest's request has an invalid seeds"),
        ({"methods": ["toy; rm -rf ~"]}, "unknown method"),
        ({"split": "../test"}, "suite toy declares no ../test queries"),
        ({"out": "/etc"}, "the manifest requests 'out', unknown"),
    ],
)
def test_a_manifests_request_is_checked_as_a_command_line_is(
    changed, message, toy_suite, tdabench, tmp_path: Path
):
    request = {"suite": str(toy_suite), "methods": ["toy"], **changed}
    (tmp_path / "manifest.json").write_text(json.dumps({"request": request}))
    done = tdabench("run", "--from", tmp_path / "manifest.json", "--plugin", TOYS, "--dry-run")
    assert message in one_line(done, 2)


def test_an_unknown_suite_is_one_line(tdabench):
    assert "unknown suite 'pockett'. Did you mean 'pocket'?" in one_line(
        tdabench("run", "--suite", "pockett"), 2
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_read_only_folder_is_one_line(toy_suite, tdabench, tmp_path: Path):
    (tmp_path / "closed").mkdir(mode=0o500)
    asked = ["run", "--suite", toy_suite, "--plugin", TOYS, "--methods", "toy", "--out"]
    done = tdabench(*asked, tmp_path / "closed" / "run")
    assert "cannot write to" in one_line(done, 2)


def test_a_query_longer_than_the_context_fails_its_row_with_the_remedy(
    make_suite, tdabench, tmp_path: Path, tiny_queries: Corpus
):
    """A method that reads text does not mind; one that asks the model does, in its own row."""
    long = replace(tiny_queries[0], prompt="amber " * 400)
    suite = make_suite(queries=Corpus([long, *tiny_queries[1:]], "long"))
    asked = ["run", "--suite", suite, "--methods", "tfidf,gradcos", "--json", "--threads", "1"]
    done = tdabench(*asked, "--out", tmp_path / "run")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    cells = {c["method"]["label"]: c for c in json.loads(done.stdout)["cells"]}
    assert cells["tfidf"]["status"] == "ok"
    assert cells["gradcos"]["status"] == "failed"
    reason = cells["gradcos"]["reason"]
    assert f"example {long.id!r} has" in reason
    assert "prompt-left" in reason


def test_truncated_weights_fail_their_row_and_nothing_else(
    make_suite, tdabench, tmp_path: Path, tiny_target
):
    import shutil

    suite = make_suite()
    folder = tmp_path / "target"
    shutil.copytree(tiny_target.folder, folder)
    suite.write_text(suite.read_text().replace(str(tiny_target.folder), str(folder)))
    cut(folder / "warm.safetensors", 1000)
    asked = ["run", "--suite", suite, "--methods", "tfidf", "--threads", "1", "--json"]
    done = tdabench(*asked, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr  # it never asks the model
    cut(folder / "base.safetensors", 1000)
    done = tdabench(*asked[:3], "--methods", "gradcos", "--out", tmp_path / "other")
    assert "built on another target" in one_line(done, 2)


HOSTILE_IDS = [
    "../../../up", "/etc/passwd", "nul\0l", "x" * 5000, "Case", "case", "CON", "a/b", "..", "é",
    "\x1b[2Jred",
]  # fmt: skip


def test_ids_name_no_files(make_suite, tdabench, tmp_path: Path, tiny_corpus: Corpus):
    """Ids with paths in them, NUL, very long or alike but for case: they stay ids."""
    hostile = [Example(id, e.prompt, e.response, e.task) for id, e in zip(HOSTILE_IDS, tiny_corpus)]
    suite = make_suite(train=Corpus([*hostile, *tiny_corpus[len(hostile) :]], "hostile"))
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "run"
    asked = ["run", "--suite", suite, "--methods", "tfidf", "--threads", "1", "--out", out]
    done = tdabench(*asked)
    assert done.returncode == 0, done.stderr
    done = tdabench("report", out, "--suite", suite, "--out", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    new = set(tmp_path.rglob("*")) - before
    assert all(out in p.parents or p in (out, tmp_path / "report.html") for p in new)
    assert [r["status"] for r in RunFolder(out).records()] == ["ok"]
