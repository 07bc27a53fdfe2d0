"""`metamorph generate`: what it checks before loading weights, and the images it writes."""

from pathlib import Path

import pytest
from PIL import Image

from metamorph import cli
from metamorph.cli.generate import build_parser, check_inputs, save_images


ORIENTATION = 0x0112  # EXIF tag
TURN_90_CLOCKWISE = 6


def parse(*words: str):
    return build_parser().parse_args(["--model", "mini", *words])


@pytest.mark.parametrize(("prompt", "count"), [("Compare.", 2), ("Is <image> blue?", 1)])
def test_markers_may_be_anywhere_or_left_out(prompt: str, count: int, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png")
    flags = parse("--prompt", prompt, *["--image", str(tmp_path / "in.png")] * count)
    assert len(check_inputs(flags)) == count
    assert flags.prompt == prompt


def test_images_are_upright(tmp_path: Path) -> None:
    """A camera held sideways: the pixels lie, and EXIF says how to turn them."""
    image = Image.new("RGB", (16, 8), "white")
    image.paste("black", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[ORIENTATION] = TURN_90_CLOCKWISE
    image.save(tmp_path / "camera.jpg", exif=exif, quality=95)
    (opened,) = check_inputs(parse("--prompt", "x", "--image", str(tmp_path / "camera.jpg")))
    assert opened.size == (8, 16)
    assert max(opened.getpixel((4, 2))) < 30  # what was left is above
    assert min(opened.getpixel((4, 13))) > 225


def test_several_images_get_numbered_names(tmp_path: Path) -> None:
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    files = save_images(images, tmp_path / "new" / "a.png")
    assert [file.name for file in files] == ["a.png", "a-2.png"]
    assert [Image.open(file).getpixel((0, 0)) for file in files] == [(255, 0, 0), (0, 0, 255)]
    assert save_images([], tmp_path / "b.png") == []


@pytest.fixture
def generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog):
    """Runs the command with `mini` in an empty folder; returns what it printed and logged."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "metamorph")

    def run(*words: str) -> tuple[str, str]:
        caplog.clear()
        capsys.readouterr()
        flags = ["--model", "mini", "--visualizer", "mini", "--steps", "2"]
        assert cli.main(["generate", *flags, *words]) == 0
        return capsys.readouterr().out.strip(), caplog.text

    return run


def test_images_are_never_replaced_unasked(generate, tmp_path: Path) -> None:
    """And 64 pixels are shown enlarged, with the prompt above them."""
    printed, _ = generate("--prompt", "Draw a red circle")
    assert printed == "[image: generated.png, enlarged: generated-preview.png]"
    first = (tmp_path / "generated.png").read_bytes()
    with Image.open(tmp_path / "generated.png") as small, Image.open(tmp_path / "generated-preview.png") as preview:
        assert small.size == (64, 64)
        assert preview.width == 384 < preview.height
        caption = preview.crop((0, 0, 384, preview.height - 384)).convert("L")
        assert caption.getextrema() == (0, 255)
        assert preview.getpixel((192, 214)) == small.getpixel((32, 32))
    printed, _ = generate("--prompt", "Draw a blue square", "--seed", "3")
    assert printed == "[image: generated-2.png, enlarged: generated-2-preview.png]"
    assert (tmp_path / "generated.png").read_bytes() == first
    generate("--prompt", "Draw a blue square", "--output", "generated.png", "--overwrite")
    assert (tmp_path / "generated.png").read_bytes() != first


def test_draw_begins_the_answer_with_an_image(generate, tmp_path: Path) -> None:
    question = ["--prompt", "<image>\nWhat color is the object?", "--image", "in.png"]
    Image.new("RGB", (64, 64), "white").save(tmp_path / "in.png")
    printed, logged = generate(*question)
    assert "[image" not in printed
    assert "the answer has no image to draw; with --draw it begins with one" in logged
    printed, logged = generate(*question, "--draw", "--max-new-tokens", "18")
    assert printed.startswith("[image: generated.png")
    assert "no image" not in logged


def test_default_number_of_new_tokens_fits_an_image(generate) -> None:
    assert build_parser().parse_args(["--model", "m", "--prompt", "p"]).max_new_tokens is None
    printed, logged = generate("--prompt", "Draw a red circle", "--max-new-tokens", "17")
    assert "[image" not in printed
    assert "--max-new-tokens 17 has no room for an image, which takes 18" in logged
