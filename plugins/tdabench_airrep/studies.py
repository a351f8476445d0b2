"""Studies: tables that examine the published claims on a suite, each with intervals.

Every study reports on one truth and makes its choices (pooling, temperature) on another, the
tuning truth. LDS intervals are 95%, over queries and groups; a difference is paired.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tdabench.api import (
    POOLINGS,
    Context,
    Corpus,
    Groups,
    Recipe,
    Target,
    Truth,
    UsageError,
    bootstrap_lds,
    compare,
    load_suite,
    named_seed,
    noise_ceiling,
    pool_scores,
    read_json,
    registry,
    spearman_rows,
)

if TYPE_CHECKING:
    from tdabench_airrep.build import Body, Stage

Say = Callable[[str], None]
Row = dict[str, Any]

# Softmax temperatures to try, in standard deviations of a method's own scores.
TEMPERATURES = (0.1, 0.3, 1.0, 3.0)
REPLICATES = 1000


# --------------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Pooling:
    """How example scores become a group's score; the temperature is in the scores' own unit."""

    kind: str = "sum"
    temperature: float = 1.0

    def __call__(self, scores: np.ndarray, groups: Groups) -> np.ndarray:
        return pool_scores(scores, groups, self.kind, self.temperature)


@dataclass(frozen=True)
class Scored:
    """A method's example scores, {split: [query, train]}, its own pooling and what it cost.

    Seconds are processor time; `bytes` are those of an example in the saved index.
    """

    label: str
    scores: Mapping[str, np.ndarray]
    pooling: Pooling
    build_seconds: float = 0.0
    query_seconds: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Setting:
    """A target and a corpus with truths by split: `test`, and `tuning` to choose on.

    `report` is the split that tables are about. `tuned` are the suite's parameters of methods.
    """

    name: str
    target: Target
    train: Corpus
    queries: Mapping[str, Corpus]
    truths: Mapping[str, Truth]
    report: str = "test"
    assets: Mapping[str, Path] | None = None
    tuned: Mapping[str, Mapping[str, Any]] | None = None

    @classmethod
    def of(cls, suite_name: str, label: str, truth: str = "lds") -> Setting:
        """`truth` is "lds" (test queries) or "tuning". Raises UsageError if it is not declared."""
        suite = load_suite(suite_name)
        declared = suite.target(label)
        if truth not in ("lds", "tuning") or truth not in declared.truths:
            raise UsageError(
                f"target {label} of suite {suite.name} declares no truth {truth!r}",
                f"Declared: {', '.join(declared.truths) or 'none'}; studies read lds and tuning",
            )
        queries, truths = {}, {}
        for name, split in (("lds", "test"), ("tuning", "tuning")):
            if name in declared.truths:
                queries[split] = suite.queries(split)
                found = Truth.load(declared.truths[name])
                found.check(suite.train, declared.target)
                truths[split] = found.for_queries(queries[split].ids)
        return cls(
            label,
            declared.target,
            suite.train,
            queries,
            truths,
            report="tuning" if truth == "tuning" else "test",
            assets=suite.assets_for(declared),
            tuned=suite.tuned.get(label, {}),
        )

    def score(
        self,
        method: str,
        params: Mapping[str, Any],
        say: Say,
        label: str = "",
        splits: Iterable[str] = (),
    ) -> Scored:
        """Builds a method once, with the suite's tuned parameters under `params`, and scores."""
        tuned = dict((self.tuned or {}).get(method, {}))
        if "pooling" in params:  # a temperature belongs to the pooling it was tuned with
            tuned.pop("temperature", None)
        chosen = registry().method(method).cls.from_params({**tuned, **params})
        label = label or method + "".join(f" {k}={v}" for k, v in params.items())
        say(f"{self.name}: scoring by {label}")
        with tempfile.TemporaryDirectory() as folder:
            scratch, saved = Path(folder) / "scratch", Path(folder) / "index"
            scratch.mkdir()
            saved.mkdir()
            context = Context(self.target, scratch, assets=dict(self.assets or {}))
            a = time.process_time()
            index = chosen.build(context, self.train)
            b = time.process_time()
            wanted = tuple(splits) or tuple(self.queries)
            scores = {s: index.score(self.queries[s]) for s in wanted}
            c = time.process_time()
            index.save(saved)
            size = sum(p.stat().st_size for p in saved.rglob("*") if p.is_file())
        return Scored(
            label,
            scores,
            Pooling(index.pooling, index.temperature),
            b - a,
            c - b,
            size / max(1, len(self.train)),
        )

    def choose(self, scored: Scored, kinds: Sequence[str] = POOLINGS) -> Pooling:
        """The pooling of the highest LDS on the tuning truth."""
        if "tuning" not in self.truths:
            raise UsageError(
                f"the target {self.name} declares no tuning truth",
                "Poolings cannot be chosen honestly without one",
            )
        truth, scores = self.truths["tuning"], scored.scores["tuning"]
        tried = {
            p: float(spearman_rows(p(scores, truth.groups), truth.values).mean())
            for p in poolings(scores, kinds)
        }
        return max(tried, key=lambda p: tried[p])

    def lds(self, scored: Scored, pooling: Pooling, replicates: int = REPLICATES) -> Any:
        """LDS on the reported truth, as a Bootstrap."""
        truth = self.truths[self.report]
        f = pooling(scored.scores[self.report], truth.groups)
        return bootstrap_lds(f, truth.values, replicates)


def poolings(
    scores: np.ndarray,
    kinds: Sequence[str] = POOLINGS,
    temperatures: Sequence[float] = TEMPERATURES,
) -> list[Pooling]:
    """Every pooling to try; temperatures count in standard deviations of the scores."""
    unit = float(scores.std()) or 1.0
    found = []
    for kind in kinds:
        soft = kind.startswith("softmax")
        found += [Pooling(kind, t * unit) for t in temperatures] if soft else [Pooling(kind)]
    return found


def cells(boot: Any, prefix: str = "") -> Row:
    """A bootstrapped value with its 95% interval, as columns of a table."""
    low, high = boot.interval() or (None, None)
    names = ("lds", "low", "high") if not prefix else (prefix, f"{prefix} low", f"{prefix} high")
    return {
        n: None if v is None else round(float(v), 4) for n, v in zip(names, (boot.value, low, high))
    }


def difference(a: Any, b: Any) -> Row:
    """a - b, paired, with its interval and p-value."""
    d = compare(a, b)
    return {
        "difference": round(d.effect, 4),
        "from": None if d.low is None else round(d.low, 4),
        "to": None if d.high is None else round(d.high, 4),
        "p": round(d.p, 4),
    }


def shown(pooling: Pooling) -> Row:
    soft = pooling.kind.startswith("softmax")
    return {
        "pooling": pooling.kind,
        "temperature": float(f"{pooling.temperature:.3g}") if soft else None,
    }


# --------------------------------------------------------------------------- tables from scores


def pooling_table(
    setting: Setting,
    scored: Sequence[Scored],
    temperatures: Sequence[float] = TEMPERATURES,
    replicates: int = REPLICATES,
) -> list[Row]:
    """LDS of each method under each pooling and temperature.

    A temperature counts in standard deviations of the method's scores, so that the same one means
    the same to methods of different scale; sum and mean have none. For groups of one size sum and
    mean are the same, and the mean is left out. `chosen` marks the one that the tuning truth
    prefers.
    """
    sizes = setting.truths[setting.report].groups.sizes
    kinds = [k for k in POOLINGS if k != "mean" or len(set(sizes.tolist())) > 1]
    rows = []
    for s in scored:
        basis = s.scores["tuning" if "tuning" in s.scores else setting.report]
        unit = float(basis.std()) or 1.0
        tried = poolings(basis, kinds, temperatures)
        best = None
        if "tuning" in setting.truths:
            truth = setting.truths["tuning"]
            found = [
                spearman_rows(p(s.scores["tuning"], truth.groups), truth.values).mean()
                for p in tried
            ]
            best = tried[int(np.argmax(found))]
        for p in tried:
            soft = p.kind.startswith("softmax")
            rows.append(
                {
                    "method": s.label,
                    "pooling": p.kind,
                    "temperature": round(p.temperature / unit, 4) if soft else None,
                    **cells(setting.lds(s, p, replicates)),
                    "chosen": "*" if p == best else "",
                }
            )
    return rows


def ordering_table(
    setting: Setting, scored: Sequence[Scored], replicates: int = REPLICATES
) -> list[Row]:
    """LDS of each method at the pooling chosen on tuning, best first, and paired against the first.

    `difference` is the LDS of the first method given minus that of the row.
    """
    boots = {}
    rows = []
    for s in scored:
        p = setting.choose(s)
        boots[s.label] = setting.lds(s, p, replicates)
        rows.append(
            {"method": s.label, "bytes": round(s.bytes), **shown(p), **cells(boots[s.label])}
        )
    first = boots[scored[0].label]
    for row in rows:
        same = row["method"] == scored[0].label
        blank: Row = dict.fromkeys(("difference", "from", "to", "p"))
        row |= blank if same else difference(first, boots[row["method"]])
    return sorted(rows, key=lambda r: -r["lds"])


def index_table(
    setting: Setting, scored: Sequence[Scored], replicates: int = REPLICATES
) -> list[Row]:
    """Bytes an example against LDS, and how many times larger each index is than the first's.

    `reaches` says whether a method's LDS is at least that of the first one: `yes`, `no` where it
    lies below and a paired test at 5% tells the two apart, `level` where it does not.
    """
    boots = {s.label: setting.lds(s, setting.choose(s), replicates) for s in scored}
    first = scored[0]
    rows = []
    for s in sorted(scored, key=lambda s: s.bytes):
        d = compare(boots[s.label], boots[first.label])
        reaches = "yes" if d.effect >= 0 else ("no" if d.p < 0.05 else "level")
        rows.append(
            {
                "method": s.label,
                "bytes": round(s.bytes, 1),
                "times": round(s.bytes / first.bytes, 1),
                **cells(boots[s.label]),
                "reaches": "" if s is first else reaches,
            }
        )
    return rows


def size_table(
    setting: Setting,
    scored: Sequence[Scored],
    truths: Sequence[Truth],
    replicates: int = REPLICATES,
) -> list[Row]:
    """LDS at each group size, pooling as chosen on the tuning truth, beside each size's ceiling."""
    chosen = [(s, setting.choose(s)) for s in scored]
    rows = []
    for truth in truths:
        ceiling = noise_ceiling(truth.by_seed(), replicates)
        for s, p in chosen:
            f = p(s.scores[setting.report], truth.groups)
            boot = bootstrap_lds(f, truth.values, replicates)
            rows.append(
                {
                    "group size": round(float(truth.groups.sizes.mean())),
                    "method": s.label,
                    **cells(boot),
                    "ceiling": None if ceiling is None else round(ceiling.value, 3),
                }
            )
    return rows


def transfer_table(
    settings: Mapping[str, Setting],
    scored: Mapping[str, Sequence[Scored]],
    source: str,
    replicates: int = REPLICATES,
) -> list[Row]:
    """LDS on every target: methods built on `source`, beside the same built on the target itself.

    Poolings are chosen on the tuning truth of the target that the method was built on; where that
    has none, the method's own is kept. `difference`: the source's first method minus the row's.
    """

    def pooling(built_on: str, s: Scored) -> Pooling:
        on = settings[built_on]
        return on.choose(s) if "tuning" in on.truths and "tuning" in s.scores else s.pooling

    rows = []
    for label, setting in settings.items():
        ceiling = noise_ceiling(setting.truths[setting.report].by_seed(), replicates)
        here = []
        for built_on in dict.fromkeys((source, label)):
            for s in scored[built_on]:
                boot = setting.lds(s, pooling(built_on, s), replicates)
                here.append((built_on, s, boot))
        first = here[0][2]
        for n, (built_on, s, boot) in enumerate(here):
            blank: Row = dict.fromkeys(("difference", "from", "to", "p"))
            rows.append(
                {
                    "truth of": label,
                    "built on": built_on,
                    "method": s.label,
                    **cells(boot),
                    "ceiling": None if ceiling is None else round(ceiling.value, 3),
                    **(blank if n == 0 else difference(first, boot)),
                }
            )
    return rows


# --------------------------------------------------------------------------- what it costs


def crossover(
    prepare: float, build_a: float, build_b: float, n: int
) -> tuple[float, float, float | None]:
    """Seconds an example of A and B, and the corpus size from which A is cheaper in total.

    A costs `prepare` once and `build_a` for `n` examples, B nothing once and `build_b`. None when
    A is not cheaper an example.
    """
    a, b = build_a / n, build_b / n
    return a, b, prepare / (b - a) if b > a else None


def amortisation_table(
    prepare: float,
    builds: Mapping[str, Sequence[float]],
    n: int,
    sizes: Sequence[int],
    replicates: int = REPLICATES,
) -> list[Row]:
    """Total seconds at each corpus size, and where the first method overtakes each other.

    `builds` holds repeated processor seconds of building on `n` examples; intervals are over the
    repeats (bootstrap of the mean). `prepare` is the first method's cost before any corpus.
    """
    labels = list(builds)
    mine = np.asarray(builds[labels[0]])
    rng = np.random.default_rng(named_seed(0, "amortisation"))

    def again(x: np.ndarray) -> np.ndarray:
        return x[rng.integers(0, len(x), (replicates, len(x)))].mean(1)

    rows = []
    for label in labels:
        x = np.asarray(builds[label])
        fixed = prepare if label == labels[0] else 0.0
        row: Row = {
            "method": label,
            "prepare s": round(fixed),
            "s/1k": round(1000 * float(x.mean()) / n, 3),
        }
        row |= {f"{size:,}": f"{fixed + size * float(x.mean()) / n:,.0f} s" for size in sizes}
        found: list[float | None] = [None, None, None]
        if label != labels[0]:
            gain = (again(x) - again(mine)) / n
            here = float(x.mean() - mine.mean()) / n
            if here > 0:
                found[0] = round(prepare / here)
                low, high = np.quantile(gain, [0.025, 0.975])
                found[1] = round(prepare / high)
                found[2] = round(prepare / low) if low > 0 else None
        row |= dict(zip(("cheaper from", "from", "to"), found))
        rows.append(row)
    return rows


# --------------------------------------------------------------------------- trained variants


def ablation(stages: Sequence[Stage]) -> dict[str, list[Stage]]:
    """The trainings that leave out one part after another of the recipe in `stages`.

    "untrained": mean over all tokens of the last layer, random projection; "start": the recipe's
    own body, whitened, before any step; "distilled": no labels; "ranked": labels alone; "without
    error": the recipe less that span of the body; "without attention": groups averaged while
    training; "full": the recipe.
    """
    first = stages[0]

    def still(body: Body, whiten: bool) -> list[Stage]:
        config = replace(first.config, steps=0, distil_steps=0, whiten=whiten)
        return [replace(first, body=body, config=config, labels=False, teacher=False)]

    plain = replace(first.body, layers=(-1,), spans=("all",), normalise=False)
    out = {"untrained": still(plain, False), "start": still(first.body, True)}
    taught = distilled(stages)
    ranks = any(s.labels and s.config.steps for s in stages)
    if taught:
        out["distilled"] = taught
    if ranks and taught:
        out["ranked"] = [ranked(stages)]
    states = tuple(s for s in first.body.spans if s != "error")
    if 0 < len(states) < len(first.body.spans):
        less = replace(first, body=replace(first.body, spans=states))
        out["without error"] = [less, *stages[1:]]
    if ranks:
        out["without attention"] = [
            replace(s, config=replace(s.config, pooling="mean")) if s.labels else s for s in stages
        ]
    out["full"] = list(stages)
    return out


def distilled(stages: Sequence[Stage]) -> list[Stage]:
    """The recipe without labels."""
    return [
        replace(s, labels=False, config=replace(s.config, steps=0))
        for s in stages
        if s.teacher and s.config.distil_steps
    ]


def ranked(stages: Sequence[Stage]) -> Stage:
    """The recipe without a teacher: its first body, ranking from the first step."""
    first, last = stages[0], stages[-1]
    body = replace(first.body, normalise=last.body.normalise)
    config = replace(last.config, distil_steps=0, anchor=0.0, whiten=first.config.whiten)
    return replace(last, body=body, config=config, teacher=False)


def variant_table(
    setting: Setting,
    variants: Mapping[str, tuple[Path, Mapping[str, Any]]],
    say: Say,
    reference: str,
    replicates: int = REPLICATES,
) -> list[Row]:
    """LDS of encoders by name, {name: (folder, further columns)}, each pooled in two ways.

    "as trained" is the pooling of its training, "chosen" the one that the tuning truth prefers.
    `difference` is the reference's LDS minus the row's, both at the chosen pooling.
    """
    rows, boots = [], {}
    for name, (folder, columns) in variants.items():
        recipe = read_json(folder / "airrep.json")["recipe"]
        trained = Pooling(recipe["pooling"], recipe["temperature"])
        s = setting.score("airrep", {"encoder": str(folder)}, say, label=name)
        chosen = setting.choose(s)
        boots[name] = setting.lds(s, chosen, replicates)
        rows.append(
            {
                "encoder": name,
                **columns,
                **cells(setting.lds(s, trained, replicates), "as trained"),
                **shown(chosen),
                **cells(boots[name]),
            }
        )
    for row in rows:
        blank: Row = dict.fromkeys(("difference", "from", "to", "p"))
        same = row["encoder"] == reference
        row |= blank if same else difference(boots[reference], boots[row["encoder"]])
    return rows


# --------------------------------------------------------------------------- truths of other sizes


def truths_by_size(
    setting: Setting,
    fractions: Sequence[float],
    groups: int,
    seeds: int,
    work: Path,
    workers: int,
    say: Say,
) -> list[Truth]:
    """Truths over random groups of each fraction of the corpus, by the reported truth's recipe.

    Each retraining is kept in `work`: a study that is stopped goes on where it was.
    """
    from tdabench.api import TruthPlan, build_truth, collect_truth

    known = setting.truths[setting.report]
    recipe = Recipe(**known.plan.get("recipe", {}))
    out = []
    for fraction in fractions:
        plan = TruthPlan.draw(
            f"group-size-{fraction:g}",
            setting.target,
            setting.train,
            setting.queries[setting.report],
            n_groups=groups,
            fraction=fraction,
            n_seeds=seeds,
            recipe=recipe,
        )
        folder = work / f"size-{fraction:g}"
        total = len(plan.units())

        def on_unit(unit: Any, reason: str, fraction: float = fraction) -> None:
            say(f"groups of {fraction:g}: {unit.name}{': failed: ' + reason if reason else ''}")

        say(f"groups of {fraction:g} of the corpus: {total} retrainings")
        build_truth(
            plan,
            setting.target,
            setting.train,
            setting.queries[setting.report],
            folder,
            workers=workers,
            on_unit=on_unit,
        )
        out.append(collect_truth(plan, folder))
    return out
