"""Interleaved decoding: the grammar, caches, batches, budgets, chats, and what Transformers' `generate` promises."""

import functools
from types import SimpleNamespace

import pytest
import torch
from model_parts import build_tiny_model, image_ids, tiny_config
from torch import Tensor
from transformers import BloomConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList, MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from metamorph.models.generation import UNSUPPORTED_FIELDS, ImageGrammarLogitsProcessor, MetaMorphGenerationMixin
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration


PLACEHOLDER, START, END, EOS, PAD = 61, 62, 63, 2, 0
N = 4


class Wish(LogitsProcessor):
    """Stands for a trained model: wants a given token at given steps. The rest is the model's own choice."""

    def __init__(self, prompt_length: int, wishes: dict[int, int], row: int | None = None):
        self.prompt_length, self.wishes, self.row = prompt_length, wishes, row

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.wishes.get(input_ids.shape[1] - self.prompt_length)
        if token is not None:
            scores = scores.clone()
            scores[slice(None) if self.row is None else self.row, token] = 1e4
        return scores


@pytest.fixture(scope="module")
def model() -> MetaMorphForConditionalGeneration:
    return build_tiny_model()


def wish(prompt: Tensor, wishes: dict[int, int], row: int | None = None) -> LogitsProcessorList:
    return LogitsProcessorList([Wish(prompt.shape[1], wishes, row)])


def left_pad(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    length = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def generate(model, ids, **kwargs):
    kwargs = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 16, **kwargs}
    return model.generate(input_ids=ids, **kwargs)


def test_image_has_exactly_n_tokens_and_its_end(model):
    ids = torch.tensor([[1, 7, 9]])
    output = generate(model, ids, logits_processor=wish(ids, {2: START}))
    generated = output.sequences[0, 3:].tolist()
    assert generated[2:8] == [START, *[PLACEHOLDER] * N, END]
    assert generated.count(PLACEHOLDER) == N
    assert output.visual_tokens.shape == (1, N, 24)
    assert output.num_images.tolist() == [1]
    assert torch.allclose(output.visual_tokens.norm(dim=-1), torch.ones(1, N))


def test_generated_visual_tokens_are_the_heads_predictions(model):
    """A teacher-forced pass over the finished sequence predicts, at each placeholder, the token that was generated."""
    ids = torch.tensor([[1, 7, 9]])
    output = generate(model, ids, logits_processor=wish(ids, {0: START}))
    hidden = model.model(output.sequences, visual_tokens=output.visual_tokens).last_hidden_state
    positions = (output.sequences[0] == PLACEHOLDER).nonzero().squeeze(1)
    predictions = torch.nn.functional.normalize(model.vision_head(hidden[0, positions - 1]), dim=-1)
    torch.testing.assert_close(predictions, output.visual_tokens[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_r35_cached_equals_uncached(model, cache):
    ids = torch.tensor([[1, 7, *image_ids(model.config), 9]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    wishes = wish(ids, {1: START, 9: START})
    reference = generate(model, ids, pixel_values=pixels, logits_processor=wishes, use_cache=False, max_new_tokens=20)
    assert reference.num_images.tolist() == [2]
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    output = generate(model, ids, pixel_values=pixels, logits_processor=wishes, max_new_tokens=20, **options)
    assert torch.equal(output.sequences, reference.sequences)
    torch.testing.assert_close(output.visual_tokens, reference.visual_tokens, rtol=1e-4, atol=1e-5)


def test_r35_an_image_costs_its_own_tokens_only(model):
    """With a cache, every step after the prompt passes one position."""
    lengths = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    ids = torch.tensor([[1, 7, 9]])
    generate(model, ids, logits_processor=wish(ids, {0: START}), max_new_tokens=8)
    handle.remove()
    assert lengths == [3] + [1] * 7


def test_r35_batched_equals_single(model):
    """Rows of different length, with and without images in prompt and answer, each in its own state."""
    image = image_ids(model.config)
    prompts = [[1, 7, 9], [1, *image, 5, 6], [1, 8], [1, *image, 4, *image, 11, 12]]
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    per_row = [pixels[:0], pixels[:1], pixels[:0], pixels[1:]]
    wishes = [{0: START}, {3: START}, {}, {1: START, 8: START}]
    ids, mask = left_pad(prompts)
    processors = LogitsProcessorList([Wish(ids.shape[1], wishes[row], row) for row in range(4)])
    batched = generate(
        model, ids, attention_mask=mask, pixel_values=pixels, logits_processor=processors, max_new_tokens=24
    )
    images = batched.visual_tokens.split(batched.num_images.tolist())
    assert batched.num_images[3] == 2
    for row, prompt in enumerate(prompts):
        single_ids = torch.tensor([prompt])
        single = generate(
            model,
            single_ids,
            pixel_values=per_row[row],
            logits_processor=wish(single_ids, wishes[row]),
            max_new_tokens=24,
        )
        answer = single.sequences[0, len(prompt) :]
        assert torch.equal(batched.sequences[row, ids.shape[1] :][: len(answer)], answer)
        torch.testing.assert_close(images[row], single.visual_tokens, rtol=1e-4, atol=1e-5)


def test_r20_batch_of_text_only_and_image_prompts(model):
    image = image_ids(model.config)
    ids, mask = left_pad([[1, 5], [1, *image, 5]])
    output = generate(model, ids, attention_mask=mask, pixel_values=torch.randn(1, 3, 32, 32))
    assert output.sequences.shape[0] == 2


def test_r36_end_of_sequence_inside_an_image_is_impossible(model):
    ids = torch.tensor([[1, 7, 9]])
    wishes = wish(ids, {0: START, **dict.fromkeys(range(1, 6), EOS), 6: EOS})
    output = generate(model, ids, logits_processor=wishes)
    assert output.sequences[0, 3:].tolist() == [START, *[PLACEHOLDER] * N, END, EOS]


def test_r37_images_do_not_stick_together(model):
    """Directly adjacent images have N tokens each, and text follows."""
    ids = torch.tensor([[1, 7, 9]])
    output = generate(model, ids, logits_processor=wish(ids, {0: START, 6: START, 12: 17}), max_new_tokens=13)
    image = image_ids(model.config)
    assert output.sequences[0, 3:].tolist() == [*image, *image, 17]
    assert output.visual_tokens.shape == (2, N, 24)
    assert not torch.allclose(output.visual_tokens[0], output.visual_tokens[1])


def test_placeholders_and_end_are_impossible_outside(model):
    ids = torch.tensor([[1, 7, 9]])
    output = generate(model, ids, logits_processor=wish(ids, dict.fromkeys(range(16), PLACEHOLDER)))
    assert PLACEHOLDER not in output.sequences
    output = generate(model, ids, logits_processor=wish(ids, dict.fromkeys(range(16), END)))
    assert END not in output.sequences


@pytest.mark.parametrize("budget", [1, 5, 6, 7, 11, 12])
def test_r38_max_new_tokens_is_exact_and_no_image_is_begun_that_does_not_fit(model, budget):
    ids = torch.tensor([[1, 7, 9]])
    always = wish(ids, dict.fromkeys(range(20), START))
    output = generate(model, ids, logits_processor=always, max_new_tokens=budget, eos_token_id=None)
    assert output.sequences.shape[1] - 3 == budget
    assert output.num_images.tolist() == [budget // (N + 2)]
    assert (output.sequences == PLACEHOLDER).sum() == N * (budget // (N + 2))


@pytest.mark.parametrize("limit", [{"max_new_tokens": 8}, {"max_length": 11}])
@pytest.mark.parametrize("place", ["argument", "generation_config", "model", "model next to a generation_config"])
def test_the_final_limit_bounds_images_wherever_it_comes_from(limit, place):
    """Room for one image and two tokens: no second one is begun."""
    model = build_tiny_model()
    ids = torch.tensor([[1, 7, 9]])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    if place == "argument":
        options |= limit
    elif place == "generation_config":
        options = {"generation_config": GenerationConfig(**options, **limit)}
    else:
        model.generation_config.update(**limit)
        if place != "model":
            options = {"generation_config": GenerationConfig(**options)}
    output = model.generate(ids, logits_processor=wish(ids, dict.fromkeys(range(20), START)), **options)
    answer = output.sequences[0, 3:].tolist()
    assert answer[:6] == image_ids(model.config)
    assert len(answer) == 8
    assert START not in answer[6:]


def test_without_any_limit_twenty_tokens_are_generated(model):
    ids = torch.tensor([[1, 7, 9]])
    always = wish(ids, dict.fromkeys(range(20), START))
    output = model.generate(ids, logits_processor=always, eos_token_id=None, do_sample=False)
    assert output.sequences.shape[1] == 23
    assert output.num_images.tolist() == [3]
    assert START not in output.sequences[0, -2:]


def test_a_forced_end_of_sequence_cuts_no_image(model):
    ids = torch.tensor([[1, 7, 9]])
    always = wish(ids, dict.fromkeys(range(20), START))
    output = generate(model, ids, logits_processor=always, max_new_tokens=12, forced_eos_token_id=EOS)
    assert output.num_images.tolist() == [1]
    assert output.sequences[0, -1] == EOS


def test_prompt_that_ends_in_image_start_begins_with_an_image(model):
    ids = torch.tensor([[1, 7, START]])
    output = generate(model, ids, max_new_tokens=N + 1)
    assert output.sequences[0, 3:].tolist() == [*[PLACEHOLDER] * N, END]
    assert output.visual_tokens.shape == (1, N, 24)
    with pytest.raises(ValueError, match=f"needs {N + 1} more tokens, but the answer may have {N}: .* max_new_tokens"):
        generate(model, ids, max_new_tokens=N)


def test_images_can_be_forbidden(model):
    ids = torch.tensor([[1, 7, 9]])
    always = wish(ids, dict.fromkeys(range(20), START))
    assert generate(model, ids, logits_processor=always, allow_images=False).num_images.tolist() == [0]
    text_model = build_tiny_model(use_vision_ar=False)
    assert generate(text_model, ids, logits_processor=always).num_images.tolist() == [0]


def test_the_context_is_that_of_the_language_model():
    """Bloom's configuration names none."""
    assert build_tiny_model(text_config={"max_position_embeddings": 99}).context_length == 99
    bloom = tiny_config()
    bloom.text_config = BloomConfig()
    assert MetaMorphGenerationMixin.context_length.fget(SimpleNamespace(config=bloom)) is None


def test_model_without_start_and_end_tokens_answers_in_text():
    model = build_tiny_model(mm_use_im_start_end=False, image_start_token_id=None, image_end_token_id=None)
    ids = torch.tensor([[1, *[PLACEHOLDER] * N, *[PLACEHOLDER] * N, 5]])
    output = generate(model, ids, pixel_values=torch.randn(2, 3, 32, 32))
    assert (output.sequences[:, ids.shape[1] :] != PLACEHOLDER).all()


def test_chat_goes_on_from_generated_visual_tokens(model):
    """The next turn needs no pixels, and gives the same with and without the cache of the first turn."""
    ids = torch.tensor([[1, 7, *image_ids(model.config), 9]])
    seen = model.get_visual_tokens(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    first = generate(model, ids, visual_tokens=seen, logits_processor=wish(ids, {0: START, 6: 9}), max_new_tokens=7)
    longer = torch.cat([first.sequences, torch.tensor([[4, 5]])], dim=1)
    images = torch.cat([seen, first.visual_tokens])
    fresh = generate(model, longer, visual_tokens=images, logits_processor=wish(longer, {1: START}))
    continued = generate(
        model,
        longer,
        visual_tokens=images,
        logits_processor=wish(longer, {1: START}),
        past_key_values=first.past_key_values,
    )
    assert fresh.num_images.tolist() == [1]
    assert torch.equal(continued.sequences, fresh.sequences)
    torch.testing.assert_close(continued.visual_tokens, fresh.visual_tokens, rtol=1e-4, atol=1e-5)


def test_r35_sampling_arguments_are_honoured(model):
    ids = torch.tensor([[1, 7, 9]])
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 5.0, "allow_images": False, "max_new_tokens": 8, "eos_token_id": None}
    samples = {tuple(generate(model, ids, **options).sequences[0].tolist()) for _ in range(4)}
    assert len(samples) > 1
    greedy = {tuple(generate(model, ids, **options, top_k=1).sequences[0].tolist()) for _ in range(3)}
    assert len(greedy) == 1


def test_num_return_sequences_repeats_images_with_their_row(model):
    image = image_ids(model.config)
    ids = torch.tensor([[1, *image, *image, 5], [1, 6, 7, 8, 9, 10, 11, 12, *image]])
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    once = generate(model, ids, pixel_values=pixels)
    torch.manual_seed(0)
    twice = generate(model, ids, pixel_values=pixels, num_return_sequences=2, do_sample=True, top_k=1)
    assert torch.equal(twice.sequences, once.sequences.repeat_interleave(2, dim=0))


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamer_and_plain_sequences(model):
    ids = torch.tensor([[1, 7, 9]])
    streamer = Recorder()
    sequences = generate(
        model, ids, streamer=streamer, logits_processor=wish(ids, {0: START}), return_dict_in_generate=False
    )
    assert isinstance(sequences, Tensor)
    assert streamer.tokens == sequences[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize("place", ["argument", "generation_config", "model"])
def test_plain_sequences_are_returned_wherever_they_are_asked_for(place):
    model, ids = build_tiny_model(), torch.tensor([[1, 7, 9]])
    plain = GenerationConfig(return_dict_in_generate=False)
    options = {"argument": {"return_dict_in_generate": False}, "generation_config": {"generation_config": plain}}
    expected = generate(model, ids)
    if place == "model":
        model.generation_config.return_dict_in_generate = False
    sequences = generate(model, ids, **options.get(place, {}))
    assert isinstance(sequences, Tensor)
    assert torch.equal(sequences, expected.sequences)
    # What is said nearer to the call wins, and a configuration that says nothing about it changes nothing.
    assert isinstance(generate(model, ids, return_dict_in_generate=True, generation_config=plain), ModelOutput)
    config = GenerationConfig(do_sample=False)
    assert isinstance(generate(model, ids, generation_config=config), Tensor) == (place == "model")


def test_output_is_cut_like_sequences(model):
    output = generate(model, torch.tensor([[1, 7, 9]]))
    assert torch.equal(output[:, 3:], output.sequences[:, 3:])
    assert output["sequences"] is output[0] is output.sequences


def test_pixels_and_visual_tokens_in_one_prompt(model):
    image = image_ids(model.config)
    ids = torch.tensor([[1, *image, 5, *image], [1, 6, *image, *image]])
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    tokens = model.get_visual_tokens(pixels)
    index = torch.tensor([1, 2])
    mixed = generate(model, ids, pixel_values=pixels[[0, 3]], visual_tokens=tokens[index], visual_tokens_index=index)
    assert torch.equal(mixed.sequences, generate(model, ids, pixel_values=pixels).sequences)
    with pytest.raises(ValueError, match="say by visual_tokens_index which images"):
        generate(model, ids, pixel_values=pixels[[0, 3]], visual_tokens=tokens[index])


def test_image_cut_by_a_stopping_criterion_is_left_out(model):
    class Stop(MaxTimeCriteria):
        def __init__(self) -> None:
            super().__init__(max_time=1e9)

        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 3 + 6 + 3)

    ids = torch.tensor([[1, 7, 9]])
    output = generate(
        model, ids, logits_processor=wish(ids, {0: START, 6: START}), stopping_criteria=[Stop()], max_new_tokens=30
    )
    assert output.num_images.tolist() == [1]
    assert output.visual_tokens.shape == (1, N, 24)


def forbid_encoding(model, monkeypatch):
    def encode(pixel_values: Tensor) -> Tensor:
        raise AssertionError("the images were encoded")

    monkeypatch.setattr(model, "get_visual_tokens", encode)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("assistant_early_exit", 1),
        ("cache_implementation", "paged"),
        ("constraints", ["any"]),
        ("dola_layers", "low"),
        ("force_words_ids", [[5]]),
        ("guidance_scale", 1.5),
        ("num_beams", 2),
        ("penalty_alpha", 0.6),
        ("prefill_chunk_size", 2),
        ("prompt_lookup_num_tokens", 3),
        ("token_healing", True),
        ("use_mtp", True),
    ],
)
@pytest.mark.parametrize("place", ["argument", "generation_config", "model"])
def test_unsupported_modes_are_refused_by_name(monkeypatch, name, value, place):
    """Before anything is computed, wherever the setting comes from."""
    model = build_tiny_model()
    forbid_encoding(model, monkeypatch)
    if not hasattr(model.generation_config, name):
        pytest.skip("this release of Transformers does not have it")
    options = {name: value} if place == "argument" else {}
    if place == "generation_config":
        options = {"generation_config": GenerationConfig()}
        setattr(options["generation_config"], name, value)
    if place == "model":
        setattr(model.generation_config, name, value)
    ids = torch.tensor([[1, *image_ids(model.config), 7]])
    with pytest.raises(ValueError, match=f"{name}=.* is not supported by MetaMorph's generate"):
        model.generate(ids, pixel_values=torch.randn(1, 3, 32, 32), **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("assistant_model", build_tiny_model()),
        ("custom_generate", "somebody/a-way-to-decode"),
        ("custom_generate", lambda model, **kwargs: None),
        ("inputs_embeds", torch.zeros(1, 3, 32)),
        ("negative_prompt_ids", torch.tensor([[1, 2]])),
        ("trust_remote_code", True),
    ],
)
def test_unsupported_arguments_are_refused_by_name(model, monkeypatch, name, value):
    with monkeypatch.context() as patch:
        forbid_encoding(model, patch)
        with pytest.raises(ValueError, match=f"{name} is not supported by MetaMorph's generate"):
            generate(model, torch.tensor([[1, 7, 9]]), **{name: value})


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused(model, name):
    with pytest.raises(ValueError, match="continuous batching"):
        getattr(model, name)([[1, 7, 9]])


SUPPORTED_FIELDS = {
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "do_sample",
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "temperature", "top_k", "top_p", "min_p",
    "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "encoder_repetition_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "renormalize_logits",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "watermarking_config", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "pad_token_id", "bos_token_id", "eos_token_id", "compile_config", "disable_compile",
}  # fmt: skip
FIELDS_OF_REFUSED_MODES = {
    "early_stopping", "length_penalty", "diversity_penalty", "low_memory", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size",
    "assistant_lookbehind", "target_lookbehind", "decoder_start_token_id",
}  # fmt: skip


def test_every_field_of_generation_config_is_known():
    """A release of Transformers with another one asks for a decision: does it act here, or is it refused?"""
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    assert fields <= SUPPORTED_FIELDS | FIELDS_OF_REFUSED_MODES | set(UNSUPPORTED_FIELDS)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 2.0},
        {"encoder_repetition_penalty": 2.0},
        {"no_repeat_ngram_size": 1},
        {"encoder_no_repeat_ngram_size": 1},
        {"bad_words_ids": [[PLACEHOLDER], [END]]},
        {"suppress_tokens": [PLACEHOLDER, END]},
        {"sequence_bias": {(PLACEHOLDER,): -1e3, (5,): 1e3}},
        {"exponential_decay_length_penalty": (4, 2.0)},
        {"min_new_tokens": 14},
        {"min_length": 17},
        {"forced_bos_token_id": 5},
        {"remove_invalid_values": True},
        {"renormalize_logits": True},
        {"watermarking_config": {"bias": 1e3, "greenlist_ratio": 0.5}},
        {"max_time": 1e9},
        {"do_sample": True, "temperature": 3.0, "top_k": 3},
        {"do_sample": True, "top_p": 0.9, "min_p": 0.01},
        {"do_sample": True, "typical_p": 0.9},
        {"do_sample": True, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01},
        {"do_sample": True, "top_h": 0.5},
    ],
    ids=lambda options: "-".join(options),
)
def test_other_settings_leave_images_complete(model, options):
    ids = torch.tensor([[1, 7, 9]])
    torch.manual_seed(0)
    output = generate(model, ids, logits_processor=wish(ids, {1: START}), **options)
    assert output.sequences[0, 4:10].tolist() == image_ids(model.config)
    assert output.visual_tokens.shape == (1, N, 24)
    assert output.visual_tokens.isfinite().all()


def test_further_outputs_are_those_of_transformers(model):
    ids = torch.tensor([[1, 7, 9]])
    asked = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    output = generate(model, ids, logits_processor=wish(ids, {0: START}), **dict.fromkeys(asked, True))
    assert len(output.scores) == len(output.logits) == len(output.hidden_states) == 16
    assert output.scores[1][0].isfinite().nonzero().flatten().tolist() == [PLACEHOLDER]


def test_predictions_are_kept_where_a_graph_reuses_its_memory(monkeypatch):
    """CUDA graphs write each step's outputs into the same memory (`cache_implementation="static"` on a GPU)."""
    model = build_tiny_model()
    ids = torch.tensor([[1, 7, START]])
    reference = generate(model, ids)
    buffer, forward = torch.empty(1, 1, 24), model.forward

    @functools.wraps(forward)  # `generate` looks at the names of its arguments
    def graphed(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.visual_prediction = buffer.copy_(output.visual_prediction)
        return output

    monkeypatch.setattr(model, "forward", graphed)
    output = generate(model, ids)
    assert torch.equal(output.visual_tokens, reference.visual_tokens)


def test_missing_images_are_an_error(model):
    with pytest.raises(ValueError, match="4 image placeholders, but 0 images"):
        generate(model, torch.tensor([[1, *image_ids(model.config)]]))


def test_grammar_reads_its_state_from_the_ids(model):
    grammar = ImageGrammarLogitsProcessor(model.config, max_length=100)
    p, s, e = PLACEHOLDER, START, END
    rows = torch.tensor([[1, 1, 1, s, p, p], [1, s, p, p, p, p], [s, p, p, p, p, e], [1, 1, 1, 1, 1, s]])
    scores = grammar(rows, torch.zeros(4, 64))
    allowed = [row.isfinite().nonzero().squeeze(1).tolist() for row in scores]
    assert allowed[0] == [p]
    assert allowed[1] == [e]
    assert allowed[2] == [i for i in range(64) if i not in (p, e)]
    assert allowed[3] == [p]
