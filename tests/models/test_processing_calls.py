"""The processor is called as those of Transformers are: keyword arguments, images in every form, chat options."""

import base64
import io
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processing_parts import build_processor, chat, golden_image, tokenizer_with

from metamorph.models.image_inputs import to_pil_image
from metamorph.models.sequence.conversations import ImagePart, TextPart


IMAGES = [golden_image(name) for name in ("vqa", "gen", "src", "dst")]
# The prompt says whether thoughts are wanted, as in Qwen3; finished answers do not.
SWITCH_JINJA = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def question(image, text="What?"):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


FORMS = {
    "bytes": png,
    "base64": lambda image: base64.b64encode(png(image)).decode(),
    "base64 in lines": lambda image: base64.encodebytes(png(image)).decode(),
    "data URL": lambda image: f"data:image/png;base64,{base64.b64encode(png(image)).decode()}",
    "array": np.asarray,
    "channels first": lambda image: np.moveaxis(np.asarray(image), -1, 0),
    "floats": lambda image: np.asarray(image) / 255,
    "tensor": lambda image: torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1),
    "bfloat16 of integers": lambda image: (torch.from_numpy(np.asarray(image) // 255).permute(2, 0, 1)).bfloat16(),
}


@pytest.mark.parametrize("form", FORMS)
def test_an_image_is_the_same_in_every_form(processor, form):
    image = IMAGES[0].convert("RGB")
    if form.startswith("bfloat16"):
        image = Image.fromarray(np.asarray(image) // 255 * 255)
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    given = FORMS[form](image)
    for images in (given, [given], [[given]]):
        assert torch.equal(processor(images=images, return_tensors="pt")["pixel_values"], expected)
    batch = processor.apply_chat_template(question(given), tokenize=True)
    assert torch.equal(batch["pixel_values"], expected)
    by_marker = processor.encode_conversation(chat("<image> What?"), [given])
    assert torch.equal(by_marker.pixel_values, expected)


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_files_are_opened_upright(processor, tmp_path, key):
    upright = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    path = tmp_path / "a.png"
    upright.rotate(90, expand=True).save(path, exif=exif)
    expected = processor(images=upright)["pixel_values"]
    assert torch.equal(processor(images=Image.open(path))["pixel_values"], expected)
    assert to_pil_image(upright) is upright  # nothing is copied on the way of training
    for form in (path, str(path)):
        messages = [{"role": "user", "content": [{"type": "image", key: form}]}]
        assert torch.equal(processor.apply_chat_template(messages, tokenize=True)["pixel_values"], expected)


def test_a_batch_may_be_an_array_and_grey_is_an_image(processor):
    images = np.stack([np.asarray(image.convert("RGB").resize((20, 20))) for image in IMAGES])
    assert processor(images=images)["pixel_values"].shape[0] == len(IMAGES)
    assert processor(images=torch.from_numpy(images))["pixel_values"].shape[0] == len(IMAGES)
    assert to_pil_image(np.full((5, 7), 9, np.uint8)).getpixel((0, 0)) == 9
    assert to_pil_image(np.zeros((3, 9, 3), np.uint8), input_data_format="channels_last").size == (9, 3)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("nosuch.png", "there is no image file 'nosuch.png'"),
        ("data:image/png,aGVsbG8=", "the data: URL is not base64: it has no ';base64,'"),
        ("aGVsbG8=", "'aGVsbG8=', which is not a file, cannot be read as an image"),
        (Path("nosuch.png"), "there is no image file nosuch.png"),
        (b"hello", "an image of 5 bytes cannot be read as an image"),
        (np.zeros((2, 3, 4, 5, 6)), r"shape \[2, 3, 4, 5, 6\]"),
        (np.zeros((5, 6, 7), np.uint8), "neither the first nor the last dimension is a channel dimension"),
        (np.array([["a"]]), "is not an image"),
        (torch.full((3, 4, 4), -1.5), "is the image normalised already"),
        (torch.full((3, 4, 4), torch.nan), "must have values from 0 to 1"),
        (np.full((4, 4, 3), 300), "must have values from 0 to 255"),
        (7, "int is not an image"),
        ({"src": 1}, "dict is not an image"),
    ],
    ids=str,
)
def test_anything_but_an_image_is_an_error_that_says_so(processor, image, reason):
    with pytest.raises(ValueError, match=reason):
        processor.apply_chat_template(question(image), tokenize=True)


def test_urls_are_fetched_only_if_allowed(processor):
    content = png(IMAGES[0].convert("RGB"))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.png"
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
        with pytest.raises(ValueError, match="allow_urls"):
            processor(images=url)
        with pytest.raises(ValueError, match="allow_urls"):
            processor.apply_chat_template(messages, tokenize=True)
        expected = processor(images=IMAGES[0])["pixel_values"]
        assert torch.equal(processor(images=url, images_kwargs={"allow_urls": True})["pixel_values"], expected)
        for options in ({"allow_urls": True}, {"processor_kwargs": {"allow_urls": True}}):
            batch = processor.apply_chat_template(messages, tokenize=True, **options)
            assert torch.equal(batch["pixel_values"], expected)
        with pytest.raises(ValueError, match="cannot be fetched"):
            processor(images=url + "x", allow_urls=True)
        server.shutdown()


def test_parts_say_what_is_wrong_with_them(processor):
    for part, reason in (
        ({"type": "text"}, "message 0 has a part of type 'text' without a string"),
        ({"type": "image_url"}, "message 0 has a part of type 'image_url' without a URL"),
        ({"type": "image", "path": "a", "url": "b"}, "message 0 has a part with several images"),
        ("text", "message 0 has a part of the class str"),
    ):
        with pytest.raises(ValueError, match=reason):
            processor.apply_chat_template([{"role": "user", "content": [part]}])


def test_images_are_counted_flat_and_nested_for_each_prompt(processor):
    for count_images in (
        partial(processor, text=["<image>", "Hi"], images=IMAGES[:2]),
        partial(processor.apply_chat_template, chat("<image>"), tokenize=True, images=IMAGES[:2]),
    ):
        with pytest.raises(ValueError, match=r"has 1 <image> marker\(s\), but 2 image\(s\)"):
            count_images()
    prompts = ["<image> a", "b", "<image><image>"]
    nested = [[IMAGES[0]], [], IMAGES[1:3]]
    batch = processor(images=nested, text=prompts, padding=True, return_tensors="pt")
    flat = processor(images=IMAGES[:3], text=prompts, padding=True, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], flat["pixel_values"])
    with pytest.raises(ValueError, match=r"prompt 1 has 0 <image> marker\(s\), but 1 image\(s\)"):
        processor(images=[[IMAGES[0]], IMAGES[1:2], IMAGES[2:3]], text=prompts)
    with pytest.raises(ValueError, match="there are 3 prompts, but 2 lists of images"):
        processor(images=nested[:2], text=prompts)
    conversations = [chat(prompt) for prompt in prompts]
    by_chat = processor.apply_chat_template(conversations, images=nested, tokenize=True)
    assert torch.equal(by_chat["pixel_values"], flat["pixel_values"])
    with pytest.raises(ValueError, match=r"conversation 0 has 1 <image> marker\(s\), but 0 image\(s\)"):
        processor.apply_chat_template(conversations, images=nested[::-1][1:] + nested[:1], tokenize=True)


def test_arguments_act_flat_and_in_groups(processor):
    call = partial(processor, text=["Hi you there", "Hi"])
    flat = call(padding=True, padding_side="right", pad_to_multiple_of=8, return_tensors="pt")
    grouped = call(
        text_kwargs={"padding": True, "padding_side": "right", "pad_to_multiple_of": 8},
        common_kwargs={"return_tensors": "pt"},
    )
    assert torch.equal(flat["input_ids"], grouped["input_ids"])
    assert flat["input_ids"].shape[1] == 8
    assert flat["attention_mask"][:, 0].tolist() == [1, 1]
    assert "attention_mask" not in call(return_attention_mask=False)
    assert call(add_special_tokens=False)["input_ids"][1] == call()["input_ids"][1][1:]
    assert isinstance(call(padding=True, return_tensors="np")["input_ids"], np.ndarray)


def test_padding_is_on_the_left_until_the_tokenizer_is_told_otherwise():
    processor = build_processor()
    texts = ["Hi you there", "Hi"]
    assert processor(text=texts, padding=True)["attention_mask"][1][0] == 0
    processor.tokenizer.padding_side = "right"
    right = processor(text=texts, padding=True)["attention_mask"][1]
    left = processor(text=texts, padding=True, padding_side="left")["attention_mask"][1]
    assert right[0] == 1
    assert left == right[::-1]
    assert len(processor(text="Hi", padding="max_length", max_length=12)["input_ids"][0]) == 12
    assert len({len(row) for row in processor(text=texts)["input_ids"]}) == 2


@pytest.mark.parametrize("limit", [3, 10, 25, 60])
def test_truncation_cuts_as_training_does(processor, limit, caplog):
    messages = chat("<image> and <image> What?", "That.")
    full = processor.encode_conversation(messages, IMAGES[:2], model_max_length=limit)
    by_chat = processor.apply_chat_template(
        messages, images=IMAGES[:2], tokenize=True, truncation=True, max_length=limit
    )
    text = processor.apply_chat_template(messages)
    by_text = processor(images=IMAGES[:2], text=text, truncation=True, max_length=limit, return_tensors="pt")
    for batch in (by_chat, by_text):
        assert batch["input_ids"][0].tolist() == full.input_ids.tolist()
        assert len(batch.get("pixel_values", ())) == 2 - full.num_dropped_images
    assert ("were dropped" in caplog.text) == bool(full.num_dropped_images)


def test_an_argument_acts_or_is_refused(processor):
    own = {"do_resize": True, "do_rescale": True, "do_convert_rgb": True, "device": "cpu", "size": None}
    processor(images=IMAGES[0], **own)
    processor(text="Hi", videos=None, return_offsets_mapping=False, stride=0)
    for arguments, reason in (
        ({"do_resize": False}, "do_resize=False is not supported"),
        ({"size": {"height": 8, "width": 8}}, "size=.* is not supported"),
        ({"return_offsets_mapping": True}, "return_offsets_mapping=True is not supported"),
        ({"max_length": 4}, "max_length=4 does nothing without truncation"),
        ({"truncation": "only_second"}, "truncation='only_second' is unknown"),
        ({"padding": "max_length"}, "padding='max_length' needs max_length"),
        ({"padding": "left"}, "padding='left' is unknown"),
        ({"padding_side": "up"}, "padding_side='up' is unknown"),
    ):
        with pytest.raises(ValueError, match=reason):
            processor(text="Hi", **arguments)
    with pytest.raises(TypeError, match="takes no argument 'pading'; is padding meant"):
        processor(text="Hi", pading=True)
    with pytest.raises(ValueError, match="text must be a string or a list of strings"):
        processor("<image>", IMAGES[:1])
    with pytest.raises(ValueError, match="give text, images or both"):
        processor()


def test_placeholders_are_named_and_counted(processor):
    batch = processor(images=IMAGES[:1], text="a <image> b", return_mm_token_type_ids=True)
    (ids,), (types,) = batch["input_ids"], batch["mm_token_type_ids"]
    assert processor.tokenizer.convert_tokens_to_ids(processor.image_token) == processor.image_token_id
    assert types == [int(token == processor.image_token_id) for token in ids]
    assert processor._get_num_multimodal_tokens(image_sizes=[(9, 9)])["num_image_tokens"] == [sum(types)]


def test_masks_of_answers_are_what_training_learns(processor):
    messages = chat("<image> What?", "This: <image>", "And?", "That.")
    encoded = processor.encode_conversation(messages, IMAGES[:2])
    for conversation in (messages, [messages, chat("Hi", "Yes.")]):
        batch = processor.apply_chat_template(
            conversation, images=IMAGES[:2], tokenize=True, return_assistant_tokens_mask=True, padding_side="right"
        )
        mask = batch["assistant_masks"][0][: len(encoded.labels)].bool()
        assert torch.equal(mask, (encoded.labels != -100) | encoded.visual_target_mask)
    with pytest.raises(ValueError, match="needs tokenize=True"):
        processor.apply_chat_template(messages, return_assistant_tokens_mask=True)
    with pytest.raises(ValueError, match="marks the text of training, which has no enable_thinking"):
        processor.apply_chat_template(
            messages, images=IMAGES[:2], tokenize=True, return_assistant_tokens_mask=True, enable_thinking=False
        )


@pytest.mark.parametrize("version", ["llama3", "chatml", "auto"])
def test_a_message_to_be_continued_is_the_beginning_of_the_finished_one(version):
    processor = build_processor(tokenizer_with("reasoning"), version=version)
    messages = chat("Hi", "Yes, I", "<image>?", "It is a <image> and")
    finished = chat("Hi", "Yes, I", "<image>?", "It is a <image> and a cat.")
    options = {"images": IMAGES[:2], "tokenize": True}
    begun = processor.apply_chat_template(messages, continue_final_message=True, **options)["input_ids"][0].tolist()
    full = processor.apply_chat_template(finished, **options)["input_ids"][0].tolist()
    assert full[: len(begun)] == begun
    text = processor.apply_chat_template(messages, continue_final_message=True)
    assert text.endswith("It is a <image> and")
    assert processor(images=IMAGES[:2], text=text)["input_ids"][0] == begun
    for wrong in (chat("Hi"), []):
        with pytest.raises(ValueError, match="continue_final_message needs the assistant's message"):
            processor.apply_chat_template(wrong, continue_final_message=True)


def test_a_template_and_its_variables_may_be_given_for_one_call():
    tokenizer = tokenizer_with("qwen")
    processor = build_processor(tokenizer, version="auto")
    plain = processor.apply_chat_template(chat("Hi"), add_generation_prompt=True)
    with pytest.raises(ValueError, match="does not read 'enable_thinking'"):
        processor.apply_chat_template(chat("Hi"), enable_thinking=True)
    for nothing in (False, None):
        assert processor.apply_chat_template(chat("Hi"), add_generation_prompt=True, enable_thinking=nothing) == plain
    with pytest.raises(ValueError, match="does not read 'messages'"):
        processor.apply_chat_template(chat("Hi"), messages=3)
    messages = chat("Hi <|im_end|>", "Yes.", "Why?")
    call = partial(processor.apply_chat_template, messages, chat_template=SWITCH_JINJA, add_generation_prompt=True)
    text = call(enable_thinking=False)
    assert text == tokenizer.apply_chat_template(
        messages, chat_template=SWITCH_JINJA, add_generation_prompt=True, enable_thinking=False, tokenize=False
    )
    assert call() + "<think>\n\n</think>\n\n" == text
    ids = call(enable_thinking=False, tokenize=True)["input_ids"][0].tolist()
    ends = ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert ends == 3  # that of a content is text
    assert processor.apply_chat_template(chat("Hi"), add_generation_prompt=True) == plain
    with pytest.raises(ValueError, match="drops, repeats or reorders messages"):
        processor.apply_chat_template(chat("Hi"), chat_template="{{ bos_token }}")
    for name in ("tools", "documents"):
        with pytest.raises(ValueError, match="tools and documents are not supported"):
            processor.apply_chat_template(chat("Hi"), **{name: [{"name": "search"}]})
        processor.apply_chat_template(chat("Hi"), **{name: []})


def test_an_answer_goes_into_the_next_message(processor):
    drawn = ImagePart(torch.randn(processor.num_image_tokens, 8))
    rest = [{"role": "user", "content": [{"type": "image", "image": IMAGES[0]}, {"type": "text", "text": "Same?"}]}]
    answer = {"role": "assistant", "content": (TextPart("Here:"), drawn)}
    batch = processor.apply_chat_template(
        [*chat("Draw."), answer, *rest, *chat("<image>")], images=[IMAGES[1]], tokenize=True
    )
    as_part = {"role": "assistant", "content": [{"type": "text", "text": "Here:"}, {"type": "image", "image": drawn}]}
    encoded = processor.encode_conversation([*chat("Draw."), as_part, *rest, *chat("<image>")], [IMAGES[1]])
    assert batch["input_ids"][0].tolist() == encoded.input_ids.tolist()
    assert torch.equal(batch["visual_tokens"], drawn.visual_tokens[None])
    assert batch["visual_tokens_index"].tolist() == encoded.visual_tokens_index.tolist() == [0]
    assert torch.equal(batch["pixel_values"], processor(images=IMAGES[:2])["pixel_values"])
    pair = processor(images=[[IMAGES[0]], [drawn]], text=["<image>", "<image>"])
    assert pair["visual_tokens_index"].tolist() == [1]
    alone = processor(images=[drawn], text="<image>")
    assert not {"pixel_values", "visual_tokens_index"} & alone.keys()
    with pytest.raises(ValueError, match=r"visual tokens of shape \[16, vision_hidden\]"):
        processor(images=[ImagePart(torch.randn(4, 8))], text="<image>")
