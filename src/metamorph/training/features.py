"""The feature cache from training's own flags: the tower and the data that training would use, and nothing trained."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metamorph.data.dataset import load_data
from metamorph.data.features.cache import DTYPES, FeatureCache, describe_tower, write_features
from metamorph.data.features.images import PictureSet
from metamorph.data.records import DataError
from metamorph.flags.checks import check_choice, names_flag
from metamorph.models.vision_tower import VisionTower, load_tower_of, load_vision_encoder
from metamorph.training.arguments import DataArguments, MetaMorphTrainingArguments, ModelArguments
from metamorph.training.build import Plan, make_plan


logger = logging.getLogger(__name__)


@dataclass
class FeatureArguments(MetaMorphTrainingArguments):
    """The flags of training, so that its recipe can be given.

    Only the seeds, the batch size, the number of workers and the device count.
    """

    output_dir: str | None = "."
    """Ignored: nothing is trained."""
    feature_dtype: str = "bfloat16"
    """How visual tokens are kept: bfloat16, or float32, which takes twice the space."""

    def __post_init__(self) -> None:
        check_choice("--feature_dtype", self.feature_dtype, tuple(DTYPES))
        super().__post_init__()


def cache_features(
    model_args: ModelArguments, data_args: DataArguments, feature_args: FeatureArguments
) -> tuple[Path, int]:
    """Make the feature cache of a training run. `metamorph data cache-features` is this function with flags.

    A cache that holds all images already is left as it is; the tower is then only read, on the CPU, to be compared.

    Args:
        model_args: Flags of the model; only the tower is loaded.
        data_args: Flags of the data; `feature_cache` is the folder to write.
        feature_args: Flags of training.

    Returns:
        The folder, and the number of different images.

    Raises:
        ValueError: If the tower or the reduction is to be trained, or no folder is given.
    """
    if data_args.feature_cache is None:
        raise ValueError("--feature_cache is required: the folder to write visual tokens to")
    if not model_args.freeze_vision:
        raise ValueError("--freeze_vision False trains the tower, so its visual tokens change: they cannot be kept")
    aspect_ratio = data_args.image_aspect_ratio if data_args.is_given("image_aspect_ratio") else None
    plan = make_plan(model_args, aspect_ratio)
    description = describe_tower(plan.config, plan.processor)
    data = load_data(
        data_args.data_path,
        plan.processor,
        image_folder=data_args.image_folder,
        seed=feature_args.seed if feature_args.data_seed is None else feature_args.data_seed,
        on_bad_record=data_args.on_bad_record,
        max_bad_fraction=data_args.max_bad_fraction,
    )
    pictures = PictureSet(data, data_args.on_bad_record)
    logger.info("%d different images in %d samples", pictures.num_images, len(data))
    folder = Path(data_args.feature_cache)
    tower = load_frozen_tower(model_args, plan)
    if _is_done(folder, pictures, tower, description, feature_args.feature_dtype):
        logger.info("--feature_cache %s holds all of them already: no image is encoded", folder)
        return folder, pictures.num_images
    count = write_features(
        folder,
        pictures.images(feature_args.dataloader_num_workers),
        tower.to(feature_args.device),
        description,
        device=feature_args.device,
        dtype=feature_args.feature_dtype,
        batch_size=feature_args.per_device_train_batch_size,
    )
    return folder, count


def _is_done(folder: Path, pictures: PictureSet, tower: VisionTower, description: dict[str, Any], dtype: str) -> bool:
    """Whether a finished cache of this very tower has all pictures."""
    try:
        cache = FeatureCache(folder, description)
        cache.check_weights(tower)
    except DataError:  # there is none, or another one that will be replaced
        return False
    return cache.holds(pictures.keys, dtype)


def load_frozen_tower(args: ModelArguments, plan: Plan) -> VisionTower:
    """Load the tower as `load_model` would, in float32, without the language model.

    Args:
        args: The model flags.
        plan: Result of `make_plan` for the same flags.
    """
    if plan.continues:
        with names_flag("--model_name_or_path", args.model_name_or_path):
            return load_tower_of(args.model_name_or_path).eval()
    with names_flag("--vision_tower", args.vision_tower):
        return VisionTower(plan.config, load_vision_encoder(args.vision_tower)).eval()
