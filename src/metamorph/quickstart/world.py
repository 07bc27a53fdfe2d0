"""Old import path of `metamorph.miniature.world`, kept for one release."""

from metamorph.miniature.world.changes import *  # noqa: F403
from metamorph.miniature.world.checker import *  # noqa: F403
from metamorph.miniature.world.dataset import *  # noqa: F403
from metamorph.miniature.world.knowledge import *  # noqa: F403
from metamorph.miniature.world.render import *  # noqa: F403
from metamorph.miniature.world.scenes import *  # noqa: F403
from metamorph.quickstart import warn_of_move


warn_of_move(__name__, "metamorph.miniature.world")
