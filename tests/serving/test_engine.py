"""Requests that share the model: as alone, in order, cancelled one by one, and refused when there are too many."""

import asyncio
import threading

import pytest
import torch

import metamorph
from metamorph.inference import Prompt, Reply, SamplerSettings, Sampling, Session
from metamorph.inference.draw import draw_each
from metamorph.models.sequence.conversations import ImagePart, TextPart
from metamorph.serving.batcher import Batcher, Closed, QueueFull
from metamorph.serving.engine import Engine


@pytest.fixture(scope="module")
def session() -> Session:
    return metamorph.load("mini", "mini", device="cpu", dtype=torch.float32)


async def collect(engine: Engine, prompt: Prompt, seed: int = 0) -> tuple[list, Reply]:
    *parts, reply = [part async for _, part in engine.submit([(prompt, SamplerSettings(1.0, 2, seed))])]
    return parts, reply


def test_answers_in_a_batch_are_those_alone(session) -> None:
    prompts = [
        Prompt("draw a red circle", draw=True),
        Prompt("draw a blue square"),
        Prompt("hello", allow_images=False, sampling=Sampling(5, seed=3), max_new_tokens=12),
        Prompt("draw a red circle"),
    ]

    async def together() -> list:
        return await asyncio.gather(*(collect(engine, prompt, seed) for seed, prompt in enumerate(prompts)))

    engine = Engine(session, max_wait_ms=200)
    batched = asyncio.run(together())
    engine.close()
    for seed, (prompt, (parts, reply)) in enumerate(zip(prompts, batched, strict=True)):
        alone = session.answer(prompt, SamplerSettings(1.0, 2, seed))
        assert (reply.text, reply.finish_reason, reply.num_images) == (
            alone.text,
            alone.finish_reason,
            alone.num_images,
        )
        assert "".join(part.text for part in parts if isinstance(part, TextPart)).strip() == alone.text
        drawn = [image for part in parts if isinstance(part, ImagePart) for image in part.images]
        assert [image.tobytes() for image in drawn] == [image.tobytes() for image in reply.images]
        for image, other in zip(drawn, alone.images, strict=True):
            pixels = [torch.frombuffer(bytearray(each.tobytes()), dtype=torch.uint8).int() for each in (image, other)]
            assert (pixels[0] - pixels[1]).abs().max() <= 1


def test_a_client_that_leaves_ends_its_answer(session) -> None:
    async def leave() -> None:
        prompt = Prompt("draw a red circle", draw=True, max_new_tokens=5000)
        pieces = aiter(engine.submit([(prompt, SamplerSettings())]))
        assert isinstance((await anext(pieces))[1], ImagePart)
        await pieces.aclose()
        await collect(engine, Prompt("hello", max_new_tokens=3))  # waits for the batch before it

    engine = Engine(session)
    asyncio.run(leave())
    engine.close()


def test_drawings_of_a_client_that_leaves_are_not_begun(session, monkeypatch) -> None:
    """Two images, which cannot share a batch: one is being drawn, the other waits."""
    begun, release = [], threading.Event()

    def slow_draw(*args, **options) -> list:
        begun.append(args)
        release.wait()
        return draw_each(*args, **options)

    async def leave() -> None:
        prompt = Prompt("draw a red circle", draw=True, max_new_tokens=session.processor.num_image_tokens + 1)
        answers = engine.submit([(prompt, SamplerSettings(scale, 2)) for scale in (1.0, 2.0)])
        while not begun or engine.num_running:
            await asyncio.sleep(0.01)
        answers.cancel()

    monkeypatch.setattr("metamorph.serving.engine.draw_each", slow_draw)
    engine = Engine(session)
    asyncio.run(leave())
    release.set()
    engine.close()
    assert len(begun) == 1


def test_too_many_requests_and_late_ones_are_refused() -> None:
    started, release = threading.Event(), threading.Event()

    def work(items: list[int]) -> list[int]:
        started.set()
        release.wait()
        return [2 * item for item in items]

    batcher: Batcher[int, int] = Batcher("test", work, lambda item: 0, max_size=1, max_waiting=2)
    first = batcher.submit(1)
    started.wait()
    second, third = batcher.submit(2), batcher.submit(3)
    with pytest.raises(QueueFull):
        batcher.submit(4)
    assert second.cancel()
    release.set()
    batcher.close()
    assert (first.result(), third.result()) == (2, 6)
    with pytest.raises(Closed):
        batcher.submit(5)


def test_a_failure_reaches_those_who_wait_and_no_one_else(caplog) -> None:
    batcher: Batcher[int, float] = Batcher("test", lambda items: [1 / item for item in items], lambda i: i, max_size=4)
    bad, good = batcher.submit(0), batcher.submit(2)
    assert good.result() == 0.5
    with pytest.raises(ZeroDivisionError):
        bad.result()
    batcher.close()
