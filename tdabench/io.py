"""Files: written to a temporary name, synced and renamed; read with their claims checked.

Numbers go in safetensors and JSON, never pickle, so reading a stranger's file runs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.errors import DataError, TdabenchError

Arrays = Mapping[str, np.ndarray]


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def canonical(value: Any) -> str:
    """JSON with one spelling a value: what fingerprints and cell keys are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fingerprint(value: Any) -> str:
    """First 16 hex digits of the sha256 of the canonical JSON of `value`."""
    return sha256_bytes(canonical(value).encode())[:16]


def write_bytes(path: Path, data: bytes) -> None:
    """Writes all of `data` or nothing: temporary file, fsync, rename."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as e:
        raise TdabenchError(f"cannot write {path}: {e.strerror}", "Choose another folder") from e
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as e:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise TdabenchError(f"cannot write {path}: {e.strerror}", "Free some space") from e
        raise


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise DataError(f"{path} is missing") from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise DataError(f"{path} is not valid JSON: {e}") from e
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from e


def write_arrays(path: Path, arrays: Arrays, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes named arrays as safetensors; `metadata` is stored as JSON in the header.

    The header carries a sha256 of the data, so that `read_arrays` notices a flipped bit. The
    same arrays and metadata give the same bytes.
    """
    contiguous = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    header = {"tdabench": canonical(dict(metadata or {})), "sha256": _digest(contiguous)}
    write_bytes(path, safetensors_bytes(contiguous, header))


_DTYPES = {
    "<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32", "<i2": "I16",
    "|i1": "I8", "|u1": "U8", "<u2": "U16", "<u4": "U32", "<u8": "U64", "|b1": "BOOL",
}  # fmt: skip


def safetensors_bytes(arrays: Arrays, metadata: Mapping[str, str]) -> bytes:
    """The safetensors encoding with its header in a fixed order.

    The library's own writer orders metadata by a hash that changes from run to run, and files
    that are rebuilt are compared byte by byte.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    # Widest items first keeps every array aligned, as the format asks.
    order = sorted(arrays, key=lambda k: (-arrays[k].dtype.itemsize, k))
    for name in order:
        a = arrays[name]
        span = [end, end + a.nbytes]
        header[name] = {"dtype": _DTYPES[a.dtype.str], "shape": list(a.shape), "data_offsets": span}
        end = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = [np.ascontiguousarray(arrays[name]).tobytes() for name in order]
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Named arrays and metadata. Raises DataError for a missing, truncated or altered file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as f:
            header = f.metadata() or {}
            arrays = {k: f.get_tensor(k) for k in f.keys()}
    except FileNotFoundError as e:
        raise DataError(f"{path} is missing") from e
    except (SafetensorError, OSError, ValueError) as e:
        raise DataError(f"{path} is truncated or not a safetensors file: {e}") from e
    if "sha256" in header and header["sha256"] != _digest(arrays):
        raise DataError(f"{path} is corrupt: its contents do not match the hash in its header")
    try:
        metadata = json.loads(header.get("tdabench", "{}"))
    except json.JSONDecodeError as e:
        raise DataError(f"{path} has a damaged header: {e}") from e
    return arrays, metadata


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        a = arrays[name]
        digest.update(f"{name}:{a.dtype.str}:{a.shape}:".encode())
        digest.update(np.ascontiguousarray(a).tobytes())
    return digest.hexdigest()
