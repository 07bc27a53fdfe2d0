"""Writes a feature cache from the flags of training: visual tokens of all images, without training anything."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from metamorph.data.features import DTYPES, FeatureCache, ImageSet, describe_tower, write_features
from metamorph.data.records import DataError
from metamorph.flags.checks import errors_name_flag
from metamorph.models.vision_tower import VisionTower, load_tower_of, load_vision_encoder
from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments, RunArguments
from metamorph.training.build import ModelSpec
from metamorph.training.prepare import prepare


logger = logging.getLogger(__name__)


@dataclass
class FeatureArguments(MetaMorphTrainingArguments):
    """The flags of training, whose recipe can be used. Only seeds, batch size, workers and device matter."""

    output_dir: str | None = "."
    """Ignored: nothing is trained."""
    feature_dtype: str = field(default="bfloat16", metadata={"choices": tuple(DTYPES)})
    """Dtype of the visual tokens: bfloat16, or float32, which takes twice the space."""


def cache_features(
    model_args: ModelArguments, data_args: DataArguments, feature_args: FeatureArguments
) -> tuple[Path, int]:
    """Write the feature cache of a training run. `metamorph data cache-features` is this function with flags.

    Of the model, only the tower is loaded. A cache that already holds all images does not change; the tower is then
    read on the CPU and compared.

    Returns the folder (`--feature_cache`) and the number of distinct images.
    """
    if data_args.feature_cache is None:
        raise ValueError("--feature_cache is required: the folder to write visual tokens to")
    if not model_args.freeze_vision:
        raise ValueError("--freeze_vision False trains the tower, so its visual tokens change and cannot be cached")
    prepared = prepare(RunArguments(model_args, data_args, feature_args), for_run=False)
    description = describe_tower(prepared.spec.config, prepared.spec.processor)
    images = ImageSet(prepared.dataset)
    logger.info("%d distinct images in %d samples", images.num_images, len(prepared.dataset))
    folder = Path(data_args.feature_cache)
    tower = load_frozen_tower(model_args, prepared.spec)
    try:
        cache = FeatureCache(folder, description)
        cache.check_weights(tower)
        is_done = cache.holds(images.keys, feature_args.feature_dtype)
    except DataError:  # there is none, or one of another tower, which is replaced
        is_done = False
    if is_done:
        logger.info("--feature_cache %s already holds all of them: no image is encoded", folder)
        return folder, images.num_images
    count = write_features(
        folder,
        images.images(feature_args.dataloader_num_workers),
        tower.to(feature_args.device),
        description,
        device=feature_args.device,
        dtype=feature_args.feature_dtype,
        batch_size=feature_args.per_device_train_batch_size,
    )
    return folder, count


def load_frozen_tower(args: ModelArguments, spec: ModelSpec) -> VisionTower:
    """Load the tower as `load_model` does, in float32, without the language model."""
    if spec.is_metamorph:
        with errors_name_flag("--model_name_or_path", args.model_name_or_path):
            return load_tower_of(args.model_name_or_path).eval()
    with errors_name_flag("--vision_tower", args.vision_tower):
        return VisionTower(spec.config, load_vision_encoder(args.vision_tower)).eval()
