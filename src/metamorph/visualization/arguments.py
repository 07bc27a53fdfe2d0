"""Old import path of `metamorph.visualizer_training.arguments`, kept for one release."""

import warnings

from metamorph.visualizer_training.arguments import VisualizerArguments as VisualizerArguments


warnings.warn(
    "metamorph.visualization.arguments has moved to metamorph.visualizer_training.arguments",
    DeprecationWarning,
    stacklevel=2,
)
