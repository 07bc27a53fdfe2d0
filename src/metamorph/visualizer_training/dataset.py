"""Pictures for the visualizer: tower pixels and VAE pixels of one and the same crop, in a resumable order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from metamorph.models.image_files import MediaError
from metamorph.runs.preemption import ignore_signals
from metamorph.runs.progress import Progress
from metamorph.visualization.pixels import PixelFormat, crop_square
from metamorph.visualizer_training.denoising import Draws, FrozenEncoders
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


def encode_all(
    dataset: VisualizerDataset, encoders: FrozenEncoders, batch_size: int, num_workers: int, device: torch.device
) -> TensorDataset:
    """Tokens and moments of every picture, on the CPU."""
    every = [Sample(index, index) for index in range(len(dataset))]
    order = [every[at : at + batch_size] for at in range(0, len(every), batch_size)]
    loader = DataLoader(dataset, batch_sampler=order, num_workers=num_workers, worker_init_fn=ignore_signals)
    chunks = []
    for batch in Progress(loader, "encoding pictures", unit="batch"):
        pixels = {name: batch[name].to(device) for name in ("tower_pixels", "vae_pixels")}
        encoded = {name: value.cpu() for name, value in encoders(**pixels).items()}
        chunks.append({**encoded, "weight": batch["weight"]})
    return TensorDataset({name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]})


@dataclass(frozen=True)
class DrawingCollator:
    """Makes a batch of samples, and draws what is random about them: in the workers, if there are any."""

    latent_shape: tuple[int, ...]
    """`(channels, height, width)`."""
    options: Mapping[str, Any]
    """Keyword arguments of [`Draws.at`]."""

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The samples' tensors, and the fields of [`Draws`] in the place of their positions."""
        batch = default_collate(samples)
        draws = Draws.at(batch.pop("position"), self.latent_shape, **self.options)
        return batch | vars(draws)


class StreamBatches(Sampler[list[Sample]]):
    """Batches of one process: all pictures in a new order each epoch, each once per epoch.

    The order is a function of the seed alone, so a run resumes at any sample, with any number of processes.

    Args:
        num_images: Pictures per epoch.
        batch_size: Samples per batch of this process.
        seed: Seed of the orders.
        rank: This process, from 0.
        world_size: Number of processes.
        num_batches: Batches of the whole run; without it they do not end.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_batches: int | None = None,
    ) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.num_batches = num_batches
        self._done, self._samples = 0, 0

    def resume(self, batches: int, samples: int) -> StreamBatches:
        """Go on after `batches` batches, in which training has seen `samples` samples, over all processes.

        These batches come first, and are empty: Trainer skips as many as it has counted.
        """
        self._done, self._samples = batches, samples
        return self

    def samples_after(self, batches: int) -> int:
        """Samples, over all processes, of the first `batches` batches of the run."""
        return self._samples + (batches - self._done) * self.batch_size * self.world_size

    def __len__(self) -> int:
        if self.num_batches is None:
            raise TypeError("the batches do not end")
        return self.num_batches

    def __iter__(self) -> Iterator[list[Sample]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for number in count() if self.num_batches is None else range(self.num_batches):
            batch: list[Sample] = []
            if number >= self._done:
                first = self.samples_after(number) + self.rank * self.batch_size
                for position in range(first, first + self.batch_size):
                    if position // self.num_images != epoch:
                        epoch = position // self.num_images
                        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_images)
                    batch.append(Sample(index=int(order[position % self.num_images]), position=position))
            yield batch
