"""The world's data sets: valid LLaVA records, a closed vocabulary, honest splits, the same bytes for the same seed."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metamorph.data.records import parse_record
from metamorph.miniature.world.changes import edit, next_frame
from metamorph.miniature.world.checker import judge, read_image
from metamorph.miniature.world.dataset import WorldFiles, WorldSizes, write_dataset
from metamorph.miniature.world.knowledge import THINGS, fact, fact_questions, knowledge_prompt
from metamorph.miniature.world.language import QUESTION_TYPES, questions
from metamorph.miniature.world.scenes import HELD_OUT, Scene, SceneObject, is_reserved, sample_scene
from tools.miniature.llama_data import vocabulary, words_of


SIZES = WorldSizes(
    captions=40,
    vqa=60,
    text_vqa=20,
    text_to_image=80,
    edits=60,
    next_frames=20,
    facts=20,
    knowledge_prompts=30,
    visualizer=20,
    evaluation=30,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> WorldFiles:
    return write_dataset(tmp_path_factory.mktemp("world"), seed=0, sizes=SIZES)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def training_records(files: WorldFiles) -> list[dict]:
    return read(files.stage1) + read(files.stage2)


def all_records(files: WorldFiles) -> list[dict]:
    return training_records(files) + [record for path in files.evaluation.values() for record in read(path)]


def image_paths(record: dict) -> list[str]:
    image = record.get("image", [])
    return [image] if isinstance(image, str) else image


def answer_paths(record: dict) -> list[str]:
    """Images in the turns of the model, in reading order."""
    speakers = [turn["from"] for turn in record["conversations"] for _ in range(turn["value"].count("<image>"))]
    return [path for path, speaker in zip(image_paths(record), speakers, strict=True) if speaker == "gpt"]


def test_every_record_is_valid_and_every_image_opens(files: WorldFiles) -> None:
    records = all_records(files)
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        parse_record(record, record["id"])
        for path in image_paths(record):
            with Image.open(files.image_folder / path) as image:
                assert (image.size, image.mode) == ((64, 64), "RGB")


def test_sizes_are_kept(files: WorldFiles) -> None:
    assert len(read(files.stage1)) == SIZES.captions
    counts: dict[str, int] = {}
    for record in read(files.stage2):
        counts[record["task"]] = counts.get(record["task"], 0) + 1
    assert counts == {
        "vqa": SIZES.vqa,
        "text_vqa": SIZES.text_vqa,
        "text_to_image": SIZES.text_to_image,
        "image_edit": SIZES.edits,
        "next_frame": SIZES.next_frames,
        "facts": SIZES.facts,
        "knowledge": SIZES.knowledge_prompts,
    }
    assert len(list(files.visualizer_folder.glob("*.png"))) == SIZES.visualizer


def test_vocabulary_is_closed_and_small(files: WorldFiles) -> None:
    words = set(vocabulary())
    assert len(words) < 130
    for record in all_records(files):
        for turn in record["conversations"]:
            assert set(words_of(turn["value"])) <= words


def test_held_out_pairs_are_in_inputs_but_never_in_answer_images(files: WorldFiles) -> None:
    in_inputs = 0
    for record in training_records(files):
        answers = answer_paths(record)
        for path in image_paths(record):
            scene = read_image(Image.open(files.image_folder / path)).scene
            assert scene is not None
            if path in answers:
                assert not scene.has_held_out, record
            else:
                in_inputs += scene.has_held_out
    assert in_inputs > 0


def test_reserved_scenes_are_in_no_training_image(files: WorldFiles) -> None:
    folders = [
        *(files.image_folder / path for record in training_records(files) for path in image_paths(record)),
        *files.visualizer_folder.glob("*.png"),
    ]
    for path in folders:
        scene = read_image(Image.open(path)).scene
        assert scene is not None
        assert not is_reserved(scene), path
    for record in read(files.evaluation["vqa"]):
        assert is_reserved(read_image(Image.open(files.image_folder / record["image"])).scene)
    for name in ("generation", "edit", "next_frame", "visualizer"):
        for record in read(files.evaluation[name]):
            assert is_reserved(Scene.from_dict(record["scene"])), record


def test_knowledge_prompts_of_evaluation_name_things_that_training_never_draws(files: WorldFiles) -> None:
    names = {thing.name for thing in THINGS if not thing.drawn}

    def named(record: dict) -> set[str]:
        prompt = record["conversations"][0]["value"].lower()
        return {name for name in names if set(words_of(name)) <= set(words_of(prompt))}

    for record in training_records(files):
        assert not (answer_paths(record) and named(record)), record
    assert all(named(record) for record in read(files.evaluation["knowledge"]))


def test_answer_images_show_their_scene(files: WorldFiles) -> None:
    drawn = [record for record in all_records(files) if "scene" in record and answer_paths(record)]
    assert drawn
    for record in drawn:
        image = Image.open(files.image_folder / answer_paths(record)[0])
        assert judge(image, Scene.from_dict(record["scene"])).all


def test_evaluation_splits(files: WorldFiles) -> None:
    held_out = set()
    for record in read(files.evaluation["generation"]):
        scene = Scene.from_dict(record["scene"])
        assert scene.has_held_out == (record["split"] == "held_out")
        held_out |= {(item.color, item.shape) for item in scene.objects if scene.has_held_out}
    assert held_out == HELD_OUT
    assert {record["type"] for record in read(files.evaluation["vqa"])} <= set(QUESTION_TYPES)
    drawn_names = {thing.name for thing in THINGS if thing.drawn}
    for record in read(files.evaluation["knowledge"]):
        prompt = record["conversations"][0]["value"].lower()
        assert not any(prompt.rstrip(".").endswith(name) for name in drawn_names), prompt


def test_same_seed_same_data(tmp_path: Path) -> None:
    def digest(folder: Path, seed: int) -> str:
        write_dataset(folder, seed=seed, sizes=SIZES)
        found = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            found.update(path.relative_to(folder).as_posix().encode())
            found.update(Image.open(path).tobytes() if path.suffix == ".png" else path.read_bytes())
        return found.hexdigest()

    first = digest(tmp_path / "a", 0)
    assert first == digest(tmp_path / "b", 0) != digest(tmp_path / "c", 1)
    assert (
        first == "90a324bf4f977567ca656c9ee49f7ee58bc20aa4c184373a5ecf43740d02c31b"
    )  # the data of the shipped weights must not change


def test_questions_are_answered_from_the_scene() -> None:
    scene = Scene(
        (SceneObject("circle", "red", "large", "top left"), SceneObject("circle", "blue", "small", "top right"))
    )
    rng = np.random.default_rng(0)
    answers: dict[str, set[str]] = {}
    for _ in range(200):
        for kind, question, answer in questions(scene, rng):
            answers.setdefault(kind, set()).add(answer)
            if kind == "color" and "large" in question:
                assert answer == "red"
            if kind == "position" and "blue" in question:
                assert answer == "top right"
    assert answers == {
        "color": {"red", "blue"},
        "shape": {"circle"},
        "size": {"large", "small"},
        "position": {"top left", "top right"},
        "count": {"zero", "one", "two"},
        "yes_no": {"yes", "no"},
    }


def test_yes_and_no_are_balanced() -> None:
    rng = np.random.default_rng(1)
    answers = [answer for _ in range(600) for kind, _, answer in questions(sample_scene(rng), rng) if kind == "yes_no"]
    assert 0.42 < answers.count("yes") / len(answers) < 0.58


def test_twins_have_no_position_question() -> None:
    twins = Scene((SceneObject("cross", "red", "large", "top left"), SceneObject("cross", "red", "large", "top right")))
    rng = np.random.default_rng(2)
    for _ in range(20):
        assert "position" not in {kind for kind, _, _ in questions(twins, rng)}


def test_edits_change_what_they_say() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        scene = sample_scene(rng)
        kind, instruction, changed = edit(scene, rng)
        assert changed != scene
        assert changed.background == scene.background
        gone = set(scene.objects) - set(changed.objects)
        new = set(changed.objects) - set(scene.objects)
        assert len(gone) == (kind != "add")
        assert len(new) == (kind != "remove")
        if new:
            (item,) = new
            asked = (item.color, item.shape, item.size, item.position) if kind == "add" else (getattr(item, kind),)
            assert all(word in instruction for word in asked)


def test_next_frame_continues_around_the_image() -> None:
    rng = np.random.default_rng(4)
    opposite = {"top left": "bottom right", "top right": "bottom left"}
    opposite |= {corner: other for other, corner in opposite.items()}
    for _ in range(20):
        first, _, third = next_frame(sample_scene(rng, num_objects=1), rng)
        assert third.objects[0].position == opposite[first.objects[0].position]
    with pytest.raises(ValueError, match="one object"):
        next_frame(sample_scene(rng, num_objects=2), rng)


def test_facts_and_prompts_agree() -> None:
    rng = np.random.default_rng(5)
    by_name = {thing.name: thing for thing in THINGS}
    assert fact(by_name["grass"]) == "grass is green"
    assert fact(by_name["the sun"]) == "the sun is a yellow circle"
    assert fact(by_name["a plus sign"]) == "a plus sign is a cross"
    for _ in range(200):
        prompt, scene, thing = knowledge_prompt(rng, drawn=bool(rng.integers(2)))
        (item,) = scene.objects
        assert thing.name in prompt.lower()
        assert thing.color in (None, item.color)
        assert thing.shape in (None, item.shape)
        assert thing.color is None or thing.color not in words_of(prompt)
        assert not scene.has_held_out
        assert len(fact_questions(thing, rng)) >= 3


def test_every_colour_has_a_thing_to_draw_and_one_to_test() -> None:
    for drawn in (True, False):
        assert {thing.color for thing in THINGS if thing.drawn == drawn} >= {
            "red", "green", "blue", "yellow", "orange", "purple", "black",
        }  # fmt: skip
