"""One line of any error, and what a missing package says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tdabench.errors import (
    DataError,
    MissingExtra,
    TdabenchError,
    brief,
    first_line,
    relative,
    wrapped,
)
from tdabench.run.contestant import explain
from tdabench.toolkit.representation import RepresentationMethod


@pytest.mark.parametrize(
    ("error", "line", "named"),
    [
        (ValueError("one\ntwo"), "one", "ValueError: one"),
        (ValueError("\n  \n one"), "one", "ValueError: one"),
        (ValueError(), "ValueError", "ValueError"),
        (KeyError("k" * 400), "'" + "k" * 299, "KeyError: '" + "k" * 299),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str, named: str):
    assert first_line(error) == line
    assert brief(error) == named


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MissingExtra("FAISS", "faiss"), "pip install 'tdabench[faiss]'"),
        (MissingExtra("FAISS", remedy="Ask for it"), "FAISS is not installed. Ask for it"),
        (MissingExtra("FAISS"), "FAISS is not installed"),
    ],
)
def test_whatever_package_is_missing_the_cell_is_skipped(error: MissingExtra, said: str):
    status, reason = explain(error)
    assert status == "skipped"
    assert said in reason
    assert explain(TdabenchError("no")) == ("failed", "no")


def test_an_index_of_another_method_or_version_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Mine(RepresentationMethod):
        name = "mine"
        version = 2

        def encode(self, context, examples, role):
            raise NotImplementedError

    Mine().check_saved(Path("x"), {"method": "mine", "version": 2})
    for meta in ({"method": "mine", "version": 1}, {"method": "other", "version": 2}, {}):
        with pytest.raises(DataError, match=r"x is an index of .*, not of mine version 2"):
            Mine().check_saved(Path("x"), meta)


def test_notices_wrap_between_words_and_show_paths_as_short_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long = f"{tmp_path}/{'folder/' * 12}file.json"
    assert relative(f"wrote {long}; see {tmp_path}-2/x") == (
        f"wrote {'folder/' * 12}file.json; see {tmp_path}-2/x"
    )
    assert relative(f"{tmp_path}") == str(tmp_path)  # not an empty word
    text = wrapped(f"tdabench: {'some words-with-hyphens ' * 9}{long} {'and more ' * 9}", 80)
    assert (
        " ".join(text.split())
        == f"tdabench: {'some words-with-hyphens ' * 9}{long} " + ("and more " * 9).rstrip()
    )
    lines = text.splitlines()
    assert all(len(line) < 80 or line.strip() == long for line in lines)
    assert all(line.startswith("  ") for line in lines[1:])
