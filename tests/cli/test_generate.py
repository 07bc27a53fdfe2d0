"""`metamorph generate`: what it checks before loading weights, and the pictures it writes."""

from pathlib import Path

import pytest
from PIL import Image

from metamorph import cli
from metamorph.cli.generate import build_parser, check_inputs, save_images


ORIENTATION = 0x0112  # EXIF tag
TURN_90_CLOCKWISE = 6


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.new("RGB", (8, 8), "green").save(tmp_path / "in.png")
    return str(tmp_path / "in.png")


def parse(*words: str):
    return build_parser().parse_args(["--model", "owner/model", *words])


def test_markers_may_be_left_out(picture: str) -> None:
    flags = parse("--prompt", "Compare.", "--image", picture, "--image", picture)
    assert len(check_inputs(flags)) == 2


def test_markers_may_be_anywhere(picture: str) -> None:
    flags = parse("--prompt", "Is <image> blue?", "--image", picture)
    check_inputs(flags)
    assert flags.prompt == "Is <image> blue?"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "<image> <image>", "--image", "{picture}"], "has 2 <image>, but there are 1 --image"),
        (["--prompt", "x", "--image", "/none.png"], "--image /none.png does not exist"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "x", "--visualizer", "{folder}"], "is a folder without model_index.json"),
        (["--prompt", "x", "--model", "{folder}"], "is a folder without config.json"),
        (["--prompt", "x", "--model", "{folder}/nowhere/x"], "--model {folder}/nowhere/x does not exist"),
        (["--prompt", "x", "--visualizer", "{folder}/nowhere/x"], "--visualizer {folder}/nowhere/x does not exist"),
        (
            ["--prompt", "x", "--model", "nowhere/x"],
            "--model nowhere/x is neither a local folder nor in the Hub's cache",
        ),
    ],
)
def test_bad_input(words: list[str], message: str, picture: str, tmp_path: Path, capsys) -> None:
    words = [word.format(picture=picture, folder=tmp_path) for word in words]
    assert cli.main(["generate", "--model", "mini", *words]) == 2
    assert message.format(folder=tmp_path) in capsys.readouterr().err


def test_pictures_are_upright(tmp_path: Path) -> None:
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


def test_broken_picture_is_named(picture: str, tmp_path: Path, capsys) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(picture).read_bytes()[:40])
    assert cli.main(["generate", "--model", "owner/model", "--prompt", "x", "--image", str(broken)]) == 2
    assert f"--image {broken} cannot be read as an image" in capsys.readouterr().err


def test_several_pictures_get_numbered_names(tmp_path: Path) -> None:
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    files = save_images(images, tmp_path / "new" / "a.png")
    assert [file.name for file in files] == ["a.png", "a-2.png"]
    assert [Image.open(file).getpixel((0, 0)) for file in files] == [(255, 0, 0), (0, 0, 255)]
    assert save_images([], tmp_path / "b.png") == []
