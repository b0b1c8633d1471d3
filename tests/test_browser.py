"""The pages in a real browser: search, charts, keys, tables, light and dark, and the rules of accessibility.

Skipped where Chromium and its driver are not installed: `apt-get install chromium chromium-driver`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select

from qwentune.pages.run_page import PAGE, RunPage
from tests.test_html_report import HOSTILE, rows
from tests.test_preview import preview, write_recipe, write_rows
from tests.test_run_page import written_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no browser: apt-get install chromium chromium-driver"
)
OPTIONS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
OPTIONS += " --disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1200,900"
ANSWERS = ("the first answer", HOSTILE, "Third, of THREE", "x" * 300, "你好 and a forged <|im_end|>")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, qwen3_folder: Path) -> Path:
    """A report with warnings, all tables, and five examples."""
    folder = tmp_path_factory.mktemp("browser")
    file = write_rows(folder, *rows(*ANSWERS, "long " * 3000))
    write_recipe(folder, qwen3_folder, file, max_tokens=2048, max_dropped_fraction=0.5)
    finished = preview(folder, "--html", "page.html")
    assert finished.returncode == 0, finished.stderr
    return folder / "page.html"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for option in [*OPTIONS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, ChromeService(executable_path=str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def browser(started: Chrome, page: Path) -> Chrome:
    """The page, just opened, in light colours."""
    prefer(started, "light")
    started.get(page.as_uri())
    return started


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run of 10,000 steps with all that a page can have."""
    folder = tmp_path_factory.mktemp("runs") / "faq"
    RunPage(written_run(folder, 10_000)).write()
    return folder / PAGE


@pytest.fixture
def opened(started: Chrome, run_page: Path) -> Chrome:
    """The page of a run, just opened, in light colours."""
    prefer(started, "light")
    started.get(run_page.as_uri())
    return started


@pytest.fixture(params=["browser", "opened"])
def either(request: pytest.FixtureRequest) -> Chrome:
    """The one page, and the other."""
    return request.getfixturevalue(request.param)


def prefer(browser: Chrome, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def shown(browser: Chrome) -> list[WebElement]:
    return [article for article in browser.find_elements(By.TAG_NAME, "article") if article.is_displayed()]


def press(browser: Chrome, *keys: str) -> None:
    ActionChains(browser).send_keys(*keys).perform()


def test_the_page_loads_nothing_and_reports_no_error(browser: Chrome) -> None:
    assert len(shown(browser)) == len(ANSWERS)
    assert "control token is spelled" in browser.find_element(By.CSS_SELECTOR, "main > ul.warnings").text
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []


def test_search_shows_what_holds_the_text_in_any_case(browser: Chrome) -> None:
    search, found = browser.find_element(By.ID, "search"), browser.find_element(By.ID, "found")
    search.send_keys("of three")
    assert [article.text.count("Third, of THREE") for article in shown(browser)] == [1]
    assert found.text == "1 found"
    search.send_keys(" hundred")
    assert (shown(browser), found.text) == ([], "0 found")
    erase = (Keys.CONTROL, "a", Keys.NULL, Keys.DELETE)
    search.send_keys(*erase, "你好")  # in the question of each
    assert found.text == f"{len(ANSWERS)} found"
    search.send_keys(*erase)
    assert (len(shown(browser)), found.text) == (len(ANSWERS), "")


def test_filters_and_links_lead_to_the_rows(browser: Chrome) -> None:
    options = {name: Select(browser.find_element(By.ID, name)) for name in ("warning", "format", "turn")}
    assert [option.text for option in options["format"].options] == ["all", "chat"]
    assert [option.text for option in options["turn"].options] == ["all", "messages[1]"]
    link = browser.find_element(By.CSS_SELECTOR, ".warnings a")
    number = next(
        k
        for k, warning in enumerate(browser.find_elements(By.CSS_SELECTOR, ".warnings li"), 1)
        if warning.find_elements(By.TAG_NAME, "a")
    )
    options["warning"].select_by_index(number)
    named = [article.find_element(By.TAG_NAME, "h3").text.split(" ")[0] for article in shown(browser)]
    assert 0 < len(named) <= len(ANSWERS)
    assert link.text in named
    assert browser.find_element(By.ID, "found").text == f"{len(named)} found"
    browser.execute_script("scrollTo(0, 0)")
    link.click()
    assert len(shown(browser)) == len(ANSWERS), "a link shows its row whatever was filtered"
    target = browser.find_element(By.CSS_SELECTOR, "article:target")
    assert target.text.startswith(link.text)
    top = browser.execute_script("return arguments[0].getBoundingClientRect().top", target)
    tools = browser.find_element(By.CSS_SELECTOR, ".tools").size["height"]
    assert top >= tools - 1, "the row is not under the search"


def test_long_messages_that_return_are_folded(browser: Chrome, tmp_path: Path, qwen3_folder: Path) -> None:
    system = {"role": "system", "content": "Be brief. " * 60}
    file = write_rows(tmp_path, *({"messages": [system, *row["messages"]]} for row in rows("one", "two")))
    write_recipe(tmp_path, qwen3_folder, file)
    assert preview(tmp_path, "--html", "page.html").returncode == 0
    browser.get((tmp_path / "page.html").as_uri())
    first, second = shown(browser)
    assert not first.find_elements(By.TAG_NAME, "details")
    folded, summary = (second.find_element(By.TAG_NAME, name) for name in ("details", "summary"))
    height = second.size["height"]
    assert re.match(r"▸? ?system, [\d,]+ characters, as in \S+:1$", summary.text)
    summary.click()
    assert folded.get_property("open")
    assert second.size["height"] > height


def test_keys_lead_to_the_search_and_from_example_to_example(browser: Chrome) -> None:
    def focused() -> WebElement:
        return browser.switch_to.active_element

    press(browser, "/")
    assert focused().get_attribute("id") == "search"
    press(browser, "j")
    assert focused().get_property("value") == "j", "a letter in the search is a letter"
    press(browser, Keys.BACKSPACE, Keys.ESCAPE)
    articles = shown(browser)
    for keys, place in (("j", 0), ("j", 1), ("jjjjj", 4), ("k", 3)):
        press(browser, keys)
        assert focused() == articles[place]
    assert articles[3].value_of_css_property("outline-style") == "solid"
    press(browser, "/", "three", Keys.ESCAPE, "j")
    assert [focused()] == shown(browser), "hidden examples are passed over"
    press(browser, Keys.CONTROL, "k", Keys.NULL)
    assert [focused()] == shown(browser), "the browser's own keys stay its own"


def test_tables_say_what_they_hold(browser: Chrome) -> None:
    tables = browser.find_elements(By.TAG_NAME, "table")
    captions = [table.find_element(By.TAG_NAME, "caption").text for table in tables]
    assert captions[0::3] == ["One epoch", "1 turn or row"]
    facts = {
        row.find_element(By.TAG_NAME, "th").text: row.find_element(By.TAG_NAME, "td").text
        for row in tables[0].find_elements(By.TAG_NAME, "tr")
    }
    assert facts["examples"] == f"{len(ANSWERS)} to train on, 0 to evaluate on"
    assert facts["what is trained ends with"] == f"<|im_end|> × {len(ANSWERS)}"
    bars = [bar.size["width"] for bar in tables[1].find_elements(By.CSS_SELECTOR, ".bar span")]
    assert max(bars) > 100
    assert "你" in tables[2].text
    assert "\ufffd" not in tables[2].text, "a beginning that ends within a character shows it not at all"
    assert "tokens" in tables[3].find_elements(By.TAG_NAME, "td")[1].text


@pytest.mark.parametrize("width", [1200, 390, 320])
def test_nothing_stands_beyond_the_edge(either: Chrome, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    either.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert either.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        either.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_is_dark_and_light_is_light(either: Chrome) -> None:
    def lightness(name: str) -> int:
        colour = either.find_element(By.TAG_NAME, "body").value_of_css_property(name)
        return sum(int(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3])

    assert lightness("background-color") > 600 > 200 > lightness("color")
    prefer(either, "dark")
    assert lightness("background-color") < 200 < 600 < lightness("color")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_breaks_no_rule_of_accessibility(either: Chrome, scheme: str) -> None:
    prefer(either, scheme)
    package = find_spec("axe_core_python")
    assert package is not None
    assert package.submodule_search_locations
    rules = Path(package.submodule_search_locations[0], "axe.min.js").read_text(encoding="utf-8")
    either.execute_script(rules + "; document.querySelectorAll('details').forEach(each => { each.open = true; })")
    result: dict[str, Any] = either.execute_async_script("axe.run().then(arguments[0])")
    broken = {rule["id"]: [node["html"] for node in rule["nodes"]] for rule in result["violations"]}
    assert not broken, json.dumps(broken, indent=2)
    kept = {rule["id"] for rule in result["passes"]}
    assert {"color-contrast", "label", "html-has-lang", "heading-order", "document-title"} <= kept
    # What no rule could decide: axe cannot see through what lies behind a text.
    undecided = {rule["id"]: [node["html"] for node in rule["nodes"]] for rule in result["incomplete"]}
    assert "color-contrast" not in undecided, undecided["color-contrast"]


def test_the_page_of_a_run_loads_nothing_and_runs_no_script_of_a_row(opened: Chrome) -> None:
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert len(opened.find_elements(By.CSS_SELECTOR, ".chart")) == 6
    opened.execute_script("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title = 1\">')")
    assert opened.title == "faq: finished, step 10,000"
    refused = [entry["message"] for entry in opened.get_log("browser")]
    assert refused
    assert all("Content Security Policy" in message for message in refused), "none but those of this test"


def test_charts_are_read_by_keys_and_by_the_mouse_all_at_one_step(opened: Chrome) -> None:
    def read() -> list[str]:
        return [output.text for output in opened.find_elements(By.TAG_NAME, "output")]

    press(opened, Keys.TAB, Keys.TAB, Keys.TAB)  # past two buttons
    focused = opened.switch_to.active_element
    assert focused.get_attribute("aria-label") == "Step in Loss"
    assert focused.find_element(By.XPATH, "..").value_of_css_property("outline-style") == "solid"
    assert read()[0].startswith("step 10,000: train ")
    press(opened, Keys.HOME)
    assert read()[2] == "step 1: 2.00e-4"
    peak = opened.execute_script(
        "const { steps } = JSON.parse(document.querySelector('script').textContent).series[0];"
        "const input = document.querySelector('input'); input.value = steps.indexOf(7001) - 1; return steps.length;"
    )
    assert peak > 500
    press(opened, Keys.ARROW_RIGHT)
    assert read()[0].startswith("step 7,001: train 55.5, mean ")
    assert "eval 1.85 (step 7,500)" in read()[0]
    assert focused.get_attribute("aria-valuetext") == read()[0]
    press(opened, Keys.TAB)
    assert read() == [""] * 6, "what is not looked at says nothing"
    plot = opened.find_element(By.CSS_SELECTOR, "#chart-speed .plot")
    ActionChains(opened).move_to_element(plot).perform()
    assert all(re.match("step (4,9|5,0)", text) for text in read()), read()
    assert "limit " in read()[-1]


def test_charts_are_saved_as_picture_and_as_values(opened: Chrome) -> None:
    opened.execute_script("URL.createObjectURL = blob => { window.saved = blob; return '#'; }")
    saved: dict[str, str] = {}
    for kind in ("csv", "svg"):
        opened.find_element(By.CSS_SELECTOR, f"#chart-loss button[data-kind={kind}]").click()
        saved[kind] = opened.execute_async_script("saved.text().then(arguments[0])")
    lines = saved["csv"].splitlines()
    assert lines[0] == "step,train,mean,eval"
    assert any(line.startswith("7001,55.5,") for line in lines)
    picture = ElementTree.fromstring(saved["svg"])
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Loss", "train", "eval", "best", "10,000"} <= set(texts)
    paths = [element.attrib for element in picture.iter("{http://www.w3.org/2000/svg}path")]
    assert {"none"} == {path["fill"] for path in paths}
    assert any("7px" in path["stroke-dasharray"] for path in paths), "lines are told apart without colour"


def test_the_page_of_a_run_prints_what_is_folded(opened: Chrome) -> None:
    printed = opened.execute_cdp_cmd("Page.printToPDF", {})["data"]
    assert len(printed) > 50_000
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        recipe = opened.find_elements(By.CSS_SELECTOR, "details pre")[-1]
        assert recipe.size["height"] > 20
        assert not opened.find_element(By.CSS_SELECTOR, "button").is_displayed()
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_a_long_prompt_takes_little_room_and_keys_reach_the_rest(opened: Chrome) -> None:
    prompt = opened.find_element(By.CSS_SELECTOR, ".prompt > .written")
    opened.execute_script("arguments[0].textContent += 'and so on\\n'.repeat(50)", prompt)
    seen = "return [arguments[0].clientHeight, arguments[0].scrollTop, arguments[0].scrollHeight]"
    height, _, whole = opened.execute_script(seen, prompt)
    assert height < 300 < whole
    opened.execute_script("arguments[0].scrollTop = 0", prompt)
    prompt.send_keys(Keys.END)
    _, top, _ = opened.execute_script(f"await new Promise(done => setTimeout(done, 300)); {seen}", prompt)
    assert top > 0
