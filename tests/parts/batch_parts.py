"""Batches as the collators make them, padded and packed, with and without indices."""

import torch
from model_parts import image_ids

from metamorph.data.batching.collation import PackedCollator, PaddedCollator


def make_examples(config) -> list[dict]:
    """A question about an image, an image to draw, and text."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    image = image_ids(config)
    examples = []
    for prompt, reply, drawn, images in (
        ([1, *image, 5], [6, 7, 2], False, pixels[:1]),
        ([1, 8, 9], [10, *image, 2], True, pixels[1:]),
        ([1, 11], [12, 13, 14, 2], False, None),
    ):
        ids = torch.tensor(prompt + reply)
        labels = torch.tensor([-100] * len(prompt) + reply).masked_fill(ids == config.image_token_id, -100)
        mask = (ids == config.image_token_id) & drawn
        example = {"input_ids": ids, "labels": labels, "visual_target_mask": mask}
        examples.append(example | ({} if images is None else {"pixel_values": images}))
    return examples


def collate(config, packed: bool, image_token_id: int | None) -> dict:
    examples = make_examples(config)
    if packed:
        return PackedCollator(0, image_token_id=image_token_id)([examples[:2], examples[2:]])
    return PaddedCollator(0, image_token_id)(examples)
