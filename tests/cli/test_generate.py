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
    return build_parser().parse_args(["--model", "mini", *words])


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
        (["--prompt", "x", "--image", "{folder}"], "--image {folder} is a folder: give an image file"),
        (["--prompt", "  "], "--prompt is empty"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature"),
        (["--prompt", "x", "--temperature", "nan"], "--temperature nan must be a finite number"),
        (["--prompt", "x", "--guidance-scale", "-2"], "--guidance-scale -2 must be at least 0"),
        (["--prompt", "x", "--guidance-scale", "inf"], "--guidance-scale inf must be a finite number"),
        (["--prompt", "x", "--steps", "0"], "--steps 0 must be at least 1"),
        (["--prompt", "x", "--output", "a.png"], "--output a.png needs --visualizer"),
        (["--prompt", "x", "--image", "https://a.org/b.png"], "is a URL, and nothing is downloaded"),
        (["--prompt", "x", "--seed", "-1"], "--seed -1 must be at least 0"),
        (
            ["--prompt", "x", "--visualizer", "mini", "--output", "{folder}"],
            "--output {folder} is a folder: give a file",
        ),
        (
            ["--prompt", "x", "--visualizer", "mini", "--output", "{folder}/a.pdf"],
            "a.pdf is not the name of an image: end it in .png",
        ),
        (
            ["--prompt", "x", "--visualizer", "mini", "--output", "{picture}/a.png"],
            "{picture} is a file; give another folder",
        ),
        (
            ["--prompt", "x", "--visualizer", "mini", "--output", "{picture}"],
            "--output {picture} exists: give another name, or --overwrite",
        ),
        (
            ["--prompt", "x", "--model", "mini", "--draw", "--max-new-tokens", "17"],
            "has no room for an image, which takes 18 (16 visual tokens, <image_start> and <image_end>)",
        ),
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
    assert message.format(folder=tmp_path, picture=picture) in capsys.readouterr().err


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


def test_pictures_are_never_replaced_unasked(generate, tmp_path: Path) -> None:
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


def test_draw_begins_the_answer_with_a_picture(generate, tmp_path: Path) -> None:
    question = ["--prompt", "<image>\nWhat color is the object?", "--image", "in.png"]
    Image.new("RGB", (64, 64), "white").save(tmp_path / "in.png")
    printed, logged = generate(*question)
    assert "[image" not in printed
    assert "the answer has no image to draw; with --draw it begins with one" in logged
    printed, logged = generate(*question, "--draw", "--max-new-tokens", "18")
    assert printed.startswith("[image: generated.png")
    assert "no image" not in logged


def test_default_number_of_new_tokens_fits_a_picture(generate) -> None:
    assert build_parser().parse_args(["--model", "m", "--prompt", "p"]).max_new_tokens is None
    printed, logged = generate("--prompt", "Draw a red circle", "--max-new-tokens", "17")
    assert "[image" not in printed
    assert "--max-new-tokens 17 has no room for an image, which takes 18" in logged
