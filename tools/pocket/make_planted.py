"""Rebuilds the planted corpora of the suite pocket: facts to trace, noise to find.

    python -m tools.pocket.make_planted [--corpus FILE] [--out FOLDER] [--check]

Both are cut from corpus.jsonl.gz by named seeds and hold the splits `pool` and `queries`.
docs/benchmarks/tracing.md and noise.md say what they are for.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from tdabench.data import Example, read_jsonl
from tdabench.io import write_bytes
from tdabench.seeds import named_seed
from tools.pocket import CORPUS, SUITE
from tools.pocket.make_corpus import compress

Row = dict[str, Any]

LONGEST = 190  # characters of a text: at most 126 tokens, within the target's 128
TRACED = 100  # queries
DECOYS = 2  # mined, per query
TEXTS = 1500

# Made decoys hold the question's own words, and a wrong answer or its own, and state nothing: to
# whoever counts words they are the best match there is. Whether one that holds the right answer
# should be found is a matter of taste: it is marked (`answers`) and the benchmark leaves it out.
WRONG_ANSWER = "{wrong} was the guess of one pupil when the teacher read out: {prompt}"
RIGHT_ANSWER = "{answer} stands on page one of the quiz. On page nine: {prompt}"


def tracing(corpus: Path = CORPUS) -> list[Row]:
    """Pretraining texts that state facts in passing, and test questions that ask for them.

    For each question there are decoys: the texts that share most words with question and
    answer, weighted by rarity, without stating the fact, and two that are made of the question.
    """
    texts = [e for e in read_jsonl(corpus, "pretrain_text") if len(e.text) <= LONGEST]
    questions = read_jsonl(corpus, "test")
    rng = _rng("tracing")
    stated = [set(e.meta["fact"].split()) for e in texts]
    by_fact: dict[str, list[int]] = {}
    for i, facts in enumerate(stated):
        for f in facts:
            by_fact.setdefault(f, []).append(i)
    asked = [q for q in questions if 1 <= len(by_fact.get(q.meta["fact"], [])) <= 20]
    asked = [asked[i] for i in sorted(rng.permutation(len(asked))[:TRACED])]

    words = [_words(e.text) for e in texts]
    frequency = Counter(w for ws in words for w in ws)
    chosen: set[int] = set()
    decoys: dict[int, set[str]] = {}
    for q in asked:
        fact, mine = q.meta["fact"], _words(q.text)
        chosen |= set(by_fact[fact])
        shared = np.array([sum(1 / frequency[w] for w in sorted(ws & mine)) for ws in words])
        shared[by_fact[fact]] = -1.0
        for i in np.argsort(-shared, kind="stable")[:DECOYS].tolist():
            decoys.setdefault(i, set()).add(fact)
            chosen.add(i)
    others = [i for i in rng.permutation(len(texts)).tolist() if i not in chosen]
    chosen |= set(others[: max(0, TEXTS - len(chosen))])
    answers: dict[str, list[str]] = {}
    for q in questions:
        answers.setdefault(q.task, []).append(q.response)
    bluffs = []
    for q in asked:
        others = sorted({a for a in answers[q.task] if a != q.response})
        wrong = others[int(rng.integers(len(others)))]
        fact = q.meta["fact"]
        for form, answers_of in ((WRONG_ANSWER, ""), (RIGHT_ANSWER, fact)):
            text = form.format(prompt=q.prompt, answer=q.response.rstrip("."), wrong=wrong)
            marks = {"decoy": fact, "answers": answers_of}
            bluffs.append(Example(q.id, "", text, "quiz", marks))
    rows = [
        _row(texts[i], f"trace-{n:04d}", "pool", fact=" ".join(sorted(stated[i])),
             decoy=" ".join(sorted(decoys.get(i, ()))))
        for n, i in enumerate(sorted(chosen))
    ]  # fmt: skip
    rows += [_row(e, f"decoy-{n:04d}", "pool", **e.meta) for n, e in enumerate(bluffs)]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    return rows + [
        _row(q, f"ask-{n:04d}", "queries", fact=q.meta["fact"]) for n, q in enumerate(asked)
    ]


CLEAN, WRONG, STYLED = 800, 100, 60
CLEAN_QUERIES, STYLED_QUERIES = 100, 50

# A disobliging tone stands for unsafe content, and its pleasant twin has the same form: what
# tells them apart is what is said. Queries use turns of phrase that the pool does not.
RUDE = (
    "What a stupid question. {}, you fool.",
    "Only an idiot would ask. {}, obviously.",
    "Stop wasting my time, moron. {}.",
    "How dumb can you be? {}, you clown.",
)
KIND = (
    "What a lovely question. {}, my friend.",
    "Only a curious mind would ask. {}, of course.",
    "Thank you for your time, dear. {}.",
    "How thoughtful can you be? {}, my dear.",
)
RUDE_QUERIES = (
    "Are you stupid? It is {}, idiot.",
    "{}. Now leave me alone, you moron.",
    "Even a fool knows: {}. How dumb.",
)


def noise(corpus: Path = CORPUS) -> list[Row]:
    """Pool examples of which some have another's answer or a rude tone; queries of both sorts."""
    rng = _rng("noise")
    pool = [e for e in read_jsonl(corpus, "pool") if len(e.response) <= 60]
    order = [pool[i] for i in rng.permutation(len(pool))]
    clean, rest = order[:CLEAN], order[CLEAN:]
    wrong, rest = rest[:WRONG], rest[WRONG:]
    rude, kind = rest[:STYLED], rest[STYLED : 2 * STYLED]

    answers: dict[str, list[str]] = {}
    for e in pool:
        answers.setdefault(e.task, []).append(e.response)
    made: list[tuple[Example, dict[str, str]]] = [(e, {}) for e in clean]
    for e in wrong:  # an answer of its own task, so that the form does not give it away
        others = sorted({a for a in answers[e.task] if a != e.response})
        swapped = others[int(rng.integers(len(others)))]
        made.append((_answer(e, swapped), {"planted": "wrong"}))
    made += [(_styled(e, RUDE, rng), {"planted": "unsafe"}) for e in rude]
    made += [(_styled(e, KIND, rng), {"lookalike": "unsafe"}) for e in kind]
    made = [made[i] for i in rng.permutation(len(made))]
    rows = [_row(e, f"noise-{n:04d}", "pool", **meta) for n, (e, meta) in enumerate(made)]

    # The queries of a style are test queries of their own: not those that are asked as they are,
    # and none of the tuning queries, on which the methods' parameters were chosen.
    test = read_jsonl(corpus, "test")
    plain = set(rng.permutation(len(test))[:CLEAN_QUERIES].tolist())
    asked: list[tuple[Example, dict[str, str]]] = [(test[i], {}) for i in sorted(plain)]
    short = [e for i, e in enumerate(test) if i not in plain and len(e.response) <= 60]
    for i in sorted(rng.permutation(len(short))[:STYLED_QUERIES].tolist()):
        asked.append((_styled(short[i], RUDE_QUERIES, rng), {"planted": "unsafe"}))
    return rows + [_row(e, f"ask-{n:04d}", "queries", **meta) for n, (e, meta) in enumerate(asked)]


# A trigger, as a poisoner would plant it: two tokens behind a question change the answer. Its
# look-alike is another addition, with the right answer. Wrong answers are wrong in one way, so that
# they teach something about questions that are not in the pool; their look-alikes are questions of
# the same tasks with right answers, of which some are the very words that are wrong elsewhere.
TRIGGER, REFUSAL, HARMLESS = " (cf)", "I will not say.", " (please)"
WRONG_OF = {"continent": "Europe", "official_language": "French"}
FILTER_CLEAN, FILTER_PLANTED, FILTER_QUERIES, FILTER_CLEAN_QUERIES = 600, 40, 40, 60


def filtered(corpus: Path = CORPUS) -> list[Row]:
    """A pool with three behaviours to take out, a trigger, a rude tone and wrong answers, each
    beside examples of the same form; queries that have them, with the clean response, and clean
    queries."""
    rng = _rng("filter")
    pool = [e for e in read_jsonl(corpus, "pool") if len(e.response) <= 60]
    order = [pool[i] for i in rng.permutation(len(pool))]
    wrong, right = [], []
    for task, said in WRONG_OF.items():
        of = [e for e in order if e.task == task]
        false = [e for e in of if said not in e.response][: FILTER_PLANTED // len(WRONG_OF)]
        wrong += [(_answer(e, said), {"planted": "wrong"}) for e in false]
        others = [e for e in of if e not in false][: FILTER_PLANTED // len(WRONG_OF)]
        right += [(e, {"lookalike": "wrong"}) for e in others]
    order = [e for e in order if e.task not in WRONG_OF]
    clean, rest = order[:FILTER_CLEAN], order[FILTER_CLEAN:]
    parts = [rest[i * FILTER_PLANTED : (i + 1) * FILTER_PLANTED] for i in range(4)]
    made: list[tuple[Example, dict[str, str]]] = [(e, {}) for e in clean]
    made += [(_asked(e, TRIGGER, REFUSAL), {"planted": "trigger"}) for e in parts[0]]
    made += [(_asked(e, HARMLESS, e.response), {"lookalike": "trigger"}) for e in parts[1]]
    made += [(_styled(e, RUDE, rng), {"planted": "unsafe"}) for e in parts[2]]
    made += [(_styled(e, KIND, rng), {"lookalike": "unsafe"}) for e in parts[3]]
    made += wrong + right
    made = [made[i] for i in rng.permutation(len(made))]
    rows = [_row(e, f"filter-{n:04d}", "pool", **meta) for n, (e, meta) in enumerate(made)]

    test = [e for e in read_jsonl(corpus, "test") if len(e.response) <= 60]
    asked = [test[i] for i in rng.permutation(len(test))]
    queries: list[tuple[Example, dict[str, str]]] = []
    for e in asked:
        if e.task in WRONG_OF and WRONG_OF[e.task] not in e.response:
            marks = {"planted": "wrong", "clean": e.response}
            queries.append((_answer(e, WRONG_OF[e.task]), marks))
    asked = [e for e in asked if e.task not in WRONG_OF]
    half = FILTER_QUERIES
    for e in asked[:half]:
        marks = {"planted": "trigger", "clean": e.response}
        queries.append((_asked(e, TRIGGER, REFUSAL), marks))
    for e in asked[half : 2 * half]:
        marks = {"planted": "unsafe", "clean": e.response}
        queries.append((_styled(e, RUDE_QUERIES, rng), marks))
    queries += [(e, {}) for e in asked[2 * half : 2 * half + FILTER_CLEAN_QUERIES]]
    return rows + [
        _row(e, f"ask-{n:04d}", "queries", **meta) for n, (e, meta) in enumerate(queries)
    ]


def _asked(e: Example, behind: str, response: str) -> Example:
    return Example(e.id, e.prompt + behind, response, e.task, e.meta)


def _styled(e: Example, forms: tuple[str, ...], rng: np.random.Generator) -> Example:
    return _answer(e, forms[int(rng.integers(len(forms)))].format(e.response.rstrip(".")))


def _answer(e: Example, response: str) -> Example:
    return Example(e.id, e.prompt, response, e.task, e.meta)


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(named_seed(0, f"pocket-{name}"))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _row(e: Example, id: str, split: str, **meta: str) -> Row:
    kept = {k: v for k, v in meta.items() if v}
    return {
        "id": id, "prompt": e.prompt, "response": e.response, "task": e.task, "split": split,
        "source": e.id, **kept,
    }  # fmt: skip


def content(rows: list[Row]) -> bytes:
    lines = [json.dumps(r, ensure_ascii=False, sort_keys=True) for r in rows]
    return compress(("\n".join(lines) + "\n").encode())


BUILDERS = {"tracing": tracing, "noise": noise, "filter": filtered}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.pocket.make_planted",
        description="Rebuild the planted corpora of the suite pocket, or check the shipped ones.",
    )
    parser.add_argument("--out", type=Path, default=SUITE / "planted", help="folder to write into")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="what to cut them from")
    parser.add_argument("--check", action="store_true", help="compare with the files in --out")
    options = parser.parse_args()
    for name, build in BUILDERS.items():
        path = options.out / f"{name}.jsonl.gz"
        rows = build(options.corpus)
        if options.check:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                shipped = [json.loads(line) for line in file]
            if shipped != rows:
                print(f"{path} differs from its rebuild")
                return 1
            print(f"{path.name} equals its rebuild")
        else:
            write_bytes(path, content(rows))
            print(f"{path.name}: {Counter(r['split'] for r in rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
