"""Arrays from files of other projects: npy, npz, safetensors, and torch files that hold numbers.

A torch file (.pt, .pth) is a pickle. It is read by torch's safe loader alone, in its own process
with limits, and may name nothing but tensors and the numpy types listed in `_allowed`; anything
else in it is refused by name. Its arrays come back as safetensors.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.errors import DataError, UsageError, unknown
from tdabench.io import open_input, read_arrays, write_arrays
from tdabench.limited import limited

SUFFIXES = (".npy", ".npz", ".safetensors", ".pt", ".pth")
WHOLE = "values"  # name of the array in a file that holds one without a name


def read_named(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of numbers in a file, by name. Raises DataError naming the file.

    Formats by suffix: .npy, .npz, .safetensors, .pt and .pth. Nothing in the file is run.
    """
    path, suffix = Path(path), Path(path).suffix
    if suffix not in SUFFIXES:
        raise UsageError(f"{path} is not a file of arrays", f"Give one of: {', '.join(SUFFIXES)}")
    if not path.exists():
        raise DataError(f"{path} is missing", "Check the path")
    if suffix == ".safetensors":
        found = read_arrays(path)[0]
    elif suffix in (".npy", ".npz"):
        found = _numpy(path)
    else:
        with tempfile.TemporaryDirectory(prefix="tdabench-") as folder:
            out = Path(folder) / "arrays.safetensors"
            arguments = {"path": str(path.absolute()), "out": str(out)}
            limited("tdabench.truth.numbers:convert_torch", arguments, what=str(path))
            found = read_arrays(out)[0]
    for name, array in found.items():
        if array.dtype.kind not in "biuf":
            raise DataError(f"{path}: the array {name!r} holds {array.dtype}, not numbers")
    if not found:
        raise DataError(f"{path} holds no array")
    return found


def read_one(path: Path, prefer: str = "") -> np.ndarray:
    """Returns the one array in a file. `FILE#NAME` names it if there are several.

    `prefer` is the name to take where the file has an array of that name.
    """
    text, _, name = str(path).partition("#")
    found = read_named(Path(text))
    name = name or (prefer if prefer in found else "")
    if name:
        if name not in found:
            raise unknown(f"array of {text}", name, found)
        return found[name]
    if len(found) > 1:
        raise UsageError(
            f"{text} holds {len(found)} arrays: {', '.join(sorted(found))}",
            f"Name one: {text}#{min(found)}",
        )
    return next(iter(found.values()))


def _numpy(path: Path) -> dict[str, np.ndarray]:
    try:
        with open_input(path) as f:
            loaded = np.load(f, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {WHOLE: loaded}
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, KeyError, TypeError, NotImplementedError) as e:
        raise DataError(f"{path} is damaged or holds objects, not numbers: {e}") from e
    except Exception as e:  # zipfile and zlib raise their own errors for a damaged npz
        raise DataError(f"{path} is damaged: {type(e).__name__} {e}") from e


# --------------------------------------------------------------------------- in its own process


def convert_torch(path: str, out: str) -> list[str]:
    """Writes the arrays in a torch file as safetensors, and returns their names.

    Raises DataError for a file that names anything but tensors and arrays, or holds neither.
    """
    import torch

    if tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2]) < (2, 6):
        raise UsageError(
            f"torch {torch.__version__} cannot load {path} safely",
            "Install torch 2.6 or later, or convert the file to .npy",
        )
    torch.serialization.add_safe_globals(_allowed())
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # the loader raises many types for a malformed pickle
        said = str(e)
        named = re.search(r"GLOBAL ([\w.]+)", said)
        if named:
            raise DataError(
                f"{path} contains {named[1]}, which is neither a tensor nor an array of numbers",
                "It is not loaded, since that could run code: convert it to .npy where it was made",
            ) from e
        # torch's own message ends by advising to load the file unsafely.
        reason = re.search(r"WeightsUnpickler error: (.+)", said)
        why = reason[1][:200] if reason else "the safe loader refuses it"
        raise DataError(f"{path} is not a torch file of arrays of numbers: {why}") from e
    arrays = {name: _plain(name, part, path) for name, part in _parts(value, path).items()}
    write_arrays(Path(out), arrays)
    return sorted(arrays)


def _allowed() -> list[Any]:
    """Lists what a pickled numpy array names, with the names of numpy 1 and numpy 2."""
    import codecs

    try:
        from numpy._core import multiarray
    except ImportError:  # numpy 1
        from numpy.core import multiarray  # type: ignore[no-redef]
    rebuild = multiarray._reconstruct
    kinds = ("?", "b", "B", "h", "H", "i", "I", "l", "L", "q", "Q", "e", "f", "d")
    return [
        *((rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
        (codecs.encode, "_codecs.encode"),  # the bytes of an array, in an old protocol
        np.ndarray,
        np.dtype,
        *dict.fromkeys(type(np.dtype(kind)) for kind in kinds),
    ]


def _parts(value: Any, path: str) -> dict[str, Any]:
    """Names the arrays in what a torch file holds: one, a list of them, or a dictionary."""
    import torch

    if isinstance(value, (np.ndarray, torch.Tensor)):
        return {WHOLE: value}
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        kept = {str(k): v for k, v in value.items() if isinstance(v, (np.ndarray, torch.Tensor))}
        if kept:
            return kept
    raise DataError(f"{path} holds {type(value).__name__}, and no array")


def _plain(name: str, part: Any, path: str) -> np.ndarray:
    import torch

    if isinstance(part, torch.Tensor):
        if part.is_sparse or part.is_quantized or part.is_complex():
            raise DataError(f"{path}: {name!r} is not a plain tensor")
        part = part.detach()
        part = (part.float() if part.dtype == torch.bfloat16 else part).numpy()
    if part.dtype.kind not in "biuf":
        raise DataError(f"{path}: {name!r} holds {part.dtype}, not numbers")
    return np.ascontiguousarray(part, part.dtype.newbyteorder("="))
