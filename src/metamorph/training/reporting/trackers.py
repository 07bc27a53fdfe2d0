"""Texts and images in TensorBoard, Weights & Biases and trackio, to which Transformers logs scalars only."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


class MediaTracker:
    """Logs texts and images to the run that one of Transformers' callbacks has started."""

    def __init__(self, callback: TensorBoardCallback | WandbCallback | TrackioCallback) -> None:
        self.callback = callback

    def log_media(self, texts: Mapping[str, str], images: Mapping[str, Image.Image], step: int) -> None:
        """Log texts and images by name, such as `samples/001`, at an optimizer step."""
        if isinstance(self.callback, TensorBoardCallback):
            writer = self.callback.tb_writer
            if writer is None:  # it exists on the main process, during training
                return
            for name, text in texts.items():
                writer.add_text(name, text, step)
            for name, image in images.items():
                writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
            writer.flush()
            return
        # Both packages have `log` and `Image`, and Transformers logs the step under this name.
        package = importlib.import_module("wandb" if isinstance(self.callback, WandbCallback) else "trackio")
        logged = {name: package.Image(image) for name, image in images.items()}
        package.log({**texts, **logged, "train/global_step": step})


def set_up_trackers(callbacks: Iterable[TrainerCallback], output_dir: str) -> list[MediaTracker]:
    """The trackers among a trainer's callbacks, where Transformers has put those of `--report_to`.

    TensorBoard writes to `output_dir`/tensorboard unless `TENSORBOARD_LOGGING_DIR` is set, so a resumed run continues
    its curves. Transformers would start another folder, named after the time.
    """
    found = []
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(Path(output_dir) / "tensorboard")
        if isinstance(callback, (TensorBoardCallback, WandbCallback, TrackioCallback)):
            found.append(MediaTracker(callback))
    return found
