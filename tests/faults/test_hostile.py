"""A stranger's file runs nothing, claims nothing that is allocated, and writes nowhere.

tests/test_architecture.py greps for pickle; here poisoned files prove that none is ever opened.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from tdabench.errors import TdabenchError, clean, one_line
from tdabench.io import read_arrays
from tdabench.targets.target import Target
from tests.faults.conftest import one_line as line_of

ROOT = Path(__file__).parents[2]


class Poison:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def poison(tmp_path: Path) -> tuple[bytes, Path]:
    """(a pickle, the mark it leaves when it is read)."""
    mark = tmp_path / "it-ran"
    data = pickle.dumps(Poison(mark))
    pickle.loads(data)
    assert mark.exists()  # the poison works
    mark.rmdir()
    return data, mark


NAMES = ("pytorch_model.bin", "model.pt", "base.bin", "adapter_model.bin", "training_args.bin")


@pytest.fixture
def poisoned_folder(tmp_path: Path, tiny_target: Target, poison) -> Path:
    """A model's folder whose weights are pickles, with code that its configuration points to."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        if (tiny_target.folder / name).exists():
            shutil.copy(tiny_target.folder / name, folder)
    for name in NAMES:
        (folder / name).write_bytes(poison[0])
    code = f"import os\nos.mkdir({str(poison[1])!r})\nclass Evil: pass\n"
    (folder / "evil.py").write_text(code)
    for file in ("config.json", "tokenizer_config.json"):
        config = json.loads((folder / file).read_text())
        classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
        config["auto_map"] = dict.fromkeys(classes, "evil.Evil")
        config["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
        (folder / file).write_text(json.dumps(config))
    return folder


def test_a_models_folder_of_pickles_and_code_runs_nothing(poisoned_folder: Path, poison):
    from tdabench_airrep.encoder import Pooled
    from tdabench_airrep.loading import initial_encoder
    from tdabench_text.neural import _load

    targets = [
        Target("evil", poisoned_folder, {"base": "."}),
        *(Target("evil", poisoned_folder, {"base": name}) for name in NAMES),
    ]
    for target in targets:
        with pytest.raises(TdabenchError):
            target.fresh_model("base")
    with pytest.raises(TdabenchError):
        _load(poisoned_folder, "cpu")
    with pytest.raises(TdabenchError):
        initial_encoder(str(poisoned_folder), None, dim=4, pooled=Pooled(), text=None, seed=0)
    assert not poison[1].exists()


@pytest.mark.parametrize("file", ["truth.safetensors", "corpus.jsonl", "suite.toml"])
def test_a_pickle_in_place_of_a_suites_file_runs_nothing(file, make_suite, tdabench, poison):
    suite = make_suite()
    (suite.parent / file).write_bytes(poison[0])
    line_of(tdabench("run", "--suite", suite, "--methods", "tfidf"), 2)
    assert not poison[1].exists()


def test_a_pickle_in_a_run_folder_runs_nothing(tdabench, poison, tmp_path: Path):
    from tests.faults.fuzz import write_run

    write_run(tmp_path / "run")
    for file in (tmp_path / "run" / "cells").glob("0*"):
        file.write_bytes(poison[0])
    done = tdabench("leaderboard", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "whole" in done.stdout
    (tmp_path / "run" / "manifest.json").write_bytes(poison[0])
    line_of(tdabench("leaderboard", tmp_path / "run"), 2)
    assert not poison[1].exists()


def test_archives_are_not_unpacked_anywhere():
    """gzip holds one stream and no paths; whatever holds paths is not opened to be written out."""
    for path in [*(ROOT / "tdabench").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("extractall", "unpack_archive"), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]},
        {"dtype": "F32", "shape": [1 << 62, 16], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]},
        {"dtype": "F32", "shape": [17], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [True] * 16, "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [0] * 100, "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [16]},
        "not an entry",
    ],
)
def test_what_a_header_claims_is_checked_before_anything_is_allocated(
    entry, tmp_path: Path, monkeypatch
):
    import safetensors

    def opened(*args: object, **kw: object) -> None:
        raise AssertionError("the library was asked before the claim was checked")

    monkeypatch.setattr(safetensors, "safe_open", opened)
    text = json.dumps({"x": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + np.zeros(16, np.float32).tobytes())
    with pytest.raises(TdabenchError, match=r"a\.safetensors is truncated or not"):
        read_arrays(path)


@pytest.mark.parametrize("claimed", [0, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_the_length_of_a_header_is_checked_first(claimed: int, tmp_path: Path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(claimed.to_bytes(8, "little") + b"{}")
    with pytest.raises(TdabenchError):
        read_arrays(path)


def test_a_line_that_gzip_inflates_without_end_is_refused(tmp_path: Path, monkeypatch):
    import gzip

    from tdabench.data import files

    monkeypatch.setenv("TDABENCH_MAX_ROW", "1000")
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "' + b"x" * 10_000_000))
    assert path.stat().st_size < 20_000
    with pytest.raises(TdabenchError, match="line 1: longer than"):
        files.read_jsonl(path)


HOSTILE = "\x1b[2J\x1b]0;title\x07[bold red]x[/] \u202egnp\u2066 \u200b\x9b31m\r\n\ud800"


def test_messages_tables_and_json_escape_what_a_terminal_acts_on(capsys):
    from tdabench.cli import say
    from tdabench.cli.common import emit_json, print_table, warn
    from tdabench.run.progress import Lines, Silent

    say(HOSTILE)
    warn(HOSTILE)
    Silent().say(HOSTILE)
    print_table([HOSTILE], [[HOSTILE]])
    emit_json({HOSTILE: HOSTILE})
    lines = Lines()
    lines.begin(1, 0)
    record = {
        "method": {"label": HOSTILE}, "target": {"label": HOSTILE}, "benchmark": {"name": HOSTILE},
        "seed": 0, "status": "failed", "reason": HOSTILE, "metrics": {}, "primary": "", "cost": {},
    }  # fmt: skip
    lines.finished(record, cached=False)
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        for line in text.split("\n"):
            assert clean(line, 10**6) == line
    assert shown.out.count("[bold red]") >= 3  # markup is shown, not obeyed
    assert len(shown.err.strip().split("\n")) == 4
    assert json.loads(shown.out[shown.out.index("{") :]) == {HOSTILE: HOSTILE}


def test_one_line_is_one_line():
    assert one_line("a\nb\r\n\tc\x1b[0m") == "a b c\\x1b[0m"
    assert len(one_line("x" * 1_000_000)) < 2100
