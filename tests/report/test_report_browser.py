"""The report in a real browser: no errors, no requests, sorting, explorer, dark mode.

Skipped where Chromium or its driver is not installed.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tdabench.report.board import Board
from tdabench.report.html import write_report
from tdabench.report.records import read_run
from tdabench.report.words import WordScores

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import report_opening

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium here")

EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>\x1b[31m \u202e"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage --force-prefers-reduced-motion --window-size=1280,900 about:blank"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(300)
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, make_run, make_suite, tmp_path):
    """The report of a run with hostile labels and texts, open in the browser."""
    train = [
        {"id": f"t{i}", "prompt": f"prompt {i}", "response": f"answer {i}", "task": "ab"[i % 2]}
        for i in range(200)
    ]
    for e in train[:50]:
        e["response"] = EVIL
    queries = [
        {"id": f"q{i:03d}", "prompt": f"query number {i}", "response": EVIL, "task": "ab"[i % 2]}
        for i in range(40)
    ]
    suite, corpus = make_suite(train, queries)

    def change(record):
        record["corpus"] = dict(corpus)
        if record["benchmark"]["name"] == "selection" and record["status"] == "ok":
            for k in (10, 100):
                record["metrics"][f"f1@{k}"] = {"value": 0.004 * k, "low": 0.0, "high": 0.9}
        if record["benchmark"]["name"] == "transfer" and record["status"] == "ok":
            record["metrics"]["lds[source]"] = {"value": 0.4}

    folder = make_run(
        "r",
        {"airrep": 1.6, "logra": 1.0, "ekfac": 0.97, f"x {EVIL}": 0.2},
        failed={"bad": ("failed", EVIL)},
        top=10,
        change=change,
        manifest={"request": {"suite": str(suite)}, "command": ["tdabench", EVIL]},
    )
    path = tmp_path / "report.html"
    write_report(Board.from_runs([folder]), path)
    logs(browser)
    show(browser, path)
    return browser, folder


def logs(browser):
    """Console messages of any level, and addresses that pages asked for, since the last look.

    Pages of the browser's own (its start page) are none of ours.
    """
    console = [e["message"] for e in browser.get_log("browser")]
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    asked = [p["request"]["url"] for p in sent if not p["documentURL"].startswith("chrome")]
    return console, asked


def show(browser, path):
    """Opens a report and waits until it stands: data are unpacked after the page has loaded."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(path.as_uri())
    WebDriverWait(browser, 60).until(lambda b: css(b, "#board-table tbody tr"))


def css(browser, selector):
    return browser.find_elements("css selector", selector)


def column(browser, place):
    """Texts of a column of the board; "" in the row of a method that failed."""
    script = (
        "return [...document.querySelectorAll('#board-table tbody tr')]"
        ".map((r) => (r.children[arguments[0] - 1] || {innerText: ''}).innerText)"
    )
    return [text.strip() for text in browser.execute_script(script, place)]


def press(browser, key):
    click(browser, css(browser, f"#board-table thead button[data-key='{key}']")[0])


def test_no_console_message_and_no_request(opened):
    browser, _ = opened
    browser.execute_script(
        "const all = () => [...document.querySelectorAll('#board-table button.plain')];"
        "all().forEach((_, i) => all()[i].click());"
        "document.querySelectorAll('summary').forEach((e) => e.click());"
    )
    assert len(css(browser, "tr.details")) == 5
    console, asked = logs(browser)
    assert console == []
    assert len(asked) == 1
    assert asked[0].startswith("file://")


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_the_screen_and_labels_do_not_overlap(opened, width):
    browser, _ = opened
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.refresh()
        show(browser, Path(browser.current_url.removeprefix("file://")))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        boxes = browser.execute_script(
            "return [...document.querySelectorAll('#plots svg text.label')].map((e) => {"
            "const b = e.getBBox(); return [b.x, b.y + 2, b.x + b.width, b.y + b.height - 2]; })"
        )
        shown = browser.execute_script(
            "return [...document.querySelectorAll('#plots svg text')].map((e) => "
            "parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.clientWidth / "
            "e.ownerSVGElement.viewBox.baseVal.width)"
        )
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert len(boxes) == 4
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
    assert min(shown) > 9  # pixels of a letter


def test_the_policy_stops_a_request_that_a_script_would_make(opened):
    browser, _ = opened
    blocked = browser.execute_async_script(
        "const done = arguments[0]; fetch('https://example.org/').then(() => done(false), "
        "() => done(true));"
    )
    assert blocked
    console, _ = logs(browser)
    assert any("Content Security Policy" in line for line in console)


def test_nothing_of_a_label_or_a_text_becomes_markup(opened):
    browser, _ = opened
    assert css(browser, "main img, main script, header img") == []
    assert "<img src=x onerror=alert(1)>" in browser.find_element("tag name", "main").text
    assert "\u202e" not in browser.page_source


def test_the_board_shows_its_rows_in_rank_order(opened):
    browser, folder = opened
    expected = [r.label for r in Board.from_runs([folder]).table().rows]
    shown = column(browser, 2)
    assert [s.split(" ")[0] for s in shown] == [e.split(" ")[0] for e in expected]
    assert column(browser, 1)[:3] == ["1", "2–3", "2–3"]
    assert column(browser, 1)[-1] == "–"
    assert "failed:" in css(browser, "#board-table tbody tr")[-1].text


def test_sorting_by_pointer_and_by_keyboard(opened):
    browser, folder = opened
    table = Board.from_runs([folder]).table()
    press(browser, "method")
    names = [s.lower() for s in column(browser, 2)]
    assert names == sorted(names)
    head = css(browser, "#board-table th[aria-sort='ascending']")
    assert [h.text.split()[0] for h in head] == ["method"]
    active = browser.switch_to.active_element
    assert active.get_attribute("data-key") == "method"
    active.send_keys("\ue007")  # Enter: the other way round, focus kept
    assert [s.lower() for s in column(browser, 2)] == names[::-1]
    assert browser.switch_to.active_element.get_attribute("data-key") == "method"
    press(browser, "build")
    by_build = [r.label for r in table.sorted_by("build").rows if r.cost.build_seconds]
    assert [s.split()[0] for s in column(browser, 2)[:-1]] == [s.split()[0] for s in by_build]
    press(browser, "b:selection")
    values = [r.cells["selection"].value for r in table.sorted_by("selection").rows[:-1]]
    place = next(
        i
        for i, h in enumerate(css(browser, "#board-table thead th"), start=1)
        if h.text.startswith("selection")
    )
    assert [float(s.split()[0]) for s in column(browser, place)[:-1]] == [
        round(v, 3) for v in values
    ]


def test_ranking_by_another_benchmark(opened):
    browser, _ = opened
    select = css(browser, "#board select")[0]
    css(browser, "#board select option[value='selection']")[0].click()
    assert select.get_attribute("value") == "selection"
    assert "selection [95%]" in css(browser, "#board-table thead")[0].text
    ranks = [int(r.split("–")[0]) for r in column(browser, 1)[:-1]]
    assert ranks == sorted(ranks)


def test_finding_a_method(opened):
    browser, _ = opened
    css(browser, "#board input[type=search]")[0].send_keys("ekf")
    assert column(browser, 2) == ["ekfac"]


def test_details_open_and_close(opened):
    browser, _ = opened
    button = css(browser, "button.plain[data-row='bad']")[0]
    assert button.get_attribute("aria-expanded") == "false"
    button.click()
    assert "ValueError: <b>bad</b>" in css(browser, "tr.details")[0].text
    again = browser.switch_to.active_element
    assert again.get_attribute("aria-expanded") == "true"
    again.click()
    assert css(browser, "tr.details") == []


def click(browser, element):
    """A click once the page has stopped scrolling: a smooth scroll may lag on a busy machine."""
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element
    )
    element.click()


def test_explorer_shows_what_the_record_stores(opened):
    browser, folder = opened
    record = next(
        r for r in read_run(folder).records if (r.label, r.benchmark_name) == ("logra", "lds")
    )
    arrays, _ = record.arrays()
    next_button = next(b for b in css(browser, "#explorer button") if b.text == "Next")
    for _ in range(2):
        click(browser, next_button)
    card = next(c for c in css(browser, "#explorer .sides .card") if c.text.startswith("logra"))
    top, bottom = card.find_elements("css selector", "ol")
    for side, name in ((top, "top"), (bottom, "bottom")):
        items = side.find_elements("css selector", "li")
        assert len(items) == 10
        for item, index, score in zip(
            items, arrays[f"{name}_index"][2], arrays[f"{name}_score"][2], strict=True
        ):
            badge, task, *_ = item.find_elements("css selector", ".badge")
            assert float(badge.text) == pytest.approx(score, abs=0.01)
            assert task.text == "ab"[index % 2]
            assert f"t{index}" in item.text
            assert f"prompt {index}" in item.text
    assert "query number 2" in css(browser, "#explorer .card")[0].text


def test_explorer_shades_words(opened, tmp_path):
    """Words have the strength of their share; hostile texts stay text; the policy allows it."""
    browser, folder = opened
    board = Board.from_runs([folder])
    record = next(
        r for r in board.runs[0].records if (r.label, r.benchmark_name) == ("logra", "lds")
    )
    first = int(record.arrays()[0]["top_index"][0, 0])
    n = len(EVIL.split()) if first < 50 else 2
    scores = WordScores(
        {"prompt": [0.0, 1.0, 0.5], "response": [0.0] * len(EVIL.split())},
        {first: {"prompt": [1.0, 0.0], "response": [0.25] * n}},
    )
    path = tmp_path / "shaded.html"
    words = {(board.tables[0].target, "logra"): {"q000": scores}}
    write_report(board, path, words=words)
    show(browser, path)
    card = next(c for c in css(browser, "#explorer .sides .card") if c.text.startswith("logra"))
    assert "Words of the query that carry the scores below" in card.text
    asked, example = card.find_elements("css selector", ".text")[:2]
    marks = asked.find_elements("css selector", "mark")
    assert [m.text for m in marks] == ["number", "0"]
    alpha = [float(m.value_of_css_property("background-color")[:-1].split(",")[3]) for m in marks]
    assert alpha == pytest.approx([0.6, 0.3], abs=0.01)
    marks = example.find_elements("css selector", "mark")
    assert marks[0].text == "prompt"
    assert len(marks) == 1 + n
    others = [c for c in css(browser, "#explorer .sides .card") if c.id != card.id]
    assert not any(c.find_elements("css selector", "mark") for c in others)
    click(browser, next(b for b in css(browser, "#explorer button") if b.text == "Next"))
    assert css(browser, "#explorer mark") == []  # scores of the first query only
    assert css(browser, "main img, main script") == []
    assert logs(browser)[0] == []


def test_explorer_finds_and_chooses(opened):
    browser, _ = opened
    css(browser, "#explorer input[type=search]")[0].send_keys("number 17")
    assert [o.text.split()[0] for o in css(browser, "#explorer select option")] == ["q017"]
    assert "query number 17" in css(browser, "#explorer .card")[0].text
    boxes = css(browser, "#explorer input[type=checkbox]")
    assert [b.is_selected() for b in boxes] == [True, True, True, False]
    click(browser, boxes[0])
    shown = [c.text.split("\n")[0] for c in css(browser, "#explorer .sides .card")]
    assert shown == ["logra", "ekfac"]
    css(browser, "#explorer input[type=search]")[0].send_keys(" nothing like it")
    assert "No query matches" in css(browser, "#explorer")[0].text


def test_themes(opened):
    browser, _ = opened
    for dark in (True, False):
        value = "dark" if dark else "light"
        features = [{"name": "prefers-color-scheme", "value": value}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.refresh()
        assert (_luminance(browser) < 0.2) == dark
        assert _contrast(browser) > 7
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    button = browser.find_element("id", "theme")
    seen = {}
    for _ in range(3):
        button.click()
        seen[button.text] = _luminance(browser)
    assert seen["Theme: dark"] < 0.2 < 0.8 < seen["Theme: light"]


def _rgb(browser, property):
    script = "return getComputedStyle(document.body)[arguments[0]].match(/[0-9.]+/g).map(Number)"
    return np.array(browser.execute_script(script, property)[:3]) / 255


def _relative(rgb):
    linear = np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _luminance(browser):
    return _relative(_rgb(browser, "backgroundColor"))


def _contrast(browser):
    light, dark = sorted([_luminance(browser), _relative(_rgb(browser, "color"))], reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_screen_readers_find_names_for_everything(opened):
    browser, _ = opened
    nameless = browser.execute_script(
        """
        const named = (e) => (e.getAttribute("aria-label") || e.textContent || e.title ||
          (e.labels && [...e.labels].map((l) => l.textContent).join(" ")) || "").trim();
        return [...document.querySelectorAll("button, a, select, input, summary, svg, [role=img]")]
          .filter((e) => !named(e)).map((e) => e.outerHTML.slice(0, 120));
        """
    )
    assert nameless == []
    assert len(css(browser, "h1")) == len(css(browser, "main")) == 1
    for table in css(browser, "main table"):
        assert table.find_elements("css selector", "thead th[scope=col]")
    assert all(s.get_attribute("aria-labelledby") for s in css(browser, "main section"))
    points = css(browser, "#plots .mark")
    assert points
    assert all(p.get_attribute("tabindex") == "0" for p in points)


def test_points_show_their_figures_on_focus(opened):
    browser, folder = opened
    cell = Board.from_runs([folder]).table().rows[0].cells["lds"]
    script = (
        "[...document.querySelectorAll('#plots .mark')]"
        ".find((e) => e.getAttribute('aria-label').startsWith('airrep')).focus()"
    )
    browser.execute_script(script)
    tip = browser.find_element("id", "tip")
    assert tip.is_displayed()
    assert f"{cell.value:.3f}" in tip.text
    browser.switch_to.active_element.send_keys("\ue00c")  # Escape
    assert not tip.is_displayed()


@pytest.mark.parametrize("width", [400, 800, 1600])
def test_the_page_never_scrolls_sideways(opened, width):
    browser, _ = opened
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for label in ("airrep", "bad"):
        button = css(browser, f"#board-table button.plain[data-row='{label}']")[0]
        browser.execute_script("arguments[0].click()", button)
    script = "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
    inside, outside = browser.execute_script(script)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert inside <= outside


def test_lines_are_switched_from_the_legend(opened):
    browser, _ = opened
    plot = next(f for f in css(browser, "#plots figure") if f.text.startswith("selection: f1"))

    def lines():
        return len(plot.find_elements("css selector", "polyline"))

    first = plot.find_elements("css selector", "button.line")[0]
    before = lines()
    click(browser, first)
    assert first.get_attribute("aria-pressed") == "false"
    assert lines() == before - 1
    first.send_keys("\ue007")  # Enter brings it back
    assert first.get_attribute("aria-pressed") == "true"
    assert lines() == before


def test_two_targets_are_two_boards(browser, make_run, tmp_path):
    def other(record):
        record["target"] = {"name": "gpt2-2m", "regime": "continued", "fingerprint": "dead"}

    a = make_run("a", {"x": 1.0}, benchmarks=("lds",))
    b = make_run("b", {"y": 1.0}, benchmarks=("lds",), change=other)
    write_report(Board.from_runs([a, b]), tmp_path / "two.html")
    show(browser, tmp_path / "two.html")
    first = column(browser, 2)
    browser.find_elements("css selector", "#target option")[1].click()
    assert {*first, *column(browser, 2)} == {"x", "y"}


def test_a_large_report_is_small_and_complete(browser, tmp_path):
    """50 methods, 10 benchmarks, 2,000 queries: under 20 MB.

    How soon it opens is measured by benchmarks/report_opening.py, whose run this is.
    """
    suite = report_opening.write_run(tmp_path / "large")
    path = tmp_path / "large.html"
    write_report(Board.from_runs([tmp_path / "large"]), path, suite=str(suite))
    assert path.stat().st_size < 20 * 10**6
    logs(browser)
    show(browser, path)
    assert len(css(browser, "#board-table tbody tr")) == 50
    assert len(css(browser, "#explorer select option")) == 2000
    assert logs(browser)[0] == []
