"""The miniature's tokenizer: lossless, Llama-3's layout, and closed over the world's words."""

import pytest
from transformers import AutoTokenizer

from tools.miniature.tokenizer import SPECIAL_TOKENS, build_tokenizer


WORDS = ["a small red circle", "What colour is the", "Yes No", "top left", "?.,"]
CHAT = [
    {"role": "user", "content": "What colour is the circle?"},
    {"role": "assistant", "content": "red"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(WORDS)


@pytest.mark.parametrize(
    "text",
    [
        "a red circle.",
        "What colour is the circle?\nred, small",
        "an Unknown wörd, 42 times!",
        " two  spaces\n\n\nand a\ttab ",
        "",
    ],
)
def test_decoding_gives_back_every_text(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_known_words_are_one_token_each(tokenizer):
    assert tokenizer.tokenize("a small red circle.") == ["a", "Ġsmall", "Ġred", "Ġcircle", "."]


def test_special_tokens_are_llama_3s_and_image_tokens_are_not_there(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer.eos_token == "<|eot_id|>"
    assert not {"<image>", "<image_start>", "<image_end>"} & set(tokenizer.get_vocab())


def test_chat_format_is_llama_3s(tokenizer):
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat colour is the circle?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nred<|eot_id|>"
    )
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert text[len(prompt) :] == "red<|eot_id|>"


def test_chat_template_marks_the_assistants_words(tokenizer):
    batch = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, mask in zip(batch["input_ids"], batch["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(marked) == "red<|eot_id|>"


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded("a red circle.").input_ids == tokenizer("a red circle.").input_ids


def test_no_words_is_an_error():
    with pytest.raises(ValueError, match="words"):
        build_tokenizer([])
