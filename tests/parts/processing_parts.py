"""Tokenizers, image processors and images for the tests of the processor and of the data."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, SiglipImageProcessor

from metamorph.models.processing_metamorph import MetaMorphProcessor


GOLDEN = Path(__file__).parents[1] / "golden"
IMAGE_SIZE = 112

# Three families of chat templates, in the form in which base models ship them.
LLAMA3_JINJA = (
    "{% for m in messages %}"
    "{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_JINJA = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING_JINJA = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL_JINJA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user and assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# The last answer ends with another token than earlier ones, as in gpt-oss.
TWO_ENDS_JINJA = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Nothing ends an answer but the token that begins the next turn, as in GLM-4.5.
NO_END_JINJA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# No control tokens but the end of a sequence.
ALPACA_JINJA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + m['content'] + eos_token + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)
# Thoughts come from the content, and only those of the last answer are kept, as in Qwen3.
REASONING_JINJA = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% set text = m['content'] %}{% set thought = '' %}"
    "{% if m['role'] == 'assistant' and '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set text = text.split('</think>')[-1].strip() %}{% endif %}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DATE_JINJA = "{{ bos_token + '[' + strftime_now('%d %B %Y') + ']' }}" + QWEN_JINJA
# Roles in plain words; a prompt ends in a space, which many tokenizers join with the first word of the answer.
SPACE_JINJA = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CHAT_TEMPLATES = {
    "llama3": LLAMA3_JINJA,
    "qwen": QWEN_JINJA,
    "thinking": THINKING_JINJA,
    "mistral": MISTRAL_JINJA,
    "two_ends": TWO_ENDS_JINJA,
    "no_end": NO_END_JINJA,
    "alpaca": ALPACA_JINJA,
    "space": SPACE_JINJA,
    "reasoning": REASONING_JINJA,
    "date": DATE_JINJA,
}
# Not called special by the tokenizers that have them.
PLAIN_ADDED = ("<think>", "</think>", "<|user|>", "<|assistant|>")


def peak_memory(function) -> int:
    """Bytes by which calling a function lets this process grow, at most.

    `getrusage` cannot tell: its peak never falls, so whatever ran before hides what comes later.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("the peak of memory is measured on Linux alone")

    def kilobytes(name: str) -> int:
        return int(status.read_text().partition(f"{name}:")[2].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is in use now
    before = kilobytes("VmRSS")
    function()
    return 1024 * (kilobytes("VmHWM") - before)


def golden_tokenizer():
    """Byte-level BPE with Llama 3's special tokens; it starts every text with a BOS token."""
    return AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")


def tokenizer_with(chat_template: str | None = None):
    """The golden tokenizer, that also knows the control tokens of the templates above."""
    tokenizer = golden_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"], special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_ADDED])
    tokenizer.chat_template = CHAT_TEMPLATES.get(chat_template, chat_template)
    return tokenizer


def merging_tokenizer(chat_template: str | None = None):
    """A byte-level tokenizer that joins punctuation and the line ends after it, as Llama 3's and Qwen's do."""
    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["a cat.\n", "a mat.\n\n", "### Response:\n", "why?\n\n", ":**"] * 9, trainer)
    special = ("<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, normalized=True) for token in PLAIN_ADDED])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATES.get(chat_template, chat_template)
    return tokenizer


def sentencepiece_tokenizer():
    """A BPE tokenizer that writes spaces as ▁ in front of words, as Llama 2 and Mistral do."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    backend.train_from_iterator(["the cat sat on the mat and what is this, a red square? yes it is."] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = MISTRAL_JINJA
    return tokenizer


def word_tokenizer():
    """One token for each word: the name of a control token in a text is a word of the vocabulary, too."""
    words = ["<unk>", "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "user", "assistant", "a", "red", "cat"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(words[1:6])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def build_processor(
    tokenizer=None, version: str = "llama3", num_image_tokens: int = 16, **fields
) -> MetaMorphProcessor:
    """A processor for the golden images, 112 pixels and 16 visual tokens each unless told otherwise."""
    image_processor = SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    tokenizer = tokenizer or golden_tokenizer()
    return MetaMorphProcessor(image_processor, tokenizer, num_image_tokens=num_image_tokens, version=version, **fields)


def golden_image(name: str) -> Image.Image:
    return Image.open(GOLDEN / "images" / f"{name}.png").convert("RGB")


def chat(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of the user and the assistant in turns."""
    messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def llava(record_id, *texts: str, image=None) -> dict:
    """A LLaVA record of a human and gpt in turns."""
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    record = {"id": record_id, "conversations": turns}
    return record if image is None else {**record, "image": image}


def write_jsonl(path: Path, records: list) -> Path:
    """One line for each record; a string is written as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def supervised_text(processor: MetaMorphProcessor, encoded) -> str:
    """The text of all supervised tokens, control tokens included."""
    return processor.tokenizer.decode(encoded.labels[encoded.labels != -100])
