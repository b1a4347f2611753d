"""The report's page in a browser: its script runs, its figures are drawn."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from analysis.load import load_results
from analysis.report import write_report
from benchmarks.browser import CHROMIUM, DRIVER, start_chromium
from tests.analysis.conftest import many_models, write

PHONE_PIXELS = 390

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    driver = start_chromium(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def shown(browser: webdriver.Chrome, report_page: Path) -> webdriver.Chrome:
    return opened(browser, report_page.as_uri())


@pytest.fixture(scope="module")
def tall_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a page with tables of 400 and 800 rows, without figures."""
    folder = tmp_path_factory.mktemp("tall")
    write(many_models(400), folder / "results" / "hand.parquet")
    return write_report(load_results(folder), folder / "report", "corpus")


def opened(browser: webdriver.Chrome, address: str) -> webdriver.Chrome:
    """Open an address and wait until the page's script has read its data."""
    browser.get("about:blank")  # another fragment of the page that is open would not load it
    browser.get(address)
    WebDriverWait(browser, 20).until(
        lambda _: browser.execute_script("return ready.then(() => true)")
    )
    return browser


def emulate(browser: webdriver.Chrome, scheme: str) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def levels(browser: webdriver.Chrome) -> WebElement:
    """Return the first table of means."""
    tables = browser.find_elements(By.CSS_SELECTOR, "table.sortable")
    return next(table for table in tables if table.find_elements(By.CSS_SELECTOR, "button.cell"))


def column(table: WebElement, place: int) -> list[str]:
    return [
        row.find_elements(By.TAG_NAME, "td")[place].text
        for row in table.find_elements(By.CSS_SELECTOR, "tbody tr:has(td)")
    ]


def test_the_console_has_no_error_and_all_figures_are_drawn(shown: webdriver.Chrome) -> None:
    assert [entry for entry in shown.get_log("browser") if entry["level"] == "SEVERE"] == []
    drawn = "return arguments[0].complete && arguments[0].naturalWidth > 0"
    for image in shown.find_elements(By.TAG_NAME, "img"):  # drawn when they come into sight
        shown.execute_script("arguments[0].scrollIntoView()", image)
        WebDriverWait(shown, 20).until(lambda _, i=image: shown.execute_script(drawn, i))
    sizes = shown.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])"
    )
    assert len(sizes) == 8  # differences and levels of three tasks and of the mean of two
    assert all(complete and natural > 100 and drawn > 100 for complete, natural, drawn in sizes)


def test_a_heading_sorts_its_table_by_number_and_then_the_other_way(
    shown: webdriver.Chrome,
) -> None:
    table = levels(shown)
    heading = next(
        button
        for button in table.find_elements(By.CSS_SELECTOR, "th button")
        if button.text.startswith("self-generated")
    )
    place = [each.text for each in table.find_elements(By.TAG_NAME, "th")].index(heading.text)
    before = column(table, place)
    heading.click()
    up = [float(text.split(" ")[0]) for text in column(table, place) if text]
    assert up == sorted(up)
    assert len(up) == 8
    assert column(table, place)[-1] == ""  # fields without a number stay last
    heading.click()
    down = column(table, place)
    assert [float(text.split(" ")[0]) for text in down if text] == up[::-1]
    assert down[-1] == ""
    assert sorted(down) == sorted(before)


def test_a_click_on_a_number_shows_its_cells_and_their_specs(shown: webdriver.Chrome) -> None:
    levels(shown).find_element(By.CSS_SELECTOR, "button.cell").click()
    dialog = shown.find_element(By.TAG_NAME, "dialog")
    WebDriverWait(shown, 20).until(lambda _: dialog.is_displayed())
    assert "dense" in dialog.text
    numbers = [row.text for row in dialog.find_elements(By.CSS_SELECTOR, "tbody tr")]
    assert numbers == ["heldout: perplexity 8.00", "colours: acc (%) 80.0", "rivers: acc (%) 65.0"]
    spec = next(
        each
        for each in dialog.find_elements(By.TAG_NAME, "summary")
        if each.text.startswith("spec: evaluate")
    )
    spec.click()
    WebDriverWait(shown, 20).until(lambda _: "batch_size: 32" in dialog.text)
    dialog.find_element(By.CSS_SELECTOR, ".close").click()
    assert not dialog.is_displayed()


def test_a_view_of_cells_has_an_address_and_the_way_back_leaves_it(
    shown: webdriver.Chrome,
) -> None:
    dialog = shown.find_element(By.TAG_NAME, "dialog")
    buttons = levels(shown).find_elements(By.CSS_SELECTOR, "button.cell")
    several = next(each for each in buttons if " " in str(each.get_attribute("data-cells")))
    shown.execute_script("arguments[0].click()", several)
    WebDriverWait(shown, 20).until(lambda _: dialog.is_displayed())
    said, address = dialog.text, shown.current_url
    assert said.count("cell hand-tiny-") == 2  # two seeds
    shown.back()
    WebDriverWait(shown, 20).until(lambda _: not dialog.is_displayed())
    again = opened(shown, address).find_element(By.TAG_NAME, "dialog")
    WebDriverWait(shown, 20).until(lambda _: again.is_displayed())
    assert again.text == said


def test_a_failed_cell_shows_its_error_and_its_traceback(shown: webdriver.Chrome) -> None:
    failed = shown.find_element(By.CSS_SELECTOR, "#failed ~ .scroll button.cell")
    shown.execute_script("arguments[0].click()", failed)
    dialog = shown.find_element(By.TAG_NAME, "dialog")
    WebDriverWait(shown, 20).until(lambda _: dialog.is_displayed())
    assert "ValueError: <b>bad</b>" in dialog.text
    trace = dialog.find_element(By.XPATH, ".//summary[.='traceback']")
    trace.click()
    assert "Traceback of it" in dialog.text


def test_a_long_table_scrolls_through_all_rows_and_sorts_them(
    browser: webdriver.Chrome, tall_page: Path
) -> None:
    shown = opened(browser, tall_page.as_uri())
    table = levels(shown)
    box = table.find_element(By.XPATH, "..")
    assert "800 rows: scroll." in table.find_element(By.TAG_NAME, "caption").text
    assert len(column(table, 0)) < 120  # the others are no elements
    shown.execute_script("arguments[0].scrollTop = arguments[0].scrollHeight", box)
    WebDriverWait(shown, 20).until(lambda _: column(table, 0)[-1] == "model-399")
    heading = table.find_elements(By.CSS_SELECTOR, "th button")[4]
    assert heading.text.startswith("corpus")
    for first in ("model-000", "model-399"):  # up, then down
        shown.execute_script("arguments[0].scrollTop = 0; arguments[1].click()", box, heading)
        WebDriverWait(shown, 20).until(lambda _, first=first: column(table, 0)[0] == first)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page_in_light_and_dark(
    shown: webdriver.Chrome, scheme: str
) -> None:
    emulate(shown, scheme)
    script = "const s = getComputedStyle(arguments[0]); return [s.color, s.backgroundColor]"
    text = shown.execute_script(script, shown.find_element(By.TAG_NAME, "body"))[0]
    back = shown.execute_script(script, shown.find_element(By.TAG_NAME, "html"))[1]
    light, dark = sorted(map(luminance, (text, back)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) > 7  # WCAG 2.2, AAA
    assert (luminance(back) > 0.5) == (scheme == "light")


def luminance(colour: str) -> float:
    """Return the relative luminance of `rgb(r, g, b)`, as WCAG 2.2 defines it."""
    parts = colour[colour.index("(") + 1 : -1].split(",")[:3]
    shares = [float(part) / 255 for part in parts]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_on_a_phone_the_page_itself_does_not_scroll_sideways(shown: webdriver.Chrome) -> None:
    metrics = {"width": PHONE_PIXELS, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    shown.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert shown.execute_script("return document.documentElement.scrollWidth") <= PHONE_PIXELS
    finally:
        shown.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
