"""Pictures for the visualizer: tower pixels and VAE pixels of one and the same crop, in a resumable order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset, Sampler


IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
RECORD_KEYS = ("image", *IMAGE_SUFFIXES)


@dataclass(frozen=True)
class Sample:
    """A picture's place in the source, and its place in the endless stream of training samples."""

    index: int
    """Which picture."""
    position: int
    """How many samples, over all processes, come before it in training. Seeds everything random about it."""


class ImageSource(Protocol):
    """Random access to pictures: what a source of another storage format has to offer."""

    def __len__(self) -> int:
        """Number of pictures."""

    def load(self, index: int) -> Image.Image:
        """Picture `index` in RGB."""


@dataclass(frozen=True)
class ImageFiles:
    """Pictures in files."""

    paths: tuple[Path, ...]
    """One file per picture."""

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Image.Image:
        """Picture `index` in RGB, turned upright.

        Raises:
            ValueError: naming the file, if it cannot be read as a picture.
        """
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"{path} cannot be read as a picture ({error}); remove or replace it") from error

    @classmethod
    def from_folder(cls, folder: str | Path) -> ImageFiles:
        """All pictures of a folder and its subfolders, in the order of their names.

        Raises:
            ValueError: if there is none.
        """
        root = Path(folder).expanduser()
        paths = sorted(path for path in root.rglob("*") if is_image_name(path.name) and path.is_file())
        if not paths:
            raise ValueError(f"--image_folder {folder} holds no picture ending in {', '.join(IMAGE_SUFFIXES)}")
        return cls(tuple(paths))

    @classmethod
    def from_jsons(cls, files: Sequence[str | Path], image_folder: str | Path | None = None) -> ImageFiles:
        """The pictures that JSON arrays or JSONL files list.

        Args:
            files: Each holds paths, or records with one of `RECORD_KEYS` whose value is a path or a list of paths
                (so LLaVA data serves as it is; its text-only records are passed over).
            image_folder: What relative paths start from; by default the folder of the JSON file.

        Raises:
            ValueError: naming file and record, if it is not of that form.
            FileNotFoundError: if a listed picture does not exist.
        """
        paths = []
        for file in files:
            root = Path(image_folder).expanduser() if image_folder else Path(file).expanduser().parent
            for number, record in enumerate(_read_records(Path(file).expanduser()), start=1):
                for name in _image_names(record, where=f"{file}, record {number}"):
                    if not (root / name).is_file():
                        raise FileNotFoundError(
                            f"{file}, record {number}: picture {root / name} does not exist; check --image_folder"
                        )
                    paths.append(root / name)
        if not paths:
            raise ValueError(f"--image_jsons {' '.join(map(str, files))} lists no picture")
        return cls(tuple(paths))


@dataclass(frozen=True)
class ImageList:
    """Pictures in memory."""

    images: Sequence[Image.Image]
    """The pictures."""

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        """Picture `index` in RGB."""
        return self.images[index].convert("RGB")


@dataclass(frozen=True)
class PixelFormat:
    """Size and normalisation that an encoder was trained with."""

    size: int
    """Side of the square input in pixels."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Subtracted from each channel (red, green, blue) in 0..1; ½ maps to −1..1 as a VAE wants it."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Divides each channel afterwards."""
    resample: Image.Resampling = Image.Resampling.BICUBIC
    """Filter for resizing."""

    def pixels(self, square: Image.Image) -> torch.Tensor:
        """A square RGB picture as a tensor `[3, size, size]`."""
        if square.size != (self.size, self.size):
            square = square.resize((self.size, self.size), self.resample)
        values = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
        mean, std = torch.tensor(self.mean).view(3, 1, 1), torch.tensor(self.std).view(3, 1, 1)
        return (values - mean) / std


class VisualizerDataset(Dataset):
    """Pictures as `{"tower_pixels": [3, S, S], "vae_pixels": [3, R, R], "position": int}`.

    The square is cut once, at the picture's own resolution, and then resized for each encoder: both see the same
    part of it, and neither sees it resized twice.

    Args:
        source: Where the pictures are.
        tower_format: What the vision tower takes.
        vae_format: What the VAE takes.
        random_crop: Cut at a random place along the longer side instead of the centre.
        seed: Seed of the places.
    """

    def __init__(
        self,
        source: ImageSource,
        tower_format: PixelFormat,
        vae_format: PixelFormat,
        random_crop: bool = False,
        seed: int = 0,
    ) -> None:
        self.source = source
        self.tower_format = tower_format
        self.vae_format = vae_format
        self.random_crop = random_crop
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: Sample) -> dict[str, Any]:
        place = 0.5
        if self.random_crop:
            place = np.random.default_rng([self.seed, sample.position]).random()
        square = crop_square(self.source.load(sample.index), place)
        return {
            "tower_pixels": self.tower_format.pixels(square),
            "vae_pixels": self.vae_format.pixels(square),
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


def crop_square(image: Image.Image, place: float = 0.5) -> Image.Image:
    """The largest square of a picture; `place` in 0..1 moves it along the longer side (0.5: centre)."""
    width, height = image.size
    side = min(width, height)
    left, top = round((width - side) * place), round((height - side) * place)
    return image.crop((left, top, left + side, top + side))


def is_image_name(name: str) -> bool:
    """Whether a file name ends like a picture's, in capitals or not."""
    return name.lower().rpartition(".")[2] in IMAGE_SUFFIXES


def _read_records(file: Path) -> Iterator[Any]:
    """Records of a JSON array or of a JSONL file."""
    with file.open(encoding="utf-8") as lines:
        first = lines.read(1)
        lines.seek(0)
        if first == "[":
            try:
                yield from json.load(lines)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file} is not a JSON array: {error}") from error
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{file}, line {number} is not JSON: {error}") from error


def _image_names(record: Any, where: str) -> list[str]:
    """File names of the pictures of a record; none for a text-only one."""
    value = record
    if isinstance(record, dict):
        value = next((record[key] for key in RECORD_KEYS if record.get(key)), [])
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{where}: {name!r} is not the path of a picture")
        if name.lower().endswith(".tar"):
            raise ValueError(f"{where}: tar shards cannot be read yet; unpack {name} and pass --image_folder")
    return names
