"""Pictures for the visualizer: tower pixels and VAE pixels of one and the same crop, in a resumable order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from metamorph.models.image_files import MediaError
from metamorph.visualization.pixels import PixelFormat, crop_square
from metamorph.visualizer_training.pictures.bad_pictures import BadPictures
from metamorph.visualizer_training.pictures.sources import ImageSource


@dataclass(frozen=True)
class Sample:
    """A picture's place in the source, and its place in the endless stream of training samples."""

    index: int
    """Which picture."""
    position: int
    """How many samples, over all processes, come before it in training. Seeds everything random about it."""


class VisualizerDataset(Dataset):
    """Pictures as `{"tower_pixels": [3, S, S], "vae_pixels": [3, R, R], "weight": [], "position": int}`.

    The square is cut once, at the picture's own resolution, and then resized for each encoder: both see the same
    part of it, and neither sees it resized twice. In the place of a picture that cannot be read stand zeros of weight
    0, so that all others keep their places in the order.

    Args:
        source: Where the pictures are.
        tower_format: What the vision tower takes.
        vae_format: What the VAE takes.
        random_crop: Cut at a random place along the longer side instead of the centre.
        seed: Seed of the places.
        bad_pictures: Counts what cannot be read; by default the first such picture is an error.
    """

    def __init__(
        self,
        source: ImageSource,
        tower_format: PixelFormat,
        vae_format: PixelFormat,
        random_crop: bool = False,
        seed: int = 0,
        bad_pictures: BadPictures | None = None,
    ) -> None:
        self.source = source
        self.tower_format = tower_format
        self.vae_format = vae_format
        self.random_crop = random_crop
        self.seed = seed
        self.bad_pictures = BadPictures(len(source)) if bad_pictures is None else bad_pictures

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: Sample) -> dict[str, Any]:
        try:
            image = self.source.load(sample.index)
        except MediaError as error:
            self.bad_pictures.note(sample.index, error)
            sizes = {"tower_pixels": self.tower_format.size, "vae_pixels": self.vae_format.size}
            pixels = {name: torch.zeros(3, size, size) for name, size in sizes.items()}
            return {**pixels, "weight": torch.tensor(0.0), "position": sample.position}
        place = 0.5
        if self.random_crop:
            place = np.random.default_rng([self.seed, sample.position]).random()
        square = crop_square(image, place)
        return {
            "tower_pixels": self.tower_format.pixels(square),
            "vae_pixels": self.vae_format.pixels(square),
            "weight": torch.tensor(1.0),
            "position": sample.position,
        }


class TensorDataset(Dataset):
    """Samples that were encoded before: `{name: tensors[name][index], "position": int}`.

    Args:
        tensors: Each `[pictures, ...]`.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, sample: Sample) -> dict[str, Any]:
        return {name: tensor[sample.index] for name, tensor in self.tensors.items()} | {"position": sample.position}


class StreamBatches(Sampler[list[Sample]]):
    """Endless batches of one process: all pictures in a new order each epoch, each once per epoch.

    The order is a function of the seed alone, so a run resumes at any sample, with any number of processes.

    Args:
        num_images: Pictures per epoch.
        batch_size: Samples per batch of this process.
        seed: Seed of the orders.
        start: Samples, over all processes, that training has seen already.
        rank: This process, from 0.
        world_size: Number of processes.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[Sample]]:
        position = self.start + self.rank * self.batch_size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            batch = []
            for offset in range(position, position + self.batch_size):
                if offset // self.num_images != epoch:
                    epoch = offset // self.num_images
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.num_images)
                batch.append(Sample(index=int(order[offset % self.num_images]), position=offset))
            yield batch
            position += self.batch_size * self.world_size
