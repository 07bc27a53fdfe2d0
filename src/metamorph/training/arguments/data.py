"""The flags of `metamorph train` that say what the model learns from."""

import os
from dataclasses import dataclass
from pathlib import Path

from metamorph.data.mixture import read_specs
from metamorph.data.records import ON_BAD_RECORD
from metamorph.flags.checks import RemembersGiven, check_choice, names_flag
from metamorph.models.sequence.constants import ASPECT_RATIOS


@dataclass
class DataArguments(RemembersGiven):
    """What the model learns from."""

    data_path: str
    """Records: a JSON array, JSON Lines, tars in WebDataset's layout (`shard-{000..099}.tar`), or a mixture of
    sources (YAML)."""
    image_folder: str | None = None
    """Folder that relative paths of images and videos start at; by default the folder of the records. Tars bring
    their media, and sources of a mixture may name a folder of their own."""
    model_max_length: int = 4096
    """Longest sequence in tokens, visual tokens included."""
    image_aspect_ratio: str = "square"
    """`square` lets the image processor resize to a square, `pad` keeps the proportions by a border. When a finished
    model is trained further and this is not given, as in that model."""
    on_bad_record: str = "raise"
    """What happens with a record that cannot be used: raise, or skip (count, log and leave out)."""
    max_bad_fraction: float = 0.01
    """Largest share of skipped records, between 0 and 1; above it the run stops."""
    data_license: str | None = None
    """Licence of the records that the model card of the result names; without it the card calls it unknown."""
    feature_cache: str | None = None
    """Folder with visual tokens made by `metamorph data cache-features`: they stand in for the images, and the tower,
    which must be frozen, is neither run nor kept on the GPU."""

    eval_data_path: str | None = None
    """Records that are not trained on, in any form of `data_path`: their text and visual losses are measured for each
    source when `eval_strategy` says."""
    eval_image_folder: str | None = None
    """As `image_folder`, for `eval_data_path`; by default the folder of those records."""

    def __post_init__(self) -> None:
        check_choice("--image_aspect_ratio", self.image_aspect_ratio, ASPECT_RATIOS)
        check_choice("--on_bad_record", self.on_bad_record, ON_BAD_RECORD)
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max_bad_fraction {self.max_bad_fraction} must lie between 0 and 1")
        if self.model_max_length < 2:
            raise ValueError(f"--model_max_length {self.model_max_length} must be at least 2 tokens")
        self.data_path = os.path.expanduser(self.data_path)
        read_specs(self.data_path)
        if self.image_folder is not None:
            self.image_folder = os.path.expanduser(self.image_folder)
        if self.feature_cache is not None:
            self.feature_cache = os.path.expanduser(self.feature_cache)
        if self.image_folder is not None and not Path(self.image_folder).is_dir():
            raise FileNotFoundError(f"--image_folder {self.image_folder} does not exist or is not a folder")
        self._check_validation_data()

    def _check_validation_data(self) -> None:
        if self.eval_image_folder is not None:
            self.eval_image_folder = os.path.expanduser(self.eval_image_folder)
            if not Path(self.eval_image_folder).is_dir():
                raise FileNotFoundError(
                    f"--eval_image_folder {self.eval_image_folder} does not exist or is not a folder"
                )
        if self.eval_data_path is not None:
            self.eval_data_path = os.path.expanduser(self.eval_data_path)
            with names_flag("--eval_data_path", self.eval_data_path):
                read_specs(self.eval_data_path)
