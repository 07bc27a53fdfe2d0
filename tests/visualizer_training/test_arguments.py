"""The visualizer's flags: help texts, and errors that name flag and mend."""

from __future__ import annotations

from dataclasses import fields

import pytest

from metamorph.flags.checks import attribute_docs
from metamorph.visualizer_training.arguments import VisualizerArguments


def test_every_flag_has_a_help_text():
    for item in fields(VisualizerArguments):
        assert attribute_docs(VisualizerArguments)[item.name], item.name


def test_warmup_is_a_quarter_by_default():
    assert VisualizerArguments("out").warmup_steps == 4000
    assert VisualizerArguments("out", training_steps=100).warmup_steps == 25
    assert VisualizerArguments("out", lr_warmup_steps=7).warmup_steps == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "MLP"}, "--mode 'MLP' is unknown: use one of mlp"),
        ({"lr_scheduler": "step"}, "--lr_scheduler"),
        ({"mixed_precision": "fp16"}, "--mixed_precision"),
        ({"report_to": "mlflow"}, "--report_to"),
        ({"training_steps": 0}, "--training_steps 0 must be 1 or more"),
        ({"batch_size": 0}, "--batch_size"),
        ({"save_step": -1}, "--save_step -1 must be 0 or more"),
        ({"lr": 0.0}, "--lr 0.0 must be larger than 0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"cfg_prob": 1.0}, "--cfg_prob"),
        ({"ema_decay": 1.5}, "--ema_decay"),
        ({"snr_gamma": -1.0}, "--snr_gamma"),
        ({"lr_warmup_steps": 20, "training_steps": 10}, "--lr_warmup_steps 20"),
        ({"unet_from_scratch": True}, "--unfreeze_unet"),
        ({"unet_lr": 1e-5}, "--unfreeze_unet"),
        ({"cache_latents": True, "random_crop": True}, "--random_crop"),
        ({"alignment_conditions": "conditions.safetensors"}, "--cache_latents"),
        ({"timestep_power": 0.0}, "--timestep_power"),
        ({"validation_guidance_scales": []}, "--validation_guidance_scales"),
    ],
)
def test_wrong_values_name_the_flag(options, message):
    with pytest.raises(ValueError, match=message):
        VisualizerArguments("out", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_folder": "none"}, "--image_folder none is not a folder"),
        ({"image_jsons": ["none.json"]}, "--image_jsons none.json is not a file"),
        ({"validation_images": ["none.png"]}, "--validation_images"),
        ({"alignment_conditions": "none", "cache_latents": True}, "--alignment_conditions none is not a file"),
    ],
)
def test_missing_files_name_the_flag(options, message):
    with pytest.raises(FileNotFoundError, match=message):
        VisualizerArguments("out", **options)
