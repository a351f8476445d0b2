"""Files are whole or absent, and what was altered is noticed."""

import json
import os
import re

import numpy as np
import pytest

from tdabench.errors import DataError, TdabenchError
from tdabench.io import (
    cache_folder,
    canonical,
    carried_hash,
    fingerprint,
    has_fingerprint,
    read_arrays,
    read_input,
    read_json,
    read_jsons,
    write_arrays,
    write_bytes,
    write_json,
)


def test_arrays_round_trip_with_metadata(tmp_path):
    path = tmp_path / "deep" / "a.safetensors"
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "empty": np.zeros((0, 4))}
    write_arrays(path, arrays, {"recipe": {"lr": 0.1}, "ids": ["a", "b"]})
    got, meta = read_arrays(path)
    assert meta == {"recipe": {"lr": 0.1}, "ids": ["a", "b"]}
    for k in arrays:
        np.testing.assert_array_equal(got[k], arrays[k])
        assert got[k].dtype == arrays[k].dtype


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    write_arrays(path, {"x": np.arange(100, dtype=np.float32)})
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="corrupt"):
        read_arrays(path)


def test_the_hash_is_read_from_the_beginning_and_a_second_one_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    write_arrays(path, {"x": np.arange(3.0)})
    (found,) = re.findall(rb'"sha256":"([0-9a-f]{64})"', path.read_bytes())
    assert carried_hash(path) == found.decode()
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = data[8 : 8 + length]
    for changed, said in (
        (head.replace(b'{"sha256":"', b'{"sha256":"' + b"0" * 64 + b'","sha256":"'), "0" * 64),
        (head.replace(b'"sha256":"', b'"a":"","sha256":"'), found.decode()),  # another writer
        (head.replace(b"sha256", b"sha"), ""),
    ):
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
        assert carried_hash(path) == said
        if said == "0" * 64:
            with pytest.raises(DataError, match="its header has two hashes"):
                read_arrays(path)
        else:
            read_arrays(path)
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        carried_hash(path)


@pytest.mark.parametrize("keep", [0, 4, 9, 60, -1])
def test_a_truncated_file_is_one_clear_error(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    write_arrays(path, {"x": np.arange(100, dtype=np.float32)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="truncated"):
        read_arrays(path)


def test_a_header_that_claims_too_much_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(DataError):
        read_arrays(path)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": True})

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TdabenchError, match="No space left"):
        write_json(path, {"old": False})
    assert read_json(path) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(TdabenchError, match="file"):
        write_bytes(tmp_path / "file" / "x", b"")


def test_missing_and_malformed_json(tmp_path):
    with pytest.raises(DataError, match="missing"):
        read_json(tmp_path / "no.json")
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_json(tmp_path / "bad.json")


def test_many_json_files_are_read_as_each_one_is(tmp_path):
    """Also files that are valid JSON only together, or that would be read in each other's place."""
    texts = {
        "a": '{"key": "a", "v": [1, "é"]}', "b": '{"key": "other"}', "c": "", "e": "[1", "f": "2]",
        "d": '{"key": "d"}, {"key": "e"}', "g": "[" * 100_000, "h": "17", "i": '{"v": "\udcff"}',
        # three values in three files, each in another place than its own
        "x": '{"key": "x", "v": [{"key": "x"}', "y": "{}]}", "z": '{"key": "y"}, {"key": "z"}',
    }  # fmt: skip
    many = {f"n{n}": f'{{"key": "n{n}", "n": {n}}}' for n in range(200)}
    for name, text in {**texts, **many}.items():
        (tmp_path / f"{name}.json").write_bytes(text.encode("utf-8", "surrogateescape"))

    def alone(path):
        try:
            return read_json(path)
        except DataError as e:
            return e

    for names in ([*texts, "missing"], ["x", "y", "z"], ["a"], ["c"], [], [*many], ["e", *many]):
        paths = [tmp_path / f"{n}.json" for n in names]
        found, want = list(read_jsons(paths)), [alone(p) for p in paths]
        assert list(map(repr, found)) == list(map(repr, want))
        assert sum(isinstance(f, DataError) for f in found) == len(
            {*names} - {"a", "b", "h", *many}
        )


def test_fingerprints_ignore_key_order_only():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])
    assert canonical({"é": 1}) == '{"é":1}'


def test_our_bytes_are_the_librarys_and_never_change():
    from safetensors.numpy import load

    from tdabench.io import safetensors_bytes

    rng = np.random.default_rng(0)
    arrays = {
        f"a{i}": rng.integers(0, 2, (i, 3)).astype(t)
        for i, t in enumerate(["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "bool"])
    }
    data = safetensors_bytes(arrays, {"z": "1", "a": "é"})
    assert data == safetensors_bytes(dict(reversed(arrays.items())), {"a": "é", "z": "1"})
    for k, v in load(data).items():
        np.testing.assert_array_equal(v, arrays[k])
        assert v.dtype == arrays[k].dtype


def test_a_cache_that_cannot_be_written_gives_way_to_a_temporary_folder(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("TDABENCH_CACHE", raising=False)
    (tmp_path / "file").touch()  # no folder can be made below a file, not even by root
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cache_folder()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o077 == 0
    write_json(folder / "x.json", 1)
    assert cache_folder() == folder
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_a_fingerprint_is_recognised_in_any_order_of_fields():
    value = {"b": [1, {"z": 0.1, "a": "ä\ud800"}], "a": None}
    ordered = json.loads(json.dumps(value, sort_keys=True))
    for one in (value, ordered):
        assert has_fingerprint(one, fingerprint(value))
        assert not has_fingerprint(one, fingerprint({**value, "a": 0}))
        assert not has_fingerprint(one, None)


def test_the_start_of_a_file_is_read(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(range(256)) * 10)
    assert read_input(path, 3) == b"\x00\x01\x02"
    assert read_input(path, 1 << 30) == path.read_bytes()
    (tmp_path / "empty").touch()
    assert read_input(tmp_path / "empty", 10) == b""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DataError, match="not a regular file"):
        read_input(tmp_path / "fifo", 10)
    with pytest.raises(DataError, match="a folder"):
        read_input(tmp_path, 10)
