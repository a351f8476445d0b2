"""From labels and teachers to an encoder folder with its record."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdabench.api import (
    Context,
    Corpus,
    DataError,
    GuardError,
    Recipe,
    Target,
    UsageError,
    fingerprint,
    named_seed,
    read_json,
    registry,
    sha256_file,
)
from tdabench_airrep.encoder import Encoder, Pooled, TextFormat, initial_encoder
from tdabench_airrep.labels import Draw, LabelJob, Labels
from tdabench_airrep.recipe import TrainConfig
from tdabench_airrep.train import Teacher, Trainer

__all__ = [
    "Body",
    "Stage",
    "TrainConfig",
    "blend",
    "join_labels",
    "make_teacher",
    "rebuild",
    "stages_of",
    "train_encoder",
    "train_stages",
]

FILES = ("config.json", "model.safetensors", "tokenizer.json", "airrep.json")


@dataclass(frozen=True, kw_only=True)
class Body:
    """What an encoder starts from, and how text is put to it."""

    init: str = "target:base"
    dim: int = 384
    layers: tuple[int, ...] = (-1,)
    spans: tuple[str, ...] = ("all",)
    attention: str = "own"
    normalise: bool = False
    text: str = ""
    max_tokens: int = 0
    side: str = "first"

    def encoder(self, target: Target, seed: int) -> Encoder:
        encoder = initial_encoder(
            self.init,
            target,
            dim=self.dim,
            pooled=Pooled(
                layers=self.layers,
                spans=self.spans,
                attention=self.attention,
                normalise=self.normalise,
            ),
            text=TextFormat(template=self.text) if self.text else None,
            seed=seed,
        )
        if self.max_tokens:
            encoder.text = replace(encoder.text, max_tokens=self.max_tokens)
        encoder.text = replace(encoder.text, side=self.side)
        return encoder


def join_labels(paths: Sequence[Path]) -> Labels | None:
    """Labels files over the same corpora as one, in the order given."""
    if not paths:
        return None
    parts = [Labels.load(p) for p in paths]
    first = parts[0]
    for path, part in zip(paths, parts):
        for key in ("target", "train", "dev"):
            if part.meta.get(key) != first.meta.get(key):
                raise DataError(f"{path} and {paths[0]} were made on another {key}")
    instances = tuple(i for part in parts for i in part.instances)
    cost = {
        k: sum(p.meta.get(k, 0) for p in parts) for k in ("seconds", "cpu_seconds", "retrainings")
    }
    return Labels(instances, first.n_train, first.n_dev, {**first.meta, **cost})


def blend(specs: Sequence[str]) -> Teacher | None:
    """The weighted mean of teachers, each row standardised; `FILE` or `FILE=WEIGHT`."""
    if not specs:
        return None
    total: np.ndarray | None = None
    parts, seconds = [], 0.0
    meta: dict[str, Any] = {}
    for spec in specs:
        path, _, weight = spec.partition("=")
        try:
            w = float(weight or 1.0)
        except ValueError as e:
            raise UsageError(f"the teacher's weight {weight!r} is not a number") from e
        teacher = Teacher.load(Path(path))
        asked = np.ix_(teacher.rows, teacher.columns)
        known = teacher.scores[asked].astype(np.float32)
        known = known - known.mean(1, keepdims=True)
        known /= np.maximum(known.std(1, keepdims=True), 1e-20)
        rows = np.full(teacher.scores.shape, np.nan, dtype=np.float32)
        rows[asked] = known
        total = w * rows if total is None else total + w * rows
        parts.append({**teacher.meta, "weight": w})
        seconds += float(teacher.meta.get("seconds", 0.0))
        for key in ("target", "train", "dev"):
            if meta.setdefault(key, teacher.meta.get(key)) != teacher.meta.get(key):
                raise DataError(f"the teacher {path} scored another {key} than the first")
    assert total is not None
    return Teacher(total, {**meta, "parts": parts, "seconds": seconds})


def train_encoder(
    *,
    target: Target,
    train: Corpus,
    dev: Corpus,
    label_files: Sequence[Path],
    teacher_files: Sequence[str],
    body: Body,
    config: TrainConfig,
    out: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Trains, writes the encoder to `out` and returns its record.

    The record's `cost` is what a board shows as the prepare phase: the seconds of labels, teachers
    and training together, and the retrainings behind the labels.
    """
    labels, teacher = join_labels(label_files), blend(teacher_files)
    if labels is not None and labels.meta.get("target") not in (None, target.fingerprint):
        say("note: the labels were made on another target than the one given")
    earlier = None
    if (Path(body.init) / "airrep.json").exists():
        earlier = read_json(Path(body.init) / "airrep.json")
        config = replace(config, whiten=False)  # its projection is what is to be trained on
    encoder = body.encoder(target, config.seed)
    trainer = Trainer(encoder, train, dev, config, out, labels=labels, teacher=teacher, say=say)
    trainer.run()
    measured = [row for row in trainer.curve if row["stage"] != "start"]
    best = max(measured, key=lambda r: r.get("lds", r.get("kernel", -r["loss"])), default={})
    # Processor time where it is known: what else ran on the machine does not count.
    label_seconds = 0.0
    if labels is not None:
        label_seconds = float(labels.meta.get("cpu_seconds") or labels.meta.get("seconds", 0.0))
    teacher_seconds = float(teacher.meta.get("seconds", 0.0)) if teacher else 0.0
    train_seconds = trainer.seconds
    if earlier is not None:
        before = earlier.get("cost", {})
        train_seconds += before.get("train_seconds", 0.0)
        if teacher is None or earlier.get("teacher") != dict(teacher.meta):
            teacher_seconds += before.get("teacher_seconds", 0.0)
        if labels is None or earlier.get("labels") != _label_record(labels, label_files):
            label_seconds += before.get("label_seconds", 0.0)
    record: dict[str, Any] = {
        "schema": 1,
        "earlier": earlier,
        # A path is of no use elsewhere: what was at it is under "earlier".
        "body": {**asdict(body), "init": "earlier" if earlier is not None else body.init},
        "recipe": asdict(config),
        "target": {
            "name": target.name,
            "regime": target.regime,
            "fingerprint": target.fingerprint,
        },
        "corpora": {"train": train.fingerprint, "dev": dev.fingerprint},
        "labels": _label_record(labels, label_files),
        "teacher": dict(teacher.meta) if teacher else None,
        "best": best,
        "curve": trainer.curve,
        "cost": {
            "seconds": round(label_seconds + teacher_seconds + train_seconds, 1),
            "retrainings": labels.retrainings if labels else 0,
            "label_seconds": round(label_seconds, 1),
            "teacher_seconds": round(teacher_seconds, 1),
            "train_seconds": round(train_seconds, 1),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    encoder.save(out, record)
    return {**record, "bytes": sum((out / f).stat().st_size for f in FILES)}


def _label_record(labels: Labels | None, files: Sequence[Path]) -> dict[str, Any] | None:
    if labels is None:
        return None
    kept = {
        k: labels.meta[k] for k in ("target", "target_name", "draw", "recipe") if k in labels.meta
    }
    return {
        **kept,
        "sha256": [sha256_file(p) for p in files],
        "instances": len(labels.instances),
        "excluded": labels.excluded(),
    }


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training among those that make an encoder: each begins where the last one ended.

    `labels` and `teacher` say whether it is given those; `body.init` counts in the first only.
    """

    body: Body
    config: TrainConfig
    labels: bool
    teacher: bool


def stages_of(record: Mapping[str, Any]) -> list[Stage]:
    """The stages behind an encoder's record, first to last."""
    earlier = record.get("earlier")
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in record["body"].items()
    }
    here = Stage(
        body=Body(**fields),
        config=TrainConfig(**record["recipe"]),
        labels=bool(record["labels"]),
        teacher=bool(record["teacher"]),
    )
    return [*(stages_of(earlier) if earlier is not None else []), here]


def train_stages(
    stages: Sequence[Stage],
    *,
    target: Target,
    train: Corpus,
    dev: Corpus,
    label_files: Sequence[Path],
    teacher_files: Sequence[str],
    work: Path,
    out: Path | None = None,
    say: Callable[[str], None],
) -> Path:
    """Trains through the stages and returns the folder of the last encoder.

    A stage lies in `work` under a name made of everything that decides it, so that trainings which
    begin alike share their beginning, and a stage that is done is not trained again. The last one
    goes to `out` if given.
    """
    key: list[Any] = [target.fingerprint, train.fingerprint, dev.fingerprint]
    folder: Path | None = None
    for n, stage in enumerate(stages):
        labels = label_files if stage.labels else ()
        teachers = teacher_files if stage.teacher else ()
        files = [sha256_file(p) for p in labels] + [
            [sha256_file(Path(path)), weight]
            for path, _, weight in (t.partition("=") for t in teachers)
        ]
        recipe = {**asdict(stage.body), **asdict(stage.config), "files": files}
        if n:
            recipe.pop("init")
        key = [fingerprint(key), recipe]
        body = stage.body if folder is None else replace(stage.body, init=str(folder))
        last = n == len(stages) - 1
        folder = out if last and out is not None else work / f"stage-{fingerprint(key)}"
        if (folder / "airrep.json").exists() and folder.parent == work:
            say(f"{folder.name}: done before")
            continue
        train_encoder(
            target=target,
            train=train,
            dev=dev,
            label_files=labels,
            teacher_files=teachers,
            body=body,
            config=stage.config,
            out=folder,
            say=say,
        )
    if folder is None:
        raise UsageError("an encoder needs at least one stage of training")
    return folder


def rebuild(
    record: Mapping[str, Any],
    *,
    target: Target,
    train: Corpus,
    dev: Corpus,
    work: Path,
    out: Path,
    workers: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Makes the encoder of `record` again from the target and the corpora alone.

    Labels, teachers and each training stage go into `work` and are resumed from there. Raises
    GuardError when target or corpora are not those of the record.
    """
    check_source(record, target, train, dev)
    label_files, teacher_files = [], []
    if record["labels"]:
        made = record["labels"]
        if "draw" not in made or "recipe" not in made:
            raise UsageError(
                "the encoder's labels were imported: its record cannot say how to make them",
                "Train it again with: tdabench airrep train --labels",
            )
        draw = {**made["draw"], "instances": made["instances"]}
        draw["subset_sizes"] = tuple(draw["subset_sizes"])
        job = LabelJob(target, train, dev, Draw(**draw), Recipe(**made["recipe"]), work / "labels")
        job.run(workers, say)
        label_files.append(job.folder / "labels.safetensors")
    for part in (record["teacher"] or {}).get("parts", ()):
        asked = {k: part[k] for k in ("method", "params", "seed")}
        asked |= {k: part.get(k, 0) for k in ("n_dev", "n_train", "level")}
        path = work / f"teacher-{fingerprint(asked)}.safetensors"
        if not path.exists():
            make_teacher(**asked, target=target, train=train, dev=dev, say=say).save(path)
        teacher_files.append(f"{path}={part['weight']}")
    folder = train_stages(
        stages_of(record),
        target=target,
        train=train,
        dev=dev,
        label_files=label_files,
        teacher_files=teacher_files,
        work=work,
        out=out,
        say=say,
    )
    made = read_json(folder / "airrep.json")
    return {**made, "bytes": sum((folder / f).stat().st_size for f in FILES)}


def check_source(record: Mapping[str, Any], target: Target, train: Corpus, dev: Corpus) -> None:
    """Raises GuardError when an encoder was made of another target or other corpora than these."""
    for what, made, found in (
        ("target", record["target"]["fingerprint"], target.fingerprint),
        ("train corpus", record["corpora"]["train"], train.fingerprint),
        ("dev corpus", record["corpora"]["dev"], dev.fingerprint),
    ):
        if made != found:
            raise GuardError(f"the encoder was made of another {what} ({made}, here {found})")


def make_teacher(
    method: str,
    params: Mapping[str, str],
    seed: int,
    target: Target,
    train: Corpus,
    dev: Corpus,
    say: Callable[[str], None],
    n_dev: int = 0,
    n_train: int = 0,
    level: float = 0.0,
) -> Teacher:
    """Scores of the dev examples against the training corpus by another method.

    `level` divides each training example's scores by that power of their standard deviation over
    dev examples: the few with large gradients then speak no louder than the others (1), or less so.

    Of `n_dev` dev and `n_train` training examples drawn by the seed, where a method is too dear to
    score all (0). A curvature is then that of the training examples drawn.
    """
    rows, columns = (
        np.arange(len(corpus))
        if not 0 < n < len(corpus)
        else np.sort(
            np.random.default_rng(named_seed(seed, f"teacher-{what}")).choice(
                len(corpus), n, replace=False
            )
        )
        for what, corpus, n in (("dev", dev, n_dev), ("train", train, n_train))
    )
    chosen = registry().method(method).cls.from_params(params)
    began, last = time.process_time(), time.perf_counter()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.perf_counter() - last > 10:
            last = time.perf_counter()
            say(f"teacher {method}: {what} {done}/{total}")

    with tempfile.TemporaryDirectory() as scratch:
        context = Context(target, Path(scratch), seed=seed, progress=progress)
        found = chosen.build(context, train.subset(columns)).score(dev.subset(rows))
    if level:
        spread = found.std(0, dtype=np.float64)
        found = found / np.maximum(spread, 1e-6 * max(spread.max(), 1e-30)) ** level
    scores = np.full((len(dev), len(train)), np.nan, dtype=np.float32)
    scores[np.ix_(rows, columns)] = found
    meta = {
        "method": method,
        "params": {k: str(v) for k, v in chosen.params.items()},
        "seed": seed,
        "n_dev": len(rows),
        "n_train": len(columns),
        "level": level,
        "seconds": round(time.process_time() - began, 1),
        "target": target.fingerprint,
        "train": train.fingerprint,
        "dev": dev.fingerprint,
    }
    return Teacher(scores, meta)
