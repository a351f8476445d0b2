"""Files: written to a temporary name, synced and renamed; headers are checked when read.

Numbers go in safetensors and JSON, never pickle, so reading an untrusted file runs no code.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import hmac
import json
import math
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from tdabench.errors import DataError, TdabenchError, UsageError, notice

Arrays = Mapping[str, np.ndarray]


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open_input(path) as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_kept(path: Path) -> str:
    """Returns the sha256 of a large file, cached between runs.

    The cached hash is valid while the file's path, size and modification time are unchanged.
    """
    real = Path(path).resolve()
    stat = real.stat()
    if stat.st_size < _HASHED_EVERY_TIME:
        return sha256_file(real)
    key = sha256_bytes(f"{real}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    kept = cache_folder() / "digests" / key
    try:
        found = kept.read_text()
        if len(found) == 64:
            return found
    except (OSError, UnicodeDecodeError):
        pass
    found = sha256_file(real)
    try:
        write_text(kept, found)
    except TdabenchError:
        pass  # a cache that cannot be written only costs time
    return found


_HASHED_EVERY_TIME = 32 << 20


def cache_folder() -> Path:
    """Returns the cache folder: TDABENCH_CACHE, else the user's cache folder.

    If that cannot be written, a temporary folder of this user, with one warning on stderr.
    """
    own = os.environ.get("TDABENCH_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return _writable((Path(base) if base else Path.home() / ".cache") / "tdabench")


@functools.cache
def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    user = getattr(os, "getuid", lambda: 0)()
    other = Path(tempfile.gettempdir()) / f"tdabench-cache-{user}"
    try:
        other.mkdir(mode=0o700, exist_ok=True)
        about = os.lstat(other)
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != user or about.st_mode & 0o022:
            other = Path(tempfile.mkdtemp(prefix="tdabench-cache-"))  # someone else was there
    except OSError:
        return folder  # writing there says what is wrong
    notice(
        f"{folder} cannot be written: what is cached goes to {other} "
        "(TDABENCH_CACHE chooses another folder)",
        "tdabench: warning: ",
    )
    return other


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def canonical(value: Any) -> str:
    """Returns JSON with one spelling per value, for fingerprints and cell keys."""
    return _CANONICAL.encode(value)


_AS_IT_IS = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, check_circular=False)


def has_fingerprint(value: Any, expected: Any) -> bool:
    """Tells whether `fingerprint(value)` is `expected`, faster if the names of fields are in order.

    `value` was read from JSON, which `write_json` writes in order.
    """
    for text in (_AS_IT_IS.encode, canonical):
        if sha256_bytes(text(value).encode("utf-8", "backslashreplace"))[:16] == expected:
            return True
    return False


def fingerprint(value: Any) -> str:
    """Returns the first 16 hex digits of the sha256 of `value`'s canonical JSON."""
    return sha256_bytes(canonical(value).encode("utf-8", "backslashreplace"))[:16]


def write_bytes(path: Path, data: bytes) -> None:
    """Writes all of `data` or nothing: temporary file, fsync, rename, fsync of the folder."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except (OSError, ValueError) as e:
        raise cannot_write(path, e) from e
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
            raise cannot_write(path, e) from e
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power failure, if the system supports it."""
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def open_own(path: Path, mode: str) -> BinaryIO:
    """Opens a file in an untrusted folder, never through a link.

    `mode` is "rb", "ab" or "a+b". Raises DataError for a link, a device, a FIFO, or a file with
    another name elsewhere, and OSError like `open`.
    """
    flags = {"rb": os.O_RDONLY, "ab": os.O_WRONLY, "a+b": os.O_RDWR}[mode]
    if mode != "rb":
        flags |= os.O_CREAT | os.O_APPEND
    try:
        # Without O_NONBLOCK, opening a FIFO waits forever.
        fd = os.open(path, flags | _NO_FOLLOW | _NO_WAIT, 0o644)
    except OSError as e:
        if e.errno == errno.ENXIO or os.path.islink(path):
            raise DataError(
                f"{path} is a link or not a file, and is not opened", "Remove it"
            ) from e
        raise
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or (mode != "rb" and about.st_nlink > 1):
        os.close(fd)
        raise DataError(f"{path} has several names (hard links), and is not opened", "Remove it")
    return cast(BinaryIO, os.fdopen(fd, mode))


_NO_FOLLOW, _NO_WAIT = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)


def open_input(path: Path) -> BinaryIO:
    """Opens a file for reading. Raises DataError for a device or a FIFO, which have no end.

    Links are followed, since model folders consist of links.
    """
    return cast(BinaryIO, os.fdopen(_open_regular(path)[0], "rb"))


def _open_regular(path: Path) -> tuple[int, int]:
    """Returns a descriptor and the size of a file; see `open_input`."""
    fd = os.open(path, os.O_RDONLY | _NO_WAIT | getattr(os, "O_CLOEXEC", 0))
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode):
        os.close(fd)
        what = "a folder" if os.path.isdir(path) else "not a regular file"
        raise DataError(f"{path} is {what}", "Give a file")
    return fd, about.st_size


def read_input(path: Path, most: int) -> bytes:
    """Reads the first bytes of a file, at most `most`; otherwise as `open_input`.

    A file object takes longer to make than a small file to read.
    """
    fd, size = _open_regular(path)
    try:
        data = os.read(fd, min(most, size))
        while len(data) < most and (more := os.read(fd, min(most - len(data), 1 << 20))):
            data += more
        return data
    finally:
        os.close(fd)


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Appends one line of JSON to a file in one write, so that lines of two processes never mix."""
    with open_own(path, "ab") as f:
        os.write(f.fileno(), line_of(value))


def line_of(value: Mapping[str, Any]) -> bytes:
    """Returns `value` as one line of JSON, UTF-8."""
    text = json.dumps(value, ensure_ascii=False, default=str) + "\n"
    return text.encode("utf-8", "backslashreplace")


def remove(path: Path) -> None:
    """Removes a file, a link (not its target) or a folder, if it exists."""
    path = Path(path)
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def check_free(folder: Path, names: Iterable[str], mine: bool, option: str = "--out") -> None:
    """Raises UsageError if `folder` has files that would be overwritten, unless it is `mine`.

    `names` are patterns of the files to write there.
    """
    if mine or not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file", f"Choose another folder with {option}")
    found = sorted({p.name for name in names for p in folder.glob(name)} | _links(folder, names))
    if found:
        raise UsageError(
            f"{folder} holds {', '.join(map(repr, found[:5]))}, which this would overwrite, and "
            "which it did not make",
            f"Choose another folder with {option}",
        )


def _links(folder: Path, names: Iterable[str]) -> set[str]:
    """Lists `names` that are dangling links, which patterns do not match."""
    return {name for name in names if os.path.islink(folder / name)}


def check_replaceable(path: Path, kind: str | None = None, option: str = "--out") -> None:
    """Raises UsageError if `path` is a file other than arrays written by tdabench.

    With `kind`, its metadata must name that kind. Users' files are never lost.
    """
    if not os.path.lexists(path):
        return
    try:
        meta = carried(path)
        if "tdabench" in meta and (kind is None or json.loads(meta["tdabench"])["kind"] == kind):
            return
    except (DataError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UsageError(
        f"{path} exists and is not a file of tdabench ({kind or 'arrays'})",
        f"Remove it, or choose another file with {option}",
    )


def seal(value: Any) -> str:
    """Returns an authentication code (HMAC-SHA256) of `value`'s canonical JSON.

    A valid code shows that this user wrote the file on this machine. The secret is in the cache, in
    a file that only the user can read; if it cannot be written, it lasts as long as the process.
    """
    text = canonical(value).encode("utf-8", "backslashreplace")
    return hmac.new(_secret(), text, "sha256").hexdigest()


_secrets: dict[Path, bytes] = {}


def _secret() -> bytes:
    path = cache_folder() / "secret"
    if path not in _secrets:
        try:
            with open_own(path, "rb") as f:
                found = f.read(64)
        except (OSError, DataError):
            found = b""
        if len(found) != 32:
            found = os.urandom(32)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(fd, "wb") as out:
                    out.write(found)
            except FileExistsError:  # another process was first
                with contextlib.suppress(OSError, DataError), open_own(path, "rb") as f:
                    found = f.read(64) or found
            except OSError:
                pass
        _secrets[path] = found
    return _secrets[path]


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cannot_write(path: Path | str, error: OSError | ValueError) -> TdabenchError:
    """Converts a file system error to one line for the user."""
    full = isinstance(error, OSError) and error.errno in _FULL
    reason = getattr(error, "strerror", None) or str(error)
    remedy = "Free some space" if full else "Choose another folder"
    return TdabenchError(f"cannot write {path}: {reason}", remedy)


def write_text(path: Path, text: str) -> None:
    r"""Writes UTF-8; a lone surrogate, which UTF-8 cannot encode, becomes its escape (`\ud800`)."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


MAX_JSON = 256 << 20  # bytes of a JSON document; a record is a few kilobytes


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises DataError for anything else, or more than `MAX_JSON` bytes."""
    try:
        return json.loads(_read_text(path).decode("utf-8"))
    except (ValueError, RecursionError) as e:  # a number of 5,000 digits is a ValueError, too
        raise DataError(f"{path} is not valid JSON: {e}") from e


def read_jsons(paths: Sequence[Path]) -> Iterator[Any]:
    """Yields what `read_json` returns for each file, or the DataError that it raises, in order.

    Many files are parsed at a time: their objects then share the names of their fields, which are a
    quarter of the memory.
    """
    # Between two files, so that none of them can reach into another.
    border = secrets.token_hex(16)
    for a in range(0, len(paths), _PARSED_AT_ONCE):
        part = paths[a : a + _PARSED_AT_ONCE]
        found: list[Any] = []
        with contextlib.suppress(DataError, ValueError, RecursionError):
            whole = f',"{border}",'.encode().join(map(_read_text, part))
            found = json.loads(f"[{whole.decode('utf-8')}]")
        if len(found) == 2 * len(part) - 1 and all(b == border for b in found[1::2]):
            yield from found[::2]
            continue
        for path in part:
            try:
                one = read_json(path)
            except DataError as e:
                one = e
            yield one


_PARSED_AT_ONCE = 64


def _read_text(path: Path) -> bytes:
    """Reads a file of at most `MAX_JSON` bytes. Raises DataError."""
    try:
        text = read_input(path, MAX_JSON + 1)
    except FileNotFoundError as e:
        raise DataError(f"{path} is missing") from e
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from e
    if len(text) > MAX_JSON:
        raise DataError(f"{path} is larger than {MAX_JSON >> 20} MiB")
    return text


def write_arrays(path: Path, arrays: Arrays, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes named arrays as safetensors; `metadata` is stored as JSON in the header.

    The header contains a sha256 of the data, so that `read_arrays` detects a flipped bit. The same
    arrays and metadata give the same bytes.
    """
    contiguous = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    header = {"tdabench": canonical(dict(metadata or {})), "sha256": _digest(contiguous)}
    write_bytes(path, safetensors_bytes(contiguous, header))


def keep_arrays(path: Path, arrays: Arrays, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes arrays as `write_arrays` does, sealed: see `seal`. For results that are used again."""
    contiguous = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    about = dict(metadata or {})
    write_arrays(path, contiguous, {**about, "seal": seal([about, _digest(contiguous)])})


def kept_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads what `keep_arrays` wrote. Raises DataError, also for a file that this user did not keep
    on this machine, or that was altered since."""
    arrays, about = read_arrays(path)
    sealed = about.pop("seal", None)
    # Through JSON, as it was read: a tuple is a list there.
    if sealed != seal([about, _digest(arrays)]):
        raise DataError(f"{path} was altered, or comes from elsewhere")
    return arrays, about


_DTYPES = {
    "<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32", "<i2": "I16",
    "|i1": "I8", "|u1": "U8", "<u2": "U16", "<u4": "U32", "<u8": "U64", "|b1": "BOOL",
}  # fmt: skip


def safetensors_bytes(arrays: Arrays, metadata: Mapping[str, str]) -> bytes:
    """Encodes arrays as safetensors with the header in a fixed order.

    The library's writer orders metadata by a hash that changes from run to run, and rebuilt files
    are compared byte by byte.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    # Widest items first keeps every array aligned, as the format requires.
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
    """Reads named arrays and metadata. Raises DataError for a missing or damaged file.

    The header is checked against the size of the file before memory is allocated.
    """
    from safetensors import SafetensorError, safe_open

    read_header(path)
    try:
        with safe_open(str(path), framework="numpy") as f:
            header = f.metadata() or {}
            arrays = {k: f.get_tensor(k) for k in f.keys()}
    except FileNotFoundError as e:
        raise DataError(f"{path} is missing") from e
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError) as e:
        # A type that numpy lacks, such as bfloat16, raises one of the latter three.
        raise DataError(f"{path} is truncated or not a safetensors file: {e}") from e
    if "sha256" in header and header["sha256"] != _digest(arrays):
        raise DataError(f"{path} is corrupt: its contents do not match the hash in its header")
    if carried_hash(path) != header.get("sha256", ""):
        raise DataError(f"{path} is corrupt: its header has two hashes")
    try:
        metadata = json.loads(header.get("tdabench", "{}"))
        if not isinstance(metadata, dict):
            raise ValueError(f"expected an object, found {type(metadata).__name__}")
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path} has a damaged header: {e}") from e
    return arrays, metadata


MAX_HEADER = 100 << 20  # bytes; the limit of the safetensors library


def carried(path: Path) -> dict[str, str]:
    """Returns the metadata in the header of a safetensors file. Raises DataError."""
    found = read_header(path).get("__metadata__", {})
    return found if isinstance(found, dict) else {}


_HASH_FIRST = b'{"__metadata__":{"sha256":"'


def carried_hash(path: Path) -> str:
    """Returns the hash of the contents in the header of a file of `write_arrays`, or "".

    Reads the first bytes only, where `write_arrays` puts it, and the whole header of a file by
    another writer. Raises DataError.
    """
    try:
        start = read_input(path, 8 + len(_HASH_FIRST) + 65)[8:]
    except FileNotFoundError as e:
        raise DataError(f"{path} is missing") from e
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from e
    if start.startswith(_HASH_FIRST) and start.endswith(b'"'):
        found = start[len(_HASH_FIRST) : -1].decode("ascii", "replace")
        if len(found) == 64 and found.isalnum():
            return found
    return str(carried(path).get("sha256", ""))


def array_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns shapes by name of the arrays in a safetensors file, from its header alone."""
    return {k: tuple(v["shape"]) for k, v in read_header(path).items() if k != "__metadata__"}


def read_header(path: Path) -> dict[str, Any]:
    """Returns the header of a safetensors file: an entry per array, and `__metadata__`.

    Raises DataError if the header claims more than the file holds. It runs before the library reads
    the file, so that untrusted sizes are never allocated or mapped.
    """
    try:
        size = os.stat(path).st_size
        with open_input(path) as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(f.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        for name, entry in header.items():
            if name != "__metadata__":
                _check_entry(name, entry, size - 8 - length)
        return header
    except FileNotFoundError as e:
        raise DataError(f"{path} is missing") from e
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path} is truncated or not a safetensors file: {e}") from e


def _check_entry(name: str, entry: Any, held: int) -> None:
    """Raises ValueError unless an array's shape, type and position agree and are in the file."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the array {name!r} is not described")
    shape, span = entry["shape"], entry["data_offsets"]
    numbers = [*shape, *span] if isinstance(shape, list) and isinstance(span, list) else [None]
    if len(numbers) > 64 or any(type(n) is not int or not 0 <= n < 1 << 60 for n in numbers):
        raise ValueError(f"the array {name!r} has invalid sizes")
    if len(span) != 2 or not span[0] <= span[1] <= held:
        raise ValueError(f"the array {name!r} reaches beyond the end of the file")
    bits = "".join(c for c in str(entry["dtype"]).partition("_")[0] if c.isdigit())
    width = 8 if entry["dtype"] == "BOOL" else int(bits or 0)
    if math.prod(shape) * width != 8 * (span[1] - span[0]):
        raise ValueError(f"the array {name!r} has a shape that does not match its bytes")


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        a = arrays[name]
        digest.update(f"{name}:{a.dtype.str}:{a.shape}:".encode())
        digest.update(np.ascontiguousarray(a).tobytes())
    return digest.hexdigest()
