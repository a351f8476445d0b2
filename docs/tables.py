"""Writes the tables and the figure of results in README.md and docs/ from the records of runs.

python docs/tables.py RUN [RUN …]

Pages: those of PAGES below, the figure of LDS against cost, and the board of README.md. If several
good records exist for one method, target and benchmark, the record from the last folder is used,
and within a folder the latest. Times are processor times, which other work on the machine distorts
least. A page whose benchmark is in none of the runs stays as it is.
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
MAIN = "smooth"  # pocket's main target: first in every table, and the board of README.md
SHOWN = ("airrep", "trak", "ngram")  # on the board of README.md
Record = dict[str, Any]
Records = dict[tuple[str, str], Record]  # (target, method)


def records(folders: list[Path], benchmark: str, suite: str = "pocket") -> Records:
    """Reads the records of a benchmark on a suite (a record that names none is of any)."""
    found: Records = {}
    ranks: dict[tuple[str, str], tuple[bool, int, str]] = {}
    places = ((i, p) for i, folder in enumerate(folders) for p in folder.glob("cells/*.json"))
    for i, path in places:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["benchmark"]["name"] != benchmark or record["method"]["passed"]:
            continue
        if record.get("suite", {}).get("name", suite) != suite:
            continue
        key = record["target"]["label"], record["method"]["label"]
        rank = (record["status"] == "ok", i, record["started"])
        if key not in ranks or rank > ranks[key]:
            found[key], ranks[key] = {**record, "path": path}, rank
    return found


def interval(metric: dict[str, float] | None, digits: int = 3) -> str:
    """`0.412 [0.300, 0.500]`, without brackets where there is no interval."""
    if metric is None:
        return ""
    value = f"{metric['value']:.{digits}f}"
    if metric.get("low") is None:
        return value
    return f"{value} [{metric['low']:.{digits}f}, {metric['high']:.{digits}f}]"


def markdown(header: str, rows: Iterable[list[str]], numbers: int = 0) -> list[str]:
    """Lines of a table whose last `numbers` columns are right-aligned."""
    names = header.split(" | ")
    rules = ["---"] * (len(names) - numbers) + ["--:"] * numbers
    return [
        f"| {header} |",
        f"|{'|'.join(rules)}|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def good(found: Records, target: str, metric: str, sign: int = -1) -> list[Record]:
    """Records of a target that succeeded, best first."""
    of = [r for (t, _), r in found.items() if t == target and r["status"] == "ok"]
    return sorted(of, key=lambda r: sign * r["metrics"][metric]["value"])


# --------------------------------------------------------------------------- pages


def ordered(found: Records) -> list[str]:
    """Returns the targets of records: the main one, `instruct`, then the others by name."""
    return sorted({t for t, _ in found}, key=lambda t: (t != MAIN, t != "instruct", t))


def main_target(found: Records, metric: str) -> str:
    """Returns the first of `ordered` with a good record of this metric, "" without any."""
    return next((t for t in ordered(found) if good(found, t, metric)), "")


def fidelity(found: Records) -> list[str]:
    lines = []
    for target in ordered(found):
        rows = good(found, target, "lds")
        ceilings = [
            f"{title} {of['value']:.2f}"
            for title, name in (
                ("noise ceiling", "ceiling"),
                ("additive ceiling", "additive_ceiling"),
            )
            if (of := next((r["metrics"][name] for r in rows if name in r["metrics"]), None))
        ]
        header = (
            "method | tuned settings | LDS [95%] | rank | beyond | of ceiling | build | per query "
            "| bytes/ex"
        )
        said = f" ({', '.join(ceilings)})" if ceilings else ""
        lines += [f"### {target}{said}", ""]
        ranks = letters(rows, "lds")
        lines += markdown(header, (_fidelity_row(r, ranks) for r in rows), 5)
        rest = [
            f"`{m}` ({r['status']})"
            for (t, m), r in found.items()
            if t == target and r["status"] != "ok"
        ]
        if rest:
            lines += [f"Without a result in these runs: {', '.join(sorted(rest))}.", ""]
    if pairs := contrasts(found):
        lines += ["### Differences", "", *pairs, ""]
    return lines[:-1]


# Differences on docs/methods/fidelity.md: (method, the method that it is compared with).
PAIRS = (
    ("hybrid-source", "source-fitted"), ("source-fitted", "source"), ("source-fitted", "ekfac"),
    ("source-adam", "source"), ("source", "ekfac"), ("kfac", "ekfac"), ("eshampoo", "ekfac"),
    ("ekfac", "logra"), ("ekfac", "identity"), ("explicit", "ekfac"),
    ("airrep", "airrep-untrained"), ("airrep", "ngram"),
    ("airrep", "logra"), ("airrep", "trak"), ("airrep", "hiddengrad"), ("airrep", "hidden"),
    ("airrep", "tfidf"), ("kfac", "ngram"), ("logra", "ngram"),
    ("trak", "ngram"), ("trackstar", "logra"), ("less", "logra"), ("hiddengrad", "logra"),
    ("lorif", "logra"), ("datainf", "identity"), ("gradcos", "graddot"), ("trak", "traker"),
    ("ngram", "sametask"),
)  # fmt: skip


def contrasts(found: Records) -> list[str]:
    """Paired differences of LDS of PAIRS for new tasks, a column per target."""
    targets = ordered(found)
    boots = {t: replicates(good(found, t, "lds"), "lds") for t in targets}
    rows = []
    for a, b in PAIRS:
        cells = []
        for t in targets:
            if a not in boots[t] or b not in boots[t]:
                cells.append("")
                continue
            cells.append(", ".join(difference(boots[t][a], boots[t][b])))
        if any(cells):
            rows.append([f"`{a}` - `{b}`", *cells])
    heads = [f"{t}: difference [95%], p" for t in targets]
    return markdown(" | ".join(["methods", *heads]), rows)[:-1] if rows else []


def difference(a: Any, b: Any) -> tuple[str, str]:
    """Returns a minus b with its interval, and p, of two bootstraps."""
    from tdabench.stats import compare

    c = compare(a, b)
    p = "< 0.001" if c.p < 0.001 else f"{c.p:.2g}"
    return f"{c.effect:+.3f} [{c.low:+.3f}, {c.high:+.3f}]", p


def replicates(rows: list[Record], metric: str) -> dict[str, Any]:
    """The bootstraps of records, by method; nothing for one that stored none."""
    from tdabench.errors import TdabenchError
    from tdabench.io import read_arrays
    from tdabench.stats import Bootstrap

    drawn = {}
    for r in rows:
        try:
            arrays, _ = read_arrays(r["path"].with_suffix(".safetensors"))
            value = r["metrics"][metric]["value"]
            drawn[r["method"]["label"]] = Bootstrap.of_record(value, arrays["per_query"], arrays)
        except (TdabenchError, KeyError):
            continue
    return drawn


def letters(rows: list[Record], metric: str) -> dict[str, str]:
    """Rank as an interval and letters of each method; nothing for one without replicates."""
    from tdabench.stats import rank_methods

    drawn = replicates(rows, metric)
    found = rank_methods(drawn) if len(drawn) > 1 else None
    if found is None:
        return {}
    spans = [str(a) if a == b else f"{a}–{b}" for a, b in found.spans]
    return {m: f"{s} {x}" for m, s, x in zip(found.labels, spans, found.letters)}


def _fidelity_row(record: Record, ranks: dict[str, str]) -> list[str]:
    method, cost, metrics = record["method"], record["cost"], record["metrics"]
    share, query = metrics.get("share_of_ceiling"), cost["query"]
    beyond = metrics.get("lds_beyond")
    each = 1e3 * query["cpu_seconds"] / max(1, query["queries"])
    return [
        f"`{method['label']}`",
        _tuned(record),
        interval(metrics["lds"]),
        ranks.get(method["label"], ""),
        f"{beyond['value']:.3f}" if beyond else "",
        f"{share['value']:.0%}" if share else "",
        f"{cost['build']['cpu_seconds']:.3g} s",
        f"{each:.3g} ms",
        f"{cost['bytes_per_example']:,.0f}",
    ]


def _tuned(record: Record) -> str:
    return ", ".join(f"{k}={_short(v)}" for k, v in record["method"]["tuned"].items()) or "defaults"


def family(*families: str) -> Callable[[Records], list[str]]:
    """A page of the LDS of methods of these families, a column per target."""

    def page(found: Records) -> list[str]:
        of = {k: r for k, r in found.items() if r["method"].get("family") in families}
        of = {k: r for k, r in of.items() if r["status"] == "ok"}
        targets = ordered(of)

        def value(target: str, label: str) -> float:
            r = of.get((target, label))
            return float(r["metrics"]["lds"]["value"]) if r else float("-inf")

        labels = sorted({m for _, m in of}, key=lambda m: -value(targets[0], m))
        rows = []
        for label in labels:
            here = [of.get((t, label)) for t in targets]
            settings = next(_tuned(r) for r in here if r)
            cells = [interval(r["metrics"]["lds"]) if r else "" for r in here]
            rows.append([f"`{label}`", f"{settings} ({targets[0]})", *cells])
        return markdown(" | ".join(["method", "settings", *targets]), rows)[:-1] if rows else []

    return page


def group_sizes(found: Records) -> list[str]:
    """LDS of one target on every truth that its records name, the main one in the middle."""
    rows = good(found, main_target(found, "lds"), "lds")
    names = [n for n in ("lds-10", "lds", "lds-50") if any(_sized(r, n) for r in rows)]
    titles = {"lds-10": "a tenth (200)", "lds": "a quarter (500)", "lds-50": "half (1,000)"}
    if len(names) < 2:
        return []
    full = [r for r in rows if all(_sized(r, n) for n in names)]
    ceilings = [_sized(full[0], n, "ceiling") if full else None for n in names]
    table = [["noise ceiling", *(interval(c, 2) for c in ceilings)]]
    table += [[f"`{r['method']['label']}`", *(interval(_sized(r, n)) for n in names)] for r in full]
    return [
        *on_target(rows),
        *markdown(" | ".join(["method", *(titles[n] for n in names)]), table)[:-1],
    ]


def _sized(record: Record, truth: str, kind: str = "lds") -> dict[str, float] | None:
    name = kind if truth == "lds" else f"{kind}[{truth}]"
    found: dict[str, float] | None = record["metrics"].get(name)
    return found


def transfer(found: Records) -> list[str]:
    """LDS of scores from one target on each target, and what bounds it there."""
    source = main_target(found, "transfer")
    rows = good(found, source, "transfer")
    if not rows:
        return []
    names = [n[4:-1] for n in rows[0]["metrics"] if n.startswith("lds[")]
    names.sort(key=lambda n: (n != "source", n))
    table = []
    for r in rows:
        cells = [r["metrics"].get(f"lds[{n}]") for n in names]
        values = [f"{c['value']:.3f}" if c else "" for c in cells]
        mean = interval(r["metrics"]["transfer"])
        table.append([f"`{r['method']['label']}`", mean, *values])
    for title, kind in (
        ("others' truths", "truth"),
        ("knowing no model", "agnostic"),
        ("noise ceiling", "ceiling"),
    ):
        of = [rows[0]["metrics"].get(f"{kind}[{n}]") for n in names]
        if any(of):
            table.append([title, "", *(f"{c['value']:.3f}" if c else "" for c in of)])
    heads = [source if n == "source" else n for n in names]
    return markdown(" | ".join(["method", "transfer [95%]", *heads]), table, len(heads))[:-1]


def columns(
    metric: str, shown: dict[str, str], baselines: tuple[str, ...] = (), sign: int = -1
) -> Callable[[Records], list[str]]:
    """A page of some metrics of one benchmark on one target, best first: metric -> header.

    `baselines` are what every record holds beside the method, as `METRIC_BASELINE`; `sign` is 1
    where lower is better.
    """

    def page(found: Records) -> list[str]:
        rows = good(found, main_target(found, metric), metric, sign)
        cells = [
            [f"`{r['method']['label']}`", *(interval(r["metrics"].get(m)) for m in shown)]
            for r in rows
        ]
        for name in baselines if rows else ():
            names = ["@".join([f"{a}_{name}", *b]) for a, *b in (m.split("@") for m in shown)]
            of = [rows[0]["metrics"].get(m) for m in names]
            cells.append([f"({name})", *(interval(m) for m in of)])
        table = markdown(" | ".join(["method", *shown.values()]), cells)[:-1]
        return [*on_target(rows), *table] if rows else []

    return page


def on_target(rows: list[Record]) -> list[str]:
    """Returns the line above a table that names its target."""
    return [f"Target `{rows[0]['target']['label']}`:", ""] if rows else []


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def loo(found: Records) -> list[str]:
    """A table per target, in two columns of methods, under its name where there are several."""
    lines = []
    for target in ordered(found):
        rows = good(found, target, "loo")
        cells = [[f"`{r['method']['label']}`", interval(r["metrics"]["loo"])] for r in rows]
        half = (len(cells) + 1) // 2
        right = cells[half:] + [["", ""]] * (2 * half - len(cells))
        pairs = [[*a, "", *b] for a, b in zip(cells[:half], right)]
        if not pairs:
            continue
        if len(ordered(found)) > 1:
            lines += [f"### {target}", ""]
        lines += markdown("method | loo [95%] |  | method | loo [95%]", pairs)
    return lines[:-1]


def removal(found: Records) -> list[str]:
    def row(record: Record) -> list[str]:
        m = record["metrics"]
        rises = [interval(m[f"rise@{k}"], 2) for k in (5, 20)]
        alike = [f"{m[f'rise_matched@{k}']['value']:+.2f}" for k in (5, 20)] if matched else []
        return [f"`{record['method']['label']}`", interval(m["removal"], 2), *rises, *alike]

    rows = good(found, main_target(found, "removal"), "removal")
    if not rows:
        return []
    # Only what was asked in the same way: on the most queries that any method was asked.
    asked = max((r["benchmark"]["params"] for r in rows), key=lambda p: p["n"])
    rows = [r for r in rows if r["benchmark"]["params"] == asked]
    matched = asked["matched"] > 0
    header = "method | removal [95%] | rise@5 [95%] | rise@20 [95%]"
    header += " | matched@5 | matched@20" if matched else ""
    random = [rows[0]["metrics"].get(f"rise_random@{k}") for k in (5, 20)]
    more = []
    if all(random):
        said = [f"{m['value']:+.2f}" for m in random if m]
        more = ["", f"Leaving out 5 random examples moves the loss by {said[0]}, 20 by {said[1]}."]
    return [*on_target(rows), *markdown(header, map(row, rows))[:-1], *more]


def selection(found: Records) -> list[str]:
    def row(record: Record) -> list[str]:
        m = record["metrics"]
        losses = [f"{m[f'loss@{k}']['value']:.2f}" for k in (20, 60)]
        of = [interval(m[k], 2) for k in ("loss", "gain_over_random")]
        return [f"`{record['method']['label']}`", *of, *losses]

    header = "method | loss [95%] | reduction from random examples [95%] | k = 20 | k = 60"
    rows = good(found, main_target(found, "loss"), "loss", sign=1)
    if not rows:
        return []
    m = rows[0]["metrics"]
    known = {
        "random choices": m.get("loss_random"),
        "the oracle": m.get("loss_oracle"),
        "the whole pool": next((v for k, v in m.items() if k.startswith("loss_full@")), None),
        "no training": m.get("loss_zeroshot@0"),
    }
    said = [f"{k} {v['value']:.2f}" for k, v in known.items() if v]
    more = ["", f"Losses without attribution: {', '.join(said)}."] if said else []
    return [*on_target(rows), *markdown(header, map(row, rows))[:-1], *more]


FACTBOOK = "suites-factbook.md"
ASIDE = {  # further columns of factbook's board: benchmark -> metric -> header
    "classification": {"accuracy": "kind first", "accuracy_source": "country first"},
    "tracing": {"mrr": "mrr"},
    "sources": {"sources": "without a country"},
    "removal": {"removal": "QLD"},
}


def factbook(folders: list[Path]) -> list[str]:
    """LDS of methods on factbook's two targets, and what else was measured of them there.

    Behind each table: how far its ranking agrees with the other target's and pocket's.
    """
    aside = {b: records(folders, b, "factbook") for b in ASIDE}
    lds = records(folders, "lds", "factbook")
    small, real = (good(lds, target, "lds") for target in ("small", "smollm2"))
    lines = _factbook_board(small, "small", aside)
    if not real:
        return lines
    found = {r["method"]["label"]: r["metrics"]["lds"]["value"] for r in small}
    more = _agreement(real, found, "on `small`")
    return [*lines, "", "### SmolLM2-135M", "", *_factbook_board(real, "smollm2", aside), *more]


def _factbook_board(rows: list[Record], target: str, aside: dict[str, Records]) -> list[str]:
    if not rows:
        return []
    ranks = letters(rows, "lds")

    def cells(record: Record) -> list[str]:
        label, metrics, cost = record["method"]["label"], record["metrics"], record["cost"]
        more = []
        for benchmark, shown in ASIDE.items():
            other = aside[benchmark].get((target, label), {}).get("metrics", {})
            more += [f"{other[m]['value']:.2f}" if m in other else "" for m in shown]
        share = metrics.get("share_of_ceiling")
        each = 1e3 * cost["query"]["cpu_seconds"] / max(1, cost["query"]["queries"])
        return [
            f"`{label}`", interval(metrics["lds"]), ranks.get(label, ""),
            f"{share['value']:.0%}" if share else "",
            f"{metrics['lds_beyond']['value']:.2f}" if "lds_beyond" in metrics else "", *more,
            f"{cost['build']['cpu_seconds']:.3g} s", f"{each:.3g} ms",
        ]  # fmt: skip

    heads = [h for shown in ASIDE.values() for h in shown.values()]
    heads = ["of ceiling", "beyond", *heads, "build", "per query"]
    table = [cells(r) for r in rows]
    kept = [i for i in range(len(table[0])) if i < 3 or any(row[i] for row in table)]
    names = ["method", "LDS [95%]", "rank", *heads]
    header = " | ".join(names[i] for i in kept)  # nothing that was not measured
    lines = markdown(header, ([row[i] for i in kept] for row in table), len(kept) - 3)
    ceiling = next((r["metrics"]["ceiling"] for r in rows if "ceiling" in r["metrics"]), None)
    if ceiling:
        lines.append(f"Noise ceiling {interval(ceiling, 2)}.")
    for other in dict.fromkeys((MAIN, "instruct")):
        there = _published_lds(DOCS / "methods" / "fidelity.md", other)
        lines += _agreement(rows, there, f"on pocket's `{other}`")
    return lines


def _agreement(rows: list[Record], there: dict[str, float], where: str) -> list[str]:
    """Says how far the LDS of the rows ranks the methods as `there` [method -> LDS] does."""
    from scipy.stats import spearmanr

    here = {r["method"]["label"]: r["metrics"]["lds"]["value"] for r in rows}
    both = sorted(set(here) & set(there))
    if len(both) < 3:
        return []
    rho = spearmanr([here[m] for m in both], [there[m] for m in both]).statistic
    return [
        f"Over the {len(both)} methods that are on both boards, LDS here and {where} have a "
        f"Spearman correlation of {rho:.2f}."
    ]


def _published_lds(page: Path, target: str) -> dict[str, float]:
    """The LDS of methods in the table of a target: method -> value."""
    first = page.read_text(encoding="utf-8").partition(f"### {target} ")[2].partition("###")[0]
    found = re.findall(r"^\| `([^`]+)` \| [^|]* \| (-?[\d.]+)", first, re.M)
    return {m: float(v) for m, v in found}


PAGES: list[tuple[str, str, Callable[[Records], list[str]]]] = [
    ("methods/fidelity.md", "lds", fidelity),
    ("methods/text.md", "lds", family("text")),
    ("methods/controls.md", "lds", family("control")),
    ("benchmarks/lds.md", "lds", group_sizes),
    ("benchmarks/loo.md", "loo", loo),
    ("benchmarks/removal.md", "removal", removal),
    ("benchmarks/selection.md", "selection", selection),
    ("benchmarks/transfer.md", "transfer", transfer),
    (
        "benchmarks/sources.md",
        "sources",
        columns(
            "sources",
            {
                "sources": "sources [95%]",
                "strongest": "strongest found",
                "elsewhere": "elsewhere [95%]",
                "behaviour": "sets of queries [95%]",
                "copies_worth": "worth of copies",
            },
        ),
    ),
    (
        "benchmarks/behaviours.md",
        "behaviours",
        columns("behaviours", {"behaviours": "behaviours [95%]", "contrast": "contrast [95%]"}),
    ),
    (
        "benchmarks/filter.md",
        "filter",
        columns(
            "area",
            {
                "area": "area [95%]",
                "half": "half",
                "less_than_text": "less than the text filter [95%]",
                "area_trigger": "trigger",
                "area_unsafe": "tone",
                "area_wrong": "wrong answers",
                "collateral@0.1": "clean queries, nats",
                "spoiled_wrong@0.1": "right answers, nats",
            },
            baselines=("oracle", "text", "random"),
            sign=1,
        ),
    ),
    (
        "benchmarks/classification.md",
        "classification",
        columns(
            "accuracy",
            {
                "accuracy": "accuracy [95%]",
                "accuracy_knn": "vote of the nearest",
                "chance": "chance",
            },
        ),
    ),
    (
        "benchmarks/tracing.md",
        "tracing",
        columns(
            "mrr",
            {
                "mrr": "mrr [95%]",
                "mrr_without_decoys": "without decoys",
                "mrr_with_answers": "with decoys that hold the answer",
                "decoy_rate": "a decoy first",
            },
        ),
    ),
    (
        "benchmarks/noise.md",
        "noise",
        columns(
            "average_precision",
            {
                "average_precision": "average precision [95%]",
                "average_precision_harmful": "wrong answers",
                "average_precision_unsafe": "style",
                "average_precision_unsafe_homogeneous": "style among look-alikes",
            },
        ),
    ),
]
MARKS = re.compile(
    r"(<!-- results: generated by docs/tables.py -->\n).*?(<!-- end of results -->)", re.S
)
BOARD = re.compile(r"(<!-- board: [^\n]* -->\n\n```\n).*?(```\n)", re.S)


def board(folders: list[Path]) -> str:
    """The board of a run of SHOWN on the main target, as a pipe prints it; "" without one."""
    from rich.console import Console

    from tdabench.errors import TdabenchError
    from tdabench.report.board import Board
    from tdabench.report.terminal import print_board

    out = io.StringIO()
    columns = ["rank", "method", "lds", "share", "build", "query", "bytes"]
    holds = [f for f in folders if _only_the_shown(f)]
    if not holds:
        return ""
    try:
        found = Board.from_runs(holds[:1], methods=SHOWN, targets=[MAIN], cache=False)
        print_board(found, Console(file=out, width=100), columns=columns, target=MAIN)
    except TdabenchError:
        return ""
    return out.getvalue()


def _only_the_shown(folder: Path) -> bool:
    """Whether a run measured SHOWN on the main target by LDS, and nothing else."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("cells/*.json")]
    return sorted(
        (r["benchmark"]["name"], r["target"]["label"], r["method"]["label"]) for r in found
    ) == sorted(("lds", MAIN, m) for m in SHOWN)


FIGURE = "methods/fidelity-cost.svg"
FIGURE_TARGETS = ("smooth", "instruct")  # the first of them in the runs is drawn


def cost_figure(folders: list[Path]) -> bytes | None:
    """LDS against the processor time of preparation, build and all queries, as SVG.

    None if the runs have no LDS record of FIGURE_TARGETS.
    """
    from tdabench.report import figures, plots

    found = records(folders, "lds")
    target = next((t for t in FIGURE_TARGETS if good(found, t, "lds")), None)
    if target is None:
        return None
    rows = good(found, target, "lds")
    points = []
    for r in rows:
        cost, lds = r["cost"], r["metrics"]["lds"]
        prepared = cost.get("prepare") or {}
        seconds = prepared.get("seconds") or 0.0
        if not seconds and cost["build"]["cpu_seconds"] < prepared.get("retrainings", 0):
            continue  # such a build cannot hold its retrainings, whose time nobody recorded
        seconds += cost["build"]["cpu_seconds"] + cost["query"]["cpu_seconds"]
        low, high = lds.get("low"), lds.get("high")
        family = r["method"].get("family") or "other"
        points.append(
            figures.Point(r["method"]["label"], family, seconds, lds["value"], low, high, False)
        )
    first = rows[0]["metrics"]
    lines = {
        name: first[key]["value"]
        for key, name in (("ceiling", "noise ceiling"), ("additive_ceiling", "additive ceiling"))
        if key in first
    }
    queries = rows[0]["cost"]["query"]["queries"]
    figure = plots.scatter(
        figures.with_front([p for p in points if p.x > 0]),
        f"preparation + build + {queries} queries, seconds of one core",
        "LDS on the test truth",
        f"pocket · {target}",
        lines,
    )
    return plots.figure_bytes(figure, "svg")


AIRREP = "methods/airrep.md"
BUDGET = "methods/airrep-labels.svg"
VARIANTS = "pocket-variants"  # the suite that `tdabench airrep variants` writes


def learning(folders: list[Path]) -> list[str]:
    """Table of the variants of AirRep's encoder: what labels, pooling in training and body add."""
    found = records(folders, "lds", VARIANTS)
    main = records(folders, "lds")
    rows = sorted(good(found, MAIN, "lds"), key=lambda r: r["metrics"]["lds"]["value"])
    others = [main[MAIN, m] for m in ("logra", "ekfac") if (MAIN, m) in main]
    drawn = replicates([*rows, *others], "lds")
    full = drawn.get("airrep-full")
    if full is None:
        return []
    table = []
    for r in [*rows, *others]:
        label = r["method"]["label"]
        tuned = r["method"]["tuned"]
        compared = label != "airrep-full" and label in drawn
        table.append(
            [
                f"`{label}`",
                f"{(r['cost'].get('prepare') or {}).get('retrainings', 0):,.0f}",
                _short(tuned["temperature"]) if "temperature" in tuned else "",
                interval(r["metrics"]["lds"]),
                *(difference(full, drawn[label]) if compared else ("", "")),
                f"{r['cost']['bytes_per_example']:,.0f}",
            ]
        )
    header = (
        "encoder | retrainings | temperature | LDS [95%] | `airrep-full` minus it [95%] | p "
        "| bytes/ex"
    )
    return markdown(header, table)[:-1]


def budget_figure(folders: list[Path]) -> bytes | None:
    """LDS of AirRep's variants against retrainings for labels, as SVG; None without records."""
    from tdabench.report import figures, plots

    found = good(records(folders, "lds", VARIANTS), MAIN, "lds")
    start = [r for r in found if r["method"]["label"] == "airrep-start"]
    logra = records(folders, "lds").get((MAIN, "logra"))
    points = []
    for r in found:
        label, n = r["method"]["label"], (r["cost"].get("prepare") or {}).get("retrainings", 0)
        if n:
            series = "averaged in training" if label == "airrep-no-attention" else "as published"
            name, lds = label.removeprefix("airrep-"), r["metrics"]["lds"]
            points.append(
                figures.Point(name, series, n, lds["value"], lds["low"], lds["high"], False)
            )
    if len(points) < 2:
        return None
    named = [*(("no labels", r) for r in start), *([("logra", logra)] if logra else [])]
    lines = {name: r["metrics"]["lds"]["value"] for name, r in named}
    figure = plots.scatter(
        points,
        "retrainings for labels",
        "LDS on the test truth",
        f"pocket · {MAIN} · airrep",
        lines,
    )
    return plots.figure_bytes(figure, "svg")


def write_between_marks(path: Path, lines: list[str]) -> None:
    """Replaces what stands between the marks of a page. Exits if it has none."""
    text = path.read_text(encoding="utf-8")
    if not MARKS.search(text):
        sys.exit(f"{path} has no marks")
    body = "\n".join(lines) + "\n"
    path.write_text(MARKS.sub(lambda m: m[1] + body + m[2], text), encoding="utf-8")


def main() -> None:
    folders = [Path(a) for a in sys.argv[1:]]
    written = 0
    for name, benchmark, page in PAGES:
        found = records(folders, benchmark)
        lines = page(found) if found else []
        if not lines:
            continue
        write_between_marks(DOCS / name, lines)
        written += 1
    for page_name, lines in ((FACTBOOK, factbook(folders)), (AIRREP, learning(folders))):
        if not lines:
            continue
        write_between_marks(DOCS / page_name, lines)
        written += 1
    if drawn := budget_figure(folders):
        (DOCS / BUDGET).write_bytes(drawn)
    if drawn := cost_figure(folders):
        (DOCS / FIGURE).write_bytes(drawn)
    if README.exists() and (shown := board(folders)):
        text = README.read_text(encoding="utf-8")
        README.write_text(BOARD.sub(lambda m: m[1] + shown + m[2], text), encoding="utf-8")
    if not written:
        sys.exit(f"no records of these benchmarks in {sys.argv[1:]}")


if __name__ == "__main__":
    main()
