"""Says what the truths of both targets reward: counts of examples, and methods beyond them.

    python -m tools.factbook.explain_truth [RUN …] [--write]

Each count is scored like a method: the number of a group's examples of a sort, against retraining
on the group. For the methods of the runs follows their LDS beyond the answered questions of the
query's kind, which explain most. `--write` puts the tables into docs/suites-factbook.md.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tdabench import stats
from tdabench.data.examples import Example
from tdabench.io import read_arrays
from tdabench.run.sources import load_suite
from tdabench.run.suite_file import read_suite
from tdabench.truth import Truth
from tools.factbook import SUITE

PAGE = Path(__file__).parents[2] / "docs" / "suites-factbook.md"
TARGETS = ("small", "smollm2")
FORM = "answered questions of the query's kind"


def marks(target: str) -> re.Pattern[str]:
    """Returns what surrounds the tables of a target on the page."""
    between = r"-->\n).*?(<!-- end of counts -->)"
    return re.compile(rf"(<!-- counts of {target}: generated [^\n]*{between}", re.S)


def replaced(text: str, target: str, body: str) -> str:
    """Returns the page with other tables of a target."""
    return marks(target).sub(lambda m: m[1] + body + m[2], text)


def is_question(e: Example) -> bool:
    """Tells a question that asks for an answer from a passage with its heading."""
    return "?" in e.prompt and e.prompt.endswith(".")


def counts(train: Sequence[Example], queries: Sequence[Example]) -> dict[str, np.ndarray]:
    """Returns what is counted, as weights of training examples for queries: [query, train]."""
    question = np.array([is_question(e) for e in train], dtype=float)
    kind = np.array([[e.task == q.task for e in train] for q in queries], dtype=float)
    country = np.array(
        [[e.meta.get("source") == q.meta.get("source") for e in train] for q in queries],
        dtype=float,
    )
    return {
        FORM: kind * question,
        "passages of the query's kind": kind * (1 - question),
        "examples of the query's kind": kind,
        "answered questions": np.tile(question, (len(queries), 1)),
        "examples of the query's country": country,
    }


def tables(truth: Truth, train: Sequence[Example], queries: Sequence[Example],
           runs: Sequence[Path], target: str) -> list[str]:  # fmt: skip
    """Returns the lines of both tables of a target; queries are in the order of the truth's ids."""
    member = truth.groups.membership(np.float64)  # [group, train]
    found = {name: (member @ w.T).T for name, w in counts(train, queries).items()}
    lines = ["| counted in a group | LDS |", "|-|--:|"]
    for name, scores in found.items():
        value = float(stats.spearman_rows(scores, truth.values).mean())
        lines.append(f"| {name} | {value:.3f} |")
    known = (2 * stats.average_ranks(found[FORM])).astype(np.uint16)[None]
    rows = {}  # method -> (value beyond the count, line); a later run wins
    for path in (p for run in runs for p in sorted(run.glob("cells/*.json"))):
        record = json.loads(path.read_text(encoding="utf-8"))
        of = record["benchmark"]["name"], record["target"]["label"], record["status"]
        if of != ("lds", target, "ok") or record["method"]["passed"]:
            continue
        arrays, meta = read_arrays(path.with_suffix(".safetensors"))
        place = {q: i for i, q in enumerate(meta["query_ids"])}
        scores = arrays["group_scores"][[place[q] for q in truth.query_ids]]
        boot = stats.bootstrap_partial(scores, truth.values, known, 1000)
        low, high = boot.interval(within=(-1.0, 1.0)) or (float("nan"), float("nan"))
        value = record["metrics"]["lds"]["value"]
        label = record["method"]["label"]
        line = f"| `{label}` | {value:.3f} | {boot.value:.3f} [{low:.3f}, {high:.3f}] |"
        rows[label] = (boot.value, line)
    if rows:
        lines += ["", f"| method | LDS | beyond the {FORM} [95%] |", "|-|--:|-|"]
        lines += [line for _, line in sorted(rows.values(), reverse=True)]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--write", action="store_true", help="write the page of the suite")
    args = parser.parse_args()
    suite = load_suite(SUITE / "suite.toml", targets=("small",))
    by_id = {q.id: q for q in suite.queries()}
    for target in TARGETS:  # of the real one only the truth is needed
        truth = Truth.load(read_suite(SUITE / "suite.toml").target(target).truths["lds"])
        queries = [by_id[i] for i in truth.query_ids]
        body = "\n".join(tables(truth, list(suite.train), queries, args.runs, target)) + "\n"
        print(f"{target}\n\n{body}")
        if args.write:
            text = PAGE.read_text(encoding="utf-8")
            PAGE.write_text(replaced(text, target, body), encoding="utf-8")


if __name__ == "__main__":
    main()
