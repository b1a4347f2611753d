"""The report's page in a browser: its script runs, its figures are drawn."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
PHONE_PIXELS = 390

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    assert CHROMIUM is not None
    options = Options()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1200,900",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def shown(browser: webdriver.Chrome, report_page: Path) -> webdriver.Chrome:
    browser.get(report_page.as_uri())
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
        for row in table.find_elements(By.CSS_SELECTOR, "tbody tr")
    ]


def test_the_console_has_no_error_and_all_figures_are_drawn(shown: webdriver.Chrome) -> None:
    assert [entry for entry in shown.get_log("browser") if entry["level"] == "SEVERE"] == []
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
    assert dialog.is_displayed()
    assert "dense" in dialog.text
    spec = next(
        each
        for each in dialog.find_elements(By.TAG_NAME, "summary")
        if each.text.startswith("spec: evaluate")
    )
    spec.click()
    WebDriverWait(shown, 20).until(lambda _: "batch_size: 32" in dialog.text)
    dialog.find_element(By.CSS_SELECTOR, ".close").click()
    assert not dialog.is_displayed()


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
