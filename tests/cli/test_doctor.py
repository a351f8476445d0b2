"""`tdabench doctor` says what is wrong on this machine, and what to do about it."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from tdabench.cli import doctor, main
from tdabench.registry import configure


@pytest.fixture(autouse=True)
def _forget_plugins():
    yield
    configure((), ())


def test_it_looks_at_everything(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--json"]) in (0, 1)
    rows = {r["what"]: r for r in json.loads(capsys.readouterr().out)}
    for what in ("python", "torch", "transformers", "processor", "memory", "disk", "device",
                 "run folder", "limits", "threads", "hub", "plugins", "suite pocket"):  # fmt: skip
        assert what in rows, what
    assert rows["run folder"]["status"] == "ok"
    assert "locks" in rows["run folder"]["found"]
    assert list(tmp_path.iterdir()) == []  # what it tried there is gone again


def test_the_unrelated_trak_is_named_by_what_import_trak_gives(tmp_path: Path, monkeypatch):
    """Even where pip knows nothing of it: a folder `trak` that is not traker's hides it."""
    (tmp_path / "trak").mkdir()
    (tmp_path / "trak" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "trak", raising=False)

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", absent)
    (found,) = doctor.unrelated_trak()
    assert found[0] == "wrong"
    assert str(tmp_path / "trak") in found[2]


def test_a_folder_that_cannot_be_written_is_wrong(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()

    def full(*args: object, **kw: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor.tempfile, "mkstemp", full)
    (found,) = doctor.run_folder()
    assert found[0] == "wrong"
    assert "No space left on device" in found[2]


def test_too_few_open_files_is_a_note(monkeypatch):
    resource = pytest.importorskip("resource")
    low = {resource.RLIMIT_NOFILE: (64, 64)}
    unlimited = (resource.RLIM_INFINITY,) * 2
    monkeypatch.setattr(resource, "getrlimit", lambda what: low.get(what, unlimited))
    (found,) = doctor.limits()
    assert found[0] == "note"
    assert "64 open files" in found[2]


def test_missing_and_broken_packages_differ(monkeypatch):
    def fake(name: str) -> str:
        if name in ("scipy", "kronfluence"):
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "version", fake)
    rows = {c[1]: c for c in doctor.packages()}
    assert rows["scipy"][0] == "wrong"
    assert rows["kronfluence"][0] == "note"
    assert "pip install kronfluence" in rows["kronfluence"][3]
