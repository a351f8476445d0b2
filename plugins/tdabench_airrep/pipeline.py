"""Trains encoders from labels and teachers, and writes them with their records."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tdabench.api import (
    Corpus,
    DataError,
    GuardError,
    Recipe,
    Target,
    UsageError,
    check_free,
    fingerprint,
    read_arrays,
    read_json,
    sha256_file,
)
from tdabench_airrep.encoder import Encoder, Pooled, TextFormat
from tdabench_airrep.labels import Draw, LabelJob, Labels
from tdabench_airrep.loading import checkpoint_sha256, initial_encoder
from tdabench_airrep.recipe import TrainConfig
from tdabench_airrep.teacher import blend, make_teacher
from tdabench_airrep.train import Trainer

FILES = ("config.json", "model.safetensors", "tokenizer.json", "airrep.json")


@dataclass(frozen=True, kw_only=True)
class Body:
    """The initial model of an encoder, and its text format."""

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
    """Joins labels files over the same corpora, in the given order."""
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


def check_out(out: Path) -> None:
    """Raises UsageError if writing an encoder to `out` would overwrite other files."""
    ours = False
    try:
        record, checkpoint = out / "airrep.json", out / "checkpoint.safetensors"
        if record.is_file():
            found = read_json(record)
            ours = isinstance(found, dict) and {"cost", "recipe"} <= set(found)
        elif checkpoint.is_file():
            ours = read_arrays(checkpoint)[1].get("kind") == "airrep-checkpoint"
    except DataError:
        pass
    names = ["airrep.json", "config.json", "model.safetensors", "tokenizer.json"]
    check_free(out, [*names, "checkpoint.safetensors"], mine=ours)


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

    The record's `cost` is shown on boards as the prepare phase: the total seconds of labels,
    teachers and training, and the number of retrainings for labels.
    """
    check_out(out)
    labels, teacher = join_labels(label_files), blend(teacher_files)
    if labels is not None and labels.meta.get("target") not in (None, target.fingerprint):
        say("note: the labels were made on another target than the given one")
    earlier = None
    if (Path(body.init) / "airrep.json").exists():
        earlier = read_json(Path(body.init) / "airrep.json")
        config = replace(config, whiten=False)  # its projection is trained further
    encoder = body.encoder(target, config.seed)
    if config.train_body:
        encoder.shared = ""
    elif body.init.startswith("target:"):
        encoder.shared = body.init
        encoder.shared_sha256 = checkpoint_sha256(target, body.init.partition(":")[2])
    trainer = Trainer(encoder, train, dev, config, out, labels=labels, teacher=teacher, say=say)
    trainer.run()
    measured = [row for row in trainer.curve if row["stage"] != "start"]
    best = max(measured, key=lambda r: r.get("lds", r.get("kernel", -r["loss"])), default={})
    # Processor time if known, which excludes other work on the machine.
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
        # A path is useless on other machines: its contents are recorded under "earlier".
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
    """One of the training stages of an encoder; each begins where the previous one ended.

    `labels` and `teacher` say whether the stage uses them; `body.init` counts only in the first.
    """

    body: Body
    config: TrainConfig
    labels: bool
    teacher: bool


def stages_of(record: Mapping[str, Any]) -> list[Stage]:
    """Returns the stages in an encoder's record, first to last."""
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


def untrained(folder: Path, target: Target, device: str, dtype: str) -> Encoder:
    """Makes the encoder that the training of the encoder in `folder` began with, frozen.

    Its projection is random. Raises DataError if the folder does not record how it was trained.
    """
    try:
        first = stages_of(read_json(Path(folder) / "airrep.json"))[0]
    except (KeyError, TypeError) as e:
        raise DataError(
            f"the encoder in {folder} does not record how it was trained: {e!r}",
            "Give an encoder of tdabench airrep train",
        ) from e
    encoder = first.body.encoder(target, first.config.seed)
    return encoder.to(device=device, dtype=getattr(torch, dtype)).requires_grad_(False)


def limited(stages: Sequence[Stage], steps: int, distil_steps: int) -> list[Stage]:
    """Returns `stages` with limited steps of ranking and of distillation (0: no limit)."""

    def cut(c: TrainConfig) -> TrainConfig:
        return replace(
            c,
            steps=min(steps or c.steps, c.steps),
            distil_steps=min(distil_steps or c.distil_steps, c.distil_steps),
        )

    return [replace(s, config=cut(s.config)) for s in stages]


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

    A stage is in `work` under a name derived from everything that determines it, so that trainings
    with the same beginning share it, and a finished stage is not trained again. The last stage goes
    to `out` if given.
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
            say(f"{folder.name}: already trained")
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


def materials(
    record: Mapping[str, Any],
    *,
    target: Target,
    train: Corpus,
    dev: Corpus,
    work: Path,
    workers: int,
    say: Callable[[str], None],
) -> tuple[list[Path], list[str]]:
    """Makes the labels and teachers in an encoder's record, in the folder `work`.

    Returns the labels files and the teachers as `FILE=WEIGHT`. Files that exist in `work` are
    reused. Raises GuardError if target or corpora are not those in the record, UsageError for
    imported labels.
    """
    check_source(record, target, train, dev)
    label_files: list[Path] = []
    teacher_files: list[str] = []
    if record["labels"]:
        made = record["labels"]
        if "draw" not in made or "recipe" not in made:
            raise UsageError(
                "the encoder's labels were imported, so its record does not say how to make them",
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
    return label_files, teacher_files


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
    """Rebuilds the encoder of `record` from only the target and the corpora.

    Labels, teachers and each training stage go into `work` and are resumed from there. Raises
    GuardError if target or corpora are not those in the record.
    """
    label_files, teacher_files = materials(
        record, target=target, train=train, dev=dev, work=work, workers=workers, say=say
    )
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
    """Raises GuardError if an encoder was made from another target or other corpora."""
    for what, made, found in (
        ("target", record["target"]["fingerprint"], target.fingerprint),
        ("train corpus", record["corpora"]["train"], train.fingerprint),
        ("dev corpus", record["corpora"]["dev"], dev.fingerprint),
    ):
        if made != found:
            raise GuardError(f"the encoder was made from another {what} ({made}, here {found})")
