"""Builds mini-siglip: a SigLIP of under a million weights that sees the miniature world.

Run as `python -m tools.miniature.build_siglip`. The loss is SigLIP's sigmoid loss on images and
captions, plus an auxiliary one that reads the object's attributes from every reduced token (the idea of the
additional dense losses of LocCa and SigLIP 2): without it the contrastive loss is content with the attributes
that tell most images apart, and a linear probe cannot read the shape.

Tensor suffixes: B images, N reduced tokens (16), D hidden width.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, SiglipConfig, SiglipImageProcessor, SiglipModel

from metamorph.mini import AssetError
from metamorph.miniature.world.cells import GRID
from metamorph.miniature.world.render import IMAGE_SIZE
from metamorph.miniature.world.scenes import SHAPES, Scene, sample_scene
from tools.miniature.cards import AssetCard, write_card
from tools.miniature.probes import PROBE_NAMES, LinearProbes, probe_scenes, scene_pixels
from tools.miniature.siglip_data import (
    CELL_ATTRIBUTES,
    IGNORED,
    SiglipRecipe,
    caption_ids,
    caption_tokenizer,
    cell_classes,
    scene_key,
    training_scenes,
)
from tools.miniature.training_state import STATE_FILE, TrainingSchedule, step_rng, train


logger = logging.getLogger(__name__)

NAME = "mini-siglip"
GATE = 0.97
"""Each of the four probes must reach this on unseen single and two-object scenes."""

_TRAINING_STREAM, _PROBE_STREAM, _RETRIEVAL_STREAM = 0, 1, 2


def reduced_tokens(model: SiglipModel, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """What the tower of MetaMorph makes of images, with gradients.

    Args:
        model: SigLIP model whose patches form a square grid.
        pixel_values: `[images, 3, 64, 64]`.

    Returns:
        The last layer's hidden state before the post layer norm, reduced bilinearly to 4×4 and normalised,
        `[images, 16, hidden]`; and the pooled embedding of each image, `[images, hidden]`.
    """
    output = model.get_image_features(pixel_values, output_hidden_states=True)
    hidden_BPD = output.hidden_states[-1].float()
    side = math.isqrt(hidden_BPD.shape[1])
    grid_BDHW = hidden_BPD.transpose(1, 2).unflatten(2, (side, side))
    small = functional.interpolate(grid_BDHW, size=(GRID, GRID), mode="bilinear", align_corners=False)
    return functional.normalize(small.flatten(2).transpose(1, 2), dim=-1), output.pooler_output.float()


class MiniSiglip(nn.Module):
    """SigLIP and the auxiliary head that is thrown away after training."""

    def __init__(self, recipe: SiglipRecipe, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        heads = recipe.num_attention_heads
        vision = {
            "hidden_size": recipe.vision_width,
            "intermediate_size": 4 * recipe.vision_width,
            "num_hidden_layers": recipe.vision_layers,
            "num_attention_heads": heads,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
        }
        text = {
            "hidden_size": recipe.text_width,
            "intermediate_size": 4 * recipe.text_width,
            "num_hidden_layers": recipe.text_layers,
            "num_attention_heads": heads,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": recipe.caption_length,
            "projection_size": recipe.vision_width,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        self.siglip = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
        nn.init.constant_(self.siglip.logit_scale, math.log(10.0))
        nn.init.constant_(self.siglip.logit_bias, -10.0)
        # Class 0 of the shape is "no object in this cell".
        self.class_counts = [len(SHAPES) + 1, *(len(words) for words in list(CELL_ATTRIBUTES.values())[1:])]
        self.auxiliary_head = nn.Linear(recipe.vision_width, sum(self.class_counts))

    def losses(self, pixel_values: Tensor, input_ids: Tensor, same: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Sigmoid loss per image and auxiliary loss.

        Args:
            pixel_values: `[images, 3, 64, 64]`.
            input_ids: Captions `[images, caption_length]`.
            same: Which image and caption match, `[images, images]` bool.
            cells: Classes per cell, `[images, 16, 5]` int64, -100 where there is nothing to read.
        """
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens_BND, pooled_BD = reduced_tokens(self.siglip, pixel_values)
            text_BD = self.siglip.get_text_features(input_ids).pooler_output.float()
        image_BD = functional.normalize(pooled_BD, dim=-1)
        text_BD = functional.normalize(text_BD, dim=-1)
        logits = image_BD @ text_BD.T * self.siglip.logit_scale.exp() + self.siglip.logit_bias
        signs = same.to(logits.dtype) * 2 - 1
        sigmoid_loss = -functional.logsigmoid(signs * logits).sum() / len(logits)
        # Unit vectors have entries near 1/sqrt(D): the factor gives the head inputs of unit variance.
        scores = self.auxiliary_head(tokens_BND * math.sqrt(tokens_BND.shape[-1])).flatten(0, 1)
        auxiliary = scores.new_zeros(())
        for index, part in enumerate(scores.split(self.class_counts, dim=-1)):
            auxiliary = auxiliary + functional.cross_entropy(part, cells[..., index].flatten(), ignore_index=IGNORED)
        return sigmoid_loss, auxiliary


@torch.no_grad()
def encode_scenes(model: SiglipModel, scenes: Sequence[Scene], rng: np.random.Generator) -> Tensor:
    """Reduced tokens of jittered drawings, `[scenes, 16, hidden]` float32."""
    pixels = scene_pixels(scenes, rng)
    return torch.cat([reduced_tokens(model, chunk)[0] for chunk in pixels.split(128)])


def evaluate(
    model: SiglipModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: SiglipRecipe,
    seed: int,
    *,
    fit_count: int = 2000,
    count: int = 1000,
) -> dict[str, Any]:
    """Probe accuracies on reserved scenes, and caption retrieval among `count // 4` reserved scenes.

    Args:
        model: The tower in evaluation mode.
        tokenizer: Its tokenizer.
        recipe: For the length of captions.
        seed: Seed of the scenes.
        fit_count: Images that the probes are fitted on, half with one object, half with two.
        count: Images of each kind that they are judged on.
    """
    rng = step_rng(seed, _PROBE_STREAM, 0)
    fitted_on = [
        scene for objects in (1, 2) for scene in probe_scenes(rng, fit_count // 2, num_objects=objects, reserved=False)
    ]
    probes = LinearProbes.fit(encode_scenes(model, fitted_on, rng), fitted_on)
    figures: dict[str, Any] = {}
    for kind, objects in (("singles", 1), ("pairs", 2)):
        scenes = probe_scenes(rng, count, num_objects=objects, reserved=True)
        accuracy = probes.accuracy(encode_scenes(model, scenes, rng), scenes)
        figures[kind] = {name: round(value, 4) for name, value in accuracy.items()}
    figures["retrieval_at_1"] = round(_retrieval(model, tokenizer, recipe, seed, count // 4), 4)
    return figures


@torch.no_grad()
def _retrieval(
    model: SiglipModel, tokenizer: PreTrainedTokenizerBase, recipe: SiglipRecipe, seed: int, count: int
) -> float:
    rng = step_rng(seed, _RETRIEVAL_STREAM, 0)
    unique: dict[Any, Scene] = {}
    while len(unique) < count:
        scene = sample_scene(rng, reserved=True)
        unique[scene_key(scene)] = scene
    scenes = list(unique.values())
    text = model.get_text_features(caption_ids(tokenizer, scenes, recipe, rng)).pooler_output
    _, image = reduced_tokens(model, scene_pixels(scenes, rng))
    scores = functional.normalize(image, dim=-1) @ functional.normalize(text, dim=-1).T
    return (scores.argmax(1) == torch.arange(count)).float().mean().item()


def check_gates(figures: dict[str, Any]) -> None:
    """Raise AssetError when a probe is below the gate, naming it."""
    low = {
        f"{kind}.{name}": figures[kind][name]
        for kind in ("singles", "pairs")
        for name in PROBE_NAMES
        if figures[kind][name] < GATE
    }
    if low:
        raise AssetError(f"{NAME} is below its gate of {GATE}: {low}. Train longer, or try another seed.")


def build(
    output_dir: Path,
    *,
    seed: int = 0,
    resume: bool = True,
    recipe: SiglipRecipe | None = None,
    work_dir: Path | None = None,
    enforce_gates: bool = True,
) -> dict[str, Any]:
    """Train, judge and write mini-siglip.

    Args:
        output_dir: Folder of the finished asset; written only when the gates are passed.
        seed: Seed of weights and data.
        resume: Whether to continue an interrupted build.
        recipe: Hyper-parameters, the shipped ones by default.
        work_dir: Folder of the unfinished build, by default `<output_dir>.building`; removed at the end.
        enforce_gates: Whether figures below the gate are an error.

    Returns:
        The figures of the card.

    Raises:
        AssetError: A gate is not reached.
    """
    recipe = recipe or SiglipRecipe()
    work_dir = work_dir or output_dir.with_name(output_dir.name + ".building")
    torch.manual_seed(seed)
    tokenizer = caption_tokenizer(recipe)
    modules = MiniSiglip(recipe, tokenizer)

    def loss_of_step(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = step_rng(seed, _TRAINING_STREAM, step)
        scenes = training_scenes(recipe, rng)
        keys = [scene_key(scene) for scene in scenes]
        same = torch.tensor([[left == right for right in keys] for left in keys])
        ids = caption_ids(tokenizer, scenes, recipe, rng)
        pixels = scene_pixels(scenes, rng, noise=recipe.pixel_noise)
        sigmoid_loss, auxiliary = modules.losses(pixels, ids, same, cell_classes(scenes))
        figures = {"sigmoid": sigmoid_loss.item(), "auxiliary": auxiliary.item()}
        return sigmoid_loss + recipe.auxiliary_weight * auxiliary, figures

    schedule = TrainingSchedule(recipe.steps, recipe.learning_rate, recipe.warmup_steps)
    fingerprint = f"{NAME} seed {seed} {recipe}"
    seconds = train(modules, schedule, loss_of_step, work_dir, fingerprint=fingerprint, resume=resume)
    _write_weights(modules.siglip, tokenizer, work_dir)
    # The figures are those of the rounded weights, not of the ones in memory.
    shipped = SiglipModel.from_pretrained(work_dir, dtype=torch.float32).eval()
    figures = evaluate(shipped, tokenizer, recipe, seed)
    logger.info("%s: %s", NAME, figures)
    if enforce_gates:
        check_gates(figures)
    (work_dir / STATE_FILE).unlink()
    write_card(work_dir, _card(seed, seconds, recipe, figures))
    shutil.rmtree(output_dir, ignore_errors=True)
    work_dir.rename(output_dir)
    return figures


def _write_weights(model: SiglipModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.eval().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.backend_tokenizer.no_padding()  # a trace of the last batch
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)


def _card(seed: int, seconds: float, recipe: SiglipRecipe, figures: dict[str, Any]) -> AssetCard:
    return AssetCard(
        name=NAME,
        summary=(
            "A `SiglipModel` for the miniature world: 64×64 images of one or two coloured shapes. It was trained "
            "from scratch on images and captions generated by `metamorph.miniature`, with SigLIP's sigmoid loss, "
            "hard negatives that differ in one attribute, and an auxiliary loss on each of the 16 reduced tokens. "
            "The figures are the accuracies of linear probes, shared by all tokens, on the reduced, normalised "
            "tokens of scenes that were never trained on (of objects for shape, color, size and position; of entire "
            "images for all), with the bf16 weights of this folder."
        ),
        build_command="python -m tools.miniature.rebuild siglip",
        seed=seed,
        seconds=seconds,
        recipe=asdict(recipe),
        figures=figures,
        gates=dict.fromkeys(PROBE_NAMES, GATE),
    )
