"""Old import path of `metamorph.visualizer_training.run`, kept for one release."""

import warnings

from metamorph.visualizer_training.run import train_visualizer as train_visualizer


warnings.warn(
    "metamorph.visualization.train has moved to metamorph.visualizer_training.run",
    DeprecationWarning,
    stacklevel=2,
)
