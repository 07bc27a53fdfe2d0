"""What mini-siglip is trained on: scenes with hard negatives, captions, and classes per cell of the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from metamorph.miniature.world.cells import cell_labels
from metamorph.miniature.world.scenes import (
    BACKGROUNDS,
    COLORS,
    CORNERS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    is_reserved,
    sample_scene,
)
from tools.miniature.tokenizer import build_tokenizer


CELL_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": COLORS,
    "size": SIZES,
    "position": POSITIONS,
    "background": BACKGROUNDS,
}
"""What the auxiliary head reads from each token's cell; for the shape, class 0 is "no object here"."""

IGNORED = -100
"""Class of what cannot be read, such as the colour of a cell without object."""


@dataclass(frozen=True)
class SiglipRecipe:
    """Everything that decides what mini-siglip becomes, besides the seed."""

    vision_width: int = 128
    vision_layers: int = 3
    text_width: int = 96
    text_layers: int = 2
    num_attention_heads: int = 4
    caption_length: int = 28
    batch_size: int = 128
    steps: int = 900
    learning_rate: float = 1.5e-3
    warmup_steps: int = 60
    auxiliary_weight: float = 2.0
    pair_fraction: float = 0.5
    pixel_noise: float = 0.06


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene in full; the order of two objects is drawn."""
    objects = [scene.objects[index] for index in rng.permutation(len(scene.objects))]
    parts = [f"a {item.size} {item.color} {item.shape} at the {item.position}" for item in objects]
    return " and ".join(parts) + f" on a {scene.background} background"


def changed_in_one_attribute(scene: Scene, rng: np.random.Generator) -> Scene:
    """The hard negative of `scene`: one attribute of one object, or the background, is another one."""
    while True:
        name = tuple(CELL_ATTRIBUTES)[rng.integers(len(CELL_ATTRIBUTES))]
        if name == "background":
            words = [word for word in BACKGROUNDS if word != scene.background]
            changed = replace(scene, background=words[rng.integers(len(words))])
        else:
            index = int(rng.integers(len(scene.objects)))
            item = scene.objects[index]
            words = list(CORNERS if name == "position" and len(scene.objects) == 2 else CELL_ATTRIBUTES[name])
            taken = {getattr(item, name)}
            if name == "position":
                taken = {other.position for other in scene.objects}
            free = [word for word in words if word not in taken]
            item = replace(item, **{name: free[rng.integers(len(free))]})
            objects = (*scene.objects[:index], item, *scene.objects[index + 1 :])
            changed = replace(scene, objects=objects)
        if not is_reserved(changed):
            return changed


def cell_classes(scenes: Sequence[Scene]) -> Tensor:
    """Targets of the auxiliary head in the order of `CELL_ATTRIBUTES`, `[scenes, 16, 5]` int64.

    Where there is no object, colour, size and position are `IGNORED`.
    """
    labels = cell_labels(scenes)
    backgrounds = torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])
    others = labels[..., 1:] - 1
    return torch.cat(
        [
            labels[..., :1],
            others.masked_fill(others < 0, IGNORED),
            backgrounds[:, None, None].expand(-1, labels.shape[1], 1),
        ],
        dim=-1,
    )


def training_scenes(recipe: SiglipRecipe, rng: np.random.Generator) -> list[Scene]:
    """One batch: scenes and, after each, its hard negative. Reserved scenes never occur."""
    scenes: list[Scene] = []
    while len(scenes) < recipe.batch_size:
        scene = sample_scene(rng, pair_fraction=recipe.pair_fraction)
        scenes += [scene, changed_in_one_attribute(scene, rng)]
    return scenes[: recipe.batch_size]


def scene_key(scene: Scene) -> tuple[str, frozenset[Any]]:
    """What two scenes have in common when their images and captions are interchangeable."""
    return scene.background, frozenset(scene.objects)


def caption_ids(
    tokenizer: PreTrainedTokenizerBase,
    scenes: Sequence[Scene],
    recipe: SiglipRecipe,
    rng: np.random.Generator,
) -> Tensor:
    """Captions as SigLIP reads them: padded to the full length, `[scenes, caption_length]`."""
    texts = [caption(scene, rng) for scene in scenes]
    batch = tokenizer(
        texts, padding="max_length", max_length=recipe.caption_length, truncation=True, return_tensors="pt"
    )
    return batch.input_ids


def caption_tokenizer(recipe: SiglipRecipe) -> PreTrainedTokenizerBase:
    """The tokenizer of the text tower; it knows the words of `caption` and nothing else."""
    words = [word for words in CELL_ATTRIBUTES.values() for word in words]
    tokenizer = build_tokenizer([*words, "a at the and on background"], model_max_length=recipe.caption_length)
    tokenizer.chat_template = None
    return tokenizer
