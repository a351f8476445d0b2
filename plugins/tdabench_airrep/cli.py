"""`tdabench airrep`: labels, training and studies."""

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
    from tdabench_airrep.studies import Setting


@click.group(name="airrep")
def airrep() -> None:
    """Make AirRep labels, train encoders, run studies."""


def say(line: str) -> None:
    """Progress, to stderr."""
    click.echo(line, err=True)


def emit(value: Mapping[str, Any]) -> None:
    """A result, to stdout."""
    click.echo(json.dumps(value, sort_keys=True))


# --------------------------------------------------------------------------- where from


@dataclass(frozen=True)
class Source:
    """The target, the corpora that labels are made on, and the suite's own queries to keep out."""

    target: Target
    train: Corpus
    dev: Corpus
    recipe: Recipe


def source_options(function: Any) -> Any:
    """Options that say which target and which corpora."""
    for option in (
        click.option("--suite", default="", help="Take target and corpus from this suite."),
        click.option("--target", required=True, help="A target of the suite, or its folder."),
        click.option("--corpus", default="", help="JSON lines (or .gz); default: the suite's."),
        click.option("--pool-split", default="labels_pool", show_default=True),
        click.option("--dev-split", default="labels_dev", show_default=True),
        click.option("--max-length", default=128, show_default=True, help="With a target folder."),
        click.option(
            "--template", default="plain", show_default=True, help="With a target folder."
        ),
        click.option(
            "--recipe", default="", help="Fine-tuning, e.g. lr=1e-3,epochs=2. Default: the truth's."
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
    """Raises GuardError when the suite's test or tuning queries are among the examples."""
    from tdabench.api import Target, Truth, check_disjoint, load_suite

    start: dict[str, Any] = {}
    queries: list[Corpus] = []
    if suite:
        loaded = load_suite(suite)
        declared = loaded.target(target)
        chosen = declared.target
        corpus = corpus or str(loaded.corpus.train[0])
        queries = [loaded.queries("test")]
        truth = declared.truths.get("lds")
        if truth is not None and truth.exists():
            start = dict(Truth.load(truth).plan.get("recipe", {}))
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
        raise UsageError("no corpus is given", "Pass --corpus FILE, or --suite")
    path = Path(corpus)
    train = read_jsonl(path, pool_split or None, pool_split)
    dev = read_jsonl(path, dev_split or None, dev_split)
    for q in queries:
        check_disjoint(train, q)
        check_disjoint(dev, q)
    return Source(chosen, train, dev, make_recipe(recipe, start))


def make_recipe(text: str, start: Mapping[str, Any]) -> Recipe:
    """`lr=1e-3,epochs=2` over the defaults in `start`."""
    from tdabench.api import Recipe

    known = {f.name: f for f in fields(Recipe)}
    values = dict(start)
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise UsageError(f"unknown recipe key {key!r}", f"Known: {', '.join(known)}")
        kind: Any = type(known[key].default)
        try:
            values[key] = kind(value)
        except ValueError as e:
            raise UsageError(f"recipe {key} = {value!r} is not of the type {kind.__name__}") from e
    return Recipe(**values)


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
@click.option("--subsets", default=32, show_default=True, help="Subsets an instance.")
@click.option("--pool-size", default=2000, show_default=True)
@click.option("--subset-size", default="1000", show_default=True, help="One, or several to cycle.")
@click.option("--dev", default=500, show_default=True, help="Dev examples an instance.")
@click.option("--seed", default=0, show_default=True)
@click.option("--workers", default=1, show_default=True, help="Processes, one thread each.")
@click.option("--collect-only", is_flag=True, help="Gather what is finished, retrain nothing.")
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
    """Retrain the target on subsets and store the dev losses as labels.

    Stopped at any point, the same command goes on where it was. `OUT/labels.safetensors` is
    brought up to date after every instance.
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
@click.option("--split", default="", help="Split of the corpus that the indices count in.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--allow-missing", is_flag=True, help="Leave out subsets without losses.")
def import_labels(
    index: Path, losses: Path, corpus: Path, split: str, out: Path, allow_missing: bool
) -> None:
    """Read labels in the layout of the public AirRep code."""
    from tdabench_airrep.labels import read_reference

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
    """`key=value` pairs of the parameters of one method."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"{pair!r} is not KEY=VALUE (a parameter of {method})")
        found[key.strip()] = value.strip()
    return found


@airrep.command()
@source_options
@click.option("--method", required=True, help="A method that scores examples, e.g. logra.")
@click.option("--set", "pairs", multiple=True, help="Its parameters, KEY=VALUE.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--dev", default=0, help="Dev examples to score, drawn by the seed; 0: all.")
@click.option("--pool", default=0, help="Training examples to score, likewise.")
@click.option(
    "--level", default=0.0, help="Power of its spread that a training example's scores lose."
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
    """Score the dev examples against the pool by another method, to distil an encoder from."""
    import torch

    from tdabench_airrep.build import make_teacher

    torch.set_num_threads(1)
    o = open_source(**source)
    made = make_teacher(
        method, settings(method, pairs), seed, o.target, o.train, o.dev, say, dev, pool, level
    )
    made.save(out)
    shape = [len(made.rows), len(made.columns)]
    emit({"teacher": str(out), "shape": shape, "seconds": made.meta["seconds"]})


def config_options(function: Any) -> Any:
    """One option for each field of the training recipe."""
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
    "encoder's. Default: GTE-small where a hub is reachable, else target:base.",
)
@click.option("--dim", default=384, show_default=True, help="Width of the embeddings.")
@click.option("--layers", default="-1", show_default=True, help="Hidden states to pool.")
@click.option("--spans", default="all", show_default=True, help="Of: all, response, error.")
@click.option("--attention", default="own", show_default=True, help="own, or full.")
@click.option("--normalise/--no-normalise", default=False, help="Embeddings of one length.")
@click.option("--text", default="", help="Template with {prompt} and {response}.")
@click.option("--max-tokens", default=0, help="Tokens kept of a text; 0: as the body takes.")
@click.option("--side", default="first", show_default=True, help="Tokens kept: first or last.")
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
    """Train an encoder on labels, after distilling it from a teacher if one is given."""
    import torch

    from tdabench_airrep import build
    from tdabench_airrep.encoder import default_init

    torch.set_num_threads(1)
    opened = open_source(suite, target, corpus, pool_split, dev_split, max_length, template, recipe)
    record = build.train_encoder(
        target=opened.target,
        train=opened.train,
        dev=opened.dev,
        label_files=label_files,
        teacher_files=teacher_files,
        body=build.Body(
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
        config=build.TrainConfig(**config),
        out=out,
        say=say,
    )
    emit({"encoder": str(out), **{k: record[k] for k in ("best", "cost", "bytes")}})


@airrep.command()
@source_options
@click.option(
    "--encoder",
    type=click.Path(path_type=Path),
    help="Whose record to follow. Default: the suite's.",
)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Resumable.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--workers", default=1, show_default=True)
@resumable()
def rebuild(encoder: Path | None, work: Path, out: Path, workers: int, **source: Any) -> None:
    """Make an encoder again from its record: labels, teacher, every training stage."""
    import torch

    from tdabench.api import load_suite, read_json
    from tdabench_airrep import build

    torch.set_num_threads(1)
    o = open_source(**source)
    if encoder is None:
        if not source["suite"]:
            raise UsageError("no encoder is given", "Pass --encoder DIR, or --suite")
        suite = load_suite(source["suite"])
        assets = suite.assets_for(suite.target(source["target"]))
        if "airrep" not in assets:
            raise UsageError(f"the suite {source['suite']} has no asset 'airrep'")
        encoder = assets["airrep"]
    record = build.rebuild(
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


# --------------------------------------------------------------------------- studies


@airrep.group()
def study() -> None:
    """Tables that examine the published claims on a suite, with 95% intervals.

    Poolings and temperatures are chosen on the tuning truth; --truth says what is reported.
    """


def study_options(function: Any) -> Any:
    for option in (
        click.option("--suite", default="pocket", show_default=True),
        click.option("--target", required=True),
        click.option("--truth", default="lds", show_default=True, help="lds, or tuning."),
        click.option("--replicates", default=1000, show_default=True, help="Bootstrap replicates."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout."),
    ):
        function = option(function)
    return function


def method_option(default: Sequence[str]) -> Any:
    return click.option(
        "--method",
        "specs",
        multiple=True,
        default=tuple(default),
        help="NAME or NAME:KEY=VALUE,…; repeatable. The suite's tuned parameters underlie. "
        f"Default: {', '.join(default)}.",
    )


def work_options(function: Any) -> Any:
    """Where trainings of a study lie, and what they are made from."""
    for option in (
        click.option("--labels", type=click.Path(path_type=Path), required=True),
        click.option("--teacher", "teachers", multiple=True, help="FILE, or FILE=WEIGHT."),
        click.option("--work", type=click.Path(path_type=Path), required=True, help="Resumable."),
        click.option(
            "--encoder",
            type=click.Path(path_type=Path),
            help="Whose recipe to vary. Default: the suite's.",
        ),
        click.option("--steps", default=0, help="Ranking steps at most; 0: the recipe's."),
        click.option("--distil-steps", default=0, help="Likewise of distillation."),
    ):
        function = option(function)
    return function


def parse(spec: str) -> tuple[str, dict[str, str]]:
    name, _, rest = spec.partition(":")
    return name, settings(name, [p for p in rest.split(",") if p])


def fractions(text: str) -> list[float]:
    try:
        return [float(x) for x in text.split(",") if x]
    except ValueError as e:
        raise UsageError(f"{text!r} is not a list of numbers") from e


def open_study(suite: str, target: str, truth: str) -> Setting:
    import torch

    from tdabench_airrep.studies import Setting

    torch.set_num_threads(1)
    return Setting.of(suite, target, truth)


def report(as_json: bool, rows: Sequence[Mapping[str, Any]], **what: Any) -> None:
    """The rows as a table, or as JSON with what they are about."""
    if as_json:
        click.echo(json.dumps({**what, "rows": list(rows)}, indent=2))
        return
    columns = list(dict.fromkeys(k for row in rows for k in row))
    cells = [["" if r.get(c) is None else _text(c, r[c]) for c in columns] for r in rows]
    widths = [max(len(c), *(len(r[i]) for r in cells)) for i, c in enumerate(columns)]
    for line in [columns, *cells]:
        click.echo("  ".join(v.ljust(w) for v, w in zip(line, widths)).rstrip())


def _text(column: str, value: Any) -> str:
    if isinstance(value, float) and column != "temperature":
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@study.command("pooling")
@study_options
@method_option(("airrep", "logra", "tfidf"))
@click.option("--temperatures", default="0.1,0.3,1,3", show_default=True, help="In score stds.")
def pooling_study(
    suite: str,
    target: str,
    truth: str,
    replicates: int,
    as_json: bool,
    specs: tuple[str, ...],
    temperatures: str,
) -> None:
    """LDS of each method under every pooling; * is what the tuning truth would choose."""
    from tdabench_airrep.studies import pooling_table

    setting = open_study(suite, target, truth)
    scored = [setting.score(*parse(s), say) for s in specs]
    rows = pooling_table(setting, scored, fractions(temperatures), replicates)
    report(as_json, rows, study="pooling", suite=suite, target=target, truth=truth)


@study.command()
@study_options
@method_option(
    ("airrep", "logra:rank=24", "logra:rank=12", "logra:rank=6", "graddot", "tfidf", "hidden")
    + ("random",)
)
def ordering(
    suite: str, target: str, truth: str, replicates: int, as_json: bool, specs: tuple[str, ...]
) -> None:
    """The published table here: each method, and its distance from the first one given."""
    from tdabench_airrep.studies import ordering_table

    setting = open_study(suite, target, truth)
    rows = ordering_table(setting, [setting.score(*parse(s), say) for s in specs], replicates)
    report(as_json, rows, study="ordering", suite=suite, target=target, truth=truth)


@study.command()
@study_options
@method_option(
    (
        "airrep:store=int8",
        "airrep:store=float16",
        "airrep",
        "logra:rank=8,dtype=float16",
        "logra:rank=16,dtype=float16",
        "logra:rank=24,dtype=float16",
        "logra:rank=16",
        "logra:rank=24",
    )
)
def index(
    suite: str, target: str, truth: str, replicates: int, as_json: bool, specs: tuple[str, ...]
) -> None:
    """Bytes an example against LDS, as multiples of the first one given."""
    from tdabench_airrep.studies import index_table

    setting = open_study(suite, target, truth)
    rows = index_table(setting, [setting.score(*parse(s), say) for s in specs], replicates)
    report(as_json, rows, study="index", suite=suite, target=target, truth=truth)


@study.command("group-size")
@study_options
@method_option(("airrep", "logra", "tfidf"))
@click.option("--fractions", "parts", default="0.0625,0.125,0.25,0.5", show_default=True)
@click.option("--groups", default=40, show_default=True)
@click.option("--seeds", default=2, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Resumable.")
@click.option("--workers", default=1, show_default=True)
def group_size(
    suite: str,
    target: str,
    truth: str,
    replicates: int,
    as_json: bool,
    specs: tuple[str, ...],
    parts: str,
    groups: int,
    seeds: int,
    work: Path,
    workers: int,
) -> None:
    """LDS by the size of the groups retrained on; the retrainings are made here."""
    from tdabench_airrep.studies import size_table, truths_by_size

    setting = open_study(suite, target, truth)
    truths = truths_by_size(setting, fractions(parts), groups, seeds, work, workers, say)
    scored = [setting.score(*parse(s), say) for s in specs]
    rows = size_table(setting, scored, truths, replicates)
    report(as_json, rows, study="group-size", suite=suite, target=target, truth=truth)


@study.command()
@study_options
@method_option(("airrep", "logra", "tfidf"))
@click.option("--others", default="", help="Targets, by comma. Default: all with that truth.")
def transfer(
    suite: str,
    target: str,
    truth: str,
    replicates: int,
    as_json: bool,
    specs: tuple[str, ...],
    others: str,
) -> None:
    """Methods built on --target against the truths of other targets.

    What depends on the target is also built on each of the others itself: gradient methods, and
    AirRep where that target has an encoder of its own. Text methods say the same everywhere.
    """
    from tdabench.api import load_suite, registry
    from tdabench_airrep.studies import transfer_table

    declared = load_suite(suite).targets
    wanted = [o for o in others.split(",") if o] or [
        t.label for t in declared if truth in t.truths and t.truths[truth].exists()
    ]
    labels = list(dict.fromkeys([target, *wanted]))
    opened = {label: open_study(suite, label, truth) for label in labels}
    scored = {target: [opened[target].score(*parse(s), say) for s in specs]}
    for label in labels[1:]:
        left_out = {"text", "control"}
        mine, theirs = ((opened[k].assets or {}).get("airrep") for k in (target, label))
        if theirs in (None, mine):  # no encoder of its own
            left_out.add("learned")
        own = [s for s in specs if registry().method(parse(s)[0]).cls.family not in left_out]
        scored[label] = [opened[label].score(*parse(s), say) for s in own]
    rows = transfer_table(opened, scored, target, replicates)
    report(as_json, rows, study="transfer", suite=suite, target=target, truth=truth)


@study.command()
@study_options
@method_option(("logra", "graddot"))
@click.option("--repeats", default=3, show_default=True)
@click.option("--sizes", default="1000,10000,100000,1000000,10000000", show_default=True)
def amortisation(
    suite: str,
    target: str,
    truth: str,
    replicates: int,
    as_json: bool,
    specs: tuple[str, ...],
    repeats: int,
    sizes: str,
) -> None:
    """Total cost, labels and training included, against other methods' as corpora grow."""
    from tdabench.api import read_json
    from tdabench_airrep.studies import amortisation_table

    if repeats < 2:
        raise UsageError("intervals need at least two repeats", "Pass --repeats 3")
    setting = open_study(suite, target, truth)
    encoder = encoder_of(suite, target)
    prepare = float(read_json(encoder / "airrep.json")["cost"]["seconds"])
    builds: dict[str, list[float]] = {}
    for _ in range(repeats):
        for spec in ("airrep", *specs):
            s = setting.score(*parse(spec), say, splits=(setting.report,))
            builds.setdefault(s.label, []).append(s.build_seconds)
    rows = amortisation_table(prepare, builds, len(setting.train), numbers(sizes), replicates)
    report(as_json, rows, study="amortisation", suite=suite, target=target)


def encoder_of(suite: str, target: str) -> Path:
    """The encoder that the suite ships for a target."""
    from tdabench.api import load_suite

    loaded = load_suite(suite)
    assets = loaded.assets_for(loaded.target(target))
    if "airrep" not in assets:
        raise UsageError(f"the suite {suite} has no encoder for the target {target}")
    loaded.verify(assets["airrep"])
    return assets["airrep"]


def recipe_of(
    encoder: Path | None, suite: str, target: str, steps: int, distil_steps: int
) -> tuple[Source, list[Any]]:
    """(where the labels come from, the stages of an encoder's recipe, cut to so many steps)."""
    from dataclasses import replace

    from tdabench.api import read_json
    from tdabench_airrep.build import check_source, stages_of

    record = read_json((encoder or encoder_of(suite, target)) / "airrep.json")
    source = open_source(suite, target, "", "labels_pool", "labels_dev", 128, "plain", "")
    check_source(record, source.target, source.train, source.dev)
    stages = stages_of(record)
    if steps:
        stages = [
            replace(s, config=replace(s.config, steps=min(steps, s.config.steps))) for s in stages
        ]
    if distil_steps:
        stages = [
            replace(
                s,
                config=replace(s.config, distil_steps=min(distil_steps, s.config.distil_steps)),
            )
            for s in stages
        ]
    return source, stages


@study.command("ablation")
@study_options
@work_options
def ablation_study(
    suite: str,
    target: str,
    truth: str,
    replicates: int,
    as_json: bool,
    labels: Path,
    teachers: tuple[str, ...],
    work: Path,
    encoder: Path | None,
    steps: int,
    distil_steps: int,
) -> None:
    """Trains a recipe with one part after another left out."""
    from tdabench_airrep import build
    from tdabench_airrep.labels import Labels
    from tdabench_airrep.studies import ablation, variant_table

    setting = open_study(suite, target, truth)
    source, stages = recipe_of(encoder, suite, target, steps, distil_steps)
    spent = Labels.load(labels).retrainings
    made = {}
    for name, parts in ablation(stages).items():
        say(f"variant {name}")
        folder = build.train_stages(
            parts,
            target=source.target,
            train=source.train,
            dev=source.dev,
            label_files=[labels],
            teacher_files=teachers,
            work=work,
            say=say,
        )
        made[name] = (folder, {"retrainings": spent if any(p.labels for p in parts) else 0})
    rows = variant_table(setting, made, say, "full", replicates)
    report(as_json, rows, study="ablation", suite=suite, target=target, truth=truth)


@study.command()
@study_options
@work_options
@click.option("--instances", default="1,2,4", show_default=True, help="Training instances.")
@click.option("--subsets", default="12,24,48", show_default=True, help="Subsets of each.")
@click.option(
    "--start",
    type=click.Choice(("both", "distilled", "untaught")),
    default="both",
    show_default=True,
    help="Ranking after distillation, or from an untrained encoder.",
)
def budget(
    suite: str,
    target: str,
    truth: str,
    replicates: int,
    as_json: bool,
    labels: Path,
    teachers: tuple[str, ...],
    work: Path,
    encoder: Path | None,
    steps: int,
    distil_steps: int,
    instances: str,
    subsets: str,
    start: str,
) -> None:
    """LDS against the number of labelled instances and subsets."""
    from tdabench_airrep import build
    from tdabench_airrep.labels import Labels
    from tdabench_airrep.studies import ablation, distilled, ranked, variant_table

    setting = open_study(suite, target, truth)
    source, stages = recipe_of(encoder, suite, target, steps, distil_steps)
    whole = Labels.load(labels)
    holdout = stages[-1].config.holdout
    common: dict[str, Any] = {
        "target": source.target,
        "train": source.train,
        "dev": source.dev,
        "teacher_files": teachers,
        "work": work,
        "say": say,
    }
    starts = {
        "distilled": (distilled(stages), list(stages)),
        "untaught": (ablation(stages)["start"], [ranked(stages)]),
    }
    made = {}
    for name, (before, after) in starts.items():
        if start not in ("both", name) or not before:
            continue
        none = {"start": name, "instances": 0, "subsets": 0, "retrainings": 0}
        made[f"{name}, no labels"] = (build.train_stages(before, label_files=[], **common), none)
        for i in numbers(instances):
            for m in numbers(subsets):
                cut = whole.cut(i, m, holdout)
                path = work / f"labels-{i}x{m}.safetensors"
                cut.save(path)
                say(f"{name}: {i} instances of {m} subsets")
                folder = build.train_stages(after, label_files=[path], **common)
                columns = {"start": name, "instances": i, "subsets": m}
                made[f"{name}, {i} x {m}"] = (
                    folder,
                    {**columns, "retrainings": cut.retrainings},
                )
    if not made:
        raise UsageError("the recipe has no such start", "Pass --start untaught")
    rows = variant_table(setting, made, say, next(iter(made)), replicates)
    report(as_json, rows, study="budget", suite=suite, target=target, truth=truth)


if __name__ == "__main__":  # pragma: no cover
    sys.exit(airrep())
