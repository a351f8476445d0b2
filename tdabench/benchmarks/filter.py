"""Filter: whether a behaviour disappears when the examples that a method blames are removed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import numpy as np

from tdabench.benchmark import BenchmarkContext, Metric, Outcome
from tdabench.benchmarks.common import Arrays, FromArrays, Texts, checked_scores, metric, outcome_of
from tdabench.benchmarks.planted import id_of, planted
from tdabench.benchmarks.retrain import Retrainer
from tdabench.data.behaviours import Behaviour
from tdabench.data.examples import Corpus, Example
from tdabench.errors import DataError, NotApplicable, UsageError
from tdabench.seeds import named_seed
from tdabench.targets.recipe import Recipe

WHO = ("method", "random", "oracle", "text")


@dataclass(frozen=True)
class Filter(FromArrays):
    """Removal of the examples behind a planted behaviour, tested by retraining.

    Some training examples teach a planted behaviour (the field `planted` names it). The method is
    shown examples of the behaviour, half of the queries that have it (one behaviour: their mean
    loss), and ranks the training corpus. The target is retrained without the highest-scoring
    `budgets` (shares of the corpus), and measured on the other half and on clean queries.

    The strength of the behaviour is 1 in a model trained on everything and 0 in a model trained
    without any planted example: the loss of the behaviour's responses, on that scale; a mean below
    0 counts as 0. `area` is
    the mean strength over the budgets from 0 to the largest: lower is better; `area_KIND` is the
    same of one behaviour, where there are several. `half` is the budget
    at which the strength falls to 1/2. `rate` is the share of queries whose planted response has a
    lower loss than their clean response (the field `clean`); `collateral` the rise of the loss of
    clean queries, in nats; `spoiled` the loss of the clean responses to the behaviour's own queries
    above their loss in a model trained without any planted example, in nats: the damage among
    questions of the same kind. The method is compared with a random choice, an oracle that knows
    the planted examples, and a text filter: logistic regression on words, trained on the shown
    examples against the corpus, which needs no model.

    All models start from the same weights and see the kept examples in the same order. Intervals
    draw the queries of the behaviours, which share their retrainings.

    asset         name of the suite's asset with the examples, unless its corpus has the field
                  `planted`
    kinds         behaviours to measure; if empty, all with at least two queries
    budgets       shares of the corpus to remove
    seeds         trainings per removal, of which the mean counts
    random_seeds  random choices per budget
    start         checkpoint of the target from which models are trained
    recipe        changes to the target's recipe, such as "epochs=4,batch_size=16"
    replicates    bootstrap replicates behind each interval
    """

    name: ClassVar[str] = "filter"
    version: ClassVar[int] = 5
    summary: ClassVar[str] = "strength of a planted behaviour after removing the blamed examples"
    source: ClassVar[str] = "Jiao et al. 2025, arXiv 2507.09424 (finding), with retraining"
    kept: ClassVar[str] = ".*/|(full|kind|has_clean|sizes)$"
    slow: ClassVar[bool] = True

    asset: str = "filter"
    kinds: tuple[str, ...] = ()
    budgets: tuple[float, ...] = (0.005, 0.02, 0.05, 0.1)
    seeds: int = 1
    random_seeds: int = 2
    start: str = "base"
    recipe: str = ""
    replicates: int = 1000

    def __post_init__(self) -> None:
        if not self.budgets or not all(0 < b < 1 for b in self.budgets):
            raise UsageError("filter.budgets are shares of the corpus, between 0 and 1")
        if min(self.seeds, self.random_seeds) < 1:
            raise UsageError("filter: seeds and random_seeds must be at least 1")
        Recipe().changed(self.recipe)

    def run(self, context: BenchmarkContext) -> Outcome:
        index, train, queries = planted(context, self.asset, "planted")
        n = len(train)
        planted_as = np.array([e.meta.get("planted", "") for e in train])
        asked = {k: [q for q in queries if q.meta.get("planted") == k]
                 for k in sorted(set(planted_as) - {""})}  # fmt: skip
        kinds = self.kinds or tuple(k for k, of in asked.items() if len(of) > 1)
        for kind in kinds:
            if len(asked.get(kind, ())) < 2 or not (planted_as == kind).any():
                raise NotApplicable(f"no behaviour {kind!r} with two queries is planted",
                                "See docs/benchmarks/filter.md")  # fmt: skip
        if not kinds:
            raise NotApplicable("no query has a planted behaviour to explain",
                            "See docs/benchmarks/filter.md")  # fmt: skip
        clean = [q for q in queries if not q.meta.get("planted")]
        if not clean:
            raise NotApplicable("there are no clean queries to measure the damage on")

        shown = {k: asked[k][0::2] for k in kinds}
        measured = [(k, q) for k in kinds for q in asked[k][1::2]]
        behaviours = [Behaviour.of(k, shown[k]) for k in kinds]
        scores = np.asarray(index.score_behaviours(behaviours), dtype=np.float32)
        checked_scores(scores, (len(kinds), n), "scores of behaviours")

        sizes = sorted({max(1, round(b * n)) for b in self.budgets})
        if sizes[-1] >= n:
            raise NotApplicable(f"removing {sizes[-1]} of {n} examples leaves none to train on")
        bad = [q for _, q in measured]
        other = [Example(q.id + "+clean", q.prompt, q.meta["clean"], q.task)
                 for q in bad if q.meta.get("clean")]  # fmt: skip
        evaluated = Corpus([*bad, *other, *clean], "filter")
        own = replace(context, train=train, queries=queries)
        trainer = Retrainer(own, context.target.recipe.changed(self.recipe), self.start)
        everything = np.arange(n)

        def losses(removed: Sequence[int] | np.ndarray) -> np.ndarray:
            """Averages over seeds the losses of a model trained without `removed`: [query]."""
            kept = np.setdiff1d(everything, removed)
            runs = [trainer.run(kept, evaluated, s, among=everything) for s in range(self.seeds)]
            return np.stack([r.losses for r in runs]).astype(np.float64).mean(axis=0)

        tie = draw("ties", n)
        found: dict[str, np.ndarray] = {"full": losses([])[None]}
        for kind in kinds:  # first: a behaviour that is not learned needs no sweep
            none = found[f"none/{kind}"] = losses(np.flatnonzero(planted_as == kind))[None]
            own_queries = [i for i, (k, _) in enumerate(measured) if k == kind]
            taught(kind, none[0, own_queries], found["full"][0, own_queries])
        for k, kind in enumerate(kinds):
            context.progress("retraining without blamed examples", k, len(kinds))
            mine = np.flatnonzero(planted_as == kind)
            orders = {
                "method": [np.lexsort((tie, -scores[k]))],
                "random": [draw(f"random-{s}", n) for s in range(self.random_seeds)],
                "oracle": [np.lexsort((tie, planted_as != kind))],
                "text": [np.lexsort((tie, -text_filter(shown[kind], train)))],
            }
            for who, several in orders.items():
                found[f"{who}/{kind}"] = np.stack(
                    [np.mean([losses(o[:size]) for o in several], axis=0) for size in sizes]
                )
            found[f"hits/{kind}"] = np.array(
                [np.isin(orders["method"][0][:size], mine).sum() for size in sizes], dtype=float
            )[None]
        arrays = {
            **found,
            "kind": np.array([kinds.index(k) for k, _ in measured]),
            "has_clean": np.array([bool(q.meta.get("clean")) for q in bad]),
            "sizes": np.array(sizes, dtype=float) / n,
        }
        notes = (
            f"{len(kinds)} behaviours ({', '.join(kinds)}), {len(bad)} queries measured, "
            f"{trainer.done} models trained here",
        )
        return self.outcome(arrays, tuple(map(id_of, bad)), notes)

    def outcome(self, arrays: Arrays, query_ids: Texts, notes: Texts = ()) -> Outcome:
        from tdabench import stats

        kind, sizes = arrays["kind"], arrays["sizes"]
        names = sorted({k.partition("/")[2] for k in arrays if "/" in k})
        n_bad, n_clean_side = len(kind), int(arrays["has_clean"].sum())
        strength = {w: np.empty((len(sizes), n_bad)) for w in WHO}  # [budget, query]
        rates: dict[str, list[np.ndarray]] = {w: [] for w in (*WHO, "full")}
        harm = {
            w: np.zeros((len(sizes), len(arrays["full"][0]) - n_bad - n_clean_side)) for w in WHO
        }
        spoiled: dict[str, dict[str, np.ndarray]] = {w: {} for w in WHO}  # [budget, query] by name
        full, said = arrays["full"][0], list(notes)
        paired = np.flatnonzero(arrays["has_clean"])
        for k, name in enumerate(names):
            mine = kind == k
            none = arrays[f"none/{name}"][0]
            scale = taught(name, none[:n_bad][mine], full[:n_bad][mine])
            for who in WHO:
                loss = arrays[f"{who}/{name}"]  # [budget, query]
                left = ((none - loss)[:, :n_bad] / scale)[:, mine]
                # A mean below 0 counts as 0: removing also right answers with the same words makes
                # the behaviour's responses less likely than in a model that never saw it.
                strength[who][:, mine] = left - np.minimum(left.mean(axis=1, keepdims=True), 0)
                harm[who] += (loss - full)[:, n_bad + n_clean_side :] / len(names)
            at = np.flatnonzero(mine[paired])  # of the queries of this kind with a clean response
            if len(at):
                for who in (*WHO, "full"):
                    loss = arrays["full" if who == "full" else f"{who}/{name}"]
                    rates[who].append(loss[:, paired[at]] < loss[:, n_bad + at])
                    if who != "full":
                        spoiled[who][name] = (loss - none)[:, n_bad + at]

        def over(values: np.ndarray) -> stats.Bootstrap:
            return stats.bootstrap_queries(values, self.replicates)

        areas = {who: area(sizes, strength[who]) for who in WHO}
        boot = over(areas["method"])
        metrics = {"area": metric(boot, higher_is_better=False)}
        for who in WHO[1:]:
            metrics[f"area_{who}"] = metric(over(areas[who]), higher_is_better=False)
        metrics["less_than_text"] = metric(over(areas["text"] - areas["method"]))
        for k, name in enumerate(names if len(names) > 1 else ()):
            for who in WHO:
                tail = "" if who == "method" else f"_{who}"
                of_kind = over(areas[who][kind == k])
                metrics[f"area_{name}{tail}"] = metric(of_kind, higher_is_better=False)
        for who in WHO:
            tail = "" if who == "method" else f"_{who}"
            halved = halving(sizes, strength[who].mean(axis=1))
            if halved is not None:
                metrics[f"half{tail}"] = Metric(halved, higher_is_better=False)
            elif who == "method":
                said.append(f"the strength stays above 1/2 up to {sizes[-1]:.1%} removed")
            for j, size in enumerate(sizes):
                at_size = f"@{size:.3g}"
                metrics[f"strength{tail}{at_size}"] = metric(
                    over(strength[who][j]), higher_is_better=False
                )
                metrics[f"collateral{tail}{at_size}"] = metric(
                    over(harm[who][j]), higher_is_better=False, unit="nats"
                )
                if spoiled[who]:
                    values = np.concatenate([r[j] for r in spoiled[who].values()])
                    metrics[f"spoiled{tail}{at_size}"] = metric(
                        over(values), higher_is_better=False, unit="nats"
                    )
                if rates[who]:
                    values = np.concatenate([r[j] for r in rates[who]]).astype(float)
                    metrics[f"rate{tail}{at_size}"] = metric(
                        over(values), higher_is_better=False, share=True
                    )
            for name, of in spoiled[who].items() if len(names) > 1 else ():
                metrics[f"spoiled_{name}{tail}@{sizes[-1]:.3g}"] = metric(
                    over(of[-1]), higher_is_better=False, unit="nats"
                )
        if rates["full"]:
            values = np.concatenate([r[0] for r in rates["full"]]).astype(float)
            metrics["rate_before"] = metric(over(values), higher_is_better=False, share=True)
        for name in names:
            hits = arrays[f"hits/{name}"][0]
            metrics[f"found_{name}@{sizes[-1]:.3g}"] = Metric(float(hits[-1]))
        return outcome_of(metrics, areas["method"], boot, arrays, query_ids, said)


def taught(kind: str, none: np.ndarray, full: np.ndarray) -> float:
    """Returns the nats that the planted examples of a behaviour are worth to its queries [query].

    Raises DataError if training on them does not lower the loss of its responses.
    """
    scale = float((none - full).mean())
    if not scale > 0:
        raise DataError(
            f"training on the examples of {kind!r} does not teach it here",
            "Plant more of them, or train longer (filter.recipe)",
        )
    return scale


def area(sizes: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Averages the line through (0, 1) and (size, strength) over 0..max size.

    [budget, query] -> [query].
    """
    x = np.concatenate([[0.0], sizes])
    y = np.concatenate([np.ones((1, strength.shape[1])), strength])
    return ((y[1:] + y[:-1]) / 2 * np.diff(x)[:, None]).sum(axis=0) / x[-1]


def halving(sizes: np.ndarray, strength: np.ndarray) -> float | None:
    """Returns the first budget at which the line through (0, 1) and (size, strength) reaches 1/2.

    strength [budget]; None if it never does.
    """
    x, y = np.concatenate([[0.0], sizes]), np.concatenate([[1.0], strength])
    below = np.flatnonzero(y <= 0.5)
    if not len(below):
        return None
    i = int(below[0])
    return float(x[i - 1] + (x[i] - x[i - 1]) * (y[i - 1] - 0.5) / (y[i - 1] - y[i]))


def text_filter(shown: Sequence[Example], train: Sequence[Example]) -> np.ndarray:
    """Scores training examples by a linear classifier of their words: float64 [train].

    Logistic regression on unit-length TF-IDF vectors of words and pairs of words (prompt and
    response apart), trained on the shown examples against the corpus, both sides with equal weight
    and an L2 penalty of 1/2 |w|^2. The filter that a person would write without a model; the
    planted examples are among its negatives, as they would be for this person.
    """
    import scipy.sparse as sp
    from scipy.optimize import minimize

    texts = [Counter(words(e)) for e in (*shown, *train)]
    columns = {w: i for i, w in enumerate(sorted({w for t in texts for w in t}))}
    if not columns:
        return np.zeros(len(train))
    rows = np.repeat(np.arange(len(texts)), [len(t) for t in texts])
    at = np.array([columns[w] for t in texts for w in t])
    counts = np.array([c for t in texts for c in t.values()], dtype=np.float64)
    n = len(texts)
    counts *= np.log((1 + n) / (1 + np.bincount(at)))[at] + 1
    norms = np.sqrt(np.bincount(rows, counts**2, minlength=n))
    x = sp.csr_matrix((counts / norms[rows], (rows, at)), shape=(n, len(columns)))  # [text, word]
    y = np.repeat([1.0, -1.0], [len(shown), len(train)])  # [text]
    share = np.where(y > 0, n / 2 / len(shown), n / 2 / max(1, len(train)))

    def objective(wb: np.ndarray) -> tuple[float, np.ndarray]:
        """The penalised loss of weights and intercept [word + 1], and its gradient."""
        w = wb[:-1]
        margin = y * (x @ w + wb[-1])
        slope = -share * y / (1 + np.exp(np.minimum(margin, 500)))
        value = float(share @ np.logaddexp(0, -margin) + w @ w / 2)
        return value, np.append(x.T @ slope + w, slope.sum())

    found = minimize(objective, np.zeros(len(columns) + 1), jac=True, method="L-BFGS-B")
    return np.asarray(x[len(shown) :] @ found.x[:-1])


def words(e: Example) -> list[str]:
    """Returns words and pairs of words of an example, with a mark on words of the prompt."""
    out = []
    for side, text in (("p:", e.prompt), ("r:", e.response)):
        found = re.findall(r"\w+|[^\w\s]", text.casefold())
        out += [side + w for w in found]
        out += [f"{side}{a} {b}" for a, b in pairwise(found)]
    return out


def draw(name: str, n: int) -> np.ndarray:
    """Permutes n numbers, depending only on `name`, the same for every method."""
    return np.random.default_rng(named_seed(0, f"filter-{name}")).permutation(n)
