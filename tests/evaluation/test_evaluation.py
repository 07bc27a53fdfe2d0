"""Evaluation: exact answers, shares, comparison of visual tokens, and drawing that does not depend on batches."""

import numpy as np
import pytest
import torch
from PIL import Image
from visualization_parts import CROSS_ATTENTION_DIM, tiny_scheduler, tiny_unet, tiny_vae

from metamorph.evaluation.drawings import Drawing, DrawingTask, summarise
from metamorph.evaluation.questions import AnsweredQuestion, Question, fraction, summarise_answers
from metamorph.evaluation.tokens import cosines, mean_cosine, num_nearer
from metamorph.inference.draw import SamplerSettings, draw
from metamorph.inference.prompt import Prompt
from metamorph.inference.reply import Reply
from metamorph.visualization.pipeline import VisualizationPipeline
from metamorph.visualization.projector import VisualizationProjector


NO_IMAGES = torch.empty(0, 4, 8)
ONE_IMAGE = torch.ones(1, 4, 8)


def answered(given: str, right: str = "red", kind: str = "color", tokens=NO_IMAGES) -> AnsweredQuestion:
    return AnsweredQuestion(Question(kind, Prompt("what colour?"), right), Reply(given, tokens))


@pytest.mark.parametrize(
    ("given", "is_right"),
    [("red", True), ("Red.", True), (" red ", True), ("red circle", False), ("", False), ("r ed", False)],
)
def test_answers_are_compared_word_for_word(given, is_right):
    assert answered(given).is_right is is_right


def test_an_answer_with_an_unwanted_image_is_wrong():
    assert not answered("red", tokens=ONE_IMAGE).is_right


def test_accuracy_is_counted_for_each_type():
    results = [answered("red"), answered("blue"), answered("two", "two", "count"), answered("red"), answered("red")]
    assert summarise_answers(results) == {
        "n": 5,
        "accuracy": 0.8,
        "per_type": {"color": 0.75, "count": 1.0},
        "n_per_type": {"color": 4, "count": 1},
    }


def test_the_share_of_nothing_is_zero():
    assert fraction([]) == 0.0


def test_a_task_without_an_image_counts_as_wrong():
    task = DrawingTask(Prompt("draw"), "target")
    drawn = Drawing(task, Reply("", ONE_IMAGE), Image.new("RGB", (8, 8)), {"all": True, "color": True})
    missing = Drawing(task, Reply("no", NO_IMAGES), None, {})
    assert summarise([drawn, missing], ("all", "color")) == {"n": 2, "all": 0.5, "color": 0.5}


def test_nearer_candidates_and_cosine_ignore_the_length_of_tokens():
    candidates = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0))
    generated = candidates[[3, 0]] * torch.tensor([0.1, 7.0]).view(2, 1, 1)
    similar = cosines(generated, candidates)
    assert num_nearer(similar, similar[[0, 1], [3, 0]]).tolist() == [0, 0]
    assert num_nearer(similar, similar[:, 1]).min() > 0
    copies = cosines(generated, candidates[[3, 3, 0]] * 3)  # each is the original of the first drawing
    assert num_nearer(copies[:1], copies[:1, 1]).tolist() == [0]
    not_found = cosines(generated * torch.nan, candidates)
    assert num_nearer(not_found, not_found[:, 0]).tolist() == [5, 5]
    torch.testing.assert_close(mean_cosine(generated, candidates[[3, 0]]), torch.ones(2))


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    projector = VisualizationProjector(input_dim=8, hidden_dim=16, output_dim=CROSS_ATTENTION_DIM, mode="mlp")
    made = VisualizationPipeline.from_parts(projector, tiny_unet(), tiny_vae(), tiny_scheduler())
    made.set_progress_bar_config(disable=True)
    return made


def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in(pipeline):
    tokens = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1))
    finished = []
    together = draw(pipeline, tokens, SamplerSettings(num_inference_steps=2), finished.append)
    apart = draw(pipeline, tokens, SamplerSettings(num_inference_steps=2, batch_size=1), finished.append)
    for one, other in zip(together, apart, strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1
    assert finished == [3, 1, 1, 1]
