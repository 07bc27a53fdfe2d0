"""Training examples as people can read them: which tokens are learned, and the images as the vision tower sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor

from metamorph.models.processing_metamorph import MetaMorphProcessor
from metamorph.models.sequence.constants import IGNORE_INDEX


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of an example that are treated alike: some text, or one image."""

    start: int
    """Position of the first token."""
    ids: tuple[int, ...]
    is_learned: bool
    """Whether they have a loss: text loss for text, visual loss for an image."""
    image: int | None = None
    """Number of the image in reading order; None for text."""

    @property
    def kind(self) -> str:
        """`read` or `learned` text, `image` (only read) or `answer_image` (learned)."""
        if self.image is None:
            return "learned" if self.is_learned else "read"
        return "answer_image" if self.is_learned else "image"


def split_example(example: dict[str, Any], processor: MetaMorphProcessor) -> list[Piece]:
    """Split an example of the data set where the kind of its tokens changes."""
    ids = example["input_ids"].tolist()
    learned = (example["labels"] != IGNORE_INDEX).tolist()
    targets = example["visual_target_mask"].tolist()
    placeholder, count = processor.image_tokens.image, processor.num_image_tokens
    pieces: list[Piece] = []
    start = image = 0
    while start < len(ids):
        if ids[start] == placeholder:
            pieces.append(Piece(start, tuple(ids[start : start + count]), targets[start], image))
            image += 1
            start += count
            continue
        end = start + 1
        while end < len(ids) and ids[end] != placeholder and learned[end] == learned[start]:
            end += 1
        pieces.append(Piece(start, tuple(ids[start:end]), learned[start]))
        start = end
    return pieces


def token_rows(pieces: list[Piece], processor: MetaMorphProcessor) -> Iterator[tuple[str, str, str, str]]:
    """Position, id, text and loss of each token, as text; the tokens of an image are one row."""
    for piece in pieces:
        if piece.image is not None:
            last = piece.start + len(piece.ids) - 1
            text = f"image {piece.image}: {len(piece.ids)} visual tokens"
            yield f"{piece.start}–{last}", str(piece.ids[0]), text, "visual target" if piece.is_learned else ""
            continue
        for offset, token in enumerate(piece.ids):
            text = text_of([token], processor)
            yield str(piece.start + offset), str(token), repr(text)[1:-1], "text" if piece.is_learned else ""


def text_of(ids: Sequence[int], processor: MetaMorphProcessor) -> str:
    """The text of tokens, including control tokens."""
    return processor.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def images_of(example: dict[str, Any], image_processor: BaseImageProcessor) -> list[Image.Image]:
    """The images of an example as the vision tower sees them: square, and at its resolution."""
    images = []
    for pixels in example.get("pixel_values", ()):  # float32 (3, height, width), rescaled and normalised
        values = pixels.numpy().transpose(1, 2, 0)  # (height, width, 3)
        if image_processor.do_normalize:
            values = values * np.asarray(image_processor.image_std) + np.asarray(image_processor.image_mean)
        if image_processor.do_rescale:
            values = values / image_processor.rescale_factor
        images.append(Image.fromarray(values.round().clip(0, 255).astype(np.uint8)))
    return images
