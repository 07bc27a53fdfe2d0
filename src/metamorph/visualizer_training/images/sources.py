"""Where the training images of the visualizer are: in memory, in files and in tar archives; read by their number."""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from metamorph.data.media.stores import resolve_image_path
from metamorph.data.sources.open import open_source
from metamorph.models.image_files import MediaError, load_image
from metamorph.models.image_processing import to_rgb
from metamorph.visualizer_training.images.archives import IMAGE_SUFFIXES, TarImages, is_image_name


logger = logging.getLogger(__name__)

RECORD_KEYS = ("image", *IMAGE_SUFFIXES)


@dataclass(frozen=True)
class TrainingImages:
    """Random access to images: first those in memory or files, then those in archives."""

    files: Sequence[Image.Image | Path] = ()
    archives: TarImages | None = None

    def __len__(self) -> int:
        return len(self.files) + (0 if self.archives is None else len(self.archives))

    def load(self, index: int) -> Image.Image:
        """Image `index` in upright RGB; a MediaError that names it if it cannot be read."""
        if self.archives is not None and index >= len(self.files):
            return self.archives.load(index - len(self.files))
        image = self.files[index]
        return load_image(image) if isinstance(image, Path) else to_rgb(image)

    def digest(self) -> str:
        """Changes with the images and their order, but not when they are moved: data may be moved between two runs."""
        # Files count by their names without folders, images in memory by their sizes.
        names = [item.name if isinstance(item, Path) else str(item.size) for item in self.files]
        parts = [_digest(names)] if names else []
        if self.archives is not None:
            parts.append(self.archives.digest())
        return parts[0] if len(parts) == 1 else _digest(parts)


def open_images(image_jsons: Sequence[str | Path] = (), image_folder: str | Path | None = None) -> TrainingImages:
    """Find the images that the flags name: those in files first, then those in tar archives.

    Args:
        image_jsons: JSON arrays or JSONL files of paths, or of records with one of `RECORD_KEYS` whose value is a path
            or a list of paths (LLaVA data can be used unchanged; its text-only records are skipped). A path that ends
            in `.tar` is an archive. Relative paths may not leave the folder that they start from.
        image_folder: Root of relative paths, by default the folder of the JSON file. Without `image_jsons`, the folder
            whose images and archives are used, including its subfolders.
    """
    if image_jsons:
        paths, flag = list(_listed(image_jsons, image_folder)), f"--image_jsons {' '.join(map(str, image_jsons))} lists"
    elif image_folder:
        paths = sorted(path for path in Path(image_folder).expanduser().rglob("*") if path.is_file())
        flag = f"--image_folder {image_folder} holds"
    else:
        raise ValueError("no images to train on; set --image_folder or --image_jsons")
    tars = [path for path in paths if _is_tar_name(path.name)]
    # A list decides what is an image; in a folder the names do.
    files = [path for path in paths if (not _is_tar_name(path.name) if image_jsons else is_image_name(path.name))]
    if not files and not tars:
        raise ValueError(f"{flag} no image ending in {', '.join(IMAGE_SUFFIXES)}, and no .tar archive")
    once = list(dict.fromkeys(tars))
    if len(once) < len(tars):
        logger.warning("%d archives are listed more than once; each is read once", len(tars) - len(once))
    return TrainingImages(files, TarImages(once) if once else None)


def _listed(files: Sequence[str | Path], image_folder: str | Path | None) -> Iterator[Path]:
    """The paths in the lists."""
    for file in files:
        root = Path(image_folder).expanduser() if image_folder else Path(file).expanduser().parent
        records = open_source(Path(file).expanduser(), "--image_jsons")
        for number in range(len(records)):
            where = f"{file}, record {number + 1}"
            for name in _image_names(records[number].value, where):
                try:
                    path = resolve_image_path(name, root)
                except MediaError as error:
                    raise ValueError(f"{where}: {error}") from None
                if not os.path.isfile(path):  # pathlib raises for names that are too long
                    kind = "archive" if _is_tar_name(name) else "image"
                    raise FileNotFoundError(f"{where}: {kind} {path} does not exist; check --image_folder")
                yield path


def _image_names(record: Any, where: str) -> list[str]:
    """File names of the images of a record; none for a text-only one."""
    value = record
    if isinstance(record, dict):
        value = next((record[key] for key in RECORD_KEYS if record.get(key)), [])
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{where}: {name!r} is not the path of an image")
    return names


def _is_tar_name(name: str) -> bool:
    return name.lower().endswith(".tar")


def _digest(names: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()
