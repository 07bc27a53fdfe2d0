"""Visual tokens to pixels: the network and its pipeline; `visualizer_training` trains it.

How do visual tokens become a condition?   `projector.py`
How is an image drawn?                     `pipeline.py`
Where is classifier-free guidance?         `guidance.py`: drop and combine
How does an image become visual tokens?    `encoder.py`, `pixels.py`; which tower and how: `token_options.py`
How is a finished folder loaded?           `loading.py`; what it may contain: `folders.py`
How are images arranged in a grid?         `grids.py`

`projector.py` and `encoder.py` are a file format: `model_index.json` of every visualizer names their classes by module.
Names are imported on first use, so that `import metamorph.visualization` does not need diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from metamorph.visualization.encoder import VisualTokenEncoder as VisualTokenEncoder
    from metamorph.visualization.loading import load_visualizer as load_visualizer
    from metamorph.visualization.pipeline import VisualizationPipeline as VisualizationPipeline
    from metamorph.visualization.projector import VisualizationProjector as VisualizationProjector
    from metamorph.visualization.projector import pad_condition as pad_condition
    from metamorph.visualizer_training.arguments import VisualizerArguments as VisualizerArguments
    from metamorph.visualizer_training.run import train_visualizer as train_visualizer
    from metamorph.visualizer_training.trainer import VisualizerResult as VisualizerResult

_HOMES = {
    "VisualizationPipeline": "metamorph.visualization.pipeline",
    "VisualizationProjector": "metamorph.visualization.projector",
    "VisualizerArguments": "metamorph.visualizer_training.arguments",
    "VisualizerResult": "metamorph.visualizer_training.trainer",
    "VisualTokenEncoder": "metamorph.visualization.encoder",
    "load_visualizer": "metamorph.visualization.loading",
    "pad_condition": "metamorph.visualization.projector",
    "train_visualizer": "metamorph.visualizer_training.run",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
