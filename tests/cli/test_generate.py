"""`metamorph generate`: what it checks before loading weights, what it prints, and the files it writes."""

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from metamorph import cli
from metamorph.cli.generate import build_parser, check_inputs


ORIENTATION = 0x0112  # EXIF tag
TURN_90_CLOCKWISE = 6


def parse(*words: str):
    return build_parser().parse_args(["--model", "mini", *words])


@pytest.mark.parametrize(("prompt", "count"), [("Compare.", 2), ("Is <image> blue?", 1)])
def test_markers_may_be_anywhere_or_left_out(prompt: str, count: int, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png")
    flags = parse("--prompt", prompt, *["--image", str(tmp_path / "in.png")] * count)
    assert len(check_inputs(flags)[0]) == count
    assert flags.prompt == prompt


def test_images_are_upright(tmp_path: Path) -> None:
    """A camera held sideways: the pixels lie, and EXIF says how to turn them."""
    image = Image.new("RGB", (16, 8), "white")
    image.paste("black", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[ORIENTATION] = TURN_90_CLOCKWISE
    image.save(tmp_path / "camera.jpg", exif=exif, quality=95)
    (opened,), _ = check_inputs(parse("--prompt", "x", "--image", str(tmp_path / "camera.jpg")))
    assert opened.size == (8, 16)
    assert max(opened.getpixel((4, 2))) < 30  # what was left is above
    assert min(opened.getpixel((4, 13))) > 225


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


def chunks(file: Path) -> dict[str, str]:
    with Image.open(file) as image:
        return dict(image.text)


def test_an_image_is_reproduced_from_its_metadata(generate, tmp_path: Path) -> None:
    """Each of several drawings, by its own seed and guidance scale; the contact sheet shows all of them."""
    prompt = "draw a red circle, größer 🎨"
    printed, _ = generate("--prompt", prompt, "--guidance-scale", "1", "3", "--num-images", "2", "--output-dir", "many")
    names = ["generated.png", "generated-2.png", "generated-3.png", "generated-4.png"]
    assert printed.splitlines() == [
        *(f"[image: many/{name}]" for name in names),
        "[contact sheet: many/generated-sheet.png]",
    ]
    found = [chunks(tmp_path / "many" / name) for name in names]
    assert [(each["seed"], each["guidance_scale"]) for each in found] == [
        ("0", "1"),
        ("0", "3"),
        ("1", "1"),
        ("1", "3"),
    ]
    for name, each in zip(names, found, strict=True):
        assert each["Software"].startswith("MetaMorph ")
        again = ["--prompt", each["prompt"], "--seed", each["seed"], "--guidance-scale", each["guidance_scale"]]
        generate(*again, "--model", each["model"], "--visualizer", each["visualizer"], "--output", f"again-{name}")
        with Image.open(tmp_path / "many" / name) as first, Image.open(tmp_path / f"again-{name}") as second:
            assert first.tobytes() == second.tobytes()
    assert found[0]["prompt"] == prompt
    with (
        Image.open(tmp_path / "many" / "generated-sheet.png") as sheet,
        Image.open(tmp_path / "many" / names[3]) as last,
    ):
        assert sheet.size == (2 * 128 + 2, 22 + 2 * 128 + 2)
        assert sheet.getpixel((130 + 64, 22 + 130 + 64)) == last.getpixel((32, 32))


def test_sampled_words_depend_on_the_seed_alone(generate, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "white").save(tmp_path / "in.png")
    words = shlex.split("--prompt 'what color is the object?' --image in.png --temperature 30 --top-k 40 --json")
    answers = [json.loads(generate(*words, "--max-new-tokens", "12", "--seed", seed)[0]) for seed in "112"]
    assert answers[0] == answers[1]
    assert answers[0]["text"] != answers[2]["text"]
    assert answers[0]["num_tokens"] <= 12


def test_json_holds_the_answer_and_its_files(generate, tmp_path: Path) -> None:
    printed, _ = generate("--prompt", "Draw a red circle", "--json")
    answer = json.loads(printed)
    assert answer["parts"] == [{"type": "image", "files": ["generated.png"]}]
    assert (answer["text"], answer["finish_reason"], answer["num_tokens"]) == ("", "stop", 19)
    assert (tmp_path / "generated.png").is_file()


def test_undrawn_tokens_are_drawn_later(generate, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`visualize --tokens` draws the image that `generate` would have drawn."""
    assert cli.main(["generate", "--model", "mini", "--prompt", "Draw a red circle"]) == 0
    assert "its visual tokens: generated.safetensors" in capsys.readouterr().out
    drawing = ["--visualizer", "mini", "--steps", "2", "--guidance-scale", "3"]
    assert cli.main(["visualize", "--tokens", "generated.safetensors", *drawing, "--output", "later.png"]) == 0
    generate("--prompt", "Draw a red circle", "--output", "now.png")
    with Image.open("later.png") as later, Image.open("now.png") as now:
        assert later.tobytes() == now.tobytes()
    assert cli.main(["visualize", "--tokens", "generated.safetensors", "generated.safetensors", *drawing]) == 0
    with Image.open("visualized.png") as grid:
        assert grid.height > grid.width  # a row for each


def test_a_video_is_its_frames(generate, tmp_path: Path) -> None:
    video_parts = pytest.importorskip("video_parts")
    video_parts.write_video(tmp_path / "v.mp4", [0.0, 1.0, 2.0])
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png")
    flags = parse("--prompt", "<video> then <image>?", "--video", "v.mp4", "--image", "in.png", "--fps", "0.5")
    images, videos = check_inputs(flags)
    assert (len(images), [[video_parts.index_of(frame) for frame in frames] for frames in videos]) == (1, [[0, 2]])
    printed, _ = generate("--prompt", "what color is the object?", "--video", "v.mp4", "--json")
    one, _ = generate("--prompt", "what color is the object?", "--video", "v.mp4", "--max-frames", "1", "--json")
    assert json.loads(printed)["num_prompt_tokens"] == json.loads(one)["num_prompt_tokens"] + 2 * 18  # 2 frames more
