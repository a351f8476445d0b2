"""Confines a process to what a method may touch, by Landlock (Linux 5.13 and later).

Landlock is the kernel's own, needs no privilege and cannot be lifted by the process or its
children: https://docs.kernel.org/userspace-api/landlock.html. A confined process reads what it is
granted and nothing else, writes its own folders, opens no connection (kernels from 6.7), signals
no process outside (from 6.12), and can look into the memory or descriptors of none: Landlock
refuses ptrace, and with it /proc/PID/mem, environ, fd and the like, beyond the confined ones.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
MAKE_CHAR, MAKE_BLOCK = 1 << 6, 1 << 11
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
# Rights that a version of Landlock knows: all up to making links; then moving, truncating, ioctl.
_KNOWN = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
RIGHTS = {
    "read": EXECUTE | READ_FILE | READ_DIR,
    "list": READ_DIR,
    # Not device files: as root, one could be made of the disk itself.
    "write": ((1 << 16) - 1) & ~(MAKE_CHAR | MAKE_BLOCK),
    "device": READ_FILE | WRITE_FILE | IOCTL_DEV,
}
# Capabilities that root keeps: those on the owners and modes of files.
_KEPT = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4

Rule = tuple[str, str]  # path, and a key of RIGHTS


def abi() -> int:
    """Returns the version of Landlock that this kernel offers, 0 if none."""
    if sys.platform != "linux":
        return 0
    try:
        return max(0, _call(444, None, 0, 1))
    except OSError:
        return 0


def confine(rules: Iterable[Rule], version: int) -> None:
    """Confines this process, which must have one thread, to `rules`, for good.

    Raises OSError where that fails. Paths that do not exist are passed over.
    """
    known = (1 << _KNOWN.get(version, 16)) - 1
    net = 3 if version >= 4 else 0  # binding and connecting, over TCP
    scoped = 3 if version >= 6 else 0  # abstract sockets and signals
    attributes = struct.pack("QQQ", known, net, scoped)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _call(444, attributes[:size], size, 0)
    for path, access in rules:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            allowed = RIGHTS[access] & known
            if not os.path.isdir(path):
                allowed &= FILE_RIGHTS
            if allowed:
                _call(445, ruleset, 1, struct.pack("=Qi", allowed, fd), 0)
        finally:
            os.close(fd)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "new privileges cannot be turned off")
    _call(446, ruleset, 0)
    os.close(ruleset)
    _drop_capabilities()


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    wrapped = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    found = int(libc.syscall(ctypes.c_long(number), *wrapped))
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


def _drop_capabilities() -> None:
    """Root gives up all but the right to its files; for other users there is nothing to drop."""
    libc = ctypes.CDLL(None, use_errno=True)
    head = struct.pack("=Ii", 0x20080522, 0)
    held = ctypes.create_string_buffer(24)
    if libc.capget(head, held) == 0:
        permitted = struct.unpack("=6I", held.raw)[1] & _KEPT
        libc.capset(head, struct.pack("=6I", permitted, permitted, 0, 0, 0, 0))


# --------------------------------------------------------------------------- what may be read

SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/opt", "/nix/store")
_ETC = (
    "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "timezone", "passwd", "group",
    "nsswitch.conf", "hosts", "resolv.conf", "os-release", "ssl", "ca-certificates", "pki",
    "mime.types", "fonts", "alternatives", "OpenCL", "vulkan",
)  # fmt: skip
_PROC = (
    "cpuinfo", "meminfo", "stat", "uptime", "loadavg", "version", "filesystems", "self", "sys",
    "driver", "devices",
)  # fmt: skip
_SYS = ("devices", "class", "bus", "fs/cgroup", "module", "dev")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_CODE = (".py", ".pyc", ".so", ".pyd", ".pth", ".zip", ".egg", ".egg-link")


def granted(path: str, hidden: Iterable[str]) -> Iterator[Rule]:
    """Returns rules that allow reading `path` except at or below a path of `hidden`.

    Landlock knows no exceptions, so that a folder above something hidden is opened entry by entry.
    Names in such a folder can be listed.
    """
    real = os.path.realpath(path)
    inside = [h for h in hidden if h == real or h.startswith(real.rstrip("/") + "/")]
    if real in inside:
        return
    if not inside:
        yield real, "read"
        return
    yield real, "list"
    try:
        entries = sorted(os.listdir(real))
    except OSError:
        return
    for name in entries:
        child = os.path.realpath(os.path.join(real, name))
        if not any(child == h or child.startswith(h + "/") for h in inside):
            yield from granted(child, inside)


def with_links(path: Path, hidden: Sequence[str]) -> Iterator[Rule]:
    """Yields what `granted` yields, and files elsewhere that links in the folder `path` name.

    A snapshot of the hub is links into another folder.
    """
    yield from granted(str(path), hidden)
    if path.is_dir():
        for file in path.rglob("*"):
            if file.is_symlink():
                yield from granted(str(file), hidden)


def private_environment(temporary: Path) -> dict[str, str]:
    """Returns environment variables that make libraries write below `temporary` only."""
    return {
        "TMPDIR": str(temporary),
        "TDABENCH_CACHE": f"{temporary}/cache",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCHINDUCTOR_CACHE_DIR": f"{temporary}/inductor",
        "TRITON_CACHE_DIR": f"{temporary}/triton",
        "TORCH_EXTENSIONS_DIR": f"{temporary}/extensions",
        "CUDA_CACHE_PATH": f"{temporary}/cuda",
        "MPLCONFIGDIR": f"{temporary}/matplotlib",
        "NUMBA_CACHE_DIR": f"{temporary}/numba",
    }


def libraries(hidden: Iterable[str], path: Iterable[str] = ()) -> list[Rule]:
    """Lists what every method may read: the interpreter, libraries, devices, facts on the machine.

    Of a folder on `path` (by default sys.path) that does not hold installed packages, a working
    copy say, only Python packages and modules.
    """
    hidden = sorted({os.path.realpath(h) for h in hidden})
    roots = [*SYSTEM, sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix]
    roots = [os.path.realpath(r) for r in dict.fromkeys(roots) if os.path.isdir(r)]
    rules: list[Rule] = []
    for entry in path or sys.path:
        real = os.path.realpath(entry or ".")
        if any(real == r or real.startswith(r + "/") for r in roots) or not os.path.exists(real):
            continue
        if os.path.basename(real) in ("site-packages", "dist-packages") or os.path.isfile(real):
            roots.append(real)
            continue
        rules.append((real, "list"))
        for name in sorted(os.listdir(real)):
            if _is_code(os.path.join(real, name)):
                rules += granted(os.path.join(real, name), hidden)
    roots.append(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    for name, module in list(sys.modules.items()):
        if name.startswith("__editable__"):  # packages that are found by a hook, not on the path
            roots += map(str, getattr(module, "MAPPING", {}).values())
    for root in roots:
        rules += granted(root, hidden)
    rules += [(os.path.join("/etc", name), "read") for name in _ETC]
    rules += [(os.path.join("/proc", name), "read") for name in _PROC]
    rules += [(os.path.join("/sys", name), "read") for name in _SYS]
    rules += [(os.path.join("/dev", name), "device") for name in _DEVICES]
    if os.path.isdir("/dev"):
        gpus = [n for n in sorted(os.listdir("/dev")) if n.startswith(("nvidia", "dri", "kfd"))]
        rules += [(os.path.join("/dev", name), "device") for name in gpus]
    for place in model_caches():
        rules += granted(place, hidden)
    return list(dict.fromkeys(rules))


def _is_code(path: str) -> bool:
    if os.path.isfile(path):
        return path.endswith(_CODE)
    if path.endswith((".dist-info", ".egg-info")):
        return True
    try:
        inside = os.listdir(path)
        deeper = [os.path.join(path, n) for n in inside if not n.startswith(".")]
        return any(n.endswith(_CODE) for n in inside) or any(
            os.path.isfile(os.path.join(d, "__init__.py")) for d in deeper if os.path.isdir(d)
        )
    except OSError:
        return False


def model_caches() -> list[str]:
    """Lists folders where the hub and torch keep models, without those of tokens."""
    home = os.path.expanduser("~")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    hub = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    found = [
        os.environ.get("HF_HUB_CACHE") or os.path.join(hub, "hub"),
        os.environ.get("TORCH_HOME") or os.path.join(cache, "torch"),
        os.environ.get("SENTENCE_TRANSFORMERS_HOME") or "",
    ]
    return [f for f in found if f and os.path.isdir(f)]
