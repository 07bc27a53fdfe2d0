"""Old import path of `metamorph.miniature.world`, kept for one release."""

import warnings

from metamorph.miniature.world.changes import *  # noqa: F403
from metamorph.miniature.world.checker import *  # noqa: F403
from metamorph.miniature.world.dataset import *  # noqa: F403
from metamorph.miniature.world.knowledge import *  # noqa: F403
from metamorph.miniature.world.render import *  # noqa: F403
from metamorph.miniature.world.scenes import *  # noqa: F403


warnings.warn(
    "metamorph.quickstart.world has moved to metamorph.miniature.world",
    DeprecationWarning,
    stacklevel=2,
)
