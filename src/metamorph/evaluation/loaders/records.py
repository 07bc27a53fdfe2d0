"""Records in the format of training: a sample for each answer, with the true conversation before it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from metamorph.data.dataset import load_data
from metamorph.data.examples import ConversationDataset
from metamorph.data.media.refs import ImageRef
from metamorph.data.media.stores import FolderStore, MediaStore, load_all, record_errors
from metamorph.data.tasks.base import without_markers
from metamorph.evaluation.loaders.base import Loader
from metamorph.evaluation.samples import Sample
from metamorph.models.image_files import MediaError
from metamorph.models.sequence.constants import DEFAULT_IMAGE_TOKEN


@dataclass(frozen=True)
class RecordsLoader(Loader):
    """Records of a file or a mixture, each once. Field for prompts: `question`, the user's turn with its markers.

    A record with several answers gives a sample for each. Its history is the true conversation, images included, so
    that an early mistake does not spoil later answers. Files: `target`, the first image of the true answer.
    """

    name: ClassVar[str] = "records"
    image_folder: str | None = None
    """Where a file's paths start, relative to the file; by default its folder. Mixtures name their own."""

    def load(self, path: Path) -> Sequence[Sample]:
        """See `Loader.load`; a bad record is a `RecordError`."""
        folder = None if self.image_folder is None else path.parent / self.image_folder
        data = load_data(path, None, folder, check=False, weighted=False, folder_flag="image_folder")
        is_mixture = len(data.datasets) > 1
        return [
            sample
            for dataset in data.datasets
            for number in range(len(dataset))
            for sample in _samples(dataset, number, {"source": dataset.name} if is_mixture else {})
        ]


def _samples(dataset: ConversationDataset, number: int, categories: dict[str, str]) -> Iterator[Sample]:
    """A sample for each answer of a record."""
    record, conversation = dataset.record(number), dataset.conversation(number)
    with record_errors(record):
        images = [_reference(ref, dataset.store(number)) for ref in conversation.images]
    name, begun = f"{dataset.name}/{number}", 0
    turns = conversation.turns
    answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    for place, turn in enumerate(turns):
        own = images[begun : begun + turn.text.count(DEFAULT_IMAGE_TOKEN)]
        if turn.role == "assistant":
            text = without_markers(turn.text)
            kinds = [*(["text"] if text else []), *(["image"] if own else [])]
            yield Sample(
                id=name if len(answers) == 1 else f"{name}/{answers.index(place) + 1}",
                fields={"question": turns[place - 1].text, "record": name, "record_id": record.id},
                reference={"text": text, "images": len(own)},
                images=tuple(images[:begun]),
                files={"target": own[0]} if own else {},
                categories={"answer": " and ".join(kinds) or "nothing", **categories},
                history=tuple(each.as_message() for each in turns[: place - 1]),
            )
        begun += len(own)


def _reference(ref: ImageRef, store: MediaStore) -> str:
    """The file of an image; a data URL if it is in a tar, or only part of a file, such as a frame."""
    if isinstance(store, FolderStore) and ref == ImageRef(ref.path):
        file = store.open(ref.path)
        if not file.is_file():
            raise MediaError("missing_image", f"there is no image file {file}; is the image folder right?")
        return str(file.absolute())
    content = io.BytesIO()
    load_all([ref], store)[0].save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
