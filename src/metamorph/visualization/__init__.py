"""Visual tokens to pixels: the projector, the pipeline that draws, and the trainer of both.

Names are imported on first use, so that `import metamorph.visualization` does not need diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from metamorph.visualization.encoder import VisualTokenEncoder
    from metamorph.visualization.loading import load_visualizer
    from metamorph.visualization.pipeline import VisualizationPipeline
    from metamorph.visualization.projector import VisualizationProjector, pad_condition
    from metamorph.visualizer_training.arguments import VisualizerArguments
    from metamorph.visualizer_training.run import VisualizerResult, train_visualizer

_HOMES = {
    "VisualizationPipeline": "pipeline",
    "VisualizationProjector": "projector",
    "VisualizerArguments": "arguments",
    "VisualizerResult": "train",
    "VisualTokenEncoder": "encoder",
    "load_visualizer": "loading",
    "pad_condition": "projector",
    "train_visualizer": "train",
}

__all__ = [
    "VisualTokenEncoder",
    "VisualizationPipeline",
    "VisualizationProjector",
    "VisualizerArguments",
    "VisualizerResult",
    "load_visualizer",
    "pad_condition",
    "train_visualizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
