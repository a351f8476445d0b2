"""Simulates benchmarks and counts how often intervals cover and tests reject: docs/statistics.md.

    OMP_NUM_THREADS=1 python benchmarks/statistics_simulation.py [--repeats 300] [TABLE …]

Tables: tasks (LDS with queries clustered by task), small (few queries or tasks), ceiling (noise
ceiling at low reliability), ranks (family-wise error of letters), designs (groups that are
complementary pairs or partition the pool), until (groups added until an interval is narrow
enough), control (what a cheap method's scores on further groups are worth). Each prints one in
Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from tdabench import stats
from tdabench.truth.until import looks


def tasks(repeats: int) -> None:
    """Coverage and size for new tasks and for these tasks.

    A query's expected Spearman is 0.3 + t + q: t differs between tasks (standard deviation 0.15
    shared by both methods and 0.1 of each method's own) and q between queries of a task (0.1). New
    tasks are drawn for each simulated benchmark.
    """
    print("| tasks x queries x groups | new tasks: coverage | these tasks: coverage | "
          "new tasks: size | these tasks: size |\n|-|-|-|-|-|")  # fmt: skip
    for n_tasks, per_task, n_groups in ((30, 4, 20), (30, 13, 40), (30, 4, 100), (12, 10, 40),
                                        (6, 20, 40)):  # fmt: skip
        rng = np.random.default_rng([n_tasks, per_task, n_groups])
        many = [one_lds(rng, n_tasks, per_task, n_groups) for _ in range(4 * repeats)]
        expected = np.mean([stats.lds(m, t) for t, ms, _ in many for m in ms])
        found = np.zeros(4)
        for i in range(repeats):
            truth, methods, task = one_lds(rng, n_tasks, per_task, n_groups)
            a, b = (stats.bootstrap_lds(m, truth, 300, i, tasks=task) for m in methods)
            for k, scope in enumerate((None, "these tasks")):
                low, high = a.interval(scope=scope) or (np.nan, np.nan)  # type: ignore[arg-type]
                found[k] += low <= expected <= high
                found[2 + k] += (a - b).p_value(scope) < 0.05  # type: ignore[arg-type]
        print(f"| {n_tasks} x {per_task} x {n_groups} | " + " | ".join(
            f"{100 * x / repeats:.1f}%" for x in found) + " |", flush=True)  # fmt: skip


def one_lds(
    rng: np.random.Generator, n_tasks: int, per_task: int, n_groups: int
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Truth [query, group], scores of two methods of equal merit, and the task of each query."""
    n = n_tasks * per_task
    task = np.repeat(np.arange(n_tasks), per_task)
    truth = rng.normal(size=(n, n_groups)) + 0.3 * rng.normal(size=n_groups)
    common = rng.normal(0.3, 0.15, size=n_tasks)
    methods = []
    for _ in range(2):
        skill = (common + rng.normal(0, 0.1, size=n_tasks))[task] + rng.normal(0, 0.1, size=n)
        r = np.clip(skill, -0.95, 0.95)[:, None]
        methods.append(r * truth + np.sqrt(1 - r * r) * rng.normal(size=truth.shape))
    return truth, methods, task


def small(repeats: int) -> None:
    """A mean over few values: normal, skewed (log-normal), and a share of ones."""
    print("| n | normal: size | normal: coverage | log-normal: coverage | share 0.9: coverage |\n"
          "|-|-|-|-|-|")  # fmt: skip
    draws: list[tuple[Callable[..., np.ndarray], float, bool]] = [
        (lambda rng, n: rng.normal(size=n), 0.0, False),
        (lambda rng, n: rng.lognormal(0, 0.75, size=n), float(np.exp(0.75**2 / 2)), False),
        (lambda rng, n: (rng.random(n) < 0.9).astype(float), 0.9, True),
    ]
    for n in (3, 5, 10, 30):
        rng = np.random.default_rng(n)
        size, cover = 0, np.zeros(3)
        for i in range(repeats):
            for k, (draw, mean, share) in enumerate(draws):
                b = stats.bootstrap_queries(draw(rng, n), 400, i)
                found = b.share_interval() if share else b.interval()
                low, high = found or (np.nan, np.nan)
                cover[k] += low <= mean <= high
                size += k == 0 and b.p_value() < 0.05
        print(f"| {n} | {100 * size / repeats:.1f}% | " + " | ".join(
            f"{100 * c / repeats:.1f}%" for c in cover) + " |", flush=True)  # fmt: skip


def ceiling(repeats: int) -> None:
    """Estimated ceiling less what knowing the expected loss reaches; half the queries noise."""
    print("| seeds | signal / noise | queries with signal | reliability | ceiling | error |\n"
          "|-|-|-|-|-|-|")  # fmt: skip
    for n_seeds in (2, 4):
        for snr in (0.3, 0.6, 1.0, 2.0):
            for share in (0.5, 1.0):
                rng = np.random.default_rng([n_seeds, int(10 * snr), int(10 * share)])
                rows = []
                for i in range(max(4, repeats // 25)):
                    size = np.where(np.arange(200) < 200 * share, snr, 1e-3)[:, None]
                    expected = size * rng.normal(size=(200, 60))
                    truth = expected + rng.normal(size=(n_seeds, 200, 60))
                    oracle = stats.lds(expected, truth.mean(axis=0))
                    c = stats.noise_ceiling(truth, 10, i)
                    rows.append((stats.reliability(truth), c.value if c else np.nan, oracle))
                r, value, oracle = np.nanmean(np.array(rows, dtype=float), axis=0)
                said = "none" if np.isnan(value) else f"{value:.2f}"
                error = "" if np.isnan(value) else f"{value - oracle:+.3f}"
                print(
                    f"| {n_seeds} | {snr} | {share:.0%} | {r:.2f} | {said} | {error} |", flush=True
                )


def ranks(repeats: int) -> None:
    """Equal methods: how often any two of them get no letter in common."""
    print("| methods | tasks x queries | any pair separated (5%) |\n|-|-|-|")
    for n in (6, 20):
        rng = np.random.default_rng(n)
        task = np.repeat(np.arange(30), 10)
        hits = 0
        for i in range(repeats):
            own = rng.normal(size=(n, 30))[:, task] + rng.normal(size=(n, 300))
            boots = {str(m): stats.bootstrap_queries(v, 300, i, task) for m, v in enumerate(own)}
            hits += len(set(stats.rank_methods(boots).letters)) > 1
        print(f"| {n} | 30 x 10 | {100 * hits / repeats:.1f}% |", flush=True)


def designs(repeats: int) -> None:
    """LDS over 40 groups of 400 examples, drawn independently or such that they share the pool.

    Losses are sums of effects of the members and noise of retraining (`noise`: its share of the
    variance); effects, and a method's scores of them, are half common to all 100 queries. Groups of
    one partition hold every example once: a half and its complement, or four quarters. The interval
    draws groups independently, as `bootstrap_lds` does. `as many` is how many independent groups
    would have the same standard deviation.
    """
    print("| size | noise | groups | LDS | sd | as many | width | coverage |\n|-|-|-|-|-|-|-|-|")
    for k in (2, 4):
        for noise in (0.0, 0.5):
            first = 0.0
            for name, shared in (("independent", False), ("pairs" if k == 2 else "fours", True)):
                rng = np.random.default_rng([k, int(10 * noise)])  # the same effects for both
                found, spans = [], []
                for i in range(repeats):
                    scores, truth = additive(rng, designed(rng, k, 40, 400, shared), noise)
                    boot = stats.bootstrap_lds(scores, truth, 300, i)
                    found.append(boot.value)
                    spans.append(boot.interval() or (np.nan, np.nan))
                mean, sd = float(np.mean(found)), float(np.std(found, ddof=1))
                first = first or sd
                low, high = np.array(spans).T
                print(
                    f"| 1/{k} | {noise:.0%} | {name} | {mean:.3f} | {sd:.4f} | "
                    f"{40 * (first / sd) ** 2:.0f} | {np.mean(high - low):.3f} | "
                    f"{100 * np.mean((low <= mean) & (mean <= high)):.1f}% |",
                    flush=True,
                )


def designed(rng: np.random.Generator, k: int, n: int, n_train: int, shared: bool) -> np.ndarray:
    """Membership [n, n_train] of n groups of a k-th of the pool; `shared`: k partition the pool."""
    member = np.zeros((n, n_train))
    for g in range(n):
        if g % k == 0 or not shared:
            order, place = rng.permutation(n_train), 0
        else:
            place = g % k
        size = n_train // k
        member[g, order[place * size : (place + 1) * size]] = 1
    return member


def additive(
    rng: np.random.Generator, member: np.ndarray, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and truth [query, group] of groups whose members' effects add up."""
    n_queries, n_train = 100, member.shape[1]

    def drawn() -> np.ndarray:
        common, own = rng.normal(size=n_train), rng.normal(size=(n_queries, n_train))
        return (common + own) / np.sqrt(2)

    effects = drawn()
    scores = (0.5 * effects + np.sqrt(0.75) * drawn()) @ member.T
    truth = effects @ member.T
    truth = truth / truth.std() * np.sqrt(1 - noise) + np.sqrt(noise) * rng.normal(size=truth.shape)
    return scores, truth


def until(repeats: int) -> None:
    """Groups are added until the reference's interval over groups is `width` or narrower.

    Losses are as in `designs` (60 queries, groups of a quarter, half of the variance noise). The
    reference's scores correlate with the effects by 0.35, another method's by 0.7. "over groups" is
    the interval by which the build stops, for queries (effects) that are the same in all repeats;
    "board" the interval of `bootstrap_lds`, for fresh ones. A value is compared with the mean over
    repeats of the LDS at that number of groups. Rules: a fixed number (the mean at which the rule
    of tdabench stops), a look after every second group from 6 on, and the rule of tdabench.
    """
    grid = sorted({*range(6, 40, 2), *range(40, 228, 8), *looks(226)})
    rules = {"every second group": [n for n in grid if n % 2 == 0], "tdabench": looks(226)}
    print("| queries | width | rule | groups, mean (5% to 95%) | reference: error | reference: "
          "coverage | other: error | other: coverage |\n|-|-|-|-|-|-|-|-|")  # fmt: skip
    for same in (True, False):
        rng = np.random.default_rng([7, same])
        fixed = effects_of(rng, (0.35, 0.7))
        runs = []
        for i in range(repeats):
            world = fixed if same else effects_of(rng, (0.35, 0.7))
            runs.append(Sequential(rng, world, grid, i, same))
        expected = {n: np.mean([r.values[n] for r in runs], axis=0) for n in grid}
        for width in (0.10, 0.07, 0.05):
            stops = {k: [r.stop(v, width) for r in runs] for k, v in rules.items()}
            middle = min(grid, key=lambda n: abs(n - np.mean(stops["tdabench"])))
            for rule, at in {"fixed number": [middle] * len(runs), **stops}.items():
                off = np.array([r.values[n] - expected[n] for r, n in zip(runs, at)])  # [run, 2]
                ends = np.array([r.ends(n) for r, n in zip(runs, at)])  # [run, 2, 2]
                inside = (ends[..., 0] <= -off) & (-off <= ends[..., 1])
                low, high = np.quantile(at, [0.05, 0.95])
                error, cover = off.mean(axis=0), 100 * inside.mean(axis=0)
                print(
                    f"| {'the same' if same else 'fresh'} | {width:.2f} | {rule} | "
                    f"{np.mean(at):.0f} ({low:.0f} to {high:.0f}) | {error[0]:+.3f} | "
                    f"{cover[0]:.1f}% | {error[1]:+.3f} | {cover[1]:.1f}% |", flush=True,
                )  # fmt: skip


def effects_of(
    rng: np.random.Generator, skills: tuple[float, ...], n_queries: int = 60, n_train: int = 200
) -> list[np.ndarray]:
    """Effects [query, train], half common to all queries, and scores of methods of such skills."""

    def drawn() -> np.ndarray:
        common, own = rng.normal(size=n_train), rng.normal(size=(n_queries, n_train))
        return (common + own) / np.sqrt(2)

    effects = drawn()
    return [effects, *(s * effects + np.sqrt(1 - s * s) * drawn() for s in skills)]


class Sequential:
    """One sequence of groups: the LDS of two methods after n groups, and their intervals."""

    def __init__(
        self, rng: np.random.Generator, world: list[np.ndarray], grid: list[int], seed: int,
        same: bool,
    ) -> None:  # fmt: skip
        effects, *methods = world
        member = designed(rng, 4, grid[-1], effects.shape[1], shared=False)
        truth = effects @ member.T
        truth = truth / truth.std() + rng.normal(size=truth.shape)
        self.truth, self.scores = truth, [m @ member.T for m in methods]
        self.seed, self.same = seed, same
        self.values = {n: np.array([stats.lds(s[:, :n], truth[:, :n]) for s in self.scores])
                       for n in grid}  # fmt: skip

    def boot(self, method: int, n: int) -> stats.Bootstrap:
        return stats.bootstrap_lds(self.scores[method][:, :n], self.truth[:, :n], 300, self.seed)

    def stop(self, rule: list[int], width: float) -> int:
        """The first number of groups at which the reference's interval is narrow enough."""
        for n in rule:
            if self.boot(0, n).half_width_over_groups(n) <= width:
                return n
        return rule[-1]

    def ends(self, n: int) -> list[tuple[float, float]]:
        """Both methods' intervals less their values."""
        out = []
        for k in range(2):
            boot = self.boot(k, n)
            half = boot.half_width_over_groups(n)
            low, high = boot.interval() or (np.nan, np.nan)
            out.append((-half, half) if self.same else (low - boot.value, high - boot.value))
        return out


def control(repeats: int) -> None:
    """What knowing a cheap method's scores on all groups, retrained or not, could be worth.

    The correlation of the method's scores with the cheap method's over the groups that were
    retrained is compared with the one over very many groups, and the LDS corrected by the
    difference (a control variate), with the best factor. `worth` is how many groups without it
    have the variance of 40 with it: 40 / (1 - R^2). The cheap method's scores have a share of
    `in common` of what the method itself gets wrong, as methods of one family do.
    """
    print(
        "| cheap method's skill | in common | LDS of the cheap one | R | worth, of 40 |\n"
        "|-|-|-|-|-|"
    )
    for skill in (0.2, 0.35, 0.7):
        for shared in (0.0, 0.5):
            rng = np.random.default_rng([int(100 * skill), int(10 * shared)])
            effects, cheap, method = effects_of(rng, (skill, 0.7))
            cheap = cheap + np.sqrt(shared) * (method - 0.7 * effects)
            rows = []
            for _ in range(repeats):
                member = designed(rng, 4, 40, effects.shape[1], shared=False)
                truth = effects @ member.T
                truth = truth / truth.std() + rng.normal(size=truth.shape)
                m, c = method @ member.T, cheap @ member.T
                rows.append((stats.lds(m, truth), stats.lds(m, c), stats.lds(c, truth)))
            lds, control, of_cheap = np.array(rows).T
            r = float(np.corrcoef(lds, control)[0, 1])
            print(f"| {skill} | {shared:.0%} | {of_cheap.mean():.2f} | {r:.2f} | "
                  f"{40 / (1 - r * r):.0f} |", flush=True)  # fmt: skip


TABLES = {f.__name__: f for f in (tasks, small, ceiling, ranks, designs, until, control)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--repeats", type=int, default=300)
    args = parser.parse_args()
    if strange := set(args.tables) - set(TABLES):
        parser.error(f"unknown table {strange.pop()!r}; one of: {', '.join(TABLES)}")
    for name in args.tables or TABLES:
        print(f"\n{name}\n", flush=True)
        TABLES[name](args.repeats)


if __name__ == "__main__":
    main()
