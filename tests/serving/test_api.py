"""The contract of the HTTP API, as a table: what clients send, the status, and what comes back."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from PIL import Image, ImageDraw
from serving_parts import data_url, error_of, file_of, image_of, served

import metamorph
from metamorph.inference import SamplerSettings, Sampling
from metamorph.serving.limits import Limits


HALF = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
JSON = {"content-type": "application/json"}
DRAW, ASK = "draw a large red circle", "what color is the object?"
FAST = {"num_inference_steps": 2, "seed": 5}
LIMITS = Limits(max_images=3, max_pixels=64 * 64 * 2)


def circle(color: str = "red") -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((12, 12, 52, 52), fill=color)
    return image


@pytest.fixture(scope="module")
def session() -> metamorph.inference.Session:
    return metamorph.load("mini", "mini", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def clients(session) -> Iterator["Clients"]:
    with served(session, LIMITS) as url, httpx.Client(base_url=url, timeout=120) as http:
        yield Clients(http, openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0))


@dataclass
class Clients:
    """Each method sends one request."""

    http: httpx.Client
    openai: openai.OpenAI

    def chat(self, content: Any = "how are you?", messages: list | None = None, **fields: Any) -> Any:
        """A message of OpenAI's client, its choice's and completion's fields with it."""
        messages = messages or [{"role": "user", "content": content}]
        return self.openai.chat.completions.create(model="mini", messages=messages, **split(fields, "chat/completions"))

    def stream(self, content: Any = "how are you?", **fields: Any) -> dict[str, Any]:
        """What the chunks of a stream join to."""
        joined: dict[str, Any] = {"content": "", "parts": [], "images": [], "reasons": [], "usage": None, "chunks": 0}
        for chunk in self.chat(content, stream=True, **fields):
            joined["chunks"] += 1
            joined["usage"] = chunk.usage or joined["usage"]
            for choice in chunk.choices:
                delta = choice.delta
                if isinstance(delta.content, list):
                    joined["parts"] += delta.content
                else:
                    joined["content"] += delta.content or ""
                joined["images"] += getattr(delta, "images", None) or []
                joined["reasons"] += [choice.finish_reason] if choice.finish_reason else []
        return joined

    def generate(self, prompt: str = DRAW, **fields: Any) -> Any:
        return self.openai.images.generate(model="mini", prompt=prompt, **split(fields, "images"))

    def edit(self, image: Any = None, prompt: str = "make it blue", **fields: Any) -> Any:
        image = ("a.png", file_of(circle())) if image is None else image
        return self.openai.images.edit(model="mini", image=image, prompt=prompt, **split(fields, "images"))

    def respond(self, given: Any = "how are you?", **fields: Any) -> Any:
        return self.openai.responses.create(model="mini", input=given, **split(fields, "responses"))

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return self.http.post(f"/v1/{path}", **({"json": body} if body is not None else {}), **options)


OWN = {"seed", "guidance_scale", "num_inference_steps", "content_format", "unknown", "top_k"}


def split(fields: dict[str, Any], path: str) -> dict[str, Any]:
    """Fields that OpenAI's client does not know go into `extra_body`."""
    known = {"seed"} if path == "chat/completions" else set()
    own = {name: fields.pop(name) for name in list(fields) if name in OWN - known}
    return {**fields, "extra_body": own} if own else fields


def image_part(image: Image.Image | None = None) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(image or circle())}}


def question(image: Image.Image | None = None) -> list[dict]:
    return [image_part(image), {"type": "text", "text": ASK}]


def user(content: Any) -> dict:
    return {"role": "user", "content": content}


def chat_body(content: Any = "hello", **fields: Any) -> dict:
    return {"messages": [user(content)], **fields}


def vlmeval_body(dataset: str | None = None, **image_fields: str) -> dict:
    """The JSON of a question about an image in open-compass/VLMEvalKit, `vlmeval/api/gpt.py` and `lmdeploy.py`."""
    url = {"url": data_url(circle(), "jpeg"), **image_fields}
    body = chat_body([{"type": "image_url", "image_url": url}, {"type": "text", "text": ASK}])
    body |= {"model": "mini", "n": 1, "temperature": 0, "max_tokens": 512}
    return body | ({"dataset": dataset} if dataset else {})


def with_url(url: str) -> dict:
    return chat_body([{"type": "image_url", "image_url": {"url": url}}])


def history(**answer: Any) -> list[dict]:
    return [user(DRAW), {"role": "assistant", **answer}, user("what color is it?")]


def words(completion: Any) -> str:
    return completion.choices[0].message.content


def pixels(url: str) -> bytes:
    return image_of(url).tobytes()


def drawn(completion: Any, choice: int = 0) -> list[bytes]:
    return [pixels(image["image_url"]["url"]) for image in completion.choices[choice].message.images]


def is_one_drawing(completion: Any) -> bool:
    (image,) = completion.choices[0].message.images
    assert (image["type"], image["index"]) == ("image_url", 0)
    return (
        image["image_url"]["url"].startswith("data:image/png;base64,") and completion.choices[0].message.content == ""
    )


def items(response: Any) -> list[str]:
    return [item.type for item in response.output]


@dataclass(frozen=True)
class Case:
    dialect: str
    name: str
    send: Callable[[Clients], Any]
    status: int = 200
    check: Callable[[Any], object] = lambda answer: True
    """Returns something true. Gets what OpenAI's client returns; of an error its `param`; else httpx' response."""


CHAT, IMAGES, RESPONSES, REST = "chat completions", "images", "responses", "others"
CASES = [
    Case(CHAT, "text", lambda c: c.chat(), check=lambda r: words(r) == "zero" and r.choices[0].finish_reason == "stop"),
    Case(CHAT, "text, streamed", lambda c: c.stream(), check=lambda s: s["content"] == "zero" and s["usage"] is None),
    Case(
        CHAT,
        "text, streamed with usage",
        lambda c: c.stream(stream_options={"include_usage": True}),
        check=lambda s: (s["usage"].completion_tokens, s["reasons"]) == (2, ["stop"]),
    ),
    Case(CHAT, "image in", lambda c: c.chat(question()), check=lambda r: words(r) == "red"),
    Case(CHAT, "image in, streamed", lambda c: c.stream(question()), check=lambda s: s["content"] == "red"),
    Case(
        CHAT,
        "image in, as JPEG, text first",
        lambda c: c.chat(
            [{"type": "text", "text": ASK}, {"type": "image_url", "image_url": data_url(circle(), "jpeg")}]
        ),
        check=lambda r: r.usage.prompt_tokens_details.image_tokens == 16,
    ),
    Case(CHAT, "image out", lambda c: c.chat(DRAW, **FAST), check=is_one_drawing),
    Case(
        CHAT,
        "image out, streamed: one delta",
        lambda c: c.stream(DRAW, **FAST),
        check=lambda s: [image["index"] for image in s["images"]] == [0] and s["chunks"] == 2,
    ),
    Case(
        CHAT,
        "image out, as parts",
        lambda c: c.chat(DRAW, content_format="parts", **FAST),
        check=lambda r: [part["type"] for part in words(r)] == ["image_url"],
    ),
    Case(
        CHAT,
        "image out, as parts, streamed",
        lambda c: c.stream(DRAW, content_format="parts", **FAST),
        check=lambda s: [part["type"] for part in s["parts"]] == ["image_url"] and not s["images"],
    ),
    Case(
        CHAT,
        'modalities ["text"]: no image',
        lambda c: c.chat(DRAW, modalities=["text"]),
        check=lambda r: (
            not hasattr(r.choices[0].message, "images") and r.usage.completion_tokens_details.image_tokens == 0
        ),
    ),
    Case(
        CHAT,
        'modalities ["image"]: one image',
        lambda c: c.chat("how are you?", modalities=["image"], **FAST),
        check=lambda r: is_one_drawing(r) and r.choices[0].finish_reason == "stop" and r.usage.completion_tokens == 17,
    ),
    Case(
        CHAT,
        "n=2: two drawings",
        lambda c: c.chat(DRAW, n=2, **FAST),
        check=lambda r: drawn(r, 0) != drawn(r, 1) and r.usage.completion_tokens_details.image_tokens == 32,
    ),
    Case(
        CHAT,
        "earlier answer's image, in images",
        lambda c: c.chat(messages=history(content="", images=[image_part()])),
        check=lambda r: words(r) == "red" and r.usage.prompt_tokens_details.image_tokens == 16,
    ),
    Case(
        CHAT,
        "earlier answer's image, in parts",
        lambda c: c.chat(messages=history(content=[image_part(circle("blue"))])),
        check=lambda r: words(r) == "blue",
    ),
    Case(CHAT, "stop", lambda c: c.chat(stop=["ro"]), check=lambda r: words(r) == "ze"),
    Case(CHAT, "max_tokens", lambda c: c.chat(max_tokens=1), check=lambda r: r.choices[0].finish_reason == "length"),
    Case(
        CHAT,
        "max_completion_tokens precedes it",
        lambda c: c.chat(max_tokens=50, max_completion_tokens=1),
        check=lambda r: r.usage.completion_tokens == 1,
    ),
    Case(
        CHAT,
        "unknown fields are ignored",
        lambda c: c.chat(unknown=1, logit_bias={}, user="me"),
        check=lambda r: words(r) == "zero",
    ),
    Case(
        CHAT,
        "as VLMEvalKit's GPT4V asks",
        lambda c: c.post("chat/completions", vlmeval_body(detail="low")),
        check=lambda r: r.json()["choices"][0]["message"]["content"] == "red",
    ),
    Case(
        CHAT,
        "as VLMEvalKit's LMDeployAPI asks",
        lambda c: c.post("chat/completions", vlmeval_body(dataset="MMBench_DEV_EN")),
        check=lambda r: r.json()["choices"][0]["message"]["content"] == "red",
    ),
    Case(
        CHAT,
        "null is the default",
        lambda c: c.post("chat/completions", chat_body(n=None, stop=None, temperature=None, modalities=None)),
    ),
    Case(
        CHAT,
        "roles system and developer",
        lambda c: c.chat(messages=[{"role": "developer", "content": "Be brief."}, user("how are you?")]),
        check=words,
    ),
    Case(
        CHAT,
        "a literal <image> is text",
        lambda c: c.chat("what is <image>?"),
        check=lambda r: r.usage.prompt_tokens_details.image_tokens == 0,
    ),
    Case(CHAT, "no messages", lambda c: c.post("chat/completions", {}), 400, lambda p: p == "messages"),
    Case(
        CHAT,
        "unknown role",
        lambda c: c.chat(messages=[{"role": "tool", "content": "a"}]),
        400,
        lambda p: p == "messages[0].role",
    ),
    Case(CHAT, "unknown part", lambda c: c.chat([{"type": "video"}]), 400, lambda p: p == "messages[0].content[0]"),
    Case(CHAT, "temperature 3", lambda c: c.chat(temperature=3), 400, lambda p: p == "temperature"),
    Case(CHAT, "top_p 0", lambda c: c.chat(top_p=0), 400, lambda p: p == "top_p"),
    Case(CHAT, "n=0", lambda c: c.chat(n=0), 400, lambda p: p == "n"),
    Case(CHAT, "five stops", lambda c: c.chat(stop=list("abcde")), 400, lambda p: p == "stop"),
    Case(CHAT, "modality audio", lambda c: c.chat(modalities=["audio"]), 400, lambda p: p == "modalities[0]"),
    Case(CHAT, "more max_tokens than the context", lambda c: c.chat(max_tokens=1024), 400),
    Case(CHAT, "more text than the context", lambda c: c.chat("red " * 2000), 400),
    Case(
        CHAT,
        "max_tokens without room for the image",
        lambda c: c.chat(modalities=["image"], max_tokens=5),
        400,
        lambda p: p == "max_tokens",
    ),
    Case(CHAT, "four images of three", lambda c: c.chat([image_part(Image.new("RGB", (8, 8)))] * 4), 400),
    Case(CHAT, "too many pixels", lambda c: c.chat([image_part(), image_part(), image_part()]), 400),
    Case(
        CHAT,
        "malformed image",
        lambda c: c.post("chat/completions", with_url("data:image/png;base64,aGVsbG8=")),
        400,
        lambda p: p == "messages[0].content[0]",
    ),
    Case(CHAT, "malformed base64", lambda c: c.post("chat/completions", with_url("data:image/png;base64,%%%")), 400),
    Case(CHAT, "file: URL", lambda c: c.post("chat/completions", with_url("file:///etc/passwd")), 400),
    Case(CHAT, "path of the server", lambda c: c.post("chat/completions", with_url("/etc/passwd")), 400),
    Case(CHAT, "remote URL", lambda c: c.post("chat/completions", with_url("https://example.org/a.png")), 400),
    Case(
        CHAT, "another model", lambda c: c.post("chat/completions", chat_body(model="x")), 404, lambda p: p == "model"
    ),
    Case(
        CHAT,
        "not JSON",
        lambda c: c.post("chat/completions", content=b"{", headers=JSON),
        400,
    ),
    Case(CHAT, "JSON nested too deep", lambda c: c.post("chat/completions", content=b"[" * 99_999, headers=JSON), 400),
    Case(CHAT, "half a character", lambda c: c.post("chat/completions", content=HALF, headers=JSON), 400),
    Case(CHAT, "no content type", lambda c: c.post("chat/completions", content=b'{"messages": []}'), 400),
    Case(
        IMAGES,
        "generation",
        lambda c: c.generate(**FAST),
        check=lambda r: (
            image_of(r.data[0].b64_json).format == "PNG" and r.usage.output_tokens_details.image_tokens == 16
        ),
    ),
    Case(
        IMAGES,
        "n=2, WebP, size as it is",
        lambda c: c.generate(n=2, size="64x64", output_format="webp", **FAST),
        check=lambda r: [image_of(image.b64_json).format for image in r.data] == ["WEBP", "WEBP"],
    ),
    Case(IMAGES, "size auto", lambda c: c.generate(size="auto", response_format="b64_json", **FAST)),
    Case(IMAGES, "edit", lambda c: c.edit(**FAST), check=lambda r: r.usage.input_tokens_details.image_tokens == 16),
    Case(
        IMAGES,
        "edit of two images",
        lambda c: c.edit([("a.png", file_of(circle())), ("b.jpg", file_of(circle("blue"), "jpeg"))], n=2, **FAST),
        check=lambda r: len(r.data) == 2 and r.usage.input_tokens_details.image_tokens == 32,
    ),
    Case(IMAGES, "another size", lambda c: c.generate(size="1024x1024"), 400, lambda p: p == "size"),
    Case(IMAGES, "as URLs", lambda c: c.generate(response_format="url"), 400, lambda p: p == "response_format"),
    Case(IMAGES, "n=11", lambda c: c.generate(n=11), 400, lambda p: p == "n"),
    Case(IMAGES, "streamed", lambda c: c.generate(stream=True), 400, lambda p: p == "stream"),
    Case(IMAGES, "empty prompt", lambda c: c.generate(""), 400, lambda p: p == "prompt"),
    Case(
        IMAGES,
        "edit without an image",
        lambda c: c.post("images/edits", data={"prompt": "a"}),
        400,
        lambda p: p == "image",
    ),
    Case(IMAGES, "edit of a malformed image", lambda c: c.edit(("a.png", b"hello")), 400, lambda p: p == "image[0]"),
    Case(IMAGES, "edit with a mask", lambda c: c.edit(mask=("m.png", file_of(circle()))), 400, lambda p: p == "mask"),
    Case(RESPONSES, "text", lambda c: c.respond(), check=lambda r: r.output_text == "zero" and items(r) == ["message"]),
    Case(
        RESPONSES,
        "image out",
        lambda c: c.respond(DRAW, **FAST),
        check=lambda r: items(r) == ["image_generation_call"] and image_of(r.output[0].result).size == (64, 64),
    ),
    Case(
        RESPONSES,
        "image in",
        lambda c: c.respond(
            [user([{"type": "input_image", "image_url": data_url(circle())}, {"type": "input_text", "text": ASK}])]
        ),
        check=lambda r: r.output_text == "red",
    ),
    Case(
        RESPONSES,
        "earlier items",
        lambda c: c.respond([user(DRAW), *c.respond(DRAW).to_dict()["output"], user("what color is it?")]),
        check=lambda r: r.output_text == "red" and r.usage.input_tokens_details.image_tokens == 16,
    ),
    Case(RESPONSES, "instructions", lambda c: c.respond(instructions="Be brief."), check=lambda r: r.output_text),
    Case(
        RESPONSES,
        "tool_choice none: no image",
        lambda c: c.respond(DRAW, tool_choice="none"),
        check=lambda r: "image_generation_call" not in items(r),
    ),
    Case(
        RESPONSES,
        "tool_choice image_generation: one image",
        lambda c: c.respond(tool_choice={"type": "image_generation"}, **FAST),
        check=lambda r: items(r) == ["image_generation_call"] and r.status == "completed",
    ),
    Case(
        RESPONSES,
        "max_output_tokens",
        lambda c: c.respond(max_output_tokens=1),
        check=lambda r: (r.status, r.incomplete_details.reason) == ("incomplete", "max_output_tokens"),
    ),
    Case(RESPONSES, "streamed", lambda c: c.respond(stream=True), 400, lambda p: p == "stream"),
    Case(
        RESPONSES,
        "previous_response_id",
        lambda c: c.respond(previous_response_id="r"),
        400,
        lambda p: p == "previous_response_id",
    ),
    Case(RESPONSES, "unknown item", lambda c: c.post("responses", {"input": [{"type": "reasoning"}]}), 400),
    Case(REST, "models", lambda c: c.openai.models.list(), check=lambda r: [model.id for model in r] == ["mini"]),
    Case(REST, "a model", lambda c: c.openai.models.retrieve("mini"), check=lambda r: r.id == "mini"),
    Case(REST, "another model", lambda c: c.openai.models.retrieve("gpt-4o"), 404),
    Case(REST, "health", lambda c: c.http.get("/health"), check=lambda r: r.json() == {"status": "ok"}),
    Case(
        REST,
        "metrics",
        lambda c: c.http.get("/metrics"),
        check=lambda r: all(
            name in r.text
            for name in (
                'metamorph_requests_total{endpoint="/v1/chat/completions",status="200"}',
                "metamorph_queue_length 0.0",
                "metamorph_request_seconds_bucket",
                'metamorph_tokens_total{kind="answer"}',
                "metamorph_images_total",
            )
        ),
    ),
    Case(REST, "unknown path", lambda c: c.post("embeddings", {}), 404),
    Case(REST, "GET of a POST", lambda c: c.http.get("/v1/responses"), 405),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.dialect}: {case.name}" for case in CASES])
def test_contract(case: Case, clients: Clients) -> None:
    try:
        answer = case.send(clients)
    except openai.APIStatusError as error:
        answer = error.response
    if isinstance(answer, httpx.Response) or hasattr(answer, "status_code"):
        assert answer.status_code == case.status, answer.text
        answer = answer if case.status == 200 else error_of(answer)["param"]
    else:
        assert case.status == 200
    assert case.status != 200 or case.check(answer)
    if case.status != 200 and case.check is not Case.check:
        assert case.check(answer), answer


def table() -> str:
    """The cases in Markdown, as in docs/serving.md."""
    rows = [f"| {case.dialect} | {case.name} | {case.status} |" for case in CASES]
    return "\n".join(["| dialect | request | status |", "| --- | --- | --- |", *rows])


def test_the_documentation_has_the_table() -> None:
    assert table() in (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_streamed_and_seeded_answers_are_those_of_the_session(session, clients: Clients) -> None:
    """Text and pixels: from Python, in one piece, in pieces, as the second of two choices, as another dialect."""
    settings = SamplerSettings(3.0, 2, 6)
    (image,) = session.reply(DRAW, settings=settings).images
    fields = {"num_inference_steps": 2, "temperature": 1.0}
    whole, two = clients.chat(DRAW, seed=6, **fields), clients.chat(DRAW, seed=5, n=2, **fields)
    streamed = clients.stream(DRAW, seed=6, **fields)
    generated = clients.generate(DRAW, seed=6, num_inference_steps=2)
    urls = [
        whole.choices[0].message.images[0]["image_url"]["url"],
        two.choices[1].message.images[0]["image_url"]["url"],
        streamed["images"][0]["image_url"]["url"],
        generated.data[0].b64_json,
    ]
    for url in urls:
        difference = torch.frombuffer(bytearray(pixels(url)), dtype=torch.uint8).int()
        difference -= torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()
        assert difference.abs().max() <= 1
    sampled = {"temperature": 2.0, "seed": 3, "max_tokens": 12, "modalities": ["text"]}
    sampling = Sampling(2.0, seed=3)
    expected = session.reply("hello", sampling=sampling, max_new_tokens=12, allow_images=False).text
    assert words(clients.chat("hello", **sampled)).strip() == expected
    assert clients.stream("hello", **sampled)["content"].strip() == expected
    assert words(clients.chat("hello", **{**sampled, "seed": 4})).strip() != expected
