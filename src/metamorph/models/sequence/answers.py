"""Generated ids to texts and images, in the order in which the model wrote them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch

from metamorph.models.sequence.conversations import ImagePart, TextPart


def interleave(
    answers: Sequence[Any],
    visual_tokens: torch.Tensor | None,
    decode: Callable[[list[int]], str],
    *,
    ends: frozenset[int],
    placeholder: int,
    num_image_tokens: int,
) -> list[list[TextPart | ImagePart]]:
    """Texts and images of each answer.

    Args:
        answers: Generated ids, without the prompt.
        visual_tokens: `[images, num_image_tokens, vision_hidden]`, answer by answer.
        decode: Ids to text.
        ends: Ids that end an answer; what follows the first of them is ignored.
        placeholder: Id of the placeholder.
        num_image_tokens: Placeholders of one image.
    """
    features = [] if visual_tokens is None else list(visual_tokens)
    rows: list[list[TextPart | ImagePart]] = []
    used = 0
    for answer in answers:
        ids = answer.tolist() if isinstance(answer, torch.Tensor) else answer
        parts: list[TextPart | ImagePart] = []
        for run in _split_at_images(takewhile(lambda token: token not in ends, ids), placeholder, num_image_tokens):
            if run is None:
                if used < len(features):
                    parts.append(ImagePart(features[used]))
                used += 1
            elif text := decode(run):
                parts.append(TextPart(text))
        rows.append(parts)
    if used != len(features):
        raise ValueError(
            f"the sequences hold {used} generated image(s) of {num_image_tokens} placeholders, but visual_tokens has "
            f"{len(features)}; is prompt_length the length of the prompt?"
        )
    return rows


def _split_at_images(ids: Iterable[int], placeholder: int, num_image_tokens: int) -> Iterator[list[int] | None]:
    """Ids of text, with None for each complete image between them."""
    text: list[int] = []
    placeholders = 0
    for token in ids:
        if token != placeholder:
            text.append(token)
            continue
        placeholders += 1
        if placeholders == num_image_tokens:
            yield text
            yield None
            text, placeholders = [], 0
    yield text


def stack_visual_tokens(images: Sequence[ImagePart], num_image_tokens: int) -> torch.Tensor:
    """Stack earlier generated images to `[images, num_image_tokens, vision_hidden]`."""
    shapes = {tuple(image.visual_tokens.shape) for image in images}
    if len(shapes) > 1 or any(len(shape) != 2 or shape[0] != num_image_tokens for shape in shapes):
        raise ValueError(
            f"an ImagePart must have visual tokens of shape [{num_image_tokens}, vision_hidden], as this model writes "
            f"them; there are {sorted(shapes)}"
        )
    return torch.stack([image.visual_tokens for image in images])
