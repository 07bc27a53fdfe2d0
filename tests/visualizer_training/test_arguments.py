"""The visualizer's flags: help texts, and errors that name flag and mend."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from metamorph.flags.checks import attribute_docs
from metamorph.training.arguments.shared import RunTrainingArguments
from metamorph.visualization.token_options import TokenOptions
from metamorph.visualizer_training.arguments import NAMES_IN_TRANSFORMERS, UNSUPPORTED, VisualizerArguments


ALSO_ACTING = """
output_dir bf16 warmup_steps save_strategy activation_checkpointing optim_args adam_beta1 adam_beta2 adam_epsilon
accelerator_config ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
ddp_timeout fsdp fsdp_config local_rank use_cpu tf32 torch_compile_backend torch_compile_mode torch_empty_cache_steps
restore_callback_states_from_checkpoint resume_from_checkpoint debug do_train
dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
dataloader_multiprocessing_context logging_strategy logging_first_step logging_dir log_level
log_level_replica log_on_each_node disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
trackio_static_space_id skip_memory_metrics logging_steps save_total_limit gradient_accumulation_steps max_grad_norm
dataloader_num_workers
"""
"""Flags of Transformers that do for the visualizer what they do elsewhere."""


def test_every_flag_has_a_help_text():
    ours = set(VisualizerArguments.__annotations__) | set(TokenOptions.__annotations__)
    assert ours <= set(attribute_docs(VisualizerArguments))


def test_every_flag_of_transformers_acts_or_is_refused():
    """A flag that a later Transformers adds has to be put into one of the groups: does it do anything here?"""
    known = {item.name for item in fields(RunTrainingArguments)} - set(VisualizerArguments.__annotations__)
    groups = [set(UNSUPPORTED), set(NAMES_IN_TRANSFORMERS.values()), set(ALSO_ACTING.split())]
    assert known - set.union(*groups) == set()
    assert sum(len(group & known) for group in groups) == len(known)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_flag_that_would_do_nothing_is_refused(name):
    if name not in {item.name for item in fields(VisualizerArguments)}:
        pytest.skip("not in this version of Transformers")
    accepted, reason = UNSUPPORTED[name]
    value = not accepted[0] if isinstance(accepted[0], bool) else 0.25
    with pytest.raises(ValueError, match=f"--{name} {value} is not supported: {reason}"):
        VisualizerArguments("out", **{name: value})
    VisualizerArguments("out", **{name: accepted[0]})


def test_names_of_transformers_and_changed_copies():
    args = VisualizerArguments(
        "out",
        max_steps=8,
        learning_rate=1e-3,
        bf16=True,
        warmup_steps=2,
        save_strategy="no",
        lr_scheduler_type="cosine",
    )
    assert (args.training_steps, args.lr, args.mixed_precision, args.save_step) == (8, 1e-3, "bf16", 0)
    assert (args.lr_warmup_steps, args.lr_scheduler) == (2, "cosine")
    changed = replace(args, training_steps=100, mixed_precision="no", lr_warmup_steps=None, save_step=7)
    assert (changed.max_steps, changed.bf16, changed.warmup_steps, changed.save_steps) == (100, False, 25, 7)
    assert changed.save_strategy == "steps"


@pytest.mark.parametrize(
    ("sharding", "variable"),
    [("ddp", "ACCELERATE_USE_FSDP"), ("ddp", "ACCELERATE_USE_DEEPSPEED"), ("fsdp2", "ACCELERATE_USE_DEEPSPEED")],
)
def test_engines_of_accelerate_launch_are_refused(monkeypatch, sharding, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=rf"accelerate launch has set {variable}.*--sharding fsdp2"):
        VisualizerArguments("out", sharding=sharding)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_precision_of_accelerate_launch_does_not_replace_that_of_the_flags(monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    args = VisualizerArguments("out")
    assert (args.mixed_precision, args.bf16, args.fp16) == ("no", False, False)
    assert VisualizerArguments("out", mixed_precision="bf16").mixed_precision == "bf16"


@pytest.mark.parametrize("config", [{"cpu_offload": True}, {"version": 1}, "fsdp.json"])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_another_configuration_of_fsdp_is_refused(sharding, config):
    with pytest.raises(ValueError, match="--sharding fsdp2 sets them"):
        VisualizerArguments("out", sharding=sharding, fsdp=True, fsdp_config=config)


def test_warmup_is_a_quarter_by_default():
    assert VisualizerArguments("out").warmup_steps == 4000
    assert VisualizerArguments("out", training_steps=100).warmup_steps == 25
    assert VisualizerArguments("out", lr_warmup_steps=7).warmup_steps == 7
    # Transformers' own name, also as a share of the run.
    assert VisualizerArguments("out", training_steps=101, warmup_steps=0.1).lr_warmup_steps == 11


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
    ],
)
def test_missing_files_name_the_flag(options, message):
    with pytest.raises(FileNotFoundError, match=message):
        VisualizerArguments("out", **options)
