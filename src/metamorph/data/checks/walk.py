"""The walk over records that `metamorph data check` and the check at the start of a run share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from metamorph.data.media.refs import Box, ImageRef
from metamorph.data.media.stores import MediaStore, image_size, record_errors
from metamorph.data.records import Record, RecordError, Turn, UnsupervisedRecordError
from metamorph.data.remarks import remarks
from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.models.sequence.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, IGNORE_INDEX
from metamorph.models.sequence.conversations import split_at_images
from metamorph.runs.progress import Progress


if TYPE_CHECKING:
    from metamorph.data.dataset import MixtureDataset
    from metamorph.data.examples import ConversationDataset

BOX_WARNINGS = {
    "box_outside": "a box reaches beyond its image, and is clipped",
    "box_format": "right and bottom of a box seem to be read as its width and height",
}
"""Problems of boxes that training accepts."""

_BOX_ROUNDING = 1.0
"""Pixels by which annotation tools may exceed the image."""
_BATCH = 16
_IMAGE_WRAPPERS = 2
"""`<image_start>` and `<image_end>`: truncation removes at most one image more than the limit requires."""


@dataclass(frozen=True)
class Finding:
    """The result of checking one record."""

    index: int
    where: str
    """File and line (or index); empty if not even the record could be read."""
    record_id: str | None
    warnings: tuple[tuple[str, str], ...]
    """Kind and detail of what training would accept."""
    error: RecordError | None = None
    """Why the record cannot be trained on."""
    paths: tuple[str, ...] = ()
    """Media files that the record needs."""
    num_missing: int = 0
    """Those of them that do not exist."""
    sizes: tuple[int, int, int, int, int] = (-1,) * 5
    """Tokens before and after truncation, tokens with text loss, images, answer images; -1 if there is an error."""
    box_shares: tuple[float, ...] = ()
    """Share of its image that each box covers, 0 to 1."""


def walk(
    dataset: ConversationDataset | MixtureDataset,
    indices: Sequence[int],
    desc: str,
    *,
    media_place: str | None = None,
    num_workers: int = 0,
) -> Iterator[Finding]:
    """Check records one by one; the data set must raise their errors.

    With `media_place=None` every training example is built, so media are decoded. Otherwise the check only looks
    whether the media files exist, and `media_place` is where error messages say it looked.
    """
    loader: DataLoader[Finding] = DataLoader(
        _Findings(dataset, indices, media_place),
        batch_size=_BATCH,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # a loader's seed must not come from the random numbers of the run
    )
    with Progress(desc=desc, total=len(indices), unit="record", delay=2) as bar:
        for batch in loader:
            yield from batch
            bar.update(len(batch))


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers below `count`, evenly spread."""
    return list(range(count)) if count <= limit else np.linspace(0, count - 1, limit).astype(int).tolist()


class _Findings(Dataset[Finding]):
    """The walk as a data set, so that the workers of a data loader can share it."""

    def __init__(
        self, dataset: ConversationDataset | MixtureDataset, indices: Sequence[int], media_place: str | None
    ) -> None:
        self.dataset = dataset
        self.indices = indices
        self.media_place = media_place
        self.control_tokens = _control_tokens(dataset.processor)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Finding:
        index = int(self.indices[place])
        source, number = self.dataset.locate(index)
        warnings: list[tuple[str, str]] = []
        values: dict[str, Any] = {"where": "", "record_id": None}
        try:
            record = source.record(number)
            values |= {"where": record.where, "record_id": record.id}
            look = self._try_out if self.media_place is None else self._look_for_media
            values |= look(source, number, record, warnings)
        except RecordError as error:
            values |= {"error": error, "where": error.where, "record_id": error.record_id or values["record_id"]}
            if isinstance(error, UnsupervisedRecordError):  # perhaps because it was truncated
                warnings += _over_long(source.model_max_length, source.measure(number), None)
        return Finding(index, warnings=tuple(warnings), **values)

    def _look_for_media(
        self, source: ConversationDataset, number: int, record: Record, warnings: list[tuple[str, str]]
    ) -> dict[str, Any]:
        """Check that the files of a record exist. A video is not opened, so its conversation is not built."""
        if record.video is not None:
            paths, what = [record.video], "video"
        else:
            conversation = source.conversation(number)
            paths, what = list(dict.fromkeys(image.path for image in conversation.images)), "image"
            warnings += remarks(record, conversation.turns, paths)
        store = source.store(number)
        with record_errors(record):
            missing = [path for path in paths if not store.exists(path)]
        error = None
        if missing:
            detail = f"there is no {what} file {missing[0]}; is {self.media_place} right?"
            error = record.error(f"missing_{what}", detail)
        return {"paths": tuple(paths), "num_missing": len(missing), "error": error}

    def _try_out(
        self, source: ConversationDataset, number: int, record: Record, warnings: list[tuple[str, str]]
    ) -> dict[str, Any]:
        """Build the example of a record, and measure it."""
        conversation = source.conversation(number)
        paths = tuple(ref.path for ref in conversation.images)
        warnings += _faults_of_turns(conversation.turns, self.control_tokens)
        warnings += remarks(record, conversation.turns, paths)
        example = source[number]
        count, limit = source.processor.num_image_tokens, source.model_max_length
        kept_tokens, kept_images = len(example["input_ids"]), len(example.get("pixel_values", ()))
        sizes = kept_tokens, kept_images, int(example["visual_target_mask"].sum()) // count
        if limit is not None and kept_tokens > limit - count - _IMAGE_WRAPPERS:  # it may have been truncated
            sizes = source.measure(number)[:3]
        faults, shares = check_boxes(conversation.images, source.store(number))
        warnings += faults
        warnings += _over_long(limit, sizes, (kept_tokens, kept_images))
        text_targets = int((example["labels"] != IGNORE_INDEX).sum())
        return {"paths": paths, "sizes": (sizes[0], kept_tokens, text_targets, *sizes[1:]), "box_shares": tuple(shares)}


def _over_long(limit: int | None, sizes: Sequence[int], kept: tuple[int, int] | None) -> list[tuple[str, str]]:
    """What training would cut off of `sizes` (tokens, images); `kept` is None if nothing to learn is left."""
    tokens, images = sizes[:2]
    if limit is None or tokens <= limit:
        return []
    text = f"the record has {tokens} tokens, more than --model_max_length {limit}: "
    if kept is None:
        return [("over_long", f"{text}nothing to learn is left at that length; shorten or split it")]
    dropped = f" and {images - kept[1]} of {images} image(s)" if images > kept[1] else ""
    text += f"its last {tokens - kept[0]} tokens{dropped} would be cut off; shorten or split it"
    return [("over_long", text)]


def _faults_of_turns(turns: Sequence[Turn], control_tokens: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    for number, turn in enumerate(turns, 1):
        parts = split_at_images(turn.text)
        texts = [part for part in parts if isinstance(part, str)]
        if not "".join(texts).strip() and len(texts) == len(parts):
            learned = "only the end of the turn would be learned" if turn.role == "assistant" else "it says nothing"
            yield "empty_turn", f"turn {number} ({turn.role}) is empty: {learned}; write a text or remove the record"
        names = sorted({match[0] for text in texts for match in control_tokens.finditer(text)})
        if names:
            yield (
                "control_token",
                f"turn {number} ({turn.role}) contains {', '.join(names)} as text, which would be tokenized like any "
                "other text, because the template adds control tokens itself: remove it",
            )


def _control_tokens(processor: MetaMorphProcessor) -> re.Pattern[str]:
    """Matches the names of the tokens that the template writes, but not `<image>`, which is a marker."""
    names = processor.template.control_tokens - processor.template.thought_tokens
    names |= {DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN}
    # Short ones are ordinary markup: <s> strikes out, <b> is bold.
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if len(name) > 4))


def check_boxes(images: Sequence[ImageRef], store: MediaStore) -> tuple[list[tuple[str, str]], list[float]]:
    """Compare the boxes of a conversation with the sizes of their images, from the headers of the files.

    Returns:
        Kind and detail of each problem, and the share of its image that each box covers.
    """
    found, shares = [], []
    for ref in images:
        boxes = [*([] if ref.box is None else [ref.box]), *(box for _, box in ref.boxes)]
        if not boxes or ref.time is not None:
            continue
        width, height = image_size(ref.path, store)
        for box in boxes:
            shares.append(box.share(width, height))
            if (fault := _fault(box, width, height)) is not None:
                found.append((fault[0], f"{ref.path} ({width}x{height} pixels): {fault[1]}"))
    return found, shares


def _fault(box: Box, width: int, height: int) -> tuple[str, str] | None:
    x, y = (width, height) if box.relative else (1, 1)
    left, top, right, bottom = box.left * x, box.top * y, box.right * x, box.bottom * y
    if min(left, top) >= -_BOX_ROUNDING and right <= width + _BOX_ROUNDING and bottom <= height + _BOX_ROUNDING:
        return None
    numbers = f"the box {box.left:g}, {box.top:g}, {box.right:g}, {box.bottom:g} (left, top, right, bottom)"
    third, fourth = right - left, bottom - top  # as the record has them, if it gives width and height
    if box.from_size and 0 <= left < third <= width + _BOX_ROUNDING and 0 <= top < fourth <= height + _BOX_ROUNDING:
        return (
            "box_format",
            f"{numbers} reaches beyond the image, but would fit if its last two numbers were right and bottom; "
            "set box_format: xyxy in the source's options if they are",
        )
    return (
        "box_outside",
        f"{numbers} reaches beyond the image and is clipped; correct it, or box_units, or the size of the image: boxes "
        "are in pixels of the upright image as the file is now",
    )
