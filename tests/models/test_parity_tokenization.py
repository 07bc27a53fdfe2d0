"""Ids, labels and pixels of the original system, wherever the original is right."""

import json

import pytest
import torch
from processing_parts import GOLDEN, build_processor, golden_image
from safetensors.torch import load_file


pytestmark = pytest.mark.parity


RECORDED = json.loads((GOLDEN / "tokenization.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in RECORDED["cases"]}

SAME = [
    "text_two_turns",
    "image_in_prompt_two_turns",
    "image_in_answer",
    "image_in_both",
    "many_images_three_turns",
    "visual_thinking",
]
"""Conversations with which the original does what it should, but for its second BOS token."""

DIFFERENT = {
    "answer_starts_with_newlines": "contents are stripped: an answer does not begin with the header's newlines",
    "answer_starts_with_space": "contents are stripped",
    "starts_with_gpt_turn": "the original drops the first turn; the processor keeps it, the records refuse it",
    "data_already_wrapped_like_README": "R17: an image is not wrapped twice",
    "empty_last_answer": "an empty answer is an end of turn; the original masks the sample",
    "empty_middle_answer": "an empty answer is an end of turn; the original masks the sample",
    "empty_question": "an empty question has an end of turn; the original masks the sample",
    "literal_image_tag_in_text_sample": "a marker without an image is an error",
    "ends_with_human_turn": "same ids, but the answer is learned; the original masks the sample",
    "text_longer_than_max_length_40": "a cut at the limit as well, but one BOS token leaves room for one token more",
    "image_sample_longer_than_max_length_40": "the limit holds with images, too",
    "text_with_eot_inside_answer": "R18: the name of a control token in a text is text",
    "system_role": "the original raises KeyError",
}
"""Conversations where ours differs on purpose, and why."""


@pytest.fixture(scope="module")
def processor():
    return build_processor(version="llama3_original")


def messages(case):
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return [{"role": roles[turn["from"]], "content": turn["value"]} for turn in case["conversations"]]


def encode(processor, case):
    count = sum(turn["value"].count("<image>") for turn in case["conversations"]) if case["has_image"] else 0
    return processor.encode_conversation(
        messages(case), [golden_image("vqa")] * count, model_max_length=case["model_max_length"]
    )


def recorded_sequence(case, processor):
    """The recorded ids and labels with one BOS token, and every image as placeholders."""
    ids, labels = [], []
    for token, label in zip(case["input_ids"][1:], case["labels"][1:], strict=True):
        image = token == RECORDED["image_token_index"]
        ids += [processor.image_tokens.image] * processor.num_image_tokens if image else [token]
        labels += [-100] * processor.num_image_tokens if image else [label]
    return ids, labels


def test_every_recorded_conversation_is_accounted_for():
    assert sorted([*SAME, *DIFFERENT]) == sorted(CASES)


@pytest.mark.parametrize("name", SAME)
def test_ids_and_labels_are_the_originals(processor, name):
    ids, labels = recorded_sequence(CASES[name], processor)
    encoded = encode(processor, CASES[name])
    assert encoded.input_ids.tolist() == ids
    assert encoded.labels.tolist() == labels


@pytest.mark.parametrize("name", [name for name in DIFFERENT if name != "literal_image_tag_in_text_sample"])
def test_where_ours_differs_it_learns_the_answers(processor, name):
    case = CASES[name]
    encoded = encode(processor, case)
    learned = encoded.labels[encoded.labels != -100].tolist()
    answers = [turn["value"].strip() for turn in case["conversations"] if turn["from"] == "gpt"]
    expected = [
        token
        for answer in answers
        for token in [
            *processor.tokenizer.encode(answer, add_special_tokens=False, split_special_tokens=True),
            processor.tokenizer.eos_token_id,
        ]
    ]
    assert learned == expected[: len(learned)]
    assert len(learned) == len(expected) or encoded.truncated
    if "input_ids" in case and name != "ends_with_human_turn":
        assert (encoded.input_ids.tolist(), encoded.labels.tolist()) != recorded_sequence(case, processor)


def test_a_literal_marker_without_image_is_an_error(processor):
    with pytest.raises(ValueError, match=r"1 <image> marker\(s\), but 0 image\(s\)"):
        encode(processor, CASES["literal_image_tag_in_text_sample"])


def test_r15_a_system_turn_is_encoded(processor):
    text = processor.apply_chat_template(messages(CASES["system_role"]))
    assert text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\nBe nice.<|eot_id|>")


def test_pixels_are_the_originals(processor):
    recorded = load_file(GOLDEN / "micro" / "batch.safetensors")["images"]
    images = [golden_image(name) for name in ("vqa", "gen", "src", "dst")]
    pixel_values = processor(images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixel_values, recorded[: len(images)])
