"""Builds mini-sd: the miniature's VAE and UNet, in the classes and the folder layout of Stable Diffusion.

Seeded, resumable, logged. A gate stops a VAE that is not good enough before the UNet is trained on it, and another
stops a UNet before it replaces the one in the package.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file

from metamorph.files.permissions import save_file
from metamorph.mini import AssetError
from metamorph.miniature.quickstart.conditions import ENCODER_FILE, AttributeEncoder
from tools.miniature.cards import AssetCard, library_versions, write_card
from tools.miniature.sd_unet import (
    GUIDANCE_SCALE,
    SAMPLING_STEPS,
    UnetRecipe,
    evaluate_unet,
    load_snapshot,
    new_noise_scheduler,
    train_unet,
)
from tools.miniature.sd_vae import VaeRecipe, evaluate_vae, train_vae


logger = logging.getLogger(__name__)

NAME = "mini-sd"

GATES = {
    "vae.singles": 0.98,
    "vae.pairs": 0.98,
    "attributes.singles": 0.95,
    "attributes.pairs": 0.85,
}
"""Least shares of images that the checker must read right in every attribute, on scenes of no training."""


@dataclass(frozen=True)
class SdRecipe:
    """Hyper-parameters of the whole build."""

    vae: VaeRecipe = field(default_factory=VaeRecipe)
    """Of the autoencoder."""
    unet: UnetRecipe = field(default_factory=UnetRecipe)
    """Of the denoiser."""
    evaluation_scenes: int = 128
    """Scenes of one object, and as many of two, that the figures of the card are read on."""


def build(
    output_dir: Path,
    *,
    seed: int = 0,
    resume: bool = True,
    recipe: SdRecipe | None = None,
    work_dir: Path | None = None,
    enforce_gates: bool = True,
) -> dict[str, Any]:
    """Train, judge and write mini-sd.

    Args:
        output_dir: Folder of the finished asset; written only when the gates are passed.
        seed: Seed of weights and data.
        resume: Whether to continue an interrupted build.
        recipe: Hyper-parameters, the shipped ones by default.
        work_dir: Folder of the unfinished build, by default `<output_dir>.building`; removed at the end.
        enforce_gates: Whether figures below a gate are an error.

    Returns:
        The figures of the card.

    Raises:
        AssetError: A gate is not reached.
    """
    recipe = recipe or SdRecipe()
    work_dir = work_dir or output_dir.with_name(output_dir.name + ".building")
    gates = GATES if enforce_gates else {}
    vae, vae_seconds = _build_vae(seed, work_dir, recipe, gates, resume=resume)
    train_unet(vae, seed, work_dir / "unet", recipe.unet, resume=resume)
    unet, encoder, facts = load_snapshot(work_dir / "unet" / "snapshot")

    finished = work_dir / "finished"
    write_weights(vae, unet, encoder, finished)
    # The figures are those of the rounded weights, not of the ones in memory.
    figures = measure(finished, seed, recipe.evaluation_scenes)
    logger.info("%s: %s", NAME, figures)
    check_gates(figures, gates)
    write_card(finished, _card(seed, vae_seconds + facts["seconds"], recipe, figures))
    shutil.rmtree(output_dir, ignore_errors=True)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(finished, output_dir)
    shutil.rmtree(work_dir)
    return figures


def check_gates(figures: dict[str, float], gates: dict[str, float] = GATES) -> None:
    """Compare figures with the gates of the same names.

    Raises:
        AssetError: A figure is below its gate; the message names it.
    """
    low = {name: figures[name] for name, least in gates.items() if name in figures and figures[name] < least}
    if low:
        needed = {name: gates[name] for name in low}
        raise AssetError(f"{NAME} is below its gates {needed}: {low}. Train longer, or try another seed.")


def write_weights(vae: AutoencoderKL, unet: UNet2DConditionModel, encoder: AttributeEncoder, folder: Path) -> None:
    """Write all parts to `folder` in bfloat16, in Stable Diffusion's layout; what is there is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    vae.to(torch.bfloat16).save_pretrained(folder / "vae")
    unet.to(torch.bfloat16).save_pretrained(folder / "unet")
    new_noise_scheduler().save_pretrained(folder / "scheduler")
    tables = {name: table.to(torch.bfloat16) for name, table in encoder.state_dict().items()}
    save_file(tables, folder / ENCODER_FILE)


def load_asset(folder: Path) -> tuple[AutoencoderKL, UNet2DConditionModel, AttributeEncoder]:
    """Load mini-sd in float32: VAE, UNet, and the encoder of attributes that the UNet was trained with."""
    encoder = AttributeEncoder()
    encoder.load_state_dict(load_file(folder / ENCODER_FILE))
    vae = AutoencoderKL.from_pretrained(folder / "vae").float()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").float()
    return vae.eval(), unet.eval(), encoder.eval()


def measure(folder: Path, seed: int, count: int) -> dict[str, float]:
    """Figures of the weights in `folder` on `count` reserved singles and as many pairs, by names as in `GATES`."""
    vae, unet, encoder = load_asset(folder)
    figures = {f"vae.{name}": value for name, value in evaluate_vae(vae, seed, count).items()}
    for name, shares in evaluate_unet(unet, vae, encoder, seed, count).items():
        figures[f"attributes.{name}"] = shares.pop("all")
        figures |= {f"attributes.{name}.{attribute}": share for attribute, share in shares.items()}
    return figures


def _build_vae(
    seed: int, work_dir: Path, recipe: SdRecipe, gates: dict[str, float], *, resume: bool
) -> tuple[AutoencoderKL, float]:
    """Train the VAE or load the finished one; also the seconds that its training took."""
    folder, facts_path = work_dir / "vae", work_dir / "vae.json"
    facts = json.loads(facts_path.read_text(encoding="utf-8")) if resume and facts_path.is_file() else None
    identity = f"seed {seed} {recipe.vae}"
    if facts and facts["identity"] == identity:
        logger.info("the VAE in %s is finished", folder)
        return AutoencoderKL.from_pretrained(folder).eval(), facts["seconds"]
    vae, seconds = train_vae(seed, work_dir / "vae_training", recipe.vae, resume=resume)
    figures = {f"vae.{name}": value for name, value in evaluate_vae(vae, seed, recipe.evaluation_scenes).items()}
    logger.info("VAE after %.0f s: %s", seconds, figures)
    check_gates(figures, gates)
    vae.save_pretrained(folder)
    facts_path.write_text(json.dumps({"identity": identity, "seconds": seconds}) + "\n", encoding="utf-8")
    return vae, seconds


def _card(seed: int, seconds: float, recipe: SdRecipe, figures: dict[str, float]) -> AssetCard:
    return AssetCard(
        name=NAME,
        summary=(
            "Stable Diffusion in miniature: `AutoencoderKL` (64×64 images, 16×16×4 latents), `UNet2DConditionModel` "
            "(v-prediction, conditioned by cross-attention alone) and its noise schedule. The UNet was pretrained "
            "on the attributes of drawn scenes: one condition token for each cell of a 4×4 grid, padded with zeros "
            "to 77 tokens; `condition_encoder.safetensors` holds the embeddings of those attributes. Scenes "
            "reserved for evaluation were not trained on. `vae.*` are the fractions of reconstructions, "
            "`attributes.*` of images drawn from attributes, in which the pixel checker reads every attribute (or "
            "the named one) right, on reserved scenes, with the bf16 weights of this folder."
        ),
        build_command="python -m tools.miniature.rebuild sd",
        seed=seed,
        seconds=seconds,
        recipe={
            **{f"vae.{name}": value for name, value in asdict(recipe.vae).items()},
            **{f"unet.{name}": value for name, value in asdict(recipe.unet).items()},
            "evaluation_scenes": recipe.evaluation_scenes,
            "sampling": f"DPM-Solver, {SAMPLING_STEPS} steps, guidance {GUIDANCE_SCALE}",
        },
        figures=figures,
        gates=GATES,
        versions={**library_versions(), "diffusers": diffusers.__version__},
    )
