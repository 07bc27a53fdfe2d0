"""Training learns to draw: the quickstart's visualizer on a quarter of its images and a fifth of its steps."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image

from metamorph.evaluation.visualizer import evaluate_visualizer
from metamorph.inference.draw import SamplerSettings, draw
from metamorph.mini import PARTS, asset_path
from metamorph.miniature.quickstart.evaluate import judge_scene
from metamorph.miniature.quickstart.recipe import FULL
from metamorph.miniature.quickstart.stages import fit_visualizer
from metamorph.miniature.quickstart.workspace import Workspace
from metamorph.miniature.world.dataset import WorldSizes, write_dataset
from metamorph.miniature.world.scenes import Scene
from metamorph.visualization import load_visualizer


pytestmark = pytest.mark.integration


HELD_OUT = 32


@pytest.mark.slow
def test_visualizer_learns_to_draw_unseen_scenes(tmp_path):
    """The quickstart's states 97 to 100 % of drawings right; with this little of it 94 % were when this was written."""
    recipe = replace(FULL, alignment_steps=400, visualizer_steps=30)
    sizes = WorldSizes(visualizer=400, evaluation=HELD_OUT)
    files = write_dataset(tmp_path / "data", seed=0, sizes=sizes)
    fit_visualizer(Workspace(tmp_path, {name: asset_path(name) for name in PARTS}, 0), files, recipe)
    pipeline = load_visualizer(tmp_path / "visualizer")
    pipeline.set_progress_bar_config(disable=True)

    records = [json.loads(line) for line in files.evaluation["visualizer"].read_text().splitlines()]
    images = [Image.open(files.image_folder / record["image"]).convert("RGB") for record in records]
    tokens = pipeline.vision_tower.encode_images(images)
    drawn = draw(pipeline, tokens, SamplerSettings(recipe.guidance_scale, recipe.sampling_steps))
    verdicts = [
        judge_scene(image, Scene.from_dict(record["scene"])) for image, record in zip(drawn, records, strict=True)
    ]
    assert len(verdicts) == HELD_OUT
    assert sum(verdict["all"] for verdict in verdicts) >= 0.8 * HELD_OUT
    assert sum(verdict["position"] for verdict in verdicts) >= 0.95 * HELD_OUT

    scores = evaluate_visualizer(pipeline, images, SamplerSettings(2.0, recipe.sampling_steps)).scales[0]
    found = scores.to_dict()
    assert found["retrieval_at_1"] >= 0.9
    assert found["cosine"]["mean"] > 0.97 > 0.5 > found["cosine_to_others"]["mean"]
