"""The web page in a real browser: Debian's Chromium without a window."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from serving_parts import file_of, served

import metamorph
from metamorph.inference import Session


webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium: apt-get install chromium chromium-driver"),
]
ASK, DRAW = "what color is the object?", "draw a large red circle"


@pytest.fixture(scope="module")
def session() -> Session:
    return metamorph.load("mini", "mini", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def url(session) -> Iterator[str]:
    with served(session, page=True) as address:
        yield address


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    folder = tmp_path_factory.mktemp("chromium")
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", f"user-data-dir={folder}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium, url: str) -> "Page":
    """A fresh page in a wide window."""
    found = Page(chromium, url)
    found.open(1000, 800)
    return found


class Page:
    """What a user does and sees."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(self.url)
        self.wait(lambda: self.find(".example") and self.find("textarea"))

    def find(self, css: str) -> list[Any]:
        return [each for each in self.driver.find_elements("css selector", css) if each.is_displayed()]

    def wait(self, condition: Callable[[], Any]) -> Any:
        """What the condition returns, once it is true."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            try:
                if found := condition():
                    return found
            except webdriver.common.utils.selenium.common.exceptions.StaleElementReferenceException:
                pass  # it was drawn again
            time.sleep(0.1)
        raise AssertionError(f"the page shows: {self.text}")

    @property
    def text(self) -> str:
        return self.driver.find_element("css selector", "body").text

    def click(self, label: str) -> None:
        self.wait(lambda: self.find(f'button[aria-label="{label}"]:not([disabled])'))[-1].click()

    def send(self, text: str) -> None:
        self.wait(lambda: self.find("textarea:not([disabled])"))[0].send_keys(text)
        self.click("Submit")

    def attach(self, file: Path) -> None:
        self.driver.find_element("css selector", "input[type=file]").send_keys(str(file))
        self.wait(lambda: self.find(".thumbnail-item, .thumbnails img, [aria-label='Remove attachment']"))

    def answers(self, number: int) -> list[str]:
        """The texts of the answers, once the last of this number of them is complete."""
        self.wait(lambda: len(self.find(".bot.message")) == number and self.find("textarea:not([disabled])"))
        return [each.text.strip() for each in self.find(".bot.message")]

    def images(self) -> list[str]:
        """Addresses of the drawn images."""
        return [each.get_attribute("src") for each in self.find(".bot.message img")]


@pytest.fixture
def circle(tmp_path: Path) -> Path:
    file = tmp_path / "circle.png"
    file.write_bytes(file_of(Image.new("RGB", (64, 64), "red")))
    return file


@contextmanager
def endless(session: Session) -> Iterator[None]:
    """Answers end at their limit only."""
    before = session.model.generation_config.suppress_tokens
    session.model.generation_config.suppress_tokens = session.processor.end_of_turn_token_ids
    yield
    session.model.generation_config.suppress_tokens = before


def test_a_conversation_about_an_image(page: Page, circle: Path) -> None:
    assert "Ask about an image" in page.text  # what to do, while there is nothing
    page.attach(circle)
    page.send(ASK)
    assert page.answers(1) == ["red"]
    page.send(DRAW)
    page.answers(2)
    assert len(page.images()) == 1
    page.send(ASK)
    assert page.answers(3)[2] == "red"
    page.click("Undo")
    page.wait(lambda: len(page.find(".bot.message")) == 2)
    assert page.find("textarea")[0].get_attribute("value") == ASK
    page.click("Clear")
    page.wait(lambda: page.find(".example"))
