"""Records: everything that is wrong is found, and named with its place and its fix."""

import pickle

import pytest
from processing_parts import llava

from metamorph.data.records import (
    BAD_RECORD_KINDS,
    DataError,
    RecordError,
    Turn,
    check_conversation,
    parse_record,
)
from metamorph.models.image_files import MediaError


GOOD = llava("a", "<image> What?", "A cat.", image="a.png")


def test_the_record_of_the_guide():
    record = parse_record(GOOD, "file:1")
    assert record.id == "a"
    assert record.images == ("a.png",)
    assert record.turns == (Turn("user", "<image> What?"), Turn("assistant", "A cat."))
    assert record.turns[1].as_message() == {"role": "assistant", "content": "A cat."}


def test_images_may_be_absent_one_or_many_in_any_turn():
    assert parse_record(llava("a", "Hi", "Yes."), "file:1").images == ()
    record = parse_record(llava("a", "<image><image>", "Then <image>.", image=["1.png", "2.png", "3.png"]), "file:1")
    assert record.images == ("1.png", "2.png", "3.png")


def test_a_system_turn_may_come_first():
    record = {
        "id": 7,
        "conversations": [{"from": "system", "value": "Be nice."}, *llava(0, "Hi", "Yes.")["conversations"]],
    }
    assert [turn.role for turn in parse_record(record, "file:1").turns] == ["system", "user", "assistant"]
    assert parse_record(record, "file:1").id == "7"


def test_a_record_without_id_is_known_by_its_place():
    record = {key: value for key, value in GOOD.items() if key != "id"}
    assert parse_record(record, "file:3").id == "file:3"


BAD = {
    "not an object": (["a"], "not_an_object", "must be a JSON object, not list"),
    "no conversations": ({"id": "x"}, "no_conversations", 'needs "conversations"'),
    "empty conversations": ({"id": "x", "conversations": []}, "no_conversations", 'needs "conversations"'),
    "conversations are text": ({"id": "x", "conversations": "Hi"}, "no_conversations", "not 'Hi'"),
    "turn is text": ({"id": "x", "conversations": ["Hi"]}, "bad_turn", "turn 1 must be a JSON object, not str"),
    "unknown speaker": (
        {"id": "x", "conversations": [{"from": "robot", "value": "Hi"}]},
        "unknown_speaker",
        "turn 1 has \"from\": 'robot'; use one of system, human",
    ),
    "OpenAI's messages": (
        {"id": "x", "messages": [{"role": "user", "content": "Hi"}]},
        "no_conversations",
        r"fields: \{conversations: messages, from: role, value: content\}",
    ),
    "OpenAI's turns": (
        {"id": "x", "conversations": [{"role": "user", "content": "Hi"}]},
        "unknown_speaker",
        r"fields: \{from: role, value: content\}",
    ),
    "no text": ({"id": "x", "conversations": [{"from": "human"}]}, "bad_turn", '"value": None; it must be a string'),
    "half a character": (
        llava("x", "Hi", "Yes \ud83d"),
        "broken_line",
        r"turn 2 has '\\ud83d' at character 4, half a character",
    ),
    "image is a number": ({**GOOD, "image": 3}, "bad_image_field", '"image" must be a path or a list of paths'),
    "image in a list of lists": ({**GOOD, "image": [["a.png"]]}, "bad_image_field", '"image" must be a path'),
    "empty image path": ({**GOOD, "image": ""}, "bad_image_field", '"image" must be a path'),
    "video is a number": ({**GOOD, "video": 3}, "bad_video_field", '"video" must be a path, not 3'),
    "two videos": ({"id": "x", "image": ["a.mp4", "b.mp4"]}, "bad_video_field", "at most one video, not 2"),
    "video and image": ({**GOOD, "video": "a.mp4"}, "bad_video_field", "not both 'a.mp4' and 'a.png'"),
    "more markers": (llava("x", "<image><image>", "Yes.", image="a.png"), "image_count", r"2 <image> .* names 1 image"),
    "more images": (llava("x", "Hi", "Yes.", image=["a.png"]), "image_count", r"0 <image> .* names 1 image"),
    "gpt begins": (
        {"id": "x", "conversations": [{"from": "gpt", "value": "Hi"}]},
        "role_order",
        "turn 1 is spoken by the assistant where the user is expected",
    ),
    "late system": (
        {"id": "x", "conversations": [*GOOD["conversations"], {"from": "system", "value": "Be nice."}]},
        "role_order",
        "turn 3 is spoken by the system",
    ),
}


def check(value):
    record = parse_record(value, "data.jsonl:17")
    check_conversation(record, record.turns, len(record.images))


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_named(name):
    value, kind, message = BAD[name]
    with pytest.raises(RecordError, match=message) as error:
        check(value)
    assert error.value.kind == kind
    assert kind in BAD_RECORD_KINDS
    assert str(error.value).startswith("data.jsonl:17")
    if isinstance(value, dict):
        assert "id 'x'" in str(error.value) or error.value.record_id == value["id"]


@pytest.mark.parametrize("fields", [{"video": "clips/a.MP4"}, {"image": "clips/a.MP4"}, {"image": ["clips/a.MP4"]}])
def test_a_video_may_stand_in_either_field(fields):
    record = parse_record({"id": "v", **fields}, "file:1")
    assert (record.video, record.images, record.turns) == ("clips/a.MP4", (), ())


def test_r13_a_video_is_known_by_the_end_of_its_path():
    """The original looked for ".mov" anywhere in a path."""
    record = parse_record({"image": ["the.movies/a.jpg", "b.mp4.png"]}, "file:1")
    assert record.video is None
    assert len(record.images) == 2


def test_r17_wrapped_images_count_once():
    value = llava("a", "<image_start><image><image_end> What?", "<image_start> <image> <image_end>", image=["1", "2"])
    check(value)


def test_fields_that_only_a_task_knows_are_kept():
    record = parse_record({"image": "a.png", "caption": "A cat."}, "file:9")
    assert record.fields["caption"] == "A cat."
    error = record.error("bad_box", "no box")
    assert (str(error), error.kind) == ("file:9 (id 'file:9'): no box", "bad_box")


def test_errors_can_be_printed():
    """Names and paths in untrusted data neither command the terminal nor begin a line of their own."""
    error = RecordError.at("a\x1b[2J.tar:b", "missing_image", "no file c\nWARNING\x9b31m.png", "\x07")
    assert str(error) == r"a\x1b[2J.tar:b (id '\x07'): no file c\nWARNING\x9b31m.png"
    assert error.where == r"a\x1b[2J.tar:b"
    assert str(DataError("two\n  lines\x1b[31m")) == "two\n  lines\\x1b[31m"
    assert str(MediaError("missing_image", "\x1b]0;\x07")) == r"\x1b]0;\x07"


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(RecordError.at("f:1", "bad_field", "detail", "a")))  # noqa: S301
    assert (str(error), error.kind, error.record_id) == ("f:1 (id 'a'): detail", "bad_field", "a")


def test_messages_are_short_whatever_the_record_holds():
    long = "x" * 10**6
    error = RecordError.at(long, "other", f"begin {long} and mend it", record_id=long)
    assert len(str(error)) < 1500
    assert str(error).endswith("and mend it")
    assert len(error.where) <= 200
    assert len(str(DataError(long))) <= 4000
