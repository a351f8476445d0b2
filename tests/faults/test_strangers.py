"""A stranger's model: what it lacks is not drawn at random, what it claims is not built, and what
hangs, crashes or eats memory does so in a process of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tdabench import limited as limited_module
from tdabench.errors import DataError, MissingExtra, TdabenchError, UsageError
from tdabench.io import read_json, safetensors_bytes, write_json
from tdabench.limited import limited
from tdabench.targets import source
from tdabench.targets.source import open_model
from tdabench.targets.target import Target, load_body, load_pretrained, save_weights
from tests.targets import test_source as sources
from tests.targets.test_source import write_adapter, write_gguf

model, saved = sources.model, sources.saved  # fixtures

BIG = '{"a": ' + "9" * 5000 + "}"
HERE = "stranger_work"  # tests/faults/stranger_work.py


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDABENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a process where the point is what is said, not where."""

    def here(function: str, arguments: dict[str, Any], *, what: str, **limits: Any) -> Any:
        name = function.partition(":")[2]
        try:
            return getattr(source, name)(**arguments)
        except Exception as e:
            raise limited_module._error(limited_module._told(e), what) from None

    monkeypatch.setattr(source, "limited", here)


# --------------------------------------------------------------------------- the process


def test_a_result_comes_back():
    assert limited(f"{HERE}:adds", {"a": 2, "b": 3}, what="x") == 5


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("sleeps", "x took longer than 3 s to read"),
        ("hoards", "x took more than the 0.50 GiB of memory allowed"),
        ("crashes", "x crashes its reader (SIGSEGV)"),
        ("quits", "x cannot be read: its reader ended with status 3"),
        ("panics", "x cannot be read: index out of bounds"),
    ],
)
def test_what_goes_wrong_there_is_one_line_here(function, said):
    limits = {"sleeps": {"seconds": 3.0}, "hoards": {"memory": 1 << 29}}.get(function, {})
    with pytest.raises(DataError) as e:
        limited(f"{HERE}:{function}", {}, what="x", **limits)  # type: ignore[arg-type]
    assert said in str(e.value)
    assert "\n" not in str(e.value)


def test_the_limits_can_be_set(monkeypatch):
    monkeypatch.setenv("TDABENCH_LOAD_SECONDS", "1")
    with pytest.raises(DataError, match="longer than 1 s"):
        limited(f"{HERE}:sleeps", {}, what="x")
    monkeypatch.setenv("TDABENCH_LOAD_SECONDS", "soon")
    with pytest.raises(UsageError, match="TDABENCH_LOAD_SECONDS"):
        limited(f"{HERE}:sleeps", {}, what="x")
    monkeypatch.setenv("TDABENCH_LOAD_SECONDS", "60")
    monkeypatch.setenv("TDABENCH_LOAD_MEMORY", "300M")
    with pytest.raises(DataError, match=r"0\.29 GiB"):
        limited(f"{HERE}:hoards", {}, what="x")


def test_errors_keep_their_kind():
    with pytest.raises(UsageError, match=r"it does not fit\. Give another"):
        limited(f"{HERE}:refuses", {"kind": "usage"}, what="x")
    with pytest.raises(MissingExtra) as e:
        limited(f"{HERE}:refuses", {"kind": "extra"}, what="x")
    assert e.value.extra == "peft"
    assert "pip install 'tdabench[peft]'" in str(e.value)


# --------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("without", ["ffn_up", "attn_q", "output_norm", "token_embd"])
def test_a_gguf_file_that_lacks_a_tensor_is_refused(
    without, in_this_process, tmp_path, tiny_target
):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "m.gguf", tiny_target.tokenizer, without=without)
    with pytest.raises(DataError, match=r"needs|lacks 1 of the model's weights"):
        open_model(str(tmp_path / "m.gguf"))
    assert not list((tmp_path / "cache").rglob("model.safetensors"))


def test_a_gguf_tensor_without_a_place_is_refused(in_this_process, tmp_path, tiny_target):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "m.gguf", tiny_target.tokenizer, extra="blk.0.attn_q.bias")
    with pytest.raises(DataError, match=r"no place for, first blk\.0\.attn_q\.bias"):
        open_model(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("turned", ["ffn_up", "attn_k", "token_embd"])
def test_a_gguf_tensor_of_another_shape_is_refused(turned, in_this_process, tmp_path, tiny_target):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "m.gguf", tiny_target.tokenizer, turned=turned)
    with pytest.raises(DataError, match=r"shapes them otherwise|cannot be read as GGUF"):
        open_model(str(tmp_path / "m.gguf"))


def test_a_gguf_file_that_claims_more_than_it_holds_builds_nothing(
    in_this_process, tmp_path, tiny_target
):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "m.gguf", tiny_target.tokenizer, layers=1_000_000)
    with pytest.raises(DataError, match="needs 1,000,000 layers"):
        open_model(str(tmp_path / "m.gguf"))


def test_a_gguf_file_of_a_few_bytes_builds_nothing(tmp_path):
    gguf = pytest.importorskip("gguf")
    w = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    assert (tmp_path / "m.gguf").stat().st_size < 100
    with pytest.raises(DataError, match="0 tensors, but its configuration needs 32 layers"):
        open_model(str(tmp_path / "m.gguf"))


# --------------------------------------------------------------------------- folders


def test_a_configuration_that_asks_for_more_is_refused_before_it_is_built(model):
    config = read_json(model / "config.json")
    write_json(model / "config.json", {**config, "intermediate_size": 48 << 20})
    with pytest.raises(DataError, match="its configuration needs"):
        load_pretrained(model)
    write_json(model / "config.json", {**config, "num_hidden_layers": 10**7, "layer_types": None})
    with pytest.raises(DataError, match="needs 10,000,000 layers"):
        open_model(str(model))


def test_weights_without_a_place_are_refused(model):
    config = read_json(model / "config.json")
    write_json(model / "config.json", {**config, "num_hidden_layers": 1, "layer_types": None})
    with pytest.raises(DataError, match="no place for"):
        load_pretrained(model)


@pytest.mark.parametrize("what", ["lacks", "holds more", "another shape"])
def test_a_checkpoint_file_that_does_not_fit_is_refused(what, tiny_target, tmp_path):
    folder = shutil.copytree(tiny_target.folder, tmp_path / "target")
    target = Target("t", folder, {"base": "base.safetensors"}, max_length=128)
    built = target.fresh_model()
    state = {k: v.numpy() for k, v in built.state_dict().items()}
    name = "model.layers.1.mlp.up_proj.weight"
    if what == "lacks":
        del state[name]
        state["padding"] = np.zeros(1 << 16, np.float32)
    elif what == "holds more":
        state["model.layers.7.mlp.up_proj.weight"] = state[name]
    else:
        state[name] = np.ascontiguousarray(state[name].T)
    (folder / "base.safetensors").write_bytes(safetensors_bytes(state, {"format": "pt"}))
    with pytest.raises(DataError, match="does not fit the model's configuration"):
        target.fresh_model()


def test_an_encoder_that_lacks_weights_is_refused(tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2,
             "intermediate_size": 24, "max_position_embeddings": 16}  # fmt: skip
    BertModel(BertConfig(**sizes, num_hidden_layers=2)).save_pretrained(tmp_path)
    load_body(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {**config, "num_hidden_layers": 1})
    with pytest.raises(DataError, match="no place for"):
        load_body(tmp_path)
    write_json(tmp_path / "config.json", {**config, "num_hidden_layers": 3})
    with pytest.raises(DataError, match=r"needs|lacks"):
        load_body(tmp_path)


# --------------------------------------------------------------------------- tokenizers, adapters


def test_a_tokenizer_that_explodes_is_refused_in_time(model, monkeypatch):
    monkeypatch.setenv("TDABENCH_LOAD_SECONDS", "20")
    tokenizer = read_json(model / "tokenizer.json")
    bomb = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 60}] * 6
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": bomb}
    write_json(model / "tokenizer.json", tokenizer)
    monkeypatch.setenv("TDABENCH_LOAD_MEMORY", "3G")
    with pytest.raises(DataError, match=r"took|cannot be read|crashes"):
        open_model(str(model))


def test_a_chat_template_that_loops_is_refused_in_time(model, monkeypatch):
    monkeypatch.setenv("TDABENCH_LOAD_SECONDS", "10")
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}x"
    config = read_json(model / "tokenizer_config.json")
    config["chat_template"] = loops + "{% endfor %}" * 3
    write_json(model / "tokenizer_config.json", config)
    with pytest.raises(DataError, match="took longer than 10 s"):
        open_model(str(model))


@pytest.mark.parametrize(
    "wrong", [[], "x", 3, None, {"r": 0}, {"r": -1}, {"r": "four"}, {"lora_alpha": []},
              {"rank_pattern": []}, {"rank_pattern": {"(": 4}}, {"alpha_pattern": {"q_proj": "x"}},
              {"base_model_name_or_path": 3}],
)  # fmt: skip
def test_an_adapter_configuration_of_the_wrong_shape_is_one_line(
    wrong, in_this_process, saved, tmp_path
):
    write_adapter(tmp_path / "adapter", saved)
    path = tmp_path / "adapter" / "adapter_config.json"
    config = {**read_json(path), **wrong} if isinstance(wrong, dict) else wrong
    path.write_text(json.dumps(config))
    with pytest.raises(TdabenchError) as e:
        open_model(str(saved), {"tuned": str(tmp_path / "adapter")})
    assert "Error" not in str(e.value)  # the name of an exception is no reason


def test_a_rank_pattern_that_explodes_is_refused_in_time(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("TDABENCH_LOAD_SECONDS", "10")
    write_adapter(tmp_path / "adapter", saved)
    path = tmp_path / "adapter" / "adapter_config.json"
    write_json(path, {**read_json(path), "rank_pattern": {"(([a-z0-9_.])+)+!": 4}})
    with pytest.raises(DataError, match=r"took longer than 10 s"):
        open_model(str(saved), {"tuned": str(tmp_path / "adapter")})


@pytest.mark.parametrize("wrong", [[], "x", {"weight_map": []}, {"weight_map": {"a": 3}}, {}])
def test_an_index_of_the_wrong_shape_is_one_line(wrong, in_this_process, model):
    (model / "model.safetensors.index.json").write_text(json.dumps(wrong))
    if wrong == {}:
        return
    with pytest.raises(TdabenchError, match=r"model\.safetensors\.index\.json"):
        open_model(str(model))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("wrong", ["[]", "3", '"x"', "null", "[" * 5000, BIG])
def test_a_models_json_of_the_wrong_shape_is_one_line(file, wrong, in_this_process, model):
    (model / file).write_text(wrong)
    with pytest.raises(TdabenchError) as e:
        open_model(str(model))
    assert "\n" not in str(e.value)


def test_weights_without_an_end_are_refused(in_this_process, model):
    for file in model.glob("*.safetensors"):
        file.unlink()
        file.symlink_to("/dev/zero")
    with pytest.raises(TdabenchError):
        open_model(str(model))


def test_saved_weights_load(tiny_target, tmp_path):
    """The checks refuse nothing that is whole."""
    folder = shutil.copytree(tiny_target.folder, tmp_path / "target")
    target = Target("t", folder, {"base": "base.safetensors"}, max_length=128)
    save_weights(target.fresh_model(), folder / "base.safetensors")
    target.fresh_model()
