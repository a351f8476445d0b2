"""Suite files: strict, and every mistake is one line that names the file and the key."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tdabench.errors import DataError, TdabenchError, UsageError
from tdabench.run.sources import load_suite
from tdabench.run.suite import truth_name
from tdabench.run.suite_file import read_suite

GOOD = """
[suite]
name = "mine"
version = 2
summary = "a suite"
seeds = [0, 1]
[corpus]
file = "corpus.jsonl"
train = "pool"
queries = "test"
tuning_queries = "tuning"
[[targets]]
label = "a"
name = "model"
folder = "targets/a"
checkpoints = { base = "base.safetensors" }
main = true
[targets.truths]
lds = "truth/a.safetensors"
[targets.assets]
encoder = "a/encoder"
[[targets]]
label = "b"
folder = "targets/b"
[assets]
encoder = "encoder"
words = "words.txt"
[benchmarks]
default = ["lds"]
[benchmarks.lds]
replicates = 10
[methods]
default = ["tfidf", "big"]
[methods.params.tfidf]
pooling = "mean"
[[methods.variants]]
label = "big"
method = "tfidf"
params = { temperature = 2.0 }
[tuned.a.tfidf]
temperature = 0.5
"""


def write(folder: Path, text: str = GOOD) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_everything_is_read(tmp_path: Path):
    suite = read_suite(write(tmp_path))
    assert (suite.name, suite.version, suite.seeds) == ("mine", 2, (0, 1))
    assert [t.label for t in suite.targets] == ["a", "b"]
    assert [t.label for t in suite.main_targets] == ["a"]
    a, b = suite.targets
    assert a.truths["lds"] == tmp_path / "truth" / "a.safetensors"
    assert suite.assets_for(a)["encoder"] == tmp_path / "a" / "encoder"
    assert suite.assets_for(b)["encoder"] == tmp_path / "encoder"
    assert suite.variants["big"].params == {"temperature": 2.0}
    assert suite.tuned["a"]["tfidf"] == {"temperature": 0.5}
    assert suite.benchmark_params["lds"] == {"replicates": 10}
    assert b.target.name == "b"


def test_the_fingerprint_is_that_of_the_contents(tmp_path: Path):
    first = read_suite(write(tmp_path)).fingerprint
    assert read_suite(write(tmp_path, "# a comment\n" + GOOD)).fingerprint == first
    assert read_suite(write(tmp_path, GOOD.replace("= 10", "= 11"))).fingerprint != first


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "mine"', "", "[suite] name: is missing"),
        ('name = "mine"', "name = 3", "[suite] name: must be a string, not an integer ('3')"),
        ('name = "mine"', 'name = "a b"', "may contain only letters"),
        ("version = 2", "verion = 2", "verion: is not a known key. Did you mean 'version'?"),
        ("version = 2", "version = true", "must be an integer, not true or false"),
        ("seeds = [0, 1]", "seeds = []", "seeds: must list at least one integer"),
        ("seeds = [0, 1]", "seeds = [-1]", "seeds: must list at least one integer"),
        ('file = "corpus.jsonl"', "", "[corpus] file: is missing"),
        ('train = "pool"', "", "[corpus] train: and queries must name the splits"),
        ('label = "b"', 'label = "a"', "two targets have the label 'a'"),
        ('folder = "targets/b"', "", "[[targets]] 2 folder: is missing"),
        ('folder = "targets/b"', 'folder = ""', "'' is not a path"),
        ("main = true", 'main = "yes"', "main: must be true or false, not a string"),
        ('"base.safetensors"', '"../base.safetensors"', "is outside the target's folder"),
        ('"base.safetensors"', '"/etc/passwd"', "is outside the target's folder"),
        ("main = true", 'template = "chatty"', "unknown template 'chatty'"),
        ("main = true", "max_length = 1", "max_length: must be at least 2"),
        ("[tuned.a.tfidf]", "[tuned.c.tfidf]", "[tuned] c: is not a target's label"),
        ('default = ["lds"]', 'default = "lds"', "default: must be a list, not a string"),
        ('default = ["lds"]', "default = [1]", "default: must list strings"),
        ('label = "big"', "", "[[methods.variants]] 1 label: is missing"),
        ("[assets]", "[asets]", "asets: is not a known key. Did you mean 'assets'"),
        (
            "[targets.assets]",
            '[targets.plans.lds]\nleave_out = "task"\nseeds = 1\nfraction = 0.5\n[targets.assets]',
            "defines the groups: leave out fraction and groups_of",
        ),
        (
            "[targets.assets]",
            '[targets.plans.lds]\nleave_out = "task"\nseeds = 1\ngroups = 1\n[targets.assets]',
            "one source that is left out ranks nothing",
        ),
        ("[suite]", "[suite", "is not valid TOML"),
        ("[[targets]]", "[targets]", "is not valid TOML"),
        ("[assets]", '[hashes]\n"x" = "12"\n[assets]', "must be a sha256 of 64 hex digits"),
    ],
)
def test_a_mistake_names_file_and_key(tmp_path: Path, old: str, new: str, message: str):
    assert old in GOOD
    with pytest.raises(DataError) as e:
        read_suite(write(tmp_path, GOOD.replace(old, new, 1)))
    assert message in str(e.value)
    assert "mine.toml" in str(e.value)


def test_bytes_that_are_not_text(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"[suite]\nname = '\xff'")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_suite(path)
    with pytest.raises(DataError, match="cannot read the suite"):
        read_suite(tmp_path)


def test_names_and_paths(tmp_path: Path):
    write(tmp_path)
    (tmp_path / "suite.toml").write_text(GOOD)
    assert load_suite(tmp_path / "mine.toml").name == "mine"
    assert load_suite(f"{tmp_path}/").path.name == "suite.toml"
    with pytest.raises(UsageError, match=r"unknown suite 'pockt'\. Did you mean 'pocket'"):
        load_suite("pockt")


def corpus(folder: Path, lines: str) -> None:
    (folder / "corpus.jsonl").write_text(lines)


LINE = '{{"id": "{0}", "prompt": "p{0}", "response": "r", "split": "{1}"}}\n'


def test_splits_of_one_file_are_read_once(tmp_path: Path):
    suite = read_suite(write(tmp_path))
    corpus(tmp_path, "".join(LINE.format(i, s) for i, s in enumerate(["pool", "test", "pool"])))
    assert suite.train.ids == ["0", "2"]
    assert suite.queries().ids == ["1"]
    with pytest.raises(DataError, match=r"no example of the split 'tuning'"):
        suite.queries("tuning")
    (tmp_path / "corpus.jsonl").unlink()
    assert suite.train.ids == ["0", "2"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "holds no examples"),
        ('{"prompt": "p"}\n', "line 1: the field 'response' is missing"),
        ("[1]\n", "line 1: expected an object"),
        ("{", "line 1: not valid JSON"),
        (LINE.format(1, "pool") * 2, "two examples with the id '1'"),
    ],
)
def test_a_malformed_corpus_names_the_line(tmp_path: Path, lines: str, message: str):
    suite = read_suite(write(tmp_path))
    corpus(tmp_path, lines)
    with pytest.raises(DataError, match=message):
        assert suite.train


def test_hashes_are_checked_on_use(tmp_path: Path):
    text = LINE.format(1, "pool") + LINE.format(2, "test")
    corpus(tmp_path, text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    good = GOOD + f'[hashes]\n"corpus.jsonl" = "{digest}"\n"encoder/w" = "{"0" * 64}"\n'
    assert len(read_suite(write(tmp_path, good)).train) == 1
    corpus(tmp_path, text + " ")
    with pytest.raises(DataError, match=r"corpus\.jsonl is not the declared file"):
        assert read_suite(write(tmp_path, good)).train
    suite = read_suite(write(tmp_path, good))
    with pytest.raises(DataError, match="encoder is missing"):
        suite.verify(tmp_path / "encoder")
    (tmp_path / "encoder").mkdir()
    with pytest.raises(DataError, match="encoder/w is missing"):
        suite.verify(tmp_path / "encoder")
    (tmp_path / "encoder" / "w").write_text("")
    with pytest.raises(DataError, match="encoder/w is not the declared file"):
        suite.verify(tmp_path / "encoder")


def test_content_of_a_folder_is_that_of_its_files(tmp_path: Path):
    suite = read_suite(write(tmp_path))
    folder = tmp_path / "encoder"
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "w").write_text("1")
    first = suite.content(folder)
    (folder / "__pycache__" / "x.pyc").write_text("")
    assert suite.content(folder) == first
    (folder / "w").write_text("2")
    assert suite.content(folder) != first


def test_names_of_truths_on_tuning_queries():
    assert truth_name("lds", "test") == "lds"
    assert truth_name("lds", "tuning") == "tuning"
    assert truth_name("removal", "tuning") == "tuning-removal"


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_a_suite_file_is_a_traceback(tmp_path: Path, data: st.DataObject):
    """Cut, replace or insert anywhere: it reads, or it is a clear error."""
    text = GOOD.encode()
    for _ in range(data.draw(st.integers(1, 3))):
        a = data.draw(st.integers(0, len(text)))
        b = data.draw(st.integers(a, min(len(text), a + 30)))
        new = data.draw(st.binary(max_size=8) | st.sampled_from(PIECES))
        text = text[:a] + new + text[b:]
    path = tmp_path / "fuzzed.toml"
    path.write_bytes(text)
    error = None
    try:
        assert read_suite(path).targets
    except TdabenchError as e:
        error = e
    if error is not None:
        assert str(path) in str(error)
        assert "\n" not in error.message


PIECES = [
    b"[[targets]]\n", b"[suite]\n", b"nan", b"inf", b"1979-05-27", b"{}", b"[]", b'""', b"true",
    b"\x00", b"'''", b"\n[hashes]\n", b"= -1", b"[[[[", b'"\\u0000"', b"a.b.c = 1\n", b"\xff",
]  # fmt: skip
