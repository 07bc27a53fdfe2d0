"""What users of Transformers try in their first hour, with the results to expect.

    python examples/transformers_first_hour.py

Runs the model that ships with the package in less than a minute, on a CPU and without a network.
"""

from __future__ import annotations

import base64
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

import metamorph
from metamorph.mini import shipped_folder


FOLDER = shipped_folder("mini", "model")
QUESTION = "what color is the object?"


def red_circle() -> Image.Image:
    """An image of the world that the model knows."""
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((16, 16, 48, 48), fill="red")
    return image


def chat(*parts: Any) -> list[dict[str, Any]]:
    """One turn of the user; a string is text, anything else an image."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def auto_classes(model: Any, processor: Any) -> None:
    """The Auto classes need only `import metamorph`, which does not import torch."""
    subprocess.run([sys.executable, "-c", "import metamorph, sys; assert 'torch' not in sys.modules"], check=True)
    assert {"MetaMorphConfig", "MetaMorphForConditionalGeneration", "MetaMorphProcessor"} <= set(dir(metamorph))
    assert metamorph.__version__
    assert AutoConfig.from_pretrained(FOLDER).model_type == "metamorph"
    assert type(AutoModelForMultimodalLM.from_pretrained(FOLDER)) is type(model)
    assert AutoTokenizer.from_pretrained(FOLDER).vocab_size == processor.tokenizer.vocab_size
    assert AutoImageProcessor.from_pretrained(FOLDER).size["height"] == 64


def prompts_and_images(model: Any, processor: Any) -> None:
    """Text in the template and images, in every form, flat or nested."""
    image = red_circle()
    prompt = processor.apply_chat_template(chat({"type": "image"}, QUESTION), add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    placeholders = inputs["input_ids"] == processor.image_token_id
    assert placeholders.sum() == processor.num_image_tokens
    assert processor._get_num_multimodal_tokens(image_sizes=[(64, 64)])["num_image_tokens"] == [placeholders.sum()]

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "red.png"
        image.save(file)
        content = file.read_bytes()
        array = np.asarray(image)
        forms = (file, str(file), content, base64.b64encode(content).decode(), array, torch.from_numpy(array / 255))
        for form in forms:
            assert torch.equal(
                processor(images=[form], text=prompt, return_tensors="pt").pixel_values, inputs.pixel_values
            )
        for key in ("image", "path", "url"):
            messages = chat({"type": "image", key: str(file)}, QUESTION)
            batch = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
            assert torch.equal(batch["pixel_values"], inputs["pixel_values"])
    refused(lambda: processor(images="https://example.org/a.png", text=prompt), "allow_urls")

    options = {"padding": True, "padding_side": "right", "truncation": True, "max_length": 64}
    pair = processor(text=[prompt, "hello"], images=[[image], []], text_kwargs=options, return_tensors="pt")
    assert pair["attention_mask"][1].tolist() == sorted(pair["attention_mask"][1].tolist(), reverse=True)
    refused(lambda: processor(text=[prompt, "hello"], images=[[], [image]], padding=True), "prompt 0 has 1 <image>")
    types = processor(images=image, text=prompt, return_mm_token_type_ids=True)["mm_token_type_ids"]
    assert types[0] == placeholders[0].int().tolist()
    refused(lambda: processor(text="hello", stride=2), "stride=2 is not supported")


def conversations(model: Any, processor: Any) -> None:
    """Options of chat templates."""
    messages = [*chat("hello"), {"role": "assistant", "content": "red"}]
    batch = processor.apply_chat_template(messages, tokenize=True, return_assistant_tokens_mask=True)
    learned = batch["input_ids"][batch["assistant_masks"].bool()]
    assert processor.decode(learned) == "red<|eot_id|>"
    assert processor.apply_chat_template(messages, continue_final_message=True).endswith("red")
    own = processor.chat_template.replace("<|eot_id|>", "<|end_of_text|>")
    assert processor.apply_chat_template(messages, chat_template=own).endswith("<|end_of_text|>")
    assert processor.apply_chat_template(messages, enable_thinking=False) == processor.apply_chat_template(messages)
    refused(lambda: processor.apply_chat_template(messages, enable_thinking=True), "does not read 'enable_thinking'")
    refused(lambda: processor.apply_chat_template(messages, tools=[{"name": "search"}]), "tools")


def generating(model: Any, processor: Any) -> None:
    """Plain ids or a result with the images, and the usual ways to text."""
    inputs = processor.apply_chat_template(
        chat({"type": "image", "image": red_circle()}, QUESTION), add_generation_prompt=True, tokenize=True
    )
    length = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert processor.batch_decode(output[:, length:], skip_special_tokens=True) == ["red"]
    assert processor.batch_decode(output, skip_special_tokens=True)[0].endswith("red")
    assert processor.post_process_image_text_to_text(output.sequences[:, length:]) == ["red"]
    config = GenerationConfig(max_new_tokens=8, return_dict_in_generate=False)
    for options in ({"generation_config": config}, {"return_dict_in_generate": False, "max_new_tokens": 8}):
        assert torch.equal(model.generate(**inputs, do_sample=False, **options), output.sequences)


def drawing_and_continuing(model: Any, processor: Any) -> None:
    """An image of an answer goes into the next message, next to an input image."""
    ask = processor.apply_chat_template(chat("draw a red circle"), add_generation_prompt=True, tokenize=True)
    output = model.generate(**ask, max_new_tokens=40, do_sample=False)
    (parts,) = processor.decode_interleaved(output.sequences, output.visual_tokens, ask["input_ids"].shape[1])
    assert output.num_images.tolist() == [1]
    messages = [
        *chat("draw a red circle"),
        {"role": "assistant", "content": parts},
        *chat({"type": "image", "image": red_circle()}, QUESTION),
    ]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    assert inputs["visual_tokens_index"].tolist() == [0]
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == ["red"]


def pipelines(model: Any, processor: Any) -> None:
    """`pipeline("image-text-to-text")`, by folder and with the objects, as chat and with text and images."""
    messages = chat({"type": "image", "image": red_circle()}, QUESTION)
    for where in ({"model": FOLDER}, {"model": model, "processor": processor}):
        pipe = pipeline("image-text-to-text", **where)
        assert pipe(text=messages, max_new_tokens=8)[0]["generated_text"][-1]["content"] == "red"
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    result = pipe(images=red_circle(), text=prompt, max_new_tokens=8, return_full_text=False)
    assert result[0]["generated_text"] == "red"
    prefilled = [*messages, {"role": "assistant", "content": [{"type": "text", "text": "re"}]}]
    assert pipe(text=prefilled, max_new_tokens=8)[0]["generated_text"][-1]["content"][-1]["text"].startswith("re")


def the_model_itself(model: Any, processor: Any) -> None:
    """Tuples, image features and a larger vocabulary."""
    inputs = processor(images=red_circle(), text="<image> a red circle", return_tensors="pt").to(model.dtype)
    assert isinstance(model(**inputs, return_dict=False), tuple)
    features = model.get_image_features(inputs["pixel_values"])
    assert features.pooler_output.shape == (1, processor.num_image_tokens, model.config.text_config.hidden_size)
    assert torch.equal(model.model.get_image_features(inputs["pixel_values"]).pooler_output, features.pooler_output)
    model.resize_token_embeddings(len(processor.tokenizer) + 2, mean_resizing=False)
    assert model(**inputs).logits.shape[-1] == len(processor.tokenizer) + 2 == model.config.text_config.vocab_size


def refused(call: Callable[[], Any], reason: str) -> None:
    """Check that a call raises an error that says why."""
    message = "it is not refused"
    try:
        call()
    except ValueError as error:
        message = str(error)
    assert reason in message, message


def main() -> None:
    """Run every idiom."""
    model = AutoModelForImageTextToText.from_pretrained(FOLDER)
    processor = AutoProcessor.from_pretrained(FOLDER)
    steps = (auto_classes, prompts_and_images, conversations, generating, drawing_and_continuing, pipelines)
    for step in (*steps, the_model_itself):  # the last one changes the model
        step(model, processor)
        print(f"{step.__name__}: as expected")


if __name__ == "__main__":
    main()
