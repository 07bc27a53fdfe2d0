"""The flags: recipes, and errors for bad input before anything is loaded."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from metamorph import cli
from metamorph.flags.recipes import parse_arguments
from metamorph.recipes import shipped_recipes
from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments, RunArguments
from metamorph.training.arguments.training import CHANGEABLE
from metamorph.training.arguments.unsupported import UNSUPPORTED
from metamorph.training.checkpoints.resume_flags import ACTING, FIXED
from metamorph.training.optimizer import scale_learning_rate
from metamorph.visualizer_training.arguments import VisualizerArguments


TYPES = (ModelArguments, DataArguments, MetaMorphTrainingArguments)

LEARNING = """
base_learning_rate base_batch_size warmup_ratio evaluation_strategy sharding packing per_device_train_batch_size
train_sampling_strategy group_by_length recompute text_loss allow_changes gradient_accumulation_steps tf32
activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
torch_compile torch_compile_backend torch_compile_mode ignore_data_skip resume_from_checkpoint full_determinism seed
data_seed use_cpu accelerator_config ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
ddp_static_graph ddp_backend ddp_timeout dp_replicate fsdp fsdp_config deepspeed local_rank load_best_model_at_end
metric_for_best_model greater_is_better restore_callback_states_from_checkpoint
"""
"""Flags of training that act on what is learned, or how, besides those that are compared when a run resumes."""
AROUND = """
output_dir logging_strategy logging_steps logging_first_step logging_nan_inf_filter logging_dir log_level
log_level_replica log_on_each_node disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
trackio_static_space_id include_num_input_tokens_seen skip_memory_metrics peak_tflops sample_steps sample_prompts
sample_visualizer eval_specs eval_visualizer eval_strategy eval_steps eval_delay eval_on_start
per_device_eval_batch_size do_train do_eval save_strategy save_steps save_total_limit save_only_model
save_on_each_node push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision
dataloader_num_workers dataloader_pin_memory
dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context torch_empty_cache_steps
"""
"""Flags that act on what is logged, evaluated, saved and uploaded, and on speed: not on what is learned."""


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    """Flags whose values must exist on disk."""
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "connector").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "data.jsonl").write_text("")
    return {
        "model_name_or_path": str(tmp_path / "llm"),
        "data_path": str(tmp_path / "data.jsonl"),
        "output_dir": str(tmp_path / "out"),
    }


def argv(flags: dict[str, object]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def parse(flags: dict[str, object]) -> tuple[ModelArguments, DataArguments, MetaMorphTrainingArguments]:
    return parse_arguments(TYPES, argv(flags))


@pytest.mark.parametrize("stage_1", [True, False])
def test_vision_ar_default_depends_on_the_stage(stage_1: bool, paths: dict[str, str], tmp_path: Path) -> None:
    connector = {} if stage_1 else {"pretrain_mm_mlp_adapter": tmp_path / "connector"}
    model, _, _ = parse({**paths, "tune_mm_mlp_adapter": stage_1, **connector})
    assert model.resolved_use_vision_ar is not stage_1
    model, _, _ = parse({**paths, "tune_mm_mlp_adapter": stage_1, **connector, "use_vision_ar": stage_1})
    assert model.resolved_use_vision_ar is stage_1


def test_flags_that_transformers_5_dropped(paths: dict[str, str]) -> None:
    base = {**paths, "tune_mm_mlp_adapter": True}
    assert parse(base)[2].get_warmup_steps(200) == 6
    assert parse({**base, "warmup_ratio": 0.1})[2].get_warmup_steps(200) == 20
    assert parse({**base, "warmup_ratio": 0})[2].get_warmup_steps(200) == 0
    assert parse({**base, "warmup_steps": 7})[2].get_warmup_steps(200) == 7
    args = parse({**base, "evaluation_strategy": "steps", "eval_steps": 5})[2]
    assert args.eval_strategy == "steps"


def test_recipe_then_flags(paths: dict[str, str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    lines = [
        "tune_mm_mlp_adapter: true",
        "learning_rate: 1e-4",
        "num_image_tokens: 16",
        "bf16: false",
        "weight_decay: 1",
    ]
    recipe.write_text("\n".join(lines))
    model, _, training = parse_arguments(TYPES, ["--config", str(recipe), *argv(paths), "--num-image-tokens=25"])
    assert model.tune_mm_mlp_adapter is True
    assert model.num_image_tokens == 25
    assert training.bf16 is False
    assert training.learning_rate == 1e-4  # YAML itself reads 1e-4 as a string
    assert isinstance(training.weight_decay, float)


def test_given_flags_are_known_though_they_have_the_default(paths: dict[str, str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("tune_mm_mlp_adapter: true\nversion: llama3\n")
    words = ["--config", str(recipe), *argv(paths), "--num_image_tokens", "64"]
    model, data, _ = parse_arguments(TYPES, words)
    names = ("model_name_or_path", "tune_mm_mlp_adapter", "version", "num_image_tokens", "vision_tower")
    assert [model.is_given(name) for name in names] == [True, True, True, True, False]
    assert not data.is_given("image_aspect_ratio")
    assert ModelArguments(paths["model_name_or_path"], version="llama3", tune_mm_mlp_adapter=True).is_given("version")


def test_help_states_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "a square number for the interpolations. (default: 64)" in text
    assert "(default: 0.999)" in text  # Transformers' own adam_beta2
    assert "--recompute {none,full,selective}" in text
    assert "Not supported: training keeps no keys and values." in text
    titles = (
        "ModelArguments:",
        "MetaMorphTrainingArguments:",
        "DryRunArguments:",
        "transformers.TrainingArguments:",
        "not supported here:",
    )
    assert list(titles) == sorted(titles, key=text.index)


def test_recipe_may_hold_the_required_flags(paths: dict[str, str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("\n".join(f"{k}: {v}" for k, v in paths.items()) + "\ntune_mm_mlp_adapter: true\n")
    assert parse_arguments(TYPES, [f"--config={recipe}"])[1].data_path == paths["data_path"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "did you mean 'learning_rate'"),
        ("learning_rate: fast", "learning_rate: 'fast'"),
        ("bf16: perhaps", "bf16"),
        ("num_image_tokens: 6.5", "num_image_tokens"),
        ("model_max_length: [1, 2]", "takes one value"),
        ("- learning_rate", "one mapping"),
        ("a: [", "not valid YAML"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: 2026-99-99", "not valid YAML"),
        ("a: 1" + ":1" * 1000, "a number has more than 1000 characters"),
        ("[" * 20_000, "nested too deeply"),
        ("#" * 300_000, "has more than 262144 bytes"),
        ("&a [*a]", "aliases .* expand to too many values"),
        # Nine times nine times …: nine lines that expand to 387 million values.
        (
            "a0: &a0 x\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)),
            "aliases .* expand to too many values",
        ),
        ("- &a {k: v}\n- &b {<<: [*a, *a]}\n- &c {<<: [*b, *b]}\n", "must hold one mapping"),
    ],
)
def test_bad_recipe(text: str, message: str, paths: dict[str, str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_arguments(TYPES, ["--config", str(recipe), *argv(paths)])


def test_unknown_flag_suggests_the_nearest(paths: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="unknown flag --num_image_token: did you mean --num_image_tokens"):
        parse({"num_image_token": 4})
    with pytest.raises(ValueError, match="unexpected arguments"):
        parse_arguments(TYPES, [*argv(paths), "--tune_mm_mlp_adapter", "True", "stray"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model_name_or_path": "/no/such/llm"}, "--model_name_or_path /no/such/llm does not exist"),
        ({"model_name_or_path": "PATH_TO_LLAMA3-8B"}, "does not exist"),
        ({"model_name_or_path": "{tmp}/images"}, "without config.json"),
        ({"vision_tower": "/no/such/tower"}, "--vision_tower /no/such/tower does not exist"),
        ({"data_path": "/no/such.jsonl"}, "--data_path /no/such.jsonl"),
        ({"image_folder": "/no/images"}, "--image_folder /no/images"),
        ({"num_image_tokens": 60}, r"--num_image_tokens=60 .* 49 and 64"),
        ({"image_token_reduction": "pooling"}, "--image_token_reduction 'pooling'.*concat_interpolation"),
        ({"mm_projector_type": "mlp"}, "mm_projector_type"),
        ({"vision_head_type": "conv"}, "vision_head_type"),
        ({"vision_coef": -1}, "vision_coef"),
        ({"tune_mm_mlp_adapter": False}, "stage 2 .* has no connector.*--from_scratch_connector"),
        ({"pretrain_mm_mlp_adapter": "/no/connector"}, "--pretrain_mm_mlp_adapter /no/connector"),
        ({"freeze_vision": False}, "--freeze_vision False"),
        ({"freeze_mm_mlp_adapter": True}, "nothing to train"),
        ({"fp16": True}, "--bf16 False"),
        ({"learning_rate": "fast"}, "--learning_rate.* 'fast' is neither a finite number nor auto"),
        ({"learning_rate": "-1"}, "--learning_rate -1.0 must be a finite number, 0 or larger, or auto"),
        ({"learning_rate": "auto"}, "needs --base_learning_rate.*6.93e-5 --base_batch_size 1536"),
        ({"learning_rate": "auto", "base_learning_rate": 1e-4}, "needs --base_batch_size"),
        ({"base_batch_size": 0}, "--base_batch_size 0 must be larger than 0"),
        ({"loss_normalization": "token"}, "micro_batch"),
        ({"warmup_ratio": 1.5}, "warmup_ratio"),
        ({"mm_projector_lr": -1}, "mm_projector_lr"),
        ({"on_bad_record": "ignore"}, "skip"),
        ({"max_bad_fraction": 2}, "between 0 and 1"),
        ({"image_aspect_ratio": "anyres"}, "square, pad"),
        ({"model_max_length": 1}, "model_max_length"),
        ({"lr_scheduler_type": "cosin"}, "--lr_scheduler_type 'cosin' is unknown: use one of linear, cosine"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr_scheduler_kwargs None do not go together: .*min_lr"),
        ({"lr_scheduler_kwargs": '{"min": 1}'}, "cosine and --lr_scheduler_kwargs .*'min'"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 9}, "--warmup_steps 9.0 has no effect .* constant_with"),
        ({"optim": "galore_adamw"}, "--optim galore_adamw is not supported: it groups the weights itself"),
        ({"max_steps": 0}, "--max_steps 0 must be at least 1"),
        ({"num_train_epochs": 0}, "--num_train_epochs 0.0 must be larger than 0"),
        ({"save_steps": 0}, "--save_steps 0.* --save_strategy no"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps 0 must be 1 or more"),
        ({"adam_beta2": 1}, r"--adam_beta2 1.0 must lie in \[0, 1\)"),
        ({"weight_decay": -1}, "--weight_decay -1.0 must be 0 or more"),
        ({"data_seed": -1}, "--data_seed -1 must be 0 or more"),
        ({"neftune_noise_alpha": 0}, "--neftune_noise_alpha 0.0 must be larger than 0"),
        ({"fp16": True, "bf16": False, "use_cpu": True}, "--fp16 True needs a GPU"),
        ({"do_eval": True}, "--do_eval True has no effect with --eval_strategy no"),
        ({"metric_for_best_model": "loss"}, "--metric_for_best_model loss is never measured"),
        ({"fsdp_config": '{"version": 2}'}, "--fsdp_config has no effect without --fsdp True"),
        ({"dataloader_persistent_workers": True}, "--dataloader_persistent_workers True .* --dataloader_num_workers"),
        ({"dataloader_prefetch_factor": 2}, "--dataloader_prefetch_factor 2 has no effect"),
        ({"accelerator_config": '{"split_batches": true}'}, "--accelerator_config: split_batches True"),
        ({"accelerator_config": '{"dispatch_batches": true}'}, "--accelerator_config: dispatch_batches True"),
        ({"allow_changes": "optim"}, "--allow_changes 'optim' is unknown: use one of image_aspect_ratio"),
    ],
)
def test_bad_value_names_the_flag(
    flags: dict[str, object], message: str, paths: dict[str, str], tmp_path: Path
) -> None:
    flags = {k: str(v).replace("{tmp}", str(tmp_path)) for k, v in flags.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        parse({**paths, "tune_mm_mlp_adapter": True, **flags})


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"fsdp_config": {"cpu_offload": True}}, "--fsdp_config has no effect without --fsdp True"),
        ({"fsdp": True}, "--sharding fsdp2 and --fsdp True both name an engine"),
    ],
)
def test_a_second_engine_is_refused(flags: dict[str, Any], message: str, dry_run: bool, tmp_path: Path) -> None:
    """Or the configuration of one, in a dry run as well, which sets no engine up."""
    with pytest.raises(ValueError, match=message):
        MetaMorphTrainingArguments(str(tmp_path), sharding="fsdp2", dry_run=dry_run, **flags)


def test_every_flag_of_training_acts_or_is_refused() -> None:
    """A flag that a later Transformers adds has to be put into one of the groups: does it do anything here?"""
    known = {field.name for field in fields(MetaMorphTrainingArguments)}
    lists = (ACTING, CHANGEABLE, FIXED, UNSUPPORTED, LEARNING.split(), AROUND.split())
    groups = [set(names) for names in lists]
    assert known - set.union(*groups) == set()
    assert sum(len(group) for group in groups) == len(set.union(*groups))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_flag_that_would_do_nothing_is_refused(name: str, tmp_path: Path) -> None:
    defaults = {field.name: field.default for field in fields(MetaMorphTrainingArguments)}
    if name not in defaults:
        pytest.skip("not in this version of Transformers")
    accepted, reason = UNSUPPORTED[name]
    value: Any = not accepted[0] if isinstance(accepted[0], bool) else 0.25
    with pytest.raises(ValueError, match=f"--{name} {value} is not supported") as error:
        MetaMorphTrainingArguments(output_dir=str(tmp_path), **{name: value})
    assert reason in str(error.value)
    MetaMorphTrainingArguments(output_dir=str(tmp_path), **{name: accepted[0]})


def test_values_that_follow_from_several_flags(paths: dict[str, str]) -> None:
    flags = {**paths, "tune_mm_mlp_adapter": True, "seed": 3}
    args = RunArguments(*parse(flags))
    assert (args.data_seed, args.image_aspect_ratio, args.compute_dtype) == (3, None, torch.bfloat16)
    assert args.encodes_images
    args = RunArguments(*parse({**flags, "data_seed": 0, "bf16": False, "image_aspect_ratio": "square"}))
    assert (args.data_seed, args.image_aspect_ratio, args.compute_dtype) == (0, "square", torch.float32)
    assert not RunArguments(*parse({**flags, "feature_cache": "cache"})).encodes_images


def test_stage_2_without_connector_can_be_asked_for(paths: dict[str, str]) -> None:
    assert parse({**paths, "from_scratch_connector": True})[0].stage == 2


def test_finished_model_needs_no_connector(paths: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "llm" / "config.json").write_text(json.dumps({"model_type": "metamorph"}))
    with pytest.raises(FileNotFoundError, match="output of stage 1, pass it as --pretrain_mm_mlp_adapter"):
        parse(paths)
    (tmp_path / "llm" / "model.safetensors").touch()
    assert parse(paths)[0].continues_metamorph


def test_cli_prints_one_line_for_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--model_name_or_path", "/no/llm", "--data_path", "x", "--output_dir", "y"]) == 2
    assert capsys.readouterr().err.startswith("metamorph train: error: --model_name_or_path /no/llm does not exist")
    with pytest.raises(FileNotFoundError):
        cli.main(["--debug", "train", "--model_name_or_path", "/no/llm", "--data_path", "x", "--output_dir", "y"])
    assert cli.main(["trian"]) == 2


def test_learning_rate_rule_of_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["lr", "--base-lr", "6.93e-5", "--base-batch", "1536", "--batch", "768"])
    assert capsys.readouterr().out == "4.9e-05\n"
    assert scale_learning_rate(6.93e-5, 1536, 448) == pytest.approx(3.74e-5, rel=1e-3)  # REGRESSIONS R28


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_recipe_is_valid(recipe: str, paths: dict[str, str], tmp_path: Path) -> None:
    if recipe.startswith("visualizer"):
        words = ["--config", recipe, "--output_dir", paths["output_dir"]]
        (visualizer,) = parse_arguments([VisualizerArguments], words, prog="metamorph train-visualizer")
        assert visualizer.unfreeze_unet
        return
    connector = {} if "stage1" in recipe else {"pretrain_mm_mlp_adapter": tmp_path / "connector"}
    model, _, training = parse_arguments(TYPES, ["--config", recipe, *argv({**paths, **connector})])
    assert model.stage == int(recipe[-1])
    assert training.weight_decay == 0.0
