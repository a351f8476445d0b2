"""`tdabench airrep`: labels, teachers, training, variants."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tdabench.api import Corpus, UsageError, read_jsonl, resumable

if TYPE_CHECKING:
    from tdabench.api import Recipe, Target


@click.group(name="airrep")
def airrep() -> None:
    """Make AirRep labels, train encoders and their variants."""


def say(line: str) -> None:
    """Prints progress on stderr."""
    click.echo(line, err=True)


def emit(value: Mapping[str, Any]) -> None:
    """Prints a result on stdout."""
    click.echo(json.dumps(value, sort_keys=True))


# --------------------------------------------------------------------------- where from


@dataclass(frozen=True)
class Source:
    """The target, the corpora for labels, and the suite's queries, which must not be in them."""

    target: Target
    train: Corpus
    dev: Corpus
    recipe: Recipe


def source_options(function: Any) -> Any:
    """Adds the options for target and corpora."""
    for option in (
        click.option("--suite", default="", help="Suite that provides target and corpus."),
        click.option("--target", required=True, help="A target of the suite, or its folder."),
        click.option("--corpus", default="", help="JSON lines (or .gz). Default: the suite's."),
        click.option("--pool-split", default="labels_pool", show_default=True),
        click.option("--dev-split", default="labels_dev", show_default=True),
        click.option("--max-length", default=128, show_default=True, help="For a target folder."),
        click.option("--template", default="plain", show_default=True, help="For a target folder."),
        click.option(
            "--recipe",
            default="",
            help="Changes to the target's recipe, such as lr=1e-3,epochs=2.",
        ),
    ):
        function = option(function)
    return function


def open_source(
    suite: str,
    target: str,
    corpus: str,
    pool_split: str,
    dev_split: str,
    max_length: int,
    template: str,
    recipe: str,
) -> Source:
    """Opens the source. Raises GuardError if the suite's queries are among the examples."""
    from tdabench.api import Target, check_disjoint, load_suite

    queries: list[Corpus] = []
    if suite:
        loaded = load_suite(suite, targets=(target,))
        declared = loaded.target(target)
        chosen = declared.target
        corpus = corpus or str(loaded.corpus.train[0])
        queries = [loaded.queries("test")]
    else:
        folder = Path(target)
        if not folder.is_dir():
            raise UsageError(
                f"there is no target folder {target}", "Give a folder, or --suite and its target"
            )
        found = {p.stem: p.name for p in sorted(folder.glob("*.safetensors"))}
        chosen = Target(
            name=folder.name,
            folder=folder,
            checkpoints={k: v for k, v in found.items() if k in ("base", "warm")} or found,
            regime=folder.name,
            template=template,
            max_length=max_length,
        )
    if not corpus:
        raise UsageError("a corpus is missing", "Pass --corpus FILE, or --suite")
    path = Path(corpus)
    train = read_jsonl(path, pool_split or None, pool_split)
    dev = read_jsonl(path, dev_split or None, dev_split)
    for q in queries:
        check_disjoint(train, q)
        check_disjoint(dev, q)
    return Source(chosen, train, dev, chosen.recipe.changed(recipe))


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(x) for x in text.split(",") if x)
    except ValueError as e:
        raise UsageError(f"{text!r} is not a list of integers") from e


# --------------------------------------------------------------------------- labels


@airrep.command()
@source_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder; resumable.")
@click.option("--instances", default=20, show_default=True)
@click.option("--subsets", default=32, show_default=True, help="Subsets per instance.")
@click.option("--pool-size", default=2000, show_default=True)
@click.option("--subset-size", default="1000", show_default=True, help="One or several, in turn.")
@click.option("--dev", default=500, show_default=True, help="Dev examples per instance.")
@click.option("--seed", default=0, show_default=True)
@click.option("--workers", default=1, show_default=True, help="Processes of one thread each.")
@click.option("--collect-only", is_flag=True, help="Collect finished retrainings only.")
@resumable()
def labels(
    out: Path,
    instances: int,
    subsets: int,
    pool_size: int,
    subset_size: str,
    dev: int,
    seed: int,
    workers: int,
    collect_only: bool,
    **source: Any,
) -> None:
    """Retrain the target on subsets; their losses are labels.

    Labels are losses of dev examples. After an interruption the same command resumes.
    `OUT/labels.safetensors` is updated after every instance.
    """
    import torch

    from tdabench_airrep.labels import Draw, LabelJob

    torch.set_num_threads(1)
    opened = open_source(**source)
    draw = Draw(
        instances=instances,
        subsets=subsets,
        pool_size=pool_size,
        subset_sizes=numbers(subset_size),
        dev=dev,
        seed=seed,
    )
    job = LabelJob(opened.target, opened.train, opened.dev, draw, opened.recipe, out)
    if collect_only:
        job.claim()
        job.collect().save(out / "labels.safetensors")
    else:
        say(
            f"{instances} instances x {subsets} subsets of {subset_size} from pools of "
            f"{pool_size}, {dev} dev examples each; target {opened.target.name}"
        )
        job.run(workers, say)
    made = job.collect()
    emit(
        {
            "labels": str(out / "labels.safetensors"),
            "instances": len(made.instances),
            "retrainings": made.retrainings,
            "seconds": made.meta["seconds"],
            "excluded": made.excluded(),
        }
    )


@airrep.command("import-labels")
@click.option("--index", type=click.Path(path_type=Path), required=True, help="Subset index lines.")
@click.option("--losses", type=click.Path(path_type=Path), required=True, help="Folder or lines.")
@click.option("--corpus", type=click.Path(path_type=Path), required=True)
@click.option("--split", default="", help="Split of the corpus to which the indices refer.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--allow-missing", is_flag=True, help="Leave out subsets without losses.")
def import_labels(
    index: Path, losses: Path, corpus: Path, split: str, out: Path, allow_missing: bool
) -> None:
    """Read labels in the layout of the public AirRep code."""
    from tdabench_airrep.reference import read_reference

    read = read_reference(
        index, losses, read_jsonl(corpus, split or None), allow_missing=allow_missing
    )
    read.save(out)
    emit(
        {
            "labels": str(out),
            "instances": len(read.instances),
            "retrainings": read.retrainings,
            "excluded": read.excluded(),
        }
    )


# --------------------------------------------------------------------------- training


def settings(method: str, pairs: Sequence[str]) -> dict[str, str]:
    """Parses `key=value` pairs of the parameters of one method."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"{pair!r} is not KEY=VALUE (a parameter of {method})")
        found[key.strip()] = value.strip()
    return found


@airrep.command()
@source_options
@click.option("--method", required=True, help="A method that scores examples, such as logra.")
@click.option("--set", "pairs", multiple=True, help="Its parameters, KEY=VALUE.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--dev", default=0, help="Dev examples to score, drawn by the seed; 0: all.")
@click.option("--pool", default=0, help="Training examples to score, drawn by the seed; 0: all.")
@click.option(
    "--level", default=0.0, help="Divide a training example's scores by this power of their spread."
)
@click.option("--seed", default=0, show_default=True)
def teacher(
    method: str,
    pairs: tuple[str, ...],
    out: Path,
    dev: int,
    pool: int,
    level: float,
    seed: int,
    **source: Any,
) -> None:
    """Score dev examples by another method, for distillation."""
    import torch

    from tdabench_airrep.teacher import make_teacher

    torch.set_num_threads(1)
    o = open_source(**source)
    made = make_teacher(
        method, settings(method, pairs), seed, o.target, o.train, o.dev, say, dev, pool, level
    )
    made.save(out)
    shape = [len(made.rows), len(made.columns)]
    emit({"teacher": str(out), "shape": shape, "seconds": made.meta["seconds"]})


def config_options(function: Any) -> Any:
    """Adds one option per field of the training recipe."""
    from tdabench_airrep.recipe import TrainConfig

    for f in reversed(fields(TrainConfig)):
        default: Any = f.default
        function = click.option(
            f"--{f.name.replace('_', '-')}", f.name, default=default, show_default=True
        )(function)
    return function


@airrep.command()
@source_options
@click.option("--labels", "label_files", multiple=True, type=click.Path(path_type=Path))
@click.option("--teacher", "teacher_files", multiple=True, help="FILE, or FILE=WEIGHT to blend.")
@click.option(
    "--init",
    default="",
    help="target:CHECKPOINT, scratch:WIDTHxLAYERS, hub:OWNER/NAME, minilm, a model's folder or an "
    "encoder's. Default: GTE-small if the hub is reachable, else target:base.",
)
@click.option("--dim", default=384, show_default=True, help="Width of the embeddings.")
@click.option("--layers", default="-1", show_default=True, help="Hidden states to pool.")
@click.option("--spans", default="all", show_default=True, help="Spans: all, response, error.")
@click.option("--attention", default="own", show_default=True, help="Attention: own or full.")
@click.option("--normalise/--no-normalise", default=False, help="Embeddings of equal length.")
@click.option("--text", default="", help="Template with {prompt} and {response}.")
@click.option("--max-tokens", default=0, help="Tokens kept per text; 0: the body's maximum.")
@click.option("--side", default="first", show_default=True, help="Tokens to keep: first or last.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder; resumable.")
@config_options
@resumable()
def train(
    label_files: tuple[Path, ...],
    teacher_files: tuple[str, ...],
    init: str,
    dim: int,
    layers: str,
    spans: str,
    attention: str,
    normalise: bool,
    text: str,
    max_tokens: int,
    side: str,
    out: Path,
    suite: str,
    target: str,
    corpus: str,
    pool_split: str,
    dev_split: str,
    max_length: int,
    template: str,
    recipe: str,
    **config: Any,
) -> None:
    """Train an encoder on labels.

    If a teacher is given, distillation from it comes first.
    """
    import torch

    from tdabench_airrep import pipeline
    from tdabench_airrep.loading import default_init

    torch.set_num_threads(1)
    opened = open_source(suite, target, corpus, pool_split, dev_split, max_length, template, recipe)
    record = pipeline.train_encoder(
        target=opened.target,
        train=opened.train,
        dev=opened.dev,
        label_files=label_files,
        teacher_files=teacher_files,
        body=pipeline.Body(
            init=init or default_init(say),
            dim=dim,
            layers=numbers(layers),
            spans=tuple(spans.split(",")),
            attention=attention,
            normalise=normalise,
            text=text,
            max_tokens=max_tokens,
            side=side,
        ),
        config=pipeline.TrainConfig(**config),
        out=out,
        say=say,
    )
    emit({"encoder": str(out), **{k: record[k] for k in ("best", "cost", "bytes")}})


@airrep.command()
@source_options
@click.option(
    "--encoder",
    type=click.Path(path_type=Path),
    help="Encoder whose record to follow. Default: the suite's.",
)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Resumable.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--workers", default=1, show_default=True)
@resumable()
def rebuild(encoder: Path | None, work: Path, out: Path, workers: int, **source: Any) -> None:
    """Rebuild an encoder from its record.

    Repeats labels, teacher and every training stage.
    """
    import torch

    from tdabench.api import read_json
    from tdabench_airrep import pipeline

    torch.set_num_threads(1)
    o = open_source(**source)
    if encoder is None:
        if not source["suite"]:
            raise UsageError("an encoder is missing", "Pass --encoder DIR, or --suite")
        encoder = encoder_of(source["suite"], source["target"])
    record = pipeline.rebuild(
        read_json(encoder / "airrep.json"),
        target=o.target,
        train=o.train,
        dev=o.dev,
        work=work,
        out=out,
        workers=workers,
        say=say,
    )
    emit({"encoder": str(out), **{k: record[k] for k in ("best", "cost", "bytes")}})


# --------------------------------------------------------------------------- variants


@airrep.command()
@click.option("--suite", default="pocket", show_default=True)
@click.option("--target", required=True, help="A target of the suite.")
@click.option(
    "--encoder",
    type=click.Path(path_type=Path),
    help="Encoder whose recipe to vary. Default: the suite's.",
)
@click.option(
    "--labels",
    "label_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Default: the recipe's labels, made in WORK as by rebuild.",
)
@click.option(
    "--teacher",
    "teacher_files",
    multiple=True,
    help="FILE, or FILE=WEIGHT. Default: the recipe's teachers, made in WORK as by rebuild.",
)
@click.option("--instances", default="", help="Budgets: labelled instances, such as 1,2.")
@click.option("--subsets", default="", help="Budgets: subsets per instance, such as 12,24.")
@click.option("--steps", default=0, help="Maximum ranking steps; 0: the recipe's.")
@click.option("--distil-steps", default=0, help="Maximum distillation steps; 0: the recipe's.")
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder; resumable.")
@click.option("--workers", default=1, show_default=True, help="Processes for labels.")
@resumable()
def variants(
    suite: str,
    target: str,
    encoder: Path | None,
    label_files: tuple[Path, ...],
    teacher_files: tuple[str, ...],
    instances: str,
    subsets: str,
    steps: int,
    distil_steps: int,
    work: Path,
    workers: int,
) -> None:
    """Train variants of a recipe, as rows of a suite.

    Each variant lacks one part of the recipe. Writes WORK/suite.toml, a copy of the suite whose
    methods are the encoders. They are measured, tuned and compared like any other method:

    \b
      tdabench tune airrep-full --suite WORK/suite.toml --grid pooling=… --write
      tdabench run --suite WORK/suite.toml
      tdabench compare airrep-no-attention airrep-full

    With --instances and --subsets it also trains the recipe on fewer labels.
    """
    import torch

    from tdabench.api import load_suite, read_json
    from tdabench_airrep.pipeline import check_source, limited, materials, stages_of
    from tdabench_airrep.variants import train_variants, write_variants

    torch.set_num_threads(1)
    opened = load_suite(suite, targets=(target,))
    record = read_json((encoder or encoder_of(suite, target)) / "airrep.json")
    source = open_source(suite, target, "", "labels_pool", "labels_dev", 128, "plain", "")
    where: dict[str, Any] = {
        "target": source.target,
        "train": source.train,
        "dev": source.dev,
        "work": work,
        "say": say,
    }
    check_source(record, source.target, source.train, source.dev)
    asked = {"labels": label_files, "teacher": teacher_files}
    rest = {**record, **{k: None for k, given in asked.items() if given}}
    made_labels, made_teachers = materials(rest, workers=workers, **where)
    labels = list(label_files) or made_labels
    budgets = [(i, m) for i in numbers(instances) for m in numbers(subsets)]
    if (instances or subsets) and not budgets:
        raise UsageError("a budget needs --instances and --subsets", "Such as 1,2 and 12,24")
    if budgets and not labels:
        raise UsageError("the recipe has no labels to restrict to a budget", "Pass --labels FILE")
    encoders = train_variants(
        limited(stages_of(record), steps, distil_steps),
        label_files=labels,
        teacher_files=list(teacher_files) or made_teachers,
        budgets=budgets,
        **where,
    )
    written = write_variants(opened, target, encoders, work / "suite.toml")
    emit({"suite": str(written.path), "variants": list(written.default_methods)})


def encoder_of(suite: str, target: str) -> Path:
    """Returns the encoder that the suite ships for a target."""
    from tdabench.api import load_suite

    loaded = load_suite(suite, targets=(target,))
    assets = loaded.assets_for(loaded.target(target))
    if "airrep" not in assets:
        raise UsageError(f"the suite {suite} has no encoder for the target {target}")
    loaded.verify(assets["airrep"])
    return assets["airrep"]


if __name__ == "__main__":  # pragma: no cover
    sys.exit(airrep())
