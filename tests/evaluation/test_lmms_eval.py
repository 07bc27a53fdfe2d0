"""The model of lmms-eval: what its registry and evaluator ask of it, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image


pytest.importorskip("lmms_eval", reason="`make test-lmms-eval` runs this")

from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.models import MODEL_REGISTRY_V2, get_model
from video_parts import write_video

from metamorph.evaluation.lmms_eval_model import MetaMorph, MetaMorphSimple
from metamorph.inference import Sampling
from metamorph.inference.media import load_video
from metamorph.miniature.world.language import questions
from metamorph.miniature.world.render import render
from metamorph.miniature.world.scenes import sample_scene
from metamorph.models.processing_metamorph import ImagePart


TASKS = Path(__file__).parents[1] / "parts" / "lmms_eval_tasks"
GREEDY = {"until": ["\n\n"], "max_new_tokens": 16, "temperature": 0, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lmms_eval")


@pytest.fixture(scope="module")
def documents(folder: Path) -> list[dict[str, Any]]:
    """Questions about images of the miniature world, in `documents.jsonl`, too."""
    rng, found = np.random.default_rng(3), []
    while len(found) < 8:
        scene, number = sample_scene(rng, reserved=True), len(found) // 2
        render(scene).save(folder / f"{number}.png")
        for _, question, answer in questions(scene, rng)[:2]:
            choices = [answer, "under the table", "nine"]
            image = str(folder / f"{number}.png")
            found.append({"image": image, "question": question, "answer": answer, "choices": choices})
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in found))
    return found


@pytest.fixture(scope="module")
def models(folder: Path, documents: list[dict[str, Any]]) -> dict[int, MetaMorph]:
    """By batch size; made as the command line makes them."""
    arguments = f"pretrained=mini,visualizer=mini,steps=2,dtype=float32,output_image_dir={folder}/images"
    found = {}
    for batch_size in (1, 3):
        options = {"batch_size": str(batch_size), "device": "cpu", "max_batch_size": None}
        found[batch_size] = get_model("metamorph").create_from_arg_string(arguments, options)
        found[batch_size].task_dict = {"task": {"test": documents}}
    return found


def chat(number: int, options: dict[str, Any], to_messages: Callable[..., Any] | None = None) -> Instance:
    def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        image = {"type": "image", "url": Image.open(doc["image"])}
        return [{"role": "user", "content": [image, {"type": "text", "text": doc["question"]}]}]

    return request("generate_until", "", to_messages or messages, options, number)


def request(kind: Any, *arguments: Any) -> Instance:
    """As the evaluator makes it: the last argument is the number of the document."""
    metadata = {"task": "task", "doc_id": arguments[-1], "repeats": 1}
    return Instance(request_type=kind, arguments=(*arguments, "task", "test"), idx=0, metadata=metadata)


def visuals(doc: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(doc["image"])]


def test_the_registry_finds_both_classes_by_the_entry_point() -> None:
    assert get_model("metamorph") is MetaMorph
    assert get_model("metamorph", force_simple=True) is MetaMorphSimple
    assert (MetaMorph.is_simple, MetaMorphSimple.is_simple) == (False, True)
    assert MODEL_REGISTRY_V2.resolve("metamorph").model_type == "chat"


def test_answers_are_those_of_the_session_in_batches_of_any_size(models, documents) -> None:
    """Requests with their own limits and stops share a batch, and come back in order."""
    own = [GREEDY, {"max_new_tokens": 1}, {"until": ["r"], "max_new_tokens": 16}, {"temperature": 1.3, "top_p": 0.9}]
    requests = [chat(number, {"max_new_tokens": 12, **own[number % 4]}) for number in range(8)]
    answers = models[3].generate_until(requests)
    assert answers == models[1].generate_until(requests)
    session = models[1].session
    for number, (document, answer) in enumerate(zip(documents, answers, strict=True)):
        options = {"max_new_tokens": 12, **own[number % 4]}
        sampling = Sampling(1.3, 0.9, seed=number) if options.get("temperature") else None
        stop = tuple(text for text in options.get("until", ()) if text.strip())
        limit = options["max_new_tokens"]
        expected = session.reply(
            document["question"], document["image"], sampling=sampling, max_new_tokens=limit, stop=stop
        )
        assert answer == expected.text
    assert answers[0] == documents[0]["answer"]


def test_repeated_requests_get_other_random_numbers_each_time_the_same(models, documents) -> None:
    options = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 24}
    requests = [chat(0, options)] * 4
    answers = models[3].generate_until(requests)
    assert len(set(answers)) > 1
    assert answers == models[1].generate_until(requests)


def test_images_are_json_and_files_in_batches_of_any_size(models, documents, folder: Path) -> None:
    def wish(doc: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "text", "text": "draw a red circle"}]}]

    requests = [chat(0, GREEDY), chat(1, {}, wish), chat(2, {}, wish)]
    pixels = []
    for size in (1, 3):
        words, *drawings = models[size].generate_until(requests)
        assert words == documents[0]["answer"]
        found = [json.loads(drawing) for drawing in drawings]
        assert [answer["images"] for answer in found] == [[str(folder / f"images/task/{n:06}.png")] for n in (1, 2)]
        pixels.append([np.asarray(Image.open(answer["images"][0])).astype(int) for answer in found])
    expected = models[1].session.reply("draw a red circle", settings=models[1].settings.__class__(3.0, 2, 1)).images
    assert abs(pixels[0][0] - np.asarray(expected[0]).astype(int)).max() <= 1
    assert abs(np.stack(pixels[0]) - np.stack(pixels[1])).max() <= 1
    assert abs(pixels[0][0] - pixels[0][1]).max() > 1  # each document has its own noise


def test_every_answer_begins_with_an_image_on_request(models, documents) -> None:
    """The limit of a task, here of one word, does not cut the image."""
    models[1].draw = True
    try:
        (answer,) = models[1].generate_until([chat(0, {"max_new_tokens": 1})])
    finally:
        models[1].draw = False
    assert len(json.loads(answer)["images"]) == 1


def test_videos_are_read_as_frames(models, documents, tmp_path: Path) -> None:
    video = str(write_video(tmp_path / "a.mp4", [index / 2 for index in range(8)]))

    def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        media = {"type": "video", "url": video}
        return [{"role": "user", "content": [media, {"type": "text", "text": "what color is the object?"}]}]

    (answer,) = models[3].generate_until([chat(0, GREEDY, messages)])
    frames = load_video(video, 1.0, 8)
    markers = "<image>" * len(frames)
    expected = models[3].session.reply(f"{markers}\nwhat color is the object?", frames, max_new_tokens=16)
    assert (len(frames), answer) == (4, expected.text)


@pytest.mark.parametrize(
    ("item", "options", "message"),
    [
        ({"type": "audio", "url": "a.wav"}, GREEDY, "document 0 of task: MetaMorph reads text, images, and entire"),
        ({"type": "video", "url": "a.mp4", "start_time": 1.0}, GREEDY, "entire videos from files"),
        ({"type": "image", "url": "/nowhere/a.png"}, GREEDY, "nowhere"),
        ({"type": "text", "text": "a"}, {"num_beams": 3}, "add --gen_kwargs num_beams=1"),
    ],
)
def test_what_it_cannot_do_is_refused(models, documents, item, options, message) -> None:
    messages = [{"role": "user", "content": [item]}]
    with pytest.raises((ValueError, OSError), match=message):
        models[1].generate_until([chat(0, options, lambda doc: messages)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "bfloat"}, "dtype: 'bfloat' is unknown.*bfloat16"),
        ({"batch_size": "auto"}, "batch_size must be a whole number from 1, not auto"),
        ({"pretrained": "/nowhere/x"}, "model /nowhere/x does not exist"),
        ({"visualiser": "mini"}, "visualiser"),
    ],
)
def test_wrong_model_args_are_named(arguments, message) -> None:
    with pytest.raises((ValueError, OSError, TypeError), match=message):
        MetaMorph(**{"pretrained": "mini", **arguments})


def test_losses_of_choices_are_those_of_the_model_in_batches_of_any_size(models, documents) -> None:
    """Few words next to many: what pads a row does not count. A choice may be computed from the document."""
    requests = [
        request("loglikelihood", document["question"], f" {choice}", visuals, number)
        for number, document in enumerate(documents)
        for choice in document["choices"]
    ]
    requests.append(request("loglikelihood", "who are you?", lambda doc: doc["answer"], None, 0))
    found = models[3].loglikelihood(requests)
    alone = models[1].loglikelihood(requests)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in alone], abs=1e-4)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in alone]
    session = models[1].session
    for number, document in enumerate(documents[:2]):
        for index, choice in enumerate(document["choices"]):
            loss, is_greedy = found[3 * number + index]
            turns = [{"role": "user", "content": f"<image>\n{document['question']}"}]
            turns.append({"role": "assistant", "content": choice})
            encoded = session.processor.encode_conversation(turns, visuals(document))
            end = len(session.processor.tokenizer("<|eot_id|>", add_special_tokens=False).input_ids)
            labels = encoded.labels[None].clone()
            labels[:, -end:] = -100
            with torch.no_grad():
                out = session.model(
                    input_ids=encoded.input_ids[None],
                    labels=labels,
                    visual_target_mask=encoded.visual_target_mask[None],
                    pixel_values=encoded.pixel_values,
                )
            assert loss == pytest.approx(out.text_loss.item(), abs=1e-4)
            reply = session.reply(document["question"], document["image"], max_new_tokens=16)
            assert is_greedy == reply.text.startswith(choice)
    assert [unwrap_generation_output(each) for each in found[:2]] == [(tuple(each), None) for each in found[:2]]
    losses = np.array([loss for loss, _ in found[:-1]]).reshape(-1, 3)
    assert (losses.argmin(axis=1) == 0).mean() > 0.8  # lmms-eval takes the lowest
    # Without an image: lmms-eval's requests for the choice by itself have two arguments.
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    alone = Instance(request_type="loglikelihood", arguments=("", "red"), idx=0, metadata=metadata)
    assert models[3].loglikelihood([alone])[0][0] > 0


def test_rounds_go_on_until_the_task_says_so_and_read_the_answers(models, documents) -> None:
    """Conversations of one and of three rounds share batches; chat tasks and simple ones give the same answers."""
    heard: list[Any] = []

    def to_text(doc: dict[str, Any], *, round_idx: int, previous_output: list[str], previous_round_info: Any) -> Any:
        heard.append((round_idx, list(previous_output), previous_round_info))
        is_over = round_idx == (3 if doc is documents[0] else 1)
        return visuals(doc), f"{previous_output[-1]}? {doc['question']}", is_over, previous_output, round_idx

    def to_messages(doc: dict[str, Any], **rounds: Any) -> Any:
        def turn(images: list[Image.Image], text: str) -> list[dict[str, Any]]:
            parts = [{"type": "image", "url": image} for image in images]
            return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

        if not rounds:
            return turn(visuals(doc), doc["question"])
        images, text, is_over, outputs, info = to_text(doc, **rounds)
        return None if is_over else turn(images, text), is_over, outputs, info

    kind: Any = "generate_until_multi_round"
    requests = [request(kind, "", to_messages, GREEDY, number) for number in (0, 1, 0)]
    answers = models[3].generate_until_multi_round(requests)
    assert list(map(len, answers)) == [3, 1, 3]
    assert (1, answers[0][:1], None) in heard
    assert (3, answers[0], 2) in heard
    assert answers == models[1].generate_until_multi_round(requests)
    simple = [request(kind, documents[n]["question"], GREEDY, visuals, to_text, n) for n in (0, 1, 0)]
    assert answers == models[3].generate_until_multi_round(simple)


def test_visual_cot_answers_with_its_own_image_in_context(models, documents, folder: Path) -> None:
    tagged = "[GEN_PROMPT]draw a blue square for: {question}[/GEN_PROMPT][QUESTION]what color is it?[/QUESTION]"
    kind: Any = "generate_visual_cot"
    options = {**GREEDY, "visual_cot": True}
    requests = [request(kind, text, options, visuals, n) for n, text in enumerate([tagged, "what shape is it?"])]
    answers = models[3].generate_visual_cot(requests)
    assert answers == models[1].generate_visual_cot(requests)
    session = models[1].session
    first = session.reply("draw a blue square for: what color is it?", documents[0]["image"], draw=True)
    image = next(part for part in first.parts if isinstance(part, ImagePart))
    turns = [
        {"role": "user", "content": "<image>\ndraw a blue square for: what color is it?"},
        {"role": "assistant", "content": [image]},
        {"role": "user", "content": "what color is it?"},
    ]
    assert answers[0] == session.reply(turns, documents[0]["image"], max_new_tokens=16).text
    assert Image.open(folder / "images/task/000000-cot.png").size == (64, 64)


def evaluate(folder: Path, tasks: str, *flags: str, launcher: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run lmms-eval's command; returns its figures."""
    command = [sys.executable, "-m", *launcher, "lmms_eval", "--model", "metamorph", "--device", "cpu"]
    command += ["--model_args", "pretrained=mini,visualizer=mini,steps=2", "--include_path", str(TASKS)]
    command += ["--tasks", tasks, "--output_path", str(folder / "out"), *flags]
    env = {**os.environ, "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(TASKS)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=800)
    results = sorted((folder / "out").rglob("*_results.json"), key=os.path.getmtime)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results, done.stdout + done.stderr
    return json.loads(results[-1].read_text())["results"]


@pytest.mark.slow
@pytest.mark.integration
def test_its_command_evaluates_chat_tasks_in_one_process_and_in_two(folder: Path, documents) -> None:
    tasks = "world_questions,world_rounds,world_drawings"
    one = evaluate(folder, tasks, "--batch_size", "4")
    assert one["world_questions"]["accuracy,none"] > 0.8
    assert one["world_rounds"]["accuracy,none"] > 0
    assert one["world_drawings"]["num_images,none"] == 1
    launcher = ("accelerate.commands.launch", "--num_processes=2", "--cpu", "-m")
    two = evaluate(folder, tasks, "--batch_size", "3", launcher=launcher)
    for task, metric in (
        ("world_questions", "accuracy"),
        ("world_rounds", "accuracy"),
        ("world_drawings", "num_images"),
    ):
        assert two[task][f"{metric},none"] == one[task][f"{metric},none"]


@pytest.mark.slow
@pytest.mark.integration
def test_its_command_evaluates_simple_tasks(folder: Path, documents) -> None:
    found = evaluate(folder, "world_questions,world_choices,world_visual_cot", "--batch_size", "4", "--force_simple")
    assert found["world_questions"]["accuracy,none"] > 0.8
    assert found["world_choices"]["acc,none"] > 0.8
    assert found["world_visual_cot"]["accuracy,none"] > 0
