"""Tasks on records written by hand: what is asked, what is answered, and with which images."""

import json
import re
import runpy
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from processing_parts import build_processor, llava

from metamorph.data.checks.check import WARNINGS
from metamorph.data.dataset import load_data
from metamorph.data.media.video import VideoInfo
from metamorph.data.records import BAD_RECORD_KINDS, RecordError, parse_record
from metamorph.data.tasks import TASKS, Box, ImageRef, get_task, parse_options
from metamorph.data.tasks.frame_prediction import TEMPLATES


def video_of(*times: float, last: float = 0.1) -> VideoInfo:
    return VideoInfo(times=times, duration=times[-1] + last)


def every_second(seconds: int, fps: int = 10) -> VideoInfo:
    """A video of this number of seconds."""
    return video_of(*(index / fps for index in range(seconds * fps)), last=1 / fps)


def apply(name: str, record: dict, *, seed: int = 0, video: VideoInfo | None = None, **options):
    task = get_task(name)
    parsed = parse_record(record, "data.jsonl:1")
    return task(parsed, np.random.default_rng(seed), parse_options(task, options), video)


def said(conversation) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in conversation.turns]


def refused(kind: str, name: str, record: dict, **options) -> str:
    """The message with which a task refuses a record; the kind is one of those that are counted."""
    assert kind in BAD_RECORD_KINDS
    with pytest.raises(RecordError) as error:
        apply(name, record, **options)
    assert (error.value.kind, error.value.where, error.value.record_id) == (kind, "data.jsonl:1", "r")
    return str(error.value)


def check_agreement(conversation) -> None:
    """Turns alternate, and there are as many markers as images."""
    assert [turn.role for turn in conversation.turns if turn.role != "system"][:2] == ["user", "assistant"]
    assert sum(turn.text.count("<image>") for turn in conversation.turns) == len(conversation.images)
    assert not any("{" in turn.text for turn in conversation.turns)


# instruction


def test_r14_a_path_does_not_choose_the_task():
    for path in ("visual_cot/a.jpg", "k700/a.jpg", "vstar.jpg", "a.mov/b.png"):
        conversation = apply("instruction", llava("r", "<image>\nWhat is it?", "A cat.", image=path))
        assert said(conversation) == [("user", "<image>\nWhat is it?"), ("assistant", "A cat.")]
        assert conversation.images == (ImageRef(path),)


def test_r22_instruction_has_images_anywhere():
    record = llava("r", "<image><image>Both?", "<image>", "<image_start><image><image_end>", "ok", image=list("abcd"))
    conversation = apply("instruction", record)
    assert [ref.path for ref in conversation.images] == ["a", "b", "c", "d"]
    assert conversation.num_answer_images == 1


def test_instruction_refuses_what_does_not_fit():
    assert "2 <image> marker(s), but" in refused(
        "image_count", "instruction", llava("r", "<image> <image>", "b", image="a")
    )
    assert "turn 1 is spoken by the assistant" in refused(
        "role_order", "instruction", {"id": "r", "conversations": [{"from": "gpt", "value": "x"}]}
    )
    assert "task: video_qa" in refused("bad_video_field", "instruction", llava("r", "<image> Why?", "b", image="a.mp4"))
    assert '"conversations"' in refused("no_conversations", "instruction", {"id": "r"})


# text_to_image


@pytest.mark.parametrize(
    "record",
    [
        {"id": "r", "image": "a.jpg", "caption": "A red {cat}."},
        {"id": "r", "image": ["a.jpg"], "text": "A red {cat}."},
        {"id": "r", "image": "a.jpg", "captions": ["A red {cat}."]},
        llava("r", "<image>\nDescribe it.", "A red {cat}.", image="a.jpg"),
    ],
)
@pytest.mark.parametrize("seed", range(6))
def test_text_to_image(record, seed):
    conversation = apply("text_to_image", record, seed=seed)
    (user, prompt), (assistant, answer) = said(conversation)
    assert (user, assistant) == ("user", "assistant")
    assert "A red {cat}." in prompt
    assert "<image>" not in prompt
    assert answer.count("<image>") == 1
    assert conversation.images == (ImageRef("a.jpg"),)


def test_one_of_several_captions_is_drawn():
    record = {"id": "r", "image": "a.jpg", "names": ["one", "two", "three"], "caption": "other"}
    prompts = {apply("text_to_image", record, seed=seed, caption_field="names").turns[0].text for seed in range(30)}
    assert {word for prompt in prompts for word in re.findall("one|two|three|other", prompt)} == {"one", "two", "three"}


def test_markers_in_a_caption_are_no_images():
    conversation = apply("text_to_image", {"id": "r", "image": "a.jpg", "caption": "<image> A cat"})
    check_agreement(conversation)
    assert "<image>" not in conversation.turns[0].text


def test_text_to_image_refuses_what_does_not_fit():
    assert "takes one image" in refused("image_count", "text_to_image", {"id": "r", "caption": "a"})
    for record in ({"caption": "  "}, {"caption": 3}, {"captions": []}, {}, {"caption": "<image>"}):
        message = refused("bad_field", "text_to_image", {"id": "r", "image": "a.jpg", **record})
        assert 'write it as text in "caption"' in message
    refused("bad_field", "text_to_image", {"id": "r", "image": "a.jpg", "caption": "x"}, caption_field="alt")


# image_edit


@pytest.mark.parametrize(
    "record",
    [
        {"id": "r", "source": "a.jpg", "instruction": "Add a hat.", "target": "b.jpg"},
        {"id": "r", "input": "a.jpg", "instruction": "Add a hat.", "output": "b.jpg"},
        {"id": "r", "original_image": "a.jpg", "edit_prompt": "Add a hat.", "edited_image": "b.jpg"},
        {"id": "r", "image": ["a.jpg", "b.jpg"], "instruction": "Add a hat."},
        {"id": "r", "image": "a.jpg", "instruction": "Add a hat.", "target": "b.jpg"},
        llava("r", "<image>\nAdd a hat.", "<image>", image=["a.jpg", "b.jpg"]),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_image_edit(record, seed):
    conversation = apply("image_edit", record, seed=seed)
    (_, prompt), (_, answer) = said(conversation)
    assert "Add a hat." in prompt
    assert (prompt.count("<image>"), answer.count("<image>")) == (1, 1)
    assert conversation.images == (ImageRef("a.jpg"), ImageRef("b.jpg"))


def test_image_edit_reads_the_fields_of_its_options():
    record = {"id": "r", "before": "a.jpg", "how": ["Add a hat."], "after": "b.jpg", "source": "x", "target": "y"}
    names = {"source_field": "before", "instruction_field": "how", "target_field": "after"}
    assert apply("image_edit", record, **names).images == (ImageRef("a.jpg"), ImageRef("b.jpg"))


def test_image_edit_refuses_what_does_not_fit():
    whole = {"id": "r", "source": "a.jpg", "instruction": "Add a hat.", "target": "b.jpg"}
    assert "path of the image to edit" in refused("bad_field", "image_edit", {**whole, "source": 3})
    assert "path of the edited image" in refused("bad_field", "image_edit", {**whole, "target": None})
    assert "there is no instruction" in refused("bad_field", "image_edit", {**whole, "instruction": ""})
    assert "path of the edited image" in refused("bad_field", "image_edit", llava("r", "<image> b", "c", image="a"))
    assert "path of the image to edit" in refused("bad_field", "image_edit", {"id": "r", "instruction": "Add a hat."})


# visual_cot

REQUEST = "Please provide the bounding box coordinate of the region that can help you answer the question better."
COT = llava(
    "r",
    f"<image>\nWhat does the sign say? {REQUEST}",
    "[0.1, 0.2, 0.5, 0.6]",
    "<image>",
    "It says stop.",
    image=["a.jpg", "a.jpg###[10, 20, 110, 60]"],
)


def test_visual_cot_shows_the_crop_before_the_answer():
    conversation = apply("visual_cot", COT)
    (_, question), (_, answer) = said(conversation)
    assert question.startswith("<image>\nWhat does the sign say?")
    assert "bounding box" not in question
    assert answer.count("<image>") == 1
    assert answer.endswith("\nIt says stop.")
    assert conversation.images == (ImageRef("a.jpg"), ImageRef("a.jpg", crop=Box(10, 20, 110, 60)))


def test_visual_cot_keeps_a_question_about_a_box():
    record = llava("r", "<image>\nWhat is inside the bounding box?", "A cat.", image=["a.jpg", "a.jpg###[1, 2, 3, 4]"])
    assert apply("visual_cot", record).turns[0].text.startswith("<image>\nWhat is inside the bounding box?")


def test_visual_cot_takes_two_turns_too_and_several_crops():
    crops = ["a###b.jpg###[10,20,110,60]", "a.jpg###[ 1.5, 2, 3, 4e1 ]"]
    conversation = apply("visual_cot", llava("r", "What is it?", "A cat.", image=["a.jpg", *crops]))
    assert conversation.turns[0].text.startswith("<image>\nWhat is it?")
    assert conversation.turns[1].text.count("<image><image>") == 1
    assert conversation.images[1:] == (
        ImageRef("a###b.jpg", crop=Box(10, 20, 110, 60)),
        ImageRef("a.jpg", crop=Box(1.5, 2, 3, 40)),
    )


def test_visual_cot_options():
    (_, ref) = apply("visual_cot", COT, margin=0.5).images
    assert ref.crop == Box(-40, 0, 160, 80)
    record = {**COT, "image": ["a.jpg", "a.jpg###[0.5, 0, 1, 1]"]}
    assert apply("visual_cot", record, box_units="relative").images[1].crop == Box(0.5, 0, 1, 1, relative=True)


@pytest.mark.parametrize(
    "box", ["[10, 20, 5, 60]", "[1, 2, 3]", "[a, b, c, d]", "1, 2, 3, 4", "[1, 2, nan, 4]", "[1, 2, 3, 1e300]", ""]
)
def test_boxes_that_enclose_nothing_are_named(box):
    assert f"a.jpg###{box}" in refused("bad_box", "visual_cot", {**COT, "image": ["a.jpg", f"a.jpg###{box}"]})


def test_visual_cot_refuses_what_does_not_fit():
    assert "0 with a box" in refused("image_count", "visual_cot", {**COT, "image": ["a.jpg", "b.jpg"]})
    assert "0 image(s) without" in refused("image_count", "visual_cot", {**COT, "image": ["a.jpg###[1, 2, 3, 4]"]})
    assert "3 human" in refused("bad_turn", "visual_cot", llava("r", *"abcdef", image=COT["image"]))
    refused("bad_turn", "visual_cot", llava("r", "a", "<image>", image=COT["image"]))
    refused("image_count", "visual_cot", llava("r", "<image> <image> a", "b", image=COT["image"]))


# vstar

VSTAR = {
    **llava("r", "<image>\nWhat colour is the cup?", "It is red.", "And the dog?", "Brown.", image="a.jpg"),
    "target_instances": [{"name": "cup", "bbox": [10, 20, 30, 40]}, {"name": "dog", "bbox": [1, 2, 3, 4]}],
}


def test_vstar_shows_the_marked_image_before_the_answer():
    conversation = apply("vstar", VSTAR)
    turns = said(conversation)
    assert turns[0][1].startswith("<image>\nWhat colour is the cup?\n")
    assert turns[1][1].endswith("<image>\nIt is red.")
    assert turns[2:] == [("user", "And the dog?"), ("assistant", "Brown.")]
    marked = ImageRef("a.jpg", boxes=(("cup", Box(10, 20, 40, 60)), ("dog", Box(1, 2, 4, 6))))
    assert conversation.images == (ImageRef("a.jpg"), marked)


def test_vstar_options():
    (_, marked) = apply("vstar", VSTAR, box_format="xyxy", draw_names=False).images
    assert marked.boxes == (("", Box(10, 20, 30, 40)), ("", Box(1, 2, 3, 4)))
    record = {**VSTAR, "target_instances": [{"name": "cup", "bbox": [0.25, 0.5, 0.25, 0.5]}]}
    (_, marked) = apply("vstar", record, box_units="relative").images
    assert marked.boxes == (("cup", Box(0.25, 0.5, 0.5, 1.0, relative=True)),)


def test_vstar_refuses_what_does_not_fit():
    assert "task: instruction" in refused("bad_field", "vstar", {**VSTAR, "target_instances": []})
    assert 'no "name"' in refused("bad_field", "vstar", {**VSTAR, "target_instances": [{"bbox": [1, 2, 3, 4]}]})
    assert "target instance 1" in refused("bad_box", "vstar", {**VSTAR, "target_instances": [{"name": "cup"}]})
    assert "takes one image" in refused("image_count", "vstar", {**VSTAR, "image": ["a.jpg", "b.jpg"]})
    refused("no_conversations", "vstar", {**VSTAR, "conversations": None})


# video_qa


@pytest.mark.parametrize("marker", ["<image>\n", "<video>\n", "", "<image_start><image><image_end>\n"])
def test_video_qa_has_a_marker_for_each_frame(marker):
    record = llava("r", f"{marker}What happens?", "A race.", image="a.mp4")
    conversation = apply("video_qa", record, video=every_second(4))
    assert said(conversation) == [("user", "<image><image><image><image>\nWhat happens?"), ("assistant", "A race.")]
    assert conversation.images == tuple(ImageRef("a.mp4", time=float(time)) for time in range(4))


@pytest.mark.parametrize(
    ("video", "options", "times"),
    [
        pytest.param(every_second(2), {}, [0, 1], id="two seconds"),
        pytest.param(every_second(20), {"max_frames": 4}, [0, 6.3, 12.6, 19], id="long"),
        pytest.param(every_second(2), {"fps": 2}, [0, 0.5, 1, 1.5], id="two a second"),
        pytest.param(video_of(0, 3, 6, last=3), {}, [0, 3, 6], id="under one a second"),
        pytest.param(video_of(0, 0.2, 0.3, 2.5), {}, [0, 0.3], id="variable rate"),
        pytest.param(video_of(0), {}, [0], id="one frame"),
        pytest.param(video_of(0, 1, last=0), {}, [0, 1], id="last frame without length"),
        pytest.param(every_second(3), {"max_frames": 1}, [0], id="one wanted"),
    ],
)
def test_video_qa_takes_different_frames(video, options, times):
    conversation = apply("video_qa", llava("r", "What happens?", "A race.", image="a.mp4"), video=video, **options)
    check_agreement(conversation)
    assert [ref.time for ref in conversation.images] == pytest.approx(times)


def test_video_qa_refuses_what_does_not_fit():
    video = every_second(2)
    record = {**llava("r", "<video> <video>?", "A race."), "video": "a.mp4"}
    assert "there is one video" in refused("image_count", "video_qa", record, video=video)
    record = llava("r", "What happens?", "<image>", image="a.mp4")
    assert "in a human turn" in refused("role_order", "video_qa", record, video=video)
    assert 'name its path in "video"' in refused("missing_video", "video_qa", llava("r", "a", "b", image="a.jpg"))


# frame_prediction

CLIP = {"id": "r", "video": "a.mp4"}
VIDEOS = {
    "two frames": video_of(0, 0.04),
    "a slow one": video_of(0, 4, 8, 12, last=4),
    "two seconds": every_second(2),
    "a minute": every_second(60),
    "variable rate": video_of(0, 0.1, 0.2, 5, 5.1, 9),
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("video", VIDEOS.values(), ids=VIDEOS)
def test_r13_every_template_draws_and_its_markers_and_frames_agree(template, video):
    for seed in range(20):
        conversation = apply("frame_prediction", CLIP, seed=seed, video=video, templates=[template])
        check_agreement(conversation)
        assert conversation.num_answer_images >= 1
        assert len(conversation.images) <= 12  # six frames, all of them twice in `reorder`
        assert all(ref.time in video.times for ref in conversation.images)


def frames_of(template: str, seed: int = 0, count: int = 6, **options):
    """Which of the frames are seen and drawn, turn by turn, and the conversation."""
    video = video_of(*range(count))
    conversation = apply("frame_prediction", CLIP, seed=seed, video=video, templates=[template], **options)
    times = iter(ref.time for ref in conversation.images)
    return [[next(times) for _ in range(turn.text.count("<image>"))] for turn in conversation.turns], conversation


def test_forward():
    turns, conversation = frames_of("forward")
    assert turns == [[0], [1, 2, 3, 4, 5]]
    assert "5 frames" in conversation.turns[0].text


def test_split():
    cuts = set()
    for seed in range(20):
        (seen, drawn), conversation = frames_of("split", seed)
        assert seen + drawn == [0, 1, 2, 3, 4, 5]
        assert f"{len(drawn)} frame" in conversation.turns[0].text
        cuts.add(len(seen))
    assert cuts == {1, 2, 3, 4, 5}


def test_backward():
    assert frames_of("backward")[0] == [[5], [4, 3, 2, 1, 0]]


def test_alternate():
    assert frames_of("alternate")[0] == [[0], [1], [2], [3], [4], [5]]


def test_alternate_of_an_odd_number_ends_with_an_answer():
    assert frames_of("alternate", count=5)[0] == [[0], [1], [2], [3]]


def test_reorder():
    for seed in range(20):
        (seen, drawn), _ = frames_of("reorder", seed)
        assert drawn == [0, 1, 2, 3, 4, 5]
        assert sorted(seen) == drawn != seen


def test_interval():
    for seed in range(10):
        ((seen,), (drawn,)), conversation = frames_of("interval", seed)
        assert seen < drawn
        assert f"{drawn - seen}.0 seconds later" in conversation.turns[0].text


def test_next_k():
    counts = set()
    for seed in range(20):
        (seen, drawn), conversation = frames_of("next_k", seed, max_next=2)
        assert seen + drawn == list(range(len(seen + drawn)))
        assert re.search(rf"\b{len(drawn)} frames?\b", conversation.turns[0].text)
        counts.add(len(drawn))
    assert counts == {1, 2}


def test_of_a_long_video_a_stretch_is_drawn():
    video = every_second(60)
    starts = set()
    for seed in range(10):
        conversation = apply("frame_prediction", CLIP, seed=seed, video=video, templates=["forward"], max_frames=3)
        times = [ref.time for ref in conversation.images]
        assert np.diff(times) == pytest.approx([1, 1])
        starts.add(times[0])
    assert len(starts) > 5


def test_a_caption_may_go_before_the_question():
    record = {**CLIP, "label": "somebody drops a cup"}
    conversation = apply("frame_prediction", record, video=every_second(3), caption_field="label")
    check_agreement(conversation)
    assert "somebody drops a cup" in conversation.turns[0].text.splitlines()[0]
    refused("bad_field", "frame_prediction", CLIP, video=every_second(3), caption_field="label")


def test_r13_a_video_of_one_frame_is_refused_not_crashed_on():
    assert "'a.mp4' has one frame" in refused("too_few_frames", "frame_prediction", CLIP, video=video_of(0))


# all tasks

EXAMPLES = {
    "instruction": llava("r", "<image> a", "b", image="a.jpg"),
    "text_to_image": {"id": "r", "image": "a.jpg", "caption": "a"},
    "image_edit": {"id": "r", "source": "a.jpg", "instruction": "Add a hat.", "target": "b.jpg"},
    "visual_cot": COT,
    "vstar": VSTAR,
    "video_qa": llava("r", "a", "b", image="a.mp4"),
    "frame_prediction": CLIP,
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_depends_on_its_record_and_generator_alone(name):
    def conversations():
        return [apply(name, EXAMPLES[name], seed=seed, video=every_second(5)) for seed in range(12)]

    first = conversations()
    assert conversations() == first
    assert (len(set(first)) > 1) == (name not in ("instruction", "video_qa"))
    for conversation in first:
        check_agreement(conversation)
        assert TASKS[name].draws <= (conversation.num_answer_images > 0)


def test_every_task_keeps_the_system_turn_where_the_data_have_one():
    system = {"from": "system", "value": "Be brief."}
    for name in ("instruction", "visual_cot", "vstar", "video_qa"):
        record = {**EXAMPLES[name], "conversations": [system, *EXAMPLES[name]["conversations"]]}
        conversation = apply(name, record, video=every_second(3))
        assert said(conversation)[0] == ("system", "Be brief.")
        check_agreement(conversation)


def test_unknown_tasks_and_options_name_the_nearest():
    with pytest.raises(ValueError, match=r"task 'video_qna' is unknown: use one of .* \(did you mean 'video_qa'\?\)"):
        get_task("video_qna")
    with pytest.raises(ValueError, match=r"video_qa has no option 'max_frame' \(did you mean 'max_frames'\?\)"):
        parse_options(get_task("video_qa"), {"max_frame": 3})
    with pytest.raises(ValueError, match="instruction has no option 'fps'; it has none"):
        parse_options(get_task("instruction"), {"fps": 3})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("text_to_image", {"caption_field": 3}, "caption_field must be the name of a field, not 3"),
        ("visual_cot", {"box_units": "cm"}, "box_units 'cm' is unknown: use one of pixels, relative"),
        ("visual_cot", {"margin": -1}, "margin must be a number, at least 0, not -1"),
        ("vstar", {"box_format": "x"}, "use one of xyxy, xywh"),
        ("vstar", {"draw_names": "no"}, "draw_names must be true or false, not 'no'"),
        ("video_qa", {"fps": 0}, "fps must be a number above 0, not 0"),
        ("video_qa", {"fps": "1"}, "fps must be a number above 0, not '1'"),
        ("video_qa", {"max_frames": 1.5}, "max_frames must be a whole number, at least 1, not 1.5"),
        ("frame_prediction", {"max_frames": 1}, "max_frames must be a whole number, at least 2, not 1"),
        ("frame_prediction", {"templates": []}, "templates must be a list of names"),
        ("frame_prediction", {"templates": ["forwards"]}, "template 'forwards' is unknown; use some of forward, split"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=rf"options of task {name}: .*{re.escape(message)}"):
        parse_options(get_task(name), options)


# documentation

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TASKS)
def test_the_documented_record_of_each_task_is_that_of_the_example(name):
    section = PAGE.split(f"### `{name}`\n")[1].split("\n## ")[0]
    (record,) = re.findall(r"```json\n(.*?)```", section.split("\n### ")[0], re.DOTALL)
    example = runpy.run_path(str(ROOT / "examples" / "prepare_data.py"))
    assert json.loads(record) == example["RECORDS"][name]


def test_the_example_gives_a_training_example_of_each_task(tmp_path):
    mixture = runpy.run_path(str(ROOT / "examples" / "prepare_data.py"))["write_data"](tmp_path)
    data = load_data(mixture, build_processor())
    assert list(data.sources) == list(TASKS)
    examples = [data[index] for index in range(len(data))]
    assert {example["source"] for example in examples} == set(TASKS)
    for example in examples:
        assert example["visual_target_mask"].any() == TASKS[example["source"]].draws


def test_every_template_option_and_kind_is_documented():
    for name in TEMPLATES:
        assert f"| `{name}` |" in PAGE
    for task in TASKS.values():
        if fields(task.options_type):
            assert f"{{{{ options {task.options_type.__module__}:{task.options_type.__name__} }}}}" in PAGE
    for kind in (*BAD_RECORD_KINDS, *WARNINGS):
        assert re.search(rf"^\|[^|]*`{kind}`", PAGE, re.MULTILINE), f"docs/data.md does not explain {kind}"
