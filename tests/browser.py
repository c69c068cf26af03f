"""A real Chromium without a window, driven by Selenium."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--disable-dev-shm-usage",
)  # fmt: skip
PATIENCE = 60
"""seconds after which something will not happen any more"""


def missing() -> str | None:
    """What is not installed of what a browser needs; None where everything is."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        return "no chromium and chromedriver: apt-get install chromium chromium-driver"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "no selenium: pip install tokengame[dev]"
    return None


@contextmanager
def chromium(profile: Path, size: tuple[int, int] = (1360, 900)) -> Iterator[Any]:
    """A browser with a fresh profile, whose requests are logged."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        browser.get("about:blank")
        requests(browser)  # those of the browser's own first page
        yield browser
    finally:
        browser.quit()


def requests(browser: Any) -> list[str]:
    """Addresses that were requested since the last call; data: and blob: are in the page itself."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    found = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in found if not url.startswith(("data:", "blob:", "chrome:", "chrome-untrusted:"))]


def until(browser: Any, holds: Callable[[], Any]) -> Any:
    """What `holds` gives as soon as it gives something."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, PATIENCE, 0.05, (StaleElementReferenceException,))
    return wait.until(lambda _: holds())


class Page:
    """The demo's page as a visitor meets it."""

    def __init__(self, browser: Any, url: str):
        self.browser = browser
        browser.get(url)
        until(browser, lambda: self.picture and self.text)

    @property
    def text(self) -> str:
        """What is said about the photo."""
        return self.browser.find_element("id", "answers").text

    @property
    def picture(self) -> str:
        """Where the picture of tokens comes from; it is another address for another picture."""
        found = self.browser.find_elements("css selector", "#tokens img")
        return found[0].get_attribute("src") if found else ""

    def after(self, act: Callable[[], Any]) -> None:
        """Act, and wait until the page says something else."""
        before = self.text
        act()
        until(self.browser, lambda: self.text not in ("", before))

    def upload(self, path: Path) -> None:
        self.after(lambda: self.browser.find_element("css selector", "#photo input[type=file]").send_keys(str(path)))

    def take(self, example: int) -> None:
        self.after(
            lambda: self.browser.find_elements("css selector", "#examples button.thumbnail-item")[example].click()
        )

    def move_dial(self, value: float) -> None:
        """As a hand does that moves the slider: the value changes, then the slider says so."""
        script = (
            "const slider = document.querySelector('#dial input[type=range]'); slider.value = arguments[0];"
            "for (const name of ['input', 'change', 'pointerup']) "
            "slider.dispatchEvent(new Event(name, {bubbles: true}))"
        )
        self.after(lambda: self.browser.execute_script(script, value))
