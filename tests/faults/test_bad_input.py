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
