"""The rich world: whatever it says about a scene is true, its prompts are complete, and the checker reads its images.

A reader of its sentences that shares no code with their writer decides what is true.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metamorph.miniature.world.checker import judge, read_image
from metamorph.miniature.world.dataset import WorldFiles, WorldSizes, write_dataset
from metamorph.miniature.world.render import render
from metamorph.miniature.world.rich import QUESTION_TYPES, rich_drawing_prompt, rich_questions, sample_rich_scene
from metamorph.miniature.world.scenes import HELD_OUT, Scene, SceneObject, is_reserved
from metamorph.miniature.world.worlds import RICH
from tools.miniature.llama_data import vocabulary, words_of


RELATION = "(above|below|to the left of|to the right of)"
PLACE = "(top left|top right|bottom left|bottom right)"
SINGULAR = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}
NUMBERS = ("zero", "one", "two", "three")
OTHER = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}
NEW_WORDS = {"above", "below", "three", "or", "nothing", "at", ","}


def neighbor(position: str, relation: str) -> str | None:
    """The position that is `relation` this one."""
    row, column = position.split()
    if relation in ("above", "below"):
        return f"{OTHER[row]} {column}" if row == {"above": "bottom", "below": "top"}[relation] else None
    return f"{row} {OTHER[column]}" if column != relation.split()[-2] else None


def named(text: str, objects: list[SceneObject]) -> SceneObject:
    """The only object that a phrase with "the" fits."""
    if found := re.fullmatch(f"the object {RELATION} (the .+)", text):
        place = neighbor(named(found[2], objects).position, found[1])
        fits = [item for item in objects if item.position == place]
    else:
        found = re.fullmatch(f"the (.+?)(?: in the {PLACE})?", text)
        assert found, text
        words = {word for word in found[1].split() if word != "object"}
        fits = [item for item in objects if words <= {item.size, item.color, item.shape}]
        fits = [item for item in fits if found[2] in (None, item.position)]
    assert len(fits) == 1, text
    return fits[0]


def read_prompt(text: str) -> Scene:
    """The scene that a drawing prompt describes."""
    text = re.sub(r"^(generate an image of|draw|show me a picture of) ", "", text.lower().rstrip("."))
    text, _, background = text.partition(" on a ")
    told: list[SceneObject] = []
    for phrase in re.split(", | and ", text):
        if found := re.fullmatch(r"(two|three) (\w+) (\w+) (\w+) (?:at|on|with nothing in) the (.+)", phrase):
            count, size, color, plural, place = found.groups()
            corners = [f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right")]
            places = [corner for corner in corners if (place in corner.split()) == (count == "two") and corner != place]
            assert len(places) == NUMBERS.index(count)
            told += [SceneObject(SINGULAR[plural], color, size, place) for place in places]
            continue
        found = re.fullmatch(rf"an? (\w+) (\w+) (\w+) (?:in the {PLACE}|{RELATION} (it|the .+))", phrase)
        assert found, phrase
        size, color, shape, place, relation, anchor = found.groups()
        if place is None:
            assert anchor != "it" or len(told) == 1
            place = neighbor((told[0] if anchor == "it" else named(anchor, told)).position, relation)
        told.append(SceneObject(shape, color, size, place))
    return Scene(tuple(told), background.removesuffix(" background") or "white")


def answer(question: str, scene: Scene) -> str:
    """The answer that the scene gives to a question."""
    text, objects = question.lower().rstrip("?"), list(scene.objects)
    if found := re.fullmatch("what colou?r is (.+)", text):
        return named(found[1], objects).color
    if found := re.fullmatch("what (shape|size) is (.+)", text):
        return getattr(named(found[2], objects), found[1])
    if found := re.fullmatch("where is (.+)", text):
        return named(found[1], objects).position
    if found := re.fullmatch(r"how many objects are (?:at|on) the (\w+)", text):
        return NUMBERS[sum(found[1] in item.position.split() for item in objects)]
    if found := re.fullmatch(r"how many (?:(\w+) )?(\w+) are there", text):
        fits = [item for item in objects if found[1] in (None, item.color)]
        return NUMBERS[sum(found[2] == "objects" or item.shape == SINGULAR[found[2]] for item in fits)]
    if found := re.fullmatch(f"what is {RELATION} (.+)", text):
        place = neighbor(named(found[2], objects).position, found[1])
        fits = [item for item in objects if item.position == place]
        return (
            f"{'an' if fits[0].size[0] in 'aeiou' else 'a'} {fits[0].size} {fits[0].color} {fits[0].shape}"
            if fits
            else "nothing"
        )
    if found := re.fullmatch("is (.+) (?:(above) or (below)|to the (left) or to the (right) of) (the .+)", text):
        item, other = named(found[1], objects), named(found[6], objects)
        (right,) = [
            name
            for name in filter(None, found.groups()[1:5])
            if neighbor(other.position, name if found[2] else f"to the {name} of") == item.position
        ]
        return right
    if found := re.fullmatch(f"is (the .+?) {RELATION} (the .+)", text):
        place = neighbor(named(found[3], objects).position, found[2])
        return "yes" if named(found[1], objects).position == place else "no"
    if found := re.fullmatch(r"is there an? (\w+) (\w+)", text):
        return "yes" if any((item.color, item.shape) == found.groups() for item in objects) else "no"
    found = re.fullmatch(r"is (the .+?) (?:an? )?(\w+)", text)
    assert found, question
    return "yes" if found[2] in vars(named(found[1], objects)).values() else "no"


def scenes(seed: int, count: int) -> list[tuple[Scene, np.random.Generator]]:
    rng = np.random.default_rng(seed)
    return [(sample_rich_scene(rng, reserved=None), rng) for _ in range(count)]


def test_prompts_describe_their_scene_completely() -> None:
    prompts = [(scene, rich_drawing_prompt(scene, rng)) for scene, rng in scenes(0, 1000)]
    for scene, prompt in prompts:
        found = read_prompt(prompt)
        assert (set(found.objects), found.background) == (set(scene.objects), scene.background), prompt
    texts = " ".join(prompt for _, prompt in prompts).lower()
    for words in ("two small", "three large", "above", "to the left of", " it ", "nothing in"):
        assert words in texts


def test_questions_are_answered_from_the_scene() -> None:
    answers: dict[str, set[str]] = {}
    for scene, rng in scenes(1, 1000):
        for kind, question, given in rich_questions(scene, rng):
            assert answer(question, scene) == given, (question, scene)
            answers.setdefault(kind, set()).add(given)
    assert tuple(sorted(answers)) == tuple(sorted(QUESTION_TYPES))
    assert answers["relation"] == {"above", "below", "left", "right"}
    assert answers["count"] == set(NUMBERS)
    assert answers["yes_no"] == {"yes", "no"}
    assert "nothing" in answers["neighbor"]


def test_checker_reads_every_scene() -> None:
    for scene, rng in scenes(2, 500):
        found = read_image(render(scene)).scene
        assert found is not None
        assert (set(found.objects), found.background) == (set(scene.objects), scene.background)
        assert judge(render(scene, rng), scene).all


def test_one_wrong_object_of_three_is_wrong() -> None:
    scene = sample_rich_scene(np.random.default_rng(3), num_objects=3)
    first, *others = scene.objects
    changed = SceneObject(first.shape, "black" if first.color != "black" else "red", first.size, first.position)
    verdict = judge(render(Scene((changed, *others), scene.background)), scene)
    assert not verdict.color
    assert all((verdict.shape, verdict.size, verdict.position, verdict.count))
    assert not judge(render(Scene(tuple(others), scene.background)), scene).count


def test_samples_keep_their_promises() -> None:
    rng = np.random.default_rng(4)
    counts = []
    for _ in range(300):
        assert is_reserved(sample_rich_scene(rng, reserved=True))
        scene = sample_rich_scene(rng, allow_held_out=False)
        assert not is_reserved(scene)
        assert not scene.has_held_out
        counts.append(len(scene.objects))
    assert set(counts) == {2, 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> WorldFiles:
    sizes = WorldSizes(captions=20, vqa=40, text_vqa=5, text_to_image=60, visualizer=5, evaluation=40)
    return write_dataset(tmp_path_factory.mktemp("rich"), seed=0, sizes=sizes, world=RICH)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_data_set_has_the_same_honest_splits_as_that_of_the_basic_world(files: WorldFiles) -> None:
    training = read(files.stage1) + read(files.stage2)
    held_out = read(files.evaluation["generation"])[40:]
    for record in training:
        for turn in record["conversations"]:
            assert set(words_of(turn["value"].lower())) <= {word.lower() for word in vocabulary()} | NEW_WORDS
        if "image" in record:
            scene = read_image(Image.open(files.image_folder / record["image"])).scene
            assert scene is not None
            assert not is_reserved(scene)
            assert record["task"] != "text_to_image" or not scene.has_held_out
    for record in read(files.evaluation["generation"]):
        scene = Scene.from_dict(record["scene"])
        assert is_reserved(scene)
        assert scene.has_held_out == (record["split"] == "held_out")
        assert len(scene.objects) in (2, 3)
    found = {(item["color"], item["shape"]) for record in held_out for item in record["scene"]["objects"]}
    assert found >= HELD_OUT
    for record in read(files.evaluation["vqa"]):
        scene = read_image(Image.open(files.image_folder / record["image"])).scene
        assert answer(record["conversations"][0]["value"].removeprefix("<image>\n"), scene) == record["answer"]
