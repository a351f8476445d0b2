"""Converts a model source (hub, folder, GGUF file or adapter) to a target's folder in one layout.

The folder is in the cache and consists of links if the source already has the Hugging Face
layout:

    config.json, tokenizer files     of the model
    base/, tuned/, …                 one folder per checkpoint: config.json and safetensors

A GGUF file is dequantised once to float32; an adapter is merged into its base once.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tdabench.data.hub import Fetched, find
from tdabench.errors import DataError, MissingExtra, UsageError, first_line, notice
from tdabench.io import cache_folder, fingerprint, read_json, seal, sha256_file, write_json
from tdabench.limited import allowed_memory, limited
from tdabench.targets.forward import context_length, probe_ids
from tdabench.targets.lora import block_of
from tdabench.targets.sizes import check_folder, check_room
from tdabench.targets.target import (
    TOKENIZER_FILES,
    Target,
    check_report,
    load_pretrained,
    no_bars,
    read_weights,
    tied_head,
)

CONFIG_FILES = (
    "config.json", "generation_config.json", *TOKENIZER_FILES, "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
ABANDONED = 3600.0  # seconds after which a conversion that wrote nothing is abandoned
MERGE_VERSION = 2  # raise it if merging changes: merged adapters are kept on disk
CHECKPOINT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Opened:
    """A target's folder, its checkpoints, and every source with its revision."""

    folder: Path
    checkpoints: Mapping[str, str]
    pinned: Mapping[str, str]
    config: Mapping[str, Any]
    chat: bool = False  # whether the tokenizer has a chat template that works

    @property
    def context_length(self) -> int | None:
        """Number of positions that the model reads, if its configuration states it."""
        return context_length(self.config)


def open_model(
    source: str,
    checkpoints: Mapping[str, str] | None = None,
    *,
    near: Path = Path("."),
    data_dir: Path | None = None,
) -> Opened:
    """Opens the model that `source` names, and further `checkpoints` of it.

    A source is a hub repository, a folder, a .gguf file (or a folder with one), or a PEFT adapter;
    an adapter as the model includes its base. Raises UsageError or DataError in one line.
    """
    sources: dict[str, str] = {"base": source, **(checkpoints or {})}
    places = {}
    for name, text in sources.items():
        if not CHECKPOINT.fullmatch(name):
            raise UsageError(f"{name!r} is not a valid name for a checkpoint")
        places[name] = _locate(text, near, data_dir)
    model = places["base"]
    if _is_adapter(model.path):
        # The adapted model is studied; the model that it was trained from is the base.
        under = _locate(_base_of(model.path), model.path, data_dir)
        return _assemble({"base": under, "adapted": model, **_without_base(places)})
    return _assemble(places)


def _without_base(places: Mapping[str, Fetched]) -> dict[str, Fetched]:
    return {k: v for k, v in places.items() if k != "base"}


def _locate(source: str, near: Path, data_dir: Path | None) -> Fetched:
    found = find(source, near=near, data_dir=data_dir)
    path = found.path
    if path.is_file() and path.suffix != ".gguf":
        raise DataError(
            f"{path} is a file, not a model", "Give its folder (config.json beside the weights)"
        )
    if path.is_dir() and not (path / "config.json").exists() and not _is_adapter(path):
        packed = sorted(path.glob("*.gguf"))
        if len(packed) == 1:
            return Fetched(packed[0], found.pinned)
        if packed:
            raise UsageError(
                f"{path} holds {len(packed)} GGUF files", f"Name one: {packed[0].name}, …"
            )
        raise DataError(
            f"{path} is not a model: it has no config.json",
            "Give a folder in the Hugging Face layout, a .gguf file or a PEFT adapter",
        )
    return found


def _assemble(places: Mapping[str, Fetched]) -> Opened:
    key = fingerprint([1, *([k, str(v.path), _stamp(v.path)] for k, v in sorted(places.items()))])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", places["base"].path.stem)[:40]
    folder = cache_folder() / "targets" / f"{name}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    base = places["base"].path
    plain = base
    if base.suffix == ".gguf":
        _once(folder / "base", lambda to: unpack_gguf(base, to))
        plain = folder / "base"
    else:
        _check_weights(base)
        _link_model(base, folder / "base")
    for file in CONFIG_FILES:
        if (plain / file).exists():
            _link(plain / file, folder / file)
    if not any((folder / f).exists() for f in (*TOKENIZER_FILES, "tokenizer_config.json")):
        raise DataError(
            f"{base} has no tokenizer", "Copy tokenizer.json and tokenizer_config.json into it"
        )
    for name, found in places.items():
        if name == "base":
            continue
        if _is_adapter(found.path):
            _once(folder / name, lambda to, a=found.path: _merge(folder / "base", a, to))  # type: ignore[misc]
        elif found.path.suffix == ".gguf":
            _once(folder / name, lambda to, a=found.path: unpack_gguf(a, to))  # type: ignore[misc]
        else:
            _check_weights(found.path)
            _link_model(found.path, folder / name)
    checkpoints = {name: name for name in places}
    about = vet(folder, checkpoints)
    return Opened(
        folder,
        checkpoints,
        {name: f.pinned for name, f in places.items()},
        read_json(folder / "config.json"),
        bool(about["chat"]),
    )


def _stamp(path: Path) -> list[Any]:
    """Returns a stamp that changes when a converted source changes; links need none."""
    if path.suffix == ".gguf":
        return [path.stat().st_size, path.stat().st_mtime_ns]
    if _is_adapter(path):
        weights = path / "adapter_model.safetensors"
        files = [p for p in (weights, path / "adapter_config.json") if p.exists()]
        return [MERGE_VERSION, *(p.stat().st_mtime_ns for p in files)]
    return []


def _link(source: Path, place: Path) -> None:
    """Makes `place` a link to `source`, replacing an older link."""
    source = source.absolute()
    if place.is_symlink() and os.readlink(place) == str(source):
        return
    temporary = place.with_name(f".{place.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(source, target_is_directory=source.is_dir())
    os.replace(temporary, place)


def _link_model(source: Path, place: Path) -> None:
    """Links the folder of a model, or the base checkpoint of a target's folder.

    The folder of a target in a suite has weights of one checkpoint per file (base.safetensors).
    """
    weights = source / "base.safetensors"
    if any(source.glob("model*.safetensors")) or not weights.is_file():
        _link(source, place)
        return
    if place.is_symlink():
        place.unlink()
    place.mkdir(exist_ok=True)
    for file in CONFIG_FILES:
        if (source / file).exists():
            _link(source / file, place / file)
    _link(weights, place / "model.safetensors")


def _once(place: Path, make: Callable[[Path], None]) -> None:
    """Makes the folder `place`, completely or not at all, unless it exists."""
    if (place / "config.json").exists():
        return
    for left in place.parent.glob(f".{place.name}-*"):  # by a process that was killed
        if (
            datetime.now(UTC).timestamp() - left.stat().st_mtime > ABANDONED
        ):  # another machine's may be at work
            shutil.rmtree(left, ignore_errors=True)
    temporary = place.with_name(f".{place.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        make(temporary)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(temporary, place)
    except BaseException as e:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(e, OSError):
            if (place / "config.json").exists():
                return  # another process made it meanwhile
            raise DataError(f"cannot write {place}: {e.strerror}", "Free some space") from e
        raise


def _check_weights(folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin"))
        raise DataError(
            f"{folder} has no safetensors weights"
            + (", only a pickle (pytorch_model.bin), which is not read" if pickled else ""),
            "Save it again with save_pretrained, or give a revision with safetensors",
        )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        held = read_json(index)
        named = held.get("weight_map") if isinstance(held, dict) else None
        if not isinstance(named, dict) or not all(isinstance(v, str) for v in named.values()):
            raise DataError(f"{index} is not an index of weights", "Fetch it again")
        parts = set(named.values())
        missing = sorted(p for p in parts if not (folder / p).exists())
        if missing:
            raise DataError(
                f"{folder} lacks {len(missing)} of {len(parts)} weight files, first {missing[0]}",
                "Did the download finish?",
            )


# --------------------------------------------------------------------------- vetting

VET_SECONDS = 300.0
MOST_HASHED_FILES, MOST_HASHED_BYTES = 200, 256 << 20  # a fraction of a second
# Texts on which a splitting expression with nested repeats takes forever, besides plain text.
PROBES = (
    "Which of the two was it, then? It's 3.14 (or 42)!", "a" * 4000, " " * 4000, "1" * 4000,
    "ab " * 1500 + "!", "aA" * 2000 + "!", "\n" * 1000 + "x", "é" * 1000 + "?", "-" * 3000 + "x",
)  # fmt: skip


def vet(folder: Path, checkpoints: Mapping[str, str]) -> dict[str, Any]:
    """Checks a target's folder before anything of it is loaded in this process.

    Returns {"chat": whether its tokenizer has a chat template}. Raises DataError in one line when a
    checkpoint lacks weights, or the tokenizer or template fails or takes too long. A verdict is
    kept for files of the same names, sizes and times, and for a copy of all their contents.
    """
    places = {name: str(folder / file) for name, file in checkpoints.items()}
    stamp = [1, str(folder.resolve()), sorted(places.items()), _stamps(folder, *places.values())]
    keys = [fingerprint(stamp)]
    if (about := _kept_verdict(keys[0])) is not None:
        return about
    if (contents := _contents(folder, places)) is not None:
        keys.append(fingerprint(contents))
        if (about := _kept_verdict(keys[1])) is not None:
            return about
    about = limited(
        "tdabench.targets.source:_vetted",
        {"folder": str(folder), "places": places},
        what=f"the model {folder}",
        seconds=VET_SECONDS,
    )
    for key in keys:
        write_json(_verdict_path(key), {**about, "key": key, "seal": seal({**about, "key": key})})
    return dict(about)


def _verdict_path(key: str) -> Path:
    return cache_folder() / "vetted" / f"{key}.json"


def _kept_verdict(key: str) -> dict[str, Any] | None:
    """Returns the verdict that was kept under `key`, if this user wrote it for this key."""
    try:
        about = read_json(_verdict_path(key))
        if about.pop("seal") == seal(about) and about.pop("key") == key:
            return dict(about)
    except (DataError, AttributeError, KeyError):
        pass
    return None


def _contents(folder: Path, places: Mapping[str, str]) -> list[Any] | None:
    """Returns the sha256 of all files of a model and its checkpoints, by their names in them.

    None if they are larger than what is hashed in less time than vetting takes, or partly in
    another folder.
    """
    roots = {"": folder, **{name: Path(place) for name, place in places.items()}}
    found = {
        (name, path.relative_to(root).as_posix()): path
        for name, root in roots.items()
        for path in (sorted(root.rglob("*")) if root.is_dir() else [root])
    }
    elsewhere = {path for path in found.values() if path.is_symlink() and path.is_dir()}
    if elsewhere - set(roots.values()):
        return None
    files = {key: path for key, path in found.items() if path.is_file()}
    if len(files) > MOST_HASHED_FILES:
        return None
    if sum(path.stat().st_size for path in files.values()) > MOST_HASHED_BYTES:
        return None
    libraries = [version(name) for name in ("tdabench", "transformers", "tokenizers")]
    hashes: dict[Path, str] = {}
    for path in files.values():
        if path not in hashes:
            hashes[path] = sha256_file(path)
    return [2, libraries, sorted((*key, hashes[path]) for key, path in files.items())]


def _stamps(*places: Path | str) -> list[Any]:
    """What tells files from a later state of them: name, size and time of change."""
    out = []
    for place in places:
        path = Path(place)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                about = file.stat()
                out.append([str(file), about.st_size, about.st_mtime_ns])
    return out


def _vetted(folder: str, places: Mapping[str, str]) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise DataError(
            f"cannot load a causal language model from {folder}: {reason}", "Check its config.json"
        ) from e
    for place in places.values():
        check_folder(Path(place), config)
    target = Target("model", Path(folder), template="plain")
    tokenizer = target.tokenizer
    tokenizer(list(PROBES), add_special_tokens=False)
    chat = bool(getattr(tokenizer, "chat_template", None))
    if chat:
        turns = [{"role": "user", "content": "a"}]
        try:
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception:
            chat = False  # it says so where it is asked for
    return {"chat": chat}


# --------------------------------------------------------------------------- GGUF


def unpack_gguf(file: Path, folder: Path) -> None:
    """Writes the model and tokenizer of a GGUF file into `folder`, dequantised to float32.

    Says so on stderr, as it may take minutes.

    In a process with a limit on time and memory. Raises DataError for a file that lacks a tensor,
    holds one that the model has no place for, or cannot be read.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as e:
        raise MissingExtra(
            "gguf, which reads GGUF files,", "smol", "Install it with: pip install gguf"
        ) from e
    size = f"{file.stat().st_size / 1e6:,.0f} MB"
    notice(f"dequantising {file.name} ({size}) to float32: takes minutes, once")
    start, told = time.monotonic(), 0.0

    def on_wait(seconds: float) -> None:
        nonlocal told
        if seconds - told >= 15:
            told = seconds
            notice(f"dequantising {file.name}: {seconds:.0f} s")

    limited(
        "tdabench.targets.source:_unpack_gguf",
        {"file": str(file), "folder": str(folder), "memory": allowed_memory()},
        what=str(file),
        on_wait=on_wait,
    )
    notice(f"dequantised {file.name} in {time.monotonic() - start:.0f} s")


ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


# Bytes of memory per weight while a file is dequantised: three copies in float32.
UNPACK_BYTES = 12


def _check_gguf(file: Path, memory: int) -> None:
    """Raises DataError when a GGUF file's tensors are not those that its configuration needs.

    Also when dequantising would take more than `memory` bytes (0: unknown), before it starts.

    Its number of weights is compared before anything of that size is built. Tensors of experts
    are split or joined on reading, so that their names are not compared.
    """
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers import modeling_gguf_pytorch_utils as reading

    tensors = gguf.GGUFReader(file).tensors
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    numbers = sum(int(t.n_elements) for t in tensors)
    check_room(file, config, len(tensors), numbers)
    if memory and UNPACK_BYTES * numbers > memory:
        raise DataError(
            f"dequantising {file.name} needs about {UNPACK_BYTES * numbers / 2**30:.1f} GiB of "
            f"memory, and {memory / 2**30:.1f} GiB may be used",
            "Free some memory, or set TDABENCH_LOAD_MEMORY",
        )
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    kind = reading.TENSOR_PROCESSORS.get(config.model_type, reading.TensorProcessor)
    known = reading.get_gguf_hf_weights_map(model, kind(config=config.to_dict()))
    odd = [
        t.name
        for t in tensors
        if t.name not in known and "_exps" not in t.name and t.name not in ROPE_TENSORS
    ]
    if odd:
        raise DataError(
            f"{file} holds {len(odd)} tensors that its model has no place for, first {odd[0]}",
            "transformers would leave them out and compute something else",
        )


def _unpack_gguf(file: str, folder: str, memory: int = 0) -> None:
    """What transformers loads from GGUF still says that it is quantised and refuses to be cast or
    trained, so its weights are copied into a model built from the configuration."""
    _unpack(Path(file), Path(folder), memory)


def _unpack(file: Path, folder: Path, memory: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        _check_gguf(file, memory)
        with no_bars(), torch.random.fork_rng(devices=[]):
            found: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False,
                output_loading_info=True,
            )  # fmt: skip
            loaded, report = found
            check_report(file, report, tied=tied_head(loaded))
            config = loaded.config
            for attribute in ("quantization_config", "_pre_quantization_dtype"):
                if hasattr(config, attribute):
                    delattr(config, attribute)
            model = type(loaded)(config)
        model.load_state_dict(loaded.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
    except Exception as e:
        # The reader raises anything for a damaged file; memory is another matter.
        if isinstance(e, (MemoryError, DataError)):
            raise
        reason = first_line(e, 200).rstrip(".")
        raise DataError(
            f"{file} cannot be read as GGUF: {reason}",
            "It may be truncated, or have an architecture that transformers cannot convert",
        ) from e
    end = getattr(config, "eos_token_id", None)
    if tokenizer.eos_token_id is None and isinstance(end, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)  # the reader overlooks id 0
    model.tie_weights()
    with no_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --------------------------------------------------------------------------- adapters


def _is_adapter(path: Path) -> bool:
    return path.is_dir() and (path / "adapter_config.json").exists()


def adapter_config(adapter: Path) -> dict[str, Any]:
    """Reads the configuration of a PEFT adapter. Raises DataError for values of the wrong kind.

    Patterns are untrusted expressions: one that explodes ends with the limited process
    that matches it.
    """
    path = adapter / "adapter_config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise DataError(f"{path} is not the configuration of an adapter", "Save it again")

    def refuse(key: str) -> DataError:
        return DataError(
            f"{path}: {key} = {str(config[key])[:60]!r} makes no sense", "Save it again"
        )

    for key in ("peft_type", "base_model_name_or_path", "bias"):
        if not isinstance(config.get(key), str | None):
            raise refuse(key)
    for key, least in (("r", 1), ("lora_alpha", 0)):
        value = config.get(key, 8)
        if type(value) not in (int, float) or not least <= value < 1e9:
            raise refuse(key)
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key)
        if not isinstance(pattern, dict | None):
            raise refuse(key)
        for name, value in (pattern or {}).items():
            try:
                re.compile(name)
            except (re.error, RecursionError, OverflowError):
                raise refuse(key) from None
            if type(value) not in (int, float) or not (0 < value < 1e9):
                raise refuse(key)
    return config


def _base_of(adapter: Path) -> str:
    base = adapter_config(adapter).get("base_model_name_or_path")
    if not base:
        raise DataError(
            f"the adapter {adapter} does not name its base model",
            "Give the base as the model and the adapter as a checkpoint: "
            "--checkpoint tuned=ADAPTER",
        )
    return base


def _merge(base: Path, adapter: Path, folder: Path) -> None:
    """`merge_adapter` in a process with a limit on time and memory."""
    odd = _not_plain(adapter_config(adapter))
    if odd and (adapter / "adapter_model.safetensors").exists() and find_spec("peft") is None:
        raise MissingExtra(f"peft, which merges adapters with {odd},", "peft")
    limited(
        "tdabench.targets.source:_merge_adapter",
        {"base": str(base), "adapter": str(adapter), "folder": str(folder)},
        what=f"the adapter {adapter}",
    )


def _merge_adapter(base: str, adapter: str, folder: str) -> None:
    merge_adapter(Path(base), Path(adapter), Path(folder))


def merge_adapter(base: Path, adapter: Path, folder: Path) -> None:
    """Writes the model at `base` with the PEFT adapter merged into `folder`.

    Plain LoRA (W + scale B A; rank-stabilised scale, per-layer ranks, Conv1D, and whole modules
    saved with it) is merged here; any other kind by peft, if it is installed.
    """
    import torch

    model = load_pretrained(base)
    config = adapter_config(adapter)
    odd = _not_plain(config)
    if odd and not (adapter / "adapter_model.safetensors").exists():
        raise DataError(
            f"{adapter} has no adapter_model.safetensors, and pickles are not read",
            "Save it again with save_pretrained",
        )
    if not odd:
        add_lora(model, adapter, config)
    else:
        try:
            from peft import PeftModel
        except ImportError as e:
            raise MissingExtra(f"peft, which merges adapters with {odd},", "peft") from e
        try:
            with torch.no_grad(), warnings.catch_warnings():
                # A warning is all that peft says of weights that it draws at random.
                warnings.filterwarnings("error", ".*missing adapter keys.*")
                ids = probe_ids(model)
                adapted: Any = PeftModel.from_pretrained(model, str(adapter)).eval()
                before = adapted(input_ids=ids).logits
                model = adapted.merge_and_unload()
                after = model(input_ids=ids).logits
        except Exception as e:
            reason = first_line(e, 200)
            raise DataError(f"the adapter {adapter} does not fit its base: {reason}") from e
        if float((after - before).abs().max()) > 1e-3 * float(before.abs().max()):
            raise DataError(
                f"merging changes the outputs of the adapter {adapter} ({odd})",
                "Merge it in the program that trained it, and give the merged model",
            )
    with no_bars():
        model.save_pretrained(folder)


def _not_plain(config: Mapping[str, Any]) -> str:
    """Names the parts of an adapter's configuration beyond plain LoRA; "" if there are none."""
    if config.get("peft_type") != "LORA":
        return str(config.get("peft_type"))
    for key in (
        "use_dora", "layer_replication", "trainable_token_indices", "target_parameters",
        "megatron_config", "corda_config", "eva_config", "lora_bias", "ensure_weight_tying",
    ):  # fmt: skip
        if config.get(key):
            return key
    return "biases" if config.get("bias", "none") != "none" else ""


def add_lora(model: Any, adapter: Path, config: Mapping[str, Any]) -> None:
    """Adds W += scale B A for every adapted layer of `model`, in place, in float32.

    Raises DataError if the adapter's tensors and the model's layers do not match.
    """
    import torch

    file = adapter / "adapter_model.safetensors"
    if not file.exists():
        pickled = (adapter / "adapter_model.bin").exists()
        raise DataError(
            f"{file} is missing" + (": the adapter is a pickle, not read" if pickled else ""),
            "Save it again with save_pretrained",
        )
    tensors = read_weights(file)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        name = key.removeprefix("base_model.model.")
        match = re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", name)
        if match:
            pairs.setdefault(match[1], {})[match[2]] = value.float()
        else:
            whole[name.replace(".modules_to_save.default", "").replace(".base_layer", "")] = value
    if not pairs and not whole:
        raise DataError(f"{file} has no adapter weights", "Train or save it again")
    lacking = sorted(_adapted(model, config) - set(pairs))
    if lacking and pairs:
        raise DataError(
            f"{file} lacks {len(lacking)} of the layers that its configuration adapts, first "
            f"{lacking[0]}",
            "Did the download finish? Otherwise save the adapter again",
        )
    _untie(model, {*pairs, *(name.rpartition(".")[0] for name in whole)})
    state, modules = model.state_dict(), dict(model.named_modules())
    with torch.no_grad():
        # Whole tensors first: peft saves the base of an adapted head or embedding with the adapter.
        for name, value in whole.items():
            if name not in state or state[name].shape != value.shape:
                raise DataError(f"{file} has {name!r}, which does not fit the base model")
            state[name].copy_(value.float())
        for name, pair in pairs.items():
            if name not in modules or set(pair) != {"A", "B"}:
                raise DataError(
                    f"{file} adapts {name!r}, which the base model lacks",
                    "Is this the model that the adapter was trained on?",
                )
            weight = modules[name].weight
            rank = _for_layer(config.get("rank_pattern"), name, config.get("r", 8))
            alpha = _for_layer(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            if len(pair["A"]) != rank:
                raise DataError(
                    f"{file} adapts {name!r} with rank {len(pair['A'])}, its configuration says "
                    f"{rank:g}",
                    "Its scale would be wrong: save the adapter again",
                )
            delta = scale * (pair["B"] @ pair["A"])  # [d_out, d_in]
            if config.get("fan_in_fan_out") or isinstance(modules[name], torch.nn.Embedding):
                delta = delta.T
            if delta.shape != weight.shape:
                raise DataError(
                    f"{file} adapts {name!r} by {list(delta.shape)}, the base model's is "
                    f"{list(weight.shape)}",
                    "Is this the model that the adapter was trained on?",
                )
            weight += delta


def _adapted(model: Any, config: Mapping[str, Any]) -> set[str]:
    """Returns the names of layers that a LoRA configuration adapts; empty if it names none."""
    import torch

    def named(patterns: Any, name: str) -> bool:
        if isinstance(patterns, str):
            return re.fullmatch(patterns, name) is not None
        return any(name == p or name.endswith(f".{p}") for p in patterns or ())

    wanted, left_out = config.get("target_modules"), config.get("exclude_modules")
    if not isinstance(wanted, (str, list)) or not isinstance(left_out, (str, list, type(None))):
        return set()
    kinds = (torch.nn.Linear, torch.nn.Embedding, type_of_conv1d())
    numbers = config.get("layers_to_transform")
    numbers = [numbers] if isinstance(numbers, int) else numbers
    head = model.get_output_embeddings()
    found = set()
    for name, module in model.named_modules():
        if not isinstance(module, kinds) or named(left_out, name):
            continue
        every = wanted == "all-linear"
        if every and (module is head or isinstance(module, torch.nn.Embedding)):
            continue
        if not every and not named(wanted, name):
            continue
        if isinstance(numbers, list) and block_of(name) not in numbers:
            continue
        found.add(name)
    return found


def type_of_conv1d() -> type:
    """Returns GPT-2's layer class, whose weights are [d_in, d_out]."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def _untie(model: Any, adapted: Collection[str]) -> None:
    """Gives the output matrix its own weights if an adapter changes it or the embedding.

    In training, an adapter of one of the two does not change the other.
    """
    import torch

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    names = {name for name, m in model.named_modules() if m is head or m is embedding}
    if names & set(adapted):
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _for_layer(pattern: Mapping[str, Any] | None, name: str, default: Any) -> float:
    """Returns the value of the first pattern that a layer's name ends with, as in peft."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{key})", name):
            return float(value)
    return float(default)
