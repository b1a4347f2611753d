"""A headless Chromium that the report's page is opened in, by a benchmark and by tests."""

import shutil
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")


def start_chromium(profile: Path) -> webdriver.Chrome:
    """Start Chromium, whose console is kept and which asks nothing of the network; call `quit`.

    Args:
        profile: a folder of its own.

    Raises:
        FileNotFoundError: if Chromium or its driver is not installed.
    """
    if CHROMIUM is None or DRIVER is None:
        raise FileNotFoundError("chromium and chromedriver are not both installed")
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
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, Service(DRIVER))
