"""`tdabench doctor`: checks this machine for problems and suggests remedies."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from tdabench.cli.common import emit_json, json_option, plugin_options, print_table, use_plugins

# (distribution, purpose)
OPTIONAL = [
    ("traker", "comparison of TRAK with its authors' code"),
    ("sentence-transformers", "text encoders from the hub"),
    ("kronfluence", "influence functions by their authors' code"),
    ("dattri", "its methods and metrics, for comparison"),
    ("bergson", "gradient indices by their authors' code"),
    ("faiss-cpu", "approximate search"),
    ("ray", "truth builds on several machines"),
    ("matplotlib", "plots"),
    ("datasets", "corpora from the hub"),
    ("pyarrow", "Parquet corpora"),
    ("peft", "adapters other than plain LoRA"),
    ("gguf", "models in GGUF files"),
]
REQUIRED = (
    "torch", "transformers", "tokenizers", "numpy", "scipy", "safetensors", "pluggy", "click",
    "rich",
)  # fmt: skip

_UNUSED = 100 * 10**6  # bytes of CUDA libraries without a GPU from which on they are reported


@click.command(
    epilog="""\b
Example:
  tdabench doctor
Exits with 1 if a problem keeps tdabench from working.
"""
)
@plugin_options
@json_option
def command(as_json: bool) -> int:
    """Check this machine for problems."""
    from tdabench.registry import configuration

    if not configuration()["disabled"]:
        use_plugins((), configuration()["modules"])
    checks = [*environment(), *packages(), *machine(), *found_plugins(), *suites()]
    if as_json:
        emit_json([dict(zip(("status", "what", "found", "remedy"), c)) for c in checks])
    else:
        print_table(
            ["", "what", "found"],
            [
                (s, what, found + (f". {remedy}" if remedy else ""))
                for s, what, found, remedy in checks
            ],
        )
    return 1 if any(c[0] == "wrong" for c in checks) else 0


Check = tuple[str, str, str, str]  # status (ok, note, wrong), what, found, remedy


def environment() -> list[Check]:
    import tdabench
    from tdabench.run.environment import git_commit

    python = platform.python_version()
    old = sys.version_info < (3, 11)
    remedy = "tdabench needs Python 3.11 or newer" if old else ""
    where = str(Path(tdabench.__file__).parent)
    commit = git_commit()
    return [
        ("wrong" if old else "ok", "python", f"{python} at {sys.executable}", remedy),
        (
            "ok",
            "tdabench",
            f"{tdabench.__version__} at {where}" + (f", {commit}" * bool(commit)),
            "",
        ),
    ]


def packages() -> list[Check]:
    checks: list[Check] = []
    for name in REQUIRED:
        try:
            checks.append(("ok", name, version(name), ""))
        except PackageNotFoundError:
            checks.append(("wrong", name, "missing", f"pip install {name}"))
    for name, purpose in OPTIONAL:
        try:
            checks.append(("ok", name, version(name), ""))
        except PackageNotFoundError:
            checks.append(("note", name, f"not installed: {purpose}", f"pip install {name}"))
    return [*checks, *unrelated_trak(), *unused_cuda()]


def unused_cuda() -> list[Check]:
    """Reports libraries of CUDA on a machine without a GPU: PyPI's torch for Linux brings them."""
    from tdabench.run import environment as env

    if env.gpu():
        return []
    size = 0
    for package in distributions():
        name = (package.metadata["Name"] or "").lower()
        whole = name == "triton" or name.startswith(("nvidia-", "cuda-"))
        if whole or name == "torch":
            parts = package.files or ()
            size += sum(f.size or 0 for f in parts if whole or "torch_cuda" in f.name)
    if size < _UNUSED:
        return []
    found = f"{size / 1e9:.1f} GB of CUDA libraries serve nothing here: there is no GPU"
    return [("note", "cuda", found, "Install torch's CPU build: README, Start")]


def unrelated_trak() -> list[Check]:
    """Detects the unrelated PyPI package `trak`, which has the import name of TRAK's `traker`.

    Checks the installed distributions, and whether the folder that `import trak` would load
    contains traker's projectors.
    """
    remedy = "pip uninstall trak && pip install --force-reinstall --no-deps traker"
    try:
        found = version("trak")
        return [("wrong", "trak", f"the package trak {found} is not TRAK and hides it", remedy)]
    except PackageNotFoundError:
        pass
    try:
        spec = find_spec("trak")
    except (ImportError, ValueError):
        spec = None
    places = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    if places and not any((p / "projectors.py").exists() for p in places):
        return [("wrong", "trak", f"{places[0]} is not TRAK (traker) and hides it", remedy)]
    return []


def machine() -> list[Check]:
    from tdabench.run import environment as env

    free = shutil.disk_usage(Path.cwd()).free
    memory, available = env.memory_bytes(), env.available_bytes()
    gpu = env.gpu()
    checks: list[Check] = [
        ("ok", "processor", f"{env.hardware()['cpu']}, {env.cores()} cores", ""),
        (
            "note" if 0 < available < 2 * 2**30 else "ok",
            "memory",
            f"{memory / 2**30:.1f} GiB, {available / 2**30:.1f} GiB free",
            "A run may run out of memory" if 0 < available < 2 * 2**30 else "",
        ),
        (
            "note" if free < 2**30 else "ok",
            "disk",
            f"{free / 2**30:.1f} GiB free in {Path.cwd()}",
            "Indices are large: use --no-keep-indices or another --out" if free < 2**30 else "",
        ),
    ]
    if gpu and find_spec("torch") is not None and "+cpu" in version("torch"):
        checks.append(("note", "device", f"{gpu}, but torch is built for CPU only", ""))
    else:
        checks.append(("ok", "device", gpu or "no GPU: everything runs on the CPU", ""))
    return [*checks, *threads(), *limits(), *run_folder(), *hub()]


def threads() -> list[Check]:
    """Checks that waiting threads do not spin, which starves workers on a shared machine."""
    from tdabench.run import environment as env

    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy and policy.lower() != "passive":
        found = f"OMP_WAIT_POLICY={policy}: threads spin while they wait"
        return [("note", "threads", found, "Unset it if other work shares the cores")]
    try:
        load = os.getloadavg()[0]
    except (OSError, AttributeError):
        load = 0.0
    if load > env.cores() + 1:
        found = f"load {load:.1f} on {env.cores()} cores: times will be distorted"
        return [("note", "threads", found, "Scores do not change; measure costs when idle")]
    return [("ok", "threads", f"{env.cores()} per worker with --jobs 1, load {load:.1f}", "")]


def limits() -> list[Check]:
    """Reports limits that the shell or the system sets on this process."""
    try:
        import resource
    except ImportError:
        return [("ok", "limits", "unknown on this system", "")]

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if size != resource.RLIM_INFINITY and size < 1 << 30:
        found = f"files are limited to {size / 2**20:.0f} MiB"
        return [("note", "limits", found, "ulimit -f unlimited")]
    if 0 < files < 256:
        return [("note", "limits", f"only {files} open files", "ulimit -n 1024")]
    return [("ok", "limits", f"{files} open files, files of any size", "")]


def run_folder() -> list[Check]:
    """Checks that write, sync, rename and lock work where the run folder will be."""
    folder = Path("runs") if Path("runs").is_dir() else Path.cwd()
    what = "run folder"
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix=".tdabench-doctor-")
        place = Path(name)
        try:
            os.write(handle, b"tried")
            os.fsync(handle)
            os.replace(place, place.with_suffix(".renamed"))
            place = place.with_suffix(".renamed")
            locks = _locks(handle)
        finally:
            os.close(handle)
            place.unlink(missing_ok=True)
    except OSError as e:
        remedy = "Run elsewhere, or give --out"
        return [("wrong", what, f"{folder.resolve()} is not writable: {e.strerror}", remedy)]
    if not locks:
        found = f"{folder.resolve()} is writable, but its file system has no locks"
        return [("note", what, found, "Never start two runs on one folder")]
    return [("ok", what, f"{folder.resolve()} is writable and locks", "")]


def _locks(handle: int) -> bool:
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def hub() -> list[Check]:
    """Reports how the Hugging Face hub is reached, without using the network."""
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    kept = f"downloads are kept in {cache}"
    if os.environ.get("HF_HUB_OFFLINE", "") in ("1", "ON", "YES", "TRUE"):
        kept = f"offline (HF_HUB_OFFLINE): only files in {cache} are available"
    if os.environ.get("HF_TRUST_REMOTE_CODE"):
        return [("note", "hub", "HF_TRUST_REMOTE_CODE is set; tdabench never runs model code", "")]
    return [("ok", "hub", kept, "")]


def found_plugins() -> list[Check]:
    from tdabench.registry import registry

    if not registry().plugins:
        remedy = "Install tdabench: pip install -e ."
        return [("wrong", "plugins", "no plugin is registered", remedy)]
    checks: list[Check] = []
    for p in registry().plugins:
        if p.status == "broken":
            remedy = f"Leave it out: --no-plugin {p.origin.plugin}"
            checks.append(("wrong", f"plugin {p.origin}", "; ".join(p.problems), remedy))
    for line in registry().clashes:
        checks.append(("wrong", "names", line, "Leave one plugin out with --no-plugin"))
    working = [p for p in registry().plugins if p.status == "ok"]
    brought = f"{len(registry().methods)} methods, {len(registry().benchmarks)} benchmarks"
    return [("ok", "plugins", f"{len(working)} work, with {brought}", ""), *checks]


def suites() -> list[Check]:
    from tdabench.errors import TdabenchError
    from tdabench.registry import registry
    from tdabench.run.suite_file import read_suite

    checks: list[Check] = []
    for name, entry in registry().suites.items():
        try:
            suite = read_suite(entry.value)
            for path in suite.hashes:
                suite.verify(path)
            found: Any = f"version {suite.version}, {len(suite.hashes)} files match their hashes"
            checks.append(("ok", f"suite {name}", found, ""))
        except TdabenchError as e:
            checks.append(("wrong", f"suite {name}", e.message, e.remedy))
    return checks
