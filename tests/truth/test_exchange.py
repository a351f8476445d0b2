"""Truths of other projects: each layout written here as its project writes it, and read back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tdabench.cli import main
from tdabench.data.examples import Corpus, Example
from tdabench.errors import DataError, TdabenchError, UsageError
from tdabench.groups import Groups
from tdabench.truth.exchange import import_bank, import_lds, import_truth, read_groups
from tdabench.truth.numbers import read_named, read_one
from tdabench.truth.store import Truth


def corpus(n: int, name: str = "e", ids: list[str] | None = None) -> Corpus:
    ids = ids or [f"{name}{i}" for i in range(n)]
    return Corpus([Example(id, "", f"text of {id}") for id in ids], name)


def halves(groups: int, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    masks = np.zeros((groups, n), dtype=np.int8)
    for row in masks:
        row[rng.choice(n, n // 2, replace=False)] = 1
    return masks


# --------------------------------------------------------------------------- masks and losses


def test_arrays_of_the_size_and_types_of_kronfluences_truth(tmp_path):
    """int8 masks 100 x 4,656 and float32 summed losses 100 x 481, pickled by torch.save."""
    rng = np.random.default_rng(0)
    masks = halves(100, 4656)
    losses = rng.uniform(1082, 2046, (100, 481)).astype(np.float32)
    torch.save(masks, tmp_path / "masks.pt")
    torch.save(losses, tmp_path / "losses.pt")
    train, queries = corpus(4656), corpus(481, "q")
    truth = import_truth([tmp_path / "losses.pt"], train, queries, masks=tmp_path / "masks.pt")
    assert truth.losses.shape == (100, 1, 481)
    assert np.array_equal(truth.losses[:, 0], losses)
    assert np.array_equal(truth.groups.membership(np.int8).toarray(), masks)
    assert truth.query_ids == tuple(queries.ids)
    assert truth.plan["train"] == train.fingerprint
    truth.save(tmp_path / "t.safetensors")
    assert np.array_equal(Truth.load(tmp_path / "t.safetensors").losses, truth.losses)


WRITERS = {
    ".npy": lambda path, a: np.save(path, a),
    ".npz": lambda path, a: np.savez_compressed(path, a=a),
    ".safetensors": lambda path, a: __import__("safetensors.numpy").numpy.save_file({"a": a}, path),
    ".pt": lambda path, a: torch.save(torch.tensor(a), path),
    ".pth": lambda path, a: torch.save({"a": a}, path),
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("kind", ["bool", "int64", "float64"])
def test_every_format_and_type_of_masks(suffix, kind, tmp_path):
    masks = halves(6, 20)
    losses = np.random.default_rng(1).normal(size=(6, 4))
    WRITERS[suffix](tmp_path / f"m{suffix}", masks.astype(kind))
    WRITERS[suffix](tmp_path / f"l{suffix}", losses)
    truth = import_truth(
        [tmp_path / f"l{suffix}"], corpus(20), corpus(4, "q"), masks=tmp_path / f"m{suffix}"
    )
    assert np.array_equal(truth.groups.membership(np.int8).toarray(), masks)
    assert np.allclose(truth.losses[:, 0], losses)


def test_margins_change_sign_and_left_out_masks_are_complements(tmp_path):
    masks, margins = halves(5, 10), np.arange(15.0).reshape(5, 3)
    np.save(tmp_path / "m.npy", 1 - masks)
    np.save(tmp_path / "v.npy", margins)
    truth = import_truth(
        [tmp_path / "v.npy"], corpus(10), corpus(3, "q"),
        masks=tmp_path / "m.npy", values="margin", left_out=True,
    )  # fmt: skip
    assert np.array_equal(truth.values, margins.T)  # the reference is -loss: higher is better
    assert np.array_equal(truth.groups.membership(np.int8).toarray(), masks)


def test_indices_lists_seeds_and_named_arrays(tmp_path):
    masks = halves(5, 10)
    lists = [np.flatnonzero(row).tolist() for row in masks]
    np.save(tmp_path / "i.npy", np.array(lists))
    (tmp_path / "i.json").write_text(json.dumps(lists))
    (tmp_path / "i.yaml").write_text(yaml.safe_dump(lists))  # as quanda writes lds_subsets.yaml
    for name in ("i.npy", "i.json", "i.yaml"):
        found = read_groups(tmp_path / name, 10)
        assert np.array_equal(found.membership(np.int8).toarray(), masks)
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 5, 3))
    np.savez(tmp_path / "v.npz", one=one, two=two)
    with pytest.raises(UsageError, match=r"holds 2 arrays: one, two\. Name one: .*v.npz#one"):
        read_one(tmp_path / "v.npz")
    sources = [Path(f"{tmp_path}/v.npz#{name}") for name in ("one", "two")]
    truth = import_truth(sources, corpus(10), corpus(3, "q"), masks=tmp_path / "i.json")
    assert truth.n_seeds == 2
    assert np.allclose(truth.values, -(one + two).T / 2)
    np.save(tmp_path / "seeds.npy", np.stack([one, two], axis=1))
    again = import_truth(
        [tmp_path / "seeds.npy"], corpus(10), corpus(3, "q"), masks=tmp_path / "i.json"
    )
    assert np.array_equal(again.losses, truth.losses)


def test_what_does_not_fit_is_named(tmp_path):
    np.save(tmp_path / "m.npy", halves(5, 10))
    values = np.zeros((5, 3))
    np.save(tmp_path / "v.npy", values)
    train, queries = corpus(10), corpus(3, "q")

    def refused(match: str, **more):
        with pytest.raises(TdabenchError, match=match):
            import_truth(
                [more.pop("source", tmp_path / "v.npy")], more.pop("train", train),
                more.pop("queries", queries), **{"masks": tmp_path / "m.npy", **more},
            )  # fmt: skip

    refused("masks over 10 examples, the corpus has 11", train=corpus(11))
    refused("shape 5 x 3 for 5 groups and 4 queries", queries=corpus(4, "q"))
    refused("nothing says which examples each group was trained on", masks=None)
    refused("unknown kind of values", values="accuracy")
    np.save(tmp_path / "t.npy", values.T)
    refused("transposed", source=tmp_path / "t.npy")
    values[1, 2] = np.nan
    np.save(tmp_path / "n.npy", values)
    refused("1 values are NaN or infinite", source=tmp_path / "n.npy")
    np.save(tmp_path / "f.npy", halves(5, 10) * 0.5)
    refused("fractions, which are neither masks nor indices", masks=tmp_path / "f.npy")
    np.save(tmp_path / "far.npy", np.array([[0, 99]] * 5))
    refused("group 0: a group names an example outside the corpus", masks=tmp_path / "far.npy")
    refused("is missing", source=tmp_path / "nowhere.npy")
    refused("not a truth that can be imported", source=tmp_path)


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['CANARY']}",)


@pytest.mark.parametrize("where", ["alone", "in a dictionary", "in an array", "numpy"])
def test_a_hostile_torch_or_numpy_file_runs_nothing(where, tmp_path, monkeypatch):
    canary = tmp_path / "ran"
    monkeypatch.setenv("CANARY", str(canary))
    array = np.array([Evil(), 1], dtype=object)
    path = tmp_path / ("x.npy" if where == "numpy" else "x.pt")
    if where == "numpy":
        np.save(path, array, allow_pickle=True)
    else:
        inside = {"alone": Evil(), "in a dictionary": {"a": torch.ones(2), "b": Evil()}}
        torch.save(inside.get(where, array), path)
    with pytest.raises(DataError, match=r"system|not numbers|holds objects|arrays of numbers: \w"):
        read_named(path)
    assert not canary.exists()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 400), st.integers(1, 255))
def test_a_flipped_byte_is_an_error_or_other_numbers(place, mask):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        np.savez(path, a=np.arange(40.0).reshape(5, 8))
        data = bytearray(path.read_bytes())
        data[place % len(data)] ^= mask
        path.write_bytes(data)
        try:
            found = read_named(path)
        except TdabenchError:
            return
        assert all(a.dtype.kind in "biuf" for a in found.values())


# --------------------------------------------------------------------------- STRIDE


def stride_lines(pool: list[int], groups: int = 6, queries: int = 4, seed: int = 0) -> list[dict]:
    """Lines as on STRIDE's card: a `_meta` header, then pool-local and corpus-wide indices."""
    rng = np.random.default_rng(seed)
    lines = [{"_meta": {"pool_indices": pool, "n_subsets": groups, "tag": "d12"}}]
    for _ in range(groups):
        local = rng.choice(len(pool), round(0.3 * len(pool)), replace=False).tolist()
        losses = rng.normal(3, 0.1, queries).round(4).tolist()
        named = [pool[i] for i in local]
        lines.append({"train_subset": local, "train_subset_global": named, "test_loss": losses})
    return lines


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_strides_indices_are_ids_of_the_pool(tmp_path):
    pool = [907, 12, 55_031, 4, 88, 1003, 7, 300, 301, 9999]
    lines = stride_lines(pool)
    path = write(tmp_path / "lds_d12.jsonl", lines)
    # The user's pool may be in another order, and hold documents that no group names.
    ids = [str(i) for i in sorted([*pool, 5, 6])]
    train = corpus(len(ids), ids=ids)
    truth = import_lds(path, train, corpus(4, "q"))
    for group, line in zip(truth.groups, lines[1:]):
        assert {train[int(i)].id for i in group} == {str(i) for i in line["train_subset_global"]}
    assert np.allclose(truth.losses[:, 0], [line["test_loss"] for line in lines[1:]])


def test_a_pool_that_lacks_documents_says_which(tmp_path):
    pool = [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    path = write(tmp_path / "lds.jsonl", stride_lines(pool))
    named = {i for line in stride_lines(pool)[1:] for i in line["train_subset_global"]}
    some = [str(i) for i in pool if i not in (min(named), max(named))]
    with pytest.raises(DataError, match=rf"lacks 2 of them as ids, first {min(named)}\b"):
        import_lds(path, corpus(len(some), ids=some), corpus(4, "q"))
    with pytest.raises(DataError, match=f"lacks {len(named)} of them"):
        import_lds(path, corpus(10), corpus(4, "q"))
    lines = stride_lines(pool)
    lines[2]["train_subset_global"] = lines[2]["train_subset_global"][:-1]
    with pytest.raises(DataError, match="line 3: not a train_subset"):
        import_lds(write(path, lines), corpus(10, ids=[str(i) for i in pool]), corpus(4, "q"))


# --------------------------------------------------------------------------- other projects


def test_dattris_download(tmp_path):
    """indices_lds.pt [subset, size] and target_values_lds.pt [subset, test]: the negative loss."""
    folder = tmp_path / "benchmark" / "wikitext2_gpt2"
    (folder / "lds").mkdir(parents=True)
    indices = torch.stack([torch.randperm(20)[:10] for _ in range(6)])
    values = torch.randn(6, 3)
    torch.save(indices, folder / "lds" / "indices_lds.pt")
    torch.save(values, folder / "lds" / "target_values_lds.pt")
    truth = import_truth([folder], corpus(20), corpus(3, "q"))
    assert np.allclose(truth.values, values.T)
    assert [g.tolist() for g in truth.groups] == [sorted(row.tolist()) for row in indices]


def test_bergsons_bank(tmp_path):
    """subsets.json names what was left out; the cache of losses is a dictionary of tensors."""
    banks = []
    left_out = [[0, 1, 2], [5, 9, 3], [7, 8, 6]]
    for seed in range(2):
        bank = tmp_path / f"run{seed}"
        (bank / "query_loss_cache").mkdir(parents=True)
        (bank / "subsets.json").write_text(json.dumps(left_out))
        blob = {"baseline": 0.0, "baseline_per_doc": torch.zeros(4),
                "per_subset": torch.randn(3, 4)}  # fmt: skip
        torch.save(blob, bank / "query_loss_cache" / "losses_0123456789abcdef.pt")
        banks.append((bank, blob["per_subset"]))
    truth = import_truth([b for b, _ in banks], corpus(10), corpus(4, "q"))
    assert truth.n_seeds == 2
    assert np.allclose(truth.losses, torch.stack([x for _, x in banks], dim=1))
    assert [sorted(set(range(10)) - set(g.tolist())) for g in truth.groups] == [
        sorted(x) for x in left_out
    ]
    (banks[0][0] / "query_loss_cache" / "losses_f.pt").write_bytes(b"")
    with pytest.raises(UsageError, match="losses of 2 sets of queries"):
        import_truth([banks[0][0]], corpus(10), corpus(4, "q"))


def airrep_bank(folder: Path, n: int = 30) -> tuple[Path, Path, list[dict]]:
    """index.jsonl and losses/loss-<id>.json, as AirRep's scripts 01 and 02 write them."""
    rng = np.random.default_rng(0)
    rows = []
    (folder / "losses").mkdir(parents=True)
    for split in range(2):
        order = rng.permutation(n)
        dev = sorted(order[:5].tolist())
        for k in range(4):
            select = sorted(rng.choice(order[5:], 10, replace=False).tolist())
            row = {"id": f"{split}-{k}", "select": select, "dev": dev, "dev_id": split}
            rows.append(row)
            losses = rng.normal(2, 0.3, 5).round(4).tolist()
            found = {"pair_id": row["id"], "dev_id": split, "losses": losses,
                     "mean_loss": float(np.mean(losses))}  # fmt: skip
            (folder / "losses" / f"loss-{row['id']}.json").write_text(json.dumps(found))
    return write(folder / "index.jsonl", rows), folder / "losses", rows


def test_airreps_training_data_is_a_truth_for_each_split(tmp_path):
    index, losses, rows = airrep_bank(tmp_path)
    data = corpus(30)
    truth, train, queries = import_bank(losses, index, data, 1)
    assert len(train) == 25
    assert queries.ids == [data.ids[i] for i in rows[4]["dev"]]
    assert not set(train.ids) & set(queries.ids)
    for group, row in zip(truth.groups, rows[4:]):
        assert [train.ids[i] for i in group] == [data.ids[i] for i in row["select"]]
    first = json.loads((losses / "loss-1-0.json").read_text())["losses"]
    assert np.allclose(truth.losses[0, 0], first)
    with pytest.raises(UsageError, match=r"no subsets of the split 7\. It has: 0, 1"):
        import_bank(losses, index, data, 7)


def test_the_command_imports_arrays_and_banks(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, n in (("train", 30), ("test", 4)):
        write(tmp_path / f"{name}.jsonl", [{"id": f"{name}{i}", "text": "a b"} for i in range(n)])
    np.save("m.npy", halves(6, 30))
    np.save("v.npy", np.zeros((6, 4)))
    files = ["--train", "train.jsonl", "--queries", "test.jsonl", "--out", "t.safetensors"]
    assert main(["truth", "import", "v.npy", "--masks", "m.npy", *files]) == 0
    assert "6 groups, 1 seeds, 4 queries" in capsys.readouterr().out
    assert main(["truth", "import", "v.npy", *files]) == 2
    assert "--masks FILE" in capsys.readouterr().err
    airrep_bank(tmp_path / "bank")
    bank = ["truth", "import", "bank/losses", "--masks", "bank/index.jsonl", "--train",
            "train.jsonl", "--out", "b.safetensors"]  # fmt: skip
    assert main(bank) == 2
    assert "--corpora DIR" in capsys.readouterr().err
    assert main([*bank, "--split", "0", "--corpora", "split0"]) == 0
    truth = Truth.load(tmp_path / "b.safetensors")
    assert len(truth.query_ids) == 5
    lines = (tmp_path / "split0" / "train.jsonl").read_text().splitlines()
    assert len(lines) == truth.groups.n_train == 25
    assert main([*bank, "--split", "0", "--corpora", "split0"]) == 2
    assert isinstance(truth.groups, Groups)
