"""Streamed = not streamed, batched = alone, a turn with kept cache = recomputed, and what ends an answer."""

import threading

import pytest
import torch
from PIL import Image

import metamorph
from metamorph.inference import Chat, Prompt, SamplerSettings, Sampling, Session, reply_to
from metamorph.inference.sampling import RowSampler
from metamorph.inference.streaming import AnswerDecoder
from metamorph.models.sequence.conversations import ImagePart, TextPart


FAST = SamplerSettings(num_inference_steps=1)


@pytest.fixture(scope="module")
def session() -> Session:
    return metamorph.load("mini", "mini", device="cpu", dtype=torch.float32)


def texts(parts) -> str:
    return "".join(part.text for part in parts if isinstance(part, TextPart))


def test_a_streamed_answer_is_the_answer(session) -> None:
    prompt = "Generate an image of a red circle"
    whole = session.reply(prompt, settings=FAST)
    parts = list(session.stream(prompt, settings=FAST))
    assert texts(parts) == texts(whole.parts)
    (streamed,) = (part for part in parts if isinstance(part, ImagePart))
    torch.testing.assert_close(streamed.visual_tokens, whole.visual_tokens[0])
    assert [image.tobytes() for image in streamed.images] == [image.tobytes() for image in whole.images]


def test_an_answer_ends_when_its_stream_is_closed(session) -> None:
    stream = session.stream("draw a red circle", draw=True, settings=FAST)
    assert isinstance(next(stream), ImagePart)
    stream.close()
    assert not any(thread.name.startswith("metamorph-answer") for thread in threading.enumerate())


def test_an_error_reaches_who_reads_the_stream(session) -> None:
    with pytest.raises(ValueError, match="the prompt begins an image"):
        list(session.stream("draw", draw=True, max_new_tokens=3))


@pytest.mark.parametrize("text", ["Grüße 🎉 – naïve café", " two  spaces", "日本語のテキスト"])
def test_pieces_of_text_join_to_what_is_decoded_at_once(session, text: str) -> None:
    """Also if a character takes several tokens."""
    ids = session.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    decoder = AnswerDecoder(session.processor, limit=1000)
    for token in ids:
        decoder.push(token, None)
    decoder.finish("stop")
    assert texts(decoder.parts) == session.processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "\ufffd" not in texts(decoder.parts)


def test_a_stop_string_over_several_tokens_ends_the_answer(session) -> None:
    pieces: list[str] = []
    decoder = AnswerDecoder(session.processor, 1000, ("END!",), on_part=lambda part: pieces.append(part.text))
    for token in session.processor.tokenizer("one EN two END! three", add_special_tokens=False)["input_ids"]:
        decoder.push(token, None)
    assert ("".join(pieces), decoder.finish_reason) == ("one EN two ", "stop")


def test_rows_of_a_batch_have_their_own_limits_and_samples(session) -> None:
    """Limit, sampling, seed, and whether images are allowed: as alone."""
    hot = {"temperature": 1.5, "top_p": 0.9, "top_k": 40}
    prompts = [
        Prompt("draw a red circle", sampling=Sampling(**hot, seed=1)),
        Prompt("draw a red circle", max_new_tokens=9),  # no room for an image
        Prompt("draw a red circle", allow_images=False, max_new_tokens=12),
        Prompt("hello", allow_images=False, sampling=Sampling(temperature=5, seed=2), max_new_tokens=20),
        Prompt("hello", allow_images=False, sampling=Sampling(temperature=5, seed=3), max_new_tokens=20),
        Prompt("draw a red circle"),
    ]
    together = reply_to(session.model, session.processor, prompts)
    for prompt, reply in zip(prompts, together, strict=True):
        (alone,) = reply_to(session.model, session.processor, [prompt])
        assert (reply.text, reply.finish_reason, reply.num_tokens) == (
            alone.text,
            alone.finish_reason,
            alone.num_tokens,
        )
        torch.testing.assert_close(reply.visual_tokens, alone.visual_tokens, atol=1e-4, rtol=1e-4)
    assert [reply.num_images for reply in together][1:3] == [0, 0]
    assert together[5].num_images == 1
    assert together[3].text != together[4].text
    assert together[1].num_tokens <= 9


def test_samples_follow_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(20_000, 4)
    rows = [Sampling(temperature=2.0, top_k=3, seed=seed) for seed in range(len(logits))]
    chosen = RowSampler(rows, logits.device)(torch.zeros(len(rows), 1), logits).argmax(dim=-1)
    expected = (torch.tensor([2.0, 1.0, 0.0]) / 2).softmax(dim=0)
    torch.testing.assert_close(chosen.bincount(minlength=3) / len(rows), expected, atol=0.02, rtol=0)
    nucleus = [Sampling(temperature=1.0, top_p=0.5, seed=seed) for seed in range(100)]  # the first token has 64 %
    assert RowSampler(nucleus, logits.device)(torch.zeros(100, 1), logits[:100]).argmax(dim=-1).eq(0).all()


def test_a_second_turn_computes_only_its_own_tokens(session) -> None:
    """Earlier text, a given image and a generated one stay in the cache, and the answer is that of a new session."""
    positions: list[int] = []
    hook = session.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    white = Image.new("RGB", (64, 64), "white")
    chat = session.chat()
    try:
        first = chat.reply("<image>\ndraw a red circle", [white], settings=FAST, draw=True)
        length = first.num_prompt_tokens + first.num_tokens
        positions.clear()
        second = chat.reply("what color is the object?")
    finally:
        hook.remove()
    assert sum(positions) <= second.num_prompt_tokens + second.num_tokens - length + 2
    assert (first.num_images, len(chat.messages)) == (1, 4)
    (again,) = reply_to(session.model, session.processor, [Prompt(chat.messages[:-1])])
    assert second.text == again.text
    assert (second.num_prompt_tokens, second.num_tokens) == (again.num_prompt_tokens, again.num_tokens)


def test_a_turn_can_be_answered_again_and_edited(session) -> None:
    """What the cache holds of a replaced turn is not used: neither other text nor another image with the same ids."""
    chat = session.chat()
    colors = []
    for color in ("red", "blue"):
        chat.reset()
        chat.reply("<image>\nwhat color is the object?", [_square(color)])
        colors.append(chat.reply("and what color is it?").text)
    for color, cached in zip(("red", "blue"), colors, strict=True):
        fresh = Chat(session)
        fresh.reply("<image>\nwhat color is the object?", [_square(color)])
        assert fresh.reply("and what color is it?").text == cached
    before = [message["role"] for message in chat.messages]
    hot = chat.retry(sampling=Sampling(temperature=3.0, seed=4), max_new_tokens=5)
    assert [message["role"] for message in chat.messages] == before
    assert texts(chat.messages[-1]["content"]).strip() == hot.text


def test_a_chat_can_be_stopped(session) -> None:
    chat = session.chat()
    stream = chat.stream("draw a red circle", draw=True, settings=FAST, max_new_tokens=300)
    next(stream)
    chat.stop()
    for _ in stream:
        pass
    assert chat.messages[-1]["role"] == "assistant"
    assert chat.reply("hello").text == _recomputed(session, chat)


def test_an_answer_that_is_stopped_before_it_begins_leaves_no_turn(session) -> None:
    """`stop` may come before the thread of the stream; a retry then keeps the answer that there is."""
    chat = session.chat()
    stream = chat.stream("hello")
    chat.stop()
    assert list(stream) == []
    assert chat.messages == []
    chat.reply("hello", max_new_tokens=3)
    before = chat.messages
    cancelled = threading.Event()
    cancelled.set()
    assert chat.retry(cancelled=cancelled).finish_reason == "cancelled"
    assert chat.messages == before


def test_answers_end_with_the_context(session, monkeypatch) -> None:
    """Each row by its own length; rows that have ended stay within the positions, too."""
    monkeypatch.setattr(session.model.config.get_text_config(), "max_position_embeddings", 64)
    positions: list[int] = []
    hook = session.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    words = [Prompt(text, sampling=Sampling(50, seed=1), allow_images=False) for text in ("hello", "hello " * 6)]
    try:
        replies = reply_to(session.model, session.processor, words, max_new_tokens=500)
    finally:
        hook.remove()
    assert [(each.num_prompt_tokens + each.num_tokens, each.finish_reason) for each in replies] == [(64, "length")] * 2
    assert max(positions) == 63
    for prompt, reply in zip(words, replies, strict=True):
        assert session.answer(prompt, max_new_tokens=500).text == reply.text
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, which leaves 0 of 64 for the answer"):
        session.chat().reply("hello " * 60)


def test_a_prompt_that_does_not_fit_is_found_before_others_are_answered(session) -> None:
    answered: list[int] = []
    prompts = [Prompt("hello"), Prompt("hello " * 1100), Prompt("hello")]
    with pytest.raises(ValueError, match=r"prompt 2 has \d+ tokens"):
        reply_to(session.model, session.processor, prompts, batch_size=1, on_progress=answered.append)
    assert not answered
    with pytest.raises(ValueError, match="and its image takes 17: shorten it"):
        session.reply("hello " * 1000, draw=True)


def _recomputed(session: Session, chat: Chat) -> str:
    (reply,) = reply_to(session.model, session.processor, [Prompt(chat.messages[:-1])])
    return reply.text


def _square(color: str) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    image.paste(color, (16, 16, 48, 48))
    return image


def test_a_failed_retry_keeps_the_answer(session) -> None:
    chat = session.chat()
    chat.reply("hello", max_new_tokens=3)
    before = chat.messages
    with pytest.raises(ValueError, match="the prompt begins an image"):
        chat.retry(draw=True, max_new_tokens=3)
    assert chat.messages == before


def test_callers_processors_and_criteria_also_act_on_sampled_answers(session) -> None:
    seen: list[str] = []

    def processor(input_ids, scores):
        seen.append("processor")
        return scores

    def criterion(input_ids, scores, **kwargs):
        seen.append("criterion")
        return torch.ones(len(input_ids), dtype=torch.bool)

    options = {"logits_processor": [processor], "stopping_criteria": [criterion]}
    reply = session.reply("hello", sampling=Sampling(1.0, seed=0), **options)
    assert (seen, reply.num_tokens, reply.finish_reason) == (["processor", "criterion"], 1, "length")


@pytest.mark.parametrize("temperature", [1e-40, 1e-10])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[-torch.inf, 3.0, 2.0, 50.0]])
    assert RowSampler([Sampling(temperature, seed=0)], logits.device)(torch.zeros(1, 1), logits).argmax() == 3


@pytest.mark.parametrize("temperature", [-1.0, float("inf"), float("nan")])
def test_a_temperature_that_is_no_number_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be a number from 0"):
        Sampling(temperature)
