"""The quickstart end to end with `--fast`: every part runs, and what it leaves can be used."""

import json
import logging
import re
from pathlib import Path

import pytest
from file_parts import other_permissions
from PIL import Image

from metamorph.cli import main
from metamorph.miniature.quickstart.evaluate import DRAWING_GROUPS
from metamorph.miniature.quickstart.workspace import MARKER_FILE, OWN_FOLDERS
from metamorph.miniature.world import render
from metamorph.miniature.world.scenes import Scene, SceneObject
from metamorph.runs.progress import Progress


pytestmark = [pytest.mark.integration, pytest.mark.slow]

QUESTION_TYPES = {"color", "shape", "size", "position", "count", "yes_no"}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The folder that `metamorph quickstart --fast` leaves; `log` next to it has the lines."""
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    handler, logger = logging.FileHandler(folder.parent / "log", encoding="utf-8"), logging.getLogger("metamorph")
    logger.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "first_seconds", 0.0)
        assert main(["quickstart", "--fast", "--seed", "3", "--output-dir", str(folder)]) == 0
    logger.removeHandler(handler)
    return folder


@pytest.fixture(scope="module")
def metrics(out) -> dict:
    return json.loads((out / "metrics.json").read_text())


def fractions(values: dict, names: tuple[str, ...]) -> bool:
    return all(0 <= values[name] <= 1 for name in names)


def test_metrics_have_every_promised_field(metrics):
    assert metrics["vqa"]["n"] > 0
    assert set(metrics["vqa"]["per_type"]) <= QUESTION_TYPES
    assert fractions(metrics["vqa"]["per_type"], tuple(metrics["vqa"]["per_type"]))
    for group in ("seen", "held_out", "knowledge", "pairs"):
        assert metrics["generation"][group]["n"] > 0
        assert fractions(metrics["generation"][group], ("all", "color", "shape", "size", "position"))
    for group in ("edit", "next_frame", "visualizer"):
        assert metrics[group]["n"] > 0
        assert fractions(metrics[group], ("all",))
    assert fractions(metrics["image_start"]["asked"], ("emitted",))
    assert metrics["seed"] == 3
    assert {"torch", "transformers", "diffusers", "numpy"} <= set(metrics["versions"])


def test_every_part_shows_progress_without_a_terminal(out):
    log = (out.parent / "log").read_text(encoding="utf-8")
    for line in (
        r"writing text_to_image · record 64/64 · took \d+ s",
        r"stage 1 · step 6/6 · loss [\d.]+ · took \d+ s",
        r"stage 2 · step 12/12 · loss [\d.]+ · took \d+ s",
        r"visualizer · step 4/4 · loss [\d.]+ · took \d+ s",
        r"questions · question 24/24 · took \d+ s",
        r"drawings · step (\d+)/\1 · took \d+ s",
        r"visualizer · image 8/8 · took \d+ s",
    ):
        assert re.search(f"^{line}$", log, re.MULTILINE), line


def test_time_and_memory_of_every_stage_are_noted(metrics):
    stages = ("data", "stage1", "stage2", "visualizer", "evaluation")
    assert set(metrics["seconds"]) == {"total", *stages}
    assert set(metrics["cpu_seconds"]) == set(metrics["peak_rss_mb_per_stage"]) == set(stages)
    assert 100 < metrics["peak_rss_mb"] < 4096


def test_the_report_holds_its_images_and_needs_no_other_file(out, metrics):
    text = (out / "report.html").read_text(encoding="utf-8")
    assert 'src="data:image/png;base64,' in text
    assert 'src="pictures' not in text
    assert "http" not in text
    assert str(metrics["seconds"]["stage2"]) in text
    names = {path.stem for path in (out / "pictures").glob("*.png")}
    assert names == {*DRAWING_GROUPS, "vqa", "visualizer", "losses", "vqa_types"}
    for path in (out / "pictures").glob("*.png"):
        assert Image.open(path).width > 200


def test_only_known_folders_are_left_so_that_a_second_run_may_clear_them(out):
    assert {path.name for path in out.iterdir()} == {*OWN_FOLDERS, MARKER_FILE, "metrics.json", "report.html"}


def test_what_is_left_has_the_permissions_of_the_umask(out):
    assert len(list(out.rglob("*.safetensors"))) >= 5
    assert other_permissions(out) == {}


def test_generate_answers_with_the_folders_that_are_left(out, tmp_path, capsys):
    image = tmp_path / "scene.png"
    render(Scene((SceneObject("circle", "red", "large", "center"),))).save(image)
    flags = ["generate", "--model", str(out / "model"), "--visualizer", str(out / "visualizer"), "--steps", "2"]
    flags += ["--output", str(tmp_path / "drawn.png"), "--max-new-tokens", "40", "--overwrite"]
    assert main([*flags, "--prompt", "What colour is the circle?", "--image", str(image)]) == 0
    assert main([*flags, "--prompt", "Draw a red circle"]) == 0
    assert capsys.readouterr().out.strip()


def test_the_recipes_it_wrote_are_recipes_of_the_train_command(out, tmp_path):
    recipe = str(out / "recipes" / "stage1.yaml")
    assert main(["train", "--config", recipe, "--output_dir", str(tmp_path / "again"), "--max_steps", "1"]) == 0
    assert (tmp_path / "again" / "mm_projector.safetensors").is_file()
