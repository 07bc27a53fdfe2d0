"""The web page of the server: a chat with images, made with Gradio, as one more route of the app.

The conversation is kept on the server. A browser sends the text and the uploads of a turn, never what was said before.
"""

from __future__ import annotations

import asyncio
import mimetypes
import os
import tempfile
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from gradio.processing_utils import save_pil_to_cache
from pydantic import Field, field_validator
from starlette.middleware import Middleware
from starlette.routing import Mount

from metamorph.inference.draw import SamplerSettings
from metamorph.inference.prompt import Prompt
from metamorph.inference.reply import Reply
from metamorph.inference.sampling import MAX_SEED
from metamorph.inference.streaming import Part
from metamorph.miniature.world.render import render
from metamorph.miniature.world.scenes import Scene, SceneObject
from metamorph.models.sequence.conversations import ImagePart, TextPart
from metamorph.serving.batcher import Closed, QueueFull
from metamorph.serving.errors import ApiError, as_api_error
from metamorph.serving.page_guard import PageGuard
from metamorph.serving.request_images import RequestImages
from metamorph.serving.service import Answering, Service


PATH = "/chat"
MAX_DRAWINGS = 4
_KEEP_FILES = 24 * 3600
_EXAMPLES = (
    ("Chat on an image", "What color is the object?", True),
    ("Generation", "Draw a small blue square in the top left", False),
    ("Visual thinking", "Draw the color of grass as a circle", False),
    ("Transformation", "Make the circle large", True),
)
"""A prompt for each mode, and whether it has the example image. The mini model can answer them, too."""
_CSS = """
.fillable { max-width: 56rem !important; padding: 1rem !important; }
.fillable > .wrap, .contain { width: 100%; }
.placeholder { padding: 0 1rem; text-align: center; }
.examples { grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)) !important; }
.example { padding: 0.6rem 1rem !important; }
.message .image-frame img { width: 14rem; max-width: 100%; object-fit: contain; border-radius: 0.5rem; }
.message-wrap [aria-label="Share"] { display: none; } /* it would upload the image to the Hub */
"""


@dataclass
class Turn:
    """What a user sent, and its answer as far as it is written."""

    text: str
    files: list[str]
    """Uploaded images and videos, in Gradio's folder."""
    parts: list[Part] = field(default_factory=list)
    """The answer as the model wrote it: text, and images as visual tokens."""
    drawings: list[list[str]] = field(default_factory=list)
    """Files of the drawings of each image of the answer."""

    def add(self, part: Part, drawings: list[str]) -> None:
        """Append a piece of the answer."""
        if isinstance(part, ImagePart):
            self.parts.append(replace(part, images=()))
            self.drawings.append(drawings)
        elif self.parts and isinstance(last := self.parts[-1], TextPart):
            self.parts[-1] = TextPart(last.text + part.text)
        else:
            self.parts.append(part)

    def messages(self) -> list[dict[str, Any]]:
        """As Gradio shows it."""
        answer: list[Any] = []
        drawings = iter(self.drawings)
        for part in self.parts:
            answer += [part.text] if isinstance(part, TextPart) else [{"path": file} for file in next(drawings)]
        asked = [{"path": file} for file in self.files] + ([self.text] if self.text else [])
        return [{"role": "user", "content": asked}, *([{"role": "assistant", "content": answer}] if answer else [])]


@dataclass
class Conversation:
    """The turns of one browser tab."""

    turns: list[Turn] = field(default_factory=list)

    def messages(self) -> list[dict[str, Any]]:
        """As Gradio shows it."""
        return [message for turn in self.turns for message in turn.messages()]

    async def prompt(self, images: RequestImages) -> list[dict[str, Any]]:
        """As the model reads it, up to the last turn. Images that the model wrote are visual tokens, not encoded again.

        Turns that were stopped before their answer began are left out.
        """
        messages: list[dict[str, Any]] = []
        *earlier, last = self.turns
        for turn in [*(turn for turn in earlier if turn.parts), last]:
            content: list[Any] = []
            for file in turn.files:
                content += [{"type": "image", "image": image} for image in await _open(file, images)]
                content.append(TextPart("\n"))
            messages.append({"role": "user", "content": [*content, TextPart(turn.text)]})
            if turn is not last:
                messages.append({"role": "assistant", "content": list(turn.parts)})
        return messages


class PageSettings(Answering):
    """The controls of the page."""

    num_images: int = Field(1, ge=1, le=MAX_DRAWINGS)
    """Drawings of each image."""

    @field_validator("seed", mode="before")
    @classmethod
    def _negative_is_random(cls, seed: int) -> int | None:
        if seed > MAX_SEED:
            raise ApiError(f"the seed is more than {MAX_SEED}", param="seed")
        return None if seed < 0 else seed

    def settings(self, seed: int) -> SamplerSettings:
        """How an answer's images are drawn."""
        return replace(super().settings(seed), num_images=self.num_images)


async def answer_turn(
    service: Service, conversation: Conversation, settings: PageSettings
) -> AsyncGenerator[None, None]:
    """Write the answer to the last turn into the conversation; yields after each piece. Closing it ends the answer.

    Errors are those of `Service.submit`, or an `ApiError` about an upload.
    """
    turn = conversation.turns[-1]
    images = service.images()
    prompt = Prompt(await conversation.prompt(images), allow_images=service.engine.can_draw)
    answers = await service.submit(prompt, settings)
    try:
        async for _, piece in answers:
            if isinstance(piece, Reply):
                service.account([piece], images.num_images)
                continue
            drawn = piece.images if isinstance(piece, ImagePart) else ()
            files = [
                await asyncio.to_thread(save_pil_to_cache, image, files_folder().name, format="png") for image in drawn
            ]
            turn.add(piece, files)
            yield
    finally:
        answers.cancel()


@cache
def files_folder() -> tempfile.TemporaryDirectory[str]:
    """The folder of uploads and drawings, which is deleted when the process ends. From now on Gradio uses it.

    Gradio's routes read all that is in its folder, which by default all programs of a machine share.
    """
    folder = tempfile.TemporaryDirectory(prefix="metamorph-page-")
    os.environ["GRADIO_TEMP_DIR"] = os.environ["GRADIO_EXAMPLES_CACHE"] = folder.name
    return folder


def mount_page(app: FastAPI) -> None:
    """Add the page to an app of `create_app`, at `/chat`; `/` leads there."""
    service: Service = app.state.service
    files_folder()
    page = build_page(service)
    gr.mount_gradio_app(
        app,
        page,
        PATH,
        footer_links=[],
        run_history=False,
        app_kwargs={"middleware": [Middleware(PageGuard)]},
        show_error=False,
        root_path=PATH,  # otherwise addresses of files lack it
        max_file_size=service.limits.max_body,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=gr.themes.Default(
            primary_hue="indigo",
            font=["system-ui", "sans-serif"],  # by default fonts of a web service
            font_mono=["ui-monospace", "monospace"],
        ),
        css=_CSS,
    )
    page.has_launched = True  # without it, Gradio takes any file of the server for an upload
    app.state.page = cast(Mount, app.routes[-1]).app

    @app.get("/", include_in_schema=False)
    async def show_page() -> RedirectResponse:
        """Lead to the page."""
        return RedirectResponse(PATH)


def build_page(service: Service) -> gr.Blocks:
    """The page."""
    examples = _examples(service.engine.can_draw)
    asked = [(example["text"], tuple(example["files"])) for example in examples]  # Gradio changes its list

    def begin(message: dict[str, Any], conversation: Conversation) -> tuple[Any, ...]:
        text, files = message["text"].strip(), message["files"]
        if not (text or files):
            raise _refusal("Write a message, or attach a file.")
        return ask(Turn(text, files), conversation)

    def begin_example(chosen: gr.SelectData, conversation: Conversation) -> tuple[Any, ...]:
        text, files = asked[chosen.index]
        return ask(Turn(text, list(files)), conversation)

    def retry(conversation: Conversation) -> tuple[Any, ...]:
        turn = _pop(conversation)
        return ask(Turn(turn.text, turn.files), conversation)

    def undo(conversation: Conversation) -> tuple[Any, ...]:
        turn = _pop(conversation)
        return _ready(turn), conversation.messages(), conversation

    def ask(turn: Turn, conversation: Conversation) -> tuple[Any, ...]:
        conversation.turns.append(turn)
        busy = gr.MultimodalTextbox(value=None, interactive=False, submit_btn=False, stop_btn=True)
        return busy, conversation.messages(), conversation

    async def answer(conversation: Conversation, *values: Any) -> AsyncGenerator[tuple[Any, ...], None]:
        try:
            settings = PageSettings(**dict(zip(names, values, strict=True)))
            async with aclosing(answer_turn(service, conversation, settings)) as pieces:
                async for _ in pieces:
                    yield gr.skip(), conversation.messages(), conversation
        except (ApiError, QueueFull, Closed) as error:
            turn = _pop(conversation)
            yield _ready(turn), conversation.messages(), conversation
            gr.Warning(str(as_api_error(error)), title="Not answered")

    with gr.Blocks(
        title=f"{service.model_name} · MetaMorph",
        analytics_enabled=False,
        fill_height=True,
        delete_cache=(3600, _KEEP_FILES),
    ) as page:
        gr.Markdown(f"## MetaMorph · {service.model_name}")
        chatbot = gr.Chatbot(
            show_label=False,
            scale=1,
            buttons=["copy"],
            feedback_options=None,
            allow_tags=False,
            render_markdown=False,  # Markdown could name images of other hosts, which the browser would request
            placeholder=_placeholder(service.engine.can_draw),
            examples=examples,
        )
        textbox = gr.MultimodalTextbox(
            show_label=False,
            placeholder="Ask, or describe an image",
            sources=["upload"],
            file_types=["image", "video"],
            file_count="multiple",
            max_plain_text_length=100_000,
            autofocus=True,
        )
        controls = _controls(service.engine.can_draw)
        names = list(controls)
        conversation = gr.State(Conversation())
        shown = [textbox, chatbot, conversation]
        quick: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
        # The engine has a queue of its own, which all clients share.
        slow: dict[str, Any] = {
            "concurrency_limit": None,
            "api_visibility": "private",
            "show_progress": "minimal",
            "show_progress_on": chatbot,
        }
        answers = []
        for event in (
            textbox.submit(begin, [textbox, conversation], shown, **quick),
            chatbot.example_select(begin_example, conversation, shown, **quick),
            chatbot.retry(retry, conversation, shown, **quick),
        ):
            inputs = [conversation, *controls.values()]
            answers.append(event.success(answer, inputs, shown, **slow))
            answers[-1].then(_ready, None, textbox, **quick)
        textbox.stop(None, None, None, cancels=answers, api_visibility="private")
        chatbot.undo(undo, conversation, shown, **quick)
        chatbot.clear(Conversation, None, conversation, cancels=answers, **quick)
    return page


def _ready(turn: Turn | None = None) -> dict[str, Any]:
    """The text box for the next message, with what was sent in `turn`."""
    value = {} if turn is None else {"value": {"text": turn.text, "files": turn.files}}
    return gr.update(interactive=True, submit_btn=True, stop_btn=False, **value)


def _pop(conversation: Conversation) -> Turn:
    if not conversation.turns:
        raise _refusal("The conversation is empty.")
    return conversation.turns.pop()


def _refusal(message: str) -> gr.Error:
    """An error for the user, without a traceback."""
    return gr.Error(message, duration=5, print_exception=False)


def _controls(can_draw: bool) -> dict[str, Any]:
    """A control for each setting, by name."""
    with gr.Accordion("Settings", open=False), gr.Row():
        return {
            "temperature": gr.Slider(0, 2, 0, step=0.1, label="Temperature"),
            "seed": gr.Number(-1, label="Seed (-1: another one each time)", precision=0, minimum=-1),
            "guidance_scale": gr.Slider(1, 10, 3, step=0.5, label="Guidance", visible=can_draw),
            "num_images": gr.Slider(1, MAX_DRAWINGS, 1, step=1, label="Images", visible=can_draw),
        }


def _placeholder(can_draw: bool) -> str:
    draws = "Ask about an image or a video, or ask for an image."
    reads = "Ask about an image or a video. This server has no visualizer, so it answers in text."
    what = draws if can_draw else reads
    return f"### What would you like to see?\n{what}\n\nAttach files with the clip, or try an example:"


def _examples(can_draw: bool) -> list[dict[str, Any]]:
    """An example of each mode."""
    scene = Scene((SceneObject("circle", "red", "small", "top left"),))
    folder = Path(files_folder().name, "examples")
    folder.mkdir(exist_ok=True)
    render(scene).save(file := folder / "circle.png")
    gr.set_static_paths([folder])  # unlike others, its files are not deleted after a day
    return [
        {"display_text": f"{mode}: {text}", "text": text, "files": [str(file)] if has_image else []}
        for mode, text, has_image in _EXAMPLES
        if can_draw or mode == "Chat on an image"
    ]


async def _open(file: str, images: RequestImages) -> list[Any]:
    """The image of an upload, or the frames of a video."""
    if (mimetypes.guess_type(file)[0] or "").startswith("video/"):
        return list(await images.open_video(Path(file)))
    name = Path(file).name
    try:
        content = await asyncio.to_thread(Path(file).read_bytes)
    except FileNotFoundError as error:
        raise ApiError(f"{name} was deleted after a day: begin a new conversation", param=name) from error
    return [await images.open_upload(content, name)]
