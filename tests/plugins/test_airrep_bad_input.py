"""Bad input to AirRep's commands: one line that names the thing, the reason and the remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tdabench_airrep.labels import Instance, Labels
from tdabench_airrep.teacher import Teacher

from tdabench.api import Corpus, Groups
from tdabench.cli import main


@pytest.fixture
def world(tiny_target, tiny_corpus, tiny_queries, tmp_path: Path) -> tuple[list[str], Path]:
    """(the options that name target and corpora, a folder for the rest)."""
    corpus = tmp_path / "corpus.jsonl"
    with corpus.open("w") as f:
        for split, examples in (("a", tiny_corpus), ("b", tiny_queries)):
            for e in examples:
                row = {k: getattr(e, k) for k in ("id", "prompt", "response", "task")}
                f.write(json.dumps({**row, "split": split}) + "\n")
    source = f"--target {tiny_target.folder} --corpus {corpus} --pool-split a --dev-split b"
    return source.split(), tmp_path


def _labels(path: Path, train: Corpus, dev: Corpus, change=lambda losses: losses) -> Path:
    rng = np.random.default_rng(0)
    instances = tuple(
        Instance(
            np.arange(len(dev)),
            Groups.random(4, len(train), 0.3, rng),
            change(rng.standard_normal((4, len(dev))).astype(np.float32)),
        )
        for _ in range(2)
    )
    meta = {"train": train.fingerprint, "dev": dev.fingerprint, "seconds": 1.0}
    Labels(instances, len(train), len(dev), meta).save(path)
    return path


def _train(source: list[str], folder: Path, *words: str) -> int:
    steps = "--dim 4 --steps 1 --subsets 4 --holdout 1 --probe 4 --every 1".split()
    return main(
        [
            "airrep",
            "train",
            *source,
            "--init",
            "target:base",
            *steps,
            "--out",
            str(folder / "out"),
            *words,
        ]
    )


def _one_line(capsys) -> str:
    """What was said, with progress before it: the last line, and no traceback anywhere."""
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    assert said.out == ""
    return said.err.strip().splitlines()[-1]


def test_labels_of_another_corpus(world, tiny_corpus, tiny_queries, capsys) -> None:
    source, folder = world
    path = _labels(folder / "l.safetensors", tiny_corpus[::-1], tiny_queries)
    assert _train(source, folder, "--labels", str(path)) == 2
    line = _one_line(capsys)
    assert "the labels were made on another train corpus" in line
    assert tiny_corpus[::-1].fingerprint in line


def test_subsets_that_touch_dev_examples(world, tiny_corpus, tiny_queries, capsys) -> None:
    source, folder = world
    twin = Corpus([*tiny_queries[:-1], tiny_corpus[7]], "b")
    corpus = folder / "twin.jsonl"
    rows = []
    for split, examples in (("a", tiny_corpus), ("b", twin)):
        for n, e in enumerate(examples):
            row = {"id": f"{split}{n}", "prompt": e.prompt, "response": e.response}
            rows.append(json.dumps({**row, "split": split}))
    corpus.write_text("\n".join(rows))
    from tdabench.api import read_jsonl

    train, dev = (read_jsonl(corpus, s, s) for s in ("a", "b"))
    path = _labels(folder / "l.safetensors", train, dev)
    words = [w if w != str(folder / "corpus.jsonl") else str(corpus) for w in source]
    assert _train(words, folder, "--labels", str(path)) == 2
    assert "the dev example 'b11' is in one of its own subsets" in _one_line(capsys)


def test_nan_losses_are_named_and_left_out(world, tiny_corpus, tiny_queries, capsys) -> None:
    def spoil(losses: np.ndarray) -> np.ndarray:
        losses[1, :3] = np.nan
        return losses

    source, folder = world
    path = _labels(folder / "l.safetensors", tiny_corpus, tiny_queries, spoil)
    assert _train(source, folder, "--labels", str(path)) == 0
    said = capsys.readouterr()
    assert "excluded: instance 0: 3 losses are NaN or infinite" in said.err
    record = json.loads((folder / "out" / "airrep.json").read_text())
    assert len(record["labels"]["excluded"]) == 2
    assert all(np.isfinite(r["loss"]) for r in record["curve"])


def test_labels_without_one_finite_loss(world, tiny_corpus, tiny_queries, capsys) -> None:
    source, folder = world
    path = _labels(folder / "l.safetensors", tiny_corpus, tiny_queries, lambda x: x * np.nan)
    assert _train(source, folder, "--labels", str(path)) == 2
    assert "have no dev example with two finite losses" in _one_line(capsys)


def test_missing_files(world, tiny_corpus, tiny_queries, capsys) -> None:
    source, folder = world
    assert _train(source, folder, "--labels", str(folder / "none.safetensors")) == 2
    assert "none.safetensors" in _one_line(capsys)
    assert _train(source, folder, "--teacher", str(folder / "none.safetensors")) == 2
    assert "none.safetensors" in _one_line(capsys)
    assert _train(source, folder) == 2
    assert "ranking needs labels. Pass --labels FILE" in _one_line(capsys)
    path = _labels(folder / "l.safetensors", tiny_corpus, tiny_queries)
    assert _train(source, folder, "--teacher", str(path), "--labels", str(path)) == 2
    assert "is not a teacher" in _one_line(capsys)
    path.write_bytes(path.read_bytes()[:-40])
    assert _train(source, folder, "--labels", str(path)) == 2
    assert str(path) in _one_line(capsys)


def test_a_teacher_of_another_corpus(world, tiny_corpus, tiny_queries, capsys) -> None:
    source, folder = world
    Teacher(np.zeros((12, 60), np.float32), {"train": "feedfacefeedface"}).save(folder / "t")
    words = ["--teacher", str(folder / "t"), "--steps", "0", "--distil-steps", "1"]
    assert _train(source, folder, *words) == 2
    assert "the teacher scored another train corpus (feedfacefeedface)" in _one_line(capsys)


def test_an_encoder_without_a_tokenizer(world, tmp_path, capsys) -> None:
    from transformers import BertConfig, BertModel

    source, folder = world
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(vocab_size=300, intermediate_size=8, **sizes)).save_pretrained(
        tmp_path / "bert"
    )
    capsys.readouterr()
    assert _train(source, folder, "--init", str(tmp_path / "bert"), "--steps", "0") == 2
    line = _one_line(capsys)
    assert "has no tokenizer (tokenizer.json is missing). Copy the tokenizer's files" in line


def test_missing_losses_and_touched_dev_examples_of_imported_labels(world, capsys) -> None:
    _, folder = world
    corpus, out = folder / "corpus.jsonl", folder / "labels.safetensors"
    rows = [
        {"id": "0-0", "select": [4, 2, 3], "dev": [0, 1], "dev_id": 0},
        {"id": "0-1", "select": [5, 6, 7], "dev": [0, 1], "dev_id": 0},
    ]
    losses = folder / "losses"
    losses.mkdir()
    record = {"pair_id": "0-0", "dev_id": 0, "losses": [1.0, 2.0], "mean_loss": 1.5}
    (losses / "loss-0-0.json").write_text(json.dumps(record))

    def call(*words: str) -> int:
        (folder / "index.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        command = f"airrep import-labels --index {folder}/index.jsonl --losses {losses}"
        return main(
            [*command.split(), "--corpus", str(corpus), "--split", "a", "--out", str(out), *words]
        )

    assert call() == 2
    assert "lacks the losses of 1 subsets, first '0-1'" in _one_line(capsys)
    assert call("--allow-missing") == 0
    assert json.loads(capsys.readouterr().out)["retrainings"] == 1
    rows[0]["select"] = [1, 2]
    assert call("--allow-missing") == 2
    assert "the dev example 't001' is in one of its own subsets" in _one_line(capsys)


def test_mistakes_exit_with_2_as_a_process(world) -> None:
    source, folder = world
    words = [
        "airrep",
        "train",
        *source,
        "--init",
        "nowhere",
        "--out",
        str(folder / "o"),
        "--steps",
        "0",
    ]
    code = f"import sys; from tdabench.cli import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no model or encoder at 'nowhere'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
