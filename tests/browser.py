"""A headless Chromium for the tests of HTML pages; they are skipped, with the reason, where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,900")


# Relative luminance and contrast as WCAG 2.2 defines them; 4.5 is its level AA for text.
FAINT = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true }), known = new Map();
const channels = (colour) => {
  if (!known.has(colour)) {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    known.set(colour, [...canvas.getImageData(0, 0, 1, 1).data]);
  }
  return known.get(colour);
};
const luminance = (colour) => channels(colour).slice(0, 3).map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (element) => {
  const group = element.closest("svg g[class]");
  if (group) return getComputedStyle(group.querySelector("path, polygon")).fill;
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (channels(colour)[3] === 255) return colour;
  }
  return "white";
};
const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
let seen = 0;
while (texts.nextNode()) {
  const element = texts.currentNode.parentElement, text = texts.currentNode.data.trim();
  if (!text || ["SCRIPT", "STYLE"].includes(element.tagName) || !element.checkVisibility()) continue;
  seen += 1;
  const style = getComputedStyle(element);
  const ink = luminance(element.tagName === "text" ? style.fill : style.color), paper = luminance(behind(element));
  const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  if (contrast < 4.5) found.push(`${text}: ${contrast.toFixed(2)}`);
}
return seen < 50 ? [`only ${seen} texts`] : found;
"""


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

    def prefer(self, scheme: str) -> None:
        """Have the reader prefer ``dark`` or ``light``; ``""`` is the browser's own preference."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def faint(self) -> list[str]:
        """Texts with less than WCAG's contrast AA to what they stand on, each with its contrast; drawings included."""
        return list(self.run(FAINT))

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
