"""Training samples of the visualizer: tower pixels and VAE pixels of the same crop, in a resumable order."""

import shutil
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from metamorph.files.permissions import save_file
from metamorph.models.image_files import MediaError
from metamorph.runs.preemption import ignore_signals
from metamorph.runs.progress import Progress
from metamorph.visualization.pixels import PixelFormat, crop_square
from metamorph.visualizer_training.arguments import VisualizerArguments
from metamorph.visualizer_training.denoising import FrozenEncoders, RandomInputs
from metamorph.visualizer_training.images.bad_images import BadImages
from metamorph.visualizer_training.images.sources import TrainingImages


LATENTS_FOLDER = "_latents"
"""Subfolder of the output folder with the encoded images while several processes train on them."""


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
    """Encoded samples: visual tokens, moments and weight of an image, and `"position": int`."""

    shares: Sequence[Mapping[str, torch.Tensor]]
    """Of consecutive images, each tensor `[images of the share, ...]`."""
    ends: Sequence[int]
    """For each share, the number of images up to its end."""

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, sample: Sample) -> dict[str, Any]:
        number = bisect(self.ends, sample.index)
        row = sample.index - (self.ends[number - 1] if number else 0)
        return {name: tensor[row] for name, tensor in self.shares[number].items()} | {"position": sample.position}


@contextmanager
def encoded(dataset: VisualizerDataset, encoders: FrozenEncoders, args: VisualizerArguments) -> Iterator[TensorDataset]:
    """Encode every image once; all processes must enter. A single one keeps the tensors in memory.

    Several encode one share each and write it to the output folder. They map all shares into memory, which those of one
    machine share until they end.
    """
    rank, processes = args.process_index, args.world_size
    ends = [len(dataset) * number // processes for number in range(1, processes + 1)]
    own = _encode(dataset, range(ends[rank - 1] if rank else 0, ends[rank]), encoders, args)
    if processes == 1:
        yield TensorDataset([own], ends)
        return
    folder = Path(str(args.output_dir)) / LATENTS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number}.safetensors" for number in range(processes)]
    save_file(own, files[rank])
    del own
    args.distributed_state.wait_for_everyone()
    try:
        yield TensorDataset([load_file(file) for file in files], ends)
        args.distributed_state.wait_for_everyone()
    finally:
        if rank == 0:
            shutil.rmtree(folder)


def _encode(
    dataset: VisualizerDataset, images: range, encoders: FrozenEncoders, args: VisualizerArguments
) -> dict[str, torch.Tensor]:
    """Visual tokens, moments and weights of images, on the CPU; nothing for none."""
    order = [
        [Sample(index, index) for index in images[at : at + args.batch_size]]
        for at in range(0, len(images), args.batch_size)
    ]
    workers = args.dataloader_num_workers
    loader = DataLoader(dataset, batch_sampler=order, num_workers=workers, worker_init_fn=ignore_signals)
    chunks: list[dict[str, torch.Tensor]] = []
    for batch in Progress(loader, "encoding images", unit="batch"):
        results = encoders(batch["tower_pixels"], batch["vae_pixels"]) | {"weight": batch["weight"]}
        chunks.append({name: value.cpu().contiguous() for name, value in results.items()})
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]} if chunks else {}


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
