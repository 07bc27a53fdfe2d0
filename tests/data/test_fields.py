"""Other layouts through `fields:`, and what is said of fields that nobody reads."""

import io
import json
import logging
import re
import tarfile

import pytest
import torch
import yaml
from PIL import Image
from processing_parts import build_processor, llava, write_jsonl

from metamorph.data.batching.collation import PaddedCollator
from metamorph.data.batching.lengths import measure
from metamorph.data.checks.check import check_dataset
from metamorph.data.dataset import load_data
from metamorph.data.features import ImageSet
from metamorph.data.fields import NAMES, FieldMap
from metamorph.data.mixture import SourceSpec
from metamorph.data.records import DataError, RecordError


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("c.png", "lime")):
        Image.new("RGB", (16, 12), colour).save(tmp_path / name)
    return tmp_path


def opened(folder, processor, records, *, task="instruction", fields=None, name="data", **options):
    """A mixture of one source, always of the same name: it takes part in what tasks draw."""
    path = write_jsonl(folder / f"{name}.jsonl", records)
    entry = {"path": path.name, "task": task, "name": "source", **({"fields": fields} if fields else {})}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump([entry]))
    return load_data(folder / f"{name}.yaml", processor, **options)


TALK = ("<image>\nWhat is it?", "Red.", "And now draw it.", "<image>")
PARTS = [
    {"role": "developer", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": "a.png"}},
            {"type": "text", "text": "\nWhat is it?"},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
    {"role": "user", "content": "And now draw it."},
    {"role": "assistant", "content": [{"type": "image", "image": "b.png"}]},
]
WITH_SYSTEM = {
    "id": "1",
    "image": ["a.png", "b.png"],
    "conversations": [{"from": "system", "value": "Be brief."}, *llava("1", *TALK)["conversations"]],
}
LAYOUTS = {
    "InstructPix2Pix": (
        "image_edit",
        {"source": "input_image", "instruction": "edit_prompt", "target": "edited_image"},
        {"id": "1", "input_image": "a.png", "edit_prompt": "Make it blue.", "edited_image": "b.png", "source": "web"},
        {"id": "1", "source": "a.png", "instruction": "Make it blue.", "target": "b.png"},
    ),
    "imagefolder": (
        "text_to_image",
        {"image": "file_name", "caption": "text", "id": "number"},
        {"number": 1, "file_name": "a.png", "text": "Red."},
        {"id": "1", "image": "a.png", "caption": "Red."},
    ),
    "images as objects": (
        "text_to_image",
        {"image": "img"},
        {"id": "1", "img": {"bytes": None, "path": "a.png"}, "caption": "Red."},
        {"id": "1", "image": "a.png", "caption": "Red."},
    ),
    "OpenAI": (
        "instruction",
        {"conversations": "messages", "from": "role", "value": "content"},
        {"id": "1", "messages": PARTS},
        WITH_SYSTEM,
    ),
    "parts without paths": (
        "instruction",
        {"conversations": "messages", "from": "role", "value": "content", "image": "images"},
        {
            "id": "1",
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": "Red."},
            ],
        },
        llava("1", "<image>What?", "Red.", image="a.png"),
    ),
    "ShareGPT": (
        "instruction",
        {
            "conversations": "dialogue",
            "from": "speaker",
            "value": "text",
            "human": "USER",
            "gpt": "BOT",
            "image": "images",
            "system": "system_prompt",
        },
        {
            "id": "1",
            "images": ["a.png", "b.png"],
            "system_prompt": "Be brief.",
            "dialogue": [
                {"speaker": speaker, "text": text} for speaker, text in zip(("USER", "BOT") * 2, TALK, strict=True)
            ],
        },
        WITH_SYSTEM,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_set_in_another_layout_gives_the_same_batches(layout, folder, processor):
    task, fields, theirs, ours = LAYOUTS[layout]
    other = opened(folder, processor, [theirs], task=task, fields=fields, name="theirs")
    plain = opened(folder, processor, [ours], task=task, name="ours")
    collate = PaddedCollator(processor.pad_token_id)
    found, expected = collate([other[0]]), collate([plain[0]])
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else name == "indices"
    assert other.datasets[0].measure(0) == plain.datasets[0].measure(0)
    assert ImageSet(other).num_images == ImageSet(plain).num_images > 0
    assert check_dataset(other).problems == []


def test_lengths_and_fingerprints_follow_the_fields(folder, processor):
    record = {"id": "1", "image": "a.png", "short": "Red.", "long": "A long sentence about red."}
    lengths, prints = [], []
    for field in ("short", "long"):
        data = opened(folder, processor, [record], task="text_to_image", fields={"caption": field})
        lengths.append(measure(data, 0, folder / "cache").tokens[0])
        prints.append(data.fingerprint())
    assert lengths[0] < lengths[1]
    assert prints[0] != prints[1]


def test_tars_are_read_through_fields_too(folder, processor):
    with tarfile.open(folder / "s-0.tar", "w") as tar:
        for name, content in (
            ("7.png", (folder / "a.png").read_bytes()),
            ("7.json", json.dumps({"alt": "Red."}).encode()),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    entry = {"path": "s-{0..0}.tar", "task": "text_to_image", "fields": {"caption": "alt"}}
    (folder / "m.yaml").write_text(yaml.safe_dump([entry]))
    data = load_data(folder / "m.yaml", processor)
    assert "Red." in data.datasets[0].conversation(0).turns[0].text


@pytest.mark.parametrize(
    ("fields", "record", "kind", "message"),
    [
        (
            {"caption": "text"},
            {"id": "r", "image": "a.png", "txt": "A"},
            "bad_field",
            r"data.jsonl:1 \(id 'r'\): fields: takes \"caption\" from 'text', which the record lacks; it has id, image",
        ),
        (
            {"image": "file", "caption": "text"},
            {"id": "r", "file": ["a.png", "b.png"], "text": "A"},
            "image_count",
            r'"image" names 2 \(by fields: "image" is \'file\' in the records\)',
        ),
        (
            {"image": "file", "caption": "text"},
            {"id": "r", "file_name": "a.png", "text": "A"},
            "unread_media",
            r'"file_name": \'a.png\' looks like media, but is not read',
        ),
        ({"image": "file"}, {"id": "r", "file": 7}, "bad_image_field", "\"image\" is 'file' in the records"),
    ],
)
def test_errors_name_the_field_of_the_records(fields, record, kind, message, folder, processor):
    data = opened(folder, processor, [record], task="text_to_image", fields=fields, check=False)
    with pytest.raises(RecordError, match=message) as error:
        data.datasets[0].conversation(0)
    assert (error.value.kind, error.value.record_id) == (kind, "r")
    assert str(error.value) == f"{error.value.where} (id 'r'): {error.value.detail}"  # the report shows the detail


@pytest.mark.parametrize(
    ("turn", "more", "kind", "message"),
    [
        ({"role": "bot", "content": "Hi"}, {}, "unknown_speaker", "\"from\" is 'role' in the records"),
        ({"role": "user", "content": None}, {}, "bad_turn", "\"value\" is 'content' in the records"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, {}, "bad_turn", "a part that is not one of"),
        ("Hi", {}, "bad_turn", "turn 1 must be a JSON object"),
        ({"role": "user", "content": [{"type": "image", "path": "a.png"}]}, {"image": "b.png"}, "bad_turn", "keep one"),
        ({"role": "system", "content": "Hi"}, {"system": "Be brief."}, "bad_turn", "keep one of them"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}]},
            {},
            "missing_image",
            "is an address, and nothing is downloaded",
        ),
    ],
)
def test_turns_that_cannot_be_read_are_named(turn, more, kind, message, folder, processor):
    fields = {"conversations": "messages", "from": "role", "value": "content", "system": "system"}
    record = {"id": "r", "messages": [turn, {"role": "assistant", "content": "Yes."}], **more}
    data = opened(folder, processor, [record], fields=fields, check=False)
    with pytest.raises(RecordError, match=message) as error:
        data[0]
    assert error.value.kind == kind


def test_keys_of_fields_are_checked():
    with pytest.raises(ValueError, match=r"unknown key 'images': did you mean 'image'\? Keys are id, image"):
        SourceSpec("a.jsonl", fields={"images": "image"})
    with pytest.raises(ValueError, match="fields: image must be the name of a field in the records, not 3"):
        SourceSpec("a.jsonl", fields={"image": 3})
    with pytest.raises(ValueError, match="fields must be a mapping of names to values"):
        SourceSpec("a.jsonl", fields=["image"])
    assert FieldMap().apply(["no record"], "f:1") == ["no record"]


# What nobody reads

HI = llava("r", "Hi", "Hello.")["conversations"]
UNREAD = {
    "images without marker": ({"images": ["a.png"]}, "unread_media", r"fields: \{image: images\}"),
    "image_path": ({"image_path": "a.png"}, "unread_media", r"fields: \{image: image_path\}"),
    "any name": ({"scene": "x/a.png"}, "unread_media", r"fields: \{image: scene\}"),
    "object": ({"picture": {"path": "a.png"}}, "unread_media", r"fields: \{image: picture\}"),
    "videos": ({"videos": ["a.mp4"]}, "unread_media", r"fields: \{video: videos\}"),
    "audio": ({"audio": "a.wav"}, "unread_media", r"audio is not supported"),
    "system": ({"system": "Answer in French."}, "unread_field", r"fields: \{system: system\}"),
    "video marker": (
        {"conversations": llava("r", "<video>\nWhat?", "A cat.")["conversations"]},
        "unread_marker",
        "video_qa",
    ),
    "no answer": ({"conversations": [*HI, {"from": "human", "value": "And?"}]}, "no_answer", r"turn 3 \(user\)"),
    "next to an image": (
        {**llava("r", "<image>?", "A cat.", image="a.png"), "picture": "b.png"},
        "unread_field",
        r"fields: \{image: picture\}",
    ),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_is_not_read_is_reported_by_kind(case, folder, processor, caplog):
    more, kind, message = UNREAD[case]
    record = {"id": "r", "conversations": HI, **more}
    data = opened(folder, processor, [record], check=False)
    (problem,) = check_dataset(data).problems
    assert problem.kind == kind
    assert re.search(message, problem.detail)
    if kind == "unread_media":  # training refuses it, and names file, record and field
        with pytest.raises(DataError, match=rf"data.jsonl:1 \(id 'r'\): .*{message}"):
            opened(folder, processor, [record])
        return
    with caplog.at_level(logging.WARNING):  # training accepts it, and says so
        opened(folder, processor, [record])
    assert re.search(rf"{kind} in 1 record\(s\); the first: .*{message}", caplog.text)


@pytest.mark.parametrize(
    "record",
    [
        {"images": [], "image_path": None, "img": ""},
        {"id": "0001.jpg", "question_id": "a.png"},
        {"url": "https://example.org/a.png"},
        {"images": [0.1, 0.2], "audio": False},
        {"note": "Have a look at a.png", "score": 1.5},
        {"conversations": llava("r", "What is the HTML tag <video> for?", "Videos.")["conversations"]},
        {**llava("r", "<image>?", "A cat.", image="x/a.png"), "file_name": "a.png", "image_url": "http://x.org/b.png"},
    ],
)
def test_fields_that_are_no_media_are_left_alone(record, folder, processor):
    (folder / "x").mkdir()
    (folder / "a.png").rename(folder / "x" / "a.png")
    assert check_dataset(opened(folder, processor, [{"id": "r", "conversations": HI, **record}])).problems == []


def test_fields_can_be_left_out_on_purpose(folder, processor):
    record = {"id": "r", "conversations": HI, "image_path": "a.png", "system": "Be brief."}
    data = opened(folder, processor, [record], fields={"ignore": ["image_path", "system"]})
    assert check_dataset(data).problems == []


def test_video_records_say_what_the_video_is_called(folder, processor):
    record = {"id": "r", "videos": ["a.mp4"], "conversations": HI}
    data = opened(folder, processor, [record], task="video_qa", check=False)
    with pytest.raises(RecordError, match=r"fields: \{video: videos\}"):
        data.datasets[0].conversation(0)


def test_the_documented_layouts_are_valid_and_have_every_key(request):
    page = (request.config.rootpath / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.split("## Other layouts")[1].split("\n## ")[0]
    entries = [yaml.safe_load(block)[0] for block in re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)]
    tasks = ["text_to_image", "image_edit", "instruction", "instruction"]
    assert [SourceSpec(**entry).task for entry in entries] == tasks
    table = section.split("| Key |")[1].split("\n\n")[0]
    for name in NAMES:
        assert f"`{name}`" in table
