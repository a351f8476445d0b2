"""Work on an untrusted file in its own process, with a limit on its time and memory.

    value = limited("tdabench.data.tables:to_lines", {"path": "x.parquet"}, what="x.parquet")

If a file hangs or crashes its reader, or makes it request all memory, the error is one line and
the parent continues. Arguments and result are JSON; large data goes through files. Limits are
TDABENCH_LOAD_SECONDS (1800) and TDABENCH_LOAD_MEMORY (90% of free memory, such as 8G);
TDABENCH_LOAD_SECONDS=0 means no limit.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tdabench import errors
from tdabench.errors import DataError, MissingExtra, TdabenchError, UsageError, one_line

SECONDS = 1800.0
_POLL = 0.02
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def limited(
    function: str,
    arguments: Mapping[str, Any],
    *,
    what: str,
    seconds: float | None = None,
    memory: int | None = None,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> Any:
    """Returns the result of `function` ("module:name"), called with keyword `arguments` elsewhere.

    `what` names the thing in messages. `seconds` and `memory` (bytes) lower the limits.
    `on_wait(seconds)` is called several times per second with the time since the start. Raises the
    TdabenchError that the function raised, and DataError if it hit a limit, crashed or raised
    anything else.
    """
    seconds, memory = seconds_limit(seconds), allowed_memory(memory)
    with tempfile.TemporaryDirectory(prefix="tdabench-") as folder:
        place, printed = Path(folder) / "result.json", Path(folder) / "printed"
        job = {"function": function, "arguments": dict(arguments), "result": str(place),
               "memory": memory, "parent": os.getpid()}  # fmt: skip
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path)}
        with open(printed, "wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "tdabench.limited", json.dumps(job)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env,
                start_new_session=True,
            )  # fmt: skip
        try:
            verdict = _watch(process, seconds, memory, on_wait)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if verdict:
            raise DataError(f"{what} {verdict}", "Do you trust it? See TDABENCH_LOAD_SECONDS and "
                            "TDABENCH_LOAD_MEMORY")  # fmt: skip
        try:
            result = json.loads(place.read_text("utf-8"))
        except (OSError, ValueError) as e:
            raise DataError(f"{what} {_death(process.returncode, printed)}") from e
    if "error" in result:
        raise _error(result["error"], what)
    return result["value"]


def seconds_limit(wanted: float | None = None) -> float:
    """Returns TDABENCH_LOAD_SECONDS if it is set, else `wanted` up to its default; inf for none."""
    text = os.environ.get("TDABENCH_LOAD_SECONDS", "")
    try:
        most = float(text) if text else SECONDS
    except ValueError:
        raise UsageError(f"TDABENCH_LOAD_SECONDS={text!r} is not a number of seconds") from None
    if most <= 0:
        return float("inf")
    return most if text or wanted is None else wanted


def allowed_memory(wanted: int | None = None) -> int:
    """Returns TDABENCH_LOAD_MEMORY in bytes if set, else `wanted` up to 90% of free memory."""
    text = os.environ.get("TDABENCH_LOAD_MEMORY", "").strip().upper()
    if text:
        number, unit = text.rstrip("IB"), 1
        if number[-1:] in _UNITS:
            number, unit = number[:-1], _UNITS[number[-1]]
        try:
            return int(float(number) * unit)
        except (ValueError, OverflowError):
            raise UsageError(f"TDABENCH_LOAD_MEMORY={text!r} is not a size such as 4G") from None
    free = _free()
    most = int(0.9 * free) if free else 0
    return min(wanted, most) if wanted and most else wanted or most


def _free() -> int:
    """Returns available memory in bytes; 0 if the system does not report it."""
    try:
        with open("/proc/meminfo") as f:
            for line in f:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _watch(
    process: subprocess.Popen[bytes],
    seconds: float,
    memory: int,
    on_wait: Callable[[float], None],
) -> str:
    """Waits for the process; returns why it was killed, or ""."""
    start = time.monotonic()
    while True:
        try:
            process.wait(_POLL)
            return ""
        except subprocess.TimeoutExpired:
            pass
        on_wait(time.monotonic() - start)
        if time.monotonic() - start > seconds:
            return f"took longer than {seconds:g} s to read"
        used = _held(process.pid)
        if memory and used > memory:
            return f"took more than the {memory / 2**30:.2f} GiB of memory allowed to read it"


def _held(pid: int) -> int:
    """Returns memory that a process cannot release, in bytes; 0 without /proc."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = (line.split() for line in text.splitlines())
    return sum(int(x[1]) * 1024 for x in lines if x and x[0] in ("RssAnon:", "RssShmem:"))


def _death(code: int, printed: Path) -> str:
    if code == -signal.SIGKILL:
        return "cannot be read: its reader was killed, most likely for its memory use"
    lines = printed.read_bytes()[-4000:].decode("utf-8", "replace").strip().splitlines()
    said = f": {one_line(lines[-1])[:300]}" if lines else ""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"crashes its reader ({signal.Signals(-code).name}){said}"
    return f"cannot be read: its reader ended with status {code}{said}"


# --------------------------------------------------------------------------- in the process


def _told(e: BaseException) -> dict[str, Any]:
    if isinstance(e, TdabenchError):
        kind = type(e).__name__
        return {"kind": kind, "message": e.message, "remedy": e.remedy,
                "extra": getattr(e, "extra", "")}  # fmt: skip
    text = (str(e).strip().splitlines() or [""])[0][:300]
    if isinstance(e, MemoryError) or "can't allocate memory" in text:
        return {"kind": "", "message": "cannot be read: there is not enough memory for it"}
    return {"kind": "", "message": f"cannot be read: {text or type(e).__name__}"}


def _error(told: Mapping[str, Any], what: str) -> TdabenchError:
    message, remedy = str(told["message"]), str(told.get("remedy", ""))
    if not told["kind"]:
        return DataError(f"{what} {message}", remedy)
    if told["kind"] == "MissingExtra":
        error = MissingExtra("", str(told.get("extra", "")))
        error.message, error.remedy = message, remedy
        error.args = (message,)
        return error
    kind = getattr(errors, str(told["kind"]), DataError)
    plain = (UsageError, errors.GuardError, errors.MethodError)
    return kind(message, remedy) if kind in plain else DataError(message, remedy)


def _main(job: Mapping[str, Any]) -> None:
    _follow(int(job["parent"]))
    if job["memory"] and not _held(os.getpid()):  # without a watchdog: the system's limit
        with contextlib.suppress(ImportError, ValueError, OSError):
            import resource

            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (int(job["memory"]), hard))
    module, _, name = str(job["function"]).partition(":")
    try:
        value = getattr(importlib.import_module(module), name)(**job["arguments"])
        result = {"value": value}
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic of a Rust library is not an Exception
        result = {"error": _told(e)}
    place = Path(str(job["result"]))
    half = place.with_suffix(".half")
    half.write_text(json.dumps(result), "utf-8")
    os.replace(half, place)


def _follow(parent: int) -> None:
    """Makes this process die with its parent, if the system supports it."""
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
