"""A headless Chromium for the tests of HTML pages; they are skipped, with the reason, where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,900")


class Browser:
    """One window, and what the tests ask of it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, file: Path) -> None:
        """Open a page from disk."""
        self.driver.get(file.resolve().as_uri())

    def run(self, script: str, *args: object) -> Any:
        """Return what a script returns."""
        return self.driver.execute_script(script, *args)

    def find(self, selector: str) -> Any:
        """The first element of a CSS selector."""
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        """Every element of a CSS selector."""
        return list(self.driver.find_elements("css selector", selector))

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until something holds that a script brings about a little later; fail after ten seconds."""
        support = pytest.importorskip("selenium.webdriver.support.wait")
        support.WebDriverWait(self.driver, 10, poll_frequency=0.02).until(lambda _: condition())

    def console(self) -> list[str]:
        """Warnings and errors since the last call; reading empties it."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser, closed at the end."""
    binary, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or chromedriver is None:
        pytest.skip("no browser: install chromium and chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="no browser driver: install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A browser for the whole session."""
    with chromium() as opened:
        yield opened
