"""From the flags to processor, data and model: configurations first, weights only once everything else is right."""

import difflib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import IntervalStrategy, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import CHAT_TEMPLATE_FILE, PROCESSOR_NAME

from metamorph.data.batching.lengths import Lengths, measure
from metamorph.data.batching.packing import BatchPlanner
from metamorph.data.dataset import MixtureDataset, load_data
from metamorph.data.features.cache import FeatureCache, describe_tower
from metamorph.data.sources.index import cache_folder
from metamorph.evaluation.losses import metric_names
from metamorph.flags.checks import check_reachable, names_flag, refuse_tower
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
from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments
from metamorph.training.lora import adapter_base, quantization_config


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
"""Flags that a finished model has already decided."""
LOSS_FIELDS = ("use_vision_ar", "vision_coef")
"""Flags that may change when a finished model is trained further."""
MAX_MEASURING = 32
"""Most processes that measure lengths where no number of workers is asked for."""


@dataclass
class Plan:
    """What will be built: everything that is known without loading weights."""

    config: MetaMorphConfig
    """Configuration of the model."""
    processor: MetaMorphProcessor
    """Processor of the model."""
    continues: bool
    """Whether a finished MetaMorph model is trained further."""


def make_plan(args: ModelArguments, image_aspect_ratio: str | None = None, checkpoint: str | None = None) -> Plan:
    """Read configurations, tokenizer and image processor, and check that they go together.

    Args:
        args: The model flags.
        image_aspect_ratio: How images become square, see `DataArguments`. None: as in the finished model that is
            trained further, else `square`.
        checkpoint: Checkpoint that the run resumes from: a chat template with a date in it keeps the date. A new run
            has the date of its first process.

    Raises:
        FileNotFoundError: if a model, tokenizer or image processor does not exist.
        ValueError: if the parts do not go together; the message names the flag.
    """
    check_reachable(args.model_name_or_path, "--model_name_or_path")
    with names_flag("--model_name_or_path", args.model_name_or_path):
        text_config = load_config(args.model_name_or_path)
        refuse_tower(text_config.to_dict(), args.model_name_or_path, "--model_name_or_path")
        continues = text_config.model_type == MetaMorphConfig.model_type
    if not continues:
        check_reachable(resolve_vision_tower(args.vision_tower), "--vision_tower")
    with names_flag("--model_name_or_path", args.model_name_or_path):
        tokenizer = load_tokenizer(args.model_name_or_path)
    args.require_connector(continues)
    if args.pretrain_mm_mlp_adapter is not None:
        with names_flag("--pretrain_mm_mlp_adapter", args.pretrain_mm_mlp_adapter):
            read_connector(find_connector(args.pretrain_mm_mlp_adapter))
    if continues:
        with names_flag("--model_name_or_path", args.model_name_or_path):
            template = _template_of_run(text_config.version, tokenizer, checkpoint)
            processor = MetaMorphProcessor.from_pretrained(args.model_name_or_path, **template)
            processor.check_fits(text_config)
            MetaMorphForConditionalGeneration.check_language_model(text_config.text_config)
        if image_aspect_ratio is not None:
            processor.image_aspect_ratio = image_aspect_ratio
        return Plan(_continued_config(text_config, args), processor, continues)
    with names_flag("--model_name_or_path", args.model_name_or_path):
        MetaMorphForConditionalGeneration.check_language_model(text_config)
    with names_flag("--vision_tower", args.vision_tower):
        vision_config = load_vision_config(args.vision_tower)
        image_processor = load_image_processor(resolve_vision_tower(args.vision_tower))
    config = MetaMorphConfig(text_config=text_config, vision_config=vision_config, **config_overrides(args))
    with names_flag("--model_name_or_path", args.model_name_or_path):
        template = _template_of_run(config.version, tokenizer, checkpoint)
    processor = MetaMorphProcessor.from_parts(
        tokenizer, image_processor, config, image_aspect_ratio=image_aspect_ratio or "square", **template
    )
    return Plan(config, processor, continues)


def open_features(model_args: ModelArguments, data_args: DataArguments, plan: Plan) -> FeatureCache | None:
    """Open the feature cache, if one is to stand in for the tower.

    Args:
        model_args: The model flags.
        data_args: The data flags.
        plan: Result of `make_plan` for them.

    Raises:
        DataError: if the cache is unusable, or was made with another tower or reduction.
        ValueError: if the tower is trained.
    """
    if data_args.feature_cache is None:
        return None
    if not model_args.freeze_vision:
        raise ValueError(
            "--freeze_vision False trains the tower, so its visual tokens change and cannot come from --feature_cache "
            f"{data_args.feature_cache}: leave one of the two out"
        )
    return FeatureCache(data_args.feature_cache, describe_tower(plan.config, plan.processor))


def runs_tower(data_args: DataArguments, args: MetaMorphTrainingArguments) -> bool:
    """Whether anything in a run encodes images: training without a feature cache, validation, or sample prompts.

    Args:
        data_args: The data flags.
        args: How the run learns.
    """
    return data_args.feature_cache is None or data_args.eval_data_path is not None or args.sample_steps is not None


def load_training_data(
    args: DataArguments, processor: MetaMorphProcessor, seed: int, features: FeatureCache | None = None
) -> MixtureDataset:
    """Open what the model learns from, and look at the records.

    Args:
        args: The data flags.
        processor: Makes the sequences.
        seed: Chooses the records of sources that are not used as a whole, and what tasks draw at random.
        features: Result of `open_features`.

    Raises:
        DataError: if a source is unusable, or (with `--on_bad_record raise`) a record is bad.
    """
    return load_data(
        args.data_path,
        processor,
        image_folder=args.image_folder,
        model_max_length=args.model_max_length,
        seed=seed,
        on_bad_record=args.on_bad_record,
        max_bad_fraction=args.max_bad_fraction,
        features=features,
    )


def load_validation(
    data_args: DataArguments,
    args: MetaMorphTrainingArguments,
    processor: MetaMorphProcessor,
    visual_loss: bool = True,
) -> MixtureDataset | None:
    """As training data, but from the pictures also where training reads a feature cache, which lacks these.

    Args:
        data_args: `eval_data_path` and how records are read.
        args: `eval_strategy`, `metric_for_best_model`.
        processor: Makes the sequences.
        visual_loss: Whether the model has one, `use_vision_ar`.

    Raises:
        DataError: If validation data are unusable.
        ValueError: If flags contradict each other, or the metric is not measured.
    """
    _check_validation(data_args, args)
    if data_args.eval_data_path is None:
        return None
    validation = load_data(
        data_args.eval_data_path,
        processor,
        image_folder=data_args.eval_image_folder,
        model_max_length=data_args.model_max_length,
        seed=args.seed if args.data_seed is None else args.data_seed,
        on_bad_record=data_args.on_bad_record,
        max_bad_fraction=data_args.max_bad_fraction,
        folder_flag="--eval_image_folder",
    )
    _check_best_metric(args, validation, visual_loss)
    return validation


def plan_run(dataset: MixtureDataset, model_max_length: int, args: MetaMorphTrainingArguments) -> BatchPlanner:
    """Decide which samples make which batch, from lengths that are measured now if anything depends on them.

    One process of each machine measures, with workers of its own, and the others read what it has kept.

    Args:
        dataset: The data set.
        model_max_length: Tokens of a row.
        args: How the run learns.
    """
    group_by_length = args.train_sampling_strategy == "group_by_length"
    if args.packing or group_by_length:
        with args.main_process_first(desc="measuring lengths"):
            lengths = measure(dataset, measuring_workers(args), cache_folder())
    else:
        lengths = Lengths.unknown(len(dataset))
    planner = BatchPlanner(
        lengths,
        seed=args.seed if args.data_seed is None else args.data_seed,
        world_size=args.world_size,
        rows_per_batch=args.per_device_train_batch_size,
        max_length=model_max_length,
        packing=args.packing,
        group_by_length=group_by_length,
        shuffle=args.train_sampling_strategy != "sequential",
    )
    if args.packing:
        per_row = len(dataset) / planner.num_rows
        logger.info(
            "packing: %d samples in %d rows of %d tokens, %.1f %% full; %d steps of micro-batches an epoch, on average "
            "%.1f samples a row and %.0f in each optimizer step",
            len(dataset),
            planner.num_rows,
            model_max_length,
            100 * planner.efficiency,
            planner.steps,
            per_row,
            per_row * args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps,
        )
    return planner


def load_model(
    args: ModelArguments, plan: Plan, compute_dtype: torch.dtype = torch.float32
) -> MetaMorphForConditionalGeneration:
    """Load the weights, in float32 (or the language model in 4 bits), and the connector of stage 1 if one is given.

    Args:
        args: The model flags.
        plan: Result of `make_plan` for the same flags.
        compute_dtype: Precision of the matrix products of a language model in 4 bits.

    Returns:
        The model, with new parts initialised from PyTorch's global random generator.
    """
    kwargs: dict[str, Any] = {"dtype": torch.float32}
    if args.attn_implementation is not None:
        kwargs["attn_implementation"] = args.attn_implementation
    quantization = quantization_config(args, compute_dtype)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    with names_flag("--model_name_or_path", args.model_name_or_path):
        if plan.continues:
            model = MetaMorphForConditionalGeneration.from_pretrained(
                args.model_name_or_path, config=plan.config, **kwargs
            )
        else:
            language_model = load_language_model(args.model_name_or_path, **kwargs)
            # A tokenizer without the image tokens, unlike the processor's: from_parts initialises what it adds.
            tokenizer = load_tokenizer(args.model_name_or_path)
    if not plan.continues:
        with names_flag("--vision_tower", args.vision_tower):
            vision_encoder = load_vision_encoder(args.vision_tower)
        model = MetaMorphForConditionalGeneration.from_parts(
            language_model, vision_encoder, tokenizer, **config_overrides(args)
        )
    if quantization is not None:
        forget_quantisation(model)
    if args.lora_enable:
        model.adapter_base = adapter_base(args, plan.continues, quantization)
    if args.pretrain_mm_mlp_adapter is not None:
        load_connector(model, args.pretrain_mm_mlp_adapter)
    return model


def config_overrides(args: ModelArguments) -> dict[str, Any]:
    """The flags as fields of `MetaMorphConfig`; those not asked for are left to its defaults."""
    values = {name: getattr(args, name) for name in (*STRUCTURE_FIELDS, *LOSS_FIELDS)}
    values["use_vision_ar"] = args.resolved_use_vision_ar
    return {name: value for name, value in values.items() if value is not None}


def measuring_workers(args: MetaMorphTrainingArguments) -> int:
    """Processes that measure lengths: as many as all data loaders of this machine will have, else one for each core.

    One process alone takes hours for ten million samples, and the other ranks wait for `--ddp_timeout` only.

    Args:
        args: How the run learns.
    """
    asked = args.dataloader_num_workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Of a shared machine the cores that are ours, where the system tells.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or min(cores, MAX_MEASURING)


def _template_of_run(version: str, tokenizer: PreTrainedTokenizerBase, checkpoint: str | None) -> dict[str, str]:
    """`chat_template` for a processor with `--version auto`: the checkpoint's, else the tokenizer's with a date.

    Every process must call it. They may start around midnight, or in several time zones.
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
    """The configuration of a finished model with the loss flags that are given.

    Raises:
        ValueError: if a given flag contradicts the model.
    """
    for name in STRUCTURE_FIELDS:
        asked, found = getattr(args, name), getattr(config, name)
        if asked == found:
            continue
        if args.is_given(name):
            raise ValueError(
                f"--{name} {asked} contradicts the model {args.model_name_or_path}, which was trained with {found}: "
                "leave the flag out"
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


def _check_validation(data_args: DataArguments, args: MetaMorphTrainingArguments) -> None:
    strategy = IntervalStrategy(args.eval_strategy).value
    evaluates = strategy != "no" or args.eval_on_start
    if evaluates and data_args.eval_data_path is None:
        flag = f"--eval_strategy {strategy}" if strategy != "no" else "--eval_on_start True"
        raise ValueError(f"{flag} needs validation data: give them by --eval_data_path, or leave the flag out")
    if data_args.eval_data_path is not None and not evaluates:
        raise ValueError(
            f"--eval_data_path {data_args.eval_data_path} is never read with --eval_strategy no: add --eval_strategy "
            "steps (with --eval_steps) or epoch, or leave it out"
        )


def _check_best_metric(args: MetaMorphTrainingArguments, validation: MixtureDataset, visual_loss: bool) -> None:
    """Trainer would look for it after the first evaluation."""
    if args.metric_for_best_model is None:
        return
    name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    known = metric_names(validation.sources, visual_loss=visual_loss)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(
            f"--metric_for_best_model {args.metric_for_best_model} is not measured: {hint}Use one of {', '.join(known)}"
        )
