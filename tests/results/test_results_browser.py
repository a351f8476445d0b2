"""The page of a results repository in a real browser: filters, cards, history, no request.

Skipped where Chromium or its driver is not installed.
"""

from __future__ import annotations

import json
import shutil

import pytest

from tdabench.results.layout import read_results
from tdabench.results.site import build_site

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium here")

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture
def page(repository, make_run, submit_run, tmp_path):
    """The page of a repository with a newer version and a hostile label, open in the browser."""

    def newer(record):
        record["method"]["version"] = 2
        record["started"] = "2026-02-01T00:00:00Z"

    more = make_run("new", {"airrep": 0.9, f"x {EVIL}": 0.5}, change=newer)
    submit_run(more, repository, by="B.")
    build_site(read_results(repository), tmp_path / "site", "Board", cache=False)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage"
    for flag in (*flags.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.get((tmp_path / "site" / "index.html").as_uri())
    yield driver
    driver.quit()


def texts(page, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    return page.execute_script(script, selector)


def test_the_page_works_without_a_server(page):
    labels = texts(page, "#rows tbody th")
    assert set(labels) == {"airrep", "logra", "bm25", "demo", f"x {EVIL}"}
    assert labels[-1] == "demo"  # without a value: last, and there
    assert "oom" in texts(page, "#rows tbody")[0]
    find = "const f = document.getElementById('find'); f.value = arguments[0]; "
    page.execute_script(find + "f.dispatchEvent(new Event('input'))", "log")
    assert texts(page, "#rows tbody th") == ["logra"]
    page.execute_script(find + "f.dispatchEvent(new Event('input'))", "")
    click = "[...document.querySelectorAll('#rows button')].find((b) => b.textContent === 'airrep')"
    page.execute_script(f"{click}.click()")
    card = texts(page, "#card")[0]
    assert "arXiv 2505.18513" in card
    assert "4,800 retrainings" in card
    assert texts(page, "#past tbody td:nth-child(3)") == ["2", "1"]
    assert "Testor 9" in texts(page, "#hardware")[0]
    assert texts(page, "#bad li") == ["None"]
    assert not page.execute_script("return document.querySelector('main img')")
    errors = [e for e in page.get_log("browser") if e["level"] == "SEVERE"]
    assert errors == []
    asked = [
        m["message"]["params"]["request"]["url"]
        for m in (json.loads(e["message"]) for e in page.get_log("performance"))
        if m["message"]["method"] == "Network.requestWillBeSent"
    ]
    assert all(url.startswith(("file:", "data:", "about:", "chrome")) for url in asked)
