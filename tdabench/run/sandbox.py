"""Confines a process to what a method may touch, by Landlock (Linux 5.13 and later).

Landlock is the kernel's own, needs no privilege and cannot be lifted by the process or its
children: https://docs.kernel.org/userspace-api/landlock.html. A confined process reads only
granted paths, writes only its own folders, opens no connection (kernels from 6.7), signals no
process outside (from 6.12), and cannot read the memory or descriptors of other processes: Landlock
refuses ptrace, and with it /proc/PID/mem, environ, fd and the like.
A seccomp filter (Linux on x86-64 and arm64) refuses what Landlock does not cover: sockets of every
kind, System V and POSIX shared memory and queues, kernel keyrings, and io_uring.
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
    """Confines this process, which must have one thread, to `rules`; this cannot be undone.

    Raises OSError if it fails. Skips paths that do not exist.
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
    refuse_calls(libc)


# Numbers of the refused system calls. Pairs of connected sockets stay: pipes of Python use them.
_REFUSED = {
    # socket, shmget, shmat, shmctl, semget, semop, semctl, semtimedop, msgget, msgsnd, msgrcv,
    # msgctl, mq_open, add_key, request_key, keyctl, io_uring_setup
    "x86_64": (
        0xC000003E,
        (41, 29, 30, 31, 64, 65, 66, 220, 68, 69, 70, 71, 240, 248, 249, 250, 425),
    ),
    "aarch64": (
        0xC00000B7,
        (198, 194, 196, 195, 190, 193, 191, 192, 186, 189, 188, 187, 180, 217, 218, 219, 425),
    ),
}


def refuse_calls(libc: ctypes.CDLL) -> bool:
    """Makes the system calls of `_REFUSED` fail with EPERM. New privileges must be off.

    Returns False on another processor, or where the kernel has no seccomp. A filter is a program
    of the kernel's packet filter (linux/filter.h, linux/seccomp.h) over the call's number and
    architecture.
    """
    if os.uname().machine not in _REFUSED:
        return False
    architecture, numbers = _REFUSED[os.uname().machine]
    load, equal, above, end = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO of EPERM
    left = len(numbers)
    program = [
        (load, 0, 0, 4),  # the architecture: a call of another one is refused
        (equal, 0, left + 3, architecture),
        (load, 0, 0, 0),  # the number
        (above, left + 1, 0, 0x40000000),  # calls of the x32 interface
        *((equal, left - i, 0, n) for i, n in enumerate(numbers)),
        (end, 0, 0, allow),
        (end, 0, 0, refuse),
    ]
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    held = ctypes.create_string_buffer(code, len(code))
    filled = struct.pack("@HP", len(program), ctypes.addressof(held))  # struct sock_fprog
    return bool(libc.prctl(22, 2, filled, 0, 0) == 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    wrapped = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    found = int(libc.syscall(ctypes.c_long(number), *wrapped))
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found


def _drop_capabilities() -> None:
    """Drops root's capabilities except those on files; other users have none to drop."""
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

    Landlock has no exceptions, so a folder above a hidden path is granted entry by entry. Names in
    such a folder can be listed.
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

    A snapshot of the hub consists of links into another folder.
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

    A folder on `path` (by default sys.path) without installed packages, such as a working copy,
    grants only its Python packages and modules.
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
        for name in _names(real):
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
    gpus = [n for n in _names("/dev") if n.startswith(("nvidia", "dri", "kfd"))]
    rules += [(os.path.join("/dev", name), "device") for name in gpus]
    for place in model_caches():
        rules += granted(place, hidden)
    return list(dict.fromkeys(rules))


def _names(folder: str) -> list[str]:
    """Lists a folder; nothing where it is missing, or a confined process may not list it."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


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
