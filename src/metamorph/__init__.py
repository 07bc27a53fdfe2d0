"""MetaMorph: one decoder-only language model that reads and draws images (Visual-Predictive Instruction Tuning).

`metamorph.load(model, visualizer)` answers and draws. The packages, from the network upwards:

`models/`                     the network, its losses, decoding, the processor
`data/`                       records, tasks, images and videos, packing
`visualization/`              visual tokens to pixels
`inference/`                  answers and drawings of a trained model
`serving/`                    an HTTP server that gives them to many clients
`evaluation/`                 how good they are
`training/`                   stages 1 and 2; `visualizer_training/` trains the visualizer
`miniature/`                  the entire system in a small drawn world; `mini/` holds the weights that ship
`cli/`                        the `metamorph` command; `recipes/` holds settings for each stage and model size
`flags/`, `files/`, `runs/`   shared: flags, files from untrusted sources, folders and processes of a run

The docstring of each package says which file answers which question.
Names are imported on first use, so that `import metamorph` and `metamorph --help` take no time. Transformers' Auto
classes know the model as soon as the package is imported (`auto_classes.py`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metamorph.auto_classes import register_lazily


__version__ = "0.1.0"

if TYPE_CHECKING:
    from metamorph.inference import draw, load, reply_to
    from metamorph.models.backbone import MetaMorphModel
    from metamorph.models.configuration_metamorph import MetaMorphConfig
    from metamorph.models.modeling_metamorph import MetaMorphForConditionalGeneration
    from metamorph.models.processing_metamorph import MetaMorphProcessor
    from metamorph.visualization.pipeline import VisualizationPipeline

__all__ = [
    "MetaMorphConfig",
    "MetaMorphForConditionalGeneration",
    "MetaMorphModel",
    "MetaMorphProcessor",
    "VisualizationPipeline",
    "draw",
    "load",
    "reply_to",
]

_HOMES = {
    "MetaMorphConfig": "metamorph.models.configuration_metamorph",
    "MetaMorphForConditionalGeneration": "metamorph.models.modeling_metamorph",
    "MetaMorphModel": "metamorph.models.backbone",
    "MetaMorphProcessor": "metamorph.models.processing_metamorph",
    "VisualizationPipeline": "metamorph.visualization.pipeline",
    "draw": "metamorph.inference",
    "load": "metamorph.inference",
    "reply_to": "metamorph.inference",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


register_lazily()
