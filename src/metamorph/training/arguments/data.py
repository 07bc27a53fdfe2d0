"""The flags of `metamorph train` that choose the training and validation data."""

import os
from dataclasses import InitVar, dataclass, field
from pathlib import Path

from metamorph.data.mixture import read_specs
from metamorph.data.records import ON_BAD_RECORD, DataError
from metamorph.flags.checks import RemembersGiven, errors_name_flag
from metamorph.models.sequence.constants import ASPECT_RATIOS


@dataclass
class DataArguments(RemembersGiven):
    """Training and validation data. In a dry run the training data may be missing."""

    data_path: str = ""
    """Records: a JSON array, JSON Lines, WebDataset tar archives (`shard-{000..099}.tar`), or a mixture of sources
    (YAML)."""
    image_folder: str | None = None
    """Folder that relative image and video paths start from; defaults to the folder of the records. Tar archives
    contain their media, and sources of a mixture may set their own folder."""
    model_max_length: int = 4096
    """Maximum sequence length in tokens, including visual tokens."""
    image_aspect_ratio: str = field(default="square", metadata={"choices": ASPECT_RATIOS})
    """`square` resizes images to a square, `pad` keeps their proportions by adding a border. When a MetaMorph model is
    trained further, the default is that model's setting."""
    on_bad_record: str = field(default="raise", metadata={"choices": ON_BAD_RECORD})
    """What to do with a record that cannot be used: `raise`, or `skip` (count it, log it and leave it out)."""
    max_bad_fraction: float = 0.01
    """Maximum fraction of skipped records, between 0 and 1. The run stops above it."""
    data_license: str | None = None
    """Licence of the records, for the model card of the result; the card says unknown without it."""
    feature_cache: str | None = None
    """Folder of visual tokens written by `metamorph data cache-features`. They replace the images; the vision tower,
    which must be frozen, does not run and stays off the GPU."""

    eval_data_path: str | None = None
    """Validation records, in any format of `data_path`. Their text and visual losses are measured per source, as
    scheduled by `eval_strategy`."""
    eval_image_folder: str | None = None
    """Like `image_folder`, for `eval_data_path`; defaults to the folder of those records."""

    dry_run: InitVar[bool] = False  # a flag of DryRunArguments

    def __post_init__(self, dry_run: bool) -> None:
        self.check_values()
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"--max_bad_fraction {self.max_bad_fraction} must lie between 0 and 1")
        if self.model_max_length < 2:
            raise ValueError(f"--model_max_length {self.model_max_length} must be at least 2 tokens")
        for name in ("data_path", "image_folder", "feature_cache", "eval_data_path", "eval_image_folder"):
            if value := getattr(self, name):
                setattr(self, name, os.path.expanduser(value))
        if not self.data_path and not dry_run:
            raise ValueError("--data_path is required: the records to train on")
        self.missing_data: str | None = None
        try:
            if not self.data_path:
                raise FileNotFoundError("--data_path is not given")
            read_specs(self.data_path)
            for name in ("image_folder", "eval_image_folder"):
                folder = getattr(self, name)
                if folder is not None and not Path(folder).is_dir():
                    raise FileNotFoundError(f"--{name} {folder} does not exist or is not a folder")
            if self.eval_data_path is not None:
                with errors_name_flag("--eval_data_path", self.eval_data_path):
                    read_specs(self.eval_data_path)
        except (FileNotFoundError, DataError) as error:
            # A DataError may wrap the missing file of a mixture's source.
            is_missing = isinstance(error, FileNotFoundError) or isinstance(error.__cause__, FileNotFoundError)
            if not (dry_run and is_missing):
                raise
            self.missing_data = str(error)
