"""GenEval's rules, by hand-made detections and by the exact checker of the miniature world."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from detector_parts import save_clip, save_mask2former
from PIL import Image

from metamorph.evaluation.detectors import Detection
from metamorph.evaluation.loaders.generation import GenevalLoader
from metamorph.evaluation.metrics.base import Tools
from metamorph.evaluation.metrics.geneval import Geneval, is_correct, relations
from metamorph.evaluation.samples import Answer, Sample
from metamorph.inference import SamplerSettings
from metamorph.miniature.quickstart.evaluate import draw_groups, drawing_tasks, judge_scene, load_session
from metamorph.miniature.quickstart.recipe import EvaluationSizes
from metamorph.miniature.world.checker import judge
from metamorph.miniature.world.dataset import WorldSizes, write_dataset
from metamorph.miniature.world.detector import WorldColors, WorldDetector
from metamorph.miniature.world.geneval import full_record, world_prompts
from metamorph.miniature.world.render import render
from metamorph.miniature.world.scenes import Scene, sample_scene
from metamorph.runs.progress import Progress


WORLD = Geneval("metamorph.miniature.world.detector:WorldDetector", "metamorph.miniature.world.detector:WorldColors")
SHIPPED = Path(__file__).parents[2] / "src/metamorph/evaluation/specs/world-geneval.jsonl"


def tools(folder: Path) -> Tools:
    return Tools(torch.device("cpu"), lambda: pytest.fail("no model is needed"), Progress(), folder)


def box(x: float, y: float, size: float = 10, name: str = "cat", score: float = 0.95) -> Detection:
    return Detection(name, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


class Named:
    """A detector that finds what it is told, and the colour of the pixel in the middle."""

    def __init__(self, *objects: Detection) -> None:
        self._objects = objects

    def detect(self, image, names, threshold):
        return [item for item in self._objects if item.name in names]

    def colors_of(self, image, objects, name, colors):
        return [{(255, 0, 0): "red", (0, 0, 255): "blue"}[image.getpixel(item.box[:2])] for item in objects]


def verdict(record: dict, *objects: Detection, tmp_path: Path) -> bool:
    image = Image.new("RGB", (100, 100), "red")
    image.paste("blue", (50, 0, 100, 100))
    image.save(tmp_path / "image.png")
    return Geneval().judge(tmp_path / "image.png", record, Named(*objects), Named())


CAT, DOG = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}
TWO_CATS = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
RED_CAT = {"tag": "colors", "include": [{**CAT, "color": "red"}]}
LEFT = {"tag": "position", "include": [DOG, {**CAT, "position": ["left of", 0]}]}


@pytest.mark.parametrize(
    ("record", "objects", "expected"),
    [
        ({"tag": "single_object", "include": [CAT]}, [box(20, 20, score=0.31)], True),
        ({"tag": "single_object", "include": [CAT]}, [box(20, 20, score=0.3)], False),  # the threshold is not enough
        ({"tag": "single_object", "include": [CAT]}, [box(20, 20), box(60, 60)], True),
        ({"tag": "two_object", "include": [CAT, DOG]}, [box(20, 20)], False),
        ({"tag": "two_object", "include": [CAT, DOG]}, [box(20, 20), box(60, 60, name="dog")], True),
        (TWO_CATS, [box(20, 20), box(60, 60)], True),
        (TWO_CATS, [box(20, 20), box(60, 60, score=0.89)], False),  # counting needs 0.9
        (TWO_CATS, [box(20, 20), box(60, 60), box(80, 80)], False),
        (RED_CAT, [box(20, 20)], True),
        (RED_CAT, [box(20, 20), box(80, 20, score=0.99)], False),  # the colour of the best one counts
        (LEFT, [box(20, 50), box(80, 50, name="dog")], True),
        (LEFT, [box(80, 50), box(20, 50, name="dog")], False),
        (LEFT, [box(20, 50)], False),
    ],
)
def test_rules(record, objects, expected, tmp_path):
    assert verdict(record, *objects, tmp_path=tmp_path) is expected


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ((50, 20), {"above"}),
        ((50, 80), {"below"}),
        ((20, 20), {"left of", "above"}),
        ((52, 50), set()),  # 2 pixels, a tenth of both sizes
        ((52.1, 50), set()),  # 0.1 pixels of 2.1 are less than half
        ((54.1, 50), {"right of"}),  # 2.1 of 4.1
        ((50, 50), set()),
    ],
)
def test_the_margin_of_positions(item, expected):
    assert relations(box(*item), box(50, 50)) == expected


def test_at_most_sixteen_objects_of_a_class_count(tmp_path):
    many = [box(20, 20) for _ in range(20)]
    record = {"tag": "single_object", "include": [CAT], "exclude": [{"class": "cat", "count": 17}]}
    assert verdict(record, *many, tmp_path=tmp_path)


def test_overall_is_the_mean_of_tasks_not_of_images(tmp_path):
    samples = [Sample(str(index), {}, {}, categories={"task": task}) for index, task in enumerate("aaab")]
    scores = [{"correct": value, "any_correct": float(value > 0)} for value in (1.0, 1.0, 0.25, 0.0)]
    assert Geneval().summarise(samples, scores) == {"overall": 0.375, "correct": 0.5625, "any_correct": 0.75}


def test_missing_images_are_wrong_and_shares_are_over_images(tmp_path):
    scene = sample_scene(np.random.default_rng(0), num_objects=1)
    other = next(
        each
        for each in iter(lambda: sample_scene(np.random.default_rng()), None)
        if full_record(each) != full_record(scene)
    )
    files = []
    for index, each in enumerate((scene, other)):
        files.append(tmp_path / f"{index}.png")
        render(each).save(files[-1])
    samples = [Sample(str(index), {}, full_record(scene), categories={"task": "color_attr"}) for index in range(3)]
    answers = [Answer(images=(files[0],)), Answer(images=tuple(files)), Answer(error="no memory")]
    found = WORLD.score(samples, answers, tools(tmp_path))
    assert [each["correct"] for each in found] == [1.0, 0.5, 0.0]
    assert [each["any_correct"] for each in found] == [1.0, 1.0, 0.0]


def test_prompts_through_random_detectors(tmp_path):
    """Mask2Former and CLIP judge images of GenEval's own format from files to figures."""
    records = [
        {"tag": "single_object", "include": [CAT], "prompt": "a photo of a cat"},
        {"tag": "color_attr", "include": [{**CAT, "color": "red"}, {**DOG, "color": "blue"}], "prompt": "…"},
        {**LEFT, "prompt": "a photo of a cat left of a dog"},
        {**TWO_CATS, "prompt": "a photo of two cats"},
    ]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    samples = GenevalLoader().load(tmp_path)
    assert [sample.categories["task"] for sample in samples] == [record["tag"] for record in records]
    metric = Geneval(str(save_mask2former(tmp_path / "detector")), str(save_clip(tmp_path / "clip")), 0.0, 0.0)
    metric.check(samples)
    Image.effect_noise((64, 48), 90).convert("RGB").save(tmp_path / "image.png")
    answers = [Answer(images=(tmp_path / "image.png",) * 2)] * len(samples)
    scores = metric.score(samples, answers, tools(tmp_path))
    assert scores == metric.score(samples, answers, tools(tmp_path))
    assert metric.summarise(samples, scores).keys() == {"overall", "correct", "any_correct"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tag": "size", "include": [], "prompt": ""}, "row 1: tag"),
        ({"tag": "colors", "include": [{"count": 1}], "prompt": ""}, "row 1: {'count': 1} needs a class"),
        ({"tag": "colors", "include": [{**CAT, "color": "gray"}], "prompt": ""}, "row 1: color 'gray' is unknown"),
        ({"tag": "position", "include": [{**CAT, "position": ["left of", 0]}], "prompt": ""}, "an earlier clause"),
        ({"tag": "position", "include": [CAT, {**DOG, "position": ["near", 0]}], "prompt": ""}, "of left of, right of"),
        ({"include": [], "prompt": ""}, "row 1 has no column 'tag'"),
        ([], "row 1 must be an object"),
    ],
)
def test_wrong_prompts_are_refused(record, message, tmp_path):
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        GenevalLoader().load(tmp_path)


def test_the_shipped_prompts_of_the_world_are_those_of_the_code():
    """To rewrite them: `SHIPPED.write_text("".join(json.dumps(each) + "\\n" for each in world_prompts()))`."""
    assert [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()] == list(world_prompts())
    samples = GenevalLoader().load(SHIPPED)
    WORLD.check(samples)
    assert len(samples) == 120


def geneval_says(image: Image.Image, scene: Scene, *, position: bool = False) -> bool:
    record = full_record(scene, position=position)
    found = WorldDetector().detect(image, [clause["class"] for clause in record["exclude"]], 0.3)
    objects = {
        clause["class"]: [item for item in found if item.name == clause["class"]] for clause in record["exclude"]
    }
    return is_correct(image, objects, record, WorldColors())


def test_the_exact_checker_says_the_same_of_all_scenes():
    """Of one object, GenEval's verdict is the checker's on count, shape and colour.

    Of two it lies between two verdicts of the checker, which pairs drawn and wanted objects by size and place as well:
    right in count, shape, colour and place implies right for GenEval with places, which implies right in count, shape
    and colour, which implies right for GenEval without places.
    """
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, pair_fraction=0.7) for _ in range(14)]
    seen = {True: 0, False: 0}
    for scene in filter(full_record, scenes):
        for drawn in (*scenes, *changed(scene)):
            image = render(drawn)
            found = judge(image, scene)
            parts = found.count and found.shape and found.color
            without = geneval_says(image, scene)
            if len(scene.objects) == 1:
                assert without == parts
            else:
                with_places = geneval_says(image, scene, position=len({item.shape for item in scene.objects}) == 2)
                assert (parts and found.position) <= with_places <= parts <= without
            seen[without] += 1
    assert min(seen.values()) > 20


def changed(scene: Scene) -> Iterator[Scene]:
    """The scene with other sizes, and with its objects in each other's places."""
    yield replace(scene, objects=tuple(replace(item, size="small") for item in scene.objects))
    places = [item.position for item in reversed(scene.objects)]
    yield replace(scene, objects=tuple(map(lambda item, place: replace(item, position=place), scene.objects, places)))


@pytest.mark.integration
def test_counts_equal_those_of_evaluate_world(tmp_path):
    """The drawings of `metamorph evaluate world` with mini, judged by both."""
    files = write_dataset(tmp_path, seed=7, sizes=WorldSizes(evaluation=12))
    sizes = EvaluationSizes(vqa=0, seen=12, held_out=12, knowledge=4, edit=4, next_frame=4, visualizer=0)
    drawings = draw_groups(load_session("mini", "mini"), drawing_tasks(files, sizes), SamplerSettings(2.0, 5, 7))
    counts = {}
    for group, items in drawings.items():
        comparable = [item for item in items if item.image is not None and full_record(item.task.target) is not None]
        ours = [geneval_says(item.image, item.task.target) for item in comparable]
        theirs = [judge(item.image, item.task.target) for item in comparable]
        assert [item.verdict for item in comparable] == [
            judge_scene(item.image, item.task.target) for item in comparable
        ]
        assert ours == [each.count and each.shape and each.color for each in theirs]
        counts[group] = (sum(ours), len(comparable))
    assert sum(right for right, _ in counts.values()) > 0
    assert sum(total - right for right, total in counts.values()) > 0
