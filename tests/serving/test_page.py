"""The web page without a browser: its conversation, what it reads of the server, and who may use it."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from serving_parts import file_of, served
from video_parts import index_of, write_video

import metamorph
from metamorph.inference import Prompt, SamplerSettings, Session
from metamorph.models.sequence.conversations import TextPart
from metamorph.serving.engine import Engine
from metamorph.serving.errors import ApiError
from metamorph.serving.limits import Limits
from metamorph.serving.page import Conversation, PageSettings, Turn, answer_turn
from metamorph.serving.request_images import RequestImages
from metamorph.serving.service import Service


DRAW, ASK = "draw a large red circle", "what color is the object?"


@pytest.fixture(scope="module")
def session() -> Session:
    return metamorph.load("mini", "mini", device="cpu", dtype=torch.float32)


@pytest.fixture
def service(session) -> Iterator[Service]:
    engine = Engine(session)
    yield Service(engine, "mini", Limits(max_images=3))
    engine.close()


def settings(**fields: Any) -> PageSettings:
    return PageSettings(**{"seed": 3, "guidance_scale": 1.0, "num_inference_steps": 2, **fields})


async def ask(service: Service, conversation: Conversation, turn: Turn, **fields: Any) -> list[Any]:
    """The messages that are shown after each piece of the answer."""
    conversation.turns.append(turn)
    answer = answer_turn(service, conversation, settings(**fields))
    return [conversation.messages() async for _ in answer]


def test_a_conversation_keeps_what_the_model_wrote(session, service) -> None:
    conversation = Conversation()
    *_, shown = asyncio.run(ask(service, conversation, Turn(DRAW, []), num_images=2))
    files = [Path(content["path"]) for content in shown[1]["content"]]
    (first,) = conversation.turns
    alone = session.reply(DRAW, settings=SamplerSettings(1.0, 2, seed=3, num_images=2))
    drawn = [Image.open(file).tobytes() for file in files]
    assert drawn == [image.tobytes() for image in alone.images]
    assert len(set(drawn)) == 2
    assert torch.equal(first.parts[0].visual_tokens, alone.visual_tokens[0])

    shown = asyncio.run(ask(service, conversation, Turn(ASK, [])))
    context = [
        {"role": "user", "content": DRAW},
        {"role": "assistant", "content": list(alone.parts)},
        {"role": "user", "content": ASK},
    ]
    assert shown[-1][3] == {"role": "assistant", "content": [session.answer(Prompt(context)).text]}
    assert shown[-1][3]["content"] == ["red"]
    messages = asyncio.run(conversation.prompt(service.images()))
    assert messages[1]["content"][0].visual_tokens is first.parts[0].visual_tokens


def test_uploads_are_images_of_the_prompt(service, tmp_path: Path) -> None:
    (tmp_path / "blue.png").write_bytes(file_of(Image.new("RGB", (64, 64), "blue")))
    write_video(tmp_path / "video.mp4", [0.0, 0.5, 1.0])
    files = [str(tmp_path / "blue.png"), str(tmp_path / "video.mp4")]
    conversation = Conversation([Turn("stopped at once", []), Turn(ASK, files)])
    (message,) = asyncio.run(conversation.prompt(service.images()))
    image, line, *frames, other_line, text = message["content"]
    assert image["image"].getpixel((30, 30)) == (0, 0, 255)
    assert [index_of(frame["image"]) for frame in frames] == [0, 2]
    assert (line.text, other_line.text, text.text) == ("\n", "\n", ASK)

    conversation.turns.append(Turn(ASK, files[1:]))
    conversation.turns[1].add(TextPart("blue"), [])
    with pytest.raises(ApiError, match="more than 3 images"):
        asyncio.run(conversation.prompt(service.images()))


def test_the_frames_of_a_video_have_a_limit_together(tmp_path: Path) -> None:
    file = write_video(tmp_path / "video.mp4", [0.0, 1.0, 2.0])
    frames = asyncio.run(RequestImages(Limits(max_pixels=3 * 64 * 48)).open_video(file))
    assert [frame.size for frame in frames] == [(64, 48)] * 3
    images = RequestImages(Limits(max_pixels=3 * 64 * 48 - 1))
    with pytest.raises(ApiError, match=r"the frames of video.mp4 have 64x48 pixels, more than the limit of 3071"):
        asyncio.run(images.open_video(file))


@pytest.mark.parametrize("name", ["broken.png", "broken.mp4", "deleted.png"])
def test_a_file_that_cannot_be_read_is_named(service, tmp_path: Path, name: str) -> None:
    if name != "deleted.png":
        (tmp_path / name).write_text("no image")
    with pytest.raises(ApiError, match=name):
        asyncio.run(ask(service, Conversation(), Turn(ASK, [str(tmp_path / name)])))


def test_a_stopped_answer_ends_and_keeps_what_it_has(session, service) -> None:
    conversation = Conversation([Turn(DRAW, [])])

    async def stop() -> None:
        answer = answer_turn(service, conversation, settings(temperature=2.0))
        async for _ in answer:
            break
        await answer.aclose()
        while service.engine.num_running:
            await asyncio.sleep(0.01)

    before = session.model.generation_config.suppress_tokens
    session.model.generation_config.suppress_tokens = session.processor.end_of_turn_token_ids  # it would never end
    try:
        asyncio.run(asyncio.wait_for(stop(), 60))
    finally:
        session.model.generation_config.suppress_tokens = before
    assert len(conversation.turns[0].parts) == 1


class Browser:
    """Speaks to Gradio's routes as a browser does."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=f"{url}/chat/gradio_api", timeout=60)
        config = self.http.get(f"{url}/chat/config").json()
        self.begin = next(each for each in config["dependencies"] if each["api_name"] == "begin")

    def send(self, path: str | None, text: str = ASK) -> httpx.Response:
        """Send a message with a file of this path."""
        files = [] if path is None else [{"path": path, "meta": {"_type": "gradio.FileData"}}]
        fields = {"data": [{"text": text, "files": files}, None], "fn_index": self.begin["id"]}
        given = {**fields, "session_hash": "here", "trigger_id": self.begin["inputs"][0]}
        return self.http.post("/run/predict", json=given)

    def upload(self, content: bytes, name: str = "a.png") -> httpx.Response:
        return self.http.post("/upload", files={"files": (name, content)})


@pytest.fixture(scope="module")
def browser(session) -> Iterator[Browser]:
    with served(session, Limits(max_body_mb=0.1), page=True) as url:
        yield Browser(url)


def test_no_file_of_the_server_is_read(browser: Browser, tmp_path: Path) -> None:
    secret, working = tmp_path / "secret.png", Path("pyproject.toml").resolve()
    secret.write_bytes(file_of(Image.new("RGB", (8, 8))))
    for path in (secret, working, Path("/etc/hostname")):
        assert browser.http.get(f"/file={path}").status_code == 403
        assert browser.send(str(path)).status_code == 500
    (uploaded,) = browser.upload(secret.read_bytes()).json()
    assert browser.http.get(f"/file={uploaded}").content == secret.read_bytes()
    assert browser.send(uploaded).status_code == 200
    assert browser.send(f"{Path(uploaded).parent}/../../../{secret}").status_code == 500


def test_no_url_is_fetched(browser: Browser) -> None:
    names = ("file=http://", "file=https://", "gradio_api/file/http://", "gradio_api/file=http://", "proxy=https://")
    for path in (f"/{name}example.org/a.png" for name in names):
        assert browser.http.get(path).status_code == 403
    assert browser.send("https://example.org/a.png").status_code == 403


def test_a_message_without_content_is_refused(browser: Browser) -> None:
    """So that the turn before it is not answered once more."""
    assert browser.send(None).status_code == 200
    refused = browser.send(None, "  ")
    assert (refused.status_code, refused.json()["error"]) == (500, "Write a message, or attach a file.")


def test_uploads_are_limited(browser: Browser) -> None:
    assert browser.upload(bytes(150_000)).status_code == 413


def test_the_page_needs_the_key(session) -> None:
    with served(session, page=True, api_key="secret") as url:
        for path in ("/chat/", "/chat/config", "/chat/gradio_api/info"):
            refused = httpx.get(url + path)
            assert (refused.status_code, refused.headers["www-authenticate"][:5]) == (401, "Basic")
            assert httpx.get(url + path, auth=("anyone", "secret")).status_code == 200
        assert httpx.get(url, auth=("", "secret")).headers["location"] == "/chat"
        assert httpx.get(f"{url}/v1/nothing").status_code == 401


def test_an_open_page_ends_with_the_server(session) -> None:
    ends: list[bytes] = []
    opened = threading.Event()

    def stay(url: str) -> None:
        with httpx.stream("GET", f"{url}/chat/gradio_api/heartbeat/here", timeout=60) as beats:
            opened.set()
            ends.append(b"".join(beats.iter_raw()))  # an error if the connection is cut

    with served(session, page=True) as url:
        tab = threading.Thread(target=stay, args=(url,), daemon=True)
        tab.start()
        assert opened.wait(60)
    tab.join(10)
    assert ends[0].startswith(b"data: ALIVE")


def test_without_a_visualizer_the_page_says_so(session) -> None:
    with served(Session(session.model, session.processor), page=True) as url:
        config = httpx.get(f"{url}/chat/config").json()
    (chatbot,) = [each["props"] for each in config["components"] if each["type"] == "chatbot"]
    assert "no visualizer" in chatbot["placeholder"]
    assert [example["text"] for example in chatbot["examples"]] == ["What color is the object?"]
    labels = {each["props"].get("label"): each["props"].get("visible") for each in config["components"]}
    assert (labels["Temperature"], labels["Guidance"], labels["Images"]) == (True, False, False)
