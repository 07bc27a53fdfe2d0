"""The shipped mini-llama: what its card says, what Transformers loads, and what it answers."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from metamorph.mini import asset_path
from metamorph.miniature.world.language import caption
from metamorph.miniature.world.scenes import COLORS, SHAPES, SIZES, is_reserved, single_scenes
from tools.miniature.build_llama import (
    GATES,
    LlamaRecipe,
    answered_exactly,
    batch_loss,
    encode,
    new_model,
)
from tools.miniature.llama_data import (
    build_vocabulary,
    evaluation_tasks,
    fact_tasks,
    list_conversation,
    training_conversation,
    words_of,
)
from tools.miniature.llama_init import FREE_HEADS, LOOK_BACK
from tools.miniature.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(asset_path("mini-llama"))


@pytest.fixture(scope="module")
def llama():
    model, report = AutoModelForCausalLM.from_pretrained(
        asset_path("mini-llama"), dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.fixture(scope="module")
def conversations():
    rng = np.random.default_rng(11)
    return [training_conversation(rng) for _ in range(400)]


def test_answers_reach_the_gates_on_a_small_sample(llama, tokenizer):
    tasks = evaluation_tasks(np.random.default_rng(2024), 24)
    verdicts = answered_exactly(llama, tokenizer, tasks)
    questions = [right for task, right in zip(tasks, verdicts, strict=True) if task.is_question]
    assert np.mean(questions) >= GATES["vqa.all"]
    pairs = [right for task, right in zip(tasks, verdicts, strict=True) if task.num_objects == 2]
    assert np.mean(pairs) >= 0.9  # which attribute belongs to which object
    assert np.mean(answered_exactly(llama, tokenizer, fact_tasks())) == GATES["facts"]


def test_attention_starts_with_look_ups(tokenizer):
    """Before any training: a head that looks back, and one that finds the same word."""
    model = new_model(LlamaRecipe(), tokenizer, seed=0).eval()
    ids = tokenizer("red circle and blue square and red circle and blue square", return_tensors="pt").input_ids
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    rows = torch.arange(8, ids.shape[1])
    for head, distance in enumerate(LOOK_BACK[0]):
        assert (attentions[0][0, head, rows].argmax(-1) == rows - distance).float().mean() >= 0.75
    for layer in model.model.layers[2:]:
        width = layer.self_attn.head_dim
        queries, keys = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        assert torch.equal(queries[: -FREE_HEADS * width], keys[: -FREE_HEADS * width])
        assert not torch.equal(queries[-width:], keys[-width:])


def test_lists_never_tell_all_of_two_things():
    rng = np.random.default_rng(5)
    for _ in range(300):
        told = list_conversation(rng, count_share=0.3)[0]["content"].split("\n")[0]
        things = told.rstrip(".").lower().split(" and ")
        complete = [
            thing
            for thing in things
            if any(size in thing for size in SIZES)
            and any(color in thing for color in COLORS)
            and any(shape in thing for shape in SHAPES)
            and " in the " in thing
        ]
        assert len(things) >= 2
        assert len(things) > 2 or not complete


def test_generate_says_the_answer_and_stops(llama, tokenizer):
    task = evaluation_tasks(np.random.default_rng(3), 4)[0]
    prompt = tokenizer.apply_chat_template(
        task.conversation()[:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = llama.generate(**prompt, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == task.answer


def test_answered_exactly_agrees_with_generate(tokenizer):
    torch.manual_seed(0)
    model = new_model(LlamaRecipe(num_hidden_layers=1), tokenizer, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tasks = fact_tasks(repeats=1)[:24]
    for _ in range(20):
        loss, _ = batch_loss(model, tokenizer, [task.conversation() for task in tasks[:12]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    verdicts = answered_exactly(model.eval(), tokenizer, tasks)
    assert 0 < sum(verdicts) < len(tasks)
    for task, right in zip(tasks, verdicts, strict=True):
        prompt = tokenizer.apply_chat_template(
            task.conversation()[:1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**prompt, max_new_tokens=24)[0, prompt["input_ids"].shape[1] :]
        said = tokenizer.decode(ids)
        assert (said == task.answer + "<|eot_id|>") == right


def test_world_sentences_survive_the_tokenizer_word_by_word(tokenizer, conversations):
    for conversation in conversations:
        for turn in conversation:
            ids = tokenizer(turn["content"]).input_ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == turn["content"]
            words = words_of(turn["content"])
            assert len(ids) == 1 + len(words) + turn["content"].count("\n")


def test_shipped_tokenizer_is_the_worlds(tokenizer):
    assert build_tokenizer(build_vocabulary()).get_vocab() == tokenizer.get_vocab()
    assert "<image>" not in tokenizer.get_vocab()


def test_labels_are_the_assistants_words(tokenizer, conversations):
    _, attention_mask, labels = encode(tokenizer, conversations[:8])
    for row, conversation in enumerate(conversations[:8]):
        spoken = [turn["content"] + "<|eot_id|>" for turn in conversation if turn["role"] == "assistant"]
        assert tokenizer.decode(labels[row][labels[row] != -100]) == "".join(spoken)
        assert not (labels[row] != -100)[attention_mask[row] == 0].any()


def test_chunks_make_one_batch(tokenizer, conversations):
    model = new_model(LlamaRecipe(num_hidden_layers=1), tokenizer, seed=0)
    whole, _ = batch_loss(model, tokenizer, conversations[:40])
    input_ids, attention_mask, labels = encode(tokenizer, conversations[:40])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(input_ids, attention_mask=attention_mask, labels=labels).loss
    torch.testing.assert_close(whole, expected.float(), rtol=2e-3, atol=0)


def test_no_reserved_scene_is_described_in_training(conversations):
    descriptions = {turn["content"].split("\n")[0].rstrip(".") for c in conversations for turn in c[:1]}
    for scene in single_scenes():
        if is_reserved(scene):
            phrase = caption(scene, np.random.default_rng(0)).split(" on a ")[0].removeprefix("there is ")
            assert f"{phrase[0].upper()}{phrase[1:]} on a {scene.background} background" not in descriptions
