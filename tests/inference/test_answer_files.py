"""Files of answers: names, contact sheets, visual tokens and conversations."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from metamorph.files.permissions import save_file
from metamorph.inference import SamplerSettings
from metamorph.inference.answer_files import AnswerFiles, contact_sheet, load_tokens, save_conversation, save_tokens
from metamorph.models.processing_metamorph import ImagePart, TextPart


TOKENS = torch.arange(8.0).reshape(2, 4)


def part(*colours: str) -> ImagePart:
    return ImagePart(TOKENS, tuple(Image.new("RGB", (8, 8), colour) for colour in colours))


def test_several_images_get_numbered_names(tmp_path: Path) -> None:
    files = AnswerFiles(tmp_path / "new" / "a.png", {})
    assert [file.name for each in ("red", "blue") for file in files.add(part(each))] == ["a.png", "a-2.png"]
    assert [Image.open(file).getpixel((0, 0)) for (file,) in files.files] == [(255, 0, 0), (0, 0, 255)]
    assert [Image.open(file).text["seed"] for (file,) in files.files] == ["0", "1"]
    assert files.save_sheet() == tmp_path / "new" / "a-sheet.png"
    assert [file.name for file in AnswerFiles(tmp_path / "new" / "a.png", {}).add(part("red"))] == ["a-3.png"]
    assert [file.name for file in AnswerFiles(tmp_path / "new" / "a.png", {}, overwrite=True).add(part("red"))] == [
        "a.png"
    ]
    (tokens,) = files.add(ImagePart(TOKENS))
    assert (tokens.name, load_tokens(tokens).tolist()) == ("a.safetensors", TOKENS[None].tolist())


@pytest.mark.parametrize(
    ("parts", "settings", "size"),
    [
        ([part("red", "blue", "red", "blue")], SamplerSettings([1, 3], num_images=2), (258, 280)),
        ([part("red", "blue", "red")], SamplerSettings(3, num_images=3), (388, 150)),
        ([part("red"), part("blue")], SamplerSettings(3), (128, 280)),
    ],
)
def test_a_contact_sheet_has_all_drawings(parts: list[ImagePart], settings: SamplerSettings, size) -> None:
    sheet = contact_sheet(parts, settings)
    assert sheet.size == size
    cells = [
        (64 + 130 * column, 22 + 64 + 130 * row)
        for row in range(size[1] // 129)
        for column in range(-(-size[0] // 130))
    ]
    drawn = [image.getpixel((0, 0)) for each in parts for image in each.images]
    assert [sheet.getpixel(cell) for cell in cells] == drawn


def test_other_files_are_no_tokens(tmp_path: Path) -> None:
    save_file({"weight": TOKENS}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no visual_tokens"):
        load_tokens(tmp_path / "other.safetensors")
    save_tokens(TOKENS / 0, tmp_path / "nan.safetensors", {})
    with pytest.raises(ValueError, match="must be finite numbers of shape"):
        load_tokens(tmp_path / "nan.safetensors")
    (tmp_path / "text").write_text("x")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_tokens(tmp_path / "text")


def test_a_conversation_is_saved_with_its_images(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [part("red"), TextPart("again")]},
        {"role": "assistant", "content": [part("blue", "green"), ImagePart(TOKENS)]},
    ]
    save_conversation(messages, tmp_path / "new" / "talk.json")
    saved = json.loads((tmp_path / "new" / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert saved[0] == messages[0]
    assert saved[1]["content"] == [{"type": "image", "path": "talk/1.png"}, {"type": "text", "text": "again"}]
    assert saved[2]["content"] == [
        {"type": "image", "path": "talk/2.png"},
        {"type": "image", "visual_tokens": "talk/3.safetensors"},
    ]
    colours = [Image.open(tmp_path / "new" / "talk" / name).getpixel((0, 0)) for name in ("1.png", "2.png", "2-2.png")]
    assert colours == [(255, 0, 0), (0, 0, 255), (0, 128, 0)]
