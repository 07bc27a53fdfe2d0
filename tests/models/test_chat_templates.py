"""Conversation templates: the right text, the right supervision, the same ids in training and in use."""

import resource
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
from processing_parts import (
    CHAT_TEMPLATES,
    build_processor,
    chat,
    golden_image,
    golden_tokenizer,
    merging_tokenizer,
    sentencepiece_tokenizer,
    supervised_text,
    tokenizer_with,
)
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer

from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.models.sequence import template_date
from metamorph.models.sequence.chat_templates import get_chat_template
from metamorph.models.sequence.constants import VERSIONS


# Every version, and `auto` with each family of templates.
FORMATS = ["llama3", "llama3_original", "chatml", "plain", "auto-llama3", "auto-qwen", "auto-thinking", "auto-mistral"]
FORMATS += ["auto-two_ends", "auto-no_end", "auto-alpaca", "auto-reasoning", "auto-space"]


def processor_for(name: str, tokenizer_of=tokenizer_with):
    version, _, family = name.partition("-")
    return build_processor(tokenizer_of(family or None), version=version)


@pytest.fixture(scope="module", params=[*FORMATS, "auto-sentencepiece"])
def processor(request):
    if request.param == "auto-sentencepiece":
        return build_processor(sentencepiece_tokenizer(), version="auto")
    return processor_for(request.param)


def test_the_text_of_each_template():
    messages = chat("Hi", "Yes.", "Why?")
    header = "<|start_header_id|>{}<|end_header_id|>"
    user, assistant = header.format("user"), header.format("assistant")
    expected = {
        "llama3": f"<|begin_of_text|>{user}\n\nHi<|eot_id|>{assistant}\n\nYes.<|eot_id|>{user}\n\nWhy?<|eot_id|>"
        f"{assistant}\n\n",
        "chatml": "<|begin_of_text|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "plain": "<|begin_of_text|>Hi\nYes.<|eot_id|>\nWhy?\n",
        "auto-mistral": "<|begin_of_text|>[INST] Hi [/INST] Yes.<|eot_id|>[INST] Why? [/INST]",
    }
    expected["llama3_original"] = expected["llama3"].replace("\n\n", "\n")
    expected["auto-llama3"] = expected["llama3"]
    for name, text in expected.items():
        assert processor_for(name).apply_chat_template(messages, add_generation_prompt=True) == text, name


@pytest.mark.parametrize("name", FORMATS)
def test_r15_every_version_learns_the_answers_and_nothing_else(name):
    """The original knew one template; the others gave None."""
    processor = processor_for(name)
    encoded = processor.encode_conversation(chat("Hi", "Yes, I am.", "Why?", "No."))
    end = processor.template.end_tokens[0]
    text = supervised_text(processor, encoded)
    assert end is not None
    # Mistral's answers begin with a space, and the thinking template writes an empty thought before the last one.
    text = text.replace(" ", "").replace("<think>\n\n</think>\n\n", "")
    first = "<|im_end|>" if name == "auto-two_ends" else end
    assert text == f"Yes,Iam.{first}No.{end}"


@pytest.mark.parametrize("version", ["llama3", "llama3_original", "chatml", "plain", "auto"])
def test_r16_one_bos_never_two(version):
    processor = build_processor(tokenizer_with("llama3"), version=version)
    bos = processor.tokenizer.bos_token_id
    messages = chat("Hi", "Yes.")
    assert processor.encode_conversation(messages).input_ids.tolist().count(bos) == 1
    text = processor.apply_chat_template(messages)
    assert processor(text=text)["input_ids"][0].count(bos) == 1
    assert processor(text=text.removeprefix(processor.tokenizer.bos_token))["input_ids"][0].count(bos) == 1


def test_r16_llama3_has_two_newlines_after_the_header_as_llama3_itself():
    text = build_processor(version="llama3").apply_chat_template(chat("Hi"), add_generation_prompt=True)
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    text = build_processor(version="llama3_original").apply_chat_template(chat("Hi"), add_generation_prompt=True)
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n")
    assert not text.endswith("\n\n")


CONVERSATIONS = {
    "one turn": chat("what is this?", "a cat."),
    "two turns": chat("what is this?", "a cat.", "and this?", "a mat."),
    "system": chat("what is this?", "a cat.", system="be nice"),
    "images": chat("<image>\nwhat is this?", "<image>", "and <image><image> this", "it is <image> red\n<image>"),
    "white space": chat("\n what is this? \n", "\n\n a cat.\n", "  <image>  ", " \n<image> "),
    "empty": chat("", "", "what?", ""),
}


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_prompt_has_the_ids_with_which_the_answer_was_trained(processor, conversation):
    messages = CONVERSATIONS[conversation]
    images = [golden_image("vqa")] * 8

    def encode(part, **options):
        count = sum(message["content"].count("<image>") for message in part)
        return processor.encode_conversation(part, images[:count], **options)

    full = encode(messages)
    for place in [place for place, message in enumerate(messages) if message["role"] == "assistant"]:
        prompt = encode(messages[:place], add_generation_prompt=True)
        length = len(prompt.input_ids)
        assert length < len(full.input_ids)
        assert prompt.input_ids.tolist() == full.input_ids[:length].tolist()
    # What follows the prompt is learned up to the end of the turn; a line end after it is not.
    answer, labels = full.input_ids[length:], full.labels[length:]
    end = processor.tokenizer.convert_tokens_to_ids(processor.template.end_tokens[0])
    stop = (answer == end).nonzero()[-1].item() + 1
    is_text = answer[:stop] != processor.image_tokens.image
    assert (labels[:stop][is_text] == answer[:stop][is_text]).all()
    assert (labels[:stop][~is_text] == -100).all()
    assert (labels[stop:] == -100).all()


@pytest.mark.parametrize("tokenizer_of", [tokenizer_with, merging_tokenizer])
@pytest.mark.parametrize("family", sorted({*CHAT_TEMPLATES} - {"no_end", "date"}))
def test_auto_gives_the_ids_of_the_tokenizers_own_template(family, tokenizer_of):
    processor = build_processor(tokenizer_of(family), version="auto")
    tokenizer = tokenizer_of(family)
    tokenizer.chat_template = tokenizer.chat_template.replace("'assistant: '", "'assistant:'")  # see the next test
    messages = chat("What is the capital of France?", "Paris.", "And 2 + 2?", "<think>\nEasy.\n</think>\n\n2 + 2 = 4.")
    for part, prompt in ((messages, False), (messages[:-1], True)):
        own = tokenizer.apply_chat_template(part, add_generation_prompt=prompt, tokenize=True, return_dict=False)
        assert processor.encode_conversation(part, add_generation_prompt=prompt).input_ids.tolist() == own


@pytest.mark.parametrize("tokenizer_of", [tokenizer_with, merging_tokenizer])
@pytest.mark.parametrize("name", ["llama3", "chatml", "plain", "auto-alpaca", "auto-qwen", "auto-no_end", "auto-space"])
def test_text_and_conversation_give_the_same_ids(name, tokenizer_of):
    processor = processor_for(name, tokenizer_of)
    messages = chat("<image>\nwhy?", "a cat.", "a mat.", "<image> red.\n", system="be nice.")
    images = [golden_image("vqa")] * 2
    for part, count, prompt in ((messages[:-1], 1, True), (messages, 2, False)):
        trained = processor.encode_conversation(part, images[:count], add_generation_prompt=prompt).input_ids.tolist()
        text = processor.apply_chat_template(part, add_generation_prompt=prompt)
        assert processor(text=text, images=images[:count])["input_ids"] == [trained]
        batch = processor.apply_chat_template(part, add_generation_prompt=prompt, tokenize=True, images=images[:count])
        assert batch["input_ids"].tolist() == [trained]


@pytest.mark.parametrize("tokenizer_of", [tokenizer_with, merging_tokenizer, sentencepiece_tokenizer])
def test_a_prompt_does_not_end_in_a_space_that_belongs_to_the_answer(tokenizer_of):
    """The template's own prompt ends in the token of a space; the answer it was trained with begins with " the"."""
    own = tokenizer_with("space").chat_template
    tokenizer = tokenizer_of()
    tokenizer.chat_template = own
    processor = build_processor(tokenizer, version="auto")
    messages = chat("what is this?", "the cat", "and this?", "cat. a mat")
    encoded = processor.encode_conversation(messages)
    ids = encoded.input_ids.tolist()
    assert ids == tokenizer.apply_chat_template(messages, chat_template=own, tokenize=True, return_dict=False)
    assert processor(text=processor.apply_chat_template(messages))["input_ids"] == [ids]
    for place in (1, 3):
        prompt = processor.apply_chat_template(messages[:place], add_generation_prompt=True)
        assert prompt.endswith("\nassistant:")
        (of_text,) = processor(text=prompt)["input_ids"]
        assert of_text == ids[: len(of_text)]
        assert encoded.labels[len(of_text) - 1] == -100
        assert encoded.labels[len(of_text)] == ids[len(of_text)]
    assert (encoded.labels == tokenizer.eos_token_id).sum() == 2
    # A template is changed once only, and where nothing is joined it is not changed.
    assert build_processor(tokenizer, version="auto").chat_template == processor.chat_template
    unchanged = own.replace("': '", "':\n'").replace("'assistant: '", "'assistant:\n'")
    assert build_processor(merging_tokenizer(unchanged), version="auto").chat_template == unchanged


def test_a_token_that_begins_in_the_prompt_and_ends_in_the_answer_is_not_learnt():
    """ "assistant:" and "**cat**" have the token ":**": the ids are those of the text, and the rest is learned."""
    own = tokenizer_with("space").chat_template.replace(": '", ":'")
    tokenizer = merging_tokenizer(own)
    processor = build_processor(tokenizer, version="auto")
    assert processor.chat_template == own
    messages = chat("what is this?", "**cat", "and this?", "cat")
    encoded = processor.encode_conversation(messages)
    ids = encoded.input_ids.tolist()
    assert tokenizer.convert_tokens_to_ids(":**") in ids
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert processor(text=processor.apply_chat_template(messages))["input_ids"] == [ids]
    assert supervised_text(processor, encoded) == "cat</s>cat</s>"
    for limit in range(1, len(ids)):
        cut = processor.encode_conversation(messages, model_max_length=limit)
        assert len(cut.labels) == len(cut.visual_target_mask) == limit


def test_sentencepiece_does_not_begin_a_text_in_its_middle():
    """ "[/INST]Yes" is not "[/INST] Yes": the answer is encoded as what follows the prompt."""
    tokenizer = sentencepiece_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("' ' + m['content']", "m['content']")
    messages = chat("what is this?", "a cat", "and this?", "a mat")
    own = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    processor = build_processor(tokenizer, version="auto")
    assert processor.encode_conversation(messages).input_ids.tolist() == own


def test_reasoning_in_the_data_is_what_the_template_makes_of_it():
    """The template moves thoughts: it gets the contents, and its tokens in them count only in answers."""
    processor = build_processor(tokenizer_with("reasoning"), version="auto")
    think = processor.tokenizer.convert_tokens_to_ids("<think>")
    thought = "<think>\nTwo and two.\n</think>\n\n4"
    encoded = processor.encode_conversation(chat("<think> 2 + 2?", thought, "Sure?", thought))
    assert supervised_text(processor, encoded) == f"4<|im_end|>{thought}<|im_end|>"
    assert encoded.input_ids.tolist().count(think) == 1


def test_an_answer_that_nothing_ends_is_ended(caplog):
    """By the token with which the next turn begins, else by the tokenizer's own; the model must learn to stop."""
    with caplog.at_level("INFO"):
        processor = build_processor(tokenizer_with("no_end"), version="auto")
    assert "does not end an answer: '<|user|>' will" in caplog.text
    encoded = processor.encode_conversation(chat("Hi", "Yes.", "Why?", "No."))
    assert supervised_text(processor, encoded) == "Yes.<|user|>No.<|user|>"
    assert processor.tokenizer.convert_tokens_to_ids("<|user|>") in processor.end_of_turn_token_ids

    template = tokenizer_with("alpaca").chat_template.replace(" + eos_token", "")
    processor = build_processor(tokenizer_with(template), version="auto")
    encoded = processor.encode_conversation(chat("Hi", "Yes.", "Why?", "No."))
    assert supervised_text(processor, encoded) == "Yes.No.\n\n<|eot_id|>"
    tokenizer = tokenizer_with(template)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"would never learn to stop\. Set eos_token"):
        get_chat_template("auto", tokenizer)


def test_both_ends_of_a_turn_stop_an_answer():
    processor = build_processor(tokenizer_with("two_ends"), version="auto")
    assert processor.template.end_tokens == ("<|eot_id|>", "<|im_end|>")
    ends = processor.tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|im_end|>"])
    assert processor.end_of_turn_token_ids == sorted(ends)


@pytest.mark.parametrize("name", [*FORMATS, "auto-date"])
def test_a_saved_folder_holds_the_template_that_was_trained(name, tmp_path):
    """Other programs apply the tokenizer's template, or the processor's, and know nothing of `version`."""
    processor = processor_for(name)
    processor.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert MetaMorphProcessor.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    for messages, prompt in (
        (chat("Hi"), True),
        (chat("Hi", "Yes.", "Why?", system="Be nice."), True),
        (chat("Hi", "Yes."), False),
    ):
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
        assert text == processor.apply_chat_template(messages, add_generation_prompt=prompt)
    if not name.startswith("auto"):
        parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What?"}]}]
        text = tokenizer.apply_chat_template(parts, add_generation_prompt=True, tokenize=False)
        assert text == processor.apply_chat_template(parts, add_generation_prompt=True)


def test_the_day_of_a_template_stays(monkeypatch, tmp_path):
    class Clock(datetime):
        day = 1

        @classmethod
        def now(cls):
            return cls(2026, 5, cls.day)

    monkeypatch.setattr(template_date, "datetime", Clock)
    first = build_processor(tokenizer_with("date"), version="auto")
    assert first.apply_chat_template(chat("Hi")).startswith("<|begin_of_text|>[01 May 2026]<|im_start|>")
    first.save_pretrained(tmp_path)
    Clock.day = 2
    assert MetaMorphProcessor.from_pretrained(tmp_path).chat_template == first.chat_template
    assert "[02 May 2026]" in build_processor(tokenizer_with("date"), version="auto").apply_chat_template(chat("Hi"))
    computed = tokenizer_with("date").chat_template.replace("'%d %B %Y'", "messages[0]['role']")
    with pytest.raises(ValueError, match="prints the date in a format that it computes"):
        get_chat_template("auto", tokenizer_with(computed))


def test_auto_puts_a_system_message_that_the_template_refuses_before_the_first_question():
    processor = build_processor(tokenizer_with("mistral"), version="auto")
    messages = chat("Hi", "Yes.", "Why?", "No.", system="Be nice.")
    assert processor.apply_chat_template(messages) == (
        "<|begin_of_text|>[INST] Be nice.\n\nHi [/INST] Yes.<|eot_id|>[INST] Why? [/INST] No.<|eot_id|>"
    )


def test_auto_does_not_accept_a_system_message_that_wanders():
    """Some templates put the system message before the *last* question: earlier turns would change their text."""
    wandering = (
        "{{ bos_token }}{% set s = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
        "{% for m in messages if m['role'] != 'system' %}"
        "{% if m['role'] == 'user' %}[INST] {% if loop.last or loop.revindex == 2 %}{{ s }}{% endif %}"
        "{{ m['content'] }}[/INST]{% else %} {{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    processor = build_processor(tokenizer_with(wandering), version="auto")
    text = processor.apply_chat_template(chat("Hi", "Yes.", "Why?", "No.", system="Be nice."))
    assert text.startswith("<|begin_of_text|>[INST] Be nice.\n\nHi[/INST] Yes.")
    assert text.count("Be nice.") == 1


def test_auto_learns_what_the_template_writes_between_prompt_and_answer():
    processor = build_processor(tokenizer_with("thinking"), version="auto")
    encoded = processor.encode_conversation(chat("Hi", "Yes.", "Why?", "No."))
    assert supervised_text(processor, encoded) == "Yes.<|im_end|><think>\n\n</think>\n\nNo.<|im_end|>"


def test_contents_are_no_template():
    processor = build_processor(tokenizer_with("qwen"), version="auto")
    messages = chat("{{ 7 * 7 }} {% raw %}", "\ue0001\ue001 <|im_\ue002end|> \ue002\ue002")
    text = processor.apply_chat_template(messages)
    assert all(message["content"] in text for message in messages)
    assert processor.tokenizer.decode(processor.encode_conversation(messages).input_ids) == text
    assert processor(text=text)["input_ids"] == [processor.encode_conversation(messages).input_ids.tolist()]


@pytest.mark.parametrize("version", ["llama3", "chatml", "plain"])
def test_contents_give_no_control_tokens_that_overlap_are_short_or_are_written_otherwise(version):
    tokenizer = tokenizer_with()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens(
        [
            AddedToken("<<", special=True, normalized=False),
            AddedToken("§", special=True, normalized=False),
            AddedToken("<|bad|>", special=True, normalized=True),
            AddedToken("<plain>", normalized=False),
        ]
    )
    processor = build_processor(tokenizer, version=version)
    names = {*tokenizer.all_special_tokens, *processor.template.control_tokens}
    controls = {*tokenizer.convert_tokens_to_ids(sorted(names))} - {tokenizer.unk_token_id}  # which spells "§"
    ordinary = tokenizer.convert_tokens_to_ids("<plain>")

    def found(*contents):
        ids = processor.encode_conversation(chat(*contents)).input_ids.tolist()
        return [token for token in ids if token in controls], ids.count(ordinary)

    neutral, _ = found("x", "y")
    for content in (
        *(
            "hi <<|eot_id|>",
            "<<<",
            "<|eot_id|><|eot_id|>",
            "§",
            "a§§b",
            "§<|eot_id|>§",
            "\ue002§",
            "\ue002\ue003§\ue002",
        ),
        *(
            "<|BAD|>",
            "<|BAD|> <plain> x",
            "<plain><|Bad|><plain><|bAd|>§",
            "<<plain>",
            "\ue003<|BAD|>\ue002 <plain>\ue003",
        ),
    ):
        assert found(content, content) == (neutral, 2 * content.count("<plain>")), content
        text = processor.apply_chat_template(chat(content, "y"))
        assert content in text


_MANY = "{% for a in range(9999) %}"
_DOUBLED = "{% set n = namespace(x='xxxxxxxxxx', l=[1]) %}{% for _ in range(99) %}"
ENDLESS = {
    "nested loops": _MANY * 3 + "x" + "{% endfor %}" * 3,
    "doubled by +": _DOUBLED + "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubled by ~": _DOUBLED + "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubled by a list": _DOUBLED + "{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
    "doubled by replace": _DOUBLED + "{% set n.x = n.x.replace('x', n.x) %}{% endfor %}",
    "doubled by a filter": _DOUBLED + "{% set n.x = n.x | replace('x', n.x) %}{% endfor %}",
    "doubled by join": _DOUBLED + "{% set n.x = [n.x, n.x] | join %}{% endfor %}",
    "doubled by a block": _DOUBLED + "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "namespaces": _DOUBLED + "{% set n.l = namespace(a=n.l, b=n.l) %}{% endfor %}{{ n.l }}{{ 'x' * 10**9 }}",
    "times": "{{ 'x' * 10**10 }}",
    "times, of a list": "{% set x = [0] * 10**10 %}",
    "power": "{% set x = 10 ** 10 ** 9 %}",
    "width": "{{ '%9999999999d' % 1 }}",
    "format": "{{ '{:9999999999}'.format(1) }}",
    "format filter": "{{ '%9999999999d' | format(1) }}",
    "centred": "{{ 'x' | center(10**10) }}",
    "constant": "{{ 'x' | center(9999999999) }}",
    "justified": "{{ 'x'.ljust(10**10) }}",
    "indent": "{{ messages | tojson(indent=10**10) }}",
    "slices": "{{ [1] | slice(10**10) | list }}",
    "map": "{{ range(99999) | map('center', 9999) | join }}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop(range(9999)) if loop.depth < 9 }}{% endfor %}",
    "long text": _MANY + "x" * 10_000 + "{% endfor %}",
    "lipsum": "{{ lipsum(10**9) }}",
}


@pytest.mark.parametrize("hostile", ENDLESS.values(), ids=list(ENDLESS))
def test_a_template_cannot_take_endless_time_or_memory(hostile):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = tokenizer_with("qwen").chat_template
    for condition in ("true", "messages[0]['content'] == 'Hi'"):  # also where only some contents make it endless
        tokenizer = tokenizer_with(f"{{% if {condition} %}}{hostile}{{% endif %}}{source}")
        with pytest.raises(ValueError, match=r"the chat template of .* cannot render the roles"):
            build_processor(tokenizer, version="auto").apply_chat_template(chat("Hi", "Yes."))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_the_budget_of_a_template_is_that_of_one_rendering():
    processor = build_processor(tokenizer_with("thinking"), version="auto")
    long = chat(*["word " * 2000] * 100)
    with ThreadPoolExecutor(4) as threads:
        texts = list(threads.map(processor.apply_chat_template, [long] * 8))
    assert len(set(texts)) == 1


def test_an_unknown_version_names_the_allowed_ones():
    with pytest.raises(ValueError, match="--version 'v1' is unknown") as error:
        get_chat_template("v1", golden_tokenizer())
    assert all(version in str(error.value) for version in VERSIONS)


def test_auto_without_a_chat_template_names_the_mend():
    with pytest.raises(ValueError, match="has none; choose one of llama3, llama3_original, chatml, plain"):
        get_chat_template("auto", golden_tokenizer())


def test_a_tokenizer_without_the_control_tokens_is_refused():
    with pytest.raises(ValueError, match=r"--version chatml needs the tokens <\|im_start\|>, <\|im_end\|>.*auto"):
        get_chat_template("chatml", golden_tokenizer())
    with pytest.raises(ValueError, match=r"--version llama3 needs the tokens <\|start_header_id\|>"):
        get_chat_template("llama3", sentencepiece_tokenizer())


def test_plain_needs_an_end_of_sequence_token():
    tokenizer = golden_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"--version plain.*set eos_token"):
        get_chat_template("plain", tokenizer)


def test_auto_names_the_roles_that_the_template_refuses():
    processor = build_processor(tokenizer_with("mistral"), version="auto")
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(ValueError, match=r"cannot render the roles \['user', 'user'\]: Roles must alternate"):
        processor.encode_conversation(messages)


def test_auto_refuses_a_template_whose_prompts_differ_from_its_conversations():
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    )
    with pytest.raises(ValueError, match="training and use would differ"):
        get_chat_template("auto", tokenizer_with(template))


def test_auto_refuses_a_template_that_drops_messages():
    with pytest.raises(ValueError, match="drops, repeats or reorders messages"):
        get_chat_template("auto", tokenizer_with("{{ messages[0]['content'] + eos_token }}"))
