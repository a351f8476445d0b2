"""Citations of suites, methods and benchmarks, and results for the card of a model on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tdabench.errors import UsageError, clean, unknown
from tdabench.registry import registry
from tdabench.run import environment
from tdabench.run.record import Record, finite
from tdabench.run.sources import suite_path

ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")
DOI = re.compile(r"doi:(10\.\d{4,9}/\S+)")
CARDS = ("model-index", "eval-results")
DATASET = "tdabench/{suite}"  # the name under which a suite's results are listed

# Titles of the papers that bundled methods and suites name; others are cited by their identifier.
TITLES = {
    "1503.05671": "Optimizing Neural Networks with Kronecker-factored Approximate Curvature",
    "1602.03943": "Second-Order Stochastic Optimization for Machine Learning in Linear Time",
    "1703.04730": "Understanding Black-box Predictions via Influence Functions",
    "1806.03884": "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis",
    "1908.10084": "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks",
    "2002.08484": "Estimating Training Data Influence by Tracing Gradient Descent",
    "2102.05262": "Input Similarity from the Neural Network Perspective",
    "2112.03052": "Scaling Up Influence Functions",
    "2202.00622": "Datamodels: Predicting Predictions from Training Data",
    "2205.11482": "Towards Tracing Factual Knowledge in Language Models Back to the Training Data",
    "2302.03169": "Data Selection for Language Models via Importance Resampling",
    "2303.14186": "TRAK: Attributing Model Behavior at Scale",
    "2308.03296": "Studying Large Language Model Generalization with Influence Functions",
    "2310.00902": "DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs and "
    "Diffusion Models",
    "2401.12926": "DsDm: Model-Aware Dataset Selection with Datamodels",
    "2402.04333": "LESS: Selecting Influential Data for Targeted Instruction Tuning",
    "2405.12186": "Training Data Attribution via Approximate Unrolled Differentiation",
    "2405.13954": "What is Your Data Worth to GPT? LLM-Scale Data Valuation with Influence "
    "Functions",
    "2410.17413": "Scalable Influence and Fact Tracing for Large Language Model Pretraining",
    "2503.01807": "Large-Scale Data Selection for Instruction Tuning",
    "2503.13751": "Optimizing ML Training with Metagradient Descent",
    "2504.16430": "MAGIC: Near-Optimal Data Attribution for Deep Learning",
    "2505.18513": "Enhancing Training Data Attribution with Representational Optimization",
    "2606.05165": "STRIDE: Training Data Attribution via Sparse Recovery from Subset Perturbations",
}


def sources_of(
    suites: Iterable[str], methods: Iterable[str], benchmarks: Iterable[str]
) -> dict[str, list[str]]:
    """Returns citation text -> what it is cited for, in the order given.

    Raises UsageError for a name that is not installed.
    """
    found: dict[str, list[str]] = {}

    def add(text: str, why: str) -> None:
        for part in (p.strip() for p in text.split(";")):
            if ARXIV.search(part) or DOI.search(part):
                found.setdefault(part, []).append(why)

    for name in dict.fromkeys(suites):
        text = suite_path(name).read_text(encoding="utf-8")
        for id in dict.fromkeys(re.findall(r"arXiv[ :](\d{4}\.\d{4,5})", text)):
            add(f"arXiv {id}", f"suite {name}")
    for kind, names in (("method", methods), ("benchmark", benchmarks)):
        entries = registry().methods if kind == "method" else registry().benchmarks
        for name in dict.fromkeys(names):
            if name not in entries:
                raise unknown(kind, name, entries)
            add(str(getattr(entries[name].cls, "source", "")), f"{kind} {name}")
    return found


def bibtex(sources: Mapping[str, Sequence[str]]) -> str:
    """Returns BibTeX: tdabench itself, and one entry per paper, with what it is cited for."""
    out = [
        "@software{tdabench,\n"
        "  title   = {tdabench: benchmarks for training-data attribution on language\n"
        "             models},\n"
        "  author  = {{The tdabench maintainers}},\n"
        f"  version = {{{_version()}}},\n"
        "  year    = {2026}\n}"
    ]
    entries: dict[str, tuple[str, list[str]]] = {}
    for text, why in sources.items():
        id = (ARXIV.search(text) or DOI.search(text))[1]  # type: ignore[index]
        old = entries.get(id, ("", []))
        entries[id] = (max(old[0], text, key=len), [*old[1], *why])
    for id, (text, why) in entries.items():
        named = re.match(r"(.+?),? ((?:19|20)\d\d)\b", text)
        authors = re.sub(r"\s+and\s+|\s*&\s*", " and ", named[1]) if named else ""
        authors = authors.replace(" et al.", " and others")
        # A preprint's number begins with its year and month; the text may name a later version.
        year = named[2] if named else f"20{id[:2]}" if ARXIV.fullmatch(id) else ""
        arxiv = ARXIV.fullmatch(id)
        fields = {
            "title": f"{{{TITLES[id]}}}" if id in TITLES else "",
            "author": authors,
            "year": year,
            **({"eprint": id, "archivePrefix": "arXiv"} if arxiv else {"doi": id}),
            "note": "In tdabench: " + ", ".join(dict.fromkeys(why)),
        }
        lines = [f"  {k:<13} = {{{v}}}" for k, v in fields.items() if v]
        key = re.sub(r"\W+", "-", id)
        out.append(f"@misc{{{'arxiv' if arxiv else 'doi'}-{key},\n" + ",\n".join(lines) + "\n}")
    return "\n\n".join(out) + "\n"


def cff(sources: Mapping[str, Sequence[str]]) -> str:
    """Returns a CITATION.cff with the papers as references."""
    import yaml

    references = []
    for text, why in sources.items():
        found = ARXIV.search(text) or DOI.search(text)
        assert found is not None
        id = found[1]
        kind = "doi" if text.find("doi:") >= 0 else "other"
        value = id if kind == "doi" else f"arXiv:{id}"
        references.append(
            {
                "type": "article",
                "title": TITLES.get(id, value),
                "authors": [{"name": re.split(r" (?:19|20)\d\d", text)[0]}],
                "identifiers": [{"type": kind, "value": value}],
                "notes": ", ".join(dict.fromkeys(why)),
            }
        )
    whole = {
        "cff-version": "1.2.0",
        "message": "Please cite tdabench, and the methods and benchmarks that you compare.",
        "title": "tdabench: benchmarks for training-data attribution on language models",
        "type": "software",
        "authors": [{"name": "The tdabench maintainers"}],
        "version": _version(),
        **({"references": references} if references else {}),
    }
    return str(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True))


def _version() -> str:
    return str(environment.versions().get("tdabench", ""))


# --------------------------------------------------------------------------- cards


def card(records: Sequence[Record], form: str, model: str, url: str = "") -> str:
    """Returns the results of one method as YAML for the card of a model (an encoder).

    `form` is "model-index" (metadata of README.md) or "eval-results" (a file in .eval_results/).
    `model` is the model's name, `url` the place of the results. Raises UsageError without results.
    """
    import yaml

    if form not in CARDS:
        raise unknown("format", form, CARDS)
    found = [r for r in records if r.ok and finite(r.metric(r.primary).get("value")) is not None]
    if not found:
        raise UsageError("there is no result for a card", "See: tdabench leaderboard")
    value = [_entry(r, url) for r in found] if form == "eval-results" else _index(found, model, url)
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def _entry(record: Record, url: str) -> dict[str, Any]:
    m = record.metric(record.primary)
    suite = _suite(record)
    entry: dict[str, Any] = {
        "dataset": {"id": DATASET.format(suite=suite), "task_id": _task(record)},
        "value": round(float(m["value"]), 6),
        "date": str(record.data.get("started") or "")[:10],
        "notes": _said(record),
    }
    if url:
        entry["source"] = {"url": url, "name": "tdabench"}
    return {k: v for k, v in entry.items() if v}


def _index(records: Sequence[Record], model: str, url: str) -> dict[str, Any]:
    results = []
    for r in records:
        value = round(float(r.metric(r.primary)["value"]), 6)
        result: dict[str, Any] = {
            "task": {"type": "training-data-attribution", "name": "Training data attribution"},
            "dataset": {
                "name": f"tdabench {_suite(r)}", "type": DATASET.format(suite=_suite(r)),
                "config": _task(r), "split": str(r.data.get("split") or "test"),
            },
            "metrics": [{"type": r.primary, "value": value, "name": _said(r)}],
        }  # fmt: skip
        if url:
            result["source"] = {"name": "tdabench", "url": url}
        results.append(result)
    return {"model-index": [{"name": clean(model, 100), "results": results}]}


def _suite(record: Record) -> str:
    suite = record.data.get("suite")
    return clean(suite.get("name") if isinstance(suite, Mapping) else "", 60) or "own"


def _task(record: Record) -> str:
    return clean(f"{record.target.get('label')}-{record.benchmark_name}", 100)


def _said(record: Record) -> str:
    m = record.metric(record.primary)
    low, high = finite(m.get("low")), finite(m.get("high"))
    span = f", 95% interval [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    ceiling = finite(record.metric("ceiling").get("value"))
    top = f", noise ceiling {ceiling:.2f}" if ceiling is not None else ""
    version = f"{record.label} v{record.method.get('version')}"
    return clean(f"{record.primary} of {version}{span}{top}, seed {record.seed}", 300)


# --------------------------------------------------------------------------- badge


def badge(record: Record) -> str:
    """Returns an SVG that shows a record's value with its interval: `LDS on pocket 0.31 ± 0.02`."""
    import html

    m = record.metric(record.primary)
    value, low, high = (finite(m.get(k)) for k in ("value", "low", "high"))
    if not record.ok or value is None:
        right, colour = record.status, "#b42318"
    else:
        wide = f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else ""
        right, colour = f"{value:.2f}{wide}", "#0072b2"
    left = f"{record.benchmark_name.upper()} on {_suite(record)}"
    a, b = (round(6.6 * len(t)) + 12 for t in (left, right))
    said = html.escape(f"{left}: {right}", quote=True)
    font = 'font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" fill="#fff"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{a + b}" height="20" role="img" '
        f'aria-label="{said}"><title>{said}</title>'
        f'<rect width="{a}" height="20" fill="#444"/>'
        f'<rect x="{a}" width="{b}" height="20" fill="{colour}"/>'
        f'<g {font} text-anchor="middle"><text x="{a / 2}" y="14">{html.escape(left)}</text>'
        f'<text x="{a + b / 2}" y="14">{html.escape(right)}</text></g></svg>\n'
    )
