"""Where a run reports to: TensorBoard, Weights & Biases, trackio or nothing; scalars by Transformers, pictures here."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)


logger = logging.getLogger(__name__)


class MediaTracker(Protocol):
    """A tracker that shows texts and pictures beside the scalars that Transformers reports."""

    def log_media(self, texts: Mapping[str, str], images: Mapping[str, Image.Image], step: int) -> None:
        """Report texts and pictures.

        Args:
            texts: By name, such as `samples/a red cat`.
            images: RGB pictures by name.
            step: Optimizer step.
        """


class TensorBoardMedia:
    """Texts and pictures beside the scalars of Transformers' TensorBoard callback."""

    def __init__(self, callback: TensorBoardCallback) -> None:
        self.callback = callback

    def log_media(self, texts: Mapping[str, str], images: Mapping[str, Image.Image], step: int) -> None:
        """See [`MediaTracker`]."""
        writer = self.callback.tb_writer
        if writer is None:  # there is one on the main process, while it trains
            return
        for name, text in texts.items():
            writer.add_text(name, text, step)
        for name, image in images.items():
            writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        writer.flush()


class RunMedia:
    """Texts and pictures in the run that Transformers' callback has begun with `wandb` or `trackio`.

    The two packages agree in what is needed: `log` and `Image`.

    Args:
        package: The module `wandb` or `trackio`.
    """

    def __init__(self, package: Any) -> None:
        self.package = package

    def log_media(self, texts: Mapping[str, str], images: Mapping[str, Image.Image], step: int) -> None:
        """See [`MediaTracker`]."""
        pictures = {name: self.package.Image(image) for name, image in images.items()}
        # Transformers gives steps this name.
        self.package.log({**texts, **pictures, "train/global_step": step})


def set_up_trackers(callbacks: Iterable[TrainerCallback], output_dir: str) -> list[MediaTracker]:
    """The trackers of a run that can show pictures.

    TensorBoard writes to `output_dir`/tensorboard, unless `TENSORBOARD_LOGGING_DIR` is set: a resumed run continues
    its curves there. Transformers would begin another folder, named by the time.

    Args:
        callbacks: Those of the trainer, in which Transformers has put its own for `--report_to`.
        output_dir: Folder of the run.
    """
    found: list[MediaTracker] = []
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            if callback.logging_dir is None:
                callback.logging_dir = str(Path(output_dir) / "tensorboard")
            found.append(TensorBoardMedia(callback))
        elif isinstance(callback, WandbCallback):
            import wandb

            found.append(RunMedia(wandb))
        elif isinstance(callback, TrackioCallback):
            import trackio

            found.append(RunMedia(trackio))
    return found
