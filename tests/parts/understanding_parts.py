"""Files of understanding benchmarks in small, with the layouts that their owners publish: for each shipped spec, a
function that writes them into a folder and returns what `--data-path` is."""

import base64
import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from video_parts import write_video


pyarrow = pytest.importorskip("pyarrow", reason="parquet needs the extra 'evaluate'")
parquet = pytest.importorskip("pyarrow.parquet")

MVBENCH = {"action_sequence": "star/Charades_segment", "object_shuffle": "perception/videos"}
"""Two of its tasks, with the folders of their videos."""


def png(name: str) -> bytes:
    """A real PNG file of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), name).save(file, "PNG")
    return file.getvalue()


def text_png(name: str) -> str:
    """The same in base64."""
    return base64.b64encode(png(name)).decode()


def hub_image(name: str) -> dict[str, Any]:
    """The same as parquet files of the Hub have it."""
    return {"bytes": png(name), "path": f"{name}.png"}


def write(file: Path, content: bytes | str) -> Path:
    """Write a file, and its folder if there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """JSON Lines."""
    return write(file, "".join(json.dumps(row) + "\n" for row in rows))


def write_separated(file: Path, rows: Sequence[Mapping[str, Any]], delimiter: str) -> Path:
    """CSV or TSV; the columns are those of the first row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return write(file, text.getvalue())


def write_parquet(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A parquet file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return file


def mmbench_rows() -> list[dict[str, Any]]:
    """Two questions, of two and three options, the second with its rotations."""
    one = {"question": "What is it?", "hint": "", "A": "circle", "B": "square", "C": "", "D": "", "answer": "B"}
    two = {"question": "Which colour?", "hint": "Look.", "A": "red", "B": "green", "C": "blue", "D": "", "answer": "C"}
    rows = [
        {"index": 241, **one, "category": "shape", "l2-category": "coarse", "image": text_png("red")},
        {"index": 252, **two, "category": "color", "l2-category": "fine", "image": text_png("blue")},
        {"index": 1000241, **one, "A": "square", "B": "circle", "answer": "A", "image": "241"},
        {"index": 1000252, **two, "A": "green", "B": "blue", "C": "red", "answer": "B", "image": "252"},
        {"index": 2000252, **two, "A": "blue", "B": "red", "C": "green", "answer": "A", "image": "252"},
    ]
    return [{"category": "", "l2-category": "", **row} for row in rows]


def mmbench(folder: Path) -> Path:
    return write_separated(folder / "mmbench_dev.tsv", mmbench_rows(), "\t")


def mmvp(folder: Path) -> Path:
    names = ("lndex", "Question", "Options", "Correct Answer")
    options = "(a) Open (b) Closed"
    rows = [(1, "Open or closed?", options, "(a)"), (2, "Open or closed?", options, "(b)")]
    write_separated(folder / "Questions.csv", [dict(zip(names, row, strict=True)) for row in rows], ",")
    for index, name in enumerate(("red", "blue"), start=1):
        write(folder / "MMVP Images" / f"{index}.jpg", png(name))
    return folder


def mmmu_rows() -> list[dict[str, Any]]:
    """A question with two images, one of them in an option, and an open question without a marker."""
    rest = {f"image_{number}": None for number in range(3, 8)} | {"explanation": "", "topic_difficulty": "Easy"}
    return [
        {
            "id": "validation_Art_1",
            "question": "What does <image 1> show?",
            "options": "['a vase', \"<image 2>\", 'nothing']",
            "answer": "B",
            "question_type": "multiple-choice",
            "subfield": "Drawing",
            "image_1": hub_image("red"),
            "image_2": hub_image("blue"),
            **rest,
        },
        {
            "id": "validation_Art_2",
            "question": "How much?",
            "options": "[]",
            "answer": "['3.50', 'three fifty']",
            "question_type": "open",
            "subfield": "Drawing",
            "image_1": hub_image("green"),
            "image_2": None,
            **rest,
        },
    ]


def mmmu(folder: Path) -> Path:
    for split in ("validation", "test"):
        write_parquet(folder / "Art" / f"{split}-00000-of-00001.parquet", mmmu_rows())
    return folder


def chartqa(folder: Path) -> Path:
    for source, label in (("human", "14"), ("augmented", "12%")):
        rows = [{"imgname": f"{source}.png", "query": f"How many, {source}?", "label": label}]
        write(folder / "test" / f"test_{source}.json", json.dumps(rows))
    write(folder / "test" / "png" / "human.png", png("red"))
    write(folder / "test" / "png" / "augmented.png", png("blue"))
    return folder


def textvqa(folder: Path) -> Path:
    row = {"question": "what is written?", "image_id": "0054c91397f2fe05", "question_id": 34602, "set_name": "val"}
    write(folder / "TextVQA_0.5.1_val.json", json.dumps({"data": [{**row, "answers": ["nokia"] * 9 + ["a phone"]}]}))
    write(folder / "train_images" / "0054c91397f2fe05.jpg", png("red"))
    words = [{"image_id": "0054c91397f2fe05", "ocr_tokens": ["NOKIA", "12:00"], "ocr_info": []}]
    write(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", json.dumps({"data": words}))
    return folder


def seed(folder: Path) -> Path:
    choices = {"choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four"}
    question = {"answer": "A", **choices, "question": "How many towels are in the image?"}
    rows = [
        {**question, "data_id": "1454426_2591111986", "data_type": "image", "question_id": "101669"},
        {**question, "data_id": "v.mp4", "data_type": "video", "question_id": "101670", "segment": [1.0, 2.0]},
    ]
    content = {
        "questions": [{**row, "question_type_id": 5} for row in rows],
        "question_type": {"Instances Counting": 5},
    }
    write(folder / "SEED-Bench-image" / "1454426_2591111986", png("red"))  # names have no ending
    return write(folder / "SEED-Bench.json", json.dumps(content))


def vstar(folder: Path) -> Path:
    text = (
        "What is the material of the glove?\n(A) rubber\n(B) cotton\n(C) kevlar\n(D) leather\n"
        "Answer with the option's letter from the given choices directly."
    )
    row = {"image": "direct_attributes/sa_4690.jpg", "text": text, "category": "direct_attributes", "label": "A"}
    write(folder / "direct_attributes" / "sa_4690.jpg", png("red"))
    return write_lines(folder / "test_questions.jsonl", [{**row, "question_id": "0"}])


def scienceqa(folder: Path) -> Path:
    question = {"question": "Which is it?", "choices": ["Utah", "Ohio"], "subject": "geography", "grade": "grade2"}
    rows = [
        {**question, "answer": 1, "hint": "A map.", "image": hub_image("red"), "lecture": ""},
        {**question, "answer": 0, "hint": "", "image": None, "lecture": ""},
        {**question, "answer": 0, "hint": "", "image": hub_image("blue"), "lecture": ""},
    ]
    write_parquet(folder / "data" / "test-00000-of-00001-f0e719.parquet", rows)
    return folder


def realworldqa(folder: Path) -> Path:
    choice = "Which way?\n\nA. Left\nB. Right\nPlease answer directly with only the letter of the correct option."
    rows = [
        {"image": hub_image("red"), "question": choice, "answer": "B"},
        {
            "image": hub_image("blue"),
            "question": "Is it red? Please answer directly with a single word.",
            "answer": "No",
        },
    ]
    for number, row in enumerate(rows):
        write_parquet(folder / "data" / f"test-0000{number}-of-00002.parquet", [row])
    return folder


def mvbench(folder: Path) -> Path:
    for task, place in MVBENCH.items():
        row = {"video": f"{task}.mp4", "question": "What happened?", "candidates": ["A fall.", "A", "B"], "answer": "A"}
        write(folder / "json" / f"{task}.json", json.dumps([row]))
        (folder / place).mkdir(parents=True)
        write_video(folder / place / f"{task}.mp4", [0.0, 0.5, 1.0, 1.5])
    return folder


def pope(folder: Path) -> Path:
    name = "COCO_val2014_000000310196.jpg"
    for source, label in (("random", "yes"), ("popular", "no"), ("adversarial", "no")):
        row = {"question_id": 1, "image": name, "text": f"Is there a {source} dog in the image?", "label": label}
        write_lines(folder / f"coco_pope_{source}.json", [row, {**row, "question_id": 2, "label": "yes"}])
    write(folder / "val2014" / name, png("red"))
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    function.__name__: function
    for function in (mmbench, mmvp, mmmu, chartqa, textvqa, seed, vstar, scienceqa, realworldqa, mvbench, pope)
}
"""By names of specs."""
