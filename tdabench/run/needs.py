"""Files that a suite needs from elsewhere, and whether they are here. Fetches nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tdabench.data.hub import MODEL_FILES, find
from tdabench.errors import DataError, TdabenchError
from tdabench.run.sources import CORPUS_FILES, data_folder, fetched
from tdabench.run.suite_file import FETCHED, read_suite, read_toml


@dataclass(frozen=True)
class Need:
    """One file or folder that a suite names.

    `role` is what it is for, `target` the label of the target that it belongs to (or ""). `place`
    is the name that it would have under --data-dir, `bytes` its size, or the approximate size that
    the suite states (0: not known). `state` is "here", "missing", or "not built" for a truth that
    the suite's plan builds; `problem` says why. Without an `optional`
    one only some methods are skipped.
    """

    role: str
    source: str
    target: str = ""
    state: str = "missing"
    path: str = ""
    place: str = ""
    bytes: int = 0
    about: str = ""
    problem: str = ""
    optional: bool = False


def needs_of(path: Path, data_dir: Path | None = None, ask_hub: bool = False) -> list[Need]:
    """Lists what the suite file at `path` names, in the order in which a run needs it.

    With `ask_hub`, the hub is asked for the sizes of files that are missing; nothing is downloaded.
    Raises DataError for a malformed suite and UsageError for a `data_dir` that does not exist.
    """
    suite, data_dir = read_suite(path), data_folder(data_dir)
    stated = {f.source: f for f in suite.files}
    out = []
    for role, source, kind, target, optional, planned in _named(read_toml(suite.path)):
        known = stated.get(source) or stated.get(f"hub:{source}")
        about = known.about if known else ""
        found, problem = None, ""
        try:
            found = _here(source, kind, suite.path.parent, data_dir)
        except TdabenchError as e:
            problem = str(e)
        size = _size(found) if found else known.bytes if known else 0
        if ask_hub and not found:
            size = _size_on_hub(source, kind) or size
        state = "here" if found else "not built" if planned else "missing"
        out.append(
            Need(
                role, source, target, state, str(found or ""), _place(source, kind), size,
                about, problem, optional,
            )
        )  # fmt: skip
    return out


def can_run(needs: list[Need]) -> bool:
    """Tells whether a run can start: the corpus is here, and one whole target."""
    if any(n.state == "missing" for n in needs if not n.target and not n.optional):
        return False
    labels = {n.target for n in needs if n.target}
    broken = {n.target for n in needs if n.target and n.state == "missing" and not n.optional}
    return not labels or bool(labels - broken)


def _named(data: dict[str, Any]) -> Iterator[tuple[str, str, str, str, bool, bool]]:
    """Yields (role, source, kind, target, optional, planned) of every file in a suite's tables."""
    corpus = data["corpus"]
    for key in CORPUS_FILES:
        if key in corpus:
            yield "corpus" if key == "file" else key[:-5].replace("_", " "), corpus[key], \
                "dataset", "", False, False  # fmt: skip
    for target in data["targets"]:
        label, plans = target["label"], target.get("plans", {})
        if "model" in target:
            yield "model", target["model"], "model", label, False, False
            for name, source in target.get("checkpoints", {}).items():
                yield f"checkpoint {name}", source, "model", label, False, False
        else:
            yield "model", target["folder"], "folder", label, False, False
        for name, source in target.get("truths", {}).items():
            yield f"truth {name}", source, "dataset", label, False, name in plans
            if masks := target.get("imports", {}).get(name, {}).get("masks"):
                yield f"masks of {name}", masks, "dataset", label, False, False
        for name, source in target.get("assets", {}).items():
            yield f"asset {name}", source, "asset", label, True, False
    for name, source in data.get("assets", {}).items():
        yield f"asset {name}", source, "asset", "", True, False


def _here(source: str, kind: str, near: Path, data_dir: Path | None) -> Path:
    """Returns where a source is on this machine. Raises TdabenchError if it is not."""
    if kind in ("dataset", "folder", "asset") and not source.startswith(FETCHED):
        return fetched(source, near, data_dir, kind).path
    what = "dataset" if kind == "dataset" else "model"
    path = find(source, kind=what, near=near, data_dir=data_dir, local=True).path
    if kind == "model" and path.is_dir():
        weights = ("*.safetensors", "*.gguf", "adapter_config.json")
        if not any(next(path.glob(w), None) for w in weights):
            raise DataError(f"{path} holds no weights (safetensors, GGUF or an adapter)")
    return path


def _place(source: str, kind: str) -> str:
    """Returns the name of a source under --data-dir; "" for a path or a package."""
    if source.startswith("data:"):
        return source.removeprefix("data:")
    if source.startswith("package:") or (kind != "model" and not source.startswith("hub:")):
        return ""
    parts = source.removeprefix("hub:").partition("@")[0].split("/")
    return "/".join(parts[2:]) or "/".join(parts[1:2])


def _size_on_hub(source: str, kind: str) -> int:
    """Returns the size in bytes of a file or repository on the hub; 0 if the hub does not say."""
    if source.startswith(("data:", "package:")) or not _place(source, kind):
        return 0
    import huggingface_hub as hub

    text, _, revision = source.removeprefix("hub:").partition("@")
    parts = text.split("/")
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    what: dict[str, Any] = {
        "repo_type": "dataset" if kind == "dataset" else "model",
        "revision": revision or None,
    }
    try:
        if inside:
            found = hub.HfApi().get_paths_info(repository, [inside], **what)
            return sum(int(getattr(f, "size", 0) or 0) for f in found)
        info: Any = hub.HfApi().repo_info(repository, files_metadata=True, timeout=20, **what)
    except Exception:  # no network, no such repository: the list says that it is missing
        return 0
    used = [f for f in info.siblings or [] if any(fnmatch(f.rfilename, m) for m in MODEL_FILES)]
    return sum(int(f.size or 0) for f in used)


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
