"""Files and layouts: what users have is read, and what is wrong with it is one line."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from tdabench.data import Corpus, Reading, read_corpus
from tdabench.data.files import FileCorpus
from tdabench.data.layouts import parse_fields
from tdabench.errors import DataError, MissingExtra, UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TDABENCH_CACHE", str(tmp_path / "cache"))


def lines(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return path


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "More"},
]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "response": "r", "task": "t"}, ("p", "r", "t")),
        ({"inputs": "p", "targets": "r", "task": "t"}, ("p", "r", "t")),
        ({"instruction": "p", "input": "", "output": "r"}, ("p", "r", "")),
        ({"instruction": "p", "input": "more", "output": "r"}, ("p\n\nmore", "r", "")),
        ({"messages": CHAT}, ("Be brief.\n\nHi", "Hello", "")),
        ({"conversations": SHAREGPT}, ("Hi", "Hello", "")),
        ({"data": ["p", "r", "p2"], "id": "9"}, ("p", "r", "")),
        ({"question": "p", "answer": "r"}, ("p", "r", "")),
        ({"text": "all of it"}, ("", "all of it", "")),
        # The stored truth of SafeRLHF has prompt and response, and other fields beside them.
        ({"prompt": "p", "response": "r", "is_safe": True}, ("p", "r", "")),
    ],
)
def test_layouts_are_recognised(tmp_path, row, expected):
    (e,) = read_corpus(lines(tmp_path / "c.jsonl", row))
    assert (e.prompt, e.response, e.task) == expected
    assert e.id == row.get("id", "c-1")


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"instruction": "p", "input": "more", "output": "r"}, "p", "r"),
        ({"input": "more", "output": "r"}, " more", "r"),
        ({"data": ["w " * 150, "r", "x"]}, " ".join("w" * 100), "r"),
        ({"inputs": "p", "targets": "r"}, "p", "r"),
        ({"prompt": "p", "response": "r", "data": ["a", "b"]}, "p", "r"),
    ],
)
def test_the_layout_of_the_published_truths_is_their_codes(tmp_path, row, prompt, response):
    (e,) = read_corpus(lines(tmp_path / "c.jsonl", row), Reading(layout="airrep"))
    assert (e.prompt, e.response) == (prompt, response)


def test_fields_are_mapped_into_lists_and_objects(tmp_path):
    row = {"q": {"text": "p"}, "turns": [{"a": "r"}], "kind": 7, "key": "k", "left": "over"}
    fields = parse_fields(["prompt=q.text", "response=turns.0.a", "task=kind", "id=key"])
    (e,) = read_corpus(lines(tmp_path / "c.jsonl", row), Reading(fields=fields))
    assert (e.id, e.prompt, e.response, e.task) == ("k", "p", "r", "7")
    assert e.meta["left"] == "over"
    # One role alone may be mapped, beside a layout.
    row = {"inputs": "p", "targets": "r", "task": "t", "source": "s"}
    (e,) = read_corpus(lines(tmp_path / "d.jsonl", row), Reading(fields={"task": "source"}))
    assert (e.response, e.task) == ("r", "s")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt"], "not have the form ROLE=FIELD"),
        (["promt=x"], "unknown role in --field 'promt'. Did you mean 'prompt'"),
    ],
)
def test_a_mistaken_mapping(words, message):
    with pytest.raises(UsageError, match=message):
        parse_fields(words)


@pytest.mark.parametrize(
    ("row", "reading", "message"),
    [
        ({"a": 1, "b": 2}, {}, r"line 1: no known layout has these fields: 'a', 'b'.*--field"),
        ({"inputs": "p", "targets": 3}, {}, "line 1: the field 'targets' is int, not a string"),
        (
            {"prompt": "p", "solution": "r"},
            {},
            "line 1: the field 'response' is missing. Another field may hold it .'solution'.: "
            "--field response=NAME",
        ),
        ({"prompt": "p"}, {}, "'response' is missing. All rows must have the fields of the first"),
        ({"a": "x"}, {"fields": {"response": "aa"}}, "there is no field 'aa'. Did you mean 'a'"),
        ({"a": [1]}, {"fields": {"response": "a.4"}}, "'a.4' reaches past the end"),
        ({"a": 5}, {"fields": {"response": "a"}}, "'a' is int, not a string"),
        ({"data": ["p"]}, {}, "not a list of at least two turns"),
        ({"messages": [{"role": "user", "content": "x"}]}, {}, "no user turn with an answer"),
        ({"messages": "x"}, {}, "not a list of turns"),
        ({"messages": [1]}, {}, "not an object"),
        ({"prompt": "p", "response": " "}, {}, "line 1: the response is empty.*--empty skip"),
        ({"prompt": "p", "response": "r"}, {"tasks": ("z",)}, "no example of the tasks z"),
    ],
)
def test_a_row_that_does_not_fit_is_one_line(tmp_path, row, reading, message):
    with pytest.raises(DataError, match=message) as e:
        read_corpus(lines(tmp_path / "c.jsonl", row), Reading(**reading))
    assert str(tmp_path) in str(e.value)
    assert "\n" not in str(e.value)


def test_empty_responses_are_kept_or_skipped_on_request(tmp_path):
    rows = [{"prompt": str(i), "response": "r" * (i != 1)} for i in range(3)]
    path = lines(tmp_path / "c.jsonl", *rows)
    assert [e.prompt for e in read_corpus(path, Reading(empty="keep"))] == ["0", "1", "2"]
    kept = read_corpus(path, Reading(empty="skip"))
    assert kept.ids == ["c-1", "c-3"]  # numbered by line, whatever is left out
    with pytest.raises(UsageError, match="unknown rule"):
        Reading(empty="drop")


def test_csv_and_tsv_with_quotes_newlines_and_a_mark(tmp_path):
    path = tmp_path / "c.csv"
    path.write_bytes('\ufeffprompt,response,task\n"a, ""b""\nc",r,t\n'.encode())
    (e,) = read_corpus(path)
    assert (e.prompt, e.response, e.task) == ('a, "b"\nc', "r", "t")
    packed = tmp_path / "c.tsv.gz"
    packed.write_bytes(gzip.compress(b"question\tanswer\nq\ta\n"))
    (e,) = read_corpus(packed)
    assert (e.prompt, e.response) == ("q", "a")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("c.csv", b"prompt,response\na,b,c\n", "line 2: more fields than the header"),
        ("c.csv", b"prompt,response\na\n", "line 2: fewer fields than the header"),
        ("c.csv", b"prompt,response\n\xff,b\n", "line 2: not UTF-8"),
        ("c.csv", b'prompt,response\n"a"x,b\n', "not valid CSV"),
        ("c.json", b'[["p", "r"]]', "line 1: expected an object, found list.*object per line"),
        ("c.json", b'{\n"prompt": "p"\n}', "line 1: not valid JSON.*jq"),
        ("c.xlsx", b"PK", "files ending in '.xlsx' are not supported.*Give .jsonl"),
        ("c.jsonl", b'{"prompt": "p", "response": "r"}\n{"a"', "line 2: not valid JSON"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as e:
        read_corpus(tmp_path / name)
    assert "\n" not in str(e.value)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"inputs": ["p", "q"], "targets": ["r", "s"], "task": ["t", "u"]})
    parquet.write_table(table, tmp_path / "c.parquet")
    corpus = read_corpus(tmp_path / "c.parquet")
    assert [(e.prompt, e.response, e.task) for e in corpus] == [("p", "r", "t"), ("q", "s", "u")]
    streamed = read_corpus(tmp_path / "c.parquet", stream=True)
    assert isinstance(streamed, FileCorpus)
    assert streamed.fingerprint == corpus.fingerprint
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" * 9)
    with pytest.raises(DataError, match="damaged or not Parquet"):
        read_corpus(tmp_path / "bad.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingExtra, match=r"pip install 'tdabench\[parquet\]'"):
        read_corpus(tmp_path / "c.parquet")


def test_a_saved_dataset_and_its_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"prompt": ["p"], "response": ["r"]}
    part = datasets.Dataset.from_dict(rows)
    part.save_to_disk(str(tmp_path / "one"))
    assert read_corpus(tmp_path / "one")[0].response == "r"
    datasets.DatasetDict({"train": part}).save_to_disk(str(tmp_path / "dict"))
    assert len(read_corpus(tmp_path / "dict", Reading(split="train"))) == 1
    with pytest.raises(DataError, match="has the splits train, and 'test' is not among"):
        read_corpus(tmp_path / "dict", Reading(split="test"))


def test_a_folder_of_shards_and_of_splits(tmp_path):
    for name, n in (("train-0.jsonl", 2), ("train-1.jsonl", 1), ("test-0.jsonl", 1)):
        rows = [{"id": f"{name}{i}", "prompt": "p", "response": "r"} for i in range(n)]
        lines(tmp_path / name, *rows)
    assert len(read_corpus(tmp_path)) == 4
    assert len(read_corpus(tmp_path, Reading(split="train"))) == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no data files"):
        read_corpus(tmp_path / "empty")


# --------------------------------------------------------------------------- streaming


def rows(n: int) -> list[dict]:
    return [{"inputs": f"prompt {i} é", "targets": f"r {i}", "task": f"t{i % 3}"} for i in range(n)]


@pytest.mark.parametrize("packed", [False, True])
def test_a_corpus_on_disk_is_the_same_corpus(tmp_path, packed):
    path = lines(tmp_path / "c.jsonl", *rows(50))
    if packed:
        path = tmp_path / "c.jsonl.gz"
        path.write_bytes(gzip.compress((tmp_path / "c.jsonl").read_bytes()))
    whole = read_corpus(path, Reading(tasks=("t0", "t2")), stream=False)
    for _ in range(2):  # the second time from the index in the cache
        there = read_corpus(path, Reading(tasks=("t0", "t2")), stream=True)
        assert isinstance(there, FileCorpus)
        assert there.fingerprint == whole.fingerprint
        assert list(there) == list(whole)
        assert (there.ids, there.tasks) == (whole.ids, whole.tasks)
        assert list(there[3:7]) == list(whole[3:7])
        assert there.subset([5, 0]).fingerprint == whole.subset([5, 0]).fingerprint
        assert there[-1] == whole[-1]
        assert isinstance(there[3:7], Corpus)
        with pytest.raises(IndexError):
            there[len(there)]


def test_streaming_finds_what_is_wrong_when_it_indexes(tmp_path):
    path = lines(tmp_path / "c.jsonl", *rows(5), {"inputs": 3, "targets": "r"})
    with pytest.raises(DataError, match="line 6: the field 'inputs'"):
        read_corpus(path, stream=True)
    path = lines(tmp_path / "d.jsonl", *({**r, "id": "same"} for r in rows(2)))
    with pytest.raises(DataError, match="two examples with the same id"):
        read_corpus(path, stream=True)


def test_a_file_that_changes_is_read_anew_and_noticed(tmp_path):
    path = lines(tmp_path / "c.jsonl", *rows(5))
    first = read_corpus(path, stream=True)
    lines(path, *rows(7))
    assert len(read_corpus(path, stream=True)) == 7
    with pytest.raises(DataError, match="has changed since"):
        first[0]


def test_memory_does_not_grow_with_a_streamed_corpus(tmp_path):
    """Reading 20,000 long examples, one at a time, holds none of them."""
    path = tmp_path / "c.jsonl"
    row = json.dumps({"prompt": "p" * 500, "response": "r" * 500}) + "\n"
    path.write_text(row * 20_000)
    tracemalloc.start()
    corpus = read_corpus(path, stream=True)
    assert sum(len(e.response) for e in corpus) == 10_000_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 20e6
    assert peak < 3e6


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a", "response": "b", "prompt": "c"}', "key 'prompt' is repeated"),
        ("b.jsonl", '{"prompt": "a", "response": "b", "m": {"x": 1, "x": 2}}', "'x' is repeated"),
        ("c.csv", "prompt,response,prompt\na,b,c\n", "line 1: 2 columns are named 'prompt'"),
        ("d.csv", "prompt,response,note,note\na,b,c,d\n", "line 1: 2 columns are named 'note'"),
    ],
)  # fmt: skip
def test_a_repeated_key_or_column_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_corpus(tmp_path / name, Reading()))


# --------------------------------------------------------------------------- as people have them


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "r"}, ("p", "r", "")),
        ({"instruction": "p", "context": "", "response": "r", "category": "qa"}, ("p", "r", "qa")),
        ({"instruction": "p", "context": "c", "response": "r"}, ("p\n\nc", "r", "")),
        ({"prompt": "p", "response": "r", "task": 3}, ("p", "r", "3")),
    ],
)
def test_rows_of_fine_tuning_sets_are_recognised(tmp_path, row, expected):
    (e,) = read_corpus(lines(tmp_path / "c.jsonl", row))
    assert (e.prompt, e.response, e.task) == expected


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_one_list_of_objects(tmp_path, indent, packed, stream):
    rows = [{"instruction": f"p{i}", "input": "", "output": f"r{i} é]"} for i in range(50)]
    text = "\ufeff " + json.dumps(rows, indent=indent, ensure_ascii=False)
    path = tmp_path / ("c.json.gz" if packed else "c.json")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    found = read_corpus(path, stream=stream)
    assert [(e.prompt, e.response) for e in found] == [(f"p{i}", f"r{i} é]") for i in range(50)]


def test_a_list_longer_than_what_is_read_at_a_time(tmp_path):
    rows = [{"prompt": "p", "response": "x" * 300_000} for _ in range(12)]
    (tmp_path / "c.json").write_text(json.dumps(rows))
    assert [len(e.response) for e in read_corpus(tmp_path / "c.json")] == [300_000] * 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "p", "response": "r"} {}]', "item 2: not valid JSON"),
        ('[{"prompt": "p", "response": "r"}, 3]', "item 2: expected an object, found int"),
        ('[{"prompt": "p", "response": "r"},', "item 2: not valid JSON"),
        ('[{"prompt": "p", "response": "r"', "item 1: not valid JSON"),
        ("[]", "holds no examples"),
        ("[", "item 1: not valid JSON"),
    ],
)
def test_a_damaged_list_is_one_line(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_corpus(tmp_path / "c.json")


@pytest.mark.parametrize(
    "text",
    [
        'prompt;response\np, q;"r;s"\n',
        'prompt,response\r"p, q","r;s"\r',
        'prompt;response\r\n"p, q";"r;s"\r\n',
        '"prompt",response\n"p, q",r;s\n',
        "prompt\tresponse\np, q\tr;s\n",
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path, text):
    (tmp_path / "c.csv").write_bytes(text.encode())
    (e,) = read_corpus(tmp_path / "c.csv")
    assert (e.prompt, e.response) == ("p, q", "r;s")


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"instruction": "p", "response": "r"}, {"prompt": "instruction"}),
        ({"q": "p", "response": "r"}, {"prompt": "q"}),
        ({"q": "p", "answer": "r"}, {"prompt": "q"}),
        ({"question": "p", "text": "r"}, {"prompt": "question", "response": "text"}),
        ({"prompt": "p", "label": "r"}, {"response": "label"}),
        ({"instruction": "p", "input": "", "output": "x", "best": "r"}, {"response": "best"}),
    ],
)
def test_mapping_one_role_leaves_the_other_recognised(tmp_path, row, fields):
    (e,) = read_corpus(lines(tmp_path / "c.jsonl", row), Reading(fields=fields))
    assert (e.prompt, e.response) == ("p", "r")


# --------------------------------------------------------------------------- files that are bombs


def test_a_parquet_file_that_expands_without_end_is_refused(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    long = pyarrow.array(["x" * (1 << 20)])
    many = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 5000, "int32"), long)
    path = tmp_path / "c.parquet"
    table = pyarrow.table({"prompt": many, "response": many})
    parquet.write_table(table, path, compression="zstd")
    assert path.stat().st_size < 10_000
    monkeypatch.setenv("TDABENCH_MAX_FILE", "20M")
    with pytest.raises(DataError, match="expands to more than 20 MiB"):
        read_corpus(path)
    monkeypatch.setenv("TDABENCH_MAX_FIELD", "100k")
    with pytest.raises(DataError, match="row 1: the field 'prompt' is larger"):
        read_corpus(path)
    assert not list((tmp_path / "cache").rglob("*.jsonl"))
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    table = pyarrow.Table.from_arrays(columns, names=["prompt", "prompt"])
    parquet.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(DataError, match="two columns are named 'prompt'"):
        read_corpus(tmp_path / "c.parquet")


@pytest.mark.parametrize("packed", [False, True])
def test_a_field_beyond_the_limit_is_refused_and_the_limit_can_be_set(
    tmp_path, monkeypatch, packed
):
    monkeypatch.setenv("TDABENCH_MAX_FIELD", "1M")
    text = 'prompt,response\np,"' + "word\n" * 300_000 + '"\n'
    path = tmp_path / ("c.csv.gz" if packed else "c.csv")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    with pytest.raises(DataError, match=r"field larger than field limit.*TDABENCH_MAX_FIELD"):
        read_corpus(path)
    monkeypatch.setenv("TDABENCH_MAX_FIELD", "2M")
    assert len(read_corpus(path)) == 1
    monkeypatch.setenv("TDABENCH_MAX_ROW", "1M")
    with pytest.raises(DataError, match=r"larger than 1 MiB.*TDABENCH_MAX_ROW"):
        read_corpus(path)
    monkeypatch.setenv("TDABENCH_MAX_ROW", "much")
    with pytest.raises(UsageError, match="TDABENCH_MAX_ROW='MUCH' is not a size"):
        read_corpus(path)


def test_a_compressed_file_that_expands_without_end_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl.gz"
    row = json.dumps({"prompt": "p", "response": "x" * 10_000}) + "\n"
    path.write_bytes(gzip.compress(row.encode() * 500))
    monkeypatch.setenv("TDABENCH_MAX_FILE", "1M")
    with pytest.raises(DataError, match="expands to more than 1 MiB"):
        read_corpus(path)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    import os

    os.mkfifo(tmp_path / "c.jsonl")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read_corpus(tmp_path / "c.jsonl")
    (tmp_path / "d.jsonl").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read_corpus(tmp_path / "d.jsonl")
