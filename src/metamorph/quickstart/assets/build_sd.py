"""Builds mini-sd: the miniature's VAE and UNet, in the classes and the folder layout of Stable Diffusion.

Run as ``python -m metamorph.quickstart.assets.build_sd``. Seeded, resumable, logged; a gate stops a VAE that is not
good enough before the UNet is trained on it.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from diffusers import AutoencoderKL

from metamorph.quickstart.assets.sd_unet import PLAN, train_unet
from metamorph.quickstart.assets.sd_vae import GATE as VAE_GATE
from metamorph.quickstart.assets.sd_vae import evaluate_vae, train_vae


logger = logging.getLogger(__name__)

ASSET_FOLDER = Path(__file__).parent / "mini-sd"
DEFAULT_STATE_FOLDER = Path.home() / ".cache" / "metamorph" / "assets" / "sd"


class GateError(RuntimeError):
    """A trained part does not reach its gate, so nothing is built on it."""


def build_vae(seed: int, state_folder: Path, *, resume: bool) -> AutoencoderKL:
    """Train the VAE, or load the finished one from `state_folder`.

    Raises:
        GateError: its reconstructions are not right often enough.
    """
    finished = state_folder / "vae"
    if resume and (finished / "config.json").is_file():
        logger.info("VAE: using the finished one in %s", finished)
        return AutoencoderKL.from_pretrained(finished)
    vae, seconds = train_vae(seed, state_folder / "vae_training", resume=resume)
    figures = evaluate_vae(vae, seed)
    logger.info("VAE after %.0f s: %s scaling_factor %.4f", seconds, figures, vae.config.scaling_factor)
    vae.save_pretrained(finished)
    if min(figures["singles"], figures["pairs"]) < VAE_GATE:
        raise GateError(f"The VAE's reconstructions reach {figures}; the gate is {VAE_GATE}. Train it longer.")
    return vae


def main() -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state-folder", type=Path, default=DEFAULT_STATE_FOLDER, help="resumable state")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--unet-steps", type=int, default=PLAN.steps)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    vae = build_vae(arguments.seed, arguments.state_folder, resume=arguments.resume)
    plan = replace(PLAN, steps=arguments.unet_steps)
    train_unet(vae, arguments.seed, arguments.state_folder / "unet", plan=plan, resume=arguments.resume)


if __name__ == "__main__":
    main()
