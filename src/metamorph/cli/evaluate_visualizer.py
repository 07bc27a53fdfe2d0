"""`metamorph evaluate visualizer --visualizer DIR --images DIR`: how good a visualizer is alone."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from metamorph.cli.shared import add_drawing_flags, check_drawing_flags, open_images, open_pipeline, print_table
from metamorph.flags.parser import at_least, output_folder


if TYPE_CHECKING:
    from PIL import Image

    from metamorph.evaluation.visualizer import Reconstructions


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.set_defaults(run=_run)
    add_drawing_flags(parser)
    parser.add_argument("--images", type=Path, required=True, help="folder of images, searched recursively")
    most_help = "number of images to use, evenly spaced in the order of their names; 0 uses all"
    parser.add_argument("--max-images", type=at_least(0), default=1000, help=most_help)
    parser.add_argument("--batch-size", type=at_least(1), default=16, help="images drawn at once")
    parser.add_argument("--lpips-weights", help="TorchScript file of the VGG16 of LPIPS, to measure LPIPS")
    parser.add_argument("--inception-weights", help="TorchScript file of the Inception network of FID, to measure FID")
    output_help = "folder of visualizer.json and visualizer.png"
    parser.add_argument("--output-dir", type=output_folder, default=Path("evaluation"), help=output_help)
    parser.add_argument("--grid-rows", type=at_least(1), default=8, help="images in visualizer.png")


def _run(flags: argparse.Namespace) -> None:
    check_drawing_flags(flags)
    files = _list_images(flags.images, flags.max_images)
    from metamorph.evaluation.perceptual import ImageFeatures
    from metamorph.evaluation.visualizer import evaluate_visualizer
    from metamorph.inference.draw import SamplerSettings
    from metamorph.inference.session import pick_device
    from metamorph.runs.progress import Progress

    device = pick_device(flags.device, flag="--device")
    lpips = ImageFeatures.lpips(flags.lpips_weights, device) if flags.lpips_weights else None
    inception = ImageFeatures.inception(flags.inception_weights, device) if flags.inception_weights else None
    pipeline = open_pipeline(flags)
    settings = SamplerSettings(tuple(flags.guidance_scale), flags.steps, flags.seed, flags.batch_size)
    with Progress(desc="drawing", total=len(files), unit="image") as progress:
        found = evaluate_visualizer(
            pipeline,
            ImageFiles(files),
            settings,
            keep=flags.grid_rows,
            lpips=lpips,
            inception=inception,
            on_progress=progress.update,
        )
    _write_results(flags, files, found)


@dataclass
class ImageFiles(Sequence["Image.Image"]):
    """Images that are read when they are accessed."""

    files: Sequence[Path]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> "Image.Image":  # type: ignore[override]
        return open_images([self.files[index]], "--images")[0]


def _list_images(folder: Path, most: int) -> list[Path]:
    """The images of a folder and its subfolders, evenly spaced if there are more than `most` (0: all)."""
    from metamorph.visualizer_training.images.archives import IMAGE_SUFFIXES, is_image_name

    if not folder.expanduser().is_dir():
        raise FileNotFoundError(f"--images {folder} is not a folder")
    files = sorted(path for path in folder.expanduser().rglob("*") if is_image_name(path.name) and path.is_file())
    if not files:
        raise ValueError(f"--images {folder} holds no image ending in {', '.join(IMAGE_SUFFIXES)}")
    if most and len(files) > most:
        files = [files[index * len(files) // most] for index in range(most)]
    return files


def _write_results(flags: argparse.Namespace, files: Sequence[Path], found: "Reconstructions") -> None:
    """Print the table, and write visualizer.json and visualizer.png."""
    from metamorph.evaluation.perceptual import FID_IMAGES, NOT_MEASURED

    scales = [score.to_dict() for score in found.scales]
    notes = {name: f"not measured: {reason}" for name, reason in NOT_MEASURED.items() if name not in scales[0]}
    if "fid" in scales[0] and len(files) < FID_IMAGES:
        notes["fid"] = f"of {len(files)} images: FID of fewer than {FID_IMAGES} is much too large"
    per_image = [
        {
            "file": str(file.relative_to(flags.images.expanduser())),
            "cosine": {f"{score.guidance_scale:g}": round(score.cosine[index], 5) for score in found.scales},
            "is_nearest": {f"{score.guidance_scale:g}": score.is_nearest[index] for score in found.scales},
        }
        for index, file in enumerate(files)
    ]
    asked = {name: getattr(flags, name) for name in ("visualizer", "vision_tower", "images", "steps", "seed")}
    report = {**asked, "scales": scales, "notes": notes, "per_image": per_image}
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, default=str) + "\n"  # `images` is a Path
    (flags.output_dir / "visualizer.json").write_text(text, encoding="utf-8")
    found.grid().save(flags.output_dir / "visualizer.png")
    names = [name for name in ("cosine", "cosine_to_others", "lpips", "retrieval_at_1", "fid") if name in scales[0]]
    rows = [(f"{scores['guidance_scale']:g}", *(_shown(scores[name]) for name in names)) for scores in scales]
    print_table(("scale", *(name.replace("_", " ") for name in names)), rows)
    for name, note in notes.items():
        print(f"{name}: {note}")
    print(f"visualizer.json and visualizer.png: {flags.output_dir.resolve()}")


def _shown(value: float | dict[str, float]) -> str:
    return f"{value['mean']:.4f} ± {value['std']:.4f}" if isinstance(value, dict) else f"{value:.4f}"
