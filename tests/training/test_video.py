"""A video on disk trains the model: questions about it, and frames of it."""

import math
from pathlib import Path

import pytest
from training_parts import NUM_IMAGE_TOKENS, arguments, training_lines, write_records
from video_parts import write_video

from metamorph.training.run import run_training


pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a video of two seconds, and a source for each task that reads videos."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "clip.mp4", [index / 10 for index in range(20)])
    turns = [{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "Colours change."}]
    write_records(folder / "video_qa.jsonl", [{"id": "question", "video": "clip.mp4", "conversations": turns}])
    write_records(folder / "frame_prediction.jsonl", [{"id": "clip", "image": "clip.mp4"}])
    return folder


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("task", "num_drawn"), [("video_qa", 0), ("frame_prediction", 3)])
def test_r13_a_video_trains_a_step(
    task: str, num_drawn: int, packing: bool, parts: Path, videos: Path, tmp_path: Path
) -> None:
    options = "{fps: 2, max_frames: 4, templates: [forward]}" if num_drawn else "{fps: 2, max_frames: 4}"
    mixture = videos / f"{task}-{packing}.yaml"
    mixture.write_text(f"- path: {task}.jsonl\n  task: {task}\n  options: {options}\n")
    flags = {"data_path": str(mixture), "image_folder": str(videos), "from_scratch_connector": True}
    settings = arguments(parts, tmp_path, stage=2, max_steps=1, model_max_length=256, packing=packing, **flags)
    result = run_training(*settings)
    (line,) = training_lines(result)
    assert line["num_text_tokens"] > 0
    assert line["num_visual_tokens"] == num_drawn * NUM_IMAGE_TOKENS
    assert math.isfinite(line["loss"])
    assert line["grad_norm"] > 0
    assert ("visual_loss" in line) == (num_drawn > 0)
