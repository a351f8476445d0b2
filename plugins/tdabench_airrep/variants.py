"""Variants of an encoder's recipe: without one part, or with fewer labels, each with an encoder.

The harness measures them: `write_variants` makes a suite in which each is a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tdabench.api import Corpus, Suite, Target, derive_suite, read_json
from tdabench_airrep.labels import Labels
from tdabench_airrep.pipeline import Body, Stage, train_stages

PREFIX = "airrep-"


def ablation(stages: Sequence[Stage]) -> dict[str, list[Stage]]:
    """Returns variants of the recipe in `stages`, each without one part, by name.

    "untrained": mean over all tokens of the last layer, random projection; "start": the recipe's
    own body before any step; "distilled": no labels; "ranked": only labels; "no-error": the recipe
    without that span of the body; "no-attention": groups averaged while training; "full": the
    recipe. Variants of parts that the recipe does not have are left out.
    """
    first = stages[0]

    def still(body: Body, whiten: bool) -> list[Stage]:
        config = replace(first.config, steps=0, distil_steps=0, whiten=whiten)
        return [replace(first, body=body, config=config, labels=False, teacher=False)]

    plain = replace(first.body, layers=(-1,), spans=("all",), normalise=False)
    out = {"untrained": still(plain, False)}
    start = still(first.body, first.config.whiten)
    if start != out["untrained"]:
        out["start"] = start
    taught = distilled(stages)
    ranks = any(s.labels and s.config.steps for s in stages)
    if taught:
        out["distilled"] = taught
    if ranks and taught:
        out["ranked"] = [ranked(stages)]
    states = tuple(s for s in first.body.spans if s != "error")
    if 0 < len(states) < len(first.body.spans):
        less = replace(first, body=replace(first.body, spans=states))
        out["no-error"] = [less, *stages[1:]]
    if ranks:
        out["no-attention"] = [
            replace(s, config=replace(s.config, pooling="mean")) if s.labels else s for s in stages
        ]
    out["full"] = list(stages)
    return out


def distilled(stages: Sequence[Stage]) -> list[Stage]:
    """Returns the recipe without labels."""
    return [
        replace(s, labels=False, config=replace(s.config, steps=0))
        for s in stages
        if s.teacher and s.config.distil_steps
    ]


def ranked(stages: Sequence[Stage]) -> Stage:
    """Returns the recipe without a teacher: its first body, ranking from the first step."""
    first, last = stages[0], stages[-1]
    body = replace(first.body, normalise=last.body.normalise)
    config = replace(last.config, distil_steps=0, anchor=0.0, whiten=first.config.whiten)
    return replace(last, body=body, config=config, teacher=False)


def train_variants(
    stages: Sequence[Stage],
    *,
    target: Target,
    train: Corpus,
    dev: Corpus,
    label_files: Sequence[Path],
    teacher_files: Sequence[str],
    budgets: Sequence[tuple[int, int]],
    work: Path,
    say: Callable[[str], None],
) -> dict[str, Path]:
    """Trains the ablations of `stages`, and the recipe on each budget of labels, in `work`.

    A budget (instances, subsets) is the first `subsets` of the first `instances` of the first
    labels file, and its whole held-out instances; its name is "1x24". Returns the folders of the
    encoders by name. Trainings with the same beginning share it, and results in `work` are reused.
    Raises UsageError for a budget that exceeds the labels.
    """
    made: dict[str, Path] = {}

    def run(name: str, parts: Sequence[Stage], files: Sequence[Path]) -> None:
        say(f"variant {name}")
        made[name] = train_stages(
            parts,
            target=target,
            train=train,
            dev=dev,
            label_files=files,
            teacher_files=teacher_files,
            work=work,
            say=say,
        )

    cuts = []
    for instances, subsets in budgets:
        cut = Labels.load(label_files[0]).cut(instances, subsets, stages[-1].config.holdout)
        path = work / f"labels-{instances}x{subsets}.safetensors"
        cut.save(path)
        cuts.append((f"{instances}x{subsets}", path))
    for name, parts in ablation(stages).items():
        run(name, parts, label_files)
    for name, path in cuts:
        run(name, stages, [path])
    return made


def write_variants(suite: Suite, target: str, encoders: Mapping[str, Path], path: Path) -> Suite:
    """Writes a copy of a suite to `path` in which each encoder is a variant of `airrep`.

    A label is "airrep-" and the encoder's name. Pooling and temperature are taken from its
    training, as tuned values of the target, until `tdabench tune LABEL --write` chooses others;
    values chosen for the same encoder in an earlier copy at `path` are kept.
    """

    def change(data: dict[str, Any]) -> None:
        tuned = data.setdefault("tuned", {}).setdefault(target, {})
        rows = []
        for name, folder in encoders.items():
            label, recipe = PREFIX + name, read_json(folder / "airrep.json")["recipe"]
            params = {"encoder": str(folder.absolute())}
            rows.append({"label": label, "method": "airrep", "params": params})
            tuned[label] = {"pooling": recipe["pooling"], "temperature": recipe["temperature"]}
            if label in earlier and earlier[label][0] == params:
                tuned[label] = earlier[label][1]
        methods = data.setdefault("methods", {})
        methods["variants"] = [
            *(v for v in methods.get("variants", ()) if not v["label"].startswith(PREFIX)),
            *rows,
        ]
        methods["default"] = [row["label"] for row in rows]
        data["suite"]["name"] += "-variants"
        for t in data["targets"]:
            t["main"] = t["label"] == target

    earlier: dict[str, tuple[Any, Any]] = {}
    if path.exists():
        from tdabench.api import load_suite

        old = load_suite(path)
        chosen = old.tuned.get(target, {})
        earlier = {k: (v.params, chosen.get(k, {})) for k, v in old.variants.items() if k in chosen}
    return derive_suite(suite, path, change)
