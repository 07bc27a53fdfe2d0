"""Untrusted visualizer and Stable Diffusion folders: nothing in them runs, and errors name what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from visualization_parts import CROSS_ATTENTION_DIM, tiny_scheduler, tiny_unet, tiny_vae, write_tiny_diffusion

from metamorph.cli import main
from metamorph.models.vision_tower import MetaMorphConfig, VisionTower
from metamorph.visualization.encoder import VisualTokenEncoder
from metamorph.visualization.folders import check_model, check_visualizer
from metamorph.visualization.loading import load_visualizer
from metamorph.visualization.pipeline import VisualizationPipeline
from metamorph.visualization.pixels import PixelFormat
from metamorph.visualization.projector import VisualizationProjector
from metamorph.visualizer_training.arguments import VisualizerArguments
from metamorph.visualizer_training.build import build_projector, load_diffusion_parts


WEIGHTS = "diffusion_pytorch_model.safetensors"
Spoil = Callable[[Path], Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A visualizer with its vision tower."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = MetaMorphConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, **sizes},
        num_image_tokens=4,
    )
    pixel_format = PixelFormat(size=16, mean=(0.5,) * 3, std=(0.5,) * 3, resample=Image.Resampling.BILINEAR)
    tower = VisualTokenEncoder.from_tower(VisionTower(config), config, pixel_format)
    projector = VisualizationProjector(input_dim=12, hidden_dim=16, output_dim=CROSS_ATTENTION_DIM)
    pipeline = VisualizationPipeline.from_parts(projector, tiny_unet(), tiny_vae(), tiny_scheduler(), tower)
    folder = tmp_path_factory.mktemp("visualizer")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "visualizer")


def set_fields(file: str, **values: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | values))

    return spoil


def set_weights(component: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / component / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / component / WEIGHTS)

    return spoil


def set_vision(**values: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "vision_tower/config.json").read_text())
        config["vision_config"] |= values
        (folder / "vision_tower/config.json").write_text(json.dumps(config))

    return spoil


def test_a_complete_folder_loads(folder: Path) -> None:
    check_visualizer(folder)
    assert load_visualizer(folder).vision_tower is not None


@pytest.mark.parametrize(
    "index",
    [
        {"vision_tower": ["planted", "Planted"]},
        {"unet": ["planted", "Planted"]},
        {"safety_checker": ["planted", "Planted"]},
        {"_class_name": ["planted", "Planted"]},
        {"vision_tower": ["antigravity", "fly"]},
        {"vae": ["diffusers", "UNet2DConditionModel"]},
        {"scheduler": ["diffusers", "DiffusionPipeline"]},
        {"scheduler": ["diffusers", ["DDPMScheduler"]]},
        {"projector": "metamorph"},
        {"projector": [None, None]},
    ],
    ids=str,
)
def test_code_of_a_folder_never_runs(folder: Path, index: dict[str, Any]) -> None:
    ran = folder / "ran"
    for place in (folder, folder / "unet", folder / "vision_tower", folder / "safety_checker"):
        place.mkdir(exist_ok=True)
        (place / "planted.py").write_text(f"open({str(ran)!r}, 'w')\nclass Planted: pass\n")
    set_fields("model_index.json", **index)(folder)
    with pytest.raises(ValueError, match=r"--visualizer .*model_index\.json"):
        load_visualizer(folder)
    assert not ran.exists()


@pytest.mark.parametrize("option", ["custom_pipeline", "trust_remote_code"])
def test_the_switches_for_code_are_refused(folder: Path, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is not supported"):
        VisualizationPipeline.from_pretrained(folder, **{option: True})


HOSTILE: dict[str, tuple[Spoil, str]] = {
    "index is a list": (lambda path: (path / "model_index.json").write_text("[1]"), "must hold a JSON object"),
    "index is nested": (lambda path: (path / "model_index.json").write_text("[" * 100_000), "not valid JSON"),
    "weight missing": (
        set_weights("unet", lambda found: found.pop("conv_in.bias")),
        "unet lacks 1 weights.*conv_in.bias",
    ),
    "weight unexpected": (
        set_weights("vae", lambda found: found.update(x=torch.ones(1))),
        "unknown to its config.*: x",
    ),
    "other shape": (
        set_weights("projector", lambda found: found.update({"network.layers.0.weight": torch.ones(2, 2)})),
        r"network.layers.0.weight has shape \[2, 2\]",
    ),
    "other size": (set_fields("projector/config.json", hidden_dim=10**9), "has shape .* configuration asks for"),
    "too many layers": (set_fields("projector/config.json", num_layers=10**7), "num_layers asks for 10000000 layers"),
    "too many in a block": (
        set_fields("unet/config.json", layers_per_block=20, transformer_layers_per_block=20),
        "transformer_layers_per_block asks for 400 layers",
    ),
    "too many blocks": (set_fields("vae/config.json", block_out_channels=[8] * 1000), "1000 layers or blocks"),
    "NaN": (
        set_weights("projector", lambda found: found["network.norms.0.bias"].fill_(torch.nan)),
        "network.norms.0.bias holds NaN",
    ),
    "infinite": (
        set_weights("vision_tower", lambda found: next(iter(found.values())).fill_(-torch.inf)),
        "vision_tower: .* holds NaN or infinite",
    ),
    "too large to draw": (set_fields("unet/config.json", sample_size=10**6), "sample_size 1000000 must be"),
    "too many tokens": (set_fields("vision_tower/config.json", num_image_tokens=10**12), "num_image_tokens 10000"),
    "too many time steps": (
        set_fields("scheduler/scheduler_config.json", num_train_timesteps=10**12),
        "num_train_timesteps 1000000000000 is larger",
    ),
    "unknown schedule": (
        set_fields("scheduler/scheduler_config.json", beta_schedule="x"),
        "not the configuration of a DPMSolverMultistepScheduler",
    ),
    "misfit": (set_fields("unet/config.json", block_out_channels=[8]), "not the configuration of a UNet2DCondition"),
    "quantised": (set_fields("unet/config.json", quantization_config={"quant_method": "x"}), "quantization_config"),
    "kernel of the Hub": (set_vision(_attn_implementation="owner/kernel"), "is code on the Hub"),
    "unknown tower": (set_vision(model_type="llama"), "not the configuration of a VisualTokenEncoder"),
    "pickle": (
        lambda path: (path / "vae" / WEIGHTS).rename(path / "vae/diffusion_pytorch_model.bin"),
        "safetensors files only",
    ),
    "damaged": (lambda path: (path / "vae" / WEIGHTS).write_bytes(b"\xff" * 64), "is damaged"),
    "single file and index": (
        lambda path: (path / f"unet/{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}'),
        "unet holds weights twice, diffusion_pytorch_model.safetensors and",
    ),
    "index of shards": (
        lambda path: (
            (path / "vae" / WEIGHTS).rename(path / "vae/x.safetensors")
            and (path / f"vae/{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}')
        ),
        "not a file in its own folder",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_wrong_is_named(folder: Path, case: str) -> None:
    spoil, message = HOSTILE[case]
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_visualizer(folder)


def test_arguments_of_another_type_are_named(folder: Path) -> None:
    shutil.rmtree(folder / "vision_tower")
    set_fields("model_index.json", vision_tower=[None, None])(folder)
    (folder / "visualizer_arguments.json").write_text('{"vision_tower": ["x"]}')
    with pytest.raises(ValueError, match=r"visualizer_arguments\.json: vision_tower must be a str"):
        load_visualizer(folder)


def test_generate_refuses_before_it_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_fields("model_index.json", unet=["planted", "Planted"])(folder)
    assert main(["generate", "--model", "mini", "--visualizer", str(folder), "--prompt", "x"]) == 2
    captured = capsys.readouterr()
    assert "unet must not be ['planted', 'Planted']" in captured.err
    assert not captured.out


def test_visualizers_of_the_hub_load_without_their_code(folder: Path, tmp_path: Path) -> None:
    """In the Hub's cache, since tests have no network."""
    snapshot = tmp_path / "models--somebody--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    options = {"cache_dir": tmp_path, "local_files_only": True}
    assert VisualizationPipeline.from_pretrained("somebody/tiny", **options).vision_tower is not None
    set_fields("model_index.json", vision_tower=["planted", "Planted"])(snapshot)
    with pytest.raises(ValueError, match="vision_tower must not be"):
        VisualizationPipeline.from_pretrained("somebody/tiny", **options)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (set_weights("unet", lambda found: found.pop("conv_in.bias")), "unet lacks 1 weights"),
        (set_weights("vae", lambda found: found["quant_conv.bias"].fill_(torch.nan)), "quant_conv.bias holds NaN"),
        (set_fields("scheduler/scheduler_config.json", num_train_timesteps=10**12), "num_train_timesteps"),
    ],
)
def test_parts_of_stable_diffusion(tmp_path: Path, spoil: Spoil, message: str) -> None:
    args = VisualizerArguments(
        output_dir="", pretrained_model_name_or_path=str(write_tiny_diffusion(tmp_path)), resolution=32
    )
    load_diffusion_parts(args)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path .*{message}"):
        load_diffusion_parts(args)


def test_a_pretrained_projector(folder: Path) -> None:
    args = VisualizerArguments(output_dir="", pretrained_projector=str(folder))
    assert build_projector(args, (4, 12), CROSS_ATTENTION_DIM).config.hidden_dim == 16
    HOSTILE["NaN"][0](folder)
    with pytest.raises(ValueError, match=r"--pretrained_projector .* holds NaN"):
        build_projector(args, (4, 12), CROSS_ATTENTION_DIM)


def test_a_vae_with_the_names_of_early_stable_diffusion(tmp_path: Path) -> None:
    vae = tiny_vae()
    vae.save_pretrained(tmp_path)
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(tmp_path / WEIGHTS)
    for present, former in old.items():
        tensors = {name.replace(present, former): value for name, value in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    check_model(AutoencoderKL, tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in vae.state_dict().items())
