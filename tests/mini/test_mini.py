"""The shipped miniature: what its card says, that it still is as good as it says, and the command of the README."""

import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from metamorph.cli import main
from metamorph.mini import ASSETS, AssetError, asset_path, shipped_folder
from metamorph.miniature.quickstart.measure import measure_world
from metamorph.miniature.quickstart.recipe import FAST, MINI, EvaluationSizes
from metamorph.miniature.world.checker import judge
from metamorph.miniature.world.dataset import WorldSizes
from metamorph.miniature.world.scenes import Scene, SceneObject
from metamorph.models.vision_tower import load_tower_of, load_vision_encoder
from metamorph.training.arguments import MetaMorphTrainingArguments, ModelArguments
from metamorph.visualization.loading import load_visualizer
from metamorph.visualizer_training.arguments import VisualizerArguments
from metamorph.visualizer_training.build import check_folders
from tools.miniature.build_mini import GATES, _parts_next_to, build, missed_gates, summarise_figures
from tools.miniature.cards import verify_asset, verify_folder


def test_card_matches_the_folder_and_names_the_gates_it_misses():
    card = verify_asset("mini")
    assert card.gates == GATES
    sentence = card.summary.split("It misses these gates: ")
    named = set(re.split(r"\.\s", sentence[1])[0].split(", ")) if len(sentence) == 2 else set()
    assert named == set(missed_gates(card.figures))


def test_all_assets_together_are_small_enough_to_ship():
    sizes = [path.stat().st_size for name in ASSETS for path in asset_path(name).rglob("*") if path.is_file()]
    assert sum(sizes) < 40e6


def test_missed_gates_are_named():
    figures = {
        "vqa": {"all": 0.96, "yes_no": 0.7},
        "image_start": 1.0,
        "seen": 0.89,
        "visualizer": {"singles": 1.0, "pairs": 0.5},
        "n": {"vqa": 10},
    }
    assert missed_gates(figures) == {"vqa.yes_no": 0.7, "seen": 0.89, "visualizer.pairs": 0.5}


@pytest.mark.slow
def test_mini_is_as_good_as_its_card_says_on_a_small_sample(tmp_path):
    sample = EvaluationSizes(vqa=60, seen=24, held_out=12, knowledge=6, edit=12, next_frame=6, visualizer=16)
    folder = asset_path("mini")
    measured = measure_world(folder / "model", folder / "visualizer", tmp_path, recipe=replace(MINI, evaluation=sample))
    found, card = summarise_figures(measured), verify_asset("mini").figures
    assert (tmp_path / "pictures" / "grid.png").is_file()
    # Sixty answers and two dozen drawings: about two standard errors of the card's figures.
    assert found["vqa"]["all"] >= card["vqa"]["all"] - 0.08
    assert found["image_start"] >= 0.96
    for group in ("seen", "held_out", "pairs", "edit"):
        assert found[group] >= card[group] - 0.3


README_PROMPTS = {
    "Generate an image of a red circle": [("circle", "red", "large", "center")],
    "Draw the colour of grass as a square": [("square", "green", "large", "center")],
    "Generate an image of a small yellow triangle in the top left and a large blue circle in the bottom right": [
        ("triangle", "yellow", "small", "top left"),
        ("circle", "blue", "large", "bottom right"),
    ],
}
"""The prompts whose images the README shows, and what they must show."""


@pytest.mark.parametrize("prompt", README_PROMPTS)
def test_the_readme_s_commands_draw_what_they_ask_for(tmp_path, capsys, prompt):
    file = tmp_path / "drawn.png"
    assert main(["generate", "--model", "mini", "--visualizer", "mini", "--prompt", prompt, "--output", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    wanted = Scene(tuple(SceneObject(*attributes) for attributes in README_PROMPTS[prompt]))
    assert judge(Image.open(file).convert("RGB"), wanted).all


@pytest.mark.parametrize(
    ("name", "part", "folder"),
    [
        ("mini", "model", "mini/model"),
        ("mini", "visualizer", "mini/visualizer"),
        ("mini", "tower", "mini-siglip"),
        ("mini-llama", "model", "mini-llama"),
        ("mini-siglip", "tower", "mini-siglip"),
        ("mini-sd", "visualizer", "mini-sd"),
    ],
)
def test_shipped_models_are_found_by_name_unless_there_is_a_local_one(name, part, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped_folder(name, part) == str(asset_path("mini").parent / folder)
    assert shipped_folder(f"owner/{name}", part) == f"owner/{name}"
    (tmp_path / name).touch()  # a file goes before it as a folder does
    assert shipped_folder(name, part) == name


def test_shipped_models_are_known_wherever_a_model_a_tower_or_a_visualizer_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("{}")
    model = ModelArguments("mini-llama", vision_tower="mini-siglip", from_scratch_connector=True)
    assert (model.model_name_or_path, model.vision_tower) == (
        str(asset_path("mini-llama")),
        str(asset_path("mini-siglip")),
    )
    assert ModelArguments("mini").continues_metamorph
    trained = MetaMorphTrainingArguments(
        "out", sample_steps=1, sample_prompts="data.jsonl", sample_visualizer="mini", use_cpu=True
    )
    assert trained.sample_visualizer == str(asset_path("mini") / "visualizer")
    visualizer = VisualizerArguments(
        output_dir="out",
        vision_tower="mini",
        pretrained_model_name_or_path="mini-sd",
        pretrained_projector="mini",
        image_folder=str(tmp_path),
    )
    assert visualizer.vision_tower == str(asset_path("mini") / "model")
    assert visualizer.pretrained_model_name_or_path == str(asset_path("mini-sd"))
    assert visualizer.pretrained_projector == str(asset_path("mini") / "visualizer")
    check_folders(visualizer)
    assert load_visualizer("mini", "mini").vision_tower is not None


def test_the_tower_of_mini_is_mini_siglip():
    ours = load_tower_of(asset_path("mini") / "model").encoder.state_dict()
    theirs = load_vision_encoder(str(asset_path("mini-siglip"))).state_dict()
    assert ours.keys() <= theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_mini_is_built_from_the_parts_next_to_it(tmp_path):
    (tmp_path / "mini-llama").mkdir()
    parts = _parts_next_to(tmp_path / "mini")
    assert parts["mini-llama"] == tmp_path / "mini-llama"
    assert parts["mini-siglip"] == asset_path("mini-siglip")


@pytest.mark.slow
def test_build_stops_at_a_gate_and_does_not_train_again(tmp_path, caplog):
    sizes = WorldSizes(
        captions=8,
        vqa=8,
        text_vqa=2,
        text_to_image=8,
        edits=4,
        next_frames=2,
        facts=2,
        knowledge_prompts=2,
        visualizer=16,
    )
    sample = EvaluationSizes(vqa=6, seen=6, held_out=2, knowledge=2, edit=2, next_frame=2, visualizer=6)
    recipe = replace(
        FAST, sizes=sizes, batch_size=4, stage1_steps=2, stage2_steps=2, visualizer_steps=2, evaluation=sample
    )
    folder = tmp_path / "mini"
    with pytest.raises(AssetError, match=r"mini is below its gates"):
        build(folder, recipe=recipe)
    assert not folder.exists()
    caplog.set_level("INFO", logger="metamorph")
    caplog.clear()
    figures = build(folder, recipe=recipe, enforce_gates=False)
    assert "stage 2 trains" not in caplog.text
    card = verify_folder(folder)
    assert card.figures["vqa"]["all"] == pytest.approx(figures["vqa"]["all"])
    assert [path.name for path in tmp_path.iterdir()] == ["mini"]
