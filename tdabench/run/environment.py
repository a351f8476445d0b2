"""The environment in a record: versions, hardware, commit. Imports nothing heavy."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("tdabench", "torch", "transformers", "tokenizers", "numpy", "scipy", "safetensors")


@functools.cache
def versions(extra: tuple[str, ...] = ()) -> dict[str, str]:
    """Returns installed versions of the packages that scores depend on."""
    found = {}
    for name in dict.fromkeys([*PACKAGES, *extra]):
        try:
            found[name] = version(name)
        except (PackageNotFoundError, ValueError):
            continue
    return found


@functools.cache
def git_commit() -> str:
    """Returns the commit of the running source tree, with "-dirty"; "" for a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def cores() -> int:
    """Returns the number of processor cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def memory_bytes() -> int:
    """Returns physical memory, or the control group's limit if lower; 0 if unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
    return min([total, *_group_limits()])


def _group_limits() -> list[int]:
    paths = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    limits = []
    for path in paths:
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return limits


def available_bytes() -> int:
    """Returns the memory that can be used now without swapping; 0 if unknown."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, memory_bytes())
    except OSError:
        pass
    return 0


@functools.cache
def hardware() -> dict[str, Any]:
    """Returns processor, cores, memory, graphics processor and platform."""
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "gpu": gpu(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


@functools.cache
def multiplies_bfloat16() -> bool:
    """Tells whether the processor has matrix units for bfloat16, without which it is not faster."""
    try:
        return " amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@functools.cache
def knows_bfloat16() -> bool | None:
    """Tells whether the processor has instructions for bfloat16; None if unknown."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    flags = {w for line in text.splitlines() if line.lower().startswith(("flags", "features"))
             for w in line.partition(":")[2].split()}  # fmt: skip
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}) if flags else None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def gpu() -> str:
    """Returns the name of the first NVIDIA device, or "". Does not load torch."""
    if not Path("/proc/driver/nvidia/version").exists():
        return ""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()
