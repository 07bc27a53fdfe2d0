"""The visualizer's trainer on tiny parts of the real classes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from safetensors.torch import load_file, save_file
from visualization_parts import RESOLUTION, OnLog, random_images, tiny_flags

from metamorph.runs.checkpoint_files import MANIFEST_FILE, CheckpointError, checkpoints, file_stamp
from metamorph.runs.lock import only_run_in
from metamorph.runs.preemption import MARKER_FILE, PREEMPTED, Interrupted, Preempted
from metamorph.visualization import VisualizationPipeline, VisualizerArguments, train_visualizer
from metamorph.visualization.projector import PROJECTOR_MODES
from metamorph.visualizer_training.build import adopt_resolution, load_diffusion_parts


pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> dict:
    return tiny_flags(tmp_path_factory.mktemp("visualizer_parts"), "epsilon")


@pytest.fixture(scope="module")
def parts(flags) -> dict[str, str]:
    return {name: flags[name] for name in ("vision_tower", "pretrained_model_name_or_path")}


@pytest.fixture(scope="module")
def images() -> list:
    return random_images(6)


@pytest.fixture
def arguments(flags, tmp_path):
    def build(**options) -> VisualizerArguments:
        sizes = {"num_query_tokens": 5, "num_heads": 2, "output_dir": str(tmp_path / "out")}
        training = {"training_steps": 3, "lr": 1e-2, "lr_warmup_steps": 1, "save_step": 0, "ema_decay": 0.5}
        return VisualizerArguments(**(flags | sizes | training | options))

    return build


def weights(folder: str | Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / part / "diffusion_pytorch_model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def draw(folder: str | Path) -> torch.Tensor:
    pipeline = VisualizationPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    tokens = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipeline(tokens, num_inference_steps=2, generator=generators, output_type="pt").images


@pytest.mark.parametrize("mode", PROJECTOR_MODES)
def test_r45_every_mode_trains_saves_loads_and_draws_the_same(mode, arguments, images, parts, tmp_path):
    args = arguments(mode=mode)
    result = train_visualizer(args, images)
    assert len(result.losses) == 3
    assert all(0 < loss < 10 for loss in result.losses)
    first = draw(result.output_dir)
    assert first.shape == (2, 3, RESOLUTION, RESOLUTION)
    VisualizationPipeline.from_pretrained(result.output_dir).save_pretrained(tmp_path / "again")
    assert torch.equal(first, draw(tmp_path / "again"))
    source = Path(parts["pretrained_model_name_or_path"])
    assert same(weights(args.output_dir, "unet"), weights(source, "unet"))
    assert same(weights(args.output_dir, "vae"), weights(source, "vae"))


@pytest.mark.slow
def test_loss_falls_when_unet_and_projector_train(arguments, images, parts):
    args = arguments(unfreeze_unet=True, training_steps=30, batch_size=4, cache_latents=True, lr=5e-3)
    losses = train_visualizer(args, images).losses
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert not same(weights(args.output_dir, "unet"), weights(parts["pretrained_model_name_or_path"], "unet"))


@pytest.mark.parametrize("options", [{}, {"random_crop": True}, {"cache_latents": True, "unfreeze_unet": True}])
def test_r42_resume_equals_uninterrupted(options, arguments, images, tmp_path):
    options = {"training_steps": 5, "save_step": 3, "gradient_accumulation_steps": 2} | options
    whole = arguments(output_dir=str(tmp_path / "whole"), **options)
    unbroken = train_visualizer(whole, images)
    checkpoint, _ = checkpoints(tmp_path / "whole")  # the last step is saved, too
    assert checkpoint.name == "checkpoint-3"
    rest = replace(whole, output_dir=str(tmp_path / "rest"), resume_from_checkpoint=str(checkpoint))
    resumed = train_visualizer(rest, images)
    assert resumed.first_step == 3
    assert resumed.losses == unbroken.losses[3:]
    for part in ("projector", "unet"):
        assert same(weights(tmp_path / "whole", part), weights(tmp_path / "rest", part))


def test_latest_checkpoint_is_found_and_old_ones_are_removed(arguments, images):
    args = arguments(training_steps=4, save_step=1, save_total_limit=2)
    train_visualizer(args, images)
    names = [path.name for path in checkpoints(args.output_dir)]
    assert names == ["checkpoint-3", "checkpoint-4"]
    resumed = train_visualizer(replace(args, resume_from_checkpoint="latest", training_steps=4), images)
    assert (resumed.first_step, resumed.losses) == (4, [])
    assert train_visualizer(args, images).first_step == 4  # by itself, too
    anew = train_visualizer(replace(args, resume_from_checkpoint="False", training_steps=1), images)
    assert anew.first_step == 0


def test_signal_saves_and_the_same_command_resumes(arguments, images, tmp_path):
    unbroken = train_visualizer(arguments(output_dir=str(tmp_path / "whole"), training_steps=5), images)
    args = arguments(training_steps=5, logging_steps=2)
    with pytest.raises(Preempted) as stopped:
        train_visualizer(args, images, callbacks=[OnLog(lambda step, values: os.kill(os.getpid(), signal.SIGUSR1))])
    assert stopped.value.code == PREEMPTED
    marker = json.loads((tmp_path / "out" / MARKER_FILE).read_text())
    # The signal comes after the second step: the third is the next to end.
    assert (marker["step"], marker["checkpoint"], marker["signal"]) == (3, "checkpoint-3", "SIGUSR1")
    resumed = train_visualizer(args, images)
    assert (resumed.first_step, resumed.losses) == (3, unbroken.losses[3:])
    assert not (tmp_path / "out" / MARKER_FILE).exists()


def test_ctrl_c_saves_and_the_same_command_resumes(arguments, images, tmp_path):
    args = arguments(training_steps=5, logging_steps=2)
    with pytest.raises(
        Interrupted, match=r"after step 3; to resume: run the same command again, or --resume_from_checkpoint .*-3"
    ):
        train_visualizer(args, images, callbacks=[OnLog(lambda step, values: os.kill(os.getpid(), signal.SIGINT))])
    assert not (tmp_path / "out" / MARKER_FILE).exists()  # which asks scripts to start the run again
    assert train_visualizer(args, images).first_step == 3


def test_accumulated_equals_large_batch(arguments, images, tmp_path):
    large = arguments(output_dir=str(tmp_path / "large"), batch_size=4)
    small = arguments(output_dir=str(tmp_path / "small"), batch_size=1, gradient_accumulation_steps=4)
    expected, losses = train_visualizer(large, images).losses, train_visualizer(small, images).losses
    assert losses == pytest.approx(expected, abs=1e-4)


def test_cached_equals_uncached(arguments, images, tmp_path):
    plain = arguments(output_dir=str(tmp_path / "plain"))
    cached = arguments(output_dir=str(tmp_path / "cached"), cache_latents=True)
    expected = train_visualizer(plain, images).losses
    assert train_visualizer(cached, images).losses == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_compiled_trains_as_uncompiled(arguments, images, tmp_path):
    # The graphs are captured and differentiated as always, but not translated to C++, which takes minutes.
    compiler = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    options = {"unfreeze_unet": True, "training_steps": 2, "save_step": 1}
    plain = train_visualizer(arguments(output_dir=str(tmp_path / "plain"), **options), images)
    compiled = train_visualizer(arguments(output_dir=str(tmp_path / "fast"), **compiler, **options), images)
    assert compiled.losses == pytest.approx(plain.losses, abs=1e-4)
    assert weights(tmp_path / "fast", "unet").keys() == weights(tmp_path / "plain", "unet").keys()
    again = replace(arguments(output_dir=str(tmp_path / "fast"), **options), training_steps=3)
    assert train_visualizer(again, images).first_step == 2


def test_a_run_records_that_its_layers_are_compiled(arguments, images):
    args = arguments(torch_compile=True, torch_compile_backend="eager", training_steps=1, save_step=1)
    train_visualizer(args, images)
    recorded = json.loads((Path(args.output_dir) / "checkpoint-1" / "training_args.json").read_text())
    assert (recorded["torch_compile"], recorded["torch_compile_backend"]) == (True, "eager")
    # Accelerate does not compile the entire model around the layers.
    assert AcceleratorState().dynamo_plugin.backend == DynamoBackend.NO


def test_r46_bf16_ema_clipping_accumulation_and_final_save(arguments, images):
    args = arguments(
        mixed_precision="bf16",
        unfreeze_unet=True,
        gradient_accumulation_steps=2,
        max_grad_norm=0.1,
        snr_gamma=5.0,
        noise_offset=0.05,
        save_step=2,
        training_steps=3,
    )
    result = train_visualizer(args, images)
    assert all(loss == loss for loss in result.losses)
    # The last step is saved although it is no multiple of save_step, and in full precision.
    assert {str(value.dtype) for value in weights(args.output_dir, "vae").values()} == {"torch.float32"}
    averaged = weights(args.output_dir, "projector")
    raw = load_file(Path(args.output_dir) / "checkpoint-2" / "trained_weights.safetensors")
    assert {f"projector.{name}" for name in averaged} <= raw.keys()
    assert draw(args.output_dir).isfinite().all()


def test_r46_seed_decides_everything_on_two_threads_bit_for_bit(arguments, images, tmp_path, two_threads):
    runs = [
        train_visualizer(arguments(output_dir=str(tmp_path / str(number)), seed=seed, unfreeze_unet=True), images)
        for number, seed in enumerate((0, 0, 1))
    ]
    assert runs[0].losses == runs[1].losses
    assert runs[0].losses != runs[2].losses
    for part in ("projector", "unet", "vae"):
        first, second = (
            Path(run.output_dir, part, "diffusion_pytorch_model.safetensors").read_bytes() for run in runs[:2]
        )
        assert first == second, part
    assert not torch.are_deterministic_algorithms_enabled()


def test_ema_is_what_is_saved(arguments, images, tmp_path):
    averaged = arguments(output_dir=str(tmp_path / "averaged"))
    plain = arguments(output_dir=str(tmp_path / "plain"), ema_decay=0.0)
    assert train_visualizer(averaged, images).losses == train_visualizer(plain, images).losses
    assert not same(weights(averaged.output_dir, "projector"), weights(plain.output_dir, "projector"))


def test_folder_of_images_validation_grids_and_log(arguments, tmp_path):
    (tmp_path / "images").mkdir()
    paths = [tmp_path / "images" / f"{index}.png" for index in range(3)]
    for path, image in zip(paths, random_images(3), strict=True):
        image.save(path)
    args = arguments(
        image_folder=str(tmp_path / "images"),
        validation_images=[str(path) for path in paths[:2]],
        save_step=3,
        logging_steps=2,
    )
    logged = []
    seen = []
    note = OnLog(lambda step, values: (logged.append((step, values["loss"])), seen.append(values)))
    result = train_visualizer(args, callbacks=[note])
    assert [step for step, _ in logged] == [2, 3]
    assert {"loss", "learning_rate", "lr_projector", "grad_norm", "grad_norm_projector", "epoch"} <= seen[1].keys()
    assert seen[1]["samples_per_second"] > 0 <= seen[1]["data_wait_share"] < 1
    assert (seen[1]["epoch"], seen[1]["skipped_records"]) == (2, 0)
    assert seen[1]["grad_norm"] > 0
    assert logged[0][1] == pytest.approx(sum(result.losses[:2]) / 2)
    assert logged[1][1] == pytest.approx(result.losses[2])
    (grid,) = (Path(args.output_dir) / "validation").iterdir()
    assert grid.name == "step-000003.png"
    assert json.loads((Path(args.output_dir) / "visualizer_arguments.json").read_text()) == args.to_dict()


def test_validation_grid_and_loss_reach_tensorboard_and_the_log(arguments, images, tmp_path, caplog):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    images[0].save(tmp_path / "image.png")
    args = arguments(validation_images=[str(tmp_path / "image.png")], save_step=3, report_to="tensorboard")
    with caplog.at_level("DEBUG", logger="metamorph"):
        result = train_visualizer(args, images)
    assert f"step 3/3 · epoch   1.00 · loss {sum(result.losses) / 3:8.4f} · lr " in caplog.text  # there is no terminal
    assert "step 3, all values: loss" in caplog.text
    # The run's own file, and one for its flags in a folder below.
    folder = Path(args.output_dir) / "tensorboard"
    files = [accumulator.EventAccumulator(str(file)).Reload() for file in folder.rglob("events.out.*")]
    (found,) = (file for file in files if file.Tags()["images"])
    (image,) = found.Images("validation")
    assert (image.width, image.height) == (3 * RESOLUTION, RESOLUTION)
    assert found.Scalars("train/loss")[0].step == 3
    measured = {"learning_rate", "samples_per_second", "data_wait_share", "grad_norm"}
    assert {f"train/{name}" for name in measured} <= set(found.Tags()["scalars"])


def test_resolution_is_that_of_the_diffusion_model_unless_given(arguments, images, tmp_path, caplog):
    caplog.set_level("INFO", logger="metamorph.visualizer_training.build")
    options = {"training_steps": 1, "lr_warmup_steps": 0}
    native = train_visualizer(arguments(resolution=None, **options), images)
    assert f"--resolution {RESOLUTION}, as " in caplog.text
    assert draw(native.output_dir).shape[-2:] == (RESOLUTION, RESOLUTION)
    assert json.loads((native.output_dir / "visualizer_arguments.json").read_text())["resolution"] == RESOLUTION
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    smaller = train_visualizer(arguments(resolution=16, output_dir=str(tmp_path / "16"), **options), images)
    assert f"--resolution 16 differs from the {RESOLUTION} that" in caplog.text
    assert draw(smaller.output_dir).shape[-2:] == (16, 16)


def test_diffusion_model_without_a_resolution_asks_for_the_flag(arguments, parts, images, tmp_path):
    folder = tmp_path / "diffusion"
    shutil.copytree(parts["pretrained_model_name_or_path"], folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": None}))
    with pytest.raises(ValueError, match=r"sample_size None of its UNet\): give --resolution"):
        train_visualizer(arguments(pretrained_model_name_or_path=str(folder), resolution=None), images)


@pytest.mark.parametrize(
    ("part", "text", "message"),
    [
        ("unet", {"block_out_channels": 5}, r"unet/config\.json: block_out_channels 5 must be a list"),
        ("vae", {"block_out_channels": [8] * 10_000}, r"vae/config\.json: block_out_channels"),
        ("vae", "[" * 100_000, r"vae/config\.json is not valid JSON"),
        ("unet", {"block_out_channels": [2**20] * 2}, "parameters, more than 5000000000"),
        ("unet", {"layers_per_block": 10**6}, "asks for 1000000 layers"),
        ("unet", {"sample_size": 10**6}, "sample_size 1000000 must be"),
    ],
    ids=["number", "long", "nested", "large", "deep", "wide"],
)
def test_configurations_are_checked_before_anything_is_built(arguments, parts, tmp_path, part, text, message):
    folder = tmp_path / "diffusion"
    shutil.copytree(parts["pretrained_model_name_or_path"], folder)
    file = folder / part / "config.json"
    file.write_text(text if isinstance(text, str) else json.dumps(json.loads(file.read_text()) | text))
    args = arguments(pretrained_model_name_or_path=str(folder), unet_from_scratch=True, unfreeze_unet=True)
    with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path .*{message}"):
        load_diffusion_parts(adopt_resolution(args))


def test_result_has_a_model_card_and_is_not_replaced_silently(arguments, parts, images, tmp_path, caplog):
    flags = {"resolution": None, "model_license": "openrail", "lr": 0.01}
    result = train_visualizer(arguments(**flags), images)
    _, head, text = (result.output_dir / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert (metadata["library_name"], metadata["license"]) == ("metamorph", "openrail")
    assert "base_model" not in metadata  # local folders, which the Hub does not know
    assert "\n6 images.\n" in text
    assert f"| `resolution` | {RESOLUTION} |" in text
    assert "| `lr` | 0.01 |" in text
    assert "Metrics after 3 steps" in text
    assert f"| `loss` | {sum(result.losses) / 3:.4g} |" in text
    assert "Training data: unknown" in text
    assert not [path for path in (tmp_path, *parts.values()) if str(path) in text]  # no path of this machine
    train_visualizer(arguments(training_steps=1), images)
    assert "holds a result and no checkpoint: it is trained again and replaced" in caplog.text


def test_paths_may_begin_in_the_home_folder(arguments, images, parts, monkeypatch):
    home = Path(parts["vision_tower"]).parent
    monkeypatch.setenv("HOME", str(home))
    named = {name: "~/" + Path(path).name for name, path in parts.items()}
    result = train_visualizer(arguments(**named, training_steps=1, lr_warmup_steps=0), images)
    assert (result.output_dir / "model_index.json").is_file()


def test_checkpoint_that_was_about_to_be_replaced_is_put_back_and_used(arguments, images):
    first = train_visualizer(arguments(save_step=2), images)
    replaced = first.output_dir / "_partial" / "replaced"
    replaced.mkdir(parents=True)
    (first.output_dir / "checkpoint-3").rename(replaced / "checkpoint-3")
    assert train_visualizer(arguments(save_step=2), images).first_step == 3


def test_projector_starts_from_a_finished_visualizer(arguments, images, tmp_path):
    first = train_visualizer(arguments(output_dir=str(tmp_path / "first"), ema_decay=0.0), images)
    args = arguments(output_dir=str(tmp_path / "second"), pretrained_projector=str(first.output_dir), lr=1e-9)
    train_visualizer(args, images)
    before, after = weights(first.output_dir, "projector"), weights(args.output_dir, "projector")
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)


def test_unet_from_scratch_ignores_the_pretrained_one(arguments, images, parts):
    args = arguments(unet_from_scratch=True, unfreeze_unet=True, lr=1e-9, training_steps=1, seed=1)
    train_visualizer(args, images)
    pretrained = weights(parts["pretrained_model_name_or_path"], "unet")["conv_in.weight"]
    assert not torch.allclose(weights(args.output_dir, "unet")["conv_in.weight"], pretrained, atol=1e-3)


def test_resuming_with_other_options_is_refused(arguments, images, tmp_path):
    train_visualizer(arguments(save_step=3), images)
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    elsewhere = {"output_dir": str(tmp_path / "other"), "resume_from_checkpoint": checkpoint}
    with pytest.raises(ValueError, match="trains other weights"):
        train_visualizer(arguments(mode="xattn", **elsewhere), images)
    with pytest.raises(ValueError, match="has shape"):
        train_visualizer(arguments(hidden_dim=32, **elsewhere), images)
    with pytest.raises(ValueError, match="--ema_decay"):
        train_visualizer(arguments(ema_decay=0.0, **elsewhere), images)
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        train_visualizer(arguments(resume_from_checkpoint=str(tmp_path)), images)
    with pytest.raises(CheckpointError, match=r"--normalize_vision True there, .*; --snr_gamma None there, 5\.0"):
        train_visualizer(arguments(normalize_vision=False, snr_gamma=5.0, **elsewhere), images)
    with pytest.raises(CheckpointError, match=f"--resolution {RESOLUTION} there, {2 * RESOLUTION} here"):
        train_visualizer(arguments(resolution=2 * RESOLUTION, **elsewhere), images)


def test_another_model_of_the_same_name_is_refused_at_resume(arguments, images, parts, tmp_path):
    train_visualizer(arguments(training_steps=1, save_step=1), images)
    for flag, file in (
        ("vision_tower", "model.safetensors"),
        ("pretrained_model_name_or_path", "unet/diffusion_pytorch_model.safetensors"),
    ):
        moved = tmp_path / "moved" / Path(parts[flag]).name
        shutil.copytree(parts[flag], moved)
        again = arguments(training_steps=1, save_step=1, **{flag: str(moved)})
        assert train_visualizer(again, images).first_step == 1  # where it lies does not matter
        weights = load_file(moved / file)
        save_file({name: value + 1 for name, value in weights.items()}, moved / file)
        with pytest.raises(CheckpointError, match=f"--{flag} {moved.name} crc32:.* there, {moved.name} crc32:"):
            train_visualizer(again, images)


def test_checkpoints_of_earlier_versions_and_of_other_runs_are_refused(arguments, images, tmp_path):
    train_visualizer(arguments(training_steps=1, save_step=1), images)
    checkpoint = tmp_path / "out" / "checkpoint-1"
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    del manifest["files"]["trained_weights.safetensors"]
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest))
    (checkpoint / "trained_weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not one of the visualizer: it has no trained_weights"):
        train_visualizer(arguments(training_steps=1), images)
    (checkpoint / "state.json").touch()
    with pytest.raises(CheckpointError, match=r"earlier version.*--resume_from_checkpoint False"):
        train_visualizer(arguments(training_steps=1), images)


def test_another_run_in_the_folder_is_refused(arguments, images, tmp_path):
    with only_run_in(tmp_path / "out"), pytest.raises(CheckpointError, match=f"process {os.getpid()}"):
        train_visualizer(arguments(report_to="tensorboard"), images)
    assert not (tmp_path / "out").exists()


def test_folders_that_do_not_fit_are_refused(arguments, images, parts, tmp_path):
    with pytest.raises(ValueError, match=r"unet/config\.json"):
        train_visualizer(arguments(pretrained_model_name_or_path=str(tmp_path)), images)
    with pytest.raises(ValueError, match="does not exist"):
        train_visualizer(arguments(pretrained_model_name_or_path=str(tmp_path / "none")), images)
    with pytest.raises(ValueError, match="--vision_tower"):
        train_visualizer(arguments(vision_tower=str(tmp_path)), images)
    with pytest.raises(ValueError, match="--resolution 30 must be a multiple of 4"):
        train_visualizer(arguments(resolution=30), images)
    with pytest.raises(ValueError, match="num_image_tokens=5"):
        train_visualizer(arguments(num_tokens=5), images)
    with pytest.raises(ValueError, match="holds no projector"):
        train_visualizer(arguments(pretrained_projector=str(tmp_path)), images)
    with pytest.raises(ValueError, match="--image_folder or --image_jsons"):
        train_visualizer(arguments())


def test_names_of_transformers_are_understood(arguments, images, tmp_path):
    names = {"max_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 5e-3, "save_steps": 2, "bf16": True}
    ours = {"training_steps": 4, "batch_size": 3, "lr": 5e-3, "save_step": 2, "mixed_precision": "bf16"}
    paths = {name: getattr(arguments(), name) for name in ("vision_tower", "pretrained_model_name_or_path")}
    shared = {"num_tokens": 4, "hidden_dim": 16, "resolution": RESOLUTION, "lr_scheduler_type": "cosine"}
    theirs = VisualizerArguments(output_dir=str(tmp_path / "theirs"), **paths, **shared, **names)
    shared |= {"lr_scheduler": shared.pop("lr_scheduler_type")}
    expected = train_visualizer(
        VisualizerArguments(output_dir=str(tmp_path / "ours"), **paths, **shared, **ours), images
    )
    assert train_visualizer(theirs, images).losses == expected.losses
    assert [path.name for path in checkpoints(tmp_path / "theirs")] == ["checkpoint-2", "checkpoint-4"]
    assert replace(theirs, training_steps=8).max_steps == 8


def test_precision_of_another_trainer_in_the_process_is_replaced(arguments, images, tmp_path):
    plain = arguments(training_steps=1, lr_warmup_steps=0)
    half = arguments(training_steps=1, lr_warmup_steps=0, mixed_precision="bf16", output_dir=str(tmp_path / "half"))
    losses = [train_visualizer(args, images).losses for args in (plain, half)]
    assert losses[0] != losses[1]
    again = train_visualizer(replace(plain, resume_from_checkpoint="False"), images)
    assert again.losses == losses[0]


def test_other_data_rates_and_pickles_at_resume(arguments, images, tmp_path, monkeypatch):
    train_visualizer(arguments(training_steps=2, save_step=1), images)
    more = arguments(training_steps=3, save_step=1, lr=2e-3, weight_decay=0.25)
    with pytest.raises(CheckpointError, match=r"other data .*--image_folder, --image_jsons that it had"):
        train_visualizer(more, images[:5])
    with pytest.raises(CheckpointError, match="seed 0, now 1"):
        train_visualizer(replace(more, seed=1), images)
    seen = []
    note = OnLog(lambda step, values: seen.append((step, values["lr_projector"])))
    manifest = tmp_path / "out" / "checkpoint-2" / "checkpoint.json"
    manifest.write_text(manifest.read_text().replace('"num_images"', '"pictures"'))  # as earlier versions named it
    train_visualizer(more, images, callbacks=[note])
    assert seen == [(3, pytest.approx(2e-3 * 0.5))]  # one step of warm-up, two of decay
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "out" / "checkpoint-3"
    torch.save({"average": Planted()}, checkpoint / "moving_average.pt")
    stamp(checkpoint, "moving_average.pt")
    with pytest.raises(CheckpointError, match="hold more than tensors and numbers"):
        train_visualizer(replace(more, training_steps=4), images)
    assert not (tmp_path / "ran").exists()
    file = checkpoint / "trained_weights.safetensors"
    save_file({name: value.fill_(torch.nan) for name, value in load_file(file).items()}, file)
    stamp(checkpoint, file.name)
    with pytest.raises(ValueError, match=r"trained_weights\.safetensors: .* holds NaN"):
        train_visualizer(replace(more, training_steps=4), images)


class Planted:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def stamp(checkpoint: Path, name: str) -> None:
    """Write down a changed file as it is now."""
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    manifest["files"][name] = file_stamp(checkpoint / name)
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(manifest))
