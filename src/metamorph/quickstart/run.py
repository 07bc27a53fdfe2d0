"""Old import path of `metamorph.miniature.quickstart.run`, kept for one release."""

from metamorph.miniature.quickstart.run import *  # noqa: F403
from metamorph.quickstart import warn_of_move


warn_of_move(__name__, "metamorph.miniature.quickstart.run")
