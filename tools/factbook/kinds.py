"""The kinds of passages: where each is found in a profile, how it is asked for, what else is asked.

A kind is a task. `sections` are paths in a profile; their texts are joined. `asks` are the prompts
of passages. `question` is the prompt of a query, and `answer` derives the query's answer from the
profile: it returns the answer in other words or in another order than the passage, with the
strings that a passage must contain to state it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Profile = Mapping[str, str]  # "Section/Field/part" -> text
Answer = tuple[str, tuple[str, ...]]  # the answer, and what a passage that states it contains

MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
DATE = rf"\d{{1,2}} (?:{MONTHS}) \d{{4}}"
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
COLORS = (
    "red white blue green yellow black gold golden orange purple maroon brown crimson turquoise"
).split()
DRUGS = (
    "cocaine heroin cannabis marijuana opium hashish methamphetamine ecstasy amphetamines "
    "methaqualone ephedrine amphetamine"
).split()
BROADCASTERS = ("TV station", "TV network", "radio station", "radio network", "cable", "satellite")
PLACES = (
    "Africa|Asia|Europe|America|Ocean|Sea|Gulf|Peninsula|Strait|River|Lake|Mountains|Bay|Channel|"
    "Basin|Canal|Islands|Alps|Andes|Himalayas|Sahara|Desert|Plateau"
)


@dataclass(frozen=True)
class Kind:
    """One kind of passages, and the question that queries ask about it."""

    sections: tuple[str, ...]
    asks: tuple[str, ...]
    question: str = ""
    answer: Callable[[Profile], Answer | None] = lambda profile: None


def _text(profile: Profile, *sections: str) -> str:
    return "; ".join(profile[s] for s in sections if s in profile)


def _listed(items: list[str]) -> str:
    """Joins items as in prose: a, b and c."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def independence(profile: Profile) -> Answer | None:
    """The year, from another section; the passage states it in a sentence."""
    text = profile.get("Government/Independence", "")
    found = re.match(rf"(?:{DATE}|\d{{4}})", text)
    of = re.search(r"\(from (?:the )?([A-Z][\w .]+?)\)", text)
    if not found:
        return None
    year = found.group()[-4:]
    whom = f" from {of.group(1)}" if of else ""
    return f"in {year}{whom}, on {found.group()[:-5]}" if len(found.group()) > 4 else (
        f"in {year}{whom}"
    ), (year,)


def products(profile: Profile) -> Answer | None:
    """Industries and exports that the overview names, too, in the order of the alphabet."""
    own = _text(profile, "Economy/Industries", "Economy/Exports - commodities",
                "Economy/Agriculture - products")  # fmt: skip
    overview = profile.get("Economy/Economy - overview", "").casefold()
    items = {i.strip().casefold() for i in re.split(r"[,;(]", own)}
    items = {i for i in items if re.fullmatch(r"[a-z]{4,}(?: [a-z]{4,})?", i)}
    both = sorted(i for i in items if re.search(rf"\b{re.escape(i)}\b", overview))
    if len(both) < 2:
        return None
    return f"among others {_listed(both[:6])}", tuple(both[:2])


def colors(profile: Profile) -> Answer | None:
    """The colors of the flag, in the order of the alphabet, without what bears them."""
    text = profile.get("Government/Flag description", "").casefold()
    found = sorted({c for c in COLORS if re.search(rf"\b{c}\b", text)})
    return (_listed(found), tuple(found)) if 2 <= len(found) <= 6 else None


def head_of_state(profile: Profile) -> Answer | None:
    """The term and the date of the last election, the date first."""
    text = profile.get("Government/Executive branch/elections/appointments", "")
    date = re.search(rf"last held (?:on|in) ((?:\d{{1,2}} )?(?:{MONTHS}) \d{{4}})", text)
    term = re.search(r"(\d+|[a-z]+)-year term", text)
    if not (date and term):
        return None
    return f"last held {date.group(1)}, for a term of {term.group(1)} years", (
        date.group(1), term.group(),
    )  # fmt: skip


def seats(profile: Profile) -> Answer | None:
    """The number of seats of each chamber."""
    text = profile.get("Government/Legislative branch/description", "")
    counts = re.findall(r"\((\d+) seats", text)
    chambers = re.match(r"(unicameral|bicameral)", text)
    if not counts or not chambers:
        return None
    many = "one chamber" if chambers.group() == "unicameral" else "two chambers"
    return f"{many}, with {_listed(counts[:2])} seats", (f"({counts[0]} seats",)


def judges(profile: Profile) -> Answer | None:
    """Who appoints judges and how many there are, from two sections."""
    text = _text(profile, *KINDS["courts"].sections)
    many = re.search(
        r"consists of (?:a |the )?([^();]{0,60}?\d+[^();]{0,40}?(?:judges|justices|members))", text
    )
    who = re.search(
        r"(?:appointed|nominated|elected) by (the [^;,()]{4,70}?)(?=[;,()]| to | and | for |$)",
        text,
    )
    if not (many and who):
        return None
    return f"{who.group(1).strip()}; the court has {many.group(1)}", (who.group(1), many.group(1))


def broadcasters(profile: Profile) -> Answer | None:
    """Which sorts of stations there are, and who owns them."""
    text = profile.get("Communications/Broadcast media", "")
    owned = re.search(
        r"((?:state|government|privately|publicly)[- ](?:owned|run|controlled))[^;]*", text
    )
    found = [b for b in BROADCASTERS if b in text]
    if not owned or len(found) < 2:
        return None
    return f"{_listed([f'{f}s' if f[-1] in 'nk' else f for f in found])}; {owned.group(1)}", (
        owned.group(1), *found[:2],
    )  # fmt: skip


def calling_code(profile: Profile) -> Answer | None:
    """The calling code and where cables or satellites link to."""
    text = profile.get("Communications/Telephone system/international", "")
    code = re.match(r"country code - ([\d-]+)", text)
    if not code:
        return None
    links = [w for w in ("submarine cable", "satellite earth station") if w in text]
    by = f", by {_listed([f'{w}s' for w in links])}" if links else ""
    return f"+{code.group(1)}{by}", (f"code - {code.group(1)}",)


def disputants(profile: Profile) -> Answer | None:
    """The neighbours that the passage names, from the list of borders, in another order."""
    borders = re.findall(
        r"([A-Z][\w .'-]+?) [\d,.]+ km",
        _text(profile, "Geography/Land boundaries/border countries"),
    )
    text = profile.get("Transnational Issues/Disputes - international", "")
    found = sorted({b.strip() for b in borders if re.search(rf"\b{re.escape(b.strip())}\b", text)})
    return (f"with {_listed(found[:5])}", tuple(found[:2])) if found else None


def situation(profile: Profile) -> Answer | None:
    """The named places of a note on geography."""
    text = profile.get("Geography/Geography - note", "")
    found = re.findall(rf"\b(?:[A-Z][a-z]+ )?(?:[A-Z][a-z]+ )?(?:{PLACES})\b", text)
    found = sorted({f for f in found if " " in f})
    if not found:
        return None
    landlocked = "landlocked, " if "landlocked" in text else ""
    return f"{landlocked}{_listed(found[:4])}", tuple(found[:2])


def troubles(profile: Profile) -> Answer | None:
    """Environmental issues as nouns, in the order of the alphabet."""
    text = profile.get("Geography/Environment - current issues", "")
    nouns = (
        "deforestation", "desertification", "soil erosion", "overgrazing", "overfishing",
        "water pollution", "air pollution", "soil degradation", "acid rain", "poaching",
        "waste disposal", "potable water", "drought", "pesticides", "sewage", "coral reef",
        "industrial effluents", "salination", "poor air quality", "oil spills",
    )  # fmt: skip
    found = sorted(n for n in nouns if n in text)
    return (_listed(found[:6]), tuple(found[:2])) if len(found) >= 2 else None


def anthem(profile: Profile) -> Answer | None:
    """Its name, from another section, and when it was adopted."""
    name = re.match(r'"([^"]+)"', profile.get("Government/National anthem/name", ""))
    year = re.search(r"adopted (?:in )?(?:\w+ )*?(\d{4})", profile.get(_ANTHEM, ""))
    if not (name and year):
        return None
    return f"{name.group(1)}, since {year.group(1)}", (year.group(),)


_ANTHEM = "Government/National anthem/note"


def conscripts(profile: Profile) -> Answer | None:
    """The age, and whether service is compulsory."""
    text = profile.get("Military/Military service age and obligation", "")
    age = re.match(r"(\d+)(?:-\d+)? years of age", text)
    if not age:
        return None
    how = next(
        (say for word, say in (
            ("no conscription", "; none are conscripted"),
            ("compulsory", "; service is compulsory"),
            ("voluntary", "; service is voluntary"),
        ) if word in text), "",
    )  # fmt: skip
    return f"from the age of {age.group(1)}{how}", (age.group(),)


def drugs(profile: Profile) -> Answer | None:
    """The drugs that are named, in the order of the alphabet."""
    text = profile.get("Transnational Issues/Illicit drugs", "").casefold()
    found = sorted(d for d in DRUGS if re.search(rf"\b{d}\b", text))
    role = ", in transit" if re.search(r"trans(?:it|shipment)", text) else ""
    return (f"{_listed(found)}{role}", tuple(found)) if found else None


def constitution(profile: Profile) -> Answer | None:
    """When the present one was adopted, and when it was last amended."""
    text = profile.get("Government/Constitution", "")
    date = re.search(
        rf"(?:adopted|approved|ratified|enacted|promulgated|passed)[^;]*?({DATE}|\d{{4}})", text
    )
    last = re.search(r"last in (\d{4})|amended (?:[\d, ]+ )?(\d{4})", text)
    if not date:
        return None
    change = f"; last amended in {last.group(1) or last.group(2)}" if last else ""
    return f"of {date.group(1)}{change}", (date.group(1),)


KINDS: dict[str, Kind] = {
    "history": Kind(
        ("Introduction/Background",),
        ("{c}: what is its history?", "Give some background on {the}."),
        "{c}: what is its history? Say when it became independent.",
        independence,
    ),
    "economy": Kind(
        ("Economy/Economy - overview",),
        ("{c}: what does its economy live on?", "Describe the economy of {the}."),
        "{c}: what does its economy live on? Name some products.",
        products,
    ),
    "flag": Kind(
        ("Government/Flag description",),
        ("{c}: what does its flag look like?", "Describe the flag of {the}."),
        "{c}: what does its flag look like? Name its colors.",
        colors,
    ),
    "elections": Kind(
        ("Government/Executive branch/elections/appointments",),
        ("{c}: how is its head of state chosen?", "Describe how {the} fills its highest office."),
        "{c}: how is its head of state chosen? Say when the last election was held.",
        head_of_state,
    ),
    "legislature": Kind(
        ("Government/Legislative branch/description", "Government/Legislative branch/elections"),
        ("{c}: what is its legislature?", "Describe the legislature of {the}."),
        "{c}: what is its legislature? Give the number of seats.",
        seats,
    ),
    "courts": Kind(
        (
            "Government/Judicial branch/highest court(s)",
            "Government/Judicial branch/judge selection and term of office",
        ),
        ("{c}: what are its highest courts?", "Describe how {the} selects its judges."),
        "{c}: what are its highest courts? Say who appoints the judges.",
        judges,
    ),
    "broadcasting": Kind(
        ("Communications/Broadcast media",),
        ("{c}: what broadcasts are there?", "Describe the broadcast media of {the}."),
        "{c}: what broadcasts are there? Name the sorts of stations.",
        broadcasters,
    ),
    "telephone": Kind(
        (
            "Communications/Telephone system/international",
            "Communications/Telephone system/general assessment",
            "Communications/Telephone system/domestic",
        ),
        ("{c}: how good are its telephones?", "Describe the telephone system of {the}."),
        "{c}: how good are its telephones? Give the calling code.",
        calling_code,
    ),
    "disputes": Kind(
        ("Transnational Issues/Disputes - international",),
        ("{c}: which disputes does it have?", "Describe the international disputes of {the}."),
        "{c}: which disputes does it have? Name the neighbors.",
        disputants,
    ),
    "geography": Kind(
        ("Geography/Geography - note", "Geography/Terrain", "Geography/Climate"),
        ("{c}: what is notable about its geography?", "Describe the geography of {the}."),
        "{c}: what is notable about its geography? Name seas, rivers or mountains.",
        situation,
    ),
    "environment": Kind(
        ("Geography/Environment - current issues", "Geography/Natural hazards"),
        ("{c}: what troubles its environment?", "Describe the environmental issues of {the}."),
        "{c}: what troubles its environment? Name the main issues.",
        troubles,
    ),
    "anthem": Kind(
        (_ANTHEM,),
        ("{c}: what is its anthem?", "Say something about the anthem of {the}."),
        "{c}: what is its anthem? Give its name and year.",
        anthem,
    ),
    "military": Kind(
        ("Military/Military service age and obligation", "Military/Military branches"),
        ("{c}: who serves in its forces?", "Describe military service in {the}."),
        "{c}: who serves in its forces? Give the age.",
        conscripts,
    ),
    "drugs": Kind(
        ("Transnational Issues/Illicit drugs",),
        ("{c}: what is known about illicit drugs?", "Describe the drug trade in {the}."),
        "{c}: what is known about illicit drugs? Name them.",
        drugs,
    ),
    "constitution": Kind(
        ("Government/Constitution", "Government/Legal system"),
        ("{c}: what is its constitution?", "Describe the constitution of {the}."),
        "{c}: what is its constitution? Give its date.",
        constitution,
    ),
}

#: Names for profiles whose short form is missing, cut off or an abbreviation.
NAMES = {
    "ae": "United Arab Emirates", "cc": "Curacao", "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo", "ct": "Central African Republic",
    "dr": "Dominican Republic", "ee": "European Union", "fk": "Falkland Islands",
    "fm": "Micronesia", "io": "British Indian Ocean Territory", "oo": "Southern Ocean",
    "sh": "Saint Helena", "sk": "Sint Maarten", "sv": "Svalbard",
    "um": "United States Pacific Island Wildlife Refuges", "vt": "Vatican City",
    "xo": "Indian Ocean", "xq": "Arctic Ocean", "xx": "World", "zh": "Atlantic Ocean",
    "zn": "Pacific Ocean",
}  # fmt: skip

WITH_THE = re.compile(
    r"(?:United|Central African|Czech|Democratic|Dominican) |"
    r"(?:Netherlands|Philippines|Maldives|Comoros|Seychelles|European Union|World)$|"
    r".* (?:Islands|Strip|Bank|Ocean|Territory)$|Republic of"
)


def in_sentence(name: str) -> str:
    """Returns a country's name as it stands within a sentence: the Netherlands, the Gambia."""
    if name.startswith("The "):
        return f"the {name[4:]}"
    return f"the {name}" if WITH_THE.match(name) else name
