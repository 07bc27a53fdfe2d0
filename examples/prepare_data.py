"""A small data folder with one source for each task: images, a video, records and the mixture that names them.

The images are drawn here; nothing is downloaded. Look at the files, then at what training makes of them:

    python examples/prepare_data.py --output-dir example_data
    metamorph data check example_data/mixture.yaml
    metamorph data show example_data/mixture.yaml --index 3
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import av
from PIL import Image, ImageDraw


SIDE = 192
FRAMES_PER_SECOND = 10

RECORDS: dict[str, dict[str, Any]] = {
    "instruction": {
        "id": "question-1",
        "image": "cup.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat colour is the cup?"},
            {"from": "gpt", "value": "It is red."},
        ],
    },
    "text_to_image": {"id": "caption-1", "image": "cup.png", "caption": "A red cup on a table."},
    "image_edit": {
        "id": "edit-1",
        "source": "cup.png",
        "instruction": "Make the cup blue.",
        "target": "blue_cup.png",
    },
    "visual_cot": {
        "id": "cot-1",
        "image": ["sign.png", "sign.png###[120, 16, 176, 48]"],
        "conversations": [
            {"from": "human", "value": "<image>\nWhat does the small sign say?"},
            {"from": "gpt", "value": "It says STOP."},
        ],
    },
    "vstar": {
        "id": "search-1",
        "image": "cup.png",
        "target_instances": [{"name": "cup", "bbox": [64, 64, 72, 80]}],
        "conversations": [
            {"from": "human", "value": "<image>\nIs the cup on the table?"},
            {"from": "gpt", "value": "Yes, it stands on the table."},
        ],
    },
    "video_qa": {
        "id": "video-1",
        "video": "ball.mp4",
        "conversations": [
            {"from": "human", "value": "<video>\nWhere does the ball go?"},
            {"from": "gpt", "value": "From left to right."},
        ],
    },
    "frame_prediction": {"id": "clip-1", "video": "ball.mp4"},
}
"""One record of each task."""

MIXTURE = """\
- path: instruction.jsonl
  image_folder: media
  task: instruction
- path: text_to_image.jsonl
  image_folder: media
  task: text_to_image
- path: image_edit.jsonl
  image_folder: media
  task: image_edit
- path: visual_cot.jsonl
  image_folder: media
  task: visual_cot
  options: {margin: 0.1}
- path: vstar.jsonl
  image_folder: media
  task: vstar
- path: video_qa.jsonl
  image_folder: media
  task: video_qa
  options: {fps: 2, max_frames: 4}
- path: frame_prediction.jsonl
  image_folder: media
  task: frame_prediction
  weight: 2
  options: {fps: 2, max_frames: 4}
"""


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("example_data"), help="default: %(default)s")
    folder: Path = parser.parse_args().output_dir
    write_data(folder)
    print(f"{folder}/mixture.yaml names {len(RECORDS)} sources")


def write_data(folder: Path) -> Path:
    """Write media, records and mixture; returns the path of the mixture."""
    media = folder / "media"
    media.mkdir(parents=True, exist_ok=True)
    draw_cup("crimson").save(media / "cup.png")
    draw_cup("royalblue").save(media / "blue_cup.png")
    draw_sign().save(media / "sign.png")
    write_video(media / "ball.mp4")
    for task, record in RECORDS.items():
        (folder / f"{task}.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    (folder / "mixture.yaml").write_text(MIXTURE, encoding="utf-8")
    return folder / "mixture.yaml"


def draw_cup(colour: str) -> Image.Image:
    """A cup on a table."""
    image = Image.new("RGB", (SIDE, SIDE), "linen")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 140, SIDE, SIDE), fill="peru")
    draw.rectangle((70, 70, 130, 140), fill=colour)
    return image


def draw_sign() -> Image.Image:
    """A large field with a small sign."""
    image = Image.new("RGB", (SIDE, SIDE), "darkseagreen")
    draw = ImageDraw.Draw(image)
    draw.rectangle((120, 16, 176, 48), fill="firebrick")
    draw.text((132, 26), "STOP", fill="white")
    return image


def write_video(path: Path, seconds: int = 2) -> None:
    """A ball that moves from left to right."""
    count = seconds * FRAMES_PER_SECOND
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for index in range(count):
            image = Image.new("RGB", (SIDE, SIDE), "midnightblue")
            left = 10 + index * (SIDE - 60) // count
            ImageDraw.Draw(image).ellipse((left, 80, left + 40, 120), fill="gold")
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
