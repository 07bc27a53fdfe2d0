"""Evaluation of a model that has memorised four records: what it knows is right, what it cannot know is wrong."""

import pytest
import torch
from PIL import Image
from training_parts import IMAGE_SIZE, arguments, write_records
from visualization_parts import CROSS_ATTENTION_DIM, tiny_scheduler, tiny_unet, tiny_vae

from metamorph.evaluation.drawings import DrawingTask, draw_tasks, encode_images, summarise
from metamorph.evaluation.questions import Question, ask, summarise_answers
from metamorph.evaluation.tokens import cosines, mean_cosine
from metamorph.inference.draw import SamplerSettings
from metamorph.inference.prompt import Prompt
from metamorph.inference.reply import reply_to
from metamorph.training.run import run_training
from metamorph.visualization.pipeline import VisualizationPipeline
from metamorph.visualization.projector import VisualizationProjector


pytestmark = pytest.mark.integration


COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def plain_image(color: str) -> Image.Image:
    return Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), COLORS[color])


@pytest.fixture(scope="module")
def learned(parts, tmp_path_factory):
    """A model that names the colour of two images and draws both when asked."""
    folder = tmp_path_factory.mktemp("learned")
    for name in ("llm", "tower"):
        (folder / name).symlink_to(parts / name)
    (folder / "images").mkdir()
    records = []
    for color in COLORS:
        plain_image(color).save(folder / "images" / f"{color}.png")
        turns = {"ask": ("<image>\nWhich colour?", color), "draw": (f"Draw {color}", "<image>")}
        for name, (human, gpt) in turns.items():
            talk = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
            records.append({"id": f"{name}-{color}", "image": f"{color}.png", "conversations": talk})
    write_records(folder / "data.jsonl", records)
    flags = {"from_scratch_connector": True, "max_steps": 120, "per_device_train_batch_size": 4, "logging_steps": 60}
    result = run_training(*arguments(folder, folder / "out", stage=2, **flags))
    return result.model, result.processor


def test_learnt_answers_are_right_and_others_wrong(learned):
    model, processor = learned
    questions = [Question("colour", Prompt("<image>\nWhich colour?", (plain_image(color),)), color) for color in COLORS]
    assert summarise_answers(ask(model, processor, questions))["accuracy"] == 1.0
    swapped = [Question("colour", question.prompt, "green") for question in questions]
    assert summarise_answers(ask(model, processor, swapped))["accuracy"] == 0.0


def test_replies_keep_their_order_in_any_batch(learned):
    model, processor = learned
    prompts = [
        Prompt("Draw red"),
        Prompt("<image>\nWhich colour?", (plain_image("blue"),)),
        Prompt("Draw blue"),
        Prompt("<image>\nWhich colour?", (plain_image("red"),)),
    ]
    together, apart = reply_to(model, processor, prompts), reply_to(model, processor, prompts, batch_size=1)
    assert [reply.text for reply in together] == [reply.text for reply in apart] == ["", "blue", "", "red"]
    assert [reply.num_images for reply in together] == [1, 0, 1, 0]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one.visual_tokens, other.visual_tokens, atol=1e-4, rtol=1e-4)


def test_drawn_tokens_are_nearest_to_the_requested_image(learned):
    model, processor = learned
    candidates = encode_images(model, processor, [plain_image(color) for color in COLORS])
    replies = reply_to(model, processor, [Prompt(f"Draw {color}") for color in COLORS])
    tokens = torch.cat([reply.visual_tokens for reply in replies])
    assert cosines(tokens, candidates).argmax(dim=1).tolist() == [0, 1]
    assert (mean_cosine(tokens, candidates) > 0.9).all()


def test_drawings_are_judged_with_their_own_target(learned):
    model, processor = learned
    torch.manual_seed(0)
    projector = VisualizationProjector(input_dim=24, hidden_dim=16, output_dim=CROSS_ATTENTION_DIM, mode="mlp")
    pipeline = VisualizationPipeline.from_parts(projector, tiny_unet(), tiny_vae(), tiny_scheduler())
    tasks = [
        DrawingTask(Prompt("Draw red"), "first"),
        DrawingTask(Prompt("<image>\nWhich colour?", (plain_image("red"),)), "no image"),
        DrawingTask(Prompt("Draw blue"), "third"),
    ]
    judged = []

    def judge(image, target):
        judged.append((image.size, target))
        return {"all": target == "third"}

    drawings = draw_tasks(model, processor, pipeline, tasks, judge, SamplerSettings(num_inference_steps=2))
    assert judged == [((32, 32), "first"), ((32, 32), "third")]
    assert [drawing.is_right() for drawing in drawings] == [False, False, True]
    assert summarise(drawings) == {"n": 3, "all": 0.3333}
