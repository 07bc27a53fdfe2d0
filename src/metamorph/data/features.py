"""Feature cache: visual tokens of all images of a data set, computed once by the frozen tower and read while training.

A cache is a folder of token files (safetensors), an index from images to rows, and `feature_cache.json`, which is
written last and describes the tower and the token reduction.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from metamorph.data.media.refs import ImageRef
from metamorph.data.media.stores import MediaStore, load_all, record_errors
from metamorph.data.records import DataError, RecordError
from metamorph.data.sources.index import Index
from metamorph.data.sources.tars import TarSample
from metamorph.files.model_files import file_shapes, read_json_object
from metamorph.files.permissions import save_file
from metamorph.models.image_files import MediaError
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.runs.progress import Progress


if TYPE_CHECKING:
    from metamorph.data.dataset import MixtureDataset

logger = logging.getLogger(__name__)

Keyed = list[tuple[tuple[int, int], Tensor]]
MANIFEST = "feature_cache.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Dtypes in which tokens can be saved."""

_FORMAT = 1
_KEYS_FILE, _ROWS_FILE = "keys.npy", "rows.npy"
_TENSOR = "visual_tokens"
_WEIGHTS = "weights"
_VISION_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "image_size", "patch_size")
_CONFIG_FIELDS = (
    "mm_vision_select_layer",
    "image_token_reduction",
    "num_image_tokens",
    "normalize_vision",
    "apply_softmax",
)
_TRAINED_REDUCTION = "mlpmixer"


def describe_tower(config: Any, processor: MetaMorphProcessor) -> dict[str, Any]:
    """Everything that visual tokens depend on, except for the image and the weights of the tower.

    Raises:
        ValueError: If the token reduction is trained, so that its tokens change with every step.
    """
    if config.image_token_reduction == _TRAINED_REDUCTION:
        raise ValueError(
            f"--image_token_reduction {_TRAINED_REDUCTION} is trained, so its visual tokens cannot be cached: use "
            "another reduction, or no --feature_cache"
        )
    images = processor.image_processor
    return {
        **{name: getattr(config.vision_config, name, None) for name in _VISION_FIELDS},
        **{name: getattr(config, name) for name in _CONFIG_FIELDS},
        "image_aspect_ratio": processor.image_aspect_ratio,
        "image_side": images.size["height"],
        "image_mean": [float(value) for value in images.image_mean],
        "image_std": [float(value) for value in images.image_std],
        "resample": int(images.resample),
    }


def hash_weights(tower: nn.Module) -> str:
    """A digest of all weights of a vision tower, as float32; it depends on their precision in memory."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


class FeatureCache:
    """Reads the visual tokens of images, on demand; workers of a data loader share the page cache of the system.

    Raises:
        DataError: If the folder is not a complete cache, or was made with another tower or reduction than `tower`, the
            result of [`describe_tower`] for the model that will be trained.
    """

    def __init__(self, folder: str | os.PathLike[str], tower: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self._refuse_other_tower(tower)
        self._index = _read_index(self.folder, self.manifest)
        self._shards: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._index["rows"])

    def __getstate__(self) -> dict[str, Any]:
        """Copies in spawned workers open the files themselves."""
        return {**self.__dict__, "_shards": {}}

    def holds(self, keys: Iterable[tuple[int, int]], dtype: str) -> bool:
        """Whether the cache has the visual tokens of all images with these keys ([`image_key`]), in this dtype."""
        own = set(zip(*self._index["keys"].tolist(), strict=True))
        return self.manifest.get("dtype") == dtype and own.issuperset(keys)

    def check_weights(self, tower: nn.Module) -> None:
        """Raise a `DataError` if the tokens were not made by a tower with these weights."""
        found = hash_weights(tower)
        if found != self.manifest[_WEIGHTS]:
            raise DataError(
                f"--feature_cache {self.folder} was made with a tower of other weights (digest "
                f"{self.manifest[_WEIGHTS][:8]}) than the model's ({found[:8]}): make it again with `metamorph data "
                "cache-features`, or leave the flag out"
            )

    def read(self, refs: Sequence[ImageRef], store: MediaStore) -> Tensor | None:
        """The visual tokens of the images of a conversation, whose files are not opened.

        Returns:
            `[images, num_image_tokens, features]` in the dtype of the cache; None for no images.

        Raises:
            MediaError: If the cache lacks an image, or its file has changed.
        """
        if not refs:
            return None
        return torch.cat([self._row(self._find(ref, store)) for ref in refs])

    def _find(self, ref: ImageRef, store: MediaStore) -> int:
        high, low = image_key(ref, store)
        keys = self._index["keys"]
        place = int(np.searchsorted(keys[0], np.uint64(high)))
        while place < len(self) and keys[0, place] == high:
            if keys[1, place] == low:
                return int(self._index["rows"][place])
            place += 1
        raise MediaError(
            "missing_features",
            f"--feature_cache {self.folder} has no visual tokens of {ref.path}: it was made from other data, or the "
            "file has changed since then; make it again with `metamorph data cache-features`",
        )

    def _row(self, row: int) -> Tensor:
        shard, offset = divmod(row, self.manifest["images_per_shard"])
        if shard not in self._shards:
            self._shards[shard] = safe_open(self.folder / _shard_name(shard), framework="pt").__enter__()
        return self._shards[shard].get_slice(_TENSOR)[offset : offset + 1]

    def _refuse_other_tower(self, tower: Mapping[str, Any]) -> None:
        made_with = self.manifest["tower"]
        differing = [name for name, value in tower.items() if made_with.get(name) != value]
        if differing:
            faults = ", ".join(f"{name} {made_with.get(name)!r} instead of {tower[name]!r}" for name in differing)
            raise DataError(
                f"--feature_cache {self.folder} does not fit this model: it was made with {faults}. "
                "Make it again with `metamorph data cache-features` and the flags of this run, or leave the flag out"
            )


class ImageSet(Dataset[Keyed]):
    """The records with an image that no earlier record has, as keys and pixel values.

    An item is a list of key and float32 `[3, height, width]` for each new image of one record. The data set's
    `on_bad_record` decides whether a bad record, or a missing file, is an error or logged and left out.
    """

    def __init__(self, dataset: MixtureDataset) -> None:
        self.dataset = dataset
        self.num_bad = 0
        self.keys: set[tuple[int, int]] = set()
        self._new: list[tuple[int, list[int]]] = []  # index of a record, and which of its images are new
        for index in Progress(range(len(dataset)), "finding images", unit="record", delay=2):
            try:
                keys = self._keys(index)
            except RecordError as error:
                self._skip(error)
                self.num_bad += 1
                continue
            new = {key: number for number, key in reversed([*enumerate(keys)]) if key not in self.keys}
            self.keys |= new.keys()
            if new:
                self._new.append((index, sorted(new.values())))

    @property
    def num_images(self) -> int:
        """Number of different images."""
        return len(self.keys)

    def __len__(self) -> int:
        return len(self._new)

    def __getitem__(self, place: int) -> Keyed:
        index, numbers = self._new[place]
        try:
            source, record = self.dataset.locate(index)
            store, images = source.store(record), source.conversation(record).images
            refs = [images[number] for number in numbers]
            with record_errors(source.record(record)):
                loaded = load_all(refs, store)
            pixels = self.dataset.processor(images=loaded)["pixel_values"]
            return [(image_key(ref, store), values) for ref, values in zip(refs, pixels, strict=True)]
        except RecordError as error:
            self._skip(error)
            return []

    def images(self, num_workers: int = 0) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Key and pixel values of every image, read by this number of worker processes."""
        loader = DataLoader(self, batch_size=None, num_workers=num_workers)
        with Progress(desc="encoding images", total=self.num_images, unit="image", delay=2) as bar:
            for items in loader:
                yield from items
                bar.update(len(items))

    def _keys(self, index: int) -> list[tuple[int, int]]:
        source, record = self.dataset.locate(index)
        refs = source.conversation(record).images
        with record_errors(source.record(record)):
            return [image_key(ref, source.store(record)) for ref in refs]

    def _skip(self, error: RecordError) -> None:
        if self.dataset.limit.on_bad_record == "raise":
            raise error
        logger.warning("Leaving out a bad record (%s): %s", error.kind, error)


def write_features(
    folder: Path,
    images: Iterable[tuple[tuple[int, int], Tensor]],
    encode: nn.Module,
    tower: Mapping[str, Any],
    *,
    device: torch.device | str = "cpu",
    dtype: str = "bfloat16",
    batch_size: int = 16,
    images_per_shard: int = 8192,
) -> int:
    """Encode images, write their visual tokens, and return the number of images; an existing cache is replaced.

    Args:
        images: Key and pixel values (float32 `[3, height, width]`) of each image; each key once.
        encode: The vision tower, on `device`: `[images, 3, height, width]` to `[images, N, D]`.
        tower: Result of [`describe_tower`].
        dtype: A key of `DTYPES`; a `ValueError` says if it is not.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    folder.mkdir(parents=True, exist_ok=True)
    for file in (folder / MANIFEST, *folder.glob("features-*.safetensors")):
        file.unlink(missing_ok=True)  # the manifest first: half a cache must not look complete
    keys: list[tuple[int, int]] = []
    pending: list[Tensor] = []  # tokens of one file, (images, N, D) each
    iterator = iter(images)
    num_shards = 0
    while batch := list(islice(iterator, batch_size)):
        keys += [key for key, _ in batch]
        with torch.inference_mode():
            tokens = encode(torch.stack([pixels for _, pixels in batch]).to(device)).to("cpu", DTYPES[dtype])
        pending.append(tokens)
        while len(keys) >= (num_shards + 1) * images_per_shard:
            joined = torch.cat(pending)
            save_file({_TENSOR: joined[:images_per_shard].contiguous()}, folder / _shard_name(num_shards))
            pending, num_shards = [joined[images_per_shard:]], num_shards + 1
    if len(keys) > num_shards * images_per_shard:
        save_file({_TENSOR: torch.cat(pending)}, folder / _shard_name(num_shards))
    ordered = np.array(keys, dtype=np.uint64).reshape(-1, 2)
    order = np.lexsort((ordered[:, 1], ordered[:, 0]))
    np.save(folder / _KEYS_FILE, np.ascontiguousarray(ordered[order].T), allow_pickle=False)
    np.save(folder / _ROWS_FILE, order.astype(np.int64), allow_pickle=False)
    manifest = {
        "format": _FORMAT,
        "images": len(keys),
        "images_per_shard": images_per_shard,
        "dtype": dtype,
        "tower": dict(tower),
        _WEIGHTS: hash_weights(encode),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return len(keys)


def image_key(ref: ImageRef, store: MediaStore) -> tuple[int, int]:
    """A 128-bit key of an image: a digest of its file's path, size and date, and of the part or frame that is used.

    Raises:
        MediaError: If there is no such file, or its path is not allowed.
    """
    member = ""
    if isinstance(store, TarSample):
        file, member = Path(store.tar), f"{store.key}\0{ref.path}"
    else:
        file = store.open(ref.path)
    try:
        stat = file.stat()
    except OSError as error:
        raise MediaError(
            "missing_image", f"there is no file {file} ({error.strerror}); is the image folder right?"
        ) from error
    crop = None if ref.crop is None else ref.crop.numbers
    boxes = [(name, box.numbers) for name, box in ref.boxes]
    text = json.dumps([os.path.abspath(file), stat.st_size, stat.st_mtime_ns, member, crop, boxes, ref.time])
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _shard_name(number: int) -> str:
    return f"features-{number:05d}.safetensors"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"--feature_cache {folder} is not a feature cache, or is unfinished: it has no {MANIFEST}. Make it with "
            "`metamorph data cache-features`"
        )
    try:
        manifest = read_json_object(path)
    except ValueError as error:
        raise DataError(f"{error}; or make the cache again") from error
    if manifest.get("format") != _FORMAT:
        raise DataError(f"{path} has not format {_FORMAT}: make the cache again with this version")
    for name, kind in {"images": int, "images_per_shard": int, "tower": dict, _WEIGHTS: str}.items():
        value = manifest.get(name)
        least = 1 if name == "images_per_shard" else 0
        if type(value) is not kind or (isinstance(value, int) and value < least):
            raise DataError(f"{path} is damaged: {name} cannot be {value!r}; make the cache again")
    return manifest


def _read_index(folder: Path, manifest: Mapping[str, Any]) -> Index:
    """Keys and rows of all images, which must match the headers of the token files."""
    count, size = manifest["images"], manifest["images_per_shard"]
    try:
        for name in (_KEYS_FILE, _ROWS_FILE):
            (folder / name).stat()  # an error names the file that is missing
        index = Index((), folder)
        keys, rows = index["keys"], index["rows"]
        shards = [file_shapes(folder / _shard_name(number)) for number in range(-(-count // size))]
    except (OSError, ValueError) as error:
        raise DataError(f"--feature_cache {folder} is damaged ({error}); make it again") from error
    shapes = [shard.get(_TENSOR, ()) for shard in shards]
    lengths = [shape[0] if len(shape) == 3 else -1 for shape in shapes]
    if (
        (keys.shape, keys.dtype) != ((2, count), np.dtype(np.uint64))
        or (rows.shape, rows.dtype) != ((count,), np.dtype(np.int64))
        or (count and not 0 <= rows.min() <= rows.max() < count)
        or lengths != [min(size, count - start) for start in range(0, count, size)]
        or len({shape[1:] for shape in shapes}) > 1
    ):
        raise DataError(f"--feature_cache {folder} is damaged: its files do not belong together; make it again")
    return index
