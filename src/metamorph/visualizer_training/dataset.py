"""Training samples of the visualizer: tower pixels and VAE pixels of the same crop, in a resumable order."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from metamorph.models.image_files import MediaError
from metamorph.runs.preemption import ignore_signals
from metamorph.runs.progress import Progress
from metamorph.visualization.pixels import PixelFormat, crop_square
from metamorph.visualizer_training.denoising import FrozenEncoders, RandomInputs
from metamorph.visualizer_training.images.bad_images import BadImages
from metamorph.visualizer_training.images.sources import TrainingImages


@dataclass(frozen=True)
class Sample:
    """An image and its place in the endless stream of training samples."""

    index: int
    """Number of the image."""
    position: int
    """Number of samples, over all processes, that come before it in training. Seeds everything random about it."""


@dataclass(frozen=True, eq=False)
class VisualizerDataset(Dataset):
    """Images as `{"tower_pixels": [3, S, S], "vae_pixels": [3, R, R], "weight": [], "position": int}`.

    The square is cut once, at the image's own resolution, and then resized for each encoder: both see the same part of
    it, and neither sees it resized twice. An image that cannot be read is replaced by a black one of weight 0, so that
    all others keep their places in the order.
    """

    source: TrainingImages
    tower_format: PixelFormat
    vae_format: PixelFormat
    bad_images: BadImages
    random_crop: bool = False
    """Cut at a random place along the longer side instead of the centre."""
    seed: int = 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: Sample) -> dict[str, Any]:
        try:
            image, weight = self.source.load(sample.index), 1.0
        except MediaError as error:
            self.bad_images.note(sample.index, error)
            image, weight = Image.new("RGB", (1, 1)), 0.0
        place = np.random.default_rng([self.seed, sample.position]).random() if self.random_crop else 0.5
        square = crop_square(image, place)
        return {
            "tower_pixels": self.tower_format.pixels(square),
            "vae_pixels": self.vae_format.pixels(square),
            "weight": torch.tensor(weight),
            "position": sample.position,
        }


@dataclass(frozen=True, eq=False)
class TensorDataset(Dataset):
    """Encoded samples: `{name: tensors[name][index], "position": int}`."""

    tensors: Mapping[str, torch.Tensor]
    """Each `[images, ...]`."""

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, sample: Sample) -> dict[str, Any]:
        return {name: tensor[sample.index] for name, tensor in self.tensors.items()} | {"position": sample.position}


def encode_all(
    dataset: VisualizerDataset, encoders: FrozenEncoders, batch_size: int, num_workers: int
) -> TensorDataset:
    """Visual tokens and moments of every image, on the CPU."""
    every = [Sample(index, index) for index in range(len(dataset))]
    order = [every[at : at + batch_size] for at in range(0, len(every), batch_size)]
    loader = DataLoader(dataset, batch_sampler=order, num_workers=num_workers, worker_init_fn=ignore_signals)
    chunks = []
    for batch in Progress(loader, "encoding images", unit="batch"):
        encoded = encoders(batch["tower_pixels"], batch["vae_pixels"]) | {"weight": batch["weight"]}
        chunks.append({name: value.cpu() for name, value in encoded.items()})
    return TensorDataset({name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]})


def collate(
    samples: list[dict[str, Any]], random_inputs: Callable[[torch.Tensor], RandomInputs]
) -> dict[str, torch.Tensor]:
    """Collate samples and replace positions by the fields of their random inputs, in a worker if there are any."""
    batch = default_collate(samples)
    return batch | vars(random_inputs(batch.pop("position")))


@dataclass(eq=False)
class StreamBatches(Sampler[list[Sample]]):
    """Batches of one process: every image once per epoch, in a new order each epoch.

    The order depends only on the seed, so a run resumes at any sample, with any number of processes.
    """

    num_images: int
    batch_size: int
    """Samples per batch of this process."""
    num_batches: int
    seed: int
    rank: int = 0
    world_size: int = 1
    _done: int = field(default=0, init=False)
    _samples: int = field(default=0, init=False)

    def resume(self, batches: int, samples: int) -> "StreamBatches":
        """Resume after `batches` batches, in which training has seen `samples` samples over all processes.

        These batches come first and are empty: Trainer skips the number that it has counted.
        """
        self._done, self._samples = batches, samples
        return self

    def samples_after(self, batches: int) -> int:
        """Samples, over all processes, of the first `batches` batches of the run."""
        return self._samples + (batches - self._done) * self.batch_size * self.world_size

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[Sample]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for number in range(self.num_batches):
            batch: list[Sample] = []
            if number >= self._done:
                first = self.samples_after(number) + self.rank * self.batch_size
                for position in range(first, first + self.batch_size):
                    if position // self.num_images != epoch:
                        epoch = position // self.num_images
                        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_images)
                    batch.append(Sample(index=int(order[position % self.num_images]), position=position))
            yield batch
