"""What a person reads in traced examples: near-duplicates as one, sources, agreement, a page."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tdabench.data.alike import ALIKE, overlap, trigrams
from tdabench.data.examples import Example
from tdabench.data.origins import origins
from tdabench.report.text import clean
from tdabench.run.trace import Traced

SPARE = 4  # times as many examples are asked for as are shown, since some are folded


@dataclass(frozen=True)
class Shown:
    """A training example on one side of an answer, and further ones that are nearly its copies."""

    score: float
    index: int
    copies: tuple[int, ...] = ()


def folded(train: Sequence[Example], items: Sequence[tuple[float, int]], k: int) -> list[Shown]:
    """Returns the first k examples of `items` (score, index), each with its near-duplicates.

    Two examples are nearly the same if their texts share `ALIKE` of their character trigrams, case
    and spaces aside.
    """
    out: list[Shown] = []
    seen: list[frozenset[str]] = []
    for score, i in items:
        grams = trigrams(train[i].text)
        at = next((n for n, g in enumerate(seen) if overlap(g, grams) >= ALIKE), None)
        if at is not None:
            out[at] = Shown(out[at].score, out[at].index, (*out[at].copies, i))
        elif len(out) < k:
            out.append(Shown(score, i))
            seen.append(grams)
    return out


def sides(found: Traced, q: int) -> tuple[list[tuple[float, int]], list[tuple[float, int]]]:
    """Returns (score, index) of the helpful and of the harmful examples of a query, extremes first.

    Among few examples the lowest scores are also the highest: only the sign tells the sides.
    """
    assert found.top is not None
    assert found.top_score is not None
    assert found.bottom is not None
    assert found.bottom_score is not None
    top = zip(found.top_score[q].tolist(), found.top[q].tolist())
    bottom = zip(found.bottom_score[q].tolist(), found.bottom[q].tolist())
    return [(s, i) for s, i in top if s > 0], [(s, i) for s, i in bottom if s < 0]


def share(found: Traced, q: int, items: Sequence[Shown], side: int) -> float | None:
    """Returns the share of all positive (`side` 0) or negative (1) scores that the examples hold.

    Copies are left out. None where the sum is unknown.
    """
    if found.totals is None or not found.totals[q, side]:
        return None
    return float(sum(s.score for s in items) / found.totals[q, side])


def agreements(found: Sequence[Traced], q: int, k: int, n_train: int) -> list[dict[str, Any]]:
    """Returns, for each pair of methods, how many of the k highest-scoring examples they share.

    `chance` is the expected number for random choices of k among n.
    """
    working = [f for f in found if not f.reason and f.top is not None]
    out = []
    for a, first in enumerate(working):
        for second in working[a + 1 :]:
            assert first.top is not None
            assert second.top is not None
            k_here = min(k, first.top.shape[1], second.top.shape[1])
            shared = len(set(first.top[q, :k_here].tolist()) & set(second.top[q, :k_here].tolist()))
            out.append(
                {
                    "methods": [first.label, second.label],
                    "k": k_here,
                    "shared": shared,
                    "chance": k_here**2 / max(1, n_train),
                }
            )
    return out


def agreement_line(pair: Mapping[str, Any]) -> str:
    a, b = (clean(m, 60) for m in pair["methods"])
    return (
        f"{a} and {b} share {pair['shared']} of their {pair['k']} highest-scoring examples "
        f"({pair['chance']:.2g} by chance)"
    )


def kinds(train: Sequence[Example], items: Sequence[Shown]) -> list[tuple[str, int]]:
    """Counts the sources (or tasks) of the shown examples and their copies, most frequent first."""
    chosen = [train[i] for s in items for i in (s.index, *s.copies)]
    by = "source" if any(e.meta.get("source") for e in chosen) else "task"
    counts = Counter(o for o in origins(chosen, by) if o)
    return sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))


def words(e: Example, scores: np.ndarray | None) -> dict[str, list[dict[str, Any]]]:
    """Returns the words of an example with their scores, as JSON; empty where they are unknown."""
    if scores is None:
        return {}
    sides = [("prompt", w) for w in e.prompt.split()] + [
        ("response", w) for w in e.response.split()
    ]
    out: list[dict[str, Any]] = []
    for (side, word), score in zip(sides, scores.tolist(), strict=True):
        first = side == "response" and (not out or out[-1]["side"] != side)
        out.append(
            {"word": word, "side": side, "score": score} | ({"first": True} if first else {})
        )
    return {"words": out}


def source_rows(names: Sequence[str], sizes: Sequence[int], scores: np.ndarray,
                k: int) -> list[dict[str, Any]]:  # fmt: skip
    """Returns the k sources with the highest scores and the k with the lowest: scores [source].

    `each` is the score per example: a large source may matter by its size alone.
    """
    order = np.argsort(-scores, kind="stable")
    chosen = order if len(order) <= 2 * k else np.concatenate([order[:k], order[-k:]])
    return [
        {
            "source": names[i],
            "examples": int(sizes[i]),
            "score": float(scores[i]),
            "each": float(scores[i] / max(1, sizes[i])),
        }
        for i in chosen.tolist()
    ]


# --------------------------------------------------------------------------- a page

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
h1 { font-size: 1.25em } h2 { font-size: 1.05em; margin-top: 2em }
.methods { display: flex; gap: 2em; flex-wrap: wrap } .methods > section { flex: 1 1 24em }
li { margin: .4em 0 } .for b { color: #00684b } .against b { color: #a33b00 }
.id, .note { color: #555; font-size: .88em } .response { font-weight: 600 }
table { border-collapse: collapse } td, th { padding: .15em .8em .15em 0; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums }
"""


HEADINGS = (
    ("helpful", "For: the highest scores", "for"),
    ("harmful", "Against: the lowest scores", "against"),
)


def page(data: Mapping[str, Any]) -> str:
    """Renders the JSON of `tdabench trace` as one HTML page without scripts or other files."""
    parts = []
    for query in data["queries"]:
        parts.append(f"<h1>{_e(query['prompt'])}<br>→ {_e(query['response'])}</h1>")
        parts += [f"<p class=note>{_e(line)}</p>" for line in query.get("notes", ())]
        parts.append("<div class=methods>")
        for label, found in query["methods"].items():
            parts.append(f"<section><h2>{_e(label)}</h2>")
            if "error" in found:
                parts.append(f"<p class=note>{_e(found['error'])}</p></section>")
                continue
            if found.get("query_words"):
                marked = _texts({"words": found["query_words"]})
                parts.append(f"<p><span class=note>Words of the query:</span> {marked}</p>")
            for side, heading, style in HEADINGS:
                parts.append(_side(found, side, heading, style))
            if found.get("sources"):
                parts.append(_sources(found["sources"]))
            parts.append("</section>")
        parts.append("</div>")
    parts += [f"<p class=note>{_e(line)}</p>" for line in data.get("notes", ())]
    body = "\n".join(parts)
    return (
        f"<!doctype html>\n<html lang=en>\n<meta charset=utf-8>\n"
        '<meta name="generator" content="tdabench trace">\n'
        f"<title>tdabench trace: "
        f"{_e(data['suite'])}</title>\n<style>{STYLE}</style>\n{body}\n</html>\n"
    )


def _side(found: Mapping[str, Any], side: str, heading: str, style: str) -> str:
    items = []
    for e in found[side]:
        copies = len(e.get("copies", ()))
        more = f" · and {copies} nearly the same" if copies else ""
        kind = f" · {_e(e['task'])}" if e.get("task") else ""
        items.append(
            f"<li><b>{e['score']:+.3g}</b> {_texts(e)} "
            f"<span class=id>{_e(e['id'])}{kind}{more}</span></li>"
        )
    listed = f"<ol>{''.join(items)}</ol>" if items else "<p class=note>no such score</p>"
    of = found.get("share", {}).get(side)
    held = f" <span class=note>({of:.0%} of all such scores)</span>" if of is not None else ""
    return f"<h3 class={style}>{heading}{held}</h3><div class={style}>{listed}</div>"


def _texts(e: Mapping[str, Any]) -> str:
    """Renders prompt and response, with words shaded by their score where it is known."""
    if "words" not in e:
        return f"{_e(e['prompt'])} → <span class=response>{_e(e['response'])}</span>"
    most = max((w["score"] for w in e["words"]), default=0.0)
    out = []
    for w in e["words"]:
        shade = max(0.0, w["score"]) / most if most > 0 else 0.0
        mark = f' style="background: rgba(0,140,100,{0.6 * shade:.2f})"' if shade > 0.05 else ""
        kind = " class=response" if w["side"] == "response" else ""
        arrow = "→ " if w.get("first") else ""
        out.append(f"{arrow}<span{kind}{mark} title='{w['score']:+.3g}'>{_e(w['word'])}</span>")
    return " ".join(out)


def _sources(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = "".join(
        f"<tr><td>{_e(r['source'])}<td class=n>{r['examples']:,}<td class=n>{r['score']:+.3g}"
        f"<td class=n>{r['each']:+.3g}"
        for r in rows
    )
    head = "<tr><th>source<th>examples<th>score<th>per example"
    return f"<h3>By source</h3><table>{head}{lines}</table>"


def _e(text: Any) -> str:
    return html.escape(clean(str(text), 2000))
