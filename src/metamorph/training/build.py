"""From the flags to processor, data and model: configurations first, weights only when everything else is right."""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import IntervalStrategy, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import CHAT_TEMPLATE_FILE, PROCESSOR_NAME

from metamorph.data.batching.collation import PackedCollator, PaddedCollator
from metamorph.data.batching.lengths import Lengths, measure
from metamorph.data.batching.packing import BatchPlanner
from metamorph.data.dataset import MixtureDataset, load_data
from metamorph.data.features import FeatureCache, describe_tower
from metamorph.data.sources.index import cache_folder
from metamorph.evaluation.losses import metric_names
from metamorph.flags.checks import check_reachable, errors_name_flag, refuse_tower
from metamorph.flags.parser import nearest
from metamorph.models.adapters import forget_quantisation
from metamorph.models.configuration_metamorph import MetaMorphConfig
from metamorph.models.connector import find_connector, load_connector, read_connector
from metamorph.models.image_processing import load_image_processor
from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
from metamorph.models.pretrained import load_config, load_language_model, load_tokenizer
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.models.sequence.template_date import with_fixed_date
from metamorph.models.vision_tower import (
    check_same_tower,
    load_vision_config,
    load_vision_encoder,
    resolve_vision_tower,
)
from metamorph.runs.checkpoint_files import on_first_process
from metamorph.training.arguments import MetaMorphTrainingArguments, ModelArguments, RunArguments
from metamorph.training.engines.attention import uses_flash_attention
from metamorph.training.lora import adapter_base, quantization_config
from metamorph.training.optimizer import samples_per_step


logger = logging.getLogger(__name__)

STRUCTURE_FIELDS = (
    "apply_softmax",
    "image_token_reduction",
    "mm_projector_type",
    "mm_use_im_patch_token",
    "mm_use_im_start_end",
    "mm_vision_select_layer",
    "normalize_vision",
    "num_image_tokens",
    "version",
    "vision_head_type",
)
"""Flags whose value is fixed when a MetaMorph model is trained further."""
LOSS_FIELDS = ("use_vision_ar", "vision_coef")
"""Flags that may change when a MetaMorph model is trained further."""
MAX_MEASURING = 32
"""Maximum number of processes that measure lengths when `dataloader_num_workers` is 0."""


@dataclass
class ModelSpec:
    """The model that a run trains, as far as it is known without weights."""

    config: MetaMorphConfig
    processor: MetaMorphProcessor
    is_metamorph: bool
    """Whether a MetaMorph model is trained further."""


def resolve_model(
    args: ModelArguments, image_aspect_ratio: str | None = None, checkpoint: str | None = None
) -> ModelSpec:
    """Read configurations, tokenizer and image processor, and check that they go together.

    An `image_aspect_ratio` of None keeps that of a model that is trained further, else it is `square`. A chat template
    that contains a date keeps the date of the `checkpoint` that the run resumes from; in a new run it is the date of
    the first process. An error names the flag that is to blame.
    """
    name = args.model_name_or_path
    check_reachable(name, "--model_name_or_path")
    with errors_name_flag("--model_name_or_path", name):
        loaded = load_config(name)
        refuse_tower(loaded.to_dict(), name, "--model_name_or_path")
        is_metamorph = loaded.model_type == MetaMorphConfig.model_type
    if not is_metamorph:
        check_reachable(resolve_vision_tower(args.vision_tower), "--vision_tower")
    args.require_connector(is_metamorph)
    if args.pretrain_mm_mlp_adapter is not None:
        with errors_name_flag("--pretrain_mm_mlp_adapter", args.pretrain_mm_mlp_adapter):
            read_connector(find_connector(args.pretrain_mm_mlp_adapter))
    with errors_name_flag("--model_name_or_path", name):
        tokenizer = load_tokenizer(name)
        template = _template_of_run(loaded.version if is_metamorph else args.version, tokenizer, checkpoint)
        MetaMorphForConditionalGeneration.check_language_model(loaded.text_config if is_metamorph else loaded)
        if is_metamorph:
            processor = MetaMorphProcessor.from_pretrained(name, **template)
            processor.check_fits(loaded)
    if is_metamorph:
        if image_aspect_ratio is not None:
            processor.image_aspect_ratio = image_aspect_ratio
        return ModelSpec(_continued_config(loaded, args), processor, is_metamorph)
    with errors_name_flag("--vision_tower", args.vision_tower):
        vision_config = load_vision_config(args.vision_tower)
        image_processor = load_image_processor(resolve_vision_tower(args.vision_tower))
    config = MetaMorphConfig(text_config=loaded, vision_config=vision_config, **config_overrides(args))
    processor = MetaMorphProcessor.from_parts(
        tokenizer, image_processor, config, image_aspect_ratio=image_aspect_ratio or "square", **template
    )
    return ModelSpec(config, processor, is_metamorph)


def open_features(args: RunArguments, spec: ModelSpec) -> FeatureCache | None:
    """Open the feature cache, if `--feature_cache` is given."""
    if args.data.feature_cache is None:
        return None
    if not args.model.freeze_vision:
        raise ValueError(
            "--freeze_vision False trains the tower, so its visual tokens change and cannot come from --feature_cache "
            f"{args.data.feature_cache}: drop one of the two"
        )
    return FeatureCache(args.data.feature_cache, describe_tower(spec.config, spec.processor))


def load_training_data(
    args: RunArguments, processor: MetaMorphProcessor, features: FeatureCache | None = None
) -> MixtureDataset:
    """Open the training data and check the records."""
    return _load_data(args, args.data.data_path, args.data.image_folder, processor, features=features)


def load_validation(args: RunArguments, spec: ModelSpec) -> MixtureDataset | None:
    """Open the validation data. A feature cache lacks their images, so it is not used."""
    _check_validation(args)
    if args.data.eval_data_path is None:
        return None
    path, folder = args.data.eval_data_path, args.data.eval_image_folder
    return _load_data(args, path, folder, spec.processor, folder_flag="--eval_image_folder")


def plan_batches(args: RunArguments, dataset: MixtureDataset) -> BatchPlanner:
    """Plan which samples make up which batch.

    With packing or grouping by length, the samples are measured first: by one process of each machine and its workers.
    The other processes read the lengths that it has cached.
    """
    training = args.training
    group_by_length = training.train_sampling_strategy == "group_by_length"
    if training.packing or group_by_length:
        with training.main_process_first(desc="measuring lengths"):
            lengths = measure(dataset, measuring_workers(training), cache_folder())
    else:
        lengths = Lengths.unknown(len(dataset))
    planner = BatchPlanner(
        lengths,
        seed=args.data_seed,
        world_size=training.world_size,
        rows_per_batch=training.per_device_train_batch_size,
        max_length=args.data.model_max_length,
        packing=training.packing,
        group_by_length=group_by_length,
        shuffle=training.train_sampling_strategy != "sequential",
    )
    if training.packing:
        logger.info(
            "packing: %d samples in %d rows of %d tokens, %.1f %% full; %d micro-batches per epoch; on average %.1f "
            "samples per row and %.0f per optimizer step",
            len(dataset),
            planner.num_rows,
            planner.max_length,
            100 * planner.efficiency,
            planner.steps,
            len(dataset) / planner.num_rows,
            samples_per_step(planner, training.gradient_accumulation_steps),
        )
    return planner


def build_collator(
    model: MetaMorphForConditionalGeneration, processor: MetaMorphProcessor, *, packing: bool
) -> PackedCollator | PaddedCollator:
    """The collator for rows of several samples, or for padded samples."""
    image_token_id = model.config.image_token_id
    if packing:
        return PackedCollator(processor.pad_token_id, uses_flash_attention(model), image_token_id)
    return PaddedCollator(processor.pad_token_id, image_token_id)


def load_model(
    args: ModelArguments, spec: ModelSpec, compute_dtype: torch.dtype = torch.float32
) -> MetaMorphForConditionalGeneration:
    """Load the weights, in float32 (or the language model in 4 bits), and the connector of stage 1 if one is given.

    New parts are initialised from PyTorch's global random generator.

    `compute_dtype` is the precision of matrix products with 4-bit weights.
    """
    quantization = quantization_config(args, compute_dtype)
    options = {"attn_implementation": args.attn_implementation, "quantization_config": quantization}
    kwargs = {"dtype": torch.float32} | {name: value for name, value in options.items() if value is not None}
    with errors_name_flag("--model_name_or_path", args.model_name_or_path):
        if spec.is_metamorph:
            model = MetaMorphForConditionalGeneration.from_pretrained(
                args.model_name_or_path, config=spec.config, **kwargs
            )
        else:
            language_model = load_language_model(args.model_name_or_path, **kwargs)
            # Unlike the processor's, this tokenizer lacks the image tokens: from_parts initialises the rows it adds.
            tokenizer = load_tokenizer(args.model_name_or_path)
    if not spec.is_metamorph:
        with errors_name_flag("--vision_tower", args.vision_tower):
            vision_encoder = load_vision_encoder(args.vision_tower)
        model = MetaMorphForConditionalGeneration.from_parts(
            language_model, vision_encoder, tokenizer, **config_overrides(args)
        )
    if quantization is not None:
        forget_quantisation(model)
    if args.lora_enable:
        model.adapter_base = adapter_base(args, spec.is_metamorph, quantization)
    if args.pretrain_mm_mlp_adapter is not None:
        load_connector(model, args.pretrain_mm_mlp_adapter)
    return model


def config_overrides(args: ModelArguments) -> dict[str, Any]:
    """The flags as fields of `MetaMorphConfig`; those that are None keep its defaults."""
    values = {name: getattr(args, name) for name in (*STRUCTURE_FIELDS, *LOSS_FIELDS)}
    values["use_vision_ar"] = args.resolved_use_vision_ar
    return {name: value for name, value in values.items() if value is not None}


def measuring_workers(args: MetaMorphTrainingArguments) -> int:
    """Number of processes that measure lengths: the data loader workers of this machine, or one per core.

    A single process takes hours for ten million samples, and the other ranks wait only as long as `--ddp_timeout`.
    """
    asked = args.dataloader_num_workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # On a shared machine, count only the cores of this process where the system says which.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or min(cores, MAX_MEASURING)


def _template_of_run(version: str, tokenizer: PreTrainedTokenizerBase, checkpoint: str | None) -> dict[str, str]:
    """`chat_template` for a processor with `--version auto`: the checkpoint's, else the tokenizer's with a fixed date.

    Every process must call it: they may start around midnight, or in different time zones.
    """
    if checkpoint is not None:
        settings = json.loads((Path(checkpoint) / PROCESSOR_NAME).read_text(encoding="utf-8"))
        file = Path(checkpoint) / CHAT_TEMPLATE_FILE
        if settings["version"] == "auto" and file.is_file():
            return {"chat_template": file.read_text(encoding="utf-8")}
    if version != "auto" or tokenizer.chat_template is None:
        return {}
    return {"chat_template": on_first_process(lambda: with_fixed_date(tokenizer.get_chat_template(), tokenizer))}


def _continued_config(config: PreTrainedConfig, args: ModelArguments) -> PreTrainedConfig:
    """The configuration of a model that is trained further, with the loss flags that are given."""
    for name in STRUCTURE_FIELDS:
        asked, found = getattr(args, name), getattr(config, name)
        if asked == found:
            continue
        if args.is_given(name):
            raise ValueError(
                f"--{name} {asked} contradicts the model {args.model_name_or_path}, which was trained with {found}: "
                "drop the flag"
            )
        logger.info("%s=%s comes from the model %s", name, found, args.model_name_or_path)
    if args.is_given("vision_tower"):
        check_same_tower(config.vision_config, args.vision_tower, args.model_name_or_path)
        logger.warning(
            "the tower's weights come from the model %s, not from --vision_tower %s",
            args.model_name_or_path,
            args.vision_tower,
        )
    for name in LOSS_FIELDS:
        if getattr(args, name) is not None:
            setattr(config, name, getattr(args, name))
    return config


def _load_data(
    args: RunArguments, path: str, folder: str | None, processor: MetaMorphProcessor, **kwargs: Any
) -> MixtureDataset:
    return load_data(
        path,
        processor,
        image_folder=folder,
        model_max_length=args.data.model_max_length,
        seed=args.data_seed,
        on_bad_record=args.data.on_bad_record,
        max_bad_fraction=args.data.max_bad_fraction,
        **kwargs,
    )


def _check_validation(args: RunArguments) -> None:
    strategy, path = IntervalStrategy(args.training.eval_strategy).value, args.data.eval_data_path
    evaluates = strategy != "no" or args.training.eval_on_start
    specs = args.training.eval_specs
    if evaluates and path is None and not specs:
        flag = f"--eval_strategy {strategy}" if strategy != "no" else "--eval_on_start True"
        raise ValueError(f"{flag} needs validation data: add --eval_data_path or --eval_specs, or drop the flag")
    for flag, value in (("--eval_data_path", path), ("--eval_specs", " ".join(specs or ()))):
        if value and not evaluates:
            raise ValueError(
                f"{flag} {value} is never read with --eval_strategy no: add --eval_strategy steps (with --eval_steps) "
                "or epoch, or drop it"
            )


def check_best_metric(
    args: MetaMorphTrainingArguments,
    validation: MixtureDataset | None,
    benchmarks: Mapping[str, str],
    visual_loss: bool,
) -> None:
    """Find a wrong name now; Trainer would look for it after the first evaluation.

    `benchmarks` maps prefixes of the metrics of `eval_specs`, such as `eval_mmvp_`, to their main figures. Their other
    figures are not known yet, so any name with such a prefix passes.
    """
    if args.metric_for_best_model is None:
        return
    name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    known = [] if validation is None else metric_names(validation.sources, visual_loss=visual_loss)
    known += [prefix + headline for prefix, headline in benchmarks.items()]
    if name not in known and not name.startswith(tuple(benchmarks)):
        near = nearest(name, known)
        hint = f"did you mean {near!r}? " if near else ""
        raise ValueError(
            f"--metric_for_best_model {args.metric_for_best_model} is not measured: {hint}Use one of {', '.join(known)}"
        )
