"""The web page in a real browser, Chromium without a window."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from serving_parts import file_of, served

import metamorph
from metamorph.inference import Session


exceptions = pytest.importorskip("selenium.common.exceptions", reason="needs selenium")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
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
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                if found := condition():
                    return found
            except exceptions.StaleElementReferenceException:
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
        self.wait(lambda: self.find(".thumbnail-item"))

    def answers(self, number: int) -> list[str]:
        """The texts of the answers, once the last of this number of them is complete."""
        self.wait(
            lambda: len(self.find(".bot.message:not(.pending)")) == number and self.find("textarea:not([disabled])")
        )
        return [each.text.strip() for each in self.find(".bot.message:not(.pending)")]

    def images(self) -> list[str]:
        """Addresses of the drawn images, once they are loaded."""
        return self.loaded(".bot.message img")

    def loaded(self, css: str) -> list[str]:
        images = self.find(css)
        widths = [self.driver.execute_script("return arguments[0].naturalWidth", image) for image in images]
        return [image.get_attribute("src") for image in images] if all(widths) else []


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
    assert len(page.loaded(".user.message img")) == 1
    page.send(DRAW)
    page.answers(2)
    assert len(page.images()) == 1
    page.send(ASK)
    assert page.answers(3)[2] == "red"
    page.click("Undo")
    page.wait(lambda: len(page.find(".bot.message:not(.pending)")) == 2)
    assert page.find("textarea")[0].get_attribute("value") == ASK
    page.click("Clear")
    page.wait(lambda: page.find(".example"))


def test_stop_keeps_the_beginning_and_retry_replaces_it(page: Page, session: Session) -> None:
    with endless(session):
        page.send(DRAW)
        page.wait(page.images)
        page.click("Stop")
        page.wait(lambda: page.find("textarea:not([disabled])") and page.find('[aria-label="Submit"]'))
    page.send(ASK)
    assert page.answers(2)[1] == "red"  # of the image that was drawn before
    page.click("Undo")
    page.wait(lambda: len(page.answers(1)) == 1)
    before = page.images()
    page.click("Retry")
    page.wait(lambda: page.images() not in ([], before))  # from another seed
    assert len(page.images()) == 1


def test_a_closed_page_ends_its_answer(chromium, session: Session) -> None:
    with endless(session), served(session, engine={"max_batch_size": 1}, page=True) as url:
        page = Page(chromium, url)
        page.open(1000, 800)
        page.send(DRAW)
        page.wait(page.images)
        chromium.get("about:blank")
        page.wait(lambda: "metamorph_running 0.0" in httpx.get(f"{url}/metrics").text)


def test_settings_and_examples(page: Page) -> None:
    page.find(".label-wrap")[0].click()
    images = page.wait(lambda: page.find('input[type=number][aria-label*="Images"]'))[0]
    images.send_keys(webdriver.Keys.BACKSPACE, "2", webdriver.Keys.TAB)
    texts = [each.text for each in page.find(".example")]
    assert [text.partition(":")[0] for text in texts] == [
        "Chat on an image",
        "Generation",
        "Visual thinking",
        "Transformation",
    ]
    page.find(".example")[3].click()
    page.wait(lambda: len(page.images()) == 2 and page.find("textarea:not([disabled])"))
    assert len(page.loaded(".user.message img")) == 1


def test_a_file_that_is_no_image(page: Page, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_text("no image")
    page.attach(tmp_path / "broken.png")
    page.send(ASK)
    page.wait(lambda: "broken.png: the image cannot be read" in page.text)
    page.wait(lambda: page.find("textarea")[0].get_attribute("value") == ASK)  # to be sent again without it
    assert not page.find(".message")


def test_a_seed_that_is_too_large(page: Page) -> None:
    page.find(".label-wrap")[0].click()
    seed = page.wait(lambda: page.find('input[aria-label^="Seed"]'))[0]
    seed.send_keys(webdriver.Keys.CONTROL, "a")
    seed.send_keys(str(2**53), webdriver.Keys.TAB)
    page.send(ASK)
    page.wait(lambda: f"the seed is more than {2**53 - 1}" in page.text)
    page.wait(lambda: page.find("textarea")[0].get_attribute("value") == ASK)


@pytest.mark.parametrize("size", [(390, 844), (1000, 800)])
def test_it_fits_the_window(page: Page, size: tuple[int, int]) -> None:
    page.open(*size)
    for text in (DRAW, ASK):
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= size[0]
        (button,) = page.find('[aria-label="Submit"]')
        assert button.rect["x"] + button.rect["width"] <= size[0]
        assert button.rect["y"] + button.rect["height"] <= size[1]
        page.send(text)
        page.wait(lambda: page.find(".bot.message:not(.pending)") and page.find("textarea:not([disabled])"))


def test_nothing_is_requested_from_elsewhere(page: Page) -> None:
    page.driver.get_log("performance")
    page.open(1000, 800)
    page.find(".example")[1].click()
    page.wait(page.images)
    events = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert any("/chat/gradio_api/queue" in address for address in asked)
    assert {address for address in asked if not address.startswith((page.url, "data:", "blob:"))} == set()
