"""Damaged, edited and hostile submissions are refused by name, and the others are untouched."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tdabench.io import sha256_file, write_json
from tdabench.results.layout import HEAD, identity, read_results
from tdabench.results.site import render
from tdabench.run.record import Record

# Folders are copied while data are drawn, which a busy machine makes slow.
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["<script>alert(1)</script>", "/etc/passwd", "../../x", "\x1b[2J", "\u202e"]),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.is_symlink()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


def reseal(folder: Path) -> Path:
    """Makes hashes and ids fit again, as a careful forger does; returns the new folder."""
    head = json.loads((folder / HEAD).read_text())
    for key, of in head["cells"].items():
        of["record"] = sha256_file(folder / f"{key}.json")
        if of["arrays"]:
            of["arrays"] = sha256_file(folder / f"{key}.safetensors")
    head["id"] = identity(head)
    write_json(folder / HEAD, head)
    return folder.rename(folder.with_name(head["id"]))


def same_json(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(data=st.data())
def test_damage_is_refused_by_name_and_leaves_the_rest(submitted, data):
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(shutil.copytree(submitted[0], Path(scratch) / "r"))
        whole = {s.place: dict(s.head) for s in read_results(repository).submissions}
        place = data.draw(st.sampled_from(sorted(whole)))
        files = sorted(p for p in (repository / place).iterdir())
        victim = data.draw(st.sampled_from(files))
        raw = victim.read_bytes()
        what = data.draw(
            st.sampled_from(["flip", "cut", "remove", "empty", "link", "fifo", "extra", "folder"])
        )
        if what == "flip":
            at, mask = data.draw(st.integers(0, len(raw) - 1)), data.draw(st.integers(1, 255))
            victim.write_bytes(raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :])
        elif what == "cut":
            victim.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
        elif what in ("remove", "link", "fifo", "folder"):
            victim.unlink()
            if what == "link":
                victim.symlink_to("/etc/hostname")
            elif what == "fifo":
                os.mkfifo(victim)
            elif what == "folder":
                victim.mkdir()
        elif what == "empty":
            victim.write_bytes(b"")
        else:
            (repository / place / "run.sh").write_text("#!/bin/sh\n")
        if what in ("flip", "cut") and victim.name == HEAD:  # another space is no damage
            assume(not same_json(victim.read_bytes(), raw))
        found = read_results(repository)
        assert [r.place for r in found.refused] == [place]
        assert found.refused[0].reason
        assert {s.place: dict(s.head) for s in found.submissions} == {
            p: head for p, head in whole.items() if p != place
        }


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(data=st.data())
def test_any_field_may_be_anything_even_with_hashes_that_fit(submitted, data):
    """A forger changes a field of a record or the head, signs it again, and fixes every hash."""
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(shutil.copytree(submitted[0], Path(scratch) / "r"))
        whole = read_results(repository).submissions
        chosen = data.draw(st.sampled_from(whole))
        others = {s.place for s in whole} - {chosen.place}
        name = data.draw(st.sampled_from([HEAD, f"{chosen.records[0].key}.json"]))
        path = chosen.folder / name
        value = json.loads(path.read_text())
        part = value
        for _ in range(data.draw(st.integers(0, 2))):
            inner = [k for k, v in part.items() if isinstance(v, dict) and v]
            if not inner:
                break
            part = part[data.draw(st.sampled_from(sorted(inner)))]
        part[data.draw(st.sampled_from(sorted(part)))] = data.draw(VALUES)
        try:
            text = json.dumps(value)
        except (ValueError, RecursionError):
            return
        path.write_text(text)
        try:
            if name != HEAD:
                record = Record(value, path)
                write_json(path, dict(record.signed(record.arrays_hash())))
            reseal(chosen.folder)
        except (TypeError, AttributeError, KeyError, ValueError, OSError):
            pass  # it cannot even be signed
        found = read_results(repository)
        assert others <= {s.place for s in found.submissions}
        assert len(found.submissions) + len(found.refused) >= len(whole)
        page = render(found, cache=False)  # whatever was accepted can be shown
        assert "<script>alert" not in page
        assert "\x1b" not in page
        assert "\u202e" not in page


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("results/../up", ""),
        ("results/trial/instruct/airrep", "not a name of a method and version"),
        ("results/trial/instruct/airrep-v1/short", "not a name of a submission"),
        ("results/poc ket", "not a name of a suite"),
        ("results/notes.txt", "not a folder of a suite"),
    ],
)
def test_what_lies_elsewhere_in_the_repository(name, problem, repository):
    path = repository / name
    if name.endswith(".txt"):
        path.write_text("hello")
    else:
        path.mkdir(parents=True)
    found = read_results(repository)
    assert len(found.submissions) == 4
    assert [r.reason for r in found.refused] == ([problem] if problem else [])


def test_a_huge_number_a_deep_list_and_a_large_file(repository):
    (a, b, c, _) = read_results(repository).submissions
    (a.folder / HEAD).write_text("[" * 100_000)
    (b.folder / HEAD).write_text('{"layout": ' + "9" * 6000 + "}")
    (c.folder / f"{c.records[0].key}.json").write_bytes(b" " * (300 << 10))
    found = read_results(repository)
    assert [r.place for r in found.refused] == [a.place, b.place, c.place]
    assert "larger than 256 KiB" in found.refused[2].reason


def test_a_submission_moved_to_another_place_is_refused(repository):
    airrep = next(s for s in read_results(repository).submissions if s.method["name"] == "airrep")
    to = repository / "results" / "trial" / "instruct" / "trak-v1" / airrep.id
    to.parent.mkdir()
    airrep.folder.rename(to)
    (bad,) = read_results(repository).refused
    assert "does not belong to this folder" in bad.reason
