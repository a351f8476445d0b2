"""Suites with files from elsewhere: fetched once, and written as a suite of local paths.

A suite may name a hub repository or a package instead of a path (`hub:`, `package:`, `model`), and
a truth in the published layout. `resolve` fetches these files, pins revisions, converts such
truths, and writes a suite file with only local paths into the cache. Everything after it, including
worker processes, sees an ordinary suite.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tdabench.data.hub import Fetched, find
from tdabench.errors import DataError, TdabenchError, UsageError
from tdabench.io import cache_folder, fingerprint, sha256_kept
from tdabench.registry import registry
from tdabench.run.suite import Suite
from tdabench.run.suite_file import FETCHED, read_suite, read_toml, write_suite
from tdabench.targets.target import TOKENIZER_FILES

CORPUS_FILES = ("file", "train_file", "queries_file", "tuning_queries_file")


def load_suite(
    name: str | Path, data_dir: Path | None = None, targets: Sequence[str] | None = None
) -> Suite:
    """Loads a suite by name or file, with all its files on this machine.

    Files from the hub or a package are fetched, or taken from `data_dir`; the returned suite is
    then the copy in the cache that names only paths. `targets` are the labels that will be used, ()
    for the main ones: other targets with a `model` are then left out and not opened. By default
    every target is opened that can be. Raises UsageError for an unknown name or for files that
    cannot be fetched, and DataError for a malformed file.
    """
    suite = read_suite(suite_path(name))
    if not suite.fetched:
        return suite
    if targets is not None:
        chosen = [suite.target(t) for t in targets] or list(suite.main_targets)
        targets = [t.label for t in chosen] if targets or len(chosen) < len(suite.targets) else None
    return resolve(suite, data_dir, targets)


def suite_path(name: str | Path) -> Path:
    """Returns the file of a suite, given by name or as a file or folder. Raises UsageError."""
    text = str(name)
    if text.endswith(".toml") or "/" in text or "\\" in text:
        path = Path(text)
        if path.is_dir():
            path = path / "suite.toml"
        if not path.is_file():
            raise UsageError(f"there is no suite file {path}", "List suites: tdabench suites")
        return path
    return Path(registry().suite(text).value)


def resolve(
    suite: Suite, data_dir: Path | None = None, targets: Sequence[str] | None = None
) -> Suite:
    """Returns the suite with all its files on this machine, and of models only those of `targets`.

    `data_dir`, or TDABENCH_DATA_DIR, is searched before the hub (see `tdabench.data.hub`). An
    unavailable asset is left out, and methods that need it become rows that say so. A target whose
    model or truth is unavailable is left out if another remains. Any other missing file raises
    UsageError, DataError or MissingExtra.
    """
    data_dir = data_folder(data_dir)
    return write_suite(resolved(read_toml(suite.path), suite.path.parent, data_dir, targets))


def data_folder(data_dir: Path | None) -> Path | None:
    """Returns `data_dir`, or the folder that TDABENCH_DATA_DIR names. Raises UsageError."""
    if data_dir is None and os.environ.get("TDABENCH_DATA_DIR"):
        data_dir = Path(os.environ["TDABENCH_DATA_DIR"]).expanduser()
    if data_dir is not None and not data_dir.is_dir():
        raise UsageError(f"there is no folder {data_dir}", "Correct --data-dir")
    return data_dir


def resolved(
    data: dict[str, Any],
    near: Path,
    data_dir: Path | None = None,
    targets: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Returns the tables of a suite file with every file as an absolute path.

    With `targets`, other targets that name a model are left out, and an unavailable one of them
    raises its error.
    """
    data = json.loads(json.dumps(data, default=str))
    sources: dict[str, str] = {}

    def fetch(value: str, kind: str = "dataset") -> str:
        found = fetched(value, near, data_dir, kind)
        if value.startswith(FETCHED):
            sources[value] = found.pinned
        return str(found.path)

    corpus = data["corpus"]
    for key in CORPUS_FILES:
        if key in corpus:
            corpus[key] = fetch(corpus[key])
    missing = []

    def assets(table: dict[str, str]) -> None:
        for name, value in list(table.items()):
            try:
                table[name] = fetch(value, "model")
            except TdabenchError as e:
                del table[name]
                missing.append(f"the asset {name!r} is left out: {e}")

    assets(data.setdefault("assets", {}))
    declared = data.get("hashes", {})
    data["hashes"] = {
        str((near / k).absolute()): v for k, v in declared.items() if not k.startswith(FETCHED)
    }
    for key in ("files", "resolved"):
        data.pop(key, None)

    def find_target(target: dict[str, Any]) -> None:
        if "model" in target:
            _check_hashes(target["model"], declared)
            _open_target(target, near, data_dir)
        else:
            target["folder"] = fetch(target["folder"], "model")
        for name, value in target.get("truths", {}).items():
            target["truths"][name] = fetch(value) if _is_there(value, near) else str(near / value)
        for spec in target.get("imports", {}).values():
            if "masks" in spec:
                spec["masks"] = fetch(spec["masks"])

    kept, errors, gone = [], [], set()
    for target in data["targets"]:
        if targets is not None and "model" in target and target["label"] not in targets:
            gone.add(target["label"])
            continue
        try:
            find_target(target)
        except TdabenchError as e:
            if target["label"] in (targets or ()):
                raise
            errors.append((target["label"], e))
            continue
        assets(target.setdefault("assets", {}))
        kept.append(target)
    if errors and not kept:
        raise errors[0][1]
    missing += [f"the target {label!r} is left out: {e}" for label, e in errors]
    gone |= {label for label, _ in errors}
    data["tuned"] = {k: v for k, v in data.get("tuned", {}).items() if k not in gone}
    data["targets"] = kept
    _chunk_corpus(data)
    _convert_truths(data)
    if sources or missing:
        data["resolved"] = {"sources": sources, "missing": missing}
    return data


def _is_there(value: str, near: Path) -> bool:
    """Tells whether a truth exists; a planned truth need not be built yet."""
    return value.startswith(FETCHED) or (near / value).exists()


def fetched(value: str, near: Path, data_dir: Path | None, kind: str) -> Fetched:
    """Calls `find`, but takes a source without prefix only as a path."""
    if value.startswith(FETCHED):
        return find(value, kind=kind, near=near, data_dir=data_dir)
    path = (near / value).absolute()
    if not path.exists():
        raise DataError(f"{path} is missing", "Correct the path in the suite")
    return Fetched(path, str(path))


def _check_hashes(model: str, hashes: Mapping[str, str]) -> None:
    """Raises DataError if a package's file that a suite declares is of another version.

    Before a model is converted, which takes a minute.
    """
    for source, wanted in hashes.items():
        if source.startswith(f"{model}/") and source.startswith("package:"):
            found = sha256_kept(find(source).path)
            if found != wanted:
                raise DataError(
                    f"{source} is of another version than the suite declares (sha256 "
                    f"{found[:12]}, expected {wanted[:12]})",
                    "Install the version that its documentation names",
                )


def _open_target(target: dict[str, Any], near: Path, data_dir: Path | None) -> None:
    from tdabench.targets.source import open_model

    opened = open_model(
        target.pop("model"), target.get("checkpoints"), near=near, data_dir=data_dir
    )
    length = target.get("max_length", 256)
    if opened.context_length is not None and length > opened.context_length:
        raise DataError(
            f"the target {target['label']!r}: max_length = {length} is more than the "
            f"{opened.context_length} positions of the model",
            f"Set it to {opened.context_length} or less",
        )
    target["folder"] = str(opened.folder)
    target["checkpoints"] = dict(opened.checkpoints)
    pins = [p if k == "base" else f"{k}: {p}" for k, p in opened.pinned.items()]
    target["source"] = "; ".join(pins)


def _convert_truths(data: dict[str, Any]) -> None:
    """Converts truths in the layouts of other projects to truth files, in the cache."""
    from tdabench.truth.exchange import import_truth

    published = [
        (target, name, target.get("imports", {}).get(name, {}))
        for target in data["targets"]
        for name, path in target.get("truths", {}).items()
        if path.endswith(".jsonl") or name in target.get("imports", {})
    ]
    for target in data["targets"]:
        target.pop("imports", None)
    if not published:
        return
    plain = {**data, "targets": [{**t, "truths": {}, "plans": {}} for t in data["targets"]]}
    suite = write_suite(plain)
    for target, name, spec in published:
        path = Path(target["truths"][name])
        masks = Path(spec["masks"]) if spec.get("masks") else None
        split = "tuning" if name == "tuning" or name.startswith("tuning-") else "test"
        sources = [f[0] for f in (suite.corpus.train, suite.corpus.queries) if f]
        key = fingerprint(
            [
                2, _content(path), split, data["corpus"], [_content(p) for p in sources],
                spec | {"masks": _content(masks) if masks else ""},
            ]
        )  # fmt: skip
        out = cache_folder() / "truths" / f"{path.stem}-{key}.safetensors"
        if not out.exists():
            import_truth(
                [path], suite.train, suite.queries(split),
                masks=masks, values=spec.get("values", ""), left_out=spec.get("left_out", False),
            ).save(out)  # fmt: skip
        target["truths"][name] = str(out)


def _chunk_corpus(data: dict[str, Any]) -> None:
    """Cuts the texts of a corpus with `chunk_tokens` into pieces, in the cache."""
    from tdabench.data.chunks import token_chunks
    from tdabench.data.files import read_corpus, write_lines
    from tdabench.data.layouts import Reading
    from tdabench.targets.tokenizer import load_tokenizer

    corpus = data["corpus"]
    size, rows = corpus.pop("chunk_tokens", 0), corpus.pop("chunk_rows", 1000)
    if not size:
        return
    folder = Path(data["targets"][0]["folder"])
    reading = Reading(layout=corpus.pop("layout", "text"), empty="keep")
    corpus.pop("empty", None)
    tokenizer: Any = None
    for key in CORPUS_FILES:
        if key not in corpus:
            continue
        source = Path(corpus[key])
        spelled = [_content(folder / f) for f in TOKENIZER_FILES if (folder / f).exists()]
        key_of = fingerprint([1, _content(source), reading.as_list(), size, rows, spelled])
        out = cache_folder() / "corpora" / f"{source.stem[:40]}-{key_of}.jsonl"
        if not out.exists():
            tokenizer = tokenizer or load_tokenizer(folder, data["targets"][0]["label"])
            texts = (e.response for e in read_corpus(source, reading))
            encode = partial(tokenizer.encode, add_special_tokens=False)
            plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
            decode = partial(tokenizer.decode, **plain)
            pieces = token_chunks(texts, encode, decode, size, rows)
            role = key.removesuffix("_file")
            write_lines(out, ({"id": f"{role}-{n}", "text": t} for n, t in enumerate(pieces)))
        corpus[key] = str(out)


def _content(path: Path) -> Any:
    if path.is_file():
        return sha256_kept(path)
    return [[p.name, sha256_kept(p)] for p in sorted(path.rglob("*")) if p.is_file()]


def derive_suite(suite: Suite, path: Path, change: Callable[[dict[str, Any]], None]) -> Suite:
    """Writes a copy of a suite file to `path` and returns it as a suite.

    The copy names every file by its absolute path; `change` edits its tables in place before they
    are written. Raises DataError if the tables are then not a suite.
    """
    data = resolved(read_toml(suite.path), suite.path.parent)
    change(data)
    return write_suite(data, path)
