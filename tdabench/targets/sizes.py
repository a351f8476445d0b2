"""Compares the sizes in a configuration with the weights, before a model is built."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdabench.errors import DataError
from tdabench.io import array_shapes, fingerprint

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")


def check_room(
    where: Any, config: PretrainedConfig, tensors: int, numbers: int, body: bool = False
) -> None:
    """Raises DataError if a configuration needs more than `numbers` in `tensors` tensors.

    `body` means the model without its head and pooler. The model is built without memory (on
    torch's meta device), after its number of layers is compared with the number of tensors: a
    configuration of a few bytes may claim a million layers.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    for layers in _layers(config.to_dict()):
        if layers > tensors:
            raise DataError(
                f"{where} holds {tensors:,} tensors, but its configuration needs {layers:,} layers",
                "The file is incomplete, or the configuration belongs to another model",
            )
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = (AutoModel if body else AutoModelForCausalLM).from_config(config)
    except Exception as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise DataError(
            f"no model can be built from the configuration of {where}: {reason}",
            "It needs a config.json of a causal language model that transformers supports",
        ) from e
    named = model.named_parameters()
    wanted = sum(p.numel() for name, p in named if not (body and name.startswith("pooler.")))
    if wanted > numbers:
        raise DataError(
            f"{where} holds {numbers:,} weights, but its configuration needs {wanted:,}",
            "The file is incomplete, or the configuration belongs to another model",
        )


def _layers(config: Mapping[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if key in LAYERS and type(value) is int:
            yield value
        elif isinstance(value, Mapping):
            yield from _layers(value)


def check_folder(place: Path, config: PretrainedConfig, body: bool = False) -> None:
    """Applies `check_room` to the weights in a file or folder, once per state of both."""
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    about = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
    key = fingerprint([about, body, config.to_json_string()])
    if key in _fits:
        return
    shapes = {name: shape for file in files for name, shape in array_shapes(file).items()}
    check_room(place, config, len(shapes), sum(map(math.prod, shapes.values())), body)
    _fits.add(key)


_fits: set[str] = set()
