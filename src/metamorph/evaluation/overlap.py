"""Overlap of benchmarks with training data: the same images, similar ones, and the same questions.

Images are compared by their decoded pixels, so a file that was renamed or losslessly converted is found, and by a
perceptual hash, which also finds those that were scaled or compressed again. A question is found where its words stand
one after another in what a user says.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from metamorph.data.dataset import MixtureDataset
from metamorph.data.media.refs import ImageRef
from metamorph.data.media.stores import FolderStore, MediaStore, load_all, record_errors
from metamorph.data.records import IMAGE_SUFFIXES, RecordError
from metamorph.data.tasks.base import without_markers
from metamorph.evaluation.samples import Sample
from metamorph.models.image_inputs import to_pil_image
from metamorph.runs.preemption import ignore_signals
from metamorph.runs.progress import Progress


MAX_DISTANCE = 4
"""Bits in which the perceptual hashes of similar images differ, by default."""
MIN_WORDS = 5
"""Shorter questions, such as "What is this?", are in every data set."""
KINDS = ("same_image", "similar_image", "same_question", "image_and_question")
_STEP = 2
"""Grey levels of 255 that count as a difference: compression changes plain areas by less."""
_KEPT = 3
"""Records that are listed for each sample and kind."""
_CACHED = 100_000
"""Fingerprints that a worker keeps, since several records often share an image."""
_NUM_BITS = np.array([number.bit_count() for number in range(2**16)], dtype=np.uint8)
_QUESTIONS = ("question", "prompt", "instruction")
"""Fields of samples that hold what is asked."""

Match = tuple[str, int]
"""Kind, and bits in which the hashes differ."""


@dataclass(frozen=True)
class Fingerprint:
    """What identifies an image."""

    pixels: bytes
    """Digest of the decoded RGB pixels."""
    perceptual: int | None
    """See `difference_hash`."""

    @classmethod
    def of(cls, image: Image.Image) -> Fingerprint:
        """The fingerprint of an upright image."""
        image = image.convert("RGB")
        digest = hashlib.blake2b(image.tobytes(), digest_size=16)
        digest.update(b"%d" % image.width)
        return cls(digest.digest(), difference_hash(image))


def difference_hash(image: Image.Image) -> int | None:
    """64 bits: for each of 8 x 8 places of the shrunk image, whether its right neighbour is brighter.

    None if that is nowhere so, as in a plain image, which resembles every other one.
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(grey[:, 1:] - grey[:, :-1] > _STEP)
    return int.from_bytes(bits.tobytes(), "big") or None


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


@dataclass
class BenchmarkIndex:
    """Fingerprints of the images and words of the questions of one benchmark."""

    samples: Iterable[Sample]
    max_distance: int = MAX_DISTANCE
    _pixels: dict[bytes, list[int]] = field(default_factory=dict)
    _questions: dict[tuple[str, ...], list[tuple[list[str], int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hashes: list[tuple[int, int]] = []
        for number, sample in enumerate(self.samples):
            for image in _images(sample):
                found = Fingerprint.of(to_pil_image(image))
                self._pixels.setdefault(found.pixels, []).append(number)
                if found.perceptual is not None:
                    hashes.append((found.perceptual, number))
            words = words_of(without_markers(_question(sample)))
            if len(words) >= MIN_WORDS:
                self._questions.setdefault(tuple(words[:MIN_WORDS]), []).append((words, number))
        self._hashes = np.array([value for value, _ in hashes], dtype=np.uint64)
        self._owners = np.array([number for _, number in hashes], dtype=np.int64)
        # Hashes of simple images have few bits, all of which may differ within the distance.
        self._limits = np.minimum(self.max_distance, _count_bits(self._hashes) // 4)

    def match(self, record: RecordContent) -> dict[int, list[Match]]:
        """Numbers of the samples that share something with a record, and what."""
        found: dict[int, dict[str, int]] = {}
        for image in record.images:
            for number in self._pixels.get(image.pixels, ()):
                found.setdefault(number, {})["same_image"] = 0
            if image.perceptual is not None and len(self._hashes):
                distances = _count_bits(self._hashes ^ np.uint64(image.perceptual))
                for place in np.flatnonzero(distances <= self._limits).tolist():
                    kinds, distance = found.setdefault(int(self._owners[place]), {}), int(distances[place])
                    if "same_image" not in kinds:
                        kinds["similar_image"] = min(distance, kinds.get("similar_image", distance))
        for number in self._asked(record.texts):
            kinds = found.setdefault(number, {})
            if kinds:
                kinds["image_and_question"] = min(kinds.values())
            kinds["same_question"] = 0
        return {number: list(kinds.items()) for number, kinds in found.items()}

    def _asked(self, texts: Iterable[str]) -> set[int]:
        """The samples whose question is in one of the texts."""
        found = set()
        for text in texts:
            words = words_of(text)
            for start in range(len(words) - MIN_WORDS + 1):
                for question, number in self._questions.get(tuple(words[start : start + MIN_WORDS]), ()):
                    if words[start : start + len(question)] == question:
                        found.add(number)
        return found


@dataclass(frozen=True)
class RecordContent:
    """What a training record shows and asks."""

    where: str
    record_id: str | None = None
    images: tuple[Fingerprint, ...] = ()
    texts: tuple[str, ...] = ()
    """What the user says."""
    paths: tuple[str, ...] = ()
    """Of the images."""
    error: str | None = None
    """Why it cannot be read."""


def find_overlap(
    data: MixtureDataset,
    benchmarks: dict[str, Sequence[Sample]],
    max_distance: int = MAX_DISTANCE,
    num_workers: int = 0,
) -> dict[str, Any]:
    """Compare all training records with benchmarks, by name.

    Returns:
        `records`, their number; `unreadable`, the errors of those that cannot be read; and for each of the `benchmarks`
        `samples`, the number of samples for each of `KINDS`, and `matches`: for each sample and kind the number of
        records, and the first of them with place, id, files of images and distance of the hashes.
    """
    indices = {
        name: BenchmarkIndex(Progress(samples, f"images of {name}", unit="sample", delay=2), max_distance)
        for name, samples in benchmarks.items()
    }
    matches: dict[str, dict[tuple[int, str], list[dict[str, Any]]]] = {name: {} for name in benchmarks}
    counts: dict[str, dict[tuple[int, str], int]] = {name: {} for name in benchmarks}
    unreadable = []
    for record in _contents(data, num_workers):
        if record.error is not None:
            unreadable.append(record.error)
            continue
        for name, index in indices.items():
            for number, kinds in index.match(record).items():
                for kind, distance in kinds:
                    key = number, kind
                    counts[name][key] = counts[name].get(key, 0) + 1
                    if len(listed := matches[name].setdefault(key, [])) < _KEPT:
                        place = {"record": record.where, "id": record.record_id, "images": [*record.paths]}
                        listed.append({**place, "distance": distance})
    return {
        "records": len(data),
        "unreadable": unreadable,
        "max_distance": max_distance,
        "benchmarks": {
            name: {
                "samples": len(samples),
                **{kind: sum(each == kind for _, each in counts[name]) for kind in KINDS},
                "matches": [
                    {"sample": samples[number].id, "kind": kind, "count": count, "records": matches[name][number, kind]}
                    for (number, kind), count in sorted(counts[name].items())
                ],
            }
            for name, samples in benchmarks.items()
        },
    }


def _contents(data: MixtureDataset, num_workers: int) -> Iterator[RecordContent]:
    """The content of each record, in order."""
    loader: DataLoader[RecordContent] = DataLoader(
        _Contents(data),
        batch_size=16,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),
    )
    with Progress(desc="training records", total=len(data), unit="record") as progress:
        for batch in loader:
            yield from batch
            progress.update(len(batch))


class _Contents(Dataset[RecordContent]):
    """Records as a data set, so that the workers of a data loader can share them."""

    def __init__(self, data: MixtureDataset) -> None:
        self.data = data
        self.known: dict[str, Fingerprint] = {}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> RecordContent:
        source, number = self.data.locate(index)
        try:
            record, conversation = source.record(number), source.conversation(number)
            paths = tuple(dict.fromkeys(ref.path for ref in conversation.images if ref.time is None))
            with record_errors(record):
                images = tuple(self._fingerprint(path, source.store(number)) for path in paths)
        except RecordError as error:
            return RecordContent(error.where, error=str(error))
        texts = tuple(without_markers(turn.text) for turn in conversation.turns if turn.role == "user")
        return RecordContent(record.where, record.id, images, texts, paths)

    def _fingerprint(self, path: str, store: MediaStore) -> Fingerprint:
        """That of an entire image, of which the record may show a part."""
        if not isinstance(store, FolderStore):
            return Fingerprint.of(load_all([ImageRef(path)], store)[0])
        name = str(store.open(path))
        if name not in self.known:
            if len(self.known) >= _CACHED:
                self.known.clear()
            self.known[name] = Fingerprint.of(load_all([ImageRef(path)], store)[0])
        return self.known[name]


def _images(sample: Sample) -> list[str]:
    """The images of a sample, also the true ones that a metric compares with."""
    files = [
        file for file in sample.files.values() if file.startswith("data:") or file.lower().endswith(IMAGE_SUFFIXES)
    ]
    return list(dict.fromkeys([*sample.images, *files]))


def _question(sample: Sample) -> str:
    return next((sample.fields[name] for name in _QUESTIONS if name in sample.fields), "")


def _count_bits(values: np.ndarray) -> np.ndarray:
    """The number of ones in each of uint64 `[n]`, `[n]`."""
    return _NUM_BITS[values.view(np.uint16).reshape(len(values), 4)].sum(axis=1, dtype=np.int64)
