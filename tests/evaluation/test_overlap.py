"""Benchmarks in training data: the same images, compressed again or not, and the same questions, are found."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from metamorph import cli
from metamorph.evaluation.overlap import difference_hash


def photo(seed: int) -> Image.Image:
    """Blurred noise with edges: as much structure as a photograph."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    image = noise.resize((320, 240), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.integers(0, 240, 2).tolist()
        pen.rectangle((x, y, x + 60, y + 40), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image.filter(ImageFilter.GaussianBlur(1))


QUESTIONS = [
    "Is the butterfly's abdomen visible in the image?",
    "How many spots are there on the dog?",
    "Are there clouds behind the tall tower?",
    "What is this?",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A benchmark of four photos, and training data that have some of it.

    Of photo 0 the same pixels in another format and its question in other words of the prompt, of photo 1 a smaller
    JPEG, of photo 2 only the question, and of photo 3 only its question, which is too common.
    """
    (tmp_path / "images").mkdir()
    rows = []
    for number, question in enumerate(QUESTIONS):
        photo(number).save(tmp_path / f"{number}.png")
        rows.append({"question": question, "answer": "no", "image": f"{number}.png"})
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bench.yaml").write_text(
        "data: {loader: table, path: bench.jsonl, question: question, answer: answer, images: image}\n"
        'prompt: "{question}"\nmetric: {name: exact_match}\n'
    )
    photo(0).save(tmp_path / "images" / "renamed.bmp")
    photo(1).resize((256, 192)).save(tmp_path / "images" / "small.jpg", quality=60)
    for number in range(10, 20):
        photo(number).save(tmp_path / "images" / f"{number}.jpg")
    talks = [
        ("renamed.bmp", "Look. Is the butterfly's abdomen visible in the image?\nAnswer with yes or no."),
        ("small.jpg", "Describe it."),
        ("10.jpg", "are there clouds  behind the tall tower"),
        ("11.jpg", "What is this?"),
        *((f"{number}.jpg", "How many spots are there on the cat?") for number in range(12, 20)),
        ("missing.jpg", "What?"),
    ]
    write_records(tmp_path / "train.jsonl", talks)
    return tmp_path


def write_records(file: Path, talks: list[tuple[str, str]]) -> None:
    records = [
        {
            "id": f"r{number}",
            "image": image,
            "conversations": [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "Yes."}],
        }
        for number, (image, text) in enumerate(talks)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def overlap(folder: Path, data: str, *flags: str) -> dict:
    words = ["--specs", str(folder / "bench.yaml"), "--output", str(folder / "overlap.json"), *flags]
    assert cli.main(["evaluate", "overlap", "--data_path", str(folder / data), *words]) == 0
    return json.loads((folder / "overlap.json").read_text())


@pytest.mark.parametrize("workers", ["0", "2"])
def test_images_and_questions_are_found(workers: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = overlap(folder, "train.jsonl", "--image_folder", str(folder / "images"), "--workers", workers)
    bench = found["benchmarks"]["bench"]
    matches = {(match["sample"], match["kind"]): match["records"][0]["id"] for match in bench["matches"]}
    first = min(match["sample"] for match in bench["matches"])
    second, third = (str(int(first) + step) for step in (1, 2))
    assert matches == {
        (first, "same_image"): "r0",
        (first, "same_question"): "r0",
        (first, "image_and_question"): "r0",
        (second, "similar_image"): "r1",
        (third, "same_question"): "r2",
    }
    counts = {name: bench[name] for name in ("samples", "same_image", "similar_image", "same_question")}
    assert counts == {"samples": 4, "same_image": 1, "similar_image": 1, "same_question": 2}
    assert found["records"] == 13
    assert len(found["unreadable"]) == 1
    assert "missing.jpg" in found["unreadable"][0]
    shown = capsys.readouterr().out
    assert f"bench {second}: similar image, " in shown
    assert "(small.jpg)" in shown
    assert "1 of 13 records cannot be read" in shown


def test_other_data_do_not_overlap(folder: Path) -> None:
    talks = [(f"{number}.jpg", "How many spots does it have?") for number in range(10, 20)]
    write_records(folder / "other.jsonl", talks)
    bench = overlap(folder, "other.jsonl", "--image_folder", str(folder / "images"), "--max_distance", "8")
    assert bench["benchmarks"]["bench"]["matches"] == []


def test_tars_and_mixtures_are_searched(folder: Path) -> None:
    """Also captions, whose conversations their task writes."""
    with tarfile.open(folder / "shard-0.tar", "w") as tar:
        content = io.BytesIO()
        photo(2).save(content, "PNG")
        talk = {"conversations": [{"from": "human", "value": "Draw it."}, {"from": "gpt", "value": "<image>"}]}
        record = json.dumps({**talk, "image": "a.png"}).encode()
        for name, data in (("a.png", content.getvalue()), ("a.json", record)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    (folder / "mixture.yaml").write_text(
        "- {path: train.jsonl, image_folder: images}\n- {path: shard-0.tar, name: tar}\n"
    )
    bench = overlap(folder, "mixture.yaml")["benchmarks"]["bench"]
    assert bench["same_image"] == 2
    assert [match["records"][0]["images"] for match in bench["matches"] if match["kind"] == "same_image"] == [
        ["renamed.bmp"],
        ["a.png"],
    ]


@pytest.mark.parametrize("quality", [40, 95])
def test_the_hash_survives_compression_and_scaling(quality: int) -> None:
    for seed in range(20):
        image = photo(seed)
        content = io.BytesIO()
        image.resize((200, 150)).save(content, "JPEG", quality=quality)
        before, after = difference_hash(image), difference_hash(Image.open(content))
        other = difference_hash(photo(seed + 100))
        assert before is not None
        assert after is not None
        assert other is not None
        assert (before ^ after).bit_count() <= 4
        assert (before ^ other).bit_count() > 8
    assert difference_hash(Image.new("RGB", (64, 64), "white")) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--specs", "mmvpp=x"], "--specs mmvpp=x"),
        (["--specs", "mmvp"], "mmvp needs its data: write mmvp=DATA"),
        (["--specs", "bench.yaml", "bench.yaml"], "two benchmarks named bench"),
        (["--specs", "bench.yaml", "--data_path", "none.jsonl"], "none.jsonl does not exist"),
    ],
)
def test_bad_flags(
    flags: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(["evaluate", "overlap", "--data_path", "train.jsonl", *flags]) == 2
    assert message in capsys.readouterr().err
